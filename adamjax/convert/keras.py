"""States from and to Keras' optimizers, of Keras 3 and of tf.keras."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adamjax.average import weight_ema
from adamjax.convert.adamjax_state import AdamjaxState, initial_state
from adamjax.convert.differences import Translation, expect_slots
from adamjax.convert.hyperparameters import HyperparameterCheck
from adamjax.convert.into_adamjax import into_adamjax
from adamjax.convert.keras_config import from_keras_config
from adamjax.convert.keras_variables import (
    SLOTS,
    Layout,
    keys_in_order,
    layout_by_name,
    layout_by_place,
    plain_name,
    variables_of,
)
from adamjax.convert.names import leaf_order
from adamjax.convert.source import Accumulated, Hyperparams, LeafMoments, Source
from adamjax.convert.systems import KERAS, KINDS, RTOL
from adamjax.convert.values import class_name, leaves_by_path, number_of, steps_taken
from adamjax.data import Tree
from adamjax.guard import accumulate_gradients
from adamjax.rows import RowGradient
from adamjax.scaling import scale_by_learning_rate
from adamjax.structure import walk

__all__ = ["from_keras", "to_keras"]

# Keras' optimizers that can be converted, by their plain names, and the kinds of their rules.
# `AdamMultilr` is that of capreolus.
_OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adam": ("adam", "amsgrad"),
    "adamw": ("adam", "amsgrad"),
    "adammultilr": ("adam", "amsgrad"),
    "adamax": ("adamax",),
    "nadam": ("nadam",),
}
# Options of a Keras optimizer, and the hyperparameters of transforms that they correspond to.
_RULE_OPTIONS = {"beta_1": "b1", "beta_2": "b2", "epsilon": "eps", "weight_decay": "weight_decay"}
_OTHER_OPTIONS = {
    "clipnorm": "max_norm",
    "global_clipnorm": "max_norm",
    "clipvalue": "limit",
    "ema_momentum": "momentum",
    "ema_overwrite_frequency": "overwrite_frequency",
}


def _kinds_of(source: Source, layout: Layout, optimizer: Any, has_product: bool) -> tuple[str, ...]:
    """The kinds of rules that the variables may be of, by the optimizer's class or its name."""
    if optimizer is not None:
        package, _, _ = type(optimizer).__module__.partition(".")
        name = type(optimizer).__name__
        if package in ("keras", "tf_keras", "tensorflow") and plain_name(name) in _OPTIMIZERS:
            return _OPTIMIZERS[plain_name(name)]
        source.doubts.append(
            f"the optimizer is a {class_name(optimizer)}: expected Keras' Adam, "
            "AdamW, Adamax or Nadam (of a LossScaleOptimizer convert the inner_optimizer). Start "
            "another one anew, tx.init(params)"
        )
        return KINDS
    if layout.names is None:
        # Keras 3's Nadam keeps its product. That of tf_keras is recognized by its name only.
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
        f"{fault}: expected names of Adam, AdamW, Adamax or Nadam, 'adam/dense_kernel_momentum' "
        "(other optimizers, such as RMSprop and Lamb, use the same names): pass the optimizer "
        "itself in place of its variables, or pairs (v.path, array)"
    )
    return KINDS


def _hyperparams_of(owner: str, optimizer: Any) -> Hyperparams:
    """The hyperparameters of an optimizer; see `HyperparameterCheck`."""

    def option(name: str) -> Any:
        value = getattr(optimizer, name, None)
        return None if value is None else number_of(owner, f"{name} of the optimizer", value)

    averages = bool(getattr(optimizer, "use_ema", False))
    hyperparams = {name: option(key) for key, name in _RULE_OPTIONS.items()}
    hyperparams = {name: x for name, x in hyperparams.items() if x is not None}
    if hasattr(optimizer, "weight_decay"):  # None is no decay, which tx must not have either
        hyperparams.setdefault("weight_decay", 0.0)
    more = {}
    for key, name in _OTHER_OPTIONS.items():
        if getattr(optimizer, key, None) and (averages or not key.startswith("ema")):
            more[name] = option(key)
    factor = getattr(optimizer, "loss_scale_factor", None)
    if factor is not None and factor != 1:
        more["factor"] = 1 / option("loss_scale_factor")
    schedule = _schedule(getattr(optimizer, "_learning_rate", None))
    if schedule is not None:
        hyperparams["learning_rate"] = schedule
    # Keras' `exclude_from_weight_decay` sets one of these.
    excludes = any(
        getattr(optimizer, name, None)
        for name in ("_exclude_from_weight_decay", "_exclude_from_weight_decay_pattern")
    )
    masks = "some" if excludes else "none" if hasattr(optimizer, "_use_weight_decay") else "unknown"
    return {**hyperparams, "decoupled": True, "masks_decay": masks, "more": more}


