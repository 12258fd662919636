"""K-FAC and its sharded pipeline: the one declaration of every option.

`KfacOptions` is what the section `kfac` of a run and `elastic_kfac.KFAC` have in common; a script tells
KFAC about its loss as well (`ScriptOptions`). A value that may follow a schedule is a number, one of the
schedules below, or (from Python) a function of the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Any, Literal

from elastic_kfac.config.section import (
    Discriminator,
    Field,
    Section,
    Tag,
    TypeAdapter,
    model_validator,
)

Positive = Annotated[float, Field(gt=0)]


class WarmupSchedule(Section):
    """From `start` to `target`: x_{k+1} = (1 − c) x_k + c·target, c = 2·log10(start/target)/steps (the
    damping warm-up of Osawa et al. 2019)."""

    schedule: Literal["warmup"] = "warmup"
    start: Positive
    """Value at step 0, above `target`."""
    target: Positive
    """Value that is approached."""
    steps: Annotated[int, Field(ge=1)]
    """Steps of the warm-up, T_warm of the paper."""

    def __call__(self, step: int) -> float:
        rate = 2 * math.log10(self.start / self.target) / self.steps
        rate = min(max(rate, 0.0), 1.0)
        return self.target + (self.start - self.target) * (1 - rate) ** step


class MilestoneSchedule(Section):
    """`start · factor^(milestones passed)`."""

    schedule: Literal["milestones"] = "milestones"
    start: Positive
    """Value before the first milestone."""
    factor: Positive
    """What each milestone multiplies the value by."""
    milestones: tuple[Annotated[int, Field(ge=0)], ...]
    """Optimizer steps."""

    def __call__(self, step: int) -> float:
        return self.start * self.factor ** sum(step >= m for m in self.milestones)


class LevenbergMarquardt(Section):
    """Damping that follows how well the quadratic model predicts the loss (Martens and Grosse 2015,
    section 6.5)."""

    rule: Literal["levenberg_marquardt"] = "levenberg_marquardt"
    initial: Positive
    """Damping at step 0."""
    omega: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """ω: one step's factor."""
    interval: Annotated[int, Field(ge=1)] = 5
    """Steps between measurements; each costs one forward pass."""
    minimum: Positive = 1e-8
    """Smallest damping."""
    maximum: Positive = 1e8
    """Largest damping."""

    @model_validator(mode="after")
    def _starts_inside(self) -> LevenbergMarquardt:
        if not self.minimum <= self.initial <= self.maximum:
            raise ValueError(
                f"initial={self.initial:g} is outside {self.minimum:g} to {self.maximum:g}"
            )
        return self


def _kind(value: Any) -> str:
    """Which kind of value this is, so that errors are about that kind only."""
    if isinstance(value, dict):
        return str(value.get("schedule") or value.get("rule") or "schedule")
    if isinstance(value, WarmupSchedule | MilestoneSchedule):
        return value.schedule
    if isinstance(value, LevenbergMarquardt):
        return value.rule
    return "function" if callable(value) else "number"


_BY_KIND = Discriminator(
    _kind,
    custom_error_type="kind_of_value",
    custom_error_message="a number, or a mapping with schedule: warmup, schedule: milestones or (damping "
    "only) rule: levenberg_marquardt",
)
Function = Annotated[Callable[[int], float], Tag("function")]
Warmup = Annotated[WarmupSchedule, Tag("warmup")]
Milestones = Annotated[MilestoneSchedule, Tag("milestones")]

Damping = Annotated[
    Annotated[Positive, Tag("number")]
    | Warmup
    | Milestones
    | Annotated[LevenbergMarquardt, Tag("levenberg_marquardt")]
    | Function,
    _BY_KIND,
]
Decay = Annotated[
    Annotated[float, Field(ge=0, lt=1), Tag("number")] | Warmup | Milestones | Function,
    _BY_KIND,
]
Interval = Annotated[Annotated[int, Field(ge=1), Tag("number")] | Milestones | Function, _BY_KIND]
Clip = Annotated[
    Annotated[Positive | None, Tag("number")] | Warmup | Milestones | Function,
    _BY_KIND,
]


