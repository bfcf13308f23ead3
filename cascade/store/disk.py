"""Single files and directories, changed so that a kill or a full disk leaves the old or the new one; locks.

Temporary names, swept by the next run: `.tmp-*` is being written, `.del-*` is being deleted, `.old-*` is being replaced
(and put back if that was cut short).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cascade.errors import HostError, LockedError

TEMPORARY = re.compile(r"\.(tmp|del|old)-(.+)-(\d+)-[0-9a-f]{8}")


def passing(name: str) -> bool:
    """Whether a file of that name is a lock or a temporary one, and no part of what lies beside it."""
    return name.startswith(".lock-") or TEMPORARY.fullmatch(name) is not None


def write_file(path: Path, data: bytes) -> Path:
    """Writes one file under a temporary name, flushes it and renames it over `path`."""
    with host(path, len(data)):
        path = path.absolute()
        make_directories(path.parent)
        tmp = aside(path, "tmp")
        try:
            write_new(tmp, data)
            os.replace(tmp, path)
        except BaseException:
            tmp.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)
    return path


def growing(path: Path) -> IO[bytes]:
    """A file opened for the output of other processes, added to its end; no artefact."""
    with host(path, 0):
        make_directories(path.parent)
        return path.open("ab")


def write_new(path: Path, data: bytes) -> None:
    """Writes and flushes a file that is not there yet."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    try:
        view = memoryview(data)
        while view:
            view = view[os.write(fd, view) :]
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def make_directories(path: Path) -> list[Path]:
    """Makes `path` and what is above it; returns what was not there, the outermost first."""
    if path.is_dir():
        return []
    made = make_directories(path.parent)
    with contextlib.suppress(FileExistsError):
        os.mkdir(path)
        made.append(path)
    sync_directory(path.parent)
    return made


def check_place(path: Path) -> None:
    """Raises HostError where nothing could be written at `path`, which is found out by trying beside it and in it."""
    with host(path, 0):
        path = path.absolute()
        for place in (path.parent, path) if path.is_dir() else (path.parent,):
            _try(place, path.name)


def _try(place: Path, name: str) -> None:
    """Makes a folder in `place`, or in the nearest one above that is there, and takes it away."""
    while not place.exists():
        place = place.parent
    probe = aside(place / name, "tmp")
    try:
        os.mkdir(probe)
    except FileNotFoundError:
        if place.exists():
            raise
        return _try(place, name)  # who had made that folder took it away
    os.rmdir(probe)


def aside(path: Path, why: str) -> Path:
    """A temporary name beside `path`: which process made it tells the sweeper whether it is still in use."""
    return path.parent / f".{why}-{path.name[:150]}-{os.getpid()}-{secrets.token_hex(4)}"


@contextlib.contextmanager
def host(path: Path, need: int, only: tuple[int, ...] = ()) -> Iterator[None]:
    """Turns OSError into HostError with what was needed and what is free."""
    try:
        yield
    except OSError as error:
        if only and error.errno not in only:
            raise
        reason, fix = os.strerror(error.errno) if error.errno else str(error), "choose another out="
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            reason = f"{reason}: {megabytes(need)} needed, {megabytes(_free(path))} free"
            fix = f"free space there or {fix}"
        raise HostError(f"cannot write {path}: {reason}", fix=fix) from error


def _free(path: Path) -> int:
    for folder in path.absolute().parents:
        if folder.is_dir():
            return shutil.disk_usage(folder).free
    return 0


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


@contextlib.contextmanager
def lock(directory: Path) -> Iterator[None]:
    """Holds `directory` for this process by flock on `.lock-<name>` beside it; the kernel drops it if we die.

    What dead processes left of the directory, and in it, is swept first.
    Raises LockedError naming the holder, HostError where nothing can be written. The lock file is gone afterwards, so
    it is never part of an artefact, and with it the folders that were made for it, if nothing came of it.
    """
    directory = Path(os.path.realpath(directory))
    check_place(directory)
    if directory.exists() and not directory.is_dir():
        raise HostError(f"cannot write {directory}: it is a file", fix="choose another out=, a directory")
    path = directory.parent / f".lock-{directory.name}"
    made: list[Path] = []
    try:
        with host(path, 0):
            fd = _acquired(path, made)
        try:
            with host(path, 0):
                os.ftruncate(fd, 0)
                os.pwrite(fd, str(os.getpid()).encode(), 0)
                sweep(directory)
                sweep(directory.parent, directory.name[:150])  # as `aside` cuts it
            yield
        finally:
            path.unlink(missing_ok=True)  # while it is held: whoever waits on the old inode sees that it is gone
            os.close(fd)
    finally:
        with contextlib.suppress(OSError):
            for folder in reversed(made):
                folder.rmdir()


def _acquired(path: Path, made: list[Path]) -> int:
    """The lock file, held. Adds to `made` the folders that were made for it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a link or a FIFO is no lock
    while True:
        made += make_directories(path.parent)
        try:
            fd = os.open(path, flags, 0o644)
        except FileNotFoundError:
            if path.parent.is_dir():
                raise
            continue  # who had made that folder took it away
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise HostError(f"cannot write {path}: it is not a regular file", fix="remove it")
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


def sweep(parent: Path, name: str | None = None) -> None:
    """Removes what dead processes left in `parent` (of `name` alone, if given), and puts back what they were replacing.

    Call it under the lock.
    """
    if not parent.is_dir():
        return
    for path in sorted(parent.iterdir()):
        match = TEMPORARY.fullmatch(path.name)
        if not match or name not in (None, match[2]) or _alive(int(match[3])):
            continue
        final = parent / match[2]
        if match[1] == "old" and not final.exists():
            with host(path, 0):
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
    with host(path, 0):
        doomed = aside(path.absolute(), "del")
        os.rename(path, doomed)
        sync_directory(doomed.parent)
    shutil.rmtree(doomed, ignore_errors=True)
