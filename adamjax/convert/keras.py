"""States from and to Keras' optimizers, of 3 and of tf.keras."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from adamjax.average import weight_ema
from adamjax.config import from_config
from adamjax.convert.common import (
    KERAS,
    RTOL,
    RULES,
    Filling,
    Gathered,
    Kept,
    Ours,
    Said,
    Source,
    Translation,
    as_expected,
    expect_place_to_gather,
    into_ours,
    kind_of,
    leaf_order,
    leaves_by_path,
    new_ours,
    number_of,
    numbers_of,
    steps_taken,
)
from adamjax.data import Tree
from adamjax.guard import accumulate_gradients
from adamjax.rows import RowGradient
from adamjax.scaling import scale_by_learning_rate
from adamjax.structure import walk

__all__ = ["from_keras", "to_keras"]

_KERAS_SCALARS = {
    "iteration": "count",
    "iter": "count",
    "learning_rate": "learning_rate",
    "current_learning_rate": "learning_rate",
    "momentum_cache": "product",
}
_KERAS_SUFFIXES = (
    "velocity_hat",
    "velocity",
    "momentum",
    "norm",
    "average",
    "gradient_accumulator",
)
_TF_KERAS = {
    "m": "momentum",
    "v": "velocity",
    "vhat": "velocity_hat",
    "u": "norm",
    "average": "average",
    "gradient_accumulator": "gradient_accumulator",
}
# Keras' optimizers that can go on here, by name without case, underscores and number.
_OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adam": ("adam", "amsgrad"),
    "adamw": ("adam", "amsgrad"),
    "adammultilr": ("adam", "amsgrad"),
    "adamax": ("adamax",),
    "nadam": ("nadam",),
}


class _Name(NamedTuple):
    """What the name of a variable says.

    Attributes:
      role: of `_KERAS_SUFFIXES`.
      optimizer: the name of its optimizer, empty where it is not said.
      leaf: the name of the parameter.
    """

    role: str
    optimizer: str
    leaf: str


def _keras3_name(name: str) -> _Name | None:
    """A variable of Keras 3, `adam/dense_kernel_momentum`."""
    optimizer, _, last = name.rpartition("/")
    role = next((s for s in _KERAS_SUFFIXES if last.endswith(f"_{s}")), None)
    return None if role is None else _Name(role, optimizer, last.removesuffix(f"_{role}"))


def _tf_keras_name(name: str) -> _Name | None:
    """A variable of tf_keras, `Adam/m/dense/kernel:0`, or without its optimizer."""
    parts = name.split("/")
    for i, part in enumerate(parts[:2]):
        if part in _TF_KERAS:
            return _Name(_TF_KERAS[part], "/".join(parts[:i]), "/".join(parts[i + 1 :]))
    return None


def _legacy_name(name: str) -> _Name | None:
    """A weight of the optimizers before 2.11, `Adam/dense/kernel/m:0`."""
    if "/" not in name:
        return None
    optimizer, *leaf, last = name.removeprefix("training/").split("/")
    # What Adamax calls v is its maximum.
    role = "norm" if last == "v" and "Adamax" in optimizer else _TF_KERAS.get(last)
    return None if role is None else _Name(role, optimizer, "/".join(leaf))


def _short(optimizer: str) -> str:
    return re.sub(r"_\d+$", "", optimizer.rsplit("/", 1)[-1]).replace("_", "").lower()


class _Layout(NamedTuple):
    """What each of Keras' variables is: its role, and the place of its parameter.

    Attributes:
      roles: of each variable, the two.
      names: of the parameters, where names say.
      optimizer: the name of the optimizer, empty where it is not said.
      doubtful: whether other optimizers name what they keep in the same way.
    """

    roles: tuple[tuple[str, int], ...]
    names: list[str] | None = None
    optimizer: str = ""
    doubtful: bool = False

    def of(self, role: str, values: Sequence[Any]) -> dict[int, Any]:
        pairs = zip(self.roles, values, strict=True)
        return {place: x for (found, place), x in pairs if found == role}


def _entries(owner: str, variables: Any) -> tuple[list[str | None], list[np.ndarray]]:
    """The names and values of variables, in any of the forms in which Keras gives them."""
    if isinstance(variables, Mapping):
        keys = list(variables)
        numbered = all(str(key).isdigit() for key in keys)
        keys = sorted(keys, key=int) if numbered else keys
        values = [_value(owner, f"variable {key!r}", variables[key]) for key in keys]
        return [None if numbered else str(key) for key in keys], values
    if not isinstance(variables, Iterable) or getattr(variables, "shape", None) == ():
        raise TypeError(
            f"{owner}: expected optimizer.variables, pairs (name, array), or what "
            f"save_own_variables writes, got {type(variables).__name__}"
        )
    names: list[str | None] = []
    values = []
    for i, x in enumerate(variables):
        if isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str):
            name, x = x
        else:
            name = getattr(x, "path", None) or getattr(x, "name", None)
        names.append(name)
        values.append(_value(owner, f"variable {i if name is None else name!r}", x))
    return names, values


def _value(owner: str, what: str, variable: Any) -> np.ndarray:
    """The value of a variable of Keras 3 or TensorFlow, or of an array."""
    value = getattr(variable, "value", None)
    if value is None or callable(value):
        value = variable.numpy() if hasattr(variable, "numpy") else variable
    return numbers_of(owner, what, value)


def _layout_by_place(
    owner: str,
    values: Sequence[np.ndarray],
    shapes: list[tuple[int, ...]],
    blocks: list[str],
    slots: list[str],
    interleaved: bool,
) -> _Layout:
    """What each variable is, by its place and shape."""
    places = range(len(shapes))

    def block(role: str) -> list[tuple[str, int]]:
        return [(role, i) for i in places]

    front = [entry for role in blocks for entry in block(role)]
    hat = block("velocity_hat") if "velocity_hat" in slots else []
    pair = [role for role in slots if role != "velocity_hat"]
    rate = [("learning_rate", 0)]
    # Leaf by leaf, and in optimizers before 2.11, which keep no rate, slot by slot.
    by_leaf = (*front, *((role, i) for i in places for role in pair), *hat)
    bodies = {(by_leaf, ()), (by_leaf, tuple(rate))}
    if not interleaved:
        bodies.add(((*front, *(entry for role in pair for entry in block(role)), *hat), ()))
    fits = set()
    for body, rates in bodies:
        for product in ([], [("product", 0)]):
            roles = (("count", 0), *rates, *body, *product)
            expected = [shapes[i] if (role, i) in body else () for role, i in roles]
            if [x.shape for x in values] == expected:
                fits.add(roles)
    if len(fits) != 1:
        found = [list(x.shape) for x in values]
        how = "fit nothing that is expected" if not fits else "may be ordered in several ways"
        raise ValueError(
            f"{owner}: {len(values)} arrays without names {how}: shapes {found} for leaves of "
            f"{shapes}, each with {blocks + slots}. Give names, [(v.path, v.numpy()) for v in "
            "optimizer.variables], or order=, or build tx like the optimizer"
        )
    return _Layout(fits.pop())


def _layout_by_name(owner: str, names: list[str], values: Sequence[np.ndarray], n: int) -> _Layout:
    bare = [re.sub(r":\d+$", "", name) for name in names]
    problem = ""
    for parsed in (_keras3_name, _tf_keras_name, _legacy_name):
        scalars = [_scalar_role(x, name) for name, x in zip(bare, values, strict=True)]
        found = [None if s else parsed(name) for s, name in zip(scalars, bare, strict=True)]
        unknown = [
            name for name, s, f in zip(names, scalars, found, strict=True) if not s and f is None
        ]
        if unknown:
            problem = problem or f"cannot tell what {unknown[0]!r} is"
            continue
        slots: dict[str, list[str]] = {}
        for one in filter(None, found):
            slots.setdefault(one.role, []).append(one.leaf)
        problem = _miscounted(slots, scalars, n)
        if problem:
            break
        _expect_order(owner, [named.role for named in found if named is not None])
        order = next(iter(slots.values()), [])
        roles, seen = [], dict.fromkeys(slots, 0)
        for s, named in zip(scalars, found, strict=True):
            if named is None:
                roles.append((str(s), 0))
                continue
            # By its leaf; those that have one name, by place.
            place = order.index(named.leaf) if len(set(order)) == n else seen[named.role]
            seen[named.role] += 1
            roles.append((named.role, place))
        several = {one.optimizer for one in found if one is not None}
        if len(several) > 1:
            problem = f"the variables are of several optimizers, {sorted(several)}"
            break
        optimizer = several.pop() if several else ""
        return _Layout(
            tuple(roles), order, optimizer, bool(optimizer) or parsed is not _tf_keras_name
        )
    raise ValueError(
        f"{owner}: {problem}, in {names[:8]}{'...' if len(names) > 8 else ''}: expected "
        f"'iteration' and, for each of {n} leaves, what Adam, AdamW, Adamax or Nadam keep (of a "
        "LossScaleOptimizer convert the inner_optimizer); order= says which leaves there are"
    )


def _expect_order(owner: str, roles: Sequence[str]) -> None:
    """Refuses velocities that come before momenta: RMSprop's, whatever its name."""
    both = "momentum" in roles and "velocity" in roles
    if both and roles.index("velocity") < roles.index("momentum"):
        raise ValueError(
            f"{owner}: velocities come before momenta, as of RMSprop; expected the variables of "
            "Adam, AdamW, Adamax or Nadam in their order"
        )


