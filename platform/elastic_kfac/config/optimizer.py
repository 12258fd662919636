"""First-order rules, learning-rate schedules and batch-size policies."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from elastic_kfac.config.section import Section


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
