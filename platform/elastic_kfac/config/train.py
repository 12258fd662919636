"""The network and the training loop."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from elastic_kfac.config.section import Section


class ModelConfig(Section):
    """The network."""

    name: str = "small_cnn"
    """Name of a built-in model (`elastic-kfac models` lists them), `torchvision:NAME` or `timm:NAME`
    (image classifiers with random weights), or `package.module:factory`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the factory."""
    initial_weights: str | None = None
    """Safetensors file to start from, for example an exported run; null starts from random weights."""


class TaskConfig(Section):
    """What is learned: the loss, and the metrics of evaluations."""

    name: str = "classification"
    """`classification`, `regression`, `segmentation`, `causal_lm`, `masked_lm`,
    `sequence_classification`, `autoencoding`, `detection`, or `package.module:factory` of a person's own
    `elastic_kfac.tasks.task.Task`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the task."""


class Target(Section):
    """What a run is to reach on the evaluation split."""

    metric: str = "accuracy"
    """A metric of the task, or `loss`."""
    value: float
    """At least this for metrics like accuracy, at most this for metrics like perplexity and the loss."""


class EarlyStop(Section):
    """When to end a run that no longer improves."""

    metric: str = "loss"
    """A metric of the task, or `loss`, on the evaluation split."""
    patience: Annotated[int, Field(ge=1)] = 5
    """Evaluations without an improvement after which the run ends."""
    min_delta: Annotated[float, Field(ge=0)] = 0.0
    """What counts as an improvement: a change by more than this."""


class TrainConfig(Section):
    """Length of the run, batch size, precision, evaluation and logging."""

    epochs: Annotated[float, Field(gt=0)] = 10
    """Passes over the training split; fractions are allowed."""
    global_batch_size: Annotated[int, Field(ge=1)] = 128
    """Samples per optimizer step over all workers; the last batch of an epoch is smaller."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Upper bound on samples per worker and forward pass; lower it when memory runs out. Null means one
    pass per step."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of initial weights, sample order, augmentation and every other random draw."""
    target: Target | None = None
    """Metric and value on the evaluation split whose time is reported as `time_to_target_s`."""
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Short for `target: {metric: accuracy, value: …}`."""
    stop_at_target: bool = False
    """End the run when the target is reached."""
    early_stop: EarlyStop | None = None
    """End the run when a metric has not improved for some evaluations."""
    hooks: tuple[str, ...] = ()
    """Your own callbacks and transforms of training samples, each `package.module:factory` of an
    `elastic_kfac.training.hooks.Hook`."""
    eval_every_epochs: Annotated[float, Field(gt=0)] = 1
    """Epochs between evaluations; the last step is always evaluated."""
    eval_batch_size: Annotated[int, Field(ge=1)] = 512
    """Samples per worker and pass in evaluations; affects memory and speed only."""
    log_every_steps: Annotated[int, Field(ge=1)] = 1
    """Steps between rows of `metrics.jsonl`."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Type of forward and backward passes; weights stay in fp32. `fp16` adds dynamic loss scaling."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more computation."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the target probability that is spread over all classes."""
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    """Backend of torch.distributed; `auto` is NCCL on GPUs and Gloo on CPUs."""
    torch_threads: Annotated[int, Field(ge=1)] = 1
    """Threads per worker inside an operator on CPUs."""
    sync_batch_norm: bool = False
    """Normalise over the samples of a group of workers instead of one worker's pass."""
    sync_batch_norm_group: Annotated[int, Field(ge=1)] | None = None
    """Consecutive workers that normalise together; null means all."""
    loss: str = "cross_entropy"
    """Loss of classification: `cross_entropy`, `mse` (against one-hot targets), or
    `package.module:factory`."""

    @property
    def goal(self) -> Target | None:
        """The target, however it was written."""
        if self.target is None and self.target_accuracy is not None:
            return Target(value=self.target_accuracy)
        return self.target
