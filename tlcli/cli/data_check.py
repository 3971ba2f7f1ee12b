"""`tlcli data check`: what is wrong with a data set, before anything is trained on it."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcli.cli.arguments import FORMATS
from tlcli.cli.conf_files import ConfFiles, conf_dir, extra_folders
from tlcli.cli.table import UNLIMITED_WIDTH
from tlcli.errors import TlcliError, UsageError
from tlcli.text import did_you_mean

if TYPE_CHECKING:
    from tlcli.cli.folders import Folder
    from tlcli.specs import TrainSpec

HELP = """\
usage: tlcli data check [KEY=VALUE ...] [--quick] [--output FOLDER]
                        [--format table|json]

Looks at every image of a data set, with the keys and defaults of `tlcli train`,
and says what to do. Nothing of the data is changed.

  files       what does not decode, sizes, formats, colours
  classes     images by class and split, balance, empty folders
  duplicates  exact ones, and near ones (another size, format or brightness),
              within splits and across them, where they make a test worthless
  labels      those that a probe on the backbone's features, fitted to other
              images, finds likely wrong

A new folder, outputs/data-check/DATE/TIME, has summary.json, duplicates.csv,
labels.csv, bad_files.csv, contact_sheet.png and duplicates.png.

  --quick   without the labels: no network runs
  --output  another folder, which must not exist or be empty
  --format  json: print summary.json

examples:
  tlcli data check dataset=imagefolder dataset.root=photos
  tlcli data check dataset=manifest dataset.file=labels.csv --quick --output found
