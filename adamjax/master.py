"""Float32 weights in the state, for models whose weights are bfloat16 or float16."""

from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

from adamjax.data import Tree, transform_state
from adamjax.leaves import apply_updates, dtype_of, expect_like, is_left_alone, needed, new_slots
from adamjax.mesh import gather_rows
from adamjax.moments import compute_dtype, widen, widened_dtype
from adamjax.paths import flatten
from adamjax.rows import RowGradient, RowMoves, with_seal
from adamjax.structure import Part, find
from adamjax.transform import Step, Transform, as_transform, expect_state

__all__ = ["MasterWeightsState", "master_weights"]


@transform_state("weights", rule=False)
class MasterWeightsState(NamedTuple):
    """State of `master_weights`.

    Attributes:
      weights: a tree like the parameters. It has a float32 weight for each parameter that is
        narrower than float32, and `None` for every other one.
      inner: the state of the inner transform.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.master_weights(adamjax.scale(-1.0))
    >>> tx.init({"w": jnp.ones(2, jnp.bfloat16), "b": jnp.ones(2)}).weights
    {'b': None, 'w': Array([1., 1.], dtype=float32)}
    """

    weights: Tree
    inner: Any


# The advice of errors about the state's weights.
_ADVICE = "pass the parameters that belong to the state, or make a new state with init"


def _wide_dtype(p: Any) -> Any:
    """The dtype in which steps compute with a parameter."""
    return widened_dtype(dtype_of(p), compute_dtype(dtype_of(p)))


def _is_narrow(p: Any) -> bool:
    """Whether a parameter is a float narrower than float32. If so, the state has its weight."""
    return not is_left_alone(p) and dtype_of(p) != _wide_dtype(p)


