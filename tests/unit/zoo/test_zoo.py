"""The built-in models: parameter counts of the literature, and one step of K-FAC."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from elastic_kfac import KFAC
from elastic_kfac.cli import main
from elastic_kfac.data.columns import Column
from elastic_kfac.errors import ConfigError
from elastic_kfac.tasks.models import create_model
from elastic_kfac.zoo import MODELS

CIFAR, IMAGENET = (3, 32, 32), (3, 224, 224)


def parameters(name: str, outputs: int, shape: tuple[int, ...], **arguments: Any) -> int:
    with torch.device("meta"):
        model = create_model(name, outputs, shape, **arguments)  # type: ignore[arg-type]
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "outputs", "shape", "arguments", "published"),
    [
        # He et al. (2016), table 6.
        ("resnet20", 10, CIFAR, {}, 0.27e6),
        ("resnet32", 10, CIFAR, {}, 0.46e6),
        # torchvision's tables of weights; timm's for the D variant.
        ("resnet18", 1000, IMAGENET, {}, 11_689_512),
        ("resnet50", 1000, IMAGENET, {}, 25_557_032),
        ("resnet50d", 1000, IMAGENET, {}, 25_576_264),
        ("alexnet", 1000, IMAGENET, {}, 61_100_840),
        ("googlenet", 1000, IMAGENET, {}, 6_624_904),
        # Zagoruyko & Komodakis (2016), tables 3 and 4.
        ("wide_resnet", 10, CIFAR, {}, 2.7e6),
        ("wide_resnet", 10, CIFAR, {"depth": 40, "widen": 4}, 8.9e6),
        ("wide_resnet", 10, CIFAR, {"depth": 28, "widen": 10}, 36.5e6),
        # Gholami et al. (2018): 0.72 M; the sum over the layers of the authors' definition for Caffe.
        ("squeezenext", 1000, IMAGENET, {}, 717_280),
        # Radford et al. (2019), counts of the published weights.
        ("gpt", 50_257, (1024,), {}, 124_439_808),
        ("gpt", 50_257, (1024,), {"size": "medium"}, 354_823_168),
        ("gpt", 50_257, (1024,), {"size": "large"}, 774_030_080),
        ("gpt", 50_257, (1024,), {"size": "xl"}, 1_557_611_200),
        # Devlin et al. (2019): 110 M and 340 M; the published checkpoints with the head for tokens.
        ("bert", 30_522, (512,), {}, 109_514_298),
        ("bert", 30_522, (512,), {"size": "large"}, 335_174_458),
        # Turc et al. (2019): tiny is 4.4 M.
        ("bert_classifier", 2, (512,), {"size": "tiny", "vocabulary": 30_522}, 4.4e6),
        # Touvron et al. (2021), table 1: 5 M, 22 M, 86 M.
        ("vit", 1000, IMAGENET, {}, 5_717_416),
        ("vit", 1000, IMAGENET, {"size": "small"}, 22_050_664),
        ("vit", 1000, IMAGENET, {"size": "base"}, 86_567_656),
        # Ronneberger et al. (2015), 31.0 M; Zhou et al. (2018), table 2, at half the width.
        ("unet", 2, (1, 572, 572), {}, 31.03e6),
        ("unet", 2, (1, 572, 572), {"width": 32}, 7.76e6),
    ],
)
def test_parameters_are_those_of_the_literature(
    name: str, outputs: int, shape: tuple[int, ...], arguments: dict[str, Any], published: float
) -> None:
    count = parameters(name, outputs, shape, **arguments)
    if isinstance(published, int):
        assert count == published
    else:
        assert count == pytest.approx(published, rel=0.02)


def test_small_networks_have_the_layers_of_their_papers() -> None:
    def dense(*sizes: int) -> int:
        return sum(a * b + b for a, b in itertools.pairwise(sizes))

    def conv(a: int, b: int, kernel: int, *, norm: int = 0) -> int:
        return a * b * kernel**2 + b + 2 * norm * b

    # Yao et al. (2018): 5x5 with pooling twice; 3x3 twice with pooling, twice, unpadded.
    c1 = conv(3, 64, 5, norm=1) + conv(64, 64, 5, norm=1) + dense(64 * 8 * 8, 384, 192, 10)
    assert parameters("c1", 10, CIFAR) == c1
    pairs = ((3, 64), (64, 64), (64, 128), (128, 128))
    c2 = sum(conv(*pair, 3, norm=1) for pair in pairs) + dense(128 * 5 * 5, 256, 256, 10)
    assert parameters("c2", 10, CIFAR) == c2
    # DistNewton's convnet: five layers, about 16,000 parameters.
    for shape in (CIFAR, (1, 28, 28)):
        model = create_model("distnewton_cnn", 10, shape)
        assert sum(isinstance(m, nn.Conv2d | nn.Linear) for m in model.modules()) == 5
        assert parameters("distnewton_cnn", 10, shape) == pytest.approx(16_000, rel=0.03)


@pytest.mark.parametrize("name", [name for name, m in MODELS.items() if m.num_outputs == 90])
def test_detectors_have_the_parameters_of_torchvisions_table(name: str) -> None:
    from torchvision.models import get_model_weights

    published = next(iter(get_model_weights(name))).meta["num_params"]
    with torch.device("meta"):
        model = create_model(name, 90, (3, 320, 320))
    # The table is of detectors with a pretrained backbone, whose normalisation is frozen.
    frozen = sum(
        parameter.numel()
        for path, module in model.named_modules()
        if "resnet" in name and "backbone.body" in path and isinstance(module, nn.BatchNorm2d)
        for parameter in module.parameters()
    )
    assert sum(parameter.numel() for parameter in model.parameters()) == published + frozen


# -- one step ------------------------------------------------------------------------------------

TEXT = {"layers": 2, "width": 16, "heads": 2}
RESIZED = {"min_size": 64, "max_size": 64}
SMALL: dict[str, tuple[int, tuple[int, ...], dict[str, Any]]] = {
    "lenet": (10, (1, 16, 16), {}),
    "gpt": (11, (8,), TEXT),
    "bert": (11, (8,), TEXT),
    "bert_classifier": (3, (8,), {**TEXT, "vocabulary": 11}),
    "alexnet": (10, CIFAR, {}),
    "vit": (10, CIFAR, {"layers": 2, "width": 24, "heads": 3}),
    "unet": (3, (1, 20, 28), {"width": 4}),
    "ssd300_vgg16": (3, (3, 300, 300), {}),
    **{name: (3, (3, 64, 64), RESIZED) for name in MODELS if "rcnn" in name},
}
LARGE = {name for name, m in MODELS.items() if m.num_outputs >= 90 and len(m.input_shape) == 3}
DENSE = {"gpt", "bert", "unet", "anchor_detector"} | {name for name in LARGE if "rcnn" not in name}
DENSE -= {name for name in LARGE if MODELS[name].num_outputs == 1000}
TIED = {"head": "shares a weight with tokens", "tokens": "shares a weight with head"}
UNCOVERED = {
    "gpt": TIED,
    "bert": TIED,
    "vit": {"": "unsupported type VisionTransformer", "encoder": "unsupported type Encoder"},
    "ssd300_vgg16": {"detector.backbone": "unsupported type SSDFeatureExtractorVGG"},
    "fcos_resnet50_fpn": {"detector.head.regression_head.bbox_ctrness": "frozen"},
}
"""What K-FAC leaves out: tied weights, and parameters of torchvision's own modules."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in LARGE - {"alexnet", "vit"} else [])
        for name in MODELS
    ],
)
def test_one_step_of_kfac_trains_every_layer_or_names_it(name: str) -> None:
    model_of = MODELS[name]
    small = (
        (3, (3, 64, 64), {}) if name in LARGE else (model_of.num_outputs, model_of.input_shape, {})
    )
    outputs, shape, arguments = SMALL.get(name, small)
    torch.manual_seed(0)
    model = create_model(name, outputs, shape, **arguments)  # type: ignore[arg-type]
    reduction = "positions" if name in DENSE else "mean"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kfac = KFAC(model, max_factor_dim=64, lr=0.1, loss_reduction=reduction)
    left_out = {layer: why for layer, why in kfac.coverage().items() if why != "covered"}
    assert left_out == UNCOVERED.get(name, {})
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    if len(shape) == 1:
        inputs = torch.randint(11, (2, *shape))
    else:
        inputs = torch.randn(2, *shape)
    loss_of(model, name, inputs, outputs).backward()
    kfac.step()
    optimizer.step()
    for path, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and bool(parameter.grad.count_nonzero()), path
        assert bool(parameter.isfinite().all()), path


