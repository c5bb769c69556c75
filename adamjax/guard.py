"""Steps that are taken only when it is time, or only when the gradients are sound."""

from collections.abc import Callable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from adamjax.data import COUNT, Number, Tree
from adamjax.leaves import is_left_alone, lift, new_slots, nothing, reduced
from adamjax.moments import accumulator, next_count, scalar, widened
from adamjax.paths import flatten, is_none
from adamjax.transform import Step, Transform, as_transform, expect_state

__all__ = [
    "AccumulateGradientsState",
    "SkipNotFiniteState",
    "accumulate_gradients",
    "skip_not_finite",
]


def _conditional(due: chex.Array, step: Callable[[Tree], Step], grads: Tree, state: Any) -> Step:
    """`step(grads)` where `due`, else zero updates and the state as it is.

    Branches of a `cond` must agree in everything, so the step's updates are taken to the
    gradients' dtypes, and it sees `None` for float0, which no branch can return.
    """
    leaves, treedef = flatten(grads)
    passed = [g is None or getattr(g, "dtype", None) == jax.dtypes.float0 for g in leaves]
    pairs = list(zip(leaves, passed, strict=True))
    alive = treedef.unflatten([None if rests else jnp.asarray(g) for g, rests in pairs])

    def taken() -> Step:
        updates, new_state = step(alive)
        return jax.tree.map(lambda g, u: u.astype(g.dtype), alive, updates), new_state

    def rested() -> Step:
        return jax.tree.map(jnp.zeros_like, alive), state

    updates, state = jax.lax.cond(due, taken, rested)
    moves = zip(flatten(updates)[0], pairs, strict=True)
    return treedef.unflatten([g if rests else u for u, (g, rests) in moves]), state


class AccumulateGradientsState(NamedTuple):
    """State of `accumulate_gradients`.

    Attributes:
      micro_count: int32, the micro-batches taken in since the last step.
      total: tree like the parameters, the sum of their gradients, in float32 at least.
      inner: the state of the inner transform.
    """

    micro_count: chex.Array
    total: Tree
    inner: Any


def _add(c: None, g: chex.Array, total: chex.Array) -> tuple[chex.Array, chex.Array]:
    return g, total + g.astype(total.dtype)


class accumulate_gradients(Transform):
    """Takes a step of `tx` every `steps` calls, with the mean of the gradients of these calls.

    In the calls between, updates are zero and nothing of `tx` moves: neither moments, counts and
    schedules nor decay and average. The mean reaches `tx` in float32 at least. A leaf whose
    gradient is `None` in a call is left alone in that call, also where that is the real step:
    what it has gathered then waits for the next one.

    Args:
      tx: the transform that takes the steps, usually a whole optimizer.
      steps: micro-batches a step, a whole number of at least 1.

    The state is an `AccumulateGradientsState`.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.accumulate_gradients(adamjax.scale(-1.0), steps=2)
    >>> state = tx.init(jnp.array(0.0))
    >>> for g in (1.0, 3.0):
    ...     update, state = tx.update(jnp.array(g), state)
    ...     print(update)
    0.0
    -2.0
    """

    tx: Transform
    steps: Number

    def __post_init__(self) -> None:
        self._set(tx=as_transform(self.tx))
        self._check("steps", COUNT)

    def init(self, params: Tree) -> AccumulateGradientsState:
        total = new_slots(
            params, lambda p: jnp.zeros_like(p, widened(p.dtype, accumulator(p.dtype)))
        )
        return AccumulateGradientsState(jnp.zeros((), jnp.int32), total, self.tx.init(params))

    def update(self, grads: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        expect_state(self, state, AccumulateGradientsState)
        _, total = lift("accumulate_gradients", _add, nothing, grads, (state.total,))
        count = state.micro_count + 1
        due = count >= jnp.asarray(self.steps, count.dtype)

        def step(alive: Tree) -> Step:
            def mean(g: Any, x: Any) -> Any:
                if is_left_alone(g):
                    return g
                x = x / scalar(self.steps, accumulator(x.dtype))
                return x.astype(g.dtype) if self.tx.has_foreign else x

            def emptied(g: Any, x: Any) -> Any:
                return x if is_left_alone(g) else jnp.zeros_like(x)

            means = jax.tree.map(mean, alive, total, is_leaf=is_none)
            updates, inner = self.tx.update(means, state.inner, params, **extra_args)
            rest = jax.tree.map(emptied, alive, total, is_leaf=is_none)
            return updates, (rest, inner)

        updates, (total, inner) = _conditional(due, step, grads, (total, state.inner))
        return updates, AccumulateGradientsState(jnp.where(due, 0, count), total, inner)

    @property
    def parts(self) -> tuple[Transform, ...]:
        return (self.tx,)

    def part_states(self, state: Any) -> tuple[Any, ...]:
        return (state.inner,)


class SkipNotFiniteState(NamedTuple):
    """State of `skip_not_finite`.

    Attributes:
      skipped: int32, the steps that were skipped; it stays at the largest int32.
      inner: the state of the inner transform.
    """

    skipped: chex.Array
    inner: Any


def _all_finite(c: None, g: chex.Array) -> tuple[chex.Array]:
    return (jnp.all(jnp.isfinite(g)),)


class skip_not_finite(Transform):
    """Takes the step of `tx` only if every gradient is finite.

    Otherwise updates are zero and nothing changes but a counter, which `skipped_steps` reads.

    Args:
      tx: the transform that takes the steps, usually a whole optimizer.

    The state is a `SkipNotFiniteState`.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.skip_not_finite(adamjax.adam())
    >>> update, state = tx.update(jnp.array([jnp.nan]), tx.init(jnp.ones(1)))
    >>> update, adamjax.skipped_steps(state), adamjax.step_count(state)
    (Array([0.], dtype=float32), Array(1, dtype=int32), Array(0, dtype=int32))
    """

    tx: Transform

    def __post_init__(self) -> None:
        self._set(tx=as_transform(self.tx))

    def init(self, params: Tree) -> SkipNotFiniteState:
        return SkipNotFiniteState(jnp.zeros((), jnp.int32), self.tx.init(params))

    def update(self, grads: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        expect_state(self, state, SkipNotFiniteState)
        finite = reduced(
            "skip_not_finite", _all_finite, jnp.logical_and, grads, empty=jnp.array(True)
        )

        def step(alive: Tree) -> Step:
            return self.tx.update(alive, state.inner, params, **extra_args)

        updates, inner = _conditional(finite, step, grads, state.inner)
        skipped = jnp.where(finite, state.skipped, next_count(state.skipped))
        return updates, SkipNotFiniteState(skipped, inner)

    @property
    def parts(self) -> tuple[Transform, ...]:
        return (self.tx,)

    def part_states(self, state: Any) -> tuple[Any, ...]:
        return (state.inner,)
