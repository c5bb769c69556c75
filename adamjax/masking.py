"""Transforms that give their parts only some of the leaves, and `None` in place of the others."""

from collections.abc import Iterable, Mapping
from typing import Any, Self

from adamjax.data import Tree, static
from adamjax.leaves import match_leaves
from adamjax.paths import (
    Mask,
    checked_mask,
    checked_rules,
    expect_matches,
    expect_present,
    first_match,
    flatten,
    leaf_paths,
    mask_flags,
    paired,
    resolved_mask,
)
from adamjax.transform import Step, Transform, as_transform, states_of_parts

__all__ = ["masked", "partition"]


def _select(tree: Tree, flags: list[bool]) -> Tree:
    """The tree with `None` in place of each leaf whose flag is false."""
    leaves, treedef = flatten(tree)
    return treedef.unflatten([x if f else None for x, f in zip(leaves, flags, strict=True)])


class masked(Transform):
    """Applies a transform to the leaves that a mask selects; the others pass unchanged.

    The state is the inner transform's, with `None` for leaves that are not selected.

    Args:
      tx: a transform.
      pattern: which leaves: a pattern for `re.search` in the leaf's path, like `"kernel$"`, or a
        list of them, of which one must match; a tree of bools with the parameters' structure, in
        which one bool may stand for a whole subtree; or a function from the parameters to such a
        tree (from the updates, if `update` gets no params).

    Raises:
      ValueError: by `init` and `update`: a pattern matches no leaf (`adamjax.optional(pattern)`
        allows it), or the tree of bools does not fit; the error names the leaf.
      TypeError: a leaf of the tree is not a bool.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.masked(adamjax.clip_by_value(0.5), "^head/")
    >>> grads = {"base": {"w": jnp.ones(1)}, "head": {"w": jnp.ones(1)}}
    >>> tx.update(grads, tx.init(grads))[0]
    {'base': {'w': Array([1.], dtype=float32)}, 'head': {'w': Array([0.5], dtype=float32)}}
    """

    tx: Transform
    pattern: Mask = static()

    groupable = False
    only_routes = True

    def __post_init__(self) -> None:
        self.set_fields(tx=as_transform(self.tx), pattern=checked_mask("masked", self.pattern))

    def _flags(self, tree: Tree) -> list[bool]:
        return mask_flags(self.pattern, tree, "masked")

    def init(self, params: Tree) -> Any:
        flags = mask_flags(self.pattern, params, "masked", must_match=True)
        return self.tx.init(_select(params, flags))

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        if params is None:
            grads, treedef = flatten(updates)
            flags = self._flags(updates)
        else:
            # As in `init`, the flags come from the parameters.
            grads = match_leaves("masked", "grads", updates, params, "params")
            treedef = flatten(params)[1]
            flags = self._flags(params)
            params = _select(params, flags)
        own_grads = [g if flag else None for g, flag in zip(grads, flags, strict=True)]
        own_updates, state = self.tx.update(
            treedef.unflatten(own_grads), state, params, **extra_args
        )
        new_updates = [
            u if flag else g
            for u, g, flag in zip(flatten(own_updates)[0], grads, flags, strict=True)
        ]
        return treedef.unflatten(new_updates), state

    def part_params(self, params: Tree) -> tuple[Tree, ...]:
        return (_select(params, self._flags(params)),)

    def resolve_masks(self, params: Tree) -> Self:
        pattern = resolved_mask("masked", self.pattern, params)
        resolved = super().resolve_masks(params)
        return resolved if pattern is self.pattern else resolved.replace(pattern=pattern)


