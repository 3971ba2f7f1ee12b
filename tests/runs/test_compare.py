"""The statistics of a comparison against known values, and what is compared with what."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml  # type: ignore[import-untyped]

from tlcli.errors import UsageError
from tlcli.locks import this_process
from tlcli.runs.compare import compare
from tlcli.runs.run_dir import RunDir, SplitPredictions, write_json, write_predictions

CLASSES = ("ant", "bee", "fly")


def make_run(
    path: Path, said: Sequence[int], true: Sequence[int], *, classes=CLASSES, keys=None, predictions=True, **config
) -> Path:
    """Write the files of a finished run that a comparison reads."""
    run = RunDir(path)
    content = {"seed": 0, "freeze": {"kind": "head"}, "name": path.name, "out": str(path.parent), **config}
    run.start(command="tlcli train", overrides=[], config=yaml.safe_dump(content))
    right = sum(a == b for a, b in zip(said, true, strict=True))
    n = len(true)
    write_json(run.test_file, {"accuracy": right / n, "accuracy_ci95": [0, 1], "loss": 0.5, "macro_f1": 0.5, "n": n})
    run.end("done")
    if predictions:
        names = tuple(keys or (f"test/{i}.png" for i in range(n)))
        logits = torch.nn.functional.one_hot(torch.tensor(said), len(classes)).float()
        write_predictions(run.test_predictions, SplitPredictions(logits, torch.tensor(true), tuple(classes), names))
    return path


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [(0, 0, 1.0), (1, 0, 1.0), (5, 0, 0.0625), (1, 9, 22 / 1024), (4, 4, 1.0), (8, 3, 2 * (1 + 11 + 55 + 165) / 2**11)],
)
def test_mcnemar_is_the_exact_binomial_test(only_first: int, only_second: int, p: float, tmp_path: Path) -> None:
    """Three images are classified correctly by both runs, and two by neither."""
    n = only_first + only_second + 5
    first = make_run(tmp_path / "a", [0] * only_first + [1] * only_second + [0, 0, 0, 1, 2], [0] * n)
    second = make_run(tmp_path / "b", [1] * only_first + [0] * only_second + [0, 0, 0, 1, 1], [0] * n)
    [pair], [swapped] = compare([first, second])["pairs"], compare([second, first])["pairs"]
    assert (pair["n"], pair["both_right"], pair["both_wrong"]) == (n, 3, 2)
    assert (pair["n_only_first_right"], pair["n_only_second_right"]) == (only_first, only_second)
    assert pair["difference"] == pytest.approx((only_first - only_second) / n)
    assert pair["mcnemar_p"] == swapped["mcnemar_p"] == pytest.approx(p, rel=1e-12)
    assert pair["more_than_chance"] == (p < 0.05)


def test_rows_and_classes_may_be_in_another_order(tmp_path: Path) -> None:
    first = make_run(tmp_path / "a", [0, 1, 2, 0], [0, 1, 2, 1], keys=["x", "y", "z", "w"])
    other = {"keys": ["w", "z", "y", "x"], "classes": ["fly", "bee", "ant"]}
    second = make_run(tmp_path / "b", [1, 0, 2, 2], [1, 0, 1, 2], **other)  # type: ignore[arg-type]
    [pair] = compare([first, second])["pairs"]
    assert (pair["both_right"], pair["both_wrong"]) == (2, 0)  # x and z
    assert (pair["n_only_first_right"], pair["n_only_second_right"]) == (1, 1)  # y, w


@pytest.mark.parametrize(
    ("other", "why"),
    [
        ({"keys": ["x", "y", "q"]}, "2 images are in both, 2 in only one"),
        ({"keys": ["p", "q", "r"]}, "no image in common"),
        ({"keys": ["x", "y", "y"]}, "have the same name"),
        ({"classes": ["ant", "fly", "bee"]}, "2 of 3 images have another label"),
        ({"predictions": False}, "has no test_predictions.safetensors"),
    ],
)
def test_no_paired_test_if_the_test_sets_differ(tmp_path: Path, other: dict[str, object], why: str) -> None:
    keys: dict[str, object] = {"keys": ["x", "y", "z"]}
    first = make_run(tmp_path / "a", [0, 1, 2], [0, 1, 2], seed=0, **keys)  # type: ignore[arg-type]
    second = make_run(tmp_path / "b", [0, 1, 2], [0, 1, 2], seed=1, **(keys | other))  # type: ignore[arg-type]
    compared = compare([first, second])
    assert (compared["pairs"][0]["paired"], compared["seeds"][0]["same_images"]) == (False, False)
    assert why in compared["pairs"][0]["why"]


def test_seeds_of_one_configuration(tmp_path: Path) -> None:
    true, said = [0] * 10, [[0] * n + [1] * (10 - n) for n in (7, 8, 9)]
    runs = [make_run(tmp_path / str(seed), said[seed], true, seed=seed) for seed in range(3)]
    other = make_run(tmp_path / "other", [0] * 10, true, freeze={"kind": "none"})
    [group] = compare([*runs, other])["seeds"]
    assert group["runs"] == list(map(str, runs))
    assert (group["mean"], group["standard_deviation"]) == pytest.approx((0.8, 0.1))
    half = 4.302653 * 0.1 / 3**0.5  # Student's t for two degrees of freedom
    assert group["mean_ci95"] == pytest.approx([0.8 - half, min(1.0, 0.8 + half)], rel=1e-6)
    assert group["same_images"]
    again = make_run(tmp_path / "again", said[0], true, seed=0)
    assert compare([runs[0], again])["seeds"] == []
    RunDir(runs[1]).update(machine={"processor": "another"})
    assert len(compare([again, *runs])["seeds"][0]["runs"]) == 3
    RunDir(runs[1]).update(versions={"torch": "1.0"})
    assert compare(runs[:2])["seeds"] == []


def test_a_sweep_stands_for_its_tested_jobs(tmp_path: Path) -> None:
    for name in ("0", "1", "2", "10", "seeds/3"):
        make_run(tmp_path / "sweep" / name, [0, 1], [0, 1], lr=name)
    (tmp_path / "sweep" / "2" / "test.json").unlink()  # this one failed
    (tmp_path / "sweep" / "sweep.json").write_text("{}")
    assert [Path(run["path"]).name for run in compare([tmp_path / "sweep"])["runs"]] == ["0", "1", "10", "3"]
    make_run(tmp_path / "sweep/best", [0, 1], [0, 1])  # as after `cp -rL` of a search
    (tmp_path / "sweep/tune.json").touch()
    assert [Path(run["path"]).name for run in compare([tmp_path / "sweep"])["runs"]] == ["0", "1", "10", "3"]


def test_folds_without_a_test_are_compared_by_their_cross_validation(tmp_path: Path) -> None:
    for name, said in (("a", [0, 1, 1, 1]), ("b", [0, 1, 0, 0])):
        run = RunDir(make_run(tmp_path / name / "best", said, [0, 1, 0, 0], folds=2))
        pooled = {key: run.test()[key] for key in ("accuracy", "accuracy_ci95", "n")}
        run.update(best={"loss": 0.5}, cross_validation=pooled)
        run.test_file.unlink()
        run.test_predictions.rename(run.val_predictions)
        (tmp_path / name / "sweep.json").touch()
    compared = compare([tmp_path / "a", tmp_path / "b/best"])
    assert [(run["result"], run["accuracy"]) for run in compared["runs"]] == [("cross_validation", n) for n in (0.5, 1)]
    assert (compared["pairs"][0]["paired"], compared["pairs"][0]["n_only_second_right"]) == (True, 2)
    make_run(tmp_path / "tested", [0, 1], [0, 1])
    with pytest.raises(UsageError, match=r"tested: is tested, not cross-validated; .*b/best has no test\.json"):
        compare([tmp_path / "tested", tmp_path / "b"])


@pytest.mark.parametrize("other", [[], ["good"], ["bad"], ["failed"], ["died"], ["trial"]])
def test_too_few_runs_and_runs_without_a_result(other: list[str], tmp_path: Path) -> None:
    make_run(tmp_path / "good", [0, 1], [0, 1])
    failed = RunDir(make_run(tmp_path / "failed", [0, 1], [0, 1]))
    failed.test_file.unlink()
    failed.end("failed", "out of memory")
    messages = {"good": "named twice", "bad": "no such run directory", "failed": r"no test\.json; its status is failed"}
    messages["died"] = r"no test\.json; its status is died; finish it with `tlcli train --resume`"
    messages["trial"] = r"no test\.json; its status is done; test it with `tlcli eval .*/trial`"
    trial = RunDir(make_run(tmp_path / "trial", [0, 1], [0, 1]))
    trial.test_file.unlink()
    died = RunDir(make_run(tmp_path / "died", [0, 1], [0, 1]))
    died.test_file.unlink()
    died.update(**this_process() | {"status": "running", "pid": 4194304})
    with pytest.raises(UsageError, match=messages[other[0]] if other else "two or more runs"):
        compare([tmp_path / name for name in ["good", *other]])


TEST = {"accuracy": 0.5, "accuracy_ci95": [0, 1], "loss": 0.5, "n": 2}


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("test.json", "[1", "test.json: damaged"),
        *(
            ("test.json", json.dumps(TEST | {name: value}), rf"test.json: damaged \({name} ")
            for name, values in {"accuracy": ["0.5", None], "accuracy_ci95": [[1], ["0", "1"]], "n": ["2", 2.5]}.items()
            for value in values
        ),
        ("config.yaml", "a: [1", r"config.yaml: cannot be read as YAML \(not YAML"),
    ],
)
def test_damaged_files_are_named(file: str, content: str, message: str, tmp_path: Path) -> None:
    good, bad = (make_run(tmp_path / name, [0, 1], [0, 1]) for name in ("good", "bad"))
    (bad / file).write_text(content)
    with pytest.raises(UsageError, match=message):
        compare([good, bad])


def test_optional_values_of_other_types_are_null(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name, [0, 1], [0, 1]) for name in ("a", "b")]
    for run in runs:
        (run / "test.json").write_text(json.dumps(TEST | {"macro_f1": "0.5"}))
        RunDir(run).update(versions=[1], machine="x", precision=None)
    assert [run["macro_f1"] for run in compare(runs)["runs"]] == [None, None]
