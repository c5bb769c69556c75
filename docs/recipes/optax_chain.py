"""optax: a rule of adamjax inside a chain, with a schedule and a wrapper of optax.

A transform of adamjax is a pair of `init` and `update`, like one of optax, so a chain of either
library accepts transforms of both. `train_step` accepts the result, and so does any loop that was
written for optax.

Needs optax. Run it with `python docs/recipes/optax_chain.py`.
"""

import jax
import jax.numpy as jnp
import optax

import adamjax

STEPS = 200

# optax's chain, clip, schedule and guard around adamjax's AMSGrad.
guarded = optax.apply_if_finite(
    optax.chain(
        optax.clip_by_global_norm(1.0),
        adamjax.scale_by_amsgrad(),
        optax.scale_by_learning_rate(optax.cosine_decay_schedule(0.1, STEPS)),
    ),
    max_consecutive_errors=3,
)
# The other way round: optax's noise inside adamjax's chain.
noisy = adamjax.chain(optax.add_noise(0.01, 0.55, jax.random.key(0)), adamjax.adam(0.05))


def loss_fn(params, x, y):
    return jnp.mean((x @ params["w"] + params["b"] - y) ** 2)


def train(tx):
    params = {"w": jnp.zeros(3), "b": jnp.zeros(())}
    state, step = tx.init(params), adamjax.train_step(loss_fn, tx)
    for key in jax.random.split(jax.random.key(1), STEPS):
        x = jax.random.normal(key, (32, 3))
        params, state, _ = step(params, state, x, x @ jnp.array([1.0, -2.0, 3.0]) + 0.5)
    return params, state


for name, tx in {"optax around adamjax": guarded, "adamjax around optax": noisy}.items():
    params, state = train(tx)
    steps = adamjax.step_count(state)  # reads states of optax's wrappers too
    print(f"{name}: w = {params['w'].round(2)}, b = {params['b']:.2f} after {steps} steps")
