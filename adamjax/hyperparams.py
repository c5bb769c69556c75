"""Hyperparameters in the state, where a user reads, logs and sets them between steps."""

import copy
import dataclasses
import numbers
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.data import COUNT, LARGEST, Number, Tree, is_array, transform_state
from adamjax.leaves import described, expect_stored, is_arraylike
from adamjax.numpy_arrays import fault_of_array, native
from adamjax.schedule import by_path
from adamjax.structure import Part, replace_parts, states_of_class, walk
from adamjax.transform import Step, Transform, as_transform, expect_state, rates_of_all, short_repr

__all__ = ["HyperparamsState", "set_hyperparams", "with_hyperparams"]


@transform_state()
class HyperparamsState(NamedTuple):
    """State of `with_hyperparams`.

    Attributes:
      hyperparams: scalar arrays by name: the values that the next step uses.
      inner: the state of the inner transform.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.with_hyperparams(adamjax.adam(0.1), learning_rate=0.25)
    >>> tx.init(jnp.zeros(1)).hyperparams
    {'learning_rate': Array(0.25, dtype=float32)}
    """

    hyperparams: dict[str, chex.Array]
    inner: Any


# Names of fields that are not numbers, but transforms or dictionaries of numbers.
_NOT_NUMBERS = {"tx", "transforms", "default", "hyperparams"}


def _field_names(x: Any) -> list[str]:
    """The names of a transform's fields that are not static: numbers, rates and parts."""
    return [f.name for f in dataclasses.fields(x) if not f.metadata.get("static")]


def _all_parts(tx: Transform) -> Iterator[Transform]:
    return (part.tx for part in walk(tx))


def _with_values(tx: Transform, values: dict[str, Any]) -> Transform:
    """The transform with these values in the fields of these names, in its parts too."""

    def with_own_values(part: Transform) -> Transform:
        own_values = {name: values[name] for name in _field_names(part) if name in values}
        if not own_values:
            return part
        new_part = copy.copy(part)
        new_part.set_fields(**own_values)
        return new_part

    return replace_parts(tx, with_own_values)


def _owner(tx: Transform, name: str) -> Transform:
    """The one part of a transform that has a hyperparameter of this name."""
    owners = [part for part in _all_parts(tx) if name in _field_names(part)]
    if len(owners) == 1 and not isinstance(getattr(owners[0], name), Transform | tuple | dict):
        return owners[0]
    field_names = {n for part in _all_parts(tx) for n in _field_names(part)} - _NOT_NUMBERS
    fields = f"the fields are {sorted(field_names)}"
    if len(owners) == 1:
        raise ValueError(
            f"with_hyperparams: {name!r} is a field of {type(owners[0]).__name__} in "
            f"{short_repr(tx)} that is not a hyperparameter; {fields}"
        )
    raise ValueError(
        f"with_hyperparams: {name!r} is a field of {len(owners)} transforms in {short_repr(tx)}, "
        f"expected one; {fields}. Wrap only the part that you mean"
    )


