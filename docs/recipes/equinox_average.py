"""Equinox: clip, AdamW with a cosine rate, and an average of the weights for evaluation.

An Equinox model contains functions as well as arrays. So only the arrays are the parameters, and
the loss combines them with the rest of the model. `mask` selects the leaves that decay: those
called `weight`.

Needs equinox. Run it with `python docs/recipes/equinox_average.py`.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

import adamjax

STEPS = 300

model = eqx.nn.MLP(2, 1, width_size=32, depth=2, activation=jnp.tanh, key=jax.random.key(0))
params, rest = eqx.partition(model, eqx.is_inexact_array)


def loss_fn(params, x, y):
    model = eqx.combine(params, rest)
    return jnp.mean((jax.vmap(model)(x)[:, 0] - y) ** 2)


tx = adamjax.chain(
    adamjax.clip_by_global_norm(1.0),
    adamjax.adamw(adamjax.cosine_decay(0.02, decay_steps=STEPS), weight_decay=1e-3, mask="weight$"),
    adamjax.weight_ema(0.95),
)
step = adamjax.train_step(loss_fn, tx)
evaluate = adamjax.eval_step(loss_fn, tx)
evaluate_average = adamjax.eval_step(loss_fn, tx, averaged=True)


def batch(key, size=128):
    """A product of two numbers, with some noise."""
    x = jax.random.uniform(key, (size, 2), minval=-1.0, maxval=1.0)
    return x, x[:, 0] * x[:, 1] + 0.05 * jax.random.normal(key, (size,))


state = tx.init(params)
held_out = batch(jax.random.key(1), 1000)
print(f"held-out loss before: {evaluate(params, state, *held_out):.4f}")
for key in jax.random.split(jax.random.key(2), STEPS):
    params, state, loss = step(params, state, *batch(key))
print(f"held-out loss of the last weights: {evaluate(params, state, *held_out):.4f}")
print(f"held-out loss of their average: {evaluate_average(params, state, *held_out):.4f}")

model = eqx.combine(adamjax.averaged_weights(state, params), rest)
print(f"0.5 * 0.5 = {model(jnp.array([0.5, 0.5]))[0]:.2f}")
