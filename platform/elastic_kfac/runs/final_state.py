"""What a finished run's state is worth: training loss, sharpness, robustness; all in evaluation mode."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from elastic_kfac.analysis.hessian import Hessian
from elastic_kfac.analysis.spectrum import top_by_lanczos
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.data.dataset import Dataset, Datasets, open_datasets
from elastic_kfac.runs.evaluate import newest_state
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.state.state import restore_model
from elastic_kfac.tasks.attacks import AttackKind, evaluation_attack
from elastic_kfac.tasks.losses import make_task
from elastic_kfac.tasks.models import build_model
from elastic_kfac.tasks.preprocessing import Preprocessor
from elastic_kfac.training.evaluation import evaluate_split

LANCZOS_TOLERANCE = 1e-3


@dataclass(frozen=True)
class FinalMeasures:
    """How a final state is measured."""

    hessian_samples: int = 512
    """The first samples of the training split in id order: the same ones for every run on the data."""
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
    """Measures the newest checkpoint of a run in this process.

    Args:
        folder: The run.
        wanted: Some of `train_loss`, `lambda_1`, `adversarial_accuracy`; other names are ignored.
        how: Samples, steps and attack.
        device: Where to compute; None is the CPU.

    Raises:
        UsageError: If the run has no checkpoint.
        ConfigError: If the attack's radius is outside the data range.
        NumericalError: If a Hessian product is not finite.
    """
    config = folder.read_config()
    state = newest_state(folder)
    unshuffled = _without_augmentation(config)
    datasets = open_datasets(unshuffled)
    try:
        assert datasets.evaluation is not None
        model = build_model(
            config.model,
            num_classes=datasets.train.num_classes,
            image_shape=datasets.train.image_shape,
            seed=config.train.seed,
        ).to(device or torch.device("cpu"))
        restore_model(model, state)
        return _Measurement(config, model, datasets, how).take(wanted)
    finally:
        datasets.close()


class _Measurement:
    """`datasets.evaluation` is the training split in id order, without augmentation."""

    def __init__(
        self, config: Config, model: nn.Module, datasets: Datasets, how: FinalMeasures
    ) -> None:
        self._config, self._model, self._how = config, model, how
        self._task = make_task(config.train)
        assert datasets.evaluation is not None
        self._training_split: Dataset = datasets.evaluation
        parameter = next(model.parameters())
        # Both splits are normalised as the training split is, like in the run.
        self._preprocess = Preprocessor(datasets.train, parameter.dtype, parameter.device)

    def take(self, wanted: Collection[str]) -> dict[str, float]:
        found = {}
        if "train_loss" in wanted:
            result = evaluate_split(
                self._model,
                self._task,
                self._training_split,
                self._preprocess,
                Communicator.solo(),
                self._config.train,
            )
            found["train_loss"] = result.loss
        if "lambda_1" in wanted:
            found["lambda_1"] = self._top_eigenvalue()
        if "adversarial_accuracy" in wanted:
            found["adversarial_accuracy"] = self._adversarial_accuracy()
        return found

    def _top_eigenvalue(self) -> float:
        dataset, size = self._training_split, self._config.train.eval_batch_size
        count = min(self._how.hessian_samples, dataset.num_samples)
        inputs = [
            self._preprocess(dataset.read(0, first, min(size, count - first)))
            for first in range(0, count, size)
        ]
        batches = [(part.images, part.labels) for part in inputs]
        operator = Hessian(self._model, self._task.loss, batches)
        found = top_by_lanczos(
            operator,
            max_steps=min(self._how.hessian_steps, operator.size),
            tolerance=LANCZOS_TOLERANCE,
        )
        return abs(found.values[0])

    def _adversarial_accuracy(self) -> float:
        datasets = open_datasets(self._config)
        try:
            assert datasets.evaluation is not None
            attack = evaluation_attack(
                self._config.adversarial,
                self._preprocess,
                datasets.evaluation,
                self._how.attack,
                self._how.adversarial_radius,
                self._how.adversarial_steps,
            )
            result = evaluate_split(
                self._model,
                self._task,
                datasets.evaluation,
                self._preprocess,
                Communicator.solo(),
                self._config.train,
                attack=attack,
            )
        finally:
            datasets.close()
        assert result.attacked is not None
        return result.attacked.accuracy


def _without_augmentation(config: Config) -> Config:
    """The training split in both places: once as it is trained on, once as it is evaluated."""
    data = {"eval_split": config.data.train_split, "augment": "none"}
    return config.model_copy(update={"data": config.data.model_copy(update=data)})
