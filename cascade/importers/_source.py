"""A folder of published weights: its config.json, its files of tensors, and what differs from the network it names."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cascade import pickled, store
from cascade.errors import ConfigError, InputError
from cascade.nets.unet3d_config import UNet3DConfig

CONFIG = "config.json"
INDEX = "*.safetensors.index.json"
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def folder(given: Path) -> Path:
    """The folder with config.json: the given one, or the `unet` of a pipeline's."""
    for path in (given, given / "unet"):
        if (path / CONFIG).is_file():
            return path
    raise InputError(f"source {given}: has no {CONFIG}, nor has its folder unet", fix="source=FOLDER of the network")


def config(path: Path) -> dict[str, Any]:
    return store.from_json((path / CONFIG).read_bytes(), path / CONFIG)


def understood(
    path: Path,
    tree: Mapping[str, Any],
    classes: tuple[str, ...],
    network: Callable[[Mapping[str, Any]], UNet3DConfig],
) -> UNet3DConfig:
    """The network that `tree` describes; InputError names the first field that it cannot be built from."""
    if tree.get("_class_name") not in classes:
        raise InputError(
            f"{path / CONFIG}: _class_name is {tree.get('_class_name')!r}, expected {' or '.join(classes)}",
            fix="weights= the layout that these weights have",
        )
    try:
        return network(tree)
    except (ConfigError, ValueError) as error:
        said = error.message if isinstance(error, ConfigError) else error
        raise InputError(f"{path / CONFIG}: {said}", fix="these weights need a network that is not here") from error


def files(path: Path, named: str | None) -> list[Path]:
    """The files of tensors: the named one, the shards of an index, the only safetensors file, or the only pickle."""
    if named is not None:
        if not (path / named).is_file():
            raise InputError(f"{path / named}: no such file", fix=f"file= one of {', '.join(_names(path, '*'))}")
        return [path / named]
    if index := _only(path, INDEX):
        named_by = store.from_json(index.read_bytes(), index).get("weight_map")
        if not isinstance(named_by, dict) or not all(isinstance(name, str) for name in named_by.values()):
            raise InputError(f"{index}: its weight_map does not name files", fix="copy it again")
        shards = set(named_by.values())
        missing = sorted(name for name in shards if "/" in name or not (path / name).is_file())
        if missing or not shards:
            raise InputError(
                f"{index}: names {', '.join(missing) or 'no file'}, not there", fix="copy all of its files"
            )
        return [path / name for name in sorted(shards)]
    if found := _only(path, "*.safetensors") or _only(path, *PICKLED):
        return [found]
    raise InputError(
        f"{path}: holds no weights (*.safetensors, {', '.join(PICKLED)})", fix="copy them beside config.json"
    )


def _names(path: Path, *patterns: str) -> list[str]:
    return sorted(file.name for pattern in patterns for file in path.glob(pattern) if file.is_file())


def _only(path: Path, *patterns: str) -> Path | None:
    names = _names(path, *patterns)
    if len(names) > 1:
        raise InputError(f"{path}: holds several weights: {', '.join(names)}", fix=f"file={names[0]}")
    return path / names[0] if names else None


def tensors(paths: list[Path]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors, and each file's SHA-256. Raises InputError for a tensor that two files hold."""
    state: dict[str, Tensor] = {}
    hashes = {}
    for path in paths:
        hashes[path.name], begin = _hashed(path)
        part = _zipped(path) if begin.startswith(b"PK\x03\x04") else _mapped(path, begin)
        if twice := sorted(part.keys() & state.keys()):
            raise InputError(f"{path}: holds {twice[0]}, which another file holds too", fix="copy the files again")
        state |= part
    return state, hashes


def _hashed(path: Path) -> tuple[str, bytes]:
    """SHA-256 of a file, and its first bytes."""
    digest, begin = hashlib.sha256(), b""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            begin = begin or block
            digest.update(block)
    return digest.hexdigest(), begin


def _zipped(path: Path) -> dict[str, Tensor]:
    return pickled.torch_tensors(path.read_bytes(), str(path))


def _mapped(path: Path, begin: bytes) -> dict[str, Tensor]:
    """The tensors of a safetensors file, in the file's own memory: gigabytes are not copied to be looked at."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    store.refuse_pickle(begin, str(path))
    try:
        return load_file(path)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise InputError(f"{path}: is not a safetensors file: {error}", fix="copy it again") from error


def check(path: Path, state: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """InputError, after a table of all that differs, unless names and shapes are equal."""
    rows = [("tensor", "source", "network")]
    for name in sorted(state.keys() | wanted.keys()):
        have, want = (_shape(tensors.get(name)) for tensors in (state, wanted))
        if have != want:
            rows.append((name, have, want))
    if len(rows) == 1:
        return
    widths = [max(len(row[i]) for row in rows) for i in range(2)]
    for row in rows:
        print(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}")
    raise InputError(
        f"source {path}: {len(rows) - 1} tensors differ from the network in {CONFIG}, such as {rows[1][0]}",
        fix="the config.json that belongs to these weights",
    )


def _shape(tensor: Tensor | None) -> str:
    return "-" if tensor is None else "x".join(map(str, tensor.shape)) or "a number"
