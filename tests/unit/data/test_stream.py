"""The stream against a plain reader: exactly once, independent of ranks, bad data, no leaks."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from elastic_kfac.data import SampleOrder, SampleStream, ShardSet, decode, id_hash, make_shards
from elastic_kfac.data.decode import decode_rgb
from elastic_kfac.errors import DataError


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def stream(digits_train: ShardSet, cache: str) -> SampleStream:
    with SampleStream(digits_train, seed=3, cache_dir=cache) as opened:
        yield opened


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards of 40 generated photos of different sizes, two shards."""
    import io

    import pyarrow as pa
    from PIL import Image

    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(1)
    images = []
    for i in range(40):
        height, width = rng.integers(24, 90, 2).tolist()
        corners = rng.integers(0, 256, size=(3, 3, 3), dtype=np.uint8)
        out = io.BytesIO()
        picture = Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)
        picture.save(out, "PNG" if i % 10 == 0 else "JPEG", quality=95)
        images.append(out.getvalue())
    table = pa.table({"image": images, "label": [i % 4 for i in range(40)]})
    pq.write_table(table, folder / "photos_train.parquet")
    total = sum(map(len, images))
    make_shards(f"parquet:{folder / 'photos'}", folder / "out", shard_mib=total / 1.6 / 2**20)
    assert len(ShardSet.open(folder / "out" / "train").shards) == 2
    return folder / "out"


def plain(root: Path) -> tuple[list[bytes], list[int]]:
    tables = [pq.read_table(f) for f in sorted(root.glob("shard-*.parquet"))]
    images = [image for t in tables for image in t.column("image").to_pylist()]
    return images, [label for t in tables for label in t.column("label").to_pylist()]


def test_read_any_positions_equals_plain_reader(digits: Path, stream: SampleStream) -> None:
    images, labels = plain(digits / "train")
    for epoch, first, count in [(0, 0, 128), (0, 700, 3), (4, 1400, 38), (1, 5, 0), (2, 0, 1438)]:
        ids = SampleOrder(1438, 3, epoch).ids(first, count)
        batch = stream.read(epoch, first, count)
        assert batch.ids.tolist() == ids.tolist()
        assert batch.targets.tolist() == [labels[i] for i in ids]
        assert [x.numpy().tobytes() for x in batch.inputs] == [images[i] for i in ids]
        assert batch.inputs.shape == (count, 1, 8, 8)
        assert batch.inputs.dtype == torch.uint8
        assert batch.targets.dtype == torch.int64
        assert batch.weights.tolist() == [1.0] * count


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(batch=st.integers(1, 700), data=st.data())
def test_read_random_world_changes_sees_every_sample_once(
    stream: SampleStream, batch: int, data: st.DataObject
) -> None:
    seen: list[int] = []
    partial = consumed = 0
    while consumed < stream.num_samples:
        world = data.draw(st.integers(1, 6))
        size = min(batch, stream.num_samples - consumed)
        for rank in range(world):
            low, high = rank * size // world, (rank + 1) * size // world
            ids = stream.read(7, consumed + low, high - low).ids
            seen += ids.tolist()
            partial = (partial + id_hash(ids)) % 2**64
        consumed += size
    assert sorted(seen) == list(range(1438))
    assert partial == id_hash(np.arange(1438))


@pytest.mark.parametrize("augment", ["none", "crop_flip", "random_resized_crop"])
@pytest.mark.parametrize("kind", ["raw", "encoded"])
def test_read_split_among_ranks_gives_the_same_pixels(
    digits: Path, photos: Path, cache: str, augment: str, kind: str
) -> None:
    root = digits if kind == "raw" else photos
    shards = ShardSet.open(root / "train")
    with (
        SampleStream(shards, seed=1, augment=augment, image_size=16, cache_dir=cache) as one,
        SampleStream(
            shards, seed=1, augment=augment, image_size=16, cache_dir=cache, decode_threads=3
        ) as other,
    ):
        whole = one.read(2, 3, 30)
        parts = [other.read(2, 3 + a, b - a) for a, b in [(0, 7), (7, 8), (8, 8), (8, 30)]]
        assert torch.equal(whole.inputs, torch.cat([p.inputs for p in parts]))
        assert torch.equal(whole.targets, torch.cat([p.targets for p in parts]))
        following = one.read(3, 3, 30)
    changed = not torch.equal(
        whole.inputs[whole.ids.argsort()], following.inputs[following.ids.argsort()]
    )
    assert changed


