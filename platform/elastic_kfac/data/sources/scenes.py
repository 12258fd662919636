"""Images with a mask of classes, or with boxes: folders of masks, and detection files in COCO's form."""

from __future__ import annotations

import hashlib
import warnings
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
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
from elastic_kfac.json_text import parsed
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
        largest = _largest(everything)
        if largest == 0:
            raise DataError(
                "the masks have one class only",
                given=f"{root}: class 0, and perhaps {IGNORED}, which is no class",
                change="save the numbers of classes, for example 0 and 1, or give ?classes=NAME",
            )
        names = [str(number) for number in range(max(largest, 0) + 1)]

    def make(name: str, begin: float, end: float) -> ColumnSplit:
        return _mask_split(pairs[name], tuple(names), root, begin, end)

    return Source(options.name, openers(pairs, options.held_out, make))


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    images, masks = folder / "images", folder / "masks"
    for needed in (images, masks):
        if not needed.is_dir():
            raise DataError("no such folder", given=str(needed), allowed="DIR/images and DIR/masks")
    by_stem: dict[str, Path] = {}
    for path in sorted(masks.iterdir()):
        if is_hidden(path.name):
            continue
        if path.stem in by_stem:
            raise DataError(
                "two masks of one name",
                given=f"{by_stem[path.stem]}, {path.name}",
                change="remove one of them",
            )
        by_stem[path.stem] = path
    found: list[tuple[Path, Path]] = []
    for path in sorted(images.iterdir()):
        if is_hidden(path.name) or not path.name.lower().endswith(IMAGE_SUFFIXES):
            continue
        if path.stem not in by_stem:
            raise DataError(
                "an image has no mask",
                given=str(path),
                change=f"add {masks / path.stem}.png, or remove the image",
            )
        if found and found[-1][0].stem == path.stem:
            raise DataError(
                "two images of one name",
                given=f"{found[-1][0]}, {path.name}",
                change="remove one of them, or name it and its mask otherwise",
            )
        found.append((path, by_stem[path.stem]))
    without = by_stem.keys() - {image.stem for image, _ in found}
    if without:
        warnings.warn(
            f"{masks}: left out {len(without)} without an image: {', '.join(sorted(without)[:5])}",
            stacklevel=3,
        )
    return found


def _largest(masks: Sequence[Path]) -> int:
    """The largest class of the masks that can be decoded, -1 if there are none."""
    largest = -1
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

    Boxes of crowds (`iscrowd`) are left out, others are cut at the image's edge. Classes are the
    categories in the order of their ids.

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
        found = parsed(content)
        categories = sorted(found["categories"], key=lambda each: each["id"])
        numbers = {each["id"]: place for place, each in enumerate(categories)}
        names = tuple(str(each["name"]) for each in categories)
        pictures: list[Any] = sorted(found["images"], key=lambda each: each["id"])
        files = [str(picture["file_name"]) for picture in pictures]
        for what in ("images", "categories"):
            _check_ids(file, what, [each["id"] for each in found[what]])
        boxes = _boxes(file, found["annotations"], numbers, {each["id"]: each for each in pictures})
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            "not annotations in COCO's form",
            given=str(file),
            change=f"{type(error).__name__}: {error}",
        ) from None
    if files and not any(boxes.values()):
        raise DataError("annotations without a box", given=str(file))
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


def _check_ids(file: Path, what: str, ids: Sequence[Any]) -> None:
    number, times = Counter(ids).most_common(1)[0] if ids else (None, 1)
    if times > 1:
        raise DataError(
            f"{what} of annotations have one id",
            given=f"{times} of id {number} in {file}",
            change="give each its own",
        )


def _boxes(
    file: Path, annotations: Sequence[Any], numbers: Mapping[Any, int], pictures: Mapping[Any, Any]
) -> dict[Any, list[list[float]]]:
    """Boxes [left, top, right, bottom, class] by image id, cut at the edges of images of known size."""
    boxes: dict[Any, list[list[float]]] = defaultdict(list)
    cut = empty = 0
    for each in annotations:
        image, category = each["image_id"], each["category_id"]
        for what, known in ((image, pictures), (category, numbers)):
            if what not in known:
                raise DataError(
                    f"an annotation of an unknown {'image' if known is pictures else 'category'}",
                    given=f"annotation {each.get('id')}, id {what} in {file}",
                    change="add it, or remove the annotation",
                )
        if each.get("iscrowd"):
            continue
        left, top, width, height = each["bbox"]
        right, bottom = left + width, top + height
        if {"width", "height"} <= pictures[image].keys():
            edges = (left, top, right, bottom)
            wide, high = pictures[image]["width"], pictures[image]["height"]
            left, top = max(left, 0), max(top, 0)
            right, bottom = min(right, wide), min(bottom, high)
            # COCO's own are rounded to hundredths.
            cut += (
                max(abs(a - b) for a, b in zip(edges, (left, top, right, bottom), strict=True))
                > 0.01
            )
        if right <= left or bottom <= top:
            empty += 1
            continue
        boxes[image].append([left, top, right, bottom, numbers[category]])
    for count, what in ((empty, "left out {} without area"), (cut, "cut {} at the image's edge")):
        if count:
            several = "1 box" if count == 1 else f"{count:,} boxes"
            warnings.warn(f"{file}: {what.format(several)}", stacklevel=3)
    return boxes
