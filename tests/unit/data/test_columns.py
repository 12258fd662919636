"""Columns besides images and classes: what sources write is what batches hold."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from elastic_kfac.cli import main
from elastic_kfac.config import parse_config
from elastic_kfac.data import ShardSet, describe_shards, make_shards, verify_shards
from elastic_kfac.data.batch import Fields
from elastic_kfac.data.contact_sheet import contact_sheet
from elastic_kfac.data.dataset import open_split
from elastic_kfac.data.stream import SampleStream
from elastic_kfac.errors import DataError
from support.task_models import Mixed


def stream(folder: Path, split: str = "train", **options: object) -> SampleStream:
    given = {"seed": 3, "cache_dir": str(folder / "cache"), **options}
    return SampleStream(ShardSet.open(folder / "set" / split), **given)  # type: ignore[arg-type]


@pytest.fixture
def sentences(tmp_path: Path) -> tuple[Path, list[str]]:
    draw = np.random.default_rng(0)
    rows = ["ab " * int(n) + f"row {i}" for i, n in enumerate(draw.integers(0, 9, 90))]
    names = ["even" if i % 2 == 0 else "odd" for i in range(90)]
    pq.write_table(pa.table({"text": rows, "label": names}), tmp_path / "rows.parquet")
    return tmp_path, rows


@pytest.mark.parametrize("shard_mib", [0.001, 128])
def test_token_sequences_come_back_whole_with_their_masks(
    sentences: tuple[Path, list[str]], shard_mib: float
) -> None:
    folder, rows = sentences
    make_shards(f"text:{folder / 'rows.parquet'}?label=label", folder / "set", shard_mib=shard_mib)
    found = {}
    for split in ("train", "test"):
        with stream(folder, split) as opened:
            batch = opened.read(0, 0, opened.num_samples)
            column = opened.columns[0]
            assert isinstance(batch.inputs, Fields)
            tokens, real = batch.inputs["tokens"], batch.inputs["tokens_mask"]
            assert tokens.shape == (opened.num_samples, column.longest)
            assert int(tokens[~real].abs().max()) == 0
            for row, mask, label in zip(tokens, real, batch.targets.tolist(), strict=True):
                found[bytes(row[mask].to(torch.uint8).tolist()).decode()] = label
    assert found == {row: i % 2 for i, row in enumerate(rows)}
    assert verify_shards(folder / "set").num_samples == 90


def test_both_splits_are_padded_to_the_longest_sequence(
    sentences: tuple[Path, list[str]],
) -> None:
    folder, rows = sentences
    make_shards(f"text:{folder / 'rows.parquet'}?label=label", folder / "set")
    config = parse_config({"data": {"shards": str(folder / "set"), "cache_dir": str(folder / "c")}})
    longest = max(map(len, rows))
    for split in ("train", "test"):
        with open_split(config, split) as opened:
            assert opened.input_shape == (longest,)
            assert opened.read(0, 0, 4).inputs["tokens"].shape == (4, longest)


def test_blocks_of_text_join_to_the_text(tmp_path: Path) -> None:
    text = "".join(chr(97 + i % 23) for i in range(1000)) + "é"
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    make_shards(f"text:{tmp_path / 'a.txt'}?tokenizer=characters&length=10", tmp_path / "set")
    alphabet = sorted(set(text))
    parts = {}
    for split in ("train", "test"):
        with stream(tmp_path, split, shuffle=False) as opened:
            batch = opened.read(0, 0, opened.num_samples)
            assert opened.columns[0].vocabulary == len(alphabet) == opened.num_outputs
            for row in batch.inputs.tolist():
                parts["".join(alphabet[token] for token in row)] = split
    blocks = [text[i : i + 10] for i in range(0, 1000, 10)]
    assert set(parts) == set(blocks)
    # The test split is the end of the text, not blocks between those of the training split.
    assert [parts[block] for block in blocks[-5:]].count("test") > 0


def test_tokenizer_file_gives_its_tokens_and_their_length(tmp_path: Path) -> None:
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.WordLevel(
        {"the": 0, "cat": 1, "sat": 2, "[UNK]": 3}, unk_token="[UNK]"
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "words.json"))
    (tmp_path / "a.txt").write_text("the cat sat " * 40)
    source = f"text:{tmp_path / 'a.txt'}?tokenizer={tmp_path / 'words.json'}&length=6&test=0"
    make_shards(source, tmp_path / "set")
    with stream(tmp_path) as opened:
        column = opened.columns[0]
        assert (column.vocabulary, column.bytes_per_token) == (4, 4.0)
        assert opened.read(0, 0, 20).inputs.tolist() == [[0, 1, 2, 0, 1, 2]] * 20


def test_table_features_and_targets_keep_their_rows(tmp_path: Path) -> None:
    draw = np.random.default_rng(0)
    arrays = {
        "a": draw.normal(size=50),
        "b": draw.normal(5, 3, 50),
        "grid": draw.normal(size=(50, 2, 3)),
    }
    arrays["y"] = arrays["a"] * 2 - arrays["b"]
    np.savez(tmp_path / "data.npz", **arrays)
    make_shards(f"table:{tmp_path / 'data.npz'}?targets=y&test=0.2", tmp_path / "set")
    seen = 0
    for split in ("train", "test"):
        with stream(tmp_path, split) as opened:
            batch = opened.read(0, 0, opened.num_samples)
            features, grid = batch.inputs["features"].numpy(), batch.inputs["grid"].numpy()
            np.testing.assert_allclose(
                batch.targets[:, 0], features[:, 0] * 2 - features[:, 1], rtol=1e-5
            )
            rows = [int(np.abs(arrays["a"] - value).argmin()) for value in features[:, 0]]
            np.testing.assert_allclose(grid, arrays["grid"][rows], rtol=1e-6)
            column = opened.columns[0]
            np.testing.assert_allclose(column.mean, features.mean(axis=0), rtol=1e-5)
            np.testing.assert_allclose(column.std, features.std(axis=0), rtol=1e-5)
            seen += len(rows)
    assert seen == 50


def scenes(folder: Path) -> None:
    """A bright rectangle whose red value also is in the mask, and its box."""
    draw = np.random.default_rng(0)
    (folder / "images").mkdir()
    (folder / "masks").mkdir()
    pictures, annotations = [], []
    for index in range(24):
        height, width = 40 + index % 3, 48
        pixels = np.zeros((height, width, 3), dtype=np.uint8)
        mask = np.zeros((height, width), dtype=np.uint8)
        top, left = (int(v) for v in draw.integers(4, 16, 2))
        pixels[top : top + 16, left : left + 20] = 255
        mask[top : top + 16, left : left + 20] = 1
        Image.fromarray(pixels).save(folder / "images" / f"{index}.png")
        Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
        pictures.append({"id": index, "file_name": f"{index}.png"})
        box = {"image_id": index, "category_id": 5, "bbox": [left, top, 20, 16]}
        annotations.append({**box, "id": index})
    found = {"images": pictures, "annotations": annotations, "categories": [{"id": 5, "name": "x"}]}
    (folder / "boxes.json").write_text(json.dumps(found))


@pytest.mark.parametrize("augment", ["none", "crop_flip", "random_resized_crop"])
def test_masks_follow_their_images(tmp_path: Path, augment: str) -> None:
    scenes(tmp_path)
    make_shards(f"masks:{tmp_path}?test=0", tmp_path / "set")
    with stream(tmp_path, image_size=32, augment=augment) as opened:
        assert opened.columns[1].class_names == ("0", "1")
        for epoch in range(3):
            batch = opened.read(epoch, 0, 24)
            bright = batch.inputs[:, 0] > 127
            known = batch.targets != 255
            wrong = known & (bright != (batch.targets == 1))
            # Edges are interpolated in the image only.
            assert float(wrong.double().mean()) < 0.02
            assert (augment == "crop_flip") == bool((~known).any())
            assert not bool(bright[~known].any())


@pytest.mark.parametrize("augment", ["none", "crop_flip", "random_resized_crop"])
def test_boxes_follow_their_images(tmp_path: Path, augment: str) -> None:
    scenes(tmp_path)
    make_shards(f"coco:{tmp_path / 'boxes.json'}?test=0", tmp_path / "set")
    compared = 0
    with stream(tmp_path, image_size=32, augment=augment) as opened:
        for epoch in range(3):
            batch = opened.read(epoch, 0, 24)
            for image, boxes in zip(batch.inputs, batch.targets, strict=True):
                bright = image[0] > 127
                if boxes[0, 4] < 0:
                    assert float(bright.double().mean()) < 0.2
                    continue
                rows, columns = bright.any(dim=1).nonzero(), bright.any(dim=0).nonzero()
                edges = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
                assert (boxes[0, :4] - torch.tensor(edges)).abs().max() <= 1.5
                compared += 1
    assert compared > 50


def test_sets_of_other_columns_are_described_and_drawn(
    sentences: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, rows = sentences
    make_shards(f"text:{folder / 'rows.parquet'}?label=label", folder / "set")
    described = describe_shards(folder / "set")["splits"]["train"]
    assert [each["kind"] for each in described["columns"]] == ["tokens", "class"]
    assert described["class_counts"].keys() == {"even", "odd"}
    count = contact_sheet(ShardSet.open(folder / "set" / "train"), folder / "sheet.png")
    assert 0 < count <= 60
    pixels = np.asarray(Image.open(folder / "sheet.png").convert("L"))
    assert 0.001 < (pixels < 128).mean() < 0.5
    manifest = json.loads((folder / "set" / "train" / "manifest.json").read_text())
    assert manifest["version"] == 2


def nan_table(folder: Path) -> str:
    np.savez(folder / "x.npz", a=np.array([1.0, np.nan, 2.0]), y=np.arange(3.0))
    return f"table:{folder / 'x.npz'}?targets=y"


def no_target(folder: Path) -> str:
    np.savez(folder / "x.npz", a=np.ones(3), y=np.arange(3.0))
    return f"table:{folder / 'x.npz'}?targets=z"


def unknown_option(folder: Path) -> str:
    (folder / "a.txt").write_text("text")
    return f"text:{folder / 'a.txt'}?size=3"


def short_text(folder: Path) -> str:
    (folder / "a.txt").write_text("text")
    return f"text:{folder / 'a.txt'}"


def class_beyond_names(folder: Path) -> str:
    scenes(folder)
    return f"masks:{folder}?classes=only"


def missing_image(folder: Path) -> str:
    scenes(folder)
    (folder / "images" / "3.png").unlink()
    return f"coco:{folder / 'boxes.json'}"


def not_coco(folder: Path) -> str:
    (folder / "a.json").write_text("[1, 2]")
    return f"coco:{folder / 'a.json'}"


def not_there(folder: Path) -> str:
    return "python:nowhere.at:all"


BAD = {
    nan_table: "not finite",
    no_target: "no such column",
    unknown_option: "bad options",
    short_text: "shorter than one block",
    class_beyond_names: "class 1 in a mask of 1 classes",
    missing_image: "images of the annotations are missing",
    not_coco: "not annotations in COCO's form",
    not_there: "cannot be imported",
}


@pytest.mark.parametrize("source", BAD)
def test_bad_source_is_refused_in_one_line(
    source: Callable[[Path], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = source(tmp_path)
    assert main(["shards", "make", "--source", given, "--out", str(tmp_path / "set")]) == 2
    error = capsys.readouterr().err.strip()
    assert BAD[source] in error and "Traceback" not in error
    assert not (tmp_path / "set" / "train" / "manifest.json").exists()


def test_damaged_tokens_are_found(sentences: tuple[Path, list[str]]) -> None:
    folder, _ = sentences
    make_shards(f"text:{folder / 'rows.parquet'}?label=label", folder / "set")
    path = next((folder / "set" / "train").glob("shard-*.parquet"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match="corrupt shard"):
        verify_shards(folder / "set")


def test_own_dataset_of_every_kind_comes_back(tmp_path: Path) -> None:
    make_shards("python:support.task_models:Mixed?test=0", tmp_path / "set")
    original = Mixed()
    with stream(tmp_path) as opened:
        kinds = {column.name: (column.kind, column.role) for column in opened.columns}
        batch = opened.read(0, 0, 20)
        order = opened.shard_set
    assert kinds == {
        "picture": ("image", "input"),
        "words": ("tokens", "input"),
        "depth": ("tensor", "input"),
        "label": ("class", "target"),
        "mask": ("mask", "target"),
        "boxes": ("boxes", "target"),
    }
    assert len(order.columns[4].class_names) == 2 and len(order.columns[5].class_names) == 2
    inputs, targets = batch.inputs, batch.targets
    for place in range(20):
        index = int(inputs["depth"][place, 0])
        assert np.array_equal(inputs["picture"][place], original.images[index])
        words = inputs["words"][place][inputs["words_mask"][place]]
        assert words.tolist() == original.tokens[index].tolist()
        assert int(targets["label"][place]) == index % 4
        assert np.array_equal(targets["mask"][place], original.images[index, 0] > 127)
        boxes = targets["boxes"][place]
        real = boxes[boxes[:, 4] >= 0]
        assert np.array_equal(real, original.boxes[index].reshape(-1, 5))
    assert sorted(inputs["depth"][:, 0].tolist()) == list(range(20))
    assert verify_shards(tmp_path / "set").num_samples == 20
