"""Paths of leaves, patterns that match paths, and masks that select leaves."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from adamjax.data import Tree
from adamjax.encoding import Scaled8
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
    "mask_flags",
    "optional",
    "paired",
    "resolved_mask",
    "unique_paths",
]


def is_leaf(x: Any) -> bool:
    """Whether a node counts as one leaf: `None`, rows of a table, or an encoded slot.

    `None` takes the place of a leaf that a tree does not have.
    """
    return x is None or isinstance(x, RowGradient | RowMoves | Scaled8)


def flatten(tree: Tree) -> tuple[list[Any], Any]:
    """Leaves and structure of a tree; `None`, a row gradient or a `Scaled8` is one leaf."""
    return jax.tree.flatten(tree, is_leaf=is_leaf)


def leaf_paths(tree: Tree) -> list[str]:
    """The path of every leaf (`None` is one), keys joined by slashes: `"layers/0/kernel"`."""
    nodes, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_leaf_or_variable)
    paths: list[str] = []
    for path, x in nodes:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        # nnx.Optimizer passes Variables to `init` and bare values to `update`. So all leaves in a
        # Variable, usually one, get the path that its bare value has.
        paths.extend(len(flatten(x)[0]) * [name] if _is_variable(x) else [name])
    return paths


def unique_paths(owner: str, tree: Tree) -> list[str]:
    """`leaf_paths`, or an error if two leaves have the same path."""
    paths = leaf_paths(tree)
    seen: set[str] = set()
    for path in paths:
        if path in seen:
            raise ValueError(
                f"{owner}: two leaves have the path {path!r}, as in {{'a/b': x, 'a': {{'b': y}}}}, "
                "but a path must name one leaf: rename a key so that all paths differ"
            )
        seen.add(path)
    return paths


def _is_variable(x: Any) -> bool:
    """Whether a node is a Variable of flax.nnx, and not itself a leaf."""
    has_methods = hasattr(type(x), "get_metadata") and hasattr(type(x), "get_value")
    return has_methods and not is_leaf(x)


def _is_leaf_or_variable(x: Any) -> bool:
    return is_leaf(x) or _is_variable(x)


class optional(str):
    """A path pattern that may match no leaf; a plain pattern that matches none is refused.

    A plain pattern with an exclusion, like `"^(?!.*bias)"`, is also refused if it excludes no leaf.

    Use it wherever a pattern is accepted: in `by_path`, `partition`, `masked`, `mask=`, `tables`,
    `max_rows`. It does not equal the plain string, because it means something else.

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
    """The pattern, or an error that names the owner if it is not a regular expression."""
    if not isinstance(pattern, str):
        advice = ""
        if isinstance(pattern, re.Pattern):
            advice = f": write its text, {pattern.pattern!r}, with flags as in '(?i)bias'"
        elif isinstance(pattern, bytes):
            advice = f": write {pattern.decode(errors='replace')!r}"
        raise TypeError(f"{owner}: a path pattern must be a str, got {pattern!r}{advice}")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(
            f"{owner}: {pattern!r} is not a regular expression ({error}); a path is written "
            "like 'layers/0/kernel' and matched with re.search"
        ) from None
    # Strings of NumPy and of enumerations print, compare and serialize differently: make them
    # plain.
    return pattern if type(pattern) in (str, optional) else str.__str__(pattern)


def checked_patterns(owner: str, patterns: Any) -> tuple[str, ...]:
    """The checked patterns, from one pattern or several."""
    if isinstance(patterns, str | bytes | re.Pattern):
        patterns = (patterns,)
    if isinstance(patterns, Mapping) or not isinstance(patterns, Iterable):
        raise TypeError(f"{owner}: expected a path pattern or a list of them, got {patterns!r}")
    checked = tuple(checked_pattern(owner, pattern) for pattern in patterns)
    if not checked:
        raise ValueError(f"{owner}: expected a path pattern or a list of them, got an empty list")
    return checked


