"""Config files of other people: what would read a secret, run code, or never end is refused before anything is written.

Code named by _target_, unknown keys and wrong values are in tests/cli/test_usage_errors.py, and for the config of a
finished run in tests/cli/test_saved.py.
"""

import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from tests.cli.conftest import Ended, finished, runs_in
from tests.faults.refusals import refused, tree, untouched, yaml_bomb
from tlcli.cli.compose import compose_config, load_spec, parse_flags
from tlcli.cli.trust import check_folder
from tlcli.errors import UsageError
from tlcli.reporter import Reporter
from tlcli.runs.run_dir import RunDir

Tlcli = Callable[..., Ended]
SECRET = "s3cret-value"


@pytest.fixture(autouse=True)
def token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_TOKEN", SECRET)


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[[str | bytes], None]:
    """experiment(text): the file mine/experiment/x.yaml."""
    (tmp_path / "mine" / "experiment").mkdir(parents=True)

    def write(text: str | bytes) -> None:
        content = text if isinstance(text, bytes) else text.encode()
        (tmp_path / "mine" / "experiment" / "x.yaml").write_bytes(b"# @package _global_\n" + content)

    return write


@pytest.fixture
def leak() -> Iterator[list[str]]:
    """Register a resolver and record its calls."""
    asked: list[str] = []
    OmegaConf.register_new_resolver("leak", lambda name: asked.append(name) or os.environ[name])
    yield asked
    OmegaConf.clear_resolver("leak")


def one_line(ended: Ended, *words: str) -> None:
    assert ended.code == 2, ended.err
    assert ended.out == ""
    assert ended.err.startswith("tlcli train: ")
    assert ended.err.count("\n") == 1
    for word in words:
        assert word in ended.err


SECRETS = {
    "a value": "name: ${oc.env:API_TOKEN}",
    "in a list": "dataset: {classes: [a, '${oc.env:API_TOKEN}']}",
    "in keys of a data set": "dataset: {root: '${oc.env:API_TOKEN}/x'}",
    "a name put together": "out: env\nname: ${oc.${out}:API_TOKEN}",
    "a name that is a reference": "out: oc.env\nname: ${${out}:API_TOKEN}",
    "as text to be read": "name: ${oc.decode:'${oc.env:API_TOKEN}'}",
    "within another call": "name: ${oc.select:nothing,${oc.env:API_TOKEN}}",
    "made on the way": "name: ${oc.create:'${oc.env:API_TOKEN}'}",
    "a resolver of somebody's": "name: ${leak:API_TOKEN}",
}


@pytest.mark.parametrize("case", SECRETS)
def test_a_file_cannot_have_a_secret_saved(
    case: str, tlcli: Tlcli, training: Any, experiment: Callable[[str], None], tmp_path: Path, leak: list[str]
) -> None:
    training(lambda spec, run, reporter: pytest.fail("training began"))
    experiment(SECRETS[case])
    with untouched(tmp_path):
        ended = tlcli("train", "--config-dir", "mine", "experiment=x")
    one_line(ended, " is refused: a function that a file calls ", "give the value on the command line")
    assert SECRET not in ended.err
    assert not leak


