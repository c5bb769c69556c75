"""`from_optax` and `to_optax` compare steps: differences are refused, without false alarms."""

import functools
import textwrap
from contextlib import nullcontext
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conversions import (
    HALVING,
    LABELS,
    STEPS_DIFFER,
    TWO_LEAVES,
    adam_like_optax,
    multi_steps,
    reduce_on_plateau,
    state_after,
)
from support import assert_close, assert_same, run_on_devices

import adamjax
from adamjax import convert
from adamjax.convert.adamjax_state import AdamjaxState, initial_state
from adamjax.convert.paired_steps import PairedSteps
from adamjax.convert.sampling import sampled
from adamjax.data import static
from adamjax.transform import Transform

# --- transforms -----------------------------------------------------------------------------------


INJECT = optax.inject_hyperparams


INJECTED_RATE, INJECTED_DECAY = (
    INJECT(optax.scale_by_learning_rate),
    INJECT(optax.add_decayed_weights),
)


INJECTED_CLIP = INJECT(optax.clip_by_global_norm)
DROP_AFTER_64 = adamjax.piecewise_constant([64], [0.1, 0.01])
LINEAR_TO_0 = optax.linear_schedule(1e-3, 0.0, 1000)
ONLY_A = {"a": True, "b": False}


RATE_OF_PARTS = INJECT(
    lambda learning_rate: optax.multi_transform(
        {"x": optax.adam(0.1 * learning_rate), "y": optax.adam(learning_rate)}, LABELS
    )
)(learning_rate=0.1)


def nested_multi_steps(tx, inner, outer):
    return multi_steps(multi_steps(tx, inner), outer)


def nested_accumulation(inner, outer):
    return adamjax.accumulate_gradients(
        adamjax.accumulate_gradients(adam_like_optax(), inner), outer
    )


CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))


LIKE_CLIPPED = adamjax.chain(
    adamjax.clip_by_global_norm(1.0), adamjax.adamw(0.1, eps=1e-8, weight_decay=1e-4)
)


class CallsState(NamedTuple):
    num_calls: Any


def drops_after_calls(calls, make_state=CallsState):
    """Another library's transform, whose own counter makes updates smaller after some calls."""

    def init(params):
        return make_state(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        (num_calls,) = jax.tree.leaves(state)
        factor = jnp.where(num_calls < calls, 1.0, 0.1)
        updates = jax.tree.map(lambda u: factor * u, updates)
        return updates, make_state(num_calls + 1)

    return optax.GradientTransformation(init, update)


def adam_with_rate_by_its_count(schedule):
    """optax' Adam with a rate that it computes from the count of its moments."""
    adam = optax.scale_by_adam()

    def update(updates, state, params=None):
        u, after = adam.update(updates, state, params)
        return jax.tree.map(lambda x: -schedule(state.count) * x, u), after

    return optax.GradientTransformation(adam.init, update)


def jump_at(count, before, after):
    return lambda c: jnp.where(c < count, before, after)


SMALL_DECAY_SGD = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1))
SGD_BESIDE_ADAM = optax.multi_transform({"x": optax.adam(0.1), "y": SMALL_DECAY_SGD}, LABELS)


LIKE_SGD_BESIDE_ADAM = adamjax.partition(
    [("a", adam_like_optax())], default=adamjax.scale_by_learning_rate(0.1)
)


def nearly_stops(count):
    return jnp.where((count > 2) & (count < 50), 1e-8, 0.1)


# Pairs of optax and adamjax. Inside of a transform that skips steps, a schedule does not count the
# steps that are skipped.
SKIPS_ALL_BY_SCHEDULE = (
    optax.apply_if_finite(optax.adam(HALVING), 9),
    adamjax.skip_not_finite(adam_like_optax(HALVING)),
)
SKIPS_RULE_BY_SCHEDULE = (
    optax.chain(
        optax.apply_if_finite(optax.scale_by_adam(), 9), optax.scale_by_learning_rate(HALVING)
    ),
    adamjax.chain(
        adamjax.skip_not_finite(adamjax.scale_by_adam(eps=1e-8)),
        adamjax.scale_by_learning_rate(HALVING),
    ),
)


# --- states and steps that differ -----------------------------------------------------------------


# For each case: the transforms of optax and adamjax, the steps before the conversion, the error.
CONTINUES_DIFFERENTLY = {
    "nested accumulation": (
        nested_multi_steps(optax.adam(0.1), 2, 2),
        nested_accumulation(2, 2),
        3,
        "(accumulated twice|'a' is in two accumulate_gradients), one inside the other"
        ".*convert after a step",
    ),
    "nested accumulation, other counts": (
        nested_multi_steps(optax.adam(0.1), 2, 3),
        nested_accumulation(2, 3),
        4,
        "(accumulated twice|'a' is in two accumulate_gradients), one inside the other",
    ),
    "MultiSteps around adamjax": (
        multi_steps(optax.adam(0.1), 3),
        multi_steps(adam_like_optax(), 3),
        5,
        r"MultiStepsState is around transforms of adamjax, and its own mini_step, .*acc_grads",
    ),
    "inject_hyperparams around adamjax": (
        INJECT(optax.adam)(learning_rate=0.1),
        INJECT(adamjax.adam)(learning_rate=0.2, eps=1e-8),
        2,
        "is around transforms of adamjax",
    ),
    "another rate of a rule inside optax.chain": (
        INJECT(optax.adam)(learning_rate=0.1, b1=0.5),
        optax.chain(adamjax.clip_by_value(9.0), adam_like_optax(0.2)),
        2,
        STEPS_DIFFER,
    ),
    "a schedule of a rule inside optax.chain": (
        optax.adam(HALVING),
        optax.chain(adamjax.scale_by_adam(eps=1e-8), adamjax.scale_by_learning_rate(0.1)),
        2,
        STEPS_DIFFER,
    ),
    "a rate that another leaf sets": (
        optax.adam(HALVING),
        adamjax.partition(
            [("^a", adamjax.with_hyperparams(adam_like_optax(), learning_rate=0.1))],
            default=adam_like_optax(),
        ),
        2,
        STEPS_DIFFER,
    ),
    "a transform without a state": (
        optax.chain(
            optax.scale_by_adam(), optax.clip(1.0), optax.scale_by_schedule(lambda c: -HALVING(c))
        ),
        adamjax.chain(
            adamjax.scale_by_adam(eps=1e-8), optax.clip(1.0), adamjax.scale_by_learning_rate(0.1)
        ),
        2,
        STEPS_DIFFER,
    ),
    "a clip before the rule": (
        optax.chain(optax.scale_by_schedule(HALVING), optax.clip(1.0), optax.adam(0.1)),
        adamjax.chain(optax.clip(1.0), adam_like_optax()),
        2,
        STEPS_DIFFER,
    ),
    "a product of factors": (
        optax.chain(optax.scale_by_adam(), INJECT(optax.scale)(0.5), INJECTED_RATE(0.1)),
        adam_like_optax(),
        2,
        STEPS_DIFFER,
    ),
    "a decay's schedule of the other leaf": (
        INJECT(optax.adamw)(learning_rate=0.1, weight_decay=HALVING),
        adamjax.partition(
            [("^a", adamjax.adamw(0.1, eps=1e-8, weight_decay=HALVING))],
            default=adamjax.adamw(0.1, eps=1e-8, weight_decay=0.1),
        ),
        2,
        STEPS_DIFFER,
    ),
    "decays that are constants by path": (
        INJECT(optax.adamw)(learning_rate=0.1, weight_decay=HALVING),
        adamjax.adamw(0.1, eps=1e-8, weight_decay=adamjax.by_path([("^a", 0.1)], default=0.3)),
        2,
        STEPS_DIFFER,
    ),
    "a decay in calls": (
        multi_steps(INJECT(optax.adamw)(learning_rate=0.1, weight_decay=0.1), 2),
        adamjax.chain(
            adamjax.accumulate_gradients(adamjax.scale_by_adam(eps=1e-8), 2),
            adamjax.add_decayed_weights(0.1),
            adamjax.scale_by_learning_rate(0.1),
        ),
        2,
        STEPS_DIFFER,
    ),
    "accumulation within accumulation": (
        multi_steps(optax.adam(0.1), 6),
        nested_accumulation(2, 3),
        7,
        "(one inside the other|accumulated different numbers)",
    ),
    "a decay alone before the rule": (
        optax.chain(INJECT(optax.add_decayed_weights)(0.3), optax.adam(0.1)),
        adamjax.adamw(0.1, eps=1e-8, weight_decay=0.3),
        2,
        STEPS_DIFFER,
    ),
    "a decay alone after the rule": (
        optax.chain(
            optax.scale_by_adam(), INJECT(optax.add_decayed_weights)(0.3), INJECTED_RATE(0.1)
        ),
        adamjax.chain(adamjax.add_decayed_weights(0.3), adam_like_optax()),
        2,
        STEPS_DIFFER,
    ),
    "a decay's schedule before the rule": (
        optax.chain(optax.add_decayed_weights(HALVING), optax.adam(0.1)),
        adamjax.adamw(0.1, eps=1e-8, weight_decay=HALVING),
        2,
        STEPS_DIFFER,
    ),
    "skipped steps": (
        optax.apply_if_finite(optax.adam(0.1), 3),
        adam_like_optax(),
        2,
        "wrap tx in skip_not_finite",
    ),
    "a rate's schedule before the rule": (
        optax.chain(INJECTED_RATE(HALVING), optax.scale_by_adam(), optax.scale(0.1)),
        adam_like_optax(HALVING),
        2,
        STEPS_DIFFER,
    ),
    "a rate before the rule": (
        optax.chain(INJECTED_RATE(0.5), optax.scale_by_adam(), optax.scale(0.1)),
        adam_like_optax(0.5),
        2,
        STEPS_DIFFER,
    ),
    "the rate of the first of two rules": (
        optax.chain(
            INJECT(optax.adam)(learning_rate=0.1),
            optax.scale(-1.0),
            INJECT(optax.adam)(learning_rate=0.2),
        ),
        adamjax.chain(adam_like_optax(0.5), adamjax.scale(-1.0), adam_like_optax(0.2)),
        2,
        STEPS_DIFFER,
    ),
    "a rate between two rules": (
        optax.chain(optax.scale_by_adam(), INJECTED_RATE(0.1), optax.scale(-1.0), optax.adam(0.2)),
        adamjax.chain(adam_like_optax(0.2), adamjax.scale(-1.0), adam_like_optax(0.1)),
        2,
        STEPS_DIFFER,
    ),
    "the rate of a leaf without a rule": (
        optax.chain(
            optax.masked(optax.scale_by_adam(), {"a": True, "b": False}), INJECTED_RATE(0.1)
        ),
        adamjax.partition([("^a", adam_like_optax())], default=adamjax.scale_by_learning_rate(0.5)),
        2,
        STEPS_DIFFER,
    ),
    "the rate of a part without a rule": (
        INJECT(
            lambda learning_rate: optax.multi_transform(
                {"one": optax.adam(learning_rate), "other": optax.sgd(0.3)},
                {"a": "one", "b": "other"},
            )
        )(learning_rate=0.1),
        adamjax.partition([("^a", adam_like_optax())], default=adamjax.scale_by_learning_rate(0.5)),
        2,
        STEPS_DIFFER,
    ),
    "two schedules": (
        optax.chain(optax.adam(HALVING), optax.scale_by_schedule(HALVING)),
        adam_like_optax(HALVING),
        2,
        STEPS_DIFFER,
    ),
    "two schedules in place of one": (
        optax.adam(HALVING),
        adamjax.chain(
            adam_like_optax(HALVING), adamjax.scale(-1.0), adamjax.scale_by_learning_rate(HALVING)
        ),
        2,
        STEPS_DIFFER,
    ),
    "schedules before and after": (
        optax.chain(optax.scale_by_schedule(HALVING), optax.adam(DROP_AFTER_64)),
        adamjax.chain(
            adamjax.scale(-1.0),
            adamjax.scale_by_learning_rate(DROP_AFTER_64),
            adam_like_optax(HALVING),
        ),
        2,
        STEPS_DIFFER,
    ),
    "a raw gradient of one leaf": (
        optax.chain(
            optax.masked(optax.scale_by_adam(), {"a": True, "b": False}), INJECTED_RATE(0.1)
        ),
        adamjax.masked(adam_like_optax(), "a"),
        2,
        STEPS_DIFFER,
    ),
    "an injected clip of some leaves": (
        optax.chain(optax.masked(INJECT(optax.clip)(0.1), ONLY_A), optax.adam(0.1)),
        adamjax.chain(adamjax.clip_by_value(0.1), adam_like_optax()),
        2,
        STEPS_DIFFER,
    ),
    "one rate, and parts that use it differently": (
        RATE_OF_PARTS,
        adam_like_optax(),
        2,
        STEPS_DIFFER,
    ),
    "two clips of one limit": (
        optax.chain(INJECTED_CLIP(0.1), optax.adam(0.1), INJECTED_CLIP(0.1)),
        adamjax.chain(adam_like_optax(), adamjax.clip_by_global_norm(0.1)),
        2,
        STEPS_DIFFER,
    ),
    "two decays of one size": (
        optax.chain(INJECTED_DECAY(0.1), INJECT(optax.adamw)(0.1, weight_decay=0.1)),
        adamjax.chain(adamjax.add_decayed_weights(0.1), adam_like_optax()),
        2,
        STEPS_DIFFER,
    ),
    "a clip in a dictionary": (
        optax.named_chain(("clip", INJECTED_CLIP(1.0)), ("adam", optax.adam(0.1))),
        adamjax.chain(adam_like_optax(), adamjax.clip_by_global_norm(1.0)),
        2,
        STEPS_DIFFER,
    ),
    "skipped steps of one part": (
        optax.multi_transform(
            {"x": optax.apply_if_finite(optax.adam(0.1), 3), "y": optax.adam(0.1)}, LABELS
        ),
        adamjax.skip_not_finite(adam_like_optax()),
        2,
        "tx skips steps of the leaf 'b' .*optax does not: remove skip_not_finite",
    ),
    "skipped steps that a schedule counts": (
        optax.chain(
            optax.apply_if_finite(optax.scale_by_adam(), 3), optax.scale_by_learning_rate(HALVING)
        ),
        adamjax.skip_not_finite(adam_like_optax(HALVING)),
        2,
        "the schedule of the leaf 'a' counts .*put its scale_by_learning_rate outside of",
    ),
    "skipped steps that a schedule does not count": (
        optax.apply_if_finite(optax.adam(HALVING), 3),
        adamjax.chain(
            adamjax.skip_not_finite(adamjax.scale_by_adam(eps=1e-8)),
            adamjax.scale_by_learning_rate(HALVING),
        ),
        2,
        "the schedule of the leaf 'a' counts .*put its scale_by_learning_rate inside",
    ),
    "an injected clip after the rule": (
        optax.chain(optax.adam(0.1), INJECT(optax.clip_by_global_norm)(1.0)),
        adamjax.chain(adamjax.clip_by_global_norm(1.0), adam_like_optax()),
        2,
        STEPS_DIFFER,
    ),
    "an injected clip before the rule": (
        optax.chain(INJECT(optax.clip)(1.0), optax.adam(0.1)),
        adamjax.chain(adam_like_optax(), adamjax.clip_by_value(1.0)),
        2,
        STEPS_DIFFER,
    ),
    "skipped micro-batches": (
        optax.apply_if_finite(multi_steps(optax.adam(0.1), 2), 3),
        adamjax.accumulate_gradients(adamjax.skip_not_finite(adam_like_optax()), 2),
        2,
        "optax skips micro-batches .*put skip_not_finite outside of accumulate_gradients",
    ),
    "skipped steps of micro-batches": (
        multi_steps(optax.apply_if_finite(optax.adam(0.1), 3), 2),
        adamjax.skip_not_finite(adamjax.accumulate_gradients(adam_like_optax(), 2)),
        2,
        "apply_if_finite is inside MultiSteps, whose sum keeps a NaN",
    ),
    "skipped steps of micro-batches, also in tx": (
        multi_steps(optax.apply_if_finite(optax.adam(0.1), 3), 2),
        adamjax.accumulate_gradients(adamjax.skip_not_finite(adam_like_optax()), 2),
        2,
        "apply_if_finite is inside MultiSteps, whose sum keeps a NaN",
    ),
    "schedules that count skipped steps of other leaves": (
        optax.multi_transform(
            {"x": SKIPS_ALL_BY_SCHEDULE[0], "y": SKIPS_RULE_BY_SCHEDULE[0]}, LABELS
        ),
        adamjax.partition([("a", SKIPS_RULE_BY_SCHEDULE[1])], default=SKIPS_ALL_BY_SCHEDULE[1]),
        2,
        "the schedule of the leaf 'a' counts .*scale_by_learning_rate inside skip_not_finite",
    ),
    "a decay before the rule": (
        INJECT(optax.adamw)(learning_rate=0.1, weight_decay=0.1),
        adamjax.chain(adamjax.add_decayed_weights(0.1), adam_like_optax()),
        2,
        STEPS_DIFFER,
    ),
}


