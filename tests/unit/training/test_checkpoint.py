"""Checkpoints: exact round trips, retention, and every kind of damage to the newest one."""

from __future__ import annotations

import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from elastic_kfac.errors import StateError
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.ledger import Ledger
from elastic_kfac.state.state import Progress, TrainingState, join_tree, split_tree, tensors_sha256


def make_state(step: int, *, ledger: Ledger | None = None) -> TrainingState:
    tensors: dict[str, torch.Tensor] = {
        "model/weight": torch.full((3, 2), float(step), dtype=torch.float64),
        "model/half": torch.tensor([1.5, -2.0], dtype=torch.bfloat16),
        "model/batches": torch.tensor(step),
    }
    tree = {"a": (1, None, torch.arange(3.0)), "layers": [{"k": 2.5, "name": "x"}], "on": True}
    skeleton = {"kfac": split_tree(tree, "kfac", tensors)}
    ledger = ledger or Ledger()
    return TrainingState(
        Progress(step=step, epoch=1, consumed=7, best_value=0.5),
        tensors,
        skeleton,
        ledger.value(),
        seed=3,
        data_sha256="d",
        config={"train": {"seed": 3}},
    )


def append_row(ledger: Ledger, step: int) -> None:
    ledger.append(
        step=step,
        epoch=0,
        first_position=4 * (step - 1),
        num_samples=4,
        world_size=2,
        id_hash=2**64 - step,
    )


def newest_file(root: Path, step: int, suffix: str) -> Path:
    (found,) = (root / f"checkpoints/step-{step:012d}").glob(f"state-*.{suffix}")
    return found


def test_round_trip_of_everything_is_exact(tmp_path: Path) -> None:
    ledger = Ledger()
    append_row(ledger, 1)
    state = make_state(1, ledger=ledger)
    CheckpointStore(tmp_path).save(state)
    loaded = CheckpointStore(tmp_path).load_latest()
    assert loaded is not None
    assert loaded.sha256() == state.sha256()
    assert loaded.progress == state.progress
    assert (loaded.seed, loaded.data_sha256, loaded.config) == (3, "d", {"train": {"seed": 3}})
    part = loaded.part("kfac")
    assert part["a"][:2] == (1, None)
    assert torch.equal(part["a"][2], torch.arange(3.0))
    assert part["layers"] == [{"k": 2.5, "name": "x"}]
    assert np.array_equal(loaded.ledger.tail, state.ledger.tail)
    assert int(loaded.ledger.tail["id_hash"][0]) == 2**64 - 1
    assert loaded.ledger.world_sizes == (2,)


def test_bytes_for_a_peer_carry_unwritten_segments(tmp_path: Path) -> None:
    ledger = Ledger()
    for step in (1, 2, 3):
        append_row(ledger, step)
    ledger.seal(minimum_rows=2)
    append_row(ledger, 4)
    state = TrainingState.from_bytes(make_state(4, ledger=ledger).to_bytes())
    CheckpointStore(tmp_path).save(state)
    loaded = CheckpointStore(tmp_path).load_latest()
    assert loaded is not None
    rows = loaded.ledger.rows(CheckpointStore(tmp_path).storage)
    assert rows["step"].tolist() == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(3),
        torch.empty(0, 4, dtype=torch.float64),
        torch.tensor([True, False, True]),
        torch.tensor([[1.5], [-2.0], [float("nan")]], dtype=torch.bfloat16),
        torch.tensor([1 + 2j, -3j]),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(12, dtype=torch.uint8)[1::3],
    ],
    ids=lambda tensor: f"{str(tensor.dtype).removeprefix('torch.')}-{tuple(tensor.shape)}",
)
def test_bytes_for_a_peer_bring_back_every_kind_of_tensor(tensor: torch.Tensor) -> None:
    # The odd byte puts whatever follows at an address that its type would not choose.
    state = replace(
        make_state(1), tensors={"a": torch.zeros(1, dtype=torch.bool), "b": tensor, "c": tensor}
    )
    content = bytes(state.to_bytes())
    back = TrainingState.from_bytes(content)
    assert list(back.tensors) == ["a", "b", "c"]
    assert (back.tensors["b"].dtype, back.tensors["b"].shape) == (tensor.dtype, tensor.shape)
    assert back.sha256() == state.sha256()
    assert back.to_bytes() == content
    for name in ("b", "c"):
        back.tensors[name].zero_()
    assert bytes(state.to_bytes()) == content