def _miscounted(slots: Mapping[str, Sequence[str]], scalars: Sequence[str | None], n: int) -> str:
    """What is wrong with the numbers of variables of each role; empty if nothing."""
    if scalars.count("count") != 1:
        return f"there are {scalars.count('count')} of iteration"
    first = sorted(next(iter(slots.values()), []))
    for role, leaves in slots.items():
        if len(leaves) != n:
            return f"there are {len(leaves)} of {role}"
        if sorted(leaves) != first:
            other = sorted(set(leaves) ^ set(first))[0]
            return f"the leaves of {role} are others than those of {next(iter(slots))}, {other!r}"
    return ""


def _scalar_role(x: np.ndarray, name: str) -> str | None:
    """What a variable is that is kept once."""
    if x.shape != ():
        return None
    last = re.sub(r"_\d+$", "", name.rsplit("/", 1)[-1])
    # Nadam's product has no name of its own.
    return "product" if last == "variable" else _KERAS_SCALARS.get(last)


def _identified(source: Source, layout: _Layout, optimizer: Any, product: bool) -> tuple[str, ...]:
    """What kinds of rule the variables may be of, by the class or the name of the optimizer."""
    every = ("adam", "nadam", "amsgrad", "adamax")
    if optimizer is not None:
        name, own = type(optimizer).__name__, type(optimizer).__module__.split(".")[0]
        if own in ("keras", "tf_keras", "tensorflow") and _short(name) in _OPTIMIZERS:
            return _OPTIMIZERS[_short(name)]
        source.doubts.append(
            f"the optimizer is a {type(optimizer).__module__}.{name}: expected Keras' Adam, "
            "AdamW, Adamax or Nadam (of a LossScaleOptimizer convert the inner_optimizer). Start "
            "another one anew, tx.init(params)"
        )
        return every
    if layout.names is None:
        # Nadam of Keras 3 keeps its product, that of tf_keras only shows in names.
        return ("adam", "amsgrad", "adamax") if not product else ("nadam",)
    if not layout.doubtful:
        return every
    if _short(layout.optimizer) in _OPTIMIZERS:
        return _OPTIMIZERS[_short(layout.optimizer)]
    whose = (
        f"the variables are of an optimizer that is named {layout.optimizer!r}"
        if layout.optimizer
        else "the names of the variables do not say which optimizer they are of"
    )
    source.doubts.append(
        f"{whose}: expected names of Adam, AdamW, Adamax or Nadam, 'adam/dense_kernel_momentum' "
        "(others, as RMSprop and Lamb, keep what has the same names): give the optimizer itself "
        "in place of its variables, or pairs (v.path, array)"
    )
    return every


