"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def timed(seconds: dict[str, float], part: str) -> Iterator[None]:
    """Adds the time of the host inside to `seconds[part]`, s; a device may still be busy with it."""
    begin = time.perf_counter()
    yield
    seconds[part] += time.perf_counter() - begin
