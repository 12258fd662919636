"""In place: Ray Train's worker supervises, and every rank is a member in a place of its own.

`supervise` is the training function of a `TorchTrainer` with one worker beside the cluster's head. It
needs no CPU and never trains: it requests places, starts members in them (`member.py`), hosts the store
where they meet (`training/membership.py`), and returns when the run is over. Ray Train thus has no reason
to tear anything down when the world changes, whoever comes, leaves or dies, and every rank is replaced
in the same way: a rank that Ray Train held itself could be neither added nor dropped, would come back
after 8 to 12 s instead of one, and would wait for its place while other ranks hold all of them.

An *attempt* ends when no member is left, fewer than `elastic.min_workers` are, or all of their nodes
leave at once; the next one restores the newest state that was kept. If this process dies, its members
die with it, and Ray Train starts it again: that is an attempt, too.
"""

from __future__ import annotations

import importlib
import random
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Protocol

import ray
from ray.util import get_current_placement_group

from elastic_kfac.cluster.ray.idle_workers import prestart_workers
from elastic_kfac.cluster.ray.nodes import alive_worker_nodes, draining_nodes
from elastic_kfac.cluster.ray.places import NODE_DIED, Answer, Places, give_back
from elastic_kfac.cluster.run.crash_loop import RankError
from elastic_kfac.cluster.run.member import Member
from elastic_kfac.cluster.run.membership import MEMBER_TIMEOUT_S, listening_store
from elastic_kfac.cluster.run.worker import WorkerSettings

TICK_S = 0.02
LOOK_S = 0.2
"""Between two looks at nodes, pending places and the coordinator."""
SETTLE_S = 0.3
"""Losses this close together are one."""
PLACING_S = 1.5
"""A place that was not found by then does not keep the first world waiting."""
STARTING_S = 30.0
"""A member that was not ready by then does not either."""
UNREADY_AFTER_S = 240.0
"""So is a process that was started and has not imported everything."""
HOLDING_S = 60.0
"""Places that are too few for so long are given back: another run may wait for them."""
RETRY_S = 300.0
"""Until the next try after newcomers have failed again and again."""
SHORT_NOTICE_S = 10.0
"""With less notice the last members save their state instead of waiting for a successor."""
ENDING_S = 60.0
"""How long the other members may take once one has finished or parked."""


class Hands(Protocol):
    """What the supervisor does to the cluster (`places.Places`)."""

    def request(self) -> Any: ...
    def is_there(self, place: Any) -> bool: ...
    def start(self, place: Any) -> Any: ...
    def call(self, actor: Any, method: str, *arguments: Any) -> Any: ...
    def answer(self, call: Any) -> Answer | None: ...
    def end(self, place: Any, actor: Any = None) -> None: ...


@dataclass
class Seat:
    """A place and what became of it: requested, starting, prepared, member."""

    place: Any
    since: float
    """When it was requested, or its process started."""
    actor: Any = None
    prepared: Any = None
    """The call that imports."""
    pid: int = 0
    node: str = ""
    slot: int = -1
    rank: int | None = None
    """In the newest of its worlds."""
    in_world: bool = False
    """Whether that is the newest of all."""
    run: Any = None
    """The call that trains."""
    ping: Any = None
    pinged_at: float = 0.0
    leaves: bool = False
    first_look: tuple[int, int] | None = None
    """Of a newcomer in the world: generation and step when it was first looked at."""
    stays: bool = False
    """Whether it has stepped with the others, or is a founder."""

    @property
    def is_member(self) -> bool:
        return self.run is not None

    @property
    def is_prepared(self) -> bool:
        return self.pid > 0 and self.run is None


@dataclass
class _Attempt:
    """Worlds that meet at one store."""

    number: int
    address: tuple[str, int]
    store: Any
    next_slot: int
    generation: int = -1
    lost: dict[int, str] = field(default_factory=dict)
    lost_nodes: list[str] = field(default_factory=list)
    lost_at: float = 0.0
    ended: set[str] = field(default_factory=set)
    """How members that returned have ended."""
    ended_at: float = 0.0
    parks: bool = False


