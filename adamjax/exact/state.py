"""The state of `exact_rows`, and the tuples of arrays that its steps work on."""

import re
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.coasting import Ring
from adamjax.data import exportable, transform_state

__all__ = [
    "ExactRowsState",
    "Past",
    "Ready",
    "TableArrays",
    "expect_flushed",
    "path_of_table",
]


@transform_state()
class ExactRowsState(NamedTuple):
    """State of `exact_rows`.

    Attributes:
      inner: the state of the inner transform; the slots of a table lag behind as its rows do.
      clock: int32, goes up by one in each step. Unlike a count, it may start at any value, and it
        wraps around.
      last: by path of a table, int32[num_rows]: the clock at which each of its rows in `params` was
        last up to date.
      turns: for each family of tables, int32, the turn of the next step. Each step refreshes the
        rows of its turn; after the last turn comes turn 0.
      rings: for each family of tables a `Ring`: what the last steps do to rows that lag behind.
        Its key names the tables (the first, the number of others, and a checksum of the others'
        paths) and the rule, as in `"table: b1=0.9,shrink=0.9995,eps=1e-07,history=256"`. The rule
        is in the key so that checkpoints record it: with another rule, rows that lag behind would
        catch up wrongly. With several families, each key ends in their number, as in `",rings=2"`:
        so the keys for fewer tables are never a part of these keys, and no library that restores a
        state can silently leave a family out.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
    >>> tx.init({"table": jnp.zeros((3, 1))}).last
    {'table': Array([0, 0, 0], dtype=int32)}
    """

    inner: Any
    clock: chex.Array
    last: dict[str, chex.Array]
    turns: dict[str, chex.Array]
    rings: dict[str, Ring]


def expect_flushed(owner: str, state: ExactRowsState) -> None:
    """Refuses a state in which rows lag behind.

    Nothing is refused within `jit`, or if the state has shapes or shardings in place of arrays.
    """
    for path, last in state.last.items():
        if not (_is_concrete(last) and _is_concrete(state.clock)):
            continue
        # A state from `vmap` has one clock for each member.
        if not bool(jnp.all(last == jnp.asarray(state.clock)[..., None])):
            raise ValueError(
                f"{owner}: rows of the table {path!r} lag behind: bring all up to date first, "
                "params, state = tx.flush(params, state)"
            )


def _is_concrete(x: Any) -> bool:
    return isinstance(x, jax.Array | np.ndarray) and not isinstance(x, jax.core.Tracer)


class TableArrays(NamedTuple):
    """A table's arrays with an entry for each of its rows."""

    weights: chex.Array
    slots: dict[str, Any]
    last: chex.Array


class Past(NamedTuple):
    """The data by which rows catch up with the last step.

    Attributes:
      ring: the ring of the tables' family.
      clock: the clock of `ExactRowsState`, to compare with `last`.
      count: the count of the tables' rule.
    """

    ring: Ring
    clock: chex.Array
    count: chex.Array


@exportable
class Ready(NamedTuple):
    """Up-to-date rows of several tables, concatenated.

    For an index that stands for no row, the values are arbitrary.

    Attributes:
      weights: the up-to-date weights.
      moved: `weights` minus the weights in `params`, in the compute dtype.
      slots: the slots.
      last: the clock at which each row in `params` was last up to date.
      has_nan: bool scalar, whether the entries read from the ring have a NaN.
    """

    weights: chex.Array
    moved: chex.Array
    slots: dict[str, chex.Array]
    last: chex.Array
    has_nan: chex.Array


def path_of_table(name: str, paths: list[str]) -> str:
    """The path of the table that a path or pattern names."""
    matching = [p for p in paths if p == name] or [p for p in paths if re.search(name, p)]
    if len(matching) != 1:
        raise ValueError(
            f"exact_rows: {name!r} names {len(matching)} tables, expected one of {paths}"
        )
    return matching[0]
