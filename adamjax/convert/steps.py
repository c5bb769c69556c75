"""Comparing the steps of two optimizers from the same states."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.convert.adamjax_state import AdamjaxState
from adamjax.convert.advance import (
    Advance,
    MakeRule,
    advanced_adamjax,
    advanced_optax,
    late_rule,
    new_rule,
    rule_as_it_is,
)
from adamjax.convert.optax_state import read_state
from adamjax.convert.schedules import has_schedule, later_counts
from adamjax.data import Tree
from adamjax.leaves import is_left_alone
from adamjax.paths import flatten, leaf_paths
from adamjax.scaling import ScheduleState
from adamjax.schedule import by_path
from adamjax.structure import slot_states, states_of_class

__all__ = ["expect_made_by", "expect_optimizer", "expect_same_steps"]

# How much larger gradients are in each of the steps that are compared. A clip shows where they are
# large, and an epsilon where they are small.
_SCALES = (1.0, 30.0, 1e3, 0.1, 1.0, 1e-3, 10.0, 1.0, 0.3)
_SMALL = (1e-8, 3e-8, 1e-8)
# A weight decay shows at large weights, and the rest at small ones.
_WEIGHTS = (1e3, 1e-2)
# How far two updates of a leaf may be apart, as a part of the largest. float32 rounds off less.
# adamjax rounds narrow moments at random, and optax computes in their dtype.
_RTOL, _NARROW_RTOL, _NARROW_OPTAX_RTOL = 3e-4, 0.03, 0.1
# And as a part of the leaf's largest update in any step: a schedule rounds off as much at its end.
_ROUNDING = 1e-6
# How many later counts of schedules are compared, if a step is one call and if it is many, and the
# last of them.
_MOST_COUNTS, _FEWEST_COUNTS, _LAST_COUNT = 100, 12, 1 << 24


def expect_same_steps(ours: AdamjaxState, optimizer: Any, state: Any, rtol: float) -> None:
    """Refuses a transform that does not move weights as optax' optimizer does.

    Both take some steps from the states of the conversion, some with rules that have taken no step
    or many, and one each at many later counts of their schedules. The gradients are random, of many
    sizes, and in some steps one leaf is not finite. Where optax' rule has another form, as
    AMSGrad's, all steps go on from the rules of the conversion.

    Args:
      ours: the state of adamjax, with its transform.
      optimizer, state: the transform of optax, and its state.
      rtol: as for `from_optax`.
    """
    with jax.debug_nans(False):
        _compare(_Comparison(ours, optimizer, state, rtol), ours, optimizer, state)


def _compare(compared: "_Comparison", ours: AdamjaxState, optimizer: Any, state: Any) -> None:
    fresh = ours.tx.init(ours.params), optimizer.init(ours.params)
    has_same_form = set(ours.kinds) <= {"adam"}

    def starts(steps: int, rule: MakeRule = new_rule) -> tuple[Any, Any]:
        how = Advance(steps, compared.calls, rule if has_same_form else rule_as_it_is)
        return (
            advanced_adamjax(ours, ours.state, fresh[0], how),
            advanced_optax(state, fresh[1], how),
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
        if has_same_form:
            compared.expect_same("their first step", starts(0), size, [*small, *scales])
            compared.expect_same("a late step", starts(0, late_rule), size, [usual * max(scales)])
    one = 1.0 if has_same_form else usual
    for count, steps in _later_steps(ours, state, compared.calls):
        compared.expect_same(f"count {count}", starts(steps), _WEIGHTS[1], [one, *not_finite, one])
    if not compared.has_moved:
        # The rate is 0 from here on, and hides everything else.
        compared.expect_same("the state of init", fresh, _WEIGHTS[1], [1.0, *small, *scales])


def _later_steps(ours: AdamjaxState, state: Any, calls: int) -> list[tuple[int, int]]:
    """Later counts at which steps are compared, each with the number of steps until then."""
    now = [int(x.count) for x in states_of_class(ScheduleState, ours.state)]
    schedules = [part.tx for part in ours.parts if has_schedule(part.tx)]
    if not now or not (schedules or read_state(ours.owner, state).counts):
        return []
    counts = [x for x in later_counts(max(now), ours.tx) if x <= _LAST_COUNT]
    counts = [x for x in counts if not any(_is_negative(tx, x) for tx in schedules)]
    most = max(_MOST_COUNTS // calls, _FEWEST_COUNTS)
    counts = counts[:: -(-len(counts) // most)] if counts else []
    return [(count, count - max(now)) for count in counts]


def _is_negative(tx: Any, count: int) -> bool:
    """Whether a rate is below 0 at a count, as a schedule may be after the end of a training."""
    rate = getattr(tx, "learning_rate", None)
    rates = (*rate.values, rate.default) if isinstance(rate, by_path) else (rate,)
    return any(callable(x) and float(x(jnp.int32(count))) < 0 for x in rates)


class _Comparison:
    """Steps of both optimizers with the same gradients.

    Attributes:
      calls: how many calls a step takes.
      has_moved: whether optax has moved a weight in a step so far.
      largest: by the size of weights and the place of a leaf, optax' largest update of it so far.
    """

    def __init__(self, ours: AdamjaxState, optimizer: Any, state: Any, rtol: float) -> None:
        self.owner, self.params = ours.owner, ours.params
        self.rng = np.random.default_rng(0)
        self.calls = math.prod(steps for steps, _ in ours.accumulations)
        self.update, self.other_update = jax.jit(ours.tx.update), jax.jit(optimizer.update)
        # Adam has the same form in optax.
        self.rtol = _RTOL if set(ours.kinds) <= {"adam"} else max(rtol, _RTOL)
        self.rtol = max(self.rtol, _NARROW_RTOL * _has_narrow(ours.state))
        self.rtol = max(self.rtol, _NARROW_OPTAX_RTOL * _has_narrow(state))
        self.has_moved = False
        self.largest: dict[tuple[float, int], float] = {}

    def expect_same(
        self, start: str, states: tuple[Any, Any], size: float, sizes: Sequence[float]
    ) -> None:
        """Takes steps with weights of one size and gradients of each of these sizes."""
        one, other = states
        weights = self._drawn(size, self._signs())
        for i, scale in enumerate(sizes):
            # Of one sign in all micro-batches: in float16, small means would be inaccurate.
            signs = self._signs()
            for _ in range(self.calls):
                grads = self._drawn(1.0 if math.isnan(scale) else scale, signs)
                grads = _with_nan(grads) if math.isnan(scale) else grads
                move, one = self._step(self.update, grads, one, weights)
                other_move, other = self._step(self.other_update, grads, other, weights)
                if not _is_finite(other_move):
                    return  # This ends the run in optax. A transform may skip the step.
                self._expect_close(f"in step {i + 1} from {start} on", size, move, other_move)

    def _step(self, update: Any, *args: Any) -> tuple[Any, Any]:
        try:
            new: tuple[Any, Any] = update(*args)
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise TypeError(
                f"{self.owner}: steps cannot be compared, because an update needs more than "
                f"gradients, state and parameters ({error}): compare the hyperparameters "
                "yourself, and pass check=False"
            ) from error
        return new

    def _signs(self) -> list[Any]:
        return [self.rng.choice([-1, 1], np.shape(p)) for p in flatten(self.params)[0]]

    def _drawn(self, scale: float, signs: list[Any]) -> Tree:
        """Random numbers like the parameters, of about one size."""
        leaves, treedef = flatten(self.params)
        for i, p in enumerate(leaves):
            if p is not None and not is_left_alone(p):
                x = scale * self.rng.uniform(0.5, 1.5, np.shape(p))
                leaves[i] = jnp.asarray(x * signs[i], jnp.result_type(p))
        return treedef.unflatten(leaves)

    def _expect_close(self, when: str, size: float, move: Tree, other_move: Tree) -> None:
        moves = zip(
            leaf_paths(self.params),
            *(flatten(tree)[0] for tree in (self.params, move, other_move)),
            strict=True,
        )
        for place, (path, p, ours, theirs) in enumerate(moves):
            if p is None or is_left_alone(p) or (ours is None and theirs is None):
                continue
            rtol = max(self.rtol, 2 * float(jnp.finfo(theirs.dtype).eps))
            wide = np.complex128 if np.iscomplexobj(theirs) else np.float64
            a, b = (np.asarray(x).astype(wide) for x in (ours, theirs))
            now = float(np.max(np.abs(b), initial=0.0))
            largest = max(now, self.largest.get((size, place), 0.0))
            self.largest[size, place] = largest
            self.has_moved |= now > 0
            far = ~(np.abs(a - b) <= rtol * now + _ROUNDING * largest)  # true of NaN
            if np.any(far):
                i = np.argmax(far)
                raise ValueError(
                    f"{self.owner}: {when}, tx moves an element of {path!r} by {a.flat[i]:.6g}, "
                    f"and the optimizer of optax by {b.flat[i]:.6g}: compare their clips, rules, "
                    "epsilons, weight decays with their masks, rates, schedules, dtypes and "
                    "numbers of micro-batches (and freeze leaves with set_to_zero: 0 times NaN is "
                    "NaN)"
                )


def _is_finite(tree: Tree) -> bool:
    return all(bool(np.all(np.isfinite(np.asarray(x)))) for x in jax.tree.leaves(tree))


def expect_optimizer(owner: str, optimizer: Any) -> None:
    """Refuses what is no transform."""
    if optimizer is None:
        raise TypeError(
            f"{owner}: pass optimizer=, the transform of optax. Its state does not contain the "
            "hyperparameters, so steps of both are compared. check=False compares nothing"
        )
    if not callable(getattr(optimizer, "update", None)) or not hasattr(optimizer, "init"):
        raise TypeError(
            f"{owner}: optimizer is {optimizer!r:.100}, expected the transform of optax, with init "
            "and update (of an nnx.Optimizer its tx)"
        )


def expect_made_by(owner: str, optimizer: Any, state: Any, params: Tree) -> None:
    """Refuses a transform that has not made a state."""
    expected: Any = jax.tree.structure(jax.eval_shape(optimizer.init, params))
    if jax.tree.structure(state) != expected:
        raise ValueError(
            f"{owner}: the optax state has another structure than optimizer.init(params): pass the "
            "transform that made it, and these parameters (of flax.nnx, nnx.as_pure of both)"
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
