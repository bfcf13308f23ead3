"""How a stage makes a video: one run of the sampler, or a run for each of the windows that are clips of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cascade.cond import Cond
from cascade.errors import ConfigError
from cascade.noise import Draw, Shared, generator
from cascade.sampling.guidance import Denoise, Hook, keep_known, reconstruction
from cascade.sampling.sampler import After, Sampler, StepDenoise, sample
from cascade.text import Text
from cascade.video import Shape, Video
from cascade.windows import Join, extended

if TYPE_CHECKING:
    from cascade.stage import Stage


@dataclass(frozen=True)
class Run:
    """What a stage is asked for beside its input; see `Stage.sample`."""

    text: Text
    negative: Text | None
    noise: Draw
    progress: Callable[[int], None] | None = None
    start: tuple[Video, float] | None = None
    after: After | None = None


@torch.no_grad()
def make(stage: Stage, low: Video | None, run: Run) -> Video:
    """A video from the one before, as the stage's windows say."""
    windows = stage.cfg.windows
    if stage.cfg.sampler.shared_noise:  # before a window takes its part of it
        run = replace(run, noise=Shared(run.noise))
    if not windows.in_turn:
        return once(stage, low, run)
    if windows.rule is Join.EXTEND:
        return extend(stage, low, run)
    if low is None:
        raise ConfigError(
            f"{stage.cfg.name}: windows.rule is {windows.rule.value}, which needs an incoming video",
            fix=f"{stage.cfg.name}.windows.rule=blend",
        )
    return in_turn(stage, low, run)


