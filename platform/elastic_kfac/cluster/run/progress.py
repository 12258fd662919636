"""Display of a run: one live line, and a line whenever the worker group changes."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from elastic_kfac.cluster.run.coordinator import RunView
from elastic_kfac.cluster.run.states import RunState
from elastic_kfac.observability.quality import main_value, quality_of, shown_quality
from elastic_kfac.runs.summary import moved_text


class Display:
    """Shows a run to a person; this one shows nothing. The driver calls it about five times a second."""

    def say(self, line: str) -> None:
        """Shows a line that stays."""

    def update(self, view: RunView) -> None:
        """Shows the present state of the run; `view.events` are new."""

    def show(self, line: str) -> None:
        """Shows the present state as a line that the next one replaces."""

    def close(self) -> None:
        """Stops showing."""


class ProgressLine(Display):
    """One live line on a terminal; elsewhere a plain line every `plain_interval_s` seconds.

    A terminal that is closed, or a reader that has gone, does not end what is shown.
    """

    def __init__(self, stream: TextIO | None = None, *, plain_interval_s: float = 5.0) -> None:
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._plain_interval_s = plain_interval_s
        self._last_plain = float("-inf")
        self._last_line = ""
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=5, transient=True)
            self._live.start()

    def say(self, line: str) -> None:
        with contextlib.suppress(OSError):
            self._console.print(Text(line))

    def update(self, view: RunView) -> None:
        for event in view.events:
            line = event_line(event)
            if line is not None:
                self.say(line)
        self.show(status_line(view))

    def show(self, line: str) -> None:
        if self._live is not None:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
            return
        now = time.monotonic()
        if line != self._last_line and now - self._last_plain >= self._plain_interval_s:
            self._last_plain, self._last_line = now, line
            self.say(line)

    def close(self) -> None:
        if self._live is not None:
            with contextlib.suppress(OSError):
                self._live.stop()
            self._live = None


def status_line(view: RunView) -> str:
    """The live line: step, epoch, loss, accuracy, samples/s, and world size or state."""
    row = view.progress
    parts = []
    if "step" in row:
        parts.append(f"step {row['step']}")
    if row.get("epoch") is not None:
        parts.append(f"epoch {float(row['epoch']):.2f}")
    if row.get("loss") is not None:
        parts.append(f"loss {float(row['loss']):.4f}")
    if row.get("accuracy") is not None:
        parts.append(f"accuracy {float(row['accuracy']):.1%}")
    if (found := main_value(view.evaluation)) is not None:
        name, _, value = found
        parts.append(f"test {quality_of(name).label} {shown_quality(name, value)}")
    if view.state is RunState.RUNNING and row.get("samples_per_s") is not None:
        parts.append(f"{float(row['samples_per_s']):,.0f} samples/s")
    if view.state is RunState.RUNNING:
        parts.append(workers(view.world_size))
    else:
        parts.append(f"{_state_text(view)} ({view.in_state_s:.0f} s)")
    return "  ".join(parts)


def event_line(event: Mapping[str, Any]) -> str | None:
    """The line for an event; None for events that only the file needs."""
    kind = event.get("kind")
    step = event.get("step")
    if kind in ("start", "continue"):
        verb = "started" if kind == "start" else "resumed"
        return f"[step {step}] training {verb} on {workers(event['to_world_size'])}"
    if kind in ("resize", "recovery"):
        before, after = event["from_world_size"], event["to_world_size"]
        change = f"{before} -> {workers(after)}" if before != after else f"still {workers(after)}"
        change += " in place" if event.get("in_place") else ""
        # The line of a failure or fallback has given the reason.
        why = f": {event['reason']}" if event.get("reason") else ""
        line = (
            f"[step {step}] {change}{why}; down {event['downtime_s']:.1f} s, "
            f"{event['steps_redone']} steps redone"
        )
        moved = moved_text(event)
        return f"{line}, {moved}" if moved else line
    if kind == "failure":
        then = "the others continue" if event.get("in_place") else "restarting from the last state"
        return f"[step {step}] {event['reason']}; {then}"
    if kind == "fallback":
        return f"[step {step}] {event['reason']}; restarting the whole group"
    if kind == "restarts":
        return f"changes of the world restart all workers: {event['reason']}"
    if kind == "fault":
        return f"[step {step}] {event['reason']}"
    if kind == "rank_recovered":
        return f"[step {step}] {event['reason']}"
    if kind in ("warning", "slow_rank"):
        return f"[step {step}] warning: {event['reason']}"
    if kind == "configuration":
        return f"[step {step}] the configuration has changed: {event['reason']}"
    return None


def workers(number: int) -> str:
    """`1 worker`, `2 workers`."""
    return f"{number} worker" if number == 1 else f"{number} workers"


def _state_text(view: RunView) -> str:
    if view.state is RunState.STARTING:
        return f"starting {view.reason}".rstrip()
    texts = {
        RunState.DRAINING: "saving the state before the change",
        RunState.WAITING: "waiting for workers",
        RunState.ENDED: "ending",
    }
    return texts[view.state]
