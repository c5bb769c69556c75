"""The train steps of four whole models with tables: what they cost with row gradients and without.

Contenders take turns with jitted, donated train steps on the models of `networks`: with JAX's dense
gradients, in adamjax and in optax; with row gradients of the same loss, lazy and exact; and with
frozen tables, which shows the cost of the rest of the model. Two more comparisons: the time to
trace row gradients with that of `jax.value_and_grad`, and the lines and the compile time of a step
on 26 tables with those of a step on one.
"""

import gc
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax

import adamjax
from benchmarks import measure, steps
from benchmarks.compile import PARTS, compile_seconds
from benchmarks.networks import DLRM, Clicks, Params, Transformer, TwoTower
from benchmarks.steps import RATE, Runner, Step
from benchmarks.suite import Suite, progress, say_times
from benchmarks.workers import WorkerPool

# The second model has one of the first one's tables. Only its program is measured, not its steps.
MANY, ONE = "click, 26 tables", "click, one table"
MODELS: dict[str, Any] = {
    "DLRM": DLRM((1_000_000, 250_000, 100_000, 100_000, 50_000, 50_000, 50_000, 50_000)),
    "two towers": TwoTower(500_000, 300_000),
    "transformer": Transformer(),
    MANY: Clicks(),
}
QUICK: dict[str, Any] = {
    "DLRM": DLRM((3000, 2000, 1000, 1000, 500, 500, 500, 500), width=8, examples=64),
    "two towers": TwoTower(3000, 2000, width=16, examples=64),
    "transformer": Transformer(1000, width=16, length=16, examples=4),
    MANY: Clicks(3, rows=500, width=4, examples=64),
}

# name: its optimizer, and the gradients of the tables
CONTENDERS = {
    "optax": "optax.adamw, dense gradients",
    "dense": "adamw, dense gradients",
    "lazy": 'adamw(rows="lazy"), row gradients',
    "exact": "exact_rows(adamw), row gradients",
    "frozen": "adamw, frozen tables",
}
WITH_ROW_GRADIENTS = ("lazy", "exact")
DECAY = 1e-4

WARM = 24  # steps before any is timed: rows then lag behind by various numbers of steps
BATCHES, SAMPLE = 32, 0.5  # batches in rotation; seconds that a timed sample should last
COMPILATIONS = 2  # of a program in each sitting


def optimizer(name: str, model: Any) -> tuple[Any, Any]:
    """The optimizer of a contender of adamjax, and the tables with row gradients."""
    mode = name if name in WITH_ROW_GRADIENTS else "dense gradient"
    tx, tables = steps.table_mode(mode, model.tables, adamjax.adamw, weight_decay=DECAY)
    if name == "frozen":
        frozen = [(f"^{table}", adamjax.set_to_zero()) for table in model.tables]
        tx = adamjax.partition(frozen, default=tx)
    return tx, tables


def trainer(name: str, model: Any) -> Step:
    """A contender's train step `(params, state, batch) -> (params, state, loss)`."""
    if name == "optax":
        import optax

        adamw = optax.adamw(RATE, weight_decay=DECAY)
        return Step(adamw.init, steps.optax_train_step(model.loss, adamw))
    tx, tables = optimizer(name, model)
    return Step(tx.init, adamjax.train_step(model.loss, tx, tables=tables))


class Contender:
    """A contender's steps on one model at a time; lives in a worker process."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.run: Any = None

    def program(self, model: Any) -> dict[str, Any]:
        """The lines of a step's program, and the seconds of each of `PARTS` with empty caches.

        The compiler chooses the layout of the tables.
        """
        init, step = trainer(self.name, model)
        params = jax.eval_shape(model.init, jax.random.key(0))
        arguments = params, jax.eval_shape(init, params), model.batch(0)
        seconds, lowered = compile_seconds(jax.jit(step, donate_argnums=(0, 1)), *arguments)
        return {**seconds, "lines": len(lowered.as_text().splitlines())}

    def prepare(self, model: Any) -> dict[str, float]:
        """Compiles and warms up; returns the temporaries' bytes, the loss and the size."""
        self.run = None
        gc.collect()
        # JAX's default generator takes long to compile.
        params, tx = jax.jit(model.init)(jax.random.key(0, impl="rbg")), None
        if self.name in WITH_ROW_GRADIENTS:
            tables = {name: params[name] for name in model.tables}
            params |= jax.tree.map(adamjax.layout.row_major, tables)
            tx, _ = optimizer(self.name, model)
        self.run = Runner(trainer(self.name, model), params, tx, more_results=1)
        temporary_bytes = self.run.load([(jax.device_put(model.batch(i)),) for i in range(BATCHES)])
        self.run(WARM)
        (loss,) = self.run.results
        parameters = sum(x.size for x in jax.tree.leaves(params))
        return {"temporary_bytes": temporary_bytes, "loss": float(loss), "parameters": parameters}

    def sample(self) -> float:
        return measure.seconds_per_step(self.run, SAMPLE)


