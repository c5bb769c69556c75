"""Options and fixtures of the tests.

`--sample N` runs the first and then every Nth case of each test. `--quick`, for use before each
commit, runs fewer cases and skips slow tests.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import enable_x64, environment

# The N of `--sample N` that `--quick` implies.
QUICK_EVERY = 80


def positive_int(text):
    """The type of `--sample`."""
    number = int(text)
    if number < 1:
        raise pytest.UsageError(f"--sample {text}: expected 1 or more")
    return number


def pytest_addoption(parser):
    parser.addoption(
        "--sample",
        type=positive_int,
        metavar="N",
        help="run only the first and then every Nth case of each test",
    )
    parser.addoption(
        "--quick",
        action="store_true",
        help=f"skip slow tests, and run the others with --sample {QUICK_EVERY}",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds; skipped by --quick")
    config.addinivalue_line(
        "markers", "tooling: runs the repository's own programs; .ci/run uses only the pinned JAX"
    )


def pytest_collection_modifyitems(config, items):
    is_quick = config.getoption("--quick")
    every = config.getoption("--sample") or (QUICK_EVERY if is_quick else 1)
    cases_seen = {}
    selected, deselected = [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        number = cases_seen.get(function, 0)
        cases_seen[function] = number + 1
        is_too_slow = is_quick and item.get_closest_marker("slow") is not None
        if is_too_slow or number % every:
            deselected.append(item)
        else:
            selected.append(item)
    items[:] = selected
    config.hook.pytest_deselected(items=deselected)


@pytest.fixture
def x64():
    """Enables 64-bit dtypes during the test."""
    with enable_x64(True):
        yield


@pytest.fixture(scope="session")
def keras():
    """The package `keras`, on JAX."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend here")
    return keras


@pytest.fixture(scope="session")
def torch():
    """The package `torch`, on one thread: its thread pool and JAX's compete for the cores."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


# --- the training job, for test_train.py and test_processes.py ------------------------------------


@pytest.fixture
def prose(tmp_path, monkeypatch):
    """The name of a text file in a new folder, which is the current one during the test."""
    monkeypatch.chdir(tmp_path)
    Path("prose.txt").write_text(Path(argparse.__file__).read_text()[:30_000])
    return "prose.txt"


@pytest.fixture
def start_job():
    """A function that starts the job with these arguments, and returns its process."""
    processes = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", "train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()  # its child processes then end by themselves
        process.communicate()
