"""What an artefact is, and reading one: every byte is verified before anything is parsed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cascade.errors import InputError
from cascade.store.disk import megabytes

MANIFEST = "manifest.json"
FORMAT = 1
MANIFEST_LIMIT = 16 << 20  # bytes
MEASURES = "MEASURES.md"  # lies in an artefact and is no part of it, nor is it a loss when that is replaced

log = logging.getLogger("cascade")


@dataclass(frozen=True)
class Artefact:
    """A verified artefact; `hash` is the SHA-256 of its manifest and so names its whole content."""

    path: Path
    kind: str
    meta: dict[str, Any]
    files: dict[str, bytes]
    hash: str


def canonical(tree: Any) -> bytes:
    """JSON with sorted keys, one to a line, ASCII: equal data gives equal bytes. Refuses NaN and infinity."""
    data = json.loads(json.dumps(tree, allow_nan=False))  # keys become text before they are sorted
    return (json.dumps(data, sort_keys=True, indent=1) + "\n").encode()


def from_json(data: bytes, where: Path) -> dict[str, Any]:
    """A JSON object; raises InputError for anything else, NaN and doubled keys included."""
    try:
        tree = json.loads(data, parse_constant=_no_constant, object_pairs_hook=_single_keys)
    except (ValueError, RecursionError) as error:
        raise _bad(where, f"is not plain JSON: {error}") from error
    if not isinstance(tree, dict):
        raise _bad(where, "is not a JSON object")
    return tree


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")


def _single_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("a key stands twice")
    return tree


def manifest_path(path: Path) -> Path:
    """Where the manifest of the artefact `path` (a directory or a single file) is."""
    return path / MANIFEST if path.is_dir() else path.with_suffix(f".{MANIFEST}")


def manifest(path: Path, kind: str | None = None) -> dict[str, Any]:
    """The checked manifest: format_version, kind, files, meta. Raises InputError."""
    return _parsed(path, kind)[0]


def kind_of(path: Path) -> str | None:
    """The kind of the artefact `path` by its manifest; None where there is none, or a damaged one."""
    try:
        return str(manifest(path)["kind"])
    except InputError:
        return None


def read(path: Path, kind: str | None = None, only: Collection[str] | None = None) -> Artefact:
    """Reads an artefact, or `only` some of its files; every byte it returns has been verified. Raises InputError naming
    the file at fault."""
    tree, data = _parsed(path, kind)
    folder = path if path.is_dir() else path.parent
    wanted = {name: entry for name, entry in tree["files"].items() if only is None or name in only}
    files = {name: _verified(folder, name, entry) for name, entry in wanted.items()}
    return Artefact(path, tree["kind"], tree["meta"], files, hashlib.sha256(data).hexdigest())


def member(path: Path, name: str, kind: str | None = None) -> bytes:
    """One file of a directory artefact, verified; the others are not read. Raises InputError."""
    files = _parsed(path, kind)[0]["files"]
    if name not in files:
        raise _bad(path / name, f"is not in {MANIFEST}")
    return _verified(path, name, files[name])


def problems(path: Path, kind: str | None = None) -> list[str]:
    """What is wrong with the artefact, one line each; empty if it verifies."""
    try:
        tree, _ = _parsed(path, kind)
    except InputError as error:
        return [error.message]
    found = []
    for name, entry in tree["files"].items():
        try:
            _verified(path if path.is_dir() else path.parent, name, entry)
        except InputError as error:
            found.append(error.message)
    return found


def latest(root: Path, prefix: str = "step-") -> Path | None:
    """The artefact `<prefix><number>` of the highest number that verifies; damaged ones are passed with a warning."""
    for path in numbered(root, prefix):
        bad = problems(path)
        if not bad:
            return path
        log.warning("passing over %s: %s", path, bad[0])
    return None


def numbered(root: Path, prefix: str) -> list[Path]:
    """Highest number first."""
    found = [path for path in root.glob(f"{prefix}*") if re.fullmatch(r"\d+", path.name.removeprefix(prefix))]
    return sorted(found, key=lambda path: (int(path.name.removeprefix(prefix)), path.name), reverse=True)


def manifest_bytes(kind: str, files: Mapping[str, Any], meta: Mapping[str, Any]) -> bytes:
    tree = {"format_version": FORMAT, "kind": kind, "files": dict(files), "meta": dict(meta)}
    return canonical(tree | {"digest": hashlib.sha256(canonical(tree)).hexdigest()})


def _parsed(path: Path, kind: str | None) -> tuple[dict[str, Any], bytes]:
    file = manifest_path(path)
    if not path.exists():
        raise _bad(
            path, f"there is no such file or directory ({holds(path.parent)})", fix="name another one, or make it"
        )
    if not file.exists():
        raise _bad(path, f"{file.name} is missing ({holds(file.parent)})")
    data = contents(file.parent, file.name)
    tree = from_json(data, file)
    reason = _unfit(tree, data)
    if reason:
        raise _bad(file, reason)
    if kind is not None and tree["kind"] != kind:
        raise _bad(path, f"holds {tree['kind']!r}, expected {kind!r}")
    if not path.is_dir() and list(tree["files"]) != [path.name]:
        raise _bad(file, f"describes {', '.join(tree['files'])}, not {path.name}")
    return tree, data


def _unfit(tree: dict[str, Any], data: bytes) -> str:
    """Why a manifest is refused, or nothing. Its own digest covers what the file hashes do not: kind and meta."""
    if "format_version" not in tree:
        return "is not a manifest of Cascade"
    version = tree["format_version"]
    if type(version) is int and version > FORMAT:
        return f"has format {version}, this Cascade reads {FORMAT}: update it"
    if type(version) is not int or set(tree) != {"format_version", "kind", "files", "meta", "digest"}:
        return "is damaged: its keys are not those of a manifest"
    rest = {key: value for key, value in tree.items() if key != "digest"}
    try:
        sound = canonical(tree) == data and hashlib.sha256(canonical(rest)).hexdigest() == tree["digest"]
    except (ValueError, RecursionError):
        sound = False
    if not sound:
        return "is damaged: its digest does not match"
    files = tree["files"]
    if not isinstance(tree["kind"], str) or not isinstance(tree["meta"], dict) or not isinstance(files, dict):
        return "is damaged: kind, meta or files has the wrong type"
    for name, entry in files.items():
        if not _is_legal(name):
            return f"names {name!r}, which is not a plain relative name"
        if not isinstance(entry, dict) or {key: type(item) for key, item in entry.items()} != {
            "sha256": str,
            "bytes": int,
        }:
            return f"is damaged: the entry of {name}"
    return ""


def _is_legal(name: str) -> bool:
    parts = name.split("/")
    return all(part not in ("", ".", "..") for part in parts) and not set(name) & {"\\", "\0"} and name != MANIFEST


def legal(name: str) -> str:
    if not _is_legal(name):
        raise ValueError(f"{name!r} is not a name for a file of an artefact")
    return name


def _verified(folder: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    data = contents(folder, name, entry["bytes"])
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise _bad(folder / name, "is damaged: its SHA-256 is not the manifest's")
    return data


def contents(folder: Path, name: str, size: int | None = None) -> bytes:
    """All of a regular file inside `folder`, of `size` bytes (None: a manifest); a link to outside is refused."""
    path = folder / name
    try:
        if not path.resolve(strict=True).is_relative_to(folder.resolve()):
            raise _bad(path, "is a link to outside its directory")
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)  # a FIFO must not block here
        with open(fd, "rb") as stream:
            status = os.fstat(fd)
            if not stat.S_ISREG(status.st_mode):
                raise _bad(path, "is not a regular file")
            if size is None and status.st_size > MANIFEST_LIMIT:
                raise _bad(path, f"is {megabytes(status.st_size)} long, too long for a manifest")
            if size is not None and status.st_size != size:
                raise _bad(path, f"is damaged: {status.st_size} bytes, expected {size}")
            return stream.read()
    except FileNotFoundError as error:
        raise _bad(path, f"is missing ({holds(folder)})") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise _bad(path, f"cannot be read: {error}") from error


def _bad(path: Path, reason: str, fix: str = "name another one, or delete it and make it again") -> InputError:
    return InputError(f"{path}: {reason}", fix)


def holds(folder: Path) -> str:
    """What is there, for error messages."""
    if not folder.is_dir():
        return f"{folder} is not a directory"
    try:
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        return f"{folder} cannot be listed: {error.strerror}"
    if not names:
        return f"{folder} is empty"
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return f"{folder} holds {', '.join(names[:8])}{more}"
