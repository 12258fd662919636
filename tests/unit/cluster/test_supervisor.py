"""The supervisor of members in virtual time, with members that do what they are told: who is requested,
started, asked to leave, ended and reported."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from elastic_kfac.cluster.ray.places import Answer
from elastic_kfac.cluster.run.coordinator import RunCoordinator
from elastic_kfac.cluster.run.crash_loop import RankError
from elastic_kfac.cluster.run.supervisor import RETRY_S, Supervisor
from elastic_kfac.config import parse_config
from elastic_kfac.training.membership import Membership

ERROR = RankError(0, "ValueError", "ValueError: a defect of the model")


class Cluster:
    """Places, members and the coordinator. Every member imports for 2 s; worlds form at once."""

    def __init__(self, nodes: int, *, workers: tuple[int, int] = (1, 3)) -> None:
        self.now = 0.0
        self.free = [f"node-{n}" for n in range(nodes)]
        self.nodes = {f"node-{n}" for n in range(nodes)}
        self.leaving: dict[str, int] = {}
        self.members: dict[int, dict[str, Any]] = {}
        """By actor: node, slot, how it ended."""
        self.calls: list[tuple[Any, ...]] = []
        self.places: dict[int, str | None] = {}
        self.stop_reason: str | None = None
        self.verdicts: list[RankError | None] = []
        self.store: Any = None
        self.events: list[tuple[float, Callable[[], None]]] = []
        config = parse_config(
            {"elastic": {"min_workers": workers[0], "max_workers": workers[1], "in_place": True}}
        )
        self.supervisor = Supervisor(
            SimpleNamespace(config=config, share=None, hangs_after_s=20.0),  # type: ignore[arg-type]
            self,
            ask=self.ask,
            open_store=self.open_store,
            leaving_nodes=lambda: self.leaving,
            nodes=lambda: self.nodes,
            clock=SimpleNamespace(monotonic=lambda: self.now, sleep=self.sleep),
        )

    # ---- time ----------------------------------------------------------------------------------

    def at(self, moment: float, act: Callable[[], None]) -> None:
        self.events.append((moment, act))

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        assert self.now < 500, f"the supervisor hangs: {self.calls[-5:]}"
        for moment, act in [event for event in self.events if event[0] <= self.now]:
            self.events.remove((moment, act))
            act()

    # ---- the coordinator ----------------------------------------------------------------------

    def ask(self, method: str, *arguments: Any) -> Any:
        inspect.signature(getattr(RunCoordinator, method)).bind(self, *arguments)
        if method == "supervision":
            # Ten steps a second.
            step = int(10 * self.now)
            return {"stop_reason": self.stop_reason, "wanted_workers": None, "step": step}
        self.calls.append((method, *arguments))
        if method == "park":
            for member in self.in_world():
                member["end"] = Answer({"status": "parked"})
        if method in ("members_lost", "newcomer_lost"):
            return self.verdicts.pop(0) if self.verdicts else None
        return len(self.said("group_started")) if method == "group_started" else None

    def said(self, method: str) -> list[tuple[Any, ...]]:
        return [tuple(arguments) for name, *arguments in self.calls if name == method]

    # ---- places and members --------------------------------------------------------------------

    def request(self) -> int:
        self.places[len(self.places)] = None
        return len(self.places) - 1

    def is_there(self, place: int) -> bool:
        usable = [node for node in self.free if node not in self.leaving]
        if self.places[place] is None and usable:
            self.places[place] = usable[0]
            self.free.remove(usable[0])
        return self.places[place] is not None

    def start(self, place: int) -> int:
        self.members[place] = {"node": self.places[place], "ready": self.now + 2, "end": None}
        return place

    def call(self, actor: int, method: str, *arguments: Any) -> Any:
        member = self.members[actor]
        if method == "run":
            member["slot"] = arguments[-1]
            self.plan()
        if method == "leave":
            member["end"] = Answer({"status": "left"})
            self.plan()
        return method, actor

    def answer(self, call: Any) -> Answer | None:
        method, actor = call
        member = self.members[actor]
        if method == "prepare":
            ready = self.now >= member["ready"]
            return Answer((100 + actor, member["node"])) if ready else None
        if method == "ping":
            return None if member.get("hangs") else Answer()
        end: Answer | None = member["end"]
        return end

    def end(self, place: int, actor: int | None = None) -> None:
        node = self.places.pop(place)
        self.places[place] = None
        if node is not None and not self.members.get(place, {}).get("node_lost"):
            self.free.append(node)
        self.members.pop(place, None)

    def open_store(self) -> tuple[Any, tuple[str, int]]:
        self.store = dist.HashStore()
        return self.store, ("127.0.0.1", 1)

    def in_world(self) -> list[dict[str, Any]]:
        return [m for m in self.members.values() if "slot" in m and m["end"] is None]

    def plan(self) -> None:
        """The members agree on a world of all that live."""
        prefixed = dist.PrefixStore("membership", self.store)
        slots = sorted(m["slot"] for m in self.in_world() if not m.get("left_out"))
        generation = int(prefixed.get("generation")) + 1
        plan = json.dumps({"members": slots, "joins_seen": 0})
        prefixed.set(f"plan/{generation}", plan)
        prefixed.set("generation", str(generation))

    def finish(self) -> None:
        for member in self.in_world():
            member["end"] = Answer({"status": "finished", "steps": 9})

    def die(self, actor: int, error: str = "ActorDiedError", *, with_node: bool = False) -> None:
        self.members[actor] |= {"end": Answer(error=error), "node_lost": with_node}
        self.plan()


def test_first_world_has_every_member_with_a_place_and_others_join_later() -> None:
    cluster = Cluster(2)
    cluster.at(10, lambda: cluster.free.append("new"))
    cluster.at(20, cluster.finish)
    assert cluster.supervisor.run() == "finished"
    assert cluster.said("group_started") == [({0: 100, 1: 101}, {0: "node-0", 1: "node-1"})]
    attempt, pids, nodes = cluster.said("world_formed")[-1]
    assert (attempt, pids[2], nodes[2]) == (1, 102, "new")
    assert [arguments[1] for arguments in cluster.said("rank_left")] == [0, 1, 2]
    assert not cluster.members and not any(cluster.places.values())


def test_lost_members_are_buried_reported_together_and_replaced() -> None:
    cluster = Cluster(3)
    cluster.at(10, lambda: cluster.die(0))
    cluster.at(10.1, lambda: cluster.die(2, "NodeDied: its node", with_node=True))
    cluster.at(20, cluster.finish)
    assert cluster.supervisor.run() == "finished"
    ((errors, lost_nodes, left),) = cluster.said("members_lost")
    # Rank 0 of three, then rank 1 of the two that were left.
    assert (set(errors), lost_nodes, left) == ({0, 1}, ["node-2"], 1)
    membership = dist.PrefixStore("membership", cluster.store)
    assert membership.check(["gone/0"]) and membership.check(["gone/2"])
    assert not membership.check(["gone/1"])
    # One came back on the node that is still there; the other one's place stayed requested.
    assert cluster.said("world_formed")[-1][1] == {0: 101, 1: 103}


def test_member_on_a_draining_node_leaves_and_a_successor_joins() -> None:
    cluster = Cluster(2)
    cluster.at(10, lambda: cluster.leaving.update({"node-1": 0}))
    cluster.at(15, lambda: cluster.free.append("new"))
    cluster.at(25, cluster.finish)
    assert cluster.supervisor.run() == "finished"
    assert cluster.said("member_leaves") == [("1 node being drained (node-1)", 0.0)]
    assert cluster.said("park") == [] and cluster.said("members_lost") == []
    assert set(cluster.said("world_formed")[-1][2].values()) == {"node-0", "new"}


@pytest.mark.parametrize("notice", [False, True])
def test_last_member_waits_for_a_successor_if_there_is_time(
    notice: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(1)
    monkeypatch.setattr("elastic_kfac.cluster.run.supervisor.time.time", lambda: cluster.now)
    deadline = 600_000 if notice else 0
    cluster.at(10, lambda: cluster.leaving.update({"node-0": deadline}))
    cluster.at(15, lambda: cluster.free.append("new"))
    cluster.at(30, cluster.finish)
    assert cluster.supervisor.run() == "finished"
    names = [name for name, *_ in cluster.calls]
    assert ("member_leaves" in names, "park" in names) == (notice, not notice)
    assert names.count("group_started") == (1 if notice else 2)
    assert set(cluster.said("world_formed")[-1][2].values()) == {"new"}


def test_fewer_than_the_least_park_and_the_next_attempt_waits_for_them() -> None:
    cluster = Cluster(2, workers=(2, 2))
    cluster.at(10, lambda: cluster.die(1, with_node=True))
    cluster.at(30, lambda: cluster.free.append("new"))
    cluster.at(50, cluster.finish)
    assert cluster.supervisor.run() == "finished"
    assert cluster.said("park") == [("1 of at least 2 workers are left", None)]
    assert [len(pids) for pids, _ in cluster.said("group_started")] == [2, 2]
    assert len(cluster.said("attempt_over")) == 1


def test_attempt_without_members_is_followed_by_another_until_the_coordinator_ends_the_run() -> (
    None
):
    cluster = Cluster(2)
    cluster.verdicts = [None, ERROR]
    for moment in (10, 30):
        cluster.at(moment, lambda: [cluster.die(actor) for actor in list(cluster.members)])
    assert cluster.supervisor.run() == "failed"
    assert len(cluster.said("group_started")) == 2
    assert [left for _, _, left in cluster.said("members_lost")] == [0, 0]


def test_member_that_hangs_is_ended_within_half_a_minute() -> None:
    cluster = Cluster(2)
    cluster.at(10, lambda: cluster.members[1].update(hangs=True))
    cluster.at(60, cluster.finish)
    assert cluster.supervisor.run() == "finished"
    ((errors, _, left),) = cluster.said("members_lost")
    assert errors == {1: "a worker did not answer for 20 s"}
    assert left == 1


def test_stop_before_there_is_room_and_while_members_run() -> None:
    waiting = Cluster(0)
    waiting.at(10, lambda: setattr(waiting, "stop_reason", "Ctrl-C"))
    assert waiting.supervisor.run() == "parked"

    def park(cluster: Cluster) -> None:
        cluster.stop_reason = "Ctrl-C"
        for member in cluster.in_world():
            member["end"] = Answer({"status": "parked", "steps": 3})

    running = Cluster(2)
    running.at(10, lambda: park(running))
    assert running.supervisor.run() == "parked"
    assert len(running.said("rank_left")) == 2 and not running.members


def test_supervisor_that_replaces_a_lost_one_ends_where_the_run_has_to() -> None:
    cluster = Cluster(1)
    cluster.verdicts = [ERROR]
    cluster.supervisor._ask = lambda method, *arguments: ERROR
    assert cluster.supervisor.run() == "failed"


def test_joined_slots_are_never_used_twice() -> None:
    cluster = Cluster(2, workers=(1, 2))
    slots: list[int] = []
    original = cluster.call
    cluster.call = lambda actor, method, *arguments: (  # type: ignore[method-assign]
        slots.append(arguments[-1]) if method == "run" else None,
        original(actor, method, *arguments),
    )[1]
    for moment in (10.0, 20.0, 30.0):
        cluster.at(moment, lambda: cluster.die(max(cluster.members)))
    cluster.at(50, cluster.finish)
    assert cluster.supervisor.run() == "finished"
    assert slots == sorted(set(slots)) and len(slots) == 5
    assert Membership.newest_plan(cluster.store)[1] == [0, slots[-1]]


def test_newcomers_that_fail_are_bounded_until_a_node_comes_or_time_has_passed() -> None:
    cluster = Cluster(2)
    failures: list[float] = []
    original = cluster.call

    def call(actor: int, method: str, *arguments: Any) -> Any:
        answer = original(actor, method, *arguments)
        if method == "run" and cluster.places[actor] == "bad":
            cluster.members[actor]["end"] = Answer(error="ValueError: a defect of its node")
            failures.append(cluster.now)
        return answer

    cluster.call = call  # type: ignore[method-assign]
    cluster.verdicts = [None, None, *[ERROR] * 9]
    cluster.at(10, lambda: cluster.free.append("bad"))
    cluster.at(100, lambda: cluster.nodes.add("another one"))
    cluster.at(499, cluster.finish)
    assert cluster.supervisor.run() == "finished"
    # Three tries, one when a node had come, one after some time; the two others stepped all along.
    assert len(failures) == 5
    assert failures[2] < 30 and 100 < failures[3] < 110
    assert RETRY_S < failures[4] - failures[3] < RETRY_S + 10
    assert {left for _, left in cluster.said("newcomer_lost")} == {2}
    assert cluster.said("members_lost") == [] and len(cluster.said("group_started")) == 1


def test_newcomer_that_steps_clears_the_record_and_its_later_loss_is_that_of_a_member() -> None:
    cluster = Cluster(2)
    cluster.at(10, lambda: cluster.free.append("new"))
    cluster.at(20, lambda: cluster.die(2))
    cluster.at(30, cluster.finish)
    assert cluster.supervisor.run() == "finished"
    # The third member, and the one that took its place.
    assert len(cluster.said("newcomer_stays")) == 2
    assert cluster.said("newcomer_lost") == []
    ((errors, _, left),) = cluster.said("members_lost")
    assert (set(errors), left) == ({2}, 2)


def test_places_that_are_too_few_are_given_back_and_requested_again() -> None:
    cluster = Cluster(1, workers=(2, 2))
    held: list[tuple[float, int]] = []
    original = cluster.sleep

    def sleep(seconds: float) -> None:
        held.append((cluster.now, sum(place is not None for place in cluster.places.values())))
        original(seconds)

    cluster.supervisor._clock.sleep = sleep
    cluster.at(200, lambda: cluster.free.append("new"))
    cluster.at(220, cluster.finish)
    assert cluster.supervisor.run() == "finished"
    given_back = [now for now, number in held if number == 0 and 1 < now < 200]
    assert 60 < given_back[0] < 70 and len(given_back) > 40
    assert [len(pids) for pids, _ in cluster.said("group_started")] == [2]


def test_process_that_never_becomes_ready_is_replaced() -> None:
    cluster = Cluster(1)
    cluster.at(0.5, lambda: cluster.members[0].update(ready=1000.0))
    cluster.at(300, cluster.finish)
    assert cluster.supervisor.run() == "finished"
    assert cluster.said("newcomer_lost") == [("a process was not ready after 240 s", 0)]


def test_attempt_is_over_although_a_member_that_was_left_out_waits_to_be_taken_in_again() -> None:
    cluster = Cluster(2)

    def leave_out() -> None:
        cluster.members[1]["left_out"] = True
        cluster.plan()
        cluster.plan = lambda: None  # type: ignore[method-assign]

    original = cluster.plan
    cluster.at(10, leave_out)
    cluster.at(15, lambda: cluster.die(0))
    cluster.at(15.1, lambda: setattr(cluster, "plan", original))
    cluster.at(40, cluster.finish)
    assert cluster.supervisor.run() == "finished"
    assert len(cluster.said("attempt_over")) == 1 and len(cluster.said("group_started")) == 2


def test_attempt_is_over_although_a_newcomer_still_waits_to_be_taken_in() -> None:
    cluster = Cluster(1, workers=(1, 2))
    cluster.at(10, lambda: cluster.free.append("new"))
    original = cluster.plan
    # The last member dies before anybody takes the newcomer in.
    cluster.at(9, lambda: setattr(cluster, "plan", lambda: None))
    cluster.at(14, lambda: cluster.die(0))
    cluster.at(15, lambda: setattr(cluster, "plan", original))
    cluster.at(40, cluster.finish)
    assert cluster.supervisor.run() == "finished"
    assert len(cluster.said("attempt_over")) == 1 and len(cluster.said("group_started")) == 2
    ((errors, _, left),) = cluster.said("members_lost")
    assert (set(errors), left) == ({0}, 0)
