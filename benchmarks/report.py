"""A page to read: what a folder of results says, first in short, then suite by suite, with plots.

`python -m benchmarks report [FOLDER]` writes `report.md` and its plots beside the results, from
these and nothing else. `--compare A.json B.json` tells instead what changed between two results of
one suite, and whether by more than the noise.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import compare, readme
from benchmarks.contenders import OURS
from benchmarks.measure import RESULTS

__all__ = ["SECTIONS", "Summary", "main", "plots", "read", "summary", "text"]

# suite: its title, and what it measured in a sentence or two
SECTIONS = {
    "dense": (
        "Dense steps",
        "One Adam step on all parameters, jitted and donated, beside the same step of other "
        "packages: on one large leaf, on a transformer's leaves, on many small ones. With "
        '"clip", gradients are clipped by their global norm first.',
    ),
    "rows": (
        "Rows of a table",
        "One Adam step on an embedding table of which a batch reads a few rows. `exact` is "
        "`exact_rows`, whose result is the dense optimizer's; `lazy` leaves the other rows where "
        'they are; `dense` is `rows="dense"`. A whole step ("exact step", "lazy step") reads the '
        "rows and differentiates a loss as well. Indices by Zipf's law are mostly the same few.",
    ),
    "compile": (
        "Compilation",
        "What a program costs once: to trace and lower a step in Python, and to compile it.",
    ),
    "memory": (
        "Memory",
        "What a step holds besides parameters and gradients: the optimizer's state, which stays, "
        "and temporaries, which come and go.",
    ),
    "models": (
        "Whole models",
        "Whole train steps of models with large tables, with dense gradients and with row "
        "gradients of the same loss.",
    ),
}

NAMES = {
    "keras": "Keras",
    "torch": "torch's fused Adam",
    "torch dense": "torch's fused Adam",
    "torch sparse": "torch's SparseAdam",
    "tf form": "TF's sparse step",
}


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """The results in a folder, by suite, of the suites that a report is about."""
    paths = {suite: folder / f"{suite}.json" for suite in SECTIONS}
    found = {suite: compare.loaded(path) for suite, path in paths.items() if path.exists()}
    if not found:
        raise ValueError(
            f"{folder} holds no results: `python -m benchmarks all` measures everything, and "
            f"`python -m benchmarks SUITE` one of {', '.join(SECTIONS)}"
        )
    return found


# --- in short -------------------------------------------------------------------------------------


class Summary:
    """Lines, and the figures that they quote: what is written, and the number in the results."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.figures: list[tuple[str, float]] = []

    def quote(self, number: float, form: str = ".2f") -> str:
        """A number of the results, as it is written."""
        shown = format(number, form)
        self.figures.append((shown, number))
        return shown

    def longer(self, ratio: float) -> str:
        """How many times as long the other takes, of a ratio that is ours by the other's."""
        return self.quote(1 / ratio, ".0f" if ratio < 0.1 else ".2g")

    def span(self, numbers: Sequence[float], form: str = ".2f") -> str:
        """From the least to the largest."""
        low, high = (self.quote(x, form) for x in (min(numbers), max(numbers)))
        return low if low == high else f"{low} to {high}"

    def say(self, line: str) -> None:
        self.lines.append(f"- {line}")

    def title(self, text: str) -> None:
        self.lines += ["", f"**{text}**", ""]


def _dense_name(row: dict[str, Any]) -> str:
    return f"{row['workload']}, {row['chain']}"


