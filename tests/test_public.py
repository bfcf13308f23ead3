"""The public systems' chains, held to the arithmetic of their authors' pipelines with stubs for what computes.

Frame counts, windows, channel orders, timesteps, what is drawn, the variance half and thresholds need no weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import near
from torch import Tensor

from cascade.chain import Chain, Device, chain_settings
from cascade.compose import compose
from cascade.config import plugin
from cascade.diffusion import Diffusion, Path, Prediction
from cascade.errors import CascadeError, ConfigError
from cascade.nets.unet3d import UNet3D
from cascade.nets.unet3d_config import Level3D, Time, UNet3DConfig
from cascade.noise import Noise, generator, sample_id
from cascade.pipeline import Runner
from cascade.planning import plan as planning
from cascade.sampling.guidance import Per, dynamic_threshold
from cascade.sampling.sampler import Sampler, Threshold
from cascade.sampling.solvers import ancestral
from cascade.stage import Batch, Stage
from cascade.text import Text, TextConfig
from cascade.video import Fill, Filter, Video, resize, spread
from cascade.windows import Join, Windows

CHAINS = ("show1", "if_image", "modelscope", "zeroscope", "lavie")
SMALL = {  # height and width of every stage: the least that their networks and autoencoders can do
    "show1": {"base": (8, 16), "interp": (8, 16), "first": (32, 64), "sr1": (32, 64), "sr2": (64, 128)},
    "if_image": {"base": (8, 8), "sr": (32, 32)},
    "modelscope": {"base": (64, 64)},
    "zeroscope": {"base": (64, 128), "xl": (128, 192)},
    "lavie": {"base": (64, 64), "interp": (64, 64), "vsr": (256, 256)},
}
TEXT, NEGATIVE = 1.0, -1.0  # what all tokens are
NOISE = Noise(0, "stage", (sample_id("a"),))


@cache
def chain(name: str) -> Chain:
    """The chain as it is, of small videos."""
    sizes = [
        f"{stage}.shape.{side}={size}"
        for stage, shape in SMALL[name].items()
        for side, size in zip(("height", "width"), shape, strict=True)
    ]
    entry = {
        "show1": ["sr2.from_height=32", "sr2.from_width=64"],
        "zeroscope": ["xl.from_height=64", "xl.from_width=128"],
    }
    words = [*sizes, *(f"{stage}.train=null" for stage in SMALL[name]), *entry.get(name, [])]
    return Chain.read(chain_settings(name, words))


class Stub(UNet3D):
    """Everything about the network but what it computes: a linear function of x, of the text and of the frame."""

    def __init__(self, cfg: UNet3DConfig) -> None:
        narrow = [replace(level, channels=64, blocks=1) for level in cfg.levels]
        context = None if cfg.context is None else 64
        small = replace(
            cfg, time=Time.NONE, rotary=0, buckets=0, temporal_last=False, sparse=False, transformer_in=None
        )
        super().__init__(replace(small, levels=narrow, embedding=8, text=cfg.pool or 8, context=context))
        self.heard: list[tuple[Tensor, float, float, float | None]] = []  # x, timestep, text, level

    def run(self, x: Tensor, timestep: Tensor, text: Tensor, level: Tensor | None = None) -> Tensor:
        said, c = float(text.mean()), self.cfg.channels
        self.heard.append((x.clone(), float(timestep[0]), said, None if level is None else float(level[0])))
        seen = x[:, c : 2 * c] if x.shape[1] >= 2 * c else x[:, :c].flip(1)
        frame = torch.arange(x.shape[2]).view(1, 1, -1, 1, 1) / 10
        out = 0.6 * x[:, :c] - 0.3 * seen + 0.1 * said + frame
        return torch.cat([out, torch.full_like(out, said)], 1) if self.cfg.variance else out


class Pool:
    """An autoencoder that averages."""

    hash = ""

    def __init__(self, channels: int, stride: int) -> None:
        self.channels, self.stride = channels, stride

    def to(self, device: torch.device) -> Pool:
        return self

    def encode(self, x: Tensor) -> Tensor:
        small = F.avg_pool3d(x, (1, self.stride, self.stride))
        return torch.cat([small, small[:, : self.channels - 3]], 1)

    def decode(self, z: Tensor) -> Tensor:
        return z[:, :3].repeat_interleave(self.stride, 3).repeat_interleave(self.stride, 4).clamp(-1, 1)


def stage(name: str, which: str, steps: int = 2, **changes: Any) -> Stage:
    made = chain(name)
    number = [cfg.name for cfg in made.stages].index(which)
    cfg = made.stages[number]
    sampler = replace(cfg.sampler, steps=steps, **changes.pop("sampler", {}))
    cfg = replace(cfg, sampler=sampler, **changes)
    with torch.random.fork_rng(devices=[]):
        stage = Stage(cfg, made.rules[number], Stub(cfg.net))  # type: ignore[arg-type]
    if cfg.codec.stride > 1:
        vars(stage)["coder"] = Pool(cfg.codec.channels, cfg.codec.stride)
    return stage


def heard(stage: Stage) -> list[tuple[Tensor, float, float, float | None]]:
    assert isinstance(stage.net, Stub)
    return stage.net.heard


def text(value: float, net: Any) -> Text:
    return Text(torch.full((1, 4, net.text), value), torch.ones(1, 4, dtype=torch.bool))


def run(stage: Stage, low: Video | None, noise: Any = NOISE) -> Video:
    return stage.sample(low, text(TEXT, stage.net.cfg), text(NEGATIVE, stage.net.cfg), noise)  # type: ignore[union-attr]


def clip(stage: Stage, fps: float = 2.0) -> Video:
    shape = stage.rule.takes(stage.cfg)
    x = torch.rand(1, 3, shape.frames, shape.height, shape.width, generator=generator("clip")) * 2 - 1
    return Video(x, fps)


# every system --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHAINS)
def test_a_chain_runs_through_with_the_frames_and_the_calls_that_its_stages_say(name: str) -> None:
    video = None
    for cfg in chain(name).stages:
        made = stage(name, cfg.name)
        video = run(made, video)
        assert video.shape == cfg.shape and video.fps == cfg.fps
        windows = len(cfg.windows.spans(cfg.shape.frames, made.rule.rate(cfg)))
        assert len(heard(made)) == made.cfg.sampler.evaluations(guided=True) * windows
        assert {entry[2] for entry in heard(made)} == {TEXT, NEGATIVE}


@pytest.mark.parametrize(
    ("name", "which", "first", "last"),
    [
        ("modelscope", "base", [981, 961, 941], 1),  # DDIM, leading, steps_offset 1
        ("if_image", "base", [990, 980, 970], 0),  # DDPM, leading
        ("lavie", "base", [981, 961, 941], 1),
        ("lavie", "interp", [999, 979, 958], 0),  # evenly from end to end
        ("lavie", "vsr", [981, 961, 941], 1),
        ("show1", "sr2", [799, 779, 759], 20),  # 40 of 50, linspace without its last point
        ("zeroscope", "xl", [599, 579, 559], 20),
    ],
)
def test_the_network_is_told_the_timesteps_of_its_training(name: str, which: str, first: list[int], last: int) -> None:
    steps = next(cfg for cfg in chain(name).stages if cfg.name == which).sampler.steps
    made = stage(name, which, steps=steps, sampler={"guidance": 0.0})
    run(made, None if which == "base" else clip(made))
    windows = len(made.cfg.windows.spans(made.cfg.shape.frames, made.rule.rate(made.cfg)))
    told = [entry[1] for entry in heard(made)]
    assert told[:3] == first and told[-1] == last and told == told[:steps] * windows


def test_guidance_scales_are_those_of_the_demos() -> None:
    scales = {name: [1 + cfg.sampler.guidance for cfg in chain(name).stages] for name in CHAINS}
    assert scales == {
        "show1": [9, 4, 4, 7, 15], "if_image": [7, 4], "modelscope": [9], "zeroscope": [9, 15], "lavie": [7.5, 4, 5],
    }  # fmt: skip


# Show-1 --------------------------------------------------------------------------------------------------------------


def test_show1_interpolation_sees_noise_cross_fade_and_mask_in_that_order_and_every_gap_the_same_noise() -> None:
    made = stage("show1", "interp")
    low = clip(made)
    run(made, low)
    starts = heard(made)[::4]  # two steps of two branches
    assert len(starts) == 7
    for gap, (x, *_) in enumerate(starts):
        assert x.shape == (1, 7, 5, 8, 16)
        near(x[:, :3], NOISE((1, 3, 5, 8, 16), 0, "start"), 1e-6)
        fade = torch.linspace(0, 1, 5).view(1, 1, 5, 1, 1)
        near(x[:, 3:6], torch.lerp(low.frames[:, :, gap : gap + 1], low.frames[:, :, gap + 1 : gap + 2], fade), 1e-6)
        assert x[0, 6, :, 0, 0].tolist() == [1, 0, 0, 0, 1]


def test_show1_makes_key_frames_again_and_the_later_gap_counts() -> None:
    made = stage("show1", "interp")
    low = clip(made)
    got = run(made, low).frames
    alone = [run(stage("show1", "interp"), Video(low.frames[:, :, gap : gap + 2], 2.0)).frames for gap in range(7)]
    for gap, part in enumerate(alone):
        assert torch.equal(got[:, :, 4 * gap : 4 * gap + 4], part[:, :, :4])
    assert torch.equal(got[:, :, 28], alone[6][:, :, 4])
    assert (got[:, :, ::4] - low.frames).abs().max() > 0.1


def test_show1_key_frames_can_be_kept_and_gaps_share_one_run() -> None:
    made = stage("show1", "interp", keep_known=True, windows=Windows(frames=5, overlap=1))
    low = clip(made)
    assert torch.equal(run(made, low).frames[:, :, ::4], low.frames)
    x = heard(made)[0][0]
    near(x[:, :3], NOISE((1, 3, 29, 8, 16), 0, "start")[:, :, :5], 1e-6)


def test_show1_first_frame_is_sampled_the_others_are_enlarged() -> None:
    made = stage("show1", "first")
    low = clip(made, 8.0)
    got = run(made, low).frames
    plain = resize(low.frames, 32, 64, Filter.CORNERS)
    assert torch.equal(got[:, :, 1:], plain[:, :, 1:]) and not torch.equal(got[:, :, 0], plain[:, :, 0])
    expected = F.interpolate(low.frames[0].transpose(0, 1), (32, 64), mode="bilinear", align_corners=True)
    near(plain[0].transpose(0, 1), expected, 1e-6)
    assert {entry[0].shape for entry in heard(made)} == {(1, 6, 1, 32, 64)}
    assert {entry[3] for entry in heard(made)} == {150}


def test_show1_super_resolution_goes_on_from_the_finished_frame_window_by_window() -> None:
    made = stage("show1", "sr1")
    low = clip(made, 8.0)
    got = run(made, low).frames
    table = Diffusion(schedule=made.cfg.diffusion.schedule, timesteps=1000)
    alpha, sigma = table.alpha_sigma(table.timestep(torch.tensor([250])))
    starts = heard(made)[::4]
    assert len(starts) == 4
    for number, (x, _, _, level) in enumerate(starts):
        first = 7 * number
        assert x.shape == (1, 6, 8, 32, 64) and level == 250
        near(x[:, :3], NOISE((1, 3, 8, 32, 64), 0, "start"), 1e-6)
        eps = NOISE((1, 3, 8, 32, 64), 0, "augment")
        near(x[:, 4:6, 1:], (alpha * low.frames[:, :, first : first + 8] + sigma * eps)[:, 1:, 1:], 1e-6)
        if number == 0:
            near(x[:, 3:6, 0], low.frames[:, :, 0], 1e-6)
    for number, (x, *_) in enumerate(starts[1:], 1):
        alone = stage("show1", "sr1", windows=Windows())
        given = low.frames[:, :, 7 * number : 7 * number + 8].clone()
        given[:, :, 0] = x[:, 3:6, 0]  # what the window before made of this frame
        assert torch.equal(
            run(alone, Video(given, 8.0)).frames[:, :, :7], got[:, :, 7 * number : 7 * number + 8][:, :, :7]
        )


def test_show1_finished_frames_can_come_out_as_they_came_in_and_noise_can_belong_to_frames() -> None:
    windows = Windows(frames=8, overlap=1, rule=Join.CHAINED)
    made = stage("show1", "sr1", keep_known=True, windows=windows)
    low = clip(made, 8.0)
    got = run(made, low).frames
    assert torch.equal(got[:, :, 0], low.frames[:, :, 0])
    for number, (x, *_) in enumerate(heard(made)[::4]):
        near(x[:, :3], NOISE((1, 3, 29, 32, 64), 0, "start")[:, :, 7 * number : 7 * number + 8], 1e-6)
        near(x[:, 3:6, 0], got[:, :, 7 * number], 1e-6)


def test_show1_thresholds_frame_by_frame() -> None:
    """A frame that is far too bright changes no other one; with one threshold for the clip it does."""
    x = torch.rand(1, 3, 4, 4, 4, generator=generator("x")) * 1.2
    bright = x.clone()
    bright[:, :, 0] *= 5
    sampler = next(iter(chain("show1").stages)).sampler
    t = torch.ones(1)
    assert torch.equal(sampler.limit(bright, bright, t)[:, :, 1:], sampler.limit(x, x, t)[:, :, 1:])
    clip_wise = replace(sampler, per=Per.CLIP)
    assert not torch.equal(clip_wise.limit(bright, bright, t)[:, :, 1:], clip_wise.limit(x, x, t)[:, :, 1:])
    near(sampler.limit(bright, bright, t), dynamic_threshold(bright, 0.95, Per.FRAME, 1.5), atol=0)


def test_show1_second_super_resolution_starts_from_the_enlarged_video_in_256_shades() -> None:
    made = stage("show1", "sr2", steps=40)
    low = clip(made, 8.0)
    run(made, low)
    big = resize(low.frames, 64, 128, Filter.EIGHT_BIT)
    table, eps = made.cfg.diffusion, NOISE((1, 4, 29, 8, 16), 0, "start")
    near(heard(made)[0][0], table.noised(made.encode(big), eps, table.timestep(torch.tensor([799]))), 1e-6)


def test_256_shades_are_those_of_an_image_library() -> None:
    from PIL import Image

    x = torch.rand(1, 3, 2, 10, 16, generator=generator("shades")) * 2 - 1
    got = resize(x, 20, 36, Filter.EIGHT_BIT)
    for f in range(2):
        shades = ((x[0, :, f].permute(1, 2, 0) * 0.5 + 0.5) * 255).to(torch.uint8).numpy()
        expected = torch.from_numpy(np.array(Image.fromarray(shades).resize((36, 20), Image.Resampling.BICUBIC)))
        near(((got[0, :, f].permute(1, 2, 0) + 1) * 127.5).round(), expected.float(), atol=1)


def test_show1s_last_stage_has_an_encoder_and_a_negative_prompt_of_its_own() -> None:
    made = chain("show1")
    assert [made.text_of(cfg).encoder for cfg in made.stages[:4]] == [made.text.encoder] * 4
    assert [made.text_of(cfg).negative for cfg in made.stages] == [""] * 4 + ["low resolution, blur"]
    asked: list[tuple[str | None, str]] = []

    class Source:
        width, fingerprint = 4, "the same"

        def __init__(self, cfg: TextConfig) -> None:
            self.negative = cfg.negative

        def encode(self, prompts: Sequence[str]) -> Text:
            asked.extend((self.negative, prompt) for prompt in prompts)
            return Text.empty(len(prompts), 1, 4)

    runner = Runner(made, Source(made.text), Device(), 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cascade.pipeline.text_source", Source)
        for cfg in made.stages:
            runner.text(["a dog"], cfg)
            runner.text(["a dog"], cfg)
    assert asked == [("", "a dog"), ("low resolution, blur", "a dog")]


# DeepFloyd IF --------------------------------------------------------------------------------------------------------


def test_if_guides_the_mean_alone_and_takes_the_variance_of_the_text() -> None:
    made = stage("if_image", "base", steps=2)
    got = run(made, None).frames
    table, w = made.cfg.diffusion, made.cfg.sampler.guidance
    first, second = (torch.tensor([t]) for t in made.cfg.sampler.times(table)[:2])
    net = Stub(made.net.cfg)  # type: ignore[arg-type]
    t, z = table.number(first), NOISE((1, 3, 1, 8, 8), 0, "start")

    def guided(z: Tensor, t: Tensor) -> Tensor:
        eps = {said: net.run(z, t, torch.full((1, 1, 1), said))[:, :3] for said in (TEXT, NEGATIVE)}
        return guide(eps[NEGATIVE], eps[TEXT], w)

    x = made.cfg.sampler.limit(table.split(z, guided(z, t), first)[0], z, first)
    gamma = torch.full_like(z, (TEXT + 1) / 2)
    z = ancestral(table, z, x, first, second, gamma, NOISE((1, 3, 1, 8, 8), 0, "step"))
    x = made.cfg.sampler.limit(table.split(z, guided(z, table.number(second)), second)[0], z, second)
    near(got, x.clamp(-1, 1), atol=2e-5)


def guide(negative: Tensor, positive: Tensor, w: float) -> Tensor:
    """negative + guidance_scale (positive - negative), as diffusers writes it."""
    return negative + (1 + w) * (positive - negative)


def test_if_second_stage_is_told_the_noise_of_its_input() -> None:
    made = stage("if_image", "sr")
    low = clip(made, 1.0)
    run(made, low)
    x, _, _, level = heard(made)[0]
    table = made.cfg.noising
    assert table is not None and level == 250
    big = F.interpolate(low.frames[:, :, 0], (32, 32), mode="bilinear", align_corners=True)[:, :, None]
    expected = table.noised(big, NOISE((1, 3, 1, 32, 32), 0, "augment"), table.timestep(torch.tensor([250])))
    near(x[:, 3:], expected, 1e-6)


# latents -------------------------------------------------------------------------------------------------------------


def test_lavie_interpolation_sees_every_latent_four_times_less_the_ends() -> None:
    made = stage("lavie", "interp")
    low = clip(made, 6.0)
    run(made, low)
    latents = made.encode(low.frames)
    x = heard(made)[0][0]
    assert x.shape == (1, 8, 61, 8, 8)
    near(x[:, 4:], latents.repeat_interleave(4, 2)[:, :, 1:-2], 1e-6)


X4 = {"beta_schedule": "scaled_linear", "beta_start": 0.0001, "beta_end": 0.02}  # of the x4 upscaler's input


def test_lavie_super_resolution_sees_noised_pixels_beside_latents_eight_frames_at_a_time() -> None:
    from diffusers import DDPMScheduler

    made = stage("lavie", "vsr")
    low = clip(made, 24.0)
    got = run(made, low).frames
    starts = heard(made)[::4]  # two steps of two branches
    assert [x.shape for x, *_ in starts] == [(1, 7, 8, 64, 64)] * 7 + [(1, 7, 5, 64, 64)]
    start, eps = NOISE((1, 4, 61, 64, 64), 0, "start"), NOISE((1, 3, 61, 64, 64), 0, "augment")
    noised = DDPMScheduler(**X4).add_noise(low.frames, eps, torch.tensor([50]))
    for number, (x, _, _, level) in enumerate(starts):
        part = slice(8 * number, min(8 * number + 8, 61))
        near(x[:, :4], start[:, :, part])
        near(x[:, 4:], noised[:, :, part])
        assert level == 50

    def later(shape: Sequence[int], step: int, purpose: str) -> Tensor:
        return NOISE((*shape[:2], 61, *shape[3:]), step, purpose)[:, :, 56:]

    alone = stage("lavie", "vsr", windows=Windows())
    last = run(alone, Video(low.frames[:, :, 56:], 24.0), later)
    assert torch.equal(last.frames, got[:, :, 56:])


def test_lavie_super_resolution_can_make_its_windows_in_one_run_that_overlap() -> None:
    made = stage("lavie", "vsr", windows=Windows(frames=8, overlap=2))
    low = clip(made, 24.0)
    assert run(made, low).frames.shape == (1, 3, 61, 256, 256)
    first, second = (x for x, *_ in heard(made)[:2])
    near(first[:, :, 6:], second[:, :, :2])


def test_lavie_super_resolution_takes_the_steps_of_the_upscaler_with_linear_betas() -> None:
    from diffusers import DDIMScheduler

    made = stage("lavie", "vsr", steps=5, windows=Windows())
    low = Video(clip(made, 24.0).frames[:, :, :3], 24.0)
    got = run(made, low)
    scheduler = DDIMScheduler(
        beta_schedule="linear", beta_start=0.0001, beta_end=0.02, prediction_type="v_prediction", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    scheduler.set_timesteps(5)
    z, beside = NOISE((1, 4, 3, 64, 64), 0, "start"), heard(made)[0][0][:, 4:]
    for t in scheduler.timesteps:
        x = torch.cat([z, beside], 1)
        tokens = (text(value, made.cfg.net).tokens for value in (NEGATIVE, TEXT))
        negative, positive = (made.net.run(x, t.view(1), part) for part in tokens)  # type: ignore[operator]
        z = scheduler.step(guide(negative, positive, 4.0), t, z).prev_sample
    near(got.frames, made.coder.decode(z), 1e-5)
    assert got.frames.std() > 0.1


def test_pixels_beside_latents_are_the_same_in_training() -> None:
    made = stage("lavie", "vsr", windows=Windows())
    whole = Video(torch.rand(8, 3, 1, 256, 256, generator=generator("whole")) * 2 - 1, 24.0)
    words = Text(torch.zeros(8, 4, 8), torch.ones(8, 4, dtype=torch.bool))
    x, cond = made.example(whole, words, generator("example"))
    assert x.shape == (8, 4, 1, 64, 64) and cond.concat.shape == (8, 3, 1, 64, 64)
    small, noised = whole.resize(64, 64).frames, cond.level > 0
    assert 0 < noised.sum() < 8 and cond.level.max() <= made.cfg.augment_max and made.cfg.noising is not None
    near(cond.concat[~noised], small[~noised])
    eps = made.cfg.noising.noise_in(cond.concat, small, cond.level)[noised]
    assert eps.mean().abs() < 0.02 and abs(eps.std() - 1) < 0.02


def test_no_straight_path_leads_from_pixels_to_latents() -> None:
    cfg = chain("lavie").stages[2]
    straight = {"diffusion": Diffusion(prediction=Prediction.X, path=Path.STRAIGHT)}
    with pytest.raises(ValueError, match="path is straight, expected noise where"):
        replace(cfg, **straight, sampler=Sampler(steps=2, threshold=Threshold.NONE))


def test_the_nearest_frame_fills_as_the_blend_does_where_frames_are_known() -> None:
    x = torch.rand(1, 3, 3, 2, 2, generator=generator("x"))
    for frames in (7, 9):
        k = 3
        blend, mask = spread(x, k, frames)
        nearest, same = spread(x, k, frames, Fill.NEAREST)
        assert torch.equal(mask, same) and torch.equal(blend[:, :, ::k], nearest[:, :, ::k])
        assert torch.equal(nearest, x[:, :, [(f + 1) // 3 if (f + 1) // 3 < 3 else 2 for f in range(frames)]])


@pytest.mark.parametrize("name", ["modelscope", "zeroscope", "lavie"])
def test_latent_stages_draw_latent_noise(name: str) -> None:
    made = stage(name, "base")
    asked: list[tuple[tuple[int, ...], int, str]] = []

    def noise(shape: Sequence[int], step: int, purpose: str) -> Tensor:
        asked.append((tuple(shape), step, purpose))
        return NOISE(shape, step, purpose)

    run(made, None, noise)
    size = (1, 4, made.cfg.shape.frames, made.cfg.shape.height // 8, made.cfg.shape.width // 8)
    steps = [(size, 0, "step")] if name == "lavie" else []  # DDPM draws for every step but the last
    assert asked == [(size, 0, "start"), *steps]


# settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"rule": Join.CHAINED, "frames": 8, "overlap": 2}, "overlap is 2, expected 1 where rule is chained"),
        ({"rule": Join.OVERWRITE}, "frames is 0, expected at least 1 where rule is overwrite"),
        ({"frames": 8, "same_noise": True}, "expected false where rule is blend"),
        ({"rule": Join.APART, "frames": 8, "overlap": 2}, "overlap is 2, expected 0 where rule is apart"),
    ],
)
def test_windows_that_mean_nothing_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Windows(**settings)


def test_a_level_of_the_stub_is_enough() -> None:
    """The stub keeps what decides channels and sizes."""
    cfg = chain("show1").stages[1].net
    assert isinstance(cfg, UNet3DConfig) and Stub(cfg).cfg.levels[0] == Level3D(channels=64, blocks=1, attention=False)
    assert Sampler(steps=2).evaluations() == 2


# what is refused -----------------------------------------------------------------------------------------------------

FAULTS = {
    "frames": ("show1", "interp.shape.frames=33", "interp takes 9x40x64, but base gives 8x40x64"),
    "not the frames of a gap": ("show1", "interp.shape.frames=30", "factor 4 makes 29 frames of 8"),
    "size": ("show1", "base.shape.height=44", "shape.height is 44, expected a multiple of 8"),
    "size of the latents": ("modelscope", "base.shape.width=200", "expected a multiple of 64"),
    "input of the last stage": ("show1", "sr2.from_width=320", "sr2 takes 29x160x320, but sr1 gives 29x160x256"),
    "scale": ("if_image", "sr.scale=3", "scale is 3, expected a divisor above 1"),
    "channels of the latents": ("lavie", "base.codec.channels=16", "net.channels is 4, expected codec.channels, 16"),
    "channels of a colour": ("show1", "first.net.channels=1", "first takes videos of 1 channels, but interp gives 3"),
    "text width": (
        "modelscope",
        "text.encoder=tiny/text",
        "net.text is 1024, but the embeddings of tiny/text are 128",
    ),
    "pooled text": ("show1", "base.net.pool=60", "pool is 60, expected a divisor of text"),
    "windows that leave frames over": (
        "show1",
        "sr1.windows.frames=9",
        "do not fill 29 frames. Fix: sr1.shape.frames=25",
    ),
    "windows of one gap and a half": ("show1", "interp.windows.frames=7", "windows.frames is 7, expected 1 more than"),
    "chained windows of another size": (
        "show1",
        "first.windows={frames: 8, overlap: 1, rule: chained}",
        "but it takes 29x40",
    ),
    "windows without an input": ("lavie", "base.windows={frames: 8, rule: overwrite}", "it is not given a whole video"),
    "more steps than timesteps": ("if_image", "base.sampler.steps=1000", "steps is 1000, expected fewer than"),
    "a grid without timesteps": (
        "lavie",
        "base.diffusion={prediction: eps, schedule: cosine, timesteps: 0, betas: null}",
        "spacing is leading, expected uniform where schedule is cosine",
    ),
    "betas": ("lavie", "base.diffusion.betas=[0.02]", "betas is [0.02], expected the first and the last"),
    "a variance nobody says": (
        "modelscope",
        "base.sampler={rule: ancestral, learned: true}",
        "the network says no variance",
    ),
    "nothing left to refine": ("zeroscope", "xl.sampler.strength=1", "nothing of the incoming video would be left"),
    "an end that a rule cannot reach": (
        "modelscope",
        "base.sampler.rule=heun",
        "end is first, expected clean where rule is heun",
    ),
    "threshold of latents": ("lavie", "interp.sampler.threshold=dynamic", "latents do not end at -1 and 1"),
    "fps": ("lavie", "interp.fps=30", "interp: fps is 30, but 4 x base's 6 is 24"),
    "pixels of another size than the latents": (
        "lavie",
        "vsr.scale=2",
        "takes 640x1024 pixels, expected 320x512, the size of the latents that they stand beside",
    ),
    "pixels of another number of colours": (
        "lavie",
        "vsr.net.concat_channels=4",
        "concat_channels is 4, expected 3 where codec.kind is latent",
    ),
    "pixels beside pixels": (
        "if_image",
        "sr.net.concat_channels=3",
        "concat_channels is 3, expected null where codec.kind is pixel",
    ),
    "windows side by side that part what is made of one frame": (
        "lavie",
        "interp.windows={frames: 5, rule: apart}",
        "interp: windows of 5 frames side by side part the 4 frames",
    ),
}


@pytest.mark.parametrize(("name", "change", "words"), FAULTS.values(), ids=FAULTS)
def test_a_broken_chain_is_refused_in_one_line(
    name: str, change: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(planning, "measure", lambda *_: pytest.fail("measured before it was checked"))
    with pytest.raises(CascadeError) as caught:
        planning.verb(compose("plan", [f"chain={name}", change]))
    assert caught.value.code == 2 and words in str(caught.value)
    assert "\n" not in str(caught.value) and capsys.readouterr().out == ""


# the kinds that these systems add ------------------------------------------------------------------------------------

PART: dict[str, dict[str, Any]] = {"relay": {}, "refine": {"sampler": Sampler(steps=2, strength=0.5)}}


@pytest.mark.parametrize("kind", PART)
def test_what_a_new_kind_takes_gives_its_shape_and_a_degraded_video_is_what_it_takes(
    kind: str, stage_config: Any
) -> None:
    cfg, rule = stage_config(kind, **PART[kind]), plugin(kind)
    assert rule.output(rule.takes(cfg), cfg) == cfg.shape
    whole = Video(torch.rand(2, 3, 4, 8, 8, generator=generator("whole")) * 2 - 1, 8.0)
    low = rule.degrade(whole, cfg, generator("degrade"))
    concat, mask = rule.condition(low, cfg, cfg.shape)
    assert low.shape == rule.takes(cfg) and concat.shape == whole.frames.shape and mask.shape == (2, 1, 4, 1, 1)
    with pytest.raises(ConfigError, match="needs a video"):
        rule.output(None, cfg)
    with pytest.raises(ConfigError, match="the input is 2x2 pixels"):
        rule.output(replace(cfg.shape, height=2, width=2), cfg)


def test_a_relay_is_given_its_first_frame_as_it_is_in_training_too(stage_config: Any) -> None:
    cfg, rule = stage_config("relay"), plugin("relay")
    whole = Video(torch.rand(1, 3, 4, 8, 8, generator=generator("whole")) * 2 - 1, 8.0)
    low = rule.degrade(whole, cfg, generator("degrade"))
    changed = (low.frames != whole.frames).flatten(3).any(3).any(1)[0].tolist()
    assert changed == [False, True, True, True]
    assert rule.condition(low, cfg, cfg.shape)[1].flatten().tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("kind", PART)
def test_a_new_kind_trains(kind: str, make_stage: Any, encode: Any) -> None:
    made = make_stage(kind, std=0.1, **PART[kind])
    whole = Video(torch.rand(2, 3, 4, 8, 8, generator=generator("whole")) * 2 - 1, 8.0)
    x, cond = made.example(whole, encode(["a", "b"]), generator("example"))
    loss = made.loss(
        Batch(x, torch.randn(x.shape, generator=generator("eps")), torch.tensor([0.3, 0.7]), torch.zeros(2), cond)
    )
    loss.sum().backward()
    assert loss.shape == (2,) and all(torch.isfinite(p.grad).all() for p in made.net.parameters() if p.grad is not None)


def test_a_refined_video_starts_from_the_incoming_one_and_noise_is_all_that_is_drawn(
    make_stage: Any, encode: Any
) -> None:
    """With no noise left in (strength near 0) the network changes nothing: the enlarged video comes out."""
    made = make_stage("refine", std=0.1, sampler=Sampler(steps=1, strength=1e-4, threshold=Threshold.NONE))
    low = Video(torch.rand(1, 3, 4, 4, 6, generator=generator("low")) * 2 - 1, 8.0)
    got = made.sample(low, encode(["a"]), None, NOISE)
    near(got.frames, resize(low.frames, 8, 8), atol=2e-3)
