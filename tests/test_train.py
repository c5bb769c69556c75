"""The training job: its files, its refusals, and resumed runs that end with the same bits."""

import argparse
import json
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support import ROOT, environment, read_checkpoint

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

import jax
import jax.numpy as jnp

import adamjax
from benchmarks import train
from benchmarks.train import job, model
from benchmarks.train.data import (
    Batches,
    Bigram,
    Windows,
    counted_losses,
    installation,
    make_text,
    unigram,
)
from benchmarks.train.options import ROWS, Config, parse, resume_command
from benchmarks.train.processes import ALONE

pytestmark = [pytest.mark.slow, pytest.mark.tooling]

# For tests in which the mode of rows does not matter: this compiles in a third of the time.
ROWS_NONE = ["--rows", "none"]
TINY = ["--steps", "20", "--batch", "32", "--context", "3", "--dim", "8", "--hidden", "8"]


def read_metrics(name):
    return json.loads(Path("runs", name, "metrics.json").read_text())


def assert_same_checkpoints(run, other_run):
    about, arrays = read_checkpoint(run)
    other_about, other_arrays = read_checkpoint(other_run)
    assert about == other_about
    assert arrays.keys() == other_arrays.keys()
    assert all(arrays[name].tobytes() == other_arrays[name].tobytes() for name in arrays)


def signal_after(monkeypatch, steps, *signals):
    """Raises signals in the next run of the job, in the step after its first `steps` steps."""
    all_batches = job.all_batches

    def all_batches_with_signals(*arguments):
        batch = all_batches(*arguments)
        calls = 0

        def batch_with_signals(step):
            nonlocal calls
            calls += 1
            # The first call is for the compiler. Each later call is within its step.
            if calls - 2 == steps:
                for number in signals:
                    signal.raise_signal(number)
            return batch(step)

        return batch_with_signals

    monkeypatch.setattr(job, "all_batches", all_batches_with_signals)


@pytest.fixture
def few_frequent(monkeypatch):
    """Makes few words frequent, so that a small vocabulary has an output table too."""
    monkeypatch.setattr(model, "FREQUENT", 40)
    monkeypatch.setattr(model, "DRAWN", 16)


# --- a run ----------------------------------------------------------------------------------------