class with_hyperparams(Transform):
    """Stores some hyperparameters of `tx` in the state, as arrays.

    Read and log them as `state.hyperparams["learning_rate"]`, and set them between steps with
    `set_hyperparams`; the step is not traced again. They replace the values in `tx`, even a
    schedule. A `by_path` is refused, because one number would replace the rates of all leaves. To
    multiply all rates, put `scale(1.0)` after the optimizer in a chain, and pass `factor=1.0` here.
    Like any array, a float is rounded to float32 (unless JAX is in x64 mode): 0.999 becomes
    0.99900001, and `1 - b2` is computed from that. Counts (`steps`, `overwrite_frequency`) are
    int32. All others are floats, even if you give a whole number.

    Args:
      tx: any transform.
      **hyperparams: scalars by field name, as `repr(tx)` shows them. Exactly one part of `tx` must
        have a field of that name.

    The state is a `HyperparamsState`. `exact_rows` accepts no `with_hyperparams` inside it. Around
    `exact_rows`, you cannot name betas, epsilons or the average's momentum, because they must be
    Python floats there.

    Raises:
      ValueError: no part or several parts of `tx` have a field of that name, or the field is a
        `by_path`; a value is outside its range, or leaves it when rounded to float32. By `update`:
        the state keeps other hyperparameters.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.with_hyperparams(adamjax.adam(0.1), learning_rate=0.1)
    >>> state = tx.init(jnp.zeros(2))
    >>> state = adamjax.set_hyperparams(state, learning_rate=0.5)
    >>> updates, state = tx.update(jnp.ones(2), state)
    >>> updates, state.hyperparams
    (Array([-0.5, -0.5], dtype=float32), {'learning_rate': Array(0.5, dtype=float32)})
    """

    tx: Transform
    hyperparams: dict[str, Number]

    goes_around_exact_rows = True

    def __init__(self, tx: Any, **hyperparams: Any) -> None:
        self.set_fields(tx=tx, hyperparams=hyperparams)
        self.__post_init__()

    def __post_init__(self) -> None:
        if not isinstance(self.hyperparams, Mapping):
            raise TypeError(
                "with_hyperparams: hyperparams must be a dictionary by their names, got "
                f"{self.hyperparams!r}"
            )
        tx, checked = as_transform(self.tx), {}
        for name, value in self.hyperparams.items():
            owner = _owner(tx, name)
            for outer in _all_parts(tx):
                if name in outer.python_numbers:
                    raise ValueError(
                        f"with_hyperparams: {name!r} must be a Python float within "
                        f"{type(outer).__name__}, which computes with it in advance. To change it: "
                        "flush, make a new transform, and go on from its from_dense"
                    )
            if isinstance(getattr(owner, name), by_path):
                raise ValueError(
                    f"with_hyperparams: the {name} of {type(owner).__name__} is a by_path, and one "
                    "number would replace the rates of all leaves. To multiply them all, put "
                    "scale(1.0) after it and name its factor; to set the rates of some leaves, "
                    "give these leaves a part of partition and wrap that part"
                )
            if np.ndim(value) != 0 or callable(value):
                raise ValueError(f"with_hyperparams: {name} must be a scalar, got {value!r}")
            # `replace` checks the range.
            new_owner = owner.replace(**{name: value})
            checked[name] = getattr(new_owner, name)
            if not is_array(checked[name]):
                # Check again in float32: there 0.99999999 is 1, which is out of a beta's range.
                new_owner.replace(**{name: jnp.asarray(checked[name])})
        self.set_fields(tx=tx, hyperparams=checked)

    def part_states(self, state: Any) -> tuple[Any, ...]:
        expect_state(self, state, HyperparamsState)
        return (state.inner,)

    def num_rates(self, params: Tree) -> list[int | None]:
        if "factor" in self.hyperparams:  # It may be set to a number of any sign.
            return rates_of_all(params, None)
        return super().num_rates(params)

    def children(self, state: Any, params: Tree) -> tuple[Part, ...]:
        if state is None:
            return super().children(state, params)
        return (Part(self.resolved(state), state.inner, params),)

    def resolved(self, state: HyperparamsState) -> Transform:
        """The inner transform with the values of a state."""
        expect_state(self, state, HyperparamsState)
        state_values = state.hyperparams
        if not isinstance(state_values, dict):
            raise TypeError(
                f"with_hyperparams: the state's hyperparams are a {type(state_values).__name__}, "
                "expected a dict: state._replace(hyperparams=dict(state.hyperparams))"
            )
        if set(state_values) != set(self.hyperparams):
            raise ValueError(
                f"with_hyperparams: the state keeps {sorted(state_values)}, the transform has "
                f"{sorted(self.hyperparams)}. Name the same ones, or go on from here: "
                "HyperparamsState(tx.init(params).hyperparams, state.inner)"
            )
        for name, value in self.hyperparams.items():
            _check_kind(name, value, state_values[name])
        # A checkpoint may have turned the arrays into numbers.
        return _with_values(self.tx, {name: jnp.asarray(x) for name, x in state_values.items()})

    def init(self, params: Tree) -> HyperparamsState:
        # Strongly typed copies, so that a step may donate them.
        arrays = {
            name: jnp.array(x, jnp.result_type(x), copy=True)
            for name, x in self.hyperparams.items()
        }
        return HyperparamsState(arrays, _with_values(self.tx, arrays).init(params))

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        tx = self.resolved(state)
        updates, inner = tx.update(updates, state.inner, params, **extra_args)
        return updates, HyperparamsState(state.hyperparams, inner)

    def __repr__(self) -> str:
        shown = [f"{name}={value}" for name, value in self.hyperparams.items()]
        return f"with_hyperparams({', '.join([repr(self.tx), *shown])})"


def _is_whole(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.integer))


def _check_kind(name: str, value: Any, state_value: Any) -> None:
    """Refuses a state's hyperparameter unless it is a scalar, an integer or float like `value`."""
    is_whole = _is_whole(value)
    if isinstance(state_value, jax.ShapeDtypeStruct):
        expect_stored(f"with_hyperparams: the state's {name}", state_value)
    if is_arraylike(state_value) and fault_of_array(state_value) is None:
        dtype, shape = jnp.result_type(state_value), np.shape(state_value)
        actual = f"{dtype.name}{list(shape)}"
        fits = shape == () and bool(
            jnp.issubdtype(dtype, jnp.integer if is_whole else jnp.floating)
        )
        if fits and not is_whole:
            # If the state was cast to a narrow dtype, the hyperparameter was rounded.
            fits = jnp.finfo(dtype).bits >= min(32, jnp.finfo(jnp.result_type(value)).bits)
    else:
        has_dtype = hasattr(state_value, "dtype")
        actual = described(state_value) if has_dtype else repr(state_value)
        fits = False
    if not fits:
        raise ValueError(
            f"with_hyperparams: the state keeps {name} as {actual}, expected a scalar of "
            f"{'an integer' if is_whole else 'a float'} dtype. Reset it with "
            "state._replace(hyperparams=tx.init(params).hyperparams); for a state of many values "
            "at once use jax.vmap"
        )


