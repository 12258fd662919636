"""Small problems for tests of the training room: samples in memory, float64 models, a control."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config, parse_config
from elastic_kfac.data.batch import Batch
from elastic_kfac.data.columns import image_columns
from elastic_kfac.data.dataset import Datasets
from elastic_kfac.data.order import SampleOrder
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.state import TrainingState
from elastic_kfac.training.callbacks import Callback, KeepGoing, Point
from elastic_kfac.training.loop import Outcome, run_rank

KFAC: dict[str, Any] = {
    "kfac.enabled": True,
    "kfac.kl_clip": 1e-3,
    "kfac.damping": 0.01,
    "kfac.factor_update_steps": 2,
    "kfac.inverse_update_steps": 4,
}


class MemoryDataset:
    """Random images of a few classes, read in the product's own order."""

    def __init__(self, num_samples: int, *, seed: int = 0, shape: tuple[int, int, int] = (1, 4, 4)):
        generator = torch.Generator().manual_seed(100 + num_samples)
        self.num_samples = num_samples
        self.num_outputs = 3
        self.input_shape = shape
        self.columns = image_columns(shape, ("a", "b", "c"))
        self.sha256 = f"memory-{num_samples}"
        self.normalization = None
        self.bad_ids: frozenset[int] = frozenset()
        self._seed = seed
        self._images = torch.randn(num_samples, *shape, dtype=torch.float64, generator=generator)
        self._labels = torch.randint(0, 3, (num_samples,), generator=generator)
        self._images += self._labels.double().view(-1, 1, 1, 1)
        self.read_ids: list[int] = []

    def read(self, epoch: int, first_position: int, count: int) -> Batch:
        ids = SampleOrder(self.num_samples, self._seed, epoch).ids(first_position, count)
        self.read_ids += ids.tolist()
        weights = torch.tensor([float(i not in self.bad_ids) for i in ids.tolist()])
        return Batch(self._images[ids], self._labels[ids], ids.astype(np.uint64), weights)

    def prefetch(self, epoch: int, first_position: int, count: int) -> None:
        return None

    def close(self) -> None:
        return None


def memory_datasets(num_samples: int = 50, eval_samples: int = 20) -> Datasets:
    return Datasets(MemoryDataset(num_samples), MemoryDataset(eval_samples))


def float64_cnn(num_classes: int, image_shape: tuple[int, int, int], **_: Any) -> nn.Module:
    """A double-precision network without BatchNorm, for equalities to 1e-10."""
    return nn.Sequential(
        nn.Conv2d(image_shape[0], 4, 3, padding=1),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(4 * image_shape[1] * image_shape[2], num_classes),
    ).double()


def batch_norm_cnn(num_classes: int, image_shape: tuple[int, int, int], **_: Any) -> nn.Module:
    """The same with BatchNorm."""
    return nn.Sequential(
        nn.Conv2d(image_shape[0], 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * image_shape[1] * image_shape[2], num_classes),
    ).double()


def small_config(changes: Mapping[str, Any] | None = None) -> Config:
    """SGD without K-FAC, three epochs of 16 samples per step; `section.key` paths change it."""
    values: dict[str, dict[str, Any]] = {
        "model": {"name": "support.training_problems:float64_cnn"},
        "train": {"epochs": 3, "global_batch_size": 16, "eval_every_epochs": 1},
        "optimizer": {"lr": 0.05, "momentum": 0.9, "weight_decay": 1e-3},
        "kfac": {"enabled": False},
        "elastic": {"snapshot_interval_s": 1e9, "max_workers": 8},
    }
    for path, value in (changes or {}).items():
        section, key = path.split(".")
        values.setdefault(section, {})[key] = value
    return parse_config(values)


@dataclass
class StopAt:
    """A control that asks to park when it is polled for the n-th time."""

    polls: int
    reason: str = "test"
    polled: int = 0

    def stop_reason(self) -> str | None:
        self.polled += 1
        return self.reason if self.polled >= self.polls else None


@dataclass
class RecordingCallback(Callback):
    """Keeps the rows of a run."""

    reached: int = 0
    metric_rows: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    rewinds: list[tuple[int, int]] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)

    def on_metrics(self, row: Mapping[str, Any]) -> None:
        self.metric_rows.append(dict(row))

    def on_event(self, row: Mapping[str, Any]) -> None:
        self.events.append(dict(row))

    def on_step(self, row: Mapping[str, Any]) -> None:
        self.steps.append(int(row["step"]))

    def last_step(self) -> int:
        return self.steps[-1] if self.steps else self.reached

    def on_rollback(self, step: int, lost_steps: int) -> None:
        self.rewinds.append((step, lost_steps))


