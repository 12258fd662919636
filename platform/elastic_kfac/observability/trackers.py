"""Trackers of experiments: one small interface over the table of metrics.

A row of `metrics.jsonl` becomes values named `area/column` of the table (`metric_names`), at the step of
the row. Packages of trackers are imported when one is opened.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from elastic_kfac.config.tracking import TrackerName, TrackingConfig
from elastic_kfac.errors import ConfigError
from elastic_kfac.observability.metric_names import METRICS

Values = Mapping[str, float]
_AREAS = {entry.column: entry.area for entry in METRICS}
_UNITS = {f"{entry.area}/{entry.column}": entry.unit for entry in METRICS}


@dataclass(frozen=True)
class TrackedRun:
    """What trackers are told about a run."""

    name: str
    uri: str
    """The run's folder; with it a continued run is the same run for a tracker."""
    settings: Mapping[str, Any]
    """`section.key` -> value."""
    shared: Path
    """Folder of what runs write together."""

    @property
    def id(self) -> str:
        """The same for every process that follows this run."""
        return hashlib.sha256(self.uri.encode()).hexdigest()[:16]


class Tracker(Protocol):
    """Takes the metrics of one run, in one thread."""

    def log(self, step: int, values: Values) -> None:
        """Values at a step; steps that are computed again come again."""

    def event(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
        """A row of `events.jsonl`."""

    def close(self, status: str) -> None:
        """The run has ended: `finished`, `interrupted`, `stopped` (by a search), `failed`, …"""


def values_of(row: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a row of `metrics.jsonl` by `area/column`; `train/…` outside the table."""
    return {
        f"{_AREAS.get(name, 'train')}/{name}": float(value)
        for name, value in row.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
    }


def check_packages(names: Sequence[TrackerName]) -> None:
    """Raises ConfigError if the package of a tracker is not installed."""
    for name in names:
        package = _PACKAGES.get(name)
        if package is not None and importlib.util.find_spec(package) is None:
            raise _not_installed(name, package)


def open_tracker(
    name: TrackerName, config: TrackingConfig, run: TrackedRun, folder: Path
) -> Tracker:
    """Opens one of `tracking.to` that writes below `folder`.

    Raises:
        ConfigError: If its package is not installed.
    """
    try:
        return _TRACKERS[name](config, run, folder)
    except ModuleNotFoundError as error:
        raise _not_installed(name, error.name) from None


def _not_installed(name: TrackerName, package: str | None) -> ConfigError:
    return ConfigError(
        f"tracking.to={name} needs {package}, which is not installed",
        change="pip install 'elastic-kfac[trackers]'",
    )


class _JsonLines:
    """`values.jsonl`, one object per value: time series for tools that read lines."""

    def __init__(self, config: TrackingConfig, run: TrackedRun, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._run = run.name
        self._file = (folder / "values.jsonl").open("a", encoding="utf-8")

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._write({"step": step, "name": name, "value": value, "unit": _UNITS.get(name, "")})
        self._file.flush()

    def event(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
        self._write({"step": step, "event": kind})

    def close(self, status: str) -> None:
        self._write({"event": status})
        self._file.close()

    def _write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps({"run": self._run, **row}) + "\n")


class _TensorBoard:
    """Event files."""

    def __init__(self, config: TrackingConfig, run: TrackedRun, folder: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"))
        self._writer.add_text("config", _as_table(run.settings))

    def log(self, step: int, values: Values) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def event(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
        self._writer.add_text("events", f"{kind} {_reason(row)}", step)

    def close(self, status: str) -> None:
        self._writer.close()


class _WandB:
    """Weights & Biases."""

    def __init__(self, config: TrackingConfig, run: TrackedRun, folder: Path) -> None:
        import wandb

        folder.mkdir(parents=True, exist_ok=True)
        self._run = wandb.init(
            project=config.project,
            name=run.name,
            id=run.id,
            resume="allow",
            # Trials that run at the same time are followed by one process.
            reinit="create_new",
            dir=str(folder),
            config=dict(run.settings),
        )
        # W&B drops rows whose own step falls; ours does after a rollback.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, values: Values) -> None:
        self._run.log({**values, "step": step})

    def event(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
        self._run.summary[f"event/{step}/{kind}"] = _reason(row)

    def close(self, status: str) -> None:
        self._run.summary["status"] = status
        self._run.finish(exit_code=0 if status in ("finished", "stopped") else 1)


class _MLflow:
    """A server of MLflow, or its files."""

    def __init__(self, config: TrackingConfig, run: TrackedRun, folder: Path) -> None:
        uri = config.mlflow_uri
        if uri is None:
            uri = (run.shared / "mlflow").absolute().as_uri()
            # MLflow 3 asks for this where files are wanted instead of a database.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        from mlflow.entities import Metric, Param
        from mlflow.tracking import MlflowClient

        self._metric = Metric
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(config.project)
        experiment = (
            found.experiment_id if found else self._client.create_experiment(config.project)
        )
        earlier = self._client.search_runs([experiment], f"tags.elastic_kfac_id = '{run.id}'")
        if earlier:
            self._id = earlier[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags = {"elastic_kfac_id": run.id}
            created = self._client.create_run(experiment, run_name=run.name, tags=tags)
            self._id = created.info.run_id
            parameters = [Param(key, str(value)[:500]) for key, value in run.settings.items()]
            for first in range(0, len(parameters), 100):
                self._client.log_batch(self._id, params=parameters[first : first + 100])

    def log(self, step: int, values: Values) -> None:
        rows = [self._metric(name, value, 0, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=rows)

    def event(self, step: int, kind: str, row: Mapping[str, Any]) -> None:
        self._client.set_tag(self._id, f"event.{step}.{kind}", _reason(row))

    def close(self, status: str) -> None:
        ended = _ENDED_IN_MLFLOW.get(status, "FAILED")
        self._client.set_terminated(self._id, ended)


_TRACKERS: Mapping[TrackerName, Callable[[TrackingConfig, TrackedRun, Path], Tracker]] = {
    "jsonl": _JsonLines,
    "tensorboard": _TensorBoard,
    "wandb": _WandB,
    "mlflow": _MLflow,
}

_ENDED_IN_MLFLOW = {"finished": "FINISHED", "interrupted": "KILLED", "stopped": "KILLED"}
_PACKAGES: Mapping[TrackerName, str] = {
    "tensorboard": "tensorboardX",
    "wandb": "wandb",
    "mlflow": "mlflow",
}


def _reason(row: Mapping[str, Any]) -> str:
    keys = ("reason", "from_world_size", "to_world_size")
    return ", ".join(f"{key} {row[key]}" for key in keys if row.get(key) is not None)


def _as_table(settings: Mapping[str, Any]) -> str:
    lines = (f"| {key} | {value} |" for key, value in settings.items())
    return "\n".join(("| key | value |", "|---|---|", *lines))
