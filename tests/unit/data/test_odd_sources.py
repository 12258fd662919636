"""Sources as people find them: layouts, labels, odd columns, hidden and broken files."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from elastic_kfac.cli.entry import main
from elastic_kfac.config import parse_config
from elastic_kfac.data import ShardSet, make_shards, verify_shards
from elastic_kfac.data.dataset import check_splits
from elastic_kfac.data.shards import BadImages
from elastic_kfac.data.sources import open_source
from elastic_kfac.errors import DataError

Photo = Callable[..., bytes]


def write(
    path: Path, labels: Any, *, images: Any = None, metadata: Any = None, **more: Any
) -> None:
    """A Parquet file of raw 2x2 images; `metadata` values that are no bytes become JSON."""
    labels = labels if isinstance(labels, pa.Array) else pa.array(labels)
    raw = pa.array([bytes([i % 256] * 4) for i in range(len(labels))], pa.binary(4))
    table = pa.table({"image": raw if images is None else images, "label": labels, **more})
    texts = {
        k: v if isinstance(v, bytes) else json.dumps(v).encode()
        for k, v in (metadata or {}).items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:  # Arrow itself only opens names in UTF-8.
        pq.write_table(table.replace_schema_metadata(texts or None), file)


def made(source: str, out: Path, **options: Any) -> dict[str, ShardSet]:
    splits = make_shards(source, out, **options)["splits"]
    return {name: ShardSet.open(out / name) for name in splits}


def labels_of(root: Path) -> list[int]:
    files = sorted(root.glob("shard-*.parquet"))
    return [label for file in files for label in pq.read_table(file)["label"].to_pylist()]


def refusal(source: str, out: Path, capsys: Any) -> str:
    """The one line with which `shards make` refuses a source."""
    assert main(["shards", "make", "--source", source, "--out", str(out)]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("elastic-kfac: error: ") and captured.err.count("\n") == 1
    assert not list(out.rglob("manifest.json"))
    return str(captured.err)


CLASS_LABEL = {
    "info": {"features": {"label": {"names": ["cat", "dog", "eel"], "_type": "ClassLabel"}}}
}


@pytest.mark.parametrize(
    "files",
    [
        ["data/train-00000-of-00002-5f2a9c11d0e4b7a8.parquet", "data/train-00001-of-00002.parquet"],
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["train-1-of-2.parquet", "train-2-of-2.parquet"],
        ["train/0000.parquet", "train/0001.parquet"],
        ["default/train/0000.parquet", "default/train/0001.parquet"],
        ["partial-train/0000.parquet", "partial-train/0001.parquet"],
        ["train.parquet"],
        ["pets_train.parquet"],
        ["pets-train-00000-of-00001.parquet"],
        ["part-a.parquet", "part-b.parquet"],
    ],
    ids=lambda files: files[0],
)
def test_parquet_layouts_are_found_with_names_and_classes(files: list[str], tmp_path: Path) -> None:
    for number, name in enumerate(files):
        write(tmp_path / "set" / name, [number, 0], metadata={"huggingface": CLASS_LABEL})
    write(tmp_path / "set" / Path(files[0]).with_name("._hidden.parquet"), [9])
    (tmp_path / "set" / "README.md").write_text("about")
    train = made(f"parquet:{tmp_path / 'set'}", tmp_path / "out")["train"]
    assert train.num_samples == 2 * len(files)
    assert train.class_names == ("cat", "dog", "eel") and train.class_counts[2] == 0


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("validation-00000-of-00001.parquet", "validation"),
        ("dev.parquet", "dev"),
        ("testing/0000.parquet", "testing"),
        ("unlabeled-00000-of-00001.parquet", "unlabeled"),
    ],
)
def test_parquet_other_split_words_keep_their_name(tmp_path: Path, name: str, split: str) -> None:
    write(tmp_path / "set" / "train-00000-of-00001.parquet", [0, 1])
    where = "train/0000.parquet" if "/" in name else "train-00000-of-00001.parquet"
    write(tmp_path / "set2" / where, [0, 1])
    write(tmp_path / "set2" / name, [1, 0])
    assert sorted(made(f"parquet:{tmp_path / 'set2'}", tmp_path / "out")) == sorted(
        ["train", split]
    )


def test_parquet_missing_part_is_refused(tmp_path: Path, capsys: Any) -> None:
    for part in (0, 2):
        write(tmp_path / "set" / "data" / f"train-{part:05d}-of-00003.parquet", [0, 1])
    line = refusal(f"parquet:{tmp_path / 'set'}", tmp_path / "out", capsys)
    assert "parts of the split train are missing" in line and "download part 1 too" in line


def test_parquet_several_configurations_are_named(tmp_path: Path, capsys: Any) -> None:
    for name in ("grey", "colour"):
        write(tmp_path / "set" / name / "train" / "0000.parquet", [0, 1])
    line = refusal(f"parquet:{tmp_path / 'set'}", tmp_path / "out", capsys)
    assert "several data sets" in line and f"parquet:{tmp_path / 'set' / 'grey'}" in line


def test_shard_set_as_a_source_is_refused(tmp_path: Path, capsys: Any) -> None:
    make_shards("digits", tmp_path / "digits")
    line = refusal(f"parquet:{tmp_path / 'digits'}", tmp_path / "out", capsys)
    assert "finished shard set" in line


@pytest.mark.parametrize(
    ("labels", "names", "numbers"),
    [
        (pa.array(["dog", "cat", "dog"]), ("cat", "dog"), [1, 0, 1]),
        (pa.array(["dog", "cat", "dog"], pa.large_string()), ("cat", "dog"), [1, 0, 1]),
        (pa.array(["dog", "cat", "dog"], pa.string_view()), ("cat", "dog"), [1, 0, 1]),
        (pa.array(["dog", "cat", "dog"]).dictionary_encode(), ("cat", "dog"), [1, 0, 1]),
        (pa.array(["10", "9", "10"]), ("9", "10"), [1, 0, 1]),
        (pa.array([2, 0, 2]).dictionary_encode(), ("0", "1", "2"), [2, 0, 2]),
        (pa.array([2, 0, 2], pa.uint8()), ("0", "1", "2"), [2, 0, 2]),
        (pa.array([True, False, True]), ("0", "1"), [1, 0, 1]),
    ],
    ids=lambda value: str(value.type) if isinstance(value, pa.Array) else "",
)
def test_parquet_labels_of_any_kind_become_classes(
    labels: pa.Array, names: tuple[str, ...], numbers: list[int], tmp_path: Path
) -> None:
    write(tmp_path / "x_train.parquet", labels)
    train = made(f"parquet:{tmp_path}", tmp_path / "out")["train"]
    assert train.class_names == names and labels_of(tmp_path / "out" / "train") == numbers


def test_parquet_splits_number_text_labels_alike(tmp_path: Path) -> None:
    write(tmp_path / "s" / "train.parquet", ["eel", "cat", "dog"])
    write(tmp_path / "s" / "test.parquet", ["eel", "dog"])
    made(f"parquet:{tmp_path / 's'}", tmp_path / "out")
    assert labels_of(tmp_path / "out" / "test") == [2, 1]


def test_parquet_text_label_that_the_metadata_lacks_is_refused(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "x.parquet", ["cat", "emu"], metadata={"huggingface": CLASS_LABEL})
    line = refusal(f"parquet:{tmp_path / 'x.parquet'}", tmp_path / "out", capsys)
    assert "is not a class; given: emu" in line


def test_parquet_files_agree_in_the_used_columns_only(tmp_path: Path) -> None:
    raw = pa.array([bytes([7] * 4)] * 2, pa.binary(4))
    one = pa.table({"image": raw, "label": pa.array([0, 1], pa.int64()), "note": ["a", "b"]})
    two = pa.table({"note": [1.5, 2.5], "label": pa.array([2, 1], pa.int16()), "image": raw})
    for number, table in enumerate((one, two)):
        pq.write_table(table, tmp_path / f"train-{number}-of-2.parquet")
    made(f"parquet:{tmp_path}", tmp_path / "out")
    assert labels_of(tmp_path / "out" / "train") == [0, 1, 2, 1]


def test_parquet_files_with_other_images_are_refused(tmp_path: Path, capsys: Any) -> None:
    write(tmp_path / "train-0-of-2.parquet", [0])
    write(tmp_path / "train-1-of-2.parquet", [0], images=pa.array([b"\0" * 9], pa.binary(9)))
    line = refusal(f"parquet:{tmp_path}", tmp_path / "out", capsys)
    assert "different image or label columns" in line


@pytest.mark.parametrize(
    ("labels", "passes"),
    [
        ([0, 1, 3_000_000, 1], False),
        ([*range(10), 70_000], False),
        ([0, 999], True),
        (list(range(3000)), True),
    ],
)
def test_parquet_ids_are_no_classes(labels: list[int], passes: bool, tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", labels)
    if passes:
        train = made(f"parquet:{tmp_path / 'x.parquet'}", tmp_path / "out")["train"]
        assert train.num_classes == max(labels) + 1
    else:
        with pytest.raises(DataError, match="look like ids, not classes"):
            made(f"parquet:{tmp_path / 'x.parquet'}", tmp_path / "out")


def png(value: int = 0) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (3, 2), (value, value, value)).save(out, "PNG")
    return out.getvalue()


ODD_IMAGES = {
    "list": pa.array([[1, 2], [3, 4]], pa.list_(pa.uint8())),
    "nested list": pa.array([[[1.0]], [[2.0]]]),
    "string": pa.array(["a.png", "b.png"]),
    "float": pa.array([0.5, 1.5]),
    "integer": pa.array([1, 2]),
    "null": pa.nulls(2),
    "struct without bytes": pa.array([{"path": "a"}, {"path": "b"}]),
    "struct of text": pa.array([{"bytes": "a"}, {"bytes": "b"}]),
    "dictionary": pa.array([b"a", b"b"]).dictionary_encode(),
    "tensor": pa.ExtensionArray.from_storage(
        pa.fixed_shape_tensor(pa.uint8(), (2, 2)),
        pa.array([[1, 2, 3, 4]] * 2, pa.list_(pa.uint8(), 4)),
    ),
    "timestamp": pa.array([1, 2], pa.timestamp("s")),
}


@pytest.mark.parametrize("kind", ODD_IMAGES)
def test_parquet_image_column_of_another_kind_is_refused(
    kind: str, tmp_path: Path, capsys: Any
) -> None:
    write(tmp_path / "x.parquet", [0, 1], images=ODD_IMAGES[kind])
    line = refusal(f"parquet:{tmp_path / 'x.parquet'}", tmp_path / "out", capsys)
    assert "image" in line


@pytest.mark.parametrize("kind", [pa.large_binary(), pa.binary_view(), pa.binary()], ids=str)
def test_parquet_binary_images_of_any_kind_are_read(kind: pa.DataType, tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", [0, 1], images=pa.array([png(), png(9)], kind))
    train = made(f"parquet:{tmp_path / 'x.parquet'}", tmp_path / "out")["train"]
    assert train.image.shape == (3, 2, 3)


@pytest.mark.parametrize(
    "labels",
    [
        pa.array([0.0, 1.0]),
        pa.array([[0], [1]]),
        pa.array([{"a": 0}, {"a": 1}]),
        pa.nulls(2),
        pa.array([0, None]),
        pa.array(["a", None]),
        pa.array([b"a", b"b"]),
        pa.array([0, -1]),
        pa.array([0, 1], pa.timestamp("s")),
        pa.array([0, 2**63], pa.uint64()),
    ],
    ids=lambda labels: str(labels.type),
)
def test_parquet_label_column_of_another_kind_is_refused(
    labels: pa.Array, tmp_path: Path, capsys: Any
) -> None:
    write(tmp_path / "x.parquet", labels)
    line = refusal(f"parquet:{tmp_path / 'x.parquet'}", tmp_path / "out", capsys)
    assert "label" in line


@pytest.mark.parametrize("name", ["image", "label", "key"])
def test_parquet_two_columns_of_one_name(name: str, tmp_path: Path, capsys: Any) -> None:
    columns = {
        "image": pa.array([b"\0" * 4], pa.binary(4)),
        "label": pa.array([0]),
        "key": pa.array(["k"]),
    }
    arrays, names = [*columns.values(), columns[name]], [*columns, name]
    pq.write_table(pa.Table.from_arrays(arrays, names=names), tmp_path / "x.parquet")
    source = f"parquet:{tmp_path / 'x.parquet'}"
    if name == "key":  # It only names records.
        assert made(source, tmp_path / "out")["train"].num_samples == 1
    else:
        assert f"several columns {name}" in refusal(source, tmp_path / "out", capsys)


@pytest.mark.parametrize(
    "metadata",
    [
        {"class_names": b"cat, dog"},
        {"class_names": b"\xff\xfe"},
        {"class_names": {"0": "cat"}},
        {"class_names": [1, 2]},
        {"class_names": b"[]"},
        {"class_names": ["cat", "cat"]},
        {"huggingface": b"{"},
        {"huggingface": b"\xff"},
        {"huggingface": {"info": {"features": {"label": {"names": "cat", "_type": "ClassLabel"}}}}},
        {"height": b"two", "width": b"2"},
        {"height": b"-2", "width": b"-2"},
        {"layout": b"\xff"},
    ],
    ids=str,
)
def test_parquet_metadata_that_cannot_be_read_is_refused(
    metadata: dict[str, Any], tmp_path: Path, capsys: Any
) -> None:
    write(tmp_path / "x.parquet", [0, 1], metadata=metadata)
    refusal(f"parquet:{tmp_path / 'x.parquet'}", tmp_path / "out", capsys)


@pytest.mark.parametrize(
    "metadata",
    [
        {"other": b"\xff\xfe"},
        {"huggingface": [1]},
        {"huggingface": {"info": None}},
        {"pandas": b"{"},
    ],
    ids=str,
)
def test_parquet_metadata_of_others_does_not_matter(metadata: Any, tmp_path: Path) -> None:
    write(tmp_path / "x.parquet", [0, 1], metadata=metadata)
    assert made(f"parquet:{tmp_path / 'x.parquet'}", tmp_path / "out")["train"].num_classes == 2


def test_parquet_paths_instead_of_images_are_refused(tmp_path: Path, capsys: Any) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": "/data/1.png"}] * 2, kind)
    write(tmp_path / "x.parquet", [0, 1], images=images)
    line = refusal(f"parquet:{tmp_path / 'x.parquet'}", tmp_path / "out", capsys)
    assert "holds the paths of images" in line and "/data/1.png" in line


def test_parquet_described_columns_are_found_by_their_kind(tmp_path: Path) -> None:
    features = {
        "picture": {"_type": "Image"},
        "breed": {"_type": "ClassLabel", "names": ["pug", "husky"]},
    }
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": png(), "path": "a"}] * 2, kind)
    table = pa.table({"picture": images, "breed": [1, 0]})
    text = json.dumps({"info": {"features": features}})
    pq.write_table(table.replace_schema_metadata({"huggingface": text}), tmp_path / "x.parquet")
    train = made(f"parquet:{tmp_path / 'x.parquet'}", tmp_path / "out")["train"]
    assert train.class_names == ("pug", "husky")


def test_parquet_corrected_labels_are_noticed(tmp_path: Path, capsys: Any) -> None:
    """Two labels of an early row group, in a file of the same size."""
    labels = [i % 7 for i in range(40_000)]

    def store() -> None:
        raw = pa.array([bytes([i % 251] * 16) for i in range(40_000)], pa.binary(16))
        table = pa.table({"image": raw, "label": labels})
        pq.write_table(table, tmp_path / "x.parquet", row_group_size=5000, compression="none")

    store()
    source = f"parquet:{tmp_path / 'x.parquet'}"
    before = make_shards(source, tmp_path / "out")["splits"]["train"]
    assert make_shards(source, tmp_path / "out")["splits"]["train"]["made"] == 0
    size = (tmp_path / "x.parquet").stat().st_size
    labels[100], labels[101] = labels[101], labels[100]
    store()
    assert (tmp_path / "x.parquet").stat().st_size == size
    line = refused_again(source, tmp_path / "out", capsys)
    assert "already holds another shard set" in line
    after = make_shards(source, tmp_path / "new")["splits"]["train"]
    assert after["manifest_sha256"] != before["manifest_sha256"]


def refused_again(source: str, out: Path, capsys: Any) -> str:
    capsys.readouterr()
    assert main(["shards", "make", "--source", source, "--out", str(out)]) == 2
    return str(capsys.readouterr().err)


def test_parquet_one_changed_pixel_is_noticed(tmp_path: Path, capsys: Any) -> None:
    raw = bytearray(os.urandom(16 * 40_000))
    path = tmp_path / "x.parquet"

    def store() -> None:
        images = pa.array([bytes(raw[i : i + 16]) for i in range(0, len(raw), 16)], pa.binary(16))
        table = pa.table({"image": images, "label": [0] * len(images)})
        pq.write_table(
            table, path, compression="none", write_statistics=False, use_dictionary=False
        )

    store()
    make_shards(f"parquet:{path}", tmp_path / "out")
    raw[5] ^= 1
    store()
    assert "another shard set" in refused_again(f"parquet:{path}", tmp_path / "out", capsys)


def folder(root: Path, photo: Photo, classes: str = "ab", count: int = 3) -> Path:
    for name in classes:
        (root / name).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            (root / name / f"{i}.jpg").write_bytes(photo(8, 9, i))
    return root


def test_imagefolder_leaves_out_what_is_hidden(tmp_path: Path, photo: Photo) -> None:
    root = folder(tmp_path / "set", photo)
    for hidden in (
        ".ipynb_checkpoints/0.jpg",
        "__MACOSX/a/0.jpg",
        "a/._0.jpg",
        "a/.ipynb_checkpoints/0-checkpoint.jpg",
        "a/__MACOSX/1.jpg",
        "b/.DS_Store",
        "b/@eaDir/0.jpg",
        ".git/0.png",
        "a/.hidden.png",
        ".Trash-1000/files/0.jpg",
        "__pycache__/0.png",
    ):
        (root / hidden).parent.mkdir(parents=True, exist_ok=True)
        (root / hidden).write_bytes(photo(5, 5))
    train = made(f"imagefolder:{root}", tmp_path / "out")["train"]
    assert train.class_names == ("a", "b") and train.class_counts == (3, 3)


def test_imagefolder_follows_links_to_folders_once(tmp_path: Path, photo: Photo) -> None:
    root = folder(tmp_path / "set", photo)
    folder(tmp_path / "elsewhere", photo, "x", 2)
    (root / "a" / "more").symlink_to(tmp_path / "elsewhere" / "x")
    (root / "a" / "loop").symlink_to(root / "a")
    assert made(f"imagefolder:{root}", tmp_path / "out")["train"].class_counts == (5, 3)


def test_imagefolder_files_that_cannot_be_used_are_refused(
    tmp_path: Path, photo: Photo, capsys: Any
) -> None:
    root = folder(tmp_path / "set", photo)
    bad = root / "a" / "gone.jpg"
    bad.symlink_to(tmp_path / "nothing")
    assert "gone.jpg" in refusal(f"imagefolder:{root}", tmp_path / "out", capsys)
    bad.unlink()
    name = os.fsdecode(bytes(root / "a") + b"/caf\xe9.jpg")
    Path(name).write_bytes(photo(8, 9))
    assert "UTF-8" in refusal(f"imagefolder:{root}", tmp_path / "out", capsys)


@pytest.mark.parametrize("kind", ["imagefolder", "parquet", "ilsvrc"])
def test_source_and_output_paths_that_are_not_utf8(
    kind: str, tmp_path: Path, photo: Photo, capsys: Any
) -> None:
    odd = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9"))
    folder(odd / "train", photo)
    write(odd / "x_train.parquet", [0, 1])
    code = main(["shards", "make", "--source", f"{kind}:{odd}", "--out", str(tmp_path / "out")])
    assert code in (0, 2) and capsys.readouterr().err.count("\n") <= 1
    assert main(["shards", "make", "--source", "digits", "--out", str(odd / "out")]) == 2
    assert "UTF-8" in capsys.readouterr().err


def test_bad_images_are_left_out_up_to_a_limit(tmp_path: Path, photo: Photo, capsys: Any) -> None:
    root = folder(tmp_path / "set", photo, "ab", 40)
    for name in ("a/3.jpg", "a/7.jpg", "b/5.jpg"):
        (root / name).write_bytes(b"no image")
    words = ["shards", "make", "--source", f"imagefolder:{root}", "--out", str(tmp_path / "out")]
    assert main(words) == 2
    assert "--bad-records skip" in capsys.readouterr().err
    assert main([*words, "--bad-records", "skip", "--max-bad-records", "2"]) == 2
    assert "too many images cannot be decoded" in capsys.readouterr().err
    assert main([*words, "--bad-records", "quarantine", "--max-bad-records", "3"]) == 0
    assert "left out 3 bad images" in capsys.readouterr().out
    train = ShardSet.open(tmp_path / "out" / "train")
    assert train.class_counts == (38, 39)
    lines = (tmp_path / "out" / "train" / "quarantine.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in lines) == ["a/3.jpg", "a/7.jpg", "b/5.jpg"]
    verify_shards(tmp_path / "out")


def test_bad_images_give_the_same_set_however_it_is_cut(tmp_path: Path, photo: Photo) -> None:
    root = folder(tmp_path / "set", photo, "a", 30)
    for i in range(0, 30, 2):
        (root / "a" / f"{i}.jpg").write_bytes(b"no image")
    rows = []
    for number, mib in enumerate((128, 1e-9)):  # One shard, and one per sample: half are empty.
        out = tmp_path / str(number)
        train = made(f"imagefolder:{root}", out, shard_mib=mib, bad_images=BadImages("skip"))[
            "train"
        ]
        files = [out / "train" / shard.file for shard in train.shards]
        rows.append([key for file in files for key in pq.read_table(file)["key"].to_pylist()])
        assert train.num_samples == 15
        verify_shards(out)
    assert rows[0] == rows[1]


def test_source_of_bad_images_only_is_refused(tmp_path: Path, photo: Photo) -> None:
    root = folder(tmp_path / "set", photo, "a", 0)
    (root / "a" / "0.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="no record of the source can be decoded"):
        make_shards(f"imagefolder:{root}", tmp_path / "out", bad_images=BadImages("skip"))


def test_image_larger_than_the_limit_is_bad(tmp_path: Path, photo: Photo) -> None:
    root = folder(tmp_path / "set", photo)
    (root / "a" / "large.jpg").write_bytes(photo(90, 100))
    with pytest.raises(DataError, match=r"90x100 pixels; at most 8,000"):
        made(f"imagefolder:{root}", tmp_path / "x", bad_images=BadImages(max_pixels=8000))
    limited = BadImages("skip", max_pixels=8000)
    assert made(f"imagefolder:{root}", tmp_path / "y", bad_images=limited)["train"].num_samples == 6


def config_of(root: Path, **data: Any) -> Any:
    return parse_config({"data": {"shards": str(root), **data}})


def test_splits_with_other_class_numbers_are_refused(tmp_path: Path, photo: Photo) -> None:
    for split, classes in (("train", "ab"), ("test", "bc")):
        root = folder(tmp_path / "set" / split, photo, classes)
        make_shards(f"imagefolder:{root}", tmp_path / "out", split)
    with pytest.raises(DataError, match=r"class 0 is a in train and b in test"):
        check_splits(config_of(tmp_path / "out"))


@pytest.mark.parametrize("kind", ["imagefolder", "parquet"])
def test_class_that_only_the_test_split_has_is_refused(
    kind: str, tmp_path: Path, photo: Photo
) -> None:
    for split, classes in (("train", "abd"), ("test", "abcd")):
        folder(tmp_path / "imagefolder" / split, photo, classes)
        write(tmp_path / "parquet" / f"{split}.parquet", ["abcd".index(c) for c in classes])
    make_shards(f"{kind}:{tmp_path / kind}", tmp_path / "out")
    name = "c" if kind == "imagefolder" else "2"
    with pytest.raises(DataError, match=rf"classes that train has none of; given: {name}"):
        check_splits(config_of(tmp_path / "out"))


def test_split_that_is_called_otherwise_is_named(tmp_path: Path, photo: Photo) -> None:
    for split in ("train", "val"):
        folder(tmp_path / "set" / split, photo)
    make_shards(f"imagefolder:{tmp_path / 'set'}", tmp_path / "out")
    with pytest.raises(DataError, match=r"data\.eval_split=test; allowed: train, val; add --set "):
        check_splits(config_of(tmp_path / "out"))
    check_splits(config_of(tmp_path / "out", eval_split="val"))


def test_train_split_smaller_in_classes_than_named_is_fine(tmp_path: Path) -> None:
    write(tmp_path / "s" / "train.parquet", [0, 1, 2])
    write(tmp_path / "s" / "test.parquet", np.array([1, 1]))
    made(f"parquet:{tmp_path / 's'}", tmp_path / "out")
    check_splits(config_of(tmp_path / "out"))


@pytest.mark.parametrize(
    ("source", "meant"),
    [
        ("set", "imagefolder:set"),
        ("rows.parquet", "parquet:rows.parquet"),
        ("boxes.json", "coco:boxes.json"),
        ("rows.csv", None),
        ("Digits", "digits"),
        ("mnist", "torchvision:MNIST"),
        ("cifar-10", None),
        ("image_folder:set", "imagefolder"),
        ("torchvision:Cifar10", "CIFAR10"),
        ("s3://bucket/set", None),
    ],
)
def test_unknown_source_names_the_one_that_was_meant(
    source: str, meant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "set").mkdir()
    for name in ("rows.parquet", "boxes.json", "rows.csv"):
        (tmp_path / name).touch()
    with pytest.raises(DataError) as caught:
        open_source(source)
    assert caught.value.change == (meant and f"did you mean {meant}?")
