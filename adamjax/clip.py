"""Clipping: by value, by the norm of each leaf, by the norm of all leaves together."""

import functools
import operator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp

from adamjax.data import POSITIVE, Number, Tree, is_array
from adamjax.leaves import lift, reduced
from adamjax.moments import accumulator, barrier, root, scalar, square, widen, widened
from adamjax.rows import each_array, parts
from adamjax.transform import Scaling, Stateless, Step, expect_empty

__all__ = ["clip_by_global_norm", "clip_by_norm", "clip_by_value", "global_norm"]


def _sum_of_squares(c: None, g: Any) -> tuple[chex.Array]:
    real = accumulator(g.dtype)
    if widened(g.dtype, real) != g.dtype:
        # A widened copy that the norm and the product have in common would be kept in memory.
        g = each_array(lambda x: widen(barrier(x), real), g)
    return (functools.reduce(operator.add, (jnp.sum(square(x)) for x in parts(g))),)


def global_norm(tree: Tree) -> chex.Array:
    """The Euclidean norm of all floating leaves of a tree as one vector.

    Args:
      tree: arrays of any shapes and dtypes; `None` and integer leaves count nothing.

    Returns:
      A scalar of dtype float32 (float64 if a leaf is); squares are summed in that dtype, so
      float16 leaves cannot overflow. Infinite where the sum exceeds float32's range, at norms
      above 1.8e19. Its derivative at 0 is 0.

    >>> import adamjax, jax.numpy as jnp
    >>> float(adamjax.global_norm({"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}))
    5.0
    """
    return _norm("global_norm", tree)


def _norm(owner: str, tree: Tree) -> chex.Array:
    empty = jnp.zeros((), jnp.float32)
    return root(reduced(owner, _sum_of_squares, operator.add, tree, empty))


class _MaxNorm(NamedTuple):
    """The norm to shrink to, and the least norm to divide by; `None` where they are the same."""

    limit: Any
    least: Any


def _max_norm(value: Number, real: Any) -> _MaxNorm:
    limit = _limit(value, real)
    # To 0, a vector of norm 0 goes as any other.
    return _MaxNorm(limit, jnp.maximum(limit, jnp.finfo(real).tiny) if is_array(value) else None)


def _limit(value: Number, real: Any) -> Any:
    """A limit in the accumulator dtype; NaN for an array, which may be traced, below 0."""
    limit = scalar(value, real)
    return jnp.where(limit >= 0, limit, jnp.nan) if is_array(value) else limit


def _shrinking(norm: chex.Array, most: _MaxNorm) -> chex.Array:
    """The factor that takes a vector of this norm to the largest; NaN if the norm is not finite."""
    least = most.limit if most.least is None else most.least
    return jnp.where(jnp.isfinite(norm), most.limit / jnp.maximum(norm, least), jnp.nan)


def _clipped_by_value(limit: Any, g: chex.Array) -> tuple[chex.Array]:
    x = widen(g, limit.dtype)
    if jnp.issubdtype(g.dtype, jnp.complexfloating):
        clipped = jax.lax.complex(jnp.clip(x.real, -limit, limit), jnp.clip(x.imag, -limit, limit))
    else:
        clipped = jnp.clip(x, -limit, limit)
    return (clipped.astype(g.dtype),)


def _clipped_by_norm(most: _MaxNorm, g: Any) -> tuple[Any]:
    real = most.limit.dtype

    def clipped(x: chex.Array) -> chex.Array:
        return (factor * widen(x, real)).astype(x.dtype)

    squares = (jnp.sum(square(widen(x, real))) for x in parts(g))
    factor = _shrinking(root(functools.reduce(operator.add, squares)), most)
    return (each_array(clipped, g),)


class clip_by_value(Stateless):
    """Limits every element to `[-limit, limit]` (`clipvalue` of Keras). NaN stays NaN.

    The real and the imaginary part of a complex element are limited each by itself.

    Args:
      limit: largest absolute value of an element, above 0. (Of an array that is traced or set,
        the value is not checked: 0 makes zeros; what is below 0 or NaN makes NaN.)

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.clip_by_value(1.0).update(jnp.array([-3.0, 0.5]), ())[0]
    Array([-1. ,  0.5], dtype=float32)
    """

    limit: Number

    keeps_zero = True
    groupable = True

    def __post_init__(self) -> None:
        self.check_range("limit", POSITIVE)

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        expect_empty(self, state)
        (clipped,) = lift(
            "clip_by_value",
            _clipped_by_value,
            lambda real: _limit(self.limit, real),
            updates,
            like=params,
        )
        return clipped, state


class clip_by_norm(Stateless):
    """Scales each leaf, by itself, to a Euclidean norm of at most `max_norm` (`clipnorm` of Keras).

    Norms are taken in float32 at least. A leaf whose norm is not finite becomes NaN throughout;
    a `RowGradient`, in the rows that it holds.

    Args:
      max_norm: largest norm of a leaf, above 0. (Of an array that is traced or set, the value is
        not checked: 0 makes zeros; what is below 0, infinite or NaN makes NaN.)

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.clip_by_norm(1.0).update({"w": jnp.array([3.0, 4.0])}, ())[0]
    {'w': Array([0.6, 0.8], dtype=float32)}
    """

    max_norm: Number

    keeps_zero = True

    def __post_init__(self) -> None:
        self.check_range("max_norm", POSITIVE)

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        expect_empty(self, state)
        (clipped,) = lift(
            "clip_by_norm",
            _clipped_by_norm,
            lambda real: _max_norm(self.max_norm, real),
            updates,
            like=params,
            rows="whole",
        )
        return clipped, state


class clip_by_global_norm(Stateless, Scaling):
    """Scales all leaves by one factor, so that their joint norm is at most `max_norm`.

    Pascanu et al., arXiv:1211.5063, algorithm 1 (`global_clipnorm` of Keras). The norm is that
    of `global_norm`. Where it is not finite, every element becomes NaN, as in TensorFlow's
    `clip_by_global_norm`: the fault is seen, and `skip_not_finite` in front of it can tell,
    unless all are finite and their squares overflow, see `global_norm`. (Of a `RowGradient`, every
    element of the rows that it holds.)

    Args:
      max_norm: largest joint norm, above 0. (Of an array that is traced or set, the value is not
        checked: 0 makes zeros; what is below 0, infinite or NaN makes NaN.)

    >>> import adamjax, jax.numpy as jnp
    >>> grads = {"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}
    >>> adamjax.clip_by_global_norm(1.0).update(grads, ())[0]["b"]
    Array(0.8, dtype=float32)
    """

    max_norm: Number

    groupable = True

    def __post_init__(self) -> None:
        self.check_range("max_norm", POSITIVE)

    @property
    def reads_updates(self) -> bool:
        return True

    def factors(self, tree: Tree, state: Any) -> Step:
        expect_empty(self, state)
        norm = _norm("clip_by_global_norm", tree)
        return _shrinking(norm, _max_norm(self.max_norm, norm.dtype)).astype, state
