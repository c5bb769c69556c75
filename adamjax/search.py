"""Finds the distinct indices of a batch, and the position of each index among them."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.blocks import per_row
from adamjax.mesh import replicate

__all__ = ["distinct", "distinct_of_each"]


def distinct(ids: chex.Array, num_rows: int) -> tuple[chex.Array, chex.Array]:
    """Returns the distinct ids, padded with `num_rows`, and the position of each id among them.

    Args:
      ids: int32[n] in `[0, num_rows]`; `num_rows` stands for no row.

    Returns:
      int32[n] and int32[n]; the position of `num_rows` is n.
    """
    return distinct_of_each([ids], [num_rows])[0]


def distinct_of_each(
    ids: Sequence[chex.Array], num_rows: Sequence[int]
) -> list[tuple[chex.Array, chex.Array]]:
    """`distinct` for several tables in one search."""
    ids = [replicate(x) for x in ids]
    results = [(x, jnp.full_like(x, x.size)) for x in ids]
    not_empty = [i for i, x in enumerate(ids) if x.size and num_rows[i]]
    for group in _groups(not_empty, num_rows):
        group_rows, group_ids = tuple(num_rows[i] for i in group), tuple(ids[i] for i in group)
        for i, pair in zip(group, _distinct(group_rows, group_ids), strict=True):
            results[i] = pair
    return results


def _groups(tables: Sequence[int], num_rows: Sequence[int]) -> list[list[int]]:
    """Groups of tables to search at once. int32 must suffice to number the rows of a group."""
    groups: list[list[int]] = []
    for i in tables:
        if not groups or sum(num_rows[j] + 1 for j in (*groups[-1], i)) > np.iinfo(np.int32).max:
            groups.append([])
        groups[-1].append(i)
    return groups


# Up to this many rows per id, it is cheaper to clear an int32 per row than to sort: at 1M rows and
# 8,192 ids, a CPU takes 0.25 ms with the scratch array and 0.45 ms by sorting; at 65,536 ids, 0.45
# and 4 ms. A TPU sorts fast and scatters single numbers slowly. A GPU clears 134 MB, the largest
# scratch array for 8,192 ids, in 0.05 ms at 3 TB/s. But the binary search among sorted ids takes it
# a loop of dozens of kernels.
_SCRATCH_ROWS_PER_ID = 512
_SCRATCH_ROWS_PER_ID_ON_GPU = 4096


# With jit, JAX traces this once for all tables and steps of these sizes; `inline` leaves no call in
# the caller's program.
@functools.partial(jax.jit, static_argnums=0, inline=True)
def _distinct(
    num_rows: tuple[int, ...], ids: tuple[chex.Array, ...]
) -> list[tuple[chex.Array, chex.Array]]:
    """`distinct_of_each` for one group, whose rows are numbered consecutively.

    After the numbers of a table's rows comes one more number, which stands for no row of this
    table. So even when all numbers are sorted, the ids of each table are next to each other.
    """
    segments = _Segments(tuple(x.size for x in ids), num_rows)
    first_rows = segments.for_each_id(np.array(segments.first_rows, np.int32))
    numbers = jnp.concatenate(ids) + first_rows
    by_scratch = functools.partial(_by_scratch, segments)
    by_sort = functools.partial(_by_sort, segments)
    total_rows, total_ids = sum(num_rows), numbers.size
    if total_rows <= _SCRATCH_ROWS_PER_ID * total_ids:
        distinct_numbers, position = jax.lax.platform_dependent(
            numbers, tpu=by_sort, default=by_scratch
        )
    elif total_rows > _SCRATCH_ROWS_PER_ID_ON_GPU * total_ids:
        distinct_numbers, position = by_sort(numbers)
    else:
        distinct_numbers, position = jax.lax.platform_dependent(
            numbers, cuda=by_scratch, rocm=by_scratch, default=by_sort
        )
    arrays = distinct_numbers - first_rows, position
    ends = np.cumsum(segments.sizes)[:-1]
    return list(zip(*(jnp.split(x, ends) for x in arrays), strict=True))


@dataclasses.dataclass(frozen=True)
class _Segments:
    """The segments of a group's tables, in the array of all ids and in the numbers of all rows.

    Attributes:
      sizes: the number of ids of each table.
      num_rows: the number of rows of each table.
    """

    sizes: tuple[int, ...]
    num_rows: tuple[int, ...]

    @property
    def starts(self) -> list[int]:
        return [sum(self.sizes[:i]) for i in range(len(self.sizes))]

    @property
    def first_rows(self) -> list[int]:
        return [sum(self.num_rows[:i]) + i for i in range(len(self.num_rows))]

    def for_each_id(self, of_tables: Any) -> Any:
        """For each id the value of its table in `of_tables`; a scalar if there is one table."""
        return per_row(of_tables, self.sizes)

    @property
    def no_row(self) -> Any:
        """For each id, the number that stands for no row of its table."""
        last = np.add(self.first_rows, self.num_rows)
        return self.for_each_id(last.astype(np.int32))

    def positions(self, flags: chex.Array) -> chex.Array:
        """Numbers the flagged ids of each table from 0."""
        total = jnp.cumsum(flags.astype(jnp.int32))
        if len(self.sizes) == 1:
            return total - 1
        before = jnp.concatenate([jnp.zeros(1, jnp.int32), total[np.cumsum(self.sizes[:-1]) - 1]])
        return total - 1 - self.for_each_id(before)

    def pack(self, numbers: chex.Array, flags: chex.Array, position: chex.Array) -> chex.Array:
        """Puts flagged numbers at their positions in their tables' segments, else `no_row`."""
        start = self.for_each_id(np.array(self.starts, np.int32))
        target = jnp.where(flags, start + position, numbers.size)
        padding = jnp.broadcast_to(jnp.asarray(self.no_row, jnp.int32), numbers.shape)
        return padding.at[target].set(numbers, mode="drop", unique_indices=True)

    def position_or_size(self, position: chex.Array, is_row: chex.Array) -> chex.Array:
        """The positions, but for an id that stands for no row, the size of its table's segment."""
        return jnp.where(is_row, position, self.for_each_id(np.array(self.sizes, np.int32)))


