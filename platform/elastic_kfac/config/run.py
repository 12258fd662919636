"""The whole configuration of a run: frozen sections, validated at construction."""

from __future__ import annotations

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
from elastic_kfac.config.kfac import KfacConfig, ShardedConfig
from elastic_kfac.config.optimizer import BatchConfig, OptimizerConfig
from elastic_kfac.config.rules import conflicts, reproducible_conflicts
from elastic_kfac.config.section import Section
from elastic_kfac.config.train import ModelConfig, TrainConfig


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
