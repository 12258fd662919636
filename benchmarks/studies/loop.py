"""One run in this process, for studies that look inside it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config, parse_config
from elastic_kfac.data.dataset import open_datasets
from elastic_kfac.data.shards import make_shards
from elastic_kfac.errors import NumericalError
from elastic_kfac.training.rank import RankTrainer

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
Changes = dict[str, Any]
"""Values by `section.key`."""


def base_of(study: str, data: Path) -> dict[str, Any]:
    """The base configuration of a study beside this file; its shards are made below `data`."""
    base: dict[str, Any] = yaml.safe_load((HERE / f"{study}.yaml").read_text())["base"]
    return with_shards(base, data)


def with_shards(base: dict[str, Any], data: Path) -> dict[str, Any]:
    """The configuration with the shards of its source, made where they are missing."""
    source = base["data"]["source"]
    shards = data / source
    make_shards(source, shards)
    return {**base, "data": {**base["data"], "shards": str(shards)}}


def configured(base: dict[str, Any], changes: Changes) -> Config:
    values = {section: dict(keys) for section, keys in base.items()}
    for path, value in changes.items():
        section, key = path.split(".")
        values.setdefault(section, {})[key] = value
    return parse_config(values)


def train(
    config: Config, each_epoch: Callable[[RankTrainer], dict[str, Any]], *, until: float = math.inf
) -> dict[str, Any]:
    """Trains to the end, or to the target's metric where `until` is finite.

    Returns:
        `epochs`: a row per epoch of what `each_epoch` returns; `steps`; `step_cpu_s`: CPU seconds of all
        steps; `hessian_cpu_s`: of the ends of epochs; `end`: metrics of the last evaluation; `reached`:
        (epoch, step) of the first evaluation at `until`; `diverged`.
    """
    torch.set_num_threads(1)
    datasets, rows = open_datasets(config), []
    step_s = hessian_s = 0.0
    found: dict[str, Any] = {"reached": None, "diverged": False}
    try:
        trainer = RankTrainer(config, Communicator.solo(), datasets)
        while not trainer.finished:
            began = time.process_time()
            trainer.step()
            step_s += time.process_time() - began
            if trainer.epoch_end_is_due:
                began = time.process_time()
                trainer.end_epoch()
                hessian_s += time.process_time() - began
                rows.append(each_epoch(trainer))
            if trainer.evaluation_is_due:
                found["end"] = columns_of(trainer)
                if found["end"][trainer.metric] >= until:
                    found["reached"] = (round(trainer.fractional_epoch, 3), trainer.progress.step)
                    break
    except NumericalError:
        found["diverged"] = True
    finally:
        datasets.close()
    return {
        "epochs": rows,
        "steps": trainer.progress.step,
        "step_cpu_s": step_s,
        "hessian_cpu_s": hessian_s,
        **found,
    }


def columns_of(trainer: RankTrainer) -> dict[str, float]:
    """Metrics of an evaluation, those of attacked samples with `attacked_` before their names."""
    result = trainer.evaluate()
    attacked = {} if result.attacked is None else result.attacked.columns("attacked_")
    return {**result.all, **attacked}
