"""Links from the pages to files outside `docs/` have no page: the site shows them as text."""

from __future__ import annotations

import re
from typing import Any

LINK = re.compile(r"\[([^\]]+)\]\((?:\.\./|examples/)[^)]*\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Called by MkDocs for every page."""
    return LINK.sub(r"`\1`", markdown)
