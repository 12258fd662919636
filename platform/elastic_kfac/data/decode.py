"""Encoded images to pixels: JPEG by simplejpeg, everything else by PIL.

Images are turned as their EXIF orientation says; 16-bit grey becomes 8-bit; transparency is dropped,
as torchvision does. Values without a fixed range (32-bit integers, floats) are refused.

Layout: pixels are uint8 [height, width, 3] here; the stream delivers [batch, channels, height, width].
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image
from torch.nn.functional import interpolate

from elastic_kfac.data.columns import IGNORED

UInt8Array = NDArray[np.uint8]
Box = tuple[float, float, float, float]

MAX_PIXELS = 178_956_970
"""Bound on height * width, PIL's own: a small file may claim more pixels than memory holds."""
_JPEG_MAGIC = b"\xff\xd8"
_SOF = frozenset({*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC})
_SOS, _APP1 = 0xDA, 0xE1
_BITS_PER_SAMPLE = 258  # TIFF
_LARGEST_SCRATCH = 48 << 20
"""Bytes that a thread keeps at most: 16 megapixels."""


class UndecodableImage(ValueError):
    """Bytes that no decoder accepts as an image."""


def image_size(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """(height, width) from the header alone, turned by the EXIF orientation.

    Raises:
        UndecodableImage: If the bytes are empty, not an image, or hold more than `max_pixels`.
    """
    height, width, orientation = _header(data, max_pixels)
    return (height, width) if orientation <= 4 else (width, height)


class Scratch(threading.local):
    """Reusable output memory of the decoder, per thread.

    Fresh pages from the kernel for every photo cost a fifth of decoding it.
    """

    def __init__(self) -> None:
        self._pixels = np.empty(0, dtype=np.uint8)

    def of(self, size: int) -> UInt8Array | None:
        """Memory of at least `size` bytes; None if the size is too large to keep."""
        if size > _LARGEST_SCRATCH:
            return None
        if size > len(self._pixels):
            self._pixels = np.empty(size, dtype=np.uint8)
        return self._pixels


def decode_rgb(
    data: bytes | memoryview,
    *,
    at_least: tuple[int, int] | None = None,
    into: UInt8Array | None = None,
    max_pixels: int = MAX_PIXELS,
) -> UInt8Array:
    """Decodes to RGB, [height, width, 3], turned by the EXIF orientation.

    Args:
        data: A JPEG, or anything else that PIL reads.
        at_least: (height, width) that suffice; a JPEG may then be decoded at half of its size or
            less (the DCT does the scaling), never below this.
        into: Memory for the pixels of the whole image; the result may be a view of it.
        max_pixels: Bound on height * width.

    Raises:
        UndecodableImage: If the bytes are empty, truncated, too large or not an image.
    """
    _, _, orientation = _header(data, max_pixels)
    if bytes(data[:2]) == _JPEG_MAGIC:
        height, width = at_least or (0, 0)
        if orientation > 4:
            height, width = width, height
        # Factors below 2, such as 7/8, take longer than the whole image, and blur twice.
        try:
            pixels = simplejpeg.decode_jpeg(
                data,
                "RGB",
                min_height=height,
                min_width=width,
                min_factor=2 if at_least else 1,
                buffer=into,
            )
            return _turned(pixels, orientation)
        except ValueError:
            pass  # CMYK, or damaged: PIL decides which.
    with _open(data, max_pixels) as image:
        try:
            return _turned(np.array(_as_rgb(image)), orientation)
        except (OSError, ValueError, SyntaxError) as error:
            raise UndecodableImage(str(error)) from None


def decode_mask(data: bytes | memoryview, *, max_pixels: int = MAX_PIXELS) -> UInt8Array:
    """The class of every pixel, uint8 [height, width]: palette or grey values as they are stored.

    Raises:
        UndecodableImage: If the bytes are no image, have colours instead of class numbers, or are a
            JPEG.
    """
    _header(data, max_pixels)
    with _open(data, max_pixels) as image:
        try:
            if image.format == "JPEG":
                raise UndecodableImage("a mask as JPEG, which changes class numbers; save PNG")
            if image.mode not in ("P", "L", "1"):
                raise UndecodableImage(f"a mask of mode {image.mode}; save 8-bit class numbers")
            return np.array(image, dtype=np.uint8)
        except (OSError, SyntaxError) as error:
            raise UndecodableImage(str(error)) from None


def check_mask(pixels: UInt8Array, num_classes: int) -> None:
    """Refuses a mask with a class outside [0, num_classes) other than 255.

    Raises:
        UndecodableImage: It names the class.
    """
    wrong = pixels[(pixels >= num_classes) & (pixels != IGNORED)]
    if wrong.size:
        raise UndecodableImage(f"class {int(wrong[0])} in a mask of {num_classes} classes")


def resize_mask(
    pixels: UInt8Array, size: tuple[int, int], box: Box | None = None, *, flip: bool = False
) -> UInt8Array:
    """`resize_box` for masks [height, width]: the class of the nearest pixel."""
    if box is not None:
        left, top, right, bottom = (round(edge) for edge in box)
        pixels = pixels[top : max(bottom, top + 1), left : max(right, left + 1)]
    rows, columns = (
        ((np.arange(new) + 0.5) * (old / new)).astype(np.int64)
        for new, old in zip(size, pixels.shape, strict=True)
    )
    resized = pixels[rows[:, None], columns]
    return np.ascontiguousarray(resized[:, ::-1] if flip else resized)


def resize_box(
    pixels: UInt8Array, size: tuple[int, int], box: Box | None = None, *, flip: bool = False
) -> UInt8Array:
    """Cuts `box` = (left, top, right, bottom), rounded to pixels, and resizes it to `size`.

    Bilinear with antialiasing, by torch: the same filter as PIL's in less than half of the time.

    Args:
        pixels: uint8 [height, width, channels].
        size: (height, width) of the result.
        box: None is the whole image.
        flip: Mirror left and right.
    """
    if box is not None:
        left, top, right, bottom = (round(edge) for edge in box)
        pixels = pixels[top : max(bottom, top + 1), left : max(right, left + 1)]
    # unsqueeze, not numpy's None: only with its strides does torch see channels_last, where
    # resizing and storing take a third of the time.
    planes = torch.from_numpy(pixels).unsqueeze(0).permute(0, 3, 1, 2)
    if planes.shape[2:] != size:
        planes = interpolate(planes, size, mode="bilinear", antialias=True)
    if flip:  # After resizing, which usually leaves fewer pixels.
        planes = planes.flip(3)
    return planes[0].permute(1, 2, 0).numpy()


def _header(data: bytes | memoryview, max_pixels: int) -> tuple[int, int, int]:
    """(height, width) as stored, and the EXIF orientation."""
    size = None
    if bytes(data[:2]) == _JPEG_MAGIC:
        with contextlib.suppress(ValueError):  # Rare colour spaces; PIL reads them.
            size = simplejpeg.decode_jpeg_header(data)[:2]
            orientation = _jpeg_orientation(data)
    if size is None:
        with _open(data, max_pixels) as image:
            size, orientation = (image.height, image.width), _orientation(image)
            if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):
                kind = "floats" if image.mode == "F" else "32-bit integers"
                raise UndecodableImage(f"pixels are {kind}, whose range is unknown; save 8 bits")
    if size[0] * size[1] > max_pixels:
        raise UndecodableImage(f"{size[0]}x{size[1]} pixels; at most {max_pixels:,} are allowed")
    return int(size[0]), int(size[1]), orientation


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):  # PIL scales portable grey maps to 16 bits.
        tags = getattr(image, "tag_v2", {})
        largest = (1 << tags.get(_BITS_PER_SAMPLE, (16,))[0]) - 1
        values = np.asarray(image).astype(np.uint32)
        grey = (values * 255 + largest // 2) // largest
        return Image.fromarray(grey.clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # PIL warns about the direct way.
    return image.convert("RGB")


def _turned(pixels: UInt8Array, orientation: int) -> UInt8Array:
    """Pixels as seen by a person: the transposition and flips of an EXIF orientation from 1 to 8."""
    if orientation == 1:
        return pixels
    if orientation > 4:
        pixels, orientation = pixels.swapaxes(0, 1), orientation - 4
    down, across = (1 if orientation <= 2 else -1), (-1 if orientation in (2, 3) else 1)
    return np.ascontiguousarray(pixels[::down, ::across])


def _orientation(image: Image.Image) -> int:
    if image.format == "TIFF":
        return 1  # PIL turns these itself.
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # A damaged EXIF block may raise anything; no pixel depends on it.
        return 1
    return value if value in range(1, 9) else 1


def _jpeg_orientation(data: bytes | memoryview) -> int:
    """The orientation of a JPEG; parses the EXIF block only where there is one."""
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == _APP1:
            try:
                with _open(data) as image:
                    return _orientation(image)
            except UndecodableImage:
                return 1
        if marker == _SOS or marker in _SOF:
            break
        at += 2 + (data[at + 2] << 8 | data[at + 3])
    return 1


def _open(data: bytes | memoryview, max_pixels: int = MAX_PIXELS) -> Image.Image:
    if len(data) == 0:
        raise UndecodableImage("zero bytes")
    if max_pixels > 2 * (Image.MAX_IMAGE_PIXELS or max_pixels):
        Image.MAX_IMAGE_PIXELS = max_pixels  # Somebody has asked for larger images.
    try:
        with warnings.catch_warnings():
            # PIL warns about damaged EXIF blocks, which no pixel depends on.
            warnings.simplefilter("ignore")
            return Image.open(io.BytesIO(data))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        text = str(error)
        if "cannot identify" in text:
            text = "not an image"
        raise UndecodableImage(text) from None
