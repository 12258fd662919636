"""The whole configuration of a run, and the one table of rules between its settings."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

from pydantic import model_validator

from elastic_kfac.config.analysis import AnalysisConfig
from elastic_kfac.config.data import AdversarialConfig, DataConfig, MixingConfig
from elastic_kfac.config.elastic import (
    CommunicationConfig,
    DistNewtonConfig,
    ElasticConfig,
    PlanConfig,
    ResourcesConfig,
)
from elastic_kfac.config.kfac import KfacConfig, LevenbergMarquardt, ShardedConfig
from elastic_kfac.config.optimizer import BEHIND_KFAC, BatchConfig, OptimizerConfig
from elastic_kfac.config.section import Section
from elastic_kfac.config.tracking import TrackingConfig
from elastic_kfac.config.train import ModelConfig, TaskConfig, TrainConfig
from elastic_kfac.errors import ConfigError


class Config(Section):
    """A run."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    task: TaskConfig = TaskConfig()
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
    tracking: TrackingConfig = TrackingConfig()

    @model_validator(mode="after")
    def _momentum_behind_kfac(self) -> Config:
        """See `OptimizerConfig.momentum`."""
        optimizer, kfac = self.optimizer, self.kfac
        is_behind = optimizer.name == "sharded_kfac" or (kfac.enabled and optimizer.name == "sgd")
        is_given = "momentum" in optimizer.model_fields_set
        if is_behind and not is_given and kfac.trust_region == "adaptive" and not kfac.momentum:
            optimizer = optimizer.model_copy(update={"momentum": BEHIND_KFAC})
            optimizer.model_fields_set.discard("momentum")
            self.__dict__["optimizer"] = optimizer  # sections are frozen for others
        return self

    def to_change(self) -> dict[str, Any]:
        """The values as JSON has them, to be parsed again with others in their place: what depends on
        others and was not given is left out."""
        values = self.model_dump(mode="json")
        if "momentum" not in self.optimizer.model_fields_set:
            del values["optimizer"]["momentum"]
        return values

    @model_validator(mode="after")
    def _obeys_the_rules(self) -> Config:
        for rule in RULES:
            if rule.is_broken(self):
                # Not a ValueError, so that pydantic lets it through as it is.
                raise rule.error(self)
        return self


class Rule(NamedTuple):
    """Settings that exclude each other, and the line that refuses them."""

    text: str
    """The rule as a sentence."""
    keys: tuple[str, ...]
    """Keys that the error shows with their values."""
    is_broken: Callable[[Config], bool]
    change: str

    def error(self, config: Config) -> ConfigError:
        """The refusal of a configuration that breaks the rule."""
        given = ", ".join(f"{key}={shown(_value(config, key))}" for key in self.keys)
        return ConfigError(self.text, given=given, change=self.change)


