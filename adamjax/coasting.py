"""Computes where a row is after many steps without a gradient, at the cost of one step.

A row has a gradient at step s, and then none for k steps. So its moments decay by known powers, and
its steps depend on a few scalars that all rows share. Step t = s + j moves the row to

    p_t = (1 + b_t) p_{t-1} + a_t m_t / (x_t + e_t)        m_t = b1**j m,  x_t = shrink**j x

Here x measures the gradients' size (see `Coast.shrink` for each rule). `a_t` is the step size
with its sign, the learning rate and the bias correction. `b_t` is minus the learning rate times the
decoupled weight decay. `e_t` is eps, or `eps * sqrt(1 - b2**t)` in Adam's algorithm 1. `a_t` and
`b_t` need not be known before step t, so schedules and rates set by hand are exact as well.

**One function of one variable.** With `e = e_{s+1}` and sigma = e / (x + e), in (0, 1], x is
(1 - sigma) (x + e). So without weight decay,

    p_t = p_s + m / (x + e) * G_t(sigma)
    G_t(sigma) = sum over j of a_{s+j} * w_j(sigma)
    w_j(sigma) = b1**j / ((1 - sigma) * shrink**j + sigma * e_{s+j} / e)

G depends on the row only through s and sigma. It is smooth in

    u = log(1 + sigma * d) / log(1 + d)

For a good d, the poles of G are evenly spread in u. A few Chebyshev coefficients in u give G to
1e-8; a few more give it to 1e-13, for rows that catch up in float64. A ring has these coefficients
for each of the last start steps s. Step t adds `a_t` times the coefficients of `w_{t-s}` to the
entries of the last K start steps; for older start steps (b1 / shrink)**j is negligible. A row
catches up by reading its entry and evaluating the series at its elements, however long it has
lagged behind.

**Decay.** With C_t the product of `1 + b` over the steps s+1, ..., t,

    p_t = C_t p_s + m / (x + e) * G_t(sigma)               G_t = (1 + b_t) G_{t-1} + a_t w_{t-s}

for K steps, after which G decays like the weights. C is the exponential of the difference of two
running sums of `log1p(b)`. Each sum is stored in two floats: in one float32, it would be off by
4e-4 after a gap of 65,536 steps at step 1e5.

**Average.** `avg_t = momentum * avg_{t-1} + (1 - momentum) * p_t` is `p_t + h_t`. Its distance
h_t = momentum * (h_{t-1} + p_{t-1} - p_t) is a sum of three terms:

    h_t = momentum**k h_s + kappa_t p_s + m / (x + e) * Q_t(sigma)
    Q_t = momentum * (Q_{t-1} + G_{t-1} - G_t)
    kappa_t = momentum * (kappa_{t-1} + C_{t-1} - C_t)

from kappa_s = Q_s = 0. After K steps only decay moves the row, so Q is updated for K steps too.
After step r = s + K, the term with G decays like weights p_r, so

    Q_t = momentum**(t - r) Q_r + kappa_t G_r              with the kappa of start step r

**Replay.** If b1 is not well below shrink, the terms do not become negligible before x has fallen
below eps, and no short series gives G. Then the ring has `(a_t, b_t)`, and the recurrence is
repeated step by step, for at most as many steps as can move a row. So the cost of a row grows with
the steps that it lags behind. A short ring limits these steps.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.data import exportable
from adamjax.mesh import gather_entries
from adamjax.moments import barrier

__all__ = ["Coast", "Coasting", "Ring", "coasting_plan", "decayed", "power"]

# The largest error, as a fraction of a row's whole movement, by the dtype of the computation.
_TOLERANCE = {np.dtype(np.float32): 1e-8, np.dtype(np.float64): 1e-13}
# The most coefficients that a series may have; b1 = b2 = 0.5 needs 35.
_MOST_TERMS = 40
# The logarithm in u costs as much as this number of coefficients.
_LOGARITHM_COST = 4
# The largest x that a replay allows for: the square root of the largest float32.
_LARGEST_SIZE = 2.0**64


class Coast(NamedTuple):
    """How a rule moves rows without a gradient: the result of `Rule.coast`.

    Let m be the average of gradients, and x the measure of their size that the rule divides by:
    `sqrt(v)` for Adam. In a step without a gradient, both must decay: m becomes `b1 * m`, and x
    becomes `shrink * x`. The rule's update of each element must then be

        momentum_coefficient * m / (x + eps)

    with the slots after the step. `Rule.momentum_coefficient` returns the factor: one number for
    all rows, such as Adam's bias correction. It does not include the learning rate, by which a
    later transform multiplies. With `size=None` there is no divisor, and the update must be
    `momentum_coefficient * m`.

    Attributes:
      b1: decay of the average m, in [0, 1).
      shrink: decay of the size x per step, in [0, 1]: `sqrt(b2)` for Adam, where x is `sqrt(v)`;
        `b2` for Adamax, where x is u; 1 for AMSGrad, where x is `sqrt(v_max)`.
      eps: the number added to x; 0 stands for the smallest normal number.
      b2: `None` if the divisor is `x + eps` in every step. If the divisor of step t is x plus
        `max(eps * sqrt(1 - b2**t), tiny)`, as in Adam's algorithm 1, this is the decay of v, in
        [0, 1). (tiny is the smallest normal number.)
      momentum: the name of the slot m.
      size: the name of the slot that measures the gradients' size. `None` if the rule does not
        divide by such a slot: then `shrink`, `eps` and `b2` have no effect. Otherwise `shrink` and
        `eps` are required.
      squared: whether that slot is x**2 rather than x.
      decays: pairs (name of a slot, its decay per step), for all slots that decay.

    >>> from adamjax.extend import Coast
    >>> adam = Coast(0.9, 0.999**0.5, 1e-7, decays=(("m", 0.9), ("v", 0.999)))
    >>> momentum = Coast(0.9, size=None, decays=(("m", 0.9),))
    """

    b1: float
    shrink: float | None = None
    eps: float | None = None
    b2: float | None = None
    momentum: str = "m"
    size: str | None = "v"
    squared: bool = True
    decays: tuple[tuple[str, float], ...] = ()


class Numbers(NamedTuple):
    """The numbers of a `Coast` that determine how rows move. They are in the name of a ring."""

    b1: float
    shrink: float
    eps: float
    b2: float | None


@exportable
class Ring(NamedTuple):
    """An entry for each of the last start steps; the entry of step s is at `s % history`.

    A field that the plan does not need is `None`. The dtype is the one given to `Coasting.init`.

    Attributes:
      series: [history, terms], or [history, 2 * terms] with an average: the coefficients of G_t
        and then of Q_t, up to step s + K.
      rates: [history, 2], for replay: `a_s` and `b_s`.
      decay: [history, 2], with decay: the sum of `log1p(b)` up to step s, in two floats.
      kappa: [history], with decay and an average: `kappa_t`.
    """

    series: chex.Array | None = None
    rates: chex.Array | None = None
    decay: chex.Array | None = None
    kappa: chex.Array | None = None


class _Lag(NamedTuple):
    """The steps by which n rows lag behind.

    Attributes:
      last: int32 [n], the clock at which each row was last up to date.
      gap: int32 [n], the number of steps since then.
      end: int32 [n], the clock after which only decay moves each row.
      now: int32 scalar, the number of the last step; unlike the clock, it does not wrap around.
    """

    last: chex.Array
    gap: chex.Array
    end: chex.Array
    now: chex.Array

    def step_number(self, j: Any) -> chex.Array:
        """The number of the j-th step after `last`, at most `now`."""
        return self.now - jnp.maximum(self.gap - j, 0)


def coasting_plan(
    coast: Coast, momentum: float | None, has_decay: bool, real: Any = np.float32
) -> "Coasting":
    """Plans how the rows of a rule catch up.

    Args:
      coast: how the rule moves rows.
      momentum: the momentum of an average of the weights, in [0, 1]; `None` without an average.
      has_decay: whether b may differ from 0.
      real: the dtype in which rows catch up, float32 or float64.
    """
    # With momentum 1 the average never changes, so it need not catch up.
    momentum = None if momentum is None or momentum == 1 else float(momentum)
    # If b2 is 0 or None, every step adds eps to x.
    b2 = float(coast.b2) if coast.b2 else None
    shrink, eps = coast.shrink, coast.eps
    if coast.size is None:
        # Here x is 0, so with an eps of 1, m / (x + e) is m.
        shrink, eps, b2 = 1.0, 1.0, None
    if shrink is None or eps is None:
        raise TypeError(
            f"exact_rows: the rule divides by its slot {coast.size!r}, so its Coast must give "
            f"shrink and eps, got {coast}; size=None is for a rule that does not divide"
        )
    numbers = Numbers(float(coast.b1), float(shrink), float(eps), b2)
    steps, terms, stretch = _steps_and_series(numbers, _TOLERANCE[np.dtype(real)])
    return Coasting(numbers, momentum, has_decay, steps, terms, stretch)


@dataclass(frozen=True)
class Coasting:
    """A plan for how rows catch up, static and hashable; see `coasting_plan`.

    Attributes:
      numbers: the rule's numbers; b2 is `None` if it does not matter.
      momentum: the average's momentum; `None` without an average, or if it never changes.
      has_decay: whether b may differ from 0.
      steps: K, the number of steps after which only decay moves a row.
      terms: the number of coefficients of a series; 0 for replay, or if no row moves.
      stretch: the d in the variable u of a series; 0 if u is sigma.
    """

    numbers: Numbers
    momentum: float | None
    has_decay: bool
    steps: int
    terms: int
    stretch: float

    @property
    def name(self) -> str:
        """A text of all that a ring's entries depend on: no other plan can read the ring."""
        rule = [f"{k}={x!r}" for k, x in self.numbers._asdict().items() if x is not None]
        momentum = [] if self.momentum is None else [f"momentum={self.momentum!r}"]
        return ",".join(rule + momentum + ["decay"] * self.has_decay)

    @property
    def least_history(self) -> int:
        """The least length of the ring, a power of two."""
        # A replay needs entries only for the steps that a row lags behind.
        return 2 if self.replays else max(2, 1 << self.steps.bit_length())

    @property
    def replays(self) -> bool:
        """Whether rows catch up step by step."""
        return self.steps > 0 and self.terms == 0

    def init(self, history: int, real: Any) -> Ring:
        """The ring before the first step.

        Args:
          history: its length, a power of two of at least `least_history`.
          real: its dtype, float32 or float64.

        Raises:
          ValueError: the length is not such a power of two.
        """
        if history < self.least_history or history & (history - 1):
            raise ValueError(
                f"history must be a power of two of at least {self.least_history}; got {history!r}"
            )
        averages = self.momentum is not None
        width = (2 if averages else 1) * self.terms
        return Ring(
            series=jnp.zeros((history, width), real) if width else None,
            rates=jnp.zeros((history, 2), real) if self.replays else None,
            decay=jnp.zeros((history, 2), real) if self.has_decay else None,
            kappa=jnp.zeros(history, real) if self.has_decay and averages else None,
        )

    def advance(self, ring: Ring, clock: Any, count: Any, a: Any, b: Any = 0.0) -> Ring:
        """The ring after a step.

        Args:
          ring: the ring before it.
          clock: int32 scalar, the step's number, 1 for the first; it may wrap around.
          count: int32 scalar, the same number, but it stops at the largest int32.
          a: scalar; the step adds `a * m / (x + e) + b * p` to the weights p.
          b: scalar above -1; 0 for a plan without decay.
        """
        clock, count = jnp.asarray(clock, jnp.int32), jnp.asarray(count, jnp.int32)
        series, rates, decay, kappa = ring
        if kappa is not None:
            # C_{t-1} for each start step. This step multiplies it by 1 + b.
            decay_so_far = jnp.exp(_difference(_entries_at(decay, clock - 1)[None], decay))
            is_new = np.arange(len(kappa), dtype=np.int32) == clock & (len(kappa) - 1)
            b = jnp.asarray(b, kappa.dtype)
            kappa = jnp.where(is_new, 0, _times_momentum(self.momentum, kappa - b * decay_so_far))
        if decay is not None:
            b = jnp.asarray(b, decay.dtype)
            decay = _with_entries(
                decay, clock, _two_sum(_entries_at(decay, clock - 1), jnp.log1p(b))
            )
        if rates is not None:
            scalars = [jnp.asarray(scalar, rates.dtype) for scalar in (a, b)]
            rates = _with_entries(rates, clock, jnp.stack(scalars))
        if series is not None:
            series = self._advance_series(series, clock, count, a, b)
        return Ring(series, rates, decay, kappa)

    def _advance_series(
        self, series: chex.Array, clock: chex.Array, count: chex.Array, a: Any, b: Any
    ) -> chex.Array:
        """Adds a step to G and Q of the last K start steps, and sets G and Q of this step to 0."""
        real, j = series.dtype, np.arange(self.steps + 1, dtype=np.int32)
        a, b = jnp.asarray(a, real), jnp.asarray(b, real)
        g, q = self._split_g_and_q(_entries_at(series, clock - j))
        change = b * g + a * self._coefficients_of_terms(count, real)
        new = g + change
        if q is not None:
            new = jnp.concatenate([new, _times_momentum(self.momentum, q - change)], axis=1)
        return _with_entries(series, clock - j, jnp.where((j > 0)[:, None], new, 0))

    def _split_g_and_q(self, entries: chex.Array) -> tuple[chex.Array, chex.Array | None]:
        """The coefficients of G and of Q, each [..., terms]."""
        q = None if self.momentum is None else entries[:, self.terms :]
        return entries[:, : self.terms], q

    def _coefficients_of_terms(self, count: chex.Array, real: Any) -> Any:
        """[K + 1, terms]: the coefficients of `w_j` at step `count`, for start step `count - j`."""
        j, (sigma, matrix) = np.arange(self.steps + 1)[:, None], _nodes(self.terms, self.stretch)
        numerator, x = self.numbers.b1**j, (1 - sigma) * self.numbers.shrink**j
        if self.numbers.b2 is None:
            return (numerator / (x + sigma) @ matrix).astype(real)
        # The step after the start step: sigma is defined with its epsilon.
        first = jnp.maximum(count - j.astype(np.int32) + 1, 1)
        ratio = self._epsilon(count, real) / self._epsilon(first, real)
        w = numerator.astype(real) / (x.astype(real) + sigma.astype(real)[None] * ratio)
        return jnp.matmul(w, matrix.astype(real), precision=jax.lax.Precision.HIGHEST)

    def _epsilon(self, t: chex.Array, real: Any) -> chex.Array:
        """`e_t` of the steps t, int32 of any shape."""
        tiny = float(jnp.finfo(real).tiny)
        if self.numbers.b2 is None:
            return jnp.full(t.shape, max(self.numbers.eps, tiny), real)
        log_b2 = np.asarray(math.log(self.numbers.b2), real)
        return jnp.maximum(self.numbers.eps * jnp.sqrt(-jnp.expm1(t.astype(real) * log_b2)), tiny)

    def catch_up(
        self,
        ring: Ring,
        clock: Any,
        count: Any,
        last: chex.Array,
        p: chex.Array,
        m: chex.Array,
        x: chex.Array,
        average: chex.Array | None = None,
    ) -> tuple[chex.Array, chex.Array | None]:
        """Returns how far rows have moved since they were last up to date, and their new average.

        Args:
          ring: the ring after the last step.
          clock, count: int32 scalars, the number of the last step, as in `advance`.
          last: int32 [n], the clock at which each row was last up to date, less than `history`
            steps ago.
          p: [n, ...], the weights at `last`, in the ring's dtype.
          m: the average gradient at `last`, like p.
          x: the gradients' size at `last`, like p, at least 0.
          average: the average of the weights at `last`, like p, if there is one.

        Returns:
          The weights now minus p, and the average now. If `last` is the clock, the row has moved
          by 0 and its average is the same, bit for bit. If `last` is ahead of the clock, or too old
          for the ring, the row has moved by NaN.
        """
        clock, count = jnp.asarray(clock, jnp.int32), jnp.asarray(count, jnp.int32)
        gap = clock - last
        lag = _Lag(last, gap, last + jnp.minimum(gap, self.steps), count)
        momentum = None if average is None else self.momentum
        history = next((len(entries) for entries in ring if entries is not None), 1 << 31)
        # NaN for rows that cannot catch up, else 0. It is added to a row's coefficients rather than
        # to its elements, because a row has fewer coefficients.
        nan_or_0 = jnp.where((gap < 0) | (gap > history - 1), jnp.nan, 0).astype(p.dtype)

        def from_end_to_now(
            g: chex.Array, q: chex.Array | None
        ) -> tuple[chex.Array, chex.Array | None]:
            """G and Q now, [n, ...], from G and Q at `lag.end`.

            The function is linear, so it can also be applied to the coefficients of G and Q, which
            are fewer than the elements.
            """
            if momentum is None:
                q = None
            elif q is not None:
                q = _column(power(momentum, clock - lag.end, p.dtype, history), q) * q
                if ring.kappa is not None:
                    q += _column(_entries_at(ring.kappa, lag.end), g) * g
            if ring.decay is not None:
                since_end = _difference(
                    _entries_at(ring.decay, clock)[None], _entries_at(ring.decay, lag.end)
                )
                g = _column(jnp.exp(since_end), g) * g
            return g, q

        moved, distance = jnp.zeros_like(p), None
        if ring.series is not None:
            moved, distance = self._evaluate(ring.series, lag, m, x, nan_or_0, from_end_to_now)
        elif ring.rates is not None:
            moved, distance = from_end_to_now(*self._replay(ring.rates, lag, m, x, nan_or_0))
        if ring.decay is not None:
            since_last = (
                _difference(_entries_at(ring.decay, clock)[None], _entries_at(ring.decay, last))
                + nan_or_0
            )
            moved += _column(jnp.expm1(since_last), p) * p
        is_current = _column(gap == 0, p)
        moved = jnp.where(is_current, 0, moved)
        if average is None or momentum is None:
            return moved, average

        # Without the barrier, XLA's CPU backend would compute `moved` again for the average.
        moved = barrier(moved)
        high, low = _powers(momentum, gap, p.dtype, history)
        change = moved + _column((high - 1) + low, p) * (average - p)
        if distance is not None:
            change += distance
        if ring.kappa is not None:
            change += _column(_entries_at(ring.kappa, last), p) * p
        return moved, jnp.where(is_current, average, average + change)

    def _evaluate(
        self,
        series: chex.Array,
        lag: _Lag,
        m: chex.Array,
        x: chex.Array,
        nan_or_0: chex.Array,
        from_end_to_now: Callable,
    ) -> tuple[chex.Array, chex.Array | None]:
        """`m / (x + e)` times G and Q now, of the shape of m."""
        # Without barriers, XLA would read the coefficients again for each element.
        entries = _entries_at(series, lag.last) + nan_or_0[:, None]
        coefficients = [
            c if c is None else barrier(c) for c in from_end_to_now(*self._split_g_and_q(entries))
        ]
        e = _column(self._epsilon(lag.step_number(1), x.dtype), x)
        inverse = 1 / (x + e)
        u = e * inverse
        if self.stretch > 0:
            # `log1p` is not needed, because only the absolute error of u matters.
            u = jnp.log(1 + self.stretch * u) / math.log1p(self.stretch)
        g, q = (c if c is None else m * inverse * _clenshaw(c, 2 * u - 1) for c in coefficients)
        return g, q

    def _replay(
        self, rates: chex.Array, lag: _Lag, m: chex.Array, x: chex.Array, nan_or_0: chex.Array
    ) -> tuple[chex.Array, chex.Array | None]:
        """`m / (x + e)` times G and Q at `lag.end`, of the shape of m."""
        real, j = x.dtype, np.arange(self.steps + 1)
        decay_m, decay_x = (jnp.asarray(b**j, real) for b in (self.numbers.b1, self.numbers.shrink))
        longest = jnp.minimum(jnp.max(lag.gap, initial=0), self.steps)

        def step(carry: tuple) -> tuple:
            j, g, q = carry
            live = j <= lag.gap
            a, b = (_column(jnp.where(live, r, 0), x) for r in _entries_at(rates, lag.last + j).T)
            e = _column(self._epsilon(lag.step_number(j), real), x)
            change = b * g + a * (decay_m[j] * m / (decay_x[j] * x + e))
            if q is not None:
                q = jnp.where(_column(live, x), _times_momentum(self.momentum, q - change), q)
            return j + 1, g + change, q

        zero = jnp.zeros_like(m) + _column(nan_or_0, m)
        start = jnp.int32(1), zero, None if self.momentum is None else zero
        _, g, q = jax.lax.while_loop(lambda carry: carry[0] <= longest, step, start)
        return g, q


