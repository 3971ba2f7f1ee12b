"""The image files that arguments name: files, folders, patterns."""

import glob
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tlcli.data.listing import is_image, is_visible
from tlcli.files import is_dir


@dataclass(frozen=True)
class MissingPath:
    """An argument that names no image, and why."""

    path: str
    why: str


Named = str | MissingPath


def expand_image_paths(arguments: Iterable[str], *, patterns: bool = True) -> Iterator[Named]:
    """The images that each argument names, in order, as paths; an argument that names none as a Nothing.

    A file is taken as it is, whatever its name. Of a folder these are the images in it, sorted, then those of its
    sub-folders, at any depth; hidden files are none. With `patterns` what is no file may be one, ** included. Names are
    read as they are asked for: no more than those of one folder are in memory.
    """
    for argument in arguments:
        if is_dir(argument):
            yield from _of_folder(argument)
        elif patterns and glob.has_magic(argument) and not os.path.lexists(argument):
            yield from _of_pattern(argument)
        else:
            yield argument


def _of_pattern(pattern: str) -> Iterator[Named]:
    """Sorted: what it matches is in memory at once."""
    found = sorted(glob.iglob(pattern, recursive=True))  # noqa: PTH207 - Path.glob takes no absolute pattern
    if not found:
        yield MissingPath(pattern, "no file matches")
    for path in found:
        if not is_dir(path):
            yield path
        elif "**" not in pattern:  # which matches what is in a folder already
            yield from _of_folder(path)


def _of_folder(folder: str) -> Iterator[Named]:
    empty = True
    for found in _below(folder):
        empty = False
        yield found
    if empty:
        yield MissingPath(folder, "no images in this folder")


def _below(folder: str) -> Iterator[Named]:
    """The images below a folder. Links to folders are not followed, so that there are no loops."""
    try:
        with os.scandir(folder) as entries:
            seen = sorted((e.name, e.is_dir(follow_symlinks=False)) for e in entries if is_visible(e.name))
    except OSError as error:
        yield MissingPath(folder, (error.strerror or str(error)).lower())
        return
    for name, is_folder in seen:
        if not is_folder and is_image(name):
            yield os.path.join(folder, name)  # noqa: PTH118 - as it was typed: Path would take ./ away
    for name, is_folder in seen:
        if is_folder:
            yield from _below(os.path.join(folder, name))  # noqa: PTH118
