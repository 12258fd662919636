"""Sample ids to values: gather raw rows or decode images, resize to one size, augment, pad.

Masks and boxes follow the geometry of the set's image: one crop, flip and shift per sample.

Layout: raw shards hold [channels, height, width] per row, the layout of the model's input. Decoded
images are [height, width, 3]; they are stored that way and returned transposed, which torch calls
channels_last.
"""

from __future__ import annotations

import json
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_kfac.data.augment import (
    Shifts,
    augmentation_key,
    center_boxes,
    resized_crop_boxes,
)
from elastic_kfac.data.cache import OpenShard, ShardCache
from elastic_kfac.data.columns import BOX, IGNORED, PADDING_CLASS, Column, check_class_labels
from elastic_kfac.data.decode import (
    MAX_PIXELS,
    Box,
    Scratch,
    UndecodableImage,
    decode_mask,
    decode_rgb,
    image_size,
    resize_box,
    resize_mask,
)
from elastic_kfac.data.manifest import CorruptShard, ShardSet
from elastic_kfac.data.storage import join_uri
from elastic_kfac.errors import DataError

Loaded = tuple[dict[str, NDArray[Any]], NDArray[np.float32]]


@dataclass(frozen=True)
class _Request:
    """The samples to load [n] and their opened shards; a bad record sets its weight to 0."""

    ids: NDArray[np.int64]
    shards: NDArray[np.int64]
    rows: NDArray[np.int64]
    weights: NDArray[np.float32]
    opened: dict[int, OpenShard]
    augment: str
    key: int
    geometry: Geometry

    @property
    def by_shard(self) -> Iterator[tuple[OpenShard, NDArray[np.int64], NDArray[np.int64]]]:
        """Of each shard that is open: itself, the samples in it, and their rows."""
        for shard, opened in self.opened.items():
            members = np.flatnonzero(self.shards == shard)
            yield opened, members, self.rows[members]

    @property
    def by_sample(self) -> Iterator[tuple[int, OpenShard, int]]:
        """Of each sample in an open shard: its place, the shard and its row."""
        for place, (shard, row) in enumerate(
            zip(self.shards.tolist(), self.rows.tolist(), strict=True)
        ):
            if shard in self.opened:
                yield place, self.opened[shard], row


@dataclass
class Geometry:
    """How the image of each of n samples was cut, resized, mirrored and moved; masks and boxes follow."""

    boxes: NDArray[np.float64]
    """(left, top, right, bottom) that were cut out, in pixels of the stored image [n, 4]; 0 where there
    is no image."""
    flips: NDArray[np.bool_]
    size: tuple[int, int]
    """(height, width) as delivered."""
    shifts: Shifts | None = None

    @classmethod
    def of(cls, count: int, size: tuple[int, int]) -> Geometry:
        """Geometry that is filled in while images are loaded."""
        return cls(np.zeros((count, 4)), np.zeros(count, dtype=bool), size)

    def moved(self, place: int, boxes: NDArray[np.float32]) -> NDArray[np.float32]:
        """The boxes [m, 5] of a sample as delivered; those that leave the image are dropped, and so are
        those cut to less than a tenth of their area."""
        left, top, right, bottom = self.boxes[place].tolist()
        height, width = self.size
        scale = np.array([width / (right - left), height / (bottom - top)] * 2, dtype=np.float32)
        edges = (boxes[:, :4] - np.array([left, top] * 2, dtype=np.float32)) * scale
        limits = np.array([width, height] * 2, dtype=np.float32)
        whole = np.prod(edges[:, 2:] - edges[:, :2], axis=1)
        edges = np.clip(edges, 0, limits)
        flips = [bool(self.flips[place])]
        if self.shifts is not None:
            # The window moves, not the image; what was cut off before does not come back.
            edges -= np.array(
                [self.shifts.across[place], self.shifts.down[place]] * 2, dtype=np.float32
            )
            edges = np.clip(edges, 0, limits)
            flips.append(self.shifts.flip[place])
        if sum(flips) == 1:
            edges[:, [0, 2]] = width - edges[:, [2, 0]]
        kept = np.prod(edges[:, 2:] - edges[:, :2], axis=1) > 0.1 * whole
        return np.concatenate([edges, boxes[:, 4:]], axis=1)[kept]


