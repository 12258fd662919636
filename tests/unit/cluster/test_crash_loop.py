"""When a failing run is given up."""

from __future__ import annotations

from elastic_kfac.cluster.run.crash_loop import CrashLoopBreaker, RankError


def _defect(rank: int = 0, line: str = "ValueError: no") -> RankError:
    return RankError(rank, "ValueError", line)


def _fail(breaker: CrashLoopBreaker, *errors: RankError) -> RankError | None:
    for error in errors:
        breaker.reported(error)
    return breaker.judge(step=0, died=[], errors={}, lost_nodes=0)


def test_breaker_same_error_three_times_gives_up_with_the_cause() -> None:
    breaker = CrashLoopBreaker()
    assert [_fail(breaker, _defect()) for _ in range(2)] == [None, None]
    assert _fail(breaker, _defect()) == _defect()


def test_breaker_progress_between_failures_starts_the_count_again() -> None:
    breaker = CrashLoopBreaker()
    for step in range(1, 10):
        breaker.stepped(step)
        assert _fail(breaker, _defect()) is None


def test_breaker_steps_that_are_redone_are_no_progress() -> None:
    breaker = CrashLoopBreaker()
    verdicts = []
    for _ in range(3):
        for step in (90, 95, 100):
            breaker.stepped(step)
        verdicts.append(_fail(breaker, _defect()))
    # The first failure came after progress, the next two repeat it.
    assert verdicts == [None, None, _defect()]


def test_breaker_different_errors_are_not_added_up() -> None:
    breaker = CrashLoopBreaker()
    lines = ("ValueError: a", "ValueError: b", "ValueError: a", "ValueError: b")
    assert [_fail(breaker, _defect(line=line)) for line in lines] == [None] * 4


def test_breaker_usage_error_ends_at_once() -> None:
    error = RankError(1, "DataError", "shard 3 is torn", exit_code=2)
    assert _fail(CrashLoopBreaker(), error) == error


def test_breaker_blames_the_cause_not_the_ranks_that_noticed() -> None:
    breaker = CrashLoopBreaker(same_error_limit=1)
    noticed = RankError(0, "CommunicationError", "rank 0 lost a peer")
    assert _fail(breaker, noticed, _defect(rank=1)) == _defect(rank=1)


def test_breaker_lost_nodes_have_the_larger_limit() -> None:
    breaker = CrashLoopBreaker(lost_worker_limit=4)
    verdicts = [breaker.judge(step=7, died=[0], errors={}, lost_nodes=1) for _ in range(4)]
    assert verdicts[:3] == [None] * 3
    assert verdicts[3] is not None
    assert breaker.last_reason == "1 node lost"


def test_breaker_dead_process_is_named_by_rank() -> None:
    breaker = CrashLoopBreaker()
    noticed = RankError(0, "CommunicationError", "rank 0 lost a peer")
    breaker.reported(noticed)
    assert breaker.reported_ranks == {0}
    breaker.judge(step=7, died=[2, 1], errors={1: "ActorDied", 2: "ActorDied"}, lost_nodes=0)
    assert breaker.last_reason == "worker processes of rank 1, 2 died"
    assert breaker.reported_ranks == frozenset()
