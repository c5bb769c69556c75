"""Comparing the steps of two optimizers from the same states."""

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

# How much larger gradients are in each of the calls that are compared. A clip shows where they are
# large, an epsilon where they are small, and micro-batches where they change.
_SCALES = (1.0, 30.0, 1e3, 0.1, 1.0, 1e-3, 10.0, 1.0, 0.3, 1.0, 3.0, 1.0)
_SMALL = (1e-8, 3e-8, 1e-8)
# How far two updates of a leaf may be apart, as a part of the largest: float32 rounds off less, and
# narrow moments are rounded at random.
_RTOL, _NARROW_RTOL = 3e-4, 0.1


def expect_same_steps(ours: AdamjaxState, optimizer: Any, state: Any, rtol: float) -> None:
    """Refuses a transform that does not move weights as optax' optimizer does.

    Both take some steps from their initial states, and some from the states of the conversion, at
    large random weights, so that a weight decay shows, and with random gradients of many sizes. The
    last gradient is not finite. Where optax' rule has another form, as AMSGrad's, only the states
    of the conversion are tried.

    Args:
      ours: the state of adamjax, with its transform.
      optimizer, state: the transform of optax, and its state.
      rtol: as for `from_optax`.
    """
    owner, tx, params = ours.owner, ours.tx, ours.params
    if not callable(getattr(optimizer, "update", None)):
        raise TypeError(
            f"{owner}: optimizer is {optimizer!r:.100}, expected the transform of optax, with init "
            "and update"
        )
    rng = np.random.default_rng(0)

    def drawn(scale: float) -> Tree:
        def leaf(p: Any) -> Any:
            if p is None or is_left_alone(p):
                return p
            return jnp.asarray(scale * rng.normal(size=np.shape(p)), p.dtype)

        return jax.tree.map(leaf, params)

    weights = drawn(1e3)
    update, other_update = jax.jit(tx.update), jax.jit(optimizer.update)
    # In optax, a step of MultiSteps that only accumulates moves weights by NaN too.
    last = () if ours.accumulations else (np.nan,)
    starts = [("these states", ours.state, state, (*_SCALES, *last))]
    if set(ours.kinds) <= {"adam"}:
        first = tx.init(weights), optimizer.init(weights)
        starts.append(("their first step", *first, (*_SMALL, *_SCALES)))
    slots = [x for one in slot_states(ours.state) for x in jax.tree.leaves(one)]
    is_narrow = any(jnp.dtype(x.dtype).itemsize < 4 for x in slots)
    rtol = max(rtol, _NARROW_RTOL if is_narrow else _RTOL)
    for start, one, other, scales in starts:
        for i, scale in enumerate(scales):
            grads = drawn(scale)
            move, one = update(grads, one, weights)
            other_move, other = other_update(grads, other, weights)
            when = f"in step {i + 1} from {start} on"
            _expect_close(owner, when, (move, other_move), weights, rtol)


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
                "weight decays with their masks, rates and numbers of micro-batches"
            )
