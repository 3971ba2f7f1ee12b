"""Every YAML file of conf/: it composes, its values are in range, and it explains itself."""

import pytest
from msgspec.structs import fields
from omegaconf import DictConfig, OmegaConf

from tests.conftest import Compose
from tlcli.cli.compose import build_spec, compose_config, parse_flags, parse_override
from tlcli.cli.conf_files import ConfFiles, conf_dir, keys_in
from tlcli.errors import UsageError
from tlcli.specs import (
    HOMES,
    CacheSpec,
    CheckpointSpec,
    DeviceSpec,
    ImageSpec,
    SchedulerSpec,
    TrainSpec,
    Verify,
    all_keys,
    classes_of,
    leaf_types,
    option,
    options,
)

FILES = ConfFiles()
OPTIONS = [option for options in FILES.groups.values() for option in options.values()]
NESTED = {"image": ImageSpec, "cache": CacheSpec, "checkpoint": CheckpointSpec}
COMMON = sorted((conf_dir() / "common").glob("*.yaml"))


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: f"{option.group}={option.name}")
def test_option_composes_and_is_in_range(option) -> None:
    flags = parse_flags([f"{option.group}={option.name}"])
    required = [key.name for key in option.keys if key.default == "???"]
    types = {f.name: str(f.type) for f in fields(options(option.group)[option.kind])} if required else {}
    waiting = [f"{option.group}.{name}={'[x]' if 'tuple' in types[name] else 'x'}" for name in required]
    spec = build_spec(compose_config(parse_flags([*flags.overrides, *waiting]))[0], FILES)
    assert isinstance(spec, TrainSpec)
    assert 3 < len(option.comment) < 110
    if option.group in HOMES:
        assert type(getattr(spec, option.group)) is options(option.group)[option.kind]


def test_every_shared_key_has_a_comment() -> None:
    for path in [conf_dir() / "train.yaml", *COMMON]:
        keys = keys_in(path.read_text(encoding="utf-8"))
        assert keys and [key.name for key in keys if not key.comment] == [], path


def test_main_file_has_every_top_level_key() -> None:
    nested = {f"{key}.{f.name}" for key, kind in NESTED.items() for f in fields(kind)}
    plain = {f.name for f in fields(TrainSpec)} - {*HOMES, "device", *NESTED}
    assert {key.name for key in FILES.top_level} == plain | nested


def test_code_has_no_defaults() -> None:
    classes = [TrainSpec, DeviceSpec, *NESTED.values(), *(cls for group in HOMES for cls in options(group).values())]
    assert [f.name for cls in classes for f in fields(cls) if not f.required] == []


def test_no_option_repeats_a_shared_default() -> None:
    for own in OPTIONS:
        common = conf_dir() / "common" / f"{own.group}.yaml"
        shared = {key.name: key.default for key in keys_in(common.read_text())} if common.exists() else {}
        repeated = [k.name for k in own.keys if shared.get(k.name) == k.default and not k.comment]
        assert repeated == [], own.path


TEXT = {
    "dataset.root=2024_01": "2024_01",
    "dataset.root=true": "true",
    "dataset.root=a(b": "a(b",
    "dataset.root=it's": "it's",
    "dataset.root='2024_01'": "2024_01",
    "dataset.root=null": None,
    "dataset.classes=[true,false]": ("true", "false"),
    "dataset.classes=[1, 2_0,'a,b']": ("1", "2_0", "a,b"),
    "dataset.classes=[caf\u00e9,th\u00e9]": ("caf\u00e9", "th\u00e9"),
    "dataset.classes=[\u732b,\u72ac]": ("\u732b", "\u72ac"),
    "dataset.classes=[a (1),b]": ("a (1)", "b"),
    "dataset.classes=[a & b,'c d']": ("a & b", "c d"),
    "dataset.classes=[don't,b]": r"dataset.classes=\[don't,b\]",
    "dataset.classes=[null]": "dataset.classes=null: expected a text",
    "backbone.weights=none": "none",
}


