"""Run one function on several ranks of a gloo group, and never leave a process behind.

Ranks are forked from one server process that has imported torch and this package, so a group of five
starts in a fraction of a second. Functions are found again by the file that defines them, so any
module-level function of any test file can run on the ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib.util
import multiprocessing
import os
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch.distributed as dist

# Optimizers import torch._dynamo (2 s), whose default arguments would hold the ranks' first group.
_IMPORTED = ["torch", "torch.distributed", "torch._dynamo", "pytest", "elastic_kfac.training.loop"]
"""What the server of the ranks imports, once for all of them."""
_GRACE_AFTER_FAILURE_S = 2.0
"""How long the other ranks may go on once one has failed, so that their errors are seen as well."""


class RankFailed(AssertionError):
    """At least one rank raised, died unexpectedly or did not finish in time."""


@dataclass(frozen=True)
class _Job:
    """What a rank needs to know; plain strings, so that it always pickles."""

    file: str
    module: str
    qualname: str
    arguments: bytes
    sys_path: tuple[str, ...]
    rank: int
    world_size: int
    store_port: int
    group_timeout_s: float
    stack_file: str
    stack_after_s: float


def run_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout_s: float = 180,
    group_timeout_s: float = 60,
    expect_death: Collection[int] = (),
) -> list[Any]:
    """Call `function(*args)` on ranks 0 … world_size-1 inside a gloo group; results by rank.

    The default process group exists when the function is called (`Communicator.world()`); torch
    uses one thread. `function` is defined at module level; arguments and results are pickled.

    Args:
        world_size: number of processes.
        function: module-level function.
        *args: its arguments, the same on every rank.
        timeout_s: after this everything is killed, and the stacks of the ranks are shown.
        group_timeout_s: timeout of the group's collectives.
        expect_death: ranks that must die without returning (their result is None).

    Raises:
        RankFailed: with the tracebacks of all failed ranks.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):
        forkserver.ensure_running()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with tempfile.TemporaryDirectory(prefix="ranks-") as folder:
        processes = []
        pipes: list[Any] = []
        try:
            for rank in range(world_size):
                job = _Job(
                    file=function.__code__.co_filename,
                    module=function.__module__,
                    qualname=function.__qualname__,
                    arguments=pickle.dumps(args),
                    sys_path=tuple(sys.path),
                    rank=rank,
                    world_size=world_size,
                    store_port=store.port,
                    group_timeout_s=group_timeout_s,
                    stack_file=str(Path(folder) / f"stack-{rank}"),
                    stack_after_s=max(0.1, timeout_s - 0.5),
                )
                ours, theirs = context.Pipe(duplex=True)
                process = context.Process(target=_rank_main, args=(job, theirs), daemon=True)
                process.start()
                theirs.close()
                processes.append(process)
                pipes.append(ours)
            outcomes = _collect(pipes, time.monotonic() + timeout_s, set(expect_death))
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
            for pipe in pipes:
                pipe.close()
        stacks = [Path(folder) / f"stack-{rank}" for rank in range(world_size)]
        return _results(outcomes, stacks, set(expect_death), timeout_s)


def wait_for(store: Any, keys: Iterable[str]) -> None:
    """Until all of these keys are in the store; the test's own limit comes before this one."""
    store.wait(list(keys), timedelta(minutes=20))


def disband() -> Any:
    """The store of the ranks' group, after the group itself has ended.

    A connection closed while slower peers still connect fails them, so nobody closes before all have
    come together.
    """
    store = dist.distributed_c10d._get_default_store()
    store.set(f"joined/{dist.get_rank()}", "")
    wait_for(store, (f"joined/{rank}" for rank in range(dist.get_world_size())))
    dist.destroy_process_group()
    return store


def _collect(
    pipes: list[Connection], deadline: float, expect_death: set[int]
) -> dict[int, tuple[str, Any]]:
    """(kind, value) per rank that returned, raised or died before the deadline."""
    outcomes: dict[int, tuple[str, Any]] = {}
    ranks = {pipe: rank for rank, pipe in enumerate(pipes)}
    while ranks:
        ready = wait(list(ranks), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = ranks.pop(pipe)
            try:
                outcomes[rank] = pickle.loads(pipe.recv_bytes())
            except (EOFError, ConnectionResetError):
                outcomes[rank] = ("died", None)
            failed = outcomes[rank][0] != "returned" and rank not in expect_death
            if failed:
                deadline = min(deadline, time.monotonic() + _GRACE_AFTER_FAILURE_S)
    return outcomes


def _results(
    outcomes: dict[int, tuple[str, Any]],
    stacks: list[Path],
    expect_death: set[int],
    timeout_s: float,
) -> list[Any]:
    problems = []
    for rank, (kind, value) in outcomes.items():
        if rank in expect_death:
            if kind != "died":
                problems.append(f"rank {rank} was to die, but {kind}: {value}")
        elif kind == "raised":
            problems.append(f"rank {rank} raised:\n{value}")
        elif kind == "died":
            problems.append(f"rank {rank} died without a word (killed, or os._exit)")
    for rank, stack in enumerate(stacks):
        if rank not in outcomes:
            seen = stack.read_text() if stack.exists() else ""
            reason = f"did not finish (limit {timeout_s} s, or another rank failed)"
            problems.append(f"rank {rank} {reason}\n{seen}".rstrip())
    if problems:
        raise RankFailed("\n\n".join(problems))
    return [outcomes[rank][1] for rank in range(len(stacks))]


def _rank_main(job: _Job, pipe: Connection) -> None:
    """Body of a rank: find the function, join the group, call, send the outcome."""
    stack_stream = Path(job.stack_file).open("w")  # noqa: SIM115 (lives as long as the process)
    faulthandler.dump_traceback_later(job.stack_after_s, file=stack_stream)
    try:
        value = _call(job)
        outcome = pickle.dumps(("returned", value))
    except BaseException:
        outcome = pickle.dumps(("raised", traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    with contextlib.suppress(OSError, EOFError):
        pipe.send_bytes(outcome)
        # Nobody leaves before everybody is done: a connection closed early fails slower peers. The
        # parent kills this process, or its end of the pipe goes away with it.
        pipe.recv_bytes()
    # Without the interpreter's shutdown: a group whose peers died may hang in its destructor.
    os._exit(0)


def _call(job: _Job) -> Any:
    import torch

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    sys.path[:] = job.sys_path
    function = _load(job)
    arguments = pickle.loads(job.arguments)
    dist.init_process_group(
        "gloo",
        store=dist.TCPStore("127.0.0.1", job.store_port, None, False),
        rank=job.rank,
        world_size=job.world_size,
        timeout=timedelta(seconds=job.group_timeout_s),
    )
    return function(*arguments)


def _load(job: _Job) -> Callable[..., Any]:
    if job.module not in sys.modules:
        spec = importlib.util.spec_from_file_location(job.module, job.file)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Registered before it runs, so that classes of the test file unpickle on both sides.
        sys.modules[job.module] = module
        spec.loader.exec_module(module)
    found: Any = sys.modules[job.module]
    for part in job.qualname.split("."):
        found = getattr(found, part)
    return found
