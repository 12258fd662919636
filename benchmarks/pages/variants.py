"""docs/variants.md: cost of decompositions, and other curvature."""

from __future__ import annotations

from collections.abc import Iterator

from pages.values import Page, Row, load, n

DOCUMENT = "docs/variants.md"


def rows() -> Iterator[Row]:
    """Cost of decompositions, and other curvature."""
    for r in load("wide_layers")["decomposition"]:
        cells = [_significant(r["whole_s"])]
        for rank in ("rank_64", "rank_256"):
            part = r[rank]
            cells.append(f"{_significant(part['cold_s'])} / {_significant(part['warm_s'])}")
            missed = (n(100 * part[f"missed_{when}"], ".1g") for when in ("cold", "warm"))
            cells.append(" / ".join(f"{value} %" for value in missed))
        yield Row(DOCUMENT, f"{r['width']:,}", tuple(cells))
    found = load("defaults_variants")["summary"]
    for label, name, rival in (
        ("`eigen`", "default", None),
        ("`ekfac`", "ekfac", "default"),
        ("`one_sided`", "one_sided", "default"),
        ("`eigen`, rare", "rare", None),
        ("`ekfac`, rare", "ekfac_rare", "rare"),
    ):
        each, against = found[name], "–"
        if rival is not None:
            better = (n(each[f"{split}_better_than_{rival}"]) for split in ("train", "test"))
            against = " / ".join(better)
        ratio = each["cpu_per_step_over_default"]
        yield Row(
            DOCUMENT,
            label,
            (
                n(each["train_better_than_baseline"]),
                n(each["test_within_2_percent_of_baseline"]),
                against,
                n(ratio, "g" if ratio == 1 else ".2f"),
            ),
        )


def _significant(value: float) -> str:
    return n(value, ".2f" if value < 1 else ".1f")


PAGE = Page(
    DOCUMENT,
    rows,
    given={
        "within 2 % of it": "definition",
    },
)