class master_weights(Transform):
    """Updates float32 weights with `tx`; narrow parameters are these weights, rounded.

    The neighbours of a bfloat16 weight of 1 are 0.996 and 1.008, so an update of 0.001 has no
    effect on it. Here the update moves a float32 weight in the state, and the parameter follows it
    as soon as the sum of updates is large enough. Weight decay, averages of weights and everything
    else in `tx` see the float32 weights, and float32 gradients. (Micikevicius et al., Mixed
    precision training, arXiv:1710.03740, section 3.1.)

    Put it around a whole optimizer, such as `adamw(1e-3)` or `exact_rows(adam(1e-3), "table")`.
    `skip_not_finite` and `shard_state` go around it: `skip_not_finite(master_weights(tx))`,
    `shard_state(master_weights(tx), mesh, axis)`. With `exact_rows`, `train_step` reads rows from
    the float32 weights.

    float16 gradients may overflow, mostly where the loss is scaled. With `skip_not_finite` around
    it, such a step changes nothing; without it, weights become NaN and stay NaN. A float16
    parameter whose weight is beyond 65504 is infinite. If the weight later falls below that, the
    parameter becomes NaN, because infinity plus an update is never a finite number. To repair the
    parameter, copy its weight from the state: `weights.astype(p.dtype)`.

    If you change a narrow parameter yourself, such as by a projection, the next step undoes the
    change: also change its weight in the state, `state._replace(weights=...)`.

    Args:
      tx: a whole optimizer.

    The state is a `MasterWeightsState`. Updates of narrow parameters are float32: the difference
    between the rounded weight and the parameter. So the result of `apply_updates`, of
    `optax.apply_updates` and of `p + u` is the rounded weight. (If a weight becomes more than
    30,000 times smaller in one step, the parameter may differ from the rounded weight by the
    rounding of that sum; the next step corrects it.)

    Raises:
      ValueError: by `update`: the state belongs to other parameters.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.master_weights(adamjax.scale(-0.001))
    >>> p, g = jnp.ones((), jnp.bfloat16), jnp.ones((), jnp.bfloat16)
    >>> state = tx.init(p)
    >>> for _ in range(10):
    ...     updates, state = tx.update(g, state, p)
    ...     p = adamjax.apply_updates(p, updates)
    >>> p, state.weights
    (Array(0.988281, dtype=bfloat16), Array(0.99, dtype=float32))
    """

    tx: Transform

    groupable = False
    goes_around_exact_rows = True

    def __post_init__(self) -> None:
        self.set_fields(tx=as_transform(self.tx))

    @property
    def must_be_last(self) -> bool:
        return True

    @property
    def has_wide_updates(self) -> bool:
        return True

    def part_states(self, state: Any) -> tuple[Any, ...]:
        expect_state(self, state, MasterWeightsState)
        return (state.inner,)

    def children(self, state: Any, params: Tree) -> tuple[Part, ...]:
        if state is None or params is None:
            return super().children(state, params)
        expect_state(self, state, MasterWeightsState)
        return (Part(self.tx, state.inner, self._wide_params(state, params)),)

    def init(self, params: Tree) -> MasterWeightsState:
        def widened_copy(p: chex.Array) -> Any:
            return jnp.array(p, _wide_dtype(p), copy=True)

        leaves, treedef = flatten(params)
        narrow = treedef.unflatten([p if _is_narrow(p) else None for p in leaves])
        weights = new_slots(narrow, widened_copy)
        wide = [p if w is None else w for p, w in zip(leaves, flatten(weights)[0], strict=True)]
        return MasterWeightsState(weights, self.tx.init(treedef.unflatten(wide)))

    def _wide_params(self, state: MasterWeightsState, params: Tree) -> Tree:
        """The parameters with the state's weights in place of narrow ones."""
        leaves, treedef = flatten(params)

        def expected(p: Any) -> Any:
            return jax.ShapeDtypeStruct(np.shape(p), _wide_dtype(p)) if _is_narrow(p) else None

        like = treedef.unflatten(map(expected, leaves))
        expect_like("master_weights", "the state's weights", state.weights, like, _ADVICE)
        pairs = zip(leaves, flatten(state.weights)[0], strict=True)
        return treedef.unflatten([p if w is None else w for p, w in pairs])

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        expect_state(self, state, MasterWeightsState)
        params = needed("master_weights", params)
        wide_params = self._wide_params(state, params)
        leaves, treedef = flatten(params)
        weights = flatten(state.weights)[0]

        def widened_gradient(g: Any, w: Any) -> Any:
            if w is None or is_left_alone(g):
                return g
            return g.astype(w.dtype) if isinstance(g, RowGradient) else jnp.asarray(g, w.dtype)

        grads, grads_treedef = flatten(updates)
        if len(grads) == len(leaves):  # else tx refuses the gradients, by a leaf's path
            grads = [widened_gradient(g, w) for g, w in zip(grads, weights, strict=True)]
        wide_updates, inner = self.tx.update(
            grads_treedef.unflatten(grads), state.inner, wide_params, **extra_args
        )
        # The inner updates move the state's weights, and the parameters follow the weights.
        new_updates = flatten(wide_updates)[0]
        narrow = [i for i, w in enumerate(weights) if w is not None]
        moved = apply_updates([weights[i] for i in narrow], [new_updates[i] for i in narrow])
        for i, w in zip(narrow, moved, strict=True):
            new_updates[i] = _difference(new_updates[i], leaves[i], w)
            weights[i] = w
        new_state = MasterWeightsState(treedef.unflatten(weights), inner)
        return treedef.unflatten(new_updates), new_state

    def flush(self, params: Tree, state: Any, *, axis: Any = None) -> tuple[Any, Any]:
        """Brings all rows of all tables up to date, if `tx` is an `exact_rows`.

        Args:
          params, state, axis: as for `exact_rows.flush`.

        Returns:
          The parameters and the state to go on with.

        Raises:
          TypeError: `tx` is not itself an `exact_rows`. Put other transforms inside `exact_rows`.
        """
        expect_state(self, state, MasterWeightsState)
        if not hasattr(self.tx, "flush"):
            if any(hasattr(part.tx, "flush") for part in find(Transform, self.tx)):
                raise TypeError(
                    "master_weights: flush needs exact_rows directly inside, got "
                    f"{type(self.tx).__name__} around it: write master_weights(exact_rows(...)), "
                    "with the other transforms inside exact_rows"
                )
            raise TypeError(f"master_weights: {self.tx!r} has no flush: no rows lag behind")
        wide_params = self._wide_params(state, params)
        flushed_params, inner = self.tx.flush(wide_params, state.inner, axis=axis)
        leaves, treedef = flatten(params)
        weights = flatten(state.weights)[0]
        for i, flushed in enumerate(flatten(flushed_params)[0]):
            if weights[i] is None:
                leaves[i] = flushed
            else:
                weights[i], leaves[i] = flushed, flushed.astype(dtype_of(leaves[i]))
        return treedef.unflatten(leaves), MasterWeightsState(treedef.unflatten(weights), inner)


def _difference(u: Any, p: chex.Array, weights: chex.Array) -> Any:
    """The update that moves a parameter to the new weights, rounded to its dtype.

    Args:
      u: the update of the inner transform. If it has only some rows, the result has the same.
      p: the parameter.
      weights: the new weights.
    """
    if isinstance(u, RowMoves):
        return RowMoves(tuple(_difference(part, p, weights) for part in u.parts))
    # A row gradient with a `rest` moves every row, so its result is an array.
    if isinstance(u, RowGradient) and u.rest is None:
        p, weights = (gather_rows(x, u.indices, mode="fill", fill_value=0) for x in (p, weights))
        return with_seal(u.replace(values=_difference(None, p, weights)))
    return widen(weights.astype(p.dtype), weights.dtype) - widen(p, weights.dtype)
