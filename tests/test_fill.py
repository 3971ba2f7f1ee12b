"""Entries that are filled in shards equal those of one process, and no shard reads more than its own images."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import nullcontext
from itertools import count
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY, Compose, finish, make_folder
from tests.data.samples import pack_parquet, pack_tar
from tlcli import fill
from tlcli.cli import main
from tlcli.engine import activations, extraction
from tlcli.engine.session import Session
from tlcli.errors import TlcliError, UsageError
from tlcli.fill import Plan, complete, fill_shard, plan_file, read_plan, run_shards, write_plan
from tlcli.reporter import Reporter
from tlcli.runs.run_dir import read_json
from tlcli.specs import TrainSpec
from tlcli.store import Store
from tlcli.train import NewRun, load_inputs

NETWORK = (*TINY, "image.size=32", "device.precision=fp32")
VIEWS = ("augment=basic", "cache.views=2")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(extraction.BATCH, "cpu", 4)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Make 17 images of train, a prime, and 5 of test."""
    make_folder(tmp_path / "photos/train", {"across": 9, "checks": 8}, seed=0)
    make_folder(tmp_path / "photos/test", {"across": 3, "checks": 2}, seed=2)
    return tmp_path / "photos"


@pytest.fixture
def make_spec(spec: Compose, photos: Path) -> Callable[..., TrainSpec]:
    folder = ("dataset=imagefolder", f"dataset.root='{photos}'")

    def make(*words: str) -> TrainSpec:
        data = () if any(word.startswith("dataset=") for word in words) else folder
        if form := {"webdataset", "parquet"} & {word.removeprefix("dataset=") for word in words}:
            pack = {"webdataset": pack_tar, "parquet": pack_parquet}[min(form)]
            root = photos.parent / min(form)
            for split in ("train", "test") if not root.exists() else ():
                pack(photos / split, root / f"{split}.{'tar' if pack is pack_tar else 'parquet'}")
            data = (f"dataset.root='{root}'",)
        return spec(*data, *NETWORK, "freeze=head", "cache.mode=require", "freeze.head_init=random", *words)

    return make


@pytest.fixture
def planned(make_spec: Callable[..., TrainSpec], tmp_path: Path) -> Callable[..., tuple[Path, Plan, Store]]:
    """planned(3): the file of a plan with three shards, the plan and its store."""

    def make(shards: int, *words: str) -> tuple[Path, Plan, Store]:
        spec, session = make_spec(*words), Session(Store(tmp_path / "cache"), 0)
        write_plan(spec, shards, session, Reporter())
        file = plan_file(session.store, spec, shards)
        return file, read_plan(file), session.store

    return make


def digests_of(store: Store) -> dict[str, list[str]]:
    """Return the SHA-256 of the columns of all entries by key."""
    columns = {entry.key: map(entry.file, range(len(entry.columns))) for entry in store.entries()}
    return {key: [hashlib.sha256(file.read_bytes()).hexdigest() for file in files] for key, files in columns.items()}


@pytest.mark.parametrize(
    ("shards", "words"),
    [
        (3, VIEWS),
        pytest.param(3, (), marks=pytest.mark.slow),
        pytest.param(1, (), marks=pytest.mark.slow),
        pytest.param(64, (), marks=pytest.mark.slow),
        pytest.param(2, ("dataset=digits", "dataset.train_per_class=3"), marks=pytest.mark.slow),
        pytest.param(3, ("dataset=webdataset",), marks=pytest.mark.slow),
        pytest.param(3, ("dataset=parquet", "folds=2"), marks=pytest.mark.slow),
    ],
)
def test_shards_are_the_entry_of_one_process(shards: int, words: tuple[str, ...], planned, make_spec, tmp_path) -> None:
    one = Session(Store(tmp_path / "one"), 0)
    inputs = load_inputs(make_spec(*words), one, Reporter(), NewRun())
    for name in sorted(inputs.cached):
        inputs.open(name, Reporter())
    file, plan, store = planned(shards, *words)
    order = random.Random(shards).sample(range(shards), shards)
    assert complete(plan, store) == [i for i in range(shards) if any(i in e.shard_keys for e in plan.entries)]
    rows = [fill_shard(file, shard, 1.0)[0] for shard in order]
    assert sum(rows) == sum(entry.bounds[-1] for entry in plan.entries) == sum(map(len, inputs.sources()))
    assert complete(plan, store) == []
    assert digests_of(store) == digests_of(one.store)  # and nothing is left of the shards
    lists = {f"{key}.json" for entry in plan.entries for key in entry.shard_keys.values()}
    assert not lists & {path.name for path in store.plans.iterdir()}
    assert {e.key: e.metadata for e in store.entries()} == {e.key: e.metadata for e in one.store.entries()}


