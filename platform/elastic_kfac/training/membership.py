"""Membership of the world: members agree on the next generation through a store that outlives them,
and replace their process group by that of the generation.

    plan/<generation>            {"members": [slots in rank order], "joins_seen": n}
    arrive/<generation>/<slot>   a survivor of the previous generation requests this one
    ready/<generation>/<slot>    a member of this generation is about to connect
    begins/<generation>          "yes" or "no": whether its members connect
    join/<n>                     the slot of the n-th newcomer
    gone/<slot>                  this process is in no later world

A slot identifies a process for its lifetime. The lowest slot that has arrived proposes the plan; the
store keeps the first proposal, so two proposers cannot split the world. Nor can a member that died
after the plan was made keep the others waiting in the rendezvous: they connect only if all were ready,
and the store keeps the first answer to that as well. `gone` is written by a member that leaves and by
whoever supervises the processes (`Membership.bury`); without it a loss is found by waiting.
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

from elastic_kfac.communication.abort import (
    AbortWatch,
    abort_groups,
    let_processes_survive,
    needs_abort,
)
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import CommunicationError

CONNECT_S = 10.0
"""Limit for members that are all ready; one of them may still die in the milliseconds before."""


class Departed(Exception):
    """This process is no member any more: it has left, and the others continue."""


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
        timeout_s: Timeout in seconds for the collectives of the groups; founders wait for each other
            half as long.
        join_s: Timeout in seconds for joining; None is that of the collectives.
        ready_s: Seconds that the members of a later world wait for each other before they connect.
        while_joining: Called repeatedly while this process waits for admission; raise to give up.
    """

    def __init__(
        self,
        store: dist.Store,
        slot: int,
        *,
        backend: str = "gloo",
        settle_s: float = 0.25,
        timeout_s: float = 30.0,
        join_s: float | None = None,
        ready_s: float = 5.0,
        while_joining: Callable[[], None] = lambda: None,
    ) -> None:
        self._store = dist.PrefixStore("membership", store)
        self._groups = store
        self._slot = slot
        self._backend = backend
        self._settle_s = settle_s
        self._timeout_s = timeout_s
        self._join_s = timeout_s if join_s is None else join_s
        self._ready_s = ready_s
        self._while_joining = while_joining
        self._joins_seen = 0
        self._leaves = False
        self._watch: AbortWatch | None = None

    @staticmethod
    def found(store: dist.Store, slots: Sequence[int]) -> None:
        """Writes the first plan; call once per run."""
        prefixed = dist.PrefixStore("membership", store)
        prefixed.set("plan/0", json.dumps({"members": list(slots), "joins_seen": 0}))
        prefixed.set("generation", "0")

    @staticmethod
    def bury(store: dist.Store, slot: int) -> None:
        """Tells the others that a process is dead, so that they do not wait to find out."""
        dist.PrefixStore("membership", store).set(f"gone/{slot}", "")

    @staticmethod
    def newest_plan(store: dist.Store) -> tuple[int, list[int]]:
        """The newest generation and its slots in rank order, for whoever watches."""
        prefixed = dist.PrefixStore("membership", store)
        generation = int(prefixed.get("generation"))
        return generation, list(json.loads(prefixed.get(f"plan/{generation}"))["members"])

    def join(self) -> World:
        """Returns the world at once for a founding member, otherwise requests admission and waits.

        Raises:
            CommunicationError: If no plan includes this process within the timeout.
        """
        generation = int(self._store.get("generation"))
        if generation == 0 and self._slot in self._plan(0)[0]:
            return self._world(0)
        number = self._ask(generation)
        deadline = time.monotonic() + self._join_s
        while time.monotonic() < deadline:
            newest = int(self._store.get("generation"))
            members, joins_seen = self._plan(newest)
            if joins_seen >= number and self._slot in members:
                return self._world(newest)
            self._while_joining()
            time.sleep(0.01)
        raise CommunicationError(
            f"slot {self._slot} was not admitted to the world within {self._join_s:g} s"
        )

    def change_is_wanted(self) -> bool:
        """Whether a newcomer is waiting for admission, or this member leaves. Does not block."""
        return self._leaves or self._store.check([f"join/{self._joins_seen + 1}"])

    def leave_at_next_boundary(self) -> None:
        """From the next boundary on this process is no member. May be called from any thread."""
        self._leaves = True

    def next_world(self, world: World) -> World:
        """Agrees with the other survivors on the next generation.

        Raises:
            CommunicationError: If there is no plan within the timeout.
            Departed: If this member leaves, or was declared dead.
        """
        generation = world.generation + 1
        if self._leaves:
            self._store.set(f"gone/{self._slot}", "")
            raise Departed
        self._store.set(f"arrive/{generation}/{self._slot}", "here")
        old, _ = self._plan(world.generation)
        arrived = self._wait_for_arrivals(generation, old)
        if self._slot not in arrived:
            raise Departed
        if arrived[0] == self._slot or not self._plan_appears(generation):
            self._propose(generation, arrived)
        if self._slot not in self._plan(generation)[0]:
            return self.join()
        return self._world(generation)

    def connect(self, world: World) -> Communicator:
        """Creates the process group of `world`.

        Raises:
            CommunicationError: If a member is missing; all of them continue with `next_world`.
        """
        self.await_members(world)
        aborts = needs_abort(self._backend)
        if aborts:
            let_processes_survive()
        communicator = regroup(
            world.generation,
            world.rank,
            world.world_size,
            self._groups,
            backend=self._backend,
            timeout_s=self._timeout_s,
            connect_s=CONNECT_S,
        )
        if aborts and communicator.world_size > 1:
            self._watch = AbortWatch(lambda: self._has_lost_members(world))
        return communicator

    def disconnect(self, *, lost: bool = False) -> None:
        """Ends the process group of the present world; after the loss of a member without waiting for
        anybody."""
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.stop()
        leave(aborts=lost and needs_abort(self._backend))

    def _has_lost_members(self, world: World) -> bool:
        """Whether a member is gone, or another one has given this world up."""
        members, _ = self._plan(world.generation)
        others = [slot for slot in members if slot != self._slot]
        following = f"arrive/{world.generation + 1}"
        return any(
            self._is_gone(slot) or self._store.check([f"{following}/{slot}"]) for slot in others
        )

    def await_members(self, world: World) -> None:
        """Returns once all members of `world` are ready to connect.

        Raises:
            CommunicationError: If one of them is not, for all of the others.
        """
        members, _ = self._plan(world.generation)
        begins = f"begins/{world.generation}"
        ready = [f"ready/{world.generation}/{slot}" for slot in members]
        self._store.set(f"ready/{world.generation}/{self._slot}", "")
        # Founders load their data first. Who joins meanwhile must be admitted in time.
        patience_s = self._ready_s if world.generation else self._timeout_s / 2
        deadline = time.monotonic() + patience_s
        while not self._store.check(ready) and not self._store.check([begins]):
            if time.monotonic() > deadline or any(map(self._is_gone, members)):
                self._store.compare_set(begins, "", "no")
                break
            time.sleep(0.002)
        if self._store.compare_set(begins, "", "yes") != b"yes":
            raise CommunicationError(f"a member of generation {world.generation} did not connect")

    def _is_gone(self, slot: int) -> bool:
        return bool(self._store.check([f"gone/{slot}"]))

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
        while True:
            expected = [slot for slot in old if not self._is_gone(slot)]
            now = [s for s in expected if self._store.check([f"arrive/{generation}/{s}"])]
            if len(now) == len(expected):
                return now
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
        alive = (slot for slot in newcomers if not self._is_gone(slot))
        members = list(dict.fromkeys([*survivors, *alive]))
        plan = json.dumps({"members": members, "joins_seen": joins})
        self._store.compare_set(f"plan/{generation}", "", plan)
        self._store.set("generation", str(generation))

    def _plan(self, generation: int) -> tuple[list[int], int]:
        plan = json.loads(self._store.get(f"plan/{generation}"))
        return list(plan["members"]), int(plan["joins_seen"])

    def _world(self, generation: int) -> World:
        members, self._joins_seen = self._plan(generation)
        return World(generation, members.index(self._slot), len(members))


