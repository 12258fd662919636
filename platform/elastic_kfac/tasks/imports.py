"""References to user code: `package.module:name`."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from elastic_kfac.errors import ConfigError, ElasticKfacError


def is_reference(name: str) -> bool:
    """Whether `name` refers to user code instead of a built-in."""
    return ":" in name


def load_reference(reference: str, *, key: str) -> Callable[..., Any]:
    """Imports `package.module:attribute`; `key` is the configuration key for error messages.

    Raises:
        ConfigError: If the module cannot be imported, raises meanwhile, or has no such callable.
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
    except Exception as error:
        raise ConfigError(
            f"{key} cannot be imported: {_raised(error)}",
            given=reference,
            change="correct the module",
        ) from error
    found = getattr(module, attribute, None)
    if not callable(found):
        public = sorted(n for n in vars(module) if not n.startswith("_"))
        raise ConfigError(
            f"{key}: {module_name} has no callable {attribute}",
            given=reference,
            allowed=", ".join(public[:12]) or None,
        )
    return found


def made_by(
    factory: Callable[..., Any],
    *arguments: Any,
    key: str,
    given: str,
    options: Mapping[str, Any] | None = None,
    options_key: str | None = None,
) -> Any:
    """Calls `factory(*arguments, **options)`.

    Args:
        key: Configuration key that named the factory, for error messages.
        given: Its value.
        options_key: Configuration key of `options`; None where there is none.

    Raises:
        ConfigError: If the factory takes other arguments, or raises, with the place.
    """
    options = options or {}
    shown = f"{given} with {dict(options)}" if options_key else given
    try:
        return factory(*arguments, **options)
    except ElasticKfacError:
        raise
    except TypeError as error:
        what = f"{options_key or key} do not fit" if options_key else f"{key}: it cannot be called"
        raise ConfigError(f"{what}: {_raised(error, name=False)}", given=shown) from error
    except Exception as error:
        raise ConfigError(f"{key}: it raised {_raised(error)}", given=shown) from error


def _raised(error: Exception, *, name: bool = True) -> str:
    """`ValueError: its first line (file.py:12)`, the place where it was raised."""
    text = (str(error).strip().splitlines() or [""])[0]
    kind = type(error).__name__
    line = (f"{kind}: {text}" if text else kind) if name else text
    frames = traceback.extract_tb(error.__traceback__)
    # A call with wrong arguments fails in the frame that called.
    if len(frames) < 2 or isinstance(error, SyntaxError):
        return line
    return f"{line} ({Path(frames[-1].filename).name}:{frames[-1].lineno})"
