"""What the GPU's compiler says of steps, without a GPU: counts and bytes, never times.

XLA compiles for a GPU that is not there, of which it is told the properties. A case is a jitted,
donated step. Of the program that comes out we read

- the kernels: what the program launches, each of which costs microseconds, however little it does;
  those of a loop as often as it goes round, where the compiler knows how often;
- the round trips: branches and other loops, at which the GPU waits until the host has seen a
  number. What is in them is not counted;
- the bytes between the GPU and its memory: for every instruction of the entry the arrays that it
  reads and writes. What reads or writes rows of a table counts with these rows alone. Where
  rows of several tables are joined nobody says what an instruction takes of them: not counted;
- the bytes of temporaries, and the instructions that copy an array of a table's size.

Where there is a GPU, the suites `dense` and `rows` take times on it.
"""

import argparse
import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.dense import size as count
from benchmarks.dense import workloads
from benchmarks.hlo import computations, entry, instructions, makers, traffic
from benchmarks.measure import RESULTS, environment, save
from benchmarks.programs import ROWS, Case, large_cases, many_tables, program, size
from benchmarks.workers import Worker, asked, serve

__all__ = ["compiler", "launches", "main"]

# The properties of an H100 (SXM), as XLA asks for them.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  core_count: 132
  fpus_per_core: 128
  clock_rate_ghz: 1.98
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  registers_per_block_limit: 65536
  registers_per_core_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  l2_cache_size: 52428800
  memory_bandwidth: 3352320000000
  device_memory_size: 84929347584
}
platform_name: "CUDA"
runtime_version { major: 13 }
dnn_version_info { major: 9 minor: 12 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

CHAINS = {
    "one leaf": ("adam", "clip + adam", "clip + adamw + average", "adam, bfloat16"),
    "transformer": ("adam", "clip + adam", "clip + adamw + average"),
    "2,000": ("adam", "adam, grouped", "clip + adam, grouped"),
}
# Rows and columns of a table.
TABLES = ((1_000_000, 64), (10_000_000, 128))
QUICK_TABLES = ((20_000, 64),)
# What costs nothing when a program runs.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"}


def launches(text: str) -> tuple[int, int]:
    """The kernels that a program launches, and its round trips."""
    bodies = computations(text)

    def count(body: str) -> tuple[int, int]:
        kernels = waits = 0
        for _, _, opcode, rest in instructions(body):
            if opcode in _FREE or opcode.endswith("-done"):
                continue
            rounds = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
            inner = re.search(r"(?:body|to_apply)=%?([\w.-]+)", rest)
            if inner and (opcode == "call" or (opcode == "while" and rounds)):
                each = count(bodies[inner[1]])
                times = int(rounds[1]) if rounds else 1
                kernels, waits = kernels + times * each[0], waits + times * each[1]
            elif opcode in ("while", "conditional"):
                waits += 1
            else:
                kernels += 1
        return kernels, waits

    return count(entry(text))


def said(case: Case, device: Any) -> dict[str, Any]:
    """What the compiler says about a case."""
    import jax

    function, arguments = program(case, device)
    compiled = function.lower(*arguments).compile()
    memory, text = compiled.memory_analysis(), compiled.as_text()
    kernels, waits = launches(text)
    found: dict[str, Any] = {
        "kernels": kernels,
        "round_trips": waits,
        "temporary_bytes": memory.temp_size_in_bytes,
    }
    if case[0] != "tables":
        found["bytes"] = traffic(text)
    if case[0] == "dense":  # by the parameter
        parameters = sum(x.size for x in arguments[0])
        return {name: x / parameters if "bytes" in name else x for name, x in found.items()}
    _, _, width, num_rows, *_ = case
    return found | {
        # A table that is moved in pieces is moved as well; small ones are as large as all rows.
        "makers": makers(text, num_rows * width // (8 if case[0] == "rows" else 2)),
        "table_bytes": 4 * num_rows * width,
        "donated_bytes": memory.alias_size_in_bytes,
        "tables_bytes": sum(
            size(x) for x in jax.tree.leaves(arguments) if x.size >= num_rows * width
        ),
    }


def work() -> None:
    """Answers what the compiler says about cases."""
    import jax
    from jax.experimental import topologies

    topology = topologies.get_topology_desc(platform="cuda", target_config=H100, topology="1x1x1")
    device = jax.sharding.SingleDeviceSharding(topology.devices[0])
    serve(lambda case: said(case, device))


def compiler() -> Worker:
    """A process with the compiler, in which there is no GPU."""
    return Worker("gpu", "--worker", JAX_PLATFORMS="cpu", XLA_FLAGS="", CUDA_VISIBLE_DEVICES="-1")


# --- the suite ------------------------------------------------------------------------------------

Group = tuple[dict[str, Any], dict[str, Case]]


def dense_cases(quick: bool) -> Iterator[Group]:
    """What each dense case is called, and the case of each package."""
    chosen = workloads(large=True)
    if quick:
        chosen = {"one leaf, 65k": ([(2**16,)], "float32", 1)}
    for workload, (shapes, _, _) in chosen.items():
        for start, chains in CHAINS.items():
            if workload.startswith(start) and "bfloat16" not in workload:
                for chain in chains:
                    # optax has nothing that joins leaves.
                    named = {"adamjax": chain, "optax": chain.removesuffix(", grouped")}
                    cases = {name: ("dense", name, own, shapes) for name, own in named.items()}
                    yield {"workload": workload, "chain": chain, "size": count(shapes)}, cases


def rows_cases(quick: bool) -> Iterator[Group]:
    """What each table is called, and the case of each mode."""
    for num_rows, width in QUICK_TABLES if quick else TABLES:
        kinds = [kind for kind in ROWS if "packed" not in kind]
        cases: dict[str, Case] = {kind: ("rows", kind, width, num_rows) for kind in kinds}
        if width == 64:
            cases |= large_cases(num_rows, width, quick)
        yield {"rows": num_rows, "width": width}, cases
    num_rows, width, cases = many_tables(quick)
    yield {"rows": num_rows, "width": width}, cases


def estimated(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """What the compiler says of each case."""
    cases = {str(case): case for _, cases in groups for case in cases.values()}
    names, workers = list(cases), min(os.cpu_count() or 1, 4)
    shares = [names[i::workers] for i in range(workers)]
    found: dict[str, Any] = {}
    with ThreadPoolExecutor(workers) as pool:
        questions = [[cases[name] for name in share] for share in shares]
        for share, answers in zip(
            shares, pool.map(functools.partial(asked, compiler), questions), strict=True
        ):
            found |= dict(zip(share, answers, strict=True))
    return [
        {**what, "said": {name: found[str(case)] for name, case in cases.items()}}
        for what, cases in groups
    ]


def main(argv: list[str]) -> int:
    """Runs the suite; see `--help`."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks gpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        work()
        return 0
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        parser.error("XLA's compiler for CUDA is not installed: make bench-gpu")
    # Nothing here runs on a device.
    os.environ["JAX_PLATFORMS"] = "cpu"
    packages = ("adamjax", "jax", "jaxlib", "optax", "jax-cuda13-pjrt", "nvidia-cuda-nvcc")
    env = environment(*packages)
    results: dict[str, Any] = {
        "suite": "gpu",
        "kind": "what the compiler says, never times",
        "device": "NVIDIA H100 80GB HBM3",
        "environment": {key: env[key] for key in ("versions", "date")},
        "dense": estimated(list(dense_cases(args.quick))),
        "rows": estimated(list(rows_cases(args.quick))),
    }
    out = args.out or RESULTS / "gpu-compiler" / "gpu.json"
    if args.out or not args.quick:
        save(results, out)
        print(f"written to {out}")
    return 0
