"""Measures of a run's newest checkpoint: accuracy, training loss, sharpness, robustness."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from elastic_kfac.analysis.hessian import Hessian
from elastic_kfac.analysis.spectrum import top_by_lanczos
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config, parse_config
from elastic_kfac.data.dataset import Dataset, Datasets, open_datasets, open_split
from elastic_kfac.errors import UsageError
from elastic_kfac.runs.checkpoints import newest_state, restored_model
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.tasks.attacks import Attack, AttackKind, evaluation_attack
from elastic_kfac.tasks.losses import make_task
from elastic_kfac.tasks.preprocessing import Preprocessor
from elastic_kfac.training.evaluation import EvalResult, evaluate_split

LANCZOS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Evaluation:
    """Loss and accuracy of a run's newest state over the evaluation split."""

    step: int
    loss: float
    accuracy: float
    count: int
    adversarial_loss: float | None = None
    """Under the attack, if there is one."""
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
        attack: Overrides of the section `adversarial`: `eval_attack`, `eval_radius`, `eval_steps`.
        device: None is the CPU.
        datasets: Replaces the configured splits.

    Raises:
        UsageError: If the run has no checkpoint or no evaluation split.
        ConfigError: If the attack is out of range.
        StateError: If the data set has changed.
    """
    state, config = newest_state(folder), folder.read_config()
    adversarial = config.adversarial
    if attack:
        changed = {**adversarial.model_dump(), **attack}
        adversarial = parse_config({"adversarial": changed}).adversarial
    opened = datasets or open_datasets(config)
    try:
        if opened.evaluation is None:
            raise UsageError("the run has no evaluation split", given=config.data.eval_split)
        model = restored_model(config, state, opened.train, device)
        preprocess = _preprocessor(model, opened.train)
        chosen = evaluation_attack(adversarial, preprocess, opened.evaluation)
        result = _evaluate(config, model, opened.evaluation, preprocess, chosen)
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


@dataclass(frozen=True)
class FinalMeasures:
    """Samples, steps and attack for measuring a final state."""

    hessian_samples: int = 512
    """The first samples of the training split in id order: the same for every run on the data."""
    hessian_steps: int = 60
    attack: AttackKind = "fgsm"
    adversarial_radius: float = 0.1
    """ε in units of the model's inputs."""
    adversarial_steps: int = 1


def measure_final_state(
    folder: RunFolder,
    wanted: Collection[str],
    how: FinalMeasures,
    *,
    device: torch.device | None = None,
) -> dict[str, float]:
    """Measures the newest checkpoint of a run in this process, in evaluation mode.

    Args:
        folder: The run.
        wanted: Some of `train_loss`, `lambda_1`, `adversarial_accuracy`; other names are ignored.
        how: Samples, steps and attack.
        device: None is the CPU.

    Raises:
        UsageError: If the run has no checkpoint.
        ConfigError: If the attack's radius is outside the data range.
        NumericalError: If a Hessian product is not finite.
    """
    state, config = newest_state(folder), folder.read_config()
    found = {}
    with ExitStack() as stack:
        training = stack.enter_context(open_split(config, config.data.train_split, shuffle=False))
        model = restored_model(config, state, training, device)
        # Both splits are normalised as the training split is, like in the run.
        preprocess = _preprocessor(model, training)
        if "train_loss" in wanted:
            found["train_loss"] = _evaluate(config, model, training, preprocess).loss
        if "lambda_1" in wanted:
            found["lambda_1"] = _top_eigenvalue(config, model, training, preprocess, how)
        if "adversarial_accuracy" in wanted:
            test = stack.enter_context(open_split(config, config.data.eval_split, shuffle=False))
            attack = evaluation_attack(
                config.adversarial,
                preprocess,
                test,
                how.attack,
                how.adversarial_radius,
                how.adversarial_steps,
            )
            attacked = _evaluate(config, model, test, preprocess, attack).attacked
            assert attacked is not None
            found["adversarial_accuracy"] = attacked.accuracy
    return found


def _preprocessor(model: nn.Module, training: Dataset) -> Preprocessor:
    parameter = next(model.parameters())
    return Preprocessor(training, parameter.dtype, parameter.device)


def _evaluate(
    config: Config,
    model: nn.Module,
    dataset: Dataset,
    preprocess: Preprocessor,
    attack: Attack | None = None,
) -> EvalResult:
    task, solo = make_task(config.train), Communicator.solo()
    return evaluate_split(model, task, dataset, preprocess, solo, config.train, attack=attack)


def _top_eigenvalue(
    config: Config,
    model: nn.Module,
    training: Dataset,
    preprocess: Preprocessor,
    how: FinalMeasures,
) -> float:
    size, count = config.train.eval_batch_size, min(how.hessian_samples, training.num_samples)
    inputs = [
        preprocess(training.read(0, first, min(size, count - first)))
        for first in range(0, count, size)
    ]
    batches = [(part.images, part.labels) for part in inputs]
    operator = Hessian(model, make_task(config.train).loss, batches)
    found = top_by_lanczos(
        operator, max_steps=min(how.hessian_steps, operator.size), tolerance=LANCZOS_TOLERANCE
    )
    return abs(found.values[0])
