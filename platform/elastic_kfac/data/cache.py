"""The node's cache of verified shards as memory-mapped Arrow IPC files, and reading ahead into it.

A file is named by the sha256 of its Parquet shard, so runs, splits and processes share it and a changed
set can never be served from an old file. One file lock per shard; a process that dies leaves a
temporary file at most, which the next one removes.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import filelock
import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from elastic_kfac.data.columns import KEY, Column
from elastic_kfac.data.manifest import (
    ShardInfo,
    ShardSet,
    corrupt_shard,
    fixed_size_rows,
    read_shard_table,
)
from elastic_kfac.data.storage import join_uri
from elastic_kfac.errors import DataError
from elastic_kfac.paths import user_cache, user_path

_ATTEMPTS: Final = 3
_SLACK_BYTES: Final = 1 << 20
# Each open shard holds a file descriptor; the usual limit of a process is 1,024.
_OPEN_SHARDS: Final = 512
# Downloads overlap each other's latency; more would take bandwidth from the most urgent one.
_FETCHERS: Final = 4


class OpenShard:
    """A memory-mapped shard: numpy views on its columns, no copies."""

    def __init__(self, path: Path, columns: Sequence[Column]) -> None:
        with pa.memory_map(str(path)) as source:
            batch = pa.ipc.open_file(source).get_batch(0)
        self.num_rows = batch.num_rows
        self._keys = batch.column(KEY)
        self.values: dict[str, NDArray[Any]] = {}
        """[rows, …] of classes, tensors, raw images and raw masks."""
        self._variable: dict[str, tuple[NDArray[np.int32], Any]] = {}
        for column in columns:
            stored = batch.column(column.name)
            if column.kind == "class":
                # Arrow's own `to_numpy` imports pandas, which takes half a second in a new worker.
                self.values[column.name] = np.asarray(np.from_dlpack(stored), dtype=np.int32)
            elif column.kind in ("tokens", "boxes"):
                offsets = np.frombuffer(stored.buffers()[1], dtype=np.int32)
                self._variable[column.name] = (
                    offsets[: len(stored) + 1],
                    np.asarray(np.from_dlpack(stored.values)),
                )
            elif column.encoding == "encoded":
                _, offset_buffer, data = stored.buffers()
                # Arrow's buffers are signed; the JPEG decoder takes unsigned bytes only.
                content = memoryview(data if data is not None else b"").cast("B")
                offsets = np.frombuffer(offset_buffer, dtype=np.int32)[: len(stored) + 1]
                self._variable[column.name] = (offsets, content)
            else:
                rows = fixed_size_rows(stored)
                if column.kind == "tensor":
                    rows = rows.view(column.dtype).reshape(len(rows), *(column.shape or ()))
                self.values[column.name] = rows

    def item(self, name: str, row: int) -> Any:
        """One row of a column without a fixed size: an encoded image, tokens, or boxes."""
        offsets, content = self._variable[name]
        return content[offsets[row] : offsets[row + 1]]

    def key(self, row: int) -> str:
        """The origin of the sample."""
        return str(self._keys[row].as_py())


class ShardCache:
    """Local copies of shards, safe for several threads and processes.

    Args:
        folder: Shared by all processes of the node; None is the user's cache directory.
        limit_bytes: Bound on the folder's size; least recently used files are evicted.

    Raises:
        DataError: If the folder cannot be made.
    """

    def __init__(self, folder: str | Path | None, limit_bytes: int) -> None:
        self.folder = default_cache_folder() if folder is None else user_path(folder)
        self.limit_bytes = limit_bytes
        self._open: OrderedDict[str, OpenShard] = OrderedDict()
        self._lock = threading.Lock()
        self.counts = {"cache_hits": 0, "cache_misses": 0, "read_bytes": 0}
        """Shards found in the cache, shards fetched, and bytes read from storage for those."""
        with self._writing():
            self.folder.mkdir(parents=True, exist_ok=True)

    def check_fits(self, shard_set: ShardSet) -> None:
        """Raises a DataError if the cache cannot hold one shard of the set and its download."""
        need = _needed_bytes(max(shard_set.shards, key=lambda s: s.bytes))
        if need > self.limit_bytes:
            raise DataError(
                "the shard cache is smaller than one shard and its download",
                given=f"{self.limit_bytes / 2**30:.3g} GiB",
                allowed=f"at least {need / 2**30:.3g} GiB",
                change="raise data.cache_gib",
            )

    def open(self, shard_set: ShardSet, index: int) -> OpenShard:
        """The shard, fetched and verified first if it is not cached.

        Raises:
            CorruptShard: If its bytes still differ from the manifest after repeated fetching.
            DataError: If it is missing or unreadable, or the cache cannot be written.
        """
        shard = shard_set.shards[index]
        with self._lock:
            held = self._open.get(shard.sha256)
            if held is not None:
                self._open.move_to_end(shard.sha256)
                return held
        opened = self._materialised(shard_set, shard)
        with self._lock:
            self._open[shard.sha256] = opened
            while len(self._open) > _OPEN_SHARDS:
                self._open.popitem(last=False)
        return opened

    def has(self, shard_set: ShardSet, index: int) -> bool:
        """Whether the shard is cached."""
        return self._path(shard_set.shards[index]).exists()

    def fetch(self, shard_set: ShardSet, index: int) -> None:
        """Brings the shard into the cache without opening it."""
        if not self.has(shard_set, index):
            self._materialised(shard_set, shard_set.shards[index])

    def close(self) -> None:
        """Releases every mapping; the files stay."""
        with self._lock:
            self._open.clear()

    def _count(self, **more: int) -> None:
        with self._lock:
            for name, number in more.items():
                self.counts[name] += number

    def _path(self, shard: ShardInfo) -> Path:
        return self.folder / f"{shard.sha256}.arrow"

    def _materialised(self, shard_set: ShardSet, shard: ShardInfo) -> OpenShard:
        path = self._path(shard)
        # Another process may evict the file before it is opened, and a damaged one is rebuilt.
        for attempt in range(_ATTEMPTS):
            with self._writing(), self._shard_lock(shard):
                if path.exists():
                    self._count(cache_hits=1)
                else:
                    self._build(shard_set, shard, path)
                    self._count(cache_misses=1, read_bytes=shard.bytes)
            try:
                opened = OpenShard(path, shard_set.columns)
                if opened.num_rows == shard.rows:
                    # Marks the file as recently used. If it was evicted meanwhile, the mapping is valid.
                    with contextlib.suppress(FileNotFoundError):
                        os.utime(path)
                    return opened
                problem = f"{opened.num_rows} rows instead of {shard.rows}"
            except (pa.ArrowException, OSError, ValueError, KeyError) as error:
                problem = str(error)
            if attempt < _ATTEMPTS - 1:
                path.unlink(missing_ok=True)
        raise DataError("unusable file in the shard cache", given=str(path), change=problem)

    def _build(self, shard_set: ShardSet, shard: ShardInfo, path: Path) -> None:
        for stale in self.folder.glob(f".{shard.sha256}.*.tmp"):
            stale.unlink(missing_ok=True)  # We hold its lock: whoever wrote this is dead.
        temporary = self.folder / f".{shard.sha256}.{os.getpid()}.tmp"
        try:
            self._reserve(_needed_bytes(shard), temporary)
            table = self._verified_table(shard_set, shard, temporary)
            with temporary.open("r+b") as file:
                with pa.ipc.new_file(file, table.schema) as writer:
                    for batch in table.combine_chunks().to_batches():
                        writer.write_batch(batch)
                file.truncate()
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def _verified_table(self, shard_set: ShardSet, shard: ShardInfo, temporary: Path) -> pa.Table:
        storage = shard_set.storage
        where = join_uri(shard_set.uri, shard.file)
        download = temporary.with_suffix(".parquet.tmp")
        local = Path(storage.path(shard.file)) if storage.is_local else download
        found = ""
        try:
            for attempt in range(_ATTEMPTS):
                time.sleep(0.2 * attempt)
                if not storage.exists(shard.file):
                    raise DataError(
                        "shard is missing", given=where, change="copy or make the set again"
                    )
                try:
                    copy = None if storage.is_local else download
                    found = storage.sha256(shard.file, copy_to=copy)
                except DataError:
                    if attempt == _ATTEMPTS - 1:
                        raise
                    continue
                if found == shard.sha256:
                    # A copy in memory, because the download goes before the table is written.
                    return read_shard_table(local, shard_set, shard)
            raise corrupt_shard(where, found, shard.sha256)
        finally:
            download.unlink(missing_ok=True)

    def _reserve(self, need: int, temporary: Path) -> None:
        """Removes least recently used files and claims `need` bytes with a sparse file."""
        with filelock.FileLock(self.folder / ".evict.lock"):
            held = 0
            files = []
            for entry in os.scandir(self.folder):
                try:
                    info = entry.stat()
                except FileNotFoundError:
                    continue
                if entry.name.endswith(".tmp") and self._abandoned(entry.name):
                    Path(entry.path).unlink(missing_ok=True)
                    continue
                held += info.st_size
                if entry.name.endswith(".arrow"):
                    files.append((info.st_mtime_ns, info.st_size, Path(entry.path)))
            for _, size, path in sorted(files):
                if held + need <= self.limit_bytes:
                    break
                # Processes that have it mapped keep their mapping; the disk space goes when they do.
                path.unlink(missing_ok=True)
                held -= size
            with temporary.open("wb") as file:
                file.truncate(need)

    def _abandoned(self, name: str) -> bool:
        """Whether the writer of this temporary file has died: its shard lock is free."""
        lock = filelock.FileLock(self.folder / f"{name.split('.')[1]}.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            return False
        lock.release()
        return True

    @contextmanager
    def _shard_lock(self, shard: ShardInfo) -> Iterator[None]:
        with filelock.FileLock(self.folder / f"{shard.sha256}.lock"):
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise DataError(
                "cannot write the shard cache",
                given=str(self.folder),
                change=f"{error}; set data.cache_dir and data.cache_gib to what the disk has",
            ) from None


class ReadAhead:
    """Fetches the shards that an epoch needs next, in background threads.

    It requests at most half of the cache, so it cannot evict the shards being read. Errors are
    left to the reader, who meets the same one when it needs the shard.
    """

    def __init__(self, cache: ShardCache, shard_set: ShardSet) -> None:
        self._cache = cache
        self._set = shard_set
        self._asked: set[int] = set()
        self._pool: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def want(self, shards: Sequence[int]) -> None:
        """Requests the shards that will be needed, most urgent first."""
        chosen: list[int] = []
        room = self._cache.limit_bytes // 2
        for shard in shards:
            room -= self._set.shards[shard].bytes
            if room < 0:
                break
            chosen.append(shard)
        with self._lock:
            new = [shard for shard in chosen if shard not in self._asked]
            self._asked = set(chosen)
            new = [shard for shard in new if not self._cache.has(self._set, shard)]
            if not new or self._stopped.is_set():
                return
            if self._pool is None:
                self._pool = ThreadPoolExecutor(_FETCHERS, thread_name_prefix="sample-readahead")
            for shard in new:
                self._pool.submit(self._fetch, shard)

    def close(self) -> None:
        """Stops after the running fetches."""
        self._stopped.set()
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown(wait=True, cancel_futures=True)

    def _fetch(self, shard: int) -> None:
        if not self._stopped.is_set():
            with contextlib.suppress(DataError):
                self._cache.fetch(self._set, shard)


def default_cache_folder() -> Path:
    """`elastic-kfac/shards` below the user's cache directory, or below a temporary one without a home."""
    return user_cache() / "shards"


def _needed_bytes(shard: ShardInfo) -> int:
    return 2 * shard.bytes + _SLACK_BYTES
