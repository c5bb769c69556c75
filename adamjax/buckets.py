"""Trees whose small leaves are stored end to end in flat buckets, and the plan of the buckets."""

import functools
import math
import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from adamjax.data import Tree
from adamjax.paths import flatten, leaf_paths

__all__ = ["Bucketed", "Plan", "as_tree", "is_bucketed"]


class Plan:
    """Which leaves of a tree share a bucket: the static part of a `Bucketed`.

    Attributes:
      treedef: the structure of the tree, as `flatten` returns it.
      avals: the shape and dtype of each leaf; `None` for a leaf that is `None`.
      buckets: for each bucket the indices of its leaves.
      alone: the indices of the leaves that are in no bucket.
    """

    def __init__(
        self, treedef: Any, avals: tuple[Any, ...], buckets: tuple[tuple[int, ...], ...]
    ) -> None:
        self.treedef, self.avals, self.buckets = treedef, avals, buckets
        in_buckets = {i for bucket in buckets for i in bucket}
        self.alone = tuple(i for i in range(len(avals)) if i not in in_buckets)

    @property
    def _key(self) -> Any:
        return self.treedef, self.avals, self.buckets

    def shape_of(self, i: int) -> tuple[int, ...]:
        """The shape of the leaf at index i, which must not be `None`."""
        shape: tuple[int, ...] = self.avals[i][0]
        return shape

    # JAX compares plans at each call of a jitted function. Usually both are the same object.
    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, Plan) and bool(self._key == other._key)

    def __hash__(self) -> int:
        return hash(self._key)

    def __reduce__(self) -> tuple[Any, ...]:
        # This pickles a tree, because a pickled treedef would lose the static data of its nodes.
        tree = self.treedef.unflatten(range(len(self.avals)))
        return _plan_like, (tree, self.avals, self.buckets)

    def __repr__(self) -> str:
        return f"{sum(map(len, self.buckets))} of {len(self.avals)} leaves in buckets"

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """The keys of the arrays: the names of the buckets, then the paths of the other leaves.

        The name of a bucket includes a checksum of its leaves' paths and shapes. So a checkpoint
        that was saved by these keys does not fit a model whose leaves were renamed.
        """
        paths = leaf_paths(self.shape_tree)
        buckets = []
        for i, bucket in enumerate(self.buckets):
            leaves = "\n".join(f"{paths[j]} {list(self.shape_of(j))}" for j in bucket)
            checksum = zlib.crc32(leaves.encode())
            buckets.append(f"bucket {i} of {len(bucket)} leaves ({checksum:08x})")
        return (*buckets, *(paths[i] for i in self.alone))

    @property
    def shape_tree(self) -> Tree:
        """The tree with a `ShapeDtypeStruct` in place of each leaf."""
        return self.treedef.unflatten(
            [None if a is None else jax.ShapeDtypeStruct(*a) for a in self.avals]
        )

    def join(self, leaves: list[Any]) -> "Bucketed":
        """Puts the leaves of a tree, in the order of `flatten`, into buckets."""
        buckets = tuple(_end_to_end([leaves[i] for i in bucket]) for bucket in self.buckets)
        return Bucketed(buckets, tuple(leaves[i] for i in self.alone), self)

    def without(self, dropped: list[int]) -> "Plan":
        """The plan without the buckets at these indices."""
        if not dropped:
            return self
        remaining = tuple(b for i, b in enumerate(self.buckets) if i not in dropped)
        return Plan(self.treedef, self.avals, remaining)


def _plan_like(tree: Tree, avals: tuple[Any, ...], buckets: tuple[tuple[int, ...], ...]) -> Plan:
    return Plan(flatten(tree)[1], avals, buckets)


