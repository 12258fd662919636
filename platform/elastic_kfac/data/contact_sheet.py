"""A picture of the samples of a shard set."""

from __future__ import annotations

import colorsys
import tempfile
import textwrap
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from elastic_kfac.data.cache import OpenShard, ShardCache
from elastic_kfac.data.columns import BOX, IGNORED, Column
from elastic_kfac.data.decode import (
    MAX_PIXELS,
    UndecodableImage,
    decode_mask,
    decode_rgb,
    resize_box,
    resize_mask,
)
from elastic_kfac.data.manifest import ShardSet
from elastic_kfac.data.order import SOURCE_SHUFFLE, permutation, stream_key
from elastic_kfac.data.storage import join_uri
from elastic_kfac.errors import DataError

_MOST_CLASSES: Final = 32
"""Rows of a contact sheet."""
_GAP: Final = 2
_ROWS: Final = 6
_LINE: Final = 16
_PAPER: Final = (238, 238, 238)
"""Characters in a line of text."""


def contact_sheet(
    shard_set: ShardSet,
    target: str | Path,
    *,
    per_class: int = 10,
    cell: int = 48,
    max_pixels: int = MAX_PIXELS,
) -> int:
    """Writes a PNG of samples: a row of `per_class` for each of the first classes where samples have an
    image and a class; otherwise six rows of samples, with masks and boxes on their images, tokens as text
    and tensors as shades.

    The samples come from as few shards as possible and are the same every time.

    Args:
        shard_set: One split.
        target: The PNG to write.
        per_class: Samples per row.
        cell: Height and width of a sample, pixels.
        max_pixels: Bound on the pixels of one image.

    Returns:
        The number of samples on the sheet.

    Raises:
        DataError: If a shard is missing or corrupt.
    """
    of_class = shard_set.column("class")
    if shard_set.image is None or of_class is None:
        return _sheet_of_tiles(shard_set, target, per_class, max(cell, 96), max_pixels)
    classes = min(of_class.num_classes, _MOST_CLASSES)
    wanted = np.minimum(np.array(of_class.class_counts[:classes]), per_class)
    placed = np.zeros(classes, dtype=np.int64)
    side = cell + _GAP
    sheet = np.full((classes * side + _GAP, per_class * side + _GAP, 3), 255, dtype=np.uint8)
    with tempfile.TemporaryDirectory(prefix="contact-sheet-") as folder:
        cache = ShardCache(folder, 1 << 50)
        for index in range(len(shard_set.shards)):
            if (placed >= wanted).all():
                break
            shard = cache.open(shard_set, index)
            labels = shard.values[of_class.name]
            key = stream_key(SOURCE_SHUFFLE, index)
            for row in permutation(key, np.arange(shard.num_rows, dtype=np.int64)).tolist():
                label = int(labels[row])
                if label >= classes or placed[label] >= wanted[label]:
                    continue
                top, left = _GAP + label * side, _GAP + int(placed[label]) * side
                image = resize_box(_pixels(shard_set, shard, row, max_pixels), (cell, cell))
                sheet[top : top + cell, left : left + cell] = image
                placed[label] += 1
        cache.close()
    Image.fromarray(sheet).save(target, "PNG")
    return int(placed.sum())


