"""Reads a state of adamjax into a `Source`, the form that all systems share."""

import dataclasses
import math
import numbers
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from adamjax.average import WeightEmaState, weight_ema
from adamjax.convert.optax_state import role_of
from adamjax.convert.source import Accumulated, Calls, LeafMoments, Source, meet
from adamjax.convert.systems import kind_of
from adamjax.convert.values import (
    class_name,
    counts_a_schedule,
    dense_totals,
    field_names,
    is_container,
    items_of,
    leaves_by_path,
    steps_taken,
)
from adamjax.data import Tree, is_array
from adamjax.exact.state import ExactRowsState, expect_flushed
from adamjax.grouping import grouped
from adamjax.guard import AccumulateGradientsState, SkipNotFiniteState, accumulate_gradients
from adamjax.master import master_weights
from adamjax.moments import expect_scalar
from adamjax.scaling import ScheduleState
from adamjax.structure import Part, rule_slots, slot_states, states_of_class, walk
from adamjax.transform import Rule, Transform, as_transform, foreign

__all__ = [
    "AdamjaxState",
    "described_argument",
    "expect_foreign_state",
    "expect_state_argument",
    "initial_state",
    "is_of_adamjax",
    "may_contain_states",
]


def described_argument(x: Any) -> str:
    """A short description of an argument, without its arrays."""
    if not any(map(is_array, jax.tree.leaves(x))):
        return f"{x!r:.100}"
    if type(x) is not tuple:
        return f"a {class_name(x)}"
    return f"a tuple of ({', '.join(class_name(item) for item in x)})"


def expect_state_argument(owner: str, name: str, x: Any) -> None:
    """Refuses a transform in the place of a state."""
    if isinstance(x, Transform) or (hasattr(x, "init") and hasattr(x, "update")):
        raise TypeError(
            f"{owner}: {name} is a transform, {x!r:.100}, expected the state that its init or its "
            "last update returned: pass the state first, then tx"
        )


def _transform_argument(owner: str, tx: Any) -> Transform:
    """The argument `tx` as a transform of adamjax."""
    try:
        return as_transform(tx)
    except TypeError:
        raise TypeError(
            f"{owner}: tx is {described_argument(tx)}, expected a transform of adamjax, such as "
            "adamjax.adam(1e-3): pass the state first, then tx"
        ) from None


def expect_foreign_state(owner: str, tx: Any, state: Any, params: Tree) -> None:
    """Refuses a state whose structure is not that of `tx`, if `tx` is of another library.

    Such a transform does not check its states itself.
    """
    if isinstance(tx, Transform):
        return
    expected: Any = jax.tree.structure(jax.eval_shape(tx.init, params))
    if jax.tree.structure(state) != expected:
        raise ValueError(
            f"{owner}: tx is a transform of another library, and the state, "
            f"{described_argument(state)}, has another structure than tx.init(params): pass the tx "
            "that made the state"
        )


def is_of_adamjax(x: Any) -> bool:
    """Whether an object is of one of adamjax's own classes."""
    return type(x).__module__.split(".")[0] == "adamjax"


def may_contain_states(x: Any) -> bool:
    """Whether a node of a state is a container that may contain states of adamjax."""
    if not is_container(x):
        return False
    if field_names(x) is None or is_of_adamjax(x):
        return True
    return _has_state_of_adamjax(x)


def _fields_of_wrappers(x: Any) -> Iterator[tuple[str, list[str]]]:
    """The states of other libraries that wrap states of adamjax, and have other arrays as well.

    Yields the name of the class of each, and the names of the fields with these arrays.
    """
    if not may_contain_states(x):
        return
    names = field_names(x)
    # For a state that declares `slots`, `_read` adds a doubt of its own.
    if names is not None and not is_of_adamjax(x) and not hasattr(x, "slots"):
        own = [
            name
            for name, item in zip(names, x, strict=True)
            if jax.tree.leaves(item) and not _has_state_of_adamjax(item)
        ]
        if own:
            yield class_name(x), own
    for item in items_of(x):
        yield from _fields_of_wrappers(item)


def _items_of_containers(x: Any) -> Iterator[Any]:
    """The arrays and objects in a state, at any depth of its containers, such as dictionaries."""
    if role_of(x) in ("items", "inner", "parts"):
        for item in items_of(x):
            yield from _items_of_containers(item)
    elif jax.tree.leaves(x) and not isinstance(x, numbers.Number):
        yield x


def _has_state_of_adamjax(x: Any) -> bool:
    """Whether a tree contains a state of adamjax."""
    return any(map(is_of_adamjax, jax.tree.leaves(x, is_leaf=is_of_adamjax)))


