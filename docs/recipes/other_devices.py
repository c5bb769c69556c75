"""Resume on other devices: save a run with a table on eight devices, and go on with two.

The table and its moments are split by rows over the mesh. Orbax restores each array with the
sharding in `target`. Without `XLA_FLAGS`, the program makes eight CPU devices.

Needs orbax-checkpoint. Run it with `python docs/recipes/other_devices.py`.
"""

import os
import tempfile
from pathlib import Path

if "XLA_FLAGS" not in os.environ:  # before JAX starts
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8"

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import adamjax

SPLIT = {"users": P("data"), "out": P()}  # P("data", None) would compile the second step again


def initial_params():
    return {"users": jax.random.normal(jax.random.key(0), (8_000, 16)), "out": jnp.ones(16) / 16}


def loss_fn(params, ids):
    return jnp.mean((params["users"][ids] @ params["out"] - ids % 2) ** 2)


tx = adamjax.exact_rows(adamjax.adamw(adamjax.cosine_decay(0.01, 60)), "^users$")
step = adamjax.train_step(loss_fn, tx)


def train(mesh, params, state, steps):
    with jax.set_mesh(mesh):
        for i in steps:
            ids = jax.random.randint(jax.random.key(i), (256,), 0, 400)
            ids = jax.device_put(ids, NamedSharding(mesh, P("data")))
            params, state, _ = step(params, state, ids)
    return params, state


def target(mesh):
    """The shapes of a run, with shardings on a mesh."""
    params = jax.eval_shape(initial_params)
    shardings = {name: NamedSharding(mesh, spec) for name, spec in SPLIT.items()}
    run = params, jax.eval_shape(tx.init, params)
    shardings = shardings, adamjax.state_shardings(tx, params, mesh)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), run, shardings
    )


eight, two = (jax.sharding.Mesh(jax.devices()[:n], "data") for n in (8, 2))
params = jax.device_put(initial_params(), jax.tree.map(lambda x: x.sharding, target(eight)[0]))
run = train(eight, params, jax.jit(tx.init)(params), range(30))
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(Path(folder) / "run", run)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(Path(folder) / "run", target(two))
on_eight, _ = tx.flush(*train(eight, *run, range(30, 60)))
on_two, _ = tx.flush(*train(two, *restored, range(30, 60)))
print("devices of the table:", *(len(x["users"].sharding.device_set) for x in (on_eight, on_two)))
differences = jax.tree.map(lambda a, b: abs(a - b).max(), *jax.device_get((on_eight, on_two)))
print(f"the largest difference of a weight: {max(differences.values()):.0e}")
