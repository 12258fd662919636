"""The result of a search in words: one sentence, and amounts as people write them."""

from __future__ import annotations

from elastic_kfac.experiments.search_folder import BEST, Experiment, Point
from elastic_kfac.runs.summary import duration


def headline(experiment: Experiment) -> str:
    """One sentence: what the best point reaches, how fast, and how that compares."""
    best = experiment.best
    if best is None:
        return _begun(experiment) + lacking(experiment)
    confirmed = experiment.confirmed.get(BEST)
    winner = confirmed if confirmed is not None else best
    if winner.value is None:
        return _begun(experiment) + lacking(experiment)
    references = experiment.confirmed if confirmed is not None else experiment.references
    target = "the target" if experiment.target is None else f"{experiment.target:.2%} test accuracy"
    sentence = f"The best configuration reaches {target} in {_took(experiment, winner.value)}"
    sentence += _detail(winner, unseen=confirmed is not None)
    parts = [
        _against(experiment, winner.value, name, point)
        for name, point in references.items()
        if name != BEST and point.tried
    ]
    if parts:
        sentence += ", " + " and ".join([", ".join(parts[:-1]), parts[-1]] if parts[1:] else parts)
    return f"{_begun(experiment)}{sentence}."


def lacking(experiment: Experiment) -> str:
    """Why there is no best point to speak of."""
    tried = [point for point in experiment.points if point.tried]
    target = "the target" if experiment.target is None else f"{experiment.target:.2%} test accuracy"
    if not tried:
        lost = experiment.count("failed") + experiment.count("refused")
        if lost and lost == experiment.done and experiment.status != "running":
            return f"No trial came to an end: {lost} failed or were refused; see why below."
        return "No trial has finished yet."
    accuracies = [a for p in tried if (a := p.median("best_accuracy")) is not None]
    close = f"; the closest came to {max(accuracies):.2%}" if accuracies else ""
    return f"None of {len(tried)} points reached {target} within its budget{close}."


def progress_line(experiment: Experiment) -> str:
    """How far the search is."""
    text = f"· {experiment.done} of {experiment.total} trials done"
    if running := experiment.count("running"):
        text += f", {running} running"
    lost = [f"{n} {s}" for s in ("failed", "refused", "stopped") if (n := experiment.count(s))]
    return text + (f" ({', '.join(lost)})" if lost else "")


def amount(experiment: Experiment, value: float | None) -> str:
    """An objective with its unit; a dash for none."""
    if value is None:
        return "–"
    unit = experiment.unit
    if unit == "steps":
        return f"{value:,.0f} steps"
    if not unit.endswith("seconds") and not unit.startswith("seconds"):
        return f"{value:.4g} {unit}"
    words = unit.replace("seconds", "").strip()
    return duration(value) + (f" ({words})" if words not in ("", "training") else "")


def spread(experiment: Experiment, point: Point) -> str:
    """The median with the range of those that reached the target."""
    if point.value is None:
        return "> budget" if point.tried else "–"
    values = point.values
    text = amount(experiment, point.value)
    if len(point.trials) < 2:
        return text
    if experiment.unit == "steps":
        return f"{text} [{values[0]:,.0f}–{values[-1]:,.0f}]"
    return f"{text} [{values[0]:.3g}–{values[-1]:.3g}]"


def _begun(experiment: Experiment) -> str:
    return {
        "running": "Still searching. ",
        "interrupted": "Interrupted. ",
        "failed": "The search itself failed. ",
    }.get(experiment.status, "")


def _took(experiment: Experiment, value: float) -> str:
    of_training = " of training" if experiment.unit == "training seconds" else ""
    return amount(experiment, value) + of_training


def _detail(point: Point, *, unseen: bool) -> str:
    count, seed = len(point.trials), "unseen seed" if unseen else "seed"
    if count < 2:
        return f" (one {seed})"
    missed = count - len(point.values)
    return f" (median of {count} {seed}s" + (f", {missed} missed it)" if missed else ")")


def _against(experiment: Experiment, value: float, name: str, point: Point) -> str:
    label = "the default configuration" if name == "default" else name
    if point.value is None:
        return f"{label} did not reach it"
    ratio = point.value / value if value > 0 else 1.0
    other = amount(experiment, point.value)
    more, less = (
        ("fewer steps", "more steps") if experiment.unit == "steps" else ("faster", "slower")
    )
    if ratio >= 1.005:
        return f"{ratio:.2f} times {more} than {label} ({other})"
    if ratio <= 0.995:
        return f"{1 / ratio:.2f} times {less} than {label} ({other})"
    return f"no different from {label} ({other})"
