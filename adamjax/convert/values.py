"""Reads values from a state: walks its containers, finds leaves by path, checks numbers."""

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.data import Tree
from adamjax.encoding import SCALED8, Scaled8
from adamjax.leaves import is_left_alone
from adamjax.numpy_arrays import expect_jax_array
from adamjax.paths import flatten, unique_paths
from adamjax.rows import RowGradient

__all__ = [
    "SCHEDULE_COUNTS",
    "class_name",
    "counts_a_schedule",
    "dense_totals",
    "field_names",
    "is_container",
    "items_of",
    "leaves_by_path",
    "map_items",
    "number_of",
    "numbers_of",
    "same_decay",
    "same_value",
    "steps_taken",
]


# optax' states that are the count of a schedule and nothing else.
SCHEDULE_COUNTS = ("ScaleByScheduleState", "WrappedScheduleState", "WeightDecaySchedule")


def class_name(x: Any) -> str:
    """The name of a value's class with its module."""
    return f"{type(x).__module__}.{type(x).__qualname__}"


def field_names(x: Any) -> tuple[str, ...] | None:
    """The names of a named tuple's fields; `None` for anything else."""
    return getattr(type(x), "_fields", None) if isinstance(x, tuple) else None


def dense_totals(totals: Tree) -> Tree:
    """Accumulated gradients, row gradients among them, as arrays."""
    return jax.tree.map(
        lambda x: x.to_dense() if isinstance(x, RowGradient) else x,
        totals,
        is_leaf=lambda x: isinstance(x, RowGradient),
    )


def counts_a_schedule(x: Any) -> bool:
    """Whether a value is one of the `SCHEDULE_COUNTS`."""
    is_of_optax = type(x).__module__.split(".")[0] == "optax"
    return is_of_optax and type(x).__name__ in SCHEDULE_COUNTS and field_names(x) == ("count",)


def is_container(x: Any) -> bool:
    """Whether a value is a tuple, a list or a mapping."""
    return isinstance(x, tuple | list | Mapping)


def items_of(x: Any) -> Iterable[Any]:
    """The items of a container; of a mapping, its values."""
    return x.values() if isinstance(x, Mapping) else x


def map_items(function: Callable[..., Any], x: Any, *rest: Any) -> Any:
    """A container of the same type, with the function applied to each item.

    `rest` has containers like `x`, whose items are further arguments of the function.
    """
    if field_names(x) is not None:
        return type(x)(*map(function, x, *rest))
    if isinstance(x, Mapping):
        # The function is called in the order in which JAX flattens a mapping.
        results = {key: function(x[key], *(y[key] for y in rest)) for key in sorted(x, key=str)}
        return type(x)({key: results[key] for key in x})  # type: ignore[call-arg]
    return type(x)(map(function, x, *rest))


def leaves_by_path(owner: str, tree: Tree) -> dict[str, Any]:
    """The floating leaves of a tree by their paths; two leaves with one path are refused."""
    pairs = list(zip(unique_paths(owner, tree), flatten(tree)[0], strict=True))
    for path, x in pairs:
        if isinstance(x, Scaled8):
            raise ValueError(
                f"{owner}: moments of {path!r} are in {SCALED8!r}, and conversions do not round: "
                "convert from or to a transform without it (m_dtype, v_dtype, u_dtype); the floats "
                "of a state are adamjax.get_slot(state, name)"
            )
        _expect_array(owner, path, x)
    return {path: x for path, x in pairs if x is not None and not is_left_alone(x)}


def _expect_array(owner: str, path: str, x: Any) -> None:
    """Refuses a leaf that is no array of JAX or NumPy, such as a tensor of torch."""
    try:
        is_left_alone(x)
    except TypeError as error:
        if isinstance(x, np.ndarray | np.generic):
            raise TypeError(f"{owner}: the leaf {path!r}: {error}") from None
        fix = (
            "give only the arrays of a model, such as eqx.filter(model, eqx.is_inexact_array) or "
            "nnx.state(model, nnx.Param)"
        )
        if hasattr(x, "detach"):
            fix = "make it one, jnp.asarray(x.detach().cpu().numpy())"
        elif hasattr(x, "numpy"):
            fix = "make it one, jnp.asarray(x.numpy())"
        raise TypeError(
            f"{owner}: the leaf {path!r} is a {class_name(x)}, expected an array of JAX or NumPy: "
            f"{fix}"
        ) from None


