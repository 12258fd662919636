"""Half precision, non-finite numbers, failing decompositions, schedules and bad input."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC, EnginePreconditioner
from elastic_kfac.config.kfac import ShardedConfig
from elastic_kfac.curvature import inverses
from elastic_kfac.errors import ConfigError, NumericalError, UsageError


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)


def data(n: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 4, generator=generator), torch.randint(3, (n,), generator=generator)


def test_grad_scaler_gives_the_factors_of_an_unscaled_run() -> None:
    x, y = data()
    plain, scaled = network(), network()
    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    kfacs = [KFAC(plain), KFAC(scaled, grad_scaler=scaler)]
    optimizer = torch.optim.SGD(scaled.parameters(), lr=0.1)
    F.cross_entropy(plain(x), y).backward()
    kfacs[0].step()
    scaler.scale(F.cross_entropy(scaled(x), y)).backward()
    scaler.unscale_(optimizer)
    kfacs[1].step()
    for one, other in zip(*(k.states for k in kfacs), strict=True):
        torch.testing.assert_close(one.factors["G"], other.factors["G"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(one.factors["A"], other.factors["A"], rtol=0, atol=0)


def test_overflow_step_is_skipped_whole_and_factors_stay() -> None:
    x, y = data()
    model = network()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    kfac = KFAC(model, grad_scaler=scaler, inverse_update_steps=1)
    weights = []
    for step in range(3):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), y)
        if step == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        before = [state.factors.get("G", torch.zeros(1)).clone() for state in kfac.states]
        kfac.step()
        scaler.step(optimizer)
        scaler.update()
        weights.append(model[0].weight.detach().clone())
        if step == 1:
            for state, known in zip(kfac.states, before, strict=True):
                assert torch.equal(state.factors["G"], known)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])
    assert kfac.steps == 2
    assert kfac.counters["skipped_steps"] == 1
    assert scaler.get_scale() == 4.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_statistics_and_decompositions_are_float32(dtype: torch.dtype) -> None:
    x, y = data()
    model, reference = network(), network()
    kfac, exact = KFAC(model), KFAC(reference)
    with torch.autocast("cpu", dtype=dtype):
        loss = F.cross_entropy(model(x), y)
    loss.backward()
    kfac.step()
    F.cross_entropy(reference(x), y).backward()
    exact.step()
    for state, other in zip(kfac.states, exact.states, strict=True):
        tensors = [*state.factors.values(), *state.decomposition.values()]
        assert {t.dtype for t in tensors} == {torch.float32}
        for name in ("A", "G"):
            error = (state.factors[name] - other.factors[name]).norm() / other.factors[name].norm()
            assert error < 0.03


def test_half_precision_parameters_keep_float32_factors_and_their_own_gradient_dtype() -> None:
    x, y = data()
    model = network(torch.bfloat16)
    kfac = KFAC(model)
    F.cross_entropy(model(x.bfloat16()).float(), y).backward()
    kfac.step()
    assert model[0].weight.grad.dtype == torch.bfloat16
    assert kfac.states[0].factors["A"].dtype == torch.float32


def test_nan_batch_never_enters_the_average() -> None:
    x, y = data()
    model = network()
    kfac = KFAC(model, inverse_update_steps=1)
    F.cross_entropy(model(x), y).backward()
    kfac.step()
    known = {x: {n: t.clone() for n, t in f.items()} for x, f in kfac.factors().items()}
    model.zero_grad()
    poisoned = x.clone()
    poisoned[2, 1] = float("nan")
    F.cross_entropy(model(poisoned), y).backward()
    kfac.step()
    assert kfac.counters["discarded_statistics"] == 2
    for layer, factors in kfac.factors().items():
        for name, value in known[layer].items():
            assert torch.equal(factors[name], value)
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    kfac.step()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    assert kfac.states[0].factor_updates == 2


def test_failed_decomposition_keeps_the_previous_one_and_is_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, y = data()
    model = network()
    kfac = KFAC(model, inverse_update_steps=1)
    F.cross_entropy(model(x), y).backward()
    kfac.step()
    known = kfac.states[0].decomposition["A_vectors"].clone()

    def failing(matrix: Tensor) -> tuple[Tensor, Tensor]:
        raise NumericalError("no luck")

    monkeypatch.setattr(inverses, "eigen", failing)
    model.zero_grad()
    F.cross_entropy(model(2 * x), y).backward()
    kfac.step()
    assert torch.equal(kfac.states[0].decomposition["A_vectors"], known)
    assert kfac.counters["inverse_failures"] == 2
    model = network()
    fresh = KFAC(model)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(NumericalError, match="no luck"):
        fresh.step()


def test_batch_norm_with_non_finite_result_keeps_its_raw_gradient_and_is_counted() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    x, y = data()
    kfac = KFAC(model, inverse_update_steps=10, kl_clip=None)
    F.cross_entropy(model(x), y).backward()
    kfac.step()
    kfac.states[1].decomposition["F_inverse"][0, 0, 0] = float("nan")
    model.zero_grad()
    F.cross_entropy(model(x), y).backward()
    raw = model[1].weight.grad.clone()
    kfac.step()
    assert torch.equal(model[1].weight.grad, raw)
    assert kfac.metrics()["fallbacks"] == 1


@pytest.mark.parametrize("stagger", [False, True])
def test_intervals_and_stagger_decompose_each_layer_when_due(stagger: bool) -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)])
    kfac = KFAC(model, factor_update_steps=3, inverse_update_steps=6, stagger=stagger)
    x = torch.randn(8, 4)
    ages: list[list[int]] = []
    updates = []
    for _ in range(13):
        model.zero_grad()
        model(x).square().mean().backward()
        kfac.step()
        ages.append([state.inverse_step for state in kfac.states])
        updates.append([state.factor_updates for state in kfac.states])
    # Layers this small share the step of their statistics.
    assert updates == [[1 + step // 3] * 3 for step in range(13)]
    if stagger:  # in the second of two steps with statistics: nothing is newer in the first
        assert ages == [[0] * 3] * 3 + [[3] * 3] * 6 + [[9] * 3] * 4
    else:
        assert ages == [[step - step % 6] * 3 for step in range(13)]


def test_lr_from_optimizer_follows_its_schedule() -> None:
    x, y = data()
    scales = []
    for lr in (0.1, 10.0):
        model = network()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        kfac = KFAC(model, lr=optimizer, kl_clip=1e-3)
        F.cross_entropy(model(x), y).backward()
        kfac.step()
        scales.append(kfac.kl_clip_scale)
    assert scales[0] == pytest.approx(100 * scales[1], rel=1e-6)
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    model = network()
    kfac = KFAC(model, lr=other)
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ConfigError, match="does not hold the weight of layer 0"):
        kfac.step()


BAD = {
    "damping": 0,
    "factor_decay": 1.0,
    "factor_update_steps": 0,
    "inverse_update_steps": 2.5,
    "kl_clip": -1e-3,
    "lr": float("nan"),
    "grad_worker_frac": 3,
    "method": "lu",
    "inverse_damping": "tau",
    "factor_scale": "mine",
    "fisher": "type1",
    "weight_sharing": "both",
    "bn_fisher": "all",
    "ema_init": "zero",
    "bn_damping_multiplier": 0,
    "weight_decay": -1,
    "accumulation_steps": 0,
}


@pytest.mark.parametrize("name", BAD)
def test_bad_value_names_field_value_and_range(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KFAC(network(), **{name: BAD[name]})
    line = str(caught.value)
    assert line.startswith(name) and f"given: {BAD[name]}" in line and "allowed: " in line


def test_bad_scheduled_value_is_refused_at_its_step() -> None:
    model = network()
    kfac = KFAC(model, damping=lambda step: 1.0 - step)
    x, y = data()
    F.cross_entropy(model(x), y).backward()
    kfac.step()
    F.cross_entropy(model(x), y).backward()
    with pytest.raises(ConfigError, match="damping at step 1 is out of range; given: 0"):
        kfac.step()


def test_contradicting_options_are_refused() -> None:
    with pytest.raises(ConfigError, match="precompute"):
        KFAC(network(), precompute=True, method="inverse")
    with pytest.raises(ConfigError, match="precompute"):
        KFAC(network(), precompute=True, colocate=False)


def test_step_without_gradients_or_statistics_says_so() -> None:
    model = network()
    kfac = KFAC(model)
    with pytest.raises(UsageError, match="no gradients"):
        kfac.step()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(UsageError, match="no statistics"):
        kfac.step()
    with pytest.raises(UsageError, match="sampled Fisher"):
        kfac.sample_fisher(torch.randn(2, 2))
    sampled = KFAC(network(), fisher="1mc")
    with pytest.raises(UsageError, match="needs a step"):
        sampled.predicted_change()


def test_kl_clip_none_leaves_the_length_alone() -> None:
    x, y = data()
    model = network()
    kfac = KFAC(model, kl_clip=None)
    F.cross_entropy(model(x), y).backward()
    kfac.step()
    assert kfac.kl_clip_scale == 1.0


def test_predicted_change_matches_a_quadratic_loss() -> None:
    # For a linear model with squared error, exact Fisher and tiny damping the model is the loss.
    torch.manual_seed(0)
    model = nn.Linear(5, 1, bias=False).double()
    x, y = torch.randn(30, 5).double(), torch.randn(30, 1).double()
    kfac = KFAC(model, lr=0.3, fisher="exact", damping=1e-12, kl_clip=None)

    def loss() -> Tensor:
        return 0.5 * (model(x) - y).square().sum() / 30

    output = model(x)
    kfac.sample_fisher(output, likelihood="gaussian")
    before = 0.5 * (output - y).square().sum() / 30
    before.backward()
    kfac.step()
    predicted = kfac.predicted_change()
    with torch.no_grad():
        model.weight -= 0.3 * model.weight.grad
    assert predicted == pytest.approx(float((loss() - before).detach()), rel=1e-8)


class _Kinds(nn.Module):
    """Factors of every kind: dense, of groups, diagonal, of normalisations."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(30, 12)
        self.norm = nn.Sequential(nn.LayerNorm(12), nn.LayerNorm(12, bias=False))
        self.first = nn.Linear(12, 8)
        self.grouped = nn.Conv2d(4, 6, 3, groups=2, padding=1)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, index: Tensor) -> Tensor:
        x = self.first(self.norm(self.table(index)))
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.grouped(x.reshape(len(x), 4, -1, 4))