@functools.lru_cache
def _steps_and_series(numbers: Numbers, tolerance: float) -> tuple[int, int, float]:
    """The plan's `steps`, `terms` and `stretch`."""
    if numbers.b1 == 0:
        return 0, 0, 0.0
    # The longest replay: x falls below eps, and after that, m decays.
    replay_steps = _steps_until(tolerance, numbers.b1)
    if numbers.shrink < 1:
        least_epsilon = max(
            numbers.eps * float(_epsilon_ratio(numbers.b2, 1)), float(np.finfo(np.float32).tiny)
        )
        replay_steps += _steps_until(min(1.0, least_epsilon / _LARGEST_SIZE), numbers.shrink)
    if numbers.b1 >= numbers.shrink:
        return replay_steps, 0, 0.0
    series_steps = _steps_until(tolerance, numbers.b1 / numbers.shrink)
    # With tiny betas, d would be too large for a float32.
    is_too_stretched = numbers.shrink**series_steps < 1e-30
    series = None if is_too_stretched else _fewest_terms(numbers, series_steps, tolerance)
    if series is None:
        return min(replay_steps, series_steps), 0, 0.0
    return series_steps, *series


def _steps_until(bound: float, b: float) -> int:
    """The least j above 0 for which `b**j <= bound`, for b in [0, 1) and a bound in (0, 1]."""
    return max(1, math.ceil(math.log(bound) / math.log(b))) if b > 0 else 1


