"""Proves from a run's files that every sample was used exactly once per epoch.

The ledger holds the positions that each step committed and the hash sum of the sample ids at the loss;
the sample order gives the ids at those positions. Both must agree, ranges must tile every epoch, and
steps must be consecutive.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from elastic_kfac.config import Config
from elastic_kfac.data.manifest import open_named_split
from elastic_kfac.data.order import SampleOrder, id_hash
from elastic_kfac.runs.final_record import read_ledger
from elastic_kfac.state.ledger import Rows, world_sizes
from elastic_kfac.state.run_folder import RunFolder


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit."""

    steps: int
    complete_epochs: int
    samples: int
    world_sizes: tuple[int, ...]
    problems: tuple[str, ...]
    """One line per finding, in the order of steps."""

    @property
    def passed(self) -> bool:
        return not self.problems

    def line(self) -> str:
        """One line for people."""
        if self.passed:
            sizes = "→".join(str(size) for size in self.world_sizes) or "none"
            return (
                f"audit passed: {self.steps} steps, {self.samples} samples, "
                f"{self.complete_epochs} complete epochs, each sample exactly once; "
                f"world sizes {sizes}"
            )
        more = len(self.problems) - 1
        return f"audit failed: {self.problems[0]}" + (f" (and {more} more)" if more else "")


def audit_run(folder: RunFolder) -> AuditReport:
    """Audits a run's folder; an unfinished run is audited up to its last checkpoint.

    Raises:
        ElasticKfacError: If the run, its checkpoints or its shards cannot be read.
    """
    config = folder.located_config()
    return audit_rows(read_ledger(folder), TrainingOrder(config))


def audit_rows(rows: Rows, order: TrainingOrder, *, most_problems: int = 20) -> AuditReport:
    """Audits ledger rows against an order."""
    problems: list[str] = []
    size = order.num_samples
    step = epoch = position = 0
    for row in rows:
        if len(problems) >= most_problems:
            break
        where = f"step {int(row['step'])}"
        if int(row["step"]) != step + 1:
            problems.append(f"{where} follows step {step}")
        step = int(row["step"])
        first, count = int(row["first_position"]), int(row["num_samples"])
        if (int(row["epoch"]), first) != (epoch, position):
            problems.append(
                f"{where} begins at position {first} of epoch {int(row['epoch'])}, "
                f"but position {position} of epoch {epoch} is next"
                f" ({_what(int(row['epoch']), first, epoch, position)})"
            )
        epoch, position = int(row["epoch"]), first + count
        if count < 1 or first < 0 or position > size:
            problems.append(f"{where} covers [{first}, {position}) of an epoch of {size} samples")
        elif id_hash(order.ids(epoch, first, count)) != int(row["id_hash"]):
            problems.append(
                f"{where}: the samples at the loss were not those of positions "
                f"[{first}, {position}) of epoch {epoch} (their hash differs)"
            )
        if int(row["world_size"]) < 1:
            problems.append(f"{where} was committed by {int(row['world_size'])} workers")
        if position >= size:
            epoch, position = epoch + 1, 0
    return AuditReport(
        steps=len(rows),
        complete_epochs=epoch,
        samples=int(rows["num_samples"].sum()),
        world_sizes=tuple(world_sizes(rows)),
        problems=tuple(problems),
    )


def _what(epoch: int, first: int, expected_epoch: int, expected: int) -> str:
    return "samples lost" if (epoch, first) > (expected_epoch, expected) else "samples repeated"


class TrainingOrder:
    """The order of a run's training split, read from its manifest alone."""

    def __init__(self, config: Config) -> None:
        self._shards = open_named_split(
            config.data.shards, config.data.train_split, "data.train_split"
        )
        self._seed = config.train.seed
        self._current: SampleOrder | None = None

    @property
    def num_samples(self) -> int:
        return self._shards.num_samples

    def ids(self, epoch: int, first_position: int, count: int) -> npt.NDArray[np.int64]:
        """The sample ids at `count` positions of an epoch."""
        if self._current is None or self._current.epoch != epoch:
            self._current = self._shards.order(self._seed, epoch)
        return self._current.ids(first_position, count)
