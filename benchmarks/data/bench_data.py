"""The sample stream beside its peers, in one run: raw 32x32 images, JPEG photos, and a longer run.

    python benchmarks/data/bench_data.py [--peer FOLDER] [--photos FILE] [--out FILE]

Every number is samples per CPU second of the whole process (all its threads), because the machine
may be shared; wall-clock rates stand beside it. The readers take turns, round by round, so that a noisy
machine hits them alike; medians of the rounds count. Batches are uint8 tensors, shuffled.

raw    20,000 images of 3x32x32: ours, torch's DataLoader over PNG files, MosaicML Streaming
jpeg   photos cut and resized to 224: ours, PIL, and what decoding alone takes (simplejpeg, whole
       images, nothing else), and what the libraries alone take for decoding and resizing (cuts known
       beforehand, no batch); photos of 256 pixels on the short side, and of ImageNet's usual 375x500
long   our JPEG path with threads, prefetching and a cache that is too small: memory and handles

`--peer` is a folder with mosaicml-streaming installed (`pip install --target FOLDER mosaicml-streaming`);
without it that comparison is left out. `--photos` is a Parquet file with a column `image` of JPEGs;
without it photos are drawn with a natural image's spectrum.
"""

from __future__ import annotations

import argparse
import importlib
import io
import itertools
import json
import os
import platform
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from elastic_kfac import __version__
from elastic_kfac.data import SampleStream, ShardSet, make_shards
from elastic_kfac.data.augment import augmentation_key, center_boxes, resized_crop_boxes
from elastic_kfac.data.cache import ShardCache
from elastic_kfac.data.decode import Scratch, image_size
from elastic_kfac.data.loading import decode_into

sys.path.insert(0, str(Path(__file__).parents[1]))
from machine import cpu_name

BATCH = 128
RAW_IMAGES = 20_000
PHOTOS = 256
SIDE = 224

# (ratio, smallest value that is wanted)
TARGETS = {
    "raw: ours / DataLoader over PNG": 20.0,
    "raw: ours / MosaicML Streaming": 10.0,
} | {
    f"jpeg {size}, {augment}: ours / {other}": wanted
    for size in ("256", "375x500")
    for augment in ("none", "random_resized_crop")
    for other, wanted in (("PIL", 1.2), ("pure decode", 0.85))
}