class SampleLoader:
    """Loads samples by id; thread-safe. Options are those of `SampleStream`."""

    def __init__(
        self,
        shard_set: ShardSet,
        cache: ShardCache,
        *,
        seed: int,
        image_size: int | None,
        decode_threads: int,
        bad_records: str,
        max_bad_records: int,
        max_image_pixels: int,
    ) -> None:
        if bad_records not in ("raise", "skip"):
            raise DataError("unknown policy", given=bad_records, allowed="raise, skip")
        if decode_threads < 0:
            raise DataError("decode_threads must not be negative", given=decode_threads)
        self._set = shard_set
        self._cache = cache
        self._seed = seed
        self._max_pixels = max_image_pixels
        self._skip = bad_records == "skip"
        self._scratch = Scratch()
        self._memory = BatchMemory()
        self._quarantine = _Quarantine(shard_set, cache, max_bad_records)
        self._image = shard_set.image
        self.image_shape = (1, 1, 1)
        """(channels, height, width) of the image as delivered."""
        if self._image is not None:
            self.image_shape = _delivered_shape(shard_set, self._image, image_size)
        self._pool = (
            ThreadPoolExecutor(decode_threads, thread_name_prefix="sample-decode")
            if decode_threads > 1 and self._image is not None and self._is_encoded
            else None
        )
        self._pieces = 1 if self._pool is None else 4 * decode_threads

    @property
    def _is_encoded(self) -> bool:
        return self._image is not None and self._image.encoding == "encoded"

    @property
    def quarantined(self) -> int:
        return len(self._quarantine.ids)

    def close(self) -> None:
        """Stops the decode threads."""
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def load(self, ids: NDArray[np.int64], epoch: int, augment: str) -> Loaded:
        """Values by column as `data.columns` describes them, and weights float32 [n].

        Raises:
            DataError: If a record or shard is bad and the policy is `raise`, or the limit is passed.
        """
        shards, rows = self._set.locate(ids)
        weights = np.ones(len(ids), dtype=np.float32)
        opened: dict[int, OpenShard] = {}
        for shard in np.unique(shards).tolist():
            members = np.flatnonzero(shards == shard)
            try:
                opened[shard] = self._cache.open(self._set, shard)
            except CorruptShard as error:
                self._bad(ids[members], weights, members, error)
        key = augmentation_key(self._seed, epoch)
        geometry = Geometry.of(len(ids), self.image_shape[1:])
        request = _Request(ids, shards, rows, weights, opened, augment, key, geometry)
        # The image first: the others follow its geometry.
        ordered = sorted(self._set.columns, key=lambda column: column is not self._image)
        values = {column.name: self._values(column, request) for column in ordered}
        return values, weights

    def _values(self, column: Column, request: _Request) -> NDArray[Any]:
        if column.kind == "image":
            images = self._encoded(request) if self._is_encoded else self._raw(request)
            if request.augment == "crop_flip":
                shifts = Shifts.draw(*self.image_shape[1:], request.key, request.ids)
                request.geometry.shifts = shifts
                images = shifts.apply(images)
            return images
        if column.kind == "mask":
            return self._masks(column, request)
        if column.kind == "boxes":
            found = {
                place: request.geometry.moved(place, shard.item(column.name, row).reshape(-1, BOX))
                for place, shard, row in request.by_sample
                if request.weights[place]
            }
            out = np.zeros((len(request.ids), column.longest, BOX), dtype=np.float32)
            out[:, :, -1] = PADDING_CLASS
            for place, boxes in found.items():
                out[place, : len(boxes)] = boxes
            return out
        if column.kind == "tokens":
            padding = -1 if column.is_padded else 0
            tokens = np.full((len(request.ids), column.longest), padding, dtype=np.int64)
            for place, shard, row in request.by_sample:
                content = shard.item(column.name, row)
                tokens[place, : len(content)] = content
            return tokens
        dtype = np.dtype(np.int64 if column.kind == "class" else column.dtype)
        values = np.zeros((len(request.ids), *(column.shape or ())), dtype=dtype)
        for shard, members, rows in request.by_shard:
            values[members] = shard.values[column.name][rows]
        if column.kind == "class":
            check_class_labels(values, column.num_classes, self._set.uri)
        return values

    def _masks(self, column: Column, request: _Request) -> NDArray[np.int64]:
        geometry = request.geometry
        out = np.full((len(request.ids), 1, *geometry.size), IGNORED, dtype=np.uint8)
        for place, shard, row in request.by_sample:
            if not request.weights[place]:
                continue
            if column.encoding == "encoded":
                try:
                    mask = decode_mask(shard.item(column.name, row), max_pixels=self._max_pixels)
                except UndecodableImage as error:
                    self._bad_image(request, place, f"{shard.key(row)}: {error}")
                    continue
            else:
                assert column.shape is not None
                mask = shard.values[column.name][row].reshape(column.shape)
            box: Box = tuple(geometry.boxes[place].tolist())
            out[place, 0] = resize_mask(mask, geometry.size, box, flip=bool(geometry.flips[place]))
        if geometry.shifts is not None:
            out = geometry.shifts.apply(out, IGNORED)
        return out[:, 0].astype(np.int64)

    def _raw(self, request: _Request) -> NDArray[np.uint8]:
        ids = request.ids
        assert self._image is not None and self._image.shape is not None
        stored, name, geometry = self._image.shape, self._image.name, request.geometry
        out = np.zeros((len(ids), math.prod(stored)), dtype=np.uint8)
        for shard, members, rows in request.by_shard:
            out[members] = shard.values[name][rows]
        pixels = out.reshape(len(ids), *stored)
        if request.augment != "random_resized_crop" and stored == self.image_shape:
            geometry.boxes[:, 2:] = stored[2], stored[1]
            return pixels
        sizes = np.broadcast_to(np.array(stored[1:], dtype=np.int64), (len(ids), 2))
        boxes, flips = self._boxes(sizes, ids, request)
        geometry.boxes[:], geometry.flips[:] = np.reshape(boxes, (-1, 4)), flips
        images = np.empty((len(ids), *self.image_shape), dtype=np.uint8)
        for i in range(len(ids)):
            image = pixels[i].transpose(1, 2, 0)
            resized = resize_box(image, self.image_shape[1:], boxes[i], flip=flips[i])
            images[i] = resized.transpose(2, 0, 1)
        return images

    def _encoded(self, request: _Request) -> NDArray[np.uint8]:
        ids, shards, rows, opened = request.ids, request.shards, request.rows, request.opened
        assert self._image is not None
        name, geometry = self._image.name, request.geometry
        # Not zeroed: clearing a batch first costs a tenth of what decoding it does.
        out = self._memory.take((len(ids), *self.image_shape[1:], 3))

        def decode(members: NDArray[np.int64]) -> list[tuple[int, str]]:
            problems: list[tuple[int, str]] = []
            found: list[tuple[int, memoryview]] = []
            sizes: list[tuple[int, int]] = []
            for i in members.tolist():
                source = opened.get(int(shards[i]))
                if source is None:
                    out[i] = 0
                    continue
                data = source.item(name, int(rows[i]))
                try:
                    sizes.append(image_size(data, self._max_pixels))
                    found.append((i, data))
                except UndecodableImage as error:
                    problems.append((i, f"{source.key(int(rows[i]))}: {error}"))
            chosen = ids[[i for i, _ in found]]
            boxes, flips = self._boxes(np.array(sizes).reshape(-1, 2), chosen, request)
            for (i, data), size, box, flip in zip(found, sizes, boxes, flips, strict=True):
                geometry.boxes[i], geometry.flips[i] = box, flip
                try:
                    decode_into(out[i], data, size, box, flip, self._scratch, self._max_pixels)
                except UndecodableImage as error:
                    problems.append((i, f"{opened[int(shards[i])].key(int(rows[i]))}: {error}"))
            return problems

        for problems in self._spread(decode, np.arange(len(ids))):
            for i, problem in problems:
                out[i] = 0
                self._bad_image(request, i, problem)
        return out.transpose(0, 3, 1, 2)

    def _boxes(
        self, sizes: NDArray[np.int64], ids: NDArray[np.int64], request: _Request
    ) -> tuple[list[Box], list[bool]]:
        """Crop boxes for images of these sizes, and which of them to flip."""
        if request.augment == "random_resized_crop":
            boxes, flips = resized_crop_boxes(sizes, request.key, ids)
            return [tuple(box) for box in boxes.tolist()], flips.tolist()
        if self._image is not None and self._image.shape is None:
            return [tuple(box) for box in center_boxes(sizes).tolist()], [False] * len(sizes)
        return [(0, 0, width, height) for height, width in sizes.tolist()], [False] * len(sizes)

    def _spread(
        self,
        work: Callable[[NDArray[np.int64]], list[tuple[int, str]]],
        members: NDArray[np.int64],
    ) -> list[list[tuple[int, str]]]:
        if self._pool is None:
            return [work(members)]
        pieces = [p for p in np.array_split(members, self._pieces) if len(p)]
        return list(self._pool.map(work, pieces))

    def _bad_image(self, request: _Request, place: int, problem: str) -> None:
        file = self._set.shards[int(request.shards[place])].file
        error = DataError(
            f"undecodable image in {join_uri(self._set.uri, file)}, row {int(request.rows[place])}",
            given=problem,
            change="make the set again without it, or set data.bad_records=skip",
        )
        self._bad(request.ids[place : place + 1], request.weights, np.array([place]), error)

    def _bad(
        self,
        ids: NDArray[np.int64],
        weights: NDArray[np.float32],
        members: NDArray[np.int64],
        error: DataError,
    ) -> None:
        if not self._skip:
            raise error
        weights[members] = 0
        self._quarantine.add(ids, error)


