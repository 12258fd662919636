"""A study file: methods × batch sizes × seeds, columns to measure, and claims about them.

Data only: nothing here trains. A cell is one method at one batch size with one seed, and its whole
configuration is a function of the file: base, then the study's changes, then the batch size, then the
method's changes, then the method's changes for that batch size, then the seed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from elastic_kfac.config import (
    Config,
    Section,
    apply_overrides,
    parse_config,
    read_yaml,
    split_override,
    validate,
)
from elastic_kfac.errors import ConfigError
from elastic_kfac.paths import user_path

Overrides = dict[str, Any]
"""`section.key` to value."""

_METHOD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,39}")
_SIDE = r"([A-Za-z0-9][A-Za-z0-9_.+-]*)@(\d+|\*)"
_COMPARISON = re.compile(rf"{_SIDE}\s+([-/])\s+{_SIDE}")


@dataclass(frozen=True)
class Column:
    """A measured quantity of a cell."""

    name: str
    title: str
    help: str
    form: Literal["percent", "count", "number", "seconds"]
    needs: Literal["run", "state"] = "run"
    """`run`: recorded by the run itself; `state`: measured on its final state."""


COLUMNS: Mapping[str, Column] = {
    column.name: column
    for column in (
        Column("accuracy", "test accuracy", "Test accuracy at the end of training.", "percent"),
        Column("best_accuracy", "best test accuracy", "Best test accuracy of the run.", "percent"),
        Column(
            "value",
            "test metric",
            "Value of the target's metric, or of the task's first one, at the end of training.",
            "number",
        ),
        Column("best_value", "best test metric", "Best value of that metric.", "number"),
        Column("updates", "updates", "Optimizer steps.", "count"),
        Column("eval_loss", "test loss", "Mean test loss at the end.", "number"),
        Column(
            "train_loss",
            "training loss",
            "Mean loss of the final state over the whole training split, in evaluation mode.",
            "number",
            "state",
        ),
        Column(
            "lambda_1",
            "top Hessian eigenvalue λ₁",
            "Largest eigenvalue (by magnitude) of the final state's Hessian of the mean loss over the "
            "first `measure.hessian_samples` training samples, in evaluation mode.",
            "number",
            "state",
        ),
        Column(
            "adversarial_accuracy",
            "adversarial accuracy",
            "Accuracy of the final state on the attacked test split.",
            "percent",
            "state",
        ),
        Column("time_s", "training time", "Seconds spent in training steps.", "seconds"),
    )
}
"""Columns of studies, by name."""


class Method(Section):
    """One way to train."""

    title: str = ""
    """Description for the report."""
    set: Overrides = Field(default_factory=dict)
    """`section.key: value` changes of the base configuration."""
    batch_sizes: tuple[Annotated[int, Field(ge=1)], ...] | None = None
    """Batch sizes it runs at; None is every batch size of the study."""
    at: dict[int, Overrides] = Field(default_factory=dict)
    """Further changes at single batch sizes, for example a tuned learning rate."""


class Measure(Section):
    """How the final state of a cell is measured."""

    hessian_samples: Annotated[int, Field(ge=1)] = 512
    """First training samples (in id order) that λ₁ is computed on, the same for every run on the data."""
    hessian_steps: Annotated[int, Field(ge=5)] = 60
    """Most Lanczos steps."""
    attack: Literal["fgsm", "pgd", "l2"] = "fgsm"
    adversarial_radius: Annotated[float, Field(ge=0)] = 0.1
    """ε of `adversarial_accuracy`, in units of the model's inputs (after normalisation)."""
    adversarial_steps: Annotated[int, Field(ge=1)] = 1

    @model_validator(mode="after")
    def _consistent(self) -> Measure:
        if self.attack == "fgsm" and self.adversarial_steps > 1:
            raise ValueError(
                f"fgsm takes one step, not adversarial_steps={self.adversarial_steps}; use pgd"
            )
        return self


