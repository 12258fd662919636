"""A collective that was started, and the errors of one that a peer left."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from elastic_kfac.errors import CommunicationError


class Work:
    """A collective that was started; its tensors may be read after `wait()`."""

    def __init__(
        self,
        handle: Any = None,
        *,
        finish: Callable[[], None] | None = None,
        where: Callable[[], Any] | None = None,
    ) -> None:
        self._handle = handle
        self._finish = finish
        self._where = where

    def wait(self) -> None:
        """Return when the collective is complete on this rank (on a GPU: in stream order).

        Raises:
            CommunicationError: a peer left, or did not answer within the group's timeout.
        """
        handle, self._handle = self._handle, None
        if handle is not None:
            if self._where is None:
                handle.wait()
            else:
                with self._where():
                    handle.wait()
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


@contextmanager
def clear_errors(collective: str, tag: str, rank: int, world_size: int) -> Iterator[None]:
    """Turn the backend's errors into one that names the collective, its tag and this rank."""
    try:
        yield
    except RuntimeError as error:
        raise CommunicationError(
            f"{collective} '{tag}' failed on rank {rank} of {world_size}: "
            f"{_what_happened(str(error))}",
            change="see the log of the rank that left; the group cannot be used any more",
        ) from error


def _what_happened(message: str) -> str:
    lowered = message.lower()
    first_line = message.strip().splitlines()[0] if message.strip() else "no reason given"
    # Without the backend's own source position, which tells nobody anything.
    first_line = re.sub(r"^\[[^\]]*:\d+\]\s*", "", first_line)[:200]
    if "timed out" in lowered or "timeout" in lowered:
        return f"a peer did not answer within the timeout ({first_line})"
    if any(word in lowered for word in ("closed", "reset by peer", "broken pipe", "refused")):
        return f"a peer left the group ({first_line})"
    return first_line
