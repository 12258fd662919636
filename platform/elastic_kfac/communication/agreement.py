"""Detects ranks with different configurations before a collective hangs or sums mismatched tensors."""

from __future__ import annotations

from collections.abc import Mapping

from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.errors import CommunicationError

_SHOWN = 80


def require_agreement(
    communicator: Communicator, facts: Mapping[str, object], *, what: str, tag: str = "agreement"
) -> None:
    """Compares named facts (shapes, options, hashes) of all ranks as text. Collective.

    Args:
        facts: For example `{"kfac.damping": 0.001, "layer conv1": (64, 576)}`.
        what: What the facts describe, for the error: "the K-FAC configuration".

    Raises:
        CommunicationError: On every rank, with the first fact that differs and its values by rank.
    """
    own = {name: str(value) for name, value in facts.items()}
    gathered = communicator.all_gather_object(own, tag=tag)
    names = dict.fromkeys(name for one in gathered for name in one)
    differing = [name for name in names if len({one.get(name) for one in gathered}) > 1]
    if not differing:
        return
    first = differing[0]
    ranks_by_value: dict[str, list[int]] = {}
    for rank, one in enumerate(gathered):
        ranks_by_value.setdefault(one.get(first, "absent")[:_SHOWN], []).append(rank)
    values = ", ".join(
        f"{value} on rank{'s' * (len(ranks) > 1)} {_listed(ranks)}"
        for value, ranks in ranks_by_value.items()
    )
    others = f" (and {len(differing) - 1} more)" if len(differing) > 1 else ""
    raise CommunicationError(
        f"ranks do not agree on {what}: {first} is {values}{others}",
        change="start all ranks with the same model and configuration",
    )


def _listed(ranks: list[int]) -> str:
    if len(ranks) <= 6:
        return ",".join(map(str, ranks))
    return f"{ranks[0]},{ranks[1]},…,{ranks[-1]}"
