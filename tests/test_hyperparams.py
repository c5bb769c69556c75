"""Hyperparameters in the state: what a step uses, set without tracing it anew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import adamjax
from adamjax import set_hyperparams, with_hyperparams

PARAMS = {"kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]), "bias": jnp.array([0.1, -0.2])}


def gradients(t):
    return jax.tree.map(lambda p: jnp.sin(p + t), PARAMS)


def run(tx, params, state, steps):
    for t in steps:
        updates, state = tx.update(gradients(t), state, params)
        params = adamjax.apply_updates(params, updates)
    return params, state


def test_steps_are_those_of_the_transform_with_these_values():
    given = {"learning_rate": 0.1, "b1": 0.5, "weight_decay": 0.25, "max_norm": 0.5}
    inner = adamjax.chain(
        adamjax.clip_by_global_norm(9.0), adamjax.adamw(adamjax.cosine_decay(3.0, 10))
    )
    tx = with_hyperparams(inner, **given)
    # These values are exact in float32, but for the rate.
    plain = adamjax.chain(
        adamjax.clip_by_global_norm(0.5),
        adamjax.adamw(jnp.float32(0.1), jnp.float32(0.5), weight_decay=jnp.float32(0.25)),
    )
    ours, state = run(tx, PARAMS, tx.init(PARAMS), range(5))
    theirs, _ = run(plain, PARAMS, plain.init(PARAMS), range(5))
    for name, x in theirs.items():
        np.testing.assert_allclose(ours[name], x, rtol=1e-6)
    assert state.hyperparams == {name: np.float32(x) for name, x in given.items()}
    assert adamjax.learning_rate(tx, state) == np.float32(0.1)
    assert adamjax.step_count(state) == 5


def test_setting_takes_effect_and_traces_nothing():
    tx = with_hyperparams(adamjax.adam(0.1), learning_rate=0.1)
    traced = []

    @jax.jit
    def step(params, state, t):
        traced.append(t)
        updates, state = tx.update(gradients(t), state, params)
        return updates, state

    state = tx.init(PARAMS)
    first, _ = step(PARAMS, state, 0.0)
    for value in (0.2, np.float64(0.2), jnp.float32(0.2), np.array(0.2)):
        doubled, _ = step(PARAMS, set_hyperparams(state, learning_rate=value), 0.0)
        for name, x in first.items():
            np.testing.assert_allclose(doubled[name], 2 * x, rtol=1e-6)
    assert len(traced) == 1


def test_donated_states_take_nothing_along():
    given = jnp.array(0.1)
    tx = with_hyperparams(adamjax.adam(0.1), learning_rate=given)
    step = jax.jit(lambda s: tx.update(gradients(0.0), s)[1], donate_argnums=0)
    for _ in range(2):
        step(set_hyperparams(step(tx.init(PARAMS)), learning_rate=given))
    assert given == tx.hyperparams["learning_rate"]


def test_a_hundred_rates_in_one_program():
    rates = jnp.linspace(0.01, 0.5, 100)

    def loss_after(rate):
        tx = with_hyperparams(adamjax.adam(0.0), learning_rate=rate)
        params, _ = run(tx, PARAMS, tx.init(PARAMS), range(3))
        return params["bias"][0]

    def alone(rate):
        tx = adamjax.adam(rate)
        return run(tx, PARAMS, tx.init(PARAMS), range(3))[0]["bias"][0]

    found = jax.jit(jax.vmap(loss_after))(rates)
    np.testing.assert_allclose(found, jax.jit(jax.vmap(alone))(rates), rtol=1e-6)


def test_around_exact_rows():
    tx = with_hyperparams(adamjax.exact_rows(adamjax.adamw(0.1), "table"), learning_rate=0.02)
    dense = adamjax.adamw(jnp.float32(0.02))
    params = {"table": jnp.linspace(-1, 1, 20).reshape(10, 2)}
    exact, state = params, tx.init(params)
    wanted, dense_state = params, dense.init(params)
    for ids in ([1, 2, 2], [3, 1, 0], [9, 9, 9]):
        grads = {"table": adamjax.row_gradient(jnp.array(ids), jnp.ones((3, 2)), 10)}
        updates, state = tx.update(grads, state, exact)
        exact = adamjax.apply_updates(exact, updates)
        grads = {"table": grads["table"].to_dense()}
        updates, dense_state = dense.update(grads, dense_state, wanted)
        wanted = adamjax.apply_updates(wanted, updates)
    exact, _ = tx.resolved(state).flush(exact, state.inner)
    np.testing.assert_allclose(exact["table"], wanted["table"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: with_hyperparams(adamjax.adam(0.1), momentum=0.9),
            ValueError,
            r"'momentum' is a field of 0 transforms in .*there are .*'learning_rate'",
        ),
        (
            lambda: with_hyperparams(
                adamjax.chain(adamjax.scale(2.0), adamjax.scale(3.0)), factor=1.0
            ),
            ValueError,
            r"'factor' is a field of 2 transforms.*Wrap the part that is meant",
        ),
        (
            lambda: with_hyperparams(adamjax.adam(0.1), b1=1.5),
            ValueError,
            r"scale_by_adam: b1 must be in \[0, 1\), got 1.5",
        ),
        (
            lambda: with_hyperparams(adamjax.adam(0.1), learning_rate=jnp.ones(3)),
            ValueError,
            r"learning_rate must be a scalar",
        ),
        (
            lambda: with_hyperparams(adamjax.adam(0.1), learning_rate=adamjax.constant(0.1)),
            ValueError,
            r"learning_rate must be a scalar",
        ),
        (
            lambda: with_hyperparams(adamjax.exact_rows(adamjax.adam(0.1), "table"), b1=0.5),
            ValueError,
            r"'b1' must be a Python float within exact_rows",
        ),
        (
            lambda: with_hyperparams(adamjax.chain(adamjax.adam(0.1)), transforms=1.0),
            ValueError,
            r"'transforms' is a field of",
        ),
        (
            lambda: set_hyperparams(adamjax.adam(0.1).init(PARAMS), learning_rate=0.1),
            TypeError,
            r"the state is a tuple, expected the HyperparamsState",
        ),
        (
            lambda: set_hyperparams(
                with_hyperparams(adamjax.adam(0.1), b1=0.5).init(PARAMS), learning_rate=0.1
            ),
            ValueError,
            r"the state keeps \['b1'\], not 'learning_rate'",
        ),
        (
            lambda: set_hyperparams(
                with_hyperparams(adamjax.adam(0.1), b1=0.5).init(PARAMS), b1=jnp.ones(2)
            ),
            ValueError,
            r"b1 must be of shape \(\)",
        ),
        (
            lambda: with_hyperparams(adamjax.adam(0.1), b1=0.5).update(PARAMS, ()),
            TypeError,
            r"the state is a tuple, expected the HyperparamsState",
        ),
    ],
)
def test_refuses(make, error, message):
    with pytest.raises(error, match=message):
        make()
