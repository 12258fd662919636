"""Transformers for text and images, built of torch's and torchvision's layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from elastic_kfac.errors import ConfigError

GPT_SIZES = {"small": (12, 768), "medium": (24, 1024), "large": (36, 1280), "xl": (48, 1600)}
"""(layers, width), Radford et al. (2019)."""
BERT_SIZES = {
    "tiny": (2, 128),
    "mini": (4, 256),
    "small": (4, 512),
    "medium": (8, 512),
    "base": (12, 768),
    "large": (24, 1024),
}
"""(layers, width), Devlin et al. (2019) and Turc et al. (2019)."""
VIT_SIZES = {"tiny": (12, 192), "small": (12, 384), "base": (12, 768)}
"""(layers, width), Dosovitskiy et al. (2021) and Touvron et al. (2021)."""


class Gpt(nn.Module):
    """Logits [batch, tokens, vocabulary] of the next token; blocks normalise first (GPT-2)."""

    def __init__(
        self, vocabulary: int, context: int, layers: int, width: int, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = _blocks(layers, width, heads, dropout, norm_first=True)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        _initialise(self)
        for name, parameter in self.blocks.named_parameters():
            # What is added to the residual stream is scaled by 1/sqrt(number of additions).
            if name.endswith(("out_proj.weight", "linear2.weight")):
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5)

    def forward(self, tokens: Tensor, tokens_mask: Tensor | None = None) -> Tensor:
        """Logits of tokens [batch, tokens]; a boolean mask of their shape is False at padding."""
        x = self.dropout(self.tokens(tokens) + self.positions(_places(tokens, self.positions)))
        future = torch.ones(2 * tokens.shape[1:], dtype=torch.bool, device=x.device).triu(1)
        padding = None if tokens_mask is None else ~tokens_mask
        for block in self.blocks:
            x = block(x, future, padding, is_causal=True)
        return self.head(self.norm(x))


class Bert(nn.Module):
    """Logits [batch, tokens, vocabulary] of masked tokens, or of the sequence [batch, classes]."""

    def __init__(
        self,
        vocabulary: int,
        context: int,
        layers: int,
        width: int,
        heads: int,
        dropout: float,
        num_outputs: int,
        *,
        pools: bool = False,
        initial_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.segments = nn.Embedding(2, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)
        self.dropout = nn.Dropout(dropout)
        self.blocks = _blocks(layers, width, heads, dropout, norm_first=False)
        self.pools, self.num_outputs = pools, num_outputs
        self.transform = nn.Linear(width, width)
        self.head_norm = nn.Identity() if pools else nn.LayerNorm(width, eps=1e-12)
        self.head = nn.Linear(width, num_outputs if pools else vocabulary)
        _initialise(self, initial_std)

    def forward(
        self, tokens: Tensor, tokens_mask: Tensor | None = None, segments: Tensor | None = None
    ) -> Tensor:
        """Logits of tokens [batch, tokens]; a boolean mask of their shape is False at padding, and
        `segments` holds 0 or 1 (default 0)."""
        x = self.tokens(tokens) + self.positions(_places(tokens, self.positions))
        x = x + self.segments(torch.zeros_like(tokens) if segments is None else segments)
        x = self.dropout(self.norm(x))
        padding = None if tokens_mask is None else ~tokens_mask
        for block in self.blocks:
            x = block(x, src_key_padding_mask=padding)
        if self.pools:
            return self.head(self.dropout(torch.tanh(self.transform(x[:, 0]))))
        logits = self.head(self.head_norm(nn.functional.gelu(self.transform(x))))
        return logits[..., : self.num_outputs]


def _blocks(
    layers: int, width: int, heads: int, dropout: float, *, norm_first: bool
) -> nn.ModuleList:
    eps = 1e-5 if norm_first else 1e-12
    return nn.ModuleList(
        nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, "gelu", eps, batch_first=True, norm_first=norm_first
        )
        for _ in range(layers)
    )


def _places(tokens: Tensor, positions: nn.Embedding) -> Tensor:
    """Positions [batch, tokens]: one row per sample, as K-FAC needs the gradient of each sample."""
    if tokens.shape[1] > positions.num_embeddings:
        raise ConfigError(
            "the sequence is longer than the context of the model",
            given=f"{tokens.shape[1]} tokens",
            allowed=f"up to {positions.num_embeddings}",
        )
    return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)


def _initialise(model: nn.Module, std: float = 0.02) -> None:
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=std)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


def _sized(
    name: str,
    sizes: dict[str, tuple[int, int]],
    size: str,
    layers: int | None,
    width: int | None,
    heads: int | None,
) -> tuple[int, int, int]:
    """(layers, width, heads) of a named size, unless they are given; heads are of width 64."""
    if size not in sizes:
        raise ConfigError(f"{name}: unknown size", given=size, allowed=", ".join(sizes))
    layers, width = layers or sizes[size][0], width or sizes[size][1]
    heads = heads or max(1, width // 64)
    if width % heads:
        raise ConfigError(
            f"{name}: width must be a multiple of heads", given=f"width={width}, heads={heads}"
        )
    return layers, width, heads


def gpt(
    vocabulary: int,
    input_shape: tuple[int, ...],
    *,
    size: str = "small",
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    dropout: float = 0.0,
    tied: bool = True,
) -> nn.Module:
    """GPT-2 small, 124.4 M parameters for 50,257 tokens and a context of 1024; medium 354.8 M, large
    774.0 M, xl 1,557.6 M (Radford et al. 2019; counts of the published weights). `tied` shares the
    embedding with the output layer; K-FAC leaves such a weight out."""
    shape = _sized("gpt", GPT_SIZES, size, layers, width, heads)
    model = Gpt(vocabulary, input_shape[0], *shape, dropout)
    if tied:
        model.head.weight = model.tokens.weight
    return model


def bert(
    vocabulary: int,
    input_shape: tuple[int, ...],
    *,
    columns: Mapping[str, Any] | None = None,
    size: str = "base",
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    dropout: float = 0.0,
    tied: bool = True,
    initial_std: float = 0.02,
) -> nn.Module:
    """BERT-base with its head for masked tokens, 109.5 M parameters for 30,522 tokens and a context of
    512 (Devlin et al. 2019: 110 M); tiny, mini, small, medium (Turc et al. 2019) and large.

    `initial_std` of the weights is the published 0.02, which suits a width of 768. In a much narrower
    model it leaves almost nothing of what attention adds: 0.02·sqrt(768 / width) keeps its share.
    """
    shape = _sized("bert", BERT_SIZES, size, layers, width, heads)
    # In a run the mask is a further token, of number `vocabulary`.
    rows = vocabulary + 1 if columns else vocabulary
    model = Bert(rows, input_shape[0], *shape, dropout, vocabulary, initial_std=initial_std)
    if tied:
        model.head.weight = model.tokens.weight
    return model


def bert_classifier(
    num_classes: int,
    input_shape: tuple[int, ...],
    *,
    columns: Mapping[str, Any] | None = None,
    vocabulary: int | None = None,
    size: str = "base",
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """BERT with a classifier of sequences, 109.5 M parameters at size base and two classes (Devlin et al.
    2019); the vocabulary is that of the token column."""
    if vocabulary is None:
        found = (
            column.vocabulary for column in (columns or {}).values() if column.kind == "tokens"
        )
        vocabulary = next(found, None)
    if vocabulary is None:
        raise ConfigError(
            "bert_classifier needs a column of tokens", change="set model.arguments.vocabulary"
        )
    shape = _sized("bert_classifier", BERT_SIZES, size, layers, width, heads)
    return Bert(vocabulary, input_shape[0], *shape, dropout, num_classes, pools=True)


def vit(
    num_classes: int,
    image_shape: tuple[int, int, int],
    *,
    size: str = "tiny",
    patch: int | None = None,
    layers: int | None = None,
    width: int | None = None,
    heads: int | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """torchvision's vision transformer: ViT-Ti/16 5.7 M, ViT-S/16 22.1 M, ViT-B/16 86.6 M parameters at
    224x224 (Touvron et al. 2021, table 1). `patch` is 16 pixels, an eighth of smaller images."""
    from torchvision.models import VisionTransformer

    channels, height, side = image_shape
    depth, features, number = _sized("vit", VIT_SIZES, size, layers, width, heads)
    patch = patch or min(16, max(1, side // 8))
    if height != side or side % patch:
        raise ConfigError(
            "vit needs square images of whole patches",
            given=f"{height}x{side} pixels, patch={patch}",
            change="set model.arguments.patch or data.image_size",
        )
    model: Any = VisionTransformer(
        side, patch, depth, number, features, 4 * features, dropout, num_classes=num_classes
    )
    if channels != 3:
        conv = nn.Conv2d(channels, features, patch, stride=patch)
        nn.init.trunc_normal_(conv.weight, std=(channels * patch * patch) ** -0.5)
        nn.init.zeros_(conv.bias)  # type: ignore[arg-type]
        model.conv_proj = conv
    # A new network, unlike one to be fine-tuned, does not start with an output layer of zeros.
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    return model
