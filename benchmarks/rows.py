"""The step of one table: exact, lazy and dense, compared with other packages.

Each contender takes its steps in a process of its own, in turn with the others. If not all tables
fit in memory at once, the contenders run one after another, and their n-th samples count as round
n. Steps rotate through 32 batches of indices, so that their rows are not in the cache, and lag
behind by various numbers of steps. The values of the gradient's rows are inputs; from them, the
step makes a dense gradient, a row gradient or torch's sparse gradient. The main cases (1M rows of
64) get more rounds, but those with many indices only a quarter of these. Their processes are
started anew several times, once a sitting, because times change by a tenth with the places of
arrays in memory. Each contender's fraction of the limit is the shortest time that the device's
bandwidth allows, divided by its own time: see `least_bytes`.
"""

import contextlib
import gc
import importlib
import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks import contenders, measure
from benchmarks.contenders import Case, JaxTable, TorchTable, short
from benchmarks.suite import Suite, progress, say, say_times
from benchmarks.workers import WorkerPool

PACKAGES = ("adamjax", "jax", "jaxlib", "optax", "keras", "torch")
SAMPLE = 0.1  # seconds that a timed sample should last


def _cases(rows: Sequence[int], widths: Sequence[int], reads: Sequence[int]) -> list[Case]:
    return [Case(*case) for case in itertools.product(rows, widths, reads, ("Zipf", "uniform"))]


GRID = _cases((100_000, 1_000_000, 4_000_000), (32, 64, 128), (1024, 8192, 65_536))
# Only on an accelerator: a table takes 5 GB, and as much for each moment.
LARGE = _cases((10_000_000,), (128,), (8192, 65_536))
MAIN = _cases((1_000_000,), (64,), (8192, 65_536, 262_144))
QUICK = _cases((1000, 4000), (8,), (64,))
QUICK_MAIN = _cases((4000,), (8,), (64,))
# The largest number of indices of a main case that gets all rounds.
MAIN_READS = 8192
# The sizes of two tables on which exact takes steps in turn.
GROWTH = {short(rows): rows for rows in (GRID[0].rows, GRID[-1].rows)}


