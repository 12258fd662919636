"""Make a plan: balanced, the same on every rank, and close to the plan before it.

Longest processing time first: layers by decreasing cost (ties by name), each to the rank with the
least load; its column becomes the layer's column. Among ranks of equal load the one whose column has
the least load is taken, then the lowest. With the two factors of a layer on different ranks
(`colocate=False`) the column is the one whose two least loaded ranks end lowest. The makespan stays
within 4/3 of the optimum (Graham 1969).

Costs become whole numbers before anything is compared, so that loads are exact sums and the result
depends neither on the order of additions nor on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.placement.costs import (
    CostModel,
    LayerShape,
    Method,
    default_costs,
    factor_elements,
    second_order_elements,
    weight_elements,
)
from elastic_kfac.placement.packing_search import Packing, settle
from elastic_kfac.placement.plan import (
    LayerPlacement,
    Plan,
    columns_for_fraction,
    grid_columns,
)

__all__ = [
    "LayerShape",
    "Plan",
    "auto_fraction",
    "columns_for_fraction",
    "make_plan",
    "max_second_order_elements",
    "moved_elements",
    "rank_loads",
]

_COST_UNITS = 1 << 32


def make_plan(
    layers: Sequence[LayerShape],
    world_size: int,
    grad_worker_frac: float,
    *,
    colocate: bool = True,
    costs: CostModel | None = None,
    previous: Plan | None = None,
    previous_ranks: Sequence[int | None] | None = None,
) -> Plan:
    """Assign every layer to a column and its factors to inverse workers.

    Args:
        layers: all K-FAC layers in registration order.
        world_size: number of ranks.
        grad_worker_frac: share of ranks that precondition a layer; see `columns_for_fraction`.
        colocate: decompose A and G of a layer on one rank; else on two where the column has two.
        costs: seconds per factor, the same on all ranks; the stored measurement when None.
        previous: the plan in use. Among plans with the same makespan the one that moves the fewest
            bytes of decompositions is searched (exactly for few layers and ranks, else locally);
            `previous` itself is kept where it is at least as balanced.
        previous_ranks: for every rank the rank that it had in `previous`, None for a joiner. By
            default ranks keep their numbers.

    Raises:
        UsageError: two layers with one name, or previous_ranks of another length.
        ConfigError: a fraction outside (0, 1].
    """
    num_columns = columns_for_fraction(world_size, grad_worker_frac)
    names = [layer.name for layer in layers]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UsageError("layer names must differ", given=", ".join(twice))
    order = _by_cost(layers, costs or default_costs("eigen"))
    columns = grid_columns(world_size, num_columns)
    a_units, g_units = _units(layers, costs or default_costs("eigen"))
    packing = Packing(columns, a_units, g_units, colocate=colocate)
    for index in order:
        packing.place_least_loaded(index)
    if previous is not None:
        moves = _move_costs(layers, columns, previous, _old_ranks(world_size, previous_ranks))
        stay = _stay(layers, columns, previous, _new_ranks(world_size, previous, previous_ranks))
        packing = settle(packing, order, moves, stay)
    placed = tuple(
        LayerPlacement(layer.name, *packing.placed[index]) for index, layer in enumerate(layers)
    )
    return Plan(world_size, 1.0 / num_columns, columns, placed)


def rank_loads(plan: Plan, layers: Sequence[LayerShape], costs: CostModel) -> list[float]:
    """Seconds that every rank decomposes per inverse update; the largest is the makespan."""
    loads = [0.0] * plan.world_size
    for layer in layers:
        placement = plan.placement(layer.name)
        loads[placement.a_worker] += costs.a_seconds(layer)
        loads[placement.g_worker] += costs.g_seconds(layer)
    return loads


def max_second_order_elements(
    plan: Plan, layers: Sequence[LayerShape], *, method: Method = "eigen", precompute: bool = True
) -> int:
    """Decomposition elements on the fullest rank; all ranks of a column hold the same."""
    held = [0] * len(plan.columns)
    for layer in layers:
        held[plan.placement(layer.name).column] += second_order_elements(
            [layer], method=method, precompute=precompute
        )
    return max(held)


def moved_elements(
    previous: Plan,
    plan: Plan,
    layers: Sequence[LayerShape],
    previous_ranks: Sequence[int | None] | None = None,
) -> int:
    """Decomposition elements that ranks of `plan` hold and did not hold under `previous`."""
    moves = _move_costs(layers, plan.columns, previous, _old_ranks(plan.world_size, previous_ranks))
    return sum(
        int(moves[index, plan.placement(layer.name).column]) for index, layer in enumerate(layers)
    )


def auto_fraction(
    layers: Sequence[LayerShape],
    world_size: int,
    inverse_update_steps: float,
    precompute: bool,
    memory_budget_bytes: float | None = None,
    *,
    method: Method = "eigen",
    element_bytes: int = 4,
    costs: CostModel | None = None,
) -> float:
    """The fraction for `grad_worker_frac: auto`.

    Traffic per step, w (1 - f) + e (f - 1/N) / t_i, is linear in f, so its optimum is an end point:
    1 where e / t_i < w, else 1/N. Where 1 does not fit the budget the largest fraction that does is
    taken. The memory of a fraction is s plus the decompositions on the fullest rank of its plan.

    Args:
        layers: all K-FAC layers.
        world_size: number of ranks.
        inverse_update_steps: t_i.
        precompute: whether gradient workers keep the precomputed eigenvalue product.
        memory_budget_bytes: for factors and decompositions together, per rank.
        method: which decompositions are kept.
        element_bytes: of factors and decompositions.
        costs: as in `make_plan`.

    Raises:
        ConfigError: not even one gradient worker per layer fits the budget.
    """
    e = second_order_elements(layers, method=method, precompute=precompute)
    s = factor_elements(layers)
    best_traffic = 1 if e / inverse_update_steps < weight_elements(layers) else world_size
    if memory_budget_bytes is None:
        return 1.0 / best_traffic
    budget_elements = memory_budget_bytes / element_bytes
    least = None
    for num_columns in range(best_traffic, world_size + 1):
        # On average a rank holds at least this much; most fractions need no plan to be ruled out.
        if s + e * (world_size // num_columns) / world_size > budget_elements:
            continue
        plan = make_plan(layers, world_size, 1.0 / num_columns, costs=costs)
        needed = s + max_second_order_elements(plan, layers, method=method, precompute=precompute)
        if needed <= budget_elements:
            return 1.0 / num_columns
        least = needed if least is None else min(least, needed)
    if least is None:
        plan = make_plan(layers, world_size, 1.0 / world_size, costs=costs)
        least = s + max_second_order_elements(plan, layers, method=method, precompute=precompute)
    raise ConfigError(
        "the K-FAC state does not fit plan.memory_budget_gib at any grad_worker_frac",
        given=f"{memory_budget_bytes / 2**30:.3g} GiB",
        allowed=f"at least {least * element_bytes / 2**30:.3g} GiB on {world_size} ranks",
        change="raise the budget, use more ranks, or skip the widest layers",
    )


def _units(layers: Sequence[LayerShape], costs: CostModel) -> tuple[list[int], list[int]]:
    a = [costs.a_seconds(layer) for layer in layers]
    g = [costs.g_seconds(layer) for layer in layers]
    largest = max([*a, *g, 0.0]) or 1.0
    return (
        [round(value / largest * _COST_UNITS) for value in a],
        [round(value / largest * _COST_UNITS) for value in g],
    )


def _by_cost(layers: Sequence[LayerShape], costs: CostModel) -> list[int]:
    a, g = _units(layers, costs)
    return sorted(range(len(layers)), key=lambda i: (-(a[i] + g[i]), layers[i].name))


def _old_ranks(
    world_size: int, previous_ranks: Sequence[int | None] | None
) -> Sequence[int | None]:
    if previous_ranks is None:
        return range(world_size)
    if len(previous_ranks) != world_size:
        raise UsageError(
            "previous_ranks names one old rank (or None) per rank",
            given=f"{len(previous_ranks)} entries",
            allowed=world_size,
        )
    return previous_ranks


def _new_ranks(
    world_size: int, previous: Plan, previous_ranks: Sequence[int | None] | None
) -> dict[int, int]:
    return {
        old: new
        for new, old in enumerate(_old_ranks(world_size, previous_ranks))
        if old is not None and old < previous.world_size
    }


def _move_costs(
    layers: Sequence[LayerShape],
    columns: tuple[tuple[int, ...], ...],
    previous: Plan,
    old_ranks: Sequence[int | None],
) -> np.ndarray:
    """Elements that move if layer i goes to column c, [layers, columns]."""
    old_columns = len(previous.columns)
    kept = np.zeros((old_columns, len(columns)), dtype=np.int64)
    for rank, old in enumerate(old_ranks):
        if old is not None and old < previous.world_size:
            kept[old % old_columns, rank % len(columns)] += 1
    sizes = np.array([len(column) for column in columns], dtype=np.int64)
    known = {layer.name: layer.column for layer in previous.layers}
    moves = np.empty((len(layers), len(columns)), dtype=np.int64)
    for index, layer in enumerate(layers):
        elements = second_order_elements([layer], precompute=False)
        column = known.get(layer.name)
        moves[index] = elements * (sizes if column is None else sizes - kept[column])
    return moves


def _stay(
    layers: Sequence[LayerShape],
    columns: tuple[tuple[int, ...], ...],
    previous: Plan,
    new_ranks: dict[int, int],
) -> list[tuple[int, int, int] | None]:
    known = {layer.name: layer for layer in previous.layers}
    stays: list[tuple[int, int, int] | None] = []
    for layer in layers:
        old = known.get(layer.name)
        a = new_ranks.get(old.a_worker) if old else None
        g = new_ranks.get(old.g_worker) if old else None
        if a is None or g is None or a % len(columns) != g % len(columns):
            stays.append(None)
        else:
            stays.append((a % len(columns), a, g))
    return stays
