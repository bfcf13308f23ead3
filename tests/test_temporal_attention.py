"""Laws of our kernel for attention over frames: the operator on the CPU, behind `attend` and behind xformers' entry.

The Triton code itself: test_kernels_interpreted.py and test_kernels_compiled.py.
"""

from __future__ import annotations

import importlib
import logging
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from cascade import attention
from cascade.attention import attend, record, select
from cascade.attention import temporal as ours
from cascade.attention import xformers as our_xformers
from cascade.kernels import say_once, temporal

INF = float("inf")
SHAPES = [(1, 1, 1, 1, 8), (2, 8, 5, 2, 16), (1, 31, 3, 1, 24), (3, 5, 7, 3, 8), (1, 128, 2, 1, 4)]  # B, F, S, h, D
BIASES = ["none", "table", "each"]


def draw(shape: tuple[int, ...], form: str, dtype: torch.dtype = torch.float64) -> list[Tensor | None]:
    """q, k, v as views of a packed projection, and a bias with some frames hidden from others."""
    b, f, s, h, d = shape
    g = torch.Generator().manual_seed(sum(shape))
    q, k, v = torch.randn(b, f, s, 3, h, d, generator=g, dtype=dtype).unbind(3)
    if form == "none":
        return [q, k, v, None]
    dims = (1 if form == "table" else b, h, f, f)
    bias = torch.randn(dims, generator=g, dtype=dtype)
    hidden = torch.rand(dims, generator=g) < 0.3
    hidden[..., 0] = False
    return [q, k, v, bias.masked_fill(hidden, -INF)]


def answer(kernel: str, tensors: list[Tensor | None]) -> list[Tensor]:
    leaves = [None if x is None else x.detach().requires_grad_() for x in tensors]
    q, k, v, bias = leaves
    assert q is not None and k is not None and v is not None
    out = attend(q, k, v, bias=bias, kernel=kernel)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
    return [out, *torch.autograd.grad(out, [x for x in leaves if x is not None], grad)]


@pytest.mark.parametrize("form", BIASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_answer_and_gradients_are_the_references(shape: tuple[int, ...], form: str) -> None:
    want = answer("reference", draw(shape, form))
    for kernel in ("temporal", "sdpa"):
        for got, wanted in zip(answer(kernel, draw(shape, form)), want, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10)
    half = [None if x is None else x.bfloat16() for x in draw(shape, form)]
    for got, wanted in zip(
        answer("temporal", half), answer("reference", [x if x is None else x.double() for x in half]), strict=True
    ):
        assert got.dtype is torch.bfloat16 and (got.double() - wanted).norm() <= 1e-2 * wanted.norm() + 1e-3


def test_every_position_attends_alone() -> None:
    q, k, v, bias = draw((2, 6, 4, 2, 8), "table")
    assert q is not None and k is not None and v is not None
    whole = attend(q, k, v, bias=bias, kernel="temporal")
    for s in range(4):
        alone = attend(q[:, :, s], k[:, :, s], v[:, :, s], bias=bias, kernel="reference")
        torch.testing.assert_close(whole[:, :, s], alone)


@pytest.mark.parametrize("dims", [(1, 2, 5, 5), (3, 1, 5, 5), (3, 2, 1, 5), (1, 1, 5, 1), (5, 5)])
def test_broadcast_dims_of_the_bias_get_summed_gradients(dims: tuple[int, ...]) -> None:
    q, k, v, _ = draw((3, 5, 4, 2, 8), "none")
    assert q is not None and k is not None and v is not None
    grads = []
    for kernel in ("temporal", "reference"):
        bias = torch.linspace(-1, 1, torch.Size(dims).numel(), dtype=torch.float64).view(dims).requires_grad_()
        attend(q, k, v, bias=bias, kernel=kernel).square().sum().backward()
        grads.append(bias.grad)
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("gained", [False, True])
@pytest.mark.parametrize("turned", [False, True])
def test_q_and_k_may_be_normed_and_turned(gained: bool, turned: bool) -> None:
    q, k, v, bias = (x if x is None else x.detach().requires_grad_() for x in draw((2, 3, 2, 2, 4), "table"))
    assert q is not None and k is not None and v is not None
    gains = torch.randn(2, 4, dtype=torch.float64, requires_grad=True) if gained else None
    rotary = temporal.angles(3, 4, 10.0).double() if turned else None
    made = [q, k]
    if gains is not None:
        made = [
            x * (x.square().mean(-1, keepdim=True) + temporal.EPS).rsqrt() * g for x, g in zip(made, gains, strict=True)
        ]
    if rotary is not None:
        angle = torch.complex(*rotary)[:, None, None]
        made = [torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (2, 2))) * angle).flatten(-2) for x in made]
    want = attend(*made, v, bias=bias, kernel="reference")
    got = temporal.attention(q, k, v, bias, gains=gains, rotary=rotary)
    leaves = [x for x in (q, k, v, bias, gains) if x is not None]
    grad = torch.randn(q.shape, dtype=torch.float64)
    for mine, wanted in zip(
        [got, *torch.autograd.grad(got, leaves, grad)], [want, *torch.autograd.grad(want, leaves, grad)], strict=True
    ):
        torch.testing.assert_close(mine, wanted)
    plain = [x if x is None else x.detach() for x in (q, k, v, bias, gains, rotary)]
    args = (*plain[:4], 0.5, True, *plain[4:])
    torch.library.opcheck(torch.ops.cascade.temporal_attention.default, args)
    back = (torch.ones_like(plain[0]), *plain[:4], 0.5, True, *plain[4:])  # type: ignore[arg-type]
    torch.library.opcheck(torch.ops.cascade.temporal_attention_backward.default, back)


