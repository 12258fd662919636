"""A training loop of one's own on any number of ranks: stop it, start it with another number.

torchrun --nproc-per-node 2 docs/examples/own_loop.py run-folder [steps]
"""

from __future__ import annotations

import sys

import torch
import torch.distributed as dist
from torch import nn

from elastic_kfac.elastic import (
    KFAC,
    Communicator,
    ElasticState,
    Exchange,
    SampleOrder,
    Totals,
    rank_slice,
)


def train(folder: str, most_steps: int = 10**9) -> str:
    ranks = Communicator.world()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 32), nn.Tanh(), nn.Linear(32, 3)).double()
    images, labels = torch.randn(300, 20).double(), torch.randint(0, 3, (300,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.7)
    kfac = KFAC(model, lr=optimizer, damping=0.01, process_group=ranks)
    state = ElasticState(model, optimizer, kfac, folder=folder, communicator=ranks)
    exchange = Exchange(model)  # all gradients of a step as one flat vector
    for epoch, first, count in state.batches(len(images), batch_size=64, epochs=4):
        begin, size = rank_slice(first, count, ranks.rank, ranks.world_size)
        ids = SampleOrder(len(images), 0, epoch).ids(begin, size)
        exchange.begin_step()
        loss = nn.functional.cross_entropy(model(images[ids]), labels[ids], reduction="sum") / count
        loss.backward()
        exchange.end_pass(size)
        exchange.reduce(ranks, Totals(count=size))
        exchange.publish_gradients()
        kfac.step(num_samples=size, loss_scale_per_sample=1 / count)
        optimizer.step()
        state.commit(epoch, first, count)
        most_steps -= 1
        if most_steps == 0:
            break
    return state.save()


if __name__ == "__main__":
    dist.init_process_group("gloo")
    print(train(sys.argv[1], *map(int, sys.argv[2:])))
    dist.destroy_process_group()
