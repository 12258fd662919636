"""K-FAC on `fully_shard`ed models equals one process; each layer's curvature lives at one rank."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    FullyShardedDataParallel,
    MixedPrecisionPolicy,
    fully_shard,
)
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from elastic_kfac import KFAC, KFACOptimizer
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import ConfigError
from support.gloo import run_ranks

BATCH, STEPS = 11, 5
OPTIONS: dict[str, Any] = {"factor_update_steps": 1, "inverse_update_steps": 2}


class Network(nn.Module):
    """Covered layers of most kinds, a bare parameter, an odd number of rows everywhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(7, 5)
        self.conv = nn.Conv1d(5, 6, 3, padding=1)
        self.attention = nn.MultiheadAttention(6, 2, batch_first=True)
        self.norm = nn.LayerNorm(6)
        self.gain = nn.Parameter(torch.linspace(0.5, 1.5, 6))
        self.left_out = nn.Linear(6, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.conv(self.words(tokens).transpose(1, 2)).transpose(1, 2)
        h = self.norm(h + self.attention(h, h, h)[0]) * self.gain
        return self.head(torch.tanh(self.left_out(h)).mean(1))


def data(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(7, (BATCH, 4), generator=generator)
    return tokens, torch.randint(3, (BATCH,), generator=generator)


def sharded(mesh_shape: tuple[int, ...], reshard: bool = True) -> Network:
    names = ("replicate", "shard")[-len(mesh_shape) :]
    mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=names)
    model = Network().double()
    for part in (model.conv, model.attention, model.head):
        fully_shard(part, mesh=mesh, reshard_after_forward=reshard)
    return fully_shard(model, mesh=mesh, reshard_after_forward=reshard)


def train(
    model: nn.Module,
    *,
    form: str,
    rule: str,
    passes: int = 1,
    clip: float | None = None,
    overflow_at: int | None = None,
    steps: int = STEPS,
    **options: Any,
) -> KFAC:
    """Steps with shares of a batch: a rank's loss is its part of the global mean, times the number of
    ranks, because gradients are averaged."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    inner = {
        "sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9),
        "plain sgd": lambda: torch.optim.SGD(model.parameters(), lr=0.05),
        "adamw": lambda: torch.optim.AdamW(model.parameters(), lr=0.01),
    }[rule]()
    options = {**OPTIONS, "skip_layers": ["left_out"], **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = KFACOptimizer(model, inner, **options) if form == "optimizer" else None
        kfac = optimizer.kfac if optimizer else KFAC(model, lr=inner, **options)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=overflow_at is not None)
    if scaler.is_enabled():
        kfac.grad_scaler = scaler
    for step in range(steps):
        inner.zero_grad()
        tokens, labels = data(step)
        for number in range(passes):
            share = slice(rank * passes + number, None, world_size * passes)
            if isinstance(model, FSDPModule):
                model.set_requires_gradient_sync(number == passes - 1)
            scale = world_size / BATCH
            with kfac.micro_batch(scale=scale):
                losses = F.cross_entropy(model(tokens[share]), labels[share], reduction="sum")
            if step == overflow_at and rank == 0:
                losses = losses * math.inf
            scaler.scale(losses * scale).backward()
        scaler.unscale_(inner)
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        if optimizer is not None:
            optimizer.step()
        else:
            kfac.step()
            scaler.step(inner)
            scaler.update()
    assert kfac.counters["skipped_steps"] == (overflow_at is not None)
    return kfac


def whole(model: nn.Module) -> dict[str, Tensor]:
    named = model.state_dict()
    return {
        n: (t.full_tensor() if hasattr(t, "full_tensor") else t).detach() for n, t in named.items()
    }


def _trained(mesh_shape: tuple[int, ...], settings: dict[str, Any]) -> dict[str, Any]:
    model = sharded(mesh_shape)
    kfac = train(model, **settings)
    counters = kfac.communicator.counters
    traffic = {tag: counters[tag] for tag in ("fsdp/gather", "fsdp/scatter")}
    return {
        "weights": whole(model),
        "memory": kfac.memory_usage(),
        "state": kfac.state_dict(),
        "layers": sorted(kfac.factors()),
        "owners": {x.name: kfac.plan.placement(x.name).a_worker for x in kfac.distribution.units},
        "sizes": {
            x.name: [(p.numel(), p.to_local().numel()) for p in x.parameters.values()]
            for x in kfac.distribution.units
        },
        "traffic": traffic,
    }


CASES: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((2,), {"form": "optimizer", "rule": "sgd", "method": "ekfac", "passes": 2}),
    ((3,), {"form": "plain", "rule": "adamw", "passes": 2, "clip": 0.5}),
    ((5,), {"form": "plain", "rule": "sgd", "refresh": "adaptive"}),
    ((3,), {"form": "plain", "rule": "sgd", "overlap_reduction": True}),
    ((2, 2), {"form": "optimizer", "rule": "sgd", "method": "inverse", "kl_clip": 1e-3}),
    # Momentum before the preconditioner: M lives at the owner, too.
    ((2,), {"form": "optimizer", "rule": "plain sgd", "momentum": 0.8, "passes": 2}),
    ((3,), {"form": "plain", "rule": "plain sgd", "momentum": 0.8, "method": "ekfac", "clip": 0.5}),
    ((3,), {"form": "plain", "rule": "plain sgd", "momentum": 0.8, "overflow_at": 2}),
]


@pytest.mark.parametrize(("mesh_shape", "settings"), CASES)
def test_sharded_model_equals_one_process_with_each_layer_at_one_rank(
    mesh_shape: tuple[int, ...], settings: dict[str, Any]
) -> None:
    alone = Network().double()
    kfac = train(alone, **settings)
    right, state = whole(alone), kfac.state_dict()
    results = run_ranks(torch.Size(mesh_shape).numel(), _trained, mesh_shape, settings)
    for result in results:
        torch.testing.assert_close(result["weights"], right, rtol=1e-10, atol=1e-11)
        for name, saved in state["layers"].items():
            found = result["state"]["layers"][name]
            torch.testing.assert_close(found["factors"], saved["factors"], rtol=1e-10, atol=1e-11)
        assert result["state"]["counters"] == state["counters"]
        averages = [s.get("trust_region", {}).get("average") for s in (result["state"], state)]
        torch.testing.assert_close(*averages, rtol=1e-10, atol=1e-12)
    held = [name for result in results for name in result["layers"]]
    assert sorted(held) == sorted(state["layers"])
    usage = kfac.memory_usage()
    assert ("average" in usage) == ("momentum" in settings)
    for kind in {"factors", "second_order", "average"} & set(usage):
        assert sum(r["memory"].get(kind, 0) for r in results) == usage[kind]
    for rank, result in enumerate(results):
        assert_gradients_went_to_their_owners_alone(rank, result, results, mesh_shape)


def assert_gradients_went_to_their_owners_alone(
    rank: int, result: dict[str, Any], results: list[dict[str, Any]], mesh_shape: tuple[int, ...]
) -> None:
    """Bytes of float64 sent and received by a rank, counted from the sizes of the pieces."""
    replica = rank - rank % mesh_shape[-1], rank - rank % mesh_shape[-1] + mesh_shape[-1]
    sent, received = {"gather": 0, "scatter": 0}, {"gather": 0, "scatter": 0}
    for name, sizes in result["sizes"].items():
        owner = result["owners"][name]
        for number, (everything, mine) in enumerate(sizes):
            if owner == rank:
                received["gather"] += everything - mine
                sent["scatter"] += sum(r["sizes"][name][number][1] for r in results) - mine
            else:
                sent["gather"] += mine if replica[0] <= owner < replica[1] else 0
                received["scatter"] += mine
    steps = result["state"]["counters"]["steps"]
    for way in ("gather", "scatter"):
        traffic = result["traffic"][f"fsdp/{way}"]
        assert traffic.payload_bytes == 8 * steps * sent[way]
        assert traffic.received_bytes == 8 * steps * received[way]


def _equal_layers() -> tuple[dict[str, int], int]:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    kfac = KFAC(model, lr=0.1)
    model(torch.randn(8, 16)).square().mean().backward()
    kfac.step()
    return kfac.memory_usage(), dist.get_world_size()


def test_each_rank_holds_its_share_of_factors_and_decompositions() -> None:
    model = nn.Sequential(*(nn.Linear(16, 16) for _ in range(6)))
    kfac = KFAC(model, lr=0.1)
    model(torch.randn(8, 16)).square().mean().backward()
    kfac.step()
    alone = kfac.memory_usage()
    for usage, world_size in run_ranks(3, _equal_layers):
        for kind in ("factors", "second_order", "last_step"):
            assert usage.get(kind, 0) * world_size == alone.get(kind, 0)


def _mixed_precision_without_exchange() -> tuple[dict[str, Tensor], dict[str, str]]:
    """bf16 passes whose gradients wait in the wrapper, not in `.grad`, until the last one."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Linear(6, 3))
    fully_shard(model[1], mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    kfac = KFAC(model, lr=0.1, accumulation_steps=2)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, 4, 5, generator=generator)[:, dist.get_rank()]
    for number, part in enumerate(x):
        model.set_requires_gradient_sync(number == 1)  # type: ignore[operator]
        (model(part).float().square().sum(1).mean() / 2).backward()
    samples = kfac.captured_samples()
    kfac.step()
    state = kfac.state_dict()["layers"]
    assert samples == 8
    return {name: layer["factors"]["A"] for name, layer in state.items()}, kfac.coverage()


def test_passes_in_half_precision_without_exchange_count() -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 2, 4, 5, generator=generator).reshape(-1, 5)
    rows = torch.cat([x, torch.ones(16, 1)], 1)
    for factors, coverage in run_ranks(2, _mixed_precision_without_exchange):
        torch.testing.assert_close(factors["0"], rows.T @ rows / 16, rtol=2e-2, atol=2e-2)
        assert coverage == {"0": "covered", "1": "covered"}


def _refused() -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    errors = []

    def attempt(model: nn.Module, **options: Any) -> None:
        with pytest.raises(ConfigError) as raised:
            KFAC(model, **options)
        errors.append(str(raised.value))

    attempt(FullyShardedDataParallel(Network(), device_id=torch.device("cpu")))
    attempt(parallelize_module(Network(), mesh, {"head": ColwiseParallel()}))
    attempt(sharded((2,)), weight_decay=0.1)
    attempt(sharded((2,)), tree=True)
    attempt(sharded((2,)), process_group=Communicator.solo())
    part = Network()
    fully_shard(part.head, mesh=mesh)
    attempt(part)
    return errors


def test_what_is_not_supported_ends_in_one_line() -> None:
    texts = ["FSDP1", "tensor-parallel", "weight_decay", "of its own", "different ranks", "or none"]
    for errors in run_ranks(2, _refused):
        for error, text in zip(errors, texts, strict=True):
            assert text in error and "\n" not in error