def checked_rules(owner: str, rules: Any) -> list[tuple[str, Any]]:
    """Checked pairs (pattern, value), from such pairs or from a dictionary {pattern: value}."""
    expected = f"{owner}: expected pairs (pattern, value) or a dictionary {{pattern: value}}"
    if isinstance(rules, str | bytes):
        raise TypeError(f"{expected}, got the string {rules!r}")
    # The first match decides, so the order matters, and a set has none.
    if isinstance(rules, set | frozenset) or not isinstance(rules, Iterable):
        raise TypeError(f"{expected}, got {rules!r}")
    pairs: list[tuple[str, Any]] = []
    for pair in rules.items() if isinstance(rules, Mapping) else rules:
        if isinstance(pair, str | bytes):
            raise ValueError(f"{expected}, got the string {pair!r} in the place of a pair")
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise ValueError(f"{expected}, got {pair!r} in the place of a pair")
        pairs.append((checked_pattern(owner, pair[0]), pair[1]))
    return pairs


def paired(owner: str, patterns: Any, values: Any) -> list[tuple[Any, Any]]:
    """Pairs (pattern, value), from a list of patterns and a list of as many values."""
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
    """The index of the first pattern that matches the path."""
    return next((i for i, pattern in enumerate(patterns) if re.search(pattern, path)), None)


def expect_matches(
    owner: str, patterns: Sequence[str], tree: Tree, *, first_decides: bool = False
) -> None:
    """Refuses patterns that match no leaf's path in the tree, unless they are `optional`.

    Leaves that are `None` do not count, such as the leaves of other parts in `masked` and
    `partition`. All others count, integers too. A tree without any element is not checked.

    Args:
      first_decides: whether only the first pattern that matches a leaf has an effect on it. Then a
        pattern is also refused if earlier patterns match all of its leaves. But a catch-all
        pattern, which matches every leaf, is allowed, unless it repeats an earlier pattern.
    """
    if all(isinstance(pattern, optional) for pattern in patterns):
        return
    paths: list[str] = []
    absent: list[str] = []
    leaves = flatten(tree)[0]
    for path, leaf in zip(leaf_paths(tree), leaves, strict=True):
        (absent if leaf is None else paths).append(path)
    if not _has_elements(leaves):
        return
    expect_paths(owner, patterns, paths, absent=absent)
    if first_decides:
        _expect_effects(owner, patterns, paths)


def _has_elements(leaves: Iterable[Any]) -> bool:
    return any(0 not in np.shape(x) for x in leaves if x is not None)


def _expect_effects(owner: str, patterns: Sequence[str], paths: Sequence[str]) -> None:
    """Refuses patterns that match only leaves which earlier patterns match too."""
    deciding = {path: first_match(patterns, path) for path in paths}
    for i, pattern in enumerate(patterns):
        if isinstance(pattern, optional):
            continue
        matches = [path for path in paths if re.search(pattern, path)]
        # A catch-all is for the leaves that no earlier pattern matches. There may be none.
        is_catch_all = len(matches) == len(paths) and str(pattern) not in map(str, patterns[:i])
        if is_catch_all or any(deciding[path] == i for path in matches):
            continue
        earlier = next(p for p in patterns if any(re.search(p, path) for path in matches))
        raise ValueError(
            f"{owner}: the pattern {pattern!r} has no effect: {_listed(matches)} match an "
            f"earlier pattern, such as {earlier!r}, and the first match decides. Put it first. "
            f"If this is intended, write adamjax.optional({str(pattern)!r})"
        )


def expect_present(owner: str, patterns: Iterable[str], tree: Tree, paths: Sequence[str]) -> None:
    """Refuses patterns that match no path of a tree that `update` is called with.

    `init` has checked them by `expect_matches`. But if the state is from a checkpoint, the `init`
    that made it may have seen other parameters. Here a leaf that is `None` counts, because its
    gradient may be `None` in this step only.
    """
    unmatched = [p for p in patterns if not any(re.search(p, path) for path in paths)]
    if unmatched and _has_elements(flatten(tree)[0]):
        expect_paths(owner, unmatched, paths)


# The opening of a negative lookaround, and of the positive lookaround with the opposite meaning.
_OPPOSITES = {"(?!": "(?=", "(?<!": "(?<="}


def _idle_exclusion(pattern: str, paths: Sequence[str]) -> str:
    """The text of a pattern from its first negative lookaround that excludes none of the paths.

    It is empty if there is no such lookaround.
    """
    for negative in re.finditer(r"(?<!\\)\(\?<?!", pattern):
        start, end = negative.span()
        opposite = pattern[:start] + _OPPOSITES[negative[0]] + pattern[end:]
        if not any(re.search(opposite, path) for path in paths):
            return pattern[start:]
    return ""


