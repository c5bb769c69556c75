"""Finds the role of each variable of a Keras optimizer, by its name or by its place and shape."""

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from adamjax.convert.values import numbers_of

__all__ = [
    "SLOTS",
    "Layout",
    "keys_in_order",
    "layout_by_name",
    "layout_by_place",
    "plain_name",
    "variables_of",
]

# The roles of variables in the shape of a parameter: slots and others.
SLOTS = ("velocity_hat", "velocity", "momentum", "norm")
_ROLES = (*SLOTS, "average", "gradient_accumulator")
# The same under the names of tf_keras.
_TF_ROLES = {
    "m": "momentum",
    "v": "velocity",
    "vhat": "velocity_hat",
    "u": "norm",
    "average": "average",
    "gradient_accumulator": "gradient_accumulator",
}
# The roles of scalar variables, by their names.
_SCALARS = {
    "iteration": "count",
    "iter": "count",
    "learning_rate": "learning_rate",
    "current_learning_rate": "learning_rate",
    "momentum_cache": "product",
    # Nadam's product has no name of its own.
    "variable": "product",
}


class Layout(NamedTuple):
    """The role of each variable of an optimizer.

    Attributes:
      roles: for each variable its role, and the index of its parameter (0 for a scalar).
      names: the names of the parameters in their order, if the variables have names.
      optimizer: the name of the optimizer, empty if no variable's name contains it.
      doubtful: whether the variables of other optimizers have such names too.
      has_schedule: whether the variables show that the optimizer has a schedule.
      is_keras3: whether the names of the variables are those of Keras 3.
    """

    roles: tuple[tuple[str, int], ...]
    names: list[str] | None = None
    optimizer: str = ""
    doubtful: bool = False
    has_schedule: bool = False
    is_keras3: bool = False

    def of(self, role: str, values: Sequence[Any]) -> dict[int, Any]:
        """The values of the variables with this role, by the indices of their parameters."""
        pairs = zip(self.roles, values, strict=True)
        return {i: x for (role_of_x, i), x in pairs if role_of_x == role}

    def shapes(self, values: Sequence[Any]) -> list[tuple[int, ...]] | None:
        """The shapes of the parameters in their order; `None` if no slot shows them."""
        for role in dict.fromkeys(role for role, _ in self.roles if role in SLOTS):
            arrays = self.of(role, values)
            return [np.shape(arrays[i]) for i in sorted(arrays)]
        return None

    def order_fault(self, is_mapping: bool, is_pairs: bool) -> str:
        """Why the variables may not be in Keras' order; empty if they are.

        Args:
          is_mapping: whether a mapping contains them. JAX and others sort the keys of mappings.
          is_pairs: whether they are pairs (name, array), which may be the items of a mapping.
        """
        roles = [role for role, _ in self.roles]
        slots = [i for i, role in enumerate(roles) if role in _ROLES]
        first = {"count", "learning_rate"} if is_mapping else {"count"}
        if slots and first & set(roles[slots[0] :]):
            return (
                "the variables are not in Keras' order, in which the iteration and the learning "
                "rate come first (JAX, Orbax and h5py sort a dictionary by its keys)"
            )
        # The iteration and the rate may have been moved to the front, so only the names of the
        # parameters are checked.
        names = self.names or []
        by_part = sorted(names, key=lambda name: name.split("/"))
        if (is_mapping or is_pairs) and len(names) > 1 and names in (sorted(names), by_part):
            return (
                "the names are sorted, so their order need not be Keras' (JAX, Orbax and h5py sort "
                "a dictionary by its keys)"
            )
        return ""


