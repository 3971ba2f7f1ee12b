"""A search of `tlcli tune` in a folder: its trials, the refits of the best recipes, and the mean of their weights."""

import math
import os
import shlex
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from statistics import mean
from typing import Any

import msgspec
import optuna
from omegaconf import OmegaConf

from tlcli import __version__, evaluate, tune
from tlcli.cli import exit_status
from tlcli.cli.compose import Flags, build_spec, compose_config, composing, load_spec, parse_flags
from tlcli.cli.job import Command
from tlcli.cli.trust import check_words
from tlcli.cli.view import TerminalReporter
from tlcli.engine import ranking
from tlcli.engine.activations import MAX_FIRST_FIT
from tlcli.engine.ranking import STEP, takes_size
from tlcli.engine.schedule import number_of_epochs
from tlcli.engine.session import Session, session_for
from tlcli.errors import CANDIDATE_ERRORS, StoppedError, TlcliError, UsageError
from tlcli.interrupts import defer_interrupts
from tlcli.locks import Lock, heartbeat, observer, this_process
from tlcli.reporter import EpochRow
from tlcli.runs import leaderboard
from tlcli.runs.run_dir import JOURNAL_FILE, REFIT, STATE_FILE, RunDir, read_json, total_seconds, write_json
from tlcli.specs import TrainSpec, Tta
from tlcli.text import duration_text, shown_path

MEAN = "mean"  # name of the job with the mean of weights
MIRRORS = "tta=flip"  # among the words of refits if it is better
SAVE_SECONDS = 5.0  # between updates of the time spent, so that a search that is killed knows it
WAIT_SECONDS = 1.0  # between two looks at the trials of other workers
MARGIN = 1.1  # for what is estimated
FINAL_SECONDS = 5.0  # of the end, besides evaluation
MAX_FAILURES = 3  # in a row, after which the cause is not the recipe
LOST = "its worker died; the recipe is queued again"


