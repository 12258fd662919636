"""`elastic-kfac suggest`: try lr, damping and intervals on the model and data of a configuration."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from elastic_kfac.cli.entry import EXIT_INTERRUPTED
from elastic_kfac.cli.provenance import announce
from elastic_kfac.cli.train import fresh_name
from elastic_kfac.errors import UsageError
from elastic_kfac.paths import local_folder

if TYPE_CHECKING:
    from elastic_kfac.runs.suggestion import Suggestion, Trial

BARS = "▁▂▃▄▅▆▇█"
WIDTH = 20
"""Characters of a curve."""


def suggest(arguments: argparse.Namespace) -> int:
    """Searches, prints what each trial did, and writes `suggested.yaml`."""
    from elastic_kfac.config import read_config, write_config

    announce()
    config = read_config(arguments.config, arguments.overrides)
    storage = local_folder(arguments.storage)
    if storage is None:
        raise UsageError(
            "a suggestion keeps its files in a folder", given=arguments.storage, allowed="a path"
        )
    if arguments.name is not None and (storage / arguments.name).exists():
        raise UsageError(
            "there is a folder of this name",
            given=storage / arguments.name,
            change="choose another --name; a suggestion is not continued",
        )

    from elastic_kfac.cli.shards import make_missing_shards

    make_missing_shards(config)

    from elastic_kfac.cluster.ray.devices import device_of_task
    from elastic_kfac.reports.suggestion_page import write_suggestion_page
    from elastic_kfac.runs.feasibility import check_parts
    from elastic_kfac.runs.suggestion import suggest as search
    from elastic_kfac.tasks.attacks import check_attacks

    check_attacks(config)
    check_parts(config)
    table = _Table()
    found = search(
        config, minutes=arguments.minutes, device=device_of_task(config), show=table.show
    )
    name = arguments.name or fresh_name(f"suggest-{Path(arguments.config).stem}", str(storage))
    folder = storage / name
    folder.mkdir(parents=True, exist_ok=True)
    write_config(found.suggested, folder / "suggested.yaml")
    (folder / "suggestion.json").write_text(json.dumps(found.as_json(), indent=1) + "\n")
    page = write_suggestion_page(found, folder)
    print("\n" + "\n".join(closing_lines(found)))
    print(f"Train with it: elastic-kfac train {folder / 'suggested.yaml'}")
    print(f"Report: {page}")
    return EXIT_INTERRUPTED if found.interrupted else 0


class _Table:
    """Prints a row per trial, under a heading before the first."""

    def __init__(self) -> None:
        self._rows = 0

    def show(self, found: Suggestion, trial: Trial) -> None:
        if not self._rows:
            part = "the whole run" if found.share >= 1 else f"{found.share:.2g} of the run"
            print(f"Trials of about {found.steps:,} steps ({part}), from the best so far:\n")
            print(
                f"  {'change':<28} {'seed':>5} {'train loss':>10} {'test loss':>10} "
                f"{next(iter(trial.metrics), ''):>9} {'ms/step':>8}  log of the training loss"
            )
        self._rows += 1
        print(_row(trial, found.given if found.trials else trial), flush=True)


def _row(trial: Trial, given: Trial) -> str:
    steps = len(trial.losses)
    train = trial.loss_at(steps, max(1, steps // 16)) if steps else math.nan
    values = (
        _text(train, ".4g"),
        _text(trial.test_loss, ".4g"),
        _metric(trial),
        _text(1e3 * trial.cost_s if steps else None, ".3g"),
    )
    end = f"  {trial.ended} at step {steps}" if trial.ended and steps else f"  {trial.ended}"
    line = (
        f"  {trial.label:<28} {trial.seed:>5} {values[0]:>10} {values[1]:>10} {values[2]:>9} "
        f"{values[3]:>8}  {sparkline(trial.losses, given.losses)}{end}"
    )
    return line.rstrip()


def _text(value: float | None, form: str) -> str:
    return "–" if value is None or math.isnan(value) else format(value, form)


def _metric(trial: Trial) -> str:
    name = next(iter(trial.metrics), "")
    return _text(trial.metrics.get(name), ".2%" if name == "accuracy" else ".4g")


def sparkline(losses: Sequence[float], scale: Sequence[float]) -> str:
    """A curve in `WIDTH` characters for as many steps as `scale` has, between the logarithms of its
    largest and a hundredth below its smallest mean; ✗ is not finite, and a curve that ends early is
    shorter."""
    low, high = _ends(scale)
    text = ""
    for begin, end in _slices(len(scale)):
        part = losses[begin:end]
        if not part:
            break
        mean = sum(part) / len(part)
        if not math.isfinite(mean):
            text += "✗"
            continue
        share = (_height(mean) - low) / (high - low) if high > low else 0.0
        text += BARS[min(len(BARS) - 1, max(0, int(share * len(BARS))))]
    return text


def _ends(scale: Sequence[float]) -> tuple[float, float]:
    means = [sum(part) / len(part) for a, b in _slices(len(scale)) if (part := scale[a:b])]
    heights = [_height(mean) for mean in means if math.isfinite(mean)]
    return (min(heights) - math.log(10), max(heights)) if heights else (0.0, 0.0)


def _slices(steps: int) -> list[tuple[int, int]]:
    edges = [round(i * steps / WIDTH) for i in range(WIDTH + 1)]
    return [(a, max(b, a + 1)) for a, b in pairwise(edges) if a < steps]


def _height(loss: float) -> float:
    return math.log(max(abs(loss), 1e-12))


def closing_lines(found: Suggestion) -> list[str]:
    """What the search suggests, and what that rests on."""
    lines = []
    if found.interrupted:
        lines.append("Interrupted: what follows rests on the trials above.")
    if math.isinf(found.given.score):
        lines.append(f"The configuration as given did not end: {found.given.ended}.")
    if found.confirming:
        pairs = "; ".join(
            f"{winner.score:.4g} against {given.score:.4g}" for given, winner in found.confirming
        )
        better = sum(winner.score < given.score for given, winner in found.confirming)
        lines.append(
            f"Loss with unseen seeds, winner against given: {pairs} "
            f"(better in {better} of {len(found.confirming)})."
        )
    if found.winner is None:
        lines.append("Nothing was better than the configuration as given: keep it.")
    elif not found.changes:
        lines.append(
            "The winner of the search was not better with unseen seeds: keep what is given."
        )
    else:
        unproven = "" if found.confirming else " (no time to try it with other seeds)"
        lines.append(f"Suggested{unproven}:")
        before = found.config.model_dump(mode="json")
        for key, value in found.changes.items():
            section, _, name = key.partition(".")
            old = before[section][name]
            lines.append(f"  {key}={value}" + ("" if old == value else f" (was {old})"))
    rest = found.suggested
    kfac = rest.kfac
    lines.append(
        f"  lr {rest.optimizer.lr:g}, momentum {rest.optimizer.momentum:g}, damping {kfac.damping}, "
        f"intervals {kfac.factor_update_steps}, {kfac.inverse_update_steps}, "
        f"trust_region {kfac.trust_region}"
        + (
            " (only the course of lr counts)"
            if kfac.enabled and kfac.trust_region == "adaptive"
            else ""
        )
    )
    if found.share < 1:
        lines.append(
            f"Trials were {found.share:.1%} of the run: damping and intervals carry over, a rate "
            "schedule less; more --minutes make them longer."
        )
    return lines
