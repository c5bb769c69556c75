"""Hyperparameters that are kept in the state: read, logged and set between steps."""

import copy
import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import chex
import jax.numpy as jnp
import numpy as np

from adamjax.data import Number, Tree, exportable
from adamjax.exact import exact_rows
from adamjax.transform import Step, Transform, as_transform, expect_state

__all__ = ["HyperparamsState", "set_hyperparams", "with_hyperparams"]


@exportable
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


def _all(x: Any) -> Iterator[Transform]:
    """A transform and those in it."""
    if isinstance(x, Transform):
        yield x
        for name in _fields(x):
            yield from _all(getattr(x, name))
    elif isinstance(x, tuple):
        for part in x:
            yield from _all(part)


def _with(x: Any, values: dict[str, Any]) -> Any:
    """A transform with other values in the fields of these names, its parts' too."""
    if isinstance(x, tuple):
        return tuple(_with(part, values) for part in x)
    if not isinstance(x, Transform):
        return x
    made = copy.copy(x)
    made._set(**{n: values.get(n, _with(getattr(x, n), values)) for n in _fields(x)})
    return made


class with_hyperparams(Transform):
    """A transform some of whose hyperparameters are kept in its state, as arrays.

    They are read and logged as `state.hyperparams["learning_rate"]`, and set between steps by
    `set_hyperparams`, without the step being traced anew. What they were in the transform, a
    schedule perhaps, has no effect. As arrays are, a float is rounded to float32: 0.999 is
    0.99900001, and `1 - b2` is taken from that.

    Args:
      tx: any transform.
      **hyperparams: scalars, by the names of fields, as `repr(tx)` shows them. Each must be a
        field of one part of `tx` alone.

    The state is a `HyperparamsState`. Inside of `exact_rows` there must be none; around it, betas,
    epsilons and the average's momentum cannot be named, as they must be Python floats there.

    Raises:
      ValueError: a name is that of no field, or of several; a value is outside its range.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.with_hyperparams(adamjax.adam(0.1), learning_rate=0.1)
    >>> state = tx.init(jnp.zeros(2))
    >>> state = adamjax.set_hyperparams(state, learning_rate=0.5)
    >>> updates, state = tx.update(jnp.ones(2), state)
    >>> updates, state.hyperparams
    (Array([-0.49999842, -0.49999842], dtype=float32), {'learning_rate': Array(0.5, dtype=float32)})
    """

    tx: Transform
    hyperparams: dict[str, Number]

    def __init__(self, tx: Any, **hyperparams: Any) -> None:
        self._set(tx=tx, hyperparams=hyperparams)
        self.__post_init__()

    def __post_init__(self) -> None:
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
                if isinstance(outer, exact_rows) and any(name in dict(x) for x in outer.fixed):
                    raise ValueError(
                        f"with_hyperparams: {name!r} must be a Python float within exact_rows"
                    )
            if np.ndim(value) != 0 or callable(value):
                raise ValueError(f"with_hyperparams: {name} must be a scalar, got {value!r}")
            made = owners[0].replace(**{name: value})  # it knows the range
            found[name] = getattr(made, name)
        self._set(tx=tx, hyperparams=found)

    @property
    def parts(self) -> tuple[Transform, ...]:
        return (self.tx,)

    def part_states(self, state: Any) -> tuple[Any, ...]:
        expect_state(self, state, HyperparamsState)
        return (state.inner,)

    def resolved(self, state: HyperparamsState) -> Transform:
        """The inner transform with the values that a state holds."""
        expect_state(self, state, HyperparamsState)
        return _with(self.tx, state.hyperparams)

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


# Fields that hold transforms.
_PARTS = {"tx", "transforms", "hyperparams"}


def set_hyperparams(state: Any, **hyperparams: Any) -> Any:
    """A state of `with_hyperparams` with other values, in their dtypes: nothing is traced anew.

    Args:
      state: a `HyperparamsState`.
      **hyperparams: scalars by name. Their ranges are not checked.

    Raises:
      TypeError, ValueError: it is another state, or does not keep such a hyperparameter.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.with_hyperparams(adamjax.adam(0.1), learning_rate=0.1, b1=0.9)
    >>> state = adamjax.set_hyperparams(tx.init(jnp.zeros(2)), learning_rate=0.05)
    >>> float(state.hyperparams["learning_rate"]), float(state.hyperparams["b1"])
    (0.05000000074505806, 0.8999999761581421)
    """
    if not isinstance(state, HyperparamsState):
        raise TypeError(
            f"set_hyperparams: the state is a {type(state).__name__}, expected the "
            "HyperparamsState of with_hyperparams; if it is in another state, set it there"
        )
    kept = state.hyperparams
    for name, value in hyperparams.items():
        if name not in kept:
            raise ValueError(f"set_hyperparams: the state keeps {list(kept)}, not {name!r}")
        if np.shape(value) != kept[name].shape:
            raise ValueError(
                f"set_hyperparams: {name} must be of shape {kept[name].shape}, got {value!r}"
            )
    new = {name: jnp.array(x, kept[name].dtype, copy=True) for name, x in hyperparams.items()}
    return state._replace(hyperparams={**kept, **new})
