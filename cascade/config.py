"""Settings: composed by Hydra from plain YAML, then read strictly into dataclasses.

Hydra only merges text here. Its schemas let `+stage.stepz=3`, `steps=-5` and `lr=nan` pass, and its `_target_` runs
whatever a file names, so types, names and ranges are checked by `parse` and components are found by `plugin`.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import json
import os
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING
from enum import Enum
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cascade.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig

T = TypeVar("T")

NAMES = {int: "an integer", float: "a number", str: "text", bool: "true or false", Path: "a path", type(None): "null"}


def suggest(word: str, legal: Iterable[str], prefix: str = "") -> str:
    """The nearest of `legal` to `word`, or all of them if none is near, each behind `prefix`: a fix."""
    names = sorted(legal)
    near = difflib.get_close_matches(word, names, n=1) or names
    return " or ".join(f"{prefix}{name}" for name in near) or f"remove {prefix}{word}"


def parse(tree: Mapping[str, Any], cls: type[T], where: str = "") -> T:
    """Reads a plain dict into the dataclass `cls`; `where` is the dotted path of `tree` in error messages.

    Nested dataclasses, list[T], tuple[...], dict[str, T], T | None, Literal, Enum (by value), Path, str, int, float,
    bool and Any (plain data) may be fields. An int is taken for a float; no other type is converted.
    Raises ConfigError for an unknown or missing key, a wrong type, a number that is not finite, `_target_`, and for a
    ValueError of `__post_init__`.
    """
    _refuse_targets(tree, where)
    built: T = _dataclass(tree, cls, where)
    return built


def plain(config: Any) -> dict[str, Any]:
    """The inverse of `parse`: a dataclass (or a mapping) as plain data that JSON can hold."""
    result = _plain(config)
    assert isinstance(result, dict), f"{type(config).__name__} is not a dataclass or mapping"
    return result


def fingerprint(obj: Any) -> str:
    """SHA-256 (hex) of the canonical JSON of dataclasses and plain data."""
    text = json.dumps(_plain(obj), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


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


def package_root() -> Path:
    """The folder that holds cascade/, conf/, stages/ and checkpoints/."""
    return Path(__file__).resolve().parent.parent


def locate(path: str | Path, *, base: Path | None = None) -> Path:
    """`path` as it is if absolute, else under `base` (the working directory) if it is there, else beside cascade/."""
    if not str(path):
        raise ConfigError("a path is empty", fix="name a file or a directory")
    here = (base or Path.cwd()) / path
    return here if here.exists() else package_root() / path


def kinds() -> list[str]:
    """The stage kinds that exist: the files of stages/."""
    return sorted(file.stem for file in (package_root() / "stages").glob("*.py") if not file.stem.startswith("_"))


def plugin(kind: str) -> types.ModuleType:
    """The module `stages.<kind>`. Raises ConfigError naming the kinds that exist."""
    if not re.fullmatch("[a-z_]+", kind) or kind not in kinds():
        raise ConfigError(f"stage kind {kind!r}: there is no stages/{kind}.py", fix=suggest(kind, kinds(), "kind="))
    return importlib.import_module(f"stages.{kind}")


# parse ---------------------------------------------------------------------------------------------------------------


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(cls)


def _join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _setting(where: str) -> str:
    return f"setting {where}" if where else "the settings"


def _refuse_targets(value: Any, where: str) -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == "_target_":
                raise ConfigError(
                    f"{_setting(_join(where, key))}: settings are data, they cannot name code to run",
                    fix=f"remove {_join(where, key)}",
                )
            _refuse_targets(item, _join(where, key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            _refuse_targets(item, f"{where}[{i}]")


def _dataclass(tree: Any, cls: type, where: str) -> Any:
    if not isinstance(tree, Mapping):
        raise _wrong(tree, f"the settings of {cls.__name__}", where)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in tree:
        if key not in fields:
            raise ConfigError(
                f"{_setting(_join(where, key))}: there is no such setting",
                fix=f"write {suggest(str(key), fields, _join(where, ''))}",
            )
    for name, field in fields.items():
        if name not in tree and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{_setting(_join(where, name))}: is missing", fix=f"set {_join(where, name)}")
    hints = _hints(cls)
    values = {key: _value(item, hints[key], _join(where, key)) for key, item in tree.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}" if where else error.message, error.fix) from error
    except ValueError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error), _mend(str(error), where)) from error


def _mend(message: str, where: str) -> str:
    """The fix in `name is value, expected ...`, as our own checks say it."""
    found = re.match(r"([\w.]+) (?:and .*)?(?:is|are) .*expected (.+)", message, re.DOTALL)
    return f"{_join(where, found[1])}={found[2]}" if found else f"another value in {where or 'the settings'}"


def _value(value: Any, hint: Any, where: str) -> Any:
    origin, args = get_origin(hint), get_args(hint)
    if hint is Any:
        return _data(value, where)
    if origin in (Union, types.UnionType):
        return _union(value, args, where)
    if origin is Literal:
        return _choice(value, {item: item for item in args}, where)
    if origin in (list, tuple, dict) or hint in (list, tuple, dict):
        return _container(value, origin or hint, args, where)
    if isinstance(hint, type) and dataclasses.is_dataclass(hint):
        return _dataclass(value, hint, where)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return _choice(value, {item.value: item for item in hint}, where)
    if hint in NAMES:
        return _scalar(value, hint, where)
    raise TypeError(f"{where}: a setting cannot have type {hint}")


def _scalar(value: Any, hint: type, where: str) -> Any:
    if hint is Path and isinstance(value, str | Path) and str(value) and "\0" not in str(value):
        return Path(value)
    number = type(value) in (int, float)
    if number and not -(2.0**63) <= value < 2.0**63:
        raise ConfigError(f"{_setting(where)}: {_show(value)} is not a finite 64-bit number", fix=f"set {where}")
    if hint is float and number:
        return float(value)
    if type(value) is not hint:
        raise _wrong(value, NAMES[hint], where)
    return value


def _union(value: Any, args: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in args:
        return None
    options = [arg for arg in args if arg is not type(None)]
    if len(options) == 1:
        return _value(value, options[0], where)
    reasons = []
    for option in options:
        try:
            return _value(value, option, where)
        except ConfigError as error:
            reasons.append(error.message)
    raise ConfigError("; or ".join(reasons), fix=f"set {where}")


def _choice(value: Any, choices: dict[Any, Any], where: str) -> Any:
    for key, item in choices.items():
        if type(key) is type(value) and key == value:
            return item
    names = [str(key) for key in choices]
    raise ConfigError(
        f"{_setting(where)}: {_show(value)} is not one of {', '.join(names)}",
        fix=suggest(str(value), names, f"{where}="),
    )


def _container(value: Any, kind: type, args: tuple[Any, ...], where: str) -> Any:
    if kind is dict:
        if not isinstance(value, Mapping):
            raise _wrong(value, "a mapping", where)
        for key in value:
            if not isinstance(key, str):
                raise _wrong(key, "text for a name", _join(where, key))
        hint = args[1] if args else Any
        return {key: _value(item, hint, _join(where, key)) for key, item in value.items()}
    if not isinstance(value, list | tuple):
        raise _wrong(value, "a list", where)
    if kind is tuple and args and args[-1] is not Ellipsis:
        if len(value) != len(args):
            raise ConfigError(f"{_setting(where)}: {len(value)} values, expected {len(args)}", fix=f"set {where}")
        return tuple(_value(value[i], hint, f"{where}[{i}]") for i, hint in enumerate(args))
    return kind(_value(item, args[0] if args else Any, f"{where}[{i}]") for i, item in enumerate(value))


def _data(value: Any, where: str) -> Any:
    if isinstance(value, Mapping | list | tuple):
        return _container(value, dict if isinstance(value, Mapping) else list, (), where)
    if type(value) not in NAMES:
        raise _wrong(value, "plain data", where)
    return _scalar(value, type(value), where)


def _show(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**30:
        return "a huge integer"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _wrong(value: Any, expected: str, where: str) -> ConfigError:
    given = "null" if value is None else f"{_show(value)} ({type(value).__name__})"
    return ConfigError(f"{_setting(where)}: {given}, expected {expected}", fix=f"set {where or 'them'} to {expected}")


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value) if field.init}
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, Path):
        return str(value)
    assert value is None or isinstance(value, str | int | float | bool), f"{type(value).__name__} is not plain data"
    return value


# compose -------------------------------------------------------------------------------------------------------------

HYDRA_KEY = re.compile(r"[+~]*(?:hydra(?:[./@:=]|$)|[^=]*@[^=]*hydra)")


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
            raise ConfigError(f"override {_show(override)}: Hydra's own settings are fixed", fix="remove it")
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
    except (OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
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
    except (HydraException, OmegaConfBaseException, YAMLError, UnicodeDecodeError) as error:
        raise _refusal(error, name, overrides, roots) from error
    assert isinstance(tree, dict)
    _refuse_targets(tree, "")
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
        which = f"override {_show(override)}"
        try:
            parsed = parser.parse_override(override)
        except HydraException as error:
            raise ConfigError(
                f"{which}: is not key=value as Hydra reads it", fix="quote the value: \"key='value'\""
            ) from error
        key, _, value = override.partition("=")
        group = _is_group(override, groups, roots)
        if len(key) > 200 or (group and len(value) > 200):  # they become file names
            raise ConfigError(f"{which}: there is no such setting or file", fix="shorten it")
        if parsed.is_sweep_override():
            raise ConfigError(f"{which}: is several values", fix=f"{key}='{value}' or {key}=[{value}]")
        chosen = parsed.is_delete() or isinstance(parsed.value(), str | list)
        if group and not chosen:
            raise ConfigError(f"{which}: {_show(value)} is not the name of a file in conf/{key}", fix=f"{key}=NAME")


def _set(config: DictConfig, overrides: list[str]) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from omegaconf import OmegaConf

    for override in OverridesParser.create().parse_overrides(overrides):
        OmegaConf.update(config, override.key_or_group, override.value(), force_add=True)


def _texts(value: Any, where: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _texts(item, _join(where, key))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _texts(item, f"{where}[{i}]")
    elif isinstance(value, str):
        yield where, value


def _refuse_interpolation(text: str, where: str) -> None:
    # An allow-list: `${oc.${a}:HOME}` hides the resolver from any search for a colon.
    if "${" in re.sub(r"\$\{[\w.\[\]]+\}", "", text):
        raise ConfigError(
            f"setting {_show(where)}: only ${{another.setting}} may be interpolated, not {_show(text)}",
            fix="write the value itself",
        )


def _refusal(error: Exception, name: str, overrides: list[str], roots: list[Path]) -> ConfigError:
    """Hydra's many lines as one, naming the override at fault where Hydra's message tells it."""
    from hydra.errors import MissingConfigException

    reason = " ".join(re.split("Config search path|full_key:", str(error))[0].split())
    guilty = [item for item in overrides if _key(item).lstrip("+~").partition("@")[0] in re.split(r"[^\w.]", reason)]
    which = f"override {', '.join(map(_show, guilty or overrides))}" if overrides else f"configuration {name}"
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        missing = error.missing_cfg_file
        group = _key(guilty[0]).lstrip("+~").partition("@")[0] if guilty else missing.rpartition("/")[0]
        files = [(file, root / group) for root in roots for file in (root / group).rglob("*.yaml")]
        options = {file.relative_to(folder).with_suffix("").as_posix() for file, folder in files}
        fix = suggest(missing.removeprefix(f"{group}/"), options, f"{group}=")
        return ConfigError(f"{which}: there is no conf/{missing}.yaml", fix=fix)
    return ConfigError(f"{which}: {reason}", fix=f"see conf/{name}.yaml")
