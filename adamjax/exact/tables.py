"""Tables, their families and batches, and the rows that each step refreshes."""

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.blocks import group_tables, per_row, rows_of_each
from adamjax.coasting import Coast, Coasting
from adamjax.data import Tree
from adamjax.mesh import explicit_sharding
from adamjax.moments import compute_dtype
from adamjax.paths import flatten

__all__ = [
    "Batch",
    "Family",
    "Table",
    "batches_of",
    "due_rows",
    "families_of",
    "next_turn",
]


class Table(NamedTuple):
    """A table among the parameters, and how its rows move.

    Attributes:
      leaf_index: the table's position among the leaves.
      coast: how its rule moves rows without a gradient.
      coasting: how such rows catch up.
      kind: a hashable value, equal for tables that every step treats alike.
    """

    leaf_index: int
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
        return compute_dtype(self.dtype)


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


# The default history: the number of steps that refresh a family's largest table, with
# `_REFRESHED_ROWS` rows in each step, but at most `_LONGEST_HISTORY`. It is rounded up to a power
# of two, and is at least `Coasting.least_history`.
_REFRESHED_ROWS = 64
_LONGEST_HISTORY = 65536
# The default history if rows catch up step by step. Let one unit of work be the replay of one
# missed step of one row. Whatever the history is, each step needs about as many units for
# refreshing as the table has rows. A row that is read needs one unit for each step that it lags
# behind, so a short history makes reads cheap.
_REPLAYED_HISTORY = 64


def families_of(tables: Sequence[Table], given_history: int | None) -> list[Family]:
    """Groups tables into families. Each family gets a default history if none is given.

    The name of a family depends on its own tables, its rule and the number of families.
    """
    by_kind: dict[Any, list[Table]] = {}
    for table in tables:
        by_kind.setdefault((table.kind, table.coasting), []).append(table)
    families = []
    # `flax.serialization` drops entries of a dictionary that the target lacks. So the state of
    # fewer families must not have a subset of the names, or it would lose tables without an error.
    total = f",rings={len(by_kind)}" if len(by_kind) > 1 else ""
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
        name = f"{_tables_as_text(same_kind)}: {rule},history={history}{total}"
        families.append(Family(name, history, tuple(same_kind)))
    return families


def _other_decays(coast: Coast) -> list[str]:
    """The decays that are not in the name of the `Coasting`, such as the decay of AMSGrad's v.

    Rows catch up by these decays too, so they belong in the name of the ring.
    """
    known = [coast.b1] if coast.shrink is None else [coast.b1, coast.shrink, coast.shrink**2]
    return [
        f"{slot}={decay!r}"
        for slot, decay in coast.decays
        if not any(math.isclose(decay, x, rel_tol=1e-12) for x in known)
    ]


def _tables_as_text(tables: Sequence[Table]) -> str:
    """A name for the tables of a ring, short enough for a file name.

    The name depends on all tables. If the patterns of rates change, the first table may form a
    family with other tables, and that family must not use this ring.
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
            if table.leaf_index in sizes:
                # Rows of tables with different shardings have different types.
                split = explicit_sharding(leaves[table.leaf_index])
                spec = None if split is None else (split.mesh, split.spec[1:])
                by_type.setdefault((table.dtype, table.shape[1:], spec), []).append(table)
        for tables in by_type.values():
            rows = [
                jax.ShapeDtypeStruct((sizes[t.leaf_index], *t.shape[1:]), t.dtype) for t in tables
            ]
            groups = group_tables(range(len(tables)), rows)
            batches += [Batch(family, tuple(tables[i] for i in group)) for group in groups]
    return batches


def due_rows(batch: Batch, turn: chex.Array, read_indices: list[chex.Array]) -> list[chex.Array]:
    """The rows of each table that this step must refresh, without those that it reads anyway.

    The rows of all tables of a batch are computed together. The table's number of rows replaces a
    row that is read anyway, and a position after the last row.

    Args:
      turn: the family's turn, from the state.
    """
    num_rows = np.array([t.num_rows for t in batch.tables], np.uint32)
    num_due = [num_refreshed(t, batch.family.history) for t in batch.tables]
    if not sum(num_due):
        return [x[:0] for x in read_indices]
    # Unsigned, because positions after the last row may exceed int32.
    first_due = turn.astype(np.uint32) * np.array(num_due, np.uint32)

    ids = jnp.concatenate(read_indices).astype(np.uint32)
    num_read = [x.size for x in read_indices]
    # For a row before the first one that is due, this wraps around to a large number.
    offset = ids - per_row(first_due, num_read)
    is_due = (ids < per_row(num_rows, num_read)) & (
        offset < per_row(np.array(num_due, np.uint32), num_read)
    )
    starts = np.cumsum([0, *num_due[:-1]]).astype(np.uint32)
    position = jnp.where(is_due, offset + per_row(starts, num_read), np.uint32(sum(num_due)))
    is_read = jnp.zeros(sum(num_due), bool).at[position].set(True, mode="drop")
    due = per_row(first_due, num_due) + np.concatenate(
        [np.arange(n, dtype=np.uint32) for n in num_due]
    )
    outside = per_row(num_rows, num_due)
    due = jnp.where(is_read, outside, jnp.minimum(due, outside)).astype(np.int32)
    return rows_of_each(due, num_due)


def num_turns(history: int) -> int:
    """The number of steps in which every row of a table is refreshed once."""
    # Two fewer than the ring has entries, so the entry that a step overwrites is one that no row
    # needs any more.
    return max(history - 2, 1)


def num_refreshed(table: Table, history: int) -> int:
    """How many rows each step refreshes, so that no row lags behind for longer than the ring."""
    return -(-table.num_rows // num_turns(history))


def next_turn(turn: chex.Array, history: int) -> chex.Array:
    """The turn of the next step."""
    return jnp.where(turn + 1 < num_turns(history), turn + 1, 0)
