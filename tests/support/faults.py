"""Faults at one point of one step: kill, stop, exception, NaN batch, full or slow disk, damaged files.

`Faults` is a callback; a test plans faults and afterwards asserts that they happened.
"""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from elastic_kfac.data.batch import Batch
from elastic_kfac.data.dataset import Dataset
from elastic_kfac.training.callbacks import Callback, Point

FaultPoint = Point | Literal["manifest_rename"]
"""Where a fault can happen: `manifest_rename` lies in the checkpoint writer."""

FaultKind = Literal[
    "sigkill",
    "sigstop",
    "exception",
    "nan_batch",
    "corrupted_snapshot",
    "torn_checkpoint",
    "missing_checkpoint_file",
    "disk_full",
    "slow_disk",
]

_QUOTA_BYTES = 64
_SLOW_WRITE_S = 0.2


class InjectedFault(RuntimeError):
    """What the fault `exception` raises."""


@dataclass(frozen=True)
class Fired:
    """A fault that happened."""

    kind: FaultKind
    point: FaultPoint
    step: int


@dataclass
class Faults(Callback):
    """The faults of one process. Each fires once; `fired` counts, so that a test cannot pass idly."""

    rank: int = 0
    """The number of this process in plans; faults of other ranks are not its business."""
    folder: Path | None = None
    """The run's folder, for faults of its checkpoints."""
    on_fire: Callable[[Fired], None] = lambda fired: None
    """Is told before a fault happens: the last thing that a killed process can do."""
    fired: list[Fired] = field(default_factory=list)
    nan_batches: int = 0
    """How many of the coming reads of a `FaultyDataset` are not numbers."""
    write_delay_s: float = 0.0
    """What `slow_disk` adds to the writing of each manifest."""
    _planned: list[Fired] = field(default_factory=list)

    def fail_at(
        self, rank: int, step: int, point: FaultPoint, kind: FaultKind = "sigkill"
    ) -> Faults:
        """Plans a fault for the first time that `rank` reaches `point` of `step`.

        Several faults of the same point happen in the order of their planning.
        """
        if rank == self.rank:
            self._planned.append(Fired(kind, point, step))
        return self

    def on_point(self, point: FaultPoint, step: int) -> None:
        if point == "manifest_rename" and self.write_delay_s:
            time.sleep(self.write_delay_s)
        for planned in [p for p in self._planned if (p.point, p.step) == (point, step)]:
            self._planned.remove(planned)
            self.fired.append(planned)
            self.on_fire(planned)
            self._happen(planned.kind)

    def _happen(self, kind: FaultKind) -> None:
        if kind == "sigkill":
            # No handler runs, no file is flushed, no peer is told.
            os.kill(os.getpid(), signal.SIGKILL)
        elif kind == "sigstop":
            # Silent, but its connections stay open.
            os.kill(os.getpid(), signal.SIGSTOP)
        elif kind == "exception":
            raise InjectedFault("injected fault")
        elif kind == "nan_batch":
            self.nan_batches += 1
        elif kind == "disk_full":
            # A quota of the kernel: every longer write of this process fails from now on.
            _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (_QUOTA_BYTES, most))
        elif kind == "slow_disk":
            self.write_delay_s = _SLOW_WRITE_S
        else:
            self._damage(kind)

    def _damage(self, kind: FaultKind) -> None:
        """Harms the tensors of the newest finished checkpoint."""
        assert self.folder is not None
        manifests = sorted(self.folder.glob("checkpoints/step-*/manifest.json"))
        assert manifests, "there is no checkpoint to damage"
        (tensors,) = manifests[-1].parent.glob("*.safetensors")
        if kind == "missing_checkpoint_file":
            tensors.unlink()
            return
        content = bytearray(tensors.read_bytes())
        if kind == "torn_checkpoint":
            content = content[: len(content) // 2]
        else:
            content[-1] ^= 1
        tensors.write_bytes(content)


class FaultyDataset:
    """A dataset whose samples are not numbers when `Faults` says so."""

    def __init__(self, dataset: Dataset, faults: Faults) -> None:
        self._dataset, self._faults = dataset, faults
        self.num_samples = dataset.num_samples
        self.num_outputs = dataset.num_outputs
        self.input_shape = dataset.input_shape
        self.columns = dataset.columns
        self.sha256 = dataset.sha256
        self.normalization = dataset.normalization

    def read(self, epoch: int, first_position: int, count: int) -> Batch:
        samples = self._dataset.read(epoch, first_position, count)
        if not self._faults.nan_batches:
            return samples
        self._faults.nan_batches -= 1
        images = torch.full(samples.inputs.shape, float("nan"))
        return Batch(images, samples.targets, samples.ids, samples.weights)

    def prefetch(self, epoch: int, first_position: int, count: int) -> None:
        self._dataset.prefetch(epoch, first_position, count)

    def close(self) -> None:
        self._dataset.close()


def lift_quota() -> None:
    """Ends `disk_full`."""
    _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))
