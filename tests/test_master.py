"""Float32 weights in the state: the parameters are these weights, rounded to a narrow dtype."""

import functools
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close, assert_same

import adamjax
from adamjax import master_weights

PARAMS = {
    "w": jnp.linspace(-2, 2, 12, dtype=jnp.bfloat16).reshape(4, 3),
    "h": jnp.ones(3, jnp.float16),
    "f": jnp.ones(2),
    "n": jnp.array(3),
    "z": None,
}


def wide(tree):
    """The tree with float32 in place of narrower floats."""

    def cast(p):
        return p.astype(jnp.float32) if jnp.issubdtype(p.dtype, jnp.floating) else p

    return jax.tree.map(cast, tree)


def gradients(i):
    return {
        "w": jnp.cos(PARAMS["w"] + i).astype(jnp.bfloat16),
        "h": jnp.full(3, 0.3, jnp.float16) * (i + 1),
        "f": jnp.array([0.1, -2.0]),
        "n": None,
        "z": None,
    }


OPTIMIZERS = {
    "adamw": lambda: adamjax.adamw(1e-3, weight_decay=0.1),
    "clip, adam, average": lambda: adamjax.chain(
        adamjax.clip_by_global_norm(0.5), adamjax.adam(1e-3), adamjax.weight_ema(0.9)
    ),
    "amsgrad": lambda: adamjax.amsgrad(1e-3),
    "optax": lambda: optax.adam(1e-3),
    "narrow moments": lambda: adamjax.adam(1e-3, m_dtype="bfloat16", v_dtype="bfloat16"),
}
WRAPPERS = {
    "alone": lambda tx: tx,
    "skip": adamjax.skip_not_finite,
    "chain": lambda tx: adamjax.chain(adamjax.identity(), tx),
    "partition": lambda tx: adamjax.partition([("[wh]", tx)], default=tx),
    "hyperparams": adamjax.with_hyperparams,
    "optax": lambda tx: optax.chain(tx),
}

FLOATS = ("w", "h", "f")


def accepted_leaves(name, tree):
    """The leaves of a tree that an optimizer accepts: optax accepts no integers and no None."""
    return {key: x for key, x in tree.items() if name != "optax" or key in FLOATS}


@functools.cache
def rounded_weights(name):
    """Weights of steps on float32 parameters and gradients, each rounded to the narrow dtypes."""
    tx = OPTIMIZERS[name]()
    params = wide(accepted_leaves(name, PARAMS))
    state, update, found = tx.init(params), jax.jit(tx.update), []
    for i in range(4):
        updates, state = update(wide(accepted_leaves(name, gradients(i))), state, params)
        params = adamjax.apply_updates(params, updates)
        found.append({key: params[key].astype(PARAMS[key].dtype) for key in FLOATS})
    return found


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.slow
def test_parameters_are_the_rounded_weights(name, wrapper):
    """The weights are those of the same optimizer on float32 parameters and gradients."""
    if wrapper == "partition" and "clip" in name:
        pytest.skip("a global norm within each part differs from that of all leaves")
    if name == "optax" and wrapper == "partition":
        pytest.skip("optax accepts no None")
    tx = WRAPPERS[wrapper](master_weights(OPTIMIZERS[name]()))
    params = accepted_leaves(name, PARAMS)
    state, update = tx.init(params), jax.jit(tx.update)
    for i, rounded in enumerate(rounded_weights(name)):
        updates, state = update(accepted_leaves(name, gradients(i)), state, params)
        # In one of the steps, optax applies the updates. It accepts only floats.
        apply = optax.apply_updates if i == 2 and wrapper != "partition" else adamjax.apply_updates
        floats = apply({key: params[key] for key in FLOATS}, {key: updates[key] for key in FLOATS})
        params = params | floats
        for key, expected in rounded.items():
            assert params[key].dtype == expected.dtype
            share = np.mean(np.asarray(params[key] == expected))
            # In the chain with a clip and an average, XLA may round some elements differently.
            assert share == 1 if name != "clip, adam, average" else share > 0.8


