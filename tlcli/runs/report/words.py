"""What a report says in words and figures. Plain text: the templates escape it."""

import shlex
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

from tlcli.registry import options
from tlcli.runs.report.reading import Facts, RunFiles, at, facts, number, text, texts, whole

NBSP = "\N{NO-BREAK SPACE}"
NONE = "\N{EN DASH}"
MOST_NAMES = 3
"""Classes that a sentence names; with more it gives their number."""

STATUS = {
    "done": "Done",
    "failed": "Failed",
    "interrupted": "Interrupted",
    "running": "Running",
    "died": "Killed",
    "damaged": "Damaged",
}


def percent(value: object, digits: int = 1) -> str:
    """93.5 %, or a dash for what is no number."""
    share = number(value)
    return NONE if share is None else f"{100 * share:.{digits}f}{NBSP}%"


def count(value: object) -> str:
    """3,373,570."""
    n = number(value)
    return NONE if n is None else f"{n:,.0f}"


def figure(value: object, digits: int = 3) -> str:
    """0.137."""
    x = number(value)
    return NONE if x is None else f"{x:.{digits}f}"


def rate(value: object) -> str:
    """0.0005, 1e-06."""
    x = number(value)
    return NONE if x is None else f"{x:g}"


def seconds(value: object) -> str:
    """0.02 s, 13.8 s, 4 min 12 s, 2 h 05 min."""
    s = number(value)
    if s is None:
        return NONE
    if s < 1:
        return f"{s:.2f}{NBSP}s"
    if s < 99.95:
        return f"{s:.1f}{NBSP}s"
    minutes, rest = divmod(round(s), 60)
    if minutes < 60:
        return f"{minutes}{NBSP}min {rest}{NBSP}s"
    return f"{minutes // 60}{NBSP}h {minutes % 60:02}{NBSP}min"


def plural(n: object, one: str, many: str | None = None) -> str:
    """1 image, 153 images."""
    return f"{count(n)} {one if n == 1 else many or one + 's'}"


def time_of(value: object) -> datetime | None:
    """A moment from ISO 8601, taken as UTC where it does not say; None for what is no time."""
    try:
        when = datetime.fromisoformat(str(value))
    except ValueError:
        return None
    return when if when.tzinfo else when.replace(tzinfo=UTC)


def moment(value: object) -> str | None:
    """24 November 2026, 16:14 UTC; None for what is no time."""
    when = time_of(value)
    return None if when is None else f"{when.day} {when:%B %Y, %H:%M} {when.tzname()}"


def isolated(name: str) -> str:
    """A name within a sentence: one that is written from right to left must not turn what comes after it around."""
    return name if name.isascii() else f"\N{FIRST STRONG ISOLATE}{name}\N{POP DIRECTIONAL ISOLATE}"


def dataset_name(record: Facts, config: Facts) -> str:
    """The name of the data set: of files that the user has, the name of their folder or list."""
    place = text(at(config, "dataset", "root")) or text(at(config, "dataset", "file"))
    name = text(record.get("dataset")) or text(at(config, "dataset", "name")) or "a data set"
    if at(config, "dataset", "kind") in ("imagefolder", "manifest") and place:
        return isolated(PurePath(place).name or name)
    return isolated(name)


def purpose(classes: Sequence[str]) -> str:
    """to tell ants and bees apart; to tell 10 classes apart."""
    if not classes:
        return "to classify images"
    if len(classes) == 1:
        return f"to name one class, {isolated(classes[0])}"
    if len(classes) <= MOST_NAMES:
        names = [isolated(name) for name in classes]
        return f"to tell {', '.join(names[:-1])} and {names[-1]} apart"
    return f"to tell {len(classes):,} classes apart"


def trained_part(freeze: object, config: Facts, *, done: bool) -> str:
    """What of the network trained, or is to."""
    trained, stayed = ("trained", "stayed") if done else ("trains", "stays")
    strategy = options("freeze").get(str(freeze))
    part = strategy.describe(config.get("freeze") or {}) if strategy else f"what freeze={freeze} leaves"
    return f"{part} {trained}" if freeze == "none" else f"{part} {trained}, the rest {stayed} frozen"


def origin(config: Facts) -> str:
    """Where the weights came from, in apposition to the network's name."""
    weights = at(config, "backbone", "weights")
    if weights == "none":
        return "starting from random weights"
    if weights is None:
        return ""
    return "pretrained" if weights == "default" else f"with the weights of {PurePath(str(weights)).name}"


def sentence(files: RunFiles) -> str:
    """What was trained on what, and how: one sentence for whoever has not seen the command."""
    record, config = files.record, files.config
    network = text(record.get("backbone")) or text(at(config, "backbone", "name")) or "A network"
    start = origin(config)
    learned = "fine-tuned" if at(config, "backbone", "weights") != "none" else "trained"
    done = record.get("status") == "done"
    learned = f"was {learned}" if done else f"was to be {learned}"
    n = whole(record.get("n_train"))
    images = f"{plural(n, 'image')} of" if n else "images of"
    subject = f"{network}, {start}," if start else network
    what = f"on {images} {dataset_name(record, config)} {purpose(texts(record.get('classes')))}"
    freeze = record.get("freeze") or at(config, "freeze", "kind")
    return f"{subject} {learned} {what}{f'; {trained_part(freeze, config, done=done)}' if freeze else ''}."


def training(files: RunFiles) -> str | None:
    """How it was trained, in more detail; None where the config is not known."""
    config = files.config
    if not config:
        return None
    parts = []
    if (epochs := whole(config.get("epochs"))) is not None:
        parts.append(plural(epochs, "epoch"))
    if (batch := whole(config.get("batch_size"))) is not None:
        parts.append(f"batches of {batch}")
    if kind := text(at(config, "optimizer", "kind")):
        parts.append(f"{kind} with a learning rate of {rate(at(config, 'optimizer', 'lr'))}")
    if kind := text(at(config, "scheduler", "kind")):
        parts.append(f"{kind} schedule")
    if (size := whole(at(files.record, "preprocessing", "size"))) is not None:
        parts.append(f"images of {size}{NBSP}px")
    augment = text(at(config, "augment", "kind"))
    if augment:
        parts.append("no augmentation" if augment == "none" else f"augmentation: {augment}")
    if (seed := whole(files.record.get("seed"))) is not None:
        parts.append(f"seed{NBSP}{seed}")
    return ", ".join(parts)


def again(record: Facts) -> str | None:
    """The command that trains this run again, in a directory of its own; of a job of a sweep, that job alone."""
    overrides = texts(record.get("overrides"))
    try:
        typed = shlex.split(text(record.get("command")) or "tlcli train")
    except ValueError:
        return text(record.get("command"))
    flags = [w for w in typed if (w.startswith("-") or "=" not in w) and w not in ("-m", "--multirun", *overrides)]
    return shlex.join([*flags, *overrides])


def environment(record: Facts) -> tuple[tuple[str, str], ...]:
    """Rows of (what, which): machine, device, versions, commit."""
    machine = record.get("machine")
    cores = whole(at(machine, "cores"))
    system = [text(at(machine, key)) for key in ("processor", "architecture", "system")]
    system.insert(1, plural(cores, "core") if cores else None)
    rows: list[tuple[str, Any]] = [
        ("Machine", ", ".join(one for one in system if one)),
        ("Device", text(at(record, "numerics", "device")) or record.get("device")),
        ("Versions", ", ".join(f"{name}{NBSP}{found}" for name, found in facts(record.get("versions")).items())),
        ("Commit", record.get("git_commit")),
    ]
    return tuple((what, str(which)) for what, which in rows if which)