def skip_without_schedules_of_decay(case):
    """In older versions of optax, only inject_hyperparams takes a schedule of a weight decay."""
    if case in ("a decay's schedule before the rule", "a decay with a schedule"):
        decay = optax.add_decayed_weights(HALVING)
        if not jax.tree.leaves(decay.init(TWO_LEAVES)):
            pytest.skip("this version of optax takes no schedule of a weight decay")


@pytest.mark.parametrize("case", CONTINUES_DIFFERENTLY)
def test_a_run_that_would_continue_differently_is_refused(case):
    skip_without_schedules_of_decay(case)
    theirs, ours, n, message = CONTINUES_DIFFERENTLY[case]
    with pytest.raises(ValueError, match=f"from_optax: .*{message}"):
        convert.from_optax(state_after(theirs, n), ours, TWO_LEAVES, theirs)
    with pytest.raises(ValueError, match=f"to_optax: .*{message}"):
        convert.to_optax(state_after(ours, n), ours, TWO_LEAVES, theirs)


def like_clipped_except(**changes):
    fields = {"eps": 1e-8, "weight_decay": 1e-4, **changes}
    return adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adamw(0.1, **fields))


# Transforms that differ from LIKE_CLIPPED in what no state shows.
DIFFERENT_STEPS = {
    "epsilon": like_clipped_except(eps=1e-7),
    "decay": like_clipped_except(weight_decay=2e-4),
    "mask": like_clipped_except(mask="a"),
    "rate": adamjax.chain(LIKE_CLIPPED, adamjax.scale(0.99)),
    "b1": like_clipped_except(b1=0.91),
    "b2": like_clipped_except(b2=0.998),
    "limit": adamjax.chain(adamjax.clip_by_global_norm(2.0), LIKE_CLIPPED.transforms[1]),
    "no clip": adamjax.adamw(0.1, eps=1e-8, weight_decay=1e-4),
    "order": adamjax.chain(
        adamjax.scale_by_adam(eps=1e-8),
        adamjax.clip_by_global_norm(1.0),
        adamjax.add_decayed_weights(1e-4),
        adamjax.scale_by_learning_rate(0.1),
    ),
}


@pytest.mark.parametrize("name", DIFFERENT_STEPS)
def test_differences_that_no_state_shows_are_refused(name):
    tx = DIFFERENT_STEPS[name]
    old = state_after(CLIPPED, 3)
    convert.from_optax(old, tx, TWO_LEAVES, check=False)
    with pytest.raises(
        ValueError, match=r"from_optax: in step \d+ from .* on, tx moves an element"
    ):
        convert.from_optax(old, tx, TWO_LEAVES, optimizer=CLIPPED)
    with pytest.raises(ValueError, match=r"to_optax: in step \d+ from .* on, tx moves an element"):
        convert.to_optax(state_after(tx, 3), tx, TWO_LEAVES, CLIPPED)


# For each case: the transforms of optax and adamjax. Their states do not show the difference, or
# show it only if the order of the transforms is known.
DIFFERENT_LATER_STEPS = {
    "micro-batches are clipped": (
        optax.chain(optax.clip_by_global_norm(1.0), multi_steps(optax.adam(0.1), 2)),
        adamjax.accumulate_gradients(
            adamjax.chain(adamjax.clip_by_global_norm(1.0), adam_like_optax()), 2
        ),
    ),
    "means of micro-batches are clipped": (
        multi_steps(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), 2),
        adamjax.chain(
            adamjax.clip_by_global_norm(1.0), adamjax.accumulate_gradients(adam_like_optax(), 2)
        ),
    ),
    "a schedule, much later": (optax.adam(DROP_AFTER_64), adam_like_optax(0.1)),
    "a clip of updates": (
        optax.chain(optax.scale_by_adam(), optax.clip(1.5), optax.scale(-0.1)),
        adam_like_optax(),
    ),
    "another schedule, much later": (
        optax.adam(lambda count: DROP_AFTER_64(count) * jnp.where(count > 3000, 0.1, 1)),
        adam_like_optax(DROP_AFTER_64),
    ),
    "a schedule of the second rule": (
        optax.chain(optax.adam(0.1), optax.scale(-1.0), optax.adam(DROP_AFTER_64)),
        adamjax.chain(adam_like_optax(0.1), adamjax.scale(-1.0), adam_like_optax(0.1)),
    ),
    "schedules before and after": (
        optax.chain(optax.scale_by_schedule(HALVING), optax.adam(DROP_AFTER_64)),
        adamjax.chain(
            adamjax.scale(-1.0),
            adamjax.scale_by_learning_rate(DROP_AFTER_64),
            adam_like_optax(HALVING),
        ),
    ),
    "epochs of other lengths": (
        optax.adam(lambda count: 0.1 * 0.1 ** (count // 390 // 30)),
        adam_like_optax(lambda count: 0.1 * 0.1 ** (count // 391 // 30)),
    ),
    "a drop of a schedule at another count": (
        optax.adam(optax.piecewise_constant_schedule(0.1, {100: 0.1})),
        adam_like_optax(optax.piecewise_constant_schedule(0.1, {90: 0.1})),
    ),
    "a rate of 0 in a few steps": (
        optax.adam(lambda count: jnp.where((count > 22) & (count < 27), 0.0, 0.1)),
        adam_like_optax(),
    ),
    "a schedule of b1": (INJECT(optax.adam)(0.1, b1=jump_at(50, 0.9, 0.5)), adam_like_optax()),
    "a schedule of a limit": (
        optax.chain(INJECTED_CLIP(jump_at(50, 1.0, 0.1)), optax.adam(0.1)),
        adamjax.chain(adamjax.clip_by_global_norm(1.0), adam_like_optax()),
    ),
    "a schedule of a small decay": (
        INJECT(optax.adamw)(0.1, weight_decay=jump_at(50, 1e-3, 2e-2)),
        adamjax.adamw(0.1, eps=1e-8, weight_decay=1e-3),
    ),
    "a clip at a rate of 0": (
        optax.chain(optax.clip(0.1), optax.adam(jump_at(50, 0.0, 0.1))),
        adam_like_optax(jump_at(50, 0.0, 0.1)),
    ),
    "b1 of a part at a rate of 0": (
        optax.multi_transform(
            {"x": optax.adam(jump_at(50, 0.0, 0.1)), "y": optax.adam(0.1)}, LABELS
        ),
        adamjax.partition(
            [("a", adamjax.adam(jump_at(50, 0.0, 0.1), 0.5, eps=1e-8))], default=adam_like_optax()
        ),
    ),
    "values of micro-batches are clipped": (
        optax.chain(optax.clip(2.0), multi_steps(optax.adam(0.1), 4)),
        adamjax.accumulate_gradients(
            adamjax.chain(adamjax.clip_by_value(2.0), adam_like_optax()), 4
        ),
    ),
    "a schedule of micro-batches": (
        optax.MultiSteps(optax.adam(0.1), jump_at(50, 2, 4)).gradient_transformation(),
        adamjax.accumulate_gradients(adam_like_optax(), 2),
    ),
    "a norm with a frozen leaf": (
        optax.chain(
            optax.clip_by_global_norm(20.0),
            optax.multi_transform({"x": optax.set_to_zero(), "y": optax.adam(0.1)}, LABELS),
        ),
        adamjax.partition(
            [("a", adamjax.set_to_zero())],
            default=adamjax.chain(adamjax.clip_by_global_norm(20.0), adam_like_optax()),
        ),
    ),
    "a condition on the step": (
        optax.chain(
            optax.conditionally_transform(optax.clip(0.1), lambda step: step < 50), optax.adam(0.1)
        ),
        adamjax.chain(
            optax.conditionally_transform(optax.clip(0.1), lambda step: step < 500),
            adam_like_optax(),
        ),
    ),
    "micro-batches are normalized": (
        optax.chain(optax.contrib.normalize(), multi_steps(optax.adam(0.1), 4)),
        adamjax.accumulate_gradients(
            adamjax.chain(optax.contrib.normalize(), adam_like_optax()), 4
        ),
    ),
    "means of micro-batches are normalized": (
        multi_steps(optax.chain(optax.contrib.normalize(), optax.adam(0.1)), 4),
        adamjax.chain(
            optax.contrib.normalize(), adamjax.accumulate_gradients(adam_like_optax(), 4)
        ),
    ),
    "the signs of micro-batches": (
        optax.chain(optax.scale_by_sign(), multi_steps(optax.adam(0.1), 3)),
        adamjax.accumulate_gradients(adamjax.chain(optax.scale_by_sign(), adam_like_optax()), 3),
    ),
    "another epsilon of another library's rule in a part": (
        optax.multi_transform({"x": optax.adam(0.1), "y": optax.rmsprop(0.1, eps=1e-8)}, LABELS),
        adamjax.partition([("a", adam_like_optax())], default=optax.rmsprop(0.1, eps=1e-5)),
    ),
    "a clip of the gradients of a scaled loss": (
        optax.chain(optax.scale(2**-15), optax.clip_by_global_norm(1.0), optax.adam(0.1)),
        adamjax.chain(adamjax.scale(2**-15), adam_like_optax()),
    ),
    "an epsilon after a decay of the gradients": (
        optax.chain(optax.add_decayed_weights(0.1), optax.adam(0.1, eps=1e-8)),
        adamjax.chain(adamjax.add_decayed_weights(0.1), adamjax.adam(0.1, eps=1e-9)),
    ),
    "a rate that a trainer sets for one part": (
        INJECT(
            lambda learning_rate: optax.multi_transform(
                {"x": optax.adam(learning_rate), "y": optax.adam(learning_rate)}, LABELS
            )
        )(learning_rate=0.1),
        adamjax.partition(
            [("a", adamjax.with_hyperparams(adam_like_optax(0.1), learning_rate=0.1))],
            default=adam_like_optax(0.1),
        ),
    ),
    "a rate by the count of the rule": (
        adam_with_rate_by_its_count(optax.piecewise_constant_schedule(0.1, {12_000: 0.1})),
        adam_like_optax(),
    ),
    "zeros for NaN in micro-batches": (
        optax.chain(optax.zero_nans(), multi_steps(optax.adam(0.1), 4)),
        adamjax.accumulate_gradients(adamjax.chain(optax.zero_nans(), adam_like_optax()), 4),
    ),
    "steps skipped because of other leaves": (
        optax.multi_transform(
            {"x": optax.apply_if_finite(optax.adam(0.1), 9)}, {"a": "x", "b": "x"}
        ),
        adamjax.partition(
            [("a", adamjax.skip_not_finite(adam_like_optax()))],
            default=adamjax.skip_not_finite(adam_like_optax()),
        ),
    ),
    "infinite gradients are clipped or skipped": (
        optax.chain(optax.clip(1.0), optax.apply_if_finite(optax.adam(0.1), 9)),
        adamjax.skip_not_finite(adamjax.chain(adamjax.clip_by_value(1.0), adam_like_optax())),
    ),
    "a counter of another library": (
        optax.chain(optax.adam(0.1), drops_after_calls(50)),
        adamjax.chain(adam_like_optax(), drops_after_calls(90)),
    ),
    "a tiny epsilon": (optax.adam(0.1, eps=1e-15), adamjax.adam(0.1, eps=1e-12)),
    "a decay of a part without a rule": (SGD_BESIDE_ADAM, LIKE_SGD_BESIDE_ADAM),
    "a decay without any rule": (SMALL_DECAY_SGD, adamjax.scale_by_learning_rate(0.1)),
    "the mask of a decay of a part without a rule": (
        optax.chain(
            optax.masked(optax.scale_by_adam(), {"a": True, "b": False}),
            optax.add_decayed_weights(1e-5, ONLY_A),
            optax.scale(-0.1),
        ),
        adamjax.chain(
            adamjax.masked(adamjax.scale_by_adam(eps=1e-8), "a"),
            adamjax.add_decayed_weights(1e-5),
            adamjax.scale(-0.1),
        ),
    ),
    "a decay before a momentum": (
        optax.multi_transform(
            {
                "x": optax.adam(0.1),
                "y": optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1, momentum=0.9)),
            },
            LABELS,
        ),
        adamjax.partition(
            [("a", adam_like_optax())],
            default=adamjax.chain(optax.trace(0.9), adamjax.scale_by_learning_rate(0.1)),
        ),
    ),
    "a later decay of a part without a rule": (
        optax.multi_transform(
            {
                "x": optax.adam(0.1),
                "y": optax.chain(INJECTED_DECAY(jump_at(50, 0.0, 1e-4)), optax.sgd(0.1)),
            },
            LABELS,
        ),
        LIKE_SGD_BESIDE_ADAM,
    ),
    "a decay in a step that is skipped": (
        optax.chain(
            optax.apply_if_finite(optax.scale_by_adam(), 9),
            optax.add_decayed_weights(0.02),
            optax.scale(-0.1),
        ),
        adamjax.skip_not_finite(
            adamjax.chain(
                adamjax.scale_by_adam(eps=1e-8),
                adamjax.add_decayed_weights(0.02),
                adamjax.scale(-0.1),
            )
        ),
    ),
    "an epsilon at a rate next to 0": (
        optax.adam(nearly_stops),
        adamjax.adam(nearly_stops, eps=1e-7),
    ),
    "a schedule of calls": (
        optax.chain(multi_steps(optax.adam(0.1), 2), optax.scale_by_schedule(DROP_AFTER_64)),
        adamjax.accumulate_gradients(
            adamjax.chain(
                adam_like_optax(),
                adamjax.scale(-1.0),
                adamjax.scale_by_learning_rate(DROP_AFTER_64),
            ),
            2,
        ),
    ),
}


def test_a_periodic_rate_by_the_count_of_the_moments_is_compared():
    theirs = adam_with_rate_by_its_count(lambda count: 0.1 + 0.05 * jnp.cos(count / 500 * jnp.pi))
    ours = adam_like_optax(0.15)
    old = theirs.init(TWO_LEAVES)
    old = old._replace(count=jnp.full_like(old.count, 1000))
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, ours, TWO_LEAVES, theirs)


