"""Attention over frames: checked against float64, timed against PyTorch's backends."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from measure import INTERPRETED, TOLERANCE, TYPES, Run, error, guarded, poison, why
from torch import Tensor

from cascade.attention import attend
from cascade.kernels import temporal

# B, F, HW, h, D
CHECKED = [(2, 8, 64, 1, 96), (2, 16, 61, 3, 64), (1, 31, 37, 2, 64), (1, 32, 100, 5, 64), (1, 64, 33, 2, 64)]
CHECKED += [(1, 100, 9, 2, 32), (1, 128, 20, 1, 64), (3, 1, 7, 2, 32), (2, 8, 16, 2, 64), (1, 32, 9, 1, 128)]
TIMED = [(2, 16, 15360, 5, 64), (2, 32, 3840, 5, 64), (1, 64, 3840, 5, 64), (256, 8, 64, 1, 96), (1, 128, 3840, 5, 64)]
TIMED += [(2, 16, 960, 12, 64)]
FLEX = "view+flex"
BIASED = ("permute+efficient", "view+xformers", FLEX)  # also timed with a bias
DRY = [(2, 8, 5, 1, 24), (1, 16, 3, 2, 16)]


def draw(run: Run, shape: tuple[int, ...], dtype: torch.dtype, bias: str = "table") -> list[Tensor]:
    """Gradient, q, k, v (views of one packed projection) and the bias (float32)."""
    b, f, s, h, d = shape
    q, k, v = torch.randn(b, f, s, 3, h, d, device=run.device, dtype=dtype).unbind(3)
    table = torch.randn(b if bias == "each" else 1, h, f, f, device=run.device)
    if bias == "each":
        table = table.masked_fill(torch.ones(f, f, device=run.device).triu(1).bool(), -math.inf)
    return [torch.randn(b, f, s, h, d, device=run.device, dtype=dtype), q, k, v, table]


def forward(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, launch: Any = None) -> Tensor:
    if launch is None and not INTERPRETED:
        return temporal.attention(q, k, v, bias)
    from cascade.kernels import temporal_triton

    return temporal_triton.forward(q, k, v, bias, q.shape[-1] ** -0.5, False, temporal.precision(), launch)[0]


def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, launch: Any = None) -> list[Tensor]:
    scale = q.shape[-1] ** -0.5
    if launch is None and not INTERPRETED:
        return list(torch.ops.cascade.temporal_attention_backward(grad, q, k, v, bias, scale, bias is not None))
    from cascade.kernels import temporal_triton

    precision = temporal.precision()
    return list(temporal_triton.backward(grad, q, k, v, bias, scale, bias is not None, precision, launch))


def check(run: Run) -> None:
    for shape in DRY if run.dry else CHECKED:
        for name in TOLERANCE if shape[1] < 64 else [x for x in TOLERANCE if x != "tf32"]:  # slow to compile
            for bias in ("table", "each") if shape[1] in (8, 16) else ("table",):
                if run.mine():
                    check_one(run, shape, name, bias)
    for shape in DRY if run.dry else CHECKED:
        if run.mine():
            check_one(run, shape, "bf16", "none")
    for name in ("bf16", "fp32") if not INTERPRETED else ():
        if run.mine():
            check_prepared(run, (2, 16, 5, 2, 24) if run.dry else (2, 16, 61, 3, 64), name)
    if run.dry and not INTERPRETED:
        return
    for frames in (16,) if run.dry else (16, 32, 64):
        for _, launch in launches(frames):
            if run.mine():
                shape = (1, frames, 9, 2, 16) if run.dry else (2, frames, 333, 5, 64)
                check_one(run, shape, "bf16", "table", launch)


@guarded("temporal")
def check_one(run: Run, shape: tuple[int, ...], name: str, bias: str, launch: Any = None) -> None:
    grad, *leaves = draw(run, shape, TYPES[name], bias)
    wide = [x.double().requires_grad_() for x in leaves[: 3 if bias == "none" else 4]]
    out = attend(*wide[:3], bias=None if bias == "none" else wide[3], kernel="reference")
    want = [out.detach(), *torch.autograd.grad(out, wide, grad.double())]
    poison(run, grad.numel())
    torch.set_float32_matmul_precision("high" if name == "tf32" else "highest")
    row = {"shape": shape, "bias": bias, "launch": launch and str(launch)}
    try:
        q, k, v, table = leaves
        given = None if bias == "none" else table
        got = [forward(q, k, v, given, launch), *backward(grad, q, k, v, given, launch)][: 1 + len(wide)]
    except (ValueError, RuntimeError) as refusal:
        expected = shape[1] > temporal.FRAMES_FLOAT32 and TYPES[name] is torch.float32
        run.failed += not expected
        run.say("temporal", show=not expected, **row, dtype=name, refused=str(refusal)[-120:])
        return
    errors = [error(x, y) for x, y in zip(got, want, strict=True)]
    if shape[1] == 1:  # the softmax of one score is 1: q, k and bias get no gradient
        errors = [errors[0], errors[3]]
    run.check("temporal", name, errors, **row)


@guarded("temporal prepared")
def check_prepared(run: Run, shape: tuple[int, ...], name: str) -> None:
    """With q and k normed and turned, through the operator's own gradient."""
    torch.set_float32_matmul_precision("highest")
    grad, *leaves = draw(run, shape, TYPES[name])
    leaves.append(torch.rand(2, shape[-1], device=run.device) + 0.5)
    rotary = temporal.angles(shape[1], shape[-1], 100.0, run.device)
    wide = [x.double().requires_grad_() for x in leaves]
    q, k = (temporal._prepare(x, wide[4], i, rotary) for i, x in enumerate(wide[:2]))
    out = attend(q, k, wide[2], bias=wide[3], kernel="reference")
    want = [out.detach(), *torch.autograd.grad(out, wide, grad.double())]
    poison(run, grad.numel())
    given = [x.detach().requires_grad_() for x in leaves]
    mine = temporal.attention(*given[:4], gains=given[4], rotary=rotary)
    got = [mine.detach(), *torch.autograd.grad(mine, given, grad)]
    run.check("temporal prepared", name, [error(x, y) for x, y in zip(got, want, strict=True)], shape=shape)


