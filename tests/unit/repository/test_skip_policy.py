"""A skip without a committed reason fails; one with a reason is printed and tolerated."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CONFTEST = Path(__file__).parents[2] / "conftest.py"


def run_pytest(folder: Path, body: str) -> tuple[int, str]:
    (folder / "conftest.py").write_text(CONFTEST.read_text(encoding="utf-8"), encoding="utf-8")
    (folder / "skips.toml").write_text(
        '[[skip]]\ntest = "*"\nreason = "*needs a GPU*"\nwhy = "most machines have none"\n',
        encoding="utf-8",
    )
    (folder / "test_it.py").write_text(f"import pytest\n{body}\n", encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_it.py"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_skip_with_committed_reason_passes_and_is_printed(tmp_path: Path) -> None:
    code, out = run_pytest(tmp_path, "def test_a(): pytest.skip('needs a GPU')")
    assert code == 0, out
    assert "SKIPPED test_it.py::test_a: needs a GPU (most machines have none)" in out
    assert out.rstrip().splitlines()[-1].startswith("1 skipped")


def test_skip_without_committed_reason_fails(tmp_path: Path) -> None:
    code, out = run_pytest(tmp_path, "def test_a(): pytest.skip('not today')")
    assert code == 1, out
    assert "1 failed" in out.rstrip().splitlines()[-1]
    assert "not in skips.toml: not today" in out


def test_skip_of_a_whole_module_without_committed_reason_fails(tmp_path: Path) -> None:
    code, out = run_pytest(tmp_path, "pytest.importorskip('no_such_module')\ndef test_a(): pass")
    assert code != 0, out
    assert "not in skips.toml" in out


def test_expected_failure_without_committed_reason_fails(tmp_path: Path) -> None:
    code, out = run_pytest(
        tmp_path, "@pytest.mark.xfail(reason='broken')\ndef test_a(): assert False"
    )
    assert code == 1, out
