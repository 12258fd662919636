"""One writer per folder: two at once, an owner that was killed, one that only seemed to be dead."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import UsageError
from elastic_kfac.state import claim
from elastic_kfac.state.claim import claimed
from support.object_server import s3_server

OWNER = """
import sys, time
from elastic_kfac.data.storage import Storage
from elastic_kfac.state.claim import claimed
with claimed(Storage(sys.argv[1]), "run a"):
    print("claimed", flush=True)
    time.sleep(600)
"""


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has claimed `run`."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", OWNER, str(tmp_path / "run")]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "claimed\n"
        yield process
        process.kill()


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Storage]]:
    """A folder on an object store, where signs of life come and are missed quickly."""
    monkeypatch.setattr(claim, "BEAT_S", 0.1)
    monkeypatch.setattr(claim, "STALE_S", 1.0)
    with s3_server(monkeypatch) as (_, uri):
        yield lambda: Storage(uri("runs/a"))


def test_second_writer_is_refused_in_one_line_that_names_the_first(
    tmp_path: Path, owner: subprocess.Popen[str]
) -> None:
    with (
        pytest.raises(UsageError, match="run a is in use by another process") as caught,
        claimed(Storage(tmp_path / "run"), "run a"),
    ):
        pytest.fail("two writers")
    assert f"pid {owner.pid}, since 20" in caught.value.line() and "\n" not in caught.value.line()
    assert caught.value.exit_code == 2


def test_killed_owner_is_named_and_followed(tmp_path: Path, owner: subprocess.Popen[str]) -> None:
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    said: list[str] = []
    with claimed(Storage(tmp_path / "run"), "run a", say=said.append):
        assert len(said) == 1 and f"pid {owner.pid}," in said[0]
        assert "ended without notice" in said[0]
    with claimed(Storage(tmp_path / "run"), "run a", say=said.append):
        assert len(said) == 1


def test_claim_waits_for_an_owner_that_finishes(tmp_path: Path) -> None:
    storage, order = Storage(tmp_path), []

    def second() -> None:
        with claimed(storage, "cell a", wait_s=60.0):
            order.append("second")

    with claimed(storage, "cell a"):
        thread = threading.Thread(target=second)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_claim_leaves_what_was_written_and_no_empty_folder(tmp_path: Path) -> None:
    with claimed(Storage(tmp_path / "empty"), "run a"):
        assert (tmp_path / "empty").is_dir()
    with claimed(Storage(tmp_path / "full"), "run a"):
        (tmp_path / "full" / "config.yaml").write_text("x: 1\n")
    assert [str(p.relative_to(tmp_path)) for p in sorted(tmp_path.rglob("*"))] == [
        "full",
        "full/config.yaml",
    ]


def test_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(UsageError, match="cannot write the folder of run a"),
        claimed(Storage(tmp_path / "file" / "run"), "run a"),
    ):
        pytest.fail("no folder can be there")


def without_flock(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(file: object, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.mark.parametrize("kind", ["flock", "announcements", "folder without flock"])
def test_of_many_at_once_one_goes_on_at_a_time(
    kind: str,
    tmp_path: Path,
    bucket: Callable[[], Storage],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    inside, most, entered = [0], [0], [0]
    lock = threading.Lock()
    if kind == "folder without flock":
        without_flock(monkeypatch, errno.ENOLCK)

    def attempt(_: int) -> bool:
        storage = bucket() if kind == "announcements" else Storage(tmp_path / "run")
        try:
            with claimed(storage, "run a"):
                with lock:
                    inside[0] += 1
                    entered[0] += 1
                    most[0] = max(most[0], inside[0])
                time.sleep(0.2)
                with lock:
                    inside[0] -= 1
            return True
        except UsageError as error:
            assert "in use" in error.line()
            return False

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(attempt, range(12)))
    assert most == [1] and entered[0] == sum(won) >= 1
    # All were there at once, so some were refused.
    assert not all(won)


def test_object_store_owner_without_a_sign_of_life_is_stale_and_named(
    bucket: Callable[[], Storage],
) -> None:
    left = b'{"host": "gone", "pid": 7, "started": "2026-11-28 10:00:00", "is_owner": true}'
    bucket().child(claim.CLAIMS_FOLDER).write("0123456789abcdef", left)
    said: list[str] = []
    begin = time.monotonic()
    with claimed(bucket(), "run a", say=said.append) as mine:
        assert time.monotonic() - begin >= 1.0
        assert "waiting for a sign of life" in said[0] and "host gone, pid 7" in said[0]
        assert "ended without notice" in said[1]
        time.sleep(0.3)
        mine.check()
    assert bucket().files(claim.CLAIMS_FOLDER) == []


def test_object_store_owner_that_was_taken_for_dead_notices_it(
    bucket: Callable[[], Storage],
) -> None:
    with claimed(bucket(), "run a") as mine:
        claims = bucket().child(claim.CLAIMS_FOLDER)
        (own,) = claims.files()
        claims.delete(own)
        for _ in range(100):
            time.sleep(0.05)
            if mine.is_lost:
                break
        with pytest.raises(UsageError, match="taken over by another process"):
            mine.check()
        assert claims.files() == []


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL])
def test_folder_without_flock_is_claimed_by_announcement(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claim, "BEAT_S", 0.1)
    monkeypatch.setattr(claim, "STALE_S", 1.0)
    without_flock(monkeypatch, number)
    with claimed(Storage(tmp_path / "run"), "run a") as mine:
        (tmp_path / "run" / ".claims" / ".half.tmp").write_text("being written")
        with (
            pytest.raises(UsageError, match="run a is in use by another process") as caught,
            claimed(Storage(tmp_path / "run"), "run a"),
        ):
            pytest.fail("two writers")
        assert f"pid {os.getpid()}, since 20" in caught.value.line()
        mine.check()
    assert [path.name for path in (tmp_path / "run").rglob("*")] == [".claims", ".half.tmp"]
    (tmp_path / "run" / ".claims" / "0123456789abcdef").write_text('{"is_owner": true}')
    said: list[str] = []
    with claimed(Storage(tmp_path / "run"), "run a", say=said.append):
        assert "ended without notice" in said[-1]


def test_folder_without_flock_keeps_the_lock_of_a_machine_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".lock").write_text("held elsewhere")
    without_flock(monkeypatch, errno.ENOSYS)
    with claimed(Storage(tmp_path), "run a"):
        assert (tmp_path / ".lock").read_text() == "held elsewhere"


@pytest.mark.parametrize(("failures", "is_claimed"), [(3, True), (10**9, False)])
def test_lock_file_removed_on_another_machine_is_tried_again_but_not_forever(
    failures: int, is_claimed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = [failures]
    real = fcntl.flock

    def stale(file: Any, operation: int) -> None:
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", stale)
    if is_claimed:
        with claimed(Storage(tmp_path / "run"), "run a"):
            assert b"pid" in (tmp_path / "run" / ".lock").read_bytes()
        return
    with (
        pytest.raises(UsageError, match=r"cannot write the folder.*Stale file handle"),
        claimed(Storage(tmp_path / "run"), "run a"),
    ):
        pytest.fail("no lock")


def test_lock_that_cannot_be_removed_is_free_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        with claimed(Storage(tmp_path / "run"), "run a"):
            pass
    with claimed(Storage(tmp_path / "run"), "run a"):
        pass
