"""Transforms and schedules as plain JSON, and back; Keras' own dictionaries as transforms."""

import dataclasses
import math
import numbers
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax.adam import scale_by_adam, scale_by_adamax, scale_by_amsgrad
from adamjax.average import weight_ema
from adamjax.chain import chain
from adamjax.clip import clip_by_global_norm, clip_by_norm, clip_by_value
from adamjax.data import Data, is_array
from adamjax.guard import accumulate_gradients
from adamjax.paths import BoolTree, bool_tree, optional
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
    wrapped,
)
from adamjax.sharding import shard_state
from adamjax.transform import Transform, as_transform, foreign

__all__ = ["from_config", "to_config"]

# What stands for the name of a class: a keyword, so no field can have this name.
CLASS = "class"
# The kinds of arrays that JSON can tell.
_ARRAYS = (jnp.floating, jnp.integer, jnp.bool_)
# What cannot be told, and why.
UNTELLABLE: dict[type[Data], str] = {
    foreign: "it is a pair of functions from elsewhere: use adamjax's own transform, or write "
    "a subclass of adamjax.Transform",
    wrapped: "it holds a callable, of which JSON can say nothing: write a subclass of "
    "adamjax.Schedule, whose fields are its numbers",
    shard_state: "its mesh is made of this process' devices: tell its tx, and split that anew",
}


def to_config(tx: Any) -> dict[str, Any]:
    """A transform, schedule or `by_path` as a dictionary of plain JSON types.

    `from_config(to_config(tx)) == tx`, and `json.dumps` and `json.loads` in between change
    nothing. A dictionary holds the class' name and every field, defaults too:
    `{"class": "scale", "factor": 0.5}`; parts are dictionaries, tuples are lists. An array is
    `{"array": [...], "dtype": "bfloat16"}`, so that it keeps its value and dtype (a weakly typed
    one comes back strongly typed), `adamjax.optional` is `{"optional": "bias$"}`, and a mask that
    is a tree of bools, in dictionaries, lists and tuples, `{"bools": ...}`.

    Args:
      tx: what this package or a subclass of `Transform` or `Schedule` makes.

    Raises:
      TypeError: something in it cannot be told in JSON: a function (as a mask or a schedule), an
        optax transform, an array that is being traced. The message says which, and where.

    >>> import adamjax, json
    >>> config = adamjax.to_config(adamjax.adam(adamjax.cosine_decay(0.1, decay_steps=1000)))
    >>> config["transforms"][1]["learning_rate"]
    {'class': 'cosine_decay', 'initial_learning_rate': 0.1, 'decay_steps': 1000, 'alpha': 0.0}
    >>> adamjax.from_config(json.loads(json.dumps(config)))  # doctest: +NORMALIZE_WHITESPACE
    chain(scale_by_adam(b1=0.9, b2=0.999, eps_hat=1e-07),
          scale_by_learning_rate(learning_rate=cosine_decay(initial_learning_rate=0.1,
                                                            decay_steps=1000, alpha=0.0)))
    """
    made = tx if isinstance(tx, Data) else as_transform(tx)
    return _told_data(made, type(made).__name__)


