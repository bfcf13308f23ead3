"""Laws of seeing a long video in parts: the numbers are those of the whole, the memory is that of a part."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import draw
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cascade import stage as staging
from cascade.chain import Chain
from cascade.cond import Cond
from cascade.config import plugin
from cascade.errors import ConfigError
from cascade.nets.unet import VideoUNet
from cascade.nets.unet_config import LevelSpec, Mixer
from cascade.noise import Noise, sample_id
from cascade.planning.count import Host, held
from cascade.text import Text, TextConfig
from cascade.video import Shape, Video
from cascade.windows import Windows, in_parts

SIDE = 4
Make = Callable[..., Any]


def condition(frames: int, side: int = SIDE, batch: int = 1) -> Cond:
    text = Text(draw("text", batch, 3, 6), torch.ones(batch, 3, dtype=torch.bool))
    low, told = draw("low", batch, 3, frames, side, side), torch.full((batch,), 8.0)
    return Cond(low, torch.ones(batch, 1, frames, 1, 1), torch.zeros(batch), told, text)


def network(make: Make, shaken: Make, mixer: Mixer, **changes: Any) -> VideoUNet:
    """Two levels with all that works on single frames, mixed by `mixer`."""
    level = {"mixer": mixer, "spatial_attention": True, "text_attention": True}
    levels = [LevelSpec(channels=8, **level), LevelSpec(channels=16, blocks=2, **level)]  # type: ignore[arg-type]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = VideoUNet(make(levels=levels, **changes))
    shaken(net)
    return net.double().eval().requires_grad_(False)


# one function ---------------------------------------------------------------------------------------------------------


def blur(z: Tensor, reach: int) -> Tensor:
    """The mean over `reach` frames on both sides, blank beyond the ends."""
    kernel = torch.full((1, 1, 2 * reach + 1), 1 / (2 * reach + 1), dtype=z.dtype)
    rows = z.movedim(2, -1).reshape(-1, 1, z.shape[2])
    out = torch.nn.functional.conv1d(rows, kernel, padding=reach)
    return out.reshape(z.movedim(2, -1).shape).movedim(-1, 2)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(total=st.integers(1, 40), reach=st.integers(0, 4), more=st.integers(1, 6))
def test_parts_add_up_to_the_whole_and_are_small(total: int, reach: int, more: int) -> None:
    z, cond = draw("z", 1, 3, total, SIDE, SIDE).double(), condition(total)
    seen: list[int] = []

    def denoise(z: Tensor, cond: Cond) -> Tensor:
        seen.append(z.shape[2])
        return blur(z + cond.concat, reach)

    got = in_parts(denoise, z, cond, 2 * reach + more, reach)
    torch.testing.assert_close(got, blur(z + cond.concat, reach), rtol=0, atol=1e-12)
    assert max(seen) <= 2 * reach + more
    assert len(seen) <= max(1, -(-(total - 2 * reach) // more)), "no more parts than the frames in their middles need"


def test_less_than_the_reach_would_be_wrong() -> None:
    z, cond = draw("z", 1, 3, 20, SIDE, SIDE).double(), condition(20)
    whole = blur(z, 3)
    assert (in_parts(lambda z, _: blur(z, 3), z, cond, 9, 2) - whole).abs().max() > 1e-3
    with pytest.raises(AssertionError, match="none is 3 frames from both ends"):
        in_parts(lambda z, _: blur(z, 3), z, cond, 6, 3)


# the network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mixer", Mixer)
def test_reach_is_as_far_as_a_frame_is_heard(mixer: Mixer, net_config: Make, shaken: Make) -> None:
    net = network(net_config, shaken, mixer)
    reach, frames = net.reach, 45
    z, t, cond = draw("z", 1, 3, frames, SIDE, SIDE).double(), torch.tensor([0.5]), condition(frames)
    other = z.clone()
    other[:, :, frames // 2] += 10
    heard = (net(z, t, cond) - net(other, t, cond)).abs().amax((0, 1, 3, 4)).nonzero().flatten()
    distance = int((heard - frames // 2).abs().max())
    assert distance == (frames // 2 if reach is None else reach)


def test_a_network_that_knows_the_place_of_a_frame_cannot_be_cut(net_config: Make, shaken: Make) -> None:
    assert network(net_config, shaken, Mixer.CONV).reach == 7
    assert network(net_config, shaken, Mixer.CONV, frame_position=True).reach is None


# the stage ------------------------------------------------------------------------------------------------------------


def ssr(make: Make, frames: int = 24, **changes: Any) -> Any:
    return make("ssr", shape=Shape(frames=frames, height=8, width=8), train=None, **changes)


def sampled(stage: Any, encode: Make) -> Tensor:
    low = Video(draw("clip", 1, 3, stage.cfg.shape.frames, 4, 4).clamp(-1, 1), 8.0)
    video: Video = stage.sample(low, encode(["a red circle"]), None, Noise(0, "ssr", (sample_id("a"),)))
    return video.frames


def test_frames_at_once_change_nothing_but_the_last_bits(make_stage: Make, encode: Make) -> None:
    whole = sampled(ssr(make_stage, std=0.3), encode)
    for frames in (7, 10, 23):
        torch.testing.assert_close(
            sampled(ssr(make_stage, std=0.3, frames_at_once=frames), encode), whole, rtol=0, atol=1e-5
        )
    windows = sampled(ssr(make_stage, std=0.3, windows=Windows(frames=8, overlap=2)), encode)
    assert (windows - whole).abs().max() > 1e-3, "windows are no way to get the same"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"frames_at_once": 6}, "a frame depends on 3 on each side. Fix: ssr.frames_at_once=7"),
        ({"frames_at_once": -1}, "frames_at_once is -1"),
    ],
)
def test_too_few_at_once_are_refused(changes: dict[str, Any], words: str, stage_config: Make) -> None:
    with pytest.raises((ConfigError, ValueError), match=words):
        check(ssr(stage_config, **changes))


def test_attention_over_frames_needs_all_of_them(stage_config: Make, net_config: Make) -> None:
    net = net_config(levels=[LevelSpec(channels=8, mixer=Mixer.ATTN)])
    check(ssr(stage_config, net=net, frames_at_once=24))
    with pytest.raises(ConfigError, match=r"attention over frames.* Fix: .*ssr\.windows\.frames=12"):
        check(ssr(stage_config, net=net, frames_at_once=12))


def check(cfg: Any) -> None:
    rule: Any = plugin("ssr")
    Chain([cfg], [rule], TextConfig(encoder="/nowhere")).check()


def peak(cfg: Any) -> int:
    rule: Any = plugin("ssr")
    return held(cfg, rule, 4, Host()).peak


def test_memory_of_the_network_is_flat_in_frames(stage_config: Make, net_config: Make) -> None:
    """What grows is the video itself: z, x, the incoming one and what the sampler makes of them."""
    frame = 4 * 3 * 8 * 8  # bytes
    net = net_config(levels=[LevelSpec(channels=64)])
    few, many, whole = (
        peak(ssr(stage_config, net=net, frames=n, frames_at_once=k)) for n, k in ((24, 12), (48, 12), (48, 0))
    )
    assert many - few <= 24 * 7 * frame < (whole - few) / 3


def test_no_tensor_is_too_large_to_count_in_32_bits(
    stage_config: Make, net_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here: of 2^17 elements instead of 2^31. The widest tensor is the lower level's, made larger."""
    rule: Any = plugin("ssr")
    net = net_config(levels=[LevelSpec(channels=32, text_attention=True), LevelSpec(channels=72)], patch=2)
    cfg = ssr(stage_config, frames=64, net=net)
    assert held(cfg, rule, 4, Host(clips=3)).largest == 3 * 64 * 4 * 4 * 72 >= 2**17
    monkeypatch.setattr(staging, "ELEMENTS", 2**17)
    assert held(cfg, rule, 4, Host(clips=3)).largest < 2**17
