"""Check every image of a dataset. The command finds files that do not decode, exact
and near duplicates within and across splits, labels that are likely wrong by a
probe on the backbone's features, and small or empty classes. Keys and defaults are
those of `tlcli train`. The data is not changed. Tables and a contact sheet are
written to a new folder, outputs/data-check/DATE/TIME.

examples:
  tlcli data check dataset=imagefolder dataset.root=photos
  tlcli data check dataset=manifest dataset.file=labels.csv --quick --output found
"""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tlcli.cli.parser import Parser
from tlcli.cli.table import table_lines, terminal_columns
from tlcli.errors import UsageError
from tlcli.files import expand_user
from tlcli.interrupts import handle_signals
from tlcli.text import duration_text, labelled, shown_path, strip_control_chars

MAX_TABLE_CLASSES = 12


PARSER = Parser("data", __doc__)
add = PARSER.add_argument
add("action", choices=("check",))
add("words", nargs="*", metavar="KEY=VALUE", help="keys of `tlcli train`")
add("--quick", action="store_true", help="run no network: no near duplicates, no check of labels")
add("--output", type=Path, metavar="FOLDER", help="a folder that is new or empty")
PARSER.add_config_dir()
PARSER.add_format()


@handle_signals()
def run(argv: list[str]) -> int:
    """Run `tlcli data check`; return the exit code."""
    arguments = PARSER.parse_intermixed_args(argv or ["--help"])
    if (wrong := next((w for w in arguments.words if "=" not in w and w[:1] != "~"), None)) is not None:
        raise UsageError(f"cannot read {wrong!r}: write KEY=VALUE, as in dataset=imagefolder dataset.root={wrong}")
    from tlcli.cli import fast_imports
    from tlcli.cli.compose import compose_spec
    from tlcli.cli.job import check_weights
    from tlcli.cli.train import discard_folders, make_folder
    from tlcli.cli.view import TerminalReporter
    from tlcli.reporter import Reporter

    spec = compose_spec([*arguments.config_dir, *arguments.words])
    spec.dataset.without_bad_classes()[0].check()
    if not arguments.quick:
        check_weights(spec.backbone.weights)
    output: Path | None = arguments.output
    folder = output or Path(spec.out) / "data-check" / f"{datetime.now():%Y-%m-%d/%H-%M-%S}"
    folder = expand_user(str(folder)).absolute()
    if spec.dataset.root and folder.resolve().is_relative_to(expand_user(spec.dataset.root).resolve()):
        raise UsageError(f"{folder}: is inside the dataset, which is not changed; give another --output FOLDER")
    if output and folder.is_dir() and any(folder.iterdir()):
        raise UsageError(f"--output={output}: already exists and is not empty; name a new folder")
    folder, made = make_folder(folder, "--output" if output else None)
    try:
        with fast_imports():
            from tlcli.check import check_data
            from tlcli.engine.session import session_for

        reporter = TerminalReporter() if arguments.format == "table" else Reporter()
        summary = check_data(spec, reporter, session_for(spec.cache), folder, quick=arguments.quick)
    except BaseException:
        discard_folders(folder, made)
        raise
    is_json = arguments.format == "json"
    print(json.dumps(summary, indent=2) if is_json else "\n".join(_lines(summary, terminal_columns())))
    return 0


def _lines(summary: Mapping[str, Any], width: int | None) -> Iterator[str]:
    labels, classes = summary["labels"], summary["classes"]
    counts = {split: by_class for split, by_class in summary["counts"].items() if any(by_class.values())}
    splits = ", ".join(f"{split} {sum(by_class.values()):,}" for split, by_class in counts.items())
    lines = [("checked", f"{summary['dataset']}: {summary['n_images']:,} images ({splits}), {len(classes):,} classes")]
    if not any(kind in ("fix", "look") for kind, _ in summary["verdicts"]):
        lines.append(("good", "nothing was found that has to be changed"))
    lines += summary["verdicts"]
    for kind in ("exact", "near"):
        text = "{images:,} images in {groups:,} groups of duplicates".format(**summary[kind])
        lines.append((kind, f"not checked: {summary[kind]['why']}" if "why" in summary[kind] else text))
    text = f"a probe on {summary['backbone']} agrees with {labels.get('agreement', 0):.1%} of the labels"
    lines.append(("labels", f"not checked: {labels['why']}" if "why" in labels else text))
    lines += [("note", note) for note in summary["notes"]]
    lines.append(("took", ", ".join(f"{part} {duration_text(s)}" for part, s in summary["seconds"].items())))
    lines.append(("files in", shown_path(Path(summary["output"]))))
    for label, text in lines:
        yield from map(strip_control_chars, labelled(label, text, width))
    yield ""
    smallest = sorted(classes, key=counts["train"].__getitem__)[:MAX_TABLE_CLASSES]
    rows = [(name, *(f"{n[name]:,}" for n in counts.values())) for name in smallest]
    yield from table_lines(("<class, smallest first", *counts), rows, width)
