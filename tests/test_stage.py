"""Laws of a stage: one conditioning for training and sampling, known frames, independence of the batch, the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cascade.chain import Chain, chain_settings
from cascade.codec import Codec, Kind
from cascade.cond import Cond
from cascade.config import plugin
from cascade.diffusion import Diffusion, Path, Prediction
from cascade.errors import ConfigError
from cascade.loading import told_weight, untrained
from cascade.nets.unet_config import LevelSpec, Mixer
from cascade.noise import Noise, generator, sample_id
from cascade.sampling.sampler import Rule as StepRule
from cascade.sampling.sampler import Sampler
from cascade.settings import Before
from cascade.stage import AUGMENTATION, Batch, Stage
from cascade.text import Text
from cascade.training.imitation import Imitation, check_clips, imitation, makers
from cascade.video import Shape, Video
from cascade.windows import Join, Windows

KINDS = ("base", "tsr", "ssr", "interp")
PROMPTS = ("a red circle", "a blue square moves left")
Make = Callable[..., Any]


class Spy(nn.Module):
    """A network that notes what it is told; its x_hat is `answer(z, cond)`, its prediction type x."""

    def __init__(self, answer: Callable[[Tensor, Cond], Tensor] | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.answer = answer
        self.conds: list[Cond] = []
        self.times: list[Tensor] = []
        self.ws: list[Tensor | None] = []

    def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        self.conds.append(cond)
        self.times.append(t)
        self.ws.append(w)
        return torch.zeros_like(z) if self.answer is None else self.answer(z, cond)


def spied(stage: Stage, answer: Callable[[Tensor, Cond], Tensor] | None = None, **changes: Any) -> tuple[Stage, Spy]:
    spy = Spy(answer)
    cfg = replace(stage.cfg, **({"diffusion": Diffusion(prediction=Prediction.X)} | changes))
    return Stage(cfg, stage.rule, spy), spy


def video(stage: Stage, batch: int = 1) -> Video:
    shape = stage.cfg.shape
    x = torch.rand(batch, 3, shape.frames, shape.height, shape.width, generator=generator("video", stage.cfg.kind))
    return Video(x * 2 - 1, stage.cfg.fps)


def given(stage: Stage, batch: int = 1) -> Video:
    """What the stage is given: the video of the stage before it; base: a clip whose first frame is known."""
    if stage.cfg.kind == "base":
        known = torch.zeros(batch, stage.cfg.shape.frames, dtype=torch.bool)
        known[:, 0] = True
        return replace(video(stage, batch), known=known)
    low = stage.rule.degrade(video(stage, batch), stage.cfg, generator())
    assert low is not None
    return low


def noise(*prompts: str) -> Noise:
    return Noise(1, "stage", tuple(sample_id(prompt) for prompt in prompts or PROMPTS[:1]))


def batch_of(stage: Stage, encode: Make, size: int = 2) -> Batch:
    rng, parts = generator("batch"), []
    for i in range(size):
        x, cond = stage.example(video(stage), encode([PROMPTS[i % 2]]), rng)
        parts.append(Batch(x, torch.randn(x.shape, generator=rng), torch.rand(1, generator=rng), torch.zeros(1), cond))
    return Batch.cat(parts)


# what is given -------------------------------------------------------------------------------------------------------

STRAIGHT = Diffusion(prediction=Prediction.X, path=Path.STRAIGHT)
RHO, SPREAD = 0.9, 0.3  # of the Gaussian world below: correlation of neighbouring frames, standard deviation


def autoregressive(frames: int) -> Tensor:
    distance = torch.arange(frames)[:, None] - torch.arange(frames)
    return SPREAD**2 * RHO ** distance.abs().double()


def exact(z: Tensor, t: Tensor) -> Tensor:
    """E[x | z] where every pixel's frames are a Gaussian process of first order, all pixels independent."""
    alpha, sigma = (level.flatten()[0] for level in Diffusion().alpha_sigma(t, torch.float64))
    frames = z.shape[2]
    covariance = autoregressive(frames)
    gain = alpha * covariance @ torch.linalg.inv(alpha**2 * covariance + sigma**2 * torch.eye(frames))
    return torch.einsum("fg,bcghw->bcfhw", gain.to(z), z)


class Gaussian(Spy):
    """The exact denoiser of that world, which cannot be told anything."""

    def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        super().forward(z, t, cond, w)
        return exact(z, t)


