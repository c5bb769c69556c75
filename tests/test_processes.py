"""The training job as several processes: the same numbers, and what becomes of it when one dies."""

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
# A few float32 roundings, of sums in another order, over that many steps.
ROUNDING = 2e-5


def finished(process, timeout=300):
    out, err = process.communicate(timeout=timeout)
    assert process.returncode == 0, err
    return out


def differences(one, other):
    """The largest differences of two runs: of an array's numbers, and of the losses.

    That of an array is relative to its largest number.
    """
    (about, arrays), (other_about, others) = read_checkpoint(one), read_checkpoint(other)
    assert arrays.keys() == others.keys()
    assert len(about["losses"]) == len(other_about["losses"]) == STEPS
    of_arrays = 0.0
    for name, x in arrays.items():
        difference = np.abs(x.astype(np.float64) - others[name]).max()
        of_arrays = max(of_arrays, difference / max(np.abs(x).max(), 1e-30))
    return of_arrays, np.abs(np.subtract(about["losses"], other_about["losses"])).max()


def members_at_work(launcher):
    """The launcher's processes once they are about to train: each one's id by its number."""
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


def test_a_killed_process_ends_the_others_and_any_number_of_processes_can_resume(prose, start_job):
    arguments = [*TINY, "--steps", str(STEPS)]
    finished(start_job(*arguments, "--name", "one-process"))
    finished(start_job(*arguments, "--name", "uninterrupted", "--processes", "2"))
    of_arrays, of_losses = differences("one-process", "uninterrupted")
    # Two processes add in another order. A difference of 0 would mean that both ran as one.
    assert 0 < of_arrays < ROUNDING
    assert of_losses < 5e-6  # losses are between 1 and 10: a few roundings of these
    about, _ = read_checkpoint("uninterrupted")
    assert about["held_out"] == read_checkpoint("one-process")[0]["held_out"]

    process = start_job(*arguments, "--name", "killed", "--processes", "2", "--save-every", "0")
    pids = members_at_work(process)
    checkpoint = Path("runs/killed/checkpoint.npz")
    while not checkpoint.exists():
        assert process.poll() is None
        time.sleep(0.005)
    os.kill(pids[1], signal.SIGKILL)
    began = time.monotonic()
    _, err = process.communicate(timeout=120)
    assert time.monotonic() - began < 20
    assert process.returncode == 128 + signal.SIGKILL
    *_, verdict, advice, command = err.splitlines()
    assert verdict == "train: process 1 of 2 was ended by SIGKILL; the others were ended as well"
    assert advice == "train: to go on from the last checkpoint:"
    again = "-m benchmarks train --resume runs/killed --save-every 0.0 --processes 2"
    assert command == f"  {sys.executable} {again}"
    assert "Traceback" not in err
    assert not any(map(is_running, pids.values()))
    taken = len(read_checkpoint("killed")[0]["losses"])
    assert 1 <= taken < STEPS

    for count in (1, 2, 4):
        folder = Path("runs", f"on-{count}")
        folder.mkdir()
        (folder / "checkpoint.npz").write_bytes(checkpoint.read_bytes())
        out = finished(start_job("--resume", f"runs/on-{count}", "--processes", str(count)))
        assert f"{STEPS - taken} of {STEPS} steps to take" in out
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
    # Each device reads 16 windows of 3 words, and of the output 40 frequent words, 16 drawn ones
    # and 16 to predict.
    reads = 2 * 16 * 3, 2 * (40 + 16 + 16)
    of_tables = [x for rows in reads for x in (f"f32[{rows},8]", f"s32[{rows}]")]
    # The hidden layer, its bias, the projection and the output's bias. Scalars are the loss's.
    of_rest = ["f32[24,8]", "f32[8]", "f32[8,8]", f"f32[{words}]"]
    assert sorted(x for x in shapes if not x.endswith("[]")) == sorted(of_tables + of_rest)


def test_processes_that_are_started_one_by_one_stop_together(prose, start_job):
    with socket.socket() as s:  # to find a port that is free
        s.bind(("127.0.0.1", 0))
        coordinator = f"127.0.0.1:{s.getsockname()[1]}"
    arguments = [*TINY, "--rows", "none", "--steps", "100000", "--name", "run", "--processes", "2"]
    one, other = (
        start_job(*arguments, "--coordinator", coordinator, "--process", str(i)) for i in (0, 1)
    )
    assert members_at_work(one).keys() == {0}
    other.send_signal(signal.SIGTERM)
    out, err = one.communicate(timeout=120)
    # It got no signal itself: a process that another one stops ends as after Ctrl-C.
    assert one.returncode == 128 + signal.SIGINT, err
    options = f"--processes 2 --coordinator {coordinator} --process 0"
    assert f"-m benchmarks train --resume runs/run {options}" in out.splitlines()[-1]
    assert 1 <= len(read_checkpoint("run")[0]["losses"]) < 100_000
    out, err = other.communicate(timeout=120)
    assert other.returncode == 128 + signal.SIGTERM, err
    assert "process 0 reports" in out


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--processes", "0"], "--processes: expected a whole number of at least 1"),
        (["--process", "1", "--processes", "2"], "--coordinator and --process go together"),
        (["--coordinator", "host:1", "--process", "2", "--processes", "2"], "below --processes 2"),
        (["--coordinator", "host", "--process", "1", "--processes", "2"], "expected HOST:PORT"),
        (["--compare", "--processes", "2"], "--compare runs in one process"),
    ],
)
def test_bad_options_get_one_line(capsys, arguments, why):
    assert train.main(arguments) == 2
    err = capsys.readouterr().err
    assert err.startswith("train: ")
    assert err.count("\n") == 1
    assert why in err


def test_what_is_wrong_is_said_once_by_several_processes(tmp_path, monkeypatch, start_job):
    monkeypatch.chdir(tmp_path)
    Path("small.txt").write_text("too few words")
    process = start_job("--text", "small.txt", "--processes", "2")
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert [line for line in err.splitlines() if line] == [
        "train: the text is too small: 3 tokens, at least 2,000 are needed"
    ]
    assert not Path("runs").exists()
