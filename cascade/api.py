"""`Cascade`: a chain in Python, called by the names and meanings of diffusers' video pipelines.

    pipe = Cascade.from_pretrained("tiny")
    out = pipe("a large red circle moves left on a black background", generator=torch.Generator().manual_seed(0))
    out.frames[0]   # (F, H, W, 3) in [0, 1]: the frames that `cascade generate` makes of this prompt and seed

Nothing is written to disk unless asked. What differs from diffusers does so for the sake of equal results: a generator
gives its initial seed and nothing is drawn from it, so the same call makes the same videos again (None is seed 0), and
the k-th video of a prompt is the same whatever else is asked for beside it. The time of a step is t in [0, 1].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cascade import checkpoint, export
from cascade.arguments import Known, by_stage, clips_for, jobs_for, negative_of, seeded
from cascade.chain import Chain, Device, chain_settings
from cascade.config import package_root
from cascade.errors import ConfigError
from cascade.frames import OUTPUTS, Frames, to_frames
from cascade.loading import Load, Loaded, load_stage, told_weight
from cascade.pipeline import Runner
from cascade.request import Job, bars
from cascade.settings import Rule, StageConfig
from cascade.text import TextSource, text_source
from cascade.video import Video

Callback = Callable[[Any, int, float, dict[str, Any]], dict[str, Any]]
TENSORS = ("latents",)  # what a callback may ask for


class Output(NamedTuple):
    """What a pipeline returns: `frames` as asked for, (B, F, H, W, 3) if nothing was; `fps`; and the same as a `video`
    (B, 3, F, H, W) in [-1, 1], without loss, which the next stage takes."""

    frames: Frames
    fps: float
    video: Video


@dataclass
class Parts:
    """What a chain and the chains cut from it load once and share."""

    text: Callable[[], TextSource]
    load: Load
    offload: bool = False  # stages wait on the CPU for their turn
    _stages: dict[tuple[str, str, torch.dtype], Loaded] = field(default_factory=dict)

    @cached_property
    def source(self) -> TextSource:
        return self.text()

    def stage(self, cfg: StageConfig, rule: Rule, device: torch.device, dtype: torch.dtype = torch.float32) -> Loaded:
        """A `loading.Load` that reads a stage's weights once; its settings become `cfg`. Raises ConfigError."""
        weights = cfg.weights or ""
        if weights not in ("", checkpoint.RANDOM):
            weights = str(checkpoint.locate(weights, cfg.name, cfg.sampler.steps))
        key = cfg.name, weights, dtype
        if key not in self._stages:
            for same in [one for one in self._stages if one[:2] == key[:2]]:
                del self._stages[same]  # a stage is in memory in one precision
            self._stages[key] = self.load(cfg, rule, device, dtype)
        stage, digest = self._stages[key]
        stage.cfg = told_weight(cfg, stage.cfg.w_range)
        for other, _ in self._stages.values() if self.offload else ():
            if other is not stage:
                other.to(torch.device("cpu"))
        return stage.to(device), digest


