"""Reads the config dictionaries of Keras' optimizers and schedules."""

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from adamjax.adam import scale_by_adam, scale_by_adamax, scale_by_amsgrad
from adamjax.average import weight_ema
from adamjax.chain import chain
from adamjax.clip import clip_by_global_norm, clip_by_norm, clip_by_value
from adamjax.guard import accumulate_gradients
from adamjax.paths import Mask
from adamjax.scaling import add_decayed_weights, scale_by_learning_rate
from adamjax.schedule import (
    Schedule,
    by_path,
    cosine_decay,
    exponential_decay,
    inverse_time_decay,
    piecewise_constant,
    polynomial_decay,
    warmup,
)
from adamjax.transform import Transform

__all__ = [
    "CLIPS",
    "effective_clips",
    "from_keras_config",
    "is_of_keras",
    "make_at",
    "why_inexact",
    "with_class_name",
]

# The generations of Keras.
_LEGACY, _KERAS_2, _KERAS_3 = "the legacy optimizers of tf.keras", "Keras 2.9 to 2.15", "Keras 3"

# The options that clip, and their transforms, in the order in which legacy optimizers clip.
CLIPS: dict[str, type[Transform]] = {
    "clipvalue": clip_by_value,
    "clipnorm": clip_by_norm,
    "global_clipnorm": clip_by_global_norm,
}
_ALL = {"name", "learning_rate", "beta_1", "beta_2", "epsilon", *CLIPS}
_NEW = {"weight_decay", "use_ema", "ema_momentum", "ema_overwrite_frequency"}
# The options of each generation of Keras.
_OPTIONS = {
    _LEGACY: {*_ALL, "lr", "decay", "is_legacy_optimizer"},
    _KERAS_2: {*_ALL, *_NEW, "jit_compile", "is_legacy_optimizer", "mesh"},
    _KERAS_3: {*_ALL, *_NEW, "loss_scale_factor", "gradient_accumulation_steps"},
}
_OWN_OPTIONS: dict[str, set[str]] = {
    "Adam": {"amsgrad", "adaptive_epsilon"},
    "AdamW": {"amsgrad"},
    "Adamax": set(),
    "Nadam": {"schedule_decay"},
    "AdamMultilr": {"amsgrad", "pattern_lrs"},
}
_OPTIMIZERS = {name.lower(): name for name in _OWN_OPTIONS}
# Options that only one generation has.
_LEGACY_ALONE = {"lr", "decay", "schedule_decay", "pattern_lrs"}
_KERAS_2_ALONE = {"jit_compile", "is_legacy_optimizer", "mesh", "adaptive_epsilon"}

# Other options of Keras' optimizers, and the reasons why they cannot be converted.
_REFUSED = {
    "gradient_transformers": "they are functions; put transforms before the rule in a chain",
    "gradient_aggregator": "it is a function; put adamjax.sum_over first in a chain",
    "gradients_clip_option": "Keras' DTensor Adam does not read it; put a clip into a chain",
    "ema_option": "Keras' DTensor Adam does not read it; put weight_ema last in a chain",
}
_SCHEDULES: dict[str, type[Schedule]] = {
    "ExponentialDecay": exponential_decay,
    "InverseTimeDecay": inverse_time_decay,
    "PiecewiseConstantDecay": piecewise_constant,
    "PolynomialDecay": polynomial_decay,
    "CosineDecay": cosine_decay,
}
_IN_INTEGERS = (
    "where initial_learning_rate is an integer, Keras computes the schedule in integers, so its "
    "rates may be others (many are 0): write a float, such as 0.0 or 1.0, in Keras and here"
)
_IN_FEW_BITS = (
    "where initial_learning_rate is a float of 16 bits or less, Keras computes the schedule in its "
    "dtype, which rounds the rates and also the counts: write a Python float in Keras and here"
)
# The class names under which Keras writes functions, and the keys of a dictionary with a config.
_FUNCTIONS = ("function", "__lambda__", "builtin_function_or_method")
_WRAPPING = {"module", "class_name", "config", "registered_name", "shared_object_id"}
# The packages of Keras.
_PACKAGES = ("keras", "tf_keras", "tensorflow")
# The options that are bools, and those that are numbers. Both may be None.
_FLAGS = {"amsgrad", "adaptive_epsilon", "is_legacy_optimizer", "use_ema"}
_NUMBERS = {*CLIPS, "beta_1", "beta_2", "epsilon", "decay", "schedule_decay", "weight_decay"}
_NUMBERS |= {"ema_momentum", "ema_overwrite_frequency", "loss_scale_factor"}
_NUMBERS |= {"gradient_accumulation_steps", "warmup_steps", "warmup_target"}