def test_an_error_names_the_values_of_hyperparameters_that_differ():
    theirs = INJECT(optax.adam)(learning_rate=0.01)
    old = theirs.init(TWO_LEAVES)
    old.hyperparams["learning_rate"] = jnp.asarray(0.005)
    ours = adamjax.with_hyperparams(adam_like_optax(0.01), learning_rate=0.01)
    message = r"learning_rate is 0\.01 in the state of tx, and 0\.005 in that of optax: give both"
    with pytest.raises(ValueError, match=message):
        convert.from_optax(old, ours, TWO_LEAVES, theirs)


@pytest.mark.parametrize("name", DIFFERENT_LATER_STEPS)
def test_differences_in_later_steps_are_refused(name):
    theirs, ours = DIFFERENT_LATER_STEPS[name]
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(state_after(theirs, 4), ours, TWO_LEAVES, optimizer=theirs)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.to_optax(state_after(ours, 4), ours, TWO_LEAVES, theirs)


# --- steps that are the same ----------------------------------------------------------------------


CONTINUES_ALIKE = {
    "a product of factors": (
        optax.chain(optax.scale_by_adam(), INJECT(optax.scale)(0.5), INJECTED_RATE(0.1)),
        adamjax.chain(
            adamjax.scale_by_adam(eps=1e-8), adamjax.scale(0.5), adamjax.scale_by_learning_rate(0.1)
        ),
    ),
    "a factor after a rate": (
        optax.chain(INJECT(optax.adam)(learning_rate=0.1), INJECT(optax.scale)(0.5)),
        adamjax.chain(adam_like_optax(), adamjax.scale(0.5)),
    ),
    "a schedule after a rate": (
        optax.chain(INJECT(optax.adam)(learning_rate=0.1), optax.scale_by_schedule(HALVING)),
        adamjax.chain(
            adam_like_optax(), adamjax.scale(-1.0), adamjax.scale_by_learning_rate(HALVING)
        ),
    ),
    "a decay with a schedule": (
        optax.adamw(0.1, weight_decay=HALVING),
        adamjax.adamw(0.1, eps=1e-8, weight_decay=HALVING),
    ),
    "optax' schedule in our chain": (
        optax.adam(HALVING),
        adamjax.chain(
            adamjax.scale_by_adam(eps=1e-8), optax.scale_by_schedule(lambda c: -HALVING(c))
        ),
    ),
    "two schedules": (
        optax.chain(optax.adam(HALVING), optax.scale_by_schedule(HALVING)),
        adamjax.chain(
            adam_like_optax(HALVING), adamjax.scale(-1.0), adamjax.scale_by_learning_rate(HALVING)
        ),
    ),
    "an injected limit of values": (
        optax.chain(INJECT(optax.clip)(0.1), optax.adam(0.1)),
        adamjax.chain(adamjax.clip_by_value(0.1), adam_like_optax()),
    ),
    "skipped micro-batches": (
        optax.apply_if_finite(multi_steps(optax.adam(0.1), 2), 3),
        adamjax.skip_not_finite(adamjax.accumulate_gradients(adam_like_optax(), 2)),
    ),
    "nested accumulation after a step": (
        nested_multi_steps(optax.adam(0.1), 2, 2),
        nested_accumulation(2, 2),
    ),
}


@pytest.mark.parametrize("case", CONTINUES_ALIKE)
def test_a_run_that_continues_alike_is_converted(case, x64):
    skip_without_schedules_of_decay(case)
    theirs, ours = CONTINUES_ALIKE[case]
    params = jax.tree.map(lambda x: x.astype(float), TWO_LEAVES)
    old = state_after(theirs, 4, params)
    state = convert.from_optax(old, ours, params, theirs)
    back = convert.to_optax(state, ours, params, theirs)
    grads = jax.tree.map(lambda x: 0.5 * x, params)
    for _ in range(5):
        expected, old = theirs.update(grads, old, params)
        actual, state = ours.update(grads, state, params)
        after, back = theirs.update(grads, back, params)
        assert_close(actual, expected, rtol=1e-12)
        assert_close(after, expected, rtol=1e-12)