def extended(make_stage: Make, encode: Make, weight: float) -> Tensor:
    """Means (F,) of eight frames, the first four known to be 0.45, after 128 ancestral steps."""
    settings = Sampler(steps=128, rule=StepRule.ANCESTRAL, reconstruction=weight)
    cfg = replace(make_stage("base").cfg, shape=Shape(frames=8, height=32, width=32), sampler=settings, told=False)
    stage = Stage(replace(cfg, diffusion=Diffusion(prediction=Prediction.X)), plugin("base"), Gaussian())  # type: ignore[arg-type]
    known = torch.arange(8)[None] < 4
    low = Video(torch.full((1, 3, 8, 32, 32), 1.5 * SPREAD), 8.0, known)
    made = stage.sample(low, encode(PROMPTS[:1]), None, noise()).frames
    assert torch.equal(made[:, :, :4], low.frames[:, :, :4])
    assert not any(bool(cond.mask.any()) for cond in stage.net.conds)  # type: ignore[union-attr]
    return made.mean((0, 1, 3, 4))


def test_reconstruction_guidance_extends_a_clip_and_replacement_does_not(make_stage: Make, encode: Make) -> None:
    """Of an exact denoiser the truth is the conditional mean RHO^k x (Ho et al. 2022, VDM, sec. 3.1)."""
    replaced = extended(make_stage, encode, 0.0)
    guided = extended(make_stage, encode, 3.0)
    truth = 1.5 * SPREAD * RHO ** torch.arange(1, 5)
    assert (guided[4:] - truth).abs().max() < 0.02
    assert (replaced[4:] - truth).abs().max() > 0.12
    jump = 1.5 * SPREAD - torch.stack([replaced[4], guided[4], truth[0]])
    assert (jump[1] - jump[2]).abs() < 0.2 * (jump[0] - jump[2])


def test_replaced_frames_follow_the_forward_process(make_stage: Make, encode: Make) -> None:
    """Known frames in x_hat make their z the one of the forward process: with DDIM for the very noise of the start."""
    stage, spy = spied(make_stage("base"), sampler=Sampler(steps=4), told=False)
    seen: list[Tensor] = []
    spy.answer = lambda z, cond: seen.append(z) or torch.tanh(z)  # type: ignore[func-returns-value]
    low = given(stage)
    stage.sample(low, encode(PROMPTS[:1]), None, noise())
    eps = noise()((1, 3, 4, 8, 8), 0, "start")
    for z, t in zip(seen, spy.times, strict=True):
        assert (z - Diffusion().noised(low.frames, eps, t))[:, :, 0].abs().max() < 1e-5


def test_reconstruction_guidance_makes_what_would_be_the_given_video_made_small(make_stage: Make, encode: Make) -> None:
    """Super-resolution with a network that was never told of the small video."""
    errors = []
    for weight in (0.01, 2.0, 20.0):
        sampler = Sampler(steps=64, reconstruction=weight)
        stage = make_stage("ssr", told=False, sampler=sampler, diffusion=Diffusion(prediction=Prediction.X))
        stage = Stage(stage.cfg, stage.rule, Gaussian())
        low = Video(0.3 * given(stage).frames, 8.0)
        made = stage.rule.degrade(stage.sample(low, encode(PROMPTS[:1]), None, noise()), stage.cfg, generator())
        assert made is not None
        errors.append(float((made.frames - low.frames).square().mean().sqrt()))
    assert errors[1] < 0.5 * errors[0] and errors[2] < 0.2 * errors[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_that_is_not_told_is_not_told_in_training_either(kind: str, make_stage: Make, encode: Make) -> None:
    sampler = Sampler(steps=2, reconstruction=1.0)
    stage, spy = spied(make_stage(kind), lambda z, cond: torch.tanh(z), sampler=sampler, told=False, augment=0.1)
    _, trained = stage.example(video(stage), encode(PROMPTS[:1]), generator())
    stage.sample(given(stage), encode(PROMPTS[:1]), None, noise())
    for cond in (trained, *spy.conds):
        assert not cond.concat.any() and not cond.mask.any() and not cond.level.any()
        assert cond.concat.shape == (1, 3, *video(stage).frames.shape[2:])


@pytest.mark.parametrize("windows", [Windows(), Windows(frames=2, rule=Join.APART)])
def test_noise_may_be_shared_by_all_frames(windows: Windows, make_stage: Make, encode: Make) -> None:
    """A network that treats frames alike then makes equal frames of equal frames; else it does not."""
    net = make_stage("ssr").cfg.net
    alone = replace(net, levels=[LevelSpec(channels=8, mixer=Mixer.NONE)])
    low = Video(video(make_stage("ssr")).frames[:, :, :1, ::2, ::2].expand(-1, -1, 4, -1, -1), 8.0)
    frames = []
    for shared in (True, False):
        sampler = Sampler(steps=3, rule=StepRule.ANCESTRAL, shared_noise=shared)
        stage = make_stage("ssr", 0.2, net=alone, sampler=sampler, augment=0.2, windows=windows)
        frames.append(stage.sample(low, encode(PROMPTS[:1]), None, noise()).frames)
    assert (frames[0] - frames[0][:, :, :1]).abs().max() < 1e-5
    assert (frames[1] - frames[1][:, :, :1]).abs().max() > 1e-2
    assert (frames[0] - frames[1])[:, :, 0].abs().max() < 1e-5


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("ssr", {"told": False}, "the incoming video would go unheard"),
        ("base", {"sampler": Sampler(steps=2, strength=0.5)}, "is given no whole video to start from"),
        (
            "ssr",
            {"sampler": Sampler(steps=2, strength=0.5), "diffusion": STRAIGHT},
            "expected 1 where path is straight",
        ),
        ("ssr", {"told": False, "diffusion": STRAIGHT}, "told is False, expected true: the path starts"),
        (
            "ssr",
            {
                "sampler": Sampler(steps=2, reconstruction=1),
                "codec": Codec(kind=Kind.LATENT, weights="/nowhere", channels=3, stride=2),
            },
            "no gradient passes the codec",
        ),
    ],
)
def test_a_stage_that_could_not_heed_what_it_is_given_is_refused(
    kind: str, changes: dict[str, Any], words: str, make_stage: Make
) -> None:
    with pytest.raises((ConfigError, ValueError), match=words):
        make_stage(kind, **changes)


