"""Transforms for a part of the leaves: a leaf that is not theirs is `None` to them."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

from adamjax.data import Tree, static
from adamjax.leaves import matched
from adamjax.paths import (
    Mask,
    bool_tree,
    checked_mask,
    checked_rules,
    expect_matches,
    expect_present,
    first_match,
    flatten,
    is_mask_function,
    leaf_paths,
    paired,
    selected,
)
from adamjax.scaling import add_decayed_weights
from adamjax.transform import Step, Transform, as_transform, several_states

__all__ = ["masked", "partition", "settled"]


def _keep(tree: Tree, flags: list[bool]) -> Tree:
    """The tree with `None` for each leaf that is not flagged."""
    leaves, treedef = flatten(tree)
    return treedef.unflatten([x if f else None for x, f in zip(leaves, flags, strict=True)])


class masked(Transform):
    """Applies a transform to the leaves that a mask selects; the others pass unchanged.

    The state is the inner transform's, with `None` for leaves that are not selected.

    Args:
      tx: a transform.
      pattern: for `re.search` in the leaf's path, like `"kernel$"`; or a tree of bools like the
        parameters, or with one bool for a subtree; or a function from a tree to such a one.

    Raises:
      ValueError: by `init` and `update`, the pattern matches no leaf (`adamjax.optional(pattern)`
        allows it), or the tree of bools does not fit; the message names the leaf.
      TypeError: something in the tree is no bool.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.masked(adamjax.scale(0.0), "^frozen/")
    >>> grads = {"frozen": {"w": jnp.array(1.0)}, "head": {"w": jnp.array(1.0)}}
    >>> tx.update(grads, tx.init(grads))[0]["frozen"]
    {'w': Array(0., dtype=float32)}
    """

    tx: Transform
    pattern: Mask = static()

    joinable = False

    def __post_init__(self) -> None:
        self._set(tx=as_transform(self.tx), pattern=checked_mask("masked", self.pattern))

    def _flags(self, tree: Tree) -> list[bool]:
        return selected(self.pattern, tree, "masked")

    def init(self, params: Tree) -> Any:
        flags = selected(self.pattern, params, "masked", must_match=True)
        return self.tx.init(_keep(params, flags))

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        if params is None:
            leaves, treedef = flatten(updates)
            flags = self._flags(updates)
        else:
            leaves = matched("masked", "grads", updates, params, "params")
            treedef = flatten(params)[1]
            flags = self._flags(params)
            params = _keep(params, flags)
        seen = treedef.unflatten([g if f else None for g, f in zip(leaves, flags, strict=True)])
        inner, state = self.tx.update(seen, state, params, **extra_args)
        moved = flatten(inner)[0]
        chosen = [u if f else g for u, g, f in zip(moved, leaves, flags, strict=True)]
        return treedef.unflatten(chosen), state

    @property
    def parts(self) -> tuple[Transform, ...]:
        return (self.tx,)

    def part_states(self, state: Any) -> tuple[Any, ...]:
        return (state,)


class partition(Transform):
    """A transform for each leaf: that of the first pattern which is found in the leaf's path.

    Each part sees its own leaves only: a clip by global norm within a part is over that part.
    The state is the tuple of the parts' states, the default's last.

    Args:
      rules: pairs (pattern, transform) or a dictionary {pattern: transform}; patterns as in
        `by_path`.
      default: the transform of leaves that no pattern matches. Without it such a leaf is
        refused by `init`, as raw gradients would climb. (`scale(0.0)` keeps leaves still.)

    Raises:
      ValueError: by `init` and `update`, a pattern matches no leaf; by `init`, none that earlier
        ones leave (`adamjax.optional(pattern)` allows both). For `init` a pattern within a part
        must match one of the part's own leaves.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.partition([("bias", adamjax.scale(-1.0))], default=adamjax.scale(-0.5))
    >>> params = {"bias": jnp.array(0.0), "kernel": jnp.array(0.0)}
    >>> tx.update({"bias": jnp.array(2.0), "kernel": jnp.array(3.0)}, tx.init(params))[0]
    {'bias': Array(-2., dtype=float32), 'kernel': Array(-1.5, dtype=float32)}
    """

    patterns: tuple[str, ...] = static()
    transforms: tuple[Transform, ...]
    default: Transform | None

    def __init__(
        self, rules: Iterable[tuple[str, Any]] | Mapping[str, Any], *, default: Any = None
    ) -> None:
        rules = checked_rules("partition", rules)
        self._set(
            patterns=tuple(pattern for pattern, _ in rules),
            transforms=tuple(tx for _, tx in rules),
            default=default,
        )
        self.__post_init__()

    joinable = False

    def __post_init__(self) -> None:
        rules = checked_rules("partition", paired("partition", self.patterns, self.transforms))
        self._set(
            patterns=tuple(pattern for pattern, _ in rules),
            transforms=tuple(as_transform(tx) for _, tx in rules),
            default=None if self.default is None else as_transform(self.default),
        )

    @property
    def parts(self) -> tuple[Transform, ...]:
        return self.transforms + (() if self.default is None else (self.default,))

    def part_states(self, state: Any) -> tuple[Any, ...]:
        return several_states(self, state)

    def _owners(self, tree: Tree) -> list[int]:
        """The index of each leaf's part; a leaf that is not here belongs to none."""
        owners = []
        for path, leaf in zip(leaf_paths(tree), flatten(tree)[0], strict=True):
            if leaf is None:
                owners.append(-1)
                continue
            index = first_match(self.patterns, path)
            if index is None and self.default is None:
                raise ValueError(
                    f"partition: no pattern of {list(self.patterns)} is found in the path "
                    f"{path!r}; add one, or give a default transform"
                )
            owners.append(len(self.transforms) if index is None else index)
        return owners

    def _share(self, tree: Tree, index: int) -> Tree:
        return _keep(tree, [owner == index for owner in self._owners(tree)])

    def init(self, params: Tree) -> tuple[Any, ...]:
        expect_matches("partition", self.patterns, params, first_decides=True)
        return tuple(tx.init(self._share(params, i)) for i, tx in enumerate(self.parts))

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        given, (leaves, treedef) = updates, flatten(updates)
        owners, states = self._owners(given), []
        if any(i not in owners for i in range(len(self.patterns))):
            if params is not None:
                matched("partition", "grads", given, params, "params")
            expect_present("partition", self.patterns, given, leaf_paths(given))
        for i, (tx, part) in enumerate(zip(self.parts, self.part_states(state), strict=True)):
            seen = None if params is None else self._share(params, i)
            moved, part = tx.update(self._share(given, i), part, seen, **extra_args)
            states.append(part)
            moves = zip(leaves, flatten(moved)[0], owners, strict=True)
            leaves = [u if owner == i else kept for kept, u, owner in moves]
        return treedef.unflatten(leaves), tuple(states)

    def __repr__(self) -> str:
        rules = list(zip(self.patterns, self.transforms, strict=True))
        return f"partition({rules!r}, default={self.default!r})"


