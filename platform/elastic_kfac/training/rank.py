"""One rank of a run: steps, and what happens at the boundaries between them."""

from __future__ import annotations

import socket
import time
from collections.abc import Mapping
from concurrent.futures import Executor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from elastic_kfac.analysis.hessian_report import analysis_row
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.data.dataset import Datasets
from elastic_kfac.optimizers.batch_size import Growth
from elastic_kfac.placement.slow_ranks import SlowRanks
from elastic_kfac.tasks.attacks import evaluation_attack
from elastic_kfac.training.callbacks import Callback, Callbacks, event_row
from elastic_kfac.training.eigenvalue_watch import EigenvalueWatch, Measured
from elastic_kfac.training.evaluation import EarlyStopping, EvalResult, evaluate_split
from elastic_kfac.training.hooks import Hooks
from elastic_kfac.training.planning import PlanReview, Retuning, move_decompositions
from elastic_kfac.training.step import StepResult, StepTrainer
from elastic_kfac.training.sync.exchange import Totals


@dataclass(frozen=True)
class EpochEnd:
    """Measurements and decisions at the end of an epoch."""

    epoch: int
    measured: Measured | None
    growth: Growth | None


class RankTrainer(StepTrainer):
    """Steps, evaluates, analyses, and decides on the batch at the end of epochs."""

    def __init__(
        self,
        config: Config,
        communicator: Communicator,
        datasets: Datasets,
        *,
        device: torch.device | None = None,
        callback: Callback | None = None,
        pool: Executor | None = None,
    ) -> None:
        self._hooks, self.slow = Hooks.of(config), SlowRanks.of(config.elastic)
        followers = Callbacks(callback or Callback(), *self._hooks.hooks)
        super().__init__(
            config, communicator, datasets, device=device, callback=followers, pool=pool
        )
        self._task, self._inputs = self._parts.task, self._parts.passes.preprocess
        if self._hooks.hooks:
            self._hooks.check(self._inputs(datasets.train.read(0, 0, min(4, self.total_samples))))
            self._parts.passes.transform = self._hooks.transform
        self._early_stopping: EarlyStopping | None = None
        if (rule := config.train.early_stop) is not None:
            direction = self._task.direction_of(rule.metric)
            self._early_stopping = EarlyStopping(rule, direction)
        self._eigenvalues = EigenvalueWatch(
            self.model, self._task, config, datasets.train, self._inputs
        )
        self._review = PlanReview.of(config)
        self._retuning = Retuning.of(config)
        self._evaluation_attack = None
        if datasets.evaluation is not None:
            self._evaluation_attack = evaluation_attack(
                config.adversarial, self._inputs, datasets.evaluation
            )

    def small_parts(self) -> dict[str, Any]:
        early = {} if self._early_stopping is None else {"early_stopping": self._early_stopping}
        hooks = {"hooks": self._hooks} if self._hooks.hooks else {}
        retuning = {} if self._retuning is None else {"retuning": self._retuning}
        eigenvalues = {"eigenvalues": self._eigenvalues}
        return {**super().small_parts(), **eigenvalues, **early, **hooks, **retuning}

    @property
    def metric(self) -> str:
        """The metric of the target, or else the most important one of the task."""
        goal = self.config.train.goal
        return self._task.main_metric if goal is None else goal.metric

    @property
    def direction(self) -> Literal["max", "min"]:
        """Whether larger or smaller values of `metric` are better."""
        return self._task.direction_of(self.metric)

    @property
    def has_accuracy(self) -> bool:
        """Whether steps count correct predictions."""
        return self._task.has_accuracy

    @property
    def finished(self) -> bool:
        """Whether every sample of the run is committed, or an evaluation ends it before."""
        reached = self.progress.time_to_target_s is not None
        ended = self.stopped_early or (self.config.train.stop_at_target and reached)
        return self.position >= self.total_samples or ended

    @property
    def stopped_early(self) -> bool:
        """Whether `train.early_stop` ends the run."""
        return self._early_stopping is not None and self._early_stopping.is_over

    def _points(self, every_epochs: float) -> int:
        """How many points, `every_epochs` apart, the position has passed."""
        every = every_epochs * self.datasets.train.num_samples
        passed = int(self.position / every + 1e-9)
        # The end of the run is such a point, wherever it lies.
        if self.position >= self.total_samples and self.position - passed * every > 0.5:
            return passed + 1
        return passed

    # -- evaluation ------------------------------------------------------------------------------

    @property
    def evaluation_is_due(self) -> bool:
        """Whether the position has passed an evaluation point that was not evaluated yet."""
        if self.datasets.evaluation is None:
            return False
        return self._points(self.config.train.eval_every_epochs) > self.progress.evaluations

    def evaluate(self) -> EvalResult:
        """Counts every evaluation sample exactly once over all ranks. Collective."""
        dataset = self.datasets.evaluation
        assert dataset is not None
        self.settle()
        self.callback.on_point("evaluation", self.progress.step)
        begin, average = time.perf_counter(), self._parts.average
        with nullcontext() if average is None else average.in_model():
            result = evaluate_split(
                self.model,
                self._task,
                dataset,
                self._inputs,
                self.communicator,
                self.config.train,
                attack=self._evaluation_attack,
                whole_batches=self.sync.evaluates_whole_batches,
            )
        if self._early_stopping is not None:
            self._early_stopping.took(result[self._early_stopping.rule.metric])
        self.account(time.perf_counter() - begin)
        self.progress = self.progress.evaluated(
            result[self.metric],
            self._points(self.config.train.eval_every_epochs),
            None if (goal := self.config.train.goal) is None else goal.value,
            self.wall_time_s,
            self.direction,
        )
        return result

    # -- analysis --------------------------------------------------------------------------------

    @property
    def analysis_is_due(self) -> bool:
        """Whether the position has passed a point of `analysis.every_epochs` not analysed yet."""
        every = self.config.analysis.every_epochs
        return every is not None and self._points(every) > self.progress.analyses

    def analyse(self) -> dict[str, Any]:
        """Columns about the Hessian of this model; training is not affected. Collective."""
        self.settle()
        columns = analysis_row(
            self.model,
            self._task.loss,
            self._inputs,
            self.datasets,
            self.config,
            self.communicator,
            self._task.terms,
        )
        elapsed = float(columns["analysis_time_s"])
        self.account(elapsed)
        points = self._points(self.config.analysis.every_epochs or 1)
        time_s = self.progress.hessian_s + elapsed
        self.progress = replace(self.progress, analyses=points, hessian_s=time_s)
        return columns

    # -- the plan ------------------------------------------------------------------------------------

    def review_plan(self) -> dict[str, Any] | None:
        """Plans anew where decompositions take other times than predicted; what came of it, for an
        event. None where nothing changes. Collective."""
        if self.kfac is None or self._review is None:
            return None
        return self._review.replan(self.kfac, self.progress.step)

    def step(self, *, stop: bool = False, snapshot: bool = False) -> StepResult:
        if self._retuning is None or self.kfac is None:
            return super().step(stop=stop, snapshot=snapshot)
        due = self.kfac.due
        result = super().step(stop=stop, snapshot=snapshot)
        self._retuning.saw(self.kfac, due, result.totals.count, result.step_time_s)
        return result

    def retune(self) -> dict[str, Any] | None:
        """Chooses intervals and damping again after a resize; what came of it, for an event. None where
        nothing changes. Collective."""
        if self.kfac is None:
            return None
        if self._retuning is None:
            self.kfac.retune()
            return None
        batch = self.batch.size(self.communicator.world_size, self.position)
        return self._retuning.choose(self.kfac, batch)

    # -- slow ranks ----------------------------------------------------------------------------------

    def _synchronise_over(self, communicator: Communicator) -> None:
        super()._synchronise_over(communicator)
        if self.slow is not None:
            self._expected_speeds = self.sync.speeds or [1.0] * communicator.world_size
            self._speeds = self._expected_speeds
            self.slow.enter(self._expected_speeds)

    def review_ranks(self, totals: Totals) -> list[dict[str, Any]]:
        """Judges the ranks' times of a step; events about those that have become slow, or as fast as the
        others again. With `elastic.rebalance` their shares follow. Collective where there are any."""
        if self.slow is None or not totals.seconds:
            return []
        size = totals.count
        verdicts = self.slow.saw(totals.seconds, self.sync.share_sizes(size))
        if not verdicts:
            return []
        begin = time.perf_counter()
        hosts = self.communicator.all_gather_object(socket.gethostname(), tag="slow ranks")
        shares = ""
        if self.config.elastic.rebalance:
            self._rebalance(self.slow.factors)
            sizes = ", ".join(map(str, self.sync.share_sizes(size)))
            shares = f"; shares of {size} samples: {sizes}"
        self.account(time.perf_counter() - begin)
        return [
            event_row(
                "slow_rank" if verdict.is_slow else "rank_recovered",
                self.progress.step,
                world_size=self.communicator.world_size,
                rank=verdict.rank,
                host=hosts[verdict.rank],
                factor=round(verdict.factor, 2),
                reason=f"{verdict.in_words(hosts[verdict.rank])}{shares}",
            )
            for verdict in verdicts
        ]

    def _rebalance(self, factors: Mapping[int, float]) -> None:
        """Gives slow ranks so much less to do."""
        ranks = range(self.communicator.world_size)
        speeds = [self._expected_speeds[rank] / factors.get(rank, 1.0) for rank in ranks]
        if self.kfac is not None and self.config.optimizer.name != "sharded_kfac":
            changes = [new / old for new, old in zip(speeds, self._speeds, strict=True)]
            move_decompositions(self.kfac, changes)
        self._speeds = speeds
        self.sync.share(speeds)

    # -- ends of epochs --------------------------------------------------------------------------

    @property
    def epoch_end_is_due(self) -> bool:
        """Whether an epoch is complete and its end was not handled yet."""
        return self.batch.epochs < self.progress.epoch

    def end_epoch(self) -> EpochEnd:
        """Measures the eigenvalue that the batch follows, and decides on the batch. Collective."""
        begin = time.perf_counter()
        epoch, measured = self.progress.epoch, None
        self.settle()
        if self.batch.needs_eigenvalue:
            measured = self._eigenvalues.measure(self.communicator, self.kfac)
            time_s = self.progress.hessian_s + measured.time_s
            self.progress = replace(self.progress, hessian_s=time_s)
        growth = self.batch.end_epoch(epoch, None if measured is None else measured.driving)
        self.account(time.perf_counter() - begin)
        return EpochEnd(epoch, measured, growth)
