"""The same files on something that is not a local folder: whole objects, no rename, no append."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import fs

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import UsageError
from elastic_kfac.training.checkpoint import CheckpointStore
from elastic_kfac.training.loop import run_rank
from elastic_kfac.training.port import FolderPort, KeepGoing
from elastic_kfac.training.results import compact_ledger, read_ledger
from elastic_kfac.training.run_folder import RunFolder
from elastic_kfac.training.storage import Storage
from support.training_problems import StopAt, memory_feeds, small_config


@pytest.fixture
def bucket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """`s3://bucket` is a folder behind a file system that has nothing local about it."""
    (tmp_path / "bucket").mkdir()
    remote = fs.SubTreeFileSystem(str(tmp_path), fs.LocalFileSystem())
    original = fs.FileSystem.from_uri

    class Uris:
        @staticmethod
        def from_uri(uri: str) -> tuple[fs.FileSystem, str]:
            if uri.startswith("s3://"):
                path = uri.removeprefix("s3://").partition("?")[0]
                # Object stores know no folders; this one has to make them.
                remote.create_dir(path, recursive=True)
                return remote, path
            return original(uri)

    from elastic_kfac.data import storage

    monkeypatch.setattr(storage.pafs, "FileSystem", Uris)
    return "s3://bucket"


class FolderMaking(CheckpointStore):
    """Makes the folders that an object store would not need."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        write = self.storage.write

        def write_with_folder(name: str, content: bytes) -> None:
            parent = self.storage.path(name).rpartition("/")[0]
            self.storage._location.filesystem.create_dir(parent, recursive=True)
            write(name, content)

        self.storage.write = write_with_folder  # type: ignore[method-assign]


def test_files_are_written_appended_listed_and_deleted(bucket: str) -> None:
    storage = Storage(f"{bucket}/a")
    assert not storage.is_local
    storage.append_lines("x.jsonl", b"1\n")
    storage.append_lines("x.jsonl", b"2\n")
    assert storage.read("x.jsonl") == b"1\n2\n"
    storage.delete("x.jsonl")
    storage.delete("x.jsonl")
    assert not storage.exists("x.jsonl")
    with pytest.raises(FileNotFoundError):
        storage.read("x.jsonl")


def test_run_parks_resumes_and_compacts_its_ledger(bucket: str, tmp_path: Path) -> None:
    uri = f"{bucket}/run"
    folder = RunFolder(uri)
    for control in (StopAt(5), KeepGoing()):
        outcome = run_rank(
            small_config(),
            Communicator.solo(),
            store=FolderMaking(uri),
            port=FolderPort(folder),
            control=control,
            feeds=memory_feeds(),
        )
    assert outcome.progress.step == 12
    assert compact_ledger(folder) == 12
    assert read_ledger(folder)["step"].tolist() == list(range(1, 13))
    assert [row["step"] for row in folder.metrics() if "loss" in row] == list(range(1, 13))
    assert (tmp_path / "bucket/run/ledger.parquet").exists()


def test_unknown_scheme_is_one_clear_line() -> None:
    with pytest.raises(UsageError, match="cannot open the storage"):
        RunFolder("nfs9://host/run")
