"""The whole configuration of a run: frozen models, validated at construction.

One section per room; the help text of a field stands under the field. Precedence: default < file <
`--set section.key=value` < Tune. Names outsiders rely on are listed in the README.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from elastic_kfac.config_sections import (
    AdversarialConfig,
    AnalysisConfig,
    BatchConfig,
    DistNewtonConfig,
    MixingConfig,
    OptimizerConfig,
    Section,
    conflicts,
    reproducible_conflicts,
)
from elastic_kfac.errors import ConfigError

__all__ = [
    "AdversarialConfig",
    "AnalysisConfig",
    "BatchConfig",
    "CommunicationConfig",
    "Config",
    "DataConfig",
    "DistNewtonConfig",
    "ElasticConfig",
    "KfacConfig",
    "MixingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "PlanConfig",
    "ResourcesConfig",
    "Section",
    "ShardedConfig",
    "TrainConfig",
    "apply_overrides",
    "parse_config",
]


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


class ModelConfig(Section):
    """Which network."""

    name: str = "small_cnn"
    """A name of the zoo (`elastic-kfac doctor` lists them) or `package.module:factory`."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Keyword arguments of the factory."""
    initial_weights: str | None = None
    """A safetensors file whose weights the run starts from."""


class TrainConfig(Section):
    """The loop: how long, how large, how precise."""

    epochs: Annotated[float, Field(gt=0)] = 10
    global_batch_size: Annotated[int, Field(ge=1)] = 128
    """Samples per optimizer step over all ranks (the true count; the last batch is smaller)."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Upper bound per rank and pass; None means one pass per step."""
    seed: Annotated[int, Field(ge=0)] = 0
    target_accuracy: Annotated[float, Field(gt=0, le=1)] | None = None
    stop_at_target: bool = False
    eval_every_epochs: Annotated[float, Field(gt=0)] = 1
    eval_batch_size: Annotated[int, Field(ge=1)] = 512
    log_every_steps: Annotated[int, Field(ge=1)] = 1
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    activation_checkpointing: bool = False
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    backend: Literal["auto", "nccl", "gloo"] = "auto"
    torch_threads: Annotated[int, Field(ge=1)] = 1
    """Intra-op threads per worker (CPU)."""
    sync_batch_norm: bool = False
    """Normalise over the samples of a group of ranks instead of over one rank's pass."""
    sync_batch_norm_group: Annotated[int, Field(ge=1)] | None = None
    """Consecutive ranks that normalise together; None is all of them."""
    loss: str = "cross_entropy"
    """`cross_entropy`, `mse`, or `package.module:factory`."""


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


class CommunicationConfig(Section):
    """How gradients travel (not with `optimizer.name: sharded_kfac`, which has its own way)."""

    algorithm: Literal["native", "ring", "rabenseifner", "hierarchical"] = "native"
    wire_format: Literal["fp32", "bf16", "fp16", "int8", "topk"] = "fp32"
    topk_ratio: Annotated[float, Field(gt=0, le=1)] = 0.01
    error_feedback: bool | None = None
    """Carry what an encoding lost into the next step; None means for int8 and topk."""


