"""How a leaf is named, and how names are matched: one way, everywhere."""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax

from adamjax.data import Tree
from adamjax.rows import RowGradient

__all__ = [
    "Mask",
    "checked_mask",
    "checked_rules",
    "expect_matches",
    "first_match",
    "flatten",
    "is_leaf",
    "leaf_paths",
    "optional",
    "selected",
    "unique_paths",
]

# A pattern for `re.search`, or a function from a tree to a tree of bools (optax's masks).
Mask = str | Callable[[Any], Any]


def is_leaf(x: Any) -> bool:
    """Whether a node is one leaf to us: `None`, which stands for 'not here', or a row gradient."""
    return x is None or isinstance(x, RowGradient)


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """Leaves and structure of a tree; what is a leaf, `is_leaf` says."""
    return jax.tree.flatten(tree, is_leaf=is_leaf)


def leaf_paths(tree: Tree) -> list[str]:
    """The path of every leaf (`None` is one), keys joined by slashes: `"layers/0/kernel"`."""
    found, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_named)
    paths: list[str] = []
    for path, x in found:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # A Variable of flax.nnx is named as its value is where there is no Variable around it:
        # its Optimizer shows `init` the one and `update` the other.
        below = [name] if is_leaf(x) or not _is_variable(x) else len(flatten(x)[0]) * [name]
        paths.extend(below)
    return paths


def unique_paths(owner: str, tree: Tree) -> list[str]:
    """`leaf_paths` where paths are keys: an error if two leaves have the same one."""
    paths = leaf_paths(tree)
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise ValueError(
                f"{owner}: two leaves have the path {path!r}, by which leaves are told apart here: "
                "rename a key, as in {'a/b': x, 'a': {'b': y}}, so that all paths differ"
            )
        seen.add(path)
    return paths


def _is_variable(x: Any) -> bool:
    return hasattr(type(x), "get_metadata") and hasattr(type(x), "get_value")


def _is_named(x: Any) -> bool:
    return is_leaf(x) or _is_variable(x)


class optional(str):
    """A path pattern that may match no leaf; `init` refuses any other one that matches none.

    It can stand wherever a pattern can: in `by_path`, `partition`, `masked`, `mask=`, `tables`.

    >>> import adamjax, jax.numpy as jnp
    >>> rates = adamjax.by_path([(adamjax.optional("bias$"), 0.1)], default=0.01)
    >>> state = adamjax.adam(rates).init({"kernel": jnp.zeros(2)})
    """

    __slots__ = ()

    def __repr__(self) -> str:
        return f"optional({str.__repr__(self)})"


def expect_matches(owner: str, patterns: Iterable[str], tree: Tree) -> None:
    """Refuses patterns that match the path of no leaf of the tree, unless they are `optional`.

    A leaf that is `None` is not there. A tree without leaves is not checked.
    """
    pairs = zip(leaf_paths(tree), flatten(tree)[0], strict=True)
    paths = [path for path, leaf in pairs if leaf is not None]
    for pattern in patterns:
        if isinstance(pattern, optional) or not paths:
            continue
        if not any(re.search(pattern, path) for path in paths):
            shown = f"{paths[:20]}{' and others' if len(paths) > 20 else ''}"
            raise ValueError(
                f"{owner}: the pattern {pattern!r} matches no leaf; the paths are {shown}. If that "
                f"is meant, write adamjax.optional({pattern!r})"
            )


def checked_pattern(owner: str, pattern: Any) -> str:
    """The pattern, if it is a regular expression; an error that names the owner otherwise."""
    if not isinstance(pattern, str):
        raise TypeError(f"{owner}: a path pattern must be a str, got {pattern!r}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{owner}: {pattern!r} is not a regular expression ({error}); a path is written "
            "like 'layers/0/kernel' and matched with re.search"
        ) from None
    return pattern


def checked_patterns(owner: str, patterns: Any) -> tuple[str, ...]:
    """One pattern or several, checked."""
    several = (patterns,) if isinstance(patterns, str) else tuple(patterns)
    return tuple(checked_pattern(owner, pattern) for pattern in several)


def checked_rules(owner: str, rules: Iterable[tuple[str, Any]]) -> list[tuple[str, Any]]:
    """The pairs (pattern, value), their patterns checked."""
    pairs = [tuple(rule) for rule in rules]
    for pair in pairs:
        if len(pair) != 2:
            raise ValueError(f"{owner}: rules must be pairs (pattern, value), got {pair!r}")
        checked_pattern(owner, pair[0])
    return pairs


def first_match(patterns: Sequence[str], path: str) -> int | None:
    """The index of the first pattern that is found in the path."""
    return next((i for i, pattern in enumerate(patterns) if re.search(pattern, path)), None)


def checked_mask(owner: str, mask: Any) -> Mask:
    """A mask that can be used: a pattern, or a function from a tree to a tree of bools."""
    return mask if callable(mask) else checked_pattern(owner, mask)


def selected(mask: Mask, tree: Tree) -> list[bool]:
    """Whether each leaf of the tree is selected, in the order of `flatten`."""
    if isinstance(mask, str):
        return [re.search(mask, path) is not None for path in leaf_paths(tree)]
    # A mask may stop above the leaves: one bool for all that is below it.
    flags = jax.tree.map(
        lambda flag, below: jax.tree.map(lambda _: bool(flag), below, is_leaf=is_leaf),
        mask(tree),
        tree,
        is_leaf=is_leaf,
    )
    return jax.tree.leaves(flags)
