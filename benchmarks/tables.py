"""The results of suites as Markdown tables, which suites print, and docs and reports show.

Each suite has a function that takes its results, as its JSON file has them, and returns the text.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.contenders import WHOLE_STEPS, short
from benchmarks.differences import CASES
from benchmarks.models import CONTENDERS
from benchmarks.quality import answer

Results = dict[str, Any]
Row = dict[str, Any]


# --- cells and sentences --------------------------------------------------------------------------


def paragraphs(*parts: str) -> str:
    return "\n\n".join(parts)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def ranged(spread: dict[str, float] | None, digits: int) -> str:
    """A median and its quartiles, or nothing."""
    if spread is None:
        return ""
    low, middle, high = (f"{spread[k]:.{digits}f}" for k in ("q25", "median", "q75"))
    return f"{middle} ({low} to {high})"


def mega(number: float | None, digits: int = 1) -> str:
    """Millions, or nothing."""
    return "" if number is None else f"{number / 1e6:,.{digits}f}"


def span(numbers: Iterable[float], decimals: int | None = None) -> str:
    """The smallest and the largest number, or only one where both are written alike.

    Without `decimals` they are written as by `two_digits`.
    """
    ordered = sorted(numbers)
    ends = ordered[0], ordered[-1]
    low, high = (two_digits(x) if decimals is None else f"{x:.{decimals}f}" for x in ends)
    return low if low == high else f"{low} to {high}"


def two_digits(number: float) -> str:
    """A number with two significant digits, or with no decimals from 10 on."""
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def versions(results: Results) -> str:
    return ", ".join(f"{k} {v}" for k, v in results["environment"].get("versions", {}).items())


def machine(results: Results) -> str:
    """The device, and on a CPU how many cores there were."""
    env = results["environment"]
    cores = f", {env['cores']} cores" if env.get("platform") == "cpu" else ""
    return env.get("device", "") + cores


def origin(results: Results, bandwidth: bool = True) -> str:
    """The device, the versions, the rounds, the commit and the date of results; the bandwidth."""
    env = results["environment"]
    rounds = f"{results['rounds']} rounds" if "rounds" in results else ""
    if "sittings" in results:
        sittings = results["sittings"]
        rounds = f"{sittings} run{'s' * (sittings != 1)} of {rounds}"
    when = [rounds, f"commit {env['commit']}" if env.get("commit") else "", env["date"]]
    parts = [machine(results), versions(results), ", ".join(filter(None, when))]
    text = "; ".join(filter(None, parts)) + "."
    if bandwidth and "bandwidth" in results:
        measured = {name: x / 1e9 for name, x in results["bandwidth"].items()}
        text += f" The memory's bandwidth is {ranged(measured, 1)} GB/s."
    return text


def bounds_table(bounds: Sequence[Row]) -> list[str]:
    """A sentence and the table of the targets for figures; nothing if there are none."""
    if not bounds:
        return []
    holds = {None: "not measured", True: "yes", False: "**no**"}
    table = []
    for row in bounds:
        measured = "" if row["measured"] is None else f"{row['measured']:.3g}"
        table.append([row["what"], row["asked"], measured, holds[row["holds"]]])
    text = "The targets that we set for these figures, and whether they are met:"
    return [text, markdown(["what", "target", "measured", "met"], table)]


# --- suites that measure --------------------------------------------------------------------------


def dense(results: Results) -> str:
    rivals = list(results["times"][0]["ratio"])
    table = []
    for row in results["times"]:
        own = ranged(row["ms"]["adamjax"], 1), ranged(row["fraction"]["adamjax"], 2)
        ratios = (ranged(row["ratio"].get(name), 2) for name in rivals)
        table.append([row["workload"], row["chain"], *own, *ratios])
    ratio_heads = (f"of {name}'s time" for name in rivals)
    return paragraphs(
        f"{origin(results)} Median (quartiles). A ratio below 1 means that adamjax is faster. Of "
        "the limit: the time to move the fewest bytes that the step can read and write, at this "
        "bandwidth, divided by the step's time.",
        markdown(["workload", "chain", "step, ms", "of the limit", *ratio_heads], table),
    )


def compiling(results: Results) -> str:
    rivals = list(results["times"][0]["ratio"])
    table = []
    for row in results["times"]:
        ratios = (ranged(row["ratio"][name], 2) for name in rivals)
        table.append([row["what"], row["chain"], ranged(row["s"]["adamjax"], 2), *ratios])
    leaves = results["workload"].split(",")[0]
    return paragraphs(
        f"{origin(results)} A step on {leaves}. A training run pays these times once. Median "
        "(quartiles).",
        markdown(["what", "chain", "s", *(f"of {name}'s time" for name in rivals)], table),
    )


def memory(results: Results) -> str:
    def state(row: Row) -> str:
        return f"{row['state_bytes'] / row['parameters']:.4f}"

    chains = []
    for row in results["dense"]:
        share = f"{row['temporary_bytes'] / row['parameter_bytes']:.4%}"
        chains.append([row["workload"], row["chain"], state(row), share])
    tables = results["tables"]
    modes = [[row["mode"], state(row), mega(row["temporary_bytes"], 2)] for row in tables]
    per_parameter = "state, bytes a parameter"
    of_parameters = "temporaries, of the parameters' bytes"
    return paragraphs(
        f"{origin(results)} What the compiler reports for a step that donates its arguments.",
        markdown(["workload", "chain", per_parameter, of_parameters], chains),
        f"A whole train step with Adam on a table of {short(tables[0]['rows'])} rows of "
        f"{tables[0]['width']}, {tables[0]['reads']:,} indices:",
        markdown(["mode", per_parameter, "temporaries, MB"], modes),
    )


def models(results: Results) -> str:
    steps = []
    for row in results["steps"]:
        model = f"{row['model']}, {mega(row['parameters'])}M"
        for name, contender in CONTENDERS.items():
            if ms := row["ms"].get(name):
                is_compared = name != "exact" and row["ratio"]
                ratio = f"{row['ratio'][name]['median']:.2g}" if is_compared else ""
                times = ranged(ms, 1), ratio, ranged(row["tables_ms"].get(name), 1)
                steps.append([model, contender, *times, mega(row["temporary_bytes"][name])])
    head = ["model, parameters", "contender", "step, ms", "time / exact's", "tables' share, ms"]
    traces = [
        [row["model"], row["caches"], ranged(row["ms"]["rows"], 0), ranged(row["ratio"], 2)]
        for row in results["traces"]
    ]
    parts = [
        f"{origin(results, bandwidth=False)} Median (quartiles). The tables' share is the step's "
        "time minus the time of a step with frozen tables.",
        markdown([*head, "temporaries, MB"], steps),
        "The time to trace a loss with row gradients, compared with `jax.value_and_grad`. Caches "
        "are warm if JAX's own functions were traced before the measurement:",
        markdown(["model", "caches", "ms", "of jax.value_and_grad's time"], traces),
    ]
    programs = []
    for row in results["programs"]:
        seconds = (ranged(x, 2) for x in row["s"].values())
        programs.append([row["model"], CONTENDERS[row["contender"]], *seconds, f"{row['lines']:,}"])
    if programs:
        head = ["model", "contender", "trace and lower, s", "compile, s", "lines of StableHLO"]
        parts += [
            "How long it takes to trace, lower and compile a step with empty caches, and how long "
            "its program is:",
            markdown(head, programs),
        ]
    return paragraphs(*parts, *bounds_table(results["bounds"]))


def differences(results: Results) -> str:
    systems = list(results["rows"][0]["numbers"])
    table = []
    for row in results["rows"]:
        steps, how_to, _ = CASES[row["key"]]
        table.append([steps, *(f"{row['numbers'][system]}" for system in systems), how_to])
    header = ["case", *systems, "how to get the others' result in adamjax"]
    return paragraphs(markdown(header, table), f"{versions(results)}.")


# --- the rows suite -------------------------------------------------------------------------------

KINDS = ("Zipf", "uniform")  # how indices are drawn
# By case: rows and width of the table, how many indices a step reads, and how they are drawn.
Cases = dict[tuple[int, int, int, str], Row]


def _by_case(results: Results) -> Cases:
    return {(r["rows"], r["width"], r["reads"], r["indices"]): r for r in results.get("times", [])}


def main_rows(results: Results) -> list[Row]:
    """The rows of the main case, one for each kind of indices; none if there are no results.

    The main case is the one that the docs quote, or else the largest of those with the most
    contenders.
    """
    cases, quoted = _by_case(results), (1_000_000, 64, 8192)
    if not cases:
        return []
    main = max(cases, key=lambda key: (key[:3] == quoted, len(cases[key]["ms"]), key))[:3]
    return [cases[*main, kind] for kind in KINDS if (*main, kind) in cases]


def _times_as_long(row: Row, name: str, own: str = "exact") -> str:
    """How many times as long as `own` a contender takes."""
    if name not in row["ratio"].get(own, {}):
        return "?"
    return two_digits(1 / row["ratio"][own][name]["median"])


def _contenders_table(cases: Sequence[Row]) -> str:
    """All contenders of a case, with each kind of indices."""

    def cells(row: Row, name: str) -> list[str]:
        own = "exact step" if "step" in name else "exact"
        if name not in row["ms"]:
            return [""] * 3
        times = "" if name == own else _times_as_long(row, name, own)
        return [ranged(row["ms"][name], 1), times, f"{row['fraction'][name]['median']:.2g}"]

    # The compiler's figures are those of the first case: they do not depend on the indices.
    first = cases[0]
    table = []
    for name in first["ms"]:
        times = (cell for row in cases for cell in cells(row, name))
        temporaries = mega(first["temporary_bytes"].get(name))
        table.append([name, *times, temporaries, mega(first["peak_bytes"].get(name), 0)])
    head = ["contender"]
    for row in cases:
        head += [f"{row['indices']}, ms", "time / exact's", "of the limit"]
    return markdown([*head, "temporaries, MB", "peak memory, MB"], table)


def rows(results: Results) -> str:
    """The tables of the rows suite: its main cases, their bounds, `exact` in every case."""
    cases, main = _by_case(results), main_rows(results)
    bounds = bounds_table(results["bounds"])
    if not main:
        return paragraphs(*bounds)
    how = f"{origin(results)} Cases that are only in the section's last table were measured in "
    how += f"one run of {results['grid_rounds']} rounds."
    if alone := sum(not row["in_turn"] for row in results["times"]):
        how += f" In {alone} cases the embedding tables of all contenders did not fit in memory "
        how += "together, so the contenders ran one after another."
    for row in results["times"]:
        how += "".join(f" {row['case']}: {x}: {why}." for x, why in row["failed"].items())
    how += " `exact step` and `lazy step` are whole train steps, which also read the rows and "
    how += "differentiate a loss. In the row `lazy step`, the ratio is to `exact step`."
    parts = [how]
    first = main[0]["rows"], main[0]["width"], main[0]["reads"]
    # The other cases in which whole train steps were measured too.
    others = {key[:3] for key, row in cases.items() if WHOLE_STEPS.keys() & row["ms"]} - {first}
    kinds = [row["indices"] for row in main]
    for case in (first, *sorted(others)):
        same_size = [cases[*case, kind] for kind in kinds if (*case, kind) in cases]
        title = f"{short(case[0])} rows of {case[1]} columns, {case[2]:,} indices in a step; "
        rounds = f"{same_size[0]['rounds']} rounds in all:"
        parts.append(title + ("median (quartiles):" if case == first else rounds))
        parts.append(_contenders_table(same_size))
    text = "The time of `exact` in ms, with n indices of rows of D elements, for tables of several "
    text += "sizes. In brackets, how many times as long others take: first optax with dense "
    text += "gradients, then torch's SparseAdam."

    def cell(row: Row | None) -> str:
        if row is None or "exact" not in row["ms"]:
            return ""
        others = f"{_times_as_long(row, 'optax')}, {_times_as_long(row, 'torch sparse')}"
        return f"{row['ms']['exact']['median']:.1f} ({others})"

    columns = [(kind, size) for kind in kinds for size in sorted({key[0] for key in cases})]
    grid = [
        [str(d), f"{n:,}", *(cell(cases.get((size, d, n, kind))) for kind, size in columns)]
        for d, n in sorted({key[1:3] for key in cases})
    ]
    head = ["D", "n", *(f"{kind}, {size:,}" for kind, size in columns)]
    return paragraphs(*parts, *bounds, text, markdown(head, grid))


# --- compilers ------------------------------------------------------------------------------------


def figure(report: Row, name: str, digits: int = 0, scale: float = 1.0) -> str:
    """A figure of a compiler's report, if it compiled the case and the figure was read."""
    if "failed" in report:
        return "failed"
    return f"{report[name] / scale:,.{digits}f}" if name in report else "not counted"


