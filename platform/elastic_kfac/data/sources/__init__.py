"""Sources of shards (`digits`, `parquet:PATH`, `torchvision:NAME`, …), one module per kind."""

from __future__ import annotations

from elastic_kfac.data.sources.generated import clusters10, digits
from elastic_kfac.data.sources.ilsvrc import ilsvrc
from elastic_kfac.data.sources.image_files import TORCHVISION_ROOT, image_folder, torchvision_data
from elastic_kfac.data.sources.parquet import parquet
from elastic_kfac.data.sources.source import ColumnSplit, Records, Source, SourceSplit
from elastic_kfac.errors import DataError
from elastic_kfac.paths import user_path

__all__ = ["ColumnSplit", "Records", "Source", "SourceSplit", "absolute_source", "open_source"]

KNOWN_SOURCES = (
    "digits, clusters10[:SEED], parquet:PATH, imagefolder:PATH, ilsvrc:DIR, torchvision:NAME[:ROOT]"
)


def open_source(text: str, *, split: str | None = None) -> Source:
    """Parses `--source`.

    Args:
        text: `digits`, `clusters10` or `kind:rest`.
        split: Name of the split where the files do not name it (`train` if None).

    Raises:
        DataError: If the kind is unknown or its files are missing.
    """
    try:
        return _open(text, split)
    except OSError as error:
        raise DataError("cannot read the source", given=text, change=str(error)) from None


def _open(text: str, split: str | None) -> Source:
    kind, _, rest = text.partition(":")
    if kind == "digits" and not rest:
        return digits()
    if kind == "clusters10":
        return clusters10(rest)
    if kind == "torchvision" and rest:
        return torchvision_data(rest)
    if kind == "parquet" and rest:
        return parquet(user_path(rest), split)
    if kind == "imagefolder" and rest:
        return image_folder(user_path(rest), split)
    if kind == "ilsvrc" and rest:
        return ilsvrc(user_path(rest))
    raise DataError("unknown data source", given=text, allowed=KNOWN_SOURCES)


def absolute_source(text: str) -> str:
    """`--source` with an absolute path, for processes with another working directory."""
    kind, _, rest = text.partition(":")
    if kind in ("parquet", "imagefolder", "ilsvrc") and rest:
        return f"{kind}:{user_path(rest).absolute()}"
    if kind == "torchvision":
        name, _, folder = rest.partition(":")
        return f"{kind}:{name}:{user_path(folder or TORCHVISION_ROOT).absolute()}"
    return text
