"""Stochastic rounding of moments and weights in bfloat16: their mean is that of float32."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, assert_same

import adamjax
from adamjax.rounding import rounding_keys, write_slot
from benchmarks import moments

NARROW = {"m_dtype": "bfloat16", "v_dtype": "bfloat16"}
RULES = {
    "adam": lambda **dtypes: adamjax.scale_by_adam(**dtypes),
    "nadam": lambda **dtypes: adamjax.scale_by_adam(nesterov=True, **dtypes),
    "amsgrad": lambda **dtypes: adamjax.scale_by_amsgrad(**dtypes),
    "adamax": lambda m_dtype, v_dtype: adamjax.scale_by_adamax(m_dtype=m_dtype, u_dtype=v_dtype),
}
N = 8192  # elements


def written(x, dtype="bfloat16", count=0, leaf=0, **kwargs):
    return write_slot(x, dtype, rounding_keys(jnp.int32(count), [leaf])[0], 0, **kwargs)


def wide(x):
    return np.asarray(x).astype(np.float64)


# --- one number ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [1.001, -0.3, 3e-39, 1.7e-40, 2.9e38, -7.77e10])
@pytest.mark.slow
def test_the_mean_of_stochastic_rounding_is_the_value(value):
    """The results are the value's two neighbours. Their mean is within 4 standard errors."""
    x = jnp.full(40_000, value, jnp.float32)
    y = wide(written(x))
    below, above = np.unique(y)
    assert below < np.float32(value) < above
    assert abs(y.mean() - np.float64(np.float32(value))) < 4 * y.std() / np.sqrt(y.size)


def test_values_of_bfloat16_are_unchanged():
    x = jnp.array([0.0, -0.0, 1.0, -1.5, 9.18355e-41, jnp.inf, -jnp.inf, jnp.nan], jnp.bfloat16)
    for count in range(5):
        assert_same(written(x.astype(jnp.float32), count=count), x)


def test_random_bits_differ_between_steps_leaves_and_slots():
    x = jnp.full(N, 1.001, jnp.float32)
    draws = [written(x, count=count, leaf=leaf) for count in (0, 1, 7) for leaf in (0, 1, 300)]
    keys = rounding_keys(jnp.int32(0), [0])
    draws += [write_slot(x, "bfloat16", keys[0], number) for number in (1, 2, 3, 4, 5)]
    correlation = np.corrcoef(np.stack(list(map(wide, draws)))) - np.eye(len(draws))
    assert np.abs(correlation).max() < 5 / np.sqrt(N)


@pytest.mark.slow
def test_rows_are_rounded_with_the_random_bits_of_their_positions():
    x = jnp.full((100, 3), 1.001, jnp.float32)
    ids = jnp.array([7, 99, 0])
    assert_same(written(x[ids], rows=ids), written(x)[ids])


# --- trajectories -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e4])
@pytest.mark.parametrize("kind", ["constant", "decaying", "sparse", "heavy-tailed"])
@pytest.mark.slow
def test_moments_have_no_bias(kind, scale):
    """At every tenth step, the mean error of all elements is compared with its standard error.

    Errors are relative to each element's own moment, so large moments do not dominate the mean.
    """
    g = moments.gradients(kind, 200, N) * np.float32(scale)
    ours, expected = moments.trajectory("bfloat16")(g), moments.reference(g)
    found = moments.errors(ours, expected, float32_error=1e-6)
    # There are 20 mean errors of m and 20 of v. By chance, 1 in 370 is beyond 3 standard errors.
    num_biased = 20 * sum(found["biased"].values())
    assert num_biased <= 2


def test_training_continues_from_a_pickled_state_bit_for_bit():
    """The random bits depend on the step count, which is in the state."""
    tx, params = adamjax.adam(0.1, **NARROW), {"a": jnp.ones((5, 3)), "b": jnp.ones(())}
    update = jax.jit(tx.update)

    def steps(params, state, times):
        for t in times:
            grads = jax.tree.map(lambda p, t=t: p * jnp.cos(3.0 * t), params)
            updates, state = update(grads, state, params)
            params = adamjax.apply_updates(params, updates)
        return params, state

    whole = steps(params, tx.init(params), range(6))
    half = steps(params, tx.init(params), range(3))
    saved = pickle.loads(pickle.dumps(jax.device_get(half)))
    assert_same(steps(*saved, range(3, 6)), whole)