def from_config(config: Mapping[str, Any], *, custom: Iterable[type[Data]] = ()) -> Any:
    """What a dictionary describes: one of `to_config`, or one of Keras'.

    Keras' dictionaries are taken as `keras.optimizers.serialize(optimizer)` and
    `optimizer.get_config()` write them, of the legacy optimizers of tf.keras (up to 2.10, later
    `tf.keras.optimizers.legacy`), of Keras 2.9 to 2.15 and of Keras 3: Adam, AdamW, Adamax,
    Nadam and capreolus' AdamMultilr. (`get_config` does not say which optimizer it is of; where
    the `name` does not either, write `{"class_name": "Adam", "config": config}`.) Keras'
    schedules are taken as well. The keys tell which Keras wrote them, and what that one does is
    what the transform does:

    - of several clips, legacy ones clip by value, then by norm; Keras 2.9 to 3.2 by norm alone;
      and from 3.3 on, Keras refuses them. `clipnorm` and `global_clipnorm` exclude each other.
    - `decay` of legacy ones divides the rate, a schedule's too, by `1 + decay * count`.
    - with `gradient_accumulation_steps`, schedules and the average of `use_ema` go by
      micro-batches, the rest by steps, as in Keras from 3.5 on.
    - rows that were not read move in Adamax as well, but for legacy ones.

    One thing differs: an average starts from the initial weights p_0 (in Keras 2 too). Keras 3
    copies the weights after step 1, p_1; so its average after step t is less by
    `ema_momentum**t * (p_0 - p_1)`, which only `ema_overwrite_frequency` lets into the weights.

    `name` and `jit_compile` have no effect. What cannot be honoured is refused.

    Args:
      config: the dictionary, as it is or from JSON; it is not changed.
      custom: classes of your own, subclasses of `Transform` or `Schedule`, that it names.

    Returns:
      The transform, schedule or `by_path`.

    Raises:
      TypeError: the dictionary or something in it is of the wrong type.
      ValueError: a class or key is unknown or missing, a value is out of its range, or Keras
        does something that cannot be done here; the message names it.

    >>> import adamjax
    >>> config = {"class_name": "AdamW", "config": {"learning_rate": 0.1, "clipnorm": 1.0}}
    >>> adamjax.from_config(config)  # doctest: +NORMALIZE_WHITESPACE
    chain(clip_by_norm(max_norm=1.0), scale_by_adam(b1=0.9, b2=0.999, eps_hat=1e-07),
          add_decayed_weights(weight_decay=0.004), scale_by_learning_rate(learning_rate=0.1))
    """
    if not isinstance(config, Mapping):
        raise TypeError(
            "from_config: expected a dictionary, as to_config or Keras write it, got "
            f"{config!r} of type {type(config).__name__}"
        )
    if CLASS not in config and "class_name" not in config:
        config = {"class_name": _keras_class(config), "config": config}
    return _heard(config, "the config", _classes(custom))


# --- to JSON --------------------------------------------------------------------------------------


def _told_data(data: Data, place: str) -> dict[str, Any]:
    kind = type(data)
    if kind in UNTELLABLE:
        raise TypeError(
            f"to_config: {place} is {data!r}, which cannot be told in a config: {UNTELLABLE[kind]}"
        )
    if kind is not _ours().get(kind.__name__, kind):
        raise TypeError(
            f"to_config: {place} is a {kind.__module__}.{kind.__qualname__}, but {kind.__name__} "
            "is adamjax's own name for something else; give the class another one"
        )
    told: dict[str, Any] = {CLASS: kind.__name__}
    for field in dataclasses.fields(data):
        if field.init:
            told[field.name] = _told(getattr(data, field.name), f"{place}.{field.name}")
    return told


def _told(value: Any, place: str) -> Any:
    if isinstance(value, Data):
        return _told_data(value, place)
    # Subclasses, as NumPy's scalars are, would come back as something else.
    kind = type(value)
    if value is None or kind in (bool, int, str):
        return value
    if kind is optional:
        return {"optional": str(value)}
    if kind is BoolTree:
        if not _is_nest_of_bools(value.tree):
            raise TypeError(
                f"to_config: {place} is a tree of bools in more than dictionaries, lists and "
                "tuples, which cannot be told in a config: write a pattern for the leaves' paths"
            )
        return {"bools": _told(value.tree, place)}
    if kind is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if kind in (tuple, list):
        items = [_told(x, f"{place}[{i}]") for i, x in enumerate(value)]
        return items if kind is tuple else {"list": items}
    if kind is dict and all(type(key) is str for key in value):
        return {"dict": {key: _told(x, f"{place}[{key!r}]") for key, x in value.items()}}
    if is_array(value):
        return _told_array(value, place)
    if callable(value):
        name = getattr(value, "__qualname__", repr(value))
        raise TypeError(
            f"to_config: {place} is the function {name}, which cannot be told in a config: a mask "
            "can be a pattern for the leaves' paths or a tree of bools, a schedule a subclass of "
            "adamjax.Schedule"
        )
    raise TypeError(
        f"to_config: {place} is {value!r} of type {kind.__name__}, which cannot be told in a "
        "config: expected a number, string, array, tuple, list or dict of Python's or JAX'"
    )


def _is_nest_of_bools(tree: Any) -> bool:
    kind = type(tree)
    if kind is dict:
        return all(type(key) is str for key in tree) and all(map(_is_nest_of_bools, tree.values()))
    return (
        all(map(_is_nest_of_bools, tree)) if kind in (tuple, list) else kind in (bool, type(None))
    )


