"""Does anything drift? A table trained for 100,000 steps, exactly and densely, against float64.

Rows are read as in language, few of them always and most of them hardly ever, and gradients are
noise, so nothing pulls a table that has drifted back. The table is trained by `exact_rows` with the
longest history that it takes by itself, as for a table of millions of rows, with the shortest one
the optimizer allows, so that its ring goes round every few hundred steps, and by the dense
optimizer in float32. All are compared, row by row, with the recurrence itself in float64, which is
written here from the papers. The rate is set from outside, another in each step: a warm-up, then a
cosine. One more run crosses the end of int32.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import adamjax
from benchmarks.measure import RESULTS, environment, save, timed

try:
    enable_x64 = jax.enable_x64
except AttributeError:  # before JAX 0.8
    from jax.experimental import enable_x64  # type: ignore[attr-defined,no-redef]

__all__ = ["main"]

ROWS, COLUMNS, READS = 2000, 8, 64
CHUNK = 1000  # steps of one call
PEAK = 3e-3
B1, B2, EPS, DECAY, MOMENTUM = 0.9, 0.999, 1e-7, 0.01, 0.999


@dataclass(frozen=True)
class Case:
    """An optimizer that is run.

    Attributes:
      rule: "adam", "amsgrad" or "adamax".
      corrected: whether eps is added to the corrected root, as in algorithm 1, or to the other.
      decays, averages: whether there is decoupled weight decay, and an average of the weights.
      first: the number of steps before the first.
    """

    rule: str
    corrected: bool = False
    decays: bool = False
    averages: bool = False
    first: int = 0

    def dense(self, rate: Any) -> adamjax.Transform:
        scale_by: Any = {
            "adam": adamjax.scale_by_adam,
            "amsgrad": adamjax.scale_by_amsgrad,
            "adamax": adamjax.scale_by_adamax,
        }[self.rule]
        form = "eps" if self.corrected or self.rule == "adamax" else "eps_hat"
        return adamjax.chain(
            scale_by(B1, B2, **{form: EPS}),
            *[adamjax.add_decayed_weights(DECAY)] * self.decays,
            adamjax.scale_by_learning_rate(rate),
            *[adamjax.weight_ema(MOMENTUM)] * self.averages,
        )


CASES = {
    "Adam": Case("adam"),
    "AMSGrad": Case("amsgrad"),
    "AdamW + average": Case("adam", corrected=True, decays=True, averages=True),
    "Adamax": Case("adamax"),
}
AT_THE_END = Case("adam", corrected=True, decays=True, averages=True)


class Chunk(NamedTuple):
    """What the steps of one call are given, a leading axis of steps each."""

    count: Any  # the number of steps before
    indices: Any
    values: Any
    rate: Any


def chunk(start: int, steps: int, first: int, weights: np.ndarray) -> Chunk:
    """The steps from `start` on, of `steps` in all; the same in every run."""
    rng = np.random.default_rng(start)
    cumulated = np.cumsum(weights)
    draws = rng.random((CHUNK, READS)) * cumulated[-1]
    indices = np.searchsorted(cumulated, draws).astype(np.int32)
    values = rng.standard_normal((CHUNK, READS, COLUMNS), np.float32)
    values *= sizes(np.float32)[indices][..., None]
    t = start + np.arange(CHUNK)
    rate = PEAK * np.minimum(1, (t + 1) / 1000) * (1 + np.cos(math.pi * t / steps)) / 2
    count = np.minimum(first + t, 2**31 - 1).astype(np.int32)
    return Chunk(count, indices, values, rate.astype(np.float32))


def frequencies() -> np.ndarray:
    """How often a row is read, by Zipf's law: from every step to once in some thousands."""
    rng = np.random.default_rng(0)
    return rng.permutation((1.0 + np.arange(ROWS)) ** -1.5)


def sizes(real: Any) -> np.ndarray:
    """The size of each row's gradients."""
    return (10 ** np.random.default_rng(1).uniform(-3, 1, ROWS + 1)).astype(real)