class KfacOptions(Section):
    """What the preconditioner does; `elastic_kfac.KFAC` takes these as keywords."""

    damping: Damping = 1e-3
    """Tikhonov damping γ, at true per-sample scale: it competes with the eigenvalues of A ⊗ G, which
    have the scale of squared per-sample gradients (of the normalised loss with
    `trust_region: adaptive`: 1 at the output). Too small lets noise in flat directions dominate the
    step; too large turns K-FAC into gradient descent. A layer never gets less than its gradient's
    rounding needs: in float32, about 2e-6 of its largest eigenvalue. With `trust_region: adaptive` γ is
    that of the first batch, and is halved whenever the gradient at the output has halved. A number, a
    schedule (`schedule: warmup` or `milestones`) or `rule: levenberg_marquardt`."""
    factor_decay: Decay = 0.95
    """Weight of the OLD factor in the moving average; or a schedule."""
    factor_update_steps: Interval = 5
    """Steps between factor updates; or a schedule. Not given, it is 1 if inverse_update_steps is no
    multiple of the default."""
    inverse_update_steps: Interval = 10
    """Steps between decompositions, a multiple of factor_update_steps; or a schedule."""
    trust_region: Literal["adaptive", "fixed", "none"] = "adaptive"
    """What bounds a step. `adaptive` normalises the loss by the size of its first output gradients,
    bounds the whole step with the optimizer's momentum in it, and moves the bound with the descent:
    damping then is on the scale of the normalised loss, and of the learning rate only its course
    counts, from the largest value on. `fixed` bounds one preconditioned gradient by `kl_clip`, and is
    what a given `kl_clip` stands for. `none` bounds nothing."""
    trust_radius: Positive = 1.0
    """Factor on the longest step of `trust_region: adaptive`, which follows from the size of the batch:
    what to tune in place of the learning rate."""
    kl_clip: Clip = 1e-3
    """Bound κ of `trust_region: fixed` on the approximate KL divergence of a step; null is
    `trust_region: none`; or a schedule."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """m of a momentum *before* the preconditioner, which then is applied to M ← m M + (1 − m) D:
    gradients of earlier steps meet the curvature of this one, and the trust region bounds the step that
    is taken, without assuming that steps add up. It takes the place of the optimizer's momentum, which
    must be 0; parameters that K-FAC does not cover have none then. Needs `trust_region: adaptive`. 0
    leaves momentum to the optimizer, behind the preconditioner."""
    method: Literal["eigen", "inverse", "ekfac", "one_sided"] = "eigen"
    """`eigen` applies (A ⊗ G + γI)⁻¹ exactly; `inverse` the factored Tikhonov form; `ekfac` replaces the
    products of eigenvalues by second moments of the gradient in their basis, which every statistics step
    corrects (George et al. 2018); `one_sided` is D (A + γI)⁻¹, without anything of the output gradients
    (Benzing 2022). When to use which: docs/variants.md."""
    grad_worker_frac: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = 1.0
    """Share of ranks that precondition a layer; 1/N is MEM-OPT, 1 COMM-OPT, `auto` the planner's
    choice. Its rounding is `placement.plan.columns_for_fraction`."""
    skip_layers: tuple[str, ...] = ()
    """Regular expressions; a layer whose name matches one is not preconditioned."""
    refresh: Literal["fixed", "adaptive"] = "fixed"
    """`fixed` refreshes statistics and decompositions by the two intervals; `adaptive` by how much
    each statistic changes (Osawa et al. 2020), and decomposes what was refreshed."""
    refresh_threshold: Positive = 0.1
    """α of `refresh: adaptive`: relative change that counts as similar."""
    stagger: bool | None = None
    """Spread statistics and decompositions of different layers over the intervals, decompositions between
    statistics and large ones on another thread, so that no step takes much longer than another. null
    does so on CPUs where inverse_update_steps is 50 or more and factor_update_steps 2 or more. With
    sampled labels (`fisher`) only decompositions are spread."""
    overlap_reduction: bool = False
    """Reduce statistics while the next step's passes run: `step()` starts the reduction and returns, and
    the next `step()` averages and decomposes what has arrived. Preconditioning in every step but the
    first then uses the curvature that is due one step before, at any number of ranks. For slow links
    (docs/planning.md); needs refresh=fixed and a method other than ekfac."""
    inverse_damping: Literal["pi", "sqrt", "plain"] = "pi"
    """How `method: inverse` splits γ between A and G."""
    precompute: bool = False
    """Cache 1/(d_G d_Aᵀ + γ) with an eigendecomposition; γ is frozen until the next one."""
    fisher: Literal["empirical", "1mc", "mc", "exact"] = "empirical"
    """`empirical` uses the training gradients; `1mc`, `mc` and `exact` those of labels that the
    model itself predicts (`KFAC.sample_fisher`)."""
    max_factor_dim: Annotated[int, Field(ge=1)] | None = 1024
    """Widest factor that is kept whole (a bias not counted). Of a wider one, blocks on the diagonal are
    kept, in convolutions of half this width, elsewhere such that they take a sixteenth of the memory of
    a whole one of this width together; beyond 8 times this width, the diagonal. A line at construction
    names such layers. null keeps everything."""
    factor_rank: Annotated[int, Field(ge=1)] | None = None
    """r: factors wider than max_factor_dim, up to 8 times that, are kept whole instead of in blocks, and
    decomposed into their r largest eigenpairs and the mean of the other eigenvalues. For wide layers
    whose blocks lose too much, with rare statistics (factor_update_steps): a step then costs a multiple
    of r per weight, a statistic one of the width. Needs method=eigen."""
    weight_sharing: Literal["expand", "reduce"] = "expand"
    """`expand` treats positions of a Linear or a convolution as samples of a shared weight, `reduce`
    averages them (Eschenhagen et al. 2023); Embedding layers always expand."""
    factor_scale: Literal["per_sample", "sc20", "kaisa"] = "per_sample"
    """`sc20` and `kaisa` have the scales of published code, for comparison."""
    ema_init: Literal["first", "identity"] = "first"
    """The running average starts from the first statistic, or from I."""
    bn_fisher: Literal["unit", "full", "diag"] = "unit"
    """Fisher of normalisation layers: a block per channel, the whole matrix, its diagonal."""
    bn_damping_multiplier: Positive = 1.0
    """Factor on γ for BatchNorm."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Coupled weight decay: D ← D + wd·W and γ ← γ + wd. Leave the optimizer's own at 0."""
    colocate: bool = True
    """Decompose A and G of a layer on the same rank (not when sharded)."""
    symmetry_aware: bool = True
    """Send triangles of symmetric tensors (always when sharded)."""
    bucket_mib: Positive = 25.0
    """Size of communication buckets, MiB."""

    @model_validator(mode="before")
    @classmethod
    def _published_rule(cls, data: Any) -> Any:
        """A clip or a scale of published code comes with the bound that it was published with."""
        if not isinstance(data, dict) or "trust_region" in data:
            return data
        if "kl_clip" in data:
            return {**data, "trust_region": "none" if data["kl_clip"] is None else "fixed"}
        if data.get("factor_scale", "per_sample") != "per_sample":
            return {**data, "trust_region": "fixed"}
        return data

    @model_validator(mode="before")
    @classmethod
    def _common_rhythm(cls, data: Any) -> Any:
        """Decompositions see new factors."""
        if not isinstance(data, dict) or "factor_update_steps" in data:
            return data
        inverse = data.get("inverse_update_steps")
        default = cls.model_fields["factor_update_steps"].default
        if isinstance(inverse, int) and inverse % default:
            return {**data, "factor_update_steps": 1}
        return data

    @model_validator(mode="after")
    def _consistent(self) -> KfacOptions:
        if self.trust_region == "fixed" and self.kl_clip is None:
            raise ValueError("trust_region=fixed needs a kl_clip; null is trust_region=none")
        if (
            self.trust_region == "adaptive"
            and self.kl_clip != type(self).model_fields["kl_clip"].default
        ):
            raise ValueError(
                "kl_clip has no effect with trust_region=adaptive: set trust_region=fixed"
            )
        if self.trust_radius != 1.0 and self.trust_region != "adaptive":
            raise ValueError("trust_radius needs trust_region=adaptive: leave kl_clip out")
        if self.momentum and self.trust_region != "adaptive":
            raise ValueError("momentum before the preconditioner needs trust_region=adaptive")
        if self.trust_region == "adaptive" and self.factor_scale != "per_sample":
            raise ValueError(
                "trust_region=adaptive needs factor_scale=per_sample: give kl_clip to use another scale"
            )
        if self.precompute and self.method != "eigen":
            raise ValueError("precompute caches eigenvalue products: it needs method=eigen")
        if self.precompute and not self.colocate:
            raise ValueError("precompute needs both factors on one rank: set colocate=true")
        if self.method == "ekfac" and not self.colocate:
            raise ValueError("method=ekfac needs both factors on one rank: set colocate=true")
        if self.method in ("ekfac", "one_sided") and self.fisher != "empirical":
            raise ValueError(
                f"method={self.method} uses training gradients: it needs fisher=empirical"
            )
        if self.method == "ekfac" and self.factor_scale != "per_sample":
            raise ValueError("method=ekfac measures curvature: it needs factor_scale=per_sample")
        if self.factor_rank is not None and self.method != "eigen":
            raise ValueError("factor_rank keeps eigenpairs: it needs method=eigen")
        if self.factor_rank is not None and self.max_factor_dim is None:
            raise ValueError("factor_rank is for factors wider than max_factor_dim: give a number")
        if self.overlap_reduction and self.refresh == "adaptive":
            raise ValueError(
                "overlap_reduction=true needs refresh=fixed: refresh=adaptive chooses the next step's "
                "statistics by this step's; change one of them"
            )
        if self.overlap_reduction and self.method == "ekfac":
            raise ValueError(
                "overlap_reduction=true needs method=eigen, inverse or one_sided: method=ekfac measures "
                "the gradient that the statistics belong to; change one of them"
            )
        if self.stagger and self.refresh == "adaptive":
            raise ValueError("stagger spreads a fixed interval: it needs refresh=fixed")
        return self


