"""Small layers of one shape, worked on as one batch: for them a call costs more than its arithmetic."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from elastic_kfac.curvature.kronecker import KroneckerLayer
from elastic_kfac.curvature.layer import Layer


class Stacks:
    """Layers, and which of them are worked on together; the same numbers as one by one.

    Args:
        layers: With gradients.
        used: Columns that their matrices hold, None for all (see `Layer.used_columns`).
    """

    def __init__(self, layers: Sequence[Layer], used: Sequence[Tensor | None]) -> None:
        self._layers, self._used = layers, used
        groups: dict[Hashable, list[int]] = {}
        for place, layer in enumerate(layers):
            key = layer.stack_key if isinstance(layer, KroneckerLayer) else None
            groups.setdefault(place if key is None else key, []).append(place)
        self._groups = list(groups.values())

    def _batches(self) -> Iterator[tuple[list[int], list[KroneckerLayer]]]:
        for places in self._groups:
            if len(places) > 1:
                yield places, [self._layers[place] for place in places]  # type: ignore[misc]

    def _single(self) -> Iterator[tuple[int, Layer, Tensor | None]]:
        for places in self._groups:
            if len(places) == 1:
                yield places[0], self._layers[places[0]], self._used[places[0]]

    def gradients(self, weight_decay: float) -> list[Tensor]:
        """`Layer.gradient` of every layer."""
        result = [torch.empty(0)] * len(self._layers)
        for place, layer, used in self._single():
            result[place] = layer.gradient(weight_decay, used)
        for places, layers in self._batches():
            first = layers[0]
            matrices = torch.stack([_grad(x.weight) for x in layers]).to(first.dtype)
            if weight_decay:
                weights = torch.stack([x.weight.detach() for x in layers]).to(first.dtype)
                matrices = matrices.add_(weights, alpha=weight_decay)
            rows = (len(layers), *first.gradient_shape[:-1])
            matrices = matrices.reshape(*rows, -1)
            if first.biases:
                columns = torch.stack([_grad(x.biases[0]) for x in layers]).to(first.dtype)
                matrices = torch.cat((matrices, columns.reshape(*rows, 1)), -1)
            for place, matrix in zip(places, matrices.unbind(), strict=True):
                result[place] = matrix
        return result

    def precondition(
        self,
        decompositions: Sequence[Mapping[str, Tensor]],
        gradients: Sequence[Tensor],
        damping: float,
    ) -> list[Tensor]:
        """`Layer.precondition` of every layer."""
        result = [torch.empty(0)] * len(self._layers)
        for place, layer, used in self._single():
            result[place] = layer.precondition(
                decompositions[place], gradients[place], damping, used
            )
        for places, layers in self._batches():
            held = {
                name: torch.stack([decompositions[place][name] for place in places])
                for name in decompositions[places[0]]
            }
            matrices = torch.stack([gradients[place] for place in places])
            values = layers[0].precondition(held, matrices, damping)
            for place, value in zip(places, values.unbind(), strict=True):
                result[place] = value
        return result

    def set_gradients(self, values: Sequence[Tensor]) -> None:
        """`Layer.set_gradient` of every layer."""
        for place, layer, used in self._single():
            layer.set_gradient(values[place], used)
        for places, layers in self._batches():
            matrices = torch.stack([values[place] for place in places])
            targets = [_grad(x.weight) for x in layers]
            parts = matrices[..., :-1] if layers[0].biases else matrices
            parts = parts.reshape(len(layers), *targets[0].shape)
            torch._foreach_copy_(targets, parts.unbind())
            if layers[0].biases:
                columns = matrices[..., -1].reshape(len(layers), -1)
                torch._foreach_copy_([_grad(x.biases[0]) for x in layers], columns.unbind())


def _grad(parameter: Tensor | None) -> Tensor:
    assert parameter is not None and parameter.grad is not None
    return parameter.grad
