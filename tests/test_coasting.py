"""Rows that catch up at once against the recurrence, step by step in float64."""

import functools
import math
import pickle
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import avals, enable_x64

from adamjax.coasting import Coast, coasting_plan, decayed, power

INT32_MAX = 2**31 - 1
BETAS = [
    (0.9, 0.999),
    (0.9, 0.95),
    (0.95, 0.98),
    (0.0, 0.99),
    (0.5, 0.5),
    (0.9, 0.99999),
    (0.99, 0.9),
]
COASTS = {
    "adam-eps_hat": lambda b1, b2, eps: Coast(b1, math.sqrt(b2), eps),
    "adam-eps": lambda b1, b2, eps: Coast(b1, math.sqrt(b2), eps, b2),
    "amsgrad-eps_hat": lambda b1, b2, eps: Coast(b1, 1.0, eps),
    "amsgrad-eps": lambda b1, b2, eps: Coast(b1, 1.0, eps, b2),
    "adamax": lambda b1, b2, eps: Coast(b1, b2, eps),
}
CASES = [
    *(("adam-eps_hat", betas) for betas in BETAS),
    *(("adam-eps", betas) for betas in BETAS if betas[0] > 0),
    *(("adamax", betas) for betas in BETAS[:5] if betas[0] > 0),
    ("amsgrad-eps_hat", (0.9, 0.999)),
    ("amsgrad-eps", (0.9, 0.999)),
    ("amsgrad-eps", (0.5, 0.5)),
    ("amsgrad-eps", (0.99, 0.9)),
]


def make_plan(form, betas, eps=1e-7, momentum=None, decays=False):
    return coasting_plan(COASTS[form](*betas, eps), momentum, decays)


