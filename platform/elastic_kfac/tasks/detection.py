"""Detection with anchors: the boxes and classes of objects in images."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from elastic_kfac.data.columns import Column
from elastic_kfac.errors import ConfigError
from elastic_kfac.tasks.task import Likelihood, TargetTask

Outputs = Mapping[str, Tensor]
"""`scores` [n, anchors, 1 + classes], logits with the background first; `boxes` [n, anchors, 4] as (left,
top, right, bottom) in pixels; `anchors` [anchors, 4], the same of every image."""


class Detection(TargetTask):
    """Cross entropy of the classes and smooth L1 loss of the boxes, per image divided by its positive
    anchors (Liu et al. 2016, section 2.2).

    An anchor is positive if it overlaps a box by `positive` or is the best of a box. Of the others the
    `hard_negatives` worst per positive one count as background (at least as many in an image without
    boxes). `map` is the mean average precision over IoU 0.50 to 0.95, `map50` that at 0.50, as COCO
    defines them.
    """

    metrics: ClassVar = {"map": "max", "map50": "max"}

    def __init__(
        self,
        columns: Sequence[Column],
        *,
        positive: float = 0.5,
        hard_negatives: int = 3,
        box_weight: float = 1.0,
        least_score: float = 0.05,
        most_boxes: int = 100,
        nms: float = 0.5,
    ) -> None:
        super().__init__(columns, "boxes", "detection", "coco:PATH")
        if not 0 < positive < 1:
            raise ConfigError(
                "task.arguments.positive out of range", given=positive, allowed="0 to 1"
            )
        self._classes = self.target.num_classes
        self._positive, self._hard_negatives = positive, hard_negatives
        self._box_weight = box_weight
        self._least_score, self._most_boxes, self._nms = least_score, most_boxes, nms

    def loss(self, outputs: Outputs, targets: Tensor) -> Tensor:
        check_outputs(outputs)
        scores, predicted = outputs["scores"].float(), outputs["boxes"].float()
        anchors = outputs["anchors"].float()
        total = scores.new_zeros(())
        for image, boxes in enumerate(targets):
            real = boxes[boxes[:, 4] >= 0].float()
            matched = self._matches(anchors, real)
            found = matched >= 0
            wanted = torch.zeros_like(matched)
            wanted[found] = real[matched[found], 4].long() + 1
            entropy = F.cross_entropy(scores[image], wanted, reduction="none")
            positives = int(found.sum())
            negatives = entropy[~found]
            count = min(len(negatives), self._hard_negatives * max(positives, 1))
            part = entropy[found].sum() + negatives.topk(count).values.sum()
            if positives:
                aims = encoded(real[matched[found], :4], anchors[found])
                own = encoded(predicted[image][found], anchors[found])
                part = part + self._box_weight * F.smooth_l1_loss(own, aims, reduction="sum")
            total = total + part / max(positives, 1)
        return total

    def _matches(self, anchors: Tensor, boxes: Tensor) -> Tensor:
        """The box of each anchor, -1 without one."""
        if not len(boxes):
            return torch.full((len(anchors),), -1, device=anchors.device)
        overlaps = overlap(anchors, boxes[:, :4])
        best, which = overlaps.max(dim=1)
        matched = torch.where(best >= self._positive, which, -1)
        # The best anchor of a box is its own, however small the overlap.
        matched[overlaps.argmax(dim=0)] = torch.arange(len(boxes), device=anchors.device)
        return matched

    def predictions(self, outputs: Outputs) -> list[dict[str, np.ndarray[Any, Any]]]:
        """The boxes, scores and classes found in each image, best first."""
        from torchvision.ops import batched_nms

        check_outputs(outputs)
        result = []
        for scores, boxes in zip(outputs["scores"], outputs["boxes"], strict=True):
            flat = scores.float().softmax(dim=1)[:, 1:].flatten()
            order = flat.argsort(descending=True)[: 10 * self._most_boxes]
            order = order[flat[order] > self._least_score]
            near, classes = boxes.float()[order // self._classes], order % self._classes
            kept = batched_nms(near, flat[order], classes, self._nms)[: self._most_boxes]
            found = {"boxes": near[kept], "scores": flat[order][kept], "classes": classes[kept]}
            result.append({name: tensor.cpu().numpy() for name, tensor in found.items()})
        return result

    def records(self, outputs: Outputs, targets: Tensor) -> list[Any]:
        truth = [boxes[boxes[:, 4] >= 0].cpu().numpy() for boxes in targets]
        return list(zip(self.predictions(outputs), truth, strict=True))

    def values_of_records(self, records: Sequence[Any]) -> dict[str, float]:
        return mean_average_precision(records, self._classes)

    def fisher(self, outputs: Outputs, targets: Tensor) -> tuple[Tensor, Likelihood]:
        raise ConfigError(
            "task.name=detection has no distribution to draw labels from",
            change="set kfac.fisher=empirical",
        )


def check_outputs(outputs: Any) -> None:
    """Refuses the outputs of a model that is no one-stage detector.

    Raises:
        ConfigError: It says what the model returned.
    """
    if isinstance(outputs, Mapping) and {"boxes", "scores", "anchors"} <= outputs.keys():
        return
    if isinstance(outputs, list):  # What torchvision's two-stage detectors return.
        given = "a list of detections; such a model computes its losses itself"
    else:
        given = ", ".join(map(str, outputs)) if isinstance(outputs, Mapping) else "one tensor"
    raise ConfigError(
        "task.name=detection needs a model with the outputs boxes, scores and anchors",
        given=given,
        change="use a one-stage detector (anchor_detector, retinanet_resnet50_fpn, fcos_resnet50_fpn, "
        "ssd300_vgg16), or train this one in a script of your own with elastic_kfac.KFAC",
    )


def overlap(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of boxes [a, 4] and [b, 4]: [a, b]."""
    corner = torch.maximum(first[:, None, :2], second[:, :2])
    other = torch.minimum(first[:, None, 2:], second[:, 2:])
    common = (other - corner).clamp(min=0).prod(dim=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(dim=1) for boxes in (first, second)]
    return common / (areas[0][:, None] + areas[1] - common).clamp(min=1e-9)


