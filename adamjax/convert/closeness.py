"""How close the updates of two optimizers must be."""

import contextlib
import copy
import itertools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from adamjax.clip import clip_by_global_norm
from adamjax.convert.adamjax_state import AdamjaxState, is_of_adamjax
from adamjax.convert.advance import differing_hyperparams
from adamjax.convert.paired_steps import (
    OWN_WEIGHTS,
    WEIGHT_SIZES,
    ZERO_WEIGHTS,
    Differences,
    PairedSteps,
)
from adamjax.convert.source import Source
from adamjax.convert.values import leaves_by_path
from adamjax.convert.widening import has_rounded_hyperparams, is_narrow
from adamjax.leaves import dtype_of
from adamjax.structure import rule_slots, slot_states
from adamjax.transform import Rule, foreign

__all__ = ["Closeness"]

# How much two updates of a leaf may differ, relative to the largest update: in float32, in float64,
# where moments are narrow (adamjax rounds them at random), where parameters are narrow (optax
# computes in their dtype), and for other leaves that are scaled by a norm of such leaves.
_RTOL, _RTOL64 = 3e-4, 1e-5
_NARROW_RTOL, _NARROW_OPTAX_RTOL, _BESIDE_NARROW_RTOL = 0.03, 0.1, 0.01
# The largest error from the rounding of b2 that is allowed in addition.
_MOST_OF_B2 = 2e-3
# The difference that is allowed in addition, relative to the leaf's largest update so far. A
# schedule has such rounding errors near its end.
_ROUNDING = 1e-6
# Largest updates are stored by the sizes of gradients, from 4**-31 to 4**31.
_MOST_EXPONENT = 31
# If the first of some steps moves a leaf by less than this, relative to the largest update of these
# steps, its rate is far below those of the next steps, as at the start of a warm-up.
_SEEN = 0.03


class _LargestUpdates:
    """The largest updates so far, by leaf and by the size of the gradients.

    Without a rule, an update is as large as its gradient. There the rounding errors of a rate are
    too, so a step with large gradients allows only small errors in one with small gradients.
    """

    def __init__(self, has_rule: np.ndarray) -> None:
        self._has_rule = has_rule
        exponents = np.arange(-_MOST_EXPONENT, _MOST_EXPONENT + 1)
        self._sizes = 4.0 ** exponents[:, None]
        self._updates = np.zeros((len(exponents), len(has_rule)))

    def add(self, grad_sizes: np.ndarray, updates: np.ndarray) -> None:
        """Adds the largest updates of a step. Updates that are not finite do not count."""
        # A rate may be infinite at a count that the run never had.
        updates = np.where(np.isfinite(updates), updates, 0)
        sizes = np.where(self._has_rule, 1.0, grad_sizes)
        exponents = np.floor(np.log2(np.clip(sizes, self._sizes[0], self._sizes[-1])) / 2)
        at = exponents.astype(int) + _MOST_EXPONENT, np.arange(len(updates))
        self._updates[at] = np.maximum(self._updates[at], updates)

    def at(self, grad_sizes: np.ndarray) -> np.ndarray:
        """The largest updates, reduced in proportion if their gradients were larger than these."""
        sizes = np.where(self._has_rule, 1.0, grad_sizes)
        return np.max(self._updates * np.minimum(sizes / self._sizes, 1.0), axis=0)

    @property
    def moved(self) -> np.ndarray:
        """By leaf, whether some update was not 0."""
        return np.any(self._updates > 0, axis=0)


