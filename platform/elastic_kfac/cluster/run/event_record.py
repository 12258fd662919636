"""The events of a run: what happened to it and why, each reason told once."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from elastic_kfac.training.callbacks import event_row

LOST = "a member of the world was lost"
"""The reason of a loss that nobody has explained."""
EXPLAINED_S = 15.0
"""So long a change after such a loss waits for its reason."""


class EventRecord:
    """Rows of `events.jsonl`, in their order.

    Args:
        keep: Called with every row.
    """

    def __init__(self, keep: Callable[[Mapping[str, Any]], object]) -> None:
        self.rows: list[dict[str, Any]] = []
        self.unexplained: dict[str, Any] | None = None
        """A change that waits for its reason."""
        self._keep = keep
        self._told: set[str] = set()
        """Reasons that rows of their own give; the changes that follow do not repeat them."""

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row."""
        self.rows.append(dict(row))
        self._keep(row)

    def add_cause(self, kind: str, step: int, reason: str, **details: Any) -> None:
        """Adds what a change will follow, whose reason it gives."""
        self._told.add(reason)
        self.add(event_row(kind, step, reason=reason, **details))

    def add_change(self, row: dict[str, Any], *, may_wait: bool) -> None:
        """Adds a change of the world; after a loss without a reason yet once it is explained, if that may
        wait."""
        if row["reason"] == LOST and may_wait:
            self.explain(LOST)
            self.unexplained = row
            asyncio.get_running_loop().call_later(EXPLAINED_S, self._give_up, row)
        else:
            self._add_change(row)

    def explain(self, reason: str) -> None:
        """Adds the change that waits, if one does, with this reason."""
        row, self.unexplained = self.unexplained, None
        if row is not None:
            self._add_change({**row, "reason": reason})

    def _give_up(self, row: Mapping[str, Any]) -> None:
        if self.unexplained is row:
            self.explain(LOST)

    def _add_change(self, row: Mapping[str, Any]) -> None:
        if row["reason"] in self._told:
            self._told.remove(row["reason"])
            row = {**row, "reason": None}
        self.add(row)
