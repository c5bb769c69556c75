"""Does anything drift? A table trained for 100,000 steps, exactly and densely, against float64.

Rows are read as in language: a few in every step, most hardly ever. Gradients are noise, so nothing
pulls back a table that has drifted. It is trained by the dense optimizer in float32 and by
`exact_rows`, with the longest history that it uses by default and with the shortest that the
optimizer allows. All are compared with the recurrence in float64, which is written here from the
papers. The rate is an input of each step: a warm-up, then a cosine. In one more run the step count
crosses the end of int32.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import adamjax
from adamjax._compat import x64 as enable_x64
from benchmarks.measure import timed
from benchmarks.suite import Suite, progress
from benchmarks.tables import markdown

ROWS, COLUMNS, READS = 2000, 8, 64
CHUNK = 1000  # steps of one call
LONGEST_HISTORY = 65_536  # the longest that `exact_rows` uses by default
PEAK = 3e-3
B1, B2, EPS, DECAY, MOMENTUM = 0.9, 0.999, 1e-7, 0.01, 0.999


@dataclass(frozen=True)
class Case:
    rule: str  # "adam", "amsgrad" or "adamax"
    corrected: bool = False  # whether eps is added to the corrected root, as in algorithm 1
    decays: bool = False  # whether there is decoupled weight decay
    averages: bool = False  # whether there is an average of the weights
    steps_before: int = 0  # the count at which the run begins
    moments: str | None = None  # their format, a rule's `m_dtype` and `v_dtype`

    def dense(self, rate: Any) -> adamjax.Transform:
        eps_name = "eps" if self.corrected or self.rule == "adamax" else "eps_hat"
        formats = {"m_dtype": self.moments, "v_dtype": self.moments} if self.moments else {}
        return adamjax.chain(
            getattr(adamjax, f"scale_by_{self.rule}")(B1, B2, **{eps_name: EPS}, **formats),
            *([adamjax.add_decayed_weights(DECAY)] if self.decays else []),
            adamjax.scale_by_learning_rate(rate),
            *([adamjax.weight_ema(MOMENTUM)] if self.averages else []),
        )


FULL = Case("adam", corrected=True, decays=True, averages=True)
CASES = {
    "Adam": Case("adam"),
    "AMSGrad": Case("amsgrad"),
    "AdamW + average": FULL,
    "Adamax": Case("adamax"),
    "Adam, bfloat16 moments": Case("adam", moments="bfloat16"),
    "Adam, 8-bit moments": Case("adam", moments="scaled8"),
}


class Chunk(NamedTuple):
    """The inputs of the steps of one call: arrays with a leading axis of steps."""

    count: Any  # the number of earlier steps
    indices: Any
    values: Any
    rate: Any


def chunk(start: int, steps: int, steps_before: int) -> Chunk:
    """The inputs of `CHUNK` steps from `start` on, of `steps` in all; the same in every run."""
    rng = np.random.default_rng(start)
    # By Zipf's law: a row is read in every step, or once in some thousands.
    weights = np.random.default_rng(0).permutation((1.0 + np.arange(ROWS)) ** -1.5)
    cumulated = np.cumsum(weights)
    draws = rng.random((CHUNK, READS)) * cumulated[-1]
    indices = np.searchsorted(cumulated, draws).astype(np.int32)
    # Each row has gradients of its own magnitude.
    sizes = (10 ** np.random.default_rng(1).uniform(-3, 1, ROWS)).astype(np.float32)
    values = rng.standard_normal((CHUNK, READS, COLUMNS), np.float32) * sizes[indices][..., None]
    t = start + np.arange(CHUNK)
    rate = PEAK * np.minimum(1, (t + 1) / 1000) * (1 + np.cos(math.pi * t / steps)) / 2
    count = np.minimum(steps_before + t, 2**31 - 1).astype(np.int32)
    return Chunk(count, indices, values, rate.astype(np.float32))


def start_table() -> np.ndarray:
    return (0.1 * np.random.default_rng(2).standard_normal((ROWS, COLUMNS))).astype(np.float32)


@dataclass
class Run:
    """One training of the table."""

    carry: Any
    step: Callable[[Any, Chunk], Any]  # for `scan`
    read: Callable[[Any], dict[str, Any]]  # a carry's weights, and their average
    x64: bool = False
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.steps = jax.jit(
            lambda carry, x: jax.lax.scan(self.step, carry, x)[0], donate_argnums=0
        )

    def advance(self, x: Chunk) -> None:
        def steps() -> None:
            with enable_x64(self.x64):
                self.carry = jax.block_until_ready(self.steps(self.carry, x))

        self.seconds += timed(steps)

    def weights(self) -> dict[str, np.ndarray]:
        with enable_x64(self.x64):
            return {k: np.asarray(x, np.float64) for k, x in self.read(self.carry).items()}


def adamjax_run(case: Case, history: int | None) -> Run:
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
        average = {"average": adamjax.averaged_weights(state)["table"]} if case.averages else {}
        return {"weights": params["table"], **average}

    def aged(x: Any) -> Any:
        """A count of the state after `steps_before` steps; other arrays stay as they are."""
        is_count = x.dtype == jnp.int32 and x.ndim == 0
        return jnp.full_like(x, case.steps_before) if is_count else x

    params = {"table": jnp.asarray(start_table())}
    state = jax.tree.map(aged, case.dense(PEAK).init(params))
    if history is not None:
        state = transform(PEAK).from_dense(state, params)
    return Run((params, state), step, read)


def float64_run(case: Case) -> Run:
    """Training in float64, from the papers: arXiv:1412.6980, 1904.09237, 1711.05101."""

    def step(carry: Any, x: Chunk) -> tuple[Any, None]:
        p, m, v, v_max, average = carry
        t = jnp.minimum(x.count.astype(jnp.float64) + 1, 2**31 - 1)
        g = jnp.zeros_like(p).at[x.indices].add(x.values.astype(jnp.float64))
        rate = x.rate.astype(jnp.float64)
        m = B1 * m + (1 - B1) * g
        m_correction, root_correction = 1 - B1**t, jnp.sqrt(1 - B2**t)
        if case.rule == "adamax":
            v = jnp.maximum(B2 * v, jnp.abs(g))
            u = m / m_correction / (v + EPS)
        else:
            v = B2 * v + (1 - B2) * g * g
            v_max = jnp.maximum(v_max, v)
            root = jnp.sqrt(v_max if case.rule == "amsgrad" else v)
            eps = EPS if case.corrected else EPS / root_correction
            u = m / m_correction / (root / root_correction + eps)
        p = p - rate * (u + DECAY * p * case.decays)
        average = MOMENTUM * average + (1 - MOMENTUM) * p
        return (p, m, v, v_max, average), None

    def read(carry: Any) -> dict[str, Any]:
        return {"weights": carry[0], **({"average": carry[4]} if case.averages else {})}

    with enable_x64(True):
        p = jnp.asarray(start_table(), jnp.float64)
        # The carry is donated, so the average needs a buffer of its own.
        carry = (p, *(jnp.zeros_like(p) for _ in range(3)), jnp.copy(p))
    return Run(carry, step, read, x64=True)


def shortest_history(case: Case) -> int:
    for history in (1 << n for n in range(20)):
        with contextlib.suppress(ValueError):
            adamjax.exact_rows(case.dense(PEAK), "table", history=history)
            return history
    raise AssertionError("no history is long enough")


def measure(case: Case, steps: int, interval: int) -> dict[str, Any]:
    """The mean and largest errors of all runs of a case, every `interval` steps."""
    truth, short = float64_run(case), shortest_history(case)
    runs = {
        "dense": adamjax_run(case, None),
        "exact": adamjax_run(case, LONGEST_HISTORY),
        "exact, shortest history": adamjax_run(case, short),
    }
    result: dict[str, Any] = {"shortest history": short, "steps": []}
    for done in progress(range(0, steps, CHUNK), f"{CHUNK} steps"):
        x = chunk(done, steps, case.steps_before)
        for run in (truth, *runs.values()):
            run.advance(x)
        if (done + CHUNK) % interval:
            continue
        result["steps"].append(done + CHUNK)
        expected = truth.weights()
        for name, run in runs.items():
            for part, weights in run.weights().items():
                errors = result.setdefault(part, {}).setdefault(name, {"mean": [], "max": []})
                error = np.abs(weights - expected[part])
                errors["mean"].append(float(error.mean()))
                errors["max"].append(float(error.max()))
    result["seconds"] = {name: round(run.seconds, 1) for name, run in runs.items()}
    return result


def summary(cases: dict[str, dict[str, Any]]) -> str:
    """A table of the errors at the end.

    Its last column is the largest ratio of an error of `exact_rows`, with either history and at any
    step at which errors were measured, to that of the dense optimizer.
    """
    rows = []
    for name, result in cases.items():
        for part in [part for part in ("weights", "average") if part in result]:
            dense, *exact = (np.array(errors["mean"]) for errors in result[part].values())
            worst = max(float((errors / dense).max()) for errors in exact)
            ends = [f"{errors[-1]:.2e}" for errors in (dense, *exact)]
            rows.append([name, part, *ends, f"{worst:.2f}"])
    return markdown(["mean error at the end", "of", "dense", "exact", "short", "at worst"], rows)


def main(argv: list[str]) -> int:
    suite = Suite("soak", __doc__, ("adamjax", "jax", "jaxlib"))
    args = suite.parse(argv)
    steps, interval = (2000, 1000) if args.quick else (100_000, 10_000)
    end = min(steps, 10_000)
    plan = {name: (case, steps, interval) for name, case in CASES.items()}
    plan["over the end of int32"] = (replace(FULL, steps_before=2**31 - 1 - end // 4), end, 1000)
    suite.results |= {
        "table": [ROWS, COLUMNS],
        "reads a step": READS,
        "learning rate": PEAK,
        "betas": [B1, B2],
        "eps": EPS,
        "weight decay": DECAY,
        "momentum of the average": MOMENTUM,
    }
    suite.results["cases"] = cases = {name: measure(*settings) for name, settings in plan.items()}
    print(summary(cases))
    return suite.finish()
