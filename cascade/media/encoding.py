"""Videos as files: ffmpeg-python builds the filter graphs that imageio-ffmpeg's binary runs.

What was encoded is decoded again and compared before anybody sees it.
"""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from cascade.errors import ConfigError, HostError
from cascade.media.decoding import each_frame, subsampled
from cascade.media.pixels import MAX_PIXELS, RATES, Bytes, Unreadable, to_bytes

if TYPE_CHECKING:
    from torch import Tensor

HIGHEST = {".mp4": RATES[1], ".webm": RATES[1], ".gif": 50.0}  # frames a second; gif's times are whole 10 ms
VIDEO_SUFFIXES = tuple(HIGHEST)  # what `encoded` makes
_FIX = "pip install --force-reinstall imageio-ffmpeg, or IMAGEIO_FFMPEG_EXE=<path of a working ffmpeg>"
_ROUNDING = 0.006  # s; gif keeps times in 10 ms, webm in 1 ms


def encoded(frames: Tensor, fps: float, suffix: str, *, timeout: float | None = None) -> bytes:
    """The file that shows `frames` (3, F, H, W) in [-1, 1] at `fps`; equal input gives equal bytes.

    .mp4 is h264 yuv420p with its index in front, where an odd height or width gains one repeated row or column;
    .webm is vp9, .gif has one palette for the whole clip. The file is decoded and compared with `frames` first.
    Raises ConfigError (container, rate), NumericError (not finite), HostError (ffmpeg missing, failing, lying).
    """
    check_rate(suffix, fps)
    pixels = to_bytes(frames)
    if suffix == ".mp4":
        pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), mode="edge")
    rate = Fraction(fps).limit_denominator(1001)
    try:
        with TemporaryDirectory(prefix="cascade-") as folder:
            path = Path(folder, f"video{suffix}")
            _run(_command(pixels.shape, rate, path), pixels, timeout or 60 + pixels.size / 1e5)
            _verify(path, pixels, float(rate))
            return path.read_bytes()
    except OSError as error:
        raise HostError(f"video {suffix}: {error.strerror or error}", fix=_FIX) from error


def check_rate(suffix: str, fps: float) -> None:
    """ConfigError for a format that `encoded` does not make, or that cannot show `fps`."""
    if suffix not in HIGHEST:
        raise ConfigError(f"video format {suffix or 'without suffix'!r} is unknown", fix=", ".join(HIGHEST))
    if not RATES[0] <= fps <= HIGHEST[suffix]:
        raise ConfigError(
            f"{suffix} cannot show {fps:g} frames a second",
            fix=f"{RATES[0]:g} to {HIGHEST[suffix]:g}, or another format",
        )


def _command(shape: Sequence[int], rate: Fraction, path: Path) -> list[str]:
    """The argv that reads raw rgb24 frames of `shape` (F, H, W, 3) from stdin and writes `path`."""
    import ffmpeg
    import imageio_ffmpeg

    try:
        exe = imageio_ffmpeg.get_ffmpeg_exe()
    except RuntimeError as error:
        raise HostError(f"ffmpeg: {error}", fix=_FIX) from error
    raw = ffmpeg.input("pipe:", format="rawvideo", pix_fmt="rgb24", s=f"{shape[2]}x{shape[1]}", framerate=str(rate))
    # bitexact keeps dates, random ids and versions out of the file; x264 writes other bytes with more threads.
    options: dict[str, Any] = {"fflags": "+bitexact", "flags:v": "+bitexact", "threads": 1, "fps_mode": "passthrough"}
    if path.suffix == ".gif":
        twice = raw.split()
        palette = twice[0].filter("palettegen", stats_mode="full")
        graph = ffmpeg.filter([twice[1], palette], "paletteuse", dither="sierra2_4a")
        options["loop"] = 0
    else:
        quality = "bicubic+accurate_rnd+full_chroma_int+full_chroma_inp"
        graph = raw.filter("scale", out_color_matrix="bt709", out_range="limited", flags=quality)
        options |= dict.fromkeys(("colorspace", "color_primaries", "color_trc"), "bt709")
        options |= {"color_range": "tv", "pix_fmt": "yuv420p"}
        if path.suffix == ".mp4":
            options |= {"vcodec": "libx264", "preset": "medium", "crf": 14, "movflags": "+faststart"}
        else:
            options |= {"vcodec": "libvpx-vp9", "deadline": "good", "cpu-used": 2, "crf": 18, "b:v": 0}
    output = graph.output(f"file:{path}", **options)
    return [exe, "-nostdin", "-hide_banner", "-loglevel", "error", "-y", *map(str, ffmpeg.get_args(output))]


