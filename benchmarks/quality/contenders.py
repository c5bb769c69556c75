"""The contenders: ways to take Adam's step on a model with tables.

Each is a function from a loss, the names of its tables, a learning rate and b2 to the three
functions of a `Contender`. The rate may be traced, so one compiled program serves for all rates.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import adamjax
from benchmarks.quality.protocol import B1, B2, DECAY, EPS
from benchmarks.steps import optax_train_step, table_mode

Params = dict[str, Any]
Loss = Callable[[Params, Any], jax.Array]


class Contender(NamedTuple):
    """How a model is trained.

    Attributes:
      init: from the first parameters to the carry.
      step: `(carry, batch)` to the carry after it.
      read: the parameters of a carry, as they are to be evaluated.
    """

    init: Callable[[Params], Any]
    step: Callable[[Any, Any], Any]
    read: Callable[[Any], Params]


Maker = Callable[..., Contender]


def dense(loss: Loss, tables: Sequence[str], rate: Any, b2: float = B2) -> Contender:
    """optax's Adam with JAX's gradients."""
    tx = optax.adam(rate, B1, b2, EPS)
    return of_train_step(tx, optax_train_step(loss, tx))


def in_mode(mode: str, decay: float | None = None) -> Maker:
    """adamjax's Adam in a mode of `table_mode`, or AdamW if there is a decay.

    torch's SparseAdam takes the steps of "lazy" up to the place of epsilon (tests/test_convert.py
    continues its runs), so it is no contender of its own.
    """
    rule = adamjax.adam if decay is None else adamjax.adamw
    options = {"b1": B1, "eps": EPS} | ({} if decay is None else {"weight_decay": decay})

    def contender(loss: Loss, tables: Sequence[str], rate: Any, b2: float = B2) -> Contender:
        tx, by_rows = table_mode(mode, patterns(tables), rule, learning_rate=rate, b2=b2, **options)
        return of_train_step(tx, adamjax.train_step(loss, tx, tables=by_rows))

    return contender


def of_train_step(tx: Any, step: Callable[..., Any]) -> Contender:
    """The contender of an optimizer and a step `(params, state, batch)`."""

    def read(carry: Any) -> Params:
        return tx.flush(*carry)[0] if isinstance(tx, adamjax.exact_rows) else carry[0]

    return Contender(
        lambda params: (params, tx.init(params)), lambda carry, batch: step(*carry, batch)[:2], read
    )


def patterns(tables: Sequence[str]) -> list[str]:
    """Patterns that match the tables' paths and nothing else."""
    return [f"^{table}$" for table in tables]


# --- rules that only this benchmark has -----------------------------------------------------------


class Row(NamedTuple):
    """The rows of a table that a step reads: weights, moments, and when they were read last.

    Attributes:
      weights, m, v: float32[n, width].
      last: float32[n, 1], the number of the step that read the row last.
    """

    weights: jax.Array
    m: jax.Array
    v: jax.Array
    last: jax.Array


Rule = Callable[[Row, jax.Array, jax.Array, Any, float], Row]


def correction(t: Any, b2: float) -> Any:
    """The factor of Adam's step from the bias corrections of both moments, after t steps."""
    return jnp.sqrt(1 - b2**t) / (1 - B1**t)


def next_moments(row: Row, g: jax.Array, t: jax.Array, b2: float) -> tuple[jax.Array, jax.Array]:
    """The moments of rows at step t: they decay by the steps since their last read."""
    gap = t - row.last
    return B1**gap * row.m + (1 - B1) * g, b2**gap * row.v + (1 - b2) * g * g


def counting_rule(row: Row, g: jax.Array, t: jax.Array, rate: Any, b2: float) -> Row:
    """A step count for each row, the idea of caffe2's SmartDecaySparseAdam.

    The gradient `g` was computed with the row's old weights. The moments decay by the steps since
    the last read, and the row takes Adam's step. It also catches up with its momentum in the steps
    between, with v and the bias correction after this step.
    """
    m, v = next_moments(row, g, t, b2)
    missed = B1 * (1 - B1 ** (t - row.last - 1)) / (1 - B1) * row.m
    size = jnp.sqrt(v) + EPS * jnp.sqrt(1 - b2**t)
    move = correction(t, b2) * (m + missed) / size
    return Row(row.weights - rate * move, m, v, jnp.full_like(row.last, t))


def local_rule(row: Row, g: jax.Array, t: jax.Array, rate: Any, b2: float) -> Row:
    """The "local approximation" of HugeCTR's Adam with `update_type=LazyGlobal`.

    The gradient `g` was computed with the row's old weights. Then the row takes the steps since its
    last read, and that read's own step, with the v and the bias correction of that read. So it
    moves by `g` itself at the next read.
    """
    gap = t - row.last
    summed = correction(row.last, b2) * (1 - B1**gap) / (1 - B1)
    missed = summed * row.m / (jnp.sqrt(row.v) + EPS)
    m, v = next_moments(row, g, t, b2)
    return Row(row.weights - rate * missed, m, v, jnp.full_like(row.last, t))


def by_rows(rule: Rule) -> Maker:
    """The contender with a rule's step on rows of tables, and optax's on all other parameters."""

    def contender(loss: Loss, tables: Sequence[str], rate: Any, b2: float = B2) -> Contender:
        tx = optax.adam(rate, B1, b2, EPS)
        gradient = adamjax.value_and_grad(loss, patterns(tables))

        def rest(tree: Params) -> Params:
            return {name: x for name, x in tree.items() if name not in tables}

        def first_rows(table: jax.Array) -> Row:
            m, v = jnp.zeros_like(table), jnp.zeros_like(table)
            return Row(table, m, v, jnp.ones((len(table), 1)))

        def init(params: Params) -> Any:
            rows = {name: first_rows(params[name]) for name in tables}
            return rows, rest(params), tx.init(rest(params)), jnp.zeros((), jnp.int32)

        def step(carry: Any, batch: Any) -> Any:
            rows, others, state, count = carry
            _, grads = gradient(read(carry), batch)
            updates, state = tx.update(rest(grads), state, others)
            count = count + 1
            t = count.astype(jnp.float32)
            rows = {
                name: _step_rows(rule, table, grads[name], t, rate, b2)
                for name, table in rows.items()
            }
            return rows, optax.apply_updates(others, updates), state, count

        def read(carry: Any) -> Params:
            return {**{name: row.weights for name, row in carry[0].items()}, **carry[1]}

        return Contender(init, step, read)

    return contender


def _step_rows(rule: Rule, table: Row, grad: Any, t: jax.Array, rate: Any, b2: float) -> Row:
    # An index beyond the table is padding.
    ids = grad.indices
    read = Row(*(x.at[ids].get(mode="fill", fill_value=1) for x in table))
    new = rule(read, grad.values, t, rate, b2)
    return Row(*(x.at[ids].set(y, mode="drop") for x, y in zip(table, new, strict=True)))


LAZY = in_mode("lazy")
MAKERS: dict[str, Maker] = {
    "dense": dense,
    # The same formulas as optax's, rounded elsewhere.
    "adamjax dense": in_mode("dense gradient"),
    "exact": in_mode("exact"),
    "lazy": LAZY,
    "lazy, same rate": LAZY,
    "counted": by_rows(counting_rule),
    "local": by_rows(local_rule),
    "exact + decay": in_mode("exact", DECAY),
    "lazy + decay": in_mode("lazy", DECAY),
}
