"""References to user code: `package.module:name`."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from elastic_kfac.errors import ConfigError


def is_reference(name: str) -> bool:
    """Whether `name` refers to user code instead of a built-in."""
    return ":" in name


def load_reference(reference: str, *, key: str) -> Callable[..., Any]:
    """Imports `package.module:attribute`; `key` is the configuration key for error messages.

    Raises:
        ConfigError: If the module cannot be imported or has no such callable.
    """
    module_name, _, attribute = reference.partition(":")
    if not module_name or not attribute:
        raise ConfigError(f"bad {key}", given=reference, allowed="package.module:factory")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{key} cannot be imported: {error}",
            given=reference,
            change="install the package or put its folder on PYTHONPATH (workers need it too)",
        ) from None
    found = getattr(module, attribute, None)
    if not callable(found):
        public = sorted(n for n in vars(module) if not n.startswith("_"))
        raise ConfigError(
            f"{key}: {module_name} has no callable {attribute}",
            given=reference,
            allowed=", ".join(public[:12]) or None,
        )
    return found
