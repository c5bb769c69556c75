"""Writes the measured tables into README.md, from the committed results and nothing else."""

import argparse
import json
import math
import re
from pathlib import Path
from typing import Any

from benchmarks.contenders import EVERYONE, WHOLE, short
from benchmarks.measure import RESULTS
from benchmarks.models import CONTENDERS
from benchmarks.rows import bounds

__all__ = ["SUITES", "asked_of_rows", "main", "main_case", "rendered"]

README = Path(__file__).parent.parent / "README.md"


def _range(spread: dict[str, float], digits: int) -> str:
    low, middle, high = (f"{spread[k]:.{digits}f}" for k in ("q25", "median", "q75"))
    return f"{middle} ({low} to {high})"


def _median(spread: dict[str, float] | None) -> str:
    return "" if spread is None else f"{spread['median']:.2g}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _where(results: dict[str, Any], *, bandwidth: bool = False) -> str:
    """A sentence: where, with what, how often and when."""
    env = results["environment"]
    parts = [env["device"] + (f", {env['cores']} cores" if env["platform"] == "cpu" else "")]
    parts.append(", ".join(f"{k} {v}" for k, v in env["versions"].items()))
    rounds = f"{results['rounds']} rounds" if "rounds" in results else ""
    if "sittings" in results:
        sittings = results["sittings"]
        rounds = f"{sittings} sitting{'s' * (sittings != 1)} of {rounds}"
    when = [rounds, f"commit {env['commit']}" if env.get("commit") else "", env["date"]]
    parts.append(", ".join(filter(None, when)))
    text = "; ".join(filter(None, parts)) + "."
    if bandwidth and "bandwidth" in results:
        measured = {name: x / 1e9 for name, x in results["bandwidth"].items()}
        text += f" The memory's bandwidth is {_range(measured, 1)} GB/s."
    return text


def dense(results: dict[str, Any]) -> str:
    """The table of the dense suite."""
    rivals = list(results["times"][0]["ratio"])
    limits = "bandwidth" in results
    steps = [
        [
            row["workload"],
            row["chain"],
            _range(row["ms"]["adamjax"], 1),
            *([_range(row["fraction"]["adamjax"], 2)] if limits else []),
            *(_range(row["ratio"][name], 2) if name in row["ratio"] else "" for name in rivals),
        ]
        for row in results["times"]
    ]
    text = "Median (quartiles); a ratio below 1 means that adamjax is faster."
    if limits:
        text += " Of the limit: the least bytes that the step must move at this bandwidth, by the "
        text += "step's time."
    head = ["workload", "chain", "step, ms", *(["of the limit"] if limits else [])]
    return "\n\n".join(
        [
            f"{_where(results, bandwidth=True)} {text}",
            _table([*head, *(f"of {name}'s time" for name in rivals)], steps),
        ]
    )


def compiling(results: dict[str, Any]) -> str:
    """The table of the compile suite."""
    table = [
        [
            row["what"],
            row["chain"],
            _range(row["s"]["adamjax"], 2),
            *(_range(ratio, 2) for ratio in row["ratio"].values()),
        ]
        for row in results["times"]
    ]
    rivals = [f"of {name}'s time" for name in results["times"][0]["ratio"]]
    return "\n\n".join(
        [
            f"{_where(results)} {results['workload'].split(',')[0]}, once per program; median "
            "(quartiles).",
            _table(["what", "chain", "s", *rivals], table),
        ]
    )


def memory(results: dict[str, Any]) -> str:
    """The tables of the memory suite."""

    def per_parameter(row: dict[str, Any]) -> str:
        return f"{row['state_bytes'] / row['parameters']:.4f}"

    chains = [
        [
            row["workload"],
            row["chain"],
            per_parameter(row),
            f"{row['temporary_bytes'] / row['parameter_bytes']:.4%}",
        ]
        for row in results["dense"]
    ]
    head = ["state, bytes a parameter", "temporaries, of the parameters"]
    parts = [
        f"{_where(results)} Of a donated step, as the compiler reports it.",
        _table(["workload", "chain", *head], chains),
    ]
    if results.get("tables"):
        first = results["tables"][0]
        where = f"{short(first['rows'])} rows of {first['width']}, {first['reads']:,} indices"
        modes = [
            [row["mode"], per_parameter(row), f"{row['temporary_bytes'] / 1e6:,.2f}"]
            for row in results["tables"]
        ]
        parts.append(f"A whole train step with Adam on a table of {where}:")
        parts.append(_table(["the table's mode", head[0], "temporaries, MB"], modes))
    return "\n\n".join(parts)


def _mega(number: float | None, digits: int = 1) -> str:
    return "" if number is None else f"{number / 1e6:,.{digits}f}"


