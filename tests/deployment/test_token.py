"""Ray's token authentication: who has no token is told so in one line, before anything starts."""

from __future__ import annotations

import json
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from ray.core.generated import gcs_service_pb2_grpc
from ray.exceptions import AuthenticationError

from elastic_kfac.cluster.ray.connection import connect
from elastic_kfac.cluster.ray.local_cluster import authentication_mode
from elastic_kfac.errors import UsageError
from support.ray_head import ROOT, SCRIPTS, ray_head

TOKEN = "0123456789abcdef" * 4
CONFIG = "jobs/configs/digits.yaml"


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder without a token, and an environment that says nothing of one."""
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_local_cluster_asks_for_a_token_only_where_the_user_does(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert authentication_mode() == "disabled"
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    assert authentication_mode() == "disabled"
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert authentication_mode() == "token"


def test_local_cluster_without_the_token_it_should_ask_for_is_refused(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    with pytest.raises(UsageError, match=r"no token .* given: RAY_AUTH_MODE=token; .*generate"):
        authentication_mode()
    (home / ".ray").mkdir()
    (home / ".ray" / "auth_token").write_text(TOKEN)
    assert authentication_mode() == "token"


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (AuthenticationError("Token auth is on but there is none"), "requires a token"),
        (RuntimeError("rpc failed: Unauthenticated: InvalidAuthToken"), "requires a token"),
        (RuntimeError("Version mismatch"), "cannot connect to a Ray cluster: Version mismatch"),
    ],
)
def test_refused_connection_is_one_line(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(**options: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    with pytest.raises(UsageError, match=says) as caught:
        connect("auto")
    assert "\n" not in caught.value.line()


def test_head_that_refuses_this_process_is_not_tried_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Head(gcs_service_pb2_grpc.NodeInfoGcsServiceServicer):
        def GetClusterId(self, request: object, context: Any) -> None:
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")

    def must_not(**options: object) -> None:
        raise AssertionError("there is nothing to connect to")

    monkeypatch.setattr(ray, "init", must_not)
    server = grpc.server(ThreadPoolExecutor(1))
    gcs_service_pb2_grpc.add_NodeInfoGcsServiceServicer_to_server(Head(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        with pytest.raises(UsageError, match="requires a token"):
            connect(f"127.0.0.1:{port}")
    finally:
        server.stop(None).wait()


@pytest.mark.soak
def test_head_with_a_token_refuses_strangers_and_runs_jobs(tmp_path: Path) -> None:
    with ray_head(variables={"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}) as head:
        doctor = [str(SCRIPTS / "elastic-kfac"), "doctor", "--address", head.address]
        doctor += ["--storage", str(tmp_path)]
        known = head.run(doctor)
        assert known.returncode == 0, known.stdout + known.stderr

        without = {"RAY_AUTH_MODE": "disabled", "RAY_AUTH_TOKEN": "", "HOME": str(tmp_path)}
        stranger = replace(head, environment={**head.environment, **without})
        refused = stranger.run(doctor)
        assert refused.returncode == 1
        assert "requires a token" in refused.stdout, refused.stdout + refused.stderr
        job = stranger.submit("jobs/train.py", CONFIG)
        assert job.returncode != 0
        assert "token" in (job.stdout + job.stderr).lower()

        job = head.submit(
            "jobs/train.py",
            *(CONFIG, "--storage", str(tmp_path), "--name", "with-token"),
            *("--set", f"data.shards={tmp_path}/digits", "--set", "train.epochs=1"),
        )
        assert job.returncode == 0, job.stdout + job.stderr
        assert status_of(tmp_path / "with-token") == "finished"


@pytest.mark.soak
def test_local_cluster_with_a_token_trains_and_keeps_spare_processes(tmp_path: Path) -> None:
    variables = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "HOME": str(tmp_path)}
    run = subprocess.run(
        [
            *(str(SCRIPTS / "elastic-kfac"), "train", CONFIG),
            *("--storage", str(tmp_path), "--name", "local"),
            *("--set", f"data.shards={tmp_path}/digits", "--set", "train.epochs=1"),
        ],
        env={**os.environ, **variables},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    # A refusal would be a warning of the driver's log.
    assert "no spare worker" not in run.stdout + run.stderr
    assert status_of(tmp_path / "local") == "finished"


def status_of(run: Path) -> str:
    return str(json.loads((run / "result.json").read_text(encoding="utf-8"))["status"])
