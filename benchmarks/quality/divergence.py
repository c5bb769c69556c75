"""How far rows end from where dense Adam puts them: rows read often and rarely, for several b2.

It needs neither data nor a model. A table has a row for each gap. A row of gap n is read in every
n-th step, with gradients that are the same for every contender.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.quality.contenders import MAKERS

GAPS = (1, 2, 5, 10, 20, 50, 100, 200, 500)
B2S = (0.9, 0.99, 0.999, 0.9999)
NAMES = ("exact", "lazy", "counted", "local")
STEPS, WIDTH, RATE = 4000, 256, 1e-3


def batches(steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows int32[steps, rows], and their gradients [steps, rows, WIDTH].

    In place of a row that a step does not read, it reads an extra row with a gradient of zero. The
    others have the mean 0.5 and the standard deviation 1.
    """
    rng = np.random.default_rng(0)
    is_read = np.arange(steps)[:, None] % np.array(GAPS) == 0
    ids = np.where(is_read, np.arange(len(GAPS)), len(GAPS)).astype(np.int32)
    gradients = rng.normal(0.5, 1, (steps, len(GAPS), WIDTH)).astype(np.float32)
    return ids, gradients * is_read[..., None]


def loss(params: Any, batch: Any) -> jax.Array:
    """A loss whose gradients are those in the batch."""
    ids, gradients = batch
    return jnp.sum(params["table"][ids] * gradients)


def weights(name: str, b2: float, steps: int) -> np.ndarray:
    """float32[gaps, WIDTH], the rows after the steps, from zero."""
    contender = MAKERS[name](loss, ("table",), RATE, b2)

    @jax.jit
    def run(batches: Any) -> Any:
        carry = contender.init({"table": jnp.zeros((len(GAPS) + 1, WIDTH))})
        carry, _ = jax.lax.scan(lambda c, batch: (contender.step(c, batch), None), carry, batches)
        return contender.read(carry)["table"]

    return np.asarray(run(batches(steps)))[:-1]


def measured(b2: float, steps: int) -> dict[str, list[float]]:
    """For each contender and gap, the mean distance from dense divided by dense's own movement."""
    dense = weights("dense", b2, steps)
    movement = np.abs(dense).mean(1)
    relative = {}
    for name in NAMES:
        distance = np.abs(weights(name, b2, steps) - dense).mean(1)
        relative[name] = [float(f"{x:.3g}") for x in distance / movement]
    return relative
