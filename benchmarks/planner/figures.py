"""What the planner predicts for the published setups, beside what was published.

    python benchmarks/planner/figures.py [--out FOLDER]

Modelled for V100s, four to a node, 100 Gbit/s between nodes; operations and bytes are counted on the
models themselves (random weights, one CPU pass), rates are shares of the data sheet. Nothing is fitted to
the published figures: they stand beside for the order and the shape.

- `memory_and_time`: memory and time of an iteration over `grad_worker_frac`, ResNet-50 on 64 GPUs (KAISA,
  Pauloski et al., SC'21); the largest batch in a fixed budget and the time to the target.
- `scaling`: time of an iteration on 1 to 1,024 GPUs, one owner per layer (Osawa et al., CVPR 2019), with
  the number of layers marked; where dividing decompositions pays and where it no longer helps.
- `phases`: one iteration by phase, MEM-OPT against COMM-OPT, ResNet-50, -101 and -152.
"""

from __future__ import annotations

import argparse
import json
import platform
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
import torchvision

from elastic_kfac import __version__
from elastic_kfac.config import parse_config
from elastic_kfac.data.columns import image_columns
from elastic_kfac.kfac.shapes import shapes
from elastic_kfac.placement.choice import choose_plan, cross_over
from elastic_kfac.placement.devices import DEVICES
from elastic_kfac.placement.plan import Plan
from elastic_kfac.placement.planner import make_plan
from elastic_kfac.placement.simulator import Calibration, Line, Workload, device_bytes, predict_step
from elastic_kfac.runs.feasibility import Sized
from elastic_kfac.runs.profile import estimate

mpl.use("Agg")
from matplotlib import pyplot as plt

NETWORK, INSIDE = Line(5e-6, 8.0 / 100e9), Line(3e-6, 8.0 / 1000e9)
PUBLISHED_MEMORY = {"SGD": (128, 123.0), "1/64": (80, 96.0), "1/2": (80, 83.0)}
"""Local batch and minutes, ResNet-50 on 64 V100 with one memory budget; SGD did not converge."""
EPOCHS = {"SGD": 90, "K-FAC": 55}
IMAGES = 1_281_167


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    fifty = _profile("resnet50")
    result = {
        "benchmark": "planner_figures",
        "basis": "estimated for V100 from data sheets; 4 GPUs a node, 100 Gbit/s and 5 µs between nodes",
        "memory_and_time": _memory_and_time(*fifty),
        "budget": _budget(*fifty),
        "scaling": _scaling(*fifty),
        "phases": [_phases(name) for name in ("resnet50", "resnet101", "resnet152")],
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "torchvision": torchvision.__version__,
            "elastic_kfac": __version__,
        },
    }
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "planner_figures.json").write_text(json.dumps(result, indent=1) + "\n")
    _draw(result, arguments.out / "planner_figures.png")


def _profile(name: str, factors: int = 10, inverses: int = 100) -> tuple[Workload, Calibration]:
    """A torchvision model with whole factors, as the publications have them."""
    config = parse_config(
        {
            "model": {"name": "resnet50"},
            "optimizer": {"lr": 0.1},
            "train": {"global_batch_size": 2048},
            "kfac": {
                "max_factor_dim": None,
                "factor_update_steps": factors,
                "inverse_update_steps": inverses,
                "skip_layers": ["bn", r"downsample\.1"],
            },
        }
    )
    model = getattr(torchvision.models, name)(weights=None)
    columns = image_columns((3, 224, 224), tuple(map(str, range(1000))))
    layers = tuple(shapes(model, config.kfac))
    sized = Sized(config, model, columns, (3, 224, 224), None, layers)
    profile = estimate(sized, DEVICES["v100"], NETWORK)
    return profile.workload, replace(profile.calibration, inside_node=INSIDE, ranks_per_node=4)


def _plan(workload: Workload, calibration: Calibration, ranks: int, columns: int) -> Plan:
    return make_plan(workload.layers, ranks, 1.0 / columns, costs=calibration.costs)


