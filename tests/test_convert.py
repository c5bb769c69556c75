"""Runs that change their optimizer in the middle, against the one they started with.

Ten steps are taken by one system, its state is converted, and twenty more are taken by both, really
running the packages. What the two do is the same arithmetic in another order, so trajectories are
compared in float64, to 1e-12 of the largest weight: a slot in the wrong place, a count that is off
by one or an epsilon of the other form is seen at 1e-3 to 1e-8. In float32, where systems differ by
how they compute the bias correction, a few runs are compared to what that rounds off.
"""

import functools
import inspect
import os
import re
import textwrap
from contextlib import nullcontext
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close, assert_same, enable_x64, run_on_devices

import adamjax
from adamjax import convert
from adamjax.convert.adamjax_state import AdamjaxState, initial_state
from adamjax.convert.paired_steps import PairedSteps
from adamjax.convert.sampling import sampled
from adamjax.data import transform_state
from adamjax.transform import Rule, Transform

BEFORE, AFTER = 10, 20
RATE = 0.0625  # a float32, as which Keras keeps it

SHAPES = {"embed": {"table": (6, 3)}, "head": {"bias": (4,), "kernel": (3, 4)}}
PATHS = ["embed/table", "head/bias", "head/kernel"]
# For a torch optimizer before its first step, which shows neither orders nor transpositions.
FRESH = {"order": PATHS, "adapt": lambda path, x: x}


def is_shape(x):
    return isinstance(x, tuple)


def new_params(dtype=np.float64, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: jnp.asarray(rng.normal(size=s), dtype), SHAPES, is_leaf=is_shape)


def noise(steps=BEFORE + AFTER, dtype=np.float64, seed=1):
    rng = np.random.default_rng(seed)
    return [
        jax.tree.map(lambda s: np.asarray(rng.normal(size=s), dtype), SHAPES, is_leaf=is_shape)
        for _ in range(steps)
    ]


def gradient(p, n):
    """Of a bowl, and noise: later steps feel the earlier ones through the weights."""
    return 0.5 * p + n


@functools.cache
def step_of(tx, apply):
    @jax.jit
    def step(params, state, n):
        updates, state = tx.update(jax.tree.map(gradient, params, n), state, params)
        return apply(params, updates), state

    return step


def taken(tx, params, state, noises, apply=optax.apply_updates):
    """The parameters after each step, and the state after the last."""
    visited = []
    for n in noises:
        params, state = step_of(tx, apply)(params, state, n)
        visited.append(params)
    return visited, state


def ours_taken(tx, params, state, noises):
    return taken(tx, params, state, noises, adamjax.apply_updates)


@functools.cache
def pair(name):
    """The transforms of this name, the same each time: compiled once."""
    return tuple(make() for make in OPTAX[name])


@pytest.fixture
def x64():
    with enable_x64(True):
        yield


# --- optax ----------------------------------------------------------------------------------------


def falling(count):
    return RATE / (1 + 0.1 * count)


def is_head(tree):
    return {"embed": {"table": False}, "head": {"bias": True, "kernel": True}}


def is_embed(tree):
    return jax.tree.map(lambda flag: not flag, is_head(tree))


def micro_batches(tx, steps=4):
    # By default newer versions accumulate in float32, older ones in the dtype of the parameters.
    known = "accumulator_dtype" in inspect.signature(optax.MultiSteps.__init__).parameters
    kept = {"accumulator_dtype": np.float64} if known else {}
    return optax.MultiSteps(tx, steps, **kept).gradient_transformation()


def labels(tree):
    return {"embed": {"table": "rows"}, "head": {"bias": "rest", "kernel": "rest"}}


OPTAX = {
    "adam": (lambda: optax.adam(RATE), lambda: adamjax.adam(RATE, eps=1e-8)),
    "adam, an epsilon that matters": (
        lambda: optax.adam(RATE, b1=0.8, b2=0.95, eps=1e-2),
        lambda: adamjax.adam(RATE, 0.8, 0.95, eps=1e-2),
    ),
    "clip, adamw, schedule": (
        lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(falling, weight_decay=0.1)),
        lambda: adamjax.chain(
            adamjax.clip_by_global_norm(1.0), adamjax.adamw(falling, eps=1e-8, weight_decay=0.1)
        ),
    ),
    "a decay that masks": (
        lambda: optax.adamw(RATE, weight_decay=0.1, mask=is_head),
        lambda: adamjax.adamw(RATE, eps=1e-8, weight_decay=0.1, mask="^head"),
    ),
    "masked": (
        lambda: optax.chain(
            optax.masked(optax.adam(falling), is_head), optax.masked(optax.scale(-0.1), is_embed)
        ),
        lambda: adamjax.chain(
            adamjax.masked(adamjax.adam(falling, eps=1e-8), "^head"),
            adamjax.masked(adamjax.scale(-0.1), "^embed"),
        ),
    ),
    "multi_transform": (
        lambda: optax.multi_transform(
            {"rows": optax.adam(falling), "rest": optax.adamw(RATE, weight_decay=0.1)}, labels
        ),
        lambda: adamjax.partition(
            [("^embed", adamjax.adam(falling, eps=1e-8))],
            default=adamjax.adamw(RATE, eps=1e-8, weight_decay=0.1),
        ),
    ),
    "multi_transform into one chain": (
        lambda: optax.multi_transform({"rows": optax.adam(RATE), "rest": optax.adam(0.03)}, labels),
        lambda: adamjax.adam(adamjax.by_path([("^embed", RATE)], default=0.03), eps=1e-8),
    ),
    "inject_hyperparams": (
        lambda: optax.inject_hyperparams(optax.adamw)(falling, b1=0.8, weight_decay=0.1),
        lambda: adamjax.adamw(falling, 0.8, eps=1e-8, weight_decay=0.1),
    ),
    "inject_hyperparams into with_hyperparams": (
        lambda: optax.inject_hyperparams(optax.adam)(RATE, b1=0.75),
        lambda: adamjax.with_hyperparams(adamjax.adam(0.5, eps=1e-8), learning_rate=RATE, b1=0.75),
    ),
    "MultiSteps": (
        lambda: micro_batches(optax.adam(falling)),
        lambda: adamjax.accumulate_gradients(adamjax.adam(falling, eps=1e-8), 4),
    ),
    "a schedule of calls after MultiSteps": (
        lambda: optax.chain(
            micro_batches(optax.scale_by_adam()), optax.scale_by_learning_rate(falling)
        ),
        lambda: adamjax.chain(
            adamjax.accumulate_gradients(adamjax.scale_by_adam(eps=1e-8), 4),
            adamjax.scale_by_learning_rate(falling),
        ),
    ),
    "MultiSteps of one part": (
        lambda: optax.multi_transform(
            {"rows": micro_batches(optax.adam(falling)), "rest": optax.adam(falling)}, labels
        ),
        lambda: adamjax.partition(
            {"^embed": adamjax.accumulate_gradients(adamjax.adam(falling, eps=1e-8), 4)},
            default=adamjax.adam(falling, eps=1e-8),
        ),
    ),
    "MultiSteps of several parts": (  # of which one has just taken a step
        lambda: optax.multi_transform(
            {
                "rows": micro_batches(optax.adam(falling), 5),
                "rest": micro_batches(optax.adam(falling)),
            },
            labels,
        ),
        lambda: adamjax.partition(
            {"^embed": adamjax.accumulate_gradients(adamjax.adam(falling, eps=1e-8), 5)},
            default=adamjax.accumulate_gradients(adamjax.adam(falling, eps=1e-8), 4),
        ),
    ),
    "apply_if_finite": (
        lambda: optax.apply_if_finite(optax.adam(RATE), 5),
        lambda: adamjax.skip_not_finite(adamjax.adam(RATE, eps=1e-8)),
    ),
    "adamax": (
        lambda: optax.adamax(RATE, eps=1e-30),
        lambda: adamjax.adamax(RATE, eps=1e-30),
    ),
    "optax within ours": (
        lambda: optax.chain(optax.trace(0.5), optax.adam(RATE)),
        lambda: adamjax.chain(optax.trace(0.5), adamjax.adam(RATE, eps=1e-8)),
    ),
    "ours within optax": (
        lambda: optax.chain(optax.clip(1.0), optax.masked(optax.adam(RATE), is_head)),
        lambda: optax.chain(optax.clip(1.0), optax.masked(adamjax.adam(RATE, eps=1e-8), is_head)),
    ),
}


@pytest.mark.parametrize("name", OPTAX)
@pytest.mark.slow
def test_a_run_that_comes_from_optax(name, x64):
    theirs, ours = pair(name)
    params, noises = new_params(), noise()
    (*_, middle), state = taken(theirs, params, theirs.init(params), noises[:BEFORE])
    expected, _ = taken(theirs, middle, state, noises[BEFORE:])
    converted = convert.from_optax(state, ours, middle, theirs)
    assert jax.tree.structure(converted) == jax.tree.structure(ours.init(params))
    actual, _ = ours_taken(ours, middle, converted, noises[BEFORE:])
    assert_close(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("name", OPTAX)
def test_a_run_that_goes_to_optax(name, x64):
    theirs, ours = pair(name)
    params, noises = new_params(), noise()
    (*_, middle), state = ours_taken(ours, params, ours.init(params), noises[:BEFORE])
    expected, _ = ours_taken(ours, middle, state, noises[BEFORE:])
    converted = convert.to_optax(state, ours, middle, theirs)
    actual, _ = taken(theirs, middle, converted, noises[BEFORE:])
    assert_close(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["adam", "multi_transform", "MultiSteps", "inject_hyperparams"])
def test_there_and_back_is_the_same_state(name, x64):
    theirs, ours = pair(name)
    params = new_params()
    _, state = taken(theirs, params, theirs.init(params), noise()[:BEFORE])
    converted = convert.from_optax(state, ours, params, theirs)
    back = convert.to_optax(converted, ours, params, theirs)
    if name == "inject_hyperparams":  # which keeps the rates of the last step as well
        state, back = state.inner_state, back.inner_state
    assert_close(back, state, rtol=0)


@pytest.mark.parametrize(
    ("theirs", "ours", "count"),
    [
        (optax.amsgrad(RATE), adamjax.amsgrad(RATE, eps=1e-8), 200_000),
        (optax.nadam(RATE), adamjax.nadam(RATE, eps=1e-8), 2_000),
    ],
    ids=["amsgrad", "nadam"],
)
def test_rules_that_become_one_in_a_long_run(theirs, ours, count, x64):
    """A state of a long run is one of a short run with its count set."""
    params, noises = new_params(), noise()
    (*_, middle), state = taken(theirs, params, theirs.init(params), noises[:BEFORE])
    young = state
    state = (state[0]._replace(count=jnp.asarray(count, jnp.int32)), *state[1:])
    expected, _ = taken(theirs, middle, state, noises[BEFORE:])
    converted = convert.from_optax(state, ours, middle, theirs)
    actual, after = ours_taken(ours, middle, converted, noises[BEFORE:])
    assert_close(actual, expected, rtol=1e-12)
    back = convert.to_optax(after, ours, actual[-1], theirs)
    expected, _ = ours_taken(ours, actual[-1], after, noises[:AFTER])
    actual, _ = taken(theirs, actual[-1], back, noises[:AFTER])
    assert_close(actual, expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"is not that of adamjax.*'embed/table', after 10 steps"):
        convert.from_optax(young, ours, middle, theirs)
    _, young = ours_taken(ours, params, ours.init(params), noises[:2])
    with pytest.raises(ValueError, match=r"is not that of adamjax.*'embed/table', after 2 steps"):
        convert.to_optax(young, ours, middle, theirs)


def test_optax_amsgrad_by_as_much_as_is_said(x64):
    """What `rtol` lets pass is as large as the message says, and no larger than it."""
    theirs, ours = optax.amsgrad(RATE), adamjax.amsgrad(RATE, eps=1e-8)
    params, noises = new_params(), noise()
    (*_, middle), state = taken(theirs, params, theirs.init(params), noises[:BEFORE])
    state = (state[0]._replace(count=jnp.asarray(8_000, jnp.int32)), *state[1:])
    with pytest.raises(ValueError, match="rtol=") as refused:
        convert.from_optax(state, ours, middle, theirs)
    rtol = float(re.search(r"rtol=(\S+)", str(refused.value))[1])
    assert 1e-4 < rtol < 2e-4
    converted = convert.from_optax(state, ours, middle, theirs, rtol=rtol)
    expected, _ = taken(theirs, middle, state, noises[BEFORE:][:1])
    actual, _ = ours_taken(ours, middle, converted, noises[BEFORE:][:1])
    for a, b, p in zip(*map(jax.tree.leaves, (actual, expected, middle)), strict=True):
        apart = np.max(np.abs(a - b) / np.abs(b - p))
        assert 0.1 * rtol < apart <= rtol


def test_adamax_with_epsilon_inside_the_maximum():
    theirs, ours = optax.adamax(RATE), adamjax.adamax(RATE, eps=1e-8)
    params, noises = new_params(np.float32), noise(dtype=np.float32)
    (*_, middle), state = taken(theirs, params, theirs.init(params), noises[:BEFORE])
    expected, _ = taken(theirs, middle, state, noises[BEFORE:])
    converted = convert.from_optax(state, ours, middle, theirs, rtol=1e-6)
    actual, _ = ours_taken(ours, middle, converted, noises[BEFORE:])
    # optax' 1 - b1**t is off by 1.2e-7 / (1 - b1**t), here at most 2e-7 of the steps.
    assert_close(actual, expected, rtol=2e-6)
    tiny = {
        name: jax.tree.map(lambda x: x * 1e-5, getattr(state[0], name)) for name in ("mu", "nu")
    }
    small = (state[0]._replace(**tiny), *state[1:])
    with pytest.raises(ValueError, match=r"adamax is not that of adamjax: it adds epsilon inside"):
        convert.from_optax(small, ours, middle, theirs)


def test_the_epsilon_within_a_maximum_is_taken_out_and_put_back(x64):
    theirs, ours = optax.adamax(RATE, eps=0.5), adamjax.adamax(RATE, eps=0.5)
    params, n = new_params(), noise()[0]
    (after,), state = taken(theirs, params, theirs.init(params), [n])
    converted = convert.from_optax(state, ours, after, theirs, rtol=1e3)
    sizes = jax.tree.map(lambda p, n: jnp.abs(gradient(p, n)), params, n)
    assert_close(adamjax.get_slot(converted, "u"), sizes, rtol=1e-15)
    back = convert.to_optax(converted, ours, after, theirs, rtol=1e3)
    assert_close(back, state, rtol=1e-15)
    with pytest.raises(ValueError, match=r"after 1 steps, the next step may differ by .*% between"):
        convert.to_optax(converted, ours, after, theirs)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_low_precision_parameters_with_float32_moments(dtype):
    """Gradients in float32, as both would square them in the gradients' dtype otherwise."""
    theirs, ours = (
        optax.adamw(RATE, weight_decay=0.1),
        adamjax.adamw(RATE, eps=1e-8, weight_decay=0.1),
    )
    noises = noise(dtype=np.float32)
    wide = new_params(np.float32)
    params = jax.tree.map(lambda p: p.astype(dtype), wide)

    def run(tx, apply, params, state, noises):
        @jax.jit
        def step(params, state, n):
            updates, state = tx.update(n, state, wide)
            return apply(params, updates), state

        visited = []
        for n in noises:
            params, state = step(params, state, n)
            visited.append(params)
        return visited, state

    (*_, middle), state = run(theirs, optax.apply_updates, params, theirs.init(wide), noises[:10])
    expected, _ = run(theirs, optax.apply_updates, middle, state, noises[10:])
    converted = convert.from_optax(state, ours, wide, theirs)
    assert {x.dtype.name for x in jax.tree.leaves(adamjax.get_slot(converted, "v"))} == {"float32"}
    actual, _ = run(ours, adamjax.apply_updates, middle, converted, noises[10:])
    # optax' 1 - b2**t is off by 6e-8 / (1 - b2**t), 5e-6 at t = 11, half of which is in a step:
    # 20 steps of 1/16 move by 3e-6 more or less. bfloat16 may round such a sum to its neighbour.
    assert_close(actual, expected, rtol=3e-6 if dtype == "float32" else 2**-7)
    if dtype == "bfloat16":
        near = [
            jnp.mean(a == b) for a, b in zip(*map(jax.tree.leaves, (actual, expected)), strict=True)
        ]
        assert min(near) > 0.9
        with pytest.raises(
            ValueError, match=r"'embed/table' is float32 and would be rounded to bfl"
        ):
            convert.to_optax(converted, ours, middle, theirs)
        rounded = convert.to_optax(converted, ours, middle, theirs, check=False)
        assert rounded[0].nu["embed"]["table"].dtype == jnp.bfloat16


# --- tables ---------------------------------------------------------------------------------------


def rows_of(step):
    """Two rows a step, four of six in all: two are never touched again."""
    return np.array([step % 3, 3])


def touched(step):
    flags = np.zeros((6, 1))
    flags[rows_of(step)] = 1
    return flags


def only_rows(tree, step):
    return {**tree, "embed": {"table": tree["embed"]["table"] * touched(step)}}


def exact_taken(tx, params, state, noises):
    @jax.jit
    def taken(params, state, ids, n):
        rows, ticket = tx.prepare(params, state, {"embed": ids})
        table = gradient(rows["embed"], n["embed"]["table"][ids])
        grads = {
            "embed": {"table": adamjax.row_gradient(ids, table, 6)},
            "head": jax.tree.map(gradient, params["head"], n["head"]),
        }
        updates, state = tx.update(grads, state, params, ticket=ticket)
        return adamjax.apply_updates(params, updates), state

    for step, n in enumerate(noises):
        params, state = taken(params, state, jnp.asarray(rows_of(step)), n)
    return jax.jit(tx.flush)(params, state)


def dense_taken(tx, params, state, noises):
    @jax.jit
    def taken(params, state, flags, n):
        grads = jax.tree.map(gradient, params, n)
        grads = {**grads, "embed": {"table": grads["embed"]["table"] * flags}}
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    for step, n in enumerate(noises):
        params, state = taken(params, state, touched(step), n)
    return params, state


EXACT = {
    "adamw, schedule": (
        optax.adamw(falling, weight_decay=0.1),
        adamjax.adamw(falling, eps=1e-8, weight_decay=0.1),
    ),
    "adamax": (optax.adamax(RATE, eps=1e-30), adamjax.adamax(RATE, eps=1e-30)),
    "multi_transform": (
        optax.multi_transform({"rows": optax.adam(RATE), "rest": optax.adam(0.03)}, labels),
        adamjax.partition(
            [("^embed", adamjax.adam(RATE, eps=1e-8))], default=adamjax.adam(0.03, eps=1e-8)
        ),
    ),
}


@pytest.mark.parametrize("name", EXACT)
@pytest.mark.slow
def test_straight_into_exact_rows_and_back(name, x64):
    theirs, dense = EXACT[name]
    ours = adamjax.exact_rows(dense, "^embed", history=2048)
    params, noises = new_params(), noise()
    (*_, middle), state = taken(theirs, params, theirs.init(params), noises[:BEFORE])
    expected, expected_state = dense_taken(theirs, middle, state, noises[BEFORE:])
    converted = convert.from_optax(state, ours, middle, theirs)
    assert int(converted.clock) == BEFORE
    actual, ours_state = exact_taken(ours, middle, converted, noises[BEFORE:])
    # What exact_rows promises of rows that have caught up.
    assert_close(actual, expected, rtol=1e-8)
    back = convert.to_optax(ours_state, ours, actual, theirs)
    assert_close(back, expected_state, rtol=1e-8)


def test_rows_that_lag_behind_are_not_converted():
    ours = adamjax.exact_rows(adamjax.adam(RATE, eps=1e-8), "^embed", history=2048)
    params = new_params(np.float32)
    grads = {
        "embed": {"table": adamjax.row_gradient(jnp.array([1]), jnp.ones((1, 3)), 6)},
        "head": params["head"],
    }
    _, state = jax.jit(ours.update)(grads, ours.init(params), params)
    with pytest.raises(ValueError, match=r"'embed/table' lag behind: .*flush"):
        convert.to_optax(state, ours, params, optax.adam(RATE))


# --- Keras ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keras():
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend here")
    return keras


KERAS = {
    "adam": (lambda k: k.Adam(RATE), lambda: adamjax.adam(RATE)),
    "adam, an epsilon that matters": (
        lambda k: k.Adam(RATE, beta_1=0.8, epsilon=1e-2),
        lambda: adamjax.adam(RATE, 0.8, eps_hat=1e-2),
    ),
    "amsgrad": (lambda k: k.Adam(RATE, amsgrad=True), lambda: adamjax.amsgrad(RATE)),
    "adamw": (
        lambda k: k.AdamW(RATE, weight_decay=0.125),
        lambda: adamjax.adamw(RATE, weight_decay=0.125),
    ),
    "adamax": (lambda k: k.Adamax(RATE), lambda: adamjax.adamax(RATE)),
    "nadam": (lambda k: k.Nadam(RATE), lambda: adamjax.nadam(RATE)),
    "schedule, clip": (
        lambda k: k.Adam(k.schedules.InverseTimeDecay(RATE, 1, 0.125), global_clipnorm=1.0),
        lambda: adamjax.chain(
            adamjax.clip_by_global_norm(1.0),
            adamjax.adam(adamjax.inverse_time_decay(RATE, 1, 0.125)),
        ),
    ),
    "amsgrad, average": (
        lambda k: k.Adam(RATE, amsgrad=True, use_ema=True, ema_momentum=0.75),
        lambda: adamjax.chain(adamjax.amsgrad(RATE), adamjax.weight_ema(0.75)),
    ),
    "average that overwrites": (
        lambda k: k.Adam(RATE, use_ema=True, ema_momentum=0.75, ema_overwrite_frequency=7),
        lambda: adamjax.chain(adamjax.adam(RATE), adamjax.weight_ema(0.75, 7)),
    ),
    "accumulation": (
        lambda k: k.Adam(RATE, gradient_accumulation_steps=4),
        lambda: adamjax.accumulate_gradients(adamjax.adam(RATE), 4),
    ),
    "accumulation, average": (
        lambda k: k.Adam(RATE, gradient_accumulation_steps=4, use_ema=True, ema_momentum=0.75),
        lambda: adamjax.chain(
            adamjax.accumulate_gradients(adamjax.adam(RATE), 4), adamjax.weight_ema(0.75)
        ),
    ),
    "accumulation, average that overwrites": (
        lambda k: k.Adam(
            RATE,
            gradient_accumulation_steps=4,
            use_ema=True,
            ema_momentum=0.75,
            ema_overwrite_frequency=1,
        ),
        lambda: adamjax.chain(
            adamjax.accumulate_gradients(adamjax.adam(RATE), 4), adamjax.weight_ema(0.75, 1)
        ),
    ),
    "accumulation, a schedule of calls": (
        lambda k: k.Adam(
            k.schedules.InverseTimeDecay(RATE, 1, 0.125), gradient_accumulation_steps=4
        ),
        lambda: adamjax.chain(
            adamjax.accumulate_gradients(adamjax.scale_by_adam(), 4),
            adamjax.scale_by_learning_rate(adamjax.inverse_time_decay(RATE, 1, 0.125)),
        ),
    ),
}


class Keras:
    """A Keras optimizer with its variables."""

    def __init__(self, keras, make, params):
        self.optimizer = make(keras.optimizers)
        self.treedef = jax.tree.structure(params)
        self.variables = [
            keras.Variable(np.asarray(p), dtype=p.dtype.name, name=path.replace("/", "_"))
            for p, path in zip(jax.tree.leaves(params), PATHS, strict=True)
        ]
        self.optimizer.build(self.variables)
        self.step = jax.jit(self._step)

    def _step(self, kept, params, n):
        grads = jax.tree.map(gradient, self.treedef.unflatten(params), n)
        return self.optimizer.stateless_apply(kept, jax.tree.leaves(grads), params)

    @property
    def params(self):
        return self.treedef.unflatten([jnp.asarray(v.value) for v in self.variables])

    def take(self, noises):
        kept = [v.value for v in self.optimizer.variables]
        params, visited = [v.value for v in self.variables], []
        for n in noises:
            params, kept = self.step(kept, params, n)
            visited.append(self.treedef.unflatten(params))
        self.load(self.treedef.unflatten(params), kept)
        return visited

    def load(self, params, kept):
        pairs = [(self.variables, jax.tree.leaves(params)), (self.optimizer.variables, kept)]
        for variables, values in pairs:
            for variable, value in zip(variables, values, strict=True):
                variable.assign(value)

    @property
    def average(self):
        found = [v.value for v in self.optimizer.variables if v.path.endswith("_average")]
        return self.treedef.unflatten(found) if found else None


@pytest.mark.parametrize("name", KERAS)
def test_a_run_that_comes_from_keras_and_one_that_goes_to_it(name, keras, x64):
    make, make_ours = KERAS[name]
    ours, noises, params = make_ours(), noise(), new_params()
    theirs = Keras(keras, make, params)
    theirs.take(noises[:BEFORE])
    middle = theirs.params
    state = convert.from_keras(theirs.optimizer.variables, ours, middle)
    expected = theirs.take(noises[BEFORE:])
    actual, state = ours_taken(ours, middle, state, noises[BEFORE:])
    assert_close(actual, expected, rtol=1e-12)
    if theirs.average is not None:
        assert_close(adamjax.averaged_weights(state), theirs.average, rtol=1e-12)

    (*_, middle), state = ours_taken(ours, params, ours.init(params), noises[:BEFORE])
    expected, after = ours_taken(ours, middle, state, noises[BEFORE:])
    # What the run before has left in the optimizer is all replaced.
    theirs.load(middle, convert.to_keras(state, ours, middle, theirs.optimizer.variables))
    actual = theirs.take(noises[BEFORE:])
    assert_close(actual, expected, rtol=1e-12)
    if theirs.average is not None:
        assert_close(theirs.average, adamjax.averaged_weights(after), rtol=1e-12)


def test_variables_that_keras_excludes_from_decay(keras, x64):
    """With the optimizer itself, the mask of the decay must say the same."""

    def make(k):
        optimizer = k.AdamW(RATE, weight_decay=0.125)
        optimizer.exclude_from_weight_decay(var_names=["bias"])
        return optimizer

    masked = adamjax.adamw(RATE, weight_decay=0.125, mask="^(?!.*bias)")
    of_all = adamjax.adamw(RATE, weight_decay=0.125)
    noises, theirs = noise(), Keras(keras, make, new_params())
    theirs.take(noises[:BEFORE])
    middle = theirs.params
    with pytest.raises(ValueError, match=r"'head/bias'.* decay of 0, .*mask= of the leaves"):
        convert.from_keras(theirs.optimizer, of_all, middle)
    # What `load_model` does: the exclusions are in no config.
    forgetful = Keras(keras, lambda k: k.AdamW(RATE, weight_decay=0.125), new_params())
    with pytest.raises(ValueError, match=r"'head/bias'.*load_model.*exclude_from_weight_decay"):
        convert.from_keras(forgetful.optimizer, masked, middle)
    state = convert.from_keras(theirs.optimizer, masked, middle)
    actual, state = ours_taken(masked, middle, state, noises[BEFORE:])
    assert_close(actual, theirs.take(noises[BEFORE:]), rtol=1e-12)
    whole = Keras(keras, lambda k: k.AdamW(RATE, weight_decay=0.125), new_params())
    with pytest.raises(ValueError, match=r"a weight decay of 0\.125.*with a mask= that this leaf"):
        convert.from_keras(whole.optimizer, masked, middle)
    # Keras says what is excluded, and adamjax what decays: turned around, it is refused.
    for mask in ("bias", "embed", "^(?!.*embed)"):
        wrong = adamjax.adamw(RATE, weight_decay=0.125, mask=mask)
        with pytest.raises(ValueError, match=r"weight decay of 0\.125, tx has 0 before .* mask="):
            convert.from_keras(theirs.optimizer, wrong, middle)
    # An optimizer without a weight decay.
    plain = Keras(keras, lambda k: k.Adam(RATE), new_params())
    with pytest.raises(ValueError, match=r"has a weight decay of 0, .*leave the decay out"):
        convert.from_keras(plain.optimizer, of_all, middle)


def test_the_shapes_show_the_order_where_the_names_do_not(keras, x64):
    """As after a second model in one process, whose layers Keras gives other numbers."""
    params = {"first/kernel": jnp.ones((2, 3)), "first/bias": jnp.ones(3), "a/kernel": jnp.ones(5)}
    order = ["first/kernel", "first/bias", "a/kernel"]
    variables = [
        keras.Variable(np.ones(params[path].shape), name=f"other_{i}")
        for i, path in enumerate(order)
    ]
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build(variables)
    optimizer.apply([keras.ops.full(v.shape, 1.0 + i) for i, v in enumerate(variables)])
    tx = adamjax.adam(0.1)
    state = convert.from_keras(optimizer.variables, tx, params)
    m = adamjax.get_slot(state, "m")
    assert_close([float(m[path].max()) for path in order], [0.1, 0.2, 0.3], rtol=1e-6)
    values = convert.to_keras(state, tx, params, optimizer.variables)
    for variable, value in zip(optimizer.variables, values, strict=True):
        assert_close(value, np.asarray(variable.value), rtol=1e-12)
    # Two leaves of one shape: only order= can tell them apart.
    alike = {**params, "a/kernel": jnp.ones(3)}
    with pytest.raises(ValueError, match=r"other_0.*do not correspond to the leaves.*give order="):
        convert.from_keras(optimizer.variables, tx, alike)


@pytest.mark.slow
def test_keras_into_exact_rows(keras, x64):
    noises = noise()
    ours = adamjax.exact_rows(
        adamjax.chain(adamjax.adam(RATE), adamjax.weight_ema(0.75)), "^embed", history=2048
    )
    theirs = Keras(keras, lambda k: k.Adam(RATE, use_ema=True, ema_momentum=0.75), new_params())
    theirs.take(noises[:BEFORE])
    middle = theirs.params
    state = convert.from_keras(theirs.optimizer.variables, ours, middle)
    for step, n in enumerate(noises[BEFORE:]):
        grads = only_rows(jax.tree.map(gradient, theirs.params, n), step)
        theirs.optimizer.apply(jax.tree.leaves(grads))
    actual, state = exact_taken(ours, middle, state, noises[BEFORE:])
    assert_close(actual, theirs.params, rtol=1e-8)
    assert_close(adamjax.averaged_weights(state), theirs.average, rtol=1e-8)
    values = convert.to_keras(state, ours, actual, theirs.optimizer.variables)
    for variable, value in zip(theirs.optimizer.variables, values, strict=True):
        assert_close(value, np.asarray(variable.value), rtol=1e-8)


KERAS_NAMES = {
    "momentum": "m",
    "velocity": "v",
    "velocity_hat": "vhat",
    "norm": "u",
    "average": "average",
}


def tf_keras_name(path):
    """As tf_keras names the variable that Keras 3 names so."""
    for theirs, short in KERAS_NAMES.items():
        if path.endswith(f"_{theirs}"):
            owner, leaf = path.removesuffix(f"_{theirs}").split("/")
            return f"{owner}/{short}/{leaf}/kernel:0"
    return path.split("/")[-1] + ":0"


def legacy_name(path):
    """As TensorFlow before 2.11 does."""
    name = tf_keras_name(path)
    owner, *rest = name.removesuffix(":0").split("/")
    if not rest:
        return f"Adam/{'iter' if owner == 'iteration' else owner}:0"
    slot, *leaf = rest
    adamax = owner.startswith("adamax")
    return "/".join(["Adamax" if adamax else "Adam", *leaf, "v" if slot == "u" else slot]) + ":0"


# Keras' own: it does not know the `copy` of newer NumPys.
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("name", ["adam", "amsgrad", "adamax", "amsgrad, average"])
def test_every_form_of_keras_variables(name, keras, x64):
    make, make_ours = KERAS[name]
    ours = make_ours()
    theirs = Keras(keras, make, new_params())
    theirs.take(noise()[:2])
    variables, params = theirs.optimizer.variables, theirs.params
    expected = convert.from_keras(variables, ours, params)
    assert int(adamjax.step_count(expected)) == 2
    stored: dict[str, np.ndarray] = {}
    theirs.optimizer.save_own_variables(stored)
    pairs = [(v.path, np.asarray(v.value)) for v in variables]
    forms = {
        "pairs": pairs,
        "names": dict(pairs),
        "save_own_variables": stored,
        "arrays": [np.asarray(v.value) for v in variables],
        "tf_keras": [(tf_keras_name(path), x) for path, x in pairs],
    }
    if "average" not in name:
        roles = ("iteration", "momentum", "velocity", "norm", "velocity_hat")
        kept = [(legacy_name(p), x) for r in roles for p, x in pairs if p.endswith(r)]
        forms |= {"legacy": kept, "get_weights": [x for _, x in kept]}
    for form, given in forms.items():
        print(form)
        assert_same(convert.from_keras(given, ours, params), expected)
    values = convert.to_keras(expected, ours, params, stored)
    assert list(values) == list(stored)
    assert_same(list(values.values()), list(stored.values()))


def test_keras_nadam_without_its_product(keras, x64):
    """tf_keras keeps the product of momenta outside of its variables."""
    make, make_ours = KERAS["nadam"]
    theirs = Keras(keras, make, new_params())
    theirs.take(noise()[:BEFORE])
    *pairs, (_, product) = [(v.path, np.asarray(v.value)) for v in theirs.optimizer.variables]
    state = convert.from_keras(pairs, make_ours(), theirs.params)
    assert_close(state[0].momentum_product, jnp.asarray(product), rtol=1e-6)


def test_a_keras_average_before_the_first_step(keras, x64):
    make, make_ours = KERAS["amsgrad, average"]
    theirs = Keras(keras, make, new_params())
    args = theirs.optimizer.variables, make_ours(), theirs.params
    with pytest.raises(ValueError, match="in its first step Keras 3 sets its average"):
        convert.from_keras(*args)
    state = convert.from_keras(*args, check=False)
    assert_same(adamjax.averaged_weights(state), theirs.params)
    # A state that has taken no step does not go on in Keras either.
    with pytest.raises(ValueError, match="in its first step Keras 3 sets its average"):
        convert.to_keras(state, args[1], theirs.params, theirs.optimizer)
    theirs.take(noise()[:1])
    state = convert.from_keras(theirs.optimizer.variables, make_ours(), theirs.params)
    assert_close(adamjax.averaged_weights(state), theirs.params, rtol=1e-15)


def test_a_keras_average_in_the_first_accumulated_step(keras):
    """Keras counts steps, not micro-batches, so all of these copy the weights."""
    options = {"use_ema": True, "ema_momentum": 0.5, "gradient_accumulation_steps": 3}
    optimizer = keras.optimizers.Adam(0.1, **options)
    w = keras.Variable(np.ones(3, np.float32), name="w")
    optimizer.build([w])
    config = {"learning_rate": 0.1, "loss_scale_factor": None, **options}
    tx = adamjax.from_config({"class_name": "Adam", "config": config})
    for micro in range(1, 4):
        optimizer.apply([keras.ops.convert_to_tensor(np.full(3, micro, np.float32))], [w])
        params = {"w": jnp.asarray(w.value)}
        if micro < 3:
            with pytest.raises(ValueError, match="in its first step Keras 3 sets its average"):
                convert.from_keras(optimizer, tx, params)
    assert_same(adamjax.averaged_weights(convert.from_keras(optimizer, tx, params)), params)


# --- torch ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def torch():
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


def negated(*transforms):
    return adamjax.chain(adamjax.scale(-1.0), *transforms)


TORCH = {
    "adam": (lambda o, ps: o.Adam(ps, RATE), lambda: adamjax.adam(RATE, eps=1e-8)),
    "adam, decay in the gradient": (
        lambda o, ps: o.Adam(ps, RATE, eps=1e-2, weight_decay=0.1),
        lambda: adamjax.chain(adamjax.add_decayed_weights(0.1), adamjax.adam(RATE, eps=1e-2)),
    ),
    "amsgrad": (
        lambda o, ps: o.Adam(ps, RATE, amsgrad=True),
        lambda: adamjax.amsgrad(RATE, eps=1e-8),
    ),
    "adamw": (
        lambda o, ps: o.AdamW(ps, RATE, (0.8, 0.95), weight_decay=0.1),
        lambda: adamjax.adamw(RATE, 0.8, 0.95, eps=1e-8, weight_decay=0.1),
    ),
    "adamw, amsgrad, maximize": (
        lambda o, ps: o.AdamW(ps, RATE, weight_decay=0.1, amsgrad=True, maximize=True),
        lambda: negated(
            adamjax.scale_by_amsgrad(eps=1e-8),
            adamjax.add_decayed_weights(0.1),
            adamjax.scale_by_learning_rate(RATE),
        ),
    ),
    "adamax": (
        lambda o, ps: o.Adamax(ps, RATE, eps=1e-30),
        lambda: adamjax.adamax(RATE, eps=1e-30),
    ),
    "nadam": (
        lambda o, ps: o.NAdam(ps, RATE, momentum_decay=1.0),
        lambda: adamjax.nadam(RATE, eps=1e-8),
    ),
}


class Torch:
    """An optimizer of torch with its parameters, in groups."""

    def __init__(self, torch, make, params, names=PATHS):
        self.torch, self.treedef, self.names = torch, jax.tree.structure(params), list(names)
        leaves = dict(zip(PATHS, jax.tree.leaves(params), strict=True))
        self.held = {
            path: torch.nn.Parameter(torch.from_numpy(np.array(leaves[path]))) for path in names
        }
        self.optimizer = make(torch.optim, list(self.held.values()))

    @property
    def params(self):
        return self.treedef.unflatten([self.held[p].detach().numpy().copy() for p in PATHS])

    def take(self, noises, after_each=lambda: None, sparse=False):
        visited = []
        for step, n in enumerate(noises):
            for path, x in zip(PATHS, jax.tree.leaves(n), strict=True):
                p = self.held[path]
                p.grad = gradient(p.detach(), self.torch.from_numpy(np.array(x)))
                if sparse:
                    p.grad = self._sparse(p.grad, rows_of(step) % len(p))
            self.optimizer.step()
            after_each()
            visited.append(jax.tree.map(jnp.asarray, self.params))
        return visited

    def _sparse(self, g, rows):
        rows = self.torch.from_numpy(np.unique(rows))
        return self.torch.sparse_coo_tensor(rows[None], g[rows], g.shape, check_invariants=True)

    def load(self, state_dict):
        def tensors(x):
            return self.torch.from_numpy(x) if isinstance(x, np.ndarray) else x

        self.optimizer.load_state_dict(jax.tree.map(tensors, state_dict))


# torch keeps the product of momenta in float32.
TORCH_RTOL = {"nadam": 1e-10}


@pytest.mark.parametrize("name", TORCH)
@pytest.mark.slow
def test_a_run_that_comes_from_torch(name, torch, x64):
    make, make_ours = TORCH[name]
    ours, noises = make_ours(), noise()
    theirs = Torch(torch, make, new_params())
    theirs.take(noises[:BEFORE])
    middle = jax.tree.map(jnp.asarray, theirs.params)
    state = convert.from_torch(theirs.optimizer.state_dict(), ours, middle)
    expected = theirs.take(noises[BEFORE:])
    actual, _ = ours_taken(ours, middle, state, noises[BEFORE:])
    assert_close(actual, expected, rtol=TORCH_RTOL.get(name, 1e-12))


@pytest.mark.parametrize("name", TORCH)
def test_a_run_that_goes_to_torch(name, torch, x64):
    make, make_ours = TORCH[name]
    ours, noises, params = make_ours(), noise(), new_params()
    (*_, middle), state = ours_taken(ours, params, ours.init(params), noises[:BEFORE])
    expected, _ = ours_taken(ours, middle, state, noises[BEFORE:])
    theirs = Torch(torch, make, middle)
    target = theirs.optimizer.state_dict()
    theirs.load(convert.to_torch(state, ours, middle, target, **FRESH))
    assert_close(theirs.take(noises[BEFORE:]), expected, rtol=TORCH_RTOL.get(name, 1e-12))


# Two groups, in another order than that of our leaves.
GROUPED = ["head/kernel", "embed/table", "head/bias"]


def grouped(o, ps):
    groups = [
        {"params": [ps[0]], "weight_decay": 0.1},
        {"params": ps[1:], "lr": 0.03, "weight_decay": 0.0},
    ]
    return o.AdamW(groups, RATE)


def ours_grouped(rate):
    return adamjax.adamw(rate, eps=1e-8, weight_decay=0.1, mask="kernel$")


def test_groups_of_torch_with_a_scheduler(torch, x64):
    noises = noise()
    theirs = Torch(torch, grouped, new_params(), GROUPED)
    falls = torch.optim.lr_scheduler.LambdaLR(theirs.optimizer, lambda t: 1 / (1 + 0.1 * t))
    theirs.take(noises[:BEFORE], falls.step)
    middle = jax.tree.map(jnp.asarray, theirs.params)
    rates = [adamjax.inverse_time_decay(lr, 1, 0.1) for lr in (RATE, 0.03)]
    ours = ours_grouped(adamjax.by_path([("kernel$", rates[0])], default=rates[1]))
    kept = theirs.optimizer.state_dict()
    state = convert.from_torch(kept, ours, middle, order=GROUPED)
    expected = theirs.take(noises[BEFORE:], falls.step)
    actual, after = ours_taken(ours, middle, state, noises[BEFORE:])
    assert_close(actual, expected, rtol=1e-12)
    back = convert.to_torch(after, ours, actual[-1], theirs.optimizer.state_dict(), order=GROUPED)
    for key, held in theirs.optimizer.state_dict()["state"].items():
        for name, x in held.items():
            assert_close(back["state"][key][name], x.numpy(), rtol=1e-12)
    for order, problem in [
        (PATHS, r"m of 'embed/table' has shape \[3, 4\], expected \[6, 3\]"),
        (GROUPED[:2], r"3 parameters, but order has 2"),
        ([*GROUPED[:2], "head/gain"], r"the leaf 'head/gain', but params has no float leaf there"),
    ]:
        with pytest.raises(ValueError, match=problem):
            convert.from_torch(kept, ours, middle, order=order)
    with pytest.raises(
        ValueError, match=r"'head/kernel': torch has a learning rate of 0.03125, tx"
    ):
        convert.from_torch(kept, ours_grouped(0.01), middle, order=GROUPED)


def test_a_transposed_kernel_of_torch(torch, x64):
    noises, ours = noise(), adamjax.adam(RATE, eps=1e-8)

    def turned(path, x):
        return x.T if path == "head/kernel" else x

    def turn(tree):
        return {**tree, "head": {**tree["head"], "kernel": tree["head"]["kernel"].T}}

    theirs = Torch(torch, TORCH["adam"][0], turn(new_params()))
    theirs.take([turn(n) for n in noises[:BEFORE]])
    middle = jax.tree.map(jnp.asarray, turn(theirs.params))
    kept = theirs.optimizer.state_dict()
    state = convert.from_torch(kept, ours, middle, adapt=turned)
    expected = [turn(p) for p in theirs.take([turn(n) for n in noises[BEFORE:]])]
    actual, after = ours_taken(ours, middle, state, noises[BEFORE:])
    assert_close(actual, expected, rtol=1e-12)
    back = convert.to_torch(after, ours, middle, theirs.optimizer.state_dict(), adapt=turned)
    kernel = theirs.optimizer.state_dict()["state"][2]["exp_avg"].numpy()
    assert_close(back["state"][2]["exp_avg"], kernel, rtol=1e-12)
    with pytest.raises(ValueError, match=r"m of 'head/kernel' has shape \[4, 3\]"):
        convert.from_torch(kept, ours, middle)


def lazy_taken(tx, params, state, noises):
    visited = []
    for step, n in enumerate(noises):
        grads = jax.tree.map(gradient, params, n)
        grads = jax.tree.map(
            lambda g, s=step: adamjax.row_gradient(
                jnp.asarray(np.unique(rows_of(s) % len(g))),
                g[np.unique(rows_of(s) % len(g))],
                len(g),
            ),
            grads,
        )
        updates, state = tx.update(grads, state, params)
        params = adamjax.apply_updates(params, updates)
        visited.append(params)
    return visited, state


@pytest.mark.slow
def test_sparse_adam_of_torch(torch, x64):
    noises = noise()
    theirs = Torch(torch, lambda o, ps: o.SparseAdam(ps, RATE), new_params())
    ours = adamjax.adam(RATE, eps_hat=1e-8, rows="lazy")
    theirs.take(noises[:BEFORE], sparse=True)
    middle = jax.tree.map(jnp.asarray, theirs.params)
    kept = theirs.optimizer.state_dict()
    state = convert.from_torch(kept, ours, middle)
    new = Torch(torch, lambda o, ps: o.SparseAdam(ps, RATE), middle)
    new.load(convert.to_torch(state, ours, middle, new.optimizer.state_dict(), **FRESH))
    expected = theirs.take(noises[BEFORE:], sparse=True)
    actual, _ = lazy_taken(ours, middle, state, noises[BEFORE:])
    assert_close(actual, expected, rtol=1e-12)
    assert_close(new.take(noises[BEFORE:], sparse=True), expected, rtol=1e-15)
    with pytest.raises(ValueError, match=r"added to the uncorrected root \(eps_hat=1e-08\)"):
        convert.from_torch(kept, adamjax.adam(RATE, eps=1e-8, rows="lazy"), middle)
    # Rows that stood still move from here on, in exact_rows as in the dense rule.
    dense = adamjax.adam(RATE, eps_hat=1e-8)
    exact = adamjax.exact_rows(dense, "^embed", history=2048)
    with pytest.raises(ValueError, match=r"stand still without a gradient, tx has exact_rows"):
        convert.from_torch(kept, exact, middle)
    state = convert.from_torch(kept, exact, middle, check=False)
    actual, _ = exact_taken(exact, middle, state, noises[BEFORE:])
    state = convert.from_torch(kept, dense, middle, check=False)
    expected, _ = dense_taken(dense, middle, state, noises[BEFORE:])
    assert_close(actual, expected, rtol=1e-8)


@pytest.mark.slow
def test_torch_into_exact_rows_with_row_gradients(torch, x64):
    noises = noise()
    theirs = Torch(
        torch, lambda o, ps: o.AdamW(ps, RATE, weight_decay=0.1, amsgrad=True), new_params()
    )
    rule = adamjax.scale_by_amsgrad(eps=1e-8)
    tail = (adamjax.add_decayed_weights(0.1), adamjax.scale_by_learning_rate(RATE))
    ours = adamjax.exact_rows(adamjax.chain(rule, *tail), "^embed", history=2048)
    theirs.take(noises[:BEFORE])
    middle = jax.tree.map(jnp.asarray, theirs.params)
    state = convert.from_torch(theirs.optimizer.state_dict(), ours, middle)
    for step, n in enumerate(noises[BEFORE:]):
        grads = only_rows(jax.tree.map(gradient, theirs.params, n), step)
        for path, g in zip(PATHS, jax.tree.leaves(grads), strict=True):
            theirs.held[path].grad = torch.from_numpy(np.array(g))
        theirs.optimizer.step()
    actual, after = exact_taken(ours, middle, state, noises[BEFORE:])
    assert_close(actual, jax.tree.map(jnp.asarray, theirs.params), rtol=1e-8)
    back = convert.to_torch(after, ours, actual, theirs.optimizer.state_dict())
    for key, held in theirs.optimizer.state_dict()["state"].items():
        for name, x in held.items():
            assert_close(back["state"][key][name], x.numpy(), rtol=1e-8)


def test_torch_in_float32_and_bfloat16(torch):
    """bfloat16 tensors, which NumPy does not know, and float32 ones to rounding."""
    noises = noise(dtype=np.float32)
    theirs = Torch(torch, TORCH["adam"][0], new_params(np.float32))
    ours = adamjax.adam(RATE, eps=1e-8)
    theirs.take(noises[:BEFORE])
    middle = jax.tree.map(jnp.asarray, theirs.params)
    state = convert.from_torch(theirs.optimizer.state_dict(), ours, middle)
    actual, _ = ours_taken(ours, middle, state, noises[BEFORE:])
    # torch computes its scalars in float64: twenty steps' roundings are left.
    assert_close(actual, theirs.take(noises[BEFORE:]), rtol=2e-6)
    for p in theirs.held.values():
        p.data, p.grad = p.data.bfloat16(), p.data.bfloat16()
    theirs.optimizer = torch.optim.Adam(theirs.held.values(), RATE)
    theirs.optimizer.step()
    low = jax.tree.map(lambda p: p.astype(jnp.bfloat16), middle)
    state = convert.from_torch(theirs.optimizer.state_dict(), ours, low)
    kept = theirs.optimizer.state_dict()["state"][1]["exp_avg"]
    assert_same(adamjax.get_slot(state, "m")["head"]["bias"], jnp.asarray(kept.float().numpy()))
    back = convert.to_torch(state, ours, low, theirs.optimizer.state_dict())
    theirs.load(back)
    assert theirs.optimizer.state_dict()["state"][1]["exp_avg"].dtype is torch.bfloat16
    assert torch.equal(theirs.optimizer.state_dict()["state"][1]["exp_avg"], kept)


# --- the rest -------------------------------------------------------------------------------------


def test_an_average_is_given_where_there_is_none(x64):
    theirs = optax.adam(RATE)
    ours = adamjax.chain(adamjax.adam(RATE, eps=1e-8), adamjax.weight_ema(0.9))
    params = new_params()
    _, state = taken(theirs, params, theirs.init(params), noise()[:3])
    with pytest.raises(ValueError, match=r"no average: pass average="):
        convert.from_optax(state, ours, params, theirs)
    average = jax.tree.map(lambda p: p + 1, params)
    converted = convert.from_optax(state, ours, params, theirs, average=average)
    assert_same(adamjax.averaged_weights(converted), average)
    assert [int(c) for c in (converted[0].count, converted[-1].count)] == [3, 3]


def test_converted_arrays_are_copies():
    theirs, ours = optax.adam(RATE), adamjax.adam(RATE, eps=1e-8)
    params = new_params(np.float32)
    state = theirs.init(params)
    converted = convert.from_optax(state, ours, params, theirs)
    jax.jit(lambda s: jax.tree.map(jnp.copy, s), donate_argnums=0)(converted)
    assert float(jnp.sum(state[0].mu["embed"]["table"])) == 0


def test_integer_leaves_and_none_are_left_alone(x64):
    params = {"n": jnp.array(3), "none": None, "w": jnp.ones(2)}
    theirs, ours = optax.adam(RATE), adamjax.adam(RATE, eps=1e-8)
    state = (theirs.init(params)[0]._replace(count=jnp.array(4)), optax.EmptyState())
    converted = convert.from_optax(state, ours, params, theirs)
    assert adamjax.get_slot(converted, "m")["n"] is None
    back = convert.to_optax(converted, ours, params, theirs)
    assert int(back[0].count) == 4


OLD = optax.adam(RATE)
PARAMS = {"a": np.ones(2, np.float32), "b": np.ones(3, np.float32)}


def old_state(params=None, tx=OLD, count=1):
    state = tx.init(jax.tree.map(jnp.asarray, PARAMS if params is None else params))
    return jax.tree.map(lambda x: x + count if x.dtype == jnp.int32 else x, state)


REFUSED = {
    "the default epsilon": (
        lambda: (old_state(), adamjax.adam(RATE)),
        r"'a': optax has epsilon added to the bias-corrected root \(eps\), tx has eps_hat=1e-07: "
        r"build tx with eps=.*weight_decay=1e-4 in optax.adamw",
    ),
    "a leaf that is missing": (
        lambda: (old_state({"a": PARAMS["a"]}), adamjax.adam(RATE, eps=1e-8)),
        r"no moments of the leaf 'b'",
    ),
    "a leaf that has no place": (
        lambda: (old_state(), adamjax.masked(adamjax.adam(RATE, eps=1e-8), "^a")),
        r"moments of the leaf 'b' have no place",
    ),
    "a shape": (
        lambda: (old_state({**PARAMS, "b": np.ones(4)}), adamjax.adam(RATE, eps=1e-8)),
        r"m of 'b' has shape \[4\], expected \[3\]",
    ),
    "another rule": (
        lambda: (old_state(tx=optax.amsgrad(RATE)), adamjax.adam(RATE, eps=1e-8)),
        r"of 'a', optax has \['mu', 'nu', 'nu_max'\], those of amsgrad; for adam, expected",
    ),
    "another rule, other way": (
        lambda: (old_state(), adamjax.amsgrad(RATE, eps=1e-8)),
        r"of 'a', optax has \['mu', 'nu'\].*for amsgrad, expected \['mu', 'nu', 'nu_max'\]",
    ),
    "a state that is not known": (
        lambda: (
            old_state(tx=optax.chain(optax.trace(0.9), OLD)),
            adamjax.adam(RATE, eps=1e-8),
        ),
        r"no place for a TraceState",
    ),
    "a state that is missing": (
        lambda: (old_state(), adamjax.chain(optax.trace(0.9), adamjax.adam(RATE, eps=1e-8))),
        r"the source has no TraceState",
    ),
    "accumulated gradients": (
        lambda: (
            old_state(tx=optax.MultiSteps(OLD, 4).gradient_transformation()),
            adamjax.adam(RATE, eps=1e-8),
        ),
        r"has accumulated 1 micro-batches.*wrap tx in accumulate_gradients",
    ),
    "counts that differ": (
        lambda: (
            (old_state({"a": PARAMS["a"]}), old_state({"b": PARAMS["b"]}, count=5)),
            adamjax.adam(RATE, eps=1e-8),
        ),
        r"'a' has taken 1 steps and 'b' 5.*partition",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_is_refused(name):
    make, message = REFUSED[name]
    state, tx = make()
    with pytest.raises(ValueError, match=message):
        convert.from_optax(state, tx, jax.tree.map(jnp.asarray, PARAMS), OLD)


def test_check_false_takes_the_arrays_all_the_same():
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = convert.from_optax(old_state(), adamjax.adam(RATE), params, check=False)
    assert int(adamjax.step_count(state)) == 1
    state = convert.from_optax(
        old_state(tx=optax.amsgrad(RATE)), adamjax.amsgrad(RATE), params, check=False
    )
    assert adamjax.slot_names(state) == ("m", "v", "v_max")


def torch_state(group=(), **held):
    kept = {"step": 1.0, "exp_avg": PARAMS["a"], "exp_avg_sq": PARAMS["a"], **held}
    other = {"step": 1.0, "exp_avg": PARAMS["b"], "exp_avg_sq": PARAMS["b"]}
    groups = {"params": [0, 1], "lr": RATE, "betas": (0.9, 0.999), "eps": 1e-8}
    groups |= {"weight_decay": 0, "amsgrad": False, "decoupled_weight_decay": False, **dict(group)}
    return {"state": {0: kept, 1: other}, "param_groups": [groups]}


TORCH_REFUSED = {
    "epsilon": (
        {"eps": 1e-6},
        r"'a': torch has eps=1e-06, tx has eps=1e-08: build tx with eps=1e-06",
    ),
    "betas": ({"betas": (0.9, 0.99)}, r"b2=0.99, tx has b2=0.999"),
    "betas close to 1": ({"betas": (0.9, 0.9990009)}, r"b2=0.9990009, tx has b2=0.999"),
    "rate": ({"lr": 0.5}, r"a learning rate of 0.5, tx has 0.0625 for the next step"),
    "decay": (
        {"weight_decay": 0.5},
        r"a weight decay of 0.5, tx has 0 before its rule and 0 after it: put "
        r"add_decayed_weights\(0.5\) before the rule",
    ),
    "decoupled decay": (
        {"weight_decay": 0.5, "decoupled_weight_decay": True},
        r"put add_decayed_weights\(0.5\) after the rule",
    ),
    "amsgrad": ({"amsgrad": True}, r"those of amsgrad; for adam, expected"),
    "momentum_decay": ({"momentum_decay": 0.004}, r"NAdam has momentum_decay=0.004"),
}


@pytest.mark.parametrize("name", TORCH_REFUSED)
def test_what_torch_says_is_compared(name):
    group, message = TORCH_REFUSED[name]
    params, tx = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE, eps=1e-8)
    convert.from_torch(torch_state(), tx, params)
    with pytest.raises(ValueError, match=message):
        convert.from_torch(torch_state(group), tx, params)
    convert.from_torch(torch_state({"betas": (0.9, float(np.float32(0.999)))}), tx, params)
    state = tx.init(params)
    convert.to_torch(state, tx, params, {**torch_state(), "state": {}}, order=["a", "b"])
    # The error begins alike, and then also says how to change the target.
    start = re.split("those of amsgrad|(?<=[a-z0-9]): (?:build|put|begin)", message)[0]
    with pytest.raises(ValueError, match=f"to_torch: .*{start}"):
        convert.to_torch(state, tx, params, {**torch_state(group), "state": {}}, order=["a", "b"])


def test_a_step_of_torch_may_be_an_array_of_one_element():
    params, tx = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE, eps=1e-8)
    given = torch_state()
    for held in given["state"].values():
        held["step"] = np.array([5.0], np.float32)
    state = convert.from_torch(given, tx, params)
    assert int(adamjax.step_count(state)) == 5
    assert convert.to_torch(state, tx, params, given)["state"][0]["step"] == 5
    given["state"][0]["step"] = np.array([5.0, 5.0], np.float32)
    with pytest.raises(ValueError, match="states of several runs one by one"):
        convert.from_torch(given, tx, params)


def test_moments_of_torch_are_not_rounded_from_its_first_step_on_either():
    params, tx = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE, eps=1e-8, m_dtype="bfloat16")
    taken, fresh = torch_state(exp_avg=PARAMS["a"] * 0.3), {**torch_state(), "state": {}}
    for given in (taken, fresh):
        with pytest.raises(ValueError, match=r"m of 'a' is .* and would be rounded to bfloat16"):
            convert.from_torch(given, tx, params)
        convert.from_torch(given, tx, params, check=False)
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    convert.from_torch(fresh, tx, narrow)


