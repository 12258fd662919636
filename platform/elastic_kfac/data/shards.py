"""Making shard sets: Parquet shards with exact pixel statistics, then the manifest.

A split is cut into fixed ranges of samples, one per shard, so that shards can be made in any order
by any number of processes (`ShardTask` is picklable) and an interrupted `make` continues:

    <root>/<split>/making/plan.json          which ranges, of which content
    <root>/<split>/making/shard-00003.json   shard 3 is finished (written after the shard)
    <root>/<split>/shard-00003.parquet
    <root>/<split>/manifest.json             written last; then making/ is removed

Shards are Parquet without compression: JPEG does not shrink, and raw pixels shrink too little for what
zstd costs the reader.
"""

from __future__ import annotations

import hashlib
import json
import math
import platform
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

import filelock
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_kfac.data.column_statistics import Measured, summarised
from elastic_kfac.data.columns import Column, check_columns, shard_schema
from elastic_kfac.data.decode import (
    MAX_PIXELS,
    UndecodableImage,
    check_mask,
    decode_mask,
    decode_rgb,
    image_size,
)
from elastic_kfac.data.manifest import (
    MAKING,
    MANIFEST_HASH,
    MANIFEST_NAME,
    ShardInfo,
    ShardSet,
    schema_sha256,
)
from elastic_kfac.data.sources import Records, SourceSplit, absolute_source, is_inside, open_source
from elastic_kfac.data.storage import Storage, join_uri
from elastic_kfac.errors import DataError
from elastic_kfac.json_text import parsed

FULL_SHUFFLE_BYTES: Final = 4 << 30
"""An epoch of a larger set is shuffled in blocks, so that a cache smaller than the set suffices."""
BLOCK_BYTES: Final = 2 << 30
STATISTICS_SAMPLES: Final = 20_000
"""Normalisation constants of encoded images come from about this many samples, evenly spread."""
ROW_GROUP_ROWS: Final = 512
QUARANTINE: Final = "quarantine.jsonl"
"""Keys of left-out records and what is wrong with each, beside the shards."""
_PLAN: Final = f"{MAKING}/plan.json"

Progress = Callable[[str, int, int], None]
"""Called with (split, samples done, samples of the split)."""


def make_shards(
    source: str,
    out: str | Path,
    split: str | None = None,
    *,
    shard_mib: float = 128,
    bad_images: BadImages | None = None,
    progress: Progress | None = None,
    run_tasks: RunTasks | None = None,
) -> dict[str, Any]:
    """Writes a source as shard sets below `out`, one folder per split.

    After an interruption the same call makes only the missing shards; a finished set of the same
    source is left as it is.

    Args:
        source: As `elastic-kfac shards make --source`, for example `digits` or `parquet:PATH`.
        out: Root URI: a folder, s3:// or gs://.
        split: Make this split only; None makes every split of the source.
        shard_mib: Size of a shard, MiB.
        bad_images: What to do with images that cannot be decoded; None raises at the first one.
        progress: Called with (split, samples done, samples of the split).
        run_tasks: Runs tasks elsewhere and yields their records in any order; None runs them in this
            process. The other machines must see the source and `out` at the same places.

    Returns:
        `{"out": …, "seconds": …, "splits": {name: {"samples", "shards", "made", "reused", "bytes",
        "classes", "manifest_sha256", "bad"}}}`; `bad` lists the left-out records.

    Raises:
        DataError: If the source is unknown or damaged, or `out` holds other data.
    """
    if not 0 < shard_mib <= 1024:  # One Arrow binary column holds at most 2 GiB.
        raise DataError(
            "impossible shard size", given=f"{shard_mib} MiB", allowed="above 0 to 1024"
        )
    began = time.monotonic()
    root = Storage(out)
    source = absolute_source(source)
    if root.is_local and is_inside(source, root.path()):
        raise DataError(
            "--out lies inside the source, whose next reader would take the shards for data",
            given=str(out),
            change="name a folder outside of the source",
        )
    opened = open_source(source, split=split)
    splits = {}
    for name in [split] if split is not None else list(opened.openers):
        try:
            data = opened.split(name)
        except OSError as error:
            raise _unreadable_source(source, error) from None
        making = _Making(
            source, opened.name, data, name, root.child(name), shard_mib, bad_images or BadImages()
        )
        try:
            with making.locked():
                splits[name] = making.make(progress or (lambda *_: None), run_tasks)
        except OSError as error:
            raise DataError(
                "cannot write shards",
                given=root.uri,
                change=f"{error}; then run the same command again, it continues",
            ) from None
    return {"out": root.uri, "seconds": time.monotonic() - began, "splits": splits}


