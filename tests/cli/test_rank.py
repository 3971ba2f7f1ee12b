"""`tlcli rank` ranks what is on this machine, runs too, reads no test image, and prints a command that works."""

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest

from tests.cli.conftest import Tlcli
from tests.engine.test_ranking import scored
from tlcli.cli import rank
from tlcli.cli.compose import compose_spec
from tlcli.cli.conf_files import conf_dir
from tlcli.data import sources
from tlcli.data.images import ImageFiles
from tlcli.errors import TlcliError
from tlcli.runs.run_dir import write_json

LITES = ["efficientnet_lite0", "efficientnet_lite1"]


@pytest.fixture
def unmeasured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """unmeasured("a"): the lites are on this machine, and get the same score without a measurement; a fails."""

    def use(*damaged: str, own: Sequence[str] = ()) -> None:
        def score(name: str, *args: object):
            if name in damaged:
                raise TlcliError("checksum differs")
            yield replace(scored(90, 10), backbone=name)

        find = rank.find_candidates
        monkeypatch.setattr(rank, "find_candidates", lambda names, words: find(names or [*own, *LITES], words))
        monkeypatch.setattr(rank, "has_weights", lambda spec: True)
        monkeypatch.setattr("tlcli.engine.ranking.score", score)

    return use


@pytest.mark.slow
def test_a_ranking_of_networks_and_runs(tlcli: Tlcli, shapes: Path, trained, tmp_path, monkeypatch) -> None:
    own, read = trained("head", "fp32"), ImageFiles.decode

    def decode(images: ImageFiles, index: int):
        assert "test" not in Path(images.name(index)).parts, "a test image was read"
        return read(images, index)

    monkeypatch.setattr(ImageFiles, "decode", decode)
    words = [f"backbone=efficientnet_lite0,{own}", "dataset=imagefolder", f"dataset.root={shapes}"]
    plot = tmp_path / "ranking.svg"
    ended = tlcli("rank", *words, "image.size=32,48", "--per-class=10", "--format=json", f"--plot={plot}")
    assert (ended.code, ended.err) == (0, "")
    found = json.loads(ended.out)
    assert {(row["backbone"], row["size"]) for row in found["ranking"]} == {
        (name, size) for name in ("efficientnet_lite0", str(own)) for size in (32, 48)
    }
    accuracies = [row["accuracy"] for row in found["ranking"]]
    assert accuracies == sorted(accuracies, reverse=True) and found["ranking"][0]["tied"]
    assert all(row["run_seconds"] > 0 and row["images_per_second"] > 0 for row in found["ranking"])
    program, command, *rest = shlex.split(found["next"])
    spec = compose_spec(rest)
    assert (program, command, spec.dataset.root) == ("tlcli", "train", str(shapes))
    assert any((row["size"], row["tied"]) == (spec.image.size, True) for row in found["ranking"])
    assert "efficientnet_lite0, 32 px" in plot.read_text()
    late = tmp_path / "late.png"
    monkeypatch.setattr("tlcli.runs.plots.plot_ranking", lambda *args: late.write_text("my own"))
    ended = tlcli("rank", *words, "image.size=32", "--per-class=10", f"--plot={late}")
    assert (ended.code, late.read_text()) == (2, "my own") and "exists; name a new file" in ended.err
    monkeypatch.setattr("tlcli.runs.plots.plot_ranking", Mock(side_effect=OSError(28, "No space left", "full.svg")))
    ended = tlcli("rank", *words, "image.size=32", "--per-class=10", f"--plot={tmp_path / 'full.svg'}")
    assert ended.code == 1 and "next" in ended.out and "the disk is full" in ended.err


@pytest.mark.slow
def test_only_what_is_here_is_ranked_and_a_download_is_announced(tlcli: Tlcli, shapes: Path, monkeypatch) -> None:
    words = ["dataset=imagefolder", f"dataset.root={shapes}", "image.size=32", "--per-class=5"]
    monkeypatch.setattr("tlcli.models.backbones.find_spec", lambda name: "lite0" in name or None)
    ended = tlcli("rank", *words)
    assert ended.code == 0
    ranked = [line.split()[0] for line in ended.out.splitlines()[1:] if " ± " in line]
    assert ranked == ["efficientnet_lite0"]
    ended = tlcli("rank", *words, "backbone=resnet18")
    assert ended.err.startswith("resnet18: its weights will be downloaded, about 46.8 MB\n")


