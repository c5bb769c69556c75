"""The main job: what it writes, what it refuses, and that an interruption costs nothing."""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import jax
import jax.numpy as jnp

from benchmarks import __main__ as suites
from benchmarks import model, train
from benchmarks.text import Bigram, installation, make_text, tuned_bigram, unigram

ROOT = Path(__file__).parents[1]
# Where rows do not matter: it compiles in a third of the time.
PLAIN = ["--rows", "none"]
TINY = ["--steps", "20", "--batch", "32", "--context", "3", "--dim", "8", "--hidden", "8"]


@pytest.fixture
def prose(tmp_path, monkeypatch):
    """A file of real text; runs go to a folder of the test's own."""
    monkeypatch.chdir(tmp_path)
    Path("prose.txt").write_text(Path(argparse.__file__).read_text()[:30_000])
    return "prose.txt"


@pytest.fixture
def start():
    """The job as a user starts it."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    started = []

    def start(*arguments):
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", "train", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, "JAX_PLATFORMS": "cpu"},
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def kept(name):
    """All that is in a run's checkpoint."""
    with np.load(Path("runs", name, "checkpoint.npz")) as file:
        arrays = dict(file)
    return json.loads(str(arrays.pop("about"))), arrays


def assert_same_bits(one, other):
    (about, arrays), (other_about, other_arrays) = kept(one), kept(other)
    assert about == other_about
    assert arrays.keys() == other_arrays.keys()
    assert all(arrays[name].tobytes() == other_arrays[name].tobytes() for name in arrays)


def signal_at(monkeypatch, step, *numbers):
    """Has signals arrive while a step is under way, step 0 while it compiles."""
    make_course = train.make_course
    calls = iter(range(step + 1))

    def disturbed(*arguments):
        course = make_course(*arguments)
        at = course.batches.at

        def interrupted(number):
            if next(calls, None) == step:
                for one in numbers:
                    signal.raise_signal(one)
            return at(number)

        monkeypatch.setattr(course.batches, "at", interrupted)
        return course

    monkeypatch.setattr(train, "make_course", disturbed)


@pytest.fixture
def few_frequent(monkeypatch):
    """Few words are frequent, so that the kernel of a small vocabulary is a table as well."""
    monkeypatch.setattr(model, "FREQUENT", 40)
    monkeypatch.setattr(model, "DRAWN", 16)


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_learns_and_writes_what_it_learned(prose, capsys):
    more = ["--steps", "300", "--learning-rate", "0.03"]
    assert train.main(["--text", prose, "--name", "one", *TINY, *more]) == 0
    out = capsys.readouterr().out
    assert "prose.txt" in out
    assert "nearest embeddings" in out

    metrics = json.loads(Path("runs/one/metrics.json").read_text())
    assert metrics["finished"]
    assert metrics["steps_taken"] == len(metrics["training_loss"]) == 300
    losses = metrics["held_out_loss"]
    assert losses["before"] == pytest.approx(losses["unigram"], abs=1e-5)  # where it starts
    assert losses["after"] < losses["unigram"] - 0.3
    assert metrics["tokens_per_second"] > 0
    assert {"jax", "numpy", "adamjax"} <= metrics["versions"].keys()
    assert metrics["config"]["learning_rate"] == 0.03
    assert metrics["neighbours"]
    assert Path("runs/one/loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path("runs/one").glob("*.part"))


def test_runs_without_a_name_are_numbered(prose):
    for _ in range(2):
        assert train.main(["--text", prose, *TINY, *PLAIN, "--steps", "1"]) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["train-1", "train-2"]


def test_the_suites_are_listed_and_found(capsys):
    assert suites.main([]) == 0
    listed = capsys.readouterr().out
    assert all(f"  {name}" in listed for name in suites.SUITES)
    assert all((ROOT / "benchmarks" / f"{name}.py").exists() for name in suites.SUITES)
    assert suites.main(["nonsense"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# --- refusals -------------------------------------------------------------------------------------


def assert_refused(capsys, arguments, *words):
    assert train.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert err.startswith("train: ")
    assert all(word in err for word in words), err


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (None, "No such file"),
        (b"", "no text"),
        (b" \n\t\n", "no text"),
        (b"too few words\n", "too small"),
        (b"caf\xe9 " * 5000, "not UTF-8 text (byte 0xe9 at offset 3)"),
        ("folder", "directory"),
    ],
)
def test_a_file_that_cannot_be_trained_on_gets_one_line(tmp_path, capsys, content, why):
    path = tmp_path / "file"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    # The file's name, where one file is to blame and not the whole text.
    assert_refused(capsys, ["--text", str(path), *TINY], why, "" if "small" in why else str(path))


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--steps", "0"], "--steps: expected a whole number of at least 1, got '0'"),
        (["--batch", "many"], "--batch: expected a whole number"),
        (["--vocab", "1"], "--vocab"),
        (["--learning-rate", "nan"], "--learning-rate: expected a number of at least 0"),
        (["--seed", "-1"], "--seed"),
        (["--name", "../elsewhere"], "--name"),
        (["--name", ""], "--name"),
        (["--speed", "9"], "unrecognized arguments: --speed"),
        (["--text"], "--text"),
        (["--rows", "sparse"], "--rows"),
        (["--learning-rate", "20", "--weight-decay", "0.05"], "must be below 1, got 1;"),
        (["--compare", "--rows", "lazy"], "--compare"),
        (["--compare", "--name", "one"], "--compare"),
        (["--compare", "--steps", "8"], "--steps of at least 12"),
        (["--out", "train.json"], "--out"),
        (["--resume", "runs/none"], "runs/none: no checkpoint"),
    ],
)
def test_a_bad_option_gets_one_line(tmp_path, monkeypatch, capsys, arguments, why):
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, arguments, why)
    assert not list(tmp_path.iterdir())