@dataclass(frozen=True)
class BadImages:
    """What to do with images that are undecodable or too large.

    `skip` leaves them out, up to `limit` per split; `quarantine` also lists them in
    `quarantine.jsonl` beside the shards.
    """

    policy: Literal["raise", "skip", "quarantine"] = "raise"
    limit: int = 1000
    max_pixels: int = MAX_PIXELS


@dataclass(frozen=True)
class ShardTask:
    """One shard to make: samples [start, stop) of a split. Picklable; running it twice is harmless.

    `content` is the quick fingerprint of the split when the shards were planned: another machine may
    have a different file under the same path.
    """

    source: str
    split: str
    content: str
    out: str
    index: int
    start: int
    stop: int
    statistics_stride: int
    bad_images: BadImages = field(default_factory=BadImages)

    @property
    def file(self) -> str:
        return f"shard-{self.index:05d}.parquet"

    @property
    def record(self) -> str:
        return f"{MAKING}/shard-{self.index:05d}.json"

    def open(self) -> SourceSplit:
        """Opens the source split."""
        return open_source(self.source, split=self.split).split(self.split)

    def run(self, opened: SourceSplit | None = None) -> dict[str, Any]:
        """Writes the shard, then the record that marks it finished; returns the record.

        Raises:
            DataError: If a record of the source is bad (it names the record), or the source differs
                from the planned one.
        """
        data = opened or self.open()
        if data.quick_fingerprint != self.content:
            raise DataError(
                f"the source differs from machine to machine ({platform.node()} has another one)",
                given=f"{self.source}, split {self.split}",
                change="put the same files at the same place on every node",
            )
        storage = Storage(self.out)
        scratch = storage.path(MAKING) if storage.is_local else None
        with tempfile.TemporaryDirectory(prefix="shard-", dir=scratch) as folder:
            path = Path(folder) / self.file
            result = _write_parquet(self, data, path)
            storage.put(path, self.file)
        storage.write(self.record, json.dumps(result).encode())
        return result


RunTasks = Callable[[Sequence[ShardTask]], Iterable[dict[str, Any]]]


