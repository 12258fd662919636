"""A run's checkpoints: choosing one, its model with the run's splits in one process, and export."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from elastic_kfac.analysis.fixed_samples import FixedSamples
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import AnalysisConfig, Config
from elastic_kfac.data.dataset import Dataset, Datasets, open_split
from elastic_kfac.data.storage import Storage
from elastic_kfac.errors import StateError, UsageError
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.state.state import TrainingState, restore_model
from elastic_kfac.tasks.models import build_model


def newest_state(folder: RunFolder) -> TrainingState:
    """The newest state of a run that verifies.

    Raises:
        UsageError: If it has none.
    """
    state = CheckpointStore(folder.uri).load_latest()
    if state is None:
        raise UsageError("the run has no checkpoint yet", given=folder.uri, change="train it first")
    return state


def choose_state(
    folder: RunFolder, *, step: int | None = None, epoch: float | None = None
) -> TrainingState:
    """The checkpoint of a step, the last one up to the end of `epoch` epochs, or the newest.

    Raises:
        UsageError: If both are given, or there is no such checkpoint.
    """
    if step is None and epoch is None:
        return newest_state(folder)
    if step is not None and epoch is not None:
        raise UsageError(
            "--checkpoint and --epoch both choose a checkpoint", change="give one of them"
        )
    store = CheckpointStore(folder.uri)
    steps = store.steps()
    if step is not None and step in steps:
        return store.load(step)
    seen = []
    for each in reversed(steps):
        state = store.load(each)
        if step is None and epoch is not None and _epochs(state) <= epoch + 1e-9:
            return state
        seen.append(f"step {each} (epoch {_epochs(state):g})")
    raise UsageError(
        "the run has no such checkpoint",
        given=f"step {step}" if step is not None else f"epoch {epoch:g}",
        allowed=", ".join(reversed(seen)) or None,
        change="elastic.keep_checkpoints sets how many a run keeps",
    )


def restored_model(
    config: Config, state: TrainingState, training: Dataset, device: torch.device | None
) -> nn.Module:
    """The model of a checkpoint in evaluation mode, on `device` (None: the CPU).

    Raises:
        StateError: If the state belongs to another model or data set.
    """
    if state.data_sha256 != training.sha256:
        raise StateError(
            "the run's data set has changed: its manifest differs from the checkpoint's",
            given=config.data.shards,
            change="restore the shards that the run was trained on",
        )
    model = build_model(
        config.model,
        num_classes=training.num_classes,
        image_shape=training.image_shape,
        seed=config.train.seed,
    ).to(device or torch.device("cpu"))
    restore_model(model, state)
    return model.eval()


@dataclass(frozen=True)
class Restored:
    """A checkpoint's model with the splits of its run, in one process."""

    config: Config
    state: TrainingState
    model: nn.Module
    datasets: Mapping[str, Dataset]
    """By name of the split, without augmentation."""

    def samples(self, split: str, request: AnalysisConfig) -> FixedSamples:
        """The samples of a split that a request asks for."""
        return FixedSamples(self.datasets[split], self.model, request, Communicator.solo())

    def where(self) -> dict[str, Any]:
        """The checkpoint's step and fractional epoch."""
        progress = self.state.progress
        samples = self.datasets[self.config.data.train_split].num_samples
        return {"step": progress.step, "epoch": progress.epoch + progress.consumed / samples}


@contextmanager
def restored(
    folder: RunFolder,
    *,
    step: int | None = None,
    epoch: float | None = None,
    device: torch.device | None = None,
    datasets: Datasets | None = None,
) -> Iterator[Restored]:
    """The model of a checkpoint (see `choose_state`); `datasets` replaces the run's splits.

    Raises:
        UsageError: If there is no such checkpoint; it names the existing ones.
        StateError: If it is damaged, belongs to other data, or none verifies.
    """
    state = choose_state(folder, step=step, epoch=epoch)
    config = folder.read_config()
    train, evaluation = config.data.train_split, config.data.eval_split
    opened = datasets or Datasets(open_split(config, train), open_split(config, evaluation))
    try:
        model = restored_model(config, state, opened.train, device)
        splits = {train: opened.train}
        if opened.evaluation is not None:
            splits[evaluation] = opened.evaluation
        yield Restored(config, state, model, splits)
    finally:
        if datasets is None:
            opened.close()


def export_run(folder: RunFolder, out: str | Path) -> int:
    """Writes parameters and buffers of the newest checkpoint as a safetensors file.

    `model.initial_weights` of another run and `safetensors.torch.load_file` read it.

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


def _epochs(state: TrainingState) -> float:
    """Complete epochs, plus 0.5 for a started one."""
    return state.progress.epoch + (0.5 if state.progress.consumed else 0.0)