Reader = Callable[[int], None]
"""Reads so many samples."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", type=Path, help="folder with mosaicml-streaming installed")
    parser.add_argument("--photos", type=Path, help="Parquet file with a column of JPEGs")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--long-seconds", type=float, default=30)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    began, load = time.time(), os.getloadavg()
    folder = Path(tempfile.mkdtemp(prefix="bench-data-"))
    try:
        jpeg: dict[str, Any] = {}
        ratios: dict[str, float] = {}
        for name, (photos, described) in photo_sets(arguments.photos).items():
            write_photos(folder / name, photos)
            rates = measure_jpeg(folder / name, arguments.rounds)
            jpeg[name] = {**described, "rates": rates}
            ratios |= jpeg_ratios(name, rates)
        long = measure_long_run(folder / "256", arguments.long_seconds)
        # Last: peers leave threads behind, which the long run would count.
        raw, mosaic = measure_raw(folder / "raw", arguments.rounds, arguments.peer)
        ratios |= raw.pop("ratios")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    targets = {
        name: {
            "target": TARGETS.get(name),
            "measured": ratios.get(name),
            "met": ratios[name] >= TARGETS[name] if name in ratios and name in TARGETS else None,
        }
        for name in dict.fromkeys([*TARGETS, *ratios])
    }
    for name, row in targets.items():
        print(f"{name:55s} {row['measured'] or 'not measured':>12}  target {row['target']}")
    print(json.dumps(long))
    result = {
        "benchmark": "data",
        "what": "samples per CPU second (median of rounds, taken in turns); wall-clock beside it",
        "date": time.strftime("%Y-%m-%d", time.gmtime(began)),
        "seconds": round(time.time() - began, 1),
        "n": {"rounds": arguments.rounds, "batch": BATCH, "raw_images": RAW_IMAGES},
        "ratios_per_cpu_second": targets,
        "raw": raw,
        "jpeg": jpeg,
        "long_run": long,
        "machine": {
            "cpu": cpu_name(),
            "cores": os.cpu_count(),
            "load_average_before": [round(x, 2) for x in load],
            "load_average_after": [round(x, 2) for x in os.getloadavg()],
        },
        "versions": {
            "python": platform.python_version(),
            "elastic_kfac": __version__,
            "torch": torch.__version__,
            "numpy": np.__version__,
            "pyarrow": pa.__version__,
            "simplejpeg": simplejpeg.__version__,
            "pillow": PIL.__version__,
            "mosaicml-streaming": mosaic,
        },
    }
    if arguments.out:
        arguments.out.write_text(json.dumps(result, indent=1) + "\n")


def take_turns(readers: dict[str, tuple[Reader, int]], rounds: int) -> dict[str, dict[str, float]]:
    """Rates of each reader; `readers` gives it and how many samples a round of it has."""
    cpu: dict[str, list[float]] = {name: [] for name in readers}
    wall: dict[str, list[float]] = {name: [] for name in readers}
    for reader, count in readers.values():
        reader(min(count, 2 * BATCH))  # Caches, imports, first use.
    for _ in range(rounds):
        for name, (reader, count) in readers.items():
            began = time.process_time(), time.perf_counter()
            reader(count)
            wall[name].append(count / (time.perf_counter() - began[1]))
            # What a reader prepares ahead in its threads is its own cost, not the next one's.
            wait_for_rest()
            cpu[name].append(count / (time.process_time() - began[0]))
    return {
        name: {
            "per_cpu_second": round(statistics.median(cpu[name]), 1),
            "per_cpu_second_range": [round(min(cpu[name]), 1), round(max(cpu[name]), 1)],
            "per_second": round(statistics.median(wall[name]), 1),
            "samples_per_round": count,
        }
        for name, (_, count) in readers.items()
    }


def wait_for_rest(timeout_s: float = 5.0) -> None:
    """Returns when this process's threads do next to nothing."""
    deadline, before = time.perf_counter() + timeout_s, -1.0
    while time.process_time() - before > 0.005 and time.perf_counter() < deadline:
        before = time.process_time()
        time.sleep(0.05)


def ratio(rates: dict[str, dict[str, float]], ours: str, other: str) -> float:
    return round(rates[ours]["per_cpu_second"] / rates[other]["per_cpu_second"], 3)


