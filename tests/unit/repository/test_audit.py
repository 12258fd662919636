"""`make audit`: only an answer of the service about every package counts as an audit."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
SCRIPT = ROOT / ".ci" / "audit_dependencies.py"
CLEAN: dict[str, Any] = {"name": "idna", "version": "3.20", "vulns": []}
SKIPPED: dict[str, Any] = {
    "name": "idna",
    "skip_reason": "Dependency not found on PyPI and could not be audited: idna (3.20)",
}
FOUND: dict[str, Any] = {
    "name": "jinja2",
    "version": "3.1.2",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["3.1.3"], "aliases": [], "description": "xss"}],
}
UNREACHABLE = "requests.exceptions.ConnectionError: Failed to resolve 'api.osv.dev'"


@dataclass(frozen=True)
class Done:
    """How an audit ended."""

    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> Run:
    """Audits two pins with a program that answers as pip-audit 2.10.1 does."""
    spec = importlib.util.spec_from_file_location("audit_dependencies", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def audit(first: object, both: object) -> Done:
        for name, answer in (("1", first), ("2", both)):
            text = answer if isinstance(answer, str) else json.dumps({"dependencies": answer})
            (tmp_path / name).write_text(text)
        (tmp_path / "constraints.txt").write_text("# pinned\nidna==3.20\njinja2==3.1.2\n")
        tool = tmp_path / "pip-audit"
        tool.write_text(
            f"#!{sys.executable}\nimport pathlib, sys\n"
            "asked = pathlib.Path(sys.argv[sys.argv.index('--requirement') + 1])\n"
            "count = len(asked.read_text().split())\n"
            f"text = pathlib.Path({str(tmp_path)!r}, str(count)).read_text()\n"
            "print(text, file=sys.stdout if text.startswith('{') else sys.stderr)\n"
        )
        tool.chmod(0o755)
        pins = str(tmp_path / "constraints.txt")
        code = script.main(["--tool", str(tool), "--constraints", pins])
        return Done(code, *capfd.readouterr())

    return audit


def test_every_pin_audited_and_clean_is_success(run: Run) -> None:
    done = run([CLEAN], [CLEAN, {**CLEAN, "name": "jinja2"}])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "2 of 2 pinned versions audited by pypi: 0 known vulnerabilities\n"


def test_vulnerability_is_named_and_fails(run: Run) -> None:
    done = run([CLEAN], [CLEAN, FOUND])
    assert done.returncode == 1
    assert done.stdout.startswith("jinja2 3.1.2: PYSEC-1, fixed in 3.1.3: xss\n")
    assert "1 known vulnerabilities" in done.stdout


@pytest.mark.parametrize("answer", [UNREACHABLE, [SKIPPED]], ids=["out of reach", "knows nothing"])
def test_service_without_an_answer_is_one_line_and_no_audit(run: Run, answer: object) -> None:
    done = run(answer, [CLEAN, CLEAN])
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        r"audit: .* gives no answer here \(.*\); nothing was audited: .*\n", done.stderr
    )
    assert ("Failed to resolve" in done.stderr) == (answer == UNREACHABLE)


def test_pin_that_the_service_does_not_know_fails(run: Run) -> None:
    done = run([CLEAN], [SKIPPED, FOUND])
    assert done.returncode == 1
    assert done.stderr == "audit: pypi does not know idna\n"
    assert "1 of 2 pinned versions audited" in done.stdout


def test_makefile_audits_with_a_pinned_tool_of_its_own() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (version,) = re.findall(r"^AUDITOR := \$\(VENV\)/audit-(\S+)$", text, re.MULTILINE)
    assert f"pip install --quiet --disable-pip-version-check pip-audit=={version}" in text
    assert re.search(
        r"^audit: .*\n\t@\$\(AUDITOR\)/bin/python \.ci/audit_dependencies\.py ", text, re.M
    )
