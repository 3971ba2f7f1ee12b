"""A spec from a run's config.yaml: the one that it was trained with, and nothing that is not a value."""

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]
from msgspec import structs
from omegaconf import OmegaConf

from tests.conftest import Compose
from tlcli.cli.compose import compose_config, load_spec, parse_flags
from tlcli.data.sources import ImageFolderSpec
from tlcli.errors import UsageError
from tlcli.runs.run_dir import RunDir

Saved = Callable[..., RunDir]


@pytest.fixture
def saved(tmp_path: Path) -> Saved:
    """saved("freeze=head"): a run of these overrides, as far as its config.yaml and run.json."""

    def make(*overrides: str) -> RunDir:
        run = RunDir(tmp_path / "run")
        run.start(command="tlcli train", overrides=overrides, config=config_of(*overrides))
        return run

    return make


@functools.cache
def config_of(*overrides: str) -> str:
    config = compose_config(parse_flags(list(overrides)))[0]
    OmegaConf.set_struct(config, False)
    config.pop("hydra")
    return OmegaConf.to_yaml(config, resolve=True)


def change(run: RunDir, **values: Any) -> None:
    """Put values into config.yaml; a group's keys as a dict."""
    content = yaml.safe_load(run.config_file.read_text())
    for key, value in values.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    run.config_file.write_text(yaml.safe_dump(content))


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("dataset=imagefolder", "dataset.root=/photos", "freeze=last_stages", "freeze.n=2", "optimizer.lr=1e-7"),
        ("dataset=manifest", "dataset.file=/a.csv", "augment=randaugment", "optimizer=sgd", "scheduler=one_cycle"),
        ("dataset=eurosat", "dataset.root=/data", "backbone=resnet18", "device=cpu", "dataset.classes=[a,b]"),
        ("dataset=cifar10", "dataset.root=/data", "backbone=timm", "backbone.name=resnet10t", "freeze=pattern",
         "freeze.train=['layer4']", "image.mean=[0.1,0.2,0.3]", "cache.mode=off"),
    ],
)  # fmt: skip
def test_it_is_the_spec_of_the_run(saved: Saved, spec: Compose, overrides: tuple[str, ...]) -> None:
    assert load_spec(saved(*overrides)) == spec(*overrides)


def test_a_data_set_is_switched_as_in_train(saved: Saved, spec: Compose) -> None:
    run = saved("dataset=cifar10", "dataset.root=/data", "dataset.train_per_class=50", "freeze=head")
    own = spec("dataset=cifar10", "dataset.root=/data", "dataset.train_per_class=50", "freeze=head")
    found = load_spec(run, ["dataset=imagefolder", "dataset.root=/photos"])
    assert found.dataset == spec("dataset=imagefolder", "dataset.root=/photos").dataset
    assert isinstance(found.dataset, ImageFolderSpec)
    assert structs.replace(found, dataset=own.dataset) == own


def test_keys_that_an_older_run_lacks_have_their_defaults(saved: Saved, spec: Compose) -> None:
    run = saved("freeze=head")
    content = yaml.safe_load(run.config_file.read_text())
    del content["cache"]
    del content["clip_grad"]
    del content["dataset"]["min_crop"]
    run.config_file.write_text(yaml.safe_dump(content))
    assert load_spec(run) == spec("freeze=head")


def test_relative_places_are_below_where_the_run_was_started(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    start = Path.cwd()
    run = saved("dataset=imagefolder", "dataset.root=photos")
    monkeypatch.chdir(run.path)
    assert load_spec(run).dataset.root == str(start / "photos")
    assert load_spec(run, ["dataset.root=mine"]).dataset.root == "mine"
    record = json.loads(run.info_file.read_text())
    del record["cwd"]
    run.info_file.write_text(json.dumps(record))
    assert load_spec(RunDir(run.path)).dataset.root == "photos"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": {"sise": 3}}, "unknown key 'image.sise'. Did you mean 'image.size'?"),
        ({"epochs": "many"}, "epochs=many: expected a whole number"),
        ({"batch_size": 0}, "batch_size=0: expected a whole number >= 1"),
        ({"dataset": {"kind": "tar"}}, "dataset.kind=tar is none of digits, imagefolder"),
        ({"freeze": 3}, "freeze=3: freeze has keys of its own"),
        ({"dataset": {"root": {"_target_": "x"}}}, "dataset.root={'_target_': 'x'}: expected a text"),
        ({"_target_": "os.system"}, "unknown key '_target_'"),
        ({"dataset": {"classes": ["a", "${oc.env:HOME}"]}}, "dataset.classes.1=${oc.env:HOME} is refused"),
    ],
)
def test_a_mistake_in_the_file_names_file_and_key(saved: Saved, values: dict[str, Any], message: str) -> None:
    run = saved("dataset=digits")
    change(run, **values)
    with pytest.raises(UsageError) as caught:
        load_spec(run)
    assert str(caught.value).startswith(f"{run.config_file}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_run_without_its_config(saved: Saved) -> None:
    (run := saved()).config_file.unlink()
    with pytest.raises(UsageError, match=r"no config\.yaml here"):
        load_spec(run)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("dataset.rot=x", "unknown key 'dataset.rot'"),
        ("dataset.ram_gb=-1", "expected a number >= 0"),
        ("experiment=digits", "has no meaning for a run that exists: leave it out"),
        ("hydra.run.dir=x", "has no meaning for a run that exists: leave it out"),
        ("-m", "has no meaning for a run that exists: leave it out"),
        ("seed=1,2", "one value for each key"),
        ("~dataset.root", "one value for each key"),
    ],
)
def test_a_mistake_on_the_command_line_does_not_name_the_file(saved: Saved, override: str, message: str) -> None:
    run = saved()
    with pytest.raises(UsageError) as caught:
        load_spec(run, [override])
    assert message in str(caught.value)
    assert str(run.config_file) not in str(caught.value)
