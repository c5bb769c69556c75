"""The common form that every state is read into, and that every state is filled from."""

import dataclasses
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from adamjax.convert.systems import KINDS

__all__ = [
    "Accumulated",
    "Calls",
    "Count",
    "Hyperparams",
    "LeafMoments",
    "SkippingTransform",
    "Slots",
    "Source",
    "meet",
    "shifted_schedule",
]

# Arrays of one leaf by the names of the slots; hyperparameters by their names.
Slots = dict[str, Any]
Hyperparams = dict[str, Any]


@dataclasses.dataclass
class LeafMoments:
    """The moments of one leaf in one rule.

    Attributes:
      count: the number of steps taken.
      slots: arrays by the system's names; `None` if the leaf has taken no step yet.
      possible_kinds: the kinds of rules that the moments may belong to.
      product: Nadam's product of momenta, if the state has it.
      hyperparams: the hyperparameters that the system states, by adamjax's names; see
        `hyperparameters.expect_same_hyperparameters`.
      rule: the rule, if it is one of adamjax.
      in_accumulating: whether the rule is inside a transform that accumulates gradients, and so
        takes a step only every few calls.
    """

    count: int
    slots: Slots | None
    possible_kinds: tuple[str, ...] = KINDS
    product: Any = None
    hyperparams: Hyperparams = dataclasses.field(default_factory=dict)
    rule: Any = None
    in_accumulating: bool = False


class Count(NamedTuple):
    """A count outside of a rule, such as that of a schedule.

    Attributes:
      value: the number of steps if `in_accumulating`, else of calls.
      leaves: the paths of the leaves that the count is for; `None` for all.
      excluded: the paths of leaves that the count is not for.
      in_accumulating: as in `LeafMoments`.
      in_skipping: whether the count is inside a transform that skips steps, and so does not count
        skipped steps.
    """

    value: int
    leaves: frozenset[str] | None
    excluded: frozenset[str] = frozenset()
    in_accumulating: bool = False
    in_skipping: bool = False

    def is_for(self, leaves: frozenset[str] | None) -> bool:
        """Whether the count is for one of these leaves; `None` is the set of all leaves."""
        if leaves and self.excluded:
            # If all leaves are excluded, `meet` would get an empty set, for which it may be true.
            return not leaves <= self.excluded and meet(self.leaves, leaves - self.excluded)
        return meet(self.leaves, leaves)


class SkippingTransform(NamedTuple):
    """A transform that skips steps.

    Attributes:
      leaves: the paths of the leaves of the rules inside it.
      in_accumulating: whether it is itself inside a transform that accumulates gradients.
    """

    leaves: frozenset[str]
    in_accumulating: bool


class Calls(NamedTuple):
    """How calls of `update` relate to the steps of some leaves.

    Attributes:
      per_step: how many calls make a step.
      since_step: how many calls came after the last step.
    """

    per_step: int
    since_step: int


class Accumulated(NamedTuple):
    """The micro-batches since the last step, and the sums of their gradients by path."""

    micro: int
    totals: dict[str, Any]


