"""Video and image files in and out: the one module that knows ffmpeg, PyAV, imageio and Pillow.

ffmpeg-python builds the filter graphs that imageio-ffmpeg's binary runs, PyAV decodes, imageio reads and writes images.
A written video is decoded again and compared before anybody sees it. torch is imported where it is used, so that the
decoding child process (`serve`) starts in a fraction of a second.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from cascade.errors import ConfigError, HostError, InputError, NumericError
from cascade.store import write_file

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from torch import Tensor

    from cascade.video import Video

Bytes = NDArray[np.uint8]
T = TypeVar("T")

MAX_FRAMES = 4096
MAX_PIXELS = 2**23  # of one frame; a 4k frame has 0.99 of it
MAX_BYTES = 2**31  # of all frames that are kept
VIDEO_SUFFIXES = (".mp4", ".webm", ".gif")  # what `encode` writes
# Formats that hold their own frames: no playlist, no script, no list of other files.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,ogg,flv,asf"
_IMAGES = {b"\x89PNG\r\n\x1a\n": ".png", b"\xff\xd8\xff": ".jpg"}
_FIX = "pip install --force-reinstall imageio-ffmpeg, or IMAGEIO_FFMPEG_EXE=<path of a working ffmpeg>"
_ROUNDING = 0.006  # s; gif keeps times in 10 ms, webm in 1 ms


class Unreadable(InputError):
    """A file that is no intact video or image; `reason` says why without naming the file."""

    def __init__(self, path: Path, reason: str, what: str = "video") -> None:
        legal = "png, jpeg, webp" if what == "image" else "mp4, webm, mkv, mov, avi, gif, or an image"
        super().__init__(f"{what} {path}: {reason}", fix=f"an intact {what} file ({legal})")
        self.reason = reason


@dataclass
class Clip:
    """`frames` (F, H, W, 3) uint8 RGB, shown at `times` (seconds, ascending); `fps` is their mean rate."""

    frames: Tensor
    times: list[float]
    fps: float


# Writing


def encode(frames: Tensor, fps: float, path: Path) -> None:
    """Writes `frames` (3, F, H, W) in [-1, 1] as mp4, webm or gif, by the suffix of `path`. See `encoded`."""
    data = encoded(frames, fps, path.suffix)
    write_file(path, data)


def encoded(frames: Tensor, fps: float, suffix: str, *, timeout: float | None = None) -> bytes:
    """The file that shows `frames` (3, F, H, W) in [-1, 1] at `fps`; equal input gives equal bytes.

    .mp4 is h264 yuv420p with its index in front, where an odd height or width gains one repeated row or column;
    .webm is vp9, .gif has one palette for the whole clip. The file is decoded and compared with `frames` first.
    Raises ConfigError (container, rate), NumericError (not finite), HostError (ffmpeg missing, failing, lying).
    """
    if suffix not in VIDEO_SUFFIXES:
        raise ConfigError(f"video format {suffix or 'without suffix'!r} is unknown", fix=", ".join(VIDEO_SUFFIXES))
    if not 0 < fps <= (50 if suffix == ".gif" else 1000):
        raise ConfigError(f"fps {fps:g} is out of range for {suffix}", fix="more than 0, at most 50 (gif) or 1000")
    pixels = to_bytes(frames)
    if suffix == ".mp4":
        pixels = np.pad(pixels, ((0, 0), (0, pixels.shape[1] % 2), (0, pixels.shape[2] % 2), (0, 0)), mode="edge")
    rate = Fraction(fps).limit_denominator(1001)
    try:
        with TemporaryDirectory(prefix="cascade-") as folder:
            path = Path(folder, f"video{suffix}")
            _run(_command(pixels.shape, rate, path), pixels, timeout or 60 + pixels.size / 1e5)
            _verify(path, pixels, fps)
            return path.read_bytes()
    except OSError as error:
        raise HostError(f"video {suffix}: {error.strerror or error}", fix=_FIX) from error


def to_bytes(frames: Tensor) -> Bytes:
    """(3, F, H, W) in [-1, 1] -> (F, H, W, 3) uint8, rounded to the nearest. NumericError if a value is not finite."""
    assert frames.ndim == 4 and frames.shape[0] == 3 and frames.numel(), tuple(frames.shape)
    frames = frames.detach().float().cpu()
    if not bool(frames.isfinite().all()):
        raise NumericError("video: some pixels are not finite")
    pixels: Bytes = ((frames + 1) * 127.5).round().clamp(0, 255).byte().permute(1, 2, 3, 0).contiguous().numpy()
    return pixels


def to_float(pixels: Tensor) -> Tensor:
    """(F, H, W, 3) uint8 -> (3, F, H, W) float32 in [-1, 1], the inverse of `to_bytes`."""
    return (pixels.permute(3, 0, 1, 2).float() / 127.5 - 1).contiguous()


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
    its local mean (measured: at most 2.3 of 255 for mp4 and webm on pure noise, 5.4 for gif on a smooth gradient).
    """
    try:
        frames, times, _ = _frames(path, max_frames=len(pixels) + 1, max_pixels=max(MAX_PIXELS, pixels[0].size))
    except Unreadable as error:
        raise HostError(f"ffmpeg wrote a {path.suffix} file that cannot be read: {error.reason}", fix=_FIX) from error
    wrong = ""
    if frames.shape != pixels.shape:
        wrong = "{}x{}x{}".format(*frames.shape) + " instead of {}x{}x{}".format(*pixels.shape)
    elif any(abs(time - times[0] - k / fps) > _ROUNDING for k, time in enumerate(times)):
        wrong = f"frames are not {fps:g} a second"
    else:
        apart = np.abs(_blocks(frames) - _blocks(pixels)).mean(axis=(1, 2, 3))
        if apart.max() > (16 if path.suffix == ".gif" else 8):
            wrong = f"frame {apart.argmax()} differs by {apart.max():.0f} of 255"
    if wrong:
        raise HostError(f"ffmpeg wrote a {path.suffix} file that is not the video: {wrong}", fix=_FIX)


