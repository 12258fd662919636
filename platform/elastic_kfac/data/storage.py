"""Files below one URI: a local folder, s3:// or gs://, through pyarrow's file systems.

A reader never sees half of a written file. Locally, writes go to a temporary file, then fsync, rename
and fsync of the folder; an object store makes an object visible only when its upload is complete.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

import pyarrow as pa
import pyarrow.fs as pafs

from elastic_kfac.errors import DataError
from elastic_kfac.paths import join_uri, local_folder, user_path

_CHUNK_BYTES = 4 << 20


class Storage:
    """A folder on some file system. File names are relative to it and use `/`.

    Args:
        uri: A path, file://, s3:// or gs://.

    Raises:
        DataError: If the scheme is unknown or the URI malformed. Every method also raises it for a name
            that leads out of the folder (names may come from files that somebody else wrote), and for
            a store that cannot be reached.
    """

    def __init__(self, uri: str | Path) -> None:
        self.uri, self.filesystem, self._root = _open(str(uri))

    @property
    def is_local(self) -> bool:
        return isinstance(self.filesystem, pafs.LocalFileSystem)

    def child(self, name: str) -> Storage:
        """The folder `name` below this one; keeps the URI's options (`?endpoint_override=…`)."""
        child = object.__new__(Storage)
        child.filesystem = self.filesystem
        child.uri, child._root = join_uri(self.uri, name), self.path(name)
        return child

    def path(self, name: str = "") -> str:
        """The path of `name` inside the file system."""
        if name.startswith("/") or ".." in name.split("/"):
            raise DataError("the name leads out of the folder", given=name)
        return f"{self._root}/{name}".rstrip("/")

    def size(self, name: str) -> int | None:
        """Bytes of a file, None if there is no such file."""
        info = self._info(name)
        return int(info.size) if info.type == pafs.FileType.File else None

    def exists(self, name: str) -> bool:
        return self.size(name) is not None

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        if not self.exists(name):
            raise FileNotFoundError(self.path(name))
        return b"".join(self._chunks(name, None))

    def sha256(self, name: str, copy_to: Path | None = None) -> str:
        """The sha256 of a file, read once; `copy_to` receives a local copy of what was read.

        Raises:
            DataError: If the file is missing.
        """
        digest = hashlib.sha256()
        with Path(copy_to or os.devnull).open("wb") as copy:
            for chunk in self._chunks(name, _CHUNK_BYTES):
                digest.update(chunk)
                copy.write(chunk)
        return digest.hexdigest()

    def write(self, name: str, content: bytes) -> None:
        """Creates or replaces a file; it is durable on return."""
        if self.is_local:
            with durable_file(self._local(name)) as temporary:
                temporary.write_bytes(content)
            return
        with self.filesystem.open_output_stream(self.path(name)) as file:
            file.write(content)

    def put(self, source: Path, name: str) -> None:
        """Moves a finished local file to `name`."""
        if self.is_local:
            with durable_file(self._local(name)) as temporary:
                shutil.move(source, temporary)
            return
        with source.open("rb") as file, self.filesystem.open_output_stream(self.path(name)) as out:
            shutil.copyfileobj(file, out, _CHUNK_BYTES)
        source.unlink()

    def delete(self, name: str) -> None:
        """Deletes a file or a folder with its content; does nothing if there is none."""
        info = self._info(name)
        if info.type == pafs.FileType.File:
            self.filesystem.delete_file(info.path)
        elif info.type == pafs.FileType.Directory:
            self.filesystem.delete_dir(info.path)

    def files(self, name: str = "") -> list[str]:
        """Sorted names of the files directly in a folder; empty if there is no such folder."""
        return self._names(name, pafs.FileType.File)

    def folders(self, name: str = "") -> list[str]:
        """Sorted names of the folders directly in a folder; empty if there is no such folder."""
        return self._names(name, pafs.FileType.Directory)

    def _names(self, name: str, kind: pafs.FileType) -> list[str]:
        selector = pafs.FileSelector(self.path(name), allow_not_found=True)
        try:
            found = self.filesystem.get_file_info(selector)
        except OSError as error:
            raise _unreachable(join_uri(self.uri, name), error) from None
        return sorted(info.base_name for info in found if info.type == kind)

    def _info(self, name: str) -> pafs.FileInfo:
        try:
            return self.filesystem.get_file_info(self.path(name))
        except OSError as error:
            raise _unreachable(join_uri(self.uri, name), error) from None

    def _local(self, name: str) -> Path:
        target = Path(self.path(name))
        target.parent.mkdir(parents=True, exist_ok=True)
        return target

    def _chunks(self, name: str, num_bytes: int | None) -> Iterator[bytes]:
        try:
            with self.filesystem.open_input_stream(self.path(name)) as file:
                while chunk := file.read(num_bytes):
                    yield chunk
        except FileNotFoundError:
            raise DataError("file is missing", given=join_uri(self.uri, name)) from None
        except (pa.ArrowException, OSError) as error:
            raise _unreachable(join_uri(self.uri, name), error) from None


def write_named_file(path: str | Path, content: bytes) -> None:
    """Writes a file that a person named: follows links, and writes through to pipes and devices.

    Raises:
        DataError: If there is a folder, or the file cannot be written.
    """
    target = user_path(path)
    try:
        if target.exists() and not target.is_file():
            target.write_bytes(content)  # Replacing a device or a pipe would break what uses it.
            return
        target = target.resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        with durable_file(target) as temporary:
            temporary.write_bytes(content)
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError("cannot write the file", given=path, change=str(error)) from None


@contextmanager
def durable_file(target: Path) -> Iterator[Path]:
    """Yields a temporary path beside `target`; on exit it is synced and renamed to `target`.

    After an exception the temporary file is removed and `target` is unchanged.
    """
    temporary = target.with_name(f".{target.name}.{os.getpid()}.{os.urandom(4).hex()}.tmp")
    try:
        yield temporary
        _sync(temporary)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        temporary.unlink(missing_ok=True)


def _open(uri: str) -> tuple[str, pafs.FileSystem, str]:
    try:
        uri.encode()  # Arrow's paths are UTF-8.
        if (folder := local_folder(uri)) is not None:
            local = str(folder.resolve())
            return local, pafs.LocalFileSystem(), local
        filesystem, path = pafs.FileSystem.from_uri(_one_request_uploads(uri))
        if not path.strip("/"):
            raise ValueError("it names no bucket")
    except (
        pa.ArrowInvalid,
        pa.ArrowNotImplementedError,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:
        raise DataError(
            "cannot open the storage",
            given=ascii(uri)[1:-1] if isinstance(error, UnicodeError) else uri,
            allowed="a folder, file://, s3:// or gs://",
            change="give it a name in UTF-8" if isinstance(error, UnicodeError) else str(error),
        ) from None
    return uri, filesystem, path.rstrip("/")


def _one_request_uploads(uri: str) -> str:
    # Small objects (manifests, finished-shard records) then need one request instead of three.
    parts = urlsplit(uri)
    if parts.scheme != "s3" or "allow_delayed_open=" in parts.query:
        return uri
    query = f"{parts.query}&allow_delayed_open=true".lstrip("&")
    return urlunsplit(parts._replace(query=query))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unreachable(uri: str, error: BaseException) -> DataError:
    return DataError("cannot read", given=uri, change=str(error))
