"""Laws of the distance of patches: of sets, along directions that flat areas do not have, exact where it is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from cascade.distillation import patches
from cascade.noise import generator


def drawn(*shape: int, key: str = "clips") -> Tensor:
    return torch.randn(shape, generator=generator("patches", key), dtype=torch.float64)


NOISE = drawn(6, 3, 4, 12, 12, key="noise")


def test_a_set_has_no_order() -> None:
    clips = drawn(6, 3, 4, 12, 12)
    assert patches.distance(clips, clips[[3, 1, 5, 0, 2, 4]], NOISE) == 0


def test_of_stretched_contrast_it_is_the_mean_of_what_was_added() -> None:
    """Wasserstein-1 on a line of r and c r, c > 1, is (c - 1) E|r|."""
    clips = drawn(2, 3, 4, 12, 12)
    along = patches.directions(NOISE, 3, 2)
    found = patches.projected(clips, along)
    assert found.shape == (len(along), 2 * 3 * 8 * 8)
    want = 0.5 * found.abs().mean()
    assert float(patches.distance(clips, 1.5 * clips, NOISE)) == pytest.approx(float(want), rel=1e-12)


def test_a_patch_is_two_frames_of_five_pixels() -> None:
    clips, along = drawn(2, 3, 4, 12, 12), patches.directions(NOISE, 3, 2)
    first = torch.cat([clips[1, :, 2], clips[1, :, 3]])[:, 4:9, 6:11]  # the third pair of the second clip
    want = (along * first).sum((1, 2, 3))
    got = patches.projected(clips, along).view(len(along), 2, 3, 8, 8)[:, 1, 2, 4, 6]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


def test_directions_are_unit_vectors_that_see_no_flat_colour() -> None:
    along = patches.directions(NOISE, 3, 2)
    torch.testing.assert_close(along.square().sum((1, 2, 3)), torch.ones(len(along), dtype=torch.float64))
    flat = torch.full((2, 3, 4, 12, 12), 0.7, dtype=torch.float64)
    assert patches.distance(flat, -flat, NOISE) < 1e-12


@pytest.mark.parametrize("frames", [1, 2, 5])
def test_grain_and_flicker_count_more_the_more_there_is(frames: int) -> None:
    square = torch.zeros(4, 3, frames, 12, 12, dtype=torch.float64)
    square[..., 4:8, 4:8] = 1
    grain = drawn(*square.shape, key="grain")
    found = [float(patches.distance(square, square + level * grain, NOISE)) for level in (0, 0.02, 0.05, 0.1)]
    assert found[0] == 0 and found == sorted(set(found))


def test_its_gradient_leads_back() -> None:
    real = drawn(4, 3, 4, 12, 12)
    made = (1.5 * real).requires_grad_()
    before = patches.distance(real, made, NOISE)
    before.backward()
    assert made.grad is not None
    assert patches.distance(real, made - 20 * made.grad, NOISE) < before
