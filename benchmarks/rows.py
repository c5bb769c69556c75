"""One table's step by the rows it read: exact, lazy and dense, against those who do the like.

Each contender takes its steps in a process of its own, in turn with the others. A sample is the
mean of a few steps after one that is not timed; a ratio is taken within a round, from samples
that lie next to each other in time, and who goes first changes from round to round. Where all
tables do not fit in memory at once, the contenders come one after another instead, and a round is
what has the same number with each. The main cases (1M rows of 64, 8,192 indices and more) get more
rounds, those with the most indices a quarter of them, and their processes are started anew several
times: where arrays come to lie in memory moves a step's time by a tenth.

Each time is also given as a fraction of the limit that the device's bandwidth sets, measured before
and after: the least bytes that the step must move (`contenders.least_bytes`), over the bytes a
second. Where only one process at a time can use the device, as a TPU, all contenders share one.

Every step gets other indices, 32 batches in rotation, so that its rows are not in the cache and
lag behind by various numbers of steps. The dense gradient, the row gradient and torch's sorting of
its sparse gradient are part of the step; the gradient's rows are given.
"""

import argparse
import contextlib
import gc
import importlib
import itertools
import json
import math
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import (
    EVERYONE,
    FEW,
    OURS,
    WHOLE,
    Case,
    JaxTable,
    TorchTable,
    batch_bytes,
    batches,
    least_bytes,
    short,
)
from benchmarks.measure import (
    RESULTS,
    Device,
    bound,
    device,
    environment,
    fraction,
    installed,
    progress,
    rounded,
    save,
    say,
    tell_bounds,
    timed,
)
from benchmarks.workers import SHARED, Team, serve, shared

__all__ = ["main", "plot"]

# The seconds that a timed sample should last, and the most steps in it.
SAMPLE, MOST = 0.1, 50


def _cases(rows: Sequence[int], widths: Sequence[int], reads: Sequence[int]) -> list[Case]:
    return [Case(*case) for case in itertools.product(rows, widths, reads, ("Zipf", "uniform"))]


GRID = _cases((100_000, 1_000_000, 4_000_000), (32, 64, 128), (1024, 8192, 65_536))
# On an accelerator as well: 5 GB, and as much for each moment.
LARGE = _cases((10_000_000,), (128,), (8192, 65_536))
MAIN = _cases((1_000_000,), (64,), (8192, 65_536, 262_144))
QUICK = _cases((1000, 4000), (8,), (64,))
QUICK_MAIN = _cases((4000,), (8,), (64,))
# The most indices of a main case that gets all its rounds.
FULL = 8192