Key = tuple[int, int, int, str]


def main_case(found: dict[Key, Any]) -> tuple[int, int, int]:
    """Rows, width and indices of the first case that all contenders are in."""
    if (1_000_000, 64, 8192, "Zipf") in found:
        return 1_000_000, 64, 8192
    rows, width, reads, _ = max(found, key=lambda key: (len(found[key]["ms"]), key))
    return rows, width, reads


def _main_cases(found: dict[Key, Any]) -> list[tuple[int, int, int]]:
    """All cases that whole steps are in as well, the first one in front."""
    first = main_case(found)
    others = {key[:3] for key, row in found.items() if any(name in row["ms"] for name in WHOLE)}
    return [first, *sorted(others - {first})]


def asked_of_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The bounds of the rows suite that are held to today; older results have others as well."""
    known = {row["what"] for row in bounds([], [])}
    return [row for row in results.get("bounds", ()) if row["what"] in known]


def _bounds(asked: list[dict[str, Any]]) -> list[str]:
    """The table of bounds, if there are any, and what is said above it."""
    if not asked:
        return []
    table = [
        [
            row["what"],
            row["asked"],
            "" if row["measured"] is None else f"{row['measured']:.3g}",
            {None: "not measured", True: "yes", False: "**no**"}[row["holds"]],
        ]
        for row in asked
    ]
    return ["The bounds it is held to:", _table(["what", "bound", "measured", "holds"], table)]


def _times(row: dict[str, Any], name: str, own: str = "exact") -> str:
    """How many times as long as ours a contender takes."""
    if name not in row["ratio"].get(own, {}):
        return "?"
    longer = 1 / row["ratio"][own][name]["median"]
    return f"{longer:.2g}" if longer < 10 else f"{longer:.0f}"


def _contenders(cases: dict[str, dict[str, Any]], limits: bool) -> str:
    """The table of all contenders in a case, with each kind of indices."""

    def taken(row: dict[str, Any], name: str) -> list[str]:
        own = "exact step" if "step" in name else "exact"
        if name not in row["ms"]:
            return ["", "", *([""] if limits else [])]
        cells = [_range(row["ms"][name], 1), "" if name == own else _times(row, name, own)]
        return [*cells, *([f"{row['fraction'][name]['median']:.2g}"] if limits else [])]

    first = next(iter(cases.values()))
    table = [
        [
            name,
            *(cell for row in cases.values() for cell in taken(row, name)),
            _mega(first["temporary_bytes"].get(name)),
            _mega(first["peak_bytes"].get(name), 0),
        ]
        for name in first["ms"]
        if name in EVERYONE
    ]
    limit = ["of the limit"] if limits else []
    heads = [(f"{kind}, ms", "of exact's time", *limit) for kind in cases]
    memory = ("temporaries, MB", "most memory, MB")
    return _table(["contender", *(name for head in heads for name in head), *memory], table)


def rows(results: dict[str, Any]) -> str:
    """The tables of the rows suite: its main cases, what was asked of them, `exact` everywhere."""
    found = {(r["rows"], r["width"], r["reads"], r["indices"]): r for r in results["times"]}
    (count, width, reads), *others = _main_cases(found)
    kinds = [k for k in ("Zipf", "uniform") if (count, width, reads, k) in found]
    limits = "bandwidth" in results
    sizes = sorted({key[0] for key in found})
    columns = [(kind, size) for kind in kinds for size in sizes]

    def cell(row: dict[str, Any] | None) -> str:
        if row is None or "exact" not in row["ms"]:
            return ""
        both = f"{_times(row, 'optax')}, {_times(row, 'torch sparse')}"
        return f"{row['ms']['exact']['median']:.1f} ({both})"

    grid = [
        [str(d), f"{n:,}", *(cell(found.get((size, d, n, kind))) for kind, size in columns)]
        for d, n in sorted({key[1:3] for key in found})
    ]
    where = _where(results, bandwidth=True)
    where += f" The grid's other cases: {results['grid_rounds']} rounds."
    if alone := sum(not row["in_turn"] for row in results["times"]):
        where += f" In {alone} cases, whose tables did not fit in memory at once, the contenders "
        where += "came one after another."
    for row in results["times"]:
        failed = {name: why for name, why in row["failed"].items() if name in EVERYONE}
        where += "".join(f" {row['case']}: {name}: {why}." for name, why in failed.items())
    parts = [
        f"{where} {short(count)} rows of {width}, {reads:,} indices; median (quartiles). The whole "
        "steps read the rows and differentiate a loss as well; their time is compared with each "
        "other's.",
        _contenders({kind: found[count, width, reads, kind] for kind in kinds}, limits),
    ]
    for case in others:
        here = {kind: found[*case, kind] for kind in kinds if (*case, kind) in found}
        rounds = next(iter(here.values()))["rounds"]
        parts.append(
            f"{short(case[0])} rows of {case[1]}, {case[2]:,} indices, {rounds} rounds in all:"
        )
        parts.append(_contenders(here, limits))
    parts += _bounds(asked_of_rows(results))
    parts.append(
        "`exact` in ms, by the table's rows (in brackets how many times as long optax with "
        "dense gradients and torch's SparseAdam take):"
    )
    parts.append(_table(["D", "n", *(f"{kind}, {size:,}" for kind, size in columns)], grid))
    return "\n\n".join(parts)


def models(results: dict[str, Any]) -> str:
    """The tables of the models suite."""
    steps = [
        [
            f"{row['model']}, {row['parameters'] / 1e6:,.1f}M",
            contender,
            _range(ms, 1),
            "" if name == "exact" else _median(row["ratio"].get(name)),
            _range(row["tables_ms"][name], 1) if name in row["tables_ms"] else "",
            _mega(row["temporary_bytes"][name]),
        ]
        for row in results["steps"]
        for name, contender in CONTENDERS.items()
        if (ms := row["ms"].get(name))
    ]
    traces = [
        [row["model"], row["caches"], _range(row["ms"]["rows"], 0), _range(row["ratio"], 2)]
        for row in results["traces"]
    ]
    programs = [
        [
            row["model"],
            CONTENDERS[row["contender"]],
            *(_range(x, 2) for x in row["s"].values()),
            f"{row['lines']:,}",
        ]
        for row in results.get("programs", ())
    ]
    made: list[str] = []
    if programs:
        head = ["model", "contender", "trace and lower, s", "compile, s", "lines of StableHLO"]
        made = ["A step as a program, made with nothing in a cache:", _table(head, programs)]
    head = ["model, parameters", "contender", "step, ms", "by exact's"]
    return "\n\n".join(
        [
            f"{_where(results)} Median (quartiles). What the tables add is the step's time less "
            "that of one with frozen tables.",
            _table([*head, "of it tables, ms", "temporaries, MB"], steps),
            "The time to trace a loss with row gradients, by that of `jax.value_and_grad`, with "
            "JAX's own functions traced before (caches warm) and not:",
            _table(["model", "caches", "ms", "of jax.value_and_grad's time"], traces),
            *made,
            *_bounds(results.get("bounds", [])),
        ]
    )


def differences(results: dict[str, Any]) -> str:
    """The table of what other packages do otherwise."""
    systems = list(results["rows"][0]["numbers"])
    table = [
        [row["what"], *(f"{row['numbers'][system]}" for system in systems), row["theirs"]]
        for row in results["rows"]
    ]
    versions = ", ".join(f"{k} {v}" for k, v in results["environment"]["versions"].items())
    return f"{_table(['what is done', *systems, 'to get theirs'], table)}\n\n{versions}."


def _said(said: dict[str, Any], name: str, digits: int = 0, scale: float = 1.0) -> str:
    """A figure of a compiler's, if it compiled and this figure was read."""
    if "failed" in said:
        return "failed"
    return f"{said[name] / scale:,.{digits}f}" if name in said else "not counted"


