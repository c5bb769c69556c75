"""Shared by the suites: times, medians and ratios, the memory's bandwidth, where a suite ran.

Importing this module does not import JAX: a process that starts workers must not take a device
that only one process at a time can use.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"

# For each round, the seconds of each contender by its name.
Rounds = Sequence[dict[str, float]]


def timed(run: Callable[[], Any]) -> float:
    """Seconds that a call takes; the call itself waits for its results."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def seconds_per_step(
    run: Callable[[int], Any], seconds: float, most: int = 50, least: int = 1
) -> float:
    """The mean time of a step, over as many steps as take about `seconds` together.

    Their number is estimated from a first step, which is not counted.
    """
    first = timed(lambda: run(1))
    steps = max(least, min(most, round(seconds / first)))
    return timed(lambda: run(steps)) / steps


def spread(samples: Sequence[float]) -> dict[str, float]:
    """The median of samples and their quartiles, to four digits."""
    quartiles = statistics.quantiles(samples, n=4, method="inclusive")
    low, middle, high = (float(f"{x:.4g}") for x in quartiles)
    return {"median": middle, "q25": low, "q75": high}


def names_in_every_round(rounds: Rounds, names: Iterable[str]) -> list[str]:
    return [n for n in names if all(n in one_round for one_round in rounds)]


def times(rounds: Rounds, names: Sequence[str], scale: float = 1e3) -> dict[str, Any]:
    """The spread of each contender's seconds times `scale`: by default milliseconds."""
    return {n: spread([scale * one_round[n] for one_round in rounds]) for n in names}


def time_ratios(rounds: Rounds, own: str, names: Sequence[str]) -> dict[str, Any]:
    """The spread of one contender's time divided by each other's, taken within a round."""
    return {n: spread([x[own] / x[n] for x in rounds]) for n in names if n != own}


def bound(what: str, relation: str, limit: float, value: float | None) -> dict[str, Any]:
    """The check that a figure is "at least" or "at most" a limit; `None` is "not measured"."""
    holds = None
    if value is not None:
        holds = value >= limit if relation == "at least" else value <= limit
    return {"what": what, "asked": f"{relation} {limit:g}", "measured": value, "holds": holds}


def bandwidth_samples(elements: int = 2**27, samples: int = 15) -> list[float]:
    """Samples of the bytes a second that JAX's first device reads and writes.

    A pass is a jitted `x * factor` over a float32 array far larger than any cache: 8 bytes an
    element. The array is donated, as the arrays of a step are: to write into a new array is slower,
    because the CPU reads memory before it overwrites it, and the system maps new pages. A sample
    is the mean over passes that last 0.05 s or more.
    """
    import jax
    import jax.numpy as jnp

    scale = jax.jit(lambda x, factor: x * factor, donate_argnums=0)
    # The factor is an argument, as XLA would remove a multiplication by a constant 1.
    array, one = jnp.zeros(elements, jnp.float32), jnp.float32(1)

    def run(passes: int) -> None:
        nonlocal array
        for _ in range(passes):
            array = scale(array, one)
        array.block_until_ready()

    run(3)
    return [8 * elements / seconds_per_step(run, 0.05, most=1000) for _ in range(samples)]


def fraction_of_limit(
    least_bytes: float, ms: dict[str, float], bandwidth: dict[str, float]
) -> dict[str, float]:
    """The time to move the least bytes at the median bandwidth, divided by a step's time.

    It is above 1 if arrays stay in a cache from one step to the next. The least bytes are those
    that any such step must move; the bandwidth is in bytes a second.
    """
    limit = 1e3 * least_bytes / bandwidth["median"]
    # A longer time is a smaller fraction, so the quartiles change places.
    swapped = {"median": ms["median"], "q25": ms["q75"], "q75": ms["q25"]}
    return {name: float(f"{limit / x:.4g}") for name, x in swapped.items()}


@dataclass(frozen=True)
class Device:
    """The device that JAX finds."""

    platform: str = "cpu"  # or "gpu", "tpu" ...
    memory: int | None = None  # the device's own bytes; `None` on a CPU, or if JAX does not know
    torch: bool = True  # whether torch is installed and runs on the device
    bandwidth: Sequence[float] = ()  # samples in bytes a second

    @property
    def exclusive(self) -> bool:
        """Whether only one process at a time can use it."""
        return self.platform not in ("cpu", "gpu")

    @property
    def variables(self) -> dict[str, str]:
        """The environment variables of processes that share it."""
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.platform == "cpu" else {}
        return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **hidden}

    def add_bandwidth(self, results: dict[str, Any]) -> None:
        """Adds the bandwidth to results; unless the run is quick, it is measured once more."""
        after = () if results["quick"] else device().bandwidth
        results["bandwidth"] = spread([*self.bandwidth, *after])


def device(quick: bool = False) -> Device:
    """The device that JAX finds, and its bandwidth, measured in a process of its own.

    When that process ends, it frees the device: only one process at a time can use a TPU, and the
    first to use a GPU may allocate all its memory.
    """
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(_this_device, quick).result()


def _this_device(quick: bool) -> Device:
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    import jax

    first = jax.devices()[0]
    memory = None if first.platform == "cpu" else (first.memory_stats() or {}).get("bytes_limit")
    has_torch = bool(installed("torch")) and first.platform in ("cpu", "gpu")
    if has_torch and first.platform == "gpu":
        import torch

        has_torch = torch.cuda.is_available()
    samples = bandwidth_samples(2**22, 3) if quick else bandwidth_samples()
    return Device(first.platform, memory, has_torch, samples)


def processor() -> str:
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        for line in (line for line in lines if line.startswith("model name")):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def commit(root: Path = ROOT) -> str | None:
    """The commit of a checkout, with "-dirty" if files are not as committed; else `None`.

    Results do not count: a run writes them.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None  # the checkout is another project's, into which this one was copied
        changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def installed(*modules: str) -> list[str]:
    return [name for name in modules if importlib.util.find_spec(name)]


def environment(*packages: str) -> dict[str, Any]:
    """The device, commit and date of a run, and the versions of the packages that are installed."""
    import jax

    first, versions = jax.devices()[0], {}
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {
        "platform": first.platform,
        "device": processor() if first.platform == "cpu" else first.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def save(results: dict[str, Any], path: Path) -> None:
    """Writes results as JSON for line-by-line diffs: a field a line, a small object on one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1)
    text = re.sub(r"\{\s+([^{}]{,120})\s+\}", lambda m: f"{{{' '.join(m[1].split())}}}", text)
    path.write_text(text + "\n")
