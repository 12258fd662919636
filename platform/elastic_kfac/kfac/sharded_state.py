"""The state of a ShardedKFAC at no world size: gathered from owners, dealt out to owners again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from elastic_kfac.communication.packing import Bucketer
from elastic_kfac.kfac.kfac_state import check_state, load_layers
from elastic_kfac.kfac.refresh import RefreshClock, Snapshots

if TYPE_CHECKING:
    from elastic_kfac.kfac.sharded_kfac import ShardedKFAC

STATE_VERSION = 1


def gather_state(optimizer: ShardedKFAC) -> dict[str, Any]:
    """Everything, equal on every rank. Collective."""
    communicator = optimizer.communicator
    facts: dict[str, Any] = {}
    for unit in optimizer.owned:
        if unit.block is not None:
            facts[unit.name] = {
                "factor_updates": unit.block.factor_updates,
                "inverse_step": unit.block.inverse_step,
                "factors": sorted(unit.block.factors),
                "second_order": sorted(unit.block.second_order),
                "snapshots": {
                    name: len(optimizer.snapshots[unit.name, name].tensors)
                    for name in unit.block.factor_names
                    if (unit.name, name) in optimizer.snapshots
                },
            }
    known: dict[str, Any] = {}
    for part in communicator.all_gather_object(facts, tag="sharded/state"):
        known.update(part)
    moving = bool(sum(communicator.all_gather_object(len(optimizer.velocity), tag="sharded/state")))
    bucketer = Bucketer(communicator, tag="sharded/state")
    layers, snapshots, velocity = {}, {}, {}
    for unit in optimizer.units:
        owner = optimizer.owners[unit.name]
        mine = communicator.rank == owner

        def share(
            own: Tensor | None,
            shape: tuple[int, ...],
            dtype: torch.dtype,
            device: torch.device,
            owner: int = owner,
            mine: bool = mine,
        ) -> Tensor:
            tensor = torch.zeros(shape, dtype=dtype, device=device)
            if mine and own is not None:
                tensor.copy_(own)
            bucketer.broadcast(tensor, owner)
            return tensor

        if moving and optimizer.gather == "weights":
            for name, p in unit.parameters:
                velocity[name] = share(optimizer.velocity.get(name), p.shape, p.dtype, p.device)
        block = unit.block
        if block is None:
            continue
        fact = known[unit.name]
        layers[unit.name] = {
            "factor_updates": fact["factor_updates"],
            "inverse_step": fact["inverse_step"],
            "factors": {
                n: share(block.factors.get(n), block.factor_shapes[n], block.dtype, block.device)
                for n in fact["factors"]
            },
            "second_order": {
                n: share(
                    block.second_order.get(n),
                    block.second_order_shapes[n],
                    block.dtype,
                    block.device,
                )
                for n in fact["second_order"]
            },
        }
        snapshots[unit.name] = {
            name: [
                share(
                    optimizer.snapshots[unit.name, name].tensors[index] if mine else None,
                    block.factor_shapes[name],
                    block.dtype,
                    block.device,
                )
                for index in range(count)
            ]
            for name, count in fact["snapshots"].items()
        }
    bucketer.flush().wait()
    counted = communicator.all_gather_object(dict(optimizer.counters), tag="sharded/state")
    return {
        "version": STATE_VERSION,
        "options": _identity(optimizer),
        "counters": _total(counted),
        "layers": layers,
        "velocity": velocity,
        "snapshots": snapshots,
        "clocks": {
            layer: {name: clock.state_dict() for name, clock in clocks.items()}
            for layer, clocks in optimizer.clocks.items()
        },
    }


def restore_state(optimizer: ShardedKFAC, state: Mapping[str, Any]) -> None:
    """Each rank takes what it owns under its own plan.

    Raises:
        StateError: If the state belongs to another model or other options.
    """
    check_state(state, STATE_VERSION, _identity(optimizer), optimizer.blocks)
    rank = optimizer.communicator.rank
    load_layers(optimizer.blocks, state["layers"], lambda b: optimizer.owners[b.name] == rank)
    optimizer.velocity, optimizer.snapshots = {}, {}
    for unit in optimizer.units:
        if optimizer.owners[unit.name] != rank:
            if unit.block is not None:
                unit.block.factors = {}
            continue
        for name, parameter in unit.parameters:
            if name in state["velocity"]:
                saved = state["velocity"][name]
                optimizer.velocity[name] = saved.detach().to(parameter.device, copy=True)
        if unit.block is not None:
            for name, tensors in state["snapshots"].get(unit.name, {}).items():
                placed = unit.block.placed({str(i): t for i, t in enumerate(tensors)})
                optimizer.snapshots[unit.name, name] = Snapshots(tuple(placed.values()))
    optimizer.clocks = {
        layer: {name: RefreshClock.from_state(clock) for name, clock in clocks.items()}
        for layer, clocks in state["clocks"].items()
    }
    counters = {name: int(value) for name, value in state["counters"].items()}
    # Events were counted where they happened; from now on they belong to rank 0.
    optimizer.counters = Counter(counters if rank == 0 else {"steps": counters.get("steps", 0)})


def _identity(optimizer: ShardedKFAC) -> dict[str, Any]:
    return {
        "method": optimizer.options.method,
        "bn_fisher": optimizer.options.bn_fisher,
        "refresh": optimizer.refresh,
        "gather": optimizer.gather,
    }


def _total(parts: list[dict[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for part in parts:
        total.update({name: value for name, value in part.items() if name != "steps"})
    return {**total, "steps": parts[0].get("steps", 0)}
