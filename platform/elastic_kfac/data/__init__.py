"""Shard sets of images: making and inspecting them, their global order, and reading batches."""

from __future__ import annotations

from elastic_kfac.data.batch import Batch, Fields
from elastic_kfac.data.contact_sheet import contact_sheet
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
    "contact_sheet",
    "describe_shards",
    "id_hash",
    "join_uri",
    "make_shards",
    "verify_shards",
]
