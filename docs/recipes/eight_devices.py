"""Eight devices: batches are split, and each device holds an eighth of the optimizer's state.

`shard_state` splits moments and averages over the devices (ZeRO-1). The parameters are on all of
them. The `value_and_grad` of `shard_state` averages the gradients over the devices, and each device
receives only the share that it updates. The step returns the same weights and loss as on one
device. Without `XLA_FLAGS`, the program makes eight CPU devices.

Run it with `python docs/recipes/eight_devices.py`.
"""

import os

if "XLA_FLAGS" not in os.environ:  # before JAX starts
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adamjax

STEPS = 50
mesh = jax.sharding.Mesh(jax.devices(), "data")
replicated, split = NamedSharding(mesh, P()), NamedSharding(mesh, P("data"))


def loss_fn(params, x, y):
    return jnp.mean((jnp.tanh(x @ params["hidden"]) @ params["out"] - y) ** 2)


def initial_params():
    keys = jax.random.split(jax.random.key(0), 2)
    return {"hidden": jax.random.normal(keys[0], (16, 64)) / 4, "out": jnp.zeros(64)}


def batch(i):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(1), i), (128, 16))
    return x, x[:, 0] * x[:, 1]


optimizer = adamjax.chain(adamjax.clip_by_global_norm(1.0), adamjax.adamw(0.01))
tx = adamjax.shard_state(optimizer, mesh, "data")


@jax.jit
def step(params, state, x, y):
    loss, grads = tx.value_and_grad(loss_fn)(params, x, y)
    updates, state = tx.update(grads, state, params)
    return adamjax.apply_updates(params, updates), state, loss


params = jax.device_put(initial_params(), replicated)
state = jax.jit(tx.init)(params)
for i in range(STEPS):
    params, state, loss = step(params, state, *jax.device_put(batch(i), split))

single_params = initial_params()
single_state, single_step = optimizer.init(single_params), adamjax.train_step(loss_fn, optimizer)
for i in range(STEPS):
    single_params, single_state, single_loss = single_step(single_params, single_state, *batch(i))

m = adamjax.get_slot(state, "m")["hidden"]
print(f"{jax.device_count()} devices; each holds {m.addressable_shards[0].data.size} of {m.size}")
print(f"loss {loss:.4f}, on one device {single_loss:.4f}")
