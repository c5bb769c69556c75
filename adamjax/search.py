"""Which indices of a batch are distinct, and where each stands among them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.mesh import everywhere

__all__ = ["distinct", "distinct_of_each"]


def distinct(ids: chex.Array, num_rows: int) -> tuple[chex.Array, chex.Array]:
    """The distinct ids, filled up with `num_rows`, and the place of each id among them.

    Args:
      ids: int32[n] in `[0, num_rows]`.

    Returns:
      int32[n] and int32[n]; the place of `num_rows` is n.
    """
    return distinct_of_each([ids], [num_rows])[0]


def distinct_of_each(
    ids: Sequence[chex.Array], num_rows: Sequence[int]
) -> list[tuple[chex.Array, chex.Array]]:
    """`distinct` for several tables in one search."""
    ids = [everywhere(x) for x in ids]
    found = [(x, jnp.full_like(x, x.size)) for x in ids]
    there = [i for i, x in enumerate(ids) if x.size and num_rows[i]]
    for several in _together(there, num_rows):
        rows, own = tuple(num_rows[i] for i in several), tuple(ids[i] for i in several)
        for i, pair in zip(several, _distinct(rows, own), strict=True):
            found[i] = pair
    return found


def _together(tables: Sequence[int], num_rows: Sequence[int]) -> list[list[int]]:
    """Tables by how many can be searched at once: as many as have int32 numbers for their rows."""
    groups: list[list[int]] = []
    for i in tables:
        if not groups or sum(num_rows[j] + 1 for j in (*groups[-1], i)) > np.iinfo(np.int32).max:
            groups.append([])
        groups[-1].append(i)
    return groups


# Jitted, JAX traces it once for all tables and steps of these sizes; inline, it leaves no trace.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _distinct(
    num_rows: tuple[int, ...], ids: tuple[chex.Array, ...]
) -> list[tuple[chex.Array, chex.Array]]:
    """As `distinct_of_each`. The rows of a table are numbered after those of the one before.

    One number between two tables stands for no row, so each table keeps its places in the order
    of the numbers too.
    """
    own = _Segments(tuple(x.size for x in ids), num_rows)
    first_rows = own.at_places(np.array(own.first_rows, np.int32))
    numbers = jnp.concatenate(ids) + first_rows
    by_scratch = functools.partial(_by_scratch, own)
    by_sort = functools.partial(_by_sort, own)
    rows, places = sum(num_rows), numbers.size
    if rows <= _SCRATCH_ROWS * places:
        found, position = jax.lax.platform_dependent(numbers, tpu=by_sort, default=by_scratch)
    elif rows > _SCRATCH_ROWS_ON_GPU * places:
        found, position = by_sort(numbers)
    else:
        found, position = jax.lax.platform_dependent(
            numbers, cuda=by_scratch, rocm=by_scratch, default=by_sort
        )
    ends = np.cumsum(own.sizes)[:-1]
    return list(zip(jnp.split(found - first_rows, ends), jnp.split(position, ends), strict=True))


# Rows of a table for each id, up to which it is cheaper to clear an int32 a row than to sort:
# at 1M rows and 8,192 ids a CPU takes 0.25 ms, and 0.45 ms to sort; at 65,536 ids 0.45 and 4 ms.
# A TPU sorts fast and scatters single numbers slowly. A GPU clears 134 MB, for 8,192 ids the most
# here, in 0.05 ms at 3 TB/s; searching the sorted ids is a loop of dozens of kernels.
_SCRATCH_ROWS = 512
_SCRATCH_ROWS_ON_GPU = 4096


@dataclasses.dataclass(frozen=True)
class _Segments:
    """Where tables lie in arrays of their places and of their rows' numbers, one after another.

    Attributes:
      sizes: the places of each table.
      num_rows: its rows.
    """

    sizes: tuple[int, ...]
    num_rows: tuple[int, ...]

    @property
    def first_places(self) -> list[int]:
        return [sum(self.sizes[:i]) for i in range(len(self.sizes))]

    @property
    def first_rows(self) -> list[int]:
        return [sum(self.num_rows[:i]) + i for i in range(len(self.num_rows))]

    def at_places(self, of_tables: Any) -> Any:
        """For each place the number of its table; that of the only one as it is."""
        if len(self.sizes) == 1:
            return of_tables[0]
        return of_tables[np.repeat(np.arange(len(self.sizes)), self.sizes)]

    @property
    def no_row(self) -> Any:
        """At each place, the number that stands for no row of its table."""
        last = np.add(self.first_rows, self.num_rows)
        return self.at_places(last.astype(np.int32))

    def positions(self, flags: chex.Array) -> chex.Array:
        """The flagged places of each table, numbered from 0."""
        total = jnp.cumsum(flags.astype(jnp.int32))
        if len(self.sizes) == 1:
            return total - 1
        before = jnp.concatenate([jnp.zeros(1, jnp.int32), total[np.cumsum(self.sizes[:-1]) - 1]])
        return total - 1 - self.at_places(before)

    def packed(self, ids: chex.Array, flags: chex.Array, position: chex.Array) -> chex.Array:
        """The flagged ids of each table at their positions, and behind them that of no row."""
        start = self.at_places(np.array(self.first_places, np.int32))
        target = jnp.where(flags, start + position, ids.size)
        empty = jnp.broadcast_to(jnp.asarray(self.no_row, jnp.int32), ids.shape)
        return empty.at[target].set(ids, mode="drop", unique_indices=True)

    def or_none(self, position: chex.Array, is_row: chex.Array) -> chex.Array:
        """Positions, and the places of a table where there is no row."""
        return jnp.where(is_row, position, self.at_places(np.array(self.sizes, np.int32)))


def _by_scratch(own: _Segments, ids: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Every id notes in its row's slot where it stands; the first to do so stands for the row."""
    n, rows = ids.size, own.first_rows[-1] + own.num_rows[-1]
    place = jax.lax.iota(jnp.int32, n)
    if len(own.sizes) > 1:
        ids = jnp.where(ids == own.no_row, rows, ids)
    slots = jnp.full(rows, n, jnp.int32).at[ids].min(place, mode="drop")
    first = slots.at[ids].get(mode="fill", fill_value=n)
    position = own.positions(first == place)
    found = own.packed(ids, first == place, position)
    position = position.at[first].get(mode="fill", fill_value=0)
    return found, own.or_none(position, first < n)


def _by_sort(own: _Segments, ids: chex.Array) -> tuple[chex.Array, chex.Array]:
    ordered = jax.lax.sort(ids)
    new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    new = new & (ordered != own.no_row)
    found = own.packed(ordered, new, own.positions(new))
    start = own.at_places(np.array(own.first_places, np.int32))
    position = jnp.searchsorted(found, ids).astype(jnp.int32) - start
    return found, own.or_none(position, ids != own.no_row)
