"""`tlcli doctor`: what is here, how fast it is, and what does not work."""

import json
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcli.cli.arguments import FORMATS, only_format
from tlcli.cli.terminal import terminal_columns

if TYPE_CHECKING:
    from tlcli.doctor import Fact, Problem

HELP = """\
usage: tlcli doctor [--format table|json]

Versions, processor, memory and GPUs; which number format is quick here; room for
runs and for cached activations; which backbones have their weights on this
machine; and a forward pass and a training step, timed. Takes a few seconds,
fetches nothing and leaves nothing behind. What it prints has neither your name
nor your home directory in it and can be pasted into an issue.

The exit code is 0 where tlcli can train, and 1 where it cannot.

examples:
  tlcli doctor
  tlcli doctor --format json > doctor.json
"""

OUTPUTS = "outputs"


def run(argv: list[str]) -> int:
    """Examine this machine; 0, or 1 where tlcli cannot train on it."""
    if "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    form = only_format("doctor", argv)
    from tlcli.cli.libraries import importing

    with importing():
        from tlcli.doctor import Fact, Problem, examine

    found = examine(Path(OUTPUTS), dict(_backbones()))
    facts = [finding for finding in found if isinstance(finding, Fact)]
    problems = [finding for finding in found if isinstance(finding, Problem)]
    fails = any(problem.fails for problem in problems)
    print(_json(facts, problems) if form == "json" else "\n".join(page(facts, problems, terminal_columns())))
    return 1 if fails else 0


def candidates(before: Sequence[str]) -> Iterator[str]:
    """What may follow these words on a command line, for completion."""
    yield from FORMATS if before and before[-1] == "--format" else ("--format", "--help")


def _backbones() -> Iterator[tuple[str, str]]:
    """The options of backbone= and their kinds."""
    from tlcli.cli.conf_files import ConfFiles, conf_dir

    for name, option in ConfFiles([conf_dir()]).groups["backbone"].items():
        yield name, option.schema or ""


def page(facts: "Sequence[Fact]", problems: "Sequence[Problem]", width: int | None) -> list[str]:
    """The lines for people: what was found by topic, then what is wrong."""
    lines: list[str] = []
    topic = ""
    label = max(len(fact.name) for fact in facts) + 2 if facts else 0
    for fact in facts:
        if fact.topic != topic:
            lines += ["", fact.topic] if lines else [fact.topic]
            topic = fact.topic
        lines += _hanging(f"  {fact.name:<{label}}", fact.text, width)
    lines.append("")
    for problem in problems:
        lines += _hanging("cannot train: " if problem.fails else "warning: ", problem.text, width)
    if not problems:
        lines.append("no problems found")
    elif not any(problem.fails for problem in problems):
        lines.append("tlcli can train here")
    return lines


def _hanging(first: str, text: str, width: int | None) -> list[str]:
    """A text behind a label, wrapped under itself."""
    if width is None:
        return [first + text]
    wrapper = textwrap.TextWrapper(max(width, len(first) + 20), break_on_hyphens=False, break_long_words=False)
    wrapper.initial_indent, wrapper.subsequent_indent = first, " " * len(first)
    return wrapper.wrap(text)


def _json(facts: "Sequence[Fact]", problems: "Sequence[Problem]") -> str:
    found: dict[str, Any] = {}
    for fact in facts:
        found.setdefault(fact.topic, {})[fact.name] = fact.value
    wrong = [{"text": problem.text, "fails": problem.fails} for problem in problems]
    return json.dumps({**found, "problems": wrong, "can_train": not any(p.fails for p in problems)}, indent=2)
