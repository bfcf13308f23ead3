"""Artefacts written whole or not at all: directories, single files, a run's numbered steps."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from cascade.errors import HostError, InputError
from cascade.store.disk import aside, discard, host, make_directories, passing, sync_directory, write_file, write_new
from cascade.store.reading import (
    MANIFEST,
    MEASURES,
    contents,
    holds,
    legal,
    manifest_bytes,
    manifest_path,
    numbered,
    problems,
)

Fill = Callable[[Path], None]
ELSEWHERE = "choose another name or move it away"
Pairs = Iterable[tuple[str, bytes]]  # names and contents, made one after the other: not all in memory at once


def commit(
    final: Path,
    files: Mapping[str, bytes] | Pairs | Fill,
    *,
    kind: str,
    meta: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Path:
    """Makes the directory artefact `final` from named bytes, or from what `files(directory)` writes into a directory.

    If `final` already verifies it is kept and the new one dropped, unless `replace`. A damaged artefact is replaced;
    what `check_ours` refuses is never touched. Raises HostError (disk, permission), InputError.
    """
    need = sum(len(data) for data in files.values()) if isinstance(files, Mapping) else 0
    with host(final, need):
        final = final.absolute()
        make_directories(final.parent)
        tmp = aside(final, "tmp")
        os.mkdir(tmp)
    try:
        if callable(files):
            with host(final, need, only=(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)):
                files(tmp)
        with host(final, need):
            entries = _flushed(tmp) if callable(files) else _written(tmp, files)
            write_new(tmp / MANIFEST, manifest_bytes(kind, entries, meta or {}))
            sync_directory(tmp)
            _place(tmp, final, kind, entries, replace)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return final


def commit_into(
    directory: Path, files: Mapping[str, bytes], *, kind: str, meta: Mapping[str, Any] | None = None
) -> Path:
    """Puts files and, last, their manifest into a directory that may hold other things (a run and its stages).

    Between the first changed file and the manifest the directory does not verify: a run cut short there is done again.
    """
    with host(directory, sum(len(data) for data in files.values())):
        entries = {legal(name): _entry(data) for name, data in files.items()}
        check_into(directory, kind)
        manifest_data = manifest_bytes(kind, entries, meta or {})
        if _same(directory / MANIFEST, manifest_data) and not problems(directory):
            return directory
        for name, data in files.items():
            write_file(directory / name, data)
        write_file(directory / MANIFEST, manifest_data)
    return directory


def commit_file(path: Path, data: bytes, *, kind: str, meta: Mapping[str, Any] | None = None) -> Path:
    """The artefact of one file: `path` and beside it `<stem>.manifest.json`.

    Two names cannot change at once: killed between them, the pair does not verify until it is made again. The manifest
    is first, so that what lies there is always known as ours. Whoever is told `path` by a user asks `check_file`.
    """
    beside = manifest_path(path)
    described = manifest_bytes(kind, {legal(path.name): _entry(data)}, meta or {})
    if _same(beside, described) and _same(path, data):
        return path
    write_file(beside, described)
    write_file(path, data)
    return path


def _written(folder: Path, files: Mapping[str, bytes] | Pairs) -> dict[str, dict[str, Any]]:
    """Writes and flushes `files` below `folder` and returns the manifest's entries."""
    entries = {}
    for name, data in files.items() if isinstance(files, Mapping) else files:
        path = folder / legal(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_new(path, data)
        entries[name] = _entry(data)
    if not entries:
        raise ValueError(f"there is nothing to write for {folder.name}")
    for inner in {folder / parent for name in entries for parent in Path(name).parents}:
        sync_directory(inner)
    return entries


def _flushed(folder: Path) -> dict[str, dict[str, Any]]:
    """Flushes every file and folder below `folder` and returns the manifest's entries."""
    entries = {}
    for parent, folders, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_symlink() or not path.is_file():
                raise ValueError(f"{path}: only plain files can be committed")
            entries[legal(path.relative_to(folder).as_posix())] = _hashed(path)
        for name in folders:
            sync_directory(Path(parent, name))
    if not entries:
        raise ValueError(f"nothing was written for {folder.name}")
    return entries


def _hashed(path: Path) -> dict[str, Any]:
    fd = os.open(path, os.O_RDONLY)
    digest, size = hashlib.sha256(), 0
    try:
        os.fsync(fd)
        while block := os.read(fd, 1 << 20):
            digest.update(block)
            size += len(block)
    finally:
        os.close(fd)
    return {"sha256": digest.hexdigest(), "bytes": size}


def _entry(data: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


def _same(path: Path, data: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(data) and path.read_bytes() == data


def _place(tmp: Path, final: Path, kind: str, names: Collection[str], replace: bool) -> None:
    """Renames `tmp` to `final`. The loser of a race finds the winner's artefact there and keeps it."""
    for _ in range(10):
        try:
            if not _occupied(final):
                os.rename(tmp, final)
            elif not replace and not problems(final, kind):
                return
            else:
                check_ours(final, kind, names)
                _exchange(tmp, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            continue
        sync_directory(final.parent)
        return
    raise HostError(f"cannot write {final}: other processes keep replacing it", fix="let one of them finish")


def _occupied(path: Path) -> bool:
    return os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir()))


def check_ours(final: Path, kind: str, names: Collection[str] | None = None) -> None:
    """Raises InputError where `commit` would refuse to write an artefact of `kind`: where anything else would be lost.

    A damaged manifest is ours to replace, if nothing is there but the files `names` of the new artefact (None: not
    known yet). A folder without a manifest, or with that of another program, is not.
    """
    if not _occupied(final):
        return
    if final.is_symlink():
        raise _not_ours(final)
    listed = _listed(final, kind, names)
    if listed is not None and (foreign := _foreign(final, {*listed, MANIFEST, MEASURES})):
        raise InputError(f"cannot write {final}: {foreign} there is no part of that artefact", fix=ELSEWHERE)


def check_into(directory: Path, kind: str) -> None:
    """Raises InputError where `commit_into` would replace the manifest of anything else."""
    if os.path.lexists(directory / MANIFEST):
        _listed(directory, kind, None)


def check_file(path: Path) -> None:
    """Raises InputError where `commit_file` would replace a file that is not ours, or the manifest of another one."""
    beside = path.with_suffix(f".{MANIFEST}")
    check_plain([path], beside, "format_version")
    if os.path.lexists(beside) and path.name not in named(beside, "format_version"):
        raise InputError(f"cannot write {path}: {beside.name} there is of another file", fix=ELSEWHERE)


def check_plain(paths: Iterable[Path], beside: Path, mark: str) -> None:
    """Raises InputError for what is there of `paths` and not in the manifest `beside` them, or if that is not ours."""
    listed = named(beside, mark)
    foreign = [path for path in paths if os.path.lexists(path) and (path.name not in listed or path.is_dir())]
    if os.path.lexists(beside) and not listed:
        foreign = [beside]
    if foreign:
        raise InputError(f"cannot write {foreign[0]}: it exists and Cascade did not make it", fix=ELSEWHERE)


def named(file: Path, mark: str) -> dict[str, Any]:
    """The `files` that a manifest lists; nothing if it is damaged, or not ours, which its key `mark` says."""
    try:
        tree = json.loads(contents(file.parent, file.name))
    except (InputError, ValueError, RecursionError):
        return {}
    files = tree.get("files") if isinstance(tree, dict) and mark in tree else None
    return files if isinstance(files, dict) else {}


def _listed(folder: Path, kind: str, names: Collection[str] | None) -> Collection[str] | None:
    """The files that the manifest in `folder` lists, `names` if it is damaged. InputError unless it is of `kind`."""
    try:
        tree = json.loads(contents(folder, MANIFEST))
    except (ValueError, RecursionError):
        return names
    except InputError:
        tree = None
    if not isinstance(tree, dict) or "format_version" not in tree:
        raise _not_ours(folder)
    if tree.get("kind") != kind:
        raise InputError(f"cannot write {folder}: it holds {tree.get('kind')!r}, not {kind!r}", fix=ELSEWHERE)
    files = tree.get("files")
    return files if isinstance(files, dict) else names


def _foreign(folder: Path, listed: Collection[str]) -> str:
    """The first file below `folder` that is none of `listed`, or nothing."""
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        folders = path.is_dir() and not path.is_symlink()
        if not folders and name.as_posix() not in listed and not any(map(passing, name.parts)):
            return str(name)
    return ""


def _not_ours(path: Path) -> InputError:
    return InputError(f"cannot write {path}: it exists and is not an artefact of Cascade ({holds(path)})", ELSEWHERE)


def _exchange(tmp: Path, final: Path) -> None:
    old = aside(final, "old")
    with contextlib.suppress(FileNotFoundError):
        os.rename(final, old)
    try:
        os.rename(tmp, final)
    except BaseException:
        if old.exists() and not final.exists():
            old.rename(final)
        raise
    sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def prune(root: Path, keep: int, prefix: str = "step-") -> None:
    """Deletes all but the `keep` highest numbers; deletes nothing if none of those verifies."""
    assert keep >= 1, "prune would delete everything"
    found = numbered(root, prefix)
    if any(not problems(path) for path in found[:keep]):
        for path in found[keep:]:
            discard(path)
