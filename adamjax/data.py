"""The base class of transforms and schedules: a frozen dataclass that is a pytree."""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self, TypeVar, dataclass_transform

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from adamjax.numpy_arrays import native

__all__ = [
    "BETA",
    "COUNT",
    "FINITE",
    "LAST_COUNT",
    "NON_NEGATIVE",
    "POSITIVE",
    "STEPS",
    "UNIT",
    "Data",
    "Number",
    "Range",
    "Tree",
    "exportable",
    "is_array",
    "static",
    "transform_state",
]


@dataclasses.dataclass(frozen=True, repr=False)
class Range:
    """The values that a hyperparameter may take.

    Attributes:
      text: the range in words, for errors: "must be {text}".
      holds: a function that maps an array to booleans: whether each element is in the range.
        Combine conditions with `&` and `|`, because the array may be traced.
      whole: what happens to a whole number, an int or an integer array. "never": it is stored as a
        float, so that a fraction can replace it later. "kept": it stays an integer, because it
        counts steps and float32 would round it; beyond int32 it becomes a float. "only": only whole
        numbers are accepted.
    """

    text: str
    holds: Callable[[Any], Any]
    whole: Literal["never", "kept", "only"] = "never"

    def __repr__(self) -> str:
        return f"Range({self.text!r})"


TINY, LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
# Counts are int32. A count that has reached this number stays there; it does not wrap around.
LAST_COUNT = int(np.iinfo(np.int32).max)
BETA = Range("in [0, 1)", lambda x: (x >= 0) & (x < 1))
UNIT = Range("in [0, 1]", lambda x: (x >= 0) & (x <= 1))
# In the next three ranges a number must be finite in float32 too.
NON_NEGATIVE = Range("finite and at least 0", lambda x: (x >= 0) & (x <= LARGEST))
# Smaller numbers are subnormal in float32, and XLA may treat them as 0. With an epsilon of 0, the
# update of a weight that never had a gradient would be 0/0.
POSITIVE = Range(f"finite and at least {TINY:.2g}", lambda x: (x >= TINY) & (x <= LARGEST))
FINITE = Range("finite", lambda x: np.abs(x) <= LARGEST)
# A duration or a time, in steps.
STEPS = dataclasses.replace(POSITIVE, whole="kept")
COUNT = Range(
    f"a whole number of at least 1 and at most {LAST_COUNT}",
    lambda x: (x >= 1) & (x <= LAST_COUNT) & (x == np.floor(x)),
    whole="only",
)


_T = TypeVar("_T")


# The names of the classes that are registered with `jax.export`.
_EXPORTED: set[str] = set()


def exportable(cls: type[_T]) -> type[_T]:
    """Registers a named tuple, so that `jax.export` can serialize steps that take or return it.

    JAX registers one class for each name, and this cannot be undone. If a class is defined again,
    as in a cell of a notebook that is run twice, only its first definition can be exported.
    """
    ours = cls.__module__.startswith("adamjax.")
    name = f"adamjax.{cls.__name__}" if ours else f"{cls.__module__}.{cls.__qualname__}"
    if name in _EXPORTED:
        return cls
    _EXPORTED.add(name)
    return export.register_namedtuple_serialization(cls, serialized_name=name)


def transform_state(*slots: str, rule: bool = True) -> Callable[[type[_T]], type[_T]]:
    """Declares a named tuple as the state of a transform.

    Args:
      *slots: the names of its fields that are trees like the parameters, with an array of the
        parameter's shape for each leaf.
      rule: whether these slots belong to a rule. If so, `get_slot` reads them, and `step_count`
        reads the `count` beside them, if there is one.

    Returns:
      A decorator. It also registers the class, so that `jax.export` can serialize steps that take
      or return such a state.
    """

    def declare(cls: type[_T]) -> type[_T]:
        cls.slots = slots  # type: ignore[attr-defined]
        cls.rule_slots = slots if rule else ()  # type: ignore[attr-defined]
        return exportable(cls)

    return declare


