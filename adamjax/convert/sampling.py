"""Copies of states with a sample of each large leaf, whose steps are quick to compare."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.convert.adamjax_state import AdamjaxState, initial_state
from adamjax.convert.decisions import leaves_of_parts, program
from adamjax.convert.values import map_items
from adamjax.exact import ExactRowsState, exact_rows
from adamjax.structure import replace_parts, states_of_class

__all__ = ["longest_axis", "sampled"]

# A leaf of more elements is large, and its sample has somewhat more elements than that, so that it
# stays larger than all others. It has at least so many slices.
_LARGE, _FEWEST = 1 << 14, 4

Shape = tuple[int, ...]


def sampled(ours: AdamjaxState, optimizer: Any, state: Any) -> tuple[AdamjaxState, Any] | None:
    """Both states with a sample of each large leaf: slices along its longest axis, such as rows.

    Leaves keep the order of their sizes, and those of different shapes stay different.

    Args:
      ours: the state of adamjax, with its transform.
      optimizer, state: the transform of optax, and its state.

    Returns:
      The state of adamjax and that of optax; `None` if no leaf is large, or if one of the
      transforms may treat a leaf in another way because it is smaller.
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
        # Where the steps of rows are taken has to do with the size of a table, but what they are
        # has not.
        tx = replace_parts(ours.tx, lambda x: x.tx if isinstance(x, exact_rows) else x)
        # If optax chooses rows by their position, a sample may have rows of one kind only. If tx
        # does, a step of the whole leaf shows it.
        for each, with_positions in ((optimizer, True), (tx, False)):
            programs = [program(each, x, with_positions) for x in (ours.params, params)]
            if programs[0] != programs[1]:
                return None
    except (TypeError, ValueError):  # which steps of the whole state explain
        return None
    return None if leaves_of_parts(ours) != leaves_of_parts(small) else (small, small_state)


def longest_axis(shape: Shape) -> int:
    """The first of the longest axes."""
    return shape.index(max(shape))


def _small_shapes(shapes: Iterable[Shape]) -> dict[Shape, Shape]:
    """For the shape of each large leaf the shape of its sample, where that is smaller."""
    small_shapes: dict[Shape, Shape] = {}
    largest = _LARGE
    for shape in sorted(shapes, key=math.prod):
        if math.prod(shape) <= _LARGE:
            continue
        # More elements than any leaf before has, so no two shapes become one.
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
