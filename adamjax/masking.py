"""Transforms for a part of the leaves: a leaf that is not theirs is `None` to them."""

from collections.abc import Iterable
from typing import Any

from adamjax.data import Tree, static
from adamjax.leaves import matched
from adamjax.paths import (
    Mask,
    checked_mask,
    checked_rules,
    first_match,
    flatten,
    leaf_paths,
    selected,
)
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
      pattern: for `re.search` in the leaf's path, like `"kernel$"`; or a function from a tree to
        a tree of bools, as optax's masks.

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
        self._set(tx=as_transform(self.tx))
        checked_mask("masked", self.pattern)

    def init(self, params: Tree) -> Any:
        return self.tx.init(_keep(params, selected(self.pattern, params)))

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        if params is None:
            leaves, treedef = flatten(updates)
            flags = selected(self.pattern, updates)
        else:
            leaves = matched("masked", "grads", updates, params, "params")
            treedef = flatten(params)[1]
            flags = selected(self.pattern, params)
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
      rules: pairs (pattern, transform); patterns as in `by_path`.
      default: the transform of leaves that no pattern matches. Without it such a leaf is
        refused by `init`, as raw gradients would climb. (`scale(0.0)` keeps leaves still.)

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.partition([("bias", adamjax.scale(-1.0))], default=adamjax.scale(-0.5))
    >>> params = {"bias": jnp.array(0.0), "kernel": jnp.array(0.0)}
    >>> tx.update({"bias": jnp.array(2.0), "kernel": jnp.array(3.0)}, tx.init(params))[0]
    {'bias': Array(-2., dtype=float32), 'kernel': Array(-1.5, dtype=float32)}
    """

    patterns: tuple[str, ...] = static()
    transforms: tuple[Transform, ...]
    default: Transform | None

    def __init__(self, rules: Iterable[tuple[str, Any]], *, default: Any = None) -> None:
        rules = checked_rules("partition", rules)
        self._set(
            patterns=tuple(pattern for pattern, _ in rules),
            transforms=tuple(tx for _, tx in rules),
            default=default,
        )
        self.__post_init__()

    joinable = False

    def __post_init__(self) -> None:
        rules = checked_rules("partition", zip(self.patterns, self.transforms, strict=True))
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
        return tuple(tx.init(self._share(params, i)) for i, tx in enumerate(self.parts))

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        given, (leaves, treedef) = updates, flatten(updates)
        owners, states = self._owners(given), []
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


def settled(tx: Transform, params: Tree) -> Transform:
    return tx
