"""Finds the leaf for a parameter of another system, by its name or by the `order=` of the user."""

import math
import operator
import re
from collections.abc import Collection, Mapping, Reversible, Sequence
from collections.abc import Set as AbstractSet
from typing import Any

import numpy as np

from adamjax.convert.values import leaves_by_path
from adamjax.data import Tree

__all__ = ["Order", "expect_order", "last_word", "leaf_order"]

# A user's order: the paths in the order of the parameters, or by the names of the parameters.
Order = Sequence[str | None] | Mapping[str, str | None] | None

# By the last word of a parameter's name: the synonym that replaces it before names are compared.
_SYNONYMS = {
    **dict.fromkeys(("kernel", "embedding", "embeddings", "scale", "gamma"), "weight"),
    "beta": "bias",
}


def _words(name: str) -> tuple[str, ...]:
    return tuple(re.findall(r"[^\W_]+", name.lower()))


def last_word(name: str) -> str:
    """The last word of a name: `kernel` for `layers/0/kernel` and `dense_kernel`; empty if none."""
    return next(iter(_words(name)[-1:]), "")


def _with_synonym(words: tuple[str, ...]) -> tuple[str, ...]:
    return (*words[:-1], _SYNONYMS.get(words[-1], words[-1])) if words else words


def _ends_alike(a: tuple[str, ...], b: tuple[str, ...]) -> bool:
    """Whether names are equal, or one ends in all words of the other, which are not all numbers."""
    n = min(len(a), len(b))
    end = a[len(a) - n :]
    return a == b or (end == b[len(b) - n :] and not all(word.isdecimal() for word in end))


def _paths_of_names(names: Sequence[str], paths: Sequence[str]) -> list[str] | None:
    """The path that each name corresponds to; `None` if they do not correspond one to one.

    A name and a path correspond if they have the same words: `layers.0.weight` and
    `layers/0/weight`. If that does not match all names, one of the two may have more words in
    front, such as `model`. If that fails too, both are tried with synonyms, so that `kernel` is
    `weight`.
    """
    words_of = {x: _words(x) for x in (*names, *paths)}
    for words in (words_of, {x: _with_synonym(own) for x, own in words_of.items()}):
        by_last_word: dict[tuple[str, ...], list[str]] = {}
        for path in paths:
            by_last_word.setdefault(words[path][-1:], []).append(path)
        for correspond in (operator.eq, _ends_alike):
            chosen = []
            for name in names:
                candidates = by_last_word.get(words[name][-1:], [])
                matches = [path for path in candidates if correspond(words[name], words[path])]
                chosen += matches if len(matches) == 1 else []
            if len(chosen) == len(names) == len(set(chosen)):
                return chosen
    return None


def expect_order(owner: str, order: Any) -> None:
    """Refuses an order that is no list or mapping (such as a set) or has entries of other types."""
    is_unordered = isinstance(order, AbstractSet) and not isinstance(order, Reversible)
    if order is not None and (
        not isinstance(order, Collection) or isinstance(order, str | bytes) or is_unordered
    ):
        raise TypeError(
            f"{owner}: order is {order!r:.100} of type {type(order).__name__}, expected a list of "
            f"paths{', because a set has no order' * is_unordered}"
        )
    paths = order.values() if isinstance(order, Mapping) else () if order is None else order
    wrong = [x for x in paths if not isinstance(x, str | None)]
    if wrong:
        raise TypeError(
            f"{owner}: order has an entry of type {type(wrong[0]).__name__}, expected paths of "
            "your leaves, or None for a parameter that has no leaf. If your leaves have the paths "
            "of Keras' variables, give [v.path for v in model.trainable_variables]"
        )


