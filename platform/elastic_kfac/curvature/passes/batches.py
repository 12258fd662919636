"""Which samples a forward call is about: a batch that a call of the model began, or a given one."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic_kfac.curvature.passes.joins import output_nodes


@dataclass(eq=False)
class Batch:
    """The samples that one or more forward calls are about; equality is identity."""

    size: int
    """Samples (or real rows, where a mask drops some)."""
    axis: int = 0
    """The dimension of layer inputs that counts samples."""
    mask: Tensor | None = None
    """True where a row is real: `[n, T]`, or `[T, n]` with `axis=1`; or a sample `[n]`."""
    scale: float | None = None
    """What one sample's loss is multiplied by before backward; None: one over `size`."""
    is_given: bool = True
    """Whether somebody gave the size, so that nothing here may correct it."""

    length: int | None = None
    """Of the dimension that counts samples, in the inputs of the model."""
    is_guessed: bool = False
    """Whether `length` is that of the first layer's input, as the model was called without tensors."""
    has_positions: bool = False
    """Whether the model's output has several positions per sample."""
    is_folded: bool = False
    newest_pass: object = None
    """The call of the model about it that began last."""
    nodes: frozenset[int] = frozenset()
    """Of the graph, that made the model's output."""

    def set_length(self, length: int) -> None:
        """Counts the samples, unless somebody has given their number."""
        self.length = length
        if not self.is_given:
            self.size = length

    @property
    def real(self) -> Tensor | None:
        """The mask with samples first."""
        mask = self.mask
        return mask if mask is None or mask.dim() == 1 else mask.movedim(self.axis, 0)

    @property
    def extent(self) -> int:
        """Length of the dimension that counts samples."""
        if self.real is not None:
            return self.real.shape[0]
        return self.size if self.length is None else self.length


class Batches:
    """Those of one model since the last step; `axis` counts samples in its inputs."""

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._explicit: Batch | None = None
        self._newest: Batch | None = None
        self.opened: list[Batch] = []
        """In the order of the calls."""
        self._loose: dict[int, Batch] = {}
        self._loose_is_old = False

    @contextlib.contextmanager
    def micro_batch(self, batch: Batch) -> Iterator[Batch]:
        """Forward calls inside are about `batch`."""
        before, self._explicit = self._explicit, batch
        try:
            yield batch
        finally:
            self._explicit = before
            self._newest = batch
            self.opened.append(batch)

    def enter(self, arguments: Sequence[Any]) -> None:
        """A forward call of the whole model begins: its first tensor counts the samples."""
        if self._explicit is None:
            self._newest = Batch(0, self._axis, is_given=False)
            self.opened.append(self._newest)
        batch = self._explicit or self._newest
        assert batch is not None
        batch.length, batch.is_guessed, batch.newest_pass = None, True, object()
        _count(batch, arguments)

    def leave(self, keywords: Mapping[str, Any], output: Any, *, keeps_nodes: bool) -> None:
        """The call has returned; `keeps_nodes` of the graph that made its output."""
        batch = self._explicit or self._newest
        if batch is None:
            return
        if batch.is_guessed:
            _count(batch, keywords)
        first = next(_tensors(output), None)
        batch.has_positions = first is not None and first.dim() > 2
        if not batch.is_given and batch.scale is None and keeps_nodes:
            batch.nodes = output_nodes(output)

    def of(self, inputs: Tensor, axis: int | None, recomputed: list[Batch]) -> Batch:
        """The batch that a call of a layer is about.

        Args:
            inputs: Of the layer.
            axis: The dimension of them that counts samples, if not the batch's own.
            recomputed: Of the layer's calls inside backward passes since the last step; grows with them.
        """
        batch = self._explicit or self._newest
        in_backward = torch._C._current_graph_task_id() != -1
        if in_backward and self.opened:
            batch = self._recomputed(inputs, axis, recomputed)
        if batch is not None:
            if batch.is_guessed and batch.length is None and inputs.dim() > batch.axis:
                batch.set_length(inputs.shape[batch.axis])
            return batch
        # Only parts of the model are called: the layer's own input counts, once per size and pass.
        axis = self._axis if axis is None else axis
        size = inputs.shape[axis] if inputs.dim() > axis else 1
        if self._loose_is_old and not in_backward:
            self._loose, self._loose_is_old = {}, False
        return self._loose.setdefault(size, Batch(size, self._axis, is_given=False))

    def _recomputed(
        self, inputs: Tensor, axis: int | None, recomputed: list[Batch]
    ) -> Batch | None:
        """Of the batches since the last step, the one of a call inside a backward pass (of a reentrant
        checkpoint, or in a compiled graph): such calls come last first."""
        fitting = [
            batch
            for batch in reversed(self.opened)
            if batch.extent in inputs.shape[(batch.axis if axis is None else axis) :][:1]
        ]
        fresh = [batch for batch in fitting if batch not in recomputed]
        found = next(iter(fresh or fitting), self._explicit or self._newest)
        if found is not None:
            recomputed.append(found)
        return found

    def age(self) -> None:
        """Passes were folded: further calls of parts of the model are about other samples."""
        self._loose_is_old = True

    def clear(self) -> None:
        """Forgets them."""
        self.opened, self._newest = [], None


def _tensors(values: Any) -> Iterator[Tensor]:
    """The tensors with dimensions among arguments or results, and in mappings among those; a list
    inside is no batch."""
    if isinstance(values, Mapping):
        values = tuple(values.values())
    for value in values if isinstance(values, tuple) else (values,):
        if isinstance(value, Mapping):
            yield from _tensors(value)
        elif isinstance(value, Tensor) and value.dim():
            yield value


def _count(batch: Batch, arguments: Any) -> None:
    """Counts the samples in the first tensor that a model is called with; one number is none of several
    samples."""
    tensors = list(_tensors(arguments))
    first = next((t for t in tensors if t.numel() > 1), tensors[0] if tensors else None)
    if first is not None and first.dim() > batch.axis:
        batch.set_length(first.shape[batch.axis])
        batch.is_guessed = False
