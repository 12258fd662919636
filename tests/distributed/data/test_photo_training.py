"""Photos of different sizes from their source to a trained, audited run: ImageNet's tars, Caltech."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from elastic_kfac.cli import main
from elastic_kfac.communication.collectives import Communicator
from elastic_kfac.config import Config, read_config
from elastic_kfac.data import SampleStream, ShardSet, verify_shards
from elastic_kfac.data.augment import augmentation_key, center_boxes, resized_crop_boxes
from elastic_kfac.runs.audit import audit_run
from elastic_kfac.runs.checkpoints import evaluate_run
from elastic_kfac.state.checkpoint import CheckpointStore
from elastic_kfac.state.run_folder import RunFolder
from elastic_kfac.training.callbacks import FolderWriter, KeepGoing
from elastic_kfac.training.loop import Outcome, run_rank
from support.gloo import run_ranks
from support.training_problems import StopAt

CONFIGS = Path(__file__).parents[3] / "jobs" / "configs"
WNIDS = ("n01440764", "n01443537", "n02102040", "n03888257")
TRAIN_PER_CLASS, VALIDATION = 13, 10

# Factors of 512 and more channels take minutes to decompose on a test machine.
SMALL_KFAC = ("kfac.skip_layers=['layer[34]']", "kfac.factor_update_steps=1")


def photo(rng: np.random.Generator, label: int) -> bytes:
    """A JPEG of any size and shape whose colour tells its class."""
    height, width = rng.integers(40, 90, 2).tolist()
    pixels = rng.integers(0, 90, (height, width, 3), dtype=np.uint8)
    pixels[..., label % 3] += np.uint8(100 + 40 * (label // 3))
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=90)
    return out.getvalue()


def add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))


def write_tars(folder: Path) -> None:
    """Files as ILSVRC2012 has them: a tar of class tars, a validation tar, labels."""
    rng = np.random.default_rng(0)
    folder.mkdir()
    with tarfile.open(folder / "ILSVRC2012_img_train.tar", "w") as outer:
        for label, wnid in enumerate(WNIDS):
            inner = io.BytesIO()
            with tarfile.open(fileobj=inner, mode="w") as archive:
                for i in range(TRAIN_PER_CLASS):
                    add(archive, f"{wnid}_{i}.JPEG", photo(rng, label))
            add(outer, f"{wnid}.tar", inner.getvalue())
    truth = rng.integers(0, len(WNIDS), VALIDATION).tolist()
    with tarfile.open(folder / "ILSVRC2012_img_val.tar", "w") as archive:
        for number, label in enumerate(truth, start=1):
            add(archive, f"ILSVRC2012_val_{number:08d}.JPEG", photo(rng, label))
    names = "".join(f"{WNIDS[label]}\n" for label in truth)
    (folder / "imagenet_2012_validation_synset_labels.txt").write_text(names)


def train(config: Config, folder: RunFolder, stop_at: int | None = None) -> Outcome:
    return run_rank(
        config,
        Communicator.world(),
        store=CheckpointStore(folder.uri),
        callback=FolderWriter(folder),
        control=KeepGoing() if stop_at is None else StopAt(stop_at),
    )


def test_imagenet_configuration_runs_from_tars_to_an_audited_run(tmp_path: Path) -> None:
    write_tars(tmp_path / "tars")
    out = str(tmp_path / "imagenet")
    call = ["shards", "make", "--source", f"ilsvrc:{tmp_path / 'tars'}", "--out", out]
    assert main(call) == 0
    assert verify_shards(out).num_samples == len(WNIDS) * TRAIN_PER_CLASS + VALIDATION

    config = read_config(
        CONFIGS / "imagenet_resnet50.yaml",
        [
            f"data.shards={out}",
            f"data.cache_dir={tmp_path / 'cache'}",
            "data.cache_gib=1",
            "data.image_size=32",
            "data.decode_threads=2",
            "train.epochs=2",
            "train.global_batch_size=20",
            "train.log_every_steps=1",
            "train.target_accuracy=null",
            *SMALL_KFAC,
            "kfac.inverse_update_steps=3",
            "optimizer.lr=0.01",
        ],
    )
    folder = RunFolder(tmp_path / "run")
    folder.write_config(config)
    outcome = train(config, folder)

    # 52 samples in steps of 20, 20 and 12, twice.
    assert (outcome.status, outcome.progress.step) == ("finished", 6)
    report = audit_run(folder)
    assert report.passed and report.complete_epochs == 2, report.line()
    losses = [row["loss"] for row in folder.metrics() if "loss" in row]
    assert len(losses) == 6 and np.isfinite(losses).all()
    _, evaluated = evaluate_run(folder)
    assert evaluated.count == VALIDATION


def caltech(root: Path) -> Config:
    return read_config(
        CONFIGS / "caltech_resnet18.yaml",
        [
            f"data.shards={root / 'caltech'}",
            f"data.cache_dir={root / 'cache'}",
            "data.image_size=32",
            "train.epochs=0.2",
            *SMALL_KFAC,
        ],
    )


def train_caltech(root: str, stop_at: int | None) -> Outcome:
    torch.set_num_threads(1)
    return train(caltech(Path(root)), RunFolder(Path(root) / "run"), stop_at)


@pytest.mark.filterwarnings("ignore:factors wider than max_factor_dim")
def test_caltech_photos_train_at_two_ranks_then_one(data_folder: Path, tmp_path: Path) -> None:
    source = f"parquet:{data_folder / 'caltech101_jpeg192'}"
    call = ["shards", "make", "--source", source, "--out", str(tmp_path / "caltech")]
    assert main(call) == 0
    folder = RunFolder(tmp_path / "run")
    folder.write_config(caltech(tmp_path))

    first = run_ranks(2, train_caltech, str(tmp_path), 4)
    assert {outcome.progress.step for outcome in first} == {4}
    outcome = train_caltech(str(tmp_path), None)

    # A fifth of 2,424 photos is 484.8: 8 steps of 64.
    assert (outcome.progress.step, outcome.world_sizes) == (8, (2, 1))
    report = audit_run(folder)
    assert report.passed, report.line()
    losses = [row["loss"] for row in folder.metrics() if "loss" in row]
    assert len(losses) == 8 and np.isfinite(losses).all()
    assert evaluate_run(folder)[1].count == 606


def by_pil(data: bytes, box: np.ndarray, flip: bool) -> np.ndarray:
    """Decoded, cut, resized and mirrored by PIL alone, [3, 224, 224]."""
    with Image.open(io.BytesIO(data)) as image:
        cut = image.convert("RGB").crop(tuple(round(edge) for edge in box.tolist()))
    resized = np.asarray(cut.resize((224, 224), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    return resized[..., ::-1] if flip else resized


@pytest.mark.parametrize("augment", ["none", "random_resized_crop"])
def test_caltech_photos_stream_exactly_once_as_pil_would_cut_them(
    data_folder: Path, tmp_path: Path, augment: str
) -> None:
    source = f"parquet:{data_folder / 'caltech101_jpeg192_test.parquet'}"
    call = ["shards", "make", "--source", source, "--out", str(tmp_path / "caltech")]
    assert main([*call, "--split", "test"]) == 0
    folder = tmp_path / "caltech" / "test"
    photos = ShardSet.open(folder)
    assert photos.image.shape is None and photos.image.smallest != photos.image.largest
    encoded = pq.read_table(folder / photos.shards[0].file).column("image").to_pylist()
    sizes = np.array([Image.open(io.BytesIO(data)).size[::-1] for data in encoded])
    ids = np.arange(606)
    if augment == "none":
        boxes, flips = center_boxes(sizes), np.zeros(606, dtype=bool)
    else:
        boxes, flips = resized_crop_boxes(sizes, augmentation_key(5, 3), ids)

    seen: list[int] = []
    labels: list[int] = []
    with SampleStream(
        photos, seed=5, image_size=224, augment=augment, cache_dir=str(tmp_path / "cache")
    ) as stream:
        for first in range(0, 606, 101):
            batch = stream.read(3, first, 101)
            for image, i in zip(batch.inputs.numpy(), batch.ids.tolist(), strict=True):
                expected = by_pil(encoded[i], boxes[i], bool(flips[i]))
                # Two JPEG decoders and two resizers round differently.
                assert np.abs(image.astype(int) - expected).mean() < 1
            assert batch.weights.tolist() == [1.0] * 101
            seen += batch.ids.tolist()
            labels += batch.targets.tolist()
    assert sorted(seen) == list(range(606))
    assert np.bincount(labels).tolist() == [6] * 101
