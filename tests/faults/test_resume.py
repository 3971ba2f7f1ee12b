"""A run that goes on is, bit for bit, the run that nobody disturbed."""

import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tests.conftest import Compose, make_folder
from tests.faults.runs_alike import differences, rows
from tests.processes import in_ranks, train_in_ranks
from tlcli.cli import main
from tlcli.cli.compose import load_spec
from tlcli.engine.trainer import Trainer
from tlcli.interrupts import defer_interrupts
from tlcli.models.tensorfile import read_tensors
from tlcli.runs import checkpointing
from tlcli.runs.checkpointing import CheckpointManager, load_state
from tlcli.runs.run_dir import RunDir, read_json
from tlcli.transfer.contract import FreezeContract

STEPS_PER_EPOCH = 7  # 54 images in batches of 8


class Killed(BaseException):
    """End a run without a chance to save anything, as nearly as one process can."""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, no_plots: None) -> None:
    """No plots, and a checkpoint after every epoch."""
    monkeypatch.setattr(checkpointing, "MAX_TIME_SHARE", 1e9)


Stop = tuple[int, type[BaseException]]  # after this step (1, 2, ...), with this exception
Run = Callable[..., Path]


@contextmanager
def stopped_after(step: int, exc: type[BaseException]) -> Iterator[None]:
    update, made = Trainer._step, iter(range(1, 10**6))

    def stopping(trainer: Trainer, *args: object) -> None:
        update(trainer, *args)  # type: ignore[arg-type]
        if next(made) == step:
            defer_interrupts.interrupt(exc())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_step", stopping)
        yield


