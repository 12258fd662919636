"""Hessian analysis of a model, with the same numbers for any world size.

`analyse` answers an `AnalysisConfig`: for the training loop after an epoch, and for `analyze` on a
checkpoint. Each rank holds its shard of a fixed set of samples. The result is JSON; parts that the time
budget left out are named in `notes`.
"""

from __future__ import annotations

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from elastic_kfac.analysis.fixed_samples import FixedSamples
from elastic_kfac.analysis.hessian import Hessian, check_request, last_layer_parameters
from elastic_kfac.analysis.landscape import loss_along
from elastic_kfac.analysis.spectral_estimates import density, one_sample_eigenvalues, trace
from elastic_kfac.analysis.spectrum import Eigenpairs, spectrum, top_by_lanczos
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import AnalysisConfig, Config
from elastic_kfac.data.batch import Value
from elastic_kfac.data.dataset import Dataset, Datasets, open_split
from elastic_kfac.errors import NumericalError, UsageError
from elastic_kfac.tasks.choice import make_task
from elastic_kfac.tasks.models import create_model
from elastic_kfac.tasks.preprocessing import Preprocessor
from elastic_kfac.tasks.task import SumLoss

FORMAT = 1
_DENSITY_STEPS = 30
_MOST_HALVINGS = 8
_LAST_LAYER_SHARE, _HALF = 0.3, 0.5
"""Shares of the remaining time that a part may take; unused time is left to the next part."""


def check_fits(model: nn.Module, request: AnalysisConfig, *, free_bytes: float | None) -> int:
    """Bytes of the vectors that a request keeps at once on each worker; needs no weights.

    Args:
        model: On any device, also `meta`.
        free_bytes: Available memory, None if unknown; `request.memory_gib` overrides it.

    Raises:
        ConfigError: If they do not fit.
        UsageError: If more eigenvalues are asked for than there are parameters.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    size = sum(p.numel() for p in parameters)
    if request.top_k > size:
        raise UsageError("too many eigenvalues", given=request.top_k, allowed=f"1 to {size}")
    limit = free_bytes if request.memory_gib is None else request.memory_gib * 2**30
    steps = min(request.lanczos_steps, size)
    # The block of Lanczos vectors, the eigenvectors made from them, and three to compute with.
    return check_request(parameters, vectors=steps + request.top_k + 3, limit_bytes=limit)


def free_bytes(device: torch.device) -> float | None:
    """Memory that this process may still allocate on a device; None if unknown."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    found = []
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        found += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    except OSError:
        pass
    try:
        group = Path("/sys/fs/cgroup")
        limit = (group / "memory.max").read_text(encoding="ascii").strip()
        if limit != "max":
            found.append(int(limit) - int((group / "memory.current").read_text(encoding="ascii")))
    except (OSError, ValueError):
        pass
    if not found and hasattr(os, "sysconf"):
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return float(min(found)) if found else None


def analyse(
    model: nn.Module,
    loss_sum: SumLoss,
    samples: FixedSamples,
    request: AnalysisConfig,
    communicator: Communicator,
    *,
    landscape: Mapping[str, FixedSamples] | None = None,
) -> dict[str, Any]:
    """The requested analysis as JSON. Collective; the model is unchanged on return.

    Args:
        landscape: Samples by split whose loss is computed along the dominant eigenvector.

    Raises:
        ConfigError: If the vectors do not fit into memory.
        NumericalError: If a Hessian product is not finite.
    """
    device = next(model.parameters()).device
    problem = None
    try:
        check_fits(model, request, free_bytes=free_bytes(device))
    except UsageError as error:
        problem = error
    # One rank without memory stops all of them; otherwise the others would wait for it.
    for found in communicator.all_gather_object(problem, tag="hessian"):
        if found is not None:
            raise found
    return _Analysis(model, loss_sum, samples, request, communicator).run(landscape or {})


