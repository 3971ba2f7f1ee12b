"""`tlcli inspect`: a network's stages, and what each way to freeze it costs here, before that is paid."""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from tlcli.cli.arguments import FORMATS, format_of
from tlcli.cli.conf_files import ConfFiles, conf_dir, extra_folders
from tlcli.cli.folders import run_folders
from tlcli.cli.table import UNLIMITED_WIDTH, terminal_columns
from tlcli.errors import UsageError
from tlcli.text import did_you_mean, size_text

if TYPE_CHECKING:
    from tlcli.inspection import Inspection, Strategy
    from tlcli.specs import AugmentSpec, TrainSpec

HELP = """\
usage: tlcli inspect [BACKBONE|RUN] [KEY=VALUE ...] [--format table|json]

A network's stages and parameters; and for each way to freeze it what trains,
where the network is cut, how large the activations are that are kept, and how
long training takes on this data and this machine: a few batches are measured.
Nothing is fetched, and nothing is left but measured choices in the cache.

BACKBONE is an option of backbone= in `tlcli train --help`, or timm/NAME for any
model of timm. RUN is a run's directory: its network, data and settings. The
KEY=VALUE words are those of `tlcli train`, with the same defaults.

  each     activations of one image at the cut
  cache    of all images, on disk
  first    seconds of the first pass over all images, decoding included
  then     seconds of each epoch after it, on activations
  live     seconds of each epoch on images
  run      seconds of one whole run on an empty cache, the way that is taken

examples:
  tlcli inspect resnet18
  tlcli inspect timm/vit_small_patch16_224 dataset=imagefolder dataset.root=photos
"""

PLACES = ("--config-dir", "-cd")
"""The flags of `tlcli train` that inspect has, too: for options of the user's own."""


def run(argv: list[str]) -> int:
    """Inspect what the arguments name; the exit code."""
    if "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    form, words = format_of(argv)
    spec, linear = specs(words)
    from tlcli.cli.process import fast_imports
    from tlcli.cli.view import TerminalReporter

    with fast_imports():
        from tlcli.inspection import inspect
    from tlcli.reporter import Reporter

    found = inspect(spec, linear, TerminalReporter() if form == "table" and sys.stdout.isatty() else Reporter())
    print(
        json.dumps(asdict(found), indent=2)
        if form == "json"
        else "\n".join(page(found, terminal_columns() or UNLIMITED_WIDTH))
    )
    return 0


def candidates(before: Sequence[str]) -> Iterator[str]:
    """What may follow these words on a command line, for completion: the backbones first, then keys of `train`."""
    match before:
        case [*_, "--format"]:
            yield from FORMATS
        case _:
            files = ConfFiles([conf_dir()])
            if not before:
                yield from (option for option in files.groups["backbone"] if option != "timm")
                yield from run_folders()
            yield from (f"{group}=" for group in files.groups)
            yield from ("--format", "--help")


# -- what is asked for


def specs(words: Sequence[str]) -> "tuple[TrainSpec, AugmentSpec]":
    """The spec that the words come to, and the augmentation that freeze=head would have with them."""
    name, overrides = None, list(words)
    if words and "=" not in words[0] and not words[0].startswith("-"):
        name, *overrides = words
    for before, word in zip(["", *overrides], overrides, strict=False):
        flag = word.partition("=")[0]
        if word.startswith("-") and flag not in PLACES:
            raise UsageError(f"inspect does not take {word!r}.{did_you_mean(flag, ['--format', '--help', *PLACES])}")
        if "=" not in word and not word.startswith("-") and before not in PLACES:
            raise UsageError(f"inspect takes one backbone or run, then KEY=VALUE words: what is {word!r}?")
    if name is not None and _is_place(name):
        return _of_run(Path(name).expanduser(), overrides)
    return _composed([*(backbone_words(name, overrides) if name is not None else ()), *overrides])


def _is_place(name: str) -> bool:
    """Whether a name is that of a run, not of a backbone."""
    path = Path(name).expanduser()
    known = ConfFiles([conf_dir()]).groups["backbone"]
    return path.is_dir() and (name not in known or (path / "run.json").is_file())


def backbone_words(name: str, overrides: Sequence[str]) -> list[str]:
    """The words of `tlcli train` that choose this backbone. Raises UsageError."""
    options = ConfFiles([conf_dir(), *extra_folders(overrides)]).groups["backbone"]
    library, slash, model = name.partition("/")
    if slash and library == "timm" and model:
        return ["backbone=timm", f"backbone.name={model}"]
    if slash and library == "torchvision" and model in options:
        name = model
    if name in options and name != "timm":
        return [f"backbone={name}"]
    if name == "timm" and any(word.startswith("backbone.name=") for word in overrides):
        return ["backbone=timm"]
    choice = [option for option in options if option != "timm"]
    near = did_you_mean(model if slash else name, choice)
    raise UsageError(
        f"{name}: no backbone of that name, and no run's directory.{near} Choose from {', '.join(choice)}, or timm/NAME"
    )


def _composed(overrides: Sequence[str]) -> "tuple[TrainSpec, AugmentSpec]":
    """Of a command line of `tlcli train`."""
    from tlcli.cli.compose import build_spec, compose_config, composing, parse_flags
    from tlcli.cli.job import check

    flags = parse_flags(overrides)
    if flags.multirun or not flags.runs:
        raise UsageError("inspect looks at one configuration: give KEY=VALUE and GROUP=OPTION words alone")
    with composing(flags.files):
        spec = build_spec(compose_config(flags), flags.files)
        check(spec)
        head = replace(flags, overrides=(*(o for o in flags.overrides if not _is_freeze(o)), "freeze=head"))
        return spec, build_spec(compose_config(head), flags.files).augment


