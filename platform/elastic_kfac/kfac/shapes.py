"""What placement needs to know about layers."""

from __future__ import annotations

from math import prod

from elastic_kfac.curvature.layer import Layer
from elastic_kfac.placement.costs import LayerShape


def layer_shape(layer: Layer) -> LayerShape:
    """The sizes of one layer: widths of its dense factors, elements of its weight and bias."""
    weights = prod(layer.gradient_shape)
    shapes = layer.factor_shapes
    if "F" in shapes:
        is_dense = len(shapes["F"]) == 2
        return LayerShape(layer.name, 0, weights if is_dense else 0, weights)
    a = 0 if layer.is_diagonal("A") else shapes["A"][-1]
    groups = shapes["G"][0] if len(shapes["G"]) == 3 else 1
    return LayerShape(layer.name, a, shapes["G"][-1], weights, groups)
