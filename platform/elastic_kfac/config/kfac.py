"""K-FAC and its sharded pipeline."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from elastic_kfac.config.section import Section


class KfacConfig(Section):
    """The preconditioner; see `elastic_kfac.KFAC` for what each value does and where it fails."""

    enabled: bool = True
    method: Literal["eigen", "inverse"] = "eigen"
    damping: Annotated[float, Field(gt=0)] = 1e-3
    factor_decay: Annotated[float, Field(ge=0, lt=1)] = 0.95
    ema_init: Literal["first", "identity"] = "first"
    factor_update_steps: Annotated[int, Field(ge=1)] = 1
    inverse_update_steps: Annotated[int, Field(ge=1)] = 10
    stagger: bool = False
    """Spread the decompositions of different layers over the steps of an inverse interval."""
    kl_clip: Annotated[float, Field(gt=0)] | None = 1e-3
    grad_worker_frac: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] = 1.0
    inverse_damping: Literal["pi", "sqrt", "plain"] = "pi"
    factor_scale: Literal["per_sample", "sc20", "kaisa"] = "per_sample"
    fisher: Literal["empirical", "1mc"] = "empirical"
    bn_fisher: Literal["unit", "full", "diag"] = "unit"
    bn_damping_multiplier: Annotated[float, Field(gt=0)] = 1.0
    weight_sharing: Literal["expand", "reduce"] = "expand"
    skip_layers: tuple[str, ...] = ()
    """Regular expressions; a layer whose name matches one keeps its plain gradient."""
    precompute: bool = False
    symmetry_aware: bool = True
    colocate: bool = True
    bucket_mib: Annotated[float, Field(gt=0)] = 25.0


class ShardedConfig(Section):
    """Osawa's pipeline (`optimizer.name: sharded_kfac`)."""

    gather: Literal["weights", "gradients"] = "weights"
    """Owners update and send weights, or send preconditioned gradients to a replicated SGD."""
    v_method: Literal["per_owner", "padded", "fused"] = "per_owner"
    """How reduce-scatter and all-gather of unequal parts run: fewest bytes, fewest unequal calls, or two
    all-reduces as the authors of the method ran it."""
    wire: Literal["fp32", "fp16", "bf16"] = "fp32"
    refresh: Literal["fixed", "adaptive"] = "fixed"
    """Statistics every `kfac.factor_update_steps`, or by how much each of them changes."""
    refresh_threshold: Annotated[float, Field(gt=0)] = 0.1
