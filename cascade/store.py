"""The only module that writes artefacts: atomic, hashed, verified before anything is parsed.

An artefact is a directory with a `manifest.json` (or a single file with `<stem>.manifest.json` beside it) that lists
the size and SHA-256 of its files. It is written under a temporary name, flushed, and renamed, so under its own name
it is always complete, whatever was killed or ran full. Temporary names, swept by the next run:
`.tmp-*` is being written, `.del-*` is being deleted, `.old-*` is being replaced (and put back if that was cut short).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from cascade.errors import HostError, InputError, LockedError

if TYPE_CHECKING:
    from torch import Tensor

MANIFEST = "manifest.json"
FORMAT = 1
MANIFEST_LIMIT = 16 << 20  # bytes
TEMPORARY = re.compile(r"\.(tmp|del|old)-(.+)-(\d+)-[0-9a-f]{8}")

log = logging.getLogger("cascade")

Fill = Callable[[Path], None]
Pairs = Iterable[tuple[str, bytes]]  # names and contents, made one after the other: not all in memory at once


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


# writing -------------------------------------------------------------------------------------------------------------


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
    a directory that is not an artefact is never touched. Raises HostError (disk, permission), InputError.
    """
    need = sum(len(data) for data in files.values()) if isinstance(files, Mapping) else 0
    with _host(final, need):
        final = final.absolute()
        _make_directories(final.parent)
        tmp = _aside(final, "tmp")
        os.mkdir(tmp)
    try:
        if callable(files):
            with _host(final, need, only=(errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)):
                files(tmp)
        with _host(final, need):
            entries = _flushed(tmp) if callable(files) else _written(tmp, files)
            _write(tmp / MANIFEST, _manifest_bytes(kind, entries, meta or {}))
            _sync_directory(tmp)
            _place(tmp, final, replace)
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    return final


def commit_into(
    directory: Path, files: Mapping[str, bytes], *, kind: str, meta: Mapping[str, Any] | None = None
) -> Path:
    """Puts files and, last, their manifest into a directory that may hold other things (a run and its stages).

    Between the first changed file and the manifest the directory does not verify: a run cut short there is done again.
    """
    with _host(directory, sum(len(data) for data in files.values())):
        entries = {_legal(name): _entry(data) for name, data in files.items()}
        manifest_data = _manifest_bytes(kind, entries, meta or {})
        if _same(directory / MANIFEST, manifest_data) and not problems(directory):
            return directory
        for name, data in files.items():
            write_file(directory / name, data)
        write_file(directory / MANIFEST, manifest_data)
    return directory


def write_file(path: Path, data: bytes) -> Path:
    """Writes one file under a temporary name, flushes it and renames it over `path`."""
    with _host(path, len(data)):
        path = path.absolute()
        _make_directories(path.parent)
        tmp = _aside(path, "tmp")
        try:
            _write(tmp, data)
            os.replace(tmp, path)
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise
        _sync_directory(path.parent)
    return path


def growing(path: Path) -> IO[bytes]:
    """A file opened for the output of other processes, added to its end; no artefact."""
    with _host(path, 0):
        _make_directories(path.parent)
        return path.open("ab")


def commit_file(path: Path, data: bytes, *, kind: str, meta: Mapping[str, Any] | None = None) -> Path:
    """The artefact of one file: `path` and beside it `<stem>.manifest.json`.

    Two names cannot change at once: killed between them, an overwritten pair does not verify until it is made again.
    """
    beside = manifest_path(path)
    described = _manifest_bytes(kind, {_legal(path.name): _entry(data)}, meta or {})
    if _same(beside, described) and _same(path, data):
        return path
    write_file(path, data)
    write_file(beside, described)
    return path


