"""A live line that shows nothing."""

from __future__ import annotations

from elastic_kfac.cluster.run.progress import Display


class SilentLine(Display):
    """Keeps the lines that would have stayed on the terminal."""

    def __init__(self, lines: list[str] | None = None) -> None:
        self.lines = [] if lines is None else lines

    def say(self, line: str) -> None:
        self.lines.append(line)
