"""Gradient accumulation with a table: four micro-batches per step, and no dense gradient.

`accumulate_gradients` sums the gradients of the micro-batches and takes a step with their mean.
`max_rows` bounds the distinct rows that four micro-batches can read, so the table's sum stays a row
gradient, as `rows="lazy"` needs it. If they read more, the sum becomes NaN. Sixteen such steps give
the weights that sixteen steps of the whole batches give.

Run it with `python docs/recipes/accumulation.py`.
"""

import jax
import jax.numpy as jnp

import adamjax

ROWS, MICRO, PARTS, STEPS = 50_000, 32, 4, 16


def loss_fn(params, ids, y):
    return jnp.mean((params["embedding"][ids] @ params["out"] - y) ** 2)


def start():
    keys = jax.random.split(jax.random.key(0), 2)
    table = jax.random.normal(keys[0], (ROWS, 8))
    return {"embedding": table, "out": jax.random.normal(keys[1], (8,))}


def batch(i):
    ids = jax.random.randint(jax.random.fold_in(jax.random.key(1), i), (PARTS * MICRO,), 0, ROWS)
    return ids, ids % 2


adam = adamjax.adam(0.01, rows="lazy")
accumulating = adamjax.accumulate_gradients(
    adam, steps=PARTS, max_rows={"embedding": PARTS * MICRO}
)
print(accumulating)

params = start()
state = accumulating.init(params)
step = adamjax.train_step(loss_fn, accumulating, tables="embedding")
for i in range(STEPS):
    ids, y = batch(i)
    for part in range(PARTS):
        here = slice(part * MICRO, (part + 1) * MICRO)
        params, state, _ = step(params, state, ids[here], y[here])

whole = start()
whole_state, whole_step = adam.init(whole), adamjax.train_step(loss_fn, adam, tables="embedding")
for i in range(STEPS):
    whole, whole_state, _ = whole_step(whole, whole_state, *batch(i))

apart = max(jnp.abs(params[name] - whole[name]).max() for name in params)
print(f"{STEPS * PARTS} calls, {adamjax.step_count(state)} steps")
print(f"the largest difference to steps of whole batches: {apart:.0e}")
