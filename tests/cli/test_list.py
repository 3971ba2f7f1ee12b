"""`tlcli list`: what it shows of runs and sweeps, which it shows, and in which order."""

import csv
import io
import json
import re
from pathlib import Path

import pytest
from rich.cells import cell_len

from tests.runs.test_index import make_run


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """Four runs, a day apart, and a sweep of three jobs."""
    folder = tmp_path / "outputs"
    accuracies = {"1": 0.9, "2": 0.7, "3": None, "4": 0.8}
    for day, accuracy in accuracies.items():
        facts = {"started": f"2026-11-0{day}T12:00:00+00:00", "seconds": {"total": 60.0 * int(day)}}
        facts |= {"status": "done", "best": {"accuracy": 0.5}} if accuracy else {"status": "failed", "best": None}
        make_run(folder / day, accuracy=accuracy, backbone="resnet50" if day == "4" else "resnet18", **facts)
    for job, freeze in enumerate(("head", "none", "norm")):
        best = {"accuracy": 0.1 * job, "macro_f1": 0.1, "loss": 1.0}
        facts = {"started": "2026-11-05T12:00:00+00:00", "best": best, "overrides": ["epochs=1", f"freeze={freeze}"]}
        make_run(folder / "sweep" / str(job), accuracy=0.3 + job / 10, freeze=freeze, **facts)
    (folder / "sweep" / "sweep.json").write_text("{}")
    return folder


def shown(text: str) -> list[str]:
    """Return the path of each line of a table."""
    return [line.split()[-1] for line in text.split("\n\n")[0].splitlines()[1:]]


def test_newest_first_with_a_line_a_sweep(outputs, tlcli) -> None:
    ended = tlcli("list")
    assert ended.code == 0
    assert shown(ended.out) == [f"outputs/{name}" for name in ("sweep", "4", "3", "2", "1")]
    assert ended.out.splitlines()[-1] == "4 runs, 1 sweep, 3 jobs in outputs"
    sweep = re.split(" {2,}", ended.out.splitlines()[1])
    assert sweep[0] == "3 done"
    assert sweep[4:7] == ["head,none,norm", "0.2000", "0.5000"], "the best job by validation"


def test_jobs_stand_below_their_sweep_with_what_it_varies(outputs, tlcli) -> None:
    lines = tlcli("list", "--jobs").out.splitlines()
    assert [line.split()[-1] for line in lines[1:6]] == [
        "outputs/sweep", "outputs/sweep/0", "outputs/sweep/1", "outputs/sweep/2", "outputs/4"
    ]  # fmt: skip
    assert "freeze=norm" in lines[4]
    assert "epochs=1" not in "".join(lines)


@pytest.mark.parametrize(
    ("sort", "first", "last"),
    [("test", "1", "3"), ("-test", "sweep", "3"), ("-when", "1", "sweep"), ("backbone", "sweep", "4")],
)
def test_order(sort: str, first: str, last: str, outputs, tlcli) -> None:
    paths = shown(tlcli("list", "--sort", sort).out)
    assert shown(tlcli("list", "--sort", sort, "--limit", "2").out) == paths[:2]
    assert (paths[0], paths[-1]) == (f"outputs/{first}", f"outputs/{last}")


def test_json_and_csv_have_everything(outputs, tlcli) -> None:
    found = json.loads(tlcli("list", "--jobs", "--format=json").out)
    assert [entry["kind"] for entry in found] == ["sweep", "run", "run", "run", "run"]
    assert [job["freeze"] for job in found[0]["runs"]] == ["head", "none", "norm"]
    assert found[0]["best_job"] == "outputs/sweep/2"
    assert found[-1]["started"] == "2026-11-01T12:00:00+00:00"
    assert found[-1]["test_ci95"] == pytest.approx([0.8, 1.0])
    rows = {row["path"]: row for row in csv.DictReader(io.StringIO(tlcli("list", "--format", "csv").out))}
    assert len(rows) == 5
    assert (rows["outputs/1"]["test"], rows["outputs/sweep"]["jobs_done"]) == ("0.9", "3")


def test_control_characters_do_not_reach_the_terminal(outputs, tlcli) -> None:
    make_run(outputs / "evil", dataset="a\x1b[31mb\nc", backbone="d\u202ee" + "x" * 80)
    out = tlcli("list").out
    assert "x" * 80 in out  # nothing is cut in a pipe
    assert "\x1b" not in out
    assert "\u202e" not in out
    assert len(out.splitlines()) == 9


@pytest.mark.parametrize("width", [60, 100])
def test_a_table_fits_its_width(width: int, outputs, tlcli, monkeypatch: pytest.MonkeyPatch) -> None:
    make_run(outputs / "long", dataset="a data set with a name that is far too long", backbone="图像" * 20)
    monkeypatch.setattr("tlcli.cli.list_runs.terminal_columns", lambda: width)
    lines = tlcli("list", "--jobs").out.splitlines()
    assert max(map(cell_len, lines)) <= width
    assert {"status", "val", "test", "path"} <= set(lines[0].split())
