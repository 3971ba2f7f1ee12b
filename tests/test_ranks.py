"""One run in several processes is the run of one process: the same images in the same batches, the same weights."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from msgspec import structs, to_builtins
from safetensors.torch import load_file, save_file
from torch import nn

from tests.conftest import TINY, Compose, make_folder, slow
from tests.engine.test_trainer import Setting
from tests.faults.runs_alike import rows
from tests.processes import in_ranks, train_in_ranks
from tlcli.cli import main
from tlcli.cli.launch import launch, rank_and_size, with_processes
from tlcli.data.batches import Preprocessing
from tlcli.data.dataset import Dataset, load_dataset
from tlcli.device import find_accelerator, limit_threads, setup_process
from tlcli.engine import session
from tlcli.engine.activations import load_workload
from tlcli.engine.decisions import Decisions
from tlcli.engine.inputs import Inputs
from tlcli.engine.metrics import evaluate
from tlcli.engine.session import Session
from tlcli.engine.trainer import Trainer
from tlcli.errors import TlcliError, UsageError
from tlcli.ranks import AHEAD, ALONE, Ranks, join
from tlcli.reporter import Reporter
from tlcli.runs.run_dir import RunDir, read_json
from tlcli.specs import Accelerator, TrainSpec, spec_from
from tlcli.store import Store

STEPS = 20
NETWORK = ("backbone=mobilenet_v3_small", "backbone.weights=none", "backbone.dropout=0", "freeze.bn_stats=frozen")
SMALL = ("image.size=32", "batch_size=8", "device.precision=fp32", "device.channels_last=true")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make 17 training images, a prime: with batches of 8 the last one has one image, and none for other ranks."""
    root = tmp_path_factory.mktemp("images")
    make_folder(root / "train", {"across": 9, "checks": 8}, seed=0)
    make_folder(root / "val", {"across": 2, "checks": 1}, seed=1)
    make_folder(root / "test", {"across": 3, "checks": 2}, seed=2)
    return root


@pytest.fixture
def words(images: Path) -> tuple[str, ...]:
    return ("dataset=imagefolder", f"dataset.root='{images}'", *SMALL)


# -- what ranks exchange


def exchange(rank: int, size: int) -> int:
    ranks = join(rank, size)
    assert ranks.broadcast({"rank": rank, "text": "ä"}) == {"rank": 0, "text": "ä"}
    tensors = [torch.full((2, 3), float(rank)).t(), torch.tensor(rank)]
    ranks.copy_tensors(tensors)
    assert not any(tensor.any() for tensor in tensors)

    n, batch_size = 7, 2
    table = torch.arange(n * 4, dtype=torch.bfloat16).view(n, 4)
    own = ranks.positions(n, batch_size)
    batches = [table[own[i : i + batch_size]] for i in range(0, len(own), batch_size)]
    assert torch.equal(ranks.gather(batches, own, n), table)
    few = ranks.positions(2, batch_size)  # a batch for rank 0 alone
    assert torch.equal(ranks.gather([table[few]] if len(few) else [], few, 2), table[:2])
    with pytest.raises(TlcliError, match="2 of 7 images were not evaluated exactly once"):
        ranks.gather([torch.zeros(5, 1)] if rank == 0 else [], torch.arange(5 if rank == 0 else 0), n)

    rounds = [table + i for i in range(AHEAD)]
    if rank:
        for rows in rounds:
            ranks.collect(rows[own], n, batch_size)
    ranks.broadcast()  # other ranks come here before rank 0 takes any row
    if rank == 0:
        assert all(torch.equal(ranks.collect(rows[own], n, batch_size), rows) for rows in rounds)
        assert torch.equal(ranks.collect(table[:2], 2, batch_size), table[:2])

    parameters = [nn.Parameter(torch.zeros(2, 2, dtype=torch.float64)) for _ in range(3)]
    parameters[0].grad = torch.full((2, 2), float(rank + 1), dtype=torch.float64)
    if rank == 1:
        parameters[1].grad = torch.eye(2, dtype=torch.float64)
    total, stop = ranks.sum_gradients(parameters, torch.tensor([1.0, rank]), stop=rank == 0)
    assert total.tolist() == [size, sum(range(size))] and stop
    assert parameters[0].grad.tolist() == [[sum(range(1, size + 1))] * 2] * 2
    assert torch.equal(parameters[1].grad, torch.eye(2, dtype=torch.float64))
    assert parameters[2].grad is None

    ranks.check_same("images", "the same")
    expected = pytest.raises(TlcliError, match=r"process 2 of 3 sees other images than process 0")
    with expected if rank == 2 else nullcontext():
        ranks.check_same("images", "others" if rank == 2 else "the same")
    return 0