def _main_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The cases of the table that all contenders step on: one for each kind of indices."""
    found = {(r["rows"], r["width"], r["reads"], r["indices"]): r for r in results["times"]}
    case = readme.main_case(found) if found else ()
    return [found[*case, k] for k in ("Zipf", "uniform") if (*case, k) in found]


def _fast(told: Summary, results: dict[str, Any]) -> None:
    if "dense" in results:
        rows = results["dense"]["times"]
        spans = [
            f"{told.span([r['ratio'][name]['median'] for r in rows if name in r['ratio']])} "
            f"({NAMES.get(name, name)})"
            for name in rows[0]["ratio"]
        ]
        if spans:
            told.say(f"Of others' time a dense step takes {', '.join(spans)} (less is faster).")
    for row in _main_rows(results["rows"]) if "rows" in results else ():
        ratios = row["ratio"].get("exact", {})
        others = [
            f"{NAMES.get(name, name)} {told.longer(ratios[name]['median'])} times"
            for name in ("optax", "torch sparse")
            if name in ratios
        ]
        told.say(
            f"A step that reads {row['reads']:,} rows ({row['indices']} indices) of a table of "
            f"{row['rows']:,} takes `exact_rows` {told.quote(row['ms']['exact']['median'], '.1f')} "
            f"ms{''.join(f', {x} as long' for x in others)}."
        )
    models = [
        f"{row['model']} {told.quote(row['ratio']['optax']['median'], '.1f')} times"
        for row in results.get("models", {}).get("steps", ())
        if "optax" in row["ratio"]
    ]
    if models:
        told.say(f"A train step with optax takes, by `exact_rows`' time: {', '.join(models)}.")
    if "compile" in results:
        spans = []
        for what in ("trace and lower", "compile"):
            rows = [row for row in results["compile"]["times"] if row["what"] == what]
            if ratios := [row["ratio"]["optax"]["median"] for row in rows if row["ratio"]]:
                spans.append(f"{told.span(ratios)} to {what} a step")
        if spans:
            told.say(f"Of optax's time it takes {', '.join(spans)}.")


def _at_the_limit(told: Summary, results: dict[str, Any]) -> None:
    timed = [suite for suite in ("dense", "rows") if suite in results]
    if missing := [suite for suite in timed if "bandwidth" not in results[suite]]:
        told.say(
            f"What steps reach of the memory's bandwidth is not measured ({' and '.join(missing)}: "
            "these results are older than that measurement)."
        )
    for suite in timed:
        if suite in missing:
            continue
        speed = told.quote(results[suite]["bandwidth"]["median"] / 1e9, ".1f")
        limit = f"of what the memory's bandwidth, {speed} GB/s, allows"
        if suite == "dense":
            shares = [row["fraction"]["adamjax"]["median"] for row in results[suite]["times"]]
            told.say(f"A dense step reaches {told.span(shares)} {limit}.")
            continue
        for row in _main_rows(results[suite]):
            each = [
                f"`{name}` {told.quote(row['fraction'][name]['median'])}"
                for name in ("exact", "lazy", "dense")
                if name in row["fraction"]
            ]
            told.say(f"Steps on rows ({row['indices']} indices): {', '.join(each)} {limit}.")
    if "memory" in results:
        rows = results["memory"]["dense"]
        most: dict[bool, float] = {}
        for row in rows:
            joined = "grouped" in row["chain"]
            share = 100 * row["temporary_bytes"] / row["parameter_bytes"]
            most[joined] = max(share, most.get(joined, 0))
        shares = {joined: told.quote(share, ".1f") for joined, share in most.items()}
        beside = f", {shares[True]}% where small leaves are joined" if True in shares else ""
        told.say(
            f"A dense step's temporaries take {shares[False]}% of the parameters' bytes at most"
            f"{beside}."
        )
        held = [
            f"{told.quote(row['temporary_bytes'] / 1e6, ',.1f')} MB ({row['mode']})"
            for row in results["memory"].get("tables", ())
        ]
        if held:
            told.say(f"Temporaries of a train step on a table: {', '.join(held)}.")


def _slower(results: dict[str, Any]) -> Iterator[tuple[str, str, str, float]]:
    """Where adamjax is slower by more than the noise: what, than whom, the case, how much."""
    for row in results.get("dense", {}).get("times", ()):
        for name, ratio in row["ratio"].items():
            if ratio["q25"] > 1:
                yield "A dense step", name, _dense_name(row), ratio["median"]
    for row in results.get("rows", {}).get("times", ()):
        for name, ratio in row["ratio"].get("exact", {}).items():
            if ratio["q25"] > 1 and name not in OURS:
                case = f"{row['rows']:,} rows of {row['width']}, {row['reads']:,} {row['indices']}"
                yield "`exact_rows`", name, f"{case} indices", ratio["median"]
    for row in results.get("compile", {}).get("times", ()):
        for name, ratio in row["ratio"].items():
            if ratio["q25"] > 1:
                yield f"To {row['what']} a step", name, row["chain"], ratio["median"]
    for row in results.get("models", {}).get("steps", ()):
        ratio = row["ratio"].get("optax")
        if ratio and ratio["q75"] < 1:
            yield "A train step with `exact_rows`", "optax", row["model"], 1 / ratio["median"]


def _not(told: Summary, results: dict[str, Any]) -> None:
    bounds = readme.asked_of_rows(results.get("rows", {}))
    bounds += results.get("models", {}).get("bounds", [])
    for row in bounds:
        if row["holds"] is False:
            measured = told.quote(row["measured"], ".3g")
            told.say(f"A bound that does not hold: {row['what']}: {row['asked']}, but {measured}.")
    measured = [row for row in bounds if row["holds"] is not None]
    if measured and all(row["holds"] for row in measured):
        told.say(f"All {len(measured)} bounds that were measured hold.")
    cases: dict[tuple[str, str], list[tuple[float, str]]] = {}
    for what, name, case, ratio in _slower(results):
        cases.setdefault((what, name), []).append((ratio, case))
    for what in dict.fromkeys(what for what, _ in cases):
        told.say(f"{what} is slower than")
        for (other, name), found in cases.items():
            if other == what:
                ratio, case = max(found)
                times = told.quote(ratio, ".1f" if ratio > 2 else ".2f")
                many = "one case" if len(found) == 1 else f"{len(found)} cases, at worst"
                shown = NAMES.get(name, name)
                told.lines.append(f"  - {shown} in {many}: {times} times the time ({case})")
    if not cases:
        told.say("Nothing takes longer than with another package by more than the noise.")


def summary(results: dict[str, dict[str, Any]]) -> Summary:
    """What the results say in short; every figure in it is one of theirs, or its reciprocal."""
    told = Summary()
    quick = [suite for suite, x in results.items() if x.get("quick")]
    if quick:
        told.lines.append(
            f"**Quick runs: {', '.join(quick)}.** Tiny sizes, which show that everything runs; "
            "their times mean nothing."
        )
    real = {suite: x for suite, x in results.items() if suite not in quick}
    if real:
        told.title("What is fast")
        _fast(told, real)
        told.title("What is at the limit")
        _at_the_limit(told, real)
        told.title("What is not")
        _not(told, real)
    return told


# --- plots ----------------------------------------------------------------------------------------

COLOURS = {"adamjax": "C0", "optax": "0.35", "keras": "C1", "torch": "C3"}


def _dense_plot(results: dict[str, Any], path: Path) -> None:
    """Our time by each contender's, with quartiles."""
    from matplotlib.figure import Figure

    rows = results["times"][::-1]
    rivals = [name for name in COLOURS if name in rows[0]["ratio"]]
    figure = Figure(figsize=(8, 0.5 * len(rows) + 1.5), layout="constrained")
    axes = figure.subplots()
    for offset, name in zip((0.22, 0, -0.22), rivals, strict=False):
        there = [(i, row["ratio"][name]) for i, row in enumerate(rows) if name in row["ratio"]]
        middle = [r["median"] for _, r in there]
        around = [
            [r["median"] - r["q25"] for _, r in there],
            [r["q75"] - r["median"] for _, r in there],
        ]
        style = {"fmt": "o", "color": COLOURS[name], "markersize": 5, "capsize": 2}
        places = [i + offset for i, _ in there]
        axes.errorbar(middle, places, xerr=around, label=NAMES.get(name, name), **style)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_xscale("log")
    ticks = [0.25, 0.33, 0.5, 0.67, 1, 1.5, 2, 3]
    ends = [x for row in rows for r in row["ratio"].values() for x in (r["q25"], r["q75"])]
    kept = [t for t in ticks if min(ends) / 1.3 < t < max(ends) * 1.3]
    axes.set_xticks(kept, [f"{t:g}" for t in kept])
    axes.minorticks_off()
    axes.set_yticks(range(len(rows)), [_dense_name(row) for row in rows])
    axes.set_xlabel("adamjax's time by the other's; left of the line adamjax is faster")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(path, dpi=90)


