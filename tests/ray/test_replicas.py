"""In-memory replicas in actors on real nodes: kept, fenced, verified, restored."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.ray.nodes import head_node
from elastic_kfac.cluster.run.replicas import (
    Places,
    ReplicaActor,
    ReplicaActors,
    ReplicaInfo,
    ReplicatedStore,
    StoreCallback,
)
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.state import Progress, TrainingState


def _state(step: int) -> TrainingState:
    return TrainingState(Progress(step=step), {"model/w": torch.full((3,), float(step))}, {})


def _info(content: bytes, *, attempt: int = 1, step: int = 1) -> ReplicaInfo:
    return ReplicaInfo(attempt, step, hashlib.sha256(content).hexdigest(), len(content))


def _put(actor: ReplicaActor, content: bytes, *, attempt: int = 1, step: int = 1) -> bool:
    """In two parts, as a state comes in many."""
    parts = [np.frombuffer(part, np.uint8) for part in (content[:2], content[2:])]
    return actor.put(_info(content, attempt=attempt, step=step), parts) is not None


def _held(actor: ReplicaActor, content: bytes) -> bool:
    found = actor.get(_info(content).sha256)
    return found is not None and found.tobytes() == content


def test_replica_actor_keeps_the_newest_two() -> None:
    actor = ReplicaActor()
    contents = [b"one", b"second", b"3", b"the fourth is longer", b"5"]
    for step, content in enumerate(contents, 1):
        assert _put(actor, content, step=step)
        assert [_held(actor, c) for c in contents] == [step - 2 < n <= step for n in range(1, 6)]
        assert [info.step for info in actor.infos(1)] == [n for n in (step - 1, step) if n > 0]


def test_replica_actor_copies_into_memory_it_has() -> None:
    actor = ReplicaActor()
    contents = [bytes([n]) * size for n, size in enumerate((1000, 1010, 1080, 1020, 400, 3000))]
    places = []
    for step, content in enumerate(contents):
        assert _put(actor, content, step=step)
        found = actor.get(_info(content).sha256)
        assert found is not None
        places.append(found.__array_interface__["data"][0])
        assert found.tobytes() == content
    # Neither too small nor more than twice as large as needed.
    assert places[2:4] == places[:2]
    assert places[4] != places[2] and places[5] != places[3]


def test_replica_actor_refuses_damaged_content_and_replaced_groups() -> None:
    actor = ReplicaActor()
    assert actor.put(_info(b"right"), [np.frombuffer(b"wrong", np.uint8)]) is None
    assert actor.infos(1) == []
    assert _put(actor, b"first", attempt=1)
    # The next group has asked: whatever the old one still sends is too late.
    assert len(actor.infos(2)) == 1
    assert not _put(actor, b"late", attempt=1, step=9)
    assert _held(actor, b"first")
    assert _put(actor, b"second", attempt=2)


def test_actors_follows_rank_0_and_keeps_the_old_copy_until_there_is_another() -> None:
    ended: list[str] = []
    actors = ReplicaActors("head", create=lambda node: node, end=ended.append)

    def nodes() -> list[str]:
        return list(actors.places)

    assert nodes() == ["head"]
    assert actors.follow({0: "a", 1: "b"}, {"a", "b"})
    assert nodes() == ["head", "a"]
    assert not actors.follow({}, {"a", "b"})
    # Rank 0 moved; the copy on its old node is not needed once a new actor is there.
    assert actors.follow({0: "b", 1: "a"}, {"a", "b"})
    assert nodes() == ["head", "b"]
    assert actors.follow({0: "b"}, {"a"})
    assert nodes() == ["head"]
    actors.close()
    assert ended == ["a", "b", "head"]


def test_actors_with_rank_0_on_the_head_takes_its_neighbour() -> None:
    actors = ReplicaActors("head", create=lambda node: node)
    actors.follow({0: "head", 1: "b", 2: "c"}, {"head", "b", "c"})
    assert list(actors.places) == ["head", "b"]


@pytest.fixture(scope="module")
def places(session_cluster: LocalCluster) -> Iterator[Places]:
    home = head_node()
    assert home is not None
    actors = ReplicaActors(home)
    actors.follow(
        {0: session_cluster.node_id(session_cluster.nodes[0])},
        {session_cluster.node_id(n) for n in session_cluster.nodes},
    )
    assert len(actors.places) == 2
    yield actors.places
    actors.close()


class _Heard(StoreCallback):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.sources: list[tuple[str, int]] = []

    def on_warning(self, line: str) -> None:
        self.warnings.append(line)

    def on_restore(self, source: str, step: int) -> None:
        self.sources.append((source, step))

    def store(self, folder: Path, places: Places, attempt: int, **options: Any) -> ReplicatedStore:
        options.setdefault("checkpoint_interval_s", 3600.0)
        return ReplicatedStore(
            CheckpointStore(folder),
            lambda: places,
            attempt=attempt,
            callback=self,
            **options,
        )


def test_store_restores_the_newest_of_replicas_and_disk_and_skips_what_is_damaged(
    places: Places, tmp_path: Path
) -> None:
    heard = _Heard()
    store = heard.store(tmp_path, places, 1)
    store.save(_state(5))
    saving = store.save_async(_state(8))
    assert saving is not None
    assert saving.result()
    store.close()
    # Between two checkpoints a snapshot is replicated only.
    assert CheckpointStore(tmp_path).steps() == [5]
    assert heard.store(tmp_path, places, 2).load_latest() == _Same(_state(8))
    assert heard.sources[-1][0].startswith("replica on node ")

    # A newer checkpoint on disk wins over older copies.
    CheckpointStore(tmp_path).save(_state(9))
    assert heard.store(tmp_path, places, 3).load_latest() == _Same(_state(9))
    assert heard.sources[-1] == ("disk", 9)

    # Damaged, it does not; and the replica is newer than the older checkpoint.
    for part in (tmp_path / "checkpoints" / "step-000000000009").glob("*.safetensors"):
        part.write_bytes(b"torn")
    assert heard.store(tmp_path, places, 4).load_latest() == _Same(_state(8))
    assert "step 9 was skipped" in heard.warnings[-1]

    # What a survivor hands over is as good.
    heard.store(tmp_path, places, 4).save_survivor(_state(10))
    assert heard.store(tmp_path, places, 5).load_latest() == _Same(_state(10))
    assert heard.sources[-1][0].startswith("survivor's checkpoint (replica on node ")

    # A copy that names another content than it has is not taken either.
    lie = _info(b"never sent", attempt=6, step=99)
    fakes = {"fake": _Liar(lie), **places}
    assert heard.store(tmp_path, fakes, 6).load_latest() == _Same(_state(10))
    assert any("step 99 was skipped" in line for line in heard.warnings)


def test_store_without_replicas_checkpoints_every_snapshot(
    tmp_path: Path, cluster: LocalCluster
) -> None:
    heard = _Heard()
    home = head_node()
    assert home is not None
    actors = ReplicaActors(home)
    dead = actors.places
    ray.get(dead[home].infos.remote(0))
    actors.close()
    store = heard.store(tmp_path, dead, 1)
    saving = store.save_async(_state(3))
    assert saving is not None
    assert saving.result()
    store.close()
    assert "none of 1 replica actors took the state of step 3" in heard.warnings[0]
    assert heard.store(tmp_path, dead, 2).load_latest() == _Same(_state(3))
    assert heard.sources == [("disk", 3)]
    assert heard.store(tmp_path / "empty", {}, 1).load_latest() is None


class _Same:
    """Equals a state of the same step and bits."""

    def __init__(self, state: TrainingState) -> None:
        self._key = (state.progress, state.sha256())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainingState) and (other.progress, other.sha256()) == self._key

    __hash__ = None  # type: ignore[assignment]


class _Liar:
    """An actor whose replica is not what its info promises."""

    def __init__(self, info: ReplicaInfo) -> None:
        self.infos = _Answer([info])
        self.get = _Answer(np.frombuffer(b"something else", np.uint8))


class _Answer:
    def __init__(self, value: Any) -> None:
        self._value = value

    def remote(self, *arguments: Any) -> Any:
        return ray.put(self._value)
