"""`tlcli doctor`: show what is installed on this machine and what does not work."""

import json
from pathlib import Path
from typing import Any

from tlcli.cli.parser import Parser
from tlcli.cli.table import UNLIMITED_WIDTH, terminal_columns
from tlcli.doctor import Fact, Problem, examine

SUMMARY = """\
Show versions, processor, memory and GPUs, free space for runs and for the cache,
which backbones have their weights on this machine, and what does not work.
Nothing is downloaded or left behind. The output has neither your name nor your
home directory in it and can be pasted into an issue.

The exit code is 0 if tlcli can train, and 1 if it cannot."""


def parser() -> Parser:
    """Return the parser of the command."""
    made = Parser("doctor", SUMMARY, ["tlcli doctor", "tlcli doctor --format json > doctor.json"])
    made.add_format()
    return made


def run(argv: list[str]) -> int:
    """Examine this machine; return 0, or 1 if tlcli cannot train on it."""
    arguments = parser().parse_args(argv)
    from rich.console import Console
    from rich.text import Text

    from tlcli.cli import fast_imports
    from tlcli.cli.conf_files import ConfFiles, conf_dir
    from tlcli.cli.table import TableColumn, make_table

    options = ConfFiles([conf_dir()]).groups["backbone"]
    with fast_imports():
        findings = examine(Path("outputs"), {name: option.kind or "" for name, option in options.items()})
    facts = [finding for finding in findings if isinstance(finding, Fact)]
    problems = [finding for finding in findings if isinstance(finding, Problem)]
    can_train = not any(problem.fails for problem in problems)
    if arguments.format == "json":
        values: dict[str, Any] = {}
        for fact in facts:
            values.setdefault(fact.topic, {})[fact.name] = fact.value
        wrong = [{"text": problem.text, "fails": problem.fails} for problem in problems]
        print(json.dumps({**values, "problems": wrong, "can_train": can_train}, indent=2))
        return 0 if can_train else 1
    width = terminal_columns() or UNLIMITED_WIDTH
    columns = [TableColumn("topic", left=True), TableColumn("name", left=True), TableColumn("found here", left=True)]
    console = Console(width=width, highlight=False)
    console.print(make_table(columns, [(fact.topic, fact.name, fact.text) for fact in facts], width))
    console.print()
    for problem in problems:
        console.print(Text(("cannot train: " if problem.fails else "warning: ") + problem.text))
    if can_train:
        console.print("tlcli can train here" if problems else "no problems found")
    return 0 if can_train else 1
