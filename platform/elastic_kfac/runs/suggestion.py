"""Suggests learning rate, damping and intervals from short trials on the user's own model and data.

A coordinate search: from the best settings so far, one setting changes at a time. All trials of a seed
see the same samples from the same weights for the same number of steps; one whose training loss is above
the median of the others after a quarter or half of its steps stops there. The winner is suggested only if
it also wins with seeds that the search has not seen. Trials run in this process, as one worker.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config, apply_overrides, parse_config
from elastic_kfac.data.dataset import open_datasets
from elastic_kfac.errors import ElasticKfacError, NumericalError, UsageError
from elastic_kfac.training.rank import RankTrainer

Changes = Mapping[str, Any]
"""Values by `section.key`."""

TRIALS_PER_BUDGET = 14
"""The time is divided by this: about ten trials and, twice, the two that confirm."""
FEWEST_STEPS = 30
"""A shorter trial shows nothing but the start."""
RUNGS = (0.25, 0.5)
"""Shares of a trial after which it may be stopped."""
GAIN = 0.01
"""Relative decrease of the loss that counts as better."""
AS_GOOD = 0.02
"""Relative increase of the loss that cheaper steps may cost."""
CHEAPER = 0.05
"""Relative decrease of a step's CPU time that counts."""
CONFIRMING_SEEDS = 3
OUT_OF_TIME = "the time was up"