def figure_beside_optax(row: Row, name: str, digits: int) -> str:
    own, other = (figure(row["said"][package], name, digits) for package in ("adamjax", "optax"))
    return f"{own} ({other})"


def _why_not_counted(results: Results) -> list[str]:
    """Why the bytes of some steps on tables are not counted, if any are not."""
    reports = [report for row in results["rows"] for report in row["said"].values()]
    if all("bytes" in report or "failed" in report for report in reports):
        return []
    return [
        "Not counted: one instruction joins rows of several tables, and the compiled program does "
        "not show how many bytes it moves from each."
    ]


def tpu(results: Results) -> str:
    """The tables of the TPU compiler's figures, with a cell for each chip."""

    def largest(reports: Iterable[Row], name: str) -> float:
        return max(report.get(name, math.nan) for report in reports)

    # The rows of all chips by workload and chain, and the reports of all chips by width and mode.
    dense_cases: dict[tuple[str, str], list[Row]] = {}
    for row in results["dense"]:
        dense_cases.setdefault((row["workload"], row["chain"]), []).append(row)
    row_cases: dict[tuple[str, str], list[Row]] = {}
    for row in results["rows"]:
        for mode, report in row["said"].items():
            row_cases.setdefault((str(row["width"]), mode), []).append(report)

    dense_table, row_table = [], []
    for case, of_chips in dense_cases.items():
        cells = []
        by_package = {x: [row["said"][x] for row in of_chips] for x in ("adamjax", "optax")}
        for row, ours, theirs in zip(of_chips, *by_package.values(), strict=True):
            ratio = ours.get("cycles", math.nan) / theirs.get("cycles", math.nan)
            cells.append(f"{figure_beside_optax(row, 'bytes', 2)}, {ratio:.3f}")
        own, other = (largest(reports, "temporary_bytes") for reports in by_package.values())
        dense_table.append([*case, *cells, f"{own:.2f} ({other:.2f})"])
    for case, reports in row_cases.items():
        moved = (figure(report, "bytes", 0, 1e6) for report in reports)
        sizes = mega(largest(reports, "arguments"), 0), mega(largest(reports, "temporary"))
        makers = [report.get("makers", {}) for report in reports]
        copies = max(sum(x.get(k, 0) for k in ("copy", "copy-start", "transpose")) for x in makers)
        row_table.append([*case, *moved, *sizes, str(copies)])

    chips = list(dict.fromkeys(row["chip"] for row in results["dense"] + results["rows"]))
    moved_heads = (f"{chip}: moved" for chip in chips)
    heads = ["D", "mode", *moved_heads, "arguments", "temporaries", "copies of whole arrays"]
    return paragraphs(
        f"**The compiler's estimates, not times**; {versions(results)}, "
        f"{results['environment']['date']}. For each chip: the bytes per parameter that move "
        "between the chip and its memory (optax's in brackets), then the estimated cycles as a "
        "ratio to optax's. Temporaries are counted in the chip's main and fast memory "
        "together, and given for the chip that needs the most.",
        markdown(["workload", "chain", *chips, "temporaries, bytes a parameter"], dense_table),
        "A train step that reads 8,192 rows of a row-major table of 1M rows and D columns, "
        "unless the mode names other numbers; in MB. Bytes include the padding of rows. "
        "Arguments and temporaries are given for the chip that needs the most.",
        markdown(heads, row_table),
        *_why_not_counted(results),
    )


