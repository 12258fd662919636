"""Decoding and resizing against PIL."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, ImageOps

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


def grey16(kind: str, dtype: str = "<u2") -> bytes:
    """Half of white in 16 bits."""
    return encode(Image.fromarray(np.full((4, 6), 32768, dtype)), kind)


def palette(**options: object) -> bytes:
    image = Image.new("P", (6, 4), 1)
    image.putpalette([0, 0, 0, 10, 20, 30])
    out = io.BytesIO()
    image.save(out, "PNG", **options)
    return out.getvalue()


def of_mode(mode: str, colour: object, kind: str) -> bytes:
    return encode(Image.new(mode, (6, 4), colour), kind)  # type: ignore[arg-type]


def grey_map(maximum: int, value: int) -> bytes:
    return f"P5 6 4 {maximum}\n".encode() + np.full((4, 6), value, ">u2").tobytes()


def tiff12() -> bytes:
    """12 bits per sample, half of white, packed as the format wants it."""
    data = encode(Image.fromarray(np.full((4, 6), 32768, np.uint16)), "TIFF")
    with Image.open(io.BytesIO(data)) as image:
        tags = dict(image.tag_v2)  # type: ignore[attr-defined]
    offset = tags[273][0]
    packed = bytes([0x80, 0x08, 0x00]) * 12
    out = bytearray(data[:offset] + packed)
    # The entry of BitsPerSample (258, SHORT, 1 value) is little-endian in PIL's files.
    entry = bytes([2, 1, 3, 0, 1, 0, 0, 0])
    at = out.index(entry) + len(entry)
    out[at : at + 2] = (12).to_bytes(2, "little")
    return bytes(out)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (grey16("PNG"), (128, 128, 128)),
        (grey16("TIFF"), (128, 128, 128)),
        (grey16("TIFF", ">u2"), (128, 128, 128)),
        (grey16("JPEG2000"), (128, 128, 128)),
        (grey_map(65535, 32768), (128, 128, 128)),
        (grey_map(1023, 512), (128, 128, 128)),
        (tiff12(), (128, 128, 128)),
        (of_mode("1", 1, "PNG"), (255, 255, 255)),
        (of_mode("1", 1, "TIFF"), (255, 255, 255)),
        (of_mode("L", 7, "PNG"), (7, 7, 7)),
        (of_mode("LA", (128, 10), "PNG"), (128, 128, 128)),
        (of_mode("LA", (128, 10), "TIFF"), (128, 128, 128)),
        (of_mode("RGBA", (10, 20, 30, 0), "PNG"), (10, 20, 30)),
        (of_mode("CMYK", (0, 0, 0, 128), "TIFF"), (127, 127, 127)),
        (of_mode("CMYK", (0, 0, 0, 128), "JPEG"), (127, 127, 127)),
        (of_mode("LAB", (136, 128, 128), "TIFF"), (127, 127, 127)),
        (palette(), (10, 20, 30)),
        (palette(transparency=1), (10, 20, 30)),
        (palette(transparency=bytes([255, 100])), (10, 20, 30)),
    ],
    ids=lambda value: str(value) if isinstance(value, tuple) else "",
)
def test_every_mode_of_pil_becomes_its_8_bit_colour(
    data: bytes, expected: tuple[int, int, int]
) -> None:
    assert image_size(data) == (4, 6)
    found = decode_rgb(data)
    assert np.abs(found.astype(int) - expected).max() <= 1, found[0, 0]


@pytest.mark.parametrize(
    "data",
    [
        encode(Image.fromarray(np.full((4, 6), 32768, np.int32)), "TIFF"),
        encode(Image.fromarray(np.full((4, 6), 0.5, np.float32)), "TIFF"),
        b"Pf\n6 4\n-1.0\n" + np.full((4, 6), 0.5, "<f4").tobytes(),
    ],
    ids=["I", "F", "pfm"],
)
def test_pixels_without_a_range_are_refused_at_the_header(data: bytes) -> None:
    for look in (image_size, decode_rgb):
        with pytest.raises(UndecodableImage, match="range is unknown"):
            look(data)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(photo: Photo, kind: str, orientation: int) -> None:
    image = Image.open(io.BytesIO(photo(32, 48, kind="PNG")))
    exif = Image.Exif()
    exif[274] = orientation
    out = io.BytesIO()
    image.save(out, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {"quality": 100}))
    data = out.getvalue()
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert image_size(data) == expected.shape[:2]
    for found in (decode_rgb(data), decode_rgb(data, into=np.empty(32 * 48 * 3, np.uint8))):
        assert np.abs(found.astype(int) - expected).max() <= 4
    half = decode_rgb(data, at_least=(expected.shape[0] // 2, expected.shape[1] // 2))
    wanted = np.asarray(Image.fromarray(expected).resize((half.shape[1], half.shape[0])))
    assert np.abs(half.astype(int) - wanted).mean() < 3
    assert resize_box(half, (5, 5)).shape == (5, 5, 3)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_one_limit_of_pixels_for_all_formats_that_can_be_raised(kind: str) -> None:
    data = encode(Image.new("L", (60, 50)), kind)
    for look in (image_size, decode_rgb):
        with pytest.raises(UndecodableImage, match=r"50x60 pixels; at most 2,999 are allowed"):
            look(data, max_pixels=2999)
        look(data, max_pixels=3000)


def test_images_above_the_limit_of_pil_are_read_when_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    data = encode(Image.new("L", (60, 50)), "PNG")
    with pytest.raises(UndecodableImage):
        decode_rgb(data, max_pixels=2000)
    assert decode_rgb(data, max_pixels=3000).shape == (50, 60, 3)
