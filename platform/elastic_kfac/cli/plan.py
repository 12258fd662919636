"""`elastic-kfac plan`: what a step costs at given numbers of workers, before any of them exists."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Mapping
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

    config = read_config(arguments.config, arguments.overrides)
    if not config.kfac.enabled and config.optimizer.name != "sharded_kfac":
        raise UsageError(
            "there is nothing to plan without K-FAC",
            given="kfac.enabled=false",
            change="add --set kfac.enabled=true",
        )
    if arguments.input_shape is None and not has_splits(config.data.shards):
        source = config.data.source or "SOURCE"
        raise UsageError(
            "the shape of a sample comes from the shards, and there are none",
            given=f"data.shards={config.data.shards}",
            change=f"run `elastic-kfac shards make --source {source} --out {config.data.shards}`, "
            "or give --input-shape and --classes",
        )
    links = _links(arguments, config)
    sized = Sized.of(config, arguments.input_shape, arguments.classes)
    profile = _profile(arguments, sized, links)
    budget = math.inf if arguments.memory_gib is None else arguments.memory_gib * 2**30
    outlook = Outlook(sized, profile, memory_budget_bytes=budget)
    rows = [outlook.at(world_size) for world_size in arguments.world_size]
    resizes = [outlook.resize(*sizes) for sizes in pairwise(arguments.world_size)]
    cross_over = outlook.cross_over()
    if arguments.json:
        found = {
            "basis": profile.basis,
            "decomposition_residual": profile.residual,
            "world_sizes": rows,
            "resizes": resizes,
            "cross_over": cross_over,
        }
        print(json.dumps(found, indent=1))
        return 0
    print(*_head(sized, profile), sep="\n")
    print()
    print(*_table(rows), sep="\n")
    for row in rows:
        print()
        if arguments.layers:
            print(outlook.plan(row["world_size"]))
        print(*_advice(row), sep="\n")
    print()
    for resize in resizes:
        moved = resize["moved_bytes"] / 2**20
        print(f"resize {resize['from']} -> {resize['to']}: {moved:.4g} MiB of decompositions move")
        if arguments.layers:
            print(*(f"  {change}" for change in resize["changes"]), sep="\n")
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
    head = ("ranks", "fraction", "micro-batch", "step ms", *PHASES, "MiB/step", "memory MiB")
    cells = [head]
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
                f"{costs['received_bytes'] / 2**20:.4g}",
                f"{costs['memory_bytes'] / 2**20:.4g}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for line in cells:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))


def _advice(row: Mapping[str, Any]) -> Iterator[str]:
    suggested, ranks = row["suggested"], row["world_size"]
    if row["reason"]:
        yield f"{ranks} ranks: grad_worker_frac auto is {row['grad_worker_frac']:.3g}: {row['reason']}"
    if "sharded.v_method" in suggested:
        yield f"{ranks} ranks: suggested sharded.v_method {suggested['sharded.v_method']}"
        return
    yield (
        f"{ranks} ranks: suggested kfac.grad_worker_frac {suggested['grad_worker_frac']:.4g}, "
        f"train.micro_batch_size {suggested['micro_batch_size']}: "
        f"{suggested['step_s'] * 1e3:.4g} ms per step, {suggested['memory_bytes'] / 2**20:.4g} MiB; "
        f"with kfac.inverse_update_steps {suggested['inverse_update_steps']} or more, decompositions "
        "take at most a tenth of a step"
    )
