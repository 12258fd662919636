from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from elastic_kfac.cli import doctor as room
from elastic_kfac.cli.doctor import (
    Finding,
    judge_torch_pair,
    ports_finding,
    python_finding,
    shared_memory_finding,
    storage_finding,
    temporary_finding,
)

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
        ("2.15.0", None, None, None, "fail", "torchvision missing"),
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
    monkeypatch.setattr(room, "examine", lambda storage: iter(findings))
    assert room.doctor(argparse.Namespace(storage="./runs")) == code
    out = capsys.readouterr().out
    assert "-> do this" in out
    assert re.search(r"^elastic-kfac \d", out)
