"""A cluster in virtual time: the real supervisor and membership protocol, nodes that come and go.

One process. Whoever waits (the supervisor between two looks, members in a step, in the protocol or in a
collective) is a greenlet that sleeps until its moment; time jumps from one moment to the next. What real
hardware would take is a delay: `Costs`.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from greenlet import getcurrent, greenlet

from elastic_kfac.cluster.ray.places import NODE_DIED, Answer
from elastic_kfac.cluster.run import supervisor as supervision
from elastic_kfac.cluster.run.supervisor import Supervisor
from elastic_kfac.config import parse_config
from elastic_kfac.errors import CommunicationError
from elastic_kfac.training.membership import Departed, Membership

# The clock and the store of the tests.
sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from support.virtual_time import Clock, Store, virtual

LOOK_S = 0.5
"""The supervisor looks this often instead of every 20 ms: it reacts later here than in a run."""
TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Costs:
    """Seconds of what is not computed here."""

    prepare: float
    """From a place for a worker until it can join: process, imports, data."""
    restore: Mapping[str, float]
    """State and first step of a new world, by what changed: `grow`, `drain`, `kill`."""
    notice_of_loss: float
    """From the loss of a node until the supervisor hears of it."""
    snapshot: float
    """Age that the kept state has at most when all members are lost."""


@dataclass
class World:
    """The process group of one generation: a collective ends for all of its members or for none."""

    waiting: dict[int, tuple[greenlet, Any]] = field(default_factory=dict)
    result: list[Any] = field(default_factory=list)
    broken: bool = False


@dataclass
class Process:
    """A worker's process on a node."""

    node: str
    ready_at: float
    alive: bool = True
    run: greenlet | None = None
    answer: Answer | None = None
    membership: Membership | None = None
    leaves: bool = False
    world: World | None = None
    step: int = 0


