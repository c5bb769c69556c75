"""A train step in one line."""

from collections.abc import Callable, Sequence
from typing import Any

import jax

from adamjax.autodiff import value_and_grad
from adamjax.data import Tree
from adamjax.exact import exact_rows
from adamjax.hyperparams import with_hyperparams
from adamjax.leaves import apply_updates
from adamjax.masking import masked, partition
from adamjax.transform import Transform, as_transform

__all__ = ["train_step"]


def _exact(tx: Transform, state: Any) -> tuple[exact_rows, Any] | None:
    """The part of a transform that keeps rows exact, with its state."""
    if isinstance(tx, exact_rows):
        return tx, state
    if isinstance(tx, with_hyperparams):
        return _exact(tx.resolved(state), state.inner)
    # Parts of these see other parameters.
    if isinstance(tx, masked | partition):
        return None
    found = (_exact(*pair) for pair in zip(tx.parts, tx.part_states(state), strict=True))
    return next((pair for pair in found if pair is not None), None)


def train_step(
    loss_fn: Callable[..., Any],
    tx: Any,
    *,
    has_aux: bool = False,
    tables: str | Sequence[str] | None = None,
    strict: bool = False,
    **jit_options: Any,
) -> Callable[..., Any]:
    """A jitted train step, which donates parameters and state.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)`, one real float; a pair of it and any tree of
        arrays with `has_aux`.
      tx: an optimizer, ours or optax's. Where `exact_rows` is in it, alone, in a chain or in a
        wrapper, rows are read up to date.
      tables: patterns of leaves that get row gradients, as of `adamjax.value_and_grad`; not for
        `exact_rows`, which has them.
      strict: as of `adamjax.value_and_grad`.
      **jit_options: further arguments of `jax.jit`, such as `out_shardings` or
        `static_argnames`; `donate_argnums=()` keeps what came.

    Returns:
      A function `(params, state, *args, **kwargs) -> (params, state, value)`, where value is the
      loss, or `(loss, aux)` with `has_aux`.

    >>> import adamjax, jax.numpy as jnp
    >>> def loss(params, x):
    ...     return jnp.mean((x @ params["w"] - 1.0) ** 2)
    >>> tx = adamjax.adamw(0.1)
    >>> params, step = {"w": jnp.zeros(3)}, adamjax.train_step(loss, tx)
    >>> state = tx.init(params)
    >>> for _ in range(100):
    ...     params, state, value = step(params, state, jnp.eye(3))
    >>> print(params["w"].round(1))
    [1. 1. 1.]
    """
    tx = as_transform(tx)

    def step(params: Tree, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        exact, extra = _exact(tx, state), {}
        if exact is not None:
            if tables is not None:
                raise ValueError(
                    f"train_step: exact_rows has its own tables, {list(exact[0].tables)}; leave "
                    "out `tables`"
                )
            gradient = exact[0].value_and_grad(loss_fn, has_aux=has_aux, strict=strict)
            (value, grads), extra["ticket"] = gradient(params, exact[1], *args, **kwargs)
        else:
            gradient = jax.value_and_grad(loss_fn, has_aux=has_aux)
            if tables is not None:
                gradient = value_and_grad(loss_fn, tables, has_aux=has_aux, strict=strict)
            value, grads = gradient(params, *args, **kwargs)
        updates, state = tx.update(grads, state, params, **extra)
        return apply_updates(params, updates), state, value

    return jax.jit(step, **{"donate_argnums": (0, 1), **jit_options})
