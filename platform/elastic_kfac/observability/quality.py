"""The metrics of models by name: what to call them, and whether larger or smaller values are better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

Direction = Literal["max", "min"]


class Quality(NamedTuple):
    """One metric of an evaluation."""

    label: str
    direction: Direction
    is_share: bool = False
    """From 0 to 1, shown in percent."""


QUALITIES: Final = {
    "accuracy": Quality("accuracy", "max", is_share=True),
    "f1": Quality("F1", "max", is_share=True),
    "miou": Quality("mIoU", "max", is_share=True),
    "dice": Quality("Dice", "max", is_share=True),
    "pixel_accuracy": Quality("pixel accuracy", "max", is_share=True),
    "map": Quality("mAP", "max", is_share=True),
    "map50": Quality("mAP at 0.50", "max", is_share=True),
    "perplexity": Quality("perplexity", "min"),
    "bits_per_byte": Quality("bits per byte", "min"),
    "rmse": Quality("RMSE", "min"),
    "mae": Quality("MAE", "min"),
    "r2": Quality("R²", "max"),
    "mse": Quality("MSE", "min"),
    "loss": Quality("loss", "min"),
}


def quality_of(name: str, direction: Direction = "max") -> Quality:
    """The metric of this name; `direction` is that of a person's own metric."""
    return QUALITIES.get(name, Quality(name, direction))


def main_value(row: Mapping[str, Any]) -> tuple[str, Direction, float] | None:
    """(metric, direction, value) of an evaluation's row: of the target's metric, or the task's most
    important one; None for other rows."""
    name = str(row.get("metric") or "accuracy")
    value = row.get(f"eval_{name}")
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return name, "min" if row.get("direction") == "min" else "max", float(value)


def target_columns(
    metric: str,
    *,
    best: float | None,
    target: float | None,
    time_s: float | None,
    train_time_s: float | None,
) -> dict[str, Any]:
    """Columns of `result.json` about a run's target; those of accuracy also by their own names."""
    found = {
        "metric": metric,
        "best_value": best,
        "target_value": target,
        "time_to_target_s": time_s,
        "train_time_to_target_s": train_time_s,
    }
    if metric == "accuracy":
        found |= {
            "best_accuracy": best,
            "target_accuracy": target,
            "time_to_accuracy_s": time_s,
            "train_time_to_accuracy_s": train_time_s,
        }
    return found


def reached_s(result: Mapping[str, Any]) -> float | None:
    """Training seconds to the target from a `result.json`, also of earlier versions; None if it was not
    reached."""
    found = result.get("train_time_to_target_s", result.get("train_time_to_accuracy_s"))
    return None if found is None else float(found)


def worded(name: str, value: float) -> str:
    """A value on the test set in a sentence."""
    label = quality_of(name).label
    if quality_of(name).is_share:
        return f"{value:.2%} test {label}"
    return f"test {label} {value:.4g}"


def is_worse(value: float, than: float, direction: Direction) -> bool:
    """Whether a value is worse than another one."""
    return value < than if direction == "max" else value > than


def shown_quality(name: str, value: float) -> str:
    """A value as people read it."""
    return f"{value:.2%}" if quality_of(name).is_share else f"{value:.4g}"
