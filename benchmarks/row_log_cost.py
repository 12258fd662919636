"""What rows of metrics cost on an object store: parts, beside a file that is rewritten at every batch.

A row is of the size that a K-FAC step writes (about 330 bytes); a batch is what arrives between two
writes (`per_batch`). The server is the tests' own on loopback: bytes and requests are exact, seconds are
those of a store without latency. `ratio` is bytes transferred per byte of rows.

    python benchmarks/row_log_cost.py [--out benchmarks/results/row_log_cost.json]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pytest

from elastic_kfac.data.storage import Storage
from elastic_kfac.state.line_log import LineLog

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from support.object_server import Store, s3_server

ROWS = (750, 1500, 3000)
PER_BATCH = 5
NAME = "metrics.jsonl"


def parts(storage: Storage) -> tuple[Callable[[bytes], object], Callable[[], object]]:
    """As runs write: parts that are merged, one file at the end."""
    log = LineLog(storage, NAME)
    return log.append, log.finish


def rewritten(storage: Storage) -> tuple[Callable[[bytes], object], Callable[[], object]]:
    """The whole file read and written at every batch."""

    def append(content: bytes) -> None:
        old = storage.read(NAME) if storage.exists(NAME) else b""
        storage.write(NAME, old + content)

    return append, lambda: None


def measure(way: Any, store: Store, storage: Storage, num_rows: int) -> dict[str, Any]:
    """Writes the rows; returns bytes, requests and seconds."""
    row = {"step": 0, "loss": 0.123456789, "padding": "x" * 290}
    lines = [json.dumps({**row, "step": step}).encode() + b"\n" for step in range(num_rows)]
    store.counts.clear()
    store.transferred.clear()
    begin = time.perf_counter()
    append, finish = way(storage)
    for first in range(0, num_rows, PER_BATCH):
        append(b"".join(lines[first : first + PER_BATCH]))
    finish()
    elapsed_s = time.perf_counter() - begin
    assert storage.read(NAME) == b"".join(lines)
    size = sum(map(len, lines))
    moved = store.transferred.total() - size
    return {
        "way": way.__name__,
        "rows": num_rows,
        "row_bytes": size,
        "transferred_bytes": moved,
        "ratio": round(moved / size, 1),
        "requests": store.counts.total(),
        "elapsed_s": round(elapsed_s, 2),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    out = Path(__file__).with_name("results") / "row_log_cost.json"
    parser.add_argument("--out", type=Path, default=out)
    arguments = parser.parse_args()
    found = []
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as (store, uri_of):
        for num_rows in ROWS:
            for way in (rewritten, parts):
                storage = Storage(uri_of(f"{way.__name__}-{num_rows}"))
                found.append(measure(way, store, storage, num_rows))
                store.objects.clear()
    report = {
        "what": f"rows of metrics on an object store, {PER_BATCH} a write",
        "rows": found,
        "n": 1,
        "hardware": f"{platform.machine()}, {os.cpu_count()} shared cores",
        "load": round(os.getloadavg()[0], 1),
        "versions": {"pyarrow": pyarrow.__version__},
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
