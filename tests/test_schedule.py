"""Schedules against Keras' formulas in float64 NumPy, and rates by path."""

import copy
import fractions
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import assert_close, enable_x64, jit_and_traces

import adamjax
from adamjax import (
    by_path,
    constant,
    cosine_decay,
    exponential_decay,
    inverse_time_decay,
    piecewise_constant,
    polynomial_decay,
    scale_by_learning_rate,
    warmup,
)

# Calls a schedule that is an argument of a compiled program, so that its numbers are traced.
call_traced = jax.jit(lambda schedule, count: schedule(count))

COUNTS = [0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12, 19, 20, 21, 22, 100, 12345]


# The formulas of keras/src/optimizers/schedules/learning_rate_schedule.py, for a Python int `step`.


def keras_exponential(step, initial, decay_steps, decay_rate, staircase=False):
    p = step / decay_steps
    return initial * decay_rate ** (math.floor(p) if staircase else p)


def keras_inverse_time(step, initial, decay_steps, decay_rate, staircase=False):
    p = step / decay_steps
    return initial / (1 + decay_rate * (math.floor(p) if staircase else p))


def keras_piecewise(step, boundaries, values):
    if step <= boundaries[0]:
        return values[0]
    if step > boundaries[-1]:
        return values[-1]
    for low, high, value in zip(boundaries[:-1], boundaries[1:], values[1:-1], strict=True):
        if low < step <= high:
            return value


def keras_polynomial(step, initial, decay_steps, end, power, cycle=False):
    if cycle:
        decay_steps = decay_steps * (1 if step == 0 else math.ceil(step / decay_steps))
    else:
        step = min(step, decay_steps)
    return (initial - end) * (1 - step / decay_steps) ** power + end


def keras_cosine(step, initial, decay_steps, alpha, target=None, warmup_steps=0):
    if warmup_steps and step < warmup_steps:
        return step / warmup_steps * (target - initial) + initial
    top = initial if target is None else target
    completed = min(step - warmup_steps, decay_steps) / decay_steps
    return top * ((1 - alpha) * 0.5 * (1 + math.cos(math.pi * completed)) + alpha)


# By name, a schedule and its formula.
CASES = {
    "constant": (constant(0.3), lambda t: 0.3),
    "exponential": (exponential_decay(0.1, 7, 0.96), lambda t: keras_exponential(t, 0.1, 7, 0.96)),
    "exponential, staircase": (
        exponential_decay(0.1, 7, 0.5, staircase=True),
        lambda t: keras_exponential(t, 0.1, 7, 0.5, True),
    ),
    "exponential, growing": (
        exponential_decay(1e-3, 20_000, 1.5),
        lambda t: keras_exponential(t, 1e-3, 20_000, 1.5),
    ),
    "inverse time": (
        inverse_time_decay(0.1, 3, 0.5),
        lambda t: keras_inverse_time(t, 0.1, 3, 0.5),
    ),
    "inverse time, staircase": (
        inverse_time_decay(0.1, 3, 0.5, staircase=True),
        lambda t: keras_inverse_time(t, 0.1, 3, 0.5, True),
    ),
    "inverse time of a schedule": (
        inverse_time_decay(cosine_decay(0.1, 20), 1, 0.25),
        lambda t: keras_cosine(t, 0.1, 20, 0.0) / (1 + 0.25 * t),
    ),
    "piecewise": (
        piecewise_constant([3, 10, 20], [1.0, 0.5, 0.25, 0.125]),
        lambda t: keras_piecewise(t, [3, 10, 20], [1.0, 0.5, 0.25, 0.125]),
    ),
    "piecewise, one boundary": (
        piecewise_constant([10], [1.0, 0.5]),
        lambda t: keras_piecewise(t, [10], [1.0, 0.5]),
    ),
    "polynomial": (
        polynomial_decay(0.1, 10, 0.01, 2.0),
        lambda t: keras_polynomial(t, 0.1, 10, 0.01, 2.0),
    ),
    "polynomial, root": (
        polynomial_decay(0.1, 10, 0.0, 0.5),
        lambda t: keras_polynomial(t, 0.1, 10, 0.0, 0.5),
    ),
    "polynomial, upwards": (
        polynomial_decay(0.0, 10, 0.1),
        lambda t: keras_polynomial(t, 0.0, 10, 0.1, 1.0),
    ),
    "polynomial, cycle": (
        polynomial_decay(0.1, 10, 0.01, 2.0, cycle=True),
        lambda t: keras_polynomial(t, 0.1, 10, 0.01, 2.0, cycle=True),
    ),
    "cosine": (cosine_decay(0.1, 20, alpha=0.1), lambda t: keras_cosine(t, 0.1, 20, 0.1)),
    "cosine, warm-up": (
        warmup(cosine_decay(0.1, 10, alpha=0.1), 5, start=0.02),
        lambda t: keras_cosine(t, 0.02, 10, 0.1, target=0.1, warmup_steps=5),
    ),
    "warm-up to a float": (warmup(0.1, 4), lambda t: 0.1 * min(t / 4, 1)),
    "warm-up in a warm-up": (
        warmup(warmup(1.0, 4, start=0.5), 6),
        lambda t: 0.5 * t / 6 if t < 6 else 0.5 + 0.5 * min((t - 6) / 4, 1),
    ),
}


@pytest.mark.parametrize(("schedule", "formula"), CASES.values(), ids=CASES)
def test_a_schedule_agrees_with_the_formula_of_keras(schedule, formula):
    """Eagerly and jitted, for Python ints and arrays; in float64 up to the rounding of float64."""
    expected = np.array([formula(t) for t in COUNTS])
    for count in (int, jnp.int32):
        actual = [schedule(count(t)) for t in COUNTS]
        assert {(x.shape, x.dtype) for x in actual} == {((), jnp.dtype(jnp.float32))}
        np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-8)
    mapped = jax.jit(jax.vmap(schedule))(jnp.array(COUNTS))
    np.testing.assert_allclose(mapped, expected, rtol=2e-6, atol=1e-8)
    with enable_x64(True):
        exact = [schedule(jnp.int32(t)) for t in COUNTS]
        np.testing.assert_allclose(exact, expected, rtol=1e-14, atol=1e-17)


