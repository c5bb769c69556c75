"""The contenders: ways to take Adam's step on a model with tables.

Each is a function from a loss, the names of its tables, a learning rate and b2 to the three
functions of a `Contender`. The rate may be traced, so one compiled program serves for all rates.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import adamjax
from benchmarks.quality.protocol import B1, B2, DECAY, EPS

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


def dense(loss: Loss, tables: Sequence[str], rate: Any, b2: float = B2) -> Contender:
    """optax's Adam with JAX's gradients."""
    return dense_gradients(loss, optax.adam(rate, B1, b2, EPS))


def adamjax_dense(loss: Loss, tables: Sequence[str], rate: Any, b2: float = B2) -> Contender:
    """adamjax's Adam with JAX's gradients: the same formulas, rounded elsewhere."""
    return dense_gradients(loss, adamjax.adam(rate, B1, b2, eps=EPS))


def dense_gradients(loss: Loss, tx: Any) -> Contender:
    """An optimizer that takes the gradients of all rows."""

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params, batch), state, params)
        return optax.apply_updates(params, updates), state

    return Contender(lambda params: (params, tx.init(params)), step, lambda carry: carry[0])


def exact(
    loss: Loss, tables: Sequence[str], rate: Any, b2: float = B2, decay: float | None = None
) -> Contender:
    """`exact_rows` of Adam, or of AdamW if there is a decay."""
    inner = (
        adamjax.adam(rate, B1, b2, eps=EPS)
        if decay is None
        else adamjax.adamw(rate, B1, b2, eps=EPS, weight_decay=decay)
    )
    tx = adamjax.exact_rows(inner, patterns(tables))

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        (_, grads), ticket = tx.value_and_grad(loss)(params, state, batch)
        updates, state = tx.update(grads, state, params, ticket=ticket)
        return adamjax.apply_updates(params, updates), state

    return Contender(
        lambda params: (params, tx.init(params)), step, lambda carry: tx.flush(*carry)[0]
    )


def lazy(
    loss: Loss, tables: Sequence[str], rate: Any, b2: float = B2, decay: float | None = None
) -> Contender:
    """Adam with `rows="lazy"`, or AdamW if there is a decay.

    torch's SparseAdam takes the same steps up to the place of epsilon (tests/test_convert.py
    continues its runs), so it is no contender of its own.
    """
    tx = (
        adamjax.adam(rate, B1, b2, eps=EPS, rows="lazy")
        if decay is None
        else adamjax.adamw(rate, B1, b2, eps=EPS, weight_decay=decay, rows="lazy")
    )
    gradient = adamjax.value_and_grad(loss, patterns(tables))

    def step(carry: Any, batch: Any) -> Any:
        params, state = carry
        _, grads = gradient(params, batch)
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    return Contender(lambda params: (params, tx.init(params)), step, lambda carry: carry[0])


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
Maker = Callable[..., Contender]


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

        def init(params: Params) -> Any:
            rows = {
                name: Row(
                    params[name],
                    *(jnp.zeros_like(params[name]) for _ in range(2)),
                    jnp.ones((len(params[name]), 1)),
                )
                for name in tables
            }
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


MAKERS: dict[str, Maker] = {
    "dense": dense,
    "adamjax dense": adamjax_dense,
    "exact": exact,
    "lazy": lazy,
    "lazy, same rate": lazy,
    "counted": by_rows(counting_rule),
    "local": by_rows(local_rule),
    "exact + decay": functools.partial(exact, decay=DECAY),
    "lazy + decay": functools.partial(lazy, decay=DECAY),
}
