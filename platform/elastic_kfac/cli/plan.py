"""`elastic-kfac plan`: what a step costs at given numbers of workers, before any of them exists."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from elastic_kfac.cli.runs import locate_run, open_run
from elastic_kfac.errors import UsageError

if TYPE_CHECKING:
    from elastic_kfac.config import Config
    from elastic_kfac.placement.simulator import Calibration
    from elastic_kfac.runs.feasibility import Sized
    from elastic_kfac.runs.profile import Profile

PHASES = {
    "passes": ("forward_backward",),
    "statistics": ("factor_statistics",),
    "decompose": ("decompositions",),
    "precondition": ("precondition", "bound"),
    "optimizer": ("optimizer",),
    "packing": ("packing",),
    "gradients": ("gradient_all_reduce",),
    "factors": ("factor_all_reduce",),
    "results": ("second_order_broadcast", "preconditioned_broadcast"),
}
"""Columns of the table: computation, then exchange."""


def plan(arguments: argparse.Namespace) -> int:
    """Prints predicted costs and the planner's suggestion at each world size."""
    from elastic_kfac.config import read_config
    from elastic_kfac.data.manifest import has_splits
    from elastic_kfac.runs.feasibility import Sized
    from elastic_kfac.runs.prediction import Outlook
    from elastic_kfac.runs.sample_form import form_of_shape, form_without_shards

    config = read_config(arguments.config, arguments.overrides)
    if not config.kfac.enabled and config.optimizer.name != "sharded_kfac":
        raise UsageError(
            "there is nothing to plan without K-FAC",
            given="kfac.enabled=false",
            change="add --set kfac.enabled=true",
        )
    form = None
    if arguments.input_shape is not None:
        form = form_of_shape(config, arguments.input_shape, arguments.classes or 1000)
    elif not has_splits(config.data.shards):
        form = form_without_shards(config, arguments.classes)
    links = _links(arguments, config)
    sized = Sized.of(config, form=form)
    profile = _profile(arguments, sized, links)
    budget = math.inf if arguments.memory_gib is None else arguments.memory_gib * 2**30
    outlook = Outlook(sized, profile, memory_budget_bytes=budget)
    rows = [outlook.at(world_size) for world_size in arguments.world_size]
    resizes = [outlook.resize(*sizes) for sizes in pairwise(arguments.world_size)]
    cross_over = outlook.cross_over()
    if arguments.json:
        found = {
            "basis": profile.basis,
            "samples": f"the shards in {config.data.shards}" if form is None else form.basis,
            "decomposition_residual": profile.residual,
            "world_sizes": rows,
            "resizes": resizes,
            "cross_over": cross_over,
        }
        print(json.dumps(found, indent=1))
        return 0
    print(*_head(sized, profile), sep="\n")
    if form is not None:
        print(f"without data, for samples of {form.basis}")
    print()
    print(*_table(rows), sep="\n")
    print()
    print(*_suggestions(rows), sep="\n")
    if arguments.layers:
        for row in rows:
            print()
            print(outlook.plan(row["world_size"]))
    print()
    for note in _notes(rows, config.train.global_batch_size, budget):
        print(note)
    for resize in resizes:
        moved = _mib(resize["moved_bytes"])
        print(f"resize {resize['from']} -> {resize['to']}: {moved} MiB of decompositions move")
        if arguments.layers:
            for change in resize["changes"]:
                print(f"  {change}")
    if cross_over:
        divide, flat = cross_over["divide_from"], cross_over["flat_from"]
        from_ranks = "never pays" if divide is None else f"pays from N* = {divide} ranks"
        print(
            f"cross-over: dividing decompositions among ranks {from_ranks}; "
            f"more than {flat} do not shorten them"
        )
    return 0


def _links(arguments: argparse.Namespace, config: Config) -> Calibration:
    """Costs of this host on the links that the arguments name."""
    from dataclasses import replace

    from elastic_kfac.kfac.calibration import calibration_from, measured
    from elastic_kfac.placement.devices import device_named, stored_calibration
    from elastic_kfac.placement.simulator import Line

    if arguments.device is not None:
        device_named(arguments.device)
    method = config.kfac.method
    if arguments.links is not None:
        run = locate_run(arguments.links, "runs")
        rows = [row for row in open_run(run).events() if row["kind"] == "calibrated"]
        if not rows:
            raise UsageError(
                "no links were measured in this run",
                given=f"--links {arguments.links}",
                change="train with plan.calibrate=true, or give --gbit-per-s and --latency-us",
            )
        return calibration_from(rows[-1]["calibration"])
    here = measured(method) if arguments.device is None else stored_calibration(method)
    network = Line(arguments.latency_us * 1e-6, 8.0 / (arguments.gbit_per_s * 1e9))
    return replace(here, network=network)