SAME_STEPS = {
    "another library's rule in a part": (
        optax.multi_transform({"x": optax.adam(0.1), "y": optax.lion(0.1)}, LABELS),
        adamjax.partition([("a", adam_like_optax())], default=optax.lion(0.1)),
    ),
    "micro-batches clipped by the size of weights": (
        optax.chain(optax.adaptive_grad_clip(0.01), multi_steps(optax.adam(0.1), 2)),
        adamjax.chain(
            optax.adaptive_grad_clip(0.01), adamjax.accumulate_gradients(adam_like_optax(), 2)
        ),
    ),
    "a rate and a factor that a trainer sets": (
        INJECT(optax.adam)(learning_rate=0.1),
        adamjax.with_hyperparams(
            adamjax.chain(adam_like_optax(0.1), adamjax.scale(1.0)), learning_rate=0.1, factor=1.0
        ),
    ),
    "signs of micro-batches": (
        optax.chain(optax.scale_by_sign(), multi_steps(optax.adam(0.1), 4)),
        adamjax.chain(optax.scale_by_sign(), adamjax.accumulate_gradients(adam_like_optax(), 4)),
    ),
    "clip and adamw": (CLIPPED, LIKE_CLIPPED),
    "a rate that falls to 0": (
        optax.adam(LINEAR_TO_0),
        adam_like_optax(adamjax.polynomial_decay(1e-3, 1000, 0.0)),
    ),
    "optax' schedule that falls to 0": (optax.adam(LINEAR_TO_0), adam_like_optax(LINEAR_TO_0)),
    "a rate that falls below 0 after the end": (
        optax.adam(lambda count: 1e-3 * (1 - count / 1000)),
        adam_like_optax(lambda count: 1e-3 * (1 - count / 1000)),
    ),
    "a schedule of another name": (
        INJECT(lambda lr: optax.adam(lr))(lr=DROP_AFTER_64),
        adam_like_optax(DROP_AFTER_64),
    ),
    "momentum in one part": (
        optax.multi_transform({"x": optax.adam(0.1), "y": optax.sgd(0.1, momentum=0.9)}, LABELS),
        adamjax.partition(
            [("a", adam_like_optax())],
            default=adamjax.chain(optax.trace(0.9), adamjax.scale_by_learning_rate(0.1)),
        ),
    ),
    "a mask of optax in both": (
        optax.chain(optax.masked(optax.trace(0.9), ONLY_A), optax.adam(0.1)),
        adamjax.chain(optax.masked(optax.trace(0.9), ONLY_A), adam_like_optax()),
    ),
    "a rate of 0 for frozen leaves": (
        optax.multi_transform({"x": optax.sgd(0.0), "y": optax.adam(0.1)}, LABELS),
        adamjax.partition([("a", adamjax.set_to_zero())], default=adam_like_optax()),
    ),
    "steps that only adamjax skips": (
        optax.adam(0.1),
        adamjax.skip_not_finite(adam_like_optax()),
    ),
    "MultiSteps": (
        multi_steps(CLIPPED, 4),
        adamjax.accumulate_gradients(LIKE_CLIPPED, 4),
    ),
    "apply_if_finite": (optax.apply_if_finite(CLIPPED, 9), adamjax.skip_not_finite(LIKE_CLIPPED)),
    "a schedule": (
        optax.adam(optax.cosine_decay_schedule(0.1, 100)),
        adam_like_optax(adamjax.cosine_decay(0.1, 100)),
    ),
    "a mask": (
        optax.masked(optax.adam(0.1), {"a": True, "b": False}),
        adamjax.masked(adam_like_optax(), "a"),
    ),
    "16 micro-batches": (
        multi_steps(CLIPPED, 16),
        adamjax.accumulate_gradients(LIKE_CLIPPED, 16),
    ),
    "exact_rows": (
        optax.adamw(0.1, weight_decay=0.1),
        adamjax.exact_rows(adamjax.adamw(0.1, eps=1e-8, weight_decay=0.1), "b"),
    ),
    "MultiSteps itself": (
        optax.MultiSteps(CLIPPED, 2),
        adamjax.accumulate_gradients(LIKE_CLIPPED, 2),
    ),
    "a schedule of a part without a rule": (
        optax.multi_transform({"x": optax.adam(0.1), "y": optax.sgd(DROP_AFTER_64)}, LABELS),
        adamjax.partition(
            [("a", adam_like_optax())], default=adamjax.scale_by_learning_rate(DROP_AFTER_64)
        ),
    ),
    "micro-batches of a part without a rule": (
        optax.multi_transform(
            {"x": optax.adam(0.1), "y": multi_steps(optax.sgd(DROP_AFTER_64), 2)}, LABELS
        ),
        adamjax.partition(
            [("a", adam_like_optax())],
            default=adamjax.accumulate_gradients(adamjax.scale_by_learning_rate(DROP_AFTER_64), 2),
        ),
    ),
    "one rate, and parts that use it differently": (
        RATE_OF_PARTS,
        adamjax.partition([("a", adam_like_optax(0.01))], default=adam_like_optax(0.1)),
    ),
    "an injected clip of some leaves": (
        optax.chain(optax.masked(INJECT(optax.clip)(0.1), ONLY_A), optax.adam(0.1)),
        adamjax.chain(adamjax.masked(adamjax.clip_by_value(0.1), "a"), adam_like_optax()),
    ),
    "a schedule that has ended": (
        optax.adam(optax.linear_schedule(0.0, 0.1, 3)),
        adam_like_optax(adamjax.constant(0.1)),
    ),
    "a product of schedules": (
        optax.chain(optax.adam(HALVING), optax.scale_by_schedule(DROP_AFTER_64)),
        adam_like_optax(lambda count: HALVING(count) * DROP_AFTER_64(count)),
    ),
    "a schedule of steps and one of calls": (
        optax.chain(multi_steps(optax.adam(HALVING), 2), optax.scale_by_schedule(DROP_AFTER_64)),
        adamjax.chain(
            adamjax.accumulate_gradients(adam_like_optax(HALVING), 2),
            adamjax.scale(-1.0),
            adamjax.scale_by_learning_rate(DROP_AFTER_64),
        ),
    ),
    "an injected adaptive clip": (
        optax.chain(INJECT(optax.adaptive_grad_clip)(0.1), optax.adam(0.1)),
        adamjax.chain(optax.adaptive_grad_clip(0.1), adam_like_optax()),
    ),
    "skips inside and outside": (
        optax.apply_if_finite(multi_steps(optax.apply_if_finite(optax.adam(0.1), 3), 2), 3),
        adamjax.skip_not_finite(
            adamjax.accumulate_gradients(adamjax.skip_not_finite(adam_like_optax()), 2)
        ),
    ),
    "two decays": (
        optax.chain(INJECTED_DECAY(0.1), INJECT(optax.adamw)(0.1, weight_decay=0.1)),
        adamjax.chain(
            adamjax.add_decayed_weights(0.1), adamjax.adamw(0.1, eps=1e-8, weight_decay=0.1)
        ),
    ),
    "a schedule of calls in the middle of a step": (
        multi_steps(optax.adam(HALVING), 2),
        adamjax.chain(
            adamjax.accumulate_gradients(adamjax.scale_by_adam(eps=1e-8), 2),
            adamjax.scale_by_learning_rate(lambda count: HALVING(count // 2)),
        ),
    ),
    "a number of micro-batches in the state": (
        multi_steps(optax.adam(0.1), 2),
        adamjax.with_hyperparams(adamjax.accumulate_gradients(adam_like_optax(), 2), steps=2),
    ),
    "a decay of a part without a rule": (
        SGD_BESIDE_ADAM,
        adamjax.partition(
            [("a", adam_like_optax())],
            default=adamjax.chain(
                adamjax.add_decayed_weights(1e-4), adamjax.scale_by_learning_rate(0.1)
            ),
        ),
    ),
    "a frozen part": (
        optax.multi_transform({"x": optax.set_to_zero(), "y": CLIPPED}, LABELS),
        adamjax.partition([("a", adamjax.set_to_zero())], default=LIKE_CLIPPED),
    ),
}


@pytest.mark.parametrize("name", SAME_STEPS)
def test_an_optimizer_that_takes_the_same_steps_is_accepted(name):
    theirs, ours = SAME_STEPS[name]
    state = convert.from_optax(state_after(theirs, 5), ours, TWO_LEAVES, optimizer=theirs)
    if name != "exact_rows":
        convert.to_optax(state, ours, TWO_LEAVES, theirs)


# --- optimizers whose steps cannot be compared ----------------------------------------------------


def test_an_optimizer_that_needs_more_arguments_cannot_be_compared():
    theirs, ours = (
        make(one, reduce_on_plateau(0.5))
        for make, one in ((optax.chain, optax.adam(0.1)), (adamjax.chain, adam_like_optax()))
    )
    old = state_after(theirs, 2, value=1.0)
    with pytest.raises(TypeError, match=r"steps cannot be compared.*'value'.*pass check=False"):
        convert.from_optax(old, ours, TWO_LEAVES, optimizer=theirs)
    convert.from_optax(old, ours, TWO_LEAVES, check=False)


def test_an_update_that_cannot_be_compiled_is_not_compared():
    theirs = optax.adam(lambda count: 0.1 if count < 100 else 0.01)
    ours = adam_like_optax(lambda count: 0.1 if count < 100 else 0.01)
    with pytest.raises(TypeError, match=r"cannot be compiled by jax\.jit .*jax\.numpy"):
        convert.from_optax(theirs.init(TWO_LEAVES), ours, TWO_LEAVES, theirs)


def test_accumulation_inside_another_library_is_refused():
    theirs = multi_steps(optax.adam(0.1), 16)
    ours = optax.chain(adamjax.accumulate_gradients(adamjax.adam(0.7, eps=1e-8), 16))
    for call in (
        lambda: convert.from_optax(theirs.init(TWO_LEAVES), ours, TWO_LEAVES, theirs),
        lambda: convert.to_optax(ours.init(TWO_LEAVES), ours, TWO_LEAVES, theirs),
    ):
        with pytest.raises(ValueError, match=r"hides how many calls a step takes: use adamjax\.ch"):
            call()


# --- micro-batches --------------------------------------------------------------------------------


def test_many_micro_batches_and_large_gradients_are_compared_too():
    theirs = multi_steps(optax.adam(0.01), 16)
    old = state_after(theirs, 16)
    for rate, n in ((0.1, 16), (0.01, 32)):
        ours = adamjax.accumulate_gradients(adam_like_optax(rate), n)
        with pytest.raises(ValueError, match=STEPS_DIFFER):
            convert.from_optax(old, ours, TWO_LEAVES, optimizer=theirs)
    large = jax.tree.map(lambda x: 1e6 * x, TWO_LEAVES)
    theirs = optax.chain(optax.clip_by_global_norm(1e5), optax.adam(0.1))
    old = theirs.update(large, theirs.init(TWO_LEAVES), TWO_LEAVES)[1]
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, adam_like_optax(), TWO_LEAVES, optimizer=theirs)
    # A large decay does not hide another b1.
    theirs = optax.adamw(0.1, weight_decay=1.0)
    ours = adamjax.adamw(0.1, 0.92, eps=1e-8, weight_decay=1.0)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(state_after(theirs, 3), ours, TWO_LEAVES, optimizer=theirs)
    theirs = optax.apply_if_finite(optax.adam(0.1), 9)
    skips = adamjax.skip_not_finite(adam_like_optax())
    ours = adamjax.partition([("a", skips)], default=skips)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(state_after(theirs, 3), ours, TWO_LEAVES, optimizer=theirs)


@pytest.mark.parametrize("ends", [(300, 379), (1000, 1899)])
@pytest.mark.slow
def test_ends_of_schedules_are_compared_with_many_micro_batches_too(ends):
    theirs = multi_steps(optax.adam(optax.piecewise_constant_schedule(0.1, {ends[0]: 0.1})), 32)
    for end, is_same in ((ends[0] - 1, True), (ends[1], False)):
        rate = adamjax.piecewise_constant([end], [0.1, 0.01])
        ours = adamjax.accumulate_gradients(adam_like_optax(rate), 32)
        with nullcontext() if is_same else pytest.raises(ValueError, match=STEPS_DIFFER):
            convert.from_optax(state_after(theirs, 33), ours, TWO_LEAVES, optimizer=theirs)


@pytest.mark.slow
def test_sums_of_micro_batches_in_the_middle_of_a_step_are_refused():
    """MultiSteps(use_grad_mean=False) stores sums where it usually stores means."""
    theirs = optax.MultiSteps(optax.adam(0.1), 4, use_grad_mean=False).gradient_transformation()
    ours = adamjax.accumulate_gradients(adamjax.chain(adamjax.scale(4.0), adam_like_optax()), 4)
    small = jax.tree.map(lambda x: 1e-5 * x, TWO_LEAVES)
    old, new = theirs.init(TWO_LEAVES), ours.init(TWO_LEAVES)
    refused = pytest.raises(ValueError, match=r"use_grad_mean=False.*convert after a step")
    for micro in (1, 3):  # The sum of one gradient is its mean.
        while int(old.mini_step) < micro:
            old, new = (
                theirs.update(small, old, TWO_LEAVES)[1],
                ours.update(small, new, TWO_LEAVES)[1],
            )
        with refused if micro > 1 else nullcontext():
            convert.from_optax(old, ours, TWO_LEAVES, optimizer=theirs)
    with refused:
        convert.to_optax(new, ours, TWO_LEAVES, theirs)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("boundary", [30_000, 40_000])
def test_boundaries_of_functions_are_compared_with_many_micro_batches_too(native, boundary):
    """They show only in the program of an update; with so many calls, other counts are few."""

    def schedule(count):
        return optax.piecewise_constant_schedule(1e-3, {count: 0.1})

    theirs = multi_steps(optax.adam(schedule(30_000)), 64)
    rate = (
        adamjax.piecewise_constant([boundary - 1], [1e-3, 1e-4]) if native else schedule(boundary)
    )
    ours = adamjax.accumulate_gradients(adam_like_optax(rate), 64)
    refused = pytest.raises(ValueError, match=STEPS_DIFFER)
    with nullcontext() if boundary == 30_000 else refused:
        convert.from_optax(theirs.init(TWO_LEAVES), ours, TWO_LEAVES, theirs)


def test_the_last_of_many_boundaries_is_compared_with_many_micro_batches_too():
    counts = [1000 * i for i in range(1, 21)]
    theirs = multi_steps(
        optax.adam(optax.piecewise_constant_schedule(1e-3, dict.fromkeys(counts, 0.8))), 32
    )
    boundaries = [count - 1 for count in [*counts[:-1], counts[-1] + 4000]]
    rate = adamjax.piecewise_constant(boundaries, [1e-3 * 0.8**i for i in range(21)])
    ours = adamjax.accumulate_gradients(adam_like_optax(rate), 32)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(theirs.init(TWO_LEAVES), ours, TWO_LEAVES, theirs)


@pytest.mark.slow
def test_parts_with_micro_batches_of_their_own_take_as_many_calls_as_one_part():
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    theirs = optax.multi_transform(
        {"a": multi_steps(optax.adam(0.1), 8), "b": multi_steps(optax.adam(0.2), 8)},
        {"a": "a", "b": "b"},
    )
    parts = {
        name: adamjax.accumulate_gradients(adam_like_optax(rate), 8)
        for name, rate in (("a", 0.1), ("b", 0.2))
    }
    ours = adamjax.partition(parts)
    assert PairedSteps(AdamjaxState("test", ours, ours.init(params), params), theirs).calls == 8
    convert.from_optax(theirs.init(params), ours, params, optimizer=theirs)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(
            theirs.init(params),
            adamjax.partition({"a": parts["b"], "b": parts["b"]}),
            params,
            optimizer=theirs,
        )


@pytest.mark.parametrize("exact", [False, True])
def test_max_rows_of_an_accumulation_is_compared_without_row_gradients(exact):
    params = {"table": jnp.ones((30, 2)), "w": jnp.ones(3)}
    theirs = multi_steps(optax.adam(0.1), 4)

    def ours(rate):
        tx = adam_like_optax(rate)
        tx = adamjax.exact_rows(tx, "table") if exact else tx
        return adamjax.accumulate_gradients(tx, 4, max_rows={"table": 5})

    old = state_after(theirs, 8, params)
    state = convert.from_optax(old, ours(0.1), params, theirs)
    assert jax.tree.structure(state) == jax.tree.structure(ours(0.1).init(params))
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, ours(0.11), params, theirs)


