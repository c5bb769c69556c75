"""Dense steps: time against optax, Keras on JAX and torch's fused Adam, and against the memory.

adamjax, optax and Keras take their steps in one process, in turn; torch in a process of its own,
in turn with that one, as thread pools disturb each other. A sample is the mean of a few steps
after one that is not timed; a ratio is taken within a round, from samples that lie next to each
other in time, and who goes first changes from round to round, as the first is slower. Where
arrays come to lie in memory moves a step's time by a tenth, so the processes are started anew
several times.

Each time is also given as a fraction of the limit that the device's bandwidth sets, measured before
and after: the least bytes that the step must move (`least_bytes`), over the bytes a second.
"""

import argparse
import functools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.measure import (
    RESULTS,
    Device,
    device,
    environment,
    fraction,
    installed,
    progress,
    rounded,
    save,
    say,
    timed,
)
from benchmarks.workers import Worker, serve

__all__ = [
    "CHAINS",
    "MANY_LEAVES",
    "QUICK",
    "WORKLOADS",
    "chains",
    "jax_step",
    "least_bytes",
    "main",
    "random_arrays",
    "transform",
    "workloads",
]

CHAINS = ("adam", "clip + adam")
# For many small leaves: with those of adamjax joined, the others as ever.
GROUPED = ("adam", "adam, grouped", "clip + adam, grouped")
MAX_NORM = 1.0
RATE = 1e-3


def transformer(width: int = 256, layers: int = 12) -> list[tuple[int, ...]]:
    """The shapes of a transformer's leaves, 12 a layer and six beside."""
    w, words = width, 32 * width
    block = [(w,), (w,), (w, 3 * w), (3 * w,), (w, w), (w,)]
    block += [(w,), (w,), (w, 4 * w), (4 * w,), (4 * w, w), (w,)]
    return [(words, w), (512, w), *(block * layers), (w,), (w,), (w, words), (words,)]


MANY_LEAVES = "500 leaves, 8.2M"


def small_leaves(count: int = 2000) -> list[tuple[int, ...]]:
    """The shapes of biases, gains, scalars and small matrices, in no order."""
    kinds = [(64,), (128,), (256,), (1024,), (), (16, 16), (32, 32), (3, 3, 16), (64, 16)]
    rng = random.Random(0)
    return [rng.choice(kinds) for _ in range(count)]


# Its shapes, its dtype, the least steps of a sample.
Workload = tuple[list[tuple[int, ...]], str, int]


def size(shapes: list[tuple[int, ...]]) -> int:
    """How many numbers arrays of these shapes hold."""
    return sum(math.prod(shape) for shape in shapes)


def workloads(large: bool) -> dict[str, Workload]:
    """What is measured, by name.

    Args:
      large: as for an accelerator: a leaf of 1 GiB, and a transformer of twice the width and depth.
    """
    leaf = [(2**28 if large else 2**25,)]
    model = transformer(512, 25) if large else transformer()
    about = f"transformer, {len(model)} leaves, {size(model) / 1e6:.1f}M"
    return {
        f"one leaf, {size(leaf) / 1e6:.1f}M": (leaf, "float32", 2),
        about: (model, "float32", 3),
        MANY_LEAVES: ([(64, 256)] * 500, "float32", 4),
        "transformer, bfloat16": (model, "bfloat16", 3),
        "2,000 leaves of 64": ([(64,)] * 2000, "float32", 4),
        "2,000 small leaves, 0.9M": (small_leaves(), "float32", 4),
    }


WORKLOADS = workloads(large=False)
QUICK = {
    "one leaf, 65k": ([(65_536,)], "float32", 2),
    "20 leaves, 1.3k": ([(8, 8)] * 20, "float32", 2),
    "40 small leaves": (small_leaves(40), "float32", 2),
}
# The seconds that a sample should last, and the most steps in it.
SAMPLE, MOST = 0.05, 100
# Bytes of a device's memory for each parameter: six arrays of each of four contenders.
HELD = 6 * 4 * 4


def chains(workload: str) -> tuple[str, ...]:
    """The chains that are measured on a workload."""
    return GROUPED if "small leaves" in workload or "leaves of" in workload else CHAINS


