"""YAML as people expect it: numbers by YAML 1.2 (`010` is ten, `1:30` is text), no key twice."""

from __future__ import annotations

import re
from typing import Any

import yaml

from elastic_kfac.errors import ConfigError

# The core schema of YAML 1.2.2, section 10.3.2, and the merge key of 1.1.
_CORE = {
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+\.[0-9]*|[0-9]+(?=[eE]))([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "null": (r"null|Null|NULL|~|", "nN~"),
    "merge": (r"<<", "<"),
}


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        first: dict[Any, int] = {}
        for key, _ in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and (key.tag, key.value) in first:
                problem = f"{key.value} is there twice, first at line {first[key.tag, key.value]}"
                raise yaml.composer.ComposerError(None, None, problem, key.start_mark)
            first[key.tag, str(key.value)] = line
        return node


class _Dumper(yaml.SafeDumper):
    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012


for _name, (_pattern, _first) in _CORE.items():
    for _kind in (_Loader, _Dumper):
        _kind.add_implicit_resolver(
            f"tag:yaml.org,2002:{_name}",
            re.compile(f"(?:{_pattern})$"),
            [*_first, *([""] if _name == "null" else [])],
        )
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def load_yaml(text: str, *, what: str) -> Any:
    """Parses a document.

    Args:
        text: The document.
        what: Where it comes from, for errors.

    Raises:
        ConfigError: If it is not plain YAML, or has a key twice.
    """
    try:
        return _Loader(text).get_single_data()
    except yaml.YAMLError as error:
        detail = getattr(error, "problem", None) or str(error).splitlines()[0]
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark is not None else ""
        raise ConfigError(f"bad YAML{where}: {detail}", given=what) from None
    except (ValueError, KeyError, AttributeError, RecursionError) as error:  # An ill-tagged value.
        raise ConfigError(f"bad YAML: {error}", given=what) from None


def dump_yaml(values: Any) -> str:
    """A document that `load_yaml` reads back equal."""
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False)