# --- the runs -------------------------------------------------------------------------------------


@dataclass
class Run:
    """A way to train the table: a compiled chunk of steps, and how the weights are read."""

    carry: Any
    steps: Callable[[Any, Chunk], Any]
    read: Callable[[Any], dict[str, Any]]
    wide: bool = False
    seconds: float = 0.0

    def take(self, x: Chunk) -> None:
        def steps() -> None:
            with enable_x64(self.wide):
                self.carry = jax.block_until_ready(self.steps(self.carry, x))

        self.seconds += timed(steps)

    def weights(self) -> dict[str, np.ndarray]:
        with enable_x64(self.wide):
            return {k: np.asarray(x, np.float64) for k, x in self.read(self.carry).items()}


def start() -> np.ndarray:
    return (0.1 * np.random.default_rng(2).standard_normal((ROWS, COLUMNS))).astype(np.float32)


def ours(case: Case, history: int | None) -> Run:
    """Training by adamjax: exactly with a history, densely without one."""

    def transform(rate: Any) -> Any:
        dense = case.dense(rate)
        return dense if history is None else adamjax.exact_rows(dense, "table", history=history)

    def step(carry: Any, x: Chunk) -> tuple[Any, None]:
        params, state = carry
        rows: Any = adamjax.row_gradient(x.indices, x.values, ROWS)
        grads = {"table": rows.to_dense() if history is None else rows}
        updates, state = transform(x.rate).update(grads, state, params)
        return (adamjax.apply_updates(params, updates), state), None

    @jax.jit
    def read(carry: Any) -> dict[str, Any]:
        params, state = carry if history is None else transform(PEAK).flush(*carry)
        found = {"weights": params["table"]}
        if case.averages:
            found["average"] = adamjax.averaged_weights(state)["table"]
        return found

    def aged(x: Any) -> Any:
        is_count = x.dtype == jnp.int32 and x.ndim == 0
        return jnp.full_like(x, case.first) if is_count else x

    params = {"table": jnp.asarray(start())}
    state = jax.tree.map(aged, case.dense(PEAK).init(params))
    if history is not None:
        state = transform(PEAK).from_dense(state, params)
    steps = jax.jit(lambda carry, x: jax.lax.scan(step, carry, x)[0], donate_argnums=0)
    return Run((params, state), steps, read)


def recurrence(case: Case) -> Run:
    """The same in float64, from the papers: arXiv:1412.6980, 1904.09237, 1711.05101."""

    def step(carry: Any, x: Chunk) -> tuple[Any, None]:
        p, m, v, v_max, average = carry
        t = jnp.minimum(x.count.astype(jnp.float64) + 1, 2**31 - 1)
        g = jnp.zeros_like(p).at[x.indices].add(x.values.astype(jnp.float64))
        rate = x.rate.astype(jnp.float64)
        m = B1 * m + (1 - B1) * g
        first, second = 1 - B1**t, jnp.sqrt(1 - B2**t)
        if case.rule == "adamax":
            v = jnp.maximum(B2 * v, jnp.abs(g))
            u = m / first / (v + EPS)
        else:
            v = B2 * v + (1 - B2) * g * g
            v_max = jnp.maximum(v_max, v)
            root = jnp.sqrt(v_max if case.rule == "amsgrad" else v)
            u = m / first / (root / second + (EPS if case.corrected else EPS / second))
        p = p - rate * (u + DECAY * p * case.decays)
        average = MOMENTUM * average + (1 - MOMENTUM) * p
        return (p, m, v, v_max, average), None

    def read(carry: Any) -> dict[str, Any]:
        found = {"weights": carry[0]}
        return {**found, "average": carry[4]} if case.averages else found

    with enable_x64(True):
        p = jnp.asarray(start(), jnp.float64)
        carry = (p, *(jnp.zeros_like(p) for _ in range(3)), p + 0)
        steps = jax.jit(lambda carry, x: jax.lax.scan(step, carry, x)[0], donate_argnums=0)
    return Run(carry, steps, read, wide=True)


