"""Search for a better recipe within a time budget: choose a backbone and how images
become squares, try recipes on validation images, train the best ones again on all
training images, average their weights, and test the result once. The folder is that
of a sweep; `best` in it is the run to use.

examples:
  tlcli tune dataset=imagefolder dataset.root=photos budget=10m --workers 4
  tlcli tune dataset=imagefolder dataset.root=photos budget=90s tune=quick
  tlcli tune --resume outputs/DATE/TIME
  tlcli tune --join outputs/DATE/TIME
"""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import msgspec
from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from tlcli import __version__
from tlcli.cli import fast_imports
from tlcli.cli.compose import build_spec, compose_config, parse_flags, require_one_process
from tlcli.cli.conf_files import ConfFiles, files_for
from tlcli.cli.job import check_spec
from tlcli.cli.parser import Parser, values_of, whole_number
from tlcli.cli.rank import find_candidates
from tlcli.cli.resume import still_running
from tlcli.cli.train import discard_folders, make_folder
from tlcli.cli.trust import check_folder, check_words, return_to
from tlcli.cli.view import TerminalReporter
from tlcli.errors import CANDIDATE_ERRORS, UsageError
from tlcli.files import check_links, expand_user
from tlcli.interrupts import handle_signals
from tlcli.locks import runs_on_this_machine
from tlcli.reporter import Reporter
from tlcli.runs.run_dir import JOURNAL_FILE, STATE_FILE, check_version, read_json
from tlcli.specs import all_keys
from tlcli.text import did_you_mean, duration_text, one_line, shown_path

if TYPE_CHECKING:
    from tlcli.cli.search import Search
    from tlcli.engine.ranking import Score
    from tlcli.engine.session import Session
    from tlcli.tune import TuneSpec

UNITS = {"s": 1, "m": 60, "h": 3600}
RANK_IMAGES = (50, 500)  # sampled images per class, and in all
RANK_SHARE = 0.25  # of the time that is left, after which no other backbone is ranked
RANK_RUNS = 1.5  # in the budget, at least, for other backbones to be tried
NOT_AVERAGED = {  # recipes that differ in these have other networks, or train on images that test another one
    *("backbone", "backbone.name", "backbone.weights", "image.size", "image.fit"),
    *("seed", "dataset.test_fraction", "dataset.val_fraction", "dataset.train_per_class"),
}


PARSER = Parser("tune", __doc__)
words = (
    "budget=90s|10m|2h: the time; tune=NAME: what is searched (default, quick, or tune/NAME.yaml in --config-dir); the "
    "other words are those of `tlcli train`, and keys that they set are not searched"
)
PARSER.add_argument("words", nargs="*", metavar="KEY=VALUE", help=words)
PARSER.add_config_dir()
PARSER.add_argument("--workers", type=whole_number, default=1, metavar="N", help="run N trials at a time, in processes")
earlier = PARSER.add_mutually_exclusive_group()
earlier.add_argument("--resume", metavar="SWEEP", help="continue a search with the rest of its budget")
earlier.add_argument("--join", metavar="SWEEP", help="work on a search that runs, also from another machine")


def run(argv: list[str]) -> int:
    """Start a search, resume one or join one; return the exit code."""
    arguments, start = PARSER.parse_intermixed_args(argv), time.monotonic()
    if find_spec("optuna") is None:
        raise UsageError("Optuna is not installed: pip install 'tlcli[tune]'")
    with handle_signals():
        if arguments.workers > 1:
            with fast_imports():
                from tlcli import device
            device.PROCESS_THREADS = max(1, device.PROCESS_THREADS // arguments.workers)
        is_new = not (arguments.resume or arguments.join)
        search, made = (_new_search if is_new else _earlier_search)(arguments, start)
        try:
            if not (search.folder / STATE_FILE).exists():
                search.save()
            with _joiners(search.folder, arguments.words, arguments.workers - 1):
                search.run()
        except BaseException as exc:
            if is_new and not any(search.folder.rglob("run.json")):
                search.sign_off()
                for name in (STATE_FILE, JOURNAL_FILE):  # these would be in the way of the next try
                    (search.folder / name).unlink(missing_ok=True)
                discard_folders(search.folder, made)
            if (search.folder / STATE_FILE).exists():
                has_others = search.leave("interrupted" if isinstance(exc, KeyboardInterrupt) else "failed")
                if isinstance(exc, KeyboardInterrupt):
                    flag, hint = "--resume", "resume with"
                    if has_others:
                        flag, hint = "--join", "other workers continue; join them with"
                    exc.args = (f"{hint}: {shlex.join(['tlcli', 'tune', flag, shown_path(search.folder)])}",)
            raise
    return 0


@contextmanager
def _joiners(folder: Path, words: Sequence[str], n: int) -> Iterator[None]:
    """Run n more workers of a search, with these words of it, beside the block. If it fails they stop, too."""
    import torch

    from tlcli import device

    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    command = [sys.executable, "-P", "-m", "tlcli", "tune", "--join", str(folder), *words]
    processes = []
    with ExitStack() as stack:
        try:
            for i in range(1, n + 1):
                errors = stack.enter_context(tempfile.TemporaryFile())
                own = {"OMP_NUM_THREADS": str(device.PROCESS_THREADS), "CUDA_VISIBLE_DEVICES": gpus[i % len(gpus)]}
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,  # the first worker shows the trials of all
                    stderr=errors,
                    process_group=0,  # a terminal's Ctrl-C reaches the first worker alone
                    env={**os.environ, **own},
                )
                processes.append((process, errors))
                Thread(target=process.wait, daemon=True).start()  # else a killed one remains as a zombie
            yield
        except BaseException:
            for process, _ in processes:
                process.terminate()
            for process, _ in processes:
                process.wait()
            raise
        for process, errors in processes:
            if (code := process.wait()) not in (0, 130, 143):
                errors.seek(0)
                reason = errors.read().decode(errors="replace").strip().rpartition("\n")[2] or "it was killed"
                print(f"tlcli tune: worker {process.pid} ended with exit code {code}: {reason}", file=sys.stderr)


