"""Dense steps: time against optax, Keras on JAX and torch's fused Adam, and against the memory.

adamjax, optax and Keras take their steps in one process, in turn; torch in a process of its own, in
turn with that one, as thread pools disturb each other. A ratio is taken within a round, and who
goes first changes from round to round, as the first is slower. Where arrays come to lie in memory
moves a step's time by a tenth, so the processes are started anew several times. Each time is also
given as a fraction of the limit that the device's bandwidth sets: see `least_bytes`.
"""

import itertools
import math
import random
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.steps import MAX_NORM, RATE, Runner, chain_step
from benchmarks.suite import Suite, progress, say, say_times
from benchmarks.workers import Team, players, serve

CHAINS = ("adam", "clip + adam")
# For many small leaves, which adamjax can join.
GROUPED = ("adam", "adam, grouped", "clip + adam, grouped")
MANY_LEAVES = "500 leaves, 8.2M"
PACKAGES = ("adamjax", "jax", "jaxlib", "optax", "keras", "torch")
IN_JAX = ("adamjax", "optax", "keras")

# The seconds that a sample should last, and the most steps in it.
SAMPLE, MOST = 0.05, 100
# Bytes of a device's memory for each parameter: six arrays of each of four contenders.
NEEDED = 6 * 4 * 4

Shapes = list[tuple[int, ...]]
# Its shapes, its dtype, the least steps of a sample.
Workload = tuple[Shapes, str, int]


# --- workloads ------------------------------------------------------------------------------------


def transformer(width: int = 256, layers: int = 12) -> Shapes:
    """The shapes of a transformer's leaves, 12 a layer and six beside."""
    w, words = width, 32 * width
    block = [(w,), (w,), (w, 3 * w), (3 * w,), (w, w), (w,)]
    block += [(w,), (w,), (w, 4 * w), (4 * w,), (4 * w, w), (w,)]
    return [(words, w), (512, w), *(block * layers), (w,), (w,), (w, words), (words,)]


def small_leaves(count: int = 2000) -> Shapes:
    """The shapes of biases, gains, scalars and small matrices, in no order."""
    kinds = [(64,), (128,), (256,), (1024,), (), (16, 16), (32, 32), (3, 3, 16), (64, 16)]
    rng = random.Random(0)
    return [rng.choice(kinds) for _ in range(count)]


def size(shapes: Shapes) -> int:
    """How many numbers arrays of these shapes have."""
    return sum(math.prod(shape) for shape in shapes)


def workloads(large: bool) -> dict[str, Workload]:
    """What is measured, by name.

    Args:
      large: as for an accelerator: a leaf of 1 GiB, and a transformer of twice the width and depth.
    """
    leaf = [(2**28 if large else 2**25,)]
    model = transformer(512, 25) if large else transformer()
    return {
        f"one leaf, {size(leaf) / 1e6:.1f}M": (leaf, "float32", 2),
        f"transformer, {len(model)} leaves, {size(model) / 1e6:.1f}M": (model, "float32", 3),
        MANY_LEAVES: ([(64, 256)] * 500, "float32", 4),
        "transformer, bfloat16": (model, "bfloat16", 3),
        "2,000 leaves of 64": ([(64,)] * 2000, "float32", 4),
        "2,000 small leaves, 0.9M": (small_leaves(), "float32", 4),
    }


QUICK: dict[str, Workload] = {
    "one leaf, 65k": ([(65_536,)], "float32", 2),
    "20 leaves, 1.3k": ([(8, 8)] * 20, "float32", 2),
    "40 small leaves": (small_leaves(40), "float32", 2),
}


def chains(workload: str) -> tuple[str, ...]:
    """The chains that are measured on a workload."""
    return GROUPED if "small leaves" in workload or "leaves of" in workload else CHAINS


def least_bytes(shapes: Shapes, dtype: str, chain: str) -> int:
    """Bytes that a step of Adam must read and write, however it is written.

    Counted for every element: the gradient is read, parameter and both moments are read and
    written, each once. That is 28 bytes in float32; 22 in bfloat16 with moments in float32. A clip
    by the global norm reads the gradient once more, as the norm of all comes before the first
    element can be clipped: 32 and 24. Scalars are not counted.
    """
    itemsize = jnp.dtype(dtype).itemsize
    moments = 2 * 2 * max(itemsize, 4)
    reads_of_gradient = 2 if "clip" in chain else 1
    return (2 * itemsize + moments + reads_of_gradient * itemsize) * size(shapes)


