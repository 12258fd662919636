"""What a shard set holds: its columns, their Arrow types, and the values of a sample in each.

| kind | in a shard | as a source gives it (n samples) | in a batch |
|---|---|---|---|
| `image` | bytes, or uint8 of one shape | bytes, or uint8 [n, C·H·W] | uint8 [n, C, H, W] |
| `tensor` | bytes of one dtype and shape | [n, *shape] | [n, *shape] |
| `tokens` | a list of int32 | n arrays of integers | int64 [n, longest], padded |
| `class` | int32 | int64 [n] | int64 [n] |
| `mask` | bytes (PNG), or uint8 [H, W] | bytes, or uint8 [n, H·W] | int64 [n, H, W] |
| `boxes` | a list of float32, 5 per box | n arrays [m, 5] | float32 [n, most, 5], padded |

A box is (left, top, right, bottom, class) in pixels; padded boxes have class -1. The mask value 255 marks
pixels without a class.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Final, Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from elastic_kfac.errors import ConfigError, DataError

Kind = Literal["image", "tensor", "tokens", "class", "mask", "boxes"]
Role = Literal["input", "target"]
KINDS: Final = ("image", "tensor", "tokens", "class", "mask", "boxes")
KEY: Final = "key"
"""Name of the column with the origin of each sample."""
IGNORED: Final = 255
"""Value of a mask where a pixel has no class."""
BOX: Final = 5
PADDING_CLASS: Final = -1


@dataclass(frozen=True)
class Column:
    """One column of a shard set; measured values are of the whole split."""

    name: str
    kind: Kind
    role: Role
    encoding: Literal["raw", "encoded"] = "raw"
    """`encoded` images and masks are files' bytes; `raw` ones are pixels of one shape."""
    dtype: str = ""
    """Of a tensor, as numpy names it."""
    shape: tuple[int, ...] | None = None
    """Of a sample: (C, H, W), (H, W) or a tensor's; None where samples differ."""
    class_names: tuple[str, ...] = ()
    class_counts: tuple[int, ...] = ()
    """Samples, pixels or boxes of each class."""
    vocabulary: int = 0
    """Tokens are numbers below this."""
    shortest: int = 0
    """Fewest tokens or boxes in a sample."""
    longest: int = 0
    """Most tokens or boxes in a sample."""
    bytes_per_token: float = 1.0
    """Mean length of a token's text in UTF-8."""
    smallest: tuple[int, int] = (0, 0)
    """Smallest height and width of an image or mask."""
    largest: tuple[int, int] = (0, 0)
    mean: tuple[float, ...] = ()
    """Per channel of pixels scaled to 0..1, or per feature of floating-point tensors (one number for
    all elements of tensors with more than one dimension)."""
    std: tuple[float, ...] = ()

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def is_padded(self) -> bool:
        """Whether samples have different numbers of tokens."""
        return self.kind == "tokens" and self.shortest < self.longest

    @property
    def is_float(self) -> bool:
        return self.kind == "tensor" and np.dtype(self.dtype).kind == "f"

    @property
    def arrow_type(self) -> pa.DataType:
        """Type of the column in a shard."""
        if self.kind == "class":
            return pa.int32()
        if self.kind == "tokens":
            return pa.list_(pa.field("element", pa.int32(), nullable=False))
        if self.kind == "boxes":
            return pa.list_(pa.field("element", pa.float32(), nullable=False))
        if self.encoding == "encoded":
            return pa.binary()
        assert self.shape is not None
        return pa.binary(math.prod(self.shape) * self.item_size)

    @property
    def item_size(self) -> int:
        """Bytes of an element."""
        return np.dtype(self.dtype).itemsize if self.kind == "tensor" else 1

    def to_json(self) -> dict[str, Any]:
        """Fields that differ from their defaults."""
        values = asdict(self)
        defaults = {each.name: each.default for each in fields(self)}
        return {
            name: value
            for name, value in values.items()
            if defaults[name] is MISSING or value != defaults[name]
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Column:
        """The inverse of `to_json`.

        Raises:
            ValueError: If the kind is unknown to this release.
        """
        if values.get("kind") not in KINDS or values.get("role") not in ("input", "target"):
            raise ValueError(f"column {values.get('name')} is of an unknown kind or role")
        known: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in values.items()
        }
        return cls(**known)

    def arrow(self, values: Any, rows: Sequence[int]) -> pa.Array:
        """The chosen rows of a source's values as an Arrow array."""
        kind = self.arrow_type
        if self.kind == "class":
            return pa.array(np.asarray(values)[list(rows)].astype(np.int32), type=kind)
        if self.kind in ("tokens", "boxes"):
            item = np.int32 if self.kind == "tokens" else np.float32
            parts = [np.asarray(values[row], dtype=item).reshape(-1) for row in rows]
            offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])])
            flat = np.concatenate([np.zeros(0, item), *parts])
            return pa.ListArray.from_arrays(
                pa.array(offsets.astype(np.int32)), pa.array(flat), type=kind
            )
        if self.encoding == "encoded":
            return pa.array([values[row] for row in rows], type=kind)
        dtype = self.dtype if self.kind == "tensor" else "uint8"
        chosen = np.ascontiguousarray(np.asarray(values, dtype=dtype)[list(rows)])
        return pa.FixedSizeBinaryArray.from_buffers(
            kind, len(chosen), [None, pa.py_buffer(chosen.reshape(-1).view(np.uint8))]
        )

    def check(self, values: Any, where: str, first: int) -> None:
        """Refuses values that the column cannot hold.

        Raises:
            DataError: It names the record; `first` is the number of the first one.
        """
        if self.kind == "class":
            check_class_labels(np.asarray(values), self.num_classes, where, first=first)
        elif self.kind == "tokens":
            for row, tokens in enumerate(values):
                check_tokens(np.asarray(tokens), self, where, first + row)
        elif self.kind == "boxes":
            for row, boxes in enumerate(values):
                check_boxes(np.asarray(boxes, dtype=np.float32), self, where, first + row)
        elif self.is_float:
            finite = np.isfinite(np.asarray(values, dtype=np.float64))
            bad = np.flatnonzero(~finite.reshape(len(finite), -1).all(axis=1))
            if len(bad):
                raise DataError(
                    f"column {self.name} has a value that is not finite in {where}",
                    given=f"record {first + int(bad[0])}",
                    change="repair or leave out that record",
                )