class Supervisor:
    """Keeps as many members as the run wants, and tells the coordinator what becomes of them."""

    def __init__(
        self,
        settings: WorkerSettings,
        hands: Hands,
        *,
        ask: Callable[..., Any],
        open_store: Callable[[], tuple[Any, tuple[str, int]]],
        leaving_nodes: Callable[[], Mapping[str, int]] = draining_nodes,
        keep_spares: Callable[[set[str]], object] = lambda nodes: None,
        nodes: Callable[[], Collection[str]] = alive_worker_nodes,
        places: Any = None,
        clock: Any = time,
    ) -> None:
        """A supervisor without members.

        Args:
            ask: Calls a method of the coordinator and returns its answer.
            open_store: Opens the store of an attempt; also returns its address.
            leaving_nodes: The draining nodes with their deadlines.
            keep_spares: Keeps idle processes ready on these nodes.
            nodes: The nodes that stay.
            places: Ray's handle of this process's own placement group.
        """
        elastic = settings.config.elastic
        self._settings = settings
        self._least, self._most = elastic.min_workers, elastic.max_workers
        self._hands, self._ask = hands, ask
        self._open_store, self._leaving_nodes = open_store, leaving_nodes
        self._keep_spares, self._clock = keep_spares, clock
        self._nodes, self._places = nodes, places
        self._given_up: tuple[float, set[str]] | None = None
        """When newcomers had failed too often, and the nodes there were."""
        self._paused_until = float("-inf")
        self._seats: list[Seat] = []
        self._attempt: _Attempt | None = None
        self._looked_at = float("-inf")
        self._leaving: Mapping[str, int] = {}
        self._wanted = self._most
        self._stops = self._fails = False
        self._without_spares: set[str] = set()
        """Nodes of the newest world, until it has stepped."""
        self._step_before_spares: int | None = None

    def run(self) -> str:
        """Returns how the run ended: `finished`, `parked` or `failed`."""
        try:
            if self._ask("supervisor_started", self._places) is not None:
                return "failed"
            while True:
                status = self._tick()
                if status is not None:
                    return status
                self._clock.sleep(TICK_S)
        except Exception as error:
            self._ask("supervisor_failed", RankError.of(-1, error))
            raise
        finally:
            for seat in list(self._seats):
                self._drop(seat)

    # ---- one look ------------------------------------------------------------------------------

    def _tick(self) -> str | None:
        now = self._clock.monotonic()
        if now - self._looked_at >= LOOK_S:
            self._looked_at = now
            self._look(now)
        for seat in list(self._seats):
            self._advance(seat, now)
        if self._fails:
            return "failed"
        attempt = self._attempt
        if attempt is None:
            if self._stops:
                return "parked"
            self._found_if_ready(now)
            return None
        self._watch_world(attempt)
        settled = not self._in_world() or now - attempt.lost_at >= SETTLE_S
        if attempt.lost and settled and self._judge(attempt) is not None:
            return "failed"
        return self._end_if_over(attempt, now)

    def _look(self, now: float) -> None:
        answer = self._ask("supervision")
        self._stops = answer["stop_reason"] is not None
        wanted = self._most
        if self._settings.config.elastic.batch_policy == "abs":
            wanted = min(wanted, answer["wanted_workers"] or wanted)
        if self._settings.share is not None:
            wanted = min(wanted, self._settings.share())
        self._wanted = max(self._least, self._without_newcomers(wanted, now))
        self._leaving = self._leaving_nodes()
        if self._stops:
            return
        self._drain(now)
        if now >= self._paused_until:
            self._fill(now)
        self._settle_newcomers(answer["step"])
        self._start_spares(answer["step"])
        for seat in self._seats:
            if seat.place is not None and seat.actor is None and self._hands.is_there(seat.place):
                seat.actor = self._hands.start(seat.place)
                seat.prepared = self._hands.call(seat.actor, "prepare")
                seat.since = now

    def _fill(self, now: float) -> None:
        """Requests places, and gives back those beyond what the run wants."""
        staying = [s for s in self._seats if not s.leaves and s.node not in self._leaving]
        for _ in range(self._wanted - len(staying)):
            self._seats.append(Seat(self._hands.request(), now))
        for seat in sorted(staying, key=_worth)[: max(0, len(staying) - self._wanted)]:
            if seat.is_member:
                self._let_go(seat, f"the run wants {_count(self._wanted, 'worker')}")
            else:
                self._drop(seat)

    def _drain(self, now: float) -> None:
        """Members leave draining nodes; the last ones not before somebody can succeed them."""
        members = [seat for seat in self._members() if not seat.leaves]
        leaving = [seat for seat in members if seat.node in self._leaving]
        for seat in list(self._seats):
            if not seat.is_member and seat.node in self._leaving:
                self._drop(seat)
        attempt = self._attempt
        if not leaving or attempt is None or attempt.parks:
            return
        nodes = sorted({seat.node for seat in leaving})
        names = ", ".join(node[:8] for node in nodes)
        reason = f"{_count(len(nodes), 'node')} being drained ({names})"
        staying = [seat for seat in members if seat not in leaving and seat.in_world]
        notice_s = self._notice_s(nodes)
        if len(staying) >= self._least:
            for place, seat in enumerate(leaving):
                self._let_go(seat, reason, None if place else notice_s)
        elif notice_s < SHORT_NOTICE_S:
            self._park(attempt, reason, notice_s)

    def _notice_s(self, nodes: list[str]) -> float:
        deadlines = [self._leaving.get(node, 0) for node in nodes]
        return max(0.0, min(at / 1000 - time.time() if at else 0.0 for at in deadlines))

    def _advance(self, seat: Seat, now: float) -> None:
        if seat.prepared is not None:
            answer = self._hands.answer(seat.prepared)
            if answer is None:
                if now - seat.since > UNREADY_AFTER_S:
                    error = f"a process was not ready after {UNREADY_AFTER_S:g} s"
                    self._lose(seat, error, now)
                return
            seat.prepared = None
            if answer.error is not None:
                self._lose(seat, answer.error, now)
                return
            seat.pid, seat.node = answer.value
        if seat.is_prepared and self._attempt is not None and not self._attempt.parks:
            self._join(self._attempt, seat)
        if seat.is_member:
            answer = self._hands.answer(seat.run)
            if answer is not None:
                self._returned(seat, answer, now)
            else:
                self._fence(seat, now)

    def _fence(self, seat: Seat, now: float) -> None:
        if seat.ping is None:
            if now - seat.pinged_at >= 1.0:
                seat.ping, seat.pinged_at = self._hands.call(seat.actor, "ping"), now
        elif self._hands.answer(seat.ping) is not None:
            seat.ping = None
        elif now - seat.pinged_at > self._settings.hangs_after_s:
            self._lose(seat, f"a worker did not answer for {self._settings.hangs_after_s:g} s", now)

    # ---- members -------------------------------------------------------------------------------

    def _members(self) -> list[Seat]:
        """Those that train, and those that wait to."""
        return [seat for seat in self._seats if seat.is_member]

    def _in_world(self) -> list[Seat]:
        return [seat for seat in self._members() if seat.in_world]

    def _found_if_ready(self, now: float) -> None:
        """Begins an attempt once enough members are prepared and no other one is about to be."""
        prepared = [seat for seat in self._seats if seat.is_prepared]
        if len(prepared) < self._least:
            self._yield_places(prepared, now)
            return
        for seat in self._seats:
            patience_s = PLACING_S if seat.actor is None else STARTING_S
            if not seat.is_prepared and now - seat.since < patience_s:
                return
        from elastic_kfac.training.membership import Membership

        store, address = self._open_store()
        Membership.found(store, range(len(prepared)))
        pids = {slot: seat.pid for slot, seat in enumerate(prepared)}
        nodes = {slot: seat.node for slot, seat in enumerate(prepared)}
        number = self._ask("group_started", pids, nodes)
        self._attempt = _Attempt(number, address, store, 0)
        for seat in prepared:
            seat.stays = True
            self._join(self._attempt, seat)

    def _yield_places(self, prepared: Sequence[Seat], now: float) -> None:
        """Two runs that each hold a part of what both need must not wait for each other for ever."""
        if any(now - seat.since > HOLDING_S for seat in prepared):
            for seat in list(self._seats):
                self._drop(seat)
            self._paused_until = now + random.uniform(1.0, 10.0)

    def _without_newcomers(self, wanted: int, now: float) -> int:
        """As many as there are, for a while, once newcomers have failed too often."""
        if self._given_up is None or self._attempt is None:
            return wanted
        since, nodes = self._given_up
        if now - since > RETRY_S or not set(self._nodes()) <= nodes:
            self._given_up = None
            return wanted
        return min(wanted, len(self._members()))

    def _start_spares(self, step: int) -> None:
        # Not before: what spares import takes the CPU from members that start.
        if self._step_before_spares is None:
            self._step_before_spares = step
        elif self._without_spares and step != self._step_before_spares:
            nodes, self._without_spares = self._without_spares, set()
            self._keep_spares(nodes)

    def _settle_newcomers(self, step: int) -> None:
        if self._attempt is None:
            return
        generation = self._attempt.generation
        for seat in self._in_world():
            if seat.stays:
                continue
            if seat.first_look is None or seat.first_look[0] != generation:
                seat.first_look = (generation, step)
            elif step > seat.first_look[1] + 1:
                seat.stays = True
                self._ask("newcomer_stays")

    def _join(self, attempt: _Attempt, seat: Seat) -> None:
        seat.slot, attempt.next_slot = attempt.next_slot, attempt.next_slot + 1
        arguments = (self._settings, attempt.number, attempt.address, seat.slot)
        seat.run = self._hands.call(seat.actor, "run", *arguments)

    def _let_go(self, seat: Seat, reason: str, notice_s: float | None = None) -> None:
        seat.leaves = True
        self._ask("member_leaves", reason, notice_s)
        self._hands.call(seat.actor, "leave")

    def _returned(self, seat: Seat, answer: Answer, now: float) -> None:
        attempt = self._attempt
        assert attempt is not None
        if answer.error is not None:
            self._lose(seat, answer.error, now)
            return
        if answer.value["status"] != "left":
            attempt.ended.add(answer.value["status"])
            attempt.ended_at = attempt.ended_at or now
            self._ask("rank_left", attempt.number, seat.slot, answer.value)
        self._drop(seat)

    def _lose(self, seat: Seat, error: str, now: float) -> None:
        """A process is gone, or ended here because it hangs; the others need not wait for it."""
        attempt = self._attempt
        self._drop(seat)
        if attempt is not None and seat.slot >= 0:
            from elastic_kfac.training.membership import Membership

            Membership.bury(attempt.store, seat.slot)
        left = len(self._in_world())
        if attempt is None:
            self._fails = self._ask("newcomer_lost", error, 0) is not None or self._fails
            return
        failed = left and not (seat.stays or seat.leaves or error.startswith(NODE_DIED))
        if failed and self._ask("newcomer_lost", error, left) is not None:
            self._given_up = now, set(self._nodes())
        if (seat.stays or seat.rank is not None) and not seat.leaves:
            attempt.lost_at = attempt.lost_at if attempt.lost else now
            attempt.lost[seat.slot if seat.rank is None else seat.rank] = error
            attempt.lost_nodes += [seat.node] if error.startswith(NODE_DIED) else []

    def _drop(self, seat: Seat) -> None:
        self._seats.remove(seat)
        self._hands.end(seat.place, seat.actor)

    # ---- worlds --------------------------------------------------------------------------------

    def _watch_world(self, attempt: _Attempt) -> None:
        from elastic_kfac.training.membership import Membership

        generation, slots = Membership.newest_plan(attempt.store)
        if generation == attempt.generation:
            return
        attempt.generation = generation
        seats = {slots.index(seat.slot): seat for seat in self._members() if seat.slot in slots}
        for seat in self._members():
            # Whoever was too slow for this plan waits to be taken in again.
            seat.in_world = seat.slot in slots
        for rank, seat in seats.items():
            seat.rank = rank
        pids = {rank: seat.pid for rank, seat in seats.items()}
        nodes = {rank: seat.node for rank, seat in seats.items()}
        self._ask("world_formed", attempt.number, pids, nodes)
        self._without_spares, self._step_before_spares = set(nodes.values()), None

    def _judge(self, attempt: _Attempt) -> RankError | None:
        lost, attempt.lost = attempt.lost, {}
        nodes, attempt.lost_nodes = attempt.lost_nodes, []
        left = len(self._in_world())
        error: RankError | None = self._ask("members_lost", lost, nodes, left)
        if error is None and 0 < left < self._least:
            self._park(attempt, f"{left} of at least {self._least} workers are left")
        return error

    def _park(self, attempt: _Attempt, reason: str, notice_s: float | None = None) -> None:
        """Members save their state and return; the next attempt begins when there is room."""
        if not attempt.parks:
            attempt.parks = True
            self._ask("park", reason, notice_s)

    def _end_if_over(self, attempt: _Attempt, now: float) -> str | None:
        late = attempt.ended and now - attempt.ended_at > ENDING_S
        if self._in_world() and not late:
            return None
        if "finished" in attempt.ended:
            return "finished"
        if self._stops:
            return "parked"
        self._attempt = None
        for seat in self._members():
            self._drop(seat)
        self._ask("attempt_over")
        return None


