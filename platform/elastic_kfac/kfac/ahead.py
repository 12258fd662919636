"""Decompositions computed on another thread before the step that they are due in.

The result is that of the step itself: what has been computed counts only if the layer still has the
factors (and, where it matters, the damping) that it was computed from; otherwise it is computed again.
So neither states nor other ranks need to know. Waiting is for a step's own decompositions, never for a
time. LAPACK runs without the interpreter's lock. Anil et al. (2020, Scalable Second Order Optimization,
section 4) overlap inverse roots with training in the same way, with results as they come.
"""

from __future__ import annotations

import time
from collections import Counter
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import Tensor

from elastic_kfac.curvature.layer import Layer, LayerState

Key = tuple[Any, ...]
Timed = tuple[dict[str, Tensor], float]
"""Parts of a decomposition, and how long they took, s."""


@dataclass
class Work:
    """Decompositions that were used, wherever they were computed."""

    seconds: float = 0.0
    """Of computing alone, on this rank."""
    done: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often each factor of each layer was decomposed here."""


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
        self._jobs: dict[str, _Job] = {}
        self._thread: ThreadPoolExecutor | None = None
        self.work = Work()

    def begin(
        self, layer: Layer, state: LayerState, names: tuple[str, ...], damping: float
    ) -> None:
        """Begins a decomposition of the named factors that will be asked for in a later step."""
        if layer.device.type != "cpu":
            return  # on a device, kernels would only queue up behind those of the step
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "decomposition")
        key, threads = self._key(state, names, damping), torch.get_num_threads()
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
            parts, seconds = job.parts.result()
        else:
            parts, seconds = _timed(layer, state, names, damping)
        self.work.seconds += seconds
        self.work.done.update((layer.name, name) for name in names)
        return parts

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


def _timed(layer: Layer, state: LayerState, names: tuple[str, ...], damping: float) -> Timed:
    begin = time.perf_counter()
    parts = layer.decompose(state.floored, names, damping, state.decomposition)
    return parts, time.perf_counter() - begin
