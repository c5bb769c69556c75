"""The rows suite: its contenders do the same work, and it shows the figures that it measured."""

import json

import numpy as np
import pytest
from support import run_benchmarks

import adamjax
from benchmarks import contenders, measure, rows, steps, tables, workers
from benchmarks.workers import Ended

pytestmark = [pytest.mark.slow, pytest.mark.tooling]

CASE = contenders.Case(600, 4, 16, "uniform")


def batches(distinct=True):
    """Gradients far above every epsilon, so that the form of the epsilon matters little."""
    rng = np.random.default_rng(0)
    indices_of_steps = [
        rng.choice(CASE.rows, CASE.reads, replace=not distinct)
        for _ in range(contenders.INDEX_ARRAYS)
    ]
    values = rng.uniform(1, 2, (contenders.VALUE_ARRAYS, CASE.reads, CASE.width))
    values *= rng.choice([-1, 1], values.shape)
    return np.array(indices_of_steps, np.int32), values.astype(np.float32)


def start_table():
    """The table of every contender before the first step."""
    return np.resize(contenders.start_rows(CASE.width), (CASE.rows, CASE.width))


def moves_of(name, data, count=20):
    """How far some steps of a contender move each element of its table."""
    kind = contenders.TorchTable if name.startswith("torch") else contenders.JaxTable
    table = kind(name, CASE)
    table.load(*data)
    table.run(count)
    if name.startswith("torch"):
        end = table.table.detach().numpy()
    else:
        params, state = table.run.arrays
        if name.startswith("exact"):
            tx = contenders.optimizer(name)
            params, state = tx.flush(params, state)
        end = np.asarray(params["table"])
    return end - start_table()


