"""Shards made by the nodes of a cluster: the same bytes, also when a node is lost meanwhile."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import ray

from elastic_kfac.cluster.ray.connection import quiet_driver
from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.sharding import run_shard_tasks, shard_tasks_on
from elastic_kfac.data import ShardSet, make_shards, verify_shards
from elastic_kfac.errors import DataError, UsageError
from support.object_server import Store, s3_server

SMALL = 128 * 64 / 2**20
"""Shards of 128 digits: 12 of the training split."""

# Ray 2.60 calls deprecated parts of itself; everything else stays an error.
pytestmark = [
    pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*"),
    pytest.mark.filterwarnings(r"ignore::FutureWarning:ray\..*"),
]


@pytest.fixture(scope="module")
def bucket() -> Iterator[tuple[Store, Callable[[str], str]]]:
    """An object store that the nodes know the keys of, and the URIs of its folders."""
    with pytest.MonkeyPatch.context() as patch, s3_server(patch) as served:
        yield served


@pytest.fixture(scope="module")
def cluster(bucket: tuple[Store, Callable[[str], str]]) -> Iterator[LocalCluster]:
    with quiet_driver(), LocalCluster(2) as started:
        started.connect()
        yield started


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".lock"}


def test_make_on_nodes_equals_alone_and_survives_a_lost_node(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    make_shards("digits", tmp_path / "alone", "train", shard_mib=SMALL)
    done: list[int] = []

    def lose_a_node(split: str, samples: int, total: int) -> None:
        done.append(samples)
        if len(done) == 3:
            cluster.remove_node(cluster.nodes[-1])

    with shard_tasks_on("auto") as run_tasks:
        made = make_shards(
            "digits",
            tmp_path / "cluster",
            "train",
            shard_mib=SMALL,
            progress=lose_a_node,
            run_tasks=run_tasks,
        )
    assert len(cluster.nodes) == 1 and len(done) == 13 and done[-1] == 1438
    assert made["splits"]["train"]["made"] == 12
    assert content(tmp_path / "cluster" / "train") == content(tmp_path / "alone" / "train")
    verify_shards(tmp_path / "cluster")
    cluster.add_node()


@pytest.mark.soak
def test_make_on_nodes_to_an_object_store_gives_the_bytes_of_one_process(
    cluster: LocalCluster, bucket: tuple[Store, Callable[[str], str]], tmp_path: Path
) -> None:
    store, uri_of = bucket
    make_shards("digits", tmp_path, "train", shard_mib=SMALL)
    refused: list[str] = []

    def refuse_once(key: str) -> int:
        if key.endswith("00004.parquet") and not refused:
            refused.append(key)
            return 503
        return 200

    store.on_put = refuse_once
    with shard_tasks_on("auto") as run_tasks:
        make_shards("digits", uri_of("set"), "train", shard_mib=SMALL, run_tasks=run_tasks)
    held = {key.removeprefix("set/train/"): data for key, data in store.objects.items() if data}
    assert held == content(tmp_path / "train") and len(held) == 14 and len(refused) == 1
    assert verify_shards(uri_of("set")).num_samples == 1438


def test_make_on_nodes_continues_what_was_begun_alone(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    def stop(split: str, samples: int, total: int) -> None:
        if samples >= 512:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shards("digits", tmp_path, "train", shard_mib=SMALL, progress=stop)
    made = make_shards("digits", tmp_path, "train", shard_mib=SMALL, run_tasks=run_shard_tasks)
    assert (made["splits"]["train"]["made"], made["splits"]["train"]["reused"]) == (8, 4)
    verify_shards(tmp_path)


def test_make_on_nodes_relative_paths_are_those_of_the_caller(
    cluster: LocalCluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import io

    from PIL import Image

    monkeypatch.chdir(tmp_path)
    for name in "ab":
        Path("set", name).mkdir(parents=True)
        for i in range(4):
            out = io.BytesIO()
            Image.new("RGB", (8, 8), (i, 0, 0)).save(out, "PNG")
            Path("set", name, f"{i}.png").write_bytes(out.getvalue())
    make_shards("imagefolder:set", "out", shard_mib=200 / 2**20, run_tasks=run_shard_tasks)
    assert len(ShardSet.open("out/train").shards) > 2
    assert verify_shards(tmp_path / "out").num_samples == 8


def test_make_on_nodes_bad_record_is_the_one_line_of_the_task(
    cluster: LocalCluster, tmp_path: Path
) -> None:
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    (folder / "bad.jpg").write_bytes(b"\xff\xd8 not a photo")
    with pytest.raises(DataError, match=r"undecodable image at record 0.*a/bad\.jpg") as caught:
        make_shards(f"imagefolder:{tmp_path / 'set'}", tmp_path, run_tasks=run_shard_tasks)
    assert "\n" not in caught.value.line()
    assert not (tmp_path / "train" / "manifest.json").exists()


@pytest.mark.parametrize("address", ["127.0.0.1:1", "no-such-host.invalid:6379"])
def test_shard_tasks_on_address_without_cluster_raises(
    monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with (
        pytest.raises(UsageError, match=f"cannot connect to a Ray cluster.*--address {address}"),
        shard_tasks_on(address),
    ):
        raise AssertionError("connected")