RANGES: dict[str, TypeAdapter[Any]] = {
    "damping": TypeAdapter(Positive),
    "kl_clip": TypeAdapter(Positive),
    "factor_decay": TypeAdapter(Annotated[float, Field(ge=0, lt=1)]),
    "factor_update_steps": TypeAdapter(Annotated[int, Field(ge=1)]),
    "inverse_update_steps": TypeAdapter(Annotated[int, Field(ge=1)]),
}
"""Validators of what a schedule returns, by option."""


class ScriptOptions(KfacOptions):
    """The keywords of `elastic_kfac.KFAC`: a script's loss and layout, too, which `train` has itself."""

    loss_reduction: Literal["mean", "positions", "sum"] | None = None
    """How the loss is normalised: `mean` over the samples of a batch, the mean over all
    its `positions` (tokens, pixels; the real ones where `KFAC.micro_batch` has a mask), which then are
    the samples, or their `sum`. It sets the scale of the Fisher, and so what damping competes with: a
    mean over T positions that is taken for one over samples makes damping T times too strong. null is
    `mean`, with a warning where outputs have positions."""
    batch_axis: Annotated[int, Field(ge=0)] = 0
    """The dimension of a model's inputs that counts samples: 1 for time-major sequences."""
    memory_budget_bytes: Positive | None = None
    """Limit per rank for factors and decompositions, whatever distributes them; `train` has
    `plan.memory_budget_gib`. null means no limit."""

    @model_validator(mode="after")
    def _has_a_mean(self) -> ScriptOptions:
        if self.method == "ekfac" and self.loss_reduction == "sum":
            raise ValueError(
                "method=ekfac needs the gradient of a mean: divide the loss by its terms"
            )
        return self


class KfacConfig(KfacOptions):
    """The preconditioner; every key but `enabled` is a keyword of `elastic_kfac.KFAC`."""

    enabled: bool = True
    """Whether gradients are preconditioned by K-FAC at all."""

    @model_validator(mode="after")
    def _draws_once(self) -> KfacConfig:
        if self.fisher == "mc":
            raise ValueError("training draws once per sample: use fisher=1mc or exact")
        return self


class ShardedConfig(Section):
    """K-FAC sharded by owner (`optimizer.name: sharded_kfac`; Osawa et al. 2019)."""

    gather: Literal["weights", "gradients"] = "weights"
    """Owners update weights and send those, or send preconditioned gradients to a replicated
    optimizer."""
    v_method: Literal["per_owner", "padded", "fused"] = "per_owner"
    """How reduce-scatter and all-gather of unequal parts run: fewest bytes, fewest unequal calls,
    or two all-reduces as the authors of the method ran it."""
    wire: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of gradients and statistics on the way to their owners. The error in P is that of
    the format (5e-4 for fp16) times the ratio of a factor's largest eigenvalue to its share of the
    damping: below 1 % at γ = 0.1, several times that at γ = 0.01."""