# Options of an optimizer, and what transforms here call them.
_MORE = {
    "clipnorm": "max_norm",
    "global_clipnorm": "max_norm",
    "clipvalue": "limit",
    "ema_momentum": "momentum",
    "ema_overwrite_frequency": "overwrite_frequency",
}


def _config_facts(owner: str, optimizer: Any) -> dict[str, Any]:
    """What an optimizer says of its hyperparameters."""
    names = {"beta_1": "b1", "beta_2": "b2", "epsilon": "eps", "weight_decay": "weight_decay"}
    values = {ours: getattr(optimizer, theirs, None) for theirs, ours in names.items()}
    facts = {
        name: number_of(owner, f"{name} of the optimizer", x)
        for name, x in values.items()
        if x is not None
    }
    said = {name: getattr(optimizer, name, None) for name in _MORE}
    averages = bool(getattr(optimizer, "use_ema", False))
    more = {
        ours: number_of(owner, f"{name} of the optimizer", said[name])
        for name, ours in _MORE.items()
        if said[name] and (averages or not name.startswith("ema"))
    }
    factor = getattr(optimizer, "loss_scale_factor", None)
    if factor is not None and factor != 1:
        more["factor"] = 1 / number_of(owner, "loss_scale_factor of the optimizer", factor)
    schedule = _schedule(getattr(optimizer, "_learning_rate", None))
    facts |= {} if schedule is None else {"learning_rate": schedule}
    # Which variables are excluded from the decay it does not say.
    return {**facts, "decoupled": True, "masks_decay": True, "more": more}