# --- epsilons, decays and clips -------------------------------------------------------------------


def state_of_small_rows(theirs, params, steps):
    """A state after gradients that are 10 times as small in each row as in the row before."""
    sizes = 10.0 ** -jnp.arange(len(params["table"]))[:, None]

    def step(i, state):
        signs = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (8, 4))
        return theirs.update({"table": sizes * signs}, state, params)[1]

    return jax.jit(lambda: jax.lax.fori_loop(0, steps, step, theirs.init(params)))()


@pytest.mark.parametrize(
    ("theirs", "ours", "steps"),
    [(optax.nadam, adamjax.nadam, 600), (optax.amsgrad, adamjax.amsgrad, 14_500)],
)
def test_an_epsilon_that_matters_for_rows_with_small_gradients_only_is_compared(
    theirs, ours, steps
):
    params = {"table": jnp.ones((8, 4))}
    old = state_of_small_rows(theirs(0.01), params, steps)
    convert.from_optax(old, ours(0.01, eps=1e-8), params, optimizer=theirs(0.01))
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, ours(0.01, eps=1e-7), params, optimizer=theirs(0.01))


# For each case: the transform of optax, and a function of epsilon that makes that of adamjax.
RULES_BY_EPSILON = {
    "nadam": (optax.nadam(0.01), lambda eps: adamjax.nadam(0.01, eps=eps)),
    "adamax": (optax.adamax(0.01), lambda eps: adamjax.adamax(0.01, eps=eps)),
    "amsgrad": (optax.amsgrad(0.01, b2=0.9), lambda eps: adamjax.amsgrad(0.01, b2=0.9, eps=eps)),
    "adam beside nadam": (
        optax.multi_transform({"x": optax.adam(0.01), "y": optax.nadam(0.01)}, LABELS),
        lambda eps: adamjax.partition(
            [("a", adamjax.adam(0.01, eps=eps))], default=adamjax.nadam(0.01, eps=1e-8)
        ),
    ),
    "micro-batches of adamax": (
        multi_steps(optax.adamax(0.01, b2=0.9), 2),
        lambda eps: adamjax.accumulate_gradients(adamjax.adamax(0.01, b2=0.9, eps=eps), 2),
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * ("micro-batches" in name))
        for name in RULES_BY_EPSILON
    ],
)
def test_an_epsilon_that_large_moments_of_a_late_state_hide_is_compared(name):
    theirs, ours = RULES_BY_EPSILON[name]
    old = jax.jit(
        lambda: jax.lax.fori_loop(
            0,
            1_201,
            lambda i, state: theirs.update(TWO_LEAVES, state, TWO_LEAVES)[1],
            theirs.init(TWO_LEAVES),
        )
    )()
    state = convert.from_optax(old, ours(1e-8), TWO_LEAVES, optimizer=theirs)
    convert.to_optax(state, ours(1e-8), TWO_LEAVES, theirs)
    other = ours(1e-7)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, other, TWO_LEAVES, optimizer=theirs)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.to_optax(state, other, TWO_LEAVES, theirs)


@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-8])
def test_an_epsilon_is_compared_closely_before_the_first_step(eps):
    theirs = optax.adam(0.1, eps=eps)
    old = theirs.init(TWO_LEAVES)
    convert.from_optax(old, adamjax.adam(0.1, eps=eps), TWO_LEAVES, theirs)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, adamjax.adam(0.1, eps=1.05 * eps), TWO_LEAVES, theirs)


def test_a_large_rtol_does_not_hide_the_decay_of_adamax():
    theirs = optax.adamax(0.01, b2=0.99)
    old = state_after(theirs, 7)
    convert.from_optax(old, adamjax.adamax(0.01, b2=0.99, eps=1e-8), TWO_LEAVES, theirs, rtol=0.05)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(
            old, adamjax.adamax(0.01, b2=0.9995, eps=1e-8), TWO_LEAVES, theirs, rtol=0.05
        )


def test_a_slightly_different_decay_of_the_maximum_of_adamax_is_refused():
    theirs, old = optax.adamax(0.01), state_after(optax.adamax(0.01), 3)
    convert.from_optax(old, adamjax.adamax(0.01, eps=1e-8), TWO_LEAVES, theirs)
    for b2 in (0.99895, 0.99905):
        with pytest.raises(ValueError, match=r"00 steps without gradients, on, tx moves"):
            convert.from_optax(old, adamjax.adamax(0.01, eps=1e-8, b2=b2), TWO_LEAVES, theirs)


def test_a_b2_near_1_is_no_false_alarm():
    theirs, ours = optax.adam(0.01, b2=0.99999), adamjax.adam(0.01, b2=0.99999, eps=1e-8)
    convert.from_optax(state_after(theirs, 30), ours, TWO_LEAVES, optimizer=theirs)
    other = adamjax.adam(0.01, b2=0.99998, eps=1e-8)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(state_after(theirs, 30), other, TWO_LEAVES, optimizer=theirs)
    # With a b2 even nearer to 1, a rate that is off by 1% is refused.
    theirs, ours = optax.adam(0.01, b2=0.9999999), adamjax.adam(0.0101, b2=0.9999999, eps=1e-8)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(state_after(theirs, 30), ours, TWO_LEAVES, optimizer=theirs)


def test_a_clip_of_gradients_larger_than_any_before_is_compared():
    params = {"table": jnp.ones((8, 4))}
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.nadam(0.01))
    old = theirs.init(params)
    for _ in range(600):
        old = theirs.update({"table": jnp.full((8, 4), 1e-5)}, old, params)[1]
    ours = adamjax.nadam(0.01, eps=1e-8)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, ours, params, optimizer=theirs)
    ours = adamjax.chain(adamjax.clip_by_global_norm(1.0), ours)
    convert.from_optax(old, ours, params, optimizer=theirs)


@pytest.mark.parametrize("limit", [3.5, 6.5])
def test_a_clip_of_directions_that_are_as_large_as_they_can_be_is_compared(limit):
    theirs = optax.chain(optax.scale_by_adam(), optax.clip(limit), optax.scale(-0.1))
    right = adamjax.chain(
        adamjax.scale_by_adam(eps=1e-8),
        adamjax.clip_by_value(limit),
        adamjax.scale_by_learning_rate(0.1),
    )
    old = state_after(theirs, 20)
    convert.from_optax(old, right, TWO_LEAVES, theirs)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, adam_like_optax(), TWO_LEAVES, theirs)


WARMUP_TO_1_PERCENT = optax.warmup_cosine_decay_schedule(0.0, 0.01, 1000, 10_000)
ROWS = {"rows": jnp.ones((20_000, 16))}


@pytest.mark.parametrize(
    ("clip", "our_clip", "rate", "params"),
    [
        (optax.clip(0.015), adamjax.clip_by_value(0.015), WARMUP_TO_1_PERCENT, TWO_LEAVES),
        (optax.clip(0.3), adamjax.clip_by_value(0.3), "injected", TWO_LEAVES),
        (
            optax.clip_by_global_norm(3.0),
            adamjax.clip_by_global_norm(3.0),
            WARMUP_TO_1_PERCENT,
            ROWS,
        ),
        (optax.clip_by_global_norm(1.2), adamjax.clip_by_global_norm(1.2), 1e-3, ROWS),
        (optax.clip_by_global_norm(3.0), adamjax.clip_by_global_norm(3.0), "injected", ROWS),
    ],
    ids=["at_the_peak", "raised", "norm_at_the_peak", "norm_of_large_leaves", "norm_if_raised"],
)
def test_a_clip_of_updates_that_are_as_large_as_rates_allow_is_compared(
    clip, our_clip, rate, params
):
    if rate == "injected":
        adam = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
        ours = adamjax.with_hyperparams(adam_like_optax(1e-3), learning_rate=1e-3)
    else:
        adam, ours = optax.adam(rate), adam_like_optax(rate)
    theirs, right = optax.chain(adam, clip), adamjax.chain(ours, our_clip)
    old = state_after(theirs, 3, params)
    convert.from_optax(old, right, params, theirs)
    with pytest.raises(ValueError, match=STEPS_DIFFER + "|clip the norm"):
        convert.from_optax(old, ours, params, theirs)
    with pytest.raises(ValueError, match=STEPS_DIFFER + "|clip the norm"):
        convert.from_optax(state_after(adam, 3, params), right, params, adam)


def test_a_leaf_without_elements_is_compared_with_a_schedule():
    params = {"w": jnp.ones((2, 3)), "empty": jnp.ones((0, 3))}
    theirs = optax.adam(WARMUP_TO_1_PERCENT)
    old = state_after(theirs, 3, params)
    state = convert.from_optax(old, adam_like_optax(WARMUP_TO_1_PERCENT), params, theirs)
    assert adamjax.step_count(state) == 3


def test_frozen_leaves_inside_a_clip_are_no_false_alarm():
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    parts = {"w": optax.adam(0.1), "b": optax.set_to_zero()}
    theirs = optax.multi_transform(parts, {"w": "w", "b": "b"})
    theirs = optax.chain(optax.clip_by_global_norm(1.0), theirs)
    part = adamjax.partition([("w", adam_like_optax())], default=adamjax.set_to_zero())
    ours = adamjax.chain(adamjax.clip_by_global_norm(1.0), part)
    old = state_after(theirs, 3, params)
    state = convert.from_optax(old, ours, params, theirs)
    assert_same(convert.to_optax(state, ours, params, theirs), old)
    others = [
        adamjax.chain(adamjax.clip_by_global_norm(1.05), part),
        adamjax.partition([("w", LIKE_CLIPPED)], default=adamjax.set_to_zero()),
    ]
    for other in others:
        with pytest.raises(ValueError, match=STEPS_DIFFER):
            convert.from_optax(old, other, params, theirs)


# --- schedules, counters and rates ----------------------------------------------------------------


# Where a transform of another library may have its counter.
STATES_WITH_A_COUNTER = {
    "a class in a class": lambda count: CallsState(CallsState(count)),
    "a dictionary": lambda count: {"inner": {"count": count}},
    "a list": lambda count: [count],
    "an array": lambda count: count,
    "a dataclass": lambda count: Counter(count=count),
}


@chex.dataclass
class Counter:
    count: jax.Array


@pytest.mark.parametrize("where", STATES_WITH_A_COUNTER)
def test_a_counter_of_another_library_is_converted_wherever_it_is(where):
    def with_adam(adam, calls):
        return [adam, drops_after_calls(calls, STATES_WITH_A_COUNTER[where]), optax.scale(-0.1)]

    theirs = optax.chain(*with_adam(optax.scale_by_adam(), 50))
    ours, other = (
        adamjax.chain(*with_adam(adamjax.scale_by_adam(eps=1e-8), calls)) for calls in (50, 60)
    )
    old = state_after(theirs, 3)
    state = convert.from_optax(old, ours, TWO_LEAVES, optimizer=theirs)
    assert_same(state[1], old[1])
    assert_same(convert.to_optax(state, ours, TWO_LEAVES, theirs), old)
    for refused in (
        lambda: convert.from_optax(old, other, TWO_LEAVES, optimizer=theirs),
        lambda: convert.to_optax(state, other, TWO_LEAVES, theirs),
    ):
        with pytest.raises(ValueError, match=STEPS_DIFFER):
            refused()


class drops_after(Transform):
    """The transform of `drops_after_calls`, of a user's own in adamjax."""

    calls: int = 50
    where: Any = static(default=None)

    def init(self, params):
        return self.where(jnp.zeros((), jnp.int32))

    def update(self, updates, state, params=None, **extra_args):
        (count,) = jax.tree.leaves(state)
        factor = jnp.where(count < self.calls, 1.0, 0.1)
        return jax.tree.map(lambda u: factor * u, updates), self.where(count + 1)


@pytest.mark.parametrize("where", STATES_WITH_A_COUNTER)
def test_a_counter_of_a_users_own_transform_is_converted_and_compared(where):
    make_state = STATES_WITH_A_COUNTER[where]
    theirs = optax.chain(optax.adam(0.1), drops_after_calls(90, make_state))
    right, wrong = (
        adamjax.chain(adam_like_optax(), drops_after(calls, make_state)) for calls in (90, 50)
    )
    old = state_after(theirs, 7)
    state = convert.from_optax(old, right, TWO_LEAVES, theirs)
    assert [int(x) for x in jax.tree.leaves(state[-1])] == [7]
    assert_same(convert.to_optax(state, right, TWO_LEAVES, theirs), old)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, wrong, TWO_LEAVES, theirs)
    adam = optax.adam(0.1)
    with pytest.raises(ValueError, match=r"the source has no .* of these shapes"):
        convert.from_optax(state_after(adam, 7), wrong, TWO_LEAVES, adam)


