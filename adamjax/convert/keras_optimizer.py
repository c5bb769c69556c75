"""Reads what a Keras optimizer shows of itself: its class, options, rate, clips and decays."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.convert.differences import is_product, nadam_product
from adamjax.convert.keras_config import (
    CLIPS,
    effective_clips,
    from_keras_config,
    is_of_keras,
    why_inexact,
)
from adamjax.convert.keras_variables import Layout, plain_name
from adamjax.convert.schedules import ForeignSchedule
from adamjax.convert.source import Hyperparams, Source
from adamjax.convert.systems import KINDS
from adamjax.convert.values import class_name, number_of, numbers_of
from adamjax.schedule import inverse_time_decay

__all__ = [
    "FORGETS_PRODUCT",
    "doubt_class",
    "doubt_left_out",
    "doubt_lost_product",
    "doubt_options",
    "hyperparams_of_each",
    "kinds_of",
]

# Keras' optimizers that can be converted, by their plain names, and the kinds of their rules.
# `AdamMultilr` is a class of the package capreolus; it is recognized only by the names of its
# variables.
_OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adam": ("adam", "amsgrad"),
    "adamw": ("adam", "amsgrad"),
    "adammultilr": ("adam", "amsgrad"),
    "adamax": ("adamax",),
    "nadam": ("nadam",),
}
# Options of a Keras optimizer, and the hyperparameters of a rule that they correspond to.
_OPTIONS = {"beta_1": "b1", "beta_2": "b2", "epsilon": "eps", "weight_decay": "weight_decay"}
# Keras 3 lists the variables that an optimizer sets as attributes, but not of one in another's
# build. So the states that fit passes from step to step lack Nadam's product.
FORGETS_PRODUCT = "in a LossScaleOptimizer, fit under JAX forgets this product after each step"


def doubt_class(source: Source, optimizer: Any) -> None:
    """Adds a doubt about an optimizer that is none of `_OPTIMIZERS`."""
    if is_of_keras(optimizer) and plain_name(type(optimizer).__name__) in _OPTIMIZERS:
        return
    fix = "Other states cannot be converted: start anew with tx.init(params)"
    if hasattr(optimizer, "inner_optimizer"):
        fix = "Convert its inner_optimizer"
    elif hasattr(optimizer, "optimizers"):
        fix = "Convert each of its optimizers by itself, with the leaves that it trains as params"
    elif hasattr(optimizer, "optimizer"):
        fix = "Pass its optimizer"
    source.doubts.append(
        f"the optimizer is a {class_name(optimizer)}: expected Keras' Adam, AdamW, Adamax or "
        f"Nadam. {fix}"
    )


def doubt_lost_product(source: Source, optimizer: Any, count: int) -> None:
    """Adds a doubt if Keras has lost the product of Nadam's momenta, which is no variable of it."""
    product = numbers_of(source.owner, "_u_product of the optimizer", optimizer._u_product)
    if not is_product(product, optimizer.beta_1, count):
        right = nadam_product(optimizer.beta_1, count)
        source.doubts.append(
            "this Nadam keeps the product of its momenta outside of its variables, and has lost "
            f"it: it is {float(product):g} after {count} steps, and {right:g} would be right "
            f"({FORGETS_PRODUCT}). adamjax goes on with the right product, not as Keras would"
        )


def kinds_of(source: Source, layout: Layout, optimizer: Any, has_product: bool) -> tuple[str, ...]:
    """The kinds of rules that may have these variables, by the optimizer's class or name."""
    if optimizer is not None:
        return _OPTIMIZERS.get(plain_name(type(optimizer).__name__), KINDS)
    if layout.names is None:
        # The variables of Keras 3's Nadam contain the product. Those of tf_keras' Nadam do not, so
        # they are recognized by name only.
        return ("nadam",) if has_product else ("adam", "amsgrad", "adamax")
    if not layout.doubtful:
        return KINDS
    if plain_name(layout.optimizer) in _OPTIMIZERS:
        return _OPTIMIZERS[plain_name(layout.optimizer)]
    fault = (
        f"the variables are those of an optimizer that is named {layout.optimizer!r}"
        if layout.optimizer
        else "the names of the variables do not contain that of their optimizer"
    )
    source.doubts.append(
        f"{fault}: expected names that begin with the name of Adam, AdamW, Adamax or Nadam, such "
        "as 'adam/dense_kernel_momentum' (without it, RMSprop and Lamb have the same names): pass "
        "the optimizer itself in place of its variables, or pairs (v.path, array)"
    )
    return KINDS


