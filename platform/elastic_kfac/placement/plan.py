"""The placement plan: which rank computes, keeps and sends each layer. A frozen value.

Ranks form a grid with P columns, row by row: rank r is in column r mod P. Each layer is assigned to one
column, whose ranks are its gradient workers: they hold its decomposition and precondition its gradient.
One or two inverse workers of the column decompose its factors. Every other rank receives the
preconditioned gradient from one gradient worker. Where P divides the world size that is the worker in its
row (KAISA, Pauloski et al., SC'21); otherwise column sizes differ by at most one, and so do the numbers
of receivers per worker.

MEM-OPT is P = world size, COMM-OPT is P = 1.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from typing import Any

from elastic_kfac.errors import ConfigError, StateError, UsageError


def columns_for_fraction(world_size: int, grad_worker_frac: float) -> int:
    """P, the number of columns, for a share of gradient workers.

    The integer nearest to 1 / grad_worker_frac (ties go to the larger, which needs less memory), limited
    to 1 … world_size. So m / world_size gives columns of exactly m ranks where m divides the world size,
    a fraction gives the same P at every world size with at least P ranks, and a smaller fraction never
    gives more workers.

    Raises:
        ConfigError: If the fraction is outside (0, 1].
        UsageError: If there are no ranks.
    """
    if world_size < 1:
        raise UsageError("a plan needs ranks", given=world_size, allowed="world_size >= 1")
    if not 0.0 < grad_worker_frac <= 1.0:
        raise ConfigError(
            "grad_worker_frac is a share of the ranks",
            given=grad_worker_frac,
            allowed="0 < grad_worker_frac <= 1",
            change="use 1/world_size for least memory, 1 for least communication",
        )
    if grad_worker_frac * world_size <= 1.0:
        return world_size
    # 2/3 has no exact float; without this, rounding would decide its tie.
    inverse = 1 / Fraction(grad_worker_frac).limit_denominator(1 << 20)
    nearest = (2 * inverse.numerator + inverse.denominator) // (2 * inverse.denominator)
    return min(max(nearest, 1), world_size)


def grid_columns(world_size: int, num_columns: int) -> tuple[tuple[int, ...], ...]:
    """The ranks of every column: sizes differ by at most one."""
    return tuple(tuple(range(c, world_size, num_columns)) for c in range(num_columns))


def assign_receivers(world_size: int, num_columns: int, column: int) -> tuple[int, ...]:
    """The worker of `column` that each rank receives from, by rank; workers serve themselves.

    A receiver takes the worker of its row while that worker serves fewer than its even share; the
    remaining receivers go to the workers that serve fewest.
    """
    workers = range(column, world_size, num_columns)
    share = (world_size - len(workers)) // len(workers)
    served = dict.fromkeys(workers, 0)
    sources = [-1] * world_size
    for worker in workers:
        sources[worker] = worker
    left_over = []
    for rank in range(world_size):
        if sources[rank] >= 0:
            continue
        row_worker = rank - rank % num_columns + column
        if served.get(row_worker, share) < share:
            served[row_worker] += 1
            sources[rank] = row_worker
        else:
            left_over.append(rank)
    for rank in left_over:
        row_worker = rank - rank % num_columns + column
        least = min(served, key=lambda worker: (served[worker], worker != row_worker, worker))
        served[least] += 1
        sources[rank] = least
    return tuple(sources)


@dataclass(frozen=True)
class LayerPlacement:
    """A layer's column and the ranks that decompose its two factors."""

    name: str
    column: int
    a_worker: int
    g_worker: int
    kept: str = ""
    """What is kept of factors wider than `max_factor_dim`, in words."""


