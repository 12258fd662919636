"""Subcommands that look at a run, or at what a run would do; none of them trains."""

from __future__ import annotations

import argparse
import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_kfac.errors import UsageError
from elastic_kfac.observability.quality import quality_of, shown_quality
from elastic_kfac.paths import join_uri, local_folder

if TYPE_CHECKING:
    import torch

    from elastic_kfac.state.run_folder import RunFolder
    from elastic_kfac.training.evaluation import EvalResult


def locate_run(run: str, storage: str, *, searches: bool = False) -> str:
    """The URI of a run, given its folder, or its name below `storage`.

    Args:
        run: Folder, URI or name.
        storage: Folder or URI of runs.
        searches: Also accept the folder of a search.

    Raises:
        UsageError: If there is no such run; the error names the nearest one.
    """
    marks = ("config.yaml", "experiment.json") if searches else ("config.yaml",)
    what = "run or search" if searches else "run"
    given, folder = local_folder(run), local_folder(storage)
    if given is None:
        return run.rstrip("/")
    if folder is None:
        return join_uri(storage, run)
    for candidate in (given, folder / run):
        if any((candidate / mark).is_file() for mark in marks):
            return str(candidate)
        if (candidate / "experiment.json").is_file():
            raise UsageError(
                "this is the folder of a search, not of a run",
                given=candidate,
                change=f"name one of its trials, for example {candidate}/trials/TRIAL",
            )
    there = sorted(path.parent.name for mark in marks for path in folder.glob(f"*/{mark}"))
    close = difflib.get_close_matches(Path(run).name, there, n=1)
    raise UsageError(
        f"no such {what}",
        given=run,
        allowed=f"a folder, or one of {', '.join(there[-8:])} in {folder}" if there else None,
        change=f"did you mean {close[0]}?"
        if close
        else "name its folder, or the folder above it with --storage",
    )


def report(arguments: argparse.Namespace) -> int:
    """Writes `report.html` of a run or a search and prints its summary."""
    uri = locate_run(arguments.run, arguments.storage, searches=True)
    folder = local_folder(uri)
    if folder is None or not (folder / "experiment.json").is_file():
        write_report_and_summary(uri, arguments.out, as_json=arguments.json)
        return 0
    from elastic_kfac.experiments.search_folder import read_experiment
    from elastic_kfac.reports.search_page import headline, write_search_page

    path = write_search_page(folder, arguments.out)
    if arguments.json:
        print_json({"report": str(path), "headline": headline(read_experiment(folder))})
        return 0
    print(f"{headline(read_experiment(folder))}\n\nReport: {path}")
    return 0


def write_report_and_summary(uri: str, out: str | None = None, *, as_json: bool = False) -> None:
    """Writes `report.html` into a run's folder, or the file `out`, and prints a summary, or `result.json`
    with the path of the report.

    Raises:
        UsageError: If there is no run.
    """
    from elastic_kfac.reports.run_page import write_report
    from elastic_kfac.runs.summary import summary_text

    written, path = write_report(uri, out), out or join_uri(uri, "report.html")
    if as_json:
        print_json({"report": path, **(open_run(uri).result() or {})})
        return
    print(summary_text(written))
    print(f"\nReport: {path}")


def print_json(value: object) -> None:
    """Prints JSON that every parser reads: NaN and infinity become null."""
    print(json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False))


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {key: _finite(part) for key, part in value.items()}
    return [_finite(part) for part in value] if isinstance(value, list | tuple) else value


def audit(arguments: argparse.Namespace) -> int:
    """Verifies from the ledger that every sample was used exactly once; returns 1 if not."""
    from elastic_kfac.runs.audit import audit_run

    found = audit_run(open_run(locate_run(arguments.run, arguments.storage), arguments.shards))
    if arguments.json:
        print_json({"passed": found.passed, **asdict(found)})
        return 0 if found.passed else 1
    print(found.line())
    for problem in found.problems[1:]:
        print(f"  {problem}")
    return 0 if found.passed else 1


