"""The metrics of models by name: what to call them, and whether larger or smaller values are better."""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

Direction = Literal["max", "min"]


class Quality(NamedTuple):
    """One metric of an evaluation."""

    label: str
    direction: Direction
    is_share: bool = False
    """From 0 to 1, shown in percent."""


QUALITIES: Final = {
    "accuracy": Quality("accuracy", "max", is_share=True),
    "loss": Quality("loss", "min"),
}


def quality_of(name: str, direction: Direction = "max") -> Quality:
    """The metric of this name; `direction` is that of a person's own metric."""
    return QUALITIES.get(name, Quality(name, direction))


def shown_quality(name: str, value: float) -> str:
    """A value as people read it."""
    return f"{value:.2%}" if quality_of(name).is_share else f"{value:.4g}"
