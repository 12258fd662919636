"""The rest of a `--source` after its kind: `PATH?key=value&key=value`, and the files of each split."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qsl

import numpy as np
from numpy.typing import NDArray

from elastic_kfac.data.sources.source import is_hidden
from elastic_kfac.errors import DataError
from elastic_kfac.paths import user_path

WORDS: Final = ("train", "test", "val", "valid", "validation")
HELD_OUT: Final = 0.1
"""Share of the samples that become the test split of a source that has none."""


class Options:
    """The options of a source, each asked for by name and type."""

    def __init__(self, kind: str, rest: str, known: Collection[str]) -> None:
        self.kind = kind
        self.path, _, query = rest.partition("?")
        given = parse_qsl(query, keep_blank_values=True)
        self._values = dict(given)
        if len(given) > len(self._values):
            twice = next(key for key in self._values if [k for k, _ in given].count(key) > 1)
            raise DataError(
                f"an option of a source {kind}: is given twice",
                given=twice,
                change=f"write it once: {twice}=A,B if it takes several names",
            )
        unknown = sorted(set(self._values) - {*known, "test"})
        if unknown or not self.path:
            raise DataError(
                f"bad options of a source {kind}:",
                given=", ".join(unknown) or "no path",
                allowed=f"{kind}:PATH?key=value&… with the keys {', '.join([*known, 'test'])}",
            )

    def text(self, key: str, default: str | None = None) -> str | None:
        return self._values.get(key, default)

    def names(self, key: str) -> list[str]:
        """Names separated by commas."""
        return [name for name in self._values.get(key, "").split(",") if name]

    def number(self, key: str, default: int, least: int) -> int:
        """A whole number of at least `least`."""
        value = self._values.get(key, str(default))
        if not value.isdecimal() or int(value) < least:
            raise DataError(
                f"bad option {key} of a source {self.kind}:",
                given=value,
                allowed=f"{least} or more",
            )
        return int(value)

    @property
    def held_out(self) -> float:
        """Share of the samples of a set with one split that are its test split."""
        value = self._values.get("test", str(HELD_OUT))
        try:
            share = float(value)
        except ValueError:
            share = -1.0
        if not 0 <= share < 1:
            raise DataError(
                f"bad option test of a source {self.kind}:", given=value, allowed="0 to below 1"
            )
        return share

    @property
    def name(self) -> str:
        """Of the source, without the folders of the path."""
        shown = "&".join(f"{key}={Path(value).name}" for key, value in self._values.items())
        return f"{self.kind}:{Path(self.path).name}{'?' if shown else ''}{shown}"


def absolute(rest: str) -> str:
    """The rest of a source with an absolute path, also that of a tokenizer's file."""
    path, mark, query = rest.partition("?")
    found = re.search(r"(?:^|&)tokenizer=([^&]*)", query)
    if found and found[1] not in ("bytes", "characters"):
        query = query.replace(found[1], str(user_path(found[1]).absolute()))
    return f"{user_path(path).absolute()}{mark}{query}"


def files_by_split(path: Path, suffixes: Sequence[str], split: str | None) -> dict[str, list[Path]]:
    """Files below a path by split, as their names (`train.txt`, `set_test.parquet`) or the names of
    their folders have it; files that name no split are `split`, or `train`.

    Raises:
        DataError: If there are none.
    """
    if path.is_file():
        return {split or _word(path.stem) or "train": [path]}
    found: dict[str, list[Path]] = {}
    files = sorted(
        file
        for file in path.rglob("*")
        if file.suffix.lower() in suffixes and file.is_file()
        if not any(is_hidden(part) for part in file.relative_to(path).parts)
    )
    for file in files:
        parents = [part for part in file.relative_to(path).parts[:-1] if part in WORDS]
        name = parents[0] if parents else _word(file.stem)
        found.setdefault(name or split or "train", []).append(file)
    if not found:
        raise DataError(
            "no files for this source",
            given=str(path),
            allowed=f"a file or a folder with *{', *'.join(suffixes)}",
        )
    return found


def _word(stem: str) -> str | None:
    last = re.split(r"[_.-]", stem)[-1]
    return last if last in WORDS else None


def parts(splits: Collection[str], held_out: float) -> dict[str, tuple[str, float, float]]:
    """Split to make -> (split of the source, begin, end as shares of its samples): a set that is all
    training data gives away its end."""
    if list(splits) == ["train"] and held_out > 0:
        return {"train": ("train", 0.0, 1 - held_out), "test": ("train", 1 - held_out, 1.0)}
    return {name: (name, 0.0, 1.0) for name in splits}


def share_of(count: int, begin: float, end: float) -> NDArray[np.int64]:
    """Indices of a part of `count` samples.

    Raises:
        DataError: If there are samples, but too few for this part to have any.
    """
    chosen = np.arange(round(begin * count), round(end * count), dtype=np.int64)
    if count and not len(chosen):
        raise DataError(
            "too few samples to give a part of them to the split test",
            given=f"{count} {'sample' if count == 1 else 'samples'}",
            change="set the option test=SHARE higher, or test=0 for no split test",
        )
    return chosen


def content_hash(files: Sequence[Path], extra: Any = "") -> str:
    """sha256 of the bytes of files and of what else decides the samples."""
    digest = hashlib.sha256(repr(extra).encode())
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def openers(splits: Mapping[str, Any], held_out: float, make: Any) -> dict[str, Any]:
    """The openers of a `Source`: `make(split, begin, end)`."""
    return {name: partial(make, *where) for name, where in parts(splits, held_out).items()}
