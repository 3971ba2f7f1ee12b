"""Rank backbones and image sizes for a dataset before training. A linear probe is
cross-validated on the features of a sample of the training images. The test
images are not used.

  accuracy  in cross-validation, with its standard error
  tied      the difference to the best one is within its standard error
  ImageNet  published accuracy in percent
  images/s  in evaluation, on this machine
  run       expected time of a run of `tlcli train`, on this machine

examples:
  tlcli rank dataset=imagefolder dataset.root=photos
  tlcli rank dataset=imagefolder dataset.root=photos backbone=efficientnet_lite0,efficientnet_lite1
"""

import json
import shlex
import sys
from collections.abc import Collection, Sequence
from io import BytesIO
from typing import TYPE_CHECKING, Any

from tlcli.cli import exit_status, fast_imports
from tlcli.cli.conf_files import files_for
from tlcli.cli.parser import Parser, values_of, whole_number
from tlcli.cli.table import number_text, table_lines, terminal_columns
from tlcli.errors import CANDIDATE_ERRORS, BadImagesError, UsageError
from tlcli.files import expand_user
from tlcli.interrupts import handle_signals
from tlcli.text import did_you_mean, duration_text, size_text

if TYPE_CHECKING:
    from tlcli.engine.ranking import Score
    from tlcli.specs import TrainSpec

TITLES = ("<backbone", "px", "<accuracy", "<", "ImageNet", "weights", "<license", "images/s", "run")
LESS_IMPORTANT = ("license", "weights", "ImageNet", "images/s")

PARSER = Parser("rank", __doc__)
add = PARSER.add_argument
words = (
    "as for `tlcli train`. backbone=A,B: options of backbone=, timm/NAME, or directories of runs (default: all options "
    "whose weights are on this machine; others are downloaded); image.size=A,B: image sizes (default: that of a "
    "run, and that of the weights)"
)
add("words", nargs="*", metavar="KEY=VALUE", help=words)
per_class, in_all = "sampled images per class, at least 2 (default: 50)", "sampled images in all (default: 2,000)"
add("--per-class", type=whole_number, default=50, metavar="N", help=per_class)
add("--max-images", type=whole_number, default=2000, metavar="N", help=in_all)
picture = "draw accuracy against images per second to this new file (.png or .svg)"
add("--plot", type=expand_user, metavar="FILE", help=picture)
PARSER.add_config_dir()
PARSER.add_format()


@handle_signals()
def run(argv: list[str]) -> int:
    """Rank the backbones that argv names, print the ranking and the command to type next; return the exit code."""
    arguments = PARSER.parse_intermixed_args(argv)
    plot = arguments.plot
    if plot and plot.exists():
        raise UsageError(f"--plot {plot}: exists; name a new file")
    if plot and not plot.parent.is_dir():
        raise UsageError(f"--plot {plot}: {plot.parent} is not a folder; make it first")
    if plot and plot.suffix not in (".png", ".svg"):
        raise UsageError(f"--plot {plot}: must be a .png or .svg")
    lists, others = values_of(arguments.words, ("backbone", "image.size"))
    names, sizes = ([item for value in values for item in value.split(",") if item] for values in lists.values())
    if bad := [size for size in sizes if not size.isdigit() or int(size) < 8]:
        raise UsageError(f"image.size={bad[0]}: must be a number of pixels from 8")
    with fast_imports():
        from tlcli.cli.job import check_weights
        from tlcli.cli.view import TerminalReporter
        from tlcli.engine.ranking import choose, score
        from tlcli.engine.session import session_for
        from tlcli.reporter import Reporter

    candidates = find_candidates(names, [*arguments.config_dir, *others])
    if not candidates:
        raise UsageError("no backbone's weights are on this machine; name one with backbone=NAME to download them")
    reporter = Reporter() if arguments.format == "json" else TerminalReporter(on_stderr=True)
    next(iter(candidates.values()))[1].dataset.check()
    for name, (_, spec) in candidates.items():
        if names:  # before any is ranked
            check_weights(spec.backbone.weights)
        if not has_weights(spec):
            n = sum(p.numel() for p in spec.backbone.build(1000).network.parameters())
            print(f"{name}: its weights will be downloaded, about {size_text(4 * n)}", file=sys.stderr, flush=True)
    session = session_for(next(iter(candidates.values()))[1].cache)
    scores: list[Score] = []
    with reporter.track("ranking", len(candidates), "backbones") as advance:
        for name, (_, spec) in candidates.items():
            limits = arguments.per_class, arguments.max_images
            try:
                check_weights(spec.backbone.weights)
                scores += score(name, spec, [int(size) for size in sizes], limits, session, reporter)
            except CANDIDATE_ERRORS as exc:
                if names or isinstance(exc, BadImagesError) or (not scores and name == list(candidates)[-1]):
                    raise
                print(f"{name}: {exit_status(exc)[1]}", file=sys.stderr, flush=True)
            advance(1)
    chosen = choose(scores)
    own = others if chosen.train_size == chosen.size else [*others, f"image.train_size={chosen.train_size}"]
    size = f"image.size={chosen.size}"
    command = shlex.join(["tlcli", "train", *arguments.config_dir, *candidates[chosen.backbone][0], size, *own])
    scores.sort(key=lambda s: -s.probe.accuracy)
    ranking = [_facts(s, scores[0], candidates[s.backbone][1]) for s in scores]
    if arguments.format == "json":
        print(json.dumps({"ranking": ranking, "next": command}, indent=2))
    else:
        rows = []
        for row in ranking:
            accuracy = f"{row['accuracy']:.3f} ± {row['standard_error']:.3f}", "tied" if row["tied"] else ""
            network = number_text(row["imagenet_top1"], ".1f"), size_text(row["weights_bytes"]), row["license"]
            speed = number_text(row["images_per_second"], ",.0f")
            rows.append((row["backbone"], row["size"], *accuracy, *network, speed, duration_text(row["run_seconds"])))
        n, folds = len(scores[0].probe.correct), scores[0].probe.folds
        print(*table_lines(TITLES, rows, terminal_columns(), LESS_IMPORTANT), sep="\n")
        print(f"\n{folds}-fold cross-validation of a linear probe on {n:,} training images")
        fastest = "" if chosen is scores[0] else ", the fastest of those tied with the best"
        print(f"next{fastest}:\n  {command}")
    if plot is not None:  # last: the place may be full
        from tlcli.runs.plots import plot_ranking

        picture = BytesIO()
        plot_ranking(ranking, picture, plot.suffix[1:])
        try:
            with plot.open("xb") as file:
                file.write(picture.getvalue())
        except FileExistsError as exc:  # made meanwhile
            raise UsageError(f"--plot {plot}: exists; name a new file") from exc
    return 0