@dataclass
class Trial:
    """One training of `steps` steps, or the part of it that ran."""

    changes: Changes
    """Against the configuration that was given."""
    label: str
    seed: int
    losses: list[float] = field(default_factory=list)
    """Mean loss of each step's samples."""
    test_loss: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the evaluation split at the end, the most important one first."""
    seconds: float = 0.0
    """CPU time of the steps, on a GPU their time."""
    ended: str = ""
    """Why it ended early; empty if it took all its steps."""

    def loss_at(self, step: int, window: int) -> float:
        """Mean training loss over the `window` steps up to `step`."""
        part = self.losses[max(0, step - window) : step]
        return statistics.fmean(part) if part else math.inf

    @property
    def score(self) -> float:
        """The test loss at the end, without an evaluation split the training loss; infinite for a trial
        that ended early."""
        if self.ended:
            return math.inf
        loss = self.test_loss
        if loss is None:
            loss = self.loss_at(len(self.losses), max(1, len(self.losses) // 16))
        return loss if math.isfinite(loss) else math.inf

    @property
    def cost_s(self) -> float:
        """Per step."""
        return self.seconds / max(1, len(self.losses))


@dataclass
class Suggestion:
    """What the trials showed."""

    config: Config
    """As given."""
    steps: int
    """Of a trial, about."""
    share: float
    """Length of a trial as a share of the run."""
    trials: list[Trial] = field(default_factory=list)
    """Of the search, in order; the first is the configuration as given."""
    confirming: list[tuple[Trial, Trial]] = field(default_factory=list)
    """(given, winner) of the seeds that the search has not seen."""
    winner: Trial | None = None
    interrupted: bool = False

    @property
    def given(self) -> Trial:
        return self.trials[0]

    @property
    def is_confirmed(self) -> bool:
        """Whether the winner is better on average with unseen seeds, and with most of them."""
        pairs = [(given.score, winner.score) for given, winner in self.confirming]
        better = sum(winner < given for given, winner in pairs)
        sums = [sum(part) for part in zip(*pairs, strict=True)]
        return bool(pairs) and 2 * better > len(pairs) and sums[1] < sums[0]

    @property
    def changes(self) -> Changes:
        """What to change; nothing if the winner was not better with unseen seeds."""
        if self.winner is None or (self.confirming and not self.is_confirmed):
            return {}
        return self.winner.changes

    @property
    def suggested(self) -> Config:
        """The given configuration with the suggested settings."""
        return changed(self.config, self.changes)

    def as_json(self) -> dict[str, Any]:
        """Everything, for a file."""

        def row(trial: Trial) -> dict[str, Any]:
            losses = [loss if math.isfinite(loss) else None for loss in trial.losses]
            score = trial.score if math.isfinite(trial.score) else None
            test = trial.test_loss
            known = None if test is None or not math.isfinite(test) else test
            return {**vars(trial), "losses": losses, "test_loss": known, "score": score}

        return {
            "steps": self.steps,
            "share": self.share,
            "interrupted": self.interrupted,
            "changes": dict(self.changes),
            "confirmed": self.is_confirmed,
            "trials": [row(trial) for trial in self.trials],
            "confirming": [[row(given), row(winner)] for given, winner in self.confirming],
        }


def suggest(
    config: Config,
    *,
    minutes: float,
    device: torch.device | None = None,
    show: Callable[[Suggestion, Trial], None] = lambda found, trial: None,
) -> Suggestion:
    """Searches for `minutes`, evaluation and confirmation included.

    Args:
        config: What to improve; its shards exist.
        minutes: Time for all trials.
        device: Where trials compute.
        show: Called after each trial.

    Raises:
        UsageError: If the time is too short for the trials, or the configuration cannot run.
    """
    end = time.monotonic() + 60 * minutes
    torch.set_num_threads(config.train.torch_threads)
    found = Suggestion(config, *_trial_length(config, minutes, device))
    runner = TrialRunner(found, device, end, show)
    try:
        _search(runner)
        _confirm(runner)
    except KeyboardInterrupt:
        found.interrupted = True
        if not found.trials:
            raise
    return found


def changed(config: Config, changes: Changes) -> Config:
    """The configuration with other values.

    Raises:
        ConfigError: If they do not fit.
    """
    return parse_config(apply_overrides(config.to_change(), [*changes.items()]))


# -- trials ---------------------------------------------------------------------------------------


def _for_trials(config: Config, share: float) -> Config:
    """One worker, an evaluation at the end only, and this share of the run with its schedule."""
    epochs = config.train.epochs * share
    rates = config.optimizer
    changes: dict[str, Any] = {
        "elastic.min_workers": 1,
        "elastic.max_workers": 1,
        "train.epochs": epochs,
        "train.eval_every_epochs": epochs + 1,
        "train.stop_at_target": False,
        "analysis.every_epochs": None,
        "optimizer.warmup_epochs": rates.warmup_epochs * share,
        "optimizer.decay_epochs": [each * share for each in rates.decay_epochs],
        "optimizer.decay_start_epoch": rates.decay_start_epoch * share,
    }
    if rates.decay_end_epoch is not None:
        changes["optimizer.decay_end_epoch"] = rates.decay_end_epoch * share
    return changed(config, changes)


def _trial_length(config: Config, minutes: float, device: torch.device | None) -> tuple[int, float]:
    """Steps of a trial, and their share of the run.

    Raises:
        UsageError: If there is time for fewer than `FEWEST_STEPS`.
    """
    run = _for_trials(config, 1.0)
    budget_s = 60 * minutes / TRIALS_PER_BUDGET
    datasets = open_datasets(run)
    try:
        trainer = RankTrainer(run, Communicator.solo(), datasets, device=device)
        limit = time.monotonic() + budget_s
        seconds: list[float] = []
        while len(seconds) < 13 and not trainer.finished and time.monotonic() < limit:
            begin = time.monotonic()
            trainer.step()
            seconds.append(time.monotonic() - begin)
        begin = time.monotonic()
        trainer.evaluate()
        evaluation_s = time.monotonic() - begin
        size, samples = trainer.position / len(seconds), trainer.total_samples
    finally:
        datasets.close()
    # The first step also allocates, compiles and decomposes every layer.
    step_s = statistics.fmean(seconds[1:] or seconds)
    steps, total = int((budget_s - evaluation_s) / step_s), math.ceil(samples / size)
    if steps < min(FEWEST_STEPS, total):
        needed = TRIALS_PER_BUDGET * (min(FEWEST_STEPS, total) * step_s + evaluation_s) / 60
        raise UsageError(
            "--minutes is too short for trials of this model",
            given=f"{minutes:g}, time for {max(0, steps)} steps of {step_s:.2g} s in each of "
            f"{TRIALS_PER_BUDGET} trials, with {evaluation_s:.2g} s to evaluate",
            allowed=f"at least {min(FEWEST_STEPS, total)} steps",
            change=f"use --minutes {math.ceil(12 * needed) / 10:g}",
        )
    return min(steps, total), min(1.0, steps / total)


class TrialRunner:
    """Runs trials until the time is up."""

    def __init__(
        self,
        found: Suggestion,
        device: torch.device | None,
        end: float,
        show: Callable[[Suggestion, Trial], None],
    ) -> None:
        self.found, self._device, self._end, self._show = found, device, end, show
        self._longest_s = 0.0

    def has_time_for(self, trials: int) -> bool:
        """For so many trials as long as the longest so far."""
        return time.monotonic() + trials * self._longest_s < self._end

    def run(self, changes: Changes, label: str, seed: int, rivals: Sequence[Trial] = ()) -> Trial:
        """One trial; it is stopped if most `rivals`, which have the same seed, are better."""
        found, begin = self.found, time.monotonic()
        trial = Trial(changes, label, seed)
        try:
            config = changed(found.config, {**changes, "train.seed": seed})
            self._train(trial, _for_trials(config, found.share), rivals)
        except NumericalError:
            trial.ended = "diverged"
        except ElasticKfacError as error:
            if not found.trials:
                raise
            trial.ended = f"not possible: {error.line()}"
        if not trial.ended:
            self._longest_s = max(self._longest_s, time.monotonic() - begin)
        self._show(found, trial)
        return trial

    def _train(self, trial: Trial, config: Config, rivals: Sequence[Trial]) -> None:
        on_gpu = self._device is not None and self._device.type != "cpu"
        clock = time.perf_counter if on_gpu else time.process_time
        rungs = [max(2, round(share * self.found.steps)) for share in RUNGS]
        window = max(1, self.found.steps // 16)
        datasets = open_datasets(config)
        try:
            trainer = RankTrainer(config, Communicator.solo(), datasets, device=self._device)
            while not trainer.finished:
                begin = clock()
                totals = trainer.step().totals
                if trainer.epoch_end_is_due:
                    trainer.end_epoch()
                trial.seconds += clock() - begin
                trial.losses.append(totals.loss_sum / max(1, totals.terms))
                step = len(trial.losses)
                if time.monotonic() > self._end:
                    trial.ended = OUT_OF_TIME
                elif step in rungs:
                    at = [r.loss_at(step, window) for r in rivals if len(r.losses) >= step]
                    if len(at) > 1 and trial.loss_at(step, window) > statistics.median(at):
                        trial.ended = "worse than most"
                if trial.ended:
                    return
            if datasets.evaluation is not None:
                result = trainer.evaluate()
                trial.test_loss, trial.metrics = result.loss, dict(result.metrics)
        finally:
            datasets.close()


# -- the search -----------------------------------------------------------------------------------


class Move(NamedTuple):
    """A change to the best settings so far."""

    label: str
    changes: Changes
    saves: bool = False
    """It is to make steps cheaper, not the loss lower."""


Directions = Iterator[Sequence[Move]]
"""In each, a move is made if the one before has helped; one that has helped ends the others."""


def _search(runner: TrialRunner) -> None:
    found, seed = runner.found, runner.found.config.train.seed
    best = runner.run({}, "as given", seed)
    found.trials.append(best)
    for directions in LINES:
        for direction in directions(changed(found.config, best.changes)):
            before = best
            for move in direction:
                changes = {**best.changes, **move.changes}
                tried = any(trial.changes == changes for trial in found.trials)
                if tried or not runner.has_time_for(1 if best is found.given else 3):
                    break
                trial = runner.run(changes, move.label, seed, found.trials)
                found.trials.append(trial)
                if not _is_better(trial, best, saves=move.saves):
                    break
                best = trial
                found.winner = best
            if best is not before:
                break


def _is_better(trial: Trial, best: Trial, *, saves: bool) -> bool:
    if math.isinf(trial.score) or math.isinf(best.score):
        return trial.score < best.score
    if saves:
        as_good = trial.score <= best.score + AS_GOOD * abs(best.score)
        return as_good and trial.cost_s < (1 - CHEAPER) * best.cost_s
    return trial.score < best.score - GAIN * abs(best.score)


def _confirm(runner: TrialRunner) -> None:
    found = runner.found
    if found.winner is None:
        return
    for seed in range(CONFIRMING_SEEDS):
        if not runner.has_time_for(2):
            return
        unseen = found.config.train.seed + 1000 + seed
        given = runner.run({}, "as given", unseen)
        winner = runner.run(found.winner.changes, "winner", unseen)
        if OUT_OF_TIME in (given.ended, winner.ended):
            return
        found.confirming.append((given, winner))


def _defaults(config: Config) -> Directions:
    """The package's own, where the configuration has others."""
    own = Config().model_dump(mode="json")
    changes = {
        f"kfac.{key}": own["kfac"][key] for key in ("enabled", "trust_region", "kl_clip", "damping")
    }
    if config.optimizer.name not in ("sgd", "sharded_kfac"):
        changes |= {f"optimizer.{key}": own["optimizer"][key] for key in ("name", "lr", "momentum")}
    if changed(config, changes) != config:
        yield [Move("K-FAC's defaults", changes)]


