"""Units of ownership: what exactly one rank computes and keeps in a sharded optimizer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from elastic_kfac.curvature.block import Block
from elastic_kfac.curvature.capture import clean_name, unwrap
from elastic_kfac.errors import ConfigError


@dataclass(frozen=True)
class Unit:
    """What one rank owns as a whole: a covered layer, or a parameter outside all of them."""

    name: str
    parameters: tuple[tuple[str, nn.Parameter], ...]
    block: Block | None

    @property
    def elements(self) -> int:
        """Of its parameters together."""
        return sum(p.numel() for _, p in self.parameters)


def find_units(model: nn.Module, blocks: Sequence[Block]) -> list[Unit]:
    """Covered layers in registration order, then every other trainable parameter."""
    names = {
        id(p): clean_name(name) for name, p in unwrap(model).named_parameters() if p.requires_grad
    }
    units: list[Unit] = []
    covered: set[int] = set()
    for block in blocks:
        parameters = block.parameters
        if any(id(p) in covered for p in parameters):
            raise ConfigError(
                f"layer {block.name} shares a parameter with another block",
                allowed="layers that own their weights (nn.MultiheadAttention packs three in one)",
                change=f"add {block.name.rpartition('.')[0]} to skip_layers, or use KFAC",
            )
        covered.update(id(p) for p in parameters)
        units.append(Unit(block.name, tuple((names[id(p)], p) for p in parameters), block))
    for name, parameter in unwrap(model).named_parameters():
        if parameter.requires_grad and id(parameter) not in covered:
            units.append(Unit(clean_name(name), ((clean_name(name), parameter),), None))
    return units
