"""`tlcli rank`: say which backbone, at which image size, suits a dataset, before anything is trained."""

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tlcli.cli import fast_imports
from tlcli.cli.conf_files import files_for
from tlcli.cli.parser import Parser, whole_number
from tlcli.cli.table import TableColumn, table_lines, terminal_columns
from tlcli.errors import UsageError
from tlcli.text import did_you_mean, duration_text, size_text

if TYPE_CHECKING:
    from tlcli.engine.ranking import Score
    from tlcli.specs import TrainSpec

LISTS = ("backbone", "image.size")  # keys whose value may be a list
COLUMNS = (
    TableColumn("backbone", left=True),
    TableColumn("px"),
    TableColumn("accuracy", left=True),
    TableColumn("", left=True),
    TableColumn("ImageNet", drop=2),
    TableColumn("weights", drop=3),
    TableColumn("license", drop=4, left=True),
    TableColumn("images/s", drop=1),
    TableColumn("run"),
)


def parser() -> Parser:
    """Return the parser of `tlcli rank`."""
    rank_parser = Parser(
        "rank",
        "Rank backbones and image sizes for a dataset before anything is trained: a\n"
        "linear probe on the features of a sample of the training images is cross-\n"
        "validated. The test images are not read.\n\n"
        "  accuracy  in cross-validation, with its standard error\n"
        "  tied      the difference to the best one is within its standard error\n"
        "  ImageNet  published accuracy in percent\n"
        "  images/s  in evaluation, on this machine\n"
        "  run       expected time of a run of `tlcli train`, on this machine",
        [
            "tlcli rank dataset=imagefolder dataset.root=photos",
            "tlcli rank dataset=imagefolder dataset.root=photos backbone=efficientnet_lite0,efficientnet_lite1",
        ],
    )
    add = rank_parser.add_argument
    add(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="as for `tlcli train`. backbone=A,B: options of backbone=, timm/NAME, or directories of runs (default: "
        "all options whose weights are on this machine; others are downloaded); image.size=A,B: image sizes (default: "
        "that of the backbone, and 5/7 of it)",
    )
    add("--per-class", type=whole_number, default=50, metavar="N", help="sampled images per class (default: 50)")
    add("--max-images", type=whole_number, default=2000, metavar="N", help="sampled images in all (default: 2,000)")
    add("--plot", metavar="FILE", help="draw accuracy against images per second to this new file (.png or .svg)")
    rank_parser.add_config_dir()
    rank_parser.add_format()
    return rank_parser


