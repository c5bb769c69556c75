"""Dense steps: time against optax, Keras on JAX, torch's fused Adam and the memory's bandwidth.

adamjax, optax and Keras share one process. torch has its own, as the thread pools of JAX and torch
disturb each other. In a round, all contenders take one sample each, one after another. The first is
slower than the others, so the order changes from round to round. A ratio compares two samples of
one round. A step's time changes by a tenth with the places of its arrays in memory, so there are
several sittings: each starts all processes anew and has its own rounds. A step's time is also given
as a fraction of the limit that the device's bandwidth sets: see `least_bytes`.
"""

import math
import random
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from benchmarks import measure
from benchmarks.steps import MAX_NORM, RATE, Runner, chain_step
from benchmarks.suite import Suite, progress, say, say_times
from benchmarks.workers import WorkerPool

CHAINS = ("adam", "clip + adam")
# For workloads of many small leaves, which adamjax can store end to end (`grouped`). The other
# packages cannot.
SMALL_LEAF_CHAINS = ("adam", "adam, grouped", "clip + adam, grouped")
MANY_LEAVES = "500 leaves, 8.2M"
PACKAGES = ("adamjax", "jax", "jaxlib", "optax", "keras", "torch")
IN_JAX = ("adamjax", "optax", "keras")

# A sample takes as many steps as fit into SAMPLE_SECONDS, at most MOST_STEPS.
SAMPLE_SECONDS, MOST_STEPS = 0.05, 100
# Device memory for all contenders together: four contenders, six float32 arrays each.
BYTES_PER_PARAMETER = 4 * 6 * 4

Shapes = list[tuple[int, ...]]


class Workload(NamedTuple):
    shapes: Shapes  # of the parameters' leaves
    dtype: str  # of parameters and gradients
    least_steps: int  # of a sample


def transformer(width: int = 256, layers: int = 12) -> Shapes:
    """The shapes of a transformer's leaves: 12 in each layer, and six others."""
    w, words = width, 32 * width
    layer = [(w,), (w,), (w, 3 * w), (3 * w,), (w, w), (w,)]
    layer += [(w,), (w,), (w, 4 * w), (4 * w,), (4 * w, w), (w,)]
    return [(words, w), (512, w), *(layer * layers), (w,), (w,), (w, words), (words,)]


def small_leaves(count: int = 2000) -> Shapes:
    """The shapes of biases, gains, scalars and small matrices, in one fixed random order."""
    kinds = [(64,), (128,), (256,), (1024,), (), (16, 16), (32, 32), (3, 3, 16), (64, 16)]
    rng = random.Random(0)
    return [rng.choice(kinds) for _ in range(count)]


