"""First-order rules, learning-rate schedules and batch-size policies."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from elastic_kfac.config.section import Section

BEHIND_KFAC = 0.7
"""Momentum behind K-FAC with the adaptive trust region."""


class OptimizerConfig(Section):
    """The rule that applies the (preconditioned) gradient, and its learning rate."""

    name: Literal["sgd", "adam", "adamw", "lars", "lamb", "velocity_sgd", "sharded_kfac"] = "sgd"
    """`velocity_sgd` is SGD whose velocity θ_t − θ_{t−1} contains the learning rate. `sharded_kfac` is
    the sharded K-FAC of Osawa et al. (2019), in which one owner per layer keeps factors and momentum;
    its options are in `kfac` and `sharded`."""
    lr: Annotated[float, Field(gt=0)] = 0.1
    """Base learning rate."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Momentum; also β1 of `adam`, `adamw` and `lamb`. Not given, it is 0.7 in `sgd` and `sharded_kfac`
    behind `kfac.trust_region: adaptive`, where that does better (docs/damping.md)."""
    momentum_rule: Literal["constant", "ratio0", "ratio_prev"] = "constant"
    """How momentum follows the learning rate in `velocity_sgd` and `sharded_kfac`: not, as
    momentum·lr/lr_0, or as momentum·lr/lr_previous while the rate falls."""
    nesterov: bool = False
    """Nesterov momentum (`sgd` and `sharded_kfac`)."""
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    """Weight decay: decoupled in `adamw` and `lamb`, added to the (preconditioned) gradient elsewhere."""
    decay_norm_and_bias: bool = False
    """Also decay normalisation layers and biases."""
    trust: Annotated[float, Field(gt=0)] = 1e-3
    """Trust coefficient η of `lars` (You et al. 2017)."""
    clip_grad_norm: Annotated[float, Field(gt=0)] | None = None
    """Bound on the norm of the mean gradient of the global batch, before K-FAC preconditions it; null
    does not clip. Preconditioned steps have a bound of their own, `kfac.trust_region`."""
    average_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay of a moving average of the weights, for example 0.999. Evaluations, `evaluate` and `export`
    use the averaged weights; training does not. Null keeps no average."""
    rescale_weights: Literal["none", "shrink", "always"] = "none"
    """Rescale each weight to norm √(2·d_out) after every update (`shrink`: only if its norm is larger);
    replaces weight decay in the large-batch K-FAC recipe (Osawa et al. 2019)."""
    lr_schedule: Literal["constant", "step", "cosine", "linear", "polynomial"] = "constant"
    """Shape of the learning rate after warm-up."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 0
    """Epochs of linear warm-up from 0 to `lr`."""
    decay_epochs: tuple[float, ...] = ()
    """Epochs at which `step` multiplies the rate by `decay_factor`; with a batch policy they are the
    policy's milestones."""
    decay_factor: Annotated[float, Field(gt=0, le=1)] = 0.1
    """Factor of `step`."""
    end_lr_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Last rate of `cosine` and `linear`, as a fraction of `lr`."""
    decay_start_epoch: Annotated[float, Field(ge=0)] = 0
    """Epoch at which `polynomial` begins to fall."""
    decay_end_epoch: Annotated[float, Field(gt=0)] | None = None
    """Epoch at which `polynomial` reaches 0, possibly after the end of the run; null means
    `train.epochs`."""
    decay_power: Annotated[float, Field(gt=0)] = 2.0
    """Exponent of `polynomial`."""


class BatchConfig(Section):
    """How batch size and learning rate change during a run, starting from b0 =
    `train.global_batch_size`."""

    policy: Literal["constant", "bl", "fb", "gg", "abs", "absa", "warmup"] = "constant"
    """`bl`: the maximum with the small batch's rate; `fb`: the maximum with linear scaling and warm-up
    (Goyal et al. 2017); `gg`: grow where the rate would decay; `abs`, `absa`: grow when the top Hessian
    eigenvalue falls, without and with adversarial samples (Yao et al. 2018); `warmup`: follow `stages`.
    Decay epochs are those of `optimizer` with `lr_schedule: step`; other schedules multiply the
    policy's rate."""
    max_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Largest batch; required by every policy except `constant`."""
    warmup_epochs: Annotated[float, Field(ge=0)] = 5
    """Epochs in which `fb` raises the rate from lr to lr·B/b0."""
    stages: tuple[tuple[float, int], ...] = ()
    """Stages of `warmup` as (first epoch, batch size)."""
    growth: Annotated[float, Field(gt=1)] = 2.0
    """Growth factor β of the batch in `abs` and `absa`."""
    eigenvalue_ratio: Annotated[float, Field(gt=1)] = 2.0
    """Grow when the eigenvalue has fallen by this factor α."""
    patience_epochs: Annotated[int, Field(ge=1)] = 10
    """Grow after κ epochs at the latest."""
    eigenvalue: Literal["power", "last_layer", "kfac"] = "power"
    """Source of the eigenvalue: power iteration on the Hessian or on its last layer's block, or the
    largest max(d_A)·max(d_G) of the Kronecker factors, which costs nothing."""
    report_both: bool = False
    """With `eigenvalue: kfac`, also measure the Hessian's eigenvalue and log the correlation."""
    hessian_samples: Annotated[int, Field(ge=1)] = 128
    """Training samples, without augmentation, over which the Hessian is taken; always the same ones."""
    samples_per_worker: Annotated[int, Field(ge=1)] | None = None
    """Samples of a batch per requested worker with `elastic.batch_policy: abs`; null means
    b0 / elastic.min_workers."""
