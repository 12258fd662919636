"""All-reduce in a compressed communication format, with error feedback.

Dense formats are reduced in two phases: every rank sends part j of its vector, encoded, to rank j; rank
j adds the decoded parts in rank order, in fp32 or better, encodes the sum and sends it to all ranks.
Sparse formats (top-k) are gathered whole and added by every rank. Either way all ranks decode the same
bytes and end with the same bits.

With error feedback a rank keeps the error of its encodings and adds it to its next vector (Seide et al.
2014; Karimireddy et al. 2019): the sums sent plus the residuals equal the sums of the gradients. A
checkpoint holds the residuals summed over ranks; after a resize rank 0 takes that sum.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.communication.v_collectives import all_gather_v
from elastic_kfac.communication.wire_formats import Rounding, WireFormat
from elastic_kfac.errors import StateError


class CompressedAllReduce:
    """Sums tensors over ranks in a communication format; keeps error-feedback residuals by tag.

    Args:
        wire: The format, for example `wire_format("int8")`.
        error_feedback: Whether to carry encoding errors into the next call with the same tag. None
            means for lossy formats only. Costs one residual of the tensor's size per tag.
    """

    def __init__(
        self,
        communicator: Communicator,
        wire: WireFormat,
        *,
        error_feedback: bool | None = None,
        seed: int = 0,
    ) -> None:
        self.communicator = communicator
        self.wire = wire
        self.error_feedback = wire.lossy if error_feedback is None else error_feedback
        self.seed = seed
        self.residuals: dict[str, Tensor] = {}

    def all_reduce(self, tensor: Tensor, *, step: int, tag: str) -> None:
        """Sums a floating-point tensor over the ranks, in place, up to the format's error.

        Args:
            tensor: Has the same shape on all ranks.
            step: Optimizer step; stochastic rounding depends on it, the seed and the rank only.
            tag: Name of the residual and of the counted traffic.
        """
        if self.communicator.world_size == 1 and tag not in self.residuals:
            return
        if self.wire.name == "fp32" and tensor.dtype == torch.float32:
            self.communicator.all_reduce(tensor, tag=tag)
            return
        dtype = torch.promote_types(tensor.dtype, torch.float32)
        flat = tensor.reshape(-1).to(dtype)
        residual = self.residuals.pop(tag, None)
        if residual is not None:
            flat = flat + residual
        if self.communicator.world_size == 1:
            total, lost = flat, None
        elif self.wire.sparse:
            total, lost = self._gather_all(flat, step, tag)
        else:
            total, lost = self._reduce_in_parts(flat, step, tag)
        if self.error_feedback and lost is not None:
            # An overflowed gradient must not stay in the residual for ever.
            kept = torch.zeros_like(lost) if residual is None else residual
            self.residuals[tag] = torch.where(torch.isfinite(lost), lost, kept)
        tensor.copy_(total.view(tensor.shape))

    def _rounding(self, step: int, phase: int) -> Rounding:
        return Rounding(self.seed, step, 2 * self.communicator.rank + phase)

    def _gather_all(self, flat: Tensor, step: int, tag: str) -> tuple[Tensor, Tensor]:
        encoded = self.wire.encode(flat, self._rounding(step, 0))
        lost = flat - self.wire.decode(encoded, flat.numel(), flat.dtype)
        total = torch.zeros_like(flat)
        for part in self.communicator.all_gather(encoded, tag=tag):
            total += self.wire.decode(part, flat.numel(), flat.dtype)
        return total, lost

    def _reduce_in_parts(self, flat: Tensor, step: int, tag: str) -> tuple[Tensor, Tensor]:
        p, rank, n = self.communicator.world_size, self.communicator.rank, flat.numel()
        bounds = [n * part // p for part in range(p + 1)]
        counts = [bounds[part + 1] - bounds[part] for part in range(p)]
        sizes = [self.wire.encoded_bytes(count) for count in counts]
        # One stream of random numbers per part, or parts would share their rounding.
        rounding = self._rounding(step, 0)
        encoded = [
            self.wire.encode(
                flat[bounds[part] : bounds[part + 1]],
                Rounding(rounding.seed, rounding.step, (rounding.stream << 32) + part),
            )
            for part in range(p)
        ]
        lost = torch.cat(
            [
                flat[bounds[part] : bounds[part + 1]]
                - self.wire.decode(encoded[part], counts[part], flat.dtype)
                for part in range(p)
            ]
        )
        received = self.communicator.all_to_all(
            torch.cat(encoded), tag=tag, send_counts=sizes, receive_counts=[sizes[rank]] * p
        )
        own = torch.zeros(counts[rank], dtype=flat.dtype, device=flat.device)
        for piece in received.split(sizes[rank]) if sizes[rank] else ():
            own += self.wire.decode(piece, counts[rank], flat.dtype)
        result = self.wire.encode(own, self._rounding(step, 1))
        own -= self.wire.decode(result, counts[rank], flat.dtype)
        lost[bounds[rank] : bounds[rank + 1]] += own
        gathered = all_gather_v(self.communicator, result, sizes, method="padded", tag=tag)
        total = torch.cat(
            [
                self.wire.decode(piece, count, flat.dtype)
                for piece, count in zip(gathered.split(sizes), counts, strict=True)
            ]
        )
        return total, lost

    # -- state ------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Tensor]:
        """Residuals summed over the ranks, by tag: independent of the world size. Collective.

        The residual of a killed rank is lost: the error of one step's encoding, no sample.
        """
        everywhere = self.communicator.all_gather_object(
            {name: (residual.numel(), residual.dtype) for name, residual in self.residuals.items()},
            tag="compression/state",
        )
        shapes = {name: shape for one in everywhere for name, shape in one.items()}
        device = next(iter(self.residuals.values())).device if self.residuals else None
        state = {}
        for name, (count, dtype) in sorted(shapes.items()):
            own = self.residuals.get(name)
            total = torch.zeros(count, dtype=dtype, device=device) if own is None else own.clone()
            self.communicator.all_reduce(total, tag="compression/state")
            state[name] = total
        return state

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Loads residuals into rank 0, so that their sum over ranks is the saved one.

        Raises:
            StateError: If an entry is not a flat floating-point residual.
        """
        for name, residual in state.items():
            if residual.dim() != 1 or not residual.is_floating_point():
                raise StateError("not an error-feedback residual", given=name)
        if self.communicator.rank == 0:
            self.residuals = {name: residual.clone() for name, residual in state.items()}
        else:
            self.residuals = {}
