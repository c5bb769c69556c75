"""What every suite measures with: medians and their spread, bandwidth, where it ran, JSON."""

import contextlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = [
    "RESULTS",
    "ROOT",
    "Device",
    "bandwidth",
    "bound",
    "commit",
    "copied",
    "device",
    "environment",
    "fraction",
    "installed",
    "progress",
    "rounded",
    "save",
    "say",
    "spread",
    "tell_bounds",
    "timed",
]

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


# --- samples --------------------------------------------------------------------------------------


def timed(run: Callable[[], Any]) -> float:
    """Seconds that a call takes; the call itself waits for its results."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(samples: Sequence[float]) -> dict[str, float]:
    """The median of samples and their quartiles."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": middle, "q25": low, "q75": high}


def rounded(samples: Sequence[float]) -> dict[str, float]:
    """The same to four digits."""
    return {name: float(f"{x:.4g}") for name, x in spread(samples).items()}


def bound(what: str, asked: str, limit: float, value: float | None) -> dict[str, Any]:
    """What is asked, "at least" or "at most", and whether what was measured (`None`: not) holds."""
    holds = None
    if value is not None:
        holds = value >= limit if asked == "at least" else value <= limit
    return {"what": what, "asked": f"{asked} {limit:g}", "measured": value, "holds": holds}


def tell_bounds(found: Sequence[dict[str, Any]]) -> None:
    """Prints bounds."""
    for row in found:
        verdict = {None: "      ", True: "holds ", False: "FAILS "}[row["holds"]]
        measured = "not measured" if row["measured"] is None else f"{row['measured']:.3g}"
        print(f"  {verdict} {row['what']}: {row['asked']}; {measured}")


@contextlib.contextmanager
def progress(total: int, unit: str = "sample") -> Iterator[Any]:
    """A progress bar on stderr, where that is a terminal; `update(n)` moves it on."""
    from tqdm import tqdm  # type: ignore[import-untyped]

    with tqdm(total=total, unit=unit, disable=None, leave=False) as bar:
        yield bar


def say(text: str) -> None:
    """Prints a line at once, above a progress bar if there is one."""
    from tqdm import tqdm

    with tqdm.external_write_mode():
        print(text, flush=True)


# --- the device, and the limit that its memory sets -----------------------------------------------

# Float32 numbers, 512 MB: no cache holds a tenth of them. And the seconds a sample should last.
LARGE, SAMPLE = 2**27, 0.05


def copied(elements: int = LARGE, samples: int = 15) -> list[float]:
    """Samples of the bytes a second that JAX's first device moves: see `bandwidth`."""
    import jax
    import jax.numpy as jnp

    scale = jax.jit(lambda x, factor: x * factor, donate_argnums=0)
    # A factor that the compiler knows would leave nothing to do.
    held, one = jnp.zeros(elements, jnp.float32), jnp.float32(1)

    def run(times: int) -> None:
        nonlocal held
        for _ in range(times):
            held = scale(held, one)
        held.block_until_ready()

    run(3)
    times = max(1, round(SAMPLE / timed(lambda: run(1))))
    return [8 * elements * times / timed(lambda: run(times)) for _ in range(samples)]


def bandwidth(elements: int = LARGE, samples: int = 15) -> dict[str, float]:
    """Bytes a second between memory and JAX's first device: median and quartiles.

    A jitted `x * factor` over a float32 array far larger than any cache; counted are the bytes
    read and the bytes written, 8 an element. The array is donated, so that the result is written
    where the argument was, as a donated step writes its parameters and moments. (Into a new array
    would be slower, and no limit to such a step: a CPU reads what it is about to overwrite, and
    maps fresh memory.) On a CPU, XLA uses all its threads.

    Args:
      elements: of the array.
      samples: how many, each the mean over several passes that last 0.05 s or more.
    """
    return spread(copied(elements, samples))


