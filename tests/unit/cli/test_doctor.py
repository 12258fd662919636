from __future__ import annotations

import argparse
import atexit
import os
import re
import sys
from pathlib import Path

import pytest

from elastic_kfac.cli import doctor as room
from elastic_kfac.cli.doctor import (
    Finding,
    clock_finding,
    cluster_findings,
    judge_clocks,
    judge_cluster,
    judge_connection_error,
    judge_ray_version,
    judge_torch_pair,
    ports_finding,
    python_finding,
    shared_memory_finding,
    storage_finding,
    temporary_finding,
)
from elastic_kfac.cli.entry import main
from elastic_kfac.cluster.ray import nodes as cluster_nodes
from elastic_kfac.cluster.ray.nodes import ClusterFacts
from elastic_kfac.errors import UsageError

GIB = 1 << 30


@pytest.mark.parametrize(
    ("torch", "torchvision", "wanted", "error", "level", "says"),
    [
        ("2.15.0", "0.29.2", "2.15.0", None, "ok", ""),
        ("2.15.0+cpu", "0.29.2+cpu", "2.15.0", None, "ok", ""),
        ("2.15.0+cu132", "0.29.2", "2.15.0", None, "ok", ""),
        ("2.15.0+cpu", "0.29.2", "2.15.0", None, "fail", "one is a CPU-only build"),
        ("2.15.0", "0.29.2+cpu", "2.15.0", None, "fail", "one is a CPU-only build"),
        ("2.14.0", "0.29.2", "2.15.0", None, "fail", "built for torch 2.15.0"),
        (
            "2.15.0",
            "0.29.2",
            "2.15.0",
            "RuntimeError: operator torchvision::nms does not exist",
            "fail",
            "one is a CPU-only build",
        ),
        ("2.15.0", "0.29.2", "2.15.0", "OSError: libcudart.so", "fail", "libcudart"),
        (None, "0.29.2", "2.15.0", None, "fail", "torch missing"),
        ("2.15.0", None, None, None, "ok", "without torchvision"),
    ],
)
def test_judge_torch_pair(
    torch: str | None,
    torchvision: str | None,
    wanted: str | None,
    error: str | None,
    level: str,
    says: str,
) -> None:
    finding = judge_torch_pair(torch, torchvision, wanted, error)
    assert finding.level == level
    assert says in finding.detail
    assert (finding.action is None) == (level == "ok")


def test_python_finding_of_old_interpreter_fails_with_action() -> None:
    assert python_finding((3, 10, 9)).level == "fail"
    assert python_finding((3, 11, 0)).level == "ok"


def test_storage_finding_below_a_file_fails(tmp_path: Path) -> None:
    (tmp_path / "runs").write_text("in the way")
    finding = storage_finding(str(tmp_path / "runs" / "deep"))
    assert finding.level == "fail"
    assert finding.action


def test_storage_finding_of_new_folder_does_not_create_it(tmp_path: Path) -> None:
    assert storage_finding(str(tmp_path / "new" / "runs")).level in ("ok", "warn")
    assert list(tmp_path.iterdir()) == []


def test_storage_finding_of_unreachable_bucket_fails() -> None:
    assert storage_finding("nonsense://bucket/runs").level == "fail"


def test_shared_memory_finding_when_small_names_the_container_option() -> None:
    finding = shared_memory_finding(64 << 20)
    assert finding.level == "warn"
    assert "--shm-size" in (finding.action or "")
    assert shared_memory_finding(4 * GIB).level == "ok"
    assert shared_memory_finding(None).level == "warn"


def test_temporary_finding_of_missing_folder_fails(tmp_path: Path) -> None:
    assert temporary_finding(tmp_path / "gone").level == "fail"


@pytest.mark.parametrize(
    ("version", "level"),
    [("2.60.0", "ok"), ("2.60.3", "ok"), ("2.59.1", "fail"), ("3.0.0", "fail")],
)
def test_ray_version_outside_the_checked_series_fails(version: str, level: str) -> None:
    finding = judge_ray_version(version)
    assert finding.level == level
    assert (finding.action is None) == (level == "ok")


