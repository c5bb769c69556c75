"""`--quick` runs a sample of the tests, for a check before each commit."""

# Of a test with many cases a quick run takes the first, and then one in so many.
SAMPLED = 80


def pytest_addoption(parser):
    parser.addoption(
        "--quick",
        action="store_true",
        help=f"skip slow tests, and of each other one take the first and every {SAMPLED}th case",
    )


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: takes seconds; left out by --quick")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--quick"):
        return
    cases = {}
    sample, others = [], []
    for item in items:
        function = item.nodeid.partition("[")[0]
        number = cases[function] = cases.get(function, -1) + 1
        is_slow = item.get_closest_marker("slow") is not None
        (others if is_slow or number % SAMPLED else sample).append(item)
    items[:] = sample
    config.hook.pytest_deselected(items=others)
