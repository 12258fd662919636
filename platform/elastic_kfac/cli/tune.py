"""`elastic-kfac tune`: check the space, make shards if needed, search, print the best configuration."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_kfac.cli.provenance import announce, is_ray_job
from elastic_kfac.cli.train import check_name, fresh_name
from elastic_kfac.errors import ElasticKfacError

if TYPE_CHECKING:
    from elastic_kfac.experiments.search_space import SearchSpace


def tune(arguments: argparse.Namespace) -> int:
    """Runs the search that a file describes; the same name continues it."""
    from elastic_kfac.experiments.search_space import read_space

    space = read_space(arguments.space, arguments.overrides)
    check_name(arguments)
    if not is_ray_job(os.environ):
        announce()

    from elastic_kfac.cli.shards import make_missing_shards

    make_missing_shards(space.base)
    check_points(space)
    name = arguments.name or fresh_name(f"tune-{Path(arguments.space).stem}", arguments.storage)

    from elastic_kfac.experiments.search_runner import search
    from elastic_kfac.reports.search_page import write_search_page

    result = search(
        space,
        name=name,
        write_page=write_search_page,
        storage=arguments.storage,
        address=arguments.address,
    )
    tried = [trial for trial in result.trials if trial.stage == "search"]
    reached = sum(bool(trial.reached) for trial in tried)
    print(f"\n{reached} of {len(tried)} trials reached {space.objective.shown_target}.")
    if result.best is not None:
        values = ", ".join(f"{key}={value}" for key, value in result.best.parameters.items())
        value = result.best.numbers.get("objective")
        missed = "target not reached"
        took = missed if value is None else f"{value:.4g} {space.objective.unit}"
        print(f"Best: {result.best.id} ({took}): {values}")
        print(f"Train with it: elastic-kfac train {result.folder / 'best_config.yaml'}")
    if result.status == "interrupted":
        print(f"Interrupted; the same command with --name {name} continues.")
    print(f"Files: {result.folder}")
    return result.exit_code


def check_points(space: SearchSpace) -> None:
    """Refuses a search none of whose points can run, judged by two corners of the space.

    Raises:
        ElasticKfacError: The reason of the first.
    """
    from elastic_kfac.runs.feasibility import check_parts

    problems = []
    for end in (0, -1):
        try:
            point = {key: parameter.probes()[end] for key, parameter in space.parameters.items()}
            check_parts(space.config(point, space.base.train.seed))
            return
        except ElasticKfacError as error:
            problems.append(error)
    raise problems[0]