@pytest.mark.parametrize("steps_dtype", ["int8", "uint16", "int32", "uint32", "int64", "uint64"])
def test_steps_and_counts_may_have_any_two_integer_dtypes(steps_dtype):
    """Also uint64 and a signed dtype, which NumPy's rules promote to a float."""
    with enable_x64(True):
        schedule = exponential_decay(1.0, jnp.asarray(10, steps_dtype), 0.5, staircase=True)
        for count_dtype in ("int8", "uint8", "int32", "int64", "uint64"):
            assert schedule(jnp.asarray(20, count_dtype)) == 0.25
            assert schedule(jnp.asarray(19, count_dtype)) == 0.5


@pytest.mark.parametrize(("schedule", "formula"), CASES.values(), ids=CASES)
def test_a_schedule_may_be_an_argument_of_jit(schedule, formula):
    actual = [call_traced(schedule, t) for t in COUNTS]
    expected = [formula(t) for t in COUNTS]
    np.testing.assert_allclose(actual, expected, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize(
    "schedule",
    [
        cosine_decay(1.0, 10),
        polynomial_decay(1.0, 10, 0.0),
        exponential_decay(1.0, 10, 0.5, staircase=True),
        inverse_time_decay(1.0, 10, 0.5),
        piecewise_constant([5], [1.0, 0.5]),
        warmup(1.0, 10),
    ],
    ids=lambda schedule: type(schedule).__name__,
)
def test_a_count_below_0_makes_nan(schedule):
    """Unchecked, the linear decay would be 0.5 at count -5.

    It computes how much is left of the ten steps that a count is in. At -5 this is one half.
    """
    for call in (schedule, jax.jit(schedule)):
        for count in (-1, jnp.int32(-5), -0.5):
            assert np.isnan(call(count))
        assert np.isfinite(call(0))
    # optax calls the second schedule below count 0 too, but does not use that value.
    joined = optax.join_schedules([constant(0.25), schedule], [3])
    assert (float(joined(2)), float(joined(3))) == (0.25, float(schedule(0)))


def test_at_a_boundary_the_value_before_it_still_holds():
    rate = piecewise_constant([2, 5], [1.0, 0.5, 0.25])
    assert [float(rate(t)) for t in range(8)] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.5, 0.25, 0.25]
    assert float(piecewise_constant([], [0.5])(3)) == 0.5