def test_an_error_says_how_a_target_gets_the_rate_of_tx(torch):
    params = [jnp.ones(3)]
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(3))], lr=0.1)
    tx = adamjax.adam(0.05, eps=1e-8)
    message = (
        r"take state_dict\(\) after the scheduler is at this step, or after lr .*what torch has"
    )
    with pytest.raises(ValueError, match=message):
        convert.to_torch(tx.init(params), tx, params, optimizer.state_dict())
    optimizer.param_groups[0]["lr"] = float(adamjax.learning_rate(tx, tx.init(params)))
    convert.to_torch(tx.init(params), tx, params, optimizer.state_dict())


def test_a_parameter_that_torch_never_trained():
    params, tx = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE, eps=1e-8)
    kept = torch_state()
    del kept["state"][1]
    message = (
        r"'a' has taken 1 steps and 'b' 0.*None in order=.*set_to_zero.*no gradient.*partition; "
        r"each part calls its schedule .* lambda count: schedule\(count \+ 1\)"
    )
    with pytest.raises(ValueError, match=message):
        convert.from_torch(kept, tx, params)
    apart = adamjax.partition([("a", tx)], default=tx)
    state = convert.from_torch(kept, apart, params)
    assert [int(s[0].count) for s in state] == [1, 0]
    # torch decays only what has a gradient.
    decay = {"weight_decay": 0.1, "decoupled_weight_decay": True}
    decays = {**torch_state(decay), "state": kept["state"]}
    adamw = adamjax.adamw(RATE, eps=1e-8, weight_decay=0.1)
    apart = adamjax.partition([("a", adamw)], default=adamw)
    with pytest.raises(ValueError, match=r"none of 'b', .*None in order=.*set_to_zero.*check=F"):
        convert.from_torch(decays, apart, params)
    convert.from_torch(decays, apart, params, check=False)
    frozen = adamjax.partition([("b", adamjax.set_to_zero())], default=adamw)
    convert.from_torch(decays, frozen, params, order=["a", None])
    convert.from_torch({**decays, "state": {}}, adamw, params)
    only = adamjax.masked(tx, "a")
    state = convert.from_torch(kept, only, params, order=["a", None])
    assert int(adamjax.step_count(state)) == 1
    with pytest.raises(TypeError, match=r"expected optimizer.state_dict\(\) of torch"):
        convert.from_torch({"state": {}}, tx, params)


def keras_pairs(extra=()):
    pairs = [("adam/iteration", np.array(1)), ("adam/learning_rate", np.float32(RATE))]
    for path, x in PARAMS.items():
        pairs += [(f"adam/{path}_momentum", x), (f"adam/{path}_velocity", x)]
    return [*pairs, *extra]