def doubt_options(
    source: Source, optimizer: Any, layout: Layout, paths: Sequence[str | None]
) -> None:
    """Adds doubts about options of the optimizer, and about options of its variables.

    The options of the optimizer may have changed after it was built. The options of a variable are
    `constraint` and `overwrite_with_gradient`.
    """
    roles = {role for role, _ in layout.roles}
    for name, role in (("use_ema", "average"), ("amsgrad", "velocity_hat")):
        if getattr(optimizer, name, role in roles) != (role in roles):
            source.doubts.append(
                f"{name} of the optimizer is {getattr(optimizer, name)!r}, but it "
                f"{'has' if role in roles else 'lacks'} the variables for it: build an optimizer "
                "with the right option"
            )
    params: Any = getattr(optimizer, "_trainable_variables", None) or ()
    for param, path in zip(params, paths, strict=False):
        for name in ("constraint", "overwrite_with_gradient"):
            if path is not None and getattr(param, name, None):
                source.doubts.append(
                    f"the variable of {path!r} has {name}={getattr(param, name)!r}, which Keras "
                    "applies in each step and no transform here does: do the same after "
                    "apply_updates"
                )


def doubt_left_out(
    source: Source,
    optimizer: Any,
    paths: Sequence[str | None],
    averages: Mapping[int, np.ndarray],
) -> None:
    """Adds doubts about variables that `order` leaves out, but that affect the others or move."""
    params: Any = getattr(optimizer, "_trainable_variables", None) or ()
    for i, (param, path) in enumerate(zip(params, paths, strict=False)):
        if path is not None:
            continue
        name = getattr(param, "path", param.name)
        if getattr(param, "trainable", True):
            if getattr(optimizer, "global_clipnorm", None):
                source.doubts.append(
                    "the optimizer clips gradients by the norm of all its variables "
                    f"(global_clipnorm), but order= leaves out {name!r}: convert all variables"
                )
        elif i in averages and not np.array_equal(averages[i], np.asarray(param.value)):
            source.doubts.append(
                f"the optimizer averages {name!r} (use_ema) although it has trainable=False, but "
                "order= leaves it out: name its leaf in order= too, and put masked(set_to_zero(), "
                "...) before weight_ema"
            )


def hyperparams_of_each(
    owner: str, optimizer: Any, layout: Layout, values: Sequence[np.ndarray], num_params: int
) -> list[Hyperparams]:
    """The hyperparameters of each parameter, from the optimizer itself or else from its variables.

    `expect_same_hyperparameters` describes the keys.
    """
    hyperparams: Hyperparams = {"others": "before" if optimizer is None else "none"}
    rate = layout.of("learning_rate", values).get(0)
    if rate is not None:
        hyperparams["learning_rate"] = number_of(owner, "the learning rate", rate)
    if optimizer is not None:
        hyperparams |= _options_of(owner, optimizer)
        weight_decay = hyperparams.get("weight_decay")
        decays = _decay_of_each(optimizer, weight_decay, num_params)
        frozen = _are_frozen(optimizer, num_params)
        return [
            {**hyperparams, **decay, "is_frozen": is_frozen}
            for decay, is_frozen in zip(decays, frozen, strict=True)
        ]
    if layout.has_schedule:
        hyperparams["unknown_schedule"] = (
            "there is no variable learning_rate",
            "the variables do not contain the schedule; pass the optimizer itself to compare it",
        )
    hyperparams["has_decay"] = plain_name(layout.optimizer) == "adamw"
    hyperparams["maximize"] = False
    return [hyperparams] * num_params


def _options_of(owner: str, optimizer: Any) -> Hyperparams:
    """The hyperparameters that an optimizer has for all of its parameters."""

    def option(name: str) -> Any:
        value = getattr(optimizer, name, None)
        return None if value is None else number_of(owner, f"{name} of the optimizer", value)

    hyperparams = {name: option(key) for key, name in _OPTIONS.items()}
    hyperparams = {name: x for name, x in hyperparams.items() if x is not None}
    if hasattr(optimizer, "weight_decay"):  # With None, tx must have no weight decay.
        hyperparams.setdefault("weight_decay", 0.0)
    hyperparams["clips"] = _clips_of(owner, optimizer)
    hyperparams["gradient_factor"] = 1 / (option("loss_scale_factor") or 1.0)
    # Without use_ema, the options of the average have no effect.
    if getattr(optimizer, "use_ema", False):
        frequency = option("ema_overwrite_frequency")
        hyperparams["average"] = option("ema_momentum"), int(frequency) if frequency else None
    return {**hyperparams, **_rate_of(owner, optimizer), "decoupled": True}


