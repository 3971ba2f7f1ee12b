"""`tlcli data check`: what is wrong with a dataset, before anything is trained on it."""

import json
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcli.cli.conf_files import ConfFiles, conf_dir, extra_folders
from tlcli.cli.parser import FORMATS, Parser
from tlcli.cli.table import UNLIMITED_WIDTH, TableColumn, make_table
from tlcli.errors import TlcliError, UsageError
from tlcli.text import csv_line, did_you_mean, duration_text, shown_path, strip_control_chars

if TYPE_CHECKING:
    from PIL import Image

    from tlcli.check import Findings
    from tlcli.specs import TrainSpec

FLAGS = ("--quick", "--output", "--format", "--help")
MAX_TABLE_CLASSES = 12
MAX_GROUPS, MAX_SUSPECTS = 12, 30
CELLS_PER_ROW, CELL_SIDE, GAP, LINE_HEIGHT = 5, 190, 10, 17  # the sides in pixels
BLACK, RED, GRAY = "#111111", "#b3261e", "#666666"

Cell = tuple[int, Sequence[tuple[str, str]]]
"""The position of an image, and lines below it with their colors."""


def parser() -> Parser:
    """Return the parser of `tlcli data check`."""
    check_parser = Parser(
        "data check",
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
    check_parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="keys of `tlcli train`")
    check_parser.add_argument(
        "--quick", action="store_true", help="run no network: no near duplicates, no check of labels"
    )
    check_parser.add_argument("--output", type=Path, metavar="FOLDER", help="a folder that is new or empty")
    check_parser.add_format()
    return check_parser


def run(argv: list[str]) -> int:
    """Run `tlcli data`; return the exit code."""
    if argv[:1] in ([], ["-h"], ["--help"]):
        argv = ["check", "--help"]
    if argv[0] != "check":
        hint = did_you_mean(argv[0], ["check", "--help"]) or " `tlcli data --help` lists its commands."
        raise UsageError(f"tlcli data has no command {argv[0]!r}.{hint}")
    arguments = parse_arguments(argv[1:])
    spec = _compose(arguments)
    folder, made = _make_folder(spec, arguments.output)
    try:
        summary = _check(spec, arguments, folder)
    except BaseException:
        from tlcli.cli.train import discard_folders

        discard_folders(folder, made)
        raise
    if arguments.format == "json":
        print(json.dumps(summary, indent=2))
    else:
        _show(summary, folder)
    return 0


def candidates(before: Sequence[str]) -> Iterator[str]:
    """Yield the words that may follow these on a command line, for completion."""
    match before:
        case []:
            yield from ("check", "--help")
        case ["check", *_, "--format"]:
            yield from FORMATS
        case ["check", *_, "--output"]:
            return
        case ["check", *words]:
            yield from FLAGS
            groups = ConfFiles([conf_dir(), *extra_folders(words)]).groups
            for group in ("dataset", "backbone"):
                yield from (f"{group}={option}" for option in groups[group])
            yield from ("dataset.root=", "dataset.file=")
            yield from (f"{group}=" for group in groups)


def parse_arguments(argv: Sequence[str]) -> Namespace:
    """Return the parsed arguments; `words` has what belongs to `tlcli train`. Raise UsageError."""
    arguments, others = parser().parse_known_intermixed_args(list(argv))
    for word in others:
        if hint := did_you_mean(word.partition("=")[0], FLAGS):
            raise UsageError(f"unknown flag {word!r}.{hint}")
    for word in arguments.words:
        if "=" not in word and not word.startswith("~"):
            is_folder = Path(word).expanduser().is_dir()
            hint = did_you_mean(word, [*FLAGS, "dataset="])
            hint = f" Did you mean 'dataset=imagefolder dataset.root={word}'?" if is_folder else hint
            raise UsageError(f"data check takes KEY=VALUE words, not {word!r}.{hint}")
    arguments.words += others
    return arguments


def _compose(arguments: Namespace) -> "TrainSpec":
    """Return the spec that the words compose, whose dataset and weights exist. Raise UsageError."""
    from tlcli.cli.compose import compose_spec, parse_flags
    from tlcli.cli.job import check_weights

    flags = parse_flags(list(arguments.words))
    if flags.multirun or not flags.runs:
        raise UsageError("data check reads one dataset: give KEY=VALUE and GROUP=OPTION words only")
    _, spec = compose_spec(flags)
    spec.dataset.without_bad_classes()[0].check()
    if not arguments.quick:
        check_weights(spec.backbone.weights)
    return spec


def _make_folder(spec: "TrainSpec", output: Path | None) -> tuple[Path, list[Path]]:
    """Make the folder of the results. Raise UsageError."""
    from tlcli.cli.train import make_folder

    now = datetime.now()
    path = output.expanduser() if output else Path(spec.out) / "data-check" / f"{now:%Y-%m-%d}" / f"{now:%H-%M-%S}"
    path = path.absolute()
    root = Path(spec.dataset.root).expanduser().resolve() if spec.dataset.root else None
    if root is not None and path.resolve().is_relative_to(root):
        raise UsageError(f"{path}: is inside the dataset, which is not changed; give another --output FOLDER")
    if output is not None and path.exists():
        if not path.is_dir() or any(path.iterdir()):
            raise UsageError(f"--output={output}: already exists and is not empty; name a new folder")
        return path, []
    return make_folder(path)


