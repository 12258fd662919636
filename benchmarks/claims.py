"""Every measured number in README and docs, computed from its file under `benchmarks/results`.

    python benchmarks/claims.py            # `make verify-claims`: no stale, missing or orphan number
    python benchmarks/claims.py --write    # writes the rows into the documents, and docs/benchmarks.md

`pages/` has a file per document. A row of a table is found in its document by its first cell, a piece of
text by its words. `n` formats a value of a file. A row that has digits in a result cell from elsewhere is
refused, as is a number with a unit in a document that neither comes from here nor is given there with its
reason.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from pages import (
    benchmarks,
    damping,
    elastic,
    planning,
    readme,
    studies,
    time_to_accuracy,
    variants,
)
from pages.values import RESULTS, ROOT, Page, Row, plain

UNITS = r"(?:CPU |training )?(?:s|ms|min|minutes?|seconds|hours?)\b|%|[kMGT]i?B\b|×"
MEASURED = re.compile(rf"(?<![\w.(/])[−-]?\d[\d.,]*(?: to [+−-]?\d[\d.,]*)?\s?(?:{UNITS})")
PAGES = (
    *(
        each.PAGE
        for each in (readme, damping, variants, planning, elastic, studies, time_to_accuracy)
    ),
    Page(
        "docs/install.md",
        given={
            "5.2 GB without extras, 6.0 GB": "measured once with the command that stands beside it"
        },
    ),
)


def pages() -> list[Page]:
    """Every document with numbers; the reference of the configuration is generated elsewhere."""
    found = {page.document: page for page in PAGES}
    names = ["README.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
    others = ("docs/configuration.md", benchmarks.DOCUMENT)
    return [found.get(name) or Page(name) for name in names if name not in others]


def rows() -> list[Row]:
    """Every row."""
    return [row for page in PAGES for row in page.rows()]


def orphans(text: str, covered: Iterable[str]) -> list[str]:
    """Numbers with units in a document that are not `covered`."""
    text = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    text = "\n".join(line for line in text.splitlines() if not line.startswith("    "))
    for piece in sorted(covered, key=len, reverse=True):
        text = text.replace(piece, "")
    rest = [line for line in text.splitlines() if not line.startswith(("#", "|---"))]
    return [f"{m[0]} in: {line.strip()[:90]}" for line in rest for m in MEASURED.finditer(line)]


def labels_only(row: Row) -> str:
    """The cell that names a row, whose numbers are settings."""
    return f"| {row.label} |"


def problems(read: Callable[[str], str]) -> list[str]:
    """Everything that is wrong; `read` gives the text of a document."""
    found: list[str] = []
    for page in pages():
        document, text = page.document, read(page.document)
        covered = list(page.given)
        for row in page.rows():
            found += [
                f"{document}: {digits} in the row {row.label!r} comes from no file"
                for digits in row.unfounded()
            ]
            if row.line not in text:
                found.append(f"{document}: stale or missing: {row.line}")
            covered += [row.line, labels_only(row)]
        for words in map(plain, page.texts()):
            if words not in text:
                found.append(f"{document}: stale or missing: {words!r}")
            covered.append(words)
        found += [f"{document}: a number without a file: {line}" for line in orphans(text, covered)]
        found += [
            f"{document}: given, but not there: {words!r}"
            for words in page.given
            if words not in text
        ]
    unknown = [name for name in benchmarks.names() if name not in benchmarks.COMMANDS]
    found += [f"{RESULTS}/{name}.json: no command in COMMANDS wrote it" for name in unknown]
    if not unknown:
        page_text = read(benchmarks.DOCUMENT)
        if page_text != benchmarks.text(benchmarks.dates_in(page_text)):
            found.append(f"{benchmarks.DOCUMENT} is stale")
    return found


def write() -> None:
    """Replaces the rows in the documents."""
    for row in rows():
        path = ROOT / row.document
        text = path.read_text(encoding="utf-8")
        pattern = re.compile(rf"^{re.escape(labels_only(row))}.*$", re.MULTILINE)
        same = pattern.findall(text)
        if len(same) != 1:
            sys.exit(f"{row.document} has {len(same)} rows {row.label!r}")
        path.write_text(pattern.sub(lambda _, line=row.line: line, text), encoding="utf-8")
    page = benchmarks.text(benchmarks.dates_of_commits())
    (ROOT / benchmarks.DOCUMENT).write_text(page, encoding="utf-8")


def main() -> int:
    """Returns 1 if a number is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", action="store_true", help="write the rows into the documents")
    if parser.parse_args().write:
        write()
    try:
        found = problems(lambda name: (ROOT / name).read_text(encoding="utf-8"))
    except (KeyError, StopIteration, FileNotFoundError) as error:
        found = [f"a result file lacks what a document states: {error!r}"]
    print("\n".join(found) or f"{len(rows())} rows and their documents agree with {RESULTS}")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
