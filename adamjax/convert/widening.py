"""Copies of states in float32, so that steps in narrow dtypes can be compared closely."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.convert.adamjax_state import AdamjaxState
from adamjax.convert.programs import leaves_of_parts, operations
from adamjax.structure import replace_parts
from adamjax.transform import Rule

__all__ = ["has_rounded_hyperparams", "is_narrow", "like_wide", "widened", "widened_floats"]


def is_narrow(x: Any) -> bool:
    """Whether an array has floats of fewer than 32 bits."""
    return _is_float(x) and np.dtype(x.dtype).itemsize < 4


def _is_float(x: Any) -> bool:
    dtype = getattr(x, "dtype", None)
    return dtype is not None and bool(jnp.issubdtype(dtype, jnp.floating))


def widened_floats(tree: Any) -> Any:
    """A tree with float32 in place of narrower floats."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) if is_narrow(x) else x, tree)


def like_wide(update: Any) -> Any:
    """An update function of optax that computes in float32 where the state has narrower floats.

    By itself, optax computes `b1 * m` in the dtype of m. The new state has the dtypes of the old
    one.
    """

    def wide_update(grads: Any, state: Any, params: Any) -> tuple[Any, Any]:
        updates, new = update(grads, widened_floats(state), params)
        return updates, _cast_like(new, state)

    return wide_update


def widened(ours: AdamjaxState, state: Any, optimizer: Any) -> tuple[AdamjaxState, Any, bool]:
    """Both states with float32 parameters and moments, as far as that is possible.

    Some transforms of optax have moments of a fixed dtype, as with `mu_dtype`. If a transform
    depends on the dtype of a leaf, as a mask may, nothing is widened.

    Returns:
      The state of adamjax, that of optax, and whether `like_wide` may be used. (With it,
      `apply_if_finite` may raise an error, because it refuses steps that change dtypes.)
    """
    if not any(map(is_narrow, jax.tree.leaves((ours.params, ours.state, state)))):
        return ours, state, False
    original = ours, state, False
    if has_rounded_hyperparams(state):
        return original
    params = widened_floats(ours.params)
    tx = replace_parts(ours.tx, lambda x: x.with_wide_slots() if isinstance(x, Rule) else x)
    try:
        new_state = _cast_like(state, jax.eval_shape(optimizer.init, params))
        new_ours = AdamjaxState(
            ours.owner, tx, _cast_like(ours.state, jax.eval_shape(tx.init, params)), params
        )
        if leaves_of_parts(ours) != leaves_of_parts(new_ours):
            return original
        if operations(optimizer, ours.params) != operations(optimizer, params):
            return original
    except (TypeError, ValueError):  # The structure of a state depends on a dtype.
        return original
    for update, widens in ((like_wide(optimizer.update), True), (optimizer.update, False)):
        try:
            jax.eval_shape(update, params, new_state, params)
        except (TypeError, ValueError):
            continue
        return new_ours, new_state, widens
    return original


def has_rounded_hyperparams(state: Any) -> bool:
    """Whether `inject_hyperparams` has rounded hyperparameters to a narrow dtype of parameters."""
    return any(
        is_narrow(x) and "hyperparams" in jax.tree_util.keystr(path)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    )


def _cast_like(tree: Any, like: Any) -> Any:
    """A tree whose floats have the dtypes of those of another tree."""

    def cast(x: Any, other: Any) -> Any:
        return jnp.asarray(x, other.dtype) if _is_float(x) and x.dtype != other.dtype else x

    return jax.tree.map(cast, tree, like)
