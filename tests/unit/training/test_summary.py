"""What the end of a run says about its steps, over all processes that made them."""

from __future__ import annotations

import json
from pathlib import Path

from elastic_kfac.runs.history import read_run
from elastic_kfac.runs.summary import clip_text


def run_with(folder: Path, scales: dict[int, list[float]], trust_region: str = "adaptive") -> str:
    """The text for a run whose processes made these steps, each from the given one on."""
    folder.mkdir()
    (folder / "config.yaml").write_text(f"kfac: {{trust_region: {trust_region}}}\n")
    rows = []
    for first, made in scales.items():
        for number, scale in enumerate(made):
            share = sum(each < 1 for each in made[: number + 1]) / (number + 1)
            row = {"step": first + number, "loss": 1.0, "kl_clip_scale": scale}
            rows.append({**row, "clipped_share": share})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return clip_text(read_run(folder))


def test_share_of_shortened_steps_counts_every_process_of_a_run(tmp_path: Path) -> None:
    quiet = run_with(tmp_path / "quiet", {1: [0.5] * 30 + [1.0] * 10})
    assert quiet == "75% of the steps were shortened"
    assert run_with(tmp_path / "resumed", {1: [0.5] * 30, 31: [1.0] * 10}) == quiet
    # Steps 21 to 30 were lost and made again.
    assert run_with(tmp_path / "redone", {1: [0.5] * 30, 21: [0.5] * 10 + [1.0] * 10}) == quiet


def test_share_says_when_not_every_step_was_logged(tmp_path: Path) -> None:
    assert (
        run_with(tmp_path / "some", {11: [0.5] * 10})
        == "100% of the 10 logged steps were shortened"
    )


def test_fixed_clip_that_binds_in_every_process_is_called_without_effect(tmp_path: Path) -> None:
    text = run_with(tmp_path / "all", {1: [0.5] * 30, 31: [0.4] * 10}, "fixed")
    assert text.startswith("100% of the steps were shortened, so that optimizer.lr had no effect")
    assert "no effect" not in run_with(tmp_path / "later", {1: [1.0] * 30, 31: [0.4] * 9}, "fixed")
    assert run_with(tmp_path / "none", {}) == ""
