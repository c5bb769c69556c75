"""States from and to torch."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from adamjax.convert.common import (
    RTOL,
    TORCH,
    Filling,
    Kept,
    Ours,
    Said,
    Source,
    Translation,
    as_expected,
    expect_place_to_gather,
    into_ours,
    leaf_order,
    leaves_by_path,
    new_ours,
    number_of,
    numbers_of,
    same_value,
    steps_taken,
)
from adamjax.data import Tree

__all__ = ["from_torch", "to_torch"]


# The keys that tell torch's optimizers apart: those that a group must have, and those that only
# newer versions write.
_ADAM = {"lr", "betas", "eps"}
_GROUPS: dict[str, tuple[set[str], set[str]]] = {
    "Adam": ({*_ADAM, "weight_decay", "amsgrad"}, {"decoupled_weight_decay"}),
    "NAdam": ({*_ADAM, "weight_decay", "momentum_decay"}, {"decoupled_weight_decay"}),
    "Adamax": ({*_ADAM, "weight_decay"}, set()),
    "SparseAdam": (_ADAM, set()),
}
# What changes nothing in a step: names, how it is computed, what schedulers note for themselves.
_HARMLESS = {
    *("params", "param_names", "name"),
    *("foreach", "fused", "capturable", "differentiable"),
    *("initial_lr", "max_lr", "min_lr", "swa_lr"),
}
# What OneCycleLR and CyclicLR note when they change betas in each step.
_CYCLES = {"base_momentum", "max_momentum"}
# A key that only this one of torch's other optimizers has.
_OTHERS = {
    "dampening": "SGD",
    "alpha": "RMSprop or ASGD",
    "lr_decay": "Adagrad",
    "rho": "Adadelta",
    "etas": "Rprop",
    "beta2_decay": "Adafactor",
    "max_iter": "LBFGS",
    "ns_steps": "Muon",
}


def _optimizer(owner: str, group: Mapping[str, Any]) -> str:
    """Which optimizer a group is of, by its keys; any other one is refused."""
    keys = set(group) - _HARMLESS - _CYCLES - {"maximize"}
    for name, (needed, newer) in _GROUPS.items():
        if needed <= keys <= needed | newer:
            return name
    other = [name for key, name in _OTHERS.items() if key in group]
    if keys == {*_ADAM, "weight_decay", "decoupled_weight_decay"}:
        other = ["RAdam"]
    raise ValueError(
        f"{owner}: a group of torch has the options {sorted(map(str, keys))}"
        f"{f', those of {other[0]}' if other else ''}: expected those of Adam, AdamW, Adamax, "
        "NAdam or SparseAdam, whose moments alone can go on here. Start another optimizer anew, "
        "tx.init(params); take keys of your own out of the groups"
    )


def _group_facts(
    source: Source, group: Mapping[str, Any]
) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What kinds of rule a group of torch may be of, and what it says of hyperparameters."""
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
            f"{owner}: torch's NAdam has momentum_decay={group['momentum_decay']}: the "
            "momentum here is b1 * (1 - 0.5 * 0.96**t), that of momentum_decay=1"
        )
    optimizer = _optimizer(owner, group)
    facts: dict[str, Any] = {"learning_rate": number("lr"), "eps": number("eps")}
    betas = group["betas"]
    if not isinstance(betas, list | tuple) or len(betas) != 2:
        raise ValueError(
            f"{owner}: betas of a group of torch are {betas!r:.100}, expected a pair of numbers"
        )
    what = "a beta of a group of torch"
    facts["b1"], facts["b2"] = (number_of(owner, what, b) for b in betas)
    facts["maximize"] = bool(flag("maximize"))
    if any(group.get(key) is not None for key in _CYCLES):
        source.doubts.append(
            "a scheduler of torch (OneCycleLR, CyclicLR) changes betas in each step, which stand "
            "still here: go on from where they have come to their last value, with "
            "base_momentum and max_momentum taken out of the groups"
        )
    if optimizer == "SparseAdam":
        # Its epsilon is outside the bias correction.
        return ("adam",), {**facts, "lazy": True, "form": "eps_hat"}
    # Older versions do not say whether the decay is Adam's or AdamW's.
    decoupled = flag("decoupled_weight_decay", None if optimizer == "Adam" else False)
    facts |= {"weight_decay": number("weight_decay"), "decoupled": decoupled}
    adam = "amsgrad" if flag("amsgrad") else "adam"
    return ({"Adam": adam, "NAdam": "nadam", "Adamax": "adamax"}[optimizer],), facts


