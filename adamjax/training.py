"""Functions that make a train step and an evaluation step from a function and an optimizer."""

import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Concatenate, Generic, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from adamjax._compat import current_mesh
from adamjax.autodiff import (
    Args,
    Call,
    P,
    Value,
    signature_with_state,
    takes_state,
    value_and_grad,
)
from adamjax.data import Tree
from adamjax.exact import ExactRowsState, exact_rows, gradient_of, results_of
from adamjax.leaves import (
    apply_updates,
    expect_arrays,
    expect_dtypes,
    expect_no_shapes,
    is_left_alone,
)
from adamjax.paths import flatten, leaf_paths
from adamjax.reading import step_count, unchecked_averaged_weights
from adamjax.structure import Part, find, states_of_class
from adamjax.transform import COUNTS, Transform, as_transform, short_repr

__all__ = ["eval_step", "forward", "train_step"]

Result = TypeVar("Result")


def _exact_parts(owner: str, tx: Transform, state: Any, params: Tree) -> list[Part]:
    """Every `exact_rows` in a transform, with its state and the parameters that it sees."""
    parts = find(exact_rows, tx, state, params)
    if len(parts) < len(states_of_class(ExactRowsState, state)):
        raise ValueError(
            f"{owner}: the state has an exact_rows that is not in {short_repr(tx)}, so rows that "
            "lag behind would be read: pass the optimizer that made the state. If exact_rows is "
            "inside another library's transform, use adamjax.chain, masked or partition in place "
            "of optax's; they take optax's transforms"
        )
    return parts


def _expect_downhill(tx: Transform, params: Tree) -> None:
    """Refuses an optimizer if nothing in it can turn the updates of some leaf downhill."""
    leaves, nums = flatten(params)[0], tx.num_rates(params)
    for path, p, num in zip(leaf_paths(params), leaves, nums, strict=True):
        if num == 0 and not is_left_alone(p):
            raise ValueError(
                f"train_step: {path!r} would move uphill, as nothing in {short_repr(tx)} that sees "
                "it has a learning rate or a factor below 0: put scale_by_learning_rate after the "
                "rule. If masked(tx, pattern) leaves this leaf out and it should stay as it is, "
                "write partition([(pattern, tx)], default=set_to_zero())"
            )


def _rounding_number(tx: Transform, state: Any) -> Any:
    """A number for stochastic rounding that changes in each step.

    It depends on every counter in the state. One counter is not enough: under
    `accumulate_gradients` or `skip_not_finite`, the counter of one part may stand still while
    another part moves its weights.
    """
    try:
        step_count(state)
    except ValueError as error:
        raise ValueError(
            "train_step: rounding='stochastic' needs a count of steps, and the state of "
            f"{short_repr(tx)} has none that adamjax knows: use a rule or scale_by_learning_rate "
            "of adamjax, or write the step yourself, with apply_updates(..., "
            "rounding='stochastic', step=...)"
        ) from error
    mixed = np.uint32(0)
    for path, x in jax.tree_util.tree_leaves_with_path(state):
        if getattr(path[-1], "name", None) in COUNTS:
            # The factor is odd, so the result changes if any one counter changes.
            mixed = mixed * np.uint32(0x9E3779B1) + x.astype(jnp.uint32)
    return mixed


