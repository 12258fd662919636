"""`make audit`: are there known vulnerabilities in the versions that constraints.txt pins?

pip-audit asks a vulnerability service. It also says "none found" where the service knows no package at
all, as behind a mirror that serves files only; here that is an error, as is a service out of reach.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

EXIT_CLEAN, EXIT_FOUND, EXIT_NO_ANSWER = 0, 1, 2
ROOT = Path(__file__).parents[1]


class NoAnswer(Exception):
    """The service said nothing about a package."""


def pins(path: Path) -> list[str]:
    """The `name==version` lines of a constraints file."""
    lines = (line.split("#")[0].strip() for line in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if "==" in line]


def ask(command: Sequence[str], requirements: Sequence[str]) -> list[dict[str, Any]]:
    """What pip-audit says about every requirement.

    Raises:
        NoAnswer: If it has nothing to say; with the last line of its complaint.
    """
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as listed:
        listed.write("\n".join(requirements) + "\n")
        listed.flush()
        run = subprocess.run(
            [*command, "--requirement", listed.name], capture_output=True, text=True, check=False
        )
    try:
        return list(json.loads(run.stdout)["dependencies"])
    except (ValueError, KeyError):
        said = [line.strip() for line in run.stderr.splitlines() if line.strip()]
        raise NoAnswer(said[-1] if said else f"pip-audit ended with {run.returncode}") from None


def unknown(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """Packages that the service does not know."""
    return [entry["name"] for entry in answers if "skip_reason" in entry]


def findings(answers: Sequence[Mapping[str, Any]]) -> list[str]:
    """One line per vulnerability."""
    return [
        f"{entry['name']} {entry['version']}: {found['id']}, fixed in "
        f"{', '.join(found['fix_versions']) or 'no release yet'}: {found.get('description', '')[:200]}"
        for entry in answers
        for found in entry.get("vulns", ())
    ]


def audit(command: Sequence[str], requirements: Sequence[str], service: str) -> int:
    """Asks and prints; returns the exit code."""
    try:
        # One package first: without a service the other ones need not be tried.
        if unknown(ask(command, requirements[:1])):
            raise NoAnswer(f"it does not know {requirements[0]}")
        answers = ask(command, requirements)
    except NoAnswer as reason:
        print(
            f"audit: the vulnerability service {service} gives no answer here ({reason}); nothing was "
            "audited: run this where it can be reached, or name another one with --service",
            file=sys.stderr,
        )
        return EXIT_NO_ANSWER
    lines, missing = findings(answers), unknown(answers)
    for line in lines:
        print(line)
    if missing:
        print(f"audit: {service} does not know {', '.join(missing)}", file=sys.stderr)
    print(
        f"{len(answers) - len(missing)} of {len(requirements)} pinned versions audited by {service}: "
        f"{len(lines)} known vulnerabilities"
    )
    return EXIT_FOUND if lines or missing else EXIT_CLEAN


def main(argv: Sequence[str] | None = None) -> int:
    """Reads the options and audits."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tool", default="pip-audit", help="the pip-audit to run")
    parser.add_argument("--service", default="pypi", choices=("pypi", "osv"))
    parser.add_argument("--osv-url", help="another address of the OSV service")
    parser.add_argument("--constraints", type=Path, default=ROOT / "constraints.txt")
    options = parser.parse_args(argv)
    command = [options.tool, "--no-deps", "--disable-pip", "--format", "json"]
    command += ["--progress-spinner", "off", "--vulnerability-service", options.service]
    if options.osv_url:
        command += ["--osv-url", options.osv_url]
    return audit(command, pins(options.constraints), options.service)


if __name__ == "__main__":
    sys.exit(main())
