"""Places: how a lost node is told from a lost process, and what an owner leaves behind."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from elastic_kfac.cluster.ray import places
from elastic_kfac.cluster.ray.places import NODE_DIED, Places, give_back

NODE = """The actor died unexpectedly before finishing this task.
\tclass_name: Member
The actor died because its node has died. Node Id: 3f
\tthe actor's node was terminated unexpectedly: health check failed"""
PROCESS = """The actor died unexpectedly before finishing this task.
\tclass_name: Member
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR"""


class ActorDiedError(Exception):
    """As Ray's."""


@pytest.mark.parametrize(("text", "kind"), [(NODE, NODE_DIED), (PROCESS, "ActorDiedError")])
def test_answer_tells_a_lost_node_from_a_lost_process(
    monkeypatch: pytest.MonkeyPatch, text: str, kind: str
) -> None:
    def get(call: Any) -> None:
        raise ActorDiedError(text)

    fake = SimpleNamespace(
        remote=lambda kind: kind, wait=lambda calls, timeout: (calls, []), get=get
    )
    monkeypatch.setattr(places, "ray", fake)
    answer = Places(object, {"CPU": 1.0}, owner="run").answer("call")
    assert answer is not None and answer.error is not None
    assert answer.error.partition(":")[0] == kind


def test_give_back_frees_what_one_owner_holds_and_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    table = {
        "1": {"name": "run-a", "state": "CREATED"},
        "2": {"name": "run-b", "state": "REMOVED"},
        "3": {"name": "run-c", "state": "PENDING"},
        "4": {"name": "running-d", "state": "CREATED"},
        "5": {"name": "", "state": "CREATED"},
        "6": {"name": "run-gone", "state": "CREATED"},
    }
    freed: list[str] = []

    def find(name: str) -> str:
        if name == "run-gone":
            raise ValueError("Failed to look up placement group")
        return name

    monkeypatch.setattr(places, "placement_group_table", lambda: table)
    monkeypatch.setattr(places, "get_placement_group", find)
    monkeypatch.setattr(places, "remove_placement_group", freed.append)
    give_back("run")
    assert freed == ["run-a", "run-c"]
