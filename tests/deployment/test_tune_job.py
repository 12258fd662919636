"""`ray job submit` of a search on a real head, with the committed runtime environment."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml

from elastic_kfac.config import read_config
from support.ray_head import ROOT, RayHead, ray_head, until

ENDS = ("succeeded", "failed", "stopped")


@pytest.mark.soak
def test_search_runs_as_a_job_on_the_cluster_it_was_submitted_to(tmp_path: Path) -> None:
    space = {
        "base": str(ROOT / "jobs/configs/digits.yaml"),
        "set": {"data.shards": f"{tmp_path}/digits", "elastic.max_workers": 1},
        "parameters": {"kfac.damping": {"grid": [0.01, 0.02]}},
        "objective": {"target_accuracy": 0.3},
        "budget": {"epochs": 8},
        "searcher": {"name": "grid"},
        "references": {},
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    words = [str(tmp_path / "space.yaml"), "--storage", str(tmp_path), "--name", "searched"]
    folder = tmp_path / "searched"
    with ray_head() as head:
        options = ("--no-wait", "--submission-id", "search")
        job = head.submit("jobs/tune.py", *words, options=options)
        assert job.returncode == 0, job.stderr
        assert until(lambda: _status(head) in ENDS, 900)
        said, status = head.ray("job", "logs", "search").stdout, _status(head)

    assert status == "succeeded", said
    assert "working_dir_files" in said, "the job did not run what was uploaded"
    assert "2 of 2 trials reached 0.3." in said
    with (folder / "trials.csv").open(encoding="utf-8") as stream:
        assert [row["status"] for row in csv.DictReader(stream)] == ["finished", "finished"]
    assert read_config(folder / "best_config.yaml").kfac.damping in (0.01, 0.02)
    assert (folder / "report.html").exists()


def _status(head: RayHead) -> str:
    said = head.ray("job", "status", "search")
    text = (said.stdout + said.stderr).lower()
    return next((word for word in ENDS if word in text), "")