def test_a_staircase_changes_at_whole_multiples():
    """Also after millions of steps, where quotients could be rounded up to a whole number."""
    counts = np.arange(0, 4_000_000, 1000)
    rate = inverse_time_decay(1.0, 1000, 1.0, staircase=True)
    for near in (-1, 0, 1):
        t = np.maximum(counts + near, 0)
        np.testing.assert_allclose(jax.vmap(rate)(t), 1 / (1 + t // 1000), rtol=1e-6)


@pytest.mark.parametrize("staircase", [False, True])
def test_a_power_of_many_steps_is_as_accurate_as_one_of_few(staircase):
    """If 0.99999 were rounded to float32, its 200,000th power would be off by 0.27%."""
    counts = np.array([0, 1, 999, 4095, 4096, 4097, 200_000, 999_999, 2**24 + 1, 2**31 - 1])
    for length, base in ((1, 0.99999), (7, 1 - 1e-7), (1000, 0.96), (390.625, 0.9), (1, 1.0001)):
        rate = exponential_decay(0.01, length, base, staircase=staircase)
        passed = np.floor(counts / length) if staircase else counts / length
        with np.errstate(over="ignore"):
            expected = 0.01 * base**passed
        actual = np.array(jax.jit(jax.vmap(rate))(counts.astype(np.int32)), np.float64)
        # Where the result is far from overflow and underflow.
        in_range = (expected > 1e-8) & (expected < 1e30)
        np.testing.assert_allclose(actual[in_range], expected[in_range], rtol=2e-6)
        assert np.all(actual[expected < 1e-50] == 0)
        assert np.all(actual[expected > 1e50] == np.inf)


# By name, a schedule that jumps or bends at multiples of a length n, and its formula.
WITH_JUMPS = {
    "exponential": (
        lambda n: exponential_decay(1.0, n, 0.5, staircase=True),
        lambda n, t: keras_exponential(t, 1.0, n, 0.5, True),
    ),
    "inverse time": (
        lambda n: inverse_time_decay(1.0, n, 0.5, staircase=True),
        lambda n, t: keras_inverse_time(t, 1.0, n, 0.5, True),
    ),
    "cycle": (
        lambda n: polynomial_decay(1.0, n, 0.25, 0.5, cycle=True),
        lambda n, t: keras_polynomial(t, 1.0, n, 0.25, 0.5, cycle=True),
    ),
    "polynomial": (
        lambda n: polynomial_decay(1.0, n, 0.0, 0.5),
        lambda n, t: keras_polynomial(t, 1.0, n, 0.0, 0.5),
    ),
}


@pytest.mark.parametrize("name", WITH_JUMPS)
def test_schedules_jump_or_bend_at_whole_multiples_of_any_length(name):
    """Each length from 2 to 129 is a constant in one compiled program."""
    make, formula = WITH_JUMPS[name]
    lengths = np.arange(2, 130)
    schedules = [make(int(n)) for n in lengths]
    call = jax.jit(lambda counts: jnp.stack([f(t) for f, t in zip(schedules, counts, strict=True)]))
    for k in (1, 2, 3, 7):
        for near in (-1, 0, 1):
            counts = k * lengths + near
            expected = [formula(int(n), int(t)) for n, t in zip(lengths, counts, strict=True)]
            np.testing.assert_allclose(call(counts), expected, rtol=2e-6, atol=1e-7)
    # In float32 the product of either of these with its reciprocal is not 1.
    for n in (41, 47):
        assert float(make(n)(n)) == np.float32(formula(n, n))


@pytest.mark.parametrize("steps", [41.0, 2.5, 0.5, 390.625, jnp.float32(41), jnp.array(41)])
@pytest.mark.parametrize("as_argument", [False, True])
def test_a_staircase_of_any_kind_of_length_changes_at_its_multiples(steps, as_argument):
    n = float(steps)
    rate = exponential_decay(1.0, steps, 0.5, staircase=True)
    # `jit` needs a hash. A schedule with arrays has none, a lambda has one.
    call = functools.partial(call_traced, rate) if as_argument else jax.jit(lambda t: rate(t))
    for t in (0, 1, 2, 3, 5, 40, 41, 42, 81, 82, 390, 391, 3125):
        assert float(call(t)) == np.float32(0.5 ** math.floor(t / n)), t


# Lengths that are no whole numbers, as numerator and denominator.
RATIOS = [(total, n) for total in (500, 1000, 1900, 3900, 7500) for n in (3, 7, 11, 13, 15)]
RATIOS += [(50_000, 96), (99, 10), (667, 10), (3, 10), (617, 5), (11, 5), (2_000_003, 7)]
RATIOS += [(1_281_167, 4096), (12 * 1_281_167, 5 * 4096), (500_000_003, 2)]


@pytest.mark.parametrize("wide", [False, True])
def test_fractional_lengths_have_whole_multiples(wide):
    """Rounded to a float, the product of such a length with a whole number may be off."""
    ratios = [fractions.Fraction(*pair) for pair in RATIOS]
    # The second multiple that is a whole number, and the counts beside it.
    counts = np.array([2 * r.numerator + i for r in ratios for i in (-1, 0, 1)], np.int32)
    passed = [t / r for r, t in zip(np.repeat(ratios, 3), counts.tolist(), strict=True)]
    lengths = [numerator / denominator for numerator, denominator in RATIOS]

    def rates(make):
        schedules = [make(n) for n in np.repeat(lengths, 3).tolist()]
        with enable_x64(wide):
            call = jax.jit(lambda t: [f(x) for f, x in zip(schedules, t, strict=True)])
            return np.array(call(counts))

    staircase = rates(lambda n: inverse_time_decay(1.0, n, 1.0, staircase=True))
    np.testing.assert_allclose(staircase, [1 / (1 + math.floor(x)) for x in passed], rtol=1e-6)
    cycle = rates(lambda n: polynomial_decay(1.0, n, 0.5, cycle=True))
    left = [1 - float(x / math.ceil(x)) for x in passed]
    np.testing.assert_allclose(cycle, 0.5 + 0.5 * np.array(left), rtol=1e-6)


@pytest.mark.parametrize("wide", [False, True])
def test_a_cycle_of_a_traced_fractional_length_ends_at_multiples(wide):
    """The remainder of a product that is whole only after rounding must not be below 0."""
    pairs = [(1000, 3), (2000, 3), (500, 6), (1000, 7), (617, 5), (469, 5), (11, 5), (100, 30)]
    counts = np.array([count for count, _ in pairs], np.int32)
    with enable_x64(wide):
        lengths = jnp.array([count / parts for count, parts in pairs])
        call = jax.vmap(lambda n, t: polynomial_decay(0.1, n, 0.001, cycle=True)(t))
        rates = np.array(jax.jit(call)(lengths, counts))
    np.testing.assert_allclose(rates, 0.001, rtol=1e-3)


# Counts around the changes of the schedules, and large ones.
EDGES = [0, 1, 2, 3, 6, 7, 8, 20, 40, 41, 42, 82, 123, 1000, 2**24 - 1, 2**24, 2**24 + 1]
EDGES += [2**30, 2**31 - 2, 2**31 - 1]
SCHEDULES = {
    **{name: schedule for name, (schedule, _) in CASES.items()},
    "staircase of 41": exponential_decay(1.0, 41, 0.5, staircase=True),
    "cycle of 41": polynomial_decay(0.1, 41, 0.01, 0.7, cycle=True),
    "cosine of 41": cosine_decay(0.1, 41, 0.01),
    "cosine of 2.5": cosine_decay(0.1, 2.5, 0.01),
    "staircase of 2.5": inverse_time_decay(0.1, 2.5, 0.3, staircase=True),
    "exponential of 41": exponential_decay(0.1, 41, 0.3),
    "long cosine": cosine_decay(0.1, 3_000_000_000),
    "long warm-up": warmup(cosine_decay(0.1, 10), 2**31 - 1),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_learning_rate_returns_the_rate_that_the_step_uses(name):
    """Bit for bit, so that a logged rate is the rate that was used."""
    schedule = SCHEDULES[name]
    tx = adamjax.chain(adamjax.clip_by_global_norm(1e30), scale_by_learning_rate(schedule))
    step = jax.jit(lambda g, state: tx.update(g, state)[0])
    for t in EDGES:
        state = ((), adamjax.states.ScheduleState(jnp.array(t, jnp.int32)))
        rate = adamjax.learning_rate(tx, state)
        used = -step(jnp.ones(3), state)
        assert np.asarray(used[0]).tobytes() == np.asarray(rate).tobytes(), (t, used, rate)
        assert np.asarray(schedule(t)).tobytes() == np.asarray(rate).tobytes(), t


@pytest.mark.parametrize("name", ["staircase of 41", "cosine of 41", "polynomial", "piecewise"])
def test_learning_rate_returns_the_rate_of_a_step_that_takes_schedules_of_arrays(name):
    tx = scale_by_learning_rate(jax.tree.map(jnp.asarray, SCHEDULES[name]))
    step = jax.jit(lambda tx, g, state: tx.update(g, state)[0])
    for t in EDGES:
        state = adamjax.states.ScheduleState(jnp.array(t, jnp.int32))
        used, rate = -step(tx, jnp.ones(3), state)[0], adamjax.learning_rate(tx, state)
        assert np.asarray(used).tobytes() == np.asarray(rate).tobytes(), t


def test_counts_are_compared_as_whole_numbers():
    """In float32, 2**24 + 1 is 2**24."""
    for wrap in (lambda f: f, jax.jit):
        rate = wrap(piecewise_constant([2**24, 2**31 - 2], [1.0, 0.5, 0.25]))
        counts = [2**24 - 1, 2**24, 2**24 + 1, 2**31 - 2, 2**31 - 1]
        assert [float(rate(t)) for t in counts] == [1.0, 1.0, 0.5, 0.5, 0.25]
        rate = wrap(warmup(1.0, 2**24 + 1))
        assert [float(rate(t)) for t in (2**23, 2**24 + 1)] == [0.5, 1.0]
        rate = wrap(warmup(piecewise_constant([1], [1.0, 0.5]), 2**24 + 1))
        assert [float(rate(2**24 + t)) for t in (1, 2, 3)] == [1.0, 1.0, 0.5]
        rate = wrap(exponential_decay(1.0, 2**24 + 1, 0.5, staircase=True))
        assert [float(rate(2**24 + t)) for t in (0, 1, 2)] == [1.0, 0.5, 0.5]
        rate = wrap(exponential_decay(1.0, 3, 0.999, staircase=True))
        same = wrap(exponential_decay(1.0, 1, 0.999))
        assert float(rate(3 * 5000)) == float(same(5000))
        # Near the end of a long linear decay, counts that differ by 2 have different rates.
        rate = wrap(polynomial_decay(1.0, 2**30, 0.0))
        np.testing.assert_allclose([rate(2**30 - t) for t in (1, 3)], [2.0**-30, 3 * 2.0**-30])


@pytest.mark.parametrize("kind", [float, np.float32, jnp.float32, jnp.array, jnp.bfloat16])
def test_boundaries_of_any_kind(kind):
    rate = piecewise_constant([kind(2), kind(5)], [1.0, 0.5, 0.25])
    for call in (rate, jax.jit(lambda t: rate(t))):
        assert [float(call(t)) for t in (0, 2, 3, 5, 6)] == [1.0, 1.0, 0.5, 0.5, 0.25]
    assert [float(call_traced(rate, t)) for t in (2, 3, 2**31 - 1)] == [1.0, 0.5, 0.25]


def test_boundaries_between_and_beyond_counts():
    boundaries = [-(2**40), -1.5, 2.5, 2**31 - 1, 2**31, 3e9, 1e38]
    values = [float(i) for i in range(8)]
    rate = piecewise_constant(boundaries, values)
    for call in (rate, jax.jit(rate)):
        assert [float(call(t)) for t in (0, 2, 3, 2**31 - 1)] == [2.0, 2.0, 3.0, 3.0]
    arrays = piecewise_constant(list(map(jnp.float32, [-3e9, 2.5, 2**24, 3e9])), values[:5])
    rates = [float(call_traced(arrays, t)) for t in (0, 3, 2**24, 2**24 + 1, 2**31 - 1)]
    assert rates == [1.0, 2.0, 2.0, 3.0, 3.0]


def test_a_cycle_of_very_many_units_of_a_fractional_length_stays_between_its_rates():
    schedule = polynomial_decay(1.0, jnp.float32(2.6), 0.1, 0.5, cycle=True)
    counts = jnp.asarray(np.arange(2**25, 2**31 - 1, 3_000_001), jnp.int32)
    rates = np.asarray(jax.jit(jax.vmap(schedule))(counts))
    assert np.all((rates >= np.float32(0.1)) & (rates < 0.102))


@pytest.mark.parametrize("count", [3 + 5j, np.complex64(3), jnp.complex64(3)])
def test_a_complex_count_is_refused(count):
    for schedule in (cosine_decay(1.0, 8), exponential_decay(1.0, 8, 0.5), warmup(1.0, 4)):
        for call in (schedule, jax.jit(schedule)):
            with pytest.raises(ValueError, match=r"a count of steps, a number up to 2147483647"):
                call(count)


# By name, a schedule that decays over n steps, and its formula.
LONG = {
    "cosine": (lambda n: cosine_decay(0.1, n), lambda n, t: keras_cosine(t, 0.1, n, 0.0)),
    "polynomial": (
        lambda n: polynomial_decay(0.1, n, 0.01),
        lambda n, t: keras_polynomial(t, 0.1, n, 0.01, 1.0),
    ),
    "cycle": (
        lambda n: polynomial_decay(0.1, n, 0.01, cycle=True),
        lambda n, t: keras_polynomial(t, 0.1, n, 0.01, 1.0, cycle=True),
    ),
    "exponential": (
        lambda n: exponential_decay(0.1, n, 0.5),
        lambda n, t: keras_exponential(t, 0.1, n, 0.5),
    ),
    "staircase": (
        lambda n: exponential_decay(0.1, n, 0.5, staircase=True),
        lambda n, t: keras_exponential(t, 0.1, n, 0.5, True),
    ),
    "inverse": (
        lambda n: inverse_time_decay(0.1, n, 0.5),
        lambda n, t: keras_inverse_time(t, 0.1, n, 0.5),
    ),
}


@pytest.mark.parametrize("name", LONG)
def test_decays_may_be_longer_than_any_run(name):
    make, formula = LONG[name]
    for n in (2**31 - 1, 2**31, 3_000_000_000, 3e9, 2**40, 10**30, 1e38, np.int64(3_000_000_000)):
        rate, call = make(n), jax.jit(make(n))
        for t in (0, 1, 2**24 + 1, 2**31 - 1):
            for value in (rate(t), call(t)):
                np.testing.assert_allclose(value, formula(float(n), t), rtol=2e-6, atol=1e-9)


def test_counts_beyond_int32_are_refused():
    for bad in (2**31, 2**40, np.int64(2**32 + 5), 10**30):
        for schedule in (cosine_decay(0.1, 10), warmup(0.1, 3), constant(0.5)):
            with pytest.raises(ValueError, match=r"count of steps.*up to 2147483647; got"):
                schedule(bad)
        with pytest.raises(
            ValueError, match=r"warmup: steps must be a whole number .* at most 2147"
        ):
            warmup(0.1, bad)
        with pytest.raises(ValueError, match=r"overwrite_frequency must be .* at most 2147483647"):
            adamjax.weight_ema(0.5, bad)
    assert float(warmup(0.5, 2**31 - 1)(2**31 - 1)) == 0.5


def test_counts_of_narrow_dtypes_do_not_wrap():
    for dtype in (jnp.int8, jnp.uint8, jnp.int16, jnp.uint32):
        rate = exponential_decay(1.0, 1000, 0.5, staircase=True)
        assert float(rate(jnp.array(100, dtype))) == 1.0
        assert float(jax.jit(piecewise_constant([300], [1.0, 0.5]))(jnp.array(100, dtype))) == 1.0


def test_a_traced_length_of_0_gives_what_a_tiny_length_gives():
    """The first rate at count 0, and then the last one. A negative length or NaN gives NaN."""
    for make, end in (
        (lambda n: cosine_decay(0.5, n, 0.5), 0.25),
        (lambda n: polynomial_decay(0.5, n, 0.25), 0.25),
        (lambda n: exponential_decay(0.5, n, 0.5), 0.0),
        (lambda n: inverse_time_decay(0.5, n, 1.0), 0.0),
    ):
        call = jax.jit(lambda n, t, make=make: make(n)(t))
        for n in (0.0, 1e-30):
            assert float(call(n, 0)) == 0.5
            np.testing.assert_allclose(call(n, 3), end, atol=1e-20)
        for bad in (-2.0, jnp.nan, -2):
            assert np.isnan(call(bad, 1))


def test_a_traced_warmup_of_0_steps_begins_with_the_rate():
    def rate(start, n):
        return warmup(0.5, n, start)(0)

    assert [float(jax.jit(rate)(0.25, n)) for n in (0, 1)] == [0.5, 0.25]
    # The slope is not NaN, though the start is divided by 0 steps.
    assert float(jax.jit(jax.grad(rate))(0.25, 0)) == 0.0


def test_a_traced_power_of_0_gives_what_a_tiny_power_gives():
    call = jax.jit(lambda power, t: polynomial_decay(0.5, 10, 0.25, power)(t))
    for power in (0.0, 1e-30):
        assert [float(call(power, t)) for t in (0, 9, 10, 11)] == [0.5, 0.5, 0.25, 0.25]


def test_a_schedule_around_a_python_function_calls_it_with_a_known_count():
    """Outside `jit` the function may need the count's value, so nothing around it is jitted."""
    table = [0.5, 0.25, 0.125]
    rate = warmup(lambda count: table[int(count)], 2)
    assert [float(rate(t)) for t in range(4)] == [0.0, 0.25, 0.5, 0.25]


def test_schedules_are_finite_at_the_largest_count():
    for name, (schedule, _) in CASES.items():
        last = schedule(jnp.array(jnp.iinfo(jnp.int32).max))
        assert np.isfinite(last) or name == "exponential, growing"  # which overflows


def test_array_hyperparameters_are_differentiable_where_rates_end():
    """At the last step of a polynomial the base of the power is 0."""
    slope = jax.grad(lambda s: s(jnp.array(10)))(polynomial_decay(0.1, 10.0, 0.01, 2.0))
    assert all(np.isfinite(x) for x in jax.tree.leaves(slope))
    assert float(slope.end_learning_rate) == 1.0


@pytest.mark.parametrize(
    "schedule",
    [
        lambda x: exponential_decay(0.7, x, 0.5),
        lambda x: inverse_time_decay(0.7, x, 0.5),
        lambda x: polynomial_decay(0.7, 3 * x, 0.1, 2.0),
        lambda x: cosine_decay(0.7, 3 * x),
    ],
    ids=["exponential", "inverse", "polynomial", "cosine"],
)
def test_rates_have_derivatives_with_respect_to_lengths_also_at_multiples(schedule, x64):
    """At a multiple of the length, a rate is computed from an exact 0."""

    def rate(length, count):
        return schedule(length)(count)

    rates, slopes = (jax.jit(jax.vmap(f, (None, 0))) for f in (rate, jax.grad(rate)))
    counts, length, h = jnp.arange(14), jnp.asarray(5.0), 1e-6
    differences = (rates(length + h, counts) - rates(length - h, counts)) / (2 * h)
    assert_close(slopes(length, counts), differences, rtol=1e-6, atol=1e-9)
    moving = jax.jit(jax.grad(rate, argnums=1))(length, 10.0)
    difference = (rate(length, 10.0 + h) - rate(length, 10.0 - h)) / (2 * h)
    assert_close(moving, difference, rtol=1e-6)


# By name: a function that makes a schedule of a number, which may be traced; and the rates of this
# schedule at count 3 if the number is 0 and if it is 0.5.
TRACED = {
    "constant": (constant, 0.0, 0.5),
    "cosine": (lambda x: cosine_decay(x, 6), 0.0, 0.25),
    "alpha": (lambda x: cosine_decay(0.5, 6, x), 0.25, 0.375),
    "exponential": (lambda x: exponential_decay(x, 3, 0.5), 0.0, 0.25),
    "decay": (lambda x: exponential_decay(1.0, 3, x), 0.0, 0.5),
    "staircase": (lambda x: exponential_decay(1.0, 1, x, staircase=True), 0.0, 0.125),
    "inverse": (lambda x: inverse_time_decay(x, 3, 1.0), 0.0, 0.25),
    "inverse decay": (lambda x: inverse_time_decay(0.75, 3, x), 0.75, 0.5),
    "polynomial": (lambda x: polynomial_decay(x, 6, 0.0), 0.0, 0.25),
    "end": (lambda x: polynomial_decay(0.5, 6, x), 0.25, 0.5),
    "power": (lambda x: polynomial_decay(0.5, 4, 0.0, x), 0.5, 0.25),
    "start": (lambda x: warmup(1.0, 6, x), 0.5, 0.75),
    "warm-up": (lambda x: warmup(x, 6), 0.0, 0.25),
    "value": (lambda x: piecewise_constant([2], [1.0, x]), 0.0, 0.5),
    "boundary": (lambda x: piecewise_constant([-1.0, x], [1.0, 0.5, 0.25]), 0.25, 0.25),
}


@pytest.mark.parametrize("name", TRACED)
def test_traced_numbers_out_of_their_range_give_nan(name):
    make, at_0, at_half = TRACED[name]
    state = adamjax.states.ScheduleState(jnp.array(3, jnp.int32))
    rate = jax.jit(lambda x: make(x)(3))
    rate_of_tx = jax.jit(lambda x: adamjax.learning_rate(scale_by_learning_rate(make(x)), state))
    # The boundary must be above -1, the one before it.
    out_of_range = (-1.0 if name == "boundary" else -0.5, -2.0, jnp.nan)
    for call in (rate, rate_of_tx):
        np.testing.assert_allclose([call(0.0), call(0.5)], [at_0, at_half], rtol=1e-6)
        for bad in out_of_range:
            assert np.isnan(call(bad)), bad


def test_boundaries_must_increase():
    """Traced boundaries that do not increase give NaN; boundaries with known values are refused."""
    call = jax.jit(lambda bounds, t: piecewise_constant(list(bounds), [1.0, 0.5, 0.25])(t))
    for kind in (jnp.int32, jnp.float32):
        assert [float(call(jnp.array([2, 5], kind), t)) for t in (2, 3, 6)] == [1.0, 0.5, 0.25]
        for bad in ([5, 2], [3, 3]):
            assert np.isnan(call(jnp.array(bad, kind), 4))
    near = jax.jit(lambda b: piecewise_constant([2**24, b, 10**10], [1.0, 0.5, 0.25, 0.1])(2**25))
    assert (float(near(2**24 + 1)), np.isnan(near(2**24))) == (0.25, True)
    for bad in ([jnp.int32(5), 3], [jnp.int32(3), 3.0], np.array([5.0, 5.0]), [9, jnp.int32(3)]):
        with pytest.raises(ValueError, match="piecewise_constant: boundaries must increase, got"):
            piecewise_constant(bad, [1.0, 0.5, 0.25])


def test_boundaries_and_values_must_be_lists():
    """A set has no order, and optax' dictionaries hold factors."""
    for bad in (5, jnp.array(5), None, 2.0, {5}, {5: 0.5}):
        with pytest.raises(TypeError, match="boundaries must be a list of numbers, got"):
            piecewise_constant(bad, [1.0, 0.5])
        with pytest.raises(TypeError, match="values must be a list of numbers, got"):
            piecewise_constant([5], bad)


def test_a_call_refuses_a_schedule_with_arrays_of_several_values():
    """Under `vmap` each call sees one value."""
    two = jnp.array([0.25, 0.5])
    for schedule, field in (
        (constant(two), "value"),
        (cosine_decay(two, 10), "initial_learning_rate"),
        (cosine_decay(0.5, 10 * two), "decay_steps"),
        (exponential_decay(0.5, 10, two), "decay_rate"),
        (inverse_time_decay(two, 10, 0.5), "initial_learning_rate"),
        (polynomial_decay(0.5, 10, two), "end_learning_rate"),
        (warmup(cosine_decay(two, 10), 3), "schedule.initial_learning_rate"),
        (warmup(0.5, jnp.array([3, 4])), "steps"),
        (piecewise_constant([3], [two, two]), r"values\[0\]"),
        (piecewise_constant([two], [0.5, 0.25]), r"boundaries\[0\]"),
    ):
        for call in (lambda s: s(4), jax.jit(lambda s: s(4))):
            with pytest.raises(ValueError, match=rf"{field} is an array of shape \(2,\), .*vmap"):
                call(schedule)
    rates = jax.vmap(lambda s: s(5))(jax.tree.map(jnp.asarray, constant(two)))
    np.testing.assert_array_equal(rates, two)
    rates = jax.vmap(lambda n: cosine_decay(0.5, n)(4))(jnp.array([4, 8]))
    np.testing.assert_allclose(rates, [0.0, 0.25], atol=1e-8)


def test_a_rate_of_0_stays_0_though_its_factor_overflows():
    for call in (lambda schedule, t: schedule(t), call_traced):
        assert float(call(exponential_decay(0.0, 1, 10.0), 60)) == 0.0
        assert float(call(inverse_time_decay(0.5, 2e-38, 0.0), 60)) == 0.5
        assert np.isinf(call(exponential_decay(0.5, 1, 10.0), 60))


@pytest.mark.parametrize("name", LONG)
def test_long_decays_go_through_jit(name):
    """In a transform that is an argument, although an integer beyond int32 cannot be one."""
    make, formula = LONG[name]
    for n in (2**31, 10**10):
        tx = adamjax.chain(adamjax.scale(1.0), scale_by_learning_rate(make(n)))
        state = ((), adamjax.states.ScheduleState(jnp.array(2**30, jnp.int32)))
        used = -jax.jit(lambda tx, s: tx.update(jnp.ones(1), s)[0])(tx, state)[0]
        np.testing.assert_allclose(used, formula(float(n), 2**30), rtol=2e-6, atol=1e-9)


def test_large_unsigned_counts_and_lengths_do_not_wrap():
    large = jnp.uint32(3_000_000_000)
    for schedule, end in (
        (cosine_decay(0.5, 10, 0.5), 0.25),
        (warmup(cosine_decay(0.5, 10, 0.5), 5), 0.25),
        (exponential_decay(0.5, 10, 0.5), 0.0),
        (piecewise_constant([10], [1.0, 0.5]), 0.5),
        (piecewise_constant([jnp.int32(10)], [1.0, 0.5]), 0.5),
        (polynomial_decay(0.5, jnp.int32(10), 0.25), 0.25),
    ):
        np.testing.assert_allclose(call_traced(schedule, large), end, atol=1e-20)
        same = [float(call_traced(schedule, dtype(7))) for dtype in (jnp.uint32, jnp.int32)]
        assert same[0] == same[1]
    half = 1_500_000_000
    call = jax.jit(lambda n: (cosine_decay(0.5, n)(half), warmup(0.5, n)(half)))
    np.testing.assert_allclose(call(large), [0.25, 0.25], rtol=1e-6)
    assert float(jax.jit(lambda b: piecewise_constant([b], [1.0, 0.5])(half))(large)) == 1.0


# --- by path ------------------------------------------------------------------------------------

PARAMS = {
    "bert": {"layers": [{"kernel": jnp.ones(2)}, {"kernel": jnp.ones(2), "bias": jnp.ones(1)}]},
    "head": {"kernel": jnp.ones(2), "bias": jnp.ones(1)},
}


def rates_of(learning_rate, params=PARAMS, step=0):
    """The learning rate of each leaf, by its path, at a step."""
    tx = scale_by_learning_rate(learning_rate)
    state = tx.init(params)
    for _ in range(step + 1):
        updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state)
    found, _ = jax.tree_util.tree_flatten_with_path(updates)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): -float(u.ravel()[0])
        for path, u in found
    }


