"""A folder of real video files with captions, decoded once into verified clips and sampled by key.

The folder holds captions.csv, captions.jsonl, metadata.csv or metadata.jsonl with the columns `file` (or `file_name`)
and `caption` (or `text`); a file may have several lines. Codecs run in a child process with limits, once per file:
training reads the stored frames alone, so damage, codec versions and time stamps are settled before it starts.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import logging
import math
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cascade import store
from cascade.errors import ConfigError, InputError, LockedError
from cascade.media import fit, to_float
from cascade.media.child import Decoder
from cascade.noise import Key, generator
from cascade.text import check_prompt
from cascade.video import Shape

log = logging.getLogger("cascade")

FORMAT = 1  # of the stored clips; another number decodes every file anew
CAPTION_FILES = ("captions.csv", "captions.jsonl", "metadata.csv", "metadata.jsonl")
SUFFIXES = {".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".gif", ".mpg", ".mpeg", ".ts", ".ogv", ".flv", ".wmv"}
# Reasons that speak of the user's choice, not of damage: they do not count towards max_bad_fraction.
CHOSEN = ("no caption", "too short")


@dataclass(kw_only=True)
class ClipsConfig:
    """What to take from the folder `path`; a relative path starts at the working directory."""

    path: str
    max_bad_fraction: float = 0.9  # more damaged or missing files than this: an error
    max_seconds: float = 60.0  # of each file, from its start; the rest is not read
    random_crop: bool = False  # else the centre
    random_flip: bool = False  # left to right; off because captions say left and right
    timeout: float = 120.0  # seconds for one file
    memory: float = 4.0  # GiB of address space for the decoder

    def __post_init__(self) -> None:
        if not 0 <= self.max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction is {self.max_bad_fraction}, expected 0 to 1")
        for name in ("max_seconds", "timeout", "memory"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive number")


@dataclass(frozen=True)
class Item:
    """One clip: `file` relative to the folder, and the artefact that holds its `frames` frames."""

    file: str
    captions: tuple[str, ...]
    clip: Path
    frames: int


@dataclass
class Clips:
    """Clips at `fps` whose frames cover `shape`; `ledger` has one line for each file seen."""

    cfg: ClipsConfig
    shape: Shape
    fps: float
    items: list[Item]
    ledger: list[dict[str, str]]
    _verified: set[Path] = field(default_factory=set, repr=False)

    def __len__(self) -> int:
        return len(self.items)

    @property
    def skipped(self) -> Counter[str]:
        """How many files were skipped, by reason (without its numbers)."""
        return Counter(line["reason"].split(":")[0] for line in self.ledger if line["status"] == "skipped")

    def sample(self, shape: Shape, fps: float, *key: Key) -> tuple[Tensor, str]:
        """A clip (3, F, H, W) in [-1, 1] and its caption: file, window and caption are drawn by `key`.

        Raises ConfigError if no clip is long enough, or if `shape` or `fps` asks for more than was ingested.
        """
        span = self._span(shape, fps)
        long = [i for i, item in enumerate(self.items) if item.frames >= span]
        if not long:
            raise ConfigError(
                f"clips {self.cfg.path}: none has {shape.frames} frames at {fps:g} fps", fix="a smaller shape.frames"
            )
        return self.item(long[_draw(len(long), *key, "file")], shape, fps, *key)

    def item(self, index: int, shape: Shape, fps: float, *key: Key) -> tuple[Tensor, str]:
        """As `sample`, from the clip `index`; without a key: its first window, first caption, the centre, no flip."""
        item, span = self.items[index], self._span(shape, fps)
        if item.frames < span:
            raise ConfigError(f"clip {item.file}: {item.frames} frames, {span} wanted", fix="a smaller shape.frames")
        start = _draw(item.frames - span + 1, *key, "start") if key else 0
        wanted = [_step(k, self.fps / fps) for k in range(shape.frames)]
        frames = self._stored(item, start, span)[wanted]
        at = (0.5, 0.5)
        if self.cfg.random_crop and key:
            at = (_draw(1001, *key, "top") / 1000, _draw(1001, *key, "left") / 1000)
        out = fit(to_float(frames), shape.height, shape.width, at)
        if self.cfg.random_flip and key and _draw(2, *key, "flip"):
            out = out.flip(-1)
        return out, item.captions[_draw(len(item.captions), *key, "caption") if key else 0]

    def _span(self, shape: Shape, fps: float) -> int:
        """How many stored frames a window of `shape` at `fps` reaches over."""
        if not 0 < fps <= self.fps * 1.001 or shape.height > self.shape.height or shape.width > self.shape.width:
            raise ConfigError(
                f"clips {self.cfg.path}: {shape} at {fps:g} fps wanted, ingested for {self.shape} at {self.fps:g} fps",
                fix="ingest for the largest shape and rate that are used",
            )
        return _step(shape.frames - 1, self.fps / fps) + 1

    def _stored(self, item: Item, start: int, count: int) -> Tensor:
        """Frames (count, H, W, 3) uint8 of a clip whose bytes were verified once in this process."""
        from safetensors import safe_open

        if item.clip not in self._verified:
            if bad := store.problems(item.clip, "clip"):
                raise InputError(f"clips: {bad[0]}", fix=f"delete {item.clip} and run again")
            self._verified.add(item.clip)
        with safe_open(item.clip / "clip.safetensors", framework="pt") as file:
            frames: Tensor = file.get_slice("frames")[start : start + count]
        return frames


def _step(k: int, stride: float) -> int:
    return int(k * stride + 0.5)


def _draw(count: int, *key: Key) -> int:
    return int(torch.randint(count, (), generator=generator("clips", *key)))


def ingest(cfg: ClipsConfig, shape: Shape, fps: float, cache: Path) -> Clips:
    """Decodes the files that `cache` does not hold yet, and returns what can be used for `shape` at `fps`.

    Every file becomes one artefact, a clip or a refusal, named by its SHA-256, the size and `fps`, so that nothing is
    decoded twice, also after a kill; only where the decoder crashed, hung or ran out of memory it is tried again.
    ledger.jsonl gets a line per file: file, sha256, used or skipped, reason. Bad files are skipped and counted. Raises
    InputError if the captions cannot be read, no file is usable, or more than `max_bad_fraction` of them are bad.
    """
    from tqdm import tqdm

    folder = Path(cfg.path)
    if not folder.is_dir():
        raise InputError(
            f"clips {folder}: not a directory", fix="data.clips.path=FOLDER, video files with captions.csv"
        )
    if not 0 < fps < math.inf:
        raise ConfigError(f"clips {folder}: fps is {fps}, expected a positive number", fix="fps=8")
    listed, ledger = _listed(folder)
    clips = Clips(cfg, shape, fps, [], ledger)
    with contextlib.suppress(LockedError), store.lock(cache):
        store.sweep(cache / "clips")
    with Decoder(cfg.timeout, cfg.memory) as decoder:
        for name, captions in tqdm(sorted(listed.items()), desc="clips", disable=None):
            digest, reason, item = _ingest_one(clips, cache / "clips", name, captions, decoder)
            clips.ledger.append(_line(name, reason, digest))
            clips.items += [item] if item else []
    clips._verified.update(item.clip for item in clips.items)
    run = hashlib.sha256(f"{folder.resolve()}|{shape}|{fps!r}|{cfg.max_seconds!r}".encode()).hexdigest()[:16]
    lines = "".join(json.dumps(line, sort_keys=True) + "\n" for line in clips.ledger)
    store.write_file(cache / run / "ledger.jsonl", lines.encode())
    return _checked(clips)


def _checked(clips: Clips) -> Clips:
    """Says what was skipped; InputError if that is too much."""
    seen, used, skipped = len(clips.ledger), len(clips), clips.skipped
    assert seen == used + skipped.total(), f"{seen} files seen, {used} used, {skipped.total()} skipped"
    bad = sum(count for reason, count in skipped.items() if reason not in CHOSEN)
    reasons = "; ".join(f"{count} {reason}" for reason, count in skipped.most_common(4))
    what = f"clips {clips.cfg.path}: {used} of {seen} files are usable (skipped: {reasons or 'none'})"
    if not used:
        fix = f"video files, with their captions in one of {', '.join(CAPTION_FILES)}"
        raise InputError(what, fix="a smaller shape.frames, or longer videos" if skipped["too short"] else fix)
    if bad > clips.cfg.max_bad_fraction * seen:
        raise InputError(what, fix="repair or remove the files that ledger.jsonl names, or raise max_bad_fraction")
    if skipped:
        log.warning("%s", what)
    return clips


def _ingest_one(
    clips: Clips, cache: Path, name: str, captions: list[str], decoder: Decoder
) -> tuple[str, str, Item | None]:
    """SHA-256 of one file, why it is skipped, and the clip if it is not. Decodes what `cache` does not know."""
    source = Path(clips.cfg.path, name)
    digest, reason = _digest(source, name)
    if reason or not captions:
        return digest, reason or "no caption", None
    cover = (clips.shape.height, clips.shape.width)
    key = f"{FORMAT}|{digest}|{cover}|{clips.fps!r}|{clips.cfg.max_seconds!r}"
    path = cache / hashlib.sha256(key.encode()).hexdigest()
    if not path.exists() or store.problems(path):
        frames, reason = decoder.decode(source, cover, clips.fps, clips.cfg.max_seconds)
        if reason.startswith("decoder_"):
            return digest, reason, None
        meta = {"source": digest, "fps": clips.fps, "frames": len(frames), "reason": reason}
        files = {"refusal.txt": reason.encode()} if reason else {"clip.safetensors": _packed(frames)}
        store.commit(path, files, kind="clip", meta=meta)
    meta = store.manifest(path, "clip")["meta"]
    if meta["reason"]:
        return digest, meta["reason"], None
    if meta["frames"] < clips.shape.frames:
        return digest, f"too short: {meta['frames']} of {clips.shape.frames} frames", None
    return digest, "", Item(name, tuple(captions), path, meta["frames"])


def _packed(frames: Tensor) -> bytes:
    return store.tensors_to_bytes({"frames": frames})


def _line(name: str, reason: str, digest: str = "") -> dict[str, str]:
    return {"file": name, "sha256": digest, "status": "skipped" if reason else "used", "reason": reason}


def _digest(path: Path, name: str) -> tuple[str, str]:
    """SHA-256 of a file, or nothing and the reason. Only plain files below the folder are opened."""
    if os.path.isabs(name) or name.split("/")[0] == ".." or "\0" in name:
        return "", "outside the folder"
    try:
        if not path.is_file():
            return "", "no such file"
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(2**20):
                digest.update(block)
        return digest.hexdigest(), ""
    except OSError as error:
        return "", f"unreadable: {error.strerror}"


# captions ------------------------------------------------------------------------------------------------------------


def _listed(folder: Path) -> tuple[dict[str, list[str]], list[dict[str, str]]]:
    """Captions by file, for every file that is named or found, and a ledger line for each entry that names none, or
    whose caption no encoder would read."""
    found = [name for name in CAPTION_FILES if (folder / name).is_file()]
    if len(found) != 1:
        what = f"both {' and '.join(found)}" if found else f"none of {', '.join(CAPTION_FILES)}"
        raise InputError(f"clips {folder}: there is {what}", fix="one file with the columns file and caption")
    source = folder / found[0]
    # A caption that is not UTF-8 is that caption's problem, not the whole file's.
    text = source.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    try:
        rows = list(_csv_rows(text, source) if source.suffix == ".csv" else _json_rows(text))
    except csv.Error as error:
        raise InputError(f"clips {source}: {error}", fix="plain CSV with a header line") from error
    listed: dict[str, list[str]] = {}
    ledger = []
    for number, file, caption in rows:
        if not isinstance(file, str) or not file:
            ledger.append(_line(f"{source.name}:{number}", "names no file"))
            continue
        captions = listed.setdefault(os.path.normpath(file), [])
        words = " ".join(caption.split()) if isinstance(caption, str) else ""
        try:
            captions += [words] if words and check_prompt(words) else []
        except ConfigError as error:
            reason = f"bad caption: {error.message.removeprefix('prompt: ')}"
            ledger.append(_line(f"{source.name}:{number}", reason))
    for path in folder.rglob("*"):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            listed.setdefault(path.relative_to(folder).as_posix(), [])
    return listed, ledger


def _csv_rows(text: str, source: Path) -> Iterator[tuple[int, Any, Any]]:
    """(line, file, caption) of each row. A row with a comma too many has no caption: half of one would be a lie."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    header = reader.fieldnames or []
    file = next((name for name in ("file", "file_name") if name in header), None)
    caption = next((name for name in ("caption", "text") if name in header), None)
    if file is None or caption is None:
        raise InputError(f"clips {source}: its columns are {', '.join(header) or 'none'}", fix="file,caption")
    for row in reader:
        yield reader.line_num, row[file], None if None in row else row[caption]


def _json_rows(text: str) -> Iterator[tuple[int, Any, Any]]:
    """(line, file, caption) of each line that is not blank; None for what is not there."""
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        row = row if isinstance(row, dict) else {}
        yield number, row.get("file", row.get("file_name")), row.get("caption", row.get("text"))
