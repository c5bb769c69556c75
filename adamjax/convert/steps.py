"""Compares the steps of two optimizers: at which counts, with which gradients, how closely."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.clip import clip_by_global_norm
from adamjax.convert.adamjax_state import AdamjaxState, described_argument, is_of_adamjax
from adamjax.convert.advance import (
    VALUE,
    Advance,
    MakeRule,
    advanced_adamjax,
    advanced_optax,
    late_rule,
    may_have_counts,
    new_rule,
    rule_as_it_is,
    unread_rule,
    with_values,
    zero_hyperparams,
)
from adamjax.convert.optax_state import read_state, role_of
from adamjax.convert.paired_steps import Differences, PairedSteps, Step
from adamjax.convert.sampling import sampled
from adamjax.convert.schedules import ends_of_schedules, has_schedule
from adamjax.convert.values import leaves_by_path
from adamjax.convert.widening import has_rounded_hyperparams, is_narrow, widened
from adamjax.data import Tree
from adamjax.guard import AccumulateGradientsState, accumulate_gradients
from adamjax.leaves import dtype_of
from adamjax.scaling import ScheduleState
from adamjax.schedule import by_path
from adamjax.structure import Part, replace_parts, rule_slots, slot_states, states_of_class
from adamjax.transform import Rule, foreign

__all__ = ["expect_made_by", "expect_optimizer", "expect_same_steps"]

# The sizes of gradients in the steps of each comparison, relative to those that the moments are of.
# A clip shows where they are large, and an epsilon where they are small.
_SIZES = ((1.0, 30.0, 1e3, 0.1, 1.0, 1e-3), (10.0, 1.0, 0.3))
# In the first steps of a run, sizes are absolute.
_FIRST_SIZES = (*_SIZES, (1e-8, 3e-8, 1e-8), (1e-12,), (1e-15,))
# At each later count, some sizes, the last relative to others.
_LATER_SIZES = (1.0, 1e3, 1e-3, 1.0)
# Where elements of a leaf differ in size as its moments do.
_VARIED_SIZES = (1.0, 0.3)
# Absolute sizes, at which most clips show.
_CLIPPED_SIZES = (1.0, 1e4)
# A weight decay shows at large weights, and the rest at small ones.
# Their signs differ, because a leaf of few elements may have weights of one sign.
_WEIGHTS = (1e3, -1e-2)
# What a gradient that is not finite is tried as, with the size of weights. optax may decay weights
# in a step that tx skips.
_NOT_FINITE = ((math.nan, _WEIGHTS[1]), (math.inf, _WEIGHTS[1]), (math.nan, _WEIGHTS[0]))
# How much larger the gradients of one leaf are than those of others, where its part in a norm is
# compared; and how many leaves are tried so, or with a NaN.
_LARGE_LEAF, _MOST_LEAVES, _FEWEST_LEAVES = 1e4, 16, 2
# How far two updates of a leaf may be apart, as a part of the largest. float32 and float64 round
# off less. adamjax rounds narrow moments at random. optax computes in the dtype of narrow
# parameters, also the norm that scales the leaves beside them.
_RTOL, _RTOL64 = 3e-4, 1e-5
_NARROW_RTOL, _NARROW_OPTAX_RTOL, _BESIDE_NARROW_RTOL = 0.03, 0.1, 0.01
# How much of the rounding of b2 is allowed besides.
_MOST_OF_B2 = 2e-3
# And as a part of the leaf's largest update in any step: a schedule rounds off as much at its end.
_ROUNDING = 1e-6
# The first step of a rule from some states moves at least by this part of the largest update there.
# Otherwise its rate is far below those of the next steps, as at the start of a warm-up.
_SEEN = 0.03
# The decay of Adamax' u shows after so many steps without gradients, and with epsilons up to this,
# in a gradient of this size. That before was of 1.
_MOST_STILL, _SMALL_EPS, _AFTER_STILL = 300, 1e-7, 0.01
# Later counts are compared one by one until the first of these, then in steps of 3% until the
# second, and then at powers of two until the last.
_EACH, _CLOSE, _LAST = 500, 1 << 20, 1 << 24
# At how many later counts steps are compared, in how many calls, and how many elements may be
# updated there in all. A large model, or one with many micro-batches, is compared at fewer.
_MOST_COUNTS, _FEWEST_COUNTS, _MOST_CALLS, _MOST_ELEMENTS = 400, 12, 10_000, 1 << 29
# Besides its elements, a leaf takes as long as so many.
_OF_A_LEAF = 5_000


def expect_same_steps(ours: AdamjaxState, optimizer: Any, state: Any, rtol: float) -> None:
    """Refuses a transform that does not move weights as optax' optimizer does.

    Both take steps from the states of the conversion, some with rules that have taken no step or
    many, and then at many later counts of their schedules. The gradients are random, of many sizes,
    also in a single leaf. In some steps one leaf is not finite, and in some all gradients are 0, so
    that weight decays alone move the weights. Where optax' rule has another form, as AMSGrad's,
    steps go on from the rules of the conversion, or from rules with moments of 0 that have taken
    very many steps: there the forms are the same. All this is in float32 or wider, if possible.

    Of a large leaf, a sample takes these steps, and the whole takes one of them. If the size of a
    leaf may matter to one of the transforms, the whole takes all steps.

    Args:
      ours: the state of adamjax, with its transform.
      optimizer, state: the transform of optax, and its state.
      rtol: as for `from_optax`.
    """
    with jax.debug_nans(False):
        ours = _with_dense_totals(ours)
        some = sampled(ours, optimizer, state)
        compared, compared_state, widens = widened(*(some or (ours, state)), optimizer)
        comparison = _Comparison(compared, optimizer, compared_state, rtol, widens)
        comparison.compare()
        if some is not None:
            ours, state, _ = widened(ours, state, optimizer)
            comparison.compare_whole(ours, optimizer, state)


def _with_dense_totals(ours: AdamjaxState) -> AdamjaxState:
    """The same state without `max_rows`, because the gradients that are compared are dense.

    It is not in the middle of a step: then a conversion refuses `max_rows`.
    """
    accumulating = [part.tx for part in ours.parts if isinstance(part.tx, accumulate_gradients)]
    if all(tx.max_rows is None for tx in accumulating):
        return ours

    def is_accumulating(x: Any) -> bool:
        return isinstance(x, AccumulateGradientsState)

    def with_totals(state: Any, fresh: Any) -> Any:
        def replaced(x: Any, new: Any) -> Any:
            if not is_accumulating(x):
                return x
            return x._replace(total=new.total, inner=with_totals(x.inner, new.inner))

        return jax.tree.map(replaced, state, fresh, is_leaf=is_accumulating)

    tx = replace_parts(
        ours.tx, lambda x: x.replace(max_rows=None) if isinstance(x, accumulate_gradients) else x
    )
    return AdamjaxState(ours.owner, tx, with_totals(ours.state, tx.init(ours.params)), ours.params)


class _Comparison:
    """The steps of both optimizers that are compared, and how close they must be.

    Attributes:
      ours, state: the states of both.
      source: what the state of optax contains.
      fresh: what `init` returns, of both.
      has_same_form: whether optax has the formulas of adamjax, as for Adam but not for AMSGrad.
      steps: takes the steps.
      rtol: by leaf, how far its updates may be apart.
      rtol_at_first: the same in the first step from a state, before moments are rounded.
      has_narrow_slots: by leaf, whether some moment has fewer than 32 bits.
      are_joint: whether updates of some leaves may depend on other leaves.
      has_rule: by leaf, whether a rule sees it.
      largest: by the size of weights, whether all gradients are 0, and the leaf: optax' largest
        update so far.
      largest_here: the same since the states where the present steps start, with their rates.
      starts: where all has been compared: after how many steps of the schedules, and which
        hyperparameters of 0 were set to another value.
      is_compared: whether some steps have been compared.
      is_seen: by leaf, whether optax has moved it so far in a step whose rate hides nothing, the
        first from some states: some differences show in such a step alone.
    """

    def __init__(
        self, ours: AdamjaxState, optimizer: Any, state: Any, rtol: float, widens: bool
    ) -> None:
        self.owner, self.ours, self.state = ours.owner, ours, state
        self.source = read_state(ours.owner, state)
        self.has_same_form = set(ours.kinds) <= {"adam"}
        self.steps = PairedSteps(ours, optimizer, widens)
        paths = self.steps.paths
        narrow_ours, narrow = _narrow_leaves(ours.state), set()
        for path, moments in self.source.moments.items():
            if any(is_narrow(x) for one in moments for x in (one.slots or {}).values()):
                narrow.add(path)
        self.has_narrow_slots = np.array([path in narrow | narrow_ours for path in paths], bool)
        self.has_rule = np.array([path in self.source.moments for path in paths], bool)
        self.are_joint = bool(np.any(self._joint_leaves()))
        self.rtol = self._tolerances(rtol, self.has_narrow_slots)
        rounds_first = np.array([path in narrow_ours for path in paths], bool)
        self.rtol_at_first = self._tolerances(
            rtol, rounds_first if widens else self.has_narrow_slots
        )
        self._forget_largest_here()
        self.largest = self.largest_here
        self._forget_largest_here()
        self.is_seen = np.zeros(len(paths), bool)
        self.starts: list[tuple[int, frozenset[str]]] = []
        self.is_compared = False
        self.fresh = ours.tx.init(ours.params), optimizer.init(ours.params)
        self._advance = jax.jit(self._advanced)

    def _tolerances(self, rtol: float, has_narrow_slots: np.ndarray) -> np.ndarray:
        """How far the updates of each leaf may be apart; see `rtol`."""
        # Adam has the same form in optax.
        least = 0.0 if self.has_same_form else rtol
        params = self.steps.params
        are_narrow = np.array([is_narrow(p) for p in params], bool)
        beside = self._is_beside(are_narrow | has_narrow_slots)
        rules = [part.tx for part in self.ours.parts if isinstance(part.tx, Rule)]
        of_b2 = max((_rounding_of_b2(float(rule.b2)) for rule in rules), default=0.0)
        own = []
        for p, is_one, slots in zip(params, are_narrow, has_narrow_slots, strict=True):
            usual = _RTOL64 if jnp.finfo(dtype_of(p)).nmant > 50 else _RTOL + of_b2
            narrow = max(_NARROW_RTOL * slots, _NARROW_OPTAX_RTOL * is_one)
            own.append(max(least, usual, narrow, 2 * float(jnp.finfo(dtype_of(p)).eps)))
        return np.maximum(own, _BESIDE_NARROW_RTOL * beside)

    def _is_beside(self, narrow: np.ndarray) -> np.ndarray:
        """By leaf, whether it is narrow or may be computed from leaves that are."""
        if np.any(narrow) and has_rounded_hyperparams(self.state):
            return np.ones_like(narrow)
        joint = [leaves for leaves in self._joint_leaves() if np.any(leaves & narrow)]
        return np.any([narrow, *joint], axis=0)

    def _joint_leaves(self) -> list[np.ndarray]:
        """For each transform that may compute a leaf's update from other leaves: which it sees."""
        # Of adamjax' own transforms, one does.
        return [
            self._are_in(part)
            for part in self.ours.parts
            if not is_of_adamjax(part.tx) or isinstance(part.tx, clip_by_global_norm | foreign)
        ]

    def _are_in(self, part: Part) -> np.ndarray:
        """By leaf, whether a part of the transform sees it."""
        leaves = leaves_by_path(self.owner, part.params)
        return np.array([path in leaves for path in self.steps.paths], bool)

    # --- what is compared -------------------------------------------------------------------------

    def compare(self) -> None:
        if not self.steps.leaves:
            return
        self._measure_past_steps()
        self._compare_at_all_counts("these states", frozenset())
        zeros = zero_hyperparams(self.ours.state), zero_hyperparams(self.state)
        both = zeros[0] & zeros[1]
        if both:
            # A trainer sets them before each step, so that 0 says nothing.
            self.ours = self.ours.with_state(with_values(self.ours.state, both))
            self.state = with_values(self.state, both)
            names = " and ".join(sorted(both))
            start = f"these states, with a {names} of {VALUE} in place of 0,"
            self._compare_at_all_counts(start, both)
        if not self.is_compared:
            raise ValueError(
                f"{self.owner}: nothing can be compared, because no update of the optimizer of "
                "optax is finite: set rates that are finite in its state, or pass check=False"
            )
        if "rate" in zeros[0] | zeros[1]:
            self._expect_movement()

    def _compare_at_all_counts(self, start: str, set_kinds: frozenset[str]) -> None:
        """Compares many steps of these states, and a few at each of many later counts."""
        self.is_seen = np.zeros_like(self.is_seen)
        self._compare_at(0, start)
        self.starts.append((0, set_kinds))
        unseen = ~self.is_seen
        for number, (start_of_later, steps) in enumerate(self._later_counts()):
            before = self.is_seen.copy()
            self._forget_largest_here()
            size = _WEIGHTS[number % 2]
            self._compare_later(start_of_later, steps, size)
            if np.any(unseen & self.is_seen & ~before):
                # The rate was 0 before, or next to it, and hid everything else of these leaves.
                self._compare_at(steps, start_of_later)
                self.starts.append((steps, set_kinds))

    def compare_whole(self, ours: AdamjaxState, optimizer: Any, state: Any) -> None:
        """Compares steps of the whole model, if the states that are compared are a sample of it.

        There is one step at each count where leaves were first seen to move.

        Args:
          ours, state: the states of the whole model.
        """
        call = self.steps.whole_call(ours, optimizer)
        for steps, set_kinds in self.starts:
            states = with_values(ours.state, set_kinds), with_values(state, set_kinds)
            if steps:
                fresh = ours.tx.init(ours.params), optimizer.init(ours.params)
                states = self._advanced_both(ours, states, fresh, steps, rule_as_it_is)
            for size in _WEIGHTS:
                for apart, largest in self.steps.take_whole(call, states, size):
                    self._expect_same_whole(size, apart, largest)

    def _expect_same_whole(self, size: float, apart: np.ndarray, largest: np.ndarray) -> None:
        largest_so_far = np.maximum(self.largest[size, False], largest)
        is_close = apart <= self.rtol * largest + _ROUNDING * largest_so_far
        if not np.all(np.isfinite(largest)) or np.all(is_close):
            return
        leaf = int(np.argmin(is_close))
        raise ValueError(
            f"{self.owner}: in a step of the whole leaf {self.steps.paths[leaf]!r}, tx moves an "
            f"element by {apart[leaf]:.6g} more or less than the optimizer of optax, whose largest "
            f"update is {largest[leaf]:.6g}. Both move a sample of the leaf alike, so one of them "
            "may treat some rows in another way"
        )

    def _expect_movement(self) -> None:
        """Refuses a leaf with a rule that no step has moved."""
        unmoved = self.has_rule & ~np.any([x > 0 for x in self.largest.values()], axis=0)
        if np.any(unmoved):
            path = self.steps.paths[int(np.argmax(unmoved))]
            raise ValueError(
                f"{self.owner}: no step moves {path!r}, because its learning rate is 0 in a state "
                "(inject_hyperparams, with_hyperparams), so nothing can be compared: build both "
                "optimizers with the same rate above 0 and set that rate in the state, convert, "
                "and set 0 again afterwards; or pass check=False"
            )

    def _compare_later(self, start: str, steps: int, size: float) -> None:
        """Compares a few steps when the schedules are this number of steps later."""
        states, later = self._states(steps, rule_as_it_is), self._later_steps()
        self._expect_same(start, states, size, later[:1] if self._rounds_later() else later)
        if self._rounds_later():
            for i, step in enumerate(later[1:], 1):
                self._expect_same(start, self._states(steps + i, rule_as_it_is), size, [step])
        if not np.all(self.has_rule):
            # A decay is small beside the gradient, where nothing makes its size that of a rate.
            self._expect_same(start, states, size, [self._still()], is_still=True)

    def _rounds_later(self) -> bool:
        """Whether the first step from a state is more accurate than later ones."""
        return bool(np.any(self.rtol_at_first < self.rtol))

    def _compare_at(self, steps: int, start: str) -> None:
        """Compares many steps of the states when the schedules are this number of steps later."""
        self._forget_largest_here()
        usual = self.steps.usual
        ones = np.ones(len(usual))
        states = self._states(steps, rule_as_it_is)
        first = self._states(steps, new_rule if self.has_same_form else unread_rule)
        start_of_first = f"the first step at {start}"
        if not self.has_same_form:
            start_of_first = f"a step of rows without gradients so far, at {start}"
        for size in _WEIGHTS:
            for steps_taken in self._all_steps(usual, _SIZES):
                self._expect_same(start, states, size, steps_taken)
            varied = [Step(x * usual, as_moments=True) for x in _VARIED_SIZES]
            self._expect_same(start, states, size, varied)
            for steps_taken in self._all_steps(ones, _FIRST_SIZES):
                self._expect_same_first(start_of_first, first, size, steps_taken)
            if self.has_same_form:
                late = self._states(steps, late_rule)
                self._expect_same(f"a late step at {start}", late, size, [Step(1e3 * usual)])
            else:
                clipped = [Step(x * ones) for x in _CLIPPED_SIZES]
                self._expect_same(start, states, size, clipped)
            for from_states in (states, first):
                self._expect_same(start, from_states, size, [self._still()], is_still=True)
            # A momentum moves rows without a gradient, unless an optimizer leaves them alone.
            self._expect_same_first(start_of_first, first, size, [Step(ones), self._still()])
        self._compare_decays_of_u(start, self._states(steps, unread_rule))
        for leaf, (value, size) in itertools.product(self._some_leaves(), _NOT_FINITE):
            not_finite = Step(usual, spoilt_leaf=leaf, spoilt_by=value)
            self._expect_same(
                f"{start}, where a gradient was {value},",
                states,
                size,
                [Step(usual), not_finite, Step(usual)],
                not_finite=(leaf, value),
            )

    def _compare_decays_of_u(self, start: str, states: tuple[Any, Any]) -> None:
        """Compares a step of Adamax after many without gradients, in which u decays.

        In one step it decays by 1 - b2, less than what updates may be apart.
        """
        rules = [part.tx for part in self.ours.parts if "u" in rule_slots(part.state)]
        rules = [tx for tx in rules if isinstance(tx, Rule)]
        if not rules or np.any(self.rtol >= _BESIDE_NARROW_RTOL):
            return  # In narrow dtypes, each step rounds u.
        if any(float(tx.eps or 0) > _SMALL_EPS for tx in rules):
            return  # In optax epsilon decays with u.
        most = (_MOST_ELEMENTS >> 5) // self.steps.num_elements
        most = max(min(_MOST_STILL, most) // self.steps.calls, 1)
        ones = np.ones(len(self.steps.usual))
        for b2 in {float(tx.b2) for tx in rules}:
            num_still = min(most, math.ceil(1 / max(1 - b2, 1 / _MOST_STILL)))
            steps = [Step(ones), *[self._still()] * num_still, Step(_AFTER_STILL * ones)]
            self._forget_largest_here()
            what = f"{start}, and {num_still} steps without gradients,"
            self._expect_same(what, states, _WEIGHTS[1], steps, last_only=True)

    def _still(self) -> Step:
        """A step whose gradients are all 0, where decays and momenta alone move the weights."""
        return Step(np.zeros(len(self.steps.usual)))

    def _all_steps(
        self, base: np.ndarray, sizes: Sequence[Sequence[float]]
    ) -> Iterator[list[Step]]:
        """Sequences of steps: with gradients of several sizes, and with single large leaves."""
        for of_steps in sizes:
            yield [Step(base * size) for size in of_steps]
        yield [Step(self._of_many_sizes(base)) for _ in range(3)]
        if len(base) > 1:
            for leaf in self._some_leaves():
                large = base.copy()
                large[leaf] *= _LARGE_LEAF
                yield [Step(large), Step(base)]

    def _later_steps(self) -> list[Step]:
        usual = self.steps.usual
        return [*(Step(usual * size) for size in _LATER_SIZES), Step(self._of_many_sizes(usual))]

    def _of_many_sizes(self, base: np.ndarray) -> np.ndarray:
        return base * 10 ** self.steps.rng.uniform(-2, 2, len(base))

    def _some_leaves(self) -> list[int]:
        """All leaves, or some of very many: at least one of each kind.

        Leaves are of one kind if the same parts of `tx` see them, and the same rules of optax.
        """
        places = range(len(self.steps.leaves))
        most = min(_MOST_LEAVES, (_MOST_ELEMENTS >> 5) // self.steps.num_elements)
        most = max(most // self.steps.calls, _FEWEST_LEAVES)
        if len(places) <= most:
            return list(places)
        rules = jax.tree.leaves(self.state, is_leaf=lambda x: role_of(x) == "rule")
        seen_by = [self._are_in(part) for part in self.ours.parts]
        for x in rules:
            if role_of(x) == "rule":
                leaves = leaves_by_path(self.owner, x.mu)
                seen_by.append(np.array([path in leaves for path in self.steps.paths], bool))
        shuffled = self.steps.rng.permutation(len(places)).tolist()
        of_each_kind = {tuple(leaves[i] for leaves in seen_by): i for i in shuffled}
        # Leaves without a rule come first: there are few of them, and they are often forgotten.
        chosen = sorted(of_each_kind.values(), key=lambda i: bool(self.has_rule[i]))[:_MOST_LEAVES]
        others = [i for i in shuffled if i not in chosen]
        return sorted([*chosen, *others[: max(most - len(chosen), 0)]])

    def _later_counts(self) -> Iterator[tuple[str, int]]:
        """Later counts at which steps are compared, each with the number of steps until then."""
        ours = {int(x.count) for x in states_of_class(ScheduleState, self.ours.state)}
        schedules = [part.tx for part in self.ours.parts if has_schedule(part.tx)]
        # Transforms that conversions do not know may follow a count of their own.
        others = any(map(may_have_counts, self.source.other_states))
        if not (schedules or self.source.counts or self.source.accumulated or others):
            return
        now = ours | {count.value for count in self.source.counts} or {0}
        calls, each = self.steps.calls, len(_LATER_SIZES) + 1
        num_elements = self.steps.num_elements
        most = min(
            _MOST_COUNTS,
            _MOST_CALLS // (each * calls),
            _MOST_ELEMENTS // (each * calls * (num_elements + _OF_A_LEAF * len(self.steps.leaves))),
        )
        most = max(most, _FEWEST_COUNTS)
        # Steps pass the end of a part of a schedule, counted in steps or in calls.
        near_ends: list[int] = []
        for end, count, unit in itertools.product(
            ends_of_schedules(self.ours.tx), sorted(now), {1, calls}
        ):
            start = (end - count) // unit - 2
            if start > 0 and not any(abs(start - other) <= 1 for other in near_ends):
                near_ends.append(start)
        near_ends = near_ends[: most - most // 3]
        grid = {*range(each, _EACH, each), *(1 << i for i in range(_LAST.bit_length()))}
        grid |= {int(_EACH * 1.03**i) for i in range(int(math.log(_CLOSE / _EACH) / 0.03))}
        ordered = sorted(grid)
        chosen = {*near_ends, *ordered[:: -(-len(ordered) // (most - len(near_ends)))]}
        for steps in sorted(chosen):
            counts = [steps + count for count in now]
            last = (steps + each) * calls + max(now)
            if not any(_is_negative(tx, x) for tx in schedules for x in (*counts, last)):
                yield f"count {min(counts)}", steps

    # --- where steps start ------------------------------------------------------------------------

    def _states(self, steps: int, rule: MakeRule) -> tuple[Any, Any]:
        """The states of both with schedules so many steps later, and with other rules."""
        states = self.ours.state, self.state
        if steps:
            states = self._advance(states, self.fresh, jnp.int32(steps))
        if rule is rule_as_it_is:
            return states
        return self._advanced(states, self.fresh, 0, rule)

    def _advanced(
        self, states: Any, fresh: Any, steps: Any, rule: MakeRule = rule_as_it_is
    ) -> tuple[Any, Any]:
        return self._advanced_both(self.ours, states, fresh, steps, rule)

    def _advanced_both(
        self, ours: AdamjaxState, states: Any, fresh: Any, steps: Any, rule: MakeRule
    ) -> tuple[Any, Any]:
        ours, how = ours.with_state(states[0]), Advance(steps, self.steps.calls, rule)
        return (
            advanced_adamjax(ours, states[0], fresh[0], how),
            advanced_optax(states[1], fresh[1], how),
        )

    # --- how close they must be -------------------------------------------------------------------

    def _measure_past_steps(self) -> None:
        """Measures optax' largest updates in the past, before a rate has fallen."""
        now = max([0, *(count.value for count in self.source.counts)])
        step = Step(np.ones(len(self.steps.leaves)))
        for steps in sorted({now * i // 16 for i in (0, 1, 2, 4, 8, 12)}):
            states = self._advance(self.fresh, self.fresh, jnp.int32(steps))
            # A still step moves by decays, and after another step by a momentum too.
            stills = [self._still()], [step, self._still()]
            for size, steps_taken in itertools.product(_WEIGHTS, stills):
                for number, found in self.steps.take(states, size, steps_taken):
                    key = size, number == len(steps_taken) - 1
                    # A rate may be infinite at a count that the run never had.
                    largest = np.where(np.isfinite(found.largest), found.largest, 0)
                    self.largest[key] = np.maximum(self.largest[key], largest)

    def _forget_largest_here(self) -> None:
        keys = itertools.product(_WEIGHTS, (False, True))
        self.largest_here = {key: np.zeros(len(self.steps.leaves)) for key in keys}

    def _expect_same_first(
        self, start: str, states: tuple[Any, Any], size: float, steps: Sequence[Step]
    ) -> None:
        """Compares steps from rules with moments of 0.

        Updates are compared with those of these steps alone. If gradients are small, an epsilon
        makes all of them small, and the larger updates of other steps would hide it.
        """
        largest_here = self.largest_here
        self._forget_largest_here()
        if "adamax" not in self.ours.kinds:
            self._expect_same(start, states, size, steps)
        else:
            # In optax epsilon is in u and decays with it, so after the first step u may differ.
            for step in steps:
                self._expect_same(start, states, size, [step], first_only=True)
        self.largest_here = largest_here

    def _expect_same(
        self,
        start: str,
        states: tuple[Any, Any],
        size: float,
        steps: Sequence[Step],
        is_still: bool = False,
        first_only: bool = False,
        last_only: bool = False,
        not_finite: tuple[int, float] | None = None,
    ) -> None:
        """Takes steps with weights of one size, and refuses updates that are apart.

        Args:
          is_still: whether all gradients are 0. Then updates are compared with those of such steps
            alone, because gradients are so large that they would hide a weight decay.
          first_only: whether to compare only the first step of each leaf.
          last_only: whether to compare only the last step.
          not_finite: the leaf whose gradient is not finite in some step, if any, and its value.
        """
        compared = []
        for number, found in self.steps.take(states, size, steps):
            if not found.is_finite:
                break  # This ends the run in optax. A transform may skip the step.
            if not_finite and self._is_ended_by_clip(found, *not_finite):
                break
            if not last_only or number == len(steps) - 1:
                compared.append((number, found))
        if not compared:
            return
        self.is_compared = True
        key = size, is_still
        here = [self.largest_here[key], *(found.largest for _, found in compared)]
        self.largest_here[key] = largest_here = np.max(here, axis=0)
        for number, found in compared:
            self.largest[key] = np.maximum(self.largest[key], found.largest)
            # An update whose terms nearly cancel is as inaccurate as the terms: a momentum of
            # gradients of both signs, or a momentum and a weight decay.
            is_first = found.is_first
            if self.are_joint:
                is_first = np.full_like(is_first, np.all(is_first))
            rtol = np.where(is_first, self.rtol_at_first, self.rtol)
            rounding = _ROUNDING * self.largest[key]
            if not is_still:
                least = np.where(self.has_rule, _SEEN * largest_here, 0)
                is_first_here = (number == 0) | ~self.has_rule
                is_large = (found.largest > 0) & (found.largest >= least)
                self.is_seen |= is_first_here & is_large & (rounding <= rtol * largest_here)
            is_close = found.apart <= rtol * largest_here + rounding
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
                    "freeze leaves with set_to_zero: 0 times NaN is NaN)"
                )

    def _is_ended_by_clip(self, found: Differences, spoilt: int, value: float) -> bool:
        """Whether a frozen leaf with an infinite gradient has ended the run in adamjax alone.

        The clip of adamjax makes every element NaN. That of optax makes the infinite ones NaN and
        others 0. If the leaf moves, this ends the run in optax too, so no later step is compared.
        In a frozen leaf it is discarded. Whether both clip alike shows in other steps.
        """
        moves = self.has_rule | np.any([x > 0 for x in self.largest.values()], axis=0)
        if not math.isinf(value) or moves[spoilt]:
            return False
        parts = [part for part in self.ours.parts if isinstance(part.tx, clip_by_global_norm)]
        clipped = [leaves for leaves in map(self._are_in, parts) if leaves[spoilt]]
        ended = np.flatnonzero(np.any(clipped, axis=0) & moves) if clipped else ()
        return len(ended) > 0 and all(np.all(np.isnan(found.updates[i][0])) for i in ended)


def _rounding_of_b2(b2: float) -> float:
    """By how much optax' updates are off because it rounds b2, and so 1 - b2, to float32."""
    if b2 == 1:
        return 0.0
    off = abs((1 - float(np.float32(b2))) / (1 - b2) - 1)
    # A larger difference is refused. The root of v is off by half as much as v.
    return min(off, _MOST_OF_B2)


def _is_negative(tx: Any, count: int) -> bool:
    """Whether a rate is below 0 at a count, as a schedule may be after the end of a training."""
    rate = getattr(tx, "learning_rate", None)
    rates = (*rate.values, rate.default) if isinstance(rate, by_path) else (rate,)
    return any(callable(x) and float(x(jnp.int32(count))) < 0 for x in rates)


def expect_optimizer(owner: str, optimizer: Any) -> None:
    """Refuses what is no transform."""
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
    """Refuses a transform that has not made a state."""
    expected: Any = jax.tree.structure(jax.eval_shape(optimizer.init, params))
    if jax.tree.structure(state) != expected:
        raise ValueError(
            f"{owner}: the optax state has another structure than optimizer.init(params): pass the "
            "transform that made it, and these parameters (of flax.nnx, nnx.as_pure of both)"
        )


def _narrow_leaves(state: Any) -> set[str]:
    """The paths of the leaves with narrow slots in a state of adamjax."""
    trees = [getattr(x, name) for x in slot_states(state) for name in rule_slots(x)]
    slots = [pair for tree in trees for pair in leaves_by_path("", tree).items()]
    return {path for path, x in slots if is_narrow(x)}