@pytest.mark.parametrize("word", TEXT)
def test_a_key_whose_type_is_text_takes_it_as_typed(word: str, spec: Compose) -> None:
    part, name = word.partition("=")[0].split(".")
    if str(TEXT[word]).startswith("dataset.classes="):
        with pytest.raises(UsageError, match=TEXT[word]):
            spec(word)
    else:
        assert getattr(getattr(spec(word), part), name) == TEXT[word]


@pytest.mark.parametrize("key", ["hydra.run.dir", "hydra.sweep.dir", "hydra.sweep.subdir"])
@pytest.mark.parametrize("name", ["2024_01_15", "it's here"])
def test_a_folder_of_runs_has_the_name_that_was_typed(key: str, name: str) -> None:
    assert OmegaConf.select(compose_config(parse_flags([f"{key}={name}"]))[0], key) == name


def test_a_sweep_over_text_takes_it_as_typed(spec: Compose) -> None:
    (override,) = parse_flags(["-m", "dataset.classes=[true,false],[1,2]"]).overrides
    jobs = [f"dataset.classes={value}" for value in parse_override(override, FILES).sweep_string_iterator()]
    assert jobs == ["dataset.classes=['true','false']", "dataset.classes=['1','2']"]
    assert [spec(job).dataset.classes for job in jobs] == [("true", "false"), ("1", "2")]


@pytest.mark.slow
def test_no_number_may_be_infinite() -> None:
    numbers = [key for key in all_keys() if {int, float} & {*leaf_types(key)}]
    assert len(numbers) > 40
    configs: dict[tuple[str, ...], DictConfig] = {}
    for key in numbers:
        part, _, name = key.rpartition(".")
        owners = {kind: cls for kind, cls in classes_of(part).items() if name in cls.__struct_fields__}
        choice = [f"{part}={FILES.options_with(part, owners)[0]}"] if part in HOMES else []
        kind = next(str(f.type) for f in fields(next(iter(owners.values()))) if f.name == name)
        if tuple(choice) not in configs:
            configs[tuple(choice)] = compose_config(parse_flags(choice))[0]
            OmegaConf.set_struct(configs[tuple(choice)], False)
            del configs[tuple(choice)]["hydra"]
        for value in map(float, ("inf", "-inf", "nan")):
            number = [value] * kind.count("float") if "tuple" in kind else value
            config = configs[tuple(choice)].copy()
            OmegaConf.update(config, key, number, merge=False, force_add=True)
            with pytest.raises(UsageError, match=rf"^{key}\b.* (is not a finite number|expected .*number.*|is empty)"):
                build_spec(config, FILES)


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("optimizer.lr=1e-3", 1e-3),
        ("optimizer.lr='0.1'", 0.1),
        ("clip_grad=2", 2.0),
        ("device.channels_last=true", True),
        ("dataset.range=auto", "auto"),
        ("dataset.range=[0,4095]", (0.0, 4095.0)),
        ("dataset.verify=full", Verify.full),
        ("optimizer.betas=[0.8,0.9]", (0.8, 0.9)),
    ],
)
def test_a_value_is_converted_as_users_expect(word: str, value: object, spec: Compose) -> None:
    *parts, name = word.partition("=")[0].split(".")
    found = spec(word)
    found = getattr(getattr(found, parts[0]) if parts else found, name)
    assert found == value
    assert type(found) is type(value)


def test_an_option_is_one_decorated_class() -> None:
    """Everything that lists options iterates over the registry: a class that is decorated is accepted at once."""

    class ReverseSpec(SchedulerSpec, frozen=True, tag="reverse"):
        pass

    assert "reverse" not in options("scheduler")
    option(ReverseSpec)
    try:
        config = compose_config(parse_flags(["scheduler=constant"]))[0]
        config.scheduler.kind = "reverse"
        assert type(build_spec(config, FILES).scheduler) is ReverseSpec
    finally:
        del options("scheduler")["reverse"]


def test_arguments_of_a_torchvision_split_keep_their_type() -> None:
    spec = build_spec(compose_config(parse_flags(["dataset=cifar10", "dataset.test.train=false"]))[0], FILES)
    assert spec.dataset.test == {"train": False}  # type: ignore[attr-defined]