@jax.tree_util.register_pytree_with_keys_class
@dataclass(frozen=True, eq=False)
class Bucketed:
    """A tree whose small leaves are in buckets. Its arrays are the buckets, then the other leaves.

    The state of `grouped` has a `Bucketed` in place of each tree like the parameters; `get_slot`
    and `averaged_weights` return the tree itself.

    Attributes:
      buckets: tuple of arrays of one dimension, each with leaves of one dtype end to end.
      alone: tuple of the leaves that are in no bucket.
      plan: the `Plan`, which lists the leaves of each bucket; static, not an array.

    >>> import adamjax, jax.numpy as jnp
    >>> state = adamjax.grouped(adamjax.scale_by_adam()).init({"a": jnp.ones(3), "b": jnp.ones(())})
    >>> state.m.buckets
    (Array([0., 0., 0., 0.], dtype=float32),)
    """

    buckets: tuple[Any, ...]
    alone: tuple[Any, ...]
    plan: Plan

    def tree_flatten_with_keys(self) -> tuple[Any, Any]:
        names = list(self.plan.names)
        children = (*self.buckets, *self.alone)
        # A state may have more or fewer arrays than the plan. It must pass through `jit`, so that
        # `expect_whole` can refuse it.
        names += ["surplus"] * (len(children) - len(names))
        keys = map(jax.tree_util.DictKey, names)
        return tuple(zip(keys, children, strict=False)), self.plan

    def tree_flatten(self) -> tuple[Any, Any]:
        return (*self.buckets, *self.alone), self.plan

    @classmethod
    def tree_unflatten(cls, plan: Any, children: Any) -> "Bucketed":
        children, count = tuple(children), len(plan.buckets)
        return cls(children[:count], children[count:], plan)

    def expect_whole(self, name: str) -> None:
        """Refuses buckets that do not fit the plan, such as buckets from a truncated file."""
        buckets, alone = self.plan.buckets, self.plan.alone
        advice = "restore the whole state, or start from init"
        counts, expected = (len(self.buckets), len(self.alone)), (len(buckets), len(alone))
        if counts != expected:
            raise ValueError(
                f"grouped: the state's {name} has {counts[0]} buckets and {counts[1]} other "
                f"arrays, expected {expected[0]} and {expected[1]}: {advice}"
            )
        for i, (bucket, x) in enumerate(zip(buckets, self.buckets, strict=True)):
            size = sum(math.prod(self.plan.shape_of(j)) for j in bucket)
            if getattr(x, "shape", None) != (size,):
                actual = f"of shape {list(x.shape)}" if hasattr(x, "shape") else repr(x)
                raise ValueError(
                    f"grouped: bucket {i} of the state's {name} is {actual}, expected the shape "
                    f"[{size}] of its {len(bucket)} leaves end to end: {advice}"
                )

    def leaves(self) -> list[Any]:
        """The leaves of the tree, in the order of `flatten`."""
        self.expect_whole("tree")
        leaves: list[Any] = [None] * len(self.plan.avals)
        for i, x in zip(self.plan.alone, self.alone, strict=True):
            leaves[i] = x
        for bucket, x in zip(self.plan.buckets, self.buckets, strict=True):
            shapes = tuple(self.plan.shape_of(i) for i in bucket)
            for i, piece in zip(bucket, _pieces(x, shapes), strict=True):
                leaves[i] = piece
        return leaves

    def tree(self) -> Tree:
        """The tree without buckets."""
        return self.plan.treedef.unflatten(self.leaves())


def _end_to_end(leaves: list[Any]) -> Any:
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves):
        size = sum(math.prod(x.shape) for x in leaves)
        return jax.ShapeDtypeStruct((size,), leaves[0].dtype)
    return _concatenated(leaves)


# Jitted, so that `init` or `update` outside of jit makes one call rather than one for each leaf.
@jax.jit
def _concatenated(leaves: list[Any]) -> Any:
    return jax.lax.concatenate([jnp.reshape(x, -1) for x in leaves], 0)


@functools.partial(jax.jit, static_argnums=1)
def _pieces(bucket: Any, shapes: tuple[tuple[int, ...], ...]) -> list[Any]:
    pieces = jax.lax.split(bucket, [math.prod(s) for s in shapes])
    return [jnp.reshape(x, s) for x, s in zip(pieces, shapes, strict=True)]


def is_bucketed(x: Any) -> bool:
    return isinstance(x, Bucketed)


def as_tree(tree: Any) -> Any:
    """The tree without buckets, if `tree` is a `Bucketed`; else the tree as it is."""
    return tree.tree() if isinstance(tree, Bucketed) else tree
