"""How long a change of the world takes inside living gloo processes, without Ray.

    python benchmarks/in_place_gaps.py [--cycles 8] [--out FILE]

Four members train; in every cycle one of them leaves, a newcomer that waits with everything imported
joins, one member is killed (SIGKILL), and another newcomer joins. A gap is the time between the last
step that the world before committed and the first that the world after did, as the founder that
stays sees it; for a kill also from the signal on. Steps that a kill interrupted are computed again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as processes

from elastic_kfac import __version__
from elastic_kfac.config import parse_config
from elastic_kfac.data.batch import Batch
from elastic_kfac.data.columns import image_columns
from elastic_kfac.data.dataset import Datasets
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.training.callbacks import FolderWriter, Point
from elastic_kfac.training.in_place import run_member
from elastic_kfac.training.membership import Membership

MEMBERS = 4
BATCH = 32
STEPS_BETWEEN = 12
"""Steps that a world takes before the next change."""
DEFAULT_OUT = Path(__file__).with_name("results") / "in_place_gaps.json"
TARGETS = {"shrink": 0.5, "grow": 0.5, "kill": 1.5}
"""Largest median that is wanted, in s."""


@dataclass(frozen=True)
class Commit:
    """A step as one member saw it."""

    at: float
    """Of the clock that all processes of a machine share."""
    step: int
    world_size: int


class RandomDataset:
    """Random images, the same on all ranks."""

    num_samples = 1_000_000
    num_outputs = 10
    input_shape = (3, 32, 32)
    columns = image_columns(input_shape, [str(digit) for digit in range(10)])
    sha256 = "random"
    normalization = None

    def read(self, epoch: int, first_position: int, count: int) -> Batch:
        generator = torch.Generator().manual_seed(first_position)
        images = torch.randn(count, *self.input_shape, generator=generator)
        ids = np.arange(first_position, first_position + count, dtype=np.uint64)
        return Batch(images, torch.arange(count) % 10, ids, torch.ones(count))

    def prefetch(self, epoch: int, first_position: int, count: int) -> None:
        """Nothing to prepare."""

    def close(self) -> None:
        """Nothing to close."""


class StopKey:
    """A control that stops the run when the benchmark is over."""

    def __init__(self, store: dist.Store) -> None:
        self._store = store

    def stop_reason(self) -> str | None:
        return "the benchmark is over" if self._store.check(["stop"]) else None


def member(slot: int, port: int, folder: str, model: str) -> None:
    """Body of a process: a founder at once, a newcomer when it is asked."""
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, None, False)
    membership = Membership(store, slot)
    config = parse_config(
        {
            "model": {"name": model},
            "train": {"global_batch_size": BATCH, "epochs": 1000},
            "kfac": {"factor_update_steps": 5, "inverse_update_steps": 10},
            "elastic": {"max_workers": MEMBERS},
        }
    )
    commits = Path(folder, f"commits-{slot}").open("a", buffering=1)  # noqa: SIM115 (to the end)

    class Commits(FolderWriter):
        def on_point(self, point: Point, step: int) -> None:
            if point != "committed":
                return
            world_size = dist.get_world_size() if dist.is_initialized() else 1
            commits.write(f"{time.monotonic()} {step} {world_size}\n")
            if store.check([f"leave/{slot}"]):
                membership.leave_at_next_boundary()

    store.set(f"ready/{slot}", "")
    while not store.check([f"join/{slot}"]):
        if store.check(["stop"]):
            return
        time.sleep(0.02)
    run_member(
        config,
        membership,
        store=CheckpointStore(f"{folder}/checkpoints"),
        callback=Commits(RunFolder(Path(folder, "run"))),
        control=StopKey(store),
        datasets=Datasets(RandomDataset(), None),
    )


class Members:
    """The processes of one run, and what the founder that stays has seen."""

    def __init__(self, folder: Path, model: str) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._context = processes.get_context("spawn")
        self._folder = folder
        self._model = model
        self._processes: dict[int, Any] = {}
        self.slots: list[int] = []

    def prepare(self, slot: int) -> None:
        """Starts a process, which then waits until it is asked to join."""
        arguments = (slot, self.store.port, str(self._folder), self._model)
        self._processes[slot] = self._context.Process(target=member, args=arguments, daemon=True)
        self._processes[slot].start()
        wait(lambda: self.store.check([f"ready/{slot}"]))

    def join(self, slot: int) -> None:
        self.slots.append(slot)
        self.store.set(f"join/{slot}", "")

    def leave(self) -> None:
        self.store.set(f"leave/{self.slots.pop()}", "")

    def kill(self) -> None:
        os.kill(self._processes[self.slots.pop()].pid, signal.SIGKILL)

    def commits(self) -> list[Commit]:
        path = self._folder / "commits-0"
        rows = [line.split() for line in path.read_text().splitlines()] if path.exists() else []
        return [Commit(float(r[0]), int(r[1]), int(r[2])) for r in rows if len(r) == 3]

    def change(self, act: Callable[[], None], world_size: int) -> dict[str, float]:
        """Seconds of one change, and how many committed steps were computed again."""
        seen = len(self.commits())
        wait(lambda: len(self.commits()) >= seen + STEPS_BETWEEN)
        before_act = len(self.commits())
        began = time.monotonic()
        act()

        def first_after() -> int | None:
            rows = self.commits()
            found = (i for i in range(before_act, len(rows)) if rows[i].world_size == world_size)
            return next(found, None)

        wait(lambda: first_after() is not None)
        index = first_after()
        assert index is not None
        last, first = self.commits()[index - 1 : index + 1]
        return {
            "gap_s": first.at - last.at,
            "from_act_s": first.at - began,
            "steps_redone": max(0, last.step + 1 - first.step),
            "steps_skipped": max(0, first.step - last.step - 1),
        }

    def end(self) -> None:
        self.store.set("stop", "")
        for process in self._processes.values():
            process.join(60)
            process.kill()


def wait(condition: Callable[[], bool], timeout_s: float = 300) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"nothing happened within {timeout_s:g} s")
        time.sleep(0.02)


def measure(folder: Path, cycles: int, model: str) -> dict[str, list[dict[str, float]]]:
    """All changes by kind."""
    changes: dict[str, list[dict[str, float]]] = {"shrink": [], "grow": [], "kill": []}
    members = Members(folder, model)
    try:
        for slot in range(MEMBERS):
            members.prepare(slot)
        Membership.found(members.store, range(MEMBERS))
        for slot in range(MEMBERS):
            members.join(slot)
        slot = MEMBERS
        for _ in range(cycles):
            for kind, act in (("shrink", members.leave), ("kill", members.kill)):
                members.prepare(slot)
                changes[kind].append(members.change(act, MEMBERS - 1))
                newcomer = slot
                changes["grow"].append(
                    members.change(lambda who=newcomer: members.join(who), MEMBERS)
                )
                slot += 1
        steps = members.commits()
        times = [
            b.at - a.at
            for a, b in itertools.pairwise(steps)
            if a.world_size == b.world_size == MEMBERS
        ]
        changes["step"] = [{"gap_s": statistics.median(times)}]
    finally:
        members.end()
    return changes


def summary(rows: list[Mapping[str, float]], key: str) -> dict[str, Any]:
    values = sorted(row[key] for row in rows)
    return {
        "median": round(statistics.median(values), 3),
        "min": round(values[0], 3),
        "max": round(values[-1], 3),
        "n": len(values),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cycles", type=int, default=8)
    parser.add_argument("--model", default="resnet20")
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    arguments = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory(prefix="in-place-gaps-") as folder:
        changes = measure(Path(folder), arguments.cycles, arguments.model)
    step_s = changes.pop("step")[0]["gap_s"]
    results = {
        kind: {
            **{key: summary(rows, key) for key in ("gap_s", "from_act_s")},
            "steps_redone": [int(row["steps_redone"]) for row in rows],
            "steps_skipped": sum(int(row["steps_skipped"]) for row in rows),
            "wanted_median_s": TARGETS[kind],
        }
        for kind, rows in changes.items()
    }
    for kind, row in results.items():
        measured = row["from_act_s" if kind == "kill" else "gap_s"]["median"]
        row["met"] = measured <= TARGETS[kind] and row["steps_skipped"] == 0
        print(kind, json.dumps(row))
    report = {
        "benchmark": "in_place_gaps",
        "what": "s between the last step of one world and the first of the next; kills from SIGKILL",
        "problem": f"{arguments.model}, {BATCH} x 3x32x32, K-FAC 5/10, gloo, one thread a member",
        "members": MEMBERS,
        "results": results,
        "median_step_s": round(step_s, 3),
        "machine": {
            "cores": os.cpu_count(),
            "load_average": [round(load[0], 2), round(os.getloadavg()[0], 2)],
        },
        "versions": {
            "python": platform.python_version(),
            "elastic_kfac": __version__,
            "torch": torch.__version__,
        },
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
