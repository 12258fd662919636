"""Samples: where they come from, and how they are mixed and attacked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from elastic_kfac.config.section import Section


class DataConfig(Section):
    """Where samples come from and how they are read."""

    shards: str = "data/digits"
    """Root URI of the shards (folder, s3:// or gs://) with one shard set per split. Every node must be
    able to read it."""
    source: str | None = None
    """Source from which `train` writes the shards if there are none (`digits`, `parquet:PATH`,
    `imagefolder:PATH`, `ilsvrc:DIR`, `torchvision:NAME`, `text:PATH`, `table:PATH?targets=NAME`,
    `masks:DIR`, `coco:PATH`, `python:package.module:factory`); null requires existing shards."""
    train_split: str = "train"
    """Split to train on."""
    eval_split: str = "test"
    """Split to evaluate on."""
    augment: Literal["none", "crop_flip", "random_resized_crop"] = "none"
    """Augmentation of training images: shift and flip (small images), or crop to a random box and flip
    (photographs). The result depends on the seed, epoch and sample only, never on the workers."""
    image_size: Annotated[int, Field(ge=1)] | None = None
    """Height and width in pixels to which encoded images are resized; null keeps the stored size."""
    decode_threads: Annotated[int, Field(ge=0)] = 1
    """Threads per worker that decode images; more than 1 helps with encoded images only."""
    prefetch_batches: Annotated[int, Field(ge=0)] = 2
    """Batches to read ahead of training; 0 reads each batch when it is needed."""
    bad_records: Literal["raise", "skip"] = "raise"
    """What to do with an image that cannot be decoded: stop the run, or give it weight 0."""
    max_image_pixels: Annotated[int, Field(ge=1)] = 178_956_970
    """Limit of height × width of one encoded image; a larger one is a bad record."""
    cache_dir: str | None = None
    """Folder on each node that caches remote shards; null uses a folder in the user's cache."""
    cache_gib: Annotated[float, Field(gt=0)] = 32.0
    """Size limit of the cache on each node, in GiB."""


class MixingConfig(Section):
    """Mixup and random erasing of training images."""

    mixup: Literal["none", "batch", "running"] = "none"
    """Mix each batch with this rank's previous batch: as it was read (`batch`), or as it was mixed
    (`running`; Osawa et al. 2019). The result depends on the number of workers."""
    alpha: Annotated[float, Field(gt=0, le=1)] = 0.4
    """α of the mixing weight λ ~ Beta(α, α); larger values mix more strongly."""
    on_smaller: Literal["reset", "subsample"] = "reset"
    """What to mix with a batch smaller than the previous one: nothing, or a part of the previous one."""
    erasing: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Probability that a box of 2 to 25 % of an image is set to zero (Zhong et al. 2020); the
    large-batch recipe uses 0.5."""


class AdversarialConfig(Section):
    """Attacks on training samples (robust training, ABSA) and in evaluations."""

    attack: Literal["none", "fgsm", "pgd", "l2"] = "none"
    """Attack on training samples: one signed step, projected signed steps, or steps along the
    normalised gradient."""
    radius: Annotated[float, Field(ge=0)] = 0.005
    """Size ε of the perturbation in units of the model's inputs (after normalisation)."""
    steps: Annotated[int, Field(ge=1)] = 1
    """Steps of `pgd` and `l2`."""
    step_size: Annotated[float, Field(gt=0)] | None = None
    """Size of one step; null means ε for one step and 2.5·ε/steps for several."""
    random_start: bool = False
    """Start at a random point of the ε-ball instead of the sample."""
    fraction: Annotated[float, Field(ge=0, le=1)] = 0.2
    """Share γ of each logical micro-batch to attack; 1 is robust optimisation. `absa` starts from it."""
    decay: Annotated[float, Field(gt=1)] = 2.0
    """Divisor ω of γ at each growth of the batch (`absa` only)."""
    stop_epoch: Annotated[float, Field(ge=0)] | None = None
    """Epoch from which no sample is attacked; null means half of the epochs for `absa`, else never."""
    data_range: tuple[float, float] | None = None
    """Smallest and largest input, to which attacked samples are clamped; null takes the range of pixels
    and leaves other features unclamped."""
    eval_attack: Literal["none", "fgsm", "pgd", "l2"] = "none"
    """Attack of every evaluation, which then also reports adversarial loss and accuracy."""
    eval_radius: Annotated[float, Field(ge=0)] | None = None
    """ε of evaluations; null means `radius`."""
    eval_steps: Annotated[int, Field(ge=1)] = 1
    """Steps of `eval_attack`."""

    @property
    def evaluation_radius(self) -> float:
        """ε of evaluations."""
        return self.radius if self.eval_radius is None else self.eval_radius
