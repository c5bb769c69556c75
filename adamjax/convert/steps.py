"""Compares the steps of two optimizers from the same states."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

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
    names_of_counts,
    new_rule,
    rule_as_it_is,
)
from adamjax.convert.optax_state import read_state
from adamjax.convert.schedules import has_schedule, later_counts
from adamjax.convert.values import leaves_by_path
from adamjax.data import Tree
from adamjax.leaves import dtype_of, is_left_alone
from adamjax.paths import flatten, leaf_paths
from adamjax.scaling import ScheduleState
from adamjax.schedule import by_path
from adamjax.structure import rule_slots, slot_states, states_of_class

__all__ = ["expect_made_by", "expect_optimizer", "expect_same_steps"]

# The sizes of gradients in the steps of each comparison, relative to those that the moments are of.
# A clip shows where they are large, and an epsilon where they are small.
_SIZES = ((1.0, 30.0, 1e3, 0.1, 1.0, 1e-3), (10.0, 1.0, 0.3))
# In the first steps of a run, sizes are absolute.
_FIRST_SIZES = (*_SIZES, (1e-8, 3e-8, 1e-8), (1e-12,), (1e-15,))
# At each later count, some sizes, the last relative to others.
_LATER_SIZES = (1.0, 1e3, 1e-3, 1.0)
# A weight decay shows at large weights, and the rest at small ones.
_WEIGHTS = (1e3, 1e-2)
# How much larger the gradients of one leaf are than those of others, where its part in a norm is
# compared; and how many leaves are tried so, or with a NaN.
_LARGE_LEAF, _MOST_LEAVES, _FEWEST_LEAVES = 1e4, 16, 2
# How many arrays of random numbers a leaf has. Drawing new ones for each step would take longer
# than the step.
_POOL = 3
# How far two updates of a leaf may be apart, as a part of the largest. float32 and float64 round
# off less. adamjax rounds narrow moments at random. optax computes in the dtype of narrow
# parameters, also the norm that scales the leaves beside them.
_RTOL, _RTOL64 = 3e-4, 1e-5
_NARROW_RTOL, _NARROW_OPTAX_RTOL, _BESIDE_NARROW_RTOL = 0.03, 0.1, 0.01
# And as a part of the leaf's largest update in any step: a schedule rounds off as much at its end.
_ROUNDING = 1e-6
# Later counts are compared one by one until the first of these, then in steps of 3% until the
# second, and then at powers of two and near the ends of schedules until the last.
_EACH, _CLOSE, _LAST = 500, 1 << 20, 1 << 24
# At how many later counts steps are compared, and how many elements may be updated there in all. A
# large model, or one with many micro-batches, is compared at fewer.
_MOST_COUNTS, _FEWEST_COUNTS, _MOST_ELEMENTS = 400, 12, 1 << 29


def expect_same_steps(ours: AdamjaxState, optimizer: Any, state: Any, rtol: float) -> None:
    """Refuses a transform that does not move weights as optax' optimizer does.

    Both take steps from the states of the conversion, some with rules that have taken no step or
    many, and then at many later counts of their schedules. The gradients are random, of many sizes,
    also in a single leaf, and in some steps one leaf is not finite. Where optax' rule has another
    form, as AMSGrad's, all steps go on from the rules of the conversion.

    Args:
      ours: the state of adamjax, with its transform.
      optimizer, state: the transform of optax, and its state.
      rtol: as for `from_optax`.
    """
    with jax.debug_nans(False):
        _Comparison(ours, optimizer, state, rtol).compare()


class _Step(NamedTuple):
    """The gradients of a step: their size by leaf, and the leaf that is not finite, if any."""

    sizes: np.ndarray
    spoilt_leaf: int | None = None
    spoilt_by: float = math.nan


class _Comparison:
    """Steps of both optimizers with the same gradients.

    Attributes:
      ours, state: the states of both.
      source: what the state of optax contains.
      fresh: what `init` returns, of both.
      has_same_form: whether optax has the formulas of adamjax, as for Adam but not for AMSGrad.
      calls: how many calls a step takes.
      leaves, params, paths: the places of the leaves of floats, these leaves and their paths.
      num_elements: how many numbers they have in all.
      pool: some arrays of random numbers for each of them.
      usual: by leaf, the size of the gradients that its moments are of.
      rtol: by leaf, how far its updates may be apart.
      largest: by the size of weights and by leaf, optax' largest update so far.
      has_moved: by leaf, whether optax has moved it in a step so far.
    """

    def __init__(self, ours: AdamjaxState, optimizer: Any, state: Any, rtol: float) -> None:
        self.owner, self.ours, self.state = ours.owner, ours, state
        self.source = read_state(ours.owner, state)
        self.has_same_form = set(ours.kinds) <= {"adam"}
        self.calls = math.prod(steps for steps, _ in ours.accumulations)
        params, self.treedef = flatten(ours.params)
        self.leaves = [i for i, p in enumerate(params) if p is not None and not is_left_alone(p)]
        self.params = [params[i] for i in self.leaves]
        self.paths = [leaf_paths(ours.params)[i] for i in self.leaves]
        self.usual = _usual_gradients(ours.state, self.paths)
        self.rtol = self._tolerances(rtol)
        self.largest = {size: np.zeros(len(self.leaves)) for size in _WEIGHTS}
        self.has_moved = np.zeros(len(self.leaves), bool)
        self.rng = np.random.default_rng(0)
        self.num_elements = max(1, sum(map(np.size, self.params)))
        self.pool = [self._drawn() for _ in range(_POOL)]
        self.next_of_pool = itertools.cycle(range(_POOL))
        self.fresh = ours.tx.init(ours.params), optimizer.init(ours.params)
        self._call = jax.jit(lambda *args: self._compared_call(ours.tx, optimizer, *args))
        self._advance = jax.jit(self._advanced)

    def _tolerances(self, rtol: float) -> np.ndarray:
        """How far the updates of each leaf may be apart; see `rtol`."""
        # Adam has the same form in optax.
        least = 0.0 if self.has_same_form else rtol
        slots = _narrow_leaves(self.ours.state)
        for path, moments in self.source.moments.items():
            if any(_is_narrow(x) for one in moments for x in (one.slots or {}).values()):
                slots.add(path)
        are_narrow = [_is_narrow(p) for p in self.params]
        beside = _BESIDE_NARROW_RTOL if any(are_narrow) or slots else 0.0
        of_leaf = []
        for path, p, is_narrow in zip(self.paths, self.params, are_narrow, strict=True):
            usual = _RTOL64 if jnp.finfo(dtype_of(p)).nmant > 50 else _RTOL
            narrow = max(_NARROW_RTOL * (path in slots), _NARROW_OPTAX_RTOL * is_narrow)
            of_leaf.append(max(least, usual, beside, narrow))
        ulps = [2 * float(jnp.finfo(dtype_of(p)).eps) for p in self.params]
        return np.maximum(of_leaf, ulps)

    # --- what is compared -------------------------------------------------------------------------

    def compare(self) -> None:
        if not self.leaves:
            return
        self._measure_past_steps()
        self._compare_at(0, "these states")
        counts = list(self._later_counts())
        unmoved = ~self.has_moved
        for start, steps in counts:
            before = self.has_moved.copy()
            size = _WEIGHTS[steps % 2]
            self._expect_same(start, self._states(steps, rule_as_it_is), size, self._later_steps())
            if np.any(unmoved & self.has_moved & ~before):
                # The rate was 0 before, and hid everything else of these leaves.
                self._compare_at(steps, start)

    def _compare_at(self, steps: int, start: str) -> None:
        """Compares many steps of the states when the schedules are this number of steps later."""
        states = self._states(steps, rule_as_it_is)
        for size in _WEIGHTS:
            for steps_taken in self._all_steps(self.usual, _SIZES):
                self._expect_same(start, states, size, steps_taken)
            if self.has_same_form:
                first = self._states(steps, new_rule)
                ones = np.ones(len(self.leaves))
                for steps_taken in self._all_steps(ones, _FIRST_SIZES):
                    self._expect_same(f"the first step at {start}", first, size, steps_taken)
                late = self._states(steps, late_rule)
                self._expect_same(f"a late step at {start}", late, size, [_Step(1e3 * self.usual)])
        for leaf, value in itertools.product(self._some_leaves(), (math.nan, math.inf)):
            not_finite = [_Step(self.usual), _Step(self.usual, leaf, value), _Step(self.usual)]
            self._expect_same(start, states, _WEIGHTS[1], not_finite)

    def _all_steps(
        self, base: np.ndarray, sizes: Sequence[Sequence[float]]
    ) -> Iterator[list[_Step]]:
        """Sequences of steps: with gradients of several sizes, and with single large leaves."""
        for of_steps in sizes:
            yield [_Step(base * size) for size in of_steps]
        yield [_Step(base * 10 ** self.rng.uniform(-2, 2, len(base))) for _ in range(3)]
        if len(base) > 1:
            for leaf in self._some_leaves():
                large = base.copy()
                large[leaf] *= _LARGE_LEAF
                yield [_Step(large), _Step(base)]

    def _later_steps(self) -> list[_Step]:
        steps = [_Step(self.usual * size) for size in _LATER_SIZES]
        steps.append(_Step(self.usual * 10 ** self.rng.uniform(-2, 2, len(self.usual))))
        return steps

    def _some_leaves(self) -> list[int]:
        """All leaves, or some of very many."""
        places = range(len(self.leaves))
        most = min(_MOST_LEAVES, (_MOST_ELEMENTS >> 5) // self.num_elements) // self.calls
        most = max(most, _FEWEST_LEAVES)
        if len(places) <= most:
            return list(places)
        return sorted(self.rng.choice(len(places), most, replace=False).tolist())

    def _later_counts(self) -> Iterator[tuple[str, int]]:
        """Later counts at which steps are compared, each with the number of steps until then."""
        ours = {int(x.count) for x in states_of_class(ScheduleState, self.ours.state)}
        schedules = [part.tx for part in self.ours.parts if has_schedule(part.tx)]
        # Transforms that conversions do not know may follow a count of their own.
        others = any(map(names_of_counts, self.source.other_states))
        if not (schedules or self.source.counts or self.source.accumulated or others):
            return
        now = ours | {count.value for count in self.source.counts} or {0}
        ends = {end for count in now for end in later_counts(count, self.ours.tx)}
        steps = {end - count - 2 for end in ends for count in now}
        each = len(_LATER_SIZES) + 1  # so many counts are passed by the steps from one start
        steps |= set(range(each, _EACH, each))
        steps |= {int(_EACH * 1.03**i) for i in range(int(math.log(_CLOSE / _EACH) / 0.03))}
        chosen = sorted(x for x in steps if 0 < x <= _LAST)
        updated = each * self.calls * self.num_elements
        most = min(_MOST_COUNTS // self.calls, _MOST_ELEMENTS // updated)
        most = max(most, _FEWEST_COUNTS)
        for one in chosen[:: -(-len(chosen) // most)]:
            counts = [one + count for count in now]
            last = (one + each) * self.calls + max(now)
            if not any(_is_negative(tx, x) for tx in schedules for x in (*counts, last)):
                yield f"count {min(counts)}", one

    # --- states and gradients ---------------------------------------------------------------------

    def _states(self, steps: int, rule: MakeRule) -> tuple[Any, Any]:
        """The states of both with schedules so many steps later, and with other rules."""
        states = self.ours.state, self.state
        if steps:
            states = self._advance(states, self.fresh, jnp.int32(steps))
        if rule is rule_as_it_is:
            return states
        how = Advance(0, self.calls, rule)
        ours = self.ours.with_state(states[0])
        return (
            advanced_adamjax(ours, states[0], self.fresh[0], how),
            advanced_optax(states[1], self.fresh[1], how),
        )

    def _advanced(self, states: Any, fresh: Any, steps: Any) -> Any:
        ours, how = self.ours.with_state(states[0]), Advance(steps, self.calls, rule_as_it_is)
        return (
            advanced_adamjax(ours, states[0], fresh[0], how),
            advanced_optax(states[1], fresh[1], how),
        )

    def _drawn(self) -> list[Any]:
        """Random numbers like the leaves, of about 1."""
        drawn = []
        for p in self.params:
            signs = self.rng.choice([-1, 1], np.shape(p))
            if dtype_of(p) == jnp.float16:
                # optax computes in float16, where small means of micro-batches are inaccurate.
                signs = np.where(np.arange(np.size(p)) % 2, 1, -1).reshape(np.shape(p))
            x = self.rng.uniform(0.5, 1.5, np.shape(p)) * signs
            if jnp.issubdtype(dtype_of(p), jnp.complexfloating):
                x = x + 1j * self.rng.permutation(x.reshape(-1)).reshape(x.shape)
            x = jnp.asarray(x, jnp.promote_types(dtype_of(p), jnp.float32))
            drawn.append(jax.device_put(x, p.sharding) if isinstance(p, jax.Array) else x)
        return drawn

    def _sizes(self, sizes: np.ndarray) -> np.ndarray:
        """The factors of random numbers by leaf."""
        is_float16 = np.array([dtype_of(p) == jnp.float16 for p in self.params], bool)
        # In float16, larger squares overflow in optax, and those of smaller numbers are inaccurate.
        return np.where(is_float16 & np.isfinite(sizes), np.clip(sizes, 0.3, 1.0), sizes)

    def _tree(self, pool: list[Any], sizes: Any) -> Tree:
        """A tree like the parameters, of random numbers of these sizes."""
        new, _ = flatten(self.ours.params)
        for i, place in enumerate(self.leaves):
            new[place] = (pool[i] * sizes[i]).astype(dtype_of(self.params[i]))
        return self.treedef.unflatten(new)

    # --- steps ------------------------------------------------------------------------------------

    def _compared_call(
        self, tx: Any, optimizer: Any, states: Any, pools: Any, sizes: Any
    ) -> tuple[Any, Any]:
        """The next states of both, and figures by leaf.

        These are the largest difference of an element, the largest update of optax, the two updates
        of the element that differs most, and whether those of optax are finite.
        """
        grads, weights = (self._tree(*pair) for pair in zip(pools, sizes, strict=True))
        move, one = tx.update(grads, states[0], weights)
        other_move, other = optimizer.update(grads, states[1], weights)
        figures = []
        for place in self.leaves:
            a, b = (flatten(tree)[0][place] for tree in (move, other_move))
            if a is None or b is None or not np.size(b):
                a = b = jnp.zeros(1)
            wide = jnp.promote_types(dtype_of(b), jnp.float32)
            a, b = (x.astype(wide) for x in (a, b))
            apart = jnp.where(jnp.isnan(a - b), jnp.inf, jnp.abs(a - b))
            is_farthest = apart == jnp.max(apart)
            farthest = (jnp.max(jnp.where(is_farthest, x.real, -jnp.inf)) for x in (a, b))
            largest, is_finite = jnp.max(jnp.abs(b)), jnp.all(jnp.isfinite(b))
            figures.append((jnp.max(apart), largest, *farthest, is_finite))
        return (one, other), [jnp.stack(column) for column in zip(*figures, strict=True)]

    def _taken(
        self, states: tuple[Any, Any], size: float, steps: Sequence[_Step]
    ) -> Iterator[tuple[int, Any]]:
        """The figures of each call of these steps."""
        weights = self._sizes(np.full(len(self.leaves), size))
        for i, step in enumerate(steps):
            # All micro-batches have the same signs, so that their mean is not a difference. They
            # have other sizes, so that it shows whether each is clipped.
            pools = self.pool[next(self.next_of_pool)], self.pool[0]
            for call in range(self.calls):
                part = self.rng.choice([0.3, 1.0, 3.0]) if self.calls > 1 else 1.0
                sizes = part * step.sizes
                if call == 0 and step.spoilt_leaf is not None:
                    sizes[step.spoilt_leaf] = step.spoilt_by
                states, figures = self._next(states, pools, (self._sizes(sizes), weights))
                yield i, [np.asarray(x) for x in figures]

    def _next(self, states: Any, pools: Any, sizes: Any) -> Any:
        """The next states of both and the figures; pools and sizes of gradients and of weights."""
        try:
            return self._call(states, pools, sizes)
        except jax.errors.ConcretizationTypeError as error:
            raise TypeError(
                f"{self.owner}: steps cannot be compared, because an update cannot be compiled by "
                f"jax.jit ({str(error).splitlines()[0]}): write schedules with jax.numpy, or "
                "compare the hyperparameters yourself, and pass check=False"
            ) from error
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise TypeError(
                f"{self.owner}: steps cannot be compared, because an update needs more than "
                f"gradients, state and parameters ({error}): compare the hyperparameters "
                "yourself, and pass check=False"
            ) from error

    def _measure_past_steps(self) -> None:
        """Measures optax' largest updates in the past, before a rate has fallen."""
        now = max([0, *(count.value for count in self.source.counts)])
        for steps in sorted({now * i // 16 for i in (0, 1, 2, 4, 8, 12)}):
            states = self._advance(self.fresh, self.fresh, jnp.int32(steps))
            for size in _WEIGHTS:
                for _, figures in self._taken(states, size, [_Step(np.ones(len(self.leaves)))]):
                    self.largest[size] = np.fmax(self.largest[size], figures[1])

    def _expect_same(
        self, start: str, states: tuple[Any, Any], size: float, steps: Sequence[_Step]
    ) -> None:
        """Takes steps with weights of one size, and refuses updates that are apart."""
        for i, (apart, largest, a, b, is_finite) in self._taken(states, size, steps):
            if not np.all(is_finite):
                return  # This ends the run in optax. A transform may skip the step.
            self.has_moved |= largest > 0
            self.largest[size] = np.maximum(self.largest[size], largest)
            is_close = apart <= self.rtol * largest + _ROUNDING * self.largest[size]
            if not np.all(is_close):  # or NaN
                leaf = int(np.argmin(is_close))
                raise ValueError(
                    f"{self.owner}: in step {i + 1} from {start} on, tx moves an element of "
                    f"{self.paths[leaf]!r} by {a[leaf]:.6g}, and the optimizer of optax by "
                    f"{b[leaf]:.6g}: compare their clips, rules, epsilons, weight decays with "
                    "their masks, rates, schedules, dtypes and numbers of micro-batches (and "
                    "freeze leaves with set_to_zero: 0 times NaN is NaN)"
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


def _usual_gradients(state: Any, paths: Sequence[str]) -> np.ndarray:
    """By leaf, the size of the gradients that its moments are of; 1 if no leaf has moments."""
    sizes: dict[str, float] = {}
    for x in slot_states(state):
        for slot, power in (("v", 1), ("u", 2)):
            if slot in rule_slots(x):
                for path, array in leaves_by_path("", getattr(x, slot)).items():
                    squares = np.asarray(array, np.float64) ** power
                    size = math.sqrt(np.mean(squares)) if squares.size else 0.0
                    if 1e-15 < size < 1e15:
                        sizes[path] = max(size, sizes.get(path, 0.0))
    others = max(sizes.values(), default=1.0)
    return np.array([sizes.get(path, others) for path in paths])


def _is_narrow(x: Any) -> bool:
    """Whether an array has floats of fewer than 32 bits."""
    dtype = dtype_of(x)
    return bool(jnp.issubdtype(dtype, jnp.floating)) and dtype.itemsize < 4


def _narrow_leaves(state: Any) -> set[str]:
    """The paths of the leaves with narrow slots in a state of adamjax."""
    trees = [getattr(x, name) for x in slot_states(state) for name in rule_slots(x)]
    slots = [pair for tree in trees for pair in leaves_by_path("", tree).items()]
    return {path for path, x in slots if _is_narrow(x)}