def _check(spec: "TrainSpec", arguments: Namespace, folder: Path) -> dict[str, Any]:
    """Check the dataset and write all files; return the summary."""
    from tlcli.cli import fast_imports
    from tlcli.cli.view import TerminalReporter
    from tlcli.reporter import Reporter

    with fast_imports():
        from tlcli.check import check_data, summarize
        from tlcli.engine.session import session_for

    reporter = TerminalReporter() if arguments.format == "table" else Reporter()
    findings = check_data(spec, reporter, session_for(spec.cache), quick=arguments.quick)
    try:
        with findings.timed("contact sheet"):
            if (sheet := draw_contact_sheet(findings)) is not None:
                sheet.save(folder / "contact_sheet.png")
        summary = {**summarize(findings), "output": str(folder)}
        write_table(folder / "duplicates.csv", DUPLICATES_HEADER, _duplicate_rows(findings))
        write_table(folder / "labels.csv", LABELS_HEADER, _label_rows(findings))
        write_table(folder / "bad_files.csv", ("file", "reason"), findings.data.bad_files)
        text = json.dumps(summary, indent=2, allow_nan=False) + "\n"
        (folder / "summary.json").write_text(text, encoding="utf-8")
    except OSError as exc:
        raise TlcliError(f"{exc.filename or folder}: {exc.strerror or exc}") from exc
    return summary


# -- files ------------------------------------------------------------------------------------------------------------

DUPLICATES_HEADER = ("group", "kind", "similarity", "splits", "labels", "file", "split", "label")
LABELS_HEADER = ("rank", "file", "split", "label", "suggested", "p_label", "p_suggested", "likely")