def variables_of(owner: str, variables: Any) -> tuple[list[str | None], list[np.ndarray]]:
    """The names and values of variables, in any of the forms that `from_keras` takes."""
    if isinstance(variables, str | os.PathLike):
        raise TypeError(
            f"{owner}: got the path {variables!r}, expected optimizer.variables: load the model "
            "and pass its optimizer, or read the group optimizer/vars of a .weights.h5 with h5py"
        )
    if isinstance(variables, Mapping) and (
        {"class_name", "compile_config"} & set(variables) or isinstance(variables.get("name"), str)
    ):
        raise TypeError(
            f"{owner}: got a dictionary with {list(variables)[:4]}, a config, which has no "
            "variables: expected optimizer.variables, or the group optimizer/vars of the "
            ".weights.h5 file. adamjax.from_config makes the transform of the optimizer's config"
        )
    if isinstance(variables, Mapping) and {"state", "param_groups"} <= set(variables):
        raise TypeError(
            f"{owner}: got a state dict of torch.optim, expected optimizer.variables of Keras: "
            "adamjax.convert.from_torch converts it"
        )
    if isinstance(variables, Mapping):
        keys = keys_in_order(variables)
        values = [_value(owner, f"variable {key!r}", variables[key]) for key in keys]
        return [None if _are_numbers(keys) else _text(key) for key in keys], values
    if not isinstance(variables, Iterable) or getattr(variables, "shape", None) == ():
        raise TypeError(
            f"{owner}: expected optimizer.variables, pairs (name, array), or what "
            f"save_own_variables writes, got {type(variables).__name__}"
        )
    names: list[str | None] = []
    values = []
    for i, x in enumerate(variables):
        if isinstance(x, tuple | list) and len(x) == 2 and isinstance(x[0], str | bytes):
            names.append(_text(x[0]))
            x = x[1]
        else:
            names.append(getattr(x, "path", None) or getattr(x, "name", None))
        name = names[-1]
        values.append(_value(owner, f"variable {i if name is None else name!r}", x))
    return names, values


def _text(name: Any) -> str:
    """A name as a string; names from h5py are bytes."""
    return name.decode() if isinstance(name, bytes) else str(name)


def _are_numbers(keys: Iterable[Any]) -> bool:
    return all(_number_in(key).isdecimal() for key in keys)


def _number_in(key: Any) -> str:
    """A key without the `arr_` that `np.savez` puts before the numbers of arrays without names."""
    return str(key).removeprefix("arr_")


def keys_in_order(variables: Mapping[Any, Any]) -> list[Any]:
    """The keys of a mapping of variables in the order of the variables."""
    if _are_numbers(variables):
        return sorted(variables, key=lambda key: int(_number_in(key)))
    return list(variables)


def _value(owner: str, what: str, variable: Any) -> np.ndarray:
    """The value of a variable of Keras 3 or TensorFlow, or of an array."""
    value = getattr(variable, "value", None)
    if value is None or callable(value):
        # `numbers_of` reads tensors of torch, of which `numpy` cannot convert all.
        is_tensor = hasattr(variable, "numpy") and not hasattr(variable, "detach")
        value = variable.numpy() if is_tensor else variable
    return numbers_of(owner, what, value)


_NOT_BUILT = (
    "the optimizer has no moments, so it is not built yet: expected one that has trained, or call "
    "optimizer.build(model.trainable_variables) and load its variables"
)


# --- by place -------------------------------------------------------------------------------------