def test_ranks_exchange_values_rows_and_gradients(tmp_path: Path) -> None:
    ends = in_ranks(3, lambda rank: exchange(rank, 3), tmp_path)
    assert [code for code, _ in ends] == [0, 0, 0], ends


def test_a_spec_survives_json(spec: Compose) -> None:
    for words in ((), ("freeze=lora", "dataset=manifest", "dataset.file=a.csv", "dataset.range=[0,1]", "ema=0.9")):
        own = spec(*words)
        assert spec_from(json.loads(json.dumps(to_builtins(own)))) == own


# -- what each rank reads


@pytest.mark.parametrize("size", [2, *slow(3)])
def test_shares_are_the_batches_of_one_process(size: int, words: tuple[str, ...], spec: Compose) -> None:
    def loaders(rank: int, size: int) -> list[Any]:
        setting = Setting(spec(*words, *TINY, "freeze=last_stages", "cache.mode=require", "augment=none"))
        workload = replace(setting.workload, ranks=Ranks(rank, size))
        decisions = setting.opened.decisions
        ranked = Inputs(decisions, workload)
        for split in ranked.cached.values():
            for view in split.views:
                view.found = view.store.find(view.key)
        tensors = Mock(side_effect=lambda source, *others: workload.session.tensors(source.found))
        ranked._tensors = tensors  # type: ignore[method-assign]
        uncached = Inputs(structs.replace(decisions, cached=frozenset()), workload)
        return [ranked.open("train", Reporter()), uncached.open("train", Reporter())]

    for whole, *shares in zip(loaders(0, 1), *(loaders(rank, size) for rank in range(size)), strict=True):
        batches = list(whole.epoch(2))
        parts = [list(share.epoch(2)) for share in shares]
        assert [len(part) for part in parts] == [3] * size
        for i, ((x,), y) in enumerate(batches):
            for rank, part in enumerate(parts):
                assert torch.equal(part[i][0][0], x[rank::size]) and torch.equal(part[i][1], y[rank::size])
        assert [len(part[-1][1]) for part in parts] == [1, *[0] * (size - 1)]
        for part, share in zip(parts, shares, strict=True):
            again = list(share.epoch(2, start=1))
            assert all(torch.equal(a[0][0], b[0][0]) for a, b in zip(again, part[1:], strict=True))
        assert sorted(torch.cat([share.positions for share in shares]).tolist()) == list(range(17))


# -- training