def tpu(results: dict[str, Any]) -> str:
    """The tables of what the TPU's compiler says, and of times, if there are any."""
    chips = list(dict.fromkeys(row["chip"] for row in results["dense"] + results["rows"]))

    found: dict[Any, dict[str, Any]] = {}
    for row in results["dense"]:
        found.setdefault((row["workload"], row["chain"]), {})[row["chip"]] = row["said"]
    dense = []
    for key, by_chip in found.items():
        line = list(key)
        for chip in chips:
            said = by_chip[chip]
            both = [_said(said[name], "bytes", 2) for name in _PAIR]
            ratio = "failed"
            if "failed" not in both:
                ratio = f"{said['adamjax']['cycles'] / said['optax']['cycles']:.3f}"
            line.append(f"{both[0]} ({both[1]}), {ratio}")
        most = [
            max(x[name].get("temporary_bytes", math.nan) for x in by_chip.values())
            for name in _PAIR
        ]
        dense.append([*line, f"{most[0]:.2f} ({most[1]:.2f})"])
    modes: dict[Any, dict[str, Any]] = {}
    for row in results["rows"]:
        for kind, said in row["said"].items():
            modes.setdefault((row["width"], kind), {})[row["chip"]] = said
    rows = []
    for (width, kind), by_chip in modes.items():
        most = {
            name: max(said.get(name, math.nan) for said in by_chip.values()) for name in _OF_ROWS
        }
        rows.append(
            [
                *(str(width), kind),
                *(_said(by_chip[chip], "bytes", 0, 1e6) for chip in chips),
                *(f"{most[name] / 1e6:,.{digits}f}" for name, digits in _OF_ROWS.items()),
                str(max(map(_copies, by_chip.values()))),
            ]
        )
    versions = ", ".join(f"{k} {v}" for k, v in results["environment"]["versions"].items())
    parts = [
        f"**The compiler's estimates, never times**; {versions}, {results['environment']['date']}. "
        "Bytes a parameter between the chip and its memory, in brackets optax's; then the "
        "estimated cycles, by optax's. Temporaries, the most of all chips, are in either memory of "
        "the chip.",
        _table(["workload", "chain", *chips, "temporaries, bytes a parameter"], dense),
        "A train step that reads 8,192 rows of a row-major table [1M, D] where nothing else is "
        "said, in MB; what is read or written row by row counts as the rows are padded. Arguments "
        "and temporaries are the most of all chips.",
        _table(
            [
                *("D", "mode", *(f"{chip}: moved" for chip in chips)),
                *("arguments", "temporaries", "copies of whole arrays"),
            ],
            rows,
        ),
    ]
    if results["times"]:
        times = results["times"]
        for what, key in (("dense steps", "dense"), ("steps on tables", "rows")):
            lines = [
                [*(str(v) for k, v in row.items() if k != "ms"), name, _range(ms, 3)]
                for row in times[key]
                for name, ms in row["ms"].items()
            ]
            head = [k for k in times[key][0] if k != "ms"]
            parts += [
                f"Measured on {times['device']}, {what}, {times['rounds']} rounds:",
                _table([*head, "contender", "step, ms"], lines),
            ]
    return "\n\n".join(parts)


