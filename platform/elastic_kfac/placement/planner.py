"""Makes plans: balanced, equal on every rank, and close to the previous plan.

Longest processing time first: layers by decreasing cost (ties by name), each to the rank where it
ends first, whose column becomes the layer's column. Ties go to the column with the least load, then to
the lowest rank. With the two factors of a layer on different ranks (`colocate=False`) the column is the
one whose two ranks end first. The makespan of equally fast ranks is within 4/3 of the optimum (Graham
1969); for ranks of different speeds local search follows.

Costs are rounded to whole units first: loads are exact sums, and the result depends neither on the order
of additions nor on the machine.
"""

from __future__ import annotations

from collections.abc import Sequence

from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.placement.costs import (
    CostModel,
    LayerShape,
    Method,
    default_costs,
    second_order_elements,
)
from elastic_kfac.placement.packing_search import Moves, Packing, Place, level, settle
from elastic_kfac.placement.plan import (
    LayerPlacement,
    Plan,
    columns_for_fraction,
    grid_columns,
)
from elastic_kfac.placement.shares import slowness

_COST_UNITS = 1 << 32


def make_plan(
    layers: Sequence[LayerShape],
    world_size: int,
    grad_worker_frac: float,
    *,
    colocate: bool = True,
    costs: CostModel | None = None,
    speeds: Sequence[float] = (),
    previous: Plan | None = None,
    previous_ranks: Sequence[int | None] | None = None,
) -> Plan:
    """Assign every layer to a column and its factors to inverse workers.

    Args:
        grad_worker_frac: Share of ranks that precondition a layer; see `columns_for_fraction`.
        colocate: Whether one rank decomposes both factors of a layer; otherwise two ranks of a column do.
        costs: Seconds per factor, equal on all ranks; by default the stored measurement.
        speeds: How many times as fast as `costs` each rank decomposes; empty for equal ranks.
        previous: The plan in use. The new plan moves few elements of decompositions without a larger
            makespan (the fewest for few layers and ranks, otherwise by local search).
        previous_ranks: The rank in `previous` of every rank, None for a joiner. By default ranks keep
            their numbers.

    Raises:
        UsageError: If two layers share a name, or `previous_ranks` has another length.
        ConfigError: If the fraction is outside (0, 1].
    """
    num_columns = columns_for_fraction(world_size, grad_worker_frac)
    names = [layer.name for layer in layers]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise UsageError("layer names must differ", given=", ".join(twice))
    columns = grid_columns(world_size, num_columns)
    a_units, g_units = _units(layers, costs or default_costs("eigen"))
    order = sorted(range(len(layers)), key=lambda i: (-a_units[i] - g_units[i], layers[i].name))
    slow = slowness(speeds) if speeds else []
    packing = Packing(columns, a_units, g_units, colocate=colocate, slowness=slow)
    for index in order:
        packing.place_least_loaded(index)
    if len(set(slow)) > 1:
        level(packing, order)
    places = packing.placed
    if previous is not None:
        old_ranks = _old_ranks(world_size, previous, previous_ranks)
        moves = _move_costs(layers, columns, previous, old_ranks)
        stay = _stay(layers, num_columns, previous, old_ranks)
        places = settle(packing, order, moves, stay)
    placed = tuple(
        LayerPlacement(layer.name, *place, layer.kept)
        for layer, place in zip(layers, places, strict=True)
    )
    return Plan(world_size, 1.0 / num_columns, columns, placed)


def rank_loads(
    plan: Plan, layers: Sequence[LayerShape], costs: CostModel, speeds: Sequence[float] = ()
) -> list[float]:
    """Seconds of decompositions per inverse update, by rank; the largest is the makespan."""
    loads = [0.0] * plan.world_size
    for layer in layers:
        placement = plan.placement(layer.name)
        loads[placement.a_worker] += costs.a_seconds(layer)
        loads[placement.g_worker] += costs.g_seconds(layer)
    return [load / speed for load, speed in zip(loads, speeds, strict=True)] if speeds else loads


