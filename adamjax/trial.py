"""A transform, and the trees that the laws try it on."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.data import Tree
from adamjax.leaves import apply_updates, is_left_alone
from adamjax.paths import flatten, leaf_paths
from adamjax.rows import row_gradient
from adamjax.transform import Transform

__all__ = ["Trial", "cast", "take_step", "take_three_steps"]

# The number of rows of the default tables.
_ROWS = 7


def _default_params() -> Tree:
    rng = np.random.default_rng(0)
    kernel, bias, gain = rng.normal(size=(2, 3)), rng.normal(size=3), rng.normal()
    arrays = {"layer": {"kernel": kernel, "bias": bias}, "gain": gain}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), arrays)


class Trial:
    """A transform, and the trees that the laws try it on.

    Args:
      tx: the transform.
      params: a tree of float32 arrays. By default they have the shapes `{"layer": {"kernel":
        [2, 3], "bias": [3]}, "gain": []}`. Give a tree if the transform is made for certain paths
        or shapes.
      reference: see `check`.
    """

    def __init__(
        self, tx: Any, params: Tree = None, reference: Callable[..., Any] | None = None
    ) -> None:
        self.tx, self.reference = tx, reference
        # Whether tx is or contains another library's transform. Such a transform would compute with
        # the gradients of integers, so `mixed_params` then has no integers.
        self.has_foreign = not isinstance(tx, Transform) or tx.has_foreign
        self.is_default = params is None
        # How often `step_with_tx` was traced.
        self.num_traces = 0
        self._trajectories: dict[Any, list[tuple[Any, ...]]] = {}
        # A trial may be made while a function is traced. The parameters must be arrays even then.
        with jax.ensure_compile_time_eval():
            self.params = _default_params() if params is None else jax.tree.map(jnp.asarray, params)

    def params_in(self, dtype: Any) -> Tree:
        """The parameters in another dtype."""
        return cast(self.params, dtype)

    def grads(self, t: int, dtype: Any = jnp.float32) -> Tree:
        """The gradients of step t, 0 for the first."""
        rng = np.random.default_rng(100 + t)
        return jax.tree.map(lambda p: jnp.asarray(rng.normal(size=p.shape), dtype), self.params)

    def step(self, params: Tree, state: Any, grads: Tree) -> tuple[Tree, Any, Tree]:
        """One step, not jitted: the next parameters and state, and the updates."""
        return take_step(self.tx, params, state, grads)

    @functools.cached_property
    def compiled(self) -> Callable[..., tuple[Tree, Any, Tree]]:
        """`step`, jitted."""
        return jax.jit(self.step)

    def trajectory(self, dtype: Any = jnp.float32) -> list[tuple[Any, ...]]:
        """`(params before, state before, grads, updates)` of each of six compiled steps.

        The last entry of the list is `(params, state, None, None)` after these steps.
        """
        if dtype in self._trajectories:
            return self._trajectories[dtype]
        params = self.params_in(dtype)
        state, history = self.tx.init(params), []
        for t in range(6):
            grads = self.grads(t, dtype)
            next_params, next_state, updates = self.compiled(params, state, grads)
            history.append((params, state, grads, updates))
            params, state = next_params, next_state
        self._trajectories[dtype] = [*history, (params, state, None, None)]
        return self._trajectories[dtype]

    # --- hyperparameters

    @functools.cached_property
    def step_with_tx(self) -> Callable[..., tuple[Tree, Any, Tree]]:
        """`take_step`, jitted: the transform is an argument."""

        def step(tx: Any, params: Tree, state: Any, grads: Tree) -> tuple[Tree, Any, Tree]:
            self.num_traces += 1
            return take_step(tx, params, state, grads)

        return jax.jit(step)

    def take_three_steps_with(self, tx: Any) -> tuple[Tree, list[Tree]]:
        """The parameters after three steps of `step_with_tx` with a transform, and the updates."""
        return take_three_steps(functools.partial(self.step_with_tx, tx), tx, self)

    # --- leaves of all kinds

    @functools.cached_property
    def mixed_params(self) -> Tree:
        """Every kind of leaf that a model may have, or the user's parameters in several dtypes.

        Without integers if `has_foreign`.
        """
        if not self.is_default:
            leaves, treedef = flatten(self.params)
            dtypes = [(jnp.float32, jnp.bfloat16, jnp.float16)[i % 3] for i in range(len(leaves))]
            if len(leaves) > 1 and not self.has_foreign:
                dtypes[-1] = jnp.int32
            pairs = zip(leaves, dtypes, strict=True)
            return treedef.unflatten([x.astype(dtype) for x, dtype in pairs])
        floats = {
            "layer": {
                "kernel": jnp.array([[1.0, -2.0], [0.5, 3.0]]),
                "bias": jnp.array([1.0, -0.5, 0.25], jnp.bfloat16),
            },
            "half": jnp.array([1.0, -0.5], jnp.float16),
            "wave": jnp.array([1.0 + 2.0j, -1.0j]),
            "gain": jnp.array(0.5),
            "empty": jnp.zeros((0, 2)),
        }
        integers = {"count": jnp.ones(2, jnp.int32), "flag": jnp.array(True)}
        return floats if self.has_foreign else {**floats, **integers}

    def mixed_grads(self, integers: str = "float0") -> Tree:
        """Gradients of `mixed_params`; integers get "float0", "zero" or "None"."""

        def grad(p: Any) -> Any:
            if not is_left_alone(p):
                return 0.3 * p + jnp.ones_like(p)
            float0 = np.zeros(p.shape, jax.dtypes.float0)
            return {"float0": float0, "zero": jnp.zeros_like(p), "None": None}[integers]

        return jax.tree.map(grad, self.mixed_params)

    @functools.cached_property
    def mixed_run(self) -> list[tuple[Any, ...]]:
        """Three steps over leaves of all kinds. In the last, one leaf has no gradient.

        Each is a tuple `(params, state, grads, updates, next_params, next_state)`.
        """
        params, history = self.mixed_params, []
        state = self.tx.init(params)
        leaves, treedef = flatten(self.mixed_grads("None"))
        path = "layer/kernel" if self.is_default else leaf_paths(params)[0]
        i = leaf_paths(params).index(path)
        without_one = treedef.unflatten([*leaves[:i], None, *leaves[i + 1 :]])
        for grads in (self.mixed_grads(), self.mixed_grads("zero"), without_one):
            updates, next_state = self.tx.update(grads, state, params)
            next_params = apply_updates(params, updates)
            history.append((params, state, grads, updates, next_params, next_state))
            params, state = next_params, next_state
        return history

    # --- tables

    @functools.cached_property
    def table_params(self) -> Tree:
        """Parameters, some of which are tables. The default parameters have more rows here."""
        if not self.is_default:
            return self.params
        rng = np.random.default_rng(1)
        kernel, bias = rng.normal(size=(_ROWS, 3)), rng.normal(size=_ROWS)
        layer = {"kernel": jnp.asarray(kernel), "bias": jnp.asarray(bias)}
        return {**self.params, "layer": cast(layer, jnp.float32)}

    def row_grads(self, t: int) -> Tree:
        """The gradients of step t. A leaf with two rows or more is a table, with a row gradient."""
        rng = np.random.default_rng(200 + t)

        def grad(p: Any) -> Any:
            n = len(p) if p.ndim else 0
            if n < 2:
                return jnp.asarray(rng.normal(size=p.shape), p.dtype)
            # One index occurs twice, and one is outside of the table.
            ids = np.array([t, 2 * t + 1, t]) % n
            ids = np.append(ids, n)
            values = rng.normal(size=(len(ids), *p.shape[1:]))
            return row_gradient(jnp.asarray(ids, jnp.int32), jnp.asarray(values, p.dtype), n)

        return jax.tree.map(grad, self.table_params)


def take_step(tx: Any, params: Tree, state: Any, grads: Tree) -> tuple[Tree, Any, Tree]:
    updates, state = tx.update(grads, state, params)
    return apply_updates(params, updates), state, updates


def cast(tree: Tree, dtype: Any) -> Tree:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def take_three_steps(step: Callable[..., Any], tx: Any, trial: Trial) -> tuple[Tree, list[Tree]]:
    """The parameters after three steps, and the updates."""
    params, history = trial.params, []
    state = tx.init(params)
    for t in range(3):
        params, state, updates = step(params, state, trial.grads(t))
        history.append(updates)
    return params, history