@pytest.mark.parametrize("skips_inside", [True, False])
def test_a_step_whose_float16_gradients_overflow_changes_nothing(skips_inside):
    """The gradients of a scaled loss: float16 overflows above 65504."""
    adam = adamjax.chain(adamjax.scale(1 / 1024), adamjax.adam(0.1))
    skip = adamjax.skip_not_finite
    tx = master_weights(skip(adam)) if skips_inside else skip(master_weights(adam))
    grads = [jnp.array([g, 0.5], jnp.float16) * 1024 for g in (1.0, 100.0, -2.0)]
    assert np.isinf(grads[1][0])
    update = jax.jit(tx.update)

    def run(steps):
        p = jnp.ones(2, jnp.float16)
        state = tx.init(p)
        for g in steps:
            updates, state = update(g, state, p)
            p = adamjax.apply_updates(p, updates)
        return p, jax.tree.leaves(state), adamjax.skipped_steps(state)

    (p, with_overflow, skipped), (expected, without, _) = run(grads), run(grads[::2])
    assert int(skipped) == 1
    assert np.all(np.isfinite(p))
    assert_same(p, expected)
    # Only the count of skipped steps differs.
    differ = [not np.array_equal(x, y) for x, y in zip(with_overflow, without, strict=True)]
    assert sum(differ) == 1


def test_a_float16_parameter_that_was_infinite_is_copied_from_its_weight():
    """An infinite parameter becomes NaN in the next step, unless it is copied from its weight."""
    tx, p = master_weights(adamjax.scale(1.0)), jnp.zeros(1, jnp.float16)
    state = tx.init(p)
    for g, expected in ((6e4, 6e4), (1e4, np.inf), (-3e4, np.nan)):
        updates, state = tx.update(jnp.full(1, g, jnp.float16), state, p)
        p = adamjax.apply_updates(p, updates)
        np.testing.assert_array_equal(p, jnp.full(1, expected, jnp.float16))
    p = state.weights.astype(p.dtype)
    updates, state = tx.update(jnp.full(1, -1e4, jnp.float16), state, p)
    np.testing.assert_array_equal(adamjax.apply_updates(p, updates), jnp.full(1, 3e4, jnp.float16))


def test_small_updates_add_up():
    p = jnp.ones(3, jnp.bfloat16)
    tx = master_weights(adamjax.scale(-1e-4))
    state = tx.init(p)
    for _ in range(100):
        updates, state = tx.update(jnp.ones(3, jnp.bfloat16), state, p)
        p = adamjax.apply_updates(p, updates)
    assert_close(state.weights, jnp.full(3, 0.99))
    assert_same(p, jnp.full(3, 0.99).astype(jnp.bfloat16))


@pytest.mark.parametrize("rows", ["lazy", "dense", "exact"])
@pytest.mark.slow
def test_tables_move_as_float32_tables(rows):
    shape = (50, 3)
    start = jax.random.normal(jax.random.key(0), shape, jnp.bfloat16)
    ids = jax.random.randint(jax.random.key(1), (6, 8), 0, shape[0])

    def inner():
        decayed = adamjax.adamw(0.01, weight_decay=0.1, rows="dense" if rows == "exact" else rows)
        return adamjax.exact_rows(decayed, "t") if rows == "exact" else decayed

    def loss(params, ids, target):
        return jnp.mean((params["t"][ids].astype(jnp.float32) - target) ** 2)

    tx, full = master_weights(inner()), inner()
    tables = None if rows == "exact" else "t"
    step = adamjax.train_step(loss, tx, tables=tables, donate_argnums=())
    params = {"t": start}
    state = tx.init(params)

    # The same gradients for float32 tables: those of the loss at the rounded rows.
    def rounded_loss(params, ids, target):
        rows = params["t"][ids]
        rounding = rows.astype(jnp.bfloat16).astype(jnp.float32) - rows
        return jnp.mean((rows + jax.lax.stop_gradient(rounding) - target) ** 2)

    full_step = adamjax.train_step(rounded_loss, full, tables=tables, donate_argnums=())
    expected = {"t": start.astype(jnp.float32)}
    full_state = full.init(expected)
    for i in ids:
        params, state, loss_value = step(params, state, i, 0.25)
        expected, full_state, expected_loss = full_step(expected, full_state, i, 0.25)
        assert loss_value.dtype == expected_loss.dtype
        np.testing.assert_allclose(loss_value, expected_loss, rtol=1e-2)
        assert_same(params["t"], state.weights["t"].astype(jnp.bfloat16))
    if rows == "exact":
        params, state = tx.flush(params, state)
        expected, full_state = full.flush(expected, full_state)
        assert_same(params["t"], state.weights["t"].astype(jnp.bfloat16))
    # Gradients are rounded to bfloat16.
    np.testing.assert_allclose(state.weights["t"], expected["t"], atol=2e-3)