def image_columns(
    raw_shape: tuple[int, int, int] | None, class_names: Sequence[str]
) -> tuple[Column, ...]:
    """An image and its class, the columns of image classification."""
    encoding: Literal["raw", "encoded"] = "raw" if raw_shape else "encoded"
    return (
        Column("image", "image", "input", encoding=encoding, shape=raw_shape),
        Column("label", "class", "target", class_names=tuple(class_names)),
    )


def shard_schema(columns: Sequence[Column]) -> pa.Schema:
    """Columns of a shard file; the last one is the origin of the sample."""
    found = [pa.field(column.name, column.arrow_type, nullable=False) for column in columns]
    return pa.schema([*found, pa.field(KEY, pa.string(), nullable=False)])


def check_one_tensor(columns: Sequence[Column], key: str, *, image: bool = False) -> None:
    """Refuses a setting that changes inputs where they are no single tensor of numbers.

    Raises:
        ConfigError: It names the inputs.
    """
    inputs = [column for column in columns if column.role == "input"]
    allowed = ("image",) if image else ("image", "tensor")
    if len(inputs) != 1 or inputs[0].kind not in allowed:
        raise ConfigError(
            f"{key} needs one input, {'an image' if image else 'an image or a tensor'}",
            given=", ".join(f"{column.name} ({column.kind})" for column in inputs),
            change=f"leave {key} out",
        )


def check_columns(columns: Sequence[Column], where: str) -> None:
    """Refuses columns that no sample can have.

    Raises:
        DataError: If names repeat, there is no input, or two classes have one name.
    """
    names = [column.name for column in columns]
    if len({*names, KEY}) <= len(names):
        raise DataError("two columns have one name", given=f"{', '.join(names)} in {where}")
    if not any(column.role == "input" for column in columns):
        raise DataError("a sample needs at least one input", given=where)
    for column in columns:
        if len(set(column.class_names)) < column.num_classes:
            raise DataError("two classes have one name", given=where)


def check_class_labels(
    labels: NDArray[np.integer], num_classes: int, where: str, *, first: int = 0
) -> None:
    """Raises for the first label outside [0, num_classes).

    Raises:
        DataError: It names the record; `first` is the number of the first label's record.
    """
    bad = np.flatnonzero((labels < 0) | (labels >= num_classes))
    if len(bad):
        raise DataError(
            f"label out of range in {where}, record {first + int(bad[0])}",
            given=int(labels[bad[0]]),
            allowed=f"0 to {num_classes - 1}",
        )


def check_tokens(tokens: NDArray[np.integer], column: Column, where: str, record: int) -> None:
    """Raises a DataError for an empty sequence or a token outside the vocabulary."""
    if not len(tokens):
        raise DataError(f"a sequence without tokens in {where}", given=f"record {record}")
    if tokens.min() < 0 or tokens.max() >= column.vocabulary:
        worst = tokens.min() if tokens.min() < 0 else tokens.max()
        raise DataError(
            f"token out of range in {where}, record {record}",
            given=int(worst),
            allowed=f"0 to {column.vocabulary - 1}",
        )


def check_boxes(boxes: NDArray[np.floating], column: Column, where: str, record: int) -> None:
    """Raises a DataError for a box without area or with an unknown class."""
    if boxes.size == 0:
        return
    if boxes.ndim != 2 or boxes.shape[1] != BOX or not np.isfinite(boxes).all():
        raise DataError(
            f"bad boxes in {where}, record {record}", given=boxes.shape, allowed=f"[m, {BOX}]"
        )
    if ((boxes[:, 2] <= boxes[:, 0]) | (boxes[:, 3] <= boxes[:, 1])).any():
        raise DataError(f"a box without area in {where}", given=f"record {record}")
    check_class_labels(boxes[:, 4].astype(np.int64), column.num_classes, where, first=record)
