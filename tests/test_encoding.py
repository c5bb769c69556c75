"""Moments in 8 bits: the precision of the format, and steps compared with float64 and float32."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import export
from support import assert_close, assert_same
from test_rounding import RULES, wide

import adamjax
from adamjax.encoding import Scaled8, block_exponents, decode, encode
from benchmarks import moments

S8 = {"m_dtype": "scaled8", "v_dtype": "scaled8"}
FLOAT32 = {"m_dtype": None, "v_dtype": None}
# The largest relative error if a number is rounded to the nearest code. Codes have 3 bits of
# fraction, so neighbours differ by at most 1/8.
RELATIVE_ERROR = 1 / 16
# Codes have 3 bits of fraction down to 2**-EXPONENT_RANGE of the largest number of their block.
# Smaller codes are evenly spaced.
EXPONENT_RANGE = {np.int8: 14, np.uint8: 30}


def encoded(x, code_dtype=np.int8, random=1 << 15):
    """The array as a `Scaled8`. The default of `random` rounds each number to the nearest code."""
    x = jnp.asarray(x, jnp.float32)
    (exponents,) = block_exponents([x], [Scaled8(jnp.zeros(x.shape, code_dtype), None)])
    return encode(x, code_dtype, exponents, jnp.broadcast_to(jnp.uint32(random), x.shape))


# --- the format -----------------------------------------------------------------------------------


@pytest.mark.parametrize("code_dtype", [np.int8, np.uint8])
def test_encoding_a_decoded_code_gives_the_same_code(code_dtype):
    """With every exponent, and with any random bits."""
    every_code = np.arange(-127, 128) if code_dtype == np.int8 else np.arange(256)
    exponents = jnp.arange(256, dtype=jnp.uint8)[:, None]
    blocks = Scaled8(
        jnp.broadcast_to(jnp.asarray(every_code, code_dtype), (256, every_code.size)), exponents
    )
    numbers = decode(blocks)
    num_finite = 250 - EXPONENT_RANGE[code_dtype] + 1  # larger exponents decode to NaN
    assert np.all(np.isnan(numbers[num_finite:]))
    finite = numbers[:num_finite]
    assert np.all(np.isfinite(finite))
    assert np.all(np.diff(wide(finite), axis=1) > 0)
    for random in (0, 1, 1 << 15, (1 << 16) - 1):
        again = encoded(finite, code_dtype, random)
        assert_same(again, Scaled8(blocks.codes[:num_finite], blocks.exponents[:num_finite]))


@pytest.mark.parametrize("code_dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("shape", [(), (1,), (1024,), (3000,), (7, 5), (3, 2, 300), (0,), (3, 0)])
def test_the_error_of_rounding_to_the_nearest_is_bounded(shape, code_dtype):
    """The error is at most 1/16 of the number, or half of the spacing of the smallest codes.

    In uint8 it may be the whole spacing, because a number that is not 0 never becomes 0.
    """
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape) * np.exp(4 * rng.normal(size=shape))
    x = np.where(rng.random(shape) < 0.1, 0, x).astype(np.float32)
    x = x if code_dtype == np.int8 else abs(x)

    @jax.jit
    def encode_and_decode(x):
        in_8_bits = encoded(x, code_dtype)
        return in_8_bits, decode(in_8_bits)

    in_8_bits, y = encode_and_decode(x)
    y = wide(y)
    assert in_8_bits.codes.shape == shape
    if x.ndim < 2:
        assert in_8_bits.exponents.shape == ((-(-x.size // 1024),) if shape else ())
    else:
        assert in_8_bits.exponents.shape == (*shape[:-1], min(1, shape[-1]))
    assert np.all(y[x == 0] == 0)
    if code_dtype == np.uint8:
        assert np.all(y[x != 0] != 0)
    # The spacing is computed from the maximum of the array. That of a block may be smaller.
    spacing = 2.0 ** -(EXPONENT_RANGE[code_dtype] + 3) * abs(x).max(initial=0)
    largest_error = (0.5 if code_dtype == np.int8 else 1) * spacing
    assert np.all(abs(y - x) <= np.maximum(RELATIVE_ERROR * abs(x), largest_error))
    assert np.all(np.sign(y) * np.sign(x) >= 0)


@pytest.mark.parametrize("code_dtype", [np.int8, np.uint8])
@pytest.mark.parametrize("value", [1.0, 1.01, 0.3337, 3e-5, 4e-9])
def test_the_mean_of_stochastic_rounding_is_the_value(code_dtype, value):
    """The value is rounded to two neighbouring codes. Their mean is within 4 standard errors.

    Each block has the value and a 1, so the value may be much smaller than the block's largest.
    """
    if code_dtype == np.int8 and value < 1e-5:
        pytest.skip("below the smallest int8 code, so too few results are not zero")
    n = 40_000
    x = np.full((n, 2), value, np.float32)
    x[:, 1] = 1
    random = np.random.default_rng(0).integers(0, 1 << 16, (n, 2))
    y = wide(decode(encoded(x, code_dtype, jnp.asarray(random, jnp.uint32))))[:, 0]
    assert len(np.unique(y)) <= 2
    assert abs(y.mean() - np.float64(np.float32(value))) <= 4 * y.std() / np.sqrt(n)


def test_a_positive_number_in_uint8_is_never_rounded_to_zero():
    x = jnp.array([[1e4, 1e-30, 0.0], [1.2e-38, 2e-38, 1e-9]])
    y = decode(encoded(x, np.uint8, 0))
    assert np.all((np.asarray(y) > 0) == (np.asarray(x) > 0))


def test_a_number_that_is_not_finite_makes_only_its_block_nan():
    # 3.4e38 is finite, but would overflow if it were rounded up to a code.
    for bad in (jnp.inf, -jnp.inf, jnp.nan, 3.4e38):
        y = decode(encoded(jnp.array([[1.0, bad], [1.0, 0.0]])))
        assert_same(np.isnan(y), np.array([[True, True], [False, False]]))
    assert np.all(np.isfinite(decode(encoded(jnp.array([3.1e38, 1.0])))))


def test_a_negative_number_makes_a_uint8_block_nan():
    y = decode(encoded(jnp.array([1.0, -1.0]), np.uint8))
    assert np.all(np.isnan(y))


def test_m_and_v_need_two_bytes_a_parameter_and_two_a_block():
    def size(*shape):
        state = jax.eval_shape(adamjax.scale_by_adam(**S8).init, jnp.zeros(shape))
        parts = jax.tree.leaves((state.m, state.v))
        return sum(x.size * x.dtype.itemsize for x in parts) / np.prod(shape)

    assert size(1000, 256) < 2.01
    assert size(1000, 10) == 2.2
    assert size(1 << 20) < 2.002


# --- steps ----------------------------------------------------------------------------------------


def run(tx, g):
    """The updates and the slots after each step. The first axis of `g` is the steps."""

    def step(state, g):
        u, state = tx.update(g, state)
        slots = {name: adamjax.get_slot(state, name) for name in adamjax.slot_names(state)}
        return state, (u, slots)

    return jax.jit(lambda g: jax.lax.scan(step, tx.init(g[0]), g)[1])(jnp.asarray(g))


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e4])
@pytest.mark.parametrize("kind", ["constant", "decaying", "sparse", "heavy-tailed"])
def test_moments_are_those_of_float64_within_derived_errors(kind, scale):
    """The moments of 200 steps are finite and have no bias, and m has the right sign.

    The error of m: a step rounds m by at most 1/8 of it, and multiplies earlier errors by b1. So
    the error of an element is at most 1/8 / (1 - b1) = 1.25 times the largest |m| that it has had.

    The error of v: a rounding that moves v by d * v with probability p has at most the variance
    p * (d * v)**2. On average it must move v by p * d * v = (1 - b2) * g**2, and d is at most 1/8.
    So after 200 steps, the error has at most the variance 1/8 * sum((1 - b2) * g**2 * v).
    """
    n = 4096
    g = moments.gradients(kind, 200, n) * np.float32(scale)
    u, slots = run(adamjax.scale_by_adam(**S8), g)
    assert np.all(np.isfinite(u))
    ms, vs, _ = moments.reference(g, every=1)
    m, v = wide(slots["m"]), wide(slots["v"])
    largest_of_step = abs(ms).max(axis=1, keepdims=True)
    # The spacing of the smallest codes is 2**-17 of the largest m of the block. Twice that, because
    # the largest m has an error too.
    spacing = 2 * 2.0**-17 * largest_of_step
    largest_so_far = np.maximum.accumulate(abs(ms), axis=0) + spacing
    assert np.all(abs(m - ms) <= 1.25 * largest_so_far + 1e-6 * largest_of_step)
    # The sign is right where m is larger than its largest possible error.
    above = abs(ms) > 1.25 * largest_so_far
    assert np.all(np.sign(m[above]) == np.sign(ms[above]))
    assert np.all((v > 0) == (vs > 0))
    every_tenth = slice(9, None, 10)
    moved = (1 - 0.999) * g.astype(np.float64) ** 2
    variance = np.cumsum(moved * np.maximum.accumulate(vs), axis=0) / 8
    relative = ((v - vs) / np.sqrt(variance + (1e-9 * vs.max()) ** 2))[every_tenth]
    assert np.sqrt(np.mean(relative**2)) < 1.5
    # Of 40 mean errors, 2 may be more than 3.5 standard errors from 0. By chance, 1 in 2,000 is.
    biased = 0
    for x, y in ((m, ms), (v, vs)):
        size = np.maximum(abs(y), 1e-2 * abs(y).max(axis=1, keepdims=True))
        for error in ((x - y) / size)[every_tenth]:
            biased += abs(error.mean()) > 3.5 * error.std() / np.sqrt(n) + 1e-6
    assert biased <= 2


@pytest.mark.parametrize("rule", RULES)
def test_updates_are_near_those_of_float32(rule):
    """Their size is right within 2%, and the RMS of their errors is below 14% of their RMS."""
    g = moments.gradients("heavy-tailed", 200, 4096)
    u, float32_u = (wide(run(RULES[rule](**dtypes), g)[0]) for dtypes in (S8, FLOAT32))
    size = np.sqrt(np.mean(float32_u**2))
    slope = np.mean(u * float32_u) / np.mean(float32_u**2)
    assert abs(slope - 1) < 0.02
    assert np.sqrt(np.mean((u - float32_u) ** 2)) < 0.14 * size


@pytest.mark.parametrize("rule", ["adam", "amsgrad"])
def test_the_noise_of_long_runs_is_as_documented(rule):
    """After 5,000 steps, the noise of v no longer grows, because v has a memory of 1,000 steps.

    The noise is described in the documentation of `adamjax.scale_by_adam`.
    """
    ours, float32_tx = (RULES[rule](**dtypes) for dtypes in (S8, FLOAT32))
    scale = jnp.exp(jax.random.normal(jax.random.key(1), (4096,)))

    def step(states, t):
        g = scale * jax.random.normal(jax.random.fold_in(jax.random.key(0), t), scale.shape)
        u, state = ours.update(g, states[0])
        float32_u, float32_state = float32_tx.update(g, states[1])
        sums = jnp.stack(
            [jnp.sum((u - float32_u) ** 2), jnp.sum(u * float32_u), jnp.sum(float32_u**2)]
        )
        return (state, float32_state), sums

    start = ours.init(scale), float32_tx.init(scale)
    states, sums = jax.jit(lambda: jax.lax.scan(step, start, jnp.arange(5000)))()
    error, product, square = np.asarray(sums)[-100:].sum(axis=0)
    v, float32_v = (wide(adamjax.get_slot(state, "v")) for state in states)
    assert abs(np.mean(v / float32_v) - 1) < 0.02
    assert np.std(v / float32_v) < 0.25
    assert np.sqrt(error / square) < 0.16
    # v_max is the largest of the rounded v, so AMSGrad's updates are smaller than in float32.
    least, most = (0.88, 1.0) if rule == "amsgrad" else (1.0, 1.02)
    assert least < product / square < most


def test_a_small_gradient_beside_a_large_one_makes_no_large_update():
    """One block has gradients from 1e-9 to 1e4. No update is 3 times the largest of float32.

    The error of m may be 2**-17 of the largest |m| of the block. The root of v is at least 2**-17
    of the block's largest root. So rounding adds to an update at most about the largest |m| divided
    by the largest root.
    """
    rng = np.random.default_rng(0)
    g = np.geomspace(1e-9, 1e4, 1024) * rng.choice([-1, 1], (400, 1024))
    u, _ = run(adamjax.scale_by_adam(**S8), g.astype(np.float32))
    float32_u, _ = run(adamjax.scale_by_adam(), g.astype(np.float32))
    assert np.all(np.isfinite(u))
    assert np.abs(u).max() < 3 * np.abs(float32_u).max()


def test_without_gradients_m_stays_zero_or_decays_to_it():
    tx = adamjax.scale_by_adam(0.5, 0.6, **S8)
    state = tx.init(jnp.zeros((2, 3)))
    _, state = tx.update(jnp.array([[1.0, -2.0, 0.0], [0.0, 0.0, 0.0]]), state)
    update = jax.jit(tx.update)
    for _ in range(400):
        u, state = update(jnp.zeros((2, 3)), state)
        assert np.all(np.isfinite(u))
    assert np.all(state.m.codes[1] == 0)
    assert np.abs(adamjax.get_slot(state, "m")).max() < 1e-30


# --- other code that reads and writes slots -------------------------------------------------------


# A step processes 9,000 rows in blocks. Only the rule with the most slots is tested with so many.
@pytest.mark.parametrize(("rule", "n"), [*((rule, 40) for rule in RULES), ("amsgrad", 9000)])
def test_rows_are_rounded_with_the_random_bits_of_the_dense_step(rule, n):
    """Compares row gradients under `rows="dense"` and `rows="lazy"` with dense gradients."""
    shape, rng = (3 * n, 2), np.random.default_rng(0)
    ids = rng.permutation(shape[0])[:n]
    rows = adamjax.row_gradient(ids, rng.normal(size=(n, 2)).astype(np.float32), shape[0])
    tx = RULES[rule](**S8).replace(rows="dense")
    lazy = tx.replace(rows="lazy")
    states = [tx.init(jnp.zeros(shape))] * 3
    for _ in range(3):
        states = [
            jax.jit(tx.update)(rows, states[0])[1],
            jax.jit(tx.update)(rows.to_dense(), states[1])[1],
            jax.jit(lazy.update)(rows, states[2])[1],
        ]
    for name in adamjax.slot_names(states[0]):
        by_rows, by_array, lazily = (np.asarray(adamjax.get_slot(s, name)) for s in states)
        # Before rounding, numbers may differ by an ulp of float32. This seldom changes the code.
        assert np.mean(by_rows == by_array) > 0.999
        assert np.mean(by_rows[ids] == lazily[ids]) > 0.999
        assert np.all(np.delete(lazily, ids, axis=0) == 0)


def trained(tx, steps, params, state, update=None):
    """The parameters and the state after the steps with these numbers."""
    update = update or jax.jit(tx.update)
    for t in steps:
        grads = jax.tree.map(
            lambda p, t=t: jnp.cos(t + jnp.arange(p.size)).reshape(p.shape), params
        )
        updates, state = update(grads, state, params)
        params = adamjax.apply_updates(params, updates)
    return params, state


PARAMS = {"a": jnp.ones((5, 30)), "b": jnp.ones(1500), "c": jnp.ones(())}


def test_training_continues_from_a_pickled_state_bit_for_bit():
    tx = adamjax.adamw(0.1, **S8)
    whole = trained(tx, range(6), PARAMS, tx.init(PARAMS))
    half = trained(tx, range(3), PARAMS, tx.init(PARAMS))
    saved = pickle.loads(pickle.dumps(jax.device_get(half)))
    assert_same(trained(tx, range(3, 6), *saved), whole)


def test_an_exported_update_computes_the_same_bits():
    tx = adamjax.adam(0.1, **S8)
    state = tx.init(PARAMS)
    exported = export.export(jax.jit(tx.update))(PARAMS, state, PARAMS)
    again = export.deserialize(exported.serialize())
    ours, theirs = (trained(tx, range(3), PARAMS, state, update) for update in (None, again.call))
    assert_same(theirs, ours)


def test_wrappers_do_not_change_the_results():
    tx = adamjax.adam(0.1, **S8)
    alone = trained(tx, range(3), PARAMS, tx.init(PARAMS))
    for wrapper in (
        adamjax.skip_not_finite(tx),
        adamjax.partition([("b", tx)], default=tx),
        adamjax.with_hyperparams(tx, learning_rate=0.1),
        adamjax.from_config(adamjax.to_config(tx)),
    ):
        params, state = trained(wrapper, range(3), PARAMS, wrapper.init(PARAMS))
        assert_close(params, alone[0], rtol=1e-6)
        assert_same(adamjax.get_slot(state, "v"), adamjax.get_slot(alone[1], "v"))


def test_complex_parameters_have_a_complex_m_and_a_v_in_8_bits():
    p = {"z": jnp.ones((3, 4), jnp.complex64)}
    state = adamjax.scale_by_adam(**S8).init(p)
    assert state.m["z"].dtype == jnp.complex64
    assert isinstance(state.v["z"], Scaled8)
    u, _ = adamjax.scale_by_adam(**S8).update(p, state)
    assert_close(u["z"], p["z"], rtol=0.1)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(1000, 512), (1 << 18,)])
def test_a_donated_step_has_no_temporaries(rule, shape, request):
    """No floats of a leaf's size, no copy of its codes: only an int32 for each block and slot."""
    if rule == "amsgrad" and jax.__version_info__ >= (0, 12):
        reason = "this CPU compiler stores a float for each element"
        request.applymarker(pytest.mark.xfail(reason=reason, strict=True))
    tx = adamjax.chain(RULES[rule](**S8), adamjax.scale(-0.1))
    p = jnp.zeros(shape)

    def step(p, state, g):
        updates, state = tx.update(g, state, p)
        return adamjax.apply_updates(p, updates), state

    jitted = jax.jit(step, donate_argnums=(0, 1))
    memory = jitted.lower(p, tx.init(p), p).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.01 * p.nbytes


