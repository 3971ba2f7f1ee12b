"""How much a YAML file makes once its aliases are followed, known before anything is made of it.

A file of a few lines whose aliases name lists of aliases stands for billions of values (a YAML bomb), and OmegaConf
copies each of them.
"""

from pathlib import Path

import yaml  # type: ignore[import-untyped]

from tlcli.errors import UsageError

MOST_VALUES = 200_000
"""As many as a list of all classes of the largest data sets has, several times over."""
DEEPEST = 50
"""Levels of lists and keys; a config of ours has four. Python's own limit is reached at some hundreds."""

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def check_yaml(file: Path) -> None:
    """Raise UsageError where a file stands for more values, or deeper ones, than a config can have.

    Raises OSError, UnicodeDecodeError or yaml.YAMLError where it cannot be read.
    """
    if file.exists() and not file.is_file():
        raise UsageError(f"{file}: not a regular file")  # a pipe would be waited for
    try:
        _check(file.read_text(encoding="utf-8"), str(file))
    except yaml.YAMLError as error:
        if "nesting depth" in str(error):  # libyaml's own limit, met while it reads ahead
            raise UsageError(f"{file}: more than {DEEPEST} levels deep; no config has so many") from error
        raise


def _check(text: str, name: str) -> None:
    tally = _Tally()
    for event in yaml.parse(text, Loader=LOADER):
        tally.see(event)
        where = f"{name}, line {event.start_mark.line + 1}"
        if tally.is_circle:
            raise UsageError(f"{where}: *{event.anchor} is part of what it stands for; write the values out")
        if tally.values > MOST_VALUES:
            raise UsageError(f"{where}: stands for more than {MOST_VALUES:,} values; no config has so many")
        if tally.depth > DEEPEST:
            raise UsageError(f"{where}: more than {DEEPEST} levels deep; no config has so many")


class _Tally:
    """Counts values event by event: an alias counts as what it stands for."""

    def __init__(self) -> None:
        self.values = 0
        self.is_circle = False
        self._sizes: dict[str, int] = {}
        self._open: list[tuple[str | None, int]] = []  # the anchors of what is not closed yet, and the count before

    @property
    def depth(self) -> int:
        return len(self._open)

    def see(self, event: yaml.Event) -> None:
        match event:
            case yaml.CollectionStartEvent():
                self._open.append((event.anchor, self.values))
                self._sizes.pop(event.anchor, None)  # the name is given anew
                self.values += 1
            case yaml.CollectionEndEvent():
                anchor, before = self._open.pop()
                if anchor:
                    self._sizes[anchor] = self.values - before
            case yaml.ScalarEvent():
                self.values += 1
                if event.anchor:
                    self._sizes[event.anchor] = 1
            case yaml.AliasEvent():
                self.is_circle = any(anchor == event.anchor for anchor, _ in self._open)
                self.values += self._sizes.get(event.anchor, 1)
