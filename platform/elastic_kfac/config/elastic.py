"""Workers: how many there are, what they exchange and what each requests from Ray."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from elastic_kfac.config.section import Section


class ElasticConfig(Section):
    """How the run follows a cluster that grows and shrinks."""

    min_workers: Annotated[int, Field(ge=1)] = 1
    """The run waits while fewer workers fit on the cluster."""
    max_workers: Annotated[int, Field(ge=1)] = 2
    """Largest number of workers; without `--address` also the number of local nodes."""
    batch_policy: Literal["keep_global", "keep_local", "abs"] = "keep_global"
    """What a resize does to the global batch: nothing (`keep_global`), or scale it with the workers
    (`keep_local`). With `abs` a batch that grows (`batch.policy`) requests more workers."""
    merge: Literal["average", "distnewton"] = "average"
    """How local SGD merges the workers' weights: average, or a quasi-Newton step (`distnewton`)."""
    merge_every_steps: Annotated[int, Field(ge=1)] = 1
    """Local steps between merges. 1 with `merge: average` is ordinary training: gradients are averaged
    in every step."""
    snapshot_interval_s: Annotated[float, Field(gt=0)] = 2.0
    """Upper bound in seconds on training time to redo after an unplanned loss. Exceeded by large
    models, where a snapshot would take more than 2 % of the CPU time of the steps since the last."""
    checkpoint_interval_s: Annotated[float, Field(gt=0)] = 60.0
    """Seconds between checkpoints in the run's storage while snapshots go to the memory of other nodes.
    A drain and the end of the run always save one."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 3
    """Newest checkpoints to keep."""
    resize_poll_s: Annotated[float, Field(gt=0)] = 1.0
    """Seconds between looks for capacity to grow into."""
    in_place: bool = True
    """Workers keep their processes when others come, leave or are lost: each is placed for itself, and
    a change costs tenths of a second. With false every change restarts all of them, as it does with
    `plan.decomposers`, NCCL, or rank functions of one's own; the run's events say so."""
    slow_factor: Annotated[float, Field(gt=1)] | None = 1.5
    """A worker whose passes take this many times as long per sample as the median of the others, in 10 of
    the last 12 steps, is named in the event `slow_rank`; null watches nobody. Their times travel with the
    gradients."""
    rebalance: bool = False
    """Give a worker that is named as slow less of each batch, and fewer decompositions, until it is as
    fast as the others again. The mean over a batch stays exact; in reproducible mode whole logical
    shards move, and every bit stays."""
    reproducible: bool = False
    """Make every bit of the final state independent of the number of workers, resizes and kills (CPUs
    of one type)."""
    logical_shards: Annotated[int, Field(ge=1, le=1024)] = 8
    """Fixed parts of every batch in reproducible mode; a power of two. Fewer are faster."""

    @property
    def takes_local_steps(self) -> bool:
        """Whether workers step on their own between merges (local SGD)."""
        return self.merge == "distnewton" or self.merge_every_steps > 1


class CommunicationConfig(Section):
    """How gradients are summed over workers (except with `optimizer.name: sharded_kfac`)."""

    algorithm: Literal["native", "ring", "rabenseifner", "hierarchical"] = "native"
    """All-reduce: the backend's own, or one of ours, for comparison."""
    wire_format: Literal["fp32", "bf16", "fp16", "int8", "topk"] = "fp32"
    """Type in which gradients are sent; `topk` sends the largest entries only."""
    topk_ratio: Annotated[float, Field(gt=0, le=1)] = 0.01
    """Fraction of entries that `topk` sends."""
    error_feedback: bool | None = None
    """Add what compression lost to the next step's gradient; null means yes for `int8` and `topk`."""


class DistNewtonConfig(Section):
    """Quasi-Newton merge of local SGD (`elastic.merge: distnewton`)."""

    lr: Annotated[float, Field(gt=0)] | None = None
    """Step size τ, or τ_N of the Newton part if `gradient_lr` is set; null means the current rate."""
    gradient_lr: Annotated[float, Field(gt=0)] | None = None
    """Step size τ_S on the complement of the space whose curvature is measured; null means `lr`."""
    ratio: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """λ: directions with σ_k < λ·σ_1 take a gradient step."""
    mode: Literal["paper", "sym", "abs"] = "paper"
    """Curvature as published, symmetrised, or with absolute eigenvalues (repelled by saddles)."""
    cap: bool = True
    """Limit τ to 1/σ̂, the inverse of the largest measured curvature."""
    common_batch: bool = True
    """Evaluate all gradients of a merge on the same samples, so that they differ by curvature and not
    by sampling noise."""


class PlanConfig(Section):
    """Inputs of the planner, which decides who decomposes and preconditions each layer."""

    memory_budget_gib: Annotated[float, Field(gt=0)] | None = None
    """Limit in GiB per worker for factors and decompositions: a plan that needs more is refused, and
    `kfac.grad_worker_frac: auto` takes the largest share that fits; null means no limit."""
    calibrate: bool = False
    """Measure this kind of host (about 1 s, kept in the user's cache) and the links between workers at
    every start and resize, instead of planning with stored figures."""
    decomposers: Annotated[int, Field(ge=0)] = 0
    """Processes per worker, one CPU each, that compute large decompositions while the worker trains:
    actors on CPUs that are free under Ray, processes of this host with `--local`. Results are used in
    the fixed later step that `kfac.stagger` gives them, and are those of a run without; while no CPU is
    free, the worker computes them itself."""
    unequal_shares: bool = False
    """Give workers on faster kinds of hosts more samples of each batch, and more decompositions, in
    proportion to what `plan.calibrate` measures there; hosts of one kind count as equally fast. The mean
    over a batch stays exact."""
    retune: bool = False
    """Choose `kfac.factor_update_steps`, `kfac.inverse_update_steps` and `kfac.damping` again at every
    resize, from measured steps: intervals such that statistics and decompositions take at most a tenth
    of a step (at most 10 times as long as configured), damping by the square root of the age of the
    curvature over the batch. Resizes then change the trajectory. The event `retuned` has what changed."""
    margin: Annotated[float, Field(gt=0)] | None = 0.5
    """With `kfac.grad_worker_frac: auto`: how far decompositions may take longer or shorter than
    predicted, as a fraction, before the plan is made anew from what was measured; null keeps plans
    between resizes."""


class ResourcesConfig(Section):
    """What each worker requests from Ray."""

    use_gpu: bool = False
    """Train on GPUs, one per worker; a worker without a usable GPU fails the run."""
    per_worker: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=lambda: {"CPU": 1.0}
    )
    """Ray resources of a worker, for example `{CPU: 4, GPU: 1}`."""

    def of_a_worker(self) -> dict[str, float]:
        """All resources of one worker: `use_gpu` alone means one GPU."""
        return {**({"GPU": 1.0} if self.use_gpu else {}), **self.per_worker}