def _sheet_of_tiles(
    shard_set: ShardSet, target: str | Path, across: int, cell: int, max_pixels: int
) -> int:
    side = cell + _GAP
    every = -(-shard_set.num_samples // (_ROWS * across))
    chosen = range(0, shard_set.num_samples, every)
    rows = -(-len(chosen) // across)
    sheet = Image.new("RGB", (across * side + _GAP, rows * side + _GAP), "white")
    with tempfile.TemporaryDirectory(prefix="contact-sheet-") as folder:
        cache = ShardCache(folder, 1 << 50)
        for place, sample in enumerate(chosen):
            shards, found = shard_set.locate(np.array([sample]))
            shard = cache.open(shard_set, int(shards[0]))
            tile = _tile(shard_set, shard, int(found[0]), cell, max_pixels)
            top, left = divmod(place, across)
            sheet.paste(tile, (_GAP + left * side, _GAP + top * side))
        cache.close()
    sheet.save(target, "PNG")
    return len(chosen)


def _tile(
    shard_set: ShardSet, shard: OpenShard, row: int, cell: int, max_pixels: int
) -> Image.Image:
    """One sample, [cell, cell] pixels."""
    tile = Image.new("RGB", (cell, cell), "white")
    if shard_set.image is not None:
        pixels = _pixels(shard_set, shard, row, max_pixels)
        height, width = pixels.shape[:2]
        tile = Image.fromarray(resize_box(pixels, (cell, cell)))
        for column in shard_set.columns:
            if column.kind == "mask":
                tile = _with_mask(tile, _mask(column, shard, row, max_pixels))
            elif column.kind == "boxes":
                draw = ImageDraw.Draw(tile)
                for box in shard.item(column.name, row).reshape(-1, BOX).tolist():
                    edges = [box[0] / width, box[1] / height, box[2] / width, box[3] / height]
                    draw.rectangle([edge * cell for edge in edges], outline=_colour(int(box[4])))
        return tile
    tile.paste(_PAPER, (0, 0, cell, cell))  # Texts that stand side by side read as one otherwise.
    lines: list[str] = []
    for column in shard_set.columns:
        if column.kind == "tokens":
            lines += textwrap.wrap(_text(column, shard.item(column.name, row)), _LINE)
        elif column.kind == "class":
            lines.append(f"= {column.class_names[int(shard.values[column.name][row])]}"[:_LINE])
        elif column.kind == "tensor":
            values = shard.values[column.name][row]
            if values.ndim >= 2:
                return _shades(values, cell)
            some = " ".join(f"{value:.3g}" for value in values.reshape(-1)[:24].tolist())
            lines += textwrap.wrap(f"{column.name}: {some}", _LINE)
    ImageDraw.Draw(tile).multiline_text(
        (2, 1), "\n".join(lines[: cell // 11]), fill="black", spacing=0
    )
    return tile


def _text(column: Column, tokens: NDArray[np.int32]) -> str:
    """Bytes and ASCII as they read; the numbers of other tokens."""
    if column.vocabulary in (128, 256):
        shown = bytes(tokens[:120].astype(np.uint8)).decode("utf-8", errors="replace")
        return "".join(c if c.isprintable() and ord(c) < 256 else "." for c in shown)
    return " ".join(map(str, tokens[:40].tolist()))


def _mask(column: Column, shard: OpenShard, row: int, max_pixels: int) -> NDArray[np.uint8]:
    if column.encoding == "encoded":
        return decode_mask(shard.item(column.name, row), max_pixels=max_pixels)
    assert column.shape is not None
    stored: NDArray[np.uint8] = shard.values[column.name][row].reshape(column.shape)
    return stored


def _with_mask(tile: Image.Image, mask: NDArray[np.uint8]) -> Image.Image:
    """An image with its classes in colour; class 0 and pixels without a class are left as they are."""
    resized = resize_mask(mask, (tile.height, tile.width))
    colours = np.array([_colour(number) for number in range(IGNORED + 1)], dtype=np.uint8)
    pixels = np.asarray(tile).copy()
    chosen = (resized != 0) & (resized != IGNORED)
    pixels[chosen] = pixels[chosen] // 2 + colours[resized[chosen]] // 2
    return Image.fromarray(pixels)


def _colour(number: int) -> tuple[int, int, int]:
    """A bright colour of a class; hues a golden section apart are far from those of their neighbours."""
    red, green, blue = colorsys.hsv_to_rgb(number * 0.618034 % 1, 0.8, 1.0)
    return round(255 * red), round(255 * green), round(255 * blue)


def _shades(values: NDArray[np.generic], cell: int) -> Image.Image:
    """The first two-dimensional slice of a tensor in grey."""
    plane = np.asarray(values, dtype=np.float64).reshape(-1, *values.shape[-2:])[0]
    low, high = float(plane.min()), float(plane.max())
    grey = ((plane - low) / ((high - low) or 1.0) * 255).astype(np.uint8)
    return Image.fromarray(grey).convert("RGB").resize((cell, cell), Image.Resampling.NEAREST)


def _pixels(shard_set: ShardSet, shard: OpenShard, row: int, max_pixels: int) -> NDArray[np.uint8]:
    """RGB, [height, width, 3]; other channel counts show their first channel as grey."""
    image = shard_set.image
    assert image is not None
    if image.encoding == "encoded":
        try:
            return decode_rgb(shard.item(image.name, row), max_pixels=max_pixels)
        except UndecodableImage as error:
            where = f"{join_uri(shard_set.uri, shard_set.split)}, {shard.key(row)}"
            raise DataError("undecodable image", given=where, change=str(error)) from None
    assert image.shape is not None
    planes = shard.values[image.name][row].reshape(image.shape)
    rgb = planes if len(planes) == 3 else planes[:1].repeat(3, axis=0)
    return np.ascontiguousarray(rgb.transpose(1, 2, 0))