@dataclasses.dataclass
class Source:
    """A state in the common form.

    Attributes:
      owner: the name of the conversion, for errors.
      moments: by path, the moments of each rule that the leaf goes through, in order.
      counts: the counts of schedules.
      average: by path, the average of the weights; `None` if the state has none.
      accumulated: the micro-batches of each `accumulate_gradients` or `MultiSteps`.
      num_skipped: by path, the number of steps of a leaf that were skipped.
      skipping_transforms: the transforms that skip steps.
      other_states: the states of all other transforms.
      other_states_lost_order: whether some of these are in a dictionary, whose order JAX loses.
      doubts: reasons why the run may not go on as before, each with advice.
      in_accumulating: as in `LeafMoments`, for the part of the state that is being read.
      in_skipping: as in `Count`, for this part.
    """

    owner: str
    moments: dict[str, list[LeafMoments]] = dataclasses.field(default_factory=dict)
    counts: list[Count] = dataclasses.field(default_factory=list)
    average: dict[str, Any] | None = None
    accumulated: list[Accumulated] = dataclasses.field(default_factory=list)
    num_skipped: Counter[str] = dataclasses.field(default_factory=Counter)
    skipping_transforms: list[SkippingTransform] = dataclasses.field(default_factory=list)
    other_states: list[Any] = dataclasses.field(default_factory=list)
    other_states_lost_order: bool = False
    doubts: list[str] = dataclasses.field(default_factory=list)
    in_accumulating: bool = False
    in_skipping: bool = False

    def add(self, path: str, moments: LeafMoments) -> None:
        moments = dataclasses.replace(moments, in_accumulating=self.in_accumulating)
        self.moments.setdefault(path, []).append(moments)

    def add_count(self, value: int, leaves: frozenset[str] | None) -> None:
        self.counts.append(
            Count(
                value,
                leaves,
                in_accumulating=self.in_accumulating,
                in_skipping=self.in_skipping,
            )
        )

    def has_taken_steps(self) -> bool:
        """Whether any rule has taken a step."""
        return any(x.count for of_rules in self.moments.values() for x in of_rules)

    def skipped_of(self, leaves: frozenset[str] | None) -> int:
        """The number of skipped steps of these leaves, or of all: the largest of a leaf."""
        paths = self.num_skipped if leaves is None else leaves
        return max((self.num_skipped[path] for path in paths), default=0)

    def accumulated_of(self, leaves: frozenset[str] | None) -> Accumulated | None:
        """The micro-batches of these leaves; `None` if nothing accumulates their gradients."""
        accumulated = [x for x in self.accumulated if meet(x.totals, leaves)]
        paths = [path for x in accumulated for path in x.totals]
        if len(set(paths)) < len(paths) and any(x.micro for x in accumulated):
            raise ValueError(
                f"{self.owner}: gradients are accumulated twice, one inside the other, and there "
                "are micro-batches since the last step: convert after a step of both"
            )
        micros = {x.micro for x in accumulated}
        if len(micros) > 1:
            raise ValueError(
                f"{self.owner}: parts have accumulated different numbers of micro-batches, "
                f"{sorted(micros)}, but there is one count for all: give the parts "
                "accumulate_gradients of their own, or convert after a step of all"
            )
        totals = {path: total for x in accumulated for path, total in x.totals.items()}
        return Accumulated(micros.pop(), totals) if accumulated else None

    def count_of(self, leaves: frozenset[str] | None, calls: Calls | None = None) -> int:
        """The count for a schedule of these leaves.

        It is the count of the source's schedules or, if there are none, of the rules.

        Args:
          calls: for a schedule that counts calls, the `Calls` of these leaves. `None` if it counts
            steps.
        """
        schedule_counts = [(c.in_accumulating, c.value) for c in self.counts if c.is_for(leaves)]
        rule_counts = [
            (moments.in_accumulating, moments.count)
            for path, moments_of_leaf in self.moments.items()
            if meet({path}, leaves)
            for moments in moments_of_leaf
        ]
        if not schedule_counts and not rule_counts and leaves is not None:
            # These leaves have no count, neither of a rule nor of a schedule. If all counts of
            # other leaves are equal, use that, else 0.
            others = {(c.in_accumulating, c.value) for c in self.counts}
            others |= {
                (x.in_accumulating, x.count) for of_rules in self.moments.values() for x in of_rules
            }
            return self.count_of(None, calls) if len(others) == 1 else 0
        if any(in_accumulating for in_accumulating, _ in (*schedule_counts, *rule_counts)):
            # Some counts are of steps, others of calls. Use those of the right kind, if any.
            for pairs in (schedule_counts, rule_counts):
                right_counts = {
                    n for in_accumulating, n in pairs if in_accumulating == (calls is None)
                }
                if right_counts:
                    return self._common_count(right_counts, leaves)
        steps = self._common_count({n for _, n in schedule_counts or rule_counts}, leaves)
        return steps if calls is None else steps * calls.per_step + calls.since_step

    def _common_count(self, counts: set[int], leaves: frozenset[str] | None) -> int:
        """The only one of these counts, or 0 if there is none. Several counts are refused."""
        if len(counts) > 1:
            some_leaves = f" {sorted(leaves)[:3]}" if leaves else ""
            raise ValueError(
                f"{self.owner}: the leaves{some_leaves} have taken different numbers of steps, "
                f"{sorted(counts)}, but there is one count for all: give the leaves that go "
                f"together a chain of their own with partition; {shifted_schedule(*counts)}"
            )
        return counts.pop() if counts else 0

    def refuse_doubts(self, check: bool) -> None:
        if check and self.doubts:
            raise ValueError(
                f"{self.owner}: {self.doubts[0]}, or pass check=False to convert the arrays anyway"
            )

    def expect_place_to_accumulate(self, target: "Source") -> None:
        """Refuses a target that has no place for the micro-batches of a leaf."""
        places = {path for accumulated in target.accumulated for path in accumulated.totals}
        for accumulated in self.accumulated:
            lost = [path for path in accumulated.totals if path not in places]
            if accumulated.micro and lost:
                raise ValueError(
                    f"{self.owner}: {accumulated.micro} micro-batches of {lost[0]!r} were "
                    "accumulated since the last step, and the target has no place for them: "
                    "convert after a step, or let the target accumulate gradients too"
                )


def shifted_schedule(*counts: int) -> str:
    """Advice for errors about parts that have taken these numbers of steps."""
    return (
        "each part calls its schedule with its own count, so in a part that took fewer steps use "
        f"lambda count: schedule(count + {max(counts) - min(counts)}) for a schedule of all steps"
    )


def meet(a: Iterable[str] | None, b: Iterable[str] | None) -> bool:
    """Whether two sets of leaves have a leaf in common.

    `None` is the set of all leaves. With it the result is true, even for an empty set.
    """
    return a is None or b is None or not frozenset(a).isdisjoint(b)