def test_by_path_uses_the_first_pattern_that_matches_or_else_the_default():
    rates = by_path([("bert/layers/1", 0.5), ("^bert", 0.25), ("bias$", 0.125)], default=1.0)
    assert rates_of(rates) == {
        "bert/layers/0/kernel": 0.25,
        "bert/layers/1/bias": 0.5,
        "bert/layers/1/kernel": 0.5,
        "head/bias": 0.125,
        "head/kernel": 1.0,
    }


def test_by_path_searches_as_re_does():
    rates = by_path([(r"layers/\d+/k", 0.5), ("HEAD", 0.25), ("(?i)HEAD", 0.125)], default=1.0)
    assert rates.at("bert/layers/10/kernel") == 0.5
    assert rates.at("head/kernel") == 0.125
    assert rates.at("bert/layers/kernel") == 1.0
    assert by_path([("", 0.5)], default=1.0).at("anything") == 0.5
    assert by_path([], default=1.0).at("anything") == 1.0


def test_by_path_accepts_schedules_arrays_and_functions():
    rates = by_path(
        [
            ("layers/0", piecewise_constant([0], [0.5, 0.25])),
            ("layers/1", jnp.array(2.0)),
            ("head/bias", lambda count: 1.0 / (1 + count)),
        ],
        default=optax.piecewise_constant_schedule(4.0, {1: 0.5}),
    )
    for step, expected in ((0, [0.5, 2.0, 2.0, 1.0, 4.0]), (1, [0.25, 2.0, 2.0, 0.5, 2.0])):
        assert list(rates_of(rates, step=step).values()) == expected
    now = rates.resolve(0)
    assert float(now.at("bert/layers/0/kernel")) == 0.5
    assert float(now.at("head/kernel")) == 4.0


