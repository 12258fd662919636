"""One training step, from samples to the commit, and the state that outlives it.

Nothing of the mathematics depends on the world size: the global batch is cut by position, losses are
divided by the global count, and sums travel in one vector.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn.utils import clip_grad_norm_

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.data.batch import Batch
from elastic_kfac.data.dataset import Datasets
from elastic_kfac.errors import NumericalError
from elastic_kfac.kfac.step_costs import StepCosts
from elastic_kfac.state.ledger import Ledger
from elastic_kfac.state.state import (
    Progress,
    TrainingState,
    capture,
    restore_model,
    restore_optimizer,
)
from elastic_kfac.training.assembly import assemble, join_batch_norm
from elastic_kfac.training.batch_control import BatchControl
from elastic_kfac.training.callbacks import Callback, Point
from elastic_kfac.training.first_order import RateControl, Rates
from elastic_kfac.training.identity import check_identity
from elastic_kfac.training.preconditioner import calibrate, make_preconditioner
from elastic_kfac.training.sync.synchronisation import Span, Totals


@dataclass(frozen=True)
class StepResult:
    """A committed step."""

    totals: Totals
    lr: float
    step_time_s: float
    data_wait_s: float
    attacked_fraction: float = 0.0
    """γ: share of each logical micro-batch that was attacked."""


class StepTrainer:
    """Takes steps as one rank of `communicator`; `join` moves it to other ranks between steps."""

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
        self.config, self._pool = config, pool
        self.callback = callback or Callback()
        self.datasets = datasets
        self.device = device or torch.device("cpu")
        self.is_committed = False
        """Whether model, optimizer and curvature are those of the last committed step: not while a step
        or a restore changes them, nor after either has failed."""
        parts = assemble(config, communicator, datasets.train, self.device)
        self._parts, self.model, self.optimizer = parts, parts.model, parts.optimizer
        self.sync, self.scaler = parts.sync, parts.scaler
        self.batch = BatchControl(config, datasets.train.num_samples)
        self.rates = RateControl(config)
        self.ledger = Ledger()
        self.progress = Progress()
        self.costs = StepCosts()
        self._zero: float | None = None
        """When the wall time was 0 on the clock of this process; None before it is known."""
        self.communicator = communicator
        self.left_world_size = 0
        """Ranks of the world that was left last; 0 before."""
        self._precondition_for(communicator)

    def _precondition_for(self, communicator: Communicator) -> None:
        self.kfac = make_preconditioner(self.model, self.optimizer, self.config, communicator)
        if self.kfac is not None:
            self.kfac.on_phase = self._on_phase
            self.kfac.decompose_in(self._pool)
        self._synchronise_over(communicator)

    def _synchronise_over(self, communicator: Communicator) -> None:
        """`sync` joins these ranks, and their times find their places. Collective."""
        self.sync.join(communicator, self.kfac)
        self.sync.vector.time_ranks(communicator.world_size if self._times(communicator) else 0)

    def _on_phase(self, phase: Point) -> None:
        if phase == "factor_update":
            # From here on, factors, decompositions and parameters change one after another.
            self.is_committed = False
        self.callback.on_point(phase, self.progress.step + 1)

    # -- where the run is ------------------------------------------------------------------------

    @property
    def total_samples(self) -> int:
        """Samples after which the run is over (a fraction of an epoch counts)."""
        return max(1, round(self.config.train.epochs * self.datasets.train.num_samples))

    @property
    def position(self) -> int:
        """Committed samples of the order, over all epochs."""
        return self.progress.epoch * self.datasets.train.num_samples + self.progress.consumed

    @property
    def fractional_epoch(self) -> float:
        return self.position / self.datasets.train.num_samples

    # -- one step --------------------------------------------------------------------------------

    def step(self, *, stop: bool = False, snapshot: bool = False) -> StepResult:
        """Takes one optimizer step and commits it; flags are summed over all ranks.

        Raises:
            NumericalError: If loss or gradients are not finite (outside fp16).
            CommunicationError: If a peer left; the step is not committed then.
        """
        begin, waited_s = time.perf_counter(), self.communicator.counters.waited_s
        number = self.progress.step + 1
        self.callback.on_point("step_begin", number)
        span = self._next_span()
        try:
            with self.costs.timers("data"):
                samples, data_wait_s = self._read(span)

            divisor = self.sync.loss_divisor(span.count)
            loss_scale = self.scaler.scale / divisor
            adapts = self.kfac is not None and self.kfac.reduction_due()
            self._parts.passes.record(adapts)
            with self.costs.timers("passes"), self._own_time() as own_s:
                local = self.sync.accumulate(self._parts.passes, samples, span, loss_scale)
            self.callback.on_point("backward_done", number)

            if self.sync.carries_statistics:
                self._on_phase("factor_exchange")
            seconds = tuple(own_s) if self._times(self.communicator) else ()
            local = replace(local, stop=int(stop), snapshot=int(snapshot), seconds=seconds)
            with self.costs.timers("gradients"):
                totals = self.sync.reduce(local, span.step)
            self.callback.on_point("gradients_exchanged", number)

            rates = self._rates_of(span)
            self._check(totals)
            has_update = self.sync.publish(totals, local, divisor, self.scaler.scale)
            if not totals.gradients_are_finite:
                if self.kfac is not None:
                    self.kfac.skip_step()
            elif has_update:
                self._precondition_and_update(local, loss_scale)
                if adapts:
                    self._adapt_damping()
                self.callback.on_point("preconditioned", number)
            self.sync.finish_step(totals)
            self.scaler.update(overflow=not totals.gradients_are_finite)
            self.rates.took(rates)
        except BaseException:
            self.sync.abort_step()
            raise
        elapsed = time.perf_counter() - begin
        waited_s = self.communicator.counters.waited_s - waited_s
        self._commit(span, totals, elapsed, data_wait_s, waited_s)
        self.costs.saw(self.communicator, self.kfac, elapsed)
        if self.sync.committed(span, rates.lr):
            self.settle()
        self.is_committed = True
        self.callback.on_point("committed", number)
        return StepResult(totals, rates.lr, elapsed, data_wait_s, span.attacked_fraction)

    @contextmanager
    def _own_time(self) -> Iterator[list[float]]:
        """Afterwards the list holds the seconds that this rank did not wait for others."""
        counters, spent = self.communicator.counters, list[float]()
        begin, waited_s = time.perf_counter(), counters.waited_s
        yield spent
        spent.append(time.perf_counter() - begin - (counters.waited_s - waited_s))

    def _times(self, communicator: Communicator) -> bool:
        """Whether the ranks' own times travel with the gradients."""
        return self.config.elastic.slow_factor is not None and communicator.world_size > 1

    def _next_span(self) -> Span:
        before, total = self.progress, self.datasets.train.num_samples
        self.batch.of_world.enter_world(self.communicator.world_size, self.position)
        size = self.batch.size(self.communicator.world_size, self.position)
        count = min(size, total - before.consumed)
        return Span(
            before.step,
            before.epoch,
            before.consumed,
            count,
            *self.sync.slice(before.consumed, count),
            attacked_fraction=self.batch.attacked_fraction(self.position),
        )

    def _read(self, span: Span) -> tuple[Batch | None, float]:
        """This rank's samples, and how long they took; announces the next ones to the dataset."""
        begin, dataset = time.perf_counter(), self.datasets.train
        samples = None
        if span.own_count:
            samples = dataset.read(span.epoch, span.own_first, span.own_count)
        waited = time.perf_counter() - begin
        position = span.epoch * dataset.num_samples + span.first + span.count
        if position < self.total_samples:
            epoch, first = divmod(position, dataset.num_samples)
            size = self.batch.size(self.communicator.world_size, position)
            dataset.prefetch(epoch, *self.sync.slice(first, min(size, dataset.num_samples - first)))
        return samples, waited

    def _rates_of(self, span: Span) -> Rates:
        # The middle of the batch: neither the first rate of a warm-up nor a last one is 0.
        position = self.position + span.count / 2
        rates = self.rates.at(
            position / self.datasets.train.num_samples, self.batch.lr_factor(position)
        )
        self.rates.apply(self.optimizer, rates)
        return rates

    def _check(self, totals: Totals) -> None:
        if totals.count == 0:
            raise NumericalError(
                f"every record of step {self.progress.step + 1} is bad",
                change="check the shards with `elastic-kfac shards verify`",
            )
        if not totals.gradients_are_finite and not self.scaler.enabled:
            raise NumericalError(
                f"loss or gradients are not finite in step {self.progress.step + 1}",
                given=f"mean loss {totals.loss_sum / max(totals.terms, 1)}",
                change="lower optimizer.lr or raise kfac.damping",
            )

    def _precondition_and_update(self, local: Totals, loss_scale: float) -> None:
        if self.config.optimizer.clip_grad_norm is not None:
            clip_grad_norm_(self.model.parameters(), self.config.optimizer.clip_grad_norm)
        if self.kfac is not None:
            samples = None if self._parts.task.counts_terms else local.count
            self.kfac.step(samples, loss_scale, statistics=self.sync.statistics)
        self.is_committed = False
        if self.kfac is None or not self.kfac.updates_weights:
            with self.costs.timers("optimizer"):
                self.optimizer.step()
        if self._parts.rescaling is not None:
            self._parts.rescaling.apply()
        if self._parts.average is not None:
            self._parts.average.update()

    def _adapt_damping(self) -> None:
        """Compares what the update did to the loss of this step's samples with what K-FAC predicted."""
        assert self.kfac is not None
        own = self._parts.passes.replay()
        everybody = self.communicator.all_gather_object(own, tag="damping")
        before, after, counts = zip(*(one for part in everybody for one in part), strict=True)
        # Correctly rounded sums: the same passes give the same bits for any number of ranks.
        self.kfac.adapt_damping((math.fsum(after) - math.fsum(before)) / sum(counts))

    def _commit(
        self, span: Span, totals: Totals, elapsed: float, data_wait_s: float, waited_s: float
    ) -> None:
        before = self.progress
        self.ledger.append(
            step=span.step + 1,
            epoch=span.epoch,
            first_position=span.first,
            num_samples=span.count,
            world_size=self.communicator.world_size,
            id_hash=totals.id_hash,
        )
        epoch_is_over = span.first + span.count == self.datasets.train.num_samples
        self.progress = replace(
            before,
            step=span.step + 1,
            epoch=span.epoch + epoch_is_over,
            consumed=0 if epoch_is_over else span.first + span.count,
            samples_committed=before.samples_committed + totals.count,
            train_time_s=before.train_time_s + elapsed,
            computation_s=before.computation_s + elapsed - waited_s - data_wait_s,
            communication_s=before.communication_s + waited_s,
        )
        self.account(elapsed)

    @property
    def wall_time_s(self) -> float:
        """Time in which the run has existed, downtime and evaluation included."""
        if self._zero is None:
            return self.progress.wall_time_s
        return time.perf_counter() - self._zero

    def start_clock(self, wall_time_s: float) -> None:
        """The run has existed for `wall_time_s` now."""
        self._zero = time.perf_counter() - wall_time_s

    def account(self, elapsed_s: float) -> None:
        """Adds time that all ranks spent to the cost of the run."""
        cost = elapsed_s * self.communicator.world_size
        self.progress = replace(
            self.progress,
            worker_seconds=self.progress.worker_seconds + cost,
            gpu_seconds=self.progress.gpu_seconds + (cost if self.device.type == "cuda" else 0.0),
        )

    def cost_row(self, *, alone: bool = False) -> dict[str, Any] | None:
        """What the steps of this world cost, as fields of an event; None without new ones. Collective,
        unless this rank is `alone`, without peers that are lost."""
        elements = sum(p.numel() for p in self.model.parameters() if p.requires_grad)
        row = self.costs.row(self.communicator, self.kfac, elements, self.device, alone=alone)
        self.costs.enter()
        return row

    def settle(self) -> None:
        """Gives all ranks one model before it is evaluated, saved or handed over. Collective."""
        begin = time.perf_counter()
        if self.sync.settle():
            elapsed = time.perf_counter() - begin
            self.account(elapsed)
            train_time_s = self.progress.train_time_s + elapsed
            self.progress = replace(self.progress, train_time_s=train_time_s)

    # -- state -----------------------------------------------------------------------------------

    @property
    def holds_everything(self) -> bool:
        """Whether this rank can capture alone: no part of the state is kept by its owner only."""
        return self.sync.holds_everything and (self.kfac is None or self.kfac.holds_everything)

    def small_parts(self) -> dict[str, Any]:
        """Equal on every rank: name in the state -> object with `state_dict` and `load_state_dict`."""
        average = self._parts.average
        return {
            **({} if average is None else {"average": average}),
            "scaler": self.scaler,
            "batch_policy": self.batch.of_world,
            "batch_size": self.batch,
            "rates": self.rates,
        }

    def capture(self) -> TrainingState:
        """The state of this step boundary. Collective, because K-FAC gathers what owners keep."""
        parts = self.join_capture()
        parts |= {name: part.state_dict() for name, part in self.small_parts().items()}
        return capture(
            model=self.model,
            optimizer=self.optimizer,
            parts=parts,
            progress=replace(self.progress, wall_time_s=self.wall_time_s),
            ledger=self.ledger.value(),
            seed=self.config.train.seed,
            data_sha256=self.datasets.train.sha256,
            config=self.config.model_dump(mode="json"),
        )

    def join_capture(self) -> dict[str, Any]:
        """The collective part of `capture`, for ranks that need no copy themselves."""
        self.callback.on_point("capture", self.progress.step)
        self.settle()
        self.ledger.seal()
        parts: dict[str, Any] = {}
        if self.kfac is not None:
            parts["kfac"] = self.kfac.collect_state()
        if self.sync.part is not None and (state := self.sync.state_dict()) is not None:
            parts[self.sync.part] = state
        return parts

    def restore(self, state: TrainingState) -> None:
        """Continues from `state`, whatever world size wrote it.

        Raises:
            StateError: If it belongs to another model, data set or seed, or if the reproducible mode
                cannot promise equal bits.
        """
        check_identity(state, self.config, self.datasets.train.sha256)
        self.restore_all_but_kfac(state)
        if self.kfac is not None and (saved := state.part("kfac")) is not None:
            self.kfac.load_state_dict(saved)

    def restore_all_but_kfac(self, state: TrainingState) -> None:
        """`restore` where `KFAC.resize` brings the preconditioner."""
        self.sync.load_state_dict(state.part(self.sync.part) if self.sync.part else None)
        self.is_committed = False
        restore_model(self.model, state)
        restore_optimizer(self.model, self.optimizer, state.part("optimizer") or {})
        for name, part in self.small_parts().items():
            part.load_state_dict(state.part(name) or {})
        self.ledger = Ledger(state.ledger)
        self.progress = state.progress
        self._parts.passes.forget_mixed()

    # -- other ranks -----------------------------------------------------------------------------

    def leave(self) -> None:
        """Drops every reference to the present process group; what this rank holds stays."""
        self.left_world_size = self.communicator.world_size
        self.sync.close()
        if self.kfac is not None:
            self.kfac.leave()
        self.communicator = Communicator.solo()
        join_batch_norm(self.config, self.model, self.communicator)

    def enter(self, communicator: Communicator) -> None:
        """Becomes one of other ranks after `leave`; `continuation.continue_on` follows. Collective."""
        self.communicator = communicator
        self._parts.passes.forget_mixed()
        join_batch_norm(self.config, self.model, communicator)

    def build_preconditioner(self, communicator: Communicator | None = None) -> None:
        """K-FAC anew, as one that holds nothing yet, for the present ranks or those given. Collective."""
        if self.kfac is not None:
            self.kfac.close()
        self._precondition_for(communicator or self.communicator)

    def resize_preconditioner(self) -> int | None:
        """K-FAC works with the present ranks and keeps what it holds; the bytes that moved. Collective.

        None if a part of the state left with the rank that kept it.
        """
        if self.kfac is not None:
            calibrate(self.kfac, self.config.plan, self.communicator, self.device)
        report = None if self.kfac is None else self.kfac.resize(self.communicator)
        self._synchronise_over(self.communicator)
        if report is None:
            return 0
        return None if report.lost else report.moved_bytes