def _epsilon_ratio(b2: float | None, t: Any) -> np.ndarray:
    """`e_t / eps`."""
    return np.ones(np.shape(t)) if b2 is None else np.sqrt(-np.expm1(t * math.log(b2)))


def _fewest_terms(numbers: Numbers, steps: int, tolerance: float) -> tuple[int, float] | None:
    """The fewest coefficients that are accurate enough, and their stretch d; `None` if too many.

    They are accurate enough if, for every sigma and start step and for rates of equal size, the
    error of G is at most the tolerance times the G of the absolute values of the rates.
    """
    # A sample of the j in the sum G, each weighted by the number of j that it represents.
    j = np.unique(np.round(np.geomspace(1, steps, 100)))
    num_represented = np.diff(np.concatenate([[0.5], (j[1:] + j[:-1]) / 2, [steps + 0.5]]))
    weight = (num_represented * (numbers.b1 / numbers.shrink) ** j)[:, None]
    j = j[:, None]
    # A sample of the start steps, up to where `e_t` has become eps.
    starts = np.zeros((1, 1, 1))
    if numbers.b2 is not None:
        num_starts = math.ceil(math.log(40 / (1 - numbers.b2), 4))
        starts = np.append(0, 4.0 ** np.arange(num_starts))[:, None, None]
    # Divided by shrink**j, the denominator of w_j is 1 + sigma * excess.
    excess = (
        _epsilon_ratio(numbers.b2, starts + j)
        / _epsilon_ratio(numbers.b2, starts + 1)
        / numbers.shrink**j
        - 1
    )
    angles = np.linspace(0, np.pi, 3 * _MOST_TERMS)

    def weighted_w(sigma: np.ndarray) -> np.ndarray:
        return weight / (1 + sigma * excess)  # [starts, j, sigma]

    def is_accurate(terms: int, stretch: float) -> bool:
        sigma, matrix = _nodes(terms, stretch)
        exact = weighted_w(_unstretched((1 + np.cos(angles)) / 2, stretch))
        series = weighted_w(sigma) @ (matrix @ np.cos(np.outer(np.arange(terms), angles)))
        return bool((np.abs(series - exact).sum(1) <= tolerance * exact.sum(1)).all())

    # A stretch costs a logarithm, so a few more terms without a stretch are still cheaper.
    best = None
    for terms in range(1, _MOST_TERMS + 1):
        if is_accurate(terms, 0.0):
            return terms, 0.0
        if best is None:
            stretches = (float(excess.max()) / 2**i for i in range(9))
            best = next(((terms, d) for d in stretches if is_accurate(terms, d)), None)
        elif terms == best[0] + _LOGARITHM_COST:
            break
    return best