def _refused(place: str, why: str) -> ValueError:
    return ValueError(f"from_config: {place}: {why}")


def make_at(place: str, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """The result of `make(*args, **kwargs)`; errors begin with the place in the config."""
    try:
        return make(*args, **kwargs)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"from_config: {place}: {error}") from error


# --- checks ---------------------------------------------------------------------------------------


def _expect_types(config: Mapping[str, Any], place: str) -> None:
    """Refuses flags that are not bools, and options that must be numbers and are not."""
    for key, value in config.items():
        is_flag = isinstance(value, bool | np.bool_)
        if value is None:
            continue
        if key in _FLAGS and not is_flag:
            raise _refused(f"{place}.{key}", f"expected true or false, got {value!r:.100}")
        is_number = isinstance(value, numbers.Real) and not is_flag
        if key in _NUMBERS and not (is_number and not math.isnan(value)):
            raise _refused(f"{place}.{key}", f"expected a number, got {value!r:.100}")


def _expect_keys(config: Mapping[str, Any], known: set[str], whose: str, place: str) -> None:
    for key, value in config.items():
        if key in _REFUSED and key not in known:
            if value is not None:
                raise _refused(place, f"{key} cannot be converted: {_REFUSED[key]}")
        elif key not in known:
            raise _refused(place, f"{whose} has no {key!r}; expected {sorted(known)}")


# --- what a dictionary describes ------------------------------------------------------------------