def test_read_augmented_other_epoch_changes_the_same_sample(
    digits_train: ShardSet, cache: str
) -> None:
    with SampleStream(digits_train, seed=1, augment="crop_flip", cache_dir=cache) as stream:
        first, second = stream.read(0, 0, 1438), stream.read(1, 0, 1438)
    by_id = [batch.inputs[torch.from_numpy(batch.ids.argsort())] for batch in (first, second)]
    same = (by_id[0] == by_id[1]).flatten(1).all(1).float().mean()
    assert (
        0.02 < float(same) < 0.2
    )  # 1/9 of the shifts times 1/2 of the flips, plus symmetric ones.


def test_read_encoded_same_size_equals_decoder(
    tmp_path: Path,
    cache: str,
    write_parquet: Callable[..., Path],
    photo: Callable[..., bytes],
) -> None:
    images = [photo(12, 10, i, "PNG" if i % 2 else "JPEG") for i in range(6)]
    make_shards(f"parquet:{write_parquet(images, [0, 1] * 3)}", tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out" / "train")
    with SampleStream(shards, seed=0, cache_dir=cache, shuffle=False) as stream:
        assert stream.input_shape == (3, 12, 10)
        batch = stream.read(0, 0, 6)
    assert batch.inputs.is_contiguous(memory_format=torch.channels_last)
    for image, data in zip(batch.inputs, images, strict=True):
        assert np.array_equal(image.permute(1, 2, 0).numpy(), decode_rgb(data))


def test_read_jpeg_never_falls_back_to_the_slow_decoder(
    tmp_path: Path,
    write_parquet: Callable[..., Path],
    photo: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source = write_parquet([photo(30, 20 + i, i) for i in range(6)], [0] * 6)
    make_shards(f"parquet:{source}", tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out" / "train")

    def refuse(*_: object) -> None:
        raise AssertionError("PIL was asked")

    monkeypatch.setattr(decode, "_open", refuse)
    for augment in ("none", "random_resized_crop"):
        with SampleStream(
            shards, seed=0, image_size=8, augment=augment, cache_dir=str(tmp_path / "cache")
        ) as stream:
            assert int(stream.read(0, 0, 6).weights.sum()) == 6


def test_read_photo_without_augmentation_is_the_centre_square(
    tmp_path: Path, cache: str, write_parquet: Callable[..., Path]
) -> None:
    """A black frame as wide as what the centre crop removes must not be seen."""
    import io

    from PIL import Image

    def framed(height: int, width: int) -> bytes:
        side = int(min(height, width) * 0.875)
        pixels = np.zeros((height, width, 3), np.uint8)
        top, left = (height - side) // 2, (width - side) // 2
        pixels[top : top + side, left : left + side] = 255
        out = io.BytesIO()
        Image.fromarray(pixels).save(out, "PNG")
        return out.getvalue()

    source = write_parquet([framed(64, 96), framed(128, 64)], [0, 1])
    make_shards(f"parquet:{source}", tmp_path / "out")
    shards = ShardSet.open(tmp_path / "out" / "train")
    with SampleStream(shards, seed=0, image_size=56, cache_dir=cache) as stream:
        batch = stream.read(0, 0, 2)
    assert batch.inputs.shape == (2, 3, 56, 56) and int(batch.inputs.min()) == 255


def test_stream_photos_without_size_raises(photos: Path, cache: str) -> None:
    with pytest.raises(DataError, match=r"differ in size.*data\.image_size"):
        SampleStream(ShardSet.open(photos / "train"), seed=0, cache_dir=cache)


@pytest.mark.parametrize(
    ("option", "match"),
    [
        ({"augment": "mirror"}, "unknown augmentation.*crop_flip"),
        ({"bad_records": "ignore"}, "unknown policy.*raise, skip"),
        ({"image_size": 0}, "image_size must be positive"),
        ({"decode_threads": -1}, "decode_threads"),
        ({"cache_gib": 1e-6}, r"smaller than one shard.*data\.cache_gib"),
    ],
)
def test_stream_impossible_option_raises(
    digits_train: ShardSet, cache: str, option: dict[str, object], match: str
) -> None:
    with pytest.raises(DataError, match=match):
        SampleStream(digits_train, seed=0, **{"cache_dir": cache, **option})


def test_read_outside_epoch_or_after_close_raises(stream: SampleStream) -> None:
    with pytest.raises(DataError, match="positions outside the epoch"):
        stream.read(0, 1430, 9)
    stream.close()
    stream.close()
    with pytest.raises(DataError, match="closed"):
        stream.read(0, 0, 1)


def test_normalization_equals_manifest_and_survives_constant_channel(
    stream: SampleStream, tmp_path: Path, cache: str, write_parquet: Callable[..., Path]
) -> None:
    whole = stream.read(0, 0, 1438).inputs.double() / 255
    mean, std = stream.normalization
    assert float(mean[0]) == pytest.approx(float(whole.mean()), abs=1e-6)
    assert float(std[0]) == pytest.approx(float(whole.std(correction=0)), abs=1e-6)
    make_shards(f"parquet:{write_parquet([bytes(4)] * 3, [0] * 3, raw=True)}", tmp_path / "out")
    with SampleStream(ShardSet.open(tmp_path / "out" / "train"), seed=0, cache_dir=cache) as flat:
        assert flat.normalization[1].tolist() == [1.0]


def test_prefetch_batches_are_what_read_would_give(
    digits_train: ShardSet, cache: str, stream: SampleStream
) -> None:
    with SampleStream(digits_train, seed=3, cache_dir=cache, prefetch_batches=2) as ahead:
        ahead.prefetch(0, 0, 100)
        for first in range(0, 1438, 100):
            count = min(100, 1438 - first)
            ahead.prefetch(0, first + 100, 100)  # Past the end it is cut or ignored.
            batch, expected = ahead.read(0, first, count), stream.read(0, first, count)
            assert torch.equal(batch.inputs, expected.inputs)
            assert np.array_equal(batch.ids, expected.ids)


def test_prefetch_nobody_comes_for_makes_room(stream: SampleStream) -> None:
    for first in range(0, 1000, 10):
        stream.prefetch(0, first, 10)
    assert len(stream._ahead) == 2
    assert stream.read(0, 500, 10).ids.tolist() == SampleOrder(1438, 3, 0).ids(500, 10).tolist()


@pytest.fixture
def damaged(photos: Path, tmp_path: Path) -> Path:
    """The photos with record 3 truncated and record 7 empty, behind a manifest that agrees."""
    import hashlib

    import pyarrow as pa

    root = tmp_path / "damaged"
    shutil.copytree(photos / "train", root)
    path = root / "shard-00000.parquet"
    table = pq.read_table(path)
    images = table.column("image").to_pylist()
    images[3], images[7] = images[3][: len(images[3]) // 2], b""
    column = pa.array(images, pa.binary())
    pq.write_table(table.set_column(0, table.schema.field("image"), column), path)
    manifest = json.loads((root / "manifest.json").read_text())
    manifest["shards"][0]["bytes"] = path.stat().st_size
    manifest["shards"][0]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    (root / "manifest.json").write_text(json.dumps(manifest))
    (root / "manifest.sha256").unlink()
    return root


def test_bad_records_raise_names_shard_row_and_key(damaged: Path, cache: str) -> None:
    with (
        SampleStream(
            ShardSet.open(damaged), seed=0, image_size=16, cache_dir=cache, shuffle=False
        ) as stream,
        pytest.raises(DataError, match=r"shard-00000\.parquet, row 3.*photos_train/3"),
    ):
        stream.read(0, 0, 6)


@pytest.mark.parametrize("threads", [1, 2])
def test_bad_records_skip_keeps_the_place_with_weight_zero(
    damaged: Path, photos: Path, tmp_path: Path, threads: int
) -> None:
    options = {"seed": 0, "image_size": 16, "cache_dir": str(tmp_path / "cache"), "shuffle": False}
    with (
        SampleStream(
            ShardSet.open(damaged), bad_records="skip", decode_threads=threads, **options
        ) as stream,
        SampleStream(ShardSet.open(photos / "train"), **options) as whole,
    ):
        for _ in range(2):
            batch, expected = stream.read(0, 0, 40), whole.read(0, 0, 40)
            assert batch.ids.tolist() == list(range(40))
            assert torch.equal(batch.targets, expected.targets)
            assert np.flatnonzero(batch.weights.numpy() == 0).tolist() == [3, 7]
            good = batch.weights.bool()
            assert torch.equal(batch.inputs[good], expected.inputs[good])
            assert int(batch.inputs[~good].max()) == 0
        assert stream.quarantined == 2
    (file,) = (tmp_path / "cache").glob("quarantine-*.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert sorted(line["id"] for line in lines) == [3, 7]
    assert any("zero bytes" in line["problem"] for line in lines)


def test_bad_records_above_the_limit_raises(damaged: Path, tmp_path: Path) -> None:
    with (
        SampleStream(
            ShardSet.open(damaged),
            seed=0,
            image_size=16,
            cache_dir=str(tmp_path / "cache"),
            bad_records="skip",
            max_bad_records=1,
        ) as stream,
        pytest.raises(DataError, match="more than 1 bad records"),
    ):
        stream.read(0, 0, 40)


def test_corrupt_shard_raise_names_hashes_and_skip_keeps_places(
    digits: Path, tmp_path: Path
) -> None:
    root = tmp_path / "train"
    shutil.copytree(digits / "train", root)
    path = root / "shard-00001.parquet"
    content = bytearray(path.read_bytes())
    content[1000] ^= 255
    path.write_bytes(content)
    shards = ShardSet.open(root)
    options = {"seed": 0, "cache_dir": str(tmp_path / "cache"), "shuffle": False}
    with SampleStream(shards, **options) as stream:
        assert len(stream.read(0, 0, 512).ids) == 512
        with pytest.raises(DataError, match=rf"corrupt shard.*{shards.shards[1].sha256}"):
            stream.read(0, 500, 20)
    with SampleStream(shards, bad_records="skip", **options) as stream:
        batch = stream.read(0, 500, 20)
        assert batch.weights.tolist() == [1.0] * 12 + [0.0] * 8
        assert batch.ids.tolist() == list(range(500, 520))


def test_missing_shard_raises_whatever_the_policy(digits: Path, tmp_path: Path) -> None:
    root = tmp_path / "train"
    shutil.copytree(digits / "train", root)
    (root / "shard-00002.parquet").unlink()
    with (
        SampleStream(
            ShardSet.open(root), seed=0, cache_dir=str(tmp_path / "c"), bad_records="skip"
        ) as stream,
        pytest.raises(DataError, match=r"missing.*shard-00002"),
    ):
        stream.read(0, 0, 100)


def test_read_takes_memory_again_only_when_nobody_holds_the_batch(photos: Path, cache: str) -> None:
    with SampleStream(
        ShardSet.open(photos / "train"), seed=0, image_size=16, cache_dir=cache, prefetch_batches=0
    ) as stream:
        first = stream.read(0, 0, 4).inputs
        address, kept = first.data_ptr(), first[1:].clone()
        part = first[1:]
        del first
        # A view of a part keeps the whole from being written to.
        assert stream.read(0, 4, 4).inputs.data_ptr() != address
        assert torch.equal(part, kept)
        del part
        assert stream.read(0, 8, 4).inputs.data_ptr() == address


def test_stream_closed_leaves_no_threads_or_open_files(photos: Path, cache: str) -> None:
    def held() -> tuple[int, set[str]]:
        links = [str(p.readlink()) for p in Path("/proc/self/fd").iterdir() if p.is_symlink()]
        links += Path("/proc/self/maps").read_text().splitlines()
        threads = {t.name for t in threading.enumerate() if t.name.startswith("sample-")}
        return sum(cache in link for link in links), threads

    shards = ShardSet.open(photos / "train")
    gc.collect()  # What other tests have left in cycles.
    before = held()
    for _ in range(3):
        with SampleStream(
            shards, seed=0, image_size=16, decode_threads=2, cache_dir=cache
        ) as stream:
            stream.prefetch(0, 0, 10)
            batch = stream.read(0, 0, 10)
            stream.prefetch(0, 10, 10)
            assert held()[0] > 0 and held()[1] != set()
        del batch, stream
    assert held() == before == (0, set())


def test_resume_in_the_middle_reads_no_skipped_shard(
    digits_train: ShardSet, tmp_path: Path
) -> None:
    """In block order, a resumed reader touches the shards of its block only."""
    from dataclasses import replace

    blocks = replace(digits_train, shuffle_window=400)
    order = blocks.order(0, 0)
    with SampleStream(blocks, seed=0, cache_dir=str(tmp_path)) as stream:
        stream.read(0, 1100, 50)
    needed = {digits_train.shards[i].sha256 for i in order.shards(1100, 50)}
    assert {p.stem for p in tmp_path.glob("*.arrow")} == needed
    assert len(needed) < 3
