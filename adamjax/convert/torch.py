"""States from and to torch."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adamjax.convert.adamjax_state import AdamjaxState, initial_state
from adamjax.convert.adapt import (
    NOT_TRANSPOSED,
    Adapt,
    checked_adapt,
    doubt_transposes,
    kind_of_leaf,
)
from adamjax.convert.differences import Translation, expect_slots
from adamjax.convert.hyperparameters import expect_same_hyperparameters
from adamjax.convert.into_adamjax import into_adamjax
from adamjax.convert.names import Order, leaf_order
from adamjax.convert.source import Hyperparams, LeafMoments, Source
from adamjax.convert.systems import RTOL, TORCH
from adamjax.convert.values import (
    class_name,
    leaves_by_path,
    number_of,
    numbers_of,
    same_value,
    steps_taken,
)
from adamjax.data import Tree

__all__ = ["from_torch", "to_torch"]


# The keys by which torch's optimizers are recognized: those that a group must have, and those that
# only newer versions write.
_ADAM_KEYS = {"lr", "betas", "eps"}
_OPTIMIZER_KEYS: dict[str, tuple[set[str], set[str]]] = {
    "Adam": ({*_ADAM_KEYS, "weight_decay", "amsgrad"}, {"decoupled_weight_decay"}),
    "NAdam": ({*_ADAM_KEYS, "weight_decay", "momentum_decay"}, {"decoupled_weight_decay"}),
    "Adamax": ({*_ADAM_KEYS, "weight_decay"}, set()),
    "SparseAdam": (_ADAM_KEYS, set()),
}
# Keys without an effect on a step: names, implementations, and values that schedulers store.
_IGNORED_KEYS = {
    *("params", "param_names", "name"),
    *("foreach", "fused", "capturable", "differentiable"),
    *("initial_lr", "max_lr", "min_lr", "swa_lr"),
}
# Keys that OneCycleLR and CyclicLR store if they change betas in each step.
_BETA_SCHEDULE_KEYS = {"base_momentum", "max_momentum"}
# Keys that are read, but do not show which optimizer it is: old versions do not write `maximize`.
_OPTIONAL_KEYS = {*_BETA_SCHEDULE_KEYS, "maximize"}
# Keys that only one of torch's other optimizers has.
_KEYS_OF_OTHERS = {
    "dampening": "SGD",
    "alpha": "RMSprop or ASGD",
    "lr_decay": "Adagrad",
    "rho": "Adadelta",
    "etas": "Rprop",
    "beta2_decay": "Adafactor",
    "max_iter": "LBFGS",
    "ns_steps": "Muon",
}
# The names of slots in the state of a parameter.
_SLOTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf")


def _optimizer(owner: str, group: Mapping[str, Any]) -> str:
    """The name of the optimizer of a group, by the group's keys; unknown ones are refused."""
    keys = set(group) - _IGNORED_KEYS - _OPTIONAL_KEYS
    for name, (needed, newer) in _OPTIMIZER_KEYS.items():
        if needed <= keys <= needed | newer:
            return name
    other = [name for key, name in _KEYS_OF_OTHERS.items() if key in group]
    if keys == {*_ADAM_KEYS, "weight_decay", "decoupled_weight_decay"}:
        other = ["RAdam"]
    raise ValueError(
        f"{owner}: a group of torch has the options {sorted(map(str, keys))}"
        f"{f', those of {other[0]}' if other else ''}: expected those of Adam, AdamW, Adamax, "
        "NAdam or SparseAdam, as only their moments can be converted. For another optimizer start "
        "from tx.init(params). Remove keys of your own from the groups"
    )