"""

FLAGS = ("--quick", "--output", "--format", "--help")
MANY_CLASSES = 12


@dataclass(frozen=True)
class Asked:
    """What the arguments ask for; `words` are those of `tlcli train`."""

    words: tuple[str, ...]
    quick: bool
    output: Path | None
    form: str


def run(argv: list[str]) -> int:
    """Do one action of `tlcli data`; the exit code."""
    if not argv or "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    if argv[0] != "check":
        hint = did_you_mean(argv[0], ["check", "--help"]) or " `tlcli data --help` says what there is."
        raise UsageError(f"there is no 'tlcli data {argv[0]}'.{hint}")
    asked = parse(argv[1:])
    spec = _spec(asked.words, asked.quick)
    folder = _folder(spec, asked.output)
    try:
        summary = _check(spec, asked, folder.path)
    except BaseException:
        folder.discard()
        raise
    if asked.form == "json":
        print(json.dumps(summary, indent=2))
    else:
        show(summary, folder.path)
    return 0


def candidates(before: Sequence[str]) -> Iterator[str]:
    """What may follow these words on a command line, for completion."""
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


def parse(words: Sequence[str]) -> Asked:
    """Sort out our own flags; what is left belongs to `tlcli train`. Raises UsageError."""
    left, rest, own = [], list(words), {"--quick": "", "--output": "", "--format": FORMATS[0]}
    while rest:
        word = rest.pop(0)
        flag, equals, value = word.partition("=")
        if flag == "--quick" and not equals:
            own[flag] = "yes"
        elif flag in ("--output", "--format"):
            if not equals and not rest:
                raise UsageError(
                    f"{flag} needs a value: {flag} {'FOLDER' if flag == '--output' else '|'.join(FORMATS)}"
                )
            own[flag] = value if equals else rest.pop(0)
        elif word.startswith("--") and did_you_mean(flag, FLAGS):
            raise UsageError(f"unknown flag {word!r}.{did_you_mean(flag, FLAGS)}")
        elif "=" not in word and not word.startswith(("-", "~")):
            raise UsageError(f"data check takes KEY=VALUE words: what is {word!r}?{_near_words(word)}")
        else:
            left.append(word)
    if own["--format"] not in FORMATS:
        raise UsageError(f"--format takes one of {', '.join(FORMATS)}.{did_you_mean(own['--format'], FORMATS)}")
    output = Path(own["--output"]).expanduser() if own["--output"] else None
    return Asked(tuple(left), bool(own["--quick"]), output, own["--format"])


def _near_words(word: str) -> str:
    """What may have been meant by a word without an equals sign."""
    if Path(word).expanduser().is_dir():
        return f" Did you mean 'dataset=imagefolder dataset.root={word}'?"
    return did_you_mean(word, [*FLAGS, "dataset="])


def _spec(words: Sequence[str], quick: bool) -> "TrainSpec":
    """The spec that the words compose, whose data set and weights are there. Raises UsageError."""
    from tlcli.cli.compose import build_spec, compose_config, composing, parse_flags
    from tlcli.cli.job import check_weights
    from tlcli.data.layout import survey, usable
    from tlcli.data.listing import check_dataset
    from tlcli.specs import ImageFolderSpec

    flags = parse_flags(list(words))
    if flags.multirun or not flags.runs:
        raise UsageError("data check looks at one data set: give KEY=VALUE and GROUP=OPTION words alone")
    with composing(flags.files):
        spec = build_spec(compose_config(flags), flags.files)
    dataset = spec.dataset
    check_dataset(usable(dataset, survey(dataset)) if isinstance(dataset, ImageFolderSpec) else dataset)
    if not quick:
        check_weights(spec.backbone.weights)
    return spec


def _folder(spec: "TrainSpec", output: Path | None) -> "Folder":
    """Make the folder for what is found. Raises UsageError."""
    from tlcli.cli.folders import Folder, new_folder

    wanted = output or Path(spec.out) / "data-check" / f"{datetime.now():%Y-%m-%d}" / f"{datetime.now():%H-%M-%S}"
    wanted = wanted.absolute()
    root = Path(spec.dataset.root).expanduser().resolve() if spec.dataset.root else None
    if root is not None and wanted.resolve().is_relative_to(root):
        raise UsageError(f"{wanted}: lies in the data set, of which nothing is changed; give another --output FOLDER")
    if output is None:
        return new_folder(wanted)
    if wanted.exists():
        if not wanted.is_dir() or any(wanted.iterdir()):
            raise UsageError(f"--output={output}: is there already and not empty; name a new folder")
        return Folder(wanted, ())
    return new_folder(wanted)


def _check(spec: "TrainSpec", asked: Asked, folder: Path) -> dict[str, Any]:
    """Check, and write all files; the summary."""
    from tlcli.cli.process import fast_imports
    from tlcli.cli.view import TerminalReporter
    from tlcli.reporter import Reporter

    with fast_imports():
        from tlcli.checking.check import check_data
        from tlcli.checking.files import write_files
        from tlcli.checking.sheets import draw_duplicates, draw_suspects
        from tlcli.checking.summary import summarise
        from tlcli.engine.session import session_for

    reporter = TerminalReporter() if asked.form == "table" else Reporter()
    found = check_data(spec, reporter, session_for(spec.cache), quick=asked.quick)
    try:
        with found.part("pictures"):
            draw_suspects(found, folder / "contact_sheet.png")
            draw_duplicates(found, folder / "duplicates.png")
        summary = {**summarise(found), "output": str(folder)}
        write_files(folder, found, summary)
    except OSError as exc:
        raise TlcliError(f"{exc.filename or folder}: {exc.strerror or exc}") from exc
    return summary


# -- what is shown


def show(summary: Mapping[str, Any], folder: Path) -> None:
    """Print what to do first, then the figures."""
    from tlcli.cli.tables import figures_table, labelled, shown_path
    from tlcli.cli.view import Screen

    screen = Screen()
    if not screen.is_terminal and screen.width >= 80:
        screen = Screen(UNLIMITED_WIDTH)
    width = screen.width if screen.width < UNLIMITED_WIDTH else None
    splits = ", ".join(f"{split} {sum(own.values()):,}" for split, own in summary["counts"].items())
    head = f"{summary['dataset']}: {summary['n_images']:,} images ({splits}), {len(summary['classes']):,} classes"
    rows = [("checked", head), *summary["verdicts"]]
    if not any(kind in ("fix", "look") for kind, _ in summary["verdicts"]):
        rows.insert(1, ("good", "nothing was found that has to be changed"))
    for label, text in rows:
        for line in labelled(label, text, width):
            screen.print(line, soft_wrap=True)
    screen.print()
    if len(summary["classes"]) <= MANY_CLASSES:
        table = figures_table("class", *summary["counts"])
        for name in summary["classes"]:
            table.add_row(name, *(f"{own[name]:,}" for own in summary["counts"].values()))
        screen.print(table)
        screen.print()
    for label, text in [*figure_lines(summary), ("files in", shown_path(folder))]:
        for line in labelled(label, text, width):
            screen.print(line, soft_wrap=True)


def figure_lines(summary: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures as labels and texts."""
    from tlcli.cli.tables import duration

    if len(summary["classes"]) > MANY_CLASSES:
        for split, own in summary["counts"].items():
            yield split, f"{min(own.values()):,} to {max(own.values()):,} images a class"
    yield "formats", f"{_tally(summary['formats'])}; colours {_tally(summary['modes'])}"
    sizes = summary["sizes"]
    sides = [f"{name} {sizes[name]['min']:,} to {sizes[name]['max']:,}, median {sizes[name]['median']:,.0f}"
             for name in ("width", "height")]  # fmt: skip
    yield "pixels", f"{'; '.join(sides)}; {sizes['smaller']:,} below the network's {sizes['network']}"
    yield "exact", _duplicates(summary["exact"])
    yield "near", _duplicates(summary["near"])
    labels = summary["labels"]
    if labels["checked"]:
        found = f"{labels['suspects']:,} that differ, {labels['likely_wrong']:,} of them clearly"
        yield "labels", f"{found}; a probe on {summary['backbone']} agrees with {labels['agreement']:.1%}"
    else:
        yield "labels", f"not checked: {labels['why']}"
    yield from (("note", note) for note in summary["notes"])
    yield "took", ", ".join(f"{part} {duration(seconds)}" for part, seconds in summary["seconds"].items())


def _tally(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {n:,}" for name, n in counts.items())


def _duplicates(found: Mapping[str, int]) -> str:
    if not found["groups"]:
        return "no duplicates"
    groups = "1 group" if found["groups"] == 1 else f"{found['groups']:,} groups"
    return (
        f"{found['images']:,} images in {groups}; of test in train or val {found['test_in_train_or_val']:,}, "
        f"of val in train {found['val_in_train']:,}; with several labels {found['several_labels']:,}"
    )
