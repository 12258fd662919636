"""Small problems, seconds each on one thread, in disjoint sets.

`search` is for choosing settings, `judged` for judging what was chosen, with other data and other shapes,
and on `fresh` nothing is tuned. `images` needs Parquet files of Fashion-MNIST and CIFAR-10: short runs at
large batches. All other data is generated, or embedded in scikit-learn, Matplotlib's fonts and Python.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from sklearn import datasets
from torch import Tensor, nn

Data = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Problem:
    """Data, model and loss; the optimizer is the only thing that varies."""

    name: str
    data: Callable[[], Data]
    model: Callable[[], nn.Module]
    loss: Loss
    batch: int
    steps: int
    positions: bool = False
    """The loss is a mean over positions, not over samples."""
    accuracies: tuple[float, ...] = ()
    """Test accuracies whose first step is reported."""
    cosine: bool = False
    """The learning rate falls to 0 by a cosine."""


@cache
def split(problem: Problem) -> tuple[Data, Data]:
    """Training and test part, three to one, always the same."""
    x, y = problem.data()
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    cut = len(x) * 3 // 4
    return (x[order[:cut]], y[order[:cut]]), (x[order[cut:]], y[order[cut:]])


# -- data -----------------------------------------------------------------------------------------


def numbers(x: Any, y: Any, *, scale_x: bool = True, scale_y: float | None = None) -> Data:
    """Tensors of arrays; inputs standardised, and targets to a standard deviation if there are any."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y)
    if scale_x:
        x = (x - x.mean(0)) / (x.std(0) + 1e-12)
    if y.dtype.kind == "f":
        y = y.reshape(len(y), -1)
        y = y if scale_y is None else (y - y.mean(0)) / y.std(0) * scale_y
    kind = torch.float32 if y.dtype.kind == "f" else torch.int64
    return torch.tensor(x, dtype=torch.float32), torch.tensor(y, dtype=kind)


@cache
def digits() -> Data:
    x, y = datasets.load_digits(return_X_y=True)
    return numbers(x / 16 - 0.3, y, scale_x=False)


def reconstruct(data: Callable[[], Data]) -> Callable[[], Data]:
    def images() -> Data:
        x = data()[0].flatten(1)
        return x, x

    return images


def as_images(data: Callable[[], Data], *shape: int) -> Callable[[], Data]:
    return lambda: (data()[0].reshape(-1, *shape), data()[1])


def sources(names: str, length: int, count: int) -> Data:
    """Windows of modules of Python's library as character codes, with the next characters."""
    library = Path(io.__file__).parent
    text = "".join((library / f"{name}.py").read_text() for name in names.split())
    codes = torch.tensor([ord(c) for c in text if ord(c) < 128])
    starts = torch.linspace(0, len(codes) - length - 2, count).long()[:, None]
    return codes[starts + torch.arange(length)], codes[starts + torch.arange(1, length + 1)]


def multilabel() -> Data:
    x, y = datasets.make_multilabel_classification(1600, 24, n_classes=8, random_state=0)
    return numbers(x, y.astype(float))


def with_outliers(x: np.ndarray, y: np.ndarray, share: float, size: float) -> Data:
    rng = np.random.default_rng(0)
    y = (y - y.mean()) / y.std()
    return numbers(x, y + (rng.random(len(y)) < share) * rng.normal(0, size, len(y)))


LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@cache
def letters(count: int = 2600, size: int = 16) -> Data:
    """Letters in the fonts of Matplotlib, moved, turned and covered with noise."""
    rng, folder = np.random.default_rng(0), Path(matplotlib.get_data_path()) / "fonts/ttf"
    fonts = [
        ImageFont.truetype(path, size - 3) for path in sorted(folder.glob("DejaVuS*[a-z].ttf"))
    ]
    fonts = [font for font in fonts if "Display" not in str(font.path)]
    images, labels = [], rng.integers(26, size=count)
    for label in labels:
        image = Image.new("L", (size, size))
        at = tuple(size / 2 + rng.uniform(-1.5, 1.5, 2))
        font = fonts[rng.integers(len(fonts))]
        ImageDraw.Draw(image).text(at, LETTERS[label], 255, font, "mm")
        images.append(np.asarray(image.rotate(rng.uniform(-20, 20))) / 255)
    noisy = np.stack(images) + rng.normal(0, 0.15, (count, size, size))
    return numbers((noisy - 0.2).reshape(count, -1), labels, scale_x=False)


