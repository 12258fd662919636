"""Which training images matter for the prediction of a test image? Influence functions with K-FAC.

    python docs/examples/influence.py

Trains a small network on scikit-learn's digits, exports its curvature, and reads it again: the
influence of a training image z on the loss of a test image t is `-∇L(t)ᵀ (F + γI)⁻¹ ∇L(z)` (Koh and
Liang 2017), with F from the file, without a pass over the data. Then the same with the exact Fisher, a
dense matrix from all training images and all classes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from elastic_kfac import KFACOptimizer
from elastic_kfac.checkpoints import load_curvature, save_curvature

DAMPING = 1e-2
TRAINING, EPOCHS, BATCH, CLASSES = 1500, 8, 100, 10


def digits() -> tuple[Tensor, Tensor]:
    """All images `[n, 64]`, standardised, and their classes."""
    found = load_digits()
    images = torch.tensor(found.data)
    images = (images - images.mean()) / images.std()
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    return images[order], torch.tensor(found.target)[order]


def trained(images: Tensor, labels: Tensor, file: Path) -> nn.Module:
    """A network after training; its curvature goes to `file`."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10)).double()
    sgd = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-2)
    optimizer = KFACOptimizer(
        model, sgd, damping=DAMPING, fisher="exact", factor_update_steps=1, factor_decay=0.98
    )
    for epoch in range(EPOCHS):
        order = torch.randperm(TRAINING, generator=torch.Generator().manual_seed(epoch))
        for part in order.split(BATCH):
            optimizer.zero_grad()
            logits = model(images[part])
            optimizer.kfac.sample_fisher(logits)
            F.cross_entropy(logits, labels[part]).backward()
            optimizer.step()
    save_curvature(file, model, optimizer.kfac)
    optimizer.kfac.close()
    return model


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each image's loss `[n, parameters]`."""

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(model, weights, (image[None],)), label[None])

    weights = {name: p.detach() for name, p in model.named_parameters()}
    rows = vmap(grad(loss), (None, 0, 0))(weights, images, labels)
    return torch.cat([part.flatten(1) for part in rows.values()], 1)


def flat(model: nn.Module) -> Tensor:
    """All gradients as one vector."""
    return torch.cat([p.grad.reshape(-1) for p in model.parameters() if p.grad is not None])


def exact_fisher(model: nn.Module, images: Tensor) -> Tensor:
    """`E[∇log p ∇log pᵀ]` over images and the model's own probabilities `[parameters, parameters]`."""
    probabilities = model(images).softmax(1).detach()
    parts = []
    for label in range(CLASSES):
        rows = gradients(model, images, torch.full((len(images),), label))
        parts.append((rows * probabilities[:, label : label + 1]).T @ rows / len(images))
    return torch.stack(parts).sum(0)


def main() -> dict[str, float]:
    """Prints the comparison; returns the correlations."""
    images, labels = digits()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "curvature.safetensors"
        model = trained(images, labels, file)
        curvature = load_curvature(file, model)
    accuracy = (model(images[TRAINING:]).argmax(1) == labels[TRAINING:]).double().mean().item()
    ours = gradients(model, images[:TRAINING], labels[:TRAINING])
    fisher = exact_fisher(model, images[:TRAINING])
    exact_inverse = torch.linalg.inv(fisher + DAMPING * torch.eye(len(fisher)).double())
    found = []
    for t in range(TRAINING, TRAINING + 20):
        model.zero_grad()
        F.cross_entropy(model(images[t : t + 1]), labels[t : t + 1]).backward()
        test = flat(model)
        curvature.precondition(DAMPING)
        influence, exact, plain = (-ours @ v for v in (flat(model), exact_inverse @ test, test))
        found.append(
            [torch.corrcoef(torch.stack([exact, other]))[0, 1] for other in (influence, plain)]
        )
    with_kfac, without = torch.tensor(found).median(0).values.tolist()
    print(f"test accuracy {accuracy:.3f}")
    print(f"correlation with the exact influence, median of 20 test images: {with_kfac:.3f}")
    print(f"the same without curvature (products of gradients): {without:.3f}")
    return {"accuracy": accuracy, "kfac": with_kfac, "plain": without}


if __name__ == "__main__":
    main()
