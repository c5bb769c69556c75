"""Dense steps: time, compile time and memory against optax, Keras on JAX and torch's fused Adam.

adamjax, optax and Keras take their steps in one process, in turn; torch in a process of its own,
in turn with that one, as thread pools disturb each other. A sample is the mean of a few steps
after one that is not timed; a ratio is taken within a round, from samples that lie next to each
other in time, and who goes first changes from round to round, as the first is slower. Where
arrays come to lie in memory moves a step's time by a tenth, so the processes are started anew
several times.
"""

import argparse
import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import RESULTS, environment, save, spread, timed
from benchmarks.workers import Worker, serve

__all__ = ["main"]

CHAINS = ("adam", "clip + adam")
MAX_NORM = 1.0
RATE = 1e-3


def transformer(width: int = 256, layers: int = 12, words: int = 8192) -> list[tuple[int, ...]]:
    """The shapes of a transformer's 150 leaves."""
    w = width
    block = [(w,), (w,), (w, 3 * w), (3 * w,), (w, w), (w,)]
    block += [(w,), (w,), (w, 4 * w), (4 * w,), (4 * w, w), (w,)]
    return [(words, w), (512, w), *(block * layers), (w,), (w,), (w, words), (words,)]


# name: shapes, dtype, steps a sample
WORKLOADS: dict[str, tuple[list[tuple[int, ...]], str, int]] = {
    "one leaf, 33.6M": ([(33_554_432,)], "float32", 2),
    "transformer, 150 leaves, 13.8M": (transformer(), "float32", 3),
    "500 leaves, 8.2M": ([(64, 256)] * 500, "float32", 4),
    "transformer, bfloat16": (transformer(), "bfloat16", 3),
}
QUICK = {
    "one leaf, 33.6M": ([(65_536,)], "float32", 2),
    "500 leaves, 8.2M": ([(8, 8)] * 20, "float32", 2),
}


# --- contenders: each is a function that takes one step, and waits where it is asked to -----------


def _arrays(shapes: list[tuple[int, ...]], dtype: str, seed: int) -> list[Any]:
    import jax
    import numpy as np

    rng = np.random.default_rng(seed)
    return [jax.numpy.asarray(rng.standard_normal(s, np.float32), dtype) for s in shapes]


def _pair(name: str, chain: str) -> tuple[Any, Callable[..., Any]]:
    clip = chain == "clip + adam"
    if name == "adamjax":
        import adamjax

        first = [adamjax.clip_by_global_norm(MAX_NORM)] if clip else []
        return adamjax.chain(*first, adamjax.adam(RATE)), adamjax.apply_updates
    import optax

    first = [optax.clip_by_global_norm(MAX_NORM)] if clip else []
    return optax.chain(*first, optax.adam(RATE)), optax.apply_updates


def jax_step(name: str, chain: str, params: list[Any]) -> tuple[Any, Any]:
    """A jitted step `(params, state, grads) -> (params, state)`, donating, and its state."""
    import jax

    if name == "keras":
        import keras

        clip = MAX_NORM if chain == "clip + adam" else None
        optimizer = keras.optimizers.Adam(RATE, global_clipnorm=clip)
        optimizer.build([keras.Variable(p, dtype=str(p.dtype)) for p in params])
        state = [jax.numpy.array(v.value) for v in optimizer.variables]

        def step(params: Any, state: Any, grads: Any) -> Any:
            return optimizer.stateless_apply(state, grads, params)
    else:
        tx, apply = _pair(name, chain)
        state = tx.init(params)

        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return apply(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)), state


def jax_runner(name: str, chain: str, shapes: Any, dtype: str) -> Callable[[int], None]:
    """Takes some steps in place and waits for them."""
    import jax

    params, grads = _arrays(shapes, dtype, 0), _arrays(shapes, dtype, 1)
    step, state = jax_step(name, chain, params)
    held = [params, state]

    def run(steps: int) -> None:
        for _ in range(steps):
            held[:] = step(*held, grads)
        jax.block_until_ready(held)

    return run


