"""Trackers of experiments."""

from __future__ import annotations

from typing import Literal

from elastic_kfac.config.section import Section

TrackerName = Literal["tensorboard", "wandb", "mlflow", "jsonl"]


class TrackingConfig(Section):
    """Where the metrics of `train`, and of the trials of `tune` and `compare`, go besides their folders.
    A tracker that fails is left out with a warning; the run goes on. `elastic-kfac track` sends the
    metrics of an earlier run."""

    to: tuple[TrackerName, ...] = ()
    """`tensorboard` (event files), `wandb` (Weights & Biases, which reads its own variables such as
    `WANDB_MODE`), `mlflow`, `jsonl` (a line per value)."""
    folder: str | None = None
    """Folder of event files, lines, and of what W&B and MLflow write; null means `tracking` in the folder
    of the run (or of the search), which must be a local one then."""
    project: str = "elastic-kfac"
    """Project of W&B and experiment of MLflow."""
    mlflow_uri: str | None = None
    """Tracking server of MLflow; null writes files."""
