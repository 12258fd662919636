"""Statistics and decompositions of layers on different steps, large ones on another thread."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import Executor, Future
from itertools import pairwise
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.kfac.ahead import Ahead
from elastic_kfac.kfac.refresh import busy_steps
from elastic_kfac.kfac.spread import balanced, spread

WIDE = [40, 150, 140, 130, 10]
"""Widths: three decompositions are large enough for another thread, one is not."""
INTERVALS = {"factor_update_steps": 3, "inverse_update_steps": 6, "stagger": True}


def mlp(widths: list[int], seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [x for a, b in pairwise(widths) for x in (nn.Linear(a, b), nn.Tanh())]
    return nn.Sequential(*layers[:-1])


@pytest.fixture
def every_layer_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bundles, which the small layers of these tests would make."""
    monkeypatch.setattr("elastic_kfac.kfac.spread.BUNDLE", 1)
    monkeypatch.setattr("elastic_kfac.kfac.spread.BUNDLE_PER_LAYER", 1)


class Run:
    """A model, its optimizer and K-FAC."""

    def __init__(self, model: nn.Module | None = None, **options: Any) -> None:
        self.model = mlp(WIDE) if model is None else model
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.kfac = KFAC(self.model, lr=self.optimizer, **{**INTERVALS, **options})

    def step(self) -> None:
        generator = torch.Generator().manual_seed(self.kfac.steps)
        x = torch.randn(16, WIDE[0], generator=generator)
        y = torch.randint(WIDE[-1], (16,), generator=generator)
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(x), y).backward()
        self.kfac.step()
        self.optimizer.step()

    def until(self, step: int) -> list[Tensor]:
        while self.kfac.steps < step:
            self.step()
        return [p.detach().clone() for p in self.model.parameters()]


