"""What rank 0 sends to the run coordinator."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, Literal

from elastic_kfac.training.callbacks import Callback, event_row

Message = tuple[Literal["metrics", "event", "step", "rollback", "measured"], Mapping[str, Any]]
"""A kind and a row."""


class Reporter(Callback):
    """Turns what a rank reports into messages."""

    @abstractmethod
    def send(self, message: Message) -> None:
        """Takes a message; messages arrive in order."""

    def on_metrics(self, row: Mapping[str, Any]) -> None:
        self.send(("metrics", dict(row)))

    def on_event(self, row: Mapping[str, Any]) -> None:
        self.send(("event", dict(row)))

    def on_step(self, row: Mapping[str, Any]) -> None:
        self.send(("step", dict(row)))

    def on_rollback(self, step: int, lost_steps: int) -> None:
        self.send(("rollback", {"step": step, "lost_steps": lost_steps}))

    def warn(self, line: str) -> None:
        """Reports a warning about the run."""
        self.on_event(event_row("warning", self.last_step(), reason=line))
