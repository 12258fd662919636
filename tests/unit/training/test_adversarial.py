"""Attacks against the closed forms of linear models, and who is attacked in a step."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import TrainConfig
from elastic_kfac.data.batch import Batch
from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.tasks.attacks import (
    Attack,
    adversarial_mask,
    mix_adversarial,
    perturbed,
)
from elastic_kfac.tasks.losses import CrossEntropy, OwnLoss
from elastic_kfac.tasks.preprocessing import Preprocessor
from elastic_kfac.training.evaluation import evaluate_split
from support.training_problems import MemoryDataset

WIDE = {"low": -100.0, "high": 100.0}


class Vectors(MemoryDataset):
    """Given inputs in their order."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        super().__init__(len(labels))
        self._inputs, self._given = inputs, labels

    def read(self, epoch: int, first_position: int, count: int) -> Batch:
        part = slice(first_position, first_position + count)
        ids = np.arange(len(self._given), dtype=np.uint64)[part]
        return Batch(self._inputs[part], self._given[part], ids, torch.ones(len(ids)))


def logistic_sum(outputs: Tensor, labels: Tensor) -> Tensor:
    """Labels -1 and 1, one output."""
    return F.softplus(-labels * outputs[:, 0]).sum()


def linear_problem() -> tuple[nn.Linear, Tensor, Tensor]:
    torch.manual_seed(0)
    model = nn.Linear(7, 1).double()
    inputs = torch.randn(20, 7, dtype=torch.float64)
    return model, inputs, 2.0 * torch.randint(0, 2, (20,)) - 1


def network() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 3)
    ).double()
    images = torch.rand(10, 1, 6, 6, dtype=torch.float64)
    model(images)
    return model, images, torch.randint(0, 3, (10,))


@pytest.mark.parametrize("attack", [Attack("fgsm", 0.3, **WIDE), Attack("pgd", 0.3, 4, **WIDE)])
def test_sign_attacks_reach_the_worst_case_of_a_linear_model(attack: Attack) -> None:
    model, inputs, labels = linear_problem()
    attacked = perturbed(model, logistic_sum, inputs, labels, attack)
    margin = labels * model(inputs)[:, 0]
    worst = F.softplus(-margin + 0.3 * model.weight.abs().sum())
    ours = F.softplus(-labels * model(attacked)[:, 0])
    torch.testing.assert_close(ours, worst, rtol=0, atol=1e-14)


@pytest.mark.parametrize("steps", [1, 5])
def test_l2_attack_reaches_the_worst_case_of_a_linear_model(steps: int) -> None:
    model, inputs, labels = linear_problem()
    attacked = perturbed(model, logistic_sum, inputs, labels, Attack("l2", 0.3, steps, **WIDE))
    margin = labels * model(inputs)[:, 0]
    worst = F.softplus(-margin + 0.3 * model.weight.norm())
    ours = F.softplus(-labels * model(attacked)[:, 0])
    torch.testing.assert_close(ours, worst, rtol=0, atol=1e-14)


def test_fgsm_is_the_published_formula_with_the_range_of_the_batch() -> None:
    model, images, labels = network()
    frozen = copy.deepcopy(model).eval()
    variable = images.clone().requires_grad_()
    F.cross_entropy(frozen(variable), labels).backward()
    assert variable.grad is not None
    expected = (images + 0.05 * variable.grad.sign()).clamp(
        float(images.min()), float(images.max())
    )
    attacked = perturbed(model, CrossEntropy().loss, images, labels, Attack("fgsm", 0.05))
    torch.testing.assert_close(attacked, expected, rtol=0, atol=1e-15)


@pytest.mark.parametrize("kind", ["pgd", "l2"])
@pytest.mark.parametrize("random_start", [False, True])
def test_iterated_attacks_stay_in_the_ball_and_the_range_and_raise_the_loss(
    kind: Any, random_start: bool
) -> None:
    model, images, labels = network()
    attack = Attack(kind, 0.2, 6, random_start=random_start, low=0.0, high=1.0)
    loss = CrossEntropy().loss
    attacked = perturbed(model, loss, images, labels, attack, ids=np.arange(10))
    offset = (attacked - images).flatten(1)
    size = offset.abs().amax(1) if kind == "pgd" else offset.norm(dim=1)
    assert float(size.max()) <= 0.2 + 1e-12
    assert float(attacked.min()) >= 0 and float(attacked.max()) <= 1
    weaker = perturbed(model, loss, images, labels, Attack(kind, 0.2, 1, low=0.0, high=1.0))
    model.eval()
    with torch.no_grad():
        clean, one_step, iterated = (
            float(loss(model(x), labels)) for x in (images, weaker, attacked)
        )
    assert iterated > clean + 0.1
    assert iterated >= one_step - 1e-6