def test_a_shard_reads_the_images_of_its_own(planned, photos: Path) -> None:
    file, plan, _ = planned(3)
    for entry in plan.entries:  # keep the images of shard 1 alone
        own, _ = json.loads(file.with_name(f"{entry.shard_keys[1]}.json").read_bytes())
        for path in (photos / entry.split.split("+")[0]).rglob("*.png"):
            if path.relative_to(photos).as_posix() not in own:
                path.unlink()
    assert fill_shard(file, 1, 1.0)[0] > 0
    with pytest.raises(TlcliError, match="no such file"):
        fill_shard(file, 0, 1.0)


def test_shards_that_exist_are_skipped_and_damaged_ones_are_not(planned) -> None:
    file, plan, store = planned(3)
    assert [bool(fill_shard(file, shard, 1.0)[0]) for shard in (0, 1, 0, 1)] == [True, True, False, False]
    assert complete(plan, store) == [2]
    entry = store.find(plan.entries[0].shard_keys[1])
    fill_shard(file, 2, 1.0)
    data = entry.file(0).read_bytes()
    entry.file(0).write_bytes(bytes([data[0] ^ 1]) + data[1:])
    assert complete(plan, store) == [1]
    assert fill_shard(file, 1, 1.0)[0] == entry.rows
    assert complete(plan, store) == []
    assert fill_shard(file, 1, 1.0)[0] == 0


def test_images_that_change_end_the_shard_and_the_next_plan_has_no_shards_of_them(planned, photos: Path) -> None:
    file, plan, store = planned(3)
    fill_shard(file, 0, 1.0)
    assert len(store.entries()) == len([e for e in plan.entries if 0 in e.shard_keys]) > 0
    last = sorted((photos / "train/checks").iterdir())[-1]
    shutil.copy(photos / "train/across/000.png", last)
    with pytest.raises(TlcliError, match="have changed since the plan was written"):
        fill_shard(file, 2, 1.0)
    _, other, _ = planned(3)
    kept = {key for entry in other.entries for key in entry.shard_keys.values()}
    assert {entry.key for entry in store.entries()} <= kept
    assert {path.stem for path in store.plans.iterdir()} == {*kept, file.stem}


def test_shards_of_another_number_of_shards_are_removed(planned) -> None:
    file, plan, store = planned(3)
    fill_shard(file, 0, 1.0)
    assert store.entries()
    file, plan, _ = planned(2)
    assert store.entries() == [] and complete(plan, store) == [0, 1]


