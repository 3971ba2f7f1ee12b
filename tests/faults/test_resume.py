"""A run that goes on is, bit for bit, the run that nobody disturbed."""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import make_folder
from tests.faults.runs_alike import differences, rows
from tlcli.cli import main
from tlcli.cli.compose import load_spec
from tlcli.engine.trainer import Trainer
from tlcli.interrupts import defer_interrupts
from tlcli.runs import checkpointing
from tlcli.runs.checkpointing import load_state
from tlcli.runs.recorder import Recorder
from tlcli.runs.run_dir import RunDir, read_json

STEPS_AN_EPOCH = 7  # 54 images in batches of 8


class Killed(BaseException):
    """What ends a run without a chance to save anything, as nearly as one process can have it."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No plots, and a checkpoint after every epoch."""
    monkeypatch.setattr(Recorder, "_plot", lambda *args: None)
    monkeypatch.setattr(checkpointing, "MAX_TIME_SHARE", 1e9)


@dataclass(frozen=True)
class Stopped:
    """How a run was stopped: after this step (1, 2, ...), with what."""

    step: int
    exc: type[BaseException] = KeyboardInterrupt

    def __call__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Have the next run stop there."""
        update, made = Trainer._step, iter(range(1, 10**6))

        def stopping(trainer: Trainer, *args: object) -> None:
            update(trainer, *args)  # type: ignore[arg-type]
            if next(made) == self.step:
                defer_interrupts.interrupt(self.exc())

        monkeypatch.setattr(Trainer, "_step", stopping)


Run = Callable[..., Path]


@pytest.fixture
def words(shapes: Path) -> tuple[str, ...]:
    return ("dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "epochs=3", "batch_size=8")


@pytest.fixture
def disturbed(tmp_path: Path, words: tuple[str, ...]) -> Run:
    """Interrupt and resume a run with these words, and return its directory."""

    def run(*own: str, stops: Sequence[Stopped]) -> Path:
        out = tmp_path / "disturbed"
        argv = ["train", f"hydra.run.dir='{out}'", *words, *own]
        for stop in stops:
            with pytest.MonkeyPatch.context() as patch:
                stop(patch)
                if stop.exc is Killed:
                    with pytest.raises(Killed):
                        main(argv)
                else:
                    assert main(argv) == 130
                    assert read_json(out / "run.json")["status"] == "interrupted"
            argv = ["train", "--resume", str(out)]
        assert main(argv) == 0
        return out

    return run


@pytest.fixture
def whole(tmp_path: Path, words: tuple[str, ...]) -> Run:
    """Return the same run without an interruption."""

    def run(*own: str) -> Path:
        out = tmp_path / "whole"
        assert main(["train", f"hydra.run.dir='{out}'", *words, *own]) == 0
        return out

    return run


LIVE = ("device.precision=fp32", "cache.mode=off", "backbone.dropout=0.3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "stops"),
    [
        pytest.param((*LIVE, "freeze=last_stages", "epochs=2"), [Stopped(3)], id="first epoch"),
        pytest.param((*LIVE, "freeze=last_stages", "epochs=2"), [Stopped(STEPS_AN_EPOCH)], id="before validation"),
        pytest.param(
            ("freeze=head", "scheduler=plateau", "early_stop=1"),
            [Stopped(2), Stopped(4), Stopped(STEPS_AN_EPOCH, Killed)],
            id="twice interrupted and once killed",
        ),
        pytest.param(
            ("freeze=head", "freeze.head_init=random", "epochs=1"), [Stopped(2, Killed)], id="before a checkpoint"
        ),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_end(
    disturbed: Run, whole: Run, own: tuple[str, ...], stops: list[Stopped]
) -> None:
    assert list(differences(whole(*own), disturbed(*own, stops=stops))) == []


def test_a_run_that_ended_as_it_began_can_go_on(
    tmp_path: Path, words: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = RunDir.start

    def killed(run: RunDir, **arguments: Any) -> None:
        start(run, **arguments)
        raise Killed

    monkeypatch.setattr(RunDir, "start", killed)
    with pytest.raises(Killed):
        main(["train", f"hydra.run.dir='{tmp_path / 'run'}'", *words])
    assert load_spec(RunDir(tmp_path / "run")).epochs == 3


# -- the matrix


@dataclass(frozen=True)
class Case:
    optimizer: str
    scheduler: str
    freeze: str
    precision: str
    workers: int
    cached: bool
    stop: str

    @property
    def words(self) -> list[str]:
        own = [f"{key}={getattr(self, key)}" for key in ("optimizer", "scheduler", "freeze")]
        own += [f"device.precision={self.precision}", f"device.workers={self.workers}"]
        own += ["cache.mode=require", "cache.views=2"] if self.cached else ["cache.mode=off", "backbone.dropout=0.2"]
        own += ["accumulate=2"] if self.scheduler in ("linear", "plateau") else []
        own += ["clip_grad=1.0"] if self.optimizer == "adam" else []
        return own

    @property
    def stops(self) -> list[Stopped]:
        an_epoch = 4 if "accumulate=2" in self.words else STEPS_AN_EPOCH
        return [Stopped(an_epoch + 2)] if self.stop == "within" else [Stopped(2 * an_epoch + 1, Killed)]


SCHEDULERS = ("constant", "cosine", "linear", "step", "one_cycle", "plateau")
OPTIMIZERS = ("adamw", "adam", "sgd")
FREEZES = {True: ("head", "last_stages"), False: ("none", "last_stages", "norm", "head")}


def matrix() -> Iterator[Case]:
    """Every scheduler with every precision, number of workers, way to read and place to stop; optimizers and freeze
    strategies in turn, so that each pair of them occurs."""
    rest = product(("fp32", "bf16"), (0, 2), (True, False), ("within", "at its end"))
    for i, (precision, workers, cached, stop) in enumerate(rest):
        for j, scheduler in enumerate(SCHEDULERS):
            freeze = FREEZES[cached][(i // 3 + j) % len(FREEZES[cached])]
            yield Case(OPTIMIZERS[(i + j) % 3], scheduler, freeze, precision, workers, cached, stop)


CASES = list(matrix())


SAMPLE = (17,)  # cases of the default set: uncached with dropout, stopped within an epoch


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, marks=() if i in SAMPLE else pytest.mark.slow) for i, case in enumerate(CASES)],
    ids=lambda case: "-".join(map(str, vars(case).values())),
)
def test_every_way_to_train_goes_on_exactly(disturbed: Run, whole: Run, case: Case) -> None:
    assert list(differences(whole(*case.words), disturbed(*case.words, stops=case.stops))) == []


# -- what else a user meets


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run on its own images, interrupted in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    for split, n in (("train", 20), ("test", 4)):
        make_folder(folder / "images" / split, {"across": n, "checks": n}, seed=n)
    argv = ["train", f"hydra.run.dir='{folder / 'run'}'", "dataset=imagefolder", f"dataset.root='{folder / 'images'}'"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "MAX_TIME_SHARE", 1e9)
        Stopped(7)(patch)
        assert main([*argv, "image.size=32", "batch_size=8", "epochs=3", "freeze=head", "log_every=1"]) == 130
    return folder


@pytest.fixture
def stopped(stopped_once: Path, tmp_path: Path) -> Path:
    """Copy the run and its images."""
    folder = tmp_path / "own"
    shutil.copytree(stopped_once, folder)
    config = folder / "run/config.yaml"
    config.write_text(config.read_text().replace(str(stopped_once), str(folder)))
    return folder / "run"


def test_metrics_have_each_epoch_once_with_more_epochs_and_images_that_moved(stopped: Path) -> None:
    (stopped.parent / "images").rename(stopped.parent / "elsewhere")
    assert main(["train", "--resume", str(stopped)]) == 2
    root = f"dataset.root='{stopped.parent / 'elsewhere'}'"
    assert main(["train", "--resume", str(stopped), "epochs=4", root]) == 0
    found = rows(RunDir(stopped))
    assert [row["epoch"] for row in found if row["split"] == "val"] == [0, 1, 2, 3, 4]
    assert [row["batch"] for row in found if row["split"] == "running"] == [1, 2, 3, 4, 5] * 4
    info = read_json(stopped / "run.json")
    assert info["status"] == "done"
    assert info["error"] is None
    assert len(info["resumed"]) == 1
    assert "epochs: 4" in (stopped / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("optimizer.lr=1", r"cannot change optimizer\.lr; it may change epochs \(upward\), device\.workers, log_every"),
        ("epochs=2", "cannot change epochs=2, less than 3"),
    ],
)
def test_what_makes_another_run_is_refused(
    stopped: Path, capsys: pytest.CaptureFixture[str], word: str, said: str
) -> None:
    before = (stopped / "run.json").read_bytes()
    assert main(["train", "--resume", str(stopped), word]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert re.search(said, error), error
    assert (stopped / "run.json").read_bytes() == before


def test_other_images_are_refused_with_what_changed(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = stopped.parent / "images"
    one = next((images / "test/across").iterdir())
    one.write_bytes(next((images / "test/checks").iterdir()).read_bytes())
    assert main(["train", "--resume", str(stopped)]) == 2
    assert "images of across in test have other names or contents" in capsys.readouterr().err
    one.unlink()
    assert main(["train", "--resume", str(stopped)]) == 2
    assert "test has 3 images of across, it had 4" in capsys.readouterr().err


def test_a_damaged_state_is_one_line_that_says_what_to_do(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = stopped / "checkpoints/state.safetensors"
    content = bytearray(state.read_bytes())
    content[-20] ^= 1
    state.write_bytes(content)
    assert main(["train", "--resume", str(stopped)]) == 1
    error = capsys.readouterr().err
    assert "checksum mismatch" in error
    assert "without that file the run starts again" in error
    state.unlink()
    assert main(["train", "--resume", str(stopped)]) == 0
    assert [row["epoch"] for row in rows(RunDir(stopped)) if row["split"] == "val"] == [0, 1, 2, 3]


def test_the_number_of_threads_is_taken_over_and_another_torch_is_noted(
    stopped: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before, state = torch.get_num_threads(), stopped / "checkpoints/state.safetensors"
    assert load_state(state)["machine"]["threads"] == before
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    torch.set_num_threads(before + 1)
    try:
        assert main(["train", "--resume", str(stopped)]) == 0
        assert torch.get_num_threads() == before
        assert "differ from that of an uninterrupted run: torch 9.9.9, it was" in capsys.readouterr().out
    finally:
        torch.set_num_threads(before)


def test_a_run_that_goes_on_elsewhere_is_left_alone(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its process is there: it is this one."""
    RunDir(stopped).update(status="running")
    assert main(["train", "--resume", str(stopped)]) == 2
    assert "is still running it" in capsys.readouterr().err