def expect_paths(
    owner: str,
    patterns: Iterable[str],
    paths: Sequence[str],
    *,
    what: str = "leaf",
    absent: Sequence[str] = (),
) -> None:
    """Refuses patterns that match none of the paths, unless they are `optional`.

    A pattern with an exclusion, such as `"^(?!.*bias)"`, is also refused if it excludes no path.

    Args:
      what: a word for the objects that have these paths, for errors.
      absent: the paths of leaves that are `None`.
    """
    for pattern in patterns:
        if isinstance(pattern, optional):
            continue
        if any(re.search(pattern, path) for path in paths):
            idle = _idle_exclusion(pattern, [*paths, *absent])
            if idle:
                advice = f"If it may exclude none, write adamjax.optional({str(pattern)!r})"
                if all(path.isdecimal() for path in paths):  # as in a list of parameters
                    advice = "These are not names: pass a mask as a list of bools"
                raise ValueError(
                    f"{owner}: {idle!r} in the pattern {pattern!r} excludes no {what}; the "
                    f"paths are {_listed(paths)}. {advice}"
                )
            continue
        note = ""
        if any(re.search(pattern, path) for path in absent):
            note = ", only None (a part sees None in place of the leaves of other parts)"
        raise ValueError(
            f"{owner}: the pattern {pattern!r} matches no {what}{note}; the paths are "
            f"{_listed(paths)}. If it may match none, write adamjax.optional({str(pattern)!r})"
        )


def _listed(paths: Sequence[str]) -> str:
    more = len(paths) - 20
    return f"{list(paths[:20])}{f' and {more} more' if more > 0 else ''}"


# --- masks --------------------------------------------------------------------------------------


