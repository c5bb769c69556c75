"""Hyperparameters in the state: a step uses them, and setting them causes no new trace."""

import decimal
import fractions

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import jit_and_traces

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
    # The wrapped transform computes with float32 arrays, so this one does too.
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


def test_setting_a_value_takes_effect_without_a_new_trace():
    tx = with_hyperparams(adamjax.adam(0.1), learning_rate=0.1)
    step, traces = jit_and_traces(lambda params, state, t: tx.update(gradients(t), state, params))
    state = tx.init(PARAMS)
    first, _ = step(PARAMS, state, 0.0)
    for value in (0.2, np.float64(0.2), jnp.float32(0.2), np.array(0.2)):
        doubled, _ = step(PARAMS, set_hyperparams(state, learning_rate=value), 0.0)
        for name, x in first.items():
            np.testing.assert_allclose(doubled[name], 2 * x, rtol=1e-6)
    assert len(traces) == 1


def test_donating_a_state_leaves_the_given_values_alive():
    given = jnp.array(0.1)
    tx = with_hyperparams(adamjax.adam(0.1), learning_rate=given)
    step = jax.jit(lambda s: tx.update(gradients(0.0), s)[1], donate_argnums=0)
    for _ in range(2):
        step(set_hyperparams(step(tx.init(PARAMS)), learning_rate=given))
    assert given == tx.hyperparams["learning_rate"]


def test_a_hundred_rates_are_trained_by_one_vmap():
    rates = jnp.linspace(0.01, 0.5, 100)

    def bias_after(rate):
        tx = with_hyperparams(adamjax.adam(0.0), learning_rate=rate)
        params, _ = run(tx, PARAMS, tx.init(PARAMS), range(3))
        return params["bias"][0]

    def bias_with_plain_adam(rate):
        tx = adamjax.adam(rate)
        return run(tx, PARAMS, tx.init(PARAMS), range(3))[0]["bias"][0]

    found = jax.jit(jax.vmap(bias_after))(rates)
    np.testing.assert_allclose(found, jax.jit(jax.vmap(bias_with_plain_adam))(rates), rtol=1e-6)


@pytest.mark.slow
def test_a_rate_set_around_exact_rows_is_that_of_the_dense_optimizer():
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


def test_hyperparameters_are_set_at_any_depth_of_a_state():
    part = with_hyperparams(adamjax.adam(0.1), learning_rate=0.1)
    tx = adamjax.skip_not_finite(
        with_hyperparams(
            adamjax.partition([("^a", part)], default=adamjax.chain(adamjax.scale(-1.0))),
            factor=-1.0,
        )
    )
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    states = {"any key": (tx.init(params),)}
    (state,) = set_hyperparams(states, learning_rate=0.5, factor=-0.25)["any key"]
    updates, _ = tx.update(params, state, params)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.5, -0.25], rtol=1e-5)
    with pytest.raises(ValueError, match=r"keeps \['factor', 'learning_rate'\], not 'b1'"):
        set_hyperparams(state, b1=0.5)
    twice = adamjax.partition([("^a", part)], default=part)
    with pytest.raises(ValueError, match="2 states of with_hyperparams keep 'learning_rate'"):
        set_hyperparams(twice.init(params), learning_rate=0.5)
    with pytest.raises(TypeError, match="a ScaleByAdamState without a HyperparamsState in it"):
        set_hyperparams(adamjax.scale_by_adam().init(params), learning_rate=0.5)


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        *(("b1", x) for x in (-0.5, 1.0, 1.5)),
        *(("b2", x) for x in (-0.5, 1.0, 1.5)),
        ("learning_rate", -0.5),
        ("weight_decay", -0.5),
        ("momentum", 1.5),
        ("momentum", -0.5),
    ],
)
def test_updates_are_nan_if_a_value_is_set_outside_its_range(name, bad):
    """Also if the value is a NumPy scalar, as in a state from a checkpoint."""
    inner = adamjax.chain(adamjax.adamw(0.1), adamjax.weight_ema(0.5, 1))
    tx = with_hyperparams(inner, **{name: 0.5})
    state = set_hyperparams(tx.init(PARAMS), **{name: bad})
    restored = state._replace(hyperparams={name: np.float32(bad)})
    for update in (tx.update, jax.jit(tx.update)):
        for given in (state, restored):
            updates, _ = update(PARAMS, given, PARAMS)
            assert all(np.isnan(x).all() for x in jax.tree.leaves(updates))


# --- floats and counts ----------------------------------------------------------------------------

