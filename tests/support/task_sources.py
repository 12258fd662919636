"""Sources for every task, small enough for a test of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

MODELS = "support.task_models"


def numbers(folder: Path) -> str:
    draw = np.random.default_rng(0)
    x = draw.normal(size=(160, 4)).astype(np.float32)
    y = x @ np.array([3.0, -2.0, 1.0, 0.5]) * 40 + 100 + draw.normal(size=160)
    table = {f"x{i}": x[:, i] for i in range(4)} | {"y": y}
    pq.write_table(pa.table(table), folder / "table.parquet")
    return f"table:{folder / 'table.parquet'}?targets=y"


def prose(folder: Path) -> str:
    text = "the quick brown fox jumps over the lazy dog, and then the dog sleeps. " * 60
    (folder / "book.txt").write_text(text)
    return f"text:{folder / 'book.txt'}?length=16"


def letters(folder: Path) -> str:
    return prose(folder) + "&tokenizer=characters"


def reviews(folder: Path) -> str:
    draw = np.random.default_rng(0)
    rows = []
    for index in range(160):
        words = draw.choice(["good", "fine"] if index % 2 else ["bad", "poor"], draw.integers(1, 6))
        rows.append((" ".join(words), "yes" if index % 2 else "no"))
    texts, labels = zip(*rows, strict=True)
    pq.write_table(pa.table({"text": texts, "label": labels}), folder / "reviews.parquet")
    return f"text:{folder / 'reviews.parquet'}?label=label"


def scenes(folder: Path, *, boxes: bool = False) -> str:
    """Bright squares on dark noise, with their masks or boxes."""
    draw = np.random.default_rng(0)
    root = folder / "scenes"
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True, exist_ok=True)
    annotations, images = [], []
    for index in range(60):
        pixels = draw.integers(0, 60, (24, 24, 3), dtype=np.uint8)
        mask = np.zeros((24, 24), dtype=np.uint8)
        size, kind = int(draw.integers(8, 13)), int(draw.integers(1, 3))
        top, left = (int(value) for value in draw.integers(0, 24 - size, 2))
        pixels[top : top + size, left : left + size, kind] = 250
        mask[top : top + size, left : left + size] = kind
        Image.fromarray(pixels).save(root / "images" / f"{index:03d}.png")
        Image.fromarray(mask).save(root / "masks" / f"{index:03d}.png")
        images.append({"id": index, "file_name": f"{index:03d}.png"})
        box = {"bbox": [left, top, size, size], "category_id": kind + 6, "image_id": index}
        annotations.append({**box, "id": index, "iscrowd": 0})
    categories = [{"id": 8, "name": "blue"}, {"id": 7, "name": "green"}]
    found = {"images": images, "annotations": annotations, "categories": categories}
    (root / "boxes.json").write_text(json.dumps(found))
    return f"coco:{root / 'boxes.json'}" if boxes else f"masks:{root}?classes=ground,green,blue"


def objects(folder: Path) -> str:
    return scenes(folder, boxes=True)


def own(folder: Path) -> str:
    return f"python:{MODELS}:waves"
