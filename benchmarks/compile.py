"""What a program costs once: tracing, lowering and compiling a step of 500 leaves, beside optax.

Contenders take turns in one process, and JAX's caches are cleared before each.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.dense import CHAINS, MANY_LEAVES, QUICK, WORKLOADS, jax_step, random_arrays
from benchmarks.measure import (
    RESULTS,
    environment,
    installed,
    progress,
    rounded,
    save,
    say,
    timed,
)

__all__ = ["main"]


def taken(name: str, chain: str, shapes: list[tuple[int, ...]], dtype: str) -> dict[str, float]:
    """Seconds to trace and lower a contender's step, and to compile it, with nothing cached."""
    import jax

    params = random_arrays(shapes, dtype, 0)
    step, state = jax_step(name, chain, params)
    jax.clear_caches()
    lowered: list[Any] = []
    first = timed(lambda: lowered.append(step.lower(params, state, params)))
    return {"trace and lower": first, "compile": timed(lambda: lowered[0].compile())}


def run(workload: tuple[Any, ...], rounds: int) -> list[dict[str, Any]]:
    """The times of both chains; the first round is not counted."""
    shapes, dtype, _ = workload
    names = installed("adamjax", "optax")
    table = []
    with progress(len(CHAINS) * (rounds + 1) * len(names)) as bar:
        for chain in CHAINS:
            rows: list[dict[str, dict[str, float]]] = []
            for _ in range(rounds + 1):
                rows.append({})
                for name in names:
                    rows[-1][name] = taken(name, chain, shapes, dtype)
                    bar.update()
            del rows[0]
            for what in ("trace and lower", "compile"):
                row = {
                    "chain": chain,
                    "what": what,
                    "s": {n: rounded([t[n][what] for t in rows]) for n in names},
                    "ratio": {
                        n: rounded([t["adamjax"][what] / t[n][what] for t in rows])
                        for n in names
                        if n != "adamjax"
                    },
                }
                table.append(row)
                ratios = ", ".join(f"{n} {r['median']:.2f}" for n, r in row["ratio"].items())
                own = row["s"]["adamjax"]["median"]
                say(f"{what:16} {chain:12} {own:6.2f} s; of the time of: {ratios}")
    return table


def main(argv: list[str]) -> int:
    """Runs the suite; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks compile", description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="samples of each (default 7)")
    parser.add_argument("--quick", action="store_true", help="a few leaves: does it run?")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args(argv)
    if args.rounds < 2:
        parser.error("--rounds must be at least 2")
    workload = list(QUICK)[1] if args.quick else MANY_LEAVES
    results: dict[str, Any] = {"suite": "compile", "quick": args.quick, "rounds": args.rounds}
    results["workload"] = workload
    results["times"] = run((QUICK if args.quick else WORKLOADS)[workload], args.rounds)
    results["environment"] = environment(*installed("adamjax", "jax", "jaxlib", "optax"))
    out = args.out or RESULTS / results["environment"]["platform"] / "compile.json"
    if args.out or not args.quick:
        save(results, out)
        print(f"written to {out}")
    return 0
