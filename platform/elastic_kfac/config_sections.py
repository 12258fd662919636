"""Sections about how a run learns: optimizer, batch policy, attacks, mixing, merging of ranks.

`config.py` puts them together with the others; `conflicts` are the rules between sections.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

if TYPE_CHECKING:
    from elastic_kfac.config import Config


class Section(BaseModel):
    """A frozen section: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class OptimizerConfig(Section):
    """The first-order rule that applies the (preconditioned) gradient."""

    name: Literal["sgd", "adam", "adamw", "lars", "lamb", "velocity_sgd", "sharded_kfac"] = "sgd"
    """`velocity_sgd` is gradient descent whose velocity θ_t − θ_{t−1} contains the rate; `sharded_kfac`
    is Osawa's pipeline: it takes damping, method, intervals and scales from `kfac`, momentum from here
    and the rest from `sharded`; factors and momentum live at one owner each."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Also the first β of adam, adamw and lamb."""
    momentum_rule: Literal["constant", "ratio0", "ratio_prev"] = "constant"
    """How momentum follows the rate in `velocity_sgd` and `sharded_kfac`: m0·lr/lr0, or m0·lr/lr_prev
    while the rate falls."""
    nesterov: bool = False
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    decay_norm_and_bias: bool = False
    """Whether weight decay also covers normalisation layers and biases."""
    trust: Annotated[float, Field(gt=0)] = 1e-3
    """η of `lars`."""
    rescale_weights: Literal["none", "shrink", "always"] = "none"
    """Bring weights to norm sqrt(2·d_out) after each update (`shrink`: only larger ones); replaces
    weight decay in the large-batch K-FAC recipe."""
    lr_schedule: Literal["constant", "step", "cosine", "linear", "polynomial"] = "constant"
    warmup_epochs: Annotated[float, Field(ge=0)] = 0
    decay_epochs: tuple[float, ...] = ()
    """Of `step`; with a batch policy they are the policy's milestones."""
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    end_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Where cosine and linear schedules end, as a fraction of `lr`."""
    decay_start_epoch: Annotated[float, Field(ge=0)] = 0
    """Where `polynomial` begins to fall."""
    decay_end_epoch: Annotated[float, Field(gt=0)] | None = None
    """Where `polynomial` reaches 0, perhaps after the end of training; None is `train.epochs`."""
    decay_power: Annotated[float, Field(gt=0)] = 2.0

    @model_validator(mode="after")
    def _consistent(self) -> OptimizerConfig:
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum > 0")
        if self.nesterov and self.name not in ("sgd", "sharded_kfac"):
            raise ValueError(f"nesterov=true does not go with name={self.name}")
        if self.momentum_rule != "constant" and self.name not in ("velocity_sgd", "sharded_kfac"):
            raise ValueError(
                f"momentum_rule={self.momentum_rule} needs a velocity that contains the rate: "
                f"name=velocity_sgd or sharded_kfac, not {self.name}"
            )
        end = self.decay_end_epoch
        if end is not None and end <= self.decay_start_epoch:
            raise ValueError(
                f"decay_end_epoch={end:g} is not after decay_start_epoch={self.decay_start_epoch:g}"
            )
        return self


class BatchConfig(Section):
    """How batch and rate follow the course of a run, from `train.global_batch_size` = b0 on."""

    policy: Literal["constant", "bl", "fb", "gg", "abs", "absa", "warmup"] = "constant"
    """`bl`: the cap with the small batch's rate; `fb`: the cap with linear scaling and warm-up; `gg`:
    grow where the rate would decay; `abs` / `absa`: grow when the top Hessian eigenvalue falls, without
    and with adversarial samples; `warmup`: follow `stages`. Decay epochs are those of `optimizer` with
    `lr_schedule: step`; any other schedule multiplies the policy's rate."""
    max_batch_size: Annotated[int, Field(ge=1)] | None = None
    """The cap; every policy but `constant` needs it."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 5
    """Of `fb`: from lr to lr·B/b0."""
    stages: tuple[tuple[float, int], ...] = ()
    """Of `warmup`: (from epoch, batch size)."""
    growth: Annotated[float, Field(gt=1)] = 2.0
    """β of `abs` and `absa`."""
    eigenvalue_ratio: Annotated[float, Field(gt=1)] = 2.0
    """α: the batch grows when the eigenvalue has fallen by this factor."""
    patience_epochs: Annotated[int, Field(ge=1)] = 10
    """κ: the batch grows after this many epochs in any case."""
    eigenvalue: Literal["power", "last_layer", "kfac"] = "power"
    """Where the eigenvalue comes from: power iteration on the Hessian, on its last-layer block, or
    max(d_A)·max(d_G) of the factors that K-FAC has anyway."""
    report_both: bool = False
    """With `eigenvalue: kfac`, also measure the Hessian's, for the correlation in the metrics."""
    hessian_samples: Annotated[int, Field(ge=1)] = 128
    """Training samples, not augmented and the same throughout, that the Hessian is taken over."""
    power_iterations: Annotated[int, Field(ge=1)] = 10
    power_tolerance: Annotated[float, Field(gt=0)] = 1e-2
    samples_per_worker: Annotated[int, Field(ge=1)] | None = None
    """With `elastic.batch_policy: abs`, how many samples of a batch ask for one worker; None is
    b0 / elastic.min_workers."""