@pytest.mark.parametrize("name", ["exact", "dense", "keras", "tf form", "torch dense"])
def test_dense_contenders_do_what_optax_does(name, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    pytest.importorskip(contenders.ALL_CONTENDERS[name][0])
    data = batches()
    # A step moves a weight by 1e-3. With another form of epsilon, this differs by 1e-8 at most.
    np.testing.assert_allclose(moves_of(name, data), moves_of("optax", data), atol=2e-7)


def test_lazy_contenders_do_what_torch_does():
    pytest.importorskip("torch")
    data = batches(distinct=False)
    np.testing.assert_allclose(moves_of("torch sparse", data), moves_of("lazy", data), atol=2e-7)


def test_the_exact_step_reads_rows_with_the_values_of_the_dense_optimizer():
    """Its gradients depend on the values of the rows. The lazy step reads other values."""
    data = batches()
    start = {"table": start_table()}
    tx = adamjax.adam(steps.RATE)
    params, state = start, tx.init(start)
    for i in range(20):
        indices, values = data[0][i % contenders.INDEX_ARRAYS], data[1][i % contenders.VALUE_ARRAYS]
        grad = np.zeros_like(start["table"])
        grad[indices] = values * np.asarray(params["table"])[indices]
        updates, state = tx.update({"table": grad}, state, params)
        params = adamjax.apply_updates(params, updates)
    dense = np.asarray(params["table"]) - start["table"]
    np.testing.assert_allclose(moves_of("exact step", data), dense, atol=1e-6)
    assert np.abs(moves_of("lazy step", data) - dense).max() > 1e-4


def test_indices_are_as_skewed_as_the_names_say():
    zipf, uniform = (contenders.batches(case) for case in rows.MAIN[:2])
    assert 1350 < np.mean([len(np.unique(x)) for x in zipf[0]]) < 1450
    assert np.mean([len(np.unique(x)) for x in uniform[0]]) > 8100
    for indices, _ in (zipf, uniform):
        assert indices.min() >= 0
        assert indices.max() < 1_000_000
    again, _ = contenders.batches(rows.MAIN[0])
    np.testing.assert_array_equal(again, zipf[0])


class FakeWorker:
    """A worker that answers at once. It ends when it is asked for a sample of a torch contender."""

    def __init__(self, *arguments, **environment):
        pass

    def ask(self, question):
        _, contender, method, *_ = question
        if method == "sample":
            if contender.startswith("torch"):
                raise Ended("a worker ended with status -9")
            return {"exact": 1e-3, "optax": 0.04, "lazy": 0.5e-3}.get(contender, 0.02)
        figures = {"distinct": 5, "temporary_bytes": 1, "peak_bytes": 2}
        return figures if method == "prepare" else None

    def close(self):
        pass


@pytest.mark.parametrize("in_turn", [True, False])
def test_a_contender_whose_worker_ends_is_listed_and_the_others_are_measured(monkeypatch, in_turn):
    """In turn, if all contenders fit in memory together; otherwise each is measured alone."""
    monkeypatch.setattr(workers, "Worker", FakeWorker)
    monkeypatch.setattr(rows, "fits", lambda pool, cases: in_turn)
    with workers.WorkerPool("rows", list(contenders.ALL_CONTENDERS), measure.Device()) as pool:
        counts = dict(zip(rows.MAIN[:2], (3, 2), strict=True))
        taken = rows.take_samples(pool, counts)
        zipf, uniform = (rows.summary(case, [samples]) for case, samples in taken.items())
    assert (zipf["rounds"], uniform["rounds"]) == (3, 2)
    for row in (zipf, uniform):
        assert set(row["failed"]) == {"torch sparse", "torch dense"}
        assert set(row["ms"]) == {n for n in contenders.ALL_CONTENDERS if n not in row["failed"]}
        assert row["ratio"]["exact"]["optax"]["median"] == 0.025
        assert row["in_turn"] == in_turn
    bounds = {row["what"]: row for row in rows.bounds([zipf, uniform], [])}
    assert bounds["time: optax / exact, Zipf"]["holds"] is True
    assert bounds["time: exact / lazy, Zipf"]["holds"] is False
    assert bounds["time: torch SparseAdam / exact, uniform"]["measured"] is None


def test_a_small_and_a_large_table_take_turns(monkeypatch):
    questions = []

    class RecordedWorker(FakeWorker):
        """Steps on a table of more than a million rows take twice as long."""

        def ask(self, question):
            questions.append(question)
            if question[2] == "prepare":
                self.rows = question[3].rows
            answer = super().ask(question)
            return 2 * answer if question[2] == "sample" and self.rows > 1e6 else answer

    monkeypatch.setattr(workers, "Worker", RecordedWorker)
    sittings, rounds = 2, 3
    growth = rows.measure_growth(sittings, rounds, measure.Device())
    assert [(row["contender"], row["indices"], row["reads"]) for row in growth] == [
        ("exact", indices, 8192) for indices in ("Zipf", "uniform")
    ]
    assert {size: ms["median"] for size, ms in growth[0]["ms"].items()} == {"100k": 1, "4M": 2}
    assert growth[0]["ratio"]["median"] == 2
    # Two kinds of indices in each sitting, and a sample of both tables in each round.
    prepared = [question[3].rows for question in questions if question[2] == "prepare"]
    assert prepared == [100_000, 4_000_000] * 2 * sittings
    samples = sum(question[2] == "sample" for question in questions)
    assert samples == 2 * 2 * sittings * rounds


def test_large_batches_take_fewer_rounds_and_have_fewer_values(monkeypatch):
    small, large = rows.MAIN[0], rows.MAIN[-1]
    assert (small.reads, large.reads) == (8192, 262_144)
    assert [rows.main_rounds(case, 8) for case in (small, large)] == [8, 2]
    assert [contenders.num_value_arrays(case) for case in (small, large)] == [8, 4]
    # Values: 4 arrays of 4 bytes an element. Indices: 32 arrays of 8 bytes an index.
    batch_bytes = contenders.batch_bytes(large)
    assert batch_bytes == 4 * 4 * 262_144 * 64 + 32 * 8 * 262_144
    pool = workers.WorkerPool("rows", ["exact"], measure.Device())
    # The table and its moments in float32, and as much again for temporaries. At most 0.8 of the
    # free memory is used.
    table_bytes = 2 * 3 * 4 * 1_000_000 * 64
    for spare, fits in ((batch_bytes + 1, True), (batch_bytes - 1, False)):
        monkeypatch.setattr(rows, "_memory", lambda path, field, n=spare: (table_bytes + n) / 0.8)
        assert rows.fits(pool, rows.MAIN) == fits


def test_a_quick_run_writes_its_results(tmp_path):
    options = "--quick --sittings 1 --rounds 2 --grid-rounds 2 --only V=4k --out rows.json"
    done = run_benchmarks("rows", *options.split(), "--contenders", "exact;optax", cwd=tmp_path)
    assert "4k rows of 8 columns, 64 indices" in done.stdout, done.stderr
    results = json.loads((tmp_path / "rows.json").read_text())
    assert [row["indices"] for row in results["times"]] == ["Zipf", "uniform"]
    for row in results["times"]:
        assert row["ms"].keys() == {"exact", "optax"}
        assert row["rounds"] == 2
        assert not row["failed"]
        assert row["peak_bytes"]["optax"] >= 4 * 4000 * 8 * 4
        assert 0 < row["temporary_bytes"]["exact"] < 1e6


SPREAD = {"median": 2.0, "q25": 1.0, "q75": 3.0}


def result_of(case, contender_names, **fields):
    """A row of results, as the suite writes it."""
    row = {"case": case.name, **vars(case), "in_turn": True, "rounds": 3}
    row |= {"ms": dict.fromkeys(contender_names, SPREAD), "failed": {}}
    row |= {"ratio": {}, "fraction": dict.fromkeys(contender_names, SPREAD)}
    row |= {"temporary_bytes": {}, "peak_bytes": {}}
    return row | fields


def test_tables_show_all_cases_and_bounds():
    names = list(contenders.CONTENDERS)
    results_of_cases = [
        result_of(
            case,
            [*names, *(contenders.WHOLE_STEPS if case in rows.MAIN else ())],
            in_turn=case.rows < 4_000_000,
            ratio={"exact": {name: {"median": 0.4} for name in names if name != "exact"}},
            temporary_bytes=dict.fromkeys(names, 1e6 if case.reads < 65_536 else 26.5e6),
            peak_bytes=dict.fromkeys(names, 2e6),
            failed={"keras": "ended"} if case == rows.GRID[0] else {},
        )
        for case in [*rows.GRID, *(case for case in rows.MAIN if case not in rows.GRID)]
    ]
    growth = [{"contender": "exact", "indices": "Zipf", "ratio": {"median": 2.4}}]
    results = {
        "environment": {"device": "d", "platform": "gpu", "versions": {}, "date": "today"},
        "times": results_of_cases,
        "bounds": rows.bounds(results_of_cases, growth),
        "sittings": 1,
        "rounds": 2,
        "grid_rounds": 3,
    }
    text = tables.rows(results)
    for reads in ("65,536", "262,144"):
        assert (
            text.count(f"\n1M rows of 64 columns, {reads} indices in a step; 3 rounds in all:\n")
            == 1
        )
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    # One for each number of indices of the main cases.
    assert sum(line.startswith("| exact step |") for line in lines) == 3
    # One for each case: optax and torch take 1 / 0.4 times as long. Two main cases are not in GRID.
    assert sum(line.count(" (2.5, 2.5)") for line in lines) == len(rows.GRID) + 2
    assert "| time: exact / lazy, Zipf | at most 1.25 | 0.4 | yes |" in lines
    for kind in ("Zipf", "uniform"):
        what = f"time: exact / torch SparseAdam, 65,536 indices, {kind}"
        assert f"| {what} | at most 0.8 | 0.4 | yes |" in lines
    for name in ("exact", "lazy"):
        what = f"temporaries of {name}, 65,536 indices, MB"
        assert f"| {what} | at most 26 | 26.5 | **no** |" in lines
    # The results lack ratios without `exact`, whole steps, and the growth for uniform indices.
    assert sum("| not measured |" in line for line in lines) == 7
    assert sum("2.4 | **no** |" in line for line in lines) == 1
    # The grid's cases of 4,000,000 rows: 3 widths, 3 numbers of indices, 2 kinds of indices.
    assert "In 18 cases" in text
    assert f"{rows.GRID[0].name}: keras: ended." in text
