"""Makes copies of states with other counts or rates. Steps that are compared start from these."""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.convert.adamjax_state import AdamjaxState, may_contain_states
from adamjax.convert.optax_state import role_of
from adamjax.convert.values import counts_a_schedule, map_items
from adamjax.data import is_array
from adamjax.exact.state import ExactRowsState
from adamjax.guard import AccumulateGradientsState
from adamjax.leaves import dtype_of
from adamjax.scaling import ScheduleState
from adamjax.structure import rule_slots

__all__ = [
    "LATE_COUNTS",
    "STAND_IN_FOR_ZERO",
    "Advance",
    "MakeRuleState",
    "advanced_adamjax",
    "advanced_optax",
    "differing_hyperparams",
    "fresh_rule_state",
    "kinds_with_one_name",
    "kinds_with_zeros",
    "late_rule_state",
    "late_zero_rule_state",
    "may_count_calls",
    "unchanged_rule_state",
    "with_floats_of",
    "with_hyperparams_of",
    "with_scaled_values",
    "with_zeros_replaced",
]

# Makes a new state of a rule from its state and from the one that `init` returns.
MakeRuleState = Callable[[Any, Any], Any]

# Counts of a rule at which its bias corrections are almost 1: the first for a b2 of 0.999, the last
# also for 0.99999. There are several, because a user's own transform may compute its rate from the
# count of its rule. They are primes, because such a rate may be periodic.
LATE_COUNTS = (10_007, 100_003, 1_000_003)
# Replaces a rate or a decay of 0 among the hyperparameters in a state.
STAND_IN_FOR_ZERO = 0.01
# The names of rates and decays among hyperparameters.
_KINDS = {
    "learning_rate": "rate",
    "step_size": "rate",
    "factor": "rate",
    "lr": "rate",
    "weight_decay": "decay",
    "wd": "decay",
}


class Advance(NamedTuple):
    """How states are advanced.

    Attributes:
      steps: the number of steps by which schedules are advanced.
      calls: how many calls of `update` make a step. A count of calls goes up by `steps * calls`.
      make_rule_state: makes the states of rules. If it drops their moments, transforms that
        conversions do not know start anew too, but for their counts.
    """

    steps: int
    calls: int
    make_rule_state: MakeRuleState

    @property
    def inside(self) -> "Advance":
        """The same inside a transform that accumulates gradients, where each call is a step."""
        return self._replace(calls=1)


def fresh_rule_state(x: Any, fresh: Any) -> Any:
    """The state of a rule that has taken no step."""
    return fresh


def late_rule_state(count: int, x: Any, fresh: Any) -> Any:
    """The state of a rule with the same moments, but this count."""
    return x._replace(count=jnp.full_like(x.count, count))


def late_zero_rule_state(x: Any, fresh: Any) -> Any:
    """The state of a rule that has taken many steps with gradients of 0, so its moments are 0.

    From this state optax' AMSGrad, Nadam and Adamax take the same step as those of adamjax: the
    bias corrections are 1, and optax' u is |g| + epsilon.
    """
    late = fresh._replace(count=jnp.full_like(x.count, LATE_COUNTS[-1]))
    if getattr(x, "momentum_product", None) is not None:
        late = late._replace(momentum_product=jnp.zeros_like(x.momentum_product))
    return late


def unchanged_rule_state(x: Any, fresh: Any) -> Any:
    """The state of a rule as it is."""
    return x


def advanced_adamjax(ours: AdamjaxState, x: Any, fresh: Any, advance: Advance) -> Any:
    """A node of the state of `ours`, advanced, with accumulated gradients of 0.

    The number of micro-batches since the last step stays, because schedules that count calls depend
    on it.

    Args:
      fresh: the same node of the state that `init` returns.
    """
    if rule_slots(x):
        return advance.make_rule_state(x, fresh)
    if isinstance(x, ScheduleState) or counts_a_schedule(x):
        return x._replace(count=x.count + advance.steps * advance.calls)
    if isinstance(x, AccumulateGradientsState):
        inner = advanced_adamjax(ours, x.inner, fresh.inner, advance.inside)
        return x._replace(total=fresh.total, inner=inner)
    if isinstance(x, ExactRowsState):
        part: Any = ours.part(x)
        return part.tx.from_dense(
            advanced_adamjax(ours, x.inner, fresh.inner, advance), part.params
        )
    if may_contain_states(x):
        return map_items(lambda a, b: advanced_adamjax(ours, a, b, advance), x, fresh)
    # An array of a known transform, such as a hyperparameter of `with_hyperparams`.
    if is_array(x) and not ours.is_state_of_other_library(x):
        return x
    return _advanced_other(x, fresh, advance)


def advanced_optax(x: Any, fresh: Any, advance: Advance) -> Any:
    """A node of a state of optax, advanced as by `advanced_adamjax`."""
    role = role_of(x)
    if role == "rule":
        return advance.make_rule_state(x, fresh)
    if role == "count":
        return x._replace(count=x.count + advance.steps * advance.calls)
    if role == "accumulated":
        inner = advanced_optax(x.inner_opt_state, fresh.inner_opt_state, advance.inside)
        return fresh._replace(
            mini_step=x.mini_step,
            gradient_step=x.gradient_step + advance.steps,
            inner_opt_state=inner,
        )
    if role is None:
        return _advanced_other(x, fresh, advance)
    if role in ("hyperparams", "skipped"):
        names = [name for name in ("inner_state", "hyperparams_states") if hasattr(x, name)]
        fields = {
            name: advanced_optax(getattr(x, name), getattr(fresh, name), advance) for name in names
        }
        if role == "hyperparams":
            fields["count"] = x.count + advance.steps * advance.calls
        return x._replace(**fields)
    return map_items(lambda a, b: advanced_optax(a, b, advance), x, fresh)


