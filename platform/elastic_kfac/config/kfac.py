"""K-FAC and its sharded variant."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from elastic_kfac.config.section import Section


class KfacConfig(Section):
    """The preconditioner (Martens and Grosse 2015)."""

    enabled: bool = True
    """Precondition gradients with K-FAC."""
    method: Literal["eigen", "inverse"] = "eigen"
    """`eigen` applies (A ⊗ G + γI)⁻¹ exactly; `inverse` inverts damped factors, which is cheaper."""
    damping: Annotated[float, Field(gt=0)] = 1e-3
    """Tikhonov damping γ, on the scale of squared per-sample gradients. Too small amplifies noise in
    flat directions; too large turns K-FAC into plain gradient descent."""
    factor_decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Weight of the old factor in the moving average."""
    ema_init: Literal["first", "identity"] = "first"
    """Start of the moving average: the first statistic, or the identity."""
    factor_update_steps: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps between factor updates."""
    inverse_update_steps: Annotated[int, Field(ge=1)] = 10
    """Optimizer steps between decompositions; a multiple of `factor_update_steps`."""
    stagger: bool = False
    """Spread the decompositions of the layers over the steps of an interval."""
    kl_clip: Annotated[float, Field(gt=0)] | None = 1e-3
    """Bound on the approximate KL divergence of a step; null means no bound."""
    grad_worker_frac: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = 1.0
    """Share of workers that precondition a layer: 1/N saves memory (MEM-OPT), 1 saves communication
    (COMM-OPT); `auto` lets the planner choose."""
    inverse_damping: Literal["pi", "sqrt", "plain"] = "pi"
    """How `inverse` splits γ between A and G: by their mean eigenvalues, as √γ each, or γ on both."""
    factor_scale: Literal["per_sample", "sc20", "kaisa"] = "per_sample"
    """Scale of the factors; the others reproduce published code."""
    fisher: Literal["empirical", "1mc"] = "empirical"
    """Gradients that make G: those of the loss, or those of labels sampled from the model, which costs
    a second backward pass."""
    bn_fisher: Literal["unit", "full", "diag"] = "unit"
    """Curvature of normalisation layers: 2×2 per channel, one full matrix, or its diagonal."""
    bn_damping_multiplier: Annotated[float, Field(gt=0)] = 1.0
    """Factor on γ for BatchNorm layers."""
    weight_sharing: Literal["expand", "reduce"] = "expand"
    """Positions of a linear layer's input (sequence, image): independent samples, or averaged first
    (Eschenhagen et al. 2023)."""
    skip_layers: tuple[str, ...] = ()
    """Regular expressions; layers whose names match keep their unpreconditioned gradient."""
    precompute: bool = False
    """Cache 1/(d_G·d_Aᵀ + γ) with each decomposition (`eigen` only): less computation, more memory."""
    symmetry_aware: bool = True
    """Send only the triangle of symmetric matrices."""
    colocate: bool = True
    """Decompose both factors of a layer on the same worker."""
    bucket_mib: Annotated[float, Field(gt=0)] = 25.0
    """Size in MiB of the buckets in which factors are sent."""


class ShardedConfig(Section):
    """Sharded K-FAC (`optimizer.name: sharded_kfac`; Osawa et al. 2019)."""

    gather: Literal["weights", "gradients"] = "weights"
    """Owners update and send weights, or send preconditioned gradients to a replicated optimizer."""
    v_method: Literal["per_owner", "padded", "fused"] = "per_owner"
    """How parts of unequal size are reduced and gathered: one call per owner (fewest bytes), padded to
    equal parts (fewest calls), or by two all-reduces as in the authors' code."""
    wire: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type in which statistics, gradients and weights are sent."""
    refresh: Literal["fixed", "adaptive"] = "fixed"
    """Update statistics every `kfac.factor_update_steps`, or more rarely while they hardly change."""
    refresh_threshold: Annotated[float, Field(gt=0)] = 0.1
    """Relative change below which `adaptive` waits longer."""
