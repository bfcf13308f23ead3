"""Laws of the one door to attention: every kernel gives the reference's answer and gradients, and says who answered."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from cascade import attention
from cascade.attention import attend, kernels, record, reference, select, use
from cascade.attention import xformers as our_xformers
from cascade.errors import ConfigError
from cascade.kernels import say_once

INF = float("inf")
SHAPES = [  # B, M, N, h, D
    (1, 1, 1, 1, 8),
    (2, 5, 1, 1, 16),
    (3, 16, 16, 2, 64),
    (2, 7, 13, 3, 24),
    (1, 33, 77, 4, 40),
    (4, 64, 9, 2, 8),
]
BIASES = ["none", "table", "keys", "full"]
KERNELS = ["sdpa", "xformers"]


@pytest.fixture(autouse=True)
def _xformers(request: pytest.FixtureRequest) -> None:
    if "kernel" in request.fixturenames and request.getfixturevalue("kernel") == "xformers":
        pytest.importorskip("xformers")


def draw(shape: tuple[int, ...], form: str) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """float64 q, k, v as views of packed projections, and a bias with some keys hidden from some queries."""
    b, m, n, h, d = shape
    g = torch.Generator().manual_seed(hash(shape) % 1000)
    q = torch.randn(b, m, 3, h, d, generator=g, dtype=torch.float64)[:, :, 1]
    k, v = torch.randn(b, n, 2, h, d, generator=g, dtype=torch.float64).unbind(2)
    dims = {"none": None, "table": (h, m, n), "keys": (b, 1, 1, n), "full": (b, h, m, n)}[form]
    if dims is None:
        return q, k, v, None
    bias = torch.randn(dims, generator=g, dtype=torch.float64)
    hidden = torch.rand(dims, generator=g) < 0.3
    hidden[..., 0] = False
    return q, k, v, bias.masked_fill(hidden, -INF)


def answer(kernel: str, dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor]:
    """Output and gradients with respect to q, k, v and bias, in float64."""
    q, k, v, bias = (None if x is None else x.detach().to(dtype).requires_grad_() for x in tensors)
    assert q is not None and k is not None and v is not None
    out = attend(q, k, v, bias=bias, kernel=kernel)
    grad = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
    leaves = [x for x in (q, k, v, bias) if x is not None]
    return [x.double() for x in (out, *torch.autograd.grad(out, leaves, grad))]


@pytest.mark.parametrize("form", BIASES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_every_kernel_gives_the_reference_answer_and_gradients(kernel: str, shape: tuple[int, ...], form: str) -> None:
    tensors = draw(shape, form)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 3e-6), (torch.bfloat16, 2e-2)):
        rounded = [None if x is None else x.to(dtype).double() for x in tensors]
        for got, want in zip(
            answer(kernel, dtype, *rounded), answer("reference", torch.float64, *rounded), strict=True
        ):
            assert got.shape == want.shape
            assert (got - want).abs().max() <= tolerance * max(1.0, want.abs().max().item())


def test_reference_obeys_the_formula() -> None:
    q, k, v, bias = draw((2, 5, 7, 2, 8), "full")
    assert bias is not None
    torch.testing.assert_close(attend(torch.zeros_like(q), k, v, kernel="reference")[:, 0], v.mean(1))
    one = torch.full_like(bias, -INF)
    one[..., 3] = 2.0
    assert torch.equal(attend(q, k, v, bias=one, kernel="reference"), v[:, 3:4].expand_as(q))
    p = reference.weights(q, k, bias)
    torch.testing.assert_close(p.sum(-1), torch.ones(2, 2, 5, dtype=torch.float64))
    assert (p[bias == -INF] == 0).all()
    scores = q[1, 4, 1] @ k[1, :, 1].T / 8**0.5 + bias[1, 1, 4]
    torch.testing.assert_close(attend(q, k, v, bias=bias, kernel="reference")[1, 4, 1], scores.softmax(0) @ v[1, :, 1])


def test_reference_can_be_differentiated_twice_and_forward() -> None:
    q, k, v, _ = (x if x is None else x.detach().requires_grad_() for x in draw((1, 2, 3, 1, 4), "none"))
    assert torch.autograd.gradgradcheck(lambda *x: attend(*x, kernel="reference"), (q, k, v))
    _, speed = torch.func.jvp(lambda x: attend(q, k, x, kernel="reference"), (v,), (torch.ones_like(v),))
    torch.testing.assert_close(speed, torch.ones_like(speed))


@pytest.mark.parametrize("kernel", KERNELS)
def test_gradcheck_with_a_learned_bias(kernel: str) -> None:
    q, k, v, _ = (x if x is None else x.detach().requires_grad_() for x in draw((2, 3, 4, 2, 8), "none"))
    bias = torch.randn(2, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    assert torch.autograd.gradcheck(lambda *x: attend(*x[:3], bias=x[3], kernel=kernel), (q, k, v, bias))


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_a_bias_alone_gets_its_gradient(kernel: str) -> None:
    q, k, v, bias = draw((2, 3, 4, 2, 8), "table")
    assert bias is not None
    grads = []
    for name in (kernel, "reference"):
        table = bias.clone().requires_grad_()
        attend(q, k, v, bias=table, kernel=name).square().sum().backward()
        grads.append(table.grad)
    torch.testing.assert_close(*grads)
    assert q.grad is None and not q.requires_grad


@pytest.mark.parametrize("kernel", ["reference", *KERNELS])
def test_no_gradient_is_kept_where_none_is_wanted(kernel: str) -> None:
    q, k, v, bias = draw((2, 3, 4, 2, 8), "table")
    assert bias is not None
    with torch.no_grad():
        out = attend(q.requires_grad_(), k, v, bias=bias.requires_grad_(), kernel=kernel)
    assert not out.requires_grad


class Ops(TorchDispatchMode):
    """Names of the aten operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("bias", [None, (8, 8), (2, 8, 8), (32, 1, 1, 8)])
