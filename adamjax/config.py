"""Transforms and schedules as plain JSON, and back."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from adamjax import optimizers
from adamjax.convert.keras_config import from_keras_config, make_at, with_class_name
from adamjax.data import Data, is_array
from adamjax.paths import BoolTree, Mask, bool_tree, optional
from adamjax.schedule import function_schedule
from adamjax.sharding import shard_state
from adamjax.transform import as_transform, foreign

__all__ = ["from_config", "to_config"]

# The key of the class' name. It is a keyword of Python, so no field can have this name.
CLASS = "class"
# The kinds of dtypes that arrays in a config may have.
_ARRAY_KINDS = (jnp.floating, jnp.integer, jnp.bool_)
# The classes that a config cannot describe, and why.
NOT_SERIALIZABLE: dict[type[Data], str] = {
    foreign: "it is a pair of functions from another library: use adamjax's own transform, or "
    "write a subclass of adamjax.Transform",
    function_schedule: "it holds a function: write a subclass of adamjax.Schedule, whose fields "
    "are its numbers",
    shard_state: "its mesh is made of this process' devices: write the config of its tx, and call "
    "shard_state again after reading it",
}


def to_config(tx: Any) -> dict[str, Any]:
    """A transform, schedule or `by_path` as a dictionary of plain JSON types.

    `from_config(to_config(tx)) == tx`, and `json.dumps` and `json.loads` in between change
    nothing. A dictionary has the class' name and the values of all fields:
    `{"class": "scale", "factor": 0.5}`. Parts are dictionaries, tuples are lists. An array is
    `{"array": [...], "dtype": "bfloat16"}`, so it keeps its value and dtype (a weakly typed array
    comes back strongly typed). `adamjax.optional` is `{"optional": "bias$"}`. A mask that is a
    tree of bools, in dictionaries, lists and tuples, is `{"bools": ...}`.

    Args:
      tx: an object of a class of this package, or of a subclass of `Transform` or `Schedule`.

    Raises:
      TypeError: a value in it has no JSON form: a function (as a mask or a schedule), an optax
        transform, the mesh of `shard_state`, an array that is being traced. The message names the
        value and the field.

    >>> import adamjax, json
    >>> config = adamjax.to_config(adamjax.adam(adamjax.cosine_decay(0.1, decay_steps=1000)))
    >>> config["transforms"][1]["learning_rate"]
    {'class': 'cosine_decay', 'initial_learning_rate': 0.1, 'decay_steps': 1000, 'alpha': 0.0}
    >>> adamjax.from_config(json.loads(json.dumps(config)))  # doctest: +NORMALIZE_WHITESPACE
    chain(scale_by_adam(b1=0.9, b2=0.999, eps_hat=1e-07),
          scale_by_learning_rate(learning_rate=cosine_decay(initial_learning_rate=0.1,
                                                            decay_steps=1000, alpha=0.0)))
    """
    data = tx if isinstance(tx, Data) else as_transform(tx)
    return _encode_data(data, type(data).__name__)


def from_config(
    config: Mapping[str, Any], *, mask: Mask | None = None, custom: Iterable[type[Data]] = ()
) -> Any:
    """The transform or schedule that a dictionary of `to_config` or of Keras describes.

    Keras' dictionaries are those of `keras.optimizers.serialize(optimizer)` and of
    `optimizer.get_config()`, from the legacy optimizers of tf.keras (up to 2.10, later
    `tf.keras.optimizers.legacy`), Keras 2.9 to 2.15 and Keras 3: Adam, AdamW, Adamax, Nadam and
    `AdamMultilr` of the package capreolus, with Keras' schedules. (A dictionary of
    `get_config` does not contain the optimizer's class, so the class is derived from the key
    `name`. If you gave the optimizer another name, write
    `{"class_name": "Adam", "config": config}`.) The keys show which version of Keras wrote the
    dictionary, and the transform does the same as that version:

    - If several clips are set, legacy optimizers clip by value, then by norm; Keras 2.9 to 3.2 clip
      by norm only; Keras from 3.3 on refuses this. `clipnorm` and `global_clipnorm` exclude each
      other.
    - `decay` of legacy optimizers divides the rate, even a schedule's, by
      `1 + decay * count`.
    - With `gradient_accumulation_steps`, schedules and the average of `use_ema` count
      micro-batches, and everything else counts steps. Keras does so from 3.5 on; dictionaries of
      earlier versions of Keras 3 are read in the same way.
    - Adamax also moves the rows that were not read; the legacy Adamax does not.

    There is one difference: the average starts from the initial weights p_0, as in Keras 2. Keras 3
    copies the weights after step 1, p_1. So after step t, Keras 3's average is adamjax's minus
    `ema_momentum**t * (p_0 - p_1)`. (`convert.from_keras` goes on from Keras' average. It refuses a
    Keras 3 optimizer with `use_ema` before its first step.) The difference reaches the weights only
    with `ema_overwrite_frequency`.

    Keras' dictionaries do not contain the variables that `exclude_from_weight_decay` excluded. If
    there are any, pass `mask` to select the leaves that decay.

    `name` and `jit_compile` have no effect. An option that adamjax cannot honour is refused.

    Args:
      config: the dictionary, as it is or from JSON. It is not changed.
      mask: for a dictionary of Keras with a weight decay, the mask of `add_decayed_weights`: only
        leaves that it selects decay. `"^(?!.*bias[^/]*$)"` matches leaves whose name, the last key
        of the path, does not contain "bias". (Keras searches in the variable's name.)
      custom: your own subclasses of `Transform` or `Schedule` that the dictionary names.

    Returns:
      The transform, schedule or `by_path`.

    Raises:
      TypeError: the dictionary or a value in it is of the wrong type.
      ValueError: a class or key is unknown or missing, a value is out of its range, adamjax cannot
        do what Keras does, or there is no weight decay for `mask`. The message names it.

    >>> import adamjax
    >>> config = {"class_name": "AdamW", "config": {"learning_rate": 0.1, "clipnorm": 1.0}}
    >>> adamjax.from_config(config)  # doctest: +NORMALIZE_WHITESPACE
    chain(clip_by_norm(max_norm=1.0), scale_by_adam(b1=0.9, b2=0.999, eps_hat=1e-07),
          add_decayed_weights(weight_decay=0.004), scale_by_learning_rate(learning_rate=0.1))
    >>> adamjax.from_config(config, mask="kernel").transforms[2]
    add_decayed_weights(weight_decay=0.004, mask='kernel')
    """
    if not isinstance(config, Mapping):
        advice = ""
        if isinstance(config, str | bytes):
            advice = ": parse it by json.loads"
        elif hasattr(config, "get_config"):
            advice = ": pass keras.optimizers.serialize(optimizer)"
        raise TypeError(
            "from_config: expected a dictionary, as to_config or Keras writes it, got "
            f"{config!r:.80} of type {type(config).__name__}{advice}"
        )
    if CLASS not in config:
        return from_keras_config(with_class_name(config), "the config", mask)
    if mask is not None:
        raise ValueError(
            "from_config: mask is for dictionaries of Keras; dictionaries of to_config have the "
            "masks of their transforms: leave it out"
        )
    return _decode(config, "the config", _classes(custom))


# --- what a config can hold -----------------------------------------------------------------------


def _own_classes() -> dict[str, type[Data]]:
    """The classes of this package that a config can name."""
    return {
        cls.__name__: cls
        for cls in _subclasses(Data)
        if _package(cls.__module__) == _package(__name__)
        and cls.__name__[0].islower()  # base classes have a capital letter
        and cls not in NOT_SERIALIZABLE
    }


def _subclasses(cls: type[Data]) -> Iterator[type[Data]]:
    for sub in cls.__subclasses__():
        yield sub
        yield from _subclasses(sub)


def _package(module: str) -> str:
    return module.partition(".")[0]


def _is_serializable(dtype: Any) -> bool:
    return any(jnp.issubdtype(dtype, kind) for kind in _ARRAY_KINDS)


# --- to JSON --------------------------------------------------------------------------------------


def _encode_data(data: Data, place: str) -> dict[str, Any]:
    cls = type(data)
    if cls in NOT_SERIALIZABLE:
        raise TypeError(
            f"to_config: {place} is {data!r}, which a config cannot describe: "
            f"{NOT_SERIALIZABLE[cls]}"
        )
    own_class = _own_classes().get(cls.__name__)
    if own_class is not None and own_class is not cls:
        raise TypeError(
            f"to_config: {place} is a {cls.__module__}.{cls.__qualname__}, but {cls.__name__} "
            "is the name of one of adamjax's own classes; rename the class"
        )
    fields = [field.name for field in dataclasses.fields(data) if field.init]
    values = {name: _encode(getattr(data, name), f"{place}.{name}") for name in fields}
    return {CLASS: cls.__name__, **values}


def _encode(value: Any, place: str) -> Any:
    """The value of a field as JSON. Errors name its `place`, such as `chain.transforms[0].b1`."""
    if isinstance(value, Data):
        return _encode_data(value, place)
    # Exactly these types: a subclass, such as a NumPy scalar, would come back as another type.
    cls = type(value)
    if value is None or cls in (bool, int, str):
        return value
    if cls is optional:
        return {"optional": str(value)}
    if cls is BoolTree:
        if not _is_nest_of_bools(value.tree):
            raise TypeError(
                f"to_config: {place} is a tree of bools with nodes other than dictionaries, lists "
                "and tuples, which a config cannot hold: write a pattern for the leaves' paths"
            )
        return {"bools": _encode(value.tree, place)}
    if cls is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if cls in (tuple, list):
        items = [_encode(x, f"{place}[{i}]") for i, x in enumerate(value)]
        return items if cls is tuple else {"list": items}
    if cls is dict and all(type(key) is str for key in value):
        return {"dict": {key: _encode(x, f"{place}[{key!r}]") for key, x in value.items()}}
    if is_array(value):
        return _encode_array(value, place)
    if callable(value):
        name = getattr(value, "__qualname__", repr(value))
        raise TypeError(
            f"to_config: {place} is the function {name}, which a config cannot hold: a mask can be "
            "a pattern for the leaves' paths or a tree of bools, a schedule a subclass of "
            "adamjax.Schedule"
        )
    raise TypeError(
        f"to_config: {place} is {value!r} of type {cls.__name__}, which a config cannot hold: "
        "expected a number, string, tuple, list or dict of Python, or an array"
    )


def _is_nest_of_bools(tree: Any) -> bool:
    cls = type(tree)
    if cls is dict:
        return all(type(key) is str for key in tree) and all(map(_is_nest_of_bools, tree.values()))
    if cls in (tuple, list):
        return all(map(_is_nest_of_bools, tree))
    return cls in (bool, type(None))


def _encode_array(value: Any, place: str) -> dict[str, Any]:
    if isinstance(value, jax.core.Tracer):
        raise TypeError(
            f"to_config: {place} is being traced, so it has no value yet; call to_config outside "
            "of jit, vmap and grad"
        )
    dtype = value.dtype
    if not _is_serializable(dtype):
        raise TypeError(
            f"to_config: {place} is an array of dtype {dtype}, which a config cannot hold: "
            "expected real floats, integers or bools"
        )
    if value.size == 0:
        raise TypeError(f"to_config: {place} is an empty array of shape {value.shape}")

    def encode(items: Any) -> Any:
        return [encode(x) for x in items] if isinstance(items, list) else _encode(items, place)

    items = np.asarray(value)
    if jnp.issubdtype(dtype, jnp.floating):
        items = items.astype(np.float64)
    return {"array": encode(items.tolist()), "dtype": dtype.name}


# --- from JSON ------------------------------------------------------------------------------------


def _classes(custom: Iterable[type[Data]]) -> dict[str, type[Data]]:
    """The classes that a config can name, by name: this package's and the user's."""
    own = _own_classes()
    classes = dict(own)
    for cls in custom:
        if not (isinstance(cls, type) and issubclass(cls, Data)):
            raise TypeError(
                "from_config: custom must be classes that are subclasses of adamjax.Transform or "
                f"adamjax.Schedule, got {cls!r}"
            )
        if classes.get(cls.__name__, cls) is not cls:
            owners = "one of adamjax's own classes" if cls.__name__ in own else "two classes"
            raise ValueError(
                f"from_config: custom: {cls.__name__} is the name of {owners}; rename yours"
            )
        classes[cls.__name__] = cls
    return classes


def _decode(value: Any, place: str, classes: dict[str, type[Data]]) -> Any:
    if isinstance(value, Mapping):
        if CLASS in value:
            return _decode_data(value, place, classes)
        if "class_name" in value:
            return from_keras_config(value, place)
        return _decode_dictionary(value, place, classes)
    if isinstance(value, list | tuple):
        return tuple(_decode(x, f"{place}[{i}]", classes) for i, x in enumerate(value))
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(
        f"from_config: {place} is {value!r} of type {type(value).__name__}, expected a type that "
        "JSON has"
    )


def _suggestion(name: Any, classes: Iterable[str]) -> str:
    nearest = difflib.get_close_matches(str(name), list(classes), 1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def _decode_data(config: Mapping[str, Any], place: str, classes: dict[str, type[Data]]) -> Data:
    name = config[CLASS]
    if name in optimizers.__all__:
        raise ValueError(
            f"from_config: {place} is of class {name!r}, which is a function that makes a chain: "
            f"write what adamjax.to_config(adamjax.{name}(...)) returns"
        )
    if not isinstance(name, str) or name not in classes:
        raise ValueError(
            f"from_config: {place} is of class {name!r}, which adamjax does not have"
            f"{_suggestion(name, classes)}. Pass a class of your own: from_config(config, "
            f"custom=[{name}]). Known: {sorted(classes)}"
        )
    cls, values = classes[name], {}
    keys = [field.name for field in dataclasses.fields(cls) if field.init]
    for key in config:
        if key != CLASS and key not in keys:
            raise ValueError(
                f"from_config: {place} of class {name} has the unknown key {key!r}; expected {keys}"
            )
    for field in dataclasses.fields(cls):
        if field.name in config:
            values[field.name] = _decode(config[field.name], f"{place}.{field.name}", classes)
        elif field.default is not dataclasses.MISSING:
            values[field.name] = field.default
        elif field.default_factory is not dataclasses.MISSING:
            values[field.name] = field.default_factory()
        else:
            raise ValueError(f"from_config: {place} of class {name} lacks {field.name!r}")
    return make_at(place, _with_fields, cls, values)


def _with_fields(cls: type[Data], values: dict[str, Any]) -> Data:
    """An object with these fields, checked as the class' constructor checks them.

    The constructor may take other arguments than the fields, as `chain`'s does.
    """
    data = object.__new__(cls)
    data.set_fields(**values)
    data.__post_init__()
    return data


def _decode_dictionary(value: Mapping[str, Any], place: str, classes: dict[str, type[Data]]) -> Any:
    """A value without a JSON type, such as an array or a list (a JSON list stands for a tuple)."""
    keys = set(value)
    if keys == {"float"}:
        return make_at(place, float, value["float"])
    if keys == {"optional"}:
        return make_at(place, optional, value["optional"])
    if keys == {"bools"}:
        return make_at(place, bool_tree, "bools", _decode(value["bools"], place, classes))
    if keys == {"list"} and isinstance(value["list"], list | tuple):
        return list(_decode(value["list"], place, classes))
    if keys == {"dict"} and isinstance(value["dict"], Mapping):
        items = value["dict"].items()
        return {key: _decode(x, f"{place}[{key!r}]", classes) for key, x in items}
    if keys == {"array", "dtype"}:
        return _decode_array(value, place, classes)
    content = f"the keys {sorted(map(str, keys))}"
    if keys in ({"list"}, {"dict"}):
        (name,) = keys
        content = f"{name!r}: {value[name]!r}, which is not a {name}"
    raise ValueError(
        f"from_config: {place} is a dictionary with {content}; expected {CLASS!r} (of adamjax), "
        "'class_name' (of Keras), or 'array' and 'dtype'"
    )


def _decode_array(value: Mapping[str, Any], place: str, classes: dict[str, type[Data]]) -> Any:
    dtype = make_at(place, jnp.dtype, value["dtype"])
    if not _is_serializable(dtype):
        raise ValueError(
            f"from_config: {place} is an array of dtype {dtype.name}, expected real floats, "
            "integers or bools"
        )
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"from_config: {place} is an array of dtype {dtype.name}, which JAX has only with "
            "jax_enable_x64"
        )
    # NumPy turns Python's floats into float64, which holds the values of any float dtype exactly.
    items = make_at(place, np.asarray, _decode(value["array"], place, classes))
    if not _is_serializable(items.dtype):
        raise ValueError(
            f"from_config: {place} is an array of {value['array']!r:.100}, expected numbers"
        )
    with np.errstate(all="ignore"):
        array = items.astype(dtype)
    if jnp.issubdtype(dtype, jnp.floating):
        # A float that a person wrote may be rounded, but not to infinity.
        fits = np.isfinite(items) == np.isfinite(array.astype(np.float64))
    else:
        fits = items == array
    if not np.all(fits):
        raise ValueError(
            f"from_config: {place} is an array of {value['array']!r:.100}, which {dtype.name} "
            "cannot hold"
        )
    return jnp.asarray(array)
