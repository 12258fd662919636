"""Networks with an output per pixel: segmentation and detection."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac.errors import ConfigError
from elastic_kfac.zoo.torchvision_models import from_torchvision


def _convs(inputs: int, outputs: int, batch_norm: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for size in (inputs, outputs):
        layers.append(nn.Conv2d(size, outputs, 3, padding=1, bias=not batch_norm))
        layers += [nn.BatchNorm2d(outputs)] if batch_norm else []
        layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class UNet(nn.Module):
    """An encoder and a decoder with skip connections; logits [batch, classes, height, width]."""

    def __init__(
        self, channels: int, num_classes: int, width: int, depth: int, batch_norm: bool
    ) -> None:
        super().__init__()
        sizes = [width * 2**level for level in range(depth + 1)]
        self.down = nn.ModuleList(
            _convs(inputs, outputs, batch_norm)
            for inputs, outputs in zip([channels, *sizes], sizes, strict=False)
        )
        pairs = list(zip(sizes[:0:-1], sizes[-2::-1], strict=True))
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, stride=2) for a, b in pairs)
        self.merge = nn.ModuleList(_convs(a, b, batch_norm) for a, b in pairs)
        self.head = nn.Conv2d(width, num_classes, 1)

    def forward(self, x: Tensor) -> Tensor:
        size, step = x.shape[-2:], 2 ** len(self.up)
        # Padding to whole steps of the coarsest level keeps every skip connection aligned.
        x = F.pad(x, (0, -size[1] % step, 0, -size[0] % step))
        skips: list[Tensor] = []
        for index, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if index else x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([skip, up(x)], dim=1))
        return self.head(x)[..., : size[0], : size[1]]


def unet(
    num_classes: int,
    image_shape: tuple[int, int, int],
    *,
    width: int = 64,
    depth: int = 4,
    batch_norm: bool = False,
) -> nn.Module:
    """U-Net (Ronneberger et al. 2015), convolutions padded: 31.0 M parameters; 7.8 M at width 32 (Zhou et
    al. 2018, table 2)."""
    return UNet(image_shape[0], num_classes, width, depth, batch_norm)


class AnchorDetector(nn.Module):
    """A single-shot detector (Liu et al. 2016) with one square anchor per cell on two levels, strides 4
    and 8.

    Outputs: `boxes` [batch, anchors, 4], corners x0, y0, x1, y1 in pixels; `scores` [batch, anchors,
    1 + classes], logits, the first for the background; `anchors` [anchors, 4], corners.
    """

    def __init__(
        self, channels: int, num_classes: int, width: int, sizes: tuple[float, float]
    ) -> None:
        super().__init__()
        self.sizes = sizes
        self.encode = _convs(channels, width, True)
        self.middle = _convs(width, 2 * width, True)
        self.fine = _convs(2 * width, 4 * width, True)
        self.coarse = _convs(4 * width, 4 * width, True)
        self.up = nn.ConvTranspose2d(4 * width, 4 * width, 2, stride=2)
        self.merge = _convs(8 * width, 4 * width, True)
        self.heads = nn.ModuleList(nn.Conv2d(4 * width, num_classes + 5, 1) for _ in sizes)
        for head in self.heads:
            nn.init.normal_(head.weight, std=0.01)  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]
            with torch.no_grad():
                # Few anchors meet an object: each starts as background with probability 0.99.
                head.bias[4] = math.log(99 * num_classes)  # type: ignore[operator]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        x = F.max_pool2d(self.encode(images), 2, ceil_mode=True)
        fine = self.fine(F.max_pool2d(self.middle(x), 2, ceil_mode=True))
        coarse = self.coarse(F.max_pool2d(fine, 2, ceil_mode=True))
        up = self.up(coarse)[..., : fine.shape[-2], : fine.shape[-1]]
        levels = self.merge(torch.cat([fine, up], dim=1)), coarse
        outputs, anchors = [], []
        for level, (features, head) in enumerate(zip(levels, self.heads, strict=True)):
            outputs.append(head(features).permute(0, 2, 3, 1).flatten(1, 2))
            anchors.append(_anchors(features, 4 * 2**level, self.sizes[level]))
        found, corners = torch.cat(outputs, dim=1), torch.cat(anchors)
        boxes = _decoded(found[..., :4], corners)
        return {"boxes": boxes, "scores": found[..., 4:], "anchors": corners}


def _anchors(features: Tensor, stride: int, size: float) -> Tensor:
    """Squares of a size around the middle of each cell, row by row [cells, 4]."""
    rows, columns = (
        (torch.arange(n, device=features.device, dtype=features.dtype) + 0.5) * stride
        for n in features.shape[-2:]
    )
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    centres = torch.stack([x, y], dim=-1).flatten(0, 1)
    return torch.cat([centres - size / 2, centres + size / 2], dim=1)


def _decoded(deltas: Tensor, anchors: Tensor) -> Tensor:
    """Corners [batch, anchors, 4] of boxes as R-CNN encodes them: shifts by its size, log scales."""
    size = anchors[:, 2:] - anchors[:, :2]
    centres = anchors[:, :2] + size / 2 + deltas[..., :2] * size
    half = size * deltas[..., 2:].clamp(max=4).exp() / 2
    return torch.cat([centres - half, centres + half], dim=-1)


def anchor_detector(
    num_classes: int,
    image_shape: tuple[int, int, int],
    *,
    width: int = 16,
    sizes: tuple[float, float] = (12, 20),
) -> nn.Module:
    """A small single-shot detector (after Liu et al. 2016); `sizes` are its anchors' in pixels."""
    if min(image_shape[1:]) < 16:
        raise ConfigError("anchor_detector needs images of 16x16 pixels or more", given=image_shape)
    return AnchorDetector(image_shape[0], num_classes, width, sizes)


