"""The ledger: the samples of every committed step.

The rows since the last sealed segment are part of the training state, so ledger and state cannot
disagree: a run that falls back to an older checkpoint also falls back to its rows. Older rows are in
immutable files `ledger/<first step>-<last step>.parquet`, written before the manifest of the checkpoint
that references them. `ledger.parquet`, with all rows, is written at the end.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import StateError

ROW = np.dtype(
    [
        ("step", "<i8"),
        ("epoch", "<i4"),
        ("first_position", "<i8"),
        ("num_samples", "<i4"),
        ("world_size", "<i4"),
        ("id_hash", "<u8"),
    ]
)
"""One committed step; `step` counts from 1, `first_position` is in the epoch's global order."""

Rows = npt.NDArray[Any]
_HASH = "elastic_kfac.sha256"
SEGMENT_ROWS = 4096


@dataclass(frozen=True)
class Segment:
    """An immutable file of ledger rows."""

    first_step: int
    last_step: int
    sha256: str

    @property
    def name(self) -> str:
        return f"ledger/{self.first_step:012d}-{self.last_step:012d}.parquet"


@dataclass(frozen=True)
class LedgerValue:
    """The ledger at a step boundary: part of the training state."""

    segments: tuple[Segment, ...] = ()
    tail: Rows = field(default_factory=lambda: np.empty(0, ROW))
    world_sizes: tuple[int, ...] = ()
    """World sizes of all rows, segments included, without consecutive repetitions."""
    unwritten: tuple[tuple[Segment, bytes], ...] = field(default=(), compare=False)
    """Content of sealed segments that may not be in the run's folder yet."""

    def write_segments(self, storage: Storage) -> None:
        """Writes the sealed segments that are not in the run's folder yet."""
        for segment, content in self.unwritten:
            storage.write(segment.name, content)

    def rows(self, storage: Storage) -> Rows:
        """All rows, segments first.

        Raises:
            StateError: If a segment is missing or its hash differs.
        """
        pending = dict(self.unwritten)
        parts = [
            _parse(segment, pending.get(segment) or _read(segment, storage))
            for segment in self.segments
        ]
        return np.concatenate([*parts, self.tail]) if parts else self.tail


class Ledger:
    """The growing ledger of a run, equal on every rank."""

    def __init__(self, value: LedgerValue | None = None) -> None:
        value = value or LedgerValue()
        self._segments = list(value.segments)
        self._unwritten = dict(value.unwritten)
        self._world_sizes: list[int] = list(value.world_sizes)
        self._tail: list[tuple[int, int, int, int, int, int]] = [
            (int(r[0]), int(r[1]), int(r[2]), int(r[3]), int(r[4]), int(r[5])) for r in value.tail
        ]

    def append(
        self,
        *,
        step: int,
        epoch: int,
        first_position: int,
        num_samples: int,
        world_size: int,
        id_hash: int,
    ) -> None:
        """Adds the row of a committed step."""
        self._tail.append((step, epoch, first_position, num_samples, world_size, id_hash))
        if self._world_sizes[-1:] != [world_size]:
            self._world_sizes.append(world_size)

    def seal(self, minimum_rows: int = SEGMENT_ROWS) -> None:
        """Turns the tail into a segment if it is long enough."""
        if not self._tail or len(self._tail) < minimum_rows:
            return
        rows = np.array(self._tail, ROW)
        content = to_parquet(rows)
        segment = Segment(
            int(rows["step"][0]), int(rows["step"][-1]), hashlib.sha256(content).hexdigest()
        )
        self._segments.append(segment)
        self._unwritten[segment] = content
        self._tail.clear()

    def written(self, count: int) -> None:
        """Drops the content of the first `count` segments, which are in the run's folder."""
        for segment in self._segments[:count]:
            self._unwritten.pop(segment, None)

    def value(self) -> LedgerValue:
        """A frozen copy."""
        return LedgerValue(
            tuple(self._segments),
            np.array(self._tail, ROW),
            tuple(self._world_sizes),
            tuple(self._unwritten.items()),
        )

    def world_sizes(self) -> list[int]:
        """World sizes of the committed steps, without consecutive repetitions."""
        return list(self._world_sizes)


def to_parquet(rows: Rows) -> bytes:
    """The rows as a Parquet file, with their hash in its metadata."""
    table = pa.table({name: pa.array(np.ascontiguousarray(rows[name])) for name in ROW.names or ()})
    sink = pa.BufferOutputStream()
    pq.write_table(table.replace_schema_metadata({_HASH: _sha256(rows)}), sink)
    return bytes(sink.getvalue())


def from_parquet(content: bytes) -> Rows:
    """The rows of `to_parquet`.

    Raises:
        StateError: If the file is damaged.
    """
    try:
        table = pq.read_table(pa.BufferReader(content))
        rows = np.empty(table.num_rows, ROW)
        for name in ROW.names or ():
            rows[name] = table[name].to_numpy()
        written = (table.schema.metadata or {}).get(_HASH.encode())
    except (pa.ArrowException, OSError, ValueError, KeyError, TypeError, MemoryError) as error:
        raise StateError("the ledger is damaged", change=str(error)) from None
    if written is not None and written.decode(errors="replace") != _sha256(rows):
        raise StateError("the ledger is damaged (its hash differs)")
    return rows


def _sha256(rows: Rows) -> str:
    return hashlib.sha256(np.ascontiguousarray(rows).tobytes()).hexdigest()


def world_sizes(rows: Rows) -> list[int]:
    """World sizes of the rows, in order, without consecutive repetitions."""
    sizes = rows["world_size"]
    if not len(sizes):
        return []
    changes = np.flatnonzero(np.diff(sizes)) + 1
    return [int(sizes[index]) for index in (0, *changes)]


def _read(segment: Segment, storage: Storage) -> bytes:
    try:
        return storage.read(segment.name)
    except FileNotFoundError:
        raise StateError("a ledger segment is missing", given=storage.path(segment.name)) from None


def _parse(segment: Segment, content: bytes) -> Rows:
    if hashlib.sha256(content).hexdigest() != segment.sha256:
        raise StateError("a ledger segment is damaged (its hash differs)", given=segment.name)
    return from_parquet(content)
