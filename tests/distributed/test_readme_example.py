"""The script in the README runs as it stands there, and it learns."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def example() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    match = re.search(r"<!-- example: .*? -->\n```python\n(.*?)```", text, re.DOTALL)
    assert match is not None, "the README has lost its example"
    return match[1]


def test_readme_example_on_two_processes_learns(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(example(), encoding="utf-8")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *launch, str(script)],
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
    losses = dict(re.findall(r"step (\d+): loss ([\d.]+)", done.stdout))  # of either process
    assert len(losses) == 40
    assert float(losses["39"]) < 0.4 * float(losses["0"]), losses


def test_readme_example_stays_short() -> None:
    assert len(example().splitlines()) <= 15
