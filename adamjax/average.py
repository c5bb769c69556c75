"""The transform that keeps an exponential average of the weights."""

from typing import Any, NamedTuple

import chex
import jax.numpy as jnp

from adamjax.data import COUNT, UNIT, Number, Tree, is_array, transform_state
from adamjax.leaves import expect_wide, lift, needed, new_slots
from adamjax.moments import (
    Average,
    add_update,
    as_count,
    averaging,
    compute_dtype,
    next_count,
    widen,
    widened_dtype,
)
from adamjax.transform import Step, Transform, expect_state

__all__ = ["WeightEmaState", "weight_ema"]


@transform_state("average", rule=False)
class WeightEmaState(NamedTuple):
    """State of `weight_ema`.

    Attributes:
      count: int32, the number of steps taken; it stops at the largest int32.
      average: tree like the parameters, in float32 or wider. Before the first step, these are the
        weights.

    >>> import adamjax, jax.numpy as jnp
    >>> adamjax.weight_ema(0.9).init(jnp.ones(1)).average
    Array([1.], dtype=float32)
    """

    count: chex.Array
    average: Tree


class _Scalars(NamedTuple):
    """The scalars of a step.

    Attributes:
      averaging: the function `(old average, weights) -> average`.
      overwrites: whether this step sets the weights to the average; `None` if no step does.
    """

    averaging: Average
    overwrites: Any


def _averaged(
    c: _Scalars, u: chex.Array, average: chex.Array, p: chex.Array
) -> tuple[chex.Array, ...]:
    """The update and the new average. If the step overwrites, the update moves p to the average."""
    real = compute_dtype(u.dtype, average.dtype)
    new_average = c.averaging(widen(average, real), widen(add_update(p, u), real))
    if c.overwrites is not None:
        u = jnp.where(c.overwrites, (new_average - widen(p, real)).astype(u.dtype), u)
    return u, new_average.astype(average.dtype)


class weight_ema(Transform):
    """Averages the weights: `average = momentum * average + (1 - momentum) * weights`.

    The average starts as the initial weights. Each step updates it with the weights after the step.
    Read it with `averaged_weights`. The transform must be last in a chain, and `update` needs
    `params`. This is the option `use_ema` of TensorFlow's and Keras' optimizers (Polyak & Juditsky,
    1992), and `averaged_weights` replaces `finalize_variable_values`. In Keras 3 the average is
    zero at first, and the first step sets it to the weights after that step.

    Args:
      momentum: the weight of the old average, in [0, 1]. (If it is an array that is traced, or set
        later by `set_hyperparams`, a value outside makes the average NaN.)
      overwrite_frequency: each step whose number is a multiple of this sets the weights to the
        average; a whole number of at least 1. `None`: never. (If it is an array that is traced, or
        set later by `set_hyperparams`, a value below 1 makes the average and the weights NaN.)

    If weights are rounded stochastically (`apply_updates(rounding="stochastic")`), the average is
    computed before that, from weights rounded to the nearest. If an update is so small that
    rounding to the nearest loses it, the average gets the weight from before the step, and is one
    step behind.

    If the gradient of a leaf is `None`, the step changes neither its average nor its weights.
    (Keras updates the average, and overwrites weights, also without a gradient.)

    The state is a `WeightEmaState`.

    >>> import adamjax, jax.numpy as jnp
    >>> tx = adamjax.chain(adamjax.scale(-1.0), adamjax.weight_ema(0.75))
    >>> p = jnp.array(0.0)
    >>> state = tx.init(p)
    >>> updates, state = tx.update(jnp.array(-4.0), state, p)
    >>> adamjax.apply_updates(p, updates), adamjax.averaged_weights(state)
    (Array(4., dtype=float32), Array(1., dtype=float32))
    """

    momentum: Number = 0.99
    overwrite_frequency: Number | None = None

    groupable = True

    def __post_init__(self) -> None:
        self.check_range("momentum", UNIT)
        if self.overwrite_frequency is not None:
            self.check_range("overwrite_frequency", COUNT)

    @property
    def must_be_last(self) -> bool:
        return True

    def init(self, params: Tree) -> WeightEmaState:
        def start(p: chex.Array) -> chex.Array:
            return jnp.array(p, widened_dtype(p.dtype, compute_dtype(p.dtype)), copy=True)

        return WeightEmaState(jnp.zeros((), jnp.int32), new_slots(params, start))

    def check_state(self, state: Any) -> None:
        expect_state(self, state, WeightEmaState)
        expect_wide("weight_ema", "average", state.average)

    def update(self, updates: Tree, state: Any, params: Tree = None, **extra_args: Any) -> Step:
        self.check_state(state)
        params = needed("weight_ema", params)
        count = next_count(state.count)
        if self.overwrite_frequency is None:
            frequency = overwrites = None
        else:
            name = "weight_ema: overwrite_frequency"
            frequency = as_count(name, self.overwrite_frequency, count.dtype)
            overwrites = count % jnp.maximum(frequency, 1) == 0

        def scalars(real: Any) -> _Scalars:
            average = averaging(self.momentum, real, UNIT)
            if frequency is not None and is_array(self.overwrite_frequency):
                # An array may be traced, so a wrong frequency makes the average NaN.
                weight = jnp.where(frequency >= 1, average.weight, jnp.nan)
                average = average._replace(weight=weight)
            return _Scalars(average, overwrites)

        updates, average = lift(
            "weight_ema",
            _averaged,
            scalars,
            updates,
            slots=(state.average,),
            params=params,
        )
        return updates, WeightEmaState(count, average)
