"""The blocks of docs/trainers.md run as they stand there and equal a plain loop over the same batches."""

from __future__ import annotations

import importlib.util
import os
import re
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from support.gloo import run_ranks

pytestmark = pytest.mark.slow
PAGE = Path(__file__).parents[2] / "docs" / "trainers.md"
Batches = list[list[Tensor]]


def blocks() -> dict[str, str]:
    """The code of the page by section; the first one is the preparation of all."""
    sections = re.split(r"^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = {}
    for section in sections:
        code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
        if code:
            assert len(code) == 1
            found[section.splitlines()[0]] = code[0]
    return found


def factors(kfac: KFAC) -> dict[str, Tensor]:
    layers = kfac.state_dict()["layers"]
    return {f"{n}.{f}": t for n, layer in layers.items() for f, t in layer["factors"].items()}


def run_block(name: str, folder: str = "") -> tuple[dict[str, Tensor], Batches]:
    """Runs a block in float64; the model's parameters and K-FAC's factors, and the inputs it was trained
    with, by pass.

    Each rank takes its part of every batch.
    """
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    torch.set_default_dtype(torch.float64)
    try:
        scope: dict[str, Any] = {"folder": folder, "devices": world_size, "__name__": "page"}
        exec(next(iter(blocks().values())), scope)
        model, seen = scope["model"], []
        model.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
        if world_size > 1 and name not in ("Lightning", "Hugging Face Accelerate"):
            scope["loader"] = [
                (x[rank::world_size], y[rank::world_size]) for x, y in scope["loader"]
            ]
        made: list[KFAC] = []

        def make(*arguments: Any, **options: Any) -> KFAC:
            made.append(KFAC(*arguments, **options))
            return made[-1]

        with warnings.catch_warnings(), patch("elastic_kfac.kfac.optimizer.KFAC", make):
            warnings.simplefilter("ignore")
            exec(blocks()[name], scope)
        named = {
            n.removeprefix("body."): (p.full_tensor() if hasattr(p, "full_tensor") else p).detach()
            for n, p in model.named_parameters()
        }
        curvature = {n.removeprefix("body."): t for n, t in factors(made[0]).items()}
        return {**named, **curvature}, [[x] for x in seen]
    finally:
        torch.set_default_dtype(torch.float32)


def plain(batches: Batches, rule: str = "sgd", schedule: Any = None) -> dict[str, Tensor]:
    """Every two passes a step, on the inputs of all ranks, with clipping and the preconditioner form."""
    torch.set_default_dtype(torch.float64)
    try:
        scope: dict[str, Any] = {}
        exec(next(iter(blocks().values())), scope)
    finally:
        torch.set_default_dtype(torch.float32)
    model: nn.Module = scope["model"]
    inner: torch.optim.Optimizer = (
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.7)
        if rule == "sgd"
        else torch.optim.AdamW(model.parameters(), lr=0.01)
    )
    scheduler = schedule(inner) if schedule else None
    kfac = KFAC(model, lr=inner, accumulation_steps=2)
    for number, parts in enumerate(batches, start=1):
        x = torch.cat(parts)
        (F.cross_entropy(model(x), x[:, :3].argmax(1)) / 2).backward()
        if number % 2 == 0:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            kfac.step()
            inner.step()
            inner.zero_grad()
            if scheduler:
                scheduler.step()
    return {**{name: p.detach() for name, p in model.named_parameters()}, **factors(kfac)}


def needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")


def assert_equal(found: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=4)


def warm_up(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3))


def _on_ranks(name: str) -> tuple[dict[str, Tensor], Batches]:
    rank, world_size = str(dist.get_rank()), str(dist.get_world_size())
    os.environ.update(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=world_size, ACCELERATE_USE_CPU="true")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", TORCHELASTIC_RUN_ID="none")
    os.environ.update(GROUP_RANK="0", LOCAL_WORLD_SIZE=world_size)
    return run_block(name)


@pytest.mark.parametrize(
    ("name", "rule", "schedule", "package"),
    [
        ("DistributedDataParallel", "sgd", cosine, "torch"),
        ("fully_shard (FSDP2), as in torchtitan", "adamw", warm_up, "torch"),
        ("Hugging Face Accelerate", "sgd", None, "accelerate"),
        ("Lightning", "sgd", None, "lightning"),
    ],
)
def test_block_on_two_ranks_equals_a_plain_loop(
    name: str, rule: str, schedule: Any, package: str
) -> None:
    needs(package)
    results = run_ranks(2, _on_ranks, name)
    batches = [
        [first[0], second[0]] for first, second in zip(*(r[1] for r in results), strict=True)
    ]
    assert len(batches) >= 4
    right = plain(batches, rule, schedule)
    for found, _ in results:
        assert_equal(found, right)


def linear(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (4 - step) / 4)


@pytest.mark.parametrize(
    ("name", "schedule", "package"),
    [
        ("Hugging Face Accelerate", None, "accelerate"),
        ("Hugging Face Trainer", linear, "transformers"),
        ("Lightning", None, "lightning"),
    ],
)
def test_block_equals_a_plain_loop(name: str, schedule: Any, package: str, tmp_path: Path) -> None:
    needs(package)
    found, batches = run_block(name, str(tmp_path))
    assert len(batches) == 8
    assert_equal(found, plain(batches, "sgd", schedule))
