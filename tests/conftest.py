"""Options and fixtures of the tests.

`--sample N` runs some cases of each test, and `--quick` fewer, for before each commit.
"""

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import enable_x64, environment

# With `--quick`: the first case of a test runs, and then one in this many.
QUICK_EVERY = 80


def at_least_one(text):
    """A positive integer, from the command line."""
    number = int(text)
    if number < 1:
        raise pytest.UsageError(f"--sample {text}: expected 1 or more")
    return number


def pytest_addoption(parser):
    parser.addoption(
        "--sample",
        type=at_least_one,
        metavar="N",
        help="of a test with many cases, run the first and then every Nth",
    )
    parser.addoption(
        "--quick",
        action="store_true",
        help=f"skip slow tests, and of the others --sample {QUICK_EVERY}",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds; left out by --quick")


def pytest_collection_modifyitems(config, items):
    is_quick = config.getoption("--quick")
    every = config.getoption("--sample") or (QUICK_EVERY if is_quick else 1)
    cases_seen = {}
    sample, left_out = [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        number = cases_seen.get(function, 0)
        cases_seen[function] = number + 1
        is_too_slow = is_quick and item.get_closest_marker("slow") is not None
        if is_too_slow or number % every:
            left_out.append(item)
        else:
            sample.append(item)
    items[:] = sample
    config.hook.pytest_deselected(items=left_out)


@pytest.fixture
def x64():
    """64-bit arrays, in the whole test."""
    with enable_x64(True):
        yield


@pytest.fixture(scope="session")
def keras():
    """Keras on JAX."""
    os.environ.setdefault("KERAS_BACKEND", "jax")
    keras = pytest.importorskip("keras")
    if keras.backend.backend() != "jax":
        pytest.skip("Keras runs on another backend here")
    return keras


@pytest.fixture(scope="session")
def torch():
    """torch on one thread: its pool and JAX's disturb each other."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return torch


# --- the training job, for test_train.py and test_processes.py ------------------------------------


@pytest.fixture
def prose(tmp_path, monkeypatch):
    """A file of real text; runs go to a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    Path("prose.txt").write_text(Path(argparse.__file__).read_text()[:30_000])
    return "prose.txt"


@pytest.fixture
def start_job():
    """A function that starts the job as a user does, and returns its process."""
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", "train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(),
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()  # its children end with it
        process.communicate()
