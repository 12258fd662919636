"""The saved form of K-FAC's layers: by name, at no world size."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from elastic_kfac.curvature.block import Block
from elastic_kfac.errors import StateError


def save_layers(
    blocks: Sequence[Block], second_order: Sequence[Mapping[str, Tensor]]
) -> dict[str, Any]:
    """Factors, decompositions in use and their ages, by layer name."""
    return {
        block.name: {
            "factor_updates": block.factor_updates,
            "inverse_step": block.inverse_step,
            "factors": {name: tensor.clone() for name, tensor in block.factors.items()},
            "second_order": {name: tensor.clone() for name, tensor in tensors.items()},
        }
        for block, tensors in zip(blocks, second_order, strict=True)
    }


def check_state(
    state: Mapping[str, Any], version: int, identity: Mapping[str, Any], blocks: Sequence[Block]
) -> None:
    """Refuses a state that another model, other options or another version wrote.

    Raises:
        StateError: With what differs.
    """
    if state.get("version") != version:
        raise StateError(
            "unknown version of K-FAC state", given=state.get("version"), allowed=version
        )
    for key, value in identity.items():
        saved = state["options"].get(key)
        if saved != value:
            raise StateError(
                f"the K-FAC state was saved with another {key}",
                given=saved,
                allowed=value,
                change=f"build KFAC with {key}={saved!r} or start without this state",
            )
    names, known = {block.name for block in blocks}, set(state["layers"])
    if names != known:
        raise StateError(
            "the K-FAC state belongs to another model",
            given="layers only in the state: " + (", ".join(sorted(known - names)) or "none"),
            allowed="layers only in the model: " + (", ".join(sorted(names - known)) or "none"),
        )
    for block in blocks:
        block.check_state(state["layers"][block.name])


def load_layers(
    blocks: Sequence[Block], layers: Mapping[str, Any], keeps: Callable[[Block], bool]
) -> None:
    """Puts saved layers in place; decompositions only where this rank uses them."""
    for block in blocks:
        part = layers[block.name]
        block.drop_pending()
        block.factor_updates = int(part["factor_updates"])
        block.inverse_step = int(part["inverse_step"])
        block.factors = block.placed(part["factors"])
        block.second_order = block.placed(part["second_order"]) if keeps(block) else {}


def memory_usage(blocks: Sequence[Block]) -> dict[str, int]:
    """Bytes that a rank holds: factors, second_order, pending sums, and their total."""
    usage = {"factors": 0, "second_order": 0, "pending": 0}
    for block in blocks:
        usage["factors"] += _bytes(block.factors.values())
        usage["second_order"] += _bytes(block.second_order.values())
        usage["pending"] += _bytes(block.pending.outputs.values())
        if block.pending.inputs is not None:
            usage["pending"] += _bytes([block.pending.inputs])
    return {**usage, "total": sum(usage.values())}


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
