"""Files below a URI: local folders, s3:// and gs://, through pyarrow's file systems.

Local writes are atomic and durable (temporary file, fsync, rename, fsync of the folder). An object
store has no rename, but an object appears only when its upload is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.fs as pafs

from elastic_kfac.errors import DataError

_CHUNK_BYTES = 4 << 20


@dataclass(frozen=True)
class Location:
    """A folder on some file system."""

    uri: str
    filesystem: pafs.FileSystem
    path: str

    @classmethod
    def parse(cls, uri: str | Path) -> Location:
        """Opens the file system of a URI; a plain path is a local folder.

        Raises:
            DataError: If the scheme is unknown or the URI is malformed.
        """
        text = str(uri)
        try:
            if "://" not in text:
                local = str(Path(text).expanduser().resolve())
                return cls(local, pafs.LocalFileSystem(), local)
            filesystem, path = pafs.FileSystem.from_uri(_one_request_uploads(text))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError, ValueError) as error:
            raise DataError(
                "cannot open the data location",
                given=text,
                allowed="a folder, file://, s3:// or gs://",
                change=str(error),
            ) from None
        return cls(text, filesystem, path.rstrip("/"))

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def child(self, name: str) -> Location:
        """The folder `name` below this one; options after `?` in the URI are kept."""
        return Location(join_uri(self.uri, name), self.filesystem, f"{self.path}/{name}")

    def size(self, name: str) -> int | None:
        """Bytes of the file `name`, None when there is no such file."""
        info = self._info(name)
        return int(info.size) if info.type == pafs.FileType.File else None

    def read(self, name: str) -> bytes:
        """The whole file `name`."""
        with self._reading(name), self.filesystem.open_input_stream(f"{self.path}/{name}") as file:
            return bytes(file.read())

    def fetch(self, name: str, target: Path) -> str:
        """Copies the file `name` to the local `target`; returns the sha256 of what arrived."""
        digest = hashlib.sha256()
        with (
            self._reading(name),
            self.filesystem.open_input_stream(f"{self.path}/{name}") as file,
            target.open("wb") as out,
        ):
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
                out.write(chunk)
        return digest.hexdigest()

    def sha256(self, name: str) -> str:
        """The sha256 of the file `name`, read once."""
        digest = hashlib.sha256()
        with self._reading(name), self.filesystem.open_input_stream(f"{self.path}/{name}") as file:
            while chunk := file.read(_CHUNK_BYTES):
                digest.update(chunk)
        return digest.hexdigest()

    def write(self, name: str, content: bytes) -> None:
        """Writes a small file so that it is either whole or not there."""
        if self.is_local:
            target = Path(self.path) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with durable_file(target) as temporary:
                temporary.write_bytes(content)
            return
        with self.filesystem.open_output_stream(f"{self.path}/{name}") as file:
            file.write(content)

    def put(self, source: Path, name: str) -> None:
        """Moves a finished local file to `name`; it appears there only when whole."""
        if self.is_local:
            target = Path(self.path) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with durable_file(target) as temporary:
                shutil.move(source, temporary)
            return
        with (
            source.open("rb") as file,
            self.filesystem.open_output_stream(f"{self.path}/{name}") as out,
        ):
            shutil.copyfileobj(file, out, _CHUNK_BYTES)
        source.unlink()

    def remove(self, name: str) -> None:
        """Removes a file or a folder with what it holds; nothing happens if there is none."""
        info = self._info(name)
        if info.type == pafs.FileType.File:
            self.filesystem.delete_file(info.path)
        elif info.type == pafs.FileType.Directory:
            self.filesystem.delete_dir(info.path)

    def names(self, *, folders: bool = False) -> list[str]:
        """Names of the files (or folders) directly below, sorted; empty if nothing is here."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        kind = pafs.FileType.Directory if folders else pafs.FileType.File
        try:
            found = self.filesystem.get_file_info(selector)
        except OSError as error:
            raise _unreachable(self.uri, error) from None
        return sorted(info.base_name for info in found if info.type == kind)

    def _info(self, name: str) -> pafs.FileInfo:
        try:
            return self.filesystem.get_file_info(f"{self.path}/{name}")
        except OSError as error:
            raise _unreachable(join_uri(self.uri, name), error) from None

    @contextmanager
    def _reading(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise DataError("file is missing", given=join_uri(self.uri, name)) from None
        except pa.ArrowException as error:
            raise _unreachable(join_uri(self.uri, name), error) from None
        except OSError as error:
            if error.errno is not None and error.filename is not None:
                raise  # The local side (disk full, no permission) says it better itself.
            raise _unreachable(join_uri(self.uri, name), error) from None


def join_uri(uri: str, name: str) -> str:
    """`uri/name`, keeping URI options such as `?endpoint_override=…` at the end."""
    if "://" not in uri:
        return str(Path(uri) / name)
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}"))


def _one_request_uploads(uri: str) -> str:
    # Small objects (manifests, finished-shard records) then need one request instead of three.
    parts = urlsplit(uri)
    if parts.scheme != "s3" or "allow_delayed_open=" in parts.query:
        return uri
    query = f"{parts.query}&allow_delayed_open=true".lstrip("&")
    return urlunsplit(parts._replace(query=query))


@contextmanager
def durable_file(target: Path) -> Iterator[Path]:
    """Gives a temporary path beside `target`; at the end it is synced and renamed to it.

    After an exception the temporary file is gone and `target` is as it was.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unreachable(uri: str, error: BaseException) -> DataError:
    return DataError("cannot read", given=uri, change=str(error))
