"""`tlcli inspect`: what its words mean, and how the figures look. What is measured is in tests/test_inspection.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from tlcli.cli.inspect import page, specs

CUT = {
    "freeze": "head",
    "trainable": 2562,
    "at": "classifier",
    "row_bytes": 2560,
    "cache_bytes": 1_018_880,
    "first_pass": 5.97,
    "cached_epoch": 0.008,
    "live_epoch": 3.8,
    "takes": "cached",
    "why_live": None,
    "total": 6.1,
}
LAST = [{**CUT, "freeze": f"last_stages n={n}", "takes": "live", "why_live": "crops", "total": 28.0} for n in (1, 2, 3)]
REASON = "no frozen layers at the input: conv_stem trains"
LIVE = {"freeze": "none", "trainable": 3_373_570, "live_epoch": 13.4, "why_live": REASON, "total": 4000.0}
FOUND = {
    "backbone": "efficientnet_lite0",
    "dataset": "imagefolder photos",
    "classes": 2,
    "images": {"train": 221, "val": 24, "test": 153},
    "size": 224,
    "epochs": 5,
    "batch_size": 32,
    "device": "CPU, training in float32",
    "cores": 2,
    "load": 0.5,
    "stages": [
        {"name": "stem", "parameters": 3_371_008, "share": 0.99},
        {"name": "head", "parameters": 2562, "share": 0.01},
    ],
    "strategies": [CUT, *LAST, {**dict.fromkeys(CUT), "takes": "live", **LIVE}],
}


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_a_page_fits_its_width(width: int) -> None:
    lines = page(FOUND, width)
    assert max(map(len, lines)) <= width
    table = next(i for i, line in enumerate(lines) if line.startswith("freeze"))
    assert {"first", "then", "uncached", "run"} <= set(lines[table].split())
    assert lines[table + 1].split()[0] == "head"
    assert lines[table + 5].split()[-1 if width < 80 else -2] == "1:06:40"


def test_words_are_those_of_train(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "resnet18").mkdir()  # a folder of the same name is no run
    spec, linear = specs(["resnet18", "dataset=imagefolder", f"dataset.root={shapes}", "batch_size=7"])
    assert (spec.backbone.name, spec.batch_size, spec.augment.kind) == ("resnet18", 7, "crop")
    assert linear.kind == "none", "freeze=head comes with images as they are"
    assert specs([])[0].backbone.name == "efficientnet_lite0"
    assert specs(["augment=trivial"])[1].kind == "trivial"
    for words in (["timm/resnet10t"], ["timm", "backbone.name=resnet10t"]):
        assert specs(words)[0].backbone.name == "resnet10t"


def test_json_and_table_of_a_run(shapes: Path, tlcli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, config = tmp_path / "run", ["dataset=imagefolder", f"dataset.root={shapes}", "backbone=resnet18"]
    code = tlcli("train", "--cfg", "job", "--resolve", *config, "backbone.weights=none", "image.size=40", "epochs=7")
    run.mkdir()
    (run / "config.yaml").write_text(code.out)
    monkeypatch.setattr("tlcli.engine.costs.inspect", lambda spec, head_augment, reporter: _echo(spec, head_augment))
    ended = tlcli("inspect", str(run), "epochs=9", "--format", "json")
    assert ended.code == 0, ended.err
    found = json.loads(ended.out)
    assert (found["backbone"], found["size"], found["epochs"]) == ("resnet18", 40, 9)
    assert found["strategies"][0]["cache_bytes"] == 1_018_880
    assert tlcli("inspect", str(run)).out.startswith("backbone   resnet18, ")
    assert "--config-dir has no effect on a run" in tlcli("inspect", str(run), f"--config-dir={tmp_path}").err


def _echo(spec, linear) -> dict[str, Any]:  # type: ignore[no-untyped-def]
    assert linear.kind == "none"
    return {**FOUND, "backbone": spec.backbone.name, "size": spec.image.size, "epochs": spec.epochs}
