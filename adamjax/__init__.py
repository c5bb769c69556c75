"""Adam, AMSGrad and Adamax for JAX as pure functions, exact to the documents in every dtype."""

from adamjax import convert
from adamjax.adam import (
    ScaleByAdamaxState,
    ScaleByAdamState,
    ScaleByAmsgradState,
    scale_by_adam,
    scale_by_adamax,
    scale_by_amsgrad,
)
from adamjax.autodiff import grad, value_and_grad
from adamjax.average import WeightEmaState, weight_ema
from adamjax.buckets import Joined
from adamjax.clip import clip_by_global_norm, clip_by_norm, clip_by_value, global_norm
from adamjax.config import from_config, to_config
from adamjax.exact import ExactRowsState, StaleTable, Ticket, exact_rows
from adamjax.grouping import grouped
from adamjax.guard import (
    AccumulateGradientsState,
    SkipNotFiniteState,
    accumulate_gradients,
    skip_not_finite,
)
from adamjax.hyperparams import HyperparamsState, set_hyperparams, with_hyperparams
from adamjax.layout import Packing, formats, packing, row_major
from adamjax.leaves import apply_updates
from adamjax.masking import masked, partition
from adamjax.optimizers import adam, adamax, adamw, amsgrad, nadam
from adamjax.paths import optional
from adamjax.reading import (
    averaged_weights,
    get_slot,
    learning_rate,
    skipped_steps,
    slot_names,
    step_count,
)
from adamjax.replicas import sum_over
from adamjax.rows import RowGradient, row_gradient
from adamjax.scaling import ScheduleState, add_decayed_weights, scale, scale_by_learning_rate
from adamjax.schedule import (
    Schedule,
    by_path,
    constant,
    cosine_decay,
    exponential_decay,
    inverse_time_decay,
    piecewise_constant,
    polynomial_decay,
    warmup,
)
from adamjax.sharding import ShardedState, shard_state, state_shardings
from adamjax.training import train_step
from adamjax.transform import Transform, chain, identity

# In the order of a pipeline.
__all__ = [
    # a pipeline and its parts
    "chain",
    "identity",
    "masked",
    "partition",
    "optional",
    "apply_updates",
    "Transform",
    # gradients
    "clip_by_value",
    "clip_by_norm",
    "clip_by_global_norm",
    "global_norm",
    "value_and_grad",
    "grad",
    "row_gradient",
    "RowGradient",
    "sum_over",
    # rules
    "scale_by_adam",
    "ScaleByAdamState",
    "scale_by_amsgrad",
    "ScaleByAmsgradState",
    "scale_by_adamax",
    "ScaleByAdamaxState",
    # scalings
    "add_decayed_weights",
    "scale",
    "scale_by_learning_rate",
    "ScheduleState",
    # rates
    "Schedule",
    "constant",
    "inverse_time_decay",
    "exponential_decay",
    "piecewise_constant",
    "polynomial_decay",
    "cosine_decay",
    "warmup",
    "by_path",
    # weights
    "weight_ema",
    "WeightEmaState",
    "averaged_weights",
    # when a step is taken
    "accumulate_gradients",
    "AccumulateGradientsState",
    "skip_not_finite",
    "SkipNotFiniteState",
    # tables
    "exact_rows",
    "ExactRowsState",
    "Ticket",
    "StaleTable",
    "row_major",
    "formats",
    "packing",
    "Packing",
    # thousands of small leaves
    "grouped",
    "Joined",
    # many devices
    "shard_state",
    "ShardedState",
    "state_shardings",
    # complete optimizers
    "adam",
    "amsgrad",
    "adamw",
    "adamax",
    "nadam",
    # a step, and setting hyperparameters between steps
    "train_step",
    "with_hyperparams",
    "HyperparamsState",
    "set_hyperparams",
    # as JSON
    "to_config",
    "from_config",
    "convert",
    # reading a state
    "get_slot",
    "slot_names",
    "step_count",
    "learning_rate",
    "skipped_steps",
]
