"""`factor_scale="kaisa"` is kfac-pytorch, to 1e-5: the rest of the pipeline is the same mathematics."""

from __future__ import annotations

import json

import pytest
import torch

from elastic_kfac import KFAC
from support.kfac_pytorch_reference import DAMPING, LR, METHODS, REFERENCE, train, train_peer


def train_ours(method: str, **options) -> dict[str, list[float]]:
    return train(
        lambda model, optimizer: KFAC(
            model,
            lr=LR,
            damping=DAMPING,
            inverse_update_steps=2,
            factor_decay=0.95,
            kl_clip=0.001,
            method=method,
            inverse_damping="plain",
            precompute=method == "eigen",
            ema_init="identity",
            factor_scale="kaisa",
            **options,
        )
    )


def largest_error(ours: dict[str, list[float]], theirs: dict[str, list[float]]) -> float:
    assert ours.keys() == theirs.keys()
    errors = [
        (torch.tensor(ours[n]) - torch.tensor(theirs[n])).norm() / torch.tensor(theirs[n]).norm()
        for n in ours
    ]
    return max(float(e) for e in errors)


@pytest.mark.parametrize("method", METHODS)
def test_kaisa_scale_equals_recorded_run_of_kfac_pytorch(method: str) -> None:
    recorded = json.loads(REFERENCE.read_text())["weights"][method]
    assert largest_error(train_ours(method), recorded) < 1e-5


def test_recorded_run_tells_other_scales_apart() -> None:
    recorded = json.loads(REFERENCE.read_text())["weights"]["eigen"]
    other = train(
        lambda model, optimizer: KFAC(
            model, lr=LR, damping=DAMPING, inverse_update_steps=2, ema_init="identity"
        )
    )
    assert largest_error(other, recorded) > 1e-3


@pytest.mark.parametrize("method", METHODS)
def test_kaisa_scale_equals_kfac_pytorch_live(method: str) -> None:
    pytest.importorskip("kfac.preconditioner", reason="kfac-pytorch is not installed")
    assert largest_error(train_ours(method), train_peer(method)) < 1e-5
