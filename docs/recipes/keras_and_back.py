"""Move a Keras run to adamjax, train in a plain JAX loop, and move it back.

Keras' config does not say which variables decay, so `from_config` takes a mask of them.

Needs keras. Run it with `python docs/recipes/keras_and_back.py`.
"""

import os

os.environ["KERAS_BACKEND"] = "jax"

import jax.numpy as jnp
import keras
import numpy as np

import adamjax

rng = np.random.default_rng(0)
batches = [(rng.integers(0, 50, (32, 2)), rng.normal(size=(32, 1))) for _ in range(30)]


def compiled_model():
    keras.utils.set_random_seed(0)
    layers = [keras.layers.Embedding(50, 8), keras.layers.Flatten(), keras.layers.Dense(1)]
    model = keras.Sequential(layers)
    model.build((None, 2))
    rate = keras.optimizers.schedules.CosineDecay(0.01, 100)
    optimizer = keras.optimizers.AdamW(rate, global_clipnorm=1.0, use_ema=True, ema_momentum=0.9)
    optimizer.exclude_from_weight_decay(var_names=["bias"])
    model.compile(optimizer, loss="mse")
    optimizer.build(model.trainable_variables)
    return model, optimizer


def weights(model):
    # A list in Keras' order. The arrays are copied, because both libraries donate theirs.
    return [jnp.array(np.array(v.value)) for v in model.trainable_variables]


model, optimizer = compiled_model()
for x, y in batches[:10]:
    model.train_on_batch(x, y)

params = weights(model)
decays = ["bias" not in v.name for v in model.trainable_variables]
tx = adamjax.from_config(keras.optimizers.serialize(optimizer), mask=decays)
state = adamjax.convert.from_keras(optimizer, tx, params)


def loss_fn(params, x, y):
    outputs, _ = model.stateless_call(params, [], x)
    return jnp.mean((outputs - y) ** 2)


step = adamjax.train_step(loss_fn, tx)
for x, y in batches[10:20]:
    params, state, _ = step(params, state, x, y)

# Back into a new model and a new optimizer with the same settings.
new_model, new_optimizer = compiled_model()
values = [*params, *adamjax.convert.to_keras(state, tx, params, new_optimizer)]
for v, x in zip([*new_model.trainable_variables, *new_optimizer.variables], values, strict=True):
    v.assign(np.array(x))

for x, y in batches[10:]:
    model.train_on_batch(x, y)  # takes all its steps in Keras
for x, y in batches[20:]:
    new_model.train_on_batch(x, y)
pairs = zip(weights(model), weights(new_model), strict=True)
print(f"the largest difference of a weight: {max(jnp.abs(a - b).max() for a, b in pairs):.0e}")
