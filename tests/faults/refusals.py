"""Helpers that check a refusal: one line with an exit code, and nothing of the user's touched."""

import os
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tlcli.cli import exit_status

Tree = dict[str, tuple[Any, ...]]


def tree(folder: Path) -> Tree:
    """Each path below a folder with its kind, mode, time and content; nothing is followed or waited for."""
    found: Tree = {}
    for where, folders, files in os.walk(os.fsencode(folder)):
        for name in (*folders, *files):
            path = os.path.join(where, name)  # noqa: PTH118  names that are not UTF-8
            facts = os.lstat(path)
            content: Any = None
            if stat.S_ISREG(facts.st_mode):
                with open(path, "rb") as stream:  # noqa: PTH123
                    content = stream.read()
            elif stat.S_ISLNK(facts.st_mode):
                content = os.readlink(path)  # noqa: PTH115
            when = None if stat.S_ISDIR(facts.st_mode) else facts.st_mtime_ns
            found[os.fsdecode(path)] = (facts.st_mode, facts.st_size, when, content)
    return found


@contextmanager
def untouched(folder: Path) -> Iterator[None]:
    """Fails unless everything below a folder is afterwards what it was."""
    before = tree(folder)
    yield
    after = tree(folder)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert not changed, changed


def refused(do: Callable[[], object], code: int, *words: str, keeps: Path) -> str:
    """Assert that `do` ends with this exit code and these words, and changes nothing below `keeps`; return the line."""
    with untouched(keeps), pytest.raises(Exception) as caught:
        do()
    found, line = exit_status(caught.value)
    assert found == code, line
    assert "internal error" not in line
    assert line == " ".join(line.split())
    assert line.isprintable()
    for word in words:
        assert word in line
    return line


def yaml_bomb(levels: int = 26) -> str:
    """Return a YAML bomb: lists of aliases that stand for more than 10**24 values."""
    names = "abcdefghijklmnopqrstuvwxyz"[:levels]
    lists = [f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n" for before, name in pairwise(names)]
    return "".join([f"{names[0]}: &{names[0]} [x]\n", *lists])
