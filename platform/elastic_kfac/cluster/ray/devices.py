"""Devices of ranks and tasks, and the GPUs of this machine for an embedded cluster.

With `resources.use_gpu` a rank computes on the GPU that Ray assigned to it or fails: a run never falls
back to the CPU. Only `logical_gpus` declares that Ray's GPUs are mere numbers.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from elastic_kfac.errors import ConfigError, UsageError

if TYPE_CHECKING:
    import torch

    from elastic_kfac.config import Config


def device_of_rank(
    config: Config, *, logical_gpus: bool = False, is_member: bool = False
) -> torch.device:
    """The device of this process, a rank; a GPU becomes the current one.

    Args:
        is_member: Whether this process is an actor of its own and no worker of Ray Train.

    Raises:
        UsageError: If a GPU is required and torch sees none on this node.
    """
    import torch

    if not config.resources.use_gpu or logical_gpus:
        return torch.device("cpu")
    _require_cuda()
    device = torch.device("cuda", 0)
    if not is_member:
        # Workers of Ray Train see the GPUs of all workers of their node.
        import ray.train.torch

        device = ray.train.torch.get_device()
    torch.cuda.set_device(device)
    return device


def device_of_task(config: Config) -> torch.device:
    """The device of a process that is no worker of Ray Train; a Ray task sees only its own devices.

    Raises:
        UsageError: If a GPU is required and torch sees none on this node.
    """
    import torch

    if config.resources.use_gpu:
        _require_cuda()
    return torch.device("cuda" if config.resources.use_gpu else "cpu")


def backend_of(config: Config, device: torch.device) -> str:
    """The backend of process groups: NCCL between GPUs, unless `train.backend` is set."""
    if config.train.backend != "auto":
        return config.train.backend
    return "nccl" if device.type == "cuda" else "gloo"


def local_gpu_ids(config: Config, workers: int) -> tuple[str, ...]:
    """The GPUs of this machine, as CUDA names them, for an embedded cluster of so many workers.

    Returns:
        An empty tuple if the run uses none.

    Raises:
        UsageError: If there is none, or workers would have to share one, which NCCL forbids.
    """
    if not config.resources.use_gpu:
        return ()
    import torch

    _require_cuda()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    ids = named.split(",") if named else [str(index) for index in range(count)]
    if workers > count and config.train.backend != "gloo":
        raise ConfigError(
            "workers of the local cluster would have to share a GPU",
            given=f"{workers} workers",
            allowed=f"{count} with NCCL, one per GPU of this machine",
            change="set elastic.max_workers lower or train.backend=gloo, or give --address",
        )
    return tuple(ids[:count])


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UsageError(
            f"resources.use_gpu is set, and torch {torch.__version__} sees no GPU on this machine "
            f"({os.uname().nodename})",
            given="resources.use_gpu=true",
            change="run `elastic-kfac doctor` there to find out why, or set "
            "resources.use_gpu=false for the CPU",
        )
