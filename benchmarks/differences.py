"""How the results of libraries differ: each takes the same few steps.

A case is a few steps of one or two weights. Each package takes them with its own defaults, and the
resulting number goes into the first table of docs/coming-from.md.
"""

import functools
import importlib
import math
import os
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adamjax
from benchmarks.suite import Suite

SYSTEMS = ("adamjax", "optax", "keras", "torch")
os.environ.setdefault("KERAS_BACKEND", "jax")

# Returns a number, or a text if there is none.
Run = Callable[[], float | str]


def weights_of_steps(
    system: str, rule: str, gradients: list[float], start: float, dtype: str, **options: Any
) -> list[float]:
    """The weight before each step and after the last."""
    path = [start]
    if system in ("adamjax", "optax"):
        tx = getattr(importlib.import_module(system), rule)(**options)
        weight = jnp.array(start, dtype)
        state, update = tx.init(weight), jax.jit(tx.update)
        for g in gradients:
            updates, state = update(jnp.array(g, dtype), state, weight)
            weight = adamjax.apply_updates(weight, updates)
            path.append(float(weight))
    elif system == "keras":
        import keras

        variable = keras.Variable(np.float32(start), dtype=dtype)
        optimizer = getattr(keras.optimizers, rule)(**options)
        optimizer.build([variable])
        for g in gradients:
            optimizer.apply([jnp.array(g, dtype)])
            path.append(float(np.asarray(variable.value, np.float32)))
    else:
        import torch

        kind = getattr(torch, dtype)
        parameter = torch.nn.Parameter(torch.tensor(start, dtype=kind))
        options["lr"] = options.pop("learning_rate")
        optimizer = getattr(torch.optim, rule)([parameter], **options)
        for g in gradients:
            parameter.grad = torch.tensor(g, dtype=kind)
            optimizer.step()
            path.append(float(parameter.detach()))
    return path


def runs(
    gradients: list[float],
    *rules: str,
    rate: float = 1.0,
    read: Callable[[list[float]], float] = lambda path: abs(path[-1] - path[-2]),
    start: float = 0.0,
    dtype: str = "float32",
    **keras_torch_options: Any,
) -> dict[str, Run]:
    """For each of `SYSTEMS`, a function that takes the same steps and returns a number of them."""

    def run(system: str, rule: str) -> float:
        options = keras_torch_options if system in ("keras", "torch") else {}
        options = {"learning_rate": rate, **options}
        return read(weights_of_steps(system, rule, gradients, start, dtype, **options))

    pairs = zip(SYSTEMS, rules, strict=True)
    return {system: functools.partial(run, system, rule) for system, rule in pairs}


def adamjax_average() -> float:
    """The average, with momentum 0.99, of a weight that goes 1, 0.9, 0.8."""
    tx, weight = adamjax.chain(adamjax.scale(-0.1), adamjax.weight_ema(0.99)), jnp.array(1.0)
    state = tx.init(weight)
    for _ in range(2):
        updates, state = tx.update(jnp.array(1.0), state, weight)
        weight = adamjax.apply_updates(weight, updates)
    return float(adamjax.averaged_weights(state))


def keras_average() -> float:
    import keras

    weight = keras.Variable(np.float32(1.0))
    optimizer = keras.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.99)
    optimizer.build([weight])
    for _ in range(2):
        optimizer.apply([jnp.array(1.0)])
    optimizer.finalize_variable_values([weight])
    return float(weight.value)


def torch_average() -> float:
    import torch

    model = torch.nn.Linear(1, 1, bias=False)
    utils = torch.optim.swa_utils
    average = utils.AveragedModel(model, multi_avg_fn=utils.get_ema_multi_avg_fn(0.99))
    for value in (0.9, 0.8):
        torch.nn.init.constant_(model.weight, value)
        average.update_parameters(model)
    return float(average.module.weight.detach())


def clipped(package: str, clip_by_value: str) -> float:
    """The gradient (3, 4), clipped by value 3.5 and by global norm 1: its second element."""
    rules, gradients = importlib.import_module(package), jnp.array([3.0, 4.0])
    tx = rules.chain(getattr(rules, clip_by_value)(3.5), rules.clip_by_global_norm(1.0))
    return float(tx.update(gradients, tx.init(gradients))[0][1])


def keras_clipped() -> float | str:
    import keras

    try:
        keras.optimizers.Adam(clipvalue=3.5, global_clipnorm=1.0)
    except ValueError:
        return "refused"
    return math.nan