@pytest.mark.parametrize("zero", [0, np.int32(0), np.zeros(1, np.int32)])
def test_a_counter_of_another_library_is_advanced_whatever_integer_it_is(zero):
    drops = drops_after_calls(50)
    drops = drops._replace(init=lambda params: CallsState(zero))
    theirs = optax.chain(optax.adam(0.1), drops)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(
            theirs.init(TWO_LEAVES),
            adamjax.chain(adam_like_optax(), drops_after_calls(90)._replace(init=drops.init)),
            TWO_LEAVES,
            theirs,
        )


@pytest.mark.parametrize("steps", [1, 4])
def test_a_rate_that_falls_below_0_much_later_hides_no_earlier_difference(steps):
    """After that, adamjax makes NaN, so nothing is compared. Schedules count steps, not calls."""

    def falling(count):
        return 0.01 * (1 - count / 200)

    theirs = optax.adam(lambda count: falling(count) * jnp.where(count < 120, 1.0, 0.3))
    ours, right = adam_like_optax(falling), optax.adam(falling)
    if steps > 1:
        theirs, right = (multi_steps(tx, steps) for tx in (theirs, right))
        ours = adamjax.accumulate_gradients(ours, steps)
    convert.from_optax(state_after(right, 8), ours, TWO_LEAVES, right)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(state_after(theirs, 8), ours, TWO_LEAVES, theirs)


def test_a_rate_that_falls_below_0_in_a_part_with_another_count_hides_nothing():
    def falling(count):
        return 0.01 * (1 - count / 1000)

    labels = {"a": "a", "b": "b"}
    drop = optax.piecewise_constant_schedule(0.1, {5050: 0.1})
    theirs = optax.multi_transform({"a": optax.adam(drop), "b": optax.adam(falling)}, labels)
    ours = adamjax.partition([("a", adam_like_optax())], default=adam_like_optax(falling))
    old = state_after(theirs, 7)
    part = old.inner_states["a"]
    late = jax.tree.map(lambda x: x * 0 + 5000 if x.dtype == jnp.int32 else x, part)
    old = old._replace(inner_states={**old.inner_states, "a": late})
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, ours, TWO_LEAVES, theirs)


def starts_at(count):
    return jnp.where(count < 100, 0.0, 1.0)


# For each case: the transforms of optax and adamjax for a leaf. All updates are the same at first,
# but the moments are not.
DIFFERENT_MOMENTS = {
    "a delayed gradient and a delayed rate": (
        optax.chain(optax.scale_by_schedule(starts_at), optax.adam(0.1)),
        adam_like_optax(lambda count: 0.1 * starts_at(count)),
    ),
    "a delayed rate and a delayed gradient": (
        optax.adam(lambda count: 0.1 * starts_at(count)),
        adamjax.chain(
            adamjax.scale(-1.0), adamjax.scale_by_learning_rate(starts_at), adam_like_optax()
        ),
    ),
    "a factor of gradients that drops": (
        optax.chain(
            optax.scale_by_schedule(optax.piecewise_constant_schedule(1.0, {1000: 0.1})),
            optax.adam(0.1),
        ),
        adam_like_optax(),
    ),
    "a b2 that changes": (
        optax.inject_hyperparams(optax.adam)(
            0.1, b2=lambda count: jnp.where(count < 300, 0.999, 0.9999)
        ),
        adam_like_optax(),
    ),
}


@pytest.mark.parametrize("name", DIFFERENT_MOMENTS)
def test_moments_are_compared_where_updates_do_not_show_a_difference(name):
    theirs, ours = DIFFERENT_MOMENTS[name]
    for a, b in ((theirs, ours), (optax.adam(0.1), adam_like_optax())):
        both = (
            optax.multi_transform({"a": a, "b": optax.adam(0.1)}, {"a": "a", "b": "b"}),
            adamjax.partition([("a", b)], default=adam_like_optax()),
        )
        if a is not theirs:
            convert.from_optax(both[0].init(TWO_LEAVES), both[1], TWO_LEAVES, both[0])
            continue
        with pytest.raises(ValueError, match=STEPS_DIFFER):
            convert.from_optax(both[0].init(TWO_LEAVES), both[1], TWO_LEAVES, both[0])
        with pytest.raises(ValueError, match=STEPS_DIFFER):
            convert.to_optax(both[1].init(TWO_LEAVES), both[1], TWO_LEAVES, both[0])


def test_a_leaf_that_starts_later_is_no_false_alarm():
    theirs, _ = DIFFERENT_MOMENTS["a delayed gradient and a delayed rate"]
    _, ours = DIFFERENT_MOMENTS["a delayed rate and a delayed gradient"]
    convert.from_optax(state_after(theirs, 50), ours, TWO_LEAVES, theirs)


def test_a_rate_far_above_the_one_that_was_set_hides_no_epsilon():
    theirs = optax.inject_hyperparams(optax.adam)(learning_rate=1.0, eps=1e-5)
    old = after_small_gradients(theirs, 20)
    old = old._replace(hyperparams={**old.hyperparams, "learning_rate": jnp.float32(1e-6)})
    right, wrong = (
        adamjax.with_hyperparams(adamjax.adam(1e-6, eps=eps), learning_rate=1e-6)
        for eps in (1e-5, 1e-8)
    )
    convert.from_optax(old, right, TWO_LEAVES, theirs)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, wrong, TWO_LEAVES, theirs)


def test_a_rate_that_was_set_in_the_state_of_optax_is_compared():
    theirs = INJECT(optax.adam)(learning_rate=0.1)
    old = state_after(theirs, 3)
    old.hyperparams["learning_rate"] = jnp.asarray(0.03)
    convert.from_optax(old, adam_like_optax(0.03), TWO_LEAVES, optimizer=theirs)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, adam_like_optax(0.1), TWO_LEAVES, optimizer=theirs)


@pytest.mark.parametrize("warmup", [0, 1_000])
def test_a_linear_schedule_near_its_end_is_no_false_alarm(warmup):
    theirs = optax.linear_schedule(3e-4, 0.0, 10_000)
    ours = adamjax.polynomial_decay(3e-4, 10_000, 0.0)
    if warmup:
        rises = optax.linear_schedule(0.0, 3e-4, warmup)
        theirs, ours = optax.join_schedules([rises, theirs], [warmup]), adamjax.warmup(ours, warmup)
    theirs, ours = optax.adam(theirs), adam_like_optax(ours)
    count = 9_985 + warmup
    old = jax.tree.map(lambda x: x + count if x.dtype == jnp.int32 else x, state_after(theirs, 3))
    convert.from_optax(old, ours, TWO_LEAVES, theirs)


@pytest.mark.parametrize("count", [200, pytest.param(250, marks=pytest.mark.slow)])
def test_a_momentum_after_the_end_of_a_linear_schedule_is_no_false_alarm(count):
    # When compiled, the schedule of optax ends at some 1e-7 of its first rate, not at 0.
    theirs = optax.adam(optax.linear_schedule(1e-3, 0.0, 200))
    ours = adam_like_optax(adamjax.polynomial_decay(1e-3, 200, 0.0))
    old = jax.tree.map(
        lambda x: x + count - 3 if x.dtype == jnp.int32 else x, state_after(theirs, 3)
    )
    convert.from_optax(old, ours, TWO_LEAVES, theirs)


@pytest.mark.parametrize("first_rate", [0.0, pytest.param(1e-8, marks=pytest.mark.slow)])
def test_what_a_warmup_hides_in_its_first_step_is_compared_later(first_rate):
    rate = optax.warmup_cosine_decay_schedule(first_rate, 0.01, 100, 1_000)
    theirs = optax.adam(rate, eps=1e-9)
    old = theirs.init(TWO_LEAVES)
    convert.from_optax(old, adamjax.adam(rate, eps=1e-9), TWO_LEAVES, theirs)
    for different in ({"b2": 0.99895, "eps": 1e-9}, {"eps": 0.95e-9}):
        with pytest.raises(ValueError, match=STEPS_DIFFER):
            convert.from_optax(old, adamjax.adam(rate, **different), TWO_LEAVES, theirs)


def test_optimizers_with_a_rate_of_0_that_is_set_later_are_compared():
    theirs = optax.inject_hyperparams(optax.adamw)(0.0, weight_decay=0.1)

    def ours(rate=0.0, weight_decay=0.1, **others):
        tx = adamjax.adamw(rate, eps=1e-8, weight_decay=weight_decay, **others)
        return adamjax.with_hyperparams(tx, learning_rate=rate)

    old = state_after(theirs, 3)
    state = convert.from_optax(old, ours(), TWO_LEAVES, theirs)
    assert float(state.hyperparams["learning_rate"]) == 0
    convert.to_optax(state, ours(), TWO_LEAVES, theirs)
    for different in ({"weight_decay": 0.3}, {"b1": 0.91}, {"b2": 0.9989}):
        with pytest.raises(ValueError, match=r"with a rate of 0\.01 in place of 0, on, tx moves"):
            convert.from_optax(old, ours(**different), TWO_LEAVES, theirs)
    message = (
        "rate is 0 in a state .*nothing can be compared: build both optimizers with the same rate"
    )
    with pytest.raises(ValueError, match=message):
        convert.from_optax(old, adamjax.adamw(0.0, eps=1e-8, weight_decay=0.1), TWO_LEAVES, theirs)
    # Leaves that a rate of 0 freezes in both optimizers are accepted.
    frozen = optax.adam(0.0)
    convert.from_optax(state_after(frozen, 3), adam_like_optax(0.0), TWO_LEAVES, frozen)


def with_injected_zeros(make):
    """A transform of optax with a rate and a decay in its state, both 0."""
    return optax.inject_hyperparams(make)(learning_rate=0.0, weight_decay=0.0)


LATER_FACTOR = optax.scale_by_schedule(lambda count: jnp.where(count < 500, 1.0, 0.1))


# For each case: the transform of optax, a function that makes that of adamjax, the arguments with
# which both take the same steps, and the hyperparameters that are 0 in the state.
HIDDEN_BY_ZEROS = {
    "a mask": (
        with_injected_zeros(
            lambda learning_rate, weight_decay: optax.adamw(
                learning_rate, weight_decay=weight_decay, mask={"a": True, "b": False}
            )
        ),
        lambda **masks: adamjax.adamw(0.0, eps=1e-8, weight_decay=0.0, **masks),
        {"mask": "a"},
        ("learning_rate", "weight_decay"),
    ),
    "a later schedule": (
        optax.chain(
            optax.scale_by_adam(),
            LATER_FACTOR,
            optax.inject_hyperparams(optax.scale_by_learning_rate)(learning_rate=0.0),
        ),
        lambda factors=(): adamjax.chain(
            adamjax.scale_by_adam(eps=1e-8), *factors, adamjax.scale_by_learning_rate(0.0)
        ),
        {"factors": [LATER_FACTOR]},
        ("learning_rate",),
    ),
}


@pytest.mark.parametrize("name", HIDDEN_BY_ZEROS)
def test_what_a_rate_or_a_decay_of_0_hides_is_compared(name):
    theirs, make, right, names = HIDDEN_BY_ZEROS[name]
    old, zeros = state_after(theirs, 2), dict.fromkeys(names, 0.0)
    convert.from_optax(old, adamjax.with_hyperparams(make(**right), **zeros), TWO_LEAVES, theirs)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, adamjax.with_hyperparams(make(), **zeros), TWO_LEAVES, theirs)


def test_a_rate_of_nan_in_a_state_is_refused():
    theirs = optax.inject_hyperparams(optax.adam)(float("nan"))
    with pytest.raises(ValueError, match=r"no update of the optimizer of optax is finite"):
        convert.from_optax(theirs.init(TWO_LEAVES), adam_like_optax(), TWO_LEAVES, theirs)


def test_a_rate_that_is_infinite_at_a_count_in_the_past_hides_nothing():
    def rate(count):
        return 1e-3 * jnp.sqrt(1_000 / count)

    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    old = jax.tree.map(lambda x: x + 10_000 if x.ndim == 0 else x, theirs.init(TWO_LEAVES))
    rule = adam_like_optax(rate)
    convert.from_optax(
        old, adamjax.chain(adamjax.clip_by_global_norm(1.0), rule), TWO_LEAVES, optimizer=theirs
    )
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, rule, TWO_LEAVES, optimizer=theirs)


def after_small_gradients(tx, n):
    """The state after n steps with gradients of 0.01."""
    grads, state = jax.tree.map(lambda p: 0.01 * p, TWO_LEAVES), tx.init(TWO_LEAVES)
    for _ in range(n):
        _, state = tx.update(grads, state, TWO_LEAVES)
    return state


# For each case: the rates of optax and of adamjax for a leaf without a rule, and the steps before.
RATES_WITHOUT_RULE = {
    "a drop": (optax.piecewise_constant_schedule(0.1, {1000: 0.1}), 0.1, 20),
    "a cosine and a constant": (optax.cosine_decay_schedule(0.1, 1000), 0.1, 3),
    "a longer cosine": (
        optax.cosine_decay_schedule(0.1, 1000),
        adamjax.cosine_decay(0.1, 1500),
        5,
    ),
}