def test_a_command_line_that_is_refused_exits_with_2(tmp_path, start):
    process = start("--text", str(tmp_path / "missing.txt"))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err == f"train: {tmp_path / 'missing.txt'}: No such file or directory\n"


def test_resume_refuses_other_options_another_text_and_what_it_cannot_read(prose, capsys):
    assert train.main(["--text", prose, "--name", "one", *TINY, *PLAIN]) == 0
    Path("runs/one/metrics.json").unlink()  # as if interrupted in the last evaluation
    before = kept("one")[0]
    capsys.readouterr()
    resume = ["--resume", "runs/one"]
    assert_refused(capsys, ["--text", prose, "--name", "one"], "there already", "--resume")
    assert_refused(capsys, [*resume, "--dim", "9"], "this run has dim 8, not 9")
    assert_refused(capsys, [*resume, "--rows", "lazy"], "this run has rows none, not lazy")
    assert_refused(capsys, [*resume, "--name", "two"], "--name and --resume")
    Path("other.txt").write_text(Path(prose).read_text()[2000:])
    assert_refused(capsys, [*resume, "--text", "other.txt"], "another text")
    Path(prose).unlink()
    assert_refused(capsys, resume, "prose.txt", "No such file")
    assert kept("one")[0] == before
    Path("runs/one/checkpoint.npz").write_bytes(b"nonsense")
    assert_refused(capsys, resume, "not a checkpoint")


def test_a_loss_that_is_not_finite_gets_one_line(prose, capsys):
    arguments = ["--text", prose, "--name", "one", *TINY, *PLAIN, "--learning-rate", "1e38"]
    assert train.main(arguments) == 2
    assert "lower --learning-rate" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("runs/one").exists()


# --- interruption ---------------------------------------------------------------------------------


def lag(name):
    """Of a run's checkpoint, how many steps the embedding's rows lag behind."""
    about, arrays = kept(name)
    return len(about["losses"]) - arrays["state/tables/embedding/last"]


