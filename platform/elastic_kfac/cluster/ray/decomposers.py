"""Actors on free CPUs of the cluster as a pool of processes for decompositions."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import Any

import ray


class _Decomposer:
    """Calls functions in a process of its own."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return function(*arguments)


class Decomposers(Executor):
    """`count` actors with a CPU each, which end with the process that made them.

    Work goes to those that have started, in turn; while there are none, to a thread of this process.
    """

    def __init__(self, count: int) -> None:
        kind = ray.remote(_Decomposer).options(num_cpus=1, scheduling_strategy="SPREAD")
        self._actors = [kind.remote() for _ in range(count)]
        self._starting = {actor.call.remote(str): actor for actor in self._actors}
        self._ready: list[Any] = []
        self._thread = ThreadPoolExecutor(1, "decomposition")
        self._turn = itertools.count()

    def submit(self, function: Callable[..., Any], /, *arguments: Any, **named: Any) -> Future[Any]:
        if self._starting:
            started, _ = ray.wait([*self._starting], num_returns=len(self._starting), timeout=0)
            self._ready += [self._starting.pop(answer) for answer in started]
        if not self._ready:
            return self._thread.submit(function, *arguments, **named)
        actor = self._ready[next(self._turn) % len(self._ready)]
        found: Future[Any] = actor.call.remote(function, *arguments, **named).future()
        return found

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self._thread.shutdown(wait, cancel_futures=cancel_futures)
        for actor in self._actors:
            ray.kill(actor)
