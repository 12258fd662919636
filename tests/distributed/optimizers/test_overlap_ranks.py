"""`overlap_reduction` over several processes: one process's numbers a step later, the same bytes, and a
reduction that is under way when `step()` returns."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from elastic_kfac import KFAC
from elastic_kfac.communication import collectives
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import CommunicationError
from support.gloo import run_ranks, wait_for
from support.training_loops import SharedQueries

BATCH = 11
TOLERANCE = {"rtol": 1e-10, "atol": 1e-11}
CASES: dict[str, dict[str, Any]] = {
    "whole": {"factor_update_steps": 1, "inverse_update_steps": 1, "bucket_mib": 1e-4},
    "parts": {"grad_worker_frac": 1e-9, "method": "inverse", "symmetry_aware": False},
    "apart": {"grad_worker_frac": 0.67, "colocate": False, "kl_clip": 1e-3},
    "spread": {"stagger": True, "factor_update_steps": 2, "inverse_update_steps": 4},
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2),
        nn.Flatten(),
        nn.LayerNorm(16),
        nn.Linear(16, 6),
        nn.Tanh(),
        nn.Linear(6, 3),
    ).double()


def build(model: nn.Module, communicator: Communicator, **options: Any) -> KFAC:
    given = {"damping": 0.01, "factor_update_steps": 1, "inverse_update_steps": 2}
    options = {"overlap_reduction": True, **given, **options}
    return KFAC(model, process_group=communicator, **options)


def train(model: nn.Module, kfac: KFAC, communicator: Communicator, steps: Sequence[int]) -> None:
    size, rank = communicator.world_size, communicator.rank
    share = slice(rank * BATCH // size, (rank + 1) * BATCH // size)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(BATCH, 1, 6, 6, dtype=torch.double, generator=generator)[share]
        y = torch.randint(3, (BATCH,), generator=generator)[share]
        model.zero_grad()
        (F.cross_entropy(model(x), y, reduction="sum") / BATCH).backward()
        for p in model.parameters():
            communicator.all_reduce(p.grad, tag="gradients").wait()
        kfac.step(num_samples=len(x), loss_scale_per_sample=1 / BATCH)
        with torch.no_grad():
            for p in model.parameters():
                p -= 0.1 * p.grad


Saved = list[dict[str, Any]]


def _trained(saved: Saved, first: int, last: int) -> Saved:
    results = []
    for case, state in zip(CASES.values(), saved or [{}] * len(CASES), strict=True):
        communicator, model = Communicator.world(), network()
        kfac = build(model, communicator, **case)
        if state:
            model.load_state_dict(state["model"])
            kfac.load_state_dict(state["kfac"])
        train(model, kfac, communicator, range(first, last))
        results.append({"model": model.state_dict(), "kfac": kfac.state_dict()})
    return results


def assert_equal(one: dict[str, Any], other: dict[str, Any], exactly: bool = False) -> None:
    for name, value in one["model"].items():
        if exactly:
            assert torch.equal(other["model"][name], value), name
        else:
            torch.testing.assert_close(other["model"][name], value, **TOLERANCE)
    ages = [
        {n: (s["inverse_step"], s["factor_updates"]) for n, s in x["kfac"]["layers"].items()}
        for x in (one, other)
    ]
    assert ages[0] == ages[1] and one["kfac"]["late"] == other["kfac"]["late"]


def test_any_number_of_ranks_has_one_trajectory_and_goes_on_at_another() -> None:
    (alone,) = run_ranks(1, _trained, [], 0, 8)
    pair = run_ranks(2, _trained, [], 0, 8)
    halfway = run_ranks(2, _trained, [], 0, 5)
    for case, one, other in zip(CASES, alone, pair[1], strict=True):
        assert one["kfac"]["late"] == 7, case
        assert_equal(one, other)
    for one, other in zip(pair[0], run_ranks(2, _trained, halfway[1], 5, 8)[0], strict=True):
        assert_equal(one, other, exactly=True)  # saved with a reduction under way
    for results in run_ranks(3, _trained, halfway[0], 5, 8):
        for one, other in zip(alone, results, strict=True):
            assert_equal(one, other)


# -- what is under way --------------------------------------------------------------------------


def _recorded(overlap: bool, fraction: float) -> dict[str, Any]:
    """Events of each step, and what travelled in it."""
    world, model = Communicator.world(), network()
    kfac = build(model, world, overlap_reduction=overlap, grad_worker_frac=fraction)
    events: list[str] = []
    start, wait = Communicator._start, collectives.Work.wait
    tags: dict[int, str] = {}

    def started(self: Communicator, kind: str, tag: str, *args: Any) -> collectives.Work:
        work = start(self, kind, tag, *args)
        tags[id(work)] = tag
        events.append(f"start {tag}")
        held.append(work)
        return work

    def waited(self: collectives.Work) -> None:
        if id(self) in tags:
            events.append(f"wait {tags[id(self)]}")
        wait(self)

    held: list[collectives.Work] = []  # so that no identity is used twice
    Communicator._start, collectives.Work.wait = started, waited  # type: ignore[method-assign]
    by_step, traffic = [], []
    for step in range(6):
        events.clear()
        world.counters.reset()
        train(model, kfac, world, [step])
        by_step.append([e for e in events if e.endswith(("kfac/factors", "kfac/counts"))])
        traffic.append(world.counters.snapshot())
    return {"events": by_step, "traffic": traffic}


@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_a_reduction_starts_in_one_step_and_is_waited_for_in_the_next(fraction: float) -> None:
    late, at_once = (run_ranks(2, _recorded, overlap, fraction) for overlap in (True, False))
    starts = ["start kfac/counts", "start kfac/factors"]
    waits = ["wait kfac/counts", "wait kfac/factors"]
    for ours, theirs in zip(late, at_once, strict=True):
        assert ours["events"] == [[*starts, *waits], starts, *[[*waits, *starts]] * 4]
        assert theirs["events"] == [[*starts, *waits]] * 6
        same = ["kfac/factors", "kfac/counts", "gradients"]
        for one, other in zip(ours["traffic"], theirs["traffic"], strict=True):
            for tag in (*same, *(["kfac/gradients"] if fraction < 1 else [])):
                assert one[tag] == other[tag] and one[tag].calls, tag
        if fraction == 1:  # what is due in steps 2 and 4 is decomposed a step later
            sent = [
                [s for s in range(6) if "kfac/second_order" in x["traffic"][s]]
                for x in (ours, theirs)
            ]
            assert sent == [[0, 3, 5], [0, 2, 4]]


def _returns_before_the_others_come() -> bool:
    world, model = Communicator.world(), network()
    store = dist.distributed_c10d._get_default_store()
    kfac = build(model, world, trust_region="none", kl_clip=None)
    train(model, kfac, world, range(2))
    generator = torch.Generator().manual_seed(9)
    x = torch.randn(4, 1, 6, 6, dtype=torch.double, generator=generator)
    kfac.flush()
    model.zero_grad()
    model(x).square().sum().backward()
    for p in model.parameters():
        world.all_reduce(p.grad, tag="gradients").wait()
    if world.rank == 1:  # its part comes after the other rank has left step()
        wait_for(store, ["returned"])
    kfac.step()
    if world.rank == 0:
        store.set("returned", "")
    kfac.flush()
    return {s.factor_updates for s in kfac.states} == {3}


def test_a_step_returns_while_a_peer_has_not_even_begun() -> None:
    assert run_ranks(2, _returns_before_the_others_come, group_timeout_s=30) == [True, True]


# -- other ranks --------------------------------------------------------------------------------


def _resized() -> Saved:
    """Three ranks, then two of them, then three with a newcomer, each with a reduction under way."""
    results = []
    for options in ({}, {"grad_worker_frac": 0.34}):
        world = Communicator.world()
        pair = world.subgroup([0, 1])
        model = network()
        kfac = build(model, world, **options)
        train(model, kfac, world, range(4))
        # What only the third rank holds is gathered before it goes.
        state = kfac.collect_state() if options else None
        if pair is not None:
            kfac.resize(pair)
            if state is not None:
                kfac.load_state_dict(state)
            train(model, kfac, pair, [4, 5])
        else:
            kfac.close()
            model = network()
            kfac = build(model, Communicator.solo(), **options)
        for tensor in model.state_dict().values():
            world.broadcast(tensor, 0, tag="model").wait()
        kfac.resize(world)
        train(model, kfac, world, [6, 7])
        results.append({"model": model.state_dict(), "kfac": kfac.collect_state()})
    return results


def test_a_resize_takes_along_what_is_under_way() -> None:
    model = network()
    kfac = build(model, Communicator.solo())
    train(model, kfac, Communicator.solo(), range(8))
    expected = {"model": model.state_dict(), "kfac": kfac.state_dict()}
    for results in run_ranks(3, _resized):
        for result in results:
            assert_equal(expected, result)


def _peer_lost() -> list[Any]:
    world, model = Communicator.world(), network()
    kfac = build(model, world)
    train(model, kfac, world, range(3))
    kfac.flush()
    world.barrier()
    if world.rank == 1:
        os._exit(1)
    x = torch.ones(2, 1, 6, 6, dtype=torch.double)
    seen: list[Any] = []
    for _ in range(2):
        model.zero_grad()
        model(x).square().sum().backward()
        try:
            kfac.step()
        except CommunicationError as error:
            seen.append(str(error).split(";")[0])
    for look in (kfac.flush, kfac.collect_state):
        with pytest.raises(CommunicationError, match="statistics of the last step were lost"):
            look()
    kfac.leave()
    kfac.resize(Communicator.solo())
    seen.append({s.factor_updates for s in kfac.states})
    train(model, kfac, Communicator.solo(), range(4, 7))
    kfac.flush()
    seen.append({s.factor_updates for s in kfac.states})
    return seen


def test_statistics_lost_with_a_peer_are_named_and_the_others_go_on_without_them() -> None:
    (seen, _) = run_ranks(2, _peer_lost, expect_death=[1])
    assert "all_reduce 'kfac/" in seen[0] and seen[1:] == [{3}, {6}]


def _with_faults() -> tuple[list[str], list[set[int]]]:
    world, model = Communicator.world(), SharedQueries().double()
    kfac = build(model, world, factor_update_steps=1, inverse_update_steps=1)
    for step in range(5):
        model.shared = step == 2 and world.rank == 1
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(7, 4, dtype=torch.double, generator=generator)
        model.zero_grad()
        (model(x).square().sum() / 14).backward()
        for p in model.parameters():
            world.all_reduce(p.grad, tag="gradients").wait()
        kfac.step(num_samples=7, loss_scale_per_sample=1 / 14)
    covered = [name for name, why in kfac.coverage().items() if why == "covered"]
    return covered, [set(state.factors) for state in kfac.states]


@pytest.mark.filterwarnings("ignore:K-FAC does not precondition")
def test_faults_that_one_rank_has_seen_leave_a_layer_out_on_all_in_the_same_step() -> None:
    assert run_ranks(2, _with_faults) == [(["inner"], [{"A", "G"}, set()])] * 2


def _ends_without_a_word() -> None:
    world, model = Communicator.world(), network()
    train(model, build(model, world), world, range(3))
    dist.destroy_process_group()


def test_processes_may_end_with_a_reduction_under_way() -> None:
    assert run_ranks(2, _ends_without_a_word) == [None, None]
