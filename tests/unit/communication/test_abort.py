"""Ending groups whose collectives wait for ever: when a watch aborts them, when not, and then what.

The collectives are stand-ins that wait as NCCL's do, until somebody aborts them.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from elastic_kfac.communication import abort
from elastic_kfac.communication.abort import AbortWatch, abort_groups, let_processes_survive
from elastic_kfac.errors import CommunicationError
from elastic_kfac.training import membership as protocol
from elastic_kfac.training.membership import Membership, World

LONG_S = 60.0


class Spinning:
    """A communicator that never hears of a loss."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self.aborted = threading.Event()
        self.destroyed = False

    def all_reduce(self) -> None:
        assert self.aborted.wait(LONG_S), "nobody aborted the collective"
        raise CommunicationError("the communicator was aborted")


def test_watch_aborts_once_when_the_loss_has_stood_for_a_moment() -> None:
    lost, calls = threading.Event(), []
    watch = AbortWatch(lost.is_set, abort=lambda: calls.append(1), poll_s=0.001, grace_s=0.01)
    time.sleep(0.05)
    assert calls == [] and not watch.aborted
    lost.set()
    watch._thread.join(LONG_S)
    assert calls == [1] and watch.aborted
    watch.stop()
    assert calls == [1]


def test_a_watch_that_was_stopped_in_the_grace_aborts_nothing() -> None:
    asked, calls = threading.Event(), []

    def is_lost() -> bool:
        asked.set()
        return True

    watch = AbortWatch(is_lost, abort=lambda: calls.append(1), poll_s=0.001, grace_s=LONG_S)
    assert asked.wait(LONG_S)
    watch.stop()
    assert not watch._thread.is_alive()
    assert calls == [] and not watch.aborted


def test_stop_waits_for_an_abort_under_way() -> None:
    begun, may_end, order = threading.Event(), threading.Event(), []

    def slow_abort() -> None:
        begun.set()
        may_end.wait(LONG_S)
        order.append("aborted")

    watch = AbortWatch(lambda: True, abort=slow_abort, poll_s=0.001, grace_s=0.001)
    assert begun.wait(LONG_S)
    threading.Timer(0.05, may_end.set).start()
    watch.stop()
    order.append("stopped")
    assert order == ["aborted", "stopped"]


def test_settings_of_a_person_stay() -> None:
    variables = {"TORCH_NCCL_ASYNC_ERROR_HANDLING": "2"}
    let_processes_survive(variables)
    assert variables == {
        "TORCH_NCCL_ASYNC_ERROR_HANDLING": "2",
        "TORCH_NCCL_BLOCKING_WAIT": "1",
    }


def test_nothing_to_abort_is_no_error() -> None:
    assert not dist.is_initialized()
    abort_groups()


class World2:
    """Slots 0 and 1 at one store; the test is slot 0, and its groups are stand-ins."""

    def __init__(self) -> None:
        self.store = dist.HashStore()
        Membership.found(self.store, [0, 1])
        self.groups: list[Spinning] = []
        self.mine = Membership(self.store, 0, backend="nccl", settle_s=0.05, timeout_s=LONG_S)
        self.other = Membership(self.store, 1, backend="nccl", settle_s=0.05, timeout_s=LONG_S)

    def regroup(self, *arguments: Any, **_: Any) -> Any:
        self.groups.append(Spinning(arguments[2]))
        return self.groups[-1]

    def leave(self, *, aborts: bool = False) -> None:
        if self.groups:
            self.groups[-1].destroyed = not aborts
            if aborts:
                self.groups[-1].aborted.set()

    def connect(self) -> tuple[World, Any]:
        world = self.mine.join()
        threading.Thread(target=lambda: self.other.await_members(self.other.join())).start()
        return world, self.mine.connect(world)


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World2]:
    made = World2()
    for name in ("TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_ASYNC_ERROR_HANDLING"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(protocol, "regroup", made.regroup)
    monkeypatch.setattr(protocol, "leave", made.leave)

    def watch(is_lost: Any) -> AbortWatch:
        end = lambda: made.groups[-1].aborted.set()  # noqa: E731
        return AbortWatch(is_lost, abort=end, poll_s=0.001, grace_s=0.05)

    monkeypatch.setattr(protocol, "AbortWatch", watch)
    yield made
    made.mine.disconnect()


@pytest.mark.parametrize("how", ["buried", "given up by another"])
def test_a_loss_ends_the_collective_and_the_survivor_goes_on(world: World2, how: str) -> None:
    first, communicator = world.connect()
    assert first == World(0, 0, 2)

    def lose() -> None:
        if how == "buried":
            Membership.bury(world.store, 1)
        else:
            # It saw the loss of a third one first; it then dies itself.
            dist.PrefixStore("membership", world.store).set("arrive/1/1", "here")

    threading.Timer(0.02, lose).start()
    with pytest.raises(CommunicationError, match="aborted"):
        communicator.all_reduce()
    world.mine.disconnect(lost=True)
    assert not world.groups[0].destroyed
    Membership.bury(world.store, 1)
    assert world.mine.next_world(first) == World(1, 0, 1)


def test_members_that_leave_together_are_not_aborted(world: World2) -> None:
    first, communicator = world.connect()
    dist.PrefixStore("membership", world.store).set("arrive/1/1", "here")  # a moment before slot 0
    world.mine.disconnect()
    assert world.groups[0].destroyed and not communicator.aborted.is_set()
    assert world.mine.next_world(first) == World(1, 0, 2)


def test_gloo_needs_no_watch(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    Membership.found(store, [0])
    monkeypatch.setattr(protocol, "regroup", lambda *_, **__: SimpleNamespace(world_size=2))
    mine = Membership(store, 0)
    mine.connect(mine.join())
    assert mine._watch is None
    assert not abort.needs_abort("gloo") and abort.needs_abort("nccl")
