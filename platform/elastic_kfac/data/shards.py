"""Making shard sets: Parquet shards, then the manifest.

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

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import filelock
import numpy as np

from elastic_kfac.data.inspection import VerifyReport, describe_shards, verify_shards
from elastic_kfac.data.manifest import MANIFEST_NAME, ShardInfo, ShardSet
from elastic_kfac.data.shard_writing import MAKING, ROW_GROUP_ROWS, ShardTask
from elastic_kfac.data.sources import SourceSplit, absolute_source, open_source
from elastic_kfac.data.storage import Location, join_uri
from elastic_kfac.errors import DataError

__all__ = [
    "ShardSet",
    "ShardTask",
    "VerifyReport",
    "describe_shards",
    "make_shards",
    "verify_shards",
]

# Above this many bytes an epoch is shuffled in blocks, so that a cache smaller than the set works.
FULL_SHUFFLE_BYTES: Final = 4 << 30
BLOCK_BYTES: Final = 2 << 30
# Normalisation constants of encoded images come from about this many, evenly spread.
STATISTICS_SAMPLES: Final = 20_000

_PLAN: Final = f"{MAKING}/plan.json"

Progress = Callable[[str, int, int], None]


def make_shards(
    source: str,
    out: str | Path,
    split: str | None = None,
    *,
    shard_mib: float = 128,
    progress: Progress | None = None,
    run_tasks: Callable[[Sequence[ShardTask]], Iterable[dict[str, Any]]] | None = None,
) -> dict[str, Any]:
    """Writes a source as shard sets below `out`, one folder per split.

    Started again after an interruption it goes on with the shards that are missing; a finished set
    of the same source is left as it is.

    Args:
        source: `digits`, `parquet:PATH`, `imagefolder:PATH`, `ilsvrc:DIR`, `torchvision:NAME[:ROOT]`.
        out: Root URI: a folder, s3:// or gs://.
        split: Only this split; None for all of the source's.
        shard_mib: Size that a shard is cut at, MiB.
        progress: Called with (split, samples done, samples of the split).
        run_tasks: Runs tasks elsewhere and yields their records in any order; None runs them here.
            The other machines must see the source and `out` at the same places.

    Returns:
        `{"out": …, "seconds": …, "splits": {name: {"samples", "shards", "made", "reused", "bytes",
        "classes", "manifest_sha256"}}}`.

    Raises:
        DataError: If the source is unknown or damaged, or `out` holds other data.
    """
    if not 0 < shard_mib <= 1024:  # One Arrow binary column holds at most 2 GiB.
        raise DataError(
            "impossible shard size", given=f"{shard_mib} MiB", allowed="above 0 to 1024"
        )
    began = time.monotonic()
    root = Location.parse(out)
    source = absolute_source(source)
    opened = open_source(source, split=split)
    names = [split] if split is not None else list(opened.openers)
    splits = {}
    for name in names:
        making = _Making(source, opened.name, opened.split(name), name, root.child(name), shard_mib)
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


class _Making:
    """One split on its way to a finished set."""

    def __init__(
        self,
        source: str,
        source_name: str,
        data: SourceSplit,
        split: str,
        location: Location,
        shard_mib: float,
    ) -> None:
        if data.num_samples == 0:
            raise DataError("the source has no samples", given=f"{source}, split {split}")
        self.source_name = source_name
        self.data = data
        self.split = split
        self.location = location
        rows = max(1, min(data.num_samples, int(shard_mib * 2**20 / data.bytes_per_sample)))
        if ROW_GROUP_ROWS < rows < data.num_samples:
            rows -= rows % ROW_GROUP_ROWS
        stride = 1 if data.raw_shape else math.ceil(data.num_samples / STATISTICS_SAMPLES)
        starts = range(0, data.num_samples, rows)
        self.tasks = [
            ShardTask(
                source,
                split,
                data.fingerprint,
                location.uri,
                index,
                start,
                min(start + rows, data.num_samples),
                stride,
            )
            for index, start in enumerate(starts)
        ]
        plan = {
            "source": source_name,
            "content": data.fingerprint,
            "num_samples": data.num_samples,
            "rows": rows,
            "stride": stride,
            "row_group_rows": ROW_GROUP_ROWS,
            "class_names": list(data.class_names),
        }
        self.plan = json.dumps(plan, sort_keys=True).encode()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps a second `make` of the same local set out."""
        if not self.location.is_local:
            yield
            return
        folder = Path(self.location.path)
        folder.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(folder / ".make.lock")
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:
            raise DataError(
                "another `shards make` is writing this set", given=self.location.uri
            ) from None
        try:
            yield
        finally:
            lock.release()

    def make(
        self,
        progress: Progress,
        run_tasks: Callable[[Sequence[ShardTask]], Iterable[dict[str, Any]]] | None,
    ) -> dict[str, Any]:
        if self.location.size(MANIFEST_NAME) is not None:
            return self._finished()
        finished = self._finished_tasks()
        missing = [task for task in self.tasks if task.index not in finished]
        done = sum(task.stop - task.start for task in self.tasks if task.index in finished)
        progress(self.split, done, self.data.num_samples)
        results = run_tasks(missing) if run_tasks else (task.run(self.data) for task in missing)
        for result in results:
            finished[result["index"]] = result
            done += result["rows"]
            progress(self.split, done, self.data.num_samples)
        if len(finished) != len(self.tasks):
            raise DataError(
                "some shards were not made",
                given=f"{len(finished)} of {len(self.tasks)}",
                change="run the same command again; it continues",
            )
        if run_tasks is not None:
            self._check_arrived(missing, finished)
        shard_set = self._manifest([finished[task.index] for task in self.tasks])
        # Of other plans, and what a killed process was in the middle of writing.
        for name in self.location.names():
            if name.startswith(("shard-", ".shard-")) and name not in {
                s.file for s in shard_set.shards
            }:
                self.location.remove(name)
        self.location.write(MANIFEST_NAME, shard_set.to_json())
        self.location.remove(MAKING)
        return self._summary(len(missing), len(self.tasks) - len(missing))

    def _check_arrived(
        self, tasks: Sequence[ShardTask], finished: dict[int, dict[str, Any]]
    ) -> None:
        """Refuses shards that only another machine can see."""
        for task in tasks:
            if self.location.size(task.file) != finished[task.index]["bytes"]:
                raise DataError(
                    "a shard that another node has written is not here",
                    given=join_uri(self.location.uri, task.file),
                    change="choose an --out that all nodes share: a shared folder, s3:// or gs://",
                )

    def _finished(self) -> dict[str, Any]:
        existing = ShardSet.open(self.location.uri)
        if (existing.source, existing.source_sha256) != (self.source_name, self.data.fingerprint):
            raise DataError(
                "the output already holds another shard set",
                given=f"{self.location.uri} ({existing.source}, {existing.num_samples} samples)",
                change="choose another --out, or remove that folder",
            )
        self.location.remove(MAKING)
        return self._summary(0, len(existing.shards))

    def _finished_tasks(self) -> dict[int, dict[str, Any]]:
        """Records of an interrupted make of exactly these shards; otherwise starts from nothing."""
        same = self.location.size(_PLAN) is not None and self.location.read(_PLAN) == self.plan
        if not same:
            self.location.remove(MAKING)
            self.location.write(_PLAN, self.plan)
            return {}
        finished = {}
        for task in self.tasks:
            if self.location.size(task.record) is None:
                continue
            result = json.loads(self.location.read(task.record))
            if self.location.size(task.file) == result["bytes"]:
                finished[task.index] = result
        return finished

    def _manifest(self, results: Sequence[dict[str, Any]]) -> ShardSet:
        pixels = sum(result["pixels"] for result in results)
        sums = np.sum([result["sums"] for result in results], axis=0, dtype=object)
        squares = np.sum([result["squares"] for result in results], axis=0, dtype=object)
        # Exact integers until here, so the constants do not depend on how the split was cut.
        mean = [float(s) / pixels / 255 for s in sums]
        std = [
            math.sqrt(max(float(q) / pixels / 255**2 - m * m, 0.0))
            for q, m in zip(squares, mean, strict=True)
        ]
        smallest = tuple(min(result["smallest"][i] for result in results) for i in (0, 1))
        largest = tuple(max(result["largest"][i] for result in results) for i in (0, 1))
        shape = self.data.raw_shape
        if shape is None and smallest == largest:
            shape = (3, *smallest)
        total_bytes = sum(result["bytes"] for result in results)
        total_rows = sum(result["rows"] for result in results)
        window = None
        if total_bytes > FULL_SHUFFLE_BYTES:
            window = max(1, int(total_rows * BLOCK_BYTES / total_bytes))
        encoding: Literal["raw", "encoded"] = "raw" if self.data.raw_shape else "encoded"
        return ShardSet(
            uri=self.location.uri,
            split=self.split,
            source=self.source_name,
            source_sha256=self.data.fingerprint,
            encoding=encoding,
            image_shape=shape,
            smallest_image=smallest,
            largest_image=largest,
            class_names=self.data.class_names,
            class_counts=tuple(np.sum([r["class_counts"] for r in results], axis=0).tolist()),
            mean=tuple(round(m, 6) for m in mean),
            std=tuple(round(s, 6) for s in std),
            shuffle_window=window,
            shards=tuple(ShardInfo(**result["shard"]) for result in results),
            manifest_sha256="",
        )

    def _summary(self, made: int, reused: int) -> dict[str, Any]:
        shard_set = ShardSet.open(self.location.uri)
        return {
            "samples": shard_set.num_samples,
            "shards": len(shard_set.shards),
            "made": made,
            "reused": reused,
            "bytes": shard_set.num_bytes,
            "classes": shard_set.num_classes,
            "manifest_sha256": shard_set.manifest_sha256,
        }