def _by_scratch(segments: _Segments, numbers: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Finds the distinct numbers and each number's position among them, by a scratch array.

    The array has an entry for each row: where its number first occurs.
    """
    n, num_rows = numbers.size, segments.first_rows[-1] + segments.num_rows[-1]
    iota = jax.lax.iota(jnp.int32, n)
    if len(segments.sizes) > 1:
        # Numbers that stand for no row must be outside the array, as the last table's already is.
        numbers = jnp.where(numbers == segments.no_row, num_rows, numbers)
    scratch = jnp.full(num_rows, n, jnp.int32).at[numbers].min(iota, mode="drop")
    first = scratch.at[numbers].get(mode="fill", fill_value=n)
    is_first = first == iota
    position = segments.positions(is_first)
    distinct_numbers = segments.pack(numbers, is_first, position)
    position = position.at[first].get(mode="fill", fill_value=0)
    return distinct_numbers, segments.position_or_size(position, first < n)


def _by_sort(segments: _Segments, numbers: chex.Array) -> tuple[chex.Array, chex.Array]:
    """Finds the distinct numbers by sorting, then the position of each number by binary search."""
    ordered = jax.lax.sort(numbers)
    is_new = jnp.concatenate([jnp.ones(1, bool), ordered[1:] != ordered[:-1]])
    is_new = is_new & (ordered != segments.no_row)
    distinct_numbers = segments.pack(ordered, is_new, segments.positions(is_new))
    start = segments.for_each_id(np.array(segments.starts, np.int32))
    position = jnp.searchsorted(distinct_numbers, numbers).astype(jnp.int32) - start
    return distinct_numbers, segments.position_or_size(position, numbers != segments.no_row)