def layout_by_place(
    owner: str,
    values: Sequence[np.ndarray],
    shapes: Sequence[tuple[int, ...] | None],
    has_shape: Callable[[int, np.ndarray], bool],
    extra: Sequence[str],
    slots: Sequence[str],
    may_be_legacy: bool,
) -> Layout:
    """The layout of variables without names; arrays that fit no order, or several, are refused.

    Args:
      shapes: the shapes of the leaves, in Keras' order; `None` for a parameter without a leaf.
      has_shape: a function of the index of a parameter and an array: whether the array may have the
        shape of the parameter.
      extra: the roles before the slots, which options of the optimizer add.
      slots: the roles of the rule's slots.
      may_be_legacy: whether the order may be that of the optimizers before TensorFlow 2.11.
    """
    indices = range(len(shapes))

    def each(role: str) -> list[tuple[str, int]]:
        return [(role, i) for i in indices]

    front = [entry for role in extra for entry in each(role)]
    hat = each("velocity_hat") if "velocity_hat" in slots else []
    moments = [role for role in slots if role != "velocity_hat"]
    rate = ("learning_rate", 0)
    # Newer optimizers have their moments leaf by leaf. Those before TensorFlow 2.11 have no rate,
    # and all momenta first.
    by_leaf = (*front, *((role, i) for i in indices for role in moments), *hat)
    orders = {((), by_leaf), ((rate,), by_leaf)}
    if may_be_legacy:
        orders.add(((), (*front, *(entry for role in moments for entry in each(role)), *hat)))
    candidates = set()
    for rates, body in orders:
        for product in ([], [("product", 0)]):
            roles = (("count", 0), *rates, *body, *product)
            if len(roles) != len(values):
                continue
            pairs = list(zip(roles, values, strict=True))
            # All arrays of a parameter have one shape, even if the parameter has no leaf.
            shapes_at = {(i, x.shape) for (role, i), x in pairs if (role, i) in body}
            if len(shapes_at) == len(shapes) and all(
                has_shape(i, x) if (role, i) in body else x.shape == () for (role, i), x in pairs
            ):
                candidates.add(roles)
    if len(candidates) != 1:
        fault = "may be ordered in several ways" if candidates else "fit nothing that is expected"
        if all(x.shape == () for x in values) and any(shapes):
            raise ValueError(f"{owner}: {len(values)} arrays without names: {_NOT_BUILT}")
        raise ValueError(
            f"{owner}: {len(values)} arrays without names {fault}: shapes "
            f"{[list(x.shape) for x in values]} for leaves of {shapes}, each with "
            f"{[*extra, *slots]}. Expected the arrays of optimizer.variables (not of the model) in "
            "their order. If Keras' order of the leaves is another (a dictionary's is that of its "
            "sorted keys), give order=, the paths in Keras' order, or pass names, "
            "[(v.path, v.numpy()) for v in optimizer.variables]. If leaves are the transposes of "
            "Keras' variables, give adapt=. Of a LossScaleOptimizer, pass the variables of its "
            "inner_optimizer (optimizer/inner_optimizer/vars). If tx has another rule or average "
            "than the optimizer, build it like the optimizer. Expected: the iteration, a "
            "constant rate, all averages, and leaf by leaf its slots; or get_weights() before "
            "TensorFlow 2.11: all momenta before all velocities"
        )
    roles = candidates.pop()
    # Keras 3 has a variable for a constant rate, and tf_keras and older versions have none at all.
    # In these the iteration is int64, and Nadam's product is no variable. (With TensorFlow, the
    # iteration of Keras 3 is int64 too.)
    is_keras3 = values[0].dtype == np.int32 or ("product", 0) in roles
    has_schedule = is_keras3 and roles[1 : len(by_leaf) + 1] == by_leaf
    return Layout(roles, has_schedule=has_schedule)


# --- by name --------------------------------------------------------------------------------------


class _Name(NamedTuple):
    """The contents of a variable's name.

    Attributes:
      role: one of `_ROLES`.
      optimizer: the name of the optimizer; empty if the variable's name does not contain it.
      leaf: the name of the parameter.
    """

    role: str
    optimizer: str
    leaf: str


def _keras3_name(name: str) -> _Name | None:
    """The name of a variable of Keras 3, such as `adam/dense_kernel_momentum`."""
    optimizer, _, last = name.rpartition("/")
    role = next((role for role in _ROLES if last.endswith(f"_{role}")), None)
    return None if role is None else _Name(role, optimizer, last.removesuffix(f"_{role}"))


def _tf_keras_name(name: str) -> _Name | None:
    """The name of a variable of tf_keras, such as `Adam/m/dense/kernel` or `m/dense/kernel`."""
    parts = name.split("/")
    for i, part in enumerate(parts[:2]):
        if part in _TF_ROLES:
            return _Name(_TF_ROLES[part], "/".join(parts[:i]), "/".join(parts[i + 1 :]))
    return None


def _legacy_name(name: str) -> _Name | None:
    """The name of a variable before TensorFlow 2.11, such as `Adam/dense/kernel/m`."""
    if "/" not in name:
        return None
    optimizer, *leaf, last = name.removeprefix("training/").split("/")
    # In Adamax, v is the maximum.
    role = "norm" if last == "v" and "Adamax" in optimizer else _TF_ROLES.get(last)
    return None if role is None else _Name(role, optimizer, "/".join(leaf))


def plain_name(optimizer: str) -> str:
    """An optimizer's name in lower case without underscores and number: `adamw` for `AdamW_1`."""
    return re.sub(r"_\d+$", "", optimizer.rsplit("/", 1)[-1]).replace("_", "").lower()


