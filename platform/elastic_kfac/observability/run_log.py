"""Structured logs of a run's processes: one JSON object per line, with run, rank and step.

Lines go to standard error, which Ray keeps per process: its dashboard shows them with the actor, and
on Kubernetes they are what a log collector reads. They never reach the terminal of a run. There is
one logger per concern (`CONCERNS`); `ELASTIC_KFAC_LOG` sets their levels, for example
`info` or `warning,steps=info,checkpoints=debug`, and travels from the driver to every process.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TextIO

from elastic_kfac.errors import UsageError

VARIABLE = "ELASTIC_KFAC_LOG"

ROOT = "elastic_kfac"

CONCERNS: Mapping[str, str] = {
    "run": "states of the run, warnings",
    "resizes": "changes of the worker group, lost groups, preemption notices",
    "checkpoints": "states written and restored",
    "steps": "rows of metrics.jsonl",
    "cluster": "messages of Ray's processes to the driver",
}
"""Names of the loggers below `elastic_kfac`."""

LEVELS = {
    "debug": logging.DEBUG,
    "info": logging.INFO,
    "warning": logging.WARNING,
    "error": logging.ERROR,
}

DEFAULT: Mapping[str, int] = {
    "": logging.WARNING,
    "run": logging.INFO,
    "resizes": logging.INFO,
}
"""Quiet, but for the few lines by which one follows a run in Ray's dashboard."""


def log_of(concern: str) -> logging.Logger:
    """The logger of a concern."""
    if concern not in CONCERNS:
        raise KeyError(concern)
    return logging.getLogger(f"{ROOT}.{concern}")


def read_levels(text: str) -> dict[str, int]:
    """Parses levels by concern; the empty name is for all other concerns.

    Args:
        text: Parts like `info` or `steps=debug`, with commas between them.

    Raises:
        UsageError: If a part names no level or no concern.
    """
    levels = dict(DEFAULT)
    parts = [part.strip().lower() for part in text.split(",") if part.strip()]
    # A level for all replaces the defaults of run and resizes, wherever it stands.
    for part in sorted(parts, key=lambda part: "=" in part):
        concern, _, level = part.rpartition("=")
        if level not in LEVELS or (concern and concern not in CONCERNS) or part.startswith("="):
            raise UsageError(
                f"bad {VARIABLE}",
                given=part,
                allowed=f"a level ({', '.join(LEVELS)}) or CONCERN=LEVEL with a concern of "
                f"{', '.join(CONCERNS)}",
                change=f"for example {VARIABLE}=warning,steps=info",
            )
        if not concern:
            levels = {}
        levels[concern] = LEVELS[level]
    return levels


class LogContext:
    """Position of a process, repeated in each of its lines."""

    def __init__(
        self, run: str, rank: int | None = None, step: Callable[[], int | None] = lambda: None
    ) -> None:
        """`rank` is None for a process without one; `step` is called at every line."""
        self.run = run
        self.rank = rank
        self.step = step


class JsonLines(logging.Formatter):
    """One line per record: time, level, logger, run, rank, step, message, then the fields."""

    def __init__(self, context: LogContext) -> None:
        super().__init__()
        self._context = context

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "run": self._context.run,
            "rank": self._context.rank,
            "step": self._context.step(),
            "message": record.getMessage(),
            **fields,
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def begin_log(context: LogContext, text: str, *, stream: TextIO | None = None) -> None:
    """Starts this process's log, or continues it with another context.

    Args:
        context: Repeated in every line.
        text: As `read_levels` takes it.
        stream: Where lines go; None is standard error.
    """
    levels = read_levels(text)
    root = logging.getLogger(ROOT)
    for handler in list(root.handlers):
        if isinstance(handler.formatter, JsonLines):
            root.removeHandler(handler)
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines(context))
    root.addHandler(handler)
    # Ray's processes have handlers of their own on the root logger.
    root.propagate = False
    root.setLevel(levels.get("", logging.WARNING))
    for concern in CONCERNS:
        log_of(concern).setLevel(levels.get(concern, logging.NOTSET))


def levels_of_this_process() -> str:
    """The value of `ELASTIC_KFAC_LOG`.

    Raises:
        UsageError: If it is not a list of levels.
    """
    text = os.environ.get(VARIABLE, "")
    read_levels(text)
    return text