class BoolTree:
    """A mask of a transform: a tree of bools, or a prefix of one, that can be hashed and compared.

    Attributes:
      flags: the bools in the order of `flatten`, `None` where the tree has `None`.
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

    def flags_for(self, owner: str, tree: Tree) -> list[bool]:
        """The flag of every leaf of the tree; a flag at a subtree counts for all of its leaves."""
        try:
            leaves_below = [flatten(x)[0] for x in self.treedef.flatten_up_to(tree)]
        except ValueError:
            raise ValueError(f"{owner}: the mask does not fit: {self._misfit(tree)}") from None
        for i, leaves in enumerate(leaves_below):
            if self.flags[i] is None and any(x is not None for x in leaves):
                path = leaf_paths(self.tree)[i]
                raise ValueError(
                    f"{owner}: the mask does not fit: it is None at {path!r}, where there is a "
                    "leaf, expected a bool"
                )
        pairs = zip(self.flags, leaves_below, strict=True)
        return [bool(flag) for flag, leaves in pairs for _ in leaves]

    def _misfit(self, tree: Tree) -> str:
        """Why this mask is no prefix of the tree, for an error."""
        mask_paths, paths = leaf_paths(self.tree), leaf_paths(tree)

        def is_at_or_below(path: str, tops: set[str]) -> bool:
            parts = path.split("/")
            return any("/".join(parts[:i]) in tops for i in range(len(parts) + 1))

        missing = [path for path in paths if not is_at_or_below(path, set(mask_paths))]
        surplus = [top for top in mask_paths if not any(is_at_or_below(x, {top}) for x in paths)]
        if missing:
            difference = f"it has no bool for the leaf {missing[0]!r}"
        elif surplus:
            difference = f"it has a bool at {surplus[0]!r}, where there is no leaf"
        else:
            difference = (
                f"its structure is {self.treedef!s:.300}, the leaves' structure is "
                f"{flatten(tree)[1]!s:.300}"
            )
        expected = "Expected a tree of bools like the parameters, or one bool for a subtree"
        if callable(self.tree):
            expected += " (to have this object called, write lambda tree: mask(tree))"
        return f"{difference}. {expected}"

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


# Patterns for `re.search`, a tree of bools, or a function that returns one (as in optax).
Mask = str | Sequence[str] | BoolTree | Callable[[Any], Any]


def _without_variables(tree: Tree) -> Any:
    """The tree with the bare value in place of each Variable of flax.nnx; see `leaf_paths`."""

    def bare(x: Any) -> Any:
        leaves = flatten(x)[0] if _is_variable(x) else []
        return leaves[0] if len(leaves) == 1 else x

    return jax.tree.map(bare, tree, is_leaf=_is_leaf_or_variable)


def _is_bool(x: Any) -> bool:
    return isinstance(x, bool | np.bool_)


def bool_tree(owner: str, tree: Tree) -> BoolTree:
    """A tree of bools as a `BoolTree`, or an error that names the first leaf that is not a bool."""
    for i, flag in enumerate(flatten(tree)[0]):
        if flag is not None and not _is_bool(flag):
            path = leaf_paths(tree)[i]
            advice = ""
            if isinstance(flag, str):
                advice = ": for several patterns, give a list of the leaves to select, ['a', 'b']"
            elif isinstance(flag, RowGradient):
                advice = ": pass params to update, so that the function is called with them"
            raise TypeError(
                f"{owner}: {f'at {path!r} ' if path else ''}the mask has {flag!r} of type "
                f"{type(flag).__name__}, expected a bool, True or False, for a whole leaf{advice}"
            )
    mask = BoolTree(tree)
    try:
        hash(mask)
    except TypeError as error:
        raise TypeError(
            f"{owner}: a mask must be hashable, and this tree of bools is not ({error}); give a "
            "function that returns it"
        ) from None
    return mask


def _mask_of_function(owner: str, function: Callable[[Any], Any], tree: Tree) -> BoolTree:
    """The mask that a function returns for a tree.

    One bool for a tree of several leaves is refused: such a function is nearly always meant to be
    called with a path, like `lambda path: "bias" not in path`. Called with a dictionary, this
    function looks for the key "bias".
    """
    mask = function(tree)
    if _is_bool(mask) and len(flatten(tree)[0]) > 1:
        raise TypeError(
            f"{owner}: the mask function returned {mask} for the whole tree of parameters, "
            "expected a tree of bools: it is called with the tree, not with the path of each leaf. "
            "To choose leaves by their paths, write a pattern, such as mask='kernel$'; for all "
            "leaves, mask=True"
        )
    return bool_tree(f"{owner}: the result of the mask function", mask)


def resolved_mask(owner: str, mask: Any, params: Tree) -> Any:
    """A checked mask, where a function is replaced by the tree of bools that it returns."""
    return _mask_of_function(owner, mask, params) if callable(mask) else mask


def checked_mask(owner: str, mask: Any) -> Mask:
    """The checked mask: patterns, a tree of bools, or a function that returns such a tree.

    A tree of bools may be callable, as an Equinox model is: then its leaves decide.
    """
    if isinstance(mask, str | bytes | re.Pattern):
        return checked_pattern(owner, mask)
    if isinstance(mask, list | tuple) and mask and all(isinstance(x, str) for x in mask):
        return checked_patterns(owner, mask)
    if isinstance(mask, BoolTree):
        return mask
    leaves = [x for x in flatten(mask)[0] if x is not None]
    is_one_leaf = len(leaves) == 1 and leaves[0] is mask
    if callable(mask):
        # The leaves of a jax.tree_util.Partial are its arguments: it is a function all the same.
        if isinstance(mask, functools.partial) or not any(map(_is_bool, leaves)):
            return mask
        if not all(map(_is_bool, leaves)):
            raise TypeError(
                f"{owner}: the mask is a {type(mask).__name__} that can be called, and some of "
                "its leaves are bools, others not: a tree must have bools only; for a function "
                "write lambda tree: mask(tree)"
            )
    elif mask is None or (is_one_leaf and not _is_bool(mask)):
        raise TypeError(
            f"{owner}: a path pattern must be a str, got {mask!r} (a mask may also be a tree of "
            "bools, or a function that returns one)"
        )
    return bool_tree(owner, mask)


def mask_flags(
    mask: Mask, tree: Tree, owner: str = "mask", *, must_match: bool = False
) -> list[bool]:
    """Whether each leaf of the tree is selected, in the order of `flatten`.

    An error names the owner and the leaf if a tree of bools does not fit. A pattern that matches no
    leaf is refused by `expect_matches` with `must_match`, else by `expect_present`.
    """
    if isinstance(mask, BoolTree):
        return mask.flags_for(owner, tree)
    if callable(mask):
        return _mask_of_function(owner, mask, tree).flags_for(owner, tree)
    patterns = (mask,) if isinstance(mask, str) else tuple(mask)
    if must_match:
        expect_matches(owner, patterns, tree)
    paths = leaf_paths(tree)
    expect_present(owner, patterns, tree, paths)
    return [first_match(patterns, path) is not None for path in paths]