def _profile(arguments: argparse.Namespace, sized: Sized, links: Calibration) -> Profile:
    from dataclasses import replace

    from elastic_kfac.placement.devices import device_named
    from elastic_kfac.runs.profile import estimate, measure

    if arguments.device is None:
        return measure(sized, links)
    profile = estimate(sized, device_named(arguments.device), links.network)
    calibration = replace(
        profile.calibration, inside_node=links.inside_node, ranks_per_node=links.ranks_per_node
    )
    return replace(profile, calibration=calibration)


def _head(sized: Sized, profile: Profile) -> Iterator[str]:
    config, inside = sized.config, profile.calibration.inside_node
    yield (
        f"{config.model.name}: {len(sized.layers)} K-FAC layers, {sized.parameter_elements:,} "
        f"parameters, {config.train.global_batch_size} samples a step, statistics every "
        f"{profile.workload.factor_update_steps} and decompositions every "
        f"{profile.workload.inverse_update_steps} steps"
    )
    yield (
        f"{profile.basis}; links of {profile.calibration.network}"
        + (f", inside a node {inside}" if inside is not None else "")
    )
    if profile.residual is not None:
        yield (
            f"decompositions of this model take {profile.residual:.2f} times what random matrices of "
            "usual widths suggest; the costs are corrected by that"
        )


def _table(rows: list[dict[str, Any]]) -> Iterator[str]:
    """One line per world size, ms per step and MiB per rank."""
    cells = [("ranks", "fraction", "micro-batch", "step ms", *PHASES, "MiB/step", "memory MiB")]
    for row in rows:
        costs = row["predicted"]
        cells.append(
            (
                str(row["world_size"]),
                f"{row['grad_worker_frac']:.3g}",
                str(row["micro_batch_size"]),
                f"{costs['step_s'] * 1e3:.4g}",
                *(
                    f"{1e3 * sum(costs['phases_s'][name] for name in names):.3g}"
                    for names in PHASES.values()
                ),
                _mib(costs["received_bytes"]),
                _mib(costs["memory_bytes"]),
            )
        )
    yield from _aligned(cells)


def _suggestions(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What the planner would choose at each world size."""
    if "sharded.v_method" in rows[0]["suggested"]:
        methods = [(str(row["world_size"]), row["suggested"]["sharded.v_method"]) for row in rows]
        yield "suggested:"
        yield from _aligned([("ranks", "sharded.v_method"), *methods])
        return
    keys = ("kfac.grad_worker_frac", "train.micro_batch_size", "kfac.inverse_update_steps")
    cells = [("ranks", *keys, "step ms", "memory MiB")]
    for row in rows:
        found = row["suggested"]
        cells.append(
            (
                str(row["world_size"]),
                f"{found['grad_worker_frac']:.3g}",
                str(found["micro_batch_size"]),
                f">= {found['inverse_update_steps']}",
                f"{found['step_s'] * 1e3:.4g}",
                _mib(found["memory_bytes"]),
            )
        )
    yield "suggested, for the least time that fits (step ms with the intervals of the configuration;"
    yield "from inverse_update_steps on, decompositions take at most a tenth of a step):"
    yield from _aligned(cells)


def _aligned(cells: Sequence[Sequence[str]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))


def _mib(size: float) -> str:
    size /= 2**20
    return f"{size:.4g}" if size < 1e4 else f"{size:,.0f}"


def _notes(rows: list[dict[str, Any]], batch: int, budget: float) -> Iterator[str]:
    for row in rows:
        ranks = row["world_size"]
        where = f"{ranks} rank{'s' if ranks > 1 else ''}"
        if row["reason"]:
            yield (
                f"{where}: kfac.grad_worker_frac auto is {row['grad_worker_frac']:.3g}: "
                f"{row['reason']}"
            )
        if row["predicted"]["memory_bytes"] > budget:
            yield f"{where}: as configured, a rank needs more than --memory-gib"
        if ranks > batch:
            yield f"{where}: some have no sample; train.global_batch_size is {batch}"