def test_what_is_typed_is_followed_and_so_are_references_within(
    tlcli: Tlcli, experiment: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in: Any = types.ModuleType("tlcli.train")
    stand_in.train = lambda spec, run, *rest: finished(spec, run, Reporter())
    monkeypatch.setitem(sys.modules, "tlcli.train", stand_in)
    monkeypatch.setenv("WHO", "me")
    experiment("out: runs-${seed}\n")
    ended = tlcli("train", "--config-dir", "mine", "experiment=x", "name='by ${oc.env: WHO}'", "seed=7")
    assert (ended.code, ended.err) == (0, "")
    (run,) = runs_in(tmp_path / "runs-7")
    assert "name: by me\n" in run.config_file.read_text()
    assert not any(SECRET.encode() in facts[3] for facts in tree(tmp_path).values() if isinstance(facts[3], bytes))


ENDLESS: dict[str, tuple[str | bytes, str]] = {
    "a bomb": ("name: x\n" + yaml_bomb(), "x.yaml: line 4: alias *a is not allowed; write the values out"),
    "a circle": ("name: &a [*a]\n", "x.yaml: line 2: alias *a is not allowed"),
    "a harmless alias": ("image: &a {size: 64}\ncache: {<<: *a}\n", "alias *a is not allowed"),
    "a hundred thousand levels": ("name: " + "[" * 100_000 + "\n", "too many levels"),
    "no UTF-8": (b"name: \xff\xfe\n", "x.yaml: cannot be read as YAML: not UTF-8 text"),
    "a key twice": ("name: a\nname: b\n", "x.yaml:3: found duplicate key name"),
    "an object": ("name: !!python/object/apply:os.mkdir [made]\n", "could not determine a constructor for the tag"),
    "two documents": ("name: a\n---\nname: b\n", "but found another document"),
    "a NUL": (b"name: a\0b\n", "x.yaml"),
    "a web page": ("<!DOCTYPE html>\n<html a:b>\n", ""),
}


@pytest.mark.parametrize("case", ENDLESS)
def test_a_file_that_makes_no_config(
    case: str, tlcli: Tlcli, training: Any, experiment: Callable[[str | bytes], None], tmp_path: Path
) -> None:
    training(lambda spec, run, reporter: pytest.fail("training began"))
    text, words = ENDLESS[case]
    experiment(text)
    with untouched(tmp_path):
        ended = tlcli("train", "--config-dir", "mine", "experiment=x")
    one_line(ended, words)


def test_a_pipe_is_not_waited_for_and_a_folder_may_be_named_elsewhere(
    tlcli: Tlcli, experiment: Callable[[str], None], tmp_path: Path
) -> None:
    experiment(yaml_bomb())
    with untouched(tmp_path):
        one_line(
            tlcli("train", f"hydra.searchpath=[file://{tmp_path}/mine]", "experiment=x"), "alias *a is not allowed"
        )
    (tmp_path / "mine" / "experiment" / "x.yaml").unlink()
    os.mkfifo(tmp_path / "mine" / "experiment" / "pipe.yaml")
    with untouched(tmp_path):
        ended = tlcli("train", "--config-dir", "mine", "experiment=pipe")
    one_line(ended, "pipe.yaml: cannot be read as YAML: not a regular file")


def test_a_config_folder_of_a_name_that_is_too_long(tlcli: Tlcli, tmp_path: Path) -> None:
    with untouched(tmp_path):
        one_line(tlcli("train", "--config-dir", "x" * 300), "file name too long; choose another path")
        one_line(tlcli("train", f"out={'x' * 300}"), "File name too long; choose another folder with out=...")
        one_line(tlcli("train", f"backbone.weights={'x' * 300}.pth"), "file name too long; choose another path")


# -- Hydra's own node

HYDRA: dict[str, tuple[str, str]] = {
    "a folder": ("experiment/x.yaml", "hydra: {run: {dir: elsewhere}}"),
    "a folder of jobs": ("experiment/x.yaml", "hydra: {sweep: {subdir: '${oc.env:API_TOKEN}'}}"),
    "the name of the job": ("experiment/x.yaml", "hydra: {job: {name: '${oc.env:API_TOKEN}'}}"),
    "the environment of a job": ("experiment/x.yaml", "hydra: {job: {env_set: {PATH: /evil}}}"),
    "another working directory": ("experiment/x.yaml", "hydra: {job: {chdir: true}}"),
    "a callback": ("experiment/x.yaml", "hydra: {callbacks: {x: {_target_: os.mkdir, name: made}}}"),
    "a formatter": ("experiment/x.yaml", "hydra: {job_logging: {formatters: {x: {(): os.mkdir}}}}"),
    "where configs are": ("experiment/x.yaml", "hydra: {searchpath: ['file:///evil']}"),
    "the mode": ("experiment/x.yaml", "hydra: {mode: MULTIRUN}"),
    "no keys": ("experiment/x.yaml", "hydra: 3"),
    "a class of a launcher": ("experiment/x.yaml", "hydra: {launcher: {_target_: os.system}}"),
    "a path of a launcher": ("experiment/x.yaml", "hydra: {launcher: {folder: /evil/place}}"),
    "a reference in a launcher": ("experiment/x.yaml", "hydra: {launcher: {name: '${oc.env:API_TOKEN}'}}"),
    "commands of a launcher": ("experiment/x.yaml", "hydra: {launcher: {setup: [touch made]}}"),
    "a sampler": ("experiment/x.yaml", "hydra: {sweeper: {sampler: {_target_: os.system}}}"),
    "Hydra's keys as parameters": ("experiment/x.yaml", "hydra: {sweeper: {params: {+hydra.job.chdir: 'true'}}}"),
    "the choice of a sweeper": ("experiment/x.yaml", "defaults: [override /hydra/sweeper: optuna]"),
    "the choice of a logger": ("experiment/x.yaml", "defaults: [override /hydra/job_logging: default]"),
    "another package": ("experiment/x.yaml", "defaults: [/experiment/y@hydra.callbacks]"),
    "a package of a file": ("experiment/x.yaml", "# @package hydra.callbacks\nx: 3"),
    "a file elsewhere": ("experiment/x.yaml", "defaults: [../../evil/x]"),
    "a group of Hydra's": ("hydra/job_logging/x.yaml", "root: 3"),
    "a launcher of its own": ("hydra/launcher/x.yaml", "_target_: os.system"),
    "another file in a launcher": ("hydra/launcher/x.yaml", "defaults: [/experiment/y@_here_]"),
}


@pytest.mark.parametrize("sweep", [False, True], ids=["run", "sweep"])
@pytest.mark.parametrize("case", HYDRA)
def test_a_file_cannot_change_how_hydra_runs(
    case: str, sweep: bool, tlcli: Tlcli, training: Any, experiment: Callable[[str], None], tmp_path: Path
) -> None:
    training(lambda spec, run, reporter: pytest.fail("training began"))
    experiment("epochs: 2\n")
    name, text = HYDRA[case]
    file = tmp_path / "mine" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"# @package _global_\n{text}\n" if name.startswith("experiment") else text)
    words = ["-m", "experiment=x,x"] if sweep else ["experiment=x"]
    with untouched(tmp_path):
        ended = tlcli("train", "--config-dir", "mine", *words)
    one_line(ended, f"{name}: ", " is refused: of Hydra's own settings a file may give the choice of hydra/launcher")


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {launcher: {n_jobs: 2, backend: loky, verbose: null}}",
        "hydra: {sweeper: {params: {seed: '1,2', optimizer.lr: 'choice(0.1,0.2)'}}}",
        "defaults: [override /hydra/launcher: basic, _self_]",
        "defaults: [override /hydra/job_logging: none]",
    ],
)
def test_what_a_file_may_say_to_hydra(text: str, experiment: Callable[[str], None], tmp_path: Path) -> None:
    experiment(text)
    check_folder(tmp_path / "mine")


