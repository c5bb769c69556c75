"""Compares the steps of two optimizers: from which states, and with which gradients."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.chain import identity
from adamjax.convert.adamjax_state import AdamjaxState, described_argument
from adamjax.convert.advance import (
    LATE_COUNTS,
    STAND_IN_FOR_ZERO,
    Advance,
    MakeRuleState,
    advanced_adamjax,
    advanced_optax,
    fresh_rule_state,
    kinds_with_one_name,
    kinds_with_zeros,
    late_rule_state,
    late_zero_rule_state,
    unchanged_rule_state,
    with_floats_of,
    with_hyperparams_of,
    with_scaled_values,
    with_zeros_replaced,
)
from adamjax.convert.closeness import Closeness
from adamjax.convert.optax_state import read_state, role_of
from adamjax.convert.paired_steps import OWN_WEIGHTS, WEIGHT_SIZES, ZERO_WEIGHTS, PairedSteps, Step
from adamjax.convert.sampling import sampled
from adamjax.convert.step_counts import Peaks, later_counts
from adamjax.convert.systems import OPTAX
from adamjax.convert.values import dense_totals, leaves_by_path
from adamjax.convert.widening import widened
from adamjax.data import Tree
from adamjax.guard import AccumulateGradientsState, accumulate_gradients
from adamjax.leaves import dtype_of
from adamjax.replicas import sum_over
from adamjax.structure import replace_parts, rule_slots
from adamjax.transform import Rule

__all__ = ["expect_made_by", "expect_optimizer", "expect_same_steps"]

# The sizes of gradients in the steps of each comparison, relative to the past gradients that the
# moments show. A clip shows where they are large, and an epsilon where they are small.
_SIZES = ((1.0, 30.0, 1e3, 0.1, 1.0, 1e-3), (10.0, 1.0, 0.3))
# In the first steps of a run, sizes are absolute.
_SMALL_SIZES = ((1e-8, 3e-8, 1e-8), (1e-12,), (1e-15,))
# Gradients of a scaled loss are large. If a clip comes after the division by the scale, only the
# largest of these show it.
_FIRST_SIZES = (*_SIZES, (1e6, 1e5), (1e8, 1e7), *_SMALL_SIZES)
# The sizes at each later count, relative like _SIZES.
_LATER_SIZES = (1.0, 1e3, 1e-3, 1.0)
# The sizes for steps with `varies_like_moments`, relative like _SIZES.
_VARIED_SIZES = (1.0, 0.3)
# Absolute sizes of the gradients of leaves without a rule at earlier counts, besides 1.
_PAST_SIZES = (1e-8, 1e-3, 1e3, 1e8)
# Absolute sizes, at which most clips show.
_CLIPPED_SIZES = (1.0, 1e4)
# Gradients that are not finite, each with a size of weights. The last has large weights, because
# optax may decay weights in a step that tx skips.
_NOT_FINITE = (
    (math.nan, WEIGHT_SIZES[1]),
    (math.inf, WEIGHT_SIZES[1]),
    (math.nan, WEIGHT_SIZES[0]),
)
# The number of steps with the same large gradients, in which m grows faster than the root of v.
_GROWING_STEPS = 12
# Gradients so much larger than the usual ones make updates as large as they can be. Updates are so
# large too where a schedule is at its largest; for different leaves, at up to so many counts.
_LARGE, _MOST_PEAKS = 1e3, 8
# By how much rates that a trainer may set are multiplied in steps that show clips of updates.
_RAISED = (10.0, 1e3)
# How much larger the gradients of one leaf are than those of others, in steps that show its part in
# a norm; and limits on the number of leaves that take such steps, or steps with a NaN.
_LARGE_LEAF, _MOST_LEAVES, _FEWEST_LEAVES = 1e4, 16, 2
# A limit on the elements of all steps that such a number of leaves takes.
_MOST_ELEMENTS = 1 << 24
# The decay of Adamax' u is compared after at most this many steps without gradients, for epsilons
# up to this, with a gradient of this size after a gradient of size 1.
_MOST_ZERO_STEPS, _SMALL_EPS, _SIZE_AFTER_ZEROS = 300, 1e-7, 0.01
# The sizes of weights at later counts, in turn. A transform that keeps weights nonnegative hides
# differences, unless the weights are those of the model.
_LATER_WEIGHTS = (WEIGHT_SIZES[0], WEIGHT_SIZES[1], WEIGHT_SIZES[0], OWN_WEIGHTS)
# Moments are compared at every so many of these counts, where weights are small: a decay of large
# ones hides gradients. They may differ by this much relatively.
_EVERY_STATE, _RTOL_OF_MOMENTS = 4, 0.01


def expect_same_steps(ours: AdamjaxState, optimizer: Any, state: Any, rtol: float) -> None:
    """Refuses a transform that does not move weights as optax' optimizer does.

    Both take steps from the states of the conversion, some with rules that have taken no step or
    many, and then at many later counts of their schedules. The gradients are random, of many sizes,
    also in a single leaf. In some steps the gradient of one leaf is not finite, and in some all
    gradients are 0, so that only weight decays and momenta move the weights. Where optax' rule has
    another form, as AMSGrad's, steps start from the rules of the conversion, or from rules with
    moments of 0 that have taken very many steps: from there both rules take the same step. All
    steps are in float32 or wider, if possible.

    Of a large leaf, a sample takes these steps, and the whole leaf takes a few of them. If one of
    the transforms may depend on the size of a leaf, the whole leaf takes all steps.

    Args:
      ours: the state of adamjax, with its transform.
      optimizer, state: the transform of optax, and its state.
      rtol: as for `from_optax`.
    """
    with jax.debug_nans(False):
        ours = _for_one_replica(_with_dense_totals(ours))
        sample = sampled(ours, optimizer, state)
        compared, compared_state, widens = widened(*(sample or (ours, state)), optimizer)
        comparison = _Comparison(compared, optimizer, compared_state, rtol, widens)
        comparison.compare()
        if sample is not None:
            ours, state, _ = widened(ours, state, optimizer)
            comparison.compare_whole(ours, optimizer, state)


def _with_dense_totals(ours: AdamjaxState) -> AdamjaxState:
    """The same state without `max_rows`, because the gradients that are compared are dense."""
    accumulating = [part.tx for part in ours.parts if isinstance(part.tx, accumulate_gradients)]
    if all(tx.max_rows is None for tx in accumulating):
        return ours

    def is_accumulating(x: Any) -> bool:
        return isinstance(x, AccumulateGradientsState)

    def with_dense_totals(state: Any) -> Any:
        def replaced(x: Any) -> Any:
            if not is_accumulating(x):
                return x
            return x._replace(total=dense_totals(x.total), inner=with_dense_totals(x.inner))

        return jax.tree.map(replaced, state, is_leaf=is_accumulating)

    tx = replace_parts(
        ours.tx, lambda x: x.replace(max_rows=None) if isinstance(x, accumulate_gradients) else x
    )
    return AdamjaxState(ours.owner, tx, with_dense_totals(ours.state), ours.params)


def _for_one_replica(ours: AdamjaxState) -> AdamjaxState:
    """The same state without `sum_over`, because the steps are taken outside of a mapped axis.

    `optimizer` gets the sum over the replicas too, before its `update`.
    """
    tx = replace_parts(ours.tx, lambda x: identity() if isinstance(x, sum_over) else x)
    return ours if tx is ours.tx else AdamjaxState(ours.owner, tx, ours.state, ours.params)


class _Start(NamedTuple):
    """How a state from which steps start is made from the present one.

    Attributes:
      steps: by how many steps schedules are advanced.
      set_kinds: the kinds of hyperparameters that are replaced where they are 0.
      rate_factor: by how much the rates among the hyperparameters are multiplied.
    """

    steps: int
    set_kinds: frozenset[str]
    rate_factor: float = 1.0


class _Comparison:
    """The steps of both optimizers that are compared.

    Attributes:
      ours, state: the states of adamjax and of optax.
      source: the state of optax in the common form.
      fresh: the results of `init` of both.
      steps: takes the steps.
      closeness: compares their updates.
      starts: the states from which steps of the whole model are compared too.
    """

    def __init__(
        self, ours: AdamjaxState, optimizer: Any, state: Any, rtol: float, widens: bool
    ) -> None:
        self.owner, self.ours, self.state = ours.owner, ours, state
        self.source = read_state(ours.owner, state)
        self.steps = PairedSteps(ours, optimizer, widens)
        self.closeness = Closeness(ours, state, self.source, self.steps, rtol, widens)
        self.starts: list[_Start] = []
        self.fresh = ours.tx.init(ours.params), optimizer.init(ours.params)
        self._advance = jax.jit(self._advanced)

    # --- what is compared -------------------------------------------------------------------------

    def compare(self) -> None:
        if not self.steps.leaves:
            return
        self._measure_past_steps()
        self._compare_at_all_counts("these states", frozenset())
        zeros = kinds_with_zeros(self.ours.state), kinds_with_zeros(self.state)
        both = zeros[0] & zeros[1]
        if both:
            # A trainer sets them before each step, so the 0 in the states has no effect.
            self.ours = self.ours.with_state(with_zeros_replaced(self.ours.state, both))
            self.state = with_zeros_replaced(self.state, both)
            names = " and ".join(sorted(both))
            start = f"these states, with a {names} of {STAND_IN_FOR_ZERO} in place of 0,"
            self._compare_at_all_counts(start, both)
        kinds = kinds_with_one_name(self.ours.state) & kinds_with_one_name(self.state)
        if kinds:
            # A trainer may set other values than those in the states.
            present = self.ours, self.state
            self._scale_values(kinds, 0.5)
            self._compare_at(0, f"these states, with half their {' and '.join(sorted(kinds))},")
            for factor in _RAISED if "rate" in kinds else ():
                self.ours, self.state = present
                self._scale_values(frozenset({"rate"}), factor)
                with self.closeness.apart():
                    self._compare_large(0, f"these states, with {factor:g} times their rate,")
                self.starts.append(_Start(0, both, factor))
        if not self.closeness.is_compared:
            raise ValueError(
                f"{self.owner}: nothing can be compared, because no update of the optimizer of "
                "optax is finite: set rates that are finite in its state, or pass check=False"
            )
        if "rate" in zeros[0] | zeros[1]:
            self.closeness.expect_movement()

    def _scale_values(self, kinds: frozenset[str], factor: float) -> None:
        """Multiplies the hyperparameters of these kinds in the states of both."""
        self.ours = self.ours.with_state(with_scaled_values(self.ours.state, kinds, factor))
        self.state = with_scaled_values(self.state, kinds, factor)

    def _measure_past_steps(self) -> None:
        """Measures optax' largest updates at earlier counts, when rates may have been larger."""
        now = max([0, *(count.value for count in self.source.counts)])
        ones = np.ones(len(self.steps.leaves))
        # Without gradients only decays move weights, and after another step a momentum too.
        sequences = [[self._zero_step()], [Step(ones), self._zero_step()]]
        if not np.all(self.closeness.has_rule):
            # There updates depend on the sizes of gradients.
            sequences += [[Step(size * ones)] for size in _PAST_SIZES]
        present = self.ours.state, self.state
        starts = [tuple(map(with_hyperparams_of, self.fresh, present))]
        others = jax.tree.leaves(self.source.other_states)
        if any(jnp.issubdtype(dtype_of(x), jnp.inexact) for x in others):
            # The present momenta may be far larger than the gradients of a step.
            starts.append(tuple(map(with_floats_of, self.fresh, present)))
        counts = sorted({now * i // 16 for i in (0, 1, 2, 4, 8, 12)})
        for start, steps in itertools.product(starts, counts):
            states = self._advance(start, self.fresh, jnp.int32(steps))
            for weight_size, steps_taken in itertools.product(
                (*WEIGHT_SIZES, ZERO_WEIGHTS, OWN_WEIGHTS), sequences
            ):
                for number, found in self.steps.take(states, weight_size, steps_taken):
                    zero_grads = not np.any(steps_taken[number].sizes)
                    self.closeness.add(weight_size, zero_grads, found)

    def _compare_at_all_counts(self, start: str, set_kinds: frozenset[str]) -> None:
        """Compares many steps from the present states, and a few at each of many later counts.

        `set_kinds` has the kinds of hyperparameters that were replaced because they were 0.
        """
        self.closeness.is_seen = np.zeros_like(self.closeness.is_seen)
        self._compare_at(0, start)
        self.starts.append(_Start(0, set_kinds))
        unseen = ~self.closeness.is_seen
        peaks = Peaks()
        # `_later_steps` has so many steps.
        each = len(_LATER_SIZES) + 1
        counts = later_counts(self.ours, self.state, self.source, self.steps, each)
        for number, (start_of_later, steps) in enumerate(counts):
            before = self.closeness.is_seen.copy()
            self.closeness.start_anew()
            weight_size = _LATER_WEIGHTS[number % len(_LATER_WEIGHTS)]
            self._compare_later(start_of_later, steps, weight_size, number % _EVERY_STATE == 1)
            peaks.add(weight_size, self.closeness.largest_here[weight_size, False], steps)
            if np.any(unseen & self.closeness.is_seen & ~before):
                # Up to here the rate of these leaves was 0 or tiny, and hid all differences.
                self._compare_at(steps, start_of_later)
                self.starts.append(_Start(steps, set_kinds))
        for steps in peaks.steps()[:_MOST_PEAKS]:
            self.closeness.start_anew()
            self._compare_large(steps, f"{steps} steps after these, where the rate is largest,")
            self.starts.append(_Start(steps, set_kinds))

    def compare_whole(self, ours: AdamjaxState, optimizer: Any, state: Any) -> None:
        """Compares steps of the whole model, if the states that are compared are a sample of it.

        There is a step for each of `starts` and each size of weights, and one with large gradients,
        after which the norm of the updates is large.

        Args:
          ours, state: the states of the whole model.
        """
        call = self.steps.whole_call(ours, optimizer)
        usual = self.steps.usual_sizes
        for start in dict.fromkeys(self.starts):
            states = tuple(with_zeros_replaced(x, start.set_kinds) for x in (ours.state, state))
            if start.rate_factor != 1:
                rate = frozenset({"rate"})
                states = tuple(with_scaled_values(x, rate, start.rate_factor) for x in states)
            large = unchanged_rule_state
            if self.closeness.has_same_form:
                large = functools.partial(late_rule_state, LATE_COUNTS[-1])
            kinds = [(weight_size, usual, unchanged_rule_state) for weight_size in WEIGHT_SIZES]
            for weight_size, sizes, make_rule_state in (
                *kinds,
                (WEIGHT_SIZES[1], _LARGE * usual, large),
            ):
                states_then: Any = states
                if start.steps or make_rule_state is not unchanged_rule_state:
                    fresh = ours.tx.init(ours.params), optimizer.init(ours.params)
                    states_then = self._advanced_both(
                        ours, states, fresh, start.steps, make_rule_state
                    )
                taken = self.steps.take_whole(call, states_then, weight_size, sizes)
                for difference, largest in taken:
                    self.closeness.expect_same_whole(weight_size, sizes, difference, largest)

    def _compare_later(
        self, start: str, steps: int, weight_size: float | None, compares_states: bool
    ) -> None:
        """Compares a few steps from states whose schedules are advanced by this number of steps.

        `compares_states` is whether to compare the moments after them too.
        """
        states, later = self._states(steps, unchanged_rule_state), self._later_steps()
        self._expect_same(
            start, states, weight_size, later[:1] if self.closeness.rounds_later else later
        )
        if compares_states:
            self._expect_same_moments(start)
        if self.closeness.rounds_later:
            for i, step in enumerate(later[1:], 1):
                self._expect_same(
                    start, self._states(steps + i, unchanged_rule_state), weight_size, [step]
                )
        if not np.all(self.closeness.has_rule):
            # Without a rule, updates are as large as gradients. Large ones would hide a decay, and
            # the end of a schedule in a step with a small one.
            self._expect_same(start, states, weight_size, [self._zero_step()], zero_grads=True)
            if not self.closeness.rounds_later:
                with self.closeness.alone():
                    usual = [Step(self.steps.usual_sizes)] * len(later)
                    self._expect_same(start, states, weight_size, usual)

    def _compare_at(self, steps: int, start: str) -> None:
        """Compares many steps from states whose schedules are advanced by this number of steps."""
        self.closeness.start_anew()
        usual = self.steps.usual_sizes
        ones = np.ones(len(usual))
        states = self._states(steps, unchanged_rule_state)
        first = self._states(
            steps, fresh_rule_state if self.closeness.has_same_form else late_zero_rule_state
        )
        start_of_first = f"the first step at {start}"
        if not self.closeness.has_same_form:
            start_of_first = f"a step of rows without gradients so far, at {start}"
        for weight_size in WEIGHT_SIZES:
            for steps_taken in self._all_steps(usual, _SIZES):
                self._expect_same(start, states, weight_size, steps_taken)
            varied = [Step(x * usual, varies_like_moments=True) for x in _VARIED_SIZES]
            self._expect_same(start, states, weight_size, varied)
            for steps_taken in self._all_steps(ones, _FIRST_SIZES):
                self._expect_same_first(start_of_first, first, weight_size, steps_taken)
            self._compare_large(steps, start, weight_size)
            for from_states in (states, first):
                self._expect_same(
                    start, from_states, weight_size, [self._zero_step()], zero_grads=True
                )
            # A momentum moves rows without a gradient, unless an optimizer skips them.
            self._expect_same_first(
                start_of_first, first, weight_size, [Step(ones), self._zero_step()]
            )
        for of_steps in _SMALL_SIZES:
            small = [Step(x * ones) for x in of_steps]
            self._expect_same_first(start_of_first, first, ZERO_WEIGHTS, small)
        # A transform may depend on the values of the weights, such as weights of 0 that stay 0.
        self._expect_same(start, states, OWN_WEIGHTS, [Step(usual), Step(usual)])
        self._compare_decays_of_u(start, self._states(steps, late_zero_rule_state))
        for leaf, (value, weight_size) in itertools.product(self._some_leaves(), _NOT_FINITE):
            not_finite = Step(usual, nonfinite_leaf=leaf, nonfinite_value=value)
            self._expect_same(
                f"{start}, where a gradient was {value},",
                states,
                weight_size,
                [Step(usual), not_finite, Step(usual)],
                not_finite=(leaf, value),
            )

    def _compare_large(self, steps: int, start: str, weight_size: float = WEIGHT_SIZES[1]) -> None:
        """Compares steps with updates as large as they can be at these rates."""
        usual = self.steps.usual_sizes
        if not self.closeness.has_same_form:
            states = self._states(steps, unchanged_rule_state)
            clipped = [Step(x * np.ones(len(usual))) for x in _CLIPPED_SIZES]
            self._expect_same(start, states, weight_size, clipped)
            return
        for count in LATE_COUNTS:
            late = self._states(steps, functools.partial(late_rule_state, count))
            self._expect_same(f"a late step at {start}", late, weight_size, [Step(_LARGE * usual)])
        # After some such steps, the direction of Adam is as large as it can be (7.3 for the default
        # betas), which shows clips of it.
        growing = [Step(_LARGE * usual, varies_like_moments=True)] * _GROWING_STEPS
        self._expect_same(f"late steps at {start}", late, weight_size, growing)

    def _expect_same(
        self,
        start: str,
        states: tuple[Any, Any],
        weight_size: float | None,
        steps: Sequence[Step],
        **options: Any,
    ) -> None:
        """Takes steps, and refuses updates that differ too much.

        Args:
          weight_size: the size of the weights, or `OWN_WEIGHTS`.
          options: arguments of `Closeness.expect_same`.
        """
        self.closeness.expect_same(
            start, weight_size, self.steps.take(states, weight_size, steps), **options
        )

    def _expect_same_moments(self, start: str) -> None:
        """Refuses moments that differ after the last steps.

        While a rate is 0, all updates are 0, but gradients may reach only one of the rules. And
        without moments from the past, the first updates of Adam do not depend on a factor of the
        gradients.
        """
        states, closeness = self.steps.last_states, self.closeness
        if states is None or not closeness.has_same_form or closeness.has_narrow_leaves:
            return
        ours, theirs = self.ours.with_state(states[0]).read(), read_state(self.owner, states[1])
        for path, of_rules in theirs.moments.items():
            for own, other in zip(ours.moments[path], of_rules, strict=True):
                for name, their_name in OPTAX.slot_names["adam"].items():
                    a, b = (
                        np.asarray(x, np.complex128)
                        for x in ((own.slots or {})[name], (other.slots or {})[their_name])
                    )
                    difference, largest = (np.max(np.abs(x), initial=0) for x in (a - b, b))
                    if not difference <= _RTOL_OF_MOMENTS * largest:
                        raise ValueError(
                            f"{self.owner}: in steps from {start} on, {name} of {path!r} becomes "
                            f"different: of up to {np.max(np.abs(a)):.6g} in tx, and of up to "
                            f"{largest:.6g} in the optimizer of optax: compare what they do to "
                            "gradients before the rule, betas and numbers of micro-batches"
                        )

    def _expect_same_first(
        self, start: str, states: tuple[Any, Any], weight_size: float, steps: Sequence[Step]
    ) -> None:
        """Compares steps from rules with moments of 0.

        Differences are relative to the updates of these steps alone. If gradients are small, an
        epsilon makes all updates small, and the larger updates of other steps would hide it.
        """
        with self.closeness.alone():
            if "adamax" not in self.ours.kinds:
                self._expect_same(start, states, weight_size, steps)
                return
            # In optax epsilon is in u and decays with it, so after the first step u may differ.
            for step in steps:
                self._expect_same(start, states, weight_size, [step], first_only=True)

    def _compare_decays_of_u(self, start: str, states: tuple[Any, Any]) -> None:
        """Compares a step of Adamax after many without gradients, in which u decays.

        In one step u decays by 1 - b2, which may be less than the difference that is allowed.
        """
        rules = [part.tx for part in self.ours.parts if "u" in rule_slots(part.state)]
        rules = [tx for tx in rules if isinstance(tx, Rule)]
        if not rules or self.closeness.has_narrow_leaves:
            return  # In narrow dtypes, each step rounds u.
        if any(float(tx.eps or 0) > _SMALL_EPS for tx in rules):
            return  # In optax epsilon decays with u.
        most = (_MOST_ELEMENTS) // self.steps.num_elements
        most = max(min(_MOST_ZERO_STEPS, most) // self.steps.calls, 1)
        ones = np.ones(len(self.steps.usual_sizes))
        for b2 in {float(tx.b2) for tx in rules}:
            num_zero_steps = min(most, math.ceil(1 / max(1 - b2, 1 / _MOST_ZERO_STEPS)))
            steps = [
                Step(ones),
                *[self._zero_step()] * num_zero_steps,
                Step(_SIZE_AFTER_ZEROS * ones),
            ]
            self.closeness.start_anew()
            start_after = f"{start}, and {num_zero_steps} steps without gradients,"
            self._expect_same(
                start_after, states, WEIGHT_SIZES[1], steps, first_compared=len(steps) - 1
            )

    def _zero_step(self) -> Step:
        """A step whose gradients are all 0, so that only decays and momenta move the weights."""
        return Step(np.zeros(len(self.steps.usual_sizes)))

    def _all_steps(
        self, base: np.ndarray, sizes: Sequence[Sequence[float]]
    ) -> Iterator[list[Step]]:
        """Sequences of steps: with gradients of several sizes, and with one large leaf each."""
        for of_steps in sizes:
            yield [Step(base * size) for size in of_steps]
        yield [Step(self._of_many_sizes(base)) for _ in range(3)]
        if len(base) > 1:
            for leaf in self._some_leaves():
                large = base.copy()
                large[leaf] *= _LARGE_LEAF
                yield [Step(large), Step(base)]

    def _later_steps(self) -> list[Step]:
        usual = self.steps.usual_sizes
        return [*(Step(usual * size) for size in _LATER_SIZES), Step(self._of_many_sizes(usual))]

    def _of_many_sizes(self, base: np.ndarray) -> np.ndarray:
        return base * 10 ** self.steps.rng.uniform(-2, 2, len(base))

    def _some_leaves(self) -> list[int]:
        """The positions of all leaves, or of some if there are very many.

        The selection has leaves of as many kinds as possible. Leaves are of one kind if the same
        parts of `tx` see them, and the same rules of optax.
        """
        positions = range(len(self.steps.leaves))
        most = min(_MOST_LEAVES, (_MOST_ELEMENTS) // self.steps.num_elements)
        most = max(most // self.steps.calls, _FEWEST_LEAVES)
        if len(positions) <= most:
            return list(positions)
        rules = jax.tree.leaves(self.state, is_leaf=lambda x: role_of(x) == "rule")
        seen_by = [self.steps.leaves_of(part) for part in self.ours.parts]
        for x in rules:
            if role_of(x) == "rule":
                leaves = leaves_by_path(self.owner, x.mu)
                seen_by.append(np.array([path in leaves for path in self.steps.paths], bool))
        shuffled = self.steps.rng.permutation(len(positions)).tolist()
        of_each_kind = {tuple(leaves[i] for leaves in seen_by): i for i in shuffled}
        # Leaves without a rule come first: there are few of them, and they are often forgotten.
        chosen = sorted(of_each_kind.values(), key=lambda i: bool(self.closeness.has_rule[i]))[
            :_MOST_LEAVES
        ]
        others = [i for i in shuffled if i not in chosen]
        return sorted([*chosen, *others[: max(most - len(chosen), 0)]])

    # --- the states from which steps start --------------------------------------------------------

    def _states(self, steps: int, make_rule_state: MakeRuleState) -> tuple[Any, Any]:
        """The states of both with schedules advanced by this number of steps, and other rules."""
        states = self.ours.state, self.state
        if steps:
            states = self._advance(states, self.fresh, jnp.int32(steps))
        if make_rule_state is unchanged_rule_state:
            return states
        return self._advanced(states, self.fresh, 0, make_rule_state)

    def _advanced(
        self,
        states: Any,
        fresh: Any,
        steps: Any,
        make_rule_state: MakeRuleState = unchanged_rule_state,
    ) -> tuple[Any, Any]:
        return self._advanced_both(self.ours, states, fresh, steps, make_rule_state)

    def _advanced_both(
        self,
        ours: AdamjaxState,
        states: Any,
        fresh: Any,
        steps: Any,
        make_rule_state: MakeRuleState,
    ) -> tuple[Any, Any]:
        ours, advance = (
            ours.with_state(states[0]),
            Advance(steps, self.steps.calls, make_rule_state),
        )
        return (
            advanced_adamjax(ours, states[0], fresh[0], advance),
            advanced_optax(states[1], fresh[1], advance),
        )


def expect_optimizer(owner: str, optimizer: Any) -> None:
    """Refuses an `optimizer` that is no transform."""
    if optimizer is None:
        raise TypeError(
            f"{owner}: pass optimizer=, the transform of optax. Its state does not contain the "
            "hyperparameters, so steps of both are compared. check=False compares nothing"
        )
    if not callable(getattr(optimizer, "update", None)) or not hasattr(optimizer, "init"):
        raise TypeError(
            f"{owner}: optimizer is {described_argument(optimizer)}, expected the transform of "
            "optax, with init and update (of an nnx.Optimizer its tx)"
        )


def expect_made_by(owner: str, optimizer: Any, state: Any, params: Tree) -> None:
    """Refuses a state whose structure is not that of the transform's `init`."""
    expected: Any = jax.tree.structure(jax.eval_shape(optimizer.init, params))
    if jax.tree.structure(state) != expected:
        raise ValueError(
            f"{owner}: the optax state has another structure than optimizer.init(params): pass the "
            "transform that made it, and these parameters (of flax.nnx, nnx.as_pure of both)"
        )
