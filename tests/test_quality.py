"""The quality suite: splits without leakage, the contenders, statistics, and resumed runs."""

import contextlib
import dataclasses
import doctest
import importlib
import itertools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import assert_close, run_benchmarks

pytest.importorskip("optax")
pytest.importorskip("tqdm")
pytest.importorskip("scipy")

from scipy import stats

from benchmarks import float64
from benchmarks.quality import (
    answer,
    contenders,
    data,
    divergence,
    journal,
    models,
    protocol,
    run,
    statistics,
    summary,
)
from benchmarks.quality.model import SPLITS, Model, ranking
from benchmarks.train.options import UserError


def is_installed():
    """Whether the files of MovieLens are installed."""
    with contextlib.suppress(UserError):
        return all(data.path(name).exists() for name in data.HASHES)
    return False


pytestmark = pytest.mark.tooling

needs_data = pytest.mark.skipif(not is_installed(), reason=data.MISSING)


@pytest.mark.parametrize("name", ["model", "protocol", "run", "statistics"])
def test_examples_of_the_docstrings(name):
    result = doctest.testmod(importlib.import_module(f"benchmarks.quality.{name}"))
    assert result.attempted
    assert not result.failed


# --- the data -------------------------------------------------------------------------------------


def random_ratings(users=30, items=150, seed=0):
    """3 to 39 ratings of each user, in random order, many of them at the same second."""
    rng = np.random.default_rng(seed)
    pairs = [(u, i) for u in range(users) for i in rng.permutation(items)[: rng.integers(3, 40)]]
    pairs = np.array(pairs)[rng.permutation(len(pairs))]
    pairs[:, 1] = np.unique(pairs[:, 1], return_inverse=True)[1].ravel()
    return pairs[:, 0], pairs[:, 1], rng.integers(0, 50, len(pairs))


def assert_split_by_time(ratings, total):
    """A user's last two ratings are not in training, and no training rating is later."""
    users = ratings.training[:, 0]
    assert len(users) + 2 * ratings.users == total
    in_training = set(map(tuple, ratings.training.tolist()))
    assert len(in_training) == len(users)
    for user in range(ratings.users):
        times = ratings.times[users == user]
        validated, tested = ratings.held_out_times[user]
        assert (np.diff(times) >= 0).all()
        assert len(times)
        assert times.max() <= validated <= tested
        held_out = {tuple(ratings.validation[user].tolist()), tuple(ratings.test[user].tolist())}
        assert {u for u, _ in held_out} == {user}
        assert len(held_out) == 2
        assert not held_out & in_training
        negatives = {(user, i) for i in ratings.negatives[user].tolist()}
        assert len(negatives) == 99
        assert negatives.isdisjoint(in_training)
        assert negatives.isdisjoint(held_out)


def test_the_last_two_ratings_of_each_user_are_held_out():
    users, items, times = random_ratings()
    ratings = data.split_ratings(users, items, times)
    assert_split_by_time(ratings, len(users))
    # The last item before the validation is in training; before the test, it is the validation's.
    windows, validation, test = ratings.before(5)
    assert windows.shape == (len(ratings.training), 5)
    first = np.searchsorted(ratings.training[:, 0], np.arange(ratings.users))
    assert (windows[first] == ratings.items).all()
    assert (test[:, -1] == ratings.validation[:, 1]).all()
    assert (test[:, :-1] == validation[:, 1:]).all()
    last = np.searchsorted(ratings.training[:, 0], np.arange(ratings.users), side="right") - 1
    assert (validation[:, -1] == ratings.training[last, 1]).all()
    assert (validation != ratings.test[:, 1:]).all()


def test_unrated_draws_only_items_that_the_user_did_not_rate_in_training():
    ratings = data.split_ratings(*random_ratings())
    users = np.repeat(np.arange(ratings.users, dtype=np.int32), 20).reshape(-1, 10)
    items = ratings.unrated(np.random.default_rng(0), users, 7)
    assert items.shape == (*users.shape, 7)
    assert not ratings.rated[users[..., None], items].any()


