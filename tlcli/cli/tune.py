"""`tlcli tune`: search for a better recipe within a time budget."""

import math
import os
import re
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import msgspec
from omegaconf import OmegaConf
from yaml import YAMLError  # type: ignore[import-untyped]

from tlcli import __version__
from tlcli.cli import exit_status, fast_imports
from tlcli.cli.compose import build_spec, compose_config, composing, load_spec, parse_flags
from tlcli.cli.conf_files import conf_dir
from tlcli.cli.job import Command, check
from tlcli.cli.parser import Parser
from tlcli.cli.rank import find_candidates
from tlcli.cli.resume import check_not_running
from tlcli.cli.train import make_folder
from tlcli.cli.view import TerminalReporter
from tlcli.errors import StoppedError, UsageError
from tlcli.interrupts import handle_signals
from tlcli.reporter import EpochRow
from tlcli.runs import leaderboard
from tlcli.runs.run_dir import REFIT, RunDir, read_json, write_json
from tlcli.specs import TrainSpec
from tlcli.text import did_you_mean, duration_text, one_line, shown_path

if TYPE_CHECKING:
    from tlcli.engine.activations import Workload
    from tlcli.engine.session import Session
    from tlcli.tune import Study, TuneSpec

UNITS = {"s": 1, "m": 60, "h": 3600}
STATE_FILE, STUDY_FILE = "tune.json", "study.jsonl"
SAVE_SECONDS = 5.0  # between updates of the time spent, so that a search that is killed knows it
MARGIN = 1.1  # for what is estimated
RANK_IMAGES = (50, 500)  # sampled images per class, and in all
RANK_RUNS = 4  # in the budget, at least, for other backbones to be tried: they take longer
MAX_SHARE = 1 / 3  # of the budget that a run with another backbone may take
FINAL_SECONDS = 5.0  # of the end, besides evaluation


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
    tune_parser.add_argument("-cd", "--config-dir", metavar="DIR", help="folder with your own options")
    tune_parser.add_argument("--resume", metavar="SWEEP", help="continue a search with the rest of its budget")
    return tune_parser


def run(argv: list[str]) -> int:
    """Start a search or resume one; return the exit code."""
    arguments, start = parser().parse_intermixed_args(argv), time.monotonic()
    with handle_signals():
        if arguments.resume is None:
            search = _new_search(arguments.words, arguments.config_dir, start)
        elif arguments.words:
            raise UsageError(f"{arguments.words[0]}: a search is resumed as it was started; leave it out")
        else:
            search = _earlier_search(Path(arguments.resume).expanduser().absolute(), start)
        try:
            search.run()
        except KeyboardInterrupt as exc:
            exc.args = (f"resume with: {shlex.join(['tlcli', 'tune', '--resume', shown_path(search.folder)])}",)
            raise
        finally:
            search.save()
            leaderboard.write(search.folder)
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
        return msgspec.convert(OmegaConf.to_container(OmegaConf.load(files[name])), TuneSpec)
    except (OSError, ValueError, YAMLError) as exc:
        raise UsageError(f"{files[name]}: {one_line(exc)}") from exc


def words_of(recipe: Mapping[str, Any]) -> list[str]:
    """Return the overrides of a recipe."""
    return [f"{key}={'null' if value is None else value}" for key, value in recipe.items()]


