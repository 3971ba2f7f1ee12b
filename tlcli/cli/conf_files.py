"""Groups, options, keys, defaults and comments of the YAML files.

Help, completion and error messages come from here, without Hydra. Hydra composes the config; nothing here decides what
runs.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml  # type: ignore[import-untyped]

HIDDEN = frozenset({"hydra", "common"})  # groups that are not for users to choose from
MAIN = "train.yaml"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


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

    @cached_property
    def comment(self) -> str:
        """The first comment of the file; a line for Hydra is not one."""
        lines = (line for line in self.text.splitlines() if line.strip() and "@package" not in line)
        first = next(lines, "")
        return first.lstrip("# ").strip() if first.startswith("#") else ""

    @cached_property
    def keys(self) -> list[Key]:
        return keys_in(self.text)

    @property
    def kind(self) -> str | None:
        """The value of the key `kind`, which names the class of the option."""
        return next((key.default for key in self.keys if key.name == "kind"), None)


class ConfFiles:
    """The YAML files of some folders. If two folders have the same option, the earlier one wins, as in Hydra."""

    def __init__(self, folders: Sequence[Path]) -> None:
        self.folders = folders

    @cached_property
    def groups(self) -> dict[str, dict[str, Option]]:
        """Options of each group, the groups of the main file's defaults list first and in its order."""
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
        choices = defaults_in(self._main)
        return {group: option for group, option in choices.items() if option and not group.startswith("override ")}

    @cached_property
    def _main(self) -> str:
        return next(path for folder in self.folders if (path := folder / MAIN).is_file()).read_text(encoding="utf-8")

    def top_level(self) -> list[Key]:
        """Return the keys of the main file."""
        return keys_in(self._main)

    def keys_of(self, option: Option) -> list[Key]:
        """Return the keys of an option, its own first, then those that it takes from common/."""
        found = {key.name: key for key in option.keys}
        for include in defaults_in(option.text):
            shared = re.fullmatch(r"/common/(\w+)@_here_", include)
            if shared and (path := conf_dir() / "common" / f"{shared[1]}.yaml").is_file():
                found = {key.name: key for key in keys_in(path.read_text(encoding="utf-8"))} | found
        return list(found.values())

    def options_with(self, group: str, kinds: Collection[str]) -> list[str]:
        """Return the names of a group's options that are of one of these kinds."""
        return [name for name, option in self.groups.get(group, {}).items() if option.kind in kinds]


def conf_dir() -> Path:
    """Return the folder with tlcli's own config: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / MAIN).is_file():
            return folder
    raise FileNotFoundError("tlcli's conf/ folder is missing: reinstall tlcli")


def extra_folders(words: Sequence[str]) -> list[Path]:
    """Return the folder that --config-dir names in a command line, in a list, or an empty list."""
    for word, value in zip(words, [*words[1:], ""], strict=False):
        flag, equals, attached = word.partition("=")
        if flag in ("--config-dir", "-cd") and (folder := Path(attached if equals else value)).is_dir():
            return [folder]
    return []


def _root(text: str) -> list[tuple[yaml.Node, yaml.Node]]:
    """Return the nodes of a YAML text's keys and values; none if it is not a mapping. Aliases are not followed."""
    try:
        if "*" not in text or not any(isinstance(token, yaml.AliasToken) for token in yaml.scan(text, Loader=LOADER)):
            root = yaml.compose(text, Loader=LOADER)
            return list(root.value) if isinstance(root, yaml.MappingNode) else []
    except (yaml.YAMLError, RecursionError):
        pass  # reported when Hydra reads the file
    return []


def defaults_in(text: str) -> dict[str, str]:
    """Return the entries of the defaults list of a YAML text: the option of each group, "" for an entry without one."""
    found: dict[str, str] = {}
    for key, value in _root(text):
        if key.value == "defaults" and isinstance(value, yaml.SequenceNode):
            for entry in value.value:
                pairs = [(k.value, v.value) for k, v in entry.value] if isinstance(entry, yaml.MappingNode) else []
                found |= dict(pairs or [(str(entry.value), "")])
    return found


def keys_in(text: str) -> list[Key]:
    """Return the keys of a YAML text; of a key with a block of keys of its own, these alone."""
    lines = text.splitlines()

    def walk(pairs: list[tuple[yaml.Node, yaml.Node]], prefix: str) -> Iterator[Key]:
        for key, value in pairs:
            name, start, end = f"{prefix}{key.value}", value.start_mark, value.end_mark
            if isinstance(value, yaml.MappingNode) and not value.flow_style:
                yield from walk(value.value, f"{name}.")
            elif name != "defaults" and start.line == end.line and start.column < end.column:
                comment = lines[end.line][end.column :].lstrip().removeprefix("#").strip()
                for line in lines[end.line + 1 :]:
                    if not (more := re.fullmatch(r"\s{8,}#\s*(.*)", line)):
                        break
                    comment += " " + more[1].strip()
                yield Key(name, lines[start.line][start.column : end.column], comment)

    return list(walk(_root(text), ""))
