"""The saved form of K-FAC, by layer name, at no world size, for any distribution; its moves and bytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

from torch import Tensor, nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config.kfac import KfacOptions
from elastic_kfac.curvature.damping import AdaptiveDamping
from elastic_kfac.curvature.factors import host_copy
from elastic_kfac.curvature.layer import Layer, LayerState
from elastic_kfac.errors import StateError
from elastic_kfac.kfac.coverage import Coverage
from elastic_kfac.kfac.distribution.resize import Held, ResizeReport, move
from elastic_kfac.kfac.distribution.strategy import Distribution, Item, Slot
from elastic_kfac.kfac.refresh import Refresh
from elastic_kfac.kfac.statistics import Late, Overlap
from elastic_kfac.kfac.step_bound import StepBound
from elastic_kfac.kfac.trust_region import LastStep

STATE_VERSION = 1
IDENTITY = ("method", "factor_scale", "bn_fisher", "precompute")
"""Options without which the saved tensors mean something else."""
_COMMON = ("steps", "skipped_steps")
"""Counters of what all ranks do together; the others are of events that a rank may see alone."""


class Stateful(Protocol):
    """What the state of a KFAC consists of."""

    layers: tuple[Layer, ...]
    parameters: dict[str, nn.Parameter]
    distribution: Distribution
    refresh: Refresh
    damping_rule: AdaptiveDamping | None
    counters: Counter[str]
    covered: Coverage
    bound: StepBound
    tuned: dict[str, float]
    overlap: Overlap

    @property
    def options(self) -> KfacOptions: ...

    @property
    def states(self) -> list[LayerState]:
        """Of the layers."""

    def retune(self, **values: float) -> None:
        """See `KFAC.retune`."""


def save(kfac: Stateful) -> dict[str, Any]:
    """Everything, equal on every rank. Collective."""
    states = kfac.distribution.collect(kfac.states)
    state: dict[str, Any] = {
        **numbers(kfac),
        "layers": {
            layer.name: layer.saved(state) for layer, state in zip(kfac.layers, states, strict=True)
        },
    }
    clocks = kfac.refresh.saved_clocks()
    if clocks:
        snapshots = {}
        if kfac.refresh.keeps_snapshots:
            snapshots = _collect_snapshots(kfac.distribution, kfac.refresh)
        state["refresh"] = {"clocks": clocks, "snapshots": snapshots}
    if kfac.bound.trust is not None:
        state["trust_region"] = {**kfac.bound.trust.saved(), **_collect_step(kfac)}
    velocity = kfac.distribution.collect_velocity()
    if velocity:
        state["velocity"] = velocity
    if kfac.tuned:
        state["tuned"] = dict(kfac.tuned)
    return state


def numbers(kfac: Stateful) -> dict[str, Any]:
    """What is not about one layer, as plain values. Collective."""
    return {
        "version": STATE_VERSION,
        "options": {name: getattr(kfac.options, name) for name in IDENTITY},
        "counters": _total(kfac),
        "damping": None if kfac.damping_rule is None else {"value": kfac.damping_rule.value},
        **({} if kfac.overlap.late is None else {"late": kfac.overlap.late.step}),
    }


def load(kfac: Stateful, state: Mapping[str, Any]) -> None:
    """Puts a saved state in place; keeps only what this rank needs.

    Raises:
        StateError: If it belongs to another model, other options or another version.
    """
    _check(state, {name: getattr(kfac.options, name) for name in IDENTITY}, kfac.layers)
    kfac.refresh.ahead.clear()
    kfac.overlap.late = Late(state["late"]) if "late" in state else None
    kfac.retune(**state.get("tuned", {}))
    put(kfac, state)
    kfac.covered.used = {n for n, saved in state["layers"].items() if saved["factor_updates"]}
    counters = {name: int(value) for name, value in state["counters"].items()}
    if kfac.distribution.counts_are_local and kfac.distribution.rank:
        # Events were counted where they happened; from now on the saved ones belong to rank 0.
        counters = {name: value for name, value in counters.items() if name in _COMMON}
    _count_from(kfac, counters)
    if kfac.damping_rule is not None and state["damping"] is not None:
        kfac.damping_rule.value = float(state["damping"]["value"])


def put(kfac: Stateful, state: Mapping[str, Any]) -> None:
    """What this rank keeps of the layers in a saved state, their clocks and momentum; other layers start
    afresh."""
    rank = kfac.distribution.rank

    def keeps(kind: str, name: str) -> bool:
        return kfac.distribution.keeps(Item(kind, name), rank)

    for index, layer in enumerate(kfac.layers):
        if layer.name not in state["layers"]:
            continue
        restored = layer.restored(state["layers"][layer.name])
        if not keeps("factors", layer.name):
            restored = LayerState(floor=restored.floor)
        elif not keeps("decomposition", layer.name):
            restored = replace(restored, decomposition={})
        kfac.states[index] = restored
    refresh = state.get("refresh", {"clocks": {}, "snapshots": {}})
    clocks = {name: clock for name, clock in refresh["clocks"].items() if name in state["layers"]}
    kfac.refresh.restore_clocks(clocks)
    kfac.refresh.snapshots = {
        (layer.name, factor): tuple(
            layer.placed({str(i): t for i, t in enumerate(tensors)}).values()
        )
        for layer in kfac.layers
        if layer.name in clocks and keeps("snapshots", layer.name)
        for factor, tensors in refresh["snapshots"].get(layer.name, {}).items()
    }
    kfac.distribution.restore_velocity(state.get("velocity", {}))
    if kfac.bound.trust is not None and "trust_region" in state:
        saved = state["trust_region"]
        kfac.bound.trust.restore(saved)
        scales = saved.get("step_scale", {})
        kfac.bound.trust.steps_taken = {
            layer.name: LastStep(
                layer.placed({"": saved["step"][layer.name]})[""], scales.get(layer.name, 1.0)
            )
            for layer in kfac.layers
            if layer.name in state["layers"]
            and layer.name in saved["step"]
            and keeps("step", layer.name)
        }
        kfac.bound.trust.averages = {
            layer.name: layer.placed({"": saved["average"][layer.name]})[""]
            for layer in kfac.layers
            if kfac.bound.trust.momentum
            and layer.name in state["layers"]
            and layer.name in saved.get("average", {})
            and keeps("step", layer.name)
        }


def carry_over(kfac: Stateful, build: Callable[[], None]) -> set[str]:
    """Builds anew over a model that has changed; layers that are the same keep what they had. Collective.

    Returns:
        Their names.
    """
    saved, before, layers = save(kfac), kfac.parameters, kfac.layers
    build()
    known = {layer.name: _identity(layer) for layer in layers}
    kept = {x.name for x in kfac.layers if known.get(x.name) == _identity(x)}
    same = {name for name, p in kfac.parameters.items() if before.get(name) is p}
    saved["layers"] = {name: part for name, part in saved["layers"].items() if name in kept}
    velocity = saved.get("velocity", {})
    put(kfac, {**saved, "velocity": {n: v for n, v in velocity.items() if n in same}})
    return kept


def _identity(layer: Layer) -> tuple[object, ...]:
    return layer.gradient_shape, *map(id, layer.parameters)


def leave(kfac: Stateful) -> None:
    """Drops process groups and work under way; a decomposition that did not arrive is dropped too."""
    kfac.refresh.ahead.clear()
    kfac.overlap.late = None if kfac.overlap.late is None else Late(kfac.overlap.late.step)
    for index in kfac.distribution.leave():
        kfac.states[index] = replace(kfac.states[index], decomposition={}, inverse_step=-1)


def move_to(kfac: Stateful, communicator: Communicator) -> ResizeReport:
    """Goes on with other ranks. Collective over them."""
    leave(kfac)
    steps = kfac.counters["steps"]
    held: dict[Item, Held] = {}
    for layer, state in zip(kfac.layers, kfac.states, strict=True):
        if state.factors:
            held[Item("factors", layer.name)] = Held(state.factor_updates, state.factors)
        if len(state.decomposition) == len(layer.decomposition_shapes):
            held[Item("decomposition", layer.name)] = Held(state.inverse_step, state.decomposition)
    for (name, factor), tensors in kfac.refresh.snapshots.items():
        known = held.get(Item("snapshots", name), Held(steps, {})).tensors
        named = {f"{factor}.{place}": tensor for place, tensor in enumerate(tensors)}
        held[Item("snapshots", name)] = Held(steps, {**known, **named})
    held |= {item: Held(steps, tensors) for item, tensors in kfac.distribution.held().items()}
    if kfac.bound.trust is not None:
        held |= {
            Item("step", name): Held(steps, tensors)
            for name, tensors in kfac.bound.trust.held().items()
        }
    facts = {
        "steps": steps,
        "trust": None if kfac.bound.trust is None else kfac.bound.trust.saved(),
        "counters": dict(kfac.counters),
        "clocks": kfac.refresh.saved_clocks(),
        "damping": None if kfac.damping_rule is None else kfac.damping_rule.value,
        "tuned": kfac.tuned,
        "late": None if kfac.overlap.late is None else kfac.overlap.late.step,
        "used": sorted(kfac.covered.used),
        "floors": {x.name: s.floor for x, s in zip(kfac.layers, kfac.states, strict=True)},
    }
    moved = move(kfac.distribution, communicator, held, facts)
    kfac.retune(**moved.facts["tuned"])
    late = moved.facts["late"]
    kfac.overlap.late = None if late is None else Late(late)
    for index, layer in enumerate(kfac.layers):
        kept, curvature = Item("factors", layer.name), Item("decomposition", layer.name)
        floor = moved.facts["floors"][layer.name]
        kfac.states[index] = LayerState(floor=floor)
        if kept in moved.tensors:
            # Without a holder it is decomposed again in the next step.
            kfac.states[index] = LayerState(
                moved.tensors[kept],
                moved.ages[kept],
                moved.tensors.get(curvature, {}),
                moved.ages.get(curvature, -1),
                floor,
            )
    snapshots: dict[tuple[str, str], tuple[Tensor, ...]] = {}
    for item, parts in moved.tensors.items():
        if item.kind == "snapshots":
            for part, tensor in sorted(parts.items()):
                key = (item.name, part.rpartition(".")[0])
                snapshots[key] = (*snapshots.get(key, ()), tensor)
    kfac.covered.used = set(moved.facts["used"])
    kfac.refresh.snapshots = snapshots
    kfac.refresh.restore_clocks(moved.facts["clocks"])
    kfac.distribution.take(moved.tensors)
    counters = Counter(moved.facts["counters"])
    if kfac.distribution.counts_are_local:
        common = {name: value for name, value in counters.items() if name in _COMMON}
        counters = Counter({**kfac.counters, **common})
    _count_from(kfac, counters)
    if kfac.damping_rule is not None:
        kfac.damping_rule.value = moved.facts["damping"]
    if kfac.bound.trust is not None:
        kfac.bound.trust.restore(moved.facts["trust"])
        kfac.bound.trust.take(
            {item.name: parts for item, parts in moved.tensors.items() if item.kind == "step"}
        )
    return moved.report


def memory_usage(kfac: Stateful, pending: Sequence[Tensor]) -> dict[str, int]:
    """See `KFAC.memory_usage`; `pending` are the sums of passes since the last step."""
    trust = kfac.bound.trust
    usage = {
        "factors": _bytes([t for s in kfac.states for t in s.factors.values()]),
        "second_order": kfac.refresh.ahead.bytes
        + _bytes([t for s in kfac.states for t in s.decomposition.values()]),
        "pending": _bytes(pending),
    }
    for name, tensors in (
        ("snapshots", [t for ts in kfac.refresh.snapshots.values() for t in ts]),
        ("momentum", [t for ts in kfac.distribution.held().values() for t in ts.values()]),
        ("last_step", [s.matrix for s in trust.steps_taken.values()] if trust else []),
        ("average", list(trust.averages.values()) if trust else []),
    ):
        if tensors:
            usage[name] = _bytes(tensors)
    return {**usage, "total": sum(usage.values())}


def _total(kfac: Stateful) -> dict[str, int]:
    if not kfac.distribution.counts_are_local:
        return dict(kfac.counters)
    total: Counter[str] = Counter()
    for part in kfac.distribution.communicator.all_gather_object(
        dict(kfac.counters), tag="kfac/state"
    ):
        total.update({name: value for name, value in part.items() if name not in _COMMON})
    return {**total, **{n: v for n, v in kfac.counters.items() if n in _COMMON}}


def _collect_step(kfac: Stateful) -> dict[str, Any]:
    """By layer and on every rank: the last step, its scale where that is not 1, and the average gradient
    where there is one."""
    trust = kfac.bound.trust
    assert trust is not None
    scales = {name: step.scale for name, step in trust.steps_taken.items()}
    if kfac.distribution.counts_are_local:
        parts = kfac.distribution.communicator.all_gather_object(scales, tag="kfac/state")
        scales = {name: scale for part in parts for name, scale in part.items()}
    steps = _whole(kfac, {name: step.matrix for name, step in trust.steps_taken.items()})
    averages = _whole(kfac, trust.averages) if trust.momentum else {}
    apart = {name: scale for name, scale in scales.items() if scale != 1.0}
    return {
        "step": steps,
        **({"step_scale": apart} if apart else {}),
        **({"average": averages} if averages else {}),
    }


def _whole(kfac: Stateful, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Matrices in the layout of gradients, by layer, of all ranks on every rank."""
    distribution = kfac.distribution
    if not distribution.counts_are_local:  # every rank has all of it
        return {name: host_copy(matrix) for name, matrix in own.items()}
    names: set[str] = set()
    for part in distribution.communicator.all_gather_object(list(own), tag="kfac/state"):
        names.update(part)
    held = [(i, layer) for i, layer in enumerate(kfac.layers) if layer.name in names]
    slots = [
        Slot(distribution.decider(i), own.get(x.name), x.gradient_shape, x.empty()) for i, x in held
    ]
    return {x.name: t for (_, x), t in zip(held, distribution.from_owners(slots), strict=True)}


