"""A training step of the shipped base stage, with our kernels and without."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import gpu_norm
import torch
import torch.nn.functional as F
from measure import Run, error, guarded, poison
from torch import Tensor

from cascade import attention
from cascade.cond import Cond
from cascade.kernels import norm
from cascade.nets.unet import VideoUNet
from cascade.nets.unet_config import LevelSpec, Mixer, UNetConfig
from cascade.text import Text

# What one norm of the network is asked for: C, H, W, the types of x, of the output and of film, and silu.
Norming = tuple[int, int, int, torch.dtype, torch.dtype, torch.dtype | None, bool]
CASES = [(kernels, dtype) for dtype in ("bf16", "tf32") for kernels in ("ours", "torch")]
CASES += [("norm", "bf16"), ("attention", "bf16")]


def normings(bf16: bool) -> set[Norming]:
    """All that the norms of the network are asked for, found by running it on the CPU."""
    found: set[Norming] = set()
    takes, group_norm = norm.takes, norm.group_norm

    def spy(x: Tensor, *args: Any, **rest: Any) -> Tensor:
        film = args[2]
        film_type = None if film is None else film.dtype
        found.add((*x.shape[1:], x.dtype, rest["dtype"], film_type, rest["silu"]))
        return group_norm(x, *args, **rest)

    norm.takes, norm.group_norm = lambda x, groups: True, spy
    try:
        run = Run(dry=True, budget=math.inf, began=0.0, share=None, log=None)
        _, loss = base(run, size=32)
        with torch.no_grad(), configured("ours", bf16, "cpu"):
            loss()
    finally:
        norm.takes, norm.group_norm = takes, group_norm
    return found


def check(run: Run) -> None:
    """Every norm of the network against float64; on the GPU this compiles them before the steps are timed."""
    for dtype in ("bf16", "fp32"):
        for asked in sorted(normings(dtype == "bf16"), key=str):
            if run.mine():
                check_norm(run, asked)


@guarded("unet norm")
def check_norm(run: Run, asked: Norming) -> None:
    c, height, width, given, out, film_type, silu = asked
    frames = 2 if run.dry else 300
    grad, x, weight, bias, film = gpu_norm.draw(run, (frames, c, height, width), given, film_type is not None)
    leaves = [x, weight, bias] + ([] if film is None else [film.to(film_type)])
    wide = [t.double().requires_grad_() for t in leaves]
    u = gpu_norm.torchs(*wide[:3], wide[3] if film is not None else None, silu)
    want = [u.detach(), *torch.autograd.grad(u, wide, grad.to(out).double())]
    poison(run, grad.numel())
    groups = math.gcd(c, 8)
    for leaf in leaves:
        leaf.requires_grad_()
    rest: dict[str, Any] = {"groups": groups, "silu": silu, "dtype": out}
    y = norm.group_norm(leaves[0], leaves[1], leaves[2], leaves[3] if film is not None else None, **rest)
    got = [y.detach(), *torch.autograd.grad(y, leaves, grad.to(out))]
    errors = [error(a, b) for a, b in zip(got, want, strict=True)]
    run.check("unet norm", "bf16" if torch.bfloat16 in asked else "fp32", errors, asked=[str(a) for a in asked])


def base(run: Run, size: int = 8) -> tuple[VideoUNet, Callable[[], Tensor]]:
    """The network of conf/stage/tiny/base.yaml with no layer at zero, and its loss on random clips."""
    torch.manual_seed(0)
    deep: dict[str, Any] = {"mixer": Mixer.BOTH, "spatial_attention": True, "text_attention": True}
    levels = [LevelSpec(channels=64), LevelSpec(channels=96, **deep), LevelSpec(channels=128, **deep)]
    model = VideoUNet(UNetConfig(levels=levels, patch=2, frame_position=True)).to(run.device)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    batch, frames, size = (1, 2, size) if run.dry else (256, 8, 32)
    known, clips = torch.randn(2, batch, 3, frames, size, size, device=run.device)
    t, level = torch.rand(2, batch, device=run.device)
    real = torch.ones(batch, 24, dtype=torch.bool, device=run.device)
    text = Text(torch.randn(batch, 24, 128, device=run.device), real)
    cond = Cond(known, torch.ones_like(known[:, :1]), level, torch.full_like(t, 4.0), text)
    z = torch.randn_like(clips)
    return model, lambda: F.mse_loss(model(z, t, cond).float(), clips)


@contextlib.contextmanager
def configured(which: str, bf16: bool, device: str) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        if which in ("torch", "attention"):
            stack.enter_context(norm.native())
        if which in ("torch", "norm"):
            stack.enter_context(attention.use("sdpa"))
        if bf16:
            stack.enter_context(torch.autocast(device, torch.bfloat16))
        yield


def steps(run: Run) -> None:
    """With both kernels, with none and with one: in eager mode, and as a CUDA graph, where nothing waits for Python."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True
    model, loss = base(run)
    optimizer = torch.optim.AdamW(model.parameters(), 0.0, fused=not run.dry)  # the weights stay
    grads: dict[str, list[Tensor]] = {}
    for which, dtype in CASES:
        if run.late("unet", 4):
            break
        answered: set[str] = set()

        def gradient(which: str = which, dtype: str = dtype, answered: set[str] = answered) -> Tensor:
            with configured(which, dtype == "bf16", run.device.type), attention.record() as names:
                value = loss()
            value.backward()
            answered.update(names)
            return value.detach()

        def step(gradient: Callable[[], Tensor] = gradient) -> None:
            optimizer.zero_grad()
            gradient()
            optimizer.step()

        optimizer.zero_grad()
        if not run.dry:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        row: dict[str, Any] = {"kernels": which, "dtype": dtype, "loss": float(gradient())}
        if which in ("ours", "torch"):
            grads[f"{which} {dtype}"] = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        if not run.dry:
            row["peak_GB"] = torch.cuda.max_memory_allocated() / 1e9
            row |= {"graph_ms": graphed(gradient, optimizer), "eager_ms": wall(step, 5)}
        run.say("unet", **row, attention=sorted(answered))
    for one, other in (("ours tf32", "torch tf32"), ("ours bf16", "torch bf16"), ("torch bf16", "torch tf32")):
        if one in grads and other in grads:
            run.say("unet", gradients=f"{one} against {other}", apart=apart(grads[one], grads[other]))


def apart(one: list[Tensor], other: list[Tensor]) -> float:
    """Relative, over all parameters."""
    difference = sum(float((a - b).square().sum()) for a, b in zip(one, other, strict=True))
    return math.sqrt(difference / sum(float(b.square().sum()) for b in other))


def wall(step: Callable[[], Any], times: int) -> float:
    """Median milliseconds of a step from the outside, after one that warms up."""
    found = []
    for _ in range(times + 1):
        torch.cuda.synchronize()
        before = time.perf_counter()
        step()
        torch.cuda.synchronize()
        found.append(1e3 * (time.perf_counter() - before))
    return sorted(found[1:])[times // 2]


def graphed(gradient: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> float | str:
    """Forward and backward alone, replayed."""
    try:
        optimizer.zero_grad()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            gradient()
        torch.cuda.current_stream().wait_stream(side)
        optimizer.zero_grad()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gradient()
        found = wall(graph.replay, 7)
        optimizer.zero_grad()
        return found
    except RuntimeError as failure:
        return str(failure).strip().partition("\n")[0][:120]
