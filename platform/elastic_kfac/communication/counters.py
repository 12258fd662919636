"""Counted communication: calls and bytes per tag.

`payload_bytes` is the size of the caller's tensor. `received_bytes` is the least number of bytes that
must arrive at *this* rank (n payload bytes, p ranks):

    all-reduce       2 (p-1)/p n       reduce-scatter half plus all-gather half
    reduce-scatter     (p-1)/p n       n is the whole input of one rank
    all-gather         (p-1)   n       n is the part of one rank
    all-to-all       the bytes that other ranks send to this rank
    broadcast, exchange  n at a receiver, 0 at the source
    reduce             n, 0 at rank dst + 1 where the chain of partial sums starts

These are the terms of the KAISA traffic model (Pauloski et al., SC'21). They are fractions, so that a
run can be compared with the model exactly. A world of one rank counts nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction


def all_reduce_received(payload_bytes: int, world_size: int) -> Fraction:
    """2 (p-1)/p n for n bytes per rank."""
    return Fraction(2 * (world_size - 1) * payload_bytes, world_size)


def reduce_scatter_received(payload_bytes: int, world_size: int) -> Fraction:
    """(p-1)/p n for an input of n bytes per rank."""
    return Fraction((world_size - 1) * payload_bytes, world_size)


def all_gather_received(payload_bytes: int, world_size: int) -> Fraction:
    """(p-1) n for a part of n bytes per rank."""
    return Fraction((world_size - 1) * payload_bytes)


@dataclass(frozen=True)
class Traffic:
    """Traffic of one tag since the last reset."""

    calls: int = 0
    payload_bytes: int = 0
    received_bytes: Fraction = Fraction(0)

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(
            self.calls + other.calls,
            self.payload_bytes + other.payload_bytes,
            self.received_bytes + other.received_bytes,
        )


class CommunicationCounters:
    """Traffic by tag; one object is shared by a communicator and all its subgroups."""

    def __init__(self) -> None:
        self._traffic: dict[str, Traffic] = {}
        self.waited_s = 0.0
        """Time that callers spent blocked in collectives."""
        self.errors = 0
        """Collectives that failed."""

    def add(self, tag: str, payload_bytes: int, received_bytes: Fraction | int) -> None:
        """Counts one call."""
        self._traffic[tag] = self[tag] + Traffic(1, payload_bytes, Fraction(received_bytes))

    def __getitem__(self, tag: str) -> Traffic:
        return self._traffic.get(tag, Traffic())

    def total(self) -> Traffic:
        """The sum over all tags."""
        return sum(self._traffic.values(), Traffic())

    def snapshot(self) -> dict[str, Traffic]:
        """A copy by tag."""
        return dict(self._traffic)

    def reset(self) -> None:
        """Drops everything counted so far."""
        self._traffic.clear()
        self.waited_s = 0.0