class AdamjaxState:
    """A state with the transform that made it, and the parameters.

    Attributes:
      owner: the name of the conversion, for errors.
      tx, state, params: the transform, the state and the parameters.
      parts: the transform and its parts, each with its state.
      kinds: the kinds of the rules that have a state here, in order.
      accumulations: for each `accumulate_gradients`, its number of steps and the paths of its
        leaves.
      doubts: as in `Source`.

    The argument `accumulations` is this attribute of another state of `tx`, for a `state` that is
    traced.

    Raises:
      ValueError: two leaves have one path, leaves are in buckets of `grouped`, weights are in the
        state of `master_weights`, or there is a rule that conversions do not know.
    """

    def __init__(
        self,
        owner: str,
        tx: Any,
        state: Any,
        params: Tree,
        accumulations: list[tuple[int, frozenset[str]]] | None = None,
    ) -> None:
        self.owner, self.state, self.params = owner, state, params
        leaves_by_path(owner, params)
        self.tx = _transform_argument(owner, tx)
        self.parts = list(walk(self.tx, state, params))
        for part in self.parts:
            if isinstance(part.tx, grouped):
                raise ValueError(
                    f"{owner}: {part.tx!r} keeps leaves joined. Convert the state of the transform "
                    "without grouped; grouped.split and grouped.join take a state apart and put it "
                    "together"
                )
            if isinstance(part.tx, master_weights):
                raise ValueError(
                    f"{owner}: {part.tx!r} has float32 weights in its state, which other systems "
                    "keep elsewhere. Convert the inner state with the float32 weights as "
                    "parameters, and put both together: MasterWeightsState(weights, inner)"
                )
        accumulating = [part for part in self.parts if isinstance(part.tx, accumulate_gradients)]
        if len(states_of_class(AccumulateGradientsState, state)) > len(accumulating):
            raise ValueError(
                f"{owner}: accumulate_gradients is inside a transform of another library, which "
                "hides how many calls a step takes: use adamjax.chain, masked or partition in "
                "place of that transform"
            )
        # Inside jit, the number of steps may be traced: `with_hyperparams` has it in its state.
        self.accumulations = accumulations or [
            (int(part.tx.steps), frozenset(leaves_by_path(owner, part.params)))
            for part in accumulating
        ]
        # The parts around each part, outermost first, by the part's `id`.
        self._around: dict[int, list[Part]] = {id(part): [] for part in self.parts}
        for i, part in enumerate(self.parts):
            for inner in self.parts[i + 1 : i + len(list(walk(part.tx)))]:
                self._around[id(inner)].append(part)
        self.doubts = [
            f"{name} is around transforms of adamjax, and its own {', '.join(fields)} cannot be "
            "converted: use adamjax's accumulate_gradients, skip_not_finite or with_hyperparams in "
            "its place, or convert the state inside it"
            for name, fields in _fields_of_wrappers(state)
        ]
        # If several parts share a state, as masked and its transform do, this has the innermost.
        self._part_of = {id(part.state): part for part in self.parts}
        self._ids_of_other_libraries = {
            id(x)
            for part in self.parts
            if isinstance(part.tx, foreign) or not (is_of_adamjax(part.tx) or part.tx.parts)
            for x in _items_of_containers(part.state)
        }
        for part in self.parts:
            if isinstance(part.tx, Rule):
                kind_of(owner, part.state, part.tx)  # refuses a state of another kind
        # Rules inside transforms of other libraries are not among the parts, but their states are
        # among these.
        states = [x for x in slot_states(state) if rule_slots(x)]
        self.kinds = [kind_of(owner, x, self._tx_of(x)) for x in states]

    def with_state(self, state: Any) -> "AdamjaxState":
        """The same transform, parameters and `accumulations` with another state."""
        return AdamjaxState(self.owner, self.tx, state, self.params, self.accumulations)

    def part(self, state: Any) -> Part | None:
        """The part that a state belongs to; `None` inside a transform of another library."""
        part = self._part_of.get(id(state))
        return part if part is not None and part.state is state else None

    def is_state_of_other_library(self, x: Any) -> bool:
        """Whether an array or object is in the state of another library's transform or a user's."""
        return id(x) in self._ids_of_other_libraries

    def around(self, part: Part) -> list[Part]:
        """The parts around one of the parts, outermost first."""
        return self._around[id(part)]

    @property
    def accumulates(self) -> bool:
        """Whether some step takes several calls."""
        return any(steps > 1 for steps, _ in self.accumulations)

    def num_accumulations(self, part: Part) -> int:
        """How many `accumulate_gradients` of several calls are around one of the parts."""
        return sum(
            isinstance(outer.tx, accumulate_gradients) and int(outer.tx.steps) > 1
            for outer in self.around(part)
        )

    def _tx_of(self, state: Any) -> Any:
        part = self.part(state)
        return None if part is None else part.tx

    def leaves(self, state: Any) -> frozenset[str] | None:
        """The paths of the leaves that the part of this state sees."""
        part = self.part(state)
        return None if part is None else frozenset(leaves_by_path(self.owner, part.params))

    def calls_of(self, source: Source, leaves: frozenset[str] | None) -> Calls:
        """How calls of `update` relate to the steps of these leaves."""
        around = [(n, paths) for n, paths in self.accumulations if meet(paths, leaves)]
        if not around:
            return Calls(1, 0)
        # If one accumulate_gradients is inside another, their numbers of steps multiply.
        steps = math.prod(n for n, paths in around if meet(paths, around[0][1]))
        accumulated = source.accumulated_of(leaves)
        return Calls(steps, accumulated.micro if accumulated else 0)

    def doubts_of_average(self, average: Any) -> list[str]:
        """Doubts about a weight_ema that sets the weights, if the other system has no average."""
        if average is not None:
            return []
        return [
            f"{part.tx!r} sets the weights to their average, and the other system has no average: "
            "take it out of tx (adamjax.averaged_weights reads the average)"
            for part in self.parts
            if isinstance(part.tx, weight_ema) and part.tx.overwrite_frequency is not None
        ]

    def read_for(self, target: Source, check: bool) -> Source:
        """The state in the common form, with adamjax's names of slots.

        Args:
          target: the state of the other system that is to be filled, in the common form.
          check: whether to refuse doubts.
        """
        target.refuse_doubts(check)
        # The states of other transforms are matched in order. If the target has lost this order,
        # they cannot be matched, so this source counts as having lost it too.
        source = Source(self.owner, other_states_lost_order=target.other_states_lost_order)
        source.doubts += self.doubts + self.doubts_of_average(target.average)
        self._read(self.state, source)
        source.refuse_doubts(check)
        source.expect_place_to_accumulate(target)
        return source

    def read(self) -> Source:
        """The state in the common form, without doubts."""
        source = Source(self.owner)
        self._read(self.state, source)
        return source

    def _read(self, x: Any, source: Source) -> None:
        owner = self.owner
        if names := rule_slots(x):
            rule = self._tx_of(x)
            kind = kind_of(owner, x, rule)
            trees = {name: leaves_by_path(owner, getattr(x, name)) for name in names}
            self._expect_leaves(trees[names[0]], x)
            count = steps_taken(owner, "a rule", x.count)
            product = getattr(x, "momentum_product", None)
            for path in trees[names[0]]:
                slots = {name: tree[path] for name, tree in trees.items()}
                source.add(path, LeafMoments(count, slots, (kind,), product, rule=rule))
        elif isinstance(x, ScheduleState) or counts_a_schedule(x):
            source.add_count(steps_taken(owner, "a schedule", x.count), self.leaves(x))
        elif isinstance(x, WeightEmaState):
            average = leaves_by_path(owner, x.average)
            source.average = {**(source.average or {}), **average}
        elif isinstance(x, AccumulateGradientsState):
            micro = steps_taken(owner, "micro-batches", x.micro_count)
            totals = leaves_by_path(owner, dense_totals(x.total))
            source.accumulated.append(Accumulated(micro, totals))
            outer, source.in_accumulating = source.in_accumulating, True
            self._read(x.inner, source)
            source.in_accumulating = outer
        elif isinstance(x, SkipNotFiniteState):
            leaves = self.leaves(x) or leaves_by_path(owner, self.params)
            source.num_skipped.update(dict.fromkeys(leaves, int(x.skipped)))
            self._read(x.inner, source)
        elif isinstance(x, ExactRowsState):
            expect_flushed(owner, x)
            self._read(x.inner, source)
        elif may_contain_states(x):
            lost = [name for name in getattr(x, "slots", ()) if jax.tree.leaves(getattr(x, name))]
            if lost:
                source.doubts.append(
                    f"the state keeps {' and '.join(lost)} in a {type(x).__name__}, and the target "
                    "has no place for this: leave its transform out (if it wraps another, convert "
                    "that one, with the state inside this one)"
                )
            for item in items_of(x):
                if is_container(item) or self.is_state_of_other_library(item):
                    self._read(item, source)
        elif role_of(x) in ("inner", "parts"):  # a mask of optax, for instance
            for item in items_of(x):
                self._read(item, source)
        elif jax.tree.leaves(x):
            source.other_states.append(x)

    def _expect_leaves(self, slot: Mapping[str, Any], state: Any) -> None:
        """Refuses a state whose slot has other paths or shapes than the parameters."""
        part = self.part(state)
        if part is None:
            return
        params = leaves_by_path(self.owner, part.params)
        for path in (*slot, *params):
            params_leaf, state_leaf = (
                f"of shape {list(np.shape(tree[path]))}" if path in tree else "not there"
                for tree in (params, slot)
            )
            if params_leaf != state_leaf:
                raise ValueError(
                    f"{self.owner}: the leaf {path!r} is {params_leaf} in params and {state_leaf} "
                    "in the state: pass the parameters that the state belongs to"
                )


def initial_state(owner: str, tx: Any, params: Tree) -> AdamjaxState:
    """The state of `tx.init(params)`, to be filled."""
    tx = _transform_argument(owner, tx)
    leaves_by_path(owner, params)  # refuses leaves that conversions do not accept, before `init`
    ours = AdamjaxState(owner, tx, tx.init(params), params)
    for part in ours.parts:
        for field in dataclasses.fields(part.tx) if is_of_adamjax(part.tx) else ():
            value = getattr(part.tx, field.name)
            if is_array(value):
                expect_scalar(f"{owner}: {field.name} of tx", value)
    return ours
