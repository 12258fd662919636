"""`evaluate` and `export`: what to do with a run's newest state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config, parse_config
from elastic_kfac.data.dataset import Datasets, open_datasets
from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import UsageError
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.rank import RankTrainer


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of a run's newest state over the evaluation split."""

    step: int
    loss: float
    accuracy: float
    count: int
    adversarial_loss: float | None = None
    """Under the attack, where there is one."""
    adversarial_accuracy: float | None = None


def evaluate_run(
    folder: RunFolder,
    *,
    attack: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    datasets: Datasets | None = None,
) -> Evaluation:
    """Evaluates the newest checkpoint of a run in this process.

    Args:
        folder: The run.
        attack: Values of the section `adversarial` to replace: `eval_attack`, `eval_radius`,
            `eval_steps`.
        device: Where; None is the CPU.
        datasets: The splits; None opens the configured ones.

    Raises:
        UsageError: If the run has no checkpoint or no evaluation split.
        ConfigError: If the attack is out of range.
    """
    state = newest_state(folder)
    config = _without_kfac(folder.read_config())
    if attack:
        adversarial = {**config.adversarial.model_dump(), **attack}
        checked = parse_config({"adversarial": adversarial}).adversarial
        config = config.model_copy(update={"adversarial": checked})
    opened = datasets or open_datasets(config)
    try:
        if opened.evaluation is None:
            raise UsageError("the run has no evaluation split", given=config.data.eval_split)
        trainer = RankTrainer(config, Communicator.solo(), opened, device=device)
        trainer.restore(state)
        result = trainer.evaluate()
    finally:
        if datasets is None:
            opened.close()
    attacked = result.attacked
    return Evaluation(
        state.progress.step,
        result.loss,
        result.accuracy,
        result.count,
        None if attacked is None else attacked.loss,
        None if attacked is None else attacked.accuracy,
    )


def export_run(folder: RunFolder, out: str | Path) -> int:
    """Writes parameters and buffers of the newest checkpoint as a safetensors file.

    `model.initial_weights` of another run, or `safetensors.torch.load_file`, reads it.

    Returns:
        The number of tensors.

    Raises:
        UsageError: If the run has no checkpoint.
    """
    state = newest_state(folder)
    tensors = state.model_tensors()
    target = Path(out).expanduser()
    metadata = {"step": str(state.progress.step), "run": folder.uri}
    Storage(target.parent).write(target.name, save(tensors, metadata=metadata))
    return len(tensors)


def newest_state(folder: RunFolder) -> TrainingState:
    """The newest state of a run that verifies.

    Raises:
        UsageError: If it has none.
    """
    state = CheckpointStore(folder.uri).load_latest()
    if state is None:
        raise UsageError("the run has no checkpoint yet", given=folder.uri, change="train it first")
    return state


def _without_kfac(config: Config) -> Config:
    return config.model_copy(update={"kfac": config.kfac.model_copy(update={"enabled": False})})
