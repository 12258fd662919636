"""`ray job submit` of every job on a real head, with the committed runtime environment."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_kfac.cluster.run.trainer import STOP_TIMEOUT_S
from support.ray_head import ROOT, RayHead, ray_head, until

CONFIG = "jobs/configs/digits.yaml"
JOBS = sorted(path.name for path in (ROOT / "jobs").glob("*.py"))
FIRST_LINE = re.compile(r"elastic-kfac \S+ from \S*/working_dir_files/\S+/platform/elastic_kfac$")


@pytest.fixture(scope="module")
def head() -> Iterator[RayHead]:
    with ray_head() as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("jobs")


def arguments(folder: Path, *more: str) -> list[str]:
    """Of `train`, with places that every node reaches."""
    return [
        *(CONFIG, "--storage", str(folder), "--name", "job"),
        *("--set", f"data.shards={folder}/digits", *more),
    ]


def own_lines(output: str) -> list[str]:
    """What the entry point printed, without what Ray says around it."""
    lines = output.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("Running entrypoint"))
    return [line for line in lines[begin + 1 :] if " -- " not in line]


def result_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "result.json").read_text(encoding="utf-8")))


def test_job_with_bad_configuration_fails_with_one_line(head: RayHead, folder: Path) -> None:
    job = head.submit("jobs/train.py", CONFIG, "--set", "train.epoch=1")

    assert job.returncode == 1
    assert "Job entrypoint command failed with exit code 2" in job.stdout + job.stderr
    first, second, *_ = own_lines(job.stdout)
    assert FIRST_LINE.fullmatch(first), first
    assert second.startswith("elastic-kfac: error: unknown key train.epoch in the configuration")
    assert "Traceback" not in job.stdout


def test_job_trains_on_the_cluster_it_was_submitted_to(head: RayHead, folder: Path) -> None:
    options = ("--set", "train.epochs=2")
    job = head.submit("jobs/train.py", *arguments(folder, *options))

    assert job.returncode == 0, job.stdout + job.stderr
    lines = own_lines(job.stdout)
    assert FIRST_LINE.fullmatch(lines[0]), lines[0]
    assert "[step 0] training started on 2 workers" in job.stdout
    result = result_of(folder / "job")
    assert (result["status"], result["world_sizes"]) == ("finished", [2])
    assert (folder / "job" / "report.html").exists()

    said = head.log_of_actor("RunCoordinator(job)")
    states = [line.get("state") for line in said]
    assert [state for state in states if state == "running"] == ["running"]
    assert (said[0]["run"], said[0]["rank"], said[-1]["step"]) == ("job", None, result["steps"])


@pytest.mark.soak
def test_stopped_job_is_parked_and_the_same_name_continues(head: RayHead, folder: Path) -> None:
    run = folder / "stopped"
    job_id = "to-be-stopped"
    words = [*arguments(folder, "--set", "train.epochs=100000"), "--name", "stopped"]
    job = head.submit("jobs/train.py", *words, options=("--no-wait", "--submission-id", job_id))
    assert job.returncode == 0, job.stderr
    metrics = run / "metrics.jsonl"
    assert until(lambda: metrics.exists() and len(metrics.read_bytes().splitlines()) > 50, 180)
    stopped = head.ray("job", "stop", job_id)
    assert f"Job '{job_id}' was stopped" in stopped.stdout + stopped.stderr
    assert "SIGTERM: saving the state and stopping" in head.ray("job", "logs", job_id).stdout
    interrupted = result_of(run)
    assert interrupted["status"] == "interrupted"
    rows = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    assert interrupted["steps"] == max(row["step"] for row in rows)
    epochs = int(interrupted["epochs"]) + 2

    words = [*arguments(folder, "--set", f"train.epochs={epochs}"), "--name", "stopped"]
    job = head.submit("jobs/train.py", *words)

    assert job.returncode == 0, job.stdout
    assert f"[step {interrupted['steps']}] training resumed on 2 workers" in job.stdout
    finished = result_of(run)
    assert (finished["status"], finished["epochs"]) == ("finished", epochs)
    assert finished["steps_redone"] == 0


@pytest.mark.soak
def test_job_whose_run_fails_is_failed_and_says_why(head: RayHead, folder: Path) -> None:
    words = arguments(folder, "--set", "optimizer.lr=1e30", "--set", "kfac.enabled=false")
    job = head.submit("jobs/train.py", *words, "--name", "diverging")

    assert job.returncode == 1
    assert "failed with exit code 1" in job.stdout + job.stderr
    assert "not finite" in job.stdout
    assert result_of(folder / "diverging")["status"] == "failed"


@pytest.mark.soak
def test_make_shards_job_shares_the_work_on_the_cluster(head: RayHead, folder: Path) -> None:
    out = folder / "made"
    job = head.submit("jobs/make_shards.py", "--source", "digits", "--out", str(out))

    assert job.returncode == 0, job.stdout
    assert FIRST_LINE.fullmatch(own_lines(job.stdout)[0])
    assert {path.name for path in out.iterdir()} >= {"train", "test"}


@pytest.mark.soak
@pytest.mark.parametrize("script", JOBS)
def test_every_job_refuses_a_wrong_option_with_exit_code_2(head: RayHead, script: str) -> None:
    job = head.submit(f"jobs/{script}", "--nonsense")

    assert job.returncode == 1
    assert "failed with exit code 2" in job.stdout + job.stderr
    assert FIRST_LINE.fullmatch(own_lines(job.stdout)[0])
    assert "has no option --nonsense" in job.stdout


def test_runtime_environment_uploads_the_whole_package_and_no_data() -> None:
    """An exclude without a leading slash also matches inside the package (its room `data`)."""
    import yaml

    written = yaml.safe_load((ROOT / "jobs" / "runtime_env.yaml").read_text(encoding="utf-8"))
    rooms = {path.name for path in (ROOT / "platform" / "elastic_kfac").iterdir()}
    ignored = (ROOT / ".rayignore").read_text(encoding="utf-8").splitlines()
    patterns = [*written["excludes"], *(line for line in ignored if not line.startswith("#"))]
    assert {"/data", "/runs"} <= set(written["excludes"])
    assert not {pattern.rstrip("/") for pattern in patterns} & rooms - {"__pycache__"}
    assert written["env_vars"]["PYTHONPATH"] == "platform"
    # A stopped job is not killed while its ranks may still be saving their state.
    assert int(written["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]) > STOP_TIMEOUT_S
