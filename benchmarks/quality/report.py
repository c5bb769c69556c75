"""The page about the results, with its plots; written beside the JSON."""

from pathlib import Path
from typing import Any

from benchmarks.quality import protocol
from benchmarks.quality.answer import (
    Results,
    difference,
    group_differences,
    marked,
    outcome_rows,
    sentences,
)
from benchmarks.tables import markdown, origin

# name: colour and line width
LINES = {
    "dense": ("0.35", 3.5),
    "exact": ("C0", 1.8),
    "lazy, same rate": ("C3", 1.8),
    "lazy": ("C2", 1.8),
    "counted": ("C4", 1.2),
    "local": ("C1", 1.2),
    "exact + decay": ("C9", 1.2),
    "lazy + decay": ("C8", 1.2),
}
CAPTIONS = {
    "time": "The model's first metric on the test split after each epoch, by the seconds of "
    "training until then: the mean of all seeds.",
    "reads": "The difference from dense for test examples, grouped by how often the example's item "
    "or word (of two entities, the rarer) is in the training data. Above 0 is better. Groups of "
    f"fewer than {protocol.FEWEST} examples are left out.",
    "divergence": "Horizontal: the number of steps between two reads of a row. Vertical: the mean "
    "distance between the row's end point and its end point under dense Adam, divided by how far "
    "dense Adam moves the row.",
}


# --- plots ----------------------------------------------------------------------------------------