def _schedule(schedule: Any) -> Any:
    """One of Keras' own schedules as one of ours; `None` for anything else."""
    if not hasattr(schedule, "get_config"):
        return None
    try:
        return from_config({"class_name": type(schedule).__name__, "config": schedule.get_config()})
    except (TypeError, ValueError):
        return None  # one of its user's


def _read_keras(
    owner: str, variables: Any, ours: Ours, order: Sequence[str | None] | None, check: bool
) -> tuple[Source, _Layout, list[str | None], list[np.ndarray]]:
    optimizer = variables if hasattr(variables, "get_config") else None
    if optimizer is not None:
        variables = optimizer.variables
        variables = variables() if callable(variables) else variables
    names, values = _entries(owner, variables)
    leaves = leaves_by_path(owner, ours.params)
    gathering = [p for p in ours.parts if isinstance(p.tx, accumulate_gradients)]
    if all(name is not None for name in names):
        n = len(leaves if order is None else order)
        layout = _layout_by_name(owner, [str(name) for name in names], values, n)
        paths = leaf_order(owner, order, ours.params, "Keras", layout.names, check)
    else:
        paths = leaf_order(owner, order, ours.params)
        states = jax.tree.leaves(ours.state, is_leaf=lambda x: isinstance(x, RULES))
        kinds = [kind_of(x) for x in states if isinstance(x, RULES)]
        slots = list(KERAS.names[kinds[0] if kinds else "adam"].values())
        averaging = [p for p in ours.parts if isinstance(p.tx, weight_ema)]
        blocks = ["average"] * bool(averaging) + ["gradient_accumulator"] * bool(gathering)
        shapes = [() if p is None else np.shape(leaves[p]) for p in paths]
        given = isinstance(variables, Mapping)
        layout = _layout_by_place(owner, values, shapes, blocks, slots, given)
    source = Source(owner)
    count = steps_taken(owner, "the optimizer", layout.of("count", values)[0])
    totals = layout.of("gradient_accumulator", values)
    micro = 0
    if totals:
        if not gathering:
            raise ValueError(
                f"{owner}: the optimizer has gradient_accumulation_steps: wrap tx in "
                "accumulate_gradients of as many steps"
            )
        steps = int(gathering[0].tx.steps)
        theirs = getattr(optimizer, "gradient_accumulation_steps", None) or steps
        count, micro = divmod(count, steps)
        held = {str(p): totals[i] for i, p in enumerate(paths) if p}
        source.gathered, source.gathers = [Gathered(micro, held)], True
        some = any(map(np.any, totals.values()))
        if theirs != steps or some != bool(micro):
            source.doubts.append(
                f"after {count * steps + micro} micro-batches the optimizer has "
                f"{'some' if some else 'no'} gradients gathered, which does not fit "
                f"accumulate_gradients of {steps} steps in tx: make them as many as "
                "gradient_accumulation_steps"
            )
    roles = dict.fromkeys(role for role, _ in layout.roles)
    kept = {r: layout.of(r, values) for r in roles if r in set(_KERAS_SUFFIXES[:4])}
    product = layout.of("product", values).get(0)
    rate = layout.of("learning_rate", values).get(0)
    facts: dict[str, Any] = {}
    if rate is not None:
        facts["learning_rate"] = number_of(owner, "the learning rate", rate)
    facts |= {} if optimizer is None else _config_facts(owner, optimizer)
    either = _identified(source, layout, optimizer, product is not None)
    either = either if product is None else tuple(k for k in either if k == "nadam")
    for i, path in enumerate(paths):
        if path is not None:
            held = {role: arrays[i] for role, arrays in kept.items()}
            source.add(path, Kept(count, held, either, product, facts))
    averages = layout.of("average", values)
    if averages:
        source.average = {str(p): averages[i] for i, p in enumerate(paths) if p}
        if count == 0 and micro == 0:
            # Keras 3 starts from zero and copies the weights in the first step.
            source.average = {path: leaves[path] for path in source.average}
    return source, layout, paths, values


