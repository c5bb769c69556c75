"""Everything, with one command: dense, rows, compile, memory and models, then the report.

Each suite runs in a process of its own, one after another, on what JAX finds: TPU, GPU or CPU. One
that fails is told at the end, and the others run. Keep the machine quiet meanwhile; on a small one
this takes an hour or two.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks import report
from benchmarks.measure import RESULTS, ROOT, device

__all__ = ["SUITES", "main"]

# name: what makes a quick run quick.
SUITES = {
    "dense": ["--sittings", "1", "--rounds", "2"],
    "rows": ["--sittings", "1", "--rounds", "2", "--grid-rounds", "2"],
    "compile": ["--rounds", "2"],
    "memory": [],
    "models": ["--sittings", "1", "--rounds", "2"],
}


def main(argv: list[str]) -> int:
    """Runs the suites; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks all", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where results go (default benchmarks/results/PLATFORM; build/quick for quick ones)",
    )
    args = parser.parse_args(argv)
    default = ROOT / "build" / "quick" if args.quick else RESULTS / device(quick=True).platform
    folder = args.out or default
    began, failed = time.perf_counter(), []
    for suite, few in SUITES.items():
        minutes = (time.perf_counter() - began) / 60
        print(f"\n--- {suite}, after {minutes:.0f} minutes ---", flush=True)
        options = ["--quick", *few] if args.quick else []
        command = [sys.executable, "-m", "benchmarks", suite, *options]
        if subprocess.run([*command, "--out", str(folder / f"{suite}.json")]).returncode:
            failed.append(suite)
    print()
    report.main([str(folder)])
    if failed:
        told = ", ".join(failed)
        print(
            f"failed: {told}; what the report says of them, if anything, is older", file=sys.stderr
        )
    return 1 if failed else 0