# For each hyperparameter that is not a count: a transform that has it, and a whole number to set.
WHOLE_FLOATS = {
    "learning_rate": (adamjax.adam(0.1), 1),
    "weight_decay": (adamjax.adamw(0.1), 0),
    "b1": (adamjax.scale_by_adam(), 0),
    "b2": (adamjax.scale_by_adam(), 0),
    "eps": (adamjax.scale_by_adam(eps=0.1), 1),
    "eps_hat": (adamjax.scale_by_adam(), 1),
    "max_norm": (adamjax.clip_by_norm(2.0), 1),
    "limit": (adamjax.clip_by_value(2.0), 1),
    "factor": (adamjax.scale(2.0), 1),
    "momentum": (adamjax.weight_ema(0.5), 1),
}


@pytest.mark.parametrize("name", WHOLE_FLOATS)
def test_a_whole_number_becomes_a_float_unless_it_is_a_count(name):
    tx, whole = WHOLE_FLOATS[name]
    for value in (whole, np.int64(whole), np.array(whole), jnp.array(whole), np.uint8(whole)):
        made = with_hyperparams(tx, **{name: value})
        state = made.init(PARAMS)
        assert state.hyperparams[name].dtype == jnp.float32
        assert state.hyperparams[name] == whole
        halved = set_hyperparams(state, **{name: 0.5})
        assert halved.hyperparams[name] == 0.5
        plain = with_hyperparams(tx, **{name: 0.5})
        ours, _ = made.update(PARAMS, halved, PARAMS)
        wanted, _ = plain.update(PARAMS, plain.init(PARAMS), PARAMS)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(wanted), strict=True):
            np.testing.assert_array_equal(a, b)
    traced = jax.jit(lambda x: with_hyperparams(tx, **{name: x}).init(PARAMS))(whole)
    assert traced.hyperparams[name].dtype == jnp.float32