def max_second_order_elements(
    plan: Plan, layers: Sequence[LayerShape], *, method: Method = "eigen", precompute: bool = True
) -> int:
    """Decomposition elements on the rank that holds most; ranks of a column hold the same."""
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
    """Decomposition elements that ranks hold under `plan` but not under `previous`."""
    old_ranks = _old_ranks(plan.world_size, previous, previous_ranks)
    moves = _move_costs(layers, plan.columns, previous, old_ranks)
    return sum(
        moves[index][plan.placement(layer.name).column] for index, layer in enumerate(layers)
    )


def over_budget(budget_bytes: float, needed_bytes: float, plan: Plan) -> ConfigError:
    """The error about a plan whose fullest rank needs more than the budget."""
    return ConfigError(
        "K-FAC's factors and decompositions do not fit the memory budget",
        given=f"memory_budget_bytes={budget_bytes:.12g} "
        f"(plan.memory_budget_gib={budget_bytes / 2**30:.4g})",
        allowed=f"at least {needed_bytes:.12g} bytes ({needed_bytes / 2**30:.4g} GiB) on the fullest "
        f"of {plan.world_size} ranks (grad_worker_frac={plan.grad_worker_frac:.4g})",
        change="raise the budget, lower grad_worker_frac or max_factor_dim, or use more ranks",
    )


def _units(layers: Sequence[LayerShape], costs: CostModel) -> tuple[list[int], list[int]]:
    a = [costs.a_seconds(layer) for layer in layers]
    g = [costs.g_seconds(layer) for layer in layers]
    largest = max([*a, *g, 0.0]) or 1.0
    return (
        [round(value / largest * _COST_UNITS) for value in a],
        [round(value / largest * _COST_UNITS) for value in g],
    )


def _old_ranks(
    world_size: int, previous: Plan, previous_ranks: Sequence[int | None] | None
) -> list[int | None]:
    """The rank in `previous` of every rank; None where it had none."""
    ranks = range(world_size) if previous_ranks is None else previous_ranks
    if len(ranks) != world_size:
        raise UsageError(
            "previous_ranks names one old rank (or None) per rank",
            given=f"{len(ranks)} entries",
            allowed=world_size,
        )
    return [rank if rank is not None and rank < previous.world_size else None for rank in ranks]


def _move_costs(
    layers: Sequence[LayerShape],
    columns: tuple[tuple[int, ...], ...],
    previous: Plan,
    old_ranks: Sequence[int | None],
) -> Moves:
    """Elements that move if layer i goes to column c, [layers][columns]."""
    sizes = [len(column) for column in columns]
    # Ranks of column c that do not have what column p of the previous plan held, [p][c].
    lacking = [list(sizes) for _ in previous.columns]
    for rank, old in enumerate(old_ranks):
        if old is not None:
            lacking[old % len(previous.columns)][rank % len(columns)] -= 1
    known = {layer.name: layer.column for layer in previous.layers}
    moves = []
    for layer in layers:
        elements = second_order_elements([layer], precompute=False)
        column = known.get(layer.name)
        moves.append([elements * n for n in (sizes if column is None else lacking[column])])
    return moves


def _stay(
    layers: Sequence[LayerShape],
    num_columns: int,
    previous: Plan,
    old_ranks: Sequence[int | None],
) -> list[Place | None]:
    """The place of every layer in `previous`, in new ranks; None where it no longer exists."""
    new_rank = {old: rank for rank, old in enumerate(old_ranks) if old is not None}
    known = {layer.name: layer for layer in previous.layers}
    stays: list[Place | None] = []
    for layer in layers:
        old = known.get(layer.name)
        a = new_rank.get(old.a_worker) if old else None
        g = new_rank.get(old.g_worker) if old else None
        in_one_column = a is not None and g is not None and a % num_columns == g % num_columns
        stays.append((a % num_columns, a, g) if in_one_column else None)  # type: ignore[operator,arg-type]
    return stays
