"""The exponential average of the weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, assert_same

from adamjax import (
    accumulate_gradients,
    adam,
    apply_updates,
    averaged_weights,
    chain,
    masked,
    scale,
    skip_not_finite,
    weight_ema,
)

PARAMS = {"w": jnp.array([1.0, -2.0]), "b": jnp.array(0.5)}


def run(tx, steps, params=PARAMS):
    """The weights and averages before the first step and after each step."""
    state = tx.init(params)
    history = [(params, averaged_weights(state))]
    step = jax.jit(tx.update)
    for t in range(steps):
        grads = jax.tree.map(lambda p, t=t: jnp.cos(p + t).astype(p.dtype), params)
        updates, state = step(grads, state, params)
        params = apply_updates(params, updates)
        history.append((params, averaged_weights(state)))
    return history


def test_before_the_first_step_the_average_is_a_copy_of_the_weights():
    tx = chain(adam(), weight_ema())
    state = tx.init(PARAMS)
    assert_same(averaged_weights(state), PARAMS)
    copies = zip(jax.tree.leaves(averaged_weights(state)), jax.tree.leaves(PARAMS), strict=True)
    assert all(a.unsafe_buffer_pointer() != p.unsafe_buffer_pointer() for a, p in copies)


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 0.99, 1.0, jnp.float32(0.75)])
def test_the_average_follows_its_formula(momentum):
    history = run(chain(adam(0.1), weight_ema(momentum)), 5)
    expected = jax.tree.map(lambda p: np.asarray(p, np.float64), PARAMS)
    b = float(momentum)
    for params, average in history[1:]:
        expected = jax.tree.map(lambda a, p: b * a + (1 - b) * p, expected, params)
        for a, e in zip(jax.tree.leaves(average), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, e, rtol=1e-6)
    if b == 1.0:
        assert_same(history[-1][1], PARAMS)
    if b == 0.0:
        assert_same(history[-1][1], history[-1][0])


@pytest.mark.parametrize("frequency", [1, 2, 3, 2.0, jnp.array(2)])
def test_the_average_overwrites_the_weights_every_so_many_steps(frequency):
    """At steps f, 2f, ... The weights may be off by an ulp, because an update is a difference."""
    history = run(chain(adam(0.1), weight_ema(0.5, frequency)), 7)
    for t, (params, average) in enumerate(history[1:], start=1):
        if t % int(frequency) == 0:
            assert_close(params, average, rtol=1e-7)
        else:
            assert np.all(np.abs(params["w"] - average["w"]) > 1e-3)


def test_the_largest_frequency_overwrites_at_the_largest_count():
    """The step moves the weights from 0 to 4 and the average from 0 to 2; one step overwrites."""
    tx = chain(scale(-1.0), weight_ema(0.5, 2**31 - 1))
    params = jnp.array(0.0)
    for count, expected in ((2**31 - 3, 4.0), (2**31 - 2, 2.0)):
        state = tx.init(params)
        ema = state[1]._replace(count=jnp.array(count, jnp.int32))
        updates, _ = jax.jit(tx.update)(jnp.array(-4.0), (state[0], ema), params)
        assert float(updates) == expected


def test_the_average_includes_the_weights_before_it_overwrites_them():
    tx = chain(scale(-1.0), weight_ema(0.5, 2))
    p, seen = jnp.array(0.0), []
    state = tx.init(p)
    for _ in range(4):
        updates, state = tx.update(jnp.array(-4.0), state, p)
        p = apply_updates(p, updates)
        seen.append((float(p), float(averaged_weights(state))))
    assert seen == [(4.0, 2.0), (5.0, 5.0), (9.0, 7.0), (10.0, 10.0)]


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("jit", [True, False], ids=["jit", "eager"])
def test_the_average_is_of_the_rounded_weights_after_the_step(dtype, jit):
    """With momentum 0 they are equal bit for bit, however they were rounded."""
    rng = np.random.default_rng(0)
    params = jnp.asarray(rng.normal(size=2000), dtype)
    grads = jnp.asarray(rng.normal(size=2000), dtype)
    tx = chain(scale(-0.0371), weight_ema(0.0))

    def step(params, state):
        updates, state = tx.update(grads, state, params)
        return apply_updates(params, updates), averaged_weights(state)

    moved, average = (jax.jit(step) if jit else step)(params, tx.init(params))
    assert average.dtype == jnp.float32
    assert_same(average.astype(dtype), moved)
    assert_same(average, moved.astype(jnp.float32))


@pytest.mark.parametrize("wide_grads", [False, True])
def test_the_average_is_finer_than_low_precision_weights(wide_grads):
    """It is in float32, so 500 steps are not lost, each of which goes a thousandth of the way."""
    params = jnp.ones(2, jnp.bfloat16)
    grads = jnp.full(2, 0.5, jnp.float32 if wide_grads else jnp.bfloat16)
    tx = chain(scale(-1.0), weight_ema(0.999))
    state = tx.init(params)
    step = jax.jit(tx.update)
    for _ in range(500):
        _, state = step(grads, state, params)  # the weights after each step are 0.5
    expected = 0.5 + 0.5 * 0.999**500
    np.testing.assert_allclose(averaged_weights(state), expected, rtol=1e-5)
    assert_same(averaged_weights(state, params), jnp.full(2, expected, jnp.bfloat16))


def test_the_average_moves_only_when_a_step_is_taken():
    """It does not move in micro-batches or in steps that are skipped."""
    inner = chain(adam(0.1), weight_ema(0.5))
    tx = skip_not_finite(accumulate_gradients(inner, 2))
    state = tx.init(PARAMS)
    grads = jax.tree.map(jnp.ones_like, PARAMS)
    _, state = tx.update(grads, state, PARAMS)
    assert_same(averaged_weights(state), PARAMS)
    _, state = tx.update(jax.tree.map(lambda g: g * jnp.nan, grads), state, PARAMS)
    assert_same(averaged_weights(state), PARAMS)
    _, state = tx.update(grads, state, PARAMS)
    assert np.all(averaged_weights(state)["w"] != PARAMS["w"])


def test_averaged_weights_of_integers_none_and_leaves_without_an_average():
    params = {"w": jnp.ones(2, jnp.bfloat16), "n": jnp.arange(2), "none": None, "x": 2.0}
    tx = chain(adam(), masked(weight_ema(), "w|x|n"))
    state = tx.init(params)
    assert averaged_weights(state)["n"] is None
    whole = averaged_weights(state, params)
    assert whole["n"] is params["n"]
    assert whole["w"].dtype == jnp.bfloat16
    assert float(whole["x"]) == 2.0
    assert whole["none"] is None
    # A leaf without an average is returned as it is.
    part = chain(adam(), masked(weight_ema(), "w")).init(params)
    assert averaged_weights(part, params)["x"] == 2.0


def test_overwriting_continues_at_the_largest_count():
    tx = weight_ema(0.5, 1)
    state = tx.init(PARAMS)._replace(count=jnp.array(jnp.iinfo(jnp.int32).max, jnp.int32))
    updates, state = tx.update(jax.tree.map(jnp.ones_like, PARAMS), state, PARAMS)
    assert int(state.count) == jnp.iinfo(jnp.int32).max
    assert_close(updates, jax.tree.map(lambda p: jnp.full_like(p, 0.5), PARAMS))


def test_traced_arguments_make_nan_outside_of_their_range():
    def step(tx):
        """The updates and the average."""
        updates, state = tx.update(jnp.ones(2), tx.init(jnp.ones(2)), jnp.ones(2))
        return updates, state.average

    average_of = jax.jit(lambda momentum: step(weight_ema(momentum))[1])
    for momentum, expected in ((0.0, 2.0), (0.25, 1.75), (1.0, 1.0)):
        np.testing.assert_array_equal(average_of(momentum), jnp.full(2, expected))
    for bad in (-0.1, 1.1, jnp.nan):
        assert np.isnan(average_of(bad)).all()
    step_of = jax.jit(lambda frequency: step(weight_ema(0.5, frequency)))
    assert_same(step_of(2), (jnp.ones(2), jnp.full(2, 1.5)))
    for bad in (0, -1, -3):
        assert all(np.isnan(x).all() for x in step_of(bad))
    with pytest.raises(ValueError, match=r"overwrite_frequency is an array of shape \(2,\).*vmap"):
        step(weight_ema(0.5, jnp.array([1, 2])))
