"""Comparing the steps of two optimizers from the same states."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.convert.adamjax_state import AdamjaxState
from adamjax.data import Tree
from adamjax.leaves import is_left_alone
from adamjax.paths import flatten, leaf_paths
from adamjax.structure import slot_states

__all__ = ["expect_same_steps"]

# How much larger gradients are in each of the steps that are compared. A clip shows where they are
# large, and an epsilon where they are small.
_SCALES = (1.0, 30.0, 1e3, 0.1, 1.0, 1e-3, 10.0, 1.0, 0.3)
_SMALL = (1e-8, 3e-8, 1e-8)
# A weight decay shows at large weights, and the rest at small ones.
_WEIGHTS = (1e3, 1e-2)
# How far two updates of a leaf may be apart, as a part of the largest. float32 rounds off less.
# adamjax rounds narrow moments at random, and optax computes in their dtype.
_RTOL, _NARROW_RTOL, _NARROW_OPTAX_RTOL = 3e-4, 0.03, 0.1


def expect_same_steps(ours: AdamjaxState, optimizer: Any, state: Any, rtol: float) -> None:
    """Refuses a transform that does not move weights as optax' optimizer does.

    Both take some steps from their initial states, and some from the states of the conversion, with
    random gradients of many sizes. In the last, one leaf has a gradient that is not finite. Where
    optax' rule has another form, as AMSGrad's, only the states of the conversion are tried.

    Args:
      ours: the state of adamjax, with its transform.
      optimizer, state: the transform of optax, and its state.
      rtol: as for `from_optax`.
    """
    owner, tx, params = ours.owner, ours.tx, ours.params
    _expect_made_by(owner, optimizer, state, params)
    rng = np.random.default_rng(0)

    def drawn(scale: float) -> Tree:
        def leaf(p: Any) -> Any:
            if p is None or is_left_alone(p):
                return p
            return jnp.asarray(scale * rng.normal(size=np.shape(p)), jnp.result_type(p))

        return jax.tree.map(leaf, params)

    floats = [x for x in jax.tree.leaves(params) if not is_left_alone(x)]
    small, scales = list(_SMALL), list(_SCALES)
    if any(jnp.result_type(x) == jnp.float16 for x in floats):
        # optax computes in float16, where larger squares overflow, and its epsilon is 0.
        small, scales = [], [x for x in _SCALES if x <= 1]
    # A step takes this many calls, with gradients of one size.
    calls = math.prod(steps for steps, _ in ours.accumulations)
    update, other_update = jax.jit(tx.update), jax.jit(optimizer.update)
    rtol = max(rtol, _RTOL, _NARROW_RTOL * _has_narrow(ours.state))
    rtol = max(rtol, _NARROW_OPTAX_RTOL * _has_narrow(state))
    for size in _WEIGHTS:
        weights = drawn(size)
        usual = _usual_gradient(ours.state)
        starts = [("these states", ours.state, state, [usual, *(usual * x for x in scales)])]
        if set(ours.kinds) <= {"adam"}:
            first = tx.init(weights), optimizer.init(weights)
            starts.append(("their first step", *first, [*small, *scales]))
        for start, one, other, sizes in starts:
            # In optax, a call of MultiSteps that only accumulates moves weights by NaN too.
            last = [] if ours.accumulations else [math.nan]
            for i, scale in enumerate([*sizes, *last]):
                grads = _with_nan(drawn(1.0)) if math.isnan(scale) else drawn(scale)
                for _ in range(calls):
                    move, one = update(grads, one, weights)
                    other_move, other = other_update(grads, other, weights)
                    when = f"in step {i + 1} from {start} on"
                    _expect_close(owner, when, (move, other_move), weights, rtol)


def _expect_made_by(owner: str, optimizer: Any, state: Any, params: Tree) -> None:
    """Refuses a transform that has not made a state."""
    if not callable(getattr(optimizer, "update", None)) or not hasattr(optimizer, "init"):
        raise TypeError(
            f"{owner}: optimizer is {optimizer!r:.100}, expected the transform of optax, with init "
            "and update (of an nnx.Optimizer its tx)"
        )
    expected: Any = jax.tree.structure(jax.eval_shape(optimizer.init, params))
    if jax.tree.structure(state) != expected:
        raise ValueError(
            f"{owner}: the optax state has another structure than optimizer.init(params): pass the "
            "transform that made it (and of a state and of parameters of flax.nnx nnx.as_pure)"
        )


def _usual_gradient(state: Any) -> float:
    """The size of the gradients that the moments of a state are of; 1 if it has taken no step."""

    def root_mean_squares(slot: str, power: int) -> list[float]:
        trees = [getattr(x, slot) for x in slot_states(state) if hasattr(x, slot)]
        leaves = [np.asarray(x, np.float64) for x in jax.tree.leaves(trees) if np.size(x)]
        return [float(np.sqrt(np.mean(x**power))) for x in leaves]

    usual = max((*root_mean_squares("v", 1), *root_mean_squares("u", 2)), default=0.0)
    return usual if 1e-15 < usual < 1e15 else 1.0


def _has_narrow(state: Any) -> bool:
    """Whether a state has floats of fewer than 32 bits."""
    dtypes = [jnp.result_type(x) for x in jax.tree.leaves(state)]
    return any(jnp.issubdtype(x, jnp.floating) and x.itemsize < 4 for x in dtypes)


def _with_nan(grads: Tree) -> Tree:
    """Gradients of which the first leaf of floats is NaN."""
    leaves, treedef = flatten(grads)
    for i, x in enumerate(leaves):
        if x is not None and not is_left_alone(x) and x.size:
            return treedef.unflatten([*leaves[:i], jnp.full_like(x, np.nan), *leaves[i + 1 :]])
    return grads


def _expect_close(
    owner: str, when: str, moves: tuple[Tree, Tree], weights: Tree, rtol: float
) -> None:
    leaves = zip(
        leaf_paths(weights), *(flatten(tree)[0] for tree in (weights, *moves)), strict=True
    )
    for path, p, ours, theirs in leaves:
        if p is None or is_left_alone(p) or (ours is None and theirs is None):
            continue
        rounding = 2 * float(jnp.finfo(theirs.dtype).eps)
        wide = np.complex128 if np.iscomplexobj(theirs) else np.float64
        a, b = (np.asarray(x).astype(wide) for x in (ours, theirs))
        size = np.max(np.abs(b), where=np.isfinite(b), initial=0.0)
        far = np.isfinite(a) != np.isfinite(b)
        far |= np.isfinite(a) & np.isfinite(b) & ~(np.abs(a - b) <= max(rtol, rounding) * size)
        if np.any(far):
            i = np.argmax(far)
            raise ValueError(
                f"{owner}: {when}, tx moves an element of {path!r} by {a.flat[i]:.6g}, and the "
                f"optimizer of optax by {b.flat[i]:.6g}: compare their clips, rules, epsilons, "
                "weight decays with their masks, rates, dtypes and numbers of micro-batches"
            )
