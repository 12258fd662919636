"""Text as token sequences: blocks of one length for language models, or one sequence per row or line."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from elastic_kfac.data.columns import Column
from elastic_kfac.data.sources.options import (
    Options,
    content_hash,
    files_by_split,
    openers,
    share_of,
)
from elastic_kfac.data.sources.source import ColumnSplit, Source, fixed_shuffle
from elastic_kfac.errors import DataError
from elastic_kfac.paths import user_path

TOKENS = "tokens"
LENGTH = 128
SUFFIXES = (".txt", ".md", ".parquet")
Tokenize = Callable[[str], NDArray[np.int32]]


def text(rest: str, split: str | None) -> Source:
    """`PATH?tokenizer=bytes|characters|FILE&length=128`, or `…&column=text[&label=NAME]`.

    Files of text, or the column `text` of Parquet files. Without `label` and `lines` all texts of a split
    are joined, and cut into blocks of `length` tokens; with `label` each row is a sequence with a class,
    with `lines=1` each line or row is a sequence, both of at most `length` tokens.

    Raises:
        DataError: If there are no files, or a column is missing.
    """
    options = Options("text", rest, ("tokenizer", "length", "column", "label", "lines"))
    splits = files_by_split(user_path(options.path), SUFFIXES, split)
    column, label = options.text("column"), options.text("label")
    if column and not any(f.suffix == ".parquet" for part in splits.values() for f in part):
        raise DataError("only Parquet files have a column of text", given=f"column={column}")
    if label is not None and label == (column or "text"):
        raise DataError("the column of text is no label", given=label, change="name another column")
    return Source(
        options.name,
        openers(splits, options.held_out, lambda *where: _split(splits, options, *where)),
    )


def token_blocks(
    texts: Sequence[str], tokenizer: str, length: int, alphabet_of: Sequence[str] = ()
) -> tuple[NDArray[np.int32], Column]:
    """Texts, joined, in blocks of `length` tokens [n, length], and their column."""
    tokenize, vocabulary = tokenizer_of(tokenizer, alphabet_of or texts)
    parts = [tokenize(text) for text in texts]
    tokens = np.concatenate([*parts, np.zeros(0, np.int32)])
    if len(tokens) < length:
        raise DataError(
            "the text is shorter than one block",
            given=f"{len(tokens)} tokens",
            allowed=f"{length} or more",
            change="lower length, or give more text",
        )
    size = sum(len(text.encode()) for text in texts)
    column = Column(
        TOKENS,
        "tokens",
        "input",
        vocabulary=vocabulary,
        bytes_per_token=round(size / len(tokens), 6),
    )
    return tokens[: len(tokens) // length * length].reshape(-1, length), column


def tokenizer_of(name: str, texts: Sequence[str]) -> tuple[Tokenize, int]:
    """How to cut text into tokens, and the number of different ones.

    Args:
        name: `bytes`, `characters`, or a file of the package `tokenizers`.
        texts: Where `characters` takes its alphabet from.
    """
    if name == "bytes":
        return lambda text: np.frombuffer(text.encode(), np.uint8).astype(np.int32), 256
    if name == "characters":
        alphabet = sorted(set().union(*texts))
        places = {character: place for place, character in enumerate(alphabet)}
        return (
            lambda text: np.fromiter((places[c] for c in text), np.int32, count=len(text)),
            len(alphabet),
        )
    try:
        from tokenizers import Tokenizer  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise DataError(
            "a tokenizer's file needs the package tokenizers",
            given=name,
            change="install elastic-kfac[text], or write tokenizer=bytes",
        ) from None
    try:
        loaded = Tokenizer.from_file(str(user_path(name)))
    except Exception as error:  # The package raises plain exceptions.
        raise DataError(
            "not a tokenizer's file",
            given=name,
            allowed="bytes, characters, or a file of the package tokenizers",
            change=str(error),
        ) from None
    return (
        lambda text: np.asarray(loaded.encode(text).ids, dtype=np.int32),
        int(loaded.get_vocab_size()),
    )


def _split(
    splits: dict[str, list[Path]], options: Options, name: str, begin: float, end: float
) -> ColumnSplit:
    files = tuple(splits[name])
    everything = tuple(file for part in splits.values() for file in part)
    column, label = options.text("column", "text") or "text", options.text("label")
    tokenizer = options.text("tokenizer", "bytes") or "bytes"
    length = options.number("length", LENGTH, 2)
    alphabet = _texts(everything, column) if tokenizer == "characters" else ()
    mark = content_hash(everything, (options.name, begin, end))
    if label is None and not options.number("lines", 0, 0):
        blocks, described = token_blocks(_texts(files, column), tokenizer, length, alphabet)
        # Whole ranges, so that no block of the test split lies between two of the training split.
        chosen = share_of(len(blocks), begin, end)
        return ColumnSplit(
            columns=(described,),
            load=lambda places: {TOKENS: list(blocks[places])},
            key=lambda index: f"{name}/{index}",
            order=chosen[fixed_shuffle(len(chosen))],
            bytes_per_sample=4.0 * length,
            fingerprint=mark,
        )
    texts = [line for text in _texts(files, column) for line in _lines(text, label)]
    labels = _labels(files, label) if label is not None else None
    kept = [place for place, line in enumerate(texts) if line]
    tokenize, vocabulary = tokenizer_of(tokenizer, alphabet)
    sample = texts[:: max(1, len(texts) // 1000)]
    lengths = [len(tokenize(line)) for line in sample]
    tokens_seen = sum(lengths)
    if cut := sum(count > length for count in lengths):
        warnings.warn(
            f"{options.name}: {max(1, round(100 * cut / len(sample)))} % of the sequences of {name} are "
            f"cut at {length} tokens; the longest of a sample has {max(lengths)} (option length)",
            stacklevel=3,
        )
    columns = [
        Column(
            TOKENS,
            "tokens",
            "input",
            vocabulary=vocabulary,
            bytes_per_token=round(sum(len(s.encode()) for s in sample) / max(tokens_seen, 1), 6),
        )
    ]
    places: dict[str, int] = {}
    if labels is not None and label is not None:
        known = sorted({str(each) for part in splits.values() for each in _labels(part, label)})
        places = {value: place for place, value in enumerate(known)}
        columns.append(Column(label, "class", "target", class_names=tuple(known)))

    def load(chosen: NDArray[np.int64]) -> dict[str, Any]:
        found: dict[str, Any] = {TOKENS: [tokenize(texts[i])[:length] for i in chosen.tolist()]}
        if labels is not None and label is not None:
            found[label] = np.array([places[str(labels[i])] for i in chosen.tolist()])
        return found

    shuffled = np.asarray(kept, dtype=np.int64)[fixed_shuffle(len(kept))]
    return ColumnSplit(
        columns=tuple(columns),
        load=load,
        key=lambda index: f"{name}/{index}",
        order=shuffled[share_of(len(kept), begin, end)],
        bytes_per_sample=4.0 * max(1.0, tokens_seen / max(len(sample), 1)),
        fingerprint=mark,
    )


def _lines(text: str, label: str | None) -> list[str]:
    """A row with a class is one sequence; other text is cut at its lines."""
    return [text] if label is not None else text.splitlines()


@lru_cache(maxsize=4)
def _texts(files: tuple[Path, ...], column: str) -> tuple[str, ...]:
    """The texts of files: whole files, or rows of Parquet files."""
    found: list[str] = []
    for file in files:
        if file.suffix == ".parquet":
            values = _column(file, column)
            odd = next((value for value in values if not isinstance(value, str | None)), None)
            if odd is not None:
                raise DataError(
                    f"column {column} of {file.name} is no text",
                    given=f"a value of type {type(odd).__name__}",
                    change="name another: ?column=NAME",
                )
            found += [value or "" for value in values]
        else:
            try:
                found.append(file.read_text(encoding="utf-8"))
            except UnicodeDecodeError as error:
                raise DataError("a text is not UTF-8", given=str(file), change=str(error)) from None
    return tuple(found)


def _labels(files: Sequence[Path], label: str) -> list[Any]:
    wrong = [file.name for file in files if file.suffix != ".parquet"]
    if wrong:
        raise DataError("only rows of Parquet files have a label", given=wrong[0])
    found = []
    for file in files:
        values = _column(file, label)
        if missing := values.count(None):
            raise DataError(
                "a label of a text is missing",
                given=f"{label} in {file.name}: {missing} of {len(values)} rows",
                change="fill them in, or leave the rows out",
            )
        found += values
    return found


def _column(file: Path, name: str) -> list[Any]:
    try:
        with pq.ParquetFile(file) as opened:
            if name not in opened.schema_arrow.names:
                raise DataError(
                    f"no column {name} in {file.name}",
                    given=name,
                    allowed=", ".join(opened.schema_arrow.names),
                    change="name it: ?column=NAME or &label=NAME",
                )
            return opened.read(columns=[name]).column(name).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise DataError("not a readable Parquet file", given=str(file), change=str(error)) from None
