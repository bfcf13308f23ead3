"""Laws of windows: they cover the video, one window is one call, what does not look around is not changed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from cascade.cond import Cond
from cascade.errors import ConfigError
from cascade.noise import Noise, generator, sample_id
from cascade.sampling.sampler import Sampler
from cascade.text import Text
from cascade.video import Shape, Video
from cascade.windows import Join, Windows, ramp, windowed

Make = Callable[..., Any]


def clip(frames: int, rate: int = 1) -> tuple[Tensor, Cond]:
    z = torch.randn(2, 3, frames, 2, 2, generator=generator("z", frames))
    concat = torch.randn(2, 3, frames, 2, 2, generator=generator("concat", frames))
    mask = (torch.arange(frames) % rate == 0).float().view(1, 1, -1, 1, 1).expand(2, -1, -1, -1, -1)
    return z, Cond(concat, mask, torch.zeros(2), torch.ones(2), Text.empty(2, 1, 4))


def per_frame(z: Tensor, cond: Cond) -> Tensor:
    return torch.sin(z * 3) + cond.concat * (1 + cond.mask)


@st.composite
def plans(draw: st.DrawFn) -> tuple[int, Windows, int]:
    rate = draw(st.integers(1, 4))
    frames = draw(st.integers(max(2, rate), 20))
    return draw(st.integers(1, 70)), Windows(frames=frames, overlap=draw(st.integers(0, frames - 1))), rate


@settings(max_examples=40, deadline=None)
@given(plans())
def test_windows_cover_the_video_and_begin_at_known_frames(plan: tuple[int, Windows, int]) -> None:
    total, windows, rate = plan
    starts = windows.starts(total, rate)
    stops = [start + windows.frames for start in starts[:-1]] + [total]
    assert starts[0] == 0 and starts == sorted(set(starts))
    assert all(start % rate == 0 for start in starts)
    least = min(windows.overlap, windows.frames - rate)
    assert all(stop - start >= least for start, stop in zip(starts[1:], stops, strict=False))
    assert all(stop <= total for stop in stops)
    if len(starts) > 1:
        assert windows.frames <= total - starts[-1] < windows.frames + rate


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 12), st.integers(0, 11))
def test_windows_that_extend_make_every_frame_once_and_see_what_is_before_it(
    known: list[bool], frames: int, overlap: int
) -> None:
    windows, done = Windows(frames=frames, overlap=min(overlap, frames - 1), rule=Join.EXTEND), list(known)
    for start in windows.unmade(torch.tensor(known)):
        first = done.index(False)
        assert 0 <= start <= max(0, len(known) - frames) and start <= first < start + frames
        assert first - start >= min(first, windows.overlap)
        done[start : start + frames] = [True] * len(done[start : start + frames])
    assert all(done)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 70), st.integers(1, 20))
def test_windows_apart_hold_every_frame_once_and_the_last_is_as_short_as_it_must_be(total: int, frames: int) -> None:
    windows = Windows(frames=frames, rule=Join.APART)
    spans = windows.spans(total)
    assert [f for first, end in spans for f in range(first, end)] == list(range(total))
    assert {end - first for first, end in spans[:-1]} <= {frames} and 0 < spans[-1][1] - spans[-1][0] <= frames
    assert windows.borders(total) == list(range(frames, total, frames))


def test_windows_apart_do_not_part_frames_that_are_made_of_one() -> None:
    windows = Windows(frames=6, rule=Join.APART)
    assert windows.spans(16, 2) == [(0, 6), (6, 12), (12, 16)]
    with pytest.raises(ConfigError, match="windows of 6 frames side by side part the 4 frames that are made of one"):
        windows.spans(16, 4)


@settings(max_examples=40, deadline=None)
@given(plans())
def test_borders_are_where_other_windows_see_a_frame(plan: tuple[int, Windows, int]) -> None:
    total, windows, rate = plan
    starts = windows.starts(total, rate)
    stops = [start + windows.frames for start in starts[:-1]] + [total]
    seen = [[start <= f < stop for start, stop in zip(starts, stops, strict=True)] for f in range(total)]
    assert windows.borders(total, rate) == [f for f in range(1, total) if seen[f] != seen[f - 1]]
    assert Windows().borders(total, rate) == []


@settings(max_examples=40, deadline=None)
@given(plans())
def test_a_denoiser_of_single_frames_is_not_changed(plan: tuple[int, Windows, int]) -> None:
    total, windows, rate = plan
    z, cond = clip(total, rate)
    expected = per_frame(z, cond)
    apart = (windowed(per_frame, z, cond, windows, rate) - expected).abs().max()
    assert apart <= 1e-6 * expected.abs().max()  # a mean over as many windows as there are frames rounds that often


@settings(max_examples=40, deadline=None)
@given(plans())
def test_every_window_sees_its_part_of_everything(plan: tuple[int, Windows, int]) -> None:
    total, windows, rate = plan
    z, cond = clip(total, rate)
    starts, seen = windows.starts(total, rate), []

    def look(part: Tensor, told: Cond) -> Tensor:
        start, stop = starts[len(seen)], starts[len(seen)] + part.shape[2]
        assert torch.equal(part, z[:, :, start:stop]) and torch.equal(told.concat, cond.concat[:, :, start:stop])
        assert told.mask[0, 0, 0] == 1 and torch.equal(told.mask, cond.mask[:, :, start:stop])
        seen.append(stop)
        return part

    windowed(look, z, cond, windows, rate)
    assert len(seen) == len(starts) and seen[-1] == total


@pytest.mark.parametrize("windows", [Windows(), Windows(frames=9, overlap=3), Windows(frames=6)])
def test_one_window_is_one_call_bit_for_bit(windows: Windows) -> None:
    z, cond = clip(6)
    calls = []

    def whole(part: Tensor, told: Cond) -> Tensor:
        calls.append(part is z and told is cond)
        return part + torch.roll(part, 1, 2) / 3

    assert torch.equal(windowed(whole, z, cond, windows), z + torch.roll(z, 1, 2) / 3) and calls == [True]


@settings(deadline=None)
@given(st.integers(2, 20), st.integers(0, 19), st.booleans(), st.booleans())
def test_weights_are_positive_and_one_at_the_videos_own_ends(
    frames: int, overlap: int, first: bool, last: bool
) -> None:
    weight = ramp(frames, min(overlap, frames - 1), first, last)
    assert weight.min() > 0 and weight.max() <= 1
    assert torch.equal(ramp(frames, min(overlap, frames - 1), last, first), weight.flip(0))
    if first and last:
        assert torch.equal(weight, torch.ones(frames))


def test_neighbours_weights_sum_to_one_where_two_overlap() -> None:
    both = ramp(8, 3, True, False)[5:] + ramp(8, 3, False, True)[:3]
    assert torch.allclose(both, torch.ones(3))


def test_the_noise_of_a_frame_is_the_same_in_every_window() -> None:
    noise = Noise(3, "tsr", (sample_id("a"),))
    whole = noise((1, 3, 10, 2, 2), 4, "step")
    for start in Windows(frames=4, overlap=2).starts(10):
        assert torch.equal(noise.window(start)((1, 3, 4, 2, 2), 4, "step"), whole[:, :, start : start + 4])


class Counting:
    """Noise that counts the frames that are drawn of it."""

    def __init__(self, noise: Noise, drawn: list[int]) -> None:
        self.noise, self.drawn = noise, drawn

    def __call__(self, shape: Sequence[int], step: int, purpose: str) -> Tensor:
        self.drawn.append(shape[2])
        return self.noise(shape, step, purpose)

    def window(self, start: int) -> Counting:
        return Counting(self.noise.window(start), self.drawn)


@pytest.mark.parametrize("kind", ["base", "ssr"])
def test_windows_in_turn_draw_their_own_frames_noise_and_no_more(kind: str, make_stage: Make, encode: Make) -> None:
    """A window gets its slice of the whole video's noise, and what is drawn grows with the video."""
    join = Join.EXTEND if kind == "base" else Join.OVERWRITE
    windows, counts = Windows(frames=4, overlap=2, rule=join), []
    for total in (6, 10, 18):
        shape, drawn, seen = Shape(frames=total, height=8, width=8), list[int](), list[Tensor]()
        stage = make_stage(kind, shape=shape, windows=windows, sampler=Sampler(steps=1), augment=0.1)
        noise = Noise(3, kind, (sample_id("a"),))
        stage.net.register_forward_pre_hook(lambda _, told, seen=seen: seen.append(told[0]))
        low = None if kind == "base" else Video(torch.zeros(1, 3, total, 4, 4), 8.0)
        stage.sample(low, encode(["a"]), None, Counting(noise, drawn))
        whole = noise((1, 3, total, 8, 8), 0, "start")
        for start, z in zip(range(0, total - 2, 2), seen, strict=True):
            assert torch.equal(z, whole[:, :, start : start + 4])
        counts.append(sum(drawn))
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0]) > 0


