"""All kinds in one model in training loops; kinds that are not covered, parameters as inputs."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn

from elastic_kfac import KFAC
from support.layer_kinds import N, loss_of
from support.training_loops import assert_same_factors, seeded, stepped


class Net(nn.Module):
    """The kinds in one model, on `[n, 2, 4]`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv1d(2, 4, 3, padding=1, padding_mode="circular")
        self.up = nn.ConvTranspose1d(4, 3, 3, stride=2, groups=1)
        self.volume = nn.Conv3d(3, 4, (1, 1, 3))
        self.norm = nn.RMSNorm(4)
        self.encoder, self.decoder = nn.Linear(4, 4), nn.Linear(4, 4)
        self.decoder.weight = self.encoder.weight
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.up(torch.tanh(self.conv(x))))
        x = self.volume(x[:, :, None, None]).flatten(2).mT
        out: Tensor = self.decoder(torch.tanh(self.encoder(self.norm(x)))).mean(1)
        return out


IMAGES = torch.randn(8, 2, 4, generator=seeded(7)).double()
LABELS = torch.randint(4, (8,), generator=seeded(8))


def entropy(model: nn.Module, rows: slice = slice(None)) -> Tensor:
    return F.cross_entropy(model(IMAGES[rows]), LABELS[rows])


def accumulated(model: nn.Module) -> None:
    for rows in (slice(0, 4), slice(4, 8)):
        (entropy(model, rows) / 2).backward()


def several_passes(model: nn.Module) -> None:
    loss = entropy(model)
    (0.25 * loss).backward(retain_graph=True)
    (0.75 * loss).backward()


def after_a_dropped_batch(model: nn.Module) -> None:
    (100 * entropy(model, slice(0, 3))).backward()
    model.zero_grad()
    torch.autograd.grad(entropy(model, slice(2, 5)), list(model.parameters()))
    entropy(model).backward()


def checkpointed(model: nn.Module) -> None:
    out = torch.utils.checkpoint.checkpoint(model, IMAGES, use_reentrant=False)
    F.cross_entropy(out, LABELS).backward()


LOOPS: list[tuple[Callable[[nn.Module], None], dict[str, Any]]] = [
    (accumulated, {"accumulation_steps": 2}),
    (several_passes, {}),
    (after_a_dropped_batch, {}),
    (checkpointed, {}),
]


@pytest.mark.parametrize(("loop", "options"), LOOPS)
def test_kinds_in_training_loops_equal_one_pass(
    loop: Callable[[nn.Module], None], options: dict[str, Any]
) -> None:
    right = stepped(lambda model: entropy(model).backward(), Net)
    found = stepped(loop, Net, **options)
    assert set(found.coverage().values()) == {"covered"}
    assert_same_factors(found, right)


def test_an_empty_batch_leaves_every_kind_as_it_was() -> None:
    model = Net()
    kfac = KFAC(model, kl_clip=None)
    entropy(model).backward()
    kfac.step()
    before = copy.deepcopy(kfac.factors())
    model.zero_grad()
    F.cross_entropy(model(IMAGES[:0]), LABELS[:0], reduction="sum").backward()
    kfac.step()
    for name, factors in kfac.factors().items():
        for factor, value in factors.items():
            assert torch.equal(value, before[name][factor])
    assert all(float(p.grad.abs().sum()) == 0 for p in model.parameters() if p.grad is not None)


@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # RMSNorm under autocast, torch's own
def test_kinds_in_half_precision_and_autocast_stay_near_float64() -> None:
    right = stepped(lambda m: F.cross_entropy(m(IMAGES), LABELS).backward(), Net).factors()

    def half(model: nn.Module) -> None:
        F.cross_entropy(model(IMAGES.bfloat16()).float(), LABELS).backward()

    def cast(model: nn.Module) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            out = model(IMAGES.float())
        F.cross_entropy(out.float(), LABELS).backward()

    for found in (stepped(half, lambda: Net().bfloat16()), stepped(cast, lambda: Net().float())):
        assert set(found.coverage().values()) == {"covered"}
        for name, factors in right.items():
            for factor, value in factors.items():
                error = (found.factors()[name][factor] - value).norm() / value.norm()
                assert float(error) < 0.1, (name, factor)


@pytest.mark.filterwarnings("ignore")  # what the compiler itself warns of is not ours
def test_compiled_kinds_equal_eager_without_a_graph_break() -> None:
    gc.collect()  # what other tests still record with would be seen by the compiler
    eager, compiled = Net(), Net()
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph)
        return graph.forward

    runs = []
    for model, called in (
        (eager, eager),
        (compiled, torch.compile(compiled, backend=backend, fullgraph=True)),
    ):
        kfac = KFAC(called, kl_clip=None, factor_update_steps=2)
        for _ in range(4):
            model.zero_grad()
            F.cross_entropy(called(IMAGES), LABELS).backward()
            kfac.step()
        kfac.close()
        runs.append(kfac)
    assert_same_factors(*runs)
    assert len(graphs) == 2  # with statistics and without


class Queries(nn.Module):
    """Parameters `[k, 4]` that every sample is compared with."""

    def __init__(self, k: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.queries = nn.Parameter(torch.randn(k, 4))
        self.project, self.embed = nn.Linear(4, 4), nn.Linear(4, 4)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.tanh(self.embed(x)) @ self.project(self.queries).t()
        return out


@pytest.mark.parametrize("k", [N - 1, N, 4 * N])
def test_a_parameter_as_input_is_shared_by_all_samples(k: int) -> None:
    model = Queries(k)
    with pytest.warns(UserWarning, match="Queries"):
        kfac = KFAC(model, kl_clip=None)
    loss_of(model(torch.randn(N, 4, generator=seeded(1)).double())).backward()
    with pytest.warns(UserWarning, match=rf"project \(its input of {k} rows is shared by all"):
        kfac.step()
    assert kfac.coverage()["embed"] == "covered" and "project" not in kfac.factors()


def test_parameters_that_are_samples_count_where_their_number_is_given() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    codes = nn.Parameter(torch.randn(N, 4, generator=seeded(1)).double())
    kfacs = []
    for inputs in (codes, codes.detach()):
        kfac = KFAC(model, kl_clip=None)
        model.zero_grad()
        with kfac.micro_batch(N):
            loss_of(model(inputs)).backward()
        kfac.step()
        kfacs.append(kfac)
    assert_same_factors(*kfacs)


@pytest.mark.parametrize("kind", [nn.RNN, nn.LSTM, nn.GRU, nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_recurrent_modules_are_named_and_keep_their_gradient(kind: Any) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"memory": kind(4, 3), "head": nn.Linear(3, 2)}).double()
    with pytest.warns(UserWarning, match=rf"memory \({kind.__name__}\)"):
        kfac = KFAC(model, kl_clip=None)
    assert kind.__name__ in kfac.coverage()["memory"]
    out = model["memory"](torch.randn(N, 4, generator=seeded(1)).double())
    while isinstance(out, tuple):
        out = out[0]
    loss_of(model["head"](out)).backward()
    plain = [p.grad.clone() for p in model["memory"].parameters()]  # type: ignore[union-attr]
    before = model["head"].weight.grad.clone()  # type: ignore[union-attr, operator]
    kfac.step()
    assert all(map(torch.equal, plain, [p.grad for p in model["memory"].parameters()]))  # type: ignore[arg-type]
    assert not torch.equal(before, model["head"].weight.grad)  # type: ignore[arg-type]