def size(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def workloads(large: bool) -> dict[str, Workload]:
    """The workloads by name; large sizes are for an accelerator (the one leaf has 1 GiB)."""
    leaf = [(2**28 if large else 2**25,)]
    model = transformer(512, 25) if large else transformer()
    model_name = f"transformer, {len(model)} leaves, {size(model) / 1e6:.1f}M"
    return {
        f"one leaf, {size(leaf) / 1e6:.1f}M": Workload(leaf, "float32", 2),
        model_name: Workload(model, "float32", 3),
        MANY_LEAVES: Workload([(64, 256)] * 500, "float32", 4),
        "transformer, bfloat16": Workload(model, "bfloat16", 3),
        "2,000 leaves of 64": Workload([(64,)] * 2000, "float32", 4),
        "2,000 small leaves, 0.9M": Workload(small_leaves(), "float32", 4),
    }


QUICK = {
    "one leaf, 65k": Workload([(65_536,)], "float32", 2),
    "20 leaves, 1.3k": Workload([(8, 8)] * 20, "float32", 2),
    "40 small leaves": Workload(small_leaves(40), "float32", 2),
}


def chains(workload: str) -> tuple[str, ...]:
    """The chains that are measured on a workload; the name tells whether its leaves are small."""
    return SMALL_LEAF_CHAINS if "small leaves" in workload or "leaves of" in workload else CHAINS


def least_bytes(shapes: Shapes, dtype: str, chain: str) -> int:
    """The least bytes that a step of Adam can read and write.

    For every element, the gradient is read once, and the parameter and both moments are read and
    written once: 28 bytes in float32, 22 in bfloat16 with moments in float32. A clip by the global
    norm reads the gradient once more: 32 and 24. The step count is left out.
    """
    itemsize = jnp.dtype(dtype).itemsize
    moments = 2 * 2 * max(itemsize, 4)  # two, read and written, in float32 or wider
    reads_of_gradient = 2 if "clip" in chain else 1
    return (2 * itemsize + moments + reads_of_gradient * itemsize) * size(shapes)


def random_arrays(shapes: Shapes, dtype: str, seed: int) -> list[Any]:
    rng = np.random.default_rng(seed)
    return [jnp.asarray(rng.standard_normal(s, np.float32), dtype) for s in shapes]


def torch_runner(chain: str, shapes: Shapes, dtype: str) -> Callable[[int], None]:
    """A function that takes some steps of torch's fused Adam in place, and waits for them."""
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


class Contender:
    """One package's steps; lives in a worker process."""

    def __init__(self, name: str) -> None:
        self.name = name

    def prepare(self, chain: str, shapes: Shapes, dtype: str, least_steps: int) -> None:
        """Makes the step, and takes a first sample, which is not counted."""
        if self.name == "torch":
            self.run: Callable[[int], None] = torch_runner(chain, shapes, dtype)
        else:
            self.run = Runner(chain_step(self.name, chain), random_arrays(shapes, dtype, 0))
            self.run.load([(random_arrays(shapes, dtype, 1),)])
        self.limits = SAMPLE_SECONDS, MOST_STEPS, least_steps
        self.sample()

    def sample(self) -> float:
        return measure.seconds_per_step(self.run, *self.limits)


def main(argv: list[str]) -> int:
    counts = {"rounds": 10, "sittings": 5}
    suite = Suite("dense", __doc__, PACKAGES, counts, only_chooses="workloads")
    args = suite.parse(argv)
    device = measure.device(args.quick)
    all_workloads = QUICK if args.quick else workloads(large=device.platform != "cpu")
    chosen = {name: all_workloads[name] for name in suite.chosen(all_workloads)}
    for name, (shapes, *_) in list(chosen.items()):
        needed = BYTES_PER_PARAMETER * size(shapes)
        if device.memory is not None and device.memory < needed:
            del chosen[name]
            say(f"{name}: left out, all contenders together need {needed:,} bytes")
    contenders = [*measure.installed(*IN_JAX), *(["torch"] if device.torch else [])]
    cases = [(workload, chain) for workload in chosen for chain in chains(workload)]
    suite.results["times"] = rows = []
    for workload, chain in progress(cases, "case"):
        shapes, dtype, _ = chosen[workload]
        samples: list[dict[str, float]] = []
        for _ in range(args.sittings):
            with WorkerPool("dense", contenders, device, together=IN_JAX) as pool:
                samples += pool.measure(contenders, (chain, *chosen[workload]), args.rounds)[1]
        names = measure.names_in_every_round(samples, contenders)
        row = {
            "workload": workload,
            "chain": chain,
            "least_bytes": least_bytes(shapes, dtype, chain),
            "ms": measure.times(samples, names),
            "ratio": measure.time_ratios(samples, "adamjax", names),
        }
        rows.append(row)
        say_times(f"{workload}, {chain}", row["ms"])
    device.add_bandwidth(suite.results)
    for row in rows:
        row["fraction"] = {
            name: measure.fraction_of_limit(row["least_bytes"], ms, suite.results["bandwidth"])
            for name, ms in row["ms"].items()
            # In bfloat16 the others' moments have two bytes: `least_bytes` is too many for them.
            if name == "adamjax" or "bfloat16" not in row["workload"]
        }
    return suite.finish()