def test_both_directions_of_a_fact_are_in_the_same_part_of_the_split():
    rng = np.random.default_rng(0)
    # Facts of relation 0, and the same in the other direction with relation 1.
    facts = np.stack([rng.integers(0, 60, 500), np.zeros(500, int), rng.integers(0, 60, 500)], 1)
    inverses = facts[:, [2, 1, 0]] + [0, 1, 0]
    graph = data.split_facts(np.concatenate([facts, inverses]), 60, 2)
    pairs_of_parts = [
        {frozenset((h, t)) for h, _, t in getattr(graph, part).tolist()}
        for part in ("training", "validation", "test")
    ]
    assert all(pairs_of_parts)
    for one, another in itertools.combinations(pairs_of_parts, 2):
        assert not one & another
    trained = set(graph.training[:, [0, 2]].ravel().tolist())
    for part in (graph.validation, graph.test):
        assert set(part[:, [0, 2]].ravel().tolist()) <= trained


def test_the_error_for_a_missing_package_has_the_command_to_install_it(monkeypatch):
    def files(name):
        raise data.importlib.metadata.PackageNotFoundError

    monkeypatch.setattr(data.importlib.metadata, "files", files)
    assert not is_installed()
    with pytest.raises(UserError, match=r"^MovieLens-100k is not .* pip install --no-deps recbole"):
        data.path("ml-100k.inter")


def test_a_file_with_another_hash_is_refused(monkeypatch, tmp_path):
    (tmp_path / "ml-100k.inter").write_text("user\titem\n1\t2\n")
    monkeypatch.setattr(data, "path", lambda name: tmp_path / name)
    with pytest.raises(UserError, match=r"not the file of recbole 1\.2\.1 \(SHA-256 [0-9a-f]{64}"):
        data.lines("ml-100k.inter")


@needs_data
def test_the_ratings_have_the_size_of_movielens():
    ratings = data.ratings()
    assert (ratings.users, ratings.items) == (943, 1682)
    assert_split_by_time(ratings, 100_000)


@needs_data
def test_the_graph_has_the_size_of_recboles():
    graph = data.graph()
    assert (graph.entities, graph.relations) == (34_628, 24)
    sizes = [len(getattr(graph, part)) for part in ("training", "validation", "test")]
    assert sizes == [82_366, 3_053, 3_045]


@needs_data
@pytest.mark.slow
@pytest.mark.parametrize("model", models.MODELS, ids=lambda model: model.name)
def test_batches_depend_on_the_seed_alone_and_models_have_gradients_and_metrics(model):
    model = dataclasses.replace(model, epochs=1, steps=5, batch=8)
    batches, again, others = model.batches(3), model.batches(3), model.batches(4)
    for x, same, other in zip(batches, again, others, strict=True):
        assert x.shape[:2] == (1, 5)
        assert x.dtype == np.int32
        np.testing.assert_array_equal(x, same)
        assert (x != other).any()
    params = model.init(jax.random.key(0))
    assert set(model.tables) <= params.keys()
    loss, grads = jax.value_and_grad(model.loss)(params, tuple(x[0, 0] for x in batches))
    assert jnp.isfinite(loss)
    assert any(jnp.abs(grads[table]).max() > 0 for table in model.tables)
    for split in SPLITS:
        values = model.metric_values(params, split)
        assert set(values) == set(model.metrics)
        assert len(values[model.metrics[0]]) == len(model.reads(split))


# --- the contenders -------------------------------------------------------------------------------

ROWS, STEPS, RATE = 12, 40, 0.02


