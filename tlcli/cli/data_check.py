"""`tlcli data check`: what is wrong with a dataset, before anything is trained on it."""

import json
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcli.cli.parser import Parser
from tlcli.cli.table import UNLIMITED_WIDTH, TableColumn, make_table
from tlcli.errors import TlcliError, UsageError
from tlcli.text import csv_line, did_you_mean, duration_text, shown_path, strip_control_chars

if TYPE_CHECKING:
    from PIL import Image

    from tlcli.check import Findings
    from tlcli.data.images import ConcatSplits
    from tlcli.specs import TrainSpec

FLAGS = ("--quick", "--output", "--format", "--help")
MAX_TABLE_CLASSES = 12
MAX_GROUPS, MAX_SUSPECTS = 12, 30
CELLS_PER_ROW, CELL_SIDE, GAP, LINE_HEIGHT = 5, 190, 10, 17  # the sides in pixels
BLACK, RED, GRAY = "#111111", "#b3261e", "#666666"
DUPLICATES_HEADER = ("group", "kind", "similarity", "splits", "labels", "file", "split", "label")
LABELS_HEADER = ("rank", "file", "split", "label", "suggested", "p_label", "p_suggested", "likely")

Cell = tuple[int, list[tuple[str, str]]]  # the position of an image, and lines below it with their colors


def parser() -> Parser:
    """Return the parser of `tlcli data check`."""
    check_parser = Parser(
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
    check_parser.add_argument("action", choices=("check",))
    check_parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="keys of `tlcli train`")
    check_parser.add_argument(
        "--quick", action="store_true", help="run no network: no near duplicates, no check of labels"
    )
    check_parser.add_argument("--output", type=Path, metavar="FOLDER", help="a folder that is new or empty")
    check_parser.add_format()
    return check_parser


def run(argv: list[str]) -> int:
    """Run `tlcli data`; return the exit code."""
    arguments = parse_arguments(argv or ["--help"])
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
            if rows := _sheet_rows(findings):
                draw_sheet(rows, findings.images).save(folder / "contact_sheet.png")
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


