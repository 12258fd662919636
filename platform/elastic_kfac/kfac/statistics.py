"""K-FAC's statistics as values: what one rank's passes added up, and what a reduction made of it."""

from __future__ import annotations

import contextlib
import ctypes
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from elastic_kfac.communication.collectives import Work
from elastic_kfac.curvature.capture import Sums
from elastic_kfac.curvature.dtensors import local
from elastic_kfac.curvature.factors import can_be_read, finite_sums
from elastic_kfac.curvature.layer import Layer
from elastic_kfac.errors import CommunicationError

POSITIONS = (
    "the model's outputs have several positions per sample, and KFAC takes the loss for a mean over "
    "samples; write loss_reduction='positions' for a mean over positions (tokens, pixels), or 'mean' "
    "or 'sum'"
)
JOINED = (
    "{calls} calls of the model meet in one loss ({place}), and KFAC takes the loss for a sum of one "
    "mean per call; if it is one mean, pass loss_scale_per_sample, what one sample's loss is "
    "multiplied by (1/{samples} for all samples of the calls)"
)
DIVIDED = (
    "several backward passes before a step divide their losses, and KFAC takes each for a mean loss of "
    "its own; if the step is about their mean, pass accumulation_steps, the number of passes"
)
AGAIN = (
    "step() was called again without a backward pass in between: gradients that are preconditioned "
    "already were preconditioned once more; call it once, before optimizer.step()"
)
REPEATED = (
    "weight_sharing='reduce' makes one row of the positions that a layer sees in one call; the calls of "
    "{names} for the same samples count as further rows, as all positions do with 'expand'"
)
UNFOLLOWED = (
    "the model has changed; with tree=True (reproducible mode) K-FAC keeps to the layers that it was "
    "built with: build another KFAC over the model to cover those that are new"
)


@dataclass(frozen=True)
class Statistics:
    """Sums over samples and positions, by layer in the order of `KFAC.layers`."""

    sums: Sequence[Mapping[str, Tensor]]
    """By factor name; empty where nothing was due or another rank has them."""
    counts: Sequence[tuple[float, float]]
    """(samples, rows) of each layer; a row is a sample at one position."""
    faulty: frozenset[int] = frozenset()
    """Layers whose statistics cannot be right on some rank."""
    are_means: bool = False
    """Whether the sums are divided by their normalizers already."""
    are_given: bool = False
    """Whether the sums are a caller's, who may go on using them."""
    last_called: int | None = None
    """The layer whose output is nearest to the loss, where a rank has seen it."""

    def finite(self, indices: Sequence[int]) -> Tensor:
        """Whether the sums of each of these layers are finite."""
        return finite_sums([self.sums[index] for index in indices])

    def normalizers(self, layer: Layer, index: int) -> dict[str, float]:
        """What to divide the sums of a layer by."""
        if self.are_means:
            return dict.fromkeys(layer.factor_names, 1.0)
        return layer.normalizers(*self.counts[index])


@dataclass(frozen=True)
class Captured:
    """The sums of one rank before they are brought to per-sample scale."""

    layers: Sequence[Layer]
    sums: Sequence[Sums]
    due: Sequence[frozenset[str]]
    """Factors to refresh, by layer."""
    num_samples: int | None
    """None counts the batch dimension of every layer's input."""
    loss_scale: float | None
    extra_scale: float
    """A further factor on every gradient: loss scaling, accumulation."""
    faults: frozenset[str] = frozenset()
    """Names of layers whose statistics cannot be right."""
    last_called: str | None = None
    """Name of the layer whose output is nearest to the loss, if a pass has shown it."""

    @property
    def counts(self) -> list[tuple[float, float]]:
        """(samples, rows) of each layer."""
        return [
            (float(s.samples if self.num_samples is None else self.num_samples), float(s.rows))
            for s in self.sums
        ]

    @property
    def facts(self) -> list[tuple[float, float, float, float]]:
        """(samples, rows, 1 if faulty, 1 if called last) of each layer: what a reduction adds up."""
        return [
            (*count, float(layer.name in self.faults), float(layer.name == self.last_called))
            for count, layer in zip(self.counts, self.layers, strict=True)
        ]

    def scaled(
        self, index: int, names: frozenset[str], default_loss_scale: float | None = None
    ) -> dict[str, Tensor]:
        """A layer's sums of the named factors at per-sample scale; consumes them."""
        scale = default_loss_scale if self.loss_scale is None else self.loss_scale
        return self.sums[index].scaled(self.layers[index], names, scale, self.extra_scale)

    def statistics(self) -> Statistics:
        """All sums of this rank at per-sample scale; consumes them."""
        sums = [self.scaled(index, names) for index, names in enumerate(self.due)]
        return replace(reduced(self.facts), sums=sums)


