"""The classes of states and of the objects in them, and the helper classes of `exact_rows`.

A state is a named tuple, so a checkpoint library stores it as it is, and its fields are read by
name. Programs rarely need these classes: `get_slot`, `step_count`, `averaged_weights` and the other
readers find slots, counts and averages anywhere in a state.

>>> import adamjax, jax.numpy as jnp
>>> state = adamjax.scale_by_adam().init(jnp.zeros(3))
>>> isinstance(state, adamjax.states.ScaleByAdamState), state.slots
(True, ('m', 'v'))
"""

from adamjax.adam import ScaleByAdamaxState, ScaleByAdamState, ScaleByAmsgradState
from adamjax.average import WeightEmaState
from adamjax.buckets import Bucketed
from adamjax.encoding import Scaled8
from adamjax.exact import ExactRowsState, StaleTable, Ticket
from adamjax.guard import AccumulateGradientsState, SkipNotFiniteState
from adamjax.hyperparams import HyperparamsState
from adamjax.master import MasterWeightsState
from adamjax.scaling import ScheduleState
from adamjax.sharding import ShardedState

__all__ = [
    "AccumulateGradientsState",
    "Bucketed",
    "ExactRowsState",
    "HyperparamsState",
    "MasterWeightsState",
    "ScaleByAdamState",
    "ScaleByAdamaxState",
    "ScaleByAmsgradState",
    "Scaled8",
    "ScheduleState",
    "ShardedState",
    "SkipNotFiniteState",
    "StaleTable",
    "Ticket",
    "WeightEmaState",
]
