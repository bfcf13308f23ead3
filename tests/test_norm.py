"""Laws of our group norm: the operator on the CPU, and where `cascade.nets.layers` takes it. The Triton code is tested
in test_kernels_interpreted.py and test_kernels_compiled.py."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import cascade.kernels as kernels
from cascade.kernels import norm, norm_plan
from cascade.nets.layers import Clip, FiLM, Norm, TemporalConv

Shaken = Callable[..., Any]
IMAGES = [(3, 16, 4, 5), (2, 12, 3, 3), (1, 40, 1, 7), (2, 8, 1, 1), (2, 5, 3, 2)]


def draw(shape: tuple[int, ...], film: bool, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """x (channels-last), weight, bias, film."""
    g = torch.Generator().manual_seed(sum(shape))
    n, c, _, _ = shape
    x = torch.randn(shape, generator=g, dtype=dtype).add(3).contiguous(memory_format=torch.channels_last)
    told = torch.randn(n, 2 * c, generator=g, dtype=dtype) if film else None
    return [x, *torch.randn(2, c, generator=g, dtype=dtype).unbind(0), told]


def torchs(x: Tensor, weight: Tensor, bias: Tensor, film: Tensor | None, groups: int, silu: bool) -> Tensor:
    out = F.group_norm(x, groups, weight, bias)
    if film is not None:
        scale, shift = film[:, :, None, None].chunk(2, 1)
        out = out * (1 + scale) + shift
    return F.silu(out) if silu else out


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("shape", IMAGES, ids=str)
def test_the_answer_and_gradients_are_torchs(shape: tuple[int, ...], film: bool, silu: bool) -> None:
    groups = math.gcd(shape[1], 8)
    leaves = [t if t is None else t.requires_grad_() for t in draw(shape, film)]
    wanted = [t for t in leaves if t is not None]
    got = norm.group_norm(*leaves, groups=groups, silu=silu)  # type: ignore[arg-type]
    want = torchs(*leaves, groups, silu)  # type: ignore[arg-type]
    grad = torch.randn(shape, dtype=torch.float64)
    for mine, theirs in zip(
        [got, *torch.autograd.grad(got, wanted, grad)], [want, *torch.autograd.grad(want, wanted, grad)], strict=True
    ):
        torch.testing.assert_close(mine, theirs)
    assert got.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("film", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_torch_librarys_rules(film: bool, dtype: torch.dtype) -> None:
    leaves = draw((2, 8, 3, 2), film, torch.float32)
    leaves[0] = leaves[0].to(dtype)  # type: ignore[union-attr]
    leaves = [t if t is None else t.detach().requires_grad_() for t in leaves]
    for silu, out in ((False, dtype), (True, torch.bfloat16)):
        torch.library.opcheck(torch.ops.cascade.group_norm.default, (*leaves, 4, 1e-5, silu, out))
    plain = [t if t is None else t.detach() for t in leaves]
    _, mean, rstd = torch.ops.cascade.group_norm(*plain, 4, 1e-5, True, dtype)
    args = (torch.ones_like(plain[0]), *plain, mean, rstd, 4, True)  # type: ignore[arg-type]
    torch.library.opcheck(torch.ops.cascade.group_norm_backward.default, args)


def test_statistics_are_float32_and_the_output_is_of_the_type_asked_for() -> None:
    x, weight, bias, _ = draw((2, 8, 5, 5), False, torch.float32)
    assert x is not None and weight is not None and bias is not None
    far = (x + 30).bfloat16()
    out = norm.group_norm(far, weight, bias, groups=8, dtype=torch.float32)
    want = F.group_norm(far.double(), 8, weight.double(), bias.double()).float()
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)
    assert norm.group_norm(far, weight, bias, groups=8).dtype is torch.bfloat16


def test_shapes_that_do_not_fit_are_refused() -> None:
    x, w = torch.zeros(2, 8, 3, 3), torch.zeros(8)
    for args, rest, message in [
        ((x, w[:4], w), {"groups": 8}, "expected"),
        ((x, w, w), {"groups": 3}, "3 groups"),
        ((x, w, w, torch.zeros(2, 8)), {"groups": 8}, r"\(2, 16\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            norm.group_norm(*args, **rest)  # type: ignore[arg-type]


def test_what_the_triton_kernel_refuses(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(kernels, "_missing", lambda: None)
    monkeypatch.setattr(kernels, "_old", lambda device: None)

    def cuda(last: bool = True, channels: int = 8, dtype: torch.dtype = torch.float32, side: int = 3) -> Any:
        shape, device = torch.Size((2, channels, side, side)), torch.device("cuda")
        return SimpleNamespace(device=device, shape=shape, dtype=dtype, is_contiguous=lambda memory_format: last)

    assert norm.refusal(cuda(), 8) is None and norm.takes(cuda(), 8)
    assert "channels-last" in str(norm.refusal(cuda(last=False), 8))
    assert "3 groups" in str(norm.refusal(cuda(), 3))
    assert "4104 channels" in str(norm.refusal(cuda(channels=norm.CHANNELS + 8), 8))
    assert "more than 2146435072" in str(norm.refusal(cuda(side=2**15), 8))
    assert "float64" in str(norm.refusal(cuda(dtype=torch.float64), 8))
    kernels.say_once.cache_clear()
    with caplog.at_level(logging.INFO, "cascade"), norm.native():
        assert not norm.takes(cuda(), 8) and not norm.takes(cuda(), 8)
        assert not norm.takes(torch.zeros(2, 8, 3, 3), 8)
    assert [r.message for r in caplog.records] == ["group norm is torch's own, not ours: it is switched off"]


@pytest.mark.parametrize("tuning", [norm_plan.FORWARD, norm_plan.BACKWARD], ids=["forward", "backward"])
@pytest.mark.parametrize("channels", [8, 80, 96, 320, 4096])
@pytest.mark.parametrize("positions", [1, 16, 99, 4096, 384 * 640])
@pytest.mark.parametrize("images", [1, 32])
def test_the_programs_of_a_plan_cover_every_image_once(
    images: int, positions: int, channels: int, tuning: norm_plan.Tuning
) -> None:
    how = norm_plan.plan(images, channels, positions, 8, tuning, 132)
    lanes, rows = how.constants["LANES"], how.constants["ROWS"]
    assert lanes == norm_plan.power(lanes) and rows == norm_plan.power(rows)
    if how.whole:
        some = how.constants["SOME"]
        assert how.programs * some == images * 8 and lanes >= some * channels // 8
        assert positions <= rows and rows * lanes <= tuning.whole
        return
    length = norm_plan.ceil(positions, how.constants["FOLD"])
    assert lanes >= how.constants["FOLD"] * channels and how.programs == images * how.parts
    assert how.chunk % rows == 0 and (how.parts - 1) * how.chunk < length <= how.parts * how.chunk
    assert how.parts <= norm_plan.PARTS


def test_a_plan_is_made_for_a_tensor_where_it_lies() -> None:
    x = torch.empty(3, 16, 4, 5)
    assert norm_plan.planned(x, 8, norm_plan.FORWARD) == norm_plan.plan(3, 16, 20, 8, norm_plan.FORWARD, 2)


def test_layers_give_the_same_with_it(monkeypatch: pytest.MonkeyPatch, shaken: Shaken) -> None:
    h = torch.randn(6, 16, 3, 4).contiguous(memory_format=torch.channels_last)
    clip = Clip(2, 3, torch.randn(6, 10), None)
    layers = [shaken(layer) for layer in (Norm(16), FiLM(16, 10), TemporalConv(16))]

    def answers() -> list[Tensor]:
        plain, film, conv = layers
        return [plain(h), plain(h, silu=True), film(h, clip), film(h, clip, silu=True), conv(h, clip)]

    before = answers()
    monkeypatch.setattr(norm, "takes", lambda x, groups: True)
    for mine, theirs in zip(answers(), before, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert all(x.dtype is torch.bfloat16 for x in answers()[:4])
    assert torch.equal(before[1], F.silu(before[0]))