def _blocks(pixels: Bytes) -> NDArray[np.float32]:
    """Means of 8x8 blocks (smaller at the lower and right border), (F, H, W, 3) -> (F, ceil H/8, ceil W/8, 3)."""
    out = pixels.astype(np.float32)
    for axis in (1, 2):
        starts = np.arange(0, pixels.shape[axis], 8)
        sizes = np.diff(np.append(starts, pixels.shape[axis])).astype(np.float32)
        column = sizes.reshape([-1 if a == axis else 1 for a in range(4)])
        out = (np.add.reduceat(out, starts, axis=axis) / column).astype(np.float32)
    return out


# Reading


def decode(
    path: Path,
    *,
    fps: float | None = None,
    cover: tuple[int, int] | None = None,
    seconds: float | None = None,
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_PIXELS,
) -> Clip:
    """Decodes a video file, or an image as a clip of one frame.

    `fps`: keep the frames nearest in time to 0, 1/fps, 2/fps, ...; None keeps all. `cover` (height, width): shrink or
    enlarge while decoding to the smallest size that covers it. `seconds`: read no further. Raises Unreadable for what
    is no video, is damaged as far as the file itself can tell, names other files, or is larger than the limits.
    """
    import torch

    frames, times, rate = _frames(path, fps, cover, seconds, max_frames, max_pixels)
    return Clip(torch.from_numpy(frames), times, rate)


def read_video(path: Path, *, fps: float | None = None, size: tuple[int, int] | None = None) -> Video:
    """A video file as Video (1, 3, F, H, W) at `fps` (default: its own), fitted to `size` (height, width) if given.

    A file with a variable rate is resampled to its mean rate. Raises Unreadable.
    """
    from cascade.video import Video

    clip = decode(path, fps=fps, cover=size)
    frames = clip.frames
    if any(abs(time - clip.times[0] - k / clip.fps) > 0.5 / clip.fps for k, time in enumerate(clip.times)):
        keep = [k for _, k in resampled(zip(clip.times, range(len(frames)), strict=True), clip.fps)]
        frames = frames[keep]
    out = to_float(frames)
    return Video((fit(out, *size) if size else out)[None], clip.fps)


def read_image(path: Path) -> Tensor:
    """A png, jpeg or webp file as (3, H, W) in [-1, 1]; transparent parts become white. Raises Unreadable."""
    import torch

    return to_float(torch.from_numpy(_image(path, MAX_PIXELS)))[:, 0]


def resampled(frames: Iterable[tuple[float, T]], fps: float) -> Iterator[tuple[float, T]]:
    """The frame nearest in time to 0, 1/fps, 2/fps, ... after the first one, up to the last (of two: the earlier).

    Takes and gives (seconds, frame) in ascending order; at the frames' own rate it is the identity, for containers
    round times: a quarter of an interval past the last frame still counts as reached.
    """
    start, count = 0.0, 0
    before: tuple[float, T] | None = None
    for time, frame in frames:
        if before is None:
            start, before = time, (time, frame)
        while (wanted := start + count / fps) <= time:
            yield count / fps, before[1] if wanted - before[0] <= time - wanted else frame
            count += 1
        before = (time, frame)
    while before is not None and start + (count - 0.25) / fps <= before[0]:
        yield count / fps, before[1]
        count += 1