def least_bytes(shapes: list[tuple[int, ...]], dtype: str, chain: str) -> int:
    """Bytes that a step of Adam must read and write, however it is written.

    Counted for every element: the gradient is read, parameter and both moments are read and
    written, each once. That is 28 bytes in float32; 22 in bfloat16 with moments in float32. A clip
    by the global norm reads the gradient once more, as the norm of all comes before the first
    element can be clipped: 32 and 24. Scalars are not counted.
    """
    import jax.numpy as jnp

    itemsize = jnp.dtype(dtype).itemsize
    moments = 2 * 2 * max(itemsize, 4)
    reads_of_gradient = 2 if "clip" in chain else 1
    each = 2 * itemsize + moments + reads_of_gradient * itemsize
    return each * size(shapes)


# --- contenders: each is a function that takes one step, and waits where it is asked to -----------


def random_arrays(shapes: list[tuple[int, ...]], dtype: str, seed: int) -> list[Any]:
    import jax
    import numpy as np

    rng = np.random.default_rng(seed)
    return [jax.numpy.asarray(rng.standard_normal(s, np.float32), dtype) for s in shapes]


def transform(name: str, chain: str) -> tuple[Any, Callable[..., Any]]:
    """The optimizer of adamjax or optax, and what applies its updates."""
    clip = chain == "clip + adam"
    if name == "adamjax":
        import adamjax

        first = [adamjax.clip_by_global_norm(MAX_NORM)] if clip else []
        tx = adamjax.chain(*first, adamjax.adam(RATE))
        return adamjax.grouped(tx) if "grouped" in chain else tx, adamjax.apply_updates
    import optax

    first = [optax.clip_by_global_norm(MAX_NORM)] if clip else []
    return optax.chain(*first, optax.adam(RATE)), optax.apply_updates


def jax_step(name: str, chain: str, params: list[Any]) -> tuple[Any, Any]:
    """A jitted step `(params, state, grads) -> (params, state)`, donating, and its state."""
    import jax

    if name == "keras":
        import keras

        clip = MAX_NORM if chain.startswith("clip") else None
        optimizer = keras.optimizers.Adam(RATE, global_clipnorm=clip)
        optimizer.build([keras.Variable(p, dtype=str(p.dtype)) for p in params])
        state = [jax.numpy.array(v.value) for v in optimizer.variables]

        def step(params: Any, state: Any, grads: Any) -> Any:
            return optimizer.stateless_apply(state, grads, params)
    else:
        tx, apply = transform(name, chain)
        state = tx.init(params)

        def step(params: Any, state: Any, grads: Any) -> Any:
            updates, state = tx.update(grads, state, params)
            return apply(params, updates), state

    return jax.jit(step, donate_argnums=(0, 1)), state


def jax_runner(name: str, chain: str, shapes: Any, dtype: str) -> Callable[[int], None]:
    """Takes some steps in place and waits for them."""
    import jax

    params, grads = random_arrays(shapes, dtype, 0), random_arrays(shapes, dtype, 1)
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
            if chain.startswith("clip"):
                torch.nn.utils.clip_grad_norm_(params, MAX_NORM, foreach=True)
            optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return run


# --- workers ------------------------------------------------------------------------------------


def work(kind: str, workloads: dict[str, Workload]) -> None:
    """Serves rounds: asked for (workload, chain), answers with seconds a step of contenders."""
    contenders = ["torch"] if kind == "torch" else installed("adamjax", "optax", "keras")
    runners: dict[str, Callable[[int], None]] = {}
    current, least = None, 1

    def answer(asked: list[str]) -> dict[str, float]:
        nonlocal current, least
        workload, chain = asked
        if asked != current:
            current = asked
            shapes, dtype, least = workloads[workload]
            for name in contenders:
                runners[name] = (
                    torch_runner(chain, shapes, dtype)
                    if name == "torch"
                    else jax_runner(name, chain, shapes, dtype)
                )
        taken = {}
        for name in contenders:
            once = timed(functools.partial(runners[name], 1))
            steps = max(least, min(MOST, round(SAMPLE / once)))
            taken[name] = timed(functools.partial(runners[name], steps)) / steps
        contenders.append(contenders.pop(0))
        return taken

    serve(answer)


