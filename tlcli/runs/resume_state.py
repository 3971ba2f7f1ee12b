"""The state that a run resumes from, read from its directory, and the inputs that must not have changed."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from tlcli.data.batches import Preprocessing
from tlcli.engine.activations import Workload
from tlcli.engine.decisions import Decisions, follow, recorded_decisions
from tlcli.engine.inputs import SPLIT_NAMES, Inputs
from tlcli.engine.metrics import BestEpochTracker, Scores
from tlcli.engine.trainer import Trainer
from tlcli.errors import TlcliError, UsageError
from tlcli.files import remove_temp_files
from tlcli.models.tensorfile import damaged, read_tensors
from tlcli.ranks import Ranks
from tlcli.reporter import Reporter
from tlcli.runs.checkpointing import image_fingerprints, load_state, machine_info
from tlcli.runs.run_dir import RunDir, check_version
from tlcli.specs import TrainSpec
from tlcli.text import join_limited


@dataclass(frozen=True, eq=False)
class ResumeState:
    """The state of training at the last checkpoint, and the best epoch with its validation scores."""

    run: RunDir
    state: Mapping[str, Any]
    recorded: Decisions
    best: tuple[int, Scores | None] | None
    decided: Decisions | None = None  # by rank 0, for another rank

    def threads(self, ranks: Ranks) -> int | None:
        """Return the number of threads of the run, since it changes rounding; None with another number of ranks."""
        machine = self.state["machine"]
        return max(1, int(machine["threads"])) if machine["processes"] == ranks.size else None

    def complete_spec(self, workload: Workload, reporter: Reporter) -> tuple[TrainSpec, str | None]:
        """Return the spec with the images of the run; the recorded decisions have the comparison."""
        own, spec = Preprocessing.from_json(self.run.info["preprocessing"]), workload.spec
        image = structs.replace(spec.image, size=own.size, fit=own.fit, train_size=self.recorded.train_size)
        return structs.replace(spec, image=image), None

    @property
    def views(self) -> int | None:
        """The stored views of each training image, or 0; they do not follow from other epochs."""
        return self.recorded.views or 0

    def decisions(self, workload: Workload, reporter: Reporter) -> Decisions:
        """Return the run's decisions, as far as they can be followed here. Raise UsageError if images have changed."""
        if self.decided is not None:
            return self.decided
        before, now = self.state["images"], image_fingerprints(workload.data)
        changes = []
        if before["classes"] != now["classes"]:
            changes = [f"its classes are {join_limited(now['classes'])}; they were {join_limited(before['classes'])}"]
        for split in workload.data.splits if not changes else ():
            for name, old, new in zip(now["classes"], before[split], now[split], strict=True):
                if old[0] != new[0]:
                    changes.append(f"{split} has {new[0]:,} images of {name}, it had {old[0]:,}")
                elif old[1] != new[1]:
                    changes.append(f"images of {name} in {split} have other names or contents")
        if changes:
            some = join_limited(changes, 3)
            raise UsageError(f"{self.run.path}: the dataset has changed: {some}. Restore it, or start a new run")
        return follow(self.recorded, workload, reporter, SPLIT_NAMES)

    def begin(self, inputs: Inputs, trainer: Trainer, reporter: Reporter) -> tuple[int, BestEpochTracker]:
        """Load the state; return the next epoch, and the best so far. Raise TlcliError if frozen tensors are others."""
        workload, state = inputs.workload, self.state
        try:
            keys = workload.classifier.network.load_state_dict(state["weights"], strict=False)
            if keys.unexpected_keys:
                raise ValueError(f"the network has no {keys.unexpected_keys[0]}")
            trainer.load(state["trainer"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise damaged(self.run.state_file, str(error)) from error
        workload.contract.seal()
        if workload.contract.digest() != state["frozen"]:
            reason = "backbone.weights has other frozen layers than when the run started"
            raise TlcliError(f"{self.run.path}: {reason}. Restore it, or start a new run")
        epoch, unfinished = int(state["epoch"]) + 1, state["trainer"]["pass"]
        is_within = unfinished is not None and unfinished["epoch"] == epoch
        reporter.note(f"resumed at epoch {epoch}" + (f", batch {len(unfinished['sizes']) + 1:,}" if is_within else ""))
        now, before = machine_info(inputs.device), state["machine"]
        differences = [f"{key} {now[key]}, it was {before.get(key)}" for key in now if before.get(key) != now[key]]
        if lost := self.recorded.cached - inputs.decisions.cached - {"train_eval"}:
            differences.append(f"{' and '.join(sorted(lost))} cannot be read from activations, as before")
        if any(state["activations"].get(key, sums) != sums for key, sums in inputs.checksums().items()):
            differences.append("activations were recomputed with different rounding")
        if differences:
            reporter.note(f"the result may differ from that of an uninterrupted run: {'; '.join(differences)}")
        # the best epoch may be later than the state: training then comes to it again
        (best, scores), spec, selects = self.best or (None, None), workload.spec, workload.selects_epoch
        return epoch, BestEpochTracker(spec.keep_best, best, scores, selects)


def read_state(run: RunDir) -> ResumeState | None:
    """Return the state of an interrupted run, if it has one. Raise TlcliError if it is damaged or of another tlcli."""
    check_version(run.path, run.info)
    if not run.state_file.is_file():
        return None
    try:
        state = load_state(run.state_file)
    except TlcliError as error:
        raise TlcliError(f"{error}; without that file the run starts again") from error
    recorded, best = recorded_decisions(run.info), None
    if recorded is None:
        raise TlcliError(f"{run.info_file}: has no decisions, or damaged ones; start a new run")
    if run.best_checkpoint.is_file():
        _, metadata = read_tensors(run.best_checkpoint)
        try:
            best = int(metadata["epoch"]), metadata["validation"] and Scores(**metadata["validation"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(run.best_checkpoint, f"its metadata: {error}") from error
    return ResumeState(run, state, recorded, best)


def prepare_resume(run: RunDir, state: ResumeState | None) -> None:
    """Remove what a run wrote after its state (without a state: everything), and the results of its last weights."""
    for folder in (run.path, run.state_file.parent):
        remove_temp_files(folder)
    for file in (run.test_file, run.test_predictions, run.unknown_file):
        file.unlink(missing_ok=True)
    if state is None:
        for file in (run.metrics_file, run.bad_files_file, run.best_checkpoint, run.last_checkpoint):
            file.unlink(missing_ok=True)
    elif run.metrics_bytes() > (size := int(state.state["metrics_bytes"])):
        os.truncate(run.metrics_file, size)
