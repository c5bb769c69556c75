"""Flax NNX: train a model with a table, evaluate it, save it and resume, and log the rate.

`exact_rows` computes Adam's dense result at the cost of the rows that a batch reads. Evaluation and
checkpoints need no `flush` before. A resumed run has the same weights.

Needs flax and orbax-checkpoint. Run it with `python docs/recipes/flax_nnx.py`.
"""

import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

import adamjax

STEPS = 60


class Ratings(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.embed = nnx.Embed(5_000, 16, rngs=rngs)
        self.out = nnx.Linear(16, 1, rngs=rngs)

    def __call__(self, pairs):
        return self.out(self.embed(pairs[:, 0]) * self.embed(pairs[:, 1]))[:, 0]


graph, params, rest = nnx.split(Ratings(nnx.Rngs(0)), nnx.Param, ...)
params = nnx.as_pure(params)  # plain arrays


def loss_fn(params, pairs, ratings):
    return jnp.mean((nnx.merge(graph, params, rest)(pairs) - ratings) ** 2)


rate = adamjax.warmup(adamjax.cosine_decay(0.05, decay_steps=STEPS), steps=5)
tx = adamjax.exact_rows(adamjax.adamw(rate, mask="kernel"), "embedding")
step, evaluate = adamjax.train_step(loss_fn, tx), adamjax.eval_step(loss_fn, tx)


def batch(i):
    """Pairs of items, which go together if both numbers are even or both are odd."""
    pairs = np.random.default_rng(i).integers(0, 40, size=(64, 2))
    return jnp.asarray(pairs), jnp.asarray(1.0 - 2.0 * (pairs.sum(axis=1) % 2))


def train(params, state, steps):
    for i in steps:
        if i % 20 == 10:
            print(f"step {i}: learning rate {adamjax.learning_rate(tx, state):.4f}")
        params, state, _ = step(params, state, *batch(i))
    return params, state


params, state = train(params, tx.init(params), range(STEPS // 2))
with tempfile.TemporaryDirectory() as folder, ocp.StandardCheckpointer() as checkpointer:
    run = {"params": params, "state": state}
    checkpointer.save(Path(folder) / "run", run)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(Path(folder) / "run", jax.eval_shape(lambda: run))

params, state = train(params, state, range(STEPS // 2, STEPS))
resumed, _ = train(restored["params"], restored["state"], range(STEPS // 2, STEPS))
same = jax.tree.all(jax.tree.map(np.array_equal, params, resumed))
print(f"held-out loss: {evaluate(params, state, *batch(1000)):.3f}")
print("the resumed run has the same weights:", same)