def loss_of(model: nn.Module, name: str, inputs: Tensor, outputs: int) -> Tensor:
    """A loss that needs every output."""
    if "rcnn" in name:
        boxes = torch.tensor([[4.0, 4, 40, 40], [30, 20, 60, 60]])
        mask = torch.ones(2, *inputs.shape[-2:], dtype=torch.uint8)
        target = {"boxes": boxes, "labels": torch.tensor([1, 2]), "masks": mask}
        total: Tensor = sum(model(list(inputs), [target] * len(inputs)).values())
        return total
    found = model(inputs)
    if isinstance(found, dict):
        scores, boxes = found["scores"], found["boxes"]
        anchors = found["anchors"]
        assert scores.shape == (len(inputs), len(anchors), outputs + 1)
        assert boxes.shape == (len(inputs), len(anchors), 4)
        classes = torch.arange(scores.shape[1]) % (outputs + 1)
        cross = F.cross_entropy(scores.transpose(1, 2), classes.expand(len(inputs), -1))
        return cross + (boxes - anchors - 1).square().mean() / 1e3
    if name == "unet":
        assert found.shape == (len(inputs), outputs, *inputs.shape[-2:])
    elif name in ("gpt", "bert"):
        assert found.shape == (*inputs.shape, outputs)
        found = found.transpose(1, 2)
    else:
        assert found.shape == (len(inputs), outputs)
    target = torch.arange(found[:, 0].numel()).view(found[:, 0].shape) % outputs
    return F.cross_entropy(found, target)