def launches(frames: int) -> list[tuple[bool, Any]]:
    """Ways to launch the kernels, for 64 frames the shipped ones first: (backward, launch)."""
    from cascade.kernels.temporal_triton import Launch

    if frames == 64:  # four warps instead of eight: two or three programs a processor, where eight leave one or two
        ahead = [
            Launch(64, 4, 2, 4),
            Launch(64, 4, 1, 4),
            Launch(64, 4, 3, 8),
            Launch(64, 8, 2, 8),
            Launch(64, 4, 2, 16),
        ]
        back = [Launch(64, 8, 2, 32), Launch(64, 4, 2, 32), Launch(64, 4, 1, 32), Launch(64, 4, 3, 32)]
        return [(False, x) for x in ahead] + [(True, x) for x in [*back, Launch(64, 4, 2, 12), Launch(64, 8, 3, 32)]]
    small, tile = max(32, frames), max(64, frames)
    ahead = [Launch(small, 4, 2, 4), Launch(tile, 4, 2, 1), Launch(tile, 8, 2, 4), Launch(tile, 4, 3, 16)]
    back = [Launch(max(16, frames), 2, 2, 8), Launch(tile, 8, 2, 8), Launch(small, 4, 1, 16), Launch(small, 4, 3, 32)]
    return [(False, x) for x in ahead] + [(True, x) for x in [*back, Launch(tile, 4, 2, 8)]]


def time_ours(run: Run, shape: tuple[int, ...]) -> None:
    """Forward and backward with and without a bias; in bytes q, k, v -> out and grad, q, k, v -> dq, dk, dv."""
    grad, q, k, v, table = projections(run, shape)
    size = q.numel() * q.element_size()
    found = {}
    for name, bias in (("plain", None), ("bias", table)):
        row = {"shape": shape, "kernel": "ours", "bias": name}
        ahead = run.timed("temporal", 4 * size, lambda b=bias: forward(q, k, v, b), **row, way="forward")  # type: ignore[misc]
        back = run.timed("temporal", 7 * size, lambda b=bias: backward(grad, q, k, v, b), **row, way="backward")  # type: ignore[misc]
        found[name] = [ahead, back]
    run.say("temporal ours", shape=shape, forward_backward=found)


