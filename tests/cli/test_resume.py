"""tlcli train --resume: what is asked before training goes on, with a stand-in for training."""

from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.cli.conftest import finished, runs_in
from tests.faults.refusals import untouched
from tlcli import __version__
from tlcli.cli.compose import resolve_paths
from tlcli.runs.run_dir import RunDir


def stops(spec, run, reporter):
    raise KeyboardInterrupt


def test_relative_paths_are_those_of_the_folder_of_the_run(tlcli, training, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "weights.pth").touch()
    training(stops)
    assert tlcli("train", "backbone.weights=weights.pth", "hydra.run.dir=run").code == 130
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    seen: list[str] = []
    training(lambda spec, run, reporter: seen.append(spec.backbone.weights) or finished(spec, run, reporter))
    ended = tlcli("train", "--resume", "../run")
    assert (ended.code, ended.err) == (0, "")
    assert seen == [str(tmp_path / "weights.pth")]


def test_a_relative_path_typed_to_resume_is_that_of_the_folder_it_is_typed_in(
    tlcli, training, tmp_path: Path, shapes: Path, monkeypatch
) -> None:
    training(stops)
    assert tlcli("train", "dataset=imagefolder", f"dataset.root='{shapes}'", "hydra.run.dir=run").code == 130
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/moved").symlink_to(shapes)
    monkeypatch.chdir(tmp_path / "elsewhere")
    training(finished)
    assert tlcli("train", "--resume", "../run", "dataset.root=moved").code == 0
    assert RunDir(tmp_path / "run").config()["dataset"]["root"] == str(tmp_path / "elsewhere/moved")


