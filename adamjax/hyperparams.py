"""Hyperparameters that are kept in the state: read, logged and set between steps."""

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
from adamjax.structure import Part, replace_parts, walk
from adamjax.transform import Step, Transform, as_transform, expect_state

__all__ = ["HyperparamsState", "set_hyperparams", "with_hyperparams"]


@transform_state()
class HyperparamsState(NamedTuple):
    """State of `with_hyperparams`.

    Attributes:
      hyperparams: by name, scalar arrays: the values that the next step uses.
      inner: the state of the inner transform.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.with_hyperparams(adamjax.adam(0.1), learning_rate=0.25)
    >>> tx.init(jnp.zeros(1)).hyperparams
    {'learning_rate': Array(0.25, dtype=float32)}
    """

    hyperparams: dict[str, chex.Array]
    inner: Any


def _fields(x: Any) -> list[str]:
    """The fields of a transform or schedule that may be arrays."""
    return [f.name for f in dataclasses.fields(x) if not f.metadata.get("static")]


def _all(tx: Transform) -> Iterator[Transform]:
    return (part.tx for part in walk(tx))


def _with(tx: Transform, values: dict[str, Any]) -> Transform:
    """The transform with other values in the fields of these names, also in those of its parts."""

    def changed(part: Transform) -> Transform:
        own = {name: values[name] for name in _fields(part) if name in values}
        if not own:
            return part
        made = copy.copy(part)
        made.set_fields(**own)
        return made

    return replace_parts(tx, changed)


