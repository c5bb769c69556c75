"""Takes the same steps with two optimizers, and measures how far apart their updates are."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.convert.adamjax_state import AdamjaxState
from adamjax.convert.sampling import longest_axis
from adamjax.convert.values import leaves_by_path
from adamjax.convert.widening import like_wide
from adamjax.data import Tree
from adamjax.guard import accumulate_gradients
from adamjax.leaves import dtype_of, is_left_alone
from adamjax.mesh import explicit_sharding, reshard
from adamjax.paths import flatten, leaf_paths
from adamjax.structure import Part, rule_slots, slot_states

__all__ = ["NO_WEIGHTS", "OWN_WEIGHTS", "WEIGHTS", "Differences", "PairedSteps", "Step"]

# The sizes of weights in steps that are compared. A weight decay shows at large weights, and the
# rest at small ones. Their signs differ, because a leaf of few elements may have weights of one
# sign.
WEIGHTS = (1e3, -1e-2)
# Where a decay before the rule would hide small gradients.
NO_WEIGHTS = 0.0
# Stands for the parameters themselves in place of weights of one size.
OWN_WEIGHTS = None
# How many arrays of random numbers a leaf has. Drawing new ones for each step would take longer
# than the step.
_POOL = 3
# In the last of these arrays, how often an element is an outlier, and how much larger it is.
_OUTLIERS, _OUTLIER_SIZE = 0.02, 20.0
# The sizes of micro-batches, and that of the one in which some elements have the other sign. It is
# so small that no sum of micro-batches is a difference, which rounding would make inaccurate.
_MICRO_BATCHES, _OTHER_SIGNS = (0.3, 1.0, 3.0), 0.03


class _Random(NamedTuple):
    """Random numbers like the leaves, of about 1. The gradients of a step are multiples of them.

    Attributes:
      usual: the numbers.
      varied: numbers of the same signs and other sizes, for some of a step's micro-batches.
      mixed: numbers of which some have the other sign, for another micro-batch.
    """

    usual: list[Any]
    varied: list[Any]
    mixed: list[Any]


class Step(NamedTuple):
    """The gradients of a step.

    Attributes:
      sizes: their sizes, by leaf.
      as_moments: whether the elements of a leaf differ in size as its moments do. Otherwise they
        are of about one size.
      spoilt_leaf, spoilt_by: a leaf whose gradient is not finite, if any, and its value.
    """

    sizes: np.ndarray
    as_moments: bool = False
    spoilt_leaf: int | None = None
    spoilt_by: float = math.nan


class Differences(NamedTuple):
    """The updates of a call, compared leaf by leaf.

    Attributes:
      apart: by leaf, the largest difference of an element; infinite where one is NaN.
      largest: by leaf, the size of the largest update of optax.
      is_finite: whether all updates of optax are finite.
      is_first: by leaf, whether it has taken no step before.
      updates: pairs (update, optax' update) of leaves.
    """

    apart: np.ndarray
    largest: np.ndarray
    is_finite: bool
    is_first: np.ndarray
    updates: list[tuple[np.ndarray, np.ndarray]]

    def farthest(self, leaf: int) -> tuple[complex, complex]:
        """The two updates of the element of a leaf that differs most."""
        a, b = self.updates[leaf]
        with np.errstate(invalid="ignore"):  # of differences between infinities
            i = np.argmax(np.nan_to_num(np.abs(a - b), nan=np.inf))
        return a[i].item(), b[i].item()


class PairedSteps:
    """Steps of a transform of adamjax and of one of optax with the same gradients.

    Attributes:
      leaves, params, paths: the places of the leaves of floats, these leaves and their paths.
      num_elements: how many numbers they have in all.
      wide_dtypes: their dtypes, or float32 where that is wider.
      is_float16: by leaf, whether it is float16.
      calls: how many calls of `update` make a step.
      has_other_signs: whether some elements of one micro-batch have the other sign.
      calls_left: how many calls finish the step that the states are in the middle of.
      calls_to_first: by leaf, how many calls the first step from the states takes.
      usual: by leaf, the size of the gradients that its moments are of.
      rng: what all random numbers are drawn from.
      pool: some arrays of random numbers for each leaf, of about 1.
      own_weights: the parameters themselves.
      as_moments: one more such array for each leaf, whose elements differ in size as its moments
        do.
    """

    def __init__(self, ours: AdamjaxState, optimizer: Any, widens: bool = False) -> None:
        """Makes the gradients; `widens` is whether to apply `like_wide` to the optimizer."""
        self.ours, self.widens = ours, widens
        params, self.treedef = flatten(ours.params)
        self.leaves = [i for i, p in enumerate(params) if p is not None and not is_left_alone(p)]
        self.params = [params[i] for i in self.leaves]
        self.paths = [leaf_paths(ours.params)[i] for i in self.leaves]
        self.num_elements = max(1, sum(map(np.size, self.params)))
        self.wide_dtypes = [
            np.dtype(jnp.promote_types(dtype_of(p), jnp.float32)) for p in self.params
        ]
        self.is_float16 = np.array([dtype_of(p) == jnp.float16 for p in self.params], bool)
        self.calls = _calls_of_a_step(ours, self.paths)
        phases = _phases(ours, self.paths)
        self.calls_to_first = np.array([steps - micro for steps, micro in phases], int)
        self.calls_left = _calls_left(phases, self.calls)
        self.has_other_signs = all(steps != 2 for steps, _ in phases)
        self.rng = np.random.default_rng(0)
        self.pool = [self._drawn(i == _POOL - 1) for i in range(_POOL)]
        self.next_of_pool = itertools.cycle(range(_POOL))
        sizes = _sizes_of_gradients(ours.state)
        of_leaves = {path: _root_mean_square(x) for path, x in sizes.items()}
        known = {path: size for path, size in of_leaves.items() if 1e-15 < size < 1e15}
        others = max(known.values(), default=1.0)
        self.usual = np.array([known.get(path, others) for path in self.paths])
        self.own_weights = [
            jnp.asarray(p, wide) for p, wide in zip(self.params, self.wide_dtypes, strict=True)
        ]
        self.as_moments = list(self.pool[0].usual)
        for i, path in enumerate(self.paths):
            if path in known and not self.is_float16[i]:
                relative = jnp.asarray(sizes[path] / known[path], dtype_of(self.as_moments[i]))
                self.as_moments[i] = self.as_moments[i] * relative
        update = like_wide(optimizer.update) if widens else optimizer.update
        self._call = jax.jit(lambda *args: self._both_updates(ours, update, *args))

    def leaves_of(self, part: Part) -> np.ndarray:
        """By leaf, whether a part of the transform sees it."""
        leaves = leaves_by_path(self.ours.owner, part.params)
        return np.array([path in leaves for path in self.paths], bool)

    def _drawn(self, has_outliers: bool) -> _Random:
        """Draws random numbers."""
        drawn = _Random([], [], [])
        for p, wide in zip(self.params, self.wide_dtypes, strict=True):
            shape, is_float16 = np.shape(p), dtype_of(p) == jnp.float16
            signs = self.rng.choice([-1, 1], shape)
            if is_float16:
                # optax computes in float16, where small means of micro-batches are inaccurate.
                signs = np.where(np.arange(np.size(p)) % 2, 1, -1).reshape(shape)
            sizes = self.rng.uniform(0.5, 1.5, shape)
            if has_outliers and not is_float16:
                sizes *= np.where(self.rng.random(shape) < _OUTLIERS, _OUTLIER_SIZE, 1.0)
            usual = varied = mixed = _like(p, sizes * signs, wide)
            if self.calls > 1 and not is_float16:
                other_sizes = self.rng.uniform(0.5, 1.5, shape) * signs
                varied = _like(p, other_sizes, wide)
                mixed = _like(p, other_sizes * self.rng.choice([-1, 1], shape), wide)
            for arrays, x in zip(drawn, (usual, varied, mixed), strict=True):
                arrays.append(x)
        return drawn

    def take(
        self, states: tuple[Any, Any], size: float | None, steps: Sequence[Step]
    ) -> Iterator[tuple[int, Differences]]:
        """Takes steps from states of both, with weights of one size, or with `OWN_WEIGHTS`.

        It yields each call's step, as a number, and its updates.
        """
        if size is OWN_WEIGHTS:
            own, weight_sizes = self.own_weights, np.ones(len(self.leaves))
        else:
            own = self.pool[0].usual
            weight_sizes = self._clipped(np.full(len(self.leaves), size))
        num_calls = 0
        for number, step in enumerate(steps):
            # The first step ends with a whole one. Otherwise the gradients of each step would be
            # added to those of the next one, and small ones would not show.
            left = self.calls_left * (number == 0)
            for call, (part, grads) in enumerate(self._micro_batches(step, left)):
                sizes = part * step.sizes
                if call == 0 and step.spoilt_leaf is not None:
                    sizes[step.spoilt_leaf] = step.spoilt_by
                both_sizes = self._clipped(sizes), weight_sizes
                states, updates = self._next(states, (grads, own), both_sizes)
                yield (
                    number,
                    _differences(updates, self.wide_dtypes, num_calls < self.calls_to_first),
                )
                num_calls += 1

    def _micro_batches(self, step: Step, left: int) -> Iterator[tuple[float, list[Any]]]:
        """The gradients of the calls of a step, each with its size relative to the others.

        Micro-batches have different sizes and directions, so it shows whether each of them is
        clipped or normalized, or their mean.

        Args:
          left: how many calls come before those of the step, to finish another.
        """
        drawn = self.pool[next(self.next_of_pool)]
        if self.calls == 1:
            yield 1.0, self.as_moments if step.as_moments else drawn.usual
            return
        # If something makes two micro-batches equally large, elements of different signs would
        # cancel, and their rounding errors be normalized.
        with_other_signs = left + self.rng.integers(self.calls) if self.has_other_signs else None
        for call in range(left + self.calls):
            part = float(self.rng.choice(_MICRO_BATCHES))
            if step.as_moments:
                yield part, self.as_moments
            elif call == with_other_signs:
                yield _OTHER_SIGNS, drawn.mixed
            else:
                yield part, drawn.varied if call % 2 else drawn.usual

    def whole_call(self, ours: AdamjaxState, optimizer: Any) -> Any:
        """A function like `_call` for the whole model, if the present states are a sample of it.

        Its first argument is whether it returns the new states. It makes the gradients itself, from
        those of the sample. It returns by leaf the largest difference of an element, infinite where
        one is NaN, and the largest update of optax. So few arrays as large as the model are stored.
        """
        update = like_wide(optimizer.update) if self.widens else optimizer.update

        def call(keeps_states: bool, states: Any, pools: Any, sizes: Any) -> Any:
            states, moves = self._both_updates(ours, update, states, pools, sizes)
            apart, largest = [], []
            for (a, b), wide in zip(moves, self.wide_dtypes, strict=True):
                if a is None or b is None:
                    a = b = jnp.zeros(1)
                a, b = a.astype(wide), b.astype(wide)
                difference = jnp.abs(a - b)
                difference = jnp.where(jnp.isnan(difference), jnp.inf, difference)
                apart.append(jnp.max(difference, initial=0))
                largest.append(jnp.max(jnp.abs(b), initial=0))
            return states if keeps_states else None, (apart, largest)

        return jax.jit(call, static_argnums=0)

    def take_whole(
        self, call: Any, states: tuple[Any, Any], size: float
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Takes a step of the whole model with weights of one size.

        It yields each call's largest differences and updates.

        Args:
          call: the result of `whole_call`.
        """
        sizes = self._clipped(self.usual), self._clipped(np.full(len(self.leaves), size))
        for left in reversed(range(self.calls + self.calls_left)):
            pools = self.pool[next(self.next_of_pool)].usual, self.pool[0].usual
            # After the last call, states as large as the model are not needed.
            states, (apart, largest) = call(left > 0, states, pools, sizes)
            yield np.array(apart, np.float64), np.array(largest, np.float64)

    def _clipped(self, sizes: np.ndarray) -> np.ndarray:
        """Sizes by leaf, within the range of float16 for such leaves."""
        # In float16, larger squares overflow in optax, and those of smaller numbers are inaccurate.
        is_clipped = self.is_float16 & np.isfinite(sizes) & (sizes != 0)
        return np.where(is_clipped, np.clip(sizes, 0.3, 1.0), sizes)

    def _next(self, states: Any, pools: Any, sizes: Any) -> tuple[Any, Any]:
        """The next states of both, and their updates by leaf.

        Args:
          pools, sizes: random numbers and their sizes, of gradients and of weights.
        """
        owner = self.ours.owner
        try:
            return self._call(states, pools, sizes)
        except jax.errors.ConcretizationTypeError as error:
            raise TypeError(
                f"{owner}: steps cannot be compared, because an update cannot be compiled by "
                f"jax.jit ({str(error).splitlines()[0]}): write schedules with jax.numpy, or "
                "compare the hyperparameters yourself, and pass check=False"
            ) from error
        except TypeError as error:
            if "argument" not in str(error):
                raise
            raise TypeError(
                f"{owner}: steps cannot be compared, because an update needs more than gradients, "
                f"state and parameters ({error}): compare the hyperparameters yourself, and pass "
                "check=False"
            ) from error

    def _both_updates(
        self, ours: AdamjaxState, update: Any, states: Any, pools: Any, sizes: Any
    ) -> tuple[Any, Any]:
        grads, weights = (self._tree(ours.params, *pair) for pair in zip(pools, sizes, strict=True))
        move, one = ours.tx.update(grads, states[0], weights)
        other_move, other = update(grads, states[1], weights)
        moves = ([flatten(tree)[0][i] for i in self.leaves] for tree in (move, other_move))
        return (one, other), list(zip(*moves, strict=True))

    def _tree(self, params: Tree, pool: list[Any], sizes: Any) -> Tree:
        """A tree like the parameters, of random numbers of these sizes.

        The numbers are repeated along the axis that is sampled, if these are not the parameters of
        the sample.
        """
        new, _ = flatten(params)
        for i, place in enumerate(self.leaves):
            x, p = pool[i], new[place]
            if np.shape(x) != np.shape(p):
                axis = longest_axis(np.shape(p))
                x = jnp.take(x, jnp.arange(np.shape(p)[axis]) % x.shape[axis], axis)
            x = (x * sizes[i]).astype(dtype_of(p))
            sharding = explicit_sharding(p)
            new[place] = x if sharding is None else reshard(x, sharding, p)
        return self.treedef.unflatten(new)


def _like(p: Any, x: np.ndarray, dtype: Any) -> jax.Array:
    """Random numbers as an array like a leaf, where the leaf is."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        # Equal signs of two arrays are then equal in their imaginary parts too.
        x = x + 1j * np.roll(x.reshape(-1), 1).reshape(x.shape)
    array = jnp.asarray(x, dtype)
    # An array that is put somewhere stays there, and so do results of it. So `_call` would be
    # compiled twice.
    is_elsewhere = isinstance(p, jax.Array) and p.sharding != array.sharding
    return jax.device_put(array, p.sharding) if is_elsewhere else array


def _differences(
    updates: Sequence[tuple[Any, Any]], wide_dtypes: Sequence[Any], is_first: np.ndarray
) -> Differences:
    """Compares pairs of updates.

    This is NumPy's work. As a part of the program with the updates, it would take longer to compile
    than all the rest, for a model of many leaves.
    """
    pairs = []
    for (a, b), wide in zip(updates, wide_dtypes, strict=True):
        if a is None or b is None or b.size == 0:
            pairs.append((np.zeros(1, wide), np.zeros(1, wide)))
        else:
            vectors = (np.asarray(x).astype(wide, copy=False).reshape(-1) for x in (a, b))
            pairs.append((next(vectors), next(vectors)))
    starts = np.cumsum([0, *(x.size for x, _ in pairs[:-1])])
    a, b = (np.concatenate(one) for one in zip(*pairs, strict=True))
    with np.errstate(invalid="ignore", over="ignore"):  # of differences between infinities
        apart = np.abs(a - b)
    apart[np.isnan(apart)] = np.inf
    return Differences(
        np.maximum.reduceat(apart, starts),
        np.maximum.reduceat(np.abs(b), starts),
        bool(np.all(np.isfinite(b))),
        is_first,
        pairs,
    )


def _calls_of_a_step(ours: AdamjaxState, paths: Sequence[str]) -> int:
    """After how many calls of `update` all leaves have taken whole steps."""
    return math.lcm(*(_steps_of(ours, path) for path in paths))


def _steps_of(ours: AdamjaxState, path: str) -> int:
    """How many calls make a step of a leaf."""
    return math.prod(steps for steps, leaves in ours.accumulations if path in leaves)


def _phases(ours: AdamjaxState, paths: Sequence[str]) -> list[tuple[int, int]]:
    """For each leaf, how many calls make a step, and how many came after the last one."""
    micro: dict[str, int] = {}
    for part in ours.parts:
        if isinstance(part.tx, accumulate_gradients):
            # Of two accumulations, one inside the other, both have just taken a step.
            leaves = leaves_by_path(ours.owner, part.params)
            micro |= dict.fromkeys(leaves, int(part.state.micro_count))
    return [(_steps_of(ours, path), micro.get(path, 0)) for path in paths]


def _calls_left(phases: Sequence[tuple[int, int]], calls: int) -> int:
    """How many calls of `update` finish the present steps of all leaves; 0 if no number does."""
    different = set(phases)
    for left in range(calls):
        if all((micro + left) % steps == 0 for steps, micro in different):
            return left
    return 0


def _sizes_of_gradients(state: Any) -> dict[str, np.ndarray]:
    """By path, the sizes of the gradients that the moments of a state are of, element by element.

    The divisor shows them: v as squares, and Adamax' u as they are.
    """
    sizes: dict[str, np.ndarray] = {}
    for x in slot_states(state):
        for slot, power in (("v", 0.5), ("u", 1)):
            if slot in rule_slots(x):
                for path, array in leaves_by_path("", getattr(x, slot)).items():
                    own = np.abs(np.asarray(array, np.float64)) ** power
                    # A leaf may go through several rules.
                    sizes[path] = np.maximum(own, sizes.get(path, own))
    return sizes


def _root_mean_square(x: np.ndarray) -> float:
    return math.sqrt(np.mean(np.square(x))) if x.size else 0.0
