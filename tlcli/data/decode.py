"""A file becomes RGB pixels here and nowhere else, so that training, evaluation and prediction see the same image."""

import hashlib
import inspect
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError, features

Pixels = np.ndarray[Any, np.dtype[np.uint8]]

# Pillow knows more formats than these. Some of them start other programs: EPS is handed to Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "AVIF")

ENOUGH = 1024
"""Pixels of the shorter side that are left, at the least, of a photograph that is reduced as it is decoded."""

_ORIENTATION = 0x0112  # the EXIF tag
_NOT_ALIKE = {"La": "LA", "RGBa": "RGBA"}  # premultiplied alpha -> plain


class BadImage(ValueError):
    """A file is not an image, or is damaged; the message is the reason in a few words."""


def read_image(file: Path | BinaryIO) -> Pixels:
    """Pixels of an image file, or of a seekable binary stream: uint8, (height, width, 3), RGB.

    The EXIF orientation is applied; of an animation this is the first frame. `to_rgb` says how modes are converted.
    A JPEG whose shorter side has 2, 4 or 8 times ENOUGH pixels or more comes at a half, a quarter or an eighth of its
    size.
    Raises BadImage for whatever does not decode. Pipes, devices and folders are never opened.
    """
    if not isinstance(file, Path):
        return _decode(file)
    with _opened(file) as stream:
        return _decode(stream)


def read_bytes(path: Path) -> bytes:
    """What is in a file. Raises BadImage where `read_image` would not open it."""
    with _opened(path) as stream:
        return stream.read()


def decoder() -> str:
    """What decides, beside its bytes, whether an image decodes and to which pixels: versions, and this file's rules."""
    codecs = [f"{name} {features.version(name)}" for name in ("jpg", "webp", "avif", "libtiff", "zlib")]
    rules = hashlib.blake2b(inspect.getsource(sys.modules[__name__]).encode(), digest_size=8).hexdigest()
    return ", ".join([f"Pillow {PIL.__version__}", *codecs, f"rules {rules}"])


def to_rgb(image: Image.Image) -> Pixels:
    """Pixels of an image in memory: uint8, (height, width, 3), RGB, writable.

    Alpha, in whatever form, goes over white. Palette, gray, 1-bit and CMYK images are converted as Pillow does.
    16-bit gray is divided by 257, so that 65,535 becomes 255. Mode I, in which Pillow delivers deep PGM files, is taken
    as 16-bit and clipped. Floats (mode F) are taken as 0..1 if none is above 1, else as 0..255, and clipped; NaN is 0.
    """
    rgb = _upright(_rgb(image), _orientation(image))
    if 0 in rgb.shape:
        raise BadImage("no pixels")
    return rgb


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, open. Whatever the system says against it becomes a BadImage."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadImage("not a regular file")
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise BadImage((error.strerror or str(error)).lower()) from error


def _decode(stream: BinaryIO) -> Pixels:
    with _no_pillow_warnings():
        try:
            with Image.open(stream, formats=FORMATS) as image:
                _reduce(image)
                image.load()  # TIFF applies its orientation and drops the tag: so this comes before the tag is read
                return to_rgb(image)
        except BadImage:
            raise
        # Pillow's decoders raise whatever they stumble on: OSError, SyntaxError, struct.error, IndexError ...
        except Exception as error:
            raise BadImage(_reason(error, stream)) from error


def _reduce(image: Image.Image) -> None:
    """Have a large JPEG decoded to fewer pixels. The format has them at a half, a quarter and an eighth of the size for
    less work than at the whole; networks look at a few hundred a side, and random crops at a part of an image."""
    times = next((k for k in (8, 4, 2) if min(image.size) >= k * ENOUGH), 1)
    if times > 1 and image.format in ("JPEG", "MPO"):
        image.draft(None, (image.width // times, image.height // times))


def _rgb(image: Image.Image) -> Pixels:
    if image.mode.startswith("I;16"):
        return _gray((np.asarray(image).astype(np.uint32) + 128) // 257)
    if image.mode == "I":
        return _gray((np.asarray(image).clip(0, 65535) + 128) // 257)
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image), nan=0, posinf=255, neginf=0)
        return _gray((values * (255 if values.max(initial=0) <= 1 else 1)).clip(0, 255).round())
    image = image.convert(_NOT_ALIKE[image.mode]) if image.mode in _NOT_ALIKE else image
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def _gray(values: np.ndarray[Any, Any]) -> Pixels:
    return np.repeat(values.astype(np.uint8)[:, :, None], 3, axis=2)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 (upright) where it is missing, damaged or out of range."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged tag block says nothing about the pixels
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _upright(rgb: Pixels, orientation: int) -> Pixels:
    if orientation >= 5:
        rgb = rgb.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        rgb = rgb[::-1]
    if orientation in (2, 3, 6, 7):
        rgb = rgb[:, ::-1]
    return np.ascontiguousarray(rgb)


def _reason(error: Exception, stream: BinaryIO) -> str:
    """Why a file did not decode, in a few words."""
    try:
        stream.seek(0)
        head = stream.read(256).lstrip().lower()
    except (OSError, ValueError):
        head = b"?"
    if not head:
        return "empty"
    if isinstance(error, Image.DecompressionBombError):
        return "too many pixels: more than Pillow's limit against decompression bombs"
    if head.startswith((b"<!doctype html", b"<html")):
        return "a web page, not an image"
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    if "truncated" in str(error).lower():
        return "truncated"
    text = " ".join(str(error).split())
    return f"damaged ({text[:80] or type(error).__name__})"


_lock = threading.Lock()
_inside = 0
_saved: list[Any] = []


@contextmanager
def _no_pillow_warnings() -> Iterator[None]:
    """Silence Pillow's warnings about large images and odd metadata in all threads that are inside.

    Filters belong to the process, and warnings.catch_warnings in several threads may restore the wrong ones. Here the
    first thread that enters adds a filter, and the last that leaves removes it.
    """
    global _inside
    with _lock:
        if _inside == 0:
            _saved.append(catcher := warnings.catch_warnings())
            catcher.__enter__()
            warnings.filterwarnings("ignore", module=r"PIL\.")
        _inside += 1
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _saved.pop().__exit__(None, None, None)