class with_hyperparams(Transform):
    """A transform some of whose hyperparameters are kept in its state, as arrays.

    They are read and logged as `state.hyperparams["learning_rate"]`, and set between steps by
    `set_hyperparams`, without the step being traced anew. What they were in the transform, a
    schedule perhaps, has no effect. As arrays are, a float is rounded to float32: 0.999 is
    0.99900001, and `1 - b2` is taken from that. Counts (`steps`, `overwrite_frequency`) are int32,
    everything else is a float, also where a whole number is given.

    Args:
      tx: any transform.
      **hyperparams: scalars, by the names of fields, as `repr(tx)` shows them. Each must be a
        field of one part of `tx` alone.

    The state is a `HyperparamsState`. Inside of `exact_rows` there must be none; around it, betas,
    epsilons and the average's momentum cannot be named, as they must be Python floats there.

    Raises:
      ValueError: a name is that of no field, or of several; a value is outside its range, or is so
        once it is rounded to float32. By `update`: the state keeps other hyperparameters.

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

    def __init__(self, tx: Any, **hyperparams: Any) -> None:
        self.set_fields(tx=tx, hyperparams=hyperparams)
        self.__post_init__()

    def __post_init__(self) -> None:
        if not isinstance(self.hyperparams, Mapping):
            raise TypeError(
                "with_hyperparams: hyperparams must be a dictionary by their names, got "
                f"{self.hyperparams!r}"
            )
        tx, found = as_transform(self.tx), {}
        for name, value in self.hyperparams.items():
            owners = [part for part in _all(tx) if name in _fields(part)]
            if len(owners) != 1 or isinstance(getattr(owners[0], name), Transform | tuple | dict):
                names = sorted({n for part in _all(tx) for n in _fields(part)} - _PARTS)
                raise ValueError(
                    f"with_hyperparams: {name!r} is a field of {len(owners)} transforms in "
                    f"{tx!r}, expected one; there are {names}. Wrap the part that is meant"
                )
            for outer in _all(tx):
                if name in outer.python_numbers:
                    kind = type(outer).__name__
                    raise ValueError(
                        f"with_hyperparams: {name!r} must be a Python float within {kind}"
                    )
            if np.ndim(value) != 0 or callable(value):
                raise ValueError(f"with_hyperparams: {name} must be a scalar, got {value!r}")
            made = owners[0].replace(**{name: value})  # it knows the range
            found[name] = getattr(made, name)
            if not is_array(found[name]):
                # 0.99999999 is a beta, but in float32 it is 1.
                made.replace(**{name: jnp.asarray(found[name])})
        self.set_fields(tx=tx, hyperparams=found)

    def part_states(self, state: Any) -> tuple[Any, ...]:
        expect_state(self, state, HyperparamsState)
        return (state.inner,)

    def children(self, state: Any, params: Tree) -> tuple[Part, ...]:
        if state is None:
            return super().children(state, params)
        return (Part(self.resolved(state), state.inner, params),)

    def resolved(self, state: HyperparamsState) -> Transform:
        """The inner transform with the values that a state holds."""
        expect_state(self, state, HyperparamsState)
        kept = state.hyperparams
        if not isinstance(kept, dict) or set(kept) != set(self.hyperparams):
            raise ValueError(
                f"with_hyperparams: the state keeps {sorted(kept)}, the transform has "
                f"{sorted(self.hyperparams)}. Name the same ones, or go on from here: "
                "HyperparamsState(tx.init(params).hyperparams, state.inner)"
            )
        for name, value in self.hyperparams.items():
            _check_kind(name, value, kept[name])
        # A checkpoint may have made numbers of them.
        return _with(self.tx, {name: jnp.asarray(x) for name, x in kept.items()})

    def init(self, params: Tree) -> HyperparamsState:
        # Strongly typed, and copies, which a step may donate.
        given = self.hyperparams.items()
        kept = {name: jnp.array(x, jnp.result_type(x), copy=True) for name, x in given}
        return HyperparamsState(kept, _with(self.tx, kept).init(params))

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        tx = self.resolved(state)
        updates, inner = tx.update(updates, state.inner, params, **extra_args)
        return updates, HyperparamsState(state.hyperparams, inner)

    def __repr__(self) -> str:
        shown = [f"{name}={value}" for name, value in self.hyperparams.items()]
        return f"with_hyperparams({', '.join([repr(self.tx), *shown])})"


def _is_whole(x: Any) -> bool:
    return bool(jnp.issubdtype(jnp.result_type(x), jnp.integer))


def _check_kind(name: str, value: Any, kept: Any) -> None:
    """Refuses what a state keeps of a hyperparameter if it is no scalar of the right kind."""
    wanted = jnp.integer if _is_whole(value) else jnp.floating
    dtype = jnp.result_type(jnp.bool_ if kept is None else kept)
    fits = np.shape(kept) == () and bool(jnp.issubdtype(dtype, wanted))
    if fits and wanted is jnp.floating:
        # A state that was cast would round the rate.
        fits = jnp.finfo(dtype).bits >= min(32, jnp.finfo(jnp.result_type(value)).bits)
    if not fits:
        came = "None" if kept is None else f"{dtype.name}{list(np.shape(kept))}"
        raise ValueError(
            f"with_hyperparams: the state keeps {name} as {came}, expected a scalar of "
            f"{'an integer' if wanted is jnp.integer else 'a float'} dtype. Set it anew: "
            "state._replace(hyperparams=tx.init(params).hyperparams); a state of many values at "
            "once goes through jax.vmap"
        )


# Fields that hold transforms.
_PARTS = {"tx", "transforms", "hyperparams"}


def set_hyperparams(state: Any, **hyperparams: Any) -> Any:
    """A state of `with_hyperparams` with other values, in their dtypes: nothing is traced anew.

    Args:
      state: a `HyperparamsState`.
      **hyperparams: real scalars by name; whole numbers for counts. NaN and what is infinite in
        the state's dtype are refused. The state knows names alone, so other ranges are not
        checked: `with_hyperparams` says what each may be.

    Raises:
      TypeError, ValueError: it is another state, or does not keep such a hyperparameter; a value
        is no number that the state can keep.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.with_hyperparams(adamjax.adam(0.1), learning_rate=0.1, b1=0.9)
    >>> state = adamjax.set_hyperparams(tx.init(jnp.zeros(2)), learning_rate=0.05)
    >>> float(state.hyperparams["learning_rate"]), float(state.hyperparams["b1"])
    (0.05, 0.9)
    """
    if not isinstance(state, HyperparamsState):
        raise TypeError(
            f"set_hyperparams: the state is a {type(state).__name__}, expected the "
            "HyperparamsState of with_hyperparams; if it is in another state, set it there"
        )
    kept = state.hyperparams
    for name in hyperparams:
        if name not in kept:
            raise ValueError(f"set_hyperparams: the state keeps {list(kept)}, not {name!r}")
    new = {name: _taken(name, x, kept[name]) for name, x in hyperparams.items()}
    return state._replace(hyperparams={**kept, **new})


def _taken(name: str, value: Any, kept: Any) -> chex.Array:
    """A value as the state keeps it."""
    shape, dtype = np.shape(kept), jnp.result_type(kept)
    given = _array(value)
    if given is None:
        raise TypeError(f"set_hyperparams: {name} must be a real number, got {value!r}")
    if given.shape != shape:
        raise ValueError(f"set_hyperparams: {name} must be of shape {shape}, got {value!r}")
    if jnp.issubdtype(dtype, jnp.integer):
        _expect_whole(name, given, value, dtype)
    elif not isinstance(given, jax.core.Tracer):
        given = np.asarray(given, np.float64)
        if not np.all(np.abs(given) <= float(jnp.finfo(dtype).max)):
            raise ValueError(
                f"set_hyperparams: {name} must be finite in {dtype.name}, got {value!r}"
            )
    return jnp.array(given, dtype, copy=True)


def _array(value: Any) -> Any:
    """A real number or an array of them as an array, `None` for anything else."""
    if isinstance(value, numbers.Real) and not isinstance(value, int | float | np.generic):
        value = float(value)  # a fraction, say
    # NumPy's array, as JAX would cut a wide integer to 32 bits.
    given = value if isinstance(value, jax.Array) else np.asarray(value)
    if given.dtype == object and isinstance(value, int):
        given = np.asarray(float(value) if abs(value) <= LARGEST else np.inf)
    kinds = (jnp.integer, jnp.floating)
    return given if any(jnp.issubdtype(given.dtype, kind) for kind in kinds) else None


def _expect_whole(name: str, given: Any, value: Any, dtype: Any) -> None:
    """Refuses what is no count, for a hyperparameter that is kept as an integer."""
    if isinstance(given, jax.core.Tracer):
        whole = jnp.issubdtype(given.dtype, jnp.integer)
    else:
        whole = bool(np.all(COUNT.holds(np.asarray(given, np.float64))))
    if not whole:
        raise ValueError(
            f"set_hyperparams: the state keeps {name} as {dtype.name}, so it must be {COUNT.text}, "
            f"got {value!r}. If it is no count, an older version made the state of an int: "
            "take state._replace(hyperparams=tx.init(params).hyperparams)"
        )
