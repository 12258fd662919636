"""KFAC's state continues a run bit for bit, and refuses what does not belong to it."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from elastic_kfac import KFAC
from elastic_kfac.config.kfac import LevenbergMarquardt
from elastic_kfac.errors import StateError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 16, 8),
        nn.Tanh(),
        nn.Linear(8, 4),
    )


CASES = {
    "plain": {},
    "mid-interval": {"factor_update_steps": 2, "inverse_update_steps": 4},
    "staggered": {"stagger": True, "inverse_update_steps": 3},
    "inverse": {"method": "inverse", "inverse_update_steps": 3},
    "precompute": {"precompute": True, "inverse_update_steps": 3},
    "identity start": {"ema_init": "identity"},
    "schedules": {
        "damping": lambda step: 0.01 * 0.9**step,
        "inverse_update_steps": lambda step: 2 if step < 4 else 3,
        "kl_clip": lambda step: 1e-3 / (1 + step),
    },
    "schedules of statistics": {
        "factor_decay": lambda step: 0.5 + 0.4 * step / (1 + step),
        "factor_update_steps": lambda step: 1 if step < 3 else 2,
        "inverse_update_steps": lambda step: 2 if step < 5 else 4,
    },
    "levenberg-marquardt": {"damping": LevenbergMarquardt(initial=0.1)},
    "adaptive trust region": {"trust_region": "adaptive"},
    "momentum before": {"momentum": 0.9},
    "overlap": {"overlap_reduction": True, "trust_region": "adaptive"},
    "overlap, mid-interval": {
        "overlap_reduction": True,
        "factor_update_steps": 2,
        "inverse_update_steps": 4,
    },
    "overlap, staggered": {
        "overlap_reduction": True,
        "stagger": True,
        "factor_update_steps": 2,
        "inverse_update_steps": 4,
        "damping": LevenbergMarquardt(initial=0.1),
    },
}


class Run:
    """A model, its optimizer and preconditioner, and data that depend on the step only."""

    def __init__(self, **options) -> None:
        self.model = network()
        behind = 0.0 if "momentum" in options else 0.9
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=behind)
        options = {"inverse_update_steps": 2, "damping": 0.01, **copy.deepcopy(options)}
        self.kfac = KFAC(self.model, lr=self.optimizer, **options)

    def steps(self, first: int, last: int) -> None:
        for step in range(first, last):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(6, 1, 4, 4, generator=generator)
            y = torch.randint(4, (6,), generator=generator)
            self.optimizer.zero_grad()
            loss = F.cross_entropy(self.model(x), y)
            loss.backward()
            self.kfac.step()
            self.optimizer.step()
            if self.kfac.damping_rule is not None:
                with torch.no_grad():
                    after = F.cross_entropy(self.model(x), y)
                self.kfac.adapt_damping(float(after - loss.detach()))

    def everything(self) -> dict[str, torch.Tensor]:
        state = dict(self.model.state_dict())
        for name, layer in self.kfac.state_dict()["layers"].items():
            for kind in ("factors", "second_order"):
                state |= {f"{name}.{kind}.{n}": t for n, t in layer[kind].items()}
        return state


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("first", [3, 5])
def test_save_and_load_continues_bit_for_bit(case: str, first: int) -> None:
    whole = Run(**CASES[case])
    whole.steps(0, 2 * first)
    half = Run(**CASES[case])
    half.steps(0, first)
    saved = io.BytesIO()
    torch.save(
        [half.model.state_dict(), half.optimizer.state_dict(), half.kfac.state_dict()], saved
    )
    saved.seek(0)
    model, optimizer, kfac = torch.load(saved, weights_only=False)
    again = Run(**CASES[case])
    again.steps(0, 1)  # a preconditioner that has already seen something else
    again.model.load_state_dict(model)
    again.optimizer.load_state_dict(optimizer)
    again.kfac.load_state_dict(kfac)
    again.steps(first, 2 * first)
    expected, result = whole.everything(), again.everything()
    assert expected.keys() == result.keys()
    for name, value in expected.items():
        assert torch.equal(value, result[name]), name
    assert again.kfac.counters == whole.kfac.counters


def test_state_names_do_not_depend_on_wrappers() -> None:
    plain = KFAC(network()).state_dict()["layers"]
    compiled = KFAC(torch.compile(network())).state_dict()["layers"]
    inner = network()
    inner[4] = torch.compile(inner[4])
    assert list(plain) == list(compiled) == list(KFAC(inner).state_dict()["layers"])


def test_state_of_another_model_is_refused_with_the_names_and_nothing_changes() -> None:
    run = Run()
    run.steps(0, 2)
    before = run.everything()
    other = KFAC(nn.Sequential(nn.Linear(2, 2))).state_dict()
    with pytest.raises(StateError, match=r"given: layers only in the state: none; .*: 1, 4, 6"):
        run.kfac.load_state_dict(other)
    for name, value in run.everything().items():
        assert torch.equal(value, before[name])


def test_state_with_other_shapes_options_or_version_is_refused() -> None:
    run = Run()
    run.steps(0, 2)
    state = run.kfac.state_dict()
    narrow = network()
    narrow[6] = nn.Linear(8, 5)
    with pytest.raises(StateError, match="layer 6 have other shapes"):
        KFAC(narrow, damping=0.01).load_state_dict(state)
    with pytest.raises(StateError, match="another method; given: eigen; allowed: inverse"):
        KFAC(network(), method="inverse").load_state_dict(state)
    with pytest.raises(StateError, match="unknown version"):
        KFAC(network()).load_state_dict({**state, "version": 99})


def test_memory_usage_counts_real_bytes_by_category() -> None:
    model = nn.Sequential(nn.Linear(3, 2)).double()
    kfac = KFAC(model)
    assert kfac.memory_usage() == {"factors": 0, "second_order": 0, "pending": 0, "total": 0}
    model(torch.randn(4, 3, dtype=torch.double)).sum().backward()
    assert kfac.memory_usage()["pending"] == 8 * (16 + 4)
    kfac.step()
    usage = kfac.memory_usage()
    assert usage["factors"] == 8 * (16 + 4)
    assert usage["second_order"] == 8 * (16 + 4 + 4 + 2)
    assert usage["pending"] == 0
