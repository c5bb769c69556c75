"""Gradient accumulation with a table: four micro-batches per step, and no dense gradient.

`accumulate_gradients` sums the gradients of the micro-batches and takes a step with their mean.
`rows="lazy"` needs row gradients. With `max_rows`, the sum of the table's gradients is also a row
gradient. It has room for `max_rows` distinct rows: as many as the four micro-batches can read. (If
they read more, the values of the sum would be NaN.) After 16 steps, the weights are those of 16
steps with whole batches, up to rounding.

Run it with `python docs/recipes/accumulation.py`.
"""

import jax
import jax.numpy as jnp

import adamjax

ROWS, STEPS = 50_000, 16
MICRO_BATCHES, EXAMPLES = 4, 32  # micro-batches of a step, examples of a micro-batch
BATCH = MICRO_BATCHES * EXAMPLES


def loss_fn(params, ids, y):
    return jnp.mean((params["embedding"][ids] @ params["out"] - y) ** 2)


def initial_params():
    keys = jax.random.split(jax.random.key(0), 2)
    table = jax.random.normal(keys[0], (ROWS, 8))
    return {"embedding": table, "out": jax.random.normal(keys[1], (8,))}


def batch(i):
    ids = jax.random.randint(jax.random.fold_in(jax.random.key(1), i), (BATCH,), 0, ROWS)
    return ids, ids % 2


adam = adamjax.adam(0.01, rows="lazy")
accumulating = adamjax.accumulate_gradients(
    adam, steps=MICRO_BATCHES, max_rows={"embedding": BATCH}
)
print(accumulating)

params = initial_params()
state = accumulating.init(params)
step = adamjax.train_step(loss_fn, accumulating, tables="embedding")
for i in range(STEPS):
    ids, y = batch(i)
    for first in range(0, BATCH, EXAMPLES):
        examples = slice(first, first + EXAMPLES)
        params, state, _ = step(params, state, ids[examples], y[examples])

whole_params = initial_params()
whole_state = adam.init(whole_params)
whole_step = adamjax.train_step(loss_fn, adam, tables="embedding")
for i in range(STEPS):
    whole_params, whole_state, _ = whole_step(whole_params, whole_state, *batch(i))

difference = max(jnp.abs(params[name] - whole_params[name]).max() for name in params)
print(f"{STEPS * MICRO_BATCHES} calls, {adamjax.step_count(state)} steps")
print(f"the largest difference to steps of whole batches: {difference:.0e}")