def test_what_keras_keeps_is_compared():
    params, adam = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE)
    convert.from_keras(keras_pairs(), adam, params)
    for pairs, tx, message in [
        (keras_pairs(), adamjax.adam(0.5), r"'a': Keras has a learning rate of 0.0625, tx has 0.5"),
        (
            keras_pairs(),
            adamjax.adam(RATE, eps=1e-7),
            r"'a': Keras has epsilon added to the uncorrected",
        ),
        (keras_pairs(), adamjax.amsgrad(RATE), r"for amsgrad, expected .*'velocity_hat'"),
        (keras_pairs()[:-1], adam, r"there are 1 of velocity"),
        (keras_pairs([("adam/step_counter", np.ones(2))]), adam, r"cannot tell what 'adam/step_c"),
        ([x for _, x in keras_pairs()][:-1], adam, r"arrays without names fit nothing"),
        (
            keras_pairs([(f"adam/{p}_average", x) for p, x in PARAMS.items()]),
            adam,
            r"has an average of 'a', but tx has no weight_ema",
        ),
        (
            keras_pairs([(f"adam/{p}_gradient_accumulator", x) for p, x in PARAMS.items()]),
            adam,
            r"wrap tx in accumulate_gradients",
        ),
        (
            keras_pairs(),
            adamjax.accumulate_gradients(adamjax.adam(adamjax.constant(RATE)), 2),
            r"Keras calls a schedule with the number of micro-batches",
        ),
        (
            keras_pairs(),
            adamjax.accumulate_gradients(adamjax.chain(adam, adamjax.weight_ema(0.9)), 2),
            r"put weight_ema after accumulate_gradients",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            convert.from_keras(pairs, tx, params)
    with pytest.raises(TypeError, match=r"expected optimizer.variables"):
        convert.from_keras(3, adam, params)


def test_arrays_that_may_be_ordered_in_several_ways():
    params = [jnp.ones(2), jnp.ones(2)]
    arrays = [np.array(1), *[np.ones(2)] * 4]
    with pytest.raises(ValueError, match=r"may be ordered in several ways"):
        convert.from_keras(arrays, adamjax.adam(RATE), params)
    convert.from_keras({str(i): x for i, x in enumerate(arrays)}, adamjax.adam(RATE), params)


def numbered_keras(shapes):
    """The variables of an Adam without names, of parameters with m and v of 1, 2, ..."""
    slots = [np.full(shape, i + 1.0) for i, shape in enumerate(shapes) for _ in "mv"]
    return {str(i): x for i, x in enumerate([np.array(1), np.float32(RATE), *slots])}


def test_some_of_keras_arrays_without_names_are_not_converted():
    """Nothing shows their shapes, but all arrays of a parameter have the same one."""
    shapes = [(3, 2), (4,), (), (2, 5)]
    params = {"a": jnp.ones(shapes[0]), "c": jnp.ones(shapes[3])}
    numbered, tx = numbered_keras(shapes), adamjax.adam(RATE)
    for given in (numbered, list(numbered.values())):
        for order in (["a", None, None, "c"], ["a", None, None, None], [None, None, None, "c"]):
            some = {path: params[path] for path in order if path}
            state = convert.from_keras(given, tx, some, order=order)
            for path in some:
                place = order.index(path)
                slot = adamjax.get_slot(state, "v")[path]
                assert_same(slot, jnp.full(shapes[place], place + 1.0))
            back = convert.to_keras(state, tx, some, given, order=order)
            assert_same(back, given)
    del numbered["9"]
    with pytest.raises(ValueError, match="9 arrays without names fit nothing"):
        convert.from_keras(numbered, tx, params, order=["a", None, None, "c"])


def numbered_torch(shapes):
    """The same of torch."""
    state = {
        i: {"step": 1, "exp_avg": np.full(shape, i + 1.0), "exp_avg_sq": np.full(shape, i + 1.0)}
        for i, shape in enumerate(shapes)
    }
    group = {"lr": RATE, "betas": (0.9, 0.999), "eps": 1e-7, "weight_decay": 0, "amsgrad": False}
    return {"state": state, "param_groups": [{**group, "params": list(state)}]}


@pytest.mark.parametrize("system", ["keras", "torch"])
def test_parameters_without_names_and_leaves_of_one_shape(system):
    """In Keras and torch gamma comes before beta; in a dictionary the keys are sorted."""
    read, numbered, tx = {
        "keras": (convert.from_keras, numbered_keras, adamjax.adam(RATE, eps_hat=1e-7)),
        "torch": (convert.from_torch, numbered_torch, adamjax.adam(RATE, eps=1e-7)),
    }[system]
    params = {"norm": {"gamma": jnp.ones(2), "beta": jnp.ones(2)}}
    variables = numbered([(2,), (2,)])
    with pytest.raises(
        ValueError, match=r"'norm/beta', 'norm/gamma'\] have one shape.*give order="
    ):
        read(variables, tx, params)
    state = read(variables, tx, params, order=["norm/gamma", "norm/beta"])
    assert adamjax.get_slot(state, "m")["norm"]["gamma"][0] == 1
    # A list has Keras' order; check=False takes the order of params.
    state = read(variables, tx, [jnp.ones(2), jnp.ones(2)])
    assert adamjax.get_slot(state, "m")[1][0] == 2
    state = read(variables, tx, params, check=False)
    assert adamjax.get_slot(state, "m")["norm"]["beta"][0] == 1
    # Leaves of different shapes need no names: a wrong order does not fit.
    different = {"beta": jnp.ones(2), "gamma": jnp.ones(3)}
    assert adamjax.get_slot(read(numbered([(2,), (3,)]), tx, different), "m")["gamma"][0] == 2
    with pytest.raises(ValueError, match="order"):
        read(numbered([(3,), (2,)]), tx, different)


def test_leaves_that_are_transposes_of_each_other_have_no_order():
    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
    shapes = [x.shape for x in params.values()]
    for read, old, tx in (
        (convert.from_keras, numbered_keras(shapes), adamjax.adam(RATE, eps_hat=1e-7)),
        (convert.from_torch, numbered_torch(shapes), adamjax.adam(RATE, eps=1e-7)),
    ):
        with pytest.raises(ValueError, match=r"one shape, but for the order of dim.*give order="):
            read(old, tx, params)
        read(old, tx, params, order=["a", "b"])


def test_weights_that_are_the_transposes_of_keras_kernels(keras, x64):
    """As those of Equinox, in an autoencoder: each kernel has the shape of the other weight."""
    names = ["encoder", "middle", "decoder"]
    shapes = dict(zip(names, [(5, 2), (2, 2), (2, 5)], strict=True))
    params = {name: {"weight": jnp.ones(shape[::-1])} for name, shape in shapes.items()}
    order, tx = [f"{name}/weight" for name in names], adamjax.adam(0.1)

    def turned(path, x):
        return x.T

    variables = [keras.Variable(np.ones(shape), name="kernel") for shape in shapes.values()]
    for variable, name in zip(variables, names, strict=True):
        variable._path = f"other/{name}_of_keras"
    optimizer = keras.optimizers.Adam(0.1)
    optimizer.build(variables)
    noises = [np.random.default_rng(i).normal(size=v.shape) for i, v in enumerate(variables)]
    optimizer.apply([keras.ops.convert_to_tensor(x) for x in noises])
    numbered = {str(i): np.asarray(v.value) for i, v in enumerate(optimizer.variables)}
    for old in (optimizer, numbered):
        for options in ({}, {"adapt": turned}):
            with pytest.raises(ValueError, match="give order="):
                convert.from_keras(old, tx, params, **options)
        state = convert.from_keras(old, tx, params, order=order, adapt=turned)
        for name, x in zip(names, noises, strict=True):
            assert_close(adamjax.get_slot(state, "m")[name]["weight"], 0.1 * x.T, rtol=1e-6)
        back = convert.to_keras(state, tx, params, old, order=order, adapt=turned)
        assert_same(list(back.values() if old is numbered else back), list(numbered.values()))


@pytest.mark.parametrize(
    ("leaf", "name"),
    [("weight", "kernel"), ("kernel", "kernel"), ("weight", "embeddings"), ("weight", "")],
)
def test_square_weights_may_be_the_transposes_of_keras_kernels(leaf, name):
    params, tx = {"fc": {leaf: jnp.eye(2)}}, adamjax.adam(0.1)
    square = np.tri(2, dtype=np.float32)
    arrays = {"iteration": np.array(7), "learning_rate": np.array(0.1)}
    arrays |= {f"fc_{name}_momentum": square, f"fc_{name}_velocity": np.ones((2, 2))}
    old = [(f"adam/{key}", x) for key, x in arrays.items()] if name else list(arrays.values())
    message = r"Keras' kernels are the transposes of weights .*'fc/weight'.*adapt=lambda path, x: "
    for call in (
        lambda **options: convert.from_keras(old, tx, params, **options),
        lambda **options: convert.to_keras(tx.init(params), tx, params, old, **options),
    ):
        if leaf == "weight" and name != "embeddings":
            with pytest.raises(ValueError, match=message):
                call()
        else:
            call()
        call(adapt=lambda path, x: x)
    state = convert.from_keras(old, tx, params, adapt=lambda path, x: x.T)
    assert_close(adamjax.get_slot(state, "m")["fc"][leaf], square.T, rtol=0)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("form", ["keras", "keras, arrays", "torch"])
def test_keys_that_are_numbers_are_places(form, check):
    """As save_own_variables writes them; sorted as text, "10" comes before "2"."""
    shapes = [(2,)] * 12
    if form == "torch":
        read, write, tx = convert.from_torch, convert.to_torch, adamjax.adam(RATE, eps=1e-7)
        variables: Any = numbered_torch(shapes)
    else:
        read, write, tx = convert.from_keras, convert.to_keras, adamjax.adam(RATE, eps_hat=1e-7)
        variables = numbered_keras(shapes)
        variables = list(variables.values()) if "arrays" in form else variables
    params = {str(i): jnp.ones(2) for i in range(12)}
    nested = [{"1": jnp.ones(2)}, {str(i): jnp.ones(2) for i in range(11)}]
    for tree in (params, nested):
        state = read(variables, tx, tree, check=check)
        m = jax.tree.map(lambda x: float(x[0]), adamjax.get_slot(state, "m"))
        if tree is nested:
            assert m == [{"1": 1.0}, {str(i): i + 2.0 for i in range(11)}]
        else:
            assert m == {str(i): i + 1.0 for i in range(12)}
        written = write(state, tx, tree, variables, check=check)
        if form == "torch":
            written = {i: own["exp_avg"][0] for i, own in written["state"].items()}
            assert written == {i: i + 1.0 for i in range(12)}
        else:
            assert_same(written, variables)


def test_an_order_of_torch_by_name():
    tx, params = adamjax.adam(RATE, eps=1e-7), {"x": jnp.ones(2), "y": jnp.ones(2)}
    kept = numbered_torch([(2,), (2,), (2,)])
    kept["param_groups"][0]["param_names"] = ["b", "a", "c"]
    order = {"a": "x", "b": "y", "c": None}
    m = adamjax.get_slot(convert.from_torch(kept, tx, params, order=order), "m")
    assert_same(m, {"x": jnp.full(2, 2.0), "y": jnp.full(2, 1.0)})
    with pytest.raises(ValueError, match=r"order has the names \['a', 'b'\], which do not corr"):
        convert.from_torch(kept, tx, params, order={"a": "x", "b": "y"})


@pytest.mark.slow
def test_nothing_is_imported():
    import subprocess
    import sys

    code = (
        "import sys, adamjax, adamjax.convert;"
        "print([m for m in ('optax', 'keras', 'torch', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# --- only what is understood ----------------------------------------------------------------------


def test_two_leaves_with_one_path_are_refused():
    params = {"a/b": jnp.ones(2), "a": {"b": 2 * jnp.ones(2)}}
    old = optax.adam(0.1)
    with pytest.raises(ValueError, match="two leaves have the path 'a/b'"):
        convert.from_optax(old.init(params), adamjax.adam(0.1, eps=1e-8), params, old)


def built_keras(keras, kind, **options):
    """A Keras optimizer after two steps."""
    optimizer = getattr(keras.optimizers, kind)(0.1, **options)
    w = keras.Variable(np.ones(3, np.float32), name="w")
    optimizer.build([w])
    for g in ([1.0, -2.0, 0.5], [0.5, 1.0, -3.0]):
        optimizer.apply([keras.ops.convert_to_tensor(np.asarray(g, np.float32))], [w])
    return optimizer


KERAS_OPTIMIZERS = {
    "Adam": {},
    "AdamW": {},
    "Adamax": {},
    "Nadam": {},
    "RMSprop": {"momentum": 0.9},
    "SGD": {"momentum": 0.9},
    "Lamb": {},
    "Muon": {},
    "Ftrl": {},
    "Lion": {},
    "Adagrad": {},
    "Adadelta": {},
    "Adafactor": {},
    "ScheduleFreeAdamW": {},
}


@pytest.mark.parametrize("named", [True, False], ids=["names", "no names"])
@pytest.mark.parametrize("name", KERAS_OPTIMIZERS)
def test_of_keras_optimizers_only_adams_are_taken(name, named, keras):
    if not hasattr(keras.optimizers, name):
        pytest.skip(f"this Keras has no {name}")
    optimizer = built_keras(keras, name, **KERAS_OPTIMIZERS[name])
    variables = [(v.path, np.asarray(v)) for v in optimizer.variables]
    variables = variables if named else [x for _, x in variables]
    makes = {"Adamax": adamjax.adamax, "AdamW": adamjax.adamw, "Nadam": adamjax.nadam}
    tx, params = makes.get(name, adamjax.adam)(0.1), {"w": jnp.ones(3)}
    if name in ("Adam", "AdamW", "Adamax", "Nadam"):
        assert int(adamjax.step_count(convert.from_keras(variables, tx, params))) == 2
    elif name in ("Lamb", "Muon") and not named:
        # Their moments of a vector are Adam's: nothing tells.
        convert.from_keras(variables, tx, params)
    else:
        with pytest.raises(ValueError, match="from_keras: "):
            convert.from_keras(variables, tx, params)


def test_keras_optimizers_of_another_name(keras):
    """A name of one's own does not say which optimizer it is of: the optimizer itself does."""
    params, tx = {"w": jnp.ones(3)}, adamjax.adam(0.1)
    for kind, options in [("Adam", {}), ("Lamb", {}), ("ScheduleFreeAdamW", {})]:
        optimizer = built_keras(keras, kind, name="mine", **options)
        bare = [(v.name, np.asarray(v)) for v in optimizer.variables]
        for variables, problem in [
            (optimizer.variables, "an optimizer that is named 'mine'"),
            (bare, "names of the variables do not contain that of their optimizer"),
        ]:
            with pytest.raises(ValueError, match=problem):
                convert.from_keras(variables, tx, params)
        if kind == "Adam":
            assert int(adamjax.step_count(convert.from_keras(optimizer, tx, params))) == 2
        else:
            with pytest.raises(ValueError, match=rf"the optimizer is a keras.*{kind}: expected"):
                convert.from_keras(optimizer, tx, params)
    called_adam = built_keras(keras, "RMSprop", name="adam", momentum=0.9)
    with pytest.raises(ValueError, match="velocities come before momenta"):
        convert.from_keras(called_adam.variables, tx, params)


def test_all_of_keras_optimizers_but_adams_are_refused(keras):
    """Those of future versions too."""
    taken, params = set(), {"w": jnp.ones(3)}
    for name, kind in vars(keras.optimizers).items():
        if not isinstance(kind, type) or name in ("Optimizer", "OptimizerMap", "MultiOptimizer"):
            continue
        optimizer = kind(keras.optimizers.Adam() if name == "LossScaleOptimizer" else 0.1)
        optimizer.build([keras.Variable(np.ones(3, np.float32), name="w")])
        txs = (adamjax.adam, adamjax.adamw, adamjax.amsgrad, adamjax.adamax, adamjax.nadam)
        for given in (optimizer, optimizer.variables):
            for tx in txs:
                try:
                    convert.from_keras(given, tx(0.1), params)
                except ValueError as error:
                    assert "from_keras: " in str(error)  # noqa: PT017
                else:
                    taken.add((name, tx.__name__))
    # Keras' Adam may have a weight decay too.
    expected = {("Adam", "adam"), ("Adam", "adamw"), ("AdamW", "adamw")}
    expected |= {("Adamax", "adamax"), ("Nadam", "nadam")}
    assert taken == expected


def test_what_is_passed_in_place_of_a_keras_optimizer_is_named(keras):
    params, tx = {"w": jnp.ones(3)}, adamjax.adam(0.1)
    adam = built_keras(keras, "Adam")
    scaled = keras.optimizers.LossScaleOptimizer(keras.optimizers.Adam(0.1))
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    model.compile(keras.optimizers.Adam(0.1), "mse")
    several = built_keras(keras, "Adam")
    several.__class__ = type("MultiOptimizer", (type(several),), {"optimizers": [adam]})
    for given, message in [
        (built_keras(keras, "SGD", momentum=0.9), r"is a keras.*SGD: expected Keras' Adam"),
        (scaled, r"LossScaleOptimizer: expected .* Convert its inner_optimizer"),
        (several, r"MultiOptimizer: expected .* Convert each of its optimizers by itself"),
        (model, r"is a keras.*Sequential: expected .* Pass its optimizer"),
        ({"name": "adam", "beta_1": 0.9}, r"a config, which has no variables"),
        ("model.weights.h5", r"got the path 'model.weights.h5', expected optimizer.variables"),
    ]:
        with pytest.raises((TypeError, ValueError), match=message):
            convert.from_keras(given, tx, params)


def test_an_optimizer_of_keras_says_its_hyperparameters(keras):
    params = {"w": jnp.ones(3)}
    for options, tx, problem in [
        ({"beta_1": 0.8}, adamjax.adam(0.1), r"b1=0.8, tx has b1=0.9"),
        ({"epsilon": 1e-5}, adamjax.adam(0.1), r"eps_hat=1e-05, tx has eps_hat=1e-07"),
        ({"weight_decay": 0.01}, adamjax.adam(0.1), r"a weight decay of 0.01, tx has 0 before"),
        (
            {"gradient_accumulation_steps": 4},
            None,
            r"has gradient_accumulation_steps=4, and tx accumulates over 2",
        ),
        ({"clipnorm": 0.5}, adamjax.adam(0.1), r"clip_by_norm\(max_norm=0.5\), tx has no clip"),
        ({"clipvalue": 0.5}, adamjax.adam(0.1), r"clip_by_value\(limit=0.5\), tx has no clip"),
        (
            {"clipnorm": 0.5},
            clipped_by(adamjax.clip_by_global_norm(0.5)),
            r"tx has clip_by_global_",
        ),
        ({"global_clipnorm": 0.5}, clipped_by(adamjax.clip_by_norm(0.5)), r"tx has clip_by_norm"),
        ({"clipnorm": 0.5}, clipped_by(adamjax.clip_by_norm(0.25)), r"tx has clip_by_norm\(max_n"),
        (
            {"clipnorm": 0.5},
            adamjax.chain(adamjax.adam(0.1), adamjax.clip_by_norm(0.5)),
            r"clip_by_norm\(max_norm=0.5\) after the rule",
        ),
        (
            {"clipnorm": 0.5},
            clipped_by(adamjax.clip_by_value(0.1), adamjax.clip_by_norm(0.5)),
            r"tx has clip_by_value\(limit=0.1\), clip_by_norm",
        ),
        (
            {},
            clipped_by(adamjax.clip_by_value(0.1)),
            r"no clip, tx has clip_by_value.*leave clips out",
        ),
        (
            {"gradient_accumulation_steps": 2, "clipnorm": 0.5},
            adamjax.chain(
                adamjax.clip_by_norm(0.5), adamjax.accumulate_gradients(adamjax.adam(0.1), 2)
            ),
            r"clip_by_norm\(max_norm=0.5\) outside of accumulate_gradients",
        ),
        (
            {"loss_scale_factor": 8.0},
            adamjax.adam(0.1),
            r"by 0.125, tx has gradients multiplied by 1 ",
        ),
        (
            {"loss_scale_factor": 8.0, "clipnorm": 0.5},
            clipped_by(adamjax.clip_by_norm(0.5), adamjax.scale(0.125)),
            r"multiplied by 0.125, tx has .* by 1 before a clip, and by 0.125 after it: .*begin tx",
        ),
        (
            {"loss_scale_factor": 2.0},
            adamjax.chain(adamjax.adam(0.2), adamjax.scale(0.5)),
            r"gradients multiplied by 0.5, tx",
        ),
        ({}, clipped_by(adamjax.scale(-1.0)), r"no loss_scale_factor, tx .* multiplied by -1"),
        (
            {"use_ema": True, "ema_momentum": 0.5},
            adamjax.chain(adamjax.adam(0.1), adamjax.weight_ema(0.75)),
            r"an average with momentum=0.5, overwrite_frequency=None, tx has momentum=0.75",
        ),
        (
            {"use_ema": True, "ema_momentum": 0.0},
            adamjax.chain(adamjax.adam(0.1), adamjax.weight_ema(0.75)),
            r"momentum=0, overwrite_frequency=None, tx has momentum=0.75",
        ),
        (
            {"use_ema": True, "ema_momentum": 0.5},
            adamjax.chain(adamjax.adam(0.1), adamjax.weight_ema(0.5, 3)),
            r"overwrite_frequency=None, tx has momentum=0.5, overwrite_frequency=3",
        ),
        (
            {},
            adamjax.accumulate_gradients(adamjax.adam(0.1), 2),
            r"but tx has accumulate_gradients",
        ),
    ]:
        optimizer = built_keras(keras, "Adam", **options)
        tx = tx or adamjax.accumulate_gradients(adamjax.adam(0.1), 2)
        with pytest.raises(ValueError, match=problem):
            convert.from_keras(optimizer, tx, params)
        convert.from_keras(optimizer, tx, params, check=False)
        if "accumulation" not in problem:  # with other steps the target has no count
            with pytest.raises(ValueError, match=problem):
                convert.to_keras(tx.init(params), tx, params, optimizer)


def clipped_by(*transforms):
    return adamjax.chain(*transforms, adamjax.adam(0.1))


def test_what_keras_does_to_gradients_may_be_built(keras):
    params = {"w": jnp.ones(3)}
    for options, tx in [
        ({"clipnorm": 0.5}, clipped_by(adamjax.clip_by_norm(0.5))),
        ({"clipnorm": -1.0}, adamjax.adam(0.1)),  # without effect in Keras
        (
            {"loss_scale_factor": 8.0, "global_clipnorm": 0.5},
            clipped_by(adamjax.scale(0.125), adamjax.clip_by_global_norm(0.5)),
        ),
        (
            {"gradient_accumulation_steps": 2, "clipvalue": 0.5},
            adamjax.accumulate_gradients(clipped_by(adamjax.clip_by_value(0.5)), 2),
        ),
    ]:
        convert.from_keras(built_keras(keras, "Adam", **options), tx, params)


def test_a_global_norm_of_keras_is_that_of_all_leaves(keras):
    optimizer = keras.optimizers.Adam(0.1, global_clipnorm=0.5)
    variables = [
        keras.Variable(np.ones(n, np.float32), name=name) for n, name in ((3, "a"), (2, "b"))
    ]
    optimizer.build(variables)
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    each = clipped_by(adamjax.clip_by_global_norm(0.5))
    convert.from_keras(optimizer, each, params)
    with pytest.raises(ValueError, match=r"clip_by_global_norm\(max_norm=0.5\) of other leaves"):
        convert.from_keras(optimizer, adamjax.partition([("a", each)], default=each), params)


def test_all_leaves_accumulate_as_in_keras(keras):
    optimizer = keras.optimizers.Adam(0.1, gradient_accumulation_steps=2)
    variables = [
        keras.Variable(np.ones(n, np.float32), name=name) for n, name in ((3, "a"), (2, "b"))
    ]
    optimizer.build(variables)
    params, rule = {"a": jnp.ones(3), "b": jnp.ones(2)}, adamjax.adam(0.1)
    two = adamjax.accumulate_gradients(rule, 2)
    convert.from_keras(optimizer, adamjax.partition([("a", two)], default=two), params)
    for other in (rule, adamjax.accumulate_gradients(rule, 4)):
        tx = adamjax.partition([("a", two)], default=other)
        with pytest.raises(ValueError, match=r"does not accumulate 'b' over 2 as it does others"):
            convert.from_keras(optimizer, tx, params)
        with pytest.raises(ValueError, match=r"does not accumulate 'b' over 2 as it does others"):
            convert.to_keras(tx.init(params), tx, params, optimizer)


def test_another_number_of_micro_batches_than_in_keras_is_refused(keras):
    params = {"w": jnp.ones(3)}
    tx = adamjax.accumulate_gradients(adamjax.adam(0.1), 4)
    message = (
        "has gradient_accumulation_steps=2, and tx accumulates over 4: build tx with "
        "accumulate_gradients of 2 steps"
    )
    for calls in (0, 4):
        optimizer = keras.optimizers.Adam(0.1, gradient_accumulation_steps=2)
        optimizer.build([keras.Variable(np.ones(3, np.float32), name="w")])
        optimizer._iterations.assign(calls)
        with pytest.raises(ValueError, match=message):
            convert.from_keras(optimizer, tx, params)
        with pytest.raises(ValueError, match=message):
            convert.to_keras(tx.init(params), tx, params, optimizer)


def keras_of_rate(keras, rate, count=0):
    """A Keras Adam with this rate after `count` steps."""
    optimizer = keras.optimizers.Adam(rate)
    optimizer.build([keras.Variable(np.ones(3, np.float32), name="w")])
    optimizer.iterations.assign(count)
    return optimizer


def test_a_function_that_keras_calls_without_arguments_is_no_schedule(keras):
    """It cannot be compared in later steps, but a constant rate is not it."""
    params, falls = {"w": jnp.ones(3)}, adamjax.cosine_decay

    def rate(step=0):
        return 0.1 * 0.5**step

    for given in (lambda: 0.1, rate):
        optimizer = keras_of_rate(keras, given, 5)
        with pytest.raises(ValueError, match=r"a learning rate that follows a schedule \(a "):
            convert.from_keras(optimizer, adamjax.adam(0.1), params)
        with pytest.raises(ValueError, match=r"a learning rate of 0\.1, tx has 0\.003125"):
            convert.from_keras(optimizer, adamjax.adam(lambda count: 0.1 * 0.5**count), params)
        convert.from_keras(optimizer, adamjax.adam(adamjax.constant(0.1)), params)
    optimizer = keras_of_rate(keras, lambda count: 0.1)
    with pytest.raises(ValueError, match=r"cannot be called without arguments, as Keras calls it"):
        convert.from_keras(optimizer, adamjax.adam(falls(0.1, 100)), params)


def test_a_schedule_of_keras_is_called_with_what_keras_passes(keras):
    """With a variable of integers. Of the Python int 0, none of these takes what it needs."""
    params, schedules = {"w": jnp.ones(3)}, keras.optimizers.schedules

    class Noam(schedules.LearningRateSchedule):  # no get_config: only a saved model needs it
        def __call__(self, step):
            return 0.1 * keras.ops.minimum(step**-0.5, step * 40**-1.5)

    class OfValue(schedules.LearningRateSchedule):
        def __call__(self, step):
            return 0.1 * 0.5 ** (keras.ops.cast(step.value, "float32") / 50)

    def warm(steps):
        return lambda n: 0.1 * jnp.minimum(jnp.maximum(n, 1) ** -0.5, n * steps**-1.5)

    halving = adamjax.exponential_decay(0.1, 50, 0.5)
    for schedule, right, others in (
        (Noam(), warm(40), (warm(400), adamjax.constant(0.1))),
        (OfValue(), halving, (adamjax.exponential_decay(1.0, 50, 0.5), warm(40))),
    ):
        optimizer = keras_of_rate(keras, schedule, 5)
        convert.from_keras(optimizer, adamjax.adam(right), params)
        assert int(optimizer.iterations) == 5
        for tx in map(adamjax.adam, others):
            for call in (
                lambda o=optimizer, tx=tx: convert.from_keras(o, tx, params),
                lambda o=optimizer, tx=tx: convert.to_keras(tx.init(params), tx, params, o),
            ):
                with pytest.raises(ValueError, match="'w': Keras has a learning rate of"):
                    call()


def test_a_schedule_of_keras_that_cannot_be_called(keras):
    """One that reads a table is compared as far as it goes."""
    params, schedules = {"w": jnp.ones(3)}, keras.optimizers.schedules

    class Table(schedules.LearningRateSchedule):
        rates = np.linspace(0.1, 0.01, 100)

        def __call__(self, step):
            return self.rates[int(step)]

    class Broken(schedules.LearningRateSchedule):
        def __call__(self, step):
            return self.rates[step]

    class NaNAtFirst(schedules.LearningRateSchedule):
        def __call__(self, step):
            step = keras.ops.cast(step, "float32")
            return 0.1 * step / step

    def table(end):
        return lambda n: jnp.linspace(0.1, end, 100)[jnp.minimum(n, 99)]

    optimizer = keras_of_rate(keras, Table(), 5)
    convert.from_keras(optimizer, adamjax.adam(table(0.01)), params)
    with pytest.raises(ValueError, match="Keras has a learning rate of"):
        convert.from_keras(optimizer, adamjax.adam(table(0.02)), params)
    for late in (keras_of_rate(keras, Table(), 100), keras_of_rate(keras, Broken())):
        message = r"that cannot be compared: a .* cannot be called at count .*Error: .*check=False"
        with pytest.raises(ValueError, match=message):
            convert.from_keras(late, adamjax.adam(table(0.01)), params)
        convert.from_keras(late, adamjax.adam(table(0.01)), params, check=False)
    optimizer = keras_of_rate(keras, NaNAtFirst())
    convert.from_keras(optimizer, adamjax.adam(lambda n: 0.1 * n / n), params)
    with pytest.raises(ValueError, match="a learning rate of nan"):
        convert.from_keras(optimizer, adamjax.adam(0.1), params)


def test_a_schedule_that_keras_computes_in_integers_is_not_its_formula(keras):
    params, schedules = {"w": jnp.ones(3)}, keras.optimizers.schedules
    config = keras.optimizers.serialize
    for make in (
        lambda one: schedules.CosineDecay(0 * one, 1000, warmup_target=0.1, warmup_steps=100),
        lambda one: schedules.ExponentialDecay(one, 100, 0.96),
        lambda one: schedules.InverseTimeDecay(one, 100, 0.5),
        lambda one: schedules.PolynomialDecay(one, 100, 0.1),
    ):
        tx = adamjax.from_config(config(keras.optimizers.Adam(make(1.0))))
        convert.from_keras(keras_of_rate(keras, make(1.0), 50), tx, params)
        for one in (1, np.int64(1)):
            optimizer = keras_of_rate(keras, make(one), 50)
            with pytest.raises(ValueError, match=r"in integers.* a float, such as 0.0 or 1.0"):
                convert.from_keras(optimizer, tx, params)
        with pytest.raises(ValueError, match=r"initial_learning_rate: .* in integers"):
            adamjax.from_config(config(keras.optimizers.Adam(make(1))))


def test_a_schedule_of_keras_is_compared_closely_with_a_function(keras):
    """The two differ between powers of two, at no end of a part."""
    params, schedules = {"w": jnp.ones(3)}, keras.optimizers.schedules
    optimizer = keras_of_rate(keras, schedules.ExponentialDecay(0.1, 1000, 0.5), 3)
    for factor in (1.0, 0.1):
        tx = adamjax.adam(
            lambda n, x=factor: 0.1 * 0.5 ** (n / 1000) * jnp.where((n >= 300) & (n < 500), x, 1.0)
        )
        problem = factor != 1 and pytest.raises(ValueError, match=r"after [34]\d\d steps, tx has")
        with problem or nullcontext():
            convert.from_keras(optimizer, tx, params)


def test_a_schedule_of_a_keras_optimizer_is_compared(keras):
    params, falls = {"w": jnp.ones(3)}, adamjax.cosine_decay
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 1000))
    optimizer.build([keras.Variable(np.ones(3, np.float32), name="w")])
    for count in (0, 500, 998):
        optimizer._iterations.assign(count)
        tx = adamjax.adam(falls(0.1, 1000))
        state = convert.from_keras(optimizer, tx, params)
        assert int(adamjax.step_count(state)) == count
        convert.to_keras(state, tx, params, optimizer)
        for other in (falls(0.2, 1000), falls(0.1, 990) if count else 0.2):
            with pytest.raises(ValueError, match="from_keras: 'w': Keras has a learning rate of"):
                convert.from_keras(optimizer, adamjax.adam(other), params)


def test_a_schedule_of_a_keras_optimizer_is_compared_in_later_steps(keras):
    """In the first steps all of these rates are the same."""
    params, k = {"w": jnp.ones(3), "b": jnp.ones(2)}, keras.optimizers
    cosine = k.schedules.CosineDecay(0.0, 60, 0.1, warmup_target=0.1, warmup_steps=12)
    pieces = k.schedules.PiecewiseConstantDecay([1000, 3001], [0.1, 0.2, 0.3])
    for schedule, right, others in (
        (
            cosine,
            adamjax.warmup(adamjax.cosine_decay(0.1, 60, 0.1), 12),
            [
                adamjax.warmup(adamjax.cosine_decay(0.1, 61, 0.1), 12),
                adamjax.warmup(adamjax.cosine_decay(0.1, 60, 0.2), 12),
                adamjax.warmup(adamjax.constant(0.1), 12),
            ],
        ),
        (
            pieces,
            adamjax.piecewise_constant([1000, 3001], [0.1, 0.2, 0.3]),
            [
                adamjax.piecewise_constant([1000, 3002], [0.1, 0.2, 0.3]),
                adamjax.piecewise_constant([1000], [0.1, 0.2]),
                0.1,
            ],
        ),
    ):
        optimizer = k.Adam(schedule)
        variables = [(np.ones(2), "b"), (np.ones(3), "w")]
        optimizer.build([keras.Variable(x.astype(np.float32), name=n) for x, n in variables])
        optimizer.iterations.assign(5)
        convert.from_keras(optimizer, adamjax.adam(right), params)
        rates = adamjax.by_path({"w": right}, default=right)
        convert.from_keras(optimizer, adamjax.adam(rates), params)
        for other in others:
            with pytest.raises(ValueError, match=r"'[bw]': Keras has a learning rate"):
                convert.from_keras(optimizer, adamjax.adam(other), params)
        rates = adamjax.by_path({"w": others[0]}, default=right)
        with pytest.raises(
            ValueError, match=r"'w': Keras has a learning rate of .* after \d+ steps"
        ):
            convert.from_keras(optimizer, adamjax.adam(rates), params)


def test_schedules_with_quotients_of_counts_are_those_of_keras(keras):
    """Of int32 counts these quotients are float32, with x64 too."""
    params, k = {"w": jnp.ones(3)}, keras.optimizers
    rates = k.schedules
    for schedule, right in (
        (rates.ExponentialDecay(1e-2, 10_000, 0.9), lambda count: 1e-2 * 0.9 ** (count / 10_000)),
        (rates.ExponentialDecay(0.1, 1000, 0.96), optax.exponential_decay(0.1, 1000, 0.96)),
        (rates.PolynomialDecay(1e-3, 10_000, 0.0), optax.linear_schedule(1e-3, 0.0, 10_000)),
        (
            rates.CosineDecay(0.0, 9000, warmup_target=1e-3, warmup_steps=1000),
            optax.warmup_cosine_decay_schedule(0.0, 1e-3, 1000, 10_000),
        ),
    ):
        optimizer = k.Adam(schedule)
        optimizer.build([keras.Variable(np.ones(3, np.float32), name="w")])
        convert.from_keras(optimizer, adamjax.adam(right), params)
        with pytest.raises(ValueError, match="Keras has a learning rate of"):
            convert.from_keras(
                optimizer, adamjax.adam(lambda count, r=right: 1.01 * r(count)), params
            )


def restarts(first, rate=0.01):
    """Keras' CosineDecayRestarts, whose periods double."""

    def at(count):
        i = jnp.floor(jnp.log2(count / first + 1))
        start = first * (2.0**i - 1)
        return rate * 0.5 * (1 + jnp.cos(jnp.pi * (count - start) / (first * 2.0**i)))

    return at


def cosines(period, rate=0.01):
    """The same with equal periods; after many, Keras' quotients in float32 are coarse."""
    return lambda count: rate * 0.5 * (1 + jnp.cos(jnp.pi * ((count % period) / period)))


def noam(warm, rate=0.1):
    return lambda count: rate * jnp.minimum((count + 1.0) ** -0.5, (count + 1.0) * warm**-1.5)


@pytest.mark.slow
def test_schedules_of_keras_that_adamjax_does_not_have_are_called(keras):
    schedules = keras.optimizers.schedules

    class Noam(schedules.LearningRateSchedule):
        def __call__(self, step):
            step = keras.ops.cast(step, "float32") + 1
            return 0.1 * keras.ops.minimum(step**-0.5, step * 100**-1.5)

        def get_config(self):
            return {}

    params = {"w": jnp.ones(3)}
    cosine = adamjax.cosine_decay(0.01, 900)
    for schedule, right, others in (
        (schedules.CosineDecayRestarts(0.01, 200), restarts(200), (restarts(201), cosine)),
        (
            schedules.CosineDecayRestarts(0.01, 1000, t_mul=1.0),
            cosines(1000),
            (cosines(1000, 0.0101), cosines(1001), restarts(1000)),
        ),
        (Noam(), noam(100), (noam(101), noam(100, 0.2), 0.1)),
        (
            schedules.CosineDecay(0.0, 900, warmup_target=0.01, warmup_steps=12.5),
            lambda count: jnp.where(count < 12.5, 0.01 * count / 12.5, cosine(count - 12.5)),
            (adamjax.warmup(cosine, steps=50), adamjax.warmup(cosine, steps=12)),
        ),
    ):
        optimizer = keras.optimizers.Adam(schedule)
        optimizer.build([keras.Variable(np.ones(3, np.float32), name="w")])
        for count in (60, 0):
            optimizer.iterations.assign(count)
            convert.from_keras(optimizer, adamjax.adam(right), params)
        for other in others:
            with pytest.raises(ValueError, match=r"Keras has a learning rate of"):
                convert.from_keras(optimizer, adamjax.adam(other), params)


class OldAdam:
    """What conversions read of an optimizer of Keras before 2.11."""

    __module__ = "keras.optimizers.legacy.adam"
    clipnorm = clipvalue = global_clipnorm = None
    beta_1, beta_2, epsilon, amsgrad = 0.9, 0.999, 1e-7, False

    def __init__(self, rate, decay=0.0, prefix="Adam/"):
        self._hyper = {"learning_rate": rate, "decay": decay}
        names = [f"{prefix}{leaf}/{slot}:0" for slot in "mv" for leaf in ("a/kernel", "b/kernel")]
        self.saved = [("iter:0", np.array(3)), *((name, np.zeros(2)) for name in names)]

    def get_config(self):
        return {}

    def variables(self):
        return self.saved


OldAdam.__name__ = "Adam"


@pytest.mark.parametrize("prefix", ["Adam/", ""], ids=["new", "after load_model"])
def test_rates_and_names_of_old_keras_optimizers(prefix):
    params = {"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}}
    decayed = adamjax.inverse_time_decay(0.1, 1, 0.5)
    of_class = type("LearningRateSchedule", (), {"__call__": lambda self, n: 0.1 / (n + 1)})
    for old, right, other in (
        (OldAdam(0.1, prefix=prefix), 0.1, 0.2),
        (OldAdam(np.float32(0.1), 0.5, prefix=prefix), decayed, 0.1),
        (OldAdam(of_class(), prefix=prefix), lambda n: 0.1 / (n + 1), 0.1),
        (
            OldAdam(of_class(), 0.5, prefix=prefix),
            lambda n: 0.1 / (n + 1) / (1 + 0.5 * n),
            lambda n: 0.1 / (n + 1),
        ),
        (OldAdam(lambda: 0.1, prefix=prefix), adamjax.constant(0.1), 0.2),
    ):
        state = convert.from_keras(old, adamjax.adam(right), params)
        assert adamjax.step_count(state) == 3
        with pytest.raises(ValueError, match=r"Keras has a learning rate of"):
            convert.from_keras(old, adamjax.adam(other), params)


@pytest.mark.parametrize("name", ["_exclude_from_weight_decay", "_exclude_from_weight_decay_names"])
def test_tf_keras_says_that_its_decay_excludes_some_variables(name):
    params = {"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}}
    old = OldAdam(0.1)
    old.weight_decay, old._use_weight_decay = 0.01, lambda variable: True
    setattr(old, name, ["b"])
    convert.from_keras(old, adamjax.adamw(0.1, weight_decay=0.01, mask="^a"), params)
    with pytest.raises(ValueError, match="variables that its weight decay excludes"):
        convert.from_keras(old, adamjax.adamw(0.1, weight_decay=0.01), params)


def test_a_product_that_tf_keras_keeps_elsewhere_is_not_lost():
    params, tx = {"a": {"kernel": jnp.ones(2)}, "b": {"kernel": jnp.ones(2)}}, adamjax.nadam(0.1)
    target = type("Nadam", (OldAdam,), {"__module__": OldAdam.__module__})(0.1)
    target._u_product = 1.0
    with pytest.raises(ValueError, match=r"check=False, .*_u_product\.assign\(1\)"):
        convert.to_keras(tx.init(params), tx, params, target)
    convert.to_keras(tx.init(params), tx, params, target, check=False)


def test_variables_of_keras_say_that_there_is_a_schedule(keras):
    """A constant rate has a variable, `adam/learning_rate`; a schedule has none."""
    params, falls = {"w": jnp.ones(3)}, adamjax.cosine_decay(0.1, 1000)
    optimizer = keras.optimizers.Adam(keras.optimizers.schedules.CosineDecay(0.1, 1000))
    optimizer.build([keras.Variable(np.ones(3, np.float32), name="w")])
    current = [(v.path, np.asarray(v)) for v in optimizer.variables]
    of_tf_keras = [("iteration:0", np.array(0)), ("current_learning_rate:0", np.float32(0.1))]
    of_tf_keras += [(f"Adam/{slot}/w:0", np.zeros(3)) for slot in "mv"]
    constant, arrays = adamjax.adam(0.1), [x for _, x in current]
    numbered = {str(i): x for i, x in enumerate(arrays)}
    for variables in (optimizer.variables, dict(current), numbered, arrays, of_tf_keras):
        for tx in (constant, adamjax.chain(adamjax.scale_by_adam(), adamjax.scale(-0.1))):
            with pytest.raises(
                ValueError, match=r"follows a schedule .* tx has a constant one: bu"
            ):
                convert.from_keras(variables, tx, params)
        for tx in (
            adamjax.adam(falls),
            adamjax.adam(adamjax.constant(0.1)),
            adamjax.adam(adamjax.by_path([("w", falls)], default=0.1)),
            adamjax.with_hyperparams(constant, learning_rate=0.1),
        ):
            convert.from_keras(variables, tx, params)
        with pytest.raises(ValueError, match=r"a learning rate for all leaves, tx has none for a"):
            convert.from_keras(variables, adamjax.scale_by_adam(), params)
        convert.from_keras(variables, constant, params, check=False)
        with pytest.raises(ValueError, match=r"to_keras: .*follows a schedule"):
            convert.to_keras(constant.init(params), constant, params, variables)
    # tf_keras and older ones have an iteration in int64, and never a rate among their arrays.
    convert.from_keras([np.array(0, np.int64), *arrays[1:]], constant, params)
    two = [np.array(0, np.int32), *[np.zeros(n) for n in (2, 3, 2, 3)]]
    convert.from_keras(two, constant, {"a": jnp.ones(2), "b": jnp.ones(3)})


def test_a_keras_optimizer_that_is_not_built_is_refused(keras):
    params, tx = {"w": jnp.ones(3)}, adamjax.adam(0.1)
    optimizer = keras.optimizers.Adam(0.1)
    stored = {str(i): np.asarray(v.value) for i, v in enumerate(optimizer.variables)}
    for variables in (optimizer, optimizer.variables, stored):
        with pytest.raises(ValueError, match=r"no moments, so it is not built yet: .*build\("):
            convert.from_keras(variables, tx, params)
    with pytest.raises(TypeError, match=r"a config, which has no variables: .*from_config"):
        convert.from_keras({"class_name": "Adam", "config": {}}, tx, params)


def test_states_that_were_restored_without_their_classes():
    params, tx = {"w": jnp.ones(3)}, adamjax.adam(0.1)
    bare = [dict(optax.adam(0.1).init(params)[0]._asdict()), {}]
    for restored in (bare, {}):
        with pytest.raises(ValueError, match=r"moments of no leaf, .*restored without its classes"):
            convert.from_optax(restored, tx, params, OLD)
    for restored in (bare, (bare[0], {}), {"0": bare[0]}):
        with pytest.raises(TypeError, match=r"the state is a \w+, expected .*without its classes"):
            tx.update(params, restored, params)
    mended = jax.tree.structure(tx.init(params)).unflatten(jax.tree.leaves(tx.init(params)))
    assert_same(mended, tx.init(params))


def keras_layers(names, prefix="adam"):
    """Variables of as many leaves of one shape, their moments the number of each."""
    pairs = [(f"{prefix}/iteration", np.array(1)), (f"{prefix}/learning_rate", np.float32(RATE))]
    for i, name in enumerate(names):
        x = np.full(2, i + 1, np.float32)
        pairs += [(f"{prefix}/{name}_momentum", x), (f"{prefix}/{name}_velocity", x)]
    return pairs


LAYERS = ["dense", *(f"dense_{i}" for i in range(1, 12))]


def layered(names):
    return {name: {"kernel": jnp.zeros(2)} for name in names}


def test_variables_of_keras_are_taken_by_their_names():
    """A dictionary has dense_10 before dense_2."""
    params, tx = layered(LAYERS), adamjax.adam(RATE)
    pairs = keras_layers([f"sequential_{name}_kernel" for name in LAYERS])
    expected = {n: {"kernel": jnp.full(2, i + 1.0)} for i, n in enumerate(LAYERS)}
    # In the order of the slots, and of the variables sorted by name, too.
    by_slot = sorted(pairs, key=lambda pair: pair[0].rsplit("_", 1)[-1])
    for given in (pairs, by_slot, sorted(pairs), dict(pairs)):
        state = convert.from_keras(given, tx, params)
        assert_same(adamjax.get_slot(state, "m"), expected)
        assert_same(adamjax.get_slot(state, "v"), expected)
    values = convert.to_keras(state, tx, params, pairs)
    assert_same(values[2:], [x for _, x in pairs[2:]])
    # A list says no names: it is taken in its order.
    state = convert.from_keras(pairs, tx, [jnp.zeros(2)] * len(LAYERS))
    assert_same(adamjax.get_slot(state, "m"), [x["kernel"] for x in expected.values()])
    order = [f"{name}/kernel" for name in LAYERS]
    assert_same(adamjax.get_slot(convert.from_keras(pairs, tx, params, order=order), "m"), expected)
    with pytest.raises(ValueError, match=r"order has 'dense_1/kernel' in the place of Keras's 's"):
        convert.from_keras(pairs, tx, params, order=[*order[1::-1], *order[2:]])
    other = keras_layers([f"conv_{i}" for i in range(12)])
    with pytest.raises(ValueError, match=r"Keras names its parameters \['conv_0'.*give order="):
        convert.from_keras(other, tx, params)
    mixed = [*pairs[:-1], ("adam/sequential_dense_1_kernel_velocity", pairs[-1][1])]
    with pytest.raises(ValueError, match=r"leaves of velocity are others than those of momentum"):
        convert.from_keras(mixed, tx, params)
    both = [*pairs[:-1], ("nadam/sequential_dense_11_kernel_velocity", pairs[-1][1])]
    with pytest.raises(ValueError, match=r"of several optimizers, \['adam', 'nadam'\]"):
        convert.from_keras(both, tx, params)


def sorted_pairs(names):
    return dict(sorted(keras_layers(names)))


@pytest.mark.parametrize(
    ("variables", "fault"),
    [
        (sorted_pairs(["zeta", "beta", "mid"]), "not in Keras' order, in which the iteration"),
        (sorted_pairs(["zeta", "nu", "xi"]), "the names are sorted, so their order need not be"),
        (
            list(sorted_pairs(["zeta", "nu", "xi"]).items()),
            "the names are sorted, so their order need not be",
        ),
        (  # safetensors sorts by dtype and then by name
            dict(sorted(keras_layers(["zeta", "beta", "mid"]), key=lambda p: p[1].dtype.kind)),
            "not in Keras' order",
        ),
    ],
)
def test_names_of_keras_that_were_sorted_give_no_order(variables, fault):
    """`jax.device_get` and h5py sort a dictionary by its keys."""
    tx = adamjax.adam(RATE)
    value_of = dict(variables)
    names = [key[5:].removesuffix("_momentum") for key in value_of if "momentum" in key]
    size = {name: float(value_of[f"adam/{name}_momentum"][0]) for name in names}
    params = {f"l{i}": jnp.zeros(2) for i in range(3)}
    paths = ["l0", "l1", "l2"]
    for tree, order in ((params, paths), (list(params.values()), None)):
        state = convert.from_keras(keras_layers(size), tx, tree, order=order, check=False)
        for call in (
            lambda tree=tree, order=order: convert.from_keras(variables, tx, tree, order=order),
            lambda state=state, tree=tree, order=order: convert.to_keras(
                state, tx, tree, variables, order=order
            ),
        ):
            with pytest.raises(ValueError, match=rf"{fault}.*give order=.name: path."):
                call()
        convert.from_keras(variables, tx, tree, order=order, check=False)
    with pytest.raises(ValueError, match="give order="):
        convert.from_keras(variables, adamjax.masked(tx, "l1"), params, order=[None, "l1", None])
    # Names decide, in an order or in the leaves.
    order = dict(zip(names, paths, strict=True))
    for given in (order, dict(reversed(order.items()))):
        m = adamjax.get_slot(convert.from_keras(variables, tx, params, order=given), "m")
        assert {path: float(x[0]) for path, x in m.items()} == {
            path: size[name] for name, path in order.items()
        }
    named = {name: jnp.zeros(2) for name in names}
    for given in (None, names, {f"model/{name}": name for name in names}):
        m = adamjax.get_slot(convert.from_keras(variables, tx, named, order=given), "m")
        assert {name: float(x[0]) for name, x in m.items()} == size
    for given, message in [
        ({"other": "l0", "zeta": "l1", "mid": "l2"}, "order has the names .*do not correspond to"),
        (dict.fromkeys(names, "l0"), "order names the leaf 'l0' more than once"),
        (dict.fromkeys(names, "w"), "order names the leaf 'w', but params has no float leaf"),
    ]:
        with pytest.raises(ValueError, match=message):
            convert.from_keras(variables, tx, params, order=given)
    with pytest.raises(TypeError, match="a list of paths, or a dictionary from names to paths"):
        convert.from_keras(variables, tx, params, order={0: "l0", 1: "l1", 2: "l2"})


@pytest.mark.parametrize("prefix", ["lamb", "my_own", "lazy_adam", "rectified_adam", "adam_mini"])
def test_names_of_other_optimizers_are_refused(prefix):
    pairs, params = keras_layers(["a"], prefix), {"a": jnp.zeros(2)}
    with pytest.raises(ValueError, match=rf"an optimizer that is named '{prefix}'"):
        convert.from_keras(pairs, adamjax.adam(RATE), params)
    state = adamjax.adam(RATE).init(params)
    with pytest.raises(ValueError, match=rf"an optimizer that is named '{prefix}'"):
        convert.to_keras(state, adamjax.adam(RATE), params, pairs)
    convert.from_keras(pairs, adamjax.adam(RATE), params, check=False)


def test_numbered_names_of_keras_optimizers():
    for prefix, tx in [("adam_1", adamjax.adam), ("adam_w_12", adamjax.adamw)]:
        convert.from_keras(keras_layers(["a"], prefix), tx(RATE), jnp.zeros(2))
    for prefix in ("adam_w_12", "AdamW"):
        with pytest.raises(ValueError, match=r"Keras has AdamW's weight decay, tx has none: build"):
            convert.from_keras(keras_layers(["a"], prefix), adamjax.adam(RATE), jnp.zeros(2))
    with pytest.raises(ValueError, match=r"those of nadam; for adam, expected"):
        convert.from_keras(keras_layers(["a"], "nadam"), adamjax.adam(RATE), jnp.zeros(2))


def test_names_of_rmsprop_of_tf_keras_are_not_those_of_adam():
    names = ["m", "v"], ["momentum", "velocity"]
    for taken, (m, v) in zip((True, False), names, strict=True):
        pairs = [("iteration:0", np.array(1))]
        pairs += [(f"{role}/dense/kernel:0", np.ones(2, np.float32)) for role in (m, v)]
        if taken:
            convert.from_keras(pairs, adamjax.adam(RATE), jnp.zeros(2))
        else:
            with pytest.raises(ValueError, match="cannot tell what 'momentum/dense/kernel:0' is"):
                convert.from_keras(pairs, adamjax.adam(RATE), jnp.zeros(2))


def test_micro_batches_of_keras_in_another_number():
    """The iteration counts them, and only the accumulated gradients show how many a step takes."""
    params, tx = {"a": jnp.zeros(2)}, adamjax.accumulate_gradients(adamjax.adam(RATE), 4)

    def pairs(iteration, total):
        found = [("adam/iteration", np.array(iteration)), *keras_layers(["a"])[1:]]
        return [*found, ("adam/a_gradient_accumulator", np.full(2, total, np.float32))]

    assert int(convert.from_keras(pairs(8, 0), tx, params).inner[0].count) == 2
    convert.from_keras(pairs(9, 0.5), tx, params)
    for iteration, total in [(8, 0.5), (6, 0.0)]:
        with pytest.raises(ValueError, match=r"does not fit accumulate_gradients of 4 steps"):
            convert.from_keras(pairs(iteration, total), tx, params)


def built_torch(name, named=False, **options):
    """A state dict of torch after two steps."""
    torch = pytest.importorskip("torch")
    w = torch.nn.Parameter(torch.ones(3, 2))
    optimizer = getattr(torch.optim, name)([("w", w)] if named else [w], lr=0.1, **options)
    for scale in (1.0, -0.5):
        w.grad = scale * torch.arange(6.0).reshape(3, 2)
        if name == "SparseAdam":
            w.grad = w.grad.to_sparse(1)
        optimizer.step(*([lambda: w.sum()] if name == "LBFGS" else []))
    return optimizer.state_dict()


ADAMS_OF_TORCH = {
    "Adam": lambda: adamjax.adam(0.1, eps=1e-8),
    "AdamW": lambda: adamjax.adamw(0.1, eps=1e-8, weight_decay=0.01),
    "Adamax": lambda: adamjax.adamax(0.1, eps=1e-8),
    "SparseAdam": lambda: adamjax.adam(0.1, eps_hat=1e-8, rows="lazy"),
}
OTHER_TORCH = [
    *("SGD", "RMSprop", "Adagrad", "Adadelta", "Rprop", "ASGD", "RAdam", "Adafactor", "LBFGS"),
    *("NAdam", "Muon"),
]


@pytest.mark.parametrize("name", [*ADAMS_OF_TORCH, *OTHER_TORCH])
def test_of_torch_optimizers_only_adams_are_taken(name):
    torch = pytest.importorskip("torch")
    if not hasattr(torch.optim, name):
        pytest.skip(f"this torch has no {name}")
    params = {"w": jnp.ones((3, 2))}
    state_dict = built_torch(name, **({"momentum": 0.9} if name == "SGD" else {}))
    if name in ADAMS_OF_TORCH:
        state = convert.from_torch(state_dict, ADAMS_OF_TORCH[name](), params, rtol=1e-4)
        assert int(adamjax.step_count(state)) == 2
    else:
        # NAdam's momentum decays at another rate.
        message = "from_torch: (a group of torch has the options|torch's NAdam)"
        with pytest.raises(ValueError, match=message):
            convert.from_torch(state_dict, adamjax.adam(0.1, eps=1e-8), params)


def test_the_names_of_torch_parameters_are_heeded():
    """Leaves of one shape in another order would take each other's moments."""
    torch = pytest.importorskip("torch")
    leaves = {name: torch.nn.Parameter(torch.ones(2)) for name in ("b", "a")}
    optimizer = torch.optim.Adam(list(leaves.items()), lr=0.1)
    for i, p in enumerate(leaves.values()):
        p.grad = torch.full((2,), i + 1.0)
    optimizer.step()
    tx, params = adamjax.adam(0.1, eps=1e-8), {"a": jnp.ones(2), "b": jnp.ones(2)}
    m = adamjax.get_slot(convert.from_torch(optimizer.state_dict(), tx, params), "m")
    assert_close(m, {"a": jnp.full(2, 0.2), "b": jnp.full(2, 0.1)}, rtol=1e-6)
    with pytest.raises(ValueError, match=r"order has 'a' in the place of torch's 'b'"):
        convert.from_torch(optimizer.state_dict(), tx, params, order=["a", "b"])
    other = {"x": jnp.ones(2), "y": jnp.ones(2)}
    with pytest.raises(ValueError, match=r"names its parameters \['b', 'a'\].*give order="):
        convert.from_torch(optimizer.state_dict(), tx, other)
    m = adamjax.get_slot(
        convert.from_torch(optimizer.state_dict(), tx, other, order=["y", "x"]), "m"
    )
    assert_close(m, {"x": jnp.full(2, 0.2), "y": jnp.full(2, 0.1)}, rtol=1e-6)


def test_maximize_is_a_negation():
    state_dict = built_torch("Adam", maximize=True)
    params, plain = {"w": jnp.ones((3, 2))}, adamjax.adam(0.1, eps=1e-8)
    negated = adamjax.chain(adamjax.scale(-1.0), plain)
    convert.from_torch(state_dict, negated, params)
    with pytest.raises(ValueError, match=r"maximize=True.*begin tx with scale\(-1.0\)"):
        convert.from_torch(state_dict, plain, params)
    with pytest.raises(ValueError, match=r"gradients as they are, tx has scale.*leave it out"):
        convert.from_torch(built_torch("Adam"), negated, params)


@pytest.mark.parametrize(
    "theirs",
    [
        lambda: optax.adabelief(0.1),
        lambda: optax.yogi(0.1),
        lambda: optax.adan(0.1),
        lambda: optax.lion(0.1),
        lambda: optax.novograd(0.1),
        lambda: optax.rmsprop(0.1, momentum=0.9),
        lambda: optax.adafactor(0.1),
        lambda: optax.contrib.schedule_free_adamw(0.1),
    ],
)
def test_of_optax_states_only_adams_are_taken(theirs):
    theirs, params = theirs(), {"w": jnp.ones((3, 2))}
    _, state = theirs.update({"w": jnp.full((3, 2), 0.3)}, theirs.init(params), params)
    if type(theirs).__name__ and any(type(x).__name__ == "ScaleByAdamState" for x in state):
        pytest.skip("its state is of Adam's class")
    for tx in (adamjax.adam(0.1, eps=1e-8), adamjax.amsgrad(0.1, eps=1e-8)):
        with pytest.raises(ValueError, match="from_optax: "):
            convert.from_optax(state, tx, params, theirs)


def test_the_epsilon_error_names_the_other_defaults_of_optax():
    params = {"w": jnp.ones(2)}
    old = optax.adamw(0.1)
    with pytest.raises(ValueError, match=r"b1=0.9, b2=0.999, and weight_decay=1e-4 .*0.004"):
        convert.from_optax(old.init(params), adamjax.adamw(0.1), params, old)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s._replace(count=jnp.array(-1)), "count of 'w' is .*whole number"),
        (lambda s: s._replace(count=jnp.array(1.5)), "count of 'w' is .*whole number"),
        (lambda s: s._replace(nu={"w": -s.nu["w"]}), "nu has values below 0"),
        (lambda s: s._replace(mu=s.nu, nu=s.mu), "larger than nu allows|values below 0"),
        (lambda s: s._replace(mu={"w": 1e3 * s.mu["w"]}), "mu is larger than nu allows"),
        (lambda s: s._replace(count=jnp.array(0)), "not 0 after 0 steps"),
    ],
    ids=["negative", "fraction", "v below 0", "swapped", "too large", "no steps"],
)
def test_moments_that_no_gradients_leave_are_refused(change, message):
    params, old = {"w": jnp.ones(3)}, optax.adam(0.1)
    g = {"w": jnp.array([300.0, -2.0, 0.01])}
    _, state = old.update(g, old.init(params), params)
    tx = adamjax.adam(0.1, eps=1e-8)
    convert.from_optax(state, tx, params, old)
    with pytest.raises(ValueError, match=f"from_optax: .*{message}"):
        convert.from_optax((change(state[0]), *state[1:]), tx, params, old)