# --- masks that are settled ---------------------------------------------------------------------

# Where a transform has a mask.
_MASKS: tuple[tuple[type[Transform], str], ...] = (
    (masked, "pattern"),
    (add_decayed_weights, "mask"),
)


def settled(tx: Transform, params: Tree) -> Transform:
    """The transform with trees of bools in the place of mask functions, at any depth.

    A mask that is a function of shapes decides otherwise where a table's rows stand in the
    table's place: so it is asked here, about the parameters as they are. Each function is asked
    about the leaves that its part sees. Where there are none, it is the same object.
    """
    if not _has_mask_functions(tx):
        return tx
    changes: dict[str, Any] = {}
    for name, mask in _mask_functions(tx):
        owner = type(tx).__name__
        changes[name] = bool_tree(f"{owner}: what the mask function returns", mask(params))
    for field in dataclasses.fields(tx):
        value = getattr(tx, field.name)
        if _has_mask_functions(value):
            changes[field.name] = _settled_within(tx, field.name, value, params)
    made = object.__new__(type(tx))
    made._set(**{**tx.__dict__, **changes})
    return made


def _mask_functions(tx: Transform) -> list[tuple[str, Any]]:
    """The masks of this transform itself that are functions, by field."""
    fields = [(name, getattr(tx, name)) for kind, name in _MASKS if isinstance(tx, kind)]
    return [(name, mask) for name, mask in fields if is_mask_function(mask)]


def _has_mask_functions(value: Any) -> bool:
    """Whether there is a mask that is a function in what a field holds, at any depth."""
    if isinstance(value, Transform):
        return bool(_mask_functions(value)) or any(
            _has_mask_functions(getattr(value, field.name)) for field in dataclasses.fields(value)
        )
    if isinstance(value, list | tuple):
        return any(map(_has_mask_functions, value))
    return isinstance(value, dict) and any(map(_has_mask_functions, value.values()))


def _settled_within(tx: Transform, name: str, value: Any, params: Tree) -> Any:
    """What a field of a transform holds, its transforms settled for the leaves that they see."""
    if isinstance(tx, masked):
        return settled(value, _keep(params, tx._flags(params)))
    if isinstance(tx, partition):
        if name == "default":
            return settled(value, tx._share(params, len(tx.transforms)))
        return tuple(settled(part, tx._share(params, i)) for i, part in enumerate(value))
    return _each_settled(value, params)


def _each_settled(value: Any, params: Tree) -> Any:
    if isinstance(value, Transform):
        return settled(value, params)
    if isinstance(value, list | tuple) and _has_mask_functions(value):
        items = [_each_settled(x, params) for x in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, dict):
        return {key: _each_settled(x, params) for key, x in value.items()}
    return value