def letter_pairs() -> Data:
    """Two letters on top of each other; both are to be named."""
    x, y = letters()
    one, two = F.one_hot(y, 26), F.one_hot(y.roll(1), 26)
    return x + x.roll(1, 0), ((one + two) > 0).float()


def photo(name: str, size: int, count: int) -> Tensor:
    """Patches of a photograph, [count, 3, size, size], in [-1/2, 1/2]."""
    pixels = torch.from_numpy(datasets.load_sample_image(f"{name}.jpg").copy()).float() / 255 - 0.5
    patches = pixels.permute(2, 0, 1)[:, ::2, ::2].unfold(1, size, 5).unfold(2, size, 5)
    patches = patches.permute(1, 2, 0, 3, 4).reshape(-1, 3, size, size)
    return patches[torch.linspace(0, len(patches) - 1, count).long()]


@cache
def placed_patches() -> Data:
    """Patches of two photographs, brightness and contrast removed: which photograph, which quarter."""
    parts = [photo(name, 16, 1400) for name in ("china", "flower")]
    x = torch.cat(parts)
    x = (x - x.mean((2, 3), keepdim=True)) / (x.std((2, 3), keepdim=True) + 0.02)
    # `photo` goes from the top to the bottom.
    return x.flatten(1), torch.arange(len(x)) // 350


def grey_patches() -> Data:
    x = photo("china", 10, 2400).mean(1).flatten(1)
    return x, x


def waves() -> Data:
    """Noisy sine, square, saw and triangle waves of random frequency and phase, [n, 24, 1]."""
    rng, n = np.random.default_rng(0), 1600
    y = rng.integers(4, size=n)
    t = np.arange(24) / 24 * rng.uniform(1.5, 3, (n, 1)) + rng.random((n, 1))
    sine, saw = np.sin(2 * np.pi * t), 2 * (t % 1) - 1
    kinds = np.stack([sine, np.sign(sine), saw, 2 * abs(saw) - 1])
    x = kinds[y, np.arange(n)] + rng.normal(0, 0.1, (n, 24))
    return numbers(x[:, :, None], y, scale_x=False)


def rings() -> Data:
    """Five shells of unequal size around the origin of R^6: 50, 30, 14, 4 and 2 % of the samples."""
    x = np.random.default_rng(0).normal(size=(2400, 6))
    radius = np.linalg.norm(x, axis=1)
    return numbers(x, np.searchsorted(np.quantile(radius, [0.5, 0.8, 0.94, 0.98]), radius))


def hastie() -> Data:
    """Whether the norm of ten normal numbers is above its median."""
    x, y = datasets.make_hastie_10_2(2400, random_state=0)
    return numbers(x, (y > 0).astype(int))


def spirals() -> Data:
    """Three interleaved spiral arms in the plane."""
    rng, n = np.random.default_rng(0), 6000
    y, r = rng.integers(3, size=n), np.sqrt(rng.random(n))
    angle = 6 * r + 2 * np.pi * y / 3 + rng.normal(0, 0.15, n)
    return numbers(np.stack([r * np.cos(angle), r * np.sin(angle)], 1), y)


def sums_modulo() -> Data:
    a, b = torch.cartesian_prod(torch.arange(37), torch.arange(37)).T
    return torch.stack([a, b], 1), (a + b) % 37


def discs() -> Data:
    """Discs, squares and background in noisy 16 x 16 images, to be told apart pixel by pixel."""
    rng, n = np.random.default_rng(0), 800
    rows, columns = np.mgrid[:16, :16]
    masks = np.zeros((n, 16, 16), np.int64)
    for mask in masks:
        for kind in (1, 2):
            row, column, size = (*rng.uniform(3, 13, 2), rng.uniform(2, 4))
            away = abs(rows - row), abs(columns - column)
            mask[np.hypot(*away) < size if kind == 1 else np.maximum(*away) < size] = kind
    x = (masks > 0) + rng.normal(0, 0.4, masks.shape)
    return numbers(x[:, None], masks, scale_x=False)


