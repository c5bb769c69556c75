"""What the TPU's compiler says of steps, without a TPU: its estimates, never times.

libtpu compiles for a TPU that is not there; `jax.experimental.topologies` describes one to it. A
case is a jitted, donated step. Of the program that comes out we read

- the bytes that go between the chip and its large memory (HBM): for every instruction of the
  program's entry the arrays in HBM that it reads and writes, padded as they are there. XLA's own
  "bytes accessed" is kept beside it. The two agree where arrays are larger than the fast memory
  on the chip; smaller ones are moved there first and read there once more, which XLA counts
  again, up to twice over. What reads or writes rows of a table counts with these rows alone, and
  a loop over blocks of them with as many turns as there are if no index occurs twice. Where rows
  of several tables are joined nobody says what an instruction takes of them: not counted;
- the bytes of temporaries, in either memory, and the instructions that copy an array of a table's
  size;
- the cycles that the compiler reckons with, where it says so: for arithmetic and copies, not for
  reading and writing rows, sorts and loops. They compare programs for one chip.

The compiler may end the process that it is in, so it gets one for each topology. Where there is a
TPU, the same steps are also timed, which is another table.
"""

import argparse
import functools
import importlib.util
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.dense import transformer
from benchmarks.hlo import cycles, makers, traffic
from benchmarks.measure import RESULTS, environment, save, spread, timed
from benchmarks.programs import ROWS, Case, large_cases, many_tables, program, size, turns
from benchmarks.workers import Worker, asked, serve

__all__ = ["compiler", "main", "run_times"]

# chip: its topology, as libtpu calls it, and the type of a machine that has it
TOPOLOGIES = {
    "v5e": ("v5e:2x2", "v5litepod-4"),
    "v5p": ("v5p:2x2x1", "v5p-8"),
    "v6e": ("v6e:2x2", "v6e-4"),
}
NUM_ROWS = 1_000_000

WORKLOADS = {
    # Larger than the fast memory on a chip.
    "one leaf, 67.1M": [(2**26,)],
    "transformer, 150 leaves, 13.8M": transformer(),
}
QUICK = {"one leaf, 67.1M": [(2**16,)]}
CHAINS = (
    *("adam", "clip + adam", "adamw", "clip + adamw", "clip + adamw + average"),
    *("amsgrad", "adamax", "adam, bfloat16"),
)
WIDTHS = (64, 128)

# What some cases are called that belong together, and each of them by its own name.
Group = tuple[dict[str, Any], dict[str, Case]]


# --- what the compiler says -----------------------------------------------------------------------