def fraction(
    least_bytes: float, ms: dict[str, float], bandwidth: dict[str, float]
) -> dict[str, float]:
    """The share of the limit that a step reaches: 1 where it takes as long as its bytes need.

    It can be above 1 where arrays stay in a cache from one step to the next.

    Args:
      least_bytes: that any such step must move, however it is written.
      ms: the step's times, median and quartiles.
      bandwidth: the device's, as of `bandwidth`; its median sets the limit.
    """
    limit = 1e3 * least_bytes / bandwidth["median"]
    times = {"median": ms["median"], "q25": ms["q75"], "q75": ms["q25"]}
    return {name: float(f"{limit / x:.4g}") for name, x in times.items()}


@dataclass(frozen=True)
class Device:
    """What JAX finds, as a process told that has ended since.

    Attributes:
      platform: "cpu", "gpu", "tpu" or another.
      memory: bytes of the device's own memory; `None` on a CPU, or where nobody tells.
      torch: whether torch is here and runs on it; on another device it is no contender.
      copied: samples of the bandwidth in bytes a second.
    """

    platform: str = "cpu"
    memory: int | None = None
    torch: bool = True
    copied: tuple[float, ...] = ()

    @property
    def exclusive(self) -> bool:
        """Whether only one process at a time can use it."""
        return self.platform not in ("cpu", "gpu")

    @property
    def variables(self) -> dict[str, str]:
        """The environment of processes that share it."""
        hidden = {"CUDA_VISIBLE_DEVICES": ""} if self.platform == "cpu" else {}
        return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **hidden}

    def add_bandwidth(self, results: dict[str, Any], quick: bool = False) -> None:
        """Puts the bandwidth into the results: the samples from before and as many from now.

        A quick run makes do with those from before.
        """
        results["bandwidth"] = rounded(self.copied + (() if quick else device().copied))


def device(quick: bool = False) -> Device:
    """Asks a process of its own what JAX finds, and lets it measure the bandwidth.

    The process ends: a TPU belongs to one at a time, and a GPU's memory to whom took it first.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.measure", *(["--quick"] if quick else [])],
        env={**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    about = json.loads(done.stdout.splitlines()[-1])
    return Device(**{**about, "copied": tuple(about["copied"])})


def _about(quick: bool) -> dict[str, Any]:
    import jax

    first = jax.devices()[0]
    stats = None if first.platform == "cpu" else first.memory_stats()
    torch = importlib.util.find_spec("torch") is not None and first.platform in ("cpu", "gpu")
    if torch and first.platform == "gpu":
        import torch as library

        torch = library.cuda.is_available()
    return {
        "platform": first.platform,
        "memory": (stats or {}).get("bytes_limit"),
        "torch": torch,
        "copied": copied(2**22, 3) if quick else copied(),
    }


# --- where it ran ---------------------------------------------------------------------------------


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit(root: Path = ROOT) -> str | None:
    """The commit of a checkout, with "-dirty" if files are not as committed; else `None`.

    Results do not count: a run writes them.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None  # of a project that this one was copied into
        changed = git("status", "--porcelain", "-uno", "--", ".", ":!benchmarks/results")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def installed(*packages: str) -> list[str]:
    """Those that are."""
    return [name for name in packages if importlib.util.find_spec(name)]


def environment(*packages: str) -> dict[str, Any]:
    """Where and with what a suite ran."""
    import jax

    first = jax.devices()[0]
    return {
        "platform": first.platform,
        "device": _processor() if first.platform == "cpu" else first.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
    }


def save(results: dict[str, Any], path: Path) -> None:
    """Writes results as JSON that differs line by line; what is small is on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1)
    text = re.sub(r"\{\s+([^{}]{,120})\s+\}", lambda m: f"{{{' '.join(m[1].split())}}}", text)
    path.write_text(text + "\n")


if __name__ == "__main__":
    print(json.dumps(_about("--quick" in sys.argv)))
