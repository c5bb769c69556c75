"""What other packages do otherwise, in numbers: the same few steps, taken by each of them.

A case says what is done to one or two weights. Each package that is installed does it with its
own defaults, and the number that comes out goes into the table "Coming from" of README.md.
"""

import argparse
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import adamjax
from benchmarks.measure import RESULTS, environment, save

__all__ = ["CASES", "measured"]

SYSTEMS = ("adamjax", "optax", "keras", "torch")


@dataclass(frozen=True)
class Case:
    """One difference.

    Attributes:
      what: is done, and which number is shown.
      runs: by system, the function that gives the number, or says why there is none.
      theirs: how to get with adamjax what others do.
    """

    what: str
    runs: dict[str, Callable[[], float | str]]
    theirs: str


# --- taking steps ---------------------------------------------------------------------------------


def _pair(tx: Any, gradients: list[float], start: float = 0.0, dtype: Any = jnp.float32) -> Any:
    """The weight before each step and after the last, with a transform of adamjax or optax."""
    weight = jnp.array(start, dtype)
    state, path = tx.init(weight), [float(weight)]
    step = jax.jit(tx.update)
    for g in gradients:
        updates, state = step(jnp.array(g, dtype), state, weight)
        weight = adamjax.apply_updates(weight, updates)
        path.append(float(weight))
    return path, state


def ours(make: Callable[[], Any], gradients: list[float], **options: Any) -> list[float]:
    return _pair(make(), gradients, **options)[0]


def optax(name: str, gradients: list[float], *args: Any, **options: Any) -> list[float]:
    import optax as package

    return _pair(getattr(package, name)(*args), gradients, **options)[0]


def keras(
    name: str,
    gradients: list[float],
    start: float = 0.0,
    dtype: str = "float32",
    **options: Any,
) -> list[float]:
    os.environ.setdefault("KERAS_BACKEND", "jax")
    import keras as package

    weight = package.Variable(np.float32(start), dtype=dtype)
    optimizer = getattr(package.optimizers, name)(**options)
    optimizer.build([weight])
    path = [start]
    for g in gradients:
        optimizer.apply([jnp.array(g, dtype)])
        path.append(float(np.asarray(weight.value, np.float32)))
    return path


def torch(
    name: str, gradients: list[float], start: float = 0.0, dtype: str = "float32", **options: Any
) -> list[float]:
    import torch as package

    kind = getattr(package, dtype)
    weight = package.nn.Parameter(package.tensor(start, dtype=kind))
    optimizer = getattr(package.optim, name)([weight], **options)
    path = [start]
    for g in gradients:
        weight.grad = package.tensor(g, dtype=kind)
        optimizer.step()
        path.append(float(weight.detach()))
    return path


def last(path: list[float]) -> float:
    """The last move, without its sign."""
    return abs(path[-1] - path[-2])


# --- the cases ------------------------------------------------------------------------------------

TINY = [1e-8]
FADING = [1.0, *[0.1] * 9]
ONCE = [1.0, *[0.0] * 9]
ALWAYS = [1.0] * 100


def _average_after_two_steps() -> dict[str, Callable[[], float | str]]:
    """Weights 1, 0.9, 0.8: what an average of momentum 0.99 is then."""

    def adamjax_() -> float:
        tx = adamjax.chain(adamjax.scale(-0.1), adamjax.weight_ema(0.99))
        state = _pair(tx, [1.0, 1.0], start=1.0)[1]
        return float(adamjax.averaged_weights(state))

    def keras_() -> float:
        os.environ.setdefault("KERAS_BACKEND", "jax")
        import keras as package

        weight = package.Variable(np.float32(1.0))
        optimizer = package.optimizers.SGD(0.1, use_ema=True, ema_momentum=0.99)
        optimizer.build([weight])
        for _ in range(2):
            optimizer.apply([jnp.array(1.0)])
        optimizer.finalize_variable_values([weight])
        return float(weight.value)

    def torch_() -> float:
        import torch as package

        model = package.nn.Linear(1, 1, bias=False)
        utils = package.optim.swa_utils
        average = utils.AveragedModel(model, multi_avg_fn=utils.get_ema_multi_avg_fn(0.99))
        for value in (0.9, 0.8):
            with package.no_grad():
                model.weight.fill_(value)
            average.update_parameters(model)
        return float(average.module.weight.detach())

    def optax_() -> str:
        return "by hand"

    return {"adamjax": adamjax_, "optax": optax_, "keras": keras_, "torch": torch_}