class TrialReporter(TerminalReporter):
    """Writes a trial to its log and shows its bars alone. Raises StoppedError when its time is up or it is hopeless."""

    def __init__(self, search: "Search", label: str, is_hopeless: Callable[[int, float], bool] | None = None) -> None:
        super().__init__(quiet=True)
        self._search, self._label, self._is_hopeless = search, label, is_hopeless
        self._percent = 0  # of the epochs, at the last value that was compared

    @contextmanager
    def track(self, label: str, total: int | None, unit: str = "images") -> Iterator[Callable[[int], None]]:
        if self._search.trial and not self._screen.live_bars:  # workers show one line per trial
            track = super().track(label, total, unit)
        else:
            track = self._search.reporter.track(f"{self._label}: {label}", total, unit)
        with track as advance:

            def advance_in_time(n: int) -> None:
                advance(n)
                self._search.tick()
                if self._search.trial and self._search.left < self._search.deadline:
                    raise StoppedError("the time of the trials was up")

            yield advance_in_time

    def epoch(self, row: EpochRow) -> None:
        super().epoch(row)
        # in steps of ten percent, because Optuna compares values of the same step
        value, percent = getattr(row, f"val_{self._search.metric}"), 10 * (10 * row.epoch // row.epochs)
        if value is not None and self._percent < percent < 100 and self._is_hopeless:
            self._percent = percent
            if self._is_hopeless(percent, value):
                raise StoppedError(f"{value:.4f} after {percent} % of the epochs is worse than the median")


class Search:
    """A search in a folder, as one of its workers sees it. It can be resumed from tune.json and study.journal.

    Workers take turns, under a lock, to decide on the next trial and to do what comes after the trials. tune.json is
    written under this lock alone. Each worker has a file, too, in which it records the time spent.
    """

    _study: tune.Study  # once `run` has opened it

    def __init__(
        self,
        folder: Path,
        state: dict[str, Any],
        start: float,
        reporter: TerminalReporter,
        session: Session | None,
        typed: Collection[str] = (),
    ) -> None:
        """Read the state. Only words that the user has `typed` may set every key of Hydra."""
        self._typed = typed
        self.folder, self.reporter, self._state, self._start = folder, reporter, state, start
        self._spent, self._saved = float(state["seconds"]), 0.0
        self.deadline = -math.inf  # seconds that must be left while trials run
        self._lock, self._workers = Lock(folder / ".tune.lock"), folder / ".workers"
        self._worker_file = self._workers / f"{token_hex(4)}.json"
        self.trial: optuna.trial.Trial | None = None  # that runs here; None before and after the trials
        self._n_running = 0  # trials, of all workers
        self._shown: set[str] = set()  # trials whose line has been shown
        self._read_space()
        self._session = session or session_for(self.base.cache)

    @property
    def left(self) -> float:
        """Seconds of the budget that are left."""
        return float(self._state["budget"]) - self._spent_now()

    def save(self, status: str = "running") -> None:
        """Write tune.json. The caller has the lock, or no other worker runs."""
        spent = round(self._spent_now(), 3)
        self._state |= {"status": status, "seconds": spent, **this_process()}
        write_json(self.folder / STATE_FILE, self._state)

    def tick(self) -> None:
        """Record the time spent and show what other workers did, if the last time was some seconds ago."""
        if time.monotonic() > self._saved + SAVE_SECONDS:
            self._write_worker_file()
            self._read_trials()
            if self.trial is None:
                self._check_lock()

    def run(self) -> None:
        """Try recipes while there is time, train the best ones again, average them, and test the result."""
        data, network, budget = self.base.dataset.name, self.base.backbone.name, self._state["budget"]
        self.reporter.show(f"tlcli {__version__}: {data} -> {network}, a search of {duration_text(budget)}")
        self._write_worker_file()
        heartbeat.add(self._worker_file)
        with self._lock.held():
            self._open()
        while self._state["best"] is None:
            with self._lock.held():
                self._catch_up()
                if self._state["best"] is None:
                    self._start_next()
            if self.trial is not None:
                self._run_trial(self.trial)
            elif self._state["best"] is None:
                time.sleep(WAIT_SECONDS)
        self.sign_off()
        self._show(RunDir(self.folder / self._state["best"]), leaderboard.read(self.folder))

    def leave(self, status: str) -> bool:
        """End this worker before the search ends; return True if another one may be running."""
        if self.trial is not None:
            with suppress(OSError):  # a full disk, as below
                self._study.put_back(self.trial.number)
        has_others = self.sign_off()
        if not has_others:
            with suppress(OSError, ValueError):  # a full disk must not hide the error that it caused
                self._state = read_json(self.folder / STATE_FILE)
                self.save(status)
                leaderboard.write(self.folder)
        return has_others

    def sign_off(self) -> bool:
        """Remove the files of this worker and of dead ones; return True if another one may be running."""
        heartbeat.drop(self._worker_file)
        self._worker_file.unlink(missing_ok=True)
        with suppress(OSError):  # another worker is in the folder, or has removed it
            for file in self._workers.glob("*.json"):
                if observer.is_alive(file) is False:
                    file.unlink(missing_ok=True)
            self._workers.rmdir()
        return any(self._workers.glob("*.json"))

    def _spent_now(self) -> float:
        return self._spent + time.monotonic() - self._start

    def _check_lock(self) -> None:
        if not self._lock.owned():
            raise TlcliError(f"{self.folder}: this worker was suspended, and another one took its place")

    def _write_worker_file(self) -> None:
        write_json(self._worker_file, {**this_process(), "seconds": self._spent_now()})
        self._saved = time.monotonic()

    def _open(self) -> None:
        """Read the state and open the study, which the first worker makes."""
        self._state = read_json(self.folder / STATE_FILE)
        self._read_space()
        if self._state["defaults"] is None:
            self._set_defaults()
        file, minimize = self.folder / JOURNAL_FILE, self.metric == "loss"
        self._study = tune.Study(self._spec, self._state["defaults"], file, seed=self.base.seed, minimize=minimize)
        self._shown = {trial["name"] for trial in self._study.ended()}

    def _catch_up(self) -> None:
        """Read what other workers did, and end the trials of those that died."""
        self._state = read_json(self.folder / STATE_FILE)
        for file in (self.folder / STATE_FILE, *self._workers.glob("*.json")):
            with suppress(OSError, ValueError, KeyError):  # of a worker that has just ended
                self._spent += max(0.0, read_json(file)["seconds"] - self._spent_now())
        for number, worker in self._study.running().items():
            if worker is None or observer.is_alive(self._workers / worker) is False:
                info: dict[str, Any] = {}
                with suppress(OSError, ValueError):  # it may have none, or a damaged one
                    info = read_json(self._job_of(str(number)).info_file)
                if info.get("status") == "done":
                    self._study.tell(number, info["best"][self.metric], "done", seconds=total_seconds(info) or 0.0)
                elif self._study.tell(number, None, "lost", error=LOST) == "lost":
                    self._end_lost_job(str(number))
        self._n_running = len(self._study.running())  # before those that have ended: none is in neither
        self._read_trials()
        if self._state["best"] is None:
            self.save()
            leaderboard.write(self.folder)

    def _read_trials(self) -> None:
        """Read the trials that have ended, and show a line of each new one."""
        self._state["trials"] = trials = self._study.ended()
        values = [t["value"] for t in trials if t["value"] is not None]
        new = [trial for trial in trials if trial["name"] not in self._shown]
        for trial in new:
            text = f"{trial['status']}: {trial['error']}"
            if trial["value"] is not None:
                best = (min if self.metric == "loss" else max)(values)
                text = f"validation {self.metric} {trial['value']:.4f}, best {best:.4f}"
            defaults = self._state["defaults"]
            changes = [f"{key}={value}" for key, value in trial["recipe"].items() if value != defaults[key]]
            title, left = " ".join(changes) or "default settings", duration_text(max(0.0, self.left))
            self.reporter.show(f"trial {trial['name']}  {title}: {text}; {left} left")
            self._shown.add(trial["name"])
        if values and (new or self.deadline == -math.inf):
            self.deadline = self._reserve(1)

    def _job_of(self, name: str) -> RunDir:
        return RunDir(self.folder / name / (REFIT if self.base.folds else ""))

    def _end_lost_job(self, name: str) -> None:
        for file in (self.folder / name).rglob("run.json"):
            with suppress(OSError, ValueError):
                RunDir(file.parent).end("failed", LOST)

    def _start_next(self) -> None:
        """Start the next trial if there is time. If none runs any more, do what comes after the trials."""
        if self._state["members"] is None and self._has_time():
            self.trial = self._study.next_trial(self._worker_file.name)
        elif self._n_running == 0:
            if self._state["members"] is None:
                self._choose_members()
            final = self._finish()
            self._state["best"] = final.path.relative_to(self.folder).as_posix()
            if not os.path.lexists(self.folder / REFIT):
                with suppress(OSError):  # a file system without links
                    (self.folder / REFIT).symlink_to(self._state["best"], target_is_directory=True)
            self.save("done")
            leaderboard.write(self.folder)

    def _choose_members(self) -> None:
        """Choose the recipes whose weights are averaged, and how often each is trained again in the time left."""
        ranked, n = self._ranked(), self._spec.average
        if not ranked:
            raise TlcliError(f"no recipe could be trained: {self._state['trials'][-1]['error']}")
        members = ranked[:1]
        if self.base.folds is None:
            spec = load_spec(ranked[0])
            if len(ranked) > 1:
                members = tune.choose_members(ranked[: 2 * n], n, spec, self._session, self.reporter)
            may_mirror = spec.tta is Tta.none and all(load_spec(run).dataset.flip for run in members)
            if self._spec.mirrors and may_mirror and tune.prefers_mirrors(members, spec, self._session, self.reporter):
                self._state["image"].append(MIRRORS)
                self.reporter.note(f"{MIRRORS}: it lowers the validation loss by more than one standard error")
            if self._state["val_fraction"] is not None:
                once, fits = zip(*map(self._refit_seconds, members), strict=True)
                n = min(n, int((self.left - self._test_seconds() - sum(once)) / mean(fits)))
                self._state["fits"] = 1 if self.base.fits else max(1, n // len(members))
        self._state["importances"] = self._study.importances()
        self._state["members"] = [run.path.relative_to(self.folder).as_posix() for run in members]
        self.save()

    def _read_space(self) -> None:
        self._spec = msgspec.convert(self._state["space"], tune.TuneSpec)
        self.base = self._compose(self._state["image"])[1]
        self.metric = self.base.keep_best.value

    def _compose(self, words: list[str]) -> tuple[Any, TrainSpec]:
        flags = self._flags([*self._state["words"], *words])
        config, _ = compose_config(flags)
        return config, build_spec(config, flags.files)

    def _flags(self, words: list[str]) -> Flags:
        """Read the words of a job. Raise UsageError for those of a file that only the command line may give."""
        flags = parse_flags(words)
        own = (word for word in flags.overrides if word not in self._typed)
        check_words(own, self.folder / STATE_FILE, flags.files.folders, of_command=True)
        return flags

    def _set_defaults(self) -> None:
        """Choose the image of all trials, which the mean of weights needs, and the values that the space has."""
        workload = ranking.new_workload(self.base, self._session, self.reporter)
        image, reason = ranking.choose_image(workload, self.reporter)
        if reason is not None:
            self.reporter.note(f"image: {image.size} px, {image.fit}: {reason}")
        words = [f"image.size={image.size}", f"image.fit={image.fit}"]
        if image.train_size is not None:
            words.append(f"image.train_size={image.train_size}")
        if self.base.fits is None and workload.contract.updated_norms():  # statistics of BatchNorm have no mean
            words.append("fits=1")
        config, self.base = self._compose(words)
        choices, defaults, space = config.hydra.runtime.choices, {}, {}
        for key, values in self._spec.space.items():
            default = choices[key] if key in choices else OmegaConf.select(config, key, default=...)
            if default is ... or (key in ("min_steps", "min_epochs") and self.base.epochs is not None):
                continue  # the chosen options do not have this key
            # a list as the text that gives it
            defaults[key], space[key] = str(default) if OmegaConf.is_config(default) else default, values
        size = image.train_size or image.size
        if self._spec.sizes and size is not None and workload.augments:
            sizes = dict.fromkeys([size, *(max(STEP, round(size * x / STEP) * STEP) for x in self._spec.sizes)])
            defaults[tune.SIZE_KEY], space[tune.SIZE_KEY] = size, tuple(s for s in sizes if takes_size(workload, s))
        has_mirrors = self.base.dataset.flip > 0 and self.base.folds is None and self.base.tta is Tta.none
        mirrors = self._spec.mirrors and has_mirrors
        self._spec = msgspec.structs.replace(self._spec, sizes=(), mirrors=mirrors, space=space)
        self._state |= {"image": words, "defaults": defaults, "space": msgspec.to_builtins(self._spec)}
        self.save()

    def _ranked(self) -> list[RunDir]:
        """Return the finished trials, the best first."""
        done = [trial for trial in self._state["trials"] if trial["value"] is not None]
        done.sort(key=lambda trial: trial["value"], reverse=self.metric != "loss")
        return [self._job_of(trial["name"]) for trial in done]

    def _trial_of(self, run: RunDir) -> Any:
        return next(trial for trial in self._state["trials"] if trial["name"] == run.path.name)

    def _refit_seconds(self, run: RunDir) -> tuple[float, float]:
        """Return the expected seconds of training the recipe of a trial again on all images: once, and for each fit."""
        info = run.info
        n_all = info["n_train"] + info["n_val"]
        n_seen = number_of_epochs(load_spec(run), n_all) * n_all
        train = max(float(info["seconds"]["train"]), 1e-3)  # of a head on stored features almost nothing
        once = float(self._trial_of(run)["seconds"]) - train
        if self.base.cache.views is None and n_all <= MAX_FIRST_FIT:  # then a refit reads what the trial has stored
            once -= float(info["seconds"].get("extract", 0.0))
        return MARGIN * once, MARGIN * train * (self.base.fits or 1) * n_seen / (info["epochs"] * info["n_train"])

    def _reserve(self, n_fits: int) -> float:
        """Return the seconds that the end takes with this number of fits: these, comparisons and the test."""
        ranked = self._ranked()
        if not ranked:
            return 0.0
        info, refits = ranked[0].info, 0.0
        if self._state["val_fraction"] is not None:
            once, fits = zip(*map(self._refit_seconds, ranked[:n_fits]), strict=True)
            refits = sum(once) + n_fits * mean(fits)
        n_compared = (2 * n_fits + 1) * info["n_val"]  # twice as many are compared, then the mean
        if self._spec.mirrors:  # compared, and in the test
            n_compared += 4 * info["n_val"] + info["n_test"]
        return float(refits + self._evaluation_seconds(n_compared) + self._test_seconds())

    def _test_seconds(self) -> float:
        best = self._ranked()[0]
        mirrors = MIRRORS in self._state["image"] or best.info.get("tta") == Tta.flip
        return self._evaluation_seconds(best.info["n_test"] * (2 if mirrors else 1)) + FINAL_SECONDS

    def _evaluation_seconds(self, n_images: int) -> float:
        return n_images / float(self._state["images_per_second"] or math.inf)

    def _has_time(self) -> bool:
        """Return True if there is time for another trial, and if there may be another one."""
        limit = self._spec.trials if self._spec.space else 1
        n = sum(t["status"] != "lost" for t in self._state["trials"]) + self._n_running
        seconds = [t["seconds"] for t in self._state["trials"] if t["value"] is not None]
        cost = float(mean(seconds[1:] or seconds or [0.0]))  # those of the first one include what is done once
        has_time = n == 0 or self.left > MARGIN * cost + self._reserve(self._spec.average)
        last = [t["status"] for t in self._state["trials"] if t["status"] != "lost"][-MAX_FAILURES:]
        return has_time and (limit is None or n < limit) and last != ["failed"] * MAX_FAILURES

    def _run_trial(self, trial: optuna.trial.Trial) -> None:
        """Train a recipe, and record how it ended. Raise the error of the first, unless another worker trains one."""
        recipe, name, held_out = trial.user_attrs["recipe"], str(trial.number), self._state["val_fraction"]
        words = [] if held_out is None else [f"dataset.val_fraction={held_out}"]

        def is_hopeless(percent: int, value: float) -> bool:
            trial.report(value, percent)
            return trial.should_prune()

        reporter = TrialReporter(self, f"trial {name}", None if self.base.folds else is_hopeless)
        start, value, status, error, total = self.left, None, "done", "", 0.0
        try:
            info = self._train(name, recipe, words, reporter).info
            value = float(info["best"][self.metric])
            total = total_seconds(info) or 0.0
        except Exception as exc:
            status, error = "stopped" if isinstance(exc, StoppedError) else "failed", exit_status(exc)[1]
            others = self._study.running().keys() - {trial.number}  # they may show that the recipes work
            # unless it is lost itself: while this worker was suspended
            is_first = not others and all(t["status"] == "lost" and t["name"] != name for t in self._study.ended())
            if is_first or isinstance(exc, OSError):  # a full disk is no fault of the recipe
                raise
        with defer_interrupts:
            seconds = max(start - self.left, total)  # part of it may have been before an interruption
            status = self._study.tell(trial.number, value, status, seconds=seconds, error=error)
            self.trial = None
        if status == "lost":
            self._end_lost_job(name)
        self._read_trials()

    def _train(self, name: str, recipe: Mapping[str, Any], words: list[str], reporter: TrialReporter) -> RunDir:
        """Return the run of a job; train it, or what is left of it."""
        overrides = [f"{key}={'null' if value is None else value}" for key, value in recipe.items()]
        words = [*self._state["words"], *self._state["image"], *overrides, *words]
        flags, path = self._flags(words), self.folder / name
        config, loader = compose_config(flags)
        spec = build_spec(config, flags.files)
        run = RunDir(path / REFIT if spec.folds else path)
        with suppress(UsageError):  # damaged: it starts again
            if run.info_file.exists() and run.info.get("status") == "done":
                return run
        path.mkdir(exist_ok=True)
        line = shlex.join(["tlcli", "train", *words])
        command = Command(line, flags.files, None, spec, resume=True, reporter=reporter, session=self._session)
        with composing(flags.files, runs=True):
            command.launch(config, loader, path)
        return RunDir(run.path)

    def _finish(self) -> RunDir:
        """Return the run to use: the winner, or the mean of the best recipes, trained on all images; tested once."""
        members = [RunDir(self.folder / name) for name in self._state["members"]]
        final = members[0] if self.base.folds is not None else RunDir(self.folder / MEAN)
        if not final.info_file.exists():
            spec = load_spec(members[0])
            if MIRRORS in self._state["image"]:
                spec = msgspec.structs.replace(spec, tta=Tta.flip)
            validation = tune.predict_mean(members, spec, self._session, self.reporter)
            refits: list[RunDir] = []
            for run in members if self._state["val_fraction"] is not None else ():
                once, fit = self._refit_seconds(run)
                has_begun = (self.folder / f"refit-{run.path.name}").exists()  # before an interruption
                rest = self.left + (0 if refits else max(0.1 * self._state["budget"], 15))  # a search may end late
                if not has_begun and rest < once + self._state["fits"] * fit + self._test_seconds():
                    break
                name, recipe = run.path.name, self._trial_of(run)["recipe"]
                label = f"refit of trial {name}"
                # the trial has decided on the share, so no first fit is needed
                share = run.info["decisions"].get("interpolate") or 1
                words = [f"interpolate={share}"] if self.base.interpolate is None else []
                if views := run.info["decisions"]["views"]:  # even if the refit alone would read them less often
                    words.append(f"cache.views={views}")
                if self.base.fits is None and load_spec(run).no_average is None:
                    words.append(f"fits={self._state['fits']}")
                try:
                    refits.append(self._train(f"refit-{name}", recipe, words, TrialReporter(self, label)))
                except (*CANDIDATE_ERRORS, ValueError) as exc:  # the trials are still there
                    self._check_lock()
                    self.reporter.note(f"{label} failed: {exit_status(exc)[1]}")
                    continue
                self.reporter.show(f"{label} on all images; {duration_text(max(0.0, self.left))} left")
            tune.average_runs(refits or members, final, validation, spec.tta, self._state["command"])
        spec = load_spec(final)
        test = self._session.dataset(spec.dataset, spec.seed, self.reporter, spec.folds).test
        self._check_lock()
        if len(test) and not final.test_file.exists():
            evaluate.add_test(final.path, spec, self._session, self.reporter)
        return RunDir(final.path)

    def _show(self, final: RunDir, board: Mapping[str, Any]) -> None:
        trials, info = self._state["trials"], final.info
        counts = {s: sum(trial["status"] == s for trial in trials) for s in ("done", "stopped", "failed", "lost")}
        validation = f"{self.metric} {info['best'][self.metric]:.4f}"
        if counts["done"] > 1:
            validation += f", chosen as the best of {counts['done']} trials, so it is optimistic"
        test = "no test split"
        if info.get("test"):
            low, high = info["test"]["accuracy_ci95"]
            test = f"accuracy {info['test']['accuracy']:.4f}, 95 % interval {low:.4f} to {high:.4f}"
        averaged = info.get("averaged", ())
        n_members, refit = len(averaged), self.base.folds or any(name.startswith("refit-") for name in averaged)
        made = f"the mean of the weights of {n_members} runs" if n_members > 1 else "the best recipe"
        place = self.folder / REFIT if (self.folder / REFIT).exists() else final.path
        self.reporter.leaderboard(self.folder, board)
        self.reporter.show_labelled(
            ("trials", ", ".join(f"{n} {status}" for status, n in counts.items() if n)),
            ("folds" if self.base.folds else "validation", validation),
            ("test", test),
            ("took", f"{duration_text(self._state['seconds'])} of {duration_text(self._state['budget'])}"),
            ("best", f"{shown_path(place)}: {made}{', trained on all images' if refit else ''}"),
        )