def _scaled(key: str, value: Any, factor: float, most: int) -> Directions:
    """Multiples and fractions of a number; a schedule stays as it is."""
    if isinstance(value, int | float):
        name = key.partition(".")[2]
        for direction in (factor, 1 / factor):
            values = [float(f"{value * direction**power:.3g}") for power in range(1, most + 1)]
            yield [Move(f"{name} {new:g}", {key: new}) for new in values]


def _damping(config: Config) -> Directions:
    if config.kfac.enabled or config.optimizer.name == "sharded_kfac":
        yield from _scaled("kfac.damping", config.kfac.damping, 10.0, 3)


def _published(config: Config) -> Directions:
    """A fixed clip and less momentum, of which short runs at large batch may gain."""
    if config.kfac.enabled and config.kfac.trust_region == "adaptive":
        changes = {"trust_region": "fixed", "kl_clip": 1e-3, "damping": 1e-2}
        keys = {f"kfac.{key}": value for key, value in changes.items()}
        yield [Move("kl_clip 0.001, momentum 0.6", {**keys, "optimizer.momentum": 0.6})]


def _rate(config: Config) -> Directions:
    """The longest step instead, where only the course of the rate counts."""
    if config.kfac.enabled and config.kfac.trust_region == "adaptive":
        yield from _scaled("kfac.trust_radius", config.kfac.trust_radius, 2.0, 2)
    else:
        yield from _scaled("optimizer.lr", config.optimizer.lr, 3.0, 2)


