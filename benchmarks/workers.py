"""Worker processes that take samples on request, one after another."""

import contextlib
import importlib
import multiprocessing
import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

from benchmarks.measure import Device
from benchmarks.suite import say


class Ended(RuntimeError):
    """A worker has ended. The message has its exit status; a negative one is a signal's number."""


class Worker:
    """A process that answers requests with the `Contender` of a suite's module."""

    def __init__(self, suite: str, **environment: str) -> None:
        own = {"KERAS_BACKEND": "jax", "OMP_WAIT_POLICY": "PASSIVE", **environment}
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, suite, own), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, request: Sequence[Any]) -> Any:
        """The answer to a request; see `contender_answers`."""
        try:
            self.connection.send(request)
            return self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            raise Ended(f"a worker ended with status {self.process.exitcode}") from None

    def close(self) -> None:
        self.connection.close()
        self.process.join()


def _serve(connection: Any, suite: str, environment: dict[str, str]) -> None:
    """Runs in the worker: answers requests until the connection is closed."""
    os.environ.update(environment)  # before the suite imports libraries that read it
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        answer = contender_answers(importlib.import_module(f"benchmarks.{suite}").Contender)
        while True:
            connection.send(answer(connection.recv()))


def contender_answers(make: Callable[[str], Any]) -> Callable[[Sequence[Any]], Any]:
    """A function that answers requests with contenders, each made at its first request.

    A request is a name, the contender of this name, a method of the contender, and its arguments.
    """
    contenders: dict[str, Any] = {}

    def answer(request: Sequence[Any]) -> Any:
        name, contender, method, *arguments = request
        if name not in contenders:
            contenders[name] = make(contender)
        return getattr(contenders[name], method)(*arguments)

    return answer


class WorkerPool:
    """The contenders' processes, started when they are needed.

    Each contender has a process of its own, except those `together`, which share one. If only one
    process at a time can use the device (a TPU), all share one. A contender whose process has
    ended is no longer asked; `failed` says how it ended. `names` are names of contenders, or a dict
    from other names to contenders, in which one contender may occur under several names.
    """

    def __init__(
        self, suite: str, names: Collection[str], device: Device, together: Collection[str] = ()
    ) -> None:
        self.suite, self.device, self.names = suite, device, list(names)
        self.contenders = names if isinstance(names, dict) else {name: name for name in names}
        shared = names if device.exclusive else together
        self.processes = {name: "shared" if name in shared else name for name in names}
        self.workers: dict[str, Worker] = {}
        self.failed: dict[str, str] = {}

    def ask(self, name: str, *request: Any) -> dict[str, Any]:
        """A contender's answer under its name; empty if its process has ended."""
        if name in self.failed:
            return {}
        process = self.processes[name]
        if process not in self.workers:
            self.workers[process] = Worker(self.suite, **self.device.variables)
        try:
            return {name: self.workers[process].ask((name, self.contenders[name], *request))}
        except Ended as error:
            say(f"{name}: {error}")
            ended = [other for other in self.names if self.processes[other] == process]
            self.failed |= dict.fromkeys(ended, str(error))
            self.workers.pop(process).close()
            return {}

    def in_turn(self, names: Sequence[str], first: int) -> dict[str, float]:
        """A sample of each contender, one after another, beginning with number `first` (modulo)."""
        first %= len(names)
        samples = {}
        for name in (*names[first:], *names[:first]):
            samples |= self.ask(name, "sample")
        return samples

    def measure(
        self, names: Sequence[str], case: Sequence[Any], rounds: int
    ) -> tuple[dict[str, Any], list[dict[str, float]]]:
        """The answer of each contender's `prepare`, and the samples of the rounds."""
        answers: dict[str, Any] = {}
        for name in names:  # one by one: their temporaries may be as large as their arrays
            answers |= self.ask(name, "prepare", *case)
        return answers, [self.in_turn(names, number) for number in range(rounds)]

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers.values():
            worker.close()