@pytest.mark.parametrize("name", RATES_WITHOUT_RULE)
def test_a_later_rate_of_a_leaf_without_a_rule_is_compared(name):
    schedule, rate, steps = RATES_WITHOUT_RULE[name]
    theirs = optax.multi_transform(
        {"a": optax.adam(0.1), "b": optax.sgd(schedule)}, {"a": "a", "b": "b"}
    )
    ours = adamjax.partition(
        [("b", adamjax.scale_by_learning_rate(rate))], default=adam_like_optax()
    )
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(after_small_gradients(theirs, steps), ours, TWO_LEAVES, theirs)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.to_optax(after_small_gradients(ours, steps), ours, TWO_LEAVES, theirs)


@pytest.mark.parametrize("last_step", [89, 90])
def test_a_drop_of_a_leaf_without_a_rule_is_compared_to_the_step(last_step):
    """optax takes the first count with the new rate, adamjax the last one with the old rate."""
    rate = optax.piecewise_constant_schedule(0.1, {90: 0.5})
    theirs = optax.multi_transform({"x": optax.adam(0.1), "y": optax.sgd(rate)}, LABELS)
    drop = adamjax.scale_by_learning_rate(adamjax.piecewise_constant([last_step], [0.1, 0.05]))
    ours = adamjax.partition([("a", adam_like_optax())], default=drop)
    refused = pytest.raises(ValueError, match=STEPS_DIFFER)
    with nullcontext() if last_step == 89 else refused:
        convert.from_optax(theirs.init(TWO_LEAVES), ours, TWO_LEAVES, theirs)


def test_a_leaf_without_a_rule_near_the_end_of_a_schedule_is_no_false_alarm():
    theirs = optax.multi_transform(
        {"a": optax.adam(0.1), "b": optax.sgd(optax.linear_schedule(0.1, 0.0, 100))},
        {"a": "a", "b": "b"},
    )
    rate = adamjax.polynomial_decay(0.1, 100, 0.0)
    ours = adamjax.partition(
        [("b", adamjax.scale_by_learning_rate(rate))], default=adam_like_optax()
    )
    convert.from_optax(after_small_gradients(theirs, 97), ours, TWO_LEAVES, theirs)


@pytest.mark.parametrize("clip", ["global norm", "adaptive"])
def test_a_momentum_without_a_rule_after_the_end_of_a_schedule_is_no_false_alarm(clip):
    """The rate ends at 0 but for rounding; before, it multiplied a momentum of many gradients."""
    rate, momentum = optax.linear_schedule(1e-2, 0.0, 200), optax.trace(0.9)
    theirs = optax.multi_transform(
        {"x": optax.adam(0.1), "y": optax.chain(momentum, optax.scale_by_learning_rate(rate))},
        LABELS,
    )
    end = adamjax.scale_by_learning_rate(adamjax.polynomial_decay(1e-2, 200, 0.0))
    ours = adamjax.partition([("a", adam_like_optax())], default=adamjax.chain(momentum, end))
    if clip == "adaptive":
        their_clip = our_clip = optax.adaptive_grad_clip(0.1)
    else:
        their_clip, our_clip = optax.clip_by_global_norm(1.0), adamjax.clip_by_global_norm(1.0)
    theirs, ours = optax.chain(their_clip, theirs), adamjax.chain(our_clip, ours)
    old = after_small_gradients(theirs, 400)
    convert.from_optax(old, ours, TWO_LEAVES, theirs)


# --- weights and gradients ------------------------------------------------------------------------


def test_a_step_from_the_parameters_themselves_is_compared_too():
    """Weights that are 0 may stay 0, as those of a pruned model do."""

    def keep_zeros(updates, params):
        return jax.tree.map(lambda u, p: jnp.where(p == 0, 0, u), updates, params)

    params = {"w": jnp.array([1.0, 0.0, -2.0])}
    adam = optax.adam(0.1)
    theirs = optax.chain(adam, optax.stateless(keep_zeros))
    old = state_after(theirs, 4, params)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, adam_like_optax(), params, optimizer=theirs)
    ours = adamjax.chain(adam_like_optax(), optax.stateless(keep_zeros))
    convert.from_optax(old, ours, params, optimizer=theirs)


def test_steps_from_weights_of_both_signs_are_compared():
    params = {"a": jnp.ones((4, 3)), "scale": jnp.asarray(0.5)}
    positive = optax.masked(optax.keep_params_nonnegative(), {"a": False, "scale": True})
    theirs = optax.chain(optax.adam(0.1), positive)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(theirs.init(params), adam_like_optax(), params, theirs)


def test_a_later_rate_of_weights_that_stay_nonnegative_is_compared():
    """Negative weights would move to 0, by much more than the rate."""
    params = {"a": jnp.linspace(0.1, 1, 64)}
    positive = optax.keep_params_nonnegative()
    theirs = optax.chain(optax.adam(jump_at(50, 1e-5, 1e-5)), positive)
    old = state_after(theirs, 4, params)
    for later_rate, refused in ((1e-5, False), (1.1e-5, True)):
        ours = adamjax.chain(adam_like_optax(jump_at(50, 1e-5, later_rate)), positive)
        with pytest.raises(ValueError, match=STEPS_DIFFER) if refused else nullcontext():
            convert.from_optax(old, ours, params, theirs)


def test_a_sum_over_replicas_is_compared_as_that_of_one_replica():
    theirs = optax.adam(0.1)
    old = state_after(theirs, 4)
    ours = adamjax.chain(adamjax.sum_over("replicas"), adam_like_optax())
    state = convert.from_optax(old, ours, TWO_LEAVES, theirs)
    assert_same(adamjax.get_slot(state, "m"), old[0].mu)
    faster = adamjax.chain(adamjax.sum_over("replicas"), adam_like_optax(0.2))
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, faster, TWO_LEAVES, theirs)


def test_a_row_without_a_gradient_after_the_first_step_is_compared():
    adam = optax.adam(0.1)

    def lazy_update(grads, state, params=None):
        updates, state = adam.update(grads, state, params)
        return jax.tree.map(lambda u, g: jnp.where(g != 0, u, 0), updates, grads), state

    theirs = optax.GradientTransformation(adam.init, lazy_update)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(theirs.init(TWO_LEAVES), adam_like_optax(), TWO_LEAVES, theirs)


# --- many leaves and scalars ----------------------------------------------------------------------


@pytest.mark.slow
def test_the_update_of_many_leaves_is_traced_once():
    params = {str(i): jnp.ones(4) for i in range(40)}
    theirs, ours = optax.adam(LINEAR_TO_0), adam_like_optax(LINEAR_TO_0)
    traces = []
    counted = optax.GradientTransformation(
        theirs.init, lambda *args: (traces.append(0), theirs.update(*args))[1]
    )
    convert.from_optax(theirs.init(params), ours, params, optimizer=counted)
    assert len(traces) == 1


MANY_LEAVES = {**{f"layer_{i}": jnp.ones(2) for i in range(40)}, "scale": jnp.ones(())}


def with_frozen_scale(tx):
    labels = {name: name if name == "scale" else "layer" for name in MANY_LEAVES}
    return optax.multi_transform({"scale": optax.set_to_zero(), "layer": tx}, labels)


@pytest.mark.parametrize("what", ["skip", "norm"])
def test_one_of_many_leaves_that_affects_the_others_is_compared(what):
    if what == "skip":
        theirs = optax.apply_if_finite(with_frozen_scale(optax.adam(0.1)), 9)
        wrapped = adamjax.skip_not_finite
    else:
        theirs = optax.chain(optax.clip_by_global_norm(1.0), with_frozen_scale(optax.adam(0.1)))

        def wrapped(tx):
            return adamjax.chain(adamjax.clip_by_global_norm(1.0), tx)

    def frozen(tx):
        return adamjax.partition([("scale", adamjax.set_to_zero())], default=tx)

    old, rule = state_after(theirs, 3, MANY_LEAVES), adam_like_optax()
    convert.from_optax(old, wrapped(frozen(rule)), MANY_LEAVES, theirs)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, frozen(wrapped(rule)), MANY_LEAVES, theirs)


def test_scalars_with_narrow_momentum_are_no_false_alarm():
    """The gradients in m may nearly cancel, and then its rounding errors are relatively large."""
    params = {"w": jnp.ones((16, 16)), "temperature": jnp.ones(())}
    theirs = optax.adam(0.01, mu_dtype=jnp.bfloat16)
    ours = adamjax.adam(0.01, eps=1e-8, m_dtype="bfloat16")
    rng = np.random.default_rng(0)
    for _ in range(3):
        old = theirs.init(params)
        for _ in range(20):
            grads = jax.tree.map(
                lambda x: jnp.asarray(rng.normal(size=x.shape), jnp.float32), params
            )
            old = theirs.update(grads, old, params)[1]
        convert.from_optax(old, ours, params, optimizer=theirs)


@pytest.mark.slow
def test_scalars_beside_bfloat16_weights_are_no_false_alarm():
    """optax clips them by a norm that it computes in bfloat16."""
    params = {"w": jnp.ones((8, 8), jnp.bfloat16), "gain": jnp.ones(())}
    theirs = multi_steps(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)), 2)
    ours = adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adam(0.01, eps=1e-8))
    ours = adamjax.accumulate_gradients(ours, 2)
    rng = np.random.default_rng(0)
    for steps in (21, 22):
        old = theirs.init(params)
        for _ in range(steps):
            grads = jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), params)
            old = theirs.update(grads, old, params)[1]
        convert.from_optax(old, ours, params, optimizer=theirs)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_scalar_whose_decay_and_momentum_nearly_cancel_is_no_false_alarm(dtype):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    params = {
        "a": {"kernel": normal(3, 5), "bias": jnp.zeros(5)},
        "b": {"kernel": normal(5, 2), "bias": jnp.zeros(2)},
        "logit_scale": jnp.ones(()),
    }
    # Updates nearly cancel with the first decay for float32 momentum, with the second for bfloat16.
    for decay in (5.01e-4, 1e-3):
        theirs = optax.adamw(1e-3, mu_dtype=dtype, weight_decay=decay)
        ours = adamjax.adamw(1e-3, eps=1e-8, m_dtype=dtype, weight_decay=decay)
        old = theirs.init(params)
        for _ in range(5):
            grads = jax.tree.map(lambda x: 0.1 * normal(*x.shape), params)
            old = theirs.update(grads, old, params)[1]
        convert.from_optax(old, ours, params, optimizer=theirs)
        other = adamjax.adamw(1e-3, eps=1e-8, m_dtype=dtype, weight_decay=1.2 * decay)
        with pytest.raises(ValueError, match=STEPS_DIFFER):
            convert.from_optax(old, other, params, optimizer=theirs)


def test_many_scalars_and_micro_batches_of_float16_are_no_false_alarm():
    params = {f"s{i:03d}": jnp.ones(()) for i in range(150)}
    theirs = optax.adam(1e-3)
    convert.from_optax(
        state_after(theirs, 3, params), adam_like_optax(1e-3), params, optimizer=theirs
    )
    params = {"b": jnp.ones((4, 3), jnp.float16)}
    theirs = multi_steps(optax.adam(0.01, eps=1e-4), 2)
    ours = adamjax.accumulate_gradients(adamjax.adam(0.01, eps=1e-4), 2)
    old = state_after(theirs, 8, params)
    convert.from_optax(old, ours, params, optimizer=theirs)
    with jax.debug_nans(True):
        convert.from_optax(state_after(CLIPPED, 3), LIKE_CLIPPED, TWO_LEAVES, optimizer=CLIPPED)


# --- narrow dtypes --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_steps_in_narrow_dtypes_are_compared_closely(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), TWO_LEAVES)
    theirs, ours = optax.adam(0.1), adam_like_optax()
    old = state_after(theirs, 3, params)
    convert.from_optax(old, ours, params, optimizer=theirs)
    # Steps are compared in float32.
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, adam_like_optax(0.102), params, optimizer=theirs)


def test_a_wide_leaf_beside_a_narrow_one_is_compared_closely():
    for dtype in (jnp.bfloat16, jnp.float16):
        params = {**TWO_LEAVES, "narrow": jnp.ones(2, dtype)}
        theirs = optax.adam(0.1, eps=1e-4)
        old = state_after(theirs, 3, params)
        convert.from_optax(old, adamjax.adam(0.1, eps=1e-4), params, theirs)
        for ours in (adamjax.adam(0.105, eps=1e-4), adamjax.adam(0.1, eps=1e-3)):
            with pytest.raises(ValueError, match=STEPS_DIFFER):
                convert.from_optax(old, ours, params, theirs)