def gpu(results: Results) -> str:
    digits = {"kernels": 0, "bytes": 2, "temporary_bytes": 2}
    dense_table = []
    for row in results["dense"]:
        cells = (figure_beside_optax(row, name, n) for name, n in digits.items())
        dense_table.append([row["workload"], row["chain"], *cells])
    row_table = []
    for row in results["rows"]:
        for kind, report in row["said"].items():
            counts = (figure(report, name) for name in ("kernels", "round_trips"))
            sizes = figure(report, "bytes", 0, 1e6), figure(report, "temporary_bytes", 1, 1e6)
            row_table.append([f"{short(row['rows'])} x {row['width']}", kind, *counts, *sizes])
    dense_heads = ["workload", "chain", "kernels", "bytes", "temporaries, bytes per parameter"]
    heads = ["table", "mode", "kernels", "waits for the host", "moved", "temporaries"]
    return paragraphs(
        f"**What the compiler reports for an {results['device']}, not times**; "
        f"{versions(results)}, {results['environment']['date']}. optax's figures are in "
        "brackets. Bytes, per parameter, are those that move between the GPU and its memory.",
        markdown(dense_heads, dense_table),
        "A train step that reads 8,192 rows of a table, unless the mode names another number. "
        "Bytes are in MB:",
        markdown(heads, row_table),
        *_why_not_counted(results),
    )


