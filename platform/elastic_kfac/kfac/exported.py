"""Curvature as a product: factors, eigenbases and eigenvalues of a trained model, and what they do to a
gradient, without a pass over any data. docs/curvature.md has the layout.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.curvature.discovery import clean_name, find_layers, unwrap
from elastic_kfac.curvature.kronecker import KroneckerLayer
from elastic_kfac.curvature.layer import Layer
from elastic_kfac.errors import ConfigError, StateError

FORMAT, VERSION = "elastic-kfac curvature", 1
_GEOMETRY = (
    "skip_layers",
    "max_factor_dim",
    "factor_rank",
    "bn_fisher",
    "bn_damping_multiplier",
)
"""Options that the shapes depend on."""


def curvature_of(
    model: nn.Module, options: KfacOptions, state: Mapping[str, Any]
) -> dict[str, Any]:
    """The exported form of a K-FAC state.

    Args:
        model: The one that it belongs to.
        options: Of the KFAC.
        state: As from `KFAC.state_dict()`.

    Raises:
        ConfigError: With `method="one_sided"`, which has no curvature of the outputs.
        StateError: If there are no factors yet.
    """
    if options.method == "one_sided":
        raise ConfigError(
            "one-sided K-FAC has no curvature of the outputs to export",
            given="method=one_sided",
            allowed="eigen, inverse, ekfac",
        )
    names = {id(p): clean_name(name) for name, p in unwrap(model).named_parameters()}
    layers: dict[str, Any] = {}
    for layer in _corrected_layers(model, options):
        saved = state["layers"].get(layer.name)
        if saved is None or not saved["factors"]:
            continue
        rows = layer.weight_rows
        layers[layer.name] = {
            "parameters": [names[id(p)] for p in layer.parameters],
            "rows": None if rows in (None, slice(None)) else [rows.start, rows.stop],
            "shape": list(layer.gradient_shape),
            "updates": saved["factor_updates"],
            "factors": dict(saved["factors"]),
            **_spectrum(layer, options, saved),
        }
    if not layers:
        raise StateError("there are no factors yet", change="take a step with statistics first")
    return {
        "format": FORMAT,
        "version": VERSION,
        "method": options.method,
        "step": int(state["counters"].get("steps", 0)),
        "options": {name: _plain(getattr(options, name)) for name in _GEOMETRY},
        "layers": layers,
    }


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _corrected_layers(model: nn.Module, options: KfacOptions) -> tuple[Layer, ...]:
    """Of the model, in the form that takes any eigenvalues."""
    corrected = options.model_copy(update={"method": "ekfac", "precompute": False})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # KFAC has named what it does not cover
        return find_layers(model, corrected).layers


def _spectrum(layer: Layer, options: KfacOptions, saved: Mapping[str, Any]) -> dict[str, Any]:
    """The eigenbasis and the eigenvalues `[..., g, a]` in it, where the layer has two sides."""
    if not isinstance(layer, KroneckerLayer):
        return {"basis": {}, "eigenvalues": None}
    held = saved["second_order"]
    if options.method != "ekfac" or "E_moments" not in held:
        factors = layer.placed(saved["factors"])
        held = layer.decompose(factors, layer.factor_names, 0.0, {})
    return {
        "basis": {name: t for name, t in held.items() if name.endswith("_vectors")},
        "eigenvalues": held["E_moments"],
    }


class Curvature:
    """An exported curvature and the model it belongs to.

    Args:
        model: With the parameters of the model whose curvature it is.
        tree: As from `curvature_of`.

    Attributes:
        layers: What the file has of each layer, by name: `factors`, `basis`, `eigenvalues`, `parameters`,
            `rows`, `shape`, `updates`.

    Raises:
        StateError: If it is something else, or belongs to another model.
    """

    def __init__(self, model: nn.Module, tree: Mapping[str, Any]) -> None:
        if (tree.get("format"), tree.get("version")) != (FORMAT, VERSION):
            raise StateError(
                "not an exported curvature, or of another version",
                given=f"{tree.get('format')} {tree.get('version')}",
                allowed=f"{FORMAT} {VERSION}",
            )
        self.layers: Mapping[str, Any] = tree["layers"]
        self._covered = [
            layer
            for layer in _corrected_layers(model, KfacOptions(**tree["options"]))
            if layer.name in self.layers
        ]
        found = {layer.name: list(layer.gradient_shape) for layer in self._covered}
        known = {name: part["shape"] for name, part in self.layers.items()}
        if found != known:
            differing = sorted(n for n in known if found.get(n) != known[n])
            raise StateError("the curvature belongs to another model", given=", ".join(differing))

    @torch.no_grad()
    def precondition(self, damping: float) -> None:
        """`.grad` becomes (F + γI)⁻¹ `.grad` in the layers of the file; other gradients stay.

        With `D [..., g, a]` of a layer this is `Q_G [(Q_Gᵀ D Q_A) / (S + γ)] Q_Aᵀ`; normalisation layers
        are solved with their own Fisher.

        Args:
            damping: γ, in the units of the loss.
        """
        for layer in self._covered:
            if not layer.has_gradient():
                continue
            part = self.layers[layer.name]
            if isinstance(layer, KroneckerLayer):
                held = layer.placed({**part["basis"], "E_moments": part["eigenvalues"]})
            else:
                factors = layer.placed(part["factors"])
                held = layer.decompose(factors, layer.factor_names, damping, {})
            layer.set_gradient(layer.precondition(held, layer.gradient(), damping))
