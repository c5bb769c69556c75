"""Transforms that scale by a factor or a learning rate, that freeze, and that decay weights."""

from collections.abc import Callable
from typing import Any, NamedTuple, Self

import chex
import jax.numpy as jnp

from adamjax.data import FINITE, Number, Tree, is_array, static, transform_state
from adamjax.leaves import lift, needed
from adamjax.moments import next_count, scalar, widen
from adamjax.paths import Mask, checked_mask, first_match, leaf_paths, mask_flags, resolved_mask
from adamjax.schedule import Rate, as_rate, by_path, rates_at
from adamjax.transform import (
    Scaling,
    Stateless,
    Step,
    Transform,
    expect_empty,
    expect_state,
    rates_of_all,
)

__all__ = [
    "ScheduleState",
    "add_decayed_weights",
    "scale",
    "scale_by_learning_rate",
    "set_to_zero",
]


@transform_state()
class ScheduleState(NamedTuple):
    """State of a transform with a rate: `count`, int32, the number of steps taken.

    A transform with a constant rate has one too, so that a run can continue from its checkpoint
    with a schedule.

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.scale_by_learning_rate(0.1).init(jnp.zeros(1))
    ScheduleState(count=Array(0, dtype=int32))
    """

    count: chex.Array


def _new_count() -> ScheduleState:
    return ScheduleState(jnp.zeros((), jnp.int32))


def _expect_matches(owner: str, rate: Any, params: Tree) -> None:
    """Refuses a `by_path` with a pattern that matches no leaf."""
    if isinstance(rate, by_path):
        rate.expect_matches(owner, params)


def _pattern_indices(rate: Any, params: Tree) -> list[Any]:
    """For each leaf the index of the pattern of `by_path` that decides its rate, or `None`."""
    paths = leaf_paths(params)
    if not isinstance(rate, by_path):
        return [None] * len(paths)
    return [first_match(rate.patterns, path) for path in paths]


def _scalars(rates: list[Number], make: Callable[[Number], Any]) -> list[Any]:
    """Calls `make` with each leaf's rate. Leaves that share a rate share a result, for `lift`."""
    by_id = {id(rate): make(rate) for rate in rates}
    return [by_id[id(rate)] for rate in rates]


def _decayed(rate: Any, g: chex.Array, p: chex.Array) -> tuple[chex.Array]:
    """The update with decoupled weight decay, in the form of a rule on arrays; see `lift`."""
    return ((widen(g, rate.dtype) + rate * widen(p, rate.dtype)).astype(g.dtype),)


def _zero(_: Any, g: chex.Array) -> tuple[chex.Array]:
    """The update 0, in the form of a rule on arrays; see `lift`."""
    return (jnp.zeros_like(g),)


class set_to_zero(Stateless):
    """Makes all updates zero, whatever the gradients are: freezes leaves.

    Even NaN becomes zero, so frozen weights stay as they are in a step whose gradients are not
    finite. (`scale(0.0)` and a learning rate of 0 multiply, and 0 times NaN is NaN.)

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.partition([("^base/", adamjax.set_to_zero())], default=adamjax.adam(0.1))
    >>> params = {"base": {"w": jnp.ones(1)}, "head": {"w": jnp.ones(1)}}
    >>> grads = {"base": {"w": jnp.array([jnp.nan])}, "head": {"w": jnp.ones(1)}}
    >>> tx.update(grads, tx.init(params), params)[0]
    {'base': {'w': Array([0.], dtype=float32)}, 'head': {'w': Array([-0.1], dtype=float32)}}
    """

    keeps_zero = True
    groupable = True

    def num_rates(self, params: Tree) -> list[int | None]:
        return rates_of_all(params, None)

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        expect_empty(self, state)
        return lift("set_to_zero", _zero, lambda _: (), updates, like=params)[0], state

    def affine(self, state: Any, params: Tree, leaf: int, real: Any) -> tuple[Any, Any] | None:
        return 0, 0


class scale(Stateless, Scaling):
    """Multiplies every update by a factor.

    Args:
      factor: any finite number. To freeze leaves use `set_to_zero`: 0 times NaN is NaN.

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.scale(-0.5).update(jnp.array([2.0, 4.0]), ())[0]
    Array([-1., -2.], dtype=float32)
    """

    factor: Number

    groupable = True

    def __post_init__(self) -> None:
        self.check_range("factor", FINITE)

    def num_rates(self, params: Tree) -> list[int | None]:
        keeps_sign = not is_array(self.factor) and self.factor > 0
        return rates_of_all(params, 0 if keeps_sign else None)

    def factors(self, tree: Tree, state: Any) -> tuple[Any, Any]:
        expect_empty(self, state)
        return lambda real: scalar(self.factor, real), state


