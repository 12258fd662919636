"""A worker does not import what it does not need: a newcomer is waited for while it imports."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from elastic_kfac.data import make_shards
from elastic_kfac.optimizers import uncompiled

TRAINS = """
import sys
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import parse_config
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.training.loop import run_rank
from elastic_kfac.training.callbacks import FolderWriter, KeepGoing
from elastic_kfac.state.run_folder import RunFolder

for name, curvature in (("sgd", "kfac"), ("sgd", "none"), ("adam", "none"), ("lamb", "none")):
    folder = f"{sys.argv[1]}/{name}-{curvature}"
    config = parse_config({
        "optimizer": {"name": name, "lr": 1e-3},
        "kfac": {"enabled": curvature == "kfac"},
        "train": {"epochs": 2},
        "data": {"shards": f"{sys.argv[1]}/digits"},
    })
    outcome = run_rank(
        config,
        Communicator.solo(),
        store=CheckpointStore(f"{folder}/checkpoints"),
        callback=FolderWriter(RunFolder(folder)),
        control=KeepGoing(),
    )
    assert outcome.status == "finished", outcome
print(*(name for name in ("torch._dynamo", "torch._inductor", "sympy", "triton", "ray", "pandas")
        if name in sys.modules))
"""


def test_a_run_imports_no_compiler(tmp_path: Path) -> None:
    make_shards("digits", tmp_path / "digits")
    command = [sys.executable, "-c", TRAINS, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def test_processes_around_the_ranks_import_no_torch() -> None:
    modules = "coordinator", "replicas", "membership"
    code = "; ".join(
        [
            *(f"import elastic_kfac.cluster.run.{module}" for module in modules),
            "import elastic_kfac.cluster.ray.controller, sys",
            "print(*{'torch', 'sklearn', 'matplotlib', 'PIL', 'scipy'} & set(sys.modules))",
        ]
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert (done.stdout.split(), done.stderr) == ([], "")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("SGD", {"lr": 0.05, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-3}),
        ("Adam", {"lr": 0.01, "betas": (0.8, 0.99), "weight_decay": 1e-3}),
        ("AdamW", {"lr": 0.01, "foreach": False}),
    ],
)
def test_a_rule_equals_torchs_bit_for_bit(name: str, options: dict[str, object]) -> None:
    def trained(rule: type[torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        optimizer = rule(model.parameters(), **options)  # type: ignore[call-arg]
        for step in range(6):
            if step == 3:  # A resumed optimizer goes on from its saved state.
                saved = optimizer.state_dict()
                optimizer = rule(model.parameters(), **options)  # type: ignore[call-arg]
                optimizer.load_state_dict(saved)
            optimizer.zero_grad()
            model(torch.randn(8, 5)).square().mean().backward()
            optimizer.step()
        assert torch.is_grad_enabled()
        return model, optimizer

    model, optimizer = trained(getattr(uncompiled, name))
    expected_model, expected = trained(getattr(torch.optim, name))
    assert isinstance(optimizer, getattr(torch.optim, name))
    for parameter, want in zip(model.parameters(), expected_model.parameters(), strict=True):
        assert torch.equal(parameter, want)
    assert repr(optimizer.state_dict()) == repr(expected.state_dict())
