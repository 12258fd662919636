"""Tests marked `tools` need kubectl or promtool: they run with `-m tools` and never otherwise."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "tools: needs kubectl or promtool; run by `make test-tools`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "tools" in config.option.markexpr:
        return
    chosen = [item for item in items if item.get_closest_marker("tools") is None]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(
            items=[item for item in items if item.get_closest_marker("tools") is not None]
        )
        items[:] = chosen