def with_class_name(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """A dictionary of Keras with the class of its optimizer, which `get_config` does not write.

    The optimizer's name shows the class: `"adam_w_1"` is the name of a second AdamW.
    """
    if "compile_config" in config or "optimizer" in config:
        where = '["compile_config"]["optimizer"]' if "compile_config" in config else '["optimizer"]'
        raise _refused(
            "the config",
            "it is that of a model, as in config.json of a .keras file, expected that of an "
            f"optimizer: pass config{where}",
        )
    if "optimizer_config" in config:
        raise _refused(
            "the config",
            "it is the training_config of a model, expected that of an optimizer: pass "
            'config["optimizer_config"]',
        )
    if "class_name" in config:
        return config
    name = config.get("name")
    kind = re.sub(r"(_\d+)?$", "", str(name)).replace("_", "").lower()
    kind = "AdamMultilr" if "pattern_lrs" in config else kind
    if kind.lower() not in _OPTIMIZERS:
        raise _refused(
            "the config",
            "it has neither 'class' (adamjax's) nor 'class_name' (Keras'), and Keras gives no "
            f"optimizer the name {name!r}. If the get_config of a Keras optimizer wrote it, add "
            'the class: {"class_name": "Adam", "config": config}',
        )
    if kind.lower() in ("adam", "adamw") and "amsgrad" not in config:
        raise _refused(
            "the config",
            f"it has the name {name!r}, but not the key 'amsgrad', which Keras' Adam and AdamW "
            'write: add the class, {"class_name": "Adam", "config": config}',
        )
    return {"class_name": kind, "config": config}


def is_of_keras(x: Any) -> bool:
    """Whether an object is of one of Keras' own classes."""
    return type(x).__module__.partition(".")[0] in _PACKAGES


def _is_custom(config: Mapping[str, Any]) -> bool:
    """Whether a dictionary of Keras describes a user's own class.

    Keras writes its own classes with its module. It writes a user's class with another module or
    none, and with the class's registered name, which may be that of a class of Keras.
    """
    module, registered = config.get("module"), config.get("registered_name")
    if module is not None:
        return str(module).partition(".")[0] not in _PACKAGES
    return registered is not None and ("module" in config or registered != config["class_name"])


def _unwrapped(value: Any, place: str) -> Any:
    """A value without the dictionary in which Keras writes a tuple, an array or a function.

    A schedule object becomes the dictionary that describes it. (Keras' `from_config` puts such
    objects into the config that it is given.)
    """
    if type(value).__name__ in _SCHEDULES and is_of_keras(value):
        value = {"class_name": type(value).__name__, "config": value.get_config()}
    wrapping = value.get("class_name") if isinstance(value, Mapping) else None
    wrapping = wrapping if isinstance(wrapping, str) else None
    if callable(value) or wrapping in _FUNCTIONS:
        raise _refused(
            place,
            "it is a function, which Keras calls in every step; write a schedule, or keep the "
            "number in the state and set it: adamjax.with_hyperparams",
        )
    if wrapping == "__tuple__" and isinstance(value.get("items"), list | tuple):
        return tuple(value["items"])
    inner = value.get("config") if wrapping in ("__numpy__", "__tensor__") else None
    if isinstance(inner, Mapping) and {"value", "dtype"} <= set(inner):
        value = make_at(place, np.asarray, inner["value"], inner["dtype"])
        return value.item() if value.ndim == 0 else value.tolist()
    if wrapping is not None and wrapping.startswith("__"):
        raise _refused(place, f"this is no {wrapping} of Keras: {value!r:.100}")
    return value


def from_keras_config(config: Mapping[str, Any], place: str, mask: Mask | None = None) -> Any:
    """The transform or schedule that a dictionary with a `class_name` describes.

    Args:
      mask: the mask for the optimizer's weight decay. Without a weight decay it is refused.

    Errors are those of `adamjax.from_config`, and begin with the place.
    """
    _expect_keys(config, _WRAPPING, "a dictionary of Keras", place)
    name, values = config["class_name"], config.get("config")
    if not isinstance(name, str) or not isinstance(values, Mapping | None):
        raise TypeError(
            f"from_config: {place}: expected a class_name and a dictionary as its config, got "
            f"{name!r} and {values!r}"
        )
    registered = config.get("registered_name")
    if not isinstance(registered, str | None):
        raise _refused(place, f"registered_name is {registered!r:.100}, expected a string")
    if _is_custom(config) and name != "AdamMultilr":
        raise _refused(
            place,
            f"{registered or name!r} is a class of your own, not Keras': write it as a subclass of "
            "adamjax.Transform or adamjax.Schedule",
        )
    values = {key: _unwrapped(x, f"{place}.{key}") for key, x in (values or {}).items()}
    _expect_types(values, place)
    if name in _SCHEDULES:
        if mask is not None:
            raise _refused(place, f"{name} is a schedule, which has no weight decay to mask")
        if why := why_inexact(config.get("config") or {}):
            raise _refused(f"{place}.initial_learning_rate", why)
        return _schedule(name, values, place)
    # Keras ignores case. In 2.9 and 2.10 a name could have this prefix.
    optimizer = _OPTIMIZERS.get(name.lower().removeprefix("experimental"))
    if name == "LossScaleOptimizer":
        raise _refused(
            place,
            'it scales the loss around another optimizer: pass config["config"]["inner_optimizer"]',
        )
    if optimizer is None:
        raise _refused(
            place,
            f"adamjax does not have Keras' {name!r}; expected one of "
            f"{[*_OPTIMIZERS.values(), *_SCHEDULES]}. Write others as subclasses of "
            "adamjax.Transform and adamjax.Schedule",
        )
    return _optimizer(optimizer, values, str(config.get("module")), place, mask)


def why_inexact(config: Mapping[str, Any]) -> str:
    """Why Keras computes a schedule inexactly, by its config; empty if it does not.

    Keras' schedules compute in the dtype of their initial rate, except for PiecewiseConstantDecay.
    """
    rate = config.get("initial_learning_rate")
    # Keras writes an array as a dictionary with its dtype.
    rate = rate.get("config") if isinstance(rate, Mapping) else rate
    given = rate.get("dtype") if isinstance(rate, Mapping) else getattr(rate, "dtype", None)
    # The names of dtypes differ between libraries: "int32", "torch.int32", "<dtype: 'int32'>".
    dtype = "" if given is None else str(given)
    if isinstance(rate, numbers.Integral) or re.search("int|bool", dtype):
        return _IN_INTEGERS
    return _IN_FEW_BITS if re.search("float16|float8|float4", dtype) else ""


def _schedule(name: str, config: dict[str, Any], place: str) -> Schedule:
    kind = _SCHEDULES[name]
    known = {f.name for f in dataclasses.fields(kind)}
    more = {"name", "warmup_target", "warmup_steps"} if kind is cosine_decay else {"name"}
    _expect_keys(config, known | more, f"Keras' {name}", place)
    values = {key: x for key, x in config.items() if key in known}
    target, steps = config.get("warmup_target"), config.get("warmup_steps") or 0
    if target is None:
        return make_at(place, kind, **values)
    # In Keras the rate climbs linearly to the target, and falls from it with the cosine.
    falling = make_at(place, kind, **{**values, "initial_learning_rate": target})
    if steps == 0:
        return falling
    return make_at(place, warmup, falling, steps, values.get("initial_learning_rate"))


def _generation(config: dict[str, Any], module: str) -> str:
    """The generation of Keras that wrote the config of an optimizer; without evidence, Keras 3."""
    legacy = config.get("is_legacy_optimizer")
    if legacy is None:
        legacy = "legacy" in module or _LEGACY_ALONE & config.keys()
    if legacy:
        return _LEGACY
    return _KERAS_2 if _KERAS_2_ALONE & config.keys() else _KERAS_3


def _optimizer(
    name: str, config: dict[str, Any], module: str, place: str, mask: Mask | None
) -> Transform:
    generation = _LEGACY if name == "AdamMultilr" else _generation(config, module)
    options = _OPTIONS[generation] | _OWN_OPTIONS[name]
    if generation != _KERAS_2:
        options.discard("adaptive_epsilon")
    _expect_keys(config, options, f"{name} of {generation}", place)
    get = config.get
    if name == "AdamW" and generation == _LEGACY:
        raise _refused(place, f"{generation} have no AdamW")
    if get("mesh") is not None:
        raise _refused(place, "a mesh cannot be converted: the parameters have the shardings")
    if get("loss_scale_factor") not in (None, 1):
        raise _refused(
            place,
            f"loss_scale_factor={get('loss_scale_factor')!r}: Keras multiplies the loss by it, and "
            "its gradients by 1 / factor. Multiply the loss, and put adamjax.scale(1 / factor) "
            "first in a chain",
        )
    rate = _learning_rate(config, 0 if name == "Nadam" else get("decay") or 0, place)
    clips = _clips(config, generation, module, place)
    rule = _rule(name, config, generation, place)
    decay = _weight_decay(name, config, generation, place, mask)
    average = _weight_average(config, place)
    every = get("gradient_accumulation_steps")
    if not every:
        return chain(*clips, rule, *decay, rate, *average)
    if every == 1:
        raise _refused(place, "gradient_accumulation_steps must be an integer of at least 2, not 1")
    if average and average[0].overwrite_frequency not in (None, 1):
        raise _refused(
            place,
            f"ema_overwrite_frequency={get('ema_overwrite_frequency')!r} together with "
            "gradient_accumulation_steps: Keras overwrites the weights in each micro-batch of "
            "such a step. To overwrite them once, write accumulate_gradients(chain(..., "
            "weight_ema(...)), steps)",
        )
    # In Keras, schedules and the average count micro-batches.
    accumulated = make_at(
        f"{place}.gradient_accumulation_steps",
        accumulate_gradients,
        chain(*clips, rule, *decay),
        every,
    )
    return chain(accumulated, rate, *average)


def _learning_rate(config: dict[str, Any], decay: Any, place: str) -> Transform:
    def rate(value: Any, key: str) -> Any:
        value = _unwrapped(value, f"{place}.{key}")
        if isinstance(value, Mapping):
            name = value.get("class_name")
            if not isinstance(name, str) or name not in _SCHEDULES:
                raise _refused(
                    f"{place}.{key}",
                    f"adamjax does not have Keras' {name!r}; expected one of {list(_SCHEDULES)}. "
                    "Write others as subclasses of adamjax.Schedule",
                )
            value = from_keras_config(value, f"{place}.{key}")
        if decay == 0:
            return value
        return make_at(f"{place}.decay", inverse_time_decay, value, 1, decay)

    if "lr" in config and "learning_rate" in config:
        raise _refused(place, "give lr or learning_rate, not both: they mean the same")
    default = config.get("lr", config.get("learning_rate", 1e-3))
    base = rate(default, "lr" if "lr" in config else "learning_rate")
    groups = config.get("pattern_lrs")
    if groups is None:
        return make_at(f"{place}.learning_rate", scale_by_learning_rate, base)
    if not isinstance(groups, list | tuple):
        raise _refused(f"{place}.pattern_lrs", f"expected a list of groups, got {groups!r:.100}")
    rules: list[tuple[str, Any]] = []
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping) or set(group) != {"patterns", "lr"}:
            raise _refused(
                f"{place}.pattern_lrs[{i}]",
                f'expected {{"patterns": [...], "lr": a rate}}, got {group!r}',
            )
        if not isinstance(group["patterns"], list | tuple):
            raise _refused(
                f"{place}.pattern_lrs[{i}]",
                f"patterns must be a list of patterns, got {group['patterns']!r}",
            )
        own = rate(group["lr"], f"pattern_lrs[{i}].lr")
        rules.extend((pattern, own) for pattern in group["patterns"])
    rates = make_at(f"{place}.pattern_lrs", by_path, rules, default=base)
    return make_at(f"{place}.pattern_lrs", scale_by_learning_rate, rates)


