"""Makes copies of states with other counts or rates. Steps that are compared start from these."""

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
from adamjax.scaling import ScheduleState
from adamjax.structure import rule_slots

__all__ = [
    "LATE",
    "VALUE",
    "Advance",
    "MakeRule",
    "advanced_adamjax",
    "advanced_optax",
    "kinds_of_hyperparams",
    "late_rule",
    "may_have_counts",
    "new_rule",
    "rule_as_it_is",
    "unread_rule",
    "with_half_values",
    "with_values",
    "zero_hyperparams",
]

# Makes a new state of a rule from its state and from the one that `init` returns.
MakeRule = Callable[[Any, Any], Any]

# Counts of a rule whose moments are corrected no more. At the last, this holds for any betas. There
# are several, because a user's own transform may compute its rate from the count of its rule.
LATE = (10_000, 100_000, 1_000_000)
# The rate or decay in place of one that is 0, and their names among hyperparameters in a state.
VALUE = 0.01
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
      steps: by how many steps schedules are further on.
      calls: how many calls of `update` make a step. A count of calls is `steps * calls` further on.
      rule: makes the states of rules. If it makes them anew, all other transforms start anew too,
        but for their counts.
    """

    steps: int
    calls: int
    rule: MakeRule

    @property
    def inside(self) -> "Advance":
        """The same inside a transform that accumulates, where a call is a step."""
        return self._replace(calls=1)


def new_rule(x: Any, fresh: Any) -> Any:
    """The state of a rule that has taken no step."""
    return fresh


def late_rule(count: int, x: Any, fresh: Any) -> Any:
    """The state of a rule with these moments that has taken so many steps."""
    return x._replace(count=jnp.full_like(x.count, count))


def unread_rule(x: Any, fresh: Any) -> Any:
    """The state of a rule that has taken many steps, with moments of 0, as of rows never read.

    From here optax' AMSGrad, Nadam and Adamax have the form of those of adamjax: nothing is
    corrected, and optax' u, 0 here, is at least epsilon in the next step.
    """
    late = fresh._replace(count=jnp.full_like(x.count, LATE[-1]))
    if getattr(x, "momentum_product", None) is not None:
        late = late._replace(momentum_product=jnp.zeros_like(x.momentum_product))
    return late


def rule_as_it_is(x: Any, fresh: Any) -> Any:
    return x


def advanced_adamjax(ours: AdamjaxState, x: Any, fresh: Any, how: Advance) -> Any:
    """A node of the state of `ours`, advanced, with micro-batches of 0 in place of its own.

    It is as far from the end of a step as before, as schedules that count calls must be.

    Args:
      fresh: the same node of the state that `init` returns.
    """
    if rule_slots(x):
        return how.rule(x, fresh)
    if isinstance(x, ScheduleState) or counts_a_schedule(x):
        return x._replace(count=x.count + how.steps * how.calls)
    if isinstance(x, AccumulateGradientsState):
        inner = advanced_adamjax(ours, x.inner, fresh.inner, how.inside)
        return x._replace(total=fresh.total, inner=inner)
    if isinstance(x, ExactRowsState):
        part: Any = ours.part(x)
        return part.tx.from_dense(advanced_adamjax(ours, x.inner, fresh.inner, how), part.params)
    if may_contain_states(x):
        return map_items(lambda a, b: advanced_adamjax(ours, a, b, how), x, fresh)
    if is_array(x) and not ours.is_state_of_other_library(x):
        return x
    return _advanced_other(x, fresh, how)


def advanced_optax(x: Any, fresh: Any, how: Advance) -> Any:
    """A node of a state of optax, advanced as by `advanced_adamjax`; `fresh` is that of `init`."""
    role = role_of(x)
    if role == "rule":
        return how.rule(x, fresh)
    if role == "count":
        return x._replace(count=x.count + how.steps * how.calls)
    if role == "accumulated":
        inner = advanced_optax(x.inner_opt_state, fresh.inner_opt_state, how.inside)
        return fresh._replace(
            mini_step=x.mini_step, gradient_step=x.gradient_step + how.steps, inner_opt_state=inner
        )
    if role is None:
        return _advanced_other(x, fresh, how)
    if role in ("hyperparams", "skipped"):
        names = [name for name in ("inner_state", "hyperparams_states") if hasattr(x, name)]
        fields = {
            name: advanced_optax(getattr(x, name), getattr(fresh, name), how) for name in names
        }
        if role == "hyperparams":
            fields["count"] = x.count + how.steps * how.calls
        return x._replace(**fields)
    return map_items(lambda a, b: advanced_optax(a, b, how), x, fresh)


def zero_hyperparams(state: Any) -> frozenset[str]:
    """Which of "rate" and "decay" a state keeps as hyperparameters that are 0."""
    return frozenset(kind for kind, x in _hyperparams(state) if np.all(np.asarray(x) == 0))


def kinds_of_hyperparams(state: Any) -> frozenset[str]:
    """Which of "rate" and "decay" a state keeps as hyperparameters, each under one name."""
    names: dict[str, set[str]] = {}
    for path, _ in jax.tree_util.tree_leaves_with_path(state):
        if kind := _kind_of(path):
            names.setdefault(kind, set()).add(str(path[-1]))
    # Of a rate and a factor, half of both would be a quarter.
    return frozenset(kind for kind, same_kind in names.items() if len(same_kind) == 1)


def with_values(state: Any, kinds: frozenset[str]) -> Any:
    """A state whose hyperparameters of these kinds have `VALUE` in place of 0."""

    def with_value(path: tuple[Any, ...], x: Any) -> Any:
        is_one = _kind_of(path) in kinds and np.all(np.asarray(x) == 0)
        return jnp.full_like(x, VALUE) if is_one else x

    return jax.tree_util.tree_map_with_path(with_value, state)


def with_half_values(state: Any, kinds: frozenset[str]) -> Any:
    """A state whose hyperparameters of these kinds are half as large."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x: (x / 2).astype(x.dtype) if _kind_of(path) in kinds else x, state
    )


def _hyperparams(state: Any) -> Iterator[tuple[str, Any]]:
    """The rates and decays that a state keeps as hyperparameters, each with its kind."""
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        kind = _kind_of(path)
        if kind:
            yield kind, x


def _kind_of(path: tuple[Any, ...]) -> str | None:
    """The kind of the hyperparameter at a path in a state; `None` for anything else."""
    names = [getattr(key, "name", getattr(key, "key", None)) for key in path[-2:]]
    return _KINDS.get(str(names[-1])) if names[:1] == ["hyperparams"] else None


def _advanced_other(x: Any, fresh: Any, how: Advance) -> Any:
    """A state of a transform that conversions do not know, such as `conditionally_transform`."""
    is_new = how.rule in (new_rule, unread_rule)

    def advanced(x: Any, initial: Any) -> Any:
        if _may_count(x):
            return x + how.steps * how.calls
        return initial if is_new else x

    return jax.tree.map(advanced, x, fresh)


def may_have_counts(x: Any) -> bool:
    """Whether the state of a transform that conversions do not know may count calls."""
    return any(map(_may_count, jax.tree.leaves(x)))


def _may_count(x: Any) -> bool:
    return is_array(x) and x.shape == () and bool(jnp.issubdtype(x.dtype, jnp.integer))