def test_moments_whose_squares_are_too_small_for_float16():
    params, old = {"w": jnp.ones(3, jnp.float16)}, optax.adam(0.1, eps=1e-4)
    state = old.init(params)
    for _ in range(3):
        _, state = old.update({"w": jnp.full(3, 1e-4, jnp.float16)}, state, params)
    assert not np.any(state[0].nu["w"])
    made = convert.from_optax(state, adamjax.adam(0.1, eps=1e-4), params, old)
    assert_same(adamjax.get_slot(made, "m")["w"], state[0].mu["w"].astype(jnp.float32))
    large = state[0]._replace(mu={"w": jnp.ones(3, jnp.float16)})
    with pytest.raises(ValueError, match="mu is larger than nu allows"):
        convert.from_optax((large, *state[1:]), adamjax.adam(0.1, eps=1e-4), params, old)


def momenta(decay, b1=0.9):
    return np.prod([b1 * (1 - 0.5 * 0.96 ** (decay * t)) for t in range(1, 8)])


@pytest.mark.parametrize(
    "product", [momenta(0.004), momenta(1, 0.8), np.nan], ids=["legacy", "b1", "nan"]
)
def test_a_product_of_other_momenta_is_refused(product):
    """The momentum of the legacy Nadam of Keras has another schedule, which nothing else shows."""
    tx, params = adamjax.nadam(RATE), {"w": jnp.ones(2)}
    names = ("iter", "momentum_cache", "w/m", "w/v")

    def kept(product):
        values = (np.array(7), np.float32(product), np.full(2, 0.5, "f"), np.ones(2, "f"))
        return [(f"Nadam/{name}:0", x) for name, x in zip(names, values, strict=True)]

    state = convert.from_keras(kept(momenta(1)), tx, params)
    assert_same(state[0].momentum_product, jnp.float32(momenta(1)))
    with pytest.raises(ValueError, match=r"from_keras: the product of momenta is .* after 7 steps"):
        convert.from_keras(kept(product), tx, params)
    convert.from_keras(kept(product), tx, params, check=False)


def test_all_of_torch_optimizers_but_adams_are_refused(torch):
    """Those of future versions too: they have keys of their own."""
    taken, params = set(), [jnp.ones((3, 2))]
    txs = {
        "adam": adamjax.adam(0.1, eps=1e-8),
        "amsgrad": adamjax.amsgrad(0.1, eps=1e-8),
        "adamax": adamjax.adamax(0.1, eps=1e-8),
        "nadam": adamjax.nadam(0.1, eps=1e-8),
        "lazy": adamjax.adam(0.1, eps_hat=1e-8, rows="lazy"),
    }
    for name, kind in vars(torch.optim).items():
        if not isinstance(kind, type) or kind is torch.optim.Optimizer:
            continue
        options = {"weight_decay": 0.0} if name in ("AdamW", "Muon") else {}
        options |= {"momentum_decay": 1.0} if name == "NAdam" else {}
        kept = kind([torch.nn.Parameter(torch.ones(3, 2))], lr=0.1, **options).state_dict()
        for key, tx in txs.items():
            try:
                state = convert.from_torch(kept, tx, params)
            except ValueError as error:
                assert "from_torch: " in str(error)  # noqa: PT017
                with pytest.raises(ValueError, match="to_torch: "):
                    convert.to_torch(tx.init(params), tx, params, kept, adapt=lambda path, x: x)
            else:
                taken.add((name, key))
                convert.to_torch(state, tx, params, kept, adapt=lambda path, x: x)
    adams = {("Adam", "adam"), ("AdamW", "adam"), ("Adamax", "adamax"), ("NAdam", "nadam")}
    assert taken == {*adams, ("SparseAdam", "lazy")}


TORCH_STRANGE = {
    "a key of another optimizer": (
        lambda s: s["param_groups"][0].update(bias_correction=True),
        r"has the options \[.*'bias_correction'.*Remove keys of your own from the groups",
    ),
    "a scheduler that moves betas": (
        lambda s: s["param_groups"][0].update(max_momentum=0.95, base_momentum=0.85),
        r"changes betas in each step",
    ),
    "a moment of another optimizer": (
        lambda s: s["state"][0].update(exp_avg_var=np.ones(2)),
        r"state of 'a' has \['exp_avg', 'exp_avg_sq', 'exp_avg_var', 'step'\], expected 'step'",
    ),
    "no step": (lambda s: s["state"][0].pop("step"), r"state of 'a' has .*, expected 'step'"),
    "half a step": (lambda s: s["state"][0].update(step=1.5), r"count of 'a' is 1.5, expected"),
    "not a number": (
        lambda s: s["state"][0].update(exp_avg=np.array([np.nan, 0.0])),
        r"of 'a', exp_avg has values that are not finite",
    ),
    "integers": (
        lambda s: s["state"][0].update(exp_avg=np.ones(2, int)),
        r"m of 'a' is int64, expected floats",
    ),
    "numbers that JSON turned into strings": (
        lambda s: s.update(state={str(k): x for k, x in s["state"].items()}),
        r"state has the keys \['0', '1'\], but its groups",
    ),
    "as many names as there are not": (
        lambda s: s["param_groups"][0].update(param_names=["a"]),
        r"param_names \['a'\], expected a list of strings for its 2 params",
    ),
}


@pytest.mark.parametrize("name", TORCH_STRANGE)
def test_strange_states_of_torch_are_refused(name):
    change, message = TORCH_STRANGE[name]
    params, tx = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE, eps=1e-8)
    kept = torch_state()
    convert.from_torch(kept, tx, params)
    change(kept)
    with pytest.raises(ValueError, match=f"from_torch: .*{message}"):
        convert.from_torch(kept, tx, params)


def test_what_schedulers_of_torch_note_for_themselves(torch):
    params, tx = {"w": jnp.ones(2)}, adamjax.adam(adamjax.constant(0.1), eps=1e-8)
    for cycle in (False, True):
        optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(2))], lr=0.1)
        options = {"max_lr": 0.1, "total_steps": 10, "div_factor": 1.0, "cycle_momentum": cycle}
        torch.optim.lr_scheduler.OneCycleLR(optimizer, **options)
        if cycle:
            with pytest.raises(ValueError, match=r"OneCycleLR, CyclicLR\) changes betas"):
                convert.from_torch(optimizer.state_dict(), tx, params)
        else:
            convert.from_torch(optimizer.state_dict(), tx, params)
            with pytest.raises(ValueError, match=r"a schedule \(a scheduler has set initial_lr\)"):
                convert.from_torch(optimizer.state_dict(), adamjax.adam(0.1, eps=1e-8), params)


def test_tensors_that_are_not_plain_are_refused():
    class DTensor:
        def detach(self):
            raise AssertionError("not asked")

    kept = torch_state(exp_avg=DTensor())
    with pytest.raises(ValueError, match=r"exp_avg of 'a' is a .*DTensor, expected a plain tensor"):
        convert.from_torch(kept, adamjax.adam(RATE, eps=1e-8), jax.tree.map(jnp.asarray, PARAMS))


def test_names_of_torch_modules_are_those_of_flax(torch):
    """`weight` is `kernel`; names before all others, as of a wrapper, do not matter."""
    layers = [torch.nn.Linear(2, 2, bias=False) for _ in range(12)]
    model = torch.nn.ModuleDict({"layers": torch.nn.ModuleList(layers)})
    optimizer = torch.optim.Adam(model.named_parameters(prefix="module"), lr=0.1)
    for i, layer in enumerate(layers):
        layer.weight.grad = (i + 1.0) * torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    optimizer.step()
    kept = optimizer.state_dict()
    params = {"layers": {str(i): {"kernel": jnp.zeros((2, 2))} for i in range(12)}}
    tx, sizes = adamjax.adam(0.1, eps=1e-8), jnp.array([[1.0, 3.0], [2.0, 4.0]])
    expected = {str(i): {"kernel": 0.1 * (i + 1) * sizes} for i in range(12)}

    def convert_from(kept):
        return convert.from_torch(kept, tx, params, adapt=lambda path, x: x.T)

    m = adamjax.get_slot(convert_from(kept), "m")
    assert_close(m, {"layers": expected}, rtol=1e-6)
    # Keys that are names, as torch.distributed.checkpoint writes them.
    (group,) = kept["param_groups"]
    names = group["param_names"]
    group = {key: x for key, x in group.items() if key != "param_names"}
    by_name = {
        "state": {names[i]: x for i, x in kept["state"].items()},
        "param_groups": [{**group, "params": names}],
    }
    state = convert_from(by_name)
    assert_close(adamjax.get_slot(state, "m"), {"layers": expected}, rtol=1e-6)
    back = convert.to_torch(state, tx, params, kept, adapt=lambda path, x: x.T)["state"]
    for i, x in kept["state"].items():
        assert_same(back[i]["exp_avg"], x["exp_avg"].numpy())
    # No shape shows that square kernels are transposed.
    for refused in (
        lambda: convert.from_torch(kept, tx, params),
        lambda: convert.to_torch(state, tx, params, kept),
    ):
        with pytest.raises(ValueError, match=r"weights are the transposes of kernels.*adapt="):
            refused()


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fused_steps_of_torch_go_on(layout):
    """torch's fused step is wrong if moments are not laid out in memory like the parameter."""
    torch = pytest.importorskip("torch")
    memory_format = {
        "contiguous": torch.contiguous_format,
        "channels_last": torch.channels_last,
    }[layout]
    grads = np.random.default_rng(0).normal(size=(9, 2, 3, 2, 2)).astype(np.float32)

    def of_torch(kernel):
        return np.transpose(kernel, (3, 2, 0, 1))

    def of_jax(weight):
        return np.transpose(weight, (2, 3, 1, 0))

    def new():
        p = torch.nn.Parameter(torch.zeros(2, 3, 2, 2).to(memory_format=memory_format))
        return p, torch.optim.Adam([p], lr=0.1, fused=True)

    def train(p, optimizer, grads):
        for g in grads:
            p.grad = torch.tensor(g).to(memory_format=memory_format)
            optimizer.step()

    p, optimizer = new()
    train(p, optimizer, grads[:3])
    tx, params = adamjax.adam(0.1, eps=1e-8), {"kernel": jnp.array(of_jax(p.detach().numpy()))}
    state = convert.from_torch(
        optimizer.state_dict(), tx, params, adapt=lambda path, x: np.transpose(x, (2, 3, 1, 0))
    )
    other, other_optimizer = new()
    train(other, other_optimizer, grads[:1])  # so that the target shows the layout of moments
    new_state = convert.to_torch(
        state, tx, params, other_optimizer.state_dict(), adapt=lambda path, x: of_torch(x)
    )
    other_optimizer.load_state_dict(
        jax.tree.map(lambda x: torch.from_numpy(x) if isinstance(x, np.ndarray) else x, new_state)
    )
    with torch.no_grad():
        other.copy_(torch.from_numpy(of_torch(np.array(params["kernel"])).copy()))
    for one in ((p, optimizer), (other, other_optimizer)):
        train(*one, grads[3:])
    assert_close(other.detach().numpy(), p.detach().numpy(), rtol=1e-6)


