"""The runs of a command share data and networks, as they were at first."""

from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
import torch
from torch import nn

import tlcli.train
from tests.conftest import Compose
from tlcli.device import PROCESS_THREADS
from tlcli.engine import first_fit
from tlcli.engine.session import Session, session_for
from tlcli.models.classifier import Classifier
from tlcli.reporter import Reporter
from tlcli.runs.run_dir import RunDir
from tlcli.specs import TrainSpec
from tlcli.store import CacheEntry, Column, Store


@pytest.fixture
def session(tmp_path: Path) -> Session:
    return Session(Store(tmp_path / "cache"), 10**9)


@pytest.fixture
def on_shapes(spec: Compose, shapes: Path) -> Callable[..., TrainSpec]:
    """Lite0 at 32 px in float32 on the folder of shapes."""
    words = ("dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "epochs=2", "device.precision=fp32")
    return lambda *overrides: spec(*words, "device.channels_last=true", *overrides)  # else the layout is measured


def write(store: Store, values: torch.Tensor, key: str = "ab") -> CacheEntry:
    """Write an entry with one column of float32."""
    batches = [[memoryview(values.numpy())]] if len(values) else []
    with store.lock_for_write(key, lambda: None):
        return store.write(key, len(values), [Column("float32", tuple(values.shape[1:]))], {}, batches)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux")
def test_tensors_are_mapped_read_only(session: Session) -> None:
    """Of what can be written Linux maps no more than the memory."""
    values = torch.randn(5, 2, 3)
    (mapped,) = Session(session.store, 0).tensors(write(session.store, values))
    assert torch.equal(mapped, values)
    places = [line for line in Path("/proc/self/maps").read_text().splitlines() if line.endswith("/ab/0.bin")]
    assert [line.split()[1] for line in places] == ["r--s"]


def test_entries_of_an_earlier_job_are_released(spec: Compose, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TLCLI_CACHE", str(tmp_path))
    session = session_for(spec().cache)
    write(session.store, torch.zeros(1, 2))
    assert len(list(tmp_path.rglob("ab.use.*"))) == 1
    assert session_for(spec().cache, session) is session
    assert list(tmp_path.rglob("ab.use.*")) == []


def test_tensors_that_the_last_job_did_not_read_make_room(tmp_path: Path) -> None:
    session, values = Session(Store(tmp_path), 80), torch.zeros(8, 2)
    first, second = write(session.store, values, "ab"), write(session.store, values + 1, "cd")
    in_memory = lambda entry: session.tensors(entry) is session.tensors(entry)  # noqa: E731
    assert (in_memory(first), in_memory(second)) == (True, False)
    session.start_job()
    assert (in_memory(second), in_memory(first)) == (False, True), "the job before read both"
    session.start_job()
    assert in_memory(first) and session.tensors(first)[0].equal(values)
    session.start_job()
    assert not in_memory(second)
    session.start_job()
    assert in_memory(second) and session.tensors(second)[0].equal(values + 1)


@pytest.mark.slow
def test_a_model_is_handed_out_with_its_first_weights(session: Session, on_shapes) -> None:
    def model_of(*overrides: str, classes: tuple[str, ...] = ("a", "b"), size: int = 32) -> Classifier:
        spec = on_shapes(*overrides)
        return session.model(spec.backbone, classes, size=size, seed=spec.seed)

    first = model_of()
    before = {name: tensor.clone() for name, tensor in first.network.state_dict().items()}
    with torch.no_grad():
        for tensor in first.network.state_dict().values():
            tensor.add_(1)
    again = model_of("freeze=head", "optimizer.lr=0.1")
    assert again is first
    for name, tensor in again.network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    others = [model_of(change) for change in ("seed=1", "backbone.weights=none")]
    others += [model_of(classes=("a", "b", "c")), model_of(classes=("a", "b", "c"), size=48)]
    assert len(set(map(id, [first, *others]))) == 5


@pytest.fixture
def train(tmp_path: Path, no_plots: None) -> Callable[..., RunDir]:
    """train(spec, session): a finished run."""
    names = (f"run{i}" for i in count())

    def run(spec: TrainSpec, session: Session) -> RunDir:
        run = RunDir(tmp_path / next(names))
        run.start(command="", overrides=[], config="")
        tlcli.train.train(spec, run, Reporter(), session)
        return run

    return run


@pytest.mark.slow
def test_runs_of_a_session_give_what_they_give_alone(session: Session, on_shapes, tmp_path, train, monkeypatch) -> None:
    """The second one reads what the first computed, and fits no second probe."""
    fitted: list[int] = []
    fit = first_fit.fit_probe
    monkeypatch.setattr(first_fit, "fit_probe", lambda *args: fitted.append(1) or fit(*args))
    specs = [on_shapes("freeze=head", f"optimizer.lr={lr}") for lr in (1e-1, 1e-3)]
    specs.append(on_shapes("freeze=last_stages", "augment=basic", "epochs=1"))
    together = [train(spec, session) for spec in specs]
    assert len(fitted) == 1
    assert [run.info["extraction"] is None for run in together] == [False, True, False]
    for i, spec in enumerate(specs):
        alone = train(spec, Session(Store(tmp_path / f"cache{i}"), 10**9))
        assert alone.last_checkpoint.read_bytes() == together[i].last_checkpoint.read_bytes()
        assert alone.test() == together[i].test()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("device.threads=3", "device.threads=null"),
        ("device.compile=true", "device.compile=false"),
        ("device.precision=bf16", "device.precision=fp32"),
    ],
)
def test_a_job_inherits_nothing_from_one_that_computes_differently(
    first: str, second: str, session: Session, on_shapes, tmp_path: Path, train, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled_calls: list[nn.Module] = []

    def compile_in_place(module: nn.Module) -> None:
        module._compiled_call_impl = lambda *args: compiled_calls.append(module) or module._call_impl(*args)

    monkeypatch.setattr(nn.Module, "compile", compile_in_place)
    words = ("freeze=last_stages", "augment=none", "epochs=1")
    train(on_shapes(*words, first), session)
    assert bool(compiled_calls) == (first == "device.compile=true")
    compiled_calls.clear()
    job = train(on_shapes(*words, second), session)
    assert compiled_calls == []
    assert f"{PROCESS_THREADS} threads" in job.info["numerics"]["device"]
    alone = train(on_shapes(*words, second), Session(Store(tmp_path / "another"), 10**9))
    assert job.last_checkpoint.read_bytes() == alone.last_checkpoint.read_bytes()
    assert job.test() == alone.test()
