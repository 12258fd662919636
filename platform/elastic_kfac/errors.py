"""Errors that people see: what was given, what is allowed, what to change.

Every error survives pickling, because it may be raised in a worker and shown by the driver.
`exit_code` is what the command line returns: 2 for bad usage, configuration or data, 1 for a failed run.
"""

from __future__ import annotations

from typing import Any


class ElasticKfacError(Exception):
    """Base of every error that this package raises on purpose."""

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        given: object = None,
        allowed: object = None,
        change: str | None = None,
    ) -> None:
        self.what = what
        self.given = given if given is None else str(given)
        self.allowed = allowed if allowed is None else str(allowed)
        self.change = change
        super().__init__(self.line())

    def line(self) -> str:
        """The error as one line: what, given, allowed, what to change."""
        parts = [self.what.rstrip(".")]
        if self.given is not None:
            parts.append(f"given: {self.given}")
        if self.allowed is not None:
            parts.append(f"allowed: {self.allowed}")
        if self.change is not None:
            parts.append(self.change)
        return "; ".join(" ".join(part.split()) for part in parts)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.what, self.given, self.allowed, self.change)


def _rebuild(
    kind: type[ElasticKfacError],
    what: str,
    given: str | None,
    allowed: str | None,
    change: str | None,
) -> ElasticKfacError:
    return kind(what, given=given, allowed=allowed, change=change)


class UsageError(ElasticKfacError):
    """Bad command line, argument or call order: nothing was started."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration that is misspelt, out of range or contradicts itself."""


class DataError(UsageError):
    """A data set that is missing, torn, corrupt or not what its manifest says."""


class StateError(UsageError):
    """A checkpoint or state_dict that is damaged or belongs to another model or mode."""


class RunError(ElasticKfacError):
    """A run that started and failed."""


class CommunicationError(ElasticKfacError):
    """A collective that a peer left, or ranks that do not agree on what they run."""


class NumericalError(ElasticKfacError):
    """Non-finite numbers where training cannot go on."""
