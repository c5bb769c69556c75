"""The training job in several processes: it computes the same, and stops if one of them dies."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import read_checkpoint, run_on_devices

pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

from benchmarks import train
from benchmarks.train import data, job, model
from benchmarks.train.options import Config
from benchmarks.train.processes import Processes, on_all_devices

pytestmark = pytest.mark.slow

TINY = ["--text", "prose.txt", "--batch", "32", "--context", "3", "--dim", "8", "--hidden", "8"]
STEPS = 60
# A few float32 roundings over all steps, because the sums are in another order.
ROUNDING = 2e-5


def finished(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out


def differences(run, other_run):
    """The largest differences of two runs: of the checkpoint's arrays, and of the losses.

    The difference of an array is relative to its largest element.
    """
    (about, arrays), (other_about, other_arrays) = read_checkpoint(run), read_checkpoint(other_run)
    assert arrays.keys() == other_arrays.keys()
    assert len(about["losses"]) == len(other_about["losses"]) == STEPS
    array_difference = 0.0
    for name, x in arrays.items():
        difference = np.abs(x.astype(np.float64) - other_arrays[name]).max()
        array_difference = max(array_difference, difference / max(np.abs(x).max(), 1e-30))
    return array_difference, np.abs(np.subtract(about["losses"], other_about["losses"])).max()


def training_process_ids(launcher):
    """The ids of the launcher's processes by their numbers, once they are about to train."""
    # This reads the launcher's output up to the line that it prints before the first step.
    assert any(line.startswith("run:") for line in launcher.stdout), launcher.stderr.read()
    listed = subprocess.run(
        ["ps", "-Aww", "-o", "pid=,ppid=,args="], capture_output=True, text=True
    )
    found = re.findall(r"^\s*(\d+)\s+(\d+) .*--number (\d+)$", listed.stdout, re.M)
    return {int(i): int(pid) for pid, parent, i in found if int(parent) == launcher.pid}


def is_running(pid):
    listed = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True)
    return listed.stdout.strip()[:1] not in ("", "Z")


@pytest.mark.tooling
def test_a_killed_process_ends_the_others_and_any_number_of_processes_can_resume(prose, start_job):
    arguments = [*TINY, "--steps", str(STEPS)]
    finished(start_job(*arguments, "--name", "one-process"))
    finished(start_job(*arguments, "--name", "uninterrupted", "--processes", "2"))
    array_difference, loss_difference = differences("one-process", "uninterrupted")
    # Two processes sum in another order. A difference of 0 would mean that both ran as one.
    assert 0 < array_difference < ROUNDING
    assert loss_difference < 5e-6  # losses are between 1 and 10: a few roundings of these
    about, _ = read_checkpoint("uninterrupted")
    assert about["held_out"] == read_checkpoint("one-process")[0]["held_out"]

    process = start_job(*arguments, "--name", "killed", "--processes", "2", "--save-every", "0")
    pids = training_process_ids(process)
    checkpoint = Path("runs/killed/checkpoint.npz")
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - began < 20
    assert process.returncode == 128 + signal.SIGKILL
    *_, reason, advice, command = err.splitlines()
    assert reason == "train: process 1 of 2 was ended by SIGKILL; the others were ended as well"
    assert advice == "train: to go on from the last checkpoint:"
    arguments_to_resume = "-m benchmarks train --resume runs/killed --save-every 0.0 --processes 2"
    assert command == f"  {sys.executable} {arguments_to_resume}"
    assert "Traceback" not in err
    assert not any(map(is_running, pids.values()))
    steps_taken = len(read_checkpoint("killed")[0]["losses"])
    assert 1 <= steps_taken < STEPS

    for count in (1, 2, 4):
        folder = Path("runs", f"on-{count}")
        folder.mkdir()
        (folder / "checkpoint.npz").write_bytes(checkpoint.read_bytes())
        out = finished(start_job("--resume", f"runs/on-{count}", "--processes", str(count)))
        assert f"{STEPS - steps_taken} of {STEPS} steps to take" in out
        # Compared with the run in one process. "uninterrupted" has rounding differences of its own.
        assert differences("one-process", f"on-{count}")[0] < ROUNDING
    assert differences("uninterrupted", "on-2") == (0, 0)