def reduced(facts: Sequence[Sequence[float]]) -> Statistics:
    """What `Captured.facts`, added up over ranks, say about every layer; the sums are missing."""
    flagged = [index for index, (*_, fault, _) in enumerate(facts) if fault]
    nearest = max(range(len(facts)), key=lambda index: facts[index][3])
    return Statistics(
        sums=(),
        counts=[(samples, rows) for samples, rows, *_ in facts],
        faulty=frozenset(flagged),
        last_called=nearest if facts[nearest][3] else None,
    )


class Coming:
    """Statistics whose reduction may be under way.

    Args:
        finish: Waits for it.
        tensors: What is held until then.
    """

    def __init__(self, finish: Callable[[], Statistics], tensors: Sequence[Tensor] = ()) -> None:
        self._finish: Callable[[], Statistics] | None = finish
        self._statistics: Statistics | None = None
        self.tensors = tensors

    def wait(self) -> Statistics:
        """The statistics.

        Raises:
            CommunicationError: If a peer was lost, now or in an earlier call.
        """
        finish, self._finish = self._finish, None
        if finish is not None:
            self._statistics = finish()
        if self._statistics is None:
            raise CommunicationError(
                "the statistics of the last step were lost with a peer",
                change="call leave() and resize(process_group), or load a state",
            )
        return self._statistics


@dataclass(frozen=True)
class Late:
    """What a step has left to the next one, where reductions overlap with it."""

    step: int
    """The step whose statistics and decompositions these are."""
    due: Sequence[frozenset[str]] = ()
    """The factors that its passes were recorded for, by layer."""
    coming: Coming | None = None
    """None once the averages have taken them, and where none were due."""


Move = Callable[[Statistics, Late], object]
"""Moves the running averages by statistics that have come."""


class Overlap:
    """What a step leaves to the next one, with `overlap_reduction`.

    Step t takes what t - 1 left, and begins to reduce its own statistics at its end. Step t + 1 runs its
    passes meanwhile, then takes the sums, for the averages and decompositions that were due in t.
    """

    def __init__(self) -> None:
        self.late: Late | None = None

    @property
    def tensors(self) -> Sequence[Tensor]:
        """What is held until a reduction has ended."""
        return () if self.late is None or self.late.coming is None else self.late.coming.tensors

    def leave(self, turn: Late, begin: Callable[[], Coming] | None) -> None:
        """Leaves a step to the next one.

        Args:
            begin: Starts the reduction of its statistics, if there are any: at the end of a step, whose
                own collectives would queue up behind it otherwise.
        """
        self.late = turn if begin is None else replace(turn, coming=begin())

    def take(self, move: Move) -> None:
        """Waits for the statistics that were left. That may also be done between the steps: nothing in
        between depends on the averages.

        Raises:
            CommunicationError: If they were lost with a peer.
        """
        late = self.late
        if late is not None and late.coming is not None:
            statistics = late.coming.wait()
            self.late = replace(late, coming=None)
            if any(late.due):
                move(statistics, late)

    def take_what_came(self, move: Move) -> None:
        """`take`, where peers may be lost: statistics that went with them are dropped."""
        try:
            self.take(move)
        except CommunicationError:
            assert self.late is not None
            self.late = replace(self.late, coming=None)

    def end(self) -> None:
        """Waits for a reduction that is under way: a process that ended with its part unsent would fail
        its peers."""
        if self.late is not None and self.late.coming is not None:
            with contextlib.suppress(CommunicationError):
                self.late.coming.wait()


