"""Collectives of torch.distributed as the other rooms see them.

A `Communicator` is a process group in which ranks are numbered from 0, every collective carries a
tag under which it is counted, and a peer that dies turns into one `CommunicationError` that names
the collective, its tag and this rank. A world of one needs no torch.distributed at all.

Every collective of a communicator is called by all of its members in the same order. Tensors of
zero elements are not sent (all members know the size), and collectives of one rank return at once.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_kfac.communication.counters import (
    CommunicationCounters,
    all_gather_received,
    all_reduce_received,
    reduce_scatter_received,
)
from elastic_kfac.communication.work import Work, clear_errors
from elastic_kfac.errors import CommunicationError, UsageError

__all__ = ["Communicator", "Work"]


class Communicator:
    """A process group as its users see it: ranks 0 … world_size-1, counted, with clear errors.

    `Communicator(None)` is a world of one. `world()` is the default process group where one exists.
    `members` are this communicator's ranks in the numbering of the one it was cut from.
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None,
        *,
        counters: CommunicationCounters | None = None,
        members: Sequence[int] | None = None,
    ) -> None:
        self.group = group
        self.rank: int = 0 if group is None else dist.get_rank(group)
        self.world_size: int = 1 if group is None else dist.get_world_size(group)
        if self.rank < 0:
            raise UsageError(
                "this process is not a member of the given process group",
                change="call it on the group's members only",
            )
        self.counters = CommunicationCounters() if counters is None else counters
        self.members = tuple(range(self.world_size) if members is None else members)
        self._subgroups: dict[tuple[int, ...], Communicator | None] = {}

    @classmethod
    def solo(cls) -> Communicator:
        """A world of one rank; needs no torch.distributed."""
        return cls(None)

    @classmethod
    def world(cls) -> Communicator:
        """The default process group, or `solo()` when none is initialised."""
        if dist.is_available() and dist.is_initialized():
            return cls(dist.group.WORLD)
        return cls.solo()

    def __repr__(self) -> str:
        return f"Communicator(rank={self.rank}, world_size={self.world_size})"

    # -- reductions -------------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor, *, tag: str, async_op: bool = False) -> Work:
        """Sum `tensor` over all ranks, in place."""
        if self._nothing_to_send(tensor):
            return Work()
        size = _bytes(tensor)
        self.counters.add(tag, size, all_reduce_received(size, self.world_size))
        buffer, finish = _contiguous(tensor)
        return self._start(
            "all_reduce",
            tag,
            lambda: dist.all_reduce(buffer, group=self.group, async_op=async_op),
            finish,
            async_op,
        )

    def reduce(self, tensor: Tensor, dst: int, *, tag: str, async_op: bool = False) -> Work:
        """Sum `tensor` at rank `dst`, in place; elsewhere its content is undefined afterwards."""
        self._check_rank(dst)
        if self._nothing_to_send(tensor):
            return Work()
        size = _bytes(tensor)
        starts = (dst + 1) % self.world_size
        self.counters.add(tag, size, 0 if self.rank == starts else size)
        buffer, finish = _contiguous(tensor)
        return self._start(
            "reduce",
            tag,
            lambda: dist.reduce(buffer, group_dst=dst, group=self.group, async_op=async_op),
            finish,
            async_op,
        )

    def reduce_scatter(
        self, output: Tensor, tensor: Tensor, *, tag: str, async_op: bool = False
    ) -> Work:
        """Sum the input [world_size * n] over all ranks; rank r keeps part r in `output` [n]."""
        if tensor.numel() != output.numel() * self.world_size:
            raise UsageError(
                "reduce_scatter needs an input of world_size times the output",
                given=f"{tensor.numel()} elements for {self.world_size} x {output.numel()}",
            )
        if self._nothing_to_send(tensor):
            output.copy_(tensor.reshape(output.shape))
            return Work()
        size = _bytes(tensor)
        self.counters.add(tag, size, reduce_scatter_received(size, self.world_size))
        source = tensor.contiguous().view(-1)
        buffer, finish = _contiguous(output)
        flat = buffer.view(-1)
        return self._start(
            "reduce_scatter",
            tag,
            lambda: dist.reduce_scatter_tensor(flat, source, group=self.group, async_op=async_op),
            finish,
            async_op,
        )

    # -- copies -----------------------------------------------------------------------------------

    def broadcast(self, tensor: Tensor, src: int, *, tag: str, async_op: bool = False) -> Work:
        """Copy `tensor` of rank `src` (a rank of this communicator) into `tensor` everywhere."""
        self._check_rank(src)
        if self._nothing_to_send(tensor):
            return Work()
        size = _bytes(tensor)
        self.counters.add(tag, size, 0 if self.rank == src else size)
        buffer, finish = _contiguous(tensor)
        return self._start(
            "broadcast",
            tag,
            lambda: dist.broadcast(buffer, group_src=src, group=self.group, async_op=async_op),
            finish if self.rank != src else None,
            async_op,
        )

    def all_gather(self, tensor: Tensor, *, tag: str) -> list[Tensor]:
        """The tensors of all ranks, which have the same shape and dtype, in rank order."""
        if self._nothing_to_send(tensor):
            return [tensor.clone() for _ in range(self.world_size)]
        gathered = tensor.new_empty((self.world_size, *tensor.shape))
        self.all_gather_into(gathered, tensor, tag=tag).wait()
        return list(gathered.unbind(0))

    def all_gather_into(
        self, output: Tensor, tensor: Tensor, *, tag: str, async_op: bool = False
    ) -> Work:
        """Gather every rank's `tensor` [n] into the contiguous `output` [world_size * n]."""
        if output.numel() != tensor.numel() * self.world_size or not output.is_contiguous():
            raise UsageError(
                "all_gather needs a contiguous output of world_size times the input",
                given=f"{output.numel()} elements for {self.world_size} x {tensor.numel()}",
            )
        if self._nothing_to_send(tensor):
            output.copy_(tensor.reshape(output.shape))
            return Work()
        size = _bytes(tensor)
        self.counters.add(tag, size, all_gather_received(size, self.world_size))
        source = tensor.contiguous().view(-1)
        return self._start(
            "all_gather",
            tag,
            lambda: dist.all_gather_into_tensor(
                output.view(-1), source, group=self.group, async_op=async_op
            ),
            None,
            async_op,
        )

    def all_to_all(
        self,
        tensor: Tensor,
        *,
        tag: str,
        send_counts: Sequence[int] | None = None,
        receive_counts: Sequence[int] | None = None,
    ) -> Tensor:
        """Send row block j of `tensor` to rank j; returns the blocks received, in rank order.

        The counts are rows of dimension 0 per peer; None means equal blocks.
        """
        if send_counts is None:
            if tensor.shape[0] % self.world_size:
                raise UsageError(
                    "all_to_all in equal blocks needs rows divisible by the world size",
                    given=f"{tensor.shape[0]} rows for {self.world_size} ranks",
                    change="pass send_counts and receive_counts",
                )
            send_counts = [tensor.shape[0] // self.world_size] * self.world_size
        received = list(send_counts if receive_counts is None else receive_counts)
        if self.world_size == 1:
            return tensor.clone()
        output = tensor.new_empty((sum(received), *tensor.shape[1:]))
        row_bytes = tensor.element_size() * (tensor[0].numel() if len(tensor) else 0)
        if not row_bytes and len(output):
            row_bytes = output.element_size() * output[0].numel()
        self.counters.add(tag, _bytes(tensor), row_bytes * (sum(received) - received[self.rank]))
        with self._translated("all_to_all", tag):
            dist.all_to_all_single(
                output, tensor.contiguous(), received, list(send_counts), group=self.group
            )
        return output

    # -- objects ----------------------------------------------------------------------------------

    def all_gather_object(self, obj: Any, *, tag: str) -> list[Any]:
        """The (pickled) objects of all ranks, in rank order."""
        if self.world_size == 1:
            return [obj]
        size = len(pickle.dumps(obj))
        self.counters.add(tag, size, all_gather_received(size, self.world_size))
        objects: list[Any] = [None] * self.world_size
        with self._translated("all_gather_object", tag):
            dist.all_gather_object(objects, obj, group=self.group)
        return objects

    def broadcast_object(self, obj: Any, src: int, *, tag: str) -> Any:
        """Rank `src`'s (pickled) object on every rank; what the others pass in is ignored."""
        self._check_rank(src)
        if self.world_size == 1:
            return obj
        carried = [obj if self.rank == src else None]
        with self._translated("broadcast_object", tag):
            dist.broadcast_object_list(carried, group_src=src, group=self.group)
        size = len(pickle.dumps(carried[0]))
        self.counters.add(tag, size, 0 if self.rank == src else size)
        return carried[0]

    # -- point to point ---------------------------------------------------------------------------

    def send(self, tensor: Tensor, dst: int, *, tag: str) -> Work:
        """Start to send `tensor` to rank `dst`, which calls `recv`; wait before overwriting it."""
        return self._point_to_point("send", tensor, dst, tag)

    def recv(self, tensor: Tensor, src: int, *, tag: str) -> Work:
        """Start to receive from rank `src` into the contiguous `tensor`."""
        return self._point_to_point("recv", tensor, src, tag)

    def exchange(
        self,
        outgoing: Tensor | None,
        dst: int,
        incoming: Tensor | None,
        src: int,
        *,
        tag: str,
    ) -> None:
        """Send to `dst` and receive from `src` at the same time; None or empty sends nothing."""
        operations = []
        if outgoing is not None and outgoing.numel():
            self._check_rank(dst)
            self.counters.add(tag, _bytes(outgoing), 0)
            operations.append(
                dist.P2POp(dist.isend, outgoing.contiguous(), group=self.group, group_peer=dst)
            )
        finish = None
        if incoming is not None and incoming.numel():
            self._check_rank(src)
            self.counters.add(tag, _bytes(incoming), _bytes(incoming))
            buffer, finish = _contiguous(incoming)
            operations.append(dist.P2POp(dist.irecv, buffer, group=self.group, group_peer=src))
        if not operations:
            return
        with self._translated("exchange", tag):
            for handle in dist.batch_isend_irecv(operations):
                handle.wait()
        if finish is not None:
            finish()

    def _point_to_point(self, kind: str, tensor: Tensor, peer: int, tag: str) -> Work:
        self._check_rank(peer)
        if peer == self.rank:
            raise UsageError(f"{kind} needs another rank", given=f"its own rank {peer}")
        if tensor.numel() == 0:
            return Work()
        size = _bytes(tensor)
        self.counters.add(tag, size, size if kind == "recv" else 0)
        if kind == "send":
            buffer = tensor.contiguous()
            return self._start(
                kind,
                tag,
                lambda: dist.isend(buffer, group_dst=peer, group=self.group),
                None,
                True,
            )
        buffer, finish = _contiguous(tensor)
        return self._start(
            kind,
            tag,
            lambda: dist.irecv(buffer, group_src=peer, group=self.group),
            finish,
            True,
        )

    # -- groups -----------------------------------------------------------------------------------

    def barrier(self, *, tag: str = "barrier") -> None:
        """Return when every member has come here."""
        if self.world_size > 1:
            with self._translated("barrier", tag):
                dist.barrier(group=self.group)

    def subgroup(self, ranks: Sequence[int]) -> Communicator | None:
        """The communicator of `ranks` (ranks of this one, taken in ascending order).

        Collective: ALL members of this communicator call it with the same ranks in the same order,
        also those that are not in it, which get None. Kept by ranks, so asking again costs nothing.
        It shares this communicator's counters and timeout.
        """
        key = tuple(sorted({int(rank) for rank in ranks}))
        if not key or key[0] < 0 or key[-1] >= self.world_size:
            raise UsageError(
                "a subgroup needs ranks of its communicator",
                given=list(ranks),
                allowed=f"0 to {self.world_size - 1}",
            )
        if key not in self._subgroups:
            self._subgroups[key] = self._make_subgroup(key)
        return self._subgroups[key]

    def _make_subgroup(self, key: tuple[int, ...]) -> Communicator | None:
        group: dist.ProcessGroup | None = None
        if len(key) > 1:
            if len(key) == self.world_size:
                group = self.group
            else:
                group = self._new_group(key)
        if self.rank not in key:
            return None
        return Communicator(group, counters=self.counters, members=key)

    def _new_group(self, key: tuple[int, ...]) -> dist.ProcessGroup | None:
        assert self.group is not None
        global_ranks = [dist.get_global_rank(self.group, rank) for rank in key]
        with self._translated("new_group", "subgroup"):
            made = dist.new_group(
                global_ranks,
                timeout=self._timeout(),
                # torch makes a group by a call of the whole default group; members of a part can
                # only synchronise among themselves.
                use_local_synchronization=self.group is not dist.group.WORLD,
            )
        return made if isinstance(made, dist.ProcessGroup) else None

    def release_subgroups(self) -> None:
        """Destroy the groups made by `subgroup`. Collective, after the last use of any of them."""
        for ranks, member in self._subgroups.items():
            if member is not None and 1 < len(ranks) < self.world_size:
                member.release_subgroups()
                dist.destroy_process_group(member.group)
        self._subgroups.clear()

    def _timeout(self) -> timedelta | None:
        # torch gives a new group its own default (30 min) instead of the parent's, with which a
        # dead peer would be noticed only after half an hour.
        assert self.group is not None
        for device in ("cuda", "cpu"):
            try:
                return self.group._get_backend(torch.device(device)).options._timeout
            except (RuntimeError, AttributeError):
                continue
        return None

    # -- inside -----------------------------------------------------------------------------------

    def _nothing_to_send(self, tensor: Tensor) -> bool:
        return self.world_size == 1 or tensor.numel() == 0

    def _check_rank(self, rank: int) -> None:
        if not 0 <= rank < self.world_size:
            raise UsageError(
                "no such rank in this communicator",
                given=rank,
                allowed=f"0 to {self.world_size - 1}",
            )

    def _start(
        self,
        collective: str,
        tag: str,
        call: Callable[[], Any],
        finish: Callable[[], None] | None,
        async_op: bool,
    ) -> Work:
        with self._translated(collective, tag):
            handle = call()
        work = Work(
            handle if async_op else None,
            finish=finish,
            where=lambda: self._translated(collective, tag),
        )
        if not async_op:
            work.wait()
        return work

    @contextmanager
    def _translated(self, collective: str, tag: str) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            with clear_errors(collective, tag, self.rank, self.world_size):
                yield
        except CommunicationError:
            self.counters.errors += 1
            raise
        finally:
            self.counters.waited_s += time.perf_counter() - begin


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _contiguous(tensor: Tensor) -> tuple[Tensor, Callable[[], None] | None]:
    """A contiguous buffer with the tensor's content, and how its result gets back."""
    if tensor.is_contiguous():
        return tensor, None
    buffer = tensor.contiguous()

    def finish() -> None:
        tensor.copy_(buffer)

    return buffer, finish