# Public since torch 2.15.
_set_timeout = getattr(dist, "set_timeout", None) or dist.distributed_c10d._set_pg_timeout

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
    connect_s: float | None = None,
) -> Communicator:
    """Destroys the old group, if there is one, and creates the group of `generation`. Collective.

    The members agree on `generation`, `world_size` and their ranks beforehand. The `store` is hosted
    outside the members, so it survives any of them. Destroying the old group first also wakes peers
    that still wait in it for a lost member.

    Args:
        timeout_s: Timeout of the group's collectives.
        connect_s: Timeout of its creation; None is the same.

    Raises:
        CommunicationError: If the members do not connect in time.
    """
    leave(aborts=needs_abort(backend))
    if world_size == 1:
        return Communicator.solo()
    try:
        dist.init_process_group(
            backend,
            store=dist.PrefixStore(f"generation-{generation}", store),
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=connect_s or timeout_s),
        )
        if connect_s is not None:
            _set_timeout(timedelta(seconds=timeout_s))
    except RuntimeError as error:
        leave(aborts=needs_abort(backend))
        # torch would name this process's next group differently from its peers', for ever.
        dist.distributed_c10d._world.group_count = 0
        raise CommunicationError(
            f"rank {rank} of {world_size} could not join generation {generation}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return Communicator.world()


def leave(*, aborts: bool = False) -> None:
    """Destroys the group of this process, if there is one, or aborts it where destroying may wait for a
    lost peer.

    Its connections close, which wakes peers that wait in it, once the last reference to it is gone. A
    failed trainer holds references in cycles, hence the collection; a caller that still handles the
    error holds one too, so call this outside the handler.
    """
    if not dist.is_initialized():
        return
    group = dist.group.WORLD
    if aborts:
        abort_groups()
    else:
        dist.destroy_process_group()
    if sys.getrefcount(group) > _OWN_REFERENCES:
        gc.collect()
