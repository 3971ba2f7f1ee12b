"""Show a network's stages and parameters, and for each freeze strategy what
trains, where the network is cut, how large the cached activations are, and
how long training takes on this data and this machine: a few batches are
measured. Nothing is downloaded, and only measured choices are stored.

  each     size of the activations of one image at the cut
  cache    size of the activations of all images, on disk
  first    seconds of the first pass over all images, with decoding
  then     seconds of each later epoch, on activations
  uncached seconds of each epoch on images
  run      seconds of one whole run with an empty cache

examples:
  tlcli inspect resnet18
  tlcli inspect timm/vit_small_patch16_224 dataset=imagefolder dataset.root=photos
"""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from msgspec import structs

from tlcli.cli.conf_files import files_for
from tlcli.cli.parser import Parser
from tlcli.cli.rank import backbone_words
from tlcli.cli.table import table_lines, terminal_columns
from tlcli.errors import UsageError
from tlcli.files import expand_user
from tlcli.text import duration_text, labelled, size_text

if TYPE_CHECKING:
    from tlcli.specs import AugmentSpec, TrainSpec

COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {  # by title
    "<freeze": ("freeze", str),
    "trainable": ("trainable", "{:,}".format),
    "<cut at": ("at", str),
    "each": ("row_bytes", size_text),
    "cache": ("cache_bytes", size_text),
    "first": ("first_pass", duration_text),
    "then": ("cached_epoch", duration_text),
    "uncached": ("live_epoch", duration_text),
    "run": ("total", duration_text),
    "<takes": ("takes", {"live": "uncached", "cached": "cached"}.__getitem__),
}

PARSER = Parser("inspect", __doc__)
words = (
    "first an option of backbone= of `tlcli train`, or timm/NAME for any model of timm, or the directory of a run for "
    "its network, data and settings; then KEY=VALUE words as for `tlcli train`, with the same defaults"
)
PARSER.add_argument("words", nargs="*", metavar="BACKBONE|RUN|KEY=VALUE", help=words)
PARSER.add_config_dir()
PARSER.add_format()


def run(argv: list[str]) -> int:
    """Inspect the network and the data that argv names; return the exit code."""
    arguments = PARSER.parse_intermixed_args(argv)
    spec, head_augment = specs(arguments.words, arguments.config_dir)
    from tlcli.cli import fast_imports
    from tlcli.cli.view import TerminalReporter
    from tlcli.reporter import Reporter

    with fast_imports():
        from tlcli.engine.costs import inspect

    is_json = arguments.format == "json"
    reporter = Reporter() if is_json or not sys.stdout.isatty() else TerminalReporter()
    inspection = inspect(spec, head_augment, reporter)
    lines = [json.dumps(inspection, indent=2)] if is_json else page(inspection, terminal_columns())
    print("\n".join(lines))
    return 0


def specs(words: Sequence[str], config_dir: Sequence[str] = ()) -> "tuple[TrainSpec, AugmentSpec]":
    """Return the spec for these words, and the augmentation that freeze=head would have with them."""
    name, overrides = (words[0], list(words[1:])) if words and "=" not in words[0] else (None, list(words))
    if others := [word for word in overrides if "=" not in word]:
        raise UsageError(f"{others[0]!r}: name one backbone or run, then KEY=VALUE words")
    from tlcli.cli.compose import compose_spec, load_spec
    from tlcli.cli.job import check_spec
    from tlcli.runs.run_dir import RunDir

    options = files_for(config_dir).groups["backbone"]
    run = RunDir(expand_user(name or ""))
    if name is not None and run.path.is_dir() and (name not in options or run.info_file.is_file()):
        if not run.config_file.is_file():
            raise UsageError(f"{name}: not a run directory: config.yaml not found")
        if config_dir:
            raise UsageError("--config-dir has no effect on a run, whose config is complete: leave it out")
        spec = load_spec(run, overrides)
        if spec.backbone.weights not in ("default", "none"):  # the file is not needed, and may be gone
            spec = structs.replace(spec, backbone=structs.replace(spec.backbone, weights="default"))
        check_spec(spec)
        chooses_augment = any(word.startswith(("augment=", "augment.")) for word in overrides)
        return spec, spec.augment if chooses_augment else load_spec(run, [*overrides, "augment=none"]).augment
    words = [*config_dir, *(backbone_words(name, options) if name else [])]
    spec = compose_spec([*words, *overrides])
    check_spec(spec)
    others = [word for word in overrides if not word.lstrip("+~").startswith(("freeze=", "freeze."))]
    return spec, compose_spec([*words, *others, "freeze=head"]).augment


def page(inspection: Mapping[str, Any], width: int | None) -> list[str]:
    """Return the lines of the table; `width` is that of a terminal, or None."""
    images = ", ".join(f"{n:,} {split}" for split, n in inspection["images"].items() if n)
    stages, strategies = inspection["stages"], inspection["strategies"]
    parameters = sum(stage["parameters"] for stage in stages)
    facts = [
        ("backbone", f"{inspection['backbone']}, {parameters:,} parameters, {inspection['size']} px"),
        ("dataset", f"{inspection['dataset']}, {inspection['classes']:,} classes; {images}"),
        ("training", f"{inspection['epochs']:,} epochs, batches of {inspection['batch_size']:,}"),
        ("device", inspection["device"]),
    ]
    stage_rows = [(stage["name"], f"{stage['parameters']:,}", f"{stage['share']:.1%}") for stage in stages]
    costs = [[None if cost[key] is None else form(cost[key]) for key, form in COLUMNS.values()] for cost in strategies]
    notes = []
    for reason in dict.fromkeys(cost["why_live"] for cost in strategies if cost["why_live"]):
        names = ", ".join(cost["freeze"] for cost in strategies if cost["why_live"] == reason)
        notes.append(("uncached", f"{names}: {reason}"))
    if (inspection["load"] or 0) > inspection["cores"]:
        load = f"load {inspection['load']:.1f} on {inspection['cores']} cores"
        notes.append(("busy", f"this machine is busy ({load}): runs are faster when it is not"))
    notes.append(("time", "measured on a few batches; a run takes a few more seconds to start and to write its plots"))
    return [
        *(line for label, value in facts for line in labelled(label, value, width)),
        "",
        *table_lines(("<stage", "parameters", "share"), stage_rows, width),
        "",
        *table_lines([*COLUMNS], costs, width, drop=("each", "cut at", "trainable", "takes", "cache")),
        "",
        *(line for label, value in notes for line in labelled(label, value, width)),
    ]
