"""Worker processes that take samples on request, one after another."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Collection, Sequence
from typing import Any

from benchmarks.measure import Device
from benchmarks.suite import say


class Ended(RuntimeError):
    """A worker is gone, with its exit status; a negative one is the signal that ended it."""


class Worker:
    """A process `python -m benchmarks SUITE --worker NAME`; it answers a JSON line with another."""

    def __init__(self, suite: str, name: str, **environment: str) -> None:
        own = {"KERAS_BACKEND": "jax", "OMP_WAIT_POLICY": "PASSIVE", **environment}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", suite, "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **own},
        )

    def ask(self, question: Any) -> Any:
        """The answer to a question."""
        with contextlib.suppress(BrokenPipeError):  # then there is no answer
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise Ended(f"a worker ended with status {self.process.wait()}")
        return json.loads(line)

    def close(self) -> None:
        """Ends the process."""
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


class WorkerPool:
    """The contenders' processes, started when they are needed.

    Each contender has a process of its own, but for those that are `together` in one. Where only
    one process at a time can use the device (a TPU), all share one. A contender whose process has
    ended is no longer asked; `failed` says how it ended. `names` are names of contenders, or a dict
    from other names to contenders: then one contender may take part under several names.
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

    def ask(self, name: str, *question: Any) -> dict[str, Any]:
        """A contender's answer under its name; empty if its process has ended."""
        if name in self.failed:
            return {}
        process = self.processes[name]
        if process not in self.workers:
            self.workers[process] = Worker(self.suite, process, **self.device.variables)
        try:
            return {name: self.workers[process].ask([name, self.contenders[name], *question])}
        except Ended as error:
            say(f"{name}: {error}")
            ended = [other for other in self.names if self.processes[other] == process]
            self.failed |= dict.fromkeys(ended, str(error))
            self.workers.pop(process).close()
            return {}

    def in_turn(self, names: Sequence[str], first: int) -> dict[str, float]:
        """A sample of each, one after another, beginning with the one of a number."""
        first %= len(names)
        samples = {}
        for name in (*names[first:], *names[:first]):
            samples |= self.ask(name, "sample")
        return samples

    def measure(
        self, names: Sequence[str], case: Sequence[Any], rounds: int
    ) -> tuple[dict[str, Any], list[dict[str, float]]]:
        """What each contender says as it prepares a case, and the samples of some rounds."""
        answers: dict[str, Any] = {}
        for name in names:  # one by one: their temporaries may be as large as their arrays
            answers |= self.ask(name, "prepare", *case)
        return answers, [self.in_turn(names, number) for number in range(rounds)]

    def __enter__(self) -> "WorkerPool":
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers.values():
            worker.close()


def serve(answer: Callable[[Any], Any]) -> int:
    """What a worker does: answers questions until there are no more; returns the exit code."""
    # What libraries print must not come between the answers.
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=sys.__stdout__, flush=True)
    return 0


def contender_answers(make: Callable[[str], Any]) -> Callable[[Any], Any]:
    """A function that answers the questions of a pool, for `serve`.

    A question is a name, the contender of this name, a method of the contender, and its arguments.
    `make` makes the contender when its name is first asked.
    """
    contenders: dict[str, Any] = {}

    def answer(question: Any) -> Any:
        name, contender, method, *arguments = question
        if name not in contenders:
            contenders[name] = make(contender)
        return getattr(contenders[name], method)(*arguments)

    return answer
