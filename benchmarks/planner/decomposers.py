"""What decompositions off the critical path gain: in the step, or on spare ranks.

    python benchmarks/planner/decomposers.py [--out FILE] [--widths 256 512 1024] [--steps 100]

An MLP 784-W-W-W-10, batch 128, statistics every 5 and decompositions every 50 steps, one thread a rank.
The critical path of a step is the CPU time of the thread that trains, and what it waits for spare ranks,
so that neither other processes nor too few cores count. Spare ranks are emulated: a decomposition takes
the CPU time that it needs here, begins when it was given and its rank is free, and is waited for by the
step that uses it if it is not ready. Packing arguments and unpacking results is time of the training
thread. The ways take turns, step by step; parameters are compared bit for bit.
"""

from __future__ import annotations

import argparse
import json
import pickle
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from elastic_kfac import KFAC, __version__
from elastic_kfac.kfac.calibration import host_kind

WARM_UP, INTERVALS = 50, (5, 50)
TOGETHER, APART = "in the step, all layers at once", "in the step, layers apart"


class SpareRanks(Executor):
    """So many ranks that only decompose, on a clock of their own."""

    def __init__(self, count: int) -> None:
        self._free = [0.0] * count
        """When each rank has done what it was given."""
        self._not_ours = self.waited = 0.0
        self._paused = time.thread_time()

    def now(self) -> float:
        """The training thread's time, with waiting and without what the spare ranks computed."""
        return time.thread_time() - self._not_ours + self.waited

    def pause(self) -> None:
        """The thread does something else from here on."""
        self._paused = time.thread_time()

    def resume(self) -> None:
        """The thread is back."""
        self._not_ours += time.thread_time() - self._paused

    def submit(self, call: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        packed = pickle.dumps((args, kwargs))
        given, begin = self.now(), time.thread_time()
        own_args, own_kwargs = pickle.loads(packed)
        result = pickle.dumps(call(*own_args, **own_kwargs))
        taken = time.thread_time() - begin
        self._not_ours += taken
        rank = min(range(len(self._free)), key=self._free.__getitem__)
        self._free[rank] = ready = max(self._free[rank], given) + taken
        return _Late(self, result, ready)

    def wait_until(self, ready: float) -> None:
        """The training thread has nothing to do before."""
        self.waited += max(0.0, ready - self.now())


class _Late(Future[Any]):
    def __init__(self, ranks: SpareRanks, packed: bytes, ready: float) -> None:
        super().__init__()
        self._ranks, self._packed, self._ready = ranks, packed, ready

    def result(self, timeout: float | None = None) -> Any:
        self._ranks.wait_until(self._ready)
        return pickle.loads(self._packed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--steps", type=int, default=100)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    equal = True
    for width in arguments.widths:
        trainings = [Training(way, width) for way in (TOGETHER, APART, 1, 4)]
        for _ in range(WARM_UP + arguments.steps):
            for training in trainings:
                training.step()
        for training in trainings:
            rows.append({"width": width, "way": training.label, **training.found()})
            print(json.dumps(rows[-1]), flush=True)
        first, *others = [training.parameters for training in trainings[1:]]
        equal &= all(
            torch.equal(one, other) for end in others for one, other in zip(first, end, strict=True)
        )
    result = {
        "benchmark": "planner_decomposers",
        "what": f"MLP, intervals {INTERVALS}, {arguments.steps} steps, emulated spare ranks",
        "rows": rows,
        "equal_bits": equal,
        "machine": host_kind(),
        "elastic_kfac": __version__,
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


class Training:
    """An MLP, and where its layers are decomposed: in the step, or on so many spare ranks."""

    def __init__(self, way: str | int, width: int) -> None:
        self.label = way if isinstance(way, str) else f"spare ranks: {way}"
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for a, b in pairwise([784, width, width, width, 10]):
            layers += [nn.Linear(a, b), nn.ReLU()]
        self._model = nn.Sequential(*layers[:-1])
        self.parameters = list(self._model.parameters())
        self._optimizer = torch.optim.SGD(self.parameters, lr=0.05, momentum=0.9)
        self._kfac = KFAC(
            self._model,
            lr=self._optimizer,
            factor_update_steps=INTERVALS[0],
            inverse_update_steps=INTERVALS[1],
            stagger=way != TOGETHER,
        )
        self._ranks = SpareRanks(way if isinstance(way, int) else 1)
        if isinstance(way, int):
            self._kfac.decompose_in(self._ranks)
        else:  # no thread either
            self._kfac.refresh.ahead.begin = lambda *_: None  # type: ignore[method-assign]
        self._generator = torch.Generator().manual_seed(1)
        self._seconds: list[float] = []
        self._waited: list[float] = []

    def step(self) -> None:
        """One of training, and what it took."""
        x = torch.randn(128, 784, generator=self._generator)
        y = torch.randint(10, (128,), generator=self._generator)
        # While others took their turns nobody worked.
        ranks = self._ranks
        ranks.resume()
        begin, waited = ranks.now(), ranks.waited
        self._optimizer.zero_grad()
        F.cross_entropy(self._model(x), y).backward()
        self._kfac.step()
        self._optimizer.step()
        self._seconds.append(ranks.now() - begin)
        self._waited.append(ranks.waited - waited)
        ranks.pause()

    def found(self) -> dict[str, float]:
        """Milliseconds of the steps after the warm-up."""
        seconds = self._seconds[WARM_UP:]
        self._kfac.close()
        found = {
            "mean_ms": statistics.mean(seconds),
            "median_ms": statistics.median(seconds),
            "longest_ms": max(seconds),
            "waited_ms": statistics.mean(self._waited[WARM_UP:]),
        }
        return {name: round(1e3 * value, 3) for name, value in found.items()}


if __name__ == "__main__":
    main()
