"""`--sample N` runs a part of the cases of each test, and `--quick` fewer for before each commit."""

import pytest

# `--quick`: of the cases of a test, the first and then one in so many.
QUICK = 80


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
        "--quick", action="store_true", help=f"skip slow tests, and of the others --sample {QUICK}"
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds; left out by --quick")


def pytest_collection_modifyitems(config, items):
    is_quick = config.getoption("--quick")
    step = config.getoption("--sample") or (QUICK if is_quick else 1)
    cases = {}
    sample, others = [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        number = cases[function] = cases.get(function, -1) + 1
        is_left_out = is_quick and item.get_closest_marker("slow") is not None
        (others if is_left_out or number % step else sample).append(item)
    items[:] = sample
    config.hook.pytest_deselected(items=others)
