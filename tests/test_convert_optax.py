"""Conversions from optax and to it: runs continue, and states that do not fit are refused."""

import inspect
import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conversions import (
    HALVING,
    LABELS,
    OPTAX_ADAM,
    OPTAX_AND_ADAMJAX,
    PARAMS,
    RATE,
    STEPS_AFTER,
    STEPS_BEFORE,
    TWO_LEAVES,
    adam_like_optax,
    falling_rate,
    gradient,
    multi_steps,
    new_noises,
    new_params,
    optax_and_adamjax,
    optax_state,
    part_labels,
    reduce_on_plateau,
    run_adamjax,
    run_dense,
    run_exact_rows,
    run_optax,
    state_after,
)
from support import assert_close, assert_same

import adamjax
from adamjax import convert

# --- runs that change their optimizer -------------------------------------------------------------


@pytest.mark.parametrize("name", OPTAX_AND_ADAMJAX)
@pytest.mark.slow
def test_a_run_continues_from_optax(name, x64):
    theirs, ours = optax_and_adamjax(name)
    params, noises = new_params(), new_noises()
    (*_, middle), state = run_optax(theirs, params, theirs.init(params), noises[:STEPS_BEFORE])
    expected, _ = run_optax(theirs, middle, state, noises[STEPS_BEFORE:])
    converted = convert.from_optax(state, ours, middle, theirs)
    assert jax.tree.structure(converted) == jax.tree.structure(ours.init(params))
    actual, _ = run_adamjax(ours, middle, converted, noises[STEPS_BEFORE:])
    assert_close(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("name", OPTAX_AND_ADAMJAX)
def test_a_run_continues_in_optax(name, x64):
    theirs, ours = optax_and_adamjax(name)
    params, noises = new_params(), new_noises()
    (*_, middle), state = run_adamjax(ours, params, ours.init(params), noises[:STEPS_BEFORE])
    expected, _ = run_adamjax(ours, middle, state, noises[STEPS_BEFORE:])
    converted = convert.to_optax(state, ours, middle, theirs)
    actual, _ = run_optax(theirs, middle, converted, noises[STEPS_BEFORE:])
    assert_close(actual, expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["adam", "multi_transform", "MultiSteps", "inject_hyperparams"])
def test_a_state_converted_there_and_back_is_the_same(name, x64):
    theirs, ours = optax_and_adamjax(name)
    params = new_params()
    _, state = run_optax(theirs, params, theirs.init(params), new_noises()[:STEPS_BEFORE])
    converted = convert.from_optax(state, ours, params, theirs)
    back = convert.to_optax(converted, ours, params, theirs)
    if name == "inject_hyperparams":  # whose state also has the rates of the last step
        state, back = state.inner_state, back.inner_state
    assert_close(back, state, rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_with_narrow_parameters_and_float32_moments_continues(dtype):
    """The gradients are float32, because optax would square narrow ones in their dtype."""
    theirs, ours = (
        optax.adamw(RATE, weight_decay=0.1),
        adamjax.adamw(RATE, eps=1e-8, weight_decay=0.1),
    )
    noises = new_noises(dtype=np.float32)
    wide = new_params(np.float32)
    params = jax.tree.map(lambda p: p.astype(dtype), wide)

    def run(tx, apply, params, state, noises):
        @jax.jit
        def step(params, state, n):
            updates, state = tx.update(n, state, wide)
            return apply(params, updates), state

        trajectory = []
        for n in noises:
            params, state = step(params, state, n)
            trajectory.append(params)
        return trajectory, state

    (*_, middle), state = run(theirs, optax.apply_updates, params, theirs.init(wide), noises[:10])
    expected, _ = run(theirs, optax.apply_updates, middle, state, noises[10:])
    converted = convert.from_optax(state, ours, wide, theirs)
    assert {x.dtype.name for x in jax.tree.leaves(adamjax.get_slot(converted, "v"))} == {"float32"}
    actual, _ = run(ours, adamjax.apply_updates, middle, converted, noises[10:])
    # optax' 1 - b2**t is off by 6e-8 / (1 - b2**t), 5e-6 at t = 11. The root halves this, so that
    # 20 steps of 1/16 are off by 3e-6. bfloat16 may round such a sum to its neighbour.
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


FOR_EXACT_ROWS = {
    "adamw, schedule": (
        optax.adamw(falling_rate, weight_decay=0.1),
        adamjax.adamw(falling_rate, eps=1e-8, weight_decay=0.1),
    ),
    "adamax": (optax.adamax(RATE, eps=1e-30), adamjax.adamax(RATE, eps=1e-30)),
    "multi_transform": (
        optax.multi_transform({"rows": optax.adam(RATE), "rest": optax.adam(0.03)}, part_labels),
        adamjax.partition(
            [("^embed", adamjax.adam(RATE, eps=1e-8))], default=adamjax.adam(0.03, eps=1e-8)
        ),
    ),
}


@pytest.mark.parametrize("name", FOR_EXACT_ROWS)
@pytest.mark.slow
def test_a_run_continues_in_exact_rows_and_back(name, x64):
    theirs, dense = FOR_EXACT_ROWS[name]
    ours = adamjax.exact_rows(dense, "^embed", history=2048)
    params, noises = new_params(), new_noises()
    (*_, middle), state = run_optax(theirs, params, theirs.init(params), noises[:STEPS_BEFORE])
    expected, expected_state = run_dense(theirs, middle, state, noises[STEPS_BEFORE:])
    converted = convert.from_optax(state, ours, middle, theirs)
    assert int(converted.clock) == STEPS_BEFORE
    actual, ours_state = run_exact_rows(ours, middle, converted, noises[STEPS_BEFORE:])
    # The accuracy of rows that have caught up.
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


def test_rows_accumulated_amid_a_step_go_to_optax():
    params = {"table": jnp.ones((20, 3)), "w": jnp.ones(4)}
    theirs = multi_steps(optax.adam(0.1), 4)
    tx = adamjax.accumulate_gradients(adam_like_optax(), 4, max_rows={"table": 10})
    state, old = tx.init(params), theirs.init(params)
    for i in range(2):
        rows = adamjax.row_gradient(jnp.array([1, 3 + i]), jnp.ones((2, 3)), 20)
        _, state = tx.update({"table": rows, "w": jnp.ones(4)}, state, params)
        _, old = theirs.update({"table": rows.to_dense(), "w": jnp.ones(4)}, old, params)
    assert_close(convert.to_optax(state, tx, params, theirs), old)


def test_parts_with_injected_rates_have_their_own_counts():
    rule = optax.inject_hyperparams(optax.adam)(0.1)
    parts = {"x": multi_steps(rule, 2), "y": multi_steps(rule, 3)}
    theirs = optax.multi_transform(parts, LABELS)
    ours = adamjax.partition(
        [("a", adamjax.accumulate_gradients(adam_like_optax(), 2))],
        default=adamjax.accumulate_gradients(adam_like_optax(), 3),
    )
    old = state_after(theirs, 8)
    state = convert.from_optax(old, ours, TWO_LEAVES, check=False)
    back = convert.to_optax(state, ours, TWO_LEAVES, theirs, check=False)
    states = back.inner_states["x"].inner_state, back.inner_states["y"].inner_state
    assert [int(x.inner_opt_state.count) for x in states] == [4, 2]


def test_from_optax_takes_the_average_that_optax_lacks(x64):
    theirs = optax.adam(RATE)
    ours = adamjax.chain(adamjax.adam(RATE, eps=1e-8), adamjax.weight_ema(0.9))
    params = new_params()
    _, state = run_optax(theirs, params, theirs.init(params), new_noises()[:3])
    with pytest.raises(ValueError, match=r"no average: pass average="):
        convert.from_optax(state, ours, params, theirs)
    average = jax.tree.map(lambda p: p + 1, params)
    converted = convert.from_optax(state, ours, params, theirs, average=average)
    assert_same(adamjax.averaged_weights(converted), average)
    assert [int(c) for c in (converted[0].count, converted[-1].count)] == [3, 3]


# --- rules that optax defines differently ---------------------------------------------------------


@pytest.mark.parametrize(
    ("theirs", "ours", "count"),
    [
        (optax.amsgrad(RATE), adamjax.amsgrad(RATE, eps=1e-8), 200_000),
        (optax.nadam(RATE), adamjax.nadam(RATE, eps=1e-8), 2_000),
    ],
    ids=["amsgrad", "nadam"],
)
def test_amsgrad_and_nadam_of_optax_are_like_ours_after_many_steps(theirs, ours, count, x64):
    """The state of a long run is made from that of a short run: only its count is changed."""
    params, noises = new_params(), new_noises()
    (*_, middle), state = run_optax(theirs, params, theirs.init(params), noises[:STEPS_BEFORE])
    early = state
    state = (state[0]._replace(count=jnp.asarray(count, jnp.int32)), *state[1:])
    expected, _ = run_optax(theirs, middle, state, noises[STEPS_BEFORE:])
    converted = convert.from_optax(state, ours, middle, theirs)
    actual, after = run_adamjax(ours, middle, converted, noises[STEPS_BEFORE:])
    assert_close(actual, expected, rtol=1e-12)
    back = convert.to_optax(after, ours, actual[-1], theirs)
    expected, _ = run_adamjax(ours, actual[-1], after, noises[:STEPS_AFTER])
    actual, _ = run_optax(theirs, actual[-1], back, noises[:STEPS_AFTER])
    assert_close(actual, expected, rtol=1e-12)
    with pytest.raises(ValueError, match=r"is not that of adamjax.*'embed/table', after 10 steps"):
        convert.from_optax(early, ours, middle, theirs)
    _, early = run_adamjax(ours, params, ours.init(params), noises[:2])
    with pytest.raises(ValueError, match=r"is not that of adamjax.*'embed/table', after 2 steps"):
        convert.to_optax(early, ours, middle, theirs)


def test_the_rtol_that_an_error_gives_bounds_the_difference_of_amsgrad(x64):
    """The next steps differ by at most this rtol, and by at least a tenth of it."""
    theirs, ours = optax.amsgrad(RATE), adamjax.amsgrad(RATE, eps=1e-8)
    params, noises = new_params(), new_noises()
    (*_, middle), state = run_optax(theirs, params, theirs.init(params), noises[:STEPS_BEFORE])
    state = (state[0]._replace(count=jnp.asarray(8_000, jnp.int32)), *state[1:])
    with pytest.raises(ValueError, match="rtol=") as caught:
        convert.from_optax(state, ours, middle, theirs)
    rtol = float(re.search(r"rtol=(\S+)", str(caught.value))[1])
    assert 1e-4 < rtol < 2e-4
    converted = convert.from_optax(state, ours, middle, theirs, rtol=rtol)
    expected, _ = run_optax(theirs, middle, state, noises[STEPS_BEFORE:][:1])
    actual, _ = run_adamjax(ours, middle, converted, noises[STEPS_BEFORE:][:1])
    for a, b, p in zip(*map(jax.tree.leaves, (actual, expected, middle)), strict=True):
        apart = np.max(np.abs(a - b) / np.abs(b - p))
        assert 0.1 * rtol < apart <= rtol


def test_an_epsilon_inside_the_maximum_of_adamax_is_refused_if_it_matters():
    theirs, ours = optax.adamax(RATE), adamjax.adamax(RATE, eps=1e-8)
    params, noises = new_params(np.float32), new_noises(dtype=np.float32)
    (*_, middle), state = run_optax(theirs, params, theirs.init(params), noises[:STEPS_BEFORE])
    expected, _ = run_optax(theirs, middle, state, noises[STEPS_BEFORE:])
    converted = convert.from_optax(state, ours, middle, theirs, rtol=1e-6)
    actual, _ = run_adamjax(ours, middle, converted, noises[STEPS_BEFORE:])
    # optax' 1 - b1**t is off by 1.2e-7 / (1 - b1**t), here at most 2e-7 of the steps.
    assert_close(actual, expected, rtol=2e-6)
    tiny = {
        name: jax.tree.map(lambda x: x * 1e-5, getattr(state[0], name)) for name in ("mu", "nu")
    }
    small = (state[0]._replace(**tiny), *state[1:])
    with pytest.raises(ValueError, match=r"adamax is not that of adamjax: it adds epsilon inside"):
        convert.from_optax(small, ours, middle, theirs)


def test_the_epsilon_inside_a_maximum_is_subtracted_and_added_back(x64):
    theirs, ours = optax.adamax(RATE, eps=0.5), adamjax.adamax(RATE, eps=0.5)
    params, n = new_params(), new_noises()[0]
    (after,), state = run_optax(theirs, params, theirs.init(params), [n])
    converted = convert.from_optax(state, ours, after, theirs, rtol=1e3)
    sizes = jax.tree.map(lambda p, n: jnp.abs(gradient(p, n)), params, n)
    assert_close(adamjax.get_slot(converted, "u"), sizes, rtol=1e-15)
    back = convert.to_optax(converted, ours, after, theirs, rtol=1e3)
    assert_close(back, state, rtol=1e-15)
    with pytest.raises(ValueError, match=r"after 1 steps, the next step may differ by .*% between"):
        convert.to_optax(converted, ours, after, theirs)


def test_the_epsilon_error_names_the_other_defaults_of_optax():
    params = {"w": jnp.ones(2)}
    old = optax.adamw(0.1)
    with pytest.raises(ValueError, match=r"b1=0.9, b2=0.999, and weight_decay=1e-4 .*0.004"):
        convert.from_optax(old.init(params), adamjax.adamw(0.1), params, old)


# --- leaves and arrays ----------------------------------------------------------------------------


def test_a_model_without_leaves_is_converted():
    theirs, ours = optax.adam(0.1), adam_like_optax()
    assert_same(convert.from_optax(theirs.init({}), ours, {}, theirs), ours.init({}))


def test_moments_of_complex_leaves_are_converted():
    params = {"a": jnp.ones(3, jnp.complex64), "b": jnp.ones(2)}
    theirs, ours = optax.adam(0.1), adam_like_optax()
    grads = {"a": jnp.array([1 + 2j, 3j, 0.5]), "b": jnp.ones(2)}
    _, old = theirs.update(grads, theirs.init(params), params)
    state = convert.from_optax(old, ours, params, theirs)
    back = convert.to_optax(state, ours, params, theirs)
    for a, b in zip(jax.tree.leaves(back), jax.tree.leaves(old), strict=True):
        np.testing.assert_array_equal(a, b)


def test_adamax_of_complex_leaves_is_converted():
    params = {"z": jnp.array([1 + 2j, 3 - 1j])}
    theirs, ours = optax.adamax(0.01), adamjax.adamax(0.01, eps=1e-8)
    old = state_after(theirs, 20, params)
    assert jnp.iscomplexobj(old[0].nu["z"])
    state = convert.from_optax(old, ours, params, optimizer=theirs, rtol=1e-4)
    assert_close(adamjax.get_slot(state, "u")["z"], jnp.abs(params["z"]), rtol=1e-3)


def test_a_converted_state_is_committed_like_the_parameters():
    """Otherwise the second step would be compiled again."""
    device = jax.devices()[0]
    theirs, ours = optax.adam(0.1), adam_like_optax()
    for params in (TWO_LEAVES, jax.device_put(TWO_LEAVES, device)):
        is_committed = params["a"].committed
        state = convert.from_optax(
            state_after(theirs, 2, params), ours, params, theirs, check=False
        )
        counts = [x for x in jax.tree.leaves(state) if x.shape == ()]
        assert counts
        assert all(x.committed == is_committed for x in counts)


def test_a_state_that_is_traced_is_refused():
    tx, params = adamjax.adam(RATE, eps=1e-8), jax.tree.map(jnp.asarray, PARAMS)
    with pytest.raises(ValueError, match=r"the count of 'a' is being traced.* outside of jit"):
        jax.jit(lambda s: convert.from_optax(s, tx, params, OPTAX_ADAM))(optax_state())


# --- moments and counts ---------------------------------------------------------------------------


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
def test_moments_that_no_gradients_lead_to_are_refused(change, message):
    params, old = {"w": jnp.ones(3)}, optax.adam(0.1)
    g = {"w": jnp.array([300.0, -2.0, 0.01])}
    _, state = old.update(g, old.init(params), params)
    tx = adamjax.adam(0.1, eps=1e-8)
    convert.from_optax(state, tx, params, old)
    with pytest.raises(ValueError, match=f"from_optax: .*{message}"):
        convert.from_optax((change(state[0]), *state[1:]), tx, params, old)


def test_moments_whose_squares_are_too_small_for_float16_are_converted():
    params, old = {"w": jnp.ones(3, jnp.float16)}, optax.adam(0.1, eps=1e-4)
    state = old.init(params)
    for _ in range(3):
        _, state = old.update({"w": jnp.full(3, 1e-4, jnp.float16)}, state, params)
    assert not np.any(state[0].nu["w"])
    converted = convert.from_optax(state, adamjax.adam(0.1, eps=1e-4), params, old)
    assert_same(adamjax.get_slot(converted, "m")["w"], state[0].mu["w"].astype(jnp.float32))
    large = state[0]._replace(mu={"w": jnp.ones(3, jnp.float16)})
    with pytest.raises(ValueError, match="mu is larger than nu allows"):
        convert.from_optax((large, *state[1:]), adamjax.adam(0.1, eps=1e-4), params, old)


@pytest.mark.parametrize("count", [-3, 2.7, None, jnp.ones((2, 3))], ids=str)
def test_an_invalid_count_of_skipped_steps_is_refused(count):
    params = {"w": jnp.ones(3)}
    theirs = optax.apply_if_finite(optax.adam(0.1), 3)
    state = theirs.init(params)
    tx = adamjax.skip_not_finite(adamjax.adam(0.1, eps=1e-8))
    with pytest.raises((TypeError, ValueError), match="from_optax: the count of total_notfinite"):
        convert.from_optax(state._replace(total_notfinite=count), tx, params, theirs)


def test_each_part_has_its_own_count_of_skipped_steps():
    params = {"a": jnp.ones(3), "b": jnp.ones(2)}
    labels = {"a": "x", "b": "y"}
    parts = {label: optax.apply_if_finite(optax.adam(0.1), 100) for label in "xy"}
    theirs = optax.multi_transform(parts, labels)
    one = adamjax.skip_not_finite(adamjax.adam(0.1, eps=1e-8))
    tx = adamjax.partition([("a", one)], default=one)
    old = theirs.init(params)
    for a, b in ((jnp.nan, 1.0), (1.0, jnp.nan), (1.0, jnp.nan), (1.0, 1.0)):
        _, old = theirs.update({"a": jnp.full(3, a), "b": jnp.full(2, b)}, old, params)
    state = convert.from_optax(old, tx, params, theirs)
    assert [int(part.skipped) for part in state] == [1, 2]
    back = convert.to_optax(state, tx, params, theirs)
    assert [int(back.inner_states[x].inner_state.total_notfinite) for x in "xy"] == [1, 2]


def test_more_micro_batches_than_a_step_takes_are_refused():
    params = jax.tree.map(jnp.asarray, PARAMS)
    state = optax_state(tx=optax.MultiSteps(OPTAX_ADAM, 8).gradient_transformation(), count=3)
    tx = adamjax.accumulate_gradients(adamjax.adam(RATE, eps=1e-8), 2)
    with pytest.raises(ValueError, match=r"accumulated 3 micro-batches.*a step of tx takes 2"):
        convert.from_optax(state, tx, params, OPTAX_ADAM)


# --- states of other optimizers, structures and parameters ----------------------------------------


REFUSED = {
    "the default epsilon": (
        lambda: (optax_state(), adamjax.adam(RATE)),
        r"'a': optax has epsilon added to the bias-corrected root \(eps\), tx has eps_hat=1e-07: "
        r"build tx with eps=.*weight_decay=1e-4 in optax.adamw",
    ),
    "a leaf that is missing": (
        lambda: (optax_state({"a": PARAMS["a"]}), adamjax.adam(RATE, eps=1e-8)),
        r"no moments of the leaf 'b'",
    ),
    "a leaf without a place": (
        lambda: (optax_state(), adamjax.masked(adamjax.adam(RATE, eps=1e-8), "^a")),
        r"moments of the leaf 'b' have no place",
    ),
    "a shape": (
        lambda: (optax_state({**PARAMS, "b": np.ones(4)}), adamjax.adam(RATE, eps=1e-8)),
        r"m of 'b' has shape \[4\], expected \[3\]",
    ),
    "a rule with more slots": (
        lambda: (optax_state(tx=optax.amsgrad(RATE)), adamjax.adam(RATE, eps=1e-8)),
        r"of 'a', optax has \['mu', 'nu', 'nu_max'\], those of amsgrad; for adam, expected",
    ),
    "a rule with fewer slots": (
        lambda: (optax_state(), adamjax.amsgrad(RATE, eps=1e-8)),
        r"of 'a', optax has \['mu', 'nu'\].*for amsgrad, expected \['mu', 'nu', 'nu_max'\]",
    ),
    "a state without a place": (
        lambda: (
            optax_state(tx=optax.chain(optax.trace(0.9), OPTAX_ADAM)),
            adamjax.adam(RATE, eps=1e-8),
        ),
        r"tx has no place for a TraceState.*put the transform that made it into tx too",
    ),
    "a state that is missing": (
        lambda: (optax_state(), adamjax.chain(optax.trace(0.9), adamjax.adam(RATE, eps=1e-8))),
        r"the source has no TraceState",
    ),
    "accumulated gradients": (
        lambda: (
            optax_state(tx=optax.MultiSteps(OPTAX_ADAM, 4).gradient_transformation()),
            adamjax.adam(RATE, eps=1e-8),
        ),
        r"has accumulated 1 micro-batches.*wrap tx in accumulate_gradients",
    ),
    "counts that differ": (
        lambda: (
            (optax_state({"a": PARAMS["a"]}), optax_state({"b": PARAMS["b"]}, count=5)),
            adamjax.adam(RATE, eps=1e-8),
        ),
        r"'a' has taken 1 steps and 'b' 5.*partition",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_state_that_does_not_fit_tx_is_refused(name):
    make, message = REFUSED[name]
    state, tx = make()
    with pytest.raises(ValueError, match=message):
        convert.from_optax(state, tx, jax.tree.map(jnp.asarray, PARAMS), OPTAX_ADAM)


class MyState(NamedTuple):
    """A class of another library, with the fields of Adam's state."""

    count: jax.Array
    mu: dict
    nu: dict


class MyWrapper(NamedTuple):
    inner_state: tuple


STRANGE = {
    "a class of another library": (
        lambda: MyState(*optax_state()[0]),
        r"no moments of the leaf 'a'.*do not know its .*MyState: convert a state of Adam",
    ),
    "a wrapper of another library": (lambda: MyWrapper(optax_state()), r"no moments.*MyWrapper"),
    "real and imaginary parts": (
        lambda: optax_state(tx=optax.contrib.split_real_and_imaginary(OPTAX_ADAM)),
        r"no moments.*SplitRealAndImaginaryState",
    ),
    "look ahead": (
        lambda: optax.lookahead(OPTAX_ADAM, 5, 0.5).init(
            optax.LookaheadParams.init_synced(jax.tree.map(jnp.asarray, PARAMS))
        ),
        r"no moments.*do not know its .*LookaheadState: convert a state of Adam",
    ),
    "an average of gradients": (
        lambda: optax_state(tx=optax.chain(optax.ema(0.9), OPTAX_ADAM)),
        r"no place for an EmaState",
    ),
    "micro-batches that are skipped": (
        lambda: optax_state(
            tx=optax.MultiSteps(
                OPTAX_ADAM, 4, should_skip_update_fn=optax.skip_not_finite
            ).gradient_transformation(),
            count=0,
        ),
        r"MultiSteps skips some micro-batches",
    ),
    "several runs": (
        lambda: jax.tree.map(lambda x: jnp.stack([x, x]), optax_state()),
        r"the count of 'a' is .*convert the states of several runs one by one",
    ),
    "not finite": (
        lambda: jax.tree.map(
            lambda x: x if x.dtype == jnp.int32 else jnp.full_like(x, jnp.inf), optax_state()
        ),
        r"of 'a', mu has values that are not finite",
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_states_of_optax_are_refused(name):
    make, message = STRANGE[name]
    tx = adamjax.adam(RATE, eps=1e-8)
    with pytest.raises(ValueError, match=f"from_optax: .*{message}"):
        convert.from_optax(make(), tx, jax.tree.map(jnp.asarray, PARAMS), OPTAX_ADAM)


def test_states_that_were_restored_without_their_classes_are_refused():
    params, tx = {"w": jnp.ones(3)}, adamjax.adam(0.1)
    bare = [dict(optax.adam(0.1).init(params)[0]._asdict()), {}]
    for restored in (bare, {}):
        with pytest.raises(ValueError, match=r"moments of no leaf, .*restored without its classes"):
            convert.from_optax(restored, tx, params, OPTAX_ADAM)
    for restored in (bare, (bare[0], {}), {"0": bare[0]}):
        with pytest.raises(TypeError, match=r"the state is a \w+, expected .*without its classes"):
            tx.update(params, restored, params)
    # What the error recommends.
    rebuilt = jax.tree.structure(tx.init(params)).unflatten(jax.tree.leaves(tx.init(params)))
    assert_same(rebuilt, tx.init(params))


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
def test_states_of_other_optax_rules_are_refused(theirs):
    theirs, params = theirs(), {"w": jnp.ones((3, 2))}
    _, state = theirs.update({"w": jnp.full((3, 2), 0.3)}, theirs.init(params), params)
    if any(type(x).__name__ == "ScaleByAdamState" for x in state):
        pytest.skip("its state is of Adam's class")
    for tx in (adamjax.adam(0.1, eps=1e-8), adamjax.amsgrad(0.1, eps=1e-8)):
        with pytest.raises(ValueError, match="from_optax: "):
            convert.from_optax(state, tx, params, theirs)


# Optimizers of optax whose states have the class of Adam's state.
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
def test_all_optimizers_of_optax_except_adams_are_refused():
    """Also those of future releases."""
    params, accepted, seen = {"w": jnp.ones((3, 2))}, set(), 0
    txs = (adamjax.adam, adamjax.amsgrad, adamjax.adamax, adamjax.nadam)
    for name, make in optax_optimizers():
        try:
            theirs = make(learning_rate=0.1)
            state = theirs.init(params)
        except (AttributeError, TypeError, ValueError):
            continue  # it needs other arguments or parameters
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
                accepted.add((name, tx.__name__))
    assert seen > 20
    names = {tx: {name for name, other in accepted if other == tx} for _, tx in accepted}
    assert names["adam"] == {"adam"}
    assert names["amsgrad"] == {"amsgrad"}
    # optax defines these rules differently, and a large rtol allows that.
    assert {"adamax", "nadam"} <= names["adamax"] | names["nadam"] <= LIKE_ADAM


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"a": np.ones(2), "b": np.ones(4)}, r"leaf 'b' is of shape \[4\] in params and of shape"),
        ({"a": np.ones(2), "c": np.ones(3)}, r"leaf 'b' is not there in params and of shape \[3\]"),
        ({**PARAMS, "c": np.ones(3)}, r"leaf 'c' is of shape \[3\] in params and not there in"),
    ],
    ids=["shape", "name", "more"],
)
def test_to_optax_refuses_parameters_that_the_state_does_not_belong_to(params, message):
    """Leaves are compared by the paths of the parameters. With other paths nothing would be."""
    own, tx = jax.tree.map(jnp.asarray, PARAMS), adamjax.adam(RATE)
    with pytest.raises(ValueError, match=message):
        convert.to_optax(tx.init(own), tx, jax.tree.map(jnp.asarray, params), OPTAX_ADAM)


def test_a_state_of_another_transform_with_other_shapes_is_not_copied():
    params = jax.tree.map(jnp.asarray, PARAMS)
    turned = {name: x[:, None] for name, x in params.items()}
    state = optax.trace(0.9).init(turned), *optax_state()
    tx = adamjax.chain(optax.trace(0.9), adamjax.adam(RATE, eps=1e-8))
    with pytest.raises(ValueError, match=r"the source has no TraceState of these shapes"):
        convert.from_optax(state, tx, params, OPTAX_ADAM)


def test_a_state_in_one_vector_is_split_as_the_error_says():
    theirs, ours = optax.adam(0.1), adam_like_optax()
    flat = optax.flatten(theirs)
    old = state_after(flat, 3)
    with pytest.raises(ValueError, match=r"in one vector of 9, as in optax\.flatten.*split it, "):
        convert.from_optax(old, ours, TWO_LEAVES, flat)
    with pytest.raises(ValueError, match=r"one vector for all leaves.*leave flatten out"):
        convert.to_optax(ours.init(TWO_LEAVES), ours, TWO_LEAVES, flat)
    unravel = jax.flatten_util.ravel_pytree(TWO_LEAVES)[1]
    old = jax.tree.map(lambda x: unravel(x) if x.ndim else x, old)
    assert_close(old, state_after(theirs, 3), rtol=1e-6)
    convert.from_optax(old, ours, TWO_LEAVES, theirs)


# --- the order of states --------------------------------------------------------------------------


def test_the_order_of_a_named_chain_is_not_guessed():
    """JAX sorts the names, so rules of one leaf could get each other's moments."""
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


def test_states_of_optax_in_a_dictionary_have_no_order():
    """JAX sorts its keys, so that nothing shows which of two states is which."""
    parts = {name: optax.chain(optax.adam(0.1), reduce_on_plateau(0.5)) for name in "zy"}
    theirs = optax.multi_transform(parts, {"a": "z", "b": "y"})
    one = adamjax.chain(adam_like_optax(), reduce_on_plateau(0.5))
    ours = adamjax.partition([("^a", one)], default=one)
    old = state_after(theirs, 2, value=1.0)
    state = convert.from_optax(old, ours, TWO_LEAVES, check=False)  # both parts have the same state
    z = old.inner_states["z"]
    z = z._replace(inner_state=(z.inner_state[0], z.inner_state[1]._replace(scale=jnp.array(0.1))))
    other = old._replace(inner_states={**old.inner_states, "z": z})
    with pytest.raises(ValueError, match=r"several states of .* in a dictionary, whose order JAX"):
        convert.from_optax(other, ours, TWO_LEAVES, theirs)
    convert.from_optax(other, ours, TWO_LEAVES, check=False)
    state = (state[0], (*state[1][:-1], state[1][-1]._replace(scale=jnp.array(0.1))))
    with pytest.raises(ValueError, match=r"to_optax: there are several states of "):
        convert.to_optax(state, ours, TWO_LEAVES, theirs)


# --- arguments ------------------------------------------------------------------------------------


def test_arguments_in_another_order_are_refused_by_name():
    theirs, ours = optax.adam(0.1), adam_like_optax()
    old, new = theirs.init(TWO_LEAVES), ours.init(TWO_LEAVES)
    first = r"is a transform, .*expected the state .*pass the state first, then tx"
    second = r"tx is a tuple of \(\S*ScaleByAdamState, \S*\), expected a transform of adamjax"
    for message, owner, call in (
        (
            first,
            "from_optax: source_state",
            lambda: convert.from_optax(ours, old, TWO_LEAVES, theirs),
        ),
        (
            first,
            "from_optax: source_state",
            lambda: convert.from_optax(theirs, ours, TWO_LEAVES, theirs),
        ),
        (first, "to_optax: state", lambda: convert.to_optax(ours, new, TWO_LEAVES, theirs)),
        (second, "from_optax: ", lambda: convert.from_optax(old, old, TWO_LEAVES, theirs)),
        (second, "to_optax: ", lambda: convert.to_optax(new, new, TWO_LEAVES, theirs)),
    ):
        with pytest.raises(TypeError, match=f"^{owner}.*{message}") as error:
            call()
        assert "Array(" not in str(error.value)
    with pytest.raises(ValueError, match=r"to_optax: .*another structure than tx\.init\(params\)"):
        convert.to_optax(new, theirs, TWO_LEAVES, theirs)
    turned = {**TWO_LEAVES, "b": jnp.ones((3, 2))}
    with pytest.raises(ValueError, match=r"are params those that the state belongs to"):
        convert.from_optax(old, ours, turned, theirs)


def test_an_optimizer_that_did_not_make_the_state_is_refused():
    state, ours = optax.adam(0.1).init(TWO_LEAVES), adam_like_optax()
    for invalid in (0.1, {}):
        with pytest.raises(TypeError, match=r"optimizer is .*, expected the transform of optax"):
            convert.from_optax(state, ours, TWO_LEAVES, optimizer=invalid)
    for other in (optax.adam(HALVING), multi_steps(optax.adam(0.1), 2), optax.sgd(0.1)):
        with pytest.raises(ValueError, match=r"another structure than optimizer\.init"):
            convert.from_optax(state, ours, TWO_LEAVES, optimizer=other)
    nnx = pytest.importorskip("flax.nnx")
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    opt, params = nnx.Optimizer(model, optax.adam(0.1), wrt=nnx.Param), nnx.state(model, nnx.Param)
    with pytest.raises(TypeError, match=r"of an nnx\.Optimizer its tx"):
        convert.from_optax(opt.opt_state, ours, params, optimizer=opt)
    with pytest.raises(ValueError, match=r"of flax\.nnx, pass nnx\.as_pure"):
        convert.from_optax(nnx.state(opt), ours, params, optimizer=opt.tx)
    as_pure = getattr(nnx, "as_pure", None) or nnx.pure
    convert.from_optax(as_pure(opt.opt_state), ours, as_pure(params), optimizer=opt.tx)
