"""Laws of the type that passes between stages, for both conventions of frame counts."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cascade.errors import ConfigError
from cascade.noise import generator
from cascade.video import Fill, Shape, Video, resize, spread


def draw(frames: int, height: int = 4, width: int = 6) -> Tensor:
    return torch.rand(2, 3, frames, height, width, generator=generator("video", frames, height, width)) * 2 - 1


def test_a_shape_says_itself_and_refuses_nothing_less_than_one() -> None:
    assert str(Shape(frames=8, height=32, width=48)) == "8x32x48"
    assert Video(draw(5), 4.0).shape == Shape(frames=5, height=4, width=6)
    for name in ("frames", "height", "width"):
        with pytest.raises(ValueError, match=f"{name} is 0, expected at least 1"):
            Shape(**({"frames": 1, "height": 1, "width": 1} | {name: 0}))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5))
def test_every_undoes_spread_in_both_conventions(given_frames: int, k: int) -> None:
    x = draw(given_frames)
    for frames in {given_frames * k, (given_frames - 1) * k + 1}:
        whole, mask = spread(x, k, frames)
        assert whole.shape == (2, 3, frames, 4, 6) and mask.shape == (2, 1, frames, 1, 1)
        assert torch.equal(Video(whole, 8.0).every(k).frames, x)  # known frames come out bit for bit
        assert torch.equal(mask[0, 0, :, 0, 0], (torch.arange(frames) % k == 0).float())
        assert Video(whole, 8.0).every(k).fps == 8.0 / k


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 6), st.integers(2, 5))
def test_between_known_frames_stands_their_blend_and_after_the_last_its_copy(given_frames: int, k: int) -> None:
    x = torch.arange(float(given_frames)).view(1, 1, -1, 1, 1).expand(1, 3, -1, 2, 2)
    line = spread(x, k, given_frames * k)[0][0, 0, :, 0, 0]
    assert torch.allclose(line, (torch.arange(given_frames * k) / k).clamp(max=given_frames - 1))


@pytest.mark.parametrize("frames", [7, 9])
def test_gaps_are_filled_as_asked(frames: int) -> None:
    x = draw(3)
    (blend, mask), (repeat, _), (blank, _) = (spread(x, 3, frames, fill) for fill in Fill)
    assert mask[0, 0, :, 0, 0].tolist() == [1, 0, 0, 1, 0, 0, 1, 0, 0][:frames]
    for filled in (blend, repeat, blank):
        assert torch.equal(filled[:, :, ::3], x)
    assert torch.equal(repeat, x.repeat_interleave(3, 2)[:, :, :frames]) and torch.equal(blank, repeat * mask)


@pytest.mark.parametrize("frames", [5, 6, 10, 16])
def test_a_frame_count_of_neither_convention_is_refused(frames: int) -> None:
    with pytest.raises(ConfigError, match=f"3 frames spread by 3 fill 7 to 9 frames, not {frames}"):
        spread(draw(3), 3, frames)


def test_a_size_that_is_right_is_left_alone() -> None:
    x = draw(2)
    assert resize(x, 4, 6) is x


@pytest.mark.parametrize("size", [(8, 12), (2, 3), (5, 7), (8, 3)])
def test_resizing_sees_one_frame_and_stays_in_range(size: tuple[int, int]) -> None:
    x = draw(3).sign()  # bicubic overshoots at edges as hard as these
    out = resize(x, *size)
    assert out.shape == (2, 3, 3, *size) and out.abs().max() <= 1
    for f in range(3):
        assert torch.allclose(resize(x[:, :, f : f + 1], *size), out[:, :, f : f + 1], atol=1e-6)
    flat = torch.full((1, 3, 2, 4, 6), 0.3)
    assert torch.allclose(resize(flat, *size), torch.full((1, 3, 2, *size), 0.3), atol=1e-6)


def test_shrinking_averages_instead_of_picking() -> None:
    board = (torch.arange(16)[:, None] + torch.arange(16)) % 2 * 2.0 - 1  # a checkerboard is grey from afar
    assert resize(board.expand(1, 3, 1, 16, 16), 4, 4).abs().max() < 0.1


def test_a_video_keeps_its_rate_and_its_known_frames() -> None:
    known = torch.tensor([[True, False]] * 2)
    video = Video(draw(2), 12.5, known)
    for moved in (video.to("cpu"), video.resize(8, 8)):
        assert moved.fps == 12.5 and moved.known is not None and torch.equal(moved.known, known)
    assert Video(draw(2), 12.5).to("cpu").known is None
