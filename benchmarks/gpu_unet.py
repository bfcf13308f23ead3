"""A training step of the shipped base stage, with our kernels and without."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from measure import Run
from torch import Tensor

from cascade import attention
from cascade.kernels import norm
from cascade.text import Text
from cascade.unet import Cond, LevelSpec, Mixer, UNetConfig, VideoUNet

CASES = [(kernels, dtype) for dtype in ("bf16", "tf32") for kernels in ("ours", "torch")]
CASES += [("norm", "bf16"), ("attention", "bf16")]


def base(run: Run) -> tuple[VideoUNet, Callable[[], Tensor]]:
    """The network of conf/stage/tiny/base.yaml with no layer at zero, and its loss on random clips."""
    torch.manual_seed(0)
    deep: dict[str, Any] = {"mixer": Mixer.BOTH, "spatial_attention": True, "text_attention": True}
    levels = [LevelSpec(channels=64), LevelSpec(channels=96, **deep), LevelSpec(channels=128, **deep)]
    model = VideoUNet(UNetConfig(levels=levels, patch=2, frame_position=True)).to(run.device)
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.02)
    batch, frames, size = (1, 2, 8) if run.dry else (256, 8, 32)
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
