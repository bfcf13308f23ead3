"""The chains of the founding papers: their numbers, what their networks are made of, what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import chain, planned
from torch import Tensor

from cascade.cond import Cond
from cascade.diffusion import Diffusion, Prediction
from cascade.errors import CascadeError
from cascade.nets.unet import VideoUNet
from cascade.nets.unet_config import Mixer, UNetConfig
from cascade.noise import generator
from cascade.sampling.sampler import Rule, Threshold
from cascade.settings import StageConfig
from cascade.text import Text

PAPERS = ("imagen_video", "imagen_video_8", "make_a_video", "vdm")
Make = Callable[..., Any]


def stages(name: str) -> dict[str, StageConfig]:
    return {cfg.name: cfg for cfg in chain(name).stages}


# numbers -------------------------------------------------------------------------------------------------------------

# Ho et al. 2022, Imagen Video, fig. 4 and sec. 2.1: millions of parameters, frames x height x width, frames per second.
IMAGEN_VIDEO = {
    "base": (5600, "16x24x40", 3), "tsr1": (1700, "32x24x40", 6), "ssr1": (1400, "32x48x80", 6),
    "ssr2": (1200, "32x192x320", 6), "tsr2": (780, "64x192x320", 12), "tsr3": (630, "128x192x320", 24),
    "ssr3": (340, "128x768x1280", 24),
}  # fmt: skip
# Singer et al. 2022, Make-A-Video, sec. 3; parameters as Zhang et al. 2023, Show-1, table 5, has them.
MAKE_A_VIDEO = {
    "decoder": (3100, "16x64x64", 6), "interp": (3100, "76x64x64", 30), "ssr1": (1400, "76x256x256", 30),
    "ssr2": (700, "76x768x768", 30),
}  # fmt: skip
# Ho et al. 2022, Video Diffusion Models: 16 x 64 x 64, made longer to 64 frames, and 128 x 128; no parameters given.
VDM = {
    "base": (None, "16x64x64", 6), "infill": (None, "64x64x64", 24), "ssr": (None, "64x128x128", 24),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "published"),
    [("imagen_video", IMAGEN_VIDEO), ("imagen_video_8", IMAGEN_VIDEO), ("make_a_video", MAKE_A_VIDEO), ("vdm", VDM)],
)
def test_a_chain_has_the_sizes_and_parameters_of_its_paper(name: str, published: dict[str, Any]) -> None:
    found = planned(name).stages
    assert [stage.name for stage in found] == list(published)
    for stage in found:
        millions, shape, fps = published[stage.name]
        assert f"{stage.frames}x{stage.height}x{stage.width}" == shape and stage.fps == fps
        assert millions is None or abs(stage.params / (1e6 * millions) - 1) <= 0.05, f"{stage.name}: {stage.params}"


def test_distillation_leaves_56_of_2048_evaluations() -> None:
    """Ho et al. 2022, Imagen Video: 256 steps in the base, 128 in the others, guided; then 8 in each, guided inside."""
    teacher, student = ([stage.evaluations for stage in planned(name).stages] for name in PAPERS[:2])
    assert teacher == [512] + 6 * [256] and sum(teacher) == 2048
    assert student == 7 * [8] and sum(student) == 56


def test_the_prior_is_planned_beside_the_text_encoder() -> None:
    kinds = {other.kind: other.params for other in planned("make_a_video").others}
    assert kinds["text encoder"] is None and abs(kinds["prior"] / 1.3e9 - 1) < 0.05  # type: ignore[operator]


# what they are made of -----------------------------------------------------------------------------------------------


def mixers(cfg: StageConfig) -> set[Mixer]:
    return {level.mixer for level in cfg.net.levels}


def test_imagen_video_is_built_as_published() -> None:
    for name, cfg in stages("imagen_video").items():
        levels = cfg.net.levels
        assert mixers(cfg) == {Mixer.ATTN if name == "base" else Mixer.CONV}
        assert any(level.spatial_attention for level in levels) is (name in ("base", "ssr1", "ssr2"))
        assert any(level.text_attention for level in levels) and cfg.net.text == 4096
        assert cfg.net.skip_scale == pytest.approx(2**-0.5) and cfg.diffusion.prediction is Prediction.V
        assert cfg.sampler.steps == (256 if name == "base" else 128) and cfg.sampler.rule is Rule.ANCESTRAL
        assert cfg.sampler.threshold is Threshold.DYNAMIC
        if name != "base":  # more blocks where they cost less
            assert [level.blocks for level in levels] == sorted(level.blocks for level in levels)
            assert cfg.augment == pytest.approx(
                float(Diffusion().time(torch.tensor(math.log(5.0), dtype=torch.float64))), abs=1e-12
            )
            assert cfg.augment_max == 1
    last = stages("imagen_video")["ssr3"]
    assert last.net.fully_convolutional and last.train is not None and last.train.crop is not None
    assert last.train.crop.height < last.shape.height and last.train.crop.width < last.shape.width


def test_guidance_oscillates_up_to_80_by_48_pixels() -> None:
    for cfg in stages("imagen_video").values():
        weights = {cfg.sampler.weight(step) for step in range(cfg.sampler.steps)}
        assert weights == ({15.0, 1.0} if cfg.shape.height <= 48 else {6.0})
        assert cfg.sampler.weight(0) == max(weights)


def test_students_are_told_every_weight_that_they_are_asked_for() -> None:
    for cfg in stages("imagen_video_8").values():
        assert cfg.w_range is not None and cfg.sampler.rule is Rule.STOCHASTIC
        assert all(cfg.w_range[0] <= cfg.sampler.weight(step) <= cfg.w_range[1] for step in range(8))


def test_make_a_video_is_built_as_published() -> None:
    cfgs = stages("make_a_video")
    assert replace(cfgs["decoder"].net) == replace(cfgs["interp"].net), "the interpolator is tuned from the decoder"
    assert all(level.mixer.has(Mixer.PSEUDO) for name in ("decoder", "ssr1") for level in cfgs[name].net.levels)
    assert mixers(cfgs["ssr2"]) == {Mixer.NONE} and cfgs["ssr2"].sampler.shared_noise
    assert [cfg.net.text for cfg in cfgs.values()] == [768, 768, 0, 0]


def test_the_networks_of_vdm_are_told_no_video() -> None:
    cfgs = stages("vdm")
    assert all(not cfg.told and cfg.sampler.reconstruction > 0 for cfg in cfgs.values())
    assert all(mixers(cfg) == {Mixer.ATTN} for cfg in cfgs.values())
    assert cfgs["base"].train is not None and cfgs["base"].train.images > 0


# laws of their networks ----------------------------------------------------------------------------------------------

NETWORKS = [(paper, name) for paper in ("imagen_video", "make_a_video", "vdm") for name in stages(paper)]
FRAMES = 4


def small(cfg: UNetConfig) -> UNetConfig:
    """The same architecture, narrow; at most two blocks a level, or one on the way up."""
    levels = [replace(level, channels=8 * min(i + 1, 2), blocks=min(level.blocks, 2), blocks_up=1)
              for i, level in enumerate(cfg.levels[-2:])]  # fmt: skip
    return replace(cfg, levels=levels, embedding=16, text=min(cfg.text, 6), head=4)


def network(cfg: UNetConfig) -> VideoUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VideoUNet(cfg)


def draw(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator("papers", name))


def inputs(cfg: UNetConfig) -> tuple[Tensor, Tensor, Cond]:
    side = 2 * cfg.multiple
    text = Text(draw("text", 1, 3, 6), torch.ones(1, 3, dtype=torch.bool))
    concat = draw("concat", 1, 3, FRAMES, side, side)
    mask = (draw("mask", 1, 1, FRAMES, 1, 1) > 0).float()
    cond = Cond(concat, mask, torch.tensor([0.2]), torch.tensor([8.0]), text)
    return draw("z", 1, 3, FRAMES, side, side), torch.tensor([0.6]), cond


@pytest.mark.parametrize(("paper", "name"), NETWORKS)
def test_a_new_video_model_of_a_paper_is_its_image_model(paper: str, name: str, shaken: Make, one_thread: None) -> None:
    cfg = small(stages(paper)[name].net)
    image = shaken(network(replace(cfg, levels=[replace(level, mixer=Mixer.NONE) for level in cfg.levels])))
    video = network(cfg)
    missing, unknown = video.load_state_dict(image.state_dict(), strict=False)
    assert not unknown and all("time_" in key for key in missing)
    out = video(*inputs(cfg))
    assert out.abs().mean() > 0.05 and torch.equal(out, image(*inputs(cfg)))


@pytest.mark.parametrize(("paper", "name"), NETWORKS)
def test_segments_of_a_paper_never_hear_of_each_other(paper: str, name: str, shaken: Make, one_thread: None) -> None:
    cfg = small(stages(paper)[name].net)
    net = shaken(network(cfg), 0.3)
    z, t, cond = inputs(cfg)
    cond = replace(cond, segments=torch.tensor([[0, 0, 1, 2]]))
    other = z.clone()
    other[:, :, 1] += 2 * draw("other", *z[:, :, 1].shape)
    changed = (net(other, t, cond) - net(z, t, cond)).abs().amax((0, 1, 3, 4))
    assert changed[2:].tolist() == [0, 0] and changed[1] > 0
    assert bool(changed[0] > 0) is (mixers(stages(paper)[name]) != {Mixer.NONE})


# what is refused -----------------------------------------------------------------------------------------------------

BROKEN: dict[str, tuple[str, dict[str, Any], str]] = {
    "frames": ("imagen_video", {"tsr2/shape/frames": 32}, "tsr2 takes 16x192x320, but ssr2 gives 32x192x320"),
    "size": ("imagen_video", {"ssr1/scale": 4}, "ssr1 takes 32x12x20, but tsr1 gives 32x24x40"),
    "rate": ("imagen_video", {"tsr3/fps": 25}, "tsr3.fps=24"),
    "levels": ("imagen_video", {"base/shape/width": 36}, "shape.width is 36, expected a multiple of 8"),
    "text with no text": ("imagen_video", {"base/net/text": 0}, "base.net: text is 0, expected the width"),
    "count": ("make_a_video", {"interp/shape/frames": 75}, "factor 5 makes 71 frames of 15 and 76 of 16"),
    "fill": ("make_a_video", {"interp/fill": "blend"}, "fill is blend, expected blank where known is above 0"),
    "guidance of no text": ("make_a_video", {"ssr1/sampler/guidance": 3.0}, "guidance is 3.0, expected 0"),
    "width of the prior": ("make_a_video", {"text/prior/width": 512}, "net.text is 768, but"),
    "prior": ("make_a_video", {"text/prior/layers": 0}, "text.prior: layers is 0, expected at least 1"),
    "an encoder of another width": (
        "make_a_video", {"text/encoder": "tiny/text"}, "but the embeddings of tiny/text are 128 wide",
    ),
    "unheard": ("vdm", {"ssr/sampler/reconstruction": 0.0}, "the incoming video would go unheard"),
    "window": ("vdm", {"infill/windows/frames": 15}, "windows.frames is 15, expected a multiple of 4"),
    "mixer": ("vdm", {"base/net/levels": [{"channels": 8, "mixer": "psuedo"}]}, "mixer"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "changes", "words"), BROKEN.values(), ids=BROKEN)
def test_a_broken_paper_is_refused_in_one_line(name: str, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CascadeError) as caught:
        chain(name, **changes)
    assert caught.value.code == 2 and words in str(caught.value) and "\n" not in str(caught.value)
