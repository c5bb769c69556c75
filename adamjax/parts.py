"""What a transform is made of: every part with its state, and the parameters that it sees."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from adamjax.data import Tree
from adamjax.hyperparams import with_hyperparams
from adamjax.masking import masked, partition
from adamjax.paths import first_match, flatten, leaf_paths, selected
from adamjax.transform import Transform

__all__ = ["Part", "walk"]


class Part(NamedTuple):
    """A transform somewhere in another one.

    Attributes:
      tx: the transform.
      state: its state.
      params: the parameters that it sees, `None` for leaves that are not its own.
    """

    tx: Transform
    state: Any
    params: Tree


def walk(tx: Transform, state: Any, params: Tree) -> Iterator[Part]:
    """A transform and all that it is made of, in the order in which a gradient meets them."""
    yield Part(tx, state, params)
    if isinstance(tx, with_hyperparams):
        yield from walk(tx.resolved(state), state.inner, params)
        return
    leaves, treedef = flatten(params)
    seen: list[list[bool]] = [[True] * len(leaves)] * len(tx.parts)
    if isinstance(tx, masked):
        seen = [selected(tx.pattern, params, "masked")]
    elif isinstance(tx, partition):
        matches = [first_match(tx.patterns, path) for path in leaf_paths(params)]
        owners = [len(tx.transforms) if i is None else i for i in matches]
        seen = [[owner == i for owner in owners] for i in range(len(tx.parts))]
    for part, part_state, flags in zip(tx.parts, tx.part_states(state), seen, strict=True):
        own = [p if flag else None for p, flag in zip(leaves, flags, strict=True)]
        yield from walk(part, part_state, treedef.unflatten(own))