def _clip(config: Config) -> Directions:
    if config.kfac.enabled and config.kfac.trust_region == "fixed":
        yield from _scaled("kfac.kl_clip", config.kfac.kl_clip, 10.0, 2)


def _momentum(config: Config) -> Directions:
    for value in (0.6, 0.8, 0.95):
        yield [Move(f"momentum {value:g}", {"optimizer.momentum": value})]


def _course(config: Config) -> Directions:
    if config.optimizer.lr_schedule == "constant":
        yield [Move("cosine rate", {"optimizer.lr_schedule": "cosine"})]


def _intervals(config: Config) -> Directions:
    keys = ("factor_update_steps", "inverse_update_steps")
    given = [getattr(config.kfac, key) for key in keys]
    if config.kfac.enabled and all(isinstance(value, int) for value in given):
        rarer = [
            new
            for new in ((5, 10), (10, 20), (10, 50))
            if all(a >= b for a, b in zip(new, given, strict=True)) and [*new] != given
        ]
        yield [
            Move(
                f"intervals {new[0]}, {new[1]}",
                {f"kfac.{key}": value for key, value in zip(keys, new, strict=True)},
                saves=True,
            )
            for new in rarer
        ]


LINES: tuple[Callable[[Config], Directions], ...] = (
    _defaults,
    _damping,
    _published,
    _rate,
    _clip,
    _momentum,
    _course,
    _intervals,
)
