"""A run and a search of one name at the same time on one cluster: neither meets the other."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml

from elastic_kfac.cluster.ray.local_cluster import LocalCluster
from elastic_kfac.config import Config, apply_overrides, parse_config
from elastic_kfac.runs.audit import audit_run
from elastic_kfac.state.run_folder import RunFolder

# More than a minute.
pytestmark = [pytest.mark.soak, pytest.mark.timeout(900)]


def test_run_and_search_of_one_name_share_a_cluster(
    config: Callable[[int], Config],
    cluster: LocalCluster,
    await_free_nodes: Callable[[int], None],
    tmp_path: Path,
) -> None:
    await_free_nodes(2)
    one = apply_overrides(config(2).model_dump(mode="json"), [("elastic.max_workers", 1)])
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(parse_config(one).model_dump(mode="json")))
    space = {
        "base": "run.yaml",
        "parameters": {"kfac.damping": {"grid": [1e-2]}},
        "searcher": {"name": "grid"},
        "references": {},
        "objective": {"target_accuracy": 1.0},
        "budget": {"epochs": 2},
    }
    (tmp_path / "space.yaml").write_text(yaml.safe_dump(space))
    variables = {**cluster._variables(), "PYTHONPATH": os.pathsep.join(sys.path)}

    def start(*words: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "elastic_kfac.cli", *words, "--name", "same"]
        return subprocess.Popen(
            [*command, "--address", cluster.address],
            cwd=tmp_path,
            env={**os.environ, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    both = (
        start("train", "run.yaml", "--storage", "runs"),
        start("tune", "space.yaml", "--storage", "searches"),
    )
    said = [process.communicate(timeout=800)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(said)
    folders = (
        RunFolder(tmp_path / "runs" / "same"),
        RunFolder(tmp_path / "searches" / "same" / "trials" / "t000"),
    )
    results: list[dict[str, Any]] = [folder.result() or {} for folder in folders]
    assert len({result["final_state_sha256"] for result in results}) == 1
    for folder in folders:
        assert audit_run(folder).problems == ()
        assert not {"failure", "recovery"} & {row["kind"] for row in folder.events()}
    table = ray.util.placement_group_table().values()
    assert [group for group in table if group["state"] != "REMOVED"] == []