@pytest.mark.parametrize(
    "wrong", [{"frames": -1}, {"frames": 4, "overlap": 4}, {"overlap": 1}, {"frames": 4, "overlap": -1}]
)
def test_impossible_windows_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected 0 <= overlap < frames"):
        Windows(**wrong)


def test_windows_shorter_than_the_way_between_known_frames_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"windows\.frames is 2, less than the 3 frames"):
        Windows(frames=2).starts(10, 3)
    assert Windows(frames=2).starts(2, 3) == [0]


def test_what_a_denoiser_says_beside_x_hat_is_averaged_too() -> None:
    z, cond = clip(9)
    windows = Windows(frames=4, overlap=2)

    def both(z: Tensor, cond: Cond) -> Tensor:
        return torch.cat([per_frame(z, cond), torch.cos(z)], 1)

    got = windowed(both, z, cond, windows)
    assert (got - both(z, cond)).abs().max() <= 1e-6


@pytest.mark.parametrize(
    ("windows", "total", "rate", "spans"),
    [
        (Windows(frames=8, overlap=1, rule=Join.CHAINED), 29, 1, [(0, 8), (7, 15), (14, 22), (21, 29)]),
        (Windows(frames=5, overlap=1, rule=Join.OVERWRITE), 13, 4, [(0, 5), (4, 9), (8, 13)]),
        (Windows(frames=3, rule=Join.OVERWRITE), 6, 1, [(0, 3), (3, 6)]),
        (Windows(frames=1, rule=Join.FIRST), 29, 1, [(0, 1)]),
        (Windows(frames=4), 9, 1, [(0, 9)]),
    ],
)
def test_windows_in_turn_fill_the_clip(windows: Windows, total: int, rate: int, spans: list[tuple[int, int]]) -> None:
    assert windows.spans(total, rate) == spans
    inner = {frame for span in spans for frame in span} - {0, total}
    assert windows.borders(total, rate) == sorted(inner) or not windows.in_turn


@pytest.mark.parametrize("total", [7, 28, 30, 35])
def test_a_tail_that_no_window_fills_is_refused(total: int) -> None:
    with pytest.raises(
        ConfigError, match=f"windows of 8 frames, 7 on from one to the next, do not fill {total} frames"
    ):
        Windows(frames=8, overlap=1, rule=Join.CHAINED).spans(total)
