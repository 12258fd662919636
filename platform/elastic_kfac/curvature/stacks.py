"""Small layers of one shape, worked on as one batch: for them a call costs more than its arithmetic."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from operator import is_
from typing import cast

import torch
from torch import Tensor

from elastic_kfac.curvature.kronecker import KroneckerLayer
from elastic_kfac.curvature.layer import Layer

Held = Mapping[str, Tensor]
Used = Sequence[Tensor | None]

_MOST_MADE = 4


class StackTable:
    """The stacks of some of the layers of a model, kept from step to step."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        self._made: dict[tuple[int, ...], Stacks] = {}

    def of(self, indices: Sequence[int]) -> Stacks:
        """Those of the layers at `indices`."""
        key = tuple(indices)
        if key not in self._made:
            if len(self._made) >= _MOST_MADE:
                self._made.clear()
            self._made[key] = Stacks([self._layers[index] for index in key])
        return self._made[key]


class Stacks:
    """Layers, and which of them are worked on together; the same numbers as one by one.

    What follows from decompositions alone is computed once for as long as they stay.

    Args:
        layers: With gradients.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self._layers = layers
        groups: dict[Hashable, list[int]] = {}
        for place, layer in enumerate(layers):
            key = layer.stack_key if isinstance(layer, KroneckerLayer) else None
            groups.setdefault(place if key is None else key, []).append(place)
        self._singles = [(g[0], layers[g[0]]) for g in groups.values() if len(g) == 1]
        self._batches = [
            (places, [cast(KroneckerLayer, layers[place]) for place in places])
            for places in groups.values()
            if len(places) > 1
        ]
        self._prepared: dict[int, tuple[list[Held], float, Held]] = {}
        """By the first place of a group: the decompositions and the damping it was made from."""

    def gradients(self, weight_decay: float, used: Used) -> list[Tensor]:
        """`Layer.gradient` of every layer; `used` are the columns that their matrices are to hold, None
        for all."""
        result = [torch.empty(0)] * len(self._layers)
        for place, layer in self._singles:
            result[place] = layer.gradient(weight_decay, used[place])
        for places, layers in self._batches:
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
        decompositions: Sequence[Held],
        gradients: Sequence[Tensor],
        damping: float,
        used: Used,
    ) -> list[Tensor]:
        """`Layer.precondition` of every layer."""
        result = [torch.empty(0)] * len(self._layers)
        for place, layer in self._singles:
            held = self._prepare([place], layer, decompositions, damping)
            result[place] = layer.precondition(held, gradients[place], damping, used[place])
        for places, layers in self._batches:
            held = self._prepare(places, layers[0], decompositions, damping)
            matrices = torch.stack([gradients[place] for place in places])
            values = layers[0].precondition(held, matrices, damping)
            for place, value in zip(places, values.unbind(), strict=True):
                result[place] = value
        return result

    def _prepare(
        self, places: Sequence[int], layer: Layer, decompositions: Sequence[Held], damping: float
    ) -> Held:
        """`Layer.prepared` of the decompositions of one group."""
        own = [decompositions[place] for place in places]
        known = self._prepared.get(places[0])
        if known is not None and known[1] == damping and all(map(is_, known[0], own)):
            return known[2]
        held = own[0]
        if len(own) > 1:
            held = {name: torch.stack([parts[name] for parts in own]) for name in own[0]}
        prepared = layer.prepared(held, damping)
        self._prepared[places[0]] = own, damping, prepared
        return prepared

    def set_gradients(self, values: Sequence[Tensor], used: Used) -> None:
        """`Layer.set_gradient` of every layer."""
        for place, layer in self._singles:
            layer.set_gradient(values[place], used[place])
        for places, layers in self._batches:
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