def test_resumed_runs_end_with_the_bits_of_one_that_was_not_interrupted(prose, monkeypatch, capsys):
    job = ["--text", prose, *TINY]
    assert train.main([*job, "--name", "whole"]) == 0
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        signal_at(patch, 0, signal.SIGINT)  # while it compiles: one step is taken
        assert train.main([*job, "--name", "parts"]) == 130
    metrics = json.loads(Path("runs/parts/metrics.json").read_text())
    assert (metrics["steps_taken"], metrics["finished"]) == (1, False)
    assert metrics["held_out_loss"]["after"] is not None
    assert Path("runs/parts/loss.png").exists()

    with monkeypatch.context() as patch:
        # In the midst of a later step, twice: the evaluation is left out as well.
        signal_at(patch, 7, signal.SIGTERM, signal.SIGTERM)
        assert train.main(["--resume", "runs/parts"]) == 143
    metrics = json.loads(Path("runs/parts/metrics.json").read_text())
    assert (metrics["steps_taken"], metrics["held_out_loss"]["after"]) == (8, None)
    assert lag("parts").max() == 8
    assert lag("parts").min() == 0

    with monkeypatch.context() as patch:
        # In the last step: the weights are there, up to date, and are evaluated another time.
        signal_at(patch, 12, signal.SIGINT, signal.SIGINT)
        assert train.main(["--resume", "runs/parts"]) == 0
    metrics = json.loads(Path("runs/parts/metrics.json").read_text())
    assert (metrics["steps_taken"], metrics["finished"]) == (20, False)
    assert not lag("parts").any()

    assert train.main(["--resume", "runs/parts", "--steps", "20"]) == 0
    assert_same_bits("whole", "parts")
    whole, parts = (
        json.loads(Path("runs", name, "metrics.json").read_text()) for name in ("whole", "parts")
    )
    for same in ("held_out_loss", "training_loss", "neighbours", "text", "config"):
        assert whole[same] == parts[same]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers

    capsys.readouterr()
    assert train.main(["--resume", "runs/parts"]) == 0
    assert "nothing is left to resume" in capsys.readouterr().out


def test_a_lazy_run_is_resumed_as_well(prose, monkeypatch):
    job = ["--text", prose, *TINY, "--rows", "lazy"]
    assert train.main([*job, "--name", "whole"]) == 0
    with monkeypatch.context() as patch:
        signal_at(patch, 7, signal.SIGINT, signal.SIGINT)
        assert train.main([*job, "--name", "parts"]) == 130
    assert train.main(["--resume", "runs/parts"]) == 0
    assert_same_bits("whole", "parts")


def test_an_interruption_before_the_first_step_leaves_nothing(prose, monkeypatch, capsys):
    def interrupted(*arguments):
        signal.raise_signal(signal.SIGINT)
        return unigram(*arguments)

    monkeypatch.setattr(train, "unigram", interrupted)
    assert train.main(["--text", prose, *TINY]) == 130
    assert capsys.readouterr().err == "train: interrupted before a step was taken\n"
    assert not Path("runs").exists()


def test_ctrl_c_on_the_command_line(prose, start):
    job = ["--text", prose, *TINY, *PLAIN, "--steps", "3000"]
    arguments = [*job, "--name", "parts"]
    for delay in (0.0, 0.7):  # while it compiles, and amid its steps unless it is very fast
        process = start(*arguments)
        assert any(line.startswith("run:") for line in process.stdout)
        time.sleep(delay)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
        assert process.returncode in ((130,) if delay == 0 else (130, 0)), err
        assert "Traceback" not in err
        arguments = ["--resume", "runs/parts"]
        if process.returncode == 130:
            assert "to go on: python -m benchmarks train --resume runs/parts" in out
            assert 1 <= len(kept("parts")[0]["losses"]) < 3000

    for process in (start(*arguments), start(*job, "--name", "whole")):
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
    assert_same_bits("whole", "parts")


# --- rows -----------------------------------------------------------------------------------------


def test_rows_learn_the_same_as_dense_gradients_all_but_the_lazy(prose, capsys, few_frequent):
    job = ["--text", prose, *TINY, "--steps", "40", "--learning-rate", "0.03"]
    assert train.main([*job, "--compare", "--out", "out.json"]) == 0
    assert not Path("runs").exists()
    results = json.loads(Path("out.json").read_text())
    assert results["tables"].keys() == {"embedding", "output/kernel"}
    for table in results["tables"].values():
        assert table["distinct_at_most"] < table["shape"][0]

    rows = results["rows"]
    assert list(rows) == list(train.ROWS)
    for row in rows.values():
        assert row["ms"]["median"] > 0
        assert len(row["training_loss"]) == 4
    # Losses of 4 nats are 5e-7 apart in float32.
    off = {name: row["largest_difference_to_none"] for name, row in rows.items()}
    assert off["exact"] < 5e-6
    assert off["dense"] < 5e-6
    assert off["lazy"] > 1e-3
    held_out = {name: row["held_out_loss"] for name, row in rows.items()}
    assert held_out["exact"] == pytest.approx(held_out["none"], abs=5e-6)
    assert held_out["dense"] == pytest.approx(held_out["none"], abs=5e-6)
    assert held_out["lazy"] != pytest.approx(held_out["none"], abs=1e-4)

    out = capsys.readouterr().out
    for name in ("exact", "lazy", "dense"):
        (said,) = (
            line
            for line in out.splitlines()
            if line.startswith(f"{name} is", 0) or line.startswith(f"{name} loses")
        )
        slower = rows[name]["ratio_to_none"]["q25"] > 1
        assert ("loses to none" in said) == slower


