"""LaVie's super-resolution: its blocks written out, its network against diffusers' and its authors' numbers.

Weights are drawn with a standard deviation of 0.1 or more.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_unet3d import TIMES, image_model, inputs, named, near, on_meta, size, uniform, vsr, weighted
from torch import Tensor, nn

from cascade.nets.unet3d import UNet3D
from cascade.nets.unet3d_around import FrameResnet, Shift
from cascade.nets.unet3d_blocks import Told
from cascade.nets.unet3d_config import Time

EPS = 1e-6


# sizes ---------------------------------------------------------------------------------------------------------------


# SHA-256 of the JSON of all [name, shape], sorted, as the authors' code builds it from its unet_3d_config.json.
NAMES = "3bc62c2013322f6d0864c4bcc1648c58a929f019b21a5a66417fc24292b93432"


def test_names_and_shapes_are_those_of_its_authors() -> None:
    state = on_meta(named("lavie/vsr")).state_dict()
    shapes = {name: list(tensor.shape) for name, tensor in state.items()}
    assert shapes["conv_in.weight"] == [256, 7, 3, 3] and shapes["class_embedding.weight"] == [1000, 1024]
    assert shapes["mid_temporal_block.resblocks_3d_t.conv1.weight"] == [1024, 1024, 5, 1, 1]
    assert hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest() == NAMES


def test_what_time_adds_is_named_so_and_the_rest_is_the_image_model() -> None:
    cfg = named("lavie/vsr")
    video = on_meta(cfg).state_dict()
    image = on_meta(replace(cfg, time=Time.NONE, rotary=0, buckets=0)).state_dict()
    rest = {name: tensor.shape for name, tensor in video.items() if "temporal" not in name}
    assert rest == {name: tensor.shape for name, tensor in image.items()}


# blocks, written out -------------------------------------------------------------------------------------------------


def clip_norm(x: Tensor, norm: nn.GroupNorm) -> Tensor:
    """Of one clip (C, F, H, W), group by group."""
    out = torch.empty_like(x)
    for g in range(norm.num_groups):
        part = slice(g * len(x) // norm.num_groups, (g + 1) * len(x) // norm.num_groups)
        mean = x[part].mean()
        out[part] = (x[part] - mean) / ((x[part] - mean).square().mean() + EPS).sqrt()
    return out * norm.weight.view(-1, 1, 1, 1) + norm.bias.view(-1, 1, 1, 1)


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def along_time(x: Tensor, conv: nn.Conv3d) -> Tensor:
    """Frame f of the result hears frames f - k // 2 to f + k // 2 of (C, F, H, W), each through a matrix of its own."""
    k, frames = conv.weight.shape[2], x.shape[1]
    out = []
    for f in range(frames):
        heard = [(i, f + i - k // 2) for i in range(k) if 0 <= f + i - k // 2 < frames]
        out.append(sum(torch.einsum("oc,chw->ohw", conv.weight[:, :, i, 0, 0], x[:, g]) for i, g in heard))
    return torch.stack(out, 1) + conv.bias.view(-1, 1, 1, 1)  # type: ignore[union-attr]


def within_frames(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """A 3x3 (or 1x1) convolution of every frame of (C, F, H, W), tap by tap."""
    k, height, width = conv.weight.shape[2], *x.shape[2:]
    padded = F.pad(x, (k // 2,) * 4)
    taps = [(i, j) for i in range(k) for j in range(k)]
    parts = [
        torch.einsum("oc,cfhw->ofhw", conv.weight[:, :, i, j], padded[:, :, i : i + height, j : j + width])
        for i, j in taps
    ]
    return sum(parts) + conv.bias.view(-1, 1, 1, 1)  # type: ignore[union-attr, return-value]


def residual(block: Any, x: Tensor, embedding: Tensor | None, convolved: Any) -> Tensor:
    """x + conv2(silu(norm(conv1(silu(norm(x))) + W silu(embedding) + b)))."""
    first, second = convolved
    h = first(silu(clip_norm(x, block.norm1)), block.conv1)
    if embedding is not None:
        h = h + (block.time_emb_proj.weight @ silu(embedding) + block.time_emb_proj.bias).view(-1, 1, 1, 1)
    return x + second(silu(clip_norm(h, block.norm2)), block.conv2)


def clips(batch: int = 2, frames: int = 6, c: int = 32) -> tuple[Tensor, Told]:
    """Activations (B*F, C, H, W), and the embedding of each clip."""
    h = uniform(5, batch * frames, c, 3, 4).contiguous(memory_format=torch.channels_last)
    embedding = uniform(6, batch, 12).repeat_interleave(frames, 0)
    return h, Told(batch, frames, embedding, None, torch.empty(0))


def each_clip(h: Tensor, told: Told, run: Any) -> Tensor:
    video = h.unflatten(0, (told.batch, told.frames)).transpose(1, 2)
    out = [run(x, told.embedding[b * told.frames]) for b, x in enumerate(video)]
    return torch.stack(out).transpose(1, 2).flatten(0, 1)


@pytest.mark.parametrize(("frames", "told"), [(3, False), (5, True)], ids=["before a transformer", "in a correction"])
def test_a_residual_block_along_time_written_out(frames: int, told: bool) -> None:
    block = weighted(FrameResnet(32, vsr(embedding=12, groups=16), frames, told), std=0.3)
    h, clip = clips()

    def dense(x: Tensor, embedding: Tensor) -> Tensor:
        return residual(block, x, embedding if told else None, (along_time, along_time))

    near(block(h, clip) - h, each_clip(h, clip, dense) - h, 1e-9)


def test_a_correction_written_out() -> None:
    shift = weighted(Shift(32, vsr(embedding=12)), std=0.3)
    h, clip = clips()

    def dense(x: Tensor, embedding: Tensor) -> Tensor:
        y = residual(shift.resblocks_3d_t, x, embedding, (along_time, along_time))
        y = residual(shift.resblocks_3d_s, y, embedding, (within_frames, within_frames))
        return x + within_frames(y, shift.shift_conv)

    near(shift(h, clip) - h, each_clip(h, clip, dense) - h, 1e-9)


# the network ---------------------------------------------------------------------------------------------------------

# What mixes frames ends in these.
LAST = ("attn_temporal.to_out", "resblock_temporal.conv2", "shift_conv")


def test_without_its_temporal_parts_it_is_the_x4_upscaler_of_diffusers() -> None:
    cfg = vsr(shared_norm=False)
    net, theirs = weighted(UNet3D(cfg)), image_model(cfg).double().eval()
    for name, tensor in net.state_dict().items():
        if any(last in name for last in LAST):
            tensor.zero_()
    theirs.load_state_dict({name: tensor for name, tensor in net.state_dict().items() if "temporal" not in name})
    x, t, text, level = inputs(cfg)
    frames = [theirs(frame, t, text, class_labels=level).sample.detach() for frame in x.unbind(2)]
    near(net.run(x, t, text, level), torch.stack(frames, 2))


@pytest.mark.parametrize("last", LAST)
def test_each_temporal_part_counts_and_hears_other_frames(last: str) -> None:
    net = weighted(UNet3D(vsr(shared_norm=False)))
    x, *rest = inputs(vsr())
    moved = x.clone()
    moved[:, :, 0] += 1
    for name, tensor in net.state_dict().items():
        if any(other in name for other in LAST if other != last):
            tensor.zero_()
    change = (net.run(moved, *rest) - net.run(x, *rest)).abs().amax((0, 1, 3, 4))
    assert change.min() > 1e-5


def test_a_noise_level_is_told_as_the_nearest_of_its_table() -> None:
    net = weighted(UNet3D(vsr()))
    x, t, text, _ = inputs(vsr())
    got = [net.run(x, t, text, torch.tensor([level, level])) for level in (50.0, 49.7, 50.4, 51.0)]
    assert torch.equal(got[0], got[1]) and torch.equal(got[0], got[2])
    assert (got[3] - got[0]).abs().max() > 1e-3


def test_it_gives_the_numbers_of_its_authors() -> None:
    """Their code, run once with these weights in float64."""
    net = weighted(UNet3D(vsr()))
    assert (len(net.state_dict()), size(net)) == (601, 4_455_876)
    out = net.run(uniform(1001, 2, 7, 5, 16, 24), TIMES, uniform(1002, 2, 7, 32), torch.tensor([50, 250]))
    got = (out.mean(), out.std(), out.flatten()[0], out.flatten()[-1])
    assert [float(number) for number in got] == pytest.approx(
        [-0.24708902, 0.92042442, -0.05379067, -0.61269091], abs=1e-6
    )
