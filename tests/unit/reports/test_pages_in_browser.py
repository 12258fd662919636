"""Reports in a real browser: nothing is loaded, nothing complains, everything is there."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from markupsafe import Markup
from PIL import Image

from elastic_kfac.reports.pages import page
from elastic_kfac.reports.run_page import write_report
from elastic_kfac.reports.search_page import SECTIONS, write_search_page
from support.browser import Visit, browser, visit
from support.search_folders import HOSTILE, rows, write_search

pytestmark = pytest.mark.tools

WIDTHS = (1280, 400)
EVERYWHERE = {
    "headings": "[...document.querySelectorAll('h2')].map(each => each.textContent)",
    "broken": "window.broken",
    "wide": "document.documentElement.scrollWidth - document.documentElement.clientWidth",
    "drawn": "[...document.querySelectorAll('svg')].map(each => each.getBoundingClientRect())"
    ".every(box => box.width > 200 && box.height > 60)",
}
TABLE = "document.querySelector('table[aria-label=\"All searched points\"]')"
SORTED = f"[...{TABLE}.tBodies[0].rows].map(row => row.cells[COLUMN].textContent)"
PRESS = f"{TABLE}.tHead.rows[0].cells[COLUMN].querySelector('button').click()"
POINT = (
    (
        "(() => {const row = {TABLE}.tBodies[0].rows[0];"
        "row.dispatchEvent(new PointerEvent('pointerover', {{bubbles: true}}));"
        "return [...document.querySelectorAll('svg .lit')].map(each => each.id.split('-')[0])})()"
    )
    .replace("{TABLE}", TABLE)
    .replace("{{", "{")
    .replace("}}", "}")
)


@pytest.fixture(scope="module")
def debugger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with browser(tmp_path_factory.mktemp("browser") / "profile") as address:
        yield address


def opened(debugger: str, target: Path, ask: dict[str, str] | None = None) -> dict[str, Any]:
    """Visits a page, and checks what is true of every page of ours."""
    seen = visit(debugger, target, widths=WIDTHS, ask={**EVERYWHERE, **(ask or {})})
    assert seen.requests == [target.resolve().as_uri()]
    assert seen.complaints == []
    assert seen.answers["broken"] is None
    assert seen.answers["wide"] <= 0
    assert seen.answers["drawn"]
    for width in WIDTHS:
        assert shows_something(seen, width)
    return seen.answers


def shows_something(seen: Visit, width: int) -> bool:
    """Whether a screenshot is of the page's size and not of one colour."""
    image = Image.open(io.BytesIO(seen.screenshots[width])).convert("L")
    dark = sum(image.histogram()[:120]) / (image.width * image.height)
    return width - 20 <= image.width <= width and image.height > 400 and dark > 0.003


def test_page_of_a_search_works(debugger: str, tmp_path: Path) -> None:
    target = write_search_page(write_search(tmp_path / "search", rows()))
    ask = {
        "before": SORTED.replace("COLUMN", "0"),
        "press": PRESS.replace("COLUMN", "4"),
        "ascending": SORTED.replace("COLUMN", "4"),
        "press again": PRESS.replace("COLUMN", "4"),
        "descending": SORTED.replace("COLUMN", "4"),
        "best first": PRESS.replace("COLUMN", "1"),
        "order": SORTED.replace("COLUMN", "1"),
        "lit": POINT,
        "saved": "[...document.querySelectorAll('a[download]')].map(each => each.download)",
    }
    answers = opened(debugger, target, ask)
    assert answers["headings"] == list(SECTIONS.values())
    damping = [float(text) for text in answers["ascending"]]
    assert damping == sorted(damping) and len(damping) == len(answers["before"]) == 14
    assert [float(text) for text in answers["descending"]] == damping[::-1]
    assert answers["order"][-1] in ("–", "> budget")
    assert {"curves", "pareto", "parallel", "timeline"} <= set(answers["lit"])
    assert answers["saved"] == ["best_config.yaml", "trials.csv", "space.yaml"]


def test_page_of_a_running_search_can_follow_it(debugger: str, tmp_path: Path) -> None:
    found = rows(seeds=1, points=4)
    found[-1] |= {"status": "running", "objective": "", "reached": "", "ended": ""}
    folder = write_search(tmp_path / "search", found, status="running", best_config=None)
    ask = {
        "written": "document.getElementById('written').textContent",
        "follow": "document.getElementById('live').click()",
        "hash": "location.hash",
    }
    answers = opened(debugger, write_search_page(folder), ask)
    assert answers["written"].startswith("This page was written ")
    assert answers["hash"] == "#live"


def test_page_of_a_search_with_hostile_names_runs_none_of_them(
    debugger: str, tmp_path: Path
) -> None:
    found = rows(seeds=1, points=4)
    for each in found:
        each |= {"trial_id": f"{each['trial_id']}{HOSTILE}", "reason": HOSTILE}
    folder = write_search(tmp_path / "search", found, name=HOSTILE, best_config=HOSTILE)
    answers = opened(debugger, write_search_page(folder))
    assert answers["headings"] == list(SECTIONS.values())


def test_page_of_a_run_works(debugger: str, make_run: Callable[..., Path]) -> None:
    folder = make_run()
    write_report(folder)
    answers = opened(debugger, folder / "report.html")
    assert answers["headings"][0] == "Learning"
    assert answers["headings"][-1] == "Provenance"


def program() -> str:
    """A page that a program got into."""
    body = Markup("<script>window.broken=1</script>")
    return page("base.html", title="t", headline="t", body=body)


def test_browser_sees_what_a_page_must_not_do(debugger: str, tmp_path: Path) -> None:
    # The policy of our pages stops a program that got in, and the visit hears of it.
    stopped = tmp_path / "stopped.html"
    stopped.write_text(program(), encoding="utf-8")
    seen = visit(debugger, stopped, widths=WIDTHS, ask=EVERYWHERE)
    assert seen.answers["broken"] is None
    assert any("Content Security Policy" in complaint for complaint in seen.complaints)
    # Without it the same page runs, and asks for more.
    free = tmp_path / "free.html"
    free.write_text("<script>window.broken=1</script><img src=other.png>", encoding="utf-8")
    seen = visit(debugger, free, widths=WIDTHS, ask=EVERYWHERE)
    assert seen.answers["broken"] == 1
    assert (tmp_path / "other.png").as_uri() in seen.requests
    assert seen.complaints
    assert not shows_something(seen, 1280)
