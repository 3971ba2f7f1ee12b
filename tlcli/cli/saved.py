"""From a run's config.yaml back to the spec that it was trained with, with overrides on it.

The file may come from anybody. It is read as plain values, and goes through the same dataclasses and checks as a
command line; whatever would be more than a value in it is refused.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml  # type: ignore[import-untyped]
from hydra.core.override_parser.types import Override, OverrideType
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from tlcli.cli.compose import Flags, build, composed, named_code, parse_flags, parse_override, references, resolve_paths
from tlcli.cli.conf_files import MAIN, ConfFiles, conf_dir
from tlcli.cli.explain import explain
from tlcli.cli.yaml_size import check_yaml
from tlcli.errors import UsageError
from tlcli.registry import HOMES, options
from tlcli.runs.run_dir import RunDir, read_json
from tlcli.specs import TrainSpec, classes_of


def saved_spec(run: RunDir, overrides: Sequence[str] = ()) -> TrainSpec:
    """The spec that a run was trained with, from its config.yaml, with overrides on it.

    `dataset=imagefolder dataset.root=x` changes the group as in `tlcli train`; a key that is newer than the run has its
    present default. A relative place in the file is below the directory in which the run was started, where run.json
    says so. Raises UsageError, with the name of the file where the mistake is in it.
    """
    saved = _Saved(run)
    flags = _only_overrides(overrides)
    spec = saved.spec()
    return saved.spec(flags) if flags.overrides else spec


def _only_overrides(words: Sequence[str]) -> Flags:
    flags = parse_flags(list(words))
    if flags.flags:
        raise UsageError(f"{flags.flags[0]} belongs to `tlcli train`: give KEY=VALUE or GROUP=OPTION")
    return flags


class _Saved:
    """The plain values of a run's config.yaml, known to name keys that exist."""

    def __init__(self, run: RunDir) -> None:
        self.file = run.config_file
        self.files = ConfFiles([conf_dir()])
        self.values = self._read()
        self.options = {group: self._option(group) for group in (*HOMES, "device") if group in self.values}
        self._settle(run)

    def spec(self, flags: Flags | None = None) -> TrainSpec:
        """The spec: the defaults of the run's options, the file's values over them, the overrides over these."""
        overrides = [parse_override(word, self.files) for word in flags.overrides] if flags else []
        chosen = [self._is_choice(override) for override in overrides]
        switched = {o.key_or_group for o, is_choice in zip(overrides, chosen, strict=True) if is_choice}
        own = [f"{group}={option}" for group, option in self.options.items() if group not in switched]
        words = [*own, *(flags.overrides if flags else ())]
        try:
            config = composed(Flags((), tuple(words), MAIN.removesuffix(".yaml"), None, False, False))
            given = {key: OmegaConf.select(config, key) for key in _values_given(overrides, chosen)}
        except Exception as exc:
            raise self._usage_error(exc, own=not overrides) from exc
        try:
            for key, value in self._leaves():
                if key.split(".")[0] not in switched:
                    OmegaConf.update(config, key, value, merge=False)
            for key, value in given.items():
                OmegaConf.update(config, key, value, merge=False)
            return build(config, self.files)
        except (OmegaConfBaseException, UsageError) as exc:
            raise self._usage_error(exc, own=not overrides) from exc

    def _is_choice(self, override: Override) -> bool:
        """Whether an override chooses an option of a group; refuses what has no meaning on a run that is over."""
        name = override.key_or_group
        if override.is_sweep_override() or override.is_delete():
            raise UsageError(f"{override.input_line}: give one value for each key: KEY=VALUE or GROUP=OPTION")
        if name in HOMES or name == "device":
            return True
        if name in self.files.groups or name.split(".")[0].split("/")[0] == "hydra":
            raise UsageError(f"{override.input_line} belongs to `tlcli train`: it has no meaning for a finished run")
        return False

    def _usage_error(self, exc: Exception, *, own: bool) -> Exception:
        """The error in one line; the file is named where the mistake is its `own`, not the user's."""
        message = str(exc) if isinstance(exc, UsageError) else explain(exc, self.files)
        if message is None:
            return exc
        return UsageError(f"{self.file}: {message}" if own else message)

    # -- the file

    def _read(self) -> dict[str, Any]:
        try:
            check_yaml(self.file)
            content = OmegaConf.to_container(OmegaConf.load(self.file), resolve=False)
        except FileNotFoundError:
            raise UsageError(f"{self.file.parent}: no config.yaml here; give the directory of a run") from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError, OmegaConfBaseException, ValueError) as exc:
            reason = getattr(exc, "strerror", None) or explain(exc, self.files) or str(exc)
            raise UsageError(f"{self.file}: cannot be read as YAML: {reason}") from exc
        if not isinstance(content, dict) or not content:
            raise UsageError(f"{self.file}: holds no config (keys and values)")
        values = {str(key): value for key, value in content.items() if key != "hydra"}
        for key, target in named_code(values):
            raise UsageError(f"{self.file}: {key}={target} is refused: a config cannot name code to run")
        for key, text in references(values):
            raise UsageError(f"{self.file}: {key}={text} is refused: a finished run's config holds values alone")
        return values

    def _option(self, group: str) -> str:
        """An option of the group whose keys are those of the file: the one of its name, else any of its kind."""
        node = self.values[group]
        if not isinstance(node, dict):
            raise UsageError(f"{self.file}: {group}={node}: {group} has keys of its own")
        if group == "device":
            return self.files.defaults[group]
        kind = str(node.get("kind"))
        if kind not in options(group):
            raise UsageError(f"{self.file}: {group}.kind={kind} is none of {', '.join(options(group))}")
        own = self.files.options_with(group, {kind})
        return str(node["name"]) if node.get("name") in own else own[0]

    def _leaves(self) -> Iterator[tuple[str, Any]]:
        """The full key of each value; a value may be a list or have names that are the user's."""
        for name, value in self.values.items():
            if classes_of(name) and isinstance(value, dict):
                yield from ((f"{name}.{key}", inner) for key, inner in value.items())
            else:
                yield name, value

    def _settle(self, run: RunDir) -> None:
        """Make relative places absolute."""
        try:
            start = read_json(run.info_file).get("cwd")
        except (OSError, ValueError):  # whoever needs run.json says what is wrong with it
            start = None
        if isinstance(start, str):
            resolve_paths(self.values, Path(start))


def _values_given(overrides: Sequence[Override], chosen: Sequence[bool]) -> Iterator[str]:
    """The keys that the user gave a value."""
    for override, is_choice in zip(overrides, chosen, strict=True):
        if not is_choice and override.type in (OverrideType.CHANGE, OverrideType.ADD, OverrideType.FORCE_ADD):
            yield override.key_or_group