def _worth(seat: Seat) -> tuple[int, int]:
    """Sorts seats by what their loss costs; newcomers first."""
    stage = 0 if seat.actor is None else 1 if not seat.is_member else 2
    return stage, -seat.slot


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def supervise(settings: WorkerSettings) -> str:
    """The training function; returns how the run ended."""

    def ask(method: str, *arguments: Any) -> Any:
        return ray.get(getattr(settings.coordinator, method).remote(*arguments))

    def open_store() -> tuple[Any, tuple[str, int]]:
        host = ray.util.get_node_ip_address()
        store, port = listening_store(host, None, timedelta(seconds=MEMBER_TIMEOUT_S))
        return store, (host, port)

    def keep_spares(nodes: set[str]) -> None:
        if settings.spare_processes:
            prestart_workers(nodes, settings.spare_processes)

    # A supervisor that was lost held them.
    give_back(settings.places)
    # The store needs torch; members start meanwhile.
    module = "elastic_kfac.training.membership"
    threading.Thread(target=importlib.import_module, args=(module,), daemon=True).start()
    return Supervisor(
        settings,
        Places(Member, settings.config.resources.of_a_worker(), owner=settings.places),
        ask=ask,
        open_store=open_store,
        keep_spares=keep_spares,
        places=get_current_placement_group(),
    ).run()