def counts() -> Data:
    """Poisson counts with a rate that is a smooth function of eight inputs."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1600, 8))
    rate = np.exp(np.sin(x[:, 0]) + 0.5 * x[:, 1] * x[:, 2] / (1 + abs(x[:, 3])) + 0.5)
    return numbers(x, rng.poisson(np.minimum(rate, 50)).astype(float))


def mixed_labels() -> Data:
    """Eight overlapping clusters; a quarter of the labels is wrong."""
    x, y = datasets.make_blobs(2000, 20, centers=8, cluster_std=6, random_state=0)
    rng = np.random.default_rng(0)
    return numbers(x, np.where(rng.random(len(y)) < 0.25, rng.integers(8, size=len(y)), y))


def ratings() -> Data:
    """Noisy entries of a matrix of rank 3, as (row, column) and value."""
    rng, n = np.random.default_rng(0), 4000
    left, right = rng.normal(size=(60, 3)), rng.normal(size=(80, 3))
    at = rng.integers([60, 80], size=(n, 2))
    values = (left[at[:, 0]] * right[at[:, 1]]).sum(1) + rng.normal(0, 0.2, n)
    return torch.tensor(at), torch.tensor(values, dtype=torch.float32)[:, None]


class Images:
    """Parquet image files, with the folder set by the command line."""

    folder: Path | None = None

    @classmethod
    def read(cls, name: str) -> Data:
        if cls.folder is None:
            raise SystemExit("the set `images` needs --data FOLDER with Parquet files")
        table = pq.read_table(cls.folder / f"{name}_train.parquet").slice(0, 8000)
        raw, y = table["image"].to_pylist(), table["label"].to_numpy()
        if name.startswith("cifar"):
            decoded = [np.asarray(Image.open(io.BytesIO(each))) for each in raw]
            x = np.stack(decoded).transpose(0, 3, 1, 2) / 255
        else:
            x = np.frombuffer(b"".join(raw), np.uint8).reshape(-1, 1, 28, 28) / 255
        flat = ((x - x.mean()) / x.std()).reshape(len(x), -1)
        return numbers(flat, y.astype(np.int64), scale_x=False)


# -- models ---------------------------------------------------------------------------------------


def mlp(*sizes: int, act: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    layers = [m for a, b in pairwise(sizes[:-1]) for m in (nn.Linear(a, b), act())]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


def cnn(
    shape: tuple[int, int, int],
    widths: tuple[int, ...],
    classes: int,
    *,
    norm: Callable[[int], nn.Module] | None = None,
    kernel: int = 3,
) -> nn.Sequential:
    channels, rows, columns = shape
    layers: list[nn.Module] = [nn.Unflatten(1, shape)]
    for width in widths:
        layers += [nn.Conv2d(channels, width, kernel, padding=kernel // 2, bias=norm is None)]
        layers += [norm(width)] if norm else []
        layers += [nn.ReLU(), nn.MaxPool2d(2)]
        channels, rows, columns = width, rows // 2, columns // 2
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(channels * rows * columns, classes))


class Add(nn.Module):
    """x + f(x), then the activation."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.layers(x))


def residual(
    shape: tuple[int, int, int], width: int, blocks: int, classes: int, norm: Any
) -> nn.Sequential:
    def conv(channels: int, stride: int = 1) -> list[nn.Module]:
        return [nn.Conv2d(channels, width, 3, stride, 1, bias=False), norm(width)]

    body = [Add(*conv(width), nn.ReLU(), *conv(width)) for _ in range(blocks)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, classes)]
    return nn.Sequential(nn.Unflatten(1, shape), *conv(shape[0], 2), nn.ReLU(), *body, *head)


