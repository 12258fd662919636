"""Benchmarks run seldom; a name that they import may not vanish unseen in between."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
IMPORTS = """
import runpy, sys
from pathlib import Path

for script in sys.argv[1:]:
    sys.path.insert(0, str(Path(script).parent))  # as `python SCRIPT` has it
    runpy.run_path(script, run_name="imported")
    print(Path(script).stem)
"""


def test_every_benchmark_imports() -> None:
    scripts = sorted((ROOT / "benchmarks").rglob("*.py"))
    command = [sys.executable, "-c", IMPORTS, *map(str, scripts)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [script.stem for script in scripts]
    assert len(scripts) >= 10


def test_the_gpu_benchmark_runs_at_toy_sizes(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    command = [sys.executable, str(ROOT / "benchmarks/gpu/run.py"), "--tiny", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", str(out)], capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert all(row["largest_relative_error"] < 1e-3 for row in result["correctness"])
    assert [row["model"] for row in result["steps"]] == ["resnet50", "gpt"]
    assert all(row["n"]["factor"] >= 1 for row in result["steps"])
    assert result["resume"]["bits_are_equal"]
    assert result["process_group"]["steps"] == 9


def test_the_gpu_benchmark_refuses_a_cpu_at_full_size(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "benchmarks/gpu/run.py"), "--device", "cpu"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 2 and "no GPU here" in done.stderr
