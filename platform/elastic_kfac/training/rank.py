"""One rank of a run: model, optimizers, one step, one evaluation, and its state as a value.

Nothing here outlives a resize except through `capture` and `restore`, and nothing of the mathematics
asks for the world size: the global batch is cut by position, losses are divided by the global count,
and sums travel in one vector.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from elastic_kfac.analysis.hessian_report import analysis_row
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config, steps_apart
from elastic_kfac.data.dataset import Datasets, rank_slice
from elastic_kfac.data.stream import Batch
from elastic_kfac.errors import NumericalError, StateError
from elastic_kfac.optimizers.batch_size import Growth
from elastic_kfac.state.identity import config_sha256
from elastic_kfac.state.ledger import Ledger
from elastic_kfac.state.state import (
    Progress,
    TrainingState,
    capture,
    restore_model,
    restore_optimizer,
)
from elastic_kfac.tasks.attacks import evaluation_attack
from elastic_kfac.tasks.losses import make_task
from elastic_kfac.tasks.models import build_model
from elastic_kfac.training.activation_checkpointing import checkpoint_activations
from elastic_kfac.training.batch_control import BatchControl
from elastic_kfac.training.callbacks import Callback, Point
from elastic_kfac.training.eigenvalue_watch import EigenvalueWatch, Measured
from elastic_kfac.training.evaluation import EvalResult, evaluate_split
from elastic_kfac.training.first_order import make_optimizer
from elastic_kfac.training.passes import Passes, Place
from elastic_kfac.training.precision import LossScaler
from elastic_kfac.training.rates import RateControl
from elastic_kfac.training.second_order import PARTS, GradientPath
from elastic_kfac.training.sync.exchange import Totals
from elastic_kfac.training.sync.local_steps import StepsApart
from elastic_kfac.training.sync.reproducible import (
    ReproducibleExchange,
    agree_on_conditions,
    check_conditions,
    conditions,
    make_exchange,
)
from elastic_kfac.training.sync.sync_batch_norm import synchronise_batch_norm

if TYPE_CHECKING:
    from elastic_kfac.kfac.kfac import KFAC


@dataclass(frozen=True)
class StepResult:
    """What a committed step was."""

    totals: Totals
    lr: float
    step_time_s: float
    data_wait_s: float
    overflow: bool
    attacked_fraction: float = 0.0
    """γ: share of each logical micro-batch that was attacked."""


@dataclass(frozen=True)
class EpochEnd:
    """What was found and decided at the end of an epoch."""

    epoch: int
    measured: Measured | None
    growth: Growth | None


class RankTrainer:
    """Trains as one rank of `communicator`; `regroup` moves it to another one between steps."""

    def __init__(
        self,
        config: Config,
        communicator: Communicator,
        datasets: Datasets,
        *,
        device: torch.device | None = None,
        callback: Callback | None = None,
    ) -> None:
        self.config = config
        self.callback = callback or Callback()
        self.is_committed = False
        """Whether model, optimizer and curvature are those of the last committed step: not while a step
        or a restore changes them, nor after either has failed."""
        self.communicator = communicator
        self.datasets = datasets
        self.device = device or torch.device("cpu")
        self.task = make_task(config.train)
        self.model = build_model(
            config.model,
            num_classes=datasets.train.num_classes,
            image_shape=datasets.train.image_shape,
            seed=config.train.seed,
        ).to(self.device)
        if config.train.sync_batch_norm:
            self.model = self._synchronised(communicator)
        if config.train.activation_checkpointing:
            checkpoint_activations(self.model)
        self.passes = Passes(self.model, self.task, config, datasets.train, self.device)
        self.optimizer = make_optimizer(self.model, config.optimizer)
        self.apart = StepsApart(config, self.model, self.optimizer, self.passes, datasets.train)
        self._steps_apart = steps_apart(config)
        self.path = self._make_path()
        self.scaler = LossScaler.for_precision(config.train.precision)
        self.batch = BatchControl(config, datasets.train.num_samples)
        self._eigenvalues = EigenvalueWatch(
            self.model, self.task, config, datasets.train, self.passes.preprocess
        )
        self.exchange = make_exchange(self.model, config.elastic)
        self._check_world()
        self.ledger = Ledger()
        self.progress = Progress()
        self.rates = RateControl(config)
        self._newest_lr = config.optimizer.lr
        self._evaluation_attack = None
        if datasets.evaluation is not None:
            self._evaluation_attack = evaluation_attack(
                config.adversarial, self.passes.preprocess, datasets.evaluation
            )

    @property
    def kfac(self) -> KFAC | None:
        """The preconditioner of the present world, if there is one."""
        return self.path.kfac

    @property
    def total_samples(self) -> int:
        """Samples after which the run is over (a fraction of an epoch counts)."""
        return max(1, round(self.config.train.epochs * self.datasets.train.num_samples))

    @property
    def position(self) -> int:
        """Samples of the order that are committed, over all epochs."""
        return self.progress.epoch * self.datasets.train.num_samples + self.progress.consumed

    @property
    def fractional_epoch(self) -> float:
        return self.position / self.datasets.train.num_samples

    @property
    def finished(self) -> bool:
        """Whether every sample of the run is committed, or the target is reached and ends it."""
        reached = self.progress.time_to_accuracy_s is not None
        return self.position >= self.total_samples or (self.config.train.stop_at_target and reached)

    @property
    def evaluation_is_due(self) -> bool:
        """Whether the position has passed an evaluation point that was not evaluated yet."""
        if self.datasets.evaluation is None:
            return False
        return self._points(self.config.train.eval_every_epochs) > self.progress.evaluations

    def step(self, *, stop: bool = False, snapshot: bool = False) -> StepResult:
        """Takes one optimizer step and commits it; flags are summed over all ranks.

        Raises:
            NumericalError: If loss or gradients are not finite (outside fp16).
            CommunicationError: If a peer left; the step is not committed then.
        """
        begin, waited_s = time.perf_counter(), self.communicator.counters.waited_s
        before = self.progress
        self.callback.on_point("step_begin", before.step + 1)
        self.batch.of_world.enter_world(self.communicator.world_size, self.position)
        first, count = before.consumed, self._batch_size()
        samples, data_wait_s = self._read_share(first, count)
        try:
            place = Place(
                before.step,
                before.epoch,
                count,
                self._share(first, count)[0] - first,
                self.batch.attacked_fraction(self.position),
            )
            local = self.passes.run(
                self.exchange,
                self.communicator,
                self.kfac,
                samples,
                place,
                self._loss_scale(count),
            )
            self.callback.on_point("backward_done", before.step + 1)
            local_totals = replace(local, stop=int(stop), snapshot=int(snapshot))
            totals = self.path.reduce(self.exchange, local_totals, before.step)
            self.callback.on_point("gradients_exchanged", before.step + 1)
            lr = self._update(totals, count, local.count)
        except BaseException:
            self.exchange.abandon_step()
            raise
        self.ledger.append(
            step=before.step + 1,
            epoch=before.epoch,
            first_position=first,
            num_samples=count,
            world_size=self.communicator.world_size,
            id_hash=totals.id_hash,
        )
        epoch_is_over = first + count == self.datasets.train.num_samples
        elapsed = time.perf_counter() - begin
        waited_s = self.communicator.counters.waited_s - waited_s
        self.progress = replace(
            before,
            step=before.step + 1,
            epoch=before.epoch + epoch_is_over,
            consumed=0 if epoch_is_over else first + count,
            samples_committed=before.samples_committed + totals.count,
            train_time_s=before.train_time_s + elapsed,
            computation_s=before.computation_s + elapsed - waited_s - data_wait_s,
            communication_s=before.communication_s + waited_s,
        )
        self.account(elapsed)
        if self._steps_apart:
            self.apart.stepped(before.epoch, first, count)
            if self.apart.due:
                self._come_together()
        self.is_committed = True
        self.callback.on_point("committed", self.progress.step)
        overflow = not totals.gradients_are_finite
        return StepResult(totals, lr, elapsed, data_wait_s, overflow, place.attacked_fraction)

    def evaluate(self) -> EvalResult:
        """Counts every evaluation sample exactly once over all ranks. Collective."""
        dataset = self.datasets.evaluation
        assert dataset is not None
        self._come_together()
        self.callback.on_point("evaluation", self.progress.step)
        begin = time.perf_counter()
        result = evaluate_split(
            self.model,
            self.task,
            dataset,
            self.passes.preprocess,
            self.communicator,
            self.config.train,
            attack=self._evaluation_attack,
            whole_batches=self.config.elastic.reproducible,
        )
        self.account(time.perf_counter() - begin)
        self.progress = self.progress.evaluated(
            result.accuracy,
            self._points(self.config.train.eval_every_epochs),
            self.config.train.target_accuracy,
        )
        return result

    @property
    def analysis_is_due(self) -> bool:
        """Whether the position has passed a point of `analysis.every_epochs` that nobody looked at."""
        every = self.config.analysis.every_epochs
        return every is not None and self._points(every) > self.progress.analyses

    def analyse(self) -> dict[str, Any]:
        """What a metric row says about the Hessian here; training does not notice. Collective."""
        self._come_together()
        columns = analysis_row(
            self.model, self.task.loss, self.datasets, self.config, self.communicator
        )
        elapsed = float(columns["analysis_time_s"])
        self.account(elapsed)
        points = self._points(self.config.analysis.every_epochs or 1)
        time_s = self.progress.hessian_s + elapsed
        self.progress = replace(self.progress, analyses=points, hessian_s=time_s)
        return columns

    @property
    def epoch_end_is_due(self) -> bool:
        """Whether an epoch is complete and nobody has looked at its end yet."""
        return self.batch.epochs < self.progress.epoch

    def end_epoch(self) -> EpochEnd:
        """Decides at the end of an epoch how the batch goes on, on every rank alike. Collective."""
        begin = time.perf_counter()
        epoch, measured = self.progress.epoch, None
        self._come_together()
        if self.batch.needs_eigenvalue:
            measured = self._eigenvalues.measure(self.communicator, self.kfac)
            time_s = self.progress.hessian_s + measured.time_s
            self.progress = replace(self.progress, hessian_s=time_s)
        growth = self.batch.end_epoch(epoch, None if measured is None else measured.driving)
        self.account(time.perf_counter() - begin)
        return EpochEnd(epoch, measured, growth)

    def account(self, elapsed_s: float) -> None:
        """Adds time that the whole world spent to the cost of the run."""
        cost = elapsed_s * self.communicator.world_size
        self.progress = replace(
            self.progress,
            worker_seconds=self.progress.worker_seconds + cost,
            gpu_seconds=self.progress.gpu_seconds + (cost if self.device.type == "cuda" else 0.0),
        )

    def capture(self) -> TrainingState:
        """The state of this step boundary. Collective, because K-FAC gathers what owners keep."""
        parts: dict[str, Any] = {
            **self.join_capture(),
            "scaler": self.scaler.state_dict(),
            "batch_policy": self.batch.of_world.state_dict(),
            "batch_size": self.batch.state_dict(),
            "eigenvalues": self._eigenvalues.state_dict(),
            "rates": self.rates.state_dict(),
        }
        if self.config.elastic.reproducible:
            parts["reproducible"] = self._conditions()
        return capture(
            model=self.model,
            optimizer=self.optimizer,
            parts=parts,
            progress=self.progress,
            ledger=self.ledger.value(),
            seed=self.config.train.seed,
            data_sha256=self.datasets.train.sha256,
            config_sha256=config_sha256(self.config),
        )

    def join_capture(self) -> dict[str, Any]:
        """The collective part of `capture`, for ranks that need no copy themselves."""
        self.callback.on_point("capture", self.progress.step)
        self._come_together()
        self.ledger.seal()
        return self.path.state_dict()

    def restore(self, state: TrainingState) -> None:
        """Becomes what `state` says, whatever world size wrote it.

        Raises:
            StateError: If it belongs to another model, data set or seed, or if the reproducible mode
                cannot promise equal bits.
        """
        if state.data_sha256 != self.datasets.train.sha256:
            raise StateError(
                "the run's data set has changed: its manifest is not the one of the checkpoint",
                given=self.config.data.shards,
                change="restore the shards, or start a run under another name",
            )
        if state.seed != self.config.train.seed:
            raise StateError(
                "train.seed differs from the seed of the checkpoint",
                given=self.config.train.seed,
                allowed=state.seed,
            )
        if self.config.elastic.reproducible:
            check_conditions(state.part("reproducible"), self._conditions())
        self.is_committed = False
        restore_model(self.model, state)
        restore_optimizer(self.model, self.optimizer, state.part("optimizer") or {})
        self.path.load_state_dict({name: state.part(name) for name in PARTS})
        self.scaler.load_state_dict(state.part("scaler") or {})
        self.batch.of_world.load_state_dict(state.part("batch_policy") or {})
        self.batch.load_state_dict(state.part("batch_size") or {})
        self._eigenvalues.load_state_dict(state.part("eigenvalues") or {})
        self.rates.load_state_dict(state.part("rates") or {})
        self.ledger = Ledger(state.ledger)
        self.progress = state.progress
        self.passes.drop_mixed()
        self.apart.forget()

    def disband(self) -> None:
        """Lets go of every reference to the present process group."""
        self.communicator = Communicator.solo()
        self.path.close()
        if self.config.train.sync_batch_norm:
            self._synchronised(self.communicator)

    def regroup(self, communicator: Communicator) -> None:
        """Becomes a member of another world; a `restore` must follow, because K-FAC starts anew.

        Collective over the new world.
        """
        self.disband()
        self.communicator = communicator
        self.passes.drop_mixed()
        if self.config.train.sync_batch_norm:
            self._synchronised(communicator)
        # Anew, because a survivor's K-FAC may be torn: some layers exchanged, others not.
        self.path = self._make_path()
        self._check_world()

    # -- inside -----------------------------------------------------------------------------------

    def _make_path(self) -> GradientPath:
        return GradientPath(
            self.model,
            self.optimizer,
            self.config,
            self.communicator,
            self._on_curvature,
        )

    def _on_curvature(self, point: Point) -> None:
        if point == "factor_update":
            # From here on factors, decompositions and parameters change one after another.
            self.is_committed = False
        self.callback.on_point(point, self.progress.step + 1)

    def _synchronised(self, communicator: Communicator) -> nn.Module:
        size = self.config.train.sync_batch_norm_group
        return synchronise_batch_norm(self.model, communicator, group_size=size)

    def _come_together(self) -> None:
        """Merges ranks that have stepped apart. Collective, and nothing where they have not."""
        if self.apart.apart:
            begin = time.perf_counter()
            self.apart.merge(self.communicator, self.exchange, self._newest_lr)
            elapsed = time.perf_counter() - begin
            self.account(elapsed)
            self.progress = replace(
                self.progress, train_time_s=self.progress.train_time_s + elapsed
            )

    def _conditions(self) -> dict[str, Any]:
        return conditions(self.model, self.device, self.config.elastic.logical_shards)

    def _check_world(self) -> None:
        if self.config.elastic.reproducible and self.communicator.world_size > 1:
            agree_on_conditions(self.communicator, self._conditions())

    def _share(self, first: int, count: int) -> tuple[int, int]:
        rank, world_size = self.communicator.rank, self.communicator.world_size
        if isinstance(self.exchange, ReproducibleExchange):
            return self.exchange.share(first, count, rank, world_size)
        return rank_slice(first, count, rank, world_size)

    def _batch_size(self) -> int:
        left = self.datasets.train.num_samples - self.progress.consumed
        return min(self.batch.size(self.communicator.world_size, self.position), left)

    def _read_share(self, first: int, count: int) -> tuple[Batch | None, float]:
        begin = time.perf_counter()
        own_first, own_count = self._share(first, count)
        samples = None
        if own_count:
            samples = self.datasets.train.read(self.progress.epoch, own_first, own_count)
        waited = time.perf_counter() - begin
        epoch, next_first = self.progress.epoch, first + count
        if next_first == self.datasets.train.num_samples:
            epoch, next_first = epoch + 1, 0
        if epoch * self.datasets.train.num_samples + next_first < self.total_samples:
            left = self.datasets.train.num_samples - next_first
            position = epoch * self.datasets.train.num_samples + next_first
            size = self.batch.size(self.communicator.world_size, position)
            self.datasets.train.prefetch(epoch, *self._share(next_first, min(size, left)))
        return samples, waited

    def _loss_scale(self, global_count: int) -> float:
        return self.scaler.scale / self.exchange.loss_divisor(global_count)

    def _update(self, totals: Totals, count: int, local_count: int) -> float:
        # The middle of the batch: neither the first rate of a warm-up nor a last one is 0.
        position = self.position + count / 2
        rates = self.rates.at(
            position / self.datasets.train.num_samples, self.batch.lr_factor(position)
        )
        self.rates.apply(self.optimizer, rates)
        finite = totals.gradients_are_finite
        if totals.count == 0:
            raise NumericalError(
                f"every record of step {self.progress.step + 1} is bad",
                change="check the shards with `elastic-kfac shards verify`",
            )
        if not finite and not self.scaler.enabled:
            raise NumericalError(
                f"loss or gradients are not finite in step {self.progress.step + 1}",
                given=f"mean loss {totals.loss_sum / max(totals.count, 1)}",
                change="lower optimizer.lr or raise kfac.damping; the last checkpoint is kept",
            )
        # Losses may be divided by the planned count; bad records make the true one smaller.
        divisor = self.exchange.loss_divisor(count)
        if self._steps_apart:
            # Of this rank's samples only, and a rank without any stays where it is.
            self.exchange.publish_gradients(max(local_count, 1) / divisor)
        else:
            self.exchange.publish_gradients(self.scaler.scale * totals.count / divisor)
        self._newest_lr = rates.lr
        if finite and (local_count or not self._steps_apart):
            self.path.update(
                num_samples=local_count,
                loss_scale_per_sample=self.scaler.scale / divisor,
                statistics=self.exchange.reduced,
            )
            self.is_committed = False
            self.callback.on_point("preconditioned", self.progress.step + 1)
        elif not finite:
            self.path.discard_statistics()
        self.exchange.finish_step(totals.count)
        self.scaler.update(overflow=not finite)
        self.rates.took(rates)
        return rates.lr

    def _points(self, every_epochs: float) -> int:
        every = every_epochs * self.datasets.train.num_samples
        passed = int(self.position / every + 1e-9)
        # The end of the run is such a point, wherever it lies.
        if self.position >= self.total_samples and self.position - passed * every > 0.5:
            return passed + 1
        return passed
