"""The one table of what a run measures: columns of the run's files, their units and meaning.

Writers (the loop, telemetry) and readers (reports, dashboards) look names up here, so that a column
cannot be spelt in two ways. Every entry can be exported as well: telemetry hands `exported_name` to
`ray.util.metrics` with the entry's labels, and Prometheus then knows it as `prometheus_name`. Base
units stand in the name (`_seconds`, `_bytes`), counters end in `_total`.

Telemetry exports counters, too, as Ray gauges that hold the running total, beginning with 0: Ray's
own counter cannot say 0, and `increase()` does not see the event with which a series begins.

Labels are bounded: one with `values` takes only those, another at most `most` different ones; what
does not fit is counted under `other`. Series of workers that are gone stay exported for minutes, so
quantities of the whole run are exported by one process, the recorder, which outlives the workers.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

RAY_PREFIX = "ray_"
"""What Ray puts before the names of `ray.util.metrics`."""

OTHER = "other"
"""Where label values go that a label has no room for."""


@dataclass(frozen=True)
class Label:
    """One dimension of a metric, with a bound on how many series it makes."""

    name: str
    help: str
    values: tuple[str, ...] = ()
    """All values there are; empty when they are only known in a run."""
    most: int = 1
    """How many different values an open label may take."""

    def admit(self, value: str, seen: Collection[str]) -> str:
        """The value to export: itself, or `other` where the bound is reached.

        Args:
            value: What was measured.
            seen: The values that have been exported under this label so far.
        """
        if self.values:
            return value if value in self.values else OTHER
        return value if value in seen or len(seen) < self.most else OTHER


LABELS: tuple[Label, ...] = (
    Label("run", "Name of the run.", most=64),
    Label("rank", "Rank in the process group.", most=256),
    Label("tag", "What a collective carries.", most=24),
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
        "What the run is doing.",
        values=("starting", "running", "parking", "waiting", "ended"),
    ),
    Label("change", "Why the world changed.", values=("resize", "recovery")),
    Label(
        "moment",
        "Point that a change of the world has reached.",
        values=("noticed", "parked", "planned", "started", "joined", "restored"),
    ),
    Label("factor", "Side of a Kronecker product.", values=("A", "G")),
    Label("statistic", "How layers are summed up.", values=("median", "max")),
    Label(
        "part",
        "What the memory holds.",
        values=("factors", "second_order", "pending", "snapshots", "momentum"),
    ),
)
"""Every label, each with its bound."""


@dataclass(frozen=True)
class Metric:
    """One measured quantity."""

    column: str
    """Name in `metrics.jsonl`, `events.jsonl` or `result.json`."""
    unit: str
    """Unit as people read it; empty for a plain number."""
    help: str
    area: Literal["train", "curvature", "communication", "elastic", "data"] = "train"
    kind: Literal["gauge", "counter"] = "gauge"
    """A counter is a running total: it only grows while its exporter lives, and begins at 0."""
    labels: tuple[str, ...] = ("run",)
    """Names of its labels."""
    exporter: Literal["recorder", "rank"] = "recorder"
    """Who exports it: the recorder once for the run, or every rank for itself."""

    @property
    def exported_name(self) -> str:
        """The name under which telemetry exports it."""
        name = self.column.removeprefix(f"{self.area}_")
        for short, written_out in (("_per_s", "_per_second"), ("_s", "_seconds")):
            if name.endswith(short):
                name = name.removesuffix(short) + written_out
                break
        suffix = "_total" if self.kind == "counter" else ""
        return f"kfac_{self.area}_{name}{suffix}"

    @property
    def prometheus_name(self) -> str:
        """The name under which Prometheus finds it."""
        return RAY_PREFIX + self.exported_name

    @property
    def most_series(self) -> int:
        """How many series it can have at most, `other` included."""
        total = 1
        for name in self.labels:
            bound = label(name)
            total *= (len(bound.values) or bound.most) + 1
        return total


_RANK = ("run", "rank")

_TRAINING: tuple[Metric, ...] = (
    Metric("step", "steps", "Newest committed optimizer step; goes back when work is redone."),
    Metric("epoch", "epochs", "Passes over the training split, with the fraction of this one."),
    Metric("samples", "samples", "Committed training samples.", kind="counter"),
    Metric("loss", "", "Mean training loss over the global batch of a step."),
    Metric("accuracy", "", "Share of the step's global batch that was classified correctly."),
    Metric("eval_loss", "", "Mean loss over the evaluation split."),
    Metric("eval_accuracy", "", "Share of the evaluation split that was classified correctly."),
    Metric("eval_adversarial_loss", "", "Mean loss over the attacked evaluation split."),
    Metric("eval_adversarial_accuracy", "", "Share of the attacked split that was right."),
    Metric("adversarial_fraction", "", "Share of each base batch that was attacked in training."),
    Metric("merged_workers", "workers", "Ranks that stepped apart and took part in the merge."),
    Metric("computation_s", "s", "Stepping time outside of collectives and waiting for data."),
    Metric("communication_s", "s", "Stepping time inside collectives."),
    Metric("lr", "", "Learning rate of the step."),
    Metric("loss_scale", "", "Scale of the fp16 loss."),
    Metric("skipped_steps", "steps", "Steps skipped for a non-finite loss.", kind="counter"),
    Metric("step_time_s", "s", "Time from one committed step to the next, without evaluation."),
    Metric(
        "phase_time_s",
        "s",
        "Time that rank 0 spent in a part of its steps.",
        kind="counter",
        labels=("run", "phase"),
    ),
    Metric("wall_time_s", "s", "Time since the run began, downtime and evaluation included."),
    Metric("train_time_s", "s", "Stepping time since the run began."),
    Metric("samples_per_s", "samples/s", "Samples of the step over its time."),
    Metric("global_batch_size", "samples", "True number of samples in the step."),
    Metric(
        "run_state", "", "1 for what the run is doing, 0 for the rest.", labels=("run", "state")
    ),
    Metric("step_cpu_s", "s", "CPU time of steps.", "train", "counter", _RANK, "rank"),
    Metric("telemetry_cpu_s", "s", "CPU time of measuring.", "train", "counter", _RANK, "rank"),
)

_CURVATURE: tuple[Metric, ...] = (
    Metric("hessian_eigenvalue", "", "Top eigenvalue that the batch follows.", area="curvature"),
    Metric("kfac_eigenvalue", "", "Top eigenvalue of the Kronecker factors.", area="curvature"),
    Metric(
        "eigenvalue_correlation",
        "",
        "Spearman correlation of the two over the epochs so far.",
        area="curvature",
    ),
    Metric("hessian_time_s", "s", "Time of the newest eigenvalue measurement.", area="curvature"),
    Metric("hessian_s", "s", "Time of all eigenvalue measurements.", area="curvature"),
    Metric("merge_newton_rank", "", "Dimensions of the merge's Newton part.", area="curvature"),
    Metric("merge_sigma", "", "Estimate of the top curvature at a merge.", area="curvature"),
    Metric("damping", "", "Tikhonov damping of the step.", area="curvature"),
    Metric("kl_clip_scale", "", "Factor that the KL clip put on the step.", area="curvature"),
    Metric("factor_updates", "updates", "Factor updates so far.", "curvature", "counter"),
    Metric(
        "inverse_updates", "updates", "Decompositions so far, per layer.", "curvature", "counter"
    ),
    Metric("inverse_age_steps", "steps", "Steps since the decomposition in use.", area="curvature"),
    Metric("fallbacks", "layers", "Decompositions that fell back.", "curvature", "counter"),
    Metric(
        "nonfinite_factors",
        "factors",
        "Factor updates that were refused because they held NaN or infinity.",
        "curvature",
        "counter",
    ),
    Metric(
        "condition_number",
        "",
        "Largest over smallest eigenvalue of a damped factor, over all layers.",
        area="curvature",
        labels=("run", "factor", "statistic"),
    ),
    Metric(
        "memory_bytes",
        "bytes",
        "Memory that a rank spends on the preconditioner.",
        area="curvature",
        labels=("run", "rank", "part"),
        exporter="rank",
    ),
)

_COMMUNICATION: tuple[Metric, ...] = (
    Metric(
        "communication_bytes",
        "bytes",
        "Payload that a rank sent.",
        "communication",
        "counter",
        ("run", "tag"),
    ),
    Metric(
        "communication_calls",
        "calls",
        "Collectives called.",
        "communication",
        "counter",
        ("run", "tag"),
    ),
    Metric(
        "communication_exposed_s",
        "s",
        "Time that a rank waited for collectives with nothing else to do.",
        "communication",
        "counter",
        _RANK,
        "rank",
    ),
    Metric("communication_errors", "errors", "Failed collectives.", "communication", "counter"),
)

_ELASTICITY: tuple[Metric, ...] = (
    Metric("world_size", "workers", "Workers in the process group.", area="elastic"),
    Metric("wanted_workers", "workers", "Workers that the batch would keep busy.", area="elastic"),
    Metric("min_workers", "workers", "Fewest workers that the run goes on with.", area="elastic"),
    Metric("max_workers", "workers", "Most workers that the run can use.", area="elastic"),
    Metric(
        "resizes",
        "changes",
        "Changes of the worker group so far.",
        "elastic",
        "counter",
        ("run", "change"),
    ),
    Metric("failures", "failures", "Worker groups lost without notice.", "elastic", "counter"),
    Metric("preemptions", "notices", "Notices that a node will go.", "elastic", "counter"),
    Metric(
        "downtime_s", "s", "From the last step before a change to the first after it.", "elastic"
    ),
    Metric("lost_time_s", "s", "Downtime of all changes together.", "elastic", "counter"),
    Metric(
        "moment_s",
        "s",
        "When the newest change reached a point, from the last step before it.",
        area="elastic",
        labels=("run", "moment"),
    ),
    Metric("steps_redone", "steps", "Steps computed again after a loss.", "elastic", "counter"),
    Metric("notice_s", "s", "Time from a preemption notice to its deadline.", area="elastic"),
    Metric("hand_over_s", "s", "Time from a preemption notice to the safe state.", area="elastic"),
    Metric(
        "snapshot_timestamp_s", "s", "Unix time of the newest snapshot in memory.", area="elastic"
    ),
    Metric("vault_bytes", "bytes", "State that the vaults hold.", area="elastic"),
    Metric(
        "checkpoint_timestamp_s", "s", "Unix time of the newest durable checkpoint.", area="elastic"
    ),
    Metric("checkpoint_time_s", "s", "Time to write the newest checkpoint.", area="elastic"),
    Metric("checkpoint_bytes", "bytes", "Size of the newest checkpoint.", area="elastic"),
)

_DATA: tuple[Metric, ...] = (
    Metric("data_wait_s", "s", "Time that a step waited for its samples.", area="data"),
    Metric("stall_s", "s", "Time waited for samples.", "data", "counter", _RANK, "rank"),
    Metric("read_bytes", "bytes", "Read from storage.", "data", "counter", _RANK, "rank"),
    Metric("cache_hits", "shards", "Shards found on the node.", "data", "counter", _RANK, "rank"),
    Metric("cache_misses", "shards", "Shards fetched first.", "data", "counter", _RANK, "rank"),
    Metric("quarantined", "records", "Bad records left out.", "data", "counter", _RANK, "rank"),
)

METRICS: tuple[Metric, ...] = (*_TRAINING, *_CURVATURE, *_COMMUNICATION, *_ELASTICITY, *_DATA)
"""Every measured quantity, grouped by area."""


def metric(column: str) -> Metric:
    """The entry of a column.

    Raises:
        KeyError: If no quantity has this column.
    """
    for entry in METRICS:
        if entry.column == column:
            return entry
    raise KeyError(column)


def label(name: str) -> Label:
    """The label of this name.

    Raises:
        KeyError: If no label has this name.
    """
    for entry in LABELS:
        if entry.name == name:
            return entry
    raise KeyError(name)