def test_a_run_lowers_the_loss_and_writes_its_results(prose, capsys):
    more = ["--steps", "300", "--learning-rate", "0.03"]
    assert train.main(["--text", prose, "--name", "one", *TINY, *more]) == 0
    out = capsys.readouterr().out
    assert "prose.txt" in out
    assert "nearest embeddings" in out
    lines = ["compiling the evaluation", "held-out: ", "compiling the step", "run:", "\nevaluating"]
    assert sorted(lines, key=out.index) == lines
    size = Path("runs/one/checkpoint.npz").stat().st_size
    assert f"checkpoint.npz ({size / 1e6:,.1f} MB)" in out

    metrics = read_metrics("one")
    assert metrics["finished"]
    assert metrics["steps_taken"] == len(metrics["training_loss"]) == 300
    losses = metrics["held_out_loss"]
    assert losses["before"] == pytest.approx(losses["unigram"], abs=1e-5)
    assert losses["after"] < losses["unigram"] - 0.3
    assert losses["last"] < losses["unigram"] - 0.3
    assert metrics["tokens_per_second"] > 0
    assert {"jax", "numpy", "adamjax"} <= metrics["versions"].keys()
    assert metrics["config"]["learning_rate"] == 0.03
    assert metrics["neighbours"]
    assert Path("runs/one/loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(Path("runs/one").glob("*.part"))


def test_the_average_of_a_short_run_forgets_the_initial_weights(prose):
    for steps in (60, 500, 10_000):
        assert Config(steps=steps).momentum ** steps < 0.01
    options = [*TINY, "--steps", "60", "--learning-rate", "0.03"]
    assert train.main(["--text", prose, "--name", "short", *options]) == 0
    losses = read_metrics("short")["held_out_loss"]
    assert abs(losses["after"] - losses["last"]) < 0.1 * (losses["before"] - losses["last"])


def test_runs_without_a_name_are_numbered(prose):
    for _ in range(2):
        assert train.main(["--text", prose, *TINY, *ROWS_NONE, "--steps", "1"]) == 0
    assert sorted(p.name for p in Path("runs").iterdir()) == ["train-1", "train-2"]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_clean_keeps_the_runs_and_prints_it(tmp_path):
    (tmp_path / "runs" / "one").mkdir(parents=True)
    (tmp_path / ".venv").mkdir()
    make = ["make", "-f", str(ROOT / "Makefile"), "clean"]
    done = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "kept: runs/" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]


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
def test_a_file_that_cannot_be_trained_on_gets_one_line(
    tmp_path, monkeypatch, capsys, content, why
):
    path = tmp_path / "file"
    if content == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    words = [why]
    if why != "too small":  # this is about the whole text, which may come from several files
        words.append(str(path))
    assert_refused(capsys, ["--text", str(path), *TINY], *words)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--steps", "0"], "--steps: expected a whole number of at least 1, got '0'"),
        (["--batch", "many"], "--batch: expected a whole number"),
        (["--vocab", "1"], "--vocab"),
        (["--learning-rate", "nan"], "--learning-rate: expected a number above 0"),
        (["--learning-rate", "0"], "--learning-rate: expected a number above 0, got '0'"),
        (["--learning-rate", "-0.1"], "--learning-rate: expected a number above 0"),
        (["--weight-decay", "-1"], "--weight-decay: expected a number of at least 0"),
        (["--weight-decay", "inf"], "--weight-decay: expected a number of at least 0"),
        (["--save-every", "nan"], "--save-every: expected a number of at least 0"),
        (["--seed", "-1"], "--seed"),
        (["--name", "../elsewhere"], "--name"),
        (["--name", ""], "--name"),
        (["--speed", "9"], "unrecognized arguments: --speed"),
        (["--text"], "--text"),
        (["--rows", "sparse"], "--rows"),
        (["--learning-rate", "20", "--weight-decay", "0.05"], "must be below 1, got 1"),
        (["--compare", "--rows", "lazy"], "--compare"),
        (["--compare", "--name", "one"], "--compare"),
        (["--compare", "--steps", "8"], "--steps of at least 12"),
        (["--compare", "--out", "nowhere/train.json"], "--out nowhere/train.json: expected a file"),
        (["--out", "train.json"], "--out"),
        (["--processes", "3"], "--batch 2048 is not a multiple of --processes 3"),
        (["--resume", "runs/none"], "runs/none: no checkpoint"),
    ],
)
def test_a_bad_option_gets_one_line(tmp_path, monkeypatch, capsys, arguments, why):
    monkeypatch.chdir(tmp_path)
    assert_refused(capsys, arguments, why)
    assert not list(tmp_path.iterdir())


def test_a_file_where_a_folder_should_be_gets_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("runs").write_text("")
    assert_refused(capsys, TINY, "runs is a file")
    assert_refused(capsys, ["--resume", "runs/one"], "no checkpoint.npz to resume from")
    Path("runs").unlink()
    Path("runs").mkdir()
    Path("runs/one").write_text("")
    assert_refused(capsys, [*TINY, "--name", "one"], "runs/one is there already")
    assert [path.name for path in Path("runs").iterdir()] == ["one"]


def test_options_are_refused_without_jax(tmp_path):
    program = (
        "import sys; from benchmarks.train import main; "
        "assert main(['--learning-rate', '0']) == 2; assert 'jax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", program], env=environment(), cwd=tmp_path, check=True)


def test_a_refused_command_line_exits_with_2(tmp_path, monkeypatch, start_job):
    monkeypatch.chdir(tmp_path)
    process = start_job("--text", str(tmp_path / "missing.txt"))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err == f"train: {tmp_path / 'missing.txt'}: No such file or directory\n"


def test_resume_refuses_other_options_another_text_and_unreadable_files(prose, capsys):
    assert train.main(["--text", prose, "--name", "one", *TINY, *ROWS_NONE]) == 0
    Path("runs/one/metrics.json").unlink()  # as if interrupted in the last evaluation
    before, _ = read_checkpoint("one")
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
    after, _ = read_checkpoint("one")
    assert after == before
    Path("runs/one/checkpoint.npz").write_bytes(b"nonsense")
    assert_refused(capsys, resume, "not a checkpoint")


def test_a_loss_that_is_not_finite_gets_one_line(prose, capsys):
    arguments = ["--text", prose, "--name", "one", *TINY, *ROWS_NONE]
    assert train.main([*arguments, "--learning-rate", "1e38", "--weight-decay", "0"]) == 2
    assert "lower --learning-rate" in capsys.readouterr().err.splitlines()[-1]
    assert not Path("runs").exists()


# --- interruption ---------------------------------------------------------------------------------