class _JittedStep:
    """A jitted step, with the attributes of functions of `jax.jit`, such as `lower`.

    If JAX refuses an argument before it traces the step, the error names the parameter that is not
    an array. If it refuses an array that was donated, the error names this array.
    """

    def __init__(self, owner: str, jitted: Any, donated: Iterable[int] = ()) -> None:
        """`donated` are the positions of the arguments that `jitted` donates."""
        self._owner, self._jitted, self._donated = owner, jitted, set(donated)
        # To mypy, this class is not a function: only its subclasses have `__call__`.
        this: Any = self
        functools.update_wrapper(this, jitted, updated=())

    # A keyword of the user's function may have any name, so parameters here are positional-only.
    def _call(self, method: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        # Under a mesh, JAX 0.10 crashes instead of raising an error.
        if current_mesh() is not None and self._has_fault_of_donation(args, kwargs):
            self._explain_donation(None, args, kwargs)
        try:
            return method(*args, **kwargs)
        except TypeError:
            if args:
                expect_arrays(self._owner, args[0])
            if len(args) > 1:
                expect_dtypes(self._owner, "the state", args[1])
                expect_no_shapes(self._owner, "the state", args[1])
            raise
        except (RuntimeError, ValueError) as error:
            if re.search("deleted|donate", str(error)):
                self._explain_donation(error, args, kwargs)
            raise

    def _has_fault_of_donation(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
        """Whether an array was donated before, or is donated now and passed twice."""

        def arrays(tree: Any) -> list[Any]:
            leaves = jax.tree.leaves(tree)
            return [
                x for x in leaves if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer)
            ]

        donated = arrays([x for i, x in enumerate(args) if i in self._donated])
        others = arrays([[x for i, x in enumerate(args) if i not in self._donated], kwargs])
        ids = {id(x) for x in donated}
        is_twice = len(ids) < len(donated) or any(id(x) in ids for x in others)
        return is_twice or any(x.is_deleted() for x in (*donated, *others))

    def _explain_donation(
        self, error: Exception | None, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Raises an error that names an array that was donated before, or is donated twice."""
        trees = {"params": args[:1], "the state": args[1:2], "the arguments": (args[2:], kwargs)}
        seen: dict[int, str] = {}
        for name, tree in trees.items():
            for path, x in zip(leaf_paths(tree), flatten(tree)[0], strict=True):
                if not isinstance(x, jax.Array) or isinstance(x, jax.core.Tracer):
                    continue
                # Drop the first key, which is the position of the tree in its tuple.
                place = f"{name}[{path.partition('/')[2]!r}]"
                if x.is_deleted():
                    raise ValueError(
                        f"{self._owner}: {place} is deleted, as a step that donates its parameters "
                        "and its state was called with it: go on with those that the step "
                        "returned, or make the step with donate_argnums=()"
                    ) from error
                if id(x) in seen:
                    raise ValueError(
                        f"{self._owner}: {place} is the same array as {seen[id(x)]}, but a step "
                        "that donates its parameters and its state can take an array only once: "
                        "pass a copy, jnp.copy(x), or make the step with donate_argnums=()"
                    ) from error
                seen[id(x)] = place

    def trace(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._jitted.trace, *args, **kwargs)

    def lower(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._jitted.lower, *args, **kwargs)

    def eval_shape(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._call(self._jitted.eval_shape, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        # Special methods are not delegated. A copy that is being made has no `_jitted` yet, and
        # looking it up would call this method again, without end.
        if name.startswith("__") or name in ("_owner", "_jitted", "_donated"):
            raise AttributeError(name)
        return getattr(self._jitted, name)


class TrainStep(_JittedStep, Generic[P, Args, Value]):
    """A jitted train step, as `train_step` returns it."""

    def __call__(
        self, params: P, state: Any, /, *args: Args.args, **kwargs: Args.kwargs
    ) -> tuple[P, Any, Value]:
        return self._call(self._jitted, params, state, *args, **kwargs)


class EvalStep(_JittedStep, Generic[P, Args, Result]):
    """A jitted evaluation step, as `eval_step` returns it."""

    def __call__(self, params: P, state: Any, /, *args: Args.args, **kwargs: Args.kwargs) -> Result:
        return self._call(self._jitted, params, state, *args, **kwargs)


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
    """A jitted train step that donates parameters and state; `eval_step` is its counterpart.

    Args:
      loss_fn: `loss_fn(params, *args, **kwargs)` returns one real float; with `has_aux` a pair of
        it and any tree of arrays. Leaves of params that are not floats (integers, keys) stay as
        they are.
      tx: an optimizer of adamjax or optax. If `exact_rows` is in it, alone or anywhere in adamjax's
        chains, wrappers, masks or partitions, the loss reads rows that are up to date.
      tables: patterns of leaves that get row gradients, as in `adamjax.value_and_grad`; leave them
        out with `exact_rows`, which has its own.
      strict: as in `adamjax.value_and_grad`.
      rounding: how bfloat16 weights are rounded, as in `adamjax.apply_updates`.
      **jit_options: further arguments of `jax.jit`, such as `out_shardings` or
        `static_argnames`; `donate_argnums=()` donates nothing. `static_argnums` count the argument
        `state`, so they are one higher than in the loss.

    Returns:
      A function `(params, state, /, *args, **kwargs) -> (params, state, value)`, where value is the
      loss, or `(loss, aux)` with `has_aux`. It has the attributes of functions of `jax.jit`, such
      as `lower`.

    Raises:
      TypeError: by the step: a leaf of params is not an array, such as a function in a whole model;
        the loss is not one real float.
      ValueError: by the step: an array was donated to an earlier step, or is passed twice; or a
        leaf, for example one that `masked` does not select, would move uphill, because no part that
        sees it has a learning rate. The message names the array or the leaf.

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

    # The underscores keep `params` and `state` free: a loss may take keywords of these names, and
    # `jit` does not allow a name twice.
    def step(_params: Tree, _state: Any, /, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        params, state = _params, _state
        exact_parts = _exact_parts("train_step", tx, state, params)
        extra_args = {}
        _expect_downhill(tx, params)
        if exact_parts:
            if tables is not None:
                own_tables = [name for part in exact_parts for name in part.tx.tables]
                raise ValueError(
                    f"train_step: exact_rows has its own tables, {own_tables}; leave out `tables`"
                )
            gradient = gradient_of(
                loss_fn,
                lambda: [part.tx.bind(part.state, part.params) for part in exact_parts],
                has_aux=has_aux,
                strict=strict,
            )
            (value, grads), extra_args["ticket"] = gradient(params, *args, **kwargs)
        elif tables is not None:
            gradient = value_and_grad(loss_fn, tables, has_aux=has_aux, strict=strict)
            value, grads = gradient(params, *args, **kwargs)
        else:
            call = Call("train_step", loss_fn, (params, *args), kwargs, has_aux=has_aux)
            value, grads = call.value_and_grad()
        updates, state = tx.update(grads, state, params, **extra_args)
        number = _rounding_number(tx, state) if rounding == "stochastic" else None
        return apply_updates(params, updates, rounding=rounding, step=number), state, value

    step.__signature__ = signature_with_state(loss_fn)  # type: ignore[attr-defined]
    options = {"donate_argnums": (0, 1), **jit_options}
    donated = np.atleast_1d(options["donate_argnums"]).tolist()
    return TrainStep("train_step", jax.jit(step, **options), donated)


def forward(
    fn: Callable[Concatenate[P, Args], Result],
    tx: Any,
    *,
    averaged: bool = False,
    strict: bool = False,
) -> Callable[Concatenate[P, Any, Args], Result]:
    """Wraps a function of parameters so that it gets up-to-date weights, whatever the optimizer.

    Under `exact_rows`, rows of `params` lag behind between steps. Here `fn` gets the values that it
    would get after `flush`, but only the rows that it reads are brought up to date. No table is
    copied, unless `fn` uses it in another way (see `strict`). `params` and the state stay as they
    are. For any other optimizer it is a plain call.

    So evaluation needs no `flush`, and neither does a checkpoint to resume from: save `params` and
    the state as they are. Call `flush` only before something else reads the weights: an export,
    another library, a program without this state.

    Args:
      fn: `fn(params, *args, **kwargs)`, which reads tables as a loss does for
        `exact_rows.value_and_grad`. It may return any tree. Under `exact_rows` it is traced, so it
        cannot branch on values of params.
      tx: the optimizer that made the state. If `exact_rows` is in it, it may stand alone or
        anywhere in adamjax's chains, wrappers, masks or partitions.
      averaged: whether to call `fn` with the average of `weight_ema`. Leaves without an average
        keep their weights, as in `averaged_weights`.
      strict: whether to raise if `fn` does anything with a table but read rows, such as use it for
        output weights. Otherwise the whole table is brought up to date: the result is right, but
        takes time for every row, and memory for another table.

    Returns:
      A function `(params, state, /, *args, **kwargs)` that returns what `fn` returns. Call it under
      `jit`: outside, it runs operation by operation. `eval_step` is jitted.

    Raises:
      ValueError: when called: with `averaged`, the state has no `weight_ema`; with `strict`, `fn`
        does more with a table than read rows (the message names the table, the operation and the
        line that uses it); `exact_rows` is inside another library's transform.
      TypeError: when called: the state is not of this optimizer's `exact_rows`.

    >>> import adamjax, jax.numpy as jnp
    >>> def predict(params, ids):
    ...     return params["table"][ids].sum(axis=-1)
    >>> def loss(params, ids):
    ...     return jnp.mean(predict(params, ids) ** 2)
    >>> params = {"table": jnp.ones((1000, 2))}
    >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
    >>> state, step = tx.init(params), adamjax.train_step(loss, tx)
    >>> for ids in ([3], [5]):
    ...     params, state, value = step(params, state, jnp.array(ids))
    >>> adamjax.forward(predict, tx)(params, state, jnp.array([3]))
    Array([1.666], dtype=float32)
    >>> predict(params, jnp.array([3]))  # without the optimizer's state: it lags behind
    Array([1.800], dtype=float32)
    """
    return _forward("forward", fn, tx, averaged, strict)


def _forward(owner: str, fn: Callable[..., Any], tx: Any, averaged: bool, strict: bool) -> Any:
    tx = as_transform(tx)

    @takes_state(fn)
    def function(params: Tree, state: Any, /, *args: Any, **kwargs: Any) -> Any:
        parts = _exact_parts(owner, tx, state, params)
        bounds = [part.tx.bind(part.state, part.params) for part in parts]
        if averaged:
            leaves, treedef = flatten(params)
            tables = {table.leaf_index for bound in bounds for table in bound.tables}
            # `results_of` averages the rows that `fn` reads, so tables stay as they are here.
            others = treedef.unflatten([None if i in tables else p for i, p in enumerate(leaves)])
            averages = flatten(unchecked_averaged_weights(state, others))[0]
            params = treedef.unflatten(
                [leaves[i] if i in tables else average for i, average in enumerate(averages)]
            )
        if not bounds:
            return fn(params, *args, **kwargs)
        up_to_date_fn = results_of(owner, fn, bounds, strict=strict, averaged=averaged)
        return up_to_date_fn(params, *args, **kwargs)

    return function


def eval_step(
    fn: Callable[Concatenate[P, Args], Result],
    tx: Any,
    *,
    averaged: bool = False,
    strict: bool = False,
    **jit_options: Any,
) -> EvalStep[P, Args, Result]:
    """`forward` under `jit`: evaluates a function with weights that are up to date.

    It takes what the steps of `train_step` take, returns what `fn` returns, and donates nothing.

    Args:
      fn: `fn(params, *args, **kwargs)` returns any tree of arrays: a loss, predictions, metrics.
      tx: the optimizer, adamjax's or optax's, whose state is passed.
      averaged, strict: as in `forward`.
      **jit_options: further arguments of `jax.jit`, such as `static_argnames`. `static_argnums`
        count the argument `state`, so they are one higher than in `fn`.

    Returns:
      A function `(params, state, /, *args, **kwargs)` that returns what `fn` returns. It has the
      attributes of functions of `jax.jit`, such as `lower`.

    Raises:
      ValueError, TypeError: by the step, as by `forward`.
      TypeError: by the step: a leaf of params is not an array, such as a function in a whole model.

    >>> import adamjax, jax.numpy as jnp
    >>> def loss(params, ids):
    ...     return jnp.mean(params["table"][ids] ** 2)
    >>> params = {"table": jnp.ones((1000, 2))}
    >>> tx = adamjax.exact_rows(adamjax.adam(0.1), "table")
    >>> state, step = tx.init(params), adamjax.train_step(loss, tx)
    >>> evaluate = adamjax.eval_step(loss, tx)
    >>> for ids in ([3], [5]):
    ...     params, state, value = step(params, state, jnp.array(ids))
    >>> print(f"{evaluate(params, state, jnp.array([3])):.4f}")  # row 3 moved in both steps
    0.6939
    """
    return EvalStep(
        "eval_step", jax.jit(_forward("eval_step", fn, tx, averaged, strict), **jit_options)
    )
