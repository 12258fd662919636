"""The loop of one rank: restore, step, evaluate, snapshot, stop or finish.

Stop and snapshot requests travel in the all-reduce of the step, so all ranks act on them at the same
boundary. A run that drains (status `parked`) has saved its state; restarted with any number of ranks, it
continues with the next step.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, Future
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.data.dataset import Datasets, open_datasets
from elastic_kfac.errors import CommunicationError
from elastic_kfac.state.checkpoint import StateStore
from elastic_kfac.state.identity import changed_keys
from elastic_kfac.state.state import Progress, TrainingState
from elastic_kfac.training.callbacks import Callback, Control, event_row
from elastic_kfac.training.continuation import Continued, continue_on, restore_newest
from elastic_kfac.training.evaluation import EvalResult
from elastic_kfac.training.rank import EpochEnd, RankTrainer
from elastic_kfac.training.step import StepResult


@dataclass(frozen=True)
class Outcome:
    """Result of `run_rank`; equal on all ranks except for clocks."""

    status: Literal["finished", "parked", "left"]
    """`left`: the others continue without this rank."""
    reasons: tuple[str, ...]
    """The distinct stop reasons of the ranks' controls."""
    progress: Progress
    fractional_epoch: float
    state_sha256: str
    """Hash of the saved state, the run's `final_state_sha256` once it is finished; empty if nothing was
    saved because the others continue in place."""
    world_sizes: tuple[int, ...]
    """World sizes that committed steps, over all attempts, without consecutive repetitions."""
    metric: str = "accuracy"
    """The metric of `progress.best_value`."""


SURVIVORS = 3
"""Number of ranks, the lowest, that save their state after a loss; all would save the same bytes."""


SaveSurvivor = Callable[[TrainingState, Sequence[Mapping[str, Any]]], object]
"""Keeps the last committed state of a rank that lost a peer, before its process ends, and the newest
metric rows, of which a lost rank 0 may have reported only some. Best effort, and returns quickly."""


def run_rank(
    config: Config,
    communicator: Communicator,
    *,
    store: StateStore,
    callback: Callback,
    control: Control,
    device: torch.device | None = None,
    datasets: Datasets | None = None,
    save_survivor: SaveSurvivor | None = None,
    pool: Executor | None = None,
) -> Outcome:
    """Trains as one rank until the run ends or the control of any rank requests a stop. Collective.

    Rank 0 loads the latest state from `store`, reports rows to `callback` and saves; the stores of other
    ranks are not used. Decompositions run in `pool` (`KFAC.decompose_in`). After the loss of a peer,
    `save_survivor` receives the last committed state.

    Raises:
        ElasticKfacError: `CommunicationError` if a peer left, `NumericalError` if the loss is not finite,
            otherwise a usage or data error, the same on every rank.
    """
    opened = datasets or open_datasets(config)
    try:
        trainer = RankTrainer(
            config, communicator, opened, device=device, callback=callback, pool=pool
        )
        loop = RunLoop(trainer, store)
        try:
            loop.continue_from_newest()
            return loop.run_until_stopped(control)
        except CommunicationError:
            loop.note_costs()
            loop.report_noted_costs()
            can_save = trainer.is_committed and trainer.holds_everything
            if save_survivor is not None and can_save and communicator.rank < SURVIVORS:
                # A decomposition may still be under way from the lost peer.
                with contextlib.suppress(CommunicationError):
                    save_survivor(trainer.capture(), list(loop.recent_rows))
            raise
    finally:
        if datasets is None:
            opened.close()


SNAPSHOT_SHARE = 0.02
"""Upper bound on the CPU time spent on snapshots, as a fraction of the training time between them."""

_RECENT_ROWS = 256
"""Exceeds the number of rows that can be in transit at once."""


def affordable_interval_s(capture_cpu_s: float, store: StateStore) -> float:
    """Seconds between snapshots that keep them within `SNAPSHOT_SHARE`.

    0 if the store does not measure its CPU time.
    """
    if not store.snapshot_cpu_s:
        return 0.0
    return (capture_cpu_s + store.snapshot_cpu_s) / SNAPSHOT_SHARE