class Transformer(nn.Module):
    """Pre-norm blocks over [n, length, features] or token codes; the position embedding is uncovered.

    With `causal`, logits of each next token; without, logits of the mean over positions.
    """

    def __init__(
        self, inputs: nn.Module, length: int, width: int, blocks: int, out: int, causal: bool
    ) -> None:
        super().__init__()
        self.inputs, self.causal = inputs, causal
        self.position = nn.Parameter(torch.randn(length, width) * 0.02)
        self.attention = nn.ModuleList(
            nn.MultiheadAttention(width, 4, batch_first=True) for _ in range(blocks)
        )
        self.feed = nn.ModuleList(mlp(width, 2 * width, width, act=nn.GELU) for _ in range(blocks))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2 * blocks + 1))
        self.head = nn.Linear(width, out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inputs(x) + self.position
        length = x.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool).triu(1) if self.causal else None
        for i, (attend, feed) in enumerate(zip(self.attention, self.feed, strict=True)):
            y = self.norms[2 * i](x)
            x = x + attend(y, y, y, attn_mask=mask, need_weights=False)[0]
            x = x + feed(self.norms[2 * i + 1](x))
        x = self.norms[-1](x)
        return self.head(x if self.causal else x.mean(1))


class Recurrent(nn.Module):
    """A GRU, which K-FAC does not cover, with a covered output layer."""

    def __init__(self, features: int, width: int, classes: int) -> None:
        super().__init__()
        self.gru = nn.GRU(features, width, batch_first=True)
        self.out = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gru(x)[0][:, -1])


class Factorised(nn.Module):
    """Inner products of a row's and a column's embedding."""

    def __init__(self, rows: int, columns: int, rank: int) -> None:
        super().__init__()
        self.rows, self.columns = nn.Embedding(rows, rank), nn.Embedding(columns, rank)

    def forward(self, at: Tensor) -> Tensor:
        return (self.rows(at[:, 0]) * self.columns(at[:, 1])).sum(1, keepdim=True)


def group_norm(width: int) -> nn.Module:
    return nn.GroupNorm(4, width)


# -- losses ---------------------------------------------------------------------------------------


def next_token(logits: Tensor, codes: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), codes.flatten())


def poisson(log_rate: Tensor, count: Tensor) -> Tensor:
    """With Stirling's terms, so that a perfect fit is near zero and the loss stays positive."""
    return F.poisson_nll_loss(log_rate, count, full=True)


ce, mse, bce = F.cross_entropy, F.mse_loss, F.binary_cross_entropy_with_logits

# -- the sets -------------------------------------------------------------------------------------


