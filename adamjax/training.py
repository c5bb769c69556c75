"""A function that makes a jitted train step of a loss and an optimizer."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, Concatenate, Generic, Literal

import jax

from adamjax.autodiff import Args, Call, P, Value, value_and_grad
from adamjax.data import Tree
from adamjax.exact import ExactRowsState, exact_rows, gradient_of
from adamjax.leaves import apply_updates, expect_arrays
from adamjax.reading import step_count
from adamjax.structure import Part, find
from adamjax.transform import Transform, as_transform

__all__ = ["train_step"]


def _exact_parts(tx: Transform, state: Any, params: Tree) -> list[Part]:
    """Every `exact_rows` in a transform, with its state and the parameters that it sees."""
    parts = find(exact_rows, tx, state, params)

    def is_exact(x: Any) -> bool:
        return isinstance(x, ExactRowsState)

    states = filter(is_exact, jax.tree.leaves(state, is_leaf=is_exact))
    if len(parts) < len(list(states)):
        raise ValueError(
            "train_step: exact_rows is inside another library's transform, where train_step cannot "
            "find it, so the loss would read rows that lag behind: use adamjax.chain, masked or "
            "partition in place of optax's; they take optax's transforms"
        )
    return parts


class TrainStep(Generic[P, Args, Value]):
    """A jitted train step, with the attributes of functions of `jax.jit`, such as `lower`.

    If JAX refuses an argument before it traces the step, the error names the parameter that is no
    array.
    """

    def __init__(self, jitted: Any) -> None:
        self._jitted = jitted
        functools.update_wrapper(self, jitted, updated=())

    def _call(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            return method(*args, **kwargs)
        except TypeError:
            expect_arrays("train_step", args[0] if args else kwargs.get("params"))
            raise

    def __call__(
        self, params: P, state: Any, *args: Args.args, **kwargs: Args.kwargs
    ) -> tuple[P, Any, Value]:
        return self._call(self._jitted, params, state, *args, **kwargs)

    def trace(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._jitted.trace, *args, **kwargs)

    def lower(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._jitted.lower, *args, **kwargs)

    def eval_shape(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._jitted.eval_shape, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_jitted":
            raise AttributeError(name)
        return getattr(self._jitted, name)


def train_step(
    loss_fn: Callable[Concatenate[P, Args], Value],
    tx: Any,
    *,
    has_aux: bool = False,
    tables: str | Sequence[str] | None = None,
    strict: bool = False,
    rounding: Literal["nearest", "stochastic"] = "nearest",
    **jit_options: Any,
) -> TrainStep[P, Args, Value]:
    """A jitted train step that donates parameters and state.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` returns one real float; with `has_aux` a pair of
        it and any tree of arrays. Leaves of params that are no floats (integers, keys) stay as they
        are.
      tx: an optimizer of adamjax or optax. If `exact_rows` is in it, alone or anywhere in adamjax's
        chains, wrappers, masks or partitions, the loss reads rows that are up to date.
      tables: patterns of leaves that get row gradients, as in `adamjax.value_and_grad`; leave them
        out with `exact_rows`, which names its tables itself.
      strict: as in `adamjax.value_and_grad`.
      rounding: how bfloat16 weights are rounded, as in `adamjax.apply_updates`.
      **jit_options: further arguments of `jax.jit`, such as `out_shardings` or
        `static_argnames`; `donate_argnums=()` donates nothing.

    Returns:
      A function `(params, state, *args, **kwargs) -> (params, state, value)`, where value is the
      loss, or `(loss, aux)` with `has_aux`. It has the attributes of functions of `jax.jit`, such
      as `lower`.

    Raises:
      TypeError: by the step: a leaf of params is no array, such as a function in a whole model.

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
        exact, extra = _exact_parts(tx, state, params), {}
        if exact:
            if tables is not None:
                raise ValueError(
                    "train_step: exact_rows has its own tables, "
                    f"{[name for part in exact for name in part.tx.tables]}; leave out `tables`"
                )
            gradient = gradient_of(
                loss_fn,
                lambda: [part.tx.bind(part.state, part.params) for part in exact],
                has_aux=has_aux,
                strict=strict,
            )
            (value, grads), extra["ticket"] = gradient(params, *args, **kwargs)
        elif tables is not None:
            gradient = value_and_grad(loss_fn, tables, has_aux=has_aux, strict=strict)
            value, grads = gradient(params, *args, **kwargs)
        else:
            call = Call("train_step", loss_fn, (params, *args), kwargs, 0, has_aux)
            value, grads = call.value_and_grad()
        updates, state = tx.update(grads, state, params, **extra)
        count = step_count(state) if rounding == "stochastic" else None
        return apply_updates(params, updates, rounding=rounding, step=count), state, value

    return TrainStep(jax.jit(step, **{"donate_argnums": (0, 1), **jit_options}))
