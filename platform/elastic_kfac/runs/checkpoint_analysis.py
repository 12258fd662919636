"""Analyses of what a run has saved: any verified checkpoint, in this process, without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from elastic_kfac.analysis.fixed_samples import FixedSamples
from elastic_kfac.analysis.hessian_report import analyse
from elastic_kfac.analysis.landscape import bias_variance
from elastic_kfac.analysis.low_rank_probe import probe
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import AnalysisConfig, Config
from elastic_kfac.data.dataset import Dataset, Datasets, open_split
from elastic_kfac.errors import StateError, UsageError
from elastic_kfac.runs.evaluate import newest_state
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.state.state import TrainingState, restore_model
from elastic_kfac.tasks.losses import make_task
from elastic_kfac.tasks.models import build_model

FOLDER = "analysis"
"""Where results lie in a run's folder."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint's model with the splits of its run, in one process."""

    config: Config
    state: TrainingState
    model: nn.Module
    datasets: Mapping[str, Dataset]
    """By the name of the split."""

    def samples(self, split: str, request: AnalysisConfig) -> FixedSamples:
        """The samples of a split that a request is about."""
        return FixedSamples(self.datasets[split], self.model, request, Communicator.solo())

    def where(self) -> dict[str, Any]:
        """The checkpoint's place in its run."""
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
    """The model of a run's checkpoint: that of `step`, the last up to `epoch`, or the newest.

    Raises:
        UsageError: If there is no such checkpoint; it names those that there are.
        StateError: If it is damaged, belongs to other data, or none verifies.
    """
    state = choose_state(folder, step=step, epoch=epoch)
    config = folder.read_config()
    opened = datasets or Datasets(
        open_split(config, config.data.train_split), open_split(config, config.data.eval_split)
    )
    try:
        if state.data_sha256 != opened.train.sha256:
            raise StateError(
                "the run's data set has changed: its manifest is not the one of the checkpoint",
                given=config.data.shards,
                change="restore the shards that the run was trained on",
            )
        model = build_model(
            config.model,
            num_classes=opened.train.num_classes,
            image_shape=opened.train.image_shape,
            seed=config.train.seed,
        ).to(device or torch.device("cpu"))
        restore_model(model, state)
        splits: dict[str, Dataset] = {config.data.train_split: opened.train}
        if opened.evaluation is not None:
            splits[config.data.eval_split] = opened.evaluation
        yield Restored(config, state, model.eval(), splits)
    finally:
        if datasets is None:
            opened.close()


def choose_state(
    folder: RunFolder, *, step: int | None = None, epoch: float | None = None
) -> TrainingState:
    """A checkpoint by its step, or the last one up to the end of `epoch` epochs, or the newest.

    Raises:
        UsageError: If both are given, or there is no such checkpoint.
    """
    if step is None and epoch is None:
        return newest_state(folder)
    if step is not None and epoch is not None:
        raise UsageError("--checkpoint and --epoch name the same thing", change="give one of them")
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
        change="elastic.keep_checkpoints says how many a run keeps",
    )


def analyse_run(
    folder: RunFolder,
    request: AnalysisConfig,
    *,
    split: str | None = None,
    step: int | None = None,
    epoch: float | None = None,
    device: torch.device | None = None,
    datasets: Datasets | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Analyses a checkpoint and writes `analysis/step-<step>-<split>.json` into the run's folder.

    Args:
        split: Whose loss; None is the training split. The landscape always shows both.
        say: Told what is about to be done, before it takes its time.

    Returns:
        What was written; `file` is its name.

    Raises:
        UsageError: If there is no such checkpoint or split.
        ConfigError: If the request does not fit into memory.
    """
    with restored(folder, step=step, epoch=epoch, device=device, datasets=datasets) as here:
        name = check_split(here, split)
        samples = here.samples(name, request)
        parameters = sum(p.numel() for p in here.model.parameters() if p.requires_grad)
        say(
            f"step {here.state.progress.step}: {samples.count:,} samples of {name}, "
            f"{parameters:,} parameters"
        )
        found = analyse(
            here.model,
            make_task(here.config.train).loss,
            samples,
            request,
            Communicator.solo(),
            landscape={split: here.samples(split, request) for split in here.datasets},
        )
        result = {"kind": "curvature", **here.where(), "split": name, **found}
        file = f"{FOLDER}/step-{here.state.progress.step:012d}-{name}.json"
    return write_result(folder, file, result)


def bias_variance_of_run(
    folder: RunFolder,
    request: AnalysisConfig,
    *,
    factor: float = 1.0,
    step: int | None = None,
    epoch: float | None = None,
    device: torch.device | None = None,
    datasets: Datasets | None = None,
) -> dict[str, Any]:
    """Loss + C·√(Var f / n) on the training split next to the loss on the evaluation split.

    Writes `analysis/bias-variance.json`.

    Args:
        factor: C.
    """
    with restored(folder, step=step, epoch=epoch, device=device, datasets=datasets) as here:
        loss = make_task(here.config.train).loss
        rows = {}
        for split in here.datasets:
            found = bias_variance(here.model, loss, here.samples(split, request))
            rows[split] = {
                "loss": found.mean,
                "variance": found.variance,
                "samples": found.count,
                "bound": found.bound(factor),
            }
        result = {"kind": "bias_variance", **here.where(), "factor": factor, "splits": rows}
    return write_result(folder, f"{FOLDER}/bias-variance.json", result)


def low_rank_of_run(
    folder: RunFolder,
    request: AnalysisConfig,
    *,
    epsilon: float = 1e-6,
    step: int | None = None,
    epoch: float | None = None,
    device: torch.device | None = None,
    datasets: Datasets | None = None,
) -> dict[str, Any]:
    """ε-ranks of a checkpoint's matrices beside a kernel matrix's; writes `analysis/low-rank.json`.

    The first batch of the request is what the layers see.
    """
    with restored(folder, step=step, epoch=epoch, device=device, datasets=datasets) as here:
        batch = next(iter(here.samples(here.config.data.train_split, request)))
        found = probe(here.model, batch[0], epsilon=epsilon)
        result = {"kind": "low_rank", **here.where(), **found}
    return write_result(folder, f"{FOLDER}/low-rank.json", result)


def check_split(here: Restored, split: str | None) -> str:
    """The name of a split of the run.

    Raises:
        UsageError: If it has no such split.
    """
    name = split or here.config.data.train_split
    if name not in here.datasets:
        raise UsageError("the run has no such split", given=name, allowed=", ".join(here.datasets))
    return name


def write_result(folder: RunFolder, file: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a result as JSON into a run's folder and returns it with its `file`."""
    folder.storage.write(file, (json.dumps(result, indent=1) + "\n").encode())
    return {**result, "file": file}


def _epochs(state: TrainingState) -> float:
    """Epochs that are complete, and 0.5 for any part of the next one."""
    return state.progress.epoch + (0.5 if state.progress.consumed else 0.0)
