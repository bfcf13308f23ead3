"""Artefacts: atomic, verified, swept, locked; whatever fails or is killed, the old or the new one is there."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cascade import store
from cascade.errors import HostError, InputError, LockedError

OLD = {"a.bin": b"old" * 50, "sub/b.txt": b"old"}
NEW = {"a.bin": b"new" * 70, "sub/b.txt": b"new!"}


def hook(system: object) -> None:
    """What writes calls `system` in place of the module os, until the end of the test."""
    for module in (store.disk, store.writing):
        setattr(module, "os", system)  # noqa: B010


@pytest.fixture(autouse=True)
def _no_flush(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A kill never loses the page cache, so flushing for real would only cost time; that it is asked for is a test."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    yield
    hook(os)


def tree(root: Path) -> dict[str, bytes]:
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def temporaries(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir() if store.TEMPORARY.fullmatch(path.name))


def test_files_may_come_one_after_the_other_and_be_read_alone(tmp_path: Path) -> None:
    made: list[str] = []

    def pairs() -> Iterator[tuple[str, bytes]]:
        for name in ("a", "in/b"):
            made.append(name)
            yield name, name.encode()

    out = store.commit(tmp_path / "x", pairs(), kind="test")
    assert made == ["a", "in/b"] and store.read(out, "test").files == {"a": b"a", "in/b": b"in/b"}
    assert store.manifest(store.commit(tmp_path / "y", {"in/b": b"in/b", "a": b"a"}, kind="test")) == store.manifest(
        out
    )
    (out / "a").write_bytes(b"z")
    assert store.member(out, "in/b", "test") == b"in/b"  # only what is asked for is read
    for name, kind, words in (
        ("a", "test", "SHA-256"),
        ("c", "test", "is not in manifest"),
        ("in/b", "other", "holds"),
    ):
        with pytest.raises(InputError, match=words):
            store.member(out, name, kind)

    def failing() -> Iterator[tuple[str, bytes]]:
        yield "a", b""
        raise InputError("no more")

    with pytest.raises(InputError, match="no more"):
        store.commit(tmp_path / "z", failing(), kind="test")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def test_commit_then_read_gives_the_same_bytes(tmp_path: Path) -> None:
    path = store.commit(tmp_path / "x/y/step-1", NEW, kind="test", meta={"n": 1})
    artefact = store.read(path, "test")
    assert (artefact.kind, artefact.meta, artefact.files, artefact.path) == ("test", {"n": 1}, NEW, path)
    assert store.problems(path) == [] and os.listdir(path.parent) == ["step-1"]


def test_equal_content_gives_equal_bytes_wherever_and_however_it_is_made(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        for name, data in reversed(NEW.items()):
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_bytes(data)

    one = store.commit(tmp_path / "one", NEW, kind="test", meta={"b": 1, "a": [2]})
    two = store.commit(tmp_path / "deep/two", fill, kind="test", meta={"a": [2], "b": 1})
    assert tree(one) == tree(two) and store.read(one).hash == store.read(two).hash


def test_a_verified_artefact_is_kept_unless_replaced(tmp_path: Path) -> None:
    final = store.commit(tmp_path / "x", OLD, kind="test")
    store.commit(final, NEW, kind="test")
    assert store.read(final).files == OLD
    store.commit(final, NEW, kind="test", replace=True)
    assert store.read(final).files == NEW and os.listdir(tmp_path) == ["x"]


@pytest.mark.parametrize("name", ["a.bin", "manifest.json"])
def test_a_damaged_artefact_is_made_again(tmp_path: Path, name: str) -> None:
    final = store.commit(tmp_path / "x", OLD, kind="test")
    (final / name).write_bytes(b"")
    store.commit(final, NEW, kind="test")
    assert store.read(final).files == NEW


@pytest.mark.parametrize("replace", [True, False])
def test_what_is_not_ours_is_never_touched(tmp_path: Path, replace: bool) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("years of work")
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text('{"name": "an extension"}')
    (tmp_path / "file").write_text("text")
    (tmp_path / "link").symlink_to(mine)
    (tmp_path / "piped").mkdir()
    os.mkfifo(tmp_path / "piped/manifest.json")
    before = tree(tmp_path)
    for name in ("mine", "other", "file", "link", "piped"):
        with pytest.raises(InputError, match="not an artefact"):
            store.commit(tmp_path / name, NEW, kind="test", replace=replace)
    assert tree(tmp_path) == before and temporaries(tmp_path) == []


@pytest.mark.parametrize("replace", [True, False])
def test_an_artefact_of_another_kind_is_kept(tmp_path: Path, replace: bool) -> None:
    path = store.commit(tmp_path / "x", OLD, kind="weights")
    before = tree(tmp_path)
    with pytest.raises(InputError, match="it holds 'weights', not 'test'"):
        store.commit(path, NEW, kind="test", replace=replace)
    with pytest.raises(InputError, match="it holds 'weights', not 'test'"):
        store.commit_into(path, NEW, kind="test")
    with pytest.raises(InputError, match="it holds 'weights', not 'test'"):
        store.check_into(path, "test")
    assert tree(tmp_path) == before and store.kind_of(path) == "weights"


@pytest.mark.parametrize("manifest", ["whole", "damaged", "of another program"])
def test_what_else_lies_in_an_artefact_is_never_lost(tmp_path: Path, manifest: str) -> None:
    path = store.commit(tmp_path / "x", OLD, kind="test")
    (path / "sub/thesis.txt").write_text("years of work")
    if manifest != "whole":
        (path / "manifest.json").write_text("{" if manifest == "damaged" else "// an extension's\n{}")
    before = tree(tmp_path)
    with pytest.raises(InputError, match=r"x: sub/thesis\.txt there is no part of that artefact"):
        store.commit(path, NEW, kind="test", replace=True)
    assert tree(tmp_path) == before


def test_locks_remains_and_measures_are_replaced_with_an_artefact(tmp_path: Path) -> None:
    path = store.commit(tmp_path / "x", OLD, kind="test")
    for name in (".lock-sub", ".tmp-a.bin-1-0123abcd", store.MEASURES):
        (path / name).write_bytes(b"")
    store.check_ours(path, "test")
    store.commit(path, NEW, kind="test", replace=True)
    assert store.read(path).files == NEW and not (path / store.MEASURES).exists()


def test_a_failing_callback_leaves_nothing(tmp_path: Path) -> None:
    def fill(folder: Path) -> None:
        (folder / "half").write_bytes(b"x")
        raise RuntimeError("encoder died")

    def link(folder: Path) -> None:
        (folder / "link").symlink_to("/etc/passwd")

    with pytest.raises(RuntimeError, match="encoder"):
        store.commit(tmp_path / "x", fill, kind="test")
    with pytest.raises(ValueError, match="plain files"):
        store.commit(tmp_path / "x", link, kind="test")
    with pytest.raises(ValueError, match="nothing"):
        store.commit(tmp_path / "x", lambda folder: None, kind="test")
    assert os.listdir(tmp_path) == []


def test_commit_into_leaves_other_things_alone(tmp_path: Path) -> None:
    inner = store.commit(tmp_path / "run/stages/base", OLD, kind="stage")
    run = store.commit_into(tmp_path / "run", {"video.mp4": b"1"}, kind="run", meta={"seed": 1})
    assert store.read(run, "run").files == {"video.mp4": b"1"} and store.read(inner).files == OLD
    store.commit_into(run, {"video.mp4": b"22"}, kind="run")
    assert store.read(run).files == {"video.mp4": b"22"} and temporaries(run) == []


def test_single_file_artefact_is_verified_by_the_manifest_beside_it(tmp_path: Path) -> None:
    path = store.commit_file(tmp_path / "x.safetensors", b"123", kind="video", meta={"fps": 8})
    assert sorted(os.listdir(tmp_path)) == ["x.manifest.json", "x.safetensors"]
    assert store.read(path, "video").files == {"x.safetensors": b"123"} and store.manifest(path)["meta"] == {"fps": 8}
    store.commit_file(path, b"4567", kind="video")
    assert store.read(path).files == {"x.safetensors": b"4567"}
    path.write_bytes(b"4568")
    with pytest.raises(InputError, match=r"x\.safetensors: is damaged"):
        store.read(path)


# failures and kills


class Hooked:
    """`os` whose system calls that write are counted; `at` is called before the n-th."""

    CALLS = ("open", "write", "fsync", "rename", "replace", "mkdir")

    def __init__(self, n: int, at: Callable[[], None]) -> None:
        self.n, self.at, self.count, self.log = n, at, 0, [("", "")]

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.CALLS:
            return real

        def call(*args: Any) -> Any:
            self.count += 1
            what = args[1] if name in ("rename", "replace") else args[0]
            self.log.append((name, os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else str(what)))
            if self.count == self.n:
                self.at()
            return real(*args)

        return call


def writers(root: Path) -> dict[str, Callable[[dict[str, bytes]], object]]:
    return {
        "create": lambda files: store.commit(root / "new", files, kind="test"),
        "replace": lambda files: store.commit(root / "x", files, kind="test", replace=True),
        "into": lambda files: store.commit_into(root / "run", files, kind="test"),
        "file": lambda files: store.commit_file(root / "one.bin", files["a.bin"], kind="test"),
        "text": lambda files: store.write_file(root / "log.txt", files["a.bin"]),
    }


TARGET = {"create": "new", "replace": "x", "into": "run", "file": "one.bin", "text": "log.txt"}


def check(root: Path, how: str) -> str:
    """What a reader finds: never anything but the whole old, the whole new, or (new names) nothing."""
    path = root / TARGET[how]
    if how == "text":
        return {OLD["a.bin"]: "old", NEW["a.bin"]: "new"}[path.read_bytes()]
    if how in ("into", "file") and store.problems(path):
        return "unfinished"
    if how == "create" and not path.exists():
        return "nothing"
    files = store.read(path).files
    return "old" if files["one.bin" if how == "file" else "a.bin"] == OLD["a.bin"] else "new"


def prepared(root: Path) -> None:
    for how, write in writers(root).items():
        if how != "create":
            write(OLD)


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EACCES, "interrupt"])
@pytest.mark.parametrize("how", TARGET)
def test_any_failing_call_leaves_old_or_new(tmp_path: Path, how: str, error: int | str) -> None:
    def fail() -> None:
        raise KeyboardInterrupt if isinstance(error, str) else OSError(error, os.strerror(error))

    seen, n, done = set(), 0, False
    while not done:
        n += 1
        assert n < 100
        root = tmp_path / str(n)
        root.mkdir()
        prepared(root)
        hook(Hooked(n, fail))
        try:
            writers(root)[how](NEW)
            done = True
        except HostError as refused:
            assert not isinstance(error, str) and TARGET[how].split(".")[0] in str(refused)
            if error in (errno.ENOSPC, errno.EDQUOT):
                assert "MB needed" in str(refused) and "MB free" in str(refused)
        except KeyboardInterrupt:
            assert isinstance(error, str)
        finally:
            hook(os)
        seen.add(check(root, how))
        assert not [name for name in temporaries(root) if name.startswith(".tmp")]
        writers(root)[how](NEW)
        assert check(root, how) == "new"
    assert n > 4 and "new" in seen and seen - {"new"}


def in_child(work: Callable[[], object]) -> int:
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            traceback.print_exc()
            os._exit(3)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


@pytest.mark.parametrize("how", TARGET)
def test_killed_before_any_call_leaves_old_or_new(tmp_path: Path, how: str) -> None:
    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    states: list[int] = []
    n = 0
    while not states or states[-1] != 0:
        n += 1
        assert n < 100
        root = tmp_path / str(n)
        root.mkdir()
        prepared(root)

        def work(root: Path = root, n: int = n) -> None:
            hook(Hooked(n, die))
            writers(root)[how](NEW)

        states.append(in_child(work))
        store.sweep(root)
        assert temporaries(root) == []
        check(root, how)
        writers(root)[how](NEW)
        assert check(root, how) == "new"
    assert len(states) > 4 and all(os.WIFSIGNALED(state) for state in states[:-1])


def commits(root: Path, first: int, calls: int, acknowledge: int) -> None:
    """Commits and prunes until the `calls`-th call that touches the disk, in the store or below it, kills it."""
    left = calls

    def count(event: str, _: object) -> None:
        nonlocal left
        if event in ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.listdir", "os.scandir"):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    for n in range(first, first + 1000):
        store.commit(root / f"step-{n}", {"data": str(n).encode() * 2000}, kind="test")
        os.write(acknowledge, b"%d\n" % n)
        store.prune(root, 2)


def test_random_kills_lose_nothing(tmp_path: Path) -> None:
    # By count and not by time: on a busy machine kills by time all fall where the scheduler happens to switch.
    rng, inside, step = random.Random(0), 0, 0
    for _ in range(40):
        reader, writer = os.pipe()

        def work(first: int = step, calls: int = rng.randrange(30, 120), pipe: int = writer) -> None:
            commits(tmp_path, first, calls, pipe)

        assert os.WTERMSIG(in_child(work)) == signal.SIGKILL
        os.close(writer)
        with open(reader) as stream:
            acknowledged = max(map(int, stream.read().split()), default=step)
        inside += bool(temporaries(tmp_path))
        store.sweep(tmp_path)
        newest = store.latest(tmp_path)
        assert newest is not None and temporaries(tmp_path) == []
        assert all(not store.problems(path) for path in tmp_path.iterdir())
        step = int(newest.name.removeprefix("step-"))
        assert step >= acknowledged and store.read(newest).files["data"] == str(step).encode() * 2000
    assert 10 <= inside <= 39, f"{inside} of 40 kills fell inside a commit or a deletion: the test proves nothing"


def test_everything_is_flushed_before_and_after_the_rename(tmp_path: Path) -> None:
    hooked = Hooked(0, lambda: None)
    hook(hooked)
    store.commit(tmp_path / "x", NEW, kind="test")
    calls = hooked.log[1:]
    renamed = calls.index(("rename", str(tmp_path / "x")))
    folder = next(target for name, target in calls if name == "mkdir")
    flushed = [target for name, target in calls[:renamed] if name == "fsync"]
    written = {target for name, target in calls if name == "write"}
    assert written == {f"{folder}/{name}" for name in (*NEW, "manifest.json")}
    assert written | {folder, f"{folder}/sub"} == set(flushed) and flushed[-1] == folder
    assert ("fsync", str(tmp_path)) in calls[renamed:]


def test_writers_of_one_name_do_not_disturb_each_other(tmp_path: Path) -> None:
    pids = []
    for writer in range(4):
        pid = os.fork()
        if pid == 0:
            for n in range(10):
                store.commit(tmp_path / f"step-{n}", {"data": bytes([writer]) * 5000}, kind="test", replace=n % 2 == 0)
            os._exit(0)
        pids.append(pid)
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert sorted(os.listdir(tmp_path)) == [f"step-{n}" for n in range(10)]
    assert all(not store.problems(path) for path in tmp_path.iterdir())


# damage and hostility


def test_every_flipped_bit_of_every_file_is_refused(tmp_path: Path) -> None:
    path = store.commit(tmp_path / "x", {"a": b"ab", "b/c": b"d"}, kind="test", meta={"text": "é", "n": [1.5, None]})
    count = 0
    for file in [file for file in path.rglob("*") if file.is_file()]:
        good = file.read_bytes()
        for position in range(len(good)):
            bad = bytearray(good)
            bad[position] ^= 1 << position % 8
            file.write_bytes(bad)
            assert store.problems(path), f"{file.name}: bit {position % 8} of byte {position}"
            count += 1
        for bad_file in (good[:-1], good + b"\n", b"", bytes(len(good))):
            file.write_bytes(bad_file)
            assert store.problems(path)
        file.unlink()
        assert any("missing" in problem for problem in store.problems(path))
        file.write_bytes(good)
    assert count > 300 and store.problems(path) == []


def forge(path: Path, **change: Any) -> None:
    """A manifest that an attacker made again, digest and all."""
    old = {key: value for key, value in json.loads((path / "manifest.json").read_bytes()).items() if key != "digest"}
    new = {**old, **change}
    digest = hashlib.sha256(store.canonical(new)).hexdigest()
    (path / "manifest.json").write_bytes(store.canonical(new | {"digest": digest}))


def entry(path: Path) -> dict[str, Any]:
    data = path.read_bytes()
    return {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}


@pytest.fixture
def artefact(tmp_path: Path) -> Path:
    return store.commit(tmp_path / "x", OLD, kind="test")


@pytest.mark.parametrize(
    "change",
    [
        {"files": {name: {"sha256": "0" * 64, "bytes": 1}}}
        for name in ("../y", "/etc/passwd", "a/../../y", "", ".", "a//b", "./a.bin", "a\\b", "a\0b", "manifest.json")
    ]
    + [
        {"files": {"a.bin": {"sha256": "0" * 64, "bytes": -1}}},
        {"files": {"a.bin": {"sha256": "0" * 64, "bytes": True}}},
        {"files": {"a.bin": {"sha256": 0, "bytes": 1}}},
        {"files": {"a.bin": {"bytes": 1}}},
        {"files": {"a.bin": []}},
        {"files": {"a" * 5000: {"sha256": "0" * 64, "bytes": 1}}},
        {"files": {"\ud800": {"sha256": "0" * 64, "bytes": 1}}},
        {"files": {"a.bin/x": {"sha256": "0" * 64, "bytes": 1}}},
        {"files": {"sub": {"sha256": "0" * 64, "bytes": 4096}}},
        {"files": []},
        {"meta": 1},
        {"kind": None},
        {"format_version": 0.5},
        {"format_version": True},
        {"format_version": "1"},
        {"extra": 1},
    ],
)
def test_a_hostile_manifest_is_refused(artefact: Path, change: dict[str, Any]) -> None:
    forge(artefact, **change)
    with pytest.raises(InputError) as caught:
        store.read(artefact, "test")
    assert caught.value.fix and "root:" not in str(caught.value)
    assert store.problems(artefact)


def test_what_is_not_there_is_not_to_be_deleted(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file") as error:
        store.read(tmp_path / "none")
    assert "delete" not in str(error.value)


def test_a_newer_format_says_update(artefact: Path) -> None:
    forge(artefact, format_version=2)
    with pytest.raises(InputError, match="has format 2, this Cascade reads 1: update it"):
        store.read(artefact)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff",
        b"[" * 100_000,
        b'{"format_version": NaN}',
        b'{"format_version": 1, "format_version": 1}',
        b"{}",
    ],
)
def test_a_manifest_that_is_not_one_is_refused(artefact: Path, data: bytes) -> None:
    (artefact / "manifest.json").write_bytes(data)
    with pytest.raises(InputError, match=r"manifest\.json"):
        store.read(artefact)


def test_links_out_of_the_folder_pipes_and_folders_are_refused(artefact: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(OLD["a.bin"])
    file = artefact / "a.bin"
    file.unlink()
    file.symlink_to(secret)
    with pytest.raises(InputError, match="outside"):
        store.read(artefact)
    file.unlink()
    file.symlink_to("a.bin")
    with pytest.raises(InputError):
        store.read(artefact)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(InputError, match="regular"):
        store.read(artefact)
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError):
        store.read(artefact)


def test_what_is_missing_is_named_with_what_is_there(artefact: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere: there is no such.*holds x"):
        store.read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="is empty"):
        store.read(tmp_path / "empty")
    with pytest.raises(InputError, match="holds 'test', expected 'weights'"):
        store.read(artefact, "weights")
    (artefact / "a.bin").unlink()
    with pytest.raises(InputError, match=r"a\.bin: is missing \(.* holds manifest\.json, sub\)"):
        store.read(artefact)


def test_a_name_that_leaves_the_folder_cannot_be_written(tmp_path: Path) -> None:
    for name in ("../x", "/tmp/x", "manifest.json", ""):
        with pytest.raises(ValueError, match="not a name"):
            store.commit(tmp_path / "x", {name: b""}, kind="test")
    assert os.listdir(tmp_path) == []


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(st.text(), json_values, max_size=4))
def test_canonical_json_depends_on_the_data_only(data: dict[str, Any]) -> None:
    text = store.canonical(data)
    assert text == store.canonical(dict(reversed(data.items()))) == store.canonical(json.loads(text))
    assert text.isascii() and text.endswith(b"\n") and store.from_json(text, Path("x")) == data


# latest, prune, sweep, lock


def test_latest_is_the_highest_number_that_verifies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for n in (1, 9, 10, 200):
        store.commit(tmp_path / f"step-{n}", {"n": b"%d" % n}, kind="test")
    (tmp_path / "step-x").mkdir()
    (tmp_path / "step-999").mkdir()
    assert store.latest(tmp_path) == tmp_path / "step-200"
    (tmp_path / "step-200/n").write_bytes(b"000")
    caplog.clear()
    assert store.latest(tmp_path) == tmp_path / "step-10"
    assert "step-999" in caplog.text and "step-200" in caplog.text and "SHA-256" in caplog.text
    assert store.latest(tmp_path / "none") is None


def test_prune_keeps_the_newest_and_never_the_last_good_one_away(tmp_path: Path) -> None:
    for n in range(5):
        store.commit(tmp_path / f"step-{n}", {"n": b"%d" % n}, kind="test")
    store.prune(tmp_path, 3)
    assert sorted(os.listdir(tmp_path)) == ["step-2", "step-3", "step-4"]
    (tmp_path / "step-4/n").write_bytes(b"x")
    store.prune(tmp_path, 1)
    assert store.latest(tmp_path) == tmp_path / "step-3"


def test_sweep_removes_what_the_dead_left_and_nothing_else(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    gone = [f".tmp-x-{dead.pid}-0123abcd", f".del-step-1-{dead.pid}-0123abcd"]
    kept = [f".tmp-x-{os.getpid()}-0123abcd", ".tmp-mine", "step-1", ".hidden"]
    for name in (*gone, *kept, f".old-lost-{dead.pid}-0123abcd", f".old-step-1-{dead.pid}-0123abcd"):
        (tmp_path / name / "inner").mkdir(parents=True)
    (tmp_path / f".tmp-file-{dead.pid}-0123abcd").write_bytes(b"")
    store.sweep(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted([*kept, "lost"])


HOLD = "import sys, time, subprocess; from pathlib import Path; from cascade import store\n"
HOLD += "with store.lock(Path(sys.argv[1])):\n"
HOLD += " child = subprocess.Popen(['sleep', '60'], close_fds=False); print(child.pid, flush=True); time.sleep(60)\n"


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], int]]:
    root = Path(store.__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True, cwd=root
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    process.wait()
    process.stdout.close()
    os.kill(child, signal.SIGKILL)


def test_a_lock_names_its_holder_and_dies_with_it(tmp_path: Path, holder: tuple[subprocess.Popen[str], int]) -> None:
    process, child = holder
    with pytest.raises(LockedError, match=f"run is in use by process {process.pid}"), store.lock(tmp_path / "run"):
        pass
    process.kill()
    process.wait()
    os.kill(child, 0)
    with store.lock(tmp_path / "run"):
        assert (tmp_path / ".lock-run").read_text() == str(os.getpid())
    assert os.listdir(tmp_path) == []


def test_a_lock_is_held_once_and_freed_by_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), store.lock(tmp_path / "run"):
        with pytest.raises(LockedError), store.lock(tmp_path / "run"):
            pass
        raise RuntimeError
    with store.lock(tmp_path / "run"):
        pass


def test_only_a_regular_file_is_a_lock(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("years of work")
    (tmp_path / ".lock-link").symlink_to("mine")
    os.mkfifo(tmp_path / ".lock-pipe")
    (tmp_path / ".lock-folder").mkdir()
    for name in ("link", "pipe", "folder"):
        with pytest.raises(HostError, match=f"lock-{name}: "), store.lock(tmp_path / name):
            pass
    assert (tmp_path / "mine").read_text() == "years of work" and len(os.listdir(tmp_path)) == 4


def test_a_full_disk_is_named_by_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(HostError, match="No space left"), store.lock(tmp_path / "a/run"):
        pass
    assert os.listdir(tmp_path) == []


def test_a_lock_takes_away_the_folders_made_for_it_if_nothing_came_of_it(tmp_path: Path) -> None:
    with pytest.raises(InputError), store.lock(tmp_path / "a/b/run"):
        raise InputError("refused")
    assert os.listdir(tmp_path) == []
    with store.lock(tmp_path / "a/b/run"):
        (tmp_path / "a/result").write_bytes(b"")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a", "result"]


def test_a_lock_sweeps_what_the_dead_left_of_its_directory(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for name in (f".tmp-run-{dead.pid}-0123abcd", f".tmp-other-{dead.pid}-0123abcd"):
        (tmp_path / name / "inner").mkdir(parents=True)
        (tmp_path / "run" / name).mkdir(parents=True)
    with store.lock(tmp_path / "run"):
        assert temporaries(tmp_path) == [f".tmp-other-{dead.pid}-0123abcd"] and temporaries(tmp_path / "run") == []


def test_an_unwritable_place_is_a_host_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file/x", tmp_path / ("n" * 300), Path("/proc/x")):
        with pytest.raises(HostError, match="cannot write"):
            store.commit(path, NEW, kind="test")
        with pytest.raises(HostError, match="cannot write"):
            store.write_file(path, b"")
        with pytest.raises(HostError, match="cannot write"):
            store.check_place(path / "deep")
        with pytest.raises(HostError, match="cannot write"), store.lock(path / "deep"):
            pass
        with pytest.raises(HostError, match="cannot write"):
            store.commit_into(path, {"a": b"1"}, kind="test")
    with pytest.raises(HostError):
        store.commit_file(tmp_path / "file/x.bin", b"", kind="test")
    with pytest.raises(HostError, match="it is a file"), store.lock(tmp_path / "file"):
        pass
    for path in (tmp_path, tmp_path / "file", tmp_path / "new/name"):
        store.check_place(path)
    assert os.listdir(tmp_path) == ["file"]


# tensors


def test_many_tensors_give_the_same_bytes_each_time() -> None:
    import torch

    types = [torch.half, torch.float, torch.long]
    state = {f"layer.{i}": torch.full((3, 2), i, dtype=types[i % 3]) for i in range(40)}
    made = {store.tensors_to_bytes(dict(reversed(state.items())), ("kind", "test")) for _ in range(20)}
    assert made == {store.tensors_to_bytes(state, ("kind", "test"))}


def test_tensors_survive_and_come_back_sorted() -> None:
    import torch

    base = torch.arange(24.0).view(4, 6)
    state = {"z": base.t(), "b": base[1], "a": base, "e": torch.empty(0, 3), "s": torch.tensor(True), "n": base.half()}
    state["tied"] = state["a"]
    loaded = store.bytes_to_tensors(store.tensors_to_bytes(state))
    assert list(loaded) == sorted(state)
    assert all(torch.equal(loaded[name], state[name]) and loaded[name].dtype == state[name].dtype for name in state)