class Replay:
    """Replays nodes that come and go against a run of at most `max_workers` workers, one per node.

    Args:
        changes: (second, node, `up`, `notice` or `down`), in order.
        step_node_s: Seconds that a step takes on one node; on n nodes an n-th.
        end: Seconds after which everything stops.
    """

    def __init__(
        self,
        changes: Sequence[tuple[float, str, str]],
        costs: Costs,
        *,
        max_workers: int,
        step_node_s: float,
        notice_s: float,
        end: float,
    ) -> None:
        self.clock, self._costs = Clock(end), costs
        self._changes, self._step_node_s, self._notice_s = changes, step_node_s, notice_s
        self._free: list[str] = []
        self._leaving: dict[str, int] = {}
        self._places: dict[int, str | None] = {}
        self._numbers = itertools.count()
        self._processes: list[Process] = []
        self._attempts = 0
        self._parked = False
        self._kept: list[tuple[float, int]] = []
        """When which step was committed first."""
        self.steps = 0
        self.redone = 0
        self.worlds: list[tuple[float, int]] = []
        self.calls: list[tuple[float, str]] = []
        config = parse_config({"elastic": {"max_workers": max_workers, "in_place": True}})
        self.supervisor = Supervisor(
            SimpleNamespace(config=config, share=None, hangs_after_s=20.0),  # type: ignore[arg-type]
            self,
            ask=self._ask,
            open_store=self._open_store,
            leaving_nodes=lambda: self._leaving,
            nodes=lambda: {node for node in self._places.values() if node} | set(self._free),
            clock=SimpleNamespace(
                monotonic=self.clock.monotonic,
                sleep=lambda seconds: self.clock.sleep(max(seconds, LOOK_S)),
            ),
        )

    def run(self) -> None:
        """Replays to the end.

        Raises:
            BaseException: What the supervisor or a member raised.
        """
        with virtual(self.clock, supervision):
            self.clock.start(self._change)
            self.clock.start(lambda: self._must_not_end(self.supervisor.run()))
            self.clock.run()

    def _must_not_end(self, how: str) -> None:
        raise AssertionError(f"the run {how} at {self.clock.now:.0f} s: {self.calls[-5:]}")

    # -- the cluster -------------------------------------------------------------------------

    def _change(self) -> None:
        for at, node, kind in self._changes:
            self.clock.sleep(max(0.0, at - self.clock.now))
            if kind == "up":
                self._free.append(node)
            elif kind == "notice":
                self._leaving[node] = round(1000 * (self.clock.now + self._notice_s))
            else:
                self._lose(node)

    def _lose(self, node: str) -> None:
        self._leaving.pop(node, None)
        if node in self._free:
            self._free.remove(node)
        for place, where in self._places.items():
            if where == node:
                self._places[place] = None
        for process in self._processes:
            if process.node == node and process.alive:
                self._die(process)
                error = Answer(error=f"{NODE_DIED}: its node has died")
                heard = self.clock.now + self._costs.notice_of_loss
                self.clock.start(lambda p=process, e=error: setattr(p, "answer", e), heard)

    def _die(self, process: Process) -> None:
        process.alive = False
        if process.run is not None:
            self.clock.kill(process.run)
        if process.world is not None:
            self._break(process.world)

    def _break(self, world: World) -> None:
        """Collectives under way fail on all members that are left."""
        world.broken = True
        for waiting, _ in world.waiting.values():
            self.clock.wake(waiting, self.clock.now)
        world.waiting.clear()

    # -- the supervisor's hands ----------------------------------------------------------------

    def request(self) -> int:
        place = next(self._numbers)
        self._places[place] = None
        return place

    def is_there(self, place: int) -> bool:
        usable = [node for node in self._free if node not in self._leaving]
        if self._places[place] is None and usable:
            self._places[place] = usable[0]
            self._free.remove(usable[0])
        return self._places[place] is not None

    def start(self, place: int) -> Process:
        node = self._places[place]
        assert node is not None
        process = Process(node, self.clock.now + self._costs.prepare)
        self._processes.append(process)
        return process

    def call(self, actor: Process, method: str, *arguments: Any) -> Any:
        if method == "run":
            slot, store = arguments[-1], arguments[-2]
            actor.run = self.clock.start(lambda: self._member(actor, store, slot))
        elif method == "leave":
            actor.leaves = True
            if actor.membership is not None:
                actor.membership.leave_at_next_boundary()
        return method, actor

    def answer(self, call: Any) -> Answer | None:
        method, process = call
        if process.answer is not None and not process.alive:
            found: Answer = process.answer
            return found
        if method == "prepare":
            ready = process.alive and self.clock.now >= process.ready_at
            return Answer((id(process), process.node)) if ready else None
        if method == "ping":
            return Answer() if process.alive else None
        return process.answer if method == "run" else Answer()

    def end(self, place: int, actor: Process | None = None) -> None:
        node = self._places.pop(place, None)
        if actor is not None:
            if actor.alive:
                self._die(actor)
            self._processes.remove(actor)
        if node is not None:
            self._free.append(node)

    # -- the coordinator -----------------------------------------------------------------------

    def _ask(self, method: str, *arguments: Any) -> Any:
        if method == "supervision":
            return {"stop_reason": None, "wanted_workers": None, "step": self.steps}
        self.calls.append((self.clock.now, method))
        if method == "group_started":
            self._attempts += 1
            return self._attempts
        if method == "park":
            self._parked = True
            for process in self._processes:
                if process.membership is not None:
                    process.membership.leave_at_next_boundary()
        if method == "world_formed":
            self.worlds.append((self.clock.now, len(arguments[1])))
        return None

    def _open_store(self) -> tuple[Any, Any]:
        if self._kept and not self._parked:
            # Nobody was left: the next attempt has what was kept elsewhere before.
            horizon = self._kept[-1][0] - self._costs.snapshot
            kept = max((step for at, step in self._kept if at <= horizon), default=0)
            self.redone += self.steps - kept
            self.steps = kept
        self._parked = False
        store = Store(self.clock)
        self._groups: dict[int, World] = {}
        return store.at_once(), store

    # -- members -------------------------------------------------------------------------------

    def _member(self, process: Process, store: Store, slot: int) -> None:
        mine = Membership(store, slot, timeout_s=TIMEOUT_S)  # type: ignore[arg-type]
        process.membership = mine
        if process.leaves:
            mine.leave_at_next_boundary()
        try:
            world = mine.join()
            before, was_lost = 0, False
            while True:
                kind = "grow" if world.world_size > before else "kill" if was_lost else "drain"
                was_lost = False
                try:
                    mine.await_members(world)
                    self._train(process, world.generation, world.world_size, kind)
                except CommunicationError:
                    was_lost = True
                before = world.world_size
                if process.world is not None:
                    # Destroying the group wakes those who still wait in it.
                    self._break(process.world)
                    process.world = None
                world = mine.next_world(world)
        except Departed:
            process.answer = Answer({"status": "left"})
        except CommunicationError as error:
            process.answer, process.alive = Answer(error=str(error)), False

    def _train(self, process: Process, generation: int, size: int, kind: str) -> None:
        world = self._groups.setdefault(generation, World())
        process.world = world
        self.clock.sleep(self._costs.restore[kind])
        steps = self._meet(process, world, size, process.step)
        # Whoever went furthest hands its state on; the first world of an attempt has the kept one.
        process.step = max(*steps, 0) if any(steps) else self.steps
        membership = process.membership
        assert membership is not None
        while True:
            wants = membership.change_is_wanted()
            self.clock.sleep(self._step_node_s / size)
            flags = self._meet(process, world, size, wants)
            process.step += 1
            self._commit(process.step)
            if any(flags):
                self._meet(process, world, size, None)
                process.world = None
                return

    def _commit(self, step: int) -> None:
        if step > self.steps:
            self.steps = step
            self._kept = [*self._kept[-64:], (self.clock.now, step)]

    def _meet(self, process: Process, world: World, size: int, value: Any) -> list[Any]:
        """A collective: everybody's values, once all have come."""
        if world.broken:
            raise CommunicationError("a peer left the group")
        world.waiting[id(process)] = (getcurrent(), value)
        if len(world.waiting) == size:
            world.result = [given for _, given in world.waiting.values()]
            for waiting, _ in world.waiting.values():
                if waiting is not getcurrent():
                    self.clock.wake(waiting, self.clock.now)
            world.waiting.clear()
            return world.result
        self.clock.wait()
        if world.broken:
            raise CommunicationError("a peer left the group")
        return world.result
