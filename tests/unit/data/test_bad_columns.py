"""Sources of text, tables, masks, boxes and own datasets that people get wrong: refused or named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from elastic_kfac.cli import main
from elastic_kfac.config import parse_config
from elastic_kfac.data import describe_shards, make_shards
from elastic_kfac.data.dataset import check_splits
from elastic_kfac.errors import DataError

HERE = "unit.data.test_bad_columns"


def table(folder: Path, options: str, **columns: Any) -> str:
    found = {"a": [1.0, 2.0, 3.0] * 4, "y": [0.5, 1.0, 2.5] * 4, **columns}
    pq.write_table(pa.table(found), folder / "t.parquet")
    return f"table:{folder / 't.parquet'}?{options}"


def arrays(folder: Path, **found: Any) -> str:
    np.savez(folder / "t.npz", **found)
    return f"table:{folder / 't.npz'}?targets=y"


def cut_short(folder: Path) -> str:
    source = arrays(folder, a=np.ones(5), y=np.ones(5))
    (folder / "t.npz").write_bytes((folder / "t.npz").read_bytes()[:100])
    return source


def comma_separated(folder: Path) -> str:
    (folder / "t.csv").write_text("a,y\n1,2\n")
    return f"table:{folder / 't.csv'}?targets=y"


def rows(folder: Path, options: str) -> str:
    found = {
        "text": ["ab", "cd", "ef", "gh"] * 5,
        "label": ["x", None, "y", "x"] * 5,
        "n": list(range(20)),
    }
    pq.write_table(pa.table(found), folder / "r.parquet")
    return f"text:{folder / 'r.parquet'}?{options}"


def plain(folder: Path, options: str) -> str:
    (folder / "a.txt").write_text("a text of some length " * 20)
    return f"text:{folder / 'a.txt'}?{options}"


def masks(
    folder: Path, edit: Callable[[Path], object] = lambda _: None, largest: int = 2, scale: int = 1
) -> str:
    draw = np.random.default_rng(0)
    for name in ("images", "masks"):
        (folder / name).mkdir()
    for index in range(6):
        pixels = draw.integers(0, 255, (8, 9, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        mask = draw.integers(0, largest + 1, (8, 9)) * scale
        Image.fromarray(mask.astype(np.uint8)).save(folder / "masks" / f"{index}.png")
    edit(folder)
    return f"masks:{folder}"


def smaller(folder: Path) -> None:
    Image.fromarray(np.zeros((4, 9), np.uint8)).save(folder / "masks" / "3.png")


def lossy(folder: Path) -> None:
    for path in (folder / "masks").glob("*.png"):
        Image.open(path).save(path.with_suffix(".jpg"))
        path.unlink()


def second(name: str) -> Callable[[Path], None]:
    def copied(folder: Path) -> None:
        Image.open(folder / name / "1.png").save(folder / name / "1.bmp")

    return copied


def boxes(folder: Path, edit: Callable[[dict[str, Any]], object]) -> str:
    (folder / "images").mkdir()
    found: dict[str, Any] = {"images": [], "annotations": [], "categories": []}
    for index in range(6):
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(folder / "images" / f"{index}.png")
        found["images"].append({"id": index, "file_name": f"{index}.png"})
        found["images"][-1] |= {"height": 30, "width": 40}
        one = {"id": index, "image_id": index, "category_id": 7, "bbox": [5, 5, 20, 20]}
        found["annotations"].append(one)
    found["categories"] += [{"id": 7, "name": "cat"}, {"id": 9, "name": "dog"}]
    edit(found)
    (folder / "b.json").write_text(json.dumps(found))
    return f"coco:{folder / 'b.json'}"


def first_box(**values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda found: found["annotations"][0].update(values)


class Own:
    """A dataset of 20 samples that a function makes."""

    def __init__(self, sample: Callable[[int], Any]) -> None:
        self.sample = sample

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return self.sample(index)


def tensor_labels() -> Own:
    return Own(lambda index: (torch.ones(3) * index, torch.tensor(index % 3)))


def bool_labels() -> Own:
    return Own(lambda index: (torch.ones(3) * index, np.bool_(index % 2)))


def triples() -> Own:
    return Own(lambda index: (np.ones(3), np.ones(2), index % 2))


def other_keys() -> Own:
    return Own(lambda index: {"x": np.ones(3), "label" if index % 2 else "y": 1})


def unreadable() -> Own:
    def fails(index: int) -> Any:
        raise RuntimeError("the disk\nis gone")

    return Own(fails)


def failing() -> Own:
    raise ValueError("no such folder")


def number() -> int:
    return 5


def nothing() -> dict[str, Own]:
    return {}


def unlike_splits() -> dict[str, Own]:
    return {
        "train": Own(lambda index: (np.ones(3), index % 2)),
        "test": Own(lambda index: (np.ones(4), index % 2)),
    }


BAD: dict[str, tuple[Callable[[Path], str], str]] = {
    "input and target": (lambda f: table(f, "targets=y&inputs=a,y"), "both input and target"),
    "classes of no target": (lambda f: table(f, "targets=y&classes=a"), "classes of a table are"),
    "classes with fractions": (lambda f: table(f, "targets=y&classes=y"), "one whole number or"),
    "option twice": (lambda f: table(f, "targets=y&targets=a"), "option of a source table: is"),
    "few rows": (lambda f: arrays(f, a=np.ones(2), y=np.ones(2)), "test=0 for no split test"),
    "one number": (lambda f: arrays(f, a=np.float64(3), y=np.ones(3)), "no common rows"),
    "no rows": (lambda f: arrays(f, a=np.ones(0), y=np.ones(0)), "without rows"),
    "cut short": (cut_short, "not a readable .npz file"),
    "comma-separated": (comma_separated, "allowed: *.parquet, *.npz"),
    "missing labels": (lambda f: rows(f, "label=label"), "label in r.parquet: 5 of 20 rows"),
    "numbers as text": (lambda f: rows(f, "column=n&length=4"), "is no text"),
    "text as label": (lambda f: rows(f, "label=text"), "the column of text is no label"),
    "column of a text file": (lambda f: plain(f, "column=b"), "only Parquet files have"),
    "mask of another size": (
        lambda f: masks(f, smaller),
        " bytes; mask: a mask of 9x4 pixels for an image of 9x8",
    ),
    "JPEG masks": (lambda f: masks(f, lossy), "a mask as JPEG"),
    "two masks": (lambda f: masks(f, second("masks")), "two masks of one name"),
    "two images": (lambda f: masks(f, second("images")), "two images of one name"),
    "black and white masks": (lambda f: masks(f, largest=1, scale=255), "one class only"),
    "unknown category": (lambda f: boxes(f, first_box(category_id=99)), "id 99 in"),
    "unknown image": (lambda f: boxes(f, first_box(image_id=99)), "an unknown image"),
    "image id twice": (lambda f: boxes(f, lambda b: b["images"].append(b["images"][0])), "one id"),
    "category id twice": (
        lambda f: boxes(f, lambda b: b["categories"].append({"id": 7, "name": "pig"})),
        "categories of annotations have one id; given: 2 of id 7",
    ),
    "no boxes": (lambda f: boxes(f, lambda b: b["annotations"].clear()), "without a box"),
    "three values": (lambda _: f"python:{HERE}:triples", "more than two values needs their names"),
    "other keys": (lambda _: f"python:{HERE}:other_keys", "sample 1: x, label; allowed: as in"),
    "sample fails": (lambda _: f"python:{HERE}:unreadable", "RuntimeError: the disk is gone ("),
    "factory fails": (lambda _: f"python:{HERE}:failing", "ValueError: no such folder ("),
    "no dataset": (lambda _: f"python:{HERE}:number", "no map-style dataset; given: int;"),
    "no split": (lambda _: f"python:{HERE}:nothing", "returned no split"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_people_get_wrong_is_refused_in_one_line(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, expected = BAD[case]
    given = source(tmp_path)
    assert main(["shards", "make", "--source", given, "--out", str(tmp_path / "set")]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "samples (" not in x]
    assert expected in line and line.startswith("elastic-kfac: error: ")


def test_what_is_left_out_or_cut_is_named(tmp_path: Path) -> None:
    for name in ("table", "masks", "boxes"):
        (tmp_path / name).mkdir()
    city = table(tmp_path / "table", "targets=y", city=["x", "y", "z"] * 4)
    with pytest.warns(UserWarning, match="because they hold no numbers: city"):
        make_shards(city, tmp_path / "a")
    (tmp_path / "a.txt").write_text("a line\n" * 30 + "a much longer line\n" * 10)
    with pytest.warns(
        UserWarning, match="25 % of the sequences of train are cut at 8 tokens; .* 18"
    ):
        make_shards(f"text:{tmp_path / 'a.txt'}?lines=1&length=8", tmp_path / "d")
    Image.fromarray(np.zeros((4, 9), np.uint8)).save(tmp_path / "extra.png")
    more = masks(tmp_path / "masks", lambda f: (tmp_path / "extra.png").rename(f / "masks/x.png"))
    with pytest.warns(UserWarning, match="left out 1 without an image: x"):
        make_shards(more, tmp_path / "b")

    def edit(found: dict[str, Any]) -> None:
        found["annotations"][0]["bbox"] = [30, 20, 100, 100]
        found["annotations"][1]["bbox"] = [30, 20, -4, 5]

    over = boxes(tmp_path / "boxes", edit)
    with (
        pytest.warns(UserWarning, match="cut 1 box at the image's edge"),
        pytest.warns(UserWarning, match="left out 1 box without area"),
    ):
        make_shards(over, tmp_path / "c")
    counts = [
        describe_shards(tmp_path / "c")["splits"][split]["class_counts"]["cat"]
        for split in ("train", "test")
    ]
    assert sum(counts) == 5


@pytest.mark.parametrize(("factory", "classes"), [("tensor_labels", 3), ("bool_labels", 2)])
def test_labels_of_tensors_and_truth_values_are_classes(
    factory: str, classes: int, tmp_path: Path
) -> None:
    make_shards(f"python:{HERE}:{factory}", tmp_path)
    columns = describe_shards(tmp_path)["splits"]["train"]["columns"]
    assert (columns[1]["kind"], len(columns[1]["class_names"])) == ("class", classes)


def test_splits_of_tensors_of_other_shapes_are_refused(tmp_path: Path) -> None:
    make_shards(f"python:{HERE}:unlike_splits", tmp_path)
    config = parse_config({"data": {"shards": str(tmp_path)}})
    with pytest.raises(DataError, match=r"float32 \(4,\).*allowed: .*float32 \(3,\)"):
        check_splits(config)