def projections(run: Run, shape: tuple[int, ...]) -> list[Tensor]:
    """As `draw`, of three projections, as the U-Net has them: contiguous."""
    grad, q, k, v, table = draw(run, shape, torch.bfloat16)
    return [grad, *(x.contiguous() for x in (q, k, v)), table]


def peers(shape: tuple[int, ...]) -> dict[str, Callable[..., Tensor]]:
    """PyTorch's backends on permuted copies (B HW, h, F, D), and on the view in which positions are heads."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    b, f, s, h, d = shape

    def permuted(backend: Any) -> Callable[..., Tensor]:
        def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
            q, k, v = (x.permute(0, 2, 3, 1, 4).reshape(b * s, h, f, d) for x in (q, k, v))
            with sdpa_kernel(backend):
                out = F.scaled_dot_product_attention(q, k, v, attn_mask=None if bias is None else bias.to(q.dtype))
            return out.view(b, s, h, f, d).permute(0, 3, 1, 2, 4).contiguous()

        return run

    def viewed(kernel: str) -> Callable[..., Tensor]:
        return lambda q, k, v, bias: attend(q, k, v, bias=bias, kernel=kernel)

    backends = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    found = {f"permute+{name}": permuted(backend) for name, backend in backends.items()}
    found["permute+efficient"] = permuted(SDPBackend.EFFICIENT_ATTENTION)
    found["view+sdpa"] = viewed("sdpa")
    found["view+xformers"] = viewed("xformers")
    return found


def slices(shape: tuple[int, ...], most: int = 65535) -> int:
    """Into how many slices of equal size positions go, so that clips times heads, one dim of a grid, are `most`."""
    clips, _, positions, heads, _ = shape
    return next(n for n in range(1, positions + 1) if positions % n == 0 and clips * positions // n * heads <= most)


def flex(shape: tuple[int, ...]) -> Callable[..., Tensor]:
    """FlexAttention, compiled, on the view in which positions are heads; the bias is a score_mod."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    h, parts = shape[3], slices(shape)

    @cache
    def biased(table: Tensor) -> Callable[..., Tensor]:
        return lambda score, batch, head, i, j: score + table[0, head % h, i, j]

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
        modified = None if bias is None else biased(bias)
        found = []
        for some in zip(*(x.chunk(parts, 2) for x in (q, k, v)), strict=True):
            heads = (x.flatten(2, 3).transpose(1, 2) for x in some)
            out = compiled(*heads, score_mod=modified)
            found.append(torch.unflatten(out.transpose(1, 2), 2, (-1, h)))
        return found[0] if parts == 1 else torch.cat(found, 2)

    return run


def warm(run: Run, shape: tuple[int, ...]) -> bool:
    """Compiles what `time_peers` times of FlexAttention, in a process of its own: the compiler's cache is on disk.

    Whether all of it works.
    """
    grad, q, k, v, table = projections(run, shape)
    function, works = flex(shape), True
    for form, bias in (("plain", None), ("bias", table)):
        try:
            function(q, k, v, bias)
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            torch.autograd.grad(function(*leaves, bias), leaves, grad)
        except Exception as refusal:  # a compiler raises anything
            works = False
            run.say("flex", shape=shape, bias=form, refused=why(refusal))
    return works


