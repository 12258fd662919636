"""The script in the README runs as it stands there, and it learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[2]

SEEDED = """
import os, runpy, sys
import torch
torch.manual_seed(int(os.environ["RANK"]))
runpy.run_path(sys.argv[1], run_name="__main__")
"""
"""Runs a script as it stands; only its draws are the same every time."""


def example() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(r"<!-- example: .*? -->\n```python\n(.*?)```", text, re.DOTALL)
    assert match is not None, "the README has lost its example"
    return match[1]


def test_readme_example_on_two_processes_learns(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(example(), encoding="utf-8")
    seeded = tmp_path / "seeded.py"
    seeded.write_text(SEEDED, encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(seeded), str(script)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT / "platform"),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        },
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    losses: dict[int, float] = defaultdict(float)
    lines = re.findall(r"step (\d+): loss ([\d.]+)", done.stdout)
    for step, loss in lines:  # the mean over both processes
        losses[int(step)] += float(loss) / 2
    assert len(lines) == 80
    assert losses[39] < 0.4 * losses[0], losses


def test_readme_example_stays_short() -> None:
    assert len(example().splitlines()) <= 15
