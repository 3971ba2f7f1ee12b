"""Where a run that was interrupted stands, read from its directory, and how it goes on from there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from tlcli.engine.activations import Workload
from tlcli.engine.checkpoints import load_state
from tlcli.engine.decisions import Decisions, follow, recorded_decisions
from tlcli.engine.inputs import SPLIT_NAMES, Inputs
from tlcli.engine.metrics import BestEpochTracker, Scores
from tlcli.engine.origin import machine_changes, require_same_images
from tlcli.engine.trainer import Trainer
from tlcli.errors import TlcliError
from tlcli.files import remove_temp_files
from tlcli.models.tensorfile import damaged, read_tensors
from tlcli.reporter import Reporter
from tlcli.runs.run_dir import RunDir
from tlcli.specs import TrainSpec
from tlcli.transfer.contract import FreezeContract

STATE_VERSION = 2
"""Of the contents of state.safetensors."""


@dataclass(frozen=True)
class TrainingStart:
    """Where training begins: the epoch, if the network before training was worth an evaluation (as epoch 0), and the
    best epoch so far."""

    epoch: int
    head_is_ready: bool
    best_epoch: BestEpochTracker


@dataclass(frozen=True, eq=False)
class ResumeState:
    """The state of training at the last checkpoint, and the best epoch with its validation scores, if there is one."""

    run: RunDir
    state: Mapping[str, Any]
    recorded: Decisions
    best: tuple[int, Scores] | None

    @property
    def epoch(self) -> int | None:
        """The last epoch that was validated; None: not even the network before training."""
        epoch: int | None = self.state["epoch"]
        return epoch

    @property
    def first_epoch(self) -> int:
        """The epoch to go on with, from its beginning or from within it."""
        return self.epoch + 1 if self.epoch is not None else int(not self.head_is_ready)

    @property
    def head_is_ready(self) -> bool:
        """Whether the network before training was worth an evaluation, as epoch 0."""
        return bool(self.state["head_is_ready"])

    @property
    def words(self) -> str:
        """Where it goes on, for a note."""
        now = self.state["trainer"]["pass"]
        is_within = now is not None and now["epoch"] == self.first_epoch
        return f"resumed at epoch {self.first_epoch}" + (f", batch {now['batches'] + 1:,}" if is_within else "")

    @property
    def threads(self) -> int:
        """Threads of arithmetic as before: with another number sums are rounded differently."""
        return max(1, int(self.state["machine"]["threads"]))

    def decisions(self, workload: Workload, reporter: Reporter) -> Decisions:
        """Return the run's decisions, as far as they can be followed here.

        Raises UsageError if the images are not those that the run started with.
        """
        require_same_images(self.state["images"], workload.data, str(self.run.path))
        return follow(self.recorded, workload, reporter, SPLIT_NAMES)

    def restore(self, inputs: Inputs, trainer: Trainer, reporter: Reporter) -> TrainingStart:
        """Load the state of training, check the frozen tensors, and note where the run resumes."""
        workload = inputs.workload
        self.load(workload.classifier.network, trainer)
        workload.contract.seal()
        self.require_frozen(workload.contract)
        reporter.note(self.words)
        if differences := self.differences(inputs):
            reporter.note(f"the result may differ from that of an uninterrupted run: {'; '.join(differences)}")
        return TrainingStart(self.first_epoch, self.head_is_ready, self.selection(workload.spec))

    def selection(self, spec: TrainSpec) -> BestEpochTracker:
        """The best epoch so far. It may be later than the state, which training then comes to again."""
        epoch, scores = self.best or (None, None)
        return BestEpochTracker(spec.keep_best, spec.early_stop, epoch, scores, self.epoch or 0)

    def load(self, network: nn.Module, trainer: Trainer) -> None:
        """Put weights, optimizer, rates, counters and random states back."""
        try:
            missing = network.load_state_dict(self.state["weights"], strict=False)
            if missing.unexpected_keys:
                raise ValueError(f"the network has no {missing.unexpected_keys[0]}")
            trainer.load(self.state["trainer"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise damaged(self.run.state_file, str(error)) from error

    def require_frozen(self, contract: FreezeContract) -> None:
        """Raise TlcliError where the frozen part is not the one that the run began with: its weights are another's."""
        if contract.digest() != self.state["frozen"]:
            raise TlcliError(
                f"{self.run.path}: the frozen part is not the one that the run began with: the file or package that "
                f"backbone.weights names has other weights now. Put it back, or start a new run"
            )

    def differences(self, inputs: Inputs) -> list[str]:
        """Return why the result may not equal that of an uninterrupted run bit for bit; empty if it will."""
        found = machine_changes(self.state["machine"], inputs.workload.accelerator)
        if lost := self.recorded.cached - inputs.decisions.cached - {"train_eval"}:
            found.append(f"{' and '.join(sorted(lost))} cannot be read from activations, as before")
        previous = self.state["activations"]
        if any(previous.get(key, sums) != sums for key, sums in inputs.checksums().items()):
            found.append("activations were recomputed with different rounding")
        return found

    def rewind(self) -> None:
        """Leave out of metrics.jsonl what is going to be done again, and remove what a killed writer left."""
        for folder in (self.run.path, self.run.best_checkpoint.parent):
            remove_temp_files(folder)
        wanted = int(self.state["metrics_bytes"])
        if self.run.metrics_file.exists() and self.run.metrics_file.stat().st_size > wanted:
            with self.run.metrics_file.open("r+b") as file:
                file.truncate(wanted)


def read_restart(run: RunDir) -> ResumeState | None:
    """Where a run stands; None where it ended before its first checkpoint. Raises TlcliError for damaged files."""
    if not run.state_file.is_file():
        return None
    try:
        state = load_state(run.state_file)
    except TlcliError as error:
        raise TlcliError(f"{error}; without that file the run begins again") from error
    if state.get("version") != STATE_VERSION:
        raise TlcliError(f"{run.state_file}: is of version {state.get('version')}, this tlcli knows {STATE_VERSION}")
    recorded = recorded_decisions(run.info)
    if recorded is None:
        raise TlcliError(f"{run.info_file}: has no decisions, or damaged ones; start a new run")
    return ResumeState(run, state, recorded, _best(run.best_checkpoint) if run.best_checkpoint.is_file() else None)


def _best(path: Path) -> tuple[int, Scores]:
    """The epoch of the best weights, and their scores."""
    _, facts = read_tensors(path)
    try:
        return int(facts["epoch"]), Scores(**facts["validation"])
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"its facts: {error}") from error


def start_over(run: RunDir) -> None:
    """Remove what a run wrote before its first checkpoint: it begins again in its directory."""
    for folder in (run.path, run.best_checkpoint.parent):
        remove_temp_files(folder)
    for file in (run.metrics_file, run.bad_files_file, run.best_checkpoint, run.last_checkpoint):
        file.unlink(missing_ok=True)