def test_v_would_freeze_if_it_were_rounded_to_the_nearest():
    """A v that is rounded to the nearest stops far below its value; ours does not."""
    g = jnp.ones(4)
    tx, v = adamjax.scale_by_adam(**NARROW), jnp.zeros(4, jnp.bfloat16)
    state = tx.init(g)
    for _ in range(1500):
        v = (0.999 * v.astype(jnp.float32) + 0.001 * g * g).astype(jnp.bfloat16)
    state = jax.lax.fori_loop(0, 1500, lambda _, state: tx.update(g, state)[1], state)
    expected = 1 - 0.999**1500
    assert np.all(wide(v) < 0.4)
    assert np.all(np.abs(wide(state.v) - expected) < 0.1)


@pytest.mark.parametrize("rule", RULES)
def test_updates_are_near_those_of_float32(rule):
    g = moments.gradients("heavy-tailed", 100, 512)
    narrow, full = RULES[rule](**NARROW), RULES[rule](m_dtype=None, v_dtype=None)

    def run(tx):
        def step(state, g):
            u, state = tx.update(g, state)
            return state, u

        return jax.jit(lambda g: jax.lax.scan(step, tx.init(g[0]), g)[1])(jnp.asarray(g))

    ours, expected = wide(run(narrow)), wide(run(full))
    error = (ours - expected) / np.sqrt(np.mean(expected**2))
    assert abs(error.mean()) < 0.002
    assert np.sqrt(np.mean(error**2)) < 0.05


# --- other ways to compute a step -----------------------------------------------------------------


def test_a_step_without_narrow_slots_makes_no_random_bits():
    tx, g = adamjax.adam(), jnp.ones(3)
    assert "shift_right" not in str(jax.make_jaxpr(tx.update)(g, tx.init(g)))


@pytest.mark.slow
def test_jit_and_partition_change_no_bit():
    params = {"a": jnp.ones((5, 3)), "b": jnp.ones(4)}
    grads = jax.tree.map(lambda p: p * 0.123, params)
    tx = adamjax.adam(0.1, **NARROW)
    both = adamjax.partition([("b", tx)], default=tx)
    state, split = tx.init(params), both.init(params)
    for _ in range(3):
        _, split = both.update(grads, split)
        _, jitted = jax.jit(tx.update)(grads, state)
        _, state = tx.update(grads, state)
        assert_same(jitted, state)
    assert_same(adamjax.get_slot(split, "v"), adamjax.get_slot(state, "v"))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("n", [40, 9000])
@pytest.mark.slow
def test_rows_are_rounded_with_the_random_bits_of_the_dense_step(rule, n):
    """A step processes 40 rows at once, and 9,000 rows in blocks."""
    shape = (3 * n, 2)
    ids = jax.random.permutation(jax.random.key(0), shape[0])[:n]
    values = jax.random.normal(jax.random.key(1), (n, 2))
    rows = adamjax.row_gradient(ids, values, shape[0])
    tx = RULES[rule](**NARROW).replace(rows="dense")
    by_rows = by_array = tx.init(jnp.zeros(shape))
    update = jax.jit(tx.update)
    for _ in range(3):
        _, by_rows = update(rows, by_rows)
        _, by_array = update(rows.to_dense(), by_array)
    assert_close(adamjax.get_slot(by_rows, "m"), adamjax.get_slot(by_array, "m"), rtol=2**-8)
    same = [
        np.mean(np.asarray(a) == np.asarray(b))
        for a, b in zip(jax.tree.leaves(by_rows), jax.tree.leaves(by_array), strict=True)
    ]
    # The two sometimes differ by an ulp of float32, which may change how a number is rounded.
    assert min(same) > 0.999


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(("dtype", "noise"), [("bfloat16", 0.05), ("scaled8", 0.2)])
@pytest.mark.slow
def test_the_error_of_exact_rows_is_that_of_the_dense_step(rule, dtype, noise):
    """The error is the mean absolute difference of the weights from the weights in float32."""
    shape, steps = (300, 4), 150
    rng = np.random.default_rng(0)
    ids = jnp.asarray(rng.zipf(1.3, (steps, 32)) % shape[0])
    values = jnp.asarray(rng.normal(size=(steps, 32, 4)), jnp.float32)

    def chain(**dtypes):
        return adamjax.chain(RULES[rule](**dtypes), adamjax.scale(-0.01))

    full, narrow = chain(m_dtype=None, v_dtype=None), chain(m_dtype=dtype, v_dtype=dtype)
    exact = adamjax.exact_rows(narrow, "t")

    def run(tx, dense):
        def step(carry, batch):
            params, state = carry
            grads = {"t": adamjax.row_gradient(*batch, shape[0])}
            if dense:
                grads = {"t": grads["t"].to_dense()}
            updates, state = tx.update(grads, state, params)
            return (adamjax.apply_updates(params, updates), state), None

        params = {"t": jnp.zeros(shape)}
        carry, _ = jax.lax.scan(step, (params, tx.init(params)), (ids, values))
        return carry if dense else tx.flush(*carry)

    expected, ours, dense = (
        jax.jit(lambda tx=tx, d=d: run(tx, d))()[0]["t"]
        for tx, d in ((full, True), (exact, False), (narrow, True))
    )
    error, dense_error = (np.mean(np.abs(wide(x) - wide(expected))) for x in (ours, dense))
    assert error < 1.1 * dense_error
    assert dense_error < noise * np.mean(np.abs(wide(expected)))


