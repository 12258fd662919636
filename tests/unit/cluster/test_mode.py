"""Which runs change in place, and why others restart."""

from __future__ import annotations

from typing import Any

import pytest

from elastic_kfac.cluster.run.mode import MEMBER_FUNCTION, why_restarts
from elastic_kfac.config import parse_config

GPUS = {"resources": {"use_gpu": True}}


@pytest.mark.parametrize(
    ("values", "member", "logical", "reason"),
    [
        ({}, MEMBER_FUNCTION, False, None),
        ({}, None, False, "the rank function of this run has no form for members"),
        (
            {"plan": {"decomposers": 1}, "kfac": {"stagger": True}},
            MEMBER_FUNCTION,
            False,
            "plan.decomposers=1 belong to workers that are started together",
        ),
        (GPUS, MEMBER_FUNCTION, False, "NCCL between GPUs (train.backend=gloo changes in place)"),
        (GPUS, MEMBER_FUNCTION, True, None),
        ({**GPUS, "elastic": {"max_workers": 1}}, MEMBER_FUNCTION, False, None),
        ({**GPUS, "train": {"backend": "gloo"}}, MEMBER_FUNCTION, False, None),
    ],
)
def test_a_run_restarts_only_for_a_reason(
    values: dict[str, Any], member: str | None, logical: bool, reason: str | None
) -> None:
    in_place = {"in_place": True, **values.get("elastic", {})}
    config = parse_config({**values, "elastic": in_place})
    assert why_restarts(config, member, logical_gpus=logical) == reason
    asked = parse_config({**values, "elastic": {**in_place, "in_place": False}})
    assert why_restarts(asked, member, logical_gpus=logical) is None
