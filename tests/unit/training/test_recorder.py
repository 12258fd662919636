"""Rows of a run where writing fails, is slow, or is not allowed yet."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_kfac.data.storage import Storage
from elastic_kfac.state import recorder
from elastic_kfac.state.line_log import LineLog
from elastic_kfac.state.recorder import Recorder
from elastic_kfac.state.run_folder import METRICS, RunFolder
from support.object_server import Store, s3_server
from support.small_disk import small_disk


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorder, "RETRY_S", 0.1)
    monkeypatch.setattr(recorder, "INTERVAL_S", 0.1)
    monkeypatch.setattr(recorder, "CLOSE_S", 0.5)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, str]]:
    with s3_server(monkeypatch) as (store, uri_of):
        yield store, uri_of("runs/one")


def rows(*steps: int, text: str = "") -> list[dict[str, Any]]:
    return [{"step": step, "loss": 1.0, "text": text} for step in steps]


def steps_of(folder: RunFolder) -> list[int]:
    return [int(row["step"]) for row in folder.metrics()]


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain: {what}"
        time.sleep(0.02)


def test_full_disk_keeps_rows_says_so_and_writes_them_once_there_is_room(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 96) as disk:
        (disk / "ballast").write_bytes(b"x" * 60 * 1024)
        writer = Recorder(RunFolder(disk / "run"))
        for step in range(1, 61):
            # More than the rest of the disk: one of these writes fails in the middle of a row.
            writer.metrics(rows(step, text="y" * 1024))
            writer.events([{"kind": "note", "step": step}])
        (line,) = writer.news()
        assert "cannot be written" in line and "kept in memory and tried again" in line
        found = steps_of(RunFolder(disk / "run"))
        assert found == list(range(1, len(found) + 1)) and len(found) < 60
        (disk / "ballast").unlink()
        (disk / "run" / "metrics.jsonl").stat()
        until(lambda: len(steps_of(RunFolder(disk / "run"))) == 60, "rows after the disk had room")
        assert writer.close() == 0
        assert "can be written again" in writer.news()[0]
        folder = RunFolder(disk / "run")
        assert steps_of(folder) == [row["step"] for row in folder.events()] == list(range(1, 61))


def test_rows_that_can_never_be_written_are_counted(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file in the place of the folder")
    writer = Recorder(RunFolder(tmp_path / "run"))
    writer.metrics(rows(1, 2))
    writer.events([{"kind": "start", "step": 1}])
    assert writer.close() == 3


def test_nothing_is_written_before_the_state_has_accepted(tmp_path: Path) -> None:
    folder, order = RunFolder(tmp_path / "run"), []
    folder.append(METRICS, rows(1, 2, 3))
    writer = Recorder(folder)
    writer.hold()
    writer.events([{"kind": "state_found", "step": 2}])
    writer.rewind(2)
    writer.metrics(rows(3, 4))
    assert steps_of(folder) == [1, 2, 3] and folder.events() == []
    writer.accept(lambda: order.append(steps_of(folder)))
    assert order == [[1, 2, 3]]
    assert steps_of(folder) == [1, 2, 3, 4] and len(folder.events()) == 1


def test_run_that_was_never_accepted_leaves_the_folder_as_it_was(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    folder.append(METRICS, rows(1))
    writer = Recorder(folder)
    writer.hold()
    writer.rewind(0)
    writer.events([{"kind": "failure", "step": 1}])
    assert writer.close() == 0
    assert steps_of(folder) == [1] and folder.events() == []


def test_object_store_that_refuses_for_a_while_gets_every_row_once(
    served: tuple[Store, str],
) -> None:
    store, uri = served
    writer = Recorder(RunFolder(uri))
    store.on_put = lambda key: 403 if "metrics" in key else 200
    writer.metrics(rows(1, 2))
    until(lambda: writer._problem, "the refusal")
    writer.metrics(rows(3))
    writer.rewind(2)
    writer.metrics(rows(3, 4))
    store.on_put = lambda key: 200
    until(lambda: steps_of(RunFolder(uri)) == [1, 2, 3, 4], "the rows")
    assert writer.close() == 0 and len(writer.news()) == 2
    assert sorted(key for key in store.objects if not key.endswith("/")) == [
        "runs/one/metrics.jsonl"
    ]


def test_adding_rows_does_not_wait_for_a_slow_object_store(served: tuple[Store, str]) -> None:
    store, uri = served
    store.delay_s = 0.5
    writer = Recorder(RunFolder(uri))
    writer.metrics(rows(1))
    until(lambda: store.counts.total(), "the first write to begin")
    begin = time.monotonic()
    for step in range(2, 52):
        writer.metrics(rows(step))
    assert time.monotonic() - begin < 0.5
    store.delay_s = 0.0
    assert writer.close() == 0
    assert steps_of(RunFolder(uri)) == list(range(1, 52))


def test_cost_of_a_log_on_an_object_store_is_linear_up_to_a_logarithm(
    served: tuple[Store, str],
) -> None:
    store, uri = served
    log = LineLog(Storage(uri), "metrics.jsonl")
    lines = [json.dumps(row).encode() + b"\n" for row in rows(*range(500), text="z" * 150)]
    for line in lines:
        log.append(line)
    size = sum(map(len, lines))
    # Four levels of eight parts; rewriting the whole file each time would write 250 times its size.
    assert store.transferred["PUT"] < 4 * size and store.transferred["GET"] < 4 * size
    assert len([key for key in store.objects if ".parts/" in key]) <= 30
    assert LineLog(Storage(uri), "metrics.jsonl").content() == b"".join(lines)


def test_reader_of_a_growing_log_sees_whole_beginnings_of_it(served: tuple[Store, str]) -> None:
    _, uri = served
    lines = [b"%05d\n" % number for number in range(150)]
    whole, seen, over = b"".join(lines), [], threading.Event()

    def read() -> None:
        while not over.is_set():
            seen.append(LineLog(Storage(uri), "x.jsonl").content())

    reader = threading.Thread(target=read)
    reader.start()
    log = LineLog(Storage(uri), "x.jsonl")
    for line in lines:
        log.append(line)
    log.finish()
    over.set()
    reader.join()
    assert len(set(seen)) > 3
    assert all(whole.startswith(content) for content in seen)
    assert sorted(map(len, seen)) == list(map(len, seen))


def test_log_left_in_the_middle_of_a_merge_is_read_and_continued(served: tuple[Store, str]) -> None:
    store, uri = served
    log = LineLog(Storage(uri), "x.jsonl")
    for number in range(3):
        log.append(b"%d\n" % number)
    first = "runs/one/x.jsonl.parts/000000000000000"
    # The first part has taken over the others, which are still there.
    store.objects[first] = b"0\n1\n2\n"
    fresh = LineLog(Storage(uri), "x.jsonl")
    assert fresh.content() == b"0\n1\n2\n"
    fresh.append(b"3\n")
    fresh.truncate(6)
    fresh.append(b"9\n")
    assert fresh.finish() == LineLog(Storage(uri), "x.jsonl").content() == b"0\n1\n2\n9\n"
    assert store.objects["runs/one/x.jsonl"] == b"0\n1\n2\n9\n"


def test_merge_that_fails_neither_loses_nor_repeats_lines(served: tuple[Store, str]) -> None:
    store, uri = served
    log = LineLog(Storage(uri), "x.jsonl")
    refused: list[str] = []

    def refuse_to_replace(key: str) -> int:
        if key in store.objects and len(refused) < 2:
            refused.append(key)
            return 403
        return 200

    store.on_put = refuse_to_replace
    lines = [b"%03d\n" % number for number in range(40)]
    for line in lines:
        log.append(line)
    assert len(refused) == 2
    assert LineLog(Storage(uri), "x.jsonl").content() == b"".join(lines) == log.finish()
