"""States from and to Keras' optimizers, of Keras 3 and of tf.keras."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adamjax.average import weight_ema
from adamjax.convert.adamjax_state import AdamjaxState, initial_state
from adamjax.convert.adapt import (
    NOT_TRANSPOSED,
    Adapt,
    Adapted,
    checked_adapt,
    doubt_transposes,
    kind_of_leaf,
)
from adamjax.convert.differences import Translation, expect_slots
from adamjax.convert.hyperparameters import expect_same_hyperparameters
from adamjax.convert.into_adamjax import into_adamjax
from adamjax.convert.keras_optimizer import (
    FORGETS_PRODUCT,
    doubt_class,
    doubt_left_out,
    doubt_lost_product,
    doubt_options,
    hyperparams_of_each,
    kinds_of,
)
from adamjax.convert.keras_variables import (
    SLOTS,
    Layout,
    keys_in_order,
    layout_by_name,
    layout_by_place,
    variables_of,
)
from adamjax.convert.names import Order, expect_order, last_word, leaf_order
from adamjax.convert.schedules import has_schedule
from adamjax.convert.source import Accumulated, LeafMoments, Source
from adamjax.convert.systems import KERAS, RTOL
from adamjax.convert.values import leaves_by_path, steps_taken
from adamjax.data import Tree
from adamjax.scaling import add_decayed_weights, scale_by_learning_rate

__all__ = ["from_keras", "to_keras"]


_AVERAGE_OF_FIRST_STEP = (
    "in its first step Keras 3 sets its average (use_ema) to the new weights, but weight_ema "
    "averages them with the weights before the step"
)


def _read_variables(
    owner: str,
    variables: Any,
    ours: AdamjaxState,
    order: Order,
    adapt: Adapt | None,
    check: bool,
    *,
    to_adamjax: bool,
) -> tuple[Source, Layout, list[str | None], list[np.ndarray]]:
    """The state in the common form, the layout, the paths of the parameters, and the values.

    Args:
      to_adamjax: whether `adapt` makes Keras' arrays fit the leaves; then it is applied to the
        arrays of the common form. If not, `adapt` makes the leaves' arrays fit Keras' variables.
    """
    source = Source(owner)
    optimizer = variables if hasattr(variables, "get_config") else None
    if optimizer is not None:
        doubt_class(source, optimizer)
        source.refuse_doubts(check)
        variables = optimizer.variables
        variables = variables() if callable(variables) else variables
    names, values = variables_of(owner, variables)
    adapted = checked_adapt(owner, adapt)
    layout, paths = _layout_and_paths(
        owner,
        names,
        variables,
        values,
        ours,
        order,
        adapted,
        check,
        has_adapt=adapt is not None,
        to_adamjax=to_adamjax,
    )

    def by_path(role: str) -> dict[str, Any]:
        arrays = {paths[i]: x for i, x in layout.of(role, values).items()}
        return {
            path: adapted(path, role, x) if to_adamjax else x
            for path, x in arrays.items()
            if path is not None
        }

    if adapt is None:
        named = zip(paths, layout.names or [""] * len(paths), strict=True)
        weights = [
            path
            for path, name in named
            if path and kind_of_leaf(path) == "weight" and last_word(name) not in NOT_TRANSPOSED
        ]
        doubt_transposes(source, leaves_by_path(owner, ours.params), weights)
    count, micro = steps_taken(owner, "the optimizer", layout.of("count", values)[0]), 0
    totals = layout.of("gradient_accumulator", values)
    if totals:
        any_nonzero = any(map(np.any, totals.values()))
        converted = [path for path in paths if path is not None]
        count, micro = _steps_and_micro_batches(
            source, ours, optimizer, any_nonzero, count, converted
        )
        source.accumulated = [Accumulated(micro, by_path("gradient_accumulator"))]
        source.in_accumulating = True
    elif ours.accumulates:
        source.doubts.append(
            "the optimizer takes a step in every call, without gradient_accumulation_steps, but tx "
            "has accumulate_gradients: leave it out"
        )
    hyperparams = hyperparams_of_each(owner, optimizer, layout, values, len(paths))
    product = layout.of("product", values).get(0)
    kinds = kinds_of(source, layout, optimizer, product is not None)
    if product is not None:
        kinds = tuple(kind for kind in kinds if kind == "nadam")
    elif to_adamjax and hasattr(optimizer, "_u_product"):
        doubt_lost_product(source, optimizer, count)
    elif (
        to_adamjax and layout.is_keras3 and kinds == ("nadam",) and "nadam" in ours.kinds and count
    ):
        source.doubts.append(
            "these variables of a Nadam lack the product of its momenta, as those of the "
            f"inner_optimizer of a LossScaleOptimizer do ({FORGETS_PRODUCT}): pass the optimizer "
            "itself, which shows whether Keras has lost the product"
        )
    roles = dict.fromkeys(role for role, _ in layout.roles if role in SLOTS)
    slots_of = {role: by_path(role) for role in roles}
    for path, leaf_hyperparams in zip(paths, hyperparams, strict=True):
        if path is not None:
            slots = {role: arrays[path] for role, arrays in slots_of.items()}
            source.add(path, LeafMoments(count, slots, kinds, product, leaf_hyperparams))
    if layout.of("average", values):
        source.average = by_path("average")
    if optimizer is not None:
        doubt_options(source, optimizer, layout, paths)
        doubt_left_out(source, optimizer, paths, layout.of("average", values))
    return source, layout, paths, values


def _layout_and_paths(
    owner: str,
    names: Sequence[str | None],
    variables: Any,
    values: Sequence[np.ndarray],
    ours: AdamjaxState,
    order: Order,
    adapted: Adapted,
    check: bool,
    *,
    has_adapt: bool,
    to_adamjax: bool,
) -> tuple[Layout, list[str | None]]:
    """The layout of variables, by their names or else their places, and the parameters' paths."""
    expect_order(owner, order)
    leaves = leaves_by_path(owner, ours.params)
    is_mapping = isinstance(variables, Mapping)
    is_pairs = isinstance(variables, Sequence) and all(
        isinstance(x, tuple | list) for x in variables
    )
    if all(name is not None for name in names):
        num_params = len(leaves if order is None else order)
        layout = layout_by_name(owner, [str(name) for name in names], values, num_params)
        paths = leaf_order(
            owner,
            order,
            ours.params,
            "Keras",
            layout.names,
            check,
            layout.shapes(values),
            may_reshape=has_adapt,
            order_fault=layout.order_fault(is_mapping, is_pairs),
        )
        return layout, paths
    paths = leaf_order(owner, order, ours.params, "Keras", check=check, may_reshape=has_adapt)
    slots = list(KERAS.slot_names[ours.kinds[0] if ours.kinds else "adam"].values())
    has_average = any(isinstance(part.tx, weight_ema) for part in ours.parts)
    extra = ["average"] * has_average + ["gradient_accumulator"] * ours.accumulates
    shapes = [None if path is None else np.shape(leaves[path]) for path in paths]

    def has_shape(place: int, x: np.ndarray) -> bool:
        path, shape = paths[place], shapes[place]
        if path is None or shape is None:
            return True
        if not has_adapt:
            return x.shape == shape
        try:  # The array may be that of another parameter, for which `adapt` raises an error.
            if to_adamjax:
                return adapted(path, "a slot", x).shape == shape
            return x.shape == adapted(path, "a slot", np.zeros(shape)).shape
        except ValueError:
            return False

    return layout_by_place(owner, values, shapes, has_shape, extra, slots, not is_mapping), paths


