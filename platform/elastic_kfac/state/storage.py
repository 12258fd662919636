"""The files of a run below one URI: local folders, s3:// and gs:// behind the same few calls.

A reader never sees half of a file that `write` has written: locally it is a temporary file, an
fsync and a rename; an object store makes an object visible only when its upload is complete.
"""

from __future__ import annotations

import os
from pathlib import Path

from elastic_kfac.data.storage import Location
from elastic_kfac.errors import DataError, StateError, UsageError


class Storage:
    """A folder somewhere; names are relative to it and use `/`.

    Raises:
        UsageError: If the URI names no file system that is known.
    """

    def __init__(self, uri: str | Path) -> None:
        try:
            self._location = Location.parse(uri)
        except DataError as error:
            raise UsageError(
                "cannot open the storage of a run",
                given=error.given,
                allowed=error.allowed,
                change=error.change,
            ) from None
        self.uri = self._location.uri
        self.is_local = self._location.is_local

    def path(self, name: str = "") -> str:
        """The full path of `name` inside the file system.

        Raises:
            StateError: If the name leads out of this folder, as for every method with a name: names
                also come out of files that somebody else may have written.
        """
        return f"{self._location.path}/{_inside(name)}".rstrip("/")

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: If there is none.
        """
        if self._location.size(_inside(name)) is None:
            raise FileNotFoundError(self.path(name))
        return self._location.read(name)

    def write(self, name: str, content: bytes) -> None:
        """Writes a file as a whole, replacing an older one; when it returns the file is safe."""
        self._location.write(_inside(name), content)

    def append_lines(self, name: str, content: bytes) -> None:
        """Adds whole lines to the end of a file (an object store rewrites it).

        A writer that was killed may have left half a line; the new lines do not become part of it.
        """
        if self.is_local:
            target = Path(self.path(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("ab+") as stream:
                if stream.tell() > 0:
                    stream.seek(-1, os.SEEK_END)
                    content = content if stream.read(1) == b"\n" else b"\n" + content
                stream.write(content)
            return
        old = self.read(name) if self.exists(name) else b""
        self.write(name, old + content)

    def truncate(self, name: str, size: int) -> None:
        """Drops what a file has beyond so many bytes (an object store rewrites it)."""
        if self.is_local:
            os.truncate(self.path(name), size)
        else:
            self.write(name, self.read(name)[:size])

    def exists(self, name: str) -> bool:
        """Whether there is a file of that name."""
        return self._location.size(_inside(name)) is not None

    def folders(self, name: str) -> list[str]:
        """Sorted names of the folders directly in `name`; empty when there is no such folder."""
        return self._location.child(_inside(name)).names(folders=True)

    def files(self, name: str) -> list[str]:
        """Sorted names of the files directly in `name`; empty when there is no such folder."""
        return self._location.child(_inside(name)).names()

    def delete(self, name: str) -> None:
        """Deletes a file or a whole folder; nothing happens when there is none."""
        self._location.remove(_inside(name))


def _inside(name: str) -> str:
    if name.startswith("/") or ".." in name.split("/"):
        raise StateError("a name leads out of the run's folder", given=name)
    return name