class Assertion(Section):
    """A claim about differences (`A@32 - B@256`) or ratios (`A@32 / B@256`) of one column.

    `*` stands for every batch size that the side runs at. Bounds may be combined.
    """

    says: Annotated[str, Field(min_length=1)]
    """The claim in words."""
    column: str
    compare: Annotated[tuple[str, ...], Field(min_length=1)]
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    over: Literal["each", "mean"] = "each"
    """Whether every comparison has to be within the bounds, or their mean."""

    @model_validator(mode="after")
    def _consistent(self) -> Assertion:
        _known("column", self.column, COLUMNS)
        low, high = self.low, self.high
        if low is None and high is None:
            raise ValueError("a bound is missing: above, at_least, below or at_most")
        if self.above is not None and self.at_least is not None:
            raise ValueError("above and at_least exclude each other")
        if self.below is not None and self.at_most is not None:
            raise ValueError("below and at_most exclude each other")
        if low is not None and high is not None and low >= high:
            raise ValueError(f"nothing is between {low:g} and {high:g}")
        operators = {operator_of(text) for text in self.compare}
        if len(operators) > 1:
            raise ValueError("differences and ratios in one assertion have different bounds")
        if operators == {"/"} and any(bound is not None and bound <= 0 for bound in (low, high)):
            raise ValueError("bounds of a ratio are positive")
        return self

    @property
    def low(self) -> float | None:
        """The lower bound."""
        return self.above if self.above is not None else self.at_least

    @property
    def high(self) -> float | None:
        """The upper bound."""
        return self.below if self.below is not None else self.at_most

    @property
    def is_ratio(self) -> bool:
        """Whether quotients are compared, on a logarithmic scale."""
        return operator_of(self.compare[0]) == "/"


@dataclass(frozen=True)
class Place:
    """A method at a batch size."""

    method: str
    batch_size: int

    def __str__(self) -> str:
        return f"{self.method}@{self.batch_size}"


@dataclass(frozen=True)
class Cell:
    """One training of a study."""

    place: Place
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.place.method}-B{self.place.batch_size}-s{self.seed}"

    def __str__(self) -> str:
        return f"{self.place} seed {self.seed}"