def at_times(clip: Clip, times: Sequence[float]) -> Tensor:
    """The frames (len(times), H, W, 3) of `clip` nearest to `times`, in seconds after its first."""
    own = np.asarray(clip.times) - clip.times[0]
    nearest = np.abs(own[None] - np.asarray(times, dtype=np.float64)[:, None]).argmin(axis=1)
    return clip.frames[nearest.tolist()]


def fit(frames: Tensor, height: int, width: int, at: tuple[float, float] = (0.5, 0.5)) -> Tensor:
    """(A, B, H, W) in [-1, 1] -> (A, B, height, width): resized to cover (anti-aliased), then cropped.

    `at` places the crop: (0, 0) at the upper left, (0.5, 0.5) in the centre, (1, 1) at the lower right.
    """
    from cascade.video import resize

    tall, wide = covering(frames.shape[2], frames.shape[3], height, width)
    out = resize(frames[None], tall, wide)[0]
    top, left = round((tall - height) * at[0]), round((wide - width) * at[1])
    return out[:, :, top : top + height, left : left + width].contiguous()


def covering(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int]:
    """The smallest size with the aspect of height x width that covers to_height x to_width."""
    scale = max(to_height / height, to_width / width)
    return max(to_height, round(height * scale)), max(to_width, round(width * scale))


def _frames(
    path: Path,
    fps: float | None = None,
    cover: tuple[int, int] | None = None,
    seconds: float | None = None,
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Bytes, list[float], float]:
    """`decode` without torch: frames (F, H, W, 3), times, fps."""
    if _image_kind(path):
        return _image(path, max_pixels), [0.0], fps or 1.0
    kept: list[Bytes] = []
    times: list[float] = []
    with _opened(path, max_pixels) as (container, stream):
        source = _decoded(path, container, stream, seconds)
        last = None
        for time, frame in resampled(source, fps) if fps else source:
            if last is None:
                size = covering(*_display(stream, frame), *cover) if cover else _display(stream, frame)
            elif _display(stream, frame) != _display(stream, last):
                raise Unreadable(path, "the frame size changes")
            if len(kept) == max_frames or (len(kept) + 1) * math.prod(size) * 3 > MAX_BYTES:
                raise Unreadable(path, f"more than {len(kept)} frames of {size[1]}x{size[0]}")
            kept.append(kept[-1] if frame is last else _rgb(frame, size))
            times.append(time)
            last = frame
        if not kept:
            raise Unreadable(path, "no frames")
        return np.stack(kept), times, fps or _rate(stream, times)