def _read_group(source: Source, group: Mapping[str, Any]) -> tuple[tuple[str, ...], Hyperparams]:
    """The kinds of rules that may have made a group's state, and the group's hyperparameters.

    A doubt about the group is added to the source.
    """
    owner = source.owner

    def number(key: str, default: Any = None) -> float:
        return number_of(owner, f"{key} of a group of torch", group.get(key, default))

    def flag(key: str, default: bool | None = False) -> bool | None:
        value = group.get(key, default)
        if value is not None and not isinstance(value, bool | np.bool_):
            raise ValueError(
                f"{owner}: {key} of a group of torch is {value!r:.100}, expected True or False"
            )
        return None if value is None else bool(value)

    if not same_value(number("momentum_decay", 1.0), 1.0):
        raise ValueError(
            f"{owner}: torch's NAdam has momentum_decay={group['momentum_decay']}: here the "
            "momentum is b1 * (1 - 0.5 * 0.96**t), as with momentum_decay=1"
        )
    optimizer = _optimizer(owner, group)
    hyperparams: Hyperparams = {"learning_rate": number("lr"), "eps": number("eps")}
    betas = group["betas"]
    betas = list(betas) if getattr(betas, "ndim", 0) == 1 else betas  # an array or a tensor
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise ValueError(
            f"{owner}: betas of a group of torch are {betas!r:.100}, expected a pair of numbers"
        )
    b1, b2 = (number_of(owner, "a beta of a group of torch", b) for b in betas)
    hyperparams |= {"b1": b1, "b2": b2}
    hyperparams["maximize"] = bool(flag("maximize"))
    hyperparams |= {"clips_updates": False, "others": "none", "in_steps": True}
    if group.get("initial_lr") is not None:
        hyperparams["unknown_schedule"] = (
            "a scheduler has set initial_lr",
            "the state dict does not contain the schedule, so only the next rate is compared",
        )
    if any(group.get(key) is not None for key in _BETA_SCHEDULE_KEYS):
        source.doubts.append(
            "a scheduler of torch (OneCycleLR, CyclicLR) changes betas in each step, and here they "
            "are the same in each step: convert when they have reached their last value, and take "
            "base_momentum and max_momentum out of the groups"
        )
    if optimizer == "SparseAdam":
        # SparseAdam adds its epsilon to the uncorrected root.
        return ("adam",), {**hyperparams, "lazy": True, "form": "eps_hat", "weight_decay": 0.0}
    # Older versions do not state whether the decay is Adam's or AdamW's.
    decoupled = flag("decoupled_weight_decay", None if optimizer == "Adam" else False)
    hyperparams |= {"weight_decay": number("weight_decay"), "decoupled": decoupled}
    if optimizer == "Adam":
        kind = "amsgrad" if flag("amsgrad") else "adam"
    else:
        kind = {"NAdam": "nadam", "Adamax": "adamax"}[optimizer]
    return (kind,), hyperparams


