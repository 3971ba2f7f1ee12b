"""The benchmarks run: on small data here, at full size by hand."""

import json
import math
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import BayesianRidge

from benchmarks import (
    baselines,
    cached,
    comparison,
    extraction,
    limits,
    memory,
    million,
    photographs,
    prediction,
    quality,
    ranking,
    ranks,
    run,
    scaling,
    shards,
    source_target,
    training,
    tutorial_job,
    unknown,
)
from tests.conftest import make_folder
from tlcli.cli import main

pytestmark = pytest.mark.slow


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Make a data folder for the benchmarks, with twelve images per class."""
    classes = dict.fromkeys(f"{source_target.SOURCE},{source_target.TARGET}".split(","), 12)
    for name, splits, counts in (
        ("cifar10", ("train", "test"), classes),
        ("hymenoptera", ("train", "val"), {"ants": 12, "bees": 12}),
    ):
        for split in splits:
            make_folder(tmp_path / name / split, counts)
    return tmp_path


@pytest.fixture
def in_process(no_plots: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run tlcli and baselines in this process, since the start of one takes most of the time of a small run."""

    def run_here(command: Sequence[str], environment: Mapping[str, str], cwd: Path | None = None) -> run.Ended:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            began = time.perf_counter()
            assert main(list(command[3:])) == 0
        return run.Ended(time.perf_counter() - began, 1.0)

    for module in (run, prediction, quality):
        monkeypatch.setattr(module, "whole_process", run_here)
    for module in (cached, extraction):  # timm leaves files open, which is an error here
        monkeypatch.setattr(module, "alone", lambda function, **words: {**function(**words), "process_seconds": 1.0})


PARTS = {extraction: 2, training: 2, cached: 5, tutorial_job: 2, scaling: 1, memory: 1, prediction: 2, photographs: 2}


@pytest.mark.parametrize(("benchmark", "rows"), PARTS.items())
def test_part_of_the_suite_measures_its_bars(benchmark, rows: int, data: Path, tmp_path, monkeypatch, request) -> None:
    if benchmark is not tutorial_job:
        request.getfixturevalue("in_process")
    if benchmark in (extraction, training):  # one network of two, and a sixth of the sweep: each run takes seconds
        monkeypatch.setattr(benchmark, "BACKBONES", {"resnet18": run.BACKBONES["resnet18"]})
    monkeypatch.setattr(cached, "SMALL", replace(cached.SMALL, grid=("optimizer.lr=1e-3,3e-3",)))
    measures = benchmark.main(data, tmp_path / "out", small=True)
    assert len(measures) == rows
    assert all(math.isfinite(value) for measure in measures for value in measure.seen)
    name = benchmark.__name__.split(".")[1]
    written = json.loads((tmp_path / "out" / f"{name}_measures.json").read_text())
    assert [row["measure"] for row in written["rows"]] == [measure.what for measure in measures]


@pytest.mark.parametrize(("kind", "how"), [("training", ranks.RANKS), ("extraction", ranks.ONE)])
def test_ways_to_run_are_measured(kind: str, how: str, data: Path, tmp_path: Path) -> None:
    assert ranks.speed(kind, how, data / "cifar10", tmp_path / "run", ranks.SMALL) > 0


@pytest.mark.skipif(find_spec("ray") is None, reason="Ray is not installed")
def test_a_cluster_of_ray_fills_shards(data: Path) -> None:
    assert run.alone(shards.fill, root=str(data / "cifar10"), nodes=1, size=32, shards=2)["images_per_second"] > 0


def test_bare_loop_and_tutorial_see_the_same_images(tmp_path: Path) -> None:
    make_folder(tmp_path, {"a": 2, "b": 2})
    x, y = baselines.in_memory(str(tmp_path))
    batch = baselines.network_input(x, 32)  # their own size: no resizing
    data = baselines.tutorial_data(str(tmp_path), 32)
    assert torch.allclose(batch, torch.stack([image for image, _ in data]), atol=1e-5)
    assert y.tolist() == [label for _, label in data]


def test_limits_count_the_work_of_a_forward_pass() -> None:
    assert limits.forward_gflop(224) == pytest.approx(3.6, rel=0.02)  # He et al. 2016: 1.8 billion multiply-adds
    assert min(limits.matrix_gflops(64, repeats=1).values()) > 0


