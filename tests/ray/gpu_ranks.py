"""A rank function that writes down which accelerator Ray gave it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import ray

from elastic_kfac.training.in_place import run_member
from elastic_kfac.training.loop import run_rank


def notes_its_device(
    config: Any, communicator: Any, *, store: Any, device: Any, **seams: Any
) -> Any:
    """`run_rank`; every rank leaves `device-<rank>.json` in the run's folder."""
    _note(store, communicator.rank, device)
    return run_rank(config, communicator, store=store, device=device, **seams)


def member_notes_its_device(
    config: Any, membership: Any, *, store: Any, device: Any, **seams: Any
) -> Any:
    """`run_member`; every founder leaves `device-<slot>.json` in the run's folder."""
    _note(store, membership._slot, device)
    return run_member(config, membership, store=store, device=device, **seams)


def _note(store: Any, number: int, device: Any) -> None:
    seen = {
        "node": ray.get_runtime_context().get_node_id(),
        "gpus": ray.get_gpu_ids(),
        "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "device": str(device),
    }
    folder = Path(store._durable.storage.path())
    (folder / f"device-{number}.json").write_text(json.dumps(seen))
