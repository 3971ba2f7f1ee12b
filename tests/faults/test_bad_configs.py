"""Third-party config files: what would read a secret, run code, or never end is refused before anything is written."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf

from tests.cli.conftest import Ended, Tlcli, finished, runs_in
from tests.faults.refusals import refused, tree, untouched, yaml_bomb
from tlcli.cli.compose import compose_config, load_spec, parse_flags
from tlcli.cli.conf_files import conf_dir
from tlcli.cli.trust import check_folder
from tlcli.errors import UsageError
from tlcli.runs.run_dir import RunDir

SECRET = "s3cret-value"
FUNCTION = " is refused: a function that a file calls "
IN_FILE = "refused in a file; give on the command line: "
OF_HYDRA = " is refused: of Hydra's own settings a file may give the choice of hydra/launcher"


@pytest.fixture(autouse=True)
def leak(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Set a secret, and register a resolver that records its calls."""
    monkeypatch.setenv("API_TOKEN", SECRET)
    asked: list[str] = []
    OmegaConf.register_new_resolver("leak", lambda name: asked.append(name) or os.environ[name])
    yield asked
    OmegaConf.clear_resolver("leak")


def write(folder: Path, content: str | bytes, name: str = "experiment/x.yaml") -> None:
    """Write a file below mine/; an experiment sets keys of the top level."""
    file = folder / "mine" / name
    file.parent.mkdir(parents=True, exist_ok=True)
    start = b"# @package _global_\n" if name.startswith("experiment") else b""
    file.write_bytes(start + (content if isinstance(content, bytes) else content.encode()))


def one_line(ended: Ended, *words: str) -> None:
    assert (ended.code, ended.out) == (2, ""), ended.err
    assert ended.err.startswith("tlcli train: ") and ended.err.count("\n") == 1
    for word in words:
        assert word in ended.err


EXPERIMENTS: dict[str | bytes, str] = {
    # a secret of the environment
    "name: ${oc.env:API_TOKEN}": FUNCTION,
    "dataset: {classes: [a, '${oc.env:API_TOKEN}']}": FUNCTION,
    "out: env\nname: ${oc.${out}:API_TOKEN}": FUNCTION,
    "name: ${oc.decode:'${oc.env:API_TOKEN}'}": FUNCTION,
    "name: ${oc.select:nothing,${oc.env:API_TOKEN}}": FUNCTION,
    "name: ${leak:API_TOKEN}": FUNCTION,
    # not a config, or one without an end
    "name: x\n" + yaml_bomb(): "x.yaml: line 4: alias *a is not allowed; write the values out",
    "name: &a [*a]\n": "x.yaml: line 2: alias *a is not allowed",
    "name: " + "[\n" * 100_000: "too many levels",
    b"name: \xff\xfe\n": "x.yaml: cannot be read as YAML: not UTF-8 text",
    "name: a\nname: b\n": "x.yaml:3: found duplicate key name",
    "name: !!python/object/apply:os.mkdir [made]\n": "could not determine a constructor for the tag",
    "name: a\n---\nname: b\n": "but found another document",
    b"name: a\0b\n": "x.yaml",
    # keys and values of tlcli
    "epoch: 1": "unknown key 'epoch'. Did you mean 'epochs'? (in experiment/x.yaml)",
    "3: x": "unknown key '3'",
    "dataset: {3: x}": "unknown key 'dataset.3'",
    "epochs: abc": "epochs=abc: expected a whole number or null (in experiment/x.yaml)",
    "dataset: {classes: [{_target_: os.mkdir}]}": "a config cannot name code to run",
    # Hydra's own node
    "hydra: {run: {dir: elsewhere}}": OF_HYDRA,
    "hydra: {sweep: {subdir: '${oc.env:API_TOKEN}'}}": OF_HYDRA,
    "hydra: {job: {env_set: {PATH: /evil}}}": OF_HYDRA,
    "hydra: {callbacks: {x: {_target_: os.mkdir, name: made}}}": "hydra.callbacks.x._target_" + OF_HYDRA,
    "hydra: {job_logging: {formatters: {x: {(): os.mkdir}}}}": "hydra.job_logging.formatters.x.()" + OF_HYDRA,
    "hydra: {searchpath: ['file:///evil']}": OF_HYDRA,
    "hydra: {mode: MULTIRUN}": OF_HYDRA,
    "hydra: 3": OF_HYDRA,
    "hydra: {launcher: {_target_: os.system}}": OF_HYDRA,
    "hydra: {launcher: {name: '${oc.env:API_TOKEN}'}}": OF_HYDRA,
    "hydra: {launcher: {setup: [touch made]}}": OF_HYDRA,
    "hydra: {sweeper: {params: {+hydra.job.chdir: 'true'}}}": IN_FILE + "+hydra.job.chdir=true",
    "hydra: {sweeper: {params: {+augment@hydra.job: evil}}}": IN_FILE + "+augment@hydra.job=evil",
    "hydra: {sweeper: {params: {+experiment@_global_: 'a,multirun'}}}": IN_FILE + "+experiment@_global_=a,multirun",
    "hydra: {sweeper: {params: {+experiment@_global_: glob (m*)}}}": IN_FILE + "'+experiment@_global_=glob (m*)'",
    "hydra: {sweeper: {params: {+experiment@a.b: ../../evil/x}}}": IN_FILE + "+experiment@a.b=../../evil/x",
    "hydra: {sweeper: {params: {experiment: 'multi${seed}'}}}": IN_FILE + "'experiment=multi${seed}'",
    "hydra: {sweeper: {params: {--config-name: x}}}": IN_FILE + "--config-name=x",
    "hydra: {sweeper: {params: {name: '$\\{oc.env:API_TOKEN\\}'}}}": FUNCTION,
    "defaults: [override /hydra/sweeper: optuna]": OF_HYDRA,
    "defaults: [/experiment/y@hydra.callbacks]": OF_HYDRA,
    "# @package hydra.callbacks\nx: 3": OF_HYDRA,
    "defaults: [../../evil/x]": OF_HYDRA,
    "defaults: [multirun]": OF_HYDRA,
    "defaults: [{/experiment: [y, multirun]}]": OF_HYDRA,
    "defaults: [{/y: run}, {/x@_global_: 'multi${y}'}]": OF_HYDRA,
    "defaults: [//evil/x]": OF_HYDRA,
    "defaults: [{//evil: x}]": OF_HYDRA,
    # what Hydra's loader reads and the one of the check does not
    "out: 2024-13-45\nhydra: {run: {dir: elsewhere}}": "x.yaml: month must be in 1..12",
    "name: !!python/object/apply:pathlib.PosixPath [made]\nhydra: {run: {dir: elsewhere}}": "x.yaml",
    "%YAML 1.3\n---\nhydra: {run: {dir: elsewhere}}": "x.yaml",
}


