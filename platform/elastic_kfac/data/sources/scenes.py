"""Images with a mask of classes, or with boxes: folders of masks, and detection files in COCO's form."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from elastic_kfac.data.columns import BOX, IGNORED, Column
from elastic_kfac.data.decode import UndecodableImage, decode_mask
from elastic_kfac.data.sources.image_files import IMAGE_SUFFIXES
from elastic_kfac.data.sources.options import WORDS, Options, openers, share_of
from elastic_kfac.data.sources.source import ColumnSplit, Source, fixed_shuffle, is_hidden
from elastic_kfac.errors import DataError
from elastic_kfac.paths import user_path

CLASS_FILE = "classes.txt"


def mask_folder(rest: str, split: str | None) -> Source:
    """`DIR[?classes=NAME,NAME]`: `DIR/images/NAME.jpg` with `DIR/masks/NAME.png`, or both below
    `DIR/train` and `DIR/test`.

    A mask is an image of class numbers (grey or palette); 255 is no class. Names of the classes come from
    `classes`, from `DIR/classes.txt` (one a line), or are the numbers that occur.

    Raises:
        DataError: If a folder is missing, or an image has no mask.
    """
    options = Options("masks", rest, ("classes",))
    root = user_path(options.path)
    folders = {word: root / word for word in WORDS if (root / word / "images").is_dir()}
    folders = folders or {split or "train": root}
    pairs = {name: _pairs(folder) for name, folder in folders.items()}
    names = options.names("classes")
    if not names and (root / CLASS_FILE).is_file():
        names = (root / CLASS_FILE).read_text(encoding="utf-8").split("\n")
        names = [name.strip() for name in names if name.strip()]
    if not names:
        everything = [mask for some in pairs.values() for _, mask in some]
        names = [str(number) for number in range(_largest(everything) + 1)]

    def make(name: str, begin: float, end: float) -> ColumnSplit:
        return _mask_split(pairs[name], tuple(names), root, begin, end)

    return Source(options.name, openers(pairs, options.held_out, make))


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    images, masks = folder / "images", folder / "masks"
    for needed in (images, masks):
        if not needed.is_dir():
            raise DataError("no such folder", given=str(needed), allowed="DIR/images and DIR/masks")
    by_stem = {path.stem: path for path in masks.iterdir() if not is_hidden(path.name)}
    found = []
    for path in sorted(images.iterdir()):
        if is_hidden(path.name) or not path.name.lower().endswith(IMAGE_SUFFIXES):
            continue
        if path.stem not in by_stem:
            raise DataError(
                "an image has no mask",
                given=str(path),
                change=f"add {masks / path.stem}.png, or remove the image",
            )
        found.append((path, by_stem[path.stem]))
    return found


def _largest(masks: Sequence[Path]) -> int:
    largest = 0
    for path in masks:
        try:
            pixels = decode_mask(path.read_bytes())
        except UndecodableImage:
            continue  # Writing its shard names it.
        pixels = pixels[pixels != IGNORED]
        largest = max(largest, int(pixels.max(initial=0)))
    return largest


def _mask_split(
    pairs: Sequence[tuple[Path, Path]],
    names: tuple[str, ...],
    root: Path,
    begin: float,
    end: float,
) -> ColumnSplit:
    digest = hashlib.sha256(repr((names, begin, end)).encode())
    sizes = []
    for paths in pairs:
        size = sum(path.stat().st_size for path in paths)
        digest.update(f"{paths[0].relative_to(root)}\0{size}\n".encode())
        sizes.append(size)
    return ColumnSplit(
        columns=(
            Column("image", "image", "input", encoding="encoded"),
            Column("mask", "mask", "target", encoding="encoded", class_names=names),
        ),
        load=lambda chosen: {
            "image": [pairs[i][0].read_bytes() for i in chosen.tolist()],
            "mask": [pairs[i][1].read_bytes() for i in chosen.tolist()],
        },
        key=lambda index: pairs[index][0].relative_to(root).as_posix(),
        order=fixed_shuffle(len(pairs))[share_of(len(pairs), begin, end)],
        bytes_per_sample=max(1.0, float(np.mean(sizes))) if sizes else 1.0,
        fingerprint=digest.hexdigest(),
    )


def coco(rest: str, split: str | None) -> Source:
    """`FILE.json[?images=DIR]`, or a folder with `annotations/*train*.json`, `annotations/*val*.json` and
    images below `train*/` and `val*/`, as COCO is laid out.

    Boxes of crowds (`iscrowd`) are left out. Classes are the categories in the order of their ids.

    Raises:
        DataError: If files are missing or not in this form.
    """
    options = Options("coco", rest, ("images",))
    root = user_path(options.path)
    if root.is_file():
        images = user_path(options.text("images") or str(root.parent / "images"))
        files = {split or "train": (root, images)}
    else:
        files = {}
        for path in sorted((root / "annotations").glob("instances*.json")) or sorted(
            (root / "annotations").glob("*.json")
        ):
            for word, name in (("train", "train"), ("val", "test"), ("test", "test")):
                if word in path.stem and name not in files:
                    folder = next((f for f in sorted(root.glob(f"{word}*")) if f.is_dir()), root)
                    files[name] = (path, folder)
                    break
        if not files:
            raise DataError(
                "no annotations in COCO's form",
                given=str(root),
                allowed="a .json file, or a folder with annotations/*train*.json",
            )

    def make(name: str, begin: float, end: float) -> ColumnSplit:
        return _coco_split(*files[name], begin, end)

    return Source(options.name, openers(files, options.held_out, make))


def _coco_split(file: Path, folder: Path, begin: float, end: float) -> ColumnSplit:
    content = file.read_bytes()
    try:
        found = json.loads(content)
        categories = sorted(found["categories"], key=lambda each: each["id"])
        numbers = {each["id"]: place for place, each in enumerate(categories)}
        names = tuple(str(each["name"]) for each in categories)
        pictures: list[Any] = sorted(found["images"], key=lambda each: each["id"])
        boxes: dict[Any, list[list[float]]] = defaultdict(list)
        for each in found["annotations"]:
            if not each.get("iscrowd"):
                left, top, width, height = each["bbox"]
                if width > 0 and height > 0:
                    corner = [left, top, left + width, top + height]
                    boxes[each["image_id"]].append([*corner, numbers[each["category_id"]]])
        files = [str(picture["file_name"]) for picture in pictures]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            "not annotations in COCO's form",
            given=str(file),
            change=f"{type(error).__name__}: {error}",
        ) from None
    missing = [name for name in files if not (folder / name).is_file()]
    if missing:
        raise DataError(
            "images of the annotations are missing",
            given=f"{len(missing)} of {len(files)}, the first: {folder / missing[0]}",
            change="add ?images=DIR to the source",
        )
    targets = [
        np.asarray(boxes[picture["id"]], dtype=np.float32).reshape(-1, BOX) for picture in pictures
    ]
    sizes = [(folder / name).stat().st_size for name in files]
    digest = hashlib.sha256(content + repr((sizes, begin, end)).encode())

    def load(chosen: NDArray[np.int64]) -> dict[str, Any]:
        return {
            "image": [(folder / files[i]).read_bytes() for i in chosen.tolist()],
            "boxes": [targets[i] for i in chosen.tolist()],
        }

    return ColumnSplit(
        columns=(
            Column("image", "image", "input", encoding="encoded"),
            Column("boxes", "boxes", "target", class_names=names),
        ),
        load=load,
        key=files.__getitem__,
        order=fixed_shuffle(len(files))[share_of(len(files), begin, end)],
        bytes_per_sample=max(1.0, float(np.mean(sizes))) if sizes else 1.0,
        fingerprint=digest.hexdigest(),
    )
