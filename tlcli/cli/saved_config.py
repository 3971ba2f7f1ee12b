"""From a run's config.yaml back to the spec that it was trained with, with overrides on it.

The file can come from anyone. It is read as plain values and goes through the same checks as a command line; anything
that is more than a value is refused.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.core.override_parser.types import OverrideType
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tlcli.cli.compose import (
    Flags,
    build_spec,
    compose_config,
    composing,
    parse_flags,
    parse_override,
    resolve_paths,
)
from tlcli.cli.conf_files import ConfFiles, conf_dir
from tlcli.cli.explain import error_message
from tlcli.cli.trust import references, refuse_code
from tlcli.errors import UsageError
from tlcli.files import read_yaml
from tlcli.registry import HOMES, options
from tlcli.runs.run_dir import RunDir
from tlcli.specs import TrainSpec, classes_of


def load_spec(run: RunDir, overrides: Sequence[str] = ()) -> TrainSpec:
    """Return the spec that a run was trained with, from its config.yaml, with overrides on it.

    `dataset=imagefolder dataset.root=x` changes the group as in `tlcli train`; a key that is newer than the run has its
    present default. A relative path in the file is below the directory in which the run was started, if run.json names
    it. Raises UsageError, with the name of the file if the mistake is in it.
    """
    flags = parse_flags(list(overrides))
    if flags.flags:
        raise UsageError(f"{flags.flags[0]} belongs to `tlcli train`: give KEY=VALUE or GROUP=OPTION")
    file, files = run.config_file, ConfFiles([conf_dir()])
    values = _read_values(file, files)
    try:
        start = run.info.get("cwd")
    except UsageError:  # a command that needs run.json reports it
        start = None
    if isinstance(start, str):
        resolve_paths(values, Path(start))
    try:
        spec = _spec(values, (), files)
    except UsageError as exc:
        raise UsageError(f"{file}: {exc}") from exc
    return _spec(values, flags.overrides, files) if flags.overrides else spec


def _read_values(file: Path, files: ConfFiles) -> dict[str, Any]:
    """Return the plain values of a config.yaml without Hydra's node."""
    try:
        read_yaml(file)
        content = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    except FileNotFoundError:
        raise UsageError(f"{file.parent}: no config.yaml here; give the directory of a run") from None
    except (OSError, yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError) as exc:
        reason = getattr(exc, "strerror", None) or error_message(exc, files) or str(exc)
        raise UsageError(f"{file}: cannot be read as YAML: {reason}") from exc
    if not isinstance(content, dict) or not content:
        raise UsageError(f"{file}: holds no config (keys and values)")
    values = {str(key): value for key, value in content.items() if key != "hydra"}
    try:
        refuse_code(values)
    except UsageError as exc:
        raise UsageError(f"{file}: {exc}") from exc
    for key, text in references(values):
        raise UsageError(f"{file}: {key}={text} is refused: the config of a run holds only values")
    return values


def _spec(values: Mapping[str, Any], words: Sequence[str], files: ConfFiles) -> TrainSpec:
    """Return the spec: the defaults of the run's options, the file's values over them, the overrides over these."""
    chosen, given = set(), []
    for word in words:
        with composing(files):
            override = parse_override(word, files)
        name = override.key_or_group
        if override.is_sweep_override() or override.is_delete():
            raise UsageError(f"{word}: give one value for each key: KEY=VALUE or GROUP=OPTION")
        if classes_of(name) and name in files.groups:
            chosen.add(name)
        elif name in files.groups or name.split(".")[0].split("/")[0] == "hydra":
            raise UsageError(f"{word} belongs to `tlcli train`: it has no meaning for a run that exists")
        elif override.type in (OverrideType.CHANGE, OverrideType.ADD, OverrideType.FORCE_ADD):
            given.append(name)
    own = [f"{group}={_option(group, values[group], files)}" for group in HOMES if group in values.keys() - chosen]
    config = compose_config(Flags((), (*own, *words)))
    with composing(files):
        typed = {key: OmegaConf.select(config, key) for key in given}
        for name, value in values.items():
            items = value if classes_of(name) and isinstance(value, dict) else {"": value}
            for key, item in items.items() if name not in chosen else ():
                OmegaConf.update(config, f"{name}.{key}".rstrip("."), item, merge=False)
        for key, value in typed.items():
            OmegaConf.update(config, key, value, merge=False)
    return build_spec(config, files)


def _option(group: str, node: Any, files: ConfFiles) -> str:
    """Return an option of the group with the keys of the file: the one of its name, otherwise any of its kind."""
    if not isinstance(node, dict):
        raise UsageError(f"{group}={node}: {group} has keys of its own")
    kind = str(node.get("kind"))
    if kind not in options(group):
        raise UsageError(f"{group}.kind={kind} is none of {', '.join(options(group))}")
    own = files.options_with(group, {kind})
    return str(node["name"]) if node.get("name") in own else own[0]
