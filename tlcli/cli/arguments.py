"""The argument that every command with a table takes: --format."""

from collections.abc import Sequence

from tlcli.errors import UsageError
from tlcli.text import did_you_mean

FORMATS = ("table", "json")


def format_of(argv: Sequence[str]) -> tuple[str, list[str]]:
    """The format that is asked for, and the other words. Raises UsageError."""
    shape, rest, words = FORMATS[0], [], iter(argv)
    for word in words:
        flag, equals, value = word.partition("=")
        if flag != "--format":
            rest.append(word)
            continue
        shape = value if equals else next(words, "")
        if shape not in FORMATS:
            raise UsageError(f"--format takes one of {', '.join(FORMATS)}.{did_you_mean(shape, FORMATS)}")
    return shape, rest


def only_format(command: str, words: Sequence[str]) -> str:
    """The format of a command that takes nothing else. Raises UsageError."""
    match [part for word in words for part in word.split("=", 1)]:
        case []:
            return FORMATS[0]
        case ["--format", name] if name in FORMATS:
            return name
        case ["--format", *names]:
            hint = did_you_mean(names[0], FORMATS) if names else ""
            raise UsageError(f"--format takes one of {', '.join(FORMATS)}.{hint}")
        case [word, *_]:
            hint = did_you_mean(word, ["--format", "--help"]) or " It takes --format table|json"
            raise UsageError(f"{command} does not take {word!r}.{hint}")
    raise AssertionError(words)