@pytest.mark.parametrize("kernel", KERNELS)
def test_views_of_a_packed_projection_run_fused_and_without_a_copy(kernel: str, bias: tuple[int, ...] | None) -> None:
    qkv = torch.randn(8, 32, 3, 2, 16)  # F, S, (q, k, v), h, D: attention over frames
    q, k, v = (x.transpose(0, 1) for x in qkv.unbind(2))
    table = None if bias is None else torch.zeros(bias)
    attend(q, k, v, bias=table, kernel=kernel)
    with Ops() as ops:
        out = attend(q, k, v, bias=table, kernel=kernel)
    assert "_scaled_dot_product_flash_attention_for_cpu" in ops.names
    assert not {"clone", "copy_", "_to_copy", "contiguous"} & set(ops.names)
    assert out.transpose(0, 1).is_contiguous()


def test_bias_dims_broadcast_from_the_right_and_grads_sum_back() -> None:
    q, k, v, _ = draw((2, 3, 4, 2, 8), "none")
    for dims in [(), (4,), (3, 1), (2, 1, 4), (2, 1, 1, 1)]:
        bias = torch.randn(dims, dtype=torch.float64)
        full = bias.expand(2, 2, 3, 4).clone()
        for kernel in ("sdpa", "reference"):
            torch.testing.assert_close(
                attend(q, k, v, bias=bias, kernel=kernel), attend(q, k, v, bias=full, kernel=kernel)
            )


@pytest.mark.parametrize("kernel", KERNELS)
def test_one_sequence_does_not_depend_on_the_batch(kernel: str) -> None:
    q, k, v, _ = (x if x is None else x.float() for x in draw((5, 16, 16, 2, 32), "none"))
    alone = torch.cat([attend(q[i : i + 1], k[i : i + 1], v[i : i + 1], kernel=kernel) for i in range(5)])
    assert torch.equal(attend(q, k, v, kernel=kernel), alone)