@pytest.fixture
def begun(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    """Decompositions that another thread was given, and those that were asked for and taken from it."""
    seen: Counter[str] = Counter()
    begin, key = Ahead.begin, Ahead.decompose

    def counted(self: Ahead, layer: Any, state: Any, names: Any, damping: float) -> None:
        seen["begun"] += 1
        begin(self, layer, state, names, damping)

    def taken(self: Ahead, layer: Any, state: Any, names: Any, damping: float) -> dict[str, Tensor]:
        was = self._jobs.get(layer.name)
        parts = key(self, layer, state, names, damping)
        seen["taken"] += was is not None and parts is was.parts.result()[0]
        return parts

    monkeypatch.setattr(Ahead, "begin", counted)
    monkeypatch.setattr(Ahead, "decompose", taken)
    yield seen


OPTIONS: dict[str, dict[str, Any]] = {
    "eigen": {},
    "inverse": {"method": "inverse"},
    "precompute": {"precompute": True, "colocate": True},
    "schedule": {"method": "inverse", "damping": lambda step: 1e-2 / (1 + step)},
    "functions": {
        "factor_update_steps": lambda step: 2 if step < 8 else 4,
        "inverse_update_steps": lambda step: 4 if step < 8 else 8,
    },
}


@pytest.mark.usefixtures("every_layer_apart")
@pytest.mark.parametrize("name", OPTIONS)
def test_another_thread_does_not_change_a_bit(
    name: str, begun: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with_thread = Run(**OPTIONS[name]).until(20)
    assert begun["begun"] >= begun["taken"] >= 6
    monkeypatch.setattr(Ahead, "begin", lambda *_: None)
    for one, other in zip(with_thread, Run(**OPTIONS[name]).until(20), strict=True):
        assert torch.equal(one, other)


class OtherProcess(Executor):
    """What a pool of processes does to arguments and results, and what a lost process does."""

    def __init__(self, *, lost_after: int = 1000) -> None:
        self.calls, self._lost_after = 0, lost_after

    def submit(self, function: Any, /, *arguments: Any, **named: Any) -> Future[Any]:
        self.calls += 1
        if self.calls > self._lost_after + 2:
            raise RuntimeError("the pool is broken")
        future: Future[Any] = Future()
        if self.calls > self._lost_after:
            future.set_exception(EOFError("the process died"))
        else:
            there = pickle.loads(pickle.dumps((function, arguments, named)))
            future.set_result(pickle.loads(pickle.dumps(there[0](*there[1], **there[2]))))
        return future


RANK = {"max_factor_dim": 128, "factor_rank": 20}


@pytest.mark.filterwarnings("ignore:factors wider than")
@pytest.mark.usefixtures("every_layer_apart")
@pytest.mark.parametrize("name", [*OPTIONS, "ekfac", "factor_rank"])
def test_a_pool_of_processes_does_not_change_a_bit(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    more: dict[str, Any] = {"ekfac": {"method": "ekfac"}, "factor_rank": RANK}
    options, pool = {**OPTIONS, **more}[name], OtherProcess()
    run = Run(**options)
    run.kfac.decompose_in(pool)
    elsewhere = run.until(20)
    assert run.kfac.refresh.ahead.work.elsewhere >= 6 and run.kfac.refresh.ahead.failures == 0
    monkeypatch.setattr(Ahead, "begin", lambda *_: None)
    for one, other in zip(elsewhere, Run(**options).until(20), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("every_layer_apart")
def test_what_a_lost_process_leaves_is_computed_here_with_one_warning() -> None:
    run = Run()
    run.kfac.decompose_in(OtherProcess(lost_after=3))
    with pytest.warns(UserWarning, match="computed here: EOFError") as warned:
        parameters = run.until(30)
    assert len([w for w in warned if "computed here" in str(w.message)]) == 1
    assert run.kfac.refresh.ahead.failures > 3
    for one, other in zip(parameters, Run().until(30), strict=True):
        assert torch.equal(one, other)
    copy.deepcopy(run)  # a pool has locks, which cannot be copied


@pytest.mark.usefixtures("every_layer_apart")
@pytest.mark.parametrize("at", range(6, 12))
def test_a_run_continues_bit_for_bit_in_the_middle_of_an_interval(at: int) -> None:
    run = Run()
    run.until(at)
    state = copy.deepcopy((run.kfac.state_dict(), run.optimizer.state_dict()))
    again = Run(copy.deepcopy(run.model))
    again.kfac.load_state_dict(state[0])
    again.optimizer.load_state_dict(state[1])
    for one, other in zip(run.until(20), again.until(20), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("every_layer_apart")
def test_a_copy_in_the_middle_of_an_interval_does_not_disturb_the_run() -> None:
    run = Run()
    run.until(10)
    twin = copy.deepcopy(run)
    twin.until(14)
    for one, other in zip(run.until(14), Run().until(14), strict=True):
        assert torch.equal(one, other)


@pytest.mark.usefixtures("every_layer_apart")
def test_what_was_begun_with_other_factors_is_not_used(begun: Counter[str]) -> None:
    run = Run()
    run.until(4)
    while not run.kfac.refresh.ahead._jobs:
        run.step()
    kfac, usage = run.kfac, run.kfac.memory_usage()["second_order"]
    names = [layer.name for layer in kfac.layers]
    i = names.index(next(iter(kfac.refresh.ahead._jobs)))
    due = next(s for s in range(kfac.steps, 20) if i in kfac.refresh.decompositions_due(s, set()))
    for factor in kfac.states[i].factors.values():
        factor.mul_(2.0)
    run.until(due)
    before = begun["taken"]
    run.until(due + 1)
    assert kfac.states[i].inverse_step == due and begun["taken"] == before
    values = torch.linalg.eigvalsh(kfac.states[i].factors["A"])
    torch.testing.assert_close(kfac.states[i].decomposition["A_values"][-1], values[-1])
    assert usage > kfac.memory_usage()["second_order"] - kfac.refresh.ahead.bytes


SMALL = {5, 6, 7}


@pytest.mark.usefixtures("every_layer_apart")
@pytest.mark.parametrize("intervals", [(10, 100), (5, 10), (4, 4), (3, 10), (1, 10)])
def test_every_layer_is_due_once_an_interval_and_after_its_statistics(
    intervals: tuple[int, int],
) -> None:
    factor_steps, inverse_steps = intervals
    kfac = KFAC(
        mlp([300, 500, 200, 300, 200, 30, 20, 20, 10]),
        stagger=True,
        factor_update_steps=lambda step: factor_steps,
        inverse_update_steps=lambda step: inverse_steps,
    )
    for start in (inverse_steps, 3 * inverse_steps):
        statistics: Counter[int] = Counter()
        decompositions: Counter[int] = Counter()
        for step in range(start, start + inverse_steps * factor_steps):
            due = kfac.refresh.statistics_due(step)
            statistics.update(i for i, names in enumerate(due) if names)
            now = kfac.refresh.decompositions_due(step, set())
            decompositions.update(now)
            if factor_steps > 1 and inverse_steps % factor_steps == 0:
                assert all(bool(due[i]) == (i in SMALL) for i in now)
        layers = range(len(kfac.layers))
        assert statistics == dict.fromkeys(layers, inverse_steps)
        assert decompositions == dict.fromkeys(layers, factor_steps)


def test_work_is_balanced() -> None:
    layers = KFAC(mlp([256] * 21)).layers
    offsets = spread(layers, 10, 100, rows={layer.name: 512 for layer in layers})
    assert Counter(offsets.statistics) == dict.fromkeys(range(10), 2)
    pairs = zip(offsets.statistics, offsets.decompositions, strict=True)
    assert {(d - s) % 10 for s, d in pairs} == {offsets.delay} == {9}
    assert max(Counter(offsets.decompositions).values()) <= 2
    busy = Counter((d - gap) % 100 for d in offsets.decompositions for gap in range(9))
    assert max(busy.values()) <= 4  # of 20 layers
    # Nothing is gained by watching the passes of a small model more often.
    assert set(spread(layers, 10, 100, rows={}).statistics) == {0}


def test_balanced_puts_the_largest_first_into_the_emptiest() -> None:
    assert balanced([1, 5, 3, 3], 2) == [0, 0, 1, 1]
    assert balanced([7, 7], 10) == [0, 5]
    assert balanced([], 4) == []


def test_sampled_labels_take_their_passes_together() -> None:
    kfac = KFAC(mlp(WIDE), fisher="1mc", **INTERVALS)
    for step in range(7):
        assert [bool(names) for names in kfac.refresh.statistics_due(step)] == [step % 3 == 0] * 4


def test_null_spreads_over_long_intervals() -> None:
    def together(**options: Any) -> bool:
        refresh = KFAC(mlp([256] * 4), **options).refresh
        return len(refresh.decompositions_due(200, set())) == 3

    assert together()
    assert together(factor_update_steps=1, inverse_update_steps=100)
    assert together(factor_update_steps=10, inverse_update_steps=100, stagger=False)
    assert not together(factor_update_steps=10, inverse_update_steps=100)
    assert not together(stagger=True)


@pytest.mark.usefixtures("every_layer_apart")
def test_busy_steps_are_those_with_something_due() -> None:
    kfac = KFAC(mlp(WIDE), **INTERVALS)
    rows = dict.fromkeys((layer.name for layer in kfac.layers), 8)

    def busy(**changes: Any) -> tuple[int, int]:
        return busy_steps(kfac.layers, kfac.options.model_copy(update=changes), rows)

    # Four layers in intervals of 3 and 6 steps: as many as find a step of their own.
    assert busy()[0] == 3
    assert 3 <= busy()[1] <= 4
    assert busy(stagger=False) == busy(refresh="adaptive") == (1, 1)
    assert busy(fisher="1mc")[0] == 1
    kfac.refresh.see(rows)
    due = [any(kfac.refresh.statistics_due(step)) for step in range(6, 9)]
    assert sum(due) == busy()[0]


@pytest.mark.usefixtures("every_layer_apart")
def test_a_layer_that_no_pass_has_used_when_it_is_due_is_no_error() -> None:
    from elastic_kfac.config.kfac import ShardedConfig

    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(300, 300), "b": nn.Linear(300, 300)})
    sharding = ShardedConfig(gather="gradients")
    kfac = KFAC(model, factor_update_steps=2, stagger=True, sharding=sharding)
    due = []
    for step in range(4):
        model.zero_grad()
        x = model["a"](torch.randn(8, 300))
        (x if step == 1 else model["b"](x)).square().mean().backward()
        due.append([bool(names) for names in kfac.due])
        kfac.step()
    assert due[1] in ([True, False], [False, True]) and due[1] != due[2]
    assert sum(state.factor_updates for state in kfac.states) in (4, 5)


class Tokens(nn.Module):
    """Called with no tensor of its own. Layers behind the first see one row per token, the last one not
    of all."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Linear(6, 8), nn.Linear(8, 7), nn.Linear(7, 5)

    def forward(self, batch: Mapping[str, list[Tensor]]) -> Tensor:
        x = torch.tanh(self.embed(batch["parts"][0]))
        rows = torch.tanh(self.inner(x.flatten(0, 1)))
        return self.head(rows.unflatten(0, x.shape[:2])[:, 1:])


@pytest.mark.usefixtures("every_layer_apart")
@pytest.mark.parametrize("reduction", ["mean", "positions"])
def test_statistics_of_layers_on_steps_of_their_own_are_those_of_all_layers(reduction: str) -> None:
    torch.manual_seed(0)
    model = Tokens()
    inputs = [torch.randn(9, 4, 6) for _ in range(7)]
    targets = [torch.randint(5, (9, 3)) for _ in range(7)]

    def seen(**intervals: Any) -> list[list[dict[str, Tensor]]]:
        its = copy.deepcopy(model)
        kfac = KFAC(its, lr=0.1, loss_reduction=reduction, **intervals)
        found, update = [], kfac.averages.update

        def keep(statistics: Any, *rest: Any) -> Any:
            found.append([{k: v.clone() for k, v in sums.items()} for sums in statistics.sums])
            return update(statistics, *rest)

        with mock.patch.object(kfac.averages, "update", keep):
            for x, y in zip(inputs, targets, strict=True):
                its.zero_grad()
                F.cross_entropy(its({"parts": [x]}).flatten(0, 1), y.flatten()).backward()
                kfac.step()
        return found

    everywhere, apart = seen(factor_update_steps=1), seen(**INTERVALS)
    assert len(everywhere) == len(apart) == 7
    counts = []
    for all_layers, some in zip(everywhere, apart, strict=True):
        due = [i for i, sums in enumerate(some) if sums]
        counts.append(len(due))
        for i in due:
            torch.testing.assert_close(some[i], all_layers[i], rtol=0, atol=0)
    assert counts == [3, 1, 1, 1, 1, 1, 1]