def _seconds_of(text: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if found is None or float(found[1]) == 0:
        raise UsageError(f"budget={text}: must be a duration: 90s, 10m or 2h")
    return float(found[1]) * UNITS[found[2]]


def _new_search(words: list[str], config_dir: str | None, start: float) -> "Search":
    """Check the words and the budget, choose the backbone, and return the search in a new folder."""
    own = {key: [w.partition("=")[2] for w in words if w.startswith(f"{key}=")] for key in ("budget", "tune")}
    others = [word for word in words if not word.startswith(("budget=", "tune="))]
    if not own["budget"]:
        raise UsageError("budget is missing: give budget=90s, budget=10m or budget=2h")
    budget = _seconds_of(own["budget"][-1])
    name = own["tune"][-1] if own["tune"] else "default"
    flags = [f"--config-dir={Path(config_dir).absolute()}"] if config_dir else []
    with fast_imports():
        from tlcli.engine.activations import image_size
        from tlcli.engine.image_choice import candidate_sizes
        from tlcli.engine.ranking import choose, expected_seconds, new_workload, score
        from tlcli.engine.session import session_for
    tune_spec = read_tune_spec(name, Path(config_dir) if config_dir else None)
    trial_words = [*flags, *tune_spec.overrides, *others]
    parsed = parse_flags(trial_words)
    config, _ = compose_config(parsed)
    spec = build_spec(config, parsed.files)
    check(spec)
    given = {word.lstrip("+").partition("=")[0] for word in trial_words}
    reporter, session = TerminalReporter(), session_for(spec.cache)
    workload = new_workload(spec, session, reporter)
    has_val, choice = len(workload.data.val) > 0 or spec.folds is not None, []
    size = image_size(spec) or candidate_sizes(workload)[0]
    need, speed = expected_seconds(workload, size, spec.image.train_size or size)
    need = (need or 0.0) * (1 if spec.folds is None else spec.folds + 1) + time.monotonic() - start
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
            choice = [*candidates[best.backbone][0], f"image.size={best.size}", f"image.train_size={best.train_size}"]
            reporter.note(
                f"backbone: {best.backbone} at {best.size} px, probe accuracy {best.probe.accuracy:.3f}, the fastest "
                f"of those tied with the best of {len(found)} with which a run fits into a third of the budget"
            )
    is_split = tune_spec.val_fraction is not None and not has_val and "dataset.val_fraction" not in given
    key = "hydra.sweep.dir"
    folder = Path(str(OmegaConf.select(config, key))).absolute()
    folder, _ = make_folder(folder, key if any(word.startswith(f"{key}=") for word in others) else None)
    state = {
        "schema_version": 1,
        "command": shlex.join(["tlcli", "tune", *([f"--config-dir={config_dir}"] if config_dir else []), *words]),
        "cwd": str(Path.cwd()),
        "budget": budget,
        "seconds": 0.0,
        "images_per_second": speed,  # of evaluation
        "words": [*trial_words, *choice],
        "val_fraction": tune_spec.val_fraction if is_split else None,
        "space": msgspec.to_builtins(tune_spec.without(sorted(given))),
        "image": [],
        "trials": [],
        "members": None,
        "importances": {},
        "best": None,
    }
    return Search(folder, state, start, reporter, session)


def _earlier_search(folder: Path, start: float) -> "Search":
    try:
        state = read_json(folder / STATE_FILE)
        for file in folder.rglob("run.json"):
            with suppress(UsageError):
                check_not_running(file.parent, RunDir(file.parent).info)
        os.chdir(state["cwd"])
        if state["best"] is not None:
            raise UsageError(f"{folder}: its budget is spent; the result is {folder / REFIT}")
        search = Search(folder, state, start, TerminalReporter())
        search.left  # noqa: B018 - damaged files show here
    except (OSError, ValueError, KeyError, TypeError) as exc:
        reason = getattr(exc, "strerror", None) or f"{type(exc).__name__}: {exc}"
        raise UsageError(f"{folder / STATE_FILE}: not the file of a search, or damaged ({reason})") from exc
    return search


class TrialReporter(TerminalReporter):
    """Writes a trial to its log and shows its bars alone. Raises StoppedError when its time is up or it is hopeless."""

    def __init__(
        self, search: "Search", label: str, deadline: float, is_hopeless: Callable[[int, float], bool] | None
    ) -> None:
        super().__init__()
        self._screen.quiet = True
        self._search, self._label, self._deadline, self._is_hopeless = search, label, deadline, is_hopeless

    @contextmanager
    def track(self, label: str, total: int | None, unit: str = "images") -> Iterator[Callable[[int], None]]:
        with self._search.reporter.track(f"{self._label}: {label}", total, unit) as advance:

            def advance_in_time(n: int) -> None:
                advance(n)
                self._search.tick()
                if self._search.left < self._deadline:
                    raise StoppedError("the time of the trials was up")

            yield advance_in_time

    def epoch(self, row: EpochRow) -> None:
        super().epoch(row)
        value = getattr(row, f"val_{self._search.metric}")
        if self._is_hopeless and value is not None and 0 < row.epoch < row.epochs:
            percent = round(100 * row.epoch / row.epochs)
            if self._is_hopeless(percent, value):
                raise StoppedError(f"{value:.4f} after {percent} % of the epochs is worse than the median")


class Search:
    """A search in a folder: its trials, the refits of the best recipes, and their mean. tune.json has its state."""

    def __init__(
        self,
        folder: Path,
        state: dict[str, Any],
        start: float,
        reporter: TerminalReporter,
        session: "Session | None" = None,
    ) -> None:
        from tlcli.engine.session import session_for
        from tlcli.tune import TuneSpec

        self.folder, self.reporter, self._state, self._start = folder, reporter, state, start
        self._spent, self._saved = float(state["seconds"]), 0.0
        self._spec = msgspec.convert(state["space"], TuneSpec)
        self._config, self._base = self._compose([])
        self.metric = self._base.keep_best.value
        self._session = session or session_for(self._base.cache)

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return float(self._state["budget"]) - self._spent - (time.monotonic() - self._start)

    def save(self) -> None:
        """Write tune.json."""
        self._state["seconds"] = round(self._spent + time.monotonic() - self._start, 3)
        write_json(self.folder / STATE_FILE, self._state)
        self._saved = time.monotonic()

    def tick(self) -> None:
        """Write tune.json if the last time was some seconds ago."""
        if time.monotonic() > self._saved + SAVE_SECONDS:
            self.save()

    def run(self) -> None:
        """Try recipes while there is time, train the best ones again, average them, and test the result."""
        self.save()
        data, network, budget = self._base.dataset.name, self._base.backbone.name, self._state["budget"]
        self.reporter.show(f"tlcli {__version__}: {data} -> {network}, a search of {duration_text(budget)}")
        if self._state["members"] is None:
            self._search_recipes()
        final = self._finish()
        self._state["best"] = final.path.relative_to(self.folder).as_posix()
        self.save()
        with suppress(OSError):  # a file system without links
            (self.folder / REFIT).symlink_to(self._state["best"], target_is_directory=True)
        self._show(final, leaderboard.write(self.folder))

    def _compose(self, words: list[str]) -> tuple[Any, TrainSpec]:
        flags = parse_flags([*self._state["words"], *words])
        config, _ = compose_config(flags)
        return config, build_spec(config, flags.files)

    def _search_recipes(self) -> None:
        """Run trials while there is time, and choose the recipes whose weights are averaged."""
        from tlcli.engine.image_choice import choose_image
        from tlcli.engine.ranking import new_workload
        from tlcli.tune import choose_members

        workload = new_workload(self._base, self._session, self.reporter)
        if not self._state["image"]:  # one for all trials: the mean of weights needs it
            image, reason = choose_image(workload, self.reporter)
            if reason is not None:
                self.reporter.note(f"image: {image.size} px, {image.fit}: {reason}")
            self._state["image"] = [f"image.size={image.size}", f"image.fit={image.fit}"]
            if image.train_size is not None:
                self._state["image"].append(f"image.train_size={image.train_size}")
            self._config, self._base = self._compose(self._state["image"])
        study, n_members = self._study(workload), self._spec.average
        while True:
            while self._next_trial(study, n_members):
                leaderboard.write(self.folder)
            ranked = self._ranked()
            if self._base.folds is not None:
                members = ranked[:1]
                break
            members, _ = choose_members(ranked, n_members, load_spec(ranked[0]), self._session, self.reporter)
            if len(members) >= n_members or not self._has_time(len(members)):
                break
            n_members = len(members)  # there is time for another trial
        self._state["importances"] = study.importances()
        self._state["members"] = [run.path.relative_to(self.folder).as_posix() for run in members]
        self.save()

    def _study(self, workload: "Workload") -> "Study":
        from tlcli.engine.image_choice import STEP, takes_size
        from tlcli.tune import SIZE_KEY, Study

        choices, defaults, space = self._config.hydra.runtime.choices, {}, {}
        for key, values in self._spec.space.items():
            default = choices[key] if key in choices else OmegaConf.select(self._config, key, default=...)
            if default is ... or (key in ("min_steps", "min_epochs") and self._base.epochs is not None):
                continue  # the chosen options do not have this key
            defaults[key], space[key] = default, values
        if self._spec.sizes:
            size = self._base.image.train_size or workload.train_size
            sizes = dict.fromkeys([size, *(max(STEP, round(size * x / STEP) * STEP) for x in self._spec.sizes)])
            defaults[SIZE_KEY], space[SIZE_KEY] = size, tuple(s for s in sizes if takes_size(workload, s))
        spec = msgspec.structs.replace(self._spec, space=space)
        return Study(self.folder / STUDY_FILE, spec, defaults, self._base.seed, minimize=self.metric == "loss")

    def _cost(self) -> float:
        """Return the mean seconds of a trial, as far as is known: those of the first one include what is done once."""
        seconds = [trial["seconds"] for trial in self._state["trials"] if trial["value"] is not None]
        return float(mean(seconds[1:] or seconds or [0.0]))

    def _refit_seconds(self, run: RunDir) -> float:
        """Return the expected seconds of training the recipe of a trial again on all images."""
        from tlcli.engine.schedule import number_of_epochs

        info, trial = run.info, self._state["trials"][int(run.path.name)]
        n_all = info["n_train"] + info["n_val"]
        n_seen = number_of_epochs(load_spec(run), n_all) * n_all
        seconds = trial["seconds"] if trial["name"] != "0" else min(trial["seconds"], self._cost())
        return float(MARGIN * seconds * n_seen / (info["epochs"] * info["n_train"]))

    def _reserve(self, n_members: int) -> float:
        """Return the seconds that the end takes with this number of recipes: refits, comparisons and the test."""
        ranked = self._ranked()
        if not ranked:
            return 0.0
        info, refits = ranked[0].info, []
        if self._state["val_fraction"] is not None:
            refits = [self._refit_seconds(run) for run in ranked[:n_members]]
            refits += [mean(refits)] * (n_members - len(refits))
        n_evaluated = info["n_test"] + 2 * n_members * info["n_val"]
        speed = float(self._state["images_per_second"] or math.inf)
        return float(sum(refits) + n_evaluated / speed + FINAL_SECONDS)

    def _has_time(self, n_members: int) -> bool:
        """Return True if there is time for another trial, and the number of trials is not limited to those done."""
        limit, n = self._spec.trials, len(self._state["trials"])
        return (limit is None or n < limit) and self.left > self._cost() + self._reserve(n_members)

    def _next_trial(self, study: "Study", n_members: int) -> bool:
        """Run a trial if there is time for it; return True if there was."""
        trials = self._state["trials"]
        n_done = sum(trial["value"] is not None for trial in trials)
        if n_done and not self._has_time(min(n_members, n_done + 1)):
            return False
        trial = study.next_trial()
        recipe = study.recipe(trial)
        words = [*self._state["image"], *words_of(recipe)]
        if self._state["val_fraction"] is not None:
            words.append(f"dataset.val_fraction={self._state['val_fraction']}")

        def is_hopeless(percent: int, value: float) -> bool:
            trial.report(value, percent)
            return trial.should_prune()

        has_folds, start = self._base.folds is not None, self.left
        deadline = self._reserve(1) if n_done else -math.inf
        reporter = TrialReporter(self, f"trial {trial.number}", deadline, None if has_folds else is_hopeless)
        value, status, error = None, "done", ""
        try:
            result = self._train(str(trial.number), words, reporter)
            value = float(result.info["best"][self.metric])
        except Exception as exc:
            status, error = "stopped" if isinstance(exc, StoppedError) else "failed", exit_status(exc)[1]
            if not n_done:
                raise
        study.tell(trial, value, stopped=status == "stopped")
        trials.append(
            {
                "name": str(trial.number),
                "status": status,
                "value": value,
                "recipe": recipe,
                "seconds": start - self.left,
            }
        )
        self.save()
        values = [t["value"] for t in trials if t["value"] is not None]
        best = (min if self.metric == "loss" else max)(values)
        text = f"validation {self.metric} {value:.4f}, best {best:.4f}" if value is not None else f"{status}: {error}"
        defaults = trials[0]["recipe"]
        changes = " ".join(f"{k}={v}" for k, v in recipe.items() if v != defaults.get(k))
        left = duration_text(max(0.0, self.left))
        self.reporter.show(f"trial {trial.number}  {changes or 'default settings'}: {text}; {left} left")
        return True

    def _train(self, name: str, words: list[str], reporter: TrialReporter) -> RunDir:
        """Train a job, or the rest of it, and return its run."""
        typed = [*self._state["words"], *words]
        flags = parse_flags(typed)
        config, loader = compose_config(flags)
        spec, path = build_spec(config, flags.files), self.folder / name
        line = shlex.join(["tlcli", "train", *typed])
        command = Command(line, flags.files, None, spec=spec, resume=True, reporter=reporter, session=self._session)
        path.mkdir(exist_ok=True)
        with composing(flags.files):
            command.launch(config, loader, path)
        return RunDir(path / REFIT if spec.folds else path)

    def _ranked(self) -> list[RunDir]:
        """Return the finished trials, the best first."""
        done = [trial for trial in self._state["trials"] if trial["value"] is not None]
        done.sort(key=lambda trial: trial["value"], reverse=self.metric != "loss")
        return [RunDir(self.folder / trial["name"] / (REFIT if self._base.folds else "")) for trial in done]

    def _finish(self) -> RunDir:
        """Return the run to use: the winner, or the mean of the best recipes, trained on all images; tested once."""
        from tlcli.evaluate import add_test
        from tlcli.tune import average_runs, choose_members

        members = [RunDir(self.folder / name) for name in self._state["members"]]
        if self._base.folds is not None:
            final = members[0]
        else:
            trial_spec, n = load_spec(members[0]), len(members)
            members, validation = choose_members(members, n, trial_spec, self._session, self.reporter)
            number, refits = len(self._state["trials"]), list[RunDir]()
            for run in members if self._state["val_fraction"] is not None else ():
                if refits and self.left < self._refit_seconds(run) + FINAL_SECONDS:
                    break
                recipe = self._state["trials"][int(run.path.name)]["recipe"]
                label = f"refit of trial {run.path.name}"
                words = [*self._state["image"], *words_of(recipe), "interpolate=1"]
                refits.append(self._train(str(number), words, TrialReporter(self, label, -math.inf, None)))
                self.reporter.show(f"{label} on all images; {duration_text(max(0.0, self.left))} left")
                number += 1
            final = RunDir(self.folder / str(number))
            average_runs(refits or members, final, validation)
        spec = load_spec(final)
        if len(self._session.dataset(spec.dataset, spec.seed, self.reporter, spec.folds).test):
            add_test(final.path, spec, self._session, self.reporter)
        return RunDir(final.path)

    def _show(self, final: RunDir, board: Mapping[str, Any]) -> None:
        trials, info = self._state["trials"], final.info
        counts = {s: sum(trial["status"] == s for trial in trials) for s in ("done", "stopped", "failed")}
        validation = f"{self.metric} {info['best'][self.metric]:.4f}, chosen as the best of {counts['done']} trials"
        test = "no test split"
        if info.get("test"):
            low, high = info["test"]["accuracy_ci95"]
            test = f"accuracy {info['test']['accuracy']:.4f}, 95 % interval {low:.4f} to {high:.4f}"
        n_members = len(info.get("averaged", ()))
        made = f"the mean of the weights of {n_members} runs" if n_members > 1 else "the best recipe, on all images"
        self.reporter.leaderboard(self.folder, board)
        self.reporter.show_labelled(
            ("trials", ", ".join(f"{n} {status}" for status, n in counts.items() if n)),
            ("folds" if self._base.folds else "validation", f"{validation}, so it is too high on average"),
            ("test", test),
            ("took", f"{duration_text(self._state['seconds'])} of {duration_text(self._state['budget'])}"),
            ("best", f"{shown_path(self.folder / REFIT)}: job {self._state['best']}, {made}"),
        )
