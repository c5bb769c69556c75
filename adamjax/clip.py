"""Transforms that clip updates: by value, by the norm of each leaf, by the norm of all leaves."""

import functools
import operator
from collections.abc import Iterable
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.data import POSITIVE, Number, Tree, is_array
from adamjax.leaves import lift, reduce_leaves
from adamjax.moments import (
    barrier,
    checked_in_range,
    compute_dtype,
    root,
    scalar,
    square,
    widen,
    widened_dtype,
)
from adamjax.paths import flatten
from adamjax.rows import each_array, nonzero_arrays
from adamjax.transform import Scaling, Stateless, Step, expect_empty

__all__ = ["clip_by_global_norm", "clip_by_norm", "clip_by_value", "global_norm"]


def _sum_of_squares(arrays: Iterable[chex.Array]) -> chex.Array:
    return functools.reduce(operator.add, (jnp.sum(square(x)) for x in arrays))


def _leaf_sum_of_squares(c: None, g: Any) -> tuple[chex.Array]:
    """The sum of a leaf's squares: the rule of `global_norm` for `reduce_leaves`."""
    return _sum_of_squares_in(compute_dtype(g.dtype), g)


def _leaf_sum_of_squares_in_float64(c: None, g: Any) -> tuple[chex.Array]:
    """`_leaf_sum_of_squares` for a tree with float64 leaves."""
    return _sum_of_squares_in(jnp.float64, g)


def _sum_of_squares_in(real: Any, g: Any) -> tuple[chex.Array]:
    """The sum of a leaf's squares in a dtype."""
    if widened_dtype(g.dtype, real) != g.dtype:
        # Without the barrier, XLA would store a widened copy, to use it both for the norm and for
        # the product with the clip's factor.
        g = each_array(lambda x: widen(barrier(x), real), g)
    return (_sum_of_squares(nonzero_arrays(g)),)


def global_norm(tree: Tree) -> chex.Array:
    """The Euclidean norm of all floating leaves of a tree as one vector.

    Args:
      tree: arrays of any shapes and dtypes, and row gradients, which count like their dense
        arrays; `None` and integer leaves are ignored.

    Returns:
      A scalar of dtype float32 (float64 if a leaf has it). Squares are summed in that dtype, so
      float16 leaves cannot overflow. The norm is infinite if the sum exceeds float32's range, at
      norms above 1.8e19. Elements below about 1e-19 count as 0, because their squares
      underflow. The derivative at 0 is 0.

    >>> import adamjax, jax.numpy as jnp
    >>> float(adamjax.global_norm({"w": jnp.array([3.0, 0.0]), "b": jnp.array(4.0)}))
    5.0
    """
    return _norm("global_norm", tree)


def _norm(owner: str, tree: Tree) -> chex.Array:
    empty = jnp.zeros((), jnp.float32)
    dtypes = {x.dtype for x in flatten(tree)[0] if hasattr(x, "dtype")}
    # Outside of x64 mode, JAX casts NumPy's float64 to float32.
    is_x64 = jnp.result_type(float) == jnp.float64
    has_float64 = is_x64 and bool({np.dtype("float64"), np.dtype("complex128")} & dtypes)
    rule = _leaf_sum_of_squares_in_float64 if has_float64 else _leaf_sum_of_squares
    return root(reduce_leaves(owner, rule, operator.add, tree, empty))


class _MaxNorm(NamedTuple):
    """The largest norm of a clip, for one compute dtype.

    Attributes:
      limit: the norm to shrink to.
      least_divisor: the least norm to divide by; `None` if it is the limit.
    """

    limit: Any
    least_divisor: Any


def _max_norm(value: Number, real: Any) -> _MaxNorm:
    limit = _limit(value, real)
    if not is_array(value):
        return _MaxNorm(limit, None)
    # With a limit of 0, a vector of norm 0 must not become 0/0.
    return _MaxNorm(limit, jnp.maximum(limit, jnp.finfo(real).tiny))


def _limit(value: Number, real: Any) -> Any:
    """A limit in the compute dtype; NaN for an array below 0, which may be traced."""
    if not is_array(value):
        return scalar(checked_in_range(value, POSITIVE), real)
    limit = scalar(value, real)
    return jnp.where(limit >= 0, limit, jnp.nan)


def _clip_factor(norm: chex.Array, max_norm: _MaxNorm) -> chex.Array:
    """The factor that clips a vector of this norm; NaN if the norm is not finite."""
    limit, least_divisor = max_norm
    divisor = jnp.maximum(norm, limit if least_divisor is None else least_divisor)
    return jnp.where(jnp.isfinite(norm), limit / divisor, jnp.nan)


def _clipped_by_value(limit: Any, g: chex.Array) -> tuple[chex.Array]:
    x = widen(g, limit.dtype)
    if jnp.issubdtype(g.dtype, jnp.complexfloating):
        clipped = jax.lax.complex(jnp.clip(x.real, -limit, limit), jnp.clip(x.imag, -limit, limit))
    else:
        clipped = jnp.clip(x, -limit, limit)
    return (clipped.astype(g.dtype),)


def _clipped_by_norm(max_norm: _MaxNorm, g: Any) -> tuple[Any]:
    real = max_norm.limit.dtype
    norm = root(_sum_of_squares(widen(x, real) for x in nonzero_arrays(g)))
    factor = _clip_factor(norm, max_norm)

    def clipped(x: chex.Array) -> chex.Array:
        return (factor * widen(x, real)).astype(x.dtype)

    return (each_array(clipped, g),)


class clip_by_value(Stateless):
    """Limits every element to `[-limit, limit]` (`clipvalue` of Keras). NaN stays NaN.

    The real and the imaginary part of a complex element are limited separately.

    Args:
      limit: the largest absolute value of an element, above 0. (The value of an array that is
        traced, or set later by `set_hyperparams`, is not checked. With a limit of 0, updates become
        0; with a negative or NaN limit, they become NaN.)

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
    """Scales each leaf to a Euclidean norm of at most `max_norm` (`clipnorm` of Keras).

    Norms are computed in float32 or wider. If the norm of a leaf is not finite, all its elements
    become NaN. A `RowGradient` becomes NaN in its rows only.

    Args:
      max_norm: the largest norm of a leaf, above 0. (The value of an array that is traced, or set
        later by `set_hyperparams`, is not checked. If `max_norm` is 0, updates become 0; if it
        is negative, infinite or NaN, they become NaN.)

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

    Pascanu et al., arXiv:1211.5063, algorithm 1 (`global_clipnorm` of Keras). `global_norm`
    computes the norm. If it is not finite, every element becomes NaN, as in TensorFlow's
    `clip_by_global_norm`, so the fault is visible. A `RowGradient` becomes NaN in its rows only.
    `skip_not_finite` around the chain looks at the gradients before the clip: it skips the step if
    one of their elements is not finite, but not if only their squares overflow (see `global_norm`).

    Args:
      max_norm: the largest joint norm, above 0. (The value of an array that is traced, or set
        later by `set_hyperparams`, is not checked. If `max_norm` is 0, updates become 0; if it
        is negative, infinite or NaN, they become NaN.)

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

    def factors(self, tree: Tree, state: Any) -> tuple[Any, Any]:
        expect_empty(self, state)
        norm = _norm("clip_by_global_norm", tree)
        factor = _clip_factor(norm, _max_norm(self.max_norm, norm.dtype))
        return factor.astype, state  # `factors` returns functions of a dtype