COUNTS = {
    "steps": adamjax.accumulate_gradients(adamjax.scale(1.0), 2),
    "overwrite_frequency": adamjax.weight_ema(0.5, 2),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts_stay_integers(name):
    for value in (3, 3.0, np.int64(3), np.float32(3), jnp.array(3), np.array(3.0)):
        state = with_hyperparams(COUNTS[name], **{name: value}).init(PARAMS)
        assert state.hyperparams[name].dtype == jnp.int32
        assert state.hyperparams[name] == 3
        for new in (4, 4.0, np.uint64(4), jnp.float32(4), 2**31 - 1):
            found = set_hyperparams(state, **{name: new}).hyperparams[name]
            assert (found.dtype, int(found)) == (jnp.int32, int(new))
        for bad in (2.5, 0, -1, 2**31, np.int64(2**32 + 3), np.nan, np.inf, 10**400):
            with pytest.raises(ValueError, match=rf"keeps {name} as int32.*whole number.*got"):
                set_hyperparams(state, **{name: bad})
        with pytest.raises(ValueError, match=rf"keeps {name} as int32"):
            jax.jit(lambda x, s=state: set_hyperparams(s, **{name: x}))(2.0)


RATE_STATE = with_hyperparams(adamjax.adam(0.1), learning_rate=0.1).init(PARAMS)


def test_real_numbers_of_any_type_are_set_as_float32():
    third = fractions.Fraction(1, 3)
    for value in (1, third, np.float64(0.3), np.array(0.3), np.int64(2**40), 2**70, np.uint8(2)):
        found = set_hyperparams(RATE_STATE, learning_rate=value).hyperparams["learning_rate"]
        assert (found.dtype, float(found)) == (jnp.float32, np.float32(float(value)))
    traced = jax.jit(lambda x: set_hyperparams(RATE_STATE, learning_rate=x))(2)
    assert traced.hyperparams["learning_rate"].dtype == jnp.float32


# --- errors ---------------------------------------------------------------------------------------


def test_only_finite_real_numbers_can_be_set():
    for bad in (True, np.True_, jnp.array(True), 1j, "0.1", None, decimal.Decimal("0.1"), {}):
        with pytest.raises(TypeError, match=r"learning_rate must be a real number, got"):
            set_hyperparams(RATE_STATE, learning_rate=bad)
    for bad in (np.nan, np.inf, -np.inf, 1e39, 10**400, jnp.float32(np.nan)):
        with pytest.raises(ValueError, match=r"learning_rate must be finite in float32, got"):
            set_hyperparams(RATE_STATE, learning_rate=bad)


def test_a_value_must_be_in_its_range_as_a_float32():
    """0.99999999 is a beta, but the float32 next to it is 1."""
    adamjax.adam(b1=0.99999999)
    with pytest.raises(ValueError, match=r"b1 must be in \[0, 1\), got Array\(1"):
        with_hyperparams(adamjax.adam(), b1=0.99999999)


def test_a_state_with_other_hyperparameters_than_the_transform_is_refused():
    inner = adamjax.adam(0.1)
    with_rate = with_hyperparams(inner, learning_rate=0.1)
    with_both = with_hyperparams(inner, learning_rate=0.1, b1=0.5)
    for tx, other in ((with_both, with_rate), (with_rate, with_both)):
        state = other.init(PARAMS)
        for use in (tx.update, jax.jit(tx.update)):
            with pytest.raises(
                ValueError, match=r"the state keeps \[.*the transform has \[.*go on"
            ):
                use(PARAMS, state, PARAMS)
        with pytest.raises(ValueError, match="the state keeps"):
            adamjax.learning_rate(tx, state)
        # The error advises this.
        state = adamjax.states.HyperparamsState(tx.init(PARAMS).hyperparams, state.inner)
        tx.update(PARAMS, state, PARAMS)


def test_values_of_a_wrong_dtype_or_shape_in_a_state_are_refused():
    tx = with_hyperparams(adamjax.adam(0.1), learning_rate=1)
    state = tx.init(PARAMS)
    for bad in (jnp.array(1), jnp.array(True), jnp.ones(2), np.int64(1)):
        bad_state = state._replace(hyperparams={"learning_rate": bad})
        for use in (tx.update, jax.jit(tx.update)):
            message = "keeps learning_rate as .*expected a scalar of a float dtype"
            with pytest.raises(ValueError, match=message):
                use(PARAMS, bad_state, PARAMS)
    for bad in ("0.5", None):
        bad_state = state._replace(hyperparams={"learning_rate": bad})
        message = f"keeps learning_rate as {bad!r}, expected a scalar"
        with pytest.raises(ValueError, match=message):
            tx.update(PARAMS, bad_state, PARAMS)
    with pytest.raises(ValueError, match=r"as int32.*got 0.5. If it is not a count.*tx.init"):
        set_hyperparams(
            state._replace(hyperparams={"learning_rate": jnp.array(1)}), learning_rate=0.5
        )
    counting_tx = with_hyperparams(COUNTS["steps"], steps=2)
    bad_state = counting_tx.init(PARAMS)._replace(hyperparams={"steps": jnp.array(2.0)})
    with pytest.raises(ValueError, match="expected a scalar of an integer dtype"):
        counting_tx.update(PARAMS, bad_state)
    # A state of NumPy arrays, as from a checkpoint, is accepted.
    tx.update(PARAMS, jax.device_get(state), PARAMS)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: with_hyperparams(adamjax.adam(0.1), momentum=0.9),
            ValueError,
            r"'momentum' is a field of 0 transforms in .*the fields are .*'learning_rate'",
        ),
        (
            lambda: with_hyperparams(
                adamjax.chain(adamjax.scale(2.0), adamjax.scale(3.0)), factor=1.0
            ),
            ValueError,
            r"'factor' is a field of 2 transforms.*Wrap only the part that you mean",
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
            r"'b1' must be a Python float within exact_rows.*: flush, make a new transform",
        ),
        (
            lambda: with_hyperparams(adamjax.chain(adamjax.adam(0.1)), transforms=1.0),
            ValueError,
            r"'transforms' is a field of",
        ),
        (
            lambda: set_hyperparams(adamjax.adam(0.1).init(PARAMS), learning_rate=0.1),
            TypeError,
            r"the state is a tuple without a HyperparamsState in it",
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
def test_wrong_hyperparameters_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_one_number_does_not_replace_the_rates_of_all_leaves():
    rates = adamjax.by_path([("^a", 0.1)], default=0.2)
    tx = adamjax.adamw(rates, weight_decay=rates)
    for name in ("learning_rate", "weight_decay"):
        with pytest.raises(ValueError, match=f"the {name} of .* is a by_path.*put scale"):
            with_hyperparams(tx, **{name: 0.3})
    # The error advises this.
    tx = with_hyperparams(
        adamjax.chain(adamjax.adam(rates, eps=1e-8), adamjax.scale(1.0)), factor=1.0
    )
    params = {"a": jnp.ones(1), "b": jnp.ones(1)}
    state = set_hyperparams(tx.init(params), factor=0.5)
    updates, _ = tx.update(params, state, params)
    np.testing.assert_allclose([updates["a"][0], updates["b"][0]], [-0.05, -0.1], rtol=1e-6)
