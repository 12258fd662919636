"""Which rows of a table's gradient a look-up of an embedding has made, where that is certain."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from elastic_kfac.curvature.factors import can_be_read


class LookUps:
    """Those of one table."""

    def __init__(self) -> None:
        self._made: tuple[torch.UntypedStorage, int, Tensor, int] | None = None
        """What a look-up has made in the running backward pass: memory and version of the gradient, the
        indices and their version."""
        self._known: tuple[weakref.ref[Tensor], int, Tensor, int] | None = None
        """The same of what is in `.grad`, if nothing else is part of it."""

    def follow(self, indices: Tensor) -> Callable[[Tensor | None], None]:
        """What to call with the gradient of the table that a look-up of `indices` has made."""
        known, version = weakref.ref(self), indices._version

        def made(gradient: Tensor | None) -> None:
            its = known()
            if its is not None and gradient is not None:
                # While its memory is held, no other gradient can have the address. The tensor itself
                # is not: autograd would copy it.
                its._made = gradient.untyped_storage(), gradient._version, indices, version
                torch.autograd.graph.queue_callback(its._forget)

        return made

    def _forget(self) -> None:
        self._made = None

    def match(self, grad: Tensor) -> None:
        """Has it that `.grad` is what one look-up has made. A sum with anything else, in place or not,
        has another address or version."""
        made, self._made, self._known = self._made, None, None
        if made is not None and made[1] == grad._version and made[0].data_ptr() == grad.data_ptr():
            self._known = weakref.ref(grad), *made[1:]

    def rows(self, grad: Tensor | None) -> Tensor | None:
        """All rows of `.grad` that may be other than zero, ascending; None where they are not known."""
        if self._known is None or grad is None or not can_be_read(grad) or _have_company():
            return None
        seen, version, indices, its_version = self._known
        if seen() is not grad or grad._version != version or indices._version != its_version:
            return None
        looked_up = torch.zeros(len(grad), dtype=torch.bool)
        looked_up[indices.flatten()] = True
        return None if _was_filled(grad, looked_up) else looked_up.nonzero().squeeze(1)


def _was_filled(grad: Tensor, looked_up: Tensor) -> bool:
    """Whether others of a few rows than those looked up are not zero: what is done to `.grad.data`, as
    adding a decay, leaves the version as it was."""
    every = max(1, len(grad) // _PROBES)
    return bool((grad[::every].any(1) > looked_up[::every]).any())


_PROBES = 32


def _have_company() -> bool:
    """Whether there are other ranks: a collective may have added their rows, and leaves the version of a
    gradient as it was."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
