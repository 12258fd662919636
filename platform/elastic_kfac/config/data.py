"""Samples: where they come from, how they are mixed and attacked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from elastic_kfac.config.section import Section


class DataConfig(Section):
    """Where the samples come from."""

    shards: str = "data/digits"
    """Root URI of the shard set (a folder, s3:// or gs://); it holds one shard set per split."""
    source: str | None = None
    """Where `train` makes the shards from when there are none yet (`digits`, `parquet:PATH`, …)."""
    train_split: str = "train"
    eval_split: str = "test"
    augment: Literal["none", "crop_flip", "random_resized_crop"] = "none"
    """Training-time augmentation; randomness is a function of (seed, epoch, sample id)."""
    image_size: Annotated[int, Field(ge=1)] | None = None
    """Height and width that encoded images are brought to; None keeps the stored size."""
    decode_threads: Annotated[int, Field(ge=0)] = 1
    prefetch_batches: Annotated[int, Field(ge=0)] = 2
    bad_records: Literal["raise", "skip"] = "raise"
    cache_dir: str | None = None
    """Node-local cache for remote shards; None is a folder below the user's cache directory."""
    cache_gib: Annotated[float, Field(gt=0)] = 32.0


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