def read_tune_spec(name: str, conf: ConfFiles) -> "TuneSpec":
    """Return the search space of conf/tune/NAME.yaml, or of the user's own folder, if there is one."""
    from tlcli.tune import SIZE_KEY, TuneSpec

    files = {file.stem: file for path in conf.folders for file in sorted(path.glob("tune/*.yaml"))}
    if name not in files:
        hint = did_you_mean(name, files) or f" Choose from {', '.join(sorted(files))}."
        raise UsageError(f"tune={name}: there is no such search space.{hint}")
    for folder in conf.folders[1:]:
        check_folder(folder, conf.folders)
    try:
        spec = msgspec.convert(OmegaConf.to_container(OmegaConf.load(files[name])), TuneSpec)
    except (OSError, ValueError, YAMLError) as exc:
        raise UsageError(f"{files[name]}: {one_line(exc)}") from exc
    lists = ((key, values) for key, values in spec.space.items() if isinstance(values, tuple))
    recipes = [*spec.first, *({key: value} for key, values in lists for value in values)]
    own = (f"{key}={value}" for recipe in recipes for key, value in recipe.items())
    check_words([*spec.overrides, *own], files[name], conf.folders)
    known = [*all_keys(), *conf.groups]
    for key in spec.space:
        if key not in known:
            raise UsageError(f"{files[name]}: there is no key {key}.{did_you_mean(key, known)}")
        if key in ("folds", "fold"):
            raise UsageError(f"{files[name]}: recipes that differ in {key} cannot be compared; leave it out")
        if spec.average > 1 and key in NOT_AVERAGED:
            raise UsageError(f"{files[name]}: recipes that differ in {key} cannot be averaged; set average: 1")
    searched = {*spec.space, *([SIZE_KEY] if spec.sizes else [])}
    for key in [key for recipe in spec.first for key in recipe if key not in searched]:
        raise UsageError(f"{files[name]}: first has {key}, which space does not have")
    return spec


def _new_search(arguments: argparse.Namespace, start: float) -> tuple["Search", list[Path]]:
    """Check the words and the budget, choose the backbone; return the search, and the folders that were made for it."""
    values, words = values_of(arguments.words, ("budget", "tune"))
    if not values["budget"]:
        raise UsageError("budget is missing: give budget=90s, budget=10m or budget=2h")
    text = values["budget"][-1]
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None or (budget := float(found[1]) * UNITS[found[2]]) == 0:
        raise UsageError(f"budget={text}: must be a duration: 90s, 10m or 2h")
    with fast_imports():
        from tlcli.cli.search import Search
        from tlcli.engine.ranking import expected_seconds, image_sizes, new_workload
        from tlcli.engine.session import session_for
    tune_spec = read_tune_spec(["default", *values["tune"]][-1], files_for(arguments.config_dir))
    words = [*arguments.config_dir, *tune_spec.overrides, *words]
    flags = parse_flags(words)
    config, _ = compose_config(flags)
    spec = require_one_process(build_spec(config, flags.files))
    check_spec(spec)
    if spec.fold is not None:
        raise UsageError(f"fold={spec.fold}: a search compares recipes by all folds; leave it out")
    if "hydra.run.dir" in flags.keys:
        raise UsageError("hydra.run.dir has no effect on a search: give hydra.sweep.dir")
    reporter, session = TerminalReporter(), session_for(spec.cache)
    workload = new_workload(spec, session, reporter)
    has_val = len(workload.data.val) > 0 or spec.folds is not None
    val_fraction = None if has_val or "dataset.val_fraction" in flags.keys else tune_spec.val_fraction
    if not has_val and val_fraction is None:
        raise UsageError("a search needs validation images: give dataset.val_fraction=0.2, or folds=5 with tune=quick")
    train_size, size = image_sizes(workload)
    seconds, speed, _ = expected_seconds(workload, size, train_size)
    refit = 1 - val_fraction if val_fraction is not None and workload.first_fit is None else 0
    need, choice = (1 + refit) * seconds + time.monotonic() - start, list[str]()
    if budget < need:
        what = "a trial and its refit take" if refit else "one run takes"
        one_run = f"{what} about {duration_text(need)} on this machine"
        raise UsageError(f"budget={text}: {one_run}; give a longer budget")
    given = {*flags.keys, *tune_spec.space}
    if not {"experiment", "backbone", "backbone.name", "backbone.weights"} & given and budget >= RANK_RUNS * need:
        default = config.hydra.runtime.choices["backbone"]
        # a trial with it has to fit; a larger backbone gains more than a refit
        chosen = _choose_backbone(words, default, start + budget, session, reporter)
        choice, speed = chosen or (choice, speed)
    key = "hydra.sweep.dir"
    folder = expand_user(str(OmegaConf.select(config, key))).absolute()
    folder, made = make_folder(folder, key if key in flags.keys else None, has_jobs=True)
    state = {
        "tlcli": __version__,
        "command": shlex.join(["tlcli", "tune", *arguments.config_dir, *arguments.words]),
        "cwd": str(Path.cwd()),
        "budget": budget,
        "seconds": 0.0,
        "images_per_second": speed,  # of evaluation
        "words": [*words, *choice],
        "val_fraction": val_fraction,
        "space": msgspec.to_builtins(tune_spec.without(flags.keys)),
        "defaults": None,  # values of the keys of the space in a run with default settings
        "image": [],  # words of all trials: the image size and fit, and fits=1 if several have no mean
        "trials": [],  # that have ended; study.journal has all
        "fits": 1,  # trainings on all images of each recipe that is averaged
        "members": None,  # trials whose recipes are averaged
        "importances": {},
        "best": None,
    }
    return Search(folder, state, start, reporter, session, parse_flags(state["words"]).overrides), made


