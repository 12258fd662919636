"""Stop requests from the terminal or the system."""

from __future__ import annotations

import signal
import threading
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Turns the first Ctrl-C, SIGTERM or closed terminal into a request to stop; the third interrupts.

    Until `defer` is called there is nothing to save, and every signal interrupts at once.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._count = 0
        self._deferred = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in STOPPING:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # nohup
                self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on a signal is noted in `reason` instead of interrupting the program."""
        self._deferred = True

    def _on_signal(self, number: int, frame: object) -> None:
        self._count += 1
        self.reason = signal.Signals(number).name
        if self._count >= 3 or not self._deferred:
            raise KeyboardInterrupt
