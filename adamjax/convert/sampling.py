"""Copies of states with some rows of each large leaf, whose steps are quick to compare."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from adamjax.convert.adamjax_state import AdamjaxState, initial_state
from adamjax.convert.decisions import leaves_of_parts, program
from adamjax.convert.values import map_items
from adamjax.exact import ExactRowsState, exact_rows
from adamjax.structure import replace_parts, states_of_class

__all__ = ["sampled"]

# A leaf of more elements than the first is large. Of such a leaf, so many rows are taken that they
# have about as many elements as the second, but at least so many rows.
_LARGE, _SAMPLED, _FEWEST_ROWS = 1 << 16, 1 << 13, 16

Shape = tuple[int, ...]


def sampled(ours: AdamjaxState, optimizer: Any, state: Any) -> tuple[AdamjaxState, Any] | None:
    """Both states with some rows of each large leaf.

    Args:
      ours: the state of adamjax, with its transform.
      optimizer, state: the transform of optax, and its state.

    Returns:
      The state of adamjax and that of optax; `None` if no leaf is large, or if one of the
      transforms may treat a leaf in another way because it has fewer rows.
    """
    small_shapes = _small_shapes([np.shape(p) for p in jax.tree.leaves(ours.params)])
    if not small_shapes:
        return None

    def sample(x: Any) -> Any:
        small_shape = small_shapes.get(np.shape(x))
        # These rows include the first and the last.
        return x if small_shape is None else x[_rows(len(x), small_shape[0])]

    params = jax.tree.map(sample, ours.params)
    try:
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
        for each in (optimizer, tx):
            if program(each, ours.params) != program(each, params):
                return None
    except (TypeError, ValueError):  # which steps of the whole state explain
        return None
    return None if leaves_of_parts(ours) != leaves_of_parts(small) else (small, small_state)


def _small_shapes(shapes: list[Shape]) -> dict[Shape, Shape]:
    """For the shape of each large leaf the shape of its sample. No two have the same."""
    small_shapes: dict[Shape, Shape] = {}
    taken = set(shapes)
    for shape in shapes:
        if shape in small_shapes or np.prod(shape) <= _LARGE:
            continue
        num_rows = max(_SAMPLED // int(np.prod(shape[1:])), _FEWEST_ROWS)
        while (num_rows, *shape[1:]) in taken:
            num_rows += 1
        if num_rows < shape[0]:
            small_shapes[shape] = num_rows, *shape[1:]
            taken.add(small_shapes[shape])
    return small_shapes


def _rows(num_rows: int, num_sampled: int) -> np.ndarray:
    return np.linspace(0, num_rows - 1, num_sampled).astype(int)


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
