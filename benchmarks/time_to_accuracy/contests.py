"""The workloads, each with the steps it may take: seconds to half a minute per run on one thread."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path

from torch import Tensor, nn

sys.path.append(str(Path(__file__).parents[1] / "defaults"))  # which has a `run` of its own
from small_problems import (
    Images,
    Problem,
    ce,
    cnn,
    group_norm,
    language_model,
    letters,
    mlp,
    mse,
    next_token,
    photo,
    placed_patches,
    residual,
    sources,
    split,
    vit,
)

__all__ = ["WORKLOADS", "Images", "Problem", "ce", "split"]


def _patches() -> tuple[Tensor, Tensor]:
    x = photo("flower", 12, 8000).mean(1).flatten(1)
    return x, x


MODULES = "argparse ast datetime decimal inspect pathlib tarfile typing uuid zipfile"
many_letters = partial(letters, 8000)

WORKLOADS = (
    Problem("letters mlp b 1024", many_letters, lambda: mlp(256, 384, 192, 26), ce, 1024, 200),
    Problem(
        "letters cnn b 1024",
        many_letters,
        lambda: cnn((1, 16, 16), (16, 32), 26),
        ce,
        1024,
        90,
    ),
    Problem("letters transformer b 128", many_letters, lambda: vit(4, 16, 1, 64, 26), ce, 128, 300),
    Problem(
        "letters residual b 256",
        many_letters,
        lambda: residual((1, 16, 16), 24, 2, 26, group_norm),
        ce,
        256,
        120,
    ),
    Problem(
        "patches batchnorm b 128",
        placed_patches,
        lambda: cnn((3, 16, 16), (16, 32), 8, norm=nn.BatchNorm2d),
        ce,
        128,
        160,
    ),
    Problem(
        "patches autoencoder b 512",
        _patches,
        lambda: mlp(144, 192, 96, 16, 96, 192, 144),
        mse,
        512,
        400,
    ),
    Problem(
        "character lm b 32",
        lambda: sources(MODULES, 48, 6000),
        lambda: language_model(48, 64, 2),
        next_token,
        32,
        200,
        positions=True,
    ),
    Problem(
        "fashion cnn b 1024",
        partial(Images.read, "fashion_mnist"),
        lambda: cnn((1, 28, 28), (8, 16), 10),
        ce,
        1024,
        60,
    ),
    Problem(
        "cifar batchnorm b 512",
        partial(Images.read, "cifar10_jpeg"),
        lambda: cnn((3, 32, 32), (8, 16, 32), 10, norm=nn.BatchNorm2d),
        ce,
        512,
        72,
    ),
)
