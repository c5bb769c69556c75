"""What every suite measures with: medians and their spread, where it ran, results as JSON."""

import importlib.metadata
import json
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

__all__ = ["RESULTS", "environment", "save", "spread", "timed"]

RESULTS = Path(__file__).parent / "results"


def timed(run: Callable[[], Any]) -> float:
    """Seconds that a call takes; the call itself waits for its results."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def spread(samples: Sequence[float]) -> dict[str, float]:
    """The median of samples and their quartiles."""
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": middle, "q25": low, "q75": high}


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def environment(*packages: str) -> dict[str, Any]:
    """Where and with what a suite ran."""
    import jax

    device = jax.devices()[0]
    cpu = device.platform == "cpu"
    return {
        "platform": device.platform,
        "device": _processor() if cpu else device.device_kind,
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "date": time.strftime("%Y-%m-%d"),
    }


def save(results: dict[str, Any], path: Path) -> None:
    """Writes results as JSON that differs line by line; what is small is on one line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(results, indent=1)
    text = re.sub(r"\{\s+([^{}]{,120})\s+\}", lambda m: f"{{{' '.join(m[1].split())}}}", text)
    path.write_text(text + "\n")