@pytest.mark.parametrize(
    ("facts", "level", "says"),
    [
        (ClusterFacts(3, 8.0, 0.0, {}, ()), "ok", "3 nodes, 8 CPUs, 0 GPUs"),
        (ClusterFacts(1, 0.0, 0.0, {}, ()), "warn", "no room for a worker"),
        (ClusterFacts(2, 4.0, 0.0, {}, ("10.0.0.7",)), "warn", "silent: 10.0.0.7"),
    ],
)
def test_cluster_finding(facts: ClusterFacts, level: str, says: str) -> None:
    finding = judge_cluster("head:6379", facts)
    assert finding.level == level
    assert says in finding.detail
    assert (finding.action is None) == (level == "ok")


@pytest.mark.parametrize(
    ("error", "action"),
    [
        (ConnectionError("could not connect"), "ray status"),
        (RuntimeError("Version mismatch: the cluster was started with Ray 2.59"), "constraints"),
        (RuntimeError("InvalidAuthToken"), "RAY_AUTH_MODE=token"),
        (UsageError("cannot connect to a Ray cluster: nobody", given="--address x"), "firewalls"),
    ],
)
def test_cluster_that_cannot_be_used_says_what_to_do(error: Exception, action: str) -> None:
    finding = judge_connection_error("head:6379", error)
    assert finding.level == "fail"
    assert "\n" not in finding.detail
    assert action in (finding.action or "")


def test_no_cluster_is_fine_and_asks_nobody() -> None:
    (finding,) = cluster_findings(None)
    assert finding.level == "ok"


def test_cluster_findings_judge_room_and_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = ClusterFacts(2, 4.0, 1.0, {"10.0.0.7": 30.0}, ())
    monkeypatch.setattr(cluster_nodes, "examine_cluster", lambda address: facts)
    cluster, clocks = cluster_findings("head:6379")
    assert (cluster.level, clocks.level) == ("ok", "warn")
    assert "10.0.0.7 by +30.0 s" in clocks.detail
    assert "NTP" in (clocks.action or "")


def test_clock_of_long_ago_fails() -> None:
    finding = judge_clocks("clock", {}, now=0.0)
    assert finding.level == "fail"
    assert "1970-01-01" in finding.detail
    assert finding.action


def test_clock_finding_compares_with_the_storage(tmp_path: Path) -> None:
    finding = clock_finding(str(tmp_path / "new" / "runs"))
    assert finding.level == "ok"
    assert "the run storage" in finding.detail
    assert list(tmp_path.iterdir()) == []


def test_examine_looks_at_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    subjects = [finding.subject for finding in room.examine(str(tmp_path))]
    assert subjects == [
        "Python",
        "packages",
        "torch",
        "GPU",
        "Ray",
        "models",
        "storage",
        "shared memory",
        "temporary",
        "ports",
        "clock",
        "cluster",
    ]


def test_ports_finding_of_foreign_address_fails() -> None:
    # 192.0.2.0/24 is reserved for documentation: no machine has it.
    assert ports_finding(("192.0.2.1",)).level == "fail"
    assert ports_finding(("127.0.0.1",)).level == "ok"


@pytest.mark.parametrize(("levels", "code"), [(["ok", "warn"], 0), (["ok", "fail"], 1)])
def test_doctor_exit_code_tells_whether_something_must_be_solved(
    levels: list[str],
    code: int,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    findings = [
        Finding(level, "thing", "detail", None if level == "ok" else "do this")  # type: ignore[arg-type]
        for level in levels
    ]
    monkeypatch.setattr(room, "examine", lambda storage, address: iter(findings))
    assert room.doctor(argparse.Namespace(storage="./runs", address=None, json=False)) == code
    out = capsys.readouterr().out
    assert "-> do this" in out
    assert re.search(r"^elastic-kfac \d", out)


def test_doctor_as_a_command_of_its_own_leaves_when_it_has_spoken(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    class Left(BaseException):
        pass

    def leave(code: int) -> None:
        said.append((code, capfd.readouterr().out))
        raise Left

    said: list[tuple[int, str]] = []
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(atexit, "_run_exitfuncs", lambda: None)
    monkeypatch.setattr(room, "examine", lambda *given: [Finding("ok", "Python", "new")])
    monkeypatch.setattr(sys, "argv", ["elastic-kfac", "doctor"])
    with pytest.raises(Left):
        main()
    ((code, text),) = said
    assert code == 0
    assert text.endswith("ready to run\n")
    assert main(["doctor"]) == 0
