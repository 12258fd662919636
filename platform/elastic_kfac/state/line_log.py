"""A file of lines that grows while a run lasts, on a disk or on an object store.

A disk appends. An object store only has whole objects, so lines go to parts, `<name>.parts/<offset>`,
named by the byte at which they begin; `FAN_IN` parts of one level become one part of the next, and
`finish` makes one file of all. So each byte is written log(parts) times, and a reader finds few parts.
A part that begins before the end of the earlier ones is the leftover of such a merge.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import DataError

FAN_IN = 8
KEPT_BYTES = 1 << 18
"""Parts up to this size are not read again for the next merge."""


class LineLog:
    """One process writes; any number may read."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name = storage, name
        self._folder = f"{name}.parts"
        self._parts: list[tuple[int, int, bytes | None]] | None = None
        """(offset, level, content if it is small) of the parts, once this process writes."""
        self._end = 0

    def content(self) -> bytes:
        """All lines; empty if there is no file."""
        for _ in range(3):
            # A part that is gone after the listing went into another one.
            with contextlib.suppress(FileNotFoundError, DataError):
                return self._assembled(self._storage.files(self._folder))
        return self._assembled(self._storage.files(self._folder))

    def append(self, content: bytes) -> None:
        """Adds whole lines: all of them, or none and an OSError."""
        if self._storage.is_local:
            self._append_to_file(content)
            return
        if self._parts is None:
            self._end, self._parts = len(self.finish()), []
        self._write(self._end, 0, content)
        self._end += len(content)
        try:
            while (
                len(self._parts) >= FAN_IN and len({part[1] for part in self._parts[-FAN_IN:]}) == 1
            ):
                self._merge()
        except (OSError, DataError):
            # The lines are written. What the store holds is found out at the next append.
            self._parts = None

    def truncate(self, size: int) -> None:
        """Cuts the log to `size` bytes."""
        if self._storage.is_local:
            os.truncate(self._storage.path(self._name), size)
            return
        kept = self.finish()[:size]
        self._storage.write(self._name, kept)
        self._end, self._parts = len(kept), []

    def finish(self) -> bytes:
        """Makes one file of the parts on an object store; returns all lines."""
        content = self.content()
        parts = self._storage.files(self._folder)
        if parts:
            self._storage.write(self._name, content)
            for part in parts:
                self._storage.delete(f"{self._folder}/{part}")
            self._end, self._parts = len(content), []
        return content

    def _assembled(self, parts: list[str]) -> bytes:
        found = [self._storage.read(self._name)] if self._storage.exists(self._name) else []
        end = sum(map(len, found))
        for part in parts:
            if int(part) >= end:
                found.append(self._storage.read(f"{self._folder}/{part}"))
                end = int(part) + len(found[-1])
        return b"".join(found)

    def _merge(self) -> None:
        assert self._parts is not None
        merged = self._parts[-FAN_IN:]
        found = (kept or self._storage.read(self._part(offset)) for offset, _, kept in merged)
        content = b"".join(found)
        del self._parts[-FAN_IN:]
        self._write(merged[0][0], merged[0][1] + 1, content)
        for offset, _, _ in merged[1:]:
            self._storage.filesystem.delete_file(self._storage.path(self._part(offset)))

    def _write(self, offset: int, level: int, content: bytes) -> None:
        assert self._parts is not None
        self._storage.write(self._part(offset), content)
        self._parts.append((offset, level, content if len(content) <= KEPT_BYTES else None))

    def _part(self, offset: int) -> str:
        return f"{self._folder}/{offset:015d}"

    def _append_to_file(self, content: bytes) -> None:
        path = Path(self._storage.path(self._name))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab+", buffering=0) as stream:
            size = stream.tell()
            if size:
                # A killed writer may have left half a line.
                stream.seek(-1, os.SEEK_END)
                content = content if stream.read(1) == b"\n" else b"\n" + content
            try:
                while content:
                    content = content[stream.write(content) :]
            except OSError:
                stream.truncate(size)
                raise