def shown(value: object) -> str:
    """A value as YAML writes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shown(each)}' for key, each in value.items())}}}"
    return str(value)


# Mode -> what it needs. A condition is KEY=VALUE|VALUE, KEY!=VALUE, KEY>NUMBER, or KEY alone: it is set.
_EXCHANGES = "communication.algorithm=native communication.wire_format=fp32"
_LOCAL = (
    "kfac.enabled=false optimizer.name!=sharded_kfac train.precision=fp32|bf16 "
    f"train.sync_batch_norm=false {_EXCHANGES}"
)
_NEEDS = {
    "train.sync_batch_norm_group": "train.sync_batch_norm=true",
    "optimizer.nesterov=true": "optimizer.momentum>0 optimizer.name=sgd|sharded_kfac",
    "optimizer.momentum_rule!=constant": (
        "optimizer.name=velocity_sgd|sharded_kfac sharded.gather=weights batch.policy=constant "
        "elastic.batch_policy=keep_global|abs"
    ),
    "optimizer.name=sharded_kfac": "train.precision=fp32|bf16",
    "communication.algorithm!=native": "communication.wire_format=fp32",
    "elastic.batch_policy=abs": "batch.policy=gg|abs|absa|warmup",
    "batch.policy!=constant": "batch.max_batch_size elastic.batch_policy=keep_global|abs",
    "batch.policy=gg": "optimizer.lr_schedule=step optimizer.decay_epochs",
    "batch.policy=fb": "optimizer.warmup_epochs=0",  # it has batch.warmup_epochs
    "batch.policy=abs": "adversarial.attack=none",
    "plan.decomposers>0": "kfac.enabled=true kfac.stagger=true",
    "plan.unequal_shares=true": "plan.calibrate=true kfac.enabled=true",
    "elastic.rebalance=true": (
        "elastic.slow_factor elastic.merge=average elastic.merge_every_steps=1 mixing.mixup=none"
    ),
    "plan.retune=true": "kfac.enabled=true kfac.refresh=fixed elastic.reproducible=false",
    "kfac.momentum>0": "optimizer.momentum=0",
    # There statistics travel with the gradients, which the step itself needs.
    "kfac.overlap_reduction=true": "elastic.reproducible=false optimizer.name!=sharded_kfac",
    "batch.eigenvalue=kfac": "kfac.method!=one_sided",
    "batch.policy=absa": "adversarial.attack!=none adversarial.fraction>0",
    "task.name!=classification": "train.loss=cross_entropy train.label_smoothing=0 mixing.mixup=none",
    "adversarial.attack=fgsm": "adversarial.steps=1",
    "adversarial.eval_attack=fgsm": "adversarial.eval_steps=1",
    # No rank has the whole gradient, or the weights of all ranks, at every step.
    "optimizer.clip_grad_norm": (
        "elastic.merge_every_steps=1 elastic.merge=average optimizer.name!=sharded_kfac"
    ),
    "optimizer.average_decay": (
        "elastic.merge_every_steps=1 elastic.merge=average optimizer.name!=sharded_kfac"
    ),
    # Workers that take local steps exchange nothing in between.
    "elastic.merge=distnewton": _LOCAL,
    "elastic.merge_every_steps>1": _LOCAL,
    # With other values the bits depend on the number of workers.
    "elastic.reproducible=true": (
        f"optimizer.name!=sharded_kfac {_EXCHANGES} elastic.batch_policy=keep_global|abs "
        "elastic.merge=average elastic.merge_every_steps=1 batch.policy=constant|bl|fb|gg|warmup "
        "adversarial.attack=none mixing.mixup=none train.sync_batch_norm=false"
    ),
}


class _Condition(NamedTuple):
    """A condition of the table above."""

    key: str
    sign: str
    values: list[str]

    @classmethod
    def parse(cls, text: str) -> _Condition:
        key, sign, values = re.fullmatch(r"([\w.]+)(!=|=|>|)(.*)", text).groups()  # type: ignore[union-attr]
        return cls(key, sign, values.split("|"))

    def text(self) -> str:
        *most, last = self.values
        values = f"{', '.join(most)} or {last}" if most else last
        return self.key + {"=": "=", "!=": " other than ", ">": " > ", "": ""}[self.sign] + values

    def holds(self, config: Config) -> bool:
        value = _value(config, self.key)
        if self.sign == ">":
            return float(value) > float(self.values[0])
        if self.sign:
            return (shown(value) in self.values) == (self.sign == "=")
        return value not in (None, ())


def _needs(mode: _Condition, need: _Condition) -> Rule:
    return Rule(
        f"{mode.text()} needs {need.text()}",
        (mode.key, need.key),
        lambda config: mode.holds(config) and not need.holds(config),
        f"change {need.key} or {mode.key}",
    )


def _value(config: Config, path: str) -> Any:
    section, key = path.split(".")
    return getattr(getattr(config, section), key)


def _largest_shard(config: Config) -> int:
    return -(-config.train.global_batch_size // config.elastic.logical_shards)


def _has_no_time_between(config: Config) -> bool:
    factor_steps, inverse_steps = config.kfac.factor_update_steps, config.kfac.inverse_update_steps
    if not config.plan.decomposers or not (
        isinstance(factor_steps, int) and isinstance(inverse_steps, int)
    ):
        return False
    return factor_steps == 1 or bool(inverse_steps % factor_steps)


def _stages_fall(config: Config) -> bool:
    epochs = [epoch for epoch, _ in config.batch.stages]
    sizes = [config.train.global_batch_size, *(size for _, size in config.batch.stages)]
    cap = config.batch.max_batch_size or 0
    ordered = epochs == sorted(epochs) and sizes == sorted(sizes)
    return config.batch.policy == "warmup" and not (epochs and ordered and sizes[-1] <= cap)


def _leaves_the_data(config: Config) -> bool:
    attacks = config.adversarial
    if attacks.data_range is None:
        return False
    low, high = attacks.data_range
    radii = ((attacks.attack, attacks.radius), (attacks.eval_attack, attacks.evaluation_radius))
    return any(kind in ("fgsm", "pgd") and radius > high - low for kind, radius in radii)


_ORDER = (
    Rule(
        "plan.decomposers needs statistics in some steps only, and decompositions in some of those: "
        "kfac.factor_update_steps of 2 or more that divides kfac.inverse_update_steps",
        ("plan.decomposers", "kfac.factor_update_steps", "kfac.inverse_update_steps"),
        _has_no_time_between,
        "raise kfac.factor_update_steps, or set plan.decomposers=0",
    ),
    Rule(
        "train.target_accuracy is short for train.target",
        ("train.target_accuracy", "train.target"),
        lambda c: c.train.target is not None and c.train.target_accuracy is not None,
        "leave one of them out",
    ),
    Rule(
        "train.micro_batch_size must be at most train.global_batch_size",
        ("train.micro_batch_size", "train.global_batch_size"),
        lambda c: (c.train.micro_batch_size or 0) > c.train.global_batch_size,
        "lower train.micro_batch_size",
    ),
    Rule(
        "kfac.damping with rule: levenberg_marquardt compares a step with the whole gradient",
        ("optimizer.clip_grad_norm",),
        lambda c: (
            c.optimizer.clip_grad_norm is not None
            and c.kfac.enabled
            and isinstance(c.kfac.damping, LevenbergMarquardt)
        ),
        "drop optimizer.clip_grad_norm or set kfac.damping to a number",
    ),
    Rule(
        "elastic.min_workers must be at most elastic.max_workers",
        ("elastic.min_workers", "elastic.max_workers"),
        lambda c: c.elastic.min_workers > c.elastic.max_workers,
        "raise elastic.max_workers or lower elastic.min_workers",
    ),
    Rule(
        "elastic.logical_shards must be a power of two",
        ("elastic.logical_shards",),
        lambda c: c.elastic.logical_shards.bit_count() != 1,
        "set elastic.logical_shards to 1, 2, 4, 8, ... 1024",
    ),
    Rule(
        "elastic.reproducible=true needs elastic.max_workers of at most elastic.logical_shards",
        ("elastic.max_workers", "elastic.logical_shards"),
        lambda c: c.elastic.reproducible and c.elastic.max_workers > c.elastic.logical_shards,
        "raise elastic.logical_shards, or the other workers would idle",
    ),
    Rule(
        "elastic.reproducible=true needs train.micro_batch_size of a whole logical shard "
        "(train.global_batch_size / elastic.logical_shards, rounded up)",
        ("train.micro_batch_size", "train.global_batch_size", "elastic.logical_shards"),
        lambda c: (
            c.elastic.reproducible
            and c.train.micro_batch_size is not None
            and c.train.micro_batch_size < _largest_shard(c)
        ),
        "raise train.micro_batch_size or elastic.logical_shards",
    ),
    Rule(
        "optimizer.decay_start_epoch must be before optimizer.decay_end_epoch (null: train.epochs)",
        ("optimizer.decay_start_epoch", "optimizer.decay_end_epoch", "train.epochs"),
        lambda c: (
            (c.optimizer.lr_schedule == "polynomial" or c.optimizer.decay_end_epoch is not None)
            and c.optimizer.decay_start_epoch >= (c.optimizer.decay_end_epoch or c.train.epochs)
        ),
        "lower optimizer.decay_start_epoch or raise the end",
    ),
    Rule(
        "batch.max_batch_size must be at least train.global_batch_size",
        ("batch.max_batch_size", "train.global_batch_size"),
        lambda c: (
            c.batch.policy != "constant"
            and (c.batch.max_batch_size or 0) < c.train.global_batch_size
        ),
        "raise batch.max_batch_size",
    ),
    Rule(
        "batch.policy=warmup needs batch.stages with ascending epochs and batch sizes that never "
        "fall, from train.global_batch_size to at most batch.max_batch_size",
        ("batch.stages", "train.global_batch_size", "batch.max_batch_size"),
        _stages_fall,
        "list at least one stage as [first epoch, batch size]",
    ),
    Rule(
        "batch.growth must enlarge a batch of train.global_batch_size by at least one sample",
        ("batch.growth", "train.global_batch_size"),
        lambda c: (
            c.batch.policy in ("abs", "absa")
            and int(c.train.global_batch_size * c.batch.growth) == c.train.global_batch_size
        ),
        "raise batch.growth",
    ),
    Rule(
        "batch.eigenvalue=kfac needs kfac.enabled=true and optimizer.name other than sharded_kfac",
        ("batch.eigenvalue", "kfac.enabled", "optimizer.name"),
        lambda c: (
            c.batch.policy in ("abs", "absa")
            and c.batch.eigenvalue == "kfac"
            and not (c.kfac.enabled and c.optimizer.name != "sharded_kfac")
        ),
        "set batch.eigenvalue=last_layer",
    ),
    Rule(
        "adversarial.data_range must be [low, high] with low < high",
        ("adversarial.data_range",),
        lambda c: (r := c.adversarial.data_range) is not None and r[0] >= r[1],
        "swap the two, or set null for the range of pixels",
    ),
    Rule(
        "the radius of fgsm and pgd must be at most the width of adversarial.data_range",
        ("adversarial.radius", "adversarial.eval_radius", "adversarial.data_range"),
        _leaves_the_data,
        "lower the radius",
    ),
    Rule(
        "GPU in resources.per_worker needs resources.use_gpu=true",
        ("resources.per_worker", "resources.use_gpu"),
        lambda c: "GPU" in c.resources.per_worker and not c.resources.use_gpu,
        "set resources.use_gpu=true",
    ),
)

RULES: tuple[Rule, ...] = (
    *(
        _needs(_Condition.parse(mode), _Condition.parse(need))
        for mode, needs in _NEEDS.items()
        for need in needs.split()
    ),
    *_ORDER,
)