class Study(Section):
    """Methods, batch sizes and seeds to compare."""

    title: str = ""
    about: str = ""
    """Background and sources of the claims, for the report."""
    base: str | dict[str, Any]
    """A configuration file, relative to the study file, or the sections themselves."""
    set: Overrides = Field(default_factory=dict)
    """Changes to the base for all methods."""
    methods: Annotated[dict[str, Method], Field(min_length=1)]
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(min_length=1)]
    batch_key: str = "train.global_batch_size"
    """Key that a batch size sets; `batch.max_batch_size` for policies that grow up to it."""
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    columns: Annotated[tuple[str, ...], Field(min_length=1)] = ("accuracy", "updates", "time_s")
    measure: Measure = Measure()
    assertions: tuple[Assertion, ...] = ()
    parallelism: Annotated[int, Field(ge=1)] = 1
    """Cells that train at the same time."""

    @field_validator("seeds", mode="before")
    @classmethod
    def _count_of_seeds(cls, value: object) -> object:
        # `seeds: 5` reads better than a list of five numbers.
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return tuple(range(value))
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Study:
        for name, values in (("batch_sizes", self.batch_sizes), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{name} holds a value twice")
        for column in self.columns:
            _known("columns", column, COLUMNS)
        for name, method in self.methods.items():
            if not _METHOD.fullmatch(name):
                raise ValueError(
                    f"methods.{name}: a name has letters, digits, '.', '_', '+' and '-' (at most 40)"
                )
            for size in (*(method.batch_sizes or ()), *method.at):
                if size not in self.batch_sizes:
                    raise ValueError(
                        f"methods.{name} names batch size {size}, which is not in batch_sizes"
                    )
        for assertion in self.assertions:
            for text in assertion.compare:
                expand(text, self)
        return self

    def places(self) -> list[Place]:
        """Methods at batch sizes, batch sizes outermost."""
        return [Place(name, size) for size in self.batch_sizes for name in self.methods_at(size)]

    def methods_at(self, batch_size: int) -> list[str]:
        """Names of the methods that run at a batch size, in the file's order."""
        return [
            name
            for name, method in self.methods.items()
            if method.batch_sizes is None or batch_size in method.batch_sizes
        ]

    def is_run(self, place: Place) -> bool:
        """Whether the study has cells there."""
        return (
            place.batch_size in self.batch_sizes
            and place.method in self.methods
            and place.method in self.methods_at(place.batch_size)
        )

    def wanted_columns(self) -> list[str]:
        """Columns that tables or claims need."""
        claimed = (assertion.column for assertion in self.assertions)
        return list(dict.fromkeys((*self.columns, *claimed)))


@dataclass(frozen=True)
class LoadedStudy:
    """A study with the configuration of every cell, all of them valid."""

    name: str
    study: Study
    cells: tuple[Cell, ...]
    """Seeds outermost, so that an interrupted study has whole tables of fewer seeds."""


def operator_of(comparison: str) -> str:
    """`-` or `/`.

    Raises:
        ValueError: If the text is no comparison.
    """
    return _parsed(comparison)[3]


def _parsed(comparison: str) -> re.Match[str]:
    """Groups: method, size, operator, method, size."""
    match = _COMPARISON.fullmatch(comparison.strip())
    if not match:
        raise ValueError(
            f"{comparison!r} is not a comparison such as `ABS@256 - BL@32` or `KFAC@* / SGD@*`"
        )
    return match


def expand(comparison: str, study: Study) -> list[tuple[Place, Place]]:
    """(left, right) of a comparison, one pair per batch size that a `*` stands for.

    Raises:
        ValueError: If it names a method or batch size that the study does not run.
    """
    match = _parsed(comparison)
    sides = [(match[1], match[2]), (match[4], match[5])]
    for method, _ in sides:
        _known(f"the comparison {comparison!r}: methods", method, study.methods)
    starred = [method for method, size in sides if size == "*"]
    sizes = [b for b in study.batch_sizes if all(study.is_run(Place(m, b)) for m in starred)]
    pairs = []
    for star in sizes if starred else [0]:
        left, right = (Place(method, star if size == "*" else int(size)) for method, size in sides)
        for place in (left, right):
            if not study.is_run(place):
                raise ValueError(f"{comparison!r} names {place}, which the study does not run")
        pairs.append((left, right))
    if not pairs:
        raise ValueError(f"{comparison!r} stands for no batch size at all")
    return pairs


def load_study(
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    seeds: int | None = None,
    parallelism: int | None = None,
) -> LoadedStudy:
    """Reads a study file and resolves the configuration of every cell.

    Args:
        overrides: `section.key=value` changes of the configuration of every cell.
        seeds: Overrides the number of seeds in the file (0, 1, …).

    Raises:
        ConfigError: If the file is missing or not YAML, or a key or value is not allowed, in the study
            or in the configuration of some cell (it names the method and the batch size).
    """
    file = user_path(path)
    values = read_yaml(file, "study file", "benchmarks/studies/clusters10.yaml")
    if seeds is not None:
        values["seeds"] = seeds
    if parallelism is not None:
        values["parallelism"] = parallelism
    study = validate(Study, values, f"study {file.name}")
    base = study.base
    if isinstance(base, str):
        base = read_yaml(file.parent / base, "base configuration", "jobs/configs/digits.yaml")
    changes = [split_override(text) for text in overrides]
    return LoadedStudy(file.stem, study, tuple(_cells(study, base, changes)))


def _cells(
    study: Study, base: Mapping[str, Any], overrides: Sequence[tuple[str, Any]]
) -> Iterator[Cell]:
    for seed in study.seeds:
        for place in study.places():
            method = study.methods[place.method]
            changes = [
                *study.set.items(),
                (study.batch_key, place.batch_size),
                *method.set.items(),
                *method.at.get(place.batch_size, {}).items(),
                *overrides,
                ("train.seed", seed),
            ]
            try:
                yield Cell(place, seed, parse_config(apply_overrides(base, changes)))
            except ConfigError as error:
                raise ConfigError(
                    f"method {place.method} at batch size {place.batch_size}: {error.what}",
                    given=error.given,
                    allowed=error.allowed,
                    change=error.change,
                ) from None


def _known(where: str, name: str, known: Mapping[str, object]) -> None:
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"{where}: {name!r} is not one of {', '.join(known)}{hint}")
