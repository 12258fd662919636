"""The same files on something that is not a local folder: whole objects, no rename, no append."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from pyarrow import fs

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import ElasticKfacError, UsageError
from elastic_kfac.runs.final_record import compact_ledger, read_ledger
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.training.callbacks import Control, FolderWriter, KeepGoing
from elastic_kfac.training.loop import Outcome, run_rank
from support.object_server import Store, s3_server
from support.training_problems import RecordingCallback, StopAt, memory_datasets, small_config


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


def test_files_are_written_appended_listed_and_deleted(bucket: str) -> None:
    storage = Storage(f"{bucket}/a")
    assert not storage.is_local
    storage.write("x.jsonl", b"1\n")
    assert storage.read("x.jsonl") == b"1\n"
    storage.delete("x.jsonl")
    storage.delete("x.jsonl")
    assert not storage.exists("x.jsonl")
    with pytest.raises(FileNotFoundError):
        storage.read("x.jsonl")


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, str]]:
    """A real server on loopback, and the URI of a run on it."""
    with s3_server(monkeypatch) as (store, uri_of):
        yield store, uri_of("runs/one")


def test_run_parks_resumes_and_compacts_its_ledger(served: tuple[Store, str]) -> None:
    store, uri = served
    folder = RunFolder(uri)
    for control in (StopAt(5), KeepGoing()):
        writer = FolderWriter(folder)
        outcome = run_rank(
            small_config(),
            Communicator.solo(),
            store=CheckpointStore(uri),
            callback=writer,
            control=control,
            datasets=memory_datasets(),
        )
        writer.close()
    assert outcome.progress.step == 12
    assert compact_ledger(folder) == 12
    assert read_ledger(folder)["step"].tolist() == list(range(1, 13))
    assert [row["step"] for row in folder.metrics() if "loss" in row] == list(range(1, 13))
    assert "runs/one/ledger.parquet" in store.objects


def train(uri: str, control: Control, *, snapshot_interval_s: float = 1e9) -> Outcome:
    store = CheckpointStore(uri)
    try:
        return run_rank(
            small_config({"elastic.snapshot_interval_s": snapshot_interval_s}),
            Communicator.solo(),
            store=store,
            callback=RecordingCallback(),
            control=control,
            datasets=memory_datasets(),
        )
    finally:
        store.close()


def test_s3_run_parks_resumes_retains_and_ends_as_on_a_disk(
    served: tuple[Store, str], tmp_path: Path
) -> None:
    store, uri = served
    store.delay_s = 0.002
    assert train(uri, StopAt(5)).status == "parked"
    assert CheckpointStore(uri).steps()[-1] == 5
    outcome = train(uri, KeepGoing(), snapshot_interval_s=1e-9)
    assert outcome.progress.step == 12
    assert outcome.state_sha256 == train(str(tmp_path), KeepGoing()).state_sha256
    steps = CheckpointStore(uri).steps()
    assert len(steps) == 3 and steps[-1] == 12  # of more than three
    names = {key.split("/")[3] for key in store.objects if key.startswith("runs/one/checkpoints/s")}
    assert names == {f"step-{step:012d}" for step in steps}


def two_checkpoints(uri: str, said: list[str]) -> CheckpointStore:
    """Of steps 4 and 8."""
    store = CheckpointStore(uri, on_warning=said.append)
    for polls in (4, 4):
        train(uri, StopAt(polls))
    assert store.steps() == [4, 8]
    return store


def flip(store: Store, key: str) -> None:
    content = bytearray(store.objects[key])
    content[-1] ^= 1
    store.objects[key] = bytes(content)


def cut(store: Store, key: str) -> None:
    store.objects[key] = store.objects[key][:-10]


def lose(store: Store, key: str) -> None:
    del store.objects[key]


def refuse(store: Store, key: str) -> None:
    store.on_get = lambda asked, data: 403 if asked == key else data


@pytest.mark.parametrize("damage", [flip, cut, lose, refuse])
def test_s3_damaged_checkpoint_falls_back_to_the_older_one_and_says_so(
    served: tuple[Store, str], damage: Callable[[Store, str], None]
) -> None:
    store, uri = served
    said: list[str] = []
    checkpoints = two_checkpoints(uri, said)
    (key,) = (k for k in store.objects if "step-000000000008" in k and k.endswith(".safetensors"))
    damage(store, key)
    state = checkpoints.load_latest()
    assert state is not None and state.progress.step == 4
    assert len(said) == 1 and "step 8 was skipped" in said[0]
    # The run goes on from there, and its own checkpoint of step 8 replaces the damaged one.
    store.on_get = lambda asked, data: data
    assert train(uri, KeepGoing()).progress.step == 12


def test_s3_flaky_uploads_are_tried_again_and_refused_ones_leave_the_older_checkpoint(
    served: tuple[Store, str],
) -> None:
    store, uri = served
    said: list[str] = []
    checkpoints = two_checkpoints(uri, said)
    newest = checkpoints.load_latest()
    assert newest is not None
    failures = iter([503, 503])
    asked: list[str] = []

    def fail_twice(key: str) -> int:
        asked.append(key)
        return next(failures, 200)

    store.on_put = fail_twice
    later = replace(newest, progress=replace(newest.progress, step=9))
    checkpoints.save(later)
    assert checkpoints.steps()[-1] == 9 and len(asked) > len(set(asked))
    # A store that refuses the manifest leaves an unfinished checkpoint, which does not count.
    store.on_put = lambda key: 403 if key.endswith("manifest.json") else 200
    saving = checkpoints.save_async(replace(newest, progress=replace(newest.progress, step=10)))
    assert saving is not None and saving.result() is False
    checkpoints.close()
    assert "step 10 was not written" in said[0]
    state = checkpoints.load_latest()
    assert state is not None and state.progress.step == 9
    assert "unfinished" in said[1]


def test_s3_unreachable_store_is_one_line_and_no_fresh_start() -> None:
    uri = "s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    with pytest.raises(ElasticKfacError, match="cannot read") as caught:
        train(uri, KeepGoing())
    assert "\n" not in caught.value.line()


def test_unknown_scheme_is_one_clear_line() -> None:
    with pytest.raises(UsageError, match="cannot open the storage"):
        RunFolder("nfs9://host/run")