def test_a_step_from_a_state_on_the_host_is_the_same():
    tx, p = adamjax.adam(0.1, m_dtype="bfloat16"), jnp.ones(3)
    _, state = tx.update(p, tx.init(p), p)
    assert_same(tx.update(p, jax.device_get(state), p), tx.update(p, state, p))


def test_float16_is_refused():
    for name in ("m_dtype", "v_dtype"):
        with pytest.raises(TypeError, match=f"{name} is float16, expected bfloat16"):
            adamjax.scale_by_adam(**{name: "float16"})


@pytest.mark.xfail(
    jax.__version_info__ < (0, 9), reason="older CPU compilers copy each narrow slot", strict=True
)
@pytest.mark.parametrize("rule", RULES)
def test_a_donated_step_has_no_temporaries(rule):
    """No widened copy of a leaf, and no copy of a slot."""
    tx = adamjax.chain(RULES[rule](**NARROW), adamjax.scale(-0.1))
    p = jnp.zeros((1000, 100))

    def step(p, state, g):
        updates, state = tx.update(g, state, p)
        return adamjax.apply_updates(p, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    memory = jitted.lower(p, tx.init(p), p).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.01 * p.nbytes


# --- weights --------------------------------------------------------------------------------------


def small_steps(update, steps=400, **options):
    """A bfloat16 leaf of ones after steps that are each below half of its resolution."""

    def step(i, p):
        if options:
            options["step"] = i
        return adamjax.apply_updates({"w": p}, {"w": update}, **options)["w"]

    return jax.jit(
        lambda: jax.lax.fori_loop(0, steps, step, jnp.ones(update.shape, jnp.bfloat16))
    )()


def test_weights_move_by_small_updates():
    update = jnp.full((1000, 2), 5e-4)
    assert_same(small_steps(update), jnp.ones((1000, 2), jnp.bfloat16))  # rounded to the nearest
    moved = wide(small_steps(update, rounding="stochastic"))
    assert abs(moved.mean() - 1.2) < 4 * moved.std() / np.sqrt(moved.size)


@pytest.mark.slow
def test_rows_of_weights_are_rounded_as_in_the_dense_update():
    rows = adamjax.row_gradient(jnp.array([5, 2]), jnp.full((2, 3), 1e-3), 9)
    stochastic = {"rounding": "stochastic", "step": 3}
    p = jnp.ones((9, 3), jnp.bfloat16)
    dense = adamjax.apply_updates(p, rows.to_dense(), **stochastic)
    assert_same(adamjax.apply_updates(p, rows, **stochastic), dense)
    tx = adamjax.exact_rows(adamjax.adam(1e-3), "")
    moves, _ = tx.update(rows.astype(jnp.bfloat16), tx.init(p), p)
    moved = adamjax.apply_updates(p, moves, **stochastic)
    assert np.any(np.asarray(moved[jnp.array([2, 5])]) != 1)
    assert_same(moved[0], p[0])


def test_a_stochastic_flush_after_every_step_follows_float32_on_average():
    """A row's momentum moves it by less than bfloat16's resolution in each step."""
    tx = adamjax.exact_rows(adamjax.adam(1e-3), "")
    first = adamjax.row_gradient(jnp.arange(1000), jnp.ones((1000, 2)), 1000)
    none = adamjax.row_gradient(jnp.array([0]), jnp.zeros((1, 2)), 1000)

    def run(dtype, rounding):
        def step(i, carry, grads=none):
            p, state = carry
            updates, state = tx.update(grads.astype(dtype), state, p)
            options = {"step": i} if rounding == "stochastic" else {}
            p = adamjax.apply_updates(p, updates, rounding=rounding, **options)
            return tx.flush(p, state, rounding=rounding)

        p = jnp.ones((1000, 2), dtype)
        carry = step(0, (p, tx.init(p)), first)
        return jax.lax.fori_loop(1, 20, step, carry)[0]

    run = jax.jit(run, static_argnums=(0, 1))
    expected = float(run(jnp.float32, "nearest").mean())
    frozen, moved = (wide(run(jnp.bfloat16, rounding)) for rounding in ("nearest", "stochastic"))
    assert np.all(frozen == 1)
    assert 1 - expected > 4e-3
    assert abs(moved.mean() - expected) < 4 * moved.std() / np.sqrt(moved.size)


def test_flush_refuses_unknown_roundings_and_float16():
    for dtype, rounding, problem in [
        (
            jnp.bfloat16,
            "up",
            "exact_rows.flush: rounding must be 'nearest' or 'stochastic', got 'up",
        ),
        (
            jnp.float16,
            "stochastic",
            "exact_rows.flush: params.*is float16, expected bfloat16 or wid",
        ),
    ]:
        tx, p = adamjax.exact_rows(adamjax.adam(1e-3), ""), jnp.ones((9, 2), dtype)
        with pytest.raises(ValueError, match=problem):
            tx.flush(p, tx.init(p), rounding=rounding)


def test_stochastic_rounding_changes_nothing_in_wide_dtypes():
    p = {"a": jnp.ones(3), "b": jnp.ones(2, jnp.complex64), "n": jnp.array(3)}
    u = {"a": jnp.full(3, 1e-3), "b": jnp.full(2, 1e-3j), "n": None}
    assert_same(
        adamjax.apply_updates(p, u, rounding="stochastic", step=1), adamjax.apply_updates(p, u)
    )


def test_a_step_number_counts_modulo_2_to_the_32():
    p, u = jnp.ones(64, jnp.bfloat16), jnp.full(64, 2e-3)
    low, high = (adamjax.apply_updates(p, u, rounding="stochastic", step=s) for s in (3, 2**32 + 3))
    assert_same(low, high)


def test_train_step_rounds_stochastically():
    def loss(params, x):
        return jnp.sum(params["w"].astype(jnp.float32) * x)

    params = {"w": jnp.ones(2000, jnp.bfloat16)}
    tx = adamjax.adam(1e-3)
    for rounding, expected in (("nearest", 1.0), ("stochastic", 0.9)):
        step = adamjax.train_step(loss, tx, rounding=rounding, donate_argnums=())
        p, state = params, tx.init(params)
        for _ in range(100):
            p, state, _ = step(p, state, jnp.ones(2000))
        assert abs(wide(p["w"]).mean() - expected) < 2e-3


def test_wrong_roundings_steps_and_dtypes_are_refused():
    p = jnp.ones(2, jnp.bfloat16)
    for options, message in (
        ({"rounding": "up"}, "must be 'nearest' or 'stochastic', got 'up'"),
        ({"rounding": "stochastic"}, "with no step"),
        ({"step": 3}, "with a step, which has no effect"),
        ({"rounding": "stochastic", "step": 0.5}, "step is float32.., expected an integer scalar"),
        ({"rounding": "stochastic", "step": jnp.arange(2)}, "expected an integer scalar"),
    ):
        with pytest.raises(ValueError, match=message):
            adamjax.apply_updates(p, p, **options)
    for dtype in (jnp.float16, jnp.float8_e4m3fn, jnp.float8_e5m2):
        w, wanted = {"w": p.astype(dtype)}, f"{jnp.dtype(dtype).name}, expected bfloat16 or wider"
        with pytest.raises(ValueError, match=wanted):
            adamjax.apply_updates(w, w, rounding="stochastic", step=1)
