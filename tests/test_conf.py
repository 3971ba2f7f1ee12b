"""Every YAML file of conf/: it composes, its values are in range, and it explains itself."""

from pathlib import Path

import pytest
from msgspec.structs import fields

from tlcli.cli.compose import build_spec, compose_config, parse_flags
from tlcli.cli.conf_files import ConfFiles, conf_dir, keys_in
from tlcli.registry import HOMES, options
from tlcli.specs import CacheSpec, CheckpointSpec, DeviceSpec, ImageSpec, TrainSpec, classes_of

FILES = ConfFiles([conf_dir()])
OPTIONS = [option for options in FILES.groups.values() for option in options.values()]
NESTED = {"image": ImageSpec, "cache": CacheSpec, "checkpoint": CheckpointSpec}
COMMON = sorted((conf_dir() / "common").glob("*.yaml"))


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.group}={option.name}")
def test_option_composes_and_is_in_range(option) -> None:
    flags = parse_flags([f"{option.group}={option.name}"])
    waiting = [f"{option.group}.{key.name}=x" for key in keys_in(option.text) if key.default == "???"]
    spec = build_spec(compose_config(parse_flags([*flags.overrides, *waiting])), FILES)
    assert isinstance(spec, TrainSpec)
    if option.group in HOMES:
        assert type(getattr(spec, option.group)) is options(option.group)[option.kind]


def test_defaults_need_no_value() -> None:
    assert isinstance(build_spec(compose_config(parse_flags([])), FILES), TrainSpec)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.group}={option.name}")
def test_option_says_what_it_is(option) -> None:
    assert 3 < len(option.comment) < 110


def test_groups_are_those_of_the_issue() -> None:
    groups = ["dataset", "backbone", "optimizer", "scheduler", "augment", "freeze", "device", "logger", "experiment"]
    assert list(FILES.groups) == groups
    assert set(HOMES) == set(groups) - {"device", "experiment"}


@pytest.mark.parametrize("path", [conf_dir() / "train.yaml", *COMMON], ids=lambda path: path.stem)
def test_every_shared_key_has_a_comment(path: Path) -> None:
    keys = list(keys_in(path.read_text(encoding="utf-8")))
    assert keys
    assert [key.name for key in keys if not key.comment] == []


def test_main_file_has_every_top_level_key() -> None:
    nested = {f"{key}.{f.name}" for key, kind in NESTED.items() for f in fields(kind)}
    plain = {f.name for f in fields(TrainSpec)} - {*HOMES, "device", *NESTED}
    assert {key.name for key in FILES.top_level()} == plain | nested


def test_code_has_no_defaults() -> None:
    """A default's home is its YAML."""
    classes = [TrainSpec, DeviceSpec, *NESTED.values(), *(cls for group in HOMES for cls in options(group).values())]
    assert [f.name for cls in classes for f in fields(cls) if not f.required] == []


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.group}={option.name}")
def test_option_repeats_no_shared_default(option) -> None:
    """But where it says more about the key than common/ does."""
    common = conf_dir() / "common" / f"{option.group}.yaml"
    shared = {key.name: key.default for key in keys_in(common.read_text(encoding="utf-8"))} if common.exists() else {}
    own = [key for key in keys_in(option.text) if classes_of(option.group)]
    assert [key.name for key in own if shared.get(key.name) == key.default and not key.comment] == []