def test_damaged_bytes_for_a_peer_are_refused() -> None:
    ledger = Ledger()
    append_row(ledger, 1)
    content = bytes(make_state(1, ledger=ledger).to_bytes())
    head = int.from_bytes(content[:8], "little")
    damaged = [
        content[:4],
        content[: 8 + head // 2],
        content[: 8 + head + 5],
        content[:-1],
        content + b"x",
        content.replace(b"float64", b"float65"),
        content.replace(b"float64", b"compile"),
        content.replace(b'"tensors"', b'"sensors"'),
    ]
    for bytes_ in damaged:
        assert bytes_ != content
        with pytest.raises(StateError, match="a training state cannot be read"):
            TrainingState.from_bytes(bytes_)


def test_state_hash_of_one_flipped_bit_differs() -> None:
    tensors = {"model/w": torch.ones(4)}
    flipped = {"model/w": torch.ones(4)}
    flipped["model/w"].view(torch.int32)[2] ^= 1
    assert tensors_sha256(tensors) != tensors_sha256(flipped)
    assert tensors_sha256(tensors) != tensors_sha256({"model/v": torch.ones(4)})


def test_tree_with_an_object_is_refused() -> None:
    with pytest.raises(StateError, match="kfac/x"):
        split_tree({"x": object()}, "kfac", {})


def test_tree_with_keys_that_are_not_text_survives() -> None:
    tensors: dict[str, torch.Tensor] = {}
    skeleton = split_tree({1: torch.ones(2), (0, 1): "pair"}, "t", tensors)
    back = join_tree(json.loads(json.dumps(skeleton)), tensors)
    assert back[(0, 1)] == "pair"
    assert torch.equal(back[1], torch.ones(2))


def test_retention_keeps_the_newest(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    for step in (1, 2, 3, 4):
        store.save(make_state(step))
    assert store.steps() == [3, 4]
    assert len(list((tmp_path / "checkpoints").iterdir())) == 2


def test_no_checkpoint_gives_none(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path / "new").load_latest() is None


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-3])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
@pytest.mark.parametrize("damage", [_truncate, _flip, Path.unlink])
def test_damaged_newest_falls_back_to_the_older_one_and_says_so(
    tmp_path: Path, suffix: str, damage: Any
) -> None:
    warnings: list[str] = []
    store = CheckpointStore(tmp_path, on_warning=warnings.append)
    store.save(make_state(10))
    store.save(make_state(20))
    damage(newest_file(tmp_path, 20, suffix))
    state = store.load_latest()
    assert state is not None and state.progress.step == 10
    assert len(warnings) == 1 and "step 20" in warnings[0]


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"version": 1, "files": {}}'])
def test_torn_manifest_falls_back(tmp_path: Path, content: bytes) -> None:
    warnings: list[str] = []
    store = CheckpointStore(tmp_path, on_warning=warnings.append)
    store.save(make_state(10))
    store.save(make_state(20))
    (tmp_path / "checkpoints/step-000000000020/manifest.json").write_bytes(content)
    state = store.load_latest()
    assert state is not None and state.progress.step == 10
    assert "manifest" in warnings[0]


def test_missing_manifest_means_unfinished(tmp_path: Path) -> None:
    warnings: list[str] = []
    store = CheckpointStore(tmp_path, on_warning=warnings.append)
    store.save(make_state(10))
    store.save(make_state(20))
    (tmp_path / "checkpoints/step-000000000020/manifest.json").unlink()
    state = store.load_latest()
    assert state is not None and state.progress.step == 10
    assert "unfinished" in warnings[0]


def test_all_damaged_refuses_to_start_afresh(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(make_state(10))
    _flip(newest_file(tmp_path, 10, "safetensors"))
    with pytest.raises(StateError, match="none of 1 checkpoints"):
        store.load_latest()


def test_newer_format_is_refused_even_with_an_older_checkpoint(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(make_state(10))
    store.save(make_state(20))
    path = tmp_path / "checkpoints/step-000000000020/manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "version": 99}))
    with pytest.raises(StateError, match="newer elastic-kfac"):
        store.load_latest()


def test_damaged_ledger_segment_fails_the_checkpoints_that_name_it(tmp_path: Path) -> None:
    ledger = Ledger()
    append_row(ledger, 1)
    store = CheckpointStore(tmp_path)
    store.save(make_state(1, ledger=ledger))
    append_row(ledger, 2)
    ledger.seal(minimum_rows=1)
    store.save(make_state(2, ledger=ledger))
    (segment,) = (tmp_path / "ledger").iterdir()
    _flip(segment)
    state = store.load_latest()
    assert state is not None and state.progress.step == 1


def test_save_async_while_one_is_written_is_skipped_and_does_not_see_later_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path)
    gate = threading.Event()
    write = store.storage.write

    def slow_write(name: str, content: bytes) -> None:
        gate.wait(10)
        write(name, content)

    monkeypatch.setattr(store.storage, "write", slow_write)
    first = store.save_async(make_state(1))
    assert first is not None
    assert store.save_async(make_state(2)) is None
    gate.set()
    assert first.result() is True
    store.close()
    assert store.steps() == [1]


def test_disk_full_in_the_background_is_a_warning_and_the_older_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warnings: list[str] = []
    store = CheckpointStore(tmp_path, on_warning=warnings.append)
    store.save(make_state(1))

    def full(name: str, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(store.storage, "write", full)
        future = store.save_async(make_state(2))
        assert future is not None and future.result() is False
        with pytest.raises(OSError, match="No space left"):
            store.save(make_state(3))
    assert "No space left" in warnings[0]
    state = store.load_latest()
    assert state is not None and state.progress.step == 1
    store.close()


def test_same_step_saved_twice_reads_back_the_second(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(make_state(5))
    changed = replace(make_state(5), seed=9)
    store.save(changed)
    state = store.load_latest()
    assert state is not None and state.seed == 9