def _steps_and_micro_batches(
    source: Source,
    ours: AdamjaxState,
    optimizer: Any,
    any_nonzero: bool,
    calls: int,
    paths: Sequence[str],
) -> tuple[int, int]:
    """The number of finished steps, and the number of micro-batches in the unfinished step.

    Args:
      any_nonzero: whether Keras has accumulated gradients that are not zero.
      calls: Keras' count of calls.
      paths: the paths of the leaves that are converted.
    """
    if not ours.accumulations:
        raise ValueError(
            f"{source.owner}: the optimizer has gradient_accumulation_steps: wrap tx in "
            "accumulate_gradients of as many steps"
        )
    steps, _ = ours.accumulations[0]
    counted = [path for n, leaves in ours.accumulations for path in leaves if n == steps]
    # Leaves that tx does not accumulate, or over another number of steps, or twice (one
    # accumulate_gradients inside another).
    others = [path for path in paths if counted.count(path) != 1]
    if others:
        raise ValueError(
            f"{source.owner}: the optimizer accumulates the gradients of all leaves over the same "
            f"number of micro-batches, but tx does not accumulate {others[0]!r} over {steps} as it "
            "does others: wrap all of tx in one accumulate_gradients"
        )
    keras_steps = getattr(optimizer, "gradient_accumulation_steps", None) or steps
    count, micro = divmod(calls, steps)
    if keras_steps != steps:
        source.doubts.append(
            f"the optimizer has gradient_accumulation_steps={keras_steps}, and tx accumulates over "
            f"{steps}: build tx with accumulate_gradients of {keras_steps} steps"
        )
    elif any_nonzero != bool(micro):
        source.doubts.append(
            f"after {calls} micro-batches the optimizer has accumulated "
            f"{'some' if any_nonzero else 'no'} gradients, which does not fit "
            f"accumulate_gradients of {steps} steps in tx: take as many steps as "
            "gradient_accumulation_steps"
        )
    return count, micro


