"""Compiles steps for TPUs and GPUs without the device: what the suites `tpu` and `gpu` share.

A compiler may crash its process, so it runs in worker processes.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax

from benchmarks.hlo import cycles, large_results, launches, traffic
from benchmarks.measure import installed
from benchmarks.programs import Case, block_iterations, program
from benchmarks.steps import count_bytes
from benchmarks.suite import Suite
from benchmarks.workers import Ended, Worker

# The cases of one row of the results: the part of the results that has the row ("dense" or
# "rows"), the entries that describe the row, and each case by its name.
Group = tuple[str, dict[str, Any], dict[str, Case]]


@dataclass(frozen=True)
class Compiler:
    """A compiler, and the figures that its suite reads from it."""

    suite: str
    about: str | None  # the text of `--help`
    module: str  # of the compiler
    packages: tuple[str, ...]  # whose versions the results state
    topology: Callable[[str], Any]  # the devices of a target, as JAX describes them
    environment: Callable[[str], dict[str, str]]  # environment variables of a target
    targets: tuple[str, ...]  # the chips that it compiles for
    dense: tuple[str, ...]  # the figures of a dense step; see `figures`
    rows: Mapping[str, str]  # the figures of a step on tables, by their names in the results
    groups: Callable[[bool], list[Group]]  # the argument: is it a quick run?
    results: Mapping[str, str]  # more entries of the results

    def start(self, target: str) -> Worker:
        variables = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", **self.environment(target)}
        return Worker(self.suite, **variables)


def figures(case: Case, compiled: Any, arguments: Any) -> dict[str, Callable[[], Any]]:
    """The figures of a compiled case, each as a function that computes it."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    elements = 0 if case[0] == "dense" else case[2] * case[3]
    # An eighth of a table counts as large, as a table may be copied in pieces. The tables of the
    # other cases are small: the rows of a step are almost as large, so only half a table counts.
    large = elements // (8 if case[0] == "rows" else 2)

    def orders() -> list[list[int]]:
        rule = compiled.output_formats.inner[0]
        return [list(slot["table"].layout.major_to_minor) for slot in (rule.m, rule.v)]

    return {
        "kernels": lambda: launches(text)[0],
        "round_trips": lambda: launches(text)[1],
        "cycles": lambda: cycles(text),
        "bytes": lambda: traffic(text, block_iterations(case), 4 * elements),
        "bytes_accessed": lambda: compiled.cost_analysis()["bytes accessed"],
        "temporary_bytes": lambda: memory.temp_size_in_bytes,
        "argument_bytes": lambda: memory.argument_size_in_bytes,
        "donated_bytes": lambda: memory.alias_size_in_bytes,
        "unpadded_bytes": lambda: count_bytes(arguments),
        "table_bytes": lambda: 4 * elements,
        "tables_bytes": lambda: count_bytes(
            [x for x in jax.tree.leaves(arguments) if x.size >= elements]
        ),
        "makers": lambda: large_results(text, large),
        "orders": orders,
    }


class Contender:
    """A compiler with one of its targets; lives in a worker process."""

    def __init__(self, compiler: Compiler, target: str) -> None:
        self.compiler = compiler
        self.device = jax.sharding.SingleDeviceSharding(compiler.topology(target).devices[0])

    def report(self, case: Case) -> dict[str, Any]:
        """The report on a case; for a dense step, bytes are per parameter."""
        function, arguments = program(case, self.device)
        functions = figures(case, function.lower(*arguments).compile(), arguments)
        if case[0] == "dense":
            num_parameters = sum(x.size for x in arguments[0])
            totals = {name: functions[name]() for name in self.compiler.dense}
            return {n: x / num_parameters if "bytes" in n else x for n, x in totals.items()}
        names = dict(self.compiler.rows)
        if case[0] == "tables":
            # An instruction that joins rows of several tables does not show how many bytes it moves
            # from each.
            del names["bytes"]
        if case[1] == "init":
            names["orders"] = "orders"
        return {name: functions[figure]() for name, figure in names.items()}


def reports(
    compiler: Compiler, target: str, cases: Sequence[Case], processes: int
) -> list[dict[str, Any]]:
    """The reports on cases, in order; `{"failed": why}` if the compiler crashed."""
    idle = [compiler.start(target) for _ in range(processes)]

    def ask(case: Case) -> dict[str, Any]:
        worker = idle.pop()
        try:
            answer = worker.ask((target, target, "report", case))
        except Ended as error:
            answer = {"failed": str(error)}
            worker.close()
            worker = compiler.start(target)
        idle.append(worker)
        print(f"{case}"[:120], answer, flush=True)
        return answer

    with ThreadPoolExecutor(processes) as pool:
        answers = list(pool.map(ask, cases))
    for worker in idle:
        worker.close()
    return answers


def main(compiler: Compiler, argv: list[str]) -> int:
    name = compiler.suite
    suite = Suite(name, compiler.about, compiler.packages, folder=f"{name}-compiler")
    all_targets = list(compiler.targets)
    if len(all_targets) > 1:
        suite.parser.add_argument("--chips", nargs="+", default=all_targets, choices=all_targets)
    args = suite.parse(argv)
    if not installed(compiler.module):
        suite.parser.error(f"{compiler.module}, the compiler, is not installed: make bench-{name}")
    # Nothing here runs on a device.
    jax.config.update("jax_platforms", "cpu")
    targets = getattr(args, "chips", all_targets)
    suite.partial |= targets != all_targets
    suite.results |= compiler.results
    groups = compiler.groups(args.quick)
    cases = {str(case): case for _, _, group in groups for case in group.values()}
    processes = max(1, min(4, os.cpu_count() or 1) // len(targets))
    with ThreadPoolExecutor(len(targets)) as pool:
        answers = pool.map(lambda x: reports(compiler, x, list(cases.values()), processes), targets)
    suite.results |= {"dense": [], "rows": []}
    for target, answer in zip(targets, answers, strict=True):
        chip = {"chip": target} if len(all_targets) > 1 else {}
        report_of = dict(zip(cases, answer, strict=True))
        for part, about, group in groups:
            row = {name: report_of[str(case)] for name, case in group.items()}
            suite.results[part].append({**chip, **about, "said": row})
    return suite.finish()
