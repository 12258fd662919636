"""docs/elastic.md: spot nodes."""

from __future__ import annotations

from collections.abc import Iterator

from pages.values import Page, Row, load, n, share

DOCUMENT = "docs/elastic.md"


def rows() -> Iterator[Row]:
    """Spot nodes."""
    replayed = load("spot_replay")["virtual"]
    for label, key in (
        ("elastic, in place", "ours"),
        ("plain Ray Train, by the model", "plain_ray_train_model"),
    ):
        row = replayed[key]
        cells = (share(row["of_oracle"], 1), n(row["price"], ".2f"))
        yield Row(DOCUMENT, label, cells)
    price = n(replayed["on_demand"]["price"], ".2f")
    yield Row(DOCUMENT, "on-demand nodes", ("all of it", price))


PAGE = Page(
    DOCUMENT,
    rows,
)
