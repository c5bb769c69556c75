"""Tables, their families and batches, and the rows that each step refreshes."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.blocks import group_tables, rows_of_each
from adamjax.coasting import Coast, Coasting
from adamjax.data import Tree
from adamjax.exact.state import ExactRowsState
from adamjax.mesh import explicit_sharding
from adamjax.moments import accumulator
from adamjax.paths import flatten

__all__ = [
    "Batch",
    "Family",
    "Table",
    "batches_of",
    "due_rows",
    "families_of",
    "next_cursor",
    "per_row",
]


class Table(NamedTuple):
    """A table among the parameters, and how its rows move.

    Attributes:
      leaf: the table's position among the leaves.
      coast: how its rule moves rows without a gradient.
      coasting: how such rows catch up.
      kind: a hashable value, equal for tables that every step treats alike.
    """

    leaf: int
    path: str
    shape: tuple[int, ...]
    dtype: Any
    coast: Coast
    coasting: Coasting
    kind: Any

    @property
    def num_rows(self) -> int:
        return self.shape[0]

    @property
    def real_dtype(self) -> Any:
        """The real dtype in which the table's steps are computed."""
        return accumulator(self.dtype)


class Family(NamedTuple):
    """Tables whose rows move alike, so that they share a ring."""

    name: str
    history: int
    tables: tuple[Table, ...]


class Batch(NamedTuple):
    """Tables of a family whose rows fit in one computation: they have one width and dtype."""

    family: Family
    tables: tuple[Table, ...]

    @property
    def path(self) -> str:
        return self.tables[0].path


# The default history is as long as it takes to refresh a family's largest table with this many rows
# in each step, but no longer than this.
_REFRESHED_ROWS = 64
_LONGEST_HISTORY = 65536
# The default history if rows catch up step by step. Refreshing then costs a step about one row step
# for each row of the table, whatever the history is. A row that the step reads costs a row step for
# each step by which it lags behind, and a short history limits these.
_REPLAYED_HISTORY = 64


def families_of(tables: Sequence[Table], given_history: int | None) -> list[Family]:
    """The tables by family. Each gets a default history if none is given."""
    by_kind: dict[Any, list[Table]] = {}
    for table in tables:
        by_kind.setdefault((table.kind, table.coasting), []).append(table)
    families = []
    for same_kind in by_kind.values():
        coasting, history = same_kind[0].coasting, given_history
        if history is None and coasting.replays:
            history = _REPLAYED_HISTORY
        elif history is None:
            entries = max(t.num_rows for t in same_kind) // _REFRESHED_ROWS
            # The next power of two.
            history = 1 << max(min(entries, _LONGEST_HISTORY) - 1, 0).bit_length()
            history = max(history, coasting.least_history)
        rule = ",".join([coasting.name, *_other_decays(same_kind[0].coast)])
        name = f"{_tables_as_text(same_kind)}: {rule},history={history}"
        families.append(Family(name, history, tuple(same_kind)))
    return families


def _other_decays(coast: Coast) -> list[str]:
    """Decays of slots that do not follow from its `Coasting`, such as that of AMSGrad's v.

    Rows that lag behind catch up by them, so they are in the name of the ring too.
    """
    known = [coast.b1] if coast.shrink is None else [coast.b1, coast.shrink, coast.shrink**2]
    return [
        f"{slot}={decay!r}"
        for slot, decay in coast.decays
        if not any(math.isclose(decay, x, rel_tol=1e-12) for x in known)
    ]


def _tables_as_text(tables: Sequence[Table]) -> str:
    """A name for the tables of a ring, short enough for a file name.

    It depends on all of them. If the patterns of rates change, the first table may form a family
    with other tables, and that family must not use this ring.
    """
    first, *others = [table.path for table in tables]
    checksum = zlib.crc32("\n".join(others).encode())
    return f"{first} and {len(others)} more ({checksum:08x})" if others else first


def batches_of(families: Sequence[Family], params: Tree, sizes: Mapping[int, int]) -> list[Batch]:
    """Groups the tables that a step reads into batches.

    Args:
      sizes: the number of rows that the step reads, by the position of the table among the leaves.
    """
    batches, leaves = [], flatten(params)[0]
    for family in families:
        by_type: dict[Any, list[Table]] = {}
        for table in family.tables:
            if table.leaf in sizes:
                # Rows of tables with different shardings have different types.
                split = explicit_sharding(leaves[table.leaf])
                spec = None if split is None else (split.mesh, split.spec[1:])
                by_type.setdefault((table.dtype, table.shape[1:], spec), []).append(table)
        for tables in by_type.values():
            rows = [jax.ShapeDtypeStruct((sizes[t.leaf], *t.shape[1:]), t.dtype) for t in tables]
            groups = group_tables(range(len(tables)), rows)
            batches += [Batch(family, tuple(tables[i] for i in group)) for group in groups]
    return batches


def due_rows(
    batch: Batch, state: ExactRowsState, read_indices: list[chex.Array]
) -> list[chex.Array]:
    """The rows of each table that this step must refresh, without those that it reads anyway.

    All tables of a batch are computed together. In place of a row that is read anyway there is an
    index outside the table.
    """
    num_rows = np.array([t.num_rows for t in batch.tables], np.int32)
    sizes = [num_refreshed(t, batch.family.history) for t in batch.tables]
    if not sum(sizes):
        return [x[:0] for x in read_indices]
    cursors = [state.tables[t.path].cursor for t in batch.tables]

    ids = jnp.concatenate(read_indices)
    counts = [x.size for x in read_indices]
    starts = np.cumsum([0, *sizes[:-1]])
    # How many rows after the cursor each row is; after the last row of a table comes row 0.
    past_cursor = ids - per_row(cursors, counts)
    past_cursor = jnp.where(past_cursor < 0, past_cursor + per_row(num_rows, counts), past_cursor)
    is_due = (ids < per_row(num_rows, counts)) & (
        past_cursor < per_row(np.array(sizes, np.int32), counts)
    )
    table_starts = per_row(starts.astype(np.int32), counts)
    position = jnp.where(is_due, past_cursor + table_starts, sum(sizes))
    is_read = jnp.zeros(sum(sizes), bool).at[position.astype(np.uint32)].set(True, mode="drop")
    # Counted from the table's end, because the sum may exceed int32.
    due = per_row(cursors, sizes) - per_row(num_rows, sizes)
    due = due + np.concatenate([np.arange(n, dtype=np.int32) for n in sizes])
    due = jnp.where(due < 0, due + per_row(num_rows, sizes), due)
    return rows_of_each(jnp.where(is_read, per_row(num_rows, sizes), due), sizes)


def num_refreshed(table: Table, history: int) -> int:
    """How many rows each step refreshes, so that no row lags behind for longer than the ring."""
    # A round through the table takes two steps fewer than the ring has entries, so the entry that a
    # step overwrites is one that no row needs any more.
    return -(-table.num_rows // max(history - 2, 1))


def next_cursor(table: Table, cursor: chex.Array, history: int) -> chex.Array:
    """The first row that the next step refreshes. After the last row of a table comes row 0."""
    from_end = cursor - table.num_rows + num_refreshed(table, history)
    return jnp.where(from_end < 0, from_end + table.num_rows, from_end)


def per_row(values: Any, counts: Sequence[int]) -> Any:
    """Repeats the value of each table `counts[i]` times; for one table it is a scalar."""
    if len(counts) == 1:
        return values[0]
    values = values if isinstance(values, np.ndarray) else jnp.stack(values)
    return values[np.repeat(np.arange(len(counts)), counts)]