def trained(name, b2=protocol.B2, steps=STEPS):
    """The weights of a table and a vector after some steps of a contender, all on equal batches."""
    rng = np.random.default_rng(0)
    # Each step reads row 0. The last rows are hardly ever read.
    ids = np.minimum(rng.geometric(0.3, (steps, 4)) - 1, ROWS - 1)
    ids[:, 0] = 0
    batches = ids.astype(np.int32), rng.standard_normal((steps, 4), np.float32)

    def loss(params, batch):
        ids, y = batch
        return jnp.mean((params["table"][ids] @ params["out"] - y) ** 2)

    contender = contenders.MAKERS[name](loss, ("table",), RATE, b2)
    start = np.linspace(-1, 1, 3 * ROWS, dtype=np.float32).reshape(ROWS, 3)
    carry = contender.init({"table": jnp.asarray(start), "out": jnp.ones(3)})
    step = jax.jit(contender.step)
    for i in range(steps):
        carry = step(carry, tuple(x[i] for x in batches))
    return jax.tree.map(np.asarray, contender.read(carry))


@pytest.mark.slow
def test_exact_equals_dense_and_the_other_contenders_do_not():
    dense = trained("dense")
    assert_close(trained("exact"), dense, rtol=2e-5)
    assert_close(trained("exact"), trained("adamjax dense"), rtol=2e-6)
    for name in ("lazy", "counted", "local", "exact + decay", "lazy + decay"):
        assert np.abs(trained(name)["table"] - dense["table"]).max() > 1e-3, name


def test_every_contender_has_a_maker():
    assert contenders.MAKERS["lazy, same rate"] is contenders.MAKERS["lazy"]
    assert contenders.MAKERS.keys() == protocol.CONTENDERS.keys()
    assert set(divergence.NAMES) | {"dense"} <= contenders.MAKERS.keys()


@pytest.mark.parametrize("name", ["counted", "local"])
def test_the_rules_of_this_benchmark_follow_their_formulas(name):
    """One row, read in steps 1, 2, 5 and 9 of ten, against the formulas in float64."""
    reads, b1, b2, eps = {1: 1.0, 2: -0.5, 5: 0.25, 9: 2.0}, protocol.B1, 0.99, protocol.EPS

    def loss(params, batch):
        ids, g = batch
        return jnp.sum(params["table"][ids] * g[:, None])

    contender = contenders.MAKERS[name](loss, ("table",), RATE, b2)
    carry = contender.init({"table": jnp.ones((2, 1))})
    w, m, v, last = 1.0, 0.0, 0.0, 1

    def correction(t):
        return math.sqrt(1 - b2**t) / (1 - b1**t)

    for t in range(1, 11):
        g = reads.get(t, 0.0)
        batch = jnp.array([0 if t in reads else 1], jnp.int32), jnp.array([g], jnp.float32)
        carry = contender.step(carry, batch)
        if t not in reads:
            continue
        before = m, v
        m, v = b1 ** (t - last) * m + (1 - b1) * g, b2 ** (t - last) * v + (1 - b2) * g * g
        if name == "counted":  # the momentum of the missed steps, and this step
            momentum = m + sum(b1**i * before[0] for i in range(1, t - last))
            w -= RATE * (momentum / (1 - b1**t)) / (math.sqrt(v / (1 - b2**t)) + eps)
        else:  # the last read's step and the missed ones, with the moments of the last read
            for i in range(t - last):
                direction = b1**i * before[0] / (math.sqrt(before[1]) + eps)
                w -= RATE * correction(last) * direction
        last = t
    assert float(contender.read(carry)["table"][0, 0]) == pytest.approx(w, rel=2e-6)


@pytest.mark.slow
def test_lazy_diverges_more_for_larger_gaps_and_exact_does_not():
    measured = divergence.measured(0.999, 200)
    assert max(measured["exact"]) < 1e-4
    # Rows with a gap of 100 or more have been read at most twice, so they are left out.
    assert measured["lazy"][0] < 1e-4 < 0.05 < measured["lazy"][1]
    assert measured["lazy"][:6] == sorted(measured["lazy"][:6])