def _decaying(optimizer: Any) -> list[bool] | None:
    """Whether each variable that the optimizer was built on decays; `None` if that is not stated.

    Keras 3 knows its variables; tf_keras does not.
    """
    variables = getattr(optimizer, "_trainable_variables", None)
    uses_decay = getattr(optimizer, "_use_weight_decay", None)
    if variables is None or uses_decay is None:
        return None
    return [bool(uses_decay(variable)) for variable in variables]


def _schedule(schedule: Any) -> Any:
    """A schedule of Keras as one of adamjax; `None` for anything else, such as a user's own."""
    if not hasattr(schedule, "get_config"):
        return None
    config = {"class_name": type(schedule).__name__, "config": schedule.get_config()}
    try:
        return from_keras_config(config, "the schedule")
    except (TypeError, ValueError):
        return None


def _read_variables(
    owner: str, variables: Any, ours: AdamjaxState, order: Sequence[str | None] | None, check: bool
) -> tuple[Source, Layout, list[str | None], list[np.ndarray]]:
    """The state in the common form, the layout, the paths of the parameters, and the values."""
    optimizer = variables if hasattr(variables, "get_config") else None
    if optimizer is not None:
        variables = optimizer.variables
        variables = variables() if callable(variables) else variables
    names, values = variables_of(owner, variables)
    leaves = leaves_by_path(owner, ours.params)
    if all(name is not None for name in names):
        n = len(leaves if order is None else order)
        layout = layout_by_name(owner, [str(name) for name in names], values, n)
        shapes = layout.shapes(values)
        paths = leaf_order(owner, order, ours.params, "Keras", layout.names, check, shapes)
    else:
        paths = leaf_order(owner, order, ours.params, "Keras", check=check)
        slots = list(KERAS.slot_names[ours.kinds[0] if ours.kinds else "adam"].values())
        averages = any(isinstance(part.tx, weight_ema) for part in ours.parts)
        extra = ["average"] * averages + ["gradient_accumulator"] * bool(ours.accumulations)
        shapes = [() if p is None else np.shape(leaves[p]) for p in paths]
        may_be_legacy = not isinstance(variables, Mapping)
        layout = layout_by_place(owner, values, shapes, extra, slots, may_be_legacy)

    def by_path(role: str) -> dict[str, Any]:
        arrays = layout.of(role, values)
        return {path: arrays[i] for i, path in enumerate(paths) if arrays and path is not None}

    source = Source(owner)
    count, micro = steps_taken(owner, "the optimizer", layout.of("count", values)[0]), 0
    totals = layout.of("gradient_accumulator", values)
    if totals:
        any_nonzero = any(map(np.any, totals.values()))
        count, micro = _steps_and_micro_batches(source, ours, optimizer, any_nonzero, count)
        source.accumulated = [Accumulated(micro, by_path("gradient_accumulator"))]
        source.accumulates = True
    rate = layout.of("learning_rate", values).get(0)
    hyperparams: Hyperparams = {}
    if rate is not None:
        hyperparams["learning_rate"] = number_of(owner, "the learning rate", rate)
    if optimizer is not None:
        hyperparams |= _hyperparams_of(owner, optimizer)
    else:
        if layout.has_schedule:
            hyperparams["has_schedule"] = (
                "there is no variable learning_rate",
                "the variables do not contain it; pass the optimizer itself to compare it",
            )
        hyperparams["has_decay"] = plain_name(layout.optimizer) == "adamw"
    product = layout.of("product", values).get(0)
    kinds = _kinds_of(source, layout, optimizer, product is not None)
    if product is not None:
        kinds = tuple(kind for kind in kinds if kind == "nadam")
    roles = dict.fromkeys(role for role, _ in layout.roles if role in SLOTS)
    slots_of = {role: by_path(role) for role in roles}
    decaying = _decaying(optimizer)
    if "weight_decay" not in hyperparams or decaying is None or len(decaying) != len(paths):
        decaying = None
    for i, path in enumerate(paths):
        if path is not None:
            own = {role: arrays[path] for role, arrays in slots_of.items()}
            own_hyperparams = hyperparams
            if decaying is not None:
                decay = hyperparams["weight_decay"] if decaying[i] else 0.0
                own_hyperparams = {**hyperparams, "weight_decay": decay, "masks_decay": "none"}
            source.add(path, LeafMoments(count, own, kinds, product, own_hyperparams))
    if layout.of("average", values):
        # Keras 3 starts the average from zero, and copies the weights in the first step.
        average = by_path("average")
        has_started = count or micro
        source.average = average if has_started else {path: leaves[path] for path in average}
    return source, layout, paths, values


