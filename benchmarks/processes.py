"""A job as several processes, on one machine or many: who takes part, what they share, how it ends.

Each process runs the same program on the same arguments and comes to the same numbers; what they
do together is to differentiate the batch of a step, each its share, and to agree when to stop.
A launcher on each machine starts its processes and stays with them: what JAX says of a process
that died is long and may come late, so the launcher says it, and ends the others.
"""

import contextlib
import hashlib
import inspect
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import IO, Any

import jax
import numpy as np

from benchmarks.text import Complaint

__all__ = [
    "ALONE",
    "LOST",
    "Interruption",
    "Lost",
    "Processes",
    "end",
    "end_with_launcher",
    "free_port",
    "join",
    "launch",
]

# The exit status of a process that lost another one.
LOST = 3

# Seconds without a sign of life after which a process counts as dead (JAX's default is 100), that
# the others then have to end by themselves, and between looks at the processes.
_HEARTBEAT, _GRACE, _LOOK = 20, 5, 0.05

_DATA = "data"
_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# What is in the message of an error when another process is gone.
_OF_CONNECTION = ("gloo", "nccl", "connection", "peer", "unavailable", "deadline", "timed out")


class Lost(Exception):
    """Another process is gone; what JAX says of it, in one line."""


class Interruption:
    """Counts SIGINT and SIGTERM within a `with` block, instead of what they would do."""

    def __init__(self) -> None:
        self.times = 0
        self.signal = 0

    @property
    def status(self) -> int:
        """The exit status of a job that was interrupted, here or in another process."""
        return 128 + (self.signal or signal.SIGINT)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.times += 1
        self.signal = number

    def __enter__(self) -> "Interruption":
        self._before = {s: signal.signal(s, self._note) for s in _SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


# --- one among several ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Processes:
    """All processes of a job, and which of them this is: the only one, unless it joined others.

    The first reports and writes files; the others take part in what is computed, and agree.
    """

    count: int = 1
    index: int = 0

    @property
    def first(self) -> bool:
        """Whether this is the one that reports and writes."""
        return self.index == 0

    def mesh(self) -> jax.sharding.Mesh:
        """All devices of all processes."""
        return jax.sharding.Mesh(np.array(jax.devices()), (_DATA,))

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Around what needs all processes.

        Raises:
          Lost: one of them is gone.
        """
        try:
            yield
        except (jax.errors.JaxRuntimeError, ValueError) as error:
            # On a CPU a broken connection is JAX's error or a ValueError of that name.
            if self.count == 1 or not _is_of_connection(error):
                raise
            raise Lost(str(error).splitlines()[0]) from error

    def gathered(self, numbers: Sequence[float]) -> np.ndarray:
        """The numbers of all processes, float32[count, n]."""
        row = np.asarray(numbers, np.float32)
        if self.count == 1:
            return row[None]
        from jax.experimental import multihost_utils

        with self.together():
            return np.asarray(multihost_utils.process_allgather(row))

    def any(self, here: bool) -> bool:
        """Whether something is so in any process."""
        return bool(self.gathered([here]).any())

    def agree(self, what: str, *facts: object) -> None:
        """Raises a `Complaint` unless all processes were given the same."""
        digest = hashlib.sha256(repr(facts).encode()).digest()
        every = self.gathered(np.frombuffer(digest, np.uint8))
        others = np.flatnonzero((every != every[0]).any(axis=1))
        if others.size:
            raise Complaint(f"process {others[0]} has {what} other than process 0's")

    def leave(self) -> None:
        """Parts from the others, all at the same place; what is here can be used further on."""
        if self.count > 1:
            with self.together():
                jax.distributed.shutdown()


ALONE = Processes()


def _is_of_connection(error: Exception) -> bool:
    text = str(error).lower()
    return any(word in text for word in _OF_CONNECTION)


def join(coordinator: str, count: int, index: int) -> Processes:
    """Waits until all processes are there; before anything is computed.

    Args:
      coordinator: HOST:PORT at which process 0 is reached.
    """
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    host = coordinator.rpartition(":")[0]
    options: dict[str, Any] = {}
    if host in ("127.0.0.1", "localhost"):
        options["coordinator_bind_address"] = coordinator
        jax.config.update("jax_check_proxy_envs", False)  # no proxy stands between
    if "heartbeat_timeout_seconds" in inspect.signature(jax.distributed.initialize).parameters:
        options["heartbeat_timeout_seconds"] = _HEARTBEAT  # not known to an older JAX
    try:
        jax.distributed.initialize(coordinator, count, index, **options)
    except (RuntimeError, ValueError) as error:
        raise Complaint(f"--coordinator {coordinator}: {str(error).splitlines()[0]}") from None
    # JAX has taken SIGTERM for itself.
    signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    return Processes(count, index)


def end(status: int) -> int:
    """Ends a process that did not leave the others; for one that did, or is alone, the status."""
    if jax.distributed.is_initialized():
        # The interpreter's own end would wait for the others.
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:
                stream.flush()
        os._exit(status)
    return status


def end_with_launcher() -> None:
    """Has this process end when the launcher is gone, which holds the other end of its stdin.

    From now on it takes signals, which were held back until it knew what to do with them.
    """
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)

    def wait() -> None:
        while os.read(0, 1):
            pass
        os._exit(LOST)

    threading.Thread(target=wait, daemon=True).start()


# --- the launcher ---------------------------------------------------------------------------------


@dataclass
class _Child:
    index: int
    process: subprocess.Popen
    errors: IO[bytes] | None  # of those that are not shown as they come

    @property
    def how(self) -> str | None:
        """How it ended, where this is not as it should."""
        status = self.process.poll()
        if status is None or status in (0, 128 + signal.SIGINT, 128 + signal.SIGTERM):
            return None
        if status == LOST:
            return "lost another one, which ended or can no longer be reached"
        if status < 0:
            by_jax = "JAX (SIGABRT), as it does when another one no longer answers"
            by = by_jax if status == -signal.SIGABRT else ""
            return f"was ended by {by or signal.Signals(-status).name}"
        return f"ended with status {status}"

    @property
    def guilt(self) -> tuple[bool, bool]:
        """Sorts those that ended: who lost others, or was ended by JAX for it, comes last."""
        status = self.process.returncode
        return status == LOST, status == -signal.SIGABRT


def free_port() -> int:
    """A port of this machine that nobody listens at."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def launch(
    command: Sequence[str],
    count: int,
    here: Sequence[int],
    coordinator: str,
    stop: Interruption,
    advice: Callable[[], str],
) -> int:
    """Starts processes on this machine and stays until all have ended; returns the exit status.

    When one fails the others are ended as well, and a line says which it was. Signals are handed
    on to all; the third ends them at once. Of what they print, that of process 0 is shown, or of
    the only one.

    Args:
      command: what each is started with, `--coordinator`, `--process` and `--member` besides.
      here: which of the `count` processes this machine has.
      advice: how to go on, for the last line.
    """
    shown = here[0]
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    children = [_started(command, i, coordinator, len(here) > 1, i == shown) for i in here]
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    handed_on, failed = 0, None
    try:
        while any(child.process.poll() is None for child in children):
            if stop.times > handed_on:
                handed_on += 1
                for child in children:
                    child.process.send_signal(stop.signal)
            if handed_on > 2:
                break
            failed = min((c for c in children if c.how), key=lambda c: c.guilt, default=None)
            if failed is not None:
                _wait(children, _GRACE)
                break
            time.sleep(_LOOK)
        failed = failed or min((c for c in children if c.how), key=lambda c: c.guilt, default=None)
    finally:
        for child in children:
            child.process.kill()
            child.process.wait()
    if handed_on > 2:
        print(f"train: interrupted; {advice()}", file=sys.stderr)
        return stop.status
    if failed is None:
        return children[0].process.returncode
    return _verdict(failed, children, count, advice)