# --- statistics -----------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [0.0, 0.3, -2.0])
def test_the_paired_t_test_agrees_with_scipy(shift):
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=20) + shift, rng.normal(size=20)
    result, expected = statistics.paired(first, second), stats.ttest_rel(first, second)
    interval = expected.confidence_interval(0.95)
    assert result.p == pytest.approx(expected.pvalue)
    assert (result.low, result.high) == pytest.approx((interval.low, interval.high))
    assert result.mean == pytest.approx(np.mean(first - second))
    assert result.effect == pytest.approx(np.mean(first - second) / np.std(first - second, ddof=1))


def test_the_equivalence_test_is_two_one_sided_t_tests():
    rng = np.random.default_rng(1)
    for _ in range(50):
        differences = rng.normal(rng.uniform(-0.02, 0.02), 0.01, 12)
        above = stats.ttest_1samp(differences, -0.01, alternative="greater").pvalue
        below = stats.ttest_1samp(differences, 0.01, alternative="less").pvalue
        assert statistics.is_within(differences, 0.01) == (max(above, below) < protocol.ALPHA)


def test_the_paired_t_test_of_equal_and_failed_runs():
    same = statistics.paired([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (same.mean, same.p, same.effect) == (0, 1, 0)
    shifted = statistics.paired([2.0, 3.0], [1.0, 2.0])
    assert (shifted.low, shifted.high, shifted.p, shifted.effect) == (1, 1, 0, math.inf)
    failed = statistics.paired([math.nan, 1.0], [0.0, 0.0])
    assert failed.p == 1
    assert math.isnan(failed.mean)
    assert not statistics.is_within([math.nan, 0.0], 1)
    with pytest.raises(ValueError, match="got 1 pairs, expected at least 2"):
        statistics.paired([1.0], [2.0])


def test_the_outcome_depends_on_the_margin_and_the_p_value():
    def outcome(differences, p, higher_is_better=True):
        return statistics.outcome(differences, p, 0.01, higher_is_better)

    near, far = [0.001, -0.001, 0.002, 0.0], [0.05, 0.06, 0.055, 0.052]
    wide = [0.3, -0.2, 0.1, 0.02]
    assert outcome(near, p=1.0) == "same"
    assert outcome(far, p=0.001) == "better"
    assert outcome(far, p=0.001, higher_is_better=False) == "worse"
    assert outcome(far, p=0.2) == "undecided"
    assert outcome(wide, p=0.9) == "undecided"
    # The difference is significant but smaller than the margin.
    assert outcome([0.005, 0.0051, 0.0049], p=0.001) == "same"


def test_nan_scores_and_losses_count_against_the_model():
    scores = jnp.array([[jnp.nan, 0.0, 1.0], [1.0, jnp.nan, 0.0], [0.0, 0.0, -1.0]])
    assert ranking(scores)["MRR"].tolist() == pytest.approx([1 / 3, 1 / 2, 1 / 2])
    by_rate = {0.1: [math.nan, 9.0], 0.2: [1.0, 1.0]}
    assert run.chosen_rate(by_rate, "HR@10") == run.chosen_rate(by_rate, "loss") == 0.2


# --- runs -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Toy(Model):
    """A regression on rows, which needs no data set."""

    name = "toy"
    data = "made"
    tables = ("table",)
    metrics = ("loss",)

    def init(self, key):
        return {"table": jax.random.normal(key, (9, 2)), "out": jnp.ones(2)}

    def batches(self, seed):
        rng = np.random.default_rng(seed)
        shape = self.batches_shape
        return rng.integers(9, size=shape, dtype=np.int32), rng.normal(size=shape)

    def examples(self, split):
        rng = np.random.default_rng(SPLITS.index(split))
        return rng.integers(9, size=200, dtype=np.int32), rng.normal(size=200)

    def reads(self, split):
        return self.held_out[split][0] * 10

    def loss(self, params, batch):
        return jnp.mean(self.evaluate(params, *batch)["loss"])

    def evaluate(self, params, ids, y):
        return {"loss": (params["table"][ids] @ params["out"] - y) ** 2}


def toy_plan(*names):
    return run.Plan([Toy(2, 3, 4)], {"toy": names}, [0.01, 0.1], [1000], [0, 1, 2])


FULL_PLAN = toy_plan("dense", "adamjax dense", "exact", "lazy")


def without_times(records):
    return {
        key: {name: x for name, x in cell.items() if name != "seconds"}
        for key, cell in records.cells.items()
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The journal of a finished run of FULL_PLAN."""
    records = journal.Journal(tmp_path_factory.mktemp("toy") / "journal.jsonl", {"of": "toys"})
    new = [is_new for _, _, is_new in FULL_PLAN.run(records)]
    assert new == [True] * FULL_PLAN.num_cells == [True] * len(records.cells)
    return records


@pytest.mark.slow
def test_an_interrupted_run_resumes_and_repeats_no_cell(tmp_path, finished):
    path, plan = tmp_path / "journal.jsonl", toy_plan("dense", "lazy")
    interrupted = plan.run(journal.Journal(path, {"of": "toys"}))
    for _ in range(7):
        next(interrupted)
    interrupted.close()
    with path.open("a") as file:  # as if the run was interrupted while it wrote a line
        file.write('{"cell": ["test", "toy", "la')
    records = journal.Journal(path, {"of": "toys"})
    assert len(records.cells) == 7
    new = [is_new for _, _, is_new in plan.run(records)]
    assert new == [False] * 7 + [True] * (plan.num_cells - 7)
    again, expected = journal.Journal(path, {"of": "toys"}), without_times(finished)
    assert without_times(again) == without_times(records)
    assert without_times(records) == {key: expected[key] for key in records.cells}


def test_a_journal_of_another_run_is_refused(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal.Journal(path, {"seeds": [0, 1], "rates": (0.1,)})
    journal.Journal(path, {"seeds": [0, 1], "rates": (0.1,)})
    with pytest.raises(UserError, match=r"differs in: seeds\): delete it, or name another file"):
        journal.Journal(path, {"seeds": [0], "rates": (0.1,)})


@pytest.mark.slow
def test_the_summary_of_a_finished_run(finished):
    (row,) = summary.summarised(FULL_PLAN, finished)
    assert row["contenders"]["exact"]["rate"] == row["contenders"]["dense"]["rate"]
    exact = row["contenders"]["exact"]["test"]["loss"]
    assert exact["outcome"] == "same"
    assert exact["largest |difference|"] < 1e-4
    lazy = row["contenders"]["lazy"]["test"]["loss"]
    own, dense = (
        [
            finished.cells["test", "toy", name, row["contenders"][name]["rate"], seed]["test"][-1]
            for seed in range(3)
        ]
        for name in ("lazy", "dense")
    )
    differences = [x["loss"] - y["loss"] for x, y in zip(own, dense, strict=True)]
    assert lazy["difference"] == pytest.approx(np.mean(differences), rel=1e-3)
    assert lazy["reference"] == "dense"
    assert "outcome" not in row["contenders"]["adamjax dense"]["test"]["loss"]
    assert sum(row["examples"]) == 200
    groups = row["contenders"]["dense"]["groups"]["loss"]
    assert [x is not None for x in groups] == [n >= protocol.FEWEST for n in row["examples"]]


@pytest.mark.slow
def test_the_answer_and_the_report_show_the_results(finished, tmp_path):
    pytest.importorskip("matplotlib")
    from benchmarks import tables
    from benchmarks.quality import report

    results = {
        "suite": "quality",
        "quick": False,
        "rates": [0.01, 0.1],
        "seeds": [0, 1, 2],
        "betas": [0.9, 0.999],
        "eps": 1e-8,
        "decay": 0.05,
        "data": {"made": {"ratings": 3}},
        "groups": protocol.group_names(),
        "models": summary.summarised(FULL_PLAN, finished),
        "divergence": {"gaps": [1, 2], "by b2": {"0.9": {"exact": [1e-7, 1e-7]}}},
        "environment": {"versions": {"jax": "1"}, "date": "today", "device": "a CPU"},
    }
    results = json.loads(json.dumps(results))
    text = tables.SUITES["quality"](results)
    assert "**Exact**, against dense: same in 1 of 1 comparisons" in text
    lazy_loss = results["models"][0]["contenders"]["lazy"]["test"]["loss"]
    assert answer.difference(lazy_loss) in text
    written = report.write(results, tmp_path)
    plots = ["quality-time.png", "quality-reads.png", "quality-divergence.png"]
    assert [path.name for path in written] == [*plots, "quality.md"]
    page = (tmp_path / "quality.md").read_text()
    lazy = results["models"][0]["contenders"]["lazy"]
    assert f"| lazy | {lazy['rate']:g} |" in page
    assert all(f"](quality-{name}.png)" in page for name in report.CAPTIONS)
    lazy_loss["difference"] = None  # as if a run failed
    assert "runs failed" in tables.SUITES["quality"](results)


@needs_data
@pytest.mark.slow
def test_the_same_command_again_repeats_no_cell_of_a_quick_run(tmp_path):
    command = ["quality", "--quick", "--journal", "j.jsonl", "--out", "out/quality.json"]
    done = run_benchmarks(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert [row["model"] for row in results["models"]] == [m.name for m in models.MODELS]
    assert results["models"][0]["contenders"].keys() == protocol.CONTENDERS.keys()
    for row in results["models"]:
        for comparison in row["contenders"]["exact"]["test"].values():
            assert comparison["outcome"] == "same"
    journal_before = (tmp_path / "j.jsonl").read_text()
    again = run_benchmarks(*command, cwd=tmp_path)
    assert "cells are done already" in again.stdout
    assert (tmp_path / "j.jsonl").read_text() == journal_before


# --- in float64 -----------------------------------------------------------------------------------


def test_compared_counts_epochs_within_the_allowed_difference():
    dense = [0.5, 0.25, 4.0]
    assert float64.compared(dense, dense, 0.0) == {"largest": 0.0, "same": 1.0}
    own = [0.5, 0.25 * (1 + 1e-6), 4.0]
    result = float64.compared(own, dense, 0.0)
    assert result["same"] == 2 / 3
    assert_close(result["largest"], 1e-6, rtol=1e-6)
    assert float64.compared(own, dense, 1e-5)["same"] == 1


def test_one_ulp_off_moves_about_half_of_the_weights():
    start = {"table": jnp.linspace(-1.0, 1.0, 1000)}
    moved = float64.one_ulp_off(start, seed=0)["table"]
    is_moved = np.asarray(moved != start["table"])
    assert 0.4 < is_moved.mean() < 0.6
    assert_close(
        moved[is_moved], np.nextafter(start["table"][is_moved], np.float32(np.inf)), rtol=0
    )
    assert float64.distance([moved], [start["table"]]) <= 2.0**-23


def test_float64_reads_the_rates_of_the_suite_quality(tmp_path):
    assert float64.rates(float64.RATES_FROM).keys() == {m.name for m in models.MODELS}
    with pytest.raises(UserError, match="no results of the suite quality"):
        float64.rates(tmp_path / "quality.json")


@needs_data
@pytest.mark.slow
def test_in_float64_exact_has_the_metrics_of_dense(tmp_path):
    command = ["float64", "--quick", "--only", "NeuMF", "--out", "float64.json"]
    done = run_benchmarks(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "float64.json").read_text())
    rows = results["metrics"]
    assert {row["metric"] for row in rows} == {"HR@10", "NDCG@10"}
    assert {row["contenders"]["exact"]["same"] for row in rows} == {1}
    [weights] = results["weights"]
    assert all(0 < x < 1e-9 for values in weights["contenders"].values() for x in values)
