"""The public surface of KFAC: options, factors, coverage."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.config import KfacConfig, ShardedConfig, parse_config
from elastic_kfac.config.kfac import KfacOptions, MilestoneSchedule
from elastic_kfac.errors import ConfigError, StateError
from support.kronecker import dense_layers


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.Tanh(), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(48, 4)
    ).double()


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(6, 1, 6, 6, dtype=torch.double, generator=generator)
    return x, torch.randint(4, (6,), generator=generator)


def step(model: nn.Module, kfac: KFAC) -> None:
    x, y = batch()
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    kfac.step()


def test_factors_are_named_by_layer_and_equal_dense_statistics() -> None:
    model = network()
    kfac = KFAC(model)
    assert kfac.factors() == {}
    step(model, kfac)
    factors = kfac.factors()
    assert {name: sorted(parts) for name, parts in factors.items()} == {
        "0": ["A", "G"],
        "2": ["F"],
        "4": ["A", "G"],
    }
    for name, dense in dense_layers(copy.deepcopy(model), *batch()).items():
        for factor, value in dense.items():
            torch.testing.assert_close(factors[name][factor], value, rtol=1e-10, atol=1e-12)
    assert factors["2"]["F"].shape == (3, 2, 2)


class _Everything(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.covered = nn.Linear(4, 4)
        self.unused = nn.Linear(4, 4)
        self.skipped = nn.Linear(4, 4)
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.partly = nn.Linear(4, 4)
        self.partly.weight.requires_grad_(False)
        self.unsupported = nn.PReLU()
        self.table = nn.Embedding(5, 4, sparse=True)
        self.attention = nn.MultiheadAttention(4, 1)
        self.tied = nn.Linear(4, 4)
        self.other = nn.Embedding(4, 4)
        self.other.weight = self.tied.weight
        self.plain = nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.unsupported(self.skipped(self.covered(x)))


def test_coverage_names_every_layer_with_parameters_and_the_reason() -> None:
    model = _Everything()
    with pytest.warns(UserWarning, match="does not precondition: partly"):
        kfac = KFAC(model, skip_layers=("^skip",))
    expected = {
        "covered": "covered",
        "unused": "covered",
        "skipped": "skip_layers matches it: ^skip",
        "frozen": "frozen",
        "partly": "its weight is frozen",
        "unsupported": "unsupported type PReLU",
        "table": "unsupported options: sparse, max_norm or scale_grad_by_freq",
        **{f"attention.{part}_proj": "covered" for part in ("q", "k", "v", "out")},
        "tied": "shares a weight with other",
        "other": "shares a weight with tied",
    }
    assert kfac.coverage() == expected
    model(torch.randn(3, 4)).sum().backward()
    kfac.step()
    for name in ("unused", *(f"attention.{part}_proj" for part in ("q", "k", "v", "out"))):
        expected[name] = "unused: no pass has gone through it"
    assert kfac.coverage() == expected


def test_every_option_is_in_signature_docstring_and_configuration() -> None:
    parameters = inspect.signature(KFAC).parameters
    for name, field in KfacOptions.model_fields.items():
        assert parameters[name].default == field.default
        assert f"\n    {name}: " in KFAC.__doc__ and field.description
    assert set(KfacConfig.model_fields) == {*KfacOptions.model_fields, "enabled"}


def test_keywords_replace_parts_of_a_configuration() -> None:
    config = parse_config({"kfac": {"method": "inverse", "damping": 0.5}}).kfac
    kfac = KFAC(network(), config, damping=0.25)
    assert (kfac.options.method, kfac.damping) == ("inverse", 0.25)


def test_unknown_option_is_refused_with_a_suggestion() -> None:
    with pytest.raises(ConfigError, match=r"no option dampin; .*did you mean damping"):
        KFAC(network(), dampin=0.1)
    with pytest.raises(ConfigError, match="no option enabled"):
        KFAC(network(), enabled=True)


REFUSED = {
    "precompute caches eigenvalue products": {"precompute": True, "method": "inverse"},
    "precompute needs both factors": {"precompute": True, "colocate": False},
    "stagger spreads a fixed interval": {"stagger": True, "refresh": "adaptive"},
    "tree and sharding both reduce": {"tree": True, "sharding": ShardedConfig()},
}


@pytest.mark.parametrize("reason", REFUSED)
def test_combination_that_cannot_be_is_refused_in_one_line(reason: str) -> None:
    """Everything else goes with everything: tests/distributed/optimizers/test_sharded_kfac.py."""
    with pytest.raises(ConfigError, match=reason) as refused:
        KFAC(network(), **REFUSED[reason])
    assert "\n" not in str(refused.value)


def test_schedule_is_a_value_that_a_configuration_holds() -> None:
    schedule = {"schedule": "milestones", "start": 2, "factor": 2, "milestones": [3]}
    config = parse_config({"kfac": {"factor_update_steps": schedule}}).kfac
    assert config.factor_update_steps == MilestoneSchedule(start=2, factor=2, milestones=(3,))
    model = network()
    kfac = KFAC(model, config)
    due = []
    for _ in range(9):
        due.append(kfac.factors_due())
        step(model, kfac)
    assert [index for index, is_due in enumerate(due) if is_due] == [0, 2, 4, 8]


def test_several_draws_of_labels_reach_normalisation_layers() -> None:
    model, (x, _) = network(), batch()
    scatter = []
    for draws in (1, 400):
        kfac = KFAC(model, fisher="mc")
        output = model(x)
        kfac.sample_fisher(output, draws=draws, generator=torch.Generator().manual_seed(0))
        model.zero_grad()
        output.sum().backward()
        kfac.step()
        kfac.close()
        scatter.append(kfac.factors()["2"]["F"])
    exact = KFAC(model, fisher="exact")
    output = model(x)
    exact.sample_fisher(output)
    output.sum().backward()
    exact.step()
    reference = exact.factors()["2"]["F"]
    errors = [float((value - reference).norm() / reference.norm()) for value in scatter]
    assert errors[1] < 0.2 and errors[1] < errors[0]


def test_momentum_of_the_sharded_update_is_not_lost_silently() -> None:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sharded = KFAC(model, lr=optimizer, sharding=ShardedConfig())
    step(model, sharded)
    with pytest.raises(StateError, match="it holds momentum"):
        KFAC(network()).load_state_dict(sharded.state_dict())
    gathered = KFAC(network(), sharding=ShardedConfig(gather="gradients"))
    grid = KFAC(model)
    step(model, grid)
    gathered.load_state_dict(grid.state_dict())
    assert gathered.steps == 1


def test_what_other_libraries_take_is_refused_with_the_right_call() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    right = r"KFAC\(model, lr=optimizer\)"
    for wrong in (model.parameters(), list(model.parameters()), model.state_dict(), optimizer):
        with pytest.raises(ConfigError, match=rf"takes the model itself.*{right}"):
            KFAC(wrong)  # type: ignore[arg-type]
    for wrong in (optimizer, scheduler, 0.1, model):
        with pytest.raises(ConfigError, match=rf"second argument.*{right}"):
            KFAC(model, wrong)  # type: ignore[arg-type]
    for wrong in (scheduler, [optimizer, scheduler], "0.1", [0.1]):
        with pytest.raises(ConfigError, match=r"give the optimizer.*lr=optimizer"):
            KFAC(model, lr=wrong)  # type: ignore[arg-type]
    assert KFAC(model, lr=[optimizer]).coverage()