def decode_into(
    out: NDArray[np.uint8],
    data: memoryview,
    size: tuple[int, int],
    box: Box,
    flip: bool,
    scratch: Scratch,
    max_pixels: int = MAX_PIXELS,
) -> None:
    """Decodes a photo of `size` = (height, width), cuts `box` and resizes it into `out`.

    Raises:
        UndecodableImage: As `decode_rgb`.
    """
    height, width = size
    left, top, right, bottom = box
    # The decoder may downscale by the DCT as long as the box keeps enough pixels.
    share = max(out.shape[0] / (bottom - top), out.shape[1] / (right - left))
    at_least = (math.ceil(height * share), math.ceil(width * share)) if share < 1 else None
    into = scratch.of(3 * height * width)
    pixels = decode_rgb(data, at_least=at_least, into=into, max_pixels=max_pixels)
    down, across = pixels.shape[0] / height, pixels.shape[1] / width
    scaled = (left * across, top * down, right * across, bottom * down)
    out[:] = resize_box(pixels, (out.shape[0], out.shape[1]), scaled, flip=flip)


class BatchMemory:
    """Reuses the memory of batches that are no longer referenced.

    Fresh pages from the kernel for every batch cost a tenth of decoding it.
    """

    _MOST = 4
    _UNUSED = 3
    """Reference count of a free array: the list, the loop variable and the argument of the call."""

    def __init__(self) -> None:
        self._arrays: list[NDArray[np.uint8]] = []
        self._lock = threading.Lock()

    def take(self, shape: tuple[int, ...]) -> NDArray[np.uint8]:
        """An unreferenced array of this shape with arbitrary content.

        Views and tensors made from it count as references as long as they live.
        """
        with self._lock:
            for array in self._arrays:
                if array.shape == shape and sys.getrefcount(array) == self._UNUSED:
                    return array
            # When the batch size changes, arrays of other sizes are freed.
            kept = [array for array in self._arrays if array.shape == shape]
            self._arrays = kept[-self._MOST + 1 :]
            self._arrays.append(np.empty(shape, dtype=np.uint8))
            return self._arrays[-1]