@pytest.mark.parametrize("text", EXPERIMENTS, ids=range(len(EXPERIMENTS)))
def test_an_experiment_is_refused_in_one_line(text: str | bytes, tlcli: Tlcli, training: Any, tmp_path, leak) -> None:
    training(lambda spec, run, reporter: pytest.fail("training began"))
    write(tmp_path, text)
    with untouched(tmp_path):
        ended = tlcli("train", "--config-dir", "mine", "experiment=x")
    one_line(ended, EXPERIMENTS[text])
    assert SECRET not in ended.err and not leak


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("hydra/job_logging/x.yaml", "root: 3"),
        ("hydra/launcher/x.yaml", "_target_: os.system"),
        ("hydra/launcher/x.yaml", "defaults: [/experiment/y@_here_]"),
        ("experiment/y.yaml", "hydra: {sweep: {dir: elsewhere}}"),
    ],
)
def test_a_file_that_no_word_names_cannot_change_how_hydra_runs(name: str, text, tlcli, training, tmp_path) -> None:
    training(lambda spec, run, reporter: pytest.fail("training began"))
    write(tmp_path, "epochs: 2\n")
    write(tmp_path, text, name)
    with untouched(tmp_path):
        one_line(tlcli("train", "--config-dir", "mine", "-m", "experiment=x,x"), f"{name}: ", OF_HYDRA)


@pytest.mark.parametrize(
    "text",
    [
        "hydra: {launcher: {n_jobs: 2, backend: loky, verbose: null}}",
        "hydra: {sweeper: {params: {seed: '1,2', optimizer.lr: 'choice(0.1,0.2)'}}}",
        "defaults: [override /hydra/launcher: basic, _self_]",
        "defaults: [override /hydra/job_logging: none]",
    ],
)
def test_a_file_may_choose_a_launcher_and_give_its_numbers(text: str, tmp_path: Path) -> None:
    write(tmp_path, text)
    write(tmp_path, "hydra: {run: {dir: elsewhere}}", "outputs/1/.hydra/hydra.yaml")  # the record of an earlier run
    check_folder(tmp_path / "mine", [conf_dir(), tmp_path / "mine"])