# --- contenders: each takes some steps in place, and waits for them -------------------------------


def random_arrays(shapes: Shapes, dtype: str, seed: int) -> list[Any]:
    """Arrays of normal numbers."""
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(s, np.float32), dtype) for s in shapes]


def jax_runner(package: str, chain: str, shapes: Shapes, dtype: str) -> Runner:
    """Steps of adamjax, optax or Keras."""
    params, grads = random_arrays(shapes, dtype, 0), random_arrays(shapes, dtype, 1)
    init, step = chain_step(package, chain)
    runner = Runner(jax.jit(step, donate_argnums=(0, 1)), params, init(params))
    runner.load([(grads,)])
    return runner


def torch_runner(chain: str, shapes: Shapes, dtype: str) -> Callable[[int], None]:
    """Steps of torch's fused Adam."""
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


class Contenders:
    """In a process: all packages of a kind, "jax" or "torch", which take samples in turn."""

    def __init__(self, kind: str) -> None:
        self.names = ["torch"] if kind == "torch" else measure.installed(*IN_JAX)

    def prepare(self, chain: str, shapes: Any, dtype: str, least: int) -> None:
        """Makes everyone's step and takes a sample."""
        shapes, self.least = [tuple(shape) for shape in shapes], least
        self.runners = {
            name: torch_runner(chain, shapes, dtype)
            if name == "torch"
            else jax_runner(name, chain, shapes, dtype)
            for name in self.names
        }
        self.sample()

    def sample(self) -> dict[str, float]:
        """Seconds a step of each."""
        order = list(self.names)
        self.names.append(self.names.pop(0))
        return {
            n: measure.seconds_per_step(self.runners[n], SAMPLE, MOST, self.least) for n in order
        }


# --- the suite ------------------------------------------------------------------------------------


def take_times(
    workload: Workload, chain: str, sittings: int, rounds: int, device: measure.Device, bar: Any
) -> dict[str, Any]:
    """The times of every contender, its processes started anew for each sitting."""
    shapes, dtype, least = workload
    kinds = ["jax", *(["torch"] if device.torch else [])]
    samples: list[dict[str, float]] = []
    for _ in range(sittings):
        with Team("dense", kinds, device) as team:
            _, rounds_of_kinds = team.play(kinds, (chain, shapes, dtype, least), rounds)
            samples += [
                dict(itertools.chain(*(own.items() for own in by_kind.values())))
                for by_kind in rounds_of_kinds
            ]
            bar.update()
    names = measure.in_all(samples, [*IN_JAX, "torch"])
    return {
        "least_bytes": least_bytes(shapes, dtype, chain),
        "ms": measure.times(samples, names),
        "ratio": measure.time_ratios(samples, "adamjax", names),
    }


def main(argv: list[str]) -> int:
    """Runs the suite; see `--help`."""
    counts = {"rounds": 10, "sittings": 5}
    suite = Suite("dense", __doc__, PACKAGES, counts, only="workloads")
    args = suite.parse(argv)
    if args.worker:
        return serve(players(Contenders))
    here = measure.device(args.quick)
    every = QUICK if args.quick else workloads(large=here.platform != "cpu")
    chosen = {name: every[name] for name in suite.chosen(every)}
    for name, (shapes, *_) in list(chosen.items()):
        if here.memory is not None and here.memory < NEEDED * size(shapes):
            del chosen[name]
            say(f"{name}: left out, all contenders together need {NEEDED * size(shapes):,} bytes")
    cases = [(workload, chain) for workload in chosen for chain in chains(workload)]
    suite.results["times"] = rows = []
    with progress(len(cases) * args.sittings, "sitting") as bar:
        for workload, chain in cases:
            figures = take_times(chosen[workload], chain, args.sittings, args.rounds, here, bar)
            rows.append({"workload": workload, "chain": chain, **figures})
            say_times(f"{workload}, {chain}", figures["ms"])
    here.add_bandwidth(suite.results)
    for row in rows:
        row["fraction"] = {
            name: measure.fraction(row["least_bytes"], ms, suite.results["bandwidth"])
            for name, ms in row["ms"].items()
            # In bfloat16 the others have moments of two bytes.
            if name == "adamjax" or "bfloat16" not in row["workload"]
        }
    return suite.finish()
