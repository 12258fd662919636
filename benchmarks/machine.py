"""What the result files record of the machine, and how they are written."""

from __future__ import annotations

import json
import math
import os
import platform
from pathlib import Path
from typing import Any

import torch

from elastic_kfac import __version__


def cpu_name() -> str:
    """The CPU's model."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if "model name" in x), platform.processor())


def facts() -> dict[str, Any]:
    """Hardware and versions."""
    return {
        "hardware": {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": 1},
        "versions": {
            "elastic_kfac": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
        },
    }


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Writes JSON, one line per entry of `runs`; numbers that JSON does not have become null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    clean = _finite(result)
    runs = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in clean["runs"].items())
    head = json.dumps({k: v for k, v in clean.items() if k != "runs"}, indent=1)
    part = path.with_suffix(".part")
    begin = head.removesuffix("\n}") + "," if len(clean) > 1 else "{"
    part.write_text(f'{begin}\n "runs": {{\n{runs}\n }}\n}}\n')
    part.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [*map(_finite, value)]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
