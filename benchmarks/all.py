"""Runs the suites dense, rows, compile, memory and models, and writes the report.

Each suite runs in a process of its own, one after another, on the device that JAX finds: TPU, GPU
or CPU. If one fails, the others still run, and the last line names it. Run nothing else on the
machine meanwhile. On a small machine this takes an hour or two.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.measure import ROOT

SUITES = ("dense", "rows", "compile", "memory", "models")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks all", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see whether all runs")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where results go (default benchmarks/results/PLATFORM; with --quick: build/quick)",
    )
    args = parser.parse_args(argv)
    # Without a folder, the suites and the report use the platform's.
    folder = args.out or (ROOT / "build" / "quick" if args.quick else None)
    failed = []
    for suite in SUITES:
        print(f"\n--- {suite} ---", flush=True)
        command = [sys.executable, "-m", "benchmarks", suite]
        command += ["--quick"] if args.quick else []
        command += ["--out", str(folder / f"{suite}.json")] if folder else []
        if subprocess.run(command).returncode:
            failed.append(suite)
    report.main([str(folder)] if folder else [])
    if failed:
        line = f"failed: {', '.join(failed)}; the report has their older results, if any"
        print(line, file=sys.stderr)
    return 1 if failed else 0
