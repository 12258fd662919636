"""K-FAC over 2, 3 and 5 processes equals one process on the concatenated batch (float64, 1e-10)."""

from __future__ import annotations

import copy
import itertools
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.packing import triangle_size
from elastic_kfac.config.kfac import ShardedConfig
from elastic_kfac.errors import CommunicationError, UsageError
from elastic_kfac.kfac.shapes import layer_shape
from elastic_kfac.placement.costs import factor_elements
from elastic_kfac.placement.planner import moved_elements
from elastic_kfac.placement.traffic import TrafficModel, traffic_per_step
from support.gloo import run_ranks

pytestmark = pytest.mark.filterwarnings("ignore:factors wider than max_factor_dim")

TOLERANCE = {"rtol": 1e-10, "atol": 1e-11}
BATCH = 11


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.Tanh(),
        nn.Conv2d(4, 4, 3, stride=2, groups=2),
        nn.Flatten(),
        nn.LayerNorm(4 * 4),
        nn.Linear(16, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    ).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 1, 6, 6, dtype=torch.double, generator=generator)
    return x, torch.randint(3, (BATCH,), generator=generator)


def shares(world_size: int, kind: str) -> list[slice]:
    if kind == "even" or world_size == 1:
        edges = [rank * BATCH // world_size for rank in range(world_size + 1)]
    else:  # the last rank has nothing, the first has most
        edges = [0] + [BATCH - world_size + 2 + r for r in range(world_size - 1)] + [BATCH]
        edges[-2] = BATCH
    return [slice(a, b) for a, b in itertools.pairwise(edges)]


def train(
    model: nn.Module, kfac: KFAC, communicator: Communicator, steps: range, kind: str = "even"
) -> None:
    share = shares(communicator.world_size, kind)[communicator.rank]
    for step in steps:
        x, y = batch(step)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        if len(x[share]):
            (F.cross_entropy(model(x[share]), y[share], reduction="sum") / BATCH).backward()
        for p in () if kfac.sums_gradients else model.parameters():
            communicator.all_reduce(p.grad, tag="gradients").wait()
        kfac.step(num_samples=len(x[share]), loss_scale_per_sample=1 / BATCH)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad


def options_of(case: dict[str, Any]) -> dict[str, Any]:
    keys = ("grad_worker_frac", "method", "colocate", "symmetry_aware", "bucket_mib", "precompute")
    return {
        "damping": 0.01,
        "inverse_update_steps": 2,
        "stagger": case.get("stagger", False),
        **{k: case[k] for k in keys if k in case},
    }


PRODUCT = [
    {
        "grad_worker_frac": fraction,
        "method": method,
        "colocate": colocate,
        "symmetry_aware": symmetric,
        "bucket_mib": bucket,
        "stagger": stagger,
        "precompute": precompute,
        "shares": kind,
    }
    for fraction in (1.0, 0.67, 0.5, 0.34, 1e-9)
    for method in ("eigen", "inverse")
    for colocate in (True, False)
    for symmetric in (True, False)
    for bucket in (25.0, 1e-4)
    for stagger in (True, False)
    for precompute in (False, True)
    for kind in ("even", "uneven")
    if not precompute or (method == "eigen" and colocate)
]


def pairwise(product: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Few of the cases, among which every pair of option values occurs (greedy)."""

    def pairs(case: dict[str, Any]) -> set[tuple[tuple[str, str], ...]]:
        return set(itertools.combinations([(k, str(v)) for k, v in sorted(case.items())], 2))

    missing = set().union(*(pairs(case) for case in product))
    chosen = []
    while missing:
        best = max(product, key=lambda case: len(pairs(case) & missing))
        chosen.append(best)
        missing -= pairs(best)
    return chosen


CASES = [*pairwise(PRODUCT), {"grad_worker_frac": "auto", "shares": "uneven"}]


def _weights_of_case(case: dict[str, Any], communicator: Communicator) -> dict[str, Tensor]:
    model = network()
    kfac = KFAC(model, process_group=communicator, **options_of(case))
    train(model, kfac, communicator, range(5), case.get("shares", "even"))
    kfac.close()
    return copy.deepcopy(model.state_dict())


def _all_cases() -> list[dict[str, Tensor]]:
    communicator = Communicator.world()
    return [_weights_of_case(case, communicator) for case in CASES]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_any_placement_equals_one_process(world_size: int) -> None:
    solo = [_weights_of_case(case, Communicator.solo()) for case in CASES]
    for rank, results in enumerate(run_ranks(world_size, _all_cases)):
        for case, expected, result in zip(CASES, solo, results, strict=True):
            for name, value in expected.items():
                torch.testing.assert_close(
                    result[name],
                    value,
                    **TOLERANCE,
                    msg=lambda m, case=case, rank=rank: f"{case} rank {rank}: {m}",
                )


def _roles_and_bytes(fraction: float) -> dict[str, Any]:
    communicator = Communicator.world()
    model = network()
    kfac = KFAC(
        model,
        process_group=communicator,
        grad_worker_frac=fraction,
        factor_update_steps=2,
        inverse_update_steps=4,
    )
    communicator.counters.reset()
    counted = []
    for step in range(5):
        before = communicator.counters.snapshot()
        train(model, kfac, communicator, range(step, step + 1))
        after = communicator.counters.snapshot()
        counted.append(
            {
                tag: after[tag].payload_bytes - (before[tag].payload_bytes if tag in before else 0)
                for tag in after
            }
        )
    names = [layer.name for layer in kfac.layers]
    held = {x: sorted(s.decomposition) for x, s in zip(names, kfac.states, strict=True)}
    worker = {x: kfac.plan.is_gradient_worker(x, communicator.rank) for x in names}
    return {
        "held": held,
        "worker": worker,
        "bytes": counted,
        "memory": kfac.memory_usage(),
        "plan": kfac.plan.sha256,
        "gradient_elements": [torch.Size(b.gradient_shape).numel() for b in kfac.layers],
        "packed": sum(_packed(b) for b in kfac.layers),
        "second_order": [
            sum(torch.Size(s).numel() for s in b.decomposition_shapes.values()) for b in kfac.layers
        ],
    }


def _packed(layer: Any) -> int:
    total = 0
    for shape in layer.factor_shapes.values():
        matrices = torch.Size(shape[:-2]).numel()
        total += matrices * triangle_size(shape[-1])
    return total


@pytest.mark.parametrize(("world_size", "fraction"), [(2, 1.0), (2, 0.5), (3, 1 / 3), (5, 0.5)])
def test_roles_and_bytes_follow_the_plan(world_size: int, fraction: float) -> None:
    ranks = run_ranks(world_size, _roles_and_bytes, fraction)
    assert len({rank["plan"] for rank in ranks}) == 1
    first = ranks[0]
    for rank in ranks:
        second_order_bytes = 0
        for index, (name, tensors) in enumerate(rank["held"].items()):
            assert bool(tensors) == rank["worker"][name]
            second_order_bytes += 8 * first["second_order"][index] * rank["worker"][name]
        assert rank["memory"]["second_order"] == second_order_bytes
        for step, by_tag in enumerate(rank["bytes"]):
            # Triangles of the factors on factor steps only; nothing on the others.
            factors = 8 * first["packed"] if step % 2 == 0 else 0
            assert by_tag.get("kfac/factors", 0) == factors
            due = step % 4 == 0
            columns = round(world_size / max(1, fraction * world_size)) if fraction < 1 else 1
            column_size = world_size / columns
            if column_size == 1 or not due:
                assert by_tag.get("kfac/second_order", 0) == 0
            received = [
                8 * n
                for n, (name, own) in zip(
                    first["gradient_elements"], rank["worker"].items(), strict=True
                )
                if fraction < 1.0 and (not own or _sends(name, rank, ranks))
            ]
            assert by_tag.get("kfac/gradients", 0) == sum(received)


def _sends(name: str, rank: dict[str, Any], ranks: list[dict[str, Any]]) -> bool:
    """Whether a worker serves anybody: with at most as many receivers as workers some do not."""
    workers = [r for r in ranks if r["worker"][name]]
    receivers = len(ranks) - len(workers)
    return workers.index(rank) < receivers if receivers < len(workers) else True


DDP_CASES = ("plain", "static", "accumulation")


def _ddp_all() -> list[dict[str, Any]]:
    return [_ddp(case) for case in DDP_CASES]


def _ddp(case: str) -> dict[str, Any]:
    communicator = Communicator.world()
    model = network()
    wrapped = nn.parallel.DistributedDataParallel(model, static_graph=case == "static")
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    kfac = KFAC(
        wrapped,
        lr=optimizer,
        damping=0.01,
        inverse_update_steps=2,
        accumulation_steps=2 if case == "accumulation" else 1,
    )
    for step in range(4):
        x, y = (t[:8] for t in batch(step))
        share = slice(4 * communicator.rank, 4 * communicator.rank + 4)
        x, y = x[share], y[share]
        optimizer.zero_grad()
        if case == "accumulation":
            with wrapped.no_sync():
                (F.cross_entropy(wrapped(x[:2]), y[:2]) / 2).backward()
            (F.cross_entropy(wrapped(x[2:]), y[2:]) / 2).backward()
        else:
            F.cross_entropy(wrapped(x), y).backward()
        kfac.step()
        optimizer.step()
    return {"names": [x.name for x in kfac.layers], **model.state_dict()}


def test_distributed_data_parallel_equals_one_process() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = KFAC(model, lr=optimizer, damping=0.01, inverse_update_steps=2)
    for step in range(4):
        x, y = (t[:8] for t in batch(step))
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        kfac.step()
        optimizer.step()
    for results in run_ranks(2, _ddp_all):
        for result in results:
            assert result.pop("names") == [x.name for x in kfac.layers]
            assert_equal(result, model.state_dict())


BOUNDED = 0.4
"""The fraction that is tried with bounded factors, too."""

FRACTIONS = (1.0, 0.5, BOUNDED, 1e-9)


def _fraction_case(fraction: float) -> dict[str, Any]:
    bound = {"max_factor_dim": 15} if fraction == BOUNDED else {}
    return {"grad_worker_frac": fraction, "stagger": True, **bound}


def _save_all() -> list[dict[str, Any]]:
    return [_save(_fraction_case(fraction)) for fraction in FRACTIONS]


def _resume_all(states: list[dict[str, Any]]) -> list[dict[str, Tensor]]:
    return [
        _resume(_fraction_case(fraction), state)
        for fraction, state in zip(FRACTIONS, states, strict=True)
    ]


def _save(case: dict[str, Any]) -> dict[str, Any]:
    communicator = Communicator.world()
    model = network()
    kfac = KFAC(model, process_group=communicator, **options_of(case))
    train(model, kfac, communicator, range(3))
    return {"model": model.state_dict(), "kfac": kfac.state_dict()}


def _resume(case: dict[str, Any], state: dict[str, Any]) -> dict[str, Tensor]:
    communicator = Communicator.world()
    model = network()
    kfac = KFAC(model, process_group=communicator, **options_of(case))
    model.load_state_dict(state["model"])
    kfac.load_state_dict(state["kfac"])
    held = [bool(state.decomposition) for state in kfac.states]
    expected = [kfac.plan.is_gradient_worker(x.name, communicator.rank) for x in kfac.layers]
    assert held == expected
    train(model, kfac, communicator, range(3, 6))
    return model.state_dict()


def test_state_saved_at_three_continues_at_two_as_if_nothing_happened() -> None:
    saved = run_ranks(3, _save_all)
    for one, other in zip(saved[0], saved[2], strict=True):
        for name, layer in one["kfac"]["layers"].items():
            for kind in ("factors", "second_order"):
                for key, value in layer[kind].items():
                    assert torch.equal(value, other["kfac"]["layers"][name][kind][key])
    for results in run_ranks(2, _resume_all, saved[1]):
        for fraction, result in zip(FRACTIONS, results, strict=True):
            assert_equal(result, constant_world(fraction, 6))


def constant_world(fraction: float, steps: int) -> dict[str, Tensor]:
    model = network()
    kfac = KFAC(model, process_group=Communicator.solo(), **options_of(_fraction_case(fraction)))
    train(model, kfac, Communicator.solo(), range(steps))
    return model.state_dict()


def assert_equal(result: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        torch.testing.assert_close(result[name], value, **TOLERANCE)


def _resize_all() -> list[dict[str, Tensor]]:
    return [_resize(fraction) for fraction in FRACTIONS]


def _resize(fraction: float) -> dict[str, Tensor]:
    """Three ranks, then two of them, then three again with a newcomer in the third place."""
    world = Communicator.world()
    pair = world.subgroup([0, 1])
    case = _fraction_case(fraction)
    model = network()
    kfac = KFAC(model, process_group=world, **options_of(case))
    train(model, kfac, world, range(3))
    state = kfac.state_dict()  # gathered while all are there, as at a planned change
    if pair is not None:
        kfac.resize(pair)
        kfac.load_state_dict(state)
        train(model, kfac, pair, range(3, 5))
    else:
        model = network()
        kfac = KFAC(model, process_group=Communicator.solo(), **options_of(case))
    for tensor in model.state_dict().values():
        world.broadcast(tensor, 0, tag="model").wait()
    kfac.resize(world)
    train(model, kfac, world, range(5, 8))
    return model.state_dict()


def test_resize_in_a_living_process_equals_constant_world() -> None:
    for results in run_ranks(3, _resize_all):
        for fraction, result in zip(FRACTIONS, results, strict=True):
            assert_equal(result, constant_world(fraction, 8))


def _resize_report(sharded: bool) -> dict[str, Any]:
    """Three ranks; the last one leaves, and comes back as a newcomer."""
    world = Communicator.world()
    pair = world.subgroup([0, 1])
    options = {"damping": 0.01, "inverse_update_steps": 1, "grad_worker_frac": 0.34}
    sharding = ShardedConfig(gather="gradients") if sharded else None
    model = network()
    kfac = KFAC(model, process_group=world, sharding=sharding, **options)
    train(model, kfac, world, range(2))
    before = kfac.plan
    reports = []
    if pair is not None:
        kfac.leave()
        with pytest.raises(UsageError, match="after leave"):
            kfac.step()
        reports.append(kfac.resize(pair))
        train(model, kfac, pair, range(2, 4))
    else:
        model = network()
        kfac = KFAC(model, process_group=Communicator.solo(), sharding=sharding, **options)
    for tensor in model.state_dict().values():
        world.broadcast(tensor, 0, tag="model").wait()
    reports.append(kfac.resize(world))
    train(model, kfac, world, range(4, 6))
    shapes = [layer_shape(layer) for layer in kfac.layers]
    held = [set(f) for f in world.all_gather_object(kfac.factors(), tag="test")]
    return {
        "reports": reports,
        "before": before,
        "shapes": shapes,
        "steps": kfac.steps,
        "weights": model.state_dict(),
        "held": held,
    }


def test_resize_moves_the_fewest_bytes_and_reports_them() -> None:
    ranks = run_ranks(3, _resize_report, False)
    shrunk, grown = ranks[0]["reports"]
    assert [rank["reports"][-1] for rank in ranks] == [grown] * 3
    assert ranks[1]["reports"][0] == shrunk and shrunk.previous == ranks[0]["before"]
    # The grid keeps factors everywhere: only decompositions move when a rank leaves, those of the
    # survivors' own; what only the lost rank held is decomposed again, from factors that all have.
    lost = {x.name for x in shrunk.previous.layers if x.column == 2}
    moved = [shape for shape in ranks[0]["shapes"] if shape.name not in lost]
    elements = moved_elements(shrunk.previous, shrunk.plan, moved, previous_ranks=[0, 1])
    assert shrunk.moved_bytes == 8 * elements and shrunk.lost == ()
    # A newcomer lacks every factor, and the decompositions of its column.
    column = [s for s in ranks[0]["shapes"] if grown.plan.is_gradient_worker(s.name, 2)]
    survivors = moved_elements(
        shrunk.plan, grown.plan, ranks[0]["shapes"], previous_ranks=[0, 1, None]
    )
    # The trust region's last step is as large as the covered parameters.
    last_step = sum(shape.weight_elements for shape in ranks[0]["shapes"])
    factors = factor_elements(ranks[0]["shapes"])
    assert column and grown.moved_bytes == 8 * (survivors + factors + last_step)
    model = network()
    kfac = KFAC(model, process_group=Communicator.solo(), damping=0.01, inverse_update_steps=1)
    train(model, kfac, Communicator.solo(), range(6))
    for rank in ranks:
        assert rank["steps"] == 6
        assert_equal(rank["weights"], model.state_dict())


def test_sharded_resize_keeps_what_survives_and_names_what_is_lost() -> None:
    ranks = run_ranks(3, _resize_report, True)
    shrunk, grown = ranks[0]["reports"]
    names = {shape.name for shape in ranks[0]["shapes"]}
    owned = {x.name for x in shrunk.previous.layers if x.a_worker == 2} & names
    assert owned and set(shrunk.lost) == owned and grown.lost == ()
    for rank in ranks:
        # One owner each, who has the factors.
        assert sorted(itertools.chain(*rank["held"])) == sorted(names)
    assert grown.moved_bytes > 0


def _disagree() -> list[str]:
    communicator = Communicator.world()
    rank = communicator.rank
    messages = []
    for model, options in (
        (nn.Linear(3, 2 + rank), {}),
        (nn.Linear(3, 2), {"method": ("eigen", "inverse")[rank]}),
    ):
        with pytest.raises(CommunicationError) as caught:
            KFAC(nn.Sequential(model), process_group=communicator, **options)
        messages.append(str(caught.value))
    return messages


def test_ranks_with_other_models_or_options_are_named_at_construction() -> None:
    for layers, options in run_ranks(2, _disagree):
        assert (
            "layer 0 is ((2, 4), torch.float32) on rank 0, ((3, 4), torch.float32) on rank 1"
            in (layers)
        )
        assert "kfac.method is eigen on rank 0, inverse on rank 1" in options


def _traffic(fraction: float, precompute: bool) -> tuple[dict[str, Fraction], TrafficModel]:
    """What this rank received over one interval, by tag, and the model's average per step."""
    communicator = Communicator.world()
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.Flatten(), nn.Linear(144, 6), nn.Linear(6, 3)
    ).double()
    kfac = KFAC(
        model,
        process_group=communicator,
        grad_worker_frac=fraction,
        factor_update_steps=2,
        inverse_update_steps=4,
        precompute=precompute,
    )
    communicator.counters.reset()
    train(model, kfac, communicator, range(4))
    received = {
        tag: traffic.received_bytes / 8 / 4
        for tag, traffic in communicator.counters.snapshot().items()
    }
    expected = traffic_per_step(
        kfac.plan,
        [layer_shape(layer) for layer in kfac.layers],
        factor_update_steps=2,
        inverse_update_steps=4,
        precompute=precompute,
    )
    return received, expected


def _traffic_all() -> list[tuple[dict[str, Fraction], TrafficModel]]:
    cases = itertools.product((1.0, 0.5, 1e-9), (False, True))
    return [_traffic(fraction, precompute) for fraction, precompute in cases]


@pytest.mark.parametrize("world_size", [2, 3, 5])
def test_counted_traffic_equals_the_model_exactly(world_size: int) -> None:
    ranks = run_ranks(world_size, _traffic_all)
    for case in zip(*ranks, strict=True):
        model = case[0][1]
        for tag, expected in (
            ("kfac/factors", model.factors),
            ("kfac/second_order", model.second_order),
            ("kfac/gradients", model.preconditioned_gradients),
            ("gradients", model.gradients),
        ):
            mean = sum((received.get(tag, Fraction(0)) for received, _ in case), Fraction(0))
            assert mean / world_size == expected, tag


def _product() -> list[dict[str, Tensor]]:
    communicator = Communicator.world()
    return [_weights_of_case(case, communicator) for case in PRODUCT]


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 6])
def test_full_option_product_equals_one_process(world_size: int) -> None:
    solo = [_weights_of_case(case, Communicator.solo()) for case in PRODUCT]
    for results in run_ranks(world_size, _product, timeout_s=7000):
        for expected, result in zip(solo, results, strict=True):
            assert_equal(result, expected)