def train_in_float64(spec: TrainSpec, folder: Path, cached: bool) -> int:
    """Train for 20 steps in float64; write the weights of this rank, and the logits of the training images."""
    rank, size = rank_and_size()
    ranks = join(rank, size) if size > 1 else ALONE
    accelerator, own = setup_process(spec.device), Session(Store(folder / "cache"), 10**9)
    workload = load_workload(spec, own.dataset(spec.dataset, 0, Reporter()), accelerator, own)
    names = frozenset({"train", "train_eval"} if cached else ())
    decisions = Decisions(train_precision="float32", eval_precision="float32", channels_last=True, cached=names)
    inputs = Inputs(decisions, replace(workload, ranks=ranks))
    inputs.device.place(workload.classifier.network)
    train, train_eval = (inputs.open(name, Reporter()) for name in ("train", "train_eval"))  # float32 activations
    network = workload.classifier.network.double()
    torch.set_default_dtype(torch.float64)
    torch.Tensor.float = torch.Tensor.double  # type: ignore[method-assign]
    normalize = Preprocessing.normalize
    Preprocessing.normalize = lambda *args: normalize(*args).double()  # type: ignore[method-assign]
    trainer, epoch, row = Trainer(inputs.workload, inputs.device), 0, {}
    while trainer.step < STEPS:
        epoch += 1
        row = trainer.fit(train, epoch, Reporter())
    predictions = evaluate(network, train_eval, inputs.device, Reporter(), "")
    result = {"row": torch.tensor([row["loss"], row["accuracy"]]), "logits": predictions.logits}
    result |= {name: tensor.contiguous() for name, tensor in network.state_dict().items()}
    save_file(result, folder / f"{rank}of{size}")
    return 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "cached"),
    [
        pytest.param(("freeze=none", "augment=basic", "optimizer=sgd"), False, id="uncached"),
        pytest.param(("freeze=last_stages", "augment=none", "optimizer=sgd", "accumulate=2"), True, id="cached"),
        pytest.param(("freeze=head", "augment=basic", "cache.views=2", "sampler=balanced"), True, id="head"),
    ],
)
def test_weights_are_those_of_one_process(own: tuple[str, ...], cached: bool, words, spec, tmp_path) -> None:
    job = spec(*words, *NETWORK, "epochs=20", *own)
    for size in (1, 2, 3):
        ends = in_ranks(size, lambda rank: train_in_float64(job, tmp_path, cached), tmp_path)
        assert [code for code, _ in ends] == [0] * size, ends
    alone = load_file(tmp_path / "0of1")
    for size in (2, 3):
        for rank in range(size):
            found = load_file(tmp_path / f"{rank}of{size}")
            assert max((found[name] - tensor).abs().max() for name, tensor in alone.items()) <= 1e-10


def test_two_processes_write_one_run(words: tuple[str, ...], tiny: tuple[str, ...], tmp_path: Path) -> None:
    own = (*tiny, "freeze=head", "epochs=1", "interpolate=1")
    code, text = train_in_ranks(2, [f"out='{tmp_path / 'runs'}'", *words, *own], tmp_path)
    assert code == 0, text
    (folder,) = {file.parent for file in tmp_path.rglob("run.json")}
    run = RunDir(folder)
    assert run.info["status"] == "done" and run.info["numerics"]["device"].startswith("2 processes, each with CPU")
    assert run.config()["device"]["processes"] == 2 and run.info["command"].endswith(" device.processes=2")
    assert run.test()["n"] == 5 and run.info["extraction"]["images"] == 25
    assert [row["split"] for row in rows(run)] == ["val", "train", "val", "test"]
    ends = in_ranks(2, lambda rank: main(["train", "--resume", str(folder)]), tmp_path)
    assert [code for code, _ in ends] == [0, 0] and "nothing to resume" in ends[0][1], ends


