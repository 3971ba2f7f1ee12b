"""`tlcli data check`: what is wrong with a dataset, before anything is trained on it."""

import json
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

from tlcli.cli.parser import Parser
from tlcli.cli.table import TableColumn, table_lines, terminal_columns
from tlcli.errors import UsageError
from tlcli.text import duration_text, labelled, shown_path, strip_control_chars

MAX_TABLE_CLASSES = 12


def parser() -> Parser:
    """Return the parser of `tlcli data`."""
    data_parser = Parser(
        "data",
        "Check every image of a dataset, with the keys and defaults of `tlcli train`,\n"
        "and print what to do: files that do not decode, exact and near duplicates within\n"
        "and across splits, labels that a probe on the backbone's features finds likely\n"
        "wrong, and class balance. The data is not changed. A new folder,\n"
        "outputs/data-check/DATE/TIME, has summary.json, duplicates.csv, labels.csv,\n"
        "bad_files.csv and contact_sheet.png.",
        [
            "tlcli data check dataset=imagefolder dataset.root=photos",
            "tlcli data check dataset=manifest dataset.file=labels.csv --quick --output found",
        ],
    )
    add = data_parser.add_argument
    add("action", choices=("check",))
    add("words", nargs="*", metavar="KEY=VALUE", help="keys of `tlcli train`")
    add("--quick", action="store_true", help="run no network: no near duplicates, no check of labels")
    add("--output", type=Path, metavar="FOLDER", help="a folder that is new or empty")
    data_parser.add_config_dir()
    data_parser.add_format()
    return data_parser


def run(argv: list[str]) -> int:
    """Run `tlcli data check`; return the exit code."""
    arguments = parser().parse_intermixed_args(argv or ["--help"])
    if wrong := next((word for word in arguments.words if "=" not in word and word[0] != "~"), None):
        raise UsageError(f"cannot read {wrong!r}: write KEY=VALUE, as in dataset=imagefolder dataset.root={wrong}")
    from tlcli.cli import fast_imports
    from tlcli.cli.compose import compose_spec
    from tlcli.cli.job import check_weights
    from tlcli.cli.train import discard_folders, make_folder
    from tlcli.cli.view import TerminalReporter
    from tlcli.reporter import Reporter

    config_dir = [f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []
    spec = compose_spec([*config_dir, *arguments.words])
    spec.dataset.without_bad_classes()[0].check()
    if not arguments.quick:
        check_weights(spec.backbone.weights)
    output: Path | None = arguments.output
    folder = output or Path(spec.out) / "data-check" / f"{datetime.now():%Y-%m-%d/%H-%M-%S}"
    folder = folder.expanduser().absolute()
    if spec.dataset.root and folder.resolve().is_relative_to(Path(spec.dataset.root).expanduser().resolve()):
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
    rows = [("checked", f"{summary['dataset']}: {summary['n_images']:,} images ({splits}), {len(classes):,} classes")]
    if not any(kind in ("fix", "look") for kind, _ in summary["verdicts"]):
        rows.append(("good", "nothing was found that has to be changed"))
    rows += summary["verdicts"]
    for kind in ("exact", "near"):
        text = "{images:,} images in {groups:,} groups of duplicates".format(**summary[kind])
        rows.append((kind, f"not checked: {summary[kind]['why']}" if "why" in summary[kind] else text))
    text = f"a probe on {summary['backbone']} agrees with {labels.get('agreement', 0):.1%} of the labels"
    rows.append(("labels", f"not checked: {labels['why']}" if "why" in labels else text))
    rows += [("note", note) for note in summary["notes"]]
    rows.append(("took", ", ".join(f"{part} {duration_text(s)}" for part, s in summary["seconds"].items())))
    rows.append(("files in", shown_path(Path(summary["output"]))))
    for label, text in rows:
        yield from map(strip_control_chars, labelled(label, text, width))
    yield ""
    columns = [TableColumn("class, smallest first", left=True), *map(TableColumn, counts)]
    smallest = sorted(classes, key=counts["train"].__getitem__)[:MAX_TABLE_CLASSES]
    yield from table_lines(columns, [[name, *(f"{n[name]:,}" for n in counts.values())] for name in smallest], width)