def test_the_record_of_a_sweep_is_no_option(tlcli: Tlcli, training: Any, tmp_path: Path) -> None:
    training(lambda spec, run, reporter: pytest.fail("training began"))
    write(tmp_path, "# @package _global_\nhydra: {run: {dir: elsewhere}}", "experiment/multirun.yaml")
    write(tmp_path, "epochs: 2\n")
    (tmp_path / "mine/experiment/sweep.json").write_text("{}")
    assert tlcli("train", "--config-dir", "mine", "experiment=x", "--cfg", "job").code == 0
    with untouched(tmp_path):
        for word in ("experiment=multirun", "experiment=x,multirun", "experiment='multirun'", "experiment=[multirun]"):
            one_line(tlcli("train", "--config-dir", "mine", "-m", word), word)


def test_typed_references_are_followed_and_so_are_those_within_a_file(tlcli, training, tmp_path, monkeypatch) -> None:
    training(finished)
    monkeypatch.setenv("WHO", "me")
    write(tmp_path, "out: runs-${seed}\n")
    ended = tlcli("train", "--config-dir", "mine", "experiment=x", "name='by ${oc.env: WHO}'", "seed=7")
    assert (ended.code, ended.err) == (0, "")
    (run,) = runs_in(tmp_path / "runs-7")
    assert "name: by me\n" in run.config_file.read_text()
    assert not any(SECRET.encode() in facts[3] for facts in tree(tmp_path).values() if isinstance(facts[3], bytes))


def test_a_pipe_is_not_waited_for_and_a_folder_may_be_named_elsewhere(tlcli: Tlcli, tmp_path: Path) -> None:
    write(tmp_path, yaml_bomb())
    with untouched(tmp_path):
        ended = tlcli("train", f"hydra.searchpath=[file://{tmp_path}/mine]", "experiment=x")
    one_line(ended, "alias *a is not allowed")
    (tmp_path / "mine" / "experiment" / "x.yaml").unlink()
    os.mkfifo(tmp_path / "mine" / "experiment" / "pipe.yaml")
    with untouched(tmp_path):
        ended = tlcli("train", "--config-dir", "mine", "experiment=pipe")
    one_line(ended, "pipe.yaml: cannot be read as YAML: not a regular file")


@pytest.mark.parametrize("name", ["/evil/x", "//evil/x", "../evil/x", "multirun", ".hydra/x"])
def test_a_main_config_is_in_a_folder_that_was_checked(name: str, tlcli: Tlcli, tmp_path: Path) -> None:
    write(tmp_path, "epochs: 2\n")
    with untouched(tmp_path):
        one_line(
            tlcli("train", "--config-dir", "mine", f"--config-name={name}"), "name a file in the folder of --config-dir"
        )


def test_a_path_of_a_name_that_is_too_long(tlcli: Tlcli, tmp_path: Path) -> None:
    with untouched(tmp_path):
        one_line(tlcli("train", "--config-dir", "x" * 300), "file name too long; choose another path")
        one_line(tlcli("train", f"out={'x' * 300}"), "File name too long; choose another folder with out=...")
        one_line(tlcli("train", f"backbone.weights={'x' * 300}.pth"), "file name too long; choose another path")


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


SAVED: dict[str | bytes, str] = {
    yaml_bomb(): "config.yaml: cannot be read as YAML: line 2: alias *a",
    "a: " + "[" * 60 + "]" * 60: "config.yaml: ",
    "seed: " + "9" * 5000: "config.yaml: cannot be read as YAML",
    "dataset: {kind: digits, name: [a]}": "expected a text",
    "seed: 2026-01-01": "seed: Value 'date' is not a supported primitive type",
    "seed: !!python/object/apply:os.mkdir [made]": "config.yaml: cannot be read as YAML",
}


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    own = RunDir(tmp_path / "run")
    own.start(command="tlcli train", overrides=[], config="seed: 3\n")
    own.end("done")
    return own


@pytest.mark.parametrize("text", SAVED, ids=range(len(SAVED)))
def test_a_damaged_config_of_a_finished_run(text: str | bytes, run: RunDir, tlcli: Tlcli, tmp_path: Path) -> None:
    run.config_file.write_bytes(text if isinstance(text, bytes) else text.encode())
    refused(lambda: load_spec(run), 2, f"{run.config_file}", SAVED[text], keeps=tmp_path)
    with untouched(tmp_path):
        ended = tlcli("eval", "run")
        assert tlcli("list", "run").code == 0
    assert (ended.code, ended.err.count("\n")) == (2, 1)
    assert SAVED[text] in ended.err


def test_a_report_of_a_run_with_a_bomb_for_a_config(run: RunDir, tlcli: Tlcli, tmp_path: Path) -> None:
    run.config_file.write_text(yaml_bomb())
    before = tree(tmp_path)
    assert tlcli("report", "run").code == 0
    assert tree(tmp_path).keys() - before.keys() == {str(tmp_path / "run" / "report.html")}
