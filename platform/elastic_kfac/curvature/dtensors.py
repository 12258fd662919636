"""Parameters that `fully_shard` keeps in pieces: which ones K-FAC can work with, and their local part.

Between passes such a parameter and its gradient are DTensors, and each rank holds a piece; during a pass
the module holds the whole one as a plain parameter (FSDP2's `unsharded_param`), so that the passes of
layers are seen as ever. Tensor-parallel layers are not: their inputs or outputs are pieces themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from elastic_kfac.errors import ConfigError


def is_sharded(tensor: object) -> bool:
    """Whether it is a DTensor."""
    return hasattr(tensor, "to_local")


def local(tensor: Tensor) -> Tensor:
    """This rank's piece of a DTensor; a plain tensor is its own."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def any_nonzero(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each tensor has an element other than 0; one transfer to the host for all. Collective over
    the mesh of those that are DTensors: a piece of zeros says nothing about the others."""
    first: Any = next(filter(is_sharded, tensors), None)
    parts = [local(tensor) for tensor in tensors]
    flags = torch.stack([part.any().to(parts[0].device) for part in parts])
    if first is not None:
        from torch.distributed.tensor import DTensor, Partial

        mesh = first.device_mesh
        pieces = DTensor.from_local(flags.int(), mesh, [Partial("max")] * mesh.ndim)
        flags = pieces.full_tensor() > 0
    found: list[bool] = flags.tolist()
    return found


def refuse_old_wrapper(model: nn.Module) -> None:
    """Raises ConfigError for FullyShardedDataParallel (FSDP1): its weights are views of flat buffers."""
    if any(hasattr(module, "_fsdp_wrapped_module") for module in model.modules()):
        raise ConfigError(
            "K-FAC does not see the layers inside FullyShardedDataParallel (FSDP1)",
            change="use torch.distributed.fsdp.fully_shard (FSDP2) or DistributedDataParallel",
        )


def fully_sharded(model: nn.Module) -> set[int]:
    """Identities of the DTensor parameters that `fully_shard` alone has cut."""
    if not any(map(is_sharded, model.parameters())):
        return set()
    from torch.distributed.fsdp import FSDPModule

    roots = [module for module in model.modules() if isinstance(module, FSDPModule)]
    return {id(p) for root in roots for p in root.parameters() if _is_cut_once(p)}


def _is_cut_once(parameter: Any) -> bool:
    """Whether the last dimension of the mesh shards and the others replicate (FSDP or HSDP)."""
    if not is_sharded(parameter):
        return False
    *others, last = parameter.placements
    return last.is_shard() and all(placement.is_replicate() for placement in others)


def tensor_parallel(name: str) -> ConfigError:
    """What is wrong with a layer whose weight is a DTensor during its passes."""
    return ConfigError(
        "K-FAC does not precondition tensor-parallel layers",
        given=f"{name} with DTensor parameters that fully_shard did not make",
        change="name them in skip_layers, or shard with torch.distributed.fsdp.fully_shard only",
    )
