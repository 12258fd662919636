"""Analyses of a run's checkpoints, in this process, without training."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch

from elastic_kfac.analysis.hessian_report import analyse
from elastic_kfac.analysis.landscape import bias_variance
from elastic_kfac.analysis.low_rank_probe import probe
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import AnalysisConfig
from elastic_kfac.data.dataset import Datasets
from elastic_kfac.errors import UsageError
from elastic_kfac.runs.checkpoints import Restored, restored
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.tasks.losses import make_task

FOLDER = "analysis"
"""Folder of the results below a run's folder."""


def analyse_run(
    folder: RunFolder,
    request: AnalysisConfig,
    *,
    split: str | None = None,
    step: int | None = None,
    epoch: float | None = None,
    device: torch.device | None = None,
    datasets: Datasets | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Analyses a checkpoint and writes `analysis/step-<step>-<split>.json` into the run's folder.

    Args:
        split: Split to analyse; None is the training split. The landscape always shows both.
        say: Called with one line before the analysis starts.

    Returns:
        The written result; `file` is its name.

    Raises:
        UsageError: If there is no such checkpoint or split.
        ConfigError: If the request does not fit into memory.
    """
    with restored(folder, step=step, epoch=epoch, device=device, datasets=datasets) as here:
        name = check_split(here, split)
        samples = here.samples(name, request)
        parameters = sum(p.numel() for p in here.model.parameters() if p.requires_grad)
        say(
            f"step {here.state.progress.step}: {samples.count:,} samples of {name}, "
            f"{parameters:,} parameters"
        )
        found = analyse(
            here.model,
            make_task(here.config.train).loss,
            samples,
            request,
            Communicator.solo(),
            landscape={split: here.samples(split, request) for split in here.datasets},
        )
        result = {"kind": "curvature", **here.where(), "split": name, **found}
        file = f"{FOLDER}/step-{here.state.progress.step:012d}-{name}.json"
    return write_result(folder, file, result)


def bias_variance_of_run(
    folder: RunFolder,
    request: AnalysisConfig,
    *,
    factor: float = 1.0,
    step: int | None = None,
    epoch: float | None = None,
    device: torch.device | None = None,
    datasets: Datasets | None = None,
) -> dict[str, Any]:
    """Loss + C·√(Var f / n) on the training split next to the loss on the evaluation split.

    Writes `analysis/bias-variance.json`.

    Args:
        factor: C.
    """
    with restored(folder, step=step, epoch=epoch, device=device, datasets=datasets) as here:
        loss = make_task(here.config.train).loss
        rows = {}
        for split in here.datasets:
            found = bias_variance(here.model, loss, here.samples(split, request))
            rows[split] = {
                "loss": found.mean,
                "variance": found.variance,
                "samples": found.count,
                "bound": found.bound(factor),
            }
        result = {"kind": "bias_variance", **here.where(), "factor": factor, "splits": rows}
    return write_result(folder, f"{FOLDER}/bias-variance.json", result)


def low_rank_of_run(
    folder: RunFolder,
    request: AnalysisConfig,
    *,
    epsilon: float = 1e-6,
    step: int | None = None,
    epoch: float | None = None,
    device: torch.device | None = None,
    datasets: Datasets | None = None,
) -> dict[str, Any]:
    """ε-ranks of a checkpoint's matrices and of a kernel matrix; writes `analysis/low-rank.json`.

    The layers see the first batch of the request.
    """
    with restored(folder, step=step, epoch=epoch, device=device, datasets=datasets) as here:
        batch = next(iter(here.samples(here.config.data.train_split, request)))
        found = probe(here.model, batch[0], epsilon=epsilon)
        result = {"kind": "low_rank", **here.where(), **found}
    return write_result(folder, f"{FOLDER}/low-rank.json", result)


def check_split(here: Restored, split: str | None) -> str:
    """`split`, or the training split if None.

    Raises:
        UsageError: If it has no such split.
    """
    name = split or here.config.data.train_split
    if name not in here.datasets:
        raise UsageError("the run has no such split", given=name, allowed=", ".join(here.datasets))
    return name


def write_result(folder: RunFolder, file: str, result: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a result as JSON into a run's folder and returns it with its `file`."""
    folder.storage.write(file, (json.dumps(result, indent=1) + "\n").encode())
    return {**result, "file": file}