def effective_clips(given: Mapping[str, Any]) -> dict[str, Any]:
    """The only clip in a config that has an effect; not for legacy optimizers.

    A norm has precedence, and a limit of 0 or less has no effect.
    """
    norms_first = sorted((x for x in given if given[x] > 0), key=lambda key: key == "clipvalue")
    return {key: given[key] for key in norms_first[:1]}


def _clips(config: dict[str, Any], generation: str, module: str, place: str) -> list[Transform]:
    given = {key: config[key] for key in CLIPS if config.get(key) is not None}
    if "clipnorm" in given and "global_clipnorm" in given:
        raise _refused(
            place,
            "only one of clipnorm and global_clipnorm can be set in Keras; got "
            f"{given['clipnorm']!r} and {given['global_clipnorm']!r}",
        )
    if generation == _LEGACY:
        # True for TensorFlow 2.9 or newer, and for capreolus.
        is_new = (
            config.get("is_legacy_optimizer") is not None
            or "pattern_lrs" in config
            or module.endswith("optimizers.legacy")
        )
        if "clipnorm" in given and "name" not in config and not is_new:
            raise _refused(
                place,
                f"clipnorm={given['clipnorm']!r}: Keras up to 2.3 clips all gradients by one norm, "
                "and tf.keras each by its own. No key shows which one wrote this. For the first "
                "write global_clipnorm in place of clipnorm, for the second add a 'name'",
            )
        if len(given) > 1 and not is_new:
            raise _refused(
                place,
                f"{given}: TensorFlow up to 2.3 clips by norm, then by value, and later by value, "
                "then by norm. No key shows the version. Add 'is_legacy_optimizer': true for the "
                "later order, or put the clips into a chain in their order",
            )
    else:
        if generation == _KERAS_3 and "gradient_accumulation_steps" in config and len(given) > 1:
            raise _refused(
                place,
                "only one of clipnorm, clipvalue and global_clipnorm can be set in Keras 3; got "
                f"{given}. Put the clips that you mean into a chain, in their order",
            )
        if generation == _KERAS_3 and "loss_scale_factor" not in config and len(given) > 1:
            raise _refused(
                place,
                f"{given}: Keras' version decides which clip is used, and no key shows the "
                "version. Add 'is_legacy_optimizer': true to clip by value, then by norm, or false "
                "to clip by norm only, as Keras 2.9 to 3.2. Keras from 3.3 on takes one clip only",
            )
        given = effective_clips(given)
    return [make_at(f"{place}.{key}", CLIPS[key], limit) for key, limit in given.items()]


