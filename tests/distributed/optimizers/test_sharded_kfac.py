"""Osawa's pipeline over 2, 3 and 5 processes: one process's numbers, one all-reduce's bytes."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.counters import all_reduce_received
from elastic_kfac.communication.packing import triangle_size
from elastic_kfac.config.kfac import ShardedConfig
from elastic_kfac.errors import StateError
from elastic_kfac.optimizers.large_batch import WeightRescaling
from support.gloo import run_ranks

BATCH = 10
LR, MOMENTUM, DAMPING = 0.05, 0.9, 0.01
TOLERANCE = {"rtol": 1e-10, "atol": 1e-11}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.GroupNorm(2, 4),
        nn.PReLU(),
        nn.Flatten(),
        nn.Linear(4 * 16, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    ).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 1, 4, 4, dtype=torch.double, generator=generator)
    return x, torch.randint(3, (BATCH,), generator=generator)


def sharded(model: nn.Module, lr: float = LR, momentum: float = MOMENTUM, **options: Any) -> KFAC:
    """K-FAC sharded by owner with the options of the published method."""
    sharding = ShardedConfig(
        **{name: options.pop(name) for name in ShardedConfig.model_fields if name in options}
    )
    published = {"method": "inverse", "factor_decay": 0.0, "kl_clip": None}
    published["inverse_update_steps"] = options.get("factor_update_steps", 1)
    rates = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    return KFAC(model, lr=rates, sharding=sharding, **{**published, **options})


def build(model: nn.Module, communicator: Communicator, **options: Any) -> KFAC:
    with pytest.warns(UserWarning, match="PReLU"):
        return sharded(model, process_group=communicator, **{"damping": DAMPING, **options})


def train(model: nn.Module, optimizer: KFAC, steps: range) -> None:
    communicator = optimizer.communicator
    edges = [r * BATCH // communicator.world_size for r in range(communicator.world_size + 1)]
    share = slice(edges[communicator.rank], edges[communicator.rank + 1])
    for step in steps:
        x, y = batch(step)
        model.zero_grad()
        if len(x[share]):
            (F.cross_entropy(model(x[share]), y[share], reduction="sum") / BATCH).backward()
        optimizer.step(num_samples=len(x[share]), loss_scale_per_sample=1 / BATCH)


def reference(steps: int, **options: Any) -> dict[str, Tensor]:
    """KFAC on one process, then torch's own SGD with momentum."""
    model = network()
    sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    with pytest.warns(UserWarning, match="PReLU"):
        kfac = KFAC(
            model,
            damping=DAMPING,
            factor_decay=0.0,
            kl_clip=None,
            process_group=Communicator.solo(),
            **{"inverse_update_steps": 1, "method": "inverse", **options},
        )
    for step in range(steps):
        x, y = batch(step)
        sgd.zero_grad()
        F.cross_entropy(model(x), y).backward()
        kfac.step()
        sgd.step()
    return model.state_dict()


CASES: list[dict[str, Any]] = [
    {"v_method": "per_owner"},
    {"v_method": "padded", "method": "eigen"},
    {"v_method": "fused"},
    {"v_method": "padded", "gather": "gradients"},
    {"factor_update_steps": 2, "v_method": "fused", "method": "eigen"},
]


def _run_cases() -> list[dict[str, Tensor]]:
    results = []
    for case in CASES:
        model = network()
        optimizer = build(model, Communicator.world(), **case)
        if case.get("gather") == "gradients":
            sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
            for step in range(4):
                train(model, optimizer, range(step, step + 1))
                sgd.step()
        else:
            train(model, optimizer, range(4))
        results.append(model.state_dict())
    return results


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_pipeline_equals_one_process_kfac_and_sgd(world_size: int) -> None:
    expected = []
    for case in CASES:
        interval = case.get("factor_update_steps", 1)
        expected.append(
            reference(
                4,
                method=case.get("method", "inverse"),
                factor_update_steps=interval,
                inverse_update_steps=interval,
            )
        )
    for results in run_ranks(world_size, _run_cases):
        for result, weights in zip(results, expected, strict=True):
            for name, value in weights.items():
                torch.testing.assert_close(result[name], value, **TOLERANCE)


