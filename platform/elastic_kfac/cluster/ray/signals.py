"""Signals of the driver: a first Ctrl-C or SIGTERM is a wish to stop, and Ray keeps its hands off."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from typing import Any


class StopSignals:
    """Turns the first Ctrl-C or SIGTERM into a wish, and the third into an end.

    Until `defer` is called there is nothing to save, and every signal ends at once.
    """

    def __init__(self) -> None:
        self.reason: str | None = None
        self._count = 0
        self._deferred = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def defer(self) -> None:
        """From now on a signal is noted in `reason` instead of ending the program."""
        self._deferred = True

    def _on_signal(self, number: int, frame: object) -> None:
        self._count += 1
        self.reason = signal.Signals(number).name
        if self._count >= 3 or not self._deferred:
            raise KeyboardInterrupt


@contextlib.contextmanager
def kept_signal_handlers() -> Iterator[None]:
    """Undoes that Ray installs its own handlers when a node starts or a driver connects."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.getsignal(number) for number in numbers}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