class _Making:
    """One split while its shards are being made."""

    def __init__(
        self,
        source: str,
        source_name: str,
        data: SourceSplit,
        split: str,
        storage: Storage,
        shard_mib: float,
        bad_images: BadImages,
    ) -> None:
        samples = data.num_samples
        if samples == 0:
            raise DataError("the source has no samples", given=f"{source}, split {split}")
        check_columns(data.columns, f"{source}, split {split}")
        self.source_name, self.data, self.split, self.storage = source_name, data, split, storage
        self.bad_images = bad_images
        rows = max(1, min(samples, int(shard_mib * 2**20 / data.bytes_per_sample)))
        if ROW_GROUP_ROWS < rows < samples:
            rows -= rows % ROW_GROUP_ROWS
        encoded = any(column.encoding == "encoded" for column in data.columns)
        stride = math.ceil(samples / STATISTICS_SAMPLES) if encoded else 1
        self.tasks = [
            ShardTask(
                source=source,
                split=split,
                content=data.quick_fingerprint,
                out=storage.uri,
                index=index,
                start=start,
                stop=min(start + rows, samples),
                statistics_stride=stride,
                bad_images=bad_images,
            )
            for index, start in enumerate(range(0, samples, rows))
        ]
        plan = {
            "source": source_name,
            "content": data.fingerprint,
            "num_samples": samples,
            "rows": rows,
            "stride": stride,
            "row_group_rows": ROW_GROUP_ROWS,
            "columns": [column.to_json() for column in data.columns],
            "bad_images": [bad_images.policy, bad_images.max_pixels],
        }
        self.plan = json.dumps(plan, sort_keys=True).encode()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Excludes a second `make` of the same local set."""
        if not self.storage.is_local:
            yield
            return
        folder = Path(self.storage.path())
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".make.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise DataError(
                "another `shards make` is writing this set", given=self.storage.uri
            ) from None
        try:
            yield
        finally:
            lock.release()

    def make(self, progress: Progress, run_tasks: RunTasks | None) -> dict[str, Any]:
        if self.storage.exists(MANIFEST_NAME):
            return self._finished()
        finished = self._finished_tasks()
        missing = [task for task in self.tasks if task.index not in finished]
        done = sum(task.stop - task.start for task in self.tasks if task.index in finished)
        progress(self.split, done, self.data.num_samples)
        results = run_tasks(missing) if run_tasks else (task.run(self.data) for task in missing)
        for result in results:
            finished[result["index"]] = result
            _check_limit(
                [bad for each in finished.values() for bad in each["bad"]], self.bad_images
            )
            task = self.tasks[result["index"]]
            done += task.stop - task.start
            progress(self.split, done, self.data.num_samples)
        if len(finished) != len(self.tasks):
            raise DataError(
                "some shards were not made",
                given=f"{len(finished)} of {len(self.tasks)}",
                change="run the same command again; it continues",
            )
        if run_tasks is not None:
            self._check_visible(missing, finished)
        ordered = [finished[task.index] for task in self.tasks]
        bad = [each for result in ordered for each in result["bad"]]
        shard_set = self._manifest([result for result in ordered if result["rows"]])
        # Shards of other plans, and what a killed process was in the middle of writing.
        wanted = {shard.file for shard in shard_set.shards}
        for name in self.storage.files():
            if name.startswith(("shard-", ".shard-")) and name not in wanted:
                self.storage.delete(name)
        self.storage.delete(QUARANTINE)
        if bad and self.bad_images.policy == "quarantine":
            lines = "".join(json.dumps(each) + "\n" for each in bad)
            self.storage.write(QUARANTINE, lines.encode())
        manifest = shard_set.to_json()
        self.storage.write(MANIFEST_HASH, hashlib.sha256(manifest).hexdigest().encode())
        self.storage.write(MANIFEST_NAME, manifest)
        self.storage.delete(MAKING)
        return self._summary(len(missing), len(self.tasks) - len(missing), bad)

    def _check_visible(
        self, tasks: Sequence[ShardTask], finished: dict[int, dict[str, Any]]
    ) -> None:
        """Refuses shards that only another machine can see."""
        for task in tasks:
            if self.storage.size(task.file) != finished[task.index]["bytes"]:
                raise DataError(
                    "a shard that another node has written is not here",
                    given=join_uri(self.storage.uri, task.file),
                    change="choose an --out that all nodes share: a shared folder, s3:// or gs://",
                )

    def _finished(self) -> dict[str, Any]:
        existing = ShardSet.open(self.storage.uri)
        if (existing.source, existing.source_sha256) != (self.source_name, self.data.fingerprint):
            raise DataError(
                "the output already holds another shard set",
                given=f"{self.storage.uri} ({existing.source}, {existing.num_samples} samples)",
                change="choose another --out, or remove that folder",
            )
        self.storage.delete(MAKING)
        return self._summary(0, len(existing.shards), [])

    def _finished_tasks(self) -> dict[int, dict[str, Any]]:
        """Records of an interrupted make with exactly this plan; with another plan, starts over."""
        if not self.storage.exists(_PLAN) or self.storage.read(_PLAN) != self.plan:
            self.storage.delete(MAKING)
            self.storage.write(_PLAN, self.plan)
            return {}
        finished = {}
        for task in self.tasks:
            if not self.storage.exists(task.record):
                continue
            try:
                result = parsed(self.storage.read(task.record))
                if self.storage.size(task.file) == result["bytes"] and result["bad"] is not None:
                    finished[task.index] = result
            except (ValueError, KeyError, TypeError):
                continue  # A damaged record: the shard is made again.
        return finished

    def _manifest(self, results: Sequence[dict[str, Any]]) -> ShardSet:
        if not results:
            raise DataError("no record of the source can be decoded", given=f"{self.source_name}")
        columns = tuple(
            summarised(column, [result["measured"][column.name] for result in results])
            for column in self.data.columns
        )
        total_bytes = sum(result["bytes"] for result in results)
        window = None
        if total_bytes > FULL_SHUFFLE_BYTES:
            window = max(1, int(self.data.num_samples * BLOCK_BYTES / total_bytes))
        return ShardSet(
            uri=self.storage.uri,
            split=self.split,
            source=self.source_name,
            source_sha256=self.data.fingerprint,
            columns=columns,
            shuffle_window=window,
            shards=tuple(ShardInfo(**result["shard"]) for result in results),
            manifest_sha256="",
        )

    def _summary(self, made: int, reused: int, bad: Sequence[Any]) -> dict[str, Any]:
        shard_set = ShardSet.open(self.storage.uri)
        return {
            "samples": shard_set.num_samples,
            "shards": len(shard_set.shards),
            "made": made,
            "reused": reused,
            "bytes": shard_set.num_bytes,
            "classes": shard_set.num_classes,
            "of": _words(shard_set),
            "manifest_sha256": shard_set.manifest_sha256,
            "bad": bad,
        }


def _words(shard_set: ShardSet) -> str:
    """What a sample is, in words."""
    kinds = [column.kind for column in shard_set.columns]
    if kinds == ["image", "class"]:
        return f"of {shard_set.num_classes} classes"
    parts = []
    for column in shard_set.columns:
        size = f" of {column.num_classes} classes" if column.class_names else ""
        if column.kind == "tokens":
            span = f"{column.shortest} to " if column.is_padded else ""
            size = f" of {span}{column.longest} tokens"
        elif column.kind == "tensor":
            size = f" of {'×'.join(map(str, column.shape or ()))} numbers"
        parts.append(f"{column.name}{size}")
    return f"({', '.join(parts)})"


def _write_parquet(task: ShardTask, data: SourceSplit, path: Path) -> dict[str, Any]:
    schema = shard_schema(data.columns)
    measured = {column.name: Measured(column) for column in data.columns}
    bad: list[dict[str, str]] = []
    rows = 0
    with pq.ParquetWriter(
        path, schema, compression="NONE", use_dictionary=False, write_page_checksum=True
    ) as writer:
        for table in _row_groups(_tables(data, task, schema, measured, bad)):
            writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
            rows += table.num_rows
    if (at := task.start + rows + len(bad)) != task.stop:
        raise DataError(
            "the source ended early", given=f"sample {at}", allowed=f"{task.stop} samples"
        )
    size = path.stat().st_size
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    shard = ShardInfo(task.file, rows, size, digest, schema_sha256(schema))
    return {
        "index": task.index,
        "rows": rows,
        "bytes": size,
        "shard": asdict(shard),
        "measured": {name: one.record for name, one in measured.items()},
        "bad": bad,
    }


def _tables(
    data: SourceSplit,
    task: ShardTask,
    schema: pa.Schema,
    measured: Mapping[str, Measured],
    bad: list[dict[str, str]],
) -> Iterator[pa.Table]:
    at = task.start
    for records in _readable(data, task):
        for column in data.columns:
            column.check(records.values[column.name], f"split {task.split}", at)
        good = _decodable(data.columns, records, measured, at, task, bad)
        at += len(records.keys)
        parts = []
        for column in data.columns:
            values = records.values[column.name]
            measured[column.name].add(values, good)
            parts.append(column.arrow(values, good))
        keys = pa.array([records.keys[row] for row in good], type=pa.string())
        yield pa.table([*parts, keys], schema=schema)


def _readable(data: SourceSplit, task: ShardTask) -> Iterator[Records]:
    records = data.read(task.start, task.stop)
    while True:
        try:
            piece = next(records, None)
        except (OSError, pa.ArrowException) as error:
            raise _unreadable_source(task.source, error) from None
        if piece is None:
            return
        yield piece


def _unreadable_source(source: str, error: BaseException) -> DataError:
    return DataError("cannot read the source", given=source, change=str(error))


def _decodable(
    columns: Sequence[Column],
    records: Records,
    measured: Mapping[str, Measured],
    first: int,
    task: ShardTask,
    bad: list[dict[str, str]],
) -> list[int]:
    """The rows whose images and masks can be decoded, which it measures; the others go to `bad`."""
    encoded = [column for column in columns if column.encoding == "encoded"]
    has_masks = any(column.kind == "mask" for column in encoded)
    most = task.bad_images.max_pixels
    good = []
    for row, key in enumerate(records.keys):
        try:
            looked_at = (first + row) % task.statistics_stride == 0
            sizes = {}
            for column in encoded if has_masks else ():
                sizes[column.kind] = image_size(records.values[column.name][row], most)
            if len(set(sizes.values())) > 1:
                (high, wide), (tall, broad) = sizes["mask"], sizes["image"]
                what = f"a mask of {wide}x{high} pixels for an image of {broad}x{tall}"
                raise UndecodableImage(what)
            for column in encoded:
                data = records.values[column.name][row]
                _measure_encoded(measured[column.name], data, looked_at, most)
            good.append(row)
        except UndecodableImage as error:
            problem = f"{column.name}: {error}" if has_masks else str(error)
            if task.bad_images.policy == "raise":
                size = len(records.values[column.name][row])
                raise DataError(
                    f"undecodable image at record {first + row}",
                    given=f"{key}, {size} bytes",
                    change=f"{problem}; --bad-records skip leaves such images out",
                ) from None
            bad.append({"key": key, "problem": problem})
            _check_limit(bad, task.bad_images)
    return good


def _measure_encoded(measured: Measured, data: bytes, looked_at: bool, max_pixels: int) -> None:
    """Adds an encoded image to the statistics, its pixels only if it is `looked_at`; a mask's always,
    because a class outside the names must not reach the loss."""
    size = image_size(data, max_pixels)
    if measured.column.kind == "mask":
        pixels = decode_mask(data, max_pixels=max_pixels)
        check_mask(pixels, measured.column.num_classes)
        measured.add_mask(pixels)
    elif looked_at:
        measured.add_pixels(decode_rgb(data, max_pixels=max_pixels), channel_axis=2)
    measured.add_size(*size)


def _check_limit(bad: Sequence[dict[str, str]], allowed: BadImages) -> None:
    if len(bad) > allowed.limit:
        raise DataError(
            "too many images cannot be decoded",
            given=f"{len(bad)}, the last: {bad[-1]['key']}: {bad[-1]['problem']}",
            allowed=f"{allowed.limit}",
            change="repair the source, or raise --max-bad-records",
        )


def _row_groups(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Joins and cuts tables to ROW_GROUP_ROWS rows each (the last one may be smaller)."""
    held: list[pa.Table] = []
    rows = 0
    for table in tables:
        held.append(table)
        rows += table.num_rows
        while rows >= ROW_GROUP_ROWS:
            joined = pa.concat_tables(held)
            yield joined.slice(0, ROW_GROUP_ROWS).combine_chunks()
            held, rows = [joined.slice(ROW_GROUP_ROWS)], rows - ROW_GROUP_ROWS
    if rows:
        yield pa.concat_tables(held).combine_chunks()
