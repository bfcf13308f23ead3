"""YAML files and command-line words become one plain tree: Hydra's composition, without what in it can run code."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cascade.config import join, package_root, refuse_targets, show, suggest
from cascade.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

HYDRA_KEY = re.compile(r"[+~]*(?:hydra(?:[./@:=]|$)|[^=]*@[^=]*hydra)")


def split_prompts(
    argv: Sequence[str], keys: Sequence[str] = ("prompt", "negative_prompt")
) -> tuple[dict[str, str], list[str]]:
    """Takes `key=<free text>` out of `argv` so that Hydra never reads, splits or interpolates it; the last one wins."""
    prompts, rest = {}, []
    for argument in argv:
        key, equals, text = argument.partition("=")
        if equals and key in keys:
            prompts[key] = text
        else:
            rest.append(argument)
    return prompts, rest


def compose(
    name: str, overrides: Sequence[str] = (), config_dir: Path | None = None, *, root: Path | None = None
) -> dict[str, Any]:
    """The primary configuration `name` of conf/ with its groups and `overrides` merged, as plain data.

    `config_dir` adds a folder to the search path; `root` replaces conf/. A plain `key=value` may also name a setting
    that no YAML file writes: `parse` decides which names are legal and suggests the nearest.
    Only `${another.setting}` interpolation is allowed. Raises ConfigError.
    """
    root = (root or package_root() / "conf").resolve()
    roots = [root]
    if config_dir is not None:
        if not config_dir.is_dir():
            raise ConfigError(f"config directory {config_dir}: is not a directory", fix="--config-dir DIR")
        roots.append(config_dir.resolve())
    if not re.fullmatch("[a-z_]+", name) or not any((path / f"{name}.yaml").is_file() for path in roots):
        raise ConfigError(f"configuration {name!r}: there is no {name}.yaml in conf/", fix="`cascade list`")
    for override in overrides:
        _refuse_interpolation(override, override)
        if HYDRA_KEY.match(override):
            raise ConfigError(f"override {show(override)}: Hydra's own settings are fixed", fix="remove it")
    return _composed(name, list(overrides), roots)


def _composed(name: str, overrides: list[str], roots: list[Path]) -> dict[str, Any]:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped]

    try:
        groups = _groups(name, roots)
    except (OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
        raise _refusal(error, name, [], roots) from error
    _check_syntax(overrides, groups, roots)
    # A group's name that this configuration does not use as a group (`weights=DIR` of one stage) is a plain setting.
    values = [item for item in overrides if not _is_group(item, groups, roots)]
    own = [item for item in values if any(os.path.isdir(root / _key(item)) for root in roots)]
    handed = [_forced(item) if item in values else item for item in overrides if item not in own]
    if len(roots) > 1:
        quoted = str(roots[1]).replace("\\", "\\\\").replace("'", "\\'")
        handed.append(f"hydra.searchpath=['file://{quoted}']")
    try:
        with initialize_config_dir(str(roots[0]), version_base="1.3"):
            config = hydra_compose(name, overrides=handed)
        _set(config, own)
        for path, text in _texts(OmegaConf.to_container(config, resolve=False), ""):
            _refuse_interpolation(text, path)
        tree = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, YAMLError, ValueError, RecursionError) as error:
        raise _refusal(error, name, overrides, roots) from error
    assert isinstance(tree, dict)
    refuse_targets(tree, "")
    return {str(key): value for key, value in tree.items()}


def _key(override: str) -> str:
    return override.partition("=")[0]


def _forced(override: str) -> str:
    return override if override.startswith(("+", "~")) else f"++{override}"


def _groups(name: str, roots: list[Path]) -> set[str]:
    """The groups that the primary configuration itself selects from."""
    from omegaconf import OmegaConf

    file = next(path / f"{name}.yaml" for path in roots if (path / f"{name}.yaml").is_file())
    tree = OmegaConf.to_container(OmegaConf.load(file), resolve=False)
    defaults = tree.get("defaults") if isinstance(tree, dict) else None
    entries = [str(key) for item in defaults or () if isinstance(item, dict) for key in item]
    return {entry.split()[-1].lstrip("/").partition("@")[0] for entry in entries}


def _is_group(override: str, groups: set[str], roots: list[Path]) -> bool:
    key, _, option = override.partition("=")
    if "/" in key or "@" in key:
        return True
    key = key.lstrip("+~")
    return key in groups or any(os.path.isfile(root / key / f"{option}.yaml") for root in roots)


def _check_syntax(overrides: list[str], groups: set[str], roots: list[Path]) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for override in overrides:
        which = f"override {show(override)}"
        try:
            parsed = parser.parse_override(override)
        except HydraException as error:
            fix = "quote the value: \"key='value'\"" if "=" in override else 'key=value, such as prompt="..."'
            raise ConfigError(f"{which}: is not key=value as Hydra reads it", fix=fix) from error
        key, _, value = override.partition("=")
        group = _is_group(override, groups, roots)
        if len(key) > 200 or (group and len(value) > 200):  # they become file names
            raise ConfigError(f"{which}: there is no such setting or file", fix="shorten it")
        if parsed.is_sweep_override():
            raise ConfigError(f"{which}: is several values", fix=f"{key}='{value}' or {key}=[{value}]")
        chosen = parsed.is_delete() or isinstance(parsed.value(), str | list)
        if group and not chosen:
            raise ConfigError(f"{which}: {show(value)} is not the name of a file in conf/{key}", fix=f"{key}=NAME")


def _set(config: DictConfig, overrides: list[str]) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    for override in OverridesParser.create().parse_overrides(overrides):
        OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, join(where, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _texts(item, f"{where}[{i}]")
    elif isinstance(value, str):
        yield where, value


def _refuse_interpolation(text: str, where: str) -> None:
    # An allow-list: `${oc.${a}:HOME}` hides the resolver from any search for a colon.
    if "${" in re.sub(r"\$\{[\w.\[\]]+\}", "", text):
        raise ConfigError(
            f"setting {show(where)}: only ${{another.setting}} may be interpolated, not {show(text)}",
            fix="write the value itself",
        )


def _refusal(error: Exception, name: str, overrides: list[str], roots: list[Path]) -> ConfigError:
    """Hydra's many lines as one, naming the override at fault where Hydra's message tells it."""
    from hydra.errors import MissingConfigException

    said = "it refers to itself" if isinstance(error, RecursionError) else str(error) or str(error.__cause__)
    reason = " ".join(re.split("Config search path|full_key:", said)[0].split())
    if unset := re.match(r"You must specify '(\w+)'", reason):
        return ConfigError(f"{unset[1]} is missing", fix=f"{unset[1]}=NAME, one that `cascade list` shows")
    guilty = [item for item in overrides if _key(item).lstrip("+~").partition("@")[0] in re.split(r"[^\w.]", reason)]
    which = f"override {', '.join(map(show, guilty or overrides))}" if overrides else f"configuration {name}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        missing = error.missing_cfg_file
        group = _key(guilty[0]).lstrip("+~").partition("@")[0] if guilty else missing.rpartition("/")[0]
        files = [(file, root / group) for root in roots for file in (root / group).rglob("*.yaml")]
        options = {file.relative_to(folder).with_suffix("").as_posix() for file, folder in files}
        fix = suggest(missing.removeprefix(f"{group}/"), options, f"{group}=")
        return ConfigError(f"{which}: there is no conf/{missing}.yaml", fix=fix)
    return ConfigError(f"{which}: {reason}", fix=f"see conf/{name}.yaml")
