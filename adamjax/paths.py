"""How a leaf is named, and how names are matched: one way, everywhere."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from adamjax.data import Tree
from adamjax.rows import RowGradient, RowMoves

__all__ = [
    "BoolTree",
    "Mask",
    "bool_tree",
    "checked_mask",
    "checked_pattern",
    "checked_patterns",
    "checked_rules",
    "expect_matches",
    "expect_paths",
    "expect_present",
    "first_match",
    "flatten",
    "is_leaf",
    "leaf_paths",
    "optional",
    "paired",
    "resolved_mask",
    "selected",
    "unique_paths",
]


def is_leaf(x: Any) -> bool:
    """Whether a node is one leaf to us: `None`, which stands for 'not here', or rows of a table."""
    return x is None or isinstance(x, RowGradient | RowMoves)


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
    """A path pattern that may match no leaf; any other one that matches none is refused.

    It can stand wherever a pattern can: in `by_path`, `partition`, `masked`, `mask=`, `tables`,
    `max_rows`. It is not equal to the plain string, as it does something else.

    >>> import adamjax, jax.numpy as jnp
    >>> rates = adamjax.by_path([(adamjax.optional("bias$"), 0.1)], default=0.01)
    >>> state = adamjax.adam(rates).init({"kernel": jnp.zeros(2)})
    """

    __slots__ = ()

    def __new__(cls, pattern: str) -> "optional":
        return super().__new__(cls, checked_pattern("optional", pattern))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, optional) and str.__eq__(self, other)

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash((optional, str.__hash__(self)))

    def __repr__(self) -> str:
        return f"optional({str.__repr__(self)})"


# --- patterns -----------------------------------------------------------------------------------


def checked_pattern(owner: str, pattern: Any) -> str:
    """The pattern, if it is a regular expression; an error that names the owner otherwise."""
    if not isinstance(pattern, str):
        mend = ""
        if isinstance(pattern, re.Pattern):
            mend = f": write its text, {pattern.pattern!r}, flags as in '(?i)bias'"
        elif isinstance(pattern, bytes):
            mend = f": write {pattern.decode(errors='replace')!r}"
        raise TypeError(f"{owner}: a path pattern must be a str, got {pattern!r}{mend}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{owner}: {pattern!r} is not a regular expression ({error}); a path is written "
            "like 'layers/0/kernel' and matched with re.search"
        ) from None
    # NumPy's strings and enumerations would print, compare and be written as something else.
    return pattern if type(pattern) in (str, optional) else str.__str__(pattern)


def checked_patterns(owner: str, patterns: Any) -> tuple[str, ...]:
    """One pattern or several, checked."""
    if isinstance(patterns, str | bytes | re.Pattern):
        patterns = (patterns,)
    if isinstance(patterns, Mapping) or not isinstance(patterns, Iterable):
        raise TypeError(f"{owner}: expected a path pattern or a list of them, got {patterns!r}")
    several = tuple(checked_pattern(owner, pattern) for pattern in patterns)
    if not several:
        raise ValueError(f"{owner}: expected a path pattern or a list of them, got an empty list")
    return several


def checked_rules(owner: str, rules: Any) -> list[tuple[str, Any]]:
    """The rules, pairs (pattern, value) or a dictionary {pattern: value}, as checked pairs."""
    wanted = f"{owner}: expected pairs (pattern, value) or a dictionary {{pattern: value}}"
    if isinstance(rules, str | bytes):
        raise TypeError(f"{wanted}, got the string {rules!r}")
    if not isinstance(rules, Iterable):
        raise TypeError(f"{wanted}, got {rules!r}")
    pairs: list[tuple[str, Any]] = []
    for pair in rules.items() if isinstance(rules, Mapping) else rules:
        if isinstance(pair, str | bytes):
            raise ValueError(f"{wanted}, got the string {pair!r} in the place of a pair")
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"{wanted}, got {pair!r} in the place of a pair")
        pairs.append((checked_pattern(owner, pair[0]), pair[1]))
    return pairs


def paired(owner: str, patterns: Any, values: Any) -> list[tuple[Any, Any]]:
    """Patterns and their values, which are fields of their own, as pairs; one each."""
    for x in (patterns, values):
        if not isinstance(x, list | tuple):
            raise TypeError(f"{owner}: expected lists of patterns and of their values, got {x!r}")
    if len(patterns) != len(values):
        raise ValueError(
            f"{owner}: expected one value for each pattern, got {len(values)} for "
            f"{list(patterns)!r}"
        )
    return list(zip(patterns, values, strict=True))


def first_match(patterns: Sequence[str], path: str) -> int | None:
    """The index of the first pattern that is found in the path."""
    return next((i for i, pattern in enumerate(patterns) if re.search(pattern, path)), None)


def expect_matches(
    owner: str, patterns: Sequence[str], tree: Tree, *, first_decides: bool = False
) -> None:
    """Refuses patterns that match the path of no leaf of the tree, unless they are `optional`.

    A leaf that is `None` is not there, as another part's leaves in `masked` and `partition`; any
    other leaf is, integers too. A tree without any element is not checked.

    Args:
      owner: for errors.
      patterns: the patterns.
      tree: the tree.
      first_decides: whether only the first pattern that matches a leaf counts for it. Then one
        that matches no leaf but those of earlier ones is refused too, unless it matches them
        all, as a last rule for what is left does, and is no repetition.
    """
    if all(isinstance(pattern, optional) for pattern in patterns):
        return
    paths: list[str] = []
    absent: list[str] = []
    has_elements = False
    for path, leaf in zip(leaf_paths(tree), flatten(tree)[0], strict=True):
        (absent if leaf is None else paths).append(path)
        has_elements = has_elements or (leaf is not None and np.size(leaf) > 0)
    if not has_elements:
        return
    expect_paths(owner, patterns, paths, absent=absent)
    if not first_decides:
        return
    for i, pattern in enumerate(patterns):
        if isinstance(pattern, optional):
            continue
        matches = [path for path in paths if re.search(pattern, path)]
        deciding = [first_match(patterns, path) for path in matches]
        repeated = any(str(pattern) == str(earlier) for earlier in patterns[:i])
        if i not in deciding and (repeated or len(matches) < len(paths)):
            earlier = patterns[min(j for j in deciding if j is not None)]
            raise ValueError(
                f"{owner}: the pattern {pattern!r} has no effect: {_listed(matches)} match an "
                f"earlier one, such as {earlier!r}, and the first that matches decides. Put it in "
                f"front, or write adamjax.optional({str(pattern)!r}) if that is meant"
            )


def expect_present(owner: str, patterns: Iterable[str], tree: Tree, paths: Sequence[str]) -> None:
    """Refuses patterns that match no path of a tree that comes to `update`.

    So a state for other parameters, from a checkpoint, is no way around `init`. Here a leaf that is
    `None` counts, as that may be its gradient in this step alone.
    """
    unmet = [p for p in patterns if not any(re.search(p, path) for path in paths)]
    if unmet and any(0 not in np.shape(x) for x in flatten(tree)[0] if x is not None):
        expect_paths(owner, unmet, paths)


def expect_paths(
    owner: str,
    patterns: Iterable[str],
    paths: Sequence[str],
    *,
    what: str = "leaf",
    absent: Sequence[str] = (),
) -> None:
    """Refuses patterns that are found in none of the paths, unless they are `optional`.

    `absent` are the paths of leaves that are `None`.
    """
    for pattern in patterns:
        if isinstance(pattern, optional) or any(re.search(pattern, path) for path in paths):
            continue
        here = ""
        if any(re.search(pattern, path) for path in absent):
            here = " that is here (leaves of other parts are None here)"
        raise ValueError(
            f"{owner}: the pattern {pattern!r} matches no {what}{here}; the paths are "
            f"{_listed(paths)}. If that is meant, write adamjax.optional({str(pattern)!r})"
        )


def _listed(paths: Sequence[str]) -> str:
    more = len(paths) - 20
    return f"{list(paths[:20])}{f' and {more} more' if more > 0 else ''}"


# --- masks --------------------------------------------------------------------------------------


class BoolTree:
    """A tree of bools, or a prefix of one, which hashes and compares: a mask of a transform.

    Attributes:
      flags: the bools, in the order of `flatten`; `None` where there is no leaf.
      treedef: the structure, without the Variables of flax.nnx.
    """

    __slots__ = ("flags", "treedef")

    def __init__(self, tree: Tree) -> None:
        flags, self.treedef = flatten(_without_variables(tree))
        self.flags = tuple(None if flag is None else bool(flag) for flag in flags)

    @property
    def tree(self) -> Any:
        """The tree of bools."""
        return self.treedef.unflatten(self.flags)

    def over(self, owner: str, tree: Tree) -> list[bool]:
        """The flag of every leaf of the tree, one that stands above several for each of them."""
        try:
            below = [flatten(x)[0] for x in self.treedef.flatten_up_to(tree)]
        except ValueError:
            raise ValueError(f"{owner}: the mask does not fit: {self._misfit(tree)}") from None
        for i, leaves in enumerate(below):
            if self.flags[i] is None and any(x is not None for x in leaves):
                path = leaf_paths(self.tree)[i]
                raise ValueError(
                    f"{owner}: the mask does not fit: it is None at {path!r}, where there is a "
                    "leaf, expected a bool"
                )
        return [bool(flag) for flag, x in zip(self.flags, below, strict=True) for _ in x]

    def _misfit(self, tree: Tree) -> str:
        """What differs between this and a tree of which it is no prefix."""
        came, wanted = leaf_paths(self.tree), leaf_paths(tree)

        def within(path: str, heads: set[str]) -> bool:
            parts = path.split("/")
            return any("/".join(parts[:i]) in heads for i in range(len(parts) + 1))

        heads = set(came)
        missing = [path for path in wanted if not within(path, heads)]
        surplus = [path for path in came if not any(within(x, {path}) for x in wanted)]
        what = (
            f"it has no bool for the leaf {missing[0]!r}"
            if missing
            else f"it has a bool at {surplus[0]!r}, where there is no leaf"
            if surplus
            else f"its structure is {self.treedef!s:.300}, that of the leaves "
            f"{flatten(tree)[1]!s:.300}"
        )
        said = f"{what}. Expected a tree of bools like the parameters, or one bool for a subtree"
        if callable(self.tree):
            said += " (to have this object called, write lambda tree: mask(tree))"
        return said

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BoolTree):
            return NotImplemented
        return self.flags == other.flags and bool(self.treedef == other.treedef)

    def __hash__(self) -> int:
        return hash((self.flags, self.treedef))

    def __reduce__(self) -> tuple[Any, ...]:
        return BoolTree, (self.tree,)

    def __repr__(self) -> str:
        return repr(self.tree)


# A pattern for `re.search`, a tree of bools, or a function from a tree to one (optax's masks).
Mask = str | BoolTree | Callable[[Any], Any]


def _without_variables(tree: Tree) -> Any:
    """The tree with the value of each Variable of flax.nnx in its place, see `leaf_paths`."""

    def bare(x: Any) -> Any:
        leaves = flatten(x)[0] if not is_leaf(x) and _is_variable(x) else []
        return leaves[0] if len(leaves) == 1 else x

    return jax.tree.map(bare, tree, is_leaf=_is_named)


def _is_bool(x: Any) -> bool:
    return isinstance(x, bool | np.bool_)


def bool_tree(owner: str, tree: Tree) -> BoolTree:
    """A tree of bools as a `BoolTree`; an error that names the first leaf that is no bool."""
    for i, flag in enumerate(flatten(tree)[0]):
        if flag is not None and not _is_bool(flag):
            path = leaf_paths(tree)[i]
            mend = ""
            if isinstance(flag, str):
                mend = ": several patterns are one, as in 'a|b'"
            elif isinstance(flag, RowGradient):
                mend = ": give update the params, about which the function is asked then"
            raise TypeError(
                f"{owner}: {f'at {path!r} ' if path else ''}the mask has {flag!r} of type "
                f"{type(flag).__name__}, expected a bool, True or False, for a whole leaf{mend}"
            )
    made = BoolTree(tree)
    try:
        hash(made)
    except TypeError as error:
        raise TypeError(
            f"{owner}: this tree of bools cannot be hashed ({error}), as a mask must be; give a "
            "function that returns it"
        ) from None
    return made


def resolved_mask(owner: str, mask: Any, params: Tree) -> Any:
    """A checked mask; in place of a function the tree of bools that it returns for `params`."""
    if mask is None or isinstance(mask, str | BoolTree):
        return mask
    return bool_tree(f"{owner}: what the mask function returns", mask(params))


def checked_mask(owner: str, mask: Any) -> Mask:
    """A mask that can be used: a pattern, a tree of bools, or a function from a tree to one.

    A tree of bools may be callable, as an Equinox model is: its leaves tell.
    """
    if isinstance(mask, str | bytes | re.Pattern):
        return checked_pattern(owner, mask)
    if isinstance(mask, BoolTree):
        return mask
    leaves = [x for x in flatten(mask)[0] if x is not None]
    if callable(mask):
        if isinstance(mask, functools.partial) or not any(map(_is_bool, leaves)):
            return mask
        if not all(map(_is_bool, leaves)):
            raise TypeError(
                f"{owner}: the mask is a {type(mask).__name__} that can be called, and some of "
                "its leaves are bools, others not: as a tree it needs bools alone, as a function "
                "write lambda tree: mask(tree)"
            )
    elif mask is None or (len(leaves) == 1 and leaves[0] is mask and not _is_bool(mask)):
        raise TypeError(
            f"{owner}: a path pattern must be a str, got {mask!r} (a mask may also be a tree of "
            "bools, or a function from a tree to one)"
        )
    return bool_tree(owner, mask)


def selected(
    mask: Mask, tree: Tree, owner: str = "mask", *, must_match: bool = False
) -> list[bool]:
    """Whether each leaf of the tree is selected, in the order of `flatten`.

    An error names the owner and the leaf where a tree of bools does not fit, or a pattern which
    matches no leaf (see `expect_matches`, which `must_match` asks for, and `expect_present`).
    """
    if isinstance(mask, str):
        if must_match:
            expect_matches(owner, (mask,), tree)
        paths = leaf_paths(tree)
        found = [re.search(mask, path) is not None for path in paths]
        if not any(found):
            expect_present(owner, (mask,), tree, paths)
        return found
    if not isinstance(mask, BoolTree):
        mask = bool_tree(f"{owner}: what the mask function returns", mask(tree))
    return mask.over(owner, tree)
