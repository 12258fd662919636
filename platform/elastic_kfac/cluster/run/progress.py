"""What a person sees while a run goes on: one live line, and a line whenever the group changes."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.text import Text

from elastic_kfac.cluster.run.recorder import RunView


class Display(Protocol):
    """Shows a run; called by the driver about five times a second."""

    def say(self, line: str) -> None:
        """A line that stays."""
        ...

    def update(self, view: RunView) -> None:
        """The run as it is now; `view.events` are new."""
        ...

    def close(self) -> None:
        """Nothing more will come."""
        ...


class ProgressLine:
    """One live line on a terminal; elsewhere a plain line every `plain_interval_s` seconds."""

    def __init__(self, stream: TextIO | None = None, *, plain_interval_s: float = 5.0) -> None:
        self._console = Console(file=stream or sys.stdout, highlight=False, soft_wrap=True)
        self._plain_interval_s = plain_interval_s
        self._last_plain = -math.inf  # a machine may have been up for less than the interval
        self._last_line = ""
        self._live: Live | None = None
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=5, transient=True)
            self._live.start()

    def say(self, line: str) -> None:
        self._console.print(Text(line))

    def update(self, view: RunView) -> None:
        for event in view.events:
            line = event_line(event)
            if line is not None:
                self.say(line)
        self.show(status_line(view))

    def show(self, line: str) -> None:
        """The state now."""
        if self._live is not None:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
            return
        now = time.monotonic()
        if line != self._last_line and now - self._last_plain >= self._plain_interval_s:
            self._last_plain, self._last_line = now, line
            self.say(line)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class SilentDisplay:
    """Shows nothing, for programs and tests."""

    def say(self, line: str) -> None:
        return None

    def update(self, view: RunView) -> None:
        return None

    def show(self, line: str) -> None:
        return None

    def close(self) -> None:
        return None


def status_line(view: RunView) -> str:
    """The live line: step, epoch, loss, accuracy, samples/s, world size, and what is waited for."""
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
    if view.evaluation.get("eval_accuracy") is not None:
        parts.append(f"test accuracy {float(view.evaluation['eval_accuracy']):.2%}")
    if view.phase == "running" and row.get("samples_per_s") is not None:
        parts.append(f"{float(row['samples_per_s']):,.0f} samples/s")
    if view.phase == "running":
        parts.append(workers(view.world_size))
    else:
        waited = max(0.0, time.time() - view.phase_since)
        parts.append(f"{_phase_text(view)} ({waited:.0f} s)")
    return "  ".join(parts)


def event_line(event: Mapping[str, Any]) -> str | None:
    """The line for an event; None for events that only the file needs."""
    kind = event.get("kind")
    step = event.get("step")
    if kind in ("start", "continue"):
        verb = "began" if kind == "start" else "continues"
        return f"[step {step}] training {verb} on {workers(event['to_world_size'])}"
    if kind in ("resize", "recovery"):
        before, after = event["from_world_size"], event["to_world_size"]
        change = f"{before} -> {workers(after)}" if before != after else f"still {workers(after)}"
        return (
            f"[step {step}] {change}: {event['reason']}; down {event['downtime_s']:.1f} s, "
            f"{event['steps_redone']} steps redone"
        )
    if kind == "failure":
        then = "the others go on" if event.get("in_place") else "starting again from the last state"
        return f"[step {step}] {event['reason']}; {then}"
    if kind == "fallback":
        return f"[step {step}] {event['reason']}; starting the whole group again"
    if kind == "fault":
        return f"[step {step}] as asked: {event['reason']}"
    if kind == "warning":
        return f"[step {step}] warning: {event['reason']}"
    return None


def workers(number: int) -> str:
    """`1 worker`, `2 workers`."""
    return f"{number} worker" if number == 1 else f"{number} workers"


def _phase_text(view: RunView) -> str:
    if view.phase == "starting":
        return f"starting {view.reason}".rstrip()
    if view.phase == "parking":
        return "saving state for the change"
    if view.phase == "waiting":
        return "waiting for workers"
    return "ending"
