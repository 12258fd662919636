"""Collectives of torch.distributed with counted traffic and errors that name their collective.

A `Communicator` is a process group with ranks numbered from 0. Every collective carries a tag under
which its traffic is counted. A peer that dies raises one `CommunicationError` that names the collective,
its tag and this rank. A world of one needs no torch.distributed.

All members of a communicator call its collectives in the same order. Tensors of zero elements are not
sent (all members know the size), and collectives of one rank return at once.
"""

from __future__ import annotations

import atexit
import math
import pickle
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from fractions import Fraction
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
from elastic_kfac.communication.shutdown import settle
from elastic_kfac.errors import CommunicationError, UsageError

atexit.register(settle)


class Work:
    """A collective that was started; its tensors may be read after `wait()`."""

    def __init__(
        self,
        handle: Any = None,
        *,
        finish: Callable[[], None] | None = None,
        where: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self._handle = handle
        self._finish = finish
        self._where = where

    def wait(self) -> None:
        """Returns when the collective is complete on this rank (on a GPU: in stream order).

        Raises:
            CommunicationError: If a peer left, or did not answer within the group's timeout.
        """
        handle, self._handle = self._handle, None
        if handle is not None:
            with self._where():
                handle.wait()
        finish, self._finish = self._finish, None
        if finish is not None:
            finish()


class Communicator:
    """A process group with ranks 0 … world_size-1; None is a world of one.

    `members` are this communicator's ranks in the numbering of the communicator that it is part of.
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
        """Sums `tensor` over all ranks, in place."""
        received = all_reduce_received(_bytes(tensor), self.world_size)
        return self._in_place(
            "all_reduce",
            tensor,
            tag,
            received,
            lambda buffer: dist.all_reduce(buffer, group=self.group, async_op=async_op),
            async_op,
        )

    def reduce(self, tensor: Tensor, dst: int, *, tag: str, async_op: bool = False) -> Work:
        """Sums `tensor` at rank `dst`, in place; its content on other ranks is undefined afterwards."""
        self._check_rank(dst)
        starts = (dst + 1) % self.world_size
        return self._in_place(
            "reduce",
            tensor,
            tag,
            0 if self.rank == starts else _bytes(tensor),
            lambda buffer: dist.reduce(buffer, group_dst=dst, group=self.group, async_op=async_op),
            async_op,
        )

    def reduce_scatter(
        self, output: Tensor, tensor: Tensor, *, tag: str, async_op: bool = False
    ) -> Work:
        """Sums the input [world_size * n] over all ranks; rank r gets part r in `output` [n]."""
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
        """Copies `tensor` of rank `src` (a rank of this communicator) into `tensor` on all ranks."""
        self._check_rank(src)
        return self._in_place(
            "broadcast",
            tensor,
            tag,
            0 if self.rank == src else _bytes(tensor),
            lambda buffer: dist.broadcast(
                buffer, group_src=src, group=self.group, async_op=async_op
            ),
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
        """Gathers every rank's `tensor` [n] into the contiguous `output` [world_size * n]."""
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
        """Sends row block j of `tensor` to rank j; returns the received blocks in rank order.

        Counts are rows per peer; None means equal blocks.
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
        row_bytes = output.element_size() * math.prod(output.shape[1:])
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
        """Rank `src`'s (pickled) object on every rank; objects of other ranks are ignored."""
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

    def exchange(
        self,
        outgoing: Tensor | None,
        dst: int,
        incoming: Tensor | None,
        src: int,
        *,
        tag: str,
    ) -> None:
        """Sends to `dst` and receives from `src` at once; None or an empty tensor is no message."""
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

    # -- groups -----------------------------------------------------------------------------------

    def barrier(self, *, tag: str = "barrier") -> None:
        """Returns when every member has called it."""
        if self.world_size > 1:
            with self._translated("barrier", tag):
                dist.barrier(group=self.group)

    def meet(self, what: str, *, seconds: float) -> None:
        """Waits until every rank has come here; through the group's store, so that ranks that went on
        to other collectives are not disturbed.

        Raises:
            UsageError: If some rank has not come after `seconds`, or after the group's timeout if that
                is less.
        """
        if self.group is None or self.world_size == 1:
            return
        wait = min(timedelta(seconds=seconds), self._timeout() or timedelta.max)
        store, key = self.group.get_group_store(), f"elastic_kfac/{what}"
        arrived = store.add(key, 1)
        meeting = (arrived - 1) // self.world_size
        if arrived % self.world_size == 0:
            store.set(f"{key}/{meeting}", "met")
            store.delete_key(f"{key}/{meeting - 1}")  # everybody has read it
        try:
            store.wait([f"{key}/{meeting}"], wait)
        except dist.DistStoreError:
            came = store.add(key, -1) + 1 - meeting * self.world_size
            raise UsageError(
                f"{what} is collective",
                given=f"{came} of {self.world_size} ranks within {wait.total_seconds():g} s",
                change=f"call {what} on every rank",
            ) from None

    def subgroup(self, ranks: Sequence[int]) -> Communicator | None:
        """The communicator of `ranks` (ranks of this one, in ascending order); None for other ranks.

        Collective over all members of this communicator, including those outside `ranks`. Cached by
        ranks. It shares this communicator's counters and timeout.
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
        group = None
        if len(key) == self.world_size:
            group = self.group
        elif len(key) > 1:
            assert self.group is not None
            with self._translated("new_group", "subgroup"):
                made = dist.new_group(
                    [dist.get_global_rank(self.group, rank) for rank in key],
                    timeout=self._timeout(),
                    # torch synchronises the whole default group; members of a part of it can only
                    # synchronise among themselves.
                    use_local_synchronization=self.group is not dist.group.WORLD,
                )
            group = made if isinstance(made, dist.ProcessGroup) else None
        if self.rank not in key:
            return None
        return Communicator(group, counters=self.counters, members=key)

    def _timeout(self) -> timedelta | None:
        # torch gives a new group its default timeout (30 min) instead of the parent's: a dead peer
        # would be noticed only after half an hour.
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

    def _in_place(
        self,
        collective: str,
        tensor: Tensor,
        tag: str,
        received_bytes: Fraction | int,
        call: Callable[[Tensor], Any],
        async_op: bool,
    ) -> Work:
        if self._nothing_to_send(tensor):
            return Work()
        self.counters.add(tag, _bytes(tensor), received_bytes)
        buffer, finish = _contiguous(tensor)
        return self._start(collective, tag, lambda: call(buffer), finish, async_op)

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
            yield
        except RuntimeError as error:
            self.counters.errors += 1
            raise CommunicationError(
                f"{collective} '{tag}' failed on rank {self.rank} of {self.world_size}: "
                f"{_cause(str(error))}",
                change="see the log of the rank that left; the group cannot be used any more",
            ) from error
        finally:
            self.counters.waited_s += time.perf_counter() - begin


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _contiguous(tensor: Tensor) -> tuple[Tensor, Callable[[], None] | None]:
    """A contiguous buffer with the tensor's content, and a function that copies its result back."""
    if tensor.is_contiguous():
        return tensor, None
    buffer = tensor.contiguous()

    def finish() -> None:
        tensor.copy_(buffer)

    return buffer, finish


def _cause(message: str) -> str:
    lowered = message.lower()
    first_line = message.strip().splitlines()[0] if message.strip() else "no reason given"
    # The backend prefixes its own source position.
    first_line = re.sub(r"^\[[^\]]*:\d+\]\s*", "", first_line)[:200]
    if "timed out" in lowered or "timeout" in lowered:
        return f"a peer did not answer within the timeout ({first_line})"
    if any(word in lowered for word in ("closed", "reset by peer", "broken pipe", "refused")):
        return f"a peer left the group ({first_line})"
    return first_line