def test_by_path_has_paths_for_leaves_of_any_tree():
    assert rates_of(by_path([("^$", 0.5)], default=1.0), jnp.ones(2)) == {"": 0.5}
    assert rates_of(by_path([("^1$", 0.5)], default=1.0), (jnp.ones(2), jnp.ones(2))) == {
        "0": 1.0,
        "1": 0.5,
    }
    state = adamjax.states.ScheduleState(jnp.ones(1))
    assert rates_of(by_path([("^count$", 0.5)], default=1.0), state) == {"count": 0.5}


def test_by_path_refuses_bad_rates():
    with pytest.raises(ValueError, match=r"rate of 'a' must be a number.*got -0.1"):
        by_path([("a", -0.1)], default=0.1)
    with pytest.raises(ValueError, match=r"default must be a number.*got nan"):
        by_path([("a", 0.1)], default=math.nan)
    with pytest.raises(TypeError, match="same for all leaves"):
        by_path([("a", by_path([], default=0.1))], default=0.1)
    with pytest.raises(TypeError, match="same for all leaves"):
        warmup(by_path([], default=0.1), 3)
    with pytest.raises(TypeError, match="default"):
        by_path([("a", 0.1)])


# --- callables ----------------------------------------------------------------------------------


def plain_schedule(count):
    """A schedule that is a plain function."""
    return 0.5 / (1 + count)


