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
    into_ours,
    leaf_order,
    leaves_by_path,
    new_ours,
    no_place_to_gather,
    numpy_array,
    same_value,
    steps_taken,
)
from adamjax.data import Tree

__all__ = ["from_torch", "to_torch"]


# Options that change nothing of what is kept, and those that say what does.
_HARMLESS = {
    *("params", "param_names", "initial_lr", "foreach", "fused", "capturable", "differentiable"),
    "maximize",
}
_ALWAYS = {"lr", "betas", "eps"}
_DECAY = {"weight_decay", "decoupled_weight_decay"}


def _kinds(owner: str, group: Mapping[str, Any]) -> tuple[str, ...]:
    """What kinds of rule a group of torch may be of, by the options that it has."""
    own = set(group) - _HARMLESS
    if own == _ALWAYS:
        return ("sparse",)
    if own == _ALWAYS | {"weight_decay"}:
        return ("adamax",)
    if _ALWAYS | {"weight_decay", "amsgrad"} <= own <= _ALWAYS | _DECAY | {"amsgrad"}:
        return ("amsgrad",) if group["amsgrad"] else ("adam",)
    nadam = _ALWAYS | {"weight_decay", "momentum_decay"}
    if nadam <= own <= nadam | _DECAY | {"amsgrad"}:
        return ("nadam",)
    raise ValueError(
        f"{owner}: a group of torch has the options {sorted(own)}: expected those of Adam, AdamW, "
        "Adamax, NAdam or SparseAdam; the moments of another optimizer cannot go on here"
    )


def _group_facts(owner: str, group: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """What kinds of rule a group of torch may be of, and what it says of hyperparameters."""
    kinds = _kinds(owner, group)
    facts: dict[str, Any] = {"learning_rate": _scalar(group["lr"]), "eps": group["eps"]}
    facts["b1"], facts["b2"] = (_scalar(b) for b in group["betas"])
    facts["maximize"] = bool(group.get("maximize", False))
    if kinds == ("sparse",):
        # Its epsilon is outside the bias correction.
        return ("adam",), {**facts, "lazy": True, "form": "eps_hat"}
    # Older versions do not say whether the decay is Adam's or AdamW's.
    decoupled = group.get("decoupled_weight_decay", None if "amsgrad" in group else False)
    facts |= {"weight_decay": _scalar(group["weight_decay"]), "decoupled": decoupled}
    if kinds == ("nadam",) and not same_value(group["momentum_decay"], 1.0):
        raise ValueError(
            f"{owner}: torch's NAdam has momentum_decay={group['momentum_decay']}: the "
            "momentum here is b1 * (1 - 0.5 * 0.96**t), that of momentum_decay=1"
        )
    return kinds, facts


def _in_order(
    owner: str,
    groups: Sequence[Mapping[str, Any]],
    order: Sequence[str | None] | None,
    params: Tree,
) -> list[str | None]:
    """The path of each parameter of the groups, by their names where they have some."""
    paths = leaf_order(owner, order, params)
    names = [name for group in groups for name in group.get("param_names") or ()]
    if len(names) != sum(len(group["params"]) for group in groups):
        return paths
    named = [str(name).replace(".", "/") for name in names]
    known = set(leaves_by_path(params))
    if order is None:
        if sorted(named) == sorted(known):
            return list(named)
        raise ValueError(
            f"{owner}: torch names its parameters {names[:8]}, which are not the paths of params, "
            f"{sorted(known)[:8]}: give order=, the path (or None) of each in this order"
        )
    for name, here, path in zip(names, named, paths, strict=False):
        if path is not None and here in known and here != path:
            raise ValueError(
                f"{owner}: order has {path!r} in the place of torch's {name!r}, which is the path "
                f"of another leaf, {here!r}: put order in the order of {names[:8]}"
            )
    return paths


def _scalar(x: Any) -> float:
    return float(numpy_array(x))


_TORCH_SLOTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "exp_inf")


def _read_torch(
    owner: str,
    state_dict: Mapping[str, Any],
    params: Tree,
    order: Sequence[str | None] | None,
    adapt: Callable[[str, np.ndarray], np.ndarray] | None,
) -> tuple[Source, dict[str, Any]]:
    """The state in the one form, and by path torch's key of the leaf."""
    if not isinstance(state_dict, Mapping) or not {"state", "param_groups"} <= set(state_dict):
        raise TypeError(
            f"{owner}: expected optimizer.state_dict() of torch, with 'state' and "
            f"'param_groups', got {type(state_dict).__name__}"
        )
    source, keys = Source(owner), {}
    paths = _in_order(owner, state_dict["param_groups"], order, params)
    ids = [(key, group) for group in state_dict["param_groups"] for key in group["params"]]
    if len(ids) != len(paths):
        raise ValueError(
            f"{owner}: torch's groups have {len(ids)} parameters, but "
            f"{'params' if order is None else 'order'} has {len(paths)} leaves, {paths[:5]}...: "
            "give order=, a path (or None) for each parameter in the order of torch's groups"
        )
    for (key, group), path in zip(ids, paths, strict=True):
        if path is None:
            continue
        keys[path] = key
        kinds, facts = _group_facts(owner, group)
        held = state_dict["state"].get(key)
        if not held:
            source.add(path, Kept(0, None, kinds, facts=facts))
            continue
        if unknown := set(held) - {*_TORCH_SLOTS, "step", "mu_product"} or {"step"} - set(held):
            raise ValueError(
                f"{owner}: torch keeps {sorted(held)} of {path!r}, expected 'step' and some of "
                f"{list(_TORCH_SLOTS)}: {sorted(unknown)[0]!r} is another optimizer's, or missing"
            )
        slots = {name: numpy_array(held[name]) for name in _TORCH_SLOTS if name in held}
        if adapt is not None:
            slots = {name: np.asarray(adapt(path, x)) for name, x in slots.items()}
        product = held.get("mu_product")
        product = None if product is None else _scalar(product)
        count = steps_taken(owner, repr(path), held["step"])
        source.add(path, Kept(count, slots, kinds, product, facts))
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
    - With `maximize` torch negates gradients, and keeps the moments of what it negated: negate
      them here too, `chain(scale(-1.0), adam(...))`.
    - `param_names` are the leaves' paths, dots for slashes, or else `order` must be given.
    - `lr` must be the rate of the next step, which it is after `scheduler.step()`.

    Args:
      state_dict: `optimizer.state_dict()`, its tensors on any device, or arrays.
      tx: a transform of ours.
      params: the parameters at that step.
      order: the path of each of torch's parameters, in the order of its groups; `None` for one
        that is not to be converted. By default the floating leaves of `params` in their order.
      adapt: gives an array the form of the leaf, for one that is transposed there, say
        `lambda path, x: x.T if path.endswith("kernel") else x`.
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
    source, _ = _read_torch("from_torch", state_dict, params, order, adapt)
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
    wanted, keys = _read_torch("to_torch", target, params, order, adapt=None)
    ours = Ours("to_torch", tx, state, params)
    source = ours.read()
    no_place_to_gather("to_torch", source)
    filling = Filling(source, check)
    translation = Translation(filling, TORCH, rtol)
    held = dict(target["state"])
    for path, key in keys.items():
        kind, kept, slots = translation.to_theirs(path)
        facts = wanted.kept[path][0]
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