def _changing(kfac: KFAC, model: nn.Sequential, step: int, sgd: torch.optim.Optimizer) -> None:
    """Unfreezes the first layer before step 2, replaces the last one before step 4."""
    if step == 2:
        model[0].requires_grad_(True)
    if step == 4:
        torch.manual_seed(1)
        model[6] = nn.Linear(6, 3).double()
        sgd.add_param_group({"params": list(model[6].parameters())})
    with warnings.catch_warnings():
        warnings.simplefilter("error" if step not in (2, 4) else "ignore")
        train(model, kfac, range(step, step + 1))


def _train_changing(gather: str, options: dict[str, Any]) -> dict[str, Tensor]:
    model = network()
    model[0].requires_grad_(False)
    sgd = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    sharding = ShardedConfig(gather=gather) if gather else None  # type: ignore[arg-type]
    group = Communicator.world() if gather else Communicator.solo()
    with pytest.warns(UserWarning, match="PReLU"):
        kfac = KFAC(
            model, lr=sgd, damping=DAMPING, sharding=sharding, process_group=group, **options
        )
    for step in range(6):
        _changing(kfac, model, step, sgd)
        if not kfac.updates_weights:
            sgd.step()
    assert all(reason == "covered" for name, reason in kfac.coverage().items() if name != "2")
    return model.state_dict()


@pytest.mark.parametrize("gather", ["weights", "gradients"])
def test_layers_that_are_unfrozen_and_replaced_train_as_on_one_process(gather: str) -> None:
    for options in (
        {"kl_clip": 0.1, "factor_update_steps": 1},
        {"refresh": "adaptive", "method": "inverse"},
    ):
        expected = _train_changing("", options)
        for result in run_ranks(2, _train_changing, gather, options):
            for name, value in expected.items():
                torch.testing.assert_close(result[name], value, **TOLERANCE)


def _bytes_and_memory() -> dict[str, Any]:
    communicator = Communicator.world()
    model = network()
    optimizer = build(model, communicator, v_method="per_owner", factor_update_steps=2)
    counted = []
    for step in range(2):
        communicator.counters.reset()
        train(model, optimizer, range(step, step + 1))
        counted.append(communicator.counters.snapshot())
    packed = 0
    for layer in optimizer.layers:
        for shape in layer.factor_shapes.values():
            packed += torch.Size(shape[:-2]).numel() * triangle_size(shape[-1])
    owned = optimizer.distribution.owned
    momentum = [item.name for item in optimizer.distribution.held()]
    return {
        "bytes": counted,
        "packed": packed,
        "parameters": sum(p.numel() for p in model.parameters()),
        "owned": [unit.name for unit in owned],
        "factors_of": [
            x.name for x, s in zip(optimizer.layers, optimizer.states, strict=True) if s.factors
        ],
        "velocity_of": sorted(momentum),
        "owned_parameters": sorted(n for unit in owned for n in unit.parameters),
    }


def test_gradient_bytes_are_those_of_one_all_reduce_and_state_is_sharded() -> None:
    ranks = run_ranks(3, _bytes_and_memory)
    owned = [name for rank in ranks for name in rank["owned"]]
    assert sorted(owned) == sorted(set(owned)) and len(owned) == 5
    gradients, packed = 8 * ranks[0]["parameters"], 8 * ranks[0]["packed"]
    for rank in ranks:
        with_statistics, without = rank["bytes"]
        # One buffer in each direction; the statistics ride in the first.
        assert without["sharded/reduce"].payload_bytes == gradients
        assert without["sharded/gather"].payload_bytes == gradients
        assert with_statistics["sharded/reduce"].payload_bytes == gradients + packed
        assert set(without) == {"sharded/reduce", "sharded/gather"}
        assert set(rank["factors_of"]) <= set(rank["owned"])
        assert rank["velocity_of"] == rank["owned_parameters"]
    received = sum(t.received_bytes for rank in ranks for t in rank["bytes"][1].values())
    # A ring all-reduce brings 2 (p - 1) / p of the buffer to each of p ranks.
    assert received <= 3 * all_reduce_received(gradients, 3)


