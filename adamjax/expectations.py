"""What a law expects of results: the same form, the same bits, or nearly the same values.

Errors name the leaf and the numbers.
"""

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.data import Tree
from adamjax.leaves import described, dtype_of

__all__ = [
    "STEPS_CLOSE",
    "expect_close",
    "expect_form",
    "expect_near",
    "expect_same",
    "first_difference",
    "in_float64",
    "is_none",
    "largest_magnitude",
    "leaves_with_names",
    "pairs_of_leaves",
    "shown",
]

# How far float32 results of one formula may be apart in two programs, relative to the largest value
# of the leaf.
_CLOSE = 2e-6
# The same after several steps.
STEPS_CLOSE = 2e-5


def is_none(x: Any) -> bool:
    return x is None


def leaves_with_names(name: str, tree: Tree) -> tuple[list[tuple[str, Any]], Any]:
    """The leaves, `None` among them, each with its name for errors; and the structure."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_none)
    return [(name + jax.tree_util.keystr(path), x) for path, x in pairs], treedef


def pairs_of_leaves(name: str, actual: Tree, expected: Tree) -> Iterator[tuple[str, Any, Any]]:
    """Triples (name, leaf, expected leaf) of two trees that must have the same structure.

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
            fault = f"no {missing[0]}"
        elif surplus:
            fault = f"a surplus {surplus[0]}"
        else:
            fault = f"the structure {treedef}"
        raise AssertionError(f"there is {fault}, expected {expected_treedef}")
    for (leaf_name, x), (_, y) in zip(leaves, expected_leaves, strict=True):
        if (x is None) != (y is None):
            raise AssertionError(f"{leaf_name} is {shown(x)}, expected {shown(y)}")
        if x is not None:
            yield leaf_name, x, y


def shown(x: Any) -> str:
    return "None" if x is None else described(x)


def expect_form(name: str, actual: Tree, expected: Tree) -> None:
    """Expects the same structure, shapes and dtypes."""
    for leaf_name, x, y in pairs_of_leaves(name, actual, expected):
        if (jnp.shape(x), dtype_of(x)) != (jnp.shape(y), dtype_of(y)):
            raise AssertionError(f"{leaf_name} is {described(x)}, expected {described(y)}")


def expect_same(name: str, actual: Tree, expected: Tree) -> None:
    """Expects the same form, and the same bits."""
    expect_form(name, actual, expected)
    for leaf_name, x, y in pairs_of_leaves(name, actual, expected):
        a, b = np.asarray(x), np.asarray(y)
        if a.tobytes() != b.tobytes():
            differ = np.any(_bytes_of_elements(a) != _bytes_of_elements(b), axis=-1)
            raise AssertionError(first_difference(leaf_name, a, b, np.asarray(differ)))


def _bytes_of_elements(x: Any) -> Any:
    """uint8[*shape, bytes of an element]: 0.0 and -0.0 differ, and NaNs of equal bits do not."""
    return np.frombuffer(x.tobytes(), np.uint8).reshape(*x.shape, x.itemsize)


def expect_close(name: str, actual: Tree, expected: Tree, rtol: float = _CLOSE) -> None:
    """Expects the same form, and values that differ by at most `rtol` times the leaf's largest."""
    expect_form(name, actual, expected)
    for leaf_name, x, y in pairs_of_leaves(name, actual, expected):
        expect_near(leaf_name, x, y, rtol * largest_magnitude(y))


def largest_magnitude(x: Any) -> float:
    """The largest absolute value of the finite elements of an array."""
    x = in_float64(x)
    return float(np.max(np.abs(x), initial=0.0, where=np.isfinite(x)))


def expect_near(name: str, x: Any, y: Any, atol: float) -> None:
    """Expects values within `atol`, the same infinities, and NaN where NaN is expected."""
    a, b = in_float64(x), in_float64(y)
    with np.errstate(invalid="ignore"):  # infinity minus infinity
        near = (np.abs(a - b) <= atol) | (a == b) | (np.isnan(a) & np.isnan(b))
    far = np.asarray(~near)
    if np.any(far):
        raise AssertionError(first_difference(name, a, b, far))


def in_float64(x: Any) -> Any:
    x = np.asarray(x)
    complex_ = jnp.issubdtype(x.dtype, jnp.complexfloating)
    return x.astype(np.complex128 if complex_ else np.float64)


def first_difference(name: str, a: Any, b: Any, differ: Any) -> str:
    """A sentence with the first element in which two arrays differ."""
    at = tuple(int(i[0]) for i in np.nonzero(differ)) if np.ndim(differ) else ()
    where = f"{name}{list(at)}" if at else name
    return f"{where} is {a[at]!s}, expected {b[at]!s}" if a.size else f"{name} differs"
