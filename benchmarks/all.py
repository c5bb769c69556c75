"""Runs the suites dense, rows, compile, memory and models, and writes the report.

Each suite runs in a process of its own, one after another, on what JAX finds: TPU, GPU or CPU.
If one fails, the others still run, and the last line names it. Run nothing else meanwhile. On a
small machine this takes an hour or two.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks import report
from benchmarks.measure import RESULTS, ROOT, device

SUITES = ("dense", "rows", "compile", "memory", "models")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks all", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does everything run?")
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="where results go (default benchmarks/results/PLATFORM; with --quick: build/quick)",
    )
    args = parser.parse_args(argv)
    if args.out:
        folder = args.out
    elif args.quick:
        folder = ROOT / "build" / "quick"
    else:
        # quick: the platform is all that is needed, so the bandwidth is measured briefly.
        folder = RESULTS / device(quick=True).platform
    options = ["--quick"] if args.quick else []
    failed = []
    for suite in SUITES:
        print(f"\n--- {suite} ---", flush=True)
        out = ["--out", str(folder / f"{suite}.json")]
        command = [sys.executable, "-m", "benchmarks", suite, *options, *out]
        if subprocess.run(command).returncode:
            failed.append(suite)
    report.main([str(folder)])
    if failed:
        line = f"failed: {', '.join(failed)}; the report has their older results, if any"
        print(line, file=sys.stderr)
    return 1 if failed else 0
