"""Reviews of plans and choices of intervals, by what steps have cost."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, cast
from unittest import mock

import pytest
import torch
from torch import nn

from elastic_kfac import KFAC
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.kfac import ahead
from elastic_kfac.kfac.refresh import FixedRefresh
from elastic_kfac.kfac.shapes import layer_shape
from elastic_kfac.placement.devices import stored_calibration
from elastic_kfac.placement.planner import make_plan
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.training.planning import PlanReview, Retuning
from support.training_problems import (
    KFAC as OPTIONS,
)
from support.training_problems import RecordingCallback, states_differ_in, train_here


class _Twins:
    """Two ranks that always have the same."""

    world_size, rank = 2, 0
    sent: ClassVar[list[str]] = []

    def all_gather_object(self, value: object, tag: str) -> list[object]:
        self.sent.append(tag)
        return [value, value]


def _as_of_two_ranks(kfac: KFAC, resized: mock.Mock) -> KFAC:
    shapes = [layer_shape(layer) for layer in kfac.layers]
    two: Any = SimpleNamespace(
        options=kfac.options,
        plan=make_plan(shapes, 2, 0.5),
        communicator=_Twins(),
        refresh=kfac.refresh,
        layers=kfac.layers,
        calibration=None,
        resize=resized,
    )
    return cast(KFAC, two)


@pytest.mark.parametrize(("slower", "replans"), [(1.0, False), (3.0, True), (0.2, True)])
def test_early_decompositions_do_not_count_as_slow_ones(slower: float, replans: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))
    kfac = KFAC(model, lr=0.1, factor_update_steps=1, inverse_update_steps=4)
    costs = stored_calibration("eigen").costs
    by_name = {layer.name: layer_shape(layer) for layer in kfac.layers}

    def timed(layer: Any, state: Any, names: Any, damping: float) -> Any:
        shape = by_name[layer.name]
        seconds = slower * (costs.a_seconds(shape) + costs.g_seconds(shape))
        return layer.decompose(state.floored, names, damping, state.decomposition), seconds

    review, events = PlanReview(0.5), []
    resized = mock.Mock(return_value=SimpleNamespace(plan=make_plan([], 2, 1.0), moved_bytes=0))
    two = cast(Any, _as_of_two_ranks(kfac, resized))
    every_step = mock.Mock(return_value={0, 1})  # four times as often as the interval has it
    with (
        mock.patch.object(ahead, "_timed", timed),
        mock.patch.object(FixedRefresh, "decompositions_due", every_step),
    ):
        for step in range(1, 60):
            model(torch.randn(8, 6)).square().mean().backward()
            kfac.step()
            two.steps = kfac.steps
            events.append(review.replan(two, step))
    assert "plan/review" in _Twins.sent
    assert any(events) == replans == resized.called
    if replans:
        ratio = two.calibration.costs.c1 / costs.c1
        assert ratio == pytest.approx(slower)


def test_decompositions_that_another_thread_made_count_where_they_are_used() -> None:
    torch.manual_seed(0)
    model = nn.Linear(160, 160)
    options = {"factor_update_steps": 5, "inverse_update_steps": 50, "stagger": True}
    kfac = KFAC(model, lr=0.1, **options)
    for _ in range(50):
        model(torch.randn(4, 160)).square().mean().backward()
        kfac.step()
    assert kfac.refresh.ahead.work.done == {("", "A"): 2, ("", "G"): 2}
    assert kfac.refresh.ahead.work.seconds > kfac.timers.last["products"] > 0
    kfac.close()


RETUNED = {**OPTIONS, "plan.retune": True, "train.epochs": 4, "elastic.max_workers": 2}


_LOAD = Retuning.load_state_dict


def _seen_in_two_ranks(retuning: Retuning, decomposition_s: float) -> None:
    """Half of the steps decompose; the others take 10 ms."""
    seconds = [[0.0, 0.0, 0.01], [0.0, 1.0, 0.01 + decomposition_s]]
    _LOAD(retuning, {"world_size": 2, "samples": 16, "steps": 9, "seconds": seconds})


@pytest.mark.parametrize(("decomposition_s", "intervals"), [(1.0, (20, 40)), (1e-9, (1, 2))])
def test_a_resize_chooses_again_and_a_resume_goes_on_with_that_bit_for_bit(
    tmp_path: Path, decomposition_s: float, intervals: tuple[int, int]
) -> None:
    states, chosen = [], []
    for stops in ((3,), (3, 2)):
        folder, callback = tmp_path / str(len(stops)), RecordingCallback()
        train_here(folder, RETUNED, Communicator.solo(), stop_at=stops[0], callback=callback)
        assert not [row for row in callback.events if row["kind"] == "retuned"]

        def of_two_ranks(self: Retuning, state: dict[str, Any]) -> None:
            _seen_in_two_ranks(self, decomposition_s)

        # The first attempt is taken for one of two ranks.
        with mock.patch.object(Retuning, "load_state_dict", of_two_ranks):
            stop_at = stops[1] if len(stops) > 1 else None
            train_here(folder, RETUNED, Communicator.solo(), stop_at=stop_at, callback=callback)
        if len(stops) > 1:
            train_here(folder, RETUNED, Communicator.solo(), callback=callback)
        [row] = [row for row in callback.events if row["kind"] == "retuned"]
        chosen.append((row["factor_update_steps"], row["inverse_update_steps"], row["damping"]))
        assert "of a step instead of" in row["reason"] and "damping 0.01 →" in row["reason"]
        assert (row["predicted_gain"] > 0.5) == (intervals[0] > 2)
        state = CheckpointStore(folder).load_latest()
        assert state is not None
        assert state.part("kfac")["tuned"]["inverse_update_steps"] == intervals[1]
        states.append(state)
    assert chosen[0] == chosen[1]
    assert chosen[0][:2] == intervals
    assert chosen[0][2] == pytest.approx(0.01 * (intervals[1] / 4) ** 0.5)
    assert states_differ_in(*states) == []
    assert states[0].sha256() == states[1].sha256()


def test_without_retune_configured_intervals_hold_again(tmp_path: Path) -> None:
    callback = RecordingCallback()
    train_here(tmp_path, RETUNED, Communicator.solo(), stop_at=3, callback=callback)
    with mock.patch.object(
        Retuning, "load_state_dict", lambda self, state: _seen_in_two_ranks(self, 1.0)
    ):
        train_here(tmp_path, RETUNED, Communicator.solo(), stop_at=2, callback=callback)
    assert "retuned" in [row["kind"] for row in callback.events]
    train_here(tmp_path, {**RETUNED, "plan.retune": False}, Communicator.solo())
    state = CheckpointStore(tmp_path).load_latest()
    assert state is not None
    assert "tuned" not in state.part("kfac")
