"""How the losses of several forward calls are put together, read off the graph of a backward pass.

A mean loss over samples multiplies each by one over their number. Whose number that is shows where the
outputs meet: a sum of losses leaves every call its own mean; a loss of concatenated outputs, or a sum of
losses that is divided, is one mean over all of them. So are losses that are divided and propagated one
after the other.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

JOIN_TRIES = 10
"""Backward passes that are looked through for calls whose outputs meet in one mean."""

_JOINING = frozenset({"CatBackward0", "StackBackward0"})
_ADDING = frozenset({"AddBackward0", "SubBackward0", "SumBackward0"}) | _JOINING
"""Of these alone, a sum of losses is made."""
_SCALING = frozenset({"DivBackward0", "MulBackward0"})


def output_nodes(output: Any) -> frozenset[int]:
    """Numbers of the graph's nodes that made the tensors of a call's output; holding nodes would keep the
    graph."""
    return frozenset(
        tensor.grad_fn._sequence_nr() for tensor in _tensors(output) if tensor.grad_fn is not None
    )


class Joined(NamedTuple):
    """What the graph of a backward pass shows about the calls that it goes through."""

    place: str
    """Where the outputs of several calls meet in one mean, by names of nodes; empty if they do not."""
    is_divided: bool
    """Whether a loss is divided by a number."""


class Joins:
    """What the passes of one model have shown so far."""

    def __init__(self) -> None:
        self.joined: tuple[str, int, int] | None = None
        """Where the outputs of several calls met in one mean, how many calls, and of how many samples."""
        self.divides = False
        """Whether several passes before a step divided their losses by a number."""
        self._tries = JOIN_TRIES

    @property
    def are_looked_for(self) -> bool:
        """Whether further passes are looked at."""
        return self._tries > 0

    def look_at(self, calls: Sequence[tuple[Collection[int], int]], *, is_further: bool) -> None:
        """Looks at the backward pass that is running.

        Args:
            calls: `output_nodes` and number of samples of each.
            is_further: Whether it adds to gradients of others.
        """
        if not calls or not (is_further or len(calls) > 1):
            return
        self._tries -= 1
        found = look([nodes for nodes, _ in calls])
        self.divides = self.divides or (is_further and found.is_divided)
        if found.place:
            self.joined = found.place, len(calls), sum(size for _, size in calls)
        if found.place or self.divides:
            self._tries = 0


def look(calls: Sequence[Collection[int]]) -> Joined:
    """Looks at the graph of the backward pass that is running.

    Args:
        calls: `output_nodes` of each.
    """
    known = {number: 1 << place for place, nodes in enumerate(calls) for number in nodes}
    reached: dict[Node, int] = {}
    """Calls that are behind a node, as bits; nothing is looked up behind an output."""
    stack = [tensor.grad_fn for tensor in _losses() if tensor.grad_fn is not None]
    while stack:
        node = stack[-1]
        behind = [child for child, _ in node.next_functions if child is not None]
        number = node._sequence_nr()
        if number in known:
            reached[stack.pop()] = known[number]
        elif node not in reached:
            reached[node] = 0
            stack += [child for child in behind if child not in reached]
        else:
            stack.pop()
            for child in behind:
                reached[node] |= reached[child]
    common = [node for node, bits in reached.items() if bits & (bits - 1)]
    names = {node.name() for node in common}
    # A number behind a quotient is the sum of several losses.
    met = {node.name() for node in common if node.name() in _SCALING and _is_number(node)}
    if names & _JOINING:
        met |= names - _ADDING
    divided = any(
        bits and node.name() == "DivBackward0" and _is_number(node)
        for node, bits in reached.items()
    )
    return Joined(", ".join(sorted(name.removesuffix("Backward0") for name in met)), divided)


def _is_number(node: Node) -> bool:
    return all(not part.shape for part in node._input_metadata)


def _losses() -> Iterator[Tensor]:
    """What `backward` was called with; nothing where that is not known for certain."""
    code = torch.autograd.backward.__code__
    found = []
    for frame in sys._current_frames().values():
        at = frame
        while at is not None and at.f_code is not code:
            at = at.f_back  # type: ignore[assignment]
        if at is not None:
            found.append(at.f_locals["tensors"])
    if len(found) == 1:
        yield from _tensors(found[0])


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, Mapping):
        yield from _tensors(tuple(values.values()))
    elif isinstance(values, Sequence) and not isinstance(values, str):
        for value in values:
            yield from _tensors(value)
