"""The quality models in float64, exact and dense: is rounding all that makes them differ?

In float32, runs of the same seed differ: `exact_rows` from dense Adam about as much as two dense
Adams that round in different places (the suite `quality` shows both). Training amplifies the first
rounding difference, until it changes a rank. In float64 that difference is 2^29 times smaller. If
rounding is the only cause, exact and dense then have the same metrics, seed by seed.

Each model is trained with the rate that the suite `quality` chose for dense. A metric of ranks
must be equal; a loss may differ by `ROUNDING`.

Two controls show what rounding does without any row that lags behind: adamjax's dense Adam, and
optax's from initial weights of which about half are replaced by the next larger float. Their
weights and those of exact are compared with dense's at the end.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import quality
from benchmarks.measure import RESULTS
from benchmarks.suite import Suite, progress
from benchmarks.train.options import UserError

# The largest relative difference of a loss that counts as rounding, amplified by training.
ROUNDING = 1e-9
REFERENCE = "dense"
ONE_ULP_OFF = "dense, one ulp off"
CONTENDERS = ("adamjax dense", ONE_ULP_OFF, "exact")
RATES_FROM = RESULTS / "cpu" / "quality.json"


def rates(path: Path) -> dict[str, float]:
    """The rate of dense by model, from results of the suite `quality`."""
    if not path.exists():
        raise UserError(f"no results of the suite quality in {path}: run it first")
    rows = json.loads(path.read_text())["models"]
    return {row["model"]: row["contenders"][REFERENCE]["rate"] for row in rows}


def compared(own: list[float], dense: list[float], allowed: float) -> dict[str, float]:
    """How far a metric is from dense's, over all epochs of all seeds.

    Returns:
      "largest", the largest relative difference, and "same", the share of epochs in which it is at
      most `allowed`.
    """
    relative = [abs(x - y) / max(abs(y), 1e-300) for x, y in zip(own, dense, strict=True)]
    same = sum(x <= allowed for x in relative) / len(relative)
    return {"largest": max(relative), "same": same}


def one_ulp_off(start: Any, seed: int) -> Any:
    """The parameters, about half of them replaced by the next larger float."""
    rng = np.random.default_rng(seed)

    def next_larger(x: Any) -> Any:
        is_replaced = rng.random(x.shape) < 0.5
        return jax.numpy.asarray(np.where(is_replaced, np.nextafter(x, np.inf), x))

    return jax.tree.map(next_larger, start)


def distance(own: list[Any], dense: list[Any]) -> float:
    return max(float(np.abs(x - y).max()) for x, y in zip(own, dense, strict=True))


def main(argv: list[str]) -> int:
    packages = ("adamjax", "jax", "jaxlib", "optax", "recbole")
    suite = Suite("float64", __doc__, packages, only_chooses="models")
    quick = suite.parse(argv).quick
    quality.expect_packages()
    jax.config.update("jax_enable_x64", True)

    from benchmarks.quality import data, protocol
    from benchmarks.quality.models import MODELS
    from benchmarks.quality.run import Program, means

    suite.results["data"] = data.about()
    rate_of = rates(RATES_FROM)
    models = {model.name: quality.smaller(model) if quick else model for model in MODELS}
    chosen = [models[name] for name in suite.chosen(models)]
    seeds = protocol.SEEDS[: quality.QUICK_SEEDS if quick else None]
    names = (REFERENCE, *CONTENDERS)
    suite.results |= {"seeds": list(seeds), "rounding": ROUNDING, "metrics": [], "weights": []}
    for model in chosen:
        programs = {name: Program(model, name) for name in names if name != ONE_ULP_OFF}
        programs[ONE_ULP_OFF] = programs[REFERENCE]
        epochs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
        distances: dict[str, list[float]] = {name: [] for name in CONTENDERS}
        for seed in progress(seeds, "seed"):
            batches, last = model.batches(seed), {}
            for name in names:
                start = model.jitted_init(jax.random.key(seed))
                if name == ONE_ULP_OFF:
                    start = one_ulp_off(start, seed)
                for _, params in programs[name].train(rate_of[model.name], start, batches):
                    epochs[name].append(means(model.metric_values(params, "test")))
                last[name] = [np.array(x) for x in jax.tree.leaves(params)]
            for name in CONTENDERS:
                distances[name].append(distance(last[name], last[REFERENCE]))
        for metric in model.metrics:
            values = {name: [epoch[metric] for epoch in epochs[name]] for name in names}
            allowed = ROUNDING if metric == "loss" else 0.0
            row = {n: compared(values[n], values[REFERENCE], allowed) for n in CONTENDERS}
            about = {"model": model.name, "metric": metric}
            suite.results["metrics"].append(about | {"contenders": row})
            print(f"{model.name}, {metric}: {row}", flush=True)
        suite.results["weights"].append({"model": model.name, "contenders": distances})
    return suite.finish()