@pytest.mark.parametrize("form", BIASES)
def test_launches_of_part_of_the_batch_add_up(form: str) -> None:
    q, k, v, bias = draw((5, 3, 4, 2, 8), form)
    four = None if bias is None else bias.view((1,) * (4 - bias.ndim) + bias.shape)
    whole = attend(q, k, v, bias=bias, kernel="reference")
    for step in (1, 2, 5, 9):
        torch.testing.assert_close(attention._in_launches(reference, q, k, v, four, step), whole)


def test_cuda_launches_stay_within_grid_and_int32() -> None:
    frames = torch.empty(122_880, 16, 8, 64, device="meta")
    step = attention._launch_limit(frames, frames)
    assert step <= 65535 and step * 8 * 128 * 64 <= 2**31 < (step + 1) * 8 * 128 * 64
    assert attention._launch_limit(frames[:, :, :1], frames[:, :, :1]) == 65535


def test_meta_tensors_pass() -> None:
    q, bias = torch.empty(2, 3, 2, 8, device="meta"), torch.empty(3, 3, device="meta")
    for kernel in ("auto", "reference"):
        assert attend(q, q, q, bias=bias, kernel=kernel).shape == q.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": torch.zeros(2, 4, 3, 8)}, r"\(2, 4, 3, 8\)"),
        ({"v": torch.zeros(2, 5, 2, 8)}, "expected"),
        ({"q": torch.zeros(2, 3, 16)}, "expected"),
        ({"k": torch.zeros(2, 4, 2, 8).double()}, "one dtype"),
        ({"q": torch.zeros(2, 3, 8, 2).mT}, "last stride"),
        ({"bias": torch.zeros(5)}, "does not broadcast"),
        ({"bias": torch.zeros(3, 2, 3, 4)}, "does not broadcast"),
        ({"bias": torch.zeros(1, 1, 1, 1, 1)}, "does not broadcast"),
        ({"bias": torch.ones(3, 4, dtype=torch.bool)}, "torch.bool"),
        ({"bias": torch.full((3, 4), -INF)}, "hides every key"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change: dict[str, Tensor], message: str) -> None:
    tensors = {"q": torch.zeros(2, 3, 2, 8), "k": torch.zeros(2, 4, 2, 8), "v": torch.zeros(2, 4, 2, 8)}
    with pytest.raises(ValueError, match=message):
        attend(**(tensors | change))


def test_record_says_which_kernel_ran() -> None:
    q = torch.zeros(1, 2, 1, 8)
    attend(q, q, q)
    with record() as outer:
        attend(q, q, q)
        with record() as inner, use("reference"):
            attend(q, q, q)
            attend(q, q, q, kernel="sdpa")
        attend(q, q, q)
    attend(q, q, q)
    assert outer == ["sdpa", "reference", "sdpa", "sdpa"] and inner == ["reference", "sdpa"]


def test_use_ends_with_its_block_even_after_an_error() -> None:
    q = torch.zeros(1, 2, 1, 8)
    with pytest.raises(RuntimeError), use("reference"):
        raise RuntimeError
    with record() as names:
        attend(q, q, q)
    assert names == ["sdpa"]


def test_unknown_kernel_is_refused_with_the_names() -> None:
    names = "'flash', expected one of auto, reference, sdpa, temporal, xformers. Fix: attention=auto"
    with pytest.raises(ConfigError, match=names), use("flash"):
        pass
    with pytest.raises(ConfigError, match="'flash'"):
        select("flash", torch.zeros(1, 1, 1, 8))


def test_a_kernel_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "xformers.ops", None)
    our_xformers._reason.cache_clear()
    q = torch.zeros(1, 2, 1, 8)
    try:
        with pytest.raises(ConfigError, match=r"'xformers' cannot run here: .*pip install.* Fix: attention=auto"):
            attend(q, q, q, kernel="xformers")
        assert our_xformers.reason() is not None
    finally:
        our_xformers._reason.cache_clear()


