"""The plots of a report, drawn from the results of suites."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.contenders import short
from benchmarks.tables import main_rows

# The caption of each plot. The plot's file is report-NAME.png.
CAPTIONS = {
    "limit": "The speed of steps as a fraction of the highest that the memory's bandwidth allows. "
    "Above 1, arrays stay in a cache from one step to the next.",
    "rows": "The time of one Adam step, by the number of rows of the table. If a line is flat, the "
    "time does not depend on the rows that are not read.",
}
# name: (label, colour, marker, line width)
LINES: dict[str, tuple[str, str, str, float]] = {
    "torch dense": ("torch, fused Adam, dense gradient", "0.72", "v", 1.2),
    "optax": ("optax, dense gradient", "0.35", "s", 1.2),
    "keras": ("Keras, dense gradient", "0.55", "D", 1.2),
    "tf form": ("TF's sparse step, in JAX", "0.35", "x", 1.2),
    "dense": ('adamjax, rows="dense"', "C1", "o", 2.2),
    "torch sparse": ("torch SparseAdam (lazy)", "C3", "^", 1.6),
    "exact": ("adamjax, exact_rows", "C0", "o", 3.0),
    "lazy": ('adamjax, rows="lazy"', "C2", "o", 1.6),
}


def limit(results: Mapping[str, Any]) -> Any:
    """A bar for each dense step, and for each kind of step in the main cases of `rows`."""
    from matplotlib.figure import Figure

    bars: list[tuple[str, dict[str, float], str]] = [
        (f"dense: {row['workload']}, {row['chain']}", row["fraction"]["adamjax"], "C0")
        for row in results.get("dense", {}).get("times", [])
    ]
    bars += [
        (f"rows: {name}, {row['indices']} indices", row["fraction"][name], "C2")
        for row in main_rows(results.get("rows", {}))
        for name in ("exact", "lazy", "dense")
        if name in row["fraction"]
    ]
    if not bars:
        return None
    figure = Figure(figsize=(8, 0.32 * len(bars) + 1.2), layout="constrained")
    axes = figure.subplots()
    for i, (_, fraction, colour) in enumerate(bars[::-1]):
        median = fraction["median"]
        errors = [[median - fraction["q25"]], [fraction["q75"] - median]]
        axes.barh(i, median, color=colour, alpha=0.75, xerr=errors, capsize=2)
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(bars)), [label for label, _, _ in bars[::-1]])
    axes.set_xlabel("fraction of the bandwidth's limit")
    axes.grid(axis="x", alpha=0.3)
    return figure


def rows(results: Mapping[str, Any]) -> Any:
    """Time against the table's size, for the main case's width and batch."""
    from matplotlib.figure import Figure

    if not (main_cases := main_rows(results.get("rows", {}))):
        return None
    main = main_cases[0]
    size = main["width"], main["reads"]
    cases = [case for case in results["rows"]["times"] if (case["width"], case["reads"]) == size]
    kinds = sorted({case["indices"] for case in cases}, reverse=True)
    figure = Figure(figsize=(3.1 * len(kinds) + 3.2, 3.5), layout="constrained")
    panels = figure.subplots(1, len(kinds), sharex=True, sharey=True, squeeze=False)[0]
    handles: dict[str, Any] = {}
    for kind, axes in zip(kinds, panels, strict=True):
        kind_cases = [case for case in cases if case["indices"] == kind]
        kind_cases.sort(key=lambda case: case["rows"])
        for name, (_, colour, marker, width) in LINES.items():
            points = [(c["rows"], c["ms"][name]["median"]) for c in kind_cases if name in c["ms"]]
            if points:
                style = {"color": colour, "marker": marker, "linewidth": width}
                (handles[name],) = axes.plot(*zip(*points, strict=True), **style)
        axes.set(xscale="log", yscale="log", title=f"{main['reads']:,} indices, {kind}")
        sizes = [case["rows"] for case in kind_cases]
        axes.set_xticks(sizes, [short(x) for x in sizes])
        axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda x, _: f"{x:g}")
        axes.grid(alpha=0.3)
    # The legend, at the right, lists the lines from the highest right end to the lowest.
    last = max(cases, key=lambda case: case["rows"])["ms"]
    order = sorted((n for n in handles if n in last), key=lambda n: -last[n]["median"])
    figure.supxlabel(f"rows of the table (float32, {main['width']} columns)")
    figure.supylabel("ms a step")
    labels = [LINES[name][0] for name in order]
    figure.legend([handles[n] for n in order], labels, loc="outside right center", frameon=False)
    return figure


def draw(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Writes the plots that the results have data for; returns the names of their files."""
    drawn = []
    for name, plot in (("limit", limit), ("rows", rows)):
        if (figure := plot(results)) is not None:
            drawn.append(f"report-{name}.png")
            figure.savefig(folder / drawn[-1], dpi=90)
    return drawn