def _nodes(terms: int, stretch: float) -> tuple[np.ndarray, np.ndarray]:
    """Sigma at the Chebyshev nodes of u, and the matrix from values there to coefficients."""
    angles = np.pi * (np.arange(terms) + 0.5) / terms
    matrix = 2 / terms * np.cos(np.outer(angles, np.arange(terms)))
    matrix[:, 0] /= 2
    return _unstretched((1 + np.cos(angles)) / 2, stretch), matrix


def _unstretched(u: np.ndarray, stretch: float) -> np.ndarray:
    """The sigma that belongs to u."""
    return np.expm1(u * math.log1p(stretch)) / stretch if stretch > 0 else u


def _clenshaw(coefficients: chex.Array, y: chex.Array) -> chex.Array:
    """The sum over i of `coefficients[:, i] * T_i(y)`, y in [-1, 1], [n, ...]."""
    first, *others = (_column(coefficients[:, i], y) for i in range(coefficients.shape[1]))
    here, after = jnp.zeros_like(y), jnp.zeros_like(y)
    for c in reversed(others):
        here, after = c + 2 * y * here - after, here
    return first + y * here - after


def power(b: float, k: chex.Array, real: Any, history: int) -> chex.Array:
    """`b**k` with an error of about one rounding.

    Args:
      b: in [0, 1]; `0**0` is 1.
      k: int32 of any shape, in [0, history). For a larger k, the result is another power of b.
      real: the result's dtype.
      history: a power of two.
    """
    return _powers(b, k, real, history)[0]


