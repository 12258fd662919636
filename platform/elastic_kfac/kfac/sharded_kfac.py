"""ShardedKFAC: K-FAC between the two halves of an all-reduce (Osawa et al., CVPR 2019).

    1, 2  forward and backward on the local share; statistics of what is due
    3     ReduceScatterV of [gradients, packed statistics]: the owner of a layer holds the global means
    4     the owner inverts, preconditions, applies momentum and updates its layers
    5     AllGatherV of the updated weights (or of the preconditioned gradients)

Every layer, and every parameter outside the covered layers, has exactly one owner; factors and momentum
live there only. The gradient's share of the traffic is that of one all-reduce, to the byte.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastic_kfac.communication.agreement import require_agreement
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.packing import pack_triangle, triangle_size, unpack_triangle
from elastic_kfac.communication.v_collectives import (
    VMethod,
    all_gather_v,
    reduce_scatter_half,
    reduce_scatter_v,
)
from elastic_kfac.curvature.block import Block, BlockOptions
from elastic_kfac.curvature.capture import Capture, find_layers
from elastic_kfac.errors import ConfigError, NumericalError, UsageError
from elastic_kfac.kfac.kfac_exchange import as_communicator, layer_shape
from elastic_kfac.kfac.refresh import RefreshClock, Snapshots
from elastic_kfac.kfac.sharded_state import gather_state, restore_state
from elastic_kfac.kfac.units import Unit, find_units
from elastic_kfac.placement.costs import LayerShape, default_costs
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.planner import make_plan

_WIRE = {"fp32": None, "fp16": torch.float16, "bf16": torch.bfloat16}


class ShardedKFAC:
    """K-FAC whose factors and momentum are sharded over the ranks by layer.

    Unlike `KFAC` it does its own communication: call `backward()` on every rank, do NOT average the
    gradients, then `step()`. With `gather="weights"` it is the optimizer too; with
    `gather="gradients"` it leaves preconditioned global gradients for any optimizer.

    Args:
        model: As for `KFAC`.
        lr: Of the update `θ ← θ − lr·P + m·(θ − θ_before)` (only `gather="weights"`); set the attribute
            to change it between steps.
        momentum: m of that update; an attribute too.
        damping: γ.
        factor_decay: Weight of the OLD factor; 0, no averaging, is what the large-batch recipes use.
        refresh: `fixed` refreshes every `factor_update_steps` steps, `adaptive` by SP-NGD's rule.
        refresh_threshold: α of the adaptive rule.
        method: `inverse` (the published choice) or `eigen`.
        inverse_damping: How `inverse` splits γ.
        kl_clip: Bound on the KL of a step, measured over all owners; None, as published, for none.
        weight_decay: Added to the gradient before preconditioning; γ grows by it (coupled form).
        gather: `weights` or `gradients`.
        v_method: How V-collectives run: `per_owner`, `padded` or `fused`.
        wire: `fp32`, or `fp16` / `bf16` for gradients and statistics on the way to their owners. The
            error in P is that of the wire (5e-4 for fp16) times the ratio of a factor's largest
            eigenvalue to its share of the damping: below 1 % at γ = 0.1 and true scale, several times
            that at γ = 0.01.
        process_group: As for `KFAC`.

    Raises:
        ConfigError: A value out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        lr: float = 0.1,
        momentum: float = 0.9,
        damping: float = 1e-3,
        factor_decay: float = 0.0,
        factor_update_steps: int = 1,
        refresh: Literal["fixed", "adaptive"] = "fixed",
        refresh_threshold: float = 0.1,
        method: Literal["eigen", "inverse"] = "inverse",
        inverse_damping: Literal["pi", "sqrt", "plain"] = "pi",
        bn_fisher: Literal["unit", "full", "diag"] = "unit",
        bn_damping_multiplier: float = 1.0,
        kl_clip: float | None = None,
        weight_decay: float = 0.0,
        gather: Literal["weights", "gradients"] = "weights",
        v_method: VMethod = "per_owner",
        wire: Literal["fp32", "fp16", "bf16"] = "fp32",
        skip_layers: Sequence[str] = (),
        process_group: dist.ProcessGroup | Communicator | None = None,
    ) -> None:
        for name, value, good in (
            ("damping", damping, damping > 0),
            ("factor_decay", factor_decay, 0 <= factor_decay < 1),
            ("factor_update_steps", factor_update_steps, factor_update_steps >= 1),
            ("refresh", refresh, refresh in ("fixed", "adaptive")),
            ("refresh_threshold", refresh_threshold, refresh_threshold > 0),
            ("gather", gather, gather in ("weights", "gradients")),
            ("wire", wire, wire in _WIRE),
            ("momentum", momentum, 0 <= momentum < 1),
            ("kl_clip", kl_clip, kl_clip is None or kl_clip > 0),
        ):
            if not good:
                raise ConfigError(f"{name} is out of range", given=value)
        self.lr, self.momentum, self.damping = lr, momentum, damping
        self.factor_decay, self.factor_update_steps = factor_decay, factor_update_steps
        self.refresh, self.refresh_threshold = refresh, refresh_threshold
        self.kl_clip, self.weight_decay = kl_clip, weight_decay
        self.gather, self.v_method = gather, v_method
        self.wire = wire
        self.options = BlockOptions(
            method=method,
            inverse_damping=inverse_damping,
            bn_fisher=bn_fisher,
            bn_damping_multiplier=bn_damping_multiplier,
        )
        self.counters: Counter[str] = Counter()
        layers = find_layers(model, self.options, skip_layers)
        self.units = find_units(model, [block for layer in layers for block in layer.blocks])
        self.clocks: dict[str, dict[str, RefreshClock]] = {
            unit.name: {factor: RefreshClock() for factor in unit.block.factor_names}
            for unit in self.units
            if unit.block is not None
        }
        self.snapshots: dict[tuple[str, str], Snapshots] = {}
        self.velocity: dict[str, Tensor] = {}
        self._capture = Capture(layers, fisher="empirical")
        self._join(as_communicator(process_group))
        self._arm()

    # -- ownership -----------------------------------------------------------------------------

    def _join(self, communicator: Communicator) -> None:
        self.communicator = communicator
        shapes = [
            layer_shape(u.block) if u.block is not None else LayerShape(u.name, 0, 0, u.elements)
            for u in self.units
        ]
        world_size = communicator.world_size
        self.plan: Plan = make_plan(
            shapes,
            world_size,
            1.0 / world_size,
            costs=default_costs("eigen" if self.options.method == "eigen" else "inverse"),
        )
        if world_size > 1:
            require_agreement(
                communicator,
                {
                    **{f"sharded.{name}": value for name, value in vars(self.options).items()},
                    "sharded.gather": self.gather,
                    "sharded.refresh": self.refresh,
                    **{f"layer {u.name}": u.elements for u in self.units},
                    "plan": self.plan.sha256,
                },
                what="the K-FAC model and options",
                tag="sharded/agree",
            )
        self.owners = {u.name: self.plan.placement(u.name).a_worker for u in self.units}
        self._by_owner = [
            [u for u in self.units if self.owners[u.name] == rank] for rank in range(world_size)
        ]

    @property
    def owned(self) -> list[Unit]:
        """The units of this rank."""
        return self._by_owner[self.communicator.rank]

    @property
    def steps(self) -> int:
        """Updates so far."""
        return self.counters["steps"]

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The curvature blocks of all covered layers; factors are at their owners only."""
        return tuple(u.block for u in self.units if u.block is not None)

    def _arm(self) -> None:
        """Tells the hooks which statistics the next passes are to gather."""
        anything = False
        for unit in self.units:
            if unit.block is not None:
                unit.block.collected = frozenset(self._due(unit))
                anything |= bool(unit.block.collected)
        self._capture.active = anything

    def _due(self, unit: Unit) -> list[str]:
        if unit.block is None:
            return []
        if self.refresh == "fixed":
            due = self.steps % self.factor_update_steps == 0
            return list(unit.block.factor_names) if due else []
        clocks = self.clocks[unit.name]
        return [name for name in unit.block.factor_names if clocks[name].due(self.steps)]

    # -- one step ------------------------------------------------------------------------------

    @torch.no_grad()
    def step(
        self, num_samples: int | None = None, loss_scale_per_sample: float | None = None
    ) -> None:
        """Stages 3 to 5; a collective call.

        Local gradients must add up over the ranks to the gradient of the global mean loss: divide each
        sample's loss by the global batch size.

        Args:
            num_samples: Samples in this rank's loss since the last step; None counts them.
            loss_scale_per_sample: What one sample's loss was multiplied by; None means one over the
                global number of samples.

        Raises:
            UsageError: If no rank has seen any sample.
            NumericalError: If the first decomposition of a layer fails in every way.
        """
        counts = self._global_counts(num_samples)
        own = self._reduce_scatter(counts, loss_scale_per_sample)
        refreshed = self._unpack(own)
        self._decompose(refreshed)
        preconditioned = self._precondition()
        if self.gather == "weights":
            self._update(preconditioned)
        self._all_gather(preconditioned)
        self._share_intervals(refreshed)
        self.counters["steps"] += 1
        self._arm()

    def _global_counts(self, num_samples: int | None) -> dict[str, tuple[float, float]]:
        """(samples, rows) of every unit with due statistics, over all ranks."""
        due = [u for u in self.units if u.block is not None and u.block.collected]
        if not due:
            return {}
        local = []
        for unit in due:
            assert unit.block is not None
            pending = unit.block.pending
            local.append((pending.samples if num_samples is None else num_samples, pending.rows))
        totals = torch.tensor(local, dtype=torch.float64, device=due[0].parameters[0][1].device)
        self.communicator.all_reduce(totals, tag="sharded/counts").wait()
        values = [(samples, rows) for samples, rows in totals.tolist()]
        if not any(rows for _, rows in values):
            raise UsageError(
                "step() found no statistics of a forward and backward pass on any rank",
                change="run a pass in training mode before step()",
            )
        return {unit.name: value for unit, value in zip(due, values, strict=True)}

    def _due_factors(self, unit: Unit, counts: Mapping[str, tuple[float, float]]) -> list[str]:
        """Factors of a unit that travel in this step; none for a layer nobody used."""
        if unit.block is None or not counts.get(unit.name, (0.0, 0.0))[1]:
            return []
        return [name for name in unit.block.factor_names if name in unit.block.collected]

    def _reduce_scatter(
        self, counts: Mapping[str, tuple[float, float]], loss_scale: float | None
    ) -> Tensor:
        parts: list[Tensor] = []
        sizes = []
        self._travelling = {u.name: self._due_factors(u, counts) for u in self.units}
        for units in self._by_owner:
            size = 0
            for unit in units:
                for part in self._payload(unit, counts, loss_scale):
                    parts.append(part)
                    size += part.numel()
            sizes.append(size)
        flat = torch.cat(parts) if parts else torch.zeros(0)
        half = _WIRE[self.wire]
        if half is None:
            return reduce_scatter_v(
                self.communicator, flat, sizes, method=self.v_method, tag="sharded/reduce"
            )
        return reduce_scatter_half(
            self.communicator, parts, sizes, half, method=self.v_method, tag="sharded/reduce"
        )

    def _payload(
        self,
        unit: Unit,
        counts: Mapping[str, tuple[float, float]],
        loss_scale: float | None,
    ) -> list[Tensor]:
        """Gradients, then packed local shares of the global means of due statistics."""
        parts = []
        for _, parameter in unit.parameters:
            grad = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
            parts.append(grad.reshape(-1))
        block = unit.block
        if block is None:
            return parts
        travelling = self._travelling[unit.name]
        if not travelling:
            block.drop_pending()
            return parts
        samples, rows = counts[unit.name]
        sums = block.take_pending(1.0 / samples if loss_scale is None else loss_scale, 1.0)
        normalizers = block.normalizers(samples, rows)
        for name in travelling:
            mean = sums[name].div_(normalizers[name])
            packed = mean if block.is_diagonal(name) else pack_triangle(mean)
            parts.append(packed.reshape(-1).to(parts[0].dtype))
        return parts

    def _unpack(self, own: Tensor) -> list[tuple[Unit, str]]:
        """Global means into `.grad` and the factors of owned units."""
        refreshed, start = [], 0
        for unit in self.owned:
            for _, parameter in unit.parameters:
                values = own[start : start + parameter.numel()].view(parameter.shape)
                parameter.grad = values.to(parameter.dtype)
                start += parameter.numel()
            block = unit.block
            for name in self._travelling[unit.name]:
                assert block is not None
                shape = block.factor_shapes[name]
                if block.is_diagonal(name):
                    size = torch.Size(shape).numel()
                    mean = own[start : start + size].view(shape).to(block.dtype).clone()
                else:
                    size = torch.Size(shape[:-2]).numel() * triangle_size(shape[-1])
                    packed = own[start : start + size].view(*shape[:-2], -1).to(block.dtype)
                    mean = unpack_triangle(packed, shape[-1])
                start += size
                if not bool(torch.isfinite(mean.sum())):
                    self.counters["discarded_statistics"] += 1
                    continue
                key = (unit.name, name)
                if self.refresh == "adaptive":
                    clock = self.clocks[unit.name][name]
                    interval = self.snapshots.setdefault(key, Snapshots()).choose_interval(
                        mean, clock, self.refresh_threshold
                    )
                    self.clocks[unit.name][name] = clock.advanced(self.steps, interval)
                block.update_factor(name, mean, 1.0, self.factor_decay)
                refreshed.append((unit, name))
        return refreshed

    def _decompose(self, refreshed: Sequence[tuple[Unit, str]]) -> None:
        self.counters["refreshes"] += len(refreshed)
        for unit in dict.fromkeys(unit for unit, _ in refreshed):
            block = unit.block
            assert block is not None
            block.factor_updates += 1
            if len(block.factors) < len(block.factor_names):
                continue
            try:
                block.second_order.update(block.decompose(block.factor_names, self._damping))
                block.inverse_step = self.steps
            except NumericalError:
                self.counters["inverse_failures"] += 1
                if block.inverse_step < 0:
                    raise

    @property
    def _damping(self) -> float:
        return self.damping + self.weight_decay

    def _precondition(self) -> dict[str, list[Tensor]]:
        """P of every owned unit, one tensor per parameter."""
        result: dict[str, list[Tensor]] = {}
        inner = torch.zeros((), dtype=torch.float64)
        for unit in self.owned:
            block = unit.block
            if block is not None and block.inverse_step >= 0:
                gradient = block.gradient(self.weight_decay)
                value = block.precondition(gradient, self._damping)
                if block.guarded and not bool(torch.isfinite(value).all()):
                    self.counters["raw_gradients"] += 1
                    value = gradient
                inner = (
                    inner + torch.dot(value.reshape(-1), gradient.reshape(-1)).double().cpu().abs()
                )
                block.set_gradient(value)
            result[unit.name] = [p.grad for _, p in unit.parameters if p.grad is not None]
        if self.kl_clip is not None:
            self.communicator.all_reduce(inner, tag="sharded/kl").wait()
            total = float(inner) * self.lr * self.lr
            scale = min(1.0, (self.kl_clip / total) ** 0.5) if total > 0 else 1.0
            for unit in self.owned:
                if unit.block is not None and unit.block.inverse_step >= 0:
                    torch._foreach_mul_(result[unit.name], scale)
        return result

    def _update(self, preconditioned: Mapping[str, Sequence[Tensor]]) -> None:
        for unit in self.owned:
            for (name, parameter), step in zip(
                unit.parameters, preconditioned[unit.name], strict=True
            ):
                velocity = self.velocity.get(name)
                if velocity is None:
                    velocity = self.velocity[name] = torch.zeros_like(parameter)
                velocity.mul_(self.momentum).add_(step, alpha=-self.lr)
                parameter.add_(velocity)

    def _all_gather(self, preconditioned: Mapping[str, Sequence[Tensor]]) -> None:
        like = self.units[0].parameters[0][1]
        parts = [
            (parameter if self.gather == "weights" else value).reshape(-1)
            for unit in self.owned
            for (_, parameter), value in zip(
                unit.parameters, preconditioned[unit.name], strict=True
            )
        ]
        own = torch.cat(parts) if parts else torch.zeros(0, dtype=like.dtype, device=like.device)
        sizes = [sum(u.elements for u in units) for units in self._by_owner]
        flat = all_gather_v(
            self.communicator, own.detach(), sizes, method=self.v_method, tag="sharded/gather"
        )
        start = 0
        for units in self._by_owner:
            for unit in units:
                for _, parameter in unit.parameters:
                    values = flat[start : start + parameter.numel()].view(parameter.shape)
                    start += parameter.numel()
                    if self.gather == "weights":
                        parameter.copy_(values)
                    else:
                        parameter.grad = values.clone()

    def _share_intervals(self, refreshed: Sequence[tuple[Unit, str]]) -> None:
        """Owners tell the intervals that they chose; a few numbers, only when something was due."""
        if self.refresh == "fixed":
            return
        due = [(u, name) for u in self.units for name in self._travelling[u.name]]
        if not due:
            return
        chosen = torch.zeros(len(due), dtype=torch.float64)
        mine = {(unit.name, name) for unit, name in refreshed}
        for index, (unit, name) in enumerate(due):
            if (unit.name, name) in mine:
                chosen[index] = self.clocks[unit.name][name].interval
        chosen = chosen.to(self.units[0].parameters[0][1].device)
        self.communicator.all_reduce(chosen, tag="sharded/intervals").wait()
        for (unit, name), interval in zip(due, chosen.tolist(), strict=True):
            if (unit.name, name) not in mine:
                clock = self.clocks[unit.name][name]
                # 0: its owner discarded the statistic, so it is due again at once.
                if interval:
                    self.clocks[unit.name][name] = clock.advanced(self.steps, int(interval))

    # -- state ---------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The world-size-free state, by layer and parameter name; a collective call."""
        return gather_state(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from `state_dict()` of any world size; each rank keeps what it owns.

        Raises:
            StateError: If it belongs to another model or other options.
        """
        restore_state(self, state)
        self._arm()

    def memory_usage(self) -> dict[str, int]:
        """Bytes of factors, decompositions, snapshots and momentum on this rank."""
        usage = {"factors": 0, "second_order": 0, "snapshots": 0, "momentum": 0}
        for block in self.blocks:
            usage["factors"] += _bytes(block.factors.values())
            usage["second_order"] += _bytes(block.second_order.values())
        for snapshots in self.snapshots.values():
            usage["snapshots"] += _bytes(snapshots.tensors)
        usage["momentum"] = _bytes(self.velocity.values())
        return {**usage, "total": sum(usage.values())}

    def close(self) -> None:
        """Removes the hooks."""
        self._capture.close()


def _bytes(tensors: Any) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