def test_the_command_has_the_folder_of_ones_own_options(tlcli: Tlcli, unmeasured, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Path("mine").mkdir()
    unmeasured()
    ended = tlcli("rank", "--config-dir=~/mine", "dataset=digits", f"backbone={LITES[0]}", "--format=json")
    assert f"--config-dir={tmp_path / 'mine'}" in shlex.split(json.loads(ended.out)["next"]), ended.err


@pytest.mark.parametrize(("kind", "words"), [("lite", LITES[0]), ("timm", f"timm/{LITES[0]}")])
def test_the_network_of_a_run_is_that_of_its_kind(tmp_path: Path, kind: str, words: str) -> None:
    info = {"schema_version": 1, "backbone": LITES[0], "backbone_kind": kind}
    write_json(tmp_path / "run.json", info)
    ((own, spec),) = rank.find_candidates([str(tmp_path)], ["dataset=digits"]).values()
    assert spec.backbone.kind == kind and own[:-1] == rank.backbone_words(words, LITES)


def test_a_dataset_is_listed_once_before_it_is_ranked(tlcli: Tlcli, shapes: Path, unmeasured, monkeypatch) -> None:
    listed, listing = [], sources.list_folder
    monkeypatch.setattr(sources, "list_folder", lambda *args: listed.append(args) or listing(*args))
    unmeasured()
    ended = tlcli("rank", "dataset=imagefolder", f"dataset.root={shapes}", f"backbone={','.join(LITES)}")
    assert (ended.code, len(listed)) == (0, 1), ended.err


def test_the_size_of_training_is_in_the_table_and_in_the_command(tlcli: Tlcli, unmeasured) -> None:
    unmeasured()
    found = json.loads(tlcli("rank", "dataset=digits", f"backbone={LITES[0]}", "--format=json").out)
    assert [(row["size"], row["train_size"]) for row in found["ranking"]] == [(224, 160)]
    assert {"image.size=224", "image.train_size=160"} <= set(shlex.split(found["next"]))


@pytest.mark.parametrize(
    ("words", "damaged", "code"), [([], LITES[:1], 0), ([], LITES, 1), ([f"backbone={','.join(LITES)}"], LITES[:1], 1)]
)
def test_a_backbone_that_fails_ends_a_ranking_if_it_was_named(tlcli: Tlcli, unmeasured, words, damaged, code) -> None:
    unmeasured(*damaged)
    ended = tlcli("rank", "dataset=digits", *words, "--format=json")
    assert ended.code == code and "checksum differs" in ended.err, ended.err
    if code == 0:
        assert [row["backbone"] for row in json.loads(ended.out)["ranking"]] == LITES[1:]
        assert ended.err == f"{LITES[0]}: checksum differs\n"


def test_options_of_ones_own_that_cannot_be_used_are_left_out(tlcli: Tlcli, unmeasured, tmp_path: Path) -> None:
    text = (conf_dir() / "backbone/resnet18.yaml").read_text()
    (tmp_path / "mine/backbone").mkdir(parents=True)
    (tmp_path / "mine/backbone/unknown.yaml").write_text(text.replace("name: resnet18", "name: resnet81"))
    (tmp_path / "mine/backbone/gone.yaml").write_text(f"{text}weights: /gone\n")
    assert not rank.has_weights(compose_spec(["--config-dir=mine", "backbone=unknown"]))
    unmeasured(own=["gone"])
    ended = tlcli("rank", "--config-dir=mine", "dataset=digits", "--format=json")
    assert ended.code == 0 and [row["backbone"] for row in json.loads(ended.out)["ranking"]] == LITES, ended.err
    assert ended.err.startswith("gone: backbone.weights=/gone: no finished run") and ended.err.count("\n") == 1


@pytest.mark.parametrize(("weights", "is_known"), [("default", True), ("none", False)])
def test_facts_of_published_weights_are_not_those_of_others(tlcli: Tlcli, unmeasured, weights: str, is_known) -> None:
    unmeasured()
    words = ["dataset=digits", f"backbone={LITES[0]}", f"backbone.weights={weights}"]
    row = json.loads(tlcli("rank", *words, "--format=json").out)["ranking"][0]
    assert [row[key] is not None for key in ("imagenet_top1", "license")] == [is_known, is_known]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["backbone=resnet81"], "resnet81: neither an option, nor timm/NAME, nor a run directory. Did you"),
        (["dataset=imagefolder", "dataset.root=gone"], "gone: no such folder"),
        (["image.size=big"], "image.size=big: must be a number of pixels from 8"),
        (["--plot=ranking.pdf"], "--plot ranking.pdf: must be a .png or .svg"),
        (["--plot=nowhere/x.png"], "--plot nowhere/x.png: nowhere is not a folder; make it first"),
        (["--plot=there.png"], "--plot there.png: exists; name a new file"),
    ],
)
def test_bad_input_has_one_line(tlcli: Tlcli, words: list[str], reason: str) -> None:
    Path("there.png").write_bytes(b"mine")
    ended = tlcli("rank", *words)
    assert ended.code == 2
    assert reason in ended.err and ended.err.count("\n") == 1
    assert Path("there.png").read_bytes() == b"mine"