def _clipped_twice() -> dict[str, Callable[[], float | str]]:
    """The gradient (3, 4), clipped by value 3.5 and by global norm 1, in the order written."""
    gradients = jnp.array([3.0, 4.0])

    def pair(tx: Any) -> float:
        return float(tx.update(gradients, tx.init(gradients))[0][1])

    def adamjax_() -> float:
        return pair(adamjax.chain(adamjax.clip_by_value(3.5), adamjax.clip_by_global_norm(1.0)))

    def optax_() -> float:
        import optax as package

        return pair(package.chain(package.clip(3.5), package.clip_by_global_norm(1.0)))

    def keras_() -> float | str:
        os.environ.setdefault("KERAS_BACKEND", "jax")
        import keras as package

        try:
            package.optimizers.Adam(clipvalue=3.5, global_clipnorm=1.0)
        except ValueError:
            return "refused"
        return math.nan

    def torch_() -> float:
        import torch as package

        weight = package.nn.Parameter(package.zeros(2))
        weight.grad = package.tensor([3.0, 4.0])
        package.nn.utils.clip_grad_value_([weight], 3.5)
        package.nn.utils.clip_grad_norm_([weight], 1.0)
        return float(weight.grad[1])

    return {"adamjax": adamjax_, "optax": optax_, "keras": keras_, "torch": torch_}


def _row_read_once() -> dict[str, Callable[[], float | str]]:
    """A row that has a gradient in the first of ten steps: how far it moves in the other nine."""
    rate = 0.1

    def torch_() -> float:
        import torch as package

        table = package.nn.Embedding(3, 1, sparse=True)
        optimizer = package.optim.SparseAdam(list(table.parameters()), lr=rate)
        path = []
        for row in [0, *[1] * 9]:
            optimizer.zero_grad()
            table(package.tensor([row])).sum().backward()
            optimizer.step()
            path.append(float(table.weight[0].detach()))
        return abs(path[-1] - path[0])

    def far(path: list[float]) -> float:
        return abs(path[-1] - path[1])

    return {
        "adamjax": lambda: far(ours(lambda: adamjax.adam(rate), ONCE)),
        "optax": lambda: far(optax("adam", ONCE, rate)),
        "keras": lambda: far(keras("Adam", ONCE, learning_rate=rate)),
        "torch": torch_,
    }