def write_table(file: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV file, UTF-8; names that are not UTF-8 keep their bytes."""
    with file.open("w", newline="", encoding="utf-8", errors="surrogateescape") as stream:
        stream.writelines(csv_line(row) for row in (header, *rows))


def _duplicate_rows(findings: "Findings") -> Iterator[Sequence[object]]:
    images, classes = findings.images, findings.data.classes
    for number, (kind, similarity, group) in enumerate(findings.duplicates, start=1):
        places = [(images.name(i), images.split_names[i], classes[images.labels[i]]) for i in group]
        n_splits, n_labels = (len(set(values)) for values in list(zip(*places, strict=True))[1:])
        yield from ((number, kind, f"{similarity:.3f}", n_splits, n_labels, *place) for place in places)


def _label_rows(findings: "Findings") -> Iterator[tuple[int, str, str, str, str, str, str, str]]:
    check, images, classes = findings.labels, findings.images, findings.data.classes
    for rank, i in enumerate(check.suspects.tolist() if check else (), start=1):
        assert check is not None
        given, suggested = int(images.labels[i]), int(check.suggested[i])
        p_given, p_suggested = (f"{check.probabilities[i, label]:.4f}" for label in (given, suggested))
        names = images.name(i), images.split_names[i], classes[given], classes[suggested]
        yield rank, *names, p_given, p_suggested, "yes" if check.likely[i] else "no"


def _sheet_rows(findings: "Findings") -> list[str | list[Cell]]:
    """Return titles and rows of images: duplicates, those across splits or with several labels first, then labels."""
    images, classes, check = findings.images, findings.data.classes, findings.labels
    rows: list[str | list[Cell]] = []
    groups = []
    for kind, similarity, group in findings.duplicates:
        kinds = {(images.split_names[i], int(images.labels[i])): i for i in reversed(group)}
        one_split, one_label = (len(set(values)) == 1 for values in zip(*kinds, strict=True))
        shown = [*kinds.values(), *(i for i in group if i not in kinds.values())][:CELLS_PER_ROW]  # one of each first
        text = "exact copies" if kind == "exact" else f"alike {similarity:.3f}"
        text += f", {len(group) - len(shown)} more" if len(group) > len(shown) else ""
        color = BLACK if one_split and one_label else RED
        names = [f"{images.split_names[i]}: {classes[images.labels[i]]}" for i in shown]
        cells: list[Cell] = [(i, [(name, color), (text, GRAY)]) for i, name in zip(shown, names, strict=True)]
        groups.append(((one_split, one_label, kind == "exact"), cells))
    groups.sort(key=lambda group: group[0])
    if groups:
        rows.append(f"{findings.name}: duplicates, {min(MAX_GROUPS, len(groups))} of {len(groups):,} groups")
        rows += [cells for _, cells in groups[:MAX_GROUPS]]
    suspects: list[Cell] = []
    for i, (rank, _, _, given, suggested, p_given, p_suggested, _) in zip(
        check.suspects[:MAX_SUSPECTS].tolist() if check else (), _label_rows(findings), strict=False
    ):
        about_label = (f"{rank}. given: {given} {float(p_given):.0%}", BLACK)
        suspects.append((i, [about_label, (f"looks like {suggested} {float(p_suggested):.0%}", RED)]))
    if check is not None and suspects:
        rows.append(f"{findings.name}: labels that may be wrong, {len(suspects)} of {len(check.suspects):,}")
        rows += [suspects[n : n + CELLS_PER_ROW] for n in range(0, len(suspects), CELLS_PER_ROW)]
    return rows


def draw_sheet(rows: Sequence[str | list[Cell]], images: "ConcatSplits") -> "Image.Image":
    """Return a page of titles and of rows of images with lines below."""
    import matplotlib
    from PIL import Image, ImageDraw, ImageFont, ImageOps

    fonts = Path(matplotlib.get_data_path()) / "fonts" / "ttf"  # with more alphabets than Pillow's own
    font, bold = (ImageFont.truetype(fonts / name, 12) for name in ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf"))
    heights = [2 * LINE_HEIGHT if isinstance(row, str) else CELL_SIDE + 3 * LINE_HEIGHT + 2 * GAP for row in rows]
    sheet = Image.new("RGB", (CELLS_PER_ROW * (CELL_SIDE + GAP) + GAP, GAP + sum(heights)), "white")
    draw = ImageDraw.Draw(sheet)
    for row, y in zip(rows, (GAP + sum(heights[:n]) for n in range(len(rows))), strict=True):
        if isinstance(row, str):
            draw.text((GAP, y), strip_control_chars(row), fill=BLACK, font=bold)
            continue
        for column, (i, lines) in enumerate(row):
            x = GAP + column * (CELL_SIDE + GAP)
            image = Image.fromarray(images.read(i))
            is_small = max(image.size) < CELL_SIDE  # then it is shown pixel by pixel
            kernel = Image.Resampling.NEAREST if is_small else Image.Resampling.BILINEAR
            image = ImageOps.pad(image, (CELL_SIDE, CELL_SIDE), kernel, color="white")
            sheet.paste(image, (x, y))
            for n, (text, color) in enumerate([*lines, (images.key(i).rpartition("/")[2], GRAY)]):
                text = strip_control_chars(text)
                while text and draw.textlength(text, font=font) > CELL_SIDE:
                    text = text[:-2] + "…"
                draw.text((x, y + CELL_SIDE + 3 + n * LINE_HEIGHT), text, fill=color, font=font)
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
    counts, labels, classes = summary["counts"], summary["labels"], summary["classes"]
    splits = ", ".join(f"{split} {sum(by_class.values()):,}" for split, by_class in counts.items())
    text = f"{summary['dataset']}: {summary['n_images']:,} images ({splits}), {len(classes):,} classes"
    rows = [("checked", text)]
    if not any(kind in ("fix", "look") for kind, _ in summary["verdicts"]):
        rows.append(("good", "nothing was found that has to be changed"))
    rows += summary["verdicts"]
    if len(classes) > MAX_TABLE_CLASSES:
        rows += [(s, f"{min(own.values()):,} to {max(own.values()):,} images per class") for s, own in counts.items()]
    for kind in ("exact", "near"):
        metrics = summary[kind]
        text = f"{metrics['images']:,} images in {metrics['groups']:,} groups" if metrics["groups"] else "no duplicates"
        rows.append((kind, f"not checked: {metrics['why']}" if "why" in metrics else text))
    if labels["checked"]:
        text = f"a probe on {summary['backbone']} agrees with {labels['agreement']:.1%} of the labels"
        rows.append(("labels", text))
    else:
        rows.append(("labels", f"not checked: {labels['why']}"))
    rows += [("note", note) for note in summary["notes"]]
    rows.append(("took", ", ".join(f"{part} {duration_text(s)}" for part, s in summary["seconds"].items())))
    rows.append(("files in", shown_path(folder)))
    for label, text in rows:
        for line in labelled(label, text, width):
            screen.print(line, soft_wrap=True)
    if len(classes) <= MAX_TABLE_CLASSES:
        columns = [TableColumn("class", left=True), *(TableColumn(split) for split in counts)]
        cells = [[name, *(f"{own[name]:,}" for own in counts.values())] for name in classes]
        screen.print()
        screen.print(make_table(columns, cells, width))