class AdversarialConfig(Section):
    """Attacks on training samples (robust training, ABSA) and in evaluations."""

    attack: Literal["none", "fgsm", "pgd", "l2"] = "none"
    radius: Annotated[float, Field(ge=0)] = 0.005
    """ε in units of the model's inputs, that is after normalisation."""
    steps: Annotated[int, Field(ge=1)] = 1
    step_size: Annotated[float, Field(gt=0)] | None = None
    """None: ε for one step, 2.5·ε/steps for several."""
    random_start: bool = False
    fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """γ: share of each logical micro-batch of b0 samples that is attacked; 1 is robust optimisation.
    With `absa` it is where the policy starts."""
    decay: Annotated[float, Field(gt=1)] = 2.0
    """ω of `absa`: what γ is divided by when the batch grows."""
    stop_epoch: Annotated[float, Field(ge=0)] | None = None
    """From here on nothing is attacked; None: half of the epochs with `absa`, else never."""
    data_range: tuple[float, float] | None = None
    """Smallest and largest input; None takes that of the pixels, and does not clamp other features."""
    eval_attack: Literal["none", "fgsm", "pgd", "l2"] = "none"
    """Also count attacked samples in every evaluation."""
    eval_radius: Annotated[float, Field(ge=0)] | None = None
    """None is `radius`."""
    eval_steps: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _consistent(self) -> AdversarialConfig:
        for name, kind, steps in (
            ("steps", self.attack, self.steps),
            ("eval_steps", self.eval_attack, self.eval_steps),
        ):
            if kind == "fgsm" and steps > 1:
                raise ValueError(f"fgsm takes one step, not {name}={steps}; use pgd")
        if self.data_range is not None:
            low, high = self.data_range
            if low >= high:
                raise ValueError(f"data_range={low:g} to {high:g} is empty")
            for name, kind, radius in (
                ("radius", self.attack, self.radius),
                ("eval_radius", self.eval_attack, self.evaluation_radius),
            ):
                if kind in ("fgsm", "pgd") and radius > high - low:
                    raise ValueError(
                        f"{name}={radius:g} is outside the data range: 0 to {high - low:g}"
                    )
        return self

    @property
    def evaluation_radius(self) -> float:
        """ε of evaluations."""
        return self.radius if self.eval_radius is None else self.eval_radius


