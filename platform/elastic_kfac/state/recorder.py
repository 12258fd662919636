"""The rows of a run on their way into its folder: in order, none lost while this process lives.

Rows that cannot be written (a full disk, a store that refuses) are kept and tried again. Of a run that
is resumed nothing is written before its state is restored: `hold`, then `accept`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

from elastic_kfac.errors import DataError
from elastic_kfac.state.run_folder import EVENTS, METRICS, Row, RunFolder

INTERVAL_S = 2.0
"""Between two writes to an object store."""
RETRY_S = 5.0
CLOSE_S = 15.0
"""How long `close` tries to write what could not be written."""


class Recorder:
    """Writes metrics and events of one run, from any thread; never waits for an object store."""

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.is_held = False
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._pending: list[tuple[str, Any]] = []
        """A file's name with rows, or another name with a function that has its place among them."""
        self._problem: str | None = None
        self._news: list[str] = []
        self._due = 0.0
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def metrics(self, rows: Iterable[Row]) -> None:
        """Adds rows to `metrics.jsonl`."""
        self._add(METRICS, rows)

    def events(self, rows: Iterable[Row]) -> None:
        """Adds rows to `events.jsonl`."""
        self._add(EVENTS, rows)

    def rewind(self, step: int) -> None:
        """Drops metric rows of steps after `step`."""
        with self._lock:
            self._pending.append(("rewind", lambda: self.folder.rewind_metrics(step)))
        self._write_soon()

    def hold(self) -> None:
        """Keeps everything in memory until `accept`."""
        self.is_held = True

    def accept(self, first: Callable[[], object]) -> None:
        """Calls `first`, then writes what was held; does nothing if nothing is held."""
        with self._lock:
            if not self.is_held:
                return
            self.is_held = False
            self._pending.insert(0, ("accept", first))
        self._write_soon()

    def news(self) -> list[str]:
        """Lines for people since the last call: of trouble, and of its end."""
        news, self._news = self._news, []
        return news

    def close(self) -> int:
        """Writes what is left, or drops what is held; returns how many rows could not be written."""
        self._over.set()
        if self._thread is not None:
            self._thread.join()
        deadline = time.monotonic() + CLOSE_S
        while not self._write() and time.monotonic() < deadline:
            time.sleep(1.0)
        with self._lock:
            left = [] if self.is_held else [rows for _, rows in self._pending]
            return sum(len(rows) for rows in left if isinstance(rows, list))

    # ---- inside ----------------------------------------------------------------------------

    def _add(self, name: str, rows: Iterable[Row]) -> None:
        given = list(rows)
        with self._lock:
            for earlier, value in reversed(self._pending):
                if earlier == name:
                    value.extend(given)
                    break
                if not isinstance(value, list):
                    self._pending.append((name, given))
                    break
            else:
                self._pending.append((name, given))
        self._write_soon()

    def _write_soon(self) -> None:
        if self.folder.storage.is_local and self._problem is None:
            self._write()
        elif self._thread is None and not self._over.is_set():
            self._thread = threading.Thread(target=self._repeat, name="recorder", daemon=True)
            self._thread.start()

    def _repeat(self) -> None:
        while not self._over.wait(0.25):
            if time.monotonic() >= self._due:
                self._write()

    def _write(self) -> bool:
        """Writes what is pending; whether all of it is written, or held."""
        with self._writing:
            if self.is_held:
                return True
            self._due = time.monotonic() + INTERVAL_S
            with self._lock:
                batch, self._pending = self._pending, []
            try:
                while batch:
                    name, value = batch[0]
                    if isinstance(value, list):
                        self.folder.append(name, value)
                    else:
                        value()
                    batch.pop(0)
                if self._over.is_set():
                    self.folder.finish_rows()
            except (OSError, DataError) as error:
                self._due = time.monotonic() + RETRY_S
                with self._lock:
                    self._pending = batch + self._pending
                if self._problem is None:
                    self._news.append(
                        f"{self.folder.uri} cannot be written ({error}); what the run records is "
                        f"kept in memory and tried again every {RETRY_S:g} s"
                    )
                self._problem = str(error)
                return False
            if self._problem is not None:
                self._problem = None
                self._news.append("the run's folder can be written again; no row is lost")
            return True
