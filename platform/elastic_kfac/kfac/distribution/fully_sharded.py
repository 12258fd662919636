"""K-FAC of a model that `fully_shard` (FSDP2) keeps in pieces: one owner per layer.

    gradients     averaged and in pieces, as FSDP leaves them
    reduce        reduce-scatter of packed statistics ──────────▶ owner of a layer: global sums
    bring         all-to-all of the pieces of each gradient ────▶ owner of its layer alone
    owner         averages factors, decomposes, preconditions
    publish       all-to-all of the pieces of the result ───────▶ the rank whose piece it is

Factors and decompositions live at the owner only: about 1/W of the whole per rank. Between the backward
pass and the step, the sums of statistics that are due are whole on every rank, as everywhere. A gradient
crosses the links twice, once to its owner and once back; no other rank ever holds all of it. With a mesh
of two dimensions (HSDP) it comes from the ranks of the owner's own replica and goes to all.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config.kfac import ShardedConfig
from elastic_kfac.curvature.dtensors import is_sharded, local
from elastic_kfac.curvature.layer import Layer
from elastic_kfac.errors import ConfigError
from elastic_kfac.kfac.distribution.sharded import ShardedByOwner
from elastic_kfac.kfac.distribution.strategy import Basis, States
from elastic_kfac.kfac.options import Rates
from elastic_kfac.kfac.shapes import Unit, find_units
from elastic_kfac.placement.plan import Plan


class Piece(NamedTuple):
    """What one rank holds of a parameter."""

    dim: int
    start: int
    length: int
    replica: tuple[int, ...]
    """The place in the dimensions of the mesh that replicate."""

    def of(self, whole: Tensor) -> Tensor:
        """A view of this piece of the whole."""
        return whole.narrow(self.dim, self.start, self.length)


def pieces(parameter: Any, ranks: Sequence[int]) -> list[Piece]:
    """Of a parameter, by rank of a communicator whose ranks are these global ones.

    `fully_shard` cuts like `torch.chunk`: later ranks may hold less, or nothing.

    Raises:
        ConfigError: If the mesh has other ranks.
    """
    mesh = parameter.device_mesh.mesh
    if sorted(mesh.flatten().tolist()) != sorted(ranks):
        raise ConfigError(
            "KFAC and fully_shard are about different ranks",
            given=f"a mesh of {mesh.flatten().tolist()}",
            allowed=f"{list(ranks)}",
            change="pass the mesh's ranks as process_group",
        )
    dim = parameter.placements[-1].dim
    size = parameter.shape[dim]
    full = -(-size // mesh.shape[-1])
    found = []
    for rank in ranks:
        *replica, index = (mesh == rank).nonzero()[0].tolist()
        start = min(size, index * full)
        found.append(Piece(dim, start, min(full, size - start), tuple(replica)))
    return found


class FullySharded(ShardedByOwner):
    """Averaged gradients in pieces in, preconditioned ones in pieces out."""

    sums_gradients = False

    def __init__(self, basis: Basis, *, model: nn.Module) -> None:
        layers, options = basis.layers, basis.options
        whole = next((x.name for x in layers if not all(map(is_sharded, x.parameters))), None)
        if whole is not None:
            raise ConfigError(
                "K-FAC needs all covered layers inside fully_shard, or none",
                given=f"layer {whole} outside",
                change=f"call fully_shard on the whole model, or name {whole} in skip_layers",
            )
        if options.weight_decay:
            raise ConfigError(
                "weight_decay of K-FAC needs whole weights, and fully_shard has them in pieces",
                given=options.weight_decay,
                change="set weight_decay of the optimizer",
            )
        if options.grad_worker_frac not in (type(options)().grad_worker_frac, "auto"):
            warnings.warn(
                "grad_worker_frac has no effect on a fully sharded model: each layer has one owner",
                UserWarning,
                stacklevel=5,
            )
        self._whole: dict[nn.Parameter, Any] = {}
        """The gradients in pieces of parameters whose `.grad` is the whole one just now."""
        self._covered = {p for layer in layers for p in layer.parameters}
        super().__init__(basis, model=model, sharding=ShardedConfig())

    def _find_units(self, model: nn.Module, layers: Sequence[Layer]) -> list[Unit]:
        return [unit for unit in find_units(model, layers) if unit.layers]

    def join(
        self,
        communicator: Communicator,
        previous: Plan | None = None,
        previous_ranks: Sequence[int | None] | None = None,
    ) -> None:
        group = communicator.group
        ranks = [0] if group is None else dist.get_process_group_ranks(group)
        if group is None and dist.is_initialized():
            ranks = [dist.get_rank()]
        parameters = [p for unit in self.units for p in unit.parameters.values()]
        self._pieces = {p: pieces(p, ranks) for p in parameters}
        super().join(communicator, previous, previous_ranks)

    def preconditioned_here(self, states: States) -> list[int]:
        indices = super().preconditioned_here(states)
        return [index for index in indices if self.layers[index].has_gradient()]

    def unowned(self, parameters: Iterable[nn.Parameter]) -> Iterable[nn.Parameter]:
        own = {p for unit in self.owned for p in unit.parameters.values()}
        return (p for p in parameters if p not in self._covered or p in own)

    # -- gradients ------------------------------------------------------------------------------

    def bring(self) -> None:
        self._whole = {}
        for gradients in self._by_dtype():
            device = gradients[0][0].grad.device  # type: ignore[union-attr]
            outgoing: list[list[Tensor]] = [[] for _ in self._by_owner]
            incoming: list[list[Tensor]] = [[] for _ in self._by_owner]
            for p, owner in gradients:
                grad: Any = p.grad
                held = self._pieces[p]
                mine = held[self.rank]
                if owner == self.rank:
                    whole = torch.empty(p.shape, dtype=grad.dtype, device=device)
                    for rank, piece in enumerate(held):
                        if rank != owner and piece.replica == mine.replica:
                            incoming[rank].append(piece.of(whole))
                    mine.of(whole).copy_(local(grad))
                    self._whole[p] = grad
                    p.grad = whole
                elif held[owner].replica == mine.replica:
                    outgoing[owner].append(local(grad))
            self._exchange(outgoing, incoming, tag="fsdp/gather")

    def publish(self, rates: Rates, step: int) -> None:
        for gradients in self._by_dtype():
            outgoing: list[list[Tensor]] = [[] for _ in self._by_owner]
            incoming: list[list[Tensor]] = [[] for _ in self._by_owner]
            for p, owner in gradients:
                held = self._pieces[p]
                if owner != self.rank:
                    assert p.grad is not None
                    incoming[owner].append(local(p.grad))
                    continue
                for rank, piece in enumerate(held):
                    if rank != owner:
                        outgoing[rank].append(piece.of(p.grad))  # type: ignore[arg-type]
            self._exchange(outgoing, incoming, tag="fsdp/scatter")
        for p, grad in self._whole.items():
            assert p.grad is not None
            local(grad).copy_(self._pieces[p][self.rank].of(p.grad))
            p.grad = grad
        self._whole = {}

    def _by_dtype(self) -> list[list[tuple[nn.Parameter, int]]]:
        """Parameters with a gradient, and their owners, in one order on all ranks."""
        groups: dict[torch.dtype, list[tuple[nn.Parameter, int]]] = {}
        for owner, units in enumerate(self._by_owner):
            for p in chain.from_iterable(unit.parameters.values() for unit in units):
                if p.grad is not None:
                    groups.setdefault(p.grad.dtype, []).append((p, owner))
        return list(groups.values())

    def _exchange(
        self,
        outgoing: Sequence[Sequence[Tensor]],
        incoming: Sequence[Sequence[Tensor]],
        *,
        tag: str,
    ) -> None:
        """Sends tensors to each rank; fills those that come from each."""
        if self.communicator.world_size == 1:
            return
        like = next(chain(chain.from_iterable(outgoing), chain.from_iterable(incoming)), None)
        if like is None:  # owner of everything that is there, or of nothing: still takes part
            like = local(next(iter(self._pieces)))
        came = self.communicator.all_to_all(
            torch.cat([like.new_empty(0), *(t.reshape(-1) for t in chain(*outgoing))]),
            tag=tag,
            send_counts=[sum(t.numel() for t in part) for part in outgoing],
            receive_counts=[sum(t.numel() for t in part) for part in incoming],
        )
        targets = list(chain(*incoming))
        for target, part in zip(targets, came.split([t.numel() for t in targets]), strict=True):
            target.copy_(part.view(target.shape))

    def restore_velocity(self, saved: Mapping[str, Tensor]) -> None:
        super(ShardedByOwner, self).restore_velocity(saved)
