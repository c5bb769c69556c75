"""Starts the processes of a job on this machine, and stays with them.

What JAX says of a process that died is long and may come late: the launcher says it in a line, and
ends the others.
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

__all__ = ["LOST", "Lost", "end_with_launcher", "launch"]

# The exit status of a process that lost another one.
LOST = 3

# Seconds that the others have to end by themselves, and between looks at the processes.
_GRACE, _INTERVAL = 5, 0.05


class Lost(Exception):
    """Another process is gone; what JAX says of it, in one line."""


def launch(options: argparse.Namespace, argv: Sequence[str], interruption: Interruption) -> int:
    """Runs this machine's processes until all have ended; returns the exit status.

    When one fails the others are ended as well, and a line says which it was. Signals are handed
    on to all. Of what they print, that of process 0 is shown, or of the only one.
    """
    interruption.answers = ("", "")  # process 0 says what it does
    numbers = [options.process] if options.coordinator else list(range(options.processes))
    common = ["--meet", options.coordinator or f"127.0.0.1:{_free_port()}"]
    common += ["--folder", str(options.folder)] if options.folder else []
    errors = {number: tempfile.TemporaryFile() for number in numbers[1:]}  # noqa: SIM115
    # Signals wait until a process knows what to do with them.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    processes = {n: _start([*argv, *common], n, numbers, errors.get(n)) for n in numbers}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    def failed() -> list[int]:
        """Those that did not end as they should, the ones that only lost another one last."""
        ends = {number: process.poll() for number, process in processes.items()}
        expected = (None, 0, *(128 + number for number in SIGNALS))
        unexpected = [number for number, end in ends.items() if end not in expected]
        return sorted(unexpected, key=lambda number: ends[number] in (LOST, -signal.SIGABRT))

    handed_on = 0
    try:
        while not failed() and any(process.poll() is None for process in processes.values()):
            if interruption.times > handed_on:
                handed_on += 1
                for process in processes.values():
                    process.send_signal(interruption.status - 128)
            time.sleep(_INTERVAL)
        until = time.monotonic() + _GRACE
        while time.monotonic() < until and any(p.poll() is None for p in processes.values()):
            time.sleep(_INTERVAL)
        first, *_ = [*failed(), None]
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
        return 2  # what the user must mend is printed
    others = "; the others were ended as well" if len(numbers) > 1 else ""
    print(
        f"train: process {first} of {options.processes} {_how_it_ended(status)}{others}\n"
        f"train: {_advice(options)}",
        file=sys.stderr,
    )
    return 128 - status if status < 0 else status


def _free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _start(
    argv: list[str], number: int, numbers: list[int], errors: IO[bytes] | None
) -> subprocess.Popen:
    environment = dict(os.environ)
    if len(numbers) > 1:
        # Of a machine's accelerators each process takes one.
        environment.setdefault("JAX_LOCAL_DEVICE_IDS", str(number))
        if any("_proxy" in name.lower() for name in os.environ):
            environment["no_grpc_proxy"] = "127.0.0.1"
    return subprocess.Popen(
        [sys.executable, "-m", "benchmarks", "train", *argv, "--number", str(number)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL if errors else None,
        stderr=errors,
        env=environment,
        # A terminal's Ctrl-C comes to the launcher alone, which hands it on.
        start_new_session=True,
    )


def _how_it_ended(status: int) -> str:
    if status == LOST:
        return "lost another one, which ended or can no longer be reached"
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with status {status}"


def _advice(options: argparse.Namespace) -> str:
    """How to go on after a process was ended."""
    folder = options.resume or options.folder
    if folder is None:
        return "to go on, do what process 0 says on its machine, but for --process"
    if not (folder / "checkpoint.npz").exists():
        return "there is no checkpoint to go on from yet: start again"
    everywhere = ", on each machine with its --process" if options.coordinator else ""
    return f"to go on from the last checkpoint{everywhere}:\n  {resume_command(options)}"


def end_with_launcher() -> None:
    """Has this process end when its launcher is gone, which holds the other end of its stdin."""

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(LOST)

    threading.Thread(target=wait, daemon=True).start()
