"""Making, continuing, verifying and describing shard sets."""

from __future__ import annotations

import dataclasses
import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from sklearn.datasets import load_digits

from elastic_kfac.data import ShardSet, describe_shards, make_shards, verify_shards
from elastic_kfac.data.shards import ShardTask
from elastic_kfac.errors import DataError

SMALL = 512 * 64 / 2**20  # 512 digits per shard: train gets 3 shards.


def columns(root: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """(pixels, labels) of a split, read with pyarrow alone."""
    tables = [pq.read_table(f) for f in sorted((root / split).glob("shard-*.parquet"))]
    pixels = b"".join(b for t in tables for b in t.column("image").to_pylist())
    labels = np.concatenate([t.column("label").to_numpy() for t in tables])
    return np.frombuffer(pixels, np.uint8).reshape(len(labels), -1), labels


def files(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if not p.name.startswith(".")}


def test_make_digits_splits_hold_every_original_once(digits: Path) -> None:
    train, test = columns(digits, "train"), columns(digits, "test")
    bunch = load_digits()
    expected = sorted(
        (np.rint(image * 255 / 16).astype(np.uint8).tobytes(), int(label))
        for image, label in zip(bunch.images, bunch.target, strict=True)
    )
    found = [
        (row.tobytes(), int(label))
        for pixels, labels in (train, test)
        for row, label in zip(pixels, labels, strict=True)
    ]
    assert sorted(found) == expected
    assert train[0].max() == 255
    share = np.bincount(test[1]) / (np.bincount(test[1]) + np.bincount(train[1]))
    assert np.abs(share - 0.2).max() < 0.005


def test_make_twice_gives_the_same_bytes(digits: Path, tmp_path: Path) -> None:
    make_shards("digits", tmp_path, shard_mib=SMALL)
    for split in ("train", "test"):
        assert files(tmp_path / split) == files(digits / split)


def test_make_shard_files_have_the_documented_layout(digits: Path) -> None:
    shards = sorted((digits / "train").glob("shard-*.parquet"))
    assert [pq.ParquetFile(s).metadata.num_rows for s in shards] == [512, 512, 414]
    column = pq.ParquetFile(shards[0]).metadata.row_group(0).column(0)
    assert column.compression == "UNCOMPRESSED"
    assert sorted(p.name for p in (digits / "train").iterdir() if p.suffix == ".tmp") == []
    assert not (digits / "train" / "making").exists()


def test_make_row_groups_are_512_rows_in_any_shard_size(tmp_path: Path) -> None:
    make_shards("digits", tmp_path, "train")
    metadata = pq.ParquetFile(tmp_path / "train" / "shard-00000.parquet").metadata
    assert [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)] == [
        512,
        512,
        414,
    ]


def test_make_normalization_equals_dense_statistics(digits: Path) -> None:
    pixels, labels = columns(digits, "train")
    shards = ShardSet.open(digits / "train")
    assert shards.image.mean[0] == pytest.approx((pixels / 255).mean(), abs=1e-6)
    assert shards.image.std[0] == pytest.approx((pixels / 255).std(), abs=1e-6)
    assert shards.class_counts == tuple(np.bincount(labels).tolist())


def test_make_again_redoes_nothing(digits: Path) -> None:
    before = files(digits / "train")
    made = make_shards("digits", digits, shard_mib=SMALL)["splits"]["train"]
    assert (made["made"], made["reused"], made["samples"]) == (0, 3, 1438)
    assert files(digits / "train") == before


def test_make_over_another_set_raises(tmp_path: Path, write_parquet: Callable[..., Path]) -> None:
    source = write_parquet([bytes([i] * 4) for i in range(10)], [0, 1] * 5, raw=True)
    make_shards("digits", tmp_path / "out", "train")
    with pytest.raises(DataError, match="already holds another shard set"):
        make_shards(f"parquet:{source}", tmp_path / "out")


