"""Paths and URIs as people write them on a command line or in a configuration."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from urllib.parse import unquote, urlsplit, urlunsplit

from elastic_kfac.errors import DataError

_SCHEMES = ("file", "s3", "gs", "gcs")


def user_path(text: str | Path) -> Path:
    """A path with `~` expanded; without a home, or for an unknown user, `~` stays."""
    return Path(os.path.expanduser(text))  # noqa: PTH111 - Path.expanduser raises


def user_cache() -> Path:
    """`elastic-kfac` below the user's cache directory, or below a temporary one without a home."""
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        cache = Path(root) if root else Path.home() / ".cache"
    except RuntimeError:  # A worker of a container's arbitrary user.
        cache = Path(tempfile.gettempdir(), f"elastic-kfac-{os.getuid()}")
    return cache / "elastic-kfac"


def local_folder(uri: str | Path) -> Path | None:
    """The folder that a path or a file:// URI names; None for a store that is not local.

    This is the one reading of storage arguments: only `://` (or `file:/`) makes a URI, and the path of
    file:// is percent-encoded.

    Raises:
        DataError: If it looks like a URI and is none.
    """
    scheme, colon, rest = str(uri).partition(":")
    scheme = scheme.lower()
    if not colon or not (rest.startswith("//") or (rest.startswith("/") and scheme in _SCHEMES)):
        return user_path(uri)
    if not rest.startswith("//") and scheme != "file":
        raise DataError("one slash is missing", given=uri, change=f"write {scheme}:/{rest}")
    if scheme != "file":
        return None
    parts = urlsplit(str(uri))
    if parts.netloc not in ("", "localhost") or not parts.path:
        raise DataError("file:// needs an absolute path", given=uri, allowed="file:///a/folder")
    return Path(unquote(f"{parts.path}?{parts.query}" if parts.query else parts.path))


def join_uri(uri: str, name: str) -> str:
    """`uri/name`, with URI options such as `?endpoint_override=…` kept at the end."""
    if (local := local_folder(uri)) is not None:
        return str(local / name)
    parts = urlsplit(uri)
    return urlunsplit(parts._replace(path=f"{parts.path.rstrip('/')}/{name}".rstrip("/")))