def shortest(case: Case) -> int:
    """The least history that the optimizer allows."""
    for history in (1 << n for n in range(20)):
        try:
            adamjax.exact_rows(case.dense(PEAK), "table", history=history)
        except ValueError:
            continue
        return history
    raise AssertionError("no history is enough")


def soaked(case: Case, steps: int, every: int, progress: Any) -> dict[str, Any]:
    """The mean errors of all runs of a case after every so many steps."""
    truth, short = recurrence(case), shortest(case)
    runs = {
        "dense": ours(case, None),
        "exact": ours(case, 65_536),
        "exact, shortest history": ours(case, short),
    }
    weights = frequencies()
    result: dict[str, Any] = {"shortest history": short, "steps": []}
    for begin in range(0, steps, CHUNK):
        x = chunk(begin, steps, case.first, weights)
        for run in (truth, *runs.values()):
            run.take(x)
        progress.update(CHUNK)
        if (begin + CHUNK) % every == 0:
            result["steps"].append(begin + CHUNK)
            expected = truth.weights()
            for name, run in runs.items():
                for part, found in run.weights().items():
                    errors = result.setdefault(part, {}).setdefault(name, {"mean": [], "max": []})
                    error = np.abs(found - expected[part])
                    errors["mean"].append(float(error.mean()))
                    errors["max"].append(float(error.max()))
    result["seconds"] = {name: round(run.seconds, 1) for name, run in runs.items()}
    return result


def tell(name: str, result: dict[str, Any]) -> None:
    """Prints a line for each part of a case; "at worst" is exact by dense, at any mark."""
    for part in ("weights", "average"):
        if part not in result:
            continue
        errors = {run: np.array(e["mean"]) for run, e in result[part].items()}
        dense, *exact = errors.values()
        ends = "  ".join(f"{e[-1]:9.2e}" for e in errors.values())
        worst = max(float((e / dense).max()) for e in exact)
        print(f"{name:24} {part:8} {ends}  {worst:9.2f}")


def main(argv: list[str]) -> int:
    """Runs the suite; see `--help`."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    parser = argparse.ArgumentParser(prog="python -m benchmarks soak", description=__doc__)
    parser.add_argument("--steps", type=int, default=100_000, help="of each run (default 100,000)")
    parser.add_argument("--quick", action="store_true", help="2,000 steps: does it run?")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args(argv)
    steps = 2000 if args.quick else args.steps
    every = 1000 if args.quick else 10_000
    if steps < every or steps % every:
        parser.error(f"--steps must be a multiple of {every}")

    end = min(steps, 10_000)
    plan = {name: (case, steps, every) for name, case in CASES.items()}
    crossing = replace(AT_THE_END, first=2**31 - 1 - end // 4)
    plan["over the end of int32"] = (crossing, end, 1000)
    results: dict[str, Any] = {
        "suite": "soak",
        "table": [ROWS, COLUMNS],
        "reads a step": READS,
        "learning rate": PEAK,
        "betas": [B1, B2],
        "eps": EPS,
        "weight decay": DECAY,
        "momentum of the average": MOMENTUM,
        "cases": {},
    }
    total = sum(n for _, n, _ in plan.values())
    with tqdm(total=total, unit="step", unit_scale=True, disable=None) as progress:
        for name, (case, n, mark) in plan.items():
            progress.set_description(name)
            results["cases"][name] = soaked(case, n, mark, progress)

    print(f"{'mean error at the end':33} {'dense':>9}  {'exact':>9}  {'short':>9}  {'at worst':>9}")
    for name, result in results["cases"].items():
        tell(name, result)
    results["environment"] = environment("adamjax", "jax", "jaxlib")
    out = args.out or RESULTS / results["environment"]["platform"] / "soak.json"
    if args.out or not args.quick:
        save(results, out)
        print(f"written to {out}")
    return 0