def test_a_distilled_network_is_asked_for_weights_that_it_knows(stage_config: Make) -> None:
    sampler = Sampler(steps=3, guidance=4.0, guidance_low=1.0)
    assert told_weight(stage_config("base", sampler=sampler), [1.0, 4.0]).w_range == [1.0, 4.0]
    for low, high, w in ((2.0, 4.0, 1), (1.0, 3.0, 4)):
        with pytest.raises(ConfigError, match=f"guidance is {w}, its weights were distilled for {low:g} to {high:g}"):
            told_weight(stage_config("base", sampler=sampler), [low, high])


def test_a_part_is_degraded_in_proportion(make_stage: Make) -> None:
    """`refine` enlarges to any size: a crop is as much enlarged as the clip."""
    stage = make_stage("refine")
    cfg, shape = stage.cfg, stage.cfg.shape
    clip = Video(torch.zeros(1, 3, shape.frames, shape.height // 2, shape.width // 2), 8.0)
    low = stage.rule.degrade(clip, cfg, generator())
    assert low is not None
    assert (low.shape.height, low.shape.width) == (cfg.from_height // 2, cfg.from_width // 2)


def test_stages_before_that_cannot_make_the_clips_are_refused(make_stage: Make) -> None:
    stage = make_stage("tsr")
    before = [(stage.cfg, stage.rule, 0.5)]
    check_clips(before, Shape(frames=2, height=4, width=4))
    with pytest.raises(ConfigError, match="tsr cannot make 3x4x4"):
        check_clips(before, Shape(frames=3, height=4, width=4))


def test_guidance_needs_text(stage_config: Make, net_config: Make) -> None:
    with pytest.raises(ValueError, match="guidance is 2, expected 0"):
        stage_config("base", net=net_config(text=0), sampler=Sampler(steps=2, guidance=2))


# conditioning --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tsr", "ssr", "interp"])
def test_training_is_told_what_sampling_is_told(kind: str, make_stage: Make, encode: Make) -> None:
    stage, spy = spied(make_stage(kind))
    x, trained = stage.example(video(stage), encode(PROMPTS[:1]), generator())
    assert torch.equal(x, video(stage).frames)
    stage.sample(given(stage), encode(PROMPTS[:1]), None, noise())
    for told in spy.conds:
        for name in ("concat", "mask", "level", "fps"):
            assert torch.equal(getattr(told, name), getattr(trained, name))
        assert torch.equal(told.text.tokens, trained.text.tokens) and told.segments is None


def test_a_base_stage_is_told_of_known_frames_alike(make_stage: Make, encode: Make) -> None:
    stage, spy = spied(make_stage("base", known=1.0))
    seen = set()
    for i in range(20):
        _, trained = stage.example(video(stage), encode(PROMPTS[:1]), generator("known", i))
        known = trained.mask[:, 0, :, 0, 0] > 0
        stage.sample(replace(video(stage), known=known), encode(PROMPTS[:1]), None, noise())
        assert torch.equal(spy.conds[-1].concat, trained.concat) and torch.equal(spy.conds[-1].mask, trained.mask)
        assert torch.equal(trained.concat, video(stage).frames * trained.mask)
        seen.add(tuple(known[0].tolist()))
    assert {(True, False, False, False), (True, False, False, True), (True, True, False, False)} <= seen


def test_a_base_stage_without_known_frames_is_told_nothing(make_stage: Make, encode: Make) -> None:
    stage, spy = spied(make_stage("base", known=0.0))
    _, trained = stage.example(video(stage), encode(PROMPTS[:1]), generator())
    stage.sample(None, encode(PROMPTS[:1]), None, noise())
    for told in (trained, spy.conds[0]):
        assert not told.concat.any() and not told.mask.any() and not told.level.any()
        assert told.concat.shape == video(stage).frames.shape


@pytest.mark.parametrize("kind", KINDS)
def test_augmentation_is_noise_of_a_level_that_the_network_is_told(kind: str, make_stage: Make, encode: Make) -> None:
    stage, spy = spied(make_stage(kind), augment=0.4)
    low, text = given(stage), encode(PROMPTS[:1])
    stage.sample(low, text, None, noise())
    clean = stage.condition(low, stage.cfg.shape, text, 8.0, torch.zeros(1), torch.zeros(()))
    eps = noise()(clean.concat.shape, 0, "augment")
    assert torch.equal(spy.conds[0].concat, AUGMENTATION.noised(clean.concat, eps, torch.tensor([0.4])))
    assert all(torch.equal(told.concat, spy.conds[0].concat) for told in spy.conds)
    assert spy.conds[0].level.tolist() == pytest.approx([0.4])
    mixed = stage.condition(
        Video(low.frames.repeat(2, 1, 1, 1, 1), 8.0, None if low.known is None else low.known.repeat(2, 1)),
        stage.cfg.shape, encode(PROMPTS), 8.0, torch.tensor([0.0, 0.4]), eps.repeat(2, 1, 1, 1, 1),
    )  # fmt: skip
    assert torch.equal(mixed.concat[:1], clean.concat) and torch.equal(mixed.concat[1:], spy.conds[0].concat)


@pytest.mark.parametrize(("kind", "known"), [("base", [0]), ("tsr", [0, 2]), ("ssr", [])])
def test_known_frames_may_stay_clean_and_all_others_are_noised(
    kind: str, known: list[int], make_stage: Make, encode: Make
) -> None:
    """A kind that keeps nothing is told of all frames, and keeps none of them."""
    stage = make_stage(kind, augment_known=False)
    shape, text, eps = stage.cfg.shape, encode(PROMPTS[:1]), torch.ones(1, 3, 4, 8, 8)
    clean, noised = (stage.condition(given(stage), shape, text, 8.0, torch.tensor([t]), eps) for t in (0.0, 0.4))
    same = (clean.concat == noised.concat).all(1).all(0).flatten(1).all(1)
    assert same.nonzero().flatten().tolist() == known and noised.level.tolist() == pytest.approx([0.4])


def test_a_clip_of_which_nothing_is_known_is_told_no_level(make_stage: Make, encode: Make) -> None:
    """Beside one of which something is known too: sampling from text is told 0 and nothing else."""
    stage = make_stage("base")
    low, level, eps = given(stage, 2), torch.full((2,), 0.4), torch.ones(2, 3, 4, 8, 8)
    assert low.known is not None
    low.known[1] = False
    cond = stage.condition(low, stage.cfg.shape, encode(PROMPTS), 8.0, level, eps)
    assert torch.equal(cond.level, level * torch.tensor([1, 0])) and cond.concat[0].any()
    alone = stage.condition(None, stage.cfg.shape, encode(PROMPTS), 8.0, level, eps)
    assert torch.equal(cond.concat[1:], alone.concat[1:]) and torch.equal(cond.level[1:], alone.level[1:])


def test_training_draws_levels_up_to_the_largest(make_stage: Make, encode: Make) -> None:
    stage = make_stage("ssr", augment_max=0.3)
    levels = [float(stage.example(video(stage), encode([""]), generator("level", i))[1].level) for i in range(100)]
    assert min(levels) == 0 and 0.25 < max(levels) <= 0.3 and 35 < levels.count(0) < 65


# sampling ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["base", "tsr", "interp"])
@pytest.mark.parametrize("augment", [0.0, 0.3])
def test_known_frames_come_out_as_they_came_in(kind: str, augment: float, make_stage: Make, encode: Make) -> None:
    stage = make_stage(kind, 0.2, augment=augment, sampler=Sampler(steps=3, guidance=2.0))
    low = given(stage, 2)
    out = stage.sample(low, encode(PROMPTS), None, noise(*PROMPTS))
    if kind == "base":
        assert torch.equal(out.frames[:, :, 0], low.frames[:, :, 0])
        assert not torch.equal(out.frames[:, :, 1], low.frames[:, :, 1])
    else:
        assert torch.equal(out.every(2).frames, low.frames)
    assert out.frames.abs().max() <= 1 and out.shape == stage.cfg.shape


def test_sampling_with_weights_in_training_keeps_no_graph(make_stage: Make, encode: Make) -> None:
    stage = make_stage("base")
    assert all(parameter.requires_grad for parameter in stage.net.parameters())
    assert not stage.sample(None, encode(PROMPTS[:1]), None, noise()).frames.requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_the_same_alone_and_among_others(kind: str, make_stage: Make, encode: Make) -> None:
    stage = make_stage(kind, 0.1, augment=0.2, sampler=Sampler(steps=3, guidance=1.0))
    low = given(stage, 2)
    both = stage.sample(low, encode(PROMPTS), None, noise(*PROMPTS)).frames
    for b, prompt in enumerate(PROMPTS):
        known = None if low.known is None else low.known[b : b + 1]
        mine = Video(low.frames[b : b + 1], low.fps, known)
        alone = stage.sample(mine, encode([prompt]), None, noise(prompt)).frames
        assert (alone - both[b : b + 1]).abs().max() <= 1e-5


def test_a_video_keeps_its_rate_and_the_network_hears_its_own(make_stage: Make, encode: Make) -> None:
    for kind, rate in (("tsr", 2), ("ssr", 1), ("interp", 2)):
        stage, spy = spied(make_stage(kind))
        out = stage.sample(replace(given(stage), fps=3.0), encode(PROMPTS[:1]), None, noise())
        assert out.fps == 3.0 * rate and spy.conds[0].fps.tolist() == [8.0]
    stage, _ = spied(make_stage("base"))
    assert stage.sample(None, encode(PROMPTS[:1]), None, noise()).fps == 8.0


def test_no_text_is_what_the_text_says_for_whoever_samples(make_stage: Make, encode: Make) -> None:
    stage = make_stage("base", std=0.2, sampler=Sampler(steps=2, guidance=3.0))
    text, silence = encode(PROMPTS[:1]), encode([""])
    told = replace(text, nothing=silence)
    wanted, zeros = (stage.sample(None, text, negative, noise()).frames for negative in (silence, None))
    assert torch.equal(stage.sample(None, told, None, noise()).frames, wanted) and not torch.equal(wanted, zeros)
    clip, drawn = Video(zeros, 8.0), stage.sample

    def away(*args: Any, **more: Any) -> Video:
        return drawn(args[0], text, silence, *args[3:], **more)

    imitated = stage.imitate(clip, told, generator("imitate"), 0.5).frames
    stage.sample = away
    assert torch.equal(stage.imitate(clip, text, generator("imitate"), 0.5).frames, imitated)


def test_guidance_asks_twice_and_moves_away_from_the_dropped_text(make_stage: Make, encode: Make) -> None:
    def loudness(z: Tensor, cond: Cond) -> Tensor:
        return torch.zeros_like(z) + 0.1 * cond.text.pooled().mean(1).view(-1, 1, 1, 1, 1)

    stage, spy = spied(make_stage("base"), loudness, sampler=Sampler(steps=2, guidance=3.0))
    text, negative = encode(PROMPTS[:1]), encode(PROMPTS[1:])
    said, unsaid = (0.1 * prompt.pooled().mean() for prompt in (text, negative))
    assert torch.allclose(stage.sample(None, text, None, noise()).frames, 4 * said, atol=1e-6)
    assert [bool(cond.text.mask.any()) for cond in spy.conds] == [True, False, True, False]
    assert torch.allclose(stage.sample(None, text, negative, noise()).frames, 4 * said - 3 * unsaid, atol=1e-6)
    plain, spy = spied(make_stage("base"), loudness, sampler=Sampler(steps=2))
    plain.sample(None, text, None, noise())
    assert len(spy.conds) == 2 and spy.ws == [None, None]


def test_a_guidance_distilled_network_is_told_w(make_stage: Make, encode: Make) -> None:
    stage, spy = spied(make_stage("base"), sampler=Sampler(steps=2, guidance=3.0), w_range=[0.0, 4.0])
    stage.sample(None, encode(PROMPTS[:1]), None, noise())
    assert [None if w is None else w.tolist() for w in spy.ws] == [[3.0], [3.0]]


def test_progress_counts_the_steps(make_stage: Make, encode: Make) -> None:
    done: list[int] = []
    make_stage("base").sample(None, encode(PROMPTS[:1]), None, noise(), done.append)
    assert done == [1, 2, 3]


@pytest.mark.parametrize("kind", ["tsr", "ssr", "interp"])
def test_a_long_video_goes_through_windows_and_keeps_its_known_frames(
    kind: str, make_stage: Make, encode: Make
) -> None:
    stage = make_stage(kind, 0.2, windows=Windows(frames=4, overlap=2))
    long = torch.rand(1, 3, 7, *given(stage).frames.shape[3:], generator=generator("long")) * 2 - 1
    out = stage.sample(Video(long, 4.0), encode(PROMPTS[:1]), None, noise())
    assert out.shape.frames == {"tsr": 14, "ssr": 7, "interp": 13}[kind]
    if kind != "ssr":
        assert torch.equal(out.every(2).frames, long)


@pytest.mark.parametrize("kind", ["tsr", "ssr", "interp"])
def test_windows_do_not_change_what_looks_at_single_frames(kind: str, make_stage: Make, encode: Make) -> None:
    whole = make_stage(
        kind, 0.2, net=replace(make_stage(kind).cfg.net, levels=[LevelSpec(channels=8, mixer=Mixer.NONE)])
    )
    parts = Stage(replace(whole.cfg, windows=Windows(frames=4, overlap=1)), whole.rule, whole.net)
    long = torch.rand(1, 3, 7, *given(whole).frames.shape[3:], generator=generator("long")) * 2 - 1
    a, b = (stage.sample(Video(long, 4.0), encode(PROMPTS[:1]), None, noise()).frames for stage in (whole, parts))
    assert (a - b).abs().max() <= 1e-5


# loss ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prediction", list(Prediction))
def test_the_loss_of_the_truth_is_zero_and_of_silence_is_finite(
    prediction: Prediction, make_stage: Make, encode: Make
) -> None:
    stage = make_stage("tsr", diffusion=Diffusion(prediction=prediction))
    batch = batch_of(stage, encode, 4)
    batch.t[:2] = torch.tensor([0.0, 1.0])
    truth = stage.cfg.diffusion.target(batch.x, batch.eps, batch.t)
    assert stage.loss(batch, lambda z, t, cond: truth).tolist() == [0.0] * 4
    loss = stage.loss(batch)
    assert loss.shape == (4,) and loss.isfinite().all() and (loss > 0).all()
    assert torch.equal(loss, stage.loss(batch, stage.net))


@pytest.mark.parametrize("prediction", list(Prediction))
def test_the_loss_is_the_mean_square_of_what_is_missing(prediction: Prediction, make_stage: Make, encode: Make) -> None:
    stage = make_stage("ssr", diffusion=Diffusion(prediction=prediction))
    batch = batch_of(stage, encode, 4)
    missing = torch.tensor([0.0, 0.5, 1.0, 3.0]).view(-1, 1, 1, 1, 1)
    said = stage.cfg.diffusion.target(batch.x, batch.eps, batch.t) + missing
    assert torch.allclose(stage.loss(batch, lambda z, t, cond: said), missing.flatten().square(), atol=1e-5)


@pytest.mark.parametrize("prediction", list(Prediction))
def test_every_prediction_learns_one_batch(prediction: Prediction, make_stage: Make, encode: Make) -> None:
    stage = make_stage("ssr", diffusion=Diffusion(prediction=prediction))
    batch = batch_of(stage, encode)
    batch.t[:] = torch.tensor([0.3, 0.7])
    optimizer = torch.optim.Adam(stage.net.parameters(), 1e-2)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = stage.loss(batch).mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_the_network_is_told_the_noise_itself_in_training_and_sampling(make_stage: Make, encode: Make) -> None:
    stage, spy = spied(make_stage("base"), diffusion=Diffusion(prediction=Prediction.X, shift=0.25))
    batch = batch_of(stage, encode)
    stage.loss(batch)
    stage.denoise(batch.x, batch.t, batch.cond)
    assert len(spy.times) == 2
    for told in spy.times:
        assert torch.equal(told, stage.cfg.diffusion.level(batch.t)) and not torch.equal(told, batch.t)


def test_a_batch_can_be_cut_joined_and_moved(make_stage: Make, encode: Make) -> None:
    batch = batch_of(make_stage("interp"), encode, 3)
    again = Batch.cat([batch[0:1], batch[1:3].to("cpu")])
    assert len(again) == 3
    for name in ("x", "eps", "t"):
        assert torch.equal(getattr(again, name), getattr(batch, name))
    assert torch.equal(again.cond.concat, batch.cond.concat) and torch.equal(again.cond.text.mask, batch.cond.text.mask)


def test_clips_of_which_parts_are_known_are_joined_with_those_of_which_nothing_is(
    make_stage: Make, encode: Make
) -> None:
    stage = make_stage("base", known=0.5, known_kinds=["first", "hole"], parts=True)
    examples = [stage.example(video(stage), encode(PROMPTS[:1]), generator("hole", i))[1] for i in range(12)]
    assert len({cond.mask.shape for cond in examples}) == 2
    joined = Cond.cat(examples)
    for i, cond in enumerate(examples):
        assert torch.equal(joined[i : i + 1].mask, cond.mask.expand(1, 1, *stage.cfg.incoming(stage.cfg.shape)[1:]))


def test_a_stage_is_where_its_network_is(make_stage: Make) -> None:
    stage = make_stage("base")
    assert stage.to(torch.device("cpu")) is stage and stage.device == torch.device("cpu")


# settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"steps": 0}, "steps is 0, expected 1 to"),
        ({"batch": 0}, "batch is 0"),
        ({"lr": -1e-3}, "lr is -0.001, expected 0 to 1"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"ema": 1.0}, "ema is 1.0"),
        ({"drop_text": 1.5}, "drop_text is 1.5, expected 0 to 1"),
        ({"images": -0.1}, "images is -0.1"),
        ({"clip": 0.0}, "clip is 0.0"),
        ({"keep": 0}, "keep is 0"),
        ({"workers": -1}, "workers is -1"),
        ({"crop_tries": 0}, "crop_tries is 0, expected 1 to 100"),
        ({"checkpoint_every": 0}, "checkpoint_every is 0"),
        ({"batch": 4, "micro_batch": 3}, r"micro_batch is 3, expected a divisor of batch \(4\)"),
        ({"batch": 4, "micro_batch": -2}, "micro_batch is -2"),
        ({"batch": 4, "micro_batch": 0}, "micro_batch is 0"),
        ({"precision": "fp8"}, "precision is 'fp8', expected no, bf16, fp16 or tf32"),
    ],
)
def test_impossible_trainings_are_refused(changes: dict[str, Any], words: str, train_config: Make) -> None:
    with pytest.raises(ValueError, match=words):
        train_config(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"fps": 0.0}, "fps is 0, expected 0.01 to 1000"),
        ({"fps": 2000.0}, "fps is 2000"),
        ({"augment": 1.5}, "augment and augment_max are 1.5 and 0.0"),
        ({"augment_max": -0.1}, "expected 0 to 1"),
        ({"name": "a|b"}, r"name is 'a\|b'"),
        ({"name": "../a"}, "it becomes a folder's name"),
        ({"name": ""}, "name is ''"),
        ({"shape": Shape(frames=4, height=10, width=8)}, "shape.height is 10, expected a multiple of 4 .* such as 8"),
        ({"shape": Shape(frames=4, height=8, width=1)}, "shape.width is 1, expected a multiple of 4 .* such as 4"),
    ],
)
def test_impossible_stages_are_refused(
    changes: dict[str, Any], words: str, stage_config: Make, net_config: Make
) -> None:
    with pytest.raises(ValueError, match=words):
        stage_config("base", **({"net": net_config(patch=4)} | changes))


