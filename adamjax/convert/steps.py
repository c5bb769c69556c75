"""Compares the steps of two optimizers: at which counts, and with which gradients."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.convert.adamjax_state import AdamjaxState, described_argument
from adamjax.convert.advance import (
    LATE,
    VALUE,
    Advance,
    MakeRule,
    advanced_adamjax,
    advanced_optax,
    kinds_of_hyperparams,
    late_rule,
    may_have_counts,
    new_rule,
    rule_as_it_is,
    unread_rule,
    with_half_values,
    with_values,
    zero_hyperparams,
)
from adamjax.convert.closeness import Closeness
from adamjax.convert.optax_state import read_state, role_of
from adamjax.convert.paired_steps import NO_WEIGHTS, OWN_WEIGHTS, WEIGHTS, PairedSteps, Step
from adamjax.convert.sampling import sampled
from adamjax.convert.schedules import ends_of_schedules, has_schedule
from adamjax.convert.values import leaves_by_path
from adamjax.convert.widening import widened
from adamjax.data import Tree
from adamjax.guard import AccumulateGradientsState, accumulate_gradients
from adamjax.scaling import ScheduleState
from adamjax.schedule import by_path
from adamjax.structure import replace_parts, rule_slots, states_of_class
from adamjax.transform import Rule

__all__ = ["expect_made_by", "expect_optimizer", "expect_same_steps"]

# The sizes of gradients in the steps of each comparison, relative to those that the moments are of.
# A clip shows where they are large, and an epsilon where they are small.
_SIZES = ((1.0, 30.0, 1e3, 0.1, 1.0, 1e-3), (10.0, 1.0, 0.3))
# In the first steps of a run, sizes are absolute.
_SMALL_SIZES = ((1e-8, 3e-8, 1e-8), (1e-12,), (1e-15,))
# Gradients of a scaled loss are large. A clip after the division by the scale shows at the largest.
_FIRST_SIZES = (*_SIZES, (1e6, 1e5), (1e8, 1e7), *_SMALL_SIZES)
# At each later count, some sizes, the last relative to others.
_LATER_SIZES = (1.0, 1e3, 1e-3, 1.0)
# Where elements of a leaf differ in size as its moments do.
_VARIED_SIZES = (1.0, 0.3)
# Absolute sizes, at which most clips show.
_CLIPPED_SIZES = (1.0, 1e4)
# What a gradient that is not finite is tried as, with the size of weights. optax may decay weights
# in a step that tx skips.
_NOT_FINITE = ((math.nan, WEIGHTS[1]), (math.inf, WEIGHTS[1]), (math.nan, WEIGHTS[0]))
# How much larger the gradients of one leaf are than those of others, where its part in a norm is
# compared; and how many leaves are tried so, or with a NaN.
_LARGE_LEAF, _MOST_LEAVES, _FEWEST_LEAVES = 1e4, 16, 2
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
    """The steps of both optimizers that are compared.

    Attributes:
      ours, state: the states of both.
      source: what the state of optax contains.
      fresh: what `init` returns, of both.
      steps: takes the steps.
      closeness: compares their updates.
      starts: where all has been compared: after how many steps of the schedules, and which
        hyperparameters of 0 were set to another value.
    """

    def __init__(
        self, ours: AdamjaxState, optimizer: Any, state: Any, rtol: float, widens: bool
    ) -> None:
        self.owner, self.ours, self.state = ours.owner, ours, state
        self.source = read_state(ours.owner, state)
        self.steps = PairedSteps(ours, optimizer, widens)
        self.closeness = Closeness(ours, state, self.source, self.steps, rtol, widens)
        self.starts: list[tuple[int, frozenset[str]]] = []
        self.fresh = ours.tx.init(ours.params), optimizer.init(ours.params)
        self._advance = jax.jit(self._advanced)

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
        kinds = kinds_of_hyperparams(self.ours.state) & kinds_of_hyperparams(self.state)
        if kinds:
            # A trainer may set other values than those in the states.
            self.ours = self.ours.with_state(with_half_values(self.ours.state, kinds))
            self.state = with_half_values(self.state, kinds)
            self._compare_at(0, f"these states, with half their {' and '.join(sorted(kinds))},")
        if not self.closeness.is_compared:
            raise ValueError(
                f"{self.owner}: nothing can be compared, because no update of the optimizer of "
                "optax is finite: set rates that are finite in its state, or pass check=False"
            )
        if "rate" in zeros[0] | zeros[1]:
            self.closeness.expect_movement()

    def _measure_past_steps(self) -> None:
        """Measures optax' largest updates in the past, before a rate has fallen."""
        now = max([0, *(count.value for count in self.source.counts)])
        step = Step(np.ones(len(self.steps.leaves)))
        for steps in sorted({now * i // 16 for i in (0, 1, 2, 4, 8, 12)}):
            states = self._advance(self.fresh, self.fresh, jnp.int32(steps))
            # A still step moves by decays, and after another step by a momentum too.
            stills = [self._still()], [step, self._still()]
            for size, steps_taken in itertools.product((*WEIGHTS, NO_WEIGHTS, OWN_WEIGHTS), stills):
                for number, found in self.steps.take(states, size, steps_taken):
                    is_still = number == len(steps_taken) - 1
                    self.closeness.add_past(size, is_still, found.largest)

    def _compare_at_all_counts(self, start: str, set_kinds: frozenset[str]) -> None:
        """Compares many steps of these states, and a few at each of many later counts."""
        self.closeness.is_seen = np.zeros_like(self.closeness.is_seen)
        self._compare_at(0, start)
        self.starts.append((0, set_kinds))
        unseen = ~self.closeness.is_seen
        for number, (start_of_later, steps) in enumerate(self._later_counts()):
            before = self.closeness.is_seen.copy()
            self.closeness.start_anew()
            size = WEIGHTS[number % 2]
            self._compare_later(start_of_later, steps, size)
            if np.any(unseen & self.closeness.is_seen & ~before):
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
            for size in WEIGHTS:
                for apart, largest in self.steps.take_whole(call, states, size):
                    self.closeness.expect_same_whole(size, apart, largest)

    def _compare_later(self, start: str, steps: int, size: float) -> None:
        """Compares a few steps when the schedules are this number of steps later."""
        states, later = self._states(steps, rule_as_it_is), self._later_steps()
        self._expect_same(start, states, size, later[:1] if self.closeness.rounds_later else later)
        if self.closeness.rounds_later:
            for i, step in enumerate(later[1:], 1):
                self._expect_same(start, self._states(steps + i, rule_as_it_is), size, [step])
        if not np.all(self.closeness.has_rule):
            # A decay is small beside the gradient, where nothing makes its size that of a rate.
            self._expect_same(start, states, size, [self._still()], is_still=True)

    def _compare_at(self, steps: int, start: str) -> None:
        """Compares many steps of the states when the schedules are this number of steps later."""
        self.closeness.start_anew()
        usual = self.steps.usual
        ones = np.ones(len(usual))
        states = self._states(steps, rule_as_it_is)
        first = self._states(steps, new_rule if self.closeness.has_same_form else unread_rule)
        start_of_first = f"the first step at {start}"
        if not self.closeness.has_same_form:
            start_of_first = f"a step of rows without gradients so far, at {start}"
        for size in WEIGHTS:
            for steps_taken in self._all_steps(usual, _SIZES):
                self._expect_same(start, states, size, steps_taken)
            varied = [Step(x * usual, as_moments=True) for x in _VARIED_SIZES]
            self._expect_same(start, states, size, varied)
            for steps_taken in self._all_steps(ones, _FIRST_SIZES):
                self._expect_same_first(start_of_first, first, size, steps_taken)
            if self.closeness.has_same_form:
                for count in LATE:
                    late = self._states(steps, functools.partial(late_rule, count))
                    self._expect_same(f"a late step at {start}", late, size, [Step(1e3 * usual)])
            else:
                clipped = [Step(x * ones) for x in _CLIPPED_SIZES]
                self._expect_same(start, states, size, clipped)
            for from_states in (states, first):
                self._expect_same(start, from_states, size, [self._still()], is_still=True)
            # A momentum moves rows without a gradient, unless an optimizer leaves them alone.
            self._expect_same_first(start_of_first, first, size, [Step(ones), self._still()])
        for of_steps in _SMALL_SIZES:
            small = [Step(x * ones) for x in of_steps]
            self._expect_same_first(start_of_first, first, NO_WEIGHTS, small)
        # Something may depend on the values of the weights, such as weights of 0 that stay 0.
        self._expect_same(start, states, OWN_WEIGHTS, [Step(usual), Step(usual)])
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

    def _expect_same(
        self,
        start: str,
        states: tuple[Any, Any],
        size: float | None,
        steps: Sequence[Step],
        **options: Any,
    ) -> None:
        """Takes steps, and refuses updates that are apart.

        Args:
          size: the size of the weights, or `OWN_WEIGHTS`.
          options: those of `Closeness.expect_same`.
        """
        self.closeness.expect_same(start, size, self.steps.take(states, size, steps), **options)

    def _expect_same_first(
        self, start: str, states: tuple[Any, Any], size: float, steps: Sequence[Step]
    ) -> None:
        """Compares steps from rules with moments of 0.

        Updates are compared with those of these steps alone. If gradients are small, an epsilon
        makes all of them small, and the larger updates of other steps would hide it.
        """
        with self.closeness.alone():
            if "adamax" not in self.ours.kinds:
                self._expect_same(start, states, size, steps)
                return
            # In optax epsilon is in u and decays with it, so after the first step u may differ.
            for step in steps:
                self._expect_same(start, states, size, [step], first_only=True)

    def _compare_decays_of_u(self, start: str, states: tuple[Any, Any]) -> None:
        """Compares a step of Adamax after many without gradients, in which u decays.

        In one step it decays by 1 - b2, less than what updates may be apart.
        """
        rules = [part.tx for part in self.ours.parts if "u" in rule_slots(part.state)]
        rules = [tx for tx in rules if isinstance(tx, Rule)]
        if not rules or self.closeness.has_narrow_leaves:
            return  # In narrow dtypes, each step rounds u.
        if any(float(tx.eps or 0) > _SMALL_EPS for tx in rules):
            return  # In optax epsilon decays with u.
        most = (_MOST_ELEMENTS >> 5) // self.steps.num_elements
        most = max(min(_MOST_STILL, most) // self.steps.calls, 1)
        ones = np.ones(len(self.steps.usual))
        for b2 in {float(tx.b2) for tx in rules}:
            num_still = min(most, math.ceil(1 / max(1 - b2, 1 / _MOST_STILL)))
            steps = [Step(ones), *[self._still()] * num_still, Step(_AFTER_STILL * ones)]
            self.closeness.start_anew()
            what = f"{start}, and {num_still} steps without gradients,"
            self._expect_same(what, states, WEIGHTS[1], steps, first_compared=len(steps) - 1)

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
        seen_by = [self.steps.leaves_of(part) for part in self.ours.parts]
        for x in rules:
            if role_of(x) == "rule":
                leaves = leaves_by_path(self.owner, x.mu)
                seen_by.append(np.array([path in leaves for path in self.steps.paths], bool))
        shuffled = self.steps.rng.permutation(len(places)).tolist()
        of_each_kind = {tuple(leaves[i] for leaves in seen_by): i for i in shuffled}
        # Leaves without a rule come first: there are few of them, and they are often forgotten.
        chosen = sorted(of_each_kind.values(), key=lambda i: bool(self.closeness.has_rule[i]))[
            :_MOST_LEAVES
        ]
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