class OneStage(nn.Module):
    """A one-stage detector of torchvision with the outputs of AnchorDetector."""

    def __init__(self, detector: Any) -> None:
        super().__init__()
        self.detector = detector

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        from torchvision.models.detection.image_list import ImageList

        features = self.detector.backbone(images)
        levels = [features] if isinstance(features, Tensor) else list(features.values())
        found = self.detector.head(levels)
        sizes = [tuple(images.shape[-2:])] * len(images)
        anchors = self.detector.anchor_generator(ImageList(images, sizes), levels)[0]
        deltas, coder = found["bbox_regression"], self.detector.box_coder
        if hasattr(coder, "decode_single"):
            flat = coder.decode_single(deltas.flatten(0, 1), anchors.repeat(len(images), 1))
            boxes = flat.view_as(deltas)
        else:
            boxes = coder.decode(deltas, anchors.expand_as(deltas))
        return {"boxes": boxes, "scores": found["cls_logits"], "anchors": anchors}


def _one_stage(name: str) -> Any:
    def build(num_classes: int, image_shape: tuple[int, int, int], **arguments: Any) -> nn.Module:
        detector: Any = _detector(name)(num_classes, image_shape, **arguments)
        if name.startswith("fcos"):
            # The outputs have no place for the centreness; nothing would train its layer.
            detector.head.regression_head.bbox_ctrness.requires_grad_(False)
        return OneStage(detector)

    return _named(build, name, "as a one-stage detector with anchors")


def _detector(name: str) -> Any:
    def build(num_classes: int, image_shape: tuple[int, int, int], **arguments: Any) -> nn.Module:
        arguments = {"weights_backbone": None, **arguments}
        return from_torchvision(name, num_classes + 1, image_shape, arguments)

    return _named(build, name, "whose training pass is model(images, targets)")


def _named(build: Any, name: str, what: str) -> Any:
    build.__name__ = name
    build.__doc__ = f"torchvision's {name}, {what}."
    return build


ONE_STAGE = tuple(
    map(
        _one_stage,
        (
            "retinanet_resnet50_fpn",
            "fcos_resnet50_fpn",
            "ssd300_vgg16",
            "ssdlite320_mobilenet_v3_large",
        ),
    )
)
TWO_STAGE = tuple(map(_detector, ("fasterrcnn_resnet50_fpn", "maskrcnn_resnet50_fpn")))