def decayed(value: chex.Array, b: float, k: chex.Array, history: int) -> chex.Array:
    """`value * b**k`, rounded so that errors do not add up over many calls with small k.

    Args:
      value: [n, ...].
      b, k, history: as for `power`; k is [n].
    """
    high, low = _powers(b, k, value.dtype, history)
    return value * _column(high, value) + value * _column(low, value)


def _powers(b: float, k: chex.Array, real: Any, history: int) -> tuple[chex.Array, chex.Array]:
    """`b**k`, and its rounding error for small k.

    `b**k` is the product of an entry of each of two tables: powers of b below 256, and powers of
    `b**256`. In `exp(k * log(b))` the rounding error of the logarithm would be multiplied by k.
    """
    exact = np.power(b, np.arange(256.0))
    high = exact.astype(real)
    low = (exact - high).astype(real)

    def entry(table: np.ndarray, i: chex.Array) -> chex.Array:
        return gather_entries(jnp.asarray(table), i)

    powers = entry(high, k & 255), entry(low, k & 255)
    # Beyond `last_block` the power underflows to zero.
    last_block = _steps_until(float(np.finfo(real).tiny) / 2, b) >> 8 if b < 1 else 0
    blocks = min(history >> 8, last_block + 2)
    if blocks > 1:
        block = np.power(b, 256.0 * np.arange(blocks)).astype(real)
        of_block = entry(block, jnp.minimum(k >> 8, blocks - 1))
        powers = powers[0] * of_block, powers[1] * of_block
    return powers


