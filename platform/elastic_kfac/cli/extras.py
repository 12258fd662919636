"""Which `pip install elastic-kfac[EXTRA]` brings a module that is missing."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Sequence

from elastic_kfac.errors import UsageError

EXTRAS = ("train", "tune", "vision", "text", "trackers", "hub")
"""The extras for users; each is named before those that contain it."""
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "annotated_types": "annotated-types",
    "grpc": "grpcio",
    "huggingface_hub": "huggingface-hub",
    "mlflow": "mlflow-skinny",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}
"""Top-level modules that are not named like their distribution."""


def missing_extra(error: ModuleNotFoundError) -> UsageError | None:
    """The refusal for a missing dependency of an extra; None for any other module."""
    module = (error.name or "").partition(".")[0]
    try:
        declared = importlib.metadata.requires("elastic-kfac") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    extra = extra_of(module, declared)
    if extra is None:
        return None
    return UsageError(
        f"this needs {_DISTRIBUTIONS.get(module, module)}, which is not installed",
        change=f"pip install 'elastic-kfac[{extra}]'",
    )


def extra_of(module: str, declared: Sequence[str]) -> str | None:
    """The smallest extra that declares the distribution of a top-level module."""
    wanted = _DISTRIBUTIONS.get(module, module).lower()
    names = [(re.match(r"[\w.-]*", text), text) for text in declared]
    found = {marked_extra(text) for name, text in names if name and name[0].lower() == wanted}
    return next((extra for extra in EXTRAS if extra in found), None)


def marked_extra(requirement: str) -> str:
    """The extra that a requirement of the installed metadata belongs to, or an empty string."""
    marker = re.search(r"extra == ['\"]([\w-]+)['\"]", requirement)
    return marker[1] if marker else ""