@contextmanager
def _opened(path: Path, max_pixels: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Opens the first video stream of a local file; every error of the demuxer or decoder becomes Unreadable."""
    import av

    if not path.is_file():
        raise Unreadable(path, "no such file" if not path.exists() else "not a file")
    options = {"protocol_whitelist": "file", "format_whitelist": _FORMATS}
    try:
        with av.open(f"file:{path.absolute()}", options=options, metadata_errors="ignore") as container:
            if not container.streams.video:
                raise Unreadable(path, "no video stream")
            stream = container.streams.video[0]
            if stream.codec_context is None:
                raise Unreadable(path, "unknown codec")
            if stream.width * stream.height > max_pixels:
                raise Unreadable(path, f"more than {max_pixels} pixels a frame")
            stream.thread_count = 1
            # Without `explode` a third of all damaged files decode to something without a word. Decoders count padded
            # frames against max_pixels: it is there for a header that promises less than the stream holds.
            strict = {"err_detect": "crccheck+bitstream+buffer+explode", "max_pixels": str(2 * max_pixels + 2**16)}
            stream.codec_context.options = strict
            yield container, stream
    except av.FFmpegError as error:
        if isinstance(error, MemoryError):
            raise Unreadable(path, "needs too much memory") from error
        raise Unreadable(path, f"unreadable ({error.strerror})") from error


def _decoded(
    path: Path, container: InputContainer, stream: VideoStream, seconds: float | None
) -> Iterator[tuple[float, VideoFrame]]:
    """(seconds, frame) in ascending order, of undamaged frames; Unreadable where the file shows damage."""
    step = 1 / float(stream.average_rate or stream.guessed_rate or 25)
    packets, start, time, gap = 0, 0.0, -math.inf, 0.0
    for packet in container.demux(stream):
        packets += packet.size > 0
        for frame in packet.decode():
            if frame.is_corrupt:
                raise Unreadable(path, "damaged")
            now = max(time, 0) + step if frame.pts is None else float(frame.pts * (frame.time_base or 0))
            if now <= time:
                raise Unreadable(path, "times run backwards")
            if math.isinf(time):
                start = time = now
            if seconds is not None and now - start >= seconds:
                return
            time, gap = now, max(gap, now - time)
            yield time, frame
    end = time + (step if gap < 1.5 * step else math.inf)  # at a variable rate the last frame may last for long
    if reason := _incomplete(path, container.format.name, stream, packets, end + 0.75 * step):
        raise Unreadable(path, f"truncated: {reason}")


def _incomplete(path: Path, container: str, stream: VideoStream, packets: int, end: float) -> str:
    """What the container promises and does not hold, or nothing; the video goes on until `end` at most."""
    if packets < stream.frames:
        return f"{packets} of {stream.frames} frames"
    promised = re.fullmatch(r"(\d+):(\d+):(\d+\.?\d*)", stream.metadata.get("DURATION", ""))  # matroska, webm
    if promised:
        hours, minutes, rest = (float(part) for part in promised.groups())
        if 3600 * hours + 60 * minutes + rest > end:
            return f"ends before {promised[0]}"
    if container == "gif":
        with path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return "" if file.read(1) == b";" else "no end mark"
    return ""


def _display(stream: VideoStream, frame: VideoFrame) -> tuple[int, int]:
    """Height and width as shown: pixels made square, phone videos turned upright."""
    aspect = float(stream.sample_aspect_ratio or 1)
    height, width = frame.height, max(1, round(frame.width * aspect))
    return (width, height) if _turned(frame) else (height, width)


def _turned(frame: VideoFrame) -> bool:
    return round(frame.rotation / 90) % 2 == 1


def _rgb(frame: VideoFrame, size: tuple[int, int]) -> Bytes:
    """(H, W, 3) of `size`, upright; the scaling filter widens when it shrinks, so it is anti-aliased."""
    from av.video.reformatter import Interpolation as Flag

    height, width = (size[1], size[0]) if _turned(frame) else size
    flags = int(Flag.BICUBIC | Flag.ACCURATE_RND | Flag.FULL_CHR_H_INT | Flag.FULL_CHR_H_INP)
    rgb = frame.reformat(width, height, format="rgb24", interpolation=flags).to_ndarray()
    return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)), dtype=np.uint8)


def _rate(stream: VideoStream, times: list[float]) -> float:
    """The nominal rate where the times agree with it to 1 %, else the rate of the times themselves."""
    nominal = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
    if len(times) == 1:
        return nominal[0] if nominal else 1.0
    measured = (len(times) - 1) / (times[-1] - times[0])
    return next((rate for rate in nominal if abs(rate / measured - 1) < 0.01), measured)


def _image_kind(path: Path) -> str:
    """.png, .jpg or .webp by the first bytes of the file, else nothing. Pillow would also run scripts (eps)."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        head = file.read(12)
    if head[:4] == b"RIFF" and head[8:] == b"WEBP":
        return ".webp"
    return next((kind for magic, kind in _IMAGES.items() if head.startswith(magic)), "")


def _image(path: Path, max_pixels: int) -> Bytes:
    """An image file as (1, H, W, 3) uint8, upright, on white."""
    import imageio.v3 as iio
    from PIL.Image import DecompressionBombError, DecompressionBombWarning

    kind = _image_kind(path)
    if not kind:
        raise Unreadable(path, "not a png, jpeg or webp file" if path.is_file() else "no such file", "image")
    try:
        found = iio.improps(path, plugin="pillow", extension=kind, index=0)
        if math.prod(found.shape[:2]) > max_pixels:
            raise Unreadable(path, f"more than {max_pixels} pixels", "image")
        deep = found.dtype == np.uint16
        mode = None if deep else "RGBA"  # Pillow's own conversion of 16-bit grey clips it
        rgba = iio.imread(path, plugin="pillow", extension=kind, index=0, rotate=True, mode=mode)
    except (OSError, SyntaxError, ValueError, DecompressionBombError, DecompressionBombWarning) as error:
        raise Unreadable(path, f"unreadable ({error})", "image") from error
    if deep:
        return np.ascontiguousarray(np.repeat((rgba / 257).round().astype(np.uint8)[None, :, :, None], 3, axis=3))
    alpha = rgba[..., 3:].astype(np.float32) / 255
    return (rgba[..., :3] * alpha + 255 * (1 - alpha)).round().astype(np.uint8)[None]


# Decoding in a child process


def serve(descriptor: int, memory: int) -> None:
    """Answers decode requests on a pipe until it closes: the child of `cascade.data.clips`.

    A request is JSON: path, fps, cover, seconds, cpu (seconds). The answer is JSON: shape, times and rate, and then
    the frames' bytes; or reason. A decoder that crashes, spins or grows beyond `memory` (bytes) ends this process only.
    """
    import resource
    from multiprocessing.connection import Connection

    import av  # noqa: F401  (before the limit, and before the parent's clock runs)

    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe = Connection(descriptor)
    pipe.send_bytes(b"ready")
    while True:
        try:
            request = json.loads(pipe.recv_bytes())
        except EOFError:
            return
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = math.ceil(used.ru_utime + used.ru_stime + request["cpu"])
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        try:
            frames, times, rate = _frames(
                Path(request["path"]), request["fps"], request["cover"], request["seconds"], 2**31
            )
        except Unreadable as error:
            pipe.send_bytes(json.dumps({"reason": error.reason}).encode())
        except MemoryError:
            pipe.send_bytes(json.dumps({"reason": "decoder_oom"}).encode())
        else:
            pipe.send_bytes(json.dumps({"shape": frames.shape, "times": times, "rate": rate}).encode())
            pipe.send_bytes(frames.data.cast("B"))


# Pictures


def png(image: Tensor) -> bytes:
    """(3, H, W) in [-1, 1] -> a png file."""
    return _png(to_bytes(image[:, None])[0])


def sheet(videos: Tensor, captions: Sequence[str] | None = None, columns: int = 8, scale: int | None = None) -> bytes:
    """A png with one row for each of `videos` (B, 3, F, H, W): its caption, below it `columns` frames, evenly spaced.

    Pixels are repeated `scale` times (default: frames are shown about 128 pixels high), so that tiny clips stay sharp.
    """
    from PIL import Image, ImageDraw, ImageFont

    assert captions is None or len(captions) == len(videos), f"{len(videos)} videos, {captions} captions"
    scale = scale or max(1, round(128 / videos.shape[3]))
    strips = [_strip(to_bytes(video), columns, scale) for video in videos]
    width, gap, line = strips[0].shape[1], 4, 16
    font = ImageFont.load_default(12)
    texts = [_wrapped(caption, font.getlength, width) for caption in captions] if captions else [[] for _ in strips]
    height = sum(len(text) * line + strip.shape[0] + gap for text, strip in zip(texts, strips, strict=True))
    page = Image.new("RGB", (width, height), "white")
    draw, top = ImageDraw.Draw(page), 0
    for text, strip in zip(texts, strips, strict=True):
        for words in text:
            draw.text((0, top), words, fill="black", font=font)
            top += line
        page.paste(Image.fromarray(strip), (0, top))
        top += strip.shape[0] + gap
    return _png(np.asarray(page))


def _strip(pixels: Bytes, columns: int, scale: int) -> Bytes:
    """(F, H, W, 3) -> one row of evenly spaced frames, each enlarged `scale` times, two white pixels between."""
    chosen = np.linspace(0, len(pixels) - 1, min(columns, len(pixels))).round().astype(int)
    large = pixels[chosen].repeat(scale, axis=1).repeat(scale, axis=2)
    spaced = np.pad(large, ((0, 0), (0, 0), (0, 2), (0, 0)), constant_values=255)
    return np.concatenate(list(spaced), axis=1)[:, :-2]


def _wrapped(text: str, measure: Any, width: int) -> list[str]:
    """`text` in lines that fit into `width` pixels, by words (a word that is too long stands alone)."""
    words = text.split()
    ends = [0]
    for end in range(1, len(words) + 1):
        if end - ends[-1] > 1 and measure(" ".join(words[ends[-1] : end])) > width:
            ends.append(end - 1)
    return [" ".join(words[a:b]) for a, b in pairwise([*ends, len(words)])]


def _png(pixels: Bytes) -> bytes:
    import imageio.v3 as iio

    data = iio.imwrite("<bytes>", pixels, extension=".png", plugin="pillow")
    assert isinstance(data, bytes)
    return data