def kinds_with_zeros(state: Any) -> frozenset[str]:
    """The kinds, "rate" or "decay", of the hyperparameters in a state that are 0."""
    return frozenset(kind for kind, x in _hyperparams(state) if np.all(np.asarray(x) == 0))


def kinds_with_one_name(state: Any) -> frozenset[str]:
    """The kinds, "rate" or "decay", whose hyperparameters in a state all have the same name."""
    names: dict[str, set[str]] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(state):
        if kind := _kind_of(path):
            names.setdefault(kind, set()).add(str(path[-1]))
    # Two names may be those of a rate and of a factor of it. With both halved, a step would be a
    # quarter as large.
    return frozenset(kind for kind, same_kind in names.items() if len(same_kind) == 1)


def with_zeros_replaced(state: Any, kinds: frozenset[str]) -> Any:
    """A state whose hyperparameters of these kinds have `STAND_IN_FOR_ZERO` in place of 0."""

    def with_value(path: tuple[Any, ...], x: Any) -> Any:
        is_zero = _kind_of(path) in kinds and np.all(np.asarray(x) == 0)
        return jnp.full_like(x, STAND_IN_FOR_ZERO) if is_zero else x

    return jax.tree_util.tree_map_with_path(with_value, state)


def with_scaled_values(state: Any, kinds: frozenset[str], factor: float) -> Any:
    """A state whose hyperparameters of these kinds are multiplied by a factor."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: (x * factor).astype(x.dtype) if _kind_of(path) in kinds else x, state
    )


def with_hyperparams_of(fresh: Any, state: Any) -> Any:
    """A fresh state with the hyperparameters of another, which the user may have set since."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x, other: other if _is_hyperparameter(path) else x, fresh, state
    )


def differing_hyperparams(ours: Any, theirs: Any) -> list[tuple[str, float, float]]:
    """The names and values of hyperparameters that are in both states, with other values."""
    own, other = _hyperparams_by_name(ours), _hyperparams_by_name(theirs)
    return [
        (name, own[name], other[name])
        for name in own
        if name in other and not math.isclose(own[name], other[name], rel_tol=1e-3)
    ]


def _hyperparams_by_name(state: Any) -> dict[str, float]:
    """The hyperparameters in a state that are numbers, without those that share a name."""
    values: dict[str, list[Any]] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if _is_hyperparameter(path):
            values.setdefault(_name_of(path[-1]), []).append(x)
    # Of several with one name, it is not clear which correspond.
    return {name: float(x) for name, (x, *more) in values.items() if not more and np.ndim(x) == 0}


def with_floats_of(fresh: Any, state: Any) -> Any:
    """A fresh state with the floats of another, such as the momenta of SGD; rules stay fresh."""

    def is_rule(x: Any) -> bool:
        return role_of(x) == "rule" or bool(rule_slots(x))

    def chosen(initial: Any, x: Any) -> Any:
        is_float = not is_rule(initial) and jnp.issubdtype(dtype_of(x), jnp.inexact)
        return x if is_float else initial

    return jax.tree.map(chosen, fresh, state, is_leaf=is_rule)


def _hyperparams(state: Any) -> Iterator[tuple[str, Any]]:
    """The rates and decays that a state has as hyperparameters, each after its kind."""
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        kind = _kind_of(path)
        if kind:
            yield kind, x


def _kind_of(path: tuple[Any, ...]) -> str | None:
    """The kind of the hyperparameter at a path in a state; `None` for anything else."""
    return _KINDS.get(_name_of(path[-1])) if _is_hyperparameter(path) else None


def _is_hyperparameter(path: tuple[Any, ...]) -> bool:
    """Whether a path in a state is that of a hyperparameter."""
    return [*map(_name_of, path[-2:-1])] == ["hyperparams"]


def _name_of(key: Any) -> str:
    return str(getattr(key, "name", getattr(key, "key", None)))


def _advanced_other(x: Any, fresh: Any, advance: Advance) -> Any:
    """The state of a transform that conversions do not know, advanced.

    One such transform is optax' `conditionally_transform`.
    """
    starts_anew = advance.make_rule_state in (fresh_rule_state, late_zero_rule_state)

    def advanced(x: Any, initial: Any) -> Any:
        if _may_count(x):
            return x + advance.steps * advance.calls
        return initial if starts_anew else x

    return jax.tree.map(advanced, x, fresh)


def may_count_calls(x: Any) -> bool:
    """Whether the state of a transform that conversions do not know may count calls."""
    return any(map(_may_count, jax.tree.leaves(x)))


def _may_count(x: Any) -> bool:
    is_integer = isinstance(x, int) and not isinstance(x, bool)
    return is_integer or (np.size(x) == 1 and bool(jnp.issubdtype(dtype_of(x), jnp.integer)))
