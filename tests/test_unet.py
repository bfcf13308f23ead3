"""Laws of the denoiser: identity at the start, segments, text, sizes, recomputation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import draw, near
from torch import Tensor

from cascade import attention, checkpoint
from cascade.cond import Cond
from cascade.config import plain
from cascade.errors import InputError
from cascade.nets.layers import Clip, PseudoConv
from cascade.nets.unet import VideoUNet
from cascade.nets.unet_config import YOUNG, YOUNG_IN_LEVELS, LevelSpec, Mixer, UNetConfig, completed
from cascade.text import Text

BATCH, FRAMES, SIDE = 2, 4, 8
TIMED = [mixer for mixer in Mixer if mixer is not Mixer.NONE]
Make = Callable[..., Any]


def level(mixer: Mixer = Mixer.BOTH, **changes: Any) -> LevelSpec:
    return LevelSpec(**({"channels": 8, "mixer": mixer, "spatial_attention": True, "text_attention": True} | changes))


def network(cfg: UNetConfig) -> VideoUNet:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return VideoUNet(cfg)


def condition(
    batch: int = BATCH, frames: int = FRAMES, side: int = SIDE, segments: Any = None, length: int = 3
) -> Cond:
    mask = (draw("mask", batch, 1, frames, 1, 1) > 0).float()
    text = Text(draw("text", batch, length, 6), torch.arange(length) < torch.tensor([[2], [length], [1]])[:batch])
    given = None if segments is None else torch.tensor(segments)
    return Cond(
        draw("concat", batch, 3, frames, side, side), mask, torch.tensor([0.1, 0.0, 0.3])[:batch],
        torch.tensor([8.0, 4.0, 16.0])[:batch], text, given,
    )  # fmt: skip


def inputs(batch: int = BATCH, frames: int = FRAMES, side: int = SIDE, **changes: Any) -> tuple[Tensor, Tensor, Cond]:
    t = torch.tensor([0.2, 0.9, 0.5])[:batch]
    return draw("z", batch, 3, frames, side, side), t, condition(batch, frames, side, **changes)


def exactly(net: VideoUNet, z: Tensor, t: Tensor, cond: Cond) -> Tensor:
    """In float64, where a law that holds is not hidden by rounding."""
    return net.double()(z.double(), t, cond)


def one_frame(cond: Cond, f: int) -> Cond:
    return replace(cond.frames(f, f + 1), segments=None)


# at the start --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [1, 2])
def test_a_new_network_says_nothing(patch: int, net_config: Make) -> None:
    net = network(net_config(levels=[level(), level(channels=16)], patch=patch, frame_position=True))
    assert not net(*inputs()).any()


def test_a_new_residual_network_says_what_comes_in(net_config: Make) -> None:
    z, t, cond = inputs()
    assert torch.equal(network(net_config(residual=True))(z, t, cond), cond.concat)


@pytest.mark.parametrize("mixer", TIMED)
def test_a_new_video_model_is_its_image_model_frame_by_frame(
    mixer: Mixer, net_config: Make, shaken: Make, one_thread: None
) -> None:
    image = shaken(network(net_config(levels=[level(Mixer.NONE), level(Mixer.NONE, channels=16)])))
    video = network(net_config(levels=[level(mixer), level(mixer, channels=16)]))
    missing, unknown = video.load_state_dict(image.state_dict(), strict=False)
    assert not unknown and missing and all("time_" in name for name in missing)
    z, t, cond = inputs()
    together = video(z, t, cond)
    assert together.abs().mean() > 0.1
    assert torch.equal(together, image(z, t, cond))
    assert torch.equal(video(z, t, replace(cond, segments=torch.tensor([[0, 0, 1, 1], [0, 1, 2, 2]]))), together)
    # One frame alone is another shape of matrix to some kernels, so the last bits may differ.
    alone = [exactly(video, z[:, :, f : f + 1], t, one_frame(cond, f)) for f in range(FRAMES)]
    near(torch.cat(alone, 2), exactly(video, z, t, cond), 1e-9)


def test_convolutions_behind_spatial_ones_begin_as_the_identity_to_the_last_bit(one_thread: None) -> None:
    conv = PseudoConv(16)
    h = draw("h", BATCH * FRAMES, 16, 5, 3).contiguous(memory_format=torch.channels_last)
    for segments in (None, torch.tensor([[0, 0, 1, 1], [0, 1, 2, 3]])):
        clip = Clip(BATCH, FRAMES, h, segments)
        assert torch.equal(conv(h, clip), h)
    conv.conv.weight.data[:, :, 0] += 0.1  # from the frame before
    changed = (conv(h, Clip(BATCH, FRAMES, h, torch.tensor([[0, 0, 1, 1], [0, 1, 1, 1]]))) - h).abs().amax((1, 2, 3))
    assert (changed > 0).tolist() == [False, True, False, True, False, False, True, True]


def test_every_large_convolution_but_the_last_is_pseudo_3d(net_config: Make) -> None:
    """Make-A-Video, sec. 3.2.1: a convolution along time follows each spatial one, at levels that ask for it."""
    spec = level(Mixer.PSEUDO, spatial_attention=False, text_attention=False)
    net = network(net_config(levels=[spec, replace(spec, channels=16)]))
    large = [m for m in net.modules() if isinstance(m, torch.nn.Conv2d) and m.kernel_size == (3, 3)]
    assert sum(isinstance(m, PseudoConv) for m in net.modules()) == len(large) - 1


def test_new_inputs_begin_without_a_voice(net_config: Make, shaken: Make) -> None:
    net = network(net_config(frame_position=True))
    for name, parameter in net.named_parameters():
        if not name.startswith(("embed.fps", "embed.guidance", "embed.frame")):
            parameter.data += 0.2 * draw(name, *parameter.shape)
    z, t, cond = inputs()
    out = net(z, t, cond)
    assert torch.equal(net(z, t, cond, torch.tensor([3.0, 1.0])), out)
    assert torch.equal(net(z, t, replace(cond, fps=cond.fps * 2)), out)


# ports ---------------------------------------------------------------------------------------------------------------


def test_every_port_is_heard(net_config: Make, shaken: Make) -> None:
    net = shaken(network(net_config(levels=[level()], frame_position=True)))
    z, t, cond = inputs()
    out = net(z, t, cond)
    louder = Text(cond.text.tokens * 2, cond.text.mask)
    others = [
        net(z, t * 0.5, cond),
        net(z, t, cond, torch.tensor([3.0, 1.0])),
        *(
            net(z, t, replace(cond, **change))
            for change in (
                {"concat": cond.concat + 1}, {"mask": 1 - cond.mask}, {"level": cond.level + 0.2},
                {"fps": cond.fps * 2}, {"text": louder}, {"text": Text.empty(BATCH, 3, 6)},
            )
        ),
    ]  # fmt: skip
    assert all((other - out).abs().amax((1, 2, 3, 4)).min() > 1e-4 for other in others)


def test_the_order_of_a_batch_changes_nothing(net_config: Make, shaken: Make) -> None:
    net = shaken(network(net_config(levels=[level()], frame_position=True)))
    z, t, cond = inputs(3)
    turned = Cond.cat([cond[b : b + 1] for b in (2, 1, 0)])
    near(exactly(net, z.flip(0), t.flip(0), turned), exactly(net, z, t, cond).flip(0), 1e-9)


def test_dropped_text_and_padding(net_config: Make, shaken: Make) -> None:
    net = shaken(network(net_config(levels=[level()])))
    z, t, cond = inputs()
    silent = Text(cond.text.tokens * 50, torch.zeros_like(cond.text.mask))
    assert torch.equal(net(z, t, cond.with_text(silent)), net(z, t, cond.without_text()))
    near(exactly(net, z, t, cond.with_text(cond.text.pad(11))), exactly(net, z, t, cond), 1e-9)


def test_a_condition_can_be_cut_joined_and_moved() -> None:
    cond = condition(3, segments=[[0, 0, 1, 1]] * 3)
    again = Cond.cat([cond[0:1], cond[1:3]])
    for name in ("concat", "mask", "level", "fps", "segments"):
        assert torch.equal(getattr(again, name), getattr(cond, name))
        assert torch.equal(getattr(cond.to("cpu"), name), getattr(cond, name))
    assert torch.equal(again.text.tokens, cond.text.tokens)
    part = cond.frames(1, 3)
    assert part.concat.shape[2] == part.mask.shape[2] == 2 and part.segments.tolist() == [[0, 1]] * 3
    mixed = Cond.cat([replace(cond, segments=None), cond])
    assert mixed.segments is not None and mixed.segments.tolist() == [[0] * 4] * 3 + [[0, 0, 1, 1]] * 3
    assert Cond.cat([replace(cond, segments=None)] * 2).segments is None
    assert not cond.without_text().text.mask.any() and cond.text.mask.any()


def test_a_network_of_no_text_hears_none(net_config: Make, shaken: Make) -> None:
    net = shaken(network(net_config(levels=[level(text_attention=False)], text=0)))
    z, t, cond = inputs()
    assert torch.equal(net(z, t, cond), net(z, t, cond.without_text())) and net.embed.text is None


def test_blocks_of_both_ways_work_at_the_size_of_their_level(net_config: Make) -> None:
    """Smaller before the blocks of the way down, larger after those of the way up (Efficient U-Net)."""
    spec = level(Mixer.NONE, spatial_attention=False, text_attention=False)
    net, sides = network(net_config(levels=[spec, replace(spec, blocks=2), spec])), []
    for stack in (*net.down, *net.up):
        for block in stack:
            block.register_forward_hook(lambda module, args, out: sides.append((args[0].shape[-1], out.shape[-1])))
    net(*inputs())
    assert sides == [(side, side) for side in (8, 4, 4, 2, 2, 4, 4, 8)]


@pytest.mark.parametrize("ups", [1, 2, 3])
def test_the_ways_down_and_up_may_have_other_numbers_of_blocks(ups: int, net_config: Make, shaken: Make) -> None:
    spec = level(Mixer.CONV, spatial_attention=False, text_attention=False, blocks=2, blocks_up=ups)
    net = shaken(network(net_config(levels=[spec, spec])))
    assert [len(stack) for stack in net.down] == [2, 2] and [len(stack) for stack in net.up] == [ups, ups]
    assert [block.conv1.in_channels for block in net.up[0]] == [16, 16, 8][:ups]
    assert net(*inputs()).abs().max() > 0
    if ups == 2:
        assert network(net_config(levels=[replace(spec, blocks_up=None)])).up[0][1].conv1.in_channels == 16


def test_the_scale_of_skips_is_that_of_the_weights_that_read_them(net_config: Make, shaken: Make) -> None:
    """Halved skips, read by doubled weights behind no norm, are what they were: the scale acts on skips alone."""
    spec = level(Mixer.NONE, spatial_attention=False, text_attention=False)
    whole, half = (shaken(network(net_config(levels=[spec], skip_scale=scale))) for scale in (1.0, 0.5))
    for net in (whole, half):
        net.up[0][0].conv1.weight.data.zero_()  # the branch behind the norm; `skip` reads the sum of both
    half.up[0][0].skip.weight.data[:, 8:] *= 2
    near(half(*inputs()), whole(*inputs()), 1e-5)
    whole.up[0][0].skip.weight.data[:, 8:] *= 2
    assert (half(*inputs()) - whole(*inputs())).abs().max() > 1e-3


def test_weights_that_are_older_than_a_setting_fit_where_it_is_off(net_config: Make) -> None:
    cfg = net_config(levels=[level()])
    old = plain(cfg)
    for name in YOUNG:
        del old[name]
    for name in YOUNG_IN_LEVELS:
        del old["levels"][0][name]
    checkpoint.compatible(completed(old), plain(cfg), "w")
    with pytest.raises(InputError, match=r"skip_scale is 1\.0 in the weights"):
        checkpoint.compatible(completed(old), plain(replace(cfg, skip_scale=0.5)), "w")


# segments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", [False, True])
@pytest.mark.parametrize("mixer", TIMED)
def test_segments_never_hear_of_each_other(
    mixer: Mixer, position: bool, net_config: Make, shaken: Make, one_thread: None
) -> None:
    net = shaken(network(net_config(levels=[level(mixer), level(mixer)], frame_position=position)), 0.3)
    z, t, cond = inputs(segments=[[0, 0, 1, 1], [5, 4, 4, 4]])
    other, given = z.clone(), cond.concat.clone()
    other[0, :, 2:] += 3 * draw("other", 3, 2, SIDE, SIDE)
    given[1, :, 0] = 0
    changed = (net(other, t, replace(cond, concat=given)) - net(z, t, cond)).abs().amax((1, 3, 4))
    assert changed[0, :2].tolist() == [0, 0] and changed[1, 1:].tolist() == [0, 0, 0]
    assert (changed[0, 2:] > 0).all() and changed[1, 0] > 0


@pytest.mark.parametrize("position", [False, True])
@pytest.mark.parametrize("mixer", TIMED)
def test_clips_packed_in_one_entry_are_clips_in_a_batch(
    mixer: Mixer, position: bool, net_config: Make, shaken: Make
) -> None:
    net = shaken(network(net_config(levels=[level(mixer), level(mixer)], frame_position=position)))
    z, t, cond = inputs(1, segments=[[0, 0, 0, 1]])
    first = exactly(net, z[:, :, :3], t, replace(cond.frames(0, 3), segments=None))
    second = exactly(net, z[:, :, 3:], t, replace(cond.frames(3, 4), segments=None))
    near(exactly(net, z, t, cond), torch.cat([first, second], 2), 1e-9)


@pytest.mark.parametrize("mixer", TIMED)
def test_one_segment_is_no_segments(mixer: Mixer, net_config: Make, shaken: Make) -> None:
    net = shaken(network(net_config(levels=[level(mixer)], frame_position=True)))
    z, t, cond = inputs()
    same = replace(cond, segments=torch.full((BATCH, FRAMES), 3))
    near(exactly(net, z, t, same), exactly(net, z, t, cond), 1e-9)


# sizes ---------------------------------------------------------------------------------------------------------------


def test_a_fully_convolutional_network_runs_at_any_size_and_moves_with_its_input(
    net_config: Make, shaken: Make
) -> None:
    cfg = net_config(levels=[level(spatial_attention=False), level(spatial_attention=False)], patch=2)
    assert cfg.multiple == 4 and cfg.fully_convolutional
    net = shaken(network(cfg))
    z, t, cond = inputs(1, 2, 176)  # neither the edges nor the thing reach further than 40
    z[:], cond.concat[:] = 0.2, -0.3  # an even ground: what the edges see does not change when the thing moves
    moved, beside = z.clone(), replace(cond, concat=cond.concat.clone())
    z[..., 84:88, 88:92], cond.concat[..., 86:90, 88:92] = draw("thing", 1, 3, 2, 4, 4), draw("low", 1, 3, 2, 4, 4)
    moved[..., 88:92, 84:88], beside.concat[..., 90:94, 84:88] = z[..., 84:88, 88:92], cond.concat[..., 86:90, 88:92]
    with torch.no_grad():
        here, there = exactly(net, z, t, cond), exactly(net, moved, t, beside)
        assert (here - there).abs().max() > 0.1
        near(there[..., 48:132, 44:128], here[..., 44:128, 48:132], 1e-9)
        assert exactly(net, *inputs(1, 7, 4)).shape == (1, 3, 7, 4, 4)


def test_height_and_width_need_not_be_equal(net_config: Make, shaken: Make) -> None:
    net = shaken(network(net_config(levels=[level(), level()], patch=2)))
    z, t, cond = inputs()
    wide = replace(cond, concat=cond.concat[..., :4, :])
    out = net(z[..., :4, :], t, wide)
    assert out.shape == (BATCH, 3, FRAMES, 4, SIDE)
    full = replace(wide, mask=cond.mask.expand(-1, -1, -1, 4, SIDE))
    assert torch.equal(net(z[..., :4, :], t, full), out)


def test_spatial_attention_is_not_fully_convolutional(net_config: Make) -> None:
    assert not net_config(levels=[level()]).fully_convolutional


# memory and work -----------------------------------------------------------------------------------------------------


def test_activations_stay_channels_last_and_attention_has_one_door(net_config: Make, shaken: Make) -> None:
    net = shaken(network(net_config(levels=[level(), level(channels=16)])))
    seen: list[bool] = []

    def look(module: torch.nn.Module, args: Any, out: Tensor) -> None:
        seen.append(out.is_contiguous(memory_format=torch.channels_last))

    blocks = [block for stack in (*net.down, *net.up) for block in stack] + [net.middle]
    for block in blocks:
        block.register_forward_hook(look)
    with attention.record() as kernels:
        net(*inputs())
    assert len(seen) == len(blocks) and all(seen)
    assert kernels == ["sdpa"] * 3 * len(blocks)


def gradients(net: VideoUNet, kernel: str = attention.AUTO) -> tuple[dict[str, Tensor], int]:
    z, t, cond = inputs(segments=[[0, 0, 1, 1], [0, 0, 0, 0]])
    net.zero_grad()
    with attention.use(kernel), attention.record() as kernels:
        net(z, t, cond).square().mean().backward()
    return {name: p.grad for name, p in net.named_parameters() if p.grad is not None}, len(kernels)


def test_recomputing_activations_changes_no_gradient(net_config: Make, shaken: Make, one_thread: None) -> None:
    net = shaken(network(net_config(levels=[level(), level(channels=16)], frame_position=True)))
    plain, calls = gradients(net, "reference")
    net.checkpointing = True
    again, repeated = gradients(net, "reference")
    assert repeated == 2 * calls
    assert plain.keys() == again.keys() and len(plain) > 50
    assert all(torch.equal(plain[name], again[name]) for name in plain)


def test_without_a_gradient_nothing_is_computed_twice(net_config: Make, shaken: Make) -> None:
    net = shaken(network(net_config(levels=[level()])))
    with torch.no_grad(), attention.record() as once:
        out = net(*inputs())
    net.checkpointing = True
    with torch.no_grad(), attention.record() as kernels:
        assert torch.equal(net(*inputs()), out)
    assert kernels == once


# settings ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"levels": []}, "levels is empty"),
        ({"patch": 0}, "patch is 0, expected at least 1"),
        ({"embedding": 7}, "embedding is 7, expected an even number"),
        ({"embedding": 0}, "embedding is 0, expected at least 2"),
        ({"head": 0}, "head is 0"),
        ({"text": -1}, "text is -1, expected at least 0"),
        ({"text": 0, "levels": [level()]}, "text is 0, expected the width"),
        ({"skip_scale": 0.0}, "skip_scale is 0.0"),
        ({"channels": 0}, "channels is 0"),
        ({"levels": [LevelSpec(channels=40)], "head": 12}, "head is 12, which does not divide 40 channels"),
    ],
)
def test_impossible_networks_are_refused(changes: dict[str, Any], words: str, net_config: Make) -> None:
    with pytest.raises(ValueError, match=words):
        net_config(**changes)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"channels": 12}, "multiple of 8"), ({"blocks": 0}, "at least 1"), ({"blocks_up": 0}, "blocks_up is 0")],
)
def test_impossible_levels_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        level(**changes)