def _is_freeze(override: str) -> bool:
    return override.lstrip("+~").startswith(("freeze=", "freeze."))


def _of_run(path: Path, overrides: list[str]) -> "tuple[TrainSpec, AugmentSpec]":
    """Of a run, with overrides on its config."""
    from tlcli.cli.job import check
    from tlcli.cli.saved_config import load_spec
    from tlcli.runs.run_dir import RunDir

    if not (path / "config.yaml").is_file():
        raise UsageError(f"{path}: not a run's directory: there is no config.yaml in it")
    spec = load_spec(RunDir(path), overrides)
    if spec.backbone.weights not in ("default", "none"):  # what it started from may be gone, and is not needed
        spec = structs.replace(spec, backbone=structs.replace(spec.backbone, weights="default"))
    check(spec)
    own = any(word.startswith(("augment=", "augment.")) for word in overrides)
    return spec, spec.augment if own else load_spec(RunDir(path), [*overrides, "augment=none"]).augment


# -- words


def page(found: "Inspection", width: int) -> list[str]:
    """The lines for people."""
    from tlcli.cli.tables import labelled

    wrap = None if width >= UNLIMITED_WIDTH else width
    images = ", ".join(f"{n:,} {split}" for split, n in found.images.items())
    parameters = sum(stage.parameters for stage in found.stages)
    facts = [
        ("backbone", f"{found.backbone}, {parameters:,} parameters, {found.size} px"),
        ("dataset", f"{found.dataset}, {found.classes:,} classes; {images}"),
        ("training", f"{found.epochs:,} epochs, batches of {found.batch_size:,}"),
        ("device", found.device),
    ]
    lines = [line for label, value in facts for line in labelled(label, value, wrap)]
    stages = [[s.name, f"{s.parameters:,}", f"{s.share:.1%}"] for s in found.stages]
    lines += ["", *grid(["stage", "parameters", "share"], stages), ""]
    fields = fields_for(found.strategies, width)
    lines += grid([f.title for f in fields], [[f.cell(s) for f in fields] for s in found.strategies])
    lines.append("")
    for why, names in _reasons(found.strategies).items():
        lines += labelled("live", f"{', '.join(names)}: {why}", wrap)
    if found.load is not None and found.load > found.cores:
        busy = f"this machine is busy (load {found.load:.1f} on {found.cores} cores): alone, a run is quicker"
        lines += labelled("busy", busy, wrap)
    lines += labelled(
        "time", "measured on a few batches; a run takes a few seconds more to start and to write its plots", wrap
    )
    return lines


def _reasons(strategies: "Sequence[Strategy]") -> dict[str, list[str]]:
    """Why training would be live, and with which strategies."""
    found: dict[str, list[str]] = {}
    for strategy in strategies:
        if strategy.why_live is not None:
            names = found.setdefault(strategy.why_live, [])
            kind, _, n = strategy.freeze.partition(" n=")
            if n and names and names[-1].startswith(f"{kind} n="):
                names[-1] += f",{n}"
            else:
                names.append(strategy.freeze)
    return found


@dataclass(frozen=True)
class Field:
    """A column. Where the width is short, those with a higher `drop` are left out."""

    title: str
    cell: "Callable[[Strategy], str]"
    drop: int


def _seconds(value: float | None) -> str:
    """For people, who want two figures."""
    from tlcli.cli.tables import duration

    if value is None:
        return "-"
    return (
        f"{value:.2f} s"
        if value < 0.095
        else f"{value:.1f} s"
        if value < 9.95
        else duration(round(value)).replace(".0 s", " s")
    )


def _bytes(value: int | None) -> str:
    return "-" if value is None else size_text(value)


FIELDS = (
    Field("freeze", lambda s: s.freeze, 0),
    Field("trainable", lambda s: f"{s.trainable:,}", 4),
    Field("cut at", lambda s: s.at or "-", 5),
    Field("each", lambda s: _bytes(s.row_bytes), 6),
    Field("cache", lambda s: _bytes(s.cache_bytes), 2),
    Field("first", lambda s: _seconds(s.first_pass), 0),
    Field("then", lambda s: _seconds(s.cached_epoch), 0),
    Field("live", lambda s: _seconds(s.live_epoch), 0),
    Field("run", lambda s: _seconds(s.total), 0),
    Field("takes", lambda s: s.takes, 3),
)


def fields_for(strategies: "Sequence[Strategy]", width: int) -> list[Field]:
    """The fields that fit a width, in their order; the more important ones first."""
    widths = {f: max(len(f.title), *(len(f.cell(s)) for s in strategies)) + 2 for f in FIELDS}
    left, kept = width + 2, set()
    for field in sorted(FIELDS, key=lambda f: f.drop):
        if field.drop == 0 or widths[field] <= left:
            left -= widths[field]
            kept.add(field)
    return [field for field in FIELDS if field in kept]


def grid(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells under their titles; the first column and words to the left, figures to the right."""
    columns = list(zip(titles, *rows, strict=True))
    widths = [max(map(len, column)) for column in columns]
    right = [i > 0 and any(c.isdigit() for cell in column[1:] for c in cell[:1]) for i, column in enumerate(columns)]
    return [
        "  ".join(
            cell.rjust(w) if r else cell.ljust(w) for cell, w, r in zip(line, widths, right, strict=True)
        ).rstrip()
        for line in [titles, *rows]
    ]
