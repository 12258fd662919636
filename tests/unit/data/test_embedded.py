"""Embedded sets: exact masks and boxes, held-out text, and tables, each through shards and a stream."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from elastic_kfac.data import make_shards
from elastic_kfac.data.sources import embedded, open_source
from elastic_kfac.data.sources.generated import digit_images
from elastic_kfac.errors import DataError

SOURCES = {
    "stdlib_text": {"train": 4941, "test": 901},
    "digit_scenes:masks": embedded.SCENES,
    "digit_scenes:boxes": embedded.SCENES,
    "sklearn:diabetes": {"train": 354, "test": 88},
    "sklearn:breast_cancer": {"train": 455, "test": 114},
    "sklearn:wine": {"train": 142, "test": 36},
}


@pytest.mark.parametrize("split", ["train", "test"])
def test_scenes_have_the_pixels_masks_and_boxes_of_digits_of_their_split(split: str) -> None:
    scenes = embedded.make_scenes(split)
    pictures, labels = digit_images(split)
    known = {
        (int(label), picture.tobytes()): True
        for picture, label in zip(pictures, labels, strict=True)
    }
    assert len(scenes.images) == embedded.SCENES[split]
    sizes = set()
    for image, mask, boxes in list(zip(*scenes, strict=True))[:200]:
        assert 1 <= len(boxes) <= embedded.MOST_DIGITS
        outside = np.ones_like(mask, dtype=bool)
        for left, top, right, bottom, digit in boxes.astype(int):
            inside = mask[top:bottom, left:right]
            outside[top:bottom, left:right] = False
            # Only this digit is inside, and it touches all four edges.
            assert set(np.unique(inside)) <= {0, digit + 1}
            assert all(inside[edge].any() for edge in (0, -1))
            assert all(inside[:, edge].any() for edge in (0, -1))
            sizes.add(max(inside.shape))
        assert not mask[outside].any()
        assert image.max() == 255 or image[mask > 0].mean() > image[mask == 0].mean()
    assert known and min(sizes) <= 8 and max(sizes) == 16


def test_a_digit_in_a_scene_is_one_of_the_split(tmp_path: Path) -> None:
    scenes, (pictures, labels) = embedded.make_scenes("test"), digit_images("test")
    image, boxes = scenes.images[0], scenes.boxes[0].astype(int)
    left, top, right, bottom, digit = boxes[0]
    mask = scenes.masks[0, top:bottom, left:right] > 0
    found = image[top:bottom, left:right] * mask
    scale = 2 if max(found.shape) > 8 else 1
    matches = 0
    for picture in pictures[labels == digit]:
        whole = np.kron(picture, np.ones((scale, scale), dtype=np.uint8))
        rows, columns = (np.flatnonzero(whole.any(axis=axis)) for axis in (1, 0))
        whole = whole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        # Dim pixels may be darker than the background that they lie on.
        bright = whole > 80
        matches += whole.shape == found.shape and bool((found[bright] == whole[bright]).all())
    assert matches >= 1


def test_text_is_of_the_running_python_and_modules_are_held_out() -> None:
    train, test = (open_source("stdlib_text").split(split) for split in ("train", "test"))
    assert "heapq" in embedded.MODULES["test"]
    assert not set(embedded.MODULES["train"]) & set(embedded.MODULES["test"])
    blocks = [
        bytes(row.tolist()).decode()
        for r in test.read(0, test.num_samples)
        for row in r.values["tokens"]
    ]
    assert all(len(block) == embedded.BLOCK for block in blocks)
    import heapq

    whole = Path(heapq.__file__).read_text()
    assert sum(block in whole for block in blocks) >= len(whole) // embedded.BLOCK - 2
    assert train.num_samples > 4 * test.num_samples and train.fingerprint != test.fingerprint


def test_text_is_cut_into_blocks_of_the_length_that_is_asked_for() -> None:
    texts = []
    for source, length in (("stdlib_text", 128), ("stdlib_text:32", 32)):
        split = open_source(source).split("test")
        blocks = [row for r in split.read(0, split.num_samples) for row in r.values["tokens"]]
        assert {len(block) for block in blocks} == {length}
        # In the order of the text.
        texts.append(b"".join(bytes(blocks[i].tolist()) for i in np.argsort(split.order)))
    assert texts[1].startswith(texts[0]) and len(texts[1]) - len(texts[0]) < 128
    assert open_source("stdlib_text:32").name != open_source("stdlib_text").name
    for wrong in ("1", "x", "9999"):
        with pytest.raises(DataError, match="bad length"):
            open_source(f"stdlib_text:{wrong}")


@pytest.mark.parametrize("source", list(SOURCES))
def test_embedded_sets_become_shards(source: str, tmp_path: Path) -> None:
    made = make_shards(source, tmp_path)["splits"]
    found = {split: one["samples"] for split, one in made.items()}
    if source == "stdlib_text":  # Its length is that of the Python at hand.
        assert all(found[s] == pytest.approx(n, rel=0.3) for s, n in SOURCES[source].items())
    else:
        assert found == SOURCES[source]
    again = make_shards(source, tmp_path)["splits"]
    assert all(one["made"] == 0 for one in again.values())


@pytest.mark.parametrize("source", ["digit_scenes", "digit_scenes:circles", "sklearn:california"])
def test_an_unknown_set_is_one_line(source: str) -> None:
    with pytest.raises(DataError, match=r"unknown (kind|table)"):
        open_source(source)


def test_a_python_without_sources_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "MODULES", {"train": ("sys",), "test": ("sys",)})
    with pytest.raises(DataError, match="no source of one of its modules"):
        open_source("stdlib_text").split("train")
