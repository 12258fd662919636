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


BEFORE = """
import torch
import torch.distributed as dist
dist.init_process_group("gloo")
print = print if dist.get_rank() == 0 else lambda *args: None
"""
WRAPPED = "model = torch.nn.parallel.DistributedDataParallel(model)\n"
AFTER = """
del model, preconditioner  # they hold process groups, which must close before Python exits
dist.destroy_process_group()
"""


def on_several_processes() -> str:
    """The example under `torchrun`, as the README says it: only the model is wrapped."""
    before, optimizer, after = example().partition("optimizer = ")
    assert optimizer
    return BEFORE + before + WRAPPED + optimizer + after + AFTER


def losses_of(script: Path, launch: list[str]) -> list[float]:
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
    return [float(value) for value in re.findall(r"loss ([\d.]+)", done.stdout)]


def test_readme_example_alone_and_on_two_processes_learns(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    for text, launch in ((example(), []), (on_several_processes(), torchrun)):
        script.write_text(text, encoding="utf-8")
        losses = losses_of(script, launch)
        assert len(losses) == 4
        assert losses[-1] < 0.4 * losses[0], losses


def test_readme_example_stays_short() -> None:
    assert len(example().splitlines()) <= 15
