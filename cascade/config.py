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
import re
import types
from collections.abc import Iterable, Mapping
from dataclasses import MISSING
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from cascade.errors import ConfigError

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
    refuse_targets(tree, where)
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


def package_root() -> Path:
    """The folder that holds cascade/, conf/, stages/ and checkpoints/."""
    return Path(__file__).resolve().parent.parent


def locate(path: str | Path) -> Path:
    """`path` as it is if absolute, else beside cascade/ if it is there alone, else in the working directory."""
    if not str(path):
        raise ConfigError("a path is empty", fix="name a file or a directory")
    here, shipped = Path.cwd() / path, package_root() / path
    return shipped if shipped.exists() and not here.exists() else here


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


def join(where: str, key: object) -> str:
    return f"{where}.{key}" if where else str(key)


def _setting(where: str) -> str:
    return f"setting {where}" if where else "the settings"


def refuse_targets(value: Any, where: str) -> None:
    """Raises ConfigError for a key `_target_` anywhere in `value`: Hydra would run what it names."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            if key == "_target_":
                raise ConfigError(
                    f"{_setting(join(where, key))}: settings are data, they cannot name code to run",
                    fix=f"remove {join(where, key)}",
                )
            refuse_targets(item, join(where, key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            refuse_targets(item, f"{where}[{i}]")


def _dataclass(tree: Any, cls: type, where: str) -> Any:
    if not isinstance(tree, Mapping):
        raise _wrong(tree, f"the settings of {cls.__name__}", where)
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    for key in tree:
        if key not in fields:
            raise ConfigError(
                f"{_setting(join(where, key))}: there is no such setting",
                fix=f"write {suggest(str(key), fields, join(where, ''))}",
            )
    for name, field in fields.items():
        if name not in tree and field.default is MISSING and field.default_factory is MISSING:
            raise ConfigError(f"{_setting(join(where, name))}: is missing", fix=f"set {join(where, name)}")
    hints = _hints(cls)
    values = {key: _value(item, hints[key], join(where, key)) for key, item in tree.items()}
    try:
        return cls(**values)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error.message}" if where else error.message, error.fix) from error
    except ValueError as error:
        raise ConfigError(f"{where}: {error}" if where else str(error), mend(str(error), where)) from error


def mend(message: str, where: str) -> str:
    """The fix in `name is value, expected ...`, as our own checks say it."""
    found = re.match(r"([\w.]+) (?:and .*)?(?:is|are) .*expected (.+)", message, re.DOTALL)
    return f"set {join(where, found[1])} to {found[2]}" if found else f"another value in {where or 'the settings'}"


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
        raise ConfigError(f"{_setting(where)}: {show(value)} is not a finite 64-bit number", fix=f"a smaller {where}")
    if hint is float and number:
        return float(value)
    if type(value) is not hint:
        quoted = f"\"{where}='{value}'\"" if hint in (str, Path) and number else ""  # out=2024 is a number to YAML
        raise _wrong(value, NAMES[hint], where, fix=quoted)
    return value


def _union(value: Any, args: tuple[Any, ...], where: str) -> Any:
    if value is None and type(None) in args:
        return None
    options = _variants(value, [arg for arg in args if arg is not type(None)], where)
    if len(options) == 1:
        return _value(value, options[0], where)
    reasons = []
    for option in options:
        try:
            return _value(value, option, where)
        except ConfigError as error:
            reasons.append(error.message)
    raise ConfigError("; or ".join(reasons), fix=f"set {where}")


def _variants(value: Any, options: list[Any], where: str) -> list[Any]:
    """Of several dataclasses the one that `value` is for.

    A `Literal` field without a default names a dataclass (`arch: unet3d`); the one without such a field needs no name.
    """
    if not isinstance(value, Mapping) or not all(dataclasses.is_dataclass(option) for option in options):
        return options
    names: dict[str, dict[Any, Any]] = {}
    unnamed = []
    for option in options:
        required = {f.name for f in dataclasses.fields(option) if f.default is MISSING}
        tags = {k: hint for k, hint in _hints(option).items() if get_origin(hint) is Literal and k in required}
        unnamed += [] if tags else [option]
        for key, hint in tags.items():
            names.setdefault(key, {}).update(dict.fromkeys(get_args(hint), option))
    for key, choices in names.items():
        if key in value:
            return [_choice(value[key], choices, join(where, key))]
    return unnamed or options


def _choice(value: Any, choices: dict[Any, Any], where: str) -> Any:
    for key, item in choices.items():
        if type(key) is type(value) and key == value:
            return item
    names = [str(key) for key in choices]
    raise ConfigError(
        f"{_setting(where)}: {show(value)} is not one of {', '.join(names)}",
        fix=suggest(str(value), names, f"{where}="),
    )


def _container(value: Any, kind: type, args: tuple[Any, ...], where: str) -> Any:
    if kind is dict:
        if not isinstance(value, Mapping):
            raise _wrong(value, "a mapping", where)
        for key in value:
            if not isinstance(key, str):
                raise _wrong(key, "text for a name", join(where, key))
        hint = args[1] if args else Any
        return {key: _value(item, hint, join(where, key)) for key, item in value.items()}
    if not isinstance(value, list | tuple):
        word = re.fullmatch(r"[\w.-]{1,40}", str(value))
        raise _wrong(value, "a list", where, fix=f"{where}=[{value}]" if word else "")
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


def show(value: Any) -> str:
    if isinstance(value, int) and abs(value) > 10**30:
        return "a huge integer"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _wrong(value: Any, expected: str, where: str, fix: str = "") -> ConfigError:
    given = "null" if value is None else f"{show(value)} ({type(value).__name__})"
    fix = fix or f"set {where or 'them'} to {expected}"
    return ConfigError(f"{_setting(where)}: {given}, expected {expected}", fix=fix)


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