def _written(folder: Path, files: Mapping[str, bytes] | Pairs) -> dict[str, dict[str, Any]]:
    """Writes and flushes `files` below `folder` and returns the manifest's entries."""
    entries = {}
    for name, data in files.items() if isinstance(files, Mapping) else files:
        path = folder / _legal(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        _write(path, data)
        entries[name] = _entry(data)
    if not entries:
        raise ValueError(f"there is nothing to write for {folder.name}")
    for inner in {folder / parent for name in entries for parent in Path(name).parents}:
        _sync_directory(inner)
    return entries


def _write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def _flushed(folder: Path) -> dict[str, dict[str, Any]]:
    """Flushes every file and folder below `folder` and returns the manifest's entries."""
    entries = {}
    for parent, folders, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_symlink() or not path.is_file():
                raise ValueError(f"{path}: only plain files can be committed")
            entries[_legal(path.relative_to(folder).as_posix())] = _hashed(path)
        for name in folders:
            _sync_directory(Path(parent, name))
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


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_directories(path: Path) -> None:
    if path.is_dir():
        return
    _make_directories(path.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
    _sync_directory(path.parent)


def _aside(path: Path, why: str) -> Path:
    """A temporary name beside `path`: which process made it tells the sweeper whether it is still in use."""
    return path.parent / f".{why}-{path.name[:150]}-{os.getpid()}-{secrets.token_hex(4)}"


def _place(tmp: Path, final: Path, replace: bool) -> None:
    """Renames `tmp` to `final`. The loser of a race finds the winner's artefact there and keeps it."""
    for _ in range(10):
        if _occupied(final):
            if not replace and not problems(final):
                return
            check_ours(final)
            _exchange(tmp, final)
            return
        try:
            os.rename(tmp, final)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
            continue
        _sync_directory(final.parent)
        return
    raise HostError(f"cannot write {final}: other processes keep replacing it", fix="let one of them finish")


def _occupied(path: Path) -> bool:
    return os.path.lexists(path) and not (path.is_dir() and not path.is_symlink() and not any(path.iterdir()))


def check_ours(final: Path) -> None:
    """Raises InputError where `commit` would refuse to write.

    A damaged manifest is ours to replace; a folder without one, or with that of another program, is not.
    """
    if not _occupied(final):
        return
    try:
        tree = json.loads((final / MANIFEST).read_bytes()[:MANIFEST_LIMIT])
    except (ValueError, RecursionError):
        return
    except OSError:
        tree = None
    if not isinstance(tree, dict) or "format_version" not in tree or final.is_symlink():
        raise InputError(
            f"cannot write {final}: it exists and is not an artefact of Cascade ({_holds(final)})",
            fix="choose another name or move it away",
        )


def _exchange(tmp: Path, final: Path) -> None:
    old = _aside(final, "old")
    with contextlib.suppress(FileNotFoundError):
        os.rename(final, old)
    try:
        os.rename(tmp, final)
    except BaseException:
        if old.exists() and not final.exists():
            old.rename(final)
        raise
    _sync_directory(final.parent)
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _host(path: Path, need: int, only: tuple[int, ...] = ()) -> Iterator[None]:
    """Turns OSError into HostError with what was needed and what is free."""
    try:
        yield
    except OSError as error:
        if only and error.errno not in only:
            raise
        reason = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"{reason}: {_megabytes(need)} needed, {_megabytes(_free(path))} free"
        raise HostError(f"cannot write {path}: {reason}", fix="free space there or choose another out=") from error


def _free(path: Path) -> int:
    for folder in path.absolute().parents:
        if folder.is_dir():
            return shutil.disk_usage(folder).free
    return 0


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


# reading -------------------------------------------------------------------------------------------------------------


def manifest_path(path: Path) -> Path:
    """Where the manifest of the artefact `path` (a directory or a single file) is."""
    return path / MANIFEST if path.is_dir() else path.with_suffix(f".{MANIFEST}")


def manifest(path: Path, kind: str | None = None) -> dict[str, Any]:
    """The checked manifest: format_version, kind, files, meta. Raises InputError."""
    return _parsed(path, kind)[0]


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
    for path in _numbered(root, prefix):
        bad = problems(path)
        if not bad:
            return path
        log.warning("passing over %s: %s", path, bad[0])
    return None


def _numbered(root: Path, prefix: str) -> list[Path]:
    """Highest number first."""
    found = [path for path in root.glob(f"{prefix}*") if re.fullmatch(r"\d+", path.name.removeprefix(prefix))]
    return sorted(found, key=lambda path: (int(path.name.removeprefix(prefix)), path.name), reverse=True)


def _manifest_bytes(kind: str, files: Mapping[str, Any], meta: Mapping[str, Any]) -> bytes:
    tree = {"format_version": FORMAT, "kind": kind, "files": dict(files), "meta": dict(meta)}
    return canonical(tree | {"digest": hashlib.sha256(canonical(tree)).hexdigest()})


def _parsed(path: Path, kind: str | None) -> tuple[dict[str, Any], bytes]:
    file = manifest_path(path)
    if not path.exists():
        raise _bad(path, f"there is no such file or directory ({_holds(path.parent)})")
    if not file.exists():
        raise _bad(path, f"{file.name} is missing ({_holds(file.parent)})")
    data = _bytes(file.parent, file.name, None)
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


def _legal(name: str) -> str:
    if not _is_legal(name):
        raise ValueError(f"{name!r} is not a name for a file of an artefact")
    return name


def _verified(folder: Path, name: str, entry: Mapping[str, Any]) -> bytes:
    data = _bytes(folder, name, entry["bytes"])
    if hashlib.sha256(data).hexdigest() != entry["sha256"]:
        raise _bad(folder / name, "is damaged: its SHA-256 is not the manifest's")
    return data


def _bytes(folder: Path, name: str, size: int | None) -> bytes:
    """All of a regular file inside `folder`, of `size` bytes if given; a link that leaves the folder is refused."""
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
                raise _bad(path, f"is {_megabytes(status.st_size)} long, too long for a manifest")
            if size is not None and status.st_size != size:
                raise _bad(path, f"is damaged: {status.st_size} bytes, expected {size}")
            return stream.read()
    except FileNotFoundError as error:
        raise _bad(path, f"is missing ({_holds(folder)})") from error
    except (OSError, RuntimeError, ValueError) as error:
        raise _bad(path, f"cannot be read: {error}") from error


def _bad(path: Path, reason: str) -> InputError:
    return InputError(f"{path}: {reason}", fix="name another one, or delete it and make it again")


def _holds(folder: Path) -> str:
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


# housekeeping --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Holds `directory` for this process by flock on `.lock-<name>` beside it; the kernel drops it if we die.

    Raises LockedError naming the holder. The lock file is gone afterwards, so it is never part of an artefact.
    """
    directory = directory.resolve()
    if directory.exists() and not directory.is_dir():
        raise HostError(f"cannot write {directory}: it is a file", fix="choose another out=, a directory")
    path = directory.parent / f".lock-{directory.name}"
    with _host(path, 0):
        _make_directories(path.parent)
        fd = _acquired(path)
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, str(os.getpid()).encode(), 0)
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever waits on the old inode sees that it is gone
        os.close(fd)


def _acquired(path: Path) -> int:
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.pread(fd, 20, 0).decode(errors="replace").strip()
            os.close(fd)
            raise LockedError(
                f"{path.name.removeprefix('.lock-')} is in use by process {pid or 'unknown'}",
                fix="wait for it to finish, or choose another out=",
            ) from None
        except BaseException:
            os.close(fd)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(fd), os.stat(path)):
                return fd
        os.close(fd)


def sweep(parent: Path) -> None:
    """Removes what dead processes left in `parent`, and puts back what they were replacing. Call it under the lock."""
    if not parent.is_dir():
        return
    for path in sorted(parent.iterdir()):
        match = TEMPORARY.fullmatch(path.name)
        if not match or _alive(int(match[3])):
            continue
        final = parent / match[2]
        if match[1] == "old" and not final.exists():
            with _host(path, 0):
                os.rename(path, final)
        elif path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (ProcessLookupError, OverflowError):
        return False
    return True


def discard(path: Path) -> None:
    """Deletes an artefact so that it is there whole or not at all."""
    with _host(path, 0):
        doomed = _aside(path.absolute(), "del")
        os.rename(path, doomed)
        _sync_directory(doomed.parent)
    shutil.rmtree(doomed, ignore_errors=True)


def prune(root: Path, keep: int, prefix: str = "step-") -> None:
    """Deletes all but the `keep` highest numbers; deletes nothing if none of those verifies."""
    assert keep >= 1, "prune would delete everything"
    found = _numbered(root, prefix)
    if any(not problems(path) for path in found[:keep]):
        for path in found[keep:]:
            discard(path)


# tensors -------------------------------------------------------------------------------------------------------------


def tensors_to_bytes(tensors: Mapping[str, Tensor], metadata: tuple[str, str] | None = None) -> bytes:
    """The safetensors file of `tensors`; equal tensors give equal bytes.

    At most one pair of metadata: safetensors writes several in random order.
    """
    from safetensors.torch import save

    seen: set[int] = set()
    ready = {}
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        pointer = tensor.untyped_storage().data_ptr()
        ready[name] = tensor.clone() if pointer in seen else tensor  # shared storage is refused by safetensors
        seen.add(pointer)
    return save(ready, metadata=dict([metadata]) if metadata else None)


def bytes_to_tensors(data: bytes, where: str = "tensors") -> dict[str, Tensor]:
    """The tensors of a safetensors file, sorted by name. Raises InputError; pickle and zip are refused by content."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    refuse_pickle(data, where)
    try:
        tensors = load(data)
    except (SafetensorError, KeyError, ValueError, TypeError, RuntimeError, OverflowError) as error:
        raise InputError(f"{where}: is not a safetensors file: {error}", fix="name a safetensors file") from error
    return {name: tensors[name] for name in sorted(tensors)}


def metadata(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file that `bytes_to_tensors` has accepted."""
    size = int.from_bytes(data[:8], "little")
    found = json.loads(data[8 : 8 + size]).get("__metadata__", {})
    return {str(key): str(value) for key, value in found.items()}


def refuse_pickle(data: bytes, where: str) -> None:
    """Raises InputError if `data` begins as a zip (torch.save), a pickle or a tar: those formats can run code."""
    zipped = data[:4] in (b"PK\x03\x04", b"PK\x05\x06")
    pickled = data[:1] == b"\x80" and data[1:2] in (b"\x01", b"\x02", b"\x03", b"\x04", b"\x05")
    if zipped or pickled or data[257:262] == b"ustar":
        raise InputError(
            f"{where}: is a pickle or an archive, which can run code when it is loaded; only safetensors are read",
            fix="convert it where it was made: safetensors.torch.save_file(state_dict, 'model.safetensors')",
        )