def _check_keras(owner: str, ours: Ours, check: bool) -> None:
    """Refuses to count in steps what Keras counts in micro-batches."""
    if not check or not any(isinstance(p.tx, accumulate_gradients) for p in ours.parts):
        return
    inside = {
        id(p.tx)
        for part in ours.parts
        if isinstance(part.tx, accumulate_gradients)
        for p in walk(part.tx.tx, part.state.inner, part.params)
    }
    for part in ours.parts:
        tx = part.tx
        if isinstance(tx, weight_ema) and (id(tx) in inside or tx.overwrite_frequency is not None):
            raise ValueError(
                f"{owner}: with gradient_accumulation_steps Keras averages the weights after every "
                "micro-batch: put weight_ema behind accumulate_gradients, without "
                "overwrite_frequency, or pass check=False to average steps from here"
            )
        if isinstance(tx, scale_by_learning_rate) and callable(tx.learning_rate):
            raise ValueError(
                f"{owner}: with gradient_accumulation_steps Keras calls a schedule with the number "
                "of micro-batches, here it is that of steps: pass check=False with a schedule that "
                "allows for it"
            )


def from_keras(
    variables: Any,
    tx: Any,
    params: Tree,
    *,
    order: Sequence[str | None] | None = None,
    average: Tree = None,
    check: bool = True,
) -> Any:
    """The state of `tx` that goes on from the variables of a Keras optimizer.

    Of Keras 3 (any backend), of tf_keras, and of the optimizers before TensorFlow 2.11: `Adam`
    (with `amsgrad`), `AdamW`, `Adamax` and `Nadam`, with `use_ema` (a `weight_ema` last in `tx`)
    and `gradient_accumulation_steps` (`accumulate_gradients`). A Keras model's weight decay, clips
    and betas are in its config, not in its variables: build `tx` with the same, and with Keras'
    epsilon, which is `eps_hat` (for Adamax and Nadam `eps`), 1e-7 by default; or let
    `from_config(keras.optimizers.serialize(optimizer))` build it.

    Other optimizers keep what is called the same and is something else (RMSprop, Lamb, Muon,
    ScheduleFreeAdamW). They are told by the class of the optimizer, and else by its name in the
    names of the variables, `adam/dense_kernel_momentum`: with a name of your own,
    `Adam(name="mine")`, give the optimizer itself. Arrays without any names do not say what they
    are of: refused is what does not fit in shape, or cannot be Adam's in value (a negative
    `velocity`, moments that `b1` and `b2` do not allow). The arrays of Lamb, ScheduleFreeAdamW,
    Muon (of vectors) and Adamax cannot be told from Adam's.

    Args:
      variables: one of: the optimizer itself, whose betas, epsilon, weight decay, clips, average,
        loss scale and schedule (of Keras' own) are then compared as well; `optimizer.variables`;
        pairs (name, array), for instance `[(v.path, v.numpy()) for v in optimizer.variables]` (in
        TensorFlow's Keras `v.name`); a mapping of names to arrays; the mapping of `"0"`, `"1"`, ...
        to arrays that `save_own_variables` fills, such as the group `optimizer/vars` of a
        `.weights.h5` file;
        `get_weights()`, a list of arrays. Without names, what an array is must follow from its
        place and shape.
      tx: a transform of ours.
      params: the parameters at that step.
      order: the path of each variable that the optimizer was built on, in their order; `None` for
        one that is not to be converted. By default as the variables are named, where their names
        are the paths of the leaves one to one (`dense_kernel` is `dense/kernel`), and else the
        floating leaves of `params` in their order, if all have shapes of their own or, as the
        items of a list, no names.
      average: an average of the weights to go on from in place of Keras', a tree like `params`.
      check: as for `from_optax`.

    Returns:
      A state like that of `tx.init(params)`.

    Raises:
      TypeError: `variables` is something else.
      ValueError: something does not fit or would not go on as before. The message names the leaf.

    >>> import adamjax, jax.numpy as jnp, numpy as np
    >>> variables = [("adam/iteration", np.array(7)), ("adam/learning_rate", np.array(0.1)),
    ...              ("adam/w_momentum", np.full(2, 0.5)), ("adam/w_velocity", np.ones(2))]
    >>> state = adamjax.convert.from_keras(variables, adamjax.adam(0.1), {"w": jnp.zeros(2)})
    >>> adamjax.step_count(state), adamjax.get_slot(state, "m")["w"]
    (Array(7, dtype=int32), Array([0.5, 0.5], dtype=float32))
    """
    new = new_ours("from_keras", tx, params)
    _check_keras("from_keras", new, check)
    source, *_ = _read_keras("from_keras", variables, new, order, check)
    return into_ours(source, KERAS, new, average, check, RTOL)