def vit(patch: int, side: int, channels: int, width: int, classes: int) -> nn.Module:
    """A transformer over square patches of flat images."""
    count = (side // patch) ** 2
    cut = nn.Sequential(
        nn.Unflatten(1, (channels, side, side)),
        nn.Unfold(patch, stride=patch),
        _Swap(),
        nn.Linear(channels * patch**2, width),
    )
    return Transformer(cut, count, width, 1, classes, causal=False)


class _Swap(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).contiguous()  # kfac-pytorch needs it


def language_model(length: int, width: int, blocks: int) -> nn.Module:
    return Transformer(nn.Embedding(128, width), length, width, blocks, 128, causal=True)


def _classes(*args: int, **options: Any) -> Callable[[], Data]:
    return lambda: numbers(*datasets.make_classification(*args, random_state=0, **options))


def _friedman(kind: int, count: int, noise: float, **scales: Any) -> Callable[[], Data]:
    make = getattr(datasets, f"make_friedman{kind}")
    return lambda: numbers(*make(count, noise=noise, random_state=0), **scales)


def _diabetes(**scales: Any) -> Callable[[], Data]:
    return lambda: numbers(*datasets.load_diabetes(return_X_y=True, scaled=False), **scales)


SEARCH = (
    Problem("digits mlp", digits, lambda: mlp(64, 64, 32, 10), ce, 64, 200),
    Problem("digits cnn", digits, lambda: cnn((1, 8, 8), (16, 32), 10), ce, 128, 100),
    Problem(
        "digits cnn batchnorm",
        digits,
        lambda: cnn((1, 8, 8), (16, 32), 10, norm=nn.BatchNorm2d),
        ce,
        32,
        150,
    ),
    Problem(
        "digits residual",
        digits,
        lambda: residual((1, 8, 8), 16, 2, 10, nn.BatchNorm2d),
        ce,
        64,
        100,
    ),
    Problem("digits transformer", digits, lambda: vit(2, 8, 1, 32, 10), ce, 64, 150),
    Problem(
        "character lm",
        lambda: sources("argparse ast bdb calendar cmd codecs", 32, 2400),
        lambda: language_model(32, 48, 1),
        next_token,
        16,
        150,
        positions=True,
    ),
    Problem(
        "digits autoencoder",
        reconstruct(digits),
        lambda: mlp(64, 48, 24, 8, 24, 48, 64, act=nn.Tanh),
        mse,
        64,
        250,
    ),
    Problem("diabetes raw target", _diabetes(), lambda: mlp(10, 32, 16, 1), mse, 32, 250),
    Problem(
        "friedman1", _friedman(1, 1600, 0.5, scale_y=1.0), lambda: mlp(10, 48, 24, 1), mse, 256, 150
    ),
    Problem(
        "friedman1 tiny target",
        _friedman(1, 1200, 0.5, scale_y=1e-3),
        lambda: mlp(10, 32, 32, 1, act=nn.Tanh),
        mse,
        64,
        200,
    ),
    Problem(
        "breast cancer unscaled",
        lambda: numbers(*datasets.load_breast_cancer(return_X_y=True), scale_x=False),
        lambda: mlp(30, 32, 16, 2),
        ce,
        32,
        200,
    ),
    Problem(
        "imbalanced 3 %",
        _classes(2400, 20, n_informative=10, weights=[0.97], flip_y=0.005, class_sep=0.7),
        lambda: mlp(20, 40, 20, 2),
        ce,
        64,
        200,
    ),
    Problem("multi-label bce", multilabel, lambda: mlp(24, 48, 8), bce, 64, 200),
    Problem(
        "diabetes huber",
        lambda: with_outliers(*datasets.load_diabetes(return_X_y=True), 0.05, 5),
        lambda: mlp(10, 32, 16, 1),
        F.huber_loss,
        8,
        300,
    ),
    Problem("digits deep tanh", digits, lambda: mlp(64, *[32] * 9, 10, act=nn.Tanh), ce, 256, 120),
    Problem("digits gru", as_images(digits, 8, 8), lambda: Recurrent(8, 32, 10), ce, 64, 150),
    Problem(
        "classes b 1024",
        _classes(5600, 30, n_informative=15, n_classes=6),
        lambda: mlp(30, 96, 48, 6),
        ce,
        1024,
        60,
    ),
    Problem("digits linear b 8", digits, lambda: mlp(64, 10), ce, 8, 400),
)

JUDGED = (
    Problem("letters mlp", letters, lambda: mlp(256, 192, 96, 26), ce, 128, 150),
    Problem("letters cnn", letters, lambda: cnn((1, 16, 16), (12, 24), 26, kernel=5), ce, 64, 120),
    Problem(
        "patches cnn batchnorm",
        placed_patches,
        lambda: cnn((3, 16, 16), (16, 24), 8, norm=nn.BatchNorm2d),
        ce,
        256,
        70,
    ),
    Problem(
        "letters residual groupnorm",
        letters,
        lambda: residual((1, 16, 16), 16, 2, 26, group_norm),
        ce,
        32,
        150,
    ),
    Problem("letters transformer", letters, lambda: vit(4, 16, 1, 40, 26), ce, 96, 150),
    Problem(
        "character lm 2",
        lambda: sources("tarfile textwrap threading timeit tokenize", 48, 1600),
        lambda: language_model(48, 32, 2),
        next_token,
        12,
        120,
        positions=True,
    ),
    Problem(
        "patches autoencoder",
        grey_patches,
        lambda: mlp(100, 120, 60, 12, 60, 120, 100),
        mse,
        100,
        250,
    ),
    Problem(
        "friedman2 raw target", _friedman(2, 1000, 5.0), lambda: mlp(4, 40, 20, 1), mse, 48, 250
    ),
    Problem(
        "friedman3",
        _friedman(3, 900, 0.05, scale_y=1.0),
        lambda: mlp(4, 24, 24, 24, 1, act=nn.Tanh),
        mse,
        16,
        300,
    ),
    Problem(
        "swiss roll tiny target",
        lambda: numbers(*datasets.make_swiss_roll(1500, random_state=0), scale_y=1e-4),
        lambda: mlp(3, 96, 64, 1),
        mse,
        256,
        200,
    ),
    Problem(
        "wine unscaled",
        lambda: numbers(*datasets.load_wine(return_X_y=True), scale_x=False),
        lambda: mlp(13, 24, 3),
        ce,
        16,
        220,
    ),
    Problem("rare rings", rings, lambda: mlp(6, 96, 48, 5), ce, 192, 200),
    Problem("letter pairs bce", letter_pairs, lambda: mlp(256, 128, 96, 26), bce, 160, 180),
    Problem(
        "linear huber",
        lambda: with_outliers(*datasets.make_regression(1000, 15, random_state=0), 0.05, 5),
        lambda: mlp(15, 20, 1, act=nn.SiLU),
        F.smooth_l1_loss,
        40,
        250,
    ),
    Problem(
        "hastie deep tanh",
        hastie,
        lambda: mlp(10, *[24] * 12, 2, act=nn.Tanh),
        ce,
        512,
        120,
    ),
    Problem("waves gru", waves, lambda: Recurrent(1, 24, 4), ce, 72, 150),
    Problem("spirals b 1024", spirals, lambda: mlp(2, 128, 64, 3), ce, 1024, 80),
    Problem(
        "iris b 8",
        lambda: numbers(*datasets.load_iris(return_X_y=True)),
        lambda: mlp(4, 16, 3),
        ce,
        8,
        250,
    ),
)

FRESH = (
    Problem(
        "sums modulo 37",
        sums_modulo,
        lambda: nn.Sequential(nn.Embedding(37, 24), nn.Flatten(), mlp(48, 96, 37)),
        ce,
        128,
        250,
    ),
    Problem(
        "discs segmentation",
        discs,
        lambda: nn.Sequential(
            nn.Conv2d(1, 12, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(12, 12, 5, padding=2),
            nn.ReLU(),
            nn.Conv2d(12, 3, 1),
        ),
        ce,
        20,
        120,
        positions=True,
    ),
    Problem("poisson counts", counts, lambda: mlp(8, 32, 32, 1), poisson, 64, 200),
    Problem("mixed labels", mixed_labels, lambda: mlp(20, 64, 8), ce, 32, 200),
    Problem(
        "friedman2 nothing scaled",
        _friedman(2, 1200, 5.0, scale_x=False),
        lambda: mlp(4, 32, 16, 1),
        mse,
        64,
        250,
    ),
    Problem("factorised ratings", ratings, lambda: Factorised(60, 80, 6), mse, 256, 250),
)

IMAGES = (
    Problem(
        "fashion b 1024",
        lambda: Images.read("fashion_mnist"),
        lambda: cnn((1, 28, 28), (16, 32), 10),
        ce,
        1024,
        45,
        accuracies=(0.75, 0.80),
        cosine=True,
    ),
    Problem(
        "cifar batchnorm b 512",
        lambda: Images.read("cifar10_jpeg"),
        lambda: cnn((3, 32, 32), (16, 32, 32), 10, norm=nn.BatchNorm2d),
        ce,
        512,
        72,
        accuracies=(0.46, 0.48),
        cosine=True,
    ),
    Problem(
        "fashion b 256",
        lambda: Images.read("fashion_mnist"),
        lambda: cnn((1, 28, 28), (16, 32), 10),
        ce,
        256,
        92,
        accuracies=(0.83, 0.85),
        cosine=True,
    ),
)

SETS = {"search": SEARCH, "judged": JUDGED, "fresh": FRESH, "images": IMAGES}
