"""Hessian analysis."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from elastic_kfac.config.section import Section


class AnalysisConfig(Section):
    """Hessian analysis during training, and defaults of `elastic-kfac analyze`.

    The loss is the mean over samples without augmentation, in evaluation mode and without weight decay.
    Analysis does not change training.
    """

    every_epochs: Annotated[float, Field(gt=0)] | None = None
    """Epochs between analyses during training (and one at the end); null means none."""
    samples: Annotated[int, Field(ge=1)] | None = 512
    """Samples of the loss, always the same ones; null means the whole split."""
    top_k: Annotated[int, Field(ge=1)] = 1
    """Largest eigenvalues by magnitude to compute, of the Hessian and of the last layer's block."""
    lanczos_steps: Annotated[int, Field(ge=2)] = 100
    """Upper bound on Hessian products, and on vectors in memory, per spectrum."""
    tolerance: Annotated[float, Field(gt=0, lt=1)] = 1e-3
    """Relative residual at which an eigenvalue has converged."""
    one_samples: Annotated[int, Field(ge=0)] = 0
    """Single samples whose spectra are averaged; 0 skips them."""
    trace_draws: Annotated[int, Field(ge=0)] = 0
    """Random vectors of the trace estimate; 0 skips it."""
    density_draws: Annotated[int, Field(ge=0)] = 0
    """Random vectors of the spectral density; 0 skips it."""
    landscape_points: Annotated[int, Field(ge=0)] = 0
    """Points of the loss along the dominant eigenvector on both splits; an odd number includes the
    current weights, 0 skips it."""
    budget_s: Annotated[float, Field(gt=0)] | None = None
    """Stop after about this many seconds and list what is missing; null means no limit. With a limit
    the results depend on the machine's speed."""
    batch_size: Annotated[int, Field(ge=1)] = 128
    """Samples per worker and pass; affects memory and speed only."""
    memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Limit in GiB per worker for vectors; null means the free memory."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Seed of samples, start vectors and draws."""