def small_step(rows):
    """A training step's ingredients, with two tables."""
    config = train.Config(batch=16, context=2, rows=rows)
    vocabulary = 60 + model.FREQUENT
    rng = np.random.default_rng(0)
    params = model.init(0, np.full(vocabulary, 1 / vocabulary), 2, 4, 4)
    params["output"]["kernel"] = jnp.asarray(rng.normal(size=(vocabulary, 4)), jnp.float32)
    windows = model.windows(rng.integers(vocabulary, size=(4, 32)), 2, vocabulary)
    batches = model.Shuffled(windows.starts, 16, 0)
    tx = train.optimizer(config, vocabulary)
    size = model.room(windows, vocabulary, batches, 20)
    course = train.Course(windows.tokens, batches, vocabulary, size)
    return tx, params, course


def test_the_loss_by_rows_is_that_of_the_whole_tables(few_frequent):
    _, params, course = small_step("none")

    @jax.jit
    def both(starts, step):
        key = jax.random.fold_in(jax.random.key(1), step)
        batch = model.batch(course.tokens, starts, 2, course.vocabulary, key)
        indices, here = model.reads(batch, course.vocabulary, course.size)
        rows = {path: model.leaf(params, path)[ids] for path, ids in indices.items()}
        by_rows = model.loss(model.by_rows(params, rows, indices), here, course.vocabulary)
        return indices, model.loss(params, batch, course.vocabulary), by_rows

    most = dict.fromkeys(course.size, 0)
    for step in range(20):
        indices, whole, by_rows = both(course.batches.at(step), step)
        for path, ids in indices.items():
            found = np.asarray(ids)[ids < len(model.leaf(params, path))]
            most[path] = max(most[path], len(found))
            assert (np.diff(found) > 0).all()
        np.testing.assert_allclose(whole, by_rows, rtol=1e-6)
    # Of the embedding there is just as much room as is needed; words may be drawn twice.
    assert most["embedding"] == course.size["embedding"]
    assert 0 <= course.size["output/kernel"] - most["output/kernel"] < model.DRAWN


def test_a_row_that_lags_behind_cannot_be_read(few_frequent, monkeypatch):
    tx, params, course = small_step("exact")
    batch = model.batch(
        course.tokens, course.batches.at(0), 2, course.vocabulary, jax.random.key(0)
    )

    def traced():
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(
            lambda params, state: train.gradients(
                tx, params, state, batch, course.vocabulary, course.size
            )[0],
            params,
            state,
        )

    traced()
    monkeypatch.setattr(model, "by_rows", lambda params, rows, indices: params)
    with pytest.raises(TypeError, match="'embedding' may lag behind"):
        traced()


def test_a_small_vocabulary_has_one_table():
    assert model.tables(model.FREQUENT + model.DRAWN) == ("embedding",)
    assert model.tables(model.FREQUENT + model.DRAWN + 1) == ("embedding", "output/kernel")


# --- the text, and the models that count ----------------------------------------------------------


@pytest.fixture(scope="module")
def text():
    return make_text("this", [Path(argparse.__file__).read_text()], 500)


def test_nothing_of_what_is_held_out_is_learned_from():
    # Each word occurs twice, within a block: what is held out must be unknown in training.
    words = [f"w{i}" for i in range(2048)]
    text = make_text("pairs", [" ".join(f"{w} {w}" for w in words)], 10_000)
    assert text.training.shape == (30, 128)
    assert text.held_out.shape == (2, 128)
    assert not text.held_out.any()
    assert len(text.words) == 1 + text.training.size // 2


def test_the_vocabulary_is_the_most_frequent_words(text):
    assert len(text.words) == 500
    counts = np.bincount(text.training.ravel(), minlength=500)[1:]
    assert (np.diff(counts) <= 0).all()
    assert make_text("this", [Path(argparse.__file__).read_text()], 500).digest() == text.digest()