def _rate_of(owner: str, optimizer: Any) -> Hyperparams:
    """The learning rate of an optimizer, a number or a schedule."""
    # Optimizers before TensorFlow 2.11 have a dictionary of hyperparameters.
    hyper: Any = getattr(optimizer, "_hyper", None) or {}
    rate = getattr(optimizer, "_learning_rate", hyper.get("learning_rate"))
    if rate is None:
        return {}
    decay = number_of(owner, "decay of the optimizer", hyper.get("decay", 0.0))
    # In Nadam, the option decay is that of its momentum.
    decay = 0.0 if plain_name(type(optimizer).__name__) == "nadam" else decay
    # Some variables are callable too.
    if not callable(rate) or hasattr(rate, "assign"):
        rate = number_of(owner, "the learning rate", rate)
        return {"learning_rate": inverse_time_decay(rate, 1, decay) if decay else rate}
    rate_name = f"a {class_name(rate)}"
    if any(cls.__name__ == "LearningRateSchedule" for cls in type(rate).__mro__):
        known, note = _known_schedule(rate)
        call = _call_of(optimizer, rate)
        if not decay:
            return {"learning_rate": ForeignSchedule(rate, call, known, note)}
        known = None if known is None else inverse_time_decay(known, 1, decay)

        def decayed(count: int) -> Any:
            return call(count) / (1 + decay * count)

        return {"learning_rate": ForeignSchedule(rate, decayed, known, note)}
    # Keras calls any other function without arguments, in each step.
    note = "adamjax cannot compare it with a schedule of its own"
    try:
        value = number_of(owner, rate_name, rate())
    except Exception as error:
        fault = f"{type(error).__name__}: {str(error)[:200]}"
        why = f"{rate_name} cannot be called without arguments, as Keras calls it ({fault})"
        return {"incomparable_rate": why}
    return {"learning_rate": value, "unknown_schedule": (rate_name, note)}


def _known_schedule(schedule: Any) -> tuple[Any, str]:
    """A schedule of Keras as one of adamjax (`None` if there is none), and a note for errors."""
    if not is_of_keras(schedule) or not hasattr(schedule, "get_config"):
        return None, ""
    config = {"class_name": type(schedule).__name__, "config": schedule.get_config()}
    try:
        return from_keras_config(config, "the schedule"), ""
    except (TypeError, ValueError):
        return None, why_inexact(config["config"])


def _call_of(optimizer: Any, schedule: Any) -> Callable[[int], Any]:
    """A function that calls a schedule at a count, with the type that the optimizer passes."""
    if hasattr(optimizer, "_hyper"):  # Optimizers before TensorFlow 2.11 cast the count.
        return lambda count: schedule(np.float32(count))
    # With micro-batches, `iterations` counts steps, and schedules get `_iterations`, the calls.
    iterations = getattr(optimizer, "_iterations", None)
    iterations = getattr(optimizer, "iterations", None) if iterations is None else iterations
    variable: Any = copy.deepcopy(iterations)
    if not hasattr(variable, "assign"):
        return lambda count: schedule(np.int32(count))

    def call(count: Any) -> Any:
        variable.assign(count)
        return schedule(variable)

    if not isinstance(getattr(variable, "value", None), jax.Array):
        return call
    compiled = jax.jit(call)
    is_traceable = True

    def call_compiled(count: int) -> Any:
        # With the JAX backend, outside of jit Keras' `cond` would be compiled in each call.
        nonlocal is_traceable
        if is_traceable:
            try:
                return compiled(jnp.asarray(count, variable.dtype))
            except Exception:
                is_traceable = False
        return call(count)

    return call_compiled


def _clips_of(owner: str, optimizer: Any) -> list[Any]:
    """The clips of an optimizer, in order, as transforms."""
    limits = {key: getattr(optimizer, key, None) for key in CLIPS}
    limits = {key: x for key, x in limits.items() if x is not None}
    limits = {key: number_of(owner, f"{key} of the optimizer", x) for key, x in limits.items()}
    if "legacy" not in type(optimizer).__module__:
        limits = effective_clips(limits)
    return [CLIPS[key](limit) for key, limit in limits.items()]


def _decay_of_each(
    optimizer: Any, weight_decay: float | None, num_params: int
) -> list[Hyperparams]:
    """The hyperparameters of the weight decay of each parameter that the optimizer was built on.

    In Keras 3 the optimizer has a list of its parameters, and a function that decides which of them
    decay. In tf_keras it has no list, and shows only whether some are excluded. In older versions
    it does not show that either.
    """
    params: Any = getattr(optimizer, "_trainable_variables", None)
    decays: Any = getattr(optimizer, "_use_weight_decay", None)
    are_known = params is not None and decays is not None and len(params) == num_params
    if weight_decay is not None and are_known:
        return [
            {"weight_decay": weight_decay if decays(param) else 0.0, "masks_decay": "none"}
            for param in params
        ]
    # `exclude_from_weight_decay` sets one of these.
    ends = ("", "_names", "_pattern")
    names = [f"_exclude_from_weight_decay{end}" for end in ends]
    excludes = any(getattr(optimizer, name, None) for name in names)
    masks = "some" if excludes else "unknown" if decays is None else "none"
    return [{"masks_decay": masks}] * num_params


def _are_frozen(optimizer: Any, num_params: int) -> list[bool]:
    """Whether each parameter now has `trainable=False`, if the optimizer has its parameters."""
    params: Any = getattr(optimizer, "_trainable_variables", None) or ()
    if len(params) != num_params:
        return [False] * num_params
    return [getattr(param, "trainable", True) is False for param in params]
