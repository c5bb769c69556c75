"""What a table's gradient goes through: to its rule, and behind it."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax

from adamjax.average import weight_ema
from adamjax.data import Tree, static
from adamjax.grouping import grouped
from adamjax.guard import accumulate_gradients, skip_not_finite
from adamjax.masking import masked, partition
from adamjax.paths import first_match, flatten, leaf_paths, selected
from adamjax.replicas import sum_over
from adamjax.transform import Rule, Step, Transform, chain

__all__ = ["Station", "checked", "refused", "stations", "with_stops"]


class Station(NamedTuple):
    """An elementary transform on the way of a leaf's gradient."""

    place: tuple[int, ...]  # the numbers of the parts that lead to it
    tx: Transform
    state: Any


def stations(
    tx: Transform, state: Any, leaf: int, params: Tree, place: tuple[int, ...] = ()
) -> Iterator[Station]:
    """The elementary transforms that a leaf's gradient goes through, with their states.

    Without parameters, at construction, those that every leaf may go through.
    """
    parts: Sequence[int]
    if isinstance(tx, partition):
        found = None if params is None else first_match(tx.patterns, leaf_paths(params)[leaf])
        parts = () if params is None else (len(tx.transforms) if found is None else found,)
    elif isinstance(tx, masked):
        parts = (0,) if params is None or selected(tx.pattern, params)[leaf] else ()
    elif isinstance(tx, chain):
        parts = range(len(tx.parts))
    else:
        yield Station(place, tx, state)
        return
    for i in parts:
        part_state = None if state is None else tx.part_states(state)[i]
        yield from stations(tx.parts[i], part_state, leaf, params, (*place, i))


def refused(tx: Transform, why: str) -> ValueError:
    return ValueError(f"exact_rows: {tx!r} cannot be in the chain of a table: {why}")


def checked(route: list[Transform], around: tuple[type[Transform], ...]) -> None:
    """Refuses what rows cannot be kept exact through, and what can only be around the whole."""
    rule: Transform | None = None
    average: Transform | None = None
    for tx in route:
        if isinstance(tx, (skip_not_finite, accumulate_gradients, *around)):
            name = type(tx).__name__
            raise refused(tx, f"put it around the whole: {name}(exact_rows(...))")
        if isinstance(tx, sum_over):
            raise refused(
                tx,
                "each replica would add it to rows of its own; put it in front of the whole: "
                f"chain({tx!r}, exact_rows(...))",
            )
        if isinstance(tx, grouped):
            raise refused(tx, "keep tables apart from the leaves that are joined, by partition")
        if average is not None:
            raise refused(average, "it must be last")
        if isinstance(tx, weight_ema):
            average = tx
            if tx.overwrite_frequency is not None:
                raise refused(tx, "overwriting would move every row; call flush and set them")
        elif isinstance(tx, Rule):
            if rule is not None:
                raise refused(tx, f"it is a second rule, behind {rule!r}")
            rule = tx
        elif rule is None and not tx.keeps_zero and any(isinstance(x, Rule) for x in route):
            raise refused(tx, "in front of the rule, it may give a gradient to rows without one")
        elif rule is not None and tx.affine(None, None, 0, None) is None:
            raise refused(tx, "behind the rule, its result is not affine in update and weights")
    if rule is None or (average is not None and route[-1] is not average):
        raise ValueError(
            f"exact_rows: expected one rule such as scale_by_adam in a table's chain, got {route!r}"
        )


class _Waiting:
    """A table's gradient in front of its rule: to everything behind, a leaf to be left alone."""

    dtype = jax.dtypes.float0

    def __init__(self, gradient: Any) -> None:
        self.gradient, self.shape = gradient, gradient.shape


class _stopping(Rule):
    """A rule before which the gradients of some leaves wait."""

    tx: Rule
    leaves: Any = static()

    def step(self, grads: Tree, state: Any, factors: Any) -> Step:
        found, treedef = flatten(grads)
        for leaf in self.leaves:
            if found[leaf] is not None:
                found[leaf] = _Waiting(found[leaf])
        return self.tx.step(treedef.unflatten(found), state, factors)


def with_stops(tx: Transform, leaves: tuple[int, ...]) -> Transform:
    """The transform without what its rules and all behind them do to some leaves."""

    def is_whole(x: Any) -> bool:
        # No table goes through what joins leaves.
        return isinstance(x, Rule | grouped)

    def stopped(x: Any) -> Any:
        return _stopping(x, leaves) if isinstance(x, Rule) else x

    return jax.tree.map(stopped, tx, is_leaf=is_whole)
