"""A rank that keeps its process and its state when other ranks of its group come and go."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import ray

if TYPE_CHECKING:
    from elastic_kfac.training.callbacks import Control
    from elastic_kfac.training.membership import StoreMembership

MEMBER_TIMEOUT_S = 60.0
"""For joining, and for collectives between members."""


class NeverAMember(Exception):
    """The run was parked or over before the members took this process in."""


def membership_of(
    host: Any, joined: Mapping[str, Any], control: Control, *, backend: str
) -> StoreMembership:
    """How this process becomes a member of its group.

    Args:
        host: Handle of the `MembershipHost`.
        joined: What the recorder answered when this process joined.
        control: Says when it is too late to join.
        backend: Of the process groups.
    """
    from torch.distributed import TCPStore

    from elastic_kfac.training.membership import StoreMembership

    address, port = ray.get(host.open.remote(joined["attempt"], joined["founders"]))
    store = TCPStore(
        address, port, None, is_master=False, timeout=timedelta(seconds=MEMBER_TIMEOUT_S)
    )

    def give_up() -> None:
        if control.stop_reason() is not None:
            raise NeverAMember

    return StoreMembership(
        store,
        int(joined["slot"]),
        backend=backend,
        timeout_s=MEMBER_TIMEOUT_S,
        while_joining=give_up,
    )
