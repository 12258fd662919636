"""Benchmarks run seldom; a name that they import may not vanish unseen in between."""

from __future__ import annotations

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