@dataclass(frozen=True)
class Plan:
    """Which ranks decompose, precondition and receive; equal on all ranks (compare `sha256`)."""

    world_size: int
    grad_worker_frac: float
    """The share in effect, 1 / number of columns."""
    columns: tuple[tuple[int, ...], ...]
    layers: tuple[LayerPlacement, ...]
    """In the order of registration."""
    reason: str = field(default="", compare=False)
    """Why the fraction was chosen, with `grad_worker_frac: auto`; no part of the plan's identity."""

    @cached_property
    def _by_name(self) -> dict[str, LayerPlacement]:
        return {layer.name: layer for layer in self.layers}

    @cached_property
    def _sources(self) -> dict[int, tuple[int, ...]]:
        return {}

    def placement(self, name: str) -> LayerPlacement:
        """Raises:
        UsageError: If the plan has no such layer.
        """
        try:
            return self._by_name[name]
        except KeyError:
            raise UsageError(
                "the plan has no such layer", given=name, allowed=", ".join(self._by_name)
            ) from None

    def gradient_workers(self, name: str) -> tuple[int, ...]:
        """The ranks that hold the layer's decomposition and precondition its gradient."""
        return self.columns[self.placement(name).column]

    def worker_group(self, name: str) -> tuple[int, ...]:
        """The ranks of the broadcast of the decomposition: the gradient workers."""
        return self.gradient_workers(name)

    def is_gradient_worker(self, name: str, rank: int) -> bool:
        """Whether `rank` preconditions the layer."""
        return rank % len(self.columns) == self.placement(name).column

    def source(self, name: str, rank: int) -> int:
        """The rank that `rank` receives the preconditioned gradient from; a worker's own rank."""
        return self._column_sources(self.placement(name).column)[rank]

    def receiver_group(self, name: str, rank: int) -> tuple[int, ...]:
        """(source, receivers …) of the broadcast that includes `rank`; () if there is none."""
        source = self.source(name, rank)
        sources = self._column_sources(self.placement(name).column)
        receivers = tuple(r for r, s in enumerate(sources) if s == source and r != source)
        return (source, *receivers) if receivers else ()

    def receiver_groups(self, name: str) -> tuple[tuple[int, ...], ...]:
        """All broadcasts of the layer's preconditioned gradient, by source rank."""
        groups: dict[int, list[int]] = {worker: [] for worker in self.gradient_workers(name)}
        for rank, source in enumerate(self._column_sources(self.placement(name).column)):
            if rank != source:
                groups[source].append(rank)
        return tuple((source, *ranks) for source, ranks in groups.items() if ranks)

    def _column_sources(self, column: int) -> tuple[int, ...]:
        if column not in self._sources:
            self._sources[column] = assign_receivers(self.world_size, len(self.columns), column)
        return self._sources[column]

    @property
    def strategy(self) -> str:
        """MEM-OPT, HYBRID-OPT or COMM-OPT."""
        if len(self.columns) == 1:
            return "COMM-OPT"
        return "MEM-OPT" if len(self.columns) == self.world_size else "HYBRID-OPT"

    # -- as a value -------------------------------------------------------------------------------

    @cached_property
    def sha256(self) -> str:
        """Hash of the plan, to compare it between ranks."""
        text = json.dumps(self.to_dict(), sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings; `from_dict` is the inverse."""
        return {
            "world_size": self.world_size,
            "columns": len(self.columns),
            "layers": [
                [x.name, x.column, x.a_worker, x.g_worker, *([x.kept] if x.kept else [])]
                for x in self.layers
            ],
        }

    @classmethod
    def from_dict(cls, stored: Mapping[str, Any]) -> Plan:
        """The plan of `to_dict`.

        Raises:
            StateError: If it is not a valid plan.
        """
        try:
            world_size, num_columns = int(stored["world_size"]), int(stored["columns"])
            if not 1 <= num_columns <= world_size:
                raise ValueError(f"{num_columns} columns of {world_size} ranks")
            layers = tuple(
                LayerPlacement(str(name), int(column), int(a), int(g), *map(str, kept))
                for name, column, a, g, *kept in stored["layers"]
            )
            for x in layers:
                if {x.a_worker % num_columns, x.g_worker % num_columns} != {x.column} or not (
                    0 <= min(x.a_worker, x.g_worker) <= max(x.a_worker, x.g_worker) < world_size
                ):
                    raise ValueError(f"layer {x.name} has a worker outside its column")
        except (KeyError, TypeError, ValueError) as error:
            raise StateError("not a stored plan", given=repr(error)) from error
        return cls(world_size, 1.0 / num_columns, grid_columns(world_size, num_columns), layers)

    def __str__(self) -> str:
        sizes = sorted({len(column) for column in self.columns})
        ranks = " or ".join(str(size) for size in sizes)
        title = (
            f"plan for {self.world_size} ranks: {len(self.columns)} columns of {ranks} "
            f"(grad_worker_frac {self.grad_worker_frac:.4g}, {self.strategy})"
        )
        rows = [("layer", "column", "gradient workers", "A at", "G at", "")]
        rows += [
            (
                x.name,
                str(x.column),
                _short(self.columns[x.column]),
                str(x.a_worker),
                str(x.g_worker),
                x.kept,
            )
            for x in self.layers
        ]
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows
        ]
        return "\n".join([title, *(line.rstrip() for line in lines)])

    def diff(self, other: Plan) -> list[str]:
        """The changes from this plan to `other`, in words; empty if there are none."""
        lines = []
        if self.world_size != other.world_size:
            lines.append(f"world_size: {self.world_size} -> {other.world_size}")
        if len(self.columns) != len(other.columns):
            lines.append(
                f"columns: {len(self.columns)} -> {len(other.columns)} "
                f"(grad_worker_frac {self.grad_worker_frac:.4g} -> {other.grad_worker_frac:.4g})"
            )
        for name in dict.fromkeys([*self._by_name, *other._by_name]):
            before = self._describe(name)
            after = other._describe(name)
            if before != after:
                lines.append(f"{name}: {before} -> {after}")
        return lines

    def _describe(self, name: str) -> str:
        if name not in self._by_name:
            return "absent"
        x = self._by_name[name]
        workers = f"workers {_short(self.columns[x.column])}, A at {x.a_worker}, G at {x.g_worker}"
        return f"{workers} ({x.kept})" if x.kept else workers


def _short(ranks: tuple[int, ...]) -> str:
    if len(ranks) <= 4:
        return ",".join(map(str, ranks))
    return f"{ranks[0]},{ranks[1]},…,{ranks[-1]} ({len(ranks)})"