def set_hyperparams(state: Any, /, **hyperparams: Any) -> Any:
    """A state with other values of the hyperparameters that `with_hyperparams` keeps in it.

    The dtypes stay, so no step is traced again.

    Args:
      state: a `HyperparamsState`, or a state with one in it at any depth.
      **hyperparams: real scalars by name; whole numbers for counts. NaN and numbers that are
        infinite in the state's dtype are refused. Other ranges are not checked, because the state
        knows only names. As with a traced array, most transforms make NaN from a value outside its
        range.

    Raises:
      TypeError, ValueError: the state has no `HyperparamsState`, or none or several with this name;
        or the value is not a finite real scalar (for a count, a whole number of at least 1).

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.with_hyperparams(adamjax.adam(0.1), learning_rate=0.1, b1=0.9)
    >>> state = adamjax.set_hyperparams(tx.init(jnp.zeros(2)), learning_rate=0.05)
    >>> float(state.hyperparams["learning_rate"]), float(state.hyperparams["b1"])
    (0.05, 0.9)
    """
    names = [name for found in _hyperparams_states(state) for name in found.hyperparams]
    if not names and not isinstance(state, HyperparamsState):
        raise TypeError(
            f"set_hyperparams: the state is a {type(state).__name__} without a HyperparamsState in "
            "it, expected one: wrap the transform in with_hyperparams"
        )
    for name in hyperparams:
        if name not in names:
            raise ValueError(f"set_hyperparams: the state keeps {names}, not {name!r}")
        if names.count(name) > 1:
            raise ValueError(
                f"set_hyperparams: {names.count(name)} states of with_hyperparams keep {name!r}: "
                "pass only the state that you mean"
            )

    def with_values(x: Any) -> Any:
        if not _is_hyperparams_state(x):
            return x
        old = x.hyperparams
        new = {n: _converted(n, hyperparams[n], old[n]) for n in old if n in hyperparams}
        inner = jax.tree.map(with_values, x.inner, is_leaf=_is_hyperparams_state)
        return HyperparamsState({**old, **new}, inner)

    return jax.tree.map(with_values, state, is_leaf=_is_hyperparams_state)


def _is_hyperparams_state(x: Any) -> bool:
    return isinstance(x, HyperparamsState)


def _hyperparams_states(state: Any) -> list[HyperparamsState]:
    """The states of `with_hyperparams` in a state, and those inside of them."""
    outer = states_of_class(HyperparamsState, state)
    return [*outer, *(inner for x in outer for inner in _hyperparams_states(x.inner))]


def _converted(name: str, value: Any, old: Any) -> chex.Array:
    """A checked value in the dtype of the old one."""
    shape, dtype = np.shape(old), jnp.result_type(old)
    array = _real_array(native(f"set_hyperparams: {name}", value))
    if array is None:
        raise TypeError(f"set_hyperparams: {name} must be a real number, got {value!r}")
    if array.shape != shape:
        raise ValueError(f"set_hyperparams: {name} must be of shape {shape}, got {value!r}")
    if jnp.issubdtype(dtype, jnp.integer):
        _expect_count(name, array, value, dtype)
    elif not isinstance(array, jax.core.Tracer):
        array = np.asarray(array, np.float64)
        if not np.all(np.abs(array) <= float(jnp.finfo(dtype).max)):
            raise ValueError(
                f"set_hyperparams: {name} must be finite in {dtype.name}, got {value!r}"
            )
    return jnp.array(array, dtype, copy=True)


def _real_array(value: Any) -> Any:
    """A real number, or an array of them, as an array; `None` for anything else."""
    if isinstance(value, numbers.Real) and not isinstance(value, int | float | np.generic):
        value = float(value)  # such as a `fractions.Fraction`
    # `jnp.asarray` would cut a wide integer to 32 bits.
    array = value if isinstance(value, jax.Array) else np.asarray(value)
    # An int of more than 64 bits is an object to NumPy.
    if array.dtype == object and isinstance(value, int):
        array = np.asarray(float(value) if abs(value) <= LARGEST else np.inf)
    kinds = (jnp.integer, jnp.floating)
    return array if any(jnp.issubdtype(array.dtype, kind) for kind in kinds) else None


def _expect_count(name: str, array: Any, value: Any, dtype: Any) -> None:
    """Refuses anything but a count, for a hyperparameter that the state keeps as an integer."""
    if isinstance(array, jax.core.Tracer):
        is_count = jnp.issubdtype(array.dtype, jnp.integer)
    else:
        is_count = bool(np.all(COUNT.holds(np.asarray(array, np.float64))))
    if not is_count:
        raise ValueError(
            f"set_hyperparams: the state keeps {name} as {dtype.name}, so it must be {COUNT.text}, "
            f"got {value!r}. If it is not a count, an older version made the state from an int: "
            "use state._replace(hyperparams=tx.init(params).hyperparams)"
        )
