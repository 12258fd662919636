"""Rounds of a population: every trial trains up to the same point and waits there to be compared.

Trials are compared by an evaluation. Its result takes a while to the driver, and the decision takes a
while back; a rank that trained on meanwhile would hand over a state other than the evaluated one.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

from elastic_kfac.json_text import parsed
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.training.callbacks import Callback, Callbacks, Control, Trainer
from elastic_kfac.training.in_place import run_member
from elastic_kfac.training.loop import Outcome, run_rank

RANK_FUNCTION = "elastic_kfac.experiments.rounds:run_in_rounds"
MEMBER_FUNCTION = "elastic_kfac.experiments.rounds:run_member_in_rounds"

_FILE = "round.json"
_TOLERANCE = 1e-9


def round_after(progress: float, interval: float) -> float:
    """The first multiple of `interval` beyond `progress`; both in epochs or in training seconds."""
    return (math.floor(progress / interval + _TOLERANCE) + 1) * interval


def is_over(progress: float, end: float) -> bool:
    """Whether a round that ends at `end` is over for a trial that was evaluated at `progress`."""
    return progress >= end - _TOLERANCE * max(1.0, abs(end))


def announce_round(folder: RunFolder, measure: str, end: float) -> None:
    """Sets where the ranks of a trial wait next; ranks that are waiting may continue.

    Args:
        measure: `epoch` or `train_time_s`.
        end: Where the round ends, in that measure.
    """
    folder.storage.write(_FILE, json.dumps({"measure": measure, "end": end}).encode())


class RoundGate(Callback):
    """A control that holds a rank at the first evaluation at the end of a round."""

    def __init__(
        self,
        control: Control,
        read_round: Callable[[], tuple[str, float] | None],
        *,
        poll_s: float = 0.05,
    ) -> None:
        """Wraps `control`; `read_round` returns the measure and the end of the current round, or None
        for a trial outside the population."""
        self._control = control
        self._read_round = read_round
        self._poll_s = poll_s
        self._trainer: Trainer | None = None
        self._evaluations: int | None = None

    def on_start(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._evaluations = None

    def stop_reason(self) -> str | None:
        """Returns at once, except after the evaluation that ends a round: then it waits for a reason to
        stop or for the next round."""
        reason = self._control.stop_reason()
        if self._trainer is None:
            return reason
        before, self._evaluations = self._evaluations, self._trainer.progress.evaluations
        # The first call of an attempt comes after the restore, which sets the count.
        if before is not None and self._evaluations > before:
            while reason is None and self._is_at_the_end():
                time.sleep(self._poll_s)
                reason = self._control.stop_reason()
        return reason

    def _is_at_the_end(self) -> bool:
        assert self._trainer is not None
        announced = self._read_round()
        if announced is None:
            return False
        (measure, end), trainer = announced, self._trainer
        epoch, seconds = trainer.fractional_epoch, trainer.progress.train_time_s
        return is_over(epoch if measure == "epoch" else seconds, end)


def run_in_rounds(
    config: Any,
    communicator: Any,
    *,
    store: Any,
    callback: Callback,
    control: Control,
    **seams: Any,
) -> Outcome:
    """`run_rank`, waiting at the end of every announced round.

    Raises:
        ElasticKfacError: As `run_rank`.
    """
    gate = _gate(store, control)
    return run_rank(
        config, communicator, store=store, callback=Callbacks(gate, callback), control=gate, **seams
    )


def run_member_in_rounds(
    config: Any,
    membership: Any,
    *,
    store: Any,
    callback: Callback,
    control: Control,
    **seams: Any,
) -> Outcome:
    """`run_member`, waiting at the end of every announced round.

    Raises:
        ElasticKfacError: As `run_member`.
    """
    gate = _gate(store, control)
    return run_member(
        config, membership, store=store, callback=Callbacks(gate, callback), control=gate, **seams
    )


def _gate(store: Any, control: Control) -> RoundGate:
    def read_round() -> tuple[str, float] | None:
        try:
            row = parsed(store.storage.read(_FILE))
        except FileNotFoundError:
            return None
        return str(row["measure"]), float(row["end"])

    return RoundGate(control, read_round)
