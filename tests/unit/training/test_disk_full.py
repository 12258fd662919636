"""A disk that is really full: what was safe stays safe, and the next smaller write works again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from elastic_kfac.data import ShardSet, make_shards
from elastic_kfac.errors import ElasticKfacError
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.ledger import Ledger
from elastic_kfac.state.state import Progress, TrainingState
from support.small_disk import small_disk


def state_of(step: int, kibibytes: int) -> TrainingState:
    weights = {"model/weight": torch.full((kibibytes, 256), float(step))}
    progress = Progress(step=step)
    return TrainingState(
        progress, weights, {}, Ledger().value(), seed=0, data_sha256="d", config={}
    )


def test_checkpoint_on_a_full_disk_is_refused_and_the_older_one_stays(tmp_path: Path) -> None:
    said: list[str] = []
    with small_disk(tmp_path / "disk", 128) as disk:
        store = CheckpointStore(disk, on_warning=said.append)
        store.save(state_of(1, 8))
        with pytest.raises(OSError, match=r"No space left|File too large"):
            store.save(state_of(2, 512))
        saving = store.save_async(state_of(3, 512))
        assert saving is not None and saving.result() is False
        assert "step 3 was not written" in said[0]
        assert store.steps() == [1]
        assert [path for path in disk.rglob("*") if path.name.endswith(".tmp")] == []
        newest = store.load_latest()
        assert newest is not None and newest.progress.step == 1
        store.save(state_of(4, 8))
        assert store.steps() == [1, 4]
        store.close()


def test_shards_on_a_full_disk_are_refused_in_one_line_and_never_look_whole(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 48) as disk:
        with pytest.raises(ElasticKfacError, match=r"No space left|File too large") as caught:
            make_shards("digits", disk / "digits", "train")
        assert "\n" not in caught.value.line()
        with pytest.raises(ElasticKfacError):
            ShardSet.open(disk / "digits" / "train")