@pytest.mark.parametrize("names", [None, ["0.weight", "1.weight"]], ids=["no names", "names"])
@pytest.mark.parametrize("leaf", ["kernel", "kernel_0", "w", "Wq", "weights", "weight", "table"])
def test_square_kernels_of_torch_may_be_transposed(leaf, names):
    """Only leaves with names of torch's own, and tables, are not."""
    square, slots = np.array([[1.0, 2.0], [3.0, 4.0]], np.float32), ("exp_avg", "exp_avg_sq")
    group = {"params": [0, 1], "lr": RATE, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
    group |= {"amsgrad": False} | ({} if names is None else {"param_names": names})
    kept = {
        "state": {i: {"step": 3, **dict.fromkeys(slots, square)} for i in range(2)},
        "param_groups": [group],
    }
    tx, params = adamjax.adam(RATE, eps=1e-8), [{leaf: jnp.zeros((2, 2))} for _ in range(2)]
    order = [f"{i}/{leaf}" for i in range(2)]
    if leaf in ("weight", "table"):
        convert.from_torch(kept, tx, params, order=order)
    else:
        wanted = rf"torch's weights are the transposes of kernels.*endswith\('{leaf}'\)"
        with pytest.raises(ValueError, match=wanted):
            convert.from_torch(kept, tx, params, order=order)
    state = convert.from_torch(kept, tx, params, order=order, adapt=lambda path, x: x.T)
    assert_same(adamjax.get_slot(state, "m")[0][leaf], square.T)


OPTAX_CONSTANT = optax.chain(optax.scale_by_adam(), optax.scale(-RATE))


def test_a_kernel_whose_shape_is_clear_speaks_for_no_other():
    slots, shapes = ("exp_avg", "exp_avg_sq"), {"w0": (2, 3), "w1": (2, 2), "gate": (2, 2)}
    group = {"params": [0, 1], "lr": RATE, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
    group["amsgrad"] = False
    tx = adamjax.adam(RATE, eps=1e-8)

    def converted(*leaves, torch_names=None):
        arrays = [np.ones(shapes[leaf], np.float32) for leaf in leaves]
        own = {"param_names": torch_names} if torch_names else {}
        kept = {
            "state": {i: {"step": 3, **dict.fromkeys(slots, x)} for i, x in enumerate(arrays)},
            "param_groups": [{**group, **own}],
        }
        params = dict(zip(leaves, arrays, strict=True))
        return convert.from_torch(kept, tx, params, order=list(leaves))

    with pytest.raises(ValueError, match=r"such as 'w1'.*endswith\('w1'\)"):
        converted("w0", "w1")
    with pytest.raises(ValueError, match=r"such as 'gate'.*endswith\('gate'\)"):
        converted("w0", "gate")
    # Of weight_norm and spectral_norm.
    names = ["0.parametrizations.weight.original0", "0.parametrizations.weight.original1"]
    with pytest.raises(ValueError, match=r"such as 'gate'"):
        converted("w0", "gate", torch_names=names)


@pytest.mark.parametrize("named", [True, False], ids=["names", "no names"])
@pytest.mark.parametrize(
    ("shape", "mend"),
    [
        ((3, 8, 3), r"x\.T if"),  # torch's Conv1d(8, 3, kernel_size=3)
        ((3, 3, 3, 3), r"x\.transpose\("),
        ((5, 3, 5, 3, 5), r"x\.transpose\("),
        ((3, 8, 4), None),
        ((3, 8, 8, 3), None),
        ((3, 3), r"x\.T if"),
        ((3, 4), None),
    ],
)
def test_kernels_of_torch_whose_shape_does_not_show_the_order_of_dimensions(shape, mend, named):
    """torch has (out, in, *kernel_size), and kernels have (*kernel_size, in, out)."""
    kept = numbered_torch([shape])
    if named:
        kept["param_groups"][0]["param_names"] = ["0.weight"]
    tx, params = adamjax.adam(RATE, eps=1e-7), {"0": {"kernel": jnp.zeros(shape)}}
    x = kept["state"][0]["exp_avg"] = np.linspace(0, 1, np.prod(shape), dtype=np.float32).reshape(
        shape
    )

    def kernel_of(x):
        return x.transpose(*range(2, x.ndim), 1, 0)

    if mend is None:
        convert.from_torch(kept, tx, params)
        return
    for flat in (params, {"0_kernel": jnp.zeros(shape)}):
        with pytest.raises(ValueError, match=f"its shape .* does not show it: .*{mend}"):
            convert.from_torch(kept, tx, flat)
    state = convert.from_torch(kept, tx, params, adapt=lambda path, x: kernel_of(x))
    assert_same(adamjax.get_slot(state, "m")["0"]["kernel"], kernel_of(x))


@pytest.mark.parametrize(
    ("adapt", "error", "message"),
    [
        (lambda path, x: None, ValueError, "what adapt returns for exp_avg of 'w' is None"),
        (lambda path, x: "x", ValueError, "what adapt returns for exp_avg of 'w' is 'x'"),
        (lambda path, x: x[:1], ValueError, r"m of 'w' has shape \[1\], expected \[2\]"),
        ("T", TypeError, "adapt is 'T' of type str, expected a function of the path"),
        (lambda x: x, TypeError, "adapt does not take two arguments, expected a function of"),
        (lambda path, x, axes: x, TypeError, "adapt does not take two arguments"),
    ],
)
def test_an_adapt_that_makes_no_array_is_refused(adapt, error, message):
    tx, params = adamjax.adam(0.1, eps=1e-8), [jnp.zeros(2), jnp.zeros(2)]
    message = message.replace("'w'", "'0'")
    with pytest.raises(error, match=f"from_torch: {message}"):
        convert.from_torch(plain_dict(), tx, params, adapt=adapt)
    if "shape" not in message:
        state = convert.from_torch(plain_dict(), tx, params)
        with pytest.raises(error, match=f"to_torch: {message}"):
            convert.to_torch(state, tx, params, plain_dict(), adapt=adapt)
    state = convert.from_torch(plain_dict(), tx, params)
    for fine in (lambda path, x: jnp.asarray(x), lambda *both: both[1].tolist()):
        assert_same(convert.from_torch(plain_dict(), tx, params, adapt=fine), state)


def test_a_decay_in_front_of_the_negation_is_not_that_of_maximize():
    params = jax.tree.map(jnp.asarray, PARAMS)
    kept = torch_state({"maximize": True, "weight_decay": 0.5})
    parts = adamjax.scale(-1.0), adamjax.add_decayed_weights(0.5)
    adam = adamjax.adam(RATE, eps=1e-8)
    convert.from_torch(kept, adamjax.chain(*parts, adam), params)
    with pytest.raises(ValueError, match=r"negates after their weight decay: move it before"):
        convert.from_torch(kept, adamjax.chain(*parts[::-1], adam), params)


@pytest.mark.parametrize(
    ("rate", "schedule"),
    [
        (lambda t: 0.05 * (1 + np.cos(np.pi * t / 1000)), adamjax.cosine_decay(0.1, 1000)),
        (lambda t: 0.1 * 0.999**t, adamjax.exponential_decay(0.1, 1, 0.999)),
        (
            lambda t: 0.05 * (1 + np.cos(np.pi * t / 1000)),
            optax.cosine_decay_schedule(0.1, 1000),
        ),
    ],
    ids=["cosine", "powers", "a callable"],
)
def test_rates_that_float32_does_not_have_are_the_same(rate, schedule):
    """torch computes in float64; near its end, what float32 leaves of a cosine is another rate."""
    params = jax.tree.map(jnp.asarray, PARAMS)
    for count in (10, 900, 990, 998):
        given = torch_state({"lr": rate(count)})
        for held in given["state"].values():
            held["step"] = count
        convert.from_torch(given, adamjax.adam(schedule, eps=1e-8), params)
        given["param_groups"][0]["lr"] = 1.001 * rate(count)
        with pytest.raises(ValueError, match="a learning rate of"):
            convert.from_torch(given, adamjax.adam(schedule, eps=1e-8), params)


@pytest.mark.parametrize("name", ["powers", "products of counts"])
def test_a_rate_is_compared_as_a_step_computes_it(name):
    """In float32 and int32, these functions are far from what they are in float64."""
    count, schedule, right, rate = {
        "powers": (
            200_000,
            lambda n: 0.1 * 0.99999**n,
            adamjax.exponential_decay(0.1, 1, 0.99999),
            0.1 * 0.99999**200_000,
        ),
        "products of counts": (
            60_000,
            lambda n: 0.1 / (1 + n * n / 1e10),
            lambda n: 0.1 / (1 + (n / 1e5) ** 2),
            0.1 / 1.36,
        ),
    }[name]
    params, given = jax.tree.map(jnp.asarray, PARAMS), torch_state({"lr": rate})
    for held in given["state"].values():
        held["step"] = count
    convert.from_torch(given, adamjax.adam(right, eps=1e-8), params)
    message = r"a learning rate of .*Note: in float64 the schedule of tx has that rate, but steps"
    with pytest.raises(ValueError, match=message):
        convert.from_torch(given, adamjax.adam(schedule, eps=1e-8), params)


DECAYED = {
    "after the rule": (True, lambda rule, decay: [rule, decay], None),
    "and before a scale": (True, lambda rule, decay: [rule, decay, adamjax.scale(1.0)], None),
    "after the rate": (
        True,
        lambda rule, decay: [rule, adamjax.scale_by_learning_rate(1.0), decay, adamjax.scale(-1.0)],
        "0 before its rule and -0.5 after it",
    ),
    "after a scale": (
        True,
        lambda rule, decay: [rule, adamjax.scale(2.0), decay, adamjax.scale(0.5)],
        "0 before its rule and 0.25 after it",
    ),
    "before the rule": (False, lambda rule, decay: [decay, rule], None),
    "after a scale before the rule": (
        False,
        lambda rule, decay: [adamjax.scale(2.0), decay, rule],
        None,
    ),
    "before a scale": (
        False,
        lambda rule, decay: [decay, adamjax.scale(2.0), rule],
        "1 before its rule and 0 after it",
    ),
}


@pytest.mark.parametrize("name", DECAYED)
def test_a_decay_is_compared_as_it_comes_to_the_step(name):
    decoupled, parts, problem = DECAYED[name]
    given = torch_state({"weight_decay": 0.5, "decoupled_weight_decay": decoupled})
    params = jax.tree.map(jnp.asarray, PARAMS)
    made = parts(adamjax.scale_by_adam(eps=1e-8), adamjax.add_decayed_weights(0.5))
    tx = adamjax.chain(*made, adamjax.scale_by_learning_rate(RATE))
    if problem is None:
        convert.from_torch(given, tx, params)
    else:
        with pytest.raises(ValueError, match=f"a weight decay of 0.5, tx has {problem}"):
            convert.from_torch(given, tx, params)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": np.ones(2), "b": np.ones(4)}, r"leaf 'b' is of shape \[4\] in params and of shape"),
        ({"a": np.ones(2), "c": np.ones(3)}, r"leaf 'b' is not there in params and of shape \[3\]"),
        ({**PARAMS, "c": np.ones(3)}, r"leaf 'c' is of shape \[3\] in params and not there in"),
    ],
    ids=["shape", "name", "more"],
)
def test_parameters_of_another_state_are_refused(params, message):
    """What a target says is compared by the paths of the parameters: of others nothing would be."""
    own, tx = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE)
    with pytest.raises(ValueError, match=message):
        convert.to_optax(tx.init(own), tx, jax.tree.map(jnp.asarray, params), OLD)


@pytest.mark.parametrize("rtol", [-1.0, float("nan"), "1"])
def test_an_rtol_that_is_none_is_refused(rtol):
    params = jax.tree.map(jnp.asarray, PARAMS)
    theirs = optax.amsgrad(RATE)
    state = old_state(tx=theirs)
    with pytest.raises(ValueError, match=f"rtol is {rtol!r}"):
        convert.from_optax(state, adamjax.amsgrad(RATE, eps=1e-8), params, theirs, rtol=rtol)


def test_a_state_that_is_traced_is_refused():
    tx, params = adamjax.adam(RATE, eps=1e-8), jax.tree.map(jnp.asarray, PARAMS)
    with pytest.raises(ValueError, match=r"the count of 'a' is being traced.* outside of jit"):
        jax.jit(lambda s: convert.from_optax(s, tx, params, OLD))(old_state())


def test_a_rate_that_is_scaled_is_another_rate():
    params, adam = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE, eps=1e-8)
    with pytest.raises(ValueError, match=r"rate of 0.0625, tx has 0.03125 for the next step"):
        convert.from_torch(torch_state(), adamjax.chain(adam, adamjax.scale(0.5)), params)
    parts = adamjax.scale_by_adam(eps=1e-8), adamjax.scale(-RATE)
    convert.from_torch(torch_state(), adamjax.chain(*parts), params)


# --- all of optax ---------------------------------------------------------------------------------

# Their states are of Adam's class.
LIKE_ADAM = {
    *("adam", "adamw", "nadam", "nadamw", "adamax", "adamaxw", "radam", "lamb", "yogi", "adopt"),
}


def optax_optimizers():
    for module in (optax, optax.contrib):
        for name, make in sorted(vars(module).items()):
            if callable(make) and not isinstance(make, type) and not name.startswith("_"):
                try:
                    parameters = inspect.signature(make).parameters
                except (TypeError, ValueError):
                    continue
                if "learning_rate" in parameters:
                    yield name, make


@pytest.mark.filterwarnings("ignore")
def test_all_of_optax_but_adams_are_refused():
    """Those of future versions too."""
    params, taken, seen = {"w": jnp.ones((3, 2))}, set(), 0
    txs = (adamjax.adam, adamjax.amsgrad, adamjax.adamax, adamjax.nadam)
    for name, make in optax_optimizers():
        try:
            theirs = make(learning_rate=0.1)
            state = theirs.init(params)
        except (AttributeError, TypeError, ValueError):
            continue  # one that asks for more
        seen += 1
        for tx in txs:
            ours = tx(0.1, eps=1e-8)
            try:
                convert.from_optax(state, ours, params, theirs, rtol=10.0)
            except (TypeError, ValueError) as error:
                assert "from_optax: " in str(error)  # noqa: PT017
                if name not in LIKE_ADAM:
                    with pytest.raises((TypeError, ValueError), match="to_optax: "):
                        convert.to_optax(ours.init(params), ours, params, theirs, rtol=10.0)
            else:
                taken.add((name, tx.__name__))
    assert seen > 20
    names = {tx: {name for name, other in taken if other == tx} for _, tx in taken}
    assert names["adam"] == {"adam"}
    assert names["amsgrad"] == {"amsgrad"}
    # Of other forms, as much may differ as rtol says.
    assert {"adamax", "nadam"} <= names["adamax"] | names["nadam"] <= LIKE_ADAM


class MyState(NamedTuple):
    """As Adam's, of something else."""

    count: jax.Array
    mu: dict
    nu: dict


class MyWrapper(NamedTuple):
    inner_state: tuple


OPTAX_STRANGE = {
    "a class of another library": (
        lambda: MyState(*old_state()[0]),
        r"no moments of the leaf 'a'.*do not know its .*MyState: convert a state of Adam",
    ),
    "a wrapper of another library": (lambda: MyWrapper(old_state()), r"no moments.*MyWrapper"),
    "real and imaginary parts": (
        lambda: old_state(tx=optax.contrib.split_real_and_imaginary(OLD)),
        r"no moments.*SplitRealAndImaginaryState",
    ),
    "look ahead": (
        lambda: optax.lookahead(OLD, 5, 0.5).init(
            optax.LookaheadParams.init_synced(jax.tree.map(jnp.asarray, PARAMS))
        ),
        r"no moments.*do not know its .*LookaheadState: convert a state of Adam",
    ),
    "an average of gradients": (
        lambda: old_state(tx=optax.chain(optax.ema(0.9), OLD)),
        r"no place for a EmaState",
    ),
    "micro-batches that are skipped": (
        lambda: old_state(
            tx=optax.MultiSteps(
                OLD, 4, should_skip_update_fn=optax.skip_not_finite
            ).gradient_transformation(),
            count=0,
        ),
        r"MultiSteps skips some micro-batches",
    ),
    "several runs": (
        lambda: jax.tree.map(lambda x: jnp.stack([x, x]), old_state()),
        r"the count of 'a' is .*convert the states of several runs one by one",
    ),
    "not finite": (
        lambda: jax.tree.map(
            lambda x: x if x.dtype == jnp.int32 else jnp.full_like(x, jnp.inf), old_state()
        ),
        r"of 'a', mu has values that are not finite",
    ),
}


@pytest.mark.parametrize("name", OPTAX_STRANGE)
def test_strange_states_of_optax_are_refused(name):
    make, message = OPTAX_STRANGE[name]
    tx = adamjax.adam(RATE, eps=1e-8)
    with pytest.raises(ValueError, match=f"from_optax: .*{message}"):
        convert.from_optax(make(), tx, jax.tree.map(jnp.asarray, PARAMS), OLD)


def test_more_micro_batches_than_a_step_takes():
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = old_state(tx=optax.MultiSteps(OLD, 8).gradient_transformation(), count=3)
    tx = adamjax.accumulate_gradients(adamjax.adam(RATE, eps=1e-8), 2)
    with pytest.raises(ValueError, match=r"accumulated 3 micro-batches.*a step of tx takes 2"):
        convert.from_optax(state, tx, params, OLD)


def test_a_state_of_another_transform_with_other_shapes_is_not_copied():
    params = jax.tree.map(jnp.asarray, PARAMS)
    turned = {name: x[:, None] for name, x in params.items()}
    state = optax.trace(0.9).init(turned), *old_state()
    tx = adamjax.chain(optax.trace(0.9), adamjax.adam(RATE, eps=1e-8))
    with pytest.raises(ValueError, match=r"the source has no TraceState of these shapes"):
        convert.from_optax(state, tx, params, OLD)


INJECT = optax.inject_hyperparams
RATE_ALONE, DECAY_ALONE = INJECT(optax.scale_by_learning_rate), INJECT(optax.add_decayed_weights)


# --- state dicts and variables that are malformed -------------------------------------------------


