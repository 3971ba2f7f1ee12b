"""`tlcli tune`: search for a better recipe within a time budget."""

import os
import re
import shlex
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from tlcli.cli import fast_imports
from tlcli.cli.compose import build_spec, compose_config, one_process, parse_flags
from tlcli.cli.conf_files import ConfFiles, conf_dir
from tlcli.cli.job import check
from tlcli.cli.parser import Parser
from tlcli.cli.rank import find_candidates
from tlcli.cli.resume import check_not_running
from tlcli.cli.search import STATE_FILE, Search
from tlcli.cli.train import discard_folders, make_folder
from tlcli.cli.view import TerminalReporter
from tlcli.errors import UsageError
from tlcli.interrupts import handle_signals
from tlcli.runs import leaderboard
from tlcli.runs.run_dir import read_json
from tlcli.specs import all_keys
from tlcli.text import did_you_mean, duration_text, one_line, shown_path

if TYPE_CHECKING:
    from tlcli.tune import TuneSpec

UNITS = {"s": 1, "m": 60, "h": 3600}
RANK_IMAGES = (50, 500)  # sampled images per class, and in all
RANK_RUNS = 4  # in the budget, at least, for other backbones to be tried: they take longer
MAX_SHARE = 1 / 3  # of the budget that a run with another backbone may take


def parser() -> Parser:
    """Return the parser of `tlcli tune`."""
    tune_parser = Parser(
        "tune",
        "Spend a time budget on a better recipe than the default one: choose a backbone\n"
        "and an image size, try recipes on validation images, train the best ones again\n"
        "on all training images, average their weights, and test the result once. The\n"
        "folder is that of a sweep; `best` in it is the run to use.",
        [
            "tlcli tune dataset=imagefolder dataset.root=photos budget=10m",
            "tlcli tune dataset=imagefolder dataset.root=photos budget=90s tune=quick",
            "tlcli tune --resume outputs/DATE/TIME",
        ],
    )
    tune_parser.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="budget=90s|10m|2h: the time; tune=NAME: what is searched (default, quick, or tune/NAME.yaml in "
        "--config-dir); the other words are those of `tlcli train`, and keys that they set are not searched",
    )
    tune_parser.add_config_dir()
    tune_parser.add_argument("--resume", metavar="SWEEP", help="continue a search with the rest of its budget")
    return tune_parser


def run(argv: list[str]) -> int:
    """Start a search or resume one; return the exit code."""
    arguments, start = parser().parse_intermixed_args(argv), time.monotonic()
    with handle_signals():
        if arguments.resume is None:
            search, made = _new_search(arguments.words, arguments.config_dir, start)
        elif arguments.words:
            raise UsageError(f"{arguments.words[0]}: a search is resumed as it was started; leave it out")
        else:
            search, made = _earlier_search(Path(arguments.resume).expanduser().absolute(), start), []
        try:
            search.run()
        except BaseException as exc:
            if not any(search.folder.rglob("run.json")):
                discard_folders(search.folder, made)
            if search.folder.exists():
                search.save("interrupted" if isinstance(exc, KeyboardInterrupt) else "failed")
                leaderboard.write(search.folder)
                if isinstance(exc, KeyboardInterrupt):
                    command = ["tlcli", "tune", "--resume", shown_path(search.folder)]
                    exc.args = (f"resume with: {shlex.join(command)}",)
            raise
    return 0


def read_tune_spec(name: str, folder: Path | None) -> "TuneSpec":
    """Return the search space of conf/tune/NAME.yaml, or of the user's own folder."""
    from tlcli.tune import TuneSpec

    folders = [path / "tune" for path in (conf_dir(), *([folder] if folder else []))]
    files = {file.stem: file for path in reversed(folders) for file in sorted(path.glob("*.yaml"))}
    if name not in files:
        hint = did_you_mean(name, files) or f" Choose from {', '.join(sorted(files))}."
        raise UsageError(f"tune={name}: there is no such search space.{hint}")
    try:
        spec = msgspec.convert(OmegaConf.to_container(OmegaConf.load(files[name])), TuneSpec)
    except (OSError, ValueError, YAMLError) as exc:
        raise UsageError(f"{files[name]}: {one_line(exc)}") from exc
    known = [*all_keys(), *ConfFiles(*([folder] if folder else [])).groups]
    for key in {**spec.space, **{key: None for recipe in spec.first for key in recipe}}:
        if key not in known:
            raise UsageError(f"{files[name]}: there is no key {key}.{did_you_mean(key, known)}")
    return spec