def gpu(results: dict[str, Any]) -> str:
    """The tables of what the GPU's compiler says."""

    def both(row: dict[str, Any], name: str, digits: int = 0) -> str:
        own, other = (_said(row["said"][package], name, digits) for package in _PAIR)
        return f"{own} ({other})"

    dense = [
        [
            *(row["workload"], row["chain"], both(row, "kernels")),
            *(both(row, "bytes", 2), both(row, "temporary_bytes", 2)),
        ]
        for row in results["dense"]
    ]
    rows = [
        [
            *(f"{short(row['rows'])} x {row['width']}", kind),
            *(_said(said, name) for name in ("kernels", "round_trips")),
            *(_said(said, "bytes", 0, 1e6), _said(said, "temporary_bytes", 1, 1e6)),
        ]
        for row in results["rows"]
        for kind, said in row["said"].items()
    ]
    versions = ", ".join(f"{k} {v}" for k, v in results["environment"]["versions"].items())
    return "\n\n".join(
        [
            f"**What the compiler says for an {results['device']}, never times**; {versions}, "
            f"{results['environment']['date']}. In brackets optax's; bytes are those of a "
            "parameter, between the GPU and its memory.",
            _table(["workload", "chain", "kernels", "bytes", "temporaries, bytes"], dense),
            "A train step that reads 8,192 rows of a table where nothing else is said, in MB:",
            _table(
                ["table", "mode", "kernels", "waits for the host", "moved", "temporaries"], rows
            ),
        ]
    )


_PAIR = ("adamjax", "optax")
# What is shown of a step on a table, and its decimals.
_OF_ROWS = {"arguments": 0, "temporary": 1}


def _copies(said: dict[str, Any]) -> int:
    """The copies of arrays of a table's size."""
    return sum(said.get("makers", {}).get(kind, 0) for kind in ("copy", "copy-start", "transpose"))


# The function that writes the tables of a suite's results.
SUITES = {
    "dense": dense,
    "rows": rows,
    "compile": compiling,
    "memory": memory,
    "models": models,
    "differences": differences,
    "tpu": tpu,
    "gpu": gpu,
}


def rendered(text: str) -> str:
    """The README's text with its tables as the committed results say."""
    for suite, tables in SUITES.items():
        for path in sorted(RESULTS.glob(f"*/{suite}.json")):
            name = f"{suite} {path.parent.name}"
            block = re.compile(f"(<!-- {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
            place = block.search(text)
            if not place:
                raise ValueError(f"README.md has no place for {path}: add <!-- {name} --> marks")
            made = f"{place[1]}\n{tables(json.loads(path.read_text()))}\n\n{place[2]}"
            text = text[: place.start()] + made + text[place.end() :]
    return text


def main(argv: list[str]) -> int:
    """Runs; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks readme", description=__doc__)
    parser.parse_args(argv)
    README.write_text(rendered(README.read_text()))
    return 0