# --- suites that train ----------------------------------------------------------------------------


def quality(results: Results) -> str:
    """The answers of the quality suite, a line for each question."""
    lines = "\n".join(f"- {line}" for line in answer.sentences(results))
    page = f"benchmarks/results/{results['environment'].get('platform', 'cpu')}/quality.md"
    models = ", ".join(row["model"] for row in results["models"])
    return (
        f"{len(results['models'])} models ({models}), {len(results['seeds'])} seeds each. "
        f"{origin(results)} "
        f"[The report](https://github.com/adamjax/adamjax/blob/main/{page}) has every outcome.\n\n"
        f"{lines}"
    )


def float64(results: Results) -> str:
    names = list(results["metrics"][0]["contenders"])
    metrics, weights = [], []
    for row in results["metrics"]:
        cells = []
        for compared in (row["contenders"][name] for name in names):
            share = f"{compared['same']:.1%}" if compared["same"] < 1 else "all"
            cells.append(f"{share}, {compared['largest']:.1g}")
        metrics.append([row["model"], row["metric"], *cells])
    for row in results["weights"]:
        by_seed = [row["contenders"][name] for name in names]
        cells = [f"{statistics.median(x):.1g}, {max(x):.1g}" for x in by_seed]
        weights.append([row["model"], *cells])
    return paragraphs(
        f"{origin(results)} Each cell gives two numbers over all epochs of "
        f"{len(results['seeds'])} seeds: how often the metric is the same as with optax's "
        "dense Adam, and the largest relative difference. Losses count as equal if they "
        f"differ by at most {results['rounding']:g}; all other metrics must be exactly equal.",
        markdown(["model", "metric", *names], metrics),
        "The largest difference of any weight from the same weight under optax's dense Adam, "
        "after the last epoch: the median over the seeds, and the maximum.",
        markdown(["model", *names], weights),
    )