def said(case: Case, device: Any) -> dict[str, Any]:
    """What the compiler says about a case."""
    import jax

    function, arguments = program(case, device)
    compiled = function.lower(*arguments).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    if case[0] == "dense":  # all by the parameter, but the cycles
        parameters = sum(x.size for x in arguments[0])
        return {
            "bytes": traffic(text) / parameters,
            "bytes_accessed": compiled.cost_analysis()["bytes accessed"] / parameters,
            "temporary_bytes": memory.temp_size_in_bytes / parameters,
            "cycles": cycles(text),
        }
    _, kind, width, num_rows, *_ = case
    elements = num_rows * width
    found = {
        # A table that is moved in pieces is moved as well; small ones are as large as all rows.
        "makers": makers(text, elements // (8 if case[0] == "rows" else 2)),
        "temporary": memory.temp_size_in_bytes,
        "arguments": memory.argument_size_in_bytes,
        "donated": memory.alias_size_in_bytes,
        "unpadded": sum(map(size, jax.tree.leaves(arguments))),
        "tables": sum(size(x) for x in jax.tree.leaves(arguments) if x.size >= elements),
        "table": 4 * elements,
        "cycles": cycles(text),
    }
    if case[0] != "tables":
        found["bytes"] = traffic(text, turns(case), 4 * elements)
    if kind == "init":
        rule = compiled.output_formats.inner[0]
        orders = [slot["table"].layout.major_to_minor for slot in (rule.m, rule.v)]
        found["orders"] = list(map(list, orders))
    return found


def work(chip: str) -> None:
    """Answers what the compiler for a chip says about cases."""
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(TOPOLOGIES[chip][0], platform="tpu")
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    serve(lambda case: said(case, device))


def compiler(chip: str) -> Worker:
    """A process with the compiler for a chip, in which there is no TPU."""
    return Worker(
        *("tpu", "--worker", chip),
        JAX_PLATFORMS="cpu",
        XLA_FLAGS="",
        LIBTPU_INIT_ARGS="",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE=TOPOLOGIES[chip][1],
        TPU_WORKER_HOSTNAMES="localhost",
        # Compilers do not get into each other's way as users of a TPU do.
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    )


# --- cases ----------------------------------------------------------------------------------------


def dense_cases(workloads: dict[str, Any]) -> Iterator[Group]:
    """What each dense case is called, and the case of each package."""
    for workload, shapes in workloads.items():
        for chain in CHAINS:
            cases = {name: ("dense", name, chain, shapes) for name in ("adamjax", "optax")}
            yield {"workload": workload, "chain": chain}, cases


def rows_cases(num_rows: int, widths: Sequence[int], quick: bool = False) -> Iterator[Group]:
    """What each table is called, and the case of each mode."""
    for width in widths:
        # Rows of 128 columns are a line as they are.
        kinds = [kind for kind in ROWS if "packed" not in kind or width % 128]
        cases: dict[str, Case] = {kind: ("rows", kind, width, num_rows) for kind in kinds}
        if width == 64:
            cases |= large_cases(num_rows, width, quick)
        yield {"width": width}, cases
    _, width, cases = many_tables(quick)
    yield {"width": width}, cases


def estimated(chip: str, groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What the compiler for a chip says of each case."""
    cases = [case for _, cases in groups for case in cases.values()]
    answers = iter(asked(functools.partial(compiler, chip), cases))
    return [
        {"chip": chip, **what, "said": {name: next(answers) for name in cases}}
        for what, cases in groups
    ]


# --- times, where there is a TPU ------------------------------------------------------------------


class Runner:
    """A step of a case that is taken in place, on a device that is there."""

    def __init__(self, case: Case) -> None:
        import jax

        here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        function, (params, state, *given) = program(case, here)
        self.step = function.lower(params, state, *given).compile()
        num_rows = 1 if case[0] == "dense" else case[3]
        # The states of these optimizers are zeros at first.
        zeros = jax.tree.map(functools.partial(_made, most=0), state)
        params, self.given = jax.tree.map(functools.partial(_made, most=num_rows), (params, given))
        self.held = params, zeros

    def run(self, steps: int) -> None:
        """Takes some steps and waits for them."""
        import jax

        for _ in range(steps):
            self.held = self.step(*self.held, *self.given)
        jax.block_until_ready(self.held)


def _made(x: Any, most: int) -> Any:
    """Zeros; or small floats, and integers below `most`."""
    import jax
    import jax.numpy as jnp

    def make() -> Any:
        if most == 0:
            return jnp.zeros(x.shape, x.dtype)
        if jnp.issubdtype(x.dtype, jnp.floating):
            return 0.01 * jax.random.normal(jax.random.key(0), x.shape, x.dtype)
        return jax.random.randint(jax.random.key(0), x.shape, 0, most, x.dtype)

    return jax.jit(make, out_shardings=x.sharding)()


def run_times(groups: Sequence[Group], rounds: int, steps: int) -> list[dict[str, Any]]:
    """Milliseconds a step of the cases of each group, in turn, on the device that is there."""
    table = []
    for what, cases in groups:
        runners = {name: Runner(case) for name, case in cases.items()}
        taken: dict[str, list[float]] = {name: [] for name in cases}
        order = list(cases)
        for _ in range(rounds):
            for name in order:
                runners[name].run(1)
                taken[name].append(1e3 * timed(functools.partial(runners[name].run, steps)) / steps)
            order.append(order.pop(0))
        table.append({**what, "ms": {name: spread(ms) for name, ms in taken.items()}})
        print(
            f"{what}: " + ", ".join(f"{k} {v['median']:.3f} ms" for k, v in table[-1]["ms"].items())
        )
    return table


def main(argv: list[str]) -> int:
    """Runs the suite; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks tpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--chips", nargs="+", default=list(TOPOLOGIES), choices=TOPOLOGIES)
    parser.add_argument("--rounds", type=int, default=20, help="samples, where there is a TPU")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    # Take times on whatever device there is, and nothing else.
    parser.add_argument("--time", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=TOPOLOGIES, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work(args.worker)
        return 0
    if importlib.util.find_spec("libtpu") is None and not args.time:
        parser.error("libtpu, which has the TPU's compiler, is not installed: make bench-tpu")

    import jax

    dense = list(dense_cases(QUICK if args.quick else WORKLOADS))
    sizes = (20_000, WIDTHS[:1]) if args.quick else (NUM_ROWS, WIDTHS)
    rows = list(rows_cases(*sizes, args.quick))
    packages = ["adamjax", "jax", "jaxlib", "optax", *([] if args.time else ["libtpu"])]
    env = environment(*packages)
    results: dict[str, Any] = {
        "suite": "tpu",
        "kind": "the compiler's estimates, never times: all but `times`",
        "environment": {key: env[key] for key in ("versions", "date")},
        "dense": [],
        "rows": [],
        "times": {},
    }
    if not args.time:
        for name, groups in (("dense", dense), ("rows", rows)):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                found = pool.map(functools.partial(estimated, groups=groups), args.chips)
                results[name] = [row for chip in found for row in chip]
    if args.time or jax.default_backend() == "tpu":
        results["times"] = {
            "device": env["device"],
            "rounds": args.rounds,
            "dense": run_times(dense, args.rounds, 2 if args.quick else 10),
            "rows": run_times(rows, args.rounds, 2 if args.quick else 10),
        }
    out = args.out or RESULTS / "tpu-compiler" / "tpu.json"
    if args.out or not (args.quick or args.time or args.chips != list(TOPOLOGIES)):
        save(results, out)
        print(f"written to {out}")
    return 0
