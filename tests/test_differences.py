"""The numbers on other packages in docs/coming-from.md are what they do."""

import importlib.util
import json
import math

import pytest

from benchmarks import differences
from benchmarks.measure import RESULTS

COMMITTED = {
    row["key"]: row["numbers"]
    for row in json.loads((RESULTS / "any" / "differences.json").read_text())["rows"]
}


@pytest.mark.parametrize("system", differences.SYSTEMS)
@pytest.mark.parametrize("key", differences.CASES)
def test_the_committed_number_is_what_the_package_does(key, system):
    if importlib.util.find_spec(system) is None:
        pytest.skip(f"{system} is not installed")
    found, committed = differences.measured(key, system), COMMITTED[key][system]
    if isinstance(committed, str):
        assert found == committed
    else:
        assert math.isclose(found, committed, rel_tol=2e-3, abs_tol=1e-6)