class Panels:
    """A figure with `count` panels, and one legend for the contenders' lines in all panels."""

    def __init__(self, count: int) -> None:
        from matplotlib.figure import Figure

        columns = min(4, count)
        rows = -(-count // columns)
        self.figure = Figure(figsize=(3.2 * columns, 2.7 * rows + 0.5), layout="constrained")
        self.axes = [self.figure.add_subplot(rows, columns, i + 1) for i in range(count)]
        self.handles: dict[str, Any] = {}

    def line(self, panel: int, name: str, *points: Any) -> None:
        """Draws a contender's line through points, given by their x and y."""
        colour, width = LINES[name]
        style = {"color": colour, "linewidth": width, "marker": "."}
        (self.handles[name],) = self.axes[panel].plot(*points, **style)

    def finished(self) -> Any:
        """The figure, with its legend below."""
        for ax in self.axes:
            ax.grid(alpha=0.3)
        names, columns = list(self.handles), max(1, int(self.figure.get_figwidth() / 2.2))
        self.figure.legend(self.handles.values(), names, loc="outside lower center", ncols=columns)
        return self.figure


def time(results: Results) -> Any:
    """Quality against training time."""
    panels = Panels(len(results["models"]))
    for i, row in enumerate(results["models"]):
        metric = row["metrics"][0]
        for name in (name for name in LINES if name in row["contenders"]):
            about = row["contenders"][name]
            values = [float("nan") if x is None else x for x in about["curve"][metric]]
            seconds = [about["seconds"] * (n + 1) / len(values) for n in range(len(values))]
            panels.line(i, name, seconds, values)
        panels.axes[i].set(title=row["model"], xlabel="seconds", ylabel=metric)
    return panels.finished()


def reads(results: Results) -> Any:
    """The difference from dense by how often a row is read."""
    panels = Panels(len(results["models"]))
    labels = [name.replace(" to ", "-").replace(" or more", "+") for name in results["groups"]]
    for i, row in enumerate(results["models"]):
        metric = row["metrics"][0]
        sign = 1 if protocol.METRICS[metric].higher_is_better else -1
        for name in (name for name in LINES if name in row["contenders"] and name != "dense"):
            groups, differences = group_differences(row, name)
            panels.line(i, name, groups, [sign * x for x in differences])
        ax = panels.axes[i]
        ax.axhline(0, color="0.35", linewidth=1)
        ax.set_xticks(range(len(labels)), labels, fontsize=8)
        ax.set(title=f"{row['model']}, {metric}", xlabel="reads")
    return panels.finished()


def divergence(results: Results) -> Any:
    """The distance from dense by the gap, for each b2."""
    gaps, by_b2 = results["divergence"]["gaps"], results["divergence"]["by b2"]
    panels = Panels(len(by_b2))
    for i, (b2, by_name) in enumerate(by_b2.items()):
        for name, distances in by_name.items():
            panels.line(i, name, gaps, distances)
        ax = panels.axes[i]
        ax.set(xscale="log", yscale="log", title=f"b2 = {b2}", xlabel="steps between reads")
    panels.axes[0].set_ylabel("distance from dense")
    return panels.finished()


# --- the page -------------------------------------------------------------------------------------


def model_table(row: dict[str, Any]) -> str:
    """A table of all results of a model."""
    table = []
    for name, about in row["contenders"].items():
        for metric in row["metrics"]:
            result = about["test"][metric]
            cells = [name, f"{about['rate']:g}", f"{about['seconds']:.3g}", metric]
            cells.append(f"{result['mean']:.4g} ± {result['sd']:.2g}" if result["mean"] else "")
            if "outcome" in result:
                effect, p, corrected = (result[k] for k in ("effect", "p", "corrected p"))
                cells += [result["reference"], difference(result)]
                cells += ["" if x is None else f"{x:.2g}" for x in (effect, p, corrected)]
                cells.append(marked(result["outcome"]))
            else:
                cells += [""] * 6
            cells.append(f"{result['mean |difference|']:.2g}, {result['largest |difference|']:.2g}")
            table.append(cells)
    head = ["contender", "rate", "training, s", "metric", "mean ± sd", "against"]
    head += ["difference (95% interval)", "effect size", "p", "corrected p", "outcome"]
    head.append("size of the difference from dense between runs of one seed: mean, largest")
    return markdown(head, table)


def rates_at_an_end(results: Results) -> list[str]:
    """The contenders whose chosen rate is the smallest or the largest of those tried."""
    ends = {min(results["rates"]), max(results["rates"])}
    return [
        f"{row['model']}: {name} ({about['rate']:g})"
        for row in results["models"]
        for name, about in row["contenders"].items()
        if about["rate"] in ends and name not in protocol.RATE_OF
    ]


def page(results: Results) -> str:

    def picture(name: str) -> str:
        return f"![{CAPTIONS[name]}](quality-{name}.png)\n\n*{CAPTIONS[name]}*"

    parts = [
        "# When does exact matter?",
        f"{origin(results)} Written by `python -m benchmarks quality` from `quality.json`.",
        "This page compares what can happen to the rows of tables that a step does not read. "
        "Dense Adam updates all rows; exact gives the same result, but moves a row later; lazy "
        'leaves these rows as they are. "Same" means that the difference is shown to be within a '
        'margin that was fixed before the runs. After "at worst": the mean difference, its 95% '
        "confidence interval, and the method's mean. [Lazy or exact]"
        "(../../../docs/lazy-or-exact.md#measurements) explains the methods and the metrics.",
    ]
    if results["quick"]:
        parts.append(
            "**A quick run**: it shows that everything runs, and its figures mean nothing."
        )
    ends = rates_at_an_end(results)
    names = list(protocol.CONTENDERS)
    parts += [
        "\n".join(f"- {line}" for line in sentences(results)).replace(
            "(performance.md)", "(../../../docs/performance.md)"
        ),
        "In the next table, the column dense has the metric's mean. The other cells have the mean "
        "difference from dense, its 95% confidence interval, and the outcome. Lazy + decay is lazy "
        "AdamW, and is compared with exact AdamW.",
        markdown(*outcome_rows(results)),
        *map(picture, CAPTIONS),
        "## The question, fixed before the runs",
        (protocol.__doc__ or "").strip(),
        f"Seeds: {len(results['seeds'])}. Rates: {', '.join(f'{x:g}' for x in results['rates'])}. "
        f"Betas {results['betas'][0]} and {results['betas'][1]}, eps {results['eps']:g} as in "
        f"optax, decay {results['decay']}.",
        (
            f"The chosen rate is the smallest or the largest that was tried in: {'; '.join(ends)}."
            if ends
            else "No chosen rate is the smallest or the largest that was tried."
        ),
        markdown(["contender", "what it is"], [[n, protocol.CONTENDERS[n]] for n in names]),
        "## The data",
        *(
            f"- {name}: "
            + ", ".join(
                f"{k} {x:,}" if isinstance(x, int) else f"{k} {x}" for k, x in about.items()
            )
            for name, about in results["data"].items()
        ),
        "Ratings: the last rating of each user is in the test split, the one before it in the "
        "validation split. Knowledge graph: all facts about the same two entities are in the same "
        "split.",
    ]
    for row in results["models"]:
        parts.append(f"## {row['model']}")
        parts.append(
            f"On {row['data']}: {row['steps']:,} steps of {row['batch']} examples; tables: "
            f"{', '.join(row['tables'])}."
        )
        parts.append(model_table(row))
    return "\n\n".join(parts) + "\n"


def write(results: Results, folder: Path) -> list[Path]:
    """Writes the page and its plots into a folder; returns their paths."""
    written = []
    for name, draw in (("time", time), ("reads", reads), ("divergence", divergence)):
        written.append(folder / f"quality-{name}.png")
        draw(results).savefig(written[-1], dpi=80)
    written.append(folder / "quality.md")
    written[-1].write_text(page(results))
    return written
