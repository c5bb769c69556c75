"""Ctrl-C and SIGTERM: they end a job at once if nothing would be lost, otherwise after the step."""

import os
import signal
import threading
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interruption:
    """Handles SIGINT and SIGTERM within a `with` block."""

    def __init__(self) -> None:
        self.times = 0  # how many signals came
        self._last = signal.SIGINT
        # The text printed at the first signal, the second and so on. A signal beyond these ends the
        # process at once, after a call of `at_exit`.
        self.answers: tuple[str, ...] = ()
        self.at_exit: Callable[[], None] = lambda: None

    @property
    def status(self) -> int:
        """The exit status of a job that was interrupted, here or in another process."""
        return 128 + self._last

    def _count(self, number: int, frame: FrameType | None) -> None:
        self.times, self._last = self.times + 1, signal.Signals(number)
        if self.times <= len(self.answers) and self.answers[self.times - 1]:
            _print(self.answers[self.times - 1])

    def _watch(self, pipe: int) -> None:
        # Python runs a handler only after the compiler returns, which may take long. This thread
        # does not wait for that.
        times = 0
        while number := os.read(pipe, 1):
            times += number[0] in SIGNALS
            if times > len(self.answers):
                _print("interrupted")
                self.at_exit()
                os._exit(128 + number[0])
        os.close(pipe)

    def __enter__(self) -> "Interruption":
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        threading.Thread(target=self._watch, args=(reading,), daemon=True).start()
        self._wakeup = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        self._handlers = {number: signal.signal(number, self._count) for number in SIGNALS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # blocked by the launcher
        return self

    def __exit__(self, *exception: object) -> None:
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        os.close(self._writing)


def _print(text: str) -> None:
    # A handler may interrupt a print, so this must not wait for its lock. On a terminal, a progress
    # bar may be in the line.
    os.write(2, f"{os.linesep if os.isatty(2) else ''}train: {text}\n".encode())