def test_a_run_of_an_older_release_is_refused(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without its state a run starts again, which would lose the checkpoints of a run of tlcli 0.3."""
    RunDir(stopped).update(tlcli="0.4.0")
    assert main(["train", "--resume", str(stopped)]) == 1
    assert "was started with tlcli 0.4.0, this is" in capsys.readouterr().err
    assert read_json(stopped / "run.json")["status"] == "interrupted"
    (stopped / "checkpoints/state.safetensors").unlink()
    (stopped / "checkpoints/last.state").touch()
    best = (stopped / "checkpoints/best.safetensors").read_bytes()
    assert main(["train", "--resume", str(stopped), "epochs=9"]) == 2
    assert "has no checkpoints/state.safetensors to resume from" in capsys.readouterr().err
    assert (stopped / "checkpoints/best.safetensors").read_bytes() == best


@pytest.mark.parametrize("argv", [["--resume"], ["resume="], ["--resume", "nowhere"], ["--resume="]])
def test_no_such_run_is_one_line(argv: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *argv]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.slow
def test_the_threads_of_a_state_are_the_runs_own(disturbed: Run, whole: Run) -> None:
    """A head trains on one thread: a state that is written meanwhile has the number of the whole run."""
    found = disturbed(
        "freeze=head", "checkpoint.every_minutes=1e-9", "checkpoint.keep_state=true", stops=[Stopped(5, Killed)]
    )
    assert load_state(found / "checkpoints/state.safetensors")["machine"]["threads"] == torch.get_num_threads()
