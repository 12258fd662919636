"""K-FAC's state in parts: each layer's at one rank, so that no rank needs the memory for all of them.

A part is a tensor by name: `layers/NAME/factors/A`, `layers/NAME/second_order/A_vectors`,
`layers/NAME/snapshots/A.0`, `layers/NAME/step/matrix`, `layers/NAME/step/average`,
`velocity/PARAMETER`. The numbers that belong to them are plain values.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from elastic_kfac.curvature.factors import host_copy
from elastic_kfac.kfac.distribution.strategy import Item
from elastic_kfac.kfac.state import Stateful, numbers

_ITEM_OF = {"factors": "factors", "second_order": "decomposition"}
"""What strategies call a kind of part, where it is not the kind itself."""


class Part(NamedTuple):
    """A name of a tensor, taken apart."""

    kind: str
    """`factors`, `second_order`, `snapshots`, `step` or `velocity`."""
    owner: str
    """Of the layer, or of the parameter."""
    name: str

    @classmethod
    def of(cls, key: str) -> Part:
        """The part that is called `key`."""
        if key.startswith("velocity/"):
            return cls("velocity", key.removeprefix("velocity/"), "")
        layer, kind, name = key.removeprefix("layers/").rsplit("/", 2)
        return cls(kind, layer, name)


def own_parts(kfac: Stateful) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that this rank is to save, on the host, and the numbers: `shared`, and `layers` of
    those that this rank decides about. Collective."""
    distribution, trust = kfac.distribution, kfac.bound.trust
    distribution.settle()
    shared = numbers(kfac)
    shared["clocks"] = kfac.refresh.saved_clocks()
    shared["trust_region"] = None if trust is None else trust.saved()
    tensors: dict[str, Tensor] = {}
    layers: dict[str, Any] = {}
    for index, layer in enumerate(kfac.layers):
        if distribution.decider(index) != distribution.rank:
            continue
        name = layer.name
        saved = layer.saved(kfac.states[index])
        for kind in _ITEM_OF:
            parts = saved.pop(kind)
            tensors |= {f"layers/{name}/{kind}/{part}": t for part, t in parts.items()}
        layers[name] = saved
        for (owner, factor), snapshots in kfac.refresh.snapshots.items():
            for place, tensor in enumerate(snapshots if owner == name else ()):
                tensors[f"layers/{name}/snapshots/{factor}.{place}"] = host_copy(tensor)
        step = None if trust is None else trust.steps_taken.get(name)
        if step is not None:
            tensors[f"layers/{name}/step/matrix"] = host_copy(step.matrix)
            layers[name] = {**saved, "step_scale": step.scale}
        if trust is not None and name in trust.averages:
            tensors[f"layers/{name}/step/average"] = host_copy(trust.averages[name])
    for item, held in distribution.held().items():
        tensors[f"{item.kind}/{item.name}"] = host_copy(held[""])
    return tensors, {"shared": shared, "layers": layers}


def kept_here(kfac: Stateful, keys: Iterable[str]) -> list[str]:
    """Those of the named parts that this rank keeps."""
    distribution = kfac.distribution
    layers = {layer.name for layer in kfac.layers}
    kept = []
    for key in keys:
        part = Part.of(key)
        item = Item(_ITEM_OF.get(part.kind, part.kind), part.owner)
        if part.kind == "velocity" and not distribution.updates_weights:
            kept.append(key)  # its restoration says what is wrong
        elif part.kind == "velocity" or part.owner in layers:
            kept += [key] if distribution.keeps(item, distribution.rank) else []
    return kept


def assembled(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> dict[str, Any]:
    """What `KFAC.load_state_dict` takes, from all numbers and the tensors that this rank keeps."""
    shared = dict(facts["shared"])
    clocks, trust = shared.pop("clocks"), shared.pop("trust_region")
    layers = {
        name: {**saved, "factors": {}, "second_order": {}}
        for name, saved in facts["layers"].items()
    }
    scales = {n: s.pop("step_scale") for n, s in layers.items() if "step_scale" in s}
    snapshots: dict[str, dict[str, list[Tensor]]] = {}
    steps: dict[str, dict[str, Tensor]] = {"matrix": {}, "average": {}}
    velocity: dict[str, Tensor] = {}
    for key, tensor in sorted(tensors.items()):
        part = Part.of(key)
        if part.kind in _ITEM_OF:
            layers[part.owner][part.kind][part.name] = tensor
        elif part.kind == "snapshots":
            factor = part.name.rpartition(".")[0]
            snapshots.setdefault(part.owner, {}).setdefault(factor, []).append(tensor)
        elif part.kind == "step":
            steps[part.name][part.owner] = tensor
        else:
            velocity[part.owner] = tensor
    moved = {"step": steps["matrix"], "step_scale": scales, "average": steps["average"]}
    return {
        **shared,
        "layers": layers,
        **({"refresh": {"clocks": clocks, "snapshots": snapshots}} if clocks else {}),
        **({"trust_region": {**trust, **moved}} if trust else {}),
        **({"velocity": velocity} if velocity else {}),
    }