def _started(
    command: Sequence[str], index: int, coordinator: str, several: bool, shown: bool
) -> _Child:
    environment = dict(os.environ)
    if several:
        # Of a machine's accelerators each process takes one.
        environment.setdefault("JAX_LOCAL_DEVICE_IDS", str(index))
        if any("_proxy" in name.lower() for name in os.environ):
            environment["no_grpc_proxy"] = "127.0.0.1"
    errors = None if shown else tempfile.TemporaryFile()  # noqa: SIM115
    process = subprocess.Popen(
        [*command, "--coordinator", coordinator, "--process", str(index), "--member"],
        stdin=subprocess.PIPE,
        stdout=None if shown else subprocess.DEVNULL,
        stderr=errors,
        env=environment,
        # A terminal's Ctrl-C comes to the launcher alone, which hands it on.
        start_new_session=True,
    )
    return _Child(index, process, errors)


def _wait(children: Sequence[_Child], seconds: float) -> None:
    until = time.monotonic() + seconds
    for child in children:
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.process.wait(max(0, until - time.monotonic()))


def _verdict(
    failed: _Child, children: Sequence[_Child], count: int, advice: Callable[[], str]
) -> int:
    """Says which process failed; returns the launcher's status."""
    status = failed.process.returncode
    if status == 2 and children[0].process.returncode == 2:
        return 2  # what is wrong with what the user gave has been said
    if failed.errors is not None and status > 0:
        failed.errors.seek(0)
        sys.stderr.write(failed.errors.read().decode(errors="replace"))
    if status == 2:
        return 2
    others = "; the others were ended as well" if len(children) > 1 else ""
    print(
        f"train: process {failed.index} of {count} {failed.how}{others}\ntrain: {advice()}",
        file=sys.stderr,
    )
    return 128 - status if status < 0 else status