@pytest.fixture(scope="module")
def words(shapes: Path, tiny: tuple[str, ...]) -> tuple[str, ...]:
    return ("dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "epochs=3", "batch_size=8", *tiny)


@pytest.fixture
def disturbed(tmp_path: Path, words: tuple[str, ...]) -> Run:
    """Interrupt and resume a run with these words, and return its directory."""

    def run(*own: str, stops: Sequence[Stop]) -> Path:
        out = tmp_path / "disturbed"
        argv = ["train", f"hydra.run.dir='{out}'", *words, *own]
        for step, exc in stops:
            with stopped_after(step, exc), pytest.raises(Killed) if exc is Killed else nullcontext():
                assert main(argv) == 130
                assert read_json(out / "run.json")["status"] == "interrupted"
            argv = ["train", "--resume", str(out)]
        assert main(argv) == 0
        return out

    return run


@pytest.fixture(scope="module")
def whole(words: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return the same run without an interruption; the last one is kept for the next test."""
    out, last = tmp_path_factory.mktemp("whole") / "run", []

    def run(*own: str) -> Path:
        if last != [own]:
            shutil.rmtree(out, ignore_errors=True)
            assert main(["train", f"hydra.run.dir='{out}'", *words, *own]) == 0
            last[:] = [own]
        return out

    return run


LIVE = ("device.precision=fp32", "cache.mode=off", "backbone.dropout=0.3")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "stops"),
    [
        pytest.param((*LIVE, "freeze=last_stages", "epochs=2"), [(3, KeyboardInterrupt)], id="first epoch"),
        pytest.param(
            (*LIVE, "freeze=last_stages", "epochs=2"), [(STEPS_PER_EPOCH, KeyboardInterrupt)], id="before validation"
        ),
        pytest.param(
            ("freeze=head", "scheduler=plateau", "early_stop=1"),
            [(2, KeyboardInterrupt), (4, KeyboardInterrupt), (STEPS_PER_EPOCH, Killed)],
            id="twice interrupted and once killed",
        ),
        pytest.param(("freeze=head", "freeze.head_init=random", "epochs=1"), [(2, Killed)], id="before a checkpoint"),
        pytest.param(
            (*LIVE, "freeze=last_stages", "ema=0.8", "l2sp=0.1", "augment.mixup=0.3", "augment.cutmix=1", "tta=flip"),
            [(3, KeyboardInterrupt), (STEPS_PER_EPOCH + 2, KeyboardInterrupt)],
            id="average, penalty and mixtures",
        ),
        pytest.param(
            (*LIVE, "freeze=last_stages", "fits=2", "epochs=1"),
            [(2, KeyboardInterrupt), (STEPS_PER_EPOCH, Killed), (3, KeyboardInterrupt)],
            id="two fits",
        ),
        pytest.param(
            (*LIVE, "freeze=last_stages", "fits=2", "epochs=null", "min_epochs=1", "min_steps=1"),
            [(2, KeyboardInterrupt), (STEPS_PER_EPOCH, KeyboardInterrupt)],
            id="two fits of as many epochs as the images need",
        ),
        pytest.param((*LIVE, "freeze=lora", "epochs=2"), [(3, KeyboardInterrupt)], id="low rank"),
        pytest.param(("freeze=head", "sampler=balanced", "ema=0.5"), [(3, KeyboardInterrupt)], id="balanced"),
    ],
)
def test_a_stopped_run_goes_on_to_the_same_end(disturbed: Run, whole: Run, own: tuple[str, ...], stops) -> None:
    assert list(differences(whole(*own), disturbed(*own, stops=stops))) == []


@pytest.mark.slow
def test_a_run_without_validation_images_goes_on_to_the_same_end(disturbed: Run, whole: Run, monkeypatch) -> None:
    monkeypatch.setattr("tlcli.data.dataset.MIN_VALIDATION_IMAGES", 200)
    monkeypatch.setattr("tlcli.engine.first_fit.SHARES", (0.5,))
    own, first_fit = ("freeze=head", "epochs=2"), 2 * 6  # steps of 48 images
    stops: list[Stop] = [(2, KeyboardInterrupt), (first_fit + 2, KeyboardInterrupt), (8, Killed)]
    ends = whole(*own), disturbed(*own, stops=stops)
    assert list(differences(*ends)) == []
    best, last = (read_tensors(getattr(RunDir(ends[1]), f"{name}_checkpoint")) for name in ("best", "last"))
    assert best[1]["interpolate"] == 0.5 and "interpolate" not in last[1]
    assert not torch.equal(best[0]["classifier.weight"], last[0]["classifier.weight"])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["load_best", "verify"])
def test_weights_are_interpolated_once(method: str, disturbed: Run, whole: Run, tmp_path, monkeypatch) -> None:
    """A run that is killed before or after its last weights are replaced replaces them once."""
    own = ("freeze=head", "epochs=1", "interpolate=0.5")
    owners = {"load_best": CheckpointManager, "verify": FreezeContract}
    with monkeypatch.context() as patch:
        patch.setattr(owners[method], method, Mock(side_effect=Killed))
        with pytest.raises(Killed):
            disturbed(*own, stops=[])
    assert main(["train", "--resume", str(tmp_path / "disturbed")]) == 0
    assert list(differences(whole(*own), tmp_path / "disturbed")) == []


@pytest.mark.slow
def test_the_epochs_of_two_fits_cannot_change(whole: Run, capsys: pytest.CaptureFixture[str]) -> None:
    run = whole(*LIVE, "freeze=last_stages", "fits=2", "epochs=1", "checkpoint.keep_state=true")
    capsys.readouterr()
    assert main(["train", "--resume", str(run), "epochs=2"]) == 2
    assert "averages 2 fits, whose number of epochs cannot change" in capsys.readouterr().err
    assert main(["train", "--resume", str(run), "fits=1"]) == 2
    assert "cannot change fits" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_keeps_its_choice_of_image_and_epochs(disturbed: Run, whole: Run, spec: Compose, monkeypatch) -> None:
    chosen = iter([spec("image.size=40", "image.fit=squash", "image.train_size=32").image] * 2)  # one per new run
    monkeypatch.setattr("tlcli.train.choose_image", lambda *args: (next(chosen), "the reason"))
    steps = ("epochs=null", "min_epochs=1", "min_steps=8")
    own = (*LIVE, "freeze=last_stages", "augment=basic", "image.size=null", *steps)
    ends = whole(*own), disturbed(*own, stops=[(9, KeyboardInterrupt)])
    assert list(differences(*ends)) == []
    for run in map(RunDir, ends):
        assert run.info["epochs"] == 2
        assert (run.info["preprocessing"]["size"], run.info["decisions"]["train_size"]) == (40, 32)
        assert run.info["decisions"]["reasons"]["image"] == "the reason"


@pytest.mark.slow
def test_a_run_keeps_its_stored_views_if_its_epochs_change(whole: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tlcli.engine.activations.VIEWS", 1)
    run = whole("freeze=last_stages", "augment=basic", "epochs=2", "checkpoint.keep_state=true")
    assert read_json(run / "run.json")["decisions"]["views"] == 1
    monkeypatch.setattr("tlcli.engine.activations.VIEWS", 8)
    assert main(["train", "--resume", str(run), "epochs=3"]) == 0
    info = read_json(run / "run.json")
    assert (info["epochs"], info["decisions"]["views"], info["cache"]["used"]) == (3, 1, True)


def test_a_run_that_ended_as_it_began_can_go_on(tmp_path, words: tuple[str, ...], monkeypatch) -> None:
    start = RunDir.start

    def killed(run: RunDir, **arguments: Any) -> None:
        start(run, **arguments)
        raise Killed

    monkeypatch.setattr(RunDir, "start", killed)
    with pytest.raises(Killed):
        main(["train", f"hydra.run.dir='{tmp_path / 'run'}'", *words])
    assert load_spec(RunDir(tmp_path / "run")).epochs == 3


# -- the matrix


OPTIMIZERS = ("adamw", "adam", "sgd")
FREEZES = {True: ("head", "last_stages"), False: ("none", "last_stages", "norm", "head")}


def matrix() -> Iterator[tuple[list[str], str]]:
    """Yield every scheduler with every precision, number of workers, way to read and place to stop; optimizers and
    freeze strategies in turn, so that each pair of them occurs."""
    schedulers = ("constant", "cosine", "linear", "step", "one_cycle", "plateau")
    ways = product(("fp32", "bf16"), (0, 2), (True, False))
    for (i, (precision, workers, cached)), (j, scheduler) in product(enumerate(ways), enumerate(schedulers)):
        optimizer = OPTIMIZERS[(i + j) % 3]
        words = [f"optimizer={optimizer}", f"scheduler={scheduler}"]
        words += [f"freeze={FREEZES[cached][(i + j) % len(FREEZES[cached])]}"]
        words += [f"device.precision={precision}", f"device.workers={workers}"]
        words += ["cache.mode=require", "cache.views=2"] if cached else ["cache.mode=off", "backbone.dropout=0.2"]
        words += ["accumulate=2"] if scheduler in ("linear", "plateau") else []
        words += ["clip_grad=1.0"] if optimizer == "adam" else []
        for stop in ("within", "at its end"):
            yield words, stop


CASES = list(matrix())
SAMPLE = 12  # of the default set: uncached with dropout, stopped within an epoch


@pytest.mark.parametrize(
    ("own", "stop"),
    [
        pytest.param(*case, id=" ".join([*case[0], case[1]]), marks=() if i == SAMPLE else pytest.mark.slow)
        for i, case in enumerate(CASES)
    ],
)
def test_every_way_to_train_goes_on_exactly(disturbed: Run, whole: Run, own: list[str], stop: str) -> None:
    steps = 4 if "accumulate=2" in own else STEPS_PER_EPOCH
    stops: list[Stop] = [(steps + 2, KeyboardInterrupt) if stop == "within" else (2 * steps + 1, Killed)]
    assert list(differences(whole(*own), disturbed(*own, stops=stops))) == []


# -- several processes


# every scheduler, precision, number of workers, way to read and place to stop
RANKED = [CASES[12 * (i % 8) + 2 * (i % 6) + i // 2 % 2] for i in range(12)]


def disturbed_in_ranks(out: Path, sizes: tuple[int, int], stops: Stop, *words: str) -> str:
    """Interrupt a run of several processes and resume it, with another number; return what the latter prints."""

    def interrupted(rank: int) -> int:
        stopped = stopped_after(*stops) if rank == 0 else nullcontext()
        with stopped, suppress(Killed):
            return main(["train", f"hydra.run.dir='{out}'", *words])
        return 137

    (code, text), *others = in_ranks(sizes[0], interrupted, out.parent)
    assert code in (130, 137), text
    assert all(end == (0, "") for end in others), others
    other = [f"device.processes={sizes[1]}"] if sizes[1] != sizes[0] else []
    code, text = train_in_ranks(sizes[1], ["--resume", str(out), *other], out.parent)
    assert code == 0, text
    return text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "own", "stop"),
    [
        pytest.param(size, *case, id=" ".join([f"{size} processes", *case[0], case[1]]))
        for size, case in [*((2, case) for case in RANKED), (3, RANKED[9])]  # of three some have fewer images
    ],
)
def test_several_processes_go_on_exactly(size: int, own: list[str], stop: str, words, tmp_path) -> None:
    steps = 4 if "accumulate=2" in own else STEPS_PER_EPOCH
    stops: Stop = (steps + 2, KeyboardInterrupt) if stop == "within" else (2 * steps + 1, Killed)
    assert train_in_ranks(size, [f"hydra.run.dir='{tmp_path / 'whole'}'", *words, *own], tmp_path)[0] == 0
    disturbed_in_ranks(tmp_path / "disturbed", (size, size), stops, *words, *own)
    assert list(differences(tmp_path / "whole", tmp_path / "disturbed")) == []


@pytest.mark.slow
def test_another_number_of_processes_is_noted(words: tuple[str, ...], tmp_path: Path) -> None:
    text = disturbed_in_ranks(tmp_path / "run", (2, 1), (3, KeyboardInterrupt), *words, "freeze=head")
    assert "the result may differ from that of an uninterrupted run: processes 1, it was 2" in text
    assert read_json(tmp_path / "run/run.json")["status"] == "done"


# -- what else a user meets


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory, tiny: tuple[str, ...]) -> Path:
    """Return a run on its own images, interrupted in its second epoch."""
    folder = tmp_path_factory.mktemp("stopped")
    for split, n in (("train", 20), ("test", 4)):
        make_folder(folder / "images" / split, {"across": n, "checks": n}, seed=n)
    argv = ["train", f"hydra.run.dir='{folder / 'run'}'", "dataset=imagefolder", f"dataset.root='{folder / 'images'}'"]
    argv += [*tiny, "image.size=32", "batch_size=8", "epochs=3", "freeze=head", "log_every=1"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpointing, "MAX_TIME_SHARE", 1e9)
        with stopped_after(7, KeyboardInterrupt):
            assert main(argv) == 130
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
def test_what_makes_another_run_is_refused(stopped: Path, capsys, word: str, said: str) -> None:
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


def test_the_number_of_threads_is_taken_over_and_another_torch_is_noted(stopped: Path, capsys, monkeypatch) -> None:
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
    """Also without its state, since a run that starts again removes its checkpoints."""
    RunDir(stopped).update(tlcli="0.4.0")
    best = (stopped / "checkpoints/best.safetensors").read_bytes()
    for _ in range(2):
        assert main(["train", "--resume", str(stopped), "epochs=9"]) == 1
        assert "was started with tlcli 0.4.0; resume it with that version" in capsys.readouterr().err
        assert read_json(stopped / "run.json")["status"] == "interrupted"
        assert (stopped / "checkpoints/best.safetensors").read_bytes() == best
        (stopped / "checkpoints/state.safetensors").unlink(missing_ok=True)


def test_a_finished_run_without_its_state_cannot_train_on(stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    RunDir(stopped).update(status="done")
    (stopped / "checkpoints/state.safetensors").unlink()
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
    found = disturbed("freeze=head", "checkpoint.every_minutes=1e-9", "checkpoint.keep_state=true", stops=[(5, Killed)])
    assert load_state(found / "checkpoints/state.safetensors")["machine"]["threads"] == torch.get_num_threads()