KILL = f"""
import os, signal, sys
import pyarrow.parquet as pq
from elastic_kfac.data import make_shards
out, where, at = sys.argv[1], sys.argv[2], int(sys.argv[3])
calls = 0
def die(*_):
    global calls
    calls += 1
    if calls == at:
        os.kill(os.getpid(), signal.SIGKILL)
if where == "progress":
    make_shards("digits", out, "train", shard_mib={SMALL!r}, progress=die)
else:
    write = pq.ParquetWriter.write_table
    def torn(self, *args, **kwargs):
        write(self, *args, **kwargs)
        die()
    pq.ParquetWriter.write_table = torn
    make_shards("digits", out, "train", shard_mib={SMALL!r})
"""


@pytest.mark.parametrize(
    ("where", "at", "finished"), [("progress", 3, 2), ("write", 2, 1), ("progress", 4, 3)]
)
def test_make_killed_continues_to_the_same_set(
    digits: Path, tmp_path: Path, where: str, at: int, finished: int
) -> None:
    package = Path(__file__).parents[3] / "platform"
    process = subprocess.run(
        [sys.executable, "-c", KILL, str(tmp_path), where, str(at)],
        env={"PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"},
        timeout=120,
    )
    assert process.returncode == -9
    with pytest.raises(DataError, match="unfinished"):
        ShardSet.open(tmp_path / "train")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "train").glob("shard-*.parquet")}
    assert len(before) == finished
    made = make_shards("digits", tmp_path, "train", shard_mib=SMALL)["splits"]["train"]
    assert (made["made"], made["reused"]) == (3 - finished, finished)
    assert files(tmp_path / "train") == files(digits / "train")
    for name, modified in before.items():
        assert (tmp_path / "train" / name).stat().st_mtime_ns == modified