class ElasticConfig(Section):
    """How the run follows a cluster that grows and shrinks."""

    min_workers: Annotated[int, Field(ge=1)] = 1
    max_workers: Annotated[int, Field(ge=1)] = 2
    batch_policy: Literal["keep_global", "keep_local", "abs"] = "keep_global"
    """What a resize does to the batch: nothing, or scale it with the workers; with `abs` the batch
    does not follow the workers, but its growth (`batch.policy`) asks for more of them."""
    merge: Literal["average", "distnewton"] = "average"
    """How ranks that stepped apart come together: by averaging, or by a quasi-Newton step."""
    merge_every_steps: Annotated[int, Field(ge=1)] = 1
    """Steps that ranks take apart, each on its own share; 1 with `average` sums gradients instead."""
    snapshot_interval_s: Annotated[float, Field(gt=0)] = 2.0
    """At most this much stepping time is redone after an unplanned loss; more where a snapshot takes
    over 2 % of the CPU time of the steps between two of them."""
    checkpoint_interval_s: Annotated[float, Field(gt=0)] = 60.0
    """Between durable checkpoints while snapshots go to vaults; parking and the end always save one."""
    keep_checkpoints: Annotated[int, Field(ge=2)] = 3
    resize_poll_s: Annotated[float, Field(gt=0)] = 1.0
    """How often Ray Train looks for capacity to grow into."""
    in_place: bool = False
    """Survivors of a loss keep their processes and step on while the lost ranks are replaced."""
    in_place_wait_s: Annotated[float, Field(gt=0)] = 30.0
    """How long they go on without a place for the lost ranks before the group is started again."""
    reproducible: bool = False
    """Every bit of the final state is the same for any number of workers, resizes and kills."""
    logical_shards: Annotated[int, Field(ge=1, le=1024)] = 8
    """Fixed parts of every batch in the reproducible mode, a power of two; fewer are faster."""

    @model_validator(mode="after")
    def _ordered(self) -> ElasticConfig:
        if self.min_workers > self.max_workers:
            raise ValueError(
                f"min_workers={self.min_workers} is above max_workers={self.max_workers}"
            )
        return self

    @model_validator(mode="after")
    def _shards_are_enough(self) -> ElasticConfig:
        if self.logical_shards & (self.logical_shards - 1):
            raise ValueError(f"logical_shards={self.logical_shards} is not a power of two")
        if self.reproducible and self.max_workers > self.logical_shards:
            raise ValueError(
                f"max_workers={self.max_workers} is above logical_shards={self.logical_shards}, "
                "so that workers would have nothing to do"
            )
        return self


class PlanConfig(Section):
    """What the planner may change."""

    memory_budget_gib: Annotated[float, Field(gt=0)] | None = None
    calibrate: bool = False
    """Measure decompositions on rank 0 at every start (about a second) instead of taking stored costs."""
    retune: bool = False
    """Allow a resize to change intervals and damping (with an event)."""


class ResourcesConfig(Section):
    """What each worker asks of Ray."""

    use_gpu: bool = False
    per_worker: dict[str, Annotated[float, Field(gt=0)]] = Field(
        default_factory=lambda: {"CPU": 1.0}
    )

    @model_validator(mode="after")
    def _gpus_are_wanted(self) -> ResourcesConfig:
        if "GPU" in self.per_worker and not self.use_gpu:
            raise ValueError(
                "per_worker names GPU, but use_gpu is false; set resources.use_gpu=true"
            )
        return self

    def of_a_worker(self) -> dict[str, float]:
        """Every resource of one worker: `use_gpu` alone means one GPU."""
        return {**({"GPU": 1.0} if self.use_gpu else {}), **self.per_worker}