class Cascade:
    """A chain of stages, or a part of one, that makes videos in memory.

    It is on the CPU until `to` moves it. Weights are read when they are first needed, but must be there before.
    """

    def __init__(self, chain: Chain, parts: Parts | None = None, on: Device | None = None) -> None:
        self.chain = chain
        self.parts = parts or Parts(partial(text_source, chain.text), load_stage)
        self.on = on or Device(device="cpu")
        self._quiet = False

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        *settings: str,
        torch_dtype: torch.dtype = torch.float32,
        micro_batch: int = 1,
        config_dir: Path | None = None,
    ) -> Cascade:
        """The chain `name` of conf/chain (or of `config_dir`), with `settings` as a command takes them, such as
        "base.sampler.steps=16"; or the folder that `save_pretrained` or `cascade export` wrote.

        `micro_batch` videos are made at once: more is faster on a GPU and changes the last bits. Raises ConfigError,
        InputError.
        """
        roots = [package_root() / "conf", *([config_dir] if config_dir is not None else [])]
        plain = isinstance(name, str) and re.fullmatch(r"[\w-]+", name)
        if plain and any((root / "chain" / f"{name}.yaml").is_file() for root in roots):
            chain = Chain.read(chain_settings(str(name), settings, config_dir))
        elif settings:
            raise ConfigError(f"{name}: settings are for a chain of conf/chain", fix="the folder alone, or a chain")
        elif Path(name).is_dir():
            chain = export.read(Path(name))
        else:
            raise ConfigError(f"{name}: is neither a chain of conf/chain nor a folder", fix="`cascade list`")
        chain.check_weights()
        return cls(chain, on=Device(device="cpu", micro_batch=micro_batch)).to(torch_dtype)

    def save_pretrained(self, save_directory: str | Path, safe_serialization: bool = True) -> None:
        """Writes the chain as a folder that `from_pretrained` and diffusers load, whole or not at all."""
        export.check_safe(safe_serialization)

        def here(cfg: StageConfig, rule: Rule, device: torch.device, dtype: torch.dtype) -> Loaded:
            return self.parts.stage(cfg, rule, self.device, dtype)

        export.write(self.chain, Path(save_directory), here)

    # moving and cutting ----------------------------------------------------------------------------------------------

    def to(
        self,
        *args: str | torch.device | torch.dtype,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> Cascade:
        """Moves it to a device, or has its networks run in another precision. HostError: no such device."""
        for arg in (*args, device, dtype):
            if isinstance(arg, torch.dtype):
                self.on = replace(self.on, dtype=str(arg).removeprefix("torch."))
            elif arg is not None:
                self.on = replace(self.on, device=str(arg))
        self.on.torch  # noqa: B018  no such device: now, not at the first call
        return self

    @property
    def device(self) -> torch.device:
        return self.on.torch

    @property
    def dtype(self) -> torch.dtype:
        found: torch.dtype = getattr(torch, self.on.dtype)
        return found

    def enable_model_cpu_offload(self, gpu_id: int | None = None, device: str | torch.device | None = None) -> None:
        """Only the stage at work is on the device, the others wait on the CPU.

        `device` or GPU `gpu_id` if one is said; else the one that it was moved to, or the GPU, if there is one.
        """
        place = torch.device("cuda" if device is None else device)
        if gpu_id is not None and (place.type != "cuda" or place.index not in (None, gpu_id)):
            raise ValueError(f"gpu_id is {gpu_id} and device {device}, expected one of them")
        if gpu_id is not None:
            place = torch.device("cuda", gpu_id)
        if device is not None or gpu_id is not None or (self.device.type == "cpu" and torch.cuda.is_available()):
            self.to(place)
        self.parts.offload = True

    def set_progress_bar_config(self, disable: bool = False) -> None:
        """Whether a bar a stage is shown on stderr."""
        self._quiet = disable

    @property
    def stages(self) -> dict[str, Cascade]:
        """Every stage as a pipeline of its own, sharing what is loaded: `pipe.stages["ssr1"](prompt, video=clip)`."""
        chain = self.chain
        alone = [Chain([cfg], [rule], chain.text) for cfg, rule in zip(chain.stages, chain.rules, strict=True)]
        return {part.stages[0].name: self._cut(part) for part in alone}

    def since(self, start: str) -> Cascade:
        """The chain from stage `start` on: `pipe.since("ssr1")(prompt, video=clip)`. ConfigError: no such stage."""
        return self._cut(self.chain.since(start))

    def _cut(self, chain: Chain) -> Cascade:
        cut = Cascade(chain, self.parts, self.on)
        cut.set_progress_bar_config(self._quiet)
        return cut

    # making videos ---------------------------------------------------------------------------------------------------

    def __call__(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | None = None,
        *,
        image: Any = None,
        last_image: Any = None,
        video: Any = None,
        mask: Any = None,
        num_frames: int | None = None,
        num_inference_steps: int | Mapping[str, int] | None = None,
        guidance_scale: float | Mapping[str, float] | None = None,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        output_type: str = "np",
        return_dict: bool = True,
        callback_on_step_end: Callback | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = TENSORS,
    ) -> Output | tuple[Frames]:
        """Videos of one prompt or several, `num_videos_per_prompt` of each in turn.

        - `image` becomes the first frame of the first stage, `last_image` its last one: a picture of any size or a
          file, one for all or one for each prompt.
        - `video` is the clip that goes on, or, for a stage that is given a video, that video: a `Video` (such as
          `out.video`, without loss), what `out.frames` is (at the rate that the stage has, or takes), or a file; one
          for all, or one for each prompt. Where `mask` (a picture, a clip as long, or a file) is white it is made anew.
        - `num_frames` of the video: more than the chain's need a first stage with windows (`windows.rule=extend`).
        - `num_inference_steps`: for every stage, or {stage: steps}; `guidance_scale`, which is 1 + w (none at 1
          and below): for every stage that is guided, or {stage: scale}. Without them the settings count.
        - `generator`: one for all, or a list of one for each video, which then is what it makes alone.
        - `callback_on_step_end(pipe, step, t, kwargs)` runs after each step of each stage: kwargs holds "latents"
          (b, C, F, H, W), "stage" and "videos", where those b stand in the result; its "latents" go on.
        - `output_type`: "np", "pt" or "pil", see `frames.to_frames`. With `return_dict=False` the result is (frames,).

        Raises ValueError for an argument that is none of these, and what the commands raise (cascade/errors.py).
        """
        if output_type not in OUTPUTS:
            raise ValueError(f"output_type is {output_type!r}, expected {', '.join(OUTPUTS)}")
        if not set(callback_on_step_end_tensor_inputs) <= set(TENSORS):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs is {[*callback_on_step_end_tensor_inputs]}, expected {[*TENSORS]}"
            )
        chain = self._set(num_inference_steps, guidance_scale)
        jobs = seeded(jobs_for(prompt, num_videos_per_prompt), generator)
        given = Known(image, last_image, video, mask, num_frames)
        clips = clips_for(chain, len(jobs), num_videos_per_prompt, given)
        negative, load = negative_of(negative_prompt), self.parts.stage
        runner = Runner(chain, self.parts.source, self.on, negative=negative, load=load, disk=False)
        if callback_on_step_end is not None:
            runner.after = self._after(callback_on_step_end, jobs, callback_on_step_end_tensor_inputs)
        with nullcontext() if self._quiet else bars() as runner.progress:
            videos = list(runner.run(jobs, clips).values())
        made = Video(torch.cat([one.frames for one in videos]), videos[0].fps)
        frames = to_frames(made.frames, output_type)
        return Output(frames, made.fps, made) if return_dict else (frames,)

    def _set(self, steps: int | Mapping[str, int] | None, scale: float | Mapping[str, float] | None) -> Chain:
        """The chain with the steps and guidance of one call."""
        stages = {cfg.name: cfg for cfg in self.chain.stages}
        guided = [name for name, cfg in stages.items() if cfg.sampler.guidance > 0]
        off = scale is None or (isinstance(scale, int | float) and scale <= 1)
        if not guided and not off and not isinstance(scale, Mapping):
            raise ValueError(f"guidance_scale is {scale}, but no stage is guided: expected {{stage: scale}}")
        for name, count in by_stage("num_inference_steps", steps, int, 1, [*stages], [*stages]).items():
            stages[name] = replace(stages[name], sampler=replace(stages[name].sampler, steps=count))
        for name, value in by_stage("guidance_scale", scale, float, 0, guided, [*stages]).items():
            stages[name] = replace(stages[name], sampler=replace(stages[name].sampler, guidance=max(value - 1, 0)))
        return Chain([*stages.values()], self.chain.rules, self.chain.text)

    def _after(
        self, callback: Callback, jobs: Sequence[Job], names: Sequence[str]
    ) -> Callable[[str, Sequence[Job], int, float, Tensor], Tensor]:
        """diffusers' callback as the runner has it."""

        def after(stage: str, now: Sequence[Job], step: int, t: float, z: Tensor) -> Tensor:
            told = {"stage": stage, "videos": [jobs.index(job) for job in now]}
            latents: Tensor = callback(self, step, t, told | dict.fromkeys(names, z)).get("latents", z)
            if latents.shape != z.shape:
                raise ValueError(f"{stage}: the callback's latents are {[*latents.shape]}, expected {[*z.shape]}")
            return latents.to(z)

        return after