def test_comparison_tells_a_better_recipe_from_an_equal_one(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rows = []
    for task, seed in [(task, seed) for task in "abcd" for seed in range(3)]:
        base = generator.random(300) < 0.7
        recipes = {"base": base, "better": base | (generator.random(300) < 0.3), "equal": generator.permutation(base)}
        for recipe, correct in recipes.items():
            for commit, bits, seconds in (("old", ~correct, 9), ("new", correct, 20 if recipe == "base" else 30)):
                row = {"commit": commit, "machine": "m", "task": task, "recipe": recipe, "seed": seed, "n": 300}
                figures = {"accuracy": bits.mean(), "correct": np.packbits(bits).tobytes().hex(), "seconds": seconds}
                rows.append({**row, **figures, "n_train": 9, "other_source": None})
    comparison.tables(rows, "base", tmp_path)
    tables = {name: json.loads((tmp_path / f"{name}.json").read_text())["rows"] for name in ("accuracy", "differences")}
    assert tables["accuracy"][-1]["base (new)"].endswith(", 80 s")
    (better, equal) = (
        [float(n) for n in re.findall(r"[-+][\d.]+", " ".join(row.values()))] for row in tables["differences"]
    )
    assert 0 < better[1] < better[0] < better[2] and better[0] == pytest.approx(100 * 0.3 * 0.3, abs=2)
    assert equal[1] < 0 < equal[2]
    assert all(row["time over its time"] == "1.50x" for row in tables["differences"])
    for row in json.loads((tmp_path / "differences_per_task.json").read_text())["rows"]:
        p_values = {name: float(row[name].split("= ")[1].rstrip(")")) for name in ("better", "equal")}
        assert p_values["better"] < 0.001 and p_values["equal"] > 0.05


def test_holm_and_mcnemar_are_those_of_the_textbook() -> None:
    assert comparison.holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    values = np.array([[1] * 8 + [0] * 5, [1, -1] * 4 + [0] * 5])
    assert comparison.mcnemar(values) == pytest.approx(2 * 2 * 0.5**8)  # two seeds, two-sided, 8 of 8


def test_quality_skips_runs_that_have_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for split in ("train", "test"):
        make_folder(tmp_path / "cells" / split, {"a": 3, "b": 3})
    seeds = []

    def stand_in(recipe, task, folder: Path, seed: int, run: Path, budget) -> tuple[dict[str, bool], float]:
        seeds.append(seed)
        return {f"{file.parent.name}/{file.name}": file.parent.name == "a" for file in folder.glob("test/*/*")}, 2.5

    monkeypatch.setattr(quality.Recipe, "train", stand_in)
    rows = tmp_path / "rows.jsonl"
    for chosen, beside in (([0], False), ([0, 1], True), ([0, 1], True), ([0, 1], False), ([0, 1], False)):
        quality.measure(quality.Recipe(), tmp_path, tmp_path, rows, chosen, ["cells"], beside)
    assert seeds == [0, 1, 1]  # a run without seconds is repeated for them
    assert [(row["seed"], row["seconds"]) for row in quality.read(rows)] == [(0, 2.5), (1, None), (1, 2.5)]
    assert comparison.is_correct(quality.read(rows)[0]).tolist() == [1, 1, 1, 0, 0, 0]


def test_tasks_hold_out_the_same_test_images_and_draw_others_for_training(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(quality, "TEST_PER_CLASS", 4)
    make_folder(tmp_path / "mri" / "test", {"a": 2, "b": 2}, seed=1)
    make_folder(tmp_path / "mri" / "train", {"a": 12, "b": 12})
    for file in sorted((tmp_path / "mri" / "train").glob("*/*")):
        shutil.copy(file, file.with_stem(f"{file.stem}-copy"))
    first, again, other = (quality.mri(5, tmp_path, seed) for seed in (0, 0, 1))
    splits = [{name: file for name, file in first.items() if name.startswith(split)} for split in ("train/", "test/")]
    train, test = ({file.read_bytes() for file in split.values()} for split in splits)
    assert first == again and first != other and splits[1].items() <= other.items()
    assert len(splits[0]) == 10 and len(splits[1]) == 12 and not train & test
    counts = [name.split("/")[0] for name in quality.digits(tmp_path, 0)]
    assert (counts.count("train"), counts.count("test")) == (1437, 360)


def test_quality_runs_both_recipes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (data / "hymenoptera").rename(data / "cells")
    (data / "cells" / "val").rename(data / "cells" / "test")
    words = [str(data), "--small", "--tasks", "cells", "--seeds", "0", "--out", str(tmp_path), "--base", "default"]
    quality.main([*words, "--", "augment=none"])
    quality.main([*words, "--recipe", quality.TUNED])
    rows = quality.read(tmp_path / "quality.jsonl")
    assert [(row["recipe"], row["n"], row["n_train"]) for row in rows] == [("default", 24, 24), ("tuned loop", 24, 24)]
    assert all(row["seconds"] > 0 and 0 <= row["accuracy"] <= 1 for row in rows)
    assert "| tuned loop | 1 |" in capsys.readouterr().out


def test_logme_and_h_score_are_higher_if_features_tell_the_classes_apart() -> None:
    generator, labels = np.random.default_rng(0), np.repeat([0, 1, 2], 40)
    noise = generator.normal(size=(120, 16)).astype(np.float32)
    apart = noise + 2 * np.eye(3, 16, dtype=np.float32)[labels]
    for score in (ranking.log_evidence, ranking.h_score):
        assert score(apart, labels) > score(noise, labels)
    scores = []
    for label in (0, 1, 2):  # scikit-learn has the same evidence, without its priors
        regression = BayesianRidge(
            compute_score=True, fit_intercept=False, alpha_1=0, alpha_2=0, lambda_1=0, lambda_2=0
        )
        scores.append(regression.fit(apart, labels == label).scores_[-1] / 120)
    assert ranking.log_evidence(apart, labels) == pytest.approx(np.mean(scores), abs=1e-3)


def test_regret_is_zero_for_the_best_candidate() -> None:
    truth = {"a": 0.9, ranking.LARGEST: 0.8, "c": 0.4}
    values = {"accuracy": 0.5, "logme": 0.0, "h": 1.0, "run_seconds": 10.0}
    scores = {"a": values | {"run_seconds": 4.0}, ranking.LARGEST: values | {"logme": 1.0}, "c": values | {"h": 2.0}}
    found = ranking.regrets(truth, {"scores": scores, "choice": "a"})
    expected = (("tlcli rank", (0, 0.4)), ("the largest", (0.1, 1)), ("LogME", (0.1, 1)), ("H-score", (0.5, 1)))
    for name, pair in (*expected, ("chance", (0.2, 0.8))):
        assert found[name] == pytest.approx(pair), name


def test_no_choice_within_a_share_of_the_time_has_a_smaller_regret() -> None:
    truth = {"slow": 0.9, ranking.LARGEST: 0.8, "fast": 0.4}
    seconds = {"slow": 5.0, ranking.LARGEST: 10.0, "fast": 1.0}
    found = [{"scores": {name: {"run_seconds": value} for name, value in seconds.items()}}] * 2
    by_share = [(0.5, [(0, 0.5), (0, 0.5)]), (0.4, [(0.5, 0.1), (0, 0.5)]), (0.01, [(0.5, 0.1), (0.5, 0.1)])]
    for share, expected in by_share:
        chosen = sorted(ranking.best_within(share, [truth, truth], found), reverse=True)
        assert chosen == [pytest.approx(pair) for pair in expected], share


@pytest.mark.usefixtures("in_process")
def test_ranking_is_validated_by_runs(data: Path, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(ranking, "TASKS", ("hymenoptera",))
    monkeypatch.setattr(ranking, "NETWORKS", ("efficientnet_lite0",))
    monkeypatch.setattr(ranking, "PARTS", {"resnet18 of animals": "bird,cat,deer,dog,frog"})
    monkeypatch.setenv("TLCLI_CACHE", str(tmp_path / "cache"))
    words = [str(data), "--small", "--out", str(tmp_path), "--seeds", "0"]
    ranking.main(words)
    rows = quality.read(tmp_path / "quality.jsonl")
    names = [row["recipe"] for row in rows]
    assert names == ["efficientnet_lite0 32", "efficientnet_lite0 64", "resnet18 of animals 32"]
    assert capsys.readouterr().out.count("\n| tlcli rank |") == 1


@pytest.mark.usefixtures("in_process")
def test_unknown_compares_four_scores(data: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(unknown, "SPLITS", {"first five": unknown.SPLITS["first five"]})
    unknown.main([str(data), "--small", "--out", str(tmp_path / "out")])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines() if line.startswith("|")][2:]
    names = ["energy and distance", "energy", "largest probability", "nearest training images"]
    assert [row[0] for row in rows][:4] == [f"| {name}" for name in names]
    assert all(len(row) == 3 for row in rows)


def test_a_million_files_are_planned_trained_and_predicted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    measures = million.main(tmp_path, small=True, files=600)
    assert [measure.holds for measure in measures] == [True] * 4
    out = capsys.readouterr().out
    assert [out.count(f"| {name}") for name in ("first plan", "second plan", "epoch of", "predict")] == [1, 1, 1, 2]
    assert (
        len(list(tmp_path.glob("images/*/*"))) == 600 and len({f.stat().st_ino for f in tmp_path.rglob("*.jpg")}) == 500
    )
