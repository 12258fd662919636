"""K-FAC on one GPU, in one call without Ray: is it right, what does it cost, what does it hold?

    python benchmarks/gpu/run.py --out benchmarks/results/gpu.json  # at most 8 minutes on one GPU
    python benchmarks/gpu/run.py --tiny                             # the same code on a CPU, in seconds

Sections, each in the result under its name; one that fails is there with its error, and the exit code
is 1:

- `correctness`: preconditioned gradients in float32 on the device against float64 on the CPU.
- `synchronisation`: calls of a plain step and of a factor step that make the host wait for the device.
- `eigh`: decompositions one by one, batched, and on the CPU with both copies, ms per matrix.
- `steps`: ms per step by device events (wall clock on a CPU): a plain step, one with statistics, one
  with decompositions, and their mean at intervals (10, 100), beside the methods' own optimizers.
- `memory`: peak bytes over those of the optimizer alone, beside `KFAC.memory_usage()`.
- `resume`: whether a step from `state_dict()` has the bits of the step it replaces.
- `process_group`: seconds to abort and re-create the group of NCCL (gloo on a CPU: to destroy it) by the
  product's own functions, and whether K-FAC goes on in it with the bits of a restored copy.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from models import Workload, workloads
from torch import nn

from elastic_kfac import KFAC, __version__
from elastic_kfac.communication.abort import let_processes_survive, needs_abort
from elastic_kfac.training.membership import leave

INTERVALS = (10, 100)
Result = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on any device")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type != "cuda" and not arguments.tiny:
        print("no GPU here: --tiny runs the same code at toy sizes", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    loads = workloads(device, tiny=arguments.tiny)
    sections: dict[str, Callable[[], Any]] = {
        "correctness": lambda: correctness(device),
        "synchronisation": lambda: synchronisation(loads),
        "eigh": lambda: eigh(device, tiny=arguments.tiny),
        "steps": lambda: [steps(load, tiny=arguments.tiny) for load in loads],
        "memory": lambda: [memory(load) for load in loads],
        "resume": lambda: resume(loads[0]),
        "process_group": lambda: process_group(device),
    }
    result: Result = {"benchmark": "gpu", **_machine(device), "tiny": arguments.tiny}
    failed = []
    for name, run in sections.items():
        begin = time.perf_counter()
        try:
            result[name] = run()
        except Exception as error:
            traceback.print_exc()
            result[name] = {"error": f"{type(error).__name__}: {error}"}
            failed.append(name)
        seconds = time.perf_counter() - begin
        print(f"{name} ({seconds:.1f} s): {json.dumps(result[name])}", flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


def correctness(device: torch.device) -> list[Result]:
    """Largest error over the layers, relative to the layer's norm, after three steps at (1, 1)."""
    rows = []
    for method in ("eigen", "inverse"):
        grads = [
            _gradients(method, d, t) for d, t in ((device, torch.float32), ("cpu", torch.float64))
        ]
        errors = [
            float((mine.cpu().double() - right).norm() / right.norm())
            for mine, right in zip(*grads, strict=True)
        ]
        rows.append({"method": method, "largest_relative_error": max(errors)})
    return rows


def _gradients(method: str, device: Any, dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 64, 32),
        nn.LayerNorm(32),
        nn.Linear(32, 10),
    )
    batches = [(torch.randn(64, 3, 8, 8), torch.randint(10, (64,))) for _ in range(3)]
    model = model.to(device, dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    kfac = KFAC(model, lr=optimizer, method=method, damping=0.1, inverse_update_steps=1)
    for x, y in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(x.to(device, dtype)), y.to(device)).backward()
        kfac.step()
        optimizer.step()
    return [p.grad.detach() for p in model.parameters()]


def synchronisation(loads: list[Workload]) -> list[Result]:
    """Warnings of torch's synchronisation debug mode; None where the device has no such mode."""
    rows = []
    for load in loads:
        trainer = Trainer(load, "kfac")
        trainer.steps(INTERVALS[0] + 1)
        row: Result = {"model": load.name, "plain": None, "factor": None}
        if load.inputs.is_cuda:
            trainer.steps(INTERVALS[0] - 2)
            for kind in ("plain", "factor"):
                trainer.loss().backward()
                torch.cuda.synchronize()
                with warnings.catch_warnings(record=True) as caught:
                    warnings.simplefilter("always")
                    torch.cuda.set_sync_debug_mode("warn")
                    try:
                        trainer.preconditioner.step()
                    finally:
                        torch.cuda.set_sync_debug_mode("default")
                row[kind] = sum("synchroniz" in str(w.message) for w in caught)
                trainer.optimizers[0].zero_grad()
        rows.append(row)
    return rows