@pytest.mark.parametrize(
    ("crop", "words"),
    [
        (Shape(frames=4, height=6, width=8), "train.crop.height is 6, expected a multiple of 4"),
        (Shape(frames=5, height=8, width=8), "train.crop.frames is 5, expected at most shape.frames, 4"),
        (Shape(frames=4, height=8, width=12), "train.crop.width is 12, expected at most shape.width, 8"),
    ],
)
def test_impossible_crops_are_refused(
    crop: Shape, words: str, stage_config: Make, train_config: Make, net_config: Make
) -> None:
    with pytest.raises(ValueError, match=words):
        stage_config("base", net=net_config(patch=4), train=train_config(crop=crop))


def test_text_of_any_length_goes_through_a_stage(make_stage: Make, encode: Make) -> None:
    stage = make_stage("base", 0.1)
    short = stage.sample(None, encode(PROMPTS[:1]), None, noise()).frames
    padded = stage.sample(None, encode(PROMPTS[:1]).pad(20), None, noise()).frames
    assert (short - padded).abs().max() <= 1e-5
    assert Text.empty(1, 3, 6).drop(torch.tensor([True])).mask.sum() == 0


@pytest.mark.parametrize(("kind", "frames"), [("ssr", 3), ("interp", 5), ("tsr", 4)])
def test_a_stage_is_imitated_on_parts_of_its_clips(kind: str, frames: int, make_stage: Make, encode: Make) -> None:
    stage = make_stage(kind)
    whole = video(stage, 2)
    part = Video(whole.frames[:, :, :frames, :8, :8], whole.fps)
    made = stage.imitate(part, encode(PROMPTS[:2]), generator("imitate"), 0.5)
    assert made.shape == part.shape
    again = stage.imitate(part, encode(PROMPTS[:2]), generator("imitate"), 0.5)
    assert torch.equal(made.frames, again.frames)


