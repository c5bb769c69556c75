"""Compares the trees that a law computes: their form, their bits, or their values up to rounding.

The form of a tree is its structure, and the shapes and dtypes of its leaves. Errors are
`AssertionError`s that name the first leaf that differs.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.data import Tree
from adamjax.leaves import described, dtype_of

__all__ = [
    "LOOSE_RTOL",
    "expect_close",
    "expect_same_bits",
    "expect_same_form",
    "expect_within",
    "first_difference",
    "in_float64",
    "is_none",
    "largest_magnitude",
    "leaves_with_names",
    "paired_leaves",
    "shown",
]

# The largest difference of float32 results if two programs compute the same formula, relative to
# the largest magnitude in the leaf.
_RTOL = 2e-6
# The same after several steps, or if one program runs operation by operation, without XLA's fusion.
LOOSE_RTOL = 2e-5


def is_none(x: Any) -> bool:
    return x is None


def leaves_with_names(name: str, tree: Tree) -> tuple[list[tuple[str, Any]], Any]:
    """Pairs (name, leaf) of the leaves, `None` among them, and the structure of the tree.

    The name of a leaf is the tree's name and the leaf's path: `state[0].m['w']`.
    """
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)
    return [(name + jax.tree_util.keystr(path), x) for path, x in pairs], treedef


def paired_leaves(name: str, actual: Tree, expected: Tree) -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, leaf, expected leaf) for two trees that must have the same structure.

    Leaves that are `None` must be `None` in both trees, and are left out.
    """
    leaves, treedef = leaves_with_names(name, actual)
    expected_leaves, expected_treedef = leaves_with_names(name, expected)
    if treedef != expected_treedef:
        names = [leaf_name for leaf_name, _ in leaves]
        expected_names = [leaf_name for leaf_name, _ in expected_leaves]
        missing = [x for x in expected_names if x not in set(names)]
        surplus = [x for x in names if x not in set(expected_names)]
        if missing:
            fault = f"{missing[0]} is missing"
        elif surplus:
            fault = f"{surplus[0]} should not be there"
        else:
            fault = f"the structure of {name} is {treedef}"
        raise AssertionError(f"{fault}, expected the structure {expected_treedef}")
    for (leaf_name, x), (_, y) in zip(leaves, expected_leaves, strict=True):
        if (x is None) != (y is None):
            raise AssertionError(f"{leaf_name} is {shown(x)}, expected {shown(y)}")
        if x is not None:
            yield leaf_name, x, y


def shown(x: Any) -> str:
    """A leaf in the words of an error: its dtype and shape, or `None`."""
    return "None" if x is None else described(x)


def expect_same_form(name: str, actual: Tree, expected: Tree) -> None:
    """Expects the same structure, and leaves of the same shapes and dtypes."""
    for leaf_name, x, y in paired_leaves(name, actual, expected):
        if (jnp.shape(x), dtype_of(x)) != (jnp.shape(y), dtype_of(y)):
            raise AssertionError(f"{leaf_name} is {described(x)}, expected {described(y)}")


def expect_same_bits(name: str, actual: Tree, expected: Tree) -> None:
    """Expects the same form, and the same bits: 0.0 and -0.0 differ, NaNs of equal bits do not."""
    expect_same_form(name, actual, expected)
    for leaf_name, x, y in paired_leaves(name, actual, expected):
        a, b = np.asarray(x), np.asarray(y)
        if a.tobytes() != b.tobytes():
            differ = np.any(_bytes_of_elements(a) != _bytes_of_elements(b), axis=-1)
            raise AssertionError(first_difference(leaf_name, a, b, np.asarray(differ)))


def _bytes_of_elements(x: Any) -> Any:
    """The bytes of each element, uint8[*shape, itemsize]."""
    return np.frombuffer(x.tobytes(), np.uint8).reshape(*x.shape, x.itemsize)


def expect_close(name: str, actual: Tree, expected: Tree, rtol: float = _RTOL) -> None:
    """Expects the same form, and values that are close.

    They may differ by `rtol` times the largest finite magnitude in the expected leaf.
    """
    expect_same_form(name, actual, expected)
    for leaf_name, x, y in paired_leaves(name, actual, expected):
        expect_within(leaf_name, x, y, rtol * largest_magnitude(y))


def largest_magnitude(x: Any) -> float:
    """The largest absolute value of the finite elements of an array, or 0 if it has none."""
    x = in_float64(x)
    return float(np.max(np.abs(x), initial=0.0, where=np.isfinite(x)))


def expect_within(name: str, x: Any, y: Any, atol: float) -> None:
    """Expects x to differ from y by at most `atol`, with the same infinities and NaNs as y."""
    a, b = in_float64(x), in_float64(y)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        is_within = (np.abs(a - b) <= atol) | (a == b) | (np.isnan(a) & np.isnan(b))
    differ = np.asarray(~is_within)
    if np.any(differ):
        raise AssertionError(first_difference(name, a, b, differ))


def in_float64(x: Any) -> Any:
    """An array in float64, or in complex128 if it is complex."""
    x = np.asarray(x)
    complex_ = jnp.issubdtype(x.dtype, jnp.complexfloating)
    return x.astype(np.complex128 if complex_ else np.float64)


def first_difference(name: str, a: Any, b: Any, differ: Any) -> str:
    """An error's message: where `differ` is first true, and the two values at that index."""
    index = tuple(int(i[0]) for i in np.nonzero(differ)) if np.ndim(differ) else ()
    where = f"{name}{list(index)}" if index else name
    return f"{where} is {a[index]!s}, expected {b[index]!s}" if a.size else f"{name} differs"