def _run(command: list[str], pixels: Bytes, timeout: float) -> None:
    """Runs ffmpeg outside our process group, so that Ctrl-C is ours to handle; HostError says why it failed."""
    try:
        done = subprocess.run(
            command, input=pixels.tobytes(), capture_output=True, timeout=timeout, start_new_session=True, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise HostError(f"ffmpeg {command[0]}: did not finish within {timeout:.0f} s", fix=_FIX) from error
    except OSError as error:
        raise HostError(f"ffmpeg {command[0]}: {error.strerror}", fix=_FIX) from error
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["it said nothing"]
        raise HostError(f"ffmpeg {command[0]}: exit status {done.returncode}: {lines[-1]}", fix=_FIX)


def _verify(path: Path, pixels: Bytes, fps: float) -> None:
    """HostError unless `path` shows `pixels` (F, H, W, 3): count, size, times, and each frame's mean error.

    Frames are compared as means of 8x8 blocks: no codec keeps the noise of an untrained model pixel by pixel, all keep
    its local mean, of colours as far as 4:2:0 holds them (measured, of 255: at most 14 for mp4, 2 for webm on narrow
    stripes of pure colours, 5.4 for gif on a smooth gradient).
    """
    try:
        wrong = _wrong(path, pixels, fps)
    except Unreadable as error:
        raise HostError(f"ffmpeg wrote a {path.suffix} file that cannot be read: {error.reason}", fix=_FIX) from error
    if wrong:
        raise HostError(f"ffmpeg wrote a {path.suffix} file that is not the video: {wrong}", fix=_FIX)


def _wrong(path: Path, pixels: Bytes, fps: float) -> str:
    """The first difference of `path` from `pixels` in words, or nothing; one decoded frame is held at a time."""
    meant = "instead of {} of {}x{}".format(*pixels.shape)
    count, start = 0, 0.0
    for time, frame in each_frame(path, max(MAX_PIXELS, pixels[0].size)):
        start = start if count else time
        if count == len(pixels) or frame.shape != pixels.shape[1:]:
            return f"{count + 1} or more frames of {frame.shape[0]}x{frame.shape[1]} {meant}"
        if abs(time - start - count / fps) > _ROUNDING:
            return f"frames are not {fps:g} a second"
        own = pixels[count : count + 1]
        apart = np.abs(_blocks(frame[None]) - _blocks(own if path.suffix == ".gif" else subsampled(own))).mean()
        if apart > 16:
            return f"frame {count} differs by {apart:.0f} of 255"
        count += 1
    return "" if count == len(pixels) else f"{count} frames {meant}"


def _blocks(pixels: Bytes) -> NDArray[np.float32]:
    """Means of 8x8 blocks (smaller at the lower and right border), (F, H, W, 3) -> (F, ceil H/8, ceil W/8, 3)."""
    out = pixels.astype(np.float32)
    for axis in (1, 2):
        starts = np.arange(0, pixels.shape[axis], 8)
        sizes = np.diff(np.append(starts, pixels.shape[axis])).astype(np.float32)
        column = sizes.reshape([-1 if a == axis else 1 for a in range(4)])
        out = (np.add.reduceat(out, starts, axis=axis) / column).astype(np.float32)
    return out