def test_range_per_channel_is_respected() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(8, 2)).double()
    images = torch.rand(3, 2, 2, 2, dtype=torch.float64)
    low = torch.tensor([0.0, -1.0]).view(2, 1, 1)
    high = torch.tensor([1.0, 2.0]).view(2, 1, 1)
    attack = Attack("fgsm", 1.5, low=low, high=high)
    attacked = perturbed(model, CrossEntropy().loss, images, torch.zeros(3).long(), attack)
    for channel in range(2):
        part = attacked[:, channel]
        assert float(part.min()) >= float(low[channel]) and float(part.max()) <= float(
            high[channel]
        )


def test_attack_leaves_modes_statistics_gradients_and_kfac_alone() -> None:
    model, images, labels = network()
    model[1].eval()
    kfac = KFAC(model, damping=0.1)
    before = copy.deepcopy(model.state_dict())
    perturbed(model, CrossEntropy().loss, images, labels, Attack("pgd", 0.1, 3, low=0.0, high=1.0))
    assert [m.training for m in model] == [True, False, True, True, True]
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert kfac.captured_samples() == 0
    kfac.close()


def test_attack_of_a_sample_does_not_depend_on_its_neighbours() -> None:
    model, images, labels = network()
    attack = Attack("pgd", 0.1, 3, random_start=True, low=0.0, high=1.0)
    ids = np.array([3, 1, 4, 15, 9, 2, 6, 5, 35, 8])
    loss = CrossEntropy().loss
    whole = perturbed(model, loss, images, labels, attack, ids=ids, seed=5, counter=2)
    for part in (slice(0, 1), slice(1, 7), slice(7, 10)):
        alone = perturbed(
            model, loss, images[part], labels[part], attack, ids=ids[part], seed=5, counter=2
        )
        torch.testing.assert_close(alone, whole[part], rtol=0, atol=1e-14)
    other = perturbed(model, loss, images, labels, attack, ids=ids, seed=5, counter=3)
    assert not torch.equal(other, whole)


def test_zero_gradient_and_zero_radius_change_nothing() -> None:
    model = nn.Linear(4, 2).double()
    nn.init.zeros_(model.weight)
    inputs, labels = torch.rand(3, 4, dtype=torch.float64), torch.zeros(3).long()
    for kind in ("fgsm", "pgd", "l2"):
        for radius in (0.0, 0.1):
            attack = Attack(kind, radius, low=0.0, high=1.0)
            assert torch.equal(
                perturbed(model, CrossEntropy().loss, inputs, labels, attack), inputs
            )


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("global_count", [128, 100, 37])
def test_mask_of_a_step_is_the_same_whoever_computes_it(world_size: int, global_count: int) -> None:
    expected = []
    for start in range(0, global_count, 32):
        size = min(32, global_count - start)
        attacked = int(0.2 * size)
        expected += [True] * attacked + [False] * (size - attacked)
    seen: list[bool] = []
    for rank in range(world_size):
        first = rank * global_count // world_size
        count = (rank + 1) * global_count // world_size - first
        mask = adversarial_mask(first, count, global_count, micro_batch_size=32, fraction=0.2)
        seen += mask.tolist()
    assert seen == expected


def test_mask_does_not_lose_a_sample_to_rounding() -> None:
    assert adversarial_mask(0, 10, 10, micro_batch_size=10, fraction=0.7).sum() == 7
    assert adversarial_mask(0, 100, 100, micro_batch_size=100, fraction=0.29).sum() == 29
    assert adversarial_mask(0, 10, 10, micro_batch_size=10, fraction=0.0).sum() == 0


