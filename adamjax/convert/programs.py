"""Finds what the program of an update shows of a transform: what it depends on, and its numbers."""

import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._compat import ClosedJaxpr, Jaxpr, Literal
from adamjax.convert.adamjax_state import AdamjaxState
from adamjax.convert.values import leaves_by_path
from adamjax.data import Tree
from adamjax.leaves import dtype_of

__all__ = ["leaves_of_parts", "operations", "program", "whole_numbers"]


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


def whole_numbers(traced: ClosedJaxpr) -> set[int]:
    """The whole numbers in the program of an update, such as the boundaries of a schedule.

    Of arrays, only the numbers of small ones are included.
    """
    found: set[int] = set()
    for value in _constants(traced):
        dtype = dtype_of(value)
        is_real = jnp.issubdtype(dtype, jnp.integer) or jnp.issubdtype(dtype, jnp.floating)
        if is_real and np.size(value) <= _MOST_NUMBERS:
            numbers = np.asarray(value).reshape(-1).tolist()
            found |= {int(x) for x in numbers if math.isfinite(x) and x == int(x)}
    return found


# The most elements of an array whose numbers may be the boundaries of a schedule.
_MOST_NUMBERS = 64


def _constants(traced: ClosedJaxpr) -> Iterator[Any]:
    """The constants of a program, and of the programs inside it."""
    yield from traced.consts
    for eqn in _equations(traced.jaxpr):
        yield from (x.val for x in eqn.invars if isinstance(x, Literal))
        yield from (c for x in _inner_programs(eqn) if isinstance(x, ClosedJaxpr) for c in x.consts)


def _operations(jaxpr: Jaxpr, with_positions: bool) -> Iterator[tuple[str, str]]:
    for eqn in _equations(jaxpr):
        numbers: list[Any] = [x.val for x in eqn.invars if isinstance(x, Literal)]
        if with_positions and eqn.primitive.name in _OF_POSITIONS:
            numbers.append(eqn.params)
        yield eqn.primitive.name, repr(numbers)


def _equations(jaxpr: Jaxpr) -> Iterator[Any]:
    """The equations of a program, and of the programs inside it."""
    for eqn in jaxpr.eqns:
        yield eqn
        for x in _inner_programs(eqn):
            yield from _equations(x.jaxpr if isinstance(x, ClosedJaxpr) else x)


def _inner_programs(eqn: Any) -> list[Any]:
    inner = jax.tree.leaves(
        list(eqn.params.values()), is_leaf=lambda x: isinstance(x, ClosedJaxpr | Jaxpr)
    )
    return [x for x in inner if isinstance(x, ClosedJaxpr | Jaxpr)]