def _collect_snapshots(
    distribution: Distribution, refresh: Refresh
) -> dict[str, dict[str, list[Tensor]]]:
    own = {key: len(tensors) for key, tensors in refresh.snapshots.items()}
    lengths: dict[tuple[str, str], int] = {}
    for part in distribution.communicator.all_gather_object(own, tag="kfac/state"):
        lengths.update(part)
    slots, names = [], []
    for index, layer in enumerate(distribution.layers):
        like = layer.empty()
        for factor, shape in layer.factor_shapes.items():
            key = (layer.name, factor)
            for place in range(lengths.get(key, 0)):
                tensor = refresh.snapshots[key][place] if key in refresh.snapshots else None
                slots.append(Slot(distribution.decider(index), tensor, shape, like))
                names.append(key)
    collected: dict[str, dict[str, list[Tensor]]] = {}
    for (name, factor), tensor in zip(names, distribution.from_owners(slots), strict=True):
        collected.setdefault(name, {}).setdefault(factor, []).append(tensor)
    return collected


def _check(state: Mapping[str, Any], options: Mapping[str, Any], layers: Sequence[Layer]) -> None:
    """Refuses a state that another model, other options or another version wrote."""
    if state.get("version") != STATE_VERSION:
        raise StateError(
            "unknown version of K-FAC state", given=state.get("version"), allowed=STATE_VERSION
        )
    for key, value in options.items():
        saved = state["options"].get(key)
        if saved != value:
            raise StateError(
                f"the K-FAC state was saved with another {key}",
                given=saved,
                allowed=value,
                change=f"build KFAC with {key}={saved!r} or start without this state",
            )
    names, known = {layer.name for layer in layers}, set(state["layers"])
    if names != known:
        raise StateError(
            "the K-FAC state belongs to another model",
            given="layers only in the state: " + (", ".join(sorted(known - names)) or "none"),
            allowed="layers only in the model: " + (", ".join(sorted(names - known)) or "none"),
        )
    for layer in layers:
        layer.check(state["layers"][layer.name])


def _count_from(kfac: Stateful, counters: Mapping[str, int]) -> None:
    kfac.counters.clear()
    kfac.counters.update(counters)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