def main_rounds(case: Case, rounds: int) -> int:
    """The rounds of a main case in a sitting: a step on many rows takes long."""
    return rounds if case.reads <= MAIN_READS else max(2, rounds // 4)


def _memory(path: str, field: str) -> int | None:
    """Bytes that Linux reports: `VmRSS` of a process, `MemAvailable` of the machine."""
    with contextlib.suppress(OSError):
        for line in Path(path).read_text().splitlines():
            if line.startswith(field):
                return 1024 * int(line.split()[1])
    return None


def _resident(field: str) -> int:
    """The resident bytes of this process: now (`VmRSS`), or at their peak (`VmHWM`)."""
    return _memory("/proc/self/status", field) or 0


class Contender:
    """A contender's table, for one case at a time; lives in a worker process."""

    def __init__(self, name: str) -> None:
        self.name, self.shape = name, (0, 0)
        # Libraries are loaded before the resident bytes are counted.
        importlib.import_module(contenders.ALL_CONTENDERS[name][0])
        self.kind: Any = TorchTable
        if not name.startswith("torch"):
            jax.numpy.zeros(1000).block_until_ready()
            self.kind = JaxTable

    def drop(self) -> None:
        self.table: Any = None
        self.shape = (0, 0)
        gc.collect()

    def prepare(self, case: Case) -> dict[str, Any]:
        """Loads a case's batches, compiles, warms up; returns its memory and its distinct rows."""
        if self.shape != (case.rows, case.width):
            self.drop()
            # The bytes that are not the contender's own: libraries, batches and compiled steps.
            self.uncounted = _resident("VmRSS")
            self.table, self.shape = self.kind(self.name, case), (case.rows, case.width)
        indices, values = contenders.batches(case)
        before = _resident("VmRSS")
        temporary = self.table.load(indices, values)
        self.uncounted += _resident("VmRSS") - before
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        self.table.run(contenders.ALL_CONTENDERS[self.name][1])
        return {
            "temporary_bytes": temporary,
            # An accelerator has the table in its own memory.
            "peak_bytes": _resident("VmHWM") - self.uncounted if self.table.on_cpu else None,
            "distinct": statistics.mean(len(np.unique(x)) for x in indices[:4]),
        }

    def sample(self) -> float:
        return measure.seconds_per_step(self.table.run, SAMPLE)


def fits(pool: WorkerPool, cases: Sequence[Case]) -> bool:
    """Whether the arrays of all contenders and the temporaries of one fit in memory at once.

    The arrays are a table, its moments and the batches of the largest case. Temporaries are at most
    as large as a table and its moments.
    """
    free = pool.device.memory or _memory("/proc/meminfo", "MemAvailable") or math.inf
    case = max(cases, key=contenders.batch_bytes)
    tables = 3 * len(pool.names) + 3
    # A TPU pads rows to 128 elements; each process on a GPU needs about 0.6 GB of its own.
    width = max(case.width, 128) if pool.device.platform == "tpu" else case.width
    each = contenders.batch_bytes(case) + (6e8 if pool.device.platform == "gpu" else 0)
    return tables * case.rows * width * 4 + each * len(pool.names) < 0.8 * free


def take_samples(pool: WorkerPool, rounds: dict[Case, int]) -> dict[Case, dict[str, Any]]:
    """For each case of one table: the samples of its rounds, and the answers of `prepare`."""
    in_turn = fits(pool, list(rounds))
    by_case: dict[Case, dict[str, Any]] = {
        case: {"in_turn": in_turn, "samples": [{} for _ in range(n)], "prepared": {}, "failed": {}}
        for case, n in rounds.items()
    }
    for names in [pool.names] if in_turn else [[name] for name in pool.names]:
        for case, record in by_case.items():
            prepared, samples = pool.measure(names, (case,), rounds[case])
            record["prepared"] |= prepared
            record["failed"] |= pool.failed
            for collected, new in zip(record["samples"], samples, strict=True):
                collected |= new
        for name in names:
            pool.ask(name, "drop")
    pool.failed = {}  # New processes may try the next table.
    return by_case


def summary(case: Case, sittings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The figures of a case, from the record of `take_samples` in each sitting."""
    samples = [x for record in sittings for x in record["samples"]]
    prepared = sittings[0]["prepared"]
    names = measure.names_in_every_round(samples, list(contenders.ALL_CONTENDERS))
    own = [name for name in names if name in contenders.OURS and name != "lazy step"]
    return {
        "case": case.name,
        **vars(case),
        "distinct": round(max((x["distinct"] for x in prepared.values()), default=0)),
        "in_turn": sittings[0]["in_turn"],
        "rounds": len(samples),
        "ms": measure.times(samples, names),
        "ratio": {name: measure.time_ratios(samples, name, names) for name in own},
        "temporary_bytes": {name: x["temporary_bytes"] for name, x in prepared.items()},
        "peak_bytes": {name: x["peak_bytes"] for name, x in prepared.items()},
        "failed": {name: why for record in sittings for name, why in record["failed"].items()},
    }


def measure_cases(
    rounds: dict[Case, int], names: Sequence[str], sittings: int, device: measure.Device
) -> list[dict[str, Any]]:
    """The figures of cases. Each sitting measures all of them in new processes."""
    records: dict[Case, list[dict[str, Any]]] = {case: [] for case in rounds}
    tables: dict[Any, dict[Case, int]] = {}
    for case, count in rounds.items():
        # Each main case is separate: large batches need more memory, so fewer contenders may fit.
        table = case.rows, case.width, case in MAIN and case.reads
        tables.setdefault(table, {})[case] = count
    for _ in range(sittings if rounds else 0):
        with WorkerPool("rows", names, device) as pool:
            for cases in progress(tables.values(), "table"):
                for case, record in take_samples(pool, cases).items():
                    records[case].append(record)
                    say_times(case.name, summary(case, records[case])["ms"])
    return [summary(case, record) for case, record in records.items()]


def measure_growth(sittings: int, rounds: int, device: measure.Device) -> list[dict[str, Any]]:
    """The time of exact's steps on a small and a large table, in turn, and their ratio."""
    cases = [case for case in MAIN if case.reads == MAIN_READS]
    samples: dict[str, list[dict[str, float]]] = {case.indices: [] for case in cases}
    for _ in range(sittings):
        with WorkerPool("rows", dict.fromkeys(GROWTH, "exact"), device) as pool:
            for case in cases:
                for size, rows in GROWTH.items():
                    pool.ask(size, "prepare", replace(case, rows=rows))
                turns = (pool.in_turn(pool.names, number) for number in range(rounds))
                samples[case.indices] += turns
    growth, (small, large) = [], GROWTH
    for indices, all_rounds in samples.items():
        # If one of the two processes ended, there is no ratio.
        if len(measure.names_in_every_round(all_rounds, GROWTH)) == len(GROWTH):
            row = {"indices": indices, "reads": MAIN_READS, "contender": "exact"}
            row["ms"] = measure.times(all_rounds, (small, large))
            growth.append(row | {"ratio": measure.time_ratios(all_rounds, large, (small,))[small]})
    return growth


def bounds(
    times: Sequence[dict[str, Any]], growth: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The bounds on the main cases, with 8,192 indices unless a bound names another number."""
    rows = {row["case"]: row for row in times}
    main_rows = {(case.reads, case.indices): rows.get(case.name) for case in MAIN}
    grown = {(row["contender"], row["indices"]): row["ratio"]["median"] for row in growth}

    def ratio(one: str, other: str, indices: str, reads: int = MAIN_READS) -> float | None:
        """The time of one divided by that of the other; one of them must be ours."""
        ratios = (main_rows[reads, indices] or {"ratio": {}})["ratio"]
        if other in ratios.get(one, {}):
            return ratios[one][other]["median"]
        return 1 / ratios[other][one]["median"] if one in ratios.get(other, {}) else None

    def temporaries(*names: str, reads: int = MAIN_READS) -> float | None:
        matching = [row for (count, _), row in main_rows.items() if row and count == reads]
        sizes = [row["temporary_bytes"].get(name) for row in matching for name in names]
        return max((x for x in sizes if x is not None), default=0) / 1e6 or None

    asked: list[tuple[str, str, float, float | None]] = []
    kinds = list(dict.fromkeys(case.indices for case in MAIN))
    for kind in kinds:
        train_steps = ratio("exact step", "lazy step", kind)
        growth_ratio = grown.get(("exact", kind))
        asked += [
            (f"time: optax / exact, {kind}", "at least", 30, ratio("optax", "exact", kind)),
            (f"time: exact / lazy, {kind}", "at most", 1.25, ratio("exact", "lazy", kind)),
            (f"time of a train step: exact / lazy, {kind}", "at most", 1.4, train_steps),
            (f"time: dense / optax, {kind}", "at most", 0.9, ratio("dense", "optax", kind)),
            (f"time of exact: 4M rows / 100k rows, {kind}", "at most", 2, growth_ratio),
        ]
    sparse, name, many = "torch sparse", "torch SparseAdam", 65_536
    step = temporaries("exact", "lazy", "dense")
    asked += [
        (f"time: {name} / exact, uniform", "at least", 1.3, ratio(sparse, "exact", "uniform")),
        (f"time: lazy / {name}, uniform", "at most", 1, ratio("lazy", sparse, "uniform")),
        ("temporaries of an optimizer step, MB", "at most", 20, step),
        ("temporaries of the whole exact step, MB", "at most", 20, temporaries("exact step")),
    ]
    for kind in kinds:
        what = f"time: exact / {name}, {many:,} indices, {kind}"
        asked.append((what, "at most", 0.8, ratio("exact", sparse, kind, many)))
    for own in ("exact", "lazy"):
        what = f"temporaries of {own}, {many:,} indices, MB"
        asked.append((what, "at most", 26, temporaries(own, reads=many)))
    return [measure.bound(*bound) for bound in asked]


def main(argv: list[str]) -> int:
    counts = {"rounds": 8, "sittings": 4, "grid_rounds": 3}
    modules = {name: package for name, (package, _) in contenders.ALL_CONTENDERS.items()}
    suite = Suite("rows", __doc__, PACKAGES, counts, modules, only_chooses="cases, and 'growth',")
    args = suite.parse(argv)
    device = measure.device(args.quick)
    main_cases, grid = (QUICK_MAIN, QUICK) if args.quick else (MAIN, GRID)
    grid = grid + (LARGE if device.platform != "cpu" and not args.quick else [])
    growth = [] if args.quick else ["growth"]
    chosen = suite.chosen([*(case.name for case in main_cases + grid), *growth])
    main_cases = [case for case in main_cases if case.name in chosen]
    grid = [case for case in grid if case.name in chosen and case not in main_cases]
    names = suite.chosen_contenders()
    for name in [name for name in names if name.startswith("torch") and not device.torch]:
        say(f"{name}: left out, torch does not run on this {device.platform}")
        names.remove(name)

    rounds = {case: main_rounds(case, args.rounds) for case in main_cases}
    times = measure_cases(rounds, names, args.sittings, device)
    in_grid = [name for name in names if name not in contenders.WHOLE_STEPS]
    times += measure_cases(dict.fromkeys(grid, args.grid_rounds), in_grid, 1, device)
    grown = []
    if "growth" in chosen and "exact" in names:
        grown = measure_growth(args.sittings, args.rounds, device)
    times.sort(key=lambda row: (row["rows"], row["width"], row["reads"], row["indices"]))
    suite.results |= {"times": times, "growth": grown}
    suite.results["bounds"] = [] if args.quick else bounds(times, grown)
    device.add_bandwidth(suite.results)
    for row in times:
        case = Case(*(row[name] for name in ("rows", "width", "reads", "indices")))
        row |= {"least_bytes": {}, "fraction": {}}
        for name, ms in row["ms"].items():
            least = round(contenders.least_bytes(name, case, row["distinct"]))
            row["least_bytes"][name] = least
            row["fraction"][name] = measure.fraction_of_limit(least, ms, suite.results["bandwidth"])
    return suite.finish()