@pytest.mark.parametrize("fraction", [1.0, "auto"])
@pytest.mark.parametrize("sharding", [None, ShardedConfig(gather="gradients")])
@pytest.mark.parametrize(
    ("method", "precompute"), [("eigen", False), ("eigen", True), ("inverse", False)]
)
def test_memory_budget_is_what_the_state_takes_to_the_byte(
    fraction: float | str, sharding: ShardedConfig | None, method: str, precompute: bool
) -> None:
    def build(budget: int | None) -> KFAC:
        return KFAC(
            _Kinds(),
            method=method,
            precompute=precompute,
            grad_worker_frac=fraction,
            sharding=sharding,
            memory_budget_bytes=budget,
            loss_reduction="mean",
        )

    kfac = build(None)
    kfac._model(torch.randint(30, (5, 6))).square().sum().backward()
    kfac.step()
    usage = kfac.memory_usage()
    needed = usage["factors"] + usage["second_order"]
    assert build(needed).plan == kfac.plan
    with pytest.raises(ConfigError) as error:
        build(needed - 1)
    assert "\n" not in str(error.value)
    assert f"memory_budget_bytes={needed - 1}" in str(error.value)
    assert f"at least {needed} bytes" in str(error.value)


class _Engine:
    """A stand-in for an engine that owns backward, accumulation and loss scaling (DeepSpeed-like)."""

    def __init__(self, model: nn.Module, accumulation: int, loss_scale: float) -> None:
        self.module = model
        self.accumulation = accumulation
        self.loss_scale = loss_scale
        self._backwards = 0

    def gradient_accumulation_steps(self) -> int:
        return self.accumulation

    def is_gradient_accumulation_boundary(self) -> bool:
        return self._backwards % self.accumulation == 0

    def backward(self, loss: Tensor) -> None:
        (loss * self.loss_scale / self.accumulation).backward()
        self._backwards += 1


def test_engine_adapter_steps_at_boundaries_with_unscaled_statistics() -> None:
    x, y = data()
    plain, owned = network(), network()
    reference = KFAC(plain)
    engine = _Engine(owned, accumulation=2, loss_scale=256.0)
    preconditioner = EnginePreconditioner(KFAC(owned), engine, loss_scale=lambda: engine.loss_scale)
    stepped = []
    for part in (slice(0, 4), slice(4, 8)):
        F.cross_entropy(plain(x[part]), y[part]).div(2).backward()
        engine.backward(F.cross_entropy(owned(x[part]), y[part]))
        stepped.append(preconditioner.step())
    reference.step(loss_scale_per_sample=1 / 8)
    assert stepped == [False, True]
    for one, other in zip(plain.parameters(), owned.parameters(), strict=True):
        torch.testing.assert_close(other.grad / 256, one.grad, rtol=1e-5, atol=1e-7)


def test_example_of_an_engine_learns() -> None:
    path = Path(__file__).parents[3] / "docs/examples/engine_loop.py"
    spec = importlib.util.spec_from_file_location("engine_loop", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    losses = module.train()
    assert losses[-1] < 0.5 * losses[0]