def _times_momentum(momentum: Any, value: chex.Array) -> chex.Array:
    """`momentum * value`, where `1 - momentum` is rounded rather than `momentum`."""
    return value - (1 - momentum) * value


def _two_sum(total: chex.Array, term: chex.Array) -> chex.Array:
    """Adds a term to a sum in two floats, [2]: the second has the rounding error of the first."""
    high, low = total
    new = high + term
    added = new - high
    low = low + ((high - (new - added)) + (term - added))
    high = new + low
    return jnp.stack([high, low - (high - new)])


def _difference(now: chex.Array, then: chex.Array) -> chex.Array:
    """The difference of sums in two floats, [..., 2]."""
    return (now[..., 0] - then[..., 0]) + (now[..., 1] - then[..., 1])


def _column(rows: chex.Array, like: chex.Array) -> chex.Array:
    """Reshapes [n] to [n, 1, ...], which broadcasts with `like`."""
    return rows.reshape(rows.shape + (1,) * (like.ndim - 1))


def _entries_at(entries: chex.Array, steps: chex.Array) -> chex.Array:
    """The ring's entries of some steps, an int32 array of any shape."""
    return gather_entries(entries, steps & (len(entries) - 1))


def _with_entries(entries: chex.Array, steps: chex.Array, new: chex.Array) -> chex.Array:
    """The ring with new entries for some steps, no two of which share an entry."""
    positions = steps & (len(entries) - 1)
    return entries.at[positions].set(new, mode="promise_in_bounds", unique_indices=True)