def torch_runner(chain: str, shapes: Any, dtype: str) -> Callable[[int], None]:
    """The same with torch's fused Adam."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    params = [torch.randn(s, dtype=getattr(torch, dtype), device=device) for s in shapes]
    for p in params:
        p.requires_grad_()
        p.grad = torch.randn_like(p)
    optimizer = torch.optim.Adam(params, RATE, fused=True)

    def run(steps: int) -> None:
        for _ in range(steps):
            if chain == "clip + adam":
                torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


# --- workers ------------------------------------------------------------------------------------


def work(kind: str, workloads: dict[str, Any]) -> None:
    """Serves rounds: asked for (workload, chain), answers with seconds a step of contenders."""
    contenders = ["torch"] if kind == "torch" else jax_contenders()
    runners: dict[str, Callable[[int], None]] = {}
    current, steps = None, 1

    def answer(asked: list[str]) -> dict[str, float]:
        nonlocal current, steps
        workload, chain = asked
        if asked != current:
            current = asked
            shapes, dtype, steps = workloads[workload]
            for name in contenders:
                runners[name] = (
                    torch_runner(chain, shapes, dtype)
                    if name == "torch"
                    else jax_runner(name, chain, shapes, dtype)
                )
        taken = {}
        for name in contenders:
            runners[name](1)
            taken[name] = timed(functools.partial(runners[name], steps)) / steps
        contenders.append(contenders.pop(0))
        return taken

    serve(answer)


def jax_contenders() -> list[str]:
    """Those that share a process: adamjax, optax, and Keras if it is installed."""
    return ["adamjax", "optax", *(["keras"] if importlib.util.find_spec("keras") else [])]


def sitting(workload: str, chain: str, rounds: int, quick: bool) -> list[dict[str, float]]:
    """Seconds a step of every contender, for each of some rounds, in new processes."""
    kinds = ["jax", *(["torch"] if importlib.util.find_spec("torch") else [])]
    options = ["--quick"] if quick else []
    workers = [Worker("dense", "--worker", kind, *options) for kind in kinds]
    asked = [workload, chain]
    try:
        for worker in workers:
            worker.ask(asked)
        return [
            {name: s for worker in workers for name, s in worker.ask(asked).items()}
            for _ in range(rounds)
        ]
    finally:
        for worker in workers:
            worker.close()


def run_times(
    workloads: dict[str, Any], sittings: int, rounds: int, quick: bool
) -> list[dict[str, Any]]:
    """Step times of every contender on every workload and chain."""
    table = []
    for workload in workloads:
        for chain in CHAINS:
            taken: list[dict[str, float]] = []
            for _ in range(sittings):
                taken += sitting(workload, chain, rounds, quick)
            row = {
                "workload": workload,
                "chain": chain,
                "ms": {n: spread([1e3 * t[n] for t in taken]) for n in taken[0]},
                "ratio": {
                    n: spread([t["adamjax"] / t[n] for t in taken])
                    for n in taken[0]
                    if n != "adamjax"
                },
            }
            table.append(row)
            ratios = ", ".join(f"{n} {r['median']:.2f}" for n, r in row["ratio"].items())
            own = row["ms"]["adamjax"]["median"]
            print(f"{workload:32} {chain:12} {own:7.1f} ms; of the time of: {ratios}", flush=True)
    return table


# --- compilation and memory -----------------------------------------------------------------------


def run_compile(workload: tuple[Any, ...], rounds: int) -> list[dict[str, Any]]:
    """Seconds to trace and lower, and to compile, a step; contenders in turn, caches cleared."""
    import jax

    shapes, dtype, _ = workload
    table = []
    for chain in CHAINS:
        taken: list[dict[str, dict[str, float]]] = []
        for _ in range(rounds + 1):
            taken.append({})
            for name in ("adamjax", "optax"):
                params = _arrays(shapes, dtype, 0)
                step, state = jax_step(name, chain, params)
                jax.clear_caches()
                lowered: list[Any] = []
                first = timed(lambda: lowered.append(step.lower(params, state, params)))  # noqa: B023
                second = timed(lambda: lowered[0].compile())  # noqa: B023
                taken[-1][name] = {"trace and lower": first, "compile": second}
        del taken[0]
        for what in ("trace and lower", "compile"):
            row = {
                "chain": chain,
                "what": what,
                "s": {n: spread([t[n][what] for t in taken]) for n in taken[0]},
                "ratio": {"optax": spread([t["adamjax"][what] / t["optax"][what] for t in taken])},
            }
            table.append(row)
            own, ratio = row["s"]["adamjax"]["median"], row["ratio"]["optax"]["median"]
            print(f"{what:16} {chain:12} {own:6.2f} s; of the time of: optax {ratio:.2f}")
    return table


def run_memory(workloads: dict[str, Any]) -> list[dict[str, Any]]:
    """Bytes of the state and of temporaries of a donated step, as the compiler reports them."""
    import jax

    table = []
    for workload, (shapes, dtype, _) in workloads.items():
        for chain in CHAINS:
            params = [jax.ShapeDtypeStruct(s, dtype) for s in shapes]
            tx, apply = _pair("adamjax", chain)

            def step(params: Any, state: Any, grads: Any, tx: Any = tx, apply: Any = apply) -> Any:
                updates, state = tx.update(grads, state, params)
                return apply(params, updates), state

            state = jax.eval_shape(tx.init, params)
            compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, params).compile()
            count = sum(p.size for p in params)
            table.append(
                {
                    "workload": workload,
                    "chain": chain,
                    "parameter_bytes": sum(p.size * p.dtype.itemsize for p in params),
                    "state_bytes": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state)),
                    "parameters": count,
                    "temporary_bytes": compiled.memory_analysis().temp_size_in_bytes,
                }
            )
    return table


def main(argv: list[str]) -> int:
    """Runs the suite; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks dense", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="samples a sitting (default 10)")
    parser.add_argument("--sittings", type=int, default=5, help="starts of processes (default 5)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--only", default="", help="workloads whose name holds this text")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rounds < 2 or args.sittings < 1:
        parser.error("--rounds must be at least 2, --sittings at least 1")
    workloads = {k: v for k, v in (QUICK if args.quick else WORKLOADS).items() if args.only in k}
    if not workloads:
        parser.error(f"no workload's name holds {args.only!r}; there are {list(WORKLOADS)}")
    if args.worker:
        work(args.worker, workloads)
        return 0

    packages = ["adamjax", "jax", "jaxlib", "optax", "keras", "torch"]
    packages = [name for name in packages if importlib.util.find_spec(name)]
    results: dict[str, Any] = {"suite": "dense", "sittings": args.sittings, "rounds": args.rounds}
    results["times"] = run_times(workloads, args.sittings, args.rounds, args.quick)
    many = (QUICK if args.quick else WORKLOADS)["500 leaves, 8.2M"]
    results["compile"] = [] if args.only else run_compile(many, min(args.rounds, 7))
    results["memory"] = run_memory(workloads)
    results["environment"] = environment(*packages)
    out = args.out or RESULTS / results["environment"]["platform"] / "dense.json"
    if args.out or not (args.quick or args.only):
        save(results, out)
        print(f"written to {out}")
    return 0
