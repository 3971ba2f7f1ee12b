"""`tlcli tune`: search for a better recipe within a time budget."""

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from tlcli.cli import fast_imports
from tlcli.cli.compose import build_spec, compose_config, one_process, parse_flags
from tlcli.cli.conf_files import ConfFiles, conf_dir
from tlcli.cli.job import check
from tlcli.cli.parser import Parser, whole_number
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

SCHEMA_VERSION = 2
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
            "tlcli tune dataset=imagefolder dataset.root=photos budget=10m --workers 4",
            "tlcli tune --resume outputs/DATE/TIME",
            "tlcli tune --join outputs/DATE/TIME",
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
    tune_parser.add_argument(
        "--workers", type=whole_number, default=1, metavar="N", help="run N trials at a time here, each in a process"
    )
    earlier = tune_parser.add_mutually_exclusive_group()
    earlier.add_argument("--resume", metavar="SWEEP", help="continue a search with the rest of its budget")
    earlier.add_argument("--join", metavar="SWEEP", help="work on a search that runs, also from another machine")
    return tune_parser


def run(argv: list[str]) -> int:
    """Start a search, resume one or join one; return the exit code."""
    arguments, start = parser().parse_intermixed_args(argv), time.monotonic()
    with handle_signals():
        if arguments.workers > 1:
            with fast_imports():
                from tlcli import device
            device.PROCESS_THREADS = max(1, device.PROCESS_THREADS // arguments.workers)
        if arguments.resume is None and arguments.join is None:
            search, made = _new_search(arguments.words, arguments.config_dir, start)
        else:
            search, made = _earlier_search(arguments, start), []
        try:
            if not (search.folder / STATE_FILE).exists():
                search.save()
            with _joiners(search.folder, arguments.workers - 1):
                search.run()
        except BaseException as exc:
            if not any(search.folder.rglob("run.json")):
                discard_folders(search.folder, made)
            if search.folder.exists():
                has_others = search.leave("interrupted" if isinstance(exc, KeyboardInterrupt) else "failed")
                leaderboard.write(search.folder)
                if isinstance(exc, KeyboardInterrupt):
                    flag, hint = "--resume", "resume with"
                    if has_others:
                        flag, hint = "--join", "other workers continue; join them with"
                    exc.args = (f"{hint}: {shlex.join(['tlcli', 'tune', flag, shown_path(search.folder)])}",)
            raise
    return 0


@contextmanager
def _joiners(folder: Path, n: int) -> Iterator[None]:
    """Run n more workers of a search beside the block. If it fails they stop, else they end with the search."""
    import torch

    from tlcli import device

    gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))).split(",")
    command = [sys.executable, "-P", "-m", "tlcli", "tune", "--join", str(folder)]
    with ExitStack() as stack:
        pool = stack.enter_context(ThreadPoolExecutor(n + 1))
        processes = []
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
                processes.append((process, errors, pool.submit(process.wait)))  # else a killed one remains as a zombie
            yield
        except BaseException:
            for process, _, _ in processes:
                process.terminate()
            raise
        for process, errors, end in processes:
            if end.result() not in (0, 130, 143):
                errors.seek(0)
                reason = errors.read().decode(errors="replace").strip().rpartition("\n")[2]
                code = f"ended with exit code {process.returncode}"
                print(f"tlcli tune: worker {process.pid} {code}: {reason or 'it was killed'}", file=sys.stderr)


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
            choice.append(f"image.train_size={best.train_size}")
            reporter.note(
                f"backbone: {best.backbone} at {best.size} px, probe accuracy {best.probe.accuracy:.3f}, the fastest "
                f"of those tied with the best of {len(found)} with which a run fits into a third of the budget"
            )
    key = "hydra.sweep.dir"
    folder = Path(str(OmegaConf.select(config, key))).absolute()
    folder, made = make_folder(folder, key if any(word.startswith(f"{key}=") for word in others) else None)
    state = {
        "schema_version": SCHEMA_VERSION,
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
        "trials": [],  # that have ended; study.journal has all
        "fits": 1,  # trainings on all images of each recipe that is averaged
        "members": None,  # trials whose recipes are averaged
        "importances": {},
        "best": None,
    }
    return Search(folder, state, start, reporter, session), made


def _earlier_search(arguments: argparse.Namespace, start: float) -> Search:
    """Return the search of --resume or --join. Raise UsageError if it cannot be, or was started in another way."""
    folder = Path(arguments.resume or arguments.join).expanduser().absolute()
    try:
        state = read_json(folder / STATE_FILE)
        config_dir = [f"--config-dir={arguments.config_dir}"] if arguments.config_dir else []
        for word in [*config_dir, *arguments.words]:
            if word not in shlex.split(state["command"]):
                raise UsageError(f"{word}: a search continues as it was started; leave it out")
        if state["schema_version"] != SCHEMA_VERSION:
            raise UsageError(f"{folder}: was started by another version of tlcli; finish it with that one")
        if arguments.resume:
            for file in [folder / STATE_FILE, *folder.rglob("run.json")]:
                with suppress(OSError, ValueError):
                    check_not_running(file.parent, read_json(file))
        if arguments.resume and state["best"] is not None:
            raise UsageError(f"{folder}: its budget is spent; the result is {folder / state['best']}")
        os.chdir(state["cwd"])
        with fast_imports():
            from tlcli.tune import require_optuna
        require_optuna()
        return Search(folder, state, start, TerminalReporter())
    except (OSError, ValueError, KeyError, TypeError) as exc:
        reason = getattr(exc, "strerror", None) or f"{type(exc).__name__}: {one_line(exc)}"
        raise UsageError(f"{folder / STATE_FILE}: not the file of a search, or damaged ({reason})") from exc