def collectives():
    """Prints the shapes that a step on two devices exchanges; runs in a process that has two."""
    model.FREQUENT, model.DRAWN = 40, 16
    config = Config(steps=20, batch=32, context=3, dim=8, hidden=8)
    text, mesh = data.read(["prose.txt"], config.vocab), Processes().mesh()
    assert mesh.size == 2
    tx, params = job.optimizer(config, len(text.words), 2), job.initial(config, text)
    trees = on_all_devices(mesh, (params, tx.init(params)))
    step = job.train_step(config, tx, len(text.words), mesh)
    compiled = step.lower(*trees, job.all_batches(config, text)(0)).compile()
    shapes = []
    for line in compiled.as_text().splitlines():
        if found := re.search(r" = (.*) (all-|reduce-scatter|collective-)[\w-]*\(", line):
            shapes += re.findall(r"\w+\[[\d,]*\]", found[1])
    print(json.dumps([shapes, len(text.words)]))


def test_devices_exchange_row_gradients_and_no_dense_ones_of_tables(prose):
    output = run_on_devices(2, "import test_processes; test_processes.collectives()")
    shapes, words = json.loads(output)
    # Each device reads the embeddings of 16 windows of 3 words; and from the output's kernel the
    # rows of 40 frequent words, of 16 drawn words and of 16 words to predict.
    reads = 2 * 16 * 3, 2 * (40 + 16 + 16)
    of_tables = [x for rows in reads for x in (f"f32[{rows},8]", f"s32[{rows}]")]
    # The hidden layer, its bias, the projection and the output's bias. Scalars belong to the loss.
    of_rest = ["f32[24,8]", "f32[8]", "f32[8,8]", f"f32[{words}]"]
    assert sorted(x for x in shapes if not x.endswith("[]")) == sorted(of_tables + of_rest)


@pytest.mark.tooling
def test_processes_that_are_started_one_by_one_stop_together(prose, start_job):
    with socket.socket() as s:  # to find a port that is free
        s.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{s.getsockname()[1]}"
    arguments = [*TINY, "--rows", "none", "--steps", "100000", "--name", "run", "--processes", "2"]
    first, second = (
        start_job(*arguments, "--coordinator", coordinator, "--process", str(i)) for i in (0, 1)
    )
    assert training_process_ids(first).keys() == {0}
    second.send_signal(signal.SIGTERM)
    out, err = first.communicate(timeout=120)
    # The first process got no signal. If another process stops it, it ends as after Ctrl-C.
    assert first.returncode == 128 + signal.SIGINT, err
    options = f"--processes 2 --coordinator {coordinator} --process 0"
    assert f"-m benchmarks train --resume runs/run {options}" in out.splitlines()[-1]
    assert 1 <= len(read_checkpoint("run")[0]["losses"]) < 100_000
    out, err = second.communicate(timeout=120)
    assert second.returncode == 128 + signal.SIGTERM, err
    assert "process 0 reports" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--processes", "0"], "--processes: expected a whole number of at least 1"),
        (["--process", "1", "--processes", "2"], "--coordinator and --process go together"),
        (["--coordinator", "host:1", "--process", "2", "--processes", "2"], "below --processes 2"),
        (["--coordinator", "host", "--process", "1", "--processes", "2"], "expected HOST:PORT"),
        (["--compare", "--processes", "2"], "--compare runs in one process"),
    ],
)
def test_the_error_of_a_wrong_option_is_one_line(capsys, arguments, message):
    assert train.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("train: ")
    assert err.count("\n") == 1
    assert message in err


@pytest.mark.tooling
def test_several_processes_print_an_error_once(tmp_path, monkeypatch, start_job):
    monkeypatch.chdir(tmp_path)
    Path("small.txt").write_text("too few words")
    process = start_job("--text", "small.txt", "--processes", "2")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert [line for line in err.splitlines() if line] == [
        "train: the text is too small: 3 tokens, at least 2,000 are needed"
    ]
    assert not Path("runs").exists()
