"""Sharded by owner: K-FAC between the two halves of an all-reduce (Osawa et al., CVPR 2019).

    gradients     local, of each rank's share of the batch
    reduce        reduce-scatter of [gradients, packed statistics] ─▶ owner of a layer: global means
    owner         averages factors, decomposes, preconditions, (momentum, update)
    publish       all-gather of updated weights, or of gradients ───▶ every rank

Every layer, and every parameter outside the covered layers, has exactly one owner; factors,
decompositions and momentum live there only. The gradient's share of the traffic is that of one
all-reduce, to the byte.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.packing import pack_triangle, triangle_size, unpack_triangle
from elastic_kfac.communication.v_collectives import (
    all_gather_v,
    begin_reduce_scatter_v,
    reduce_scatter_half,
)
from elastic_kfac.config.kfac import ShardedConfig
from elastic_kfac.curvature.layer import Layer, LayerState
from elastic_kfac.kfac.distribution.strategy import (
    Basis,
    Distribution,
    Gradients,
    Item,
    Slot,
    States,
)
from elastic_kfac.kfac.options import Rates
from elastic_kfac.kfac.shapes import Unit, find_units, plan_of, unit_shape
from elastic_kfac.kfac.statistics import Captured, Coming, Statistics, reduced
from elastic_kfac.placement.plan import Plan

_WIRE = {"fp16": torch.float16, "bf16": torch.bfloat16}


class ShardedByOwner(Distribution):
    """One owner per layer; local gradients in, preconditioned gradients or updated weights out.

    Local gradients must add up over the ranks to the gradient of the global mean loss: divide each
    sample's loss by the global batch size. With `gather="weights"` owners apply
    `v ← m·v − lr·P, θ ← θ + v` with the rates of KFAC's `lr`.
    """

    sums_gradients = True
    counts_are_local = True

    def __init__(self, basis: Basis, *, model: nn.Module, sharding: ShardedConfig) -> None:
        layers = basis.layers
        self.sharding = sharding
        self.updates_weights = sharding.gather == "weights"
        self.units = self._find_units(model, layers)
        self._unit_of = {index: unit for unit in self.units for index in unit.layers}
        self._unit_named = {layers[i].name: unit for i, unit in self._unit_of.items()}
        self._unit_named |= {name: unit for unit in self.units for name in unit.parameters}
        self.velocity: dict[str, Tensor] = {}
        super().__init__(basis)

    def _find_units(self, model: nn.Module, layers: Sequence[Layer]) -> list[Unit]:
        return find_units(model, layers)

    def join(
        self,
        communicator: Communicator,
        previous: Plan | None = None,
        previous_ranks: Sequence[int | None] | None = None,
    ) -> None:
        self.communicator, self.rank = communicator, communicator.rank
        world_size = communicator.world_size
        self.plan = plan_of(
            [unit_shape(unit, self.layers) for unit in self.units],
            world_size,
            self.options,
            sharded=True,
            calibration=self.calibration,
            memory_budget_bytes=self.options.memory_budget_bytes,
            element_bytes=self.layers[0].dtype.itemsize,
            device_type=self.layers[0].device.type,
            previous=previous,
            previous_ranks=previous_ranks,
        )
        facts: dict[str, object] = {f"unit {u.name}": u.elements for u in self.units}
        facts["sharded.gather"] = self.sharding.gather
        self.require_agreement(facts, tag="sharded/agree")
        self._by_owner: list[list[Unit]] = [[] for _ in range(world_size)]
        for unit in self.units:
            self._by_owner[self._owner(unit)].append(unit)

    # -- roles ----------------------------------------------------------------------------------

    def _owner(self, unit: Unit) -> int:
        return self.plan.placement(unit.name).a_worker

    @property
    def owned(self) -> list[Unit]:
        """The units of this rank."""
        return self._by_owner[self.rank]

    def decider(self, index: int) -> int:
        return self._owner(self._unit_of[index])

    def decomposes(self, index: int) -> tuple[str, ...]:
        owned = self.decider(index) == self.rank
        return self.layers[index].factor_names if owned else ()

    def keeps(self, item: Item, rank: int) -> bool:
        return self._owner(self._unit_named[item.name]) == rank

    def preconditioned_here(self, states: States) -> list[int]:
        indices = (index for unit in self.owned for index in unit.layers)
        return [index for index in indices if states[index].inverse_step >= 0]

    # -- reduce ---------------------------------------------------------------------------------

    def begin_reduction(self, captured: Captured) -> Coming:
        # What is sent depends on the counts: they are waited for, as they are few.
        found = self._global_facts(captured)
        counts = found.counts
        due = [
            names if rows else frozenset[str]()
            for names, (_, rows) in zip(captured.due, counts, strict=True)
        ]
        parts: list[Tensor] = []
        sizes = []
        for units in self._by_owner:
            own = [part for unit in units for part in self._payload(unit, captured, due, counts)]
            parts += own
            sizes.append(sum(part.numel() for part in own))
        received, held = self._begin_reduce_scatter(parts, sizes)
        return Coming(
            lambda: replace(found, sums=self._unpack(received(), due), are_means=True), held
        )

    def _global_facts(self, captured: Captured) -> Statistics:
        """What all ranks know of the layers with statistics that are due."""
        local, indices = captured.facts, [i for i, names in enumerate(captured.due) if names]
        facts = [(0.0, 0.0, 0.0, 0.0)] * len(self.layers)
        if indices:
            totals = torch.tensor(
                [local[i] for i in indices], dtype=torch.float64, device=self.layers[0].device
            )
            self.communicator.all_reduce(totals, tag="sharded/counts").wait()
            for index, values in zip(indices, totals.tolist(), strict=True):
                facts[index] = values
        return reduced(facts)

    def _payload(
        self,
        unit: Unit,
        captured: Captured,
        due: Sequence[frozenset[str]],
        counts: Sequence[tuple[float, float]],
    ) -> Iterator[Tensor]:
        """Gradients, then packed local shares of the global means of due statistics."""
        first = next(iter(unit.parameters.values()))
        dtype = first.dtype if self.sums_gradients else self.layers[0].dtype
        for parameter in unit.parameters.values() if self.sums_gradients else ():
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            yield grad.reshape(-1)
        for index in unit.layers:
            if not due[index]:
                continue
            layer, (samples, rows) = self.layers[index], counts[index]
            # Local gradients of the global mean; averaged ones are of the mean on this rank.
            scale = 1.0 / samples if self.sums_gradients else None
            sums = captured.scaled(index, due[index], default_loss_scale=scale)
            normalizers = layer.normalizers(samples, rows)
            for name, total in sums.items():
                mean = total.div_(normalizers[name])
                packed = mean if layer.is_diagonal(name) else pack_triangle(mean)
                yield packed.reshape(-1).to(dtype)

    def _begin_reduce_scatter(
        self, parts: list[Tensor], sizes: list[int]
    ) -> tuple[Callable[[], Tensor], list[Tensor]]:
        """What waits for the result, and the tensors under way."""
        method = self.sharding.v_method
        half = _WIRE.get(self.sharding.wire)
        if half is None:
            flat = torch.cat(parts or [self.layers[0].empty()])
            received = begin_reduce_scatter_v(
                self.communicator, flat, sizes, method=method, tag="sharded/reduce"
            )
            return received, [flat]
        result = reduce_scatter_half(
            self.communicator, parts, sizes, half, method=method, tag="sharded/reduce"
        )
        return lambda: result, [result]

    def _unpack(self, received: Tensor, due: Sequence[frozenset[str]]) -> list[dict[str, Tensor]]:
        """Global gradients into `.grad` of owned units; global means of their due statistics."""
        means: list[dict[str, Tensor]] = [{} for _ in self.layers]
        start = 0
        for unit in self.owned:
            for parameter in unit.parameters.values() if self.sums_gradients else ():
                values = received[start : start + parameter.numel()].view(parameter.shape)
                parameter.grad = values.to(parameter.dtype)
                start += parameter.numel()
            for index in unit.layers:
                layer = self.layers[index]
                for name, shape in layer.factor_shapes.items():
                    if name not in due[index]:
                        continue
                    diagonal = layer.is_diagonal(name)
                    packed = shape if diagonal else (*shape[:-2], triangle_size(shape[-1]))
                    part = received[start : start + prod(packed)].view(packed).to(layer.dtype)
                    means[index][name] = (
                        part.clone() if diagonal else unpack_triangle(part, shape[-1])
                    )
                    start += prod(packed)
        return means

    # -- precondition and publish ---------------------------------------------------------------

    def precondition(self, states: States, gradients: Gradients, damping: float) -> list[Tensor]:
        indices, values, used = gradients
        held = [states[i].decomposition for i in indices]
        return self.stacks.of(indices).precondition(held, values, damping, used)

    def total(self, value: Tensor) -> Tensor:
        summed = value.clone()
        self.communicator.all_reduce(summed, tag="sharded/kl").wait()
        return summed

    def publish(self, rates: Rates, step: int) -> None:
        parameters = {name: p for unit in self.owned for name, p in unit.parameters.items()}
        if self.updates_weights:
            for (name, p), (lr, momentum) in zip(
                parameters.items(), rates.of_parameters(parameters.values(), step), strict=True
            ):
                assert p.grad is not None
                velocity = self.velocity.setdefault(name, torch.zeros_like(p))
                velocity.mul_(momentum).add_(p.grad, alpha=-lr)
                p.add_(velocity)
        own = [p if self.updates_weights else p.grad for p in parameters.values()]
        like = next(iter(self.units[0].parameters.values()))
        flat = torch.cat(
            [t.detach().reshape(-1) for t in own if t is not None] or [like[:0].view(-1)]
        )
        sizes = [sum(unit.elements for unit in units) for units in self._by_owner]
        everything = all_gather_v(
            self.communicator, flat, sizes, method=self.sharding.v_method, tag="sharded/gather"
        )
        start = 0
        for p in (p for units in self._by_owner for u in units for p in u.parameters.values()):
            values = everything[start : start + p.numel()].view(p.shape)
            start += p.numel()
            if self.updates_weights:
                p.copy_(values)
            else:
                p.grad = values.clone()

    # -- state ----------------------------------------------------------------------------------

    def collect(self, states: States) -> States:
        owned = [index for unit in self.owned for index in unit.layers]
        facts = {
            index: {
                "ages": (states[index].factor_updates, states[index].inverse_step),
                "floor": states[index].floor,
                "factors": list(states[index].factors),
                "decomposition": list(states[index].decomposition),
            }
            for index in owned
        }
        known: dict[int, dict[str, Any]] = {}
        for part in self.communicator.all_gather_object(facts, tag="sharded/state"):
            known.update(part)
        slots, names = [], []
        for index, layer in enumerate(self.layers):
            like = layer.empty()
            for kind, shapes in (
                ("factors", layer.factor_shapes),
                ("decomposition", layer.decomposition_shapes),
            ):
                for name in known[index][kind]:
                    own = getattr(states[index], kind).get(name)
                    slots.append(Slot(self.decider(index), own, shapes[name], like))
                    names.append((index, kind, name))
        gathered: list[dict[str, dict[str, Tensor]]] = [
            {"factors": {}, "decomposition": {}} for _ in self.layers
        ]
        for (index, kind, name), tensor in zip(names, self.from_owners(slots), strict=True):
            gathered[index][kind][name] = tensor
        return [
            LayerState(
                parts["factors"],
                known[index]["ages"][0],
                parts["decomposition"],
                known[index]["ages"][1],
                known[index]["floor"],
            )
            for index, parts in enumerate(gathered)
        ]

    def held(self) -> dict[Item, dict[str, Tensor]]:
        return {Item("velocity", name): {"": v} for name, v in self.velocity.items()}

    def take(self, items: Mapping[Item, Mapping[str, Tensor]]) -> None:
        self.velocity = {
            item.name: tensors[""] for item, tensors in items.items() if item.kind == "velocity"
        }

    def collect_velocity(self) -> dict[str, Tensor]:
        moving = self.communicator.all_gather_object(bool(self.velocity), tag="sharded/state")
        if not any(moving):
            return {}
        named = {name: (p, unit) for unit in self.units for name, p in unit.parameters.items()}
        slots = [
            Slot(self._owner(unit), self.velocity.get(name), p.shape, p)
            for name, (p, unit) in named.items()
        ]
        return dict(zip(named, self.from_owners(slots), strict=True))

    def restore_velocity(self, saved: Mapping[str, Tensor]) -> None:
        if not self.updates_weights:
            super().restore_velocity(saved)
        self.velocity = {
            name: saved[name].detach().to(p.device, copy=True)
            for unit in self.owned
            for name, p in unit.parameters.items()
            if name in saved
        }
