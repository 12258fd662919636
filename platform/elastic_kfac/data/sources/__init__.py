"""Sources of shards (`digits`, `parquet:PATH`, `torchvision:NAME`, …), one module per kind."""

from __future__ import annotations

import difflib
from pathlib import Path

from elastic_kfac.data.sources.embedded import digit_scenes, sklearn_table, stdlib_text
from elastic_kfac.data.sources.generated import clusters10, digits
from elastic_kfac.data.sources.ilsvrc import ilsvrc
from elastic_kfac.data.sources.image_files import (
    TORCHVISION_ROOT,
    image_folder,
    torchvision_data,
    torchvision_names,
)
from elastic_kfac.data.sources.options import absolute
from elastic_kfac.data.sources.own import own_dataset
from elastic_kfac.data.sources.parquet import parquet
from elastic_kfac.data.sources.scenes import coco, mask_folder
from elastic_kfac.data.sources.source import ColumnSplit, Records, Source, SourceSplit
from elastic_kfac.data.sources.tables import table
from elastic_kfac.data.sources.text import text
from elastic_kfac.errors import DataError
from elastic_kfac.paths import user_path

__all__ = [
    "ColumnSplit",
    "Records",
    "Source",
    "SourceSplit",
    "absolute_source",
    "is_inside",
    "open_source",
]

KNOWN_SOURCES = (
    "digits, clusters10[:SEED], stdlib_text[:LENGTH], digit_scenes:masks|boxes, "
    "sklearn:diabetes|breast_cancer|wine, parquet:PATH, imagefolder:PATH, ilsvrc:DIR, "
    "torchvision:NAME[:ROOT], text:PATH[?OPTIONS], table:PATH?targets=NAME, masks:DIR, coco:PATH, "
    "python:PACKAGE.MODULE:FACTORY"
)


def open_source(named: str, *, split: str | None = None) -> Source:
    """Parses `--source`.

    Args:
        named: `digits`, `clusters10` or `kind:rest`.
        split: Name of the split where the files do not name it (`train` if None).

    Raises:
        DataError: If the kind is unknown or its files are missing.
    """
    try:
        return _open(named, split)
    except OSError as error:
        raise DataError("cannot read the source", given=named, change=str(error)) from None


def _open(named: str, split: str | None) -> Source:
    kind, _, rest = named.partition(":")
    if kind == "digits" and not rest:
        return digits()
    if kind == "clusters10":
        return clusters10(rest)
    if kind == "stdlib_text":
        return stdlib_text(rest)
    if kind == "digit_scenes":
        return digit_scenes(rest)
    if kind == "sklearn":
        return sklearn_table(rest)
    if kind == "torchvision" and rest:
        return torchvision_data(rest)
    if kind == "parquet" and rest:
        return parquet(user_path(rest), split)
    if kind == "imagefolder" and rest:
        return image_folder(user_path(rest), split)
    if kind == "text" and rest:
        return text(rest, split)
    if kind == "table" and rest:
        return table(rest, split)
    if kind == "masks" and rest:
        return mask_folder(rest, split)
    if kind == "coco" and rest:
        return coco(rest, split)
    if kind == "python" and rest:
        return own_dataset(rest, split)
    if kind == "ilsvrc" and rest:
        return ilsvrc(user_path(rest))
    raise DataError(
        "unknown data source", given=named, allowed=KNOWN_SOURCES, change=_suggestion(kind, named)
    )


def _suggestion(kind: str, named: str) -> str | None:
    """The source that was probably meant: a path without its kind, a name without its library."""
    path = user_path(named)
    if path.is_dir():
        return f"did you mean imagefolder:{named}?"
    if path.is_file():
        kinds = {".parquet": "parquet:", ".json": "coco:", ".txt": "text:", ".md": "text:"}
        return f"did you mean {kinds[path.suffix]}{named}?" if path.suffix in kinds else None
    known = [source.partition(":")[0].partition("[")[0] for source in KNOWN_SOURCES.split(", ")]
    names = {name.lower(): name for name in torchvision_names()}
    if kind.lower() in names:
        return f"did you mean torchvision:{names[kind.lower()]}?"
    close = difflib.get_close_matches(kind.lower(), known, n=1, cutoff=0.6)
    return f"did you mean {close[0]}?" if close else None


def is_inside(source: str, folder: str) -> bool:
    """Whether a local folder is an image folder that is a source, or lies below it."""
    kind, _, path = source.partition(":")
    if kind != "imagefolder":
        return False
    return Path(folder).resolve().is_relative_to(Path(path).resolve())


def absolute_source(named: str) -> str:
    """`--source` with an absolute path, for processes with another working directory."""
    kind, _, rest = named.partition(":")
    if kind in ("parquet", "imagefolder", "ilsvrc") and rest:
        return f"{kind}:{user_path(rest).absolute()}"
    if kind in ("text", "table", "masks", "coco") and rest:
        return f"{kind}:{absolute(rest)}"
    if kind == "torchvision":
        name, _, folder = rest.partition(":")
        return f"{kind}:{name}:{user_path(folder or TORCHVISION_ROOT).absolute()}"
    return named