class partition(Transform):
    """Applies to each leaf the transform of the first pattern that matches the leaf's path.

    Each part sees only its own leaves, so a clip by global norm within a part computes the norm
    of these leaves. The state is the tuple of the parts' states, the default's last.

    Args:
      rules: pairs (pattern, transform) or a dictionary {pattern: transform}; patterns as in
        `by_path`.
      default: the transform of leaves that no pattern matches. Without it `init` refuses such a
        leaf, because its raw gradient would move it uphill. (`set_to_zero` freezes leaves.)

    Raises:
      ValueError: by `init` and `update`: a pattern matches no leaf, or a leaf has no pattern and
        there is no default. By `init`: a pattern has no effect, because earlier patterns match all
        of its leaves (a catch-all pattern, like `".*"`, is allowed); or a pattern inside
        a part, such as one of `by_path`, matches none of the part's leaves.
        `adamjax.optional(pattern)` may match no leaf or have no effect.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.partition([("bias", adamjax.scale(-1.0))], default=adamjax.scale(-0.5))
    >>> params = {"bias": jnp.array(0.0), "kernel": jnp.array(0.0)}
    >>> tx.update({"bias": jnp.array(2.0), "kernel": jnp.array(3.0)}, tx.init(params))[0]
    {'bias': Array(-2., dtype=float32), 'kernel': Array(-1.5, dtype=float32)}
    """

    patterns: tuple[str, ...] = static()
    transforms: tuple[Transform, ...]
    default: Transform | None

    groupable = False
    only_routes = True

    def __init__(
        self, rules: Iterable[tuple[str, Any]] | Mapping[str, Any], *, default: Any = None
    ) -> None:
        rules = checked_rules("partition", rules)
        self.set_fields(
            patterns=tuple(pattern for pattern, _ in rules),
            transforms=tuple(tx for _, tx in rules),
            default=default,
        )
        self.__post_init__()

    def __post_init__(self) -> None:
        # Fields that `from_config` or `replace` set are not checked by `__init__`.
        rules = checked_rules("partition", paired("partition", self.patterns, self.transforms))
        self.set_fields(
            patterns=tuple(pattern for pattern, _ in rules),
            transforms=tuple(as_transform(tx) for _, tx in rules),
            default=None if self.default is None else as_transform(self.default),
        )

    def part_states(self, state: Any) -> tuple[Any, ...]:
        return states_of_parts(self, state)

    def part_params(self, params: Tree) -> tuple[Tree, ...]:
        return self._part_trees(params)

    def _part_indices(self, tree: Tree) -> list[int]:
        """The index of each leaf's part, or -1 for `None`; refuses a leaf without a part."""
        indices = []
        for path, leaf in zip(leaf_paths(tree), flatten(tree)[0], strict=True):
            if leaf is None:
                indices.append(-1)
                continue
            index = first_match(self.patterns, path)
            if index is None and self.default is None:
                raise ValueError(
                    f"partition: no pattern of {list(self.patterns)} matches the path "
                    f"{path!r}; add one, or give a default transform"
                )
            indices.append(len(self.transforms) if index is None else index)
        return indices

    def _part_trees(self, tree: Tree) -> tuple[Tree, ...]:
        """For each part, the tree with `None` in place of the other parts' leaves."""
        indices = self._part_indices(tree)
        return tuple(_select(tree, [j == i for j in indices]) for i in range(len(self.parts)))

    def init(self, params: Tree) -> tuple[Any, ...]:
        expect_matches("partition", self.patterns, params, first_decides=True)
        pairs = zip(self.parts, self._part_trees(params), strict=True)
        return tuple(tx.init(part_params) for tx, part_params in pairs)

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        leaves, treedef = flatten(updates)
        part_indices, new_states = self._part_indices(updates), []
        if any(i not in part_indices for i in range(len(self.patterns))):
            # Gradients that do not fit params may be the cause, so check this first.
            if params is not None:
                match_leaves("partition", "grads", updates, params, "params")
            expect_present("partition", self.patterns, updates, leaf_paths(updates))
        part_states, part_grads = self.part_states(state), self._part_trees(updates)
        part_params = [None] * len(self.parts) if params is None else self._part_trees(params)
        for i, tx in enumerate(self.parts):
            part_updates, new_state = tx.update(
                part_grads[i], part_states[i], part_params[i], **extra_args
            )
            new_states.append(new_state)
            triples = zip(leaves, flatten(part_updates)[0], part_indices, strict=True)
            leaves = [u if j == i else leaf for leaf, u, j in triples]
        return treedef.unflatten(leaves), tuple(new_states)

    def __repr__(self) -> str:
        rules = list(zip(self.patterns, self.transforms, strict=True))
        return f"partition({rules!r}, default={self.default!r})"
