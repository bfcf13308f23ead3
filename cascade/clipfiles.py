"""Clips without loss: as bytes, as files, and as the artefacts of a chain's stages."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from cascade import media, store
from cascade.errors import InputError
from cascade.video import Video

VIDEO = "video.safetensors"
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)  # of a clip
SLACK = 0.01  # beyond [-1, 1], for what rounds
Clip = Video | Path | None  # in memory, or the artefact that holds it


def video_bytes(video: Video) -> bytes:
    """A lossless clip: float32 (C, F, H, W) in [-1, 1] and its fps."""
    frames = video.frames[0].to("cpu", torch.float32).contiguous()
    return store.tensors_to_bytes({"video": frames}, metadata=("fps", repr(float(video.fps))))


def read_clip(data: bytes, where: str, colours: int | None = None) -> Video:
    """The inverse of `video_bytes`, of so many colours if they are said; InputError for anything else."""
    frames, said = store.bytes_to_tensors(data, where).get("video"), store.metadata(data).get("fps", "")
    fix = "a file that `out` made"
    if frames is None or frames.ndim != 4 or not frames.numel() or frames.dtype not in FLOATS:
        raise InputError(f"{where}: is not a clip (a tensor `video` (C, F, H, W) of floats)", fix)
    if colours not in (None, len(frames)):
        raise InputError(f"{where}: has {len(frames)} colours, expected {colours}", fix)
    frames = frames.float()
    low, high = (float(value) for value in frames.aminmax())
    if not (low >= -1 - SLACK and high <= 1 + SLACK):  # so that NaN is refused
        raise InputError(f"{where}: has values from {low:g} to {high:g}, expected -1 to 1", fix)
    try:
        fps = float(said)
    except ValueError:
        fps = 0.0
    if not media.RATES[0] <= fps <= media.RATES[1]:
        raise InputError(f"{where}: its fps is {said!r}, expected {media.RATES[0]:g} to {media.RATES[1]:g}", fix)
    return Video(frames[None], fps)


class Clips(Mapping[Path, Video]):
    """Clips by the directories of their jobs; one that is an artefact is read each time it is asked for."""

    def __init__(self, clips: Mapping[Path, Clip]) -> None:
        self._clips = {path: clip for path, clip in clips.items() if clip is not None}

    def __getitem__(self, path: Path) -> Video:
        clip = self._clips[path]
        return stage_clip(clip) if isinstance(clip, Path) else clip

    def __iter__(self) -> Iterator[Path]:
        return iter(self._clips)

    def __len__(self) -> int:
        return len(self._clips)


def stage_clip(folder: Path) -> Video:
    """The clip of a stage's artefact. InputError if it is damaged."""
    return read_clip(store.member(folder, VIDEO, "stage"), str(folder / VIDEO))


def finished(folder: Path, key: str) -> tuple[Path, str] | None:
    """`folder` and the hash of its clip, if it is the one of `key` and whole."""
    try:
        if not folder.is_dir() or store.manifest(folder, "stage")["meta"].get("key") != key:
            return None
        data = store.read(folder, "stage").files[VIDEO]
    except InputError:
        return None
    return folder, hashlib.sha256(data).hexdigest()


def commit_stage(folder: Path, video: Video, key: str, preview: bool) -> str:
    """Writes a stage's clip (and a small mp4 to look at, if asked); returns its hash."""
    data = video_bytes(video)
    files = {VIDEO: data}
    if preview:
        files["preview.mp4"] = media.encoded(video.frames[0], video.fps, ".mp4")
    store.commit(
        folder, files, kind="stage", meta={"key": key, "shape": str(video.shape), "fps": video.fps}, replace=True
    )
    return hashlib.sha256(data).hexdigest()


def digest(video: Video | None) -> str:
    """Hash of a clip; of none: the empty string."""
    if video is None:
        return ""
    known = b"" if video.known is None else video.known.to("cpu", torch.uint8).contiguous().numpy().tobytes()
    return hashlib.sha256(video_bytes(video) + known).hexdigest()
