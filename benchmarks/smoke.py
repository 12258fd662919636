"""Runs every benchmark at a tiny size: `make bench-smoke`, under 10 minutes on two cores.

The numbers mean nothing; that each script still runs and writes a result does. Results go to a
temporary folder. A script that is not listed here fails `make test`.

Three run at a time, of which two start a Ray cluster, as those mostly wait.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
TIMEOUT_S = 400


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
    on_ray: bool = False
    """Whether it starts a Ray cluster."""


def _one(cases: dict[str, Any]) -> dict[str, Any]:
    """One of the cases."""
    name = next(name for name in cases if name.startswith("linear 2048"))
    return {name: cases[name]}


def _one_rate(grids: dict[str, Any]) -> dict[str, Any]:
    return {name: (settings, rates[:1]) for name, (settings, rates) in grids.items()}


def _of_one_cycle(cases: Callable[[], dict[str, Any]]) -> Callable[[], dict[str, Any]]:
    return lambda: {name: replace(case, cycles=(1,)) for name, case in cases().items()}


def _few_samples(common: dict[str, Any]) -> dict[str, Any]:
    return {**common, "analysis.samples": 64}


def _of_resnet18(profile: Callable[..., Any]) -> Callable[..., Any]:
    return lambda name, *intervals: profile("resnet18", *intervals)


SMOKES = (
    Smoke("claims.py", writes=""),
    Smoke("cost_table.py", "--json", writes=""),
    Smoke(
        "kfac_step.py",
        "--cases mlp256 --out OUT",
        {"INTERVALS": ((1, 2),), "_cases": _of_one_cycle},
    ),
    Smoke("plan_time.py", "--out OUT", {"LAYERS": 50, "REPEATS": 1}),
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
    Smoke(
        "studies/fisher.py",
        "--steps 2 --seeds 1 --out OUT",
        {"SAMPLES": 30, "TUNING_SEEDS": (100,)},
    ),
    Smoke(
        "studies/robust_spectra.py",
        "--seeds 1 --data OUT-data --out OUT",
        {"SIZES": (1024, 2048), "COMMON": _few_samples},
    ),
    Smoke(
        "studies/schedules.py",
        "--seeds 1 --pairs 2 --data OUT-data --out OUT",
        {"LARGE": 64, "SIZES": (4096,), "EPOCHS": 2},
    ),
    Smoke("studies/recipes.py", "--seeds 1 --data OUT-data --out OUT", {"BATCHES": {131072: 512}}),
    Smoke("studies/wire_formats.py", "--seeds 1 --epochs 1 --out OUT"),
    Smoke(
        "defaults/run.py",
        "--set search --seeds 0 --variants plain --problems friedman1 --out OUT",
    ),
    Smoke(
        "time_to_accuracy/run.py",
        "--workloads 'letters mlp' --methods SGD 'ours, default' --points 1 --studies 1 --scale 0.05 "
        "--jobs 1 --out OUT",
    ),
    Smoke(
        "workloads.py",
        "--tasks regression --seeds 1 --data OUT.data --out OUT",
        {"GRIDS": _one_rate},
    ),
    Smoke("planner/decomposers.py", "--widths 160 --steps 10 --out OUT"),
    Smoke("suggested.py", "--minutes 0.8 --seeds 1 --out OUT"),
    Smoke("in_place_gaps.py", "--cycles 1 --model small_cnn --out OUT"),
    Smoke("elastic/slow_rank.py", "--ranks 2 --steps 44 --sample-ms 2 --out OUT"),
    Smoke("elastic/spot_replay.py", "--gaps 30 --out OUT"),
    # The longest first.
    Smoke(
        "elastic_recovery.py",
        "--cycles 1 --cycles-in-place 1 --out OUT",
        {"STEPS": 5},
        on_ray=True,
    ),
    Smoke(
        "elastic/changes_in_place.py",
        "--cycles 1 --out OUT",
        {"STEPS": 5, "KINDS": ("grow", "drain"), "SIZES": (3, 2)},
        on_ray=True,
    ),
    Smoke("start_up.py", "--repeats 1 --out OUT", on_ray=True),
    Smoke("elastic/chaos.py", "--phases 0.3:9 --out OUT", {"QUIET_S": 3.0}, on_ray=True),
    Smoke("elastic/story.py", "--epochs 1 --only quiet --out OUT", on_ray=True),
    Smoke("vault_cost.py", "--out OUT", {"SIZES": (100_000,), "SNAPSHOTS": 4}, on_ray=True),
    Smoke("telemetry_cost.py", "--epochs 2 --repeats 1", {"RESULT": "OUT"}, on_ray=True),
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
    folders = [str(path.parent), str(HERE)]
    sys.path[:0] = folders
    # Processes that it starts find what it is made of: as a script, it would be sent to them by value.
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [*folders, *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    )
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


def run(smoke: Smoke, folder: Path) -> tuple[str, float]:
    """Runs one benchmark; what is wrong (or an empty string), and the CPU seconds of its processes."""
    out = folder / f"{smoke.script.replace('/', '-')}.json"
    if smoke.writes.startswith("OUT/"):
        out.mkdir()
    words = shlex.split(smoke.arguments.replace("OUT", str(out)))
    command = [sys.executable, str(HERE / "smoke.py"), "--here", smoke.script, str(out), *words]
    log = out.with_suffix(".log")
    with log.open("wb") as stream:
        process = subprocess.Popen(command, stdout=stream, stderr=stream)
    late = threading.Timer(TIMEOUT_S, process.kill)
    late.start()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    was_late = not late.is_alive()
    late.cancel()
    cpu_s = used.ru_utime + used.ru_stime
    if process.returncode:
        said = log.read_text(errors="replace")[-2000:]
        return f"not done after {TIMEOUT_S} s\n{said}" if was_late else said or "failed", cpu_s
    written = Path(smoke.writes.replace("OUT", str(out)))
    return "" if not smoke.writes or written.is_file() else f"{smoke.writes} was not written", cpu_s


class Lanes:
    """Benchmarks in three threads."""

    def __init__(self, smokes: list[Smoke], folder: Path) -> None:
        self._folder = folder
        self._lock = threading.Lock()
        self._waiting = list(smokes)
        self.failed = 0
        self.cpu_s = 0.0

    def run(self) -> None:
        """Runs all."""
        lanes = [
            threading.Thread(target=self._lane, args=(on_ray,)) for on_ray in (True, True, False)
        ]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()

    def _next(self, on_ray: bool) -> Smoke | None:
        with self._lock:
            kinds = (True, False) if on_ray else (False,)
            for kind in kinds:
                found = next((smoke for smoke in self._waiting if smoke.on_ray == kind), None)
                if found is not None:
                    self._waiting.remove(found)
                    return found
        return None

    def _lane(self, on_ray: bool) -> None:
        while smoke := self._next(on_ray):
            start = time.monotonic()
            wrong, cpu_s = run(smoke, self._folder)
            took = time.monotonic() - start
            with self._lock:
                self.failed += bool(wrong)
                self.cpu_s += cpu_s
                state = "failed" if wrong else "ok"
                print(f"{state:<7}{smoke.script:<30}{took:6.1f} s{cpu_s:8.1f} CPU s", flush=True)
                if wrong:
                    print(wrong, flush=True)


def main() -> int:
    """Returns 1 if a benchmark fails."""
    if sys.argv[1:2] == ["--here"]:
        run_here(sys.argv[2], {"OUT": sys.argv[3]}, sys.argv[4:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", help="scripts whose path contains one of these")
    only = parser.parse_args().only
    chosen = [s for s in SMOKES if not only or any(part in s.script for part in only)]
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-smoke-") as folder:
        lanes = Lanes(chosen, Path(folder))
        lanes.run()
    for script, reason in LEFT_OUT.items():
        print(f"left out  {script}: {reason}")
    took = time.monotonic() - began
    print(f"{lanes.failed} failed, {took:.0f} s, {lanes.cpu_s:.0f} CPU s")
    return 1 if lanes.failed else 0


if __name__ == "__main__":
    sys.exit(main())