def torch_clipped() -> float:
    import torch

    weight = torch.nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([3.0, 4.0])
    torch.nn.utils.clip_grad_value_([weight], 3.5)
    torch.nn.utils.clip_grad_norm_([weight], 1.0)
    return float(weight.grad[1])


def torch_sparse_row() -> float:
    """How far SparseAdam moves a row in nine steps after the one step with a gradient for it."""
    import torch

    table = torch.nn.Embedding(3, 1, sparse=True)
    optimizer = torch.optim.SparseAdam(list(table.parameters()), lr=0.1)
    path = []
    for row in [0, *[1] * 9]:
        optimizer.zero_grad()
        table(torch.tensor([row])).sum().backward()
        optimizer.step()
        path.append(float(table.weight[0].detach()))
    return abs(path[-1] - path[0])


ADAM = ("adam", "adam", "Adam", "Adam")
FADING, ONCE, ALWAYS = [1.0, *[0.1] * 9], [1.0, *[0.0] * 9], [1.0] * 100

# key: the steps and the number, how to get the others' result in adamjax, the runs
CASES: dict[str, tuple[str, str, dict[str, Run]]] = {
    "eps": (
        "Adam, rate 1, a gradient of 1e-8: size of the first step",
        "`adam(1.0, eps=1e-8)`",
        runs([1e-8], *ADAM),
    ),
    "amsgrad": (
        "AMSGrad, rate 1, a gradient of 1, then nine of 0.1: size of the tenth step",
        "not possible: optax takes the maximum of the corrected v",
        runs(FADING, "amsgrad", "amsgrad", "Adam", "Adam", amsgrad=True),
    ),
    "adamax": (
        "Adamax, rate 1, a gradient of 1e-8: size of the first step",
        "`adamax(1.0, eps=1e-8)` is close: optax and torch add eps inside the maximum",
        runs([1e-8], "adamax", "adamax", "Adamax", "Adamax"),
    ),
    "nadam": (
        "Nadam, rate 1, a gradient of 1: size of the first step",
        "not possible: optax has no momentum schedule. torch's `momentum_decay` is 0.004 by "
        "default; adamjax's schedule equals `momentum_decay=1` and cannot be changed",
        runs([1.0], "nadam", "nadam", "Nadam", "NAdam"),
    ),
    "weight decay": (
        "AdamW, its default decay, rate 1, a weight of 1, a gradient of 0: size of the first step",
        "set `weight_decay=`",
        runs([0.0], "adamw", "adamw", "AdamW", "AdamW", start=1.0),
    ),
    "EMA start": (
        "a weight that goes 1, 0.9, 0.8: its average with momentum 0.99 at the end",
        "take one step, then start the average again from the weights after that step: "
        "`state = (*state[:-1], tx.transforms[-1].init(params))`, where the last transform is "
        "`weight_ema`",
        {
            "adamjax": adamjax_average,
            "optax": lambda: "only the function `incremental_update`",
            "keras": keras_average,
            "torch": torch_average,
        },
    ),
    "clip order": (
        "the gradient (3, 4), clipped by value 3.5, then by global norm 1: its second element",
        "clips apply in the order of the chain",
        {
            "adamjax": lambda: clipped("adamjax", "clip_by_value"),
            "optax": lambda: clipped("optax", "clip"),
            "keras": keras_clipped,
            "torch": torch_clipped,
        },
    ),
    "rows": (
        "Adam, rate 0.1, a row with a gradient only in the first of ten steps: its movement in the "
        "other nine (torch: SparseAdam)",
        '`rows="lazy"`',
        runs(ONCE, *ADAM, rate=0.1, read=lambda path: abs(path[-1] - path[1]))
        | {"torch": torch_sparse_row},
    ),
    "bfloat16": (
        "Adam, rate 0.001, bfloat16 weights and gradients, a weight of 0: the weight after 100 "
        "gradients of 1",
        "not possible: the others round moments to the nearest bfloat16. adamjax stores float32 "
        "moments, or rounds stochastically (`m_dtype=`). In this case torch's result is the same",
        runs(ALWAYS, *ADAM, rate=1e-3, read=lambda path: path[-1], dtype="bfloat16"),
    ),
}


def measured(key: str, system: str) -> float | str:
    number = CASES[key][2][system]()
    return number if isinstance(number, str) else float(f"{number:.4g}")


def main(argv: list[str]) -> int:
    suite = Suite("differences", __doc__, ("adamjax", "jax", *SYSTEMS[1:]), folder="any")
    suite.parse(argv)
    suite.results["rows"] = [
        {"key": key, "numbers": {system: measured(key, system) for system in SYSTEMS}}
        for key in CASES
    ]
    return suite.finish()
