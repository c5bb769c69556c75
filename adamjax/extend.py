"""What you need to write a rule or another transform of your own.

A transform is a class with `init` and `update`; its annotated fields are its hyperparameters. A
rule is best written with a function of arrays, `(c, g, *slots) -> (u, *slots)`, which `lift`
applies to trees. `c` has the scalars of this step, as `scalars(dtype)` returns them; `g` is the
gradient, `u` the update. `lift` checks all trees before it computes, leaves alone `None` and
integer leaves, applies the function to the rows of row gradients, and keeps every slot in its
dtype. `adamjax.testing.check` tests the transform. Momentum, as an example (only `exact_rows` needs
its `coast` and `momentum_coefficient`):

>>> from typing import Any, NamedTuple
>>> import adamjax, jax.numpy as jnp
>>> from adamjax import extend
>>> @extend.transform_state("m")
... class MomentumState(NamedTuple):
...     count: Any
...     m: Any
>>> def new_m(average, g, m):
...     return (average(m, g),)
>>> def direction(average, g, m):
...     return m
>>> momentum_rule = extend.Recurrence(new_m, direction)
>>> class momentum(extend.Rule):
...     b: extend.Number = 0.9
...     rows: extend.Rows = extend.static(default="dense", kw_only=True)
...
...     def __post_init__(self):
...         self.check_range("b", extend.BETA)
...         self.check_rows()
...
...     def init(self, params):
...         def zeros(p):
...             return extend.widen(jnp.zeros_like(p), extend.compute_dtype(p.dtype))
...         return MomentumState(jnp.zeros((), jnp.int32), extend.new_slots(params, zeros))
...
...     def check_state(self, state):
...         extend.expect_state(self, state, MomentumState)
...         extend.expect_wide("momentum", "m", state.m)
...
...     def update(self, updates, state, params=None, **extra_args):
...         self.check_state(state)
...         def scalars(real):
...             return extend.averaging(self.b, real)
...         slots = (state.m,)
...         u, m = extend.lift("momentum", momentum_rule, scalars, updates, slots, rows=self.rows)
...         return u, MomentumState(extend.next_count(state.count), m)
...
...     def coast(self):
...         return extend.Coast(self.b, size=None, decays=(("m", self.b),))
...
...     def momentum_coefficient(self, state, real):
...         return extend.scalar(1.0, real)
>>> tx = adamjax.chain(momentum(0.5), adamjax.scale_by_learning_rate(0.1))
>>> state = tx.init({"w": jnp.zeros(2)})
>>> updates, state = tx.update({"w": jnp.array([4.0, -2.0])}, state)
>>> updates, adamjax.get_slot(state, "m")
({'w': Array([-0.2,  0.1], dtype=float32)}, {'w': Array([ 2., -1.], dtype=float32)})

Base classes:

- `Transform`: any transform. A subclass has `init` and `update`. `check_state` may refuse a state
  that does not fit. Flags and methods tell `exact_rows`, `grouped` and `chain` its properties.
- `Stateless`: a transform whose state is `()`.
- `Scaling`: multiplies each leaf by a scalar; has `factors` in place of `update`.
- `Rule`: turns gradients into a direction, element by element. With `coast` and
  `momentum_coefficient`, which describe how it moves rows without a gradient, it works under
  `exact_rows`.

Fields:

- `static`: a field that is not a leaf of the transform's tree, for flags, names and dtypes.
- `Number`: the type of a hyperparameter. A Python float is a compile-time constant, an array is
  data. `Rate`: the type of a rate, which is a number, a function of the count, or `by_path`.
  `Rows`: the type of `rows=`, which is "dense" or "lazy"; `self.check_rows()` in `__post_init__`
  refuses other values. (In `lift` also "whole": the function is not elementwise and gets a
  `RowGradient` as it is.)
- `BETA`, `UNIT`, `POSITIVE`, `NON_NEGATIVE`, `FINITE`, `COUNT`: the ranges for `check_range`;
  `Range` makes another.
- `as_rate` returns a checked rate, for `self.set_fields` in `__post_init__`; `rate_at` returns the
  value of a rate at a count.

States:

- `transform_state`: declares a named tuple and its slots, which `get_slot` and `exact_rows` see.
- `new_slots`: a tree of one new array for each floating leaf.
- `next_count`: the count after this step. `step_number`: the number of this step, 1 for the first.
- `expect_state` refuses a state of another transform; `expect_empty`, any state but `()`;
  `expect_wide`, slots that were cast to fewer bits.

Trees:

- `lift` applies a function of arrays to trees; `no_scalars` is for a function without scalars.
- `needed`: the parameters, or an error that says that they are needed.
- `flatten`, `leaf_paths`: the leaves of a tree, `None` and row gradients among them; their paths.
- `is_left_alone`: whether no transform touches a leaf.

Arithmetic on arrays, in the compute dtype:

- `Recurrence`: a function for `lift` that computes the new slots, and the update from them.
- `compute_dtype`: the real dtype to compute in, float32 or float64. `widen` casts an array to it.
- `scalar`: a hyperparameter in that dtype. `positive_epsilon`: an epsilon in that dtype, for a
  division whose divisor could otherwise be 0.
- `averaging`: an exponential average, `(old, new)`. `correction`: its bias correction, made from
  what `step_number` returns.
- `root`: the square root, with the derivative 0 at 0. `square`: `|x|**2`, also of complex numbers.
- `Coast`: how a rule moves rows that have no gradient.
- `times`: multiplies a rule's scalars by the factors that `Rule.step` is given.
"""

from adamjax.coasting import Coast
from adamjax.data import (
    BETA,
    COUNT,
    FINITE,
    NON_NEGATIVE,
    POSITIVE,
    UNIT,
    Number,
    Range,
    static,
    transform_state,
)
from adamjax.leaves import (
    Rows,
    expect_wide,
    is_left_alone,
    lift,
    needed,
    new_slots,
    no_scalars,
)
from adamjax.moments import (
    Recurrence,
    averaging,
    compute_dtype,
    correction,
    next_count,
    positive_epsilon,
    root,
    scalar,
    square,
    step_number,
    widen,
)
from adamjax.paths import flatten, leaf_paths
from adamjax.schedule import Rate, as_rate, rate_at
from adamjax.transform import (
    Rule,
    Scaling,
    Stateless,
    Transform,
    expect_empty,
    expect_state,
    times,
)

__all__ = [
    "BETA",
    "COUNT",
    "FINITE",
    "NON_NEGATIVE",
    "POSITIVE",
    "UNIT",
    "Coast",
    "Number",
    "Range",
    "Rate",
    "Recurrence",
    "Rows",
    "Rule",
    "Scaling",
    "Stateless",
    "Transform",
    "as_rate",
    "averaging",
    "compute_dtype",
    "correction",
    "expect_empty",
    "expect_state",
    "expect_wide",
    "flatten",
    "is_left_alone",
    "leaf_paths",
    "lift",
    "needed",
    "new_slots",
    "next_count",
    "no_scalars",
    "positive_epsilon",
    "rate_at",
    "root",
    "scalar",
    "square",
    "static",
    "step_number",
    "times",
    "transform_state",
    "widen",
]