def lags(name):
    """How many steps each row of the embedding lags behind, in a run's checkpoint."""
    about, arrays = read_checkpoint(name)
    return len(about["losses"]) - arrays["state/1/last/embedding"]


def test_a_resumed_run_ends_with_the_bits_of_an_uninterrupted_one(prose, monkeypatch, capsys):
    arguments = ["--text", prose, *TINY]
    assert train.main([*arguments, "--name", "whole"]) == 0
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        signal_after(patch, 0, signal.SIGINT)
        assert train.main([*arguments, "--name", "parts"]) == 130
    metrics = read_metrics("parts")
    assert (metrics["steps_taken"], metrics["finished"]) == (1, False)
    assert metrics["held_out_loss"]["after"] is not None
    assert Path("runs/parts/loss.png").exists()

    with monkeypatch.context() as patch:
        # Two signals in one step: the second one skips the evaluation.
        signal_after(patch, 6, signal.SIGTERM, signal.SIGTERM)
        assert train.main(["--resume", "runs/parts"]) == 143
    metrics = read_metrics("parts")
    assert (metrics["steps_taken"], metrics["held_out_loss"]["after"]) == (8, None)
    assert lags("parts").max() == 8
    assert lags("parts").min() == 0

    with monkeypatch.context() as patch:
        # In the last step: all rows are brought up to date, and only the evaluation is skipped.
        signal_after(patch, 11, signal.SIGINT, signal.SIGINT)
        assert train.main(["--resume", "runs/parts"]) == 0
    metrics = read_metrics("parts")
    assert (metrics["steps_taken"], metrics["finished"]) == (20, False)
    assert not lags("parts").any()

    assert train.main(["--resume", "runs/parts", "--steps", "20"]) == 0
    assert_same_checkpoints("whole", "parts")
    whole, parts = read_metrics("whole"), read_metrics("parts")
    for same in ("held_out_loss", "training_loss", "neighbours", "text", "config"):
        assert whole[same] == parts[same]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers

    capsys.readouterr()
    assert train.main(["--resume", "runs/parts"]) == 0
    assert "nothing is left to resume" in capsys.readouterr().out


def test_a_lazy_run_is_resumed_as_well(prose, monkeypatch):
    arguments = ["--text", prose, *TINY, "--rows", "lazy"]
    assert train.main([*arguments, "--name", "whole"]) == 0
    with monkeypatch.context() as patch:
        signal_after(patch, 7, signal.SIGINT, signal.SIGINT)
        assert train.main([*arguments, "--name", "parts"]) == 130
    assert train.main(["--resume", "runs/parts"]) == 0
    assert_same_checkpoints("whole", "parts")


