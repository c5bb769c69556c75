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
    folder, failed = args.out or default, []
    for suite in SUITES:
        print(f"\n--- {suite} ---", flush=True)
        command = [sys.executable, "-m", "benchmarks", suite, *["--quick"] * args.quick]
        if subprocess.run([*command, "--out", str(folder / f"{suite}.json")]).returncode:
            failed.append(suite)
    report.main([str(folder)])
    if failed:
        line = f"failed: {', '.join(failed)}; the report has their older results, if any"
        print(line, file=sys.stderr)
    return 1 if failed else 0
