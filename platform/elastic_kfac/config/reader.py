"""Configuration files: YAML plus `--set section.key=value`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from elastic_kfac.config.run import Config
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


def parse_config(values: Mapping[str, Any]) -> Config:
    """Validates a mapping.

    Raises:
        ConfigError: With the first offending field, its value, and what is allowed.
    """
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _readable(error) from None


def apply_overrides(
    values: Mapping[str, Any], overrides: Sequence[tuple[str, Any]]
) -> dict[str, Any]:
    """Returns `values` with `section.key` paths replaced; unknown paths are refused by validation.

    Raises:
        ConfigError: If a path has no section or runs through something that is not a section.
    """
    result = {
        key: dict(part) if isinstance(part, Mapping) else part for key, part in values.items()
    }
    for path, value in overrides:
        *sections, key = path.split(".")
        if not sections or not key:
            raise ConfigError(
                "--set needs section.key=value", given=path, allowed="for example kfac.damping=1e-3"
            )
        node = result
        for section in sections:
            child = node.setdefault(section, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{section} is not a section", given=path)
            node = child
        node[key] = value
    return result


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


def _readable(error: ValidationError) -> ConfigError:
    # Unknown keys first: a misspelt key often makes others look missing.
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    problem = problems[0]
    # Pydantic appends the branch of a union to the location; people know section.key only.
    path = ".".join(str(part) for part in problem["loc"][:2])
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 and _distinct(problems) else ""
    if problem["type"] == "extra_forbidden":
        allowed = _known_keys(problem["loc"])
        key = str(problem["loc"][-1])
        close = difflib.get_close_matches(key, allowed, n=1)
        return ConfigError(
            f"unknown configuration key {path}{more}",
            allowed=", ".join(allowed),
            change=f"did you mean {close[0]}?" if close else "remove it or correct its name",
        )
    given = problem["input"]
    unions = [p for p in problems if p["input"] == given and p["loc"][:2] == problem["loc"][:2]]
    allowed_text = " or ".join(dict.fromkeys(_message(p) for p in unions))
    return ConfigError(
        f"bad value for {path or 'the configuration'}{more}",
        given=None if isinstance(given, dict) and len(problem["loc"]) < 2 else repr(given),
        allowed=allowed_text,
    )


def _message(problem: Any) -> str:
    text = str(problem["msg"])
    if problem["type"] == "value_error":
        return "consistent values (" + text.removeprefix("Value error, ") + ")"
    return text.removeprefix("Input should be ")


def _distinct(problems: Sequence[Any]) -> bool:
    return len({p["loc"][:2] for p in problems}) > 1


def _known_keys(location: Sequence[Any]) -> list[str]:
    model: type[BaseModel] = Config
    for part in location[:-1]:
        field = model.model_fields.get(str(part))
        if field is None or not isinstance(field.annotation, type):
            return []
        if not issubclass(field.annotation, BaseModel):
            return []
        model = field.annotation
    return sorted(model.model_fields)
