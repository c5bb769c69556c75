"""The time to trace, lower and compile a step of 500 leaves, compared with optax.

Contenders take turns in one process, and JAX's caches are cleared before each.
"""

import gc
from typing import Any

import jax

from benchmarks.dense import CHAINS, MANY_LEAVES, QUICK, random_arrays, workloads
from benchmarks.measure import installed, time_ratios, timed, times
from benchmarks.steps import chain_step
from benchmarks.suite import Suite, progress

PARTS = ("trace and lower", "compile")


def compile_seconds(jitted: Any, *arguments: Any) -> tuple[dict[str, float], Any]:
    """The seconds of each of `PARTS` with nothing in JAX's caches, and the lowered program."""
    jax.clear_caches()
    gc.collect()
    lowered: list[Any] = []
    tracing = timed(lambda: lowered.append(jitted.lower(*arguments)))
    return dict(zip(PARTS, (tracing, timed(lowered[0].compile)), strict=True)), lowered[0]


def main(argv: list[str]) -> int:
    suite = Suite("compile", __doc__, ("adamjax", "jax", "jaxlib", "optax"), {"rounds": 7})
    args = suite.parse(argv)
    workload = list(QUICK)[1] if args.quick else MANY_LEAVES
    shapes, dtype, _ = (QUICK if args.quick else workloads(large=False))[workload]
    names = installed("adamjax", "optax")
    suite.results |= {"workload": workload, "times": []}
    for chain in CHAINS:
        rounds: list[dict[str, dict[str, float]]] = []
        for _ in progress(range(args.rounds + 1), "round"):
            rounds.append({})
            for name in names:
                init, step = chain_step(name, chain)
                params = random_arrays(shapes, dtype, 0)
                jitted = jax.jit(step, donate_argnums=(0, 1))
                rounds[-1][name], _ = compile_seconds(jitted, params, init(params), params)
        for part in PARTS:
            # Without the first round, in which modules are imported.
            seconds = [{n: x[n][part] for n in names} for x in rounds[1:]]
            row = {"chain": chain, "what": part, "s": times(seconds, names, scale=1)}
            row["ratio"] = time_ratios(seconds, "adamjax", names)
            suite.results["times"].append(row)
            print(f"{part:16} {chain:12} {row['s']['adamjax']['median']:6.2f} s", flush=True)
    return suite.finish()
