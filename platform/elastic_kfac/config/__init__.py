"""The configuration of a run: one file per family of sections, one reader.

Precedence: default < file < `--set section.key=value` < search.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
    from elastic_kfac.config.reader import (
        apply_overrides,
        parse_config,
        read_config,
        read_yaml,
        split_override,
        validate,
        write_config,
    )
    from elastic_kfac.config.run import Config
    from elastic_kfac.config.section import Section
    from elastic_kfac.config.train import ModelConfig, TaskConfig, TrainConfig
    from elastic_kfac.config.yaml_text import dump_yaml, load_yaml

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
    "TaskConfig",
    "TrainConfig",
    "apply_overrides",
    "dump_yaml",
    "load_yaml",
    "parse_config",
    "read_config",
    "read_yaml",
    "split_override",
    "validate",
    "write_config",
]

_WHERE = {
    "analysis": ("AnalysisConfig",),
    "data": (
        "AdversarialConfig",
        "DataConfig",
        "MixingConfig",
    ),
    "elastic": (
        "CommunicationConfig",
        "DistNewtonConfig",
        "ElasticConfig",
        "PlanConfig",
        "ResourcesConfig",
    ),
    "kfac": (
        "KfacConfig",
        "ShardedConfig",
    ),
    "optimizer": (
        "BatchConfig",
        "OptimizerConfig",
    ),
    "reader": (
        "apply_overrides",
        "parse_config",
        "read_config",
        "read_yaml",
        "split_override",
        "validate",
        "write_config",
    ),
    "run": ("Config",),
    "section": ("Section",),
    "train": (
        "ModelConfig",
        "TaskConfig",
        "TrainConfig",
    ),
    "yaml_text": (
        "dump_yaml",
        "load_yaml",
    ),
}
"""The names of each module, imported when they are asked for: `KFAC` needs `config.kfac` alone."""


def __getattr__(name: str) -> Any:
    for module, names in _WHERE.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
