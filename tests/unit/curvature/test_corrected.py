"""EK-FAC and one-sided K-FAC against dense algebra."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from elastic_kfac.curvature.preconditioning import CorrectedForm, InputForm
from elastic_kfac.curvature.sides import Blocks, Diagonal, Side, Whole

GAMMA = 0.02
TOLERANCE = {"rtol": 1e-9, "atol": 1e-10}


def spd(width: int, seed: int) -> Tensor:
    root = torch.randn(
        width, 2 * width, dtype=torch.double, generator=torch.Generator().manual_seed(seed)
    )
    return root @ root.T / width


def dense(kept: Tensor, side: Side) -> Tensor:
    """The matrix of kept blocks, of eigenvectors too; I for unit vectors."""
    return torch.block_diag(*kept) if isinstance(side, Blocks) else kept


def basis(held: dict[str, Tensor], a: Side, g: Side) -> Tensor:
    eyes = {"A": torch.eye(a.padded).double(), "G": torch.eye(g.padded).double()}
    parts = [
        dense(held[f"{name}_vectors"], side) if f"{name}_vectors" in held else eyes[name]
        for name, side in (("G", g), ("A", a))
    ]
    return torch.kron(*parts)


SIDES: list[tuple[Side, Side]] = [
    (Whole(6), Whole(4)),
    (Blocks(6, 2), Whole(4)),
    (Whole(6), Blocks(4, 2)),
    (Diagonal(6), Whole(4)),
]


def factors_of(a: Side, g: Side, seed: int) -> dict[str, Tensor]:
    """Factors with what is kept of them, from rows."""
    rows = [torch.linalg.cholesky(spd(side.width, seed + i)) for i, side in enumerate((a, g))]
    return {"A": a.gram(rows[0]), "G": g.gram(rows[1])}


@pytest.mark.parametrize(("a", "g"), SIDES)
def test_ekfac_equals_its_definition_over_batches_and_a_new_basis(a: Side, g: Side) -> None:
    generator = torch.Generator().manual_seed(5)
    form, decay, samples, floor = CorrectedForm(a, g, precompute=False), 0.8, 12.0, 0.03
    held = form.decompose(factors_of(a, g, 0), ("A", "G"), GAMMA, {})
    assert {name: tuple(t.shape) for name, t in held.items()} == form.shapes
    vectors = basis(held, a, g)
    a_values = a.values(held["A_values"])
    moments = torch.kron(g.values(held["G_values"]), a_values)
    mean = None
    for step in range(6):
        d = torch.randn(4, 6, dtype=torch.double, generator=generator)
        if step == 3:
            curvature = vectors @ moments.diag() @ vectors.T
            centre = vectors @ mean
            held |= form.decompose(factors_of(a, g, 9), ("A", "G"), GAMMA, held)
            vectors = basis(held, a, g)
            a_values = a.values(held["A_values"])
            moments, mean = (vectors.T @ curvature @ vectors).diagonal(), vectors.T @ centre
        held |= form.corrected(held, d, samples, floor, decay)
        x = vectors.T @ d.reshape(-1)
        apart = torch.zeros_like(x) if mean is None else x - mean
        mean = x if mean is None else decay * mean + (1 - decay) * x
        sample = samples * (1 + decay) / 2 * apart**2 + mean**2 + floor * a_values.repeat(4)
        moments = decay * moments + (1 - decay) * sample
        torch.testing.assert_close(held["E_moments"].reshape(-1), moments, **TOLERANCE)
        matrix = vectors @ moments.diag() @ vectors.T + GAMMA * torch.eye(24).double()
        expected = torch.linalg.solve(matrix, d.reshape(-1)).reshape(4, 6)
        torch.testing.assert_close(form.precondition(held, d, GAMMA), expected, **TOLERANCE)


def test_ekfac_finds_the_fisher_of_samples_where_inputs_and_gradients_depend_on_each_other() -> (
    None
):
    generator = torch.Generator().manual_seed(1)
    n = 40_000
    a = torch.randn(n, 4, generator=generator).double()
    g = torch.randn(n, 3, generator=generator).double() * (0.2 + a[:, :1] ** 2) + 0.3
    per_sample = torch.einsum("ng,na->nga", g, a + 0.5).reshape(n, -1)
    a = a + 0.5
    form = CorrectedForm(Whole(4), Whole(3), precompute=False)
    held = form.decompose({"A": a.T @ a / n, "G": g.T @ g / n}, ("A", "G"), GAMMA, {})
    vectors = basis(held, Whole(4), Whole(3))
    fisher = (per_sample @ vectors).square().mean(0)
    errors = {"kfac": float((held["E_moments"].reshape(-1) / fisher).log().abs().max())}
    for batch in per_sample.split(50):
        held |= form.corrected(held, batch.mean(0).reshape(3, 4), 50.0, 0.0, 0.99)
    errors["ekfac"] = float((held["E_moments"].reshape(-1) / fisher).log().abs().max())
    assert errors["ekfac"] < 0.4 < 1.5 * errors["ekfac"] < errors["kfac"]


def test_vectors_that_rounding_chose_do_not_matter() -> None:
    """A has rank 3 of 7: any basis of its zeros is as good."""
    rows = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).double()
    form = CorrectedForm(Whole(7), Whole(4), precompute=False)
    held = form.decompose({"A": rows @ rows.T, "G": spd(4, 1)}, ("A", "G"), GAMMA, {})
    turned = dict(held)
    turn = torch.linalg.qr(torch.randn(4, 4).double()).Q
    turned["A_vectors"] = held["A_vectors"].clone()
    turned["A_vectors"][:, :4] = held["A_vectors"][:, :4] @ turn
    results = []
    for state in (held, turned):
        generator = torch.Generator().manual_seed(2)
        for _ in range(4):
            d = torch.randn(4, 7, dtype=torch.double, generator=generator)
            state |= form.corrected(state, d, 8.0, 0.0, 0.9)
        state |= form.decompose({"A": spd(7, 4), "G": spd(4, 5)}, ("A", "G"), GAMMA, state)
        results.append(form.precondition(state, d, GAMMA))
    torch.testing.assert_close(*results, **TOLERANCE)


def test_gradient_that_is_not_finite_leaves_ekfac_as_it_was() -> None:
    form = CorrectedForm(Whole(6), Whole(4), precompute=False)
    held = form.decompose(factors_of(Whole(6), Whole(4), 0), ("A", "G"), GAMMA, {})
    held |= form.corrected(held, torch.ones(4, 6).double(), 8.0, 0.0, 0.9)
    parts = form.corrected(held, torch.full((4, 6), math.inf).double(), 8.0, 0.0, 0.9)
    assert all(torch.equal(part, held[name]) for name, part in parts.items())


@pytest.mark.parametrize("side", [Whole(6), Blocks(6, 2), Diagonal(6)])
def test_one_sided_equals_a_dense_solve(side: Side) -> None:
    kept = factors_of(side, Whole(4), 0)["A"]
    form = InputForm(side, Whole(4))
    held = form.decompose({"A": kept}, ("A",), GAMMA, {})
    assert {name: tuple(t.shape) for name, t in held.items()} == form.shapes
    full = kept.diag() if isinstance(side, Diagonal) else dense(kept, side)
    d = torch.randn(4, 6, dtype=torch.double)
    matrix = torch.kron(torch.eye(4).double(), full) + GAMMA * torch.eye(24).double()
    expected = torch.linalg.solve(matrix, d.reshape(-1)).reshape(4, 6)
    torch.testing.assert_close(form.precondition(held, d, GAMMA), expected, **TOLERANCE)
