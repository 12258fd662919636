"""A member that leaves its world at a step boundary; Ray Train only ever loses or replaces members."""

from __future__ import annotations

from elastic_kfac.training.membership import Membership, World


class Departed(Exception):
    """This process is no member any more."""


class DepartingMembership(Membership):
    """A membership that can end while its process lives."""

    leaves = False

    def leave_at_next_boundary(self) -> None:
        self.leaves = True

    def change_is_wanted(self) -> bool:
        return self.leaves or super().change_is_wanted()

    def next_world(self, world: World) -> World:
        """Raises `Departed` if this member leaves; first it proposes the world of the others."""
        if not self.leaves:
            return super().next_world(world)
        generation = world.generation + 1
        others = [slot for slot in self._plan(world.generation)[0] if slot != self._slot]
        arrived = self._wait_for_arrivals(generation, others)
        if arrived and not self._store.check([f"plan/{generation}"]):
            self._propose(generation, arrived)
        raise Departed