def layout_by_name(owner: str, names: list[str], values: Sequence[np.ndarray], n: int) -> Layout:
    """The layout of variables with names, for an optimizer of `n` parameters."""
    bare = [re.sub(r":\d+$", "", name) for name in names]
    scalars = [_scalar_role(x, name) for name, x in zip(bare, values, strict=True)]
    problem = ""
    for parse in (_keras3_name, _tf_keras_name, _legacy_name):
        parsed = [None if s else parse(name) for s, name in zip(scalars, bare, strict=True)]
        triples = zip(names, scalars, parsed, strict=True)
        unknown = [name for name, scalar, contents in triples if not scalar and contents is None]
        if unknown:
            problem = problem or f"cannot tell what {unknown[0]!r} is"
            continue
        if parse is _legacy_name and len({x.optimizer for x in parsed if x}) > 1:
            # After `load_model`, these names begin with the name of the layer.
            parsed = [
                x and x._replace(optimizer="", leaf=f"{x.optimizer}/{x.leaf}") for x in parsed
            ]
        with_leaf = [x for x in parsed if x is not None]
        leaves: dict[str, list[str]] = {}
        for x in with_leaf:
            leaves.setdefault(x.role, []).append(x.leaf)
        problem = _miscounted(leaves, scalars, n)
        if problem:
            break
        _expect_order(owner, [x.role for x in with_leaf])
        order = next(iter(leaves.values()), [])
        roles, num_seen = [], dict.fromkeys(leaves, 0)
        for scalar, contents in zip(scalars, parsed, strict=True):
            if contents is None:
                roles.append((str(scalar), 0))
                continue
            # The index of the parameter, by its name or, if several have the same name, by order.
            is_unique = len(set(order)) == n
            i = order.index(contents.leaf) if is_unique else num_seen[contents.role]
            num_seen[contents.role] += 1
            roles.append((contents.role, i))
        if n and not with_leaf:
            raise ValueError(f"{owner}: {_NOT_BUILT}, got {names}")
        optimizers = {x.optimizer for x in with_leaf}
        if len(optimizers) > 1:
            problem = f"the variables are of several optimizers, {sorted(optimizers)}"
            break
        optimizer = optimizers.pop() if optimizers else ""
        doubtful = bool(optimizer) or parse is not _tf_keras_name
        pairs = zip(bare, scalars, strict=True)
        rates = [name.rsplit("/", 1)[-1] for name, role in pairs if role == "learning_rate"]
        # Keras 3 has a variable for a constant rate. tf_keras has one for the value of a schedule
        # only.
        is_keras3 = parse is _keras3_name
        has_schedule = is_keras3 if not rates else "current_learning_rate" in rates
        return Layout(tuple(roles), order, optimizer, doubtful, has_schedule, is_keras3)
    raise ValueError(
        f"{owner}: {problem}, in {names[:8]}{'...' if len(names) > 8 else ''}: expected "
        f"'iteration' and, for each of {n} leaves, the variables of Adam, AdamW, Adamax or Nadam "
        "(of a LossScaleOptimizer convert the inner_optimizer); order= gives the leaves"
    )


def _scalar_role(x: np.ndarray, name: str) -> str | None:
    """The role of a scalar variable; `None` for any other variable."""
    if x.shape != ():
        return None
    return _SCALARS.get(re.sub(r"_\d+$", "", name.rsplit("/", 1)[-1]))


def _expect_order(owner: str, roles: Sequence[str]) -> None:
    """Refuses velocities before momenta, which only RMSprop has, whatever its name."""
    both = "momentum" in roles and "velocity" in roles
    if both and roles.index("velocity") < roles.index("momentum"):
        raise ValueError(
            f"{owner}: velocities come before momenta, as those of RMSprop; expected the variables "
            "of Adam, AdamW, Adamax or Nadam in their order"
        )


def _miscounted(leaves: Mapping[str, Sequence[str]], scalars: Sequence[str | None], n: int) -> str:
    """What is wrong with the numbers of variables, by role; empty if nothing is."""
    if scalars.count("count") != 1:
        return f"there are {scalars.count('count')} of iteration"
    first = sorted(next(iter(leaves.values()), []))
    for role, names in leaves.items():
        if len(names) != n:
            return f"there are {len(names)} of {role}"
        if sorted(names) != first:
            other = sorted(set(names) ^ set(first))[0]
            return f"the leaves of {role} are others than those of {next(iter(leaves))}, {other!r}"
    return ""
