"""A run's checkpoints: choosing one, its model with the run's splits, and evaluation."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from elastic_kfac.analysis.fixed_samples import FixedSamples
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import AnalysisConfig, Config, parse_config
from elastic_kfac.data.dataset import Dataset, Datasets, open_split
from elastic_kfac.errors import StateError, UsageError
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.state.state import TrainingState, restore_model
from elastic_kfac.tasks.attacks import Attack, evaluation_attack
from elastic_kfac.tasks.by_class import ByClass
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

    def evaluate(
        self, split: str, attack: Attack | None = None, task: Task | None = None
    ) -> EvalResult:
        """The result over a whole split, also under an attack; `task` replaces that of the run."""
        config, solo = self.config.train, Communicator.solo()
        task, dataset = task or self.task, self.datasets[split]
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
    averaged: bool = False,
) -> Iterator[Restored]:
    """The model of a checkpoint (see `choose_state`) on `device` (None: the CPU).

    `datasets` replaces the run's splits; without `shuffle` they are read in id order. `averaged` takes
    the averaged weights of a run with `optimizer.average_decay`, as its evaluations do.

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
        if averaged:
            model.load_state_dict(weights_to_use(state))
        splits = {data.train_split: opened.train}
        if opened.evaluation is not None:
            splits[data.eval_split] = opened.evaluation
        yield Restored(folder, config, state, model.eval(), splits)
    finally:
        if datasets is None:
            opened.close()


def weights_to_use(state: TrainingState) -> dict[str, Tensor]:
    """Parameters and buffers by name, the parameters averaged if the run averages them."""
    return {**state.model_tensors(), **(state.part("average") or {})}


def evaluate_run(
    folder: RunFolder,
    *,
    attack: Mapping[str, Any] | None = None,
    device: torch.device | None = None,
    datasets: Datasets | None = None,
    split: str | None = None,
    by_class: bool = False,
) -> tuple[int, EvalResult]:
    """The step of a run's newest checkpoint, and its result over a split.

    Args:
        split: Its name; None is the evaluation split.
        by_class: Also the numbers of every class (see `tasks.by_class`).
        attack: Overrides of the section `adversarial`: `eval_attack`, `eval_radius`, `eval_steps`.
        datasets: Replaces the configured splits.

    Raises:
        UsageError: If the run has no checkpoint or no such split, or `by_class` does not apply.
        ConfigError: If the attack is out of range.
        StateError: If the data set has changed.
    """
    with (
        restored(folder, device=device, datasets=datasets, shuffle=False, averaged=True) as here,
        contextlib.ExitStack() as stack,
    ):
        adversarial, split = here.config.adversarial, split or here.config.data.eval_split
        if split not in here.datasets and datasets is None:
            opened = stack.enter_context(open_split(here.config, split, shuffle=False))
            here = replace(here, datasets={**here.datasets, split: opened})
        if attack:
            changed = {**adversarial.model_dump(), **attack}
            adversarial = parse_config({"adversarial": changed}).adversarial
        if split not in here.datasets:
            raise UsageError("the run has no evaluation split", given=split)
        chosen = evaluation_attack(adversarial, here.preprocess, here.datasets[split])
        if not by_class:
            return here.state.progress.step, here.evaluate(split, chosen)
        counting = ByClass(here.task, here.datasets[split].columns)
        found = here.evaluate(split, chosen, counting)
        return here.state.progress.step, replace(found, classes=counting.results)


def _epochs(state: TrainingState) -> float:
    """Complete epochs, plus 0.5 for a started one."""
    return state.progress.epoch + (0.5 if state.progress.consumed else 0.0)
