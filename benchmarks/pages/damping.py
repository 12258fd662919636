"""docs/damping.md: rules for the damping."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from pages.values import Page, Row, load, n, of, pick

DOCUMENT = "docs/damping.md"


PARTS = ("train", "test")


def _over(found: dict[str, Any], other: dict[str, Any], part: str) -> float:
    """The geometric mean of the ratios of two candidates' losses."""
    pairs = zip(found["problems"], other["problems"], strict=True)
    return statistics.geometric_mean(mine[part][1] / its[part][1] for mine, its in pairs)


def rows() -> Iterator[Row]:
    """Rules for the damping."""
    labels = {
        "**constant 1e-3**": "constant 1e-3",
        "`levenberg_marquardt` from 1e-3": "levenberg_marquardt 1e-3",
        "`levenberg_marquardt` from 1e-1": "levenberg_marquardt 1e-1",
        "`warmup` from 1e-1 to 1e-3 in 50 steps": "warmup 1e-1 to 1e-3, 50 steps",
        "0.1 of the mean eigenvalue of each layer's A ⊗ G, no absolute part": (
            "0.1 x mean eigenvalue by layer (prototype)"
        ),
        "0.01 of it": "0.01 x mean eigenvalue by layer (prototype)",
        "constant 1e-3, factors averaged from I (`ema_init: identity`)": (
            "constant 1e-3, ema_init identity"
        ),
        "`levenberg_marquardt` from 1e-3 with `trust_region: fixed`, kl_clip 1e-3": (
            "levenberg_marquardt 1e-3, trust_region fixed, kl_clip 1e-3"
        ),
    }
    columns = ("train_better", "test_within_2_percent", "less_cpu_to_target", "ended_above_start")
    for label, name in labels.items():
        found = load("damping_rules")["summary"][name]
        bold = "**" if label.startswith("**") else ""
        cells = (f"{bold}{of(found[column], True)}{bold}" for column in columns)
        yield Row(DOCUMENT, label, tuple(cells))
    follows = load("damping_follows")["summary"]
    rules = {
        "constant": "damping_constant",
        "times its mean square": "damping_follows_mean_square",
        "times its root mean square": "damping_follows_root",
        "**the same, as the next power of two above**": "default",
    }
    for label, name in rules.items():
        found = follows[f"{name}, search, 3 seeds"]
        losses = (_over(found, follows["damping_constant, search, 3 seeds"], p) for p in PARTS)
        counts = (of(found[column], True) for column in (*columns[:2], "less_cpu_to_target"))
        yield Row(DOCUMENT, label, (*counts, *(n(value, ".2f") for value in losses)))
    placements = {
        "behind, 0.9": "momentum_behind_0.9",
        "**behind, 0.7**": "momentum_behind_0.7",
        "behind, 0.5": "momentum_behind_0.5",
        "before, 0.9": "momentum_before",
        "before, 0.6": "momentum_before_0.6",
    }
    columns = (*columns[:2], "fewer_steps_to_target", "less_cpu_to_target")
    for label, name in placements.items():
        found = load("momentum_placement")["summary"][f"{name}, search, 3 seeds"]
        yield Row(DOCUMENT, label, tuple(of(found[column], True) for column in columns))


def texts() -> Iterator[str]:
    """A head of many outputs."""
    words = pick(load("wide_layers")["quality"], problem="next word, head with 2000 outputs")
    yield f"loss\n{n(words['whole']['loss'], '.2f')} against SGD's {n(words['sgd'], '.2f')}"


PAGE = Page(
    DOCUMENT,
    rows,
    texts,
    given={
        "1 % of the mean eigenvalue": "definition",
        "× 1000, × 0.001": "setting",
        "lr × 10": "setting",
        "test loss within 2 %": "definition",
        "test loss (within 2 %)": "definition",
        "Short runs at large batch": "single runs of an earlier state; their files were not kept",
        "1024: 75 % at 13, 80 % at 18": "as above",
        "batch 256: 83 %": "as above",
        "85 % at 48": "as above",
        "46 % at 29, 48 % at 32": "as above",
        "10 to 40 % more CPU time": "single runs of an earlier state; their files were not kept",
    },
)
