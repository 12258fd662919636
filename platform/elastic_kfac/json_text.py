"""JSON that somebody else may have written."""

from __future__ import annotations

import json
from typing import Any


def parsed(content: str | bytes) -> Any:
    """The value.

    Raises:
        ValueError: If it is no JSON, or nested more deeply than Python can follow.
    """
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