def from_batches(batches: Iterator[Any]) -> Reader:
    """A reader that goes on where it stopped."""

    def read(count: int) -> None:
        for _ in range(-(-count // BATCH)):
            next(batches)

    return read


def from_stream(stream: SampleStream, images: tuple[int, ...]) -> Reader:
    positions = itertools.cycle(range(0, stream.num_samples - BATCH + 1, BATCH))
    epoch = iter(range(1 << 30))
    state = {"epoch": next(epoch)}

    def read(count: int) -> None:
        for _ in range(-(-count // BATCH)):
            first = next(positions)
            if first == 0:
                state["epoch"] = next(epoch)
            batch = stream.read(state["epoch"], first, BATCH)
            assert batch.inputs.shape == (BATCH, *images) and batch.inputs.dtype == torch.uint8

    return read


# --- Raw images ----------------------------------------------------------------------------------


def drawn(count: int, height: int, width: int, exponent: float) -> np.ndarray:
    """Images with a spectrum of 1/f^exponent, correlated channels, uint8 [n, height, width, 3]."""
    rng = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf
    out = np.empty((count, height, width, 3), dtype=np.uint8)
    for i in range(count):
        shape = (4, *frequency.shape)
        spectrum = rng.standard_normal(shape) + 1j * rng.standard_normal(shape)
        planes = np.fft.irfft2(spectrum / frequency**exponent, s=(height, width))
        planes /= planes.std(axis=(1, 2), keepdims=True)
        for channel in range(3):
            mixed = 128 + 50 * (planes[3] + 0.3 * planes[channel])
            out[i, ..., channel] = np.clip(mixed, 0, 255)
    return out


class PngFiles(Dataset[tuple[torch.Tensor, int]]):
    """One PNG file per sample, as class folders hold them."""

    def __init__(self, folder: Path, labels: list[int]) -> None:
        self._folder = folder
        self._labels = labels

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        with Image.open(self._folder / f"{index}.png") as image:
            pixels = np.array(image.convert("RGB"))
        return torch.from_numpy(pixels).permute(2, 0, 1), self._labels[index]


def measure_raw(folder: Path, rounds: int, peer: Path | None) -> tuple[dict[str, Any], str]:
    pixels = drawn(RAW_IMAGES, 32, 32, 1.2)
    labels = [i % 10 for i in range(RAW_IMAGES)]
    (folder / "png").mkdir(parents=True)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / "png" / f"{i}.png")
    planar = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2))
    column = pa.array([image.tobytes() for image in planar], pa.binary(3 * 32 * 32))
    table = pa.table({"image": column, "label": labels}).replace_schema_metadata(
        {"channels": "3", "height": "32", "width": "32", "layout": "CHW"}
    )
    pq.write_table(table, folder / "raw_train.parquet", compression="NONE")
    make_shards(f"parquet:{folder / 'raw_train.parquet'}", folder / "shards", shard_mib=8)
    loader = DataLoader(PngFiles(folder / "png", labels), batch_size=BATCH, shuffle=True)
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    shard_set = ShardSet.open(folder / "shards" / "train")
    with SampleStream(
        shard_set, seed=0, cache_dir=str(folder / "cache"), prefetch_batches=0
    ) as stream:
        readers = {
            "ours": (from_stream(stream, (3, 32, 32)), 400 * BATCH),
            "DataLoader over PNG": (from_batches(iter(endless)), 12 * BATCH),
        }
        mosaic = open_mosaic(folder / "mds", planar, labels, peer)
        if mosaic is not None:
            readers["MosaicML Streaming"] = (from_batches(mosaic[1]), 24 * BATCH)
        rates = take_turns(readers, rounds)
    names = [name for name in rates if name != "ours"]
    ratios = {f"raw: ours / {name}": ratio(rates, "ours", name) for name in names}
    version = mosaic[0] if mosaic else "not installed here: not measured"
    return {"rates": rates, "ratios": ratios, "image": "3x32x32 uint8"}, version


def open_mosaic(
    folder: Path, planar: np.ndarray, labels: list[int], peer: Path | None
) -> tuple[str, Iterator[Any]] | None:
    """(version, endless batches) of the same samples; None where it is not installed."""
    if peer is not None:
        sys.path.append(str(peer))
    try:
        streaming: Any = importlib.import_module("streaming")
    except ImportError as error:
        print(f"mosaicml-streaming is not importable here ({error}): left out")
        return None
    columns = {"image": "ndarray:uint8:3,32,32", "label": "int"}
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit=8 << 20) as writer:
        for image, label in zip(planar, labels, strict=True):
            writer.write({"image": image, "label": label})
    data = streaming.StreamingDataset(local=str(folder), shuffle=True, batch_size=BATCH)
    loader = DataLoader(data, batch_size=BATCH, drop_last=True)
    endless = itertools.chain.from_iterable(itertools.repeat(loader))
    return streaming.__version__, iter(endless)


# --- Photos --------------------------------------------------------------------------------------


