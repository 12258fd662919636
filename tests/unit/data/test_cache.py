"""The node's cache: bounded, verified, shared by processes, survives what dies."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from elastic_kfac.data import ShardSet, make_shards
from elastic_kfac.data.cache import ShardCache, default_cache_folder
from elastic_kfac.errors import DataError


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Twelve shards of about 1 MiB: 32x32 grey noise."""
    import pyarrow as pa

    folder = tmp_path_factory.mktemp("many")
    images = np.random.default_rng(0).integers(0, 256, (12 * 1024, 1024), dtype=np.uint8)
    column = pa.array([row.tobytes() for row in images], pa.binary(1024))
    pq.write_table(
        pa.table({"image": column, "label": np.arange(len(images)) % 10}),
        folder / "noise_train.parquet",
    )
    make_shards(f"parquet:{folder}", folder / "out", shard_mib=1)
    shards = ShardSet.open(folder / "out" / "train")
    assert len(shards.shards) == 12
    return shards


def held_bytes(folder: Path) -> int:
    return sum(p.stat().st_size for p in folder.iterdir() if p.suffix in (".arrow", ".tmp"))


def test_open_set_larger_than_cache_stays_below_the_bound(many: ShardSet, tmp_path: Path) -> None:
    limit = 6 * 2**20
    cache = ShardCache(tmp_path, limit)
    plain = [pq.read_table(Path(many.uri) / s.file).column("label").to_numpy() for s in many.shards]
    for index in [*range(12), *range(12)]:
        assert np.array_equal(cache.open(many, index).values["label"], plain[index])
        cache.close()
        assert held_bytes(tmp_path) <= limit
    assert 2 <= len(list(tmp_path.glob("*.arrow"))) <= 5


def test_open_evicts_the_least_recently_used(many: ShardSet, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 7 * 2**20)
    for index in (0, 1, 2, 3):
        cache.open(many, index)
        os.utime(tmp_path / f"{many.shards[index].sha256}.arrow", (index, index))
    cache.close()
    cache.open(many, 0)  # Used again: no longer the oldest.
    cache.open(many, 4)
    present = {i for i in range(5) if (tmp_path / f"{many.shards[i].sha256}.arrow").exists()}
    assert 0 in present and 4 in present and 1 not in present


def test_open_evicted_while_mapped_stays_readable(many: ShardSet, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 6 * 2**20)
    first = cache.open(many, 0)
    assert first.values["image"] is not None
    before = first.values["image"].copy()
    for index in range(1, 12):
        cache.open(many, index)
    assert not (tmp_path / f"{many.shards[0].sha256}.arrow").exists()
    assert np.array_equal(first.values["image"], before)


def test_open_damaged_cache_file_is_made_again(many: ShardSet, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2**30)
    labels = cache.open(many, 0).values["label"].copy()
    cache.close()
    path = tmp_path / f"{many.shards[0].sha256}.arrow"
    path.write_bytes(path.read_bytes()[:5000])
    assert np.array_equal(cache.open(many, 0).values["label"], labels)


def test_open_unwritable_folder_raises_one_line(many: ShardSet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot write the shard cache.*data\.cache_dir"):
        ShardCache(tmp_path / "file" / "cache", 2**30)


def test_open_disk_full_raises_one_line_and_leaves_nothing(
    many: ShardSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import errno

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = ShardCache(tmp_path, 2**30)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DataError, match="No space left on device"):
        cache.open(many, 0)
    assert held_bytes(tmp_path) == 0


def start(script: str, *arguments: object) -> subprocess.Popen[str]:
    """A fresh interpreter: forking a process that has threads is what cannot be trusted."""
    package = Path(__file__).parents[3] / "platform"
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        text=True,
    )


READ_EVERYTHING = """
import sys
from dataclasses import replace
import numpy as np
from elastic_kfac.data import SampleStream, ShardSet
uri, folder, seed = sys.argv[1:]
shards = replace(ShardSet.open(uri), shuffle_window=1024)
with SampleStream(shards, seed=int(seed), cache_dir=folder, cache_gib=6 / 1024) as stream:
    count = stream.num_samples
    total = 0
    for first in range(0, count, 1024):
        batch = stream.read(0, first, min(1024, count - first))
        total += int((batch.targets.numpy() * batch.ids.astype(np.int64)).sum())
print(total)
"""


def test_open_by_several_processes_in_a_small_cache_reads_right(
    many: ShardSet, tmp_path: Path
) -> None:
    processes = [start(READ_EVERYTHING, many.uri, tmp_path, seed) for seed in range(3)]
    sums = [int(process.communicate(timeout=120)[0]) for process in processes]
    ids = np.arange(12 * 1024)
    assert sums == [int((ids % 10 * ids).sum())] * 3
    assert held_bytes(tmp_path) <= 6 * 2**20


DIE_WHILE_BUILDING = """
import os, signal, sys
from elastic_kfac.data import ShardSet
from elastic_kfac.data.cache import ShardCache
os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
ShardCache(sys.argv[2], 2**30).open(ShardSet.open(sys.argv[1]), 0)
"""


@pytest.mark.parametrize("following", [0, 1])
def test_open_after_a_killed_builder_reads_right_and_tidies(
    many: ShardSet, tmp_path: Path, following: int
) -> None:
    process = start(DIE_WHILE_BUILDING, many.uri, tmp_path)
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*.tmp"))) == 1
    assert list(tmp_path.glob("*.arrow")) == []
    opened = ShardCache(tmp_path, 2**30).open(many, following)
    assert opened.num_rows == 1024
    assert list(tmp_path.glob(".*.tmp")) == []


def test_fetch_makes_the_file_without_holding_it(many: ShardSet, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path, 2**30)
    cache.fetch(many, 3)
    assert (tmp_path / f"{many.shards[3].sha256}.arrow").exists()
    held = [str(p.readlink()) for p in Path("/proc/self/fd").iterdir() if p.is_symlink()]
    assert not any(str(tmp_path) in link for link in held)


def test_default_folder_follows_the_users_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "elastic-kfac" / "shards"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / ".cache" / "elastic-kfac" / "shards"


def test_user_without_a_home_gets_a_temporary_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    import pwd

    def unknown(uid: int) -> None:
        raise KeyError(uid)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    folder = default_cache_folder()
    assert folder.is_absolute() and f"elastic-kfac-{os.getuid()}" in str(folder)
