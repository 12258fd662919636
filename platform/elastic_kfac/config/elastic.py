"""Workers: how many, what they exchange and what each asks of Ray."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from elastic_kfac.config.section import Section


class ElasticConfig(Section):
    """How the run follows a cluster that grows and shrinks."""

    min_workers: Annotated[int, Field(ge=1)] = 1
    max_workers: Annotated[int, Field(ge=1)] = 2
    batch_policy: Literal["keep_global", "keep_local", "abs"] = "keep_global"
    """What a resize does to the batch: nothing, or scale it with the workers; with `abs` the batch
    does not follow the workers, but its growth (`batch.policy`) asks for more of them."""
    merge: Literal["average", "distnewton"] = "average"
    """How ranks that stepped apart come together: by averaging, or by a quasi-Newton step."""
    merge_every_steps: Annotated[int, Field(ge=1)] = 1
    """Steps that ranks take apart, each on its own share; 1 with `average` sums gradients instead."""
    snapshot_interval_s: Annotated[float, Field(gt=0)] = 2.0
    """At most this much stepping time is redone after an unplanned loss; more where a snapshot takes
    over 2 % of the CPU time of the steps between two of them."""
    checkpoint_interval_s: Annotated[float, Field(gt=0)] = 60.0
    """Between durable checkpoints while snapshots go to vaults; parking and the end always save one."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 3
    resize_poll_s: Annotated[float, Field(gt=0)] = 1.0
    """How often Ray Train looks for capacity to grow into."""
    in_place: bool = False
    """Survivors of a loss keep their processes and step on while the lost ranks are replaced."""
    in_place_wait_s: Annotated[float, Field(gt=0)] = 30.0
    """How long they go on without a place for the lost ranks before the group is started again."""
    reproducible: bool = False
    """Every bit of the final state is the same for any number of workers, resizes and kills."""
    logical_shards: Annotated[int, Field(ge=1, le=1024)] = 8
    """Fixed parts of every batch in the reproducible mode, a power of two; fewer are faster."""

    @model_validator(mode="after")
    def _ordered(self) -> ElasticConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"min_workers={self.min_workers} is above max_workers={self.max_workers}"
            )
        return self

    @model_validator(mode="after")
    def _shards_are_enough(self) -> ElasticConfig:
        if self.logical_shards & (self.logical_shards - 1):
            raise ValueError(f"logical_shards={self.logical_shards} is not a power of two")
        if self.reproducible and self.max_workers > self.logical_shards:
            raise ValueError(
                f"max_workers={self.max_workers} is above logical_shards={self.logical_shards}, "
                "so that workers would have nothing to do"
            )
        return self


class CommunicationConfig(Section):
    """How gradients travel (not with `optimizer.name: sharded_kfac`, which has its own way)."""

    algorithm: Literal["native", "ring", "rabenseifner", "hierarchical"] = "native"
    wire_format: Literal["fp32", "bf16", "fp16", "int8", "topk"] = "fp32"
    topk_ratio: Annotated[float, Field(gt=0, le=1)] = 0.01
    error_feedback: bool | None = None
    """Carry what an encoding lost into the next step; None means for int8 and topk."""


class DistNewtonConfig(Section):
    """How ranks that stepped apart are merged (`elastic.merge: distnewton`)."""

    lr: Annotated[float, Field(gt=0)] | None = None
    """τ, or τ_N of the Newton part when `gradient_lr` is set; None is the step's rate."""
    gradient_lr: Annotated[float, Field(gt=0)] | None = None
    """τ_S on what the ranks know no curvature of."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """λ: directions with σ_k < λσ_1 are left to the gradient step."""
    mode: Literal["paper", "sym", "abs"] = "paper"
    cap: bool = True
    """Limit τ to 1/σ̂."""
    common_batch: bool = True
    """Take all gradients on the same samples, so that their differences are curvature, not noise."""


class PlanConfig(Section):
    """What the planner may change."""

    memory_budget_gib: Annotated[float, Field(gt=0)] | None = None
    calibrate: bool = False
    """Measure decompositions on rank 0 at every start (about a second) instead of taking stored costs."""
    retune: bool = False
    """Allow a resize to change intervals and damping (with an event)."""


class ResourcesConfig(Section):
    """What each worker asks of Ray."""

    use_gpu: bool = False
    per_worker: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=lambda: {"CPU": 1.0}
    )

    @model_validator(mode="after")
    def _gpus_are_wanted(self) -> ResourcesConfig:
        if "GPU" in self.per_worker and not self.use_gpu:
            raise ValueError(
                "per_worker names GPU, but use_gpu is false; set resources.use_gpu=true"
            )
        return self

    def of_a_worker(self) -> dict[str, float]:
        """Every resource of one worker: `use_gpu` alone means one GPU."""
        return {**({"GPU": 1.0} if self.use_gpu else {}), **self.per_worker}