def _choose_backbone(
    words: Sequence[str], default: str, end: float, session: "Session", reporter: Reporter
) -> tuple[list[str], float | None] | None:
    """Return words that choose the backbone, and its images per second of evaluation; None if there is no choice.

    A run with it must fit into the time until `end`. The default backbone is ranked first, then the others by
    their accuracy on ImageNet, until RANK_SHARE of this time is over.
    """
    from tlcli.engine.ranking import best_of, score

    candidates = find_candidates([], words)
    top1 = {name: spec.backbone.imagenet_top1 or 0.0 for name, (_, spec) in candidates.items()}
    scores: list[Score] = []
    last_start = time.monotonic() + RANK_SHARE * (end - time.monotonic())
    for name in sorted(candidates, key=lambda name: (name != default, -top1[name])):
        if time.monotonic() > last_start:
            break
        with suppress(*CANDIDATE_ERRORS):  # a word may not suit another backbone: freeze.stages, image.train_size
            left = end - time.monotonic()
            found = score(name, candidates[name][1], [], RANK_IMAGES, session, reporter, left)
            scores += islice(found, 1)
    left = end - time.monotonic()
    scores = [one for one in scores if one.seconds <= left]
    if {one.backbone for one in scores} <= {default}:
        return None
    best = max(best_of(scores), key=lambda s: (top1[s.backbone], s.probe.accuracy))
    tied = f"the best on ImageNet of those that tie, of {len(scores)} whose run fits into the budget"
    reporter.note(f"backbone: {best.backbone}, probe accuracy {best.probe.accuracy:.3f} at {best.size} px, {tied}")
    return candidates[best.backbone][0], best.images_per_second


def _earlier_search(arguments: argparse.Namespace, start: float) -> tuple["Search", list[Path]]:
    """Return the search of --resume or --join, for which no folder is made.

    Raise UsageError if it cannot be continued, or was started in another way.
    """
    folder = expand_user(arguments.resume or arguments.join).absolute()
    try:
        state = read_json(folder / STATE_FILE)
        for word in [*arguments.config_dir, *arguments.words]:
            if word not in shlex.split(state["command"]):
                raise UsageError(f"{word}: a search continues as it was started; leave it out")
        check_version(folder, {"tlcli": "0.20 or earlier", **state})
        check_links(folder)  # what it has is written to
        if arguments.resume:
            for file in [folder / STATE_FILE, *folder.rglob("run.json")]:
                with suppress(OSError, ValueError):
                    if (info := read_json(file)).get("status") == "running" and runs_on_this_machine(info):
                        raise still_running(file.parent, info)
        return_to(str(state["cwd"]), folder)
        with fast_imports():
            from tlcli.cli.search import Search
        search = Search(folder, state, start, TerminalReporter(), None, parse_flags(arguments.words).overrides)
        if state["best"] is None:
            check_spec(search.base)
        return search, []
    except (OSError, ValueError, KeyError, TypeError) as exc:
        reason = getattr(exc, "strerror", None) or f"{type(exc).__name__}: {one_line(exc)}"
        raise UsageError(f"{folder / STATE_FILE}: not the file of a search, or damaged ({reason})") from exc
