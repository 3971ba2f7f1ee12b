"""The reader and writer of run directories: damaged files, both forms of a confusion matrix, new evaluations."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tlcli import __version__
from tlcli.errors import TlcliError, UsageError
from tlcli.files import read_yaml
from tlcli.runs.run_dir import RunDir, check_version, confusion_matrix, open_run, rerun_command, stored_confusion


def test_damaged_files_are_empty(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert (run.config(), run.test(), run.metrics()) == ({}, {}, [])
    run.config_file.write_text("a: [1")
    run.test_file.write_text("[" * 100_000)
    run.metrics_file.write_text('{"epoch": 1}\n7\n{"epoch": 2}\n{"epo')
    assert (run.config(), run.test(), run.metrics()) == ({}, {}, [{"epoch": 1}, {"epoch": 2}])


def test_a_run_whose_pid_another_process_has_now_has_died(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, starts = RunDir(tmp_path), [1]
    monkeypatch.setattr("tlcli.locks._process_start", lambda pid: starts[-1])
    run.start(command="tlcli train", overrides=[], config="")
    assert run.status == "running"
    starts.append(2)  # this machine has restarted
    assert run.status == "died"
    run.mark_resumed("tlcli train --resume run")
    assert run.status == "running"


def test_the_newest_run_below_a_folder_is_suggested(tmp_path: Path) -> None:
    for name in ("01-02/10-00", "01-03/08-00", "01-03/09-00", "01-03/10-00"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "run.json").touch()
    (tmp_path / "01-03/10-00/run.json").unlink()
    for folder in (tmp_path, tmp_path / "01-03"):
        with pytest.raises(UsageError, match=rf"Did you mean {tmp_path}/01-03/09-00\?"):
            open_run(folder)
    (tmp_path / "01-03/best").mkdir()
    (tmp_path / "01-03/best/run.json").touch()
    with pytest.raises(UsageError, match=rf"Did you mean {tmp_path}/01-03/best\?"):  # of folds, or of a search
        open_run(tmp_path / "01-03")


@pytest.mark.parametrize("place", ["hydra.searchpath=[/conf]", "+hydra.searchpath=[/conf]"])
def test_the_command_of_one_job_keeps_where_options_are_and_leaves_out_where_the_sweep_was(place: str) -> None:
    command = f"tlcli train -m --config-dir mine seed=1,2 hydra.sweep.dir=swept '{place}'"
    again = rerun_command({"command": command, "overrides": ["seed=2"]})
    assert again == f"tlcli train --config-dir mine '{place}' seed=2"
    again = rerun_command({"command": "tlcli train --config-dir lr=0.1 epochs=3", "overrides": ["epochs=3"]})
    assert again == "tlcli train --config-dir lr=0.1 epochs=3"


def test_a_mean_of_runs_is_made_again_by_the_command_of_the_search() -> None:
    command = "tlcli tune dataset=digits budget=1h tune=quick"
    assert rerun_command({"command": command, "overrides": ["seed=2"], "averaged": ["0", "2"]}) == command


def test_a_run_goes_on_with_the_minor_version_of_tlcli_that_started_it() -> None:
    minor = __version__.rpartition(".")[0]
    for info in ({"tlcli": f"{minor}.99"}, {}):  # run.json has a version as soon as the data and the network are known
        check_version(Path("run"), info)
    for version in ("0.1.0", f"{minor}9.0"):
        with pytest.raises(TlcliError, match=rf"^run: was started with tlcli {version}; .* \(this is {__version__}\)$"):
            check_version(Path("run"), {"tlcli": version})


@pytest.mark.parametrize("text", ["a: &a [*a]", "- " * 5000, "a: !!python/name:os.system", "7", "\x00"])
def test_yaml_from_any_source_is_a_mapping_of_plain_values_or_an_error(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        read_yaml(tmp_path / "c.yaml")
    (tmp_path / "c.yaml").write_text("pattern: a*b\nn: 1\n")
    assert read_yaml(tmp_path / "c.yaml") == {"pattern": "a*b", "n": 1}


def test_a_confusion_matrix_of_many_classes_is_stored_as_cells() -> None:
    classes = [str(i) for i in range(101)]
    full = np.zeros((101, 101), dtype=int)
    full[3, 5], full[100, 100] = 2, 7
    cells = stored_confusion(full.tolist())
    assert cells == [[3, 5, 2], [100, 100, 7]]
    for stored in (full.tolist(), cells):
        matrix = confusion_matrix({"classes": classes, "confusion": stored})
        assert matrix is not None
        assert np.array_equal(matrix, full)
    few = stored_confusion([[1, 0, 0], [0, 2, 0], [0, 0, 3]])
    assert confusion_matrix({"classes": ["a", "b", "c"], "confusion": few}).trace() == 6  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "stored", [None, 3, [[1, 2, 3]], [[1, 2], [3]], [[1, -2], [0, 1]], [["x", "y"], [1, 2]], [[1e400, 0], [0, 1]]]
)
def test_a_damaged_confusion_matrix_is_none(stored: Any) -> None:
    assert confusion_matrix({"classes": ["a", "b"], "confusion": stored}) is None
    many = [str(i) for i in range(101)]
    assert confusion_matrix({"classes": many, "confusion": [[101, 0, 1]]}) is None
    assert confusion_matrix({"classes": many, "confusion": [[0, -1, 1]]}) is None


def test_evaluations_never_share_a_folder(tmp_path: Path) -> None:
    def write(folder: Path) -> None:
        (folder / "eval.json").write_text("{}")

    with ThreadPoolExecutor(8) as pool:
        folders = list(pool.map(lambda _: RunDir(tmp_path).add_evaluation(write), range(8)))
    assert sorted(folder.name for folder in folders) == [f"eval-{n}" for n in range(1, 9)]
    assert {path.name for path in tmp_path.iterdir()} == {folder.name for folder in folders}
    assert folders[0].stat().st_mode == tmp_path.stat().st_mode


def test_a_failed_evaluation_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(folder: Path) -> None:
        (folder / "part").touch()
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="full"):
        RunDir(tmp_path).add_evaluation(fail)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TlcliError, match="not writable"):
        RunDir(tmp_path / "missing").add_evaluation(fail)
