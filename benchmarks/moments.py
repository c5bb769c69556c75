"""The errors of Adam's moments in few bits, compared with the recurrence in float64.

Adam runs on gradients of several kinds and magnitudes, with moments in a format and in float64.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adamjax

B1, B2 = 0.9, 0.999

KINDS = ("constant", "decaying", "sparse", "heavy-tailed")
SCALES = (1e-9, 1.0, 1e4)
COMPARE_EVERY = 10  # steps
FLOAT32_ERROR = 1e-5  # the mean error of float32 itself, relative to a moment, in 20,000 steps


def gradients(kind: str, steps: int, elements: int) -> np.ndarray:
    """float32[steps, elements], each element with gradients of its own magnitude."""
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(size=elements)) * rng.choice([-1, 1], elements)
    factors = {
        "constant": lambda: np.ones((steps, 1)),
        "decaying": lambda: np.geomspace(1, 0.01, steps)[:, None],
        "sparse": lambda: rng.random((steps, elements)) < 0.05,
        "heavy-tailed": lambda: rng.standard_t(2.5, (steps, elements)),
    }
    return (sizes * factors[kind]()).astype(np.float32)


@functools.cache
def trajectory(form: str) -> Callable[[np.ndarray], tuple[jax.Array, ...]]:
    """A function from gradients to m, v and the update at each compared step, for a format."""
    tx = adamjax.scale_by_adam(B1, B2, eps_hat=1e-17, m_dtype=form, v_dtype=form)

    def step(carry: Any, g: jax.Array) -> tuple[Any, None]:
        update, state = tx.update(g, carry[1])
        return (update, state), None

    def until_compared(carry: Any, g: jax.Array) -> tuple[Any, Any]:
        update, state = carry = jax.lax.scan(step, carry, g)[0]
        return carry, (adamjax.get_slot(state, "m"), adamjax.get_slot(state, "v"), update)

    def run(g: jax.Array) -> Any:
        groups = g.reshape(-1, COMPARE_EVERY, g.shape[-1])
        first = jnp.zeros_like(g[0]), tx.init(g[0])
        return jax.lax.scan(until_compared, first, groups)[1]

    return jax.jit(run)


def reference(g: np.ndarray, every: int = COMPARE_EVERY) -> tuple[np.ndarray, ...]:
    """m, v and the updates of Adam in float64, from algorithm 1 of arXiv:1412.6980."""
    m = v = np.zeros(g.shape[1])
    results: list[tuple[np.ndarray, ...]] = []
    for t, x in enumerate(g.astype(np.float64), start=1):
        m, v = B1 * m + (1 - B1) * x, B2 * v + (1 - B2) * x * x
        if t % every == 0:
            root = np.sqrt(v / (1 - B2**t))
            update = np.divide(m / (1 - B1**t), root, out=np.zeros_like(m), where=root > 0)
            results.append((m, v, update))
    return tuple(map(np.stack, zip(*results, strict=True)))


def errors(
    ours: Sequence[Any], expected: Sequence[np.ndarray], float32_error: float = FLOAT32_ERROR
) -> dict[str, Any]:
    """The errors of m, v and the updates, arrays of steps and elements, from those in float64.

    The error of a moment is relative to the moment itself, or to a thousandth of the step's root
    mean square if that is larger. `float32_error` is the mean error that float32 itself may have.

    Returns:
      "biased", for m and v the share of the steps at which the mean error is beyond three standard
      errors plus `float32_error`; "bias", their mean error over all steps; "update", the mean error
      of an update, relative to the mean size of an update; "finite", whether all are finite.
    """
    result: dict[str, Any] = {"biased": {}, "bias": {}}
    m, v, update = (np.asarray(x, np.float64) for x in ours)
    for name, x, y in (("m", m, expected[0]), ("v", v, expected[1])):
        size = np.sqrt(np.mean(y**2, axis=1, keepdims=True))
        error = (x - y) / np.maximum(np.abs(y), 1e-3 * size)
        standard_error = error.std(axis=1) / np.sqrt(error.shape[1])
        beyond = np.abs(error.mean(axis=1)) > 3 * standard_error + float32_error
        result["biased"][name] = float(beyond.mean())
        result["bias"][name] = float(error.mean())
    error = np.abs(update - expected[2])
    result["update"] = float(error.mean() / np.abs(expected[2]).mean())
    result["finite"] = bool(all(np.isfinite(x).all() for x in (m, v, update)))
    return result