@pytest.mark.parametrize(
    "schedule",
    [
        plain_schedule,
        optax.cosine_decay_schedule(0.5, 10),
        optax.warmup_cosine_decay_schedule(0.0, 0.5, 3, 10),
        optax.piecewise_constant_schedule(0.5, {2: 0.5}),
        optax.join_schedules([optax.constant_schedule(0.5), plain_schedule], [2]),
    ],
)
def test_any_callable_of_the_count_is_a_schedule(schedule):
    """Alone, in an optimizer outside `jit`, and in one that is an argument of `jit`."""
    tx, params, grads = adamjax.adam(schedule), jnp.zeros(2), jnp.ones(2)
    plain = adamjax.scale_by_adam()
    state, plain_state = tx.init(params), plain.init(params)
    step, traces = jit_and_traces(lambda tx, g, state: tx.update(g, state))
    for t in range(4):
        rate = float(schedule(jnp.array(t)))
        assert float(adamjax.learning_rate(tx, state)) == pytest.approx(rate)
        expected, plain_state = plain.update(grads, plain_state)
        np.testing.assert_allclose(tx.update(grads, state)[0], -rate * expected, rtol=1e-4)
        updates, state = step(tx, grads, state)
        np.testing.assert_allclose(updates, -rate * expected, rtol=1e-4)
    assert len(traces) == 1
    assert tx == adamjax.adam(schedule)
    assert hash(tx) == hash(adamjax.adam(schedule))