def _copies_its_average(source: Source) -> bool:
    """Whether Keras copies the weights into its average in the next call.

    Keras 3 does so in each call of its first step, of which each micro-batch is a call. Before the
    first call its average is zero. The averages of Keras 2 and of `weight_ema` start as the
    weights.
    """
    if source.average is None or source.has_taken_steps():
        return False
    return source.in_accumulating or not any(map(np.any, source.average.values()))


def _expect_right_side_of_accumulation(owner: str, ours: AdamjaxState, check: bool) -> None:
    """Refuses a part of `tx` that must not be inside accumulate_gradients, or must be.

    It would act in each step where Keras does so in each micro-batch, or the reverse.
    """
    if not check or not ours.accumulates:
        return
    for part in ours.parts:
        tx, is_inside = part.tx, ours.num_accumulations(part) > 0
        # An overwrite_frequency of 1 is allowed: Keras overwrites after every micro-batch too.
        if isinstance(tx, weight_ema) and (is_inside or tx.overwrite_frequency not in (None, 1)):
            raise ValueError(
                f"{owner}: with gradient_accumulation_steps Keras averages the weights after every "
                "micro-batch: put weight_ema after accumulate_gradients, with overwrite_frequency "
                "None or 1, or pass check=False to average after each step from now on"
            )
        # After accumulate_gradients, where from_config puts it, the rate counts calls.
        if isinstance(tx, scale_by_learning_rate) and has_schedule(tx) and is_inside:
            raise ValueError(
                f"{owner}: with gradient_accumulation_steps Keras calls a schedule with the number "
                "of micro-batches, but inside accumulate_gradients it is called with the number of "
                "steps: put scale_by_learning_rate after accumulate_gradients, as from_config "
                "does, or change the schedule and pass check=False"
            )
        if isinstance(tx, add_decayed_weights) and not is_inside:
            raise ValueError(
                f"{owner}: with gradient_accumulation_steps Keras adds the weight decay once in "
                "each step, but outside of accumulate_gradients it is added in each micro-batch: "
                "put add_decayed_weights inside, or pass check=False"
            )


def _expect_one_count(owner: str, ours: AdamjaxState, steps: int, calls: int) -> None:
    """Refuses a count that differs from the rule's, because Keras has one count for all."""
    for part in ours.parts:
        tx, state = part.tx, part.state
        uses_count = has_schedule(tx) or (
            isinstance(tx, weight_ema) and tx.overwrite_frequency is not None
        )
        expected = steps if ours.num_accumulations(part) else calls
        if uses_count and hasattr(state, "count") and int(state.count) != expected:
            raise ValueError(
                f"{owner}: {tx!r} has counted {int(state.count)} steps and the rule {expected}, "
                "but Keras has one count for all: let both skip the same steps (put "
                "skip_not_finite around all of tx), or pass check=False to go on with the count of "
                "the rule"
            )


