"""Configuration files: YAML plus `--set section.key=value`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from elastic_kfac.config import Config, apply_overrides, parse_config
from elastic_kfac.errors import ConfigError


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `section.key=value` overrides, whose values are YAML too.

    Raises:
        ConfigError: If the file is missing or not YAML, an override has no value, or a key or
            value is not allowed.
    """
    file = Path(path).expanduser()
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigError(
            "no such configuration file",
            given=path,
            change="name a YAML file, for example jobs/configs/digits.yaml",
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file: {error}", given=path) from None
    values = _load_yaml(text, what=str(path))
    if values is None:
        values = {}
    if not isinstance(values, dict):
        raise ConfigError(
            "a configuration file holds sections",
            given=f"{path} with a {type(values).__name__} at the top",
            allowed="train:, model:, kfac:, …",
        )
    return parse_config(apply_overrides(values, [split_override(text) for text in overrides]))


def write_config(config: Config, path: str | Path) -> None:
    """Writes a configuration that `read_config` reads back equal."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)
    Path(path).write_text(text, encoding="utf-8")


def split_override(override: str) -> tuple[str, Any]:
    """`section.key=value` as a path and its value, which is YAML.

    Raises:
        ConfigError: Without a value, or if it is not YAML.
    """
    path, equals, value = override.partition("=")
    if not equals:
        raise ConfigError(
            "--set needs section.key=value",
            given=override,
            allowed="for example kfac.damping=1e-3",
        )
    return path.strip(), _scalar(value, override)


def _scalar(value: str, override: str) -> Any:
    parsed = _load_yaml(value, what=f"--set {override}")
    if isinstance(parsed, str):
        # YAML 1.1 reads 1e-3 (no dot) as text; people mean the number.
        try:
            return float(parsed)
        except ValueError:
            return parsed
    return parsed


def _load_yaml(text: str, *, what: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        detail = getattr(error, "problem", None) or "not YAML"
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"bad YAML{where}: {detail}", given=what) from None
