"""Decodes image files to RGB pixels, here only, so that training, evaluation and prediction see the same image."""

import errno
import hashlib
import inspect
import re
import stat
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
from PIL import Image, UnidentifiedImageError, features

Pixels = np.ndarray[Any, np.dtype[np.uint8]]
ValueRange = tuple[float, float]  # the values of a deep image that become 0 and 255

# Pillow knows more formats than these. Some of them start other programs: EPS is handed to Ghostscript.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "AVIF")
HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")

MIN_REDUCED_SIDE = 1024  # pixels of the shorter side that are left of a photograph that is reduced while it is decoded
MIN_GRAY_LEVELS = 64

_ORIENTATION, _BITS_PER_SAMPLE, _SAMPLE_FORMAT, _SIGNED = 0x0112, 258, 339, 2  # tags of EXIF and TIFF, and a value
_IGNORE_PILLOW = ("ignore", None, Warning, re.compile(r"PIL\."), 0)  # an entry of warnings.filters


class BadImage(ValueError):
    """A file is not an image, or is damaged; the message is the reason in a few words."""

    @property
    def may_pass(self) -> bool:
        """True if the system's error may not come again, as of memory, permissions or a network's disk."""
        cause = self.__cause__
        errors = (None, errno.EINVAL)  # without a number it is Pillow's; a damaged file may lead before its own start
        return isinstance(cause, MemoryError) or (isinstance(cause, OSError) and cause.errno not in errors)


@dataclass(frozen=True, eq=False)
class RawImage:
    """A decoded image before its values are mapped to 8 bits.

    `values` are uint8 (height, width, 3), or for a gray image deeper than 8 bits integers of 16 or 32 bits or float32
    (height, width). `is_reduced` is True for color deeper than 8 bits, of which the decoder keeps the upper 8.
    """

    values: np.ndarray[Any, Any]
    is_reduced: bool = False

    @property
    def is_deep(self) -> bool:
        return self.values.ndim == 2

    def to_pixels(self, value_range: ValueRange | None) -> Pixels:
        """Return uint8 (height, width, 3). Values outside the range are clipped, NaN becomes the low end.

        Without a range, the lowest and the highest value of an integer type are mapped, and 0 to 1 for floats.
        """
        if not self.is_deep:
            return self.values
        dtype, (low, high) = self.values.dtype, value_range or (0.0, 1.0)
        if dtype.kind != "f":
            limits, dtype = np.iinfo(dtype), np.dtype(np.float64)
            low, high = value_range or (float(limits.min), float(limits.max))
        values = self.values.astype(dtype)  # the only copy: a scan may have 100 megapixels
        np.nan_to_num(values, copy=False, nan=low, posinf=high, neginf=low)
        values -= low
        values *= 255 / (high - low)
        gray = values.clip(0, 255, out=values).round(out=values).astype(np.uint8)
        return np.repeat(gray[:, :, None], 3, axis=2)


@dataclass
class DeepImages:
    """Number and extremes of gray images deeper than 8 bits, and the gray levels that are left of them.

    `reduced` counts color images, of which the decoder keeps the upper 8 bits.
    """

    images: int = 0
    low: float = float("inf")
    high: float = float("-inf")
    levels: set[int] = field(default_factory=set)
    reduced: int = 0

    def add(self, raw: RawImage, gray: np.ndarray[Any, Any]) -> None:
        """Add an image. `gray` has its pixels."""
        self.reduced += raw.is_reduced
        if raw.is_deep:
            finite = raw.values[np.isfinite(raw.values)]
            self.images += 1
            if finite.size:
                self.low, self.high = min(self.low, float(finite.min())), max(self.high, float(finite.max()))
            self.levels.update(np.flatnonzero(np.bincount(gray[..., 0].ravel())).tolist())

    def notes(self, value_range: ValueRange | None) -> Iterator[str]:
        """Yield lines for the plan."""
        if self.images:
            full = "the full range of the type (floats: 0 to 1)"
            mapped = full if value_range is None else "{:g} to {:g}".format(*value_range)
            values = f"values {self.low:g} to {self.high:g}, mapped from {mapped}"
            text = f"{self.images:,} images are deeper than 8 bits: {values}"
            if len(self.levels) < MIN_GRAY_LEVELS:
                text += f": only {len(self.levels)} gray levels are left; set dataset.range=auto or [low,high]"
            yield text
        if self.reduced:
            text = "the decoder keeps the upper 8 bits of each channel, and dataset.range does not apply to them"
            yield f"{self.reduced:,} color images are deeper than 8 bits: {text}"


def read_image(file: Path | BinaryIO, value_range: ValueRange | None = None) -> Pixels:
    """Return the pixels of an image file, or of a seekable binary stream: uint8, (height, width, 3), RGB.

    The EXIF orientation is applied; of an animation this is the first frame. A JPEG whose shorter side has 2, 4 or 8
    times MIN_REDUCED_SIDE pixels or more is decoded at a half, a quarter or an eighth of its size. Raise BadImage if
    the file does not decode. Pipes, devices and folders are never opened.
    """
    return read_raw(file).to_pixels(value_range)


def read_raw(file: Path | BinaryIO) -> RawImage:
    """Return an image as `read_image` does, before its values are mapped to 8 bits. Raise BadImage."""
    with _opened(file) if isinstance(file, Path) else nullcontext(file) as stream:
        return _decode(stream)