@pytest.mark.slow
def test_the_result_is_that_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A default run, with a first fit and a probe."""
    make_folder(tmp_path / "small/train", {"across": 9, "checks": 8}, seed=0)
    make_folder(tmp_path / "small/test", {"across": 3, "checks": 2}, seed=1)
    monkeypatch.setattr("tlcli.data.dataset.MIN_VALIDATION_IMAGES", 200)
    words = ("dataset=imagefolder", f"dataset.root='{tmp_path / 'small'}'", *SMALL)
    own = ("backbone.dropout=0", "augment=basic", "epochs=2", "cache.mode=off", "device.threads=1")
    for size in (1, 2):
        out = f"hydra.run.dir='{tmp_path / str(size)}'"
        assert train_in_ranks(size, [out, *words, *own], tmp_path)[0] == 0
    one, two = (RunDir(tmp_path / str(size)) for size in (1, 2))
    weights = [load_file(run.best_checkpoint) for run in (one, two)]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-3) for name in weights[0])
    assert one.test()["confusion"] == two.test()["confusion"]
    assert one.info["decisions"]["interpolate"] == two.info["decisions"]["interpolate"]
    assert "first fit" in two.info["seconds"]


@pytest.mark.slow
def test_activations_and_logits_are_those_of_one_process(words: tuple[str, ...], tmp_path, monkeypatch) -> None:
    entries, predictions = [], []
    monkeypatch.setattr("tlcli.engine.extraction.BATCH", {"cpu": 4})  # 5 batches, the last one smaller
    for size in (1, 2, 3):
        monkeypatch.setenv("TLCLI_CACHE", str(tmp_path / f"cache{size}"))
        out = f"hydra.run.dir='{tmp_path / str(size)}'"
        own = ("freeze=head", "epochs=1", "augment=basic", "cache.views=1", "interpolate=1")
        assert train_in_ranks(size, [out, *words, *own], tmp_path)[0] == 0
        entries.append({entry.key: entry.checksums for entry in Store(tmp_path / f"cache{size}").entries()})
        predictions.append(RunDir(tmp_path / str(size)).test_predictions.read_bytes())
    assert predictions[0] == predictions[1] == predictions[2]
    assert entries[0] == entries[1] == entries[2] and len(entries[0]) >= 3


# -- errors


def failing(words: tuple[str, ...], folder: Path, patch: Callable[[], None], rank: int = 1) -> tuple[int, str]:
    """Train in two processes, of which one is patched; return the code and the error line of rank 0."""

    def run(number: int) -> int:
        if number == rank:
            patch()
        return main(["train", f"hydra.run.dir='{folder / 'run'}'", *words, "freeze=head", "interpolate=1", "epochs=2"])

    code, text = in_ranks(2, run, folder)[0]
    return code, text.splitlines()[-1]


@pytest.mark.slow
def test_an_error_of_another_process_is_one_line_of_the_run(words: tuple[str, ...], tmp_path: Path) -> None:
    def patch() -> None:
        Trainer._step = Mock(side_effect=TlcliError("this process is broken"))  # type: ignore[method-assign]

    assert failing(words, tmp_path, patch) == (1, "tlcli train: this process is broken")
    info = read_json(tmp_path / "run/run.json")
    assert (info["status"], info["error"]) == ("failed", "this process is broken")


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run(words: tuple[str, ...], tmp_path: Path) -> None:
    def patch() -> None:
        Trainer._step = lambda *args: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign]

    code, line = failing(words, tmp_path, patch)
    assert code == 1
    assert "one of the 2 processes of the run was killed, or they cannot reach each other (" in line


@pytest.mark.slow
def test_the_reason_why_processes_cannot_reach_each_other_is_shown(words: tuple[str, ...], tmp_path: Path) -> None:
    def patch() -> None:
        torch.distributed.broadcast = Mock(side_effect=RuntimeError("NCCL error: no shared memory"))

    code, line = failing(words, tmp_path, patch, rank=0)
    assert code == 1 and line.endswith("cannot reach each other (NCCL error: no shared memory)")


@pytest.mark.slow
def test_processes_must_see_the_same_images(words: tuple[str, ...], tmp_path: Path) -> None:
    def patch() -> None:
        def other(*args: Any, **settings: Any) -> Dataset:
            data = load_dataset(*args, **settings)
            return replace(data, train=data.train.take(np.arange(len(data.train) - 1)))

        session.load_dataset = other

    code, line = failing(words, tmp_path, patch)
    assert code == 1
    assert "process 1 of 2 sees other train images than process 0" in line
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_is_not_used_by_any(words: tuple[str, ...], tmp_path, monkeypatch) -> None:
    def patch() -> None:
        Store.write = Mock(side_effect=OSError(28, "No space left on device"))  # type: ignore[method-assign]

    monkeypatch.setenv("TLCLI_CACHE", str(tmp_path / "cache"))
    code, line = failing(words, tmp_path, patch, rank=0)
    assert code == 0, line
    assert "reading images instead" in (tmp_path / "run/run.log").read_text()


@pytest.mark.slow
def test_activations_that_one_process_cannot_read_end_the_run(words: tuple[str, ...], tmp_path, monkeypatch) -> None:
    """If it alone read images instead, the processes would wait for each other."""

    def patch() -> None:
        session.Session.tensors = Mock(side_effect=OSError(5, "Input/output error"))  # type: ignore[method-assign]

    monkeypatch.setenv("TLCLI_CACHE", str(tmp_path / "cache"))
    code, line = failing(words, tmp_path, patch)
    assert (code, line) == (1, "tlcli train: cached activations cannot be read: [Errno 5] Input/output error")


@pytest.mark.parametrize(
    ("own", "said"),
    [
        ("device.processes=0", r"device\.processes=0: expected a whole number >= 1"),
        ("device.processes=9", r"device\.processes=9 is more than batch_size=8"),
        ("folds=3", r"device\.processes=2 does not work with folds"),
    ],
)
def test_words_that_cannot_be_followed(own: str, said: str, words: tuple[str, ...], capsys, tmp_path) -> None:
    out = f"hydra.run.dir='{tmp_path / 'run'}'"
    assert main(["train", out, *words, "device.processes=2", own]) == 2
    assert re.search(said, capsys.readouterr().err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["rank", "tune", "inspect"])
def test_other_commands_have_one_process(command: str, words: tuple[str, ...], capsys: Any) -> None:
    budget = ["budget=90s"] if command == "tune" else []
    assert main([command, *budget, *words[:2], "device.processes=2"]) == 2
    assert "device.processes=2: only `tlcli train` runs in several processes" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("own", "said"),
    [
        (("freeze.bn_stats=update",), "PyTorch synchronizes on CUDA only: set freeze.bn_stats=frozen"),
        (("dataset.train_per_class=2", "device.processes=5"), "device.processes=5 is more than the 4 training images"),
    ],
)
def test_what_shows_after_loading(own: tuple[str, ...], said: str, words: tuple[str, ...], tmp_path: Path) -> None:
    size = 5 if len(own) > 1 else 2
    argv = ["train", f"hydra.run.dir='{tmp_path / 'run'}'", *words, *own]
    code, text = in_ranks(size, lambda rank: main(argv), tmp_path)[0]
    assert code == 2 and said in text.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_torchrun_says_the_number_of_processes(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert with_processes(["epochs=1"]) == ["epochs=1"]
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    assert rank_and_size() == (0, 2)
    assert with_processes(["epochs=1"]) == ["epochs=1", "device.processes=2"]
    with pytest.raises(UsageError, match=r"device\.processes=3: 2 processes have been started"):
        with_processes(["device.processes=3"])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    assert main(["train", "-m", "seed=1,2"]) == 2
    for number, handler in handlers.items():  # it ignores them to its end
        signal.signal(number, handler)
    assert "a sweep runs its jobs with one process" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")
    for _ in range(2):
        with pytest.raises(UsageError, match="a run uses the devices of one machine"):
            join(0, 2)
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)  # then the processes may be anywhere


def test_each_process_needs_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UsageError, match=r"device=mps is not available: .* Available: .*cpu, auto\."):
        find_accelerator(Accelerator.mps)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_accelerator(Accelerator.auto, 2).type == "cuda"
    words = r"device\.processes=3: each process needs a device of its own, and cuda has 2"
    with pytest.raises(UsageError, match=words):
        find_accelerator(Accelerator.auto, 3)


@pytest.mark.parametrize(("given", "threads"), [(None, 2), ("4", 4)])
def test_the_cores_are_divided_unless_the_threads_of_a_process_are_given(given, threads, spec, monkeypatch) -> None:
    monkeypatch.setattr("tlcli.device.PROCESS_THREADS", 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if given:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    with limit_threads(None):
        setup_process(spec("device=cpu").device, processes=2)
        assert torch.get_num_threads() == threads


def test_norms_that_are_updated_are_synchronized(words: tuple[str, ...], tiny: tuple[str, ...], spec: Compose) -> None:
    """As far as a machine without CUDA shows."""
    setting = Setting(spec(*words, *tiny, "freeze=last_stages", "freeze.bn_stats=update"))
    network, names = setting.model.network, list(setting.model.network.state_dict())
    updated = setting.contract.updated_norms()
    assert 0 < len(updated) < sum(isinstance(m, nn.BatchNorm2d) for m in network.modules())
    setting.contract.synchronize_norms()
    synchronized = {name for name, m in network.named_modules() if isinstance(m, nn.SyncBatchNorm)}
    assert synchronized == set(updated) == set(setting.contract.updated_norms())
    assert list(network.state_dict()) == names


def test_a_batch_of_fewer_images_than_ranks_updates_no_statistics(words, tiny, spec, monkeypatch) -> None:
    """SyncBatchNorm of a rank without images would send values of another dtype."""
    monkeypatch.setattr(Ranks, "sum_gradients", lambda self, parameters, values, *, stop: (values, False))
    words += ("freeze=last_stages", "freeze.bn_stats=update", "cache.mode=off", "dataset.train_per_class=5")
    for rank, own in ((0, [(True, 3), (False, 1)]), (2, [(True, 2)])):  # of batches of 8 and 2 images
        setting, seen = Setting(spec(*words, *tiny)), []
        workload = replace(setting.workload, ranks=Ranks(rank, 3))
        inputs = Inputs(setting.opened.decisions, workload)
        trainer = Trainer(workload, inputs.device)
        trainer._synchronizes = True
        norm = next(iter(setting.contract.updated_norms().values()))
        norm.register_forward_hook(lambda norm, x, y, seen=seen: seen.append((norm.training, len(x[0]))))
        trainer.fit(inputs.open("train", Reporter()), 1, Reporter())
        assert seen == own


# -- the launcher


@pytest.mark.parametrize(("handler", "handled"), [(signal.SIG_IGN, False), (signal.SIG_DFL, True)])
def test_the_launcher_leaves_a_hangup_alone_that_nohup_ignores(handler, handled, monkeypatch) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "1")  # which it sets otherwise
    monkeypatch.setattr("torch.distributed.launcher.api.elastic_launch", start := Mock())
    previous = signal.signal(signal.SIGHUP, handler)
    try:
        assert launch(2, ["epochs=1"]) == 0
    finally:
        signal.signal(signal.SIGHUP, previous)
    names = start.call_args.args[0].signals_to_handle.split(",")
    assert ("SIGTERM" in names, "SIGHUP" in names) == (True, handled)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("start", "number"),
    [
        *[("launch", number) for number in (None, signal.SIGINT, signal.SIGTERM)],
        *[("torchrun", number) for number in (None, signal.SIGINT)],
        ("launch, with workers", signal.SIGTERM),
    ],
)
def test_processes_are_started_and_stopped(start: str, number: signal.Signals | None, words, tmp_path) -> None:
    run, argv = RunDir(tmp_path / "run"), [*words, "freeze=head", "interpolate=1"]
    if start != (start := start.partition(",")[0]):
        argv += ["cache.mode=off", "device.workers=1"]
    argv += ["epochs=2" if number is None else "epochs=100000", f"hydra.run.dir='{run.path}'"]
    command = [sys.executable, "-m", "tlcli", "train", *argv, "device.processes=2"]
    if start == "torchrun":
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "tlcli", "train", *argv]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while number is not None and process.poll() is None and not run.metrics_file.exists():
        time.sleep(0.01)
    if number is not None:
        process.send_signal(number)
    out, err = process.communicate(timeout=200)
    line = err.splitlines()[-1] if err else ""
    if start == "launch":
        assert process.returncode == {None: 0, signal.SIGINT: 130, signal.SIGTERM: 143}[number]
        expected = {None: "", signal.SIGINT: "interrupted: resume", signal.SIGTERM: "terminated"}
        assert line.removeprefix("tlcli train: ").startswith(expected[number])
        assert err.count("\n") == (number is not None)
    assert run.info["status"] == ("done" if number is None else "interrupted"), (out, err)
    assert number is None or run.state_file.exists()