def plain_dict():
    leaf_state = {"step": 7, "exp_avg": np.full(2, 0.5, "f"), "exp_avg_sq": np.ones(2, "f")}
    group = {"params": [0, 1], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    group |= {"weight_decay": 0, "amsgrad": False}
    return {"state": {0: leaf_state, 1: dict(leaf_state)}, "param_groups": [group]}


def with_group(**changes):
    def change(found):
        return {**found, "param_groups": [{**found["param_groups"][0], **changes}]}

    return change


def with_held(held):
    return lambda found: {**found, "state": {**found["state"], 0: held(found["state"][0])}}


MALFORMED = {
    "a state": (lambda found: {**found, "state": [1]}, r"'state' is \[1\] of type list"),
    "groups": (lambda found: {**found, "param_groups": None}, "'param_groups' is None"),
    "a group": (lambda found: {**found, "param_groups": [3]}, "a group of 'param_groups' is 3"),
    "no params": (with_group(params=None), "'params' of a group is None"),
    "a number for params": (with_group(params=3), "'params' of a group is 3 of type int"),
    "lists in params": (with_group(params=[0, [1]]), r"'params' of a group is \[1\]"),
    "twice": (with_group(params=[0, 0]), "is 0 of type int, expected each parameter once"),
    "too few": (with_group(params=[0]), "groups have 1 parameters"),
    "a list": (with_held(list), r"the state of parameter 0 is \['step', .*expected a dictionary"),
    "no moment": (with_held(lambda x: {**x, "exp_avg": None}), "exp_avg of 'w' is None"),
    "text": (with_held(lambda x: {**x, "exp_avg_sq": ["1", "2"]}), "expected a number or an array"),
    "no step": (with_held(lambda x: {**x, "step": None}), "the count of 'w' is None"),
    "a step of text": (with_held(lambda x: {**x, "step": "7"}), "the count of 'w' is '7'"),
    "no rate": (with_group(lr=None), "lr of a group of torch is None"),
    "a rate of text": (with_group(lr="0.1"), "lr of a group of torch is '0.1' of type str"),
    "an epsilon of text": (with_group(eps="1e-8"), "eps of a group of torch is '1e-8'"),
    "one beta": (with_group(betas=[0.9]), r"betas of a group of torch are \[0.9\]"),
    "no beta": (with_group(betas=(0.9, None)), "a beta of a group of torch is None"),
    "a flag of text": (with_group(amsgrad="false"), "amsgrad .* is 'false', expected True or"),
    "names": (with_group(param_names="wz"), "has the param_names 'wz', expected a list of"),
}


def test_the_flattened_form_of_torch_is_named():
    flat = {"state.w.exp_avg": np.ones(2), "param_groups.w.lr": 0.1}
    for given, message in (
        (flat, r"got the flattened form .* 'state.w.exp_avg': make it without flatten_optimizer"),
        ({"model": {}, "optimizer": {}}, r"got dict with \['model', 'optimizer'\]"),
        ([], "got list"),
    ):
        with pytest.raises(TypeError, match=f"from_torch: expected .*{message}"):
            convert.from_torch(given, adamjax.adam(0.1, eps=1e-8), {"w": jnp.ones(2)})


@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_state_dicts_are_refused(what):
    change, message = MALFORMED[what]
    tx, params = adamjax.adam(0.1, eps=1e-8), {"w": jnp.zeros(2), "z": jnp.zeros(2)}
    order = ["w", "z"]
    state = convert.from_torch(plain_dict(), tx, params, order=order)
    with pytest.raises(ValueError, match=f"from_torch: .*{message}"):
        convert.from_torch(change(plain_dict()), tx, params, order=order)
    with pytest.raises(ValueError, match=f"to_torch: .*{message}"):
        convert.to_torch(state, tx, params, change(plain_dict()), order=order)


NO_ORDERS = [
    *(3, "w", b"w", {"w": 0}, object(), {"w", "z"}, frozenset("wz"), iter("wz")),
    (jnp.zeros(2), jnp.zeros(2)),
]


@pytest.mark.parametrize("order", NO_ORDERS, ids=lambda order: type(order).__name__)
def test_an_order_that_is_no_list_is_refused(order):
    tx, params = adamjax.adam(0.1, eps=1e-8), {"w": jnp.zeros(2), "z": jnp.zeros(2)}
    with pytest.raises(
        TypeError, match=r"from_torch: order (is|has) .*expected (a list of )?paths"
    ):
        convert.from_torch(plain_dict(), tx, params, order=order)
    with pytest.raises(
        TypeError, match=r"from_keras: order (is|has) .*expected (a list of )?paths"
    ):
        convert.from_keras([np.array(1)], adamjax.adam(0.1), params, order=order)


def test_what_has_an_order_is_an_order():
    tx, params = adamjax.adam(0.1, eps=1e-8), {"w": jnp.zeros(2), "z": jnp.zeros(2)}
    order = ["w", "z"]
    expected = convert.from_torch(plain_dict(), tx, params, order=order)
    for given in (tuple(order), np.array(order), params.keys(), {0: "w", 1: "z"}.values()):
        assert_same(convert.from_torch(plain_dict(), tx, params, order=given), expected)


VARIABLES = {
    "adam/iteration": 7,
    "adam/learning_rate": np.float32(0.1),
    "adam/w_momentum": np.full(2, 0.5, "f"),
    "adam/w_velocity": np.ones(2, "f"),
}


@pytest.mark.parametrize("form", ["pairs", "mapping", "numbers", "list"])
@pytest.mark.parametrize("value", [None, "0.1", [[1], 2], {"a": 1}])
@pytest.mark.parametrize("name", VARIABLES)
def test_malformed_variables_are_refused(name, value, form):
    changed = {**VARIABLES, name: value}
    variables = {
        "pairs": list(changed.items()),
        "mapping": changed,
        "numbers": {str(i): x for i, x in enumerate(changed.values())},
        "list": list(changed.values()),
    }[form]
    tx, params = adamjax.adam(0.1), {"w": jnp.zeros(2)}
    with pytest.raises(ValueError, match=r"from_keras: variable .* is .*expected a number or an a"):
        convert.from_keras(variables, tx, params)
    with pytest.raises(ValueError, match=r"to_keras: variable .* is .*expected a number or an a"):
        convert.to_keras(tx.init(params), tx, params, variables)


def test_bfloat16_as_numpy_loads_it_is_refused_with_the_way_to_read_it():
    moments = np.asarray(jnp.ones(2, jnp.bfloat16)).view("V2")
    variables = {name: moments if np.ndim(x) else x for name, x in VARIABLES.items()}
    with pytest.raises(ValueError, match=r"expected a number .*view\(ml_dtypes.bfloat16\)"):
        convert.from_keras(variables, adamjax.adam(0.1), {"w": jnp.zeros(2)})


def test_arrays_as_savez_numbers_them():
    numbered = {f"arr_{i}": x for i, x in enumerate(VARIABLES.values())}
    params, tx = {"w": jnp.zeros(2)}, adamjax.adam(0.1)
    backwards = dict(reversed(numbered.items()))
    for variables in (numbered, backwards):
        state = convert.from_keras(variables, tx, params)
        assert_same(state, convert.from_keras(list(VARIABLES.values()), tx, params))


def test_a_state_dict_of_torch_is_not_taken_for_variables_of_keras():
    state_dict = {"state": {}, "param_groups": []}
    with pytest.raises(TypeError, match=r"got a state dict of torch.*from_torch converts it"):
        convert.from_keras(state_dict, adamjax.adam(0.1), {"w": jnp.zeros(2)})


def test_a_target_of_integers_is_refused():
    tx, params = adamjax.adam(0.1), {"w": jnp.zeros(2)}
    target = {**VARIABLES, "adam/w_momentum": np.zeros(2, int)}
    with pytest.raises(ValueError, match="momentum of 'w' is int64 in the target, expected floats"):
        convert.to_keras(tx.init(params), tx, params, target)


class HeavyBallState(NamedTuple):
    m: Any


class KeptState(NamedTuple):
    m: Any
    inner: Any


transform_state("m")(HeavyBallState)
transform_state("m")(KeptState)


class heavy_ball(Rule):
    """A rule of a user's own."""

    def init(self, params):
        return HeavyBallState(jax.tree.map(jnp.zeros_like, params))

    def step(self, grads, state, factors):
        return grads, state


class heavy_ball_with_adam(heavy_ball):
    """A rule whose state contains one of Adam."""

    def init(self, params):
        return KeptState(super().init(params).m, adamjax.scale_by_adam().init(params))


class other_adam(heavy_ball):
    """A rule that uses the class of Adam's state for something else."""

    def init(self, params):
        return adamjax.scale_by_adam().init(params)


class sign(heavy_ball):
    """A rule that keeps nothing."""

    def init(self, params):
        return ()


def conversions(tx, params, others=None):
    """Every conversion from and to a state of a transform, perhaps with other parameters."""
    state, old = tx.init(params), OLD.init(params)
    params = params if others is None else others
    keras = [(name, np.zeros_like(x)) for name, x in keras_pairs()]
    torch = {**torch_state(), "state": {}}
    return {
        "from_optax": lambda: convert.from_optax(old, tx, params, OLD),
        "from_keras": lambda: convert.from_keras(keras, tx, params),
        "from_torch": lambda: convert.from_torch(torch, tx, params),
        "to_optax": lambda: convert.to_optax(state, tx, params, OLD),
        "to_keras": lambda: convert.to_keras(state, tx, params, keras),
        "to_torch": lambda: convert.to_torch(state, tx, params, torch, order=sorted(params)),
    }


ADAM = adamjax.adam(RATE, eps=1e-8)


@pytest.mark.parametrize(
    ("tx", "name"),
    [
        (adamjax.chain(heavy_ball(), adamjax.scale_by_learning_rate(RATE)), "heavy_ball"),
        *((adamjax.chain(rule(), ADAM), rule.__name__) for rule in heavy_ball.__subclasses__()),
        (optax.chain(ADAM, heavy_ball()), "the rule of a HeavyBallState"),
        (optax.chain(ADAM, heavy_ball_with_adam()), "the rule of a KeptState"),
    ],
)
def test_a_rule_of_a_users_own_is_refused(tx, name):
    params = jax.tree.map(jnp.asarray, PARAMS)
    for conversion, call in conversions(tx, params).items():
        expected = f"{conversion}: tx contains {name}, and conversions know the rules scale_by_adam"
        with pytest.raises(ValueError, match=expected):
            call()


class TensorOfTensorflow:
    dtype, shape = "tf.float32", (2,)

    def numpy(self):
        raise AssertionError("not asked")


@pytest.mark.parametrize("kind", ["torch", "tensorflow", "text"])
def test_parameters_that_are_no_arrays_are_refused(kind):
    params = jax.tree.map(jnp.asarray, PARAMS)
    leaf, mend = {
        "torch": (lambda: pytest.importorskip("torch").ones(2), r"asarray\(x.detach"),
        "tensorflow": (TensorOfTensorflow, r"asarray\(x.numpy"),
        "text": (lambda: "text", "give only the arrays of a model"),
    }[kind]
    others = {**params, "a": leaf()}
    for conversion, call in conversions(ADAM, params, others).items():
        message = f"{conversion}: the leaf 'a' is a .*, expected an array of JAX or NumPy: .*{mend}"
        with pytest.raises(TypeError, match=message):
            call()


STATES = {
    "amsgrad": adamjax.amsgrad,
    "adamax": adamjax.adamax,
    "nadam": adamjax.nadam,
    "adam": adamjax.adam,
    "optax": optax.adam,
}


@pytest.mark.parametrize("name", STATES)
def test_a_state_of_another_rule_is_not_that_of_tx(name):
    params = jax.tree.map(jnp.asarray, PARAMS)
    tx = adamjax.nadam(RATE) if name == "adam" else ADAM
    state = STATES[name](RATE).init(params)
    theirs = r"optax.*ScaleByAdamState" if name == "optax" else rf"ScaleBy\w+ of {name}"
    ours = "nadam" if name == "adam" else "adam"
    wanted = rf"the state has a {theirs} where tx has scale_by_adam.*expected a \w+ of {ours}: pass"
    keras, torch = keras_pairs(), {**torch_state(), "state": {}}
    for call in (
        lambda: convert.to_optax(state, tx, params, OLD),
        lambda: convert.to_keras(state, tx, params, keras),
        lambda: convert.to_torch(state, tx, params, torch, order=sorted(params)),
    ):
        with pytest.raises(ValueError, match=wanted):
            call()


def test_slots_that_do_not_show_the_rule():
    """Of adam and nadam, and of amsgrad without its maximum."""
    params, kept = jax.tree.map(jnp.asarray, PARAMS), torch_state({"amsgrad": True})
    for tx, message in [
        (ADAM, "and says that they are those of amsgrad; for adam, expected a state that says"),
        (
            adamjax.amsgrad(RATE, eps=1e-8),
            r"of 'a', .*; for amsgrad, expected .*'max_exp_avg_sq'\]: was amsgrad switched on",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            convert.from_torch(kept, tx, params)
    with pytest.raises(ValueError, match="says that they are those of nadam; for adam, expec"):
        convert.from_keras(keras_layers(["a"], "nadam"), adamjax.adam(RATE), jnp.zeros(2))


class LookAheadState(NamedTuple):
    slow: Any
    inner: Any


transform_state("slow", rule=False)(LookAheadState)


class look_ahead(Transform):
    """A wrapper of a user's own, with slots."""

    tx: Transform

    def init(self, params):
        return LookAheadState(params, self.tx.init(params))

    def part_states(self, state):
        return (state.inner,)


def test_the_slots_of_a_users_own_wrapper_are_not_dropped():
    params, tx = jax.tree.map(jnp.asarray, PARAMS), look_ahead(ADAM)
    state, new = tx.init(params), OLD.init(params)
    with pytest.raises(ValueError, match="to_optax: the state keeps slow in a LookAheadState, and"):
        convert.to_optax(state, tx, params, OLD)
    assert_same(convert.to_optax(state, tx, params, OLD, check=False), new)
    assert_same(convert.to_optax(state.inner, tx.tx, params, OLD), new)
    assert_same(convert.from_optax(new, tx, params, check=False), state)


def test_master_weights_are_converted_as_parameters():
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), PARAMS)
    tx, new = adamjax.master_weights(ADAM), OLD.init(jax.tree.map(jnp.asarray, PARAMS))
    state = tx.init(params)
    for call in (
        lambda: convert.from_optax(new, tx, params, OLD),
        lambda: convert.to_optax(state, tx, params, OLD),
    ):
        with pytest.raises(ValueError, match="Convert the inner state with the float32 weights"):
            call()
    assert_same(convert.to_optax(state.inner, tx.tx, state.weights, OLD), new)
    assert_same(convert.from_optax(new, tx.tx, state.weights, OLD), state.inner)


def test_an_average_of_a_single_array():
    tx, params = adamjax.chain(adamjax.adam(RATE), adamjax.weight_ema(0.9)), jnp.ones(2)
    names = ("w_momentum", "w_velocity", "w_average")
    variables = [("adam/iteration", np.array(7)), ("adam/learning_rate", np.float32(RATE))]
    variables += [(f"adam/{name}", np.full(2, 0.5, np.float32)) for name in names]
    state = convert.from_keras(variables, tx, params)
    assert_same(adamjax.averaged_weights(state), jnp.full(2, 0.5))
    for made, (name, x) in zip(
        convert.to_keras(state, tx, params, variables), variables, strict=True
    ):
        np.testing.assert_array_equal(made, x, name)


def test_a_complex_rate_is_refused():
    variables = {**VARIABLES, "adam/learning_rate": np.complex64(0.1)}
    with pytest.raises(ValueError, match=r"the learning rate is .*expected one real number"):
        convert.from_keras(variables, adamjax.adam(0.1), {"w": jnp.zeros(2)})


# --- what a state or a target does not show -------------------------------------------------------


def test_the_order_of_a_named_chain_is_not_guessed():
    """JAX sorts the names, so rules of one leaf could take each other's moments."""
    params = {"w": jnp.ones(3)}
    first, second = optax.scale_by_adam(), optax.scale_by_adam(0.5, 0.9)
    named = optax.named_chain(("z", first), ("a", second), ("lr", optax.scale(-0.1)))
    rules = adamjax.scale_by_adam(eps=1e-8), adamjax.scale_by_adam(0.5, 0.9, eps=1e-8)
    tx = adamjax.chain(*rules, adamjax.scale(-0.1))
    _, state = named.update({"w": jnp.array([1.0, -2.0, 3.0])}, named.init(params), params)
    with pytest.raises(ValueError, match=r"'w' has several rules .*make it a tuple"):
        convert.from_optax(state, tx, params, named)
    with pytest.raises(ValueError, match=r"'w' has several rules .*make it a tuple"):
        convert.to_optax(tx.init(params), tx, params, named)
    in_order = tuple(state[key] for key in ("z", "a", "lr"))
    chained = optax.chain(first, second, optax.scale(-0.1))
    converted = convert.from_optax(in_order, tx, params, chained)
    assert_close(converted[0].m, state["z"].mu, rtol=0)
    assert_close(converted[1].m, state["a"].mu, rtol=0)


@pytest.mark.parametrize("count", [-3, 2.7, None, jnp.ones((2, 3))], ids=str)
def test_a_count_of_skipped_steps_that_is_none_is_refused(count):
    params = {"w": jnp.ones(3)}
    theirs = optax.apply_if_finite(optax.adam(0.1), 3)
    state = theirs.init(params)
    tx = adamjax.skip_not_finite(adamjax.adam(0.1, eps=1e-8))
    with pytest.raises((TypeError, ValueError), match="from_optax: the count of total_notfinite"):
        convert.from_optax(state._replace(total_notfinite=count), tx, params, theirs)


def fresh_torch(names=None):
    """The state of a torch Adam of two parameters before its first step."""
    group = {"params": [0, 1], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    group |= {"weight_decay": 0, "amsgrad": False}
    return {
        "state": {},
        "param_groups": [group if names is None else {**group, "param_names": names}],
    }


def test_a_torch_optimizer_without_arrays_shows_no_order():
    tx, params = adamjax.adam(0.1, eps=1e-8), {"weight": jnp.ones((4, 3)), "bias": jnp.ones(4)}
    state = tx.init(params)
    with pytest.raises(ValueError, match=r"no arrays before its first step.*give order="):
        convert.to_torch(state, tx, params, fresh_torch())
    new = convert.to_torch(state, tx, params, fresh_torch(), order=["weight", "bias"])
    assert new["state"][0]["exp_avg"].shape == (4, 3)
    with pytest.raises(ValueError, match=r"names its parameters .*give order="):
        convert.to_torch(state, tx, params, fresh_torch(["x", "y"]))


def test_a_torch_optimizer_without_arrays_shows_no_transposition():
    tx, params = adamjax.adam(0.1, eps=1e-8), {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    target = fresh_torch(["weight", "bias"])
    with pytest.raises(ValueError, match=r"transposes of kernels, such as 'kernel'"):
        convert.to_torch(tx.init(params), tx, params, target)

    def transposed(path, x):
        return x.T if path == "kernel" else x

    new = convert.to_torch(tx.init(params), tx, params, target, adapt=transposed)
    assert new["state"][0]["exp_avg"].shape == (4, 3)


def torch_after_a_step(*shapes):
    """The state of a torch Adam of parameters with these shapes, after a step."""
    target = fresh_torch()
    target["param_groups"][0]["params"] = list(range(len(shapes)))
    for key, shape in enumerate(shapes):
        x = np.zeros(shape, np.float32)
        target["state"][key] = {"step": np.float32(1), "exp_avg": x, "exp_avg_sq": x}
    return target


def test_shapes_of_a_torch_optimizer_show_a_wrong_order():
    tx, params = adamjax.adam(0.1, eps=1e-8), {"weight": jnp.ones((4, 3)), "bias": jnp.ones(4)}
    args = tx.init(params), tx, params, torch_after_a_step((4, 3), (4,))
    for wrong in ({}, {"order": ["bias", "weight"]}, {"adapt": lambda path, x: x.T}):
        with pytest.raises(
            ValueError, match=r"exp_avg of '\w+' has shape .*, that of torch's: are"
        ):
            convert.to_torch(*args, **wrong)
    new = convert.to_torch(*args, order=["weight", "bias"])
    assert new["state"][0]["exp_avg"].shape == (4, 3)


@pytest.mark.parametrize("shape", [(2, 5), (3, 2, 5), (3, 4, 2, 5), (3, 4, 6, 2, 5)], ids=str)
def test_the_adapt_that_errors_recommend_inverts_itself(shape):
    """From the dimensions of torch to those of a kernel, and back, whatever the rank."""
    tx, (*window, n_in, n_out) = adamjax.adam(0.1, eps=1e-8), shape
    params = {"kernel": jnp.ones(shape)}
    target = torch_after_a_step((n_out, n_in, *window))
    weights, adam = {"weight": jnp.ones((n_out, n_in, *window))}, adamjax.adam(RATE)
    variables, recommended = numbered_keras([shape]), {}
    for name, call in {
        "from_torch": lambda adapt: convert.from_torch(target, tx, params, adapt=adapt),
        "to_torch": lambda adapt: convert.to_torch(
            tx.init(params), tx, params, target, adapt=adapt
        ),
        "from_keras": lambda adapt: convert.from_keras(variables, adam, weights, adapt=adapt),
        "to_keras": lambda adapt: convert.to_keras(
            adam.init(weights), adam, weights, variables, adapt=adapt
        ),
    }.items():
        with pytest.raises(TypeError, match=f"{name}: adapt is 3 ") as caught:
            call(3)
        text = str(caught.value)
        recommended[name] = eval(text[text.index("lambda") :])  # a text of our own
        call(recommended[name])
    x = np.arange(np.prod(shape)).reshape(shape)
    for there, back, leaf in (
        ("to_torch", "from_torch", "kernel"),
        ("from_keras", "to_keras", "weight"),
    ):
        again = recommended[back](leaf, recommended[there](leaf, x))
        np.testing.assert_array_equal(again, x)


@pytest.mark.parametrize("check", [True, False])
def test_complex_leaves_do_not_go_to_torch_nor_come_from_it(check):
    """Also where all imaginary parts are 0 so far, or no step was taken yet."""
    tx, params = adamjax.adam(0.1, eps=1e-8), [jnp.ones(2, jnp.complex64), jnp.ones(2)]
    for given in (fresh_torch(), torch_after_a_step((2,), (2,))):
        for held in list(given["state"].values())[:1]:
            for name in ("exp_avg", "exp_avg_sq"):
                held[name] = held[name].astype(np.complex64)
        for leaves in (params, [jnp.ones(2), params[0]]):
            message = r"_torch: the leaf '[01]' is complex, and torch's v of complex parameters"
            with pytest.raises(ValueError, match=f"from{message}"):
                convert.from_torch(given, tx, leaves, check=check)
            with pytest.raises(ValueError, match=f"to{message}"):
                convert.to_torch(tx.init(leaves), tx, leaves, given, check=check)


# --- runs that would go on otherwise --------------------------------------------------------------

FALLS = adamjax.exponential_decay(0.1, 3, 0.5)
LATE = adamjax.piecewise_constant([64], [0.1, 0.01])
TWO = {"a": jnp.ones(3), "b": jnp.ones((2, 3))}
LABELS, ONLY_A = {"a": "x", "b": "y"}, {"a": True, "b": False}
CLIP_ALONE = INJECT(optax.clip_by_global_norm)
RATE_OF_PARTS = INJECT(
    lambda learning_rate: optax.multi_transform(
        {"x": optax.adam(0.1 * learning_rate), "y": optax.adam(learning_rate)}, LABELS
    )
)(learning_rate=0.1)


def adam_like_optax(rate=0.1):
    return adamjax.adam(rate, eps=1e-8)


def steps_of(tx, n, params=None, **extra_args):
    """The state after n steps."""
    params = TWO if params is None else params
    state = tx.init(params)
    for _ in range(n):
        _, state = tx.update(params, state, params, **extra_args)
    return state


def nested_steps(tx, inner, outer):
    return micro_batches(micro_batches(tx, inner), outer)


def nested_accumulation(inner, outer):
    return adamjax.accumulate_gradients(
        adamjax.accumulate_gradients(adam_like_optax(), inner), outer
    )


MOVES = "tx moves an element"
# For each: the transform of optax, that of adamjax, the steps before, and the error.
GOES_ON_OTHERWISE = {
    "nested accumulation": (
        nested_steps(optax.adam(0.1), 2, 2),
        nested_accumulation(2, 2),
        3,
        "(accumulated|gradients of 'a') twice, one inside the other.*convert after a step",
    ),
    "nested accumulation, other counts": (
        nested_steps(optax.adam(0.1), 2, 3),
        nested_accumulation(2, 3),
        4,
        "(accumulated|gradients of 'a') twice, one inside the other",
    ),
    "MultiSteps around adamjax": (
        micro_batches(optax.adam(0.1), 3),
        micro_batches(adam_like_optax(), 3),
        5,
        r"MultiStepsState is around transforms of adamjax, and its own mini_step, .*acc_grads",
    ),
    "inject_hyperparams around adamjax": (
        INJECT(optax.adam)(learning_rate=0.1),
        INJECT(adamjax.adam)(learning_rate=0.2, eps=1e-8),
        2,
        "is around transforms of adamjax",
    ),
    "hidden rules, a rate": (
        INJECT(optax.adam)(learning_rate=0.1, b1=0.5),
        optax.chain(adamjax.clip_by_value(9.0), adam_like_optax(0.2)),
        2,
        MOVES,
    ),
    "hidden rules, a schedule": (
        optax.adam(FALLS),
        optax.chain(adamjax.scale_by_adam(eps=1e-8), adamjax.scale_by_learning_rate(0.1)),
        2,
        MOVES,
    ),
    "a rate that another leaf sets": (
        optax.adam(FALLS),
        adamjax.partition(
            [("^a", adamjax.with_hyperparams(adam_like_optax(), learning_rate=0.1))],
            default=adam_like_optax(),
        ),
        2,
        MOVES,
    ),
    "a transform without a state": (
        optax.chain(
            optax.scale_by_adam(), optax.clip(1.0), optax.scale_by_schedule(lambda c: -FALLS(c))
        ),
        adamjax.chain(
            adamjax.scale_by_adam(eps=1e-8), optax.clip(1.0), adamjax.scale_by_learning_rate(0.1)
        ),
        2,
        MOVES,
    ),
    "a clip before the rule": (
        optax.chain(optax.scale_by_schedule(FALLS), optax.clip(1.0), optax.adam(0.1)),
        adamjax.chain(optax.clip(1.0), adam_like_optax()),
        2,
        MOVES,
    ),
    "a product of factors": (
        optax.chain(optax.scale_by_adam(), INJECT(optax.scale)(0.5), RATE_ALONE(0.1)),
        adam_like_optax(),
        2,
        MOVES,
    ),
    "a decay's schedule of the other leaf": (
        INJECT(optax.adamw)(learning_rate=0.1, weight_decay=FALLS),
        adamjax.partition(
            [("^a", adamjax.adamw(0.1, eps=1e-8, weight_decay=FALLS))],
            default=adamjax.adamw(0.1, eps=1e-8, weight_decay=0.1),
        ),
        2,
        MOVES,
    ),
    "decays that are constants by path": (
        INJECT(optax.adamw)(learning_rate=0.1, weight_decay=FALLS),
        adamjax.adamw(0.1, eps=1e-8, weight_decay=adamjax.by_path([("^a", 0.1)], default=0.3)),
        2,
        MOVES,
    ),
    "a decay in calls": (
        micro_batches(INJECT(optax.adamw)(learning_rate=0.1, weight_decay=0.1), 2),
        adamjax.chain(
            adamjax.accumulate_gradients(adamjax.scale_by_adam(eps=1e-8), 2),
            adamjax.add_decayed_weights(0.1),
            adamjax.scale_by_learning_rate(0.1),
        ),
        2,
        MOVES,
    ),
    "accumulation within accumulation": (
        micro_batches(optax.adam(0.1), 6),
        nested_accumulation(2, 3),
        7,
        "(twice, one inside the other|accumulated different numbers)",
    ),
    "a decay alone before the rule": (
        optax.chain(INJECT(optax.add_decayed_weights)(0.3), optax.adam(0.1)),
        adamjax.adamw(0.1, eps=1e-8, weight_decay=0.3),
        2,
        MOVES,
    ),
    "a decay alone after the rule": (
        optax.chain(optax.scale_by_adam(), INJECT(optax.add_decayed_weights)(0.3), RATE_ALONE(0.1)),
        adamjax.chain(adamjax.add_decayed_weights(0.3), adam_like_optax()),
        2,
        MOVES,
    ),
    "a decay's schedule before the rule": (
        optax.chain(optax.add_decayed_weights(FALLS), optax.adam(0.1)),
        adamjax.adamw(0.1, eps=1e-8, weight_decay=FALLS),
        2,
        MOVES,
    ),
    "skipped steps": (
        optax.apply_if_finite(optax.adam(0.1), 3),
        adam_like_optax(),
        2,
        "wrap tx in skip_not_finite",
    ),
    "a rate's schedule before the rule": (
        optax.chain(RATE_ALONE(FALLS), optax.scale_by_adam(), optax.scale(0.1)),
        adam_like_optax(FALLS),
        2,
        MOVES,
    ),
    "a rate before the rule": (
        optax.chain(RATE_ALONE(0.5), optax.scale_by_adam(), optax.scale(0.1)),
        adam_like_optax(0.5),
        2,
        MOVES,
    ),
    "the rate of the first of two rules": (
        optax.chain(INJECT(optax.adam)(learning_rate=0.1), INJECT(optax.adam)(learning_rate=0.2)),
        adamjax.chain(adam_like_optax(0.5), adam_like_optax(0.2)),
        2,
        MOVES,
    ),
    "a rate between two rules": (
        optax.chain(optax.scale_by_adam(), RATE_ALONE(0.1), optax.adam(0.2)),
        adamjax.chain(adam_like_optax(0.2), adam_like_optax(0.1)),
        2,
        MOVES,
    ),
    "the rate of a leaf without a rule": (
        optax.chain(optax.masked(optax.scale_by_adam(), {"a": True, "b": False}), RATE_ALONE(0.1)),
        adamjax.partition([("^a", adam_like_optax())], default=adamjax.scale_by_learning_rate(0.5)),
        2,
        MOVES,
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
        MOVES,
    ),
    "two schedules": (
        optax.chain(optax.adam(FALLS), optax.scale_by_schedule(FALLS)),
        adam_like_optax(FALLS),
        2,
        MOVES,
    ),
    "one schedule for two": (
        optax.adam(FALLS),
        adamjax.chain(
            adam_like_optax(FALLS), adamjax.scale(-1.0), adamjax.scale_by_learning_rate(FALLS)
        ),
        2,
        MOVES,
    ),
    "schedules before and after": (
        optax.chain(optax.scale_by_schedule(FALLS), optax.adam(LATE)),
        adamjax.chain(
            adamjax.scale(-1.0), adamjax.scale_by_learning_rate(LATE), adam_like_optax(FALLS)
        ),
        2,
        MOVES,
    ),
    "a raw gradient": (
        optax.chain(optax.masked(optax.scale_by_adam(), {"a": True, "b": False}), RATE_ALONE(0.1)),
        adamjax.masked(adam_like_optax(), "a"),
        2,
        MOVES,
    ),
    "an injected clip of some leaves": (
        optax.chain(optax.masked(INJECT(optax.clip)(0.1), ONLY_A), optax.adam(0.1)),
        adamjax.chain(adamjax.clip_by_value(0.1), adam_like_optax()),
        2,
        MOVES,
    ),
    "one rate, and parts that use it differently": (
        RATE_OF_PARTS,
        adam_like_optax(),
        2,
        MOVES,
    ),
    "two clips of one limit": (
        optax.chain(CLIP_ALONE(0.1), optax.adam(0.1), CLIP_ALONE(0.1)),
        adamjax.chain(adam_like_optax(), adamjax.clip_by_global_norm(0.1)),
        2,
        MOVES,
    ),
    "two decays of one size": (
        optax.chain(DECAY_ALONE(0.1), INJECT(optax.adamw)(0.1, weight_decay=0.1)),
        adamjax.chain(adamjax.add_decayed_weights(0.1), adam_like_optax()),
        2,
        MOVES,
    ),
    "a clip in a dictionary": (
        optax.named_chain(("clip", CLIP_ALONE(1.0)), ("adam", optax.adam(0.1))),
        adamjax.chain(adam_like_optax(), adamjax.clip_by_global_norm(1.0)),
        2,
        MOVES,
    ),
    "skipped steps of one part": (
        optax.multi_transform(
            {"x": optax.apply_if_finite(optax.adam(0.1), 3), "y": optax.adam(0.1)}, LABELS
        ),
        adamjax.skip_not_finite(adam_like_optax()),
        2,
        "tx skips steps of the leaf 'b' .*optax does not: remove skip_not_finite",
    ),
    "steps that a schedule counts though they are skipped": (
        optax.chain(
            optax.apply_if_finite(optax.scale_by_adam(), 3), optax.scale_by_learning_rate(FALLS)
        ),
        adamjax.skip_not_finite(adam_like_optax(FALLS)),
        2,
        "a schedule counts the steps that are skipped: put scale_by_learning_rate outside of",
    ),
    "skipped steps that a schedule does not count": (
        optax.apply_if_finite(optax.adam(FALLS), 3),
        adamjax.chain(
            adamjax.skip_not_finite(adamjax.scale_by_adam(eps=1e-8)),
            adamjax.scale_by_learning_rate(FALLS),
        ),
        2,
        "a schedule counts the steps that are skipped: put scale_by_learning_rate inside",
    ),
    "an injected clip after the rule": (
        optax.chain(optax.adam(0.1), INJECT(optax.clip_by_global_norm)(1.0)),
        adamjax.chain(adamjax.clip_by_global_norm(1.0), adam_like_optax()),
        2,
        MOVES,
    ),
    "an injected clip before the rule": (
        optax.chain(INJECT(optax.clip)(1.0), optax.adam(0.1)),
        adamjax.chain(adam_like_optax(), adamjax.clip_by_value(1.0)),
        2,
        MOVES,
    ),
    "skipped micro-batches": (
        optax.apply_if_finite(micro_batches(optax.adam(0.1), 2), 3),
        adamjax.accumulate_gradients(adamjax.skip_not_finite(adam_like_optax()), 2),
        2,
        "optax skips micro-batches .*put skip_not_finite outside of accumulate_gradients",
    ),
    "skipped steps of micro-batches": (
        micro_batches(optax.apply_if_finite(optax.adam(0.1), 3), 2),
        adamjax.skip_not_finite(adamjax.accumulate_gradients(adam_like_optax(), 2)),
        2,
        "apply_if_finite is inside MultiSteps, whose sum keeps a NaN",
    ),
    "skipped steps of micro-batches, also in tx": (
        micro_batches(optax.apply_if_finite(optax.adam(0.1), 3), 2),
        adamjax.accumulate_gradients(adamjax.skip_not_finite(adam_like_optax()), 2),
        2,
        "apply_if_finite is inside MultiSteps, whose sum keeps a NaN",
    ),
    "a decay before the rule": (
        INJECT(optax.adamw)(learning_rate=0.1, weight_decay=0.1),
        adamjax.chain(adamjax.add_decayed_weights(0.1), adam_like_optax()),
        2,
        MOVES,
    ),
}


def skip_without_schedules_of_decay(case):
    """Older versions of optax take no schedule of a weight decay, outside of inject_hyperparams."""
    if case in ("a decay's schedule before the rule", "a decay with a schedule"):
        one = optax.add_decayed_weights(FALLS)
        if not jax.tree.leaves(one.init(TWO)):
            pytest.skip("this version of optax takes no schedule of a weight decay")


@pytest.mark.parametrize("case", GOES_ON_OTHERWISE)
def test_a_run_that_would_go_on_otherwise_is_refused(case):
    skip_without_schedules_of_decay(case)
    theirs, ours, n, message = GOES_ON_OTHERWISE[case]
    with pytest.raises(ValueError, match=f"from_optax: .*{message}"):
        convert.from_optax(steps_of(theirs, n), ours, TWO, theirs)
    with pytest.raises(ValueError, match=f"to_optax: .*{message}"):
        convert.to_optax(steps_of(ours, n), ours, TWO, theirs)


GOES_ON = {
    "a product of factors": (
        optax.chain(optax.scale_by_adam(), INJECT(optax.scale)(0.5), RATE_ALONE(0.1)),
        adamjax.chain(
            adamjax.scale_by_adam(eps=1e-8), adamjax.scale(0.5), adamjax.scale_by_learning_rate(0.1)
        ),
    ),
    "a factor after a rate": (
        optax.chain(INJECT(optax.adam)(learning_rate=0.1), INJECT(optax.scale)(0.5)),
        adamjax.chain(adam_like_optax(), adamjax.scale(0.5)),
    ),
    "a schedule after a rate": (
        optax.chain(INJECT(optax.adam)(learning_rate=0.1), optax.scale_by_schedule(FALLS)),
        adamjax.chain(
            adam_like_optax(), adamjax.scale(-1.0), adamjax.scale_by_learning_rate(FALLS)
        ),
    ),
    "a decay with a schedule": (
        optax.adamw(0.1, weight_decay=FALLS),
        adamjax.adamw(0.1, eps=1e-8, weight_decay=FALLS),
    ),
    "optax' schedule in our chain": (
        optax.adam(FALLS),
        adamjax.chain(
            adamjax.scale_by_adam(eps=1e-8), optax.scale_by_schedule(lambda c: -FALLS(c))
        ),
    ),
    "two schedules": (
        optax.chain(optax.adam(FALLS), optax.scale_by_schedule(FALLS)),
        adamjax.chain(
            adam_like_optax(FALLS), adamjax.scale(-1.0), adamjax.scale_by_learning_rate(FALLS)
        ),
    ),
    "an injected limit of values": (
        optax.chain(INJECT(optax.clip)(0.1), optax.adam(0.1)),
        adamjax.chain(adamjax.clip_by_value(0.1), adam_like_optax()),
    ),
    "skipped micro-batches": (
        optax.apply_if_finite(micro_batches(optax.adam(0.1), 2), 3),
        adamjax.skip_not_finite(adamjax.accumulate_gradients(adam_like_optax(), 2)),
    ),
    "nested accumulation after a step": (
        nested_steps(optax.adam(0.1), 2, 2),
        nested_accumulation(2, 2),
    ),
}


@pytest.mark.parametrize("case", GOES_ON)
def test_a_run_that_goes_on_alike(case, x64):
    skip_without_schedules_of_decay(case)
    theirs, ours = GOES_ON[case]
    params = jax.tree.map(lambda x: x.astype(float), TWO)
    old = steps_of(theirs, 4, params)
    state = convert.from_optax(old, ours, params, theirs)
    back = convert.to_optax(state, ours, params, theirs)
    grads = jax.tree.map(lambda x: 0.5 * x, params)
    for _ in range(5):
        expected, old = theirs.update(grads, old, params)
        actual, state = ours.update(grads, state, params)
        after, back = theirs.update(grads, back, params)
        assert_close(actual, expected, rtol=1e-12)
        assert_close(after, expected, rtol=1e-12)


def plateau(factor):
    return optax.contrib.reduce_on_plateau(
        factor=factor, patience=0, cooldown=0, accumulation_size=1
    )


def test_states_of_optax_in_a_dictionary_have_no_order():
    """JAX sorts its keys, so that nothing shows which of two states is which."""
    parts = {name: optax.chain(optax.adam(0.1), plateau(0.5)) for name in "zy"}
    theirs = optax.multi_transform(parts, {"a": "z", "b": "y"})
    one = adamjax.chain(adam_like_optax(), plateau(0.5))
    ours = adamjax.partition([("^a", one)], default=one)
    old = steps_of(theirs, 2, value=1.0)
    state = convert.from_optax(old, ours, TWO, check=False)  # both are the same
    z = old.inner_states["z"]
    z = z._replace(inner_state=(z.inner_state[0], z.inner_state[1]._replace(scale=jnp.array(0.1))))
    other = old._replace(inner_states={**old.inner_states, "z": z})
    with pytest.raises(ValueError, match=r"several states of .* in a dictionary, whose order JAX"):
        convert.from_optax(other, ours, TWO, theirs)
    convert.from_optax(other, ours, TWO, check=False)
    state = (state[0], (*state[1][:-1], state[1][-1]._replace(scale=jnp.array(0.1))))
    with pytest.raises(ValueError, match=r"to_optax: there are several states of "):
        convert.to_optax(state, ours, TWO, theirs)


def test_an_average_is_not_dropped():
    tx = adamjax.chain(adam_like_optax(), adamjax.weight_ema(0.5, overwrite_frequency=3))
    state = tx.init(TWO)
    message = r"sets the weights to their average, and the other system has no average"
    with pytest.raises(ValueError, match=f"to_optax: .*{message}"):
        convert.to_optax(state, tx, TWO, optax.adam(0.1))
    group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    group |= {"weight_decay": 0, "amsgrad": False}
    kept = {"state": {}, "param_groups": [group]}
    with pytest.raises(ValueError, match=f"to_torch: .*{message}"):
        convert.to_torch(tx.init(TWO["a"]), tx, TWO["a"], kept)
    tx = adamjax.chain(adam_like_optax(), adamjax.weight_ema(0.5))
    with pytest.raises(ValueError, match=r"to_torch: the state has an average of the weights"):
        convert.to_torch(tx.init(TWO["a"]), tx, TWO["a"], kept)
    convert.to_torch(tx.init(TWO["a"]), tx, TWO["a"], kept, check=False)


def test_updates_that_torch_does_not_clip():
    group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    kept = {
        "state": {},
        "param_groups": [{**group, "weight_decay": 0, "amsgrad": False}],
    }
    rule, rate = adamjax.scale_by_adam(eps=1e-8), adamjax.scale_by_learning_rate(0.1)
    clip = adamjax.clip_by_global_norm(0.1)
    convert.from_torch(kept, adamjax.chain(clip, rule, rate), TWO["a"])
    with pytest.raises(ValueError, match=r"no clip of updates, tx has clip_by_global_norm"):
        convert.from_torch(kept, adamjax.chain(rule, clip, rate), TWO["a"])


def keras_adam(keras, count=0, cls="Adam", variables=None, **options):
    optimizer = getattr(keras.optimizers, cls)(0.1, **options)
    optimizer.build(variables or [keras.Variable(np.ones(3), name=name) for name in ("v0", "v1")])
    optimizer._iterations.assign(count)
    return optimizer


KERAS_PARAMS = {"v0": jnp.ones(3), "v1": jnp.ones(3)}
KERAS_RULE = adamjax.scale_by_adam(eps_hat=1e-7)


def test_a_decay_outside_of_the_accumulation_of_keras_is_refused(keras):
    optimizer = keras_adam(keras, 4, "AdamW", weight_decay=0.1, gradient_accumulation_steps=2)
    decay, rate = adamjax.add_decayed_weights(0.1), adamjax.scale_by_learning_rate(0.1)
    inside = adamjax.accumulate_gradients(adamjax.chain(KERAS_RULE, decay), 2)
    inside = adamjax.chain(inside, rate)
    outside = adamjax.chain(adamjax.accumulate_gradients(KERAS_RULE, 2), decay, rate)
    pairs = [(v.path, np.asarray(v)) for v in optimizer.variables]
    for variables in (optimizer, pairs):
        state = convert.from_keras(variables, inside, KERAS_PARAMS)
        convert.to_keras(state, inside, KERAS_PARAMS, variables)
        for call in (
            lambda v=variables: convert.from_keras(v, outside, KERAS_PARAMS),
            lambda v=variables: convert.to_keras(
                outside.init(KERAS_PARAMS), outside, KERAS_PARAMS, v
            ),
        ):
            with pytest.raises(ValueError, match="adds the weight decay once in each step"):
                call()


def test_a_schedule_by_path_within_the_accumulation_of_keras_is_refused(keras):
    falls = keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)
    optimizer = keras_adam(keras, gradient_accumulation_steps=2)
    optimizer._learning_rate = falls
    rates = adamjax.by_path([("v0", FALLS)], default=FALLS)
    tx = adamjax.accumulate_gradients(adamjax.adam(rates), 2)
    with pytest.raises(ValueError, match="calls a schedule with the number of micro-batches"):
        convert.from_keras(optimizer, tx, KERAS_PARAMS)


def test_keras_has_one_count_for_all(keras):
    falls = keras.optimizers.schedules.ExponentialDecay(0.1, 3, 0.5)
    optimizer = keras.optimizers.Adam(falls)
    optimizer.build([keras.Variable(np.ones(3), name=name) for name in KERAS_PARAMS])
    tx = adamjax.chain(adamjax.skip_not_finite(KERAS_RULE), adamjax.scale_by_learning_rate(FALLS))
    state = tx.init(KERAS_PARAMS)
    _, state = tx.update(KERAS_PARAMS, state, KERAS_PARAMS)
    convert.to_keras(state, tx, KERAS_PARAMS, optimizer)
    nan = jax.tree.map(lambda x: x * jnp.nan, KERAS_PARAMS)
    _, state = tx.update(nan, state, KERAS_PARAMS)
    with pytest.raises(ValueError, match="has counted 2 steps and the rule 1, but Keras has one"):
        convert.to_keras(state, tx, KERAS_PARAMS, optimizer)
    convert.to_keras(state, tx, KERAS_PARAMS, optimizer, check=False)


def test_an_average_of_some_leaves_does_not_drop_that_of_others(keras):
    optimizer = keras_adam(keras, 2, use_ema=True, ema_momentum=0.5)
    average = adamjax.weight_ema(0.5)
    some = adamjax.chain(adamjax.adam(0.1), adamjax.masked(average, "v0"))
    with pytest.raises(ValueError, match=r"an average of 'v1', but tx has no weight_ema"):
        convert.from_keras(optimizer, some, KERAS_PARAMS)
    tx = adamjax.chain(adamjax.adam(0.1), average)
    state = convert.from_keras(optimizer, tx, KERAS_PARAMS)
    with pytest.raises(ValueError, match=r"has an average of the weights, but the optimizer has n"):
        convert.to_keras(state, tx, KERAS_PARAMS, keras_adam(keras))
    convert.to_keras(state, tx, KERAS_PARAMS, keras_adam(keras), check=False)


def test_what_keras_does_beside_its_rule_is_refused(keras):
    tx = adamjax.adam(0.1)

    def expect_refusal(optimizer, message):
        for call in (
            lambda: convert.from_keras(optimizer, tx, KERAS_PARAMS),
            lambda: convert.to_keras(tx.init(KERAS_PARAMS), tx, KERAS_PARAMS, optimizer),
        ):
            with pytest.raises(ValueError, match=message):
                call()

    variables = [keras.Variable(np.ones(3), name=name) for name in KERAS_PARAMS]
    variables[1].constraint = keras.constraints.NonNeg()
    optimizer = keras_adam(keras, variables=variables)
    expect_refusal(optimizer, r"the variable of 'v1' has constraint=.*NonNeg")
    only = adamjax.masked(tx, "v0")
    convert.from_keras(optimizer, only, KERAS_PARAMS, order=["v0", None])
    optimizer = keras_adam(keras, use_ema=True)
    optimizer.use_ema = False
    expect_refusal(optimizer, "use_ema of the optimizer is False, but it has the variables")
    optimizer = keras_adam(keras, amsgrad=True)
    optimizer.amsgrad = False
    expect_refusal(optimizer, "amsgrad of the optimizer is False, but it has the variables")


def test_the_product_of_nadam_is_a_copy():
    tx, n = adamjax.nadam(0.1, eps=1e-8), 40
    for _ in range(n):  # Whether JAX would share memory depends on the address.
        product = np.array(0.9 * (1 - 0.5 * 0.96), np.float32)
        slots = {"exp_avg": np.full(2, 0.1, np.float32), "exp_avg_sq": np.ones(2, np.float32)}
        group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0}
        kept = {
            "state": {0: {"step": 1, "mu_product": product, **slots}},
            "param_groups": [{**group, "momentum_decay": 1.0}],
        }
        state = convert.from_torch(kept, tx, jnp.ones(2))
        product[...] = 0
        assert float(state[0].momentum_product) > 0.4


# --- the steps of optax' optimizer itself ---------------------------------------------------------

CLIPPED = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.1))
LIKE_CLIPPED = adamjax.chain(
    adamjax.clip_by_global_norm(1.0), adamjax.adamw(0.1, eps=1e-8, weight_decay=1e-4)
)


def replaced(**changes):
    fields = {"eps": 1e-8, "weight_decay": 1e-4, **changes}
    return adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adamw(0.1, **fields))


# What no state shows.
OTHER_STEPS = {
    "epsilon": replaced(eps=1e-7),
    "decay": replaced(weight_decay=2e-4),
    "mask": replaced(mask="a"),
    "rate": adamjax.chain(LIKE_CLIPPED, adamjax.scale(0.99)),
    "b1": replaced(b1=0.91),
    "b2": replaced(b2=0.998),
    "limit": adamjax.chain(adamjax.clip_by_global_norm(2.0), LIKE_CLIPPED.transforms[1]),
    "no clip": adamjax.adamw(0.1, eps=1e-8, weight_decay=1e-4),
    "order": adamjax.chain(
        adamjax.scale_by_adam(eps=1e-8),
        adamjax.clip_by_global_norm(1.0),
        adamjax.add_decayed_weights(1e-4),
        adamjax.scale_by_learning_rate(0.1),
    ),
}


@pytest.mark.parametrize("name", OTHER_STEPS)
def test_steps_of_the_optimizer_itself_are_compared(name):
    tx = OTHER_STEPS[name]
    old = steps_of(CLIPPED, 3)
    convert.from_optax(old, tx, TWO, check=False)
    with pytest.raises(
        ValueError, match=r"from_optax: in step \d+ from .* on, tx moves an element"
    ):
        convert.from_optax(old, tx, TWO, optimizer=CLIPPED)
    with pytest.raises(ValueError, match=r"to_optax: in step \d+ from .* on, tx moves an element"):
        convert.to_optax(steps_of(tx, 3), tx, TWO, CLIPPED)


class CallsState(NamedTuple):
    num_calls: Any


def falls_at(calls, state_with=CallsState):
    """A transform of another library with a counter of its own."""

    def init(params):
        return state_with(jnp.zeros((), jnp.int32))

    def update(updates, state, params=None):
        (num_calls,) = jax.tree.leaves(state)
        factor = jnp.where(num_calls < calls, 1.0, 0.1)
        updates = jax.tree.map(lambda u: factor * u, updates)
        return updates, state_with(num_calls + 1)

    return optax.GradientTransformation(init, update)


def by_own_count(schedule):
    """Adam with a rate that it computes from the count of its moments."""
    adam = optax.scale_by_adam()

    def update(updates, state, params=None):
        u, after = adam.update(updates, state, params)
        return jax.tree.map(lambda x: -schedule(state.count) * x, u), after

    return optax.GradientTransformation(adam.init, update)


def jump(count, before, after):
    return lambda c: jnp.where(c < count, before, after)


SMALL_DECAY_SGD = optax.chain(optax.add_decayed_weights(1e-4), optax.sgd(0.1))
SGD_BESIDE_ADAM = optax.multi_transform({"x": optax.adam(0.1), "y": SMALL_DECAY_SGD}, LABELS)
LIKE_SGD_BESIDE_ADAM = adamjax.partition(
    [("a", adam_like_optax())], default=adamjax.scale_by_learning_rate(0.1)
)


def nearly_stops(count):
    return jnp.where((count > 2) & (count < 50), 1e-8, 0.1)