@dataclass
class AtPoints(Callback):
    """Calls `body` at every point of a run."""

    body: Callable[[Point, int], None]

    def on_point(self, point: Point, step: int) -> None:
        self.body(point, step)


@dataclass
class AwaitCheckpoint(Callback):
    """From step 3 on a checkpoint is on disk: a kill on a slow machine does not come before it."""

    folder: Path

    def on_point(self, point: Point, step: int) -> None:
        if point != "committed" or step < 3:
            return
        deadline = time.monotonic() + 60
        while not list(self.folder.glob("checkpoints/step-*/manifest.json")):
            assert time.monotonic() < deadline, "no checkpoint was written"
            time.sleep(0.002)


class MemoryOrder:
    """The order of a memory dataset, for audits."""

    def __init__(self, num_samples: int = 50) -> None:
        self.num_samples = num_samples

    def ids(self, epoch: int, first_position: int, count: int) -> npt.NDArray[np.int64]:
        return SampleOrder(self.num_samples, 0, epoch).ids(first_position, count)


def train_here(
    folder: Path | str,
    changes: Mapping[str, Any],
    communicator: Communicator,
    stop_at: int | None = None,
    callback: Callback | None = None,
) -> Outcome:
    """Trains `small_config(changes)` from the newest checkpoint on, to the end or for some steps."""
    return run_rank(
        small_config(changes),
        communicator,
        store=CheckpointStore(folder),
        callback=callback or RecordingCallback(),
        control=KeepGoing() if stop_at is None else StopAt(stop_at),
        datasets=memory_datasets(),
    )


def in_one_process(folder: Path, changes: Mapping[str, Any]) -> TrainingState:
    """The final state of a run that never saw another world size."""
    train_here(folder, changes, Communicator.solo())
    state = CheckpointStore(folder).load_latest()
    assert state is not None
    return state


def states_differ_in(first: TrainingState, second: TrainingState) -> list[str]:
    """Names of tensors that differ by more than 1e-10, and of ledger columns that differ at all."""
    ours, theirs = _without_bases(first), _without_bases(second)
    names = sorted(set(ours) ^ set(theirs))
    names += [
        name
        for name in sorted(set(ours) & set(theirs))
        if not torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-10)
    ]
    for column in ("step", "epoch", "first_position", "num_samples", "id_hash"):
        if first.ledger.tail[column].tolist() != second.ledger.tail[column].tolist():
            names.append(column)
    return names


def _without_bases(state: TrainingState) -> dict[str, Tensor]:
    """With what eigenvectors, unique only up to signs, stand for: the matrices that they decompose, and
    mean gradients outside their coordinates."""
    tensors = dict(state.tensors)
    for name in [name for name in tensors if name.endswith("/E_mean")]:
        left, right = (tensors[name.replace("E_mean", f"{side}_vectors")] for side in "GA")
        tensors[name] = left @ tensors[name] @ right.mT
    for name in [name for name in tensors if name.endswith("_vectors")]:
        vectors, values = tensors.pop(name), tensors[name.replace("_vectors", "_values")]
        # The mean of eigenvalues without vectors is the last one.
        tensors[name] = (vectors * values[..., : vectors.shape[-1]]) @ vectors.mT
    return tensors


@dataclass(frozen=True)
class Script:
    """What the slots do: who founds the world; who dies, leaves or joins at which step."""

    founders: tuple[int, ...]
    changes: dict[str, Any] = field(default_factory=dict)
    kills: dict[int, tuple[int, Point]] = field(default_factory=dict)
    leaves: dict[int, int] = field(default_factory=dict)
    joins: dict[int, int] = field(default_factory=dict)


@dataclass
class Seen:
    """What one slot saw."""

    outcome: Outcome | None = None
    steps: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    rewinds: list[tuple[int, int]] = field(default_factory=list)
    continued: list[tuple[int, str, int]] = field(default_factory=list)
    """(world size, way, moved bytes) of every world that continued a run, as rank 0 reported it."""
    ends: list[str] = field(default_factory=list)
    """Kinds of events that say why stepping ended, as this slot reported them."""
    costs: list[tuple[int, int]] = field(default_factory=list)
    """(world size, step) of every world whose costs it reported."""