def step_scalars(plan, steps_before, steps, real, decay):
    """`a` and `b` of `Coasting.advance`, for the steps that follow the first `steps_before`."""
    rng = np.random.default_rng(0)
    i = np.arange(steps)
    bias_correction = np.sqrt(1 - 0.99 ** (steps_before + 1 + i))
    schedule = 1e-3 * (1 + np.cos(i / 40))
    set_by_hand = rng.uniform(0, 2, steps)
    a = -schedule * bias_correction * set_by_hand
    a[steps // 3 : steps // 2] *= rng.choice([-1, 0, 1], steps // 2 - steps // 3)
    a[-5:] *= 10
    b = -decay * rng.uniform(0, 1, steps) * plan.has_decay
    return a.astype(real), b.astype(real)


def initial_rows(n, eps, real, least, most):
    """p, m, x and averages of n rows. x / eps is in [least, most]; but some x and m are 0."""
    rng = np.random.default_rng(1)
    shape = (n, 24)
    x = eps * 10 ** rng.uniform(math.log10(least), math.log10(most), shape)
    m = x * rng.normal(size=shape)
    p = rng.normal(size=shape)
    average = p + 0.1 * rng.normal(size=shape)
    x[:, 0], m[:, 0], x[:, 1], m[:, 2] = 0, 0, 0, 0
    m[:, 1] = eps
    return [z.astype(real) for z in (p, m, x, average)]


class Expected(NamedTuple):
    """The result of the recurrence for each element.

    Attributes:
      moved: how far the element moved.
      average: its average after the last step.
      path_length: the sum over all steps of the sizes of its movement and its decay, by which
        errors are divided. Each movement counts as if the step had the largest |a| of all steps.
    """

    moved: np.ndarray
    average: np.ndarray
    path_length: np.ndarray


def recurrence(plan, a, b, steps_before, last, p, m, x, average, real):
    """The recurrence in float64. `last` is the step after which each row begins to coast."""
    a, b, p, m, x, average = (np.asarray(z, np.float64) for z in (a, b, p, m, x, average))
    moved, path_length, largest_a = np.zeros_like(p), np.zeros_like(p), np.abs(a).max()
    e = np.full(len(a), plan.numbers.eps)
    if plan.numbers.b2 is not None:
        t = steps_before + 1 + np.arange(len(a))
        e *= np.sqrt(-np.expm1(t * math.log(plan.numbers.b2)))
    e = np.maximum(e, np.finfo(real).tiny)
    for i in range(len(a)):
        moves = (last <= steps_before + i)[:, None]
        m = np.where(moves, plan.numbers.b1 * m, m)
        x = np.where(moves, plan.numbers.shrink * x, x)
        change = np.where(moves, a[i] * m / (x + e[i]) + b[i] * p, 0)
        sizes = largest_a * np.abs(m) / (x + e[i]) + np.abs(b[i] * p)
        path_length += np.where(moves, sizes, 0)
        p, moved = p + change, moved + change
        if plan.momentum is not None:
            new = plan.momentum * average + (1 - plan.momentum) * p
            average = np.where(moves, new, average)
    return Expected(moved, average, path_length)


def as_clock(t):
    """The clock of a state at step `t`: an int32 that wraps around."""
    return jnp.asarray((np.asarray(t, np.int64) + 2**31) % 2**32 - 2**31, jnp.int32)


@functools.partial(jax.jit, static_argnames=("plan", "history"))
def coast(plan, history, a, b, steps_before, last, rows):
    """How far rows move in the steps, and their average after them."""

    def count(clock):
        """The number of a step, which stays at the largest int32 when the clock wraps around."""
        return jnp.where((steps_before > 0) & (clock < 0), INT32_MAX, clock)

    def step(ring, scalars):
        clock, a, b = scalars
        return plan.advance(ring, clock, count(clock), a, b), None

    clocks = steps_before + 1 + jnp.arange(len(a), dtype=jnp.int32)
    ring, _ = jax.lax.scan(step, plan.init(history, a.dtype), (clocks, a, b))
    return plan.catch_up(ring, clocks[-1], count(clocks[-1]), last, *rows)


def errors(
    plan,
    *,
    history=None,
    steps_before=0,
    real=np.float32,
    eps=1e-7,
    least=1e-4,
    most=1e8,
    decay=0.01,
):
    """Relative errors of the weights and of the averages, each [n, columns].

    Each of the n rows lags behind by a different number of steps. Errors of weights are divided by
    `Expected.path_length`, and errors of averages by `path_length + |average| + |p|`.
    """
    history = history or plan.least_history
    steps = history + 37
    all_gaps = {0, 1, 2, plan.steps - 1, plan.steps, plan.steps + 1, history // 2, history - 1}
    gaps = np.array(sorted(gap for gap in all_gaps if 0 <= gap < history))
    last = steps_before + steps - gaps
    p, m, x, average = initial_rows(len(gaps), eps, real, least, most)
    a, b = step_scalars(plan, steps_before, steps, real, decay)
    rows = [jnp.asarray(z) for z in (p, m, x, average)]
    if plan.momentum is None:
        rows.pop()
    scalars = jnp.asarray(a), jnp.asarray(b)
    clocks = as_clock(steps_before), as_clock(last)
    moved, new_average = coast(plan, history, *scalars, *clocks, rows)
    expected = recurrence(plan, a, b, steps_before, last, p, m, x, average, real)
    still = gaps == 0
    assert moved.dtype == real
    assert np.all(np.asarray(moved)[still] == 0)
    error = np.abs(moved - expected.moved) / (expected.path_length + 1e-300)
    if plan.momentum is None:
        assert new_average is None
        return error, None
    assert new_average.dtype == real
    assert np.array_equal(np.asarray(new_average)[still], average[still])
    scale = expected.path_length + np.abs(average) + np.abs(p)
    return error, np.abs(new_average - expected.average) / scale


@pytest.mark.parametrize(("form", "betas"), CASES)
def test_float32_is_close_to_the_recurrence(form, betas):
    """With decay and an average, from the first step on, in the shortest ring."""
    error, of_average = errors(make_plan(form, betas, momentum=0.99, decays=True))
    assert error.max() <= 5e-7
    assert of_average.max() <= 3e-7


@pytest.mark.parametrize(
    ("form", "betas"),
    [
        *(("adam-eps_hat", betas) for betas in BETAS if betas[0] > 0),
        ("adam-eps", (0.9, 0.999)),
        ("adam-eps", (0.5, 0.5)),
        ("amsgrad-eps", (0.9, 0.999)),
        ("amsgrad-eps", (0.5, 0.5)),
        ("adamax", (0.9, 0.95)),
    ],
)
def test_the_error_of_the_series_without_rounding(form, betas):
    """A plan for float32, evaluated in float64, so that almost nothing is rounded.

    The error is up to 1e-8, because the series leaves out the movement after `plan.steps` steps,
    and up to 1e-8 more, because it has only `plan.terms` terms.
    """
    with enable_x64(True):
        error, _ = errors(make_plan(form, betas), real=np.float64)
        assert error.max() <= 2e-8


@pytest.mark.parametrize(
    ("form", "betas", "options"),
    [
        ("adam-eps_hat", (0.9, 0.999), {"eps": 1e-12}),
        ("adam-eps_hat", (0.9, 0.95), {"eps": 1e-3}),
        ("adam-eps", (0.9, 0.999), {"eps": 1.0}),
        ("adam-eps", (0.9, 0.999), {"eps": 3e-37, "least": 1.0}),  # at first, e is subnormal
        ("adam-eps", (0.9, 0.99999), {"eps": 1e-12, "steps_before": 5}),
        ("adam-eps", (0.9, 0.99999), {"steps_before": 3000}),
        # The clock wraps around.
        ("adam-eps", (0.9, 0.999), {"steps_before": INT32_MAX - 100}),
        ("adam-eps", (0.99, 0.9), {"steps_before": INT32_MAX - 1000}),
        ("adam-eps_hat", (0.99, 0.9), {"eps": 1e-12, "most": 1e30}),
        ("adamax", (0.9, 0.0), {}),
        ("adam-eps", (0.0, 0.0), {}),
        ("adam-eps", (1e-9, 1e-17), {}),
        ("adam-eps_hat", (0.9, 0.999), {"decay": 0.9}),
        ("adam-eps_hat", (0.9, 0.999), {"history": 1024}),
    ],
)
def test_extreme_betas_epsilons_and_clocks(form, betas, options):
    plan = make_plan(form, betas, options.get("eps", 1e-7), momentum=0.99, decays=True)
    error, of_average = errors(plan, **options)
    assert error.max() <= 5e-7
    assert of_average.max() <= 3e-7


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9999])
@pytest.mark.parametrize("decays", [False, True])
def test_averages_of_any_momentum(momentum, decays):
    """With the momentum 0.9999, the average forgets more slowly than the weights decay."""
    plan = make_plan("adam-eps", (0.9, 0.999), momentum=momentum, decays=decays)
    error, of_average = errors(plan, history=1024)
    assert error.max() <= 5e-7
    # As in a dense average, the roundings of 1,024 steps add up if it forgets so slowly.
    assert of_average.max() <= (6e-7 if momentum == 0.9999 else 3e-7)


