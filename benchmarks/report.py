"""A page about the results in a folder: a summary, then suite by suite, with plots.

`python -m benchmarks report [FOLDER]` writes `report.md` and its plots beside the results, from
the results alone. `--compare A.json B.json` prints instead what changed between two results of one
suite, and whether by more than the noise.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import compare, plots, tables
from benchmarks.contenders import OURS
from benchmarks.measure import RESULTS
from benchmarks.tables import span
from benchmarks.train.options import UserError

# suite: its title, and a sentence or two about it
SECTIONS = {
    "dense": (
        "Dense steps",
        "One Adam step on all parameters, jitted, with donated arguments, compared with the same "
        "step of other packages: on one large leaf, on a transformer's leaves, on many small ones. "
        'With "clip", gradients are clipped by their global norm first.',
    ),
    "rows": (
        "Rows of a table",
        "One Adam step on an embedding table of which a batch reads a few rows. `exact` is "
        "`exact_rows`, whose result is the dense optimizer's; `lazy` leaves the other rows where "
        'they are; `dense` is `rows="dense"`. A whole step ("exact step", "lazy step") reads the '
        "rows and differentiates a loss as well. If indices follow Zipf's law, most of them are of "
        "the same few rows.",
    ),
    "compile": (
        "Compilation",
        "What a program costs once: to trace and lower a step in Python, and to compile it.",
    ),
    "memory": (
        "Memory",
        "What a step needs besides parameters and gradients: the optimizer's state, which stays in "
        "memory between steps, and temporaries, which a step allocates and frees.",
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

Results = dict[str, tables.Results]


def read(folder: Path) -> Results:
    """The results in a folder, by suite, of the suites that a report is about."""
    paths = {suite: folder / f"{suite}.json" for suite in SECTIONS}
    results = {suite: compare.loaded(path) for suite, path in paths.items() if path.exists()}
    if not results:
        raise UserError(
            f"{folder} has no results: `python -m benchmarks all` measures everything, and "
            f"`python -m benchmarks SUITE` one of {', '.join(SECTIONS)}"
        )
    return results


# --- the summary: its figures are those of the results, their shares or reciprocals ---------------


def _rows_of(results: Results, suite: str, part: str = "times") -> list[dict[str, Any]]:
    return results.get(suite, {}).get(part, [])


def _speed(results: Results) -> Iterator[str]:
    """How fast steps are."""
    dense, shares = _rows_of(results, "dense"), []
    for name in dense[0]["ratio"] if dense else ():
        ratios = [row["ratio"][name]["median"] for row in dense if name in row["ratio"]]
        shares.append(f"{span(ratios, 2)} of the time with {NAMES.get(name, name)}")
    if shares:
        yield f"A dense step takes {', '.join(shares)}."
    for row in tables.main_rows(results.get("rows", {})):
        ratios, others = row["ratio"].get("exact", {}), ""
        for name in ("optax", "torch sparse"):
            if name in ratios:
                times = tables.two_digits(1 / ratios[name]["median"])
                others += f", that of {NAMES.get(name, name)} {times} times as long"
        yield (
            f"With {row['reads']:,} indices ({row['indices']}) of a table of {row['rows']:,} rows, "
            f"a step of `exact_rows` takes {row['ms']['exact']['median']:.1f} ms{others}."
        )
    models = {row["model"]: row["ratio"] for row in _rows_of(results, "models", "steps")}
    if times := [f"{m}: {x['optax']['median']:.1f}" for m, x in models.items() if "optax" in x]:
        yield (
            "The time of a train step with optax, divided by that with `exact_rows`: "
            f"{'; '.join(times)}."
        )
    for what in ("trace and lower", "compile"):
        rows = [row for row in _rows_of(results, "compile") if row["what"] == what]
        if medians := [row["ratio"]["optax"]["median"] for row in rows if row["ratio"]]:
            yield f"To {what} a step takes {span(medians, 2)} of the time with optax."


def _limits(results: Results) -> Iterator[str]:
    """How close steps come to the limit of the bandwidth, and how much memory they need."""

    def limit(suite: str) -> str:
        speed = results[suite]["bandwidth"]["median"] / 1e9
        return f"of the speed that the memory's bandwidth, {speed:.1f} GB/s, allows"

    if dense := _rows_of(results, "dense"):
        shares = [row["fraction"]["adamjax"]["median"] for row in dense]
        yield f"A dense step reaches {span(shares, 2)} {limit('dense')}."
    for row in tables.main_rows(results.get("rows", {})):
        names = [name for name in ("exact", "lazy", "dense") if name in row["fraction"]]
        each = ", ".join(f"`{name}` {row['fraction'][name]['median']:.2f}" for name in names)
        yield f"Steps on rows ({row['indices']} indices): {each} {limit('rows')}."
    if memory := results.get("memory"):
        most = {False: 0.0, True: 0.0}  # of the chains without `grouped`, and with it
        for row in memory["dense"]:
            groups = "grouped" in row["chain"]
            most[groups] = max(most[groups], 100 * row["temporary_bytes"] / row["parameter_bytes"])
        yield (
            f"A dense step's temporaries take {most[False]:.1f}% of the parameters' bytes at most, "
            f"{most[True]:.1f}% with `grouped`."
        )
        modes = (f"{x['temporary_bytes'] / 1e6:,.1f} MB ({x['mode']})" for x in memory["tables"])
        yield f"Temporaries of a train step on a table: {', '.join(modes)}."


def _comparisons(results: Results) -> Iterator[tuple[str, str, str, dict[str, float]]]:
    """Our step, the other package, the case, and our time divided by theirs."""
    for row in _rows_of(results, "dense"):
        for name, ratio in row["ratio"].items():
            yield "A dense step", name, f"{row['workload']}, {row['chain']}", ratio
    for row in _rows_of(results, "rows"):
        case = f"{row['rows']:,} rows of {row['width']}, {row['reads']:,} {row['indices']} indices"
        for name, ratio in row["ratio"].get("exact", {}).items():
            if name not in OURS:
                yield "`exact_rows`", name, case, ratio
    for row in _rows_of(results, "compile"):
        for name, ratio in row["ratio"].items():
            yield f"To {row['what']} a step", name, row["chain"], ratio
    for row in _rows_of(results, "models", "steps"):
        if ratio := row["ratio"].get("optax"):  # optax's time divided by ours
            ours = {"q25": 1 / ratio["q75"], "median": 1 / ratio["median"]}
            yield "A train step with `exact_rows`", "optax", row["model"], ours


def _slow_cases(results: Results) -> Iterator[str]:
    """The targets that are missed, and the steps that are slower than another package's."""
    bounds = _rows_of(results, "rows", "bounds") + _rows_of(results, "models", "bounds")
    measured = [row for row in bounds if row["holds"] is not None]
    missed = [row for row in measured if not row["holds"]]
    if missed:
        yield f"Of {len(measured)} targets, {len(missed)} are missed:" + "".join(
            f"\n  - {row['what']}: {row['measured']:.3g} (target: {row['asked']})" for row in missed
        )
    elif measured:
        yield f"All {len(measured)} targets are met."
    cases: dict[str, dict[str, list[tuple[float, str]]]] = {}
    for what, name, case, ratio in _comparisons(results):
        if ratio["q25"] > 1:  # slower by more than the noise
            cases.setdefault(what, {}).setdefault(name, []).append((ratio["median"], case))
    for what, by_name in cases.items():
        lines = [f"{what} is slower than"]
        for name, slower in by_name.items():
            ratio, case = max(slower)
            times = f"{ratio:.1f}" if ratio > 2 else f"{ratio:.2f}"
            many = "one case" if len(slower) == 1 else f"{len(slower)} cases, at worst"
            lines.append(f"  - {NAMES.get(name, name)} in {many}: {times} times the time ({case})")
        yield "\n".join(lines)
    if not cases:
        yield "Nothing takes longer than with another package by more than the noise."


