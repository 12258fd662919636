from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import pytest

from elastic_kfac.errors import UsageError
from elastic_kfac.observability.metric_names import METRICS, metric
from elastic_kfac.reports.run_page import write_report
from elastic_kfac.runs.history import read_run
from elastic_kfac.runs.summary import duration, headline, summary_text

MakeRun = Callable[..., Path]
VOID = {"meta", "link", "br"}


class Page(HTMLParser):
    """Collects what a browser would fetch, and the nesting of elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            inside = (value or "").startswith(("#", "data:"))
            if name in ("src", "href", "xlink:href", "action") and not inside:
                self.fetched.append(f"{tag} {name}={value}")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def page_of(folder: Path) -> str:
    write_report(folder)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_report_of_finished_run_is_well_formed_and_fetches_nothing(make_run: MakeRun) -> None:
    text = page_of(make_run())
    page = Page(text)
    assert page.open == []
    assert page.fetched == []
    assert "script" not in page.tags
    assert not re.findall(r"url\((?!#)", text)
    assert page.tags.count("svg") == 3


def test_report_figures_are_valid_xml_with_unique_clip_paths(make_run: MakeRun) -> None:
    text = page_of(make_run())
    clips: list[str] = []
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        root = ElementTree.fromstring(svg)
        ids = {e.get("id", "") for e in root.iter("{http://www.w3.org/2000/svg}clipPath")}
        assert len(ids) > 0
        clips += ids
    assert len(clips) == len(set(clips))


def test_report_written_twice_has_equal_bytes(make_run: MakeRun) -> None:
    folder = make_run()
    first = page_of(folder)
    assert page_of(folder) == first


def test_report_shows_result_events_config_and_provenance(make_run: MakeRun) -> None:
    text = page_of(make_run())
    assert "Reached 97.00% test accuracy in 33.4 s (best 98.61%) on 2 → 1 → 2 workers" in text
    assert "node removed" in text
    assert "8.6 s" in text
    assert "20.0 s" in text  # the second event, after the first
    assert "torch" in text and "2.15.0" in text
    assert "conv1  0       0 1" in text
    assert text.count("MiB moved") == 1 and "state kept, 1.2 MiB moved" in text
    assert "shards: data/digits" in text


def test_report_escapes_what_the_run_says(make_run: MakeRun) -> None:
    text = page_of(make_run())
    assert "&lt;b&gt;node&lt;/b&gt;" in text
    assert "<b>node</b>" not in text


@pytest.mark.parametrize(
    "metrics", [None, "", '{"step": 1, "loss": 2.0, "wall_time_s": 0.5}\n{"st']
)
def test_report_of_run_that_has_just_begun_says_so(make_run: MakeRun, metrics: str | None) -> None:
    folder = make_run(metrics__jsonl=metrics, events__jsonl=None, result__json=None)
    text = page_of(folder)
    assert Page(text).open == []
    assert "Running or crashed" in text


def test_report_with_non_finite_losses_is_still_drawn(make_run: MakeRun) -> None:
    rows = [
        {"step": step, "loss": loss, "wall_time_s": step / 10, "world_size": 1, "accuracy": 0.1}
        for step, loss in enumerate([2.0, float("nan"), float("inf"), 1.0], start=1)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    assert Page(page_of(make_run(metrics__jsonl=lines))).open == []


def test_report_of_many_steps_stays_small(make_run: MakeRun) -> None:
    rows = (
        {"step": s, "loss": 1 + 1 / s, "wall_time_s": s / 10, "world_size": 1, "step_time_s": 0.1}
        | {"global_batch_size": 8, "lr": 0.1, "damping": 0.1, "factor_updates": s}
        for s in range(1, 20_001)
    )
    folder = make_run(metrics__jsonl="".join(json.dumps(row) + "\n" for row in rows))
    assert len(page_of(folder)) < 1_500_000


def test_write_report_of_something_else_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.escape(str(tmp_path))):
        write_report(tmp_path)


def test_run_segments_follow_the_rows(make_run: MakeRun) -> None:
    run = read_run(make_run())
    assert run.world_sizes == [2, 1, 2]
    assert [(s.first_step, s.last_step) for s in run.segments] == [(1, 60), (61, 130), (131, 210)]
    assert run.downtime_s == pytest.approx(16.5)
    assert len(run.evaluations) == 8


def test_living_run_derives_time_to_accuracy_from_its_rows(make_run: MakeRun) -> None:
    run = read_run(make_run(result__json=None))
    first = next(e for e in run.evaluations if e[2] >= 0.97)
    assert run.time_to_target_s == first[1]
    assert run.steps_redone == 3


def test_headline_of_run_below_target_says_missed(make_run: MakeRun) -> None:
    result = {"status": "finished", "best_accuracy": 0.91, "target_accuracy": 0.97, "steps": 9}
    run = read_run(make_run(result__json=json.dumps(result), metrics__jsonl=""))
    assert headline(run).startswith("Missed the target of 97.00% test accuracy with 91.00%")


@pytest.mark.parametrize(
    ("target", "accuracies", "sentence"),
    [
        (None, (0.95, 0.6), "Reached 95.00% test accuracy in 2.1 s, but ended at 60.00%"),
        (None, (0.9, 0.95), "Reached 95.00% test accuracy in 2.1 s on"),
        (
            0.97,
            (0.91, 0.4),
            "Missed the target of 97.00% test accuracy with 91.00%, but ended at 40",
        ),
        (
            0.9,
            (0.95, 0.92),
            "Reached 90.00% test accuracy in 1.1 s (best 95.00%, at the end 92.00%)",
        ),
        (0.9, (0.95, 0.1), "(best 95.00%, at the end 10.00%, below the target)"),
    ],
)
def test_headline_of_run_that_ended_worse_than_it_was_says_so(
    make_run: MakeRun, target: float | None, accuracies: tuple[float, ...], sentence: str
) -> None:
    rows = [
        {"step": step, "wall_time_s": step + 0.1, "world_size": 1, "eval_accuracy": accuracy}
        for step, accuracy in enumerate(accuracies, start=1)
    ]
    rows.insert(0, {"step": 1, "wall_time_s": 1.0, "world_size": 1, "loss": 1.0})
    result = {"status": "finished", "best_accuracy": max(accuracies), "steps": 2}
    config = "train: {}" if target is None else f"train: {{target_accuracy: {target}}}"
    folder = make_run(
        config__yaml=config,
        metrics__jsonl="".join(json.dumps(row) + "\n" for row in rows),
        events__jsonl=None,
        result__json=json.dumps(result),
    )
    assert sentence in headline(read_run(folder))


def test_continued_run_shows_where_and_after_how_long_in_summary_and_figures(
    make_run: MakeRun,
) -> None:
    event = {"time": 9000.0, "kind": "continue", "step": 133, "steps_redone": 3, "away_s": 4000.0}
    folder = make_run(events__jsonl=json.dumps({**event, "from_world_size": 0, "to_world_size": 2}))
    run = read_run(folder)
    (pause,) = run.pauses
    assert (pause.step, pause.wall_s) == (131, pytest.approx(31.09))
    assert "continued   at step 131 after 1 h 07 min, which no time counts" in summary_text(run)
    text = page_of(folder)
    assert text.count("> continued after 1 h 07 min<") == 3
    assert "Dotted lines: the run was continued" in text
    assert "continued after" not in page_of(make_run("other"))


LOSS: list[dict[str, object]] = [
    {
        "kind": "failure",
        "step": 60,
        "from_world_size": 2,
        "reason": "1 node lost",
        "in_place": True,
    },
    {"kind": "restored", "step": 58, "world_size": 1, "steps_redone": 2, "way": "restore"},
    {
        "kind": "recovery",
        "step": 60,
        "from_world_size": 2,
        "to_world_size": 1,
        "reason": None,
        "downtime_s": 1.5,
        "steps_redone": 2,
        "in_place": True,
    },
]


def test_loss_in_place_is_one_story_in_report_and_summary(make_run: MakeRun) -> None:
    def lines(*events: dict[str, object]) -> str:
        return "".join(json.dumps({"time": 1000.0, **event}) + "\n" for event in events)

    folder = make_run(events__jsonl=lines(*LOSS))
    run, text = read_run(folder), page_of(folder)
    line = "recovery    step 60: 2 → 1 (1 node lost), 1.5 s without steps, 2 steps redone"
    assert summary_text(run).count("step 60") == 1 and line in summary_text(run)
    assert (len(run.changes), run.downtime_s) == (1, 1.5)
    assert text.count("1 node lost") == 1
    table = text[text.index(">failure<") :]
    assert ">recovery<" in table and ">restored<" not in table
    # Before the run steps again, what was restored is the newest there is.
    assert ">restored<" in page_of(make_run("recovering", events__jsonl=lines(*LOSS[:2])))
    # Earlier versions repeated sizes and reason.
    repeated = {"to_world_size": 1, "reason": "1 node lost"}
    events = lines(*({**event, **repeated} for event in LOSS if "from_world_size" in event))
    earlier = read_run(make_run("earlier", events__jsonl=events))
    assert len(earlier.changes) == 1 and line in summary_text(earlier)


def test_events_of_a_clock_that_was_set_back_do_not_run_backwards(make_run: MakeRun) -> None:
    events = [{"time": at, "kind": "note", "step": 1} for at in (1000.0, 1008.0, 1008.0 - 3600)]
    lines = "".join(json.dumps(event) + "\n" for event in events)
    text = page_of(make_run(events__jsonl=lines))
    assert text.count("8.0 s</td>") == 2


@pytest.mark.parametrize("last", [3.0, math.nan])
def test_a_run_that_ends_above_its_start_is_no_success(make_run: MakeRun, last: float) -> None:
    rows = [{"step": i + 1, "loss": loss} for i, loss in enumerate([2.3, 1.0, *[last] * 5])]
    result = {"status": "finished", "best_accuracy": 0.98, "target_accuracy": 0.97, "steps": 7}
    text = summary_text(
        read_run(
            make_run(
                result__json=json.dumps(result),
                metrics__jsonl="".join(json.dumps(row) + "\n" for row in rows),
            )
        )
    )
    assert text.startswith(f"Diverged: the training loss is {last:.4g} at the end and was 2.3 at")
    assert "  change      " in text


def test_headline_of_failed_run_names_the_status(make_run: MakeRun) -> None:
    run = read_run(make_run(result__json=json.dumps({"status": "failed", "steps": 9})))
    assert headline(run).startswith("Ended as “failed” at step 9")


def test_summary_fits_one_screen(make_run: MakeRun) -> None:
    lines = summary_text(read_run(make_run())).splitlines()
    assert len(lines) < 24
    assert any(
        "2 → 1 (node removed), 8.6 s without steps, no step redone" in line for line in lines
    )
    assert [line.endswith("3 steps redone, state kept, 1.2 MiB moved") for line in lines].count(
        True
    ) == 1


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.414, "0.41 s"),
        (12.34, "12.3 s"),
        (59.97, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3599.6, "1 h 00 min"),
        (7620, "2 h 07 min"),
    ],
)
def test_duration_reads_like_people_write(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_metric_names_are_unique_and_carry_their_unit() -> None:
    assert len({m.column for m in METRICS}) == len(METRICS)
    assert len({m.exported_name for m in METRICS}) == len(METRICS)
    for entry in METRICS:
        assert entry.help.endswith(".")
        assert (entry.unit == "s") == entry.column.endswith("_s") or entry.unit == "samples/s"
    assert metric("world_size").exported_name == "kfac_elastic_world_size"
    with pytest.raises(KeyError):
        metric("wrold_size")


COSTS = {
    "time": 1003.0,
    "kind": "costs",
    "step": 210,
    "world_size": 2,
    "steps": 79,
    "step_s": 0.1,
    "seconds": {"passes": 0.06, "gradients": 0.01, "decompositions": 0.02, "optimizer": 0.002},
    "bytes": {"gradients": 3 * 2.0**20, "decompositions": 2.0**20},
    "memory": {
        "factors": 2.0**20,
        "second_order": 2.0**20,
        "total": 2.0**21,
        "process peak": 2.0**28,
    },
    "model": {
        "seconds": {"decompositions": 0.01},
        "bytes": {"gradients": 3 * 2.0**20},
        "memory": {"factors and decompositions": 2.0**21},
    },
}
RETUNED = {
    "time": 1001.0,
    "kind": "retuned",
    "step": 130,
    "world_size": 2,
    "factor_update_steps": 5,
    "inverse_update_steps": 20,
    "damping": 0.02,
    "predicted_gain": 0.25,
    "reason": "because",
}
REPLANNED = {
    "time": 1002.0,
    "kind": "replanned",
    "step": 140,
    "world_size": 2,
    "reason": "slow",
    "changes": ["columns: 1 -> 2 (grad_worker_frac 1 -> 0.5)", "a: x -> y", "b: x -> y"],
    "way": "resize",
    "moved_bytes": 2**20,
}


def _cells(text: str, caption: str) -> list[list[str]]:
    [table] = re.findall(rf'<table aria-label="{caption}".*?</table>', text, re.DOTALL)
    rows = re.findall(r"<tr.*?</tr>", table, re.DOTALL)[1:]
    return [
        [re.sub("<[^>]*>", "", cell) for cell in re.findall(r"<t[hd].*?</t[hd]>", row, re.DOTALL)]
        for row in rows
    ]


def test_run_card_has_costs_beside_the_model_and_plans_in_words(make_run: MakeRun) -> None:
    noise = {**REPLANNED, "changes": ["no change"]}  # of an earlier version
    lines = "".join(json.dumps(row) + "\n" for row in (COSTS, RETUNED, noise, REPLANNED))
    text = page_of(make_run(events__jsonl=lines))
    assert Page(text).open == []
    rows = {cells[0]: cells[1:] for cells in _cells(text, "Costs of a step on 2 workers")}
    assert rows["forward and backward"] == ["60 ms", "–", "–", "60%"]
    assert rows["decompositions"] == ["20 ms", "10 ms", "2.00", "20%"]
    assert rows["other"][0] == "8 ms"
    assert rows["received: gradients"] == ["3 MiB", "3 MiB", "1.00", "75%"]
    assert rows["held: factors and decompositions"][:3] == ["2 MiB", "2 MiB", "1.00"]
    assert rows["process peak"][0] == "256 MiB"
    first, second = _cells(text, "Plans")
    assert first == [
        "step 130",
        "2",
        "statistics every 5 and decompositions every 20 steps, damping 0.02",
        "because; predicted gain 25%",
    ]
    assert second[2] == "columns: 1 -&gt; 2 (grad_worker_frac 1 -&gt; 0.5); 2 layers at other ranks"
    assert second[3] == "slow; state kept, 1.0 MiB moved"
    assert "Batch size and workers" not in text and "clean and on attacked" not in text


def test_run_card_draws_a_growing_batch_and_the_robustness(make_run: MakeRun) -> None:
    rows: list[dict[str, object]] = [
        {"step": s, "epoch": s / 4, "loss": 1.0, "wall_time_s": s / 9, "world_size": 1 + s // 9}
        | {"global_batch_size": 8 * (1 + s // 7), "wanted_workers": 1 + s // 7}
        for s in range(1, 20)
    ]
    rows.append(
        {"step": 19, "eval_accuracy": 0.9, "eval_adversarial_accuracy": 0.4, "eval_loss": 0.1}
    )
    text = page_of(make_run(metrics__jsonl="".join(json.dumps(row) + "\n" for row in rows)))
    assert Page(text).open == []
    assert "workers wanted" in text and "Batch size and workers by epoch" in text
    assert "Test accuracy, clean and attacked" in text