def _steps_and_micro_batches(
    source: Source, ours: AdamjaxState, optimizer: Any, any_nonzero: bool, calls: int
) -> tuple[int, int]:
    """The steps in Keras' count of calls, and the micro-batches of the unfinished step.

    Args:
      any_nonzero: whether Keras has accumulated gradients that are not zero.
    """
    if not ours.accumulations:
        raise ValueError(
            f"{source.owner}: the optimizer has gradient_accumulation_steps: wrap tx in "
            "accumulate_gradients of as many steps"
        )
    steps, _ = ours.accumulations[0]
    own_steps = getattr(optimizer, "gradient_accumulation_steps", None) or steps
    count, micro = divmod(calls, steps)
    if own_steps != steps or any_nonzero != bool(micro):
        source.doubts.append(
            f"after {calls} micro-batches the optimizer has accumulated "
            f"{'some' if any_nonzero else 'no'} gradients, which does not fit "
            f"accumulate_gradients of {steps} steps in tx: take as many steps as "
            "gradient_accumulation_steps"
        )
    return count, micro


def _expect_counts_fit(owner: str, ours: AdamjaxState, check: bool) -> None:
    """Refuses a `tx` that counts steps where Keras counts micro-batches."""
    if not check or not ours.accumulations:
        return
    accumulating = [part for part in ours.parts if isinstance(part.tx, accumulate_gradients)]
    inside = {id(inner.tx) for part in accumulating for inner in walk(part.tx.tx)}
    for part in ours.parts:
        tx = part.tx
        if isinstance(tx, weight_ema) and (id(tx) in inside or tx.overwrite_frequency is not None):
            raise ValueError(
                f"{owner}: with gradient_accumulation_steps Keras averages the weights after every "
                "micro-batch: put weight_ema after accumulate_gradients, without "
                "overwrite_frequency, or pass check=False to average steps from here"
            )
        # After accumulate_gradients, where from_config puts it, the rate counts calls.
        if isinstance(tx, scale_by_learning_rate) and callable(tx.learning_rate):
            if id(tx) not in inside:
                continue
            raise ValueError(
                f"{owner}: with gradient_accumulation_steps Keras calls a schedule with the number "
                "of micro-batches, and inside accumulate_gradients it is that of steps: put "
                "scale_by_learning_rate after accumulate_gradients, as from_config does, or "
                "change the schedule and pass check=False"
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

    The optimizers are `Adam` (with `amsgrad`), `AdamW`, `Adamax` and `Nadam` of Keras 3 (any
    backend), of tf_keras and of TensorFlow before 2.11, with `use_ema` (a `weight_ema` last in
    `tx`) and `gradient_accumulation_steps` (`accumulate_gradients`). Their weight decay, clips and
    betas are in their config, not in their variables: build `tx` with the same values, and with
    Keras' epsilon, which is `eps_hat` (for Adamax and Nadam `eps`), 1e-7 by default; or let
    `from_config(keras.optimizers.serialize(optimizer))` build it. Names of variables say whether a
    Keras 3 optimizer has a schedule (then it has no `learning_rate`), and whether it is an `AdamW`:
    a `tx` with a constant rate or without a weight decay is refused then.

    Other optimizers use the same names for other things (RMSprop, Lamb, Muon, ScheduleFreeAdamW).
    They are recognized by the class of the optimizer, or by its name in the names of the variables,
    `adam/dense_kernel_momentum`. If you gave it another name, `Adam(name="mine")`, pass the
    optimizer itself. Arrays without names do not show their optimizer: they are refused if a shape
    does not fit, or if Adam cannot have such values (a negative `velocity`, moments that `b1` and
    `b2` do not allow). Arrays of Lamb, ScheduleFreeAdamW, Muon (of vectors) and Adamax cannot be
    told from Adam's.

    Args:
      variables: one of:

        - the optimizer itself. Then its betas, epsilon, weight decay, clips, average, loss scale
          and schedule (one of Keras' own) are compared as well, and in Keras 3 also which leaves
          decay;
        - `optimizer.variables`;
        - pairs (name, array), such as `[(v.path, v.numpy()) for v in optimizer.variables]` (in
          TensorFlow's Keras `v.name`), or a mapping of names to arrays;
        - the mapping of `"0"`, `"1"`, ... to arrays that `save_own_variables` fills, such as the
          group `optimizer/vars` of a `.weights.h5` file, or the list of arrays of `get_weights()`.
          Here the place and the shape of an array must show what it is.
      tx: a transform of adamjax.
      params: the parameters at that step.
      order: the path of each variable that the optimizer was built on, in their order; `None` for
        one that is not to be converted. By default the names of the variables give the order, if
        they correspond to the paths of the leaves one to one (`dense_kernel` is `dense/kernel`).
        Otherwise the shapes must show it: if two leaves have one shape, `order` is required. Leaves
        without names (the items of a list) are taken in their order.
      average: an average of the weights to go on from in place of Keras', a tree like `params`.
      check: as for `from_optax`.

    Returns:
      A state like that of `tx.init(params)`.

    Raises:
      TypeError: `variables` has none of these forms.
      ValueError: something does not fit or would not go on as before. The message names the leaf.

    >>> import adamjax, jax.numpy as jnp, numpy as np
    >>> variables = [("adam/iteration", np.array(7)), ("adam/learning_rate", np.array(0.1)),
    ...              ("adam/w_momentum", np.full(2, 0.5)), ("adam/w_velocity", np.ones(2))]
    >>> state = adamjax.convert.from_keras(variables, adamjax.adam(0.1), {"w": jnp.zeros(2)})
    >>> adamjax.step_count(state), adamjax.get_slot(state, "m")["w"]
    (Array(7, dtype=int32), Array([0.5, 0.5], dtype=float32))
    """
    new = initial_state("from_keras", tx, params)
    _expect_counts_fit("from_keras", new, check)
    source, *_ = _read_variables("from_keras", variables, new, order, check)
    return into_adamjax(source, KERAS, new, average, check, RTOL)


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
        `from_keras`. Its learning rate and dtypes stay, and so do variables that `order` leaves
        out.
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
    owner = "to_keras"
    ours = AdamjaxState(owner, tx, state, params)
    _expect_counts_fit(owner, ours, check)
    target_source, layout, paths, values = _read_variables(owner, target, ours, order, check)
    source = ours.read_for(target_source, check)
    accumulated = source.accumulated_of(None)
    filling = Translation(source, ours, KERAS, check, RTOL)
    moments: dict[str, LeafMoments] = {}
    # By role and place, the paths and values of new arrays.
    new: dict[tuple[str, int], tuple[str, Any]] = {}
    for i, path in enumerate(paths):
        if path is None:
            continue
        kind, moments[path], slots = filling.from_adamjax(path)
        expect_slots(owner, KERAS, kind, path, target_source.moments[path][0])
        new |= {(role, i): (path, x) for role, x in slots.items()}
        if source.average is not None and path in source.average:
            new["average", i] = path, source.average[path]
        if accumulated is not None and path in accumulated.totals:
            total = accumulated.totals[path]
            dense = total.to_dense() if isinstance(total, RowGradient) else total
            new["gradient_accumulator", i] = path, dense
    filling.finish()
    count = filling.common_count(moments)
    calls = count
    if accumulated and ours.accumulations:
        calls = count * ours.accumulations[0][0] + accumulated.micro
    products = [x.product for x in moments.values() if x.product is not None]
    scalars = {("count", 0): calls, ("product", 0): products[0] if products else None}
    arrays = []
    for (role, i), value in zip(layout.roles, values, strict=True):
        if scalars.get((role, i)) is not None:
            arrays.append(np.asarray(scalars[role, i]).astype(value.dtype))
        elif (role, i) in new:
            path, x = new[role, i]
            arrays.append(filling.array(path, role, x, value))
        elif role == "average" and paths[i] is not None:
            raise ValueError(
                f"{owner}: the optimizer averages the weights (use_ema), but the state has no "
                f"average of {paths[i]!r}: end tx in weight_ema, or build it without use_ema"
            )
        else:
            arrays.append(value)
    if check:
        HyperparameterCheck(ours, KERAS).check(target_source.moments)
    if not isinstance(target, Mapping):
        return arrays
    return dict(zip(keys_in_order(target), arrays, strict=True))