_TORCH_SLOTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf")


def _parameter(owner: str, path: str, held: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The moments that torch keeps of a parameter, by its names; anything else is refused."""
    unknown = sorted(str(key) for key in held if key not in (*_TORCH_SLOTS, "step", "mu_product"))
    if unknown or "step" not in held:
        raise ValueError(
            f"{owner}: torch keeps {sorted(map(str, held))} of {path!r}: expected 'step' and of "
            f"{list(_TORCH_SLOTS)} what Adam, AdamW, Adamax, NAdam or SparseAdam keep. Start "
            "another optimizer anew, tx.init(params)"
        )
    for name, x in held.items():
        kind = type(x)
        if hasattr(x, "detach") and kind.__name__ not in ("Tensor", "Parameter"):
            raise ValueError(
                f"{owner}: {name} of {path!r} is a {kind.__module__}.{kind.__qualname__}, "
                "expected a plain tensor: make it one first (full_tensor() of a DTensor, "
                "dequantize() of a quantized one)"
            )
    here = [name for name in _TORCH_SLOTS if name in held]
    return {name: numbers_of(owner, f"{name} of {path!r}", held[name]) for name in here}


def _expect_form(owner: str, state_dict: Mapping[str, Any]) -> None:
    """Refuses what has not the form of torch's state dicts, whatever it is of."""

    def refuse(what: str, x: Any, wanted: str) -> None:
        raise ValueError(
            f"{owner}: {what} is {x!r:.100} of type {type(x).__name__}, expected {wanted}, as in "
            "optimizer.state_dict() of torch"
        )

    groups, state = state_dict["param_groups"], state_dict["state"]
    if not isinstance(groups, list | tuple):
        refuse("'param_groups'", groups, "a list of dictionaries")
    seen: set[Any] = set()
    for group in groups:
        if not isinstance(group, Mapping):
            refuse("a group of 'param_groups'", group, "a dictionary")
        keys = group.get("params")
        if not isinstance(keys, list | tuple):
            refuse("'params' of a group", keys, "a list of numbers or names")
        for key in keys:
            if not isinstance(key, int | str | np.integer) or isinstance(key, bool):
                refuse("a parameter in 'params' of a group", key, "its number or name")
            if key in seen:
                refuse("a parameter in 'params' of a group", key, "each parameter once")
            seen.add(key)
    if not isinstance(state, Mapping):
        refuse("'state'", state, "a dictionary by the parameters' numbers or names")
    for key, held in state.items():
        if not isinstance(held, Mapping):
            refuse(f"the state of parameter {key!r}", held, "a dictionary")


def _names(owner: str, groups: Sequence[Mapping[str, Any]]) -> list[str] | None:
    """What torch calls its parameters, in the order of its groups; `None` if it does not say."""
    names: list[str] = []
    for group in groups:
        keys = list(group["params"])
        # torch.distributed's state dicts have names for keys.
        found = keys if all(isinstance(key, str) for key in keys) else group.get("param_names")
        if found is None:
            return None
        named = isinstance(found, list | tuple) and all(isinstance(name, str) for name in found)
        if not named or len(found) != len(keys):
            raise ValueError(
                f"{owner}: a group of torch has the param_names {found!r:.100}, expected a list of "
                f"strings for its {len(keys)} params"
            )
        names.extend(found)
    return names


def _doubt_kernels(
    source: Source, names: Sequence[str] | None, paths: Sequence[str | None], params: Tree
) -> None:
    """Doubts a square kernel that may be transposed there, which no shape shows."""
    leaves = leaves_by_path(source.owner, params)
    pairs = [(name, path) for name, path in zip(names or (), paths, strict=False) if path]
    kernels = [path for name, path in pairs if name.endswith("weight") and path.endswith("kernel")]
    shapes = [np.shape(leaves[path]) for path in kernels]
    if kernels and all(len(set(shape)) == 1 < len(shape) for shape in shapes):
        source.doubts.append(
            f"torch's weights are the transposes of kernels, as of {kernels[0]!r}, and of square "
            "ones no shape shows it: pass adapt=lambda path, x: x.T if path.endswith('kernel') "
            "else x, or adapt=lambda path, x: x where they are not"
        )


def _read_torch(
    owner: str,
    state_dict: Mapping[str, Any],
    params: Tree,
    order: Sequence[str | None] | None,
    adapt: Callable[[str, np.ndarray], np.ndarray] | None,
    check: bool,
    adapted: bool,
) -> tuple[Source, dict[str, Any]]:
    """The state in the one form, and by path torch's key of the leaf.

    Args:
      adapt: for the arrays that are read.
      adapted: whether the user adapts arrays, these or those that are written.
    """
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise TypeError(
            f"{owner}: expected optimizer.state_dict() of torch, with 'state' and "
            f"'param_groups', got {type(state_dict).__name__}"
        )
    _expect_form(owner, state_dict)
    source, keys, groups = Source(owner), {}, state_dict["param_groups"]
    said = [_group_facts(source, group) for group in groups]
    ids = [(key, i) for i, group in enumerate(groups) for key in group["params"]]
    names = _names(owner, groups)
    paths = leaf_order(owner, order, params, "torch", names, check)
    if not adapted:
        _doubt_kernels(source, names, paths, params)
    if len(ids) != len(paths):
        raise ValueError(
            f"{owner}: torch's groups have {len(ids)} parameters, but "
            f"{'params' if order is None else 'order'} has {len(paths)} leaves, {paths[:5]}...: "
            "give order=, a path (or None) for each parameter in the order of torch's groups"
        )
    strays = [key for key in state_dict["state"] if key not in {key for key, _ in ids}]
    if strays:
        raise ValueError(
            f"{owner}: torch's state has the keys {strays[:5]}, but its groups only have "
            f"{[key for key, _ in ids][:5]}...: expected optimizer.state_dict() as torch writes it "
            "(numbers that JSON made strings are to be numbers again)"
        )
    for (key, group), path in zip(ids, paths, strict=True):
        if path is None:
            continue
        keys[path] = key
        kinds, facts = said[group]
        held = state_dict["state"].get(key)
        if not held:
            source.add(path, Kept(0, None, kinds, facts=facts))
            continue
        slots = _parameter(owner, path, held)
        if adapt is not None:
            slots = {name: np.asarray(adapt(path, x)) for name, x in slots.items()}
        product = held.get("mu_product")
        if product is not None:
            product = number_of(owner, f"mu_product of {path!r}", product)
        steps = steps_taken(owner, repr(path), held["step"])
        source.add(path, Kept(steps, slots, kinds, product, facts))
    return source, keys


def from_torch(
    state_dict: Mapping[str, Any],
    tx: Any,
    params: Tree,
    *,
    order: Sequence[str | None] | None = None,
    adapt: Callable[[str, np.ndarray], np.ndarray] | None = None,
    average: Tree = None,
    check: bool = True,
    rtol: float = RTOL,
) -> Any:
    """The state of `tx` that goes on from a state dict of `torch.optim`.

    That of `Adam`, `AdamW` (both with `amsgrad`), `Adamax`, `NAdam` with `momentum_decay=1`, and
    `SparseAdam`, with any number of groups. What the groups say is compared with `tx`:

    - `eps` of SparseAdam is `eps_hat` here, and its rows are `rows="lazy"`; to go on with
      `exact_rows` pass `check=False`, since rows then move that stood still.
    - `weight_decay` of Adam and Adamax is `add_decayed_weights` in front of the rule, that of
      AdamW behind it.
    - With `maximize` torch negates gradients, and keeps the moments of what it negated: `tx` must
      negate them too, in front of all else: `chain(scale(-1.0), adam(...))`.
    - `lr` must be the rate of the next step, which it is after `scheduler.step()`. A scheduler
      that changes betas as well (`OneCycleLR`, by default) is refused.
    - Other optimizers of torch are refused, by the keys of their groups: a key that is not known
      is that of another optimizer. (Before 2.2 an `RAdam` without a state has the keys of Adamax.)
    - Parameters that are named (`Adam(model.named_parameters())`, and state dicts of
      `torch.distributed.checkpoint`) are taken by their names, where these are the paths of the
      leaves one to one: `layer.weight` is `layer/weight` or `layer/kernel`. Where they are not, and
      leaves have the same shape, `order` is asked for. Without names torch says nothing but shapes:
      that leaves of one shape are in the right order, nothing can tell.

    Args:
      state_dict: `optimizer.state_dict()`, its tensors on any device, or arrays.
      tx: a transform of ours.
      params: the parameters at that step.
      order: the path of each of torch's parameters, in the order of its groups; `None` for one
        that is not to be converted. By default as the parameters are named, and without names the
        floating leaves of `params` in their order (which for a dictionary is that of its sorted
        keys, and for a torch module that of its definition).
      adapt: gives an array the form of the leaf, for one that is transposed there, say
        `lambda path, x: x.T if path.endswith("kernel") else x`. Of square kernels shapes do not
        show it; where torch's names show that they are weights, it must be given.
      average: for a `weight_ema` in `tx`, the average so far, a tree like `params`.
      check, rtol: as for `from_optax`.

    Returns:
      A state like that of `tx.init(params)`.

    Raises:
      TypeError: `state_dict` is something else.
      ValueError: something does not fit or would not go on as before. The message names the leaf.

    >>> import adamjax, jax.numpy as jnp, numpy as np
    >>> kept = {"step": 7, "exp_avg": np.full(2, 0.5), "exp_avg_sq": np.ones(2)}
    >>> group = {"params": [0], "lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8,
    ...          "weight_decay": 0, "amsgrad": False}
    >>> tx, params = adamjax.adam(0.1, eps=1e-8), {"w": jnp.zeros(2)}
    >>> state_dict = {"state": {0: kept}, "param_groups": [group]}  # optimizer.state_dict()
    >>> state = adamjax.convert.from_torch(state_dict, tx, params, order=["w"])
    >>> adamjax.step_count(state), adamjax.get_slot(state, "m")["w"]
    (Array(7, dtype=int32), Array([0.5, 0.5], dtype=float32))
    """
    source, _ = _read_torch(
        "from_torch", state_dict, params, order, adapt, check, adapt is not None
    )
    new = new_ours("from_torch", tx, params)
    return into_ours(source, TORCH, new, average, check, rtol)


def to_torch(
    state: Any,
    tx: Any,
    params: Tree,
    target: Mapping[str, Any],
    *,
    order: Sequence[str | None] | None = None,
    adapt: Callable[[str, np.ndarray], np.ndarray] | None = None,
    check: bool = True,
    rtol: float = RTOL,
) -> dict[str, Any]:
    """The state dict with which an optimizer of torch goes on from a state of `tx`.

    Args:
      state, tx, params: as for `to_optax`.
      target: `optimizer.state_dict()` of the new optimizer, whose groups are kept.
      order: as for `from_torch`.
      adapt: gives an array the form of torch's parameter.
      check, rtol: as for `from_optax`. (torch keeps moments in the dtype of its parameters,
        and rounds to it in `load_state_dict`.)

    Returns:
      A dictionary of NumPy arrays and numbers, for `optimizer.load_state_dict` once its arrays
      are tensors: see the example.

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

    >>> def tensors(x):  # optimizer.load_state_dict(jax.tree.map(tensors, new))
    ...     return torch.from_numpy(x) if isinstance(x, np.ndarray) else x
    """
    wanted, keys = _read_torch("to_torch", target, params, order, None, check, adapt is not None)
    wanted.refuse_doubts(check)
    ours = Ours("to_torch", tx, state, params)
    source = ours.read()
    expect_place_to_gather("to_torch", source, wanted)
    filling = Filling(source, check)
    translation = Translation(filling, TORCH, rtol)
    held = dict(target["state"])
    for path, key in keys.items():
        kind, kept, slots = translation.to_theirs(path)
        facts = wanted.kept[path][0]
        as_expected("to_torch", TORCH, kind, path, facts)
        as_expected("to_torch", TORCH, kind, path, dataclasses.replace(facts, slots=slots))
        # torch takes no bfloat16 from NumPy.
        wide = {name: np.float32 if x.dtype.itemsize < 4 else x.dtype for name, x in slots.items()}
        arrays = {name: np.array(x, wide[name]) for name, x in slots.items()}
        if adapt is not None:
            arrays = {name: np.array(adapt(path, x)) for name, x in arrays.items()}
        # A count is a tensor in torch, but for SparseAdam.
        step = kept.count if facts.facts.get("lazy") else np.array(kept.count, np.float32)
        held[key] = {"step": step, **arrays}
        if kind == "nadam":
            held[key]["mu_product"] = np.array(kept.product, np.float32)
    filling.finish()
    if check:
        Said(ours, TORCH).check(wanted.kept)
    return {**target, "state": held}
