"""Tables, and which of them are worked on together; and the rows that each step refreshes."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.blocks import rows_of_each, together
from adamjax.coasting import Coast, Coasting
from adamjax.data import Tree
from adamjax.exact.state import ExactRowsState
from adamjax.mesh import explicit
from adamjax.moments import accumulator
from adamjax.paths import flatten

__all__ = [
    "Batch",
    "Family",
    "Table",
    "batches_of",
    "beside",
    "due_rows",
    "families_of",
    "next_cursor",
]


class Table(NamedTuple):
    """A table: where it is among the parameters, and how its rows move.

    Attributes:
      leaf: its position among the leaves.
      coast: what its rule says of rows without a gradient.
      plan: how such rows are brought up to date.
      kind: a hashable value, equal for tables that every step treats alike.
    """

    leaf: int
    path: str
    shape: tuple[int, ...]
    dtype: Any
    coast: Coast
    plan: Coasting
    kind: Any

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    @property
    def real(self) -> Any:
        return accumulator(self.dtype)


class Family(NamedTuple):
    """Tables whose rows move alike, so that they share a ring."""

    name: str
    history: int
    tables: tuple[Table, ...]


class Batch(NamedTuple):
    """Tables of a family whose rows are worked on together: of one width and dtype."""

    family: Family
    tables: tuple[Table, ...]

    @property
    def path(self) -> str:
        return self.tables[0].path


# The part of a table that each step refreshes, and the longest history, where none is given.
_REFRESHED = 64
_LONGEST = 65536
# The history where rows are brought up to date step by step. Then a step costs about as many row
# steps as the table has rows, however long the history, and those of the rows that are read.
_REPLAYED = 64


def families_of(tables: Sequence[Table], given: int | None) -> list[Family]:
    """The tables, those whose rows move alike together; and how long the ring of each family is."""
    by_kind: dict[Any, list[Table]] = {}
    for table in tables:
        by_kind.setdefault((table.kind, table.plan), []).append(table)
    families = []
    for alike in by_kind.values():
        plan, history = alike[0].plan, given
        if history is None and plan.replays:
            history = _REPLAYED
        elif history is None:
            wanted = max(t.num_rows for t in alike) // _REFRESHED
            history = 1 << max(min(wanted, _LONGEST) - 1, 0).bit_length()
            history = max(history, plan.least_history)
        name = f"{_tables_as_text(alike)}: {plan.name},history={history}"
        families.append(Family(name, history, tuple(alike)))
    return families


def _tables_as_text(tables: Sequence[Table]) -> str:
    """Which tables these are, in a name that a file may have.

    Where tables are put together otherwise, as with other patterns of rates, a ring under the same
    name would be that of others.
    """
    first, *others = [table.path for table in tables]
    checksum = zlib.crc32("\n".join(others).encode())
    return f"{first} and {len(others)} more ({checksum:08x})" if others else first


def batches_of(families: Sequence[Family], params: Tree, sizes: Mapping[int, int]) -> list[Batch]:
    """Tables, of which so many rows are worked on, by what can be worked on together."""
    batches, leaves = [], flatten(params)[0]
    for family in families:
        alike: dict[Any, list[Table]] = {}
        for table in family.tables:
            if table.leaf in sizes:
                # Rows of tables that are split in different ways are of different types.
                split = explicit(leaves[table.leaf])
                spec = None if split is None else (split.mesh, split.spec[1:])
                alike.setdefault((table.dtype, table.shape[1:], spec), []).append(table)
        for same in alike.values():
            own = [jax.ShapeDtypeStruct((sizes[t.leaf], *t.shape[1:]), t.dtype) for t in same]
            groups = together(range(len(same)), own)
            batches += [Batch(family, tuple(same[i] for i in several)) for several in groups]
    return batches


def due_rows(batch: Batch, state: ExactRowsState, found: list[chex.Array]) -> list[chex.Array]:
    """The rows of each table whose turn it is to be refreshed, as far as they were not found.

    Computed for all tables of a batch in one go.
    """
    num_rows = [t.num_rows for t in batch.tables]
    sizes = [refreshed(t, batch.family.history) for t in batch.tables]
    if not sum(sizes):
        return [x[:0] for x in found]
    cursors = [state.tables[t.path].cursor for t in batch.tables]

    places, starts = [x.size for x in found], np.cumsum([0, *sizes[:-1]])
    rows = np.array(num_rows, np.int32)
    behind = jnp.concatenate(found) - beside(cursors, places)
    behind = jnp.where(behind < 0, behind + beside(rows, places), behind)
    is_due = (jnp.concatenate(found) < beside(rows, places)) & (
        behind < beside(np.array(sizes, np.int32), places)
    )
    place = jnp.where(is_due, behind + beside(starts.astype(np.int32), places), sum(sizes))
    there = jnp.zeros(sum(sizes), bool).at[place.astype(np.uint32)].set(True, mode="drop")
    due = beside(cursors, sizes) + np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
    due = due - jnp.where(due < beside(rows, sizes), 0, beside(rows, sizes))
    return rows_of_each(jnp.where(there, beside(rows, sizes), due), sizes)


def refreshed(table: Table, history: int) -> int:
    """How many rows each step refreshes, so that none is older than the ring."""
    return -(-table.num_rows // max(history - 2, 1))


def next_cursor(table: Table, cursor: chex.Array, history: int) -> chex.Array:
    after = cursor + refreshed(table, history)
    return jnp.where(after < table.num_rows, after, after - table.num_rows)


def beside(values: Any, counts: Sequence[int]) -> Any:
    """For each of several rows of each table what belongs to the table."""
    if len(counts) == 1:
        return values[0]
    values = values if isinstance(values, np.ndarray) else jnp.stack(values)
    return values[np.repeat(np.arange(len(counts)), counts)]