def eigh(device: torch.device, *, tiny: bool) -> list[Result]:
    """Symmetric matrices with a decaying spectrum, as factors have."""
    rows = []
    for size in (16, 32) if tiny else (64, 128, 256, 512, 1024, 2048):
        count = 4 if size <= 512 else 2
        root = torch.randn(count, size, size, device=device)
        matrices = root @ (root.mT * torch.logspace(0, -6, size, device=device)) / size
        matrices = (matrices + matrices.mT) / 2

        def looped(matrices: torch.Tensor = matrices) -> None:
            for matrix in matrices:
                torch.linalg.eigh(matrix)

        def on_cpu(matrices: torch.Tensor = matrices) -> None:
            for matrix in matrices.cpu():
                for part in torch.linalg.eigh(matrix):
                    part.to(device)

        variants = {
            "looped_ms": looped,
            "batched_ms": lambda matrices=matrices: torch.linalg.eigh(matrices),
            "cpu_ms": on_cpu,
        }
        row: Result = {"size": size, "count": count}
        for name, run in variants.items():
            run()
            row[name] = round(min(_timed(run, device) for _ in range(3)) / count, 3)
        rows.append(row)
    return rows


class Trainer:
    """A workload with one method: `sgd`, `adamw`, `muon`, or `kfac` before SGD."""

    def __init__(self, load: Workload, method: str) -> None:
        torch.manual_seed(0)
        self.workload, self.device = load, load.inputs.device
        self.model = load.build().to(self.device)
        self.preconditioner: KFAC | None = None
        parameters = list(self.model.parameters())
        if method == "adamw":
            self.optimizers = [torch.optim.AdamW(parameters, lr=1e-4)]
        elif method == "muon":
            inner = [p for n, p in self.model.named_parameters() if p.dim() == 2 and "blocks" in n]
            ids = set(map(id, inner))
            others = [p for p in parameters if id(p) not in ids]
            self.optimizers = [torch.optim.Muon(inner, lr=1e-3), torch.optim.AdamW(others, lr=1e-4)]
        else:
            self.optimizers = [torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)]
        if method == "kfac":
            self.preconditioner = KFAC(
                self.model,
                lr=self.optimizers[0],
                factor_update_steps=INTERVALS[0],
                inverse_update_steps=INTERVALS[1],
                loss_reduction=load.loss_reduction,
                skip_layers=load.skip_layers,
            )

    def loss(self) -> torch.Tensor:
        return self.workload.loss(self.model)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.loss().backward()
        if self.preconditioner is not None:
            self.preconditioner.step()
        for optimizer in self.optimizers:
            optimizer.step()

    def steps(self, count: int) -> None:
        for _ in range(count):
            self.step()


def steps(load: Workload, *, tiny: bool) -> Result:
    """Medians; the methods take turns, so that clocks that change hit them alike."""
    own = "sgd" if load.name == "resnet50" else "adamw"
    methods = [own, "kfac"] + (["muon"] if load.name == "gpt" else [])
    trainers = {name: Trainer(load, name) for name in methods}
    kfac = trainers["kfac"]
    decomposition = [_timed(kfac.step, kfac.device)]  # the first step; warms up as well
    for trainer in trainers.values():
        trainer.steps(3)
    times: dict[str, list[float]] = {name: [] for name in [*methods, "factor"]}
    for _ in range(INTERVALS[0] * (1 if tiny else 3)):
        for name, trainer in trainers.items():
            assert kfac.preconditioner is not None
            due = name == "kfac" and kfac.preconditioner.factors_due()
            times["factor" if due else name].append(_timed(trainer.step, trainer.device))
    while kfac.preconditioner.steps % INTERVALS[1]:
        kfac.step()
    decomposition.append(_timed(kfac.step, kfac.device))
    median = {name: statistics.median(values) for name, values in times.items()}
    plain, factor = INTERVALS[1] - INTERVALS[1] // INTERVALS[0], INTERVALS[1] // INTERVALS[0] - 1
    mean = (plain * median["kfac"] + factor * median["factor"] + decomposition[-1]) / INTERVALS[1]
    row: Result = {
        "model": load.name,
        "parameters": sum(p.numel() for p in kfac.model.parameters()),
        "intervals": INTERVALS,
        **{f"{name}_ms": round(value, 3) for name, value in median.items()},
        "first_decomposition_ms": round(decomposition[0], 3),
        "decomposition_ms": round(decomposition[-1], 3),
        f"plain_over_{own}": round(median["kfac"] / median[own], 4),
        f"mean_over_{own}": round(mean / median[own], 4),
        "n": {name: len(values) for name, values in times.items()},
    }
    if "muon" in median:
        row["muon_over_adamw"] = round(median["muon"] / median["adamw"], 4)
    return row


