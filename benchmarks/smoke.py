"""Runs every benchmark at a tiny size: `make bench-smoke`, under 10 minutes on two cores.

The numbers mean nothing; that each script still runs and writes a result does. Results go to a
temporary folder. A script that is not listed here fails `make test`.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMEOUT_S = 240


@dataclass(frozen=True)
class Smoke:
    """One benchmark at a tiny size."""

    script: str
    """Below `benchmarks/`."""
    arguments: str = ""
    """`OUT` is a file of its own in the temporary folder."""
    sizes: dict[str, Any] = field(default_factory=dict)
    """Constants of the module to replace, by a value or by a function of theirs; `OUT` as above."""
    writes: str = "OUT"
    """The file that must exist afterwards; empty if it prints only."""


def _one(cases: dict[str, Any]) -> dict[str, Any]:
    """One of the cases."""
    name = next(name for name in cases if name.startswith("linear 2048"))
    return {name: cases[name]}


def _one_rate(grids: dict[str, Any]) -> dict[str, Any]:
    return {name: (settings, rates[:1]) for name, (settings, rates) in grids.items()}


def _of_resnet18(profile: Callable[..., Any]) -> Callable[..., Any]:
    return lambda name, *intervals: profile("resnet18", *intervals)


SMOKES = (
    Smoke("claims.py", writes=""),
    Smoke("cost_table.py", "--json", writes=""),
    Smoke("kfac_step.py", "--cases mlp256 --out OUT", {"INTERVALS": ((1, 2),)}),
    Smoke("plan_time.py", "--out OUT"),
    Smoke("row_log_cost.py", "--out OUT", {"ROWS": (20, 40)}),
    Smoke("wide_layers.py", "--part time --steps 1 --seeds 1 --out OUT", {"TIMED": _one}),
    Smoke(
        "planner/accuracy.py",
        "--models mlp --ranks 1 2 --cycles 1 --out OUT",
        {"INTERVALS": ((1, 2),)},
    ),
    Smoke(
        "planner/figures.py", "--out OUT", {"_profile": _of_resnet18}, "OUT/planner_figures.json"
    ),
    Smoke("reproducible_cost.py", "--ranks 2 --rounds 1 --out OUT", {"BATCH": 16}),
    Smoke(
        "data/bench_data.py",
        "--rounds 1 --long-seconds 1 --out OUT",
        {"PHOTOS": 16, "RAW_IMAGES": 512, "BATCH": 8, "SIDE": 64},
    ),
    Smoke("gpu/run.py", "--tiny --device cpu --out OUT"),
    Smoke("studies/dist_newton.py", "--samples 256 --epochs 1 --seeds 1 --out OUT"),
    Smoke("studies/fisher.py", "--steps 2 --seeds 1 --out OUT", {"SAMPLES": 30}),
    Smoke(
        "studies/robust_spectra.py", "--seeds 1 --data OUT-data --out OUT", {"SIZES": (1024, 2048)}
    ),
    Smoke(
        "studies/schedules.py",
        "--seeds 1 --pairs 2 --data OUT-data --out OUT",
        {"LARGE": 64, "SIZES": (4096,), "EPOCHS": 2},
    ),
    Smoke("studies/recipes.py", "--seeds 1 --data OUT-data --out OUT", {"BATCHES": {131072: 512}}),
    Smoke("workloads.py", "--tasks regression --seeds 1 --data OUT-data --out OUT"),
    Smoke("studies/wire_formats.py", "--seeds 1 --epochs 1 --out OUT"),
    Smoke(
        "defaults/run.py",
        "--set search --seeds 0 --variants plain --problems friedman1 --out OUT",
    ),
    Smoke(
        "time_to_accuracy/run.py",
        "--workloads digits --methods SGD 'ours, default' --points 1 --studies 1 --scale 0.05 "
        "--jobs 1 --out OUT",
    ),
    Smoke(
        "workloads.py",
        "--tasks regression --seeds 1 --data OUT.data --out OUT",
        {"GRIDS": _one_rate},
    ),
    Smoke("start_up.py", "--repeats 1 --out OUT"),
    Smoke("planner/decomposers.py", "--width 160 --steps 10 --out OUT"),
    Smoke("suggested.py", "--minutes 1 --seeds 1 --out OUT"),
    Smoke("in_place_gaps.py", "--cycles 1 --model small_cnn --out OUT"),
    Smoke("elastic/slow_rank.py", "--ranks 2 --steps 44 --sample-ms 2 --out OUT"),
    Smoke("elastic/spot_replay.py", "--gaps 30 --out OUT"),
    Smoke("elastic/changes_in_place.py", "--cycles 1 --out OUT"),
    Smoke("telemetry_cost.py", "--epochs 2 --repeats 1", {"RESULT": "OUT"}),
    Smoke("vault_cost.py", "--out OUT", {"SIZES": (100_000,), "SNAPSHOTS": 4}),
    Smoke("elastic/chaos.py", "--phases 0.5:15 --out OUT"),
    Smoke("elastic_recovery.py", "--cycles 1 --cycles-in-place 1 --out OUT"),
)
LEFT_OUT = {
    "hessian_cost.py": "reads Fashion-MNIST",
    "tuned_against_tuned.py": "reads Fashion-MNIST",
    "studies/cifar10_jpeg.py": "reads CIFAR-10",
    "smoke.py": "this script",
}
"""Scripts that need data from elsewhere."""


def run_here(script: str, sizes: dict[str, str], arguments: list[str]) -> None:
    """Runs a script with other constants, in a process of its own."""
    path = HERE / script
    sys.path[:0] = [str(path.parent), str(HERE)]
    module = importlib.import_module(path.stem)
    smoke = next(each for each in SMOKES if each.script == script)
    for name, value in smoke.sizes.items():
        if not hasattr(module, name):
            sys.exit(f"{script} has no constant {name}")
        if callable(value):
            value = value(getattr(module, name))
        setattr(module, name, Path(sizes["OUT"]) if value == "OUT" else value)
    sys.argv = [script, *arguments]
    sys.exit(module.main() or 0)


def run(smoke: Smoke, folder: Path) -> str:
    """Runs one benchmark; what is wrong, or an empty string."""
    out = folder / f"{smoke.script.replace('/', '-')}.json"
    if smoke.writes.startswith("OUT/"):
        out.mkdir()
    words = shlex.split(smoke.arguments.replace("OUT", str(out)))
    command = [sys.executable, str(HERE / "smoke.py"), "--here", smoke.script, str(out), *words]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"not done after {TIMEOUT_S} s"
    if done.returncode:
        return (done.stderr or done.stdout)[-2000:]
    written = Path(smoke.writes.replace("OUT", str(out)))
    return "" if not smoke.writes or written.is_file() else f"{smoke.writes} was not written"


def main() -> int:
    """Returns 1 if a benchmark fails."""
    if sys.argv[1:2] == ["--here"]:
        run_here(sys.argv[2], {"OUT": sys.argv[3]}, sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="scripts whose path contains one of these")
    only = parser.parse_args().only
    failed, began = 0, time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-smoke-") as folder:
        for smoke in SMOKES:
            if only and not any(part in smoke.script for part in only):
                continue
            start = time.monotonic()
            wrong = run(smoke, Path(folder))
            failed += bool(wrong)
            state = "failed" if wrong else "ok"
            print(f"{state:<7}{smoke.script:<28}{time.monotonic() - start:6.1f} s", flush=True)
            if wrong:
                print(wrong, flush=True)
    for script, reason in LEFT_OUT.items():
        print(f"left out  {script}: {reason}")
    print(f"{failed} failed, {time.monotonic() - began:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