def _limit_plot(results: dict[str, dict[str, Any]], path: Path) -> bool:
    """What steps reach of the bandwidth's limit; `False` where that was not measured."""
    from matplotlib.figure import Figure

    bars: list[tuple[str, dict[str, float], str]] = []
    if "bandwidth" in results.get("dense", {}):
        bars += [
            (f"dense: {_dense_name(row)}", row["fraction"]["adamjax"], "C0")
            for row in results["dense"]["times"]
        ]
    if "bandwidth" in results.get("rows", {}):
        for row in _main_rows(results["rows"]):
            for name in ("exact", "lazy", "dense"):
                if name in row["fraction"]:
                    label = f"rows: {name}, {row['indices']} indices"
                    bars.append((label, row["fraction"][name], "C2"))
    if not bars:
        return False
    figure = Figure(figsize=(8, 0.32 * len(bars) + 1.2), layout="constrained")
    axes = figure.subplots()
    for i, (_, share, colour) in enumerate(bars[::-1]):
        around = [[share["median"] - share["q25"]], [share["q75"] - share["median"]]]
        axes.barh(i, share["median"], color=colour, alpha=0.75, xerr=around, capsize=2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars[::-1]])
    axes.set_xlabel("of the limit that the bandwidth sets")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=90)
    return True


