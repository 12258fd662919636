"""Which layers K-FAC preconditions while it is in use, and the warnings that name the others."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence

from elastic_kfac.curvature.discovery import Found
from elastic_kfac.kfac.statistics import with_gradients


class Coverage:
    """Layers found in the model, and what became of them.

    Attributes:
        used: Layers that a pass has gone through.
        left_out: Layers whose statistics were wrong, and why; the same layers on every rank.
    """

    def __init__(self) -> None:
        self.used: set[str] = set()
        self.left_out: dict[str, str] = {}
        self._reasons: dict[str, str] = {}
        """What this rank has seen wrong with layers, until all ranks know of it."""
        self._new: set[str] = set()
        """Layers whose first statistics are due at once."""
        self._named: set[str] = set()
        """Layers left out that a warning has named."""
        self._unseen: set[str] = set()
        """Layers that were named because no pass has gone through them, though they have a gradient."""

    def find(self, found: Found) -> None:
        """Takes the layers of the model as it is now."""
        self._coverage, self._sharing, self._layers = found.coverage, found.sharing, found.layers

    def keep(self, names: Collection[str]) -> list[str]:
        """After a change of the model: only these layers are the same as before; returns the others."""
        new = [layer.name for layer in self._layers if layer.name not in names]
        self.left_out = {name: why for name, why in self.left_out.items() if name in names}
        self.used -= set(new)
        self._new = set(new)
        return new

    def narrowed(self, due: list[frozenset[str]]) -> list[frozenset[str]]:
        """Factors to record, by layer, from those whose turn it is: none of layers left out, all of
        those that are new, once."""
        new, self._new = self._new, set()
        if not (self.left_out or new):
            return due
        return [
            frozenset()
            if layer.name in self.left_out
            else frozenset(layer.factor_names)
            if layer.name in new
            else names
            for layer, names in zip(self._layers, due, strict=True)
        ]

    def note(self, faults: Mapping[str, str]) -> None:
        """Takes what this rank's passes have shown to be wrong, by layer."""
        self._reasons |= faults

    def leave_out(self, indices: Iterable[int]) -> None:
        """Uncovers layers whose statistics cannot be right, on every rank alike."""
        names = [self._layers[i].name for i in sorted(indices)]
        for name in names:
            reason = self._reasons.pop(name, "its statistics cannot be right on another rank")
            self.left_out.setdefault(name, reason)
        reasons = [f"{name} ({self.left_out[name]})" for name in names if name not in self._named]
        self._named.update(names)
        if reasons:
            warnings.warn(
                "K-FAC does not precondition: " + ", ".join(reasons), UserWarning, stacklevel=5
            )

    def name_unseen(self, due: Sequence[Collection[str]]) -> None:
        """Warns once of layers with a gradient that no recorded pass has gone through.

        Args:
            due: Factors whose statistics were due, by layer.
        """
        known = self.used | self._unseen | self.left_out.keys()
        waiting = [
            layer
            for layer, factors in zip(self._layers, due, strict=True)
            if factors and layer.name not in known
        ]
        names = with_gradients(waiting)
        self._unseen |= set(names)
        if names:
            warnings.warn(
                f"K-FAC does not precondition: {', '.join(names)} (they have a gradient, but the modules "
                "were not called: call them, instead of functions with their weights)",
                UserWarning,
                stacklevel=5,
            )

    def are_without_gradients(self, due: Sequence[Collection[str]]) -> bool:
        """Whether only some layers are due, and a pass may have had no use for them."""
        layers = [layer for layer, names in zip(self._layers, due, strict=True) if names]
        return len(layers) < len(self._layers) and not with_gradients(layers)

    def report(self) -> dict[str, str]:
        """See `KFAC.coverage`."""
        coverage = dict(self._coverage)
        coverage |= self.left_out
        if self.used:
            known = self.used | self.left_out.keys()
            unused = [layer.name for layer in self._layers if layer.name not in known]
            coverage |= dict.fromkeys(unused, "unused: no pass has gone through it")
        for first, users in self._sharing.items():
            coverage |= dict.fromkeys(users, coverage[first])
        return coverage
