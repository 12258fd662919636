"""Places for single workers: a placement group each, which Ray's autoscaler sees as a request."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.util import (
    get_placement_group,
    placement_group,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

NODE_DIED = "NodeDied"
"""How the error of an answer begins if the node is gone."""


def give_back(owner: str) -> None:
    """Frees the places that an owner has left behind."""
    for place in placement_group_table().values():
        if place["name"].startswith(f"{owner}-") and place["state"] != "REMOVED":
            # It may be gone by now.
            with contextlib.suppress(ValueError):
                remove_placement_group(get_placement_group(place["name"]))


@dataclass(frozen=True)
class Answer:
    """What became of a call."""

    value: Any = None
    error: str | None = None
    """Why there is no value."""


class Places:
    """Requests places, starts an actor in each, and calls it without waiting.

    Actors end with this process. Places do not, before the driver ends: `give_back` frees them.
    """

    def __init__(
        self, kind: type, resources: Mapping[str, float], *, owner: str, threads: int = 4
    ) -> None:
        """For actors of the class `kind`, each with these resources and so many threads.

        Args:
            owner: Begins the name of every place; unique in the cluster.
        """
        self._owner = owner
        self._resources = dict(resources)
        rest = dict(resources)
        self._kind = ray.remote(kind)
        self._options: dict[str, Any] = {
            "num_cpus": rest.pop("CPU", 0),
            "num_gpus": rest.pop("GPU", 0),
            "resources": rest,
            "max_concurrency": threads,
        }

    def request(self) -> Any:
        """Requests one more place; it stays requested until there is room."""
        return placement_group([self._resources], name=f"{self._owner}-{uuid.uuid4().hex}")

    def is_there(self, place: Any) -> bool:
        """Whether Ray has found room."""
        return bool(placement_group_table(place).get("state") == "CREATED")

    def start(self, place: Any) -> Any:
        """Starts the actor of a place and returns its handle."""
        there = PlacementGroupSchedulingStrategy(place, 0)
        return self._kind.options(scheduling_strategy=there, **self._options).remote()

    def call(self, actor: Any, method: str, *arguments: Any) -> Any:
        """Calls a method; `answer` has what came of it."""
        return getattr(actor, method).remote(*arguments)

    def answer(self, call: Any) -> Answer | None:
        """None while the call is under way."""
        if not ray.wait([call], timeout=0)[0]:
            return None
        try:
            return Answer(ray.get(call))
        except Exception as error:
            text = str(error).strip()
            # Ray has no class of its own for an actor whose node died.
            kind = NODE_DIED if "node has died" in text else type(error).__name__
            return Answer(error=f"{kind}: {text.splitlines()[-1][:200] if text else ''}")

    def end(self, place: Any, actor: Any = None) -> None:
        """Ends the actor and gives the place back; either may be gone already."""
        with contextlib.suppress(Exception):
            if actor is not None:
                ray.kill(actor)
        with contextlib.suppress(Exception):
            remove_placement_group(place)