def test_a_machine_that_would_compute_other_rows_is_refused(planned, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _, store = planned(2)
    version = activations.version
    monkeypatch.setattr(activations, "version", lambda name: version(name) + ("+other" if name == "timm" else ""))
    with pytest.raises(TlcliError, match="are not those of the plan"):
        fill_shard(file, 0, 1.0)
    assert store.entries() == []


def test_room_is_checked_for_the_shards_and_the_entry(make_spec: Callable[..., TrainSpec], tmp_path: Path) -> None:
    spec = make_spec()
    nbytes = sum(s.nbytes for s in load_inputs(spec, Session(Store(tmp_path), 0), Reporter(), NewRun()).sources())
    with pytest.raises(UsageError, match="have no room"):
        write_plan(spec, 2, Session(Store(tmp_path / "small", 1.2 * nbytes / 1e9), 0), Reporter())


def fill_or_die(file: Path, shard: int, max_gb: float) -> tuple[int, float]:
    """Fill a shard; the process that is the first to fill shard 1 is killed after its first batch."""
    log = file.with_suffix(".log")
    with log.open("a") as lines:
        lines.write(f"{shard}\n")
    if shard == 1 and log.read_text().split().count("1") == 1:
        extract, calls = extraction.Extractor.__call__, count()

        def die(self: extraction.Extractor, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
            if next(calls) == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return extract(self, images)

        extraction.Extractor.__call__ = die  # type: ignore[method-assign]
    return fill_shard(file, shard, max_gb)


def test_a_damaged_list_of_images_asks_for_another_plan(planned) -> None:
    file, plan, _ = planned(2)
    (file.parent / f"{plan.entries[0].shard_keys[0]}.json").write_bytes(b"")
    with pytest.raises(TlcliError, match=r"cannot be read; write the plan again with --shards"):
        fill_shard(file, 0, 100)


def test_a_shard_needs_a_core_even_if_no_node_has_one_yet(planned, monkeypatch: pytest.MonkeyPatch) -> None:
    file, _, store = planned(2)
    asked: list[float] = []
    monkeypatch.setattr(fill, "ray_cluster", lambda: nullcontext([0]))
    monkeypatch.setattr(fill, "run_tasks", lambda *args, cpus, **options: asked.append(cpus) or [])
    assert list(run_shards(file, [0, 1], store, Reporter(), on_ray=True)) == []
    assert asked == [1]


@pytest.mark.slow
def test_a_killed_ray_worker_costs_its_shard_and_no_more(planned, make_spec, tmp_path, monkeypatch) -> None:
    """On two nodes of one core each."""
    words, n_threads = ("device.threads=1",), torch.get_num_threads()
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    one = Session(Store(tmp_path / "one"), 0)
    inputs = load_inputs(make_spec(*words), one, Reporter(), NewRun())
    for name in sorted(inputs.cached):
        inputs.open(name, Reporter())
    file, plan, store = planned(2, *words)
    monkeypatch.setattr(fill, "fill_shard", fill_or_die)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        cluster.add_node(num_cpus=1)
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)
        rows = dict(run_shards(file, [0, 1], store, Reporter(), on_ray=True))
    finally:
        cluster.shutdown()
        torch.set_num_threads(n_threads)
    assert sorted(file.with_suffix(".log").read_text().split()) == ["0", "1", "1"]
    assert {shard: result[0] for shard, result in rows.items()} == {
        shard: sum(e.bounds[shard + 1] - e.bounds[shard] for e in plan.entries) for shard in (0, 1)
    }
    assert complete(plan, store) == []
    assert digests_of(store) == digests_of(one.store)


@pytest.mark.slow
def test_a_run_reads_what_an_array_job_has_filled(photos: Path, tmp_path, monkeypatch, capsys) -> None:
    words = ["dataset=imagefolder", "dataset.root=photos", "backbone.weights=none", "image.size=32", "epochs=1"]
    monkeypatch.setenv("TLCLI_CACHE", str(tmp_path / "own cache"))
    monkeypatch.chdir(tmp_path)
    assert main(["cache", "fill", *words, "--shards", "3", "--engine", "slurm"]) == 0
    script = capsys.readouterr().out
    assert "#SBATCH --array=0-2\n" in script
    for shard in (2, 0, 1):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(shard)}
        done = subprocess.run(["bash"], input=script, env=environment, text=True, capture_output=True, cwd="/")
        assert done.returncode == 0, done.stderr
        assert main(["cache", "fill", *words, "--shards", "3", "--engine", "slurm"]) == 0
        array = {2: "#SBATCH --array=0,1\n", 0: "#SBATCH --array=1\n", 1: "the cache has "}[shard]
        printed = capsys.readouterr()
        assert array in (printed.out if shard != 1 else printed.err)  # sbatch reads stdout
    assert f"tlcli train {' '.join(words)} freeze=head" in done.stdout
    monkeypatch.setattr(activations.SplitActivations, "_extract", lambda *args: pytest.fail("a run extracts"))
    run = finish(tmp_path / "run", *words, "freeze=head")
    info = read_json(run / "run.json")
    assert info["extraction"] is None
    keys = {key for keys in info["cache"]["entries"].values() for key in keys}
    assert keys == {entry.key for entry in Store(tmp_path / "own cache").entries()}
