"""tlcli train --help and completion, from the YAML files."""

import shutil
import subprocess
from argparse import SUPPRESS
from pathlib import Path

import pytest
from msgspec.structs import fields

from tlcli.cli.completion import SCRIPTS, TRAIN, candidates, train_help
from tlcli.cli.conf_files import ConfFiles, keys_in
from tlcli.specs import TrainSpec


@pytest.mark.parametrize("width", [40, 80, 100])
def test_help_fits_its_width_and_has_every_option_and_key_with_its_comment(width: int) -> None:
    files = ConfFiles()
    text = train_help(files, width)
    lines = text.splitlines()
    assert [line for line in lines[: lines.index("keys, with their defaults:")] if len(line) > max(width, 60)] == []
    assert width < 80 or max(map(len, lines)) <= width
    if width < 80:
        return  # long names stand on lines of their own
    words = " ".join(text.split())
    for options in files.groups.values():
        for option in options.values():
            assert f"{option.name} {' '.join(option.comment.split())}" in words
    for key in files.top_level:
        assert f"{key.name}={key.default} {key.comment}" in words
    for default in ("digits", "efficientnet_lite0", "adamw", "cosine"):
        assert f"* {default} " in words
    for hidden in ("hydra", "common", "_self_"):
        assert f"\n  {hidden}" not in text


def test_keys_of_yaml() -> None:
    text = "# head\ndefaults:\n  - x: y\na: 'b # c' # d\n          # e\nf:\n  g: 1   # h\n  i: {j: 2}\nk: v#w\n"
    found = [(key.name, key.default, key.comment) for key in keys_in(text)]
    assert found == [("a", "'b # c'", "d e"), ("f.g", "1", "h"), ("f.i", "{j: 2}", ""), ("k", "v#w", "")]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("tlcli ", {"train ", "completion ", "--help "}),
        ("tlcli train e", {"epochs=", "early_stop=", "experiment="}),
        ("tlcli train image.s", {"image.size=", "image.std="}),
        ("tlcli train -m freeze=", {"freeze=none ", "freeze=head ", "freeze=last_stages "}),
        ("tlcli train -m freeze=head,no", {"freeze=head,none ", "freeze=head,norm "}),
        ("tlcli train keep_best=", {"keep_best=accuracy ", "keep_best=macro_f1 ", "keep_best=loss "}),
        ("tlcli train device.compile=", {"device.compile=true ", "device.compile=false ", "device.compile=null "}),
        ("tlcli train optimizer=sgd optimizer.m", {"optimizer.momentum="}),
        ("tlcli train freeze=last_stages freeze.n=", {"freeze.n=1 "}),
        ("tlcli train --cfg ", {"job ", "hydra ", "all "}),
        ("tlcli inspect ", {"resnet18 ", "dataset=", "--format "}),
        ("tlcli inspect resnet18 --format ", {"table ", "json "}),
        ("tlcli predict RUN --format j", {"jsonl "}),
        ("tlcli embed backbone=res", {"backbone=resnet18 "}),
        ("tlcli similar ", {"backbone=", "--top "}),
    ],
)
def test_candidates(line: str, wanted: set[str]) -> None:
    found = candidates(line)
    assert wanted <= set(found)
    word = "" if line.endswith(" ") else line.split()[-1]
    assert all(one.startswith(word) for one in found)


@pytest.mark.parametrize("line", ["tlcli train --resume ", "tlcli predict o", "tlcli report ", "tlcli compare x o"])
def test_run_directories_complete(line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("10-00-00", "11-00-00/0"):
        run = tmp_path / "outputs" / "2026-01-02" / name / "run.json"
        run.parent.mkdir(parents=True)
        run.write_text("{}")
    monkeypatch.chdir(tmp_path)
    found = candidates(line)
    assert {"outputs/2026-01-02/10-00-00 ", "outputs/2026-01-02/11-00-00/0 "} <= set(found)
    assert ("outputs/2026-01-02/11-00-00 " in found) == ("predict" not in line), "the folder of a sweep"


def test_a_folder_ends_with_a_slash_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "photos/cats").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert candidates("tlcli list ph") == ["photos/"]
    assert candidates("tlcli list photos/") == ["photos/cats/"]


def test_flags_come_from_the_parser() -> None:
    flags = {flag for action in TRAIN._actions for flag in action.option_strings if action.help != SUPPRESS}
    assert {f"{flag} " for flag in flags if flag.startswith("--")} <= set(candidates("tlcli train --"))
    assert all(flag in train_help(ConfFiles(), 80) for flag in flags)


@pytest.mark.parametrize("line", ["", "tlcli", "tlcli nope x", "tlcli train a.", "tlcli train freeze=a freeze."])
def test_candidates_of_odd_lines_do_not_fail(line: str) -> None:
    assert isinstance(candidates(line), list)


def test_every_key_and_no_hidden_group_is_a_candidate() -> None:
    found = candidates("tlcli train ")
    assert not [one for one in found if one.startswith(("schema", "common", "hydra"))]
    assert {f"{f.name}=" for f in fields(TrainSpec)} - {"image=", "cache=", "checkpoint="} <= set(found)
    assert {"image.", "cache.", "checkpoint."} <= set(found)


@pytest.mark.parametrize("shell", SCRIPTS)
def test_scripts(shell: str, tlcli) -> None:
    script = tlcli("completion", shell).out
    assert "tlcli completion query" in script
    if shutil.which(shell):
        flag = "--no-execute" if shell == "fish" else "-n"
        assert subprocess.run([shell, flag], input=script, text=True, check=False).returncode == 0


def test_names_that_a_shell_would_run_are_left_to_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cats", "cats;touch x", "cats$(touch x)", "cats`x`", "cats x", "cats'", "cats\nx", "cäts"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    assert sorted(candidates("tlcli list c")) == ["cats/", "cäts/"]
