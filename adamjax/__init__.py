"""Adam and its relatives for JAX as pure functions, with the arithmetic of Keras' documentation."""

from adamjax import convert, extend, layout, states, testing
from adamjax.adam import scale_by_adam, scale_by_adamax, scale_by_amsgrad
from adamjax.autodiff import grad, value_and_grad
from adamjax.average import weight_ema
from adamjax.chain import chain, identity
from adamjax.clip import clip_by_global_norm, clip_by_norm, clip_by_value, global_norm
from adamjax.config import from_config, to_config
from adamjax.exact import exact_rows
from adamjax.grouping import grouped
from adamjax.guard import accumulate_gradients, skip_not_finite
from adamjax.hyperparams import set_hyperparams, with_hyperparams
from adamjax.leaves import apply_updates
from adamjax.masking import masked, partition
from adamjax.master import master_weights
from adamjax.optimizers import adam, adamax, adamw, amsgrad, nadam
from adamjax.paths import optional
from adamjax.reading import (
    averaged_weights,
    float32_weights,
    get_slot,
    learning_rate,
    skipped_steps,
    slot_names,
    step_count,
)
from adamjax.replicas import sum_over
from adamjax.rows import RowGradient, row_gradient
from adamjax.scaling import add_decayed_weights, scale, scale_by_learning_rate, set_to_zero
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
from adamjax.sharding import shard_state, state_shardings
from adamjax.training import eval_step, forward, train_step
from adamjax.transform import Transform

__version__ = "0.1.0"

# By topic.
__all__ = [
    # chains and their parts
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
    "scale_by_amsgrad",
    "scale_by_adamax",
    # scalings
    "add_decayed_weights",
    "scale",
    "scale_by_learning_rate",
    "set_to_zero",
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
    "master_weights",
    "averaged_weights",
    "float32_weights",
    # when a step is taken
    "accumulate_gradients",
    "skip_not_finite",
    # tables
    "exact_rows",
    # thousands of small leaves
    "grouped",
    # many devices
    "shard_state",
    "state_shardings",
    # complete optimizers
    "adam",
    "amsgrad",
    "adamw",
    "adamax",
    "nadam",
    # a step, evaluation, and setting hyperparameters between steps
    "train_step",
    "eval_step",
    "forward",
    "with_hyperparams",
    "set_hyperparams",
    # transforms as JSON
    "to_config",
    "from_config",
    # reading a state
    "get_slot",
    "slot_names",
    "step_count",
    "learning_rate",
    "skipped_steps",
    # modules
    "convert",
    "extend",
    "layout",
    "states",
    "testing",
]


def __getattr__(name: str) -> object:
    for module in (states, layout):
        if name in module.__all__:
            raise AttributeError(f"adamjax.{name} is {module.__name__}.{name}")
    raise AttributeError(f"module 'adamjax' has no attribute {name!r}")
