"""Checks Ray's custom resources as an API server would, and refuses what it would only drop.

The server fills in defaults, prunes unknown fields without a word and takes numbers or text for
quantities; plain JSON Schema does none of it. So the schema is rewritten: integers or strings where
`x-kubernetes-int-or-string` says so, and no unknown fields wherever fields are named.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema

ROOT = Path(__file__).parents[2]
SCHEMAS = {
    "RayCluster": ROOT / "k8s" / "schemas" / "ray.io_rayclusters.v1.json",
    "RayJob": ROOT / "k8s" / "schemas" / "ray.io_rayjobs.v1.json",
}
_TEXT_MAP = {"type": "object", "additionalProperties": {"type": "string"}}
_METADATA = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "namespace": {"type": "string"},
        "labels": _TEXT_MAP,
        "annotations": _TEXT_MAP,
    },
    "required": ["name"],
}


@functools.cache
def schema(kind: str) -> dict[str, Any]:
    """The strict schema of a kind."""
    raw = json.loads(SCHEMAS[kind].read_text(encoding="utf-8"))
    raw["properties"]["apiVersion"] = {"const": "ray.io/v1"}
    raw["properties"]["kind"] = {"const": kind}
    raw["properties"]["metadata"] = _METADATA
    raw["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return strict(raw)


def strict(node: dict[str, Any]) -> dict[str, Any]:
    """A copy of a structural schema that knows quantities and refuses unknown fields."""
    result = dict(node)
    if result.get("x-kubernetes-int-or-string"):
        result.pop("anyOf", None)
        result["type"] = ["integer", "string"]
    if "properties" in result:
        result["properties"] = {k: strict(v) for k, v in result["properties"].items()}
        if not result.get("x-kubernetes-preserve-unknown-fields"):
            result["additionalProperties"] = False
    elif isinstance(result.get("additionalProperties"), dict):
        result["additionalProperties"] = strict(result["additionalProperties"])
    if "items" in result:
        result["items"] = strict(result["items"])
    return result


def with_defaults(value: Any, node: dict[str, Any]) -> Any:
    """A copy of a document with the schema's defaults where a field is missing."""
    if isinstance(value, dict):
        known = node.get("properties", {})
        result = {
            key: with_defaults(part, known.get(key) or _values_of(node))
            for key, part in value.items()
        }
        for key, child in known.items():
            if key not in result and "default" in child:
                result[key] = copy.deepcopy(child["default"])
        return result
    if isinstance(value, list):
        return [with_defaults(part, node.get("items", {})) for part in value]
    return value


def _values_of(node: dict[str, Any]) -> dict[str, Any]:
    values = node.get("additionalProperties")
    return values if isinstance(values, dict) else {}


def problems(document: dict[str, Any]) -> list[str]:
    """What is wrong with a RayJob or RayCluster, one line each."""
    root = schema(document["kind"])
    complete = with_defaults(document, root)
    errors = jsonschema.Draft202012Validator(root).iter_errors(complete)
    found = [f"{'/'.join(map(str, e.absolute_path)) or '.'}: {e.message[:200]}" for e in errors]
    return found + list(_duplicates(complete, root, ""))


def problems_of_part(kind: str, pointer: str, value: Any) -> list[str]:
    """The same for a value that a patch puts at a JSON pointer; the pointer must exist, too."""
    node = schema(kind)
    for token in pointer_tokens(pointer):
        child = node.get("properties", {}).get(token)
        if child is None and (token.isdigit() or token == "-"):
            child = node.get("items")
        child = child or _values_of(node)
        if not child:
            return [f"{pointer}: no such field {token}"]
        node = child
    complete = with_defaults(value, node)
    found = [e.message[:200] for e in jsonschema.Draft202012Validator(node).iter_errors(complete)]
    return [f"{pointer}: {line}" for line in found]


def pointer_tokens(pointer: str) -> list[str]:
    """The steps of a JSON pointer (RFC 6901)."""
    return [part.replace("~1", "/").replace("~0", "~") for part in pointer.split("/")[1:]]


def _duplicates(value: Any, node: dict[str, Any], where: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, part in value.items():
            child = node.get("properties", {}).get(key) or _values_of(node)
            yield from _duplicates(part, child, f"{where}/{key}")
    elif isinstance(value, list):
        keys = node.get("x-kubernetes-list-map-keys")
        if keys and node.get("x-kubernetes-list-type") == "map":
            seen = [tuple(part.get(key) for key in keys) for part in value]
            yield from (f"{where}: {entry} twice" for entry in set(seen) if seen.count(entry) > 1)
        for index, part in enumerate(value):
            yield from _duplicates(part, node.get("items", {}), f"{where}/{index}")