def _half_wire(wire: str, damping: float) -> float:
    model, exact = network().float(), network().float()
    communicator = Communicator.world()
    optimizers = [
        build(m, communicator, gather="gradients", wire=w, damping=damping)
        for m, w in ((model, wire), (exact, "fp32"))
    ]
    x, y = batch(0)
    share = slice(5 * communicator.rank, 5 * communicator.rank + 5)
    for m, optimizer in zip((model, exact), optimizers, strict=True):
        (F.cross_entropy(m(x[share].float()), y[share], reduction="sum") / BATCH).backward()
        optimizer.step(num_samples=5, loss_scale_per_sample=1 / BATCH)
    flat, reference = (
        torch.cat([p.grad.reshape(-1) for p in m.parameters()]) for m in (model, exact)
    )
    return float((flat - reference).norm() / reference.norm())


def test_half_precision_wire_stays_within_its_error_budget() -> None:
    assert max(run_ranks(2, _half_wire, "fp16", 0.1)) <= 1e-2


def _resized(options: dict[str, Any]) -> dict[str, Tensor]:
    """Four ranks, then three, then four again; what a rank keeps is what it then owns."""
    world = Communicator.world()
    three = world.subgroup([0, 1, 2])
    model = network()
    optimizer = build(model, world, **options)
    train(model, optimizer, range(3))
    state = optimizer.state_dict()
    optimizer.close()
    if three is not None:
        optimizer = build(model, three, **options)
        optimizer.load_state_dict(state)
        train(model, optimizer, range(3, 6))
        state = optimizer.state_dict()
        optimizer.close()
    state = world.broadcast_object(state, 0, tag="state")
    for tensor in model.state_dict().values():
        world.broadcast(tensor, 0, tag="model").wait()
    optimizer = build(model, world, **options)
    optimizer.load_state_dict(state)
    train(model, optimizer, range(6, 9))
    return model.state_dict()


def _resized_all() -> list[dict[str, Tensor]]:
    return [_resized(options) for options in RESIZED]


RESIZED: list[dict[str, Any]] = [
    {},
    {"refresh": "adaptive", "refresh_threshold": 0.6},
    {"factor_update_steps": 2, "factor_decay": 0.5, "method": "eigen"},
]


def test_four_three_four_ranks_equal_constant_world() -> None:
    expected = []
    for options in RESIZED:
        model = network()
        train(model, build(model, Communicator.solo(), **options), range(9))
        expected.append(model.state_dict())
    for results in run_ranks(4, _resized_all):
        for result, weights in zip(results, expected, strict=True):
            for name, value in weights.items():
                torch.testing.assert_close(result[name], value, **TOLERANCE)


def test_adaptive_refresh_saves_most_refreshes_at_the_same_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 12, generator=generator)
    y = (x @ torch.randn(12, 4, generator=generator)).argmax(1)
    losses, refreshes = {}, {}
    for refresh in ("fixed", "adaptive"):
        finals = []
        for seed in range(3):
            torch.manual_seed(seed)
            model = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4))
            optimizer = sharded(model, 0.02, damping=0.03, refresh=refresh, refresh_threshold=0.3)
            for _ in range(300):
                model.zero_grad()
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
            finals.append(float(F.cross_entropy(model(x), y).detach()))
        losses[refresh] = sum(finals) / 3
        refreshes[refresh] = [state.factor_updates for state in optimizer.states]
    assert refreshes["fixed"] == [300, 300]
    clocks = optimizer.state_dict()["refresh"]["clocks"].values()
    assert sum(clock["refreshes"] for layer in clocks for clock in layer.values()) * 5 <= 300 * 4
    assert losses["adaptive"] <= 1.1 * losses["fixed"] + 0.01


def test_weight_rescaling_only_shrinks_matrices() -> None:
    model = nn.Linear(4, 3)
    optimizer, rescaling = sharded(model, 1e-9, damping=1e-3), WeightRescaling(model)
    with torch.no_grad():
        model.weight.mul_(100)
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    rescaling.apply()
    assert model.weight.norm().item() == pytest.approx(6**0.5, rel=1e-4)
    small = model.weight.detach().clone() * 0.1
    with torch.no_grad():
        model.weight.copy_(small)
    model.zero_grad()
    model(torch.randn(5, 4)).sum().backward()
    optimizer.step()
    rescaling.apply()
    torch.testing.assert_close(model.weight.detach(), small, rtol=1e-4, atol=1e-6)


def test_state_of_other_options_is_refused() -> None:
    state = sharded(nn.Linear(2, 2)).state_dict()
    with pytest.raises(StateError, match="another method"):
        sharded(nn.Linear(2, 2), method="eigen").load_state_dict(state)