def static(*, default: Any = dataclasses.MISSING, kw_only: bool = False, init: bool = True) -> Any:
    """A field that is part of the structure: hashed and compared by `jit`, never traced.

    With `init=False` it is not an argument of the constructor: `__post_init__` sets it.
    """
    return dataclasses.field(default=default, metadata={"static": True}, kw_only=kw_only, init=init)


def is_array(value: Any) -> bool:
    """Whether a hyperparameter is an array rather than a Python number."""
    return isinstance(value, (jax.Array, np.ndarray))


def _is_integer(x: Any) -> bool:
    """Whether an array has an integer dtype."""
    return bool(jnp.issubdtype(x.dtype, jnp.integer))


def _exceeds_int32(x: Any) -> bool:
    """Whether an array holds a whole number beyond int32."""
    return bool(np.any(np.abs(np.asarray(x, np.float64)) > LAST_COUNT))


def _same_leaf(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, jax.core.Tracer) or isinstance(b, jax.core.Tracer):
        return False
    if is_array(a) or is_array(b):
        return (
            is_array(a)
            and is_array(b)
            and a.dtype == b.dtype
            and np.array_equal(np.asarray(a), np.asarray(b))
        )
    return type(a) is type(b) and bool(a == b)


class _FieldNames:
    """A function that returns the names of a dataclass's data fields and of its static fields."""

    def __init__(self, cls: Any) -> None:
        self._cls = cls
        # The fields that the class had in the last call, and what that call returned.
        self._known: tuple[Any, tuple[str, ...], tuple[str, ...]] = None, (), ()

    def __call__(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        fields = self._cls.__dataclass_fields__
        known, data, meta = self._known
        if known is not fields:
            all_fields = dataclasses.fields(self._cls)
            data = tuple(f.name for f in all_fields if not f.metadata.get("static"))
            meta = tuple(f.name for f in all_fields if f.metadata.get("static"))
            self._known = fields, data, meta
        return data, meta


@dataclass_transform(
    frozen_default=True, eq_default=False, field_specifiers=(dataclasses.field, static)
)
class Data:
    """Base class of transforms and schedules: a subclass is a frozen dataclass and a pytree.

    Fields are the leaves (or subtrees) of the pytree, so an object can be an argument of `jit`, and
    `vmap` maps over it. Fields made with `static` belong to its structure. The repr of an
    object is a call that makes an equal object. Objects compare by value (arrays too), and can be
    pickled and copied. They have a hash unless a hyperparameter is an array.

    JAX rebuilds objects with tracers, axes or placeholders in place of the leaves, so unflattening
    skips `__init__`. Checks belong in `__post_init__`, which runs when a constructor or `replace`
    makes the object.
    While an array is traced its value is unknown, so its range is not checked.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        # The fields are looked up at each use: in the process that receives a class, cloudpickle
        # first makes an empty class, and sets its attributes afterwards.
        names = _FieldNames(cls)

        def flatten(x: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            data, meta = names()
            return tuple(getattr(x, n) for n in data), tuple(getattr(x, n) for n in meta)

        def flatten_with_keys(x: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
            leaves, aux = flatten(x)
            keys = map(jax.tree_util.GetAttrKey, names()[0])
            return tuple(zip(keys, leaves, strict=True)), aux

        def unflatten(aux: tuple[Any, ...], leaves: Any) -> Any:
            data, meta = names()
            x = object.__new__(cls)
            x.__dict__.update(zip(data, leaves, strict=True))
            x.__dict__.update(zip(meta, aux, strict=True))
            return x

        jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)

    def __post_init__(self) -> None:
        """Checks and completes the fields."""

    def set_fields(self, **values: Any) -> None:
        """Sets fields of a frozen object. Call it in `__post_init__` or on a new copy only."""
        self.__dict__.update(values)

    def check_range(self, name: str, allowed: Range) -> None:
        """Raises an error if the hyperparameter `name` is outside its range.

        If it is inside, the field is set to a Python number or a JAX array; for whole numbers see
        `Range.whole`. If it is an array that is being traced, only its dtype is checked.
        """
        self.set_fields(**{name: self._checked(name, getattr(self, name), allowed)})

    def check_flag(self, name: str) -> None:
        """Refuses a field that is not a bool. (The string "false" would count as true.)"""
        value = getattr(self, name)
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"{type(self).__name__}: {name} must be True or False, got {value!r}")
        self.set_fields(**{name: bool(value)})

    def _checked(self, name: str, value: Any, allowed: Range) -> Any:
        """The value as a Python number or JAX array; see `check_range`."""
        owner, whole = type(self).__name__, allowed.whole
        if isinstance(value, np.generic):
            value = value.item()
        is_real = isinstance(value, numbers.Real) and not isinstance(value, bool)
        value = native(f"{owner}: {name}", value)
        if is_array(value):
            is_real = jnp.issubdtype(value.dtype, jnp.integer) or (
                jnp.issubdtype(value.dtype, jnp.floating)
                and not (whole == "only" and isinstance(value, jax.core.Tracer))
            )
        if not is_real:
            kind = f"of type {type(value).__name__}"
            if isinstance(value, jax.core.Tracer):
                kind = f"of dtype {value.dtype.name}, which is being traced"
            raise TypeError(
                f"{owner}: {name} must be a number that is {allowed.text}, got {value!r} {kind}"
            )
        if isinstance(value, jax.core.Tracer):
            return value.astype(float) if _is_integer(value) and whole == "never" else value
        try:
            inside = bool(np.all(allowed.holds(np.asarray(value, np.float64))))
        except OverflowError:  # a whole number beyond all floats
            inside = False
        if not inside:
            raise ValueError(f"{owner}: {name} must be {allowed.text}, got {value!r}")
        if not is_array(value):
            # `value` is any real number: an int, a float, a Fraction, a longdouble, ... With "only"
            # it may be the float 3.0.
            stays_int = whole == "kept" and isinstance(value, int)
            # `jit` does not accept an int beyond int32.
            stays_int = stays_int and abs(value) <= LAST_COUNT
            return int(value) if whole == "only" or stays_int else float(value)
        if whole == "only":
            return jnp.asarray(value, jnp.int32)
        if _is_integer(value) and (whole == "never" or _exceeds_int32(value)):
            # Convert in NumPy first: JAX would cut a wide integer to 32 bits.
            return jnp.asarray(np.asarray(value, np.float64), float)
        return jnp.asarray(value)

    def replace(self, **changes: Any) -> Self:
        """A copy with other values in the named fields, checked like a new object.

        >>> import adamjax
        >>> adamjax.scale_by_adam().replace(b1=0.8)
        scale_by_adam(b1=0.8, b2=0.999, eps_hat=1e-07)
        """
        names = [f.name for f in dataclasses.fields(self)]
        for name in changes:
            if name not in names:
                raise TypeError(f"{type(self).__name__} has no field {name!r}; it has {names}")
        new = object.__new__(type(self))
        new.set_fields(**{**self.__dict__, **changes})
        new.__post_init__()
        return new

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        leaves, treedef = jax.tree.flatten(self)
        other_leaves, other_treedef = jax.tree.flatten(other)
        same = (treedef,) == (other_treedef,)
        return same and all(map(_same_leaf, leaves, other_leaves))

    def __hash__(self) -> int:
        leaves, treedef = jax.tree.flatten(self)
        if any(map(is_array, leaves)):
            raise TypeError(
                f"{type(self).__name__} holds an array as a hyperparameter, so it has no hash: "
                "pass it to jit as an argument, or make it with Python floats"
            )
        return hash((treedef, tuple(leaves)))

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in dataclasses.fields(self)
            if f.repr
            and getattr(self, f.name) is not None
            and not (f.metadata.get("static") and getattr(self, f.name) == f.default)
        ]
        return f"{type(self).__name__}({', '.join(shown)})"


# A hyperparameter. If a jitted function closes over an object, its Python floats are compile-time
# constants. If the object is an argument of the function, floats and arrays are traced.
Number = float | chex.Array
# Any pytree.
Tree = Any
