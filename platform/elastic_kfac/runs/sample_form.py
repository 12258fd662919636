"""The form of a configuration's samples where there are no shards: shapes of a model need no data."""

from __future__ import annotations

from dataclasses import replace
from typing import Final, NamedTuple

from elastic_kfac.config import Config
from elastic_kfac.data.columns import Column, image_columns
from elastic_kfac.data.sources import SourceSplit, open_source
from elastic_kfac.errors import ConfigError, UsageError
from elastic_kfac.zoo import MODELS

EMBEDDED: Final = ("digits", "clusters10", "stdlib_text", "digit_scenes", "sklearn")
"""Kinds of `data.source` that need no files."""
_OF_TOKENS: Final = ("causal_lm", "masked_lm", "sequence_classification")


class Form(NamedTuple):
    """What is known of samples that are not there."""

    columns: tuple[Column, ...]
    input_shape: tuple[int, ...]
    num_outputs: int | None
    """Of the model; None asks the task."""
    basis: str
    """Where it is from, in words."""


def form_of_shape(
    config: Config, input_shape: tuple[int, ...], num_classes: int, basis: str = "--input-shape"
) -> Form:
    """Of samples that are known by their shape only.

    Raises:
        ConfigError: If samples of the task have another number of dimensions.
    """
    names = tuple(map(str, range(num_classes)))
    label = Column("label", "class", "target", class_names=names)
    if config.task.name in _OF_TOKENS:
        if len(input_shape) != 1:
            raise ConfigError(
                f"samples of task.name={config.task.name} are sequences",
                given=shown(input_shape),
                allowed="one number, how many tokens they have",
            )
        (length,) = input_shape
        tokens = Column(
            "tokens", "tokens", "input", vocabulary=num_classes, shortest=length, longest=length
        )
        columns: tuple[Column, ...] = tokens, label
    elif len(input_shape) == 3:
        channels, height, width = input_shape
        columns = image_columns((channels, height, width), names)
    else:
        columns = (
            Column("features", "tensor", "input", dtype="float32", shape=input_shape),
            label,
        )
    words = f"{shown(input_shape)} ({basis}), {num_classes} outputs (--classes)"
    return Form(columns, input_shape, num_classes, words)


def form_without_shards(config: Config, num_classes: int | None = None) -> Form:
    """What the configuration itself tells of its samples.

    Args:
        num_classes: Used where it tells their shape only; None takes that of the model as published.

    Raises:
        UsageError: If it does not tell; with what to pass.
        DataError: If `data.source` is impossible.
    """
    source, size = config.data.source, config.data.image_size
    if source is not None and source.partition(":")[0] in EMBEDDED:
        columns = _embedded(config, source)
        first = next(column for column in columns if column.role == "input")
        shape = (first.longest,) if first.kind == "tokens" else first.shape or ()
        return Form(columns, shape, None, f"{shown(shape)} (data.source={source})")
    if size is not None and config.task.name not in _OF_TOKENS:
        known = MODELS.get(config.model.name)
        outputs = num_classes or (known.num_outputs if known else 1000)
        return form_of_shape(config, (3, size, size), outputs, f"data.image_size={size}")
    example, what = _example(config)
    name = config.data.source or "SOURCE"
    raise UsageError(
        "the shape of a sample comes from the shards, and there are none",
        given=f"data.shards={config.data.shards}",
        change=f"plan without data: {example} ({what}), or run "
        f"`elastic-kfac shards make --source {name} --out {config.data.shards}`",
    )


def shown(shape: tuple[int, ...]) -> str:
    """A shape as `--input-shape` takes it."""
    return "x".join(map(str, shape))


def _embedded(config: Config, source: str) -> tuple[Column, ...]:
    """The columns of an embedded set, with the lengths that shards would have."""
    found = open_source(source)
    names = dict.fromkeys((config.data.train_split, config.data.eval_split))
    first = found.split(config.data.train_split)
    both = [first, *(found.split(n) for n in list(names)[1:] if n in found.openers)]
    return tuple(
        _measured(column, both) if column.kind in ("tokens", "boxes") else column
        for column in first.columns
    )


def _measured(column: Column, splits: list[SourceSplit]) -> Column:
    """Of sequences, which are padded to the longest of all splits."""
    lengths = [
        len(value)
        for split in splits
        for records in split.read(0, split.num_samples)
        for value in records.values[column.name]
    ]
    return replace(column, shortest=min(lengths), longest=max(lengths))


def _example(config: Config) -> tuple[str, str]:
    """What to pass, for the model as it was published, and what it means."""
    name = config.model.name
    if name in MODELS:
        shape, outputs = MODELS[name].input_shape, MODELS[name].num_outputs
        outputs = MODELS[name].arguments.get("vocabulary", outputs)
    elif config.task.name in _OF_TOKENS:
        shape, outputs = (1024,), 50_257
    else:
        shape, outputs = (3, 224, 224), 1000
    what = "tokens of a sample, and of the vocabulary"
    if config.task.name not in _OF_TOKENS:
        what = "channels, height and width of a sample, and classes"
        if len(shape) != 3:
            what = "shape of a sample, and outputs"
    given = f"--input-shape {shown(shape)} --classes {outputs}"
    return given, f"for example: {what}"