# -- behaviour -----------------------------------------------------------------------------------


def test_a_gpt_does_not_see_the_future_and_no_model_sees_padding() -> None:
    torch.manual_seed(0)
    tokens = torch.randint(11, (2, 8))
    changed = tokens.clone()
    changed[:, 5:] = (changed[:, 5:] + 1) % 11
    gpt = create_model("gpt", 11, (8,), **TEXT)  # type: ignore[arg-type]
    torch.testing.assert_close(gpt(tokens)[:, :5], gpt(changed)[:, :5])
    assert not torch.allclose(gpt(tokens)[:, 5:], gpt(changed)[:, 5:])
    real = torch.arange(8).expand(2, -1) < 5
    for model in (gpt, create_model("bert", 11, (8,), **TEXT)):  # type: ignore[arg-type]
        for mode in (model.train(), model.eval()):
            with torch.no_grad():
                found = [mode(x, tokens_mask=real)[:, :5] for x in (tokens, changed)]
                whole = mode(tokens[:, :5])
            torch.testing.assert_close(*found)
            torch.testing.assert_close(found[0], whole)


def test_a_masked_token_of_a_run_has_a_row_and_is_never_predicted() -> None:
    torch.manual_seed(0)
    tokens = Column("tokens", "tokens", "input", vocabulary=11, shortest=8, longest=8)
    model: Any = create_model("bert", 11, (8,), columns=(tokens,), **TEXT)  # type: ignore[arg-type]
    found = model(torch.full((2, 8), 11))
    assert found.shape == (2, 8, 11)
    assert model.head.weight is model.tokens.weight and len(model.tokens.weight) == 12


@pytest.mark.parametrize("std", [0.02, 0.1])
def test_weights_of_a_bert_start_with_the_deviation_that_is_given(std: float) -> None:
    torch.manual_seed(0)
    given = {} if std == 0.02 else {"initial_std": std}
    model = create_model("bert", 50, (16,), layers=2, width=64, tied=False, **given)
    matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    assert {"tokens.weight", "blocks.1.linear2.weight", "head.weight"} <= matrices.keys()
    for name, weight in matrices.items():
        assert float(weight.detach().std()) == pytest.approx(std, rel=0.15), name


def test_detector_boxes_without_shift_are_its_anchors() -> None:
    model: Any = create_model("anchor_detector", 2, (1, 24, 20), sizes=(8, 16))
    for head in model.heads:
        nn.init.zeros_(head.weight)
    found = model.eval()(torch.randn(1, 1, 24, 20))
    assert torch.equal(found["boxes"][0], found["anchors"])
    # Cells of strides 4 and 8: 6x5 and 3x3; the first is around (2, 2).
    assert found["anchors"].shape == (39, 4)
    assert found["anchors"][0].tolist() == [-2.0, -2.0, 6.0, 6.0]
    assert found["anchors"][30].tolist() == [-4.0, -4.0, 12.0, 12.0]
    background = found["scores"].softmax(-1)[..., 0]
    torch.testing.assert_close(background, torch.full_like(background, 0.99))


@pytest.mark.parametrize(
    ("name", "shape", "arguments", "match"),
    [
        ("gpt", (8,), {"size": "huge"}, "small, medium, large, xl"),
        ("gpt", (8,), {"width": 10, "heads": 3}, "multiple of heads"),
        ("bert_classifier", (8,), {}, "model.arguments.vocabulary"),
        ("vit", (3, 30, 32), {}, "square"),
        ("wide_resnet", CIFAR, {"depth": 17}, "10, 16, 22"),
        ("anchor_detector", (1, 8, 8), {}, "16x16"),
        ("distnewton_cnn", CIFAR, {"activation": "gelu"}, "tanh, relu"),
        ("resnet50d", (1, 64, 64), {}, "3 channels"),
    ],
)
def test_what_does_not_fit_is_one_line(
    name: str, shape: Any, arguments: dict[str, Any], match: str
) -> None:
    with pytest.raises(ConfigError, match=match):
        create_model(name, 10, shape, **arguments)
    tokens = torch.zeros(1, 9, dtype=torch.int64)
    with pytest.raises(ConfigError, match="up to 8"):
        create_model("gpt", 11, (8,), **TEXT)(tokens)  # type: ignore[arg-type]


def test_the_command_lists_every_model_and_explains_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    listed = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in listed] == sorted(MODELS)
    assert any(line.split()[:2] == ["gpt", "124,439,808"] for line in listed)
    assert main(["models", "gpt"]) == 0
    explained = capsys.readouterr().out
    assert "Radford et al. 2019" in explained and "tied (true)" in explained
    assert main(["models", "gpt5"]) == 2
    assert "gpt" in capsys.readouterr().err
