"""Video files as frames and times, by PyAV; what is damaged is refused."""

from __future__ import annotations

import math
import os
import re
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from cascade.media.images import image_kind, image_pixels
from cascade.media.pixels import (
    MAX_BYTES,
    MAX_FRAMES,
    MAX_PIXELS,
    Bytes,
    Unreadable,
    covering,
    fit,
    to_float,
)

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.frame import VideoFrame
    from av.video.stream import VideoStream
    from torch import Tensor

    from cascade.video import Video

T = TypeVar("T")

# Formats that hold their own frames: no playlist, no script, no list of other files.
_FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,ogg,flv,asf"


@dataclass
class Clip:
    """`frames` (F, H, W, 3) uint8 RGB, shown at `times` (seconds, ascending); `fps` is their mean rate."""

    frames: Tensor
    times: list[float]
    fps: float


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

    frames, times, rate = frames_of(path, fps, cover, seconds, max_frames, max_pixels)
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


def frames_of(
    path: Path,
    fps: float | None = None,
    cover: tuple[int, int] | None = None,
    seconds: float | None = None,
    max_frames: int = MAX_FRAMES,
    max_pixels: int = MAX_PIXELS,
) -> tuple[Bytes, list[float], float]:
    """`decode` without torch: frames (F, H, W, 3), times, fps."""
    if image_kind(path):
        return image_pixels(path, max_pixels), [0.0], fps or 1.0
    kept: list[Bytes] = []
    times: list[float] = []
    with _opened(path, max_pixels) as (container, stream):
        for time, frame in _shown(path, container, stream, fps, cover, seconds):
            if len(kept) == max_frames or (len(kept) + 1) * frame.size > MAX_BYTES:
                what = f"{max_frames} frames" if len(kept) == max_frames else f"{MAX_BYTES >> 30} GiB of pixels"
                said = f"more than {what} ({len(kept)} frames of {frame.shape[1]}x{frame.shape[0]} fit)"
                raise Unreadable(path, said, fix="a shorter or a smaller clip")
            kept.append(frame)
            times.append(time)
        if not kept:
            raise Unreadable(path, "no frames")
        return np.stack(kept), times, fps or _rate(stream, times)


def each_frame(path: Path, max_pixels: int) -> Iterator[tuple[float, Bytes]]:
    """(seconds, frame (H, W, 3)) of a video file of any length, one after the other; Unreadable as `decode`."""
    with _opened(path, max_pixels) as (container, stream):
        yield from _shown(path, container, stream)


def _shown(
    path: Path,
    container: InputContainer,
    stream: VideoStream,
    fps: float | None = None,
    cover: tuple[int, int] | None = None,
    seconds: float | None = None,
) -> Iterator[tuple[float, Bytes]]:
    """(seconds, frame (H, W, 3)), all of one size; a frame that is shown again is the same array."""
    source = _decoded(path, container, stream, seconds)
    last: tuple[VideoFrame, Bytes] | None = None
    for time, frame in resampled(source, fps) if fps else source:
        if last is None:
            size = covering(*_display(stream, frame), *cover) if cover else _display(stream, frame)
        elif _display(stream, frame) != _display(stream, last[0]):
            raise Unreadable(path, "the frame size changes")
        if last is None or frame is not last[0]:
            last = frame, _rgb(frame, size)
        yield time, last[1]


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
    avi, last = container.format.name == "avi", None
    slots: deque[int] = (
        deque()
    )  # an AVI says when chunks come, not frames: FFmpeg's guess fails where many are B-frames
    for packet in container.demux(stream):
        packets += packet.size > 0
        if avi and stream.codec_context.name in ("h264", "hevc") and packet.size and packet.dts is not None:
            slots.append(packet.dts)
        for frame in packet.decode():
            if frame.is_corrupt:
                raise Unreadable(path, "damaged")
            pts = slots.popleft() if slots else frame.pts
            now = max(time, 0) + step if pts is None else float(pts * (frame.time_base or 0))
            if now <= time:
                raise Unreadable(path, "times run backwards")
            if math.isinf(time):
                start = time = now
            while avi and last is not None and now - time > 1.5 * step:  # an empty chunk shows the frame before again
                time += step
                if seconds is not None and time - start >= seconds:
                    return
                yield time, last
            if seconds is not None and now - start >= seconds:
                return
            time, gap, last = now, max(gap, now - time), frame
            yield time, frame
    end = time + (step if gap < 1.5 * step else math.inf)  # at a variable rate the last frame may last for long
    if reason := _incomplete(path, container.format.name, stream, packets, end + 0.75 * step):
        raise Unreadable(path, f"truncated: {reason}")


def _incomplete(path: Path, container: str, stream: VideoStream, packets: int, end: float) -> str:
    """What the container promises and does not hold, or nothing; the video goes on until `end` at most."""
    if container == "avi":  # its number of frames counts empty chunks, which no demuxer shows
        return _riff(path)
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


def _riff(path: Path) -> str:
    """Whether one of the RIFF chunks that an AVI is made of ends beyond the file, in words; or nothing."""
    with path.open("rb") as file:
        whole, end = file.seek(0, os.SEEK_END), 0
        while end < whole:
            end = file.seek(end + end % 2)
            head = file.read(8)
            if head[:4] != b"RIFF":
                return ""
            end += 8 + int.from_bytes(head[4:], "little")
    return f"{whole} of {end} bytes" if end > whole else ""


def _display(stream: VideoStream, frame: VideoFrame) -> tuple[int, int]:
    """Height and width as shown: pixels made square, phone videos turned upright."""
    aspect = float(stream.sample_aspect_ratio or 1)
    height, width = frame.height, max(1, round(frame.width * aspect))
    return (width, height) if _turned(frame) else (height, width)


def _turned(frame: VideoFrame) -> bool:
    return round(frame.rotation / 90) % 2 == 1


def subsampled(pixels: Bytes) -> Bytes:
    """Frames (F, H, W, 3) as 4:2:0 in BT.709 holds them: colours at half the size."""
    from av.video.frame import VideoFrame
    from av.video.reformatter import Colorspace

    def one(image: Bytes) -> Bytes:
        frame = VideoFrame.from_ndarray(image, format="rgb24")
        flat = frame.reformat(format="yuv420p", dst_colorspace=Colorspace.ITU709, interpolation=_scaling())
        return _rgb(flat, (frame.height, frame.width))

    return np.stack([one(image) for image in pixels])


def _scaling() -> int:
    from av.video.reformatter import Interpolation as Flag

    return int(Flag.BICUBIC | Flag.ACCURATE_RND | Flag.FULL_CHR_H_INT | Flag.FULL_CHR_H_INP)


def _rgb(frame: VideoFrame, size: tuple[int, int]) -> Bytes:
    """(H, W, 3) of `size`, upright; the scaling filter widens when it shrinks, so it is anti-aliased."""
    height, width = (size[1], size[0]) if _turned(frame) else size
    rgb = frame.reformat(width, height, format="rgb24", interpolation=_scaling()).to_ndarray()
    return np.ascontiguousarray(np.rot90(rgb, round(frame.rotation / 90)), dtype=np.uint8)


def _rate(stream: VideoStream, times: list[float]) -> float:
    """The nominal rate where the times agree with it to 1 %, else the rate of the times themselves."""
    nominal = [float(rate) for rate in (stream.average_rate, stream.guessed_rate) if rate]
    if len(times) == 1:
        return nominal[0] if nominal else 1.0
    measured = (len(times) - 1) / (times[-1] - times[0])
    return next((rate for rate in nominal if abs(rate / measured - 1) < 0.01), measured)