def _told_array(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"to_config: {place} is being traced, so it has no value yet; call to_config outside "
            "of jit, vmap and grad"
        )
    dtype = value.dtype
    if not any(jnp.issubdtype(dtype, kind) for kind in _ARRAYS):
        raise TypeError(
            f"to_config: {place} is an array of dtype {dtype}, which cannot be told in a config: "
            "expected real floats, integers or bools"
        )
    if value.size == 0:
        raise TypeError(f"to_config: {place} is an empty array of shape {value.shape}")

    def told(items: Any) -> Any:
        return [told(x) for x in items] if isinstance(items, list) else _told(items, place)

    items = np.asarray(value)
    if jnp.issubdtype(dtype, jnp.floating):
        items = items.astype(np.float64)
    return {"array": told(items.tolist()), "dtype": dtype.name}


# --- from JSON ------------------------------------------------------------------------------------


def _subclasses(cls: type[Data]) -> Iterator[type[Data]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _ours() -> dict[str, type[Data]]:
    """The classes of this package that a config can name; base classes have a capital."""
    return {
        cls.__name__: cls
        for cls in _subclasses(Data)
        if cls.__module__.partition(".")[0] == __name__.partition(".")[0]
        and cls.__name__[0].islower()
        and cls not in UNTELLABLE
    }


def _classes(custom: Iterable[type[Data]]) -> dict[str, type[Data]]:
    ours = _ours()
    classes = dict(ours)
    for cls in custom:
        if not (isinstance(cls, type) and issubclass(cls, Data)):
            raise TypeError(
                "from_config: custom must be classes that are subclasses of adamjax.Transform or "
                f"adamjax.Schedule, got {cls!r}"
            )
        if classes.get(cls.__name__, cls) is not cls:
            whose = "adamjax's own" if cls.__name__ in ours else "two classes'"
            raise ValueError(f"from_config: custom: {cls.__name__} is {whose} name; change it")
        classes[cls.__name__] = cls
    return classes


def _heard(value: Any, place: str, classes: dict[str, type[Data]]) -> Any:
    if isinstance(value, Mapping):
        if CLASS in value:
            return _heard_data(value, place, classes)
        if "class_name" in value:
            return _heard_keras(value, place)
        return _heard_literal(value, place, classes)
    if isinstance(value, list | tuple):
        return tuple(_heard(x, f"{place}[{i}]", classes) for i, x in enumerate(value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"from_config: {place} is {value!r} of type {type(value).__name__}, expected what JSON has"
    )


def _heard_data(config: Mapping[str, Any], place: str, classes: dict[str, type[Data]]) -> Data:
    name = config[CLASS]
    if not isinstance(name, str) or name not in classes:
        raise ValueError(
            f"from_config: {place} is of class {name!r}, which is not adamjax's; a class of your "
            f"own must be given: from_config(config, custom=[{name}]). Known: {sorted(classes)}"
        )
    cls, values = classes[name], {}
    fields = {f.name: f for f in dataclasses.fields(cls) if f.init}
    for key in config:
        if key != CLASS and key not in fields:
            raise ValueError(
                f"from_config: {place} of class {name} has the unknown key {key!r}; "
                f"expected {list(fields)}"
            )
    for field in dataclasses.fields(cls):
        if field.name in config:
            values[field.name] = _heard(config[field.name], f"{place}.{field.name}", classes)
        elif field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
        else:
            raise ValueError(f"from_config: {place} of class {name} lacks {field.name!r}")
    return _made(place, _assembled, cls, values)


def _assembled(cls: type[Data], values: dict[str, Any]) -> Data:
    """An object of these fields, checked as when a person makes it."""
    made = object.__new__(cls)
    made.set_fields(**values)
    made.__post_init__()
    return made


def _made(place: str, make: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What `make` makes; an error says where in the config it arose."""
    try:
        return make(*args, **kwargs)
    except (TypeError, ValueError) as error:
        kind = TypeError if isinstance(error, TypeError) else ValueError
        raise kind(f"from_config: {place}: {error}") from error


def _heard_literal(value: Mapping[str, Any], place: str, classes: dict[str, type[Data]]) -> Any:
    keys = set(value)
    if keys == {"float"}:
        return _made(place, float, value["float"])
    if keys == {"optional"}:
        return _made(place, optional, value["optional"])
    if keys == {"bools"}:
        return _made(place, bool_tree, "bools", _heard(value["bools"], place, classes))
    if keys == {"list"} and isinstance(value["list"], list | tuple):
        return list(_heard(value["list"], place, classes))
    if keys == {"dict"} and isinstance(value["dict"], Mapping):
        items = value["dict"].items()
        return {key: _heard(x, f"{place}[{key!r}]", classes) for key, x in items}
    if keys != {"array", "dtype"}:
        what = f"the keys {sorted(map(str, keys))}"
        if keys in ({"list"}, {"dict"}):
            (name,) = keys
            what = f"{name!r}: {value[name]!r}, which is no {name}"
        raise ValueError(
            f"from_config: {place} is a dictionary with {what}; expected one "
            f"with {CLASS!r} (adamjax's), 'class_name' (Keras'), or an array's"
        )
    return _heard_array(value, place, classes)


def _heard_array(value: Mapping[str, Any], place: str, classes: dict[str, type[Data]]) -> Any:
    dtype = _made(place, jnp.dtype, value["dtype"])
    if not any(jnp.issubdtype(dtype, kind) for kind in _ARRAYS):
        raise ValueError(
            f"from_config: {place} is an array of dtype {dtype.name}, expected one of real floats, "
            "integers or bools"
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"from_config: {place} is an array of dtype {dtype.name}, which JAX has only with "
            "jax_enable_x64"
        )
    # Tuples of Python's numbers: those of any float dtype are exact as float64.
    items = _made(place, np.asarray, _heard(value["array"], place, classes))
    if not any(jnp.issubdtype(items.dtype, kind) for kind in _ARRAYS):
        raise ValueError(
            f"from_config: {place} is an array of {value['array']!r:.100}, expected numbers"
        )
    with np.errstate(all="ignore"):
        made = items.astype(dtype)
    # Floats may be rounded, where a person wrote them.
    floats = jnp.issubdtype(dtype, jnp.floating)
    same = np.isfinite(items) == np.isfinite(made.astype(np.float64)) if floats else items == made
    if not np.all(same):
        raise ValueError(
            f"from_config: {place} is an array of {value['array']!r:.100}, which {dtype.name} "
            "cannot hold"
        )
    return jnp.asarray(made)


# --- Keras' dictionaries --------------------------------------------------------------------------

LEGACY, KERAS_2, KERAS_3 = "the legacy optimizers of tf.keras", "Keras 2.9 to 2.15", "Keras 3"

_CLIPS = ("clipnorm", "global_clipnorm", "clipvalue")
_ALL = {"name", "learning_rate", "beta_1", "beta_2", "epsilon", *_CLIPS}
_NEW = {"weight_decay", "use_ema", "ema_momentum", "ema_overwrite_frequency"}
# What names an option of each.
_OPTIONS = {
    LEGACY: {*_ALL, "lr", "decay", "is_legacy_optimizer"},
    KERAS_2: {*_ALL, *_NEW, "jit_compile", "is_legacy_optimizer", "mesh"},
    KERAS_3: {*_ALL, *_NEW, "loss_scale_factor", "gradient_accumulation_steps"},
}
_OWN_OPTIONS: dict[str, set[str]] = {
    "Adam": {"amsgrad", "adaptive_epsilon"},
    "AdamW": {"amsgrad"},
    "Adamax": set(),
    "Nadam": {"schedule_decay"},
    "AdamMultilr": {"amsgrad", "pattern_lrs"},
}
_OPTIMIZERS = {name.lower(): name for name in _OWN_OPTIONS}
# What tells who wrote a dictionary.
_LEGACY_ALONE = {"lr", "decay", "schedule_decay", "pattern_lrs"}
_KERAS_2_ALONE = {"jit_compile", "is_legacy_optimizer", "mesh", "adaptive_epsilon"}

# What Keras' optimizers took, and why it cannot be told.
_REFUSED = {
    "gradient_transformers": "they are functions; put transforms in front of the rule in a chain",
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
_FUNCTIONS = ("function", "__lambda__", "builtin_function_or_method")
_WRAPPING = {"module", "class_name", "config", "registered_name", "shared_object_id"}


# Options that are True or False, and those that are numbers; either may be None.
_FLAGS = {"amsgrad", "adaptive_epsilon", "is_legacy_optimizer", "use_ema"}
_NUMBERS = {*_CLIPS, "beta_1", "beta_2", "epsilon", "decay", "schedule_decay", "weight_decay"}
_NUMBERS |= {"ema_momentum", "ema_overwrite_frequency", "loss_scale_factor"}
_NUMBERS |= {"gradient_accumulation_steps", "warmup_steps", "warmup_target"}


def _expect_kinds(config: Mapping[str, Any], place: str) -> None:
    """Refuses values of Keras' options that are of another kind, which JSON may have made."""
    for key, value in config.items():
        is_flag = isinstance(value, bool | np.bool_)
        if value is None:
            continue
        if key in _FLAGS and not is_flag:
            raise _refused(f"{place}.{key}", f"expected true or false, got {value!r:.100}")
        is_number = isinstance(value, numbers.Real) and not is_flag
        if key in _NUMBERS and not (is_number and not math.isnan(value)):
            raise _refused(f"{place}.{key}", f"expected a number, got {value!r:.100}")


def _refused(place: str, why: str) -> ValueError:
    return ValueError(f"from_config: {place}: {why}")


def _expect_keys(config: Mapping[str, Any], known: set[str], whose: str, place: str) -> None:
    for key, value in config.items():
        if key in _REFUSED and key not in known:
            if value is not None:
                raise _refused(place, f"{key} cannot be told in a config: {_REFUSED[key]}")
        elif key not in known:
            raise _refused(place, f"{whose} has no {key!r}; expected {sorted(known)}")


def _keras_class(config: Mapping[str, Any]) -> str:
    """Whose `get_config` this is, by the name that Keras gives: "adam_w_1" is a second AdamW."""
    if "pattern_lrs" in config:
        return "AdamMultilr"
    name = config.get("name")
    found = re.sub(r"(_\d+)?$", "", str(name)).replace("_", "").lower()
    if found not in _OPTIMIZERS:
        raise _refused(
            "the config",
            f"neither {CLASS!r} (adamjax's) nor 'class_name' (Keras') says what it is, and the "
            f"name {name!r} is none that Keras gives. If a Keras optimizer's get_config wrote it, "
            'say whose: {"class_name": "Adam", "config": config}',
        )
    return found


def _plain(value: Any, place: str) -> Any:
    """A value of a Keras dictionary, out of the wrapping that Keras has for some."""
    wrapping = value.get("class_name") if isinstance(value, Mapping) else None
    wrapping = wrapping if isinstance(wrapping, str) else None
    if callable(value) or wrapping in _FUNCTIONS:
        raise _refused(
            place,
            "it is a function, which Keras calls anew in every step; write a schedule, or keep "
            "the number in the state and set it: adamjax.with_hyperparams",
        )
    if wrapping == "__tuple__" and isinstance(value.get("items"), list | tuple):
        return tuple(value["items"])
    inner = value.get("config") if wrapping in ("__numpy__", "__tensor__") else None
    if isinstance(inner, Mapping) and {"value", "dtype"} <= set(inner):
        value = _made(place, np.asarray, inner["value"], inner["dtype"])
        return value.item() if value.ndim == 0 else value.tolist()
    if wrapping is not None and wrapping.startswith("__"):
        raise _refused(place, f"it is no {wrapping} as Keras writes it: {value!r:.100}")
    return value


def _heard_keras(config: Mapping[str, Any], place: str) -> Any:
    _expect_keys(config, _WRAPPING, "a dictionary of Keras", place)
    name, values = config["class_name"], config.get("config")
    if not isinstance(name, str) or not isinstance(values, Mapping | None):
        raise TypeError(
            f"from_config: {place}: expected a class_name and a dictionary as its config, got "
            f"{name!r} and {values!r}"
        )
    values = {key: _plain(x, f"{place}.{key}") for key, x in (values or {}).items()}
    _expect_kinds(values, place)
    if name in _SCHEDULES:
        return _keras_schedule(name, values, place)
    # Keras does not heed case; in 2.9 and 2.10 names could have this prefix.
    optimizer = _OPTIMIZERS.get(name.lower().removeprefix("experimental"))
    registered = config.get("registered_name")
    if not isinstance(registered, str | None):
        raise _refused(place, f"registered_name is {registered!r:.100}, expected a string")
    theirs = registered is not None and registered != name and optimizer != "AdamMultilr"
    if optimizer is None or theirs:
        raise _refused(
            place,
            f"Keras' {registered if theirs else name!r} is not here; expected one of "
            f"{[*_OPTIMIZERS.values(), *_SCHEDULES]}. Others can be written as subclasses of "
            "adamjax.Transform and adamjax.Schedule",
        )
    return _keras_optimizer(optimizer, values, str(config.get("module")), place)


def _keras_schedule(name: str, config: dict[str, Any], place: str) -> Schedule:
    kind = _SCHEDULES[name]
    known = {f.name for f in dataclasses.fields(kind)}
    more = {"name", "warmup_target", "warmup_steps"} if kind is cosine_decay else {"name"}
    _expect_keys(config, known | more, f"Keras' {name}", place)
    values = {key: x for key, x in config.items() if key in known}
    target, steps = config.get("warmup_target"), config.get("warmup_steps") or 0
    if target is None:
        return _made(place, kind, **values)
    # In Keras the line climbs from the initial rate to the target, and the cosine falls from it.
    falling = _made(place, kind, **{**values, "initial_learning_rate": target})
    if steps == 0:
        return falling
    return _made(place, warmup, falling, steps, values.get("initial_learning_rate"))


def _generation(config: dict[str, Any], module: str) -> str:
    """Which Keras wrote the config of an optimizer; the newest where nothing tells."""
    legacy = config.get("is_legacy_optimizer")
    if legacy is None:
        legacy = "legacy" in module or _LEGACY_ALONE & config.keys()
    if legacy:
        return LEGACY
    return KERAS_2 if _KERAS_2_ALONE & config.keys() else KERAS_3


def _keras_optimizer(name: str, config: dict[str, Any], module: str, place: str) -> Transform:
    generation = LEGACY if name == "AdamMultilr" else _generation(config, module)
    options = _OPTIONS[generation] | _OWN_OPTIONS[name]
    if generation != KERAS_2:
        options.discard("adaptive_epsilon")
    _expect_keys(config, options, f"{name} of {generation}", place)
    get = config.get
    if name == "AdamW" and generation == LEGACY:
        raise _refused(place, f"{generation} have no AdamW")
    if get("mesh") is not None:
        raise _refused(place, "a mesh cannot be told in a config; shardings are the parameters'")
    if get("loss_scale_factor") not in (None, 1):
        raise _refused(
            place,
            f"loss_scale_factor={get('loss_scale_factor')!r}: half of it is in the loss, which "
            "Keras multiplies by it; do so, and put adamjax.scale(1 / factor) first in a chain",
        )
    rate = _keras_rate(config, 0 if name == "Nadam" else get("decay") or 0, place)
    clips = _keras_clips(config, generation, place)
    rule = _keras_rule(name, config, generation, place)
    decay = _keras_decay(name, config, generation, place)
    average = _keras_average(config, place)
    every = get("gradient_accumulation_steps")
    if not every:
        return chain(*clips, rule, *decay, rate, *average)
    if every == 1:
        raise _refused(place, "gradient_accumulation_steps must be an integer of at least 2, not 1")
    if average and average[0].overwrite_frequency not in (None, 1):
        raise _refused(
            place,
            f"ema_overwrite_frequency={get('ema_overwrite_frequency')!r} together with "
            "gradient_accumulation_steps: Keras overwrites in each micro-batch of such a step; "
            "write accumulate_gradients(chain(..., weight_ema(...)), steps) to do so once",
        )
    # In Keras the count of a schedule is of micro-batches, and the average takes in each.
    gathered = _made(
        f"{place}.gradient_accumulation_steps",
        accumulate_gradients,
        chain(*clips, rule, *decay),
        every,
    )
    return chain(gathered, rate, *average)


def _keras_rate(config: dict[str, Any], decay: Any, place: str) -> Transform:
    def rate(value: Any, key: str) -> Any:
        value = _plain(value, f"{place}.{key}")
        if isinstance(value, Mapping):
            name = value.get("class_name")
            if not isinstance(name, str) or name not in _SCHEDULES:
                raise _refused(
                    f"{place}.{key}",
                    f"Keras' {value.get('class_name')!r} is not here; expected one of "
                    f"{list(_SCHEDULES)}. Others can be written as subclasses of adamjax.Schedule",
                )
            value = _heard_keras(value, f"{place}.{key}")
        if decay == 0:
            return value
        return _made(f"{place}.decay", inverse_time_decay, value, 1, decay)

    if "lr" in config and "learning_rate" in config:
        raise _refused(place, "give lr or learning_rate, which are the same, not both")
    default = config.get("lr", config.get("learning_rate", 1e-3))
    base = rate(default, "lr" if "lr" in config else "learning_rate")
    groups = config.get("pattern_lrs")
    if groups is None:
        return _made(f"{place}.learning_rate", scale_by_learning_rate, base)
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
                f"patterns must be a list of them, got {group['patterns']!r}",
            )
        own = rate(group["lr"], f"pattern_lrs[{i}].lr")
        rules.extend((pattern, own) for pattern in group["patterns"])
    rates = _made(f"{place}.pattern_lrs", by_path, rules, default=base)
    return _made(f"{place}.pattern_lrs", scale_by_learning_rate, rates)


def _keras_clips(config: dict[str, Any], generation: str, place: str) -> list[Transform]:
    makes = {
        "clipvalue": clip_by_value,
        "clipnorm": clip_by_norm,
        "global_clipnorm": clip_by_global_norm,
    }
    given = {key: config[key] for key in makes if config.get(key) is not None}
    if "clipnorm" in given and "global_clipnorm" in given:
        raise _refused(
            place,
            "only one of clipnorm and global_clipnorm can be set in Keras; got "
            f"{given['clipnorm']!r} and {given['global_clipnorm']!r}",
        )
    if generation != LEGACY:
        if generation == KERAS_3 and "gradient_accumulation_steps" in config and len(given) > 1:
            raise _refused(
                place,
                "only one of clipnorm, clipvalue and global_clipnorm can be set in Keras 3; got "
                f"{given}. Put the clips that are meant into a chain, in their order",
            )
        if generation == KERAS_3 and "loss_scale_factor" not in config and len(given) > 1:
            raise _refused(
                place,
                f"{given}: which clip wins depends on the version, and nothing says which. "
                "'is_legacy_optimizer': true takes the value's, then the norm's; false the norm's "
                "alone, as Keras 2.9 to 3.2; Keras 3.3 and later take one only",
            )
        # Norms come first, and a limit that is not above 0 is none.
        given = {key: given[key] for key in _CLIPS if given.get(key, 0) > 0}
        given = dict(list(given.items())[:1])
    return [_made(f"{place}.{key}", makes[key], limit) for key, limit in given.items()]


def _keras_rule(name: str, config: dict[str, Any], generation: str, place: str) -> Transform:
    b1, b2 = config.get("beta_1", 0.9), config.get("beta_2", 0.999)
    epsilon = config.get("epsilon", 1e-7)
    if generation == LEGACY:
        epsilon = epsilon or 1e-7
    if name == "Adamax":
        # The document's rows stand still; those of later versions move.
        rows = "lazy" if generation == LEGACY else "dense"
        return _made(place, scale_by_adamax, b1, b2, eps=epsilon, rows=rows)
    if name == "Nadam":
        if generation == LEGACY:
            momentum = config.get("schedule_decay", config.get("decay", 0.004))
            if momentum != 1:
                raise _refused(
                    place,
                    f"the momentum of {generation}' Nadam is b1 * (1 - 0.5 * 0.96**(d * t)) with d "
                    f"the option decay or schedule_decay, {momentum!r}; here, as in later "
                    "versions, d is 1",
                )
        return _made(place, scale_by_adam, b1, b2, eps=epsilon, nesterov=True)
    kind = scale_by_amsgrad if config.get("amsgrad") else scale_by_adam
    form = "eps" if config.get("adaptive_epsilon") else "eps_hat"
    return _made(place, kind, b1, b2, **{form: epsilon})


def _keras_decay(name: str, config: dict[str, Any], generation: str, place: str) -> list[Transform]:
    decay = config.get("weight_decay", 0.004 if name == "AdamW" else None)
    if name != "AdamW":
        if not decay:
            return []
    elif decay is None:
        raise _refused(place, "weight_decay must be a float for AdamW, got None")
    elif decay and generation == KERAS_2 and "is_legacy_optimizer" not in config:
        # That key came with 2.10.
        raise _refused(
            place,
            f"weight_decay={decay!r}: this is an AdamW of Keras 2.9, which leaves "
            "learning_rate * weight_decay of each weight and takes away the rest, by mistake; for "
            "decay as in later versions, add 'is_legacy_optimizer': false",
        )
    return [_made(f"{place}.weight_decay", add_decayed_weights, decay)]


def _keras_average(config: dict[str, Any], place: str) -> list[weight_ema]:
    if not config.get("use_ema"):
        return []
    frequency = config.get("ema_overwrite_frequency") or None
    momentum = config.get("ema_momentum", 0.99)
    return [_made(f"{place}.ema_momentum", weight_ema, momentum, frequency)]