def narrow(results: Results) -> str:
    """The errors of moments and updates in few bits, and the losses of training."""
    moments, training = [], []
    for form in dict.fromkeys(case["format"] for case in results["moments"]):
        cases = [case for case in results["moments"] if case["format"] == form]
        m, v = (f"{statistics.fmean(case['biased'][x] for case in cases):.2%}" for x in ("m", "v"))
        updates = [case["update"] for case in cases]
        moments.append([form, m, v, f"{min(updates):.1%} to {max(updates):.1%}"])
    tasks = results["tasks"]
    formats = dict.fromkeys(name for task in tasks.values() for name in task["formats"])
    for name in [name for name in formats if name != "float32"]:
        cells = []
        for task in tasks.values():
            result = task["formats"][name]
            share = result["difference"] / task["learned"]
            cell = f"{result['difference']:+.4f} ({share:+.1%})"
            cells.append(cell if result["same"] else f"**{cell}**")
        training.append([name, *cells])
    learned = ", ".join(
        f"the loss of the {name} falls by {task['learned']:.3f} from {task['before']:.3f} "
        f"(standard deviation {task['spread']:.4f})"
        for name, task in tasks.items()
    )
    return paragraphs(
        origin(results),
        f"**Moments** are compared with float64 at every tenth step of {results['steps']:,}, "
        "for gradients of several kinds from 1e-9 to 1e4. At each of these steps, the error is "
        "averaged over all elements. Columns m and v test for a bias. They give the share of "
        "these steps in which this mean error is more than three standard errors away from 0. "
        "Without a bias, about 0.3% is expected. The steps and cases are not independent, "
        "because v averages over about 1,000 steps, and all cases round with the same random "
        "bits. So a share may be higher or lower by chance. Column update: the mean absolute "
        "error of an update, relative to its size.",
        markdown(["moments", "m", "v", "update"], moments),
        f"**Training**, {results['trained']} steps: the held-out loss minus the loss with "
        f"float32, the mean over {results['seeds']} seeds. In brackets: this difference as a "
        "share of how much the loss falls under float32. A difference is bold if it is above "
        f"{results['margin']:.0%} of that fall and above the standard deviation over the "
        f"seeds. In float32, {learned}.",
        markdown(["format", *tasks], training),
    )


SUITES = {
    "dense": dense,
    "rows": rows,
    "compile": compiling,
    "memory": memory,
    "models": models,
    "quality": quality,
    "float64": float64,
    "narrow": narrow,
    "differences": differences,
    "tpu": tpu,
    "gpu": gpu,
}
