"""The task of a configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from elastic_kfac.config import Config
from elastic_kfac.data.columns import Column
from elastic_kfac.errors import ConfigError
from elastic_kfac.tasks.detection import Detection
from elastic_kfac.tasks.imports import is_reference, load_reference, made_by
from elastic_kfac.tasks.language import CausalLM, MaskedLM, SequenceClassification
from elastic_kfac.tasks.losses import classification
from elastic_kfac.tasks.regression import Autoencoding, Regression
from elastic_kfac.tasks.segmentation import Segmentation
from elastic_kfac.tasks.task import Task


def builtin_tasks() -> dict[str, Callable[..., Task]]:
    """Tasks besides classification by name: factories of (columns, **task.arguments)."""
    return {
        "regression": Regression,
        "autoencoding": Autoencoding,
        "segmentation": Segmentation,
        "causal_lm": CausalLM,
        "masked_lm": MaskedLM,
        "sequence_classification": SequenceClassification,
        "detection": Detection,
    }


def make_task(config: Config, columns: Sequence[Column]) -> Task:
    """The task of the section `task` for samples with these columns.

    Raises:
        ConfigError: As `_made`, or if the task has no such metric as `train.target`.
    """
    task = _made(config, columns)
    wanted = {"train.target": config.train.goal, "train.early_stop": config.train.early_stop}
    for key, section in wanted.items():
        if section is not None and section.metric not in {"loss", *task.metrics}:
            raise ConfigError(
                f"task.name={config.task.name} has no such metric",
                given=f"{key}.metric={section.metric}",
                allowed=", ".join([*task.metrics, "loss"]),
            )
    return task


def _made(config: Config, columns: Sequence[Column]) -> Task:
    """Raises:
    ConfigError: If the name is unknown, its arguments or the columns do not fit, or a person's
        task lacks a method.
    """
    name, arguments, train = config.task.name, config.task.arguments, config.train
    if name == "classification":
        if arguments:
            raise ConfigError(
                "task.name=classification takes no task.arguments", given=", ".join(arguments)
            )
        return classification(train, columns)
    factories = builtin_tasks()
    if not is_reference(name) and name not in factories:
        raise ConfigError(
            "unknown task.name",
            given=name,
            allowed=", ".join(["classification", *factories]) + ", or package.module:factory",
        )
    factory = load_reference(name, key="task.name") if is_reference(name) else factories[name]
    task = made_by(
        *(factory, tuple(columns)),
        key="task.name",
        given=name,
        options=arguments,
        options_key="task.arguments",
    )
    if not isinstance(task, Task):
        raise ConfigError(
            "task.name: the factory returned no elastic_kfac.tasks.task.Task",
            given=f"{name} -> {type(task).__name__}",
        )
    return task
