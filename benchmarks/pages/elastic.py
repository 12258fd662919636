"""docs/elastic.md: one story, and spot nodes."""

from __future__ import annotations

from collections.abc import Iterator

from pages.values import Page, Row, load, n, share

DOCUMENT = "docs/elastic.md"


def rows() -> Iterator[Row]:
    """One run and its faults; spot nodes."""
    replayed = load("spot_replay")["virtual"]
    for label, key in (
        ("elastic, in place", "ours"),
        ("plain Ray Train, by the model", "plain_ray_train_model"),
    ):
        row = replayed[key]
        cells = (share(row["of_oracle"], 1), n(row["price"], ".2f"))
        yield Row(DOCUMENT, label, cells)
    stretch = load("spot_replay")["real"]
    label = f"the same, {stretch['minutes']:.0f} minutes of it with real processes"
    yield Row(DOCUMENT, label, (share(stretch["of_oracle"], 1), "not priced"))
    story = load("story")["results"]
    for label, side in (
        ("elastic-kfac: seconds, longest pause, steps redone", "ours"),
        ("plain Ray Train", "plain"),
    ):
        runs = (story[side][course] for course in ("quiet", "resized", "killed"))
        yield Row(
            DOCUMENT,
            label,
            tuple(
                f"{n(run['seconds'], '.0f')}, {n(run['longest_gap_s'], '.1f')} s, "
                f"{n(run['steps_redone'])}"
                for run in runs
            ),
        )
    price = n(replayed["on_demand"]["price"], ".2f")
    yield Row(DOCUMENT, "on-demand nodes", ("all of it", price))


PAGE = Page(
    DOCUMENT,
    rows,
    given={
        "wait 0.1 s": "setting",
        "every 30 s": "setting",
        "15 s later": "setting",
    },
)