def _models_plot(results: dict[str, Any], path: Path) -> None:
    """Each contender's step on each model."""
    from matplotlib.figure import Figure

    labels = {
        "optax": ("optax, dense gradients", "0.35"),
        "dense": ("adamjax, dense gradients", "C1"),
        "lazy": ('adamjax, rows="lazy"', "C2"),
        "exact": ("adamjax, exact_rows", "C0"),
        "frozen": ("tables frozen", "0.75"),
    }
    rows = [row for row in results["steps"] if row["ms"]]
    figure = Figure(figsize=(8 + 1.8 * max(len(rows) - 3, 0), 2.9), layout="constrained")
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for axes, row in zip(panels, rows, strict=True):
        names = [name for name in labels if name in row["ms"]][::-1]
        for i, name in enumerate(names):
            ms = row["ms"][name]
            around = [[ms["median"] - ms["q25"]], [ms["q75"] - ms["median"]]]
            axes.barh(i, ms["median"], color=labels[name][1], xerr=around, capsize=2)
        axes.set_title(row["model"], fontsize=10)
        shown = [labels[name][0] for name in names] if axes is panels[0] else [""] * len(names)
        axes.set_yticks(range(len(names)), shown)
        axes.grid(axis="x", alpha=0.3)
    figure.supxlabel("ms a train step", fontsize=10)
    figure.savefig(path, dpi=90)


# What a plot shows, by the end of its file's name.
CAPTIONS = {
    "dense": "A dense step's time by that of other packages: medians and quartiles.",
    "limit": "What steps reach of the limit that the memory's bandwidth sets: 1 is all of it. "
    "Above 1, arrays stay in a cache from one step to the next.",
    "rows": "One Adam step by the table's size: lines that stay low do not pay for the rows that "
    "nobody read.",
    "models": "Whole train steps: what is left with the tables frozen is the rest of the model.",
}


def plots(results: dict[str, dict[str, Any]], folder: Path) -> dict[str, str]:
    """Draws what there is to draw; the names of the files by plot."""
    from benchmarks import rows

    names = {plot: f"report-{plot}.png" for plot in CAPTIONS}
    drawn = {}
    if "dense" in results:
        _dense_plot(results["dense"], folder / names["dense"])
        drawn["dense"] = names["dense"]
    if _limit_plot(results, folder / names["limit"]):
        drawn["limit"] = names["limit"]
    if results.get("rows", {}).get("times"):
        rows.plot(results["rows"], folder / names["rows"], small=True)
        drawn["rows"] = names["rows"]
    if results.get("models", {}).get("steps"):
        _models_plot(results["models"], folder / names["models"])
        drawn["models"] = names["models"]
    return drawn


# --- the page -------------------------------------------------------------------------------------


def text(results: dict[str, dict[str, Any]]) -> str:
    """The report in Markdown."""
    devices = {
        x["environment"]["device"]
        + (f", {x['environment']['cores']} cores" if x["environment"]["platform"] == "cpu" else "")
        for x in results.values()
    }
    limits = any("bandwidth" in x for x in results.values())
    parts = [
        f"# adamjax on {' and '.join(sorted(devices))}",
        "Adam of adamjax, a library for JAX, beside that of other packages. Written by `python -m "
        "benchmarks report` from the results in this folder. A time is the median of several "
        "rounds, in which contenders take turns (quartiles in brackets); a ratio is taken within a "
        "round. More than the noise means: beyond the quartiles.",
        "## In short",
        "\n".join(summary(results).lines).strip(),
    ]
    if limits:
        parts.append(_picture("limit"))
    for suite, (title, about) in SECTIONS.items():
        parts.append(f"## {title}")
        if suite not in results:
            parts.append(f"Not measured: `python -m benchmarks {suite}`.")
            continue
        parts.append(about)
        if suite in CAPTIONS:
            parts.append(_picture(suite))
        parts.append(readme.SUITES[suite](results[suite]))
    return "\n\n".join(parts) + "\n"


def _picture(plot: str) -> str:
    return f"![{CAPTIONS[plot]}](report-{plot}.png)\n\n*{CAPTIONS[plot]}*"


def main(argv: list[str]) -> int:
    """Runs; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        metavar="FOLDER",
        help="the results (default benchmarks/results/PLATFORM, of what JAX finds)",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs=2,
        metavar=("A.json", "B.json"),
        help="print what changed from A to B, results of one suite",
    )
    parser.add_argument("--everything", action="store_true", help="with --compare: the rest too")
    args = parser.parse_args(argv)
    try:
        if args.compare:
            old, new = (compare.loaded(path) for path in args.compare)
            print(compare.compared(old, new, args.everything))
            return 0
        folder = args.folder
        if folder is None:
            import jax

            folder = RESULTS / jax.default_backend()
        results = read(folder)
    except ValueError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    drawn = plots(results, folder)
    (folder / "report.md").write_text(text(results))
    print(f"written to {folder / 'report.md'}, with {', '.join(drawn.values())}")
    return 0
