"""Processes of their own that take samples when they are asked to, in turn."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

__all__ = ["Ended", "Team", "Worker", "serve"]


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


class Team:
    """The contenders' processes, started when they are needed.

    `names` are what they are called here: the contenders' own names, or a dict from others to
    these. A process that ends is no longer asked; `failed` says how it ended.
    """

    def __init__(self, suite: str, names: Sequence[str] | dict[str, str]) -> None:
        self.suite = suite
        self.contenders = names if isinstance(names, dict) else {name: name for name in names}
        self.names = list(self.contenders)
        self.workers: dict[str, Worker] = {}
        self.failed: dict[str, str] = {}

    def ask(self, names: Sequence[str], question: list[Any]) -> dict[str, Any]:
        """The answers of those who are still there; they work at it side by side."""
        asked = [name for name in names if name not in self.failed]
        for name in asked:
            if name not in self.workers:
                arguments = (self.suite, "--worker", self.contenders[name])
                # On an accelerator they share its memory.
                self.workers[name] = Worker(*arguments, XLA_PYTHON_CLIENT_PREALLOCATE="false")
            self.workers[name].send(question)
        answers = {}
        for name in asked:
            try:
                answers[name] = self.workers[name].receive()
            except Ended as error:
                self.failed[name] = str(error)
                self.workers.pop(name).close()
        return answers

    def in_turn(self, names: Sequence[str], first: int) -> dict[str, float]:
        """A sample of each, one after another, beginning with the one of a number."""
        first %= len(names)
        order = [*names[first:], *names[:first]]
        return {k: s for name in order for k, s in self.ask([name], ["sample"]).items()}

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
