"""The real membership protocol under a virtual clock: one process, one schedule at a time, any faults.

Exactly one member runs; every look at the clock or the store is a point where another one may go on, in
an order that the seed decides. Time passes only when all of them wait.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from greenlet import getcurrent, greenlet

from elastic_kfac.errors import CommunicationError
from elastic_kfac.training import membership as protocol
from elastic_kfac.training.membership import Departed, Membership, World
from support.virtual_time import Clock, Store, virtual

SUPERVISOR = -2

LIMIT_S = 3600.0
"""Virtual time after which a schedule hangs."""


class Died(BaseException):
    """The member's process was killed."""


class RandomClock(Clock):
    """Members in virtual time: who goes on first, and how long each sleeps, is drawn from the seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self._deaths: dict[int, float] = {}
        self._names: dict[greenlet, int] = {}
        self.errors: list[BaseException] = []

    def spawn(self, name: int, work: Callable[[], None], *, at: float, dies_at: float) -> None:
        self._deaths[name] = dies_at

        def body() -> None:
            try:
                self._die_if_due()
                work()
            except Died:
                pass
            except BaseException as error:
                self.errors.append(error)

        self._names[self.start(body, at, self.random.random())] = name

    def is_alive(self, name: int) -> bool:
        return self.now < self._deaths[name]

    def sleep(self, seconds: float) -> None:
        jitter = self.random.random()
        self.wake(getcurrent(), self.now + seconds * (0.5 + jitter), jitter)
        self.wait()
        self._die_if_due()

    def _die_if_due(self) -> None:
        if not self.is_alive(self._names[getcurrent()]):
            raise Died
        if self.now > LIMIT_S:
            raise TimeoutError("the schedule hangs")


@dataclass
class Group:
    """The process group of one generation: collectives end for all members or for none of them."""

    members: tuple[int, ...]
    arrived: dict[tuple[str, int], dict[int, Any]] = field(default_factory=dict)
    left: set[int] = field(default_factory=set)


@dataclass
class Schedule:
    """What happens to whom."""

    founders: tuple[int, ...]
    joins: dict[int, float]
    deaths: dict[int, float]
    leaves: dict[int, float]
    steps: int
    notices_after_s: float | None = None
    """When the supervisor of the processes hears of a death; None without a supervisor."""

    @classmethod
    def draw(cls, seed: int) -> Schedule:
        pick = random.Random(seed * 7919 + 1)
        founders = tuple(range(pick.randint(1, 5)))
        joiners = range(len(founders), len(founders) + pick.randint(0, 3))
        everybody = [*founders, *joiners]
        # One founder stays whatever happens, so that there is a run to finish.
        immortal = pick.choice(founders)
        mortal = [slot for slot in everybody if slot != immortal]
        joins = {slot: pick.uniform(0, 4) for slot in joiners}
        deaths = {s: joins.get(s, 0.0) + pick.uniform(0, 4) for s in mortal if pick.random() < 0.5}
        leaves = {s: pick.uniform(0, 4) for s in mortal if s not in deaths and pick.random() < 0.2}
        notices_after_s = pick.uniform(0, 0.5) if pick.random() < 0.7 else None
        return cls(founders, joins, deaths, leaves, pick.randint(5, 40), notices_after_s)


@dataclass
class Played:
    """What members did, for the assertions."""

    commits: list[tuple[int, int, int]] = field(default_factory=list)
    """(generation, step, slot), in order."""
    finished: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """The steps in the state of every member that finished."""
    newest: int = 0
    restored: list[tuple[int, int]] = field(default_factory=list)
    """(generation, step) that each world began with."""
    longest_gap_s: float = 0.0
    """Virtual time between two commits, whoever made them."""
    committed_at: float | None = None


def play(seed: int, schedule: Schedule) -> Played:
    """Plays a schedule to its end.

    Raises:
        AssertionError: If a member failed or the schedule hangs.
    """
    clock, played = RandomClock(seed), Played()
    store = Store(clock)
    groups: dict[int, Group] = {}
    ready = {"found": False}
    with virtual(clock):

        def member(slot: int) -> None:
            if slot == 0:
                Membership.found(store, schedule.founders)  # type: ignore[arg-type]
                ready["found"] = True
            while not ready["found"]:
                clock.sleep(0.01)

            def give_up_when_over() -> None:
                if played.finished:
                    raise CommunicationError("the run is over")

            mine = Membership(
                store,  # type: ignore[arg-type]
                slot,
                settle_s=0.3,
                timeout_s=120.0,
                while_joining=give_up_when_over,
            )
            _Member(slot, mine, clock, groups, schedule, played).run()

        def supervisor() -> None:
            dead = dict(schedule.deaths)
            while dead and not played.finished:
                for slot, at in list(dead.items()):
                    if clock.now > at + (schedule.notices_after_s or 0.0):
                        Membership.bury(store, slot)  # type: ignore[arg-type]
                        del dead[slot]
                clock.sleep(0.02)

        if schedule.notices_after_s is not None:
            clock.spawn(SUPERVISOR, supervisor, at=0.0, dies_at=float("inf"))
        for slot in (*schedule.founders, *schedule.joins):
            begin = schedule.joins.get(slot, 0.0)
            # The founder of the store is a safe node, not a member: it must not die before that.
            dies = max(schedule.deaths.get(slot, float("inf")), 0.2 if slot == 0 else 0.0)
            clock.spawn(slot, lambda slot=slot: member(slot), at=begin, dies_at=dies)  # type: ignore[misc]
        clock.run()
    for error in clock.errors:
        raise AssertionError(f"a member failed: {error!r}") from error
    return played


class _Member:
    def __init__(
        self,
        slot: int,
        membership: Membership,
        clock: RandomClock,
        groups: dict[int, Group],
        schedule: Schedule,
        played: Played,
    ) -> None:
        self.slot, self.membership, self.clock = slot, membership, clock
        self.groups, self.schedule, self.played = groups, schedule, played
        self.state: tuple[int, ...] = ()

    def run(self) -> None:
        try:
            world = self.membership.join()
        except CommunicationError:
            # Too late: the run was over before anybody took it in.
            if self.played.finished:
                return
            raise
        while True:
            members = tuple(self.membership._plan(world.generation)[0])
            group = self.groups.setdefault(world.generation, Group(members))
            try:
                over = self._train(world, group)
            except CommunicationError:
                over = False
            if over:
                self.played.finished[self.slot] = self.state
                group.left.add(self.slot)
                return
            group.left.add(self.slot)
            try:
                world = self.membership.next_world(world)
            except Departed:
                return

    def _train(self, world: World, group: Group) -> bool:
        self.membership.await_members(world)
        self._connect(group)
        states = self._exchange(group, "state", 0, self.state)
        self.state = max(states.values(), key=len)
        self.played.restored.append((world.generation, len(self.state)))
        while len(self.state) < self.schedule.steps:
            step = len(self.state) + 1
            if self.clock.now >= self.schedule.leaves.get(self.slot, float("inf")):
                self.membership.leave_at_next_boundary()
            wants = self.membership.change_is_wanted()
            self.clock.sleep(self.clock.random.uniform(0.01, 0.1))
            flags = self._exchange(group, "step", step, wants)
            self.state = (*self.state, step)
            self._commit(world.generation, step)
            if any(flags.values()):
                self._exchange(group, "end", step, None)
                return False
        self._exchange(group, "end", len(self.state), None)
        return True

    def _connect(self, group: Group) -> None:
        # The rendezvous waits for everybody, dead or alive.
        here = group.arrived.setdefault(("connect", 0), {})
        here[self.slot] = None
        deadline = self.clock.now + protocol.CONNECT_S
        while len(here) < len(group.members):
            if self.clock.now > deadline:
                raise CommunicationError("the members did not connect in time")
            self.clock.sleep(0.01)

    def _commit(self, generation: int, step: int) -> None:
        played, now = self.played, self.clock.now
        played.commits.append((generation, step, self.slot))
        if played.committed_at is not None:
            played.longest_gap_s = max(played.longest_gap_s, now - played.committed_at)
        played.committed_at = now

    def _exchange(self, group: Group, tag: str, step: int, value: Any) -> dict[int, Any]:
        here = group.arrived.setdefault((tag, step), {})
        here[self.slot] = value
        deadline = self.clock.now + 30.0
        while len(here) < len(group.members):
            gone = [s for s in group.members if s not in here and self._is_gone(s, group)]
            if gone or self.clock.now > deadline:
                raise CommunicationError(f"slots {gone} are gone")
            self.clock.sleep(0.01)
        # A member may die or fail between the end of the exchange and its commit.
        if len(group.members) > 1 and self.clock.random.random() < 0.01:
            raise CommunicationError("the last part did not arrive")
        return dict(here)

    def _is_gone(self, slot: int, group: Group) -> bool:
        return slot in group.left or not self.clock.is_alive(slot)


def check(seed: int) -> Played:
    """Plays one schedule and checks it; a failure names the seed."""
    schedule = Schedule.draw(seed)
    hint = f"seed {seed}: {schedule}"
    try:
        played = play(seed, schedule)
    except AssertionError as error:
        raise AssertionError(f"{hint}: {error}") from error
    everything = tuple(range(1, schedule.steps + 1))
    assert played.finished, hint
    # Whoever finished has every step exactly once, in order.
    assert set(played.finished.values()) == {everything}, hint
    # One world at a time commits: a step is only ever committed again in a later generation.
    generations: dict[int, int] = {}
    for generation, step, _ in played.commits:
        assert all(generations.get(later, -1) <= generation for later in (step, step + 1)), hint
        generations[step] = generation
    # Every member of a world begins where the others begin.
    begins: dict[int, set[int]] = {}
    for generation, step in played.restored:
        begins.setdefault(generation, set()).add(step)
    assert all(len(steps) == 1 for steps in begins.values()), hint
    return played


def check_some(seeds: range) -> int:
    """Checks a portion of schedules, for a process of its own; how many they were."""
    for seed in seeds:
        check(seed)
    return len(seeds)