def time_peers(run: Run, shape: tuple[int, ...], reserve: float, names: Collection[str] | None = None) -> None:
    """As `time_ours`; backward is autograd's, as a training step runs it, without a gradient of the bias.

    `names`: of those alone; else of all but FlexAttention, which compiles.
    """
    grad, q, k, v, table = projections(run, shape)
    size = q.numel() * q.element_size()
    found: dict[str, Callable[[], Callable[..., Tensor]]] = {name: lambda f=f: f for name, f in peers(shape).items()}  # type: ignore[misc]
    found[FLEX] = lambda: flex(shape)
    for name in names if names is not None else [x for x in found if x != FLEX]:
        function: Callable[..., Tensor] | None = None
        for form in ("plain", "bias") if name in BIASED else ("plain",):
            if run.late("peers", reserve):
                return
            bias = table if form == "bias" else None
            row = {"shape": shape, "kernel": name, "bias": form}
            try:
                function = function or found[name]()
                ahead = run.timed("temporal", 4 * size, lambda f=function, b=bias: f(q, k, v, b), **row, way="forward")  # type: ignore[misc]
                call = lambda q, k, v, f=function, b=bias: f(q, k, v, b)  # type: ignore[misc] # noqa: E731
                back = time_gradient(run, call, [q, k, v], grad, row)
            except Exception as refusal:  # a compiler raises anything
                run.say("temporal peer", **row, refused=why(refusal))
                continue
            run.say("temporal peer", **row, forward_backward=[ahead, back])


def time_gradient(
    run: Run, call: Callable[..., Tensor], given: list[Tensor], grad: Tensor, row: dict[str, Any]
) -> list[float] | str:
    """Backward of call(*given), as `Run.timed` answers.

    What is compiled gives its memory away and cannot run backward twice on one graph: forward runs before each time,
    and its own time is taken off.
    """
    leaves = [x.detach().requires_grad_() for x in given]
    size = grad.numel() * grad.element_size()
    out = call(*leaves)
    if row["kernel"] != FLEX:
        again = lambda: torch.autograd.grad(out, leaves, grad, retain_graph=True)  # noqa: E731
        return run.timed("temporal", 7 * size, again, **row, way="backward")
    torch.autograd.grad(out, leaves, grad)  # compiles, or raises
    whole = lambda: torch.autograd.grad(call(*leaves), leaves, grad)  # noqa: E731
    ahead = run.timed("temporal", 4 * size, lambda: call(*leaves), **row, way="forward with a gradient")
    both = run.timed("temporal", 11 * size, whole, **row, way="both")
    if isinstance(ahead, str) or isinstance(both, str):
        return ahead if isinstance(ahead, str) else both
    ms = both[0] - ahead[0]
    return [ms, 7e3 * size / ms / run.copy, both[2] - ahead[2]]


def time_launches(run: Run, shape: tuple[int, ...]) -> None:
    """The other ways to launch, with the bias and, for 64 frames, without."""
    grad, q, k, v, table = projections(run, shape)
    size = q.numel() * q.element_size()
    for form, bias in (("bias", table), ("plain", None))[: 2 if shape[1] == 64 else 1]:
        found: dict[str, Any] = {}
        for back, launch in launches(shape[1]):
            if run.late("launches"):
                break
            call = (
                (lambda x=launch, b=bias: backward(grad, q, k, v, b, x))
                if back
                else (lambda x=launch, b=bias: forward(q, k, v, b, x))
            )  # type: ignore[misc]
            name = f"{'backward' if back else 'forward'} {launch.rows} rows {launch.warps} warps"
            name += f" {launch.stages} stages {launch.turns} turns"
            row = {"shape": shape, "launch": name, "bias": form}
            found[name] = run.timed("launches", (7 if back else 4) * size, call, **row)
        run.say("launches", shape=shape, bias=form, **found)


def large(run: Run) -> None:
    """More than 2^31 elements and far more sequences than a grid dim has programs."""
    shape = (1, 4, 50, 2, 16) if run.dry else (1, 16, 614_400, 4, 64)
    q, k, v = (torch.randn(shape, device=run.device, dtype=torch.bfloat16) for _ in range(3))
    out = forward(q, k, v, None)
    worst = 0.0
    for s in (0, shape[2] // 2, shape[2] - 1):
        want = attend(*(x[:, :, s : s + 1].double() for x in (q, k, v)), kernel="reference")
        worst = max(worst, error(out[:, :, s : s + 1], want))
    run.say("large", shape=shape, error=worst, ok=worst < TOLERANCE["bf16"])
