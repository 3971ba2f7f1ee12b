"""Every YAML file of conf/: it composes, its values are in range, and it explains itself."""

from dataclasses import MISSING, fields
from pathlib import Path

import pytest

from tlcli.cli.compose import build, composed, parse_flags, register
from tlcli.cli.conf_files import ConfFiles, conf_dir, keys_in
from tlcli.specs import SCHEMAS, CacheSpec, CheckpointSpec, DeviceSpec, ImageSpec, TrainSpec

FILES = ConfFiles([conf_dir()])
OPTIONS = [option for options in FILES.groups.values() for option in options.values()]
NESTED = {"image": ImageSpec, "cache": CacheSpec, "checkpoint": CheckpointSpec}
COMMON = sorted((conf_dir() / "common").glob("*.yaml"))


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.group}={option.name}")
def test_option_composes_and_is_in_range(option) -> None:
    register()
    flags = parse_flags([f"{option.group}={option.name}"])
    waiting = [f"{option.group}.{key.name}=x" for key in keys_in(option.text) if key.default == "???"]
    spec = build(composed(parse_flags([*flags.overrides, *waiting])), FILES)
    assert isinstance(spec, TrainSpec)
    if option.group in SCHEMAS:
        assert isinstance(getattr(spec, option.group), SCHEMAS[option.group][option.schema])


def test_defaults_need_no_value() -> None:
    register()
    assert isinstance(build(composed(parse_flags([])), FILES), TrainSpec)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.group}={option.name}")
def test_option_says_what_it_is(option) -> None:
    assert 3 < len(option.comment) < 110


def test_groups_are_those_of_the_issue() -> None:
    groups = ["dataset", "backbone", "optimizer", "scheduler", "augment", "freeze", "device", "logger", "experiment"]
    assert list(FILES.groups) == groups
    assert set(SCHEMAS) == set(groups) - {"experiment"}


@pytest.mark.parametrize("path", [conf_dir() / "train.yaml", *COMMON], ids=lambda path: path.stem)
def test_every_shared_key_has_a_comment(path: Path) -> None:
    keys = list(keys_in(path.read_text(encoding="utf-8")))
    assert keys
    assert [key.name for key in keys if not key.comment] == []


def test_main_file_has_every_top_level_key() -> None:
    nested = {f"{key}.{f.name}" for key, kind in NESTED.items() for f in fields(kind)}
    plain = {f.name for f in fields(TrainSpec)} - {*SCHEMAS, *NESTED}
    assert {key.name for key in FILES.top_level()} == plain | nested


def test_code_has_no_defaults() -> None:
    """A default's home is its YAML; a class has its tag alone."""
    kinds = [TrainSpec, *NESTED.values(), *(kind for options in SCHEMAS.values() for kind in options.values())]
    for kind in kinds:
        with_default = [f.name for f in fields(kind) if f.default is not MISSING or f.default_factory is not MISSING]
        assert with_default == (["kind"] if kind not in (TrainSpec, *NESTED.values(), DeviceSpec) else [])


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.group}={option.name}")
def test_option_repeats_no_shared_default(option) -> None:
    """But where it says more about the key than common/ does."""
    common = conf_dir() / "common" / f"{option.group}.yaml"
    shared = {key.name: key.default for key in keys_in(common.read_text(encoding="utf-8"))} if common.exists() else {}
    own = [key for key in keys_in(option.text) if option.group in SCHEMAS]
    assert [key.name for key in own if shared.get(key.name) == key.default and not key.comment] == []
