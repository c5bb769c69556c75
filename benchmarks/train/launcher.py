"""Starts the processes of a job on this machine, and watches them.

If a process dies, JAX's errors in the others are long and may come late. The launcher names the
process in one line and ends the others.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from typing import IO

from benchmarks.train.interruption import SIGNALS, Interruption
from benchmarks.train.options import resume_command

# The exit status of a process that can no longer reach another one.
LOST = 3

# In seconds: the time that the others have to end by themselves, and between polls.
_GRACE, _INTERVAL = 5, 0.05


class Lost(Exception):
    """Another process cannot be reached. The message is the first line of JAX's error."""


def launch(options: argparse.Namespace, argv: Sequence[str], interruption: Interruption) -> int:
    """Runs this machine's processes until all have ended; returns the exit status.

    If one fails, the others are ended as well, and a line names the one that failed. The launcher
    forwards its signals to all. Only the output of this machine's first process is shown.
    """
    interruption.answers = ("", "")  # process 0 prints the answers to signals
    numbers = [options.process] if options.coordinator else list(range(options.processes))
    common = ["--meet", options.coordinator or f"127.0.0.1:{_free_port()}"]
    common += ["--folder", str(options.folder)] if options.folder else []
    errors = {number: tempfile.TemporaryFile() for number in numbers[1:]}  # noqa: SIM115
    # A process inherits the block, and unblocks signals when its handlers are installed.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    processes = {n: _start([*argv, *common], n, numbers, errors.get(n)) for n in numbers}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def failed() -> list[int]:
        """The processes that failed; those that failed because they lost another one come last."""
        statuses = {number: process.poll() for number, process in processes.items()}
        expected = (None, 0, *(128 + number for number in SIGNALS))
        unexpected = [number for number, status in statuses.items() if status not in expected]
        # JAX may abort a process that can no longer reach another one.
        return sorted(unexpected, key=lambda number: statuses[number] in (LOST, -signal.SIGABRT))

    signals_sent = 0
    try:
        while not failed() and any(process.poll() is None for process in processes.values()):
            if interruption.times > signals_sent:
                signals_sent += 1
                for process in processes.values():
                    process.send_signal(interruption.status - 128)
            time.sleep(_INTERVAL)
        deadline = time.monotonic() + _GRACE
        while time.monotonic() < deadline and any(p.poll() is None for p in processes.values()):
            time.sleep(_INTERVAL)
        first = next(iter(failed()), None)
    finally:
        for process in processes.values():
            process.kill()
            process.wait()
    if first is None:
        return processes[numbers[0]].returncode
    status = processes[first].returncode
    if first in errors and status > 0:
        errors[first].seek(0)
        sys.stderr.write(errors[first].read().decode(errors="replace"))
    if status == 2:
        return 2  # the process has printed what is wrong
    others = "; the others were ended as well" if len(numbers) > 1 else ""
    print(
        f"train: process {first} of {options.processes} {_how_it_ended(status)}{others}\n"
        f"train: {_advice(options)}",
        file=sys.stderr,
    )
    return 128 - status if status < 0 else status


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _start(
    argv: list[str], number: int, numbers: list[int], errors: IO[bytes] | None
) -> subprocess.Popen:
    environment = dict(os.environ)
    if len(numbers) > 1:
        # Each process uses one of the machine's accelerators.
        environment.setdefault("JAX_LOCAL_DEVICE_IDS", str(number))
        if any("_proxy" in name.lower() for name in os.environ):
            environment["no_grpc_proxy"] = "127.0.0.1"
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "train", *argv, "--number", str(number)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL if errors else None,
        stderr=errors,
        env=environment,
        # Only the launcher gets a terminal's Ctrl-C, and it sends the signal to the processes.
        start_new_session=True,
    )


def _how_it_ended(status: int) -> str:
    if status == LOST:
        return "can no longer reach another process, which may have ended"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _advice(options: argparse.Namespace) -> str:
    """How to resume after a process has failed."""
    folder = options.resume or options.folder
    if folder is None:
        return "to go on, run the command that process 0 prints, with this machine's --process"
    if not (folder / "checkpoint.npz").exists():
        return "there is no checkpoint to go on from yet: start again"
    everywhere = ", on each machine with its --process" if options.coordinator else ""
    return f"to go on from the last checkpoint{everywhere}:\n  {resume_command(options)}"


def end_with_launcher() -> None:
    """Makes this process end when its launcher ends, which closes the other end of its stdin."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(LOST)

    threading.Thread(target=wait, daemon=True).start()
