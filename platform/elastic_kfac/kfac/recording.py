"""What passes have recorded since the last step, and whether `.grad` is what they left in it."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from elastic_kfac.config.kfac import ScriptOptions
from elastic_kfac.curvature.capture import Capture, shared_by_all
from elastic_kfac.curvature.discovery import Found, unwrap
from elastic_kfac.curvature.layer import Layer
from elastic_kfac.curvature.passes.batches import Batch
from elastic_kfac.errors import UsageError
from elastic_kfac.kfac.statistics import (
    DIVIDED,
    JOINED,
    POSITIONS,
    REPEATED,
    Captured,
    WarnOnce,
    disagreement,
)


class Recording:
    """The passes of one model's covered layers.

    Args:
        model: As KFAC was given it.
        found: Its layers.
        options: Of the preconditioner.
        warnings: Gives each of its warnings once.
    """

    def __init__(
        self, model: nn.Module, found: Found, options: ScriptOptions, warnings: WarnOnce
    ) -> None:
        self._model, self._layers, self._modules = model, found.layers, [*found.modules.values()]
        self.options, self._warnings = options, warnings
        self.due: Sequence[frozenset[str]] = [frozenset() for _ in self._layers]
        """Factors that the coming passes are recorded for, by layer."""
        self._left: list[tuple[nn.Parameter, weakref.ref[Tensor], int]] = []
        """Weights, and their gradients as the last step left them."""
        self._capture = self._new_capture()

    def _new_capture(self) -> Capture:
        return Capture(
            unwrap(self._model),
            self._modules,
            fisher=self.options.fisher,
            batch_axis=self.options.batch_axis,
            counts_positions=self.options.loss_reduction == "positions",
        )

    def arm(self, due: Sequence[frozenset[str]]) -> None:
        """Records the coming passes for these factors, by layer."""
        self.due = due
        self._capture.arm({x.name: names for x, names in zip(self._layers, due, strict=True)})

    def drop(self) -> None:
        """Forgets the passes since the last step."""
        self._capture.drop()

    def close(self) -> None:
        """Stops recording; the model is as before."""
        self._capture.close()

    def __deepcopy__(self, memo: dict[int, Any]) -> Recording:
        """Of a copy of the model."""
        twin = memo[id(self)] = type(self).__new__(type(self))
        own = {name: v for name, v in vars(self).items() if name not in ("_capture", "_left")}
        vars(twin).update({name: copy.deepcopy(v, memo) for name, v in own.items()})
        twin._left, twin._capture = [], twin._new_capture()
        twin.arm(twin.due)
        return twin

    # -- what passes are about ------------------------------------------------------------------

    def micro_batch(
        self, n: int | None, axis: int | None, mask: Tensor | None, scale: float | None
    ) -> AbstractContextManager[Batch]:
        """See `KFAC.micro_batch`."""
        axis = self.options.batch_axis if axis is None else axis
        if n is None and mask is not None:
            positions = self.options.loss_reduction == "positions"
            n = int(mask.sum()) if positions or mask.dim() == 1 else mask.shape[axis]
        batch = Batch(0 if n is None else n, axis, mask, scale, is_given=n is not None)
        return self._capture.micro_batch(batch)

    def sample(
        self,
        output: Tensor,
        likelihood: str,
        draws: int,
        generator: torch.Generator | None,
        loss_scale: float,
    ) -> None:
        """See `KFAC.sample_fisher`; `loss_scale` keeps gradients in the range of their type."""
        kind = self.options.fisher
        if kind == "empirical":
            raise UsageError(
                "sample_fisher needs a sampled Fisher",
                given="fisher='empirical'",
                allowed="1mc, mc, exact",
            )
        if output.dtype in (torch.half, torch.bfloat16):
            output = output.float()
        parameters = dict.fromkeys(p for layer in self._layers for p in layer.parameters)
        self._capture.sample(
            output,
            likelihood,
            1 if kind == "1mc" else draws,
            generator,
            parameters=list(parameters),
            loss_scale=loss_scale,
        )

    # -- what they left -------------------------------------------------------------------------

    @property
    def took_empty(self) -> bool:
        """Whether a batch without any samples was part of what was taken last."""
        return self._capture.took_empty

    @property
    def samples(self) -> int:
        """That this rank's passes have gone through."""
        return max(self._capture.of(layer).samples for layer in self._layers)

    @property
    def tensors(self) -> list[Tensor]:
        """The sums so far."""
        return [tensor for x in self._layers for tensor in self._capture.of(x).tensors()]

    def rows_looked_up(self, layer: Layer) -> Tensor | None:
        """Indices of the rows that `.grad` of an embedding consists of, where that is certain."""
        return self._capture.rows_looked_up(layer)

    def take(
        self,
        num_samples: int | None,
        loss_scale: float | None,
        *,
        passes: int | None,
        grad_scale: float | None,
    ) -> tuple[Captured, Mapping[str, str]]:
        """The sums since they were last taken, and why those of a layer cannot be right, by name.

        Args:
            num_samples: In this rank's loss; None counts the batch dimension of every layer's input.
            loss_scale: What one sample's loss was multiplied by before backward, if that is known.
            passes: Backward passes per step, by whose number the loss was divided; None where the loss is
                a part of one over all ranks.
            grad_scale: Of a gradient scaler, if there is one.
        """
        sums = self._capture.take(self._layers)
        faults = self._capture.take_faults()
        for layer, part in zip(self._layers, sums, strict=True):
            if num_samples is not None and 0 < part.rows < num_samples:
                faults.setdefault(layer.name, shared_by_all(part.rows, num_samples))
        if num_samples is None:
            counted = {
                part.samples: layer.name
                for layer, part in zip(self._layers, sums, strict=True)
                if part.rows
            }
            self._warn("samples", len(counted) > 1, disagreement(counted))
        again = self._capture.take_called_again()
        self._warn("repeated", bool(again), REPEATED.format(names=again))
        if loss_scale is None and self.options.loss_reduction == "sum":
            loss_scale = 1.0
        if loss_scale is None:
            if num_samples is None and self.options.loss_reduction is None:
                self._warn("positions", self._capture.has_positions, POSITIONS)
            if passes == 1:
                self._name_one_mean(is_scaled=grad_scale is not None)
        extra = 1.0 if loss_scale is not None or passes is None else 1 / passes
        captured = Captured(
            self._layers,
            sums,
            self.due,
            num_samples,
            loss_scale,
            extra if grad_scale is None else extra * grad_scale,
            frozenset(faults),
            self._capture.last_called,
        )
        return captured, faults

    def _name_one_mean(self, *, is_scaled: bool) -> None:
        """Warns where several losses, each taken for a mean of its own, seem to be one."""
        self._warn("divided", self._capture.divides, DIVIDED)
        if self._capture.joined is not None:
            place, calls, samples = self._capture.joined
            text = JOINED.format(place=place, calls=calls, samples=samples)
            self._warn("joined", place != "Mul" or not is_scaled, text)

    def _warn(self, kind: str, is_due: bool, text: str) -> None:
        self._warnings.once(kind, is_due, text)

    # -- gradients ------------------------------------------------------------------------------

    def mark_gradients(self) -> None:
        """Notes the gradients of the first and the last layer that have one, as a step leaves them."""
        weights = (self._layers[i].parameters[0] for i in {0, len(self._layers) - 1})
        self._left = [
            (w, weakref.ref(w.grad), w.grad._version) for w in weights if w.grad is not None
        ]

    def are_gradients_marked(self) -> bool:
        """Whether gradients are those that the last step left."""
        return bool(self._left) and all(
            w.grad is not None and seen() is w.grad and w.grad._version == version
            for w, seen, version in self._left
        )
