"""Documents: links lead somewhere, snippets run, and what they quote exists."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from elastic_kfac.cli import main
from elastic_kfac.cli.arguments import COMMANDS, parse_arguments
from elastic_kfac.config import apply_overrides, parse_config, split_override
from elastic_kfac.errors import UsageError
from support.house import PACKAGE, ROOT

PAGES = sorted((ROOT / "docs").glob("*.md"))
DOCUMENTS = [
    *PAGES,
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "k8s/README.md")),
    ROOT / "platform/ARCHITECTURE.md",
]
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


def text_of(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def anchors(path: Path) -> set[str]:
    """The anchors that renderers make of the headings."""
    titles = re.findall(r"^#+ (.*)$", text_of(path), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).strip().replace(" ", "-") for title in titles}


def broken_links(path: Path, text: str) -> list[str]:
    found = []
    for target in LINK.findall(re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            found.append(target)
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path, text_of(path)) == []


def test_broken_link_is_found() -> None:
    text = "[a](install.md) [b](no.md) [c](concepts.md#exactly-once) [d](concepts.md#no) [e](x:/y)"
    assert broken_links(ROOT / "docs" / "index.md", text) == ["no.md", "concepts.md#no"]


def commands_in(text: str) -> list[list[str]]:
    """The arguments of every `elastic-kfac …` in indented blocks; lines that end in \\ are joined."""
    import shlex

    lines = re.findall(r"^ {4}(elastic-kfac .*)$", re.sub(r"\\\n\s+", "", text), re.MULTILINE)
    return [shlex.split(line, comments=True)[1:] for line in lines]


@pytest.mark.parametrize("path", [ROOT / "README.md", *PAGES], ids=lambda path: path.name)
def test_commands_are_valid(path: Path) -> None:
    if path.name == "cli.md":
        return
    for words in commands_in(text_of(path)):
        if "--help" in words:
            continue
        cut = words[: words.index(">")] if ">" in words else words
        arguments = parse_arguments(cut)
        for override in getattr(arguments, "overrides", ()):
            parse_config(apply_overrides({}, [split_override(override)]))


def test_invalid_command_is_found() -> None:
    (words,) = commands_in("    elastic-kfac train x.yaml \\\n        --nmae a  # so")
    with pytest.raises(UsageError, match="--name"):
        parse_arguments(words)


def test_script_of_the_first_page_runs() -> None:
    code = re.search(r"```python\n(.*?)```", text_of(ROOT / "docs/index.md"), re.DOTALL)
    assert code is not None
    scope: dict[str, Any] = {}
    exec(code[1], scope)
    assert float(scope["loss"].detach()) < 1.0


def test_messages_of_the_troubleshooting_page_exist() -> None:
    source = " ".join(text_of(path) for path in PACKAGE.rglob("*.py"))
    source = re.sub(r'"\s+f?"', "", re.sub(r"\s+", " ", source))
    rows = re.findall(r"^\| (`.*?) \| ", text_of(ROOT / "docs/troubleshooting.md"), re.MULTILINE)
    messages = [message for row in rows for message in re.findall(r"`([^`]+)`", row)]
    assert len(messages) > 15
    assert [each for each in messages if each not in source] == []


def test_reference_of_commands_is_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "markdown"]) == 0
    made = capsys.readouterr().out
    assert made == text_of(ROOT / "docs/cli.md"), (
        "run `elastic-kfac completion markdown > docs/cli.md`"
    )
    assert made.count("\n## ") == len(COMMANDS)


def test_every_page_is_in_the_navigation() -> None:
    text = text_of(ROOT / ".ci/mkdocs.yml").replace("!!python/name:", "")
    listed = re.findall(r"[\w]+\.md", str(yaml.safe_load(text)["nav"]))
    assert sorted(listed) == [path.name for path in PAGES]


@pytest.mark.tools
def test_site_is_built(tmp_path: Path) -> None:
    done = subprocess.run(["make", "docs", f"PYTHON={sys.executable}"], cwd=ROOT, check=False)
    assert done.returncode == 0
    assert (ROOT / "site" / "index.html").is_file()
