"""State in files: saved at four ranks, it goes on at any number of them, in any wrapper."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from huggingface_hub import load_torch_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from elastic_kfac import KFAC, KFACOptimizer
from elastic_kfac.checkpoints import (
    load_distributed,
    load_folder,
    save_distributed,
    save_folder,
)
from elastic_kfac.errors import StateError
from elastic_kfac.kfac.parts import own_parts
from support.gloo import run_ranks

HALF, WHOLE = 3, 6
BATCH = 10
Weights = dict[str, Tensor]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(5, 7), nn.Tanh(), nn.LayerNorm(7), nn.Linear(7, 7), nn.Tanh(), nn.Linear(7, 3)
    ).double()


def made(wrapper: str, **options: Any) -> tuple[nn.Module, KFACOptimizer]:
    model: nn.Module = network()
    if wrapper == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        fully_shard(model[3], mesh=mesh)  # type: ignore[index]
        fully_shard(model, mesh=mesh)
    elif wrapper == "ddp":
        model = DistributedDataParallel(model)
        options = {"grad_worker_frac": 0.5, **options}
    behind = 0.0 if "momentum" in options else 0.9
    inner = torch.optim.SGD(model.parameters(), lr=0.1, momentum=behind)
    return model, KFACOptimizer(
        model, inner, inverse_update_steps=2, factor_update_steps=1, **options
    )


def train(model: nn.Module, optimizer: KFACOptimizer, steps: range) -> None:
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    for step in steps:
        x = torch.randn(BATCH, 5, generator=torch.Generator().manual_seed(step)).double()
        share, scale = x[rank::world_size], world_size / BATCH
        with optimizer.kfac.micro_batch(scale=scale):
            losses = F.cross_entropy(model(share), share[:, :3].argmax(1), reduction="sum")
        (losses * scale).backward()
        optimizer.step()
        optimizer.zero_grad()


def weights(model: nn.Module) -> Weights:
    named = getattr(model, "module", model).named_parameters()
    whole = {n: p.full_tensor() if hasattr(p, "full_tensor") else p for n, p in named}
    return {name: p.detach() for name, p in whole.items()}


@pytest.fixture(scope="module")
def uninterrupted() -> Weights:
    model, optimizer = made("plain")
    train(model, optimizer, range(WHOLE))
    return weights(model)


def assert_equal(found: Weights, right: Weights) -> None:
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


def _saved_by_four(folder: str) -> list[str]:
    model, optimizer = made("fsdp")
    train(model, optimizer, range(HALF))
    save_distributed(folder, model, optimizer)
    return sorted(own_parts(optimizer.kfac)[0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of four ranks."""
    folder = tmp_path_factory.mktemp("four")
    keys = run_ranks(4, _saved_by_four, str(folder))
    alone, optimizer = made("plain")
    train(alone, optimizer, range(HALF))
    every = sorted(own_parts(optimizer.kfac)[0])
    assert sorted(key for part in keys for key in part) == every  # each tensor by one rank
    return folder


def test_four_ranks_continue_in_a_plain_module(saved: Path, uninterrupted: Weights) -> None:
    model, optimizer = made("plain")
    load_distributed(saved, model, optimizer)
    assert optimizer.kfac.steps == HALF
    train(model, optimizer, range(HALF, WHOLE))
    assert_equal(weights(model), uninterrupted)


def _continued(folder: str, wrapper: str) -> tuple[Weights, int]:
    model, optimizer = made(wrapper)
    load_distributed(folder, model, optimizer)
    train(model, optimizer, range(HALF, WHOLE))
    return weights(model), optimizer.kfac.memory_usage()["factors"]


@pytest.mark.parametrize("world_size", [3, 5])
def test_four_ranks_continue_at_another_number(
    saved: Path, uninterrupted: Weights, world_size: int
) -> None:
    model, optimizer = made("plain")
    train(model, optimizer, range(1))
    results = run_ranks(world_size, _continued, str(saved), "fsdp")
    for found, _ in results:
        assert_equal(found, uninterrupted)
    assert sum(held for _, held in results) == optimizer.kfac.memory_usage()["factors"]