class MixingConfig(Section):
    """Mixup and random erasing of training samples."""

    mixup: Literal["none", "batch", "running"] = "none"
    """Mix each batch with this rank's last one: as it was, or as it was mixed (running mixup)."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.4
    """Of λ ~ Beta(α, α)."""
    on_smaller: Literal["reset", "subsample"] = "reset"
    """What a batch smaller than the last one is mixed with: nothing, or a part of it."""
    erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a box of an image is erased; 0.5 in the large-batch recipe."""
    erasing_area: tuple[float, float] = (0.02, 0.25)
    """Share of the image, from and to."""
    erasing_aspect: tuple[float, float] = (0.3, 1.0)

    @model_validator(mode="after")
    def _consistent(self) -> MixingConfig:
        low, high = self.erasing_area
        if not 0 < low <= high <= 1:
            raise ValueError(f"erasing_area={low:g} to {high:g} is not within (0, 1]")
        low, high = self.erasing_aspect
        if not 0 < low <= high:
            raise ValueError(f"erasing_aspect={low:g} to {high:g} is not ascending above 0")
        return self


class AnalysisConfig(Section):
    """What is computed about the Hessian: during training, and by `elastic-kfac analyze`.

    All of it is about the mean loss of samples that are not augmented, in evaluation mode and without
    weight decay. Training itself does not notice.
    """

    every_epochs: Annotated[float, Field(gt=0)] | None = None
    """Analyse after this many epochs, again and again, and at the end; None: not during training."""
    samples: Annotated[int, Field(ge=1)] | None = 512
    """The same samples throughout; None takes the whole split."""
    top_k: Annotated[int, Field(ge=1)] = 1
    """Eigenvalues of the largest size, of the whole Hessian and of the last layer's block."""
    lanczos_steps: Annotated[int, Field(ge=2)] = 100
    """At most this many Hessian products, and as many vectors in memory, per spectrum."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """Relative residual at which an eigenvalue counts as converged."""
    one_samples: Annotated[int, Field(ge=0)] = 0
    """Over how many single samples the spectrum of one sample's Hessian is averaged."""
    trace_draws: Annotated[int, Field(ge=0)] = 0
    density_draws: Annotated[int, Field(ge=0)] = 0
    landscape_points: Annotated[int, Field(ge=0)] = 0
    """Losses along the dominant eigenvector, on both splits; an odd number looks at the middle."""
    budget_s: Annotated[float, Field(gt=0)] | None = None
    """Stop after about this many seconds and say what is missing; None: take the time it takes. With
    a budget, how far it gets depends on the machine; without one every world gives equal numbers."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Samples per pass; what a product takes besides the vectors grows with it."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Limit for the vectors on each worker; None: what is free."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Which samples, start vectors and draws."""


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


GROWING = ("gg", "abs", "absa", "warmup")
"""Policies whose batch changes in the course of a run."""


def conflicts(config: Config) -> Iterator[str]:
    """Why sections do not go together, in one line each."""
    yield from _batch_conflicts(config)
    yield from _merge_conflicts(config)
    train, optimizer = config.train, config.optimizer
    if train.sync_batch_norm_group is not None and not train.sync_batch_norm:
        yield "train.sync_batch_norm_group needs train.sync_batch_norm=true"
    if optimizer.lr_schedule == "polynomial" and optimizer.decay_start_epoch >= (
        optimizer.decay_end_epoch or train.epochs
    ):
        yield (
            f"optimizer.decay_start_epoch={optimizer.decay_start_epoch:g} is not before the end "
            f"of the decay"
        )
    if optimizer.momentum_rule != "constant" and (
        config.batch.policy != "constant" or config.elastic.batch_policy == "keep_local"
    ):
        yield (
            f"optimizer.momentum_rule={optimizer.momentum_rule} follows a rate that follows the "
            "schedule only: it goes with batch.policy=constant and elastic.batch_policy=keep_global"
        )
    if config.sharded.gather == "gradients" and optimizer.momentum_rule != "constant":
        yield "optimizer.momentum_rule needs sharded.gather=weights"


