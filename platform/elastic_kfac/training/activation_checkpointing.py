"""Trades a second forward pass for the memory of activations (Chen et al. 2016)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The modules whose activations are dropped: a network's blocks, or the whole flat network."""
    return list(_blocks(model)) or [model]


def checkpoint_activations(model: nn.Module) -> int:
    """Makes every block recompute its activations in the backward pass.

    Names of parameters and modules stay as they are, so states fit with and without.

    Returns:
        The number of blocks.
    """
    blocks = blocks_of(model)
    for block in blocks:
        _wrap(block)
    return len(blocks)


def _wrap(block: nn.Module) -> None:
    forward = block.forward

    def recomputed(*inputs: Any, **named: Any) -> Any:
        if not block.training:
            return forward(*inputs, **named)
        return checkpoint(forward, *inputs, use_reentrant=False, **named)

    block.forward = recomputed


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    for child in module.children():
        if not list(child.children()):
            continue
        is_container = isinstance(child, (nn.Sequential, nn.ModuleList))
        if is_container and any(list(part.children()) for part in child.children()):
            yield from _blocks(child)
        else:
            yield child
