"""Configurations that come with the package: in a wheel as its data, in a checkout in `jobs/`."""

from __future__ import annotations

import re
from pathlib import Path

_PACKAGE = Path(__file__).parents[1]
_IN_WHEEL = _PACKAGE / "shipped" / "configs"
_IN_CHECKOUT = _PACKAGE.parents[1] / "jobs" / "configs"


def shipped_configs() -> dict[str, Path]:
    """Name -> file, such as `digits`; empty if neither place exists."""
    folder = _IN_WHEEL if _IN_WHEEL.is_dir() else _IN_CHECKOUT
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(path: str | Path) -> Path | None:
    """The shipped configuration that a bare name such as `digits` means, if any."""
    name = str(path)
    return shipped_configs().get(name) if re.fullmatch(r"\w+", name) else None