def test_a_stage_is_imitated_on_what_the_stage_before_makes(make_stage: Make, encode: Make) -> None:
    stage, text = make_stage("ssr", 0.1), encode(PROMPTS[:2])
    whole = video(stage, 2)
    takes = stage.rule.takes(stage.cfg)
    gray = Video(torch.zeros(2, 3, takes.frames, takes.height, takes.width), whole.fps)
    made = Imitation(stage, 0.5, lambda low, text, rng: gray)(whole, text, generator("imitate"))  # type: ignore[arg-type]
    rng = generator("imitate")
    want = stage.sample(gray, text, None, lambda shape, step, purpose: torch.randn(tuple(shape), generator=rng))
    assert torch.equal(made.frames, want.frames)
    assert not torch.equal(made.frames, Imitation(stage, 0.5)(whole, text, generator("imitate")).frames)


def test_stages_before_are_loaded_and_named_one_after_the_other() -> None:
    cfg = Before(stage="tiny/tsr", steps=1, before=Before(stage="tiny/base", strength=0.3))
    chain = Chain.read(chain_settings("tiny"))
    after, cpu = (chain.stages[2], chain.rules[2], "train.gap", chain.text), torch.device("cpu")
    made, keys = imitation(makers(cfg, *after), cpu)
    assert made is not None and made.before is not None and made.before.before is None
    assert [each.stage.cfg.name for each in (made, made.before)] == ["tsr", "base"]
    assert (made.stage.cfg.sampler.steps, made.before.strength, len(set(keys))) == (1, 0.3, 2)
    assert imitation(makers(replace(cfg, before=None), *after), cpu)[1] == keys[:1]