def _rule(name: str, config: dict[str, Any], generation: str, place: str) -> Transform:
    b1, b2 = config.get("beta_1", 0.9), config.get("beta_2", 0.999)
    epsilon = config.get("epsilon", 1e-7)
    if generation == _LEGACY:
        epsilon = epsilon or 1e-7
    if name == "Adamax":
        # Rows that were not read stay unchanged in legacy optimizers, and move in later ones.
        rows = "lazy" if generation == _LEGACY else "dense"
        return make_at(place, scale_by_adamax, b1, b2, eps=epsilon, rows=rows)
    if name == "Nadam":
        if generation == _LEGACY:
            momentum = config.get("schedule_decay", config.get("decay", 0.004))
            if momentum != 1:
                raise _refused(
                    place,
                    f"the Nadam of {generation} has the momentum b1 * (1 - 0.5 * 0.96**(d * t)), "
                    f"with d the option decay or schedule_decay, {momentum!r}; here d is 1, as in "
                    "later versions",
                )
        return make_at(place, scale_by_adam, b1, b2, eps=epsilon, nesterov=True)
    kind = scale_by_amsgrad if config.get("amsgrad") else scale_by_adam
    form = "eps" if config.get("adaptive_epsilon") else "eps_hat"
    return make_at(place, kind, b1, b2, **{form: epsilon})


