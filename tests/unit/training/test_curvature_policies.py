"""Policies, curvature and attacks working together on CLUSTERS10: surrogates follow the eigenvalue."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.analysis.hessian import Hessian, last_layer_parameters
from elastic_kfac.analysis.spectral_estimates import kfac_eigenvalue
from elastic_kfac.analysis.spectrum import top_eigenvalues
from elastic_kfac.optimizers.batch_size import BatchSizePolicy, make_policy
from elastic_kfac.tasks.attacks import Attack, adversarial_mask, mix_adversarial
from elastic_kfac.tasks.losses import CrossEntropy

EPOCHS = 45
SAMPLES = 4096
BASE = 32


def clusters10(count: int) -> tuple[Tensor, Tensor]:
    """10 classes of 4 Gaussian clusters in 64 dimensions."""
    generator = torch.Generator().manual_seed(0)
    centers = torch.randn(10, 4, 64, generator=generator)
    labels = torch.randint(0, 10, (count,), generator=generator)
    members = torch.randint(0, 4, (count,), generator=generator)
    noise = torch.randn(count, 64, generator=generator)
    return centers[labels, members] + 1.6 * noise, labels


@dataclass
class Course:
    """What a run saw after each epoch."""

    whole: list[float] = field(default_factory=list)
    last_layer: list[float] = field(default_factory=list)
    free: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    updates: int = 0


def train(policy: BatchSizePolicy) -> Course:
    """K-FAC whose batch follows `policy`, which is told the eigenvalue of the whole Hessian."""
    torch.manual_seed(0)
    inputs, labels = clusters10(SAMPLES)
    model = nn.Sequential(nn.Linear(64, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.SGD(model.parameters(), 0.02, momentum=0.9)
    kfac = KFAC(model, lr=optimizer, damping=1e-2, kl_clip=1e-3)
    loss_sum = CrossEntropy().loss
    attack = Attack("fgsm", 0.05)
    course = Course()
    sample = [(inputs[:512], labels[:512])]
    for epoch in range(EPOCHS):
        decision = policy.at(epoch)
        optimizer.param_groups[0]["lr"] = 0.02 * decision.lr_multiplier
        total = 0.0
        for part in torch.randperm(SAMPLES).split(decision.batch_size):
            mask = adversarial_mask(
                0,
                len(part),
                len(part),
                micro_batch_size=BASE,
                fraction=decision.adversarial_fraction,
            )
            x = mix_adversarial(model, loss_sum, inputs[part], labels[part], mask, attack)
            optimizer.zero_grad()
            loss = loss_sum(model(x), labels[part])
            (loss / len(part)).backward()
            kfac.step()
            optimizer.step()
            course.updates += 1
            total += loss.item()
        course.losses.append(total / SAMPLES)
        course.whole.append(top(Hessian(model, loss_sum, sample)))
        block = last_layer_parameters(model)
        course.last_layer.append(top(Hessian(model, loss_sum, sample, parameters=block)))
        course.free.append(kfac_eigenvalue(kfac))
        policy.end_epoch(epoch + 1, course.whole[-1])
    return course


def top(hessian: Hessian) -> float:
    """With the settings of ABS: ten iterations, 1e-2."""
    return top_eigenvalues(hessian, max_iterations=10, tolerance=1e-2).values[0]


def policy(name: str) -> BatchSizePolicy:
    return make_policy(
        name,
        base_batch_size=BASE,
        max_batch_size=1024,
        total_epochs=EPOCHS,
        decay_epochs=(15, 30, 40),
    )


def spearman(first: list[float], second: list[float]) -> float:
    """Correlation of ranks."""
    ranks = torch.stack(
        [torch.tensor(values).abs().argsort().argsort().double() for values in (first, second)]
    )
    return float(torch.corrcoef(ranks)[0, 1])


@pytest.mark.filterwarnings("ignore:the KL clip shortened")
def test_surrogates_follow_the_eigenvalue_of_a_kfac_run_and_absa_works_with_it() -> None:
    course = train(policy("absa"))
    assert spearman(course.whole, course.last_layer) >= 0.7
    assert spearman(course.whole, course.free) >= 0.7
    assert course.whole[-1] < course.whole[0] / 2
    assert course.losses[-1] < course.losses[0] / 5
    assert course.updates < EPOCHS * SAMPLES / BASE / 2  # the batch has grown early