def test_on_the_straight_path_sampling_begins_with_what_comes_in(make_stage: Make, encode: Make) -> None:
    """A network that says what comes in leaves it as it is; noise plays no part."""
    diffusion = Diffusion(prediction=Prediction.X, path=Path.STRAIGHT)
    stage = make_stage("ssr", diffusion=diffusion)
    seen: list[Tensor] = []

    class Echo(torch.nn.Module):
        def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
            seen.append(z)
            return cond.concat

    stage.net = Echo()
    low = stage.rule.degrade(video(stage), stage.cfg, generator())
    made = stage.sample(low, encode(PROMPTS[:1]), None, Noise(0, "ssr", ("a",)))
    concat, _ = stage.rule.condition(low, stage.cfg, stage.cfg.shape)
    assert torch.equal(seen[0], concat)
    torch.testing.assert_close(made.frames, concat.clamp(-1, 1))


def test_random_weights_are_nowhere_zero_and_the_same_for_equal_nets(stage_config: Callable[..., Any]) -> None:
    def made(name: str, embedding: int) -> tuple[Stage, str]:
        cfg = stage_config("ssr", name=name)
        cfg = replace(cfg, net=replace(cfg.net, embedding=embedding))
        return untrained(cfg, plugin("ssr"), torch.device("cpu"))  # type: ignore[arg-type]

    (one, weights), (two, same), (_, other) = made("one", 8), made("two", 8), made("one", 16)
    assert weights == same != other
    for a, b in zip(one.net.parameters(), two.net.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.any()
        assert not a.requires_grad