def write_table(file: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file, UTF-8; names that are not UTF-8 keep their bytes."""
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        stream.writelines(csv_line(row) for row in (header, *rows))


def _groups(findings: "Findings") -> list[tuple[str, float, tuple[int, ...], int, int]]:
    """Return kind, similarity, members, number of splits and number of labels of each group of duplicates."""
    images = findings.images
    groups = [("exact", 1.0, tuple(group)) for group in findings.exact]
    groups += [("near", group.similarity, group.members) for group in findings.near]
    return [
        (*group, len({images.split_names[i] for i in group[2]}), len({int(images.labels[i]) for i in group[2]}))
        for group in groups
    ]


def _duplicate_rows(findings: "Findings") -> Iterator[Sequence[object]]:
    images, classes = findings.images, findings.data.classes
    for number, (kind, similarity, members, splits, labels) in enumerate(_groups(findings), start=1):
        for i in members:
            place = images.name(i), images.split_names[i], classes[images.labels[i]]
            yield (number, kind, f"{similarity:.3f}", splits, labels, *place)


def _label_rows(findings: "Findings") -> Iterator[Sequence[object]]:
    check, images, classes = findings.labels, findings.images, findings.data.classes
    for rank, i in enumerate(check.suspects.tolist() if check else (), start=1):
        assert check is not None
        given, suggested = int(images.labels[i]), int(check.suggested[i])
        names = images.name(i), images.split_names[i], classes[given], classes[suggested]
        p_given, p_suggested = check.probabilities[i, given], check.probabilities[i, suggested]
        yield rank, *names, f"{p_given:.4f}", f"{p_suggested:.4f}", "yes" if check.likely[i] else "no"


def draw_contact_sheet(findings: "Findings") -> "Image.Image | None":
    """Return a page of duplicates, those across splits or with several labels first, then of labels that may be wrong.

    Return None if there are neither.
    """
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont

    images, classes, check = findings.images, findings.data.classes, findings.labels
    rows: list[str | Sequence[Cell]] = []
    groups = sorted(_groups(findings), key=lambda group: (group[3] == 1, group[4] == 1, group[0] == "exact"))
    if groups:
        rows.append(f"{findings.name}: duplicates, {min(MAX_GROUPS, len(groups))} of {len(groups):,} groups")
    for kind, similarity, members, splits, labels in groups[:MAX_GROUPS]:
        kinds = {(images.split_names[i], int(images.labels[i])): i for i in reversed(members)}  # one of each first
        shown = [*kinds.values(), *(i for i in members if i not in kinds.values())][:CELLS_PER_ROW]
        color = RED if splits > 1 or labels > 1 else BLACK
        kind_text = "exact copies" if kind == "exact" else f"alike {similarity:.3f}"
        kind_text += f", {len(members) - len(shown)} more" if len(members) > len(shown) else ""
        rows.append(
            [(i, [(f"{images.split_names[i]}: {classes[images.labels[i]]}", color), (kind_text, GRAY)]) for i in shown]
        )
    suspects: list[Cell] = []
    for rank, i in enumerate(check.suspects[:MAX_SUSPECTS].tolist() if check else (), start=1):
        assert check is not None
        given, suggested = int(images.labels[i]), int(check.suggested[i])
        about_label = [(f"{rank}. given: {classes[given]} {check.probabilities[i, given]:.0%}", BLACK)]
        about_label += [(f"looks like {classes[suggested]} {check.probabilities[i, suggested]:.0%}", RED)]
        suspects.append((i, about_label))
    if check is not None and suspects:
        rows.append(f"{findings.name}: labels that may be wrong, {len(suspects)} of {len(check.suspects):,}")
        rows += [suspects[n : n + CELLS_PER_ROW] for n in range(0, len(suspects), CELLS_PER_ROW)]
    if not rows:
        return None
    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # with more alphabets than Pillow's own
    font, bold = (ImageFont.truetype(fonts / name, 12) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"))
    heights = [2 * LINE_HEIGHT if isinstance(row, str) else CELL_SIDE + 3 * LINE_HEIGHT + 2 * GAP for row in rows]
    sheet = Image.new("RGB", (CELLS_PER_ROW * (CELL_SIDE + GAP) + GAP, GAP + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)

    def write(x: int, y: int, text: str, color: str, *, width: int, bold_text: bool = False) -> None:
        chosen, text = bold if bold_text else font, strip_control_chars(text)
        while text and draw.textlength(text, font=chosen) > width:
            text = text[:-2] + "…"
        draw.text((x, y), text, fill=color, font=chosen)

    for row, y in zip(rows, (GAP + sum(heights[:n]) for n in range(len(rows))), strict=True):
        if isinstance(row, str):
            write(GAP, y, row, BLACK, width=sheet.width - 2 * GAP, bold_text=True)
            continue
        for column, (i, lines) in enumerate(row):
            x = GAP + column * (CELL_SIDE + GAP)
            image = Image.fromarray(images.read(i))
            scale = CELL_SIDE / max(image.size)
            kernel = Image.Resampling.BILINEAR if scale < 1 else Image.Resampling.NEAREST  # small ones pixel by pixel
            small = image.resize([max(1, round(side * scale)) for side in image.size], kernel, reducing_gap=3)
            sheet.paste(small, (x + (CELL_SIDE - small.width) // 2, y + (CELL_SIDE - small.height) // 2))
            name = (images.key(i).rpartition("/")[2], GRAY)
            for n, (text, color) in enumerate([*lines, name]):
                write(x, y + CELL_SIDE + 3 + n * LINE_HEIGHT, text, color, width=CELL_SIDE)
    return sheet


# -- output -----------------------------------------------------------------------------------------------------------


def _show(summary: Mapping[str, Any], folder: Path) -> None:
    """Print what to do, the images per class, and the metrics."""
    from tlcli.cli.view import Screen
    from tlcli.text import labelled

    screen = Screen()
    if not screen.is_terminal and screen.width >= 80:
        screen = Screen(UNLIMITED_WIDTH)
    width = screen.width if screen.width < UNLIMITED_WIDTH else None
    counts, labels = summary["counts"], summary["labels"]
    splits = ", ".join(f"{split} {sum(by_class.values()):,}" for split, by_class in counts.items())
    rows = [("checked", f"{summary['dataset']}: {summary['n_images']:,} images ({splits}), "
             f"{len(summary['classes']):,} classes")]  # fmt: skip
    if not any(kind in ("fix", "look") for kind, _ in summary["verdicts"]):
        rows.append(("good", "nothing was found that has to be changed"))
    rows += [(kind, text) for kind, text in summary["verdicts"]]
    if len(summary["classes"]) > MAX_TABLE_CLASSES:
        rows += [(s, f"{min(own.values()):,} to {max(own.values()):,} images per class") for s, own in counts.items()]
    for kind in ("exact", "near"):
        found = summary[kind]
        text = (
            f"{found['images']:,} images in {found['groups']:,} groups; of test in train or val "
            f"{found['test_in_train_or_val']:,}, of val in train {found['val_in_train']:,}; with several labels "
            f"{found['several_labels']:,}"
        )
        rows.append(
            (kind, f"not checked: {found['why']}" if "why" in found else text if found["groups"] else "no duplicates")
        )
    if labels["checked"]:
        text = f"{labels['suspects']:,} that differ, {labels['likely_wrong']:,} of them clearly; "
        rows.append(("labels", f"{text}a probe on {summary['backbone']} agrees with {labels['agreement']:.1%}"))
    else:
        rows.append(("labels", f"not checked: {labels['why']}"))
    rows += [("note", note) for note in summary["notes"]]
    rows.append(("took", ", ".join(f"{part} {duration_text(s)}" for part, s in summary["seconds"].items())))
    rows.append(("files in", shown_path(folder)))
    for label, text in rows:
        for line in labelled(label, text, width):
            screen.print(line, soft_wrap=True)
    if len(summary["classes"]) <= MAX_TABLE_CLASSES:
        columns = [TableColumn("class", left=True), *(TableColumn(split) for split in counts)]
        cells = [[name, *(f"{own[name]:,}" for own in counts.values())] for name in summary["classes"]]
        screen.print()
        screen.print(make_table(columns, cells, width))