class Config(Section):
    """A run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    batch: BatchConfig = BatchConfig()
    adversarial: AdversarialConfig = AdversarialConfig()
    mixing: MixingConfig = MixingConfig()
    kfac: KfacConfig = KfacConfig()
    sharded: ShardedConfig = ShardedConfig()
    communication: CommunicationConfig = CommunicationConfig()
    elastic: ElasticConfig = ElasticConfig()
    distnewton: DistNewtonConfig = DistNewtonConfig()
    plan: PlanConfig = PlanConfig()
    analysis: AnalysisConfig = AnalysisConfig()
    resources: ResourcesConfig = ResourcesConfig()

    @model_validator(mode="after")
    def _consistent(self) -> Config:
        micro = self.train.micro_batch_size
        if micro is not None and micro > self.train.global_batch_size:
            raise ValueError(
                f"train.micro_batch_size={micro} is above "
                f"train.global_batch_size={self.train.global_batch_size}"
            )
        if self.communication.algorithm != "native" and self.communication.wire_format != "fp32":
            raise ValueError(
                f"communication.algorithm={self.communication.algorithm} sends fp32 only; "
                f"set communication.wire_format=fp32 or communication.algorithm=native"
            )
        if self.optimizer.name == "sharded_kfac":
            if self.train.precision == "fp16":
                raise ValueError("optimizer.name=sharded_kfac runs in fp32 or bf16, not in fp16")
            if self.kfac.fisher != "empirical":
                raise ValueError("optimizer.name=sharded_kfac uses kfac.fisher=empirical")
        for problem in conflicts(self):
            raise ValueError(problem)
        return self

    @model_validator(mode="after")
    def _can_be_reproducible(self) -> Config:
        if not self.elastic.reproducible:
            return self
        largest_shard = -(-self.train.global_batch_size // self.elastic.logical_shards)
        micro = self.train.micro_batch_size
        obstacles = {
            "optimizer.name=sharded_kfac": self.optimizer.name == "sharded_kfac",
            f"communication.wire_format={self.communication.wire_format}": (
                self.communication.wire_format != "fp32"
            ),
            f"communication.algorithm={self.communication.algorithm}": (
                self.communication.algorithm != "native"
            ),
            f"elastic.batch_policy={self.elastic.batch_policy}": (
                self.elastic.batch_policy == "keep_local"
            ),
            "plan.retune=true": self.plan.retune,
            f"train.micro_batch_size={micro} (a shard has {largest_shard} samples)": (
                micro is not None and micro < largest_shard
            ),
            **dict.fromkeys(reproducible_conflicts(self), True),
        }
        for setting, is_in_the_way in obstacles.items():
            if is_in_the_way:
                raise ValueError(f"elastic.reproducible=true does not go with {setting}")
        return self


def parse_config(values: Mapping[str, Any]) -> Config:
    """Validates a mapping.

    Raises:
        ConfigError: With the first offending field, its value, and what is allowed.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _readable(error) from None


def apply_overrides(
    values: Mapping[str, Any], overrides: Sequence[tuple[str, Any]]
) -> dict[str, Any]:
    """Returns `values` with `section.key` paths replaced; unknown paths are refused by validation.

    Raises:
        ConfigError: If a path has no section or runs through something that is not a section.
    """
    result = {
        key: dict(part) if isinstance(part, Mapping) else part for key, part in values.items()
    }
    for path, value in overrides:
        *sections, key = path.split(".")
        if not sections or not key:
            raise ConfigError(
                "--set needs section.key=value", given=path, allowed="for example kfac.damping=1e-3"
            )
        node = result
        for section in sections:
            child = node.setdefault(section, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{section} is not a section", given=path)
            node = child
        node[key] = value
    return result


def _readable(error: ValidationError) -> ConfigError:
    # Unknown keys first: a misspelt key often makes others look missing.
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    problem = problems[0]
    # Pydantic appends the branch of a union to the location; people know section.key only.
    path = ".".join(str(part) for part in problem["loc"][:2])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 and _distinct(problems) else ""
    if problem["type"] == "extra_forbidden":
        allowed = _known_keys(problem["loc"])
        key = str(problem["loc"][-1])
        close = difflib.get_close_matches(key, allowed, n=1)
        return ConfigError(
            f"unknown configuration key {path}{more}",
            allowed=", ".join(allowed),
            change=f"did you mean {close[0]}?" if close else "remove it or correct its name",
        )
    given = problem["input"]
    unions = [p for p in problems if p["input"] == given and p["loc"][:2] == problem["loc"][:2]]
    allowed_text = " or ".join(dict.fromkeys(_message(p) for p in unions))
    return ConfigError(
        f"bad value for {path or 'the configuration'}{more}",
        given=None if isinstance(given, dict) and len(problem["loc"]) < 2 else repr(given),
        allowed=allowed_text,
    )


def _message(problem: Any) -> str:
    text = str(problem["msg"])
    if problem["type"] == "value_error":
        return "consistent values (" + text.removeprefix("Value error, ") + ")"
    return text.removeprefix("Input should be ")


def _distinct(problems: Sequence[Any]) -> bool:
    return len({p["loc"][:2] for p in problems}) > 1


def _known_keys(location: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            return []
        if not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return sorted(model.model_fields)
