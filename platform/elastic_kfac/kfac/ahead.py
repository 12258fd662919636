"""Decompositions computed on another thread, or in other processes, before the step that they are due in.

The result is that of the step itself: what has been computed counts only if the layer still has the
factors (and, where it matters, the damping) that it was computed from; otherwise it is computed again.
So neither states nor other ranks need to know. Waiting is for a step's own decompositions, never for a
time. A pool is any `concurrent.futures.Executor`: processes of this host, or actors on spare nodes;
what it fails to compute is computed here. On a device only a pool is used, whose CPUs work while the
device trains. LAPACK runs without the interpreter's lock. Anil et al. (2020, Scalable Second Order
Optimization, section 4) overlap inverse roots with training in the same way, with results as they come.
"""

from __future__ import annotations

import time
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from elastic_kfac.curvature.layer import Layer, LayerState
from elastic_kfac.errors import NumericalError

Key = tuple[Any, ...]
Timed = tuple[dict[str, Tensor], float]
"""Parts of a decomposition, and how long they took, s."""


@dataclass
class Work:
    """Decompositions that were used, wherever they were computed."""

    seconds: float = 0.0
    """Of computing alone, on this rank."""
    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often each factor of each layer was decomposed for this rank."""
    elsewhere: int = 0
    """Decompositions of layers that a pool made."""


@dataclass(frozen=True)
class _Job:
    state: LayerState
    key: Key
    parts: Future[Timed]
    bytes: int


class Ahead:
    """Work under way, by layer name; one thread, in the order it was given.

    Args:
        needs_damping: Whether a decomposition depends on γ.
    """

    def __init__(self, *, needs_damping: bool) -> None:
        self._needs_damping = needs_damping
        self.pool: Executor | None = None
        """Where decompositions are computed; None is a thread of this process."""
        self.failures = 0
        """Of the pool."""
        self._jobs: dict[str, _Job] = {}
        self._thread: ThreadPoolExecutor | None = None
        self.work = Work()

    def begin(
        self, layer: Layer, state: LayerState, names: tuple[str, ...], damping: float
    ) -> None:
        """Begins a decomposition of the named factors that will be asked for in a later step."""
        key, threads = self._key(state, names, damping), torch.get_num_threads()
        parts: Future[Timed]
        if self.pool is not None and layer.decomposer is not None:
            last = state.decomposition if layer.continues else {}
            work = layer.decomposer, _arrays(state.floored), names, damping, _arrays(last), threads
            try:
                parts = self.pool.submit(decompose_elsewhere, *work)
            except Exception as error:
                self._failed(error)
                return
        elif layer.device.type != "cpu":
            return  # kernels would only queue up behind those of the step
        else:
            if self._thread is None:
                self._thread = ThreadPoolExecutor(1, "decomposition")
            parts = self._thread.submit(_decompose, layer, state, names, damping, threads)
        size = sum(map(prod, layer.decomposition_shapes.values())) * layer.dtype.itemsize
        self._jobs[layer.name] = _Job(state, key, parts, size)

    def decompose(
        self, layer: Layer, state: LayerState, names: tuple[str, ...], damping: float
    ) -> dict[str, Tensor]:
        """`Layer.decompose` of the floored factors, with what has been begun.

        Raises:
            NumericalError: As there.
        """
        job = self._jobs.pop(layer.name, None)
        if job is not None and job.key == self._key(state, names, damping):
            parts, seconds = self._result(job, layer, state, names, damping)
        else:
            parts, seconds = _timed(layer, state, names, damping)
        self.work.seconds += seconds
        self.work.done.update((layer.name, name) for name in names)
        return parts

    def _result(
        self, job: _Job, layer: Layer, state: LayerState, names: tuple[str, ...], damping: float
    ) -> Timed:
        try:
            parts, seconds = job.parts.result()
        except NumericalError:
            raise
        except Exception as error:
            if self.pool is None:
                raise
            self._failed(error)
            return _timed(layer, state, names, damping)
        if any(isinstance(part, Tensor) for part in parts.values()):
            return parts, seconds  # this process made it
        self.work.elsewhere += 1
        tensors = {name: torch.from_numpy(part) for name, part in parts.items()}
        return {name: tensor.to(layer.device) for name, tensor in tensors.items()}, seconds

    def _failed(self, error: Exception) -> None:
        """A process or its node is gone; the numbers are those of any other place."""
        self.failures += 1
        if self.failures == 1:
            text = f"a decomposition failed elsewhere and is computed here: {error!r}"
            warnings.warn(text, UserWarning, stacklevel=2)

    def clear(self) -> None:
        """Forgets what is under way."""
        for job in self._jobs.values():
            job.parts.cancel()
        self._jobs = {}

    def close(self) -> None:
        """Ends the thread."""
        self.clear()
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None

    @property
    def bytes(self) -> int:
        """Of the results that wait for their step."""
        return sum(job.bytes for job in self._jobs.values())

    def _key(self, state: LayerState, names: tuple[str, ...], damping: float) -> Key:
        tensors = (*state.factors.values(), *state.decomposition.values())
        known = [(id(tensor), tensor._version) for tensor in tensors]  # a job keeps them alive
        return names, state.floor, known, damping if self._needs_damping else None

    def __deepcopy__(self, memo: dict[int, Any]) -> Ahead:
        return Ahead(needs_damping=self._needs_damping)


@torch.no_grad()
def _decompose(
    layer: Layer, state: LayerState, names: tuple[str, ...], damping: float, threads: int
) -> Timed:
    if torch.get_num_threads() != threads:  # numbers may depend on it
        torch.set_num_threads(threads)
    return _timed(layer, state, names, damping)


@torch.no_grad()
def decompose_elsewhere(
    decompose: Callable[..., dict[str, Tensor]],
    factors: Mapping[str, Any],
    names: tuple[str, ...],
    damping: float,
    last: Mapping[str, Any],
    threads: int,
) -> tuple[dict[str, Any], float]:
    """What a pool runs: arrays in, arrays and seconds out."""
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)
    begin = time.perf_counter()
    # Copies: arrays that came from another process may be read-only.
    tensors = [{name: torch.tensor(array) for name, array in x.items()} for x in (factors, last)]
    parts = decompose(tensors[0], names, damping, tensors[1])
    return _arrays(parts), time.perf_counter() - begin


def _arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: tensor.detach().cpu().contiguous().numpy() for name, tensor in tensors.items()}


def _timed(layer: Layer, state: LayerState, names: tuple[str, ...], damping: float) -> Timed:
    begin = time.perf_counter()
    parts = layer.decompose(state.floored, names, damping, state.decomposition)
    return parts, time.perf_counter() - begin
