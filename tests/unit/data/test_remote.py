"""Shard sets on an object store, which can be slow, flaky and lying."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from elastic_kfac.data import SampleStream, ShardSet, join_uri, make_shards, verify_shards
from elastic_kfac.errors import DataError
from support.object_server import Store, s3_server

SMALL = 512 * 64 / 2**20


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Store, str]]:
    """(what the server holds, a root URI on it)."""
    with s3_server(monkeypatch) as (store, uri_of):
        yield store, uri_of("sets/digits")


def test_remote_set_equals_the_local_one(
    server: tuple[Store, str], digits: Path, tmp_path: Path
) -> None:
    store, root = server
    made = make_shards("digits", root, shard_mib=SMALL)
    assert made["out"] == root
    for split in ("train", "test"):
        prefix = f"sets/digits/{split}/"
        held = {k.removeprefix(prefix): v for k, v in store.objects.items() if k.startswith(prefix)}
        held.pop("", None)
        local = {p.name: p.read_bytes() for p in (digits / split).iterdir() if p.name[0] != "."}
        assert {k: v for k, v in held.items() if not k.endswith("/")} == local
    assert verify_shards(root).num_samples == 1797
    local_set = ShardSet.open(digits / "train")
    remote_set = ShardSet.open(join_uri(root, "train"))
    assert remote_set.manifest_sha256 == local_set.manifest_sha256
    with (
        SampleStream(local_set, seed=1, cache_dir=str(tmp_path / "a")) as local_stream,
        SampleStream(remote_set, seed=1, cache_dir=str(tmp_path / "b")) as remote_stream,
    ):
        expected, found = local_stream.read(0, 0, 1438), remote_stream.read(0, 0, 1438)
    assert np.array_equal(expected.inputs, found.inputs)
    assert np.array_equal(expected.ids, found.ids)
    assert not list((tmp_path / "b").glob("*.parquet*"))


def test_remote_large_shard_is_uploaded_in_parts(
    server: tuple[Store, str], tmp_path: Path, write_parquet: Callable[..., Path]
) -> None:
    store, root = server
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, 64 * 64, dtype=np.uint8).tobytes() for _ in range(3500)]
    source = write_parquet(images, [i % 3 for i in range(3500)], raw=True)
    make_shards(f"parquet:{source}", root)
    shards = ShardSet.open(join_uri(root, "train"))
    assert shards.num_bytes > 10 << 20 and store.uploads == {}
    assert store.counts["POST"] >= 2
    assert verify_shards(root).num_samples == 3500


def test_remote_make_interrupted_continues(server: tuple[Store, str], digits: Path) -> None:
    store, root = server

    def stop(split: str, done: int, total: int) -> None:
        if done > 512:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shards("digits", root, "train", shard_mib=SMALL, progress=stop)
    assert "sets/digits/train/manifest.json" not in store.objects
    with pytest.raises(DataError, match="unfinished"):
        ShardSet.open(join_uri(root, "train"))
    made = make_shards("digits", root, "train", shard_mib=SMALL)["splits"]["train"]
    assert (made["made"], made["reused"]) == (1, 2)
    local = (digits / "train" / "manifest.json").read_bytes()
    assert store.objects["sets/digits/train/manifest.json"] == local
    assert not any("/making/shard" in key for key in store.objects)


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_remote_damaged_download_is_fetched_again(
    server: tuple[Store, str], tmp_path: Path, damage: str
) -> None:
    store, root = server
    make_shards("digits", root, "train")
    times: Counter[str] = Counter()

    def lie_twice(key: str, data: bytes) -> bytes:
        times[key] += key.endswith(".parquet")
        if not 0 < times[key] <= 2:
            return data
        return bytes([data[0] ^ 1]) + data[1:] if damage == "flip" else data[:-100] + bytes(100)

    store.on_get = lie_twice
    shards = ShardSet.open(join_uri(root, "train"))
    with SampleStream(shards, seed=0, cache_dir=str(tmp_path)) as stream:
        assert int(stream.read(0, 0, 1438).weights.sum()) == 1438
    assert times["sets/digits/train/shard-00000.parquet"] == 3


def test_remote_always_damaged_names_the_shard(server: tuple[Store, str], tmp_path: Path) -> None:
    store, root = server
    make_shards("digits", root, "train")
    shards = ShardSet.open(join_uri(root, "train"))
    store.on_get = lambda key, data: (
        bytes([data[0] ^ 1]) + data[1:] if key.endswith(".parquet") else data
    )
    with (
        SampleStream(shards, seed=0, cache_dir=str(tmp_path)) as stream,
        pytest.raises(DataError, match=r"corrupt shard.*shard-00000.*sha256"),
    ):
        stream.read(0, 0, 10)
    with pytest.raises(DataError, match=r"corrupt shard.*shard-00000.*sha256"):
        verify_shards(root)
    assert not list(tmp_path.glob("*.arrow")) and not list(tmp_path.glob(".*tmp"))


def test_remote_refusing_for_a_while_is_asked_again(
    server: tuple[Store, str], tmp_path: Path
) -> None:
    store, root = server
    make_shards("digits", root, "train")
    shards = ShardSet.open(join_uri(root, "train"))
    refusals = iter([403, 403])
    store.on_get = lambda key, data: next(refusals, data)
    with SampleStream(shards, seed=0, cache_dir=str(tmp_path)) as stream:
        assert len(stream.read(0, 0, 100).ids) == 100
    assert next(refusals, None) is None


def test_remote_missing_shard_raises_at_once(server: tuple[Store, str], tmp_path: Path) -> None:
    store, root = server
    make_shards("digits", root, "train")
    shards = ShardSet.open(join_uri(root, "train"))
    del store.objects["sets/digits/train/shard-00000.parquet"]
    with (
        SampleStream(shards, seed=0, cache_dir=str(tmp_path), bad_records="skip") as stream,
        pytest.raises(DataError, match=r"missing.*shard-00000"),
    ):
        stream.read(0, 0, 1)


def test_remote_slow_store_gives_the_same_samples(
    server: tuple[Store, str], digits: Path, tmp_path: Path
) -> None:
    store, root = server
    make_shards("digits", root, "train", shard_mib=SMALL)
    shards = ShardSet.open(join_uri(root, "train"))
    store.delay_s = 0.1
    with SampleStream(shards, seed=0, cache_dir=str(tmp_path)) as stream:
        stream.prefetch(0, 0, 50)
        slow = stream.read(0, 0, 50)
        requests = store.counts.total()
        stream.read(0, 50, 1388)
        assert store.counts.total() == requests  # Everything is here by now.
    with SampleStream(
        ShardSet.open(digits / "train"), seed=0, cache_dir=str(tmp_path / "local")
    ) as stream:
        assert np.array_equal(stream.read(0, 0, 50).inputs, slow.inputs)


def test_remote_block_order_fetches_the_next_block_ahead(
    server: tuple[Store, str], tmp_path: Path
) -> None:
    store, root = server
    make_shards("digits", root, "train", shard_mib=SMALL / 2)
    shards = replace(ShardSet.open(join_uri(root, "train")), shuffle_window=256)
    order = shards.order(0, 0)
    assert len(order.upcoming_shards(0)) == 2 < len(shards.shards)
    with SampleStream(shards, seed=0, cache_dir=str(tmp_path)) as stream:
        stream.read(0, 0, 10)
        expected = {shards.shards[i].sha256 for i in order.upcoming_shards(0)}
        deadline = time.monotonic() + 20
        while {p.stem for p in tmp_path.glob("*.arrow")} != expected:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        gets = store.counts["GET"]
        following = stream.read(0, 256, 10)
        assert set(following.ids.tolist()) == set(order.ids(256, 10).tolist())
    assert store.counts["GET"] <= gets + 2  # The block after: read ahead in its turn.


def test_remote_unreachable_store_raises_one_line() -> None:
    uri = "s3://bucket/x?endpoint_override=127.0.0.1:9&scheme=http&region=us-east-1"
    with pytest.raises(DataError, match=r"cannot read"):
        ShardSet.open(uri)


def test_file_uri_is_the_local_folder(digits: Path) -> None:
    opened = ShardSet.open(f"file://{digits}/train")
    assert opened.num_samples == 1438 and opened.storage.is_local
    assert verify_shards(f"file://{digits}").num_samples == 1797
