"""Which splits are cached, why, and what replaces a decision that cannot be followed. Results do not depend on it."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import chain, count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from msgspec import structs, to_builtins

from tests.conftest import Compose, Notes
from tlcli.cli import main
from tlcli.device import ComputeFormat, allowed_formats
from tlcli.engine import decisions, numerics
from tlcli.engine.activations import SplitActivations, Workload, image_size
from tlcli.engine.decisions import decide, follow, recorded_decisions
from tlcli.engine.inputs import SPLIT_NAMES, Inputs
from tlcli.engine.session import Session
from tlcli.engine.trainer import Trainer
from tlcli.reporter import Reporter
from tlcli.runs.run_dir import read_json
from tlcli.store import Store
from tlcli.transfer.contract import apply_freeze

CPU = torch.device("cpu")
FP32 = ("device.precision=fp32", "device.channels_last=true")


class Ended(SimpleNamespace):
    """The end of a run: `shown` is stdout with its lines unwrapped, `record` is run.json."""


@pytest.fixture
def cold(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Use an empty cache and return its folder of activations, which does not exist yet."""
    monkeypatch.setenv("TLCLI_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache/activations"


@pytest.fixture
def run(tmp_path, monkeypatch, shapes: Path, tiny: tuple[str, ...], capsys, no_plots: None) -> Callable[..., Ended]:
    """run("freeze=head"): an epoch on the shapes at 32 px."""
    monkeypatch.chdir(tmp_path)
    outs = (tmp_path / f"run{i}" for i in count())

    def one(*overrides: str) -> Ended:
        out = next(outs)
        words = ["dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", "epochs=1", *tiny, *FP32]
        capsys.readouterr()
        code = main(["train", f"hydra.run.dir='{out}'", *words, *overrides])
        shown, error = capsys.readouterr()
        ended = Ended(code=code, shown=re.sub(r"\n +", " ", shown), error=error)
        if code == 0:
            ended.record, ended.test = read_json(out / "run.json"), read_json(out / "test.json")
            ended.weights = (out / "checkpoints/last.safetensors").read_bytes()
        return ended

    return one


def activations_line(ended: Ended) -> str:
    (line,) = [line for line in ended.shown.splitlines() if line.startswith("activations: ")]
    return line


# -- modes


def test_require_says_in_one_line_why_it_cannot(run, cold: Path) -> None:
    for words, why in (
        (("freeze=none",), "cache.mode=require: "),
        (("freeze=head", "augment=basic"), "cache.mode=require: augment=crop .*cache.views=8"),
        (("freeze=head", "augment.mixup=0.2"), "cache.mode=require: augment.mixup and augment.cutmix mix images"),
        (("freeze=head", "cache.max_gb=0"), "cache.mode=require: .*over cache.max_gb=0"),
    ):
        ended = run(*words, "cache.mode=require")
        assert (ended.code, ended.error.count("\n")) == (2, 1)
        assert re.search(why, ended.error)


# -- what is there is read


@pytest.mark.parametrize(
    ("words", "cached", "images"),
    [
        (("freeze=head",), "", 84),
        pytest.param(("freeze=none",), "train_eval", 54, marks=pytest.mark.slow),
        pytest.param(("freeze=head", "augment=basic"), "train_eval, val, test", 84, marks=pytest.mark.slow),
        pytest.param(("freeze=head", "augment=basic", "cache.views=2", "epochs=2"), "", 192, marks=pytest.mark.slow),
    ],
)
def test_the_second_run_reads_what_the_first_computed(words: tuple[str, ...], cached: str, images, run, cold) -> None:
    """The probe reads features if nothing is frozen, evaluation reads activations if training does not, or views."""
    first, second = run(*words), run(*words)
    assert first.record["extraction"]["images"] == images
    assert second.record["extraction"] is None
    assert first.record["cache"]["used"] is (not cached)
    names = f" ({cached})" if cached else ""
    assert activations_line(first).startswith(f"activations: computed once and cached{names}: ")
    assert activations_line(second).startswith(f"activations: read from cache{names}: ")
    assert first.weights == second.weights
    assert {path.name for path in cold.iterdir()} == set(chain(*first.record["cache"]["entries"].values()))


@pytest.mark.slow
def test_the_test_set_is_run_once_and_when_training_is_over(run, cold: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    extract, fit = SplitActivations._extract, Trainer.fit

    def noted(name: Callable[..., str], call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda self, *args: events.append(name(self)) or call(self, *args)

    monkeypatch.setattr(SplitActivations, "_extract", noted(lambda one: one.metadata["split"], extract))
    monkeypatch.setattr(Trainer, "fit", noted(lambda one: "fit", fit))
    run("freeze=head", "epochs=2")
    assert events == ["train+val", "fit", "fit", "test"]
    events.clear()
    run("freeze=head")
    assert events == ["fit"]


# -- decisions


@pytest.fixture
def plan(spec: Compose, shapes: Path, tiny: tuple[str, ...], tmp_path, monkeypatch) -> Callable[..., Inputs]:
    """Return the plan of a run on a machine with this speed in images per second; nothing is measured."""
    store = Store(tmp_path / "planned")

    def make(speed: float, *overrides: str, needs_probe: bool = False) -> Inputs:
        def chosen(workload: Workload, *args: object, **more: object) -> ComputeFormat:
            (option,) = allowed_formats(workload.spec.device, workload.accelerator)
            return replace(option, images_per_second=speed, reason="as the test says")

        monkeypatch.setattr(numerics, "_fastest", chosen)
        own = spec("dataset=imagefolder", f"dataset.root='{shapes}'", "image.size=32", *tiny, *FP32, *overrides)
        session = Session(store, 10**9)
        data = session.dataset(own.dataset, own.seed, Reporter())
        model = session.model(own.backbone, data.classes, size=image_size(own), seed=own.seed)
        contract = apply_freeze(own.freeze, model)
        workload = Workload(data, model, contract, own, CPU, session, needs_probe)
        return Inputs(decide(workload), workload)

    return make


@pytest.mark.slow
def test_caching_is_chosen_if_it_is_faster(plan, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or if the rows are small, or required."""
    assert {*plan(1e9, "freeze=head", "epochs=1").cached} == {"train", "train_eval", "val", "test"}
    monkeypatch.setattr(decisions, "SMALL_ROW_BYTES", 0)
    words = ("freeze=last_stages", "augment=none")
    slow, fast = (plan(speed, *words, "epochs=5") for speed in (10.0, 1e9))
    assert {*slow.cached} == {"train", "train_eval", "val"}  # test is read once: not worth writing
    assert slow.summary.startswith("computed once and cached: ")
    assert fast.cached == {}
    assert re.match(r"[\d.]+ [kM]?B per image: the frozen layers would take about \d+ s", fast.cache_info["why"])
    assert fast.summary == f"training reads images: {fast.cache_info['why']}"
    assert plan(1e9, *words, "cache.mode=require").cache_info["used"] is True
    monkeypatch.setattr(decisions, "WRITE_SECONDS_PER_BYTE", 2e-6)
    assert [plan(100.0, *words, f"epochs={n}").cache_info["used"] for n in (1, 100)] == [False, True]


# -- room


@pytest.mark.slow
def test_the_cache_never_exceeds_its_size(run, cold: Path) -> None:
    """Set a limit in which train and val fit, or test, but not all of them."""
    none = run("freeze=head", "cache.max_gb=0")
    assert (none.code, none.record["cache"]["used"], list(cold.glob("*"))) == (0, False, [])
    assert "over cache.max_gb=0" in none.record["cache"]["why"]
    assert activations_line(none) == f"activations: training reads images: {none.record['cache']['why']}"
    ended = run("freeze=head", "cache.max_gb=0.00007")
    assert ended.code == 0, ended.error
    assert sum(file.stat().st_size for file in cold.rglob("*.bin")) <= 70_000
    assert ended.record["cache"]["used"] is True
    assert sorted(ended.record["decisions"]["cached"]) == ["train", "train_eval", "val"]
    assert re.search(r"; test reads images: 86.0 kB is over cache.max_gb", activations_line(ended))


# -- recorded decisions


def test_decisions_are_read_back_and_followed(plan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda network, **options: network)
    planned = plan(10.0, "freeze=head")
    recorded = json.loads(json.dumps({"decisions": to_builtins(planned.decisions)}))
    assert recorded_decisions(recorded) == planned.decisions
    recorded["decisions"] |= {"extraction_batch": 7, "compiled": ["test"]}
    decisions = recorded_decisions(recorded)
    reporter = Notes()
    assert follow(decisions, planned.workload, reporter, SPLIT_NAMES) == decisions
    inputs = Inputs(decisions, planned.workload)
    assert {view.batches.batch_size for split in inputs.cached.values() for view in split.views} == {7}
    inputs.open("test", reporter)
    assert reporter.notes == ["extraction: compiling, about 12 s"]


@pytest.mark.parametrize(
    "info",
    [{}, {"precision": "fp32"}, {"decisions": {}}, {"decisions": None}, {"decisions": {"train_precision": "int4"}}],
)
def test_other_contents_are_no_decisions(info: dict[str, Any]) -> None:
    assert recorded_decisions(info) is None


def test_what_cannot_be_followed_is_replaced_with_a_note(plan, monkeypatch: pytest.MonkeyPatch) -> None:
    planned = plan(10.0, "freeze=head")
    recorded = structs.replace(planned.decisions, train_precision="bfloat16")
    reporter = Notes()
    monkeypatch.setattr(planned.workload.session.store, "max_gb", 0)
    followed = follow(recorded, planned.workload, reporter, SPLIT_NAMES)  # device.precision=fp32 has no bfloat16
    assert (followed.train_precision, followed.cached) == ("float32", frozenset())
    assert len(reporter.notes) == 2
    assert "training in float32" in reporter.notes[0] and "does not allow bfloat16" in reporter.notes[0]
    assert "over cache.max_gb=0" in reporter.notes[1] and followed.reasons["train"] in reporter.notes[1]
