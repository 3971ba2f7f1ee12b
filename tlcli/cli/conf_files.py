"""What conf/ says about itself, read from the YAML files alone: groups, options, keys, defaults and comments.

Help, completion and error messages come from here, without Hydra or a YAML parser, so that they are quick. Hydra
composes the config; nothing here decides what runs.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

HIDDEN = frozenset({"hydra", "schema", "common"})
"""Groups that hold parts of other options, and are not for users to choose from."""

MAIN = "train.yaml"

_KEY = re.compile(r"(?P<indent> *)(?P<name>[A-Za-z_]\w*):(?=\s|$)(?P<rest>.*)")
_VALUE = re.compile(r"""\s*(?P<value>(?:[^#'"]|'[^']*'|"[^"]*"|(?<=\S)\#)*)(?:\#\s*(?P<comment>.*))?""", re.VERBOSE)
_MORE_COMMENT = re.compile(r"\s{8,}#\s*(?P<comment>.*)")
_DEFAULT = re.compile(r"\s+- (?P<group>[\w/]+): (?P<option>\S+)")
_INCLUDE = re.compile(r"\s+- /common/(?P<path>[\w/]+)@_here_")


@dataclass(frozen=True)
class Key:
    """One key of a file: its dotted name, its default as the file has it, and its comment."""

    name: str
    default: str
    comment: str


@dataclass(frozen=True)
class Option:
    """One option of a group."""

    group: str
    name: str
    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8", errors="replace")

    @property
    def comment(self) -> str:
        """The first comment of the file; a line for Hydra is not one."""
        lines = (line for line in self.text.splitlines() if line.strip() and "@package" not in line)
        first = next(lines, "")
        return first.lstrip("# ").strip() if first.startswith("#") else ""

    @property
    def kind(self) -> str | None:
        """The value of the key `kind`, which names the class of the option; None if it has none."""
        return next((key.default for key in keys_in(self.text) if key.name == "kind"), None)


class ConfFiles:
    """The YAML files of some folders; where two folders have the same option, the earlier one wins, as in Hydra."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders

    @cached_property
    def groups(self) -> dict[str, dict[str, Option]]:
        """The options of each group, the groups of the main file's defaults list first and in its order."""
        found: dict[str, dict[str, Option]] = {group: {} for group in self.defaults}
        for folder in self.folders:
            for path in sorted(folder.rglob("*.yaml")):
                group = path.relative_to(folder).parent.as_posix()
                if group != "." and group.split("/")[0] not in HIDDEN:
                    found.setdefault(group, {}).setdefault(path.stem, Option(group, path.stem, path))
        return {group: dict(sorted(options.items())) for group, options in found.items() if options}

    @cached_property
    def defaults(self) -> dict[str, str]:
        """The option that each group of the main file's defaults list has."""
        found = (_DEFAULT.fullmatch(line) for line in _without_comment(self.main))
        return {default["group"]: default["option"] for default in found if default}

    @cached_property
    def main(self) -> str:
        """The text of the main file."""
        return next(path for folder in self.folders if (path := folder / MAIN).is_file()).read_text(encoding="utf-8")

    def top_level(self) -> list[Key]:
        """The keys of the main file."""
        return list(keys_in(self.main))

    def keys_of(self, option: Option) -> list[Key]:
        """The keys of an option, its own first, then those that it takes from common/."""
        texts = [option.text]
        for include in _INCLUDE.finditer(option.text):
            paths = (folder / "common" / f"{include['path']}.yaml" for folder in self.folders)
            texts += [path.read_text(encoding="utf-8") for path in paths if path.is_file()][:1]
        return list({key.name: key for text in reversed(texts) for key in keys_in(text)}.values())

    def options_with(self, group: str, kinds: Collection[str]) -> list[str]:
        """Return the names of a group's options that are of one of these kinds."""
        return [name for name, option in self.groups.get(group, {}).items() if option.kind in kinds]


def conf_dir() -> Path:
    """The folder with tlcli's own config: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / MAIN).is_file():
            return folder
    raise FileNotFoundError("tlcli's conf/ folder is missing: reinstall tlcli")


def extra_folders(words: Sequence[str]) -> list[Path]:
    """The folder that --config-dir names in a command line, in a list, or an empty list."""
    for word, value in zip(words, [*words[1:], ""], strict=False):
        flag, equals, attached = word.partition("=")
        if flag in ("--config-dir", "-cd") and (folder := Path(attached if equals else value)).is_dir():
            return [folder]
    return []


def keys_in(text: str) -> Iterator[Key]:
    """The keys of a YAML text in block style; of a key that has keys of its own, these alone."""
    lines = text.splitlines()
    parents: list[tuple[int, str]] = []
    for number, line in enumerate(lines):
        if not (found := _KEY.fullmatch(line)) or found["name"] == "defaults":
            continue
        indent = len(found["indent"])
        parents = [(depth, name) for depth, name in parents if depth < indent]
        parents.append((indent, found["name"]))
        default, comment = _value_and_comment(found["rest"])
        if default:
            yield Key(".".join(name for _, name in parents), default, _with_more(comment, lines[number + 1 :]))


def _value_and_comment(rest: str) -> tuple[str, str]:
    """What stands behind a key's colon, in its two parts."""
    found = _VALUE.fullmatch(rest)
    if not found:
        return rest.strip(), ""
    return found["value"].strip(), (found["comment"] or "").strip()


def _with_more(comment: str, following: list[str]) -> str:
    """A comment with the lines that go on with it."""
    for line in following:
        if not (more := _MORE_COMMENT.fullmatch(line)):
            break
        comment += " " + more["comment"].strip()
    return comment


def _without_comment(text: str) -> Iterator[str]:
    for line in text.splitlines():
        yield line.split(" #")[0].rstrip()