def arrived(tensor: Tensor, work: Work) -> Any:
    """The values of a reduced tensor; the host waits for that reduction, and for no later work of a
    device."""
    if not tensor.is_cuda:
        work.wait()
        return tensor.tolist()
    with torch.cuda.stream(torch.cuda.Stream(tensor.device)):
        work.wait()
        values = torch.empty_like(tensor, device="cpu", pin_memory=True)
        values.copy_(tensor, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
    event.synchronize()
    return values.tolist()


class Arriving:
    """Numbers or flags of a device that the host will read, without waiting for later work.

    Args:
        values: One-dimensional.
    """

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._known: list[Any] | None = values.tolist() if can_be_read(values) else None
        self._coming = values
        if values.is_cuda:
            self._coming = torch.empty_like(values, device="cpu", pin_memory=True)
            self._coming.copy_(values, non_blocking=True)
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> list[Any]:
        """Waits for no work but what had been asked for when this was built."""
        if self._event is not None:
            self._event.synchronize()
        if self._known is None:
            # The bytes that have arrived; an operation would be one that waits for the device.
            size = self._coming.numel() * self._coming.element_size()
            arrived = memoryview(ctypes.string_at(self._coming.data_ptr(), size))
            self._known = arrived.cast(_FORMATS[self._coming.dtype]).tolist()
        return self._known


_FORMATS: dict[torch.dtype, Literal["?", "d"]] = {torch.bool: "?", torch.float64: "d"}


class Verdict:
    """Which layers' statistics in an update were finite: known at once, or, so that the host does not
    wait for a device, at the next update.

    Args:
        indices: Layers.
        finite: Of each of them.
        at_once: Whether the host must know now.
    """

    def __init__(self, indices: Sequence[int], finite: Tensor, *, at_once: bool = True) -> None:
        self.indices = indices
        self.flags: dict[int, Tensor] = {}
        """By layer, for the device to decide with; empty where the host knows."""
        self._coming = Arriving(finite.cpu() if at_once else finite)
        if not (at_once or can_be_read(finite)):
            self.flags = dict(zip(indices, finite.unbind(), strict=True))

    def finite(self) -> set[int]:
        """The layers; waits for no work but that of the update."""
        return {i for i, good in zip(self.indices, self._coming.read(), strict=True) if good}


def with_gradients(layers: Sequence[Layer]) -> list[str]:
    """Names of layers whose weight has a gradient other than 0; one transfer to the host."""
    grads = {x.name: x.parameters[0].grad for x in layers}
    found = {name: local(grad).any() for name, grad in grads.items() if grad is not None}
    flags = torch.stack([*found.values()]).tolist() if found else []
    return [name for name, flag in zip(found, flags, strict=True) if flag]


class WarnOnce:
    """Warnings that one preconditioner gives once each."""

    def __init__(self) -> None:
        self._kinds: set[str] = set()

    def once(self, kind: str, is_due: bool, text: str) -> None:
        """Warns if it is due and has not been given yet."""
        if is_due and kind not in self._kinds:
            self._kinds.add(kind)
            warnings.warn(text, UserWarning, stacklevel=_level_outside())


def _level_outside() -> int:
    """The `stacklevel` of the code that called into this package, for a function that warns."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals["__name__"].startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level


_INSIDE = ("elastic_kfac.", "torch.")


def disagreement(names_by_count: Mapping[int, str]) -> str:
    """Text of the warning for layers that count different numbers of samples."""
    counts = ", ".join(f"{count} in {name}" for count, name in sorted(names_by_count.items()))
    return (
        f"layers count different numbers of samples ({counts}); pass num_samples and "
        "loss_scale_per_sample to step()"
    )
