"""Takes the same steps with two optimizers, and measures how far apart their updates are."""

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._compat import ClosedJaxpr
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

__all__ = ["OWN_WEIGHTS", "WEIGHT_SIZES", "ZERO_WEIGHTS", "Differences", "PairedSteps", "Step"]

# The sizes of weights in steps that are compared. Large weights show a weight decay, and small ones
# everything else. The two have different signs, because all random numbers of a small leaf may have
# one sign.
WEIGHT_SIZES = (1e3, -1e-2)
# For small gradients, which a decay before the rule would hide.
ZERO_WEIGHTS = 0.0
# Stands for the parameters themselves in place of weights of one size.
OWN_WEIGHTS = None
# The number of arrays of random numbers per leaf. Steps share them, because drawing new numbers
# would take longer than a step.
_POOL = 3
# In the last of these arrays, the share of elements that are outliers, and their relative size.
_OUTLIERS, _OUTLIER_SIZE = 0.02, 20.0
# The sizes of micro-batches, and the size of the micro-batch in which some elements have the other
# sign. It is so small that the elements never cancel in a sum of micro-batches, because rounding
# would make such a sum inaccurate.
_MICRO_BATCHES, _OTHER_SIGNS = (0.3, 1.0, 3.0), 0.03


class _Random(NamedTuple):
    """Random numbers in the shapes of the leaves, of absolute values near 1.

    The gradients of a step are multiples of them.

    Attributes:
      usual: the numbers.
      varied: numbers with the signs of `usual` and other sizes, for every other micro-batch.
      mixed: numbers some of which have the other sign, for one micro-batch of a step.
    """

    usual: list[Any]
    varied: list[Any]
    mixed: list[Any]


class Step(NamedTuple):
    """The gradients of a step.

    Attributes:
      sizes: their sizes, by leaf.
      varies_like_moments: whether the elements of a leaf differ in size as its moments do.
        Otherwise they all have about one size.
      nonfinite_leaf, nonfinite_value: a leaf whose gradient is not finite, if any, and its value.
    """

    sizes: np.ndarray
    varies_like_moments: bool = False
    nonfinite_leaf: int | None = None
    nonfinite_value: float = math.nan


class Differences(NamedTuple):
    """The updates of a call, compared leaf by leaf.

    Attributes:
      largest_difference: by leaf, the largest difference of an element; infinite if it is NaN.
      largest_update: by leaf, the size of optax' largest update.
      is_finite: whether all updates of optax are finite.
      is_first: by leaf, whether the call is part of the first step from the states.
      grad_sizes: by leaf, the largest size of its gradients since the first step from the states.
      updates: pairs (update, optax' update) of leaves.
    """

    largest_difference: np.ndarray
    largest_update: np.ndarray
    is_finite: bool
    is_first: np.ndarray
    grad_sizes: np.ndarray
    updates: list[tuple[np.ndarray, np.ndarray]]

    def farthest(self, leaf: int) -> tuple[complex, complex]:
        """Both updates of the element of a leaf in which they differ most."""
        a, b = self.updates[leaf]
        with np.errstate(invalid="ignore"):  # of differences between infinities
            i = np.argmax(np.nan_to_num(np.abs(a - b), nan=np.inf))
        return a[i].item(), b[i].item()


