"""Comparing the steps of two optimizers from the same states."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.convert.adamjax_state import AdamjaxState, contains_states
from adamjax.convert.hyperparameters import later_counts
from adamjax.convert.optax_state import advanced
from adamjax.convert.values import counts_a_schedule, map_items
from adamjax.data import Tree
from adamjax.exact.state import ExactRowsState
from adamjax.guard import AccumulateGradientsState
from adamjax.leaves import is_left_alone
from adamjax.paths import flatten, leaf_paths
from adamjax.scaling import ScheduleState
from adamjax.structure import rule_slots, slot_states, states_of_class

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
# How many later counts of schedules are compared at most.
_MOST_COUNTS = 100


def expect_same_steps(ours: AdamjaxState, optimizer: Any, state: Any, rtol: float) -> None:
    """Refuses a transform that does not move weights as optax' optimizer does.

    Both take some steps from the states of the conversion, some with rules that have taken no step,
    and one each at many later counts of their schedules. The gradients are random, of many sizes,
    and in some steps one leaf is not finite. Where optax' rule has another form, as AMSGrad's, all
    steps go on from the moments of the conversion.

    Args:
      ours: the state of adamjax, with its transform.
      optimizer, state: the transform of optax, and its state.
      rtol: as for `from_optax`.
    """
    _expect_made_by(ours.owner, optimizer, state, ours.params)
    compared = _Comparison(ours, optimizer, state, rtol)
    restart = set(ours.kinds) <= {"adam"}
    fresh = ours.tx.init(ours.params), optimizer.init(ours.params)
    calls = compared.calls

    def starts(steps: int) -> tuple[Any, Any]:
        return (
            _advanced(ours, ours.state, fresh[0], steps, calls, restart),
            advanced(state, fresh[1], steps, calls, restart),
        )

    floats = [x for x in jax.tree.leaves(ours.params) if not is_left_alone(x)]
    # optax computes in float16, where larger squares overflow, and its epsilon is 0.
    is_float16 = any(jnp.result_type(x) == jnp.float16 for x in floats)
    small = [] if is_float16 else list(_SMALL)
    scales = [x for x in _SCALES if x <= 1] if is_float16 else list(_SCALES)
    usual = _usual_gradient(ours.state)
    # In optax, a call of MultiSteps that only accumulates moves weights by NaN too.
    not_finite = [] if ours.accumulations else [math.nan]
    for size in _WEIGHTS:
        sizes = [usual, *(usual * x for x in scales), *not_finite]
        compared.expect_same("these states", (ours.state, state), size, sizes)
        if restart:
            compared.expect_same("their first step", starts(0), size, [*small, *scales])
    counts = [int(x.count) for x in states_of_class(ScheduleState, ours.state)]
    if counts:
        one = 1.0 if restart else usual
        for count in later_counts(max(counts), ours.tx)[:_MOST_COUNTS]:
            start, steps = f"count {count}", count - max(counts)
            compared.expect_same(start, starts(steps), _WEIGHTS[1], [one, *not_finite, one])
    if not compared.has_moved:
        # The rate is 0 from here on, and hides everything else.
        compared.expect_same("the state of init", fresh, _WEIGHTS[1], [1.0, *small, *scales])


class _Comparison:
    """Steps of both optimizers with the same gradients.

    Attributes:
      calls: how many calls a step takes.
      has_moved: whether optax has moved a weight in a step so far.
    """

    def __init__(self, ours: AdamjaxState, optimizer: Any, state: Any, rtol: float) -> None:
        self.owner, self.params = ours.owner, ours.params
        self.rng = np.random.default_rng(0)
        self.calls = math.prod(steps for steps, _ in ours.accumulations)
        self.update, self.other_update = jax.jit(ours.tx.update), jax.jit(optimizer.update)
        self.rtol = max(rtol, _RTOL, _NARROW_RTOL * _has_narrow(ours.state))
        self.rtol = max(self.rtol, _NARROW_OPTAX_RTOL * _has_narrow(state))
        self.has_moved = False

    def expect_same(
        self, start: str, states: tuple[Any, Any], size: float, sizes: Sequence[float]
    ) -> None:
        """Takes steps with weights of one size and gradients of each of these sizes."""
        one, other = states
        weights = self._drawn(size)
        for i, scale in enumerate(sizes):
            for _ in range(self.calls):
                grads = _with_nan(self._drawn(1.0)) if math.isnan(scale) else self._drawn(scale)
                move, one = self._step(self.update, grads, one, weights)
                other_move, other = self._step(self.other_update, grads, other, weights)
                when = f"in step {i + 1} from {start} on"
                _expect_close(self.owner, when, (move, other_move), weights, self.rtol)
                self.has_moved |= any(bool(np.any(x)) for x in jax.tree.leaves(other_move))

    def _step(self, update: Any, *args: Any) -> tuple[Any, Any]:
        try:
            new: tuple[Any, Any] = update(*args)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise TypeError(
                f"{self.owner}: steps cannot be compared, because an update needs more than "
                f"gradients, state and parameters ({error}): convert without optimizer="
            ) from error
        return new

    def _drawn(self, scale: float) -> Tree:
        def leaf(p: Any) -> Any:
            if p is None or is_left_alone(p):
                return p
            # In float16, squares of much smaller numbers would be inaccurate.
            x = scale * self.rng.uniform(0.5, 1.5, np.shape(p))
            return jnp.asarray(x * self.rng.choice([-1, 1], np.shape(p)), jnp.result_type(p))

        return jax.tree.map(leaf, self.params)


def _advanced(ours: AdamjaxState, x: Any, fresh: Any, steps: int, calls: int, restart: bool) -> Any:
    """A state of adamjax whose schedules are some steps further on; see `advanced` for optax."""
    if rule_slots(x):
        return fresh if restart else x
    if isinstance(x, ScheduleState) or counts_a_schedule(x):
        return x._replace(count=x.count + steps * calls)
    if isinstance(x, AccumulateGradientsState):
        return fresh._replace(inner=_advanced(ours, x.inner, fresh.inner, steps, 1, restart))
    if isinstance(x, ExactRowsState):
        part: Any = ours.part(x)
        inner = _advanced(ours, x.inner, fresh.inner, steps, calls, restart)
        return part.tx.from_dense(inner, part.params)
    if contains_states(x):
        return map_items(lambda a, b: _advanced(ours, a, b, steps, calls, restart), x, fresh)
    return x


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
                "weight decays with their masks, rates, schedules, dtypes and numbers of "
                "micro-batches (and freeze leaves with set_to_zero: 0 times NaN is NaN)"
            )