def sitting(
    workload: str, chain: str, rounds: int, quick: bool, device: Device, bar: Any
) -> list[dict[str, float]]:
    """Seconds a step of every contender, for each of some rounds, in new processes."""
    kinds = ["jax", *(["torch"] if device.torch else [])]
    options = ["--quick"] if quick else [] if device.platform == "cpu" else ["--large"]
    workers = [Worker("dense", "--worker", kind, *options, **device.variables) for kind in kinds]
    asked = [workload, chain]
    taken = []
    try:
        for worker in workers:
            worker.ask(asked)
        for _ in range(rounds):
            taken.append({n: s for worker in workers for n, s in worker.ask(asked).items()})
            bar.update()
    finally:
        for worker in workers:
            worker.close()
    return taken


def run_times(
    workloads: dict[str, Workload], sittings: int, rounds: int, quick: bool, device: Device
) -> list[dict[str, Any]]:
    """Step times of every contender on every workload and chain."""
    for workload, (shapes, _, _) in list(workloads.items()):
        if device.memory is not None and device.memory < HELD * size(shapes):
            del workloads[workload]
            say(f"{workload}: left out, all contenders together need {HELD * size(shapes):,} bytes")
    table = []
    cases = sum(len(chains(workload)) for workload in workloads)
    with progress(cases * sittings * rounds, "round") as bar:
        for workload, (shapes, dtype, _) in workloads.items():
            for chain in chains(workload):
                taken: list[dict[str, float]] = []
                for _ in range(sittings):
                    taken += sitting(workload, chain, rounds, quick, device, bar)
                row = {
                    "workload": workload,
                    "chain": chain,
                    "least_bytes": least_bytes(shapes, dtype, chain),
                    "ms": {n: rounded([1e3 * t[n] for t in taken]) for n in taken[0]},
                    "ratio": {
                        n: rounded([t["adamjax"] / t[n] for t in taken])
                        for n in taken[0]
                        if n != "adamjax"
                    },
                }
                table.append(row)
                ratios = ", ".join(f"{n} {r['median']:.2f}" for n, r in row["ratio"].items())
                own = row["ms"]["adamjax"]["median"]
                say(f"{workload:32} {chain:12} {own:7.1f} ms; of the time of: {ratios}")
    return table


def main(argv: list[str]) -> int:
    """Runs the suite; see `--help`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks dense", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10, help="samples a sitting (default 10)")
    parser.add_argument("--sittings", type=int, default=5, help="starts of processes (default 5)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    parser.add_argument("--only", default="", help="workloads whose name holds this text")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--large", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--worker", choices=("jax", "torch"), help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rounds < 2 or args.sittings < 1:
        parser.error("--rounds must be at least 2, --sittings at least 1")
    if args.worker:
        work(args.worker, QUICK if args.quick else workloads(args.large))
        return 0

    here = device(args.quick)
    there_are = QUICK if args.quick else workloads(large=here.platform != "cpu")
    chosen = {name: about for name, about in there_are.items() if args.only in name}
    if not chosen:
        parser.error(f"no workload's name holds {args.only!r}; there are {list(there_are)}")
    results: dict[str, Any] = {"suite": "dense", "quick": args.quick}
    results |= {"sittings": args.sittings, "rounds": args.rounds}
    results["times"] = run_times(chosen, args.sittings, args.rounds, args.quick, here)
    here.add_bandwidth(results, args.quick)
    for row in results["times"]:
        row["fraction"] = {
            name: fraction(row["least_bytes"], ms, results["bandwidth"])
            for name, ms in row["ms"].items()
            # In bfloat16 the others have moments of two bytes.
            if name == "adamjax" or "bfloat16" not in chosen[row["workload"]]
        }
    packages = ("adamjax", "jax", "jaxlib", "optax", "keras", "torch")
    results["environment"] = environment(*installed(*packages))
    out = args.out or RESULTS / results["environment"]["platform"] / "dense.json"
    if args.out or not (args.quick or args.only):
        save(results, out)
        print(f"written to {out}")
    return 0
