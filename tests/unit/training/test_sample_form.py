"""Every shipped configuration, without any data: the form of its samples, or what to pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from elastic_kfac.cli import arguments
from elastic_kfac.config import Config, parse_config, read_config
from elastic_kfac.data import make_shards
from elastic_kfac.data.dataset import open_split
from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.runs.feasibility import Sized
from elastic_kfac.runs.sample_form import form_of_shape, form_without_shards

CONFIGS = Path(__file__).parents[3] / "jobs" / "configs"

KNOWN = {
    "caltech_resnet18": ((3, 112, 112), 1000),
    "char_gpt": ((128,), None),
    "coco_retinanet": ((3, 512, 512), 90),
    "detector_scenes": ((1, 48, 48), None),
    "digits": ((1, 8, 8), None),
    "imagenet_resnet50": ((3, 224, 224), 1000),
    "masked_lm": ((32,), None),
    "regression": ((10,), None),
    "unet_scenes": ((1, 48, 48), None),
}
"""Shape of a sample, and outputs where the set does not tell them."""
TO_PASS = {
    "fashion_mnist": "--input-shape 1x8x8 --classes 10",
    "text_gpt2": "--input-shape 1024 --classes 50257",
}
"""What the error says to pass."""
EMBEDDED = [name for name, (_, outputs) in KNOWN.items() if outputs is None]


def config_of(name: str) -> Config:
    return read_config(CONFIGS / f"{name}.yaml")


def test_every_configuration_plans_or_says_what_to_add() -> None:
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == set(KNOWN) | set(TO_PASS)
    for name, expected in KNOWN.items():
        form = form_without_shards(config_of(name))
        assert (form.input_shape, form.num_outputs) == expected, name
    for name, wanted in TO_PASS.items():
        with pytest.raises(UsageError) as raised:
            form_without_shards(config_of(name))
        line = raised.value.line()
        assert wanted in line and "\n" not in line
        # What it says to pass is understood.
        parsed = arguments.parse_arguments(["plan", name, "--world-size", "2", *wanted.split()])
        form_of_shape(config_of(name), parsed.input_shape, parsed.classes)


@pytest.mark.parametrize("name", EMBEDDED)
def test_models_of_embedded_sets_are_those_with_shards(name: str, tmp_path: Path) -> None:
    config = config_of(name)
    assert config.data.source is not None
    form = form_without_shards(config)
    make_shards(config.data.source, tmp_path)
    values = config.model_dump(mode="json")
    values["data"]["shards"] = str(tmp_path)
    made = parse_config(values)
    with open_split(made, made.data.train_split) as split:
        assert split.input_shape == form.input_shape
        for ours, theirs in zip(form.columns, split.columns, strict=True):
            assert (ours.name, ours.kind, ours.role) == (theirs.name, theirs.kind, theirs.role)
            assert (ours.shortest, ours.longest) == (theirs.shortest, theirs.longest)
    without, with_shards = Sized.of(config, form=form), Sized.of(made)
    assert without.layers == with_shards.layers
    assert without.parameter_elements == with_shards.parameter_elements
    without.loss(2).backward()


def test_classes_are_those_that_are_given() -> None:
    form = form_without_shards(config_of("caltech_resnet18"), 101)
    assert form.num_outputs == form.columns[1].num_classes == 101
    assert form.basis == "3x112x112 (data.image_size=112), 101 outputs (--classes)"


def test_sequences_have_one_dimension() -> None:
    with pytest.raises(ConfigError, match="are sequences"):
        form_of_shape(config_of("text_gpt2"), (3, 8, 8), 10)