def summary(results: Results) -> str:
    parts = []
    if quick := [suite for suite, x in results.items() if x.get("quick")]:
        parts.append(
            f"**Quick runs: {', '.join(quick)}.** Tiny sizes, which show that everything runs; "
            "their times mean nothing."
        )
    real = {suite: x for suite, x in results.items() if suite not in quick}
    titles = {
        "How fast steps are": _speed,
        "How close steps come to the limit, and how much memory they need": _limits,
        "What is slow": _slow_cases,
    }
    for title, lines in titles.items() if real else ():
        parts += [f"**{title}**", "\n".join(f"- {line}" for line in lines(real))]
    return "\n\n".join(parts)


def text(results: Results) -> str:
    def picture(plot: str) -> str:
        return f"![{plots.CAPTIONS[plot]}](report-{plot}.png)\n\n*{plots.CAPTIONS[plot]}*"

    devices = sorted({tables.machine(x) for x in results.values()})
    parts = [
        f"# adamjax on {' and '.join(devices)}",
        "The Adam of adamjax compared with that of other packages. Written by `python -m "
        "benchmarks report` from the results in this folder. A time is the median of several "
        "rounds, in which contenders take turns (quartiles in brackets); a ratio is taken within a "
        "round. A difference counts as more than noise if 1 is outside the ratio's quartiles.",
        "## In short",
        summary(results),
    ]
    if {"dense", "rows"} & results.keys():
        parts.append(picture("limit"))
    for suite, (title, about) in SECTIONS.items():
        parts.append(f"## {title}")
        if suite not in results:
            parts.append(f"Not measured: `python -m benchmarks {suite}`.")
            continue
        parts.append(about)
        if suite in plots.CAPTIONS:
            parts.append(picture(suite))
        parts.append(tables.SUITES[suite](results[suite]))
    return "\n\n".join(parts) + "\n"


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    add = parser.add_argument
    what = "the results (default benchmarks/results/PLATFORM, of what JAX finds)"
    add("folder", type=Path, nargs="?", metavar="FOLDER", help=what)
    what = "print what changed from A to B, results of one suite"
    add("--compare", type=Path, nargs=2, metavar=("A.json", "B.json"), help=what)
    add("--everything", action="store_true", help="with --compare: the rest too")
    args = parser.parse_args(argv)
    if args.compare:
        old, new = (compare.loaded(path) for path in args.compare)
        print(compare.compared(old, new, args.everything))
        return 0
    if not args.folder:
        import jax

        args.folder = RESULTS / jax.default_backend()
    results = read(args.folder)
    drawn = plots.draw(results, args.folder)
    (args.folder / "report.md").write_text(text(results))
    print(f"written to {args.folder / 'report.md'}, with {', '.join(drawn)}")
    return 0
