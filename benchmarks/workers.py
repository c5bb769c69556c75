"""Processes of their own that take samples when they are asked to, in turn."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.measure import Device

__all__ = ["SHARED", "Ended", "Team", "Worker", "asked", "serve", "shared"]

# The worker that serves all contenders, instead of the one whose name it is given.
SHARED = "all of them"


class Ended(RuntimeError):
    """A worker is gone, with its exit status; a negative one is the signal that ended it."""


class Worker:
    """A process `python -m benchmarks ARGUMENTS` that answers questions, both JSON on one line."""

    def __init__(self, *arguments: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks", *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={
                **os.environ,
                "KERAS_BACKEND": "jax",
                "OMP_WAIT_POLICY": "PASSIVE",
                **environment,
            },
        )

    def send(self, question: Any) -> None:
        """Asks, and does not wait for the answer."""
        assert self.process.stdin
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # `receive` says so.

    def receive(self) -> Any:
        """The answer to the question that was sent."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise Ended(f"a worker ended with status {self.process.wait()}")
        return json.loads(line)

    def ask(self, question: Any) -> Any:
        """The answer to a question."""
        self.send(question)
        return self.receive()

    def close(self) -> None:
        """Ends the process."""
        assert self.process.stdin
        assert self.process.stdout
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def asked(start: Callable[[], Worker], questions: Sequence[Any]) -> list[dict[str, Any]]:
    """A worker's answers; `{"failed": why}` where it ended, and a new one goes on."""
    worker, found = start(), []
    for question in questions:
        try:
            found.append(worker.ask(question))
        except Ended as error:
            found.append({"failed": str(error)})
            worker.close()
            worker = start()
        print(f"{question}"[:120], found[-1], flush=True)
    worker.close()
    return found


class Team:
    """The contenders' processes, started when they are needed.

    Each has a process of its own; where only one process at a time can use the device (a TPU), they
    share one. One that ends is no longer asked; `failed` says how it ended.

    Args:
      suite: whose workers they are.
      names: what they are called here: the contenders' own names, or a dict from others to these.
      device: what they run on.
      bar: a progress bar, moved on by each sample.
    """

    def __init__(
        self,
        suite: str,
        names: Sequence[str] | dict[str, str],
        device: Device = Device(),  # noqa: B008
        bar: Any = None,
    ) -> None:
        self.suite, self.device, self.bar = suite, device, bar
        self.contenders = names if isinstance(names, dict) else {name: name for name in names}
        self.names = list(self.contenders)
        self.workers: dict[str, Worker] = {}
        self.failed: dict[str, str] = {}

    def _process(self, name: str) -> str:
        """What the process is called that serves a name."""
        return SHARED if self.device.exclusive else name

    def ask(self, names: Sequence[str], question: list[Any]) -> dict[str, Any]:
        """The answers of those who are still there; they work at it side by side."""
        asked = [name for name in names if name not in self.failed]
        for name in asked:
            process = self._process(name)
            if process not in self.workers:
                serves = SHARED if process == SHARED else self.contenders[name]
                arguments = (self.suite, "--worker", serves)
                self.workers[process] = Worker(*arguments, **self.device.variables)
            to = [name, self.contenders[name]] if process == SHARED else []
            self.workers[process].send([*to, *question])
        answers = {}
        for name in asked:
            process = self._process(name)
            if process not in self.workers:
                continue  # It ended with an answer before.
            try:
                answers[name] = self.workers[process].receive()
            except Ended as error:
                served = self.names if process == SHARED else [name]
                self.failed |= {name: str(error) for name in served}
                self.workers.pop(process).close()
        return answers

    def in_turn(self, names: Sequence[str], first: int) -> dict[str, float]:
        """A sample of each, one after another, beginning with the one of a number."""
        first %= len(names)
        order = [*names[first:], *names[:first]]
        taken = {}
        for name in order:
            taken |= self.ask([name], ["sample"])
            if self.bar is not None:
                self.bar.update()
        return taken

    def close(self) -> None:
        """Ends the processes."""
        for worker in self.workers.values():
            worker.close()
        self.workers = {}

    def __enter__(self) -> "Team":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def serve(answer: Callable[[Any], Any]) -> None:
    """What a worker does: answers questions until there are no more."""
    # What a library prints is no answer.
    with contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=sys.__stdout__, flush=True)


def shared(make: Callable[[str], Callable[[Any], Any]]) -> Callable[[Any], Any]:
    """Answers for several players, each of a contender, that `make` makes when they are asked.

    A question begins with the player's name and its contender's.
    """
    served: dict[str, Callable[[Any], Any]] = {}

    def answer(asked: Any) -> Any:
        player, contender, *question = asked
        if player not in served:
            served[player] = make(contender)
        return served[player](question)

    return answer
