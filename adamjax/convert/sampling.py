"""Copies of states with a sample of each large leaf, whose steps are quick to compare."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.convert.adamjax_state import AdamjaxState, initial_state
from adamjax.convert.programs import leaves_of_parts, program
from adamjax.convert.values import map_items
from adamjax.exact import ExactRowsState, exact_rows
from adamjax.structure import replace_parts, states_of_class

__all__ = ["longest_axis", "sampled"]

# A leaf with more elements is large. Its sample has a few more elements than that, so that it is
# larger than leaves that are not sampled, and at least this many slices.
_LARGE, _FEWEST = 1 << 14, 4

Shape = tuple[int, ...]


def sampled(ours: AdamjaxState, optimizer: Any, state: Any) -> tuple[AdamjaxState, Any] | None:
    """Both states with a sample of each large leaf: slices along its longest axis, such as rows.

    The leaves have the same order by size as before, and leaves of different shapes still differ.

    Args:
      ours: the state of adamjax, with its transform.
      optimizer, state: the transform of optax, and its state.

    Returns:
      The state of adamjax and that of optax; `None` if no leaf is large, or if one of the
      transforms may treat a leaf differently because of its size.
    """
    small_shapes = _small_shapes({np.shape(p) for p in jax.tree.leaves(ours.params)})
    if not small_shapes:
        return None

    def sample(x: Any) -> Any:
        shape = np.shape(x)
        is_split = isinstance(x, jax.Array) and len(x.devices()) > 1
        if shape not in small_shapes:
            # Small steps on several devices would take longer than on one.
            return jnp.asarray(np.asarray(x)) if is_split else x
        axis = longest_axis(shape)
        # The first slice and the last are among these.
        slices = np.linspace(0, shape[axis] - 1, small_shapes[shape][axis]).astype(int)
        return jnp.asarray(np.take(np.asarray(x), slices, axis))

    try:
        params = jax.tree.map(sample, ours.params)
        small = initial_state(ours.owner, ours.tx, params)
        small = small.with_state(_sampled_adamjax(sample, ours.state, small.state, small))
        small_state = jax.tree.map(sample, state)
        if not _are_like(small_state, jax.eval_shape(optimizer.init, params)):
            return None
        if not _are_like(small.state, jax.eval_shape(ours.tx.init, params)):
            return None
        # The program of exact_rows depends on the size of a table, but its results do not.
        tx = replace_parts(ours.tx, lambda x: x.tx if isinstance(x, exact_rows) else x)
        # If optax chooses rows by their position, a sample may lack the rows that it chooses. If tx
        # does, a step of the whole leaf shows it.
        for transform, with_positions in ((optimizer, True), (tx, False)):
            programs = [program(transform, x, with_positions) for x in (ours.params, params)]
            if programs[0] != programs[1]:
                return None
    except (TypeError, ValueError):  # Steps from the whole state raise it again, with a reason.
        return None
    return None if leaves_of_parts(ours) != leaves_of_parts(small) else (small, small_state)


def longest_axis(shape: Shape) -> int:
    """The index of the longest axis, the first if there are several."""
    return shape.index(max(shape))


def _small_shapes(shapes: Iterable[Shape]) -> dict[Shape, Shape]:
    """The shape of the sample for each shape of a large leaf, if the sample is smaller."""
    small_shapes: dict[Shape, Shape] = {}
    largest = _LARGE
    for shape in sorted(shapes, key=math.prod):
        if math.prod(shape) <= _LARGE:
            continue
        # A sample has more elements than all smaller leaves and samples, so their shapes differ.
        axis = longest_axis(shape)
        per_slice = math.prod(shape) // shape[axis]
        length = max(largest // per_slice + 1, _FEWEST)
        if length < shape[axis]:
            small_shapes[shape] = *shape[:axis], length, *shape[axis + 1 :]
        largest = per_slice * min(length, shape[axis])
    return small_shapes


def _sampled_adamjax(sample: Callable[[Any], Any], x: Any, fresh: Any, small: AdamjaxState) -> Any:
    """A node of the state of adamjax, sampled; `fresh` is the same node of `small`'s state."""
    if isinstance(x, ExactRowsState):
        part: Any = small.part(fresh)
        inner = _sampled_adamjax(sample, x.inner, fresh.inner, small)
        return part.tx.from_dense(inner, part.params)
    if states_of_class(ExactRowsState, x):
        return map_items(lambda a, b: _sampled_adamjax(sample, a, b, small), x, fresh)
    return jax.tree.map(sample, x)


def _are_like(tree: Any, expected: Any) -> bool:
    """Whether a tree has the structure and the shapes that are expected."""
    shapes, expected_shapes = (jax.tree.map(np.shape, x) for x in (tree, expected))
    return bool(shapes == expected_shapes)
