"""docs/studies.md: published trends."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from statistics import mean, median
from typing import Any

from pages.values import Page, Row, load, n, share

DOCUMENT = "docs/studies.md"


def rows() -> Iterator[Row]:
    """Published trends."""
    runs = load("robust_spectra")["runs"]
    for kind in ("plain", "robust"):
        for size in (64, 1024):
            chosen = [v for k, v in runs.items() if k.startswith(f"{kind} | {size} | ")]
            ends = [run["epochs"][-1] for run in chosen]
            largest = mean(end["largest"] for end in ends)
            cells = (
                n(largest, ".2f"),
                n(mean(sum(end["top"]) for end in ends), ".1f"),
                share(mean(-end["smallest"] / end["largest"] for end in ends), 1),
                share(mean(run["end"]["attacked_accuracy"] for run in chosen), 1),
            )
            yield Row(DOCUMENT, f"{kind}, B = {size:,}", cells)
    ends = load("dist_newton")["claims"]["end"]
    for title, activation in (("tanh", "tanh"), ("ReLU", "relu")):
        for rate in ("0.3", "1"):
            found = ends[f"{activation} | {rate}"]
            merged = (
                " / ".join(n(found[f"{kind} m={m}"], ".3f") for m in (2, 4, 8))
                for kind in ("paper", "split")
            )
            yield Row(
                DOCUMENT,
                f"{title}, rate {rate}",
                (n(found["sgd"], ".3f"), n(found["sgd 2"], ".3f"), *merged),
            )
    schedules = load("schedules")
    for name, row in schedules["cost table, B = 1024"].items():
        eigenvalue = row.get("cpu ms per eigenvalue")
        yield Row(
            DOCUMENT,
            name,
            (
                n(row["updates"], ",.0f"),
                n(row["cpu ms per update"], ".1f"),
                n(eigenvalue, ".0f") if eigenvalue else "–",
                n(row["total cpu s"], ".1f"),
                f"{n(row['speed-up'], '.1f')} ×",
                share(row["accuracy"], 1),
            ),
        )
    for size, row in schedules["large batch, accuracy by seed"].items():
        label = f"accuracy, B = {int(size):,}"
        yield Row(DOCUMENT, label, tuple(share(mean(v), 1) for v in row.values()))
    for task, row in load("workloads")["summary"].items():
        cells = (_epochs(found) for found in row.values())
        yield Row(DOCUMENT, f"`{task}`", tuple(cells))
    yield from _cifar()
    yield from _recipes()
    yield from _fisher()


PUBLISHED = {
    "256": "92.77, 92.58, 92.76",
    "512": "92.58, 92.36, 92.90",
    "1,024": "92.69, 91.71, 92.92",
}
"""Accuracies of Yokota (2018): SGD, factored inverses, eigendecompositions."""


def _cifar() -> Iterator[Row]:
    table = load("cifar10_jpeg")["tables"][0]
    for size, *cells in table["rows"]:
        measured = (n(cell.split(" / ")[0], "") for cell in cells)
        yield Row(
            DOCUMENT, f"CIFAR-10, B = {size}", (*measured, PUBLISHED[size]), (PUBLISHED[size],)
        )


def _recipes() -> Iterator[Row]:
    table = load("recipes")["table"]
    for name, recipe in table.items():
        kind, published = name.split()
        if kind == "recipe":
            cells = (
                f"{n(found['median epochs'], '.1f')}, {n(found['median updates'], '.0f')}"
                for found in (recipe, table[f"plain {published}"])
            )
            yield Row(
                DOCUMENT,
                f"{recipe['batch']} ({int(published):,})",
                (n(recipe["epochs of the recipe"]), *cells),
            )


def _fisher() -> Iterator[Row]:
    found = load("fisher")
    for when, title in (("start", "start"), ("after 5 natural gradient steps", "after 5 steps")):
        for kind, name in (("exact", "exact"), ("kfac", "K-FAC")):
            row = found["spectra"][when][kind]
            cells = (
                n(row["largest"], ".2f"),
                n(row["trace"], ".1f"),
                share(row["share of the trace in the largest 1 %"]),
                share(row["share of eigenvalues below 1e-4 of the largest"]),
            )
            yield Row(DOCUMENT, f"{title}, {name}", cells)
    for title, name in (
        ("exact natural gradient", "natural"),
        ("K-FAC", "kfac"),
        ("gradient descent", "gradient"),
    ):
        row = found["steps"][name]
        steps = "not reached" if row["median"] is None else n(row["median"])
        yield Row(DOCUMENT, title, (steps, n(median(row["loss at the end"]), ".4f")))


def texts() -> Iterator[str]:
    """What 30 pairs of seeds leave open."""
    found = load("schedules")["robustness"]
    low, high = found["interval"]
    yield (
        f"with {n(found['pairs'])} pairs of seeds: accuracy on attacked samples is\n"
        f"{n(100 * found['mean'], '.1f')} points higher, with an interval of {n(100 * low, '.1f')} "
        f"to {n(100 * high, '.1f')}"
    )


def _epochs(found: Mapping[str, Any]) -> str:
    """The median of epochs to a target, and how many seeds reached it."""
    reached = [each for each in found["epochs_to_target"] if each is not None]
    middle = "–" if found["median"] is None else n(found["median"], ".2f")
    return f"{middle} ({n(len(reached))} of {n(len(found['epochs_to_target']))})"


PAGE = Page(
    DOCUMENT,
    rows,
    texts,
    given={
        "95 % of the test split": "setting",
        "in the largest 1 %": "definition",
    },
)
