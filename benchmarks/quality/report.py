"""The page about the results, with its plots; written beside the JSON."""

from pathlib import Path
from typing import Any

from benchmarks.quality import protocol
from benchmarks.quality.answer import Results, difference, outcome_rows, sentences, shown
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
    "time": "The test's first metric after each epoch, by the seconds of training until then: the "
    "mean of all seeds.",
    "reads": "The difference from dense in each group of the test's examples, by how often the "
    "example's row is read by right answers in the training data. Above 0 is better; groups of "
    f"fewer than {protocol.FEWEST} examples are left out.",
    "divergence": "How far a row ends from where dense Adam moves it, by the steps between two "
    "reads: the mean distance, divided by how far dense Adam moves the row.",
}


# --- plots ----------------------------------------------------------------------------------------


def panels(count: int, columns: int = 4) -> tuple[Any, list[Any]]:
    """A figure and its first axes; the others are not shown."""
    from matplotlib.figure import Figure

    columns = min(columns, count)
    lines = -(-count // columns)
    figure = Figure(figsize=(3.2 * columns, 2.7 * lines + 0.5), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for empty in axes[count:]:
        empty.set_visible(False)
    return figure, list(axes[:count])


def with_legend(figure: Any, handles: dict[str, Any]) -> Any:
    """The figure with its legend below."""
    columns = max(1, int(figure.get_figwidth() / 2.2))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
    return figure


def time(results: Results) -> Any:
    """Quality against training time."""
    figure, axes = panels(len(results["models"]))
    handles: dict[str, Any] = {}
    for row, ax in zip(results["models"], axes, strict=True):
        metric = row["metrics"][0]
        for name, (colour, width) in LINES.items():
            if name in row["contenders"]:
                about = row["contenders"][name]
                values = about["curve"][metric]
                seconds = [about["seconds"] * (i + 1) / len(values) for i in range(len(values))]
                values = [float("nan") if x is None else x for x in values]
                (handles[name],) = ax.plot(
                    seconds, values, color=colour, linewidth=width, marker=".", label=name
                )
        ax.set(title=row["model"], xlabel="seconds", ylabel=metric)
        ax.grid(alpha=0.3)
    return with_legend(figure, handles)


def reads(results: Results) -> Any:
    """The difference from dense by how often a row is read."""
    figure, axes = panels(len(results["models"]))
    handles: dict[str, Any] = {}
    for row, ax in zip(results["models"], axes, strict=True):
        metric = row["metrics"][0]
        sign = 1 if protocol.METRICS[metric].higher_is_better else -1
        dense = row["contenders"]["dense"]["groups"][metric]
        for name, (colour, width) in LINES.items():
            if name == "dense" or name not in row["contenders"]:
                continue
            own = row["contenders"][name]["groups"][metric]
            points = [
                (i, sign * (x - y))
                for i, (x, y) in enumerate(zip(own, dense, strict=True))
                if x is not None and y is not None
            ]
            (handles[name],) = ax.plot(
                *zip(*points, strict=True), color=colour, linewidth=width, marker=".", label=name
            )
        ax.axhline(0, color="0.35", linewidth=1)
        labels = [name.replace(" to ", "-").replace(" or more", "+") for name in results["groups"]]
        ax.set_xticks(range(len(labels)), labels, fontsize=8)
        ax.set(title=f"{row['model']}, {metric}", xlabel="reads")
        ax.grid(alpha=0.3)
    return with_legend(figure, handles)


def divergence(results: Results) -> Any:
    """The distance from dense by the gap, for each b2."""
    result = results["divergence"]
    figure, axes = panels(len(result["by b2"]))
    handles: dict[str, Any] = {}
    for (b2, by_name), ax in zip(result["by b2"].items(), axes, strict=True):
        for name, distances in by_name.items():
            colour, width = LINES[name]
            (handles[name],) = ax.plot(
                result["gaps"], distances, color=colour, linewidth=width, marker=".", label=name
            )
        ax.set(xscale="log", yscale="log", title=f"b2 = {b2}", xlabel="steps between reads")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("distance from dense")
    return with_legend(figure, handles)


# --- the page -------------------------------------------------------------------------------------


def model_table(row: dict[str, Any]) -> str:
    """All figures of a model."""
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
                cells.append(shown(result["outcome"]))
            else:
                cells += [""] * 6
            cells.append(f"{result['mean |difference|']:.2g}, {result['largest |difference|']:.2g}")
            table.append(cells)
    head = ["contender", "rate", "seconds", "metric", "mean ± sd", "against"]
    head += ["difference (95% interval)", "effect size", "p", "corrected p", "outcome"]
    head.append("distance from dense by seed: mean, largest")
    return markdown(head, table)


def at_an_end(results: Results) -> list[str]:
    """The contenders whose chosen rate is the smallest or the largest that was tried."""
    ends = {min(results["rates"]), max(results["rates"])}
    return [
        f"{row['model']}: {name} ({about['rate']:g})"
        for row in results["models"]
        for name, about in row["contenders"].items()
        if about["rate"] in ends and name not in protocol.RATE_OF
    ]


def page(results: Results) -> str:
    """The report in Markdown."""

    def picture(name: str) -> str:
        return f"![{CAPTIONS[name]}](quality-{name}.png)\n\n*{CAPTIONS[name]}*"

    parts = [
        "# When does exact matter?",
        f"{origin(results)} Written by `python -m benchmarks quality` from `quality.json`.",
    ]
    if results["quick"]:
        parts.append(
            "**A quick run**: it shows that everything runs, and its figures mean nothing."
        )
    ends = at_an_end(results)
    names = list(protocol.CONTENDERS)
    parts += [
        "\n".join(f"- {line}" for line in sentences(results)).replace(
            "(performance.md)", "(../../../docs/performance.md)"
        ),
        markdown(*outcome_rows(results)),
        "A cell is the mean difference from the reference with its 95% confidence interval, and "
        "the outcome. The reference is dense; that of lazy + decay is exact + decay.",
        *map(picture, CAPTIONS),
        "## The question, fixed before the runs",
        (protocol.__doc__ or "").strip(),
        f"Seeds: {len(results['seeds'])}. Rates: {', '.join(f'{x:g}' for x in results['rates'])}. "
        f"Betas {results['betas'][0]} and {results['betas'][1]}, eps {results['eps']:g} as in "
        f"optax, decay {results['decay']}.",
        "The chosen rate is the smallest or the largest that was tried for: "
        f"{'; '.join(ends) if ends else 'none'}.",
        markdown(["contender", "what it is"], [[n, protocol.CONTENDERS[n]] for n in names]),
        "## The data",
        *(
            f"- {name}: "
            + ", ".join(
                f"{k} {x:,}" if isinstance(x, int) else f"{k} {x}" for k, x in about.items()
            )
            for name, about in results["data"].items()
        ),
        "Ratings: of each user the last is the test and the one before it is for validation. "
        "Facts about one pair of entities are on one side of the split.",
    ]
    for row in results["models"]:
        parts.append(f"## {row['model']}")
        parts.append(
            f"On {row['data']}: {row['steps']:,} steps of {row['batch']}; tables: "
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
