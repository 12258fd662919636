"""Which live states a survivor may hand over."""

from __future__ import annotations

from elastic_kfac.training.moments import Moment
from elastic_kfac.training.snapshots import CommitWatch


def test_watch_state_is_whole_only_between_commit_and_the_next_update() -> None:
    heard: list[tuple[Moment, int]] = []
    watch = CommitWatch(lambda moment, step: heard.append((moment, step)))
    seen: list[tuple[Moment, bool]] = []
    moments: tuple[Moment, ...] = (
        "recovery",
        "step_begin",
        "gradients_exchanged",
        "factor_update",
        "decomposition",
        "preconditioned",
        "committed",
        "evaluation",
        "backward_done",
        "gradients_exchanged",
        "factor_exchange",
    )
    for moment in moments:
        watch(moment, 1)
        seen.append((moment, watch.is_whole))
    assert [moment for moment, whole in seen if whole] == [
        "committed",
        "evaluation",
        "backward_done",
        "gradients_exchanged",
        "factor_exchange",
    ]
    assert heard == [(moment, 1) for moment in moments]
