"""`elastic-kfac init`, a folder to start one's own training in, and `elastic-kfac completion`."""

from __future__ import annotations

import argparse
import keyword
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from string import Template
from typing import Any

from elastic_kfac.config.shipped import shipped_configs
from elastic_kfac.errors import UsageError

_TEMPLATES = Path(__file__).with_name("templates")


def init(arguments: argparse.Namespace) -> int:
    """Writes a project: configuration, search space, and a package with a model and a dataset.

    Raises:
        UsageError: If the folder has files already, or the name gives no name for a package.
    """
    folder = Path(arguments.name)
    package = re.sub(r"\W", "_", folder.name).lower()
    if not package.isidentifier() or keyword.iskeyword(package) or package in _taken():
        raise UsageError(
            "the name gives no free name for a Python package",
            given=arguments.name,
            change="start it with a letter, and do not use the name of an installed module",
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError("the folder is not empty", given=folder, change="name another one")
    files = _files(folder.name, package)
    if arguments.config is not None:
        files = {"config.yaml": _shipped(arguments.config)}
    for name, text in files.items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text, encoding="utf-8")
        print(target)
    print(f"\ncd {folder} && elastic-kfac train config.yaml --local")
    return 0


def _files(name: str, package: str) -> dict[str, str]:
    def filled(template: str) -> str:
        text = (_TEMPLATES / template).read_text(encoding="utf-8")
        return Template(text).substitute(name=name, package=package)

    return {
        "config.yaml": filled("config.yaml"),
        "space.yaml": filled("space.yaml"),
        "README.md": filled("README.md"),
        f"{package}/__init__.py": "",
        f"{package}/model.py": filled("model.py.txt"),
        f"{package}/data.py": filled("data.py.txt"),
    }


def _shipped(name: str) -> str:
    known = shipped_configs()
    if name not in known:
        raise UsageError("no such configuration", given=name, allowed=", ".join(known))
    return known[name].read_text(encoding="utf-8")


def _taken() -> set[str]:
    from importlib.metadata import packages_distributions

    return {*sys.stdlib_module_names, *packages_distributions()}


def _usage(flag: str, option: Mapping[str, Any]) -> str:
    if not flag.startswith("-"):
        return flag if option.get("nargs") is None else f"[{flag} ...]"
    if option.get("action") == "store_true":
        return f"[{flag}]"
    choices = "|".join(option.get("choices", ()))
    value = option.get("metavar") or choices or flag.strip("-").upper().replace("-", "_")
    return f"{flag} {value}" if option.get("required") else f"[{flag} {value}]"


def _help(option: Mapping[str, Any]) -> str:
    return str(option["help"]).replace("|", "\\|")


def completion(arguments: argparse.Namespace) -> int:
    """Prints a script that completes subcommands and options in a shell, or `docs/cli.md`."""
    from elastic_kfac.cli.arguments import COMMANDS, build_parser, options_of

    if arguments.shell == "markdown":
        lines = ["# Commands", "", "Written by `elastic-kfac completion markdown`.", ""]
        for name, command in COMMANDS.items():
            options = options_of(command)
            words = [_usage(flag, option) for flag, option in options.items()]
            lines += [f"## {name}", "", command.help, ""]
            lines += [f"    {' '.join(['elastic-kfac', name, *words])}", ""]
            rows = [f"| `{flag}` | {_help(option)} |" for flag, option in options.items()]
            lines += ["| argument | |", "|---|---|", *rows, ""] if rows else []
        print("\n".join(lines).rstrip())
        return 0
    import shtab

    print(shtab.complete(build_parser(), arguments.shell))
    return 0