def analysis_row(
    model: nn.Module,
    loss_sum: SumLoss,
    preprocess: Preprocessor,
    datasets: Datasets,
    config: Config,
    communicator: Communicator,
    terms: Callable[[Value], int] = len,
) -> dict[str, Any]:
    """The analysis of `config.analysis` as columns of `metrics.jsonl`. Collective.

    A failed measurement must not end a run: `analysis_problem` then holds the reason.
    """
    request, data = config.analysis, config.data
    begin = time.monotonic()
    with ExitStack() as stack:
        train: Dataset = datasets.train
        if data.augment != "none":
            train = stack.enter_context(open_split(config, data.train_split))
        samples = FixedSamples(train, preprocess, request, communicator, terms)
        landscape = {data.train_split: samples}
        if datasets.evaluation is not None:
            test = FixedSamples(datasets.evaluation, preprocess, request, communicator, terms)
            landscape[data.eval_split] = test
        try:
            found = analyse(model, loss_sum, samples, request, communicator, landscape=landscape)
        except (NumericalError, UsageError) as error:
            return {"analysis_problem": error.line(), "analysis_time_s": time.monotonic() - begin}
    columns: dict[str, Any] = {
        "gradient_norm": found["gradient_norm"],
        "analysis_time_s": time.monotonic() - begin,
        "analysis": {"kind": "curvature", "split": data.train_split, **found},
    }
    if whole := found.get("spectrum"):
        columns["top_eigenvalue"] = whole["eigenvalues"][0]
        columns["smallest_eigenvalue"] = whole["smallest"]
    if last := found.get("last_layer"):
        columns["last_layer_eigenvalue"] = last["eigenvalues"][0]
    if one := found.get("trace"):
        columns["hessian_trace"] = one["mean"]
    return {name: value for name, value in columns.items() if value is not None}


def check_before_start(config: Config, *, workers_here: int | None) -> None:
    """Checks before any worker starts that the vectors of an analysis during training fit.

    Args:
        config: Its shards must exist.
        workers_here: Number of workers that share this machine's memory; None if they run elsewhere.

    Raises:
        ConfigError: If they do not fit.
        UsageError: If more eigenvalues are asked for than the model has parameters.
    """
    if config.analysis.every_epochs is None:
        return
    with open_split(config, config.data.train_split) as dataset, torch.device("meta"):
        model = create_model(
            config.model.name,
            make_task(config, dataset.columns).num_outputs(dataset.columns),
            dataset.input_shape,
            columns=dataset.columns,
            **config.model.arguments,
        )
    free = None
    if workers_here is not None and not config.resources.use_gpu:
        free = free_bytes(torch.device("cpu"))
    check_fits(
        model, config.analysis, free_bytes=None if free is None else free / (workers_here or 1)
    )