def test_ctrl_c_does_not_wait_for_compiled_code(tmp_path):
    # Like the compiler, pbkdf2_hmac keeps Python's signal handlers from running for minutes.
    program = (
        "import hashlib, os, signal, threading\n"
        "from benchmarks.train.interruption import Interruption\n"
        "with Interruption():\n"
        "    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()\n"
        "    hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (130, b"train: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_jax_is_imported_leaves_no_files(prose, number):
    program = (
        "import os, sys, threading, time\n"
        "def interrupt():\n"
        "    while 'jax' not in sys.modules:\n"
        "        time.sleep(0.001)\n"
        f"    os.kill(os.getpid(), {number:d})\n"
        "threading.Thread(target=interrupt).start()\n"
        "from benchmarks.__main__ import main\n"
        f"sys.exit(main(['train', '--text', {prose!r}]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment(), capture_output=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (128 + number, b"train: interrupted\n")
    assert not Path("runs").exists()


def test_ctrl_c_while_the_job_compiles_leaves_no_files(prose, start_job):
    process = start_job("--text", prose, *TINY)
    assert any(line.startswith("compiling") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "train: interrupted\n")
    assert not Path("runs").exists()


def test_after_ctrl_c_amid_steps_the_printed_command_resumes_the_run(prose, start_job):
    arguments = ["--text", prose, *TINY, *ROWS_NONE, "--steps", "3000"]
    process = start_job(*arguments, "--name", "parts", "--save-every", "1000")
    assert any(line.startswith("run:") for line in process.stdout)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130, err
    assert "train: finishing this step, then evaluating; Ctrl-C again skips" in err
    assert "Traceback" not in err
    about, _ = read_checkpoint("parts")
    assert 1 <= len(about["losses"]) < 3000

    *_, announcement, command = out.splitlines()
    assert announcement == "interrupted; to go on:"
    done = subprocess.run(command, shell=True, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    process = start_job(*arguments, "--name", "whole")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert_same_checkpoints("whole", "parts")


def test_the_resume_command_has_the_options_that_a_checkpoint_lacks():
    given = ["--processes", "3", "--coordinator", "host:1", "--process", "0", "--save-every", "5"]
    options = parse([*given, "--name", "one", "--batch", "33"])
    options.folder = Path("runs/two words")
    command = shlex.split(resume_command(options))
    assert command[:4] == [sys.executable, "-m", "benchmarks", "train"]
    again = parse(command[4:])
    assert again.resume == Path("runs/two words")
    for name in ("processes", "coordinator", "process", "save_every"):
        assert getattr(again, name) == getattr(options, name)


# --- rows -----------------------------------------------------------------------------------------


def test_every_mode_but_lazy_has_the_losses_of_dense_gradients(prose, capsys, few_frequent):
    arguments = ["--text", prose, *TINY, "--steps", "40", "--learning-rate", "0.03"]
    assert train.main([*arguments, "--compare", "--out", "out.json"]) == 0
    assert not Path("runs").exists()
    results = json.loads(Path("out.json").read_text())
    rows = results["rows"]
    assert list(rows) == list(ROWS)
    for row in rows.values():
        assert row["ms"]["median"] > 0
        assert len(row["training_loss"]) == 4
    # A loss is about 4 nats, where neighbouring float32 numbers are 5e-7 apart.
    differences = {name: row["largest_difference_to_none"] for name, row in rows.items()}
    assert differences["exact"] < 5e-6
    assert differences["dense"] < 5e-6
    assert differences["lazy"] > 1e-3
    held_out = {name: row["held_out_loss"] for name, row in rows.items()}
    assert held_out["exact"] == pytest.approx(held_out["none"], abs=5e-6)
    assert held_out["dense"] == pytest.approx(held_out["none"], abs=5e-6)
    assert held_out["lazy"] != pytest.approx(held_out["none"], abs=1e-4)

    lines = capsys.readouterr().out.splitlines()
    assert all(any(line.startswith(f"| {name} |") for line in lines) for name in ROWS)


def test_lookup_and_flush_agree_on_a_row_that_lags_behind(prose, few_frequent):
    text = make_text("prose", [Path(prose).read_text()], 24_000)
    config = Config(steps=20, batch=32, context=3, dim=8, hidden=8)
    tx = job.optimizer(config, len(text.words))
    params, batch = job.initial(config, text), job.all_batches(config, text)
    state = tx.init(params)
    step = job.train_step(config, tx, len(text.words), ALONE.mesh())
    for number in range(10):
        params, state, _ = step(params, state, batch(number))
    exact = tx.transforms[-1]
    behind = 10 - np.asarray(state[-1].last["embedding"])
    # A row that was last up to date in one of the steps 2 to 9.
    row = int(np.flatnonzero((behind > 0) & (behind < 9))[0])
    current = exact.lookup(params, state[-1], "embedding", row)
    average = exact.lookup(params, state[-1], "embedding", row, slot="average")
    assert not np.array_equal(current, params["embedding"][row])
    params, state = job.up_to_date(tx, params, state)
    np.testing.assert_array_equal(current, params["embedding"][row])
    np.testing.assert_array_equal(average, adamjax.averaged_weights(state)["embedding"][row])
    assert (np.asarray(state[-1].last["embedding"]) == 10).all()


def test_a_small_vocabulary_has_one_table():
    assert model.tables(model.FREQUENT + model.DRAWN) == ["^embedding$"]
    assert model.tables(model.FREQUENT + model.DRAWN + 1) == ["^embedding$", "^output/kernel$"]


# --- the text, and the models that count words ----------------------------------------------------


@pytest.fixture(scope="module")
def text():
    return make_text("this", [Path(argparse.__file__).read_text()], 500)


def test_the_vocabulary_has_no_words_of_the_held_out_blocks():
    # Each word occurs only in one block, twice.
    words = [f"w{i}" for i in range(2048)]
    text = make_text("pairs", [" ".join(f"{w} {w}" for w in words)], 10_000)
    assert text.training.shape == (30, 128)
    assert text.held_out.shape == (2, 128)
    assert not text.held_out.any()
    assert len(text.words) == 1 + text.training.size // 2


def test_the_vocabulary_has_the_most_frequent_words(text):
    assert len(text.words) == 500
    counts = np.bincount(text.training.ravel(), minlength=500)[1:]
    assert (np.diff(counts) <= 0).all()
    assert make_text("this", [Path(argparse.__file__).read_text()], 500).digest() == text.digest()


def test_probabilities_of_both_models_sum_to_one(text):
    assert unigram(text).sum() == pytest.approx(1)
    bigram = Bigram(text.training, len(text.words))
    all_words = np.arange(len(text.words))
    bigram_of_few = Bigram(text.training[:2], len(text.words))  # has not seen most contexts
    for counted in (bigram, bigram_of_few):
        for before in (0, 1, 17, 499, text.boundary):
            probability = counted.probability(np.full(len(all_words), before), all_words)
            assert probability.min() > 0
            assert probability.sum() == pytest.approx(1)


def test_the_bigram_beats_the_unigram_and_linear_interpolation(text):
    losses = counted_losses(text)
    assert losses["unigram"] == pytest.approx(-np.log(unigram(text)[text.held_out]).mean())
    assert losses["bigram"] < losses["unigram"] - 0.5
    bigram = Bigram(text.training, len(text.words))

    # Linear interpolation of relative frequencies, with several weights.
    before, word = text.held_out[:, :-1].ravel(), text.held_out[:, 1:].ravel()
    counts = np.zeros((len(text.words),) * 2)
    np.add.at(counts, (text.training[:, :-1].ravel(), text.training[:, 1:].ravel()), 1)
    share = counts[before, word] / counts.sum(1)[before].clip(1)
    mixed = [-np.log(w * share + (1 - w) * unigram(text)[word]).mean() for w in (0.5, 0.7, 0.8)]
    assert -np.log(bigram.probability(before, word)).mean() < min(mixed)


def test_the_default_text_is_that_of_the_python_installation():
    description, texts = installation()
    assert "documentation and library sources of Python" in description
    assert sum(map(len, texts)) > 2_000_000
    assert (description, texts) == installation()


# --- the model ------------------------------------------------------------------------------------


def test_windows_stay_in_their_block_and_come_once_an_epoch():
    blocks = np.array([[1, 2, 3, 4], [5, 6, 7, 8]])
    windows = Windows(blocks, 2, 9)
    contexts, words = windows.at(windows.starts)
    np.testing.assert_array_equal(words, blocks.ravel())
    np.testing.assert_array_equal(contexts[:5], [[9, 9], [9, 1], [1, 2], [2, 3], [9, 9]])

    batches = Batches(windows, 3, seed=1)
    epochs = np.concatenate([batches.at(i)[1] for i in range(16)]).reshape(6, 8)
    assert len(set(map(bytes, epochs))) == 6
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), blocks.ravel())
    np.testing.assert_array_equal(Batches(windows, 3, seed=1).at(9)[1], batches.at(9)[1])


def test_the_estimated_softmax_is_the_full_one_on_average(monkeypatch):
    monkeypatch.setattr(model, "FREQUENT", 6)
    monkeypatch.setattr(model, "DRAWN", 8)
    rng = np.random.default_rng(0)
    params = model.init(0, np.full(40, 1 / 40), 2, 4, 4)
    params["output"]["kernel"] = jnp.asarray(rng.normal(size=(40, 4)), jnp.float32)
    features = jnp.asarray(rng.normal(size=(5, 4)), jnp.float32)
    words = jnp.array([0, 5, 6, 20, 39])
    drawn = np.array([model.draw(40, 0, step) for step in range(4000)])
    assert drawn.min() == 6
    assert drawn.max() == 39
    losses = jax.vmap(lambda drawn: model._estimated(params, features, words, drawn))(drawn)
    # The estimate of 1 / probability is unbiased.
    np.testing.assert_allclose(
        np.exp(losses).mean(0), np.exp(model._full(params, features, words)), rtol=0.03
    )


def test_held_out_loss_counts_every_window_once(monkeypatch):
    monkeypatch.setattr(model, "_PER_CALL", 4)
    monkeypatch.setattr(model, "_AT_A_TIME", 2)
    params = model.init(0, np.array([0.5, 0.25, 0.25]), 2, 4, 4)
    held_out = Windows(np.array([[0, 0, 1], [0, 2, 1]]), 2, 3)
    # At first the model predicts each word with its frequency.
    expected = -np.log([0.5, 0.5, 0.25, 0.5, 0.25, 0.25]).mean()
    assert model.held_out_loss(params, held_out, lambda: False) == pytest.approx(expected, 1e-6)
    assert model.held_out_loss(params, held_out, lambda: True) is None
