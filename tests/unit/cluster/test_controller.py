"""Callbacks of Ray Train's controller, against a stand-in for Ray: calls, reasons and decisions."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import Any

import pytest
import ray.exceptions
from ray.train import ScalingConfig

from elastic_kfac.cluster.ray import controller
from elastic_kfac.cluster.ray.controller import (
    ElasticCallback,
    LeanTrainer,
    OwnGroupBackend,
    RunIsOver,
)
from elastic_kfac.cluster.run.coordinator import RunCoordinator
from elastic_kfac.cluster.run.crash_loop import RankError

NODE_IDS = ("a" * 40, "b" * 40)


class Coordinator:
    """A handle of the coordinator: keeps calls, which must fit its methods, and gives answers."""

    def __init__(self, **answers: Any) -> None:
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self._answers = answers

    def __getattr__(self, name: str) -> Any:
        signature = inspect.signature(getattr(RunCoordinator, name))

        def remote(*arguments: Any, **options: Any) -> Any:
            signature.bind(self, *arguments, **options)
            self.calls.append((name, arguments, options))
            return self._answers.get(name)

        return SimpleNamespace(remote=remote)

    def names(self) -> list[str]:
        return [name for name, _, _ in self.calls]


class Group:
    """A worker group of Ray Train."""

    def get_workers(self) -> list[Any]:
        return [self._worker(rank, node) for rank, node in enumerate(NODE_IDS)]

    def _worker(self, rank: int, node: str) -> Any:
        return SimpleNamespace(
            actor=SimpleNamespace(get_metadata=SimpleNamespace(remote=lambda: f"ping {rank}")),
            metadata=SimpleNamespace(pid=10 + rank, node_id=node),
            distributed_context=SimpleNamespace(world_rank=rank),
        )


@pytest.fixture(autouse=True)
def stand_in_for_ray(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Answers at once; `dead` are ranks whose ping fails."""
    stand_in = SimpleNamespace(dead=set(), refreshed=0)

    def get(answer: Any) -> Any:
        if isinstance(answer, str) and int(answer.removeprefix("ping ")) in stand_in.dead:
            raise ray.exceptions.ActorDiedError
        return answer

    def refresh() -> None:
        stand_in.refreshed += 1

    fake = SimpleNamespace(
        get=get,
        wait=lambda answers, timeout=None, num_returns=1: (list(answers), []),
        exceptions=ray.exceptions,
    )
    monkeypatch.setattr(controller, "ray", fake)
    monkeypatch.setattr(controller, "refresh_capacity", refresh)
    monkeypatch.setattr(controller, "draining_nodes", dict)
    monkeypatch.setattr(controller, "seconds_left", lambda nodes: 90.0 if nodes else None)
    monkeypatch.setattr(controller, "await_lost_nodes", lambda nodes: [])
    monkeypatch.setattr(controller, "POLICY_CACHE_S", 0.0)
    return stand_in


def training(callback: ElasticCallback, group: Group) -> None:
    callback.after_worker_group_start(group)
    callback.after_worker_group_training_start(group)


def resized_to(workers: int) -> Any:
    return SimpleNamespace(num_workers=workers)


def test_resize_drains_a_training_group_and_says_which_nodes_leave(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    coordinator = Coordinator(drain=False)
    callback = ElasticCallback(coordinator)
    callback.before_controller_execute_resize_decision(resized_to(2))
    assert coordinator.calls == []

    training(callback, Group())
    started = ({0: 10, 1: 11}, dict(enumerate(NODE_IDS)))
    assert coordinator.calls == [("group_started", started, {})]
    monkeypatch.setattr(controller, "draining_nodes", lambda: {NODE_IDS[1]: 0, "elsewhere": 0})
    callback.before_controller_execute_resize_decision(resized_to(1))
    name, (reason,), options = coordinator.calls[-1]
    assert (name, options["notice_s"]) == ("drain", 90.0)
    assert reason == "1 node being drained (bbbbbbbb); the cluster has room for 1 worker"
    # The group has exited: nothing is left to drain.
    callback.before_controller_execute_resize_decision(resized_to(3))
    assert coordinator.names() == ["group_started", "drain"]


def test_spare_processes_start_once_after_the_first_step_of_a_group(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[set[str]] = []
    monkeypatch.setattr(controller, "prestart_workers", lambda nodes, count: asked.append(nodes))
    steps = iter([False, True, False, True])
    coordinator = Coordinator(has_stepped=None)
    coordinator.has_stepped = SimpleNamespace(remote=lambda: next(steps))
    callback = ElasticCallback(coordinator, spare_processes=1)
    status = SimpleNamespace(errors={})
    for group in (1, 2):
        training(callback, Group())
        assert len(asked) == group - 1
        for polls in range(3):
            callback.after_worker_group_poll_status(status)
            assert len(asked) == group - (polls == 0)
    assert asked == [set(NODE_IDS[:2])] * 2


@pytest.mark.filterwarnings(r"ignore::DeprecationWarning:ray\..*")
def test_trainer_leaves_out_the_actors_that_a_run_does_not_need() -> None:
    made = {}
    for outlived in (True, False):
        trainer = LeanTrainer(
            print,
            outlived=outlived,
            backend_config=OwnGroupBackend(),
            scaling_config=ScalingConfig(),
        )
        made[outlived] = {type(each).__name__ for each in trainer._create_default_callbacks()}
    assert "BackendSetupCallback" in made[False]
    assert made[True] - made[False] == {"PlacementGroupCleanerCallback"}
    assert "DatasetsCallback" not in made[True]


def test_resize_of_a_finished_run_ends_it() -> None:
    callback = ElasticCallback(Coordinator(drain=True))
    training(callback, Group())
    with pytest.raises(RunIsOver):
        callback.before_controller_execute_resize_decision(resized_to(3))


def test_failure_of_the_group_goes_on_or_ends_as_the_coordinator_decides(
    stand_in_for_ray: SimpleNamespace,
) -> None:
    group = Group()
    coordinator = Coordinator()
    callback = ElasticCallback(coordinator)
    training(callback, group)
    stand_in_for_ray.dead = {1}
    callback.before_controller_execute_failure_decision(None)
    assert coordinator.names()[-1] == "group_failed"
    assert stand_in_for_ray.refreshed == 1

    coordinator = Coordinator(group_failed=RankError(0, "ValueError", "ValueError: no"))
    callback = ElasticCallback(coordinator)
    training(callback, group)
    with pytest.raises(RuntimeError, match="ValueError: no"):
        callback.before_controller_execute_failure_decision(None)
