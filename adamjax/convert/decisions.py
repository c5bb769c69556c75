"""Finds where a transform depends on the shapes and dtypes of leaves, as a mask function may."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from adamjax._compat import ClosedJaxpr, Jaxpr, Literal
from adamjax.convert.adamjax_state import AdamjaxState
from adamjax.convert.values import leaves_by_path
from adamjax.data import Tree
from adamjax.leaves import dtype_of

__all__ = ["leaves_of_parts", "operations", "program"]


def leaves_of_parts(state: AdamjaxState) -> list[tuple[type, list[str]]]:
    """The class of each part of the transform, and the leaves that it sees."""
    return [(type(part.tx), list(leaves_by_path(state.owner, part.params))) for part in state.parts]


# Operations that choose elements by their position.
_OF_POSITIONS = {"iota", "slice", "dynamic_slice", "pad"}


def program(tx: Any, params: Tree, with_positions: bool = False) -> list[tuple[str, str]]:
    """The operations of an update: the name of each, and the numbers among its arguments.

    They are the same for all shapes and dtypes of leaves, unless the transform depends on these.

    Args:
      with_positions: whether to include the parameters of operations that choose elements by their
        position. They depend on the shape of a leaf.
    """
    # Weak types and shardings are left out: programs that compute the same may differ in them.
    shapes = jax.tree.map(lambda p: jax.ShapeDtypeStruct(np.shape(p), dtype_of(p)), params)
    traced = jax.make_jaxpr(tx.update)(shapes, jax.eval_shape(tx.init, shapes), shapes)
    return list(_operations(traced.jaxpr, with_positions))


def operations(tx: Any, params: Tree) -> list[str]:
    """The names of the operations of an update, without casts from one dtype to another."""
    return [name for name, _ in program(tx, params) if name != "convert_element_type"]


def _operations(jaxpr: Jaxpr, with_positions: bool) -> Iterator[tuple[str, str]]:
    for eqn in jaxpr.eqns:
        numbers: list[Any] = [x.val for x in eqn.invars if isinstance(x, Literal)]
        if with_positions and eqn.primitive.name in _OF_POSITIONS:
            numbers.append(eqn.params)
        yield eqn.primitive.name, repr(numbers)
        inner = jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        )
        for x in inner:
            if isinstance(x, ClosedJaxpr | Jaxpr):
                yield from _operations(x.jaxpr if isinstance(x, ClosedJaxpr) else x, with_positions)
