"""docs/planning.md: how good predictions are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pages.values import Page, Row, load, n, share

DOCUMENT = "docs/planning.md"


def rows() -> Iterator[Row]:
    """How good predictions are."""
    models = load("planner_accuracy")["by_model"]
    names = {
        "mlp": "MLP, 4 layers",
        "small_cnn": "CNN, 15,000 parameters",
        "vit": "ViT, 2 blocks of width 64",
    }

    def bounds(part: Mapping[str, float], sign: str = "+") -> str:
        low, high = (100 * part[key] for key in ("lowest", "highest"))
        return _zero(f"{n(low, '.0f')} to {n(high, f'{sign}.0f')} %")

    def chosen(part: Mapping[str, Any]) -> str:
        text = f"{n(part['within_10_percent'])} of {n(part['n'])}"
        missed = part["within_10_percent"] < part["n"]
        return f"{text} (worst {share(part['highest'])} above)" if missed else text

    for name, m in models.items():
        cases = n(m["cases"])
        yield Row(
            DOCUMENT,
            names[name],
            (
                f"{n(m['time_within_20_percent'])} of {cases} ({bounds(m['time_error'])})",
                f"{n(m['memory_within_5_percent'])} of {cases} ({bounds(m['memory_error'])})",
                f"{n(m['pairs_in_the_right_order'])} of {n(m['pairs'])}",
                chosen(m["chosen_fraction_over_best_measured"]),
            ),
        )
    labels = ("SGD, 90 epochs, 128 images per GPU", "K-FAC 1/64, 55 epochs", "K-FAC 1/2, 55 epochs")
    setups = load("planner_figures")["budget"]
    for label, setup in zip(labels, (setups[0], *_kfac_setups(setups)), strict=True):
        ours = f"{n(setup['minutes'], '.0f')} min"
        theirs = f"{n(setup['published_minutes'], '.0f')} min"
        if setup is setups[0]:
            theirs += " (did not converge)"
        else:
            ours = f"{n(setup['local_batch'])} images, {ours}"
            theirs = f"{n(setup['published_local_batch'])} images, {theirs}"
        yield Row(DOCUMENT, label, (ours, theirs))
    by_width: dict[int, dict[str, Mapping[str, float]]] = {}
    for part in load("planner_decomposers")["rows"]:
        by_width.setdefault(part["width"], {})[part["way"]] = part
    for width, ways in by_width.items():
        cells = (
            f"{n(part['mean_ms'], '.0f')} ms (longest {n(part['longest_ms'], '.0f')})"
            for part in ways.values()
        )
        yield Row(DOCUMENT, f"MLP 784-{width}×3-10", tuple(cells))


def _zero(text: str) -> str:
    return text.replace("-0 ", "0 ")


def _kfac_setups(setups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [s for s in setups if "1/64" in s["method"] or "1/2" in s["method"]]


PAGE = Page(
    DOCUMENT,
    rows,
    given={
        "40 % of the data": "definition",
        "70 % of its memory rate": "definition",
        "gains 5 %": "definition",
    },
)
