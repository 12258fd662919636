"""A live line that shows nothing."""

from __future__ import annotations


class SilentLine:
    """Keeps the lines that would have stayed on the terminal."""

    def __init__(self, lines: list[str] | None = None) -> None:
        self.lines = [] if lines is None else lines

    def say(self, line: str) -> None:
        self.lines.append(line)

    def show(self, line: str) -> None:
        return None

    def close(self) -> None:
        return None