def test_probabilities_sum_to_one(text):
    assert unigram(text).sum() == pytest.approx(1)
    bigram = tuned_bigram(text)
    every = np.arange(len(text.words))
    few = Bigram(text, text.training[:2])  # to it most contexts are new
    for model_ in (bigram, few):
        for before in (0, 1, 17, 499, text.boundary):
            probability = model_.probability(np.full(len(every), before), every)
            assert probability.min() > 0
            assert probability.sum() == pytest.approx(1)


def test_the_bigram_is_a_strong_one(text):
    bigram = tuned_bigram(text)
    loss = bigram.loss(text.held_out)
    assert loss < -np.log(unigram(text)[text.held_out]).mean() - 0.5

    # Linear interpolation, even with its best weight for the very text it is judged by.
    before, word = text.held_out[:, :-1].ravel(), text.held_out[:, 1:].ravel()
    seen = np.zeros((len(text.words),) * 2)
    np.add.at(seen, (text.training[:, :-1].ravel(), text.training[:, 1:].ravel()), 1)
    share = seen[before, word] / seen.sum(1)[before].clip(1)
    mixed = [-np.log(w * share + (1 - w) * unigram(text)[word]).mean() for w in (0.5, 0.7, 0.8)]
    assert -np.log(bigram.probability(before, word)).mean() < min(mixed)


def test_the_default_text_is_on_this_machine():
    description, texts = installation()
    assert "documentation and library sources of Python" in description
    assert sum(map(len, texts)) > 2_000_000
    assert (description, texts) == installation()


# --- the model ------------------------------------------------------------------------------------


def test_windows_stay_in_their_block_and_come_once_an_epoch():
    blocks = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    tokens, starts, width = model.windows(blocks, 2, 9)
    contexts, words = model._read(tokens, starts, width)
    np.testing.assert_array_equal(words, blocks.ravel())
    np.testing.assert_array_equal(contexts[:5], [[9, 9], [9, 1], [1, 2], [2, 3], [9, 9]])

    batches = model.Shuffled(starts, 3, seed=1)
    epochs = np.concatenate([batches.at(i) for i in range(16)])
    assert len(set(map(bytes, epochs.reshape(6, 8)))) == 6
    for epoch in epochs.reshape(6, 8):
        np.testing.assert_array_equal(np.sort(epoch), starts)
    np.testing.assert_array_equal(model.Shuffled(starts, 3, seed=1).at(9), batches.at(9))


def test_the_estimated_softmax_is_the_full_one_on_average(monkeypatch):
    monkeypatch.setattr(model, "FREQUENT", 6)
    monkeypatch.setattr(model, "DRAWN", 8)
    one = jnp.zeros(1, jnp.int32)
    rng = np.random.default_rng(0)
    params = model.init(0, np.full(40, 1 / 40), 2, 4, 4)
    params["output"]["kernel"] = jnp.asarray(rng.normal(size=(40, 4)), jnp.float32)
    features = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    words = jnp.array([0, 5, 6, 20, 39])
    keys = jax.random.split(jax.random.key(0), 4000)

    def estimated(key):
        drawn = model.batch(jnp.zeros(3, jnp.int32), one, 2, 40, key).drawn
        return model._estimated(params, features, words, drawn, 40 - 6)

    losses = jax.vmap(estimated)(keys)
    # 1/probability is what the estimate is unbiased for.
    np.testing.assert_allclose(
        np.exp(losses).mean(0), np.exp(model._full(params, features, words)), rtol=0.03
    )


def test_held_out_loss_counts_every_window_once(monkeypatch):
    monkeypatch.setattr(model, "_EVALUATED", 4)
    monkeypatch.setattr(model, "_TOGETHER", 2)
    params = model.init(0, np.array([0.5, 0.25, 0.25]), 2, 4, 4)
    held_out = model.windows(np.array([[0, 0, 1], [0, 2, 1]]), 2, 3)
    expected = -np.log([0.5, 0.5, 0.25, 0.5, 0.25, 0.25]).mean()
    assert model.held_out_loss(params, held_out, lambda: False) == pytest.approx(expected, 1e-6)
    assert model.held_out_loss(params, held_out, lambda: True) is None