def _slots_of(owner: str, path: str, state: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The slots of a parameter's state, by torch's names; a state with other keys is refused."""
    unknown = [key for key in state if key not in (*_SLOTS, "step", "mu_product")]
    if unknown or "step" not in state:
        raise ValueError(
            f"{owner}: torch's state of {path!r} has {sorted(map(str, state))}, expected 'step' "
            "and the slots of Adam, AdamW, Adamax, NAdam or SparseAdam, which are among "
            f"{list(_SLOTS)}. For another optimizer start from tx.init(params)"
        )
    for name, x in state.items():
        if hasattr(x, "detach") and type(x).__name__ not in ("Tensor", "Parameter"):
            raise ValueError(
                f"{owner}: {name} of {path!r} is a {class_name(x)}, expected a plain tensor: make "
                "it one first (full_tensor() of a DTensor, dequantize() of a quantized one)"
            )
    return {
        name: numbers_of(owner, f"{name} of {path!r}", state[name])
        for name in _SLOTS
        if name in state
    }


def _expect_form(owner: str, state_dict: Mapping[str, Any]) -> None:
    """Refuses a dictionary that does not have the structure of a state dict."""

    def expect(is_right: bool, what: str, x: Any, expected: str) -> None:
        if not is_right:
            raise ValueError(
                f"{owner}: {what} is {x!r:.100} of type {type(x).__name__}, expected {expected}, "
                "as in optimizer.state_dict() of torch"
            )

    def expect_mapping(what: str, x: Any, by: str = "") -> None:
        expect(isinstance(x, Mapping), what, x, f"a dictionary{by}")

    groups, state = state_dict["param_groups"], state_dict["state"]
    is_list = isinstance(groups, list | tuple)
    expect(is_list, "'param_groups'", groups, "a list of dictionaries")
    seen: set[Any] = set()
    for group in groups:
        expect_mapping("a group of 'param_groups'", group)
        keys, what = group.get("params"), "a parameter in 'params' of a group"
        is_list = isinstance(keys, list | tuple)
        expect(is_list, "'params' of a group", keys, "a list of numbers or names")
        for key in keys:
            is_key = isinstance(key, int | str | np.integer) and not isinstance(key, bool)
            expect(is_key, what, key, "its number or name")
            expect(key not in seen, what, key, "each parameter once")
            seen.add(key)
    expect_mapping("'state'", state, " by the parameters' numbers or names")
    for key, slots in state.items():
        expect_mapping(f"the state of parameter {key!r}", slots)


def _names(owner: str, groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """The names of torch's parameters, in the order of its groups; `None` if it has none."""
    names: list[str] = []
    for group in groups:
        keys = list(group["params"])
        # The keys of torch.distributed's state dicts are names.
        has_names = all(isinstance(key, str) for key in keys)
        group_names = keys if has_names else group.get("param_names")
        if group_names is None:
            return None
        is_list = isinstance(group_names, list | tuple)
        if (
            not is_list
            or not all(isinstance(name, str) for name in group_names)
            or len(group_names) != len(keys)
        ):
            raise ValueError(
                f"{owner}: a group of torch has the param_names {group_names!r:.100}, expected a "
                f"list of strings for its {len(keys)} params"
            )
        names.extend(group_names)
    return names


def _read(
    owner: str,
    state_dict: Mapping[str, Any],
    params: Tree,
    order: Order,
    adapt: Adapt | None,
    check: bool,
    has_adapt: bool,
) -> tuple[Source, dict[str, Any]]:
    """The state in the common form, and a dictionary from paths of leaves to torch's keys.

    Args:
      adapt: a function for the arrays that are read.
      has_adapt: whether the user gave a function for the arrays that are read or written.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        got = type(state_dict).__name__
        keys = list(state_dict) if isinstance(state_dict, Mapping) else []
        flat = [key for key in keys if re.match(r"(state|param_groups)\..", str(key))]
        if flat:
            got = (
                f"the flattened form of torch.distributed.checkpoint, with {flat[0]!r}: make it "
                "without flatten_optimizer_state_dict=True"
            )
        elif keys:
            got = f"{got} with {keys[:4]!r:.100}"
        raise TypeError(
            f"{owner}: expected optimizer.state_dict() of torch, with 'state' and "
            f"'param_groups', got {got}"
        )
    _expect_form(owner, state_dict)
    source, key_of, groups = Source(owner), {}, state_dict["param_groups"]
    adapted = checked_adapt(owner, adapt)
    read_groups = [_read_group(source, group) for group in groups]
    keys = [key for group in groups for key in group["params"]]
    read_of_each = [
        read for group, read in zip(groups, read_groups, strict=True) for _ in group["params"]
    ]
    names = _names(owner, groups)
    has_arrays = owner == "from_torch" or all(state_dict["state"].get(key) for key in keys)
    paths = leaf_order(
        owner,
        order,
        params,
        "torch",
        names,
        check,
        may_reshape=has_adapt,
        has_arrays=has_arrays,
    )
    if not has_adapt:
        kernels = [path for path in paths if path and kind_of_leaf(path) not in NOT_TRANSPOSED]
        doubt_transposes(source, leaves_by_path(owner, params), kernels, has_arrays)
    if len(keys) != len(paths):
        raise ValueError(
            f"{owner}: torch's groups have {len(keys)} parameters, but "
            f"{'params' if order is None else 'order'} has {len(paths)} leaves, {paths[:5]}...: "
            "give order=, a path (or None) for each parameter in the order of torch's groups"
        )
    strays = [key for key in state_dict["state"] if key not in set(keys)]
    if strays:
        raise ValueError(
            f"{owner}: torch's state has the keys {strays[:5]}, but its groups have only "
            f"{keys[:5]}...: expected optimizer.state_dict() as torch writes it (if JSON turned "
            "numbers into strings, turn them back)"
        )
    leaves = leaves_by_path(owner, params)
    for key, (kinds, hyperparams), path in zip(keys, read_of_each, paths, strict=True):
        if path is None:
            continue
        key_of[path] = key
        state = state_dict["state"].get(key)
        slots = _slots_of(owner, path, state) if state else {}
        if any(map(np.iscomplexobj, (leaves[path], *slots.values()))):
            raise ValueError(
                f"{owner}: the leaf {path!r} is complex, and torch's v of complex parameters is "
                "that of their real and imaginary parts: complex leaves cannot be converted"
            )
        if not state:
            source.add(path, LeafMoments(0, None, kinds, hyperparams=hyperparams))
            continue
        slots = {name: adapted(path, name, x) for name, x in slots.items()}
        product = state.get("mu_product")
        if product is not None:
            what = f"mu_product of {path!r}"
            number_of(owner, what, product)
            # Its dtype shows how it was rounded in each step.
            product = numbers_of(owner, what, product).reshape(())
        step = state["step"]
        if np.shape(step) == (1,):  # as older versions store it
            step = step[0]
        steps = steps_taken(owner, repr(path), step)
        source.add(path, LeafMoments(steps, slots, kinds, product, hyperparams))
    if owner == "from_torch":
        _doubt_unused(source)
    return source, key_of


def _doubt_unused(source: Source) -> None:
    """Adds a doubt if a leaf with a weight decay has taken no step yet, but others have."""
    first = {path: of_leaf[0] for path, of_leaf in source.moments.items()}
    unused = [path for path, x in first.items() if not x.count and x.hyperparams["weight_decay"]]
    if unused and any(x.count for x in first.values()):
        source.doubts.append(
            f"torch has taken steps of other leaves, but none of {unused[0]!r}, which had no "
            "gradient, and torch has not decayed it: if it stays without, leave it out (None in "
            "order=) and freeze it (partition, set_to_zero)"
        )


def from_torch(
    state_dict: Mapping[str, Any],
    tx: Any,
    params: Tree,
    *,
    order: Order = None,
    adapt: Adapt | None = None,
    average: Tree = None,
    check: bool = True,
    rtol: float = RTOL,
) -> Any:
    """The state of `tx` that goes on from a state dict of `torch.optim`.

    The optimizers are `Adam` and `AdamW` (with or without `amsgrad`), `Adamax`, `NAdam` with
    `momentum_decay=1`, and `SparseAdam`, with any number of groups. The hyperparameters of the
    groups are compared with `tx`:

    - SparseAdam corresponds to a rule with `rows="lazy"` and its `eps` as `eps_hat`. To go on with
      `exact_rows`, pass `check=False`: there, rows that a step does not read move as well.
    - Adamax of torch moves rows without a gradient. `adamax` does so with dense gradients, but for
      row gradients its default is `rows="lazy"`: pass `rows="dense"`, or use `exact_rows`.
    - `weight_decay` of Adam, Adamax and NAdam is `add_decayed_weights` before the rule. That of
      AdamW, or with `decoupled_weight_decay`, is `add_decayed_weights` after it. It must not follow
      a schedule in `tx`.
    - With `maximize` torch negates gradients, and its moments are those of the negated gradients.
      So `tx` must begin with the negation: `chain(scale(-1.0), adam(...))`.
    - `lr` must be the rate of the next step, as it is after `scheduler.step()`. A group with
      `initial_lr` has a scheduler, so `tx` needs a schedule of the rate: `constant(rate)`, if the
      scheduler has ended. Later rates of `tx` are not compared, because a training loop may set
      `lr` by hand. torch's schedules count steps, so if `tx` has `accumulate_gradients`, its
      schedule must be inside, beside the rule. A scheduler that changes betas as well
      (`OneCycleLR`, by default) is refused.
    - `tx` must not clip after the rule. Clips and positive factors (`scale`) before it are not
      compared, because in torch they are not part of the optimizer.
    - In older versions of torch, the groups of Adam and AdamW have the same keys, without
      `decoupled_weight_decay`. They do not show which it was, so `tx` may have the weight decay
      before the rule or after it.
    - torch counts the steps of each parameter. If the counts differ, `partition` must give the
      parameters rules of their own. Each part calls its schedule with its own count. So if a
      parameter joined after `k` steps, its part needs `lambda count: schedule(count + k)` for a
      schedule of all steps. A parameter without a gradient stays as it is in torch:
      give it `None` in `order`, and freeze it with `partition` and `set_to_zero`. Here a rule
      counts each call of `update`, even if its gradients are `None`, and torch does not. So if a
      parameter has no gradient in some later steps, it moves differently after them.
    - Where parameters are bfloat16 or float16, so are torch's moments, and its v hardly decays: it
      is rounded back. Here moments are float32, so the run drifts away from torch's.
    - A group with an unknown key is refused, because it belongs to another optimizer. (An `RAdam`
      of torch before 2.2 has the keys of Adamax, so it is not refused as long as it has no state.)
    - Parameters with names (`Adam(model.named_parameters())`, and state dicts of
      `torch.distributed.checkpoint`) are matched by name, if the names correspond to the paths of
      the leaves one to one: `layer.weight` is `layer/weight` or `layer/kernel`. Otherwise,
      and without names, `order` is needed if leaves have the same shape.

    Args:
      state_dict: `optimizer.state_dict()`, with tensors on any device, or arrays.
      tx: a transform of adamjax.
      params: the parameters at that step.
      order: the path of each of torch's parameters, in the order of its groups; `None` for one that
        is not to be converted. By default the parameters' names give the order. Without names,
        the floating leaves of `params` are taken in their order. Dictionaries in `params` have the
        order of their sorted keys, or of the numbers if all keys are numbers. torch's order is that
        of the module's definition, which may be another. If two leaves have the same shape, a wrong
        order would not be noticed. So then `order` is required, unless all keys are numbers. If
        torch's parameters have names, `order` may also be a dictionary from these to paths.
      adapt: a function that makes torch's array fit the leaf, if torch stores it transposed:
        `lambda path, x: x.transpose(*range(2, x.ndim), 1, 0) if path.endswith("kernel") else x`,
        which is `x.T` for a matrix. It is required if some leaf has the same shape when transposed,
        so that the shape does not show how torch stores it. A square matrix has such a shape, and
        so has the kernel of a Conv1d whose `out_channels` equal its `kernel_size`. Leaves that are
        called `weight`, `embedding` or `table` are taken as they are. **Moments must be changed as
        the weights were when they were ported**, which adamjax cannot check: a transposed
        convolution with as many channels in as out (torch has `(in, out, *kernel_size)`, and JAX
        libraries flip the kernel) and the first dense layer after a flatten need a function of
        their own.
      average: for a `weight_ema` in `tx`, the average so far, a tree like `params`.
      check, rtol: as for `from_optax`.

    Returns:
      A state like that of `tx.init(params)`.

    Raises:
      TypeError: `state_dict` is no state dict of torch.
      ValueError: something does not fit or would not go on as before. The message names the leaf.

    >>> import adamjax, jax.numpy as jnp, numpy as np
    >>> moments = {"step": 7, "exp_avg": np.full(2, 0.5), "exp_avg_sq": np.ones(2)}
    >>> group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8,
    ...          "weight_decay": 0, "amsgrad": False}
    >>> tx, params = adamjax.adam(0.1, eps=1e-8), {"w": jnp.zeros(2)}
    >>> state_dict = {"state": {0: moments}, "param_groups": [group]}  # optimizer.state_dict()
    >>> state = adamjax.convert.from_torch(state_dict, tx, params, order=["w"])
    >>> adamjax.step_count(state), adamjax.get_slot(state, "m")["w"]
    (Array(7, dtype=int32), Array([0.5, 0.5], dtype=float32))
    """
    has_adapt = adapt is not None
    source, _ = _read("from_torch", state_dict, params, order, adapt, check, has_adapt)
    ours = initial_state("from_torch", tx, params)
    state = into_adamjax(source, TORCH, ours, average, check, rtol)
    if check:
        expect_same_hyperparameters(ours.with_state(state), TORCH, source.moments)
    return state


def to_torch(
    state: Any,
    tx: Any,
    params: Tree,
    target: Mapping[str, Any],
    *,
    order: Order = None,
    adapt: Adapt | None = None,
    check: bool = True,
    rtol: float = RTOL,
) -> dict[str, Any]:
    """The state dict with which an optimizer of torch continues from a state of `tx`.

    Args:
      state, tx, params: as for `to_optax`. A `weight_ema` in `tx` is refused, because torch's
        optimizers have no average.
      target: `optimizer.state_dict()` of the new optimizer. Its groups are kept unchanged. If `tx`
        has a schedule, it is compared with `lr` in the next step only: give the new optimizer a
        scheduler.
      order: as for `from_torch`. A `target` before its first step has no arrays yet, so no shapes
        can show a mistake. Then `order` is required if there are several leaves,
        unless torch's names give the order or all keys of `params` are numbers. And `adapt` is
        required if there are kernels.
      adapt: a function that makes the leaf's array fit torch's parameter. For kernels it is the
        inverse of that for `from_torch`: `x.transpose(-1, -2, *range(x.ndim - 2))`.
      check, rtol: as for `from_optax`. (`load_state_dict` rounds moments to the dtype of torch's
        parameters.)

    Returns:
      A dictionary of NumPy arrays and numbers. Make its arrays tensors for
      `optimizer.load_state_dict`: see the example. The moments are laid out in memory like those
      of `target`, or in C order if it has none. For parameters in `channels_last` and `fused=True`,
      let the new optimizer take a step before you pass its `state_dict()`: torch's fused step is
      wrong if moments are laid out otherwise than the parameter.

    Raises:
      TypeError, ValueError: as for `from_torch`.

    >>> import adamjax, jax, jax.numpy as jnp, numpy as np
    >>> tx, params = adamjax.adam(0.1, eps=1e-8), {"w": jnp.zeros(2)}
    >>> updates, state = tx.update({"w": jnp.ones(2)}, tx.init(params), params)
    >>> group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8,
    ...          "weight_decay": 0, "amsgrad": False}
    >>> target = {"state": {}, "param_groups": [group]}  # optimizer.state_dict()
    >>> new = adamjax.convert.to_torch(state, tx, params, target)
    >>> new["state"][0]["exp_avg"], new["state"][0]["step"]
    (array([0.1, 0.1], dtype=float32), array(1., dtype=float32))

    >>> import torch  # doctest: +SKIP
    >>> def tensors(x):  # optimizer.load_state_dict(jax.tree.map(tensors, new))
    ...     return torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    """
    owner, has_adapt = "to_torch", adapt is not None
    adapted = checked_adapt(owner, adapt)
    target_source, key_of = _read(owner, target, params, order, None, check, has_adapt)
    ours = AdamjaxState(owner, tx, state, params)
    source = ours.read_for(target_source, check)
    if check and source.average is not None:
        raise ValueError(
            f"{owner}: the state has an average of the weights, and torch's optimizer has none: "
            "read it (adamjax.averaged_weights), and convert tx and its state without weight_ema, "
            "or pass check=False to drop the average"
        )
    filler = Translation(source, ours, TORCH, check, rtol)
    states = dict(target["state"])
    for path, key in key_of.items():
        kind, moments, slots = filler.from_adamjax(path)
        target_moments = target_source.moments[path][0]
        # First the slots that torch's optimizer has, then the new ones.
        expect_slots(owner, TORCH, kind, path, target_moments)
        expect_slots(owner, TORCH, kind, path, dataclasses.replace(target_moments, slots=slots))
        # torch takes no bfloat16 from NumPy, so narrow slots become float32.
        dtypes = {n: np.float32 if x.dtype.itemsize < 4 else x.dtype for n, x in slots.items()}
        arrays = {name: np.array(x, dtypes[name]) for name, x in slots.items()}
        # torch's fused steps need moments that are laid out in memory like the parameter.
        arrays = {name: np.array(adapted(path, name, x), order="C") for name, x in arrays.items()}
        for name, x in (target_moments.slots or {}).items():
            if np.shape(arrays[name]) != np.shape(x):
                raise ValueError(
                    f"{owner}: {name} of {path!r} has shape {list(np.shape(arrays[name]))}, "
                    f"expected {list(np.shape(x))}, that of torch's: are the leaves in the order "
                    "of torch's groups (order=), or must adapt transpose this one?"
                )
            laid_out = np.empty_like(x, arrays[name].dtype)
            laid_out[...] = arrays[name]
            arrays[name] = laid_out
        # The count is a tensor in torch, except in SparseAdam.
        lazy = target_moments.hyperparams.get("lazy")
        step = moments.count if lazy else np.array(moments.count, np.float32)
        states[key] = {"step": step, **arrays}
        if kind == "nadam":
            states[key]["mu_product"] = np.array(moments.product)
    filler.finish()
    if check:
        expect_same_hyperparameters(ours, TORCH, target_source.moments)
    return {**target, "state": states}