@pytest.mark.parametrize(
    ("uri", "resolved"),
    [
        ("mlruns", "/start/mlruns"),
        ("sqlite:///out/mlflow.db", "sqlite:////start/out/mlflow.db"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("sqlite:///~/mlflow.db", "sqlite:///~/mlflow.db"),
        ("https://host:5000", "https://host:5000"),
        ("databricks", "databricks"),
    ],
)
def test_addresses_of_loggers_stay(uri: str, resolved: str) -> None:
    values = {"logger": {"uri": uri}, "backbone": {"weights": "default"}, "dataset": {"root": "~/photos"}, "seed": 1}
    resolve_paths(values, Path("/start"))
    assert values["logger"] == {"uri": resolved}
    assert values["backbone"] == {"weights": "default"} and values["dataset"] == {"root": "~/photos"}


def test_a_folder_may_have_the_name_of_an_option() -> None:
    values = {"backbone": {"weights": "none"}, "dataset": {"root": "none"}}
    resolve_paths(values, Path("/start"))
    assert values == {"backbone": {"weights": "none"}, "dataset": {"root": "/start/none"}}


@pytest.mark.parametrize("keeps", [False, True])
def test_a_finished_run_keeps_its_state_if_it_is_told_to(keeps: bool, tlcli, training, tmp_path: Path) -> None:
    def train(spec, run, reporter):
        run.state_file.parent.mkdir(exist_ok=True)
        run.state_file.touch()
        return finished(spec, run, reporter)

    training(train)
    assert tlcli("train", f"checkpoint.keep_state={str(keeps).lower()}", "hydra.run.dir=run").code == 0
    assert (tmp_path / "run/checkpoints/state.safetensors").exists() == keeps
    ended = tlcli("train", "--resume", "run")
    assert ended.code == 0 and "is done, test accuracy 0.8900: nothing to resume" in ended.out
    if not keeps:
        before = (tmp_path / "run/run.json").read_bytes()
        ended = tlcli("train", "--resume", "run", "epochs=10")
        assert ended.code == 2
        assert "backbone.weights=run" in ended.err and "checkpoint.keep_state=true" in ended.err
        assert (tmp_path / "run/run.json").read_bytes() == before


def test_a_run_that_is_interrupted_as_it_resumes_is_not_left_running(tlcli, training, tmp_path, monkeypatch) -> None:
    training(stops)
    assert tlcli("train", "hydra.run.dir=run").code == 130
    monkeypatch.setattr("tlcli.runs.resume_state.remove_temp_files", Mock(side_effect=KeyboardInterrupt))
    assert tlcli("train", "--resume", "run").code == 130
    assert RunDir(tmp_path / "run").info["status"] == "interrupted"


@pytest.mark.parametrize(("is_done", "code", "words"), [(False, 2, "still running it"), (True, 0, "nothing to resume")])
def test_a_run_that_another_process_resumes_meanwhile_is_left_alone(
    is_done: bool, code: int, words: str, tlcli, training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def resume_elsewhere(own: RunDir) -> None:
        run.mark_resumed("of another process")
        if is_done:
            run.end("done")

    training(stops)
    assert tlcli("train", "hydra.run.dir=run").code == 130
    run = RunDir(tmp_path / "run")
    monkeypatch.setattr("tlcli.runs.resume_state.read_state", resume_elsewhere)
    training(finished)
    ended = tlcli("train", "--resume", "run")
    assert ended.code == code and words in ended.err + ended.out
    assert RunDir(run.path).info == run.info


@pytest.mark.parametrize("scheduler", ["cosine", "constant"])
def test_more_epochs_are_another_schedule_and_a_note_says_so(scheduler, tlcli, training, tmp_path: Path) -> None:
    training(stops)
    assert tlcli("train", "epochs=3", f"scheduler={scheduler}", "scheduler.warmup=0").code == 130
    (run,) = runs_in(tmp_path)
    training(finished)
    ended = tlcli("train", "--resume", str(run.path), "epochs=5", "log_every=1")
    assert ended.code == 0
    note = "epochs=5, was 3: from here on the learning rate follows the cosine schedule of 5 epochs"
    assert (note in ended.out) == (scheduler == "cosine")
    assert "epochs: 5" in run.config_file.read_text()


@pytest.mark.parametrize(("has_state", "rate"), [(True, 0.25), (False, 0.5)])
def test_a_job_of_a_sweep_goes_on_as_it_was_started_if_it_has_a_state(
    has_state: bool, rate: float, tlcli, training, tmp_path: Path, monkeypatch
) -> None:
    """Without one it starts again, with what its config files say now."""
    file, run, rates = tmp_path / "mine/optimizer/slow.yaml", RunDir(tmp_path / "swept/0"), list[float]()
    file.parent.mkdir(parents=True)
    file.write_text("# Slow\ndefaults:\n  - sgd\n  - _self_\nlr: 0.25\n")
    training(stops)
    assert tlcli("train", "-m", "optimizer=slow", "--config-dir=mine", "hydra.sweep.dir=swept").code == 130
    file.write_text(file.read_text().replace("0.25", "0.5"))
    if has_state:
        run.state_file.parent.mkdir()
        run.state_file.touch()
        states = {"running": Mock(state={"metrics_bytes": 0})}  # no other process may resume it meanwhile
        monkeypatch.setattr("tlcli.runs.resume_state.read_state", lambda run: states[run.status])
    training(lambda spec, run, reporter: rates.append(spec.optimizer.lr) or finished(spec, run, reporter))
    assert tlcli("train", "--resume", "swept").code == 0
    assert (rates, run.config()["optimizer"]["lr"]) == ([rate], rate)


@pytest.mark.parametrize(
    ("change", "code", "error"),
    [
        ({"cwd": "/gone"}, 2, "swept: was started in /gone, which is not there; create it, or a link with that name"),
        ({"tlcli": "0.1.0"}, 1, "swept: was started with tlcli 0.1.0; resume it with that"),
    ],
)
def test_a_sweep_that_cannot_go_on_as_it_was_started_says_why(change, code, error, tlcli, training, tmp_path) -> None:
    training(stops)
    assert tlcli("train", "-m", "seed=1", "hydra.sweep.dir=swept").code == 130
    RunDir(tmp_path / "swept/0").update(**{"tlcli": __version__, **change})
    training(finished)
    ended = tlcli("train", "--resume", "swept")
    assert (ended.code, error in ended.err, ended.err.count("\n")) == (code, True, 1), ended.err
    assert RunDir(tmp_path / "swept/0").info["status"] == "interrupted"


def test_the_epochs_of_a_run_without_a_state_follow_from_its_images_again(tlcli, training, tmp_path: Path) -> None:
    def begin(spec, run, reporter):
        run.update(epochs=17)
        raise KeyboardInterrupt

    training(begin)
    assert tlcli("train", "hydra.run.dir=run").code == 130
    epochs: list[int | None] = []
    training(lambda spec, run, reporter: epochs.append(spec.epochs) or finished(spec, run, reporter))
    assert tlcli("train", "--resume", "run").code == 0
    assert epochs == [None]


@pytest.mark.parametrize("name", ["run.log", "metrics.jsonl", "plots/curves.png", ".hydra/config.yaml", "checkpoints"])
def test_a_link_in_a_run_is_not_written_through(name: str, tlcli, training, tmp_path: Path) -> None:
    """The run may be that of someone else, and the link may name any file of the user."""
    training(stops)
    assert tlcli("train", "hydra.run.dir=run").code == 130
    file, mine = tmp_path / "run" / name, tmp_path / "mine"
    mine.write_text("my own")
    file.parent.mkdir(exist_ok=True)
    file.unlink(missing_ok=True)
    file.symlink_to(mine)
    training(finished)
    with untouched(tmp_path):
        ended = tlcli("train", "--resume", "run")
    assert ended.code == 2 and f"{name}: is a link that leads out of" in ended.err
    file.unlink()
    (tmp_path / "run/latest").symlink_to("run.json")
    (tmp_path / "run/debug-core.log").symlink_to(tmp_path / "mine")
    (tmp_path / "linked").symlink_to("run")
    assert tlcli("train", "--resume", "linked").code == 0


def test_a_name_in_the_config_of_a_run_stays_on_its_line(tlcli, training, tmp_path: Path) -> None:
    training(stops)
    assert tlcli("train", "hydra.run.dir=run").code == 130
    file = tmp_path / "run/config.yaml"
    file.write_text(file.read_text().replace("  name: digits\n", '  name: "a\\n\\e]0;b"\n'))
    training(finished)
    ended = tlcli("train", "--resume", "run")
    assert ended.code == 0 and "a \N{REPLACEMENT CHARACTER}]0;b -> efficientnet_lite0" in ended.out