def memory(load: Workload) -> Result:
    """Of one method at a time, three steps each, decompositions included."""
    peaks: dict[str, int | None] = {}
    predicted: dict[str, int] = {}
    for method in ("sgd", "kfac"):
        trainer = Trainer(load, method)
        if load.inputs.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        trainer.steps(3)
        peaks[method] = torch.cuda.max_memory_allocated() if load.inputs.is_cuda else None
        if trainer.preconditioner is not None:
            predicted = trainer.preconditioner.memory_usage()
        del trainer
        if load.inputs.is_cuda:
            torch.cuda.empty_cache()
    row: Result = {"model": load.name, "peak_bytes": peaks, "memory_usage": predicted}
    if peaks["kfac"] is not None and peaks["sgd"] is not None:
        row["extra_bytes"] = peaks["kfac"] - peaks["sgd"]
    return row


def resume(load: Workload) -> Result:
    """Two copies of model, optimizer and K-FAC; one of them from the other one's state."""
    trainer = Trainer(load, "kfac")
    trainer.steps(INTERVALS[0] + 2)
    assert trainer.preconditioner is not None
    return {
        "bits_are_equal": _steps_like_a_copy(trainer, load),
        "step": trainer.preconditioner.steps,
    }


def process_group(device: torch.device) -> Result:
    """A group of one: what a survivor pays to end its communicator as after a loss and to make a new one,
    and whether K-FAC, resized in place, goes on there with the bits of a copy restored from its state."""
    backend = "nccl" if device.type == "cuda" else "gloo"
    aborts = needs_abort(backend)
    if aborts:
        let_processes_survive()
    load = workloads(device, tiny=True)[0]
    with _group(backend, 0):
        trainer = Trainer(load, "kfac")
        trainer.steps(3)
        assert trainer.preconditioner is not None
        trainer.preconditioner.leave()
    rows = []
    for number in (1, 2, 3):
        begin = time.perf_counter()
        with _group(backend, number):
            trainer.preconditioner.resize(dist.group.WORLD)
            dist.all_reduce(torch.ones(1, device=device))
            _wait(device)
            resized = time.perf_counter()
            equal = _steps_like_a_copy(trainer, load)
            trainer.preconditioner.leave()
            left = time.perf_counter()
            leave(aborts=aborts)
            rows.append(
                {
                    "seconds_until_resized": round(resized - begin, 4),
                    "seconds_to_end": round(time.perf_counter() - left, 4),
                    "bits_are_equal": equal,
                }
            )
    return {
        "backend": backend,
        "aborts": aborts,
        "rounds": rows,
        "steps": trainer.preconditioner.steps,
    }


def _steps_like_a_copy(trainer: Trainer, load: Workload) -> bool:
    """Takes two steps; whether the first has the bits of one restored from the state before it."""
    twin = Trainer(load, "kfac")
    assert trainer.preconditioner is not None and twin.preconditioner is not None
    twin.model.load_state_dict(copy.deepcopy(trainer.model.state_dict()))
    twin.optimizers[0].load_state_dict(copy.deepcopy(trainer.optimizers[0].state_dict()))
    twin.preconditioner.load_state_dict(trainer.preconditioner.state_dict())
    # Kernels that add atomically may differ between two runs of the same backward pass.
    trainer.loss().backward()
    for mine, copied in zip(trainer.model.parameters(), twin.model.parameters(), strict=True):
        copied.grad = None if mine.grad is None else mine.grad.clone()
    trainer.preconditioner.step()
    twin.preconditioner.step()
    pairs = list(zip(trainer.model.parameters(), twin.model.parameters(), strict=True))
    equal = all(torch.equal(a.grad, b.grad) for a, b in pairs if a.grad is not None)
    trainer.optimizers[0].step()
    trainer.optimizers[0].zero_grad()
    trainer.steps(1)
    return equal


@contextmanager
def _group(backend: str, number: int) -> Iterator[None]:
    store = dist.HashStore()
    dist.init_process_group(
        backend, store=dist.PrefixStore(str(number), store), rank=0, world_size=1
    )
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _timed(run: Callable[[], object], device: torch.device) -> float:
    """ms on the device's clock, or on the wall."""
    if device.type != "cuda":
        begin = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - begin)
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    events[0].record()
    run()
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1])


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _machine(device: torch.device) -> Result:
    return {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "elastic_kfac": __version__,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