# For each: the transform of optax, that of adamjax, and the steps before. Nothing in the states
# shows the difference, or only to who knows the order.
OTHER_LATER = {
    "micro-batches are clipped": (
        optax.chain(optax.clip_by_global_norm(1.0), micro_batches(optax.adam(0.1), 2)),
        adamjax.accumulate_gradients(
            adamjax.chain(adamjax.clip_by_global_norm(1.0), adam_like_optax()), 2
        ),
    ),
    "their mean is clipped": (
        micro_batches(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1)), 2),
        adamjax.chain(
            adamjax.clip_by_global_norm(1.0), adamjax.accumulate_gradients(adam_like_optax(), 2)
        ),
    ),
    "a schedule, much later": (optax.adam(LATE), adam_like_optax(0.1)),
    "a clip of updates": (
        optax.chain(optax.scale_by_adam(), optax.clip(1.5), optax.scale(-0.1)),
        adam_like_optax(),
    ),
    "another schedule, much later": (
        optax.adam(lambda count: LATE(count) * jnp.where(count > 3000, 0.1, 1)),
        adam_like_optax(LATE),
    ),
    "a schedule of the second rule": (
        optax.chain(optax.adam(0.1), optax.adam(LATE)),
        adamjax.chain(adam_like_optax(0.1), adam_like_optax(0.1)),
    ),
    "schedules before and after": (
        optax.chain(optax.scale_by_schedule(FALLS), optax.adam(LATE)),
        adamjax.chain(
            adamjax.scale(-1.0), adamjax.scale_by_learning_rate(LATE), adam_like_optax(FALLS)
        ),
    ),
    "the end of a function": (
        optax.adam(optax.piecewise_constant_schedule(0.1, {100: 0.1})),
        adam_like_optax(optax.piecewise_constant_schedule(0.1, {90: 0.1})),
    ),
    "a few steps": (
        optax.adam(lambda count: jnp.where((count > 22) & (count < 27), 0.0, 0.1)),
        adam_like_optax(),
    ),
    "a schedule of b1": (INJECT(optax.adam)(0.1, b1=jump(50, 0.9, 0.5)), adam_like_optax()),
    "a schedule of a limit": (
        optax.chain(CLIP_ALONE(jump(50, 1.0, 0.1)), optax.adam(0.1)),
        adamjax.chain(adamjax.clip_by_global_norm(1.0), adam_like_optax()),
    ),
    "a schedule of a small decay": (
        INJECT(optax.adamw)(0.1, weight_decay=jump(50, 1e-3, 2e-2)),
        adamjax.adamw(0.1, eps=1e-8, weight_decay=1e-3),
    ),
    "a clip at a rate of 0": (
        optax.chain(optax.clip(0.1), optax.adam(jump(50, 0.0, 0.1))),
        adam_like_optax(jump(50, 0.0, 0.1)),
    ),
    "b1 of a part at a rate of 0": (
        optax.multi_transform({"x": optax.adam(jump(50, 0.0, 0.1)), "y": optax.adam(0.1)}, LABELS),
        adamjax.partition(
            [("a", adamjax.adam(jump(50, 0.0, 0.1), 0.5, eps=1e-8))], default=adam_like_optax()
        ),
    ),
    "values of micro-batches are clipped": (
        optax.chain(optax.clip(2.0), micro_batches(optax.adam(0.1), 4)),
        adamjax.accumulate_gradients(
            adamjax.chain(adamjax.clip_by_value(2.0), adam_like_optax()), 4
        ),
    ),
    "a schedule of micro-batches": (
        optax.MultiSteps(optax.adam(0.1), jump(50, 2, 4)).gradient_transformation(),
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
    "a condition": (
        optax.chain(
            optax.conditionally_transform(optax.clip(0.1), lambda step: step < 50), optax.adam(0.1)
        ),
        adamjax.chain(
            optax.conditionally_transform(optax.clip(0.1), lambda step: step < 500),
            adam_like_optax(),
        ),
    ),
    "micro-batches are normalized": (
        optax.chain(optax.contrib.normalize(), micro_batches(optax.adam(0.1), 4)),
        adamjax.accumulate_gradients(
            adamjax.chain(optax.contrib.normalize(), adam_like_optax()), 4
        ),
    ),
    "their mean is normalized": (
        micro_batches(optax.chain(optax.contrib.normalize(), optax.adam(0.1)), 4),
        adamjax.chain(
            optax.contrib.normalize(), adamjax.accumulate_gradients(adam_like_optax(), 4)
        ),
    ),
    "the signs of micro-batches": (
        optax.chain(optax.scale_by_sign(), micro_batches(optax.adam(0.1), 3)),
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
        by_own_count(optax.piecewise_constant_schedule(0.1, {12_000: 0.1})),
        adam_like_optax(),
    ),
    "zeros for NaN in micro-batches": (
        optax.chain(optax.zero_nans(), micro_batches(optax.adam(0.1), 4)),
        adamjax.accumulate_gradients(adamjax.chain(optax.zero_nans(), adam_like_optax()), 4),
    ),
    "skips of other leaves": (
        optax.multi_transform(
            {"x": optax.apply_if_finite(optax.adam(0.1), 9)}, {"a": "x", "b": "x"}
        ),
        adamjax.partition(
            [("a", adamjax.skip_not_finite(adam_like_optax()))],
            default=adamjax.skip_not_finite(adam_like_optax()),
        ),
    ),
    "an infinite gradient is clipped first": (
        optax.chain(optax.clip(1.0), optax.apply_if_finite(optax.adam(0.1), 9)),
        adamjax.skip_not_finite(adamjax.chain(adamjax.clip_by_value(1.0), adam_like_optax())),
    ),
    "a counter of another name": (
        optax.chain(optax.adam(0.1), falls_at(50)),
        adamjax.chain(adam_like_optax(), falls_at(90)),
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
                "y": optax.chain(DECAY_ALONE(jump(50, 0.0, 1e-4)), optax.sgd(0.1)),
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
        optax.chain(micro_batches(optax.adam(0.1), 2), optax.scale_by_schedule(LATE)),
        adamjax.accumulate_gradients(
            adamjax.chain(
                adam_like_optax(), adamjax.scale(-1.0), adamjax.scale_by_learning_rate(LATE)
            ),
            2,
        ),
    ),
}


@pytest.mark.parametrize("name", OTHER_LATER)
def test_later_steps_of_the_optimizer_itself_are_compared(name):
    theirs, ours = OTHER_LATER[name]
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(steps_of(theirs, 4), ours, TWO, optimizer=theirs)
    with pytest.raises(ValueError, match=MOVES):
        convert.to_optax(steps_of(ours, 4), ours, TWO, theirs)


def test_a_large_rtol_does_not_hide_the_decay_of_adamax():
    theirs = optax.adamax(0.01, b2=0.99)
    old = steps_of(theirs, 7)
    convert.from_optax(old, adamjax.adamax(0.01, b2=0.99, eps=1e-8), TWO, theirs, rtol=0.05)
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(old, adamjax.adamax(0.01, b2=0.9995, eps=1e-8), TWO, theirs, rtol=0.05)


def test_a_step_from_the_parameters_themselves_is_compared_too():
    """Weights that are 0 may stay 0, as those of a pruned model do."""

    def keep_zeros(updates, params):
        return jax.tree.map(lambda u, p: jnp.where(p == 0, 0, u), updates, params)

    params = {"w": jnp.array([1.0, 0.0, -2.0])}
    adam = optax.adam(0.1)
    theirs = optax.chain(adam, optax.stateless(keep_zeros))
    old = steps_of(theirs, 4, params)
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(old, adam_like_optax(), params, optimizer=theirs)
    ours = adamjax.chain(adam_like_optax(), optax.stateless(keep_zeros))
    convert.from_optax(old, ours, params, optimizer=theirs)


def test_many_micro_batches_and_large_gradients_are_compared_too():
    theirs = micro_batches(optax.adam(0.01), 16)
    old = steps_of(theirs, 16)
    for rate, n in ((0.1, 16), (0.01, 32)):
        ours = adamjax.accumulate_gradients(adam_like_optax(rate), n)
        with pytest.raises(ValueError, match=MOVES):
            convert.from_optax(old, ours, TWO, optimizer=theirs)
    large = jax.tree.map(lambda x: 1e6 * x, TWO)
    theirs = optax.chain(optax.clip_by_global_norm(1e5), optax.adam(0.1))
    old = theirs.update(large, theirs.init(TWO), TWO)[1]
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(old, adam_like_optax(), TWO, optimizer=theirs)
    # A large decay hides nothing of the rule.
    theirs = optax.adamw(0.1, weight_decay=1.0)
    ours = adamjax.adamw(0.1, 0.92, eps=1e-8, weight_decay=1.0)
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(steps_of(theirs, 3), ours, TWO, optimizer=theirs)
    theirs = optax.apply_if_finite(optax.adam(0.1), 9)
    skips = adamjax.skip_not_finite(adam_like_optax())
    ours = adamjax.partition([("a", skips)], default=skips)
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(steps_of(theirs, 3), ours, TWO, optimizer=theirs)


@pytest.mark.parametrize("ends", [(300, 379), (1000, 1899)])
@pytest.mark.slow
def test_ends_of_schedules_are_compared_with_many_micro_batches_too(ends):
    theirs = micro_batches(optax.adam(optax.piecewise_constant_schedule(0.1, {ends[0]: 0.1})), 32)
    for end, is_same in ((ends[0] - 1, True), (ends[1], False)):
        rate = adamjax.piecewise_constant([end], [0.1, 0.01])
        ours = adamjax.accumulate_gradients(adam_like_optax(rate), 32)
        with nullcontext() if is_same else pytest.raises(ValueError, match=MOVES):
            convert.from_optax(steps_of(theirs, 33), ours, TWO, optimizer=theirs)


def state_of_rare_rows(theirs, params, steps):
    """A state after gradients of which each row's are 10 times as small as those of the last."""
    sizes = 10.0 ** -jnp.arange(len(params["table"]))[:, None]

    def step(i, state):
        signs = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), (8, 4))
        return theirs.update({"table": sizes * signs}, state, params)[1]

    return jax.jit(lambda: jax.lax.fori_loop(0, steps, step, theirs.init(params)))()


@pytest.mark.parametrize(
    ("theirs", "ours", "steps"),
    [(optax.nadam, adamjax.nadam, 600), (optax.amsgrad, adamjax.amsgrad, 14_500)],
)
def test_an_epsilon_that_matters_for_rare_rows_alone_is_compared(theirs, ours, steps):
    params = {"table": jnp.ones((8, 4))}
    old = state_of_rare_rows(theirs(0.01), params, steps)
    convert.from_optax(old, ours(0.01, eps=1e-8), params, optimizer=theirs(0.01))
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(old, ours(0.01, eps=1e-7), params, optimizer=theirs(0.01))


LATE_RULES = {
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
        micro_batches(optax.adamax(0.01, b2=0.9), 2),
        lambda eps: adamjax.accumulate_gradients(adamjax.adamax(0.01, b2=0.9, eps=eps), 2),
    ),
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] * ("micro-batches" in name))
        for name in LATE_RULES
    ],
)
def test_an_epsilon_of_rows_without_gradients_so_far_is_compared(name):
    theirs, ours = LATE_RULES[name]
    old = jax.jit(
        lambda: jax.lax.fori_loop(
            0, 1_201, lambda i, state: theirs.update(TWO, state, TWO)[1], theirs.init(TWO)
        )
    )()
    state = convert.from_optax(old, ours(1e-8), TWO, optimizer=theirs)
    convert.to_optax(state, ours(1e-8), TWO, theirs)
    other = ours(1e-7)
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(old, other, TWO, optimizer=theirs)
    with pytest.raises(ValueError, match=MOVES):
        convert.to_optax(state, other, TWO, theirs)


def test_a_clip_of_gradients_larger_than_any_before_is_compared():
    params = {"table": jnp.ones((8, 4))}
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.nadam(0.01))
    old = theirs.init(params)
    for _ in range(600):
        old = theirs.update({"table": jnp.full((8, 4), 1e-5)}, old, params)[1]
    ours = adamjax.nadam(0.01, eps=1e-8)
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(old, ours, params, optimizer=theirs)
    ours = adamjax.chain(adamjax.clip_by_global_norm(1.0), ours)
    convert.from_optax(old, ours, params, optimizer=theirs)


@pytest.mark.slow
def test_sums_of_micro_batches_in_the_middle_of_a_step_are_refused():
    """MultiSteps(use_grad_mean=False) stores sums where it usually stores means."""
    theirs = optax.MultiSteps(optax.adam(0.1), 4, use_grad_mean=False).gradient_transformation()
    ours = adamjax.accumulate_gradients(adamjax.chain(adamjax.scale(4.0), adam_like_optax()), 4)
    small = jax.tree.map(lambda x: 1e-5 * x, TWO)
    old, new = theirs.init(TWO), ours.init(TWO)
    refused = pytest.raises(ValueError, match=r"use_grad_mean=False.*convert after a step")
    for micro in (1, 3):  # The sum of one gradient is its mean.
        while int(old.mini_step) < micro:
            old, new = theirs.update(small, old, TWO)[1], ours.update(small, new, TWO)[1]
        with refused if micro > 1 else nullcontext():
            convert.from_optax(old, ours, TWO, optimizer=theirs)
    with refused:
        convert.to_optax(new, ours, TWO, theirs)


def test_scalars_with_narrow_momentum_are_no_false_alarm():
    """Their m may nearly cancel, and is rounded as coarsely as before."""
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
    theirs = micro_batches(optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.01)), 2)
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
    # With the first decay, float32 updates cancel, with the second those of bfloat16 momentum.
    for decay in (5.01e-4, 1e-3):
        theirs = optax.adamw(1e-3, mu_dtype=dtype, weight_decay=decay)
        ours = adamjax.adamw(1e-3, eps=1e-8, m_dtype=dtype, weight_decay=decay)
        old = theirs.init(params)
        for _ in range(5):
            grads = jax.tree.map(lambda x: 0.1 * normal(*x.shape), params)
            old = theirs.update(grads, old, params)[1]
        convert.from_optax(old, ours, params, optimizer=theirs)
        other = adamjax.adamw(1e-3, eps=1e-8, m_dtype=dtype, weight_decay=1.2 * decay)
        with pytest.raises(ValueError, match=MOVES):
            convert.from_optax(old, other, params, optimizer=theirs)


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
def test_a_counter_of_another_library_goes_on_wherever_it_is(where):
    def with_adam(adam, calls):
        return [adam, falls_at(calls, STATES_WITH_A_COUNTER[where]), optax.scale(-0.1)]

    theirs = optax.chain(*with_adam(optax.scale_by_adam(), 50))
    ours, other = (
        adamjax.chain(*with_adam(adamjax.scale_by_adam(eps=1e-8), calls)) for calls in (50, 60)
    )
    old = steps_of(theirs, 3)
    state = convert.from_optax(old, ours, TWO, optimizer=theirs)
    assert_same(state[1], old[1])
    assert_same(convert.to_optax(state, ours, TWO, theirs), old)
    for refused in (
        lambda: convert.from_optax(old, other, TWO, optimizer=theirs),
        lambda: convert.to_optax(state, other, TWO, theirs),
    ):
        with pytest.raises(ValueError, match=MOVES):
            refused()


def test_a_b2_near_1_is_no_false_alarm():
    theirs, ours = optax.adam(0.01, b2=0.99999), adamjax.adam(0.01, b2=0.99999, eps=1e-8)
    convert.from_optax(steps_of(theirs, 30), ours, TWO, optimizer=theirs)
    other = adamjax.adam(0.01, b2=0.99998, eps=1e-8)
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(steps_of(theirs, 30), other, TWO, optimizer=theirs)
    # However near, a rate that is off by 1% is seen.
    theirs, ours = optax.adam(0.01, b2=0.9999999), adamjax.adam(0.0101, b2=0.9999999, eps=1e-8)
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(steps_of(theirs, 30), ours, TWO, optimizer=theirs)


@pytest.mark.slow
def test_many_leaves_are_compared_in_few_calls():
    params = {str(i): jnp.ones(4) for i in range(40)}
    theirs, ours = optax.adam(LINEAR), adam_like_optax(LINEAR)
    calls = []
    counted = optax.GradientTransformation(
        theirs.init, lambda *args: (calls.append(0), theirs.update(*args))[1]
    )
    convert.from_optax(theirs.init(params), ours, params, optimizer=counted)
    assert len(calls) == 1  # it is traced, and compiled, once


def test_adamax_of_complex_leaves_goes_on():
    params = {"z": jnp.array([1 + 2j, 3 - 1j])}
    theirs, ours = optax.adamax(0.01), adamjax.adamax(0.01, eps=1e-8)
    old = steps_of(theirs, 20, params)
    assert jnp.iscomplexobj(old[0].nu["z"])
    state = convert.from_optax(old, ours, params, optimizer=theirs, rtol=1e-4)
    assert_close(adamjax.get_slot(state, "u")["z"], jnp.abs(params["z"]), rtol=1e-3)


@pytest.mark.slow
def test_groups_with_micro_batches_of_their_own_take_as_many_calls_as_one():
    params = {"a": jnp.ones(3), "b": jnp.ones(3)}
    theirs = optax.multi_transform(
        {"a": micro_batches(optax.adam(0.1), 8), "b": micro_batches(optax.adam(0.2), 8)},
        {"a": "a", "b": "b"},
    )
    parts = {
        name: adamjax.accumulate_gradients(adam_like_optax(rate), 8)
        for name, rate in (("a", 0.1), ("b", 0.2))
    }
    ours = adamjax.partition(parts)
    assert PairedSteps(AdamjaxState("test", ours, ours.init(params), params), theirs).calls == 8
    convert.from_optax(theirs.init(params), ours, params, optimizer=theirs)
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(
            theirs.init(params),
            adamjax.partition({"a": parts["b"], "b": parts["b"]}),
            params,
            optimizer=theirs,
        )


LINEAR = optax.linear_schedule(1e-3, 0.0, 1000)
SAME_STEPS = {
    "another library's rule in a part": (
        optax.multi_transform({"x": optax.adam(0.1), "y": optax.lion(0.1)}, LABELS),
        adamjax.partition([("a", adam_like_optax())], default=optax.lion(0.1)),
    ),
    "micro-batches clipped by the size of weights": (
        optax.chain(optax.adaptive_grad_clip(0.01), micro_batches(optax.adam(0.1), 2)),
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
        optax.chain(optax.scale_by_sign(), micro_batches(optax.adam(0.1), 4)),
        adamjax.chain(optax.scale_by_sign(), adamjax.accumulate_gradients(adam_like_optax(), 4)),
    ),
    "clip and adamw": (CLIPPED, LIKE_CLIPPED),
    "a rate that falls to 0": (
        optax.adam(LINEAR),
        adam_like_optax(adamjax.polynomial_decay(1e-3, 1000, 0.0)),
    ),
    "optax' schedule that falls to 0": (optax.adam(LINEAR), adam_like_optax(LINEAR)),
    "a rate that falls below 0 after the end": (
        optax.adam(lambda count: 1e-3 * (1 - count / 1000)),
        adam_like_optax(lambda count: 1e-3 * (1 - count / 1000)),
    ),
    "a schedule of another name": (
        INJECT(lambda lr: optax.adam(lr))(lr=LATE),
        adam_like_optax(LATE),
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
    "steps that are skipped here only": (
        optax.adam(0.1),
        adamjax.skip_not_finite(adam_like_optax()),
    ),
    "MultiSteps": (
        micro_batches(CLIPPED, 4),
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
        micro_batches(CLIPPED, 16),
        adamjax.accumulate_gradients(LIKE_CLIPPED, 16),
    ),
    "exact rows": (
        optax.adamw(0.1, weight_decay=0.1),
        adamjax.exact_rows(adamjax.adamw(0.1, eps=1e-8, weight_decay=0.1), "b"),
    ),
    "optax' optimizer as a class": (optax.MultiSteps(CLIPPED, 2), None),
    "a schedule of a part without a rule": (
        optax.multi_transform({"x": optax.adam(0.1), "y": optax.sgd(LATE)}, LABELS),
        adamjax.partition([("a", adam_like_optax())], default=adamjax.scale_by_learning_rate(LATE)),
    ),
    "micro-batches of a part without a rule": (
        optax.multi_transform(
            {"x": optax.adam(0.1), "y": micro_batches(optax.sgd(LATE), 2)}, LABELS
        ),
        adamjax.partition(
            [("a", adam_like_optax())],
            default=adamjax.accumulate_gradients(adamjax.scale_by_learning_rate(LATE), 2),
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
        optax.chain(optax.adam(FALLS), optax.scale_by_schedule(LATE)),
        adam_like_optax(lambda count: FALLS(count) * LATE(count)),
    ),
    "a schedule of steps and one of calls": (
        optax.chain(micro_batches(optax.adam(FALLS), 2), optax.scale_by_schedule(LATE)),
        adamjax.chain(
            adamjax.accumulate_gradients(adam_like_optax(FALLS), 2),
            adamjax.scale(-1.0),
            adamjax.scale_by_learning_rate(LATE),
        ),
    ),
    "names of other transforms": (
        optax.chain(INJECT(optax.adaptive_grad_clip)(0.1), optax.adam(0.1)),
        adamjax.chain(optax.adaptive_grad_clip(0.1), adam_like_optax()),
    ),
    "skips inside and outside": (
        optax.apply_if_finite(micro_batches(optax.apply_if_finite(optax.adam(0.1), 3), 2), 3),
        adamjax.skip_not_finite(
            adamjax.accumulate_gradients(adamjax.skip_not_finite(adam_like_optax()), 2)
        ),
    ),
    "two decays": (
        optax.chain(DECAY_ALONE(0.1), INJECT(optax.adamw)(0.1, weight_decay=0.1)),
        adamjax.chain(
            adamjax.add_decayed_weights(0.1), adamjax.adamw(0.1, eps=1e-8, weight_decay=0.1)
        ),
    ),
    "a schedule of calls in the middle of a step": (
        micro_batches(optax.adam(FALLS), 2),
        adamjax.chain(
            adamjax.accumulate_gradients(adamjax.scale_by_adam(eps=1e-8), 2),
            adamjax.scale_by_learning_rate(lambda count: FALLS(count // 2)),
        ),
    ),
    "a number of micro-batches in the state": (
        micro_batches(optax.adam(0.1), 2),
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


def test_many_scalars_and_micro_batches_of_float16_are_no_false_alarm():
    params = {f"s{i:03d}": jnp.ones(()) for i in range(150)}
    theirs = optax.adam(1e-3)
    convert.from_optax(steps_of(theirs, 3, params), adam_like_optax(1e-3), params, optimizer=theirs)
    params = {"b": jnp.ones((4, 3), jnp.float16)}
    theirs = micro_batches(optax.adam(0.01, eps=1e-4), 2)
    ours = adamjax.accumulate_gradients(adamjax.adam(0.01, eps=1e-4), 2)
    old = steps_of(theirs, 8, params)
    convert.from_optax(old, ours, params, optimizer=theirs)
    with jax.debug_nans(True):
        convert.from_optax(steps_of(CLIPPED, 3), LIKE_CLIPPED, TWO, optimizer=CLIPPED)


def test_a_rate_that_was_set_is_compared_with_the_optimizer():
    theirs = INJECT(optax.adam)(learning_rate=0.1)
    old = steps_of(theirs, 3)
    old.hyperparams["learning_rate"] = jnp.asarray(0.03)
    convert.from_optax(old, adam_like_optax(0.03), TWO, optimizer=theirs)
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(old, adam_like_optax(0.1), TWO, optimizer=theirs)


def test_an_optimizer_that_needs_more_arguments_cannot_be_compared():
    theirs, ours = (
        make(one, plateau(0.5))
        for make, one in ((optax.chain, optax.adam(0.1)), (adamjax.chain, adam_like_optax()))
    )
    old = steps_of(theirs, 2, value=1.0)
    with pytest.raises(TypeError, match=r"steps cannot be compared.*'value'.*pass check=False"):
        convert.from_optax(old, ours, TWO, optimizer=theirs)
    convert.from_optax(old, ours, TWO, check=False)


@pytest.mark.parametrize("name", SAME_STEPS)
def test_an_optimizer_that_takes_the_same_steps(name):
    theirs, ours = SAME_STEPS[name]
    ours = adamjax.accumulate_gradients(LIKE_CLIPPED, 2) if ours is None else ours
    state = convert.from_optax(steps_of(theirs, 5), ours, TWO, optimizer=theirs)
    if name != "exact rows":
        convert.to_optax(state, ours, TWO, theirs)


def test_injected_rates_of_parts_that_have_taken_different_numbers_of_steps():
    rule = INJECT(optax.adam)(0.1)
    parts = {"x": micro_batches(rule, 2), "y": micro_batches(rule, 3)}
    theirs = optax.multi_transform(parts, LABELS)
    ours = adamjax.partition(
        [("a", adamjax.accumulate_gradients(adam_like_optax(), 2))],
        default=adamjax.accumulate_gradients(adam_like_optax(), 3),
    )
    old = steps_of(theirs, 8)
    state = convert.from_optax(old, ours, TWO, check=False)
    back = convert.to_optax(state, ours, TWO, theirs, check=False)
    states = back.inner_states["x"].inner_state, back.inner_states["y"].inner_state
    assert [int(x.inner_opt_state.count) for x in states] == [4, 2]


def test_a_wide_leaf_beside_a_narrow_one_is_compared_closely():
    for dtype in (jnp.bfloat16, jnp.float16):
        params = {**TWO, "narrow": jnp.ones(2, dtype)}
        theirs = optax.adam(0.1, eps=1e-4)
        old = steps_of(theirs, 3, params)
        convert.from_optax(old, adamjax.adam(0.1, eps=1e-4), params, theirs)
        for ours in (adamjax.adam(0.105, eps=1e-4), adamjax.adam(0.1, eps=1e-3)):
            with pytest.raises(ValueError, match=MOVES):
                convert.from_optax(old, ours, params, theirs)


def test_a_wide_leaf_beside_a_frozen_narrow_one_is_compared_closely():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones((2, 3))}

    def theirs(rate):
        return optax.multi_transform({"x": optax.set_to_zero(), "y": optax.adam(rate)}, LABELS)

    def ours(rate):
        return adamjax.partition([("a", adamjax.set_to_zero())], default=adam_like_optax(rate))

    old = steps_of(theirs(0.01), 3, params)
    convert.from_optax(old, ours(0.01), params, theirs(0.01))
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(old, ours(0.01008), params, theirs(0.01))


OPTAX_VERSION = tuple(map(int, optax.__version__.split(".")[:3]))
TAKES_OTHER_DTYPES = pytest.mark.skipif(
    OPTAX_VERSION < (0, 2, 6), reason="MultiSteps of older releases takes no step in other dtypes"
)


@pytest.mark.parametrize(
    "steps", [1, pytest.param(2, marks=[pytest.mark.slow, TAKES_OTHER_DTYPES])]
)
def test_wide_weights_with_narrow_moments_are_compared_closely(steps):
    theirs = optax.adam(LATE, mu_dtype=jnp.bfloat16)
    later = adamjax.piecewise_constant([66], [0.1, 0.01])
    all_ours = [adam_like_optax(rate) for rate in (LATE, lambda count: 1.005 * LATE(count), later)]
    all_ours.append(adamjax.adamw(LATE, eps=1e-8, weight_decay=1e-6))
    if steps > 1:
        theirs = micro_batches(theirs, steps)
        all_ours = [adamjax.accumulate_gradients(tx, steps) for tx in all_ours]
    old = steps_of(theirs, 3)
    right, *others = all_ours
    convert.from_optax(old, right, TWO, theirs)
    for ours in others:
        with pytest.raises(ValueError, match=MOVES):
            convert.from_optax(old, ours, TWO, theirs)


def test_hyperparameters_that_optax_rounds_are_compared_less_closely():
    params = {"a": jnp.ones(3, jnp.bfloat16), "b": jnp.ones((2, 3))}
    # All updates are multiplied by a rate of the first leaf's dtype, 0.1001.
    theirs = optax.chain(optax.scale_by_adam(), RATE_ALONE(0.1))
    narrow = {**params, "b": jnp.ones((2, 3), jnp.bfloat16)}
    for one in (params, narrow):
        convert.from_optax(steps_of(theirs, 3, one), adam_like_optax(), one, theirs)
    for one in (params, narrow):
        with pytest.raises(ValueError, match=MOVES):
            convert.from_optax(steps_of(theirs, 3, one), adam_like_optax(0.2), one, theirs)


@pytest.mark.parametrize("warmup", [0, 1_000])
def test_a_linear_schedule_near_its_end_is_no_false_alarm(warmup):
    theirs = optax.linear_schedule(3e-4, 0.0, 10_000)
    ours = adamjax.polynomial_decay(3e-4, 10_000, 0.0)
    if warmup:
        rises = optax.linear_schedule(0.0, 3e-4, warmup)
        theirs, ours = optax.join_schedules([rises, theirs], [warmup]), adamjax.warmup(ours, warmup)
    theirs, ours = optax.adam(theirs), adam_like_optax(ours)
    count = 9_985 + warmup
    old = jax.tree.map(lambda x: x + count if x.dtype == jnp.int32 else x, steps_of(theirs, 3))
    convert.from_optax(old, ours, TWO, theirs)


@pytest.mark.parametrize("count", [200, pytest.param(250, marks=pytest.mark.slow)])
def test_a_momentum_after_the_end_of_a_linear_schedule_is_no_false_alarm(count):
    # The schedule of optax, compiled, ends at some 1e-7 of its first rate in place of 0.
    theirs = optax.adam(optax.linear_schedule(1e-3, 0.0, 200))
    ours = adam_like_optax(adamjax.polynomial_decay(1e-3, 200, 0.0))
    old = jax.tree.map(lambda x: x + count - 3 if x.dtype == jnp.int32 else x, steps_of(theirs, 3))
    convert.from_optax(old, ours, TWO, theirs)


def test_frozen_leaves_inside_a_clip_are_no_false_alarm():
    params = {"w": jnp.ones((2, 3)), "b": jnp.ones(3)}
    parts = {"w": optax.adam(0.1), "b": optax.set_to_zero()}
    theirs = optax.multi_transform(parts, {"w": "w", "b": "b"})
    theirs = optax.chain(optax.clip_by_global_norm(1.0), theirs)
    part = adamjax.partition([("w", adam_like_optax())], default=adamjax.set_to_zero())
    ours = adamjax.chain(adamjax.clip_by_global_norm(1.0), part)
    old = steps_of(theirs, 3, params)
    state = convert.from_optax(old, ours, params, theirs)
    assert_same(convert.to_optax(state, ours, params, theirs), old)
    others = [
        adamjax.chain(adamjax.clip_by_global_norm(1.05), part),
        adamjax.partition([("w", LIKE_CLIPPED)], default=adamjax.set_to_zero()),
    ]
    for other in others:
        with pytest.raises(ValueError, match=MOVES):
            convert.from_optax(old, other, params, theirs)


@pytest.mark.parametrize("least", [0.0, pytest.param(1e-8, marks=pytest.mark.slow)])
def test_what_a_warmup_hides_in_its_first_step_is_compared_later(least):
    rate = optax.warmup_cosine_decay_schedule(least, 0.01, 100, 1_000)
    theirs = optax.adam(rate, eps=1e-9)
    old = theirs.init(TWO)
    convert.from_optax(old, adamjax.adam(rate, eps=1e-9), TWO, theirs)
    for different in ({"b2": 0.99895, "eps": 1e-9}, {"eps": 0.95e-9}):
        with pytest.raises(ValueError, match=MOVES):
            convert.from_optax(old, adamjax.adam(rate, **different), TWO, theirs)


def test_optimizers_with_a_rate_of_0_that_is_set_later_are_compared():
    theirs = optax.inject_hyperparams(optax.adamw)(0.0, weight_decay=0.1)

    def ours(rate=0.0, weight_decay=0.1, **others):
        tx = adamjax.adamw(rate, eps=1e-8, weight_decay=weight_decay, **others)
        return adamjax.with_hyperparams(tx, learning_rate=rate)

    old = steps_of(theirs, 3)
    state = convert.from_optax(old, ours(), TWO, theirs)
    assert float(state.hyperparams["learning_rate"]) == 0
    convert.to_optax(state, ours(), TWO, theirs)
    for different in ({"weight_decay": 0.3}, {"b1": 0.91}, {"b2": 0.9989}):
        with pytest.raises(ValueError, match=r"with a rate of 0\.01 in place of 0, on, tx moves"):
            convert.from_optax(old, ours(**different), TWO, theirs)
    message = (
        "rate is 0 in a state .*nothing can be compared: build both optimizers with the same rate"
    )
    with pytest.raises(ValueError, match=message):
        convert.from_optax(old, adamjax.adamw(0.0, eps=1e-8, weight_decay=0.1), TWO, theirs)
    # Leaves that stay frozen in both are as they were.
    frozen = optax.adam(0.0)
    convert.from_optax(steps_of(frozen, 3), adam_like_optax(0.0), TWO, frozen)


def test_a_slightly_different_decay_of_the_maximum_of_adamax_shows():
    theirs, old = optax.adamax(0.01), steps_of(optax.adamax(0.01), 3)
    convert.from_optax(old, adamjax.adamax(0.01, eps=1e-8), TWO, theirs)
    for b2 in (0.99895, 0.99905):
        with pytest.raises(ValueError, match=r"00 steps without gradients, on, tx moves"):
            convert.from_optax(old, adamjax.adamax(0.01, eps=1e-8, b2=b2), TWO, theirs)


def test_micro_batches_of_a_large_leaf_are_no_false_alarm():
    params = {"w": jnp.ones(300_000)}
    theirs = optax.MultiSteps(CLIPPED, 4).gradient_transformation()
    old = steps_of(theirs, 4, params)
    convert.from_optax(old, adamjax.accumulate_gradients(LIKE_CLIPPED, 4), params, theirs)


# One of these has a weak type.
LARGE = {"table": jnp.full((9_000, 8), 1.0), "rows": jnp.ones((8_000, 9)), "b": jnp.ones(3)}


def sampled_rows(theirs, ours, params):
    """How many rows of `LARGE` take all steps that are compared; `None` if all rows do."""
    state = initial_state("test", ours, params)
    some = sampled(state, theirs, theirs.init(params))
    return None if some is None else [len(p) for p in some[0].params.values()]


def test_some_rows_of_large_leaves_are_compared():
    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.01, weight_decay=0.3))
    tables = ["table", "rows"]

    def ours(eps):
        rule = adamjax.adamw(0.01, eps=eps, weight_decay=0.3)
        return adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.exact_rows(rule, tables))

    # Leaves of different shapes keep different shapes, and their sizes stay in order.
    assert sampled_rows(theirs, ours(1e-8), LARGE) == [3, 1_822, 2_049]
    old = steps_of(theirs, 2, LARGE)
    state = convert.from_optax(old, ours(1e-8), LARGE, theirs)
    assert_same(convert.to_optax(state, ours(1e-8), LARGE, theirs), old)
    for call in (
        lambda: convert.from_optax(old, ours(1e-7), LARGE, theirs),
        lambda: convert.to_optax(state, ours(1e-7), LARGE, theirs),
    ):
        with pytest.raises(ValueError, match=MOVES):
            call()


@pytest.mark.parametrize("steps", [1, 3])
def test_one_row_of_a_large_leaf_that_only_one_optimizer_moves(steps):
    padding = optax.stateless(lambda u, p=None: {**u, "table": u["table"].at[7_777].set(0)})
    theirs, ours = optax.chain(optax.adam(0.1), padding), adam_like_optax()
    if steps > 1:
        theirs = micro_batches(theirs, steps)
        ours = adamjax.accumulate_gradients(ours, steps)
    assert sampled_rows(theirs, ours, LARGE)
    with pytest.raises(ValueError, match=r"in a step of the whole leaf 'table', tx moves"):
        convert.from_optax(theirs.init(LARGE), ours, LARGE, theirs)


@pytest.mark.parametrize("of_leaf", ["mask", "rate"])
def test_what_depends_on_the_number_of_rows_is_compared_with_all_rows(of_leaf):
    if of_leaf == "mask":
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
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(old, wrong, LARGE, theirs)


PERIOD = {"init_value": 0.0, "peak_value": 0.1, "warmup_steps": 2, "decay_steps": 6}
# Rates of 0 in the next step, and the steps that have been taken.
AT_REST = {
    "a warm-up": (optax.linear_schedule(0.0, 0.1, 9), 0),
    "a restart": (optax.sgdr_schedule([PERIOD, PERIOD]), 6),
    "a rate that is set": (None, 2),
}


@pytest.mark.parametrize("name", AT_REST)
def test_rows_that_only_one_optimizer_moves_show_although_the_rate_is_0(name):
    rate, steps = AT_REST[name]

    def without_padding(g, p=None):
        return {**g, "table": g["table"].at[8_990].set(0)}

    padding = optax.stateless(without_padding)
    for before, is_right in (([], True), ([padding], False)):
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
            convert.from_optax(steps_of(theirs, steps, LARGE), ours, LARGE, theirs)


@pytest.mark.parametrize("ours_schedule", [True, False])
def test_rows_that_both_choose_by_their_position_are_compared_whole(ours_schedule):
    """A sample could have rows of one kind only, and these might never move."""

    def old_rows_frozen(u, p=None):
        is_old = (jnp.arange(len(u["table"])) < 8_990)[:, None]
        return {**u, "table": jnp.where(is_old, 0, u["table"])}

    frozen, rate = optax.stateless(old_rows_frozen), optax.cosine_decay_schedule(0.1, 100)
    theirs = optax.chain(optax.adam(rate), frozen)
    ours = adamjax.chain(adam_like_optax(rate if ours_schedule else 0.1), frozen)
    assert sampled_rows(theirs, ours, LARGE) is None
    with nullcontext() if ours_schedule else pytest.raises(ValueError, match=MOVES):
        convert.from_optax(theirs.init(LARGE), ours, LARGE, theirs)


def injected(make):
    """A transform of optax with a rate and a decay in its state, both 0."""
    return optax.inject_hyperparams(make)(learning_rate=0.0, weight_decay=0.0)


LATER_FACTOR = optax.scale_by_schedule(lambda count: jnp.where(count < 500, 1.0, 0.1))
HIDDEN_BY_ZEROS = {
    "a mask": (
        injected(
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
    old, zeros = steps_of(theirs, 2), dict.fromkeys(names, 0.0)
    convert.from_optax(old, adamjax.with_hyperparams(make(**right), **zeros), TWO, theirs)
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(old, adamjax.with_hyperparams(make(), **zeros), TWO, theirs)


def test_rates_of_nan_in_a_state_let_nothing_be_compared():
    theirs = optax.inject_hyperparams(optax.adam)(float("nan"))
    with pytest.raises(ValueError, match=r"no update of the optimizer of optax is finite"):
        convert.from_optax(theirs.init(TWO), adam_like_optax(), TWO, theirs)


def test_a_row_without_a_gradient_after_the_first_step_is_compared():
    adam = optax.adam(0.1)

    def lazy_update(grads, state, params=None):
        updates, state = adam.update(grads, state, params)
        return jax.tree.map(lambda u, g: jnp.where(g != 0, u, 0), updates, grads), state

    theirs = optax.GradientTransformation(adam.init, lazy_update)
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(theirs.init(TWO), adam_like_optax(), TWO, theirs)


def test_weights_of_both_signs_are_tried():
    params = {"a": jnp.ones((4, 3)), "scale": jnp.asarray(0.5)}
    positive = optax.masked(optax.keep_params_nonnegative(), {"a": False, "scale": True})
    theirs = optax.chain(optax.adam(0.1), positive)
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(theirs.init(params), adam_like_optax(), params, theirs)


MANY = {**{f"layer_{i}": jnp.ones(2) for i in range(40)}, "scale": jnp.ones(())}


def frozen_scale(tx):
    labels = {name: name if name == "scale" else "layer" for name in MANY}
    return optax.multi_transform({"scale": optax.set_to_zero(), "layer": tx}, labels)


@pytest.mark.parametrize("what", ["skip", "norm"])
def test_one_of_very_many_leaves_that_decides_about_the_others(what):
    if what == "skip":
        theirs = optax.apply_if_finite(frozen_scale(optax.adam(0.1)), 9)
        wrapped = adamjax.skip_not_finite
    else:
        theirs = optax.chain(optax.clip_by_global_norm(1.0), frozen_scale(optax.adam(0.1)))

        def wrapped(tx):
            return adamjax.chain(adamjax.clip_by_global_norm(1.0), tx)

    def frozen(tx):
        return adamjax.partition([("scale", adamjax.set_to_zero())], default=tx)

    old, rule = steps_of(theirs, 3, MANY), adam_like_optax()
    convert.from_optax(old, wrapped(frozen(rule)), MANY, theirs)
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(old, frozen(wrapped(rule)), MANY, theirs)


def test_a_rate_that_is_infinite_at_a_count_in_the_past_hides_nothing():
    def rate(count):
        return 1e-3 * jnp.sqrt(1_000 / count)

    theirs = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate))
    old = jax.tree.map(lambda x: x + 10_000 if x.ndim == 0 else x, theirs.init(TWO))
    rule = adam_like_optax(rate)
    convert.from_optax(
        old, adamjax.chain(adamjax.clip_by_global_norm(1.0), rule), TWO, optimizer=theirs
    )
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(old, rule, TWO, optimizer=theirs)


@pytest.mark.parametrize("exact", [False, True])
def test_max_rows_of_an_accumulation_is_compared_without_row_gradients(exact):
    params = {"table": jnp.ones((30, 2)), "w": jnp.ones(3)}
    theirs = micro_batches(optax.adam(0.1), 4)

    def ours(rate):
        tx = adam_like_optax(rate)
        tx = adamjax.exact_rows(tx, "table") if exact else tx
        return adamjax.accumulate_gradients(tx, 4, max_rows={"table": 5})

    old = steps_of(theirs, 8, params)
    state = convert.from_optax(old, ours(0.1), params, theirs)
    assert jax.tree.structure(state) == jax.tree.structure(ours(0.1).init(params))
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(old, ours(0.11), params, theirs)


def test_a_mask_of_the_largest_leaf_is_compared():
    def is_largest(tree):
        most = max(x.size for x in jax.tree.leaves(tree))
        return jax.tree.map(lambda x: x.size == most, tree)

    params = {"a": jnp.ones((10_000, 8)), "b": jnp.ones((7_000, 8))}
    theirs = optax.adamw(0.01, weight_decay=0.3, mask=is_largest)
    for mask, is_right in (("a", True), ("b", False)):
        ours = adamjax.adamw(0.01, eps=1e-8, weight_decay=0.3, mask=mask)
        assert sampled_rows(theirs, ours, params)
        with nullcontext() if is_right else pytest.raises(ValueError, match=MOVES):
            convert.from_optax(theirs.init(params), ours, params, theirs)


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


def test_a_mask_that_depends_on_the_dtypes_of_leaves():
    params = {**TWO, "narrow": jnp.ones(2, jnp.bfloat16)}
    is_wide = functools.partial(jax.tree.map, lambda p: p.dtype == jnp.float32)
    theirs = optax.adamw(0.01, weight_decay=0.3, mask=is_wide)
    old = steps_of(theirs, 3, params)
    for mask, is_right in (("^(?!narrow)", True), (True, False)):
        ours = adamjax.adamw(0.01, eps=1e-8, weight_decay=0.3, mask=mask)
        with nullcontext() if is_right else pytest.raises(ValueError, match=MOVES):
            convert.from_optax(old, ours, params, theirs)


@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-8])
def test_an_epsilon_is_compared_closely_before_the_first_step(eps):
    theirs = optax.adam(0.1, eps=eps)
    old = theirs.init(TWO)
    convert.from_optax(old, adamjax.adam(0.1, eps=eps), TWO, theirs)
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(old, adamjax.adam(0.1, eps=1.05 * eps), TWO, theirs)


def test_a_state_is_where_the_parameters_are_committed():
    """Otherwise the second step would be compiled again."""
    device = jax.devices()[0]
    theirs, ours = optax.adam(0.1), adam_like_optax()
    for params in (TWO, jax.device_put(TWO, device)):
        is_committed = params["a"].committed
        state = convert.from_optax(steps_of(theirs, 2, params), ours, params, theirs, check=False)
        counts = [x for x in jax.tree.leaves(state) if x.shape == ()]
        assert counts
        assert all(x.committed == is_committed for x in counts)


def test_a_model_without_leaves():
    theirs, ours = optax.adam(0.1), adam_like_optax()
    assert_same(convert.from_optax(theirs.init({}), ours, {}, theirs), ours.init({}))


def test_moments_of_complex_leaves():
    params = {"a": jnp.ones(3, jnp.complex64), "b": jnp.ones(2)}
    theirs, ours = optax.adam(0.1), adam_like_optax()
    grads = {"a": jnp.array([1 + 2j, 3j, 0.5]), "b": jnp.ones(2)}
    _, old = theirs.update(grads, theirs.init(params), params)
    state = convert.from_optax(old, ours, params, theirs)
    back = convert.to_optax(state, ours, params, theirs)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(old), strict=True):
        np.testing.assert_array_equal(a, b)


