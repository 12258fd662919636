"""Makes shards on a Ray cluster: one task per shard, on any node.

A task only names a range of a source, so a node that is lost costs the shards it was writing: Ray
retries their tasks elsewhere. Nodes that join take part at once.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import Any

import ray

from elastic_kfac.cluster.ray.connection import connect, quiet_driver
from elastic_kfac.data.shards import ShardTask
from elastic_kfac.data.sources import SourceSplit, open_source
from elastic_kfac.errors import ElasticKfacError, RunError

NODE_LOSSES = 5
"""Limit on the node losses of one shard."""

RunTasks = Callable[[Sequence[ShardTask]], Iterator[dict[str, Any]]]


@contextlib.contextmanager
def shard_tasks_on(address: str) -> Iterator[RunTasks]:
    """A `run_tasks` for `make_shards` that uses a cluster, for the duration of the block.

    An existing connection of this process is used and kept.

    Args:
        address: `auto` or host:port.

    Raises:
        UsageError: If there is no cluster at that address.
    """
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            stack.enter_context(quiet_driver())
            connect(address, instead="make the shards in this process")
            stack.callback(ray.shutdown)
        yield run_shard_tasks


def run_shard_tasks(tasks: Sequence[ShardTask]) -> Iterator[dict[str, Any]]:
    """Runs tasks on the connected cluster and yields their records in the order of completion.

    Raises:
        DataError: As the task raised it.
        RunError: If a task failed for another reason.
    """
    function = ray.remote(_run).options(num_cpus=1, max_retries=NODE_LOSSES)
    pending = {function.remote(task): task for task in tasks}
    try:
        while pending:
            done, _ = ray.wait(list(pending), num_returns=1)
            task = pending.pop(done[0])
            yield _record(done[0], task)
    finally:
        # The other shards are useless after an error.
        for reference in pending:
            ray.cancel(reference)


def _record(reference: Any, task: ShardTask) -> dict[str, Any]:
    try:
        record: dict[str, Any] = ray.get(reference)
        return record
    except ray.exceptions.RayError as error:
        cause = getattr(error, "cause", None)
        if isinstance(cause, ElasticKfacError):
            raise cause from None
        raise RunError(
            f"making {task.split}/{task.file} failed: {str(cause or error).strip().splitlines()[-1]}",
            change="run the same command again to resume",
        ) from error


def _run(task: ShardTask) -> dict[str, Any]:
    return task.run(_opened(task.source, task.split, task.content))


@lru_cache(maxsize=1)
def _opened(source: str, split: str, content: str) -> SourceSplit:
    # Listing a source can take minutes (1.28 million files in a tar); a process does it once.
    return open_source(source, split=split).split(split)
