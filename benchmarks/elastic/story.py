"""One training left in peace, resized and killed; here, and under plain Ray Train.

Both sides train the same network on the same digits with the same optimizer, K-FAC before SGD, for as
many epochs: on two nodes of this machine with one worker each, waiting 0.1 s in every step (see
`paced_ranks.py`). Faults come at the same seconds after the first step:

    resized   a node is told that it goes, and is gone NOTICE_S later at the latest
    killed    a node is lost without a word

and in both another one comes BACK_S later. Here the job is `train` in the reproducible mode. Plain Ray
Train is an elastic `TorchTrainer` as its guide shows it: `prepare_model`, `prepare_data_loader`, a
checkpoint at the end of every epoch, `FailureConfig(max_failures=-1)`, Ray's default settings. Its loop
has K-FAC's own three lines.

    python benchmarks/elastic/story.py [--epochs 8] [--only quiet killed]
                                       [--out benchmarks/results/story.json]

writes the curves, and the figure as `docs/story.png` (with `--out`, beside that file); `--draw` draws the
figure of a result again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import os
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import paced_ranks
import ray
import torch
from ray.train import Checkpoint
from ray.train.torch import prepare_data_loader, prepare_model

from elastic_kfac import KFAC
from elastic_kfac.cli.entry import main as elastic_kfac
from elastic_kfac.cluster.ray.connection import quiet_driver
from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.cluster.run.coordinator import RunView
from elastic_kfac.cluster.run.progress import Display
from elastic_kfac.cluster.run.result import CHANGES
from elastic_kfac.cluster.run.trainer import train
from elastic_kfac.config import parse_config
from elastic_kfac.data.sources.generated import digit_images
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.zoo.convolutional import small_cnn

HERE = Path(__file__).parent
DOCS = HERE.parents[1] / "docs"
sys.path.insert(0, str(HERE.parent))

BATCH = 32
LR, MOMENTUM, DAMPING = 0.02, 0.9, 1e-2
FAULT_S = 12.0
"""Seconds after the first step."""
NOTICE_S = 20.0
BACK_S = 10.0
"""From the moment that the node is gone."""
FLOOR = 1e-3
"""Losses below this are drawn here."""
STANDSTILL_S = 5.0
COURSES = ("quiet", "resized", "killed")
Point = tuple[float, int, float]
"""Seconds since the first step, step, training loss."""


class Faults:
    """What happens to the second node, in a thread of its own once the first step is there."""

    def __init__(self, cluster: LocalCluster, course: str, has_begun: Callable[[], bool]) -> None:
        self._cluster, self._course, self._has_begun = cluster, course, has_begun
        self.has_left: Callable[[], bool] = lambda: False
        """Whether the run steps without the node that was told to go."""
        self.happened: dict[str, float] = {}
        """Unix time of each."""
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._strike, daemon=True)

    def __enter__(self) -> Faults:
        if self._course != "quiet":
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()

    def _strike(self) -> None:
        while not self._has_begun():
            if self._over.wait(0.05):
                return
        if self._over.wait(FAULT_S):
            return
        node = self._cluster.nodes[-1]
        if self._course == "resized":
            self.happened["told"] = time.time()
            _drain(self._cluster, node)
            deadline = time.monotonic() + NOTICE_S
            while not self.has_left() and time.monotonic() < deadline and not self._over.wait(0.1):
                pass
        self.happened["gone"] = time.time()
        self._cluster.remove_node(node)
        if not self._over.wait(BACK_S):
            self.happened["back"] = time.time()
            # Ray sets a handler for a new node, which only the main thread may.
            with patch.object(signal, "signal"):
                self._cluster.add_node()


def _drain(cluster: LocalCluster, node: int) -> None:
    # The fault of the tests.
    sys.path.insert(0, str(HERE.parents[1] / "tests"))
    from support.preemption import drain_node

    drain_node(cluster, node, deadline_s=NOTICE_S)


class Watch(Display):
    """Tells the faults where the run is."""

    def __init__(self) -> None:
        self.view: RunView | None = None

    def update(self, view: RunView) -> None:
        self.view = view

    @property
    def has_begun(self) -> bool:
        return self.view is not None and int(self.view.progress.get("step", 0)) >= 1


def ours(folder: Path, course: str, epochs: int) -> dict[str, Any]:
    """A run of `train`."""
    config = parse_config(
        {
            "data": {"shards": str(folder.parent / "digits")},
            "train": {"epochs": epochs, "global_batch_size": BATCH, "eval_every_epochs": epochs},
            "optimizer": {"lr": LR, "momentum": MOMENTUM},
            "kfac": {"damping": DAMPING},
            "elastic": {"max_workers": 2, "snapshot_interval_s": 0.5, "reproducible": True},
        }
    )
    watch = Watch()
    with quiet_driver(), LocalCluster(2) as cluster:
        cluster.connect()
        leaver = cluster.node_id(cluster.nodes[-1])
        with Faults(cluster, course, lambda: watch.has_begun) as faults:
            faults.has_left = lambda: (
                watch.view is not None
                and watch.view.state == "running"
                and leaver not in set(watch.view.rank_nodes.values())
            )
            result = train(
                config,
                name="run",
                storage=str(folder),
                cluster=cluster,
                progress=watch,
                rank_function="paced_ranks:run",
                member_function="paced_ranks:member",
            )
    run = RunFolder(str(folder / "run"))
    events = run.events()
    first = next(row["time"] for row in events if row["kind"] == "start")
    rows = [row for row in run.metrics() if "loss" in row]
    moments = [(first + row["wall_time_s"], int(row["step"]), float(row["loss"])) for row in rows]
    redone = sum(int(row["steps_redone"]) for row in events if row["kind"] in CHANGES)
    found = summary(moments, faults, redone)
    return {**found, "final_state_sha256": result.values["final_state_sha256"]}


def plain_train_function(options: Mapping[str, Any]) -> None:
    """A person's training function, as Ray's guide has it, with K-FAC's three lines."""
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    pictures, labels = digit_images("train")
    images = torch.from_numpy(pictures).unsqueeze(1).float() / 255
    images = (images - images.mean()) / images.std()
    data = torch.utils.data.TensorDataset(images, torch.from_numpy(labels))
    loader = prepare_data_loader(
        torch.utils.data.DataLoader(data, BATCH // world_size, shuffle=True, drop_last=True)
    )
    model = prepare_model(small_cnn(10, (1, 8, 8)))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    kfac = KFAC(model, lr=optimizer, damping=DAMPING)
    module = getattr(model, "module", model)
    epoch = step = 0
    found = ray.train.get_checkpoint()
    if found is not None:
        with found.as_directory() as folder:
            state = torch.load(f"{folder}/state.pt", weights_only=False)
        module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        kfac.load_state_dict(state["kfac"])
        epoch, step = state["epoch"], state["step"]
    for now in range(epoch, options["epochs"]):
        if world_size > 1:
            loader.sampler.set_epoch(now)
        for batch, targets in loader:
            loss = torch.nn.functional.cross_entropy(model(batch), targets)
            optimizer.zero_grad()
            loss.backward()
            kfac.step()
            optimizer.step()
            step += 1
            mean = loss.detach().clone()
            if world_size > 1:
                torch.distributed.all_reduce(mean)
            if rank == 0:
                with Path(options["steps"]).open("a") as stream:
                    stream.write(f"{time.time()} {step} {mean.item() / world_size}\n")
            time.sleep(paced_ranks.STEP_S)
        kfac_state = kfac.state_dict()
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if rank == 0:
                state = {
                    "model": module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "kfac": kfac_state,
                    "epoch": now + 1,
                    "step": step,
                }
                torch.save(state, f"{folder}/state.pt")
                checkpoint = Checkpoint.from_directory(folder)
            ray.train.report({"epoch": now}, checkpoint=checkpoint)


def plain(folder: Path, course: str, epochs: int) -> dict[str, Any]:
    """The same under Ray Train as shipped."""
    from plain_ray_train import elastic_trainer, two_nodes

    steps = folder / "steps"
    steps.touch()
    options = {"steps": str(steps), "epochs": epochs}
    with two_nodes() as cluster:
        trainer = elastic_trainer(plain_train_function, options, folder)
        with Faults(cluster, course, lambda: steps.stat().st_size > 0) as faults:
            trainer.fit()
    rows = [line.split() for line in steps.read_text().splitlines()]
    moments = [(float(r[0]), int(r[1]), float(r[2])) for r in rows]
    redone = len(moments) - len({step for _, step, _ in moments})
    return summary(moments, faults, redone)


def summary(moments: list[Point], faults: Faults, redone: int) -> dict[str, Any]:
    """What is kept of a run: its curve, each point a mean over five steps, and what it cost."""
    begin = moments[0][0]
    gaps = [after[0] - before[0] for before, after in itertools.pairwise(moments)]
    parts = [moments[n : n + 5] for n in range(0, len(moments), 5)]
    return {
        "seconds": round(moments[-1][0] - begin, 1),
        "longest_gap_s": round(max(gaps, default=0.0), 1),
        "steps": moments[-1][1],
        "steps_redone": redone,
        "last_loss": round(statistics.fmean(m[2] for m in moments[-20:]), 5),
        "happened_s": {what: round(at - begin, 1) for what, at in faults.happened.items()},
        "curve": [
            [round(p[-1][0] - begin, 1), p[-1][1], round(statistics.fmean(m[2] for m in p), 4)]
            for p in parts
        ],
    }


def draw(results: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Loss over seconds (above) and over steps (below), here and under plain Ray Train.

    A dotted line is a standstill; losses below `FLOOR` are drawn there.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"ours": "elastic-kfac", "plain": "plain Ray Train, the same model and K-FAC"}
    colors = {"quiet": "#444444", "resized": "#1f77b4", "killed": "#d62728"}
    widths = {"quiet": 3.0, "resized": 1.8, "killed": 1.2}
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 5.6), sharey=True, layout="constrained")
    for column, (side, title) in enumerate(titles.items()):
        for row, axis in enumerate(axes[:, column]):
            for course, run in results[side].items():
                points = [(point[row], max(point[2], FLOOR)) for point in run["curve"]]
                label = f"{course}: {run['seconds']:.0f} s, {run['steps_redone']} steps redone"
                style = {"color": colors[course], "lw": widths[course]}
                breaks = [
                    at
                    for at, (last, point) in enumerate(itertools.pairwise(run["curve"]), 1)
                    if point[0] - last[0] > STANDSTILL_S
                ]
                for begin, end in itertools.pairwise([0, *breaks, len(points)]):
                    axis.plot(*zip(*points[begin:end], strict=True), **style, label=label)
                    label = ""
                for at in breaks:  # no step for so long
                    stretch = points[at - 1 : at + 1]
                    axis.plot(*zip(*stretch, strict=True), color=colors[course], lw=0.8, ls=":")
            axis.set_yscale("log")
            axis.set_ylim(0.7 * FLOOR, 6)
            axis.set_xlabel(("seconds since the first step", "step")[row])
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0, column].set_title(title, fontsize=11)
        axes[0, column].legend(frameon=False, fontsize=8, loc="upper right")
        axes[0, column].axvline(FAULT_S, color="#999999", lw=0.8, ls=":")
        axes[0, column].set_xlim(
            0, 1.03 * max(r["seconds"] for s in results.values() for r in s.values())
        )
        axes[0, 0].set_ylabel("training loss")
        axes[1, 0].set_ylabel("training loss")
    figure.savefig(path, dpi=110)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--only", nargs="+", choices=COURSES, default=COURSES)
    default = HERE.parent / "results" / "story.json"
    parser.add_argument("--out", type=Path, default=default)
    parser.add_argument(
        "--draw", action="store_true", help="only draw the figure of a result again"
    )
    arguments = parser.parse_args()
    # Where README and the pages show it.
    figure = DOCS / "story.png" if arguments.out == default else arguments.out.with_suffix(".png")
    if arguments.draw:
        draw(json.loads(arguments.out.read_text())["results"], figure)
        return 0
    from machine import facts

    logging.disable(logging.INFO)
    load = [os.getloadavg()[0]]
    results: dict[str, dict[str, Any]] = {"ours": {}, "plain": {}}
    # Workers import this module and `paced_ranks`.
    paths = os.pathsep.join(p for p in (os.environ.get("PYTHONPATH"), str(HERE)) if p)
    with (
        tempfile.TemporaryDirectory(prefix="ek-story-") as name,
        patch.dict(os.environ, {"PYTHONPATH": paths}),
    ):
        elastic_kfac(["shards", "make", "--source", "digits", "--out", f"{name}/digits"])
        for course in arguments.only:
            for side, run in (("ours", ours), ("plain", plain)):
                folder = Path(name) / f"{side}-{course}"
                folder.mkdir()
                found = results[side][course] = run(folder, course, arguments.epochs)
                load.append(os.getloadavg()[0])
                shown = {key: value for key, value in found.items() if key != "curve"}
                print(side, course, json.dumps(shown), flush=True)
    hashes = {run["final_state_sha256"] for run in results["ours"].values()}
    report = {
        "what": "training loss in peace, resized and killed; beside plain Ray Train",
        "epochs": arguments.epochs,
        "fault_s": FAULT_S,
        "notice_s": NOTICE_S,
        "back_s": BACK_S,
        "n": 1,
        "final_states_are_equal_bits": len(hashes) == 1,
        **facts(),
        "ray": ray.__version__,
        "load": [round(x, 1) for x in load],
        "results": results,
    }
    text = json.dumps(report, indent=1)
    # A point of a curve takes a line, not a line per number.
    text = re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text)
    arguments.out.write_text(text + "\n")
    draw(results, figure)
    return 0 if len(hashes) == 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