@pytest.mark.parametrize(
    "schedule",
    [
        warmup(cosine_decay(0.5, 5), 3, start=0.1),
        warmup(0.5, 3),
        warmup(lambda n: 0.5 / (n + 1), 3),
        inverse_time_decay(cosine_decay(0.5, 5), 2, 0.5),
        inverse_time_decay(warmup(piecewise_constant([2], [0.5, 0.25]), 3), 2, 0.5, True),
        inverse_time_decay(lambda n: 0.5 / (n + 1), 2, 0.5),
    ],
)
def test_a_schedule_around_another_takes_a_vector_of_counts(schedule):
    each = jnp.stack([schedule(n) for n in range(10)])
    assert_close(schedule(jnp.arange(10)), each, rtol=1e-6)
    assert_close(jax.jit(schedule)(jnp.arange(10)), each, rtol=1e-6)
    assert schedule(jnp.arange(6).reshape(2, 3)).shape == (2, 3)


def test_warmup_accepts_any_callable():
    schedule = optax.cosine_decay_schedule(1.0, 10)
    rate = warmup(schedule, 4)
    expected = [0, 0.25, 0.5, 0.75, schedule(0), schedule(1)]
    np.testing.assert_allclose([rate(t) for t in range(6)], expected, rtol=1e-6)