class Closeness:
    """Compares updates leaf by leaf.

    Attributes:
      owner: the name of the conversion, for errors.
      ours, state: the states of adamjax and of optax.
      steps: takes the steps.
      parts: the transform of adamjax and its parts.
      has_same_form: whether optax has the formulas of adamjax, as for Adam but not for AMSGrad.
      has_rounded_hyperparams: whether the state of optax has hyperparameters in a narrow dtype.
      has_narrow_leaves: whether some parameters, moments or hyperparameters are narrow.
      has_rule: by leaf, whether a rule sees it.
      are_joint: whether updates of some leaves may depend on other leaves.
      rtol: by leaf, how much its updates may differ, relatively.
      rtol_at_first: the same in the first step from a state, before moments are rounded.
      largest: optax' largest updates so far. The keys are the size of the weights, and whether all
        gradients are 0.
      largest_here: by the same keys, the largest updates by leaf since the last `start_anew`, so
        with the present rates.
      is_compared: whether some steps have been compared.
      is_seen: by leaf, whether optax has moved it in a first step from some states, with a rate
        that is large enough to show differences. Some differences show in a first step alone.
    """

    def __init__(
        self,
        ours: AdamjaxState,
        state: Any,
        source: Source,
        steps: PairedSteps,
        rtol: float,
        widens: bool,
    ) -> None:
        """Chooses how much updates may differ.

        Args:
          ours, state: the states of adamjax and of optax.
          source: the state of optax in the common form.
          rtol: as for `from_optax`.
          widens: whether optax computes in float32 where it would compute in a narrow dtype.
        """
        self.owner, self.steps, self.parts = ours.owner, steps, ours.parts
        self.ours, self.state = ours, state
        self.has_same_form = set(ours.kinds) <= {"adam"}
        self.has_rounded_hyperparams = has_rounded_hyperparams(state)
        narrow_ours, narrow = _narrow_leaves(ours.state), set()
        for path, moments in source.moments.items():
            if any(is_narrow(x) for m in moments for x in (m.slots or {}).values()):
                narrow.add(path)
        paths = steps.paths
        has_narrow_slots = np.array([path in narrow | narrow_ours for path in paths], bool)
        rounds_first = np.array([path in narrow_ours for path in paths], bool)
        self.has_rule = np.array([path in source.moments for path in paths], bool)
        self.are_joint = bool(np.any(self._joint_leaves()))
        self.rtol = self._tolerances(rtol, has_narrow_slots)
        self.rtol_at_first = self._tolerances(rtol, rounds_first if widens else has_narrow_slots)
        are_narrow = [is_narrow(p) for p in steps.params]
        self.has_narrow_leaves = bool(
            np.any(has_narrow_slots) or any(are_narrow) or self.has_rounded_hyperparams
        )
        self.largest = {key: _LargestUpdates(self.has_rule) for key in self._no_updates()}
        self.largest_here = self._no_updates()
        self.is_seen = np.zeros(len(paths), bool)
        self.is_compared = False

    def _tolerances(self, rtol: float, has_narrow_slots: np.ndarray) -> np.ndarray:
        """How much the updates of each leaf may differ, relatively, for this `rtol` of the user."""
        least = 0.0 if self.has_same_form else rtol
        params = self.steps.params
        are_narrow = np.array([is_narrow(p) for p in params], bool)
        beside = self._is_beside(are_narrow | has_narrow_slots)
        rules = [part.tx for part in self.parts if isinstance(part.tx, Rule)]
        of_b2 = max((_rounding_of_b2(float(rule.b2)) for rule in rules), default=0.0)
        tolerances = []
        for p, narrow_param, narrow_slots in zip(params, are_narrow, has_narrow_slots, strict=True):
            usual = _RTOL64 if jnp.finfo(dtype_of(p)).nmant > 50 else _RTOL + of_b2
            narrow = max(_NARROW_RTOL * narrow_slots, _NARROW_OPTAX_RTOL * narrow_param)
            tolerances.append(max(least, usual, narrow, 2 * float(jnp.finfo(dtype_of(p)).eps)))
        return np.maximum(tolerances, _BESIDE_NARROW_RTOL * beside)

    def _is_beside(self, narrow: np.ndarray) -> np.ndarray:
        """By leaf, whether it is narrow, or its update may be computed from narrow leaves."""
        if np.any(narrow) and self.has_rounded_hyperparams:
            return np.ones_like(narrow)
        joint = [leaves for leaves in self._joint_leaves() if np.any(leaves & narrow)]
        return np.any([narrow, *joint], axis=0)

    def _joint_leaves(self) -> list[np.ndarray]:
        """The leaves that a transform sees, for each that may compute updates from other leaves."""
        # Of adamjax' own transforms, only clip_by_global_norm does.
        return [
            self.steps.leaves_of(part)
            for part in self.parts
            if not is_of_adamjax(part.tx) or isinstance(part.tx, clip_by_global_norm | foreign)
        ]

    @property
    def rounds_later(self) -> bool:
        """Whether the first step from a state is more accurate than later ones."""
        return bool(np.any(self.rtol_at_first < self.rtol))

    # --- the largest updates so far ---------------------------------------------------------------

    def _no_updates(self) -> dict[tuple[float | None, bool], np.ndarray]:
        keys = itertools.product((*WEIGHT_SIZES, ZERO_WEIGHTS, OWN_WEIGHTS), (False, True))
        return {key: np.zeros(len(self.steps.leaves)) for key in keys}

    def start_anew(self) -> None:
        """Resets `largest_here`, because the next steps have other rates."""
        self.largest_here = self._no_updates()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """In this context, `largest_here` has only the updates of the steps inside."""
        largest_here = self.largest_here
        self.start_anew()
        yield
        self.largest_here = largest_here

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """In this context, the same, and its updates do not count as the largest so far later."""
        largest = copy.deepcopy(self.largest)
        with self.alone():
            yield
        self.largest = largest

    def add(self, weight_size: float | None, zero_grads: bool, found: Differences) -> np.ndarray:
        """Adds the largest updates of a step; returns the largest so far for such gradients."""
        sizes = np.ones_like(found.grad_sizes) if zero_grads else found.grad_sizes
        largest = self.largest[weight_size, zero_grads]
        largest.add(sizes, found.largest_update)
        return largest.at(sizes)

    @property
    def _moved(self) -> np.ndarray:
        """By leaf, whether a step has moved it."""
        return np.any([x.moved for x in self.largest.values()], axis=0)

    # --- what is refused --------------------------------------------------------------------------

    def expect_same(
        self,
        start: str,
        weight_size: float | None,
        taken: Iterable[tuple[int, Differences]],
        zero_grads: bool = False,
        first_only: bool = False,
        first_compared: int = 0,
        not_finite: tuple[int, float] | None = None,
    ) -> None:
        """Refuses updates that differ too much.

        Args:
          start: where the steps start, for the error.
          weight_size: the size of the weights, or `OWN_WEIGHTS`.
          taken: for each call, the number of its step and its updates, as `PairedSteps.take` yields
            them.
          zero_grads: whether all gradients are 0. Then differences are relative to the updates of
            such steps alone. Other steps have updates that are so large that they would hide a
            weight decay.
          first_only: whether to compare only the first step of each leaf.
          first_compared: the number of the first step that is compared.
          not_finite: the leaf whose gradient is not finite in some step, if any, and its value.
        """
        compared = []
        for number, found in taken:
            if not found.is_finite:
                break  # These updates would make the weights NaN.
            if not_finite and self._is_ended_by_clip(found, *not_finite):
                break
            if number >= first_compared:
                compared.append((number, found))
        if not compared:
            return
        self.is_compared = True
        key = weight_size, zero_grads
        here = [self.largest_here[key], *(found.largest_update for _, found in compared)]
        self.largest_here[key] = largest_here = np.max(here, axis=0)
        for number, found in compared:
            # If the terms of an update nearly cancel, its error is that of the terms: a momentum of
            # gradients of both signs, or a momentum and a weight decay. So each difference is
            # compared with the largest update of several steps.
            is_first = found.is_first
            if self.are_joint:
                is_first = np.full_like(is_first, np.all(is_first))
            rtol = np.where(is_first, self.rtol_at_first, self.rtol)
            rounding = _ROUNDING * self.add(weight_size, zero_grads, found)
            if not zero_grads:
                least = np.where(self.has_rule, _SEEN * largest_here, 0)
                is_first_here = (number == 0) | ~self.has_rule
                is_large = (found.largest_update > 0) & (found.largest_update >= least)
                self.is_seen |= is_first_here & is_large & (rounding <= rtol * largest_here)
            is_close = found.largest_difference <= rtol * largest_here + rounding
            if first_only:
                is_close |= ~is_first
            if not np.all(is_close):  # or NaN
                leaf = int(np.argmin(is_close))
                a, b = found.farthest(leaf)
                raise ValueError(
                    f"{self.owner}: in step {number + 1} from {start} on, tx moves an element of "
                    f"{self.steps.paths[leaf]!r} by {a:.6g}, and the optimizer of optax by "
                    f"{b:.6g}: compare their clips, rules, betas, epsilons, decays with "
                    "their masks, rates, schedules, dtypes and numbers of micro-batches (and "
                    f"freeze leaves with set_to_zero: 0 times NaN is NaN){self._values_in_states()}"
                )

    def _values_in_states(self) -> str:
        """For errors: the hyperparameters that have other values in the states."""
        differing = differing_hyperparams(self.ours.state, self.state)
        values = [
            f". {name} is {a:.6g} in the state of tx, and {b:.6g} in that of optax"
            for name, a, b in differing
        ]
        return "".join(values) + ": give both the same value" * bool(values)

    def _is_ended_by_clip(self, found: Differences, nonfinite_leaf: int, value: float) -> bool:
        """Whether an infinite gradient of a frozen leaf has made weights NaN in adamjax only.

        The clip of adamjax makes every element NaN. That of optax makes the infinite elements NaN,
        and the others 0. If the leaf moves, its weights become NaN in optax too, so no later step
        is compared. In a frozen leaf the NaN is discarded. Other steps compare the two clips.
        """
        moves = self.has_rule | self._moved
        if not math.isinf(value) or moves[nonfinite_leaf]:
            return False
        parts = [part for part in self.parts if isinstance(part.tx, clip_by_global_norm)]
        clipped = [leaves for leaves in map(self.steps.leaves_of, parts) if leaves[nonfinite_leaf]]
        ended = np.flatnonzero(np.any(clipped, axis=0) & moves) if clipped else ()
        return len(ended) > 0 and all(np.all(np.isnan(found.updates[i][0])) for i in ended)

    def expect_same_whole(
        self,
        weight_size: float,
        grad_sizes: np.ndarray,
        difference: np.ndarray,
        largest: np.ndarray,
    ) -> None:
        """Refuses updates of whole leaves that differ too much.

        Args:
          weight_size: the size of the weights.
          grad_sizes: the sizes of the gradients, by leaf.
          difference, largest: by leaf, as in `Differences`.
        """
        so_far = self.largest[weight_size, False].at(grad_sizes)
        largest_so_far = np.maximum(so_far, largest)
        is_close = difference <= self.rtol * largest + _ROUNDING * largest_so_far
        if not np.all(np.isfinite(largest)) or np.all(is_close):
            return
        leaf = int(np.argmin(is_close))
        raise ValueError(
            f"{self.owner}: in a step of the whole leaf {self.steps.paths[leaf]!r}, tx moves an "
            f"element by {difference[leaf]:.6g} more or less than the optimizer of optax, whose "
            f"largest update is {largest[leaf]:.6g}. Both move a sample of the leaf alike, so one "
            "of them may treat some rows in another way, or clip the norm of the updates"
        )

    def expect_movement(self) -> None:
        """Refuses a leaf with a rule that no step has moved."""
        unmoved = self.has_rule & ~self._moved
        if np.any(unmoved):
            path = self.steps.paths[int(np.argmax(unmoved))]
            raise ValueError(
                f"{self.owner}: no step moves {path!r}, because its learning rate is 0 in a state "
                "(inject_hyperparams, with_hyperparams), so nothing can be compared: build both "
                "optimizers with the same rate above 0 and set that rate in the state, convert, "
                "and set 0 again afterwards; or pass check=False"
            )


def _rounding_of_b2(b2: float) -> float:
    """The relative error of 1 - b2 in optax, which rounds b2 to float32; at most `_MOST_OF_B2`."""
    if b2 == 1:
        return 0.0
    error = abs((1 - float(np.float32(b2))) / (1 - b2) - 1)
    # The error of v is as large, and that of its root half as large.
    return min(error, _MOST_OF_B2)


def _narrow_leaves(state: Any) -> set[str]:
    """The paths of the leaves with narrow slots in a state of adamjax."""
    trees = [getattr(x, name) for x in slot_states(state) for name in rule_slots(x)]
    slots = [pair for tree in trees for pair in leaves_by_path("", tree).items()]
    return {path for path, x in slots if is_narrow(x)}