def leaf_order(
    owner: str,
    order: Order,
    params: Tree,
    system: str = "",
    names: Sequence[str] | None = None,
    check: bool = True,
    shapes: Sequence[tuple[int, ...]] | None = None,
    may_reshape: bool = False,
    has_arrays: bool = True,
    order_fault: str = "",
) -> list[str | None]:
    """The paths of the leaves in the order of another system's parameters.

    Args:
      order: the order that the user gives, if any.
      system, names: the name of the system and, if it has any, those of its parameters in order.
      check: whether to refuse an order that contradicts the names.
      shapes: the shapes of the system's parameters in order, if they are known.
      may_reshape: whether a user's function may change the shape of an array in any way.
      has_arrays: whether the system has an array of each parameter, whose shape is compared later.
      order_fault: why the order of `names` may differ from that of the parameters; empty if not.

    Raises:
      TypeError: `order` is no list, and no mapping from names.
      ValueError: nothing gives the order, or `order` contradicts the names.
    """
    expect_order(owner, order)
    leaves = leaves_by_path(owner, params)
    if _are_numbers(list(leaves)):
        # In a dictionary with numbers as keys, "10" comes before "2".
        leaves = {path: leaves[path] for path in sorted(leaves, key=_numbers_of_path)}
    all_paths = list(leaves)

    def expect_reliable_order(paths: Sequence[str]) -> None:
        """Refuses to match leaves and names by their places if leaves could be swapped unnoticed.

        They could be if the names may be in a wrong order and several leaves have one shape.
        """
        # `shapes` has the shapes of parameters that the order leaves out too.
        all_shapes = [np.shape(leaves[path]) for path in paths] if shapes is None else shapes
        kinds = [_kind_of_shape(shape, may_reshape) for shape in all_shapes]
        alike = [
            path
            for path in paths
            if kinds.count(_kind_of_shape(np.shape(leaves[path]), may_reshape)) > 1
        ]
        if check and names is not None and order_fault and alike:
            raise ValueError(
                f"{owner}: {order_fault}. The names, {_some(names)}, do not correspond to the "
                f"leaves {_some(paths)} one to one, and parameters of one shape, {_some(alike)}, "
                "would be taken in that order: give order={name: path}, a path (or None) for each "
                "name"
            )

    if order is None:
        if names is None and check:
            alike = _of_one_shape(leaves, may_reshape)
            _expect_shapes_tell_leaves_apart(owner, system, leaves, alike, has_arrays)
        if names is None or len(names) != len(all_paths):
            return list(all_paths)
        paths_of_names = _paths_of_names(names, all_paths)
        if paths_of_names is not None:
            return list(paths_of_names)
        if _are_numbers(all_paths):
            expect_reliable_order(all_paths)
            return list(all_paths)
        alike = _of_one_shape(leaves, may_reshape)
        return list(
            _order_of_shapes(owner, system, names, leaves, check, shapes, has_arrays, alike)
        )
    by_name = isinstance(order, Mapping)
    order = _listed_order(owner, order, system, names)
    for path in order:
        if path is not None and path not in all_paths:
            raise ValueError(
                f"{owner}: order names the leaf {path!r}, but params has no float leaf there: "
                f"expected some of {all_paths}, or None for a parameter that is not to be converted"
            )
    given = [path for path in order if path is not None]
    if len(set(given)) != len(given):
        twice = next(path for path in given if given.count(path) > 1)
        raise ValueError(f"{owner}: order names the leaf {twice!r} more than once")
    if check and names is not None and len(names) == len(order):
        used_names = [name for name, path in zip(names, order, strict=True) if path is not None]
        expected = _paths_of_names(used_names, given)
        if expected is None and not by_name:
            expect_reliable_order(given)
        for name, path, named_path in zip(used_names, given, expected or given, strict=True):
            if path != named_path:
                raise ValueError(
                    f"{owner}: order has {path!r} in the place of {system}'s {name!r}, which is "
                    f"the name of another leaf, {named_path!r}: put order in the order of "
                    f"{list(names[:8])}, or pass check=False to use it as it is"
                )
    return list(order)


