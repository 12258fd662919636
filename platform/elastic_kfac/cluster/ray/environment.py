"""Environment variables for a while: processes that Ray starts inherit them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping


@contextlib.contextmanager
def environment(variables: Mapping[str, str], *, user_wins: bool = False) -> Iterator[None]:
    """Sets variables for the block and puts back what was there before.

    Args:
        variables: Names and values.
        user_wins: Whether a variable that is set already stays as it is.
    """
    if user_wins:
        variables = {n: value for n, value in variables.items() if n not in os.environ}
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