CASES: dict[str, Case] = {
    "eps": Case(
        "Adam, rate 1: the first move for a gradient of 1e-8",
        {
            "adamjax": lambda: last(ours(lambda: adamjax.adam(1.0), TINY)),
            "optax": lambda: last(optax("adam", TINY, 1.0)),
            "keras": lambda: last(keras("Adam", TINY, learning_rate=1.0)),
            "torch": lambda: last(torch("Adam", TINY, lr=1.0)),
        },
        "`adam(1.0, eps=1e-8)`",
    ),
    "amsgrad": Case(
        "AMSGrad, rate 1, a gradient of 1 and nine of 0.1: the tenth move",
        {
            "adamjax": lambda: last(ours(lambda: adamjax.amsgrad(1.0), FADING)),
            "optax": lambda: last(optax("amsgrad", FADING, 1.0)),
            "keras": lambda: last(keras("Adam", FADING, learning_rate=1.0, amsgrad=True)),
            "torch": lambda: last(torch("Adam", FADING, lr=1.0, amsgrad=True)),
        },
        "not optax's, whose maximum is over corrected v",
    ),
    "adamax": Case(
        "Adamax, rate 1: the first move for a gradient of 1e-8",
        {
            "adamjax": lambda: last(ours(lambda: adamjax.adamax(1.0), TINY)),
            "optax": lambda: last(optax("adamax", TINY, 1.0)),
            "keras": lambda: last(keras("Adamax", TINY, learning_rate=1.0)),
            "torch": lambda: last(torch("Adamax", TINY, lr=1.0)),
        },
        "`adamax(1.0, eps=1e-8)`, nearly: optax and torch add it inside the maximum",
    ),
    "nadam": Case(
        "Nadam, rate 1: the first move for a gradient of 1",
        {
            "adamjax": lambda: last(ours(lambda: adamjax.nadam(1.0), [1.0])),
            "optax": lambda: last(optax("nadam", [1.0], 1.0)),
            "keras": lambda: last(keras("Nadam", [1.0], learning_rate=1.0)),
            "torch": lambda: last(torch("NAdam", [1.0], lr=1.0)),
        },
        "not optax's, which has no momentum schedule",
    ),
    "weight decay": Case(
        "AdamW, rate 1, no gradient: the move of a weight of 1 by the default decay",
        {
            "adamjax": lambda: last(ours(lambda: adamjax.adamw(1.0), [0.0], start=1.0)),
            "optax": lambda: last(optax("adamw", [0.0], 1.0, start=1.0)),
            "keras": lambda: last(keras("AdamW", [0.0], start=1.0, learning_rate=1.0)),
            "torch": lambda: last(torch("AdamW", [0.0], start=1.0, lr=1.0)),
        },
        "`weight_decay=`",
    ),
    "EMA start": Case(
        "weights 1, 0.9, 0.8: their average of momentum 0.99 after the two steps",
        _average_after_two_steps(),
        "start it after the first step",
    ),
    "clip order": Case(
        "the gradient (3, 4) clipped by value 3.5, then by global norm 1: its second number",
        _clipped_twice(),
        "the chain's order is the order of the clips",
    ),
    "rows": Case(
        "Adam, rate 0.1, a row with a gradient in the first of ten steps: its move in the others "
        "(torch: SparseAdam)",
        _row_read_once(),
        '`rows="lazy"`',
    ),
    "bfloat16": Case(
        "Adam, rate 0.001, 100 gradients of 1, all in bfloat16, from 0: the weight",
        {
            "adamjax": lambda: ours(lambda: adamjax.adam(1e-3), ALWAYS, dtype=jnp.bfloat16)[-1],
            "optax": lambda: optax("adam", ALWAYS, 1e-3, dtype=jnp.bfloat16)[-1],
            "keras": lambda: keras("Adam", ALWAYS, dtype="bfloat16")[-1],
            "torch": lambda: torch("Adam", ALWAYS, dtype="bfloat16")[-1],
        },
        "moments and arithmetic in float32 are the default",
    ),
}


def measured(key: str, system: str) -> float | str:
    """The number of a case."""
    found = CASES[key].runs[system]()
    return found if isinstance(found, str) else float(f"{found:.4g}")


def main(argv: list[str]) -> int:
    """Runs; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks differences", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "any" / "differences.json")
    options = parser.parse_args(argv)
    rows = [
        {
            "key": key,
            "what": case.what,
            "theirs": case.theirs,
            "numbers": {system: measured(key, system) for system in SYSTEMS},
        }
        for key, case in CASES.items()
    ]
    env = environment("adamjax", "jax", *SYSTEMS[1:])
    save(
        {"environment": {"versions": env["versions"], "date": env["date"]}, "rows": rows},
        options.out,
    )
    for row in rows:
        print(row["key"], row["numbers"])
    return 0