def encoded(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Boxes [m, 4] against their anchors: the shift of the centre in sizes of the anchor, and the
    logarithm of the ratio of sizes (Girshick et al. 2014, appendix C)."""
    size = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6)
    anchor_size = anchors[:, 2:] - anchors[:, :2]
    shift = (boxes[:, :2] + boxes[:, 2:] - anchors[:, :2] - anchors[:, 2:]) / 2 / anchor_size
    return torch.cat([shift, (size / anchor_size).log()], dim=1)


def mean_average_precision(records: Sequence[Any], classes: int) -> dict[str, float]:
    """`map` and `map50` of (prediction, boxes) per image, by COCO's own evaluation."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    images = [{"id": number} for number in range(len(records))]
    categories = [{"id": number} for number in range(classes)]
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for image, (predicted, boxes) in enumerate(records):
        for left, top, right, bottom, name in boxes.tolist():
            truth.append(_annotation(image, (left, top, right, bottom), int(name), len(truth)))
        for box, score, name in zip(
            predicted["boxes"].tolist(),
            predicted["scores"].tolist(),
            predicted["classes"].tolist(),
            strict=True,
        ):
            found.append({**_annotation(image, box, int(name), len(found)), "score": score})
    if not truth:
        return {"map": 0.0, "map50": 0.0}
    sets = []
    with contextlib.redirect_stdout(io.StringIO()):  # The package prints its progress.
        for annotations in (truth, found):
            one = COCO()
            one.dataset = {"images": images, "categories": categories, "annotations": annotations}
            one.createIndex()
            sets.append(one)
        evaluation = COCOeval(*sets, "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return {
        "map": max(float(evaluation.stats[0]), 0.0),
        "map50": max(float(evaluation.stats[1]), 0.0),
    }


def _annotation(image: int, box: Sequence[float], name: int, number: int) -> dict[str, Any]:
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    return {
        "id": number + 1,
        "image_id": image,
        "category_id": name,
        "bbox": [left, top, width, height],
        "area": width * height,
        "iscrowd": 0,
    }