def fake_xformers(monkeypatch: pytest.MonkeyPatch, **library: object) -> None:
    modules = {"xformers.ops": SimpleNamespace(), "xformers._cpp_lib": SimpleNamespace(**library)}
    monkeypatch.setattr(our_xformers.importlib, "import_module", modules.__getitem__)


def test_a_library_that_does_not_load_is_explained_with_its_repair(monkeypatch: pytest.MonkeyPatch) -> None:
    error = RuntimeError("six lines")
    error.__cause__ = OSError("libcudart.so.12: cannot open shared object file\nand more")
    why = our_xformers._reason.__wrapped__
    fake_xformers(monkeypatch, _built_with_cuda=False, _cpp_library_load_exception=error)
    assert why("cpu") is None
    assert "nvidia-cuda-runtime-cu12" in why("cuda") and "\n" not in why("cuda") and "six lines" not in why("cuda")
    fake_xformers(monkeypatch, _built_with_cuda=False, _cpp_library_load_exception=None)
    assert "built without CUDA" in why("cuda")
    fake_xformers(monkeypatch, _built_with_cuda=True)
    assert why("cuda") is None


@pytest.mark.parametrize(
    ("dtype", "size", "biased", "capability", "message"),
    [
        (torch.bfloat16, 64, True, (9, 0), None),
        (torch.float32, 20, False, (7, 5), None),
        (torch.bfloat16, 64, False, (12, 0), None),
        (torch.float64, 64, False, (9, 0), "float64"),
        (torch.bfloat16, 64, False, (7, 5), "8.0"),
        (torch.bfloat16, 64, True, (12, 0), "9.0"),
        (torch.float16, 20, False, (8, 0), "multiple of 8"),
    ],
)
def test_tensors_xformers_has_no_cuda_kernel_for(
    monkeypatch: pytest.MonkeyPatch,
    dtype: torch.dtype,
    size: int,
    biased: bool,
    capability: tuple[int, int],
    message: str | None,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    q = torch.empty(1, 2, 1, size, dtype=dtype, device="meta")
    why = our_xformers._unfit(q, q if biased else None)
    assert why is None if message is None else message in str(why)
    assert "meta" in str(our_xformers.available(q))


def test_auto_on_cuda_takes_xformers_or_says_once_why_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    q = SimpleNamespace(device=torch.device("cuda"), ndim=4)
    answers: list[str | None] = [None]
    theirs = SimpleNamespace(available=lambda q, bias: answers[0])
    monkeypatch.setitem(attention._kernels, "xformers", theirs)  # type: ignore[arg-type]
    say_once.cache_clear()
    with caplog.at_level(logging.INFO, "cascade"):
        assert select("auto", q) == "xformers" and not caplog.records  # type: ignore[arg-type]
        answers[0] = "no such library"
        assert [select("auto", q) for _ in range(3)] == ["sdpa"] * 3  # type: ignore[arg-type]
    assert [r.message for r in caplog.records] == ["attention=auto does not use xformers: no such library"]


def test_auto_on_the_cpu_is_sdpa_and_never_imports_xformers() -> None:
    code = """
import sys, torch
from cascade.attention import attend, record
q = torch.zeros(1, 2, 1, 8)
with record() as names:
    attend(q, q, q, bias=torch.zeros(2, 2))
assert names == ["sdpa"], names
assert not [m for m in sys.modules if m.split(".")[0] == "xformers"]
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])


def test_xformers_on_the_cpu_is_its_own_entry_with_our_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    ops = pytest.importorskip("xformers.ops")
    calls = []
    real = ops.memory_efficient_attention

    def spy(*args: Tensor, **kwargs: object) -> Tensor:
        calls.append(kwargs["op"])
        return real(*args, **kwargs)

    monkeypatch.setattr(ops, "memory_efficient_attention", spy)
    q = torch.randn(1, 2, 1, 8, requires_grad=True)
    with Ops() as seen, record() as names:
        attend(q, q, q, kernel="xformers").sum().backward()
    forward, backward = our_xformers.operators()
    assert calls == [(forward, backward)] and names == ["xformers"]
    assert issubclass(forward, ops.fmha.common.AttentionFwOpBase)
    assert issubclass(backward, ops.fmha.common.AttentionBwOpBase)
    assert {forward.OPERATOR.__name__, backward.OPERATOR.__name__} <= set(seen.names)


def test_xformers_cpu_operator_refuses_what_it_would_read_wrongly() -> None:
    ops = pytest.importorskip("xformers.ops")
    q, wrong = torch.zeros(1, 3, 2, 8), torch.zeros(1, 3, 8, 2).mT
    for args, message in [((q, wrong, q), r"key.stride\(-1\) > 1"), ((q, q, q, None, 0.5), "dropout")]:
        with pytest.raises(ValueError, match=message):
            ops.memory_efficient_attention(*args, op=our_xformers.operators())
    half = q.bfloat16()
    assert ops.memory_efficient_attention(half, half, half, op=our_xformers.operators()).dtype is torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keys", [1, 5, 8, 77])
@pytest.mark.parametrize("dims", [(1, 1, 1), (1, 2, 7), (3, 1, 1), (3, 2, 7)])
def test_xformers_cuda_kernels_would_take_the_aligned_bias(
    dims: tuple[int, ...], keys: int, dtype: torch.dtype
) -> None:
    cutlass = pytest.importorskip("xformers.ops.fmha.cutlass")
    source = torch.randn(*dims, keys + 1)[..., 1:].to(dtype)
    channels_last = torch.randn(dims[0], dims[2], keys, dims[1]).permute(0, 3, 1, 2).to(dtype)
    for bias in (source, source[..., :1], channels_last):
        got = our_xformers.aligned(bias, keys)
        assert torch.equal(got, bias.expand(*dims, keys))
        reasons: list[str] = []
        cutlass._check_bias_alignment(reasons, got.expand(3, 2, 7, keys))
        assert not reasons and (got.stride(-1) == 1) and got.storage_offset() * got.element_size() % 16 == 0


def test_a_new_file_is_a_new_kernel(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def available(q, bias=None): pass\ndef run(q, k, v, bias): return q + 1\n")
    monkeypatch.setattr(attention, "__path__", [*attention.__path__, str(tmp_path)])
    monkeypatch.setattr(attention, "_kernels", attention._find(attention.__path__))
    try:
        assert "mine" in kernels()
        q = torch.zeros(1, 2, 1, 8)
        assert torch.equal(attend(q, q, q, kernel="mine"), q + 1)
    finally:
        sys.modules.pop("cascade.attention.mine", None)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("kernel", ["auto", "reference", "sdpa", "temporal"])
def test_a_graph_goes_through_the_door(kernel: str, positions: bool, biased: bool) -> None:
    """No kernel of ours breaks the graph of what `torch.compile` makes of a network, forward or backward."""
    if kernel == "temporal" and not positions:
        return
    g = torch.Generator().manual_seed(1)
    x = torch.randn((2, 6, 5, 2, 8) if positions else (2, 6, 2, 8), generator=g, requires_grad=True)
    bias = torch.randn(2, 6, 6, generator=g, requires_grad=True) if biased else None

    def packed(x: Tensor, bias: Tensor | None) -> Tensor:
        return attend(x, 2 * x, x - 1, bias=bias)

    torch._dynamo.reset()
    with use(kernel):
        whole = torch.compile(packed, fullgraph=True, backend="aot_eager")
        leaves = [x] if bias is None else [x, bias]
        for run in (whole, packed):
            out = run(x, bias)
            got = [out, *torch.autograd.grad(out.square().sum(), leaves)]
            if run is whole:
                first = got
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(first, got, strict=True))