def to_keras(
    state: Any,
    tx: Any,
    params: Tree,
    target: Any,
    *,
    order: Sequence[str | None] | None = None,
    check: bool = True,
) -> Any:
    """The values of the variables with which a Keras optimizer goes on from a state of `tx`.

    Args:
      state, tx, params: as for `to_optax`.
      target: the new optimizer, which must be built, or its variables, in one of the forms of
        `from_keras`. Learning rates and dtypes are kept, and what `order` leaves out.
      order, check: as for `from_keras`.

    Returns:
      NumPy arrays: by the same keys for a mapping, else a list in the order of `target`, for
      `variable.assign(array)` each, or `optimizer.set_weights`.

    Raises:
      TypeError, ValueError: as for `from_keras`.

    >>> import adamjax, jax.numpy as jnp, numpy as np
    >>> tx, params = adamjax.adam(0.1), {"w": jnp.zeros(2)}
    >>> updates, state = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    >>> target = {"0": np.array(0), "1": np.float32(0.1), "2": np.zeros(2), "3": np.zeros(2)}
    >>> adamjax.convert.to_keras(state, tx, params, target)["2"]
    array([0.1, 0.1])
    """
    ours = Ours("to_keras", tx, state, params)
    _check_keras("to_keras", ours, check)
    wanted, layout, paths, values = _read_keras("to_keras", target, ours, order, check)
    wanted.refuse_doubts(check)
    source = ours.read()
    expect_place_to_gather("to_keras", source, wanted)
    gathered = source.gathered_of(None)
    filling = Filling(source, check)
    translation = Translation(filling, KERAS, RTOL)
    found: dict[str, Kept] = {}
    made: dict[tuple[str, int], Any] = {}
    for i, path in enumerate(paths):
        if path is None:
            continue
        kind, found[path], slots = translation.to_theirs(path)
        place = wanted.kept[path][0]
        as_expected("to_keras", KERAS, kind, path, dataclasses.replace(place, product=None))
        made |= {(name, i): (path, x) for name, x in slots.items()}
        if source.average is not None and path in source.average:
            made["average", i] = path, source.average[path]
        if gathered is not None and path in gathered.totals:
            total = gathered.totals[path]
            dense = total.to_dense() if isinstance(total, RowGradient) else total
            made["gradient_accumulator", i] = path, dense
    filling.finish()
    count = filling.counted(found)
    steps = [p.tx.steps for p in ours.parts if isinstance(p.tx, accumulate_gradients)]
    calls = count * int(steps[0]) + gathered.micro if gathered and steps else count
    products = [k.product for k in found.values() if k.product is not None]
    scalars = {("count", 0): calls, ("product", 0): products[0] if products else None}
    arrays = []
    for (role, i), value in zip(layout.roles, values, strict=True):
        if scalars.get((role, i)) is not None:
            arrays.append(np.asarray(scalars[role, i]).astype(value.dtype))
        elif (role, i) in made:
            path, x = made[role, i]
            arrays.append(filling.array(path, role, x, value))
        elif role == "average" and paths[i] is not None:
            raise ValueError(
                f"to_keras: the optimizer averages the weights (use_ema), but the state has no "
                f"average of {paths[i]!r}: end tx in weight_ema, or build it without use_ema"
            )
        else:
            arrays.append(value)
    if check:
        Said(ours, KERAS).check(wanted.kept)
    if not isinstance(target, Mapping):
        return arrays
    keys = list(target)
    keys = sorted(keys, key=int) if all(str(key).isdigit() for key in keys) else keys
    return dict(zip(keys, arrays, strict=True))
