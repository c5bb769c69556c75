"""The contenders: forms of Adam's step on a model with tables.

A `Maker` returns a contender for a loss, the names of its tables, a learning rate and b2. The rate
may be traced, so one compiled program serves for all rates.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import adamjax
from adamjax import extend
from benchmarks.quality.protocol import B1, B2, DECAY, EPS
from benchmarks.steps import optax_train_step, table_mode

Params = dict[str, Any]
Loss = Callable[[Params, Any], jax.Array]


class Contender(NamedTuple):
    """How a model is trained. A carry is its parameters and the state of the optimizer."""

    tx: Any  # the optimizer
    train: Callable[..., Any]  # (params, state, batch) -> (params, state, loss)

    def init(self, params: Params) -> Any:
        return params, self.tx.init(params)

    def step(self, carry: Any, batch: Any) -> Any:
        return self.train(*carry, batch)[:2]

    def read(self, carry: Any) -> Params:
        """The parameters of a carry, as they are to be evaluated."""
        return self.tx.flush(*carry)[0] if isinstance(self.tx, adamjax.exact_rows) else carry[0]


Maker = Callable[..., Contender]


def dense(loss: Loss, tables: Sequence[str], rate: Any, b2: float = B2) -> Contender:
    """optax's Adam with JAX's gradients."""
    tx = optax.adam(rate, B1, b2, EPS)
    return Contender(tx, optax_train_step(loss, tx))


def in_mode(mode: str, decay: float | None = None) -> Maker:
    """adamjax's Adam in a mode of `table_mode`, or AdamW if there is a decay.

    torch's SparseAdam is no contender of its own, as its steps are those of "lazy" except for the
    place of epsilon (tests/test_convert_torch.py continues its runs).
    """
    rule = adamjax.adam if decay is None else adamjax.adamw
    options = {"b1": B1, "eps": EPS} | ({} if decay is None else {"weight_decay": decay})

    def contender(loss: Loss, tables: Sequence[str], rate: Any, b2: float = B2) -> Contender:
        tx, by_rows = table_mode(mode, patterns(tables), rule, learning_rate=rate, b2=b2, **options)
        return Contender(tx, adamjax.train_step(loss, tx, tables=by_rows))

    return contender


def patterns(tables: Sequence[str]) -> list[str]:
    """Patterns that match the tables' paths and nothing else."""
    return [f"^{table}$" for table in tables]


# --- rules that only this benchmark has -----------------------------------------------------------


class GapState(NamedTuple):
    """The state of `by_gap`; its arrays have the shapes of the tables."""

    count: Any
    m: Any
    v: Any
    last: Any  # the number of the step that last read the row


class by_gap(extend.Transform):
    """A rule that depends on the steps since a row's last read.

    `rule` is called with a tuple of the step's number, the rate, b2 and 1 - b2; then with the
    gradient, both moments, and the number of the step that last read the row. It returns the update
    and the new values of the last three.
    """

    rule: Callable[..., Any] = extend.static()
    rate: Any
    b2: extend.Number

    def init(self, params: Params) -> GapState:
        zeros, more = (jax.tree.map(jnp.zeros_like, params) for _ in range(2))
        return GapState(jnp.zeros((), jnp.int32), zeros, more, jax.tree.map(jnp.ones_like, params))

    def update(self, updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        count = extend.next_count(state.count)
        # The rule gets all numbers in float32, in which it would lose digits of 1 - b2.
        numbers = count.astype(jnp.float32), self.rate, self.b2, 1 - self.b2
        u, *slots = extend.lift(
            "by_gap", self.rule, lambda real: numbers, updates, state[1:], rows="lazy"
        )
        return u, GapState(count, *slots)


def correction(t: Any, b2: float) -> Any:
    """The factor that both bias corrections give Adam's step after t steps."""
    return jnp.sqrt(1 - b2**t) / (1 - B1**t)


def next_moments(c: Any, g: Any, m: Any, v: Any, last: Any) -> tuple[jax.Array, jax.Array]:
    """The moments of rows, which decay by the steps since their last read."""
    t, _, b2, one_minus_b2 = c
    gap = t - last
    return B1**gap * m + (1 - B1) * g, b2**gap * v + one_minus_b2 * g * g


def counting_rule(c: Any, g: Any, m: Any, v: Any, last: Any) -> tuple[jax.Array, ...]:
    """A step count for each row, the idea of caffe2's SmartDecaySparseAdam.

    The moments decay by the steps since the last read, and the row takes Adam's step. It also
    catches up on the momentum of the steps between, with v and the bias correction after this step.
    """
    t, rate, b2, _ = c
    missed = B1 * (1 - B1 ** (t - last - 1)) / (1 - B1) * m
    m, v = next_moments(c, g, m, v, last)
    size = jnp.sqrt(v) + EPS * jnp.sqrt(1 - b2**t)
    return -rate * (correction(t, b2) * (m + missed) / size), m, v, jnp.full_like(last, t)


def local_rule(c: Any, g: Any, m: Any, v: Any, last: Any) -> tuple[jax.Array, ...]:
    """The "local approximation" of HugeCTR's Adam with `update_type=LazyGlobal`.

    The row takes the step of its last read and the missed ones since, with the v and the bias
    correction of that read. So `g` itself first moves the row at the next read.
    """
    t, rate, b2, _ = c
    summed = correction(last, b2) * (1 - B1 ** (t - last)) / (1 - B1)
    missed = summed * m / (jnp.sqrt(v) + EPS)
    return -rate * missed, *next_moments(c, g, m, v, last), jnp.full_like(last, t)


def with_rule(rule: Callable[..., Any]) -> Maker:
    """Contenders with a rule of `by_gap` on tables, and optax's Adam on all other parameters."""

    def contender(loss: Loss, tables: Sequence[str], rate: Any, b2: float = B2) -> Contender:
        of_tables = [(pattern, by_gap(rule, rate, b2)) for pattern in patterns(tables)]
        tx = adamjax.partition(of_tables, default=optax.adam(rate, B1, b2, EPS))
        return Contender(tx, adamjax.train_step(loss, tx, tables=patterns(tables)))

    return contender


LAZY = in_mode("lazy")
MAKERS: dict[str, Maker] = {
    "dense": dense,
    # optax's formulas, rounded in other places.
    "adamjax dense": in_mode("dense gradient"),
    "exact": in_mode("exact"),
    "lazy": LAZY,
    "lazy, same rate": LAZY,
    "counted": with_rule(counting_rule),
    "local": with_rule(local_rule),
    "exact + decay": in_mode("exact", DECAY),
    "lazy + decay": in_mode("lazy", DECAY),
}