def _through_other_wrappers(four: str, folder: str) -> tuple[Weights, Weights]:
    first, _ = _continued(four, "ddp")
    model, optimizer = made("ddp")
    train(model, optimizer, range(HALF))
    save_distributed(f"{folder}/dcp", model, optimizer.inner, optimizer.kfac)
    second, _ = _continued(f"{folder}/dcp", "fsdp")
    model, optimizer = made("fsdp")
    train(model, optimizer, range(HALF))
    save_folder(f"{folder}/files", model, optimizer)
    dist.barrier()
    model, optimizer = made("fsdp")
    load_folder(f"{folder}/files", model, optimizer)
    train(model, optimizer, range(HALF, WHOLE))
    assert_equal(weights(model), second)
    return first, second


def test_two_ranks_continue_across_wrappers_and_files(
    saved: Path, uninterrupted: Weights, tmp_path: Path
) -> None:
    for first, second in run_ranks(2, _through_other_wrappers, str(saved), str(tmp_path)):
        assert_equal(first, uninterrupted)
        assert_equal(second, uninterrupted)
    model, optimizer = made("plain")
    load_folder(tmp_path / "files", model, optimizer)
    train(model, optimizer, range(HALF, WHOLE))
    assert_equal(weights(model), uninterrupted)


@pytest.mark.parametrize(
    "options",
    [{"refresh": "adaptive"}, {"method": "ekfac"}, {"trust_region": "none"}, {"momentum": 0.9}],
)
@pytest.mark.parametrize("kind", ["distributed", "files"])
def test_one_process_continues_bit_for_bit(
    kind: str, options: dict[str, Any], tmp_path: Path
) -> None:
    save, load = {
        "distributed": (save_distributed, load_distributed),
        "files": (save_folder, load_folder),
    }[kind]
    model, optimizer = made("plain", **options)
    train(model, optimizer, range(HALF))
    save(tmp_path, model, optimizer)
    train(model, optimizer, range(HALF, WHOLE))
    again, restored = made("plain", **options)
    load(tmp_path, again, restored)
    train(again, restored, range(HALF, WHOLE))
    torch.testing.assert_close(weights(again), weights(model), rtol=0, atol=0)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.out = nn.Linear(4, 9, bias=False)
        self.out.weight = self.words.weight


def test_weights_are_read_as_from_the_hub_also_where_two_names_share_them(tmp_path: Path) -> None:
    model = Tied()
    save_folder(tmp_path, model, config={"model_type": "tied"})
    assert {path.name for path in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    for load in (load_folder, lambda folder, other: load_torch_model(other, folder)):
        other = Tied()
        load(tmp_path, other)
        assert torch.equal(other.out.weight, model.words.weight)
        assert other.out.weight is other.words.weight


def test_what_is_missing_or_of_another_model_changes_nothing(tmp_path: Path) -> None:
    model, optimizer = made("plain")
    with pytest.raises(StateError, match="no checkpoint"):
        load_distributed(tmp_path, model, optimizer)
    with pytest.raises(StateError, match=r"no model\.safetensors"):
        load_folder(tmp_path, model, optimizer)
    train(model, optimizer, range(1))
    other = nn.Sequential(nn.Linear(5, 3)).double()
    inner = torch.optim.SGD(other.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        save_distributed(tmp_path / "plain", other, inner)
    with pytest.raises(StateError, match="no K-FAC state"):
        load_distributed(tmp_path / "plain", other, inner, KFAC(other, lr=inner))
    save_folder(tmp_path / "whole", model, optimizer)
    before = weights(other)
    with pytest.raises(StateError, match="another model"):
        load_folder(tmp_path / "whole", other, inner, KFAC(other, lr=inner))
    torch.testing.assert_close(weights(other), before, rtol=0, atol=0)
