"""Hessian analysis."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from elastic_kfac.config.section import Section


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