def _listed_order(
    owner: str, order: Any, system: str, names: Sequence[str] | None
) -> list[str | None]:
    """The user's order as a list; a mapping is sorted by the names of the system's parameters."""
    if isinstance(order, Mapping):
        fault = f"{owner}: order is {order!r:.100} of type {type(order).__name__}, expected"
        if names is None:
            raise TypeError(
                f"{fault} a list of paths, because the parameters of {system} have no names here"
            )
        if not all(isinstance(name, str) for name in order):
            raise TypeError(f"{fault} a list of paths, or a dictionary from names to paths")
        # The keys of the mapping may be shorter than the names, or have synonyms of their words.
        keys = list(names) if set(names) == set(order) else _paths_of_names(names, list(order))
        if keys is None or len(keys) != len(order):
            raise ValueError(
                f"{owner}: order has the names {_some(list(order))}, which do not correspond to "
                f"{system}'s names {_some(names)} one to one: give a path (or None) for each of "
                "these"
            )
        return [order[key] for key in keys]
    return list(order)


def _order_of_shapes(
    owner: str,
    system: str,
    names: Sequence[str],
    leaves: Mapping[str, Any],
    check: bool,
    shapes: Sequence[tuple[int, ...]] | None,
    has_arrays: bool,
    alike: list[str],
) -> list[str]:
    """The paths of the leaves in the order of `names`, which match no paths: found by shapes."""
    all_paths = list(leaves)
    if not check:
        return all_paths
    if shapes is not None:
        path_of_shape = {np.shape(x): path for path, x in leaves.items()}
        if not alike and set(path_of_shape) == set(shapes):
            return [path_of_shape[shape] for shape in shapes]
    elif has_arrays and not alike:
        # In a wrong order a shape would not fit, and filling the state would refuse it.
        return all_paths
    raise ValueError(
        f"{owner}: {system} names its parameters {_some(names)}, which do not correspond to the "
        f"leaves {_some(all_paths)} one to one, and their shapes do not show which is which: give "
        "order={name: path}, the path of the leaf for each of these names, or a list of the paths "
        "in the order of the names"
    )


def _are_numbers(paths: Sequence[str]) -> bool:
    """Whether the leaves have only numbers for names, as the items of a list."""
    return all(word.isdecimal() for path in paths for word in path.split("/"))


def _numbers_of_path(path: str) -> tuple[int, ...]:
    """The numbers in a path of numbers."""
    return tuple(map(int, path.split("/")))


def _kind_of_shape(shape: tuple[int, ...], may_reshape: bool) -> tuple[int, ...]:
    """A key that is equal for all shapes that one array may have in two systems."""
    return (math.prod(shape),) if may_reshape else tuple(sorted(shape))


def _of_one_shape(leaves: Mapping[str, Any], may_reshape: bool) -> list[str]:
    """The first leaves whose shapes may be equal in the other system; empty if none may be."""
    by_kind: dict[tuple[int, ...], list[str]] = {}
    for path, x in leaves.items():
        by_kind.setdefault(_kind_of_shape(np.shape(x), may_reshape), []).append(path)
    return next((paths for paths in by_kind.values() if len(paths) > 1), [])


def _expect_shapes_tell_leaves_apart(
    owner: str, system: str, leaves: Mapping[str, Any], alike: list[str], has_arrays: bool
) -> None:
    """Refuses named leaves for parameters without names, unless shapes show which is which."""
    shapes = {np.shape(leaves[path]) for path in alike}
    same = "shape, but for the order of dimensions" if len(shapes) > 1 else "shape"
    same = "size" if len({tuple(sorted(shape)) for shape in shapes}) > 1 else same
    fault = f"the leaves {_some(alike)} have one {same}"
    if not has_arrays and len(leaves) > 1:
        alike, fault = list(leaves), "no arrays before its first step"
    if alike and not _are_numbers(list(leaves)):
        raise ValueError(
            f"{owner}: the parameters of {system} have no names here, and "
            f"{fault}, so nothing shows which is which: give "
            f"order=, the path of the leaf for each parameter of {system}, in their order. (The "
            f"leaves of params are in the order {_some(list(leaves))}.)"
        )


def _some(names: Sequence[Any]) -> str:
    return f"{list(names[:8])}{'...' if len(names) > 8 else ''}"