def _seconds_of(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None or float(found[1]) == 0:
        raise UsageError(f"budget={text}: must be a duration: 90s, 10m or 2h")
    return float(found[1]) * UNITS[found[2]]


def _new_search(words: list[str], config_dir: str | None, start: float) -> tuple[Search, list[Path]]:
    """Check the words and the budget, choose the backbone; return the search, and the folders that were made for it."""
    own = {key: [w.partition("=")[2] for w in words if w.startswith(f"{key}=")] for key in ("budget", "tune")}
    others = [word for word in words if not word.startswith(("budget=", "tune="))]
    if not own["budget"]:
        raise UsageError("budget is missing: give budget=90s, budget=10m or budget=2h")
    budget = _seconds_of(own["budget"][-1])
    flags = [f"--config-dir={Path(config_dir).absolute()}"] if config_dir else []
    with fast_imports():
        from tlcli.engine.activations import image_size
        from tlcli.engine.image_choice import candidate_sizes
        from tlcli.engine.ranking import choose, expected_seconds, new_workload, score
        from tlcli.engine.session import session_for
        from tlcli.tune import require_optuna
    require_optuna()
    tune_spec = read_tune_spec(["default", *own["tune"]][-1], Path(config_dir) if config_dir else None)
    trial_words = [*flags, *tune_spec.overrides, *others]
    parsed = parse_flags(trial_words)
    config, _ = compose_config(parsed)
    spec = one_process(build_spec(config, parsed.files))
    check(spec)
    if spec.fold is not None:
        raise UsageError(f"fold={spec.fold}: a search compares recipes by all folds; leave it out")
    given = {word.lstrip("+").partition("=")[0] for word in trial_words}
    reporter, session = TerminalReporter(), session_for(spec.cache)
    workload = new_workload(spec, session, reporter)
    has_val = len(workload.data.val) > 0 or spec.folds is not None
    val_fraction = None if has_val or "dataset.val_fraction" in given else tune_spec.val_fraction
    if not has_val and val_fraction is None:
        raise UsageError("a search needs validation images: give dataset.val_fraction=0.2, or folds=5 with tune=quick")
    size = image_size(spec) or candidate_sizes(workload)[0]
    seconds, speed = expected_seconds(workload, size, spec.image.train_size or size)
    n_runs = 1 if spec.folds is None or spec.freeze.kind == "head" else spec.folds + 1
    need, choice = n_runs * (seconds or 0.0) + time.monotonic() - start, list[str]()
    if budget < need:
        raise UsageError(
            f"budget={own['budget'][-1]}: one run takes about {duration_text(need)} on this machine; "
            "give a longer budget"
        )
    if not {"backbone", "backbone.name", "backbone.weights"} & given and budget >= RANK_RUNS * need:
        candidates = find_candidates([], flags, [*tune_spec.overrides, *others])
        found = [
            one
            for name, (_, candidate) in candidates.items()
            for one in score(name, candidate, [], RANK_IMAGES, session, reporter, MAX_SHARE * budget)
        ]
        if len({one.backbone for one in found}) > 1:
            best = choose(found)
            speed = best.images_per_second
            choice = [*candidates[best.backbone][0], f"image.size={best.size}"]
            choice += [] if spec.cache.views else [f"image.train_size={best.train_size}"]
            reporter.note(
                f"backbone: {best.backbone} at {best.size} px, probe accuracy {best.probe.accuracy:.3f}, the fastest "
                f"of those tied with the best of {len(found)} with which a run fits into a third of the budget"
            )
    key = "hydra.sweep.dir"
    folder = Path(str(OmegaConf.select(config, key))).absolute()
    folder, made = make_folder(folder, key if any(word.startswith(f"{key}=") for word in others) else None)
    state = {
        "schema_version": 1,
        "command": shlex.join(["tlcli", "tune", *([f"--config-dir={config_dir}"] if config_dir else []), *words]),
        "cwd": str(Path.cwd()),
        "budget": budget,
        "seconds": 0.0,
        "images_per_second": speed,  # of evaluation
        "words": [*trial_words, *choice],
        "val_fraction": val_fraction,
        "space": msgspec.to_builtins(tune_spec.without(given)),
        "defaults": None,  # values of the keys of the space in a run with default settings
        "image": [],  # words that choose the image size and fit of all trials
        "trials": [],
        "current": None,  # the recipe of the trial that runs
        "members": None,  # trials whose recipes are averaged
        "importances": {},
        "best": None,
    }
    return Search(folder, state, start, reporter, session), made


def _earlier_search(folder: Path, start: float) -> Search:
    try:
        state = read_json(folder / STATE_FILE)
        for file in [folder / STATE_FILE, *folder.rglob("run.json")]:
            with suppress(OSError, ValueError):
                check_not_running(file.parent, read_json(file))
        if state["best"] is not None:
            raise UsageError(f"{folder}: its budget is spent; the result is {folder / state['best']}")
        os.chdir(state["cwd"])
        with fast_imports():
            from tlcli.tune import require_optuna
        require_optuna()
        return Search(folder, state, start, TerminalReporter())
    except (OSError, ValueError, KeyError, TypeError) as exc:
        reason = getattr(exc, "strerror", None) or f"{type(exc).__name__}: {one_line(exc)}"
        raise UsageError(f"{folder / STATE_FILE}: not the file of a search, or damaged ({reason})") from exc
