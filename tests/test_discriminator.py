"""Laws of the discriminator: local in space and time, fair to both sides, and of use to a student."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade import checkpoint
from cascade.distillation.discriminator import SIGMA, STEADY, Discriminator, own_loss, student_loss
from cascade.distillation.reward import Rewarded
from cascade.noise import generator
from cascade.text import Text
from tests.test_distill import WIDTH, Cut, Cutting
from tests.test_reward import PLAN, Curved, better, digest, examples, student, task_stage

ALONE = replace(PLAN, judge=None, stay=0.0, adversarial=1.0)  # no judge: what clips show is nobody's business


def drawn(key: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator("discriminator", key), dtype=torch.float64)


def said(batch: int) -> Text:
    return Text(drawn("text", batch, 3, WIDTH), torch.ones(batch, 3, dtype=torch.bool))


def double(channels: int = 3, text: int = WIDTH) -> Discriminator:
    return Discriminator(channels, text).double()


def test_a_place_sees_three_frames_and_eight_pixels_around_it() -> None:
    x = drawn("x", 1, 3, 16, 32, 32).requires_grad_()
    logits = double()(x, said(1))
    assert logits.shape == (1, 16, 8, 8)
    (seen,) = torch.autograd.grad(logits[0, 8, 4, 4], x)
    _, _, frames, rows, columns = seen.nonzero().unbind(1)
    assert (int(frames.min()), int(frames.max())) == (5, 11)
    for places in (rows, columns):  # of pixels 16 to 19
        assert (int(places.min()), int(places.max())) == (16 - 8, 19 + 8)


def test_it_begins_the_same_and_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    one, other = Discriminator(3, WIDTH), Discriminator(3, WIDTH)
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


def test_half_precision_around_it_changes_nothing() -> None:
    net, x, text = Discriminator(3, WIDTH), drawn("x", 2, 3, 2, 8, 8).float(), said(2)
    with torch.autocast("cpu", torch.bfloat16):
        inside = net(x, text)
    assert inside.dtype == torch.float32 and torch.equal(inside, net(x, text))


def test_text_counts_where_there_is_any() -> None:
    x, other = drawn("x", 2, 3, 2, 8, 8), Text(-said(2).tokens, said(2).mask)
    assert not torch.allclose(double()(x, said(2)), double()(x, other))
    assert torch.equal(double(text=0)(x, said(2)), double(text=0)(x, other))


def test_who_cannot_tell_loses_two_bits_and_the_student_one() -> None:
    net, x, text = double(), drawn("x", 2, 3, 2, 8, 8), said(2)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.allclose(own_loss(net, x, -x, text, x), torch.full((2,), 2 * math.log(2), dtype=torch.float64))
    assert torch.allclose(student_loss(net, x, text), torch.full((2,), math.log(2), dtype=torch.float64))


def test_its_loss_is_the_cross_entropy_and_the_change_by_noise() -> None:
    net, text = double(), said(2)
    real, made, noise = (drawn(key, 2, 3, 2, 8, 8) for key in ("real", "made", "noise"))
    on_real, on_made = net(real, text), net(made, text)
    entropy = F.binary_cross_entropy_with_logits
    wrong = entropy(on_real, torch.ones_like(on_real)) + entropy(on_made, torch.zeros_like(on_made))
    change = (net(real + SIGMA * noise, text) - on_real).square().mean()
    torch.testing.assert_close(own_loss(net, real, made, text, noise).mean(), wrong + STEADY * change)


def test_neither_side_has_a_gradient_for_the_other() -> None:
    net, made, text = double(), drawn("made", 2, 3, 2, 8, 8).requires_grad_(), said(2)
    student_loss(net, made, text).sum().backward()
    assert made.grad is not None and bool(made.grad.any()) and all(p.grad is None for p in net.parameters())
    made.grad = None
    own_loss(net, drawn("real", 2, 3, 2, 8, 8), made, text, drawn("noise", 2, 3, 2, 8, 8)).sum().backward()
    assert made.grad is None and all(p.grad is not None for p in net.parameters())


def test_the_reward_is_the_sum_of_both_losses() -> None:
    net, batch = Curved(), examples(3, torch.float64)
    task = Rewarded(task_stage(net), net, None, replace(ALONE, adversarial=0.3)).double()
    assert task.discriminator is not None
    made, text = task.made(batch, net), batch.cond.text
    own = own_loss(task.discriminator, batch.x, made, text, batch.eps)
    torch.testing.assert_close(task(batch), 0.3 * student_loss(task.discriminator, made, text) + own)


def test_a_student_of_blurred_squares_learns_how_sharp_real_ones_are() -> None:
    """It has one number to learn: how much of the blur to take away. Real squares lack a half of it.

    Both sides learn at once, so it turns around that: the mean counts, as that of the weights does in a training.
    """
    rng, net, text = generator("squares"), Discriminator(1, 0), Text.empty(8, 1, 0)
    sharper = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.AdamW([{"params": net.parameters()}, {"params": [sharper], "lr": 5e-3}], 2e-3)

    def squares(share: Tensor | float) -> Tensor:
        x = -torch.ones(8, 1, 2, 16, 16)
        for clip, (i, j) in zip(x, torch.randint(2, 8, (8, 2), generator=rng).tolist(), strict=True):
            clip[:, :, i : i + 6, j : j + 6] = 1
        blurred = F.avg_pool3d(x, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
        return blurred + share * (x - blurred)

    found = []
    for _ in range(140):
        optimizer.zero_grad()
        real, made = squares(0.5), squares(sharper)
        noise = torch.randn(real.shape, generator=rng)
        (student_loss(net, made, text) + own_loss(net, real, made, text, noise)).mean().backward()
        optimizer.step()
        found.append(float(sharper.detach()))
    assert sum(found[90:]) / 50 == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("at", [3, 9])
def test_cut_and_run_again_gives_the_same_student_and_nothing_else(tmp_path: Path, at: int) -> None:
    whole = better(tmp_path / "whole", cfg=ALONE)
    with pytest.raises(Cut):
        better(tmp_path / "cut", Cutting(at), cfg=ALONE)
    assert digest(better(tmp_path / "cut", cfg=ALONE)) == digest(whole)
    assert checkpoint.load(whole).state.keys() == student().net.state_dict().keys()
