"""A run's checkpoints: choosing one, its model with the run's splits, evaluation and export."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import nn

from elastic_kfac.analysis.fixed_samples import FixedSamples
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import AnalysisConfig, Config, parse_config
from elastic_kfac.data.dataset import Dataset, Datasets, open_split
from elastic_kfac.data.storage import write_named_file
from elastic_kfac.errors import StateError, UsageError
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.state.state import TrainingState, restore_model
from elastic_kfac.tasks.attacks import Attack, evaluation_attack
from elastic_kfac.tasks.choice import make_task
from elastic_kfac.tasks.models import build_model
from elastic_kfac.tasks.preprocessing import Preprocessor
from elastic_kfac.tasks.task import Task
from elastic_kfac.training.evaluation import EvalResult, evaluate_split


def newest_state(folder: RunFolder, *, allow_older: bool = True) -> TrainingState:
    """The newest state of a run that verifies; warns on stderr if the newest one is damaged.

    Args:
        folder: The run.
        allow_older: False raises instead of warning.

    Raises:
        UsageError: If it has none.
        StateError: If none verifies, or the newest does not and older ones are not allowed.
    """
    problems: list[str] = []
    store = CheckpointStore(folder.uri, on_warning=problems.append)
    state = store.load_latest()
    if state is None:
        raise UsageError("the run has no checkpoint yet", given=folder.uri, change="train it first")
    result, step = folder.result() or {}, state.progress.step
    last = result.get("steps") if result.get("status") == "finished" else None
    newest = max(store.steps()[-1], last if isinstance(last, int) else 0)
    if step != newest:
        if not allow_older:
            raise StateError(
                f"the newest checkpoint, of step {newest}, is damaged",
                given=folder.uri,
                change=f"restore it, or add --checkpoint {step} for the newest that verifies",
            )
        line = f"the checkpoint of step {newest} is damaged; using that of step {step}"
        print(f"warning: {line} ({'; '.join(problems) or 'it is gone'})", file=sys.stderr)
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


@dataclass(frozen=True)
class Restored:
    """A checkpoint's model in evaluation mode with the splits of its run, in one process."""

    folder: RunFolder
    config: Config
    state: TrainingState
    model: nn.Module
    datasets: Mapping[str, Dataset]
    """By name of the split, without augmentation."""

    @property
    def task(self) -> Task:
        """The loss and metrics of the run."""
        return make_task(self.config, self.datasets[self.config.data.train_split].columns)

    @cached_property
    def preprocess(self) -> Preprocessor:
        """Normalises every split as the training split is, like in the run."""
        parameter = next(self.model.parameters())
        training = self.datasets[self.config.data.train_split]
        task, seed = self.task, self.config.train.seed
        return Preprocessor(
            training,
            parameter.dtype,
            parameter.device,
            lambda batch, epoch: task.prepare(batch, seed, epoch),
        )

    def evaluate(self, split: str, attack: Attack | None = None) -> EvalResult:
        """The result over a whole split, also under an attack."""
        config, solo = self.config.train, Communicator.solo()
        task, dataset = self.task, self.datasets[split]
        return evaluate_split(
            self.model, task, dataset, self.preprocess, solo, config, attack=attack
        )

    def samples(self, split: str, request: AnalysisConfig) -> FixedSamples:
        """The samples of a split that a request asks for."""
        dataset, solo = self.datasets[split], Communicator.solo()
        return FixedSamples(dataset, self.preprocess, request, solo, self.task.terms)

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
    shuffle: bool = True,
) -> Iterator[Restored]:
    """The model of a checkpoint (see `choose_state`) on `device` (None: the CPU).

    `datasets` replaces the run's splits; without `shuffle` they are read in id order.

    Raises:
        UsageError: If there is no such checkpoint; it names the existing ones.
        StateError: If it is damaged, belongs to other data, or none verifies.
    """
    state = choose_state(folder, step=step, epoch=epoch)
    config = folder.located_config()
    data, train = config.data, config.train
    opened = datasets or Datasets(
        open_split(config, data.train_split, shuffle=shuffle),
        open_split(config, data.eval_split, shuffle=shuffle),
    )
    try:
        if state.data_sha256 != opened.train.sha256:
            raise StateError(
                "the run's data set has changed: its manifest differs from the checkpoint's",
                given=data.shards,
                change="restore the shards that the run was trained on",
            )
        # The checkpoint has the weights; the file of the initial ones may be gone.
        model = build_model(
            config.model.model_copy(update={"initial_weights": None}),
            num_outputs=make_task(config, opened.train.columns).num_outputs(opened.train.columns),
            input_shape=opened.train.input_shape,
            columns=opened.train.columns,
            seed=train.seed,
        ).to(device or torch.device("cpu"))
        restore_model(model, state)
        splits = {data.train_split: opened.train}
        if opened.evaluation is not None:
            splits[data.eval_split] = opened.evaluation
        yield Restored(folder, config, state, model.eval(), splits)
    finally:
        if datasets is None:
            opened.close()


def evaluate_run(
    folder: RunFolder,
    *,
    attack: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    datasets: Datasets | None = None,
) -> tuple[int, EvalResult]:
    """The step of a run's newest checkpoint, and its result over the evaluation split.

    Args:
        attack: Overrides of the section `adversarial`: `eval_attack`, `eval_radius`, `eval_steps`.
        datasets: Replaces the configured splits.

    Raises:
        UsageError: If the run has no checkpoint or no evaluation split.
        ConfigError: If the attack is out of range.
        StateError: If the data set has changed.
    """
    with restored(folder, device=device, datasets=datasets, shuffle=False) as here:
        adversarial, split = here.config.adversarial, here.config.data.eval_split
        if attack:
            changed = {**adversarial.model_dump(), **attack}
            adversarial = parse_config({"adversarial": changed}).adversarial
        if split not in here.datasets:
            raise UsageError("the run has no evaluation split", given=split)
        chosen = evaluation_attack(adversarial, here.preprocess, here.datasets[split])
        return here.state.progress.step, here.evaluate(split, chosen)


def export_run(folder: RunFolder, out: str | Path, *, step: int | None = None) -> int:
    """Writes parameters and buffers of a checkpoint as a safetensors file.

    `model.initial_weights` of another run and `safetensors.torch.load_file` read it.

    Args:
        folder: The run.
        out: The file; links are followed, pipes and devices written through.
        step: Step of the checkpoint; None is the newest.

    Returns:
        The number of tensors.

    Raises:
        UsageError: If the run has no such checkpoint.
        StateError: If it is damaged.
    """
    if step is None:
        state = newest_state(folder, allow_older=False)
    else:
        state = choose_state(folder, step=step)
    tensors = state.model_tensors()
    metadata = {"step": str(state.progress.step), "run": folder.uri}
    write_named_file(out, save(tensors, metadata=metadata))
    return len(tensors)


def _epochs(state: TrainingState) -> float:
    """Complete epochs, plus 0.5 for a started one."""
    return state.progress.epoch + (0.5 if state.progress.consumed else 0.0)
