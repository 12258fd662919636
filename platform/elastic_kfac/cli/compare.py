"""`elastic-kfac compare`: check every cell, make shards if needed, train what is missing, report."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

import elastic_kfac
from elastic_kfac.cli.provenance import provenance
from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.paths import join_uri

if TYPE_CHECKING:
    from elastic_kfac.experiments.study import LoadedStudy


def compare(arguments: argparse.Namespace) -> int:
    """Runs the study that a file describes; the same call continues an interrupted one."""
    from elastic_kfac.experiments.study import load_study

    loaded = load_study(
        arguments.study,
        arguments.overrides,
        seeds=arguments.seeds,
        parallelism=arguments.parallelism,
    )
    name = arguments.name or loaded.name
    print(f"elastic-kfac {elastic_kfac.__version__}: {_size(loaded)}")
    _make_missing_shards(loaded)
    _check_cells(loaded)

    from elastic_kfac.experiments.study_outcome import outcome_text
    from elastic_kfac.experiments.study_runner import compare as compare_on_ray
    from elastic_kfac.reports.study_page import render_study

    made_with = provenance(loaded.cells[0].config.resources.use_gpu)
    result = compare_on_ray(
        loaded,
        name=name,
        storage=arguments.storage,
        address=arguments.address,
        render=lambda outcome: render_study(outcome, made_with),
        provenance=made_with,
    )
    print(f"\n{outcome_text(result.outcome)}")
    print(f"\nReport: {join_uri(result.uri, 'report.html')}")
    return result.exit_code


def _size(loaded: LoadedStudy) -> str:
    study = loaded.study
    return (
        f"study {loaded.name}, methods {len(study.methods)}, batch sizes {len(study.batch_sizes)}, "
        f"seeds {len(study.seeds)}: {len(loaded.cells)} trainings, {study.parallelism} at a time"
    )


def _check_cells(loaded: LoadedStudy) -> None:
    """Refuses a study with a cell that cannot run, before a cluster starts."""
    from elastic_kfac.runs.feasibility import check_parts

    seed = min(cell.seed for cell in loaded.cells)
    for cell in loaded.cells:
        if cell.seed == seed:
            try:
                check_parts(cell.config)
            except ConfigError as error:
                raise ConfigError(f"{cell.name} cannot run: {error.line()}") from None


def _make_missing_shards(loaded: LoadedStudy) -> None:
    from elastic_kfac.cli.shards import make_missing_shards

    sources: dict[str, str | None] = {}
    for cell in loaded.cells:
        data = cell.config.data
        if data.shards not in sources:
            sources[data.shards] = data.source
            make_missing_shards(cell.config)
        elif sources[data.shards] != data.source:
            raise UsageError(
                f"two sources for the shards of {data.shards}",
                given=f"{sources[data.shards]} and {data.source}",
                change="give each its own data.shards",
            )
