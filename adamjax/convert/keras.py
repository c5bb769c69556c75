"""States from and to Keras' optimizers, of 3 and of tf.keras."""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from adamjax.average import weight_ema
from adamjax.convert.common import (
    KERAS,
    RTOL,
    RULES,
    Filling,
    Kept,
    Ours,
    Said,
    Source,
    Translation,
    as_expected,
    into_ours,
    kind_of,
    leaf_order,
    leaves_by_path,
    new_ours,
    no_place_to_gather,
    numpy_array,
    steps_taken,
)
from adamjax.data import Tree
from adamjax.guard import accumulate_gradients
from adamjax.parts import walk
from adamjax.rows import RowGradient
from adamjax.scaling import scale_by_learning_rate

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
_TF_KERAS = {"m": "momentum", "v": "velocity", "vhat": "velocity_hat", "u": "norm"}


def _keras3_role(name: str) -> str | None:
    """What a variable of Keras 3 is, `adam/dense_kernel_momentum`."""
    last = name.rsplit("/", 1)[-1]
    return next((s for s in _KERAS_SUFFIXES if last.endswith(f"_{s}")), None)


def _tf_keras_role(name: str) -> str | None:
    """What a variable of tf_keras is, `Adam/m/dense/kernel:0`."""
    first = [_TF_KERAS.get(part, part) for part in name.split("/")[:2]]
    return next((part for part in first if part in _KERAS_SUFFIXES), None)


def _legacy_role(name: str) -> str | None:
    """What a weight of the optimizers before 2.11 is, `Adam/dense/kernel/m:0`."""
    last = name.rsplit("/", 1)[-1]
    # What Adamax calls v is its maximum.
    return "norm" if last == "v" and "Adamax" in name else _TF_KERAS.get(last)


class _Layout(NamedTuple):
    """What each of Keras' variables is: its role, and the place of its parameter."""

    roles: tuple[tuple[str, int], ...]

    def of(self, role: str, values: Sequence[Any]) -> dict[int, Any]:
        pairs = zip(self.roles, values, strict=True)
        return {place: x for (found, place), x in pairs if found == role}


def _entries(owner: str, variables: Any) -> tuple[list[str | None], list[np.ndarray]]:
    """The names and values of variables, in any of the forms in which Keras gives them."""
    if isinstance(variables, Mapping):
        keys = list(variables)
        if all(str(key).isdigit() for key in keys):
            keys = sorted(keys, key=int)
            return [None] * len(keys), [np.asarray(variables[key]) for key in keys]
        return [str(key) for key in keys], [np.asarray(variables[key]) for key in keys]
    if not isinstance(variables, Iterable):
        raise TypeError(
            f"{owner}: expected optimizer.variables, pairs (name, array), or what "
            f"save_own_variables writes, got {type(variables).__name__}"
        )
    names: list[str | None] = []
    values = []
    for x in variables:
        if isinstance(x, tuple) and len(x) == 2 and isinstance(x[0], str):
            name, x = x
        else:
            name = getattr(x, "path", None) or getattr(x, "name", None)
        names.append(name)
        values.append(_value(x))
    return names, values


def _value(variable: Any) -> np.ndarray:
    """The value of a variable of Keras 3 or TensorFlow, or of an array."""
    value = getattr(variable, "value", None)
    if value is None or callable(value):
        return np.asarray(variable.numpy() if hasattr(variable, "numpy") else variable)
    return numpy_array(value)


def _layout(
    owner: str,
    names: Sequence[str | None],
    values: Sequence[np.ndarray],
    shapes: list[tuple[int, ...]],
    blocks: list[str],
    slots: list[str],
    interleaved: bool,
) -> _Layout:
    """What each variable is: by its name, or else by its place and shape."""
    if all(name is not None for name in names):
        return _layout_by_name(owner, [str(name) for name in names], values, len(shapes))
    places = range(len(shapes))

    def block(role: str) -> list[tuple[str, int]]:
        return [(role, i) for i in places]

    front = [entry for role in blocks for entry in block(role)]
    hat = block("velocity_hat") if "velocity_hat" in slots else []
    pair = [role for role in slots if role != "velocity_hat"]
    # Leaf by leaf, and in optimizers before 2.11 slot by slot.
    bodies = {(*front, *((role, i) for i in places for role in pair), *hat)}
    if not interleaved:
        bodies.add((*front, *(entry for role in pair for entry in block(role)), *hat))
    fits = set()
    for body in bodies:
        for rate in ([], [("learning_rate", 0)]):
            for product in ([], [("product", 0)]):
                roles = (("count", 0), *rate, *body, *product)
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


# Keras' other optimizers, some of which keep what is named as Adam's moments are.
_OTHERS = {
    *("rmsprop", "lamb", "muon", "schedulefreeadamw", "ftrl", "lion", "sgd", "adafactor"),
    *("adagrad", "adadelta", "multioptimizer", "lossscaleoptimizer"),
}


def _expect_adam(owner: str, names: Sequence[str]) -> None:
    """Refuses the variables of Keras' other optimizers, by the optimizer's name in front."""
    for name in names:
        first = re.sub(r"_\d+$", "", name.split("/")[0])
        if "/" in name and first.replace("_", "").lower() in _OTHERS:
            raise ValueError(
                f"{owner}: {name!r} is a variable of Keras' {first}, expected those of Adam, "
                "AdamW, Adamax or Nadam: start the run anew, with tx.init(params)"
            )