def _batch_conflicts(config: Config) -> Iterator[str]:
    batch, base, policy = config.batch, config.train.global_batch_size, config.batch.policy
    elastic = config.elastic.batch_policy
    if elastic == "abs" and policy not in GROWING:
        yield (
            f"elastic.batch_policy=abs needs a batch that grows: batch.policy={policy} is not one "
            f"of {', '.join(GROWING)}"
        )
    if policy == "constant":
        return
    cap = batch.max_batch_size
    if cap is None:
        yield f"batch.policy={policy} needs batch.max_batch_size"
        return
    if cap < base:
        yield f"batch.max_batch_size={cap} is below train.global_batch_size={base}"
    if elastic == "keep_local":
        yield f"batch.policy={policy} owns the batch: elastic.batch_policy=keep_local cannot"
    schedule = config.optimizer.lr_schedule
    if policy == "gg" and not (schedule == "step" and config.optimizer.decay_epochs):
        yield (
            "batch.policy=gg grows at decay epochs: it needs optimizer.lr_schedule=step and "
            "optimizer.decay_epochs"
        )
    if policy == "fb" and config.optimizer.warmup_epochs > 0:
        yield "batch.policy=fb has its own batch.warmup_epochs: set optimizer.warmup_epochs=0"
    if policy == "warmup":
        epochs = [epoch for epoch, _ in batch.stages]
        sizes = [base, *(size for _, size in batch.stages)]
        if not epochs or epochs != sorted(epochs) or sizes != sorted(sizes) or sizes[-1] > cap:
            yield (
                "batch.policy=warmup needs batch.stages with ascending epochs and batches that "
                f"never fall, from {base} to {cap}"
            )
    if policy in ("abs", "absa"):
        if int(base * batch.growth) == base:
            yield f"batch.growth={batch.growth:g} leaves a batch of {base} as it is"
        has_factors = config.kfac.enabled and config.optimizer.name != "sharded_kfac"
        if batch.eigenvalue == "kfac" and not has_factors:
            yield "batch.eigenvalue=kfac needs kfac.enabled=true (and not optimizer sharded_kfac)"
    attack = config.adversarial.attack
    if policy == "abs" and attack != "none":
        yield f"batch.policy=abs has no adversarial samples: use absa with attack {attack}"
    if policy == "absa" and (attack == "none" or config.adversarial.fraction == 0):
        yield "batch.policy=absa needs adversarial.attack and adversarial.fraction above 0"


def steps_apart(config: Config) -> bool:
    """Whether ranks step on their own between merges, instead of summing gradients."""
    return config.elastic.merge == "distnewton" or config.elastic.merge_every_steps > 1


def _merge_conflicts(config: Config) -> Iterator[str]:
    if not steps_apart(config):
        return
    if config.elastic.merge == "distnewton":
        mode = "elastic.merge=distnewton"
    else:
        mode = f"elastic.merge_every_steps={config.elastic.merge_every_steps}"
    obstacles = {
        "kfac.enabled=true": config.kfac.enabled and config.optimizer.name != "sharded_kfac",
        "optimizer.name=sharded_kfac": config.optimizer.name == "sharded_kfac",
        "train.precision=fp16": config.train.precision == "fp16",
        "train.sync_batch_norm=true": config.train.sync_batch_norm,
        f"communication.algorithm={config.communication.algorithm}": (
            config.communication.algorithm != "native"
        ),
        f"communication.wire_format={config.communication.wire_format}": (
            config.communication.wire_format != "fp32"
        ),
        "elastic.reproducible=true": config.elastic.reproducible,
    }
    for setting, is_in_the_way in obstacles.items():
        if is_in_the_way:
            yield f"{mode} does not go with {setting}: its ranks exchange nothing between merges"


def reproducible_conflicts(config: Config) -> Iterator[str]:
    """Settings of these sections whose bits depend on the world size."""
    obstacles = {
        f"batch.policy={config.batch.policy}": config.batch.policy in ("abs", "absa"),
        f"adversarial.attack={config.adversarial.attack}": config.adversarial.attack != "none",
        f"mixing.mixup={config.mixing.mixup}": config.mixing.mixup != "none",
        "train.sync_batch_norm=true": config.train.sync_batch_norm,
    }
    yield from (setting for setting, is_in_the_way in obstacles.items() if is_in_the_way)