def from_keras(
    variables: Any,
    tx: Any,
    params: Tree,
    *,
    order: Order = None,
    adapt: Adapt | None = None,
    average: Tree = None,
    check: bool = True,
) -> Any:
    """The state of `tx` that goes on from the variables of a Keras optimizer.

    The optimizers are `Adam` (also with `amsgrad`), `AdamW`, `Adamax` and `Nadam` of Keras 3 (any
    backend), of tf_keras and of TensorFlow before 2.11. They may have `use_ema` (then `tx` has a
    `weight_ema` last) and `gradient_accumulation_steps` (then `tx` has `accumulate_gradients`).
    Their weight decay, clips, betas, loss scale, number of micro-batches and options of the average
    are in their config, not in their variables: build `tx` with the same values, and with Keras'
    epsilon, which is `eps_hat` (for Adamax and Nadam `eps`), 1e-7 by default; or let
    `from_config(keras.optimizers.serialize(optimizer))` build it. Names of variables show whether a
    Keras 3 optimizer has a schedule (then it has no `learning_rate`): if so, a `tx` with a constant
    rate is refused. Arrays without names show it only if their iteration is int32 or they contain
    the product of Nadam. Other arrays without a rate may be of tf_keras, which never stores it, or
    of Keras 3 with TensorFlow and a schedule: then any rate of `tx` is accepted. If Keras has a
    constant rate and `tx` a schedule, only their rates of the next step are compared, because a
    Keras callback may set the rate before each step. Names also show whether it is an `AdamW`: if
    so, a `tx` without a weight decay is refused.

    Other optimizers (RMSprop, Lamb, Muon, ScheduleFreeAdamW) use the same names for different
    arrays. The class of the optimizer distinguishes them from Adam. So does its name, if the names
    of variables begin with it, like `adam` in `adam/dense_kernel_momentum`. If you gave it another
    name, `Adam(name="mine")`, pass the optimizer itself. Arrays without names do not show their
    optimizer: they are refused if a shape does not fit, or if Adam cannot have such values (a
    negative `velocity`, moments that `b1` and `b2` do not allow). Arrays of Lamb,
    ScheduleFreeAdamW, Muon (of vectors) and Adamax cannot be distinguished from Adam's.

    Where variables are bfloat16 or float16, Keras computes steps in that dtype, and small ones do
    not move the weights. Here steps are computed in float32, so the run drifts away from Keras'.

    Args:
      variables: one of:

        - the optimizer itself. Then its betas, epsilon, weight decay, clips, average, loss scale
          and rate are compared as well, and in Keras 3 also which leaves decay. A schedule of your
          own is called at some hundred counts up to a million. (If the state of `tx` has the rate,
          by `with_hyperparams`, only the next rate is compared, because you set the later ones. An
          optimizer of `keras.models.load_model` has lost which leaves were excluded: call its
          `exclude_from_weight_decay` again first.);
        - `optimizer.variables`;
        - pairs (name, array), such as `[(v.path, v.numpy()) for v in optimizer.variables]` (in
          TensorFlow's Keras `v.name`), or a mapping of names to arrays;
        - the mapping of `"0"`, `"1"`, ... to arrays that `save_own_variables` fills, such as the
          group `optimizer/vars` of a `.weights.h5` file, or the list of arrays of `get_weights()`.
          Here the role of an array must follow from its position and shape.
      tx: a transform of adamjax.
      params: the parameters at that step. Constraints of Keras' variables are refused if the
        optimizer itself is passed, and so are variables with `trainable=False` whose leaves `tx`
        moves; the other forms of `variables` do not show either. (Keras' `fit` passes no gradients
        of such variables. If a loop of your own calls `apply` with them, Keras moves them all the
        same.)
      order: the path of each variable that the optimizer was built on, in their order; `None` for
        one that is not to be converted. (With `global_clipnorm`, the norm is that of all variables,
        so none that is trained may be left out.) By default:

        - if the names of the variables correspond to the paths of the leaves one to one, as
          `dense_kernel` to `dense/kernel`, the names give the order;
        - else, if the leaves have no names (the items of a list, or of a dictionary whose keys are
          numbers), the variables are taken in the order of the leaves;
        - else, if the variables have names, their shapes give the order. Variables without names
          must be in the order of the leaves. In both cases `order` is required if two leaves have
          the same shape, or if one has the transposed shape of the other.

        If the variables have names, `order` may also be a dictionary from names to paths. Such a
        dictionary is required if neither names nor shapes show which leaf is which, and the
        variables may not be in Keras' order: the iteration does not come first, or the names in a
        mapping or in pairs are sorted. (JAX, Orbax and h5py sort the keys of a mapping.)
      adapt: a function that makes Keras' array fit the leaf, if the leaf is its transpose, as the
        weights of Equinox are:
        `lambda path, x: x.transpose(-1, -2, *range(x.ndim - 2)) if path.endswith("weight") else x`,
        which is `x.T` for a matrix. It is required if a leaf that is called `weight` has the same
        shape when transposed, as a square matrix has. **Moments must be changed as the weights were
        when they were ported**, which adamjax cannot check: the kernel of a `Conv2DTranspose` with
        as many channels in as out needs a function of its own, because Keras has
        `(*kernel_size, out, in)`, and JAX libraries flip the kernel.
      average: an average of the weights, a tree like `params`, which replaces Keras' own average.
      check: as for `from_optax`.

    Returns:
      A state like that of `tx.init(params)`. Its arrays are copies.

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
    owner = "from_keras"
    ours = initial_state(owner, tx, params)
    _expect_right_side_of_accumulation(owner, ours, check)
    source, *_ = _read_variables(owner, variables, ours, order, adapt, check, to_adamjax=True)
    if _copies_its_average(source):
        source.doubts.append(
            f"{_AVERAGE_OF_FIRST_STEP}: convert after that step, or start anew with tx.init(params)"
        )
        weights = leaves_by_path(owner, params)
        source.average = {path: weights[path] for path in source.average or {}}
    state = into_adamjax(source, KERAS, ours, average, check, RTOL)
    if check:
        expect_same_hyperparameters(ours.with_state(state), KERAS, source.moments)
    return state


def to_keras(
    state: Any,
    tx: Any,
    params: Tree,
    target: Any,
    *,
    order: Order = None,
    adapt: Adapt | None = None,
    check: bool = True,
) -> Any:
    """The values of the variables with which a Keras optimizer goes on from a state of `tx`.

    Args:
      state, tx, params: as for `to_optax`.
      target: the new optimizer, which must be built, or its variables, in one of the forms of
        `from_keras`. Its learning rate and dtypes stay, and so do variables that `order` leaves
        out. If `tx` has a schedule, it is compared with a constant rate of the target in the next
        step only: build the new optimizer with a schedule.
      order, check: as for `from_keras`.
      adapt: a function that makes the leaf's array fit Keras' variable, the inverse of that for
        `from_keras`: `x.transpose(*range(2, x.ndim), 1, 0)`.

    Returns:
      NumPy arrays, in a dictionary with the keys of `target` if that is a mapping, else in a list
      in the order of `target`. Give each variable its array with `variable.assign(array)`, or all
      of them with `optimizer.set_weights(arrays)`.

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
    _expect_right_side_of_accumulation(owner, ours, check)
    adapted = checked_adapt(owner, adapt)
    target_source, layout, paths, values = _read_variables(
        owner, target, ours, order, adapt, check, to_adamjax=False
    )
    source = ours.read_for(target_source, check)
    if _copies_its_average(target_source) and not source.has_taken_steps():
        source.doubts.append(f"{_AVERAGE_OF_FIRST_STEP}: convert after that step")
        source.refuse_doubts(check)
    if check and source.average is not None and target_source.average is None:
        raise ValueError(
            f"{owner}: the state has an average of the weights, but the optimizer has none: build "
            "it with use_ema=True, or pass check=False to drop the average"
        )
    accumulated = source.accumulated_of(None)
    filler = Translation(source, ours, KERAS, check, RTOL)
    moments: dict[str, LeafMoments] = {}
    # By role and place, the paths and values of new arrays.
    new: dict[tuple[str, int], tuple[str, Any]] = {}
    for i, path in enumerate(paths):
        if path is None:
            continue
        kind, moments[path], slots = filler.from_adamjax(path)
        expect_slots(owner, KERAS, kind, path, target_source.moments[path][0])
        new |= {(role, i): (path, x) for role, x in slots.items()}
        if source.average is not None and path in source.average:
            new["average", i] = path, source.average[path]
        if accumulated is not None and path in accumulated.totals:
            new["gradient_accumulator", i] = path, accumulated.totals[path]
    filler.finish()
    count = filler.common_count(moments)
    products = [x.product for x in moments.values() if x.product is not None]
    # Before the first step, the product of new variables is right.
    needs_product = products and (count or hasattr(target, "_u_product"))
    if check and needs_product and not layout.of("product", values):
        product = float(products[0])
        raise ValueError(
            f"{owner}: this Nadam keeps the product of its momenta outside of its variables: pass "
            f"check=False, and set it yourself, optimizer._u_product.assign({product:.9g}). "
            f"Note: {FORGETS_PRODUCT}"
        )
    calls = count
    if accumulated and ours.accumulations:
        calls = count * ours.accumulations[0][0] + accumulated.micro
    scalars = {("count", 0): calls, ("product", 0): products[0] if products else None}
    arrays = []
    for (role, i), value in zip(layout.roles, values, strict=True):
        if scalars.get((role, i)) is not None:
            arrays.append(np.asarray(scalars[role, i]).astype(value.dtype))
        elif (role, i) in new:
            path, x = new[role, i]
            arrays.append(filler.array(path, role, adapted(path, role, x), value))
        elif role == "average" and paths[i] is not None:
            raise ValueError(
                f"{owner}: the optimizer averages the weights (use_ema), but the state has no "
                f"average of {paths[i]!r}: end tx in weight_ema, or build the optimizer without "
                "use_ema"
            )
        else:
            arrays.append(value.copy())
    if check:
        _expect_one_count(owner, ours, count, calls)
        expect_same_hyperparameters(ours, KERAS, target_source.moments)
    if not isinstance(target, Mapping):
        return arrays
    return dict(zip(keys_in_order(target), arrays, strict=True))
