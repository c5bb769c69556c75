"""Suites run, reports quote only what was measured, and `--compare` lists what changed."""

import copy
import importlib
import json
import re
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from support import ROOT, run_benchmarks

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import __main__ as cli
from benchmarks import all as all_suites
from benchmarks import compare, contenders, dense, measure, memory, report, steps, tables, workers
from benchmarks.train.options import UserError

pytestmark = [pytest.mark.slow, pytest.mark.tooling]

CPU = measure.RESULTS / "cpu"


@pytest.fixture(scope="module")
def committed():
    """The committed results on a CPU, by suite."""
    return report.read(CPU)


# --- the suites -----------------------------------------------------------------------------------


def test_every_suite_is_listed_and_has_a_main(capsys):
    assert cli.main([]) == 0
    listed = capsys.readouterr().out
    for name, what in cli.SUITES.items():
        assert re.search(f"^  {name} +{re.escape(what)}$", listed, re.MULTILINE)
        assert callable(importlib.import_module(f"benchmarks.{name}").main)
    assert {*all_suites.SUITES, "all", "report"} <= cli.SUITES.keys()
    assert {*all_suites.SUITES} == report.SECTIONS.keys() <= tables.SUITES.keys()


def test_an_unknown_suite_gets_one_line(capsys):
    assert cli.main(["nonsense"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_compile_runs_with_quick(tmp_path):
    pytest.importorskip("optax")
    done = run_benchmarks(
        "compile", "--quick", "--rounds", "2", "--out", "compile.json", cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "\r" not in done.stderr  # no progress bar, as stderr is not a terminal
    results = json.loads((tmp_path / "compile.json").read_text())
    assert results["quick"]
    assert {row["what"] for row in results["times"]} == {"trace and lower", "compile"}
    for row in results["times"]:
        assert row["s"].keys() == {"adamjax", "optax"}
        assert min(x["median"] for x in row["s"].values()) > 0
    assert "A step on 20 leaves. A training run pays" in tables.SUITES["compile"](results)


def test_memory_runs_with_quick(tmp_path):
    pytest.importorskip("optax")
    done = run_benchmarks("memory", "--quick", "--out", "memory.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "memory.json").read_text())
    for row in results["dense"]:
        # Two float32 moments, and a count.
        assert 8 <= row["state_bytes"] / row["parameters"] < 8.01
    rows, width, _ = memory.QUICK_TABLE
    by_mode = {row["mode"]: row for row in results["tables"]}
    assert by_mode.keys() == set(memory.MODES)
    parameters = (rows + 1) * width  # the table, and a head as wide as a row
    for row in results["tables"]:
        assert row["parameters"] == parameters
        assert row["state_bytes"] >= 8 * parameters
    # Besides the moments, `exact_rows` has an int32 for each row, and its ring.
    assert by_mode["exact_rows"]["state_bytes"] >= 8 * parameters + 4 * rows
    # A dense gradient is as large as the table.
    assert by_mode["dense gradient"]["temporary_bytes"] >= 4 * rows * width
    assert by_mode['rows="lazy"']["temporary_bytes"] < 4 * rows * width
    assert "exact_rows" in tables.SUITES["memory"](results)


def test_all_runs_every_suite_and_names_those_that_failed(monkeypatch, tmp_path, capsys):
    commands, arguments_of_report = [], []

    def pretend_to_run(command, **options):
        commands.append(command)
        status = 1 if "rows" in command else 0
        return subprocess.CompletedProcess(command, status)

    monkeypatch.setattr(all_suites.subprocess, "run", pretend_to_run)
    monkeypatch.setattr(all_suites.report, "main", arguments_of_report.append)
    assert all_suites.main(["--quick", "--out", str(tmp_path)]) == 1
    for suite, command in zip(all_suites.SUITES, commands, strict=True):
        assert command[1:4] == ["-m", "benchmarks", suite]
        assert "--quick" in command
        assert command[-2:] == ["--out", str(tmp_path / f"{suite}.json")]
    assert arguments_of_report == [[str(tmp_path)]]
    assert "failed: rows" in capsys.readouterr().err


# --- measuring ------------------------------------------------------------------------------------


def test_bandwidth_is_plausible():
    bandwidth = measure.spread(measure.bandwidth_samples(2**22, 3))
    assert 1e8 < bandwidth["q25"] <= bandwidth["median"] <= bandwidth["q75"] < 1e14


def test_a_cpu_has_no_memory_of_its_own_and_is_not_exclusive(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.chdir(ROOT)
    device = measure.device(quick=True)
    assert (device.platform, device.memory, device.exclusive) == ("cpu", None, False)


def test_the_bandwidth_of_results_is_measured_before_and_after_them(monkeypatch):
    results = {"quick": False}
    monkeypatch.setattr(measure, "device", lambda: measure.Device(bandwidth=(4e9, 5e9)))
    measure.Device(bandwidth=(1e9, 2e9, 3e9)).add_bandwidth(results)
    assert results["bandwidth"] == {"median": 3e9, "q25": 2e9, "q75": 4e9}


@pytest.mark.parametrize("package", ["adamjax", "optax", "keras"])
def test_both_clip_chains_clip_in_every_package(package, monkeypatch):
    """Clipped gradients far above the norm make the same step, whatever their size."""
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    pytest.importorskip(package)

    def weights_after_two_steps(chain, first):
        init, step = steps.chain_step(package, chain)
        params = [jnp.zeros(3), jnp.zeros(3)]
        state = init(params)
        # Unless the first gradient is clipped, the second one hardly counts beside it.
        for gradient in (first, 0.1):
            params, state = step(params, state, [jnp.full(3, gradient)] * 2)
        return np.array(params[0])

    unclipped = weights_after_two_steps("adam", 1e4)[0]
    for chain in ("clip + adam", "clip + adam, grouped"):
        large, huge = (weights_after_two_steps(chain, first) for first in (1e2, 1e4))
        np.testing.assert_allclose(huge, large, rtol=1e-5)
        assert huge[0] != pytest.approx(unclipped, rel=1e-2)


def test_the_least_bytes_of_a_dense_step():
    shapes = [(10, 7), (30,)]
    per_parameter = [
        dense.least_bytes(shapes, dtype, chain) / 100
        for dtype in ("float32", "bfloat16")
        for chain in ("adam", "clip + adam")
    ]
    # Reads p, g, m and v; writes p, m and v. A clip reads g twice. Moments are in float32.
    assert per_parameter == [28, 32, 22, 24]


def test_the_least_bytes_of_a_step_on_rows():
    rows, width, reads = 1000, 8, 16
    case = contenders.Case(rows, width, reads, "uniform")
    distinct = 15.5  # on average
    # Reads and writes p, m and v of the distinct rows or of the whole table.
    touched, whole = (6 * 4 * n * width for n in (distinct, rows))
    batch = 4 * reads * width + 4 * reads  # values and indices
    assert contenders.least_bytes("exact", case, distinct) == touched + batch
    assert contenders.least_bytes("optax", case, distinct) == whole + batch


def test_the_fraction_of_the_limit_is_the_time_for_the_bytes_divided_by_the_time_of_the_step():
    ms = {"median": 4.0, "q25": 2.0, "q75": 8.0}
    fraction = measure.fraction_of_limit(1e6, ms, {"median": 1e9, "q25": 0.5e9, "q75": 2e9})
    assert fraction == {"median": 0.25, "q25": 0.125, "q75": 0.5}


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_commit_is_marked_dirty_if_files_differ_from_it(tmp_path):
    def git(*arguments):
        author = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(tmp_path), *author, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert measure.commit(tmp_path) is None
    results = tmp_path / "benchmarks" / "results"
    results.mkdir(parents=True)
    git("init")
    for path in (tmp_path / "code.py", results / "dense.json"):
        path.write_text("1")
    git("add", ".")
    git("commit", "-m", "first")
    head = git("rev-parse", "--short", "HEAD")
    (results / "dense.json").write_text("2")  # as a run does
    assert measure.commit(tmp_path) == head
    (tmp_path / "code.py").write_text("2")
    assert measure.commit(tmp_path) == f"{head}-dirty"
    # As if the project was a folder of another repository, whose commit is not the project's.
    assert measure.commit(results) is None


def test_contenders_share_a_process_where_only_one_can_use_the_device(monkeypatch):
    started = []

    class Echo:
        def __init__(self, name):
            self.name = name

        def prepare(self, *case):
            return [self.name, *case]

    class WorkerInThisProcess:
        def __init__(self, *arguments, **environment):
            started.append(arguments)
            self.answer = workers.contender_answers(Echo)

        def ask(self, question):
            _, _, method, *_ = question
            if method == "end":
                raise workers.Ended("a worker ended with status -9")
            return self.answer(question)

        def close(self):
            pass

    monkeypatch.setattr(workers, "Worker", WorkerInThisProcess)
    contenders = {"exact 1k": "exact", "exact 4M": "exact", "optax": "optax"}
    with workers.WorkerPool("rows", contenders, measure.Device("tpu")) as pool:
        for name, contender in contenders.items():
            assert pool.ask(name, "prepare", 3) == {name: [contender, 3]}
        assert started == [("rows",)]
        assert pool.ask("optax", "end") == {}
        assert pool.failed.keys() == contenders.keys()


# --- the report -----------------------------------------------------------------------------------


def leaves_of(node):
    """The values in nested dicts and lists."""
    if isinstance(node, dict):
        node = list(node.values())
    if isinstance(node, list):
        return [leaf for part in node for leaf in leaves_of(part)]
    return [node]


def numbers(results):
    leaves = leaves_of(results)
    return [x for x in leaves if isinstance(x, int | float) and not isinstance(x, bool)]


def texts(results):
    return [x for x in leaves_of(results) if isinstance(x, str)]


def with_bandwidth(results):
    """Committed results, as if the bandwidth had been measured."""
    results = copy.deepcopy(results)
    for suite in ("dense", "rows"):
        speed = {"median": 33.3e9, "q25": 30e9, "q75": 35e9}
        results[suite]["bandwidth"] = speed
        for row in results[suite]["times"]:
            row["fraction"] = {
                n: measure.fraction_of_limit(1e7, ms, speed) for n, ms in row["ms"].items()
            }
    return results


def assert_quotes_only(summary, results):
    """Every number in the summary is in the results, in a name, or a count of cases or targets."""
    measured = [x for x in numbers(results) if x]
    shares = [
        100 * row["temporary_bytes"] / row["parameter_bytes"] for row in results["memory"]["dense"]
    ]
    # A summary also has reciprocals of ratios, megabytes, percentages and gigabytes a second.
    known = [*measured, *(1 / x for x in measured), *(x / 1e6 for x in measured), *shares]
    known += [results[s]["bandwidth"]["median"] / 1e9 for s in results if "bandwidth" in results[s]]
    forms = (".0f", ",.1f", ".2f", ".2g", ".3g")
    formatted = {format(x, form) for x in known for form in forms}
    formatted |= {f"{x:,}" for x in measured if isinstance(x, int)}
    # Remove longer names first, because they may contain shorter ones.
    for name in sorted(set(texts(results)), key=len, reverse=True):
        summary = summary.replace(name, "")
    summary = re.sub(r"(\d+) (cases|targets|are missed)", "", summary)
    numerals = set(re.findall(r"\d[\d,]*(?:\.\d+)?(?:e[+-]\d+)?", summary))
    assert len(numerals) > 10
    assert {x.rstrip(",") for x in numerals} <= formatted


def test_the_report_has_every_suite_and_quotes_only_what_was_measured(committed):
    assert {"dense", "rows", "compile", "memory"} <= committed.keys()
    text = report.text(committed)
    for suite, (title, _) in report.SECTIONS.items():
        section = text.split(f"\n## {title}\n")[1].split("\n## ")[0]
        if suite in committed:
            assert tables.SUITES[suite](committed[suite]) in section
        else:
            assert f"Not measured: `python -m benchmarks {suite}`" in section
    assert_quotes_only(report.summary(committed), committed)
    summary = report.summary(with_bandwidth(committed))
    assert_quotes_only(summary, with_bandwidth(committed))
    assert "33.3 GB/s" in summary
    assert "not measured" not in summary


def test_the_summary_names_slow_cases_and_missed_targets(committed):
    before = report.summary(with_bandwidth(committed))
    changed = copy.deepcopy(committed)
    for row in changed["dense"]["times"]:
        row["ratio"]["keras"] = {"median": 0.9, "q25": 0.8, "q75": 1.0}
    slow = changed["dense"]["times"][2]
    slow["ratio"]["keras"] = {"median": 4.44, "q25": 4.0, "q75": 5.0}
    bound = changed["rows"]["bounds"][0]
    bound |= {"measured": 12.5, "holds": False}
    for row in changed["rows"]["times"]:
        row["ratio"]["exact"]["torch sparse"] = {"median": 0.5, "q25": 0.4, "q75": 0.6}
    after = report.summary(changed)
    assert "0.90 to 4.44 of the time with Keras" in after
    case = f"{slow['workload']}, {slow['chain']}"
    assert f"Keras in one case: 4.4 times the time ({case})" in after
    assert f"- {bound['what']}: 12.5 (target: {bound['asked']})\n" in after
    # torch may be faster in some cases of the committed results, but in none of the changed ones.
    slower = sum(r["ratio"]["exact"]["torch sparse"]["q25"] > 1 for r in committed["rows"]["times"])
    if slower > 1:
        assert f"torch's SparseAdam in {slower} cases" in before
    assert "torch's SparseAdam in" not in after


def test_quick_runs_are_not_reported_as_measurements(committed):
    quick = {suite: {**results, "quick": True} for suite, results in committed.items()}
    summary = report.summary(quick)
    assert summary.startswith("**Quick runs")
    assert not re.search(r"\d", summary)


def test_the_report_command_writes_the_page_and_small_plots(committed, tmp_path, capsys):
    for suite, results in with_bandwidth(committed).items():
        (tmp_path / f"{suite}.json").write_text(json.dumps(results))
    assert report.main([str(tmp_path)]) == 0
    text = (tmp_path / "report.md").read_text()
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures == ["report-limit.png", "report-rows.png"]
    assert {*pictures} == {path.name for path in tmp_path.glob("*.png")}
    for picture in pictures:
        assert 5_000 < (tmp_path / picture).stat().st_size < 100_000
    empty = tmp_path / "empty"
    empty.mkdir()
    assert cli.main(["report", str(empty)]) == 2
    assert "python -m benchmarks all" in capsys.readouterr().err


def test_the_committed_report_is_of_the_committed_results(committed):
    assert (CPU / "report.md").read_text() == report.text(committed), (
        "run `python -m benchmarks report benchmarks/results/cpu`"
    )


# --- what changed ---------------------------------------------------------------------------------


def scaled(spread, factor):
    return {name: factor * x for name, x in spread.items()}


def verdicts(old, new):
    before, after = compare.figures(old), compare.figures(new)
    return {name: compare.verdict(before[name], after[name]) for name in before}


def test_results_compared_with_themselves_show_no_change(committed):
    for path in CPU.glob("*.json"):
        results = compare.loaded(path)
        assert set(verdicts(results, results).values()) <= {"same", "within the noise"}
        assert len(compare.figures(results)) > 10
        # The lines of the suite, of A, of B and of the counts, and none of a figure.
        assert len(compare.compared(results, results).splitlines()) == 4


def test_changes_beyond_the_noise_are_listed(committed):
    old = committed["dense"]
    new = copy.deepcopy(old)
    ms = [row["ms"] for row in new["times"]]
    ms[0]["adamjax"] = scaled(ms[0]["adamjax"], 0.5)
    ms[1]["adamjax"] = scaled(ms[1]["adamjax"], 2)
    ms[2]["adamjax"] = scaled(ms[2]["adamjax"], 1.01)
    verdict_of = verdicts(old, new)
    cases = [f"{row['workload']}, {row['chain']}" for row in old["times"]]
    of_cases = [verdict_of["times", case, "ms", "adamjax"] for case in cases[:4]]
    assert of_cases == ["faster", "slower", "within the noise", "within the noise"]
    text = compare.compared(old, new)
    assert re.search(rf"faster +times / {re.escape(cases[0])} / ms / adamjax: .*, 0.5 times", text)
    assert re.search(rf"slower +times / {re.escape(cases[1])} / ms / adamjax: .*, 2 times", text)
    assert cases[2] not in text
    assert "1 faster" in text
    assert "1 slower" in text
    assert cases[2] in compare.compared(old, new, everything=True)


def test_a_larger_fraction_is_faster_but_too_few_rounds_have_no_verdict(committed):
    old = with_bandwidth(committed)["rows"]
    old["times"][0]["rounds"], old["times"][1]["rounds"] = 2, compare.ENOUGH
    new = copy.deepcopy(old)
    too_few, enough, *_ = new["times"]
    for row in (too_few, enough):
        row["ms"]["exact"] = scaled(row["ms"]["exact"], 0.1)
        row["fraction"]["exact"] = scaled(row["fraction"]["exact"], 10)
    verdict_of = verdicts(old, new)
    assert verdict_of["times", enough["case"], "ms", "exact"] == "faster"
    assert verdict_of["times", enough["case"], "fraction", "exact"] == "faster"
    assert verdict_of["times", too_few["case"], "ms", "exact"] == compare.TOO_FEW


def test_a_bound_that_no_longer_holds_is_listed(committed):
    old, new = copy.deepcopy(committed["rows"]), copy.deepcopy(committed["rows"])
    old["bounds"][0]["holds"], new["bounds"][0]["holds"] = True, False
    assert "holds: True -> False" in compare.compared(old, new)


def test_changed_bytes_are_listed(committed):
    old = committed["memory"]
    new = copy.deepcopy(old)
    new["dense"][0]["temporary_bytes"] *= 3
    text = compare.compared(old, new)
    assert "changed" in text
    assert "3 times" in text


def test_results_that_cannot_be_compared_are_refused(committed, tmp_path, capsys):
    paths = {suite: str(CPU / f"{suite}.json") for suite in ("dense", "rows")}
    assert cli.main(["--compare", paths["dense"], paths["rows"]]) == 2
    assert "different suites, 'dense' and 'rows'" in capsys.readouterr().err
    with pytest.raises(UserError, match="quick run"):
        compare.compared(committed["dense"], {**committed["dense"], "quick": True})
    (tmp_path / "other.json").write_text("[]")
    assert cli.main(["--compare", paths["dense"], str(tmp_path / "other.json")]) == 2
    assert "does not say of which suite" in capsys.readouterr().err


def test_results_of_different_devices_are_marked(committed, capsys):
    elsewhere = copy.deepcopy(committed["dense"])
    elsewhere["environment"] |= {"platform": "gpu", "device": "NVIDIA H100"}
    assert "THE DEVICES DIFFER" in compare.compared(committed["dense"], elsewhere)
    path = str(CPU / "dense.json")
    assert cli.main(["--compare", path, path]) == 0
    assert "DIFFER" not in capsys.readouterr().out
