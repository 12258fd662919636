"""Decoding and resizing against PIL."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from elastic_kfac.data.decode import (
    Scratch,
    UndecodableImage,
    decode_rgb,
    image_size,
    resize_box,
)

Photo = Callable[..., bytes]


def encode(image: Image.Image, kind: str) -> bytes:
    out = io.BytesIO()
    image.save(out, kind)
    return out.getvalue()


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decode_any_kind_is_close_to_pil(photo: Photo, kind: str, mode: str) -> None:
    if mode == "CMYK" and kind != "JPEG":
        mode = "P"
    image = Image.open(io.BytesIO(photo(33, 47, kind="PNG"))).convert(mode)
    data = encode(image.convert("RGB") if (mode, kind) == ("P", "WEBP") else image, kind)
    expected = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
    found = decode_rgb(data)
    assert image_size(data) == (33, 47)
    assert found.shape == (33, 47, 3) and found.flags.writeable
    # Two JPEG decoders may round chroma differently.
    assert np.abs(found.astype(int) - expected).max() <= (4 if kind == "JPEG" else 0)


def test_decode_at_least_shrinks_but_never_below(photo: Photo) -> None:
    data = photo(400, 300)
    for wanted in [(400, 300), (201, 100), (200, 150), (90, 70), (1, 1)]:
        height, width = decode_rgb(data, at_least=wanted).shape[:2]
        assert height >= wanted[0] and width >= wanted[1]
    assert decode_rgb(data, at_least=(200, 150)).shape == (200, 150, 3)
    # 3/4 would suffice here, but takes longer than the whole image.
    assert decode_rgb(data, at_least=(300, 220)).shape == (400, 300, 3)
    full = Image.fromarray(decode_rgb(data)).resize((150, 200), Image.Resampling.BOX)
    half = decode_rgb(data, at_least=(200, 150)).astype(int)
    assert np.abs(half - np.asarray(full)).mean() < 2


def test_decode_into_the_same_memory_gives_the_pixels_of_a_fresh_one(photo: Photo) -> None:
    scratch = Scratch()
    for size in [(40, 50), (90, 70), (16, 16), (90, 70)]:
        data = photo(*size)
        memory = scratch.of(3 * size[0] * size[1])
        assert memory is scratch.of(1)
        assert np.array_equal(decode_rgb(data, into=memory), decode_rgb(data))
    assert scratch.of(1 << 30) is None


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: b"", "zero bytes"),
        (lambda data: b"\x00" * 100, "not an image"),
        (lambda data: data[: len(data) // 2], "[Tt]runcated"),
        (lambda data: data[:2], "."),
        (lambda data: b"\xff\xd8" + data[100:], "."),
    ],
)
def test_decode_damaged_raises(photo: Photo, damage: Callable[[bytes], bytes], reason: str) -> None:
    for kind in ("JPEG", "PNG"):
        with pytest.raises(UndecodableImage, match=reason):
            decode_rgb(damage(photo(40, 40, kind=kind)))


@pytest.mark.parametrize("channels", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [(9, 14), (60, 80), (30, 7)])
def test_resize_box_equals_pil_up_to_rounding(channels: int, size: tuple[int, int]) -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (31, 45, channels), dtype=np.uint8)
    box = (4.0, 3.0, 40.0, 29.0)
    found = resize_box(pixels, size, box)
    for c in range(channels):
        plane = Image.fromarray(pixels[3:29, 4:40, c])
        expected = np.asarray(plane.resize((size[1], size[0]), Image.Resampling.BILINEAR))
        assert np.abs(found[..., c].astype(int) - expected).max() <= 1


def test_resize_box_smaller_than_a_pixel_takes_one() -> None:
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    assert resize_box(pixels, (1, 1), (0.6, 0.2, 0.9, 0.4)).tolist() == [[[3, 4, 5]]]


@pytest.mark.parametrize("size", [(12, 12), (26, 36), (50, 9)])
def test_resize_box_flip_is_the_mirror_image(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (31, 45, 3), dtype=np.uint8)
    box = (4.0, 3.0, 40.0, 29.0)
    straight, mirrored = (resize_box(pixels, size, box, flip=flip) for flip in (False, True))
    assert np.abs(straight[:, ::-1].astype(int) - mirrored).max() <= 1
    assert straight.shape == mirrored.shape == (*size, 3)


def test_resize_box_result_is_dense_in_the_layout_of_its_source() -> None:
    """Otherwise storing it is a transposition, which costs more than the resizing."""
    pixels = np.zeros((31, 45, 3), dtype=np.uint8)
    assert resize_box(pixels, (12, 16), (4, 3, 40, 29), flip=True).flags.c_contiguous
    assert resize_box(pixels, (12, 16), (4, 3, 40, 29)).flags.c_contiguous
