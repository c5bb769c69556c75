"""What transforms decide by the shapes and dtypes of leaves, as masks given as functions may."""

from collections.abc import Iterator
from typing import Any

import jax

from adamjax._compat import ClosedJaxpr, Jaxpr, Literal
from adamjax.convert.adamjax_state import AdamjaxState
from adamjax.convert.values import leaves_by_path
from adamjax.data import Tree

__all__ = ["leaves_of_parts", "operations", "program"]

# Operations that only say where an array is.
_PLACING = {"reshard", "sharding_constraint", "mesh_cast"}


def leaves_of_parts(state: AdamjaxState) -> list[tuple[type, list[str]]]:
    """The class of each part of the transform, and the leaves that it sees."""
    return [(type(part.tx), list(leaves_by_path(state.owner, part.params))) for part in state.parts]


def program(tx: Any, params: Tree) -> list[tuple[str, str]]:
    """The operations of an update: the name of each, and the numbers among its arguments.

    It is the same for all shapes and dtypes of leaves, unless the transform decides by these.
    """
    traced = jax.make_jaxpr(tx.update)(params, jax.eval_shape(tx.init, params), params)
    return list(_operations(traced.jaxpr))


def operations(tx: Any, params: Tree) -> list[str]:
    """The names of the operations of an update, without casts from one dtype to another."""
    return [name for name, _ in program(tx, params) if name != "convert_element_type"]


def _operations(jaxpr: Jaxpr) -> Iterator[tuple[str, str]]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in _PLACING:
            continue
        numbers = [x.val for x in eqn.invars if isinstance(x, Literal)]
        yield eqn.primitive.name, repr(numbers)
        inner = jax.tree.leaves(
            list(eqn.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
        )
        for x in inner:
            if isinstance(x, ClosedJaxpr | Jaxpr):
                yield from _operations(x.jaxpr if isinstance(x, ClosedJaxpr) else x)
