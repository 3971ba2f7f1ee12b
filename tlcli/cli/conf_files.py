"""Groups, options, keys, defaults and comments of the YAML files, for help, completion and error messages.

They are read line by line, because PyYAML takes as long to import as the rest of `tlcli train --help`.
"""

import re
from collections.abc import Collection, Sequence
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

from tlcli.files import expand_user

_LINE = re.compile(
    r"""( *)([\w.-]+):"""
    r"""(?: +("[^"]*"|'[^']*'|\[.*?\]|\{.*?\}|[^\s#\[{"'|>]\S*(?: +[^\s#]\S*)*))?"""  # a value on the same line
    r""" *(?:#\s*(.*))?"""
)


class Key(NamedTuple):
    """One key of a file: its dotted name, its default as the file has it, and its comment."""

    name: str
    default: str
    comment: str


class Option:
    """One option of a group."""

    def __init__(self, group: str, path: Path) -> None:
        self.group, self.name, self.path = group, path.stem, path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8", errors="replace")

    @property
    def comment(self) -> str:
        """The first comment of the file; a line for Hydra is not one."""
        lines = [line for line in self.text.splitlines() if line.strip() and "@package" not in line]
        return lines[0].strip("# ") if lines and lines[0].startswith("#") else ""

    @property
    def keys(self) -> list[Key]:
        return keys_in(self.text)

    @property
    def kind(self) -> str | None:
        """The value of the key `kind`, which names the class of the option."""
        return next((key.default for key in self.keys if key.name == "kind"), None)

    @property
    def all_keys(self) -> list[Key]:
        """The keys of the option and those that it takes from common/."""
        files = [conf_dir() / "common" / f"{name}.yaml" for name in re.findall(r"/common/(\w+)@_here_", self.text)]
        shared = [key for file in files if file.is_file() for key in keys_in(file.read_text(encoding="utf-8"))]
        return list({key.name: key for key in (*shared, *self.keys)}.values())


class ConfFiles:
    """The YAML files of tlcli and of some folders. If two have the same option, the earlier one wins, as in Hydra."""

    def __init__(self, *folders: Path) -> None:
        self.folders = (conf_dir(), *folders)
        main = (conf_dir() / "train.yaml").read_text(encoding="utf-8")
        self.top_level = keys_in(main)
        self.defaults: dict[str, str] = dict(re.findall(r"^ *- (\w+): (\w+)", main, re.MULTILINE))

    @cached_property
    def groups(self) -> dict[str, dict[str, Option]]:
        """Options of each group, the groups of the main file's defaults list first and in its order."""
        groups: dict[str, dict[str, Option]] = {group: {} for group in self.defaults}
        for folder in self.folders:
            for path in sorted(folder.rglob("*.yaml")):
                group = path.relative_to(folder).parent.as_posix()
                if group.split("/")[0] not in (".", "common", "hydra", "tune"):  # not of `tlcli train`
                    groups.setdefault(group, {}).setdefault(path.stem, Option(group, path))
        return {group: dict(sorted(options.items())) for group, options in groups.items() if options}

    def options_with(self, group: str, kinds: Collection[str]) -> list[str]:
        """Return the names of a group's options that are of one of these kinds."""
        return [name for name, option in self.groups.get(group, {}).items() if option.kind in kinds]


@cache
def conf_dir() -> Path:
    """Return the folder with tlcli's own config: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    return next(parent / "conf" for parent in (package, package.parent) if (parent / "conf" / "train.yaml").is_file())


def files_for(words: Sequence[str]) -> ConfFiles:
    """Return the YAML files that a command line makes available, with the folder that --config-dir names."""
    for word, value in zip(words, [*words[1:], ""], strict=False):
        flag, equals, attached = word.partition("=")
        if flag in ("--config-dir", "-cd") and (folder := expand_user(attached if equals else value)).is_dir():
            return ConfFiles(folder)
    return ConfFiles()


@cache
def keys_in(text: str) -> list[Key]:
    """Return the keys of a YAML text; of a key with a block of keys of its own, these alone."""
    keys: list[Key] = []
    parents: list[tuple[int, str]] = []  # indent and name
    for line in text.splitlines():
        if keys and (more := re.fullmatch(r"\s{8,}#\s*(.*)", line)):
            keys[-1] = keys[-1]._replace(comment=f"{keys[-1].comment} {more[1].strip()}".strip())
        elif found := _LINE.fullmatch(line.rstrip()):
            indent = len(found[1])
            parents = [parent for parent in parents if parent[0] < indent]
            if found[3] is None:
                parents.append((indent, found[2]))
            else:
                name = ".".join([*(parent for _, parent in parents), found[2]])
                keys.append(Key(name, found[3], (found[4] or "").strip()))
    return keys
