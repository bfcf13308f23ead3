"""Laws of how well outlines are drawn: perfect in real clips at any size, less the more dented, whatever is asked."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cascade.data.captions import SHAPES, parse
from cascade.metrics.attributes import judge as read
from cascade.metrics.outline import judge
from tests.test_attributes import clips


def iou(frames: Tensor, caption: str = "a large red circle stands still on a black background") -> float:
    return float(judge(frames, [parse(caption)] * len(frames))["iou"].mean())


def wavy(depth: float, waves: int = 7, size: int = 48, frames: int = 4) -> Tensor:
    """A red disc whose radius waves by `depth` around its outline, drawn by counting points, (1, 3, F, H, W)."""
    fine = 4 * size
    place = (torch.arange(fine) + 0.5) / fine - 0.5
    y, x = torch.meshgrid(place, place, indexing="ij")
    radius = 0.25 * (1 + depth * torch.sin(waves * torch.atan2(y, x)))
    share = (x.hypot(y) < radius).float().unflatten(0, (size, 4)).unflatten(2, (size, 4)).mean((1, 3))
    red = torch.stack([2 * share - 1, share * 0 - 1, share * 0 - 1])
    return red[None, :, None].expand(-1, -1, frames, -1, -1)


@pytest.mark.parametrize(("size", "count"), [(32, 24), (64, 12), (128, 6)])
def test_real_outlines_are_perfect_at_any_size(size: int, count: int) -> None:
    frames, specs = clips(count, size=size)
    assert float(judge(frames, specs)["iou"].mean()) > 0.97


def test_every_shape_has_an_outline() -> None:
    frames, specs = clips(60)
    found = judge(frames, specs)["iou"]
    for shape in SHAPES:
        mine = [i for i, spec in enumerate(specs) if spec.things[0].shape == shape]
        assert mine and float(found[mine].mean()) > 0.95


def test_the_deeper_the_dents_the_less_is_covered() -> None:
    """Of a disc whose radius waves by a depth d, 2 d / pi of its area lies on the wrong side of the mean's outline."""
    found = [iou(wavy(depth)) for depth in (0.0, 0.05, 0.1, 0.2)]
    assert found[0] > 0.97 and found == sorted(found, reverse=True)
    wrong = 2 * 0.1 / math.pi
    assert found[2] == pytest.approx((1 - wrong) / (1 + wrong), abs=0.03)


def test_a_dented_circle_is_still_a_circle() -> None:
    """What attributes do not see."""
    frames, spec = wavy(0.1), parse("a large red circle stands still on a black background")
    assert read(frames, [spec])["all"].item() and iou(frames) < 0.93


def test_the_prompt_says_how_many_things_count_and_nothing_else() -> None:
    frames, specs = clips(6)
    other = [replace(spec, background="gray") for spec in reversed(specs)]
    assert torch.equal(judge(frames, specs)["iou"], judge(frames, other)["iou"])


def test_where_nothing_is_seen_nothing_is_told() -> None:
    assert judge(-torch.ones(1, 3, 4, 32, 32), [parse("a small red star moves up on a black background")])[
        "iou"
    ].isnan()


def test_two_things_count_alike() -> None:
    frames, specs = clips(12, two=1.0)
    assert float(judge(frames, specs)["iou"].mean()) > 0.93


def test_where_a_thing_is_does_not_matter() -> None:
    frames = wavy(0.1)
    assert iou(frames.roll((5, -3), (3, 4))) == pytest.approx(iou(frames), abs=0.01)