@functools.partial(jax.jit, static_argnums=0)
def after_one_step(plan, last, rows):
    """How far rows move in one step, and their average after it."""
    ring = plan.advance(plan.init(plan.least_history, np.float32), 1, 1, -1.0, -0.5)
    return plan.catch_up(ring, 1, 1, last, *rows)


def test_an_average_with_momentum_1_never_changes():
    plan = make_plan("adam-eps", (0.9, 0.999), momentum=1.0, decays=True)
    assert plan == make_plan("adam-eps", (0.9, 0.999), momentum=None, decays=True)
    p, last = jnp.ones((1, 3)), jnp.zeros(1, jnp.int32)
    moved, average = after_one_step(plan, last, [p, p, p, 3 * p])
    assert (moved < -0.5).all()
    assert (average == 3).all()


@pytest.mark.slow
def test_decay_over_a_gap_of_65535_steps():
    """At step 1e5, one float32 for the running sum of logarithms would not be accurate enough."""
    plan = make_plan("adam-eps_hat", (0.9, 0.999), decays=True)
    steps = 100_000
    b = (-1e-5 * np.random.default_rng(0).uniform(0, 1, steps)).astype(np.float32)
    gaps = np.array([1, 300, 20_000, 65_535])
    p = jnp.ones((4, 1))
    a = jnp.zeros(steps)
    moved, _ = coast(plan, 65_536, a, jnp.asarray(b), 0, as_clock(steps - gaps), [p, p, p])
    expected = [np.expm1(np.log1p(b[-gap:].astype(np.float64)).sum()) for gap in gaps]
    np.testing.assert_allclose(moved[:, 0], expected, rtol=3e-7)


