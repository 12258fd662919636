"""The replay of spot traces: the real supervisor and membership protocol over nodes that come and go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).parents[3] / "benchmarks" / "elastic"


@pytest.fixture(scope="module")
def replay() -> Any:
    sys.path.insert(0, str(FOLDER))
    try:
        import spot_replay

        return spot_replay
    finally:
        sys.path.remove(str(FOLDER))


def played(replay: Any, data: list[int], seed: int = 0, gap_s: float = 60.0) -> Any:
    trace = replay.Trace(gap_s, tuple(data))
    found = replay.Replay(
        trace.changes(seed),
        replay.measured_costs(),
        max_workers=max(data),
        step_node_s=2.0,
        notice_s=30.0,
        end=trace.seconds,
    )
    found.run()
    return found


def share(found: Any, data: list[int], gap_s: float = 60.0) -> float:
    return float(found.steps * 2.0 / (sum(data) * gap_s))


def test_quiet_nodes_lose_the_start_only(replay: Any) -> None:
    found = played(replay, [3] * 10)
    prepare = replay.measured_costs().prepare
    assert [size for _, size in found.worlds] == [3]
    assert 1 - (prepare + 3) / 600 < share(found, [3] * 10) < 1 - prepare / 600


@pytest.mark.parametrize("seed", range(4))
def test_worlds_follow_the_nodes_and_nothing_is_redone(replay: Any, seed: int) -> None:
    data = [3, 3, 2, 2, 3, 3, 1, 1, 2, 3]
    found = played(replay, data, seed)
    assert found.redone == 0
    sizes = [size for _, size in found.worlds]
    assert sizes[0] == 3 and min(sizes) == 1 and sizes[-1] == 3
    assert len([name for _, name in found.calls if name == "group_started"]) == 1
    # Members leave when they are told, 30 s before their node goes; newcomers are prepared first.
    prepare = replay.measured_costs().prepare + 1
    lost = 3 * 30 + (3 + 3) * prepare + 6 * 2 * 2
    assert share(found, data) > 1 - lost / (sum(data) * 60)


def test_without_any_node_the_next_attempt_goes_on_from_what_was_kept(replay: Any) -> None:
    data = [2, 2, 2, 0, 0, 2, 2, 2]
    found = played(replay, data, seed=1)
    assert len([name for _, name in found.calls if name == "group_started"]) == 2
    # At most the age of a snapshot, in steps of a second.
    assert found.redone <= 2 / 1.0 + 1
    assert share(found, data) > 0.85


def test_trace_has_as_many_nodes_as_it_says(replay: Any) -> None:
    trace = replay.Trace.read(FOLDER / "spot_trace.json")
    there: set[str] = set()
    by_gap = {}
    for at, node, kind in trace.changes():
        if kind == "up":
            there.add(node)
        elif kind == "down":
            there.remove(node)
        by_gap[at // trace.gap_s] = len(there)
    for gap, count in by_gap.items():
        assert trace.data[int(gap)] == count or count == trace.data[int(gap) - 1]
    oracle = sum(trace.data) * trace.gap_s
    plain = replay.plain_ray_train(trace)
    assert 0.5 * oracle < plain < 0.97 * oracle


@pytest.mark.parametrize(
    "content",
    ["not json", "{}", '{"metadata": {"gap_seconds": 0}, "data": [1]}', '{"data": [1, 2]}'],
)
def test_another_form_is_refused_in_one_line(
    replay: Any, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace.json"
    path.write_text(content)
    with pytest.raises(SystemExit) as error:
        replay.Trace.read(path)
    assert error.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "expected" in lines[0] and str(path) in lines[0]


def test_made_up_trace_is_the_one_beside_the_script(replay: Any, tmp_path: Path) -> None:
    replay.make_trace(tmp_path / "trace.json")
    kept = json.loads((FOLDER / "spot_trace.json").read_text())
    assert json.loads((tmp_path / "trace.json").read_text()) == kept
