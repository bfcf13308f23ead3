from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cascade import store
from cascade.data.clips import Clips, ClipsConfig, ingest
from cascade.errors import ConfigError, HostError, InputError
from cascade.media import child, encoded, to_bytes, to_float
from cascade.media.child import Decoder
from cascade.video import Shape

SHAPE = Shape(frames=4, height=16, width=16)


def counting(frames: int, height: int = 24, width: int = 32) -> Tensor:
    """A video (3, F, H, W) whose frame k has brightness 20 k, and whose right half is darker by 10."""
    level = torch.arange(frames).float().view(1, frames, 1, 1).expand(3, frames, height, width) * 20 + 20
    level = level - 10 * (torch.arange(width) >= width // 2)
    return level / 127.5 - 1


def numbers(x: Tensor) -> list[int]:
    """Which frames of `counting` a sample (3, F, H, W) shows."""
    brightness = torch.from_numpy(to_bytes(x)).float().mean(dim=(1, 2, 3))
    return [round((float(b) - 15) / 20) for b in brightness]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good clips of different size and rate, and one file for every fault."""
    root = tmp_path_factory.mktemp("videos")
    (root / "sub").mkdir()
    good = encoded(counting(12), 8, ".mp4")
    files = {
        "good.mp4": good,
        "sub/other rate.webm": encoded(counting(12, 17, 51), 4, ".webm"),
        "cut.mp4": good[: len(good) // 2],
        "text.mp4": b"this is no video\n" * 50,
        "short.gif": encoded(counting(2), 8, ".gif"),
        "silent.mp4": good,
        "unlisted.mp4": good,
        "binary.mp4": good,
    }
    for name, data in files.items():
        (root / name).write_bytes(data)
    rows = [
        "file,caption",
        "good.mp4,a square  grows",
        './good.mp4,"it grows, fast"',
        "sub/other rate.webm,a caf\u00e9",
    ]
    rows += [
        "cut.mp4,cut",
        "text.mp4,text",
        "short.gif,short",
        "silent.mp4, ",
        "gone.mp4,gone",
        "../up.mp4,up",
        ",no file",
    ]
    rows += ["/etc/passwd,absolute", "silent.mp4,half, a caption", f"good.mp4,{'word ' * 2001}", "good.mp4,a \x1b[2J b"]
    (root / "captions.csv").write_bytes("\r\n".join(rows).encode() + b"\r\nbinary.mp4,\xff\xfe\r\n")
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def clips(folder: Path, cache: Path) -> Clips:
    return ingest(ClipsConfig(path=str(folder)), SHAPE, 8.0, cache)


def test_every_file_is_used_or_skipped_with_a_reason(clips: Clips, cache: Path) -> None:
    reasons = {line["file"]: line["reason"] for line in clips.ledger}
    assert reasons.pop("cut.mp4").startswith(("unreadable", "truncated"))
    assert reasons == {
        "good.mp4": "",
        "sub/other rate.webm": "",
        "text.mp4": "unreadable (Invalid data found when processing input)",
        "short.gif": "too short: 2 of 4 frames",
        "silent.mp4": "no caption",
        "unlisted.mp4": "no caption",
        "binary.mp4": "no caption",
        "gone.mp4": "no such file",
        "../up.mp4": "outside the folder",
        "/etc/passwd": "outside the folder",
        "captions.csv:11": "names no file",
        "captions.csv:14": "bad caption: 10004 characters, more than 10000",
        "captions.csv:15": "bad caption: character U+001B at offset 2 is not text",
        "captions.csv:16": "bad caption: character U+DCFF at offset 0 is not text",
    }
    assert len(clips) == 2 and clips.skipped.total() == 13
    assert clips.skipped["no caption"] == 3 and clips.skipped["bad caption"] == 3 and clips.skipped["too short"] == 1
    (ledger,) = cache.glob("*/ledger.jsonl")
    assert [json.loads(line) for line in ledger.read_text().splitlines()] == clips.ledger
    assert all(len(line["sha256"]) == 64 for line in clips.ledger if line["status"] == "used")


def test_frames_are_those_of_the_file_at_the_wanted_rate(clips: Clips) -> None:
    assert [item.file for item in clips.items] == ["good.mp4", "sub/other rate.webm"]
    assert [item.frames for item in clips.items] == [12, 23]
    x, caption = clips.item(0, SHAPE, 8.0)
    assert x.shape == (3, 4, 16, 16) and x.dtype == torch.float32 and x.abs().max() <= 1
    assert caption == "a square grows" and numbers(x) == [0, 1, 2, 3]
    x, caption = clips.item(1, Shape(frames=8, height=16, width=16), 8.0)
    assert caption == "a caf\u00e9" and numbers(x) == [0, 0, 1, 1, 2, 2, 3, 3]  # of two equally near, the earlier
    assert numbers(clips.item(0, SHAPE, 4.0)[0]) == [0, 2, 4, 6]
    assert clips.item(0, Shape(frames=1, height=7, width=12), 8.0)[0].shape == (3, 1, 7, 12)


def test_sampling_depends_on_the_key_alone(clips: Clips) -> None:
    drawn = [clips.sample(SHAPE, 8.0, "train", n) for n in range(16)]
    again = [clips.sample(SHAPE, 8.0, "train", n) for n in reversed(range(16))][::-1]
    for (x, caption), (same, same_caption) in zip(drawn, again, strict=True):
        assert torch.equal(x, same) and caption == same_caption
        first = numbers(x)[0]
        assert caption == "a caf\u00e9" or numbers(x) == list(range(first, first + 4))
    assert {caption for _, caption in drawn} == {"a square grows", "it grows, fast", "a caf\u00e9"}
    starts = {numbers(x)[0] for x, caption in drawn if caption != "a caf\u00e9"}
    assert len(starts) > 2 and max(starts) <= 8
    # left stays left: the brighter half of `counting`
    assert all(x[..., :8].mean() > x[..., 8:].mean() for x, _ in drawn)


def test_flips_and_crops_are_off_until_asked_for(folder: Path, cache: Path, clips: Clips) -> None:
    cfg = ClipsConfig(path=str(folder), random_crop=True, random_flip=True)
    moved = Clips(cfg, SHAPE, 8.0, clips.items, clips.ledger)
    drawn = [moved.item(0, SHAPE, 8.0, n)[0] for n in range(12)]
    flipped = [bool(x[..., 0].mean() < x[..., -1].mean()) for x in drawn if x[..., 0].mean() != x[..., -1].mean()]
    assert set(flipped) == {True, False}
    edges = {int((x[0, 0, 8, 1:] - x[0, 0, 8, :-1]).abs().argmax()) for x in drawn}
    assert len(edges) > 2
    assert torch.equal(moved.item(0, SHAPE, 8.0)[0], clips.item(0, SHAPE, 8.0)[0])


def test_what_was_not_ingested_cannot_be_sampled(clips: Clips) -> None:
    for shape, fps in (
        (Shape(frames=24, height=16, width=16), 8.0),
        (Shape(frames=4, height=32, width=16), 8.0),
        (SHAPE, 16.0),
    ):
        with pytest.raises(ConfigError):
            clips.sample(shape, fps, 0)
    with pytest.raises(ConfigError, match="good"):
        clips.item(0, Shape(frames=13, height=16, width=16), 8.0)


def test_nothing_is_decoded_twice(folder: Path, cache: Path, clips: Clips, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("decoded again")

    monkeypatch.setattr(Decoder, "decode", refuse)
    cfg = ClipsConfig(path=str(folder))
    again = ingest(cfg, SHAPE, 8.0, cache)
    assert again.ledger == clips.ledger and again.items == clips.items
    assert len(ingest(cfg, Shape(frames=13, height=16, width=16), 8.0, cache)) == 1  # frames do not change a clip
    with pytest.raises(AssertionError):
        ingest(cfg, SHAPE, 4.0, cache)


def test_a_damaged_clip_is_found_and_made_again(folder: Path, cache: Path, clips: Clips) -> None:
    path = clips.items[0].clip / "clip.safetensors"
    intact = path.read_bytes()
    path.write_bytes(intact[:-1] + bytes([intact[-1] ^ 1]))
    fresh = Clips(clips.cfg, SHAPE, 8.0, clips.items, clips.ledger)
    with pytest.raises(InputError, match="damaged"):
        fresh.item(0, SHAPE, 8.0)
    ingest(ClipsConfig(path=str(folder)), SHAPE, 8.0, cache)
    assert path.read_bytes() == intact and not store.problems(path.parent)


def test_too_many_bad_files_or_none_usable_is_an_error(folder: Path, cache: Path, clips: Clips, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 of 15 files.*3 no caption") as caught:
        ingest(ClipsConfig(path=str(folder), max_bad_fraction=0.3), SHAPE, 8.0, cache)
    assert "max_bad_fraction" in caught.value.fix
    with pytest.raises(InputError, match=r"0 of 15.* Fix: a smaller shape\.frames"):
        ingest(ClipsConfig(path=str(folder)), Shape(frames=99, height=16, width=16), 8.0, cache)
    with pytest.raises(InputError, match="not a directory"):
        ingest(ClipsConfig(path=str(tmp_path / "none")), SHAPE, 8.0, cache)
    with pytest.raises(InputError, match=r"none of captions\.csv"):
        ingest(ClipsConfig(path=str(tmp_path)), SHAPE, 8.0, cache)
    (tmp_path / "captions.csv").write_text("name,words\na,b\n")
    with pytest.raises(InputError, match="name, words"):
        ingest(ClipsConfig(path=str(tmp_path)), SHAPE, 8.0, cache)
    (tmp_path / "metadata.csv").write_text("file,caption\n")
    with pytest.raises(InputError, match=r"both captions.csv and metadata.csv"):
        ingest(ClipsConfig(path=str(tmp_path)), SHAPE, 8.0, cache)


def test_json_lines_and_the_names_others_use(tmp_path: Path) -> None:
    (tmp_path / "a.gif").write_bytes(encoded(counting(4, 8, 8), 8, ".gif"))
    rows = ['{"file_name": "a.gif", "text": "it grows"}', "", "{", "[1]", '{"file": "a.gif", "caption": 3}']
    (tmp_path / "metadata.jsonl").write_text("\n".join(rows))
    clips = ingest(ClipsConfig(path=str(tmp_path)), SHAPE, 8.0, tmp_path / "cache")
    assert [item.captions for item in clips.items] == [("it grows",)]
    assert clips.skipped == {"names no file": 2}


FAULTY = """
import os, signal, sys; sys.path[:] = {path!r}
import numpy as np
from cascade.media import child
real = child.frames_of
def faulty(path, *rest):
    if path.name.startswith("crash"): os.kill(os.getpid(), signal.SIGSEGV)
    if path.name.startswith("sleep"): signal.pause()
    if path.name.startswith("eat"): np.ones(2**36)
    return real(path, *rest)
child.frames_of = faulty
child.serve({descriptor}, {memory})
"""


def test_a_decoder_that_crashes_hangs_or_eats_memory_costs_one_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = encoded(counting(4, 8, 8), 8, ".gif")
    names = ["a", "crash", "eat", "good", "sleep", "z"]
    for n, name in enumerate(names):
        (tmp_path / f"{name}.gif").write_bytes(good + bytes([n]) + b";")
    rows = [json.dumps({"file": f"{name}.gif", "caption": name}) for name in names]
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))

    def command(descriptor: int, memory: int) -> list[str]:
        code = FAULTY.format(path=sys.path, descriptor=descriptor, memory=memory)
        return [sys.executable, "-c", code]

    monkeypatch.setattr(child, "_command", command)
    clips = ingest(ClipsConfig(path=str(tmp_path), timeout=2.0), SHAPE, 8.0, tmp_path / "cache")
    assert [item.captions[0] for item in clips.items] == ["a", "good", "z"]
    assert clips.skipped == {"decoder_crash": 1, "decoder_hang": 1, "decoder_oom": 1}
    monkeypatch.undo()
    assert len(ingest(ClipsConfig(path=str(tmp_path)), SHAPE, 8.0, tmp_path / "cache")) == 6  # those are tried again


def test_a_decoder_that_cannot_start_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child, "_command", lambda *_: [sys.executable, "-c", "raise SystemExit('no memory')"])
    with pytest.raises(HostError, match="no memory"), Decoder(1.0, 1.0) as decoder:
        decoder.decode(Path("a.mp4"), (8, 8), 8.0, 1.0)


def test_settings_out_of_range() -> None:
    for bad in ({"max_bad_fraction": 1.5}, {"max_seconds": 0.0}, {"timeout": float("inf")}, {"memory": -1.0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            ClipsConfig(path="x", **bad)


def test_stored_pixels_are_the_decoded_ones(clips: Clips) -> None:
    frames = store.bytes_to_tensors(store.read(clips.items[0].clip).files["clip.safetensors"])["frames"]
    assert frames.dtype == torch.uint8 and frames.shape == (12, 16, 21, 3)
    x, _ = clips.item(0, Shape(frames=12, height=16, width=16), 8.0)
    assert torch.equal(x, to_float(frames[:, :, 2:18]))
