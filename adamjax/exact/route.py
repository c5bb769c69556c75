"""The transforms that a table's gradient goes through, up to its rule and after it."""

from typing import Any, NamedTuple

import jax

from adamjax.average import weight_ema
from adamjax.data import Tree, static
from adamjax.grouping import grouped
from adamjax.paths import flatten
from adamjax.replicas import sum_over
from adamjax.transform import Rule, Step, Transform

__all__ = ["RoutePart", "capturing_at_rules", "check_route", "refusal", "routes"]


class RoutePart(NamedTuple):
    """A transform on a leaf's route.

    Transforms that only pass gradients through their parts, such as `chain`, do not count.

    Attributes:
      position: the index of the part at each level of nesting, outermost first.
      tx: the transform.
      state: its state; `None` if `routes` got no state.
      params: the parameters that it sees.
    """

    position: tuple[int, ...]
    tx: Transform
    state: Any
    params: Tree


def routes(tx: Transform, state: Any, params: Tree) -> list[list[RoutePart]]:
    """For each leaf of the parameters, the parts that its gradient goes through, in order.

    If params is `None`, there is one route, through all parts.
    """
    leaf_routes: list[list[RoutePart]] = [[] for _ in flatten(params)[0]]

    def visit(tx: Transform, state: Any, params: Tree, position: tuple[int, ...]) -> None:
        if tx.only_routes:
            for i, part in enumerate(tx.children(state, params)):
                visit(*part, (*position, i))
            return
        for route, p in zip(leaf_routes, flatten(params)[0], strict=True):
            if params is None or p is not None:
                route.append(RoutePart(position, tx, state, params))

    visit(tx, state, params, ())
    return leaf_routes


def refusal(tx: Transform, why: str) -> ValueError:
    """The error for a transform that cannot be in the chain of a table."""
    return ValueError(f"exact_rows: {tx!r} cannot be in the chain of a table: {why}")


def check_route(route: list[Transform]) -> None:
    """Refuses a table's route if one of its transforms does not allow exact rows."""
    rule: Transform | None = None
    average: Transform | None = None
    for tx in route:
        if tx.goes_around_exact_rows:
            name = type(tx).__name__
            raise refusal(tx, f"put it around exact_rows: {name}(exact_rows(...))")
        if isinstance(tx, sum_over):
            raise refusal(
                tx,
                "each replica would add the summed gradient to its own rows; put it before "
                f"exact_rows: chain({tx!r}, exact_rows(...))",
            )
        if isinstance(tx, grouped):
            raise refusal(tx, "separate the tables from the grouped leaves by partition")
        if average is not None:
            raise refusal(average, "it must be last")
        if isinstance(tx, weight_ema):
            average = tx
            if tx.overwrite_frequency is not None:
                raise refusal(
                    tx, "overwriting would move every row; call flush, then overwrite the weights"
                )
        elif isinstance(tx, Rule):
            if rule is not None:
                raise refusal(tx, f"it is a second rule, after {rule!r}")
            if tx.coast() is None:
                raise refusal(
                    tx,
                    "it has no Coast (see Rule.coast) for rows without a gradient, so they "
                    "could not catch up. Use row gradients without exact_rows",
                )
            rule = tx
        elif rule is None and not tx.keeps_zero and any(isinstance(x, Rule) for x in route):
            # (Without any rule, the last error of this function applies.)
            own = "Use adamjax's own transform if there is one (clip_by_global_norm). Else keep"
            keep = own if tx.has_foreign else "Keep"
            raise refusal(
                tx,
                f"before the rule, it may make zero gradients of rows nonzero. {keep} it from the "
                "table: masked(...) by the paths of the other leaves, or chain(masked(...), "
                "exact_rows(...)). Only if it leaves each zero element of every gradient at zero, "
                "set `keeps_zero = True` in its class",
            )
        elif rule is not None and tx.affine(None, None, 0, None) is None:
            raise refusal(tx, "after the rule, its result is not affine in update and weights")
    if rule is None:
        raise ValueError(
            f"exact_rows: expected one rule such as scale_by_adam in a table's chain, got {route!r}"
        )


class _CapturedGradient:
    """A table's gradient, as it reaches the table's rule."""

    # Later transforms leave a leaf of this dtype alone.
    dtype = jax.dtypes.float0

    def __init__(self, gradient: Any) -> None:
        self.gradient, self.shape = gradient, gradient.shape


class _capturing_rule(Rule):
    """A rule that leaves some leaves alone and returns their gradients as `_CapturedGradient`s."""

    tx: Rule
    leaves: Any = static()

    @property
    def has_step(self) -> bool:
        return self.tx.has_step

    def step(self, grads: Tree, state: Any, factors: Any) -> Step:
        return self.tx.step(self._captured(grads), state, factors)

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        return self.tx.update(self._captured(updates), state, params, **extra_args)

    def _captured(self, grads: Tree) -> Tree:
        gradients, treedef = flatten(grads)
        for leaf in self.leaves:
            if gradients[leaf] is not None:
                gradients[leaf] = _CapturedGradient(gradients[leaf])
        return treedef.unflatten(gradients)


def capturing_at_rules(tx: Transform, leaves: tuple[int, ...]) -> Transform:
    """The transform, but the update of each given leaf is the gradient that reaches its rule.

    These updates are `_CapturedGradient`s.
    """
    if isinstance(tx, Rule):
        return _capturing_rule(tx, leaves)
    # A table's rule is never inside another kind of transform.
    return (
        tx.with_parts([capturing_at_rules(x, leaves) for x in tx.parts]) if tx.only_routes else tx
    )
