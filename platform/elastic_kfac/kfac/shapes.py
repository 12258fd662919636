"""Layers as placement sees them, and the plans that follow: pure functions of a model and its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import nn

from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.curvature.discovery import clean_name, find_layers, unwrap
from elastic_kfac.curvature.kronecker import KroneckerLayer
from elastic_kfac.curvature.layer import Layer
from elastic_kfac.curvature.sides import Blocks, LowRank
from elastic_kfac.kfac.options import value_at
from elastic_kfac.placement.choice import auto_fraction, kfac_workload
from elastic_kfac.placement.costs import LayerShape
from elastic_kfac.placement.devices import stored_calibration
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.planner import make_plan, over_budget
from elastic_kfac.placement.simulator import Calibration
from elastic_kfac.placement.traffic import memory_elements


def layer_shape(layer: Layer) -> LayerShape:
    """The sizes of one layer: widths of its dense factors, elements of its weight and bias."""
    weights = prod(layer.gradient_shape)
    shapes = layer.factor_shapes
    if "F" in shapes:
        dense = weights if len(shapes["F"]) == 2 else 0
        blocks = None if dense else prod(shapes["F"])
        return LayerShape(
            layer.name, 0, dense, weights, diagonal=blocks, one_factor=True, kept=layer.kept
        )
    assert isinstance(layer, KroneckerLayer)
    diagonal = [shape[0] for shape in shapes.values() if len(shape) == 1]
    a, g = (shapes[n][-1] if len(shapes.get(n, ())) > 1 else 0 for n in ("A", "G"))
    sides = layer.sides["A"], layer.sides.get("G")
    counts = [side.count if isinstance(side, Blocks) else 1 for side in sides]
    ranks = [side.rank if isinstance(side, LowRank) else 0 for side in sides]
    return LayerShape(
        layer.name,
        a,
        g,
        weights,
        layer.groups,
        diagonal=sum(diagonal) or (None if "G" in shapes else 0),
        one_factor="G" not in shapes,
        a_blocks=counts[0],
        g_blocks=counts[1],
        a_rank=ranks[0],
        g_rank=ranks[1],
        kept=layer.kept,
    )


@dataclass(frozen=True)
class Unit:
    """Parameters with one owner: layers that share parameters, or a parameter outside all layers."""

    name: str
    parameters: Mapping[str, nn.Parameter]
    layers: tuple[int, ...] = ()

    @property
    def elements(self) -> int:
        """Elements of its parameters together."""
        return sum(p.numel() for p in self.parameters.values())


def find_units(model: nn.Module, layers: Sequence[Layer]) -> list[Unit]:
    """Covered layers in registration order, joined where they share parameters (packed attention
    projections), then every other trainable parameter."""
    names = {
        id(p): clean_name(name) for name, p in unwrap(model).named_parameters() if p.requires_grad
    }
    units: list[Unit] = []
    covered: dict[int, int] = {}
    for index, layer in enumerate(layers):
        own = {names[id(p)]: p for p in layer.parameters}
        place = next((covered[id(p)] for p in layer.parameters if id(p) in covered), len(units))
        if place == len(units):
            units.append(Unit(layer.name, own, (index,)))
        else:
            first = units[place]
            units[place] = Unit(first.name, {**first.parameters, **own}, (*first.layers, index))
        covered.update((id(p), place) for p in layer.parameters)
    for name, parameter in unwrap(model).named_parameters():
        if parameter.requires_grad and id(parameter) not in covered:
            units.append(Unit(clean_name(name), {clean_name(name): parameter}))
    return units


def unit_shape(unit: Unit, layers: Sequence[Layer]) -> LayerShape:
    """The sizes of one unit."""
    if not unit.layers:
        return LayerShape(unit.name, 0, 0, unit.elements, diagonal=0)
    shapes = [layer_shape(layers[index]) for index in unit.layers]
    widest = max(shapes, key=lambda shape: shape.a_dim)
    copies = sum(shape.copies for shape in shapes)
    return replace(widest, name=unit.name, weight_elements=unit.elements, copies=copies)


def shapes(
    model: nn.Module, options: KfacOptions, *, sharded: bool = False
) -> tuple[LayerShape, ...]:
    """The shapes that a plan places: covered layers, or units with one owner each if `sharded`.

    Raises:
        ConfigError: If K-FAC covers no layer.
    """
    layers = find_layers(model, options).layers
    if sharded:
        return tuple(unit_shape(unit, layers) for unit in find_units(model, layers))
    return tuple(map(layer_shape, layers))


def plan_of(
    shapes: Sequence[LayerShape],
    world_size: int,
    options: KfacOptions,
    *,
    sharded: bool = False,
    calibration: Calibration | None = None,
    memory_budget_bytes: float | None = None,
    element_bytes: int = 4,
    device_type: str = "cpu",
    previous: Plan | None = None,
    previous_ranks: Sequence[int | None] | None = None,
) -> Plan:
    """The plan of `shapes` at a world size.

    Args:
        shapes: As from the function `shapes`.
        world_size: Number of ranks.
        options: `grad_worker_frac`, `method` and the other options of K-FAC.
        sharded: Whether every shape has a single owner, instead of a share of gradient workers.
        calibration: Measured costs; by default stored ones of the layers' kind of device.
        memory_budget_bytes: Limit per rank for factors and decompositions together.
        element_bytes: Bytes per element of factors and decompositions.
        device_type: Of the layers, for costs that were not measured.
        previous: See `make_plan`.
        previous_ranks: See `make_plan`.

    Raises:
        ConfigError: If the plan does not fit the budget.
    """
    calibration = calibration or stored_calibration(options.method, device_type)
    fraction: float | str = 1.0 / world_size if sharded else options.grad_worker_frac
    reason = ""
    if isinstance(fraction, str):
        workload = kfac_workload(
            shapes,
            inverse_update_steps=int(value_at(options, "inverse_update_steps", 0)),
            method=options.method,
            precompute=options.precompute,
            colocate=options.colocate,
            element_bytes=element_bytes,
        )
        chosen = auto_fraction(
            workload,
            calibration,
            world_size,
            memory_budget_bytes=memory_budget_bytes,
            previous=previous,
        )
        fraction, reason = chosen.fraction, chosen.reason
    plan = make_plan(
        shapes,
        world_size,
        fraction,
        colocate=sharded or options.colocate,
        costs=calibration.costs,
        speeds=calibration.decomposition_speeds(world_size),
        previous=previous,
        previous_ranks=previous_ranks,
    )
    if memory_budget_bytes is not None:
        held = memory_elements(
            plan, shapes, method=options.method, precompute=options.precompute, sharded=sharded
        )
        if max(held) * element_bytes > memory_budget_bytes:
            raise over_budget(memory_budget_bytes, max(held) * element_bytes, plan)
    return replace(plan, reason=reason)
