"""Copies of the state in actors on real nodes: kept, fenced, verified, found again."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch

from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.run.vault import Note, Vault, VaultKeeper, VaultPlace, head_node
from elastic_kfac.cluster.run.vault_store import VaultStore
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.state import Progress, TrainingState


def _state(step: int) -> TrainingState:
    return TrainingState(Progress(step=step), {"model/w": torch.full((3,), float(step))}, {})


def _note(content: bytes, *, attempt: int = 1, step: int = 1) -> Note:
    return Note(attempt, step, hashlib.sha256(content).hexdigest(), len(content))


def _put(vault: Vault, content: bytes, *, attempt: int = 1, step: int = 1) -> bool:
    """In two parts, as a state comes in many."""
    parts = [np.frombuffer(part, np.uint8) for part in (content[:2], content[2:])]
    return vault.put(_note(content, attempt=attempt, step=step), parts) is not None


def _held(vault: Vault, content: bytes) -> bool:
    found = vault.get(_note(content).sha256)
    return found is not None and found.tobytes() == content


def test_vault_keeps_the_newest_two() -> None:
    vault = Vault()
    contents = [b"one", b"second", b"3", b"the fourth is longer", b"5"]
    for step, content in enumerate(contents, 1):
        assert _put(vault, content, step=step)
        assert [_held(vault, c) for c in contents] == [step - 2 < n <= step for n in range(1, 6)]
        assert [note.step for note in vault.notes(1)] == [n for n in (step - 1, step) if n > 0]


def test_vault_copies_into_memory_it_has() -> None:
    vault = Vault()
    contents = [bytes([n]) * size for n, size in enumerate((1000, 1010, 1080, 1020, 400, 3000))]
    places = []
    for step, content in enumerate(contents):
        assert _put(vault, content, step=step)
        found = vault.get(_note(content).sha256)
        assert found is not None
        places.append(found.__array_interface__["data"][0])
        assert found.tobytes() == content
    # Neither too small nor more than twice as large as needed.
    assert places[2:4] == places[:2]
    assert places[4] != places[2] and places[5] != places[3]


def test_vault_refuses_damaged_content_and_replaced_groups() -> None:
    vault = Vault()
    assert vault.put(_note(b"right"), [np.frombuffer(b"wrong", np.uint8)]) is None
    assert vault.notes(1) == []
    assert _put(vault, b"first", attempt=1)
    # The next group has asked: whatever the old one still sends is too late.
    assert len(vault.notes(2)) == 1
    assert not _put(vault, b"late", attempt=1, step=9)
    assert _held(vault, b"first")
    assert _put(vault, b"second", attempt=2)


def test_keeper_follows_rank_0_and_keeps_the_old_copy_until_there_is_another() -> None:
    ended: list[str] = []
    keeper = VaultKeeper("head", create=lambda node: node, end=ended.append)

    def nodes() -> list[str]:
        return [place.node_id for place in keeper.places]

    assert nodes() == ["head"]
    assert keeper.follow({0: "a", 1: "b"}, {"a", "b"})
    assert nodes() == ["head", "a"]
    assert not keeper.follow({}, {"a", "b"})
    # Rank 0 moved; the copy on its old node is not needed once a new vault is there.
    assert keeper.follow({0: "b", 1: "a"}, {"a", "b"})
    assert nodes() == ["head", "b"]
    assert keeper.follow({0: "b"}, {"a"})
    assert nodes() == ["head"]
    keeper.close()
    assert ended == ["a", "b", "head"]


def test_keeper_with_rank_0_on_the_head_takes_its_neighbour() -> None:
    keeper = VaultKeeper("head", create=lambda node: node)
    keeper.follow({0: "head", 1: "b", 2: "c"}, {"head", "b", "c"})
    assert [place.node_id for place in keeper.places] == ["head", "b"]


@pytest.fixture(scope="module")
def places(session_cluster: LocalCluster) -> Iterator[Sequence[VaultPlace]]:
    home = head_node()
    assert home is not None
    keeper = VaultKeeper(home)
    keeper.follow(
        {0: session_cluster.node_id(session_cluster.nodes[0])},
        {session_cluster.node_id(n) for n in session_cluster.nodes},
    )
    assert len(keeper.places) == 2
    yield keeper.places
    keeper.close()


class _Heard:
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.sources: list[tuple[str, int]] = []

    def store(
        self, folder: Path, places: Sequence[VaultPlace], attempt: int, **options: Any
    ) -> VaultStore:
        options.setdefault("checkpoint_interval_s", 3600.0)
        return VaultStore(
            CheckpointStore(folder),
            lambda: places,
            attempt=attempt,
            on_warning=self.warnings.append,
            on_restore=lambda source, step: self.sources.append((source, step)),
            **options,
        )


def test_store_restores_the_newest_of_vaults_and_disk_and_skips_what_is_damaged(
    places: Sequence[VaultPlace], tmp_path: Path
) -> None:
    heard = _Heard()
    store = heard.store(tmp_path, places, 1)
    store.save(_state(5))
    saving = store.save_async(_state(8))
    assert saving is not None
    assert saving.result()
    store.close()
    # Between two checkpoints a snapshot goes to the vaults only.
    assert CheckpointStore(tmp_path).steps() == [5]
    assert heard.store(tmp_path, places, 2).load_latest() == _Same(_state(8))
    assert heard.sources[-1][0].startswith("vault on node ")

    # A newer checkpoint on disk wins over older copies.
    CheckpointStore(tmp_path).save(_state(9))
    assert heard.store(tmp_path, places, 3).load_latest() == _Same(_state(9))
    assert heard.sources[-1] == ("disk", 9)

    # Damaged, it does not; and the vaults' copy is newer than the older checkpoint.
    for part in (tmp_path / "checkpoints" / "step-000000000009").glob("*.safetensors"):
        part.write_bytes(b"torn")
    assert heard.store(tmp_path, places, 4).load_latest() == _Same(_state(8))
    assert "step 9 was skipped" in heard.warnings[-1]

    # What a survivor hands over is as good.
    heard.store(tmp_path, places, 4).rescue(_state(10))
    assert heard.store(tmp_path, places, 5).load_latest() == _Same(_state(10))
    assert heard.sources[-1][0].startswith("a survivor, by way of the vault on node ")

    # A copy that names another content than it has is not taken either.
    lie = _note(b"never sent", attempt=6, step=99)
    fakes = [VaultPlace("fake", _Liar(lie)), *places]
    assert heard.store(tmp_path, fakes, 6).load_latest() == _Same(_state(10))
    assert any("step 99 was skipped" in line for line in heard.warnings)


def test_store_without_vaults_checkpoints_every_snapshot(
    tmp_path: Path, cluster: LocalCluster
) -> None:
    heard = _Heard()
    home = head_node()
    assert home is not None
    keeper = VaultKeeper(home)
    dead = keeper.places
    ray.get(dead[0].vault.notes.remote(0))
    keeper.close()
    store = heard.store(tmp_path, dead, 1)
    saving = store.save_async(_state(3))
    assert saving is not None
    assert saving.result()
    store.close()
    assert "none of 1 vaults took the state of step 3" in heard.warnings[0]
    assert heard.store(tmp_path, dead, 2).load_latest() == _Same(_state(3))
    assert heard.sources == [("disk", 3)]
    assert heard.store(tmp_path / "empty", (), 1).load_latest() is None


class _Same:
    """Equals a state of the same step and bits."""

    def __init__(self, state: TrainingState) -> None:
        self._key = (state.progress, state.sha256())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TrainingState) and (other.progress, other.sha256()) == self._key

    __hash__ = None  # type: ignore[assignment]


class _Liar:
    """A vault whose copy is not what its note says."""

    def __init__(self, note: Note) -> None:
        self.notes = _Answer([note])
        self.get = _Answer(np.frombuffer(b"something else", np.uint8))


class _Answer:
    def __init__(self, value: Any) -> None:
        self._value = value

    def remote(self, *arguments: Any) -> Any:
        return ray.put(self._value)