def _numpy_array(x: Any) -> np.ndarray:
    if not hasattr(x, "detach"):
        return np.asarray(x)
    x = x.detach().cpu()
    # torch cannot convert the views that conj() and some gradients are.
    for name in ("resolve_conj", "resolve_neg"):
        x = getattr(x, name)() if hasattr(x, name) else x
    if not re.search("bfloat16|float8", str(x.dtype)):
        return np.asarray(x.numpy())
    # torch cannot convert these dtypes to NumPy, which knows them by the same names.
    return x.float().numpy().astype(np.dtype(str(x.dtype).removeprefix("torch.")))


def numbers_of(owner: str, what: str, x: Any) -> np.ndarray:
    """A number, an array of numbers or a tensor of torch in NumPy; anything else is refused."""
    if isinstance(x, jax.core.Tracer):
        raise ValueError(
            f"{owner}: {what} is being traced, so it has no value yet; convert outside of jit, "
            "vmap and grad"
        )
    if isinstance(x, np.ma.MaskedArray):
        expect_jax_array(f"{owner}: {what}", x)
    if getattr(x, "is_meta", False):
        raise ValueError(
            f"{owner}: {what} is a tensor on torch's device 'meta', which has no values: load the "
            "state onto another device (map_location='cpu')"
        )
    try:
        array = _numpy_array(x)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a kind of tensor without values.
        array = np.asarray(None)
    if not jnp.issubdtype(array.dtype, np.number):
        fix = ""
        if array.dtype.kind == "V":
            fix = (
                ": if these are the bytes of bfloat16 numbers, as NumPy and h5py load them, "
                "convert them with np.asarray(x).view(ml_dtypes.bfloat16)"
            )
        raise ValueError(
            f"{owner}: {what} is {x!r:.100} of type {type(x).__name__}, expected a number or an "
            f"array of numbers{fix}"
        )
    return array


def number_of(owner: str, what: str, x: Any) -> float:
    """A real number as a float; anything else is refused."""
    array = numbers_of(owner, what, x)
    if array.size != 1 or jnp.issubdtype(array.dtype, np.complexfloating):
        raise ValueError(f"{owner}: {what} is {x!r:.100}, expected one real number")
    return float(array.reshape(()))


def steps_taken(owner: str, what: str, x: Any) -> int:
    """A count of steps as an int; anything else is refused."""
    value = numbers_of(owner, f"the count of {what}", x)
    is_complex = jnp.issubdtype(value.dtype, jnp.complexfloating)
    is_real_scalar = value.shape == () and not is_complex
    if not (is_real_scalar and np.isfinite(value) and value >= 0 and value == np.floor(value)):
        fix = "" if value.shape == () else ": convert the states of several runs one by one"
        raise ValueError(
            f"{owner}: the count of {what} is {x!r}, expected a whole number of steps of at least "
            f"0{fix}"
        )
    if float(value) > np.iinfo(np.int32).max:
        raise ValueError(f"{owner}: the count of {what} is {x!r}, expected at most 2**31 - 1")
    is_narrow = jnp.issubdtype(value.dtype, jnp.floating) and value.dtype.itemsize < 4
    if is_narrow and float(value) >= 2 ** (jnp.finfo(value.dtype).nmant + 1):
        raise ValueError(
            f"{owner}: the count of {what} is {float(value):g} in {value.dtype.name}, which does "
            "not distinguish it from the next count, so there may have been more steps: pass the "
            "true count, as an integer or in float32"
        )
    return int(value)


def same_value(a: Any, b: Any) -> bool:
    """Whether two numbers are equal, up to the rounding of one of them to float32."""
    return math.isclose(float(a), float(b), rel_tol=1e-6, abs_tol=1e-30)


def same_decay(a: Any, b: Any) -> bool:
    """Whether two betas or momenta b are equal, compared by 1 - b, which is what an average uses.

    Rounding b to float32 changes 1 - b by up to 2**-25; twice that is allowed.
    """
    return math.isclose(1 - float(a), 1 - float(b), rel_tol=1e-6, abs_tol=2**-24)