def photo_sets(path: Path | None) -> dict[str, tuple[list[bytes], dict[str, Any]]]:
    """By name: photos and what they are."""
    sets = {}
    for name, height, width, quality in (("256", 256, 384, 90), ("375x500", 375, 500, 95)):
        photos = []
        for i, image in enumerate(drawn(PHOTOS, height, width, 1.4)):
            cut = image[:, : width - width // 16 * (i % 5)]  # The long side differs.
            out = io.BytesIO()
            turned = cut if i % 3 else cut.swapaxes(0, 1)
            Image.fromarray(turned).save(out, "JPEG", quality=quality)
            photos.append(out.getvalue())
        sets[name] = (photos, f"drawn, spectrum 1/f^1.4, quality {quality}")
    if path is not None:
        column = pq.read_table(path, columns=["image"]).column("image")
        sets["given"] = (column.to_pylist()[:PHOTOS], path.name)
    return {name: (photos, _described(photos, text)) for name, (photos, text) in sets.items()}


def _described(photos: list[bytes], source: str) -> dict[str, Any]:
    sizes = np.array([image_size(photo) for photo in photos])
    return {
        "photos": len(photos),
        "source": source,
        "mean_kilobytes": round(statistics.mean(map(len, photos)) / 1000, 1),
        "median_height_width": np.median(sizes, axis=0).astype(int).tolist(),
    }


def write_photos(folder: Path, photos: list[bytes]) -> None:
    folder.mkdir(parents=True)
    table = pa.table({"image": photos, "label": [0] * len(photos)})
    pq.write_table(table, folder / "photos_train.parquet")
    size = sum(map(len, photos)) / 2**20 / 4
    make_shards(f"parquet:{folder / 'photos_train.parquet'}", folder / "shards", shard_mib=size)


class ByPil:
    """The same cuts by PIL, batch by batch; photos come from the same mapped shards."""

    def __init__(self, photos: list[memoryview], augment: str) -> None:
        self._photos = photos
        self._augment = augment
        self._sizes = np.array([image_size(photo) for photo in photos])
        self._at = 0

    def __call__(self, count: int) -> None:
        for _ in range(-(-count // BATCH)):
            ids = np.arange(self._at, self._at + BATCH) % len(self._photos)
            flips = [False] * BATCH
            if self._augment == "none":
                boxes = center_boxes(self._sizes[ids])
            else:
                key = augmentation_key(0, self._at // len(self._photos))
                boxes, drawn_flips = resized_crop_boxes(self._sizes[ids], key, ids)
                flips = drawn_flips.tolist()
            images = np.empty((BATCH, SIDE, SIDE, 3), dtype=np.uint8)
            for row, (i, box, flip) in enumerate(zip(ids, boxes.tolist(), flips, strict=True)):
                image = Image.open(io.BytesIO(self._photos[i])).convert("RGB").crop(box)
                if image.size != (SIDE, SIDE):
                    image = image.resize((SIDE, SIDE), Image.Resampling.BILINEAR)
                if flip:
                    image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
                images[row] = np.asarray(image)
            torch.from_numpy(images).permute(0, 3, 1, 2)
            self._at += BATCH


def libraries_alone(photos: list[memoryview], augment: str) -> Reader:
    """Decodes and resizes as the stream does, and nothing else."""
    sizes = np.array([image_size(photo) for photo in photos])
    ids = np.arange(len(photos))
    boxes, flips = center_boxes(sizes), np.zeros(len(photos), dtype=bool)
    if augment == "random_resized_crop":
        boxes, flips = resized_crop_boxes(sizes, augmentation_key(0, 0), ids)
    cuts = [tuple(box) for box in boxes.tolist()]
    endless = itertools.cycle(zip(photos, sizes.tolist(), cuts, flips.tolist(), strict=True))
    out, scratch = np.empty((SIDE, SIDE, 3), dtype=np.uint8), Scratch()

    def read(count: int) -> None:
        for photo, size, box, flip in itertools.islice(endless, count):
            decode_into(out, photo, size, box, flip, scratch)

    return read


def measure_jpeg(folder: Path, rounds: int) -> dict[str, dict[str, float]]:
    shard_set = ShardSet.open(folder / "shards" / "train")
    cache = ShardCache(folder / "cache", 1 << 40)
    opened = [cache.open(shard_set, index) for index in range(len(shard_set.shards))]
    photos = [shard.item("image", row) for shard in opened for row in range(shard.num_rows)]
    endless = itertools.cycle(photos)

    def decode_only(count: int) -> None:
        for photo in itertools.islice(endless, count):
            simplejpeg.decode_jpeg(photo, "RGB")

    readers: dict[str, tuple[Reader, int]] = {"pure decode": (decode_only, 4 * BATCH)}
    streams = []
    for augment in ("none", "random_resized_crop"):
        options = {"seed": 0, "augment": augment, "image_size": SIDE, "prefetch_batches": 0}
        stream = SampleStream(shard_set, cache_dir=str(folder / "cache"), **options)
        streams.append(stream)
        readers[f"ours, {augment}"] = (from_stream(stream, (3, SIDE, SIDE)), 4 * BATCH)
        readers[f"PIL, {augment}"] = (ByPil(photos, augment), 4 * BATCH)
        readers[f"libraries alone, {augment}"] = (libraries_alone(photos, augment), 4 * BATCH)
    rates = take_turns(readers, rounds)
    for stream in streams:
        stream.close()
    return rates


def jpeg_ratios(name: str, rates: dict[str, dict[str, float]]) -> dict[str, float]:
    ratios = {}
    for augment in ("none", "random_resized_crop"):
        alone = f"libraries alone, {augment}"
        for label, other in (("PIL", f"PIL, {augment}"), ("pure decode", "pure decode")):
            value = ratio(rates, f"ours, {augment}", other)
            ratios[f"jpeg {name}, {augment}: ours / {label}"] = value
        ratios[f"jpeg {name}, {augment}: ours / libraries alone"] = ratio(
            rates, f"ours, {augment}", alone
        )
        ratios[f"jpeg {name}, {augment}: libraries alone / pure decode"] = ratio(
            rates, alone, "pure decode"
        )
    return ratios


# --- A longer run --------------------------------------------------------------------------------


def measure_long_run(folder: Path, seconds: float) -> dict[str, Any]:
    """Private memory, descriptors and threads while shards are evicted and fetched again."""
    shard_set = ShardSet.open(folder / "shards" / "train")
    largest = max(shard.bytes for shard in shard_set.shards)
    held: list[tuple[int, int, int]] = []
    memory: list[float] = []
    samples = 0
    epoch = 0
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        # A stream per pass: opening and closing must not leak either.
        with SampleStream(
            shard_set,
            seed=0,
            augment="random_resized_crop",
            image_size=SIDE,
            decode_threads=2,
            cache_dir=str(folder / "small-cache"),
            cache_gib=(2.6 * largest + (4 << 20)) / 2**30,
        ) as stream:
            for first in range(0, shard_set.num_samples, BATCH):
                count = min(BATCH, shard_set.num_samples - first)
                stream.prefetch(epoch, first + BATCH, BATCH)
                samples += len(stream.read(epoch, first, count).ids)
        held.append((descriptors(), threads(), shared_memory()))
        epoch += 1
        memory.append(private_mib())
    half = memory[len(memory) // 2 :]
    quarter = memory[len(memory) // 4 : len(memory) // 2] or memory
    # Arrow starts the threads of its pools one by one; the first half is for that.
    before, after = held[len(held) // 2], held[-1]
    return {
        "seconds": round(time.monotonic() - began, 1),
        "samples": samples,
        "passes": epoch,
        "private_mib_first_pass": round(memory[0], 1),
        "private_mib_second_quarter": round(statistics.median(quarter), 1),
        "private_mib_second_half": round(statistics.median(half), 1),
        "private_mib_growth": round(statistics.median(half) - statistics.median(quarter), 1),
        "leaked_descriptors": after[0] - before[0],
        "leaked_threads": after[1] - before[1],
        "python_threads_left": threading.active_count() - 1,
        "leaked_shared_memory_files": after[2] - before[2],
    }


def private_mib() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) / 1024


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def threads() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def shared_memory() -> int:
    return sum(1 for path in Path("/dev/shm").iterdir() if path.stat().st_uid == os.getuid())


if __name__ == "__main__":
    main()
