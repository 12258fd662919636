"""Wide sides: what is kept is exact against dense algebra with everything else set to zero."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.curvature import kronecker, preconditioning
from elastic_kfac.curvature.sides import Blocks, Side, Whole
from elastic_kfac.errors import ConfigError, StateError
from support.training_loops import seeded

pytestmark = pytest.mark.filterwarnings("ignore:factors wider than max_factor_dim")

TOLERANCE = {"rtol": 1e-9, "atol": 1e-11}
DAMPING = 0.05


def kept_of(dense: Tensor, block: int) -> Tensor:
    """A dense factor whose entries outside blocks on the diagonal are zero, by definition."""
    place = torch.arange(dense.shape[-1]) // block
    return dense * (place[:, None] == place)


def dense_form(side: Side, factor: Tensor) -> Tensor:
    """The dense matrix that stands behind a kept factor."""
    if isinstance(side, Whole):
        return factor
    blocks = factor if isinstance(side, Blocks) else factor.view(-1, 1, 1)
    return torch.block_diag(*blocks)[: side.width, : side.width]


def preconditioned(a: Tensor, g: Tensor, d: Tensor, method: str, split: str) -> Tensor:
    """P by one dense solve."""
    eye_a, eye_g = (torch.eye(len(x), dtype=x.dtype) for x in (a, g))
    if method == "eigen":
        matrix = torch.kron(g, a) + DAMPING * torch.kron(eye_g, eye_a)
    else:
        root = math.sqrt(DAMPING)
        pi = math.sqrt((a.trace() / len(a)) / (g.trace() / len(g))) if split == "pi" else 1.0
        shifts = (DAMPING, DAMPING) if split == "plain" else (pi * root, root / pi)
        matrix = torch.kron(g + shifts[1] * eye_g, a + shifts[0] * eye_a)
    return torch.linalg.solve(matrix, d.reshape(-1)).reshape(d.shape)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...], int, tuple[int, int]]] = {
    # module, input, max_factor_dim, block of A and of G (0 is the whole factor)
    "both sides": (nn.Linear(35, 36), (6, 3, 35), 34, (2, 2)),
    "no bias": (nn.Linear(35, 36, bias=False), (6, 35), 34, (2, 2)),
    "inputs": (nn.Linear(90, 5), (6, 90), 85, (5, 0)),
    "outputs": (nn.Linear(5, 93), (6, 5), 85, (0, 4)),
    "a bias is not counted": (nn.Linear(12, 5), (6, 12), 12, (0, 0)),
    "diagonals": (nn.Linear(18, 20), (6, 18), 1, (1, 1)),
    "table": (nn.Embedding(9, 36), (6, 2), 34, (1, 2)),
    "channels": (nn.Conv2d(20, 3, 3, padding=1), (3, 20, 6, 6), 179, (63, 0)),
    "a channel each": (nn.Conv2d(4, 5, 3, stride=2), (3, 4, 7, 7), 12, (9, 0)),
    "one channel": (nn.Conv2d(1, 4, (1, 3)), (3, 1, 4, 5), 1, (3, 1)),
    "pixels": (nn.Conv1d(20, 3, 3), (3, 20, 6), 3, (1, 0)),
    "outputs of a convolution": (nn.Conv3d(1, 36, 2), (3, 1, 4, 4, 4), 34, (0, 12)),
    "transposed": (nn.ConvTranspose2d(20, 3, 3, stride=2), (3, 20, 3, 3), 179, (63, 0)),
}


@pytest.mark.parametrize(
    ("method", "split"),
    [
        ("eigen", ""),
        ("precompute", ""),
        ("inverse", "pi"),
        ("inverse", "sqrt"),
        ("inverse", "plain"),
    ],
)
@pytest.mark.parametrize("kind", LAYERS)
def test_bounded_layer_equals_dense_algebra_on_what_is_kept(
    kind: str, method: str, split: str
) -> None:
    torch.manual_seed(0)
    module, shape, limit, blocks = LAYERS[kind]
    module = module.double()
    module.reset_parameters()
    is_table = isinstance(module, nn.Embedding)
    batches = [
        torch.randint(9, shape) if is_table else torch.randn(*shape).double() for _ in range(2)
    ]
    found = {}
    for bound in (None, limit):
        kfac = KFAC(
            module,
            damping=DAMPING,
            kl_clip=None,
            max_factor_dim=bound,
            method="inverse" if method == "inverse" else "eigen",
            precompute=method == "precompute",
            inverse_damping=split or "pi",
            inverse_update_steps=1,
            loss_reduction="mean",
        )
        for x in batches:
            module.zero_grad()
            (module(x).sin() ** 2).sum().div(len(x)).backward()
            d = kfac.layers[0].gradient().clone()
            kfac.step()
        (layer,) = kfac.layers
        found[bound] = (layer, kfac.states[0], kfac.layers[0].gradient())
        kfac.close()
    layer, state, result = found[limit]
    _, whole, _ = found[None]
    dense = {}
    for name, block in zip(("A", "G"), blocks, strict=True):
        full = whole.factors[name]
        full = torch.diag(full) if full.dim() == 1 else full
        dense[name] = kept_of(full, block) if block else full
        kept = dense_form(layer.sides[name], state.factors[name])
        torch.testing.assert_close(kept, dense[name], **TOLERANCE)
        assert isinstance(layer.sides[name], Whole) == (block == 0)
    assert {n: tuple(t.shape) for n, t in state.decomposition.items()} == layer.decomposition_shapes
    expected = preconditioned(
        dense["A"], dense["G"], d, method.replace("precompute", "eigen"), split
    )
    torch.testing.assert_close(result, expected, **TOLERANCE)


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(35, 36), nn.Tanh(), nn.Linear(36, 600)).double()


def step(model: nn.Module, kfac: KFAC, seed: int) -> None:
    x = torch.randn(6, 35, generator=torch.Generator().manual_seed(seed)).double()
    model.zero_grad()
    model(x).square().sum(1).mean().backward()
    kfac.step()
    with torch.no_grad():
        for p in model.parameters():
            p -= 0.1 * p.grad


@pytest.mark.parametrize(
    "options",
    [{}, {"precompute": True}, {"method": "inverse"}, {"method": "ekfac"}, {"method": "one_sided"}],
)
def test_large_gradients_in_pieces_equal_those_in_one_piece(
    options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for elements in (1 << 18, 100):
        monkeypatch.setattr(preconditioning, "_PIECE_ELEMENTS", elements)
        model = wide()
        kfac = KFAC(model, max_factor_dim=34, kl_clip=None, **options)
        step(model, kfac, 0)
        found.append([p.grad.clone() for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, **TOLERANCE)


def test_groups_keep_blocks_of_their_own() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(40, 4, 3, groups=2).double()
    x = torch.randn(3, 40, 5, 5).double()
    factors = []
    for limit in (None, 179):
        kfac = KFAC(conv, max_factor_dim=limit, loss_reduction="mean")
        conv.zero_grad()
        conv(x).sin().sum().div(3).backward()
        kfac.step()
        factors.append(kfac.factors()[""])
        kfac.close()
    whole, kept = factors
    for group in range(2):
        expected = kept_of(whole["A"][group], 63)
        result = torch.block_diag(*kept["A"][group])[:181, :181]
        torch.testing.assert_close(result, expected, **TOLERANCE)
    torch.testing.assert_close(kept["G"], whole["G"], **TOLERANCE)


@pytest.mark.parametrize(
    ("variant", "other_bound"),
    [
        ({}, {"max_factor_dim": 30}),
        ({"method": "inverse"}, {"max_factor_dim": 30}),
        ({"factor_rank": 5}, {"factor_rank": 6}),
        ({"method": "ekfac"}, {"max_factor_dim": 30}),
        ({"method": "one_sided"}, {"max_factor_dim": 30}),
    ],
)
@pytest.mark.parametrize("start", ["first", "identity"])
def test_state_continues_bit_for_bit_and_fits_no_other_bound(
    variant: dict[str, object], other_bound: dict[str, object], start: str
) -> None:
    options = {"max_factor_dim": 34, **variant, "ema_init": start, "inverse_update_steps": 2}
    model = wide()
    kfac = KFAC(model, **options)
    for seed in range(3):
        step(model, kfac, seed)
    other = copy.deepcopy(model)
    resumed = KFAC(other, **options)
    resumed.load_state_dict(kfac.state_dict())
    for seed in range(3, 6):
        step(model, kfac, seed)
        step(other, resumed, seed)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    with pytest.raises(StateError, match="max_factor_dim"):
        KFAC(wide(), **{**options, **other_bound}).load_state_dict(kfac.state_dict())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precompute": True},
        {"method": "inverse"},
        {"factor_rank": 5},
        {"factor_rank": 5, "precompute": True},
        {"method": "ekfac"},
        {"method": "one_sided"},
    ],
)
def test_plan_has_the_memory_of_what_is_kept_to_the_byte(options: dict[str, object]) -> None:
    model = wide()
    kfac = KFAC(model, max_factor_dim=34, **options)
    step(model, kfac, 0)
    usage = kfac.memory_usage()
    needed = usage["factors"] + usage["second_order"]
    KFAC(wide(), max_factor_dim=34, memory_budget_bytes=needed, **options)
    with pytest.raises(ConfigError, match=f"at least {needed} bytes"):
        KFAC(wide(), max_factor_dim=34, memory_budget_bytes=needed - 1, **options)


def test_what_is_kept_is_in_the_plan_and_in_one_line_at_construction() -> None:
    model = wide()
    with pytest.warns(UserWarning, match="max_factor_dim=34") as caught:
        kfac = KFAC(model, max_factor_dim=34)
    (line,) = [str(w.message) for w in caught]
    assert "\n" not in line
    assert "0 (A of 36: 18 blocks of 2, G of 36: 18 blocks of 2)" in line
    assert "2 (A of 37: 19 blocks of 2, G of 600: the diagonal)" in line
    assert "or None to keep all" in line
    assert "G of 600: the diagonal" in str(kfac.plan)
    assert type(kfac.plan).from_dict(kfac.plan.to_dict()) == kfac.plan
    changes = KFAC(wide(), max_factor_dim=None).plan.diff(kfac.plan)
    assert "18 blocks of 2" in changes[0] and len(changes) == 2


def test_head_of_a_vocabulary_takes_little_and_its_whole_factor_is_refused() -> None:
    head = nn.Linear(16, 50_000)
    kfac = KFAC(head, memory_budget_bytes=2**24)
    head(torch.randn(4, 16)).square().mean().backward()
    kfac.step()
    usage = kfac.memory_usage()
    assert usage["factors"] + usage["second_order"] < 2**20
    assert usage["last_step"] == 4 * 50_000 * 17
    assert head.weight.grad.isfinite().all()
    with pytest.raises(ConfigError, match=r"at least \d+ bytes .*max_factor_dim"):
        KFAC(head, memory_budget_bytes=2**30, max_factor_dim=None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_blocks_in_float32(dtype: torch.dtype) -> None:
    model = wide().to(dtype)
    kfac = KFAC(model, max_factor_dim=34)
    model(torch.randn(6, 35, dtype=dtype)).float().square().mean().backward()
    kfac.step()
    assert {t.dtype for f in kfac.factors().values() for t in f.values()} == {torch.float32}
    assert all(p.grad.dtype == dtype and p.grad.isfinite().all() for p in model.parameters())


def test_wide_full_fisher_of_a_normalisation_becomes_a_block_per_channel() -> None:
    kfac = KFAC(nn.LayerNorm(8), bn_fisher="full", max_factor_dim=15)
    assert kfac.layers[0].factor_shapes == {"F": (8, 2, 2)}
    assert "F: a block per channel" in str(kfac.plan)
    whole = KFAC(nn.LayerNorm(8), bn_fisher="full", max_factor_dim=16)
    assert whole.layers[0].factor_shapes == {"F": (16, 16)}


class _Shared(nn.Module):
    """One weight in three modules: two biases, and none."""

    def __init__(self) -> None:
        super().__init__()
        self.uses = nn.ModuleList([nn.Linear(35, 36, bias=i != 1) for i in range(3)])
        for use in self.uses:
            use.weight = self.uses[0].weight

    def forward(self, x: Tensor) -> Tensor:
        return sum(use(x * (i + 1)).sin() for i, use in enumerate(self.uses))


@pytest.mark.parametrize(("limit", "block"), [(34, 2), (1, 1)])
def test_uses_of_a_shared_weight_keep_blocks_around_biases_of_their_own(
    limit: int, block: int
) -> None:
    torch.manual_seed(0)
    model = _Shared().double()
    factors = []
    for bound in (None, limit):
        kfac = KFAC(model, max_factor_dim=bound, damping=DAMPING, kl_clip=None)
        step(model, kfac, 0)
        (layer,) = kfac.layers
        factors.append(kfac.factors()[layer.name])
        assert all(p.grad.isfinite().all() for p in model.parameters())
        kfac.close()
        torch.manual_seed(0)
        model.load_state_dict(_Shared().double().state_dict())
    whole, kept = factors
    assert whole["A"].shape == (37, 37)
    for name in ("A", "G"):
        result = dense_form(layer.sides[name], kept[name])
        torch.testing.assert_close(result, kept_of(whole[name], block), **TOLERANCE)


def _table(weight: Tensor) -> nn.Embedding:
    return nn.Embedding(2048, 64, padding_idx=3, _weight=weight.clone())


LOOK_UPS: dict[str, Callable[[nn.Embedding, Tensor], Tensor]] = {
    "one look-up": lambda table, ids: table(ids).square().mean(),
    "two look-ups": lambda table, ids: (table(ids) * table(ids + 7)).mean(),
    "tied": lambda table, ids: F.linear(table(ids), table.weight).square().mean(),
    "penalty": lambda table, ids: table(ids).mean() + table.weight[5].square().sum(),
    "a function": lambda table, ids: table(ids).mean() + F.embedding(ids + 9, table.weight).sum(),
}
AFTERWARDS: dict[str, Callable[[nn.Embedding, Tensor], Any]] = {
    "nothing": lambda table, ids: None,
    "clipping": lambda table, ids: nn.utils.clip_grad_norm_(table.parameters(), 1e-3),
    "noise": lambda table, ids: table.weight.grad.add_(0.1),
    "decay in the data": lambda table, ids: table.weight.grad.data.add_(table.weight.data),
    "another pass": lambda table, ids: table(ids + 11).mean().backward(),
    "other indices in the buffer": lambda table, ids: ids.fill_(1),
    "a probe": lambda table, ids: torch.autograd.grad(table(ids + 11).mean(), [table.weight]),
    "another gradient": lambda table, ids: setattr(
        table.weight, "grad", torch.ones_like(table.weight)
    ),
}


@pytest.mark.parametrize(
    ("loss", "after"),
    [*((name, "nothing") for name in LOOK_UPS), *(("one look-up", name) for name in AFTERWARDS)],
)
def test_rows_of_a_table_are_those_of_its_gradient_however_it_came_about(
    loss: str, after: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(2048, 64, generator=seeded(1))

    def step() -> tuple[Tensor, bool]:
        table = _table(weight)
        kfac = KFAC(table, lr=0.1, loss_reduction="mean")
        sure = False
        for number in range(3):
            table.zero_grad()
            ids = torch.randint(100, (4, 6), generator=seeded(number))
            LOOK_UPS[loss](table, ids).backward()
            AFTERWARDS[after](table, ids)
            sure = kfac._recording.rows_looked_up(kfac.layers[0]) is not None
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                kfac.step()
        assert table.weight.grad is not None
        return table.weight.grad, sure

    found, sure = step()
    assert sure == (loss == "one look-up" and after in ("nothing", "a probe"))
    monkeypatch.setattr(kronecker, "_LARGE_TABLE", 1 << 40)
    read, never = step()
    assert not never and torch.equal(found, read)