class _Quarantine:
    """The distinct bad records of a stream, limited in number and logged to a file."""

    def __init__(self, shard_set: ShardSet, cache: ShardCache, limit: int) -> None:
        self.ids: set[int] = set()
        self.path = cache.folder / f"quarantine-{shard_set.manifest_sha256[:16]}.jsonl"
        self._limit = limit
        self._lock = threading.Lock()

    def add(self, ids: NDArray[np.int64], error: DataError) -> None:
        with self._lock:
            new = [i for i in ids.tolist() if i not in self.ids]
            self.ids.update(new)
            lines = "".join(json.dumps({"id": i, "problem": error.line()}) + "\n" for i in new)
            if lines:
                # One append per batch, so that lines of several processes do not interleave.
                descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                try:
                    os.write(descriptor, lines.encode())
                finally:
                    os.close(descriptor)
        if len(self.ids) > self._limit:
            raise DataError(
                f"more than {self._limit} bad records",
                given=f"{len(self.ids)}, the last: {error.line()}",
                change=f"see {self.path}",
            )


def _delivered_shape(
    shard_set: ShardSet, image: Column, image_size: int | None
) -> tuple[int, int, int]:
    if image_size is not None:
        if image_size < 1:
            raise DataError("image_size must be positive", given=image_size)
        channels = image.shape[0] if image.shape else 3
        return channels, image_size, image_size
    if image.shape is None:
        raise DataError(
            f"images of {shard_set.uri} differ in size",
            given=f"{image.smallest} to {image.largest}, image_size=None",
            change="set data.image_size, for example 224",
        )
    channels, height, width = image.shape
    return channels, height, width