def test_flush_brings_tables_of_every_dtype_up_to_date():
    tx = master_weights(adamjax.exact_rows(adamjax.adam(0.1), "table"))
    params = {
        "table": jnp.ones((1000, 2)),
        "narrow_table": jnp.ones((1000, 2), jnp.bfloat16),
        "w": jnp.ones(2, jnp.bfloat16),
    }

    def loss(p, i):
        return jnp.sum((p["table"][i] + p["narrow_table"][i]) * p["w"])

    step, state = adamjax.train_step(loss, tx), tx.init(params)
    for i in ([3], [5], [5]):
        params, state, _ = step(params, state, jnp.array(i))
    read = adamjax.eval_step(lambda p: (p["table"][3], p["narrow_table"][3]), tx)
    expected = read(params, state)
    assert expected[0][0] < 0.85  # Adam's first step, of 0.1, and what momentum adds
    params, state = tx.flush(params, state)
    assert_close((params["table"][3], params["narrow_table"][3]), expected)
    assert_close(read(params, state), expected)


def test_flush_needs_exact_rows_directly_inside():
    inner = adamjax.exact_rows(adamjax.adam(0.1), "table")
    tx = master_weights(adamjax.chain(adamjax.clip_by_global_norm(1.0), inner))
    params = {"table": jnp.ones((30, 4), jnp.bfloat16)}
    with pytest.raises(TypeError, match=r"flush needs exact_rows directly inside, got chain"):
        tx.flush(params, tx.init(params))


def test_a_state_is_pickled_and_read_like_any_other():
    tx = master_weights(adamjax.chain(adamjax.adam(1e-3), adamjax.weight_ema(0.9)))
    state = tx.init(PARAMS)
    assert_same(pickle.loads(pickle.dumps(state)), state)
    assert adamjax.slot_names(state) == ("m", "v")
    assert adamjax.step_count(state) == 0
    assert adamjax.averaged_weights(state)["w"].dtype == jnp.float32
    assert adamjax.averaged_weights(state, PARAMS)["w"].dtype == jnp.bfloat16
    assert adamjax.learning_rate(tx, state) == 1e-3
    assert adamjax.from_config(adamjax.to_config(tx)) == tx


def test_wrong_states_and_combinations_are_refused():
    tx = master_weights(adamjax.adam(1e-3))
    state = tx.init(PARAMS)
    other = {**PARAMS, "w": PARAMS["w"][:2]}
    with pytest.raises(ValueError, match=r"the state's weights.'w'. is float32.4, 3."):
        tx.update(gradients(0), state, other)
    with pytest.raises(ValueError, match="the state's weights"):
        tx.update(gradients(0), state, wide(PARAMS))
    with pytest.raises(TypeError, match="has no flush"):
        tx.flush(PARAMS, state)
    with pytest.raises(ValueError, match=r"put it around exact_rows: master_weights"):
        adamjax.exact_rows(tx, "w")
    with pytest.raises(ValueError, match="must be last"):
        adamjax.chain(tx, adamjax.scale(1.0))
    with pytest.raises(ValueError, match="grouped"):
        adamjax.grouped(tx)
    with pytest.raises(ValueError, match="Convert the inner state with the float32 weights"):
        adamjax.convert.to_optax(state, tx, PARAMS, optax.adam(0.1))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_the_float32_weights_are_read_from_any_state(wrapper):
    tx = WRAPPERS[wrapper](master_weights(adamjax.adam(1e-3)))
    state = tx.init(PARAMS)
    _, state = tx.update(gradients(0), state, PARAMS)
    weights = adamjax.float32_weights(state, PARAMS)
    for name in "wh":
        assert weights[name].dtype == jnp.float32
        moved = np.abs(weights[name] - PARAMS[name].astype(jnp.float32))
        np.testing.assert_allclose(moved, 1e-3, rtol=1e-3)
    for name in "fnz":
        assert weights[name] is PARAMS[name]


def test_float32_weights_of_other_parameters_are_refused():
    state = master_weights(adamjax.adam(1e-3)).init(PARAMS)
    with pytest.raises(ValueError, match="float32_weights: params has the leaves"):
        adamjax.float32_weights(state, {"w": PARAMS["w"]})
    with pytest.raises(
        ValueError, match=r"float32_weights: the weight of 'w' .*pass the parameters"
    ):
        adamjax.float32_weights(state, PARAMS | {"w": PARAMS["w"].T})
    with pytest.raises(ValueError, match="the state has no master_weights"):
        adamjax.float32_weights(adamjax.adam(1e-3).init(PARAMS), PARAMS)
    tx = master_weights(adamjax.exact_rows(adamjax.adam(1e-3), "w"))
    state = tx.init(PARAMS)
    rows = adamjax.row_gradient(jnp.array([1]), jnp.ones((1, 3), jnp.bfloat16), num_rows=4)
    _, state = tx.update(gradients(0) | {"w": rows}, state, PARAMS)
    with pytest.raises(ValueError, match=r"float32_weights: .*flush"):
        adamjax.float32_weights(state, PARAMS)