def _memory_and_time(workload: Workload, calibration: Calibration) -> list[dict[str, float]]:
    rows = []
    for workers in (1, 2, 4, 8, 16, 32, 64):
        plan = _plan(workload, calibration, 64, 64 // workers)
        step = predict_step(
            workload, calibration, plan, global_batch_size=64 * 32, micro_batch_size=32
        )
        rows.append(
            {
                "fraction": workers / 64,
                "step_ms": 1e3 * step.total,
                "kfac_ms": 1e3 * step.placed,
                "memory_gib": device_bytes(workload, plan, 32) / 2**30,
            }
        )
    return rows


def _budget(workload: Workload, calibration: Calibration) -> list[dict[str, Any]]:
    """The largest local batch in the budget in which SGD fits 128, and minutes to the target."""
    nothing = replace(workload, layers=(), factor_statistics=Line(0.0, 0.0), factor_update_s=0.0)
    nothing = replace(nothing, exchange_bytes=0.0, decomposing_bytes=0.0, index_bytes=0.0)
    passes = max(workload.step_bytes, key=lambda line: line.slope)
    nothing = replace(nothing, bound_s=0.0, packing_s=0.0, step_bytes=(passes,))
    budget = passes.at(128)
    rows: list[dict[str, Any]] = []
    for label, columns in (("SGD", 0), ("1/64", 64), ("1/2", 2), ("1", 1)):
        if columns:
            work, epochs = workload, EPOCHS["K-FAC"]
            choice = choose_plan(
                work,
                calibration,
                64,
                global_batch_size=64 * 4096,
                memory_budget_bytes=budget,
                num_columns=columns,
            )
            size = max(n for n in range(1, 129) if device_bytes(work, choice.plan, n) <= budget)
            plan = choice.plan
        else:
            work, epochs, size = nothing, EPOCHS["SGD"], 128
            plan = make_plan((), 64, 1.0)
        step = predict_step(
            work, calibration, plan, global_batch_size=64 * size, micro_batch_size=size
        )
        minutes = epochs * IMAGES / (64 * size) * step.total / 60
        published = PUBLISHED_MEMORY.get(label, (None, None))
        rows.append(
            {
                "method": label,
                "local_batch": size,
                "step_ms": 1e3 * step.total,
                "minutes": minutes,
                "published_local_batch": published[0],
                "published_minutes": published[1],
            }
        )
    return rows


def _scaling(workload: Workload, calibration: Calibration) -> dict[str, Any]:
    """Statistics and decompositions every step, 32 images a GPU, every layer with one owner."""
    work = replace(workload, factor_update_steps=1, inverse_update_steps=1)
    sizes = [1, 2, 4, 8, 16, 32, 54, 64, 107, 128, 256, 512, 1024]
    rows = []
    for ranks in sizes:
        step = predict_step(
            work,
            calibration,
            _plan(work, calibration, ranks, ranks),
            global_batch_size=32 * ranks,
            micro_batch_size=32,
        )
        rows.append(
            {
                "gpus": ranks,
                "step_ms": 1e3 * step.total,
                "decompositions_ms": 1e3 * step.decompositions,
            }
        )
    found = cross_over(work, calibration)
    return {
        "rows": rows,
        "layers": len(work.layers),
        "divide_from": found.divide_from,
        "flat_from": found.flat_from,
        "published": "time per iteration falls up to 107 GPUs, the number of layers",
    }


def _phases(name: str) -> dict[str, Any]:
    workload, calibration = _profile(name)
    rows = {}
    for label, columns in (("MEM-OPT", 64), ("COMM-OPT", 1)):
        plan = _plan(workload, calibration, 64, columns)
        step = predict_step(
            workload, calibration, plan, global_batch_size=64 * 32, micro_batch_size=32
        )
        rows[label] = {phase: 1e3 * seconds for phase, seconds in step.parts.items()}
    return {"model": name, "layers": len(workload.layers), "ms": rows}


def _draw(result: dict[str, Any], path: Path) -> None:
    figure, ((left, right), (low, last)) = plt.subplots(2, 2, figsize=(11, 8))
    rows = result["memory_and_time"]
    fractions = [row["fraction"] for row in rows]
    left.plot(fractions, [row["memory_gib"] for row in rows], "o-", color="tab:blue")
    left.set(xlabel="share of gradient workers", ylabel="memory per GPU, GiB")
    left.set_title("ResNet-50 on 64 GPUs, 32 images each")
    other = left.twinx()
    other.plot(fractions, [row["kfac_ms"] for row in rows], "s--", color="tab:red")
    other.set_ylabel("K-FAC's placed work per iteration, ms")
    names = [row["method"] for row in result["budget"]]
    places = range(len(names))
    right.bar(
        [p - 0.2 for p in places], [r["minutes"] for r in result["budget"]], 0.4, label="model"
    )
    right.bar(
        [p + 0.2 for p in places],
        [r["published_minutes"] or 0.0 for r in result["budget"]],
        0.4,
        label="published",
    )
    labels = [
        f"{n}\nbatch {r['local_batch']}" for n, r in zip(names, result["budget"], strict=True)
    ]
    right.set_xticks(list(places), labels)
    right.set(ylabel="minutes to the target", title="One memory budget")
    right.legend()
    scaling = result["scaling"]
    gpus = [row["gpus"] for row in scaling["rows"]]
    low.loglog(gpus, [row["step_ms"] for row in scaling["rows"]], "o-", label="iteration")
    low.loglog(
        gpus, [row["decompositions_ms"] for row in scaling["rows"]], "s--", label="decompositions"
    )
    low.axvline(scaling["layers"], color="grey", linestyle=":")
    low.text(scaling["layers"] * 1.05, low.get_ylim()[0] * 1.2, f"{scaling['layers']} layers")
    low.set(xlabel="GPUs", ylabel="ms", title="Decompositions every step, one owner per layer")
    low.legend()
    bottoms = [0.0] * 6
    bars = [
        (f"{one['model'].removeprefix('resnet')}\n{label}", one["ms"][label])
        for one in result["phases"]
        for label in ("MEM-OPT", "COMM-OPT")
    ]
    for place, phase in enumerate(bars[0][1]):
        heights = [values[phase] for _, values in bars]
        if max(heights) > 0:
            color = mpl.colormaps["tab20"](place)
            last.bar([name for name, _ in bars], heights, bottom=bottoms, label=phase, color=color)
            bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    last.set(ylabel="ms per iteration", title="ResNet-50, -101, -152 on 64 GPUs")
    last.tick_params(axis="x", labelsize=7)
    last.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