def test_a_rate_must_be_a_scalar():
    tx = adamjax.adam(jnp.array([0.1, 0.2]))
    with pytest.raises(ValueError, match=r"scalar, got one of shape \(2,\).*vmap"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
    tx = adamjax.adam(lambda count: jnp.ones(3))
    with pytest.raises(ValueError, match=r"scalar, got one of shape \(3,\)"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


def update_at(rate, count=0):
    """The update of a gradient of ones at a count, which is minus the rate."""
    tx = scale_by_learning_rate(rate)
    state = adamjax.states.ScheduleState(jnp.array(count, jnp.int32))
    return jax.jit(lambda s: tx.update(jnp.ones(2), s)[0])(state)


def returning(value):
    def callable_rate(_):
        return value

    return callable_rate


@pytest.mark.slow
def test_a_callable_must_return_a_number():
    """The error names the callable."""
    for bad, error, text in (
        (1j, TypeError, "real number, got a complex64"),
        (True, TypeError, "real number, got a bool"),
        (jnp.array(True), TypeError, "real number, got a bool"),
        (None, TypeError, "real number, got None of type NoneType"),
        ("0.1", TypeError, "real number, got '0.1' of type str"),
        (by_path({"a": 0.1}, default=0.1), TypeError, "real number, got by_path"),
        (jnp.ones(3), ValueError, r"scalar, got one of shape \(3,\)"),
        ([0.1], ValueError, r"scalar, got one of shape \(1,\)"),
    ):
        for make in (lambda f: f, lambda f: warmup(f, 3), lambda f: by_path({}, default=f)):
            with pytest.raises(error, match=rf"{text}.* from .*callable_rate"):
                update_at(make(returning(bad)))
    for good in (1, np.float64(0.5), jnp.bfloat16(0.5), np.int8(3)):
        np.testing.assert_allclose(update_at(returning(good)), -float(good))


# Below 0 from count 3 on.
FALLING = optax.linear_schedule(0.5, -0.5, 4)


@pytest.mark.slow
def test_a_callable_that_returns_a_number_below_0_makes_nan():
    for bad in (-0.5, jnp.float32(-0.5), -1, jnp.nan):
        assert np.isnan(update_at(returning(bad))).all()
    np.testing.assert_allclose(update_at(FALLING, 1), -0.25)
    for rate in (FALLING, lambda count: 0.5 - 0.25 * count, by_path({}, default=FALLING)):
        assert np.isnan(update_at(rate, 3)).all()
    g, decay = jnp.ones(2), adamjax.add_decayed_weights(FALLING)
    for count, expected in ((1, 0.25), (3, np.nan)):
        state = adamjax.states.ScheduleState(jnp.array(count, jnp.int32))
        np.testing.assert_allclose(decay.update(0 * g, state, g)[0], expected)


@pytest.mark.slow
def test_a_number_that_is_below_0_only_by_rounding_counts_as_0():
    ending = optax.linear_schedule(0.1, 0.0, 1000)
    used = jax.vmap(lambda t: update_at(ending, t)[0])(jnp.arange(1001))
    assert np.all((used <= 0) & (used >= -0.1))
    for rate in (lambda count: -1e-7, lambda count: jnp.float32(-1e-6)):
        assert not update_at(rate).any()
    assert np.isnan(update_at(lambda count: -2e-6)).all()


@pytest.mark.parametrize("make", [adamjax.adam, scale_by_learning_rate, adamjax.adamw])
def test_a_traced_rate_below_0_gives_nan(make):
    g = jnp.ones(2)
    step = jax.jit(lambda rate: make(rate).update(g, make(rate).init(g), g)[0])
    assert np.isfinite(step(0.5)).all()
    for bad in (-0.5, jnp.nan):
        assert np.isnan(step(bad)).all()


def test_a_class_is_refused_as_a_rate():
    for make in (
        adamjax.adam,
        lambda rate: warmup(rate, 3),
        lambda rate: by_path({"a": rate}, default=0.1),
        lambda rate: adamjax.adamw(0.1, weight_decay=rate),
    ):
        with pytest.raises(
            TypeError, match=r"got the class cosine_decay: .*cosine_decay\(\.\.\.\)"
        ):
            make(cosine_decay)


@pytest.mark.parametrize(
    ("schedule", "name", "value"),
    [
        (cosine_decay(0.1, 9), "decay_steps", -5),
        (warmup(0.1, 9), "steps", -3),
        (warmup(0.1, 9), "steps", 2.5),
        (exponential_decay(0.1, 9, 0.5), "decay_steps", -1.0),
        (polynomial_decay(0.1, 9), "decay_steps", 0),
        (piecewise_constant([5, 9], [0.3, 0.2, 0.1]), "boundaries", (9, 5)),
        (piecewise_constant([5, 9], [0.3, 0.2, 0.1]), "boundaries", (5, 5)),
    ],
    ids=repr,
)
def test_steps_and_boundaries_that_were_edited_are_refused_if_they_are_wrong(schedule, name, value):
    edited = copy.copy(schedule)
    edited.set_fields(**{name: value})
    with pytest.raises(ValueError, match=r"must (be|increase)"):
        edited(3)


def test_numbers_of_another_byte_order_are_converted():
    rate, steps, count = (np.array(x, dtype) for x, dtype in ((0.5, ">f4"), (4, ">i4"), (8, ">i4")))
    swapped = adamjax.exponential_decay(rate, steps, rate)
    assert swapped(count) == adamjax.exponential_decay(0.5, 4, 0.5)(8) == 0.125
    assert adamjax.constant(rate)(count) == 0.5
    assert adamjax.adam(rate) == adamjax.adam(jnp.float32(0.5))


def test_masked_numbers_are_refused():
    masked = np.ma.array(4, mask=True)
    for call in (
        lambda: adamjax.constant(masked),
        lambda: adamjax.exponential_decay(0.1, masked, 0.5),
        lambda: adamjax.constant(0.1)(masked),
        lambda: adamjax.adam(masked),
    ):
        with pytest.raises(TypeError, match=r"is masked int64\[\], expected no mask"):
            call()