def measure_steps(
    model: Any, names: Sequence[str], args: Any, device: measure.Device
) -> dict[str, Any]:
    failed: dict[str, str] = {}
    rounds: list[dict[str, float]] = []
    for _ in range(args.sittings):
        with WorkerPool("models", names, device) as pool:
            prepared, samples = pool.measure(names, (model,), args.rounds)
            rounds += samples
            failed |= pool.failed
    measured = measure.names_in_every_round(rounds, names)
    # A contender's time divided by that of `exact`, and the time that the tables add to a step.
    ratio, tables_ms = {}, {}
    if "exact" in measured:
        ratio = {n: measure.spread([x[n] / x["exact"] for x in rounds]) for n in measured}
    if "frozen" in measured:
        others = [n for n in measured if n != "frozen"]
        added = [{n: x[n] - x["frozen"] for n in others} for x in rounds]
        tables_ms = measure.times(added, others)
    return {
        # Counted by the workers: JAX in this process would take the device from them.
        "parameters": max((x["parameters"] for x in prepared.values()), default=0),
        "ms": measure.times(rounds, measured),
        "ratio": ratio,
        "tables_ms": tables_ms,
        "temporary_bytes": {n: prepared[n]["temporary_bytes"] for n in measured},
        "loss": {n: prepared[n]["loss"] for n in measured},
        "failed": failed,
    }


def measure_programs(
    model: Clicks, names: Sequence[str], args: Any, device: measure.Device
) -> list[dict[str, Any]]:
    """The programs of a step on many tables and of a step on one.

    Contenders compile one after another, as a compilation uses all cores.
    """
    models = {MANY: model, ONE: replace(model, count=1)}
    programs_by_case: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for _ in range(args.sittings):
        with WorkerPool("models", names, device) as pool:
            for _, label, name in itertools.product(range(COMPILATIONS), models, names):
                answers = pool.ask(name, "program", models[label])
                programs_by_case.setdefault((label, name), []).extend(answers.values())
    rounds = COMPILATIONS * args.sittings
    return [
        {
            "model": label,
            "contender": name,
            "rounds": rounds,
            "lines": programs[0]["lines"],
            "s": measure.times(programs, PARTS, scale=1),
        }
        for (label, name), programs in programs_by_case.items()
        # A contender that failed in some round is left out.
        if len(programs) == rounds
    ]


def bounds(programs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    exact = {row["model"]: row for row in programs if row["contender"] == "exact"}
    lines = seconds = None
    if {MANY, ONE} <= exact.keys():
        lines = exact[MANY]["lines"] / exact[ONE]["lines"]
        seconds = exact[MANY]["s"]["compile"]["median"] / exact[ONE]["s"]["compile"]["median"]
    exact_step = "the exact step: 26 tables / one table"
    return [
        measure.bound(f"lines of StableHLO of {exact_step}", "at most", 4, lines),
        measure.bound(f"time to compile {exact_step}", "at most", 3, seconds),
    ]


def tracing_seconds(model: Any, name: str, cold: bool = False) -> float:
    """Seconds to trace value and gradient ("jax") or row gradient ("rows") of a model's loss.

    The loss is not in JAX's caches. If cold, they are empty, as in a new process; otherwise they
    have JAX's own functions.
    """
    params = jax.eval_shape(model.init, jax.random.key(0))
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.batch(0))

    def loss(params: Params, batch: Any) -> jax.Array:  # a new function, so it is not cached
        return model.loss(params, batch)

    if name == "jax":
        gradient = jax.value_and_grad(loss)
    else:
        gradient = adamjax.value_and_grad(loss, model.tables)
    if cold:
        jax.clear_caches()
    jitted = jax.jit(lambda params, batch: gradient(params, batch))
    gc.collect()
    return measure.timed(lambda: jitted.trace(params, batch))


def measure_tracing(models: Mapping[str, Any], rounds: int) -> list[dict[str, Any]]:
    """The times to trace row gradients and those of `jax.value_and_grad`, and their ratio."""
    table = []
    for (label, model), cold in itertools.product(models.items(), (False, True)):
        # The order alternates; the first two rounds are not counted.
        orders = itertools.islice(itertools.cycle((("jax", "rows"), ("rows", "jax"))), rounds + 2)
        seconds = [{name: tracing_seconds(model, name, cold) for name in order} for order in orders]
        row = {"model": label, "caches": "empty" if cold else "warm", "rounds": rounds}
        row["ms"] = measure.times(seconds[2:], ("jax", "rows"))
        table.append(row | {"ratio": measure.time_ratios(seconds[2:], "rows", ("jax",))["jax"]})
    return table


def main(argv: list[str]) -> int:
    packages, counts = ("adamjax", "jax", "jaxlib", "optax"), {"rounds": 8, "sittings": 3}
    modules = {name: "optax" if name == "optax" else "adamjax" for name in CONTENDERS}
    suite = Suite("models", __doc__, packages, counts, modules, only_chooses="models")
    args = suite.parse(argv)
    all_models = QUICK if args.quick else MODELS
    models = {label: all_models[label] for label in suite.chosen(all_models)}
    names = suite.chosen_contenders()
    device = measure.device(args.quick)
    suite.results["steps"] = rows = []
    for label in progress(models, "model"):
        rows.append({"model": label} | measure_steps(models[label], names, args, device))
        say_times(label, rows[-1]["ms"])
    programs = measure_programs(models[MANY], names, args, device) if MANY in models else []
    suite.results["programs"] = programs
    device.add_bandwidth(suite.results)
    suite.results["traces"] = measure_tracing(models, 2 if args.quick else max(7, args.rounds))
    suite.results["bounds"] = bounds(programs) if programs and not args.quick else []
    return suite.finish()