def test_rotation_sees_distances_alone() -> None:
    one = torch.randn(1, 1, 1, 1, 8, dtype=torch.float64).expand(1, 6, 1, 1, 8)
    q, k = (temporal._prepare(one * x, None, 0, temporal.angles(6, 8, 50.0)) for x in (1.0, 0.5))
    scores = q[0, :, 0, 0] @ k[0, :, 0, 0].T
    torch.testing.assert_close(scores[1:, 1:], scores[:-1, :-1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(q.norm(dim=-1), one.norm(dim=-1), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(scores[0, 1:], scores[0, :-1])


def test_gradcheck_with_a_learned_bias() -> None:
    q, k, v, _ = (x if x is None else x.detach().requires_grad_() for x in draw((2, 3, 2, 2, 4), "none"))
    bias = torch.randn(1, 2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: temporal.attention(*x, scale=0.7), (q, k, v, bias))


@pytest.mark.parametrize("form", BIASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_operators_keep_torch_librarys_rules(form: str, dtype: torch.dtype) -> None:
    q, k, v, bias = (
        x if x is None else x.detach().requires_grad_() for x in draw((2, 3, 2, 2, 8), form, torch.float32)
    )
    q, k, v = (x.to(dtype).detach().requires_grad_() for x in (q, k, v))  # type: ignore[union-attr]
    for lse in (False, True):
        torch.library.opcheck(torch.ops.cascade.temporal_attention.default, (q, k, v, bias, 0.5, lse))
    plain = [x if x is None else x.detach() for x in (torch.ones_like(q), q, k, v, bias)]
    for wanted in (False, bias is not None):
        torch.library.opcheck(torch.ops.cascade.temporal_attention_backward.default, (*plain, 0.5, wanted))


@pytest.mark.slow
def test_it_compiles_into_one_graph_forward_and_backward() -> None:
    tensors = [x if x is None else x.detach().requires_grad_() for x in draw((2, 4, 3, 2, 8), "table", torch.float32)]
    compiled = torch.compile(temporal.attention, fullgraph=True, backend="aot_eager")
    for function in (compiled, temporal.attention):
        out = function(*tensors)
        grads = torch.autograd.grad(out.square().sum(), tensors)
        if function is compiled:
            first = [out, *grads]
    for got, wanted in zip(first, [out, *grads], strict=True):
        torch.testing.assert_close(got, wanted)


def test_shapes_are_known_without_values() -> None:
    q = torch.empty(2, 8, 5, 2, 16, device="meta", dtype=torch.bfloat16)
    out = temporal.attention(q, q, q, torch.empty(1, 2, 8, 8, device="meta"))
    assert out.shape == q.shape and out.dtype is q.dtype and out.is_contiguous()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(1, 3, 2, 8)}, "expected one shape"),
        ({"k": torch.zeros(1, 4, 2, 1, 8)}, "expected one shape"),
        ({"v": torch.zeros(1, 3, 2, 1, 8).double()}, "one dtype"),
        ({"k": torch.zeros(1, 3, 2, 8, 4).mT[..., :1, :]}, "last stride"),
        ({"bias": torch.zeros(3, 3)}, "does not broadcast"),
        ({"bias": torch.zeros(1, 2, 3, 3)}, "does not broadcast"),
        ({"gains": torch.zeros(8)}, "gains"),
        ({"rotary": torch.zeros(2, 4, 4)}, "rotary"),
        ({x: torch.zeros(1, 129, 2, 1, 8) for x in "qkv"}, "129 frames"),
        ({x: torch.zeros(1, 3, 2, 1, 136) for x in "qkv"}, "head size of 136"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    tensors = {x: torch.zeros(1, 3, 2, 1, 8) for x in "qkv"} | change
    with pytest.raises(ValueError, match=message):
        temporal.attention(**tensors)


def test_it_says_what_it_is_for() -> None:
    assert "many positions" in str(ours.available(torch.zeros(1, 3, 1, 8)))
    assert "129 frames" in str(ours.available(torch.zeros(1, 129, 1, 1, 8)))
    assert "meta" in str(ours.available(torch.zeros(1, 3, 1, 1, 8, device="meta")))
    assert ours.available(torch.zeros(1, 3, 1, 1, 8)) is None


def test_auto_takes_it_on_cuda_for_positions_alone_or_says_why_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    reasons: dict[str, str | None] = {"temporal": None, "xformers": None}
    for name in reasons:
        answer = SimpleNamespace(available=lambda q, bias, name=name: reasons[name])
        monkeypatch.setitem(attention._kernels, name, answer)  # type: ignore[arg-type]
    say_once.cache_clear()
    frames, space = (SimpleNamespace(device=torch.device("cuda"), ndim=n) for n in (5, 4))
    with caplog.at_level(logging.INFO, "cascade"):
        assert [select("auto", q) for q in (frames, space)] == ["temporal", "xformers"] and not caplog.records  # type: ignore[arg-type]
        reasons["temporal"] = "no Triton"
        assert [select("auto", frames) for _ in range(2)] == ["xformers"] * 2  # type: ignore[arg-type]
        reasons["xformers"] = "no library"
        assert select("auto", frames) == "sdpa"  # type: ignore[arg-type]
    assert [r.message for r in caplog.records] == [
        "attention=auto does not use temporal: no Triton",
        "attention=auto does not use xformers: no library",
    ]
    assert select("auto", torch.zeros(1, 3, 1, 1, 8)) == "sdpa"


def test_positions_reach_other_kernels_as_heads_without_a_copy() -> None:
    q, k, v = torch.randn(3, 2, 4, 6, 2, 8)
    with record() as names:
        out = attend(q, k, v)
    assert names == ["sdpa"] and out.shape == q.shape
    assert q.flatten(2, 3).data_ptr() == q.data_ptr()
    with pytest.raises(ValueError, match="three times"):
        attend(q, k[:, :3], v[:, :3])


def test_a_missing_triton_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    import cascade.kernels as kernels

    def missing(name: str) -> None:
        raise ImportError("No module named 'triton'")

    monkeypatch.setattr(kernels.importlib, "import_module", missing)
    assert "No module named 'triton'" in str(kernels._missing.__wrapped__())
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "7.5" in str(kernels._old.__wrapped__(torch.device("cuda")))
    assert "float64" in str(kernels.unfit(SimpleNamespace(device=torch.device("cuda"), dtype=torch.float64)))  # type: ignore[arg-type]
    assert "cpu" in str(kernels.unfit(torch.zeros(1)))
    assert kernels.multiprocessors(torch.device("cpu")) > 0


# behind xformers' entry ----------------------------------------------------------------------------------------------


def through_xformers(*tensors: Tensor, bias: Tensor | None = None, **rest: object) -> Tensor:
    ops = pytest.importorskip("xformers.ops")
    out: Tensor = ops.memory_efficient_attention(*tensors, attn_bias=bias, op=our_xformers.temporal_operators(), **rest)
    return out


@pytest.mark.parametrize("form", ["none", "heads", "batch", "shared", "full"])
@pytest.mark.parametrize("groups", [False, True])
def test_xformers_reaches_the_kernel(form: str, groups: bool) -> None:
    q, k, v, _ = (x if x is None else x.contiguous().requires_grad_() for x in draw((2, 5, 3, 2, 8), "none"))
    assert q is not None and k is not None and v is not None
    dims = {"none": None, "heads": (1, 2, 5, 5), "batch": (2, 1, 5, 5), "shared": (1, 1, 5, 5), "full": (2, 2, 5, 5)}[
        form
    ]
    table = None if dims is None else torch.randn(dims, dtype=torch.float64, requires_grad=True)
    leaves = [x for x in (q, k, v, table) if x is not None]
    if groups:  # no gradient there
        q, k, v = (x.detach() for x in (q, k, v))
    want = attend(q, k, v, bias=table, kernel="reference")
    if groups:
        bias = table if table is None else table[:, None].expand(2, 3, 2, 5, 5)
        got = through_xformers(q, k, v, bias=bias)
    else:  # positions stand among the heads
        bias = table if table is None else table[:, None].expand(2, 3, 2, 5, 5).reshape(2, 6, 5, 5)
        got = through_xformers(*(x.flatten(2, 3) for x in (q, k, v)), bias=bias).view(q.shape)
    torch.testing.assert_close(got, want)
    if groups:
        return
    grad = torch.randn(q.shape, dtype=torch.float64)
    for mine, wanted in zip(
        [got, *torch.autograd.grad(got, leaves, grad)], [want, *torch.autograd.grad(want, leaves, grad)], strict=True
    ):
        torch.testing.assert_close(mine, wanted)


def test_xformers_operators_say_what_they_refuse() -> None:
    q = torch.zeros(1, 3, 2, 8)
    long, wide = torch.zeros(1, 129, 2, 8), torch.zeros(1, 3, 2, 136)
    five = torch.zeros(1, 3, 4, 2, 8)
    cases: list[tuple[tuple[Tensor, ...], dict[str, object], str]] = [
        ((long, long, long), {}, "129 frames"),
        ((wide, wide, wide), {}, "136"),
        ((q, torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 8)), {}, "different lengths"),
        ((q, q, q), {"p": 0.5}, "dropout"),
        ((torch.zeros(1, 3, 8, 2).mT, q, q), {}, "stride"),
        ((five, five, five), {"bias": torch.zeros(1, 4, 2, 3, 3)}, "BMGHK"),
    ]
    for tensors, rest, message in cases:
        with pytest.raises(ValueError, match=message):
            through_xformers(*tensors, **rest)  # type: ignore[arg-type]
    common = importlib.import_module("xformers.ops.fmha.common")
    forward, backward = our_xformers.temporal_operators()
    assert issubclass(forward, common.AttentionFwOpBase) and issubclass(backward, common.AttentionBwOpBase)
    half = q.bfloat16()
    assert through_xformers(half, half, half).dtype is torch.bfloat16


def test_xformers_log_sum_is_the_scores() -> None:
    fmha = pytest.importorskip("xformers.ops.fmha")
    q, k, v, _ = draw((2, 5, 3, 2, 8), "none")
    assert q is not None and k is not None
    for tensors, equation in [
        ((q, k, v), "bmghd,bnghd->bghmn"),
        ([x.flatten(2, 3) for x in (q, k, v)], "bmhd,bnhd->bhmn"),
    ]:  # type: ignore[union-attr]
        _, lse = fmha.memory_efficient_attention_forward_requires_grad(
            *tensors, op=our_xformers.temporal_operators()[0]
        )
        scores = torch.einsum(equation, *tensors[:2]) * 8**-0.5
        torch.testing.assert_close(lse, scores.logsumexp(-1))
