"""One cell of a study as a Ray task: train alone, in a run folder of its own, and measure the end.

An interrupted cell continues from its last snapshot; a finished one is only measured, and only for the
columns that it lacks.
"""

from __future__ import annotations

import time
import traceback
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import ray
import torch

from elastic_kfac.analysis.hessian import Hessian
from elastic_kfac.analysis.spectrum import top_by_lanczos
from elastic_kfac.cluster.ray.devices import device_of_task
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config
from elastic_kfac.errors import ElasticKfacError, NumericalError, RunError
from elastic_kfac.experiments.study import Measure
from elastic_kfac.experiments.trials import DIVERGED, FAILED, FINISHED
from elastic_kfac.runs.checkpoints import Restored, restored
from elastic_kfac.runs.final_record import compact_ledger, result_row
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.tasks.attacks import evaluation_attack
from elastic_kfac.training.callbacks import FolderWriter, KeepGoing
from elastic_kfac.training.loop import run_rank

Row = Mapping[str, Any]

CLAIM_TIMEOUT_S = 60.0
"""A worker may outlive its killed driver for a moment."""

LANCZOS_TOLERANCE = 1e-3
REPORT_INTERVAL_S = 0.5


@dataclass(frozen=True)
class CellTask:
    """The work on a cell; running it twice is harmless."""

    name: str
    uri: str
    config: Config
    columns: tuple[str, ...]
    """Columns to measure on the final state."""
    measures: Measure


def run_cell(task: CellTask, board: Any) -> dict[str, Any]:
    """Trains and measures; the Ray task.

    Args:
        board: Handle of the `StudyBoard`; None reports no progress.

    Returns:
        `status` and measured values, or `status`, `error` and `traceback`.
    """
    folder = RunFolder(task.uri)
    try:
        with folder.claimed(f"cell {task.name}", wait_s=CLAIM_TIMEOUT_S):
            return _finished(task, folder, board)
    except NumericalError as error:
        # Divergence is a result: training again would diverge again.
        result: dict[str, Any] = {"status": DIVERGED, "error": error.line()}
        result["steps"] = max((int(row.get("step", 0)) for row in folder.metrics()), default=0)
        folder.write_result(result)
        return result
    except Exception as error:
        line = error.line() if isinstance(error, ElasticKfacError) else _first_line(error)
        return {"status": FAILED, "error": line, "traceback": traceback.format_exc()}


def missing_measures(result: Row, task: CellTask) -> tuple[str, ...]:
    """Columns that a finished cell lacks, or has measured with other settings."""
    if result.get("measured") != task.measures.model_dump():
        return task.columns
    return tuple(name for name in task.columns if name not in result)


def _finished(task: CellTask, folder: RunFolder, board: Any) -> dict[str, Any]:
    result = folder.result()
    device = device_of_task(task.config)
    if result is None:
        result = _trained(task, folder, board, device)
    wanted = missing_measures(result, task)
    if wanted:
        result.update(measure_final_state(folder, wanted, task.measures, device))
    result["measured"] = task.measures.model_dump()
    # Last, because a cell with a result is not trained again.
    folder.write_result(result)
    return result


def _trained(task: CellTask, folder: RunFolder, board: Any, device: torch.device) -> dict[str, Any]:
    config = task.config
    torch.set_num_threads(config.train.torch_threads)
    folder.write_config(config)
    store = CheckpointStore(folder.uri, keep=config.elastic.keep_checkpoints)
    writer = _ReportingWriter(folder, task.name, config.train.epochs, board)
    try:
        outcome = run_rank(
            config,
            Communicator.solo(),
            store=store,
            callback=writer,
            control=KeepGoing(),
            device=device,
        )
    finally:
        store.close()
        writer.close()
    compact_ledger(folder)
    evaluations = [row for row in folder.metrics() if "eval_loss" in row]
    if not evaluations:
        raise RunError("the run was never evaluated", change="lower train.eval_every_epochs")
    last = evaluations[-1]
    return {
        **result_row(config, outcome),
        "status": FINISHED,
        **({"accuracy": last["eval_accuracy"]} if "eval_accuracy" in last else {}),
        "value": last[f"eval_{outcome.metric}"],
        "eval_loss": last["eval_loss"],
    }


def measure_final_state(
    folder: RunFolder,
    wanted: Collection[str],
    how: Measure,
    device: torch.device,
) -> dict[str, float]:
    """The wanted `COLUMNS` of the final state of a cell, in evaluation mode.

    Raises:
        ConfigError: If the attack's radius is outside the data range.
        NumericalError: If a Hessian product is not finite.
    """
    found = {}
    with restored(folder, device=device, shuffle=False) as here:
        data = here.config.data
        if "train_loss" in wanted:
            found["train_loss"] = here.evaluate(data.train_split).loss
        if "lambda_1" in wanted:
            found["lambda_1"] = _top_eigenvalue(here, how)
        if "adversarial_accuracy" in wanted:
            attack = evaluation_attack(
                here.config.adversarial,
                here.preprocess,
                here.datasets[data.eval_split],
                how.attack,
                how.adversarial_radius,
                how.adversarial_steps,
            )
            attacked = here.evaluate(data.eval_split, attack).attacked
            assert attacked is not None
            found["adversarial_accuracy"] = attacked["accuracy"]
    return found


def _top_eigenvalue(here: Restored, how: Measure) -> float:
    training = here.datasets[here.config.data.train_split]
    size = here.config.train.eval_batch_size
    count = min(how.hessian_samples, training.num_samples)
    inputs = [
        here.preprocess(training.read(0, first, min(size, count - first)))
        for first in range(0, count, size)
    ]
    batches = [(part.inputs, part.targets) for part in inputs]
    operator = Hessian(here.model, here.task.loss, batches, terms=here.task.terms)
    found = top_by_lanczos(
        operator, max_steps=min(how.hessian_steps, operator.size), tolerance=LANCZOS_TOLERANCE
    )
    return abs(found.values[0])


class _ReportingWriter(FolderWriter):
    """Writes the run's folder and reports the progress of the cell."""

    def __init__(self, folder: RunFolder, name: str, epochs: float, board: Any) -> None:
        super().__init__(folder)
        self._name, self._epochs, self._board = name, epochs, board
        self._reported_at = 0.0

    def on_step(self, row: Row) -> None:
        now = time.monotonic()
        if self._board is not None and now - self._reported_at >= REPORT_INTERVAL_S:
            self._reported_at = now
            self._board.note.remote(self._name, float(row["epoch"]) / self._epochs)


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else ''}"


class StudyBoard:
    """The actor that collects the progress of running cells."""

    def __init__(self) -> None:
        self._done: dict[str, float] = {}

    def note(self, name: str, fraction: float) -> None:
        """Records the share of a cell's training that is done."""
        self._done[name] = fraction

    def view(self) -> dict[str, float]:
        """Fractions by cell."""
        return dict(self._done)


def cell_function(config: Config) -> Any:
    """The Ray task with the resources of a cell; Ray runs it again if its node is lost."""
    resources = config.resources.of_a_worker()
    cpus, gpus = resources.pop("CPU", 1.0), resources.pop("GPU", 0.0)
    return ray.remote(run_cell).options(
        num_cpus=cpus, num_gpus=gpus, resources=resources, max_retries=5
    )