class RunLoop:
    """The loop around a trainer; rank 0 of the trainer's current world reports and saves.

    With `keep_newest` every rank keeps the newest state in memory, so that survivors can roll back to
    it; otherwise only rank 0 copies it.
    """

    def __init__(
        self,
        trainer: RankTrainer,
        store: StateStore,
        *,
        keep_newest: bool = False,
    ) -> None:
        self._trainer = trainer
        self._store = store
        trainer.callback.on_start(trainer)
        self._keep_newest = keep_newest
        self._newest: TrainingState | None = None
        self.recent_rows: deque[dict[str, Any]] = deque(maxlen=_RECENT_ROWS)
        """The newest metric rows of steps, on every rank."""
        self._saved_at_train_time_s = 0.0
        self._capture_cpu_s = 0.0
        self._last_step_time_s = 0.0
        self._target_reported = False
        self._noted_costs: dict[str, Any] | None = None
        self._saving: Future[bool] | None = None
        self._segments_being_saved = 0
        self._safe_segments = 0

    @property
    def _is_rank_zero(self) -> bool:
        return self._trainer.communicator.rank == 0

    @property
    def _report(self) -> Callback:
        """The callback on rank 0; elsewhere one that does nothing."""
        return self._trainer.callback if self._is_rank_zero else Callback()

    def continue_from_newest(self) -> None:
        """Restores the newest durable state; without one the run starts afresh. Collective."""
        trainer = self._trainer
        trainer.is_committed = False
        trainer.callback.on_point("recovery", trainer.progress.step)
        self._continue(restore_newest(trainer, self._newest, self._store.load_latest))

    def continue_on_other_ranks(self) -> None:
        """Continues on the ranks that the trainer has entered, in place where that is exact.

        Collective.
        """
        trainer = self._trainer
        trainer.callback.on_point("recovery", trainer.progress.step)
        self._continue(continue_on(trainer, self._newest, self._store.load_latest))

    def _continue(self, continued: Continued) -> None:
        trainer, changes = self._trainer, {}
        if continued.state is not None and continued.state.config:
            self._newest = continued.state if self._keep_newest else None
            changes = changed_keys(continued.state.config, trainer.config.model_dump(mode="json"))
        self._target_reported = trainer.progress.time_to_target_s is not None
        wall_time_s = max(trainer.wall_time_s, self._report.wall_time_s())
        trainer.start_clock(trainer.communicator.broadcast_object(wall_time_s, 0, tag="start"))
        self._saved_at_train_time_s = trainer.progress.train_time_s
        step = trainer.progress.step
        lost = max(0, self._report.last_step() - step)
        trainer.costs.enter()
        self.report_noted_costs()
        if continued.state is not None or continued.resized or lost:
            self._report.on_rollback(step, lost)
            self._report.on_event(
                event_row(
                    "restored",
                    step,
                    **self._world(),
                    steps_redone=lost,
                    plan=_plan_summary(trainer),
                    plan_reason=None if trainer.kfac is None else trainer.kfac.plan.reason or None,
                    way="resize" if continued.resized else "restore",
                    moved_bytes=continued.moved_bytes,
                )
            )
        if retuned := trainer.retune():
            self._report.on_event(event_row("retuned", step, **self._world(), **retuned))
        if trainer.config.plan.calibrate and trainer.kfac is not None:
            found = trainer.kfac.calibration
            assert found is not None
            reason = f"links of {found.network}"
            if found.inside_node is not None:
                reason += f", inside a node {found.inside_node}"
            if trainer.config.plan.unequal_shares:
                reason += f"; {_shares_in_words(trainer)}"
            details = {"reason": reason, "calibration": asdict(found)}
            self._report.on_event(event_row("calibrated", step, **self._world(), **details))
        if changes:
            text = "; ".join(f"{key} {old} → {new}" for key, (old, new) in changes.items())
            self._report.on_event(event_row("configuration", step, reason=text, changes=changes))

    def note_costs(self) -> None:
        """Where peers are lost, takes note of what the steps with them cost, by this rank's figures."""
        trainer = self._trainer
        if (costs := trainer.cost_row(alone=True)) is not None:
            self._noted_costs = event_row("costs", trainer.progress.step, **self._world(), **costs)

    def report_noted_costs(self) -> None:
        """Reports them from rank 0, which may be another one than before."""
        noted, self._noted_costs = self._noted_costs, None
        if noted is not None:
            self._report.on_event(noted)

    def keep_live_state(self) -> None:
        """Keeps the live state as the newest one; for ranks that hold all of it.

        Raises:
            CommunicationError: If a part of it was lost with a peer, and there is an older state.
        """
        if self._newest is None and self._trainer.kfac is not None:
            # Rather without the statistics that were under way than without any curvature.
            self._trainer.kfac.flush_what_came()
        self._newest = self._trainer.capture()

    def drop_rows_of_lost_steps(self) -> None:
        """Drops rows of steps that will be computed again."""
        while self.recent_rows and self.recent_rows[-1]["step"] > self._trainer.progress.step:
            self.recent_rows.pop()

    def report_rows_again(self) -> None:
        """On rank 0, reports the newest rows again; the callback must drop duplicates."""
        for row in self.recent_rows:
            self._report.on_metrics(row)

    def run_until_stopped(
        self,
        control: Control,
        *,
        durable: Callable[[str], bool] = lambda reason: True,
    ) -> Outcome:
        """Steps until the run is over or a control requests a stop.

        A checkpoint is saved first, and an event reports the stop, if a stop reason is `durable`; after
        any other stop the processes go on by themselves, and whoever asked for it reports the pause.
        """
        trainer = self._trainer
        snapshot = False
        while True:
            if trainer.epoch_end_is_due:
                self._report_epoch_end(trainer.end_epoch())
            if trainer.evaluation_is_due:
                self._report_evaluation(trainer.evaluate())
            if trainer.analysis_is_due:
                self._report.on_metrics({**trainer.analyse(), **self._where()})
            if trainer.finished:
                return self._end("finished")
            if replanned := trainer.review_plan():
                step = trainer.progress.step
                self._report.on_event(event_row("replanned", step, **self._world(), **replanned))
            if snapshot:
                # After the evaluation, or a restart from here would report it twice.
                self._snapshot()
            reason = control.stop_reason()
            result = trainer.step(stop=reason is not None, snapshot=self._wants_snapshot())
            self._report_step(result)
            if result.totals.stop:
                given = trainer.communicator.all_gather_object(reason, tag="stop")
                reasons = tuple(dict.fromkeys(r for r in given if r is not None))
                return self._end("parked", reasons, tuple(filter(durable, reasons)))
            for row in trainer.review_ranks(result.totals):
                self._report.on_event(row)
            snapshot = result.totals.snapshot > 0

    def _wants_snapshot(self) -> bool:
        interval = self._trainer.config.elastic.snapshot_interval_s
        interval = max(interval, affordable_interval_s(self._capture_cpu_s, self._store))
        age = self._trainer.progress.train_time_s - self._saved_at_train_time_s
        # The age that it would have at the end of the coming step.
        return self._is_rank_zero and age + self._last_step_time_s >= interval

    def _snapshot(self) -> None:
        trainer = self._trainer
        if not self._is_rank_zero and not self._keep_newest:
            trainer.join_capture()
        else:
            state = self._captured()
            if self._is_rank_zero:
                self._save_in_background(state)
        safe = trainer.communicator.broadcast_object(self._safe_segments, 0, tag="snapshot")
        trainer.ledger.written(safe)

    def _save_in_background(self, state: TrainingState) -> None:
        if self._saving is not None and self._saving.done() and self._saving.result():
            self._safe_segments = self._segments_being_saved
        saving = self._store.save_async(state)
        if saving is not None:
            self._saving = saving
            self._segments_being_saved = len(state.ledger.segments)

    def _captured(self) -> TrainingState:
        begin, begin_cpu = time.perf_counter(), time.thread_time()
        trainer = self._trainer
        state = trainer.capture()
        self._capture_cpu_s = time.thread_time() - begin_cpu
        trainer.account(time.perf_counter() - begin)
        self._saved_at_train_time_s = trainer.progress.train_time_s
        if self._keep_newest:
            self._newest = state
        return state

    def _end(
        self,
        status: Literal["finished", "parked"],
        reasons: tuple[str, ...] = (),
        durable: tuple[str, ...] = (),
    ) -> Outcome:
        trainer = self._trainer
        save = status == "finished" or bool(durable)
        state = self._captured()
        if self._is_rank_zero and save:
            self._store.wait()
            self._store.save(state)
        costs = trainer.cost_row()
        # No rank returns before the state is safe: a node may leave once its rank has ended.
        trainer.communicator.barrier(tag="end")
        step = trainer.progress.step
        if costs is not None:
            self._report.on_event(event_row("costs", step, **self._world(), **costs))
        if save:
            details = {"reason": "; ".join(durable)} if durable else {}
            self._report.on_event(event_row(status, step, **self._world(), **details))
        return Outcome(
            status=status,
            reasons=reasons,
            progress=trainer.progress,
            fractional_epoch=trainer.fractional_epoch,
            state_sha256=state.sha256() if save else "",
            world_sizes=tuple(trainer.ledger.world_sizes()),
            metric=trainer.metric,
        )

    def departed(self) -> Outcome:
        """The outcome of a rank that leaves the others."""
        trainer = self._trainer
        sizes = tuple(trainer.ledger.world_sizes())
        return Outcome("left", (), trainer.progress, trainer.fractional_epoch, "", sizes)

    def _report_step(self, result: StepResult) -> None:
        self._last_step_time_s = result.step_time_s
        trainer = self._trainer
        count, terms = max(result.totals.count, 1), max(result.totals.terms, 1)
        row = {
            **self._where(),
            "global_batch_size": result.totals.count,
            "loss": result.totals.loss_sum / terms,
            **({"accuracy": result.totals.correct / terms} if trainer.has_accuracy else {}),
            "lr": result.lr,
            "step_time_s": result.step_time_s,
            "samples_per_s": count / result.step_time_s,
            "data_wait_s": result.data_wait_s,
        }
        if trainer.scaler.enabled:
            row["loss_scale"] = trainer.scaler.scale
        wanted = trainer.batch.wanted_workers(trainer.position)
        if wanted is not None:
            row["wanted_workers"] = wanted
        self._report.on_step(row)
        if trainer.progress.step % trainer.config.train.log_every_steps == 0 or trainer.finished:
            row.update({} if trainer.kfac is None else trainer.kfac.metrics())
            row.update(trainer.sync.metrics())
            traffic = trainer.communicator.counters.total()
            row["communication_bytes"] = traffic.payload_bytes
            row["communication_calls"] = traffic.calls
            row["computation_s"] = trainer.progress.computation_s
            row["communication_s"] = trainer.progress.communication_s
            if trainer.slow is not None and trainer.slow.slowness:
                row["slowest_rank_factor"] = round(max(trainer.slow.slowness), 3)
            if result.attacked_fraction:
                row["adversarial_fraction"] = result.attacked_fraction
            # Every rank keeps the rows: if rank 0 is lost, another one can report its last ones.
            self.recent_rows.append(row)
            self._report.on_metrics(row)

    def _report_epoch_end(self, end: EpochEnd) -> None:
        trainer = self._trainer
        if end.measured is not None:
            columns = end.measured.columns()
            self._report.on_metrics(
                {**self._where(), **columns, "hessian_s": trainer.progress.hessian_s}
            )
        if end.growth is not None:
            details = {
                "old_batch_size": end.growth.old_batch_size,
                "new_batch_size": end.growth.new_batch_size,
                "reason": end.growth.reason,
                "wanted_workers": trainer.batch.wanted_workers(trainer.position),
            }
            step = trainer.progress.step
            self._report.on_event(event_row("batch_growth", step, **self._world(), **details))

    def _report_evaluation(self, result: EvalResult) -> None:
        trainer = self._trainer
        row: dict[str, Any] = {**self._where(), **result.columns("eval_")}
        if trainer.metric != "accuracy":
            row |= {"metric": trainer.metric, "direction": trainer.direction}
        if result.attacked is not None:
            row |= result.attacked.columns("eval_adversarial_")
        self._report.on_metrics(row)
        progress = self._trainer.progress
        if trainer.stopped_early:
            rule = trainer.config.train.early_stop
            assert rule is not None
            reason = f"no better eval_{rule.metric} for {rule.patience} evaluations"
            details = {**self._world(), "reason": reason}
            self._report.on_event(event_row("stopped_early", progress.step, **details))
        if progress.time_to_target_s is not None and not self._target_reported:
            self._target_reported = True
            self._report.on_event(
                event_row(
                    "target_reached",
                    progress.step,
                    **{f"eval_{trainer.metric}": result[trainer.metric]},
                )
            )

    def _where(self) -> dict[str, Any]:
        progress = self._trainer.progress
        return {
            "step": progress.step,
            "epoch": self._trainer.fractional_epoch,
            "samples": progress.samples_committed,
            **self._world(),
            "wall_time_s": self._trainer.wall_time_s,
            "train_time_s": progress.train_time_s,
        }

    def _world(self) -> dict[str, int]:
        return {"world_size": self._trainer.communicator.world_size}


def _shares_in_words(trainer: RankTrainer) -> str:
    """What ranks of different speeds get of a batch."""
    size = trainer.batch.size(trainer.communicator.world_size, trainer.position)
    if not trainer.sync.speeds:
        return "all ranks are equally fast and get equal shares"
    sizes = ", ".join(map(str, trainer.sync.share_sizes(size)))
    return f"shares of {size} samples by speed: {sizes}"


def _plan_summary(trainer: RankTrainer) -> str | None:
    """The plan on one line; None without K-FAC."""
    if trainer.kfac is None:
        return None
    plan = trainer.kfac.plan
    return (
        f"{plan.strategy}, {len(plan.columns)} columns over {plan.world_size} ranks, "
        f"grad_worker_frac {plan.grad_worker_frac:.4g}, {len(plan.layers)} layers, "
        f"{plan.sha256[:12]}"
    )
