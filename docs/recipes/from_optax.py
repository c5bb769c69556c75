"""Move a run from optax: it continues with the same moments, and stays close to optax's run.

The optimizer is written again with adamjax, and `convert.from_optax` fills its state from optax's.
optax's state contains few hyperparameters, so pass the optax optimizer too. `from_optax` lets both
optimizers take some steps on random gradients, and refuses yours if it moves weights differently.
Here one run takes half of its steps with optax and the other half with adamjax. It is compared with
a run that stays with optax.

Needs optax. Run it with `python docs/recipes/from_optax.py`.
"""

import jax
import jax.numpy as jnp
import optax

import adamjax

before = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=1e-3))
# optax adds its epsilon to the corrected root, which is `eps=` here.
after = adamjax.chain(
    adamjax.clip_by_global_norm(1.0), adamjax.adamw(1e-2, eps=1e-8, weight_decay=1e-3)
)


def loss_fn(params, x):
    return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - x.sum(axis=1)) ** 2)


def train(step, params, state, keys):
    for key in keys:
        params, state, _ = step(params, state, jax.random.normal(key, (64, 4)))
    return params, state


keys = jax.random.split(jax.random.key(0), 200)
params = {"hidden": jax.random.normal(keys[0], (4, 16)) / 2, "out": jnp.zeros(16)}
# Nothing is donated, because both runs below continue from the same arrays.
step_before = adamjax.train_step(loss_fn, before, donate_argnums=())
step_after = adamjax.train_step(loss_fn, after, donate_argnums=())

params, state = train(step_before, params, before.init(params), keys[:100])
stayed, _ = train(step_before, params, state, keys[100:])

# This compares steps of both optimizers: up to 20 seconds with a table of 5 million rows.
converted = adamjax.convert.from_optax(state, after, params, optimizer=before)
moved, converted = train(step_after, params, converted, keys[100:])

difference = max(jnp.abs(a - b).max() for a, b in zip(moved.values(), stayed.values(), strict=True))
print(f"steps taken: {adamjax.step_count(converted)}")
print(f"the largest difference of a weight after 100 more steps: {difference:.0e}")

try:
    wrong = adamjax.adamw(1e-2, weight_decay=1e-3)
    adamjax.convert.from_optax(state, wrong, params, optimizer=before)
except ValueError as error:
    print("with the other form of epsilon:", str(error).split(":")[0], "refuses it")
