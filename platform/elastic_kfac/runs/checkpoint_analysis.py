"""Analyses of a run's checkpoints, in this process, without training.

Each writes its result as JSON into the run's folder and returns it; `file` is its name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from elastic_kfac.analysis.hessian_report import analyse
from elastic_kfac.analysis.landscape import bias_variance
from elastic_kfac.analysis.low_rank_probe import probe
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import AnalysisConfig
from elastic_kfac.errors import UsageError
from elastic_kfac.runs.checkpoints import Restored
from elastic_kfac.runs.history import ANALYSES


def analyse_checkpoint(
    here: Restored,
    request: AnalysisConfig,
    *,
    split: str | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """The loss surface; writes `analysis/step-<step>-<split>.json`.

    Args:
        split: Split to analyse; None is the training split. The landscape always shows both.
        say: Called with one line before the analysis starts.

    Raises:
        UsageError: If there is no such split.
        ConfigError: If the request does not fit into memory.
    """
    name = split or here.config.data.train_split
    if name not in here.datasets:
        raise UsageError("the run has no such split", given=name, allowed=", ".join(here.datasets))
    step, samples = here.state.progress.step, here.samples(name, request)
    parameters = sum(p.numel() for p in here.model.parameters() if p.requires_grad)
    say(f"step {step}: {samples.count:,} samples of {name}, {parameters:,} parameters")
    found = analyse(
        here.model,
        here.task.loss,
        samples,
        request,
        Communicator.solo(),
        landscape={split: here.samples(split, request) for split in here.datasets},
    )
    return _written(here, f"step-{step:012d}-{name}", "curvature", {"split": name, **found})


def measure_bias_variance(
    here: Restored, request: AnalysisConfig, *, factor: float = 1.0
) -> dict[str, Any]:
    """Loss + C·√(Var f / n) on the training split next to the loss on the evaluation split.

    Writes `analysis/bias-variance.json`; `factor` is C.
    """
    loss = here.task.loss
    rows = {}
    for split in here.datasets:
        found = bias_variance(here.model, loss, here.samples(split, request))
        rows[split] = {
            "loss": found.mean,
            "variance": found.variance,
            "samples": found.count,
            "bound": found.bound(factor),
        }
    return _written(here, "bias-variance", "bias_variance", {"factor": factor, "splits": rows})


def probe_low_rank(
    here: Restored, request: AnalysisConfig, *, epsilon: float = 1e-6
) -> dict[str, Any]:
    """ε-ranks of a checkpoint's matrices and of a kernel matrix; writes `analysis/low-rank.json`.

    The layers see the first batch of the request.
    """
    batch = next(iter(here.samples(here.config.data.train_split, request)))
    return _written(here, "low-rank", "low_rank", probe(here.model, batch[0], epsilon=epsilon))


def _written(here: Restored, name: str, kind: str, found: Mapping[str, Any]) -> dict[str, Any]:
    result, file = {"kind": kind, **here.where(), **found}, f"{ANALYSES}/{name}.json"
    here.folder.storage.write(file, (json.dumps(result, indent=1) + "\n").encode())
    return {**result, "file": file}
