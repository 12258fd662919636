"""What wrappers of a model and calls of single ranks cannot do ends in one line, on every rank."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from elastic_kfac import KFAC, KFACOptimizer
from elastic_kfac.errors import ElasticKfacError
from support.gloo import disband, run_ranks
from support.training_loops import X, Y, loss_of, mlp


def _train(model: nn.Module, kfac: KFAC, steps: int) -> Iterator[int]:
    for done in range(1, steps + 1):
        model.zero_grad()
        loss_of(model).backward()
        kfac.step()
        yield done


def _in_join(early: bool) -> tuple[str, int]:
    model = DistributedDataParallel(mlp())
    kfac = KFAC(model)
    done = 0
    try:
        with model.join(throw_on_early_termination=early):
            for step in _train(model, kfac, 3 - dist.get_rank()):
                done = step
    except (ElasticKfacError, RuntimeError) as error:  # torch's own: a rank has no batch left
        return str(error), done
    return "", done


def test_join_is_refused_on_every_rank_and_works_where_it_ends_for_all() -> None:
    for error, _ in run_ranks(2, _in_join, False):
        assert "join() early" in error and "\n" not in error
    assert [done for _, done in run_ranks(2, _in_join, True)] == [2, 2]


def _state_on_one_rank() -> tuple[str, float, set[str]]:
    model = DistributedDataParallel(mlp())
    kfac = KFAC(model, grad_worker_frac=0.5)
    list(_train(model, kfac, 1))
    error, begin = "", time.perf_counter()
    if dist.get_rank() == 0:
        try:
            kfac.state_dict()
        except ElasticKfacError as raised:
            error = str(raised)
    else:
        time.sleep(8)
    seconds = time.perf_counter() - begin
    state = kfac.state_dict()  # everybody: rank 0's failed call has left nothing behind
    return error, seconds, set(state["layers"])


def test_a_state_that_one_rank_asks_for_ends_in_one_line_within_the_timeout() -> None:
    (error, seconds, layers), (_, _, others) = run_ranks(2, _state_on_one_rank, group_timeout_s=6)
    assert "1 of 2 ranks within 6 s" in error and "\n" not in error
    assert seconds < 12
    assert layers == others == {"0", "2"}


def _built_before_the_group() -> tuple[list[torch.Tensor], int]:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    store = disband()
    model = mlp()
    optimizer = KFACOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    dist.init_process_group(
        "gloo", store=dist.PrefixStore("later", store), rank=rank, world_size=world_size
    )
    wrapped = DistributedDataParallel(model)
    part = slice(rank * 8 // world_size, (rank + 1) * 8 // world_size)
    for _ in range(3):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(wrapped(X[part]), Y[part]).backward()
        optimizer.step()
    return [p.detach() for p in model.parameters()], optimizer.kfac.plan.world_size


def test_optimizer_that_is_built_before_the_group_joins_it() -> None:
    model = mlp()
    optimizer = KFACOptimizer(model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    for parameters, planned in run_ranks(2, _built_before_the_group):
        assert planned == 2
        torch.testing.assert_close(parameters, list(model.parameters()), rtol=1e-10, atol=1e-12)