def _layout_by_name(owner: str, names: list[str], values: Sequence[np.ndarray], n: int) -> _Layout:
    _expect_adam(owner, names)
    bare = [re.sub(r":\d+$", "", name) for name in names]
    problem = ""
    for role_of in (_keras3_role, _tf_keras_role, _legacy_role):
        found = [
            _scalar_role(x, name) or role_of(name) for name, x in zip(bare, values, strict=True)
        ]
        if None in found:
            unknown = names[found.index(None)]
            problem = problem or f"cannot tell what {unknown!r} is"
            continue
        roles = [str(role) for role in found]
        counts = {role: roles.count(role) for role in dict.fromkeys(roles)}
        wrong = [r for r, count in counts.items() if r in _KERAS_SUFFIXES and count != n]
        if not wrong and counts.get("count") == 1:
            _expect_order(owner, roles)
            places = [roles[:i].count(role) for i, role in enumerate(roles)]
            return _Layout(tuple(zip(roles, places, strict=True)))
        what = wrong[0] if wrong else "count"
        problem = f"there are {counts.get(what, 0)} of {'iteration' if what == 'count' else what}"
        break
    raise ValueError(
        f"{owner}: {problem}, in {names[:8]}{'...' if len(names) > 8 else ''}: expected "
        f"'iteration' and, for each of {n} leaves, what Adam, AdamW, Adamax or Nadam keep (of a "
        "LossScaleOptimizer convert the inner_optimizer); order= says which leaves there are"
    )


def _expect_order(owner: str, roles: Sequence[str]) -> None:
    """Refuses velocities that come before momenta: RMSprop's, under another name."""
    both = "momentum" in roles and "velocity" in roles
    if both and roles.index("velocity") < roles.index("momentum"):
        raise ValueError(
            f"{owner}: velocities come before momenta, as of RMSprop; expected the variables of "
            "Adam, AdamW, Adamax or Nadam in their order"
        )


def _scalar_role(x: np.ndarray, name: str) -> str | None:
    """What a variable is that is kept once."""
    if x.shape != ():
        return None
    last = re.sub(r"_\d+$", "", name.rsplit("/", 1)[-1])
    # Nadam's product has no name of its own.
    return "product" if last == "variable" else _KERAS_SCALARS.get(last)


def _read_keras(
    owner: str, variables: Any, ours: Ours, order: Sequence[str | None] | None
) -> tuple[Source, _Layout, list[str | None], list[np.ndarray]]:
    names, values = _entries(owner, variables)
    paths = leaf_order(owner, order, ours.params)
    leaves = leaves_by_path(ours.params)
    states = jax.tree.leaves(ours.state, is_leaf=lambda x: isinstance(x, RULES))
    kinds = [kind_of(x) for x in states if isinstance(x, RULES)]
    slots = KERAS.names[kinds[0] if kinds else "adam"]
    averaging = [p for p in ours.parts if isinstance(p.tx, weight_ema)]
    gathering = [p for p in ours.parts if isinstance(p.tx, accumulate_gradients)]
    blocks = ["average"] * bool(averaging) + ["gradient_accumulator"] * bool(gathering)
    shapes = [() if p is None else np.shape(leaves[p]) for p in paths]
    layout = _layout(
        owner, names, values, shapes, blocks, list(slots.values()), isinstance(variables, Mapping)
    )
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
        count, micro = divmod(count, int(gathering[0].tx.steps))  # type: ignore[attr-defined]
        source.gathered = micro, {str(p): totals[i] for i, p in enumerate(paths) if p}
    roles = dict.fromkeys(role for role, _ in layout.roles)
    kept = {r: layout.of(r, values) for r in roles if r in set(_KERAS_SUFFIXES[:4])}
    product = layout.of("product", values).get(0)
    rate = layout.of("learning_rate", values).get(0)
    facts = {} if rate is None else {"learning_rate": rate}
    either = ("adam", "nadam", "amsgrad", "adamax") if product is None else ("nadam",)
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
    epsilon, which is `eps_hat` (for Adamax and Nadam `eps`), 1e-7 by default.

    Args:
      variables: one of: `optimizer.variables`; pairs (name, array), for instance
        `[(v.name, v.numpy()) for v in optimizer.variables]`; a mapping of names to arrays; the
        mapping of `"0"`, `"1"`, ... to arrays that `save_own_variables` fills, such as the group
        `optimizer/vars` of a `.weights.h5` file; `get_weights()`, a list of arrays. Without names,
        what an array is must follow from its place, shape and values: Lamb's moments, and Muon's of
        vectors, cannot be told from Adam's then, nor where the optimizer has a name of its own.
      tx: a transform of ours.
      params: the parameters at that step.
      order: the path of each variable that the optimizer was built on, in their order; `None` for
        one that is not to be converted. By default the floating leaves of `params` in their order.
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
    source, *_ = _read_keras("from_keras", variables, new, order)
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
      target: the variables of the new optimizer, which must be built, in one of the forms of
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
    wanted, layout, paths, values = _read_keras("to_keras", target, ours, order)
    source = ours.read()
    if wanted.gathered is None:
        no_place_to_gather("to_keras", source)
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
        if source.gathered is not None and path in source.gathered[1]:
            total = source.gathered[1][path]
            dense = total.to_dense() if isinstance(total, RowGradient) else total
            made["gradient_accumulator", i] = path, dense
    filling.finish()
    count = filling.counted(found)
    steps = [p.tx.steps for p in ours.parts if isinstance(p.tx, accumulate_gradients)]
    calls = count * int(steps[0]) + source.gathered[0] if source.gathered and steps else count
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
