"""The network and the training loop."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from elastic_kfac.config.section import Section


class ModelConfig(Section):
    """The network."""

    name: str = "small_cnn"
    """Name of a built-in model (`elastic-kfac models` lists them), or `package.module:factory`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the factory."""
    initial_weights: str | None = None
    """Safetensors file to start from, for example an exported run; null starts from random weights."""


class TaskConfig(Section):
    """What is learned: the loss, and the metrics of evaluations."""

    name: str = "classification"
    """`classification`, or `package.module:factory` of a person's own `elastic_kfac.Task`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the task."""


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
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    """Accuracy on the evaluation split whose time is reported as `time_to_accuracy_s`."""
    stop_at_target: bool = False
    """End the run when `target_accuracy` is reached."""
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
