"""The table of metrics: columns of a run's files, their units and meaning.

Writers (the loop, telemetry) and readers (reports, dashboards) look names up here, so that a column
cannot be spelt in two ways. Every entry can be exported as well: telemetry hands `exported_name` to
`ray.util.metrics` with the entry's labels; Prometheus finds it under that name after Ray's prefix `ray_`.
Base units stand in the name (`_seconds`, `_bytes`), counters end in `_total`.

Counters are exported as Ray gauges that hold the running total, beginning with 0: Ray's own counter
cannot export 0, and `increase()` does not see the event with which a series begins.

Labels are bounded: one with `values` takes only those, another at most `most` different ones; what
does not fit is counted under `other`. Series of workers that are gone stay exported for minutes, so
quantities of the whole run are exported by one process that outlives the workers, the run coordinator.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Literal

OTHER = "other"
"""Collects the label values beyond a label's bound."""


@dataclass(frozen=True)
class Label:
    """One dimension of a metric, with a bound on how many series it makes."""

    name: str
    help: str
    values: tuple[str, ...] = ()
    """All possible values; empty when they are only known in a run."""
    most: int = 1
    """Bound on the number of different values of an open label."""

    def admit(self, value: str, seen: Collection[str]) -> str:
        """Returns `value`, or `other` where the bound on the values `seen` so far is reached."""
        if self.values:
            return value if value in self.values else OTHER
        return value if value in seen or len(seen) < self.most else OTHER


LABELS: tuple[Label, ...] = (
    Label("run", "Name of the run.", most=64),
    Label("rank", "Rank in the process group.", most=256),
    Label("tag", "Content of a collective.", most=24),
    Label(
        "phase",
        "Part of a step.",
        values=(
            "data",
            "forward_backward",
            "factors",
            "decompositions",
            "preconditioning",
            "communication",
            "optimizer",
            "snapshot",
            "evaluation",
        ),
    ),
    Label(
        "state",
        "State of the run.",
        values=("starting", "running", "draining", "waiting", "ended"),
    ),
    Label("change", "Reason of a change of the worker group.", values=("resize", "recovery")),
    Label(
        "moment",
        "Point that a change of the worker group has reached.",
        values=("noticed", "parked", "planned", "started", "joined", "restored"),
    ),
    Label("factor", "Side of a Kronecker product.", values=("A", "G")),
    Label("statistic", "Statistic over layers.", values=("median", "max")),
    Label(
        "part",
        "Content of the memory.",
        values=("factors", "second_order", "pending", "snapshots", "momentum"),
    ),
)
"""Every label, each with its bound."""


Area = Literal["train", "curvature", "communication", "elastic", "data"]


@dataclass(frozen=True)
class Metric:
    """One measured quantity."""

    column: str
    """Name in `metrics.jsonl`, `events.jsonl` or `result.json`."""
    unit: str
    """Unit as people read it; empty for a plain number."""
    help: str
    area: Area = "train"
    kind: Literal["gauge", "counter"] = "gauge"
    """A counter is a running total: it only grows while its exporter lives, and begins at 0."""
    labels: tuple[str, ...] = ("run",)
    """Names of its labels."""
    exporter: Literal["coordinator", "rank"] = "coordinator"
    """The run coordinator exports once for the run, a rank for itself."""

    @property
    def exported_name(self) -> str:
        """The name handed to Ray."""
        name = self.column.removeprefix(f"{self.area}_")
        for short, written_out in (("_per_s", "_per_second"), ("_s", "_seconds")):
            if name.endswith(short):
                name = name.removesuffix(short) + written_out
                break
        suffix = "_total" if self.kind == "counter" else ""
        return f"kfac_{self.area}_{name}{suffix}"


def _gauge(column: str, unit: str, help_text: str, *labels: str) -> Metric:
    return Metric(column, unit, help_text, labels=("run", *labels))


def _counter(column: str, unit: str, help_text: str, *labels: str) -> Metric:
    return Metric(column, unit, help_text, kind="counter", labels=("run", *labels))


def _rank_counter(column: str, unit: str, help_text: str) -> Metric:
    return Metric(column, unit, help_text, kind="counter", labels=("run", "rank"), exporter="rank")


