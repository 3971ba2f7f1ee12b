"""What the heads of image files say, without decoding them: format, colour mode, size."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from tlcli.data.decode import FORMATS, BadImage
from tlcli.data.reading import CachedImages
from tlcli.data.source import Files, no_longer_readable
from tlcli.data.threads import map_in_threads
from tlcli.data.together import ConcatSplits
from tlcli.reporter import Reporter


@dataclass(frozen=True)
class Header:
    """`mode` is Pillow's name of the colours (RGB, L, P, CMYK ...), `width` and `height` are in pixels, as stored."""

    format: str
    mode: str
    width: int
    height: int


def headers(images: ConcatSplits, reporter: Reporter) -> Iterator[Header]:
    """The header of each image, in order; images that are no files of their own have the format `array`."""
    with warnings.catch_warnings(), reporter.track("headers", len(images)) as done:
        warnings.simplefilter("ignore")  # Pillow's, about large images and odd metadata: decoding judges them
        for header in map_in_threads(lambda i: _header(images, i), range(len(images)), 64):
            yield header
            done(1)


def _header(images: ConcatSplits, position: int) -> Header:
    source, index = images.place(position)
    inner = source.images if isinstance(source, CachedImages) else source
    if isinstance(inner, Files):
        try:
            return read_header(inner.paths[index])
        except BadImage as error:
            raise no_longer_readable(source, index, error) from error
    height, width = images.read(position).shape[:2]
    return Header("array", "RGB", width, height)


def read_header(path: Path) -> Header:
    """Of an image file. Raises BadImage."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return Header(image.format or "", image.mode, image.width, image.height)
    except Exception as error:  # Pillow raises whatever it stumbles on
        raise BadImage(str(error)) from error