def _weight_decay(
    name: str, config: dict[str, Any], generation: str, place: str, mask: Mask | None
) -> list[Transform]:
    decay = config.get("weight_decay", 0.004 if name == "AdamW" else None)
    if name != "AdamW":
        if not decay:
            if mask is not None:
                raise _refused(place, f"this {name} has no weight decay to mask: leave mask out")
            return []
    elif decay is None:
        raise _refused(place, "weight_decay must be a float for AdamW, got None")
    elif decay and generation == _KERAS_2 and "is_legacy_optimizer" not in config:
        # Keras 2.10 introduced that key.
        raise _refused(
            place,
            f"weight_decay={decay!r}: this is an AdamW of Keras 2.9, which by mistake leaves only "
            "learning_rate * weight_decay of each weight. For the decay of later versions add "
            "'is_legacy_optimizer': false",
        )
    return [make_at(f"{place}.weight_decay", add_decayed_weights, decay, mask)]


def _weight_average(config: dict[str, Any], place: str) -> list[weight_ema]:
    if not config.get("use_ema"):
        return []
    frequency = config.get("ema_overwrite_frequency") or None
    average = make_at(f"{place}.ema_momentum", weight_ema, config.get("ema_momentum", 0.99))
    key = f"{place}.ema_overwrite_frequency"
    return [make_at(key, average.replace, overwrite_frequency=frequency)]
