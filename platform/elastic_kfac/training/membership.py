"""Membership of the world: members agree on the next generation through a store that outlives them,
and replace their process group by that of the generation.

    plan/<generation>            {"members": [slots in rank order], "joins_seen": n}
    arrive/<generation>/<slot>   a survivor of the previous generation requests this one
    join/<n>                     the slot of the n-th newcomer

A slot identifies a process for its lifetime. The lowest slot that has arrived proposes the plan; the
store keeps the first proposal, so two proposers cannot split the world.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

# Optimizers import it, and default arguments of its functions keep the group that exists at that time
# alive forever. Import it before the first group is created.
import torch.distributed.nn.functional  # noqa: F401

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import CommunicationError


@dataclass(frozen=True)
class World:
    """One member's view of a generation."""

    generation: int
    rank: int
    world_size: int


class Membership:
    """How a process joins an elastic world and follows its generations, over a store no member hosts.

    Args:
        store: For example a TCPStore on a node that is not preempted.
        slot: Number of this process; never reused after its death.
        settle_s: Seconds that survivors wait for one more survivor before they continue without it.
        timeout_s: Timeout in seconds for joining and for the collectives of the groups.
        while_joining: Called repeatedly while this process waits for admission; raise to give up.
    """

    def __init__(
        self,
        store: dist.Store,
        slot: int,
        *,
        backend: str = "gloo",
        settle_s: float = 0.3,
        timeout_s: float = 30.0,
        while_joining: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = dist.PrefixStore("membership", store)
        self._groups = store
        self._slot = slot
        self._backend = backend
        self._settle_s = settle_s
        self._timeout_s = timeout_s
        self._while_joining = while_joining
        self._joins_seen = 0

    @staticmethod
    def found(store: dist.Store, slots: Sequence[int]) -> None:
        """Writes the first plan; call once per run."""
        prefixed = dist.PrefixStore("membership", store)
        prefixed.set("plan/0", json.dumps({"members": list(slots), "joins_seen": 0}))
        prefixed.set("generation", "0")

    def join(self) -> World:
        """Returns the world at once for a founding member, otherwise requests admission and waits.

        Raises:
            CommunicationError: If no plan includes this process within the timeout.
        """
        generation = int(self._store.get("generation"))
        if generation == 0 and self._slot in self._plan(0)[0]:
            return self._world(0)
        number = self._ask(generation)
        deadline = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline:
            newest = int(self._store.get("generation"))
            members, joins_seen = self._plan(newest)
            if joins_seen >= number and self._slot in members:
                return self._world(newest)
            self._while_joining()
            time.sleep(0.01)
        raise CommunicationError(
            f"slot {self._slot} was not admitted to the world within {self._timeout_s:g} s"
        )

    def change_is_wanted(self) -> bool:
        """Whether a newcomer is waiting for admission. Does not block."""
        return self._store.check([f"join/{self._joins_seen + 1}"])

    def next_world(self, world: World) -> World:
        """Agrees with the other survivors on the next generation.

        Raises:
            CommunicationError: If there is no plan within the timeout.
        """
        generation = world.generation + 1
        self._store.set(f"arrive/{generation}/{self._slot}", "here")
        old, _ = self._plan(world.generation)
        arrived = self._wait_for_arrivals(generation, old)
        if arrived[0] == self._slot or not self._plan_appears(generation):
            self._propose(generation, arrived)
        if self._slot not in self._plan(generation)[0]:
            return self.join()
        return self._world(generation)

    def connect(self, world: World) -> Communicator:
        """Creates the process group of `world`."""
        return regroup(
            world.generation,
            world.rank,
            world.world_size,
            self._groups,
            backend=self._backend,
            timeout_s=self._timeout_s,
        )

    def _ask(self, generation: int) -> int:
        """Claims the next free join number.

        The claim is one atomic operation, so a process that dies has either requested admission or not.
        """
        number = self._plan(generation)[1] + 1
        while int(self._store.compare_set(f"join/{number}", "", str(self._slot))) != self._slot:
            number += 1
        return number

    def _wait_for_arrivals(self, generation: int, old: Sequence[int]) -> list[int]:
        arrived: list[int] = []
        last_news = time.monotonic()
        while len(arrived) < len(old):
            now = [slot for slot in old if self._store.check([f"arrive/{generation}/{slot}"])]
            if len(now) > len(arrived):
                arrived, last_news = now, time.monotonic()
            if self._store.check([f"plan/{generation}"]):
                break
            if time.monotonic() - last_news > self._settle_s:
                break
            time.sleep(0.002)
        return arrived

    def _plan_appears(self, generation: int) -> bool:
        deadline = time.monotonic() + 4 * self._settle_s
        while time.monotonic() < deadline:
            if self._store.check([f"plan/{generation}"]):
                return True
            time.sleep(0.002)
        return False

    def _propose(self, generation: int, survivors: Sequence[int]) -> None:
        joins, newcomers = self._joins_seen, []
        while self._store.check([f"join/{joins + 1}"]):
            joins += 1
            newcomers.append(int(self._store.get(f"join/{joins}")))
        members = list(dict.fromkeys([*survivors, *newcomers]))
        plan = json.dumps({"members": members, "joins_seen": joins})
        self._store.compare_set(f"plan/{generation}", "", plan)
        self._store.set("generation", str(generation))

    def _plan(self, generation: int) -> tuple[list[int], int]:
        plan = json.loads(self._store.get(f"plan/{generation}"))
        return list(plan["members"]), int(plan["joins_seen"])

    def _world(self, generation: int) -> World:
        members, self._joins_seen = self._plan(generation)
        return World(generation, members.index(self._slot), len(members))


_OWN_REFERENCES = 2
"""A local name and the argument of `getrefcount`."""


def regroup(
    generation: int,
    rank: int,
    world_size: int,
    store: dist.Store,
    *,
    backend: str = "gloo",
    timeout_s: float = 60.0,
) -> Communicator:
    """Destroys the old group, if there is one, and creates the group of `generation`. Collective.

    The members agree on `generation`, `world_size` and their ranks beforehand. The `store` is hosted
    outside the members, so it survives any of them. Destroying the old group first also wakes peers
    that still wait in it for a lost member.

    Raises:
        CommunicationError: If the members do not connect within `timeout_s` seconds.
    """
    leave()
    if world_size == 1:
        return Communicator.solo()
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"generation-{generation}", store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=timeout_s),
        )
    except RuntimeError as error:
        leave()
        raise CommunicationError(
            f"rank {rank} of {world_size} could not join generation {generation}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return Communicator.world()


def leave() -> None:
    """Destroys the group of this process, if there is one.

    Its connections close, which wakes peers that wait in it, once the last reference to it is gone. A
    failed trainer holds references in cycles, hence the collection; a caller that still handles the
    error holds one too, so call this outside the handler.
    """
    if not dist.is_initialized():
        return
    group = dist.group.WORLD
    dist.destroy_process_group()
    if sys.getrefcount(group) > _OWN_REFERENCES:
        gc.collect()
