"""`elastic-kfac tune`: check the space, make shards if needed, search, say what was found."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from elastic_kfac.cli.provenance import announce, is_ray_job
from elastic_kfac.cli.train import fresh_name


def tune(arguments: argparse.Namespace) -> int:
    """Runs the search that a file describes; the same name continues it."""
    from elastic_kfac.experiments.search_space import METRICS, read_space

    space = read_space(arguments.space, arguments.overrides)
    name = arguments.name or fresh_name(f"tune-{Path(arguments.space).stem}", arguments.storage)
    if not is_ray_job(os.environ):
        announce()

    from elastic_kfac.cli.shards import make_missing_shards

    make_missing_shards(space.base)

    from elastic_kfac.experiments.tuning import search
    from elastic_kfac.reports.search_report import write_experiment_report

    result = search(
        space,
        name=name,
        write_page=write_experiment_report,
        storage=arguments.storage,
        address=arguments.address,
    )
    reached = sum(row.stage == "search" and bool(row.reached) for row in result.rows)
    tried = sum(row.stage == "search" for row in result.rows)
    print(f"\n{reached} of {tried} trials reached {space.objective.target_accuracy:.4g}.")
    if result.best is not None:
        values = ", ".join(f"{key}={value}" for key, value in result.best.parameters.items())
        value = result.best.numbers.get("objective")
        unit = METRICS[space.objective.metric]
        took = f"{value:.4g} {unit}" if value is not None else "target not reached"
        print(f"Best: {result.best.trial_id} ({took}): {values}")
        print(f"Train with it: elastic-kfac train {result.folder / 'best_config.yaml'}")
    if result.status == "interrupted":
        print(f"Interrupted; the same command with --name {name} continues.")
    print(f"Files: {result.folder}")
    return result.exit_code
