"""`tlcli export`: a run's model as a file of another format."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tlcli.cli.libraries import importing
from tlcli.cli.run_folders import run_folders
from tlcli.errors import TlcliError, UsageError
from tlcli.exporting import FILES, check_format, place_of, refuse_existing
from tlcli.runs.run_dir import RunDir, open_run
from tlcli.text import did_you_mean, size_text

if TYPE_CHECKING:
    from tlcli.exporting.export import Exported
    from tlcli.specs import TrainSpec

HELP = """\
usage: tlcli export RUN --to FORMAT [--output PATH] [--with-preprocessing]
                    [--checkpoint best|last]

Write a run's model in another format. What was written is loaded again and
compared with PyTorch on test images of the run; unless every logit is within
0.0001 and every class the same, nothing is left behind.

  onnx         one file for ONNX runtimes, any batch size; needs the extra
               [export]
  torchscript  one file for torch.jit.load, also from C++; PyTorch itself
               advises pt2 by now
  pt2          one file for torch.export.load, any batch size
  safetensors  the weights alone, in one file
  timm         a folder for timm.create_model("local-dir:FOLDER",
               pretrained=True), with a model card

Each carries the classes, the preprocessing and the temperature.

  --to FORMAT            one of these
  --output PATH          where to; without it export/ in the run's directory.
                         What is there already stays as it is
  --with-preprocessing   onnx, torchscript and pt2 take uint8 (N, S, S, 3) RGB
                         and normalise it themselves; cutting and resizing to
                         S pixels stay outside
  --checkpoint NAME      best (the epoch best on validation) or last

examples:
  tlcli export outputs/DATE/TIME --to onnx
  tlcli export outputs/DATE/TIME --to timm --output my-model
"""

VALUES: dict[str, tuple[str, ...]] = {"--to": tuple(FILES), "--output": (), "--checkpoint": ("best", "last")}
"""The flags that take a value, and the values where only these are possible."""

SWITCH = "--with-preprocessing"


@dataclass(frozen=True)
class Arguments:
    """What argv asks for."""

    run: str
    to: str
    output: Path | None
    with_preprocessing: bool
    checkpoint: str


def run(argv: list[str]) -> int:
    """Export one run; the exit code."""
    if not argv or "-h" in argv or "--help" in argv:
        print(HELP, end="")
        return 0
    wanted = parsed(argv)
    check_format(wanted.to, with_preprocessing=wanted.with_preprocessing)
    folder = open_run(wanted.run)
    refuse_existing(place_of(folder.path, wanted.to, wanted.output))  # both before torch is imported
    with importing():
        from tlcli.exporting.export import export
        from tlcli.exporting.samples import find_samples
        from tlcli.runs.load import load_run

    loaded = load_run(wanted.run, wanted.checkpoint)
    samples = find_samples(loaded, _spec(folder))
    _show(export(loaded, wanted.to, samples, output=wanted.output, with_preprocessing=wanted.with_preprocessing))
    return 0


def parsed(argv: Sequence[str]) -> Arguments:
    """The arguments in any order, `--flag value` or `--flag=value`. Raises UsageError."""
    values: dict[str, str] = {}
    places: list[str] = []
    words = iter(argv)
    for word in words:
        flag, equals, attached = word.partition("=")
        if word == SWITCH:
            values[SWITCH] = "yes"
        elif flag in VALUES:
            value = attached if equals else next(words, "")
            values[flag] = _checked(flag, value)
        elif word.startswith("-"):
            raise UsageError(f"unknown flag {word!r}.{did_you_mean(flag, [*VALUES, SWITCH, '--help'])}")
        else:
            places.append(word)
    if len(places) != 1:
        raise UsageError(f"give one run directory, not {len(places)}: tlcli export RUN --to {'|'.join(FILES)}")
    if "--to" not in values:
        raise UsageError(f"name the format: --to {'|'.join(FILES)}")
    output = Path(values["--output"]).expanduser() if "--output" in values else None
    return Arguments(places[0], values["--to"], output, SWITCH in values, values.get("--checkpoint", "best"))


def _checked(flag: str, value: str) -> str:
    """A flag's value, where it can be one. (`check_format` minds the formats.)"""
    if not value:
        raise UsageError(f"{flag} needs a value{': one of ' + ', '.join(VALUES[flag]) if VALUES[flag] else ''}")
    if flag == "--checkpoint" and value not in VALUES[flag]:
        raise UsageError(f"--checkpoint takes one of {', '.join(VALUES[flag])}.{did_you_mean(value, VALUES[flag])}")
    return value


def candidates(before: Sequence[str]) -> Iterator[str]:
    """What may follow these words on a command line, for completion."""
    if before and before[-1] in VALUES:
        yield from VALUES[before[-1]]
        return
    if not before:
        yield from run_folders()
    yield from (flag for flag in (*VALUES, SWITCH, "--help") if flag not in before)


def _spec(run: RunDir) -> "TrainSpec | None":
    """What the run was trained with, to find its test images by; None where its config does not say."""
    from tlcli.cli.saved import saved_spec

    try:
        return saved_spec(run)
    except TlcliError:
        return None


def _show(done: "Exported") -> None:
    """What was written, how it was checked, and how to load it; whole lines, to be copied."""

    files = [done.path] if done.path.is_file() else [p for p in done.path.rglob("*") if p.is_file()]
    print(f"wrote    {done.path} ({size_text(sum(f.stat().st_size for f in files))})")
    print(f"holds    {done.holds}")
    print(f"checked  against PyTorch on {done.check.images}: every class equal,")
    print(f"         largest difference of a logit {done.check.largest:.2g}")
    if done.note:
        print(f"note     {done.note}")
    print(f"load it  {done.load}")
