"""Shard sets of images: making and inspecting them, their global order, and reading batches."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elastic_kfac.data.batch import Batch, Fields
    from elastic_kfac.data.inspection import (
        VerifyReport,
        describe_shards,
        verify_shards,
    )
    from elastic_kfac.data.manifest import ShardSet
    from elastic_kfac.data.order import SampleOrder, id_hash
    from elastic_kfac.data.shards import make_shards
    from elastic_kfac.data.storage import join_uri
    from elastic_kfac.data.stream import SampleStream

__all__ = [
    "Batch",
    "Fields",
    "SampleOrder",
    "SampleStream",
    "ShardSet",
    "VerifyReport",
    "describe_shards",
    "id_hash",
    "join_uri",
    "make_shards",
    "verify_shards",
]

_MODULES = {
    "batch": ("Batch", "Fields"),
    "inspection": ("VerifyReport", "describe_shards", "verify_shards"),
    "manifest": ("ShardSet",),
    "order": ("SampleOrder", "id_hash"),
    "shards": ("make_shards",),
    "storage": ("join_uri",),
    "stream": ("SampleStream",),
}


def __getattr__(name: str) -> Any:
    # Lazy: a run's coordinator and driver need its folder, hence `data.storage`, but no torch.
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
