"""Laws of the blocks: views, per-frame norms, references for every mixer, segments."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import draw, near
from torch import Tensor, nn

from cascade.attention.reference import weights
from cascade.nets.layers import (
    Clip,
    FiLM,
    Norm,
    SpatialAttention,
    TemporalAttention,
    TemporalConv,
    TextAttention,
    as_video,
    from_video,
    sinusoid,
    tokens,
    untokens,
    zero,
)
from cascade.text import Text

BATCH, FRAMES, CHANNELS, HEIGHT, WIDTH, TEXT, EMBEDDING = 2, 5, 8, 3, 4, 6, 10
Shaken = Callable[..., Any]


def activations(batch: int = BATCH, frames: int = FRAMES) -> Tensor:
    h = draw("h", batch * frames, CHANNELS, HEIGHT, WIDTH)
    return h.to(memory_format=torch.channels_last)


def clip(frames: int = FRAMES, segments: list[list[int]] | None = None, batch: int = BATCH) -> Clip:
    given = None if segments is None else torch.tensor(segments)
    return Clip(batch, frames, draw("embedding", batch * frames, EMBEDDING), given)


def mixers() -> list[nn.Module]:
    return [TemporalConv(CHANNELS), TemporalAttention(CHANNELS, 4), TemporalAttention(CHANNELS, 8, reach=2)]


# layout --------------------------------------------------------------------------------------------------------------


def test_all_layouts_are_views_of_one_memory() -> None:
    h = activations()
    video = as_video(h, clip())
    assert video.shape == (BATCH, FRAMES, HEIGHT * WIDTH, CHANNELS)
    for view in (video, tokens(h), from_video(video, HEIGHT, WIDTH), untokens(tokens(h), h)):
        assert view.data_ptr() == h.data_ptr()
    assert torch.equal(from_video(video, HEIGHT, WIDTH), h) and torch.equal(untokens(tokens(h), h), h)
    assert torch.equal(video[1, 2, 1 * WIDTH + 3], h[FRAMES + 2, :, 1, 3])


def test_every_block_keeps_the_memory_channels_last(shaken: Shaken) -> None:
    for layer in (*mixers(), SpatialAttention(CHANNELS, 4), FiLM(CHANNELS, EMBEDDING)):
        for segments in (None, [[0, 0, 0, 1, 1]] * BATCH):
            out = shaken(layer)(activations(), clip(segments=segments))
            assert out.is_contiguous(memory_format=torch.channels_last)


def test_sinusoid_runs_from_one_radian_to_its_longest_wave() -> None:
    waves = sinusoid(torch.tensor([0.0, 1.0, 7.5]), 12, 1e4)
    near(waves[:, :6].square() + waves[:, 6:].square(), torch.ones(3, 6), 1e-5)
    assert torch.equal(waves[0], torch.tensor([1.0] * 6 + [0.0] * 6))
    near(waves[2, 6:], torch.sin(7.5 / torch.logspace(0, 4, 6)), 1e-5)


def test_zero_leaves_nothing_but_zeros() -> None:
    layer = zero(nn.Linear(3, 4))
    assert not layer(draw("x", 2, 3)).any()
    assert zero(nn.Linear(3, 4, bias=False)).bias is None


# frames alone --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [8, 12, 40])
def test_norm_sees_one_frame_in_at_most_eight_groups(channels: int, one_thread: None) -> None:
    norm = Norm(channels)
    assert norm.num_groups <= 8 and channels % norm.num_groups == 0
    h = draw("norm", 3, channels, 4, 4)
    other = h.clone()
    other[1] *= 7
    changed = (norm(other) - norm(h)).flatten(1).abs().amax(1)
    assert changed[0] == 0 and changed[2] == 0
    near(norm(h).unflatten(1, (norm.num_groups, -1)).flatten(2).mean(2), torch.zeros(3, norm.num_groups), 1e-5)


def test_film_is_the_norm_at_first_and_reads_each_frames_embedding(shaken: Shaken) -> None:
    film, h = FiLM(CHANNELS, EMBEDDING), activations()
    assert torch.equal(film(h, clip()), film.norm(h))
    shaken(film)
    scale, shift = film.affine(clip().embedding).chunk(2, 1)
    near(film(h, clip()), film.norm(h) * (1 + scale[:, :, None, None]) + shift[:, :, None, None], 1e-5)


@pytest.mark.parametrize("head", [4, 8])
def test_spatial_attention_is_attention_over_all_tokens_of_the_same_frame(head: int, shaken: Shaken) -> None:
    layer, h = shaken(SpatialAttention(CHANNELS, head)), activations()
    q, k, v = layer.qkv(tokens(layer.norm(h))).reshape(BATCH, -1, 3, layer.heads, CHANNELS // layer.heads).unbind(2)
    frame = torch.arange(FRAMES).repeat_interleave(HEIGHT * WIDTH)
    mask = torch.zeros(len(frame), len(frame)).masked_fill(frame[:, None] != frame, -math.inf)
    dense = torch.einsum("bhmn,bnhd->bmhd", weights(q, k, mask), v)
    near(layer(h, clip()), h + untokens(layer.out(dense.reshape(BATCH * FRAMES, -1, CHANNELS)), h), 1e-5)


# text ----------------------------------------------------------------------------------------------------------------


def prompts(length: int = 3) -> Text:
    mask = torch.arange(length) < torch.tensor([[length], [2]])
    return Text(draw("tokens", BATCH, length, TEXT), mask)


def test_text_attention_reads_the_real_tokens_and_the_null_token(shaken: Shaken) -> None:
    layer, h, text = shaken(TextAttention(CHANNELS, 4, TEXT)), activations(), prompts()
    out = layer(h, clip(), text)
    for b, real in enumerate((3, 2)):
        context = torch.cat([layer.null[0], text.tokens[b, :real]])
        k, v = layer.kv(context).view(1, real + 1, 2, layer.heads, -1).unbind(2)
        mine = h[b * FRAMES : (b + 1) * FRAMES]
        q = layer.q(tokens(layer.norm(mine))).reshape(1, -1, layer.heads, CHANNELS // layer.heads)
        dense = torch.einsum("bhmn,bnhd->bmhd", weights(q, k, None), v)
        near(
            out[b * FRAMES : (b + 1) * FRAMES],
            mine + untokens(layer.out(dense.reshape(FRAMES, -1, CHANNELS)), mine),
            1e-5,
        )


def test_what_a_dropped_prompt_said_changes_nothing(shaken: Shaken) -> None:
    layer, h = shaken(TextAttention(CHANNELS, 4, TEXT)), activations()
    silent = torch.zeros(BATCH, 3, dtype=torch.bool)
    said, empty = Text(draw("loud", BATCH, 3, TEXT) * 100, silent), Text.empty(BATCH, 3, TEXT)
    assert torch.equal(layer(h, clip(), said), layer(h, clip(), empty))


def test_padding_changes_nothing(shaken: Shaken) -> None:
    layer, h = shaken(TextAttention(CHANNELS, 4, TEXT)), activations()
    near(layer(h, clip(), prompts().pad(9)), layer(h, clip(), prompts()), 1e-6)


# time ----------------------------------------------------------------------------------------------------------------


def test_temporal_convolution_is_conv1d_at_every_position_and_conv3d(shaken: Shaken) -> None:
    layer, h = shaken(TemporalConv(CHANNELS)), activations()
    x = F.silu(layer.norm(h)).unflatten(0, (BATCH, FRAMES))  # (B, F, C, H, W)
    rows = x.permute(0, 3, 4, 2, 1).reshape(-1, CHANNELS, FRAMES)
    line = F.conv1d(rows, layer.conv.weight[..., 0], layer.conv.bias, padding=1)
    line = line.view(BATCH, HEIGHT, WIDTH, CHANNELS, FRAMES).permute(0, 4, 3, 1, 2).flatten(0, 1)
    near(layer(h, clip()), h + line, 1e-5)
    cube = F.conv3d(x.transpose(1, 2), layer.conv.weight[..., None], layer.conv.bias, padding=(1, 0, 0))
    near(layer(h, clip()), h + cube.transpose(1, 2).flatten(0, 1), 1e-5)


@pytest.mark.parametrize("frames", [1, 2, 7])
@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("reach", [2, 32])
def test_temporal_attention_is_masked_attention_over_all_tokens(
    frames: int, segmented: bool, reach: int, shaken: Shaken
) -> None:
    layer, h = shaken(TemporalAttention(CHANNELS, 4, reach), 0.5), activations(frames=frames)
    ids = torch.arange(frames) // 2 if segmented else torch.zeros(frames, dtype=torch.long)
    x = tokens(layer.norm(h)).reshape(BATCH, -1, CHANNELS)
    q, k, v = (f(x).view(BATCH, -1, layer.heads, CHANNELS // layer.heads) for f in (layer.q, layer.k, layer.v))
    frame, place = (
        torch.arange(frames * HEIGHT * WIDTH) // (HEIGHT * WIDTH),
        torch.arange(HEIGHT * WIDTH).repeat(frames),
    )
    distance = (frame[None, :] - frame[:, None]).clamp(-reach, reach) + reach
    illegal = (place[None, :] != place[:, None]) | (ids[frame][None, :] != ids[frame][:, None])
    bias = layer.distance[:, distance].masked_fill(illegal, -math.inf)
    dense = torch.einsum("bhmn,bnhd->bmhd", weights(q, k, bias), v).reshape(BATCH * frames, -1, CHANNELS)
    where = clip(frames, [ids.tolist()] * BATCH if segmented else None)
    near(layer(h, where), h + untokens(layer.out(dense), h), 1e-5)


def test_the_bias_knows_distances_alone_and_runs_beyond_its_reach(shaken: Shaken) -> None:
    layer = shaken(TemporalAttention(CHANNELS, 8, reach=2))
    bias = layer.bias(clip(9))[0, 0]
    assert torch.equal(bias[1:, 1:], bias[:-1, :-1])
    assert (bias[0, 2:] == bias[0, 2]).all() and bias[0, 2] != bias[0, 1] != bias[1, 0]


@pytest.mark.parametrize("mixer", [0, 1, 2])
def test_frames_may_be_counted_from_anywhere(mixer: int, shaken: Shaken) -> None:
    layer, h = shaken(mixers()[mixer]), activations(1)
    alone = layer(h[2:], clip(3, batch=1))
    moved = layer(h, clip(segments=[[7, 7, 4, 4, 4]], batch=1))[2:]
    near(moved, alone, 1e-6)


@pytest.mark.parametrize("mixer", [0, 1, 2])
def test_nothing_crosses_the_border_of_a_segment(mixer: int, shaken: Shaken, one_thread: None) -> None:
    layer, h, where = shaken(mixers()[mixer], 0.5), activations(), clip(segments=[[0, 0, 1, 1, 1], [3, 2, 2, 2, 1]])
    other = h.clone()
    other[2:5] = draw("other", 3, CHANNELS, HEIGHT, WIDTH) * 10  # entry 0, segment 1
    other[6:9] += 5  # entry 1, segment 2
    changed = (layer(other, where) - layer(h, where)).flatten(1).abs().amax(1)
    assert (changed[[0, 1, 5, 9]] == 0).all() and (changed[[2, 3, 4, 6, 7, 8]] > 0).all()


@pytest.mark.parametrize("mixer", [0, 1, 2])
def test_one_segment_is_no_segments(mixer: int, shaken: Shaken) -> None:
    layer, h = shaken(mixers()[mixer]), activations()
    near(layer(h, clip(segments=[[5] * FRAMES] * BATCH)), layer(h, clip()), 1e-5)


def test_mixers_see_other_frames_unless_told_not_to(shaken: Shaken) -> None:
    for layer in map(shaken, mixers()):
        together, apart = clip(), clip(segments=[list(range(FRAMES))] * BATCH)
        alone = torch.cat([layer(frame[None], clip(1, batch=1)) for frame in activations()])
        near(layer(activations(), apart), alone, 1e-5)
        assert (layer(activations(), together) - alone).abs().max() > 1e-3


def test_every_residual_branch_begins_as_the_identity() -> None:
    h = activations()
    for layer in (*mixers(), SpatialAttention(CHANNELS, 4)):
        assert torch.equal(layer(h, clip()), h)
    assert torch.equal(TextAttention(CHANNELS, 4, TEXT)(h, clip(), prompts()), h)
    for layer in mixers():
        assert torch.equal(layer(h, clip(segments=[[0, 1, 1, 2, 2]] * BATCH)), h)