def run(argv: list[str]) -> int:
    """Rank the backbones that argv names, print the ranking and the command to type next; return the exit code."""
    arguments = parser().parse_intermixed_args(argv)
    plot = Path(arguments.plot) if arguments.plot else None
    if plot is not None and (plot.exists() or plot.suffix not in (".png", ".svg")):
        raise UsageError(
            f"--plot {plot}: " + ("exists; name a new file" if plot.exists() else "must be a .png or .svg")
        )
    values = {key: [w.partition("=")[2] for w in arguments.words if w.startswith(f"{key}=")] for key in LISTS}
    names, sizes = ([item for value in values[key] for item in value.split(",") if item] for key in LISTS)
    others = [word for word in arguments.words if not word.startswith(tuple(f"{key}=" for key in LISTS))]
    folder = [f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []
    if bad := [size for size in sizes if not size.isdigit() or int(size) < 8]:
        raise UsageError(f"image.size={bad[0]}: must be a number of pixels from 8")
    with fast_imports():
        from tlcli.cli.job import check
        from tlcli.cli.view import TerminalReporter
        from tlcli.engine.ranking import choose, score
        from tlcli.engine.session import session_for
        from tlcli.reporter import Reporter

    candidates = find_candidates(names, folder, others)
    if not candidates:
        raise UsageError(
            "rank: no backbone's weights are on this machine; name one with backbone=NAME to download them"
        )
    reporter = Reporter() if arguments.format == "json" else TerminalReporter(on_stderr=True)
    for name, (_, spec) in candidates.items():
        check(spec)
        if not has_weights(spec):
            n = sum(p.numel() for p in spec.backbone.build(1000).network.parameters())
            print(f"{name}: its weights will be downloaded, about {size_text(4 * n)}", file=sys.stderr, flush=True)
    session = session_for(next(iter(candidates.values()))[1].cache)
    scores: list[Score] = []
    with reporter.track("ranking", len(candidates), "backbones") as advance:
        for name, (_, spec) in candidates.items():
            limits = arguments.per_class, arguments.max_images
            scores += score(name, spec, [int(size) for size in sizes], limits, session, reporter)
            advance(1)
    chosen = choose(scores)
    own = others if chosen.train_size == chosen.size else [*others, f"image.train_size={chosen.train_size}"]
    command = shlex.join(["tlcli", "train", *candidates[chosen.backbone][0], f"image.size={chosen.size}", *own])
    scores.sort(key=lambda s: -s.probe.accuracy)
    rows = [_facts(s, scores[0], candidates[s.backbone][1]) for s in scores]
    if plot is not None:
        from tlcli.runs.plots import plot_ranking

        plot_ranking(rows, plot)
    if arguments.format == "json":
        print(json.dumps({"ranking": rows, "next": command}, indent=2))
        return 0
    n, folds = len(scores[0].probe.correct), scores[0].probe.folds
    print("\n".join(table_lines(COLUMNS, map(_row, rows), terminal_columns())))
    print(f"\n{folds}-fold cross-validation of a linear probe on {n:,} training images")
    fastest = "" if chosen is scores[0] else ", the fastest of those tied with the best"
    print(f"next{fastest}:\n  {command}")
    return 0


def has_weights(spec: "TrainSpec") -> bool:
    """Return True unless the weights of the backbone have to be downloaded."""
    backbone = spec.backbone
    return backbone.weights != "default" or backbone.is_local(backbone.name)


def find_candidates(
    names: Sequence[str], folder: Sequence[str], others: Sequence[str]
) -> dict[str, tuple[list[str], "TrainSpec"]]:
    """Return for each name the overrides that choose its backbone, and the spec of a run with `others` behind them.

    Without names these are the options that name one network, if its weights are on this machine.
    """
    from tlcli.cli.compose import compose_spec

    options = files_for(folder).groups["backbone"]
    found: dict[str, list[str]] = {}
    for name in names or [
        name for name, option in options.items() if ("name", "???") not in [k[:2] for k in option.keys]
    ]:
        path = Path(name).expanduser()
        if name.startswith("timm/"):
            found[name] = ["backbone=timm", f"backbone.name={name.removeprefix('timm/')}"]
        elif name in options:
            found[name] = [f"backbone={name}"]
        elif path.is_dir():
            from tlcli.runs.run_dir import open_run

            run = open_run(path)
            network = str(run.info.get("backbone"))
            own = [f"backbone={network}"] if network in options else ["backbone=timm", f"backbone.name={network}"]
            found[name] = [*own, f"backbone.weights={run.path}"]
        else:
            near = did_you_mean(name, options) or f" Choose from {', '.join(options)}."
            raise UsageError(f"backbone={name}: neither an option, nor timm/NAME, nor a run directory.{near}")
    candidates = {name: (own, compose_spec([*folder, *own, *others])) for name, own in found.items()}
    return {name: candidate for name, candidate in candidates.items() if names or has_weights(candidate[1])}


def _facts(score: "Score", best: "Score", spec: "TrainSpec") -> dict[str, Any]:
    """Return an object of --format json."""
    return {
        "backbone": score.backbone,
        "size": score.size,
        "accuracy": score.probe.accuracy,
        "standard_error": score.standard_error,
        "tied": score.ties_with(best),
        "imagenet_top1": spec.backbone.imagenet_top1,
        "license": spec.backbone.license,
        "weights_bytes": 4 * score.parameters,
        "images_per_second": score.images_per_second,
        "run_seconds": score.seconds,
    }


def _row(facts: dict[str, Any]) -> list[object]:
    top1, speed, seconds = facts["imagenet_top1"], facts["images_per_second"], facts["run_seconds"]
    return [
        facts["backbone"],
        facts["size"],
        f"{facts['accuracy']:.3f} ± {facts['standard_error']:.3f}",
        "tied" if facts["tied"] else "",
        None if top1 is None else f"{top1:.1f}",
        size_text(facts["weights_bytes"]),
        facts["license"],
        None if speed is None else f"{speed:,.0f}",
        None if seconds is None else duration_text(seconds),
    ]
