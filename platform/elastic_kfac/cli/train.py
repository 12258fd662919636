"""`elastic-kfac train`: check everything, write missing shards, train, report."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_kfac.cli.provenance import announce, is_ray_job, provenance
from elastic_kfac.cli.runs import open_run, write_report_and_summary
from elastic_kfac.errors import ElasticKfacError, RunError, UsageError
from elastic_kfac.paths import join_uri, local_folder

if TYPE_CHECKING:
    from elastic_kfac.config import Config


def train(arguments: argparse.Namespace) -> int:
    """Trains; prints a summary and the path of the report."""
    from elastic_kfac.config import read_config

    if not is_ray_job(os.environ):  # A job has printed this as its first line.
        announce()
    config = read_config(arguments.config, arguments.overrides)
    check_local_cluster_events(config, arguments)
    check_name(arguments)

    from elastic_kfac.cli.shards import make_missing_shards

    make_missing_shards(config)
    if config.analysis.every_epochs is not None:
        from elastic_kfac.analysis.hessian_report import check_before_start

        here = config.elastic.max_workers if arguments.address is None else None
        check_before_start(config, workers_here=here)

    from elastic_kfac.tasks.attacks import check_attacks

    check_attacks(config)

    from elastic_kfac.runs.feasibility import check_parts

    check_parts(config)

    name = arguments.name or fresh_name(Path(arguments.config).stem, arguments.storage)
    uri = join_uri(arguments.storage, name)
    from elastic_kfac.runs.tracking import tracked

    with tracked(config, uri, name):
        return _run(arguments, config, name, uri)


def _run(arguments: argparse.Namespace, config: Config, name: str, uri: str) -> int:
    try:
        if arguments.local:
            from elastic_kfac.cluster.run.in_process import train_in_process

            result = train_in_process(config, name=name, storage=arguments.storage)
        else:
            from elastic_kfac.cluster.run.trainer import train as train_on_ray

            result = train_on_ray(
                config,
                name=name,
                storage=arguments.storage,
                address=arguments.address,
                resize_at=arguments.resize_at,
                kill_at=arguments.kill_at,
            )
    except ElasticKfacError as error:
        if error.exit_code == 1:
            # People want to see first how far a failed run came. One that failed before it had
            # a folder has nothing to show.
            with contextlib.suppress(ElasticKfacError):
                _finish(uri, config)
        raise
    _finish(uri, config)
    if result.status == "interrupted" or not result.is_safe:
        print(f"\n{result.status.capitalize()}: {result.safe}.")
    if result.unfired:
        raise RunError(
            "the run ended before all of --resize-at and --kill-at had happened",
            given=", ".join(result.unfired),
            change="use earlier steps, or train for more epochs",
        )
    return result.exit_code


def check_local_cluster_events(config: Config, arguments: argparse.Namespace) -> None:
    """Refuses `--resize-at` and `--kill-at` values that cannot happen.

    Raises:
        UsageError: On a given cluster, for a world size outside the configured bounds, a rank that
            cannot exist, or two events at the same step.
    """
    resizes: Sequence[tuple[int, int]] = arguments.resize_at
    kills: Sequence[tuple[int, int]] = arguments.kill_at
    if arguments.local and (arguments.address is not None or resizes or kills):
        raise UsageError(
            "--local trains in this process, without a cluster",
            change="drop --address, --resize-at and --kill-at, or --local",
        )
    if arguments.address is not None and (resizes or kills):
        raise UsageError(
            "--resize-at and --kill-at act on the local cluster only",
            given=f"--address {arguments.address}",
            change="drop --address, or drain and kill nodes of that cluster with its own tools",
        )
    low, high = config.elastic.min_workers, config.elastic.max_workers
    for step, nodes in resizes:
        if not low <= nodes <= high:
            raise UsageError(
                "--resize-at is outside the limits of this run",
                given=f"{step}:{nodes}",
                allowed=f"{low} to {high} nodes (elastic.min_workers to elastic.max_workers)",
            )
    for step, rank in kills:
        if rank >= high:
            raise UsageError(
                "--kill-at names a rank that cannot exist",
                given=f"{step}:{rank}",
                allowed=f"ranks 0 to {high - 1} (elastic.max_workers={high})",
            )
    for option, pairs in (
        ("--resize-at", [(step, 0) for step, _ in resizes]),
        ("--kill-at", list(kills)),
    ):
        if len(set(pairs)) < len(pairs):
            raise UsageError(
                f"two {option} for the same step",
                given=" ".join(str(pair[0]) for pair in pairs),
                change="use different steps",
            )


def check_name(arguments: argparse.Namespace) -> None:
    """Raises UsageError for an unnamed run in remote storage."""
    if arguments.name is None and local_folder(arguments.storage) is None:
        raise UsageError(
            "a run in remote storage needs a name",
            given=arguments.storage,
            change="add --name NAME",
        )


def fresh_name(stem: str, storage: str) -> str:
    """Creates the first of `<stem>-1`, `<stem>-2`, … that does not exist in a local storage folder.

    Of two calls at the same time each gets its own; `claimed` removes a folder that stays empty.
    """
    folder = local_folder(storage) or Path()  # `check_name` has refused remote storage.
    for number in itertools.count(1):
        with contextlib.suppress(FileExistsError):
            (folder / f"{stem}-{number}").mkdir(parents=True)
            return f"{stem}-{number}"
    raise AssertionError


def _finish(uri: str, config: Config) -> None:
    from elastic_kfac.training.callbacks import event_row

    folder = open_run(uri)
    if folder.read_config() != config:
        return  # Nothing in it is of this call: the state of an earlier one was not restored.
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(folder.claimed("the run"))
        except UsageError:
            return  # Another process continues it already, and reports at its end.
        step = int((folder.result() or {}).get("steps") or 0)
        row = event_row("provenance", step, provenance=provenance(config.resources.use_gpu))
        try:
            folder.append_events([row])
            write_report_and_summary(uri)
        except OSError as error:
            raise RunError("the report cannot be written", given=uri, change=str(error)) from None