def main_rounds(case: Case, rounds: int) -> int:
    """The rounds of a main case in a sitting: a step on many rows takes long."""
    return rounds if case.reads <= FULL else max(2, rounds // 4)


# --- a contender in its process -------------------------------------------------------------------


def _resident(what: str) -> int:
    """Bytes that are resident (`VmRSS`), or were at most (`VmHWM`); 0 where nobody counts."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(what)), 0)


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


class Serving:
    """Answers questions: makes a table, takes up a case, takes samples."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.table: Any = None
        self.base = 0

    def __call__(self, question: list[Any]) -> Any:
        kind, *about = question
        if kind == "table":
            return self.make(*about)
        return self.take_up(*about) if kind == "case" else self.sample()

    def make(self, *about: Any) -> None:
        """A new table in place of the one before, or none."""
        self.table = None
        gc.collect()
        if about:
            # Libraries are loaded before what is resident counts.
            importlib.import_module(EVERYONE[self.name][0])
            kind: Any = TorchTable
            if not self.name.startswith("torch"):
                import jax

                jax.numpy.zeros(1000).block_until_ready()
                kind = JaxTable
            self.base = _resident("VmRSS")
            self.table = kind(self.name, Case(*about))

    def take_up(self, *about: Any) -> dict[str, Any]:
        """Loads, compiles and warms up; answers with what the memory was."""
        case = Case(*about)
        indices, values = batches(case)
        before = _resident("VmRSS")
        temporary = self.table.load(case, indices, values)
        self.base += _resident("VmRSS") - before
        _forget_peak()
        self.table.run(EVERYONE[self.name][1])
        peak = _resident("VmHWM") - self.base
        return {
            "temporary_bytes": temporary,
            # Elsewhere the table is not in this memory.
            "peak_bytes": peak if self.table.on_cpu else None,
            "distinct": statistics.mean(len(np.unique(x)) for x in indices[:4]),
        }

    def sample(self) -> float:
        """Seconds a step."""
        once = timed(lambda: self.table.run(1))
        steps = max(1, min(MOST, round(SAMPLE / once)))
        return timed(lambda: self.table.run(steps)) / steps


# --- measuring ------------------------------------------------------------------------------------


@dataclass
class Taken:
    """What was taken in a case: seconds a step of each contender, round by round, and the rest."""

    case: Case
    together: bool
    rounds: list[dict[str, float]]
    about: dict[str, dict[str, Any]]
    failed: dict[str, str]

    def __add__(self, later: "Taken") -> "Taken":
        """The same case with the rounds of another sitting."""
        rounds, failed = self.rounds + later.rounds, self.failed | later.failed
        return replace(self, rounds=rounds, failed=failed)

    def row(self) -> dict[str, Any]:
        """As it goes into the results."""
        names = [n for n in EVERYONE if all(n in taken for taken in self.rounds)]
        ours = [n for n in names if n in OURS and n != "lazy step"]
        return {
            "case": self.case.name,
            **vars(self.case),
            "distinct": round(max((x["distinct"] for x in self.about.values()), default=0)),
            "in_turn": self.together,
            "rounds": len(self.rounds),
            "ms": {n: rounded([1e3 * t[n] for t in self.rounds]) for n in names},
            "ratio": {
                own: {n: rounded([t[own] / t[n] for t in self.rounds]) for n in names if n != own}
                for own in ours
            },
            "temporary_bytes": {n: x["temporary_bytes"] for n, x in self.about.items()},
            "peak_bytes": {n: x["peak_bytes"] for n, x in self.about.items()},
            "failed": self.failed,
        }


def _free_bytes(device: Device) -> float:
    """Bytes of memory that are free for tables, or infinity where nobody counts."""
    if device.memory is not None:
        return device.memory
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return math.inf
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvail"))


def _fit(team: Team, cases: Sequence[Case]) -> bool:
    """Whether what all contenders hold fits in memory, and one's temporaries.

    That is a table with its moments, the same for all cases, and the batches of the largest.
    """
    case = max(cases, key=batch_bytes)
    tables = 3 * len(team.names) + 3
    # A TPU pads rows to 128 elements; each process that uses a GPU takes some of its memory.
    width = max(case.width, 128) if team.device.platform == "tpu" else case.width
    taken = 6e8 * len(team.names) if team.device.platform == "gpu" else 0
    taken += batch_bytes(case) * len(team.names)
    return tables * case.rows * width * 4 + taken < 0.8 * _free_bytes(team.device)


def measure(team: Team, rounds: dict[Case, int]) -> Iterator[Taken]:
    """Samples of cases with one table: of all contenders in turn, or of one after another.

    Args:
      team: the contenders.
      rounds: how many of each case.
    """
    together = _fit(team, list(rounds))
    found = {
        case: Taken(case, together, [{} for _ in range(count)], {}, {})
        for case, count in rounds.items()
    }
    for names in [team.names] if together else [[name] for name in team.names]:
        team.ask(names, ["table", *vars(next(iter(found))).values()])
        for case, taken in found.items():
            question = ["case", *vars(case).values()]
            heavy = [name for name in names if EVERYONE[name][1] == FEW]
            taken.about |= team.ask([name for name in names if name not in heavy], question)
            for name in heavy:  # their temporaries are as large as the table
                taken.about |= team.ask([name], question)
            for number, samples in enumerate(taken.rounds):
                samples |= team.in_turn(names, number)
            taken.failed |= team.failed
        team.ask(names, ["table"])
    team.failed = {}  # New processes may try the next table.
    yield from found.values()


# The sizes of two tables, and who takes steps on both in turn.
GROWTH = {short(rows): rows for rows in (GRID[0].rows, GRID[-1].rows)}
GROWERS = ("exact", "lazy", "torch sparse")


def measure_growth(
    names: Sequence[str], sittings: int, rounds: int, device: Device, bar: Any
) -> list[dict[str, Any]]:
    """Samples of steps on a small and a large table, in turn, and the second's time by the first's.

    The indices are as many as in the first main cases.
    """
    kept = [name for name in GROWERS if name in names]
    cases = [case for case in MAIN if case.reads == FULL]
    players = {f"{name}, {size}": (name, size) for name in kept for size in GROWTH}
    contenders = {player: name for player, (name, _) in players.items()}
    taken: dict[str, list[dict[str, float]]] = {case.indices: [] for case in cases}
    for _ in range(sittings):
        with Team("rows", contenders, device, bar) as team:
            for kind, case in [("table", cases[0]), *(("case", case) for case in cases)]:
                for player, (_, size) in players.items():
                    own = replace(case, rows=GROWTH[size])
                    team.ask([player], [kind, *vars(own).values()])
                if kind == "case":
                    turns = (team.in_turn(list(players), number) for number in range(rounds))
                    taken[case.indices] += turns
    found = []
    for indices, name in itertools.product(taken, kept):
        both = [[turn.get(f"{name}, {size}") for size in GROWTH] for turn in taken[indices]]
        if any(None in times for times in both):
            continue  # it ended
        row = {"indices": indices, "reads": FULL, "contender": name}
        row["ms"] = {
            size: rounded([1e3 * x for x in times])
            for size, times in zip(GROWTH, zip(*both, strict=True), strict=True)
        }
        found.append(row | {"ratio": rounded([after / before for before, after in both])})
    return found


def _shown(row: dict[str, Any], began: float) -> None:
    times = ", ".join(f"{n} {ms['median']:.1f}" for n, ms in row["ms"].items())
    minutes, seconds = divmod(int(time.perf_counter() - began), 60)
    say(f"{minutes:3}:{seconds:02}  {row['case']:25} ms: {times}")
    for name, why in row["failed"].items():
        say(f"        {name}: {why}")


def _in_grid(names: Sequence[str]) -> list[str]:
    return [name for name in names if name not in WHOLE]


def _samples(
    main_cases: Sequence[Case], grid: Sequence[Case], names: Sequence[str], grows: bool, args: Any
) -> int:
    """How many samples there will be, if nobody ends before."""
    count = len(names) * sum(main_rounds(case, args.rounds) for case in main_cases)
    if grows:
        kinds = len({case.indices for case in MAIN})
        count += args.rounds * kinds * len(GROWTH) * sum(name in names for name in GROWERS)
    return args.sittings * count + args.grid_rounds * len(grid) * len(_in_grid(names))


def _add_limits(results: dict[str, Any]) -> None:
    """Puts the fraction of the bandwidth's limit to the times."""
    for row in results["times"]:
        case = Case(*(row[name] for name in ("rows", "width", "reads", "indices")))
        row["least_bytes"] = {n: round(least_bytes(n, case, row["distinct"])) for n in row["ms"]}
        row["fraction"] = {
            name: fraction(row["least_bytes"][name], ms, results["bandwidth"])
            for name, ms in row["ms"].items()
        }


def run(
    main_cases: Sequence[Case],
    grid: Sequence[Case],
    names: Sequence[str],
    args: Any,
    device: Device,
    bar: Any,
) -> list[dict[str, Any]]:
    """The results of all cases; the main ones take their rounds in several sittings."""
    began, table = time.perf_counter(), []
    sittings: list[list[Taken]] = []
    for _ in range(args.sittings if main_cases else 0):
        with Team("rows", names, device, bar) as team:
            taken: list[Taken] = []
            # Large batches need more memory, so that they may not be taken in turn.
            for _, cases in itertools.groupby(main_cases, lambda case: case.reads):
                taken += measure(team, {case: main_rounds(case, args.rounds) for case in cases})
            sittings.append(taken)
    for takens in zip(*sittings, strict=True):
        table.append(sum(takens[1:], takens[0]).row())
        _shown(table[-1], began)
    with Team("rows", _in_grid(names), device, bar) as team:
        for _, cases in itertools.groupby(grid, lambda case: (case.rows, case.width)):
            for taken in measure(team, dict.fromkeys(cases, args.grid_rounds)):
                table.append(taken.row())
                _shown(table[-1], began)
    return sorted(table, key=lambda row: (row["rows"], row["width"], row["reads"], row["indices"]))


# --- bounds ---------------------------------------------------------------------------------------


def bounds(
    table: Sequence[dict[str, Any]], growth: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """What the main cases are asked to keep, and what was measured (`None`: it was not).

    Those with 8,192 indices, where nothing else is said.
    """
    rows = {row["case"]: row for row in table}
    main_rows = {(case.reads, case.indices): rows.get(case.name) for case in MAIN}
    grown = {(row["contender"], row["indices"]): row["ratio"]["median"] for row in growth}
    found: list[dict[str, Any]] = []

    def ask(what: str, asked: str, limit: float, value: float | None) -> None:
        found.append(bound(what, asked, limit, value))

    def ratio(one: str, other: str, indices: str, reads: int = FULL) -> float | None:
        """The time of one by that of the other, of which one is ours."""
        ratios = (main_rows[reads, indices] or {"ratio": {}})["ratio"]
        if other in ratios.get(one, {}):
            return ratios[one][other]["median"]
        return 1 / ratios[other][one]["median"] if one in ratios.get(other, {}) else None

    def temporaries(*names: str, reads: int = FULL) -> float | None:
        here = [row for (count, _), row in main_rows.items() if row and count == reads]
        held = [row["temporary_bytes"].get(name) for row in here for name in names]
        return max((x for x in held if x is not None), default=0) / 1e6 or None

    kinds = list(dict.fromkeys(kind for _, kind in main_rows))
    for kind in kinds:
        ask(f"optax's time by exact's, {kind}", "at least", 30, ratio("optax", "exact", kind))
        ask(f"exact's time by lazy's, {kind}", "at most", 1.25, ratio("exact", "lazy", kind))
        whole = ratio("exact step", "lazy step", kind)
        ask(f"the whole exact step's time by the lazy one's, {kind}", "at most", 1.4, whole)
        ask(f"dense's time by optax's, {kind}", "at most", 0.9, ratio("dense", "optax", kind))
        larger = grown.get(("exact", kind))
        ask(f"exact's time at 4M rows by that at 100k, {kind}", "at most", 2, larger)
    sparse, name = "torch sparse", "torch SparseAdam"
    ask(f"{name}'s time by exact's, uniform", "at least", 1.3, ratio(sparse, "exact", "uniform"))
    ask(f"lazy's time by {name}'s, uniform", "at most", 1, ratio("lazy", sparse, "uniform"))
    own = temporaries("exact", "lazy", "dense")
    ask("temporaries of an optimizer step, MB", "at most", 20, own)
    ask("temporaries of the whole exact step, MB", "at most", 20, temporaries("exact step"))
    many = 65_536
    for kind in kinds:
        what = f"exact's time by {name}'s, {many:,} indices, {kind}"
        ask(what, "at most", 0.8, ratio("exact", sparse, kind, many))
    for own_name in ("exact", "lazy"):
        what = f"temporaries of {own_name}, {many:,} indices, MB"
        ask(what, "at most", 26, temporaries(own_name, reads=many))
    return found


# --- the plot -------------------------------------------------------------------------------------

# name: (label, colour, marker, line width)
_LINES: dict[str, tuple[str, str, str, float]] = {
    "torch dense": ("torch, fused Adam, dense gradient", "0.72", "v", 1.2),
    "optax": ("optax, dense gradient", "0.35", "s", 1.2),
    "keras": ("Keras, dense gradient", "0.55", "D", 1.2),
    "tf form": ("TF's sparse step, in JAX", "0.35", "x", 1.2),
    "dense": ('adamjax, rows="dense"', "C1", "o", 2.2),
    "torch sparse": ("torch SparseAdam (lazy)", "C3", "^", 1.6),
    "exact": ("adamjax, exact_rows", "C0", "o", 3.0),
    "lazy": ('adamjax, rows="lazy"', "C2", "o", 1.6),
}


def plot(results: dict[str, Any], path: Path, small: bool = False) -> None:
    """Time against the table's size, for one width: a panel for each batch and distribution.

    A small plot shows one batch, the one of the main case.
    """
    from matplotlib.figure import Figure

    widths = sorted({row["width"] for row in results["times"]})
    width = 64 if 64 in widths else widths[0]
    table = [row for row in results["times"] if row["width"] == width]
    reads = sorted({row["reads"] for row in table})
    if small:
        reads = [8192 if 8192 in reads else reads[0]]
        table = [row for row in table if row["reads"] in reads]
    kinds = sorted({row["indices"] for row in table}, reverse=True)
    across = (len(reads), len(kinds)) if not small else (len(kinds), 1)
    size = (3.1 * across[0] + 3.2, 2.9 * across[1] + 0.6)
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(*across[::-1], sharex=True, sharey=True, squeeze=False)
    if small:
        panels = panels.T
    handles: dict[str, Any] = {}
    for kind, line in zip(kinds, panels, strict=True):
        for n, axes in zip(reads, line, strict=True):
            here = [row for row in table if (row["indices"], row["reads"]) == (kind, n)]
            here.sort(key=lambda row: row["rows"])
            for name, (label, colour, marker, thick) in _LINES.items():
                points = [(r["rows"], r["ms"][name]["median"]) for r in here if name in r["ms"]]
                if points:
                    style = {"color": colour, "marker": marker, "linewidth": thick}
                    (handles[label],) = axes.plot(*zip(*points, strict=True), **style)
            axes.set(xscale="log", yscale="log", title=f"{n:,} indices, {kind}")
            sizes = [row["rows"] for row in here]
            axes.set_xticks(sizes, [short(x) for x in sizes])
            axes.minorticks_off()
            axes.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
            axes.grid(alpha=0.3)
    # In the order of their times at the right end, as the eye meets them there.
    last = max(table, key=lambda row: (row["rows"], row["reads"] == 8192))
    order = sorted((n for n in _LINES if n in last["ms"]), key=lambda n: -last["ms"][n]["median"])
    labels = [_LINES[name][0] for name in order]
    figure.supxlabel(f"rows of the table (float32, {width} columns)")
    figure.supylabel("ms a step")
    if not small:
        figure.suptitle("One Adam step on a table, by the table's size")
    shown = [handles[label] for label in labels]
    figure.legend(shown, labels, loc="outside right center", frameon=False)
    figure.savefig(path, dpi=90 if small else 120)


# --- the suite ------------------------------------------------------------------------------------


def main(argv: list[str]) -> int:
    """Runs the suite; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks rows", description=__doc__)
    parser.add_argument("--rounds", type=int, default=8, help="of the main cases (default 8)")
    parser.add_argument("--sittings", type=int, default=4, help="of the main cases (default 4)")
    parser.add_argument("--grid-rounds", type=int, default=3, help="of the others (default 3)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--only", default="", help="cases whose name holds this text, or 'growth'")
    parser.add_argument("--contenders", help=f"some of: {'; '.join(EVERYONE)}; split by ;")
    parser.add_argument("--out", type=Path, help="where to write the JSON, the plot beside it")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="draw these results and no more")
    parser.add_argument("--worker", choices=(*EVERYONE, SHARED), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        serve(shared(Serving) if args.worker == SHARED else Serving(args.worker))
        return 0
    if args.plot:
        plot(json.loads(args.plot.read_text()), args.plot.with_suffix(".png"))
        return 0
    if min(args.rounds, args.grid_rounds) < 2 or args.sittings < 1:
        parser.error("--rounds and --grid-rounds must be at least 2, --sittings at least 1")
    chosen = args.contenders.split(";") if args.contenders else list(EVERYONE)
    if unknown := [name for name in chosen if name not in EVERYONE]:
        parser.error(f"no contenders {unknown}; there are {list(EVERYONE)}")
    here = device(args.quick)
    large = [] if here.platform == "cpu" else LARGE
    main_cases, grid = (QUICK_MAIN, QUICK) if args.quick else (MAIN, GRID + large)
    main_cases = [case for case in main_cases if args.only in case.name]
    grid = [case for case in grid if args.only in case.name and case not in main_cases]
    grows = args.only in ("", "growth") and not args.quick
    if not (main_cases or grid or grows):
        parser.error(f"no case's name holds {args.only!r}; one is {MAIN[0].name!r}")

    names = [name for name in chosen if installed(EVERYONE[name][0])]
    for name in chosen:
        if name not in names:
            print(f"{name}: left out, {EVERYONE[name][0]} is not installed")
        elif EVERYONE[name][0] == "torch" and not here.torch:
            print(f"{name}: left out, torch does not run on this {here.platform}")
            names.remove(name)

    results: dict[str, Any] = {"suite": "rows", "quick": args.quick}
    results |= {"sittings": args.sittings, "rounds": args.rounds, "grid_rounds": args.grid_rounds}
    with progress(_samples(main_cases, grid, names, grows, args)) as bar:
        results["times"] = run(main_cases, grid, names, args, here, bar)
        results["growth"] = []
        if grows:
            results["growth"] = measure_growth(names, args.sittings, args.rounds, here, bar)
    for row in results["growth"]:
        times = ", ".join(f"{size} {ms['median']:.1f} ms" for size, ms in row["ms"].items())
        by = row["ratio"]["median"]
        print(f"{row['contender']:13} {row['indices']:8} {times}, {by:.2f} times as long")
    results["bounds"] = []
    if not args.quick:
        results["bounds"] = bounds(results["times"], results["growth"])
        print(f"\nbounds on {MAIN[0].name} and uniform, where no other number of indices is told")
        tell_bounds(results["bounds"])
    here.add_bandwidth(results, args.quick)
    _add_limits(results)
    packages = ("adamjax", "jax", "jaxlib", "optax", "keras", "torch")
    results["environment"] = environment(*installed(*packages))
    out = args.out or RESULTS / results["environment"]["platform"] / "rows.json"
    if args.out or not (args.quick or args.only or args.contenders):
        save(results, out)
        if results["times"]:
            plot(results, out.with_suffix(".png"))
        print(f"written to {out} and {out.with_suffix('.png').name}")
    return 0