class PairedSteps:
    """Steps of a transform of adamjax and of one of optax with the same gradients.

    Attributes:
      leaves, params, paths: the indices of the floating leaves, these leaves, and their paths.
      num_elements: the number of their elements, at least 1.
      wide_dtypes: their dtypes, or float32 for narrower ones.
      is_float16: by leaf, whether it is float16.
      most_in_float16: the largest gradients of such leaves.
      calls: how many calls of `update` make a step.
      has_other_signs: whether some elements of one micro-batch have the other sign.
      calls_left: how many calls finish the steps that the states are in the middle of; 0 if no
        number of calls finishes those of all leaves.
      calls_to_first: by leaf, after how many calls the first step from the states is finished.
      usual_sizes: by leaf, the size of past gradients, by its moments.
      rng: the generator of all random numbers.
      pool: some arrays of random numbers for each leaf, of absolute values near 1.
      own_weights: the parameters themselves.
      last_states: the states of both after the last steps; `None` if not all steps were taken.
      pool_like_moments: one more such array for each leaf, whose elements differ in size as its
        moments do.
    """

    def __init__(self, ours: AdamjaxState, optimizer: Any, widens: bool = False) -> None:
        """Draws the random numbers; `widens` is whether to apply `like_wide` to the optimizer."""
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
        # With larger gradients, their squared norm would overflow in optax' float16.
        num_float16 = sum(
            np.size(p) for p, narrow in zip(self.params, self.is_float16, strict=True) if narrow
        )
        most_norm = 150 / (max(_MICRO_BATCHES) if self.calls > 1 else 1)
        self.most_in_float16 = max(1.0, most_norm / math.sqrt(max(num_float16, 1)))
        phases = _phases(ours, self.paths)
        self.calls_to_first = np.array([steps - micro for steps, micro in phases], int)
        self.calls_left = _calls_left(phases, self.calls)
        self.has_other_signs = all(steps != 2 for steps, _ in phases)
        self.rng = np.random.default_rng(0)
        self.pool = [self._drawn(i == _POOL - 1) for i in range(_POOL)]
        self.next_of_pool = itertools.cycle(range(_POOL))
        sizes = _sizes_of_gradients(ours.state)
        means = {path: _root_mean_square(x) for path, x in sizes.items()}
        known = {path: mean for path, mean in means.items() if 1e-15 < mean < 1e15}
        default = max(known.values(), default=1.0)
        self.usual_sizes = np.array([known.get(path, default) for path in self.paths])
        self.last_states: tuple[Any, Any] | None = None
        self.own_weights = [
            jnp.asarray(p, wide) for p, wide in zip(self.params, self.wide_dtypes, strict=True)
        ]
        self.pool_like_moments = list(self.pool[0].usual)
        for i, path in enumerate(self.paths):
            if path in known and not self.is_float16[i]:
                relative = jnp.asarray(
                    sizes[path] / known[path], dtype_of(self.pool_like_moments[i])
                )
                self.pool_like_moments[i] = self.pool_like_moments[i] * relative
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
                # optax computes in float16, where small means of micro-batches are inaccurate. So
                # the signs are the same in all micro-batches.
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
        self, states: tuple[Any, Any], weight_size: float | None, steps: Sequence[Step]
    ) -> Iterator[tuple[int, Differences]]:
        """Takes steps from states of both optimizers, with weights of one size or `OWN_WEIGHTS`.

        For each call of `update`, it yields the number of the step and the compared updates.
        """
        if weight_size is OWN_WEIGHTS:
            weights, weight_sizes = self.own_weights, np.ones(len(self.leaves))
        else:
            weights = self.pool[0].usual
            weight_sizes = self._clipped(np.full(len(self.leaves), weight_size), 1.0)
        num_calls, largest_sizes = 0, np.zeros(len(self.leaves))
        self.last_states = None
        for number, step in enumerate(steps):
            # Before the first step, the unfinished step is finished. Otherwise the gradients of
            # each step would be added to those of the next one, and hide them where they are small.
            left = self.calls_left * (number == 0)
            for call, (relative_size, grads) in enumerate(self._micro_batches(step, left)):
                sizes = relative_size * step.sizes
                if call == 0 and step.nonfinite_leaf is not None:
                    sizes[step.nonfinite_leaf] = step.nonfinite_value
                both_sizes = self._clipped(sizes, self.most_in_float16), weight_sizes
                states, updates = self._next(states, (grads, weights), both_sizes)
                is_first = num_calls < self.calls_to_first
                largest_sizes = np.fmax(largest_sizes, np.abs(both_sizes[0]))
                yield number, _differences(updates, self.wide_dtypes, is_first, largest_sizes)
                num_calls += 1
        self.last_states = states

    def _micro_batches(self, step: Step, left: int) -> Iterator[tuple[float, list[Any]]]:
        """The gradients of the calls of a step, each with its size relative to the others.

        Micro-batches have different sizes and directions. This shows whether an optimizer clips or
        normalizes each micro-batch, or their mean.

        Args:
          left: how many calls come before those of the step, to finish an earlier one.
        """
        drawn = self.pool[next(self.next_of_pool)]
        if self.calls == 1:
            yield 1.0, self.pool_like_moments if step.varies_like_moments else drawn.usual
            return
        # In one micro-batch, some elements have the other sign. If there were only two, and an
        # optimizer made both equally large, these elements would cancel but for rounding errors.
        with_other_signs = left + self.rng.integers(self.calls) if self.has_other_signs else None
        for call in range(left + self.calls):
            relative_size = float(self.rng.choice(_MICRO_BATCHES))
            if step.varies_like_moments:
                yield relative_size, self.pool_like_moments
            elif call == with_other_signs:
                yield _OTHER_SIGNS, drawn.mixed
            else:
                yield relative_size, drawn.varied if call % 2 else drawn.usual

    def program(self, states: tuple[Any, Any]) -> ClosedJaxpr:
        """The program of a call, which contains those of both updates."""
        pools, sizes = self.pool[0].usual, np.ones(len(self.leaves))
        program: ClosedJaxpr = self._call.trace(states, (pools, pools), (sizes, sizes)).jaxpr
        return program

    def whole_call(self, ours: AdamjaxState, optimizer: Any) -> Any:
        """A function like `_call` for the whole model, if the present states are a sample of it.

        To store few arrays as large as the model, it makes the gradients itself, from those of the
        sample, and returns only the largest differences and updates, as in `Differences`. If its
        first argument is true, it also returns the new states.
        """
        update = like_wide(optimizer.update) if self.widens else optimizer.update

        def call(keeps_states: bool, states: Any, pools: Any, sizes: Any) -> Any:
            states, updates = self._both_updates(ours, update, states, pools, sizes)
            differences, largest = [], []
            for (a, b), wide in zip(updates, self.wide_dtypes, strict=True):
                if a is None or b is None:
                    a = b = jnp.zeros(1)
                a, b = a.astype(wide), b.astype(wide)
                difference = jnp.abs(a - b)
                difference = jnp.where(jnp.isnan(difference), jnp.inf, difference)
                differences.append(jnp.max(difference, initial=0))
                largest.append(jnp.max(jnp.abs(b), initial=0))
            return states if keeps_states else None, (differences, largest)

        return jax.jit(call, static_argnums=0)

    def take_whole(
        self, call: Any, states: tuple[Any, Any], weight_size: float, grad_sizes: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Takes a step of the whole model with weights of one size.

        It yields the largest differences and updates of each call, by leaf.

        Args:
          call: the result of `whole_call`.
          grad_sizes: the sizes of the gradients, by leaf.
        """
        sizes = (
            self._clipped(grad_sizes, self.most_in_float16),
            self._clipped(np.full(len(self.leaves), weight_size), 1.0),
        )
        for left in reversed(range(self.calls + self.calls_left)):
            pools = self.pool[next(self.next_of_pool)].usual, self.pool[0].usual
            # After the last call, states as large as the model are not needed.
            states, (differences, largest) = call(left > 0, states, pools, sizes)
            yield np.array(differences, np.float64), np.array(largest, np.float64)

    def _clipped(self, sizes: np.ndarray, most: float) -> np.ndarray:
        """Sizes by leaf, of leaves in float16 limited to at least 0.3 and at most this size."""
        # In optax' float16, squares of smaller numbers are inaccurate.
        is_clipped = self.is_float16 & np.isfinite(sizes) & (sizes != 0)
        return np.where(is_clipped, np.clip(sizes, 0.3, most), sizes)

    def _next(self, states: Any, pools: Any, sizes: Any) -> tuple[Any, Any]:
        """The next states of both optimizers, and their updates by leaf.

        Args:
          pools: two lists of random numbers, for the gradients and for the weights.
          sizes: the factors by which they are multiplied, by leaf.
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
        our_updates, our_state = ours.tx.update(grads, states[0], weights)
        their_updates, their_state = update(grads, states[1], weights)
        both = ([flatten(tree)[0][i] for i in self.leaves] for tree in (our_updates, their_updates))
        return (our_state, their_state), list(zip(*both, strict=True))

    def _tree(self, params: Tree, pool: list[Any], sizes: Any) -> Tree:
        """A tree like the parameters, of random numbers times their sizes.

        If these are the parameters of the whole model, and the numbers are for a sample of it, the
        numbers are repeated along the axis that is sampled.
        """
        new, _ = flatten(params)
        for i, leaf in enumerate(self.leaves):
            x, p = pool[i], new[leaf]
            if np.shape(x) != np.shape(p):
                axis = longest_axis(np.shape(p))
                x = jnp.take(x, jnp.arange(np.shape(p)[axis]) % x.shape[axis], axis)
            x = (x * sizes[i]).astype(dtype_of(p))
            sharding = explicit_sharding(p)
            new[leaf] = x if sharding is None else reshard(x, sharding, p)
        return self.treedef.unflatten(new)


def _like(p: Any, x: np.ndarray, dtype: Any) -> jax.Array:
    """Random numbers as an array in this dtype with the sharding of a leaf."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        # The imaginary parts are the same numbers, so two arrays of equal signs have them here too.
        x = x + 1j * np.roll(x.reshape(-1), 1).reshape(x.shape)
    array = jnp.asarray(x, dtype)
    # `device_put` commits an array, and results computed from it. With both committed arrays and
    # others, `_call` would be compiled twice.
    is_elsewhere = isinstance(p, jax.Array) and p.sharding != array.sharding
    return jax.device_put(array, p.sharding) if is_elsewhere else array


def _differences(
    updates: Sequence[tuple[Any, Any]],
    wide_dtypes: Sequence[Any],
    is_first: np.ndarray,
    grad_sizes: np.ndarray,
) -> Differences:
    """Compares pairs of updates.

    This is done in NumPy. As part of the compiled program with the updates, for a model of many
    leaves, it would take longer to compile than everything else.
    """
    pairs = []
    for (a, b), wide in zip(updates, wide_dtypes, strict=True):
        if a is None or b is None or b.size == 0:
            pairs.append((np.zeros(1, wide), np.zeros(1, wide)))
        else:
            vectors = (np.asarray(x).astype(wide, copy=False).reshape(-1) for x in (a, b))
            pairs.append((next(vectors), next(vectors)))
    starts = np.cumsum([0, *(x.size for x, _ in pairs[:-1])])
    a, b = (np.concatenate(vectors) for vectors in zip(*pairs, strict=True))
    with np.errstate(invalid="ignore", over="ignore"):  # of differences between infinities
        difference = np.abs(a - b)
    difference[np.isnan(difference)] = np.inf
    return Differences(
        np.maximum.reduceat(difference, starts),
        np.maximum.reduceat(np.abs(b), starts),
        bool(np.all(np.isfinite(b))),
        is_first,
        grad_sizes,
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
            # If one accumulation is inside another, both counts are 0: others are refused.
            leaves = leaves_by_path(ours.owner, part.params)
            micro |= dict.fromkeys(leaves, int(part.state.micro_count))
    return [(_steps_of(ours, path), micro.get(path, 0)) for path in paths]


def _calls_left(phases: Sequence[tuple[int, int]], calls: int) -> int:
    """How many calls of `update` finish the present steps of all leaves; 0 if no number does."""
    distinct = set(phases)
    for left in range(calls):
        if all((micro + left) % steps == 0 for steps, micro in distinct):
            return left
    return 0


def _sizes_of_gradients(state: Any) -> dict[str, np.ndarray]:
    """By path, the size of past gradients for each element: the root of v, or Adamax' u."""
    sizes: dict[str, np.ndarray] = {}
    for x in slot_states(state):
        for slot, power in (("v", 0.5), ("u", 1)):
            if slot in rule_slots(x):
                for path, array in leaves_by_path("", getattr(x, slot)).items():
                    size = np.abs(np.asarray(array, np.float64)) ** power
                    # A leaf may go through several rules.
                    sizes[path] = np.maximum(size, sizes.get(path, size))
    return sizes


def _root_mean_square(x: np.ndarray) -> float:
    return math.sqrt(np.mean(np.square(x))) if x.size else 0.0