def test_the_command_line_may_say_everything_to_hydra() -> None:
    config = compose_config(parse_flags(["hydra.run.dir=x", "hydra.job.chdir=true", "+hydra.job.env_set.A=b"]))[0]
    assert (config.hydra.run.dir, config.hydra.job.chdir, config.hydra.job.env_set.A) == ("x", True, "b")


def test_optunas_sweeper_is_accepted_with_its_samplers_and_no_other_class() -> None:
    store, plugin = ConfigStore.instance(), "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.OptunaSweeper"
    sampler = {"_target_": "optuna.samplers.TPESampler", "seed": None}
    store.store(group="hydra/sweeper", name="optuna", node={"_target_": plugin, "sampler": sampler, "n_trials": 20})
    try:
        words = ["-m", "hydra/sweeper=optuna", "hydra.sweeper.n_trials=3", "epochs=1,2"]
        assert compose_config(parse_flags(words))[0].hydra.sweeper.sampler["_target_"] == sampler["_target_"]
        with pytest.raises(UsageError, match="a config cannot name code to run"):
            compose_config(parse_flags([*words, "hydra.sweeper.sampler._target_=optuna.samplers.os"]))
    finally:
        del store.repo["hydra"]["sweeper"]["optuna.yaml"]
    with pytest.raises(UsageError, match=r"hydra/sweeper has no option 'optuna'.*is its plugin installed"):
        compose_config(parse_flags(words))


# -- the config of a finished run

SAVED: dict[str, tuple[str | bytes, str]] = {
    "a bomb": (yaml_bomb(), "config.yaml: cannot be read as YAML: line 2: alias *a"),
    "deep and closed": ("a: " + "[" * 60 + "]" * 60, "config.yaml: "),
    "a number of 5,000 digits": ("seed: " + "9" * 5000, "config.yaml: cannot be read as YAML"),
    "a kind that is a list": ("dataset: {kind: [digits]}", "dataset.kind=['digits'] is none of digits"),
    "a name that is a list": ("dataset: {kind: digits, name: [a]}", "expected a text"),
    "no UTF-8": (b"seed: \xff", "config.yaml: cannot be read as YAML"),
    "a key that is a list": ("? [1, 2]\n: 3\n", "config.yaml: cannot be read as YAML"),
    "a date": ("seed: 2026-01-01", "seed: Value 'date' is not a supported primitive type"),
    "an object": ("seed: !!python/object/apply:os.mkdir [made]", "config.yaml: cannot be read as YAML"),
}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    own = RunDir(tmp_path / "run")
    own.start(command="tlcli train", overrides=[], config="seed: 3\n")
    own.end("done")
    return own


@pytest.mark.parametrize("case", SAVED)
def test_a_finished_runs_config_that_is_none(case: str, run: RunDir, tlcli: Tlcli, tmp_path: Path) -> None:
    text, words = SAVED[case]
    run.config_file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(lambda: load_spec(run), 2, f"{run.config_file}", words, keeps=tmp_path)
    with untouched(tmp_path):
        ended = tlcli("eval", "run")
        assert tlcli("list", "run").code == 0
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert words in ended.err
    assert not (tmp_path / "made").exists()


def test_a_report_of_a_run_with_a_bomb_for_a_config(run: RunDir, tlcli: Tlcli, tmp_path: Path) -> None:
    run.config_file.write_text(yaml_bomb())
    before = tree(tmp_path)
    assert tlcli("report", "run").code == 0
    assert tree(tmp_path).keys() - before.keys() == {str(tmp_path / "run" / "report.html")}


def test_records_of_earlier_runs_in_a_config_folder_are_not_configs(tmp_path: Path) -> None:
    """A run below --config-dir does not keep the next one from starting."""
    (tmp_path / "outputs/1/.hydra").mkdir(parents=True)
    (tmp_path / "outputs/1/.hydra/hydra.yaml").write_text("hydra: {run: {dir: elsewhere}}")
    check_folder(tmp_path)