def test_make_continued_with_other_shard_size_starts_over(digits: Path, tmp_path: Path) -> None:
    def stop(split: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_shards("digits", tmp_path, "train", shard_mib=SMALL / 4, progress=stop)
    made = make_shards("digits", tmp_path, "train", shard_mib=SMALL)["splits"]["train"]
    assert made["reused"] == 0
    assert files(tmp_path / "train") == files(digits / "train")


def test_make_tasks_elsewhere_in_any_order_give_the_same_set(digits: Path, tmp_path: Path) -> None:
    def backwards(tasks: list[ShardTask]) -> list[dict[str, object]]:
        return [pickle.loads(pickle.dumps(task)).run() for task in reversed(tasks)]

    make_shards("digits", tmp_path, "train", shard_mib=SMALL, run_tasks=backwards)
    assert files(tmp_path / "train") == files(digits / "train")


def test_make_removes_what_a_killed_writer_left(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / ".shard-00001.parquet.77.ab12.tmp").write_bytes(b"half")
    (tmp_path / "train" / "shard-00099.parquet").write_bytes(b"of another plan")
    make_shards("digits", tmp_path, "train", shard_mib=SMALL)
    assert {p.name for p in (tmp_path / "train").iterdir()} == {
        p.name for p in (digits / "train").iterdir()
    }


def test_make_task_that_finds_another_source_raises(tmp_path: Path) -> None:
    def elsewhere(tasks: list[ShardTask]) -> list[dict[str, object]]:
        return [dataclasses.replace(task, content="0" * 64).run() for task in tasks]

    with pytest.raises(DataError, match=r"differs from machine to machine.*digits, split train"):
        make_shards("digits", tmp_path, "train", shard_mib=SMALL, run_tasks=elsewhere)
    assert not (tmp_path / "train" / "manifest.json").exists()


def test_make_shard_that_arrived_nowhere_raises(tmp_path: Path) -> None:
    """A record comes back, but the file lies on the other machine's own disk."""

    def elsewhere(tasks: list[ShardTask]) -> list[dict[str, object]]:
        other = str(tmp_path / "other")
        return [dataclasses.replace(task, out=other).run() for task in tasks]

    (tmp_path / "other" / "making").mkdir(parents=True)
    with pytest.raises(DataError, match=r"is not here.*shard-00000.*shared folder"):
        make_shards("digits", tmp_path, "train", shard_mib=SMALL, run_tasks=elsewhere)


def test_make_lost_task_raises_and_leaves_no_manifest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 of 3"):
        make_shards(
            "digits",
            tmp_path,
            "train",
            shard_mib=SMALL,
            run_tasks=lambda tasks: [task.run() for task in tasks[1:]],
        )
    assert not (tmp_path / "train" / "manifest.json").exists()


def test_make_at_the_same_time_raises(tmp_path: Path) -> None:
    def again(split: str, done: int, total: int) -> None:
        make_shards("digits", tmp_path, "train")

    with pytest.raises(DataError, match="another `shards make`"):
        make_shards("digits", tmp_path, "train", progress=again)


def test_make_progress_counts_to_the_end(tmp_path: Path) -> None:
    calls: list[tuple[str, int, int]] = []
    make_shards("digits", tmp_path, shard_mib=SMALL, progress=lambda *c: calls.append(c))
    assert [c for c in calls if c[0] == "train"] == [
        ("train", n, 1438) for n in (0, 512, 1024, 1438)
    ]


@pytest.mark.parametrize("size", [0.0, -1.0, 4096.0, float("nan")])
def test_make_impossible_shard_size_raises(tmp_path: Path, size: float) -> None:
    with pytest.raises(DataError, match="impossible shard size"):
        make_shards("digits", tmp_path, shard_mib=size)


def test_make_into_a_file_raises_one_line(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(DataError, match="cannot write shards"):
        make_shards("digits", tmp_path / "out")


@pytest.fixture
def copy(digits: Path, tmp_path: Path) -> Path:
    """A copy of the digits that a test may damage."""
    shutil.copytree(digits, tmp_path / "digits")
    return tmp_path / "digits"


def test_verify_whole_set_reports_what_it_read(digits: Path) -> None:
    report = verify_shards(digits)
    assert report.num_samples == 1797
    assert set(report.splits) == {"train", "test"}
    assert report.splits["train"]["shards"] == 3
    assert "1797 samples in 4 shards" in report.line()


def test_verify_flipped_byte_names_file_and_hashes(copy: Path) -> None:
    path = copy / "train" / "shard-00001.parquet"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    expected = ShardSet.open(copy / "train").shards[1].sha256
    with pytest.raises(DataError) as caught:
        verify_shards(copy)
    line = caught.value.line()
    assert "train/shard-00001.parquet" in line and expected in line and "given: sha256" in line
    assert "\n" not in line
    verify_shards(copy, deep=False)  # Quick does not read bytes, and says so.


@pytest.mark.parametrize("deep", [True, False])
def test_verify_truncated_shard_names_both_sizes(copy: Path, deep: bool) -> None:
    path = copy / "train" / "shard-00002.parquet"
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(DataError, match=f"shard-00002.*{size - 7} bytes.*{size} bytes"):
        verify_shards(copy / "train", deep=deep)


@pytest.mark.parametrize("deep", [True, False])
def test_verify_missing_shard_names_it(copy: Path, deep: bool) -> None:
    (copy / "train" / "shard-00000.parquet").unlink()
    with pytest.raises(DataError, match=r"missing.*shard-00000\.parquet"):
        verify_shards(copy, deep=deep)


def replace_shard(root: Path, table: object) -> None:
    """Puts a table in place of the first shard and makes size and hash agree with it."""
    import hashlib

    path = root / "shard-00000.parquet"
    pq.write_table(table, path, compression="NONE")
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = path.stat().st_size
    manifest["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (root / "manifest.json").write_text(json.dumps(manifest))
    (root / "manifest.sha256").unlink()


def test_verify_wrong_schema_raises(copy: Path) -> None:
    table = pq.read_table(copy / "train" / "shard-00000.parquet")
    replace_shard(copy / "train", table.rename_columns(["image", "target", "key"]))
    with pytest.raises(DataError, match="wrong schema"):
        verify_shards(copy / "train")


def test_verify_wrong_row_count_raises(copy: Path) -> None:
    table = pq.read_table(copy / "train" / "shard-00000.parquet")
    replace_shard(copy / "train", table.slice(0, 500))
    with pytest.raises(DataError, match=r"wrong number of rows.*given: 500; allowed: 512"):
        verify_shards(copy / "train")


def test_verify_label_out_of_range_raises(copy: Path) -> None:
    import pyarrow as pa

    table = pq.read_table(copy / "train" / "shard-00000.parquet")
    labels = table.column("label").to_numpy().copy()
    labels[3] = 10
    changed = table.set_column(1, table.schema.field("label"), pa.array(labels))
    replace_shard(copy / "train", changed)
    with pytest.raises(DataError, match=r"label out of range.*record 3.*10.*0 to 9"):
        verify_shards(copy / "train")


def test_verify_undecodable_image_names_the_row(
    tmp_path: Path, write_parquet: Callable[..., Path], photo: Callable[..., bytes]
) -> None:
    import pyarrow as pa

    source = write_parquet([photo(20, 20, i) for i in range(8)], [0, 1] * 4)
    make_shards(f"parquet:{source}", tmp_path / "out")
    assert verify_shards(tmp_path / "out").num_samples == 8
    table = pq.read_table(tmp_path / "out" / "train" / "shard-00000.parquet")
    images = table.column("image").to_pylist()
    images[5] = b"\xff\xd8" + images[5][40:]
    changed = table.set_column(0, table.schema.field("image"), pa.array(images, pa.binary()))
    replace_shard(tmp_path / "out" / "train", changed)
    with pytest.raises(DataError, match=r"undecodable image.*row 5"):
        verify_shards(tmp_path / "out")


def test_describe_digits_counts_and_balance(digits: Path) -> None:
    described = describe_shards(digits)["splits"]["train"]
    assert described["samples"] == 1438
    assert sum(described["class_counts"].values()) == 1438
    assert described["balance"] == {
        "smallest_class": min(described["class_counts"].values()),
        "largest_class": max(described["class_counts"].values()),
    }
    assert described["image_shape"] == (1, 8, 8)
    json.dumps(described)


def test_open_missing_uri_raises(tmp_path: Path) -> None:
    for action in (ShardSet.open, verify_shards, describe_shards):
        with pytest.raises(DataError, match="no shard set here"):
            action(tmp_path / "nowhere")


def test_open_root_names_the_splits(digits: Path) -> None:
    with pytest.raises(DataError, match="test, train"):
        ShardSet.open(digits)


def test_open_unknown_scheme_raises() -> None:
    with pytest.raises(DataError, match="cannot open the storage"):
        ShardSet.open("ftp://host/data")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: text.replace('"rows": 512', '"rows": 511', 1),
        lambda text: text.replace('"version": 1', '"version": 99'),
        lambda text: text.replace("shard-00001", "../shard-00001"),
        lambda text: "[]",
        lambda text: "",
    ],
)
def test_open_damaged_manifest_raises(copy: Path, damage: Callable[[str], str]) -> None:
    path = copy / "train" / "manifest.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(DataError, match="damaged manifest"):
        ShardSet.open(copy / "train")


def test_shard_set_pickled_is_equal(digits_train: ShardSet) -> None:
    copied = pickle.loads(pickle.dumps(digits_train))
    assert copied == digits_train and copied.manifest_sha256 == digits_train.manifest_sha256


def test_locate_every_id_equals_prefix_sums(digits_train: ShardSet) -> None:
    shards, rows = digits_train.locate(np.arange(1438))
    expected = [(s, r) for s, n in enumerate(digits_train.shard_rows) for r in range(n)]
    assert list(zip(shards.tolist(), rows.tolist(), strict=True)) == expected
