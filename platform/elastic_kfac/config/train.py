"""The training loop and its network."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from elastic_kfac.config.section import Section


class ModelConfig(Section):
    """Which network."""

    name: str = "small_cnn"
    """A name of the zoo (`elastic-kfac doctor` lists them) or `package.module:factory`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the factory."""
    initial_weights: str | None = None
    """A safetensors file whose weights the run starts from."""


class TrainConfig(Section):
    """The loop: how long, how large, how precise."""

    epochs: Annotated[float, Field(gt=0)] = 10
    global_batch_size: Annotated[int, Field(ge=1)] = 128
    """Samples per optimizer step over all ranks (the true count; the last batch is smaller)."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Upper bound per rank and pass; None means one pass per step."""
    seed: Annotated[int, Field(ge=0)] = 0
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    stop_at_target: bool = False
    eval_every_epochs: Annotated[float, Field(gt=0)] = 1
    eval_batch_size: Annotated[int, Field(ge=1)] = 512
    log_every_steps: Annotated[int, Field(ge=1)] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: bool = False
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    torch_threads: Annotated[int, Field(ge=1)] = 1
    """Intra-op threads per worker (CPU)."""
    sync_batch_norm: bool = False
    """Normalise over the samples of a group of ranks instead of over one rank's pass."""
    sync_batch_norm_group: Annotated[int, Field(ge=1)] | None = None
    """Consecutive ranks that normalise together; None is all of them."""
    loss: str = "cross_entropy"
    """`cross_entropy`, `mse`, or `package.module:factory`."""