def read_bytes(path: Path, start: int = 0, size: int = -1) -> bytes:
    """Return bytes of a file, all by default. Raise BadImage if `read_image` would not open it."""
    with _opened(path) as stream:
        stream.seek(start)
        return stream.read(size)


@cache
def decoder() -> str:
    """Return the versions and rules on which the pixels of an image depend, in addition to its bytes."""
    codecs = [f"{name} {features.version(name)}" for name in ("jpg", "webp", "avif", "libtiff", "zlib")]
    heif = next((d.version for d in metadata.distributions(name="pi-heif")), None)
    rules = hashlib.blake2b(inspect.getsource(sys.modules[__name__]).encode(), digest_size=8).hexdigest()
    return ", ".join([f"Pillow {PIL.__version__}", *codecs, f"heif {heif}", f"rules {rules}"])


def raw_image(image: Image.Image, *, is_reduced: bool = False) -> RawImage:
    """Return an image in memory as a RawImage.

    Alpha, in whatever form, goes over white. Palette, gray, 1-bit and CMYK images are converted as Pillow does. Gray
    images of 16 or 32 bits and of floats keep their values.
    """
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint16)
    elif image.mode == "I":  # TIFF of 16 or 32 bits, with or without sign, or PGM, which Pillow scales to 16 bits
        tags = getattr(image, "tag_v2", {})
        sign = "i" if tags.get(_SAMPLE_FORMAT, (1,))[0] == _SIGNED else "u"
        if tags.get(_BITS_PER_SAMPLE, (16,))[0] == 32:
            values = np.asarray(image).view(f"{sign}4")
        else:
            limits = np.iinfo(f"{sign}2")
            values = np.asarray(image).clip(limits.min, limits.max).astype(limits.dtype)
    elif image.mode == "F":
        values = np.asarray(image)
    else:
        opaque = image
        if image.has_transparency_data:
            alpha = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
            opaque = Image.alpha_composite(Image.new("RGBA", image.size, "white"), alpha)  # without the EXIF of image
        values = np.array(opaque if opaque.mode == "RGB" else opaque.convert("RGB"))
    if 0 in values.shape:
        raise BadImage("no pixels")
    try:
        orientation = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a damaged tag block says nothing about the pixels
        orientation = 1
    if orientation in (5, 6, 7, 8):
        values = values.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        values = values[::-1]
    if orientation in (2, 3, 6, 7):
        values = values[:, ::-1]
    return RawImage(np.ascontiguousarray(values), is_reduced)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file. Errors of the system become BadImage."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise BadImage("not a regular file")
        with path.open("rb") as stream:
            yield stream
    except OSError as error:
        raise BadImage((error.strerror or str(error)).lower()) from error


def _decode(stream: BinaryIO) -> RawImage:
    head = stream.read(64)
    if not head.strip():
        raise BadImage("empty")
    stream.seek(0)
    formats: tuple[str, ...] = FORMATS
    if head[4:8] == b"ftyp" and head[8:12] in HEIF_BRANDS and b"avif" not in head:
        try:
            import pi_heif
        except ImportError:
            raise BadImage("HEIC files need the package pi-heif: pip install 'tlcli[heif]'") from None
        pi_heif.register_heif_opener()
        formats = ("HEIF",)
    if _IGNORE_PILLOW not in warnings.filters:  # about large images and odd metadata; catch_warnings is not for threads
        warnings.filterwarnings("ignore", module=r"PIL\.")
    try:
        with Image.open(stream, formats=formats) as image:
            # Networks look at a few hundred pixels per side, and random crops at a part of an image: JPEG decodes at a
            # half, a quarter and an eighth of the size for less work than at the full size.
            factor = next((k for k in (8, 4, 2) if min(image.size) >= k * MIN_REDUCED_SIDE), 1)
            if factor > 1 and image.format in ("JPEG", "MPO"):
                image.draft(None, (image.width // factor, image.height // factor))
            raw_mode = str(image.tile[0].args) if image.tile else ""  # such as ('RGB;16B', 0, 1); empty once loaded
            is_reduced = image.mode not in ("I", "F") and not image.mode.startswith("I;16")
            is_reduced = is_reduced and bool(re.search(";16[BLN]", raw_mode))  # BGR;16 of BMP has 5 or 6 bits
            if image.format == "PPM" and image.mode == "RGB":  # its tile has the maximum, if that is not 255
                is_reduced = any(isinstance(arg, int) and arg > 255 for arg in image.tile[0].args or ())
            if formats == ("HEIF",):  # in other formats `info` may have texts of the file under this name
                is_reduced = image.info.get("bit_depth", 8) > 8
            image.load()  # TIFF applies its orientation and drops the tag: so this comes before the tag is read
            return raw_image(image, is_reduced=is_reduced)
    except Image.DecompressionBombError as error:
        raise BadImage("too many pixels: more than Pillow's limit against decompression bombs") from error
    except UnidentifiedImageError as error:
        raise BadImage("not an image") from error
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, struct.error, IndexError and more
        text = " ".join(str(error).split())[:80] or type(error).__name__
        raise BadImage("truncated" if "truncated" in text.lower() else f"damaged ({text})") from error
