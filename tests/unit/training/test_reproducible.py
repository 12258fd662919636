"""The reproducible mode in one process: what it refuses, and what its passes look like."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.summation_tree import shard_range, shards_of_ranks
from elastic_kfac.data.dataset import Datasets
from elastic_kfac.errors import StateError
from elastic_kfac.training.rank import RankTrainer
from elastic_kfac.training.sync import reproducible
from elastic_kfac.training.sync.reproducible import (
    CanonicalTree,
    check_conditions,
    conditions,
)
from support import reproducible_problems
from support.reproducible_problems import dropout_net, reproducible_config
from support.training_problems import MemoryDataset, small_config

# The problem's decompositions fall between factor updates on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:inverse_update_steps=5 is no multiple")


def trainer(
    changes: dict[str, Any] | None = None, shape: tuple[int, int, int] = (1, 4, 4)
) -> RankTrainer:
    datasets = Datasets(MemoryDataset(50, shape=shape), None)
    return RankTrainer(reproducible_config(changes), Communicator.solo(), datasets)


def test_config_with_a_micro_batch_of_a_whole_shard_is_accepted() -> None:
    assert reproducible_config({"train.micro_batch_size": 3}).train.micro_batch_size == 3


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("logical_shards", 16, "elastic.logical_shards"),
        ("threads", 64, "number of threads"),
        ("memory_format", "channels_last", "memory format"),
        ("machine", "another processor", "machine type"),
        ("torch", "1.0", "torch build"),
    ],
)
def test_checkpoint_of_other_conditions_is_refused_with_the_reason(
    key: str, value: Any, said: str
) -> None:
    own = conditions(nn.Conv2d(3, 4, 3), torch.device("cpu"), 8)
    check_conditions(own, own)
    with pytest.raises(StateError, match=r"elastic\.reproducible") as caught:
        check_conditions({**own, key: value}, own)
    assert said in caught.value.line() and str(value) in caught.value.line()


def channels_last_net(*shape: Any, **arguments: Any) -> nn.Module:
    """The usual network with another memory format."""
    return dropout_net(*shape, **arguments).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


@pytest.mark.parametrize("condition", ["threads", "logical_shards", "memory_format", "machine"])
def test_restore_under_another_condition_is_refused_and_under_the_same_is_not(
    condition: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape, threads = (3, 4, 4), torch.get_num_threads()
    first = trainer(shape=shape)
    first.step()
    state = first.capture()
    trainer(shape=shape).restore(state)
    changes: dict[str, Any] = {}
    if condition == "logical_shards":
        changes["elastic.logical_shards"] = 16
    elif condition == "memory_format":
        monkeypatch.setattr(reproducible_problems, "dropout_net", channels_last_net)
    elif condition == "machine":
        monkeypatch.setattr(reproducible, "machine_type", lambda device: "another processor")
    else:
        torch.set_num_threads(threads + 1)
    try:
        other = trainer(changes, shape)
        with pytest.raises(StateError, match=r"elastic\.reproducible: the .* is not the one of"):
            other.restore(state)
    finally:
        torch.set_num_threads(threads)


def test_memory_format_is_part_of_the_conditions() -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    assert conditions(model, torch.device("cpu"), 8)["memory_format"] == "channels_last"


def test_checkpoint_of_the_ordinary_mode_is_refused_and_the_reverse_is_not() -> None:
    first = trainer()
    first.step()
    ordinary = RankTrainer(
        small_config({"model.name": "support.reproducible_problems:dropout_net"}),
        Communicator.solo(),
        Datasets(MemoryDataset(50), None),
    )
    with pytest.raises(StateError, match="not written in the reproducible mode"):
        trainer({"kfac.enabled": False}).restore(ordinary.capture())
    ordinary.restore(first.capture())
    assert ordinary.progress.step == 1


def test_step_of_the_reproducible_mode_is_a_step_of_the_same_mathematics() -> None:
    # Without BatchNorm and dropout, cutting a batch into shards changes rounding only.
    changes = {"model.name": "support.training_problems:float64_cnn", "optimizer.momentum": 0.0}
    pair = [trainer({**changes, "elastic.reproducible": mode}) for mode in (True, False)]
    for _ in range(6):
        results = [one.step() for one in pair]
        assert results[0].totals.loss_sum == pytest.approx(results[1].totals.loss_sum, rel=1e-12)
        assert results[0].totals.id_hash == results[1].totals.id_hash
    for ours, theirs in zip(pair[0].model.parameters(), pair[1].model.parameters(), strict=True):
        assert torch.allclose(ours, theirs, rtol=0, atol=1e-10)
    factors = [list(one.kfac.factors().values()) for one in pair if one.kfac is not None]
    for ours_by_name, theirs_by_name in zip(*factors, strict=True):
        for name, value in ours_by_name.items():
            assert torch.allclose(value, theirs_by_name[name], rtol=0, atol=1e-10)


def test_inputs_of_every_shard_begin_on_a_cache_line() -> None:
    # Views of a batch of 25-element samples do not, and kernels may round differently there.
    one = trainer(shape=(1, 5, 5))
    offsets: list[int] = []
    shapes: list[int] = []

    def see(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        offsets.append(inputs[0].data_ptr() % 64)
        shapes.append(len(inputs[0]))

    one.model.register_forward_pre_hook(see)
    for _ in range(3):
        one.step()
    assert offsets == [0] * 22
    # The control: without a copy of their own the shards of such a batch do not begin there.
    batch = one.datasets.train.read(0, 0, 22).inputs.float()
    views = [
        batch[begin:].data_ptr() % 64 for begin, _ in (shard_range(22, 8, i) for i in range(8))
    ]
    assert sum(offset != 0 for offset in views) >= 6
    assert shapes == [3, 3, 3, 3, 3, 3, 2, 2] * 2 + [1] * 6


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("count", [22, 6, 1, 8])
def test_slices_of_the_ranks_follow_each_other_without_gap(world_size: int, count: int) -> None:
    tree = CanonicalTree(nn.Linear(2, 2), 8)
    position = 100
    for rank in range(world_size):
        tree.communicator = cast(Any, SimpleNamespace(rank=rank, world_size=world_size))
        tree.vector.ranges = shards_of_ranks(world_size, 8)
        first, size = tree.slice(100, count)
        assert first == position
        position += size
    assert position == 100 + count


def test_evaluation_counts_every_sample_once_in_whole_batches(tmp_path: Path) -> None:
    datasets = Datasets(MemoryDataset(50), MemoryDataset(20))
    config = reproducible_config({"train.eval_batch_size": 8})
    assert RankTrainer(config, Communicator.solo(), datasets).evaluate().count == 20