def in_turn(stage: Stage, low: Video, run: Run) -> Video:
    """Windows that are clips of their own, one after the other."""
    cfg, rate, steps = stage.cfg, stage.rule.rate(stage.cfg), stage.cfg.sampler.steps
    shape, step = stage.made(low), 1 if low.known is not None else rate  # frames of the output for each of `low`
    out = stage.rule.condition(low, cfg, shape)[0].cpu().clone()
    spans = cfg.windows.spans(shape.frames, rate)
    for number, (first, end) in enumerate(spans):
        part = slice(first // step, -(-end // step))
        given, known = low.frames[:, :, part].clone(), None if low.known is None else low.known[:, part].clone()
        if cfg.windows.rule is Join.CHAINED and first > 0:
            given[:, :, 0] = out[:, :, first]
            if known is not None:
                known[:, 0] = True

        def tick(done: int, number: int = number) -> None:
            if run.progress is not None:
                run.progress((number * steps + done) // len(spans))

        noise = run.noise if cfg.windows.same_noise else run.noise.window(first)
        window = replace(run, noise=noise, progress=tick, start=None)
        out[:, :, first:end] = once(stage, Video(given, low.fps, known), window).frames
    return Video(out, low.fps * step)


def extend(stage: Stage, low: Video | None, run: Run) -> Video:
    """Windows each of which knows what is given and what the ones before have made."""
    cfg, shape, steps = stage.cfg, stage.made(low), stage.cfg.sampler.steps
    if shape.frames <= cfg.windows.frames:
        return once(stage, low, run)
    whole = Video.unknown(len(run.text.mask), cfg.colours, shape, cfg.fps) if low is None else low

    def made(at: slice, part: Video, noise: Draw, tick: Callable[[float], None]) -> Tensor:
        start = None if run.start is None else (Video(run.start[0].frames[:, :, at], run.start[0].fps), run.start[1])
        window = replace(run, noise=noise, progress=lambda done: tick(done / steps), start=start)
        return once(stage, part, window).frames

    def told(share: float) -> None:
        if run.progress is not None:
            run.progress(int(share * steps))

    return Video(extended(made, whole, cfg.windows, run.noise, told), whole.fps)


def once(stage: Stage, low: Video | None, run: Run) -> Video:
    """One run of the sampler."""
    cfg, sampler = stage.cfg, stage.cfg.sampler
    shape = stage.made(low)
    full = (len(run.text.mask), cfg.net.channels, *cfg.codec.inside(shape))
    if run.start is not None:
        strength = run.start[1]
        sampler = replace(sampler, strength=strength, steps=max(1, round(sampler.steps * strength)))
    cond = told(stage, low, run.text, shape, run.noise)
    dropped = cond.without_text() if run.negative is None else cond.with_text(run.negative.to(stage.device))
    x_hat = predictor(stage, cond, dropped, sampler)
    drawn_on = towards(stage, low, shape) if low is not None else lambda denoise: denoise

    def denoise(z: Tensor, t: Tensor, step: int) -> Tensor:
        return drawn_on(lambda z, t: x_hat(z, t, step))(z, t)

    hooks: list[Hook] = []
    keeps = stage.keeps and low is not None
    if low is not None and keeps:
        known, mask = (part.to(stage.device) for part in kept(stage, low, shape))
        hooks.append(keep_known(stage.encode(known), cfg.codec.mask(mask)))

    def draw(shape: Sequence[int], step: int, purpose: str) -> Tensor:
        drawn = run.noise(shape, step, purpose)
        return cfg.diffusion.far(drawn, cond.concat) if purpose == "start" else drawn

    x = sample(
        cfg.diffusion, denoise, sampler, draw, full,
        start=begun(stage, low, shape, run), hooks=hooks, progress=run.progress, after=run.after, device=stage.device,
    )  # fmt: skip
    x = stage.coder.to(stage.device).decode(x).clamp(-1, 1)
    fps = cfg.fps if low is None else low.fps if shape == low.shape else low.fps * stage.rule.rate(cfg)
    return Video((torch.where(mask > 0, known, x) if keeps else x).cpu(), fps)


def told(stage: Stage, low: Video | None, text: Text, shape: Shape, noise: Draw) -> Cond:
    """What the network hears in a run, with the noise of conditioning augmentation."""
    cfg, here = stage.cfg, stage.device if low is None else low.frames.device
    full = (len(text.mask), *cfg.incoming(shape))
    level = torch.full((full[0],), cfg.augment, device=here)
    eps = noise(full, 0, "augment").to(here) if cfg.augment > 0 else None
    # The network is told the rate it was trained at; the video keeps its own.
    return stage.condition(low, shape, text.to(here), cfg.fps, level, eps).to(stage.device)


def begun(stage: Stage, low: Video | None, shape: Shape, run: Run) -> Tensor | None:
    """The video that sampling goes on from, encoded; None: it starts from noise."""
    if run.start is not None:
        return stage.encode(run.start[0].frames.to(stage.device))
    if low is not None and stage.cfg.sampler.strength < 1:
        return stage.encode(stage.rule.condition(low, stage.cfg, shape)[0].to(stage.device))
    return None


def predictor(stage: Stage, cond: Cond, dropped: Cond, sampler: Sampler) -> StepDenoise:
    """x_hat of every step of a run, guided away from `dropped`. No weight may change in between: what the network
    makes of the prompts is made once."""
    cond, dropped = cond.remembering(), dropped.remembering()
    both = Cond.cat([cond, dropped]).remembering() if sampler.joint else None

    def denoise(z: Tensor, t: Tensor, step: int) -> Tensor:
        w = sampler.weight(step)
        if stage.cfg.w_range is not None:
            return stage.denoise(z, t, cond, w)
        if w == 0:
            return stage.denoise(z, t, cond)
        if both is None:
            x, without = stage.denoise(z, t, cond), stage.denoise(z, t, dropped)
        else:
            x, without = stage.denoise(torch.cat([z, z]), torch.cat([t, t]), both).chunk(2)
        c = z.shape[1]
        away = (1 + w) * x[:, :c] - w * without[:, :c]
        return torch.cat([away, x[:, c:]], 1) if sampler.learned else away  # the variance is that of the text

    return denoise


def towards(stage: Stage, low: Video, shape: Shape) -> Callable[[Denoise], Denoise]:
    """What adds reconstruction guidance towards `low` to a denoiser, where the sampler asks for it.

    What is compared is known frames that the network is not told of, or where the kind has none, what `degrade`
    makes of x_hat (Ho et al. 2022, Video Diffusion Models, sec. 3.1).
    """
    cfg, weight = stage.cfg, stage.cfg.sampler.reconstruction
    if weight and not stage.rule.KEEPS_KNOWN:

        def observe(x: Tensor) -> Tensor:
            made = stage.rule.degrade(Video(x, cfg.fps), cfg, generator("observe"))
            assert made is not None, f"a stage of kind {cfg.kind} is given a video that it does not keep"
            return made.frames

        target = low.frames.to(stage.device)
        return lambda denoise: reconstruction(cfg.diffusion, denoise, observe, target, weight)
    if weight:
        known, mask = kept(stage, low, shape)
        untold = mask * (1 - stage.rule.condition(low, cfg, shape)[1]) if cfg.told else mask
        if bool(untold.any()):
            known, mask = stage.encode(known.to(stage.device)), cfg.codec.mask(untold.to(stage.device))
            return lambda denoise: reconstruction(cfg.diffusion, denoise, lambda x: x * mask, known * mask, weight)
    return lambda denoise: denoise


def kept(stage: Stage, low: Video, shape: Shape) -> tuple[Tensor, Tensor]:
    """What comes out as it comes in, and its mask: parts of frames too, of which the network may not be told."""
    return (low.frames, low.mask) if low.known is not None else stage.rule.condition(low, stage.cfg, shape)
