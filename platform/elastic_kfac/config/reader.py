"""Configuration files: YAML, `--set section.key=value`, and one line for whatever is wrong with them."""

from __future__ import annotations

import difflib
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from elastic_kfac.config.run import Config, shown
from elastic_kfac.config.shipped import find_config, shipped_configs
from elastic_kfac.config.yaml_text import dump_yaml, load_yaml
from elastic_kfac.errors import ConfigError
from elastic_kfac.paths import user_path

Model = TypeVar("Model", bound=BaseModel)

REMOVED = {
    "sharded.refresh": "write kfac.refresh",
    "sharded.refresh_threshold": "write kfac.refresh_threshold",
    "batch.power_iterations": "delete it; power iteration takes at most 10 iterations",
    "batch.power_tolerance": "delete it; power iteration stops at a relative change of 1e-2",
    "mixing.erasing_area": "delete it; erased boxes cover 2 to 25 % of an image",
    "mixing.erasing_aspect": "delete it; erased boxes have an aspect ratio of 0.3 to 1",
}
"""Keys of earlier versions, and what to do about each."""


def read_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a YAML file and applies `section.key=value` overrides, whose values are YAML too.

    A bare name that is no file means the configuration of that name that comes with the package.

    Raises:
        ConfigError: If the file is missing or not YAML, an override has no value, or a key or
            value is not allowed.
    """
    if not user_path(path).exists():
        path = find_config(path) or path
    example = ", ".join(shipped_configs()) or "config.yaml"
    values = read_yaml(path, "configuration file", example)
    return parse_config(apply_overrides(values, [split_override(text) for text in overrides]))


def write_config(config: Config, path: str | Path) -> None:
    """Writes a configuration that `read_config` reads back equal."""
    Path(path).write_text(dump_yaml(config.model_dump(mode="json")), encoding="utf-8")


def parse_config(values: Mapping[str, Any]) -> Config:
    """Validates a mapping.

    Raises:
        ConfigError: With the first offending key, its value, and what is allowed.
    """
    return validate(Config, values, "the configuration")


def read_yaml(path: str | Path, what: str, example: str) -> dict[str, Any]:
    """Reads a YAML file of sections; an empty file is an empty mapping.

    Args:
        path: The file.
        what: What kind of file it is, for errors.
        example: Path of an example, for errors.

    Raises:
        ConfigError: If the file is missing, unreadable, not YAML or not a mapping.
    """
    file = user_path(path)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except IsADirectoryError:
        inside = sorted(each.name for each in file.glob("*.y*ml"))[:8]
        raise ConfigError(
            f"a folder is no {what}",
            given=path,
            allowed=f"a file; this folder has {', '.join(inside)}" if inside else "a YAML file",
        ) from None
    except FileNotFoundError:
        raise ConfigError(
            f"no such {what}", given=path, change=f"name a YAML file, for example {example}"
        ) from None
    except (OSError, ValueError) as error:
        change = "save it as UTF-8" if isinstance(error, UnicodeError) else None
        raise ConfigError(f"cannot read the {what}: {error}", given=path, change=change) from None
    values = load_yaml(text, what=str(path))
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(
            f"a {what} is a mapping of sections",
            given=f"{path} with a {type(values).__name__} at the top level",
            change=f"see {example}",
        )
    return values


def apply_overrides(
    values: Mapping[str, Any], overrides: Sequence[tuple[str, Any]]
) -> dict[str, Any]:
    """Returns `values` with `section.key` paths replaced; validation refuses unknown paths.

    Raises:
        ConfigError: If a path has no section or runs through something that is not a section.
    """
    result = {
        key: dict(part) if isinstance(part, Mapping) else part for key, part in values.items()
    }
    for path, value in overrides:
        *sections, key = path.split(".")
        if not sections or not key:
            raise _no_override(path)
        node = result
        for section in sections:
            child = node.setdefault(section, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{section} is not a section", given=path)
            node = child
        node[key] = value
    paths = {path for path, _ in overrides}
    if "kfac.kl_clip" in paths and "kfac.trust_region" not in paths:
        # A complete configuration names the rule that followed from the former value.
        result["kfac"].pop("trust_region", None)
    return result


def split_override(override: str) -> tuple[str, Any]:
    """`section.key=value` as a path and its value, which is YAML.

    Raises:
        ConfigError: Without a value, or if it is not YAML.
    """
    path, equals, text = override.partition("=")
    if not equals:
        raise _no_override(override)
    return path.strip(), load_yaml(text, what=f"--set {override}")


def _no_override(given: str) -> ConfigError:
    return ConfigError(
        "bad override", given=given, allowed="section.key=value, for example kfac.damping=1e-3"
    )


def validate(model: type[Model], values: Mapping[str, Any], what: str) -> Model:
    """Validates a mapping against a model.

    Args:
        model: The model.
        values: What a file holds.
        what: What the mapping is, for errors (`the configuration`).

    Raises:
        ConfigError: With the first offending key, its value, and what is allowed.
    """
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _one_line(error, model, what) from None


def _one_line(error: ValidationError, model: type[BaseModel], what: str) -> ConfigError:
    # Unknown keys first: a misspelt key often makes others look missing.
    problems = sorted(error.errors(), key=lambda p: p["type"] != "extra_forbidden")
    problem = problems[0]
    path = _path(problem)
    others = len({_path(p) for p in problems}) - 1
    more = f" (and {others} more)" if others else ""
    if problem["type"] == "extra_forbidden":
        if path in REMOVED:
            return ConfigError(f"{path} has been removed{more}", change=REMOVED[path])
        known = sorted(_model_at(model, problem["loc"][:-1]).model_fields)
        name = str(problem["loc"][-1])
        close = difflib.get_close_matches(name, known, n=1) or _elsewhere(model, name)
        return ConfigError(
            f"unknown key {path} in {what}{more}",
            allowed=", ".join(known),
            change=f"did you mean {close[0]}?" if close else "remove it or correct its name",
        )
    if problem["type"] == "missing":
        return ConfigError(f"{path} is missing in {what}{more}", change="add it")
    given = problem["input"]
    # A union reports a problem for each of its branches.
    messages = [_message(p) for p in problems if _path(p) == path and _same(p["input"], given)]
    return ConfigError(
        f"bad value for {path or what}{more}",
        given=None if not path else shown(given) if given is None else repr(given),
        allowed=" or ".join(dict.fromkeys(messages)),
    )


def _path(problem: Any) -> str:
    # Pydantic appends the branch of a union (`float`, `literal['auto']`) to the location.
    types = {"str", "int", "float", "bool", "dict", "list", "tuple", "number"}
    parts = [str(part) for part in problem["loc"]]
    return ".".join(p for p in parts if re.fullmatch(r"[\w.]+", p) and p not in types)


def _same(a: Any, b: Any) -> bool:
    return a is b or bool(a == b)  # NaN is not equal to itself.


def _message(problem: Any) -> str:
    text = str(problem["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    if problem["type"] == "model_type":
        return "a mapping of keys (a section without keys is left out)"
    return text


def _model_at(model: type[BaseModel], location: Sequence[Any]) -> type[BaseModel]:
    """The model that a location leads to, through lists and mappings of models."""
    for part in location:
        field = model.model_fields.get(str(part))
        if field is not None:
            model = next(models_in(field.annotation), model)
    return model


def _elsewhere(model: type[BaseModel], name: str) -> list[str]:
    """Paths of a key of this name in the model's sections."""
    sections = ((key, m) for key, f in model.model_fields.items() for m in models_in(f.annotation))
    return [f"{key}.{name}" for key, section in sections if name in section.model_fields]


def models_in(annotation: Any) -> typing.Iterator[type[Any]]:
    """The models that a value of this type may hold."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from models_in(argument)