def _facts(score: "Score", best: "Score", spec: "TrainSpec") -> dict[str, Any]:
    """Return an object of --format json."""
    is_published = spec.backbone.weights == "default"
    return {
        "backbone": score.backbone,
        "size": score.size,
        "train_size": score.train_size,
        "accuracy": score.probe.accuracy,
        "standard_error": score.standard_error,
        "tied": not best.probe.beats(score.probe),
        "imagenet_top1": spec.backbone.imagenet_top1 if is_published else None,
        "license": spec.backbone.license if is_published else None,
        "weights_bytes": 4 * score.parameters,
        "images_per_second": score.images_per_second,
        "run_seconds": score.seconds,
    }


def has_weights(spec: "TrainSpec") -> bool:
    """Return True unless the weights of the backbone have to be downloaded."""
    backbone = spec.backbone
    return backbone.weights != "default" or backbone.is_local(backbone.name)


def backbone_words(name: str, options: Collection[str]) -> list[str]:
    """Return the overrides that choose a backbone: an option, or timm/NAME. Raise UsageError if it is neither."""
    if name.startswith("timm/"):
        return ["backbone=timm", f"backbone.name={name.removeprefix('timm/')}"]
    if name not in options:
        near = did_you_mean(name, options) or f" Choose from {', '.join(options)}."
        raise UsageError(f"backbone={name}: neither an option, nor timm/NAME, nor a run directory.{near}")
    return [f"backbone={name}"]


def find_candidates(names: Sequence[str], words: Sequence[str]) -> dict[str, tuple[list[str], "TrainSpec"]]:
    """Return for each name the overrides that choose its backbone, and the spec of a run with `words` behind them.

    Without names these are the options that name one network, if its weights are on this machine.
    """
    from tlcli.cli.compose import compose_spec
    from tlcli.runs.run_dir import open_run

    files = files_for(words)
    options = files.groups["backbone"]
    of_one_network = [name for name, option in options.items() if ("name", "???") not in [k[:2] for k in option.keys]]
    candidates = {}
    for name in names or of_one_network:
        is_option = name in options or name.startswith("timm/")
        if not is_option and expand_user(name).is_dir():
            run = open_run(name)
            network, kind = str(run.info.get("backbone")), str(run.info.get("backbone_kind"))
            own_options = files.options_with("backbone", {kind})  # networks of two kinds may have one name
            own = backbone_words(network if network in own_options else f"timm/{network}", options)
            own.append(f"backbone.weights={run.path}")
        else:
            own = backbone_words(name, options)
        candidates[name] = own, compose_spec([*own, *words])
    return {name: candidate for name, candidate in candidates.items() if names or has_weights(candidate[1])}