_TABLE: Mapping[Area, tuple[Metric, ...]] = {
    "train": (
        _gauge("step", "steps", "Newest committed optimizer step; goes back when work is redone."),
        _gauge("epoch", "epochs", "Passes over the training split, with the fraction of this one."),
        _counter("samples", "samples", "Committed training samples."),
        _gauge("loss", "", "Mean training loss over the global batch of a step."),
        _gauge("accuracy", "", "Share of the step's global batch that was classified correctly."),
        _gauge("eval_loss", "", "Mean loss over the evaluation split."),
        _gauge("eval_accuracy", "", "Share of the evaluation split that was classified correctly."),
        _gauge("eval_metric", "", "Value of the target's metric over the evaluation split."),
        _gauge("eval_adversarial_loss", "", "Mean loss over the attacked evaluation split."),
        _gauge("eval_adversarial_accuracy", "", "Accuracy on the attacked evaluation split."),
        _gauge(
            "adversarial_fraction", "", "Share of each base batch that was attacked in training."
        ),
        _gauge("merged_workers", "workers", "Ranks that took part in the merge of local steps."),
        _gauge("computation_s", "s", "Stepping time outside of collectives and waiting for data."),
        _gauge("communication_s", "s", "Stepping time inside collectives."),
        _gauge("lr", "", "Learning rate of the step."),
        _gauge("loss_scale", "", "Scale of the fp16 loss."),
        _counter("skipped_steps", "steps", "Steps skipped for a non-finite loss."),
        _gauge("step_time_s", "s", "Time from one committed step to the next, without evaluation."),
        _counter("phase_time_s", "s", "Time rank 0 spent in a part of its steps.", "phase"),
        _gauge("wall_time_s", "s", "Time since the run began, downtime and evaluation included."),
        _gauge("train_time_s", "s", "Stepping time since the run began."),
        _gauge("samples_per_s", "samples/s", "Samples of the step over its time."),
        _gauge("global_batch_size", "samples", "True number of samples in the step."),
        _gauge("run_state", "", "1 for the state of the run, 0 for the others.", "state"),
        _rank_counter("step_cpu_s", "s", "CPU time of steps."),
        _rank_counter("telemetry_cpu_s", "s", "CPU time of measuring."),
    ),
    "curvature": (
        _gauge("hessian_eigenvalue", "", "Top eigenvalue that the batch follows."),
        _gauge("kfac_eigenvalue", "", "Top eigenvalue of the Kronecker factors."),
        _gauge(
            "eigenvalue_correlation", "", "Spearman correlation of the two over the epochs so far."
        ),
        _gauge("hessian_time_s", "s", "Time of the newest eigenvalue measurement."),
        _gauge("hessian_s", "s", "Time of all eigenvalue measurements."),
        _gauge("merge_newton_rank", "", "Dimensions of the merge's Newton part."),
        _gauge("merge_sigma", "", "Estimate of the top curvature at a merge."),
        _gauge("damping", "", "Tikhonov damping of the step."),
        _gauge("kl_clip_scale", "", "Step scale: factor of the trust region or KL clip."),
        _counter("factor_updates", "updates", "Factor updates so far."),
        _counter("inverse_updates", "updates", "Decompositions so far, per layer."),
        _gauge("inverse_age_steps", "steps", "Steps since the decomposition in use."),
        _counter("fallbacks", "layers", "Failed decompositions."),
        _counter("nonfinite_factors", "factors", "Factor updates rejected for NaN or infinity."),
        _gauge(
            "condition_number",
            "",
            "Largest over smallest eigenvalue of a damped factor, over all layers.",
            "factor",
            "statistic",
        ),
        Metric(
            "memory_bytes",
            "bytes",
            "Memory of the preconditioner on a rank.",
            labels=("run", "rank", "part"),
            exporter="rank",
        ),
    ),
    "communication": (
        _counter("communication_bytes", "bytes", "Payload sent by rank 0.", "tag"),
        _counter("communication_calls", "calls", "Collectives called.", "tag"),
        _rank_counter("communication_exposed_s", "s", "Time a rank was blocked in collectives."),
        _counter("communication_errors", "errors", "Failed collectives."),
    ),
    "elastic": (
        _gauge("world_size", "workers", "Workers in the process group."),
        _gauge("wanted_workers", "workers", "Workers that the batch size can keep busy."),
        _gauge("min_workers", "workers", "Lower bound on the number of workers."),
        _gauge("max_workers", "workers", "Upper bound on the number of workers."),
        _counter("resizes", "changes", "Changes of the worker group so far.", "change"),
        _counter("failures", "failures", "Worker groups lost without notice."),
        _counter("preemptions", "notices", "Notices that a node will be preempted."),
        _gauge("downtime_s", "s", "From the last step before a change to the first after it."),
        _counter("lost_time_s", "s", "Downtime of all changes together."),
        _gauge(
            "moment_s",
            "s",
            "Time from the last step before the newest change to a point of it.",
            "moment",
        ),
        _counter("steps_redone", "steps", "Steps computed again after a loss."),
        _gauge(
            "slowest_rank_factor",
            "",
            "Time per sample of the slowest rank's passes over the median of the others.",
        ),
        Metric(
            "slow_rank_factor",
            "",
            "The same of a rank that is named as slow; 0 for the others.",
            labels=("run", "rank"),
            exporter="rank",
        ),
        _gauge("notice_s", "s", "Time from a preemption notice to its deadline."),
        _gauge("hand_over_s", "s", "Time from a preemption notice until the state was safe."),
        _gauge("snapshot_timestamp_s", "s", "Unix time of the newest snapshot in memory."),
        _gauge("vault_bytes", "bytes", "State held by the in-memory replicas."),
        _gauge("checkpoint_timestamp_s", "s", "Unix time of the newest durable checkpoint."),
        _gauge("checkpoint_time_s", "s", "Time to write the newest checkpoint."),
        _gauge("checkpoint_bytes", "bytes", "Size of the newest checkpoint."),
    ),
    "data": (
        _gauge("data_wait_s", "s", "Time the step waited for its samples."),
        _rank_counter("stall_s", "s", "Time waited for samples."),
        _rank_counter("read_bytes", "bytes", "Read from storage."),
        _rank_counter("cache_hits", "shards", "Shards found on the node."),
        _rank_counter("cache_misses", "shards", "Shards fetched first."),
        _rank_counter("quarantined", "records", "Bad records skipped."),
    ),
}

METRICS: tuple[Metric, ...] = tuple(
    replace(entry, area=area) for area, entries in _TABLE.items() for entry in entries
)
"""Every measured quantity, grouped by area."""


_BY_COLUMN = {entry.column: entry for entry in METRICS}
_BY_LABEL = {entry.name: entry for entry in LABELS}


def metric(column: str) -> Metric:
    """The entry of a column.

    Raises:
        KeyError: If the table has no such column.
    """
    return _BY_COLUMN[column]


def label(name: str) -> Label:
    """The label of this name.

    Raises:
        KeyError: If there is none.
    """
    return _BY_LABEL[name]