def test_mixing_replaces_exactly_the_masked_samples() -> None:
    model, images, labels = network()
    attack = Attack("fgsm", 0.1, low=0.0, high=1.0)
    mask = adversarial_mask(0, 10, 10, micro_batch_size=5, fraction=0.4)
    attacked = perturbed(model, CrossEntropy().loss, images, labels, attack)
    for chunk_size in (None, 1, 3):
        mixed = mix_adversarial(
            model, CrossEntropy().loss, images, labels, mask, attack, chunk_size=chunk_size
        )
        torch.testing.assert_close(mixed[mask], attacked[mask], rtol=0, atol=1e-14)
        assert torch.equal(mixed[~mask], images[~mask])


def test_evaluation_counts_clean_and_attacked_samples() -> None:
    model, inputs, labels = linear_problem()

    class Binary:
        def loss(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return logistic_sum(outputs, labels)

        def correct(self, outputs: Tensor, labels: Tensor) -> Tensor:
            return (outputs[:, 0] * labels > 0).sum()

    found = evaluate_split(
        model,
        OwnLoss(Binary()),
        dataset := Vectors(inputs, labels),
        Preprocessor(dataset, torch.float64, torch.device("cpu")),
        Communicator.solo(),
        TrainConfig(eval_batch_size=8),
        attack=Attack("fgsm", 0.3, **WIDE),
    )
    margin = (labels * model(inputs)[:, 0]).detach()
    worst = margin - 0.3 * float(model.weight.detach().abs().sum())
    attacked = found.attacked
    assert attacked is not None and found.count == attacked.count == 20
    assert found["accuracy"] == float((margin > 0).double().mean())
    assert attacked["accuracy"] == float((worst > 0).double().mean())
    assert attacked["accuracy"] < found["accuracy"]
    assert found.loss == pytest.approx(float(F.softplus(-margin).mean()), rel=1e-12)
    assert attacked.loss == pytest.approx(float(F.softplus(-worst).mean()), rel=1e-12)


def worst_column_perturbation(
    matrix: Tensor, solution: Tensor, target: Tensor, rho: float
) -> Tensor:
    """The ΔA with columns of norm ≤ ρ that maximises ‖(A + ΔA)x − b‖: ρ·(r/‖r‖)·sign(x)ᵀ, r = Ax − b."""
    residual = matrix @ solution - target
    if not float(residual.norm()):
        # All directions are equally bad.
        residual = torch.ones_like(residual)
    return rho * torch.outer(residual / residual.norm(), solution.sign())


def test_robust_least_squares_is_least_squares_with_an_l1_penalty() -> None:
    torch.manual_seed(4)
    a = torch.randn(9, 4, dtype=torch.float64)
    x, b = torch.randn(4, dtype=torch.float64), torch.randn(9, dtype=torch.float64)
    rho = 0.3
    bound = float((a @ x - b).norm() + rho * x.abs().sum())
    worst = worst_column_perturbation(a, x, b, rho)
    assert worst.norm(dim=0).tolist() == pytest.approx([rho] * 4)
    assert float(((a + worst) @ x - b).norm()) == pytest.approx(bound, rel=1e-14)
    tried = torch.randn(2000, 9, 4, dtype=torch.float64)
    tried *= rho / tried.norm(dim=1, keepdim=True)
    assert float(((a + tried) @ x - b).norm(dim=1).max()) < bound
    exact = worst_column_perturbation(a, x, a @ x, rho)
    assert float((exact @ x).norm()) == pytest.approx(rho * float(x.abs().sum()))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"kind": "cw", "radius": 0.1}, "fgsm, pgd, l2"),
        ({"kind": "fgsm", "radius": -0.1}, "0 or more"),
        ({"kind": "pgd", "radius": 1.5, "low": 0.0, "high": 1.0}, "outside the data range"),
        ({"kind": "fgsm", "radius": 0.1, "steps": 3}, "1 for fgsm"),
        ({"kind": "pgd", "radius": 0.1, "steps": 0}, "steps out of range"),
        ({"kind": "pgd", "radius": 0.1, "step_size": 0.0}, "step_size"),
        ({"kind": "pgd", "radius": 0.1, "low": 0.0}, "both ends"),
        ({"kind": "pgd", "radius": 0.1, "low": 1.0, "high": 0.0}, "empty"),
    ],
)
def test_bad_attacks_say_what_is_allowed(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        Attack(**arguments)


def test_random_start_without_ids_is_refused() -> None:
    model, images, labels = network()
    attack = Attack("pgd", 0.1, 2, random_start=True)
    with pytest.raises(UsageError, match="ids"):
        perturbed(model, CrossEntropy().loss, images, labels, attack)