class _Analysis:
    def __init__(
        self,
        model: nn.Module,
        loss_sum: SumLoss,
        samples: FixedSamples,
        request: AnalysisConfig,
        communicator: Communicator,
    ) -> None:
        self._model, self._loss_sum, self._samples = model, loss_sum, samples
        self._request, self._communicator = request, communicator
        self._began = time.monotonic()
        self._notes: list[str] = []
        self._direction: Tensor | None = None
        self._gradient: Tensor | None = None

    def run(self, landscape: Mapping[str, FixedSamples]) -> dict[str, Any]:
        request = self._request
        parts: list[tuple[str, float, Callable[[float | None], Mapping[str, Any]], bool]] = [
            ("gradient", 1.0, self._loss_and_gradient, True),
            ("spectrum", _HALF, self._whole_spectrum, True),
            ("last_layer", _LAST_LAYER_SHARE, self._last_layer, True),
            (
                "landscape",
                1.0,
                lambda limit: self._landscape(limit, landscape),
                bool(request.landscape_points and landscape),
            ),
            ("trace", _HALF, self._trace, request.trace_draws > 0),
            ("one_sample", _HALF, self._one_sample, request.one_samples > 0),
            ("density", 1.0, self._density, request.density_draws > 0),
        ]
        found: dict[str, Any] = {}
        for name, part_of_rest, part, wanted in parts:
            if not wanted:
                continue
            left = self._left_s()
            if left is not None and left <= 0:
                self._notes.append(f"{name}: left out, the time budget is spent")
                continue
            found[name] = part(None if left is None else left * part_of_rest)
        nothing = {"loss": None, "gradient_norm": None, "samples_seen": 0}
        gradient = found.pop("gradient", nothing)
        return {
            "format": FORMAT,
            "samples": self._samples.count,
            "seed": request.seed,
            "budget_s": request.budget_s,
            **gradient,
            **{name: value for name, value in found.items() if value},
            "notes": self._notes,
            "time_s": time.monotonic() - self._began,
        }

    def _left_s(self) -> float | None:
        """Remaining seconds of the budget by rank 0's clock, so that all ranks agree."""
        if self._request.budget_s is None:
            return None
        left = self._request.budget_s - (time.monotonic() - self._began)
        return float(self._communicator.broadcast_object(left, 0, tag="hessian"))

    def _hessian(
        self, limit_s: float | None, parameters: Sequence[nn.Parameter] | None = None
    ) -> Hessian:
        return Hessian(
            self._model,
            self._loss_sum,
            self._samples,
            parameters=parameters,
            communicator=self._communicator,
            time_budget_s=limit_s,
            terms=self._samples.terms,
        )

    def _loss_and_gradient(self, limit_s: float | None) -> Mapping[str, Any]:
        hessian = self._hessian(limit_s)
        found = hessian.gradient()
        self._gradient = found.gradient
        return {
            "loss": _number(found.loss),
            "gradient_norm": _number(found.norm),
            "parameters": hessian.size,
            "samples_seen": found.count,
        }

    def _whole_spectrum(self, limit_s: float | None) -> Mapping[str, Any]:
        request = self._request
        top, ends = spectrum(
            self._hessian(limit_s),
            request.top_k,
            seed=request.seed,
            max_steps=request.lanczos_steps,
            tolerance=request.tolerance,
        )
        self._direction = top.vectors[0]
        self._note_convergence("spectrum", top)
        if not ends.converged:
            self._notes.append("spectrum: an end of the spectrum has not converged")
        return {
            **_eigenvalues(top),
            "largest": ends.largest,
            "smallest": ends.smallest,
            "ends_converged": ends.converged,
        }

    def _last_layer(self, limit_s: float | None) -> Mapping[str, Any]:
        request = self._request
        hessian = self._hessian(limit_s, last_layer_parameters(self._model))
        top = top_by_lanczos(
            hessian,
            min(request.top_k, hessian.size),
            seed=request.seed,
            max_steps=request.lanczos_steps,
            tolerance=request.tolerance,
        )
        self._note_convergence("last_layer", top)
        return {**_eigenvalues(top), "parameters": hessian.size}

    def _landscape(
        self, limit_s: float | None, splits: Mapping[str, FixedSamples]
    ) -> Mapping[str, Any]:
        assert self._gradient is not None
        if self._direction is None:
            self._notes.append("landscape: left out, there is no eigenvector")
            return {}
        points = self._request.landscape_points
        begin = time.monotonic()
        self._losses_along([0.0], self._samples)
        once_s = time.monotonic() - begin
        expected = self._communicator.broadcast_object(
            once_s * (points * len(splits) + 3 * _MOST_HALVINGS), 0, tag="hessian"
        )
        if limit_s is not None and expected > limit_s:
            self._notes.append(f"landscape: left out, it would take about {expected:.0f} s")
            return {}
        slope = float(self._gradient @ self._direction)
        curvature = float(self._direction @ self._hessian(None).product(self._direction))
        reach = self._reach(slope, curvature)
        distances = [
            reach * (2 * i / (points - 1) - 1) if points > 1 else 0.0 for i in range(points)
        ]
        losses = {name: self._losses_along(distances, chosen) for name, chosen in splits.items()}
        return {
            "distances": distances,
            "losses": {name: [_number(v) for v in values] for name, values in losses.items()},
            "slope": _number(slope),
            "curvature": _number(curvature),
        }

    def _losses_along(self, distances: Sequence[float], samples: FixedSamples) -> list[float]:
        assert self._direction is not None
        return loss_along(
            self._model,
            self._loss_sum,
            samples,
            self._direction,
            distances,
            communicator=self._communicator,
            terms=samples.terms,
        )

    def _reach(self, slope: float, curvature: float) -> float:
        """Half-width of the landscape: where the parabola has risen by 1, at most ‖θ‖/2; halved while
        the loss rises far above the parabola, so that one figure shows both."""
        with torch.no_grad():
            squares = [float(p.double().square().sum()) for p in self._model.parameters()]
        reach = math.sqrt(math.fsum(squares)) / 2 or 1.0
        if curvature and math.isfinite(curvature):
            reach = min(reach, math.sqrt(2 / abs(curvature)))
        for _ in range(_MOST_HALVINGS):
            low, here, high = self._losses_along([-reach, 0.0, reach], self._samples)
            parabola = abs(slope) * reach + abs(curvature) * reach**2 / 2
            if max(low, high) - here <= 4 * parabola:
                break
            reach /= 2
        return reach

    def _trace(self, limit_s: float | None) -> Mapping[str, Any]:
        draws = self._request.trace_draws
        found = trace(
            self._hessian(limit_s),
            seed=self._request.seed,
            min_draws=min(10, draws),
            max_draws=draws,
            tolerance=self._request.tolerance,
        )
        if found.draws < min(10, draws):
            self._notes.append(f"trace: {found.draws} of {draws} draws in the time")
        return {
            "mean": _number(found.mean),
            "standard_error": _number(found.standard_error),
            "draws": found.draws,
        }

    def _one_sample(self, limit_s: float | None) -> Mapping[str, Any]:
        request = self._request
        wanted = min(request.one_samples, self._samples.count)
        table = one_sample_eigenvalues(
            self._model,
            self._loss_sum,
            self._samples.one,
            wanted,
            top=request.top_k,
            communicator=self._communicator,
            max_steps=request.lanczos_steps,
            tolerance=request.tolerance,
            time_budget_s=limit_s,
        )
        if len(table) < wanted:
            self._notes.append(f"one_sample: {len(table)} of {wanted} samples in the time")
        if not len(table):
            return {}
        sizes = table.abs().sort(dim=1, descending=True).values
        columns = sizes.T.tolist()
        return {
            "samples": len(table),
            "mean": [statistics.fmean(column) for column in columns],
            "low": np.quantile(columns, 0.1, axis=1).tolist(),
            "high": np.quantile(columns, 0.9, axis=1).tolist(),
        }

    def _density(self, limit_s: float | None) -> Mapping[str, Any]:
        draws = self._request.density_draws
        steps = min(_DENSITY_STEPS, self._request.lanczos_steps)
        found = density(self._hessian(limit_s), seed=self._request.seed, draws=draws, steps=steps)
        if len(found.nodes) < draws:
            self._notes.append(f"density: {len(found.nodes)} of {draws} draws in the time")
        grid, values = found.curve(points=400)
        return {
            "grid": grid.tolist(),
            "values": values.tolist(),
            "trace": found.trace,
            "draws": len(found.nodes),
        }

    def _note_convergence(self, name: str, top: Eigenpairs) -> None:
        done = sum(top.converged)
        if done < len(top.converged):
            self._notes.append(f"{name}: {done} of {len(top.converged)} eigenvalues converged")


def _eigenvalues(top: Eigenpairs) -> dict[str, Any]:
    return {
        "eigenvalues": list(top.values),
        "residuals": list(top.residuals),
        "converged": list(top.converged),
        "products": top.products,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