class scale_by_learning_rate(Scaling):
    """Multiplies every update by minus the learning rate, which turns uphill into downhill.

    Args:
      learning_rate: a number of at least 0, a scalar array, a schedule (called with the count
        before this step, 0 at the first), or `by_path` for a rate per leaf. (Some values can be
        checked only in a step: values of a callable, and arrays that are traced, or set later by
        `set_hyperparams`. There a value below 0 makes the updates NaN. But a callable's value
        between -1e-6 and 0 counts as 0, because of rounding.)

    The state is a `ScheduleState`.

    Raises:
      ValueError: by `init` and `update`: a pattern of `by_path` matches no leaf.
      TypeError, ValueError: by `update`: a callable did not return a real scalar.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.scale_by_learning_rate(adamjax.inverse_time_decay(1.0, 1, 1.0))
    >>> state = tx.init(jnp.array(0.0))
    >>> for _ in range(3):
    ...     update, state = tx.update(jnp.array(6.0), state)
    ...     print(update)
    -6.0
    -3.0
    -2.0
    """

    learning_rate: Rate

    descends = True

    def __post_init__(self) -> None:
        self.set_fields(learning_rate=as_rate(self, "learning_rate"))

    def num_rates(self, params: Tree) -> list[int | None]:
        return rates_of_all(params, 1)

    @property
    def groupable(self) -> bool:
        return not isinstance(self.learning_rate, by_path)

    def kinds(self, params: Tree) -> list[Any]:
        return _pattern_indices(self.learning_rate, params)

    def init(self, params: Tree) -> ScheduleState:
        _expect_matches("scale_by_learning_rate", self.learning_rate, params)
        return _new_count()

    def check_state(self, state: Any) -> None:
        expect_state(self, state, ScheduleState)

    def factors(self, tree: Tree, state: Any) -> tuple[Any, Any]:
        self.check_state(state)
        rates = rates_at("scale_by_learning_rate", self.learning_rate, state.count, tree)

        def minus(rate: Number) -> Callable[[Any], Any]:
            return lambda real: -scalar(rate, real)

        return _scalars(rates, minus), ScheduleState(next_count(state.count))


class add_decayed_weights(Transform):
    """Adds `weight_decay * p` to the uphill update of each parameter p.

    Between a rule and `scale_by_learning_rate` this is decoupled weight decay (Loshchilov &
    Hutter, arXiv:1711.05101, algorithm 2): `p -= learning_rate * weight_decay * p`, where p on the
    right is the parameter before the step. `update` needs `params`. After the learning rate it
    would make the weights grow in each step, `p += weight_decay * p`, so `chain` refuses that
    order.

    Args:
      weight_decay: a number of at least 0, a scalar array, a schedule, or `by_path`. As for a
        learning rate, a value below 0 that can be checked only in a step makes updates NaN.
      mask: which leaves decay: a pattern for `re.search` in the leaf's path, or a list of them, of
        which one must match; a tree of bools with the parameters' structure, in which one bool may
        stand for a whole subtree; or a function from the parameters to such a tree. `None`: all.

    The state is a `ScheduleState`.

    Raises:
      ValueError: by `init` and `update`: a pattern matches no leaf (`adamjax.optional` allows it),
        or the mask does not fit the parameters; the error names the leaf.

    >>> import adamjax, jax.numpy as jnp
    >>> params = {"bias": jnp.ones(1), "kernel": jnp.ones(1)}
    >>> tx = adamjax.add_decayed_weights(0.5, mask="kernel")
    >>> tx.update({"bias": jnp.zeros(1), "kernel": jnp.zeros(1)}, tx.init(params), params)[0]
    {'bias': Array([0.], dtype=float32), 'kernel': Array([0.5], dtype=float32)}
    """

    weight_decay: Rate
    mask: Mask | None = static(default=None)

    adds_weights = True

    def __post_init__(self) -> None:
        self.set_fields(weight_decay=as_rate(self, "weight_decay"))
        if self.mask is not None:
            self.set_fields(mask=checked_mask("add_decayed_weights", self.mask))

    @property
    def groupable(self) -> bool:
        return self.mask is None and not isinstance(self.weight_decay, by_path)

    def resolve_masks(self, params: Tree) -> Self:
        mask = resolved_mask("add_decayed_weights", self.mask, params)
        return self if mask is self.mask else self.replace(mask=mask)

    def kinds(self, params: Tree) -> list[Any]:
        indices = _pattern_indices(self.weight_decay, params)
        if self.mask is None:
            return indices
        return list(zip(indices, mask_flags(self.mask, params, "add_decayed_weights"), strict=True))

    def init(self, params: Tree) -> ScheduleState:
        _expect_matches("add_decayed_weights", self.weight_decay, params)
        if self.mask is not None:
            mask_flags(self.mask, params, "add_decayed_weights", must_match=True)
        return _new_count()

    def _rates(self, state: Any, params: Tree) -> list[Any]:
        """The decay of every leaf; the number 0 for leaves outside the mask."""
        rates = rates_at("add_decayed_weights", self.weight_decay, state.count, params)
        if self.mask is None:
            return rates
        is_decayed = mask_flags(self.mask, params, "add_decayed_weights")
        return [rate if decays else 0.0 for rate, decays in zip(rates, is_decayed, strict=True)]

    def check_state(self, state: Any) -> None:
        expect_state(self, state, ScheduleState)

    def affine(self, state: Any, params: Tree, leaf: int, real: Any) -> tuple[Any, Any] | None:
        # With no state, these numbers only mean that there are such scalars, with w not always 0.
        if state is None:
            return 1, 1
        return 1, scalar(self._rates(state, params)[leaf], real)

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        self.check_state(state)
        params = needed("add_decayed_weights", params)
        rates = self._rates(state, params)

        # With `None`, `lift` passes a leaf on unchanged. An array may be 0 in some steps only.
        def scalar_of(rate: Number) -> Callable[[Any], Any] | None:
            return None if not is_array(rate) and rate == 0 else lambda real: scalar(rate, real)

        scalars = _scalars(rates, scalar_of)
        (updates,) = lift("add_decayed_weights", _decayed, scalars, updates, params=params)
        return updates, ScheduleState(next_count(state.count))