def test_a_wide_leaf_beside_a_frozen_narrow_one_is_compared_closely():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones((2, 3))}

    def theirs(rate):
        return optax.multi_transform({"x": optax.set_to_zero(), "y": optax.adam(rate)}, LABELS)

    def ours(rate):
        return adamjax.partition([("a", adamjax.set_to_zero())], default=adam_like_optax(rate))

    old = state_after(theirs(0.01), 3, params)
    convert.from_optax(old, ours(0.01), params, theirs(0.01))
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, ours(0.01008), params, theirs(0.01))


OPTAX_VERSION = tuple(map(int, optax.__version__.split(".")[:3]))


TAKES_OTHER_DTYPES = pytest.mark.skipif(
    OPTAX_VERSION < (0, 2, 6), reason="MultiSteps of older releases takes no step in other dtypes"
)


@pytest.mark.parametrize(
    "steps", [1, pytest.param(2, marks=[pytest.mark.slow, TAKES_OTHER_DTYPES])]
)
def test_wide_weights_with_narrow_moments_are_compared_closely(steps):
    theirs = optax.adam(DROP_AFTER_64, mu_dtype=jnp.bfloat16)
    later = adamjax.piecewise_constant([66], [0.1, 0.01])
    all_ours = [
        adam_like_optax(rate)
        for rate in (DROP_AFTER_64, lambda count: 1.005 * DROP_AFTER_64(count), later)
    ]
    all_ours.append(adamjax.adamw(DROP_AFTER_64, eps=1e-8, weight_decay=1e-6))
    if steps > 1:
        theirs = multi_steps(theirs, steps)
        all_ours = [adamjax.accumulate_gradients(tx, steps) for tx in all_ours]
    old = state_after(theirs, 3)
    right, *others = all_ours
    convert.from_optax(old, right, TWO_LEAVES, theirs)
    for ours in others:
        with pytest.raises(ValueError, match=STEPS_DIFFER):
            convert.from_optax(old, ours, TWO_LEAVES, theirs)


def test_hyperparameters_that_optax_rounds_are_compared_less_closely():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones((2, 3))}
    # optax multiplies all updates by a rate in the dtype of the first leaf, 0.1001 in bfloat16.
    theirs = optax.chain(optax.scale_by_adam(), INJECTED_RATE(0.1))
    narrow = {**params, "b": jnp.ones((2, 3), jnp.bfloat16)}
    for one in (params, narrow):
        convert.from_optax(state_after(theirs, 3, one), adam_like_optax(), one, theirs)
    for one in (params, narrow):
        with pytest.raises(ValueError, match=STEPS_DIFFER):
            convert.from_optax(state_after(theirs, 3, one), adam_like_optax(0.2), one, theirs)


@pytest.mark.parametrize("max_norm", [10.0, 50.0])
def test_a_clip_of_float16_gradients_with_rounded_hyperparameters_is_compared(max_norm):
    params = {"a": jnp.ones((4, 3), jnp.float16), "b": jnp.ones(3, jnp.float16)}
    clip, rule = optax.clip_by_global_norm(max_norm), optax.inject_hyperparams(optax.adam)
    theirs = optax.chain(clip, rule(learning_rate=1e-3, eps=1e-4))
    rule = adamjax.adam(1e-3, np.float16(0.9), np.float16(0.999), eps=1e-4)
    clipped = adamjax.chain(adamjax.clip_by_global_norm(max_norm), rule)
    ours, right = (adamjax.with_hyperparams(tx, learning_rate=1e-3) for tx in (rule, clipped))
    old = state_after(theirs, 5, params)
    convert.from_optax(old, right, params, theirs)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, ours, params, theirs)


def test_a_mask_that_depends_on_the_dtypes_of_leaves_is_compared():
    params = {**TWO_LEAVES, "narrow": jnp.ones(2, jnp.bfloat16)}
    is_wide = functools.partial(jax.tree.map, lambda p: p.dtype == jnp.float32)
    theirs = optax.adamw(0.01, weight_decay=0.3, mask=is_wide)
    old = state_after(theirs, 3, params)
    for mask, is_right in (("^(?!narrow)", True), (True, False)):
        ours = adamjax.adamw(0.01, eps=1e-8, weight_decay=0.3, mask=mask)
        with nullcontext() if is_right else pytest.raises(ValueError, match=STEPS_DIFFER):
            convert.from_optax(old, ours, params, theirs)


# --- large leaves ---------------------------------------------------------------------------------


# `table` has a weak type.
LARGE = {"table": jnp.full((9_000, 8), 1.0), "rows": jnp.ones((8_000, 9)), "b": jnp.ones(3)}


def sampled_rows(theirs, ours, params):
    """The number of rows of each leaf in the sample; `None` if whole leaves take all steps."""
    state = initial_state("test", ours, params)
    sample = sampled(state, theirs, theirs.init(params))
    return None if sample is None else [len(p) for p in sample[0].params.values()]


def test_a_sample_of_the_rows_of_large_leaves_is_compared():
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01, weight_decay=0.3))
    tables = ["table", "rows"]

    def ours(eps):
        rule = adamjax.adamw(0.01, eps=eps, weight_decay=0.3)
        return adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.exact_rows(rule, tables))

    # Leaves of different shapes have samples of different shapes.
    assert sampled_rows(theirs, ours(1e-8), LARGE) == [3, 1_822, 2_049]
    old = state_after(theirs, 2, LARGE)
    state = convert.from_optax(old, ours(1e-8), LARGE, theirs)
    assert_same(convert.to_optax(state, ours(1e-8), LARGE, theirs), old)
    for call in (
        lambda: convert.from_optax(old, ours(1e-7), LARGE, theirs),
        lambda: convert.to_optax(state, ours(1e-7), LARGE, theirs),
    ):
        with pytest.raises(ValueError, match=STEPS_DIFFER):
            call()


@pytest.mark.parametrize("steps", [1, 3])
def test_one_row_of_a_large_leaf_that_only_one_optimizer_moves_is_refused(steps):
    freeze_row = optax.stateless(lambda u, p=None: {**u, "table": u["table"].at[7_777].set(0)})
    theirs, ours = optax.chain(optax.adam(0.1), freeze_row), adam_like_optax()
    if steps > 1:
        theirs = multi_steps(theirs, steps)
        ours = adamjax.accumulate_gradients(ours, steps)
    assert sampled_rows(theirs, ours, LARGE)
    with pytest.raises(ValueError, match=r"in a step of the whole leaf 'table', tx moves"):
        convert.from_optax(theirs.init(LARGE), ours, LARGE, theirs)


def test_one_row_of_a_large_leaf_without_a_rule_that_only_optax_moves_is_refused():
    freeze_row = optax.stateless(lambda u, p=None: {**u, "table": u["table"].at[7_777].set(0)})
    labels = {"table": "sgd", "rows": "adam", "b": "adam"}
    theirs = optax.multi_transform({"adam": optax.adam(0.1), "sgd": optax.sgd(0.1)}, labels)
    ours = adamjax.chain(
        adamjax.partition(
            [("table", adamjax.scale_by_learning_rate(0.1))], default=adam_like_optax()
        ),
        freeze_row,
    )
    with pytest.raises(ValueError, match=r"in a step of the whole leaf 'table', tx moves"):
        convert.from_optax(theirs.init(LARGE), ours, LARGE, theirs)


SGDR_PERIOD = {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 2, "decay_steps": 6}


# For each case: a schedule (or None for a rate in the state), and the steps before the conversion.
NEXT_RATE_IS_0 = {
    "a warm-up": (optax.linear_schedule(0.0, 0.1, 9), 0),
    "a restart": (optax.sgdr_schedule([SGDR_PERIOD, SGDR_PERIOD]), 6),
    "a rate that is set": (None, 2),
}


@pytest.mark.parametrize("name", NEXT_RATE_IS_0)
def test_one_row_that_only_one_optimizer_moves_is_refused_even_if_the_next_rate_is_0(name):
    rate, steps = NEXT_RATE_IS_0[name]

    def without_row(g, p=None):
        return {**g, "table": g["table"].at[8_990].set(0)}

    for before, is_right in (([], True), ([optax.stateless(without_row)], False)):
        if rate is None:
            ours = adamjax.with_hyperparams(adam_like_optax(0.0), learning_rate=0.0)
            theirs = optax.inject_hyperparams(
                lambda learning_rate, before=before: optax.chain(*before, optax.adam(learning_rate))
            )(learning_rate=0.0)
        else:
            ours, theirs = adam_like_optax(rate), optax.chain(*before, optax.adam(rate))
        assert sampled_rows(theirs, ours, LARGE)
        message = r"in a step of the whole leaf 'table', tx moves"
        with nullcontext() if is_right else pytest.raises(ValueError, match=message):
            convert.from_optax(state_after(theirs, steps, LARGE), ours, LARGE, theirs)


@pytest.mark.parametrize("what", ["mask", "rate"])
def test_all_rows_are_compared_if_steps_depend_on_the_number_of_rows(what):
    if what == "mask":
        is_small = functools.partial(jax.tree.map, lambda p: p.size < 72_000)
        theirs = optax.adamw(0.01, weight_decay=0.3, mask=is_small)
        right = adamjax.adamw(0.01, eps=1e-8, weight_decay=0.3, mask="^b$")
    else:
        by_rows = optax.stateless(lambda u, p=None: jax.tree.map(lambda x: x / len(x), u))
        theirs = optax.chain(optax.adam(90.0), by_rows)
        rates = adamjax.by_path([("table", 0.01), ("rows", 90 / 8_000)], default=30.0)
        right = adamjax.adam(rates, eps=1e-8)
    assert sampled_rows(theirs, right, LARGE) is None
    old = theirs.init(LARGE)
    convert.from_optax(old, right, LARGE, theirs)
    wrong = adamjax.adamw(0.01, eps=1e-8, weight_decay=0.3)
    with pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(old, wrong, LARGE, theirs)


@pytest.mark.parametrize("has_schedule", [True, False])
def test_all_rows_are_compared_if_steps_depend_on_the_positions_of_rows(has_schedule):
    """A sample might have frozen rows only."""

    def old_rows_frozen(u, p=None):
        is_old = (jnp.arange(len(u["table"])) < 8_990)[:, None]
        return {**u, "table": jnp.where(is_old, 0, u["table"])}

    frozen, rate = optax.stateless(old_rows_frozen), optax.cosine_decay_schedule(0.1, 100)
    theirs = optax.chain(optax.adam(rate), frozen)
    ours = adamjax.chain(adam_like_optax(rate if has_schedule else 0.1), frozen)
    assert sampled_rows(theirs, ours, LARGE) is None
    with nullcontext() if has_schedule else pytest.raises(ValueError, match=STEPS_DIFFER):
        convert.from_optax(theirs.init(LARGE), ours, LARGE, theirs)


def test_a_mask_of_the_largest_leaf_is_compared():
    def is_largest(tree):
        most = max(x.size for x in jax.tree.leaves(tree))
        return jax.tree.map(lambda x: x.size == most, tree)

    params = {"a": jnp.ones((10_000, 8)), "b": jnp.ones((7_000, 8))}
    theirs = optax.adamw(0.01, weight_decay=0.3, mask=is_largest)
    for mask, is_right in (("a", True), ("b", False)):
        ours = adamjax.adamw(0.01, eps=1e-8, weight_decay=0.3, mask=mask)
        assert sampled_rows(theirs, ours, params)
        with nullcontext() if is_right else pytest.raises(ValueError, match=STEPS_DIFFER):
            convert.from_optax(theirs.init(params), ours, params, theirs)


def test_micro_batches_of_a_large_leaf_are_no_false_alarm():
    params = {"w": jnp.ones(300_000)}
    theirs = optax.MultiSteps(CLIPPED, 4).gradient_transformation()
    old = state_after(theirs, 4, params)
    convert.from_optax(old, adamjax.accumulate_gradients(LIKE_CLIPPED, 4), params, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_tables_that_are_split_over_devices_are_sampled(kind):
    code = f"""
        import adamjax, jax, jax.numpy as jnp, optax
        from jax.sharding import AxisType, NamedSharding, PartitionSpec

        mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.{kind},))
        rows = NamedSharding(mesh, PartitionSpec("d", None))
        params = {{"table": jax.device_put(jnp.ones((20_000, 4)), rows), "w": jnp.ones(3)}}
        theirs, grads = optax.adam(0.1), jax.tree.map(jnp.ones_like, params)
        _, old = theirs.update(grads, theirs.init(params), params)
        ours = adamjax.adam(0.1, eps=1e-8)
        state = adamjax.convert.from_optax(old, ours, params, theirs)
        assert state[0].m["table"].sharding.is_equivalent_to(rows, 2)
        try:
            adamjax.convert.from_optax(old, adamjax.adam(0.2, eps=1e-8), params, theirs)
        except ValueError as error:
            assert "compare their clips" in str(error), error
        else:
            raise AssertionError
        """
    run_on_devices(2, textwrap.dedent(code))
