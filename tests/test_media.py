from __future__ import annotations

import math
import os
import stat
import subprocess
import tempfile
from fractions import Fraction
from pathlib import Path

import av
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from cascade.errors import ConfigError, HostError, InputError, NumericError
from cascade.media import (
    Unreadable,
    covering,
    decode,
    encoded,
    fit,
    png,
    read_image,
    read_video,
    resampled,
    sheet,
    to_bytes,
    to_float,
)

REAL = imageio_ffmpeg.get_ffmpeg_exe()


def waves(frames: int = 8, height: int = 48, width: int = 64) -> Tensor:
    """A smooth video (3, F, H, W): what a codec should keep."""
    f, y, x = torch.meshgrid(*(torch.arange(n).float() for n in (frames, height, width)), indexing="ij")
    return torch.stack([2 * x / width - 1, 2 * y / height - 1, torch.sin((x + y + 4 * f) / 20)])


def psnr(a: Tensor, b: Tensor) -> float:
    return -10 * math.log10(max(float((a - b).square().mean()) / 4, 1e-12))


def encode(frames: Tensor, fps: float, path: Path) -> None:
    path.write_bytes(encoded(frames, fps, path.suffix))


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary files go, to see that none is left."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


@pytest.mark.parametrize(("suffix", "least"), [(".mp4", 38), (".webm", 38), (".gif", 20)])
@pytest.mark.parametrize("size", [(48, 64), (63, 65)])
def test_a_video_survives_the_round_trip(tmp_path: Path, suffix: str, least: float, size: tuple[int, int]) -> None:
    x = waves(8, *size)
    encode(x, 8.0, tmp_path / f"a{suffix}")
    video = read_video(tmp_path / f"a{suffix}")
    assert video.fps == 8
    assert psnr(video.frames[0, :, :, : size[0], : size[1]], x) > least
    padded = tuple(n + n % 2 for n in size) if suffix == ".mp4" else size
    assert video.frames.shape == (1, 3, 8, *padded)
    assert [path.name for path in tmp_path.iterdir()] == [f"a{suffix}"]


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
@pytest.mark.parametrize("fps", [0.01, 4, 16, 23.976, 50])
def test_the_rate_and_every_frame_are_kept(tmp_path: Path, suffix: str, fps: float) -> None:
    path = tmp_path / f"a{suffix}"
    encode(waves(6, 16, 16), fps, path)
    clip = decode(path)
    assert clip.fps == pytest.approx(fps, rel=1e-2 if suffix == ".gif" else 1e-5)
    assert clip.times == pytest.approx([k / fps for k in range(6)], abs=6e-3)
    assert read_video(path).shape.frames == 6


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_equal_videos_give_equal_files_and_noise_passes_the_check(suffix: str) -> None:
    x = torch.rand(3, 4, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert encoded(x, 16, suffix) == encoded(x.clone(), 16, suffix)
    for still in (torch.full((3, 5, 16, 16), -1.0), torch.ones(3, 1, 2, 2)):
        assert encoded(still, 16, suffix)
    assert encoded(torch.zeros(3, 99, 8, 8), 0.3333, suffix)  # shown at 1/3


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
@pytest.mark.parametrize("pair", [(0b000, 0b010), (0b001, 0b100), (0b101, 0b010), (0b111, 0b101)])
def test_narrow_stripes_of_pure_colours_pass_the_check(suffix: str, pair: tuple[int, int]) -> None:
    one, other = (torch.tensor([colour >> bit & 1 for bit in (2, 1, 0)]).view(3, 1, 1, 1) * 2.0 - 1 for colour in pair)
    for width in (1, 3):
        assert encoded(torch.where(torch.arange(33) // width % 2 == 0, one, other).expand(3, 2, 31, 33), 4, suffix)


def test_mp4_is_what_browsers_play(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    encode(waves(), 24000 / 1001, path)
    data = path.read_bytes()
    assert 0 < data.index(b"moov") < data.index(b"mdat")
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p"
        assert stream.average_rate == Fraction(24000, 1001) and stream.frames == 8
        assert not any("time" in key for key in container.metadata)


def test_flat_colours_keep_their_hue(tmp_path: Path) -> None:
    colours = torch.tensor([(220, 30, 30), (30, 200, 60), (40, 60, 220), (30, 200, 200), (128, 128, 128)])
    x = to_float(colours.byte().view(5, 1, 1, 3).expand(5, 32, 32, 3))
    for suffix in (".mp4", ".webm"):
        encode(x, 4, tmp_path / f"a{suffix}")
        assert (decode(tmp_path / f"a{suffix}").frames.float().mean(dim=(1, 2)) - colours).abs().max() < 4


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="avi"):
        encode(waves(), 8, tmp_path / "a.avi")
    with pytest.raises(ConfigError, match="gif cannot show 60"):
        encode(waves(), 60, tmp_path / "a.gif")
    with pytest.raises(ConfigError):
        encode(waves(), math.nan, tmp_path / "a.mp4")
    with pytest.raises(ConfigError, match=r"0\.001"):
        encode(waves(), 0.001, tmp_path / "a.mp4")
    with pytest.raises(NumericError):
        encode(waves() / 0, 8, tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


LAST = 'for out; do :; done; out="${out#file:}"\n'
FAKES = {
    "fails": ("echo first >&2; echo 'Unknown encoder' >&2; exit 1", "Unknown encoder"),
    "dies": ("kill -9 $$", "exit status -9"),
    "writes nothing": ("cat >/dev/null", "no such file"),
    "writes an empty file": (LAST + 'cat >/dev/null; : >"$out"', "cannot be read"),
    "truncates": (LAST + f'"{REAL}" "$@"; head -c 900 "$out" >"$out.x"; mv "$out.x" "$out"', "cannot be read"),
    "loses a frame": (LAST + f'"{REAL}" "${{@:1:$#-1}}" -frames:v 7 "file:$out"', "7 frames instead of 8 of 48x64"),
    "shows another video": (LAST + 'cat >/dev/null; cp "${0%/*}/other.mp4" "$out"', "differs by"),
    "confuses colours": (LAST + 'cat >/dev/null; cp "${0%/*}/other.mp4" "$out"', "differs by"),
    "hangs": ("exec sleep 60", "did not finish"),
}
OTHERS = {"shows another video": -waves(), "confuses colours": waves().flip(0)}


@pytest.mark.parametrize("fault", FAKES)
def test_a_faulty_ffmpeg_is_reported(
    fault: str, tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    script, reason = FAKES[fault]
    fake = tmp_path / "ffmpeg"
    fake.write_text(f"#!/bin/bash\n{script}\n")
    if fault in OTHERS:
        encode(OTHERS[fault], 8, tmp_path / "other.mp4")
    fake.chmod(stat.S_IRWXU)
    monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
    with pytest.raises(HostError, match=reason) as caught:
        encoded(waves(), 8, ".mp4", timeout=1 if fault == "hangs" else None)
    assert "IMAGEIO_FFMPEG_EXE" in caught.value.fix
    assert not list(scratch.iterdir())
    assert capfd.readouterr() == ("", "")


def test_an_ffmpeg_that_does_not_start_leaves_nothing(
    tmp_path: Path, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for exe in (tmp_path / "missing", tmp_path):
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(exe))
        with pytest.raises(HostError, match=r"No such file|Permission denied"):
            encoded(waves(), 8, ".mp4")
    assert not list(scratch.iterdir())


def test_ffmpeg_inherits_no_descriptor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "ffmpeg"
    with (tmp_path / "lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)
        fake.write_text(f'#!/bin/bash\n[ -e /proc/$$/fd/{lock.fileno()} ] && exit 9\nexec "{REAL}" "$@"\n')
        fake.chmod(stat.S_IRWXU)
        monkeypatch.setenv("IMAGEIO_FFMPEG_EXE", str(fake))
        assert encoded(waves(), 8, ".gif")


def test_what_is_no_video_is_refused(tmp_path: Path) -> None:
    neighbour = tmp_path / "a.mp4"
    encode(waves(), 8, neighbour)
    bad = {
        "text.mp4": b"hello this is text\n" * 200,
        "empty.mp4": b"",
        "concat.mp4": f"ffconcat version 1.0\nfile '{neighbour}'\n".encode(),
        "relative.mp4": b"ffconcat version 1.0\nfile a.mp4\n",
        "list.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile://{neighbour}\n#EXT-X-ENDLIST\n".encode(),
        "sdp.mp4": b"v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 9 RTP/AVP 98\n",
        "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    }
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=name):
            decode(tmp_path / name)
    for path, reason in ((tmp_path, "not a file"), (tmp_path / "none.mp4", "no such file")):
        with pytest.raises(Unreadable, match=reason):
            read_video(path)


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    data = encoded(waves(), 8, suffix)
    for share in (0.02, 0.4, 0.7, 0.97):
        (tmp_path / "cut").write_bytes(data[: int(share * len(data))])
        with pytest.raises(Unreadable):
            decode(tmp_path / "cut")


AVIS = {  # options of ffmpeg, and which of 40 frames are shown
    "whole": ("-c:v mpeg4", range(40)),
    "gaps": (
        "-vf select='not(mod(n,3))+eq(n,20)' -fps_mode vfr -c:v mpeg4",
        [20 if k == 20 else k - k % 3 for k in range(40)],
    ),
    "B-frames": ("-c:v libx264 -bf 3", range(40)),
    "sound": ("-f lavfi -i sine=duration=2 -c:v mjpeg -pix_fmt yuvj420p -c:a mp3", [0, *range(40)]),
}


@pytest.mark.parametrize("name", AVIS)
def test_an_avi_is_shown_at_its_rate_and_an_empty_chunk_shows_a_frame_again(name: str, tmp_path: Path) -> None:
    source, path, (options, meant) = tmp_path / "a.mp4", tmp_path / "a.avi", AVIS[name]
    encode(waves(40), 24, source)
    quiet = [REAL, "-nostdin", "-loglevel", "error", "-i", source]
    subprocess.run([*quiet, *options.split(), path], check=True)
    clip, whole = decode(path), decode(source).frames.float()
    shown = [int((whole - frame).abs().mean(dim=(1, 2, 3)).argmin()) for frame in clip.frames]
    assert clip.fps == 24 and shown == list(meant)
    assert [time - clip.times[0] for time in clip.times] == pytest.approx([k / 24 for k in range(len(shown))])
    data = path.read_bytes()
    for share in (0.02, 0.4, 0.7, 0.97, 0.9999):
        (tmp_path / "cut").write_bytes(data[: int(share * len(data))])
        with pytest.raises(Unreadable):
            decode(tmp_path / "cut")


def test_flipped_bytes_raise_nothing_but_unreadable(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    seen = 0
    for suffix in (".mp4", ".webm", ".gif"):
        data = np.frombuffer(encoded(waves(4, 16, 16), 8, suffix), np.uint8)
        for _ in range(25):
            broken = data.copy()
            broken[rng.integers(0, len(data), 8)] = rng.integers(0, 256, 8)
            (tmp_path / "broken").write_bytes(broken.tobytes())
            try:
                decode(tmp_path / "broken")
            except Unreadable as error:
                assert error.reason
                seen += 1
    assert seen > 15


def test_size_limits(tmp_path: Path) -> None:
    path = tmp_path / "a.webm"
    encode(waves(8, 32, 32), 8, path)
    for limits in ({"max_frames": 7}, {"max_pixels": 1023}):
        with pytest.raises(Unreadable, match="more than"):
            decode(path, **limits)
    assert len(decode(path, max_frames=8, max_pixels=1024).frames) == 8
    assert decode(path, seconds=0.5).times == [0, 0.125, 0.25, 0.375]
    assert decode(path, cover=(8, 12)).frames.shape == (8, 12, 12, 3)


def test_a_clip_of_any_length_is_read_and_what_is_too_large_is_told_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.mp4"
    encode(torch.zeros(3, 4400, 2, 2), 24, path)
    assert len(decode(path).frames) == 4400
    encode(waves(8), 8, path)
    monkeypatch.setattr("cascade.media.decoding.MAX_BYTES", 7 * 48 * 64 * 3)
    with pytest.raises(Unreadable, match="7 frames of 64x48 fit") as caught:
        decode(path)
    assert caught.value.fix == "a shorter or a smaller clip"
    assert encoded(waves(8), 8, ".mp4"), "what was made is no clip that is given"


def varying(path: Path, times: list[float]) -> None:
    """Writes a lossless video with frame k of grey level 10 k at times[k] seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.width = stream.height = 16
        stream.pix_fmt = "bgr0"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for k, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 10 * k, np.uint8), format="rgb24")
            frame.pts, frame.time_base = round(1000 * time), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def numbers(frames: Tensor) -> list[int]:
    """Which frames of `varying` these are, from (F, H, W, 3)."""
    return (frames[:, 0, 0, 0] // 10).tolist()


def test_frames_are_picked_by_time_not_index(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.15, 0.5, 0.52, 0.9, 1.0]
    varying(tmp_path / "a.mkv", times)
    clip = decode(tmp_path / "a.mkv")
    assert clip.times == times and clip.fps == pytest.approx(6)
    wanted = [0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6]  # 0.0, 0.1, ... 1.0
    picked = decode(tmp_path / "a.mkv", fps=10)
    assert numbers(picked.frames) == wanted and picked.fps == 10
    assert numbers(to_video := torch.from_numpy(to_bytes(read_video(tmp_path / "a.mkv", fps=10).frames[0]))) == wanted
    assert to_video.shape == (11, 16, 16, 3)
    assert read_video(tmp_path / "a.mkv").shape.frames == 7  # at its mean rate, 6 fps


def test_resampled_takes_the_nearest_and_is_the_identity_at_the_own_rate() -> None:
    for fps in (4, 8, 16, 23.976, 25, 60):
        for digits in (2, 3):
            frames = [(round(7 + k / fps, digits), k) for k in range(40)]
            assert [k for _, k in resampled(frames, fps)] == list(range(40))
    assert [k for _, k in resampled([(k / 8, k) for k in range(8)], 4)] == [0, 2, 4, 6]
    assert [k for _, k in resampled([(k / 4, k) for k in range(3)], 8)] == [0, 0, 1, 1, 2]
    rng = np.random.default_rng(1)
    own = np.cumsum(rng.uniform(0.01, 0.3, 30))
    picked = list(resampled(zip(own.tolist(), range(30), strict=True), 9.0))
    for time, k in picked:
        assert k == np.abs(own - own[0] - time).argmin()
    assert [time for time, _ in picked] == [k / 9.0 for k in range(len(picked))]
    assert own[-1] - own[0] - picked[-1][0] <= 1 / 9


def test_turned_and_stretched_videos_are_shown_as_players_show_them(tmp_path: Path) -> None:
    encode(waves(2, 32, 48), 8, tmp_path / "a.mp4")
    quiet = [REAL, "-nostdin", "-loglevel", "error"]
    for angle in ("90", "180", "-90"):
        turned = tmp_path / f"turned{angle}.mp4"
        subprocess.run([*quiet, "-display_rotation", angle, "-i", tmp_path / "a.mp4", "-c", "copy", turned], check=True)
        shown = subprocess.run(
            [*quiet, "-i", turned, "-f", "rawvideo", "-pix_fmt", "rgb24", "-"], check=True, capture_output=True
        ).stdout
        frames = decode(turned).frames
        truth = np.frombuffer(shown, np.uint8).reshape(frames.shape)
        assert np.abs(frames.numpy().astype(float) - truth).mean() < 5
    wide = tmp_path / "wide.mp4"
    subprocess.run([*quiet, "-i", tmp_path / "a.mp4", "-vf", "setsar=2/1", wide], check=True)
    assert decode(wide).frames.shape == (2, 32, 96, 3)


def test_images(tmp_path: Path) -> None:
    x = to_float(torch.randint(0, 256, (1, 9, 7, 3), dtype=torch.uint8))[:, 0]
    path = tmp_path / "a.png"
    path.write_bytes(png(x))
    assert torch.equal(read_image(path), x)
    clip = decode(path)
    assert clip.frames.shape == (1, 9, 7, 3) and clip.times == [0.0]
    assert read_video(path, size=(4, 4)).frames.shape == (1, 3, 1, 4, 4)
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "a.jpg", quality=95)
    Image.new("RGBA", (5, 4), (0, 0, 0, 0)).save(tmp_path / "clear.webp", lossless=True)
    Image.fromarray(np.full((4, 5), 32768, np.uint16)).save(tmp_path / "deep.png")
    assert read_image(tmp_path / "a.jpg").shape == (3, 30, 40)
    assert (read_image(tmp_path / "clear.webp") == 1).all()
    assert read_image(tmp_path / "deep.png").abs().max() < 0.01
    path.write_bytes(png(x)[:-40])
    for broken in (path, tmp_path / "none.png"):
        with pytest.raises(Unreadable):
            read_image(broken)


def test_fit_covers_and_crops() -> None:
    frames = to_float(torch.randint(0, 256, (2, 12, 20, 3), dtype=torch.uint8))
    assert torch.equal(fit(frames, 12, 20), frames)
    assert torch.equal(fit(frames, 12, 10), frames[..., 5:15])
    assert torch.equal(fit(frames, 12, 10, (0, 1)), frames[..., 10:])
    for size in ((6, 6), (30, 7), (5, 33)):
        assert fit(frames, *size).shape == (3, 2, *size)
        assert fit(torch.full_like(frames, -0.6), *size).sub(-0.6).abs().max() < 1e-5
    assert covering(720, 1280, 64, 64) == (64, 114) and covering(10, 30, 20, 20) == (20, 60)


def test_bytes_and_floats_are_inverse() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert np.array_equal(to_bytes(to_float(every)), every.numpy())
    assert to_bytes(torch.tensor([-9.0, 9.0, 0.0]).view(3, 1, 1, 1)).tolist() == [[[[0, 255, 128]]]]


def test_sheet_shows_every_video_sharp(tmp_path: Path) -> None:
    videos = torch.stack([waves(16, 8, 8), -waves(16, 8, 8)])
    captions = ["a red circle moves left", "word " * 60]
    data = sheet(videos, captions, columns=4, scale=5)
    assert data == sheet(videos.clone(), captions, columns=4, scale=5)
    (tmp_path / "sheet.png").write_bytes(data)
    page = torch.from_numpy(to_bytes(read_image(tmp_path / "sheet.png")[:, None])[0])
    assert page.shape[1] == 4 * 40 + 3 * 2
    pixels = torch.from_numpy(to_bytes(videos[0]))
    for column, frame in enumerate((0, 5, 10, 15)):
        tile = page[16:56, 42 * column : 42 * column + 40]
        assert torch.equal(tile[2::5, 2::5], pixels[frame])
    assert (page[:16] < 128).any() and (page[56:60] == 255).all()
    (tmp_path / "plain.png").write_bytes(sheet(videos[:, :, :3]))
    assert read_image(tmp_path / "plain.png").shape == (3, 2 * (128 + 4), 3 * 128 + 2 * 2)
