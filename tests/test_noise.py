"""Randomness depends on its key alone."""

from __future__ import annotations

import random

import pytest
import torch

from cascade.noise import Noise, generator, sample_id

SHAPE = (3, 2, 4, 5, 6)
NAMES = (sample_id("a red circle"), sample_id("a blue square"), sample_id("a red circle", 1))
NOISE = Noise(seed=7, stage="base", samples=NAMES)
WHOLE = NOISE(SHAPE, 3, "step")


def test_equal_keys_give_equal_numbers_and_every_part_of_the_key_counts() -> None:
    keys: list[tuple[int | str, ...]] = [(1, "a"), (2, "a"), (1, "b"), ("1", "a"), (1,), (1, "a", 0), ("a", 1)]
    draws = [torch.randn(4, generator=generator(*key)) for key in keys]
    assert torch.equal(draws[0], torch.randn(4, generator=generator(1, "a")))
    assert len({tuple(draw.tolist()) for draw in draws}) == len(keys)


def test_a_sample_is_its_prompt_and_its_copy() -> None:
    assert sample_id("a") == sample_id("a", 0)
    assert len({sample_id("a"), sample_id("a", 1), sample_id("b"), sample_id("b", 1), sample_id("a ")}) == 5


def test_batches_may_be_split_and_reordered() -> None:
    for b, name in enumerate(NAMES):
        alone = Noise(seed=7, stage="base", samples=(name,))((1, *SHAPE[1:]), 3, "step")
        assert torch.equal(alone[0], WHOLE[b])
    turned = Noise(seed=7, stage="base", samples=NAMES[::-1])(SHAPE, 3, "step")
    assert torch.equal(turned, WHOLE.flip(0))


def test_threads_draw_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cascade.noise.MANY", 1)
    assert torch.equal(NOISE(SHAPE, 3, "step"), WHOLE)


def test_a_window_sees_the_noise_of_the_whole_video() -> None:
    assert torch.equal(NOISE.window(1)((3, 2, 2, 5, 6), 3, "step"), WHOLE[:, :, 1:3])
    assert torch.equal(NOISE.window(1).window(2)((3, 2, 1, 5, 6), 3, "step"), WHOLE[:, :, 3:4])


@pytest.mark.parametrize(
    "other",
    [
        Noise(8, "base", NAMES)(SHAPE, 3, "step"),
        Noise(7, "tsr", NAMES)(SHAPE, 3, "step"),
        NOISE(SHAPE, 4, "step"),
        NOISE(SHAPE, 3, "start"),
    ],
    ids=["seed", "stage", "step", "purpose"],
)
def test_every_part_of_the_key_changes_every_frame(other: torch.Tensor) -> None:
    assert not (other == WHOLE).flatten(3).all(-1).any()


def test_the_order_of_calls_and_the_global_generators_mean_nothing() -> None:
    torch.manual_seed(0)
    random.seed(0)
    torch.randn(5)
    NOISE(SHAPE, 9, "step")
    state = torch.get_rng_state()
    assert torch.equal(NOISE(SHAPE, 3, "step"), WHOLE)
    assert torch.equal(torch.get_rng_state(), state)


def test_it_is_standard_normal_and_frames_samples_and_steps_are_independent() -> None:
    noise = Noise(0, "base", (sample_id("a"), sample_id("b")))
    rows = torch.cat([noise((2, 3, 4, 64, 64), step, "step").transpose(1, 2).reshape(8, -1) for step in range(2)])
    n = rows.shape[1]
    assert rows.mean(1).abs().max() < 5 / n**0.5
    assert (rows.var(1) - 1).abs().max() < 5 * (2 / n) ** 0.5
    assert (torch.corrcoef(rows) - torch.eye(16)).abs().max() < 5 / n**0.5
    assert abs(rows.pow(4).mean() - 3) < 5 * (96 / rows.numel()) ** 0.5


def test_a_batch_without_enough_names_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError, match="2 samples, 3 names"):
        NOISE((2, *SHAPE[1:]), 0, "start")
