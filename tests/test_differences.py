"""Compares docs/coming-from.md with other packages: its numbers, and the expressions in its tables.

In the tables of optax and torch, the left column has an expression of that package. The right
column has the adamjax expression that does the same.
"""

import importlib.util
import json
import math
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from support import ROOT, assert_close

import adamjax
from benchmarks import differences
from benchmarks.measure import RESULTS

COMMITTED = {
    row["key"]: row["numbers"]
    for row in json.loads((RESULTS / "any" / "differences.json").read_text())["rows"]
}


@pytest.mark.parametrize("system", differences.SYSTEMS)
@pytest.mark.parametrize("key", differences.CASES)
def test_the_committed_result_is_what_the_package_computes(key, system):
    if importlib.util.find_spec(system) is None:
        pytest.skip(f"{system} is not installed")
    measured, committed = differences.measured(key, system), COMMITTED[key][system]
    if isinstance(committed, str):  # the reason why it has no number
        assert measured == committed
    else:
        assert math.isclose(measured, committed, rel_tol=2e-3, abs_tol=1e-6)


PAGE = (ROOT / "docs" / "coming-from.md").read_text()
PARAMS = {"kernel": jnp.array([1.0, -2.0, 0.5]), "bias": jnp.array([0.25])}
GRADS = [jax.tree.map(lambda x, i=i: jnp.cos(7.0 * x + i) * 2.0, PARAMS) for i in range(9)]
# Values of the names in the expressions of adamjax's column, besides adamjax's own.
OUR_NAMES = {
    "tx": adamjax.scale(-0.5),
    "mask": {"kernel": True, "bias": False},
    "tx_1": adamjax.scale(-0.5),
    "tx_2": adamjax.adam(0.1),
    "loss_fn": lambda params: params["embedding"][0].sum(),
    "grads": GRADS[0],
    "state": adamjax.adam().init(PARAMS),
}
# Values of the names in the expressions of optax's column, besides optax's own. They correspond to
# `OUR_NAMES`.
OPTAX_NAMES = {
    "tx": OUR_NAMES["tx"],
    "mask": OUR_NAMES["mask"],
    "transforms": {"first": OUR_NAMES["tx_1"], "second": OUR_NAMES["tx_2"]},
    "labels": {"kernel": "second", "bias": "first"},
    "n": 3,
    "grads": GRADS[0],
    "state": optax.adam(0.1).init(PARAMS),
}


def expression_pairs(library):
    """The pairs (library's expression, adamjax's expression) in the table of a library.

    Rows that have no expression in one of the columns are left out.
    """
    table = re.search(rf"\| {library} \| adamjax \|\n.*?\n((?:\|.*\n)+)", PAGE)[1]
    columns = [line.strip("|").split(" | ") for line in table.splitlines()]
    return [
        (*re.findall(r"`([^`]+)`", theirs), re.findall(r"`([^`]+)`", ours)[0])
        for theirs, ours in columns
        if "`" in theirs and "`" in ours
    ]


def steps(tx):
    """The parameters and the state after each step."""
    params, state = PARAMS, tx.init(PARAMS)
    for grads in GRADS:
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        yield params, state


def trained(tx):
    *_, (params, _) = steps(tx)
    return params


# Counts at which schedules are compared: the first steps, both sides of every count at which a
# schedule in the table changes its formula, and some after the last of these.
COUNTS = jnp.array(
    [0, 1, 50, 89, 90, 91, 99, 100, 101, 500, 899, 900, 901, 950, 999, 1000, 1001, 2000]
)


@pytest.mark.parametrize(("theirs", "ours"), expression_pairs("optax"))
def test_both_columns_of_the_optax_table_compute_the_same(theirs, ours):
    their_scope = vars(optax) | OPTAX_NAMES
    ours = eval(ours, vars(adamjax) | OUR_NAMES)
    if "(params, average," in theirs:
        next_average = eval(f"lambda params, average: {theirs}", their_scope)
        expected = PARAMS
        for params, _ in steps(OUR_NAMES["tx"]):
            expected = next_average(params, expected)
        *_, (_, state) = steps(ours)
        assert_close(adamjax.averaged_weights(state), expected, rtol=1e-5)
        return
    theirs = eval(theirs, their_scope)
    if hasattr(theirs, "update") and hasattr(theirs, "init"):
        assert_close(trained(ours), trained(theirs), rtol=1e-5)
    elif callable(theirs):
        assert_close(jax.vmap(ours)(COUNTS), jax.vmap(theirs)(COUNTS), rtol=1e-5)
    else:
        assert_close(ours, theirs, rtol=1e-5)


TORCH_PAIRS = expression_pairs("torch")
SCHEDULER_PAIRS = [pair for pair in TORCH_PAIRS if "LR(" in pair[0]]


@pytest.mark.parametrize(
    ("theirs", "ours"), [pair for pair in TORCH_PAIRS if pair not in SCHEDULER_PAIRS]
)
def test_optimizers_in_the_torch_table_take_steps(theirs, ours):
    tx = eval(ours, vars(adamjax) | OUR_NAMES)
    assert trained(tx).keys() == PARAMS.keys()


@pytest.mark.parametrize(("theirs", "ours"), SCHEDULER_PAIRS)
def test_schedules_in_the_torch_table_have_the_rates_of_the_schedulers_beside_them(theirs, ours):
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.Adam([torch.nn.Parameter(torch.ones(1))], lr=1e-3)
    names = {"optimizer": optimizer, "f": lambda count: 1 / (1 + count)}
    scheduler = eval(theirs, vars(torch.optim.lr_scheduler) | names)
    rates = []
    for _ in range(100):
        rates += scheduler.get_last_lr()
        optimizer.step()
        scheduler.step()
    ours = eval(ours, vars(adamjax) | names)
    actual = jnp.stack([jnp.float32(ours(i)) for i in range(100)])
    assert_close(actual, jnp.array(rates), rtol=1e-5)
