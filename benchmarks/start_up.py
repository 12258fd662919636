"""How long a run on the embedded cluster takes from the command to its first committed step, by parts.

python benchmarks/start_up.py [--repeats 5] [--out benchmarks/results/start_up.json]

Wall-clock time counts on a quiet machine only; the CPU time of all processes, read from /proc until the
first row of metrics.jsonl is there, is what a change of imports or processes moves. `--against` measures
another checkout's `platform/` in turn with this one.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from machine import cpu_name

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "jobs" / "configs" / "digits.yaml"
MARK = "ELASTIC_KFAC_START_UP"
TICKS_PER_S = os.sysconf("SC_CLK_TCK")
PARTS = ("checks", "cluster", "actors", "group")
"""They end with: "Starting a local Ray cluster", the last node's process, the first rank's process, the
first committed step."""


@dataclass
class Seen:
    """A process of the run."""

    since_s: float
    cpu_s: float = 0.0
    name: str = ""


class Processes:
    """Everything that one command started: children inherit a mark in their environment."""

    def __init__(self, mark: str) -> None:
        self._mark = f"{MARK}={mark}".encode()
        self._strangers: set[str] = set()
        self.seen: dict[str, Seen] = {}

    def look(self, now_s: float) -> None:
        """Reads names and CPU times of new and known processes."""
        for pid in (name for name in os.listdir("/proc") if name.isdecimal()):  # noqa: PTH208
            if pid in self._strangers:
                continue
            try:
                if pid not in self.seen:
                    environment = Path(f"/proc/{pid}/environ").read_bytes()
                    if environment and self._mark not in environment.split(b"\0"):
                        self._strangers.add(pid)
                    if self._mark not in environment.split(b"\0"):
                        continue
                    self.seen[pid] = Seen(now_s)
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
                words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            known = self.seen[pid]
            known.cpu_s = (int(fields[11]) + int(fields[12])) / TICKS_PER_S
            known.name = _name(words) or known.name

    def first(self, name: str) -> float:
        """When the first process of this name appeared."""
        return min(seen.since_s for seen in self.seen.values() if seen.name == name)

    def last(self, name: str) -> float:
        """When the last process of this name appeared."""
        return max(seen.since_s for seen in self.seen.values() if seen.name == name)


def _name(words: str) -> str:
    if words.startswith("ray::"):
        return words.removeprefix("ray::").partition(".")[0].strip("\0 ")
    for part in (
        "raylet/raylet",
        "gcs/gcs_server",
        "dashboard/dashboard.py",
        "elastic_kfac\0train",
    ):
        if part in words:
            return part.rpartition("/")[2].replace("\0", " ")
    return ""


def start(shards: Path, storage: Path, package: Path) -> dict[str, Any]:
    """One run of one epoch: seconds by part, CPU seconds by kind of process."""
    mark = storage.name
    variables = {
        **os.environ,
        MARK: mark,
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": str(package),
    }
    command = [
        *(sys.executable, "-m", "elastic_kfac", "train", str(CONFIG)),
        *("--storage", str(storage), "--name", "run"),
        *("--set", f"data.shards={shards}", "--set", "train.epochs=1"),
    ]
    metrics, output = storage / "run" / "metrics.jsonl", storage / "output"
    processes = Processes(mark)
    told = stepped = None
    with output.open("wb") as stream:
        began = time.monotonic()
        process = subprocess.Popen(command, env=variables, stdout=stream, stderr=stream, cwd=ROOT)
        while process.poll() is None and stepped is None:
            processes.look(time.monotonic() - began)
            if told is None and b"Starting a local Ray cluster" in output.read_bytes():
                told = time.monotonic() - began
            if metrics.exists() and b'"loss"' in metrics.read_bytes():
                stepped = time.monotonic() - began
            time.sleep(0.05)
        if process.wait() not in (0, 1) or told is None or stepped is None:
            raise SystemExit(f"the run failed:\n{output.read_text()}")
    marks = [0.0, told, processes.last("raylet"), processes.first("RayTrainWorker"), stepped]
    cpu: Counter[str] = Counter()
    for seen in processes.seen.values():
        cpu[seen.name or "other"] += seen.cpu_s
    return {
        "wall_s": stepped,
        "parts_s": {name: marks[i + 1] - marks[i] for i, name in enumerate(PARTS)},
        "cpu_s": sum(cpu.values()),
        "processes": len(processes.seen),
        "cpu_by_process_s": dict(cpu.most_common()),
    }


def summary(rows: list[dict[str, Any]], key: str, *names: str) -> dict[str, float]:
    """Median, least and most of a measured value."""
    values = []
    for row in rows:
        value: Any = row[key]
        for name in names:
            value = value.get(name, 0.0)
        values.append(float(value))
    return {
        "median": round(statistics.median(values), 2),
        "min": round(min(values), 2),
        "max": round(max(values), 2),
    }


def measured(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Summaries of all runs of one package."""
    kinds = sorted({name for row in rows for name in row["cpu_by_process_s"]})
    return {
        "n": len(rows),
        "wall_s": summary(rows, "wall_s"),
        "parts_s": {name: summary(rows, "parts_s", name) for name in PARTS},
        "cpu_s": summary(rows, "cpu_s"),
        "processes": summary(rows, "processes"),
        "cpu_by_process_s": {name: summary(rows, "cpu_by_process_s", name) for name in kinds},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--against", type=Path, help="platform/ of another checkout")
    arguments = parser.parse_args()
    packages = {"here": ROOT / "platform"}
    if arguments.against:
        packages["against"] = arguments.against
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in packages}
    loads = []
    with tempfile.TemporaryDirectory(prefix="start-up-") as folder:
        shards = Path(folder) / "digits"
        # Not part of it: the shards of a first run.
        subprocess.run(
            [
                *(sys.executable, "-m", "elastic_kfac", "shards", "make"),
                *("--source", "digits", "--out", str(shards)),
            ],
            env={**os.environ, "PYTHONPATH": str(packages["here"])},
            check=True,
            stdout=subprocess.DEVNULL,
        )
        for number, (name, package) in itertools.product(
            range(arguments.repeats), packages.items()
        ):
            storage = Path(folder) / f"{os.getpid()}-{number}-{name}"
            storage.mkdir()
            row = start(shards, storage, package)
            rows[name].append(row)
            loads.append(os.getloadavg()[0])
            parts = "  ".join(f"{part} {value:.1f}" for part, value in row["parts_s"].items())
            print(
                f"{name}: first step after {row['wall_s']:.1f} s ({parts}); "
                f"{row['cpu_s']:.1f} CPU s in {row['processes']} processes; load {loads[-1]:.1f}"
            )
    result = {
        "benchmark": "start_up",
        "what": "elastic-kfac train jobs/configs/digits.yaml until the first committed step",
        "results": {name: measured(found) for name, found in rows.items()},
        "load_average": round(statistics.median(loads), 1),
        "machine": {"cpu": cpu_name(), "cores": os.cpu_count()},
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "ray": ray.__version__,
        },
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