def test_the_running_sum_in_two_floats_is_accurate():
    """XLA must not simplify (a + b) - a to b."""
    plan = make_plan("adam-eps_hat", (0.0, 0.999), decays=True)

    @jax.jit
    def total(ring, b):
        def step(ring, scalars):
            return plan.advance(ring, scalars[0], scalars[0], 0.0, scalars[1]), None

        clocks = jnp.arange(1, len(b) + 1, dtype=jnp.int32)
        return jax.lax.scan(step, ring, (clocks, b))[0].decay[len(b) % 4]

    b = -(10 ** np.random.default_rng(0).uniform(-9, -1, 50_000)).astype(np.float32)
    high, low = np.asarray(total(plan.init(4, np.float32), jnp.asarray(b)), np.float64)
    exact = np.asarray(jnp.log1p(b)).astype(np.float64).sum()
    assert abs(low) <= abs(np.spacing(np.float32(high))) / 2
    assert abs(high + low - exact) <= 1e-9 * abs(exact)
    assert abs(high - exact) > 1e-8 * abs(exact)


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.99, 0.9)])
@pytest.mark.slow
def test_rows_of_any_shape(betas):
    """Rows without axes, rows with two axes, no rows, and `vmap` over two optimizers."""
    plan = make_plan("adam-eps", betas, momentum=0.99, decays=True)

    def after_three_steps(scale, last, rows):
        ring = plan.init(max(plan.least_history, 4), np.float32)
        for t in (1, 2, 3):
            ring = plan.advance(ring, t, t, -scale * t, -0.1 * scale)
        return plan.catch_up(ring, 3, 3, last, *rows)

    n = 5
    rows = np.random.default_rng(0).uniform(0.5, 1, (4, n, 6)).astype(np.float32)
    last = jnp.array([0, 1, 2, 3, 0], jnp.int32)
    scales = jnp.array([0.0, 0.1])
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        expected = jax.jit(after_three_steps)(0.1, last, list(rows))
        two_axes = jax.jit(after_three_steps)(0.1, last, list(rows.reshape(4, n, 2, 3)))
        no_axes = jax.jit(after_three_steps)(0.1, last, list(rows[:, :, 0]))
        no_rows = jax.jit(after_three_steps)(0.1, last[:0], list(rows[:, :0]))
        mapped = jax.vmap(after_three_steps, in_axes=(0, None, None))
        of_scales = jax.jit(mapped)(scales, last, list(rows))
    for i in range(2):
        np.testing.assert_allclose(two_axes[i].reshape(n, 6), expected[i], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(no_axes[i], expected[i][:, 0], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(of_scales[i][1], expected[i], rtol=1e-6, atol=1e-7)
        assert no_rows[i].shape == (0, 6)
    assert (of_scales[0][0] == 0).all()
    assert (expected[0][last < 3] != 0).all()


def test_catch_up_without_the_average_moves_rows_alike():
    plan = make_plan("adam-eps_hat", (0.9, 0.999), momentum=0.99, decays=True)
    last, rows = jnp.zeros(1, jnp.int32), [jnp.full((1, 2), z) for z in (1.0, 2.0, 3.0)]
    expected, _ = after_one_step(plan, last, [*rows, rows[0]])
    moved, average = after_one_step(plan, last, rows)
    assert average is None
    np.testing.assert_allclose(moved, expected, rtol=1e-6)


def test_rows_that_are_up_to_date_do_not_change():
    """Not even NaN, infinities or -0."""
    plan = make_plan("adam-eps", (0.9, 0.999), momentum=0.99, decays=True)
    odd = jnp.array([[jnp.nan, jnp.inf, -jnp.inf, -0.0, 0.0, 1.0]])
    moved, average = after_one_step(plan, jnp.ones(1, jnp.int32), [odd, odd, odd, odd])
    assert (moved == 0).all()
    assert np.asarray(average).tobytes() == np.asarray(odd).tobytes()


def test_the_ring_keeps_its_dtypes():
    """Whether the scalars of a step are Python numbers or arrays."""
    plan = make_plan("adam-eps", (0.9, 0.999), momentum=0.99, decays=True)
    ring = plan.init(256, np.float32)
    scalars = jnp.int32(1), jnp.int32(1), jnp.float32(-0.1), jnp.float32(-0.1)
    of_numbers = jax.eval_shape(lambda ring: plan.advance(ring, 1, 1, -0.1, -0.25), ring)
    of_arrays = jax.eval_shape(plan.advance, ring, *scalars)
    assert avals(of_numbers) == avals(of_arrays) == avals(ring)


@pytest.mark.parametrize(
    ("form", "betas", "terms", "history"),
    [
        ("adam-eps_hat", (0.9, 0.999), 4, 256),
        ("adam-eps_hat", (0.9, 0.95), 13, 256),
        ("adam-eps_hat", (0.95, 0.98), 11, 512),
        ("adam-eps_hat", (0.9, 0.99999), 2, 256),
        ("adam-eps_hat", (0.5, 0.5), 35, 64),
        ("adam-eps", (0.9, 0.999), 11, 256),
        ("amsgrad-eps_hat", (0.9, 0.999), 1, 256),
        ("adamax", (0.9, 0.999), 4, 256),
        # Rows of these plans catch up by replay, so there is no series.
        ("adam-eps_hat", (0.99, 0.9), 0, 2),
        ("adamax", (0.5, 0.5), 0, 2),
        # Without momentum nothing moves.
        ("adam-eps_hat", (0.0, 0.99), 0, 2),
    ],
)
def test_terms_of_the_series_and_length_of_the_ring(form, betas, terms, history):
    plan = make_plan(form, betas)
    assert plan.terms <= terms
    assert (plan.terms == 0) == (terms == 0)
    assert plan.least_history == history
    for wrong in (history // 2, history + 1, 3 * history, 0):
        with pytest.raises(ValueError, match=f"power of two of at least {history}; got {wrong}"):
            plan.init(wrong, np.float32)
    shapes = [array.shape for array in plan.init(history, np.float32) if array is not None]
    if terms:
        assert shapes == [(history, plan.terms)]
    elif betas[0] > 0:
        assert shapes == [(history, 2)]
    else:
        assert shapes == []


def test_plans_are_values():
    plan = make_plan("adam-eps", (0.9, 0.999), momentum=0.99, decays=True)
    wide = coasting_plan(Coast(*(np.float64(z) for z in plan.numbers)), np.float64(0.99), True)
    assert plan == wide == pickle.loads(pickle.dumps(plan))
    assert hash(plan) == hash(wide)
    assert plan != make_plan("adam-eps", (0.9, 0.999), momentum=0.9, decays=True)
    assert all(type(z) is float for z in (*wide.numbers, wide.momentum, wide.stretch))


@pytest.mark.parametrize("b", [0.0, 0.3, 0.9, 0.999, 0.99999, 1.0])
@pytest.mark.parametrize("history", [2, 256, 65_536])
def test_power_is_accurate_to_float32(b, history):
    k = np.unique(np.append(np.geomspace(1, history - 1, 500).astype(np.int32), [0, history - 1]))
    result = jax.jit(lambda k: power(b, k, jnp.float32, history))(jnp.asarray(k, jnp.int32))
    exact = np.power(b, k.astype(np.float64))
    normal = exact > 2 * np.finfo(np.float32).tiny
    assert result.dtype == np.float32
    np.testing.assert_allclose(result[normal], exact[normal], rtol=1.8e-7)
    np.testing.assert_allclose(result[~normal], 0, atol=4e-38)
    far = power(b, jnp.array([2**20, INT32_MAX], jnp.int32), jnp.float32, history)
    assert ((far >= 0) & (far <= 1)).all()


@pytest.mark.parametrize("k", [1, 3, 300])
def test_roundings_of_repeated_decay_do_not_drift(k):
    """They go up as often as down, so they add up only as in a random walk."""
    times, history = 3000 // k, 512

    @jax.jit
    def decay_many_times(x):
        gaps = jnp.full(len(x), k, jnp.int32)
        return jax.lax.fori_loop(0, times, lambda i, x: decayed(x, 0.999, gaps, history), x)

    x = np.random.default_rng(0).uniform(1, 2, (400, 3)).astype(np.float32)
    decayed_x = np.asarray(decay_many_times(jnp.asarray(x)), np.float64)
    ratio = decayed_x / (x * 0.999 ** (k * times)) - 1
    assert abs(ratio.mean()) <= 2e-7
    assert ratio.std() <= 3e-8 * math.sqrt(times)


def test_roundings_of_an_average_do_not_drift():
    """Weights stay at zero, and their average moves towards zero, one step at a time."""
    plan = make_plan("adam-eps", (0.0, 0.999), momentum=0.999)
    steps, last = 3000, jnp.zeros(400, jnp.int32)

    @jax.jit
    def average_many_times(average):
        zero = jnp.zeros_like(average)

        def step(_, average):
            return plan.catch_up(plan.init(2, np.float32), 1, 1, last, zero, zero, zero, average)[1]

        return jax.lax.fori_loop(0, steps, step, average)

    average = np.random.default_rng(0).uniform(1, 2, (400, 3)).astype(np.float32)
    new_average = np.asarray(average_many_times(jnp.asarray(average)), np.float64)
    ratio = new_average / (average * 0.999**steps) - 1
    assert abs(ratio.mean()) <= 2e-7


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.99, 0.9)])
@pytest.mark.slow
def test_rows_beyond_the_ring_become_nan(betas):
    """A row becomes NaN if it was last up to date before the ring begins, or after the clock."""
    plan = make_plan("adam-eps", betas, momentum=0.99, decays=True)
    history, rows = plan.least_history, jnp.ones((4, 3, 2))
    ring = plan.init(history, np.float32)
    last = 1000 - jnp.array([history - 1, history, -1], jnp.int32)
    moved, average = plan.catch_up(ring, 1000, 1000, last, *rows)
    for result in (moved, average):
        assert np.isfinite(result[0]).all()
        assert np.isnan(result[1:]).all()
