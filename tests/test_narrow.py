"""The suite `narrow`: it finds biased moments, and decides which losses are the same."""

import json

import numpy as np
import pytest
from support import assert_close, run_benchmarks

pytest.importorskip("optax")
pytest.importorskip("tqdm")

from benchmarks import moments, narrow, tables

pytestmark = pytest.mark.tooling


@pytest.fixture(scope="module")
def grads():
    return moments.gradients("heavy-tailed", 100, 512)


@pytest.fixture(scope="module")
def expected(grads):
    """m, v and the updates in float64."""
    return moments.reference(grads)


def test_float32_moments_have_no_bias(grads, expected):
    found = moments.errors(moments.trajectory("float32")(grads), expected)
    assert found["biased"] == {"m": 0, "v": 0}
    assert found["update"] < 1e-5
    assert found["finite"]


def test_a_bias_is_found(expected):
    m, v, update = expected
    found = moments.errors((m, 1.01 * v, 1.1 * update), (m, v, update))
    assert found["biased"] == {"m": 0, "v": 1}
    # Errors of v are relative to v, or to a thousandth of v's root mean square if that is larger.
    assert 0.009 < found["bias"]["v"] < 0.0101
    assert_close(found["update"], 0.1, rtol=1e-6)
    assert not moments.errors((m, v, np.inf * update), (m, v, update))["finite"]


def test_a_loss_is_the_same_within_the_margin_or_within_the_seeds():
    full = [2.0, 2.002]
    losses = {"float32": full, "near": [2.008, 2.01], "far": [2.02, 2.022], "better": [1.9, 1.9]}
    found = narrow.compared(losses, before=3.0)["formats"]
    assert {name: result.get("same") for name, result in found.items()} == {
        "float32": None,
        "near": True,
        "far": False,
        "better": False,
    }
    of_distant_seeds = {"float32": [1.9, 2.1], "far": [2.02, 2.022]}
    assert narrow.compared(of_distant_seeds, before=3.0)["formats"]["far"]["same"]


@pytest.mark.slow
def test_the_suite_runs_with_the_option_quick(tmp_path):
    done = run_benchmarks("narrow", "--quick", "--out", "narrow.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "narrow.json").read_text())
    assert all(case["finite"] for case in results["moments"])
    assert results["tasks"].keys() == set(narrow.TASKS)
    page = tables.SUITES["narrow"](results)
    assert "scaled8" in page  # a format of moments
    assert narrow.CONTROL in page  # a format of the training