def evaluate(arguments: argparse.Namespace) -> int:
    """Prints loss and metrics of the newest checkpoint."""
    from elastic_kfac.runs.checkpoints import evaluate_run

    folder = open_run(locate_run(arguments.run, arguments.storage), arguments.shards)
    step, found = evaluate_run(
        folder,
        attack=_attack(arguments),
        device=device_of(folder),
        split=arguments.split,
        by_class=arguments.by_class,
    )
    if arguments.json:
        attacked = found.attacked and found.attacked.all
        values = {"step": step, "samples": found.count, **found.all, "attacked": attacked}
        print_json({**values, "classes": [asdict(each) for each in found.classes]})
        return 0
    print(f"step {step}: {_result(found)} on {found.count:,} samples")
    if found.attacked is not None:
        print(f"under attack: {_result(found.attacked)}")
    if found.classes:
        width = max(len("class"), *(len(each.name) for each in found.classes))
        print(f"{'class':<{width}}  {'count':>9} precision    recall        f1")
    for each in found.classes:
        shares = (each.precision, each.recall, each.f1)
        row = "".join(f"{'-' if share is None else f'{share:.2%}':>10}" for share in shares)
        print(f"{each.name:<{width}} {each.count:>10,}{row}")
    return 0


def _result(found: EvalResult) -> str:
    metrics = [
        f"{quality_of(name).label} {shown_quality(name, value)}"
        for name, value in found.metrics.items()
    ]
    return ", ".join([*metrics, f"loss {found.loss:.4f}"])


def _attack(arguments: argparse.Namespace) -> dict[str, object]:
    given = {
        "eval_attack": arguments.attack,
        "eval_radius": arguments.radius,
        "eval_steps": arguments.steps,
    }
    if arguments.attack is None and (arguments.radius, arguments.steps) != (None, None):
        raise UsageError(
            "--radius and --steps need an attack", change="add --attack fgsm, pgd or l2"
        )
    return {key: value for key, value in given.items() if value is not None}


def export(arguments: argparse.Namespace) -> int:
    """Writes a checkpoint's weights as safetensors."""
    from elastic_kfac.runs.export import export_run

    uri = locate_run(arguments.run, arguments.storage)
    if arguments.out is None and local_folder(uri) is None:
        raise UsageError("exporting a remote run needs a local file", change="add --out FILE")
    out = arguments.out or join_uri(uri, "model.safetensors")
    count = export_run(open_run(uri), out, step=arguments.checkpoint)
    print(f"{count} tensors: {out}")
    return 0


def track(arguments: argparse.Namespace) -> int:
    """Sends the metrics and events of a run to trackers."""
    from elastic_kfac.config import apply_overrides, parse_config, split_override
    from elastic_kfac.runs.tracking import track as send

    uri = locate_run(arguments.run, arguments.storage)
    folder = open_run(uri)
    changes = [split_override(text) for text in arguments.overrides]
    to = [("tracking.to", arguments.to)] if arguments.to else []
    config = parse_config(apply_overrides(folder.config_values(), [*changes, *to]))
    if not config.tracking.to:
        raise UsageError(
            "no tracker is named", change="add --to tensorboard, wandb, mlflow or jsonl"
        )
    send(folder, uri.rstrip("/").rpartition("/")[2], config)
    return 0


def device_of(folder: RunFolder) -> torch.device:
    """The device on which a run's checkpoints are looked at."""
    import torch

    use_gpu = folder.read_config().resources.use_gpu and torch.cuda.is_available()
    return torch.device("cuda" if use_gpu else "cpu")


def open_run(uri: str, shards: str | None = None) -> RunFolder:
    """Opens an existing run's folder; `shards` is where its shard sets are now."""
    from elastic_kfac.state.run_folder import RunFolder

    return RunFolder.existing(uri, shards)
