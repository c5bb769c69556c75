"""The steps that the suites time and compile, each written once.

A step is a function `(params, state, ...) -> (params, state, ...)`, to be jitted with both donated.
Most train steps, which also read rows and differentiate a loss, are from `adamjax.train_step`.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import adamjax

RATE, MAX_NORM = 1e-3, 1.0
MOMENTUM = 0.99  # of the average of the weights
# Adam's hyperparameters in `tf_step`; all other steps have their packages' defaults.
B1, B2, EPS = 0.9, 0.999, 1e-7


class Step(NamedTuple):
    init: Callable[[Any], Any]  # from the parameters to the state before the first step
    step: Callable[..., Any]


def update_step(tx: Any) -> Step:
    """The step of a transform of adamjax, given the gradients of all parameters."""

    def step(params: Any, state: Any, grads: Any) -> Any:
        updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state

    return Step(tx.init, step)


def keras_step(max_norm: float | None = None) -> Step:
    import keras

    optimizer = keras.optimizers.Adam(RATE, global_clipnorm=max_norm)

    def init(params: Any) -> Any:
        leaves = jax.tree.leaves(params)
        optimizer.build([keras.Variable(p, dtype=str(p.dtype)) for p in leaves])
        return [v.value for v in optimizer.variables]

    def step(params: Any, state: Any, grads: Any) -> Any:
        leaves, treedef = jax.tree.flatten(params)
        leaves, state = optimizer.stateless_apply(state, jax.tree.leaves(grads), leaves)
        return treedef.unflatten(leaves), state

    return Step(init, step)


def chain_step(package: str, chain: str) -> Step:
    """The step of a chain such as "clip + adamw + average", in one of three packages.

    "adam, grouped" joins small leaves in adamjax, and "adam, moments in bfloat16" (or scaled8)
    sets the format of the moments; the others cannot. In optax the average of the weights is no
    part of a chain: it is updated after `apply_updates`, as in optax's documentation.
    """
    chain, _, option = chain.partition(", ")
    rule = chain.removeprefix("clip + ").removesuffix(" + average")
    clips, averages = chain.startswith("clip"), chain.endswith("average")
    if package == "keras":
        return keras_step(MAX_NORM if clips else None)
    if package == "adamjax":
        clip = [adamjax.clip_by_global_norm(MAX_NORM)] if clips else []
        average = [adamjax.weight_ema(MOMENTUM)] if averages else []
        _, _, moments = option.partition("moments in ")
        formats = {"m_dtype": moments, "v_dtype": moments} if moments else {}
        tx = adamjax.chain(*clip, getattr(adamjax, rule)(RATE, **formats), *average)
        return update_step(adamjax.grouped(tx) if option == "grouped" else tx)
    import optax

    clip = [optax.clip_by_global_norm(MAX_NORM)] if clips else []
    tx = optax.chain(*clip, getattr(optax, rule)(RATE))

    def step(params: Any, state: Any, grads: Any) -> Any:
        inner, mean = state if averages else (state, None)
        updates, inner = tx.update(grads, inner, params)
        params = optax.apply_updates(params, updates)
        if not averages:
            return params, inner
        return params, (inner, optax.incremental_update(params, mean, 1 - MOMENTUM))

    def init(params: Any) -> Any:
        return (tx.init(params), params) if averages else tx.init(params)

    return Step(init, step)


def table_mode(
    mode: str, tables: Any = "table", rule: Callable[..., Any] = adamjax.adam, **options: Any
) -> tuple[Any, Any]:
    """The optimizer of a mode, and the argument `tables` of its `train_step`.

    The modes are "exact", "lazy" and "dense" (`rows="dense"`); any other has dense gradients.
    """
    options = {"learning_rate": RATE, **options}
    if mode == "exact":
        return adamjax.exact_rows(rule(**options), tables), None
    if mode in ("lazy", "dense"):
        return rule(**options, rows=mode), tables
    return rule(**options), None


def given_rows_step(step: Step, dense_gradient: bool = False) -> Step:
    """An optimizer step on `params["table"]`, given the gradient of the rows that were read."""

    def by_rows(params: Any, state: Any, ids: Any, values: Any) -> Any:
        table = params["table"]
        if dense_gradient:
            grads: Any = jnp.zeros_like(table).at[ids].add(values)
        else:
            grads = adamjax.row_gradient(ids, values, len(table))
        return step.step(params, state, {"table": grads})

    return Step(step.init, by_rows)


def optax_train_step(loss: Callable[..., Any], tx: Any) -> Callable[..., Any]:
    """A train step with a transform of optax, as optax's users write it."""
    import optax

    def step(params: Any, state: Any, *batch: Any) -> Any:
        value, grads = jax.value_and_grad(loss)(params, *batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return step


def hand_written_step(tx: Any, loss: Callable[..., Any], packing: Any = None) -> Step:
    """A train step on `params["table"]`, not by `adamjax.train_step`; calls `loss(rows, values)`.

    The optimizer is `exact_rows`, whose `prepare` reads the rows, or a lazy one. A packed table has
    several rows in a line.
    """

    def step(params: Any, state: Any, ids: Any, values: Any) -> Any:
        def loss_of_lines(lines: Any) -> Any:
            return loss(lines if packing is None else packing.rows(lines, ids), values)

        lines = ids if packing is None else packing.line(ids)
        if isinstance(tx, adamjax.exact_rows):
            read, ticket = tx.prepare(params, state, {"table": lines})
            value, grad = jax.value_and_grad(loss_of_lines)(read["table"])
            grads = {"table": ticket.row_gradient("table", grad)}
            updates, state = tx.update(grads, state, params, ticket=ticket)
        else:
            value, grad = jax.value_and_grad(loss_of_lines)(params["table"][lines])
            grads = {"table": adamjax.row_gradient(lines, grad, len(params["table"]))}
            updates, state = tx.update(grads, state, params)
        return adamjax.apply_updates(params, updates), state, value

    return Step(tx.init, step)


def tf_step() -> Step:
    """The sparse step of Keras 3 on TensorFlow.

    It makes no dense gradient, but it updates every row of the table and its moments. If an index
    occurs twice, it adds the squares of the two gradients, not the square of their sum.
    """

    def init(params: Any) -> Any:
        table = params["table"]
        return jnp.zeros((), jnp.int32), jnp.zeros_like(table), jnp.zeros_like(table)

    def step(params: Any, state: Any, ids: Any, values: Any) -> Any:
        count, m, v = state
        count = count + 1
        t = count.astype(jnp.float32)
        rate = RATE * jnp.sqrt(1 - B2**t) / (1 - B1**t)
        m = (B1 * m).at[ids].add((1 - B1) * values)
        v = (B2 * v).at[ids].add((1 - B2) * values**2)
        return {"table": params["table"] - rate * m / (jnp.sqrt(v) + EPS)}, (count, m, v)

    return Step(init, step)


def jitted(step: Callable[..., Any], tx: Any, params: Any, more_results: int = 0) -> Any:
    """A jitted step that donates parameters and state and keeps their layouts in memory.

    `more_results` is the number of the step's results besides these two.
    """
    out_shardings = (*adamjax.layout.formats(tx, params), *[None] * more_results)
    return jax.jit(step, donate_argnums=(0, 1), out_shardings=out_shardings)


def abstract_state(tx: Any, params: Any, device: Any = None) -> Any:
    """The shapes of a state on a device, with the layouts of `adamjax.layout.formats`."""

    def placed(x: Any, form: Any) -> Any:
        sharding = form or device
        return None if x is None else jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    state, (_, formats) = jax.eval_shape(tx.init, params), adamjax.layout.formats(tx, params)
    return jax.tree.map(placed, state, formats, is_leaf=lambda x: x is None)


def count_bytes(tree: Any) -> int:
    """The bytes of a tree's arrays, without padding."""
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


class Runner:
    """Takes steps in place, with batches in rotation; with a `tx`, arrays keep their layouts."""

    def __init__(self, step: Step, params: Any, tx: Any = None, more_results: int = 0) -> None:
        if tx is None:
            self.step = jax.jit(step.step, donate_argnums=(0, 1))
        else:
            self.step = jitted(step.step, tx, params, more_results)
        self.arrays = params, step.init(params)
        self.compiled: dict[Any, Any] = {}

    def load(self, batches: Sequence[tuple[Any, ...]]) -> int:
        """Stores the batches and compiles for them; returns the bytes of a step's temporaries."""
        self.batches = itertools.cycle(batches)
        shapes = tuple(x.shape for x in jax.tree.leaves(batches[0]))
        if shapes not in self.compiled:
            self.compiled[shapes] = self.step.lower(*self.arrays, *batches[0]).compile()
        self.current = self.compiled[shapes]
        return self.current.memory_analysis().temp_size_in_bytes

    def __call__(self, steps: int) -> None:
        for batch in itertools.islice(self.batches, steps):
            params, state, *self.results = self.current(*self.arrays, *batch)
            self.arrays = params, state
        jax.block_until_ready((self.arrays, self.results))
