"""Class folders, torchvision and ILSVRC2012-shaped tars."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.io

from elastic_kfac.data import SampleStream, ShardSet, make_shards, verify_shards
from elastic_kfac.errors import DataError

Photo = Callable[..., bytes]


def rows(root: Path, split: str) -> dict[str, tuple[bytes, int]]:
    """key -> (image, label) of everything in a split."""
    result = {}
    for file in sorted((root / split).glob("shard-*.parquet")):
        for row in pq.read_table(file).to_pylist():
            assert row["key"] not in result
            result[row["key"]] = (row["image"], row["label"])
    return result


def test_imagefolder_splits_share_one_class_numbering(tmp_path: Path, photo: Photo) -> None:
    expected: dict[str, dict[str, tuple[bytes, int]]] = {"train": {}, "val": {}}
    for split, classes in (("train", "acb"), ("val", "cb")):
        for name in classes:
            folder = tmp_path / "set" / split / name
            folder.mkdir(parents=True)
            for i in range(5):
                kind = "PNG" if i == 2 else "JPEG"
                data = photo(10 + i, 12, ord(name) * 10 + i, kind)
                (folder / f"{i}.{kind.lower()}").write_bytes(data)
                expected[split][f"{name}/{i}.{kind.lower()}"] = (data, "abc".index(name))
            (folder / "notes.txt").write_text("not an image")
    made = make_shards(f"imagefolder:{tmp_path / 'set'}", tmp_path / "out")
    assert made["splits"]["train"]["samples"] == 15
    for split in ("train", "val"):
        assert rows(tmp_path / "out", split) == expected[split]
    val = ShardSet.open(tmp_path / "out" / "val")
    assert val.class_names == ("a", "b", "c") and val.class_counts == (0, 5, 5)


def test_imagefolder_split_folders_are_found_under_the_names_that_people_give(
    tmp_path: Path, photo: Photo
) -> None:
    for split in ("Training", "Testing"):
        for name in "ab":
            (tmp_path / "set" / split / name).mkdir(parents=True)
            (tmp_path / "set" / split / name / "0.png").write_bytes(photo(8, 8, 1, "PNG"))
    made = make_shards(f"imagefolder:{tmp_path / 'set'}", tmp_path / "out")
    assert set(made["splits"]) == {"train", "test"}
    (tmp_path / "set" / "train").mkdir()
    with pytest.raises(DataError, match="two folders of the split train; given: Training, train"):
        make_shards(f"imagefolder:{tmp_path / 'set'}", tmp_path / "again")


def test_imagefolder_what_is_left_out_is_named(tmp_path: Path, photo: Photo) -> None:
    for name in "ab":
        (tmp_path / "set" / "train" / name).mkdir(parents=True)
        (tmp_path / "set" / "train" / name / "0.png").write_bytes(photo(8, 8, 1, "PNG"))
        (tmp_path / "set" / "train" / name / "1.HEIC").write_bytes(b"x")
        (tmp_path / "set" / "train" / name / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "set" / "train" / "empty").mkdir()
    (tmp_path / "set" / "unlabelled").mkdir()
    with pytest.warns(UserWarning) as caught:
        make_shards(f"imagefolder:{tmp_path / 'set'}", tmp_path / "out")
    said = [str(warning.message).partition(": ")[2] for warning in caught]
    assert said[0].startswith("left out unlabelled, which are no splits (train, test, val")
    assert said[1:] == [
        "no images of the classes 'empty'",
        "left out files that are no images: 2 .heic",
    ]


def test_shards_inside_an_image_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--out lies inside the source"):
        make_shards(f"imagefolder:{tmp_path}", tmp_path / "shards")
    assert not list(tmp_path.iterdir())


def test_imagefolder_samples_are_mixed_before_the_cut(tmp_path: Path, photo: Photo) -> None:
    image = photo(8, 8)
    for name in "ab":
        (tmp_path / "set" / name).mkdir(parents=True)
        for i in range(60):
            (tmp_path / "set" / name / f"{i}.jpg").write_bytes(image)
    make_shards(
        f"imagefolder:{tmp_path / 'set'}", tmp_path / "out", shard_mib=30 * len(image) / 2**20
    )
    shards = ShardSet.open(tmp_path / "out" / "train")
    assert len(shards.shards) == 4
    for shard in shards.shards:
        labels = pq.read_table(tmp_path / "out" / "train" / shard.file).column("label").to_numpy()
        assert 5 < labels.sum() < 25


def test_imagefolder_changed_while_interrupted_starts_over(tmp_path: Path, photo: Photo) -> None:
    folder = tmp_path / "set" / "a"
    folder.mkdir(parents=True)
    for i in range(30):
        (folder / f"{i}.jpg").write_bytes(photo(8, 8, i))

    def stop(split: str, done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    source, size = f"imagefolder:{tmp_path / 'set'}", 5000 / 2**20
    with pytest.raises(KeyboardInterrupt):
        make_shards(source, tmp_path / "out", shard_mib=size, progress=stop)
    (folder / "new.jpg").write_bytes(photo(8, 8, 99))
    made = make_shards(source, tmp_path / "out", shard_mib=size)["splits"]["train"]
    assert made["reused"] == 0 and made["samples"] == 31
    verify_shards(tmp_path / "out")


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir()])
def test_imagefolder_missing_or_empty_raises(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / "set")
    with pytest.raises(DataError, match=r"no such image folder|no class folders"):
        make_shards(f"imagefolder:{tmp_path / 'set'}", tmp_path / "out")


def write_idx(path: Path, values: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape)
    with gzip.open(path.with_suffix(".gz"), "wb") as packed:
        packed.write(header + values.tobytes())
    path.write_bytes(header + values.tobytes())


def test_torchvision_array_set_is_raw(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    images, labels = {}, {}
    for split, prefix, count in (("train", "train", 40), ("test", "t10k", 10)):
        images[split] = rng.integers(0, 256, (count, 28, 28), dtype=np.uint8)
        labels[split] = rng.integers(0, 10, count, dtype=np.uint8)
        write_idx(raw / f"{prefix}-images-idx3-ubyte", images[split])
        write_idx(raw / f"{prefix}-labels-idx1-ubyte", labels[split])
    make_shards(f"torchvision:MNIST:{tmp_path / 'root'}", tmp_path / "out")
    for split in ("train", "test"):
        found = rows(tmp_path / "out", split)
        assert found == {
            str(i): (images[split][i].tobytes(), int(labels[split][i]))
            for i in range(len(labels[split]))
        }
    assert ShardSet.open(tmp_path / "out" / "train").image.shape == (1, 28, 28)


def test_torchvision_image_set_is_lossless_png(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.datasets
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, 9, 3), dtype=np.uint8)

    class Pictures:
        """As Flowers102 and Food101 are: PIL images, `split`, private labels."""

        classes = ("x", "y")

        def __init__(self, root: str, split: str = "train") -> None:
            self._labels = [0, 1, 0, 1, 1, 0]

        def __getitem__(self, index: int) -> tuple[Image.Image, int]:
            return Image.fromarray(pixels[index]), self._labels[index]

    monkeypatch.setattr(torchvision.datasets, "Pictures", Pictures, raising=False)
    make_shards(f"torchvision:Pictures:{tmp_path}", tmp_path / "out", "train")
    shards = ShardSet.open(tmp_path / "out" / "train")
    with SampleStream(shards, seed=0, cache_dir=str(tmp_path / "cache"), shuffle=False) as stream:
        batch = stream.read(0, 0, 6)
    found = {image.permute(1, 2, 0).numpy().tobytes() for image in batch.inputs}
    assert found == {image.tobytes() for image in pixels}


def test_torchvision_unknown_name_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no such torchvision data set.*CIFAR10"):
        make_shards("torchvision:CIFAR11", tmp_path)


WNIDS = ("n01440764", "n01443537", "n02102040")


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


@pytest.fixture
def ilsvrc(tmp_path: Path, photo: Photo) -> Path:
    """Tars of the official shape: 3 classes of 9 training images, 8 validation images."""
    folder = tmp_path / "ilsvrc"
    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for c, wnid in enumerate(reversed(WNIDS)):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for i in range(9):
                    add(archive, f"{wnid}_{i}.JPEG", photo(30 + i, 40 - c, 10 * c + i))
            add(outer, f"{wnid}.tar", inner.getvalue())
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as archive:
        for i in (3, 1, 2, 8, 5, 6, 7, 4):
            add(archive, f"ILSVRC2012_val_{i:08d}.JPEG", photo(40, 40, 100 + i))
    return folder


def kit(folder: Path, truth: list[str]) -> None:
    # The kit numbers classes in its own order, and lists parent classes after them.
    numbers = {wnid: number for number, wnid in enumerate((WNIDS[2], WNIDS[0], WNIDS[1]), start=1)}
    kind = np.dtype([("ILSVRC2012_ID", object), ("WNID", object)])
    synsets = np.array([(n, w) for w, n in numbers.items()] + [(4, "n00001740")], dtype=kind)
    meta = io.BytesIO()
    scipy.io.savemat(meta, {"synsets": synsets})
    lines = "".join(f"{numbers[wnid]}\n" for wnid in truth).encode()
    with tarfile.open(folder / "ILSVRC2012_devkit_t12.tar.gz", "w:gz") as archive:
        add(archive, "ILSVRC2012_devkit_t12/data/meta.mat", meta.getvalue())
        add(
            archive,
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt",
            lines,
        )


def solution(folder: Path, truth: list[str]) -> None:
    lines = [f"ILSVRC2012_val_{i:08d},{w} 1 2 3 4 {w} 5 6 7 8" for i, w in enumerate(truth, 1)]
    (folder / "LOC_val_solution.csv").write_text(
        "\n".join(["ImageId,PredictionString", *reversed(lines)])
    )


def synset_labels(folder: Path, truth: list[str]) -> None:
    (folder / "imagenet_2012_validation_synset_labels.txt").write_text("\n".join(truth) + "\n")


@pytest.mark.parametrize("write_labels", [kit, solution, synset_labels])
def test_ilsvrc_tars_give_every_image_its_class(
    ilsvrc: Path, tmp_path: Path, photo: Photo, write_labels: Callable[[Path, list[str]], None]
) -> None:
    truth = [WNIDS[i % 3] for i in (2, 2, 1, 0, 1, 1, 0, 2)]
    write_labels(ilsvrc, truth)
    make_shards(f"ilsvrc:{ilsvrc}", tmp_path / "out", shard_mib=12_000 / 2**20)
    assert len(ShardSet.open(tmp_path / "out" / "train").shards) > 1
    train = rows(tmp_path / "out", "train")
    assert train == {
        f"{wnid}/{wnid}_{i}.JPEG": (photo(30 + i, 40 - c, 10 * c + i), WNIDS.index(wnid))
        for c, wnid in enumerate(reversed(WNIDS))
        for i in range(9)
    }
    test = rows(tmp_path / "out", "test")
    assert test == {
        f"ILSVRC2012_val_{i:08d}.JPEG": (photo(40, 40, 100 + i), WNIDS.index(truth[i - 1]))
        for i in range(1, 9)
    }
    assert ShardSet.open(tmp_path / "out" / "test").class_names == WNIDS


def test_ilsvrc_without_labels_raises(ilsvrc: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no labels.*devkit.*LOC_val_solution"):
        make_shards(f"ilsvrc:{ilsvrc}", tmp_path / "out", "test")


def test_ilsvrc_too_few_labels_raises(ilsvrc: Path, tmp_path: Path) -> None:
    synset_labels(ilsvrc, [WNIDS[0]] * 6)
    with pytest.raises(DataError, match=r"without a label.*2, the first: ILSVRC2012_val_00000007"):
        make_shards(f"ilsvrc:{ilsvrc}", tmp_path / "out", "test")


def test_ilsvrc_truncated_tar_raises_one_line(ilsvrc: Path, tmp_path: Path) -> None:
    path = ilsvrc / "ILSVRC2012_img_train.tar"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=r"unreadable tar|truncated"):
        make_shards(f"ilsvrc:{ilsvrc}", tmp_path / "out", "train")
    assert not (tmp_path / "out" / "train" / "manifest.json").exists()


def test_ilsvrc_nothing_there_raises(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no ILSVRC2012 tar files.*ILSVRC2012_img_train\.tar"):
        make_shards(f"ilsvrc:{tmp_path}", tmp_path / "out")