# --- errors ---------------------------------------------------------------------------------------


def test_unsupported_uses_of_8_bit_moments_are_refused():
    tx, p = adamjax.adam(0.1, **S8), {"a": jnp.ones((3, 4)), "b": jnp.ones(4)}
    state = tx.init(p)
    rows = {**p, "b": adamjax.row_gradient(jnp.array([1]), jnp.ones(1), 4)}
    with pytest.raises(ValueError, match=r"give the table the shape \[4, 1\]"):
        tx.update(rows, state)
    with pytest.raises(ValueError, match=r"the table 'b' needs rows with exponents of their own"):
        adamjax.exact_rows(tx, "b").init(p)
    with pytest.raises(ValueError, match="leaves of one bucket would share exponents"):
        adamjax.grouped(tx)
    with pytest.raises(TypeError, match="has no derivative"):
        jax.grad(lambda x: tx.update({"a": x}, tx.init({"a": x}))[0]["a"].sum())(p["a"])
    with pytest.raises(TypeError, match="'scaled8' for 8 bits, or None; got 'int8'"):
        adamjax.adam(m_dtype="int8")
    theirs = optax.adam(0.1)
    with pytest.raises(ValueError, match="from_optax: moments of 'a' are in 'scaled8'"):
        adamjax.convert.from_optax(theirs.init(p), tx, p, theirs)
    with pytest.raises(ValueError, match="conversions do not round"):
        adamjax.convert.to_optax(state, tx, p, theirs)


def test_states_of_other_formats_or_shapes_are_refused():
    tx, p = adamjax.scale_by_adam(**S8), jnp.ones((3, 4))
    float32_tx = adamjax.scale_by_adam()
    state = tx.init(p)
    with pytest.raises(ValueError, match="keeps m in floats, expected scaled8"):
        tx.update(p, float32_tx.init(p))
    with pytest.raises(ValueError, match="keeps m in scaled8, expected floats"):
        float32_tx.update(p, state)
    with pytest.raises(ValueError, match="which must not be cast"):
        tx.update(p, jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.ndim else x, state))
    with pytest.raises(ValueError, match=r"exponents of shape \[3\] with codes of shape \[3, 4\]"):
        tx.update(p, state._replace(m=state.m._replace(exponents=jnp.zeros(3, jnp.uint8))))
    with pytest.raises(ValueError, match="expected int8 in m and uint8 in the others"):
        tx.update(p, state._replace(m=state.v))
    with pytest.raises(ValueError, match=r"scaled8\[3, 5\]"):
        tx.update(p, tx.init(jnp.ones((3, 5))))