def test_accumulation_inside_another_library_is_refused():
    theirs = micro_batches(optax.adam(0.1), 16)
    ours = optax.chain(adamjax.accumulate_gradients(adamjax.adam(0.7, eps=1e-8), 16))
    for call in (
        lambda: convert.from_optax(theirs.init(TWO), ours, TWO, theirs),
        lambda: convert.to_optax(ours.init(TWO), ours, TWO, theirs),
    ):
        with pytest.raises(ValueError, match=r"hides how many calls a step takes: use adamjax\.ch"):
            call()


def test_an_update_that_cannot_be_compiled_is_not_compared():
    theirs = optax.adam(lambda count: 0.1 if count < 100 else 0.01)
    ours = adam_like_optax(lambda count: 0.1 if count < 100 else 0.01)
    with pytest.raises(TypeError, match=r"cannot be compiled by jax\.jit .*jax\.numpy"):
        convert.from_optax(theirs.init(TWO), ours, TWO, theirs)


def test_arguments_in_another_order_are_refused_by_name():
    theirs, ours = optax.adam(0.1), adam_like_optax()
    old, new = theirs.init(TWO), ours.init(TWO)
    first = r"is a transform, .*expected the state .*pass the state first, then tx"
    second = r"tx is a tuple of \(\S*ScaleByAdamState, \S*\), expected a transform of adamjax"
    for message, owner, call in (
        (first, "from_optax: source_state", lambda: convert.from_optax(ours, old, TWO, theirs)),
        (first, "from_optax: source_state", lambda: convert.from_optax(theirs, ours, TWO, theirs)),
        (first, "to_optax: state", lambda: convert.to_optax(ours, new, TWO, theirs)),
        (second, "from_optax: ", lambda: convert.from_optax(old, old, TWO, theirs)),
        (second, "to_optax: ", lambda: convert.to_optax(new, new, TWO, theirs)),
    ):
        with pytest.raises(TypeError, match=f"^{owner}.*{message}") as error:
            call()
        assert "Array(" not in str(error.value)
    with pytest.raises(ValueError, match=r"to_optax: .*another structure than tx\.init\(params\)"):
        convert.to_optax(new, theirs, TWO, theirs)
    turned = {**TWO, "b": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match=r"are params those that the state belongs to"):
        convert.from_optax(old, ours, turned, theirs)


def test_a_state_in_one_vector_is_split_as_the_error_says():
    theirs, ours = optax.adam(0.1), adam_like_optax()
    flat = optax.flatten(theirs)
    old = steps_of(flat, 3)
    with pytest.raises(ValueError, match=r"in one vector of 9, as in optax\.flatten.*split it, "):
        convert.from_optax(old, ours, TWO, flat)
    with pytest.raises(ValueError, match=r"one vector for all leaves.*leave flatten out"):
        convert.to_optax(ours.init(TWO), ours, TWO, flat)
    unravel = jax.flatten_util.ravel_pytree(TWO)[1]
    old = jax.tree.map(lambda x: unravel(x) if x.ndim else x, old)
    assert_close(old, steps_of(theirs, 3), rtol=1e-6)
    convert.from_optax(old, ours, TWO, theirs)


def test_an_optimizer_that_did_not_make_the_state_is_refused():
    state, ours = optax.adam(0.1).init(TWO), adam_like_optax()
    for none in (0.1, {}):
        with pytest.raises(TypeError, match=r"optimizer is .*, expected the transform of optax"):
            convert.from_optax(state, ours, TWO, optimizer=none)
    for other in (optax.adam(FALLS), micro_batches(optax.adam(0.1), 2), optax.sgd(0.1)):
        with pytest.raises(ValueError, match=r"another structure than optimizer\.init"):
            convert.from_optax(state, ours, TWO, optimizer=other)
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    opt, params = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param), nnx.state(model, nnx.Param)
    with pytest.raises(TypeError, match=r"of an nnx\.Optimizer its tx"):
        convert.from_optax(opt.opt_state, ours, params, optimizer=opt)
    with pytest.raises(ValueError, match=r"of flax\.nnx, pass nnx\.as_pure"):
        convert.from_optax(nnx.state(opt), ours, params, optimizer=opt.tx)
    as_pure = getattr(nnx, "as_pure", None) or nnx.pure
    convert.from_optax(as_pure(opt.opt_state), ours, as_pure(params), optimizer=opt.tx)


# --- torch ----------------------------------------------------------------------------------------


def torch_of(arrays, names=None, **options):
    """The state dict of an Adam whose moments are these arrays."""
    group = {"params": list(range(len(arrays))), "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8}
    group |= {"weight_decay": 0, "amsgrad": False, **options}
    slots = ("exp_avg", "exp_avg_sq")
    return {
        "state": {i: {"step": 3, **dict.fromkeys(slots, x)} for i, x in enumerate(arrays)},
        "param_groups": [group if names is None else {**group, "param_names": names}],
    }


def test_a_function_that_reshapes_hides_the_order():
    params = {"query": jnp.zeros((2, 2)), "scale": jnp.zeros(4)}
    old, tx = torch_of([np.ones(4, "f"), np.full(4, 2.0, "f")]), adam_like_optax()

    def adapt(path, x):
        return x.reshape(params[path].shape)

    with pytest.raises(ValueError, match=r"\['query', 'scale'\] have one size.*give order="):
        convert.from_torch(old, tx, params, adapt=adapt)
    state = convert.from_torch(old, tx, params, order=["query", "scale"], adapt=adapt)
    assert adamjax.get_slot(state, "m")["query"].shape == (2, 2)
    with pytest.raises(ValueError, match=r"adapt raises an error for exp_avg of 'query', .*order"):
        convert.from_torch(
            torch_of([np.ones(3, "f"), np.ones(4, "f")]),
            tx,
            params,
            order=list(params),
            adapt=adapt,
        )


def test_names_of_torch_that_are_not_weight_do_not_say_what_is_transposed():
    old, params = torch_of([np.eye(2, dtype="f")], ["lin.W"]), {"lin": {"kernel": jnp.eye(2)}}
    with pytest.raises(ValueError, match=r"transposes of kernels.*adapt="):
        convert.from_torch(old, adam_like_optax(), params, order=["lin/kernel"])


@pytest.mark.parametrize("system", ["torch", "keras"])
@pytest.mark.parametrize("place", ["before", "after"])
def test_transforms_of_other_libraries_beside_the_rule_are_refused(system, place, keras):
    rule = adamjax.scale_by_adam(eps=1e-8) if system == "torch" else KERAS_RULE
    decay, rate = optax.add_decayed_weights(0.5), adamjax.scale_by_learning_rate(0.1)
    parts = (decay, rule, rate) if place == "before" else (rule, decay, rate)
    tx = adamjax.chain(*parts)
    calls = {
        "torch": lambda: convert.from_torch(torch_of([np.ones(3, "f")]), tx, jnp.zeros(3)),
        "keras": lambda: convert.from_keras(keras_adam(keras), tx, KERAS_PARAMS),
    }
    with pytest.raises(ValueError, match=r"of another library, which nothing can compare"):
        calls[system]()


class Halves(Transform):
    """A user's own."""

    def init(self, params):
        return ()

    def update(self, updates, state, params=None, **extra_args):
        return jax.tree.map(lambda u: 0.5 * u, updates), state


class HalvesOf(Transform):
    """One around others."""

    tx: Any

    def init(self, params):
        return self.tx.init(params)

    def update(self, updates, state, params=None, **extra_args):
        updates, state = self.tx.update(updates, state, params, **extra_args)
        return jax.tree.map(lambda u: 0.5 * u, updates), state


NO_LEAF = adamjax.masked(adamjax.scale(1.0), adamjax.optional("^z"))


def test_transforms_of_the_users_own_beside_a_rule_are_refused():
    message = r"Halves.* of your own, which nothing can compare"
    for make in (
        lambda adam: adamjax.chain(adam, Halves()),
        HalvesOf,
        lambda adam: adamjax.chain(adam, HalvesOf(adamjax.scale(1.0))),
        lambda adam: adamjax.chain(adam, HalvesOf(NO_LEAF)),
    ):
        with pytest.raises(ValueError, match=message):
            convert.from_torch(torch_of([np.ones(3, "f")]), make(adam_like_optax()), jnp.zeros(3))
        with pytest.raises(ValueError, match=message):
            convert.from_keras(NAMED, make(adamjax.adam(0.1)), {"w": jnp.zeros(2)})
    # Variables of Keras do not contain what it does to gradients.
    tx = adamjax.chain(HalvesOf(adamjax.scale(1.0)), adamjax.adam(0.1))
    convert.from_keras(NAMED, tx, {"w": jnp.zeros(2)})


def test_torch_clips_before_its_weight_decay():
    decay, clip = adamjax.add_decayed_weights(0.3), adamjax.clip_by_global_norm(0.5)
    old = torch_of([np.ones(3, "f")], weight_decay=0.3)
    convert.from_torch(old, adamjax.chain(clip, decay, adam_like_optax()), jnp.zeros(3))
    with pytest.raises(ValueError, match=r"after its weight decay: put the clip before"):
        convert.from_torch(old, adamjax.chain(decay, clip, adam_like_optax()), jnp.zeros(3))


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_steps_in_narrow_dtypes_are_compared_closely(dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), TWO)
    theirs, ours = optax.adam(0.1), adam_like_optax()
    old = steps_of(theirs, 3, params)
    convert.from_optax(old, ours, params, optimizer=theirs)
    # Steps are compared in float32.
    with pytest.raises(ValueError, match=MOVES):
        convert.from_optax(old, adam_like_optax(0.102), params, optimizer=theirs)


def test_an_average_that_sets_weights_is_not_added_in_a_conversion():
    tx = adamjax.chain(adam_like_optax(), adamjax.weight_ema(0.5, overwrite_frequency=2))
    with pytest.raises(ValueError, match="sets the weights to their average"):
        convert.from_torch(torch_of([np.ones(3, "f")]), tx, jnp.zeros(3), average=jnp.zeros(3))


NAMED = [
    ("adam/iteration", np.array(7)),
    ("adam/learning_rate", np.array(0.1)),
    ("adam/w_momentum", np.full(2, 0.5)),
    ("adam/w_velocity", np.ones(2)),
]


@pytest.mark.parametrize("system", ["torch", "keras"])
def test_a_rate_before_the_rule_is_a_negation_and_no_gradient_is_zero(system):
    adam = adam_like_optax() if system == "torch" else adamjax.adam(0.1)
    before = adamjax.chain(adamjax.scale_by_learning_rate(1.0), adam)
    convert_to = {
        "torch": lambda tx: convert.from_torch(torch_of([np.ones(3, "f")]), tx, jnp.zeros(3)),
        "keras": lambda tx: convert.from_keras(NAMED, tx, {"w": jnp.zeros(2)}),
    }[system]
    with pytest.raises(ValueError, match=r"has gradients as they are, tx has .*before the rule"):
        convert_to(before)
    for zero in (adamjax.set_to_zero(), adamjax.scale(0.0)):
        with pytest.raises(ValueError, match=r"as they are, tx has s.* before the rule: leave it"):
            convert_to(adamjax.chain(zero, adam))
    if system == "torch":
        old = torch_of([np.ones(3, "f")], maximize=True)
        convert.from_torch(old, before, jnp.zeros(3))


@pytest.mark.parametrize("system", ["torch", "keras"])
def test_a_rate_of_some_leaves_or_none_is_refused(system):
    params = {"w": jnp.zeros(2), "z": jnp.zeros(3)}
    arrays = [np.ones(2, "f"), np.ones(3, "f")]
    rule = adamjax.scale_by_adam(eps=1e-8) if system == "torch" else adamjax.scale_by_adam()
    rate = adamjax.scale_by_learning_rate(0.1)
    variables = [
        *NAMED,
        ("adam/z_momentum", np.full(3, 0.5)),
        ("adam/z_velocity", np.ones(3)),
    ]
    call = {
        "torch": lambda tx: convert.from_torch(torch_of(arrays), tx, params),
        "keras": lambda tx: convert.from_keras(variables, tx, params),
    }[system]
    call(adamjax.chain(rule, rate))
    with pytest.raises(
        ValueError, match=r"'w': .*, tx has none for any: put scale_by_learning_rat"
    ):
        call(rule)
    for tx in (
        adamjax.partition([("w", adamjax.chain(rule, rate))], default=rule),
        adamjax.chain(rule, adamjax.masked(rate, "w")),
    ):
        with pytest.raises(
            ValueError, match=r"'z': .* a learning rate for all leaves, tx has none"
        ):
            call(tx)


def test_a_factor_is_outside_of_the_accumulation_amid_a_step(keras):
    """Keras multiplies micro-batches before it adds them up."""
    options = {"loss_scale_factor": 4.0, "gradient_accumulation_steps": 3}
    factor, rate = adamjax.scale(0.25), adamjax.scale_by_learning_rate(0.1)
    inside = adamjax.chain(adamjax.accumulate_gradients(adamjax.chain(factor, KERAS_RULE), 3), rate)
    outside = adamjax.chain(factor, adamjax.accumulate_gradients(KERAS_RULE, 3), rate)
    for calls in (3, 4):
        optimizer = keras_adam(keras, calls, **options)
        for total in optimizer._accumulated_gradients:
            total.assign(np.full(3, calls - 3.0))
        convert.from_keras(optimizer, outside, KERAS_PARAMS)
        if calls == 3:
            convert.from_keras(optimizer, inside, KERAS_PARAMS)
        else:
            with pytest.raises(ValueError, match=r"inside of accumulate_gradients: put it outside"):
                convert.from_keras(optimizer, inside, KERAS_PARAMS)


def test_names_of_keras_may_be_bytes():
    """As in the attributes of a `.h5` file."""
    tx, params = adamjax.adam(0.1), {"w": jnp.zeros(2)}
    expected = convert.from_keras(NAMED, tx, params)
    for variables in (
        [(name.encode(), x) for name, x in NAMED],
        [[name, x] for name, x in NAMED],
        {name.encode(): x for name, x in NAMED},
    ):
        assert_same(convert.from_keras(variables, tx, params), expected)


@pytest.mark.parametrize("what", ["decay", "schedule"])
def test_a_decay_and_a_schedule_of_torch_are_in_the_steps_of_its_rule(what):
    """The loop of torch takes a step for several micro-batches, and decays once for them."""
    rule, params = adamjax.scale_by_adam(eps=1e-8), jnp.zeros(3)
    one, rest, options, message = {
        "decay": (
            adamjax.add_decayed_weights(0.3),
            [adamjax.scale_by_learning_rate(adamjax.constant(0.1))],
            {"weight_decay": 0.3, "decoupled_weight_decay": True},
            r"a weight decay in its steps, tx has one in each call.*put it inside accumulate_grad",
        ),
        "schedule": (
            adamjax.scale_by_learning_rate(adamjax.piecewise_constant([90], [0.1, 0.05])),
            [],
            {"initial_lr": 0.1},
            r"changes with its steps, tx has one that counts calls.*put it inside accumulate_grad",
        ),
    }[what]
    inside = adamjax.accumulate_gradients(adamjax.chain(rule, one), 4)
    outside = adamjax.chain(adamjax.accumulate_gradients(rule, 4), one)
    between = adamjax.accumulate_gradients(outside, 2)
    old = torch_of([np.ones(3, "f")], **options)
    convert.from_torch(old, adamjax.chain(inside, *rest), params)
    for tx in (adamjax.chain(outside, *rest), adamjax.chain(between, *rest)):
        for call in (
            lambda tx=tx: convert.from_torch(old, tx, params),
            lambda tx=tx: convert.to_torch(tx.init(params), tx, params, old),
        ):
            with pytest.raises(ValueError, match=message):
                call()
    # One object may be inside of one part, and outside of another.
    params, old = {"a": params, "b": params}, torch_of([np.ones(3, "f")] * 2, **options)
    tx = adamjax.chain(adamjax.partition([("a", inside)], default=outside), *rest)
    with pytest.raises(ValueError, match=f"'b': .*{message}"):
        convert.from_torch(old, tx, params, order=["a", "b"])


def test_sparse_adam_of_torch_has_no_decay():
    leaf_state = {"step": 3, "exp_avg": np.ones((3, 2), "f"), "exp_avg_sq": np.ones((3, 2), "f")}
    group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "maximize": False}
    old, params = {"state": {0: leaf_state}, "param_groups": [group]}, jnp.zeros((3, 2))
    convert.from_torch(old, adamjax.adam(0.1, eps_hat=1e-8, rows="lazy"), params)
    with pytest.raises(ValueError, match=r"a weight decay of 0, tx has .*0.004 after it"):
        convert.from_torch(old, adamjax.adamw(0.1, eps_hat=1e-8, rows="lazy"), params)


@pytest.mark.parametrize("system", ["torch", "keras"])
def test_leaves_that_the_other_optimizer_does_not_have_stay_as_they_are(system):
    params = {"base": jnp.ones(2), "w": jnp.zeros(2)}
    rule = adamjax.scale_by_adam(**({"eps": 1e-8} if system == "torch" else {"eps_hat": 1e-7}))
    rate, zero = adamjax.scale_by_learning_rate(0.1), adamjax.set_to_zero()
    frozen = adamjax.partition([("base", zero)], default=rule)
    torch_state_dict = torch_of([np.ones(2, "f")], weight_decay=0.3, decoupled_weight_decay=True)
    variables = [("adamw" + name[4:], x) for name, x in NAMED]

    def convert_to(tx):
        if system == "torch":
            return convert.from_torch(torch_state_dict, tx, params, order=["w"])
        return convert.from_keras(variables, tx, params, order=["w"])

    decay = adamjax.add_decayed_weights(0.3)
    whole = adamjax.chain(rule, decay, rate)
    convert_to(adamjax.partition([("base", zero)], default=whole))
    convert_to(adamjax.chain(frozen, adamjax.add_decayed_weights(0.3, "w"), rate))
    convert_to(adamjax.masked(whole, "w"))
    for tx in (
        adamjax.chain(frozen, decay, rate),
        adamjax.chain(adamjax.masked(rule, "w"), adamjax.add_decayed_weights(0.3, "w"), rate),
    ):
        with pytest.raises(
            ValueError, match=r"'base': .* an optimizer without this leaf.*which moves"
        ):
            convert_to(tx)


def test_a_variable_of_keras_that_was_frozen_stays_as_it_is(keras):
    zero, params = adamjax.set_to_zero(), KERAS_PARAMS
    variables = [keras.Variable(np.ones(3, np.float32), name=name) for name in params]
    optimizer = keras_adam(keras, 3, "AdamW", variables, weight_decay=0.3)
    adamw = adamjax.adamw(0.1, weight_decay=0.3)
    convert.from_keras(optimizer, adamw, params)
    variables[1].trainable = False
    for tx in (
        adamw,
        KERAS_RULE,
        adamjax.chain(
            KERAS_RULE,
            adamjax.masked(zero, "v1"),
            adamjax.add_decayed_weights(0.3),
            adamjax.scale_by_learning_rate(0.1),
        ),
    ):
        tx = tx if tx is adamw else adamjax.partition([("v1", tx)], default=adamw)
        for call in (
            lambda tx=tx: convert.from_keras(optimizer, tx, params),
            lambda tx=tx: convert.to_keras(tx.init(params), tx, params, optimizer),
        ):
            message = r"'v1': Keras has a variable with trainable=False, tx has .*give None for it"
            with pytest.raises(ValueError, match=message):
                call()
    still = adamjax.chain(adamw, adamjax.masked(zero, "v1"))
    state = convert.from_keras(optimizer, still, params)
    convert.to_keras(state, still, params, optimizer)
    rest = adamjax.partition([("v1", zero)], default=adamw)
    state = convert.from_keras(optimizer, rest, params, order=["v0", None])
    convert.to_keras(state, rest, params, optimizer, order=["v0", None])


def test_a_norm_of_keras_is_that_of_the_leaves_that_its_optimizer_has(keras):
    variables = [keras.Variable(np.ones(3, np.float32), name="v1")]
    optimizer = keras.optimizers.Adam(0.1, global_clipnorm=0.5)
    optimizer.build(variables)
    clip, adam = adamjax.clip_by_global_norm(0.5), adamjax.adam(0.1, eps_hat=1e-7)
    rest = adamjax.partition([("v0", adamjax.set_to_zero())], default=adam)
    right = adamjax.chain(adamjax.masked(clip, "v1"), rest)
    convert.from_keras(optimizer, right, KERAS_PARAMS, order=["v1"])
    with pytest.raises(ValueError, match=r"of other leaves: clip the leaves that its optimizer"):
        convert.from_keras(optimizer, adamjax.chain(clip, rest), KERAS_PARAMS, order=["v1"])


def test_a_decay_of_keras_follows_the_schedule_of_the_rate(keras):
    schedule = keras.optimizers.schedules.PiecewiseConstantDecay([8], [0.1, 0.02])
    optimizer = keras.optimizers.AdamW(schedule, weight_decay=0.3)
    optimizer.build([keras.Variable(np.ones(3, np.float32), name=name) for name in KERAS_PARAMS])
    decay, rate = adamjax.add_decayed_weights(0.3), adamjax.scale_by_learning_rate
    steps = adamjax.piecewise_constant([8], [0.1, 0.02])
    convert.from_keras(optimizer, adamjax.chain(KERAS_RULE, decay, rate(steps)), KERAS_PARAMS)
    factors = adamjax.piecewise_constant([8], [1.0, 0.2])
    tx = adamjax.chain(KERAS_RULE, adamjax.scale(-1.0), rate(factors), decay, rate(0.1))
    with pytest.raises(
        ValueError, match=r"in each step, 0.3, tx has .*with a schedule of the rate between"
    ):
        convert.from_keras(optimizer, tx, KERAS_PARAMS)


def test_a_decay_of_tx_that_follows_a_schedule_is_refused(keras):
    ends, rate = adamjax.piecewise_constant([20], [0.3, 0.0]), adamjax.scale_by_learning_rate(0.1)
    message = r"the same weight decay in each step, 0.3, tx has .*put add_decayed_weights\(0.3\)"

    def chain(rule, decay):
        return adamjax.chain(rule, adamjax.add_decayed_weights(decay), rate)

    optimizer = keras_adam(keras, cls="AdamW", weight_decay=0.3)
    options = {"weight_decay": 0.3, "decoupled_weight_decay": True}
    for read, old, rule, params in (
        (convert.from_keras, optimizer, KERAS_RULE, KERAS_PARAMS),
        (
            convert.from_torch,
            torch_of([np.ones(3, "f")], **options),
            adamjax.scale_by_adam(eps=1e-8),
            jnp.zeros(3),
        ),
    ):
        read(old, chain(rule, adamjax.constant(0.3)), params)
        with pytest.raises(ValueError, match=message):
            read(old, chain(rule, ends), params)
    old = torch_of([np.ones(3, "f")], weight_decay=0.3)
    tx = adamjax.chain(adamjax.add_decayed_weights(ends), adam_like_optax())
    with pytest.raises(ValueError, match=message):
        convert.from_torch(old, tx, jnp.zeros(3))


def test_a_leaf_that_keras_does_not_have_need_not_accumulate(keras):
    optimizer = keras.optimizers.Adam(0.1, gradient_accumulation_steps=2)
    optimizer.build([keras.Variable(np.ones(3, np.float32), name="v1")])
    inside = adamjax.chain(
        adamjax.accumulate_gradients(KERAS_RULE, 2), adamjax.scale_by_learning_rate(0.1)
    )
    tx = adamjax.partition([("v0", adamjax.set_to_zero())], default=inside)
    convert.from_keras(optimizer, tx, KERAS_PARAMS, order=["v1"])
