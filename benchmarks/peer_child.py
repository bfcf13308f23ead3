"""One network in a process of its own: answers the words on its standard input with lines of JSON.

    python benchmarks/peer_child.py SPEC      SPEC is JSON: package, settings, work, threads, named, seconds

First it says what it built: parameters, FLOPs, bytes, some numbers of the output. Then it answers `forward` and `train`
with times, `profile` with the time by kind of operation.

Only what it answers goes to the standard output it was started with: peers print.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

import torch
from peer_models import Call, Work, build, load
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

GEMM = 1024  # side of the square matrices whose product is the ceiling
KINDS = {
    "convolution": ("mkldnn_convolution", "slow_conv3d", "convolution", "thnn_conv2d", "_slow_conv2d"),
    "linear": ("mm", "addmm", "mkl_linear", "linear"),
    "attention": ("flash_attention", "bmm", "softmax"),
    "norm": ("norm", "var", "var_mean", "rsqrt"),
    "copies": ("copy_", "cat", "clone", "contiguous", "upsample", "fill_", "zero_", "gather", "index"),
}


class Subject:
    """The network under test; memory is counted from when its package was imported."""

    def __init__(self, package: str, settings: dict[str, Any], work: Work, named: bool) -> None:
        self.net, self.call = build(package, settings, work, named)
        self.x = work.clip()
        self.optimizer: torch.optim.Optimizer | None = None

    def built(self, before: int) -> dict[str, Any]:
        """Numbers that do not vary. `before` is the resident memory before the network was built."""
        with torch.inference_mode():
            out, flops = counted(self.call, self.x)
        if not bool(torch.isfinite(out).all()) or out.shape != self.x.shape:
            raise SystemExit(f"peer_child.py: an output of {tuple(out.shape)} for {tuple(self.x.shape)}, or not finite")
        params = sum(p.numel() for p in self.net.parameters())
        peak = resident("VmHWM") - before
        return {"params": params, "flops": sum(flops.values()), "bytes": peak, "output": out.flatten()[::997].tolist()}

    def forward(self) -> None:
        with torch.inference_mode():
            self.call(self.x)

    def train(self) -> None:
        """A whole step: forward, backward, AdamW."""
        if self.optimizer is None:
            self.net.train()
            self.optimizer = torch.optim.AdamW(self.net.parameters(), 1e-5)
        self.optimizer.zero_grad()
        (self.call(self.x) - self.x).square().mean().backward()
        self.optimizer.step()


def serve(spec: dict[str, Any], answer: Callable[[dict[str, Any]], None]) -> None:
    """Builds the network, says so, then answers words until there are no more."""
    torch.set_num_threads(spec["threads"])
    load(spec["package"])
    counted(torch.square, torch.zeros(1))  # the counter imports 100 MB of its own as it first runs
    before = resident("VmRSS")
    subject = Subject(spec["package"], spec["settings"], Work(**spec["work"]), spec["named"])
    answer(subject.built(before))
    for line in sys.stdin:
        word = line.strip()
        if word == "profile":
            answer(profiled(subject.call, subject.x))
        elif word in ("forward", "train"):
            step: Callable[[], None] = getattr(subject, word)
            if word == "train" and subject.optimizer is None:
                step()  # the first makes the optimizer's state
                step()
            answer({**times(step, spec["seconds"]), "bytes": resident("VmHWM") - before})
        else:
            raise SystemExit(f"peer_child.py: {word!r} is not one of forward, train, profile")


def times(step: Callable[[], None], seconds: float, least: int = 2, long: float = 5.0) -> dict[str, float]:
    """Medians of CPU and wall seconds of `step`; the ceiling beside them.

    Run at least `least` times and for so many `seconds`; once if that takes `long`.
    """
    ceiling = [gemm()]
    taken = [clocked(step)]
    while sum(cpu for cpu, _ in taken) < (long if len(taken) < least else seconds):
        taken.append(clocked(step))
    ceiling.append(gemm())
    cpu, wall = (median([t[i] for t in taken]) for i in (0, 1))
    gemm_cpu, gemm_wall = (median([t[i] for t in ceiling]) for i in (0, 1))
    return {"cpu": cpu, "wall": wall, "gemm_cpu": gemm_cpu, "gemm_wall": gemm_wall}


def gemm(repeats: int = 5) -> tuple[float, float]:
    """FLOP per second of CPU time and of wall time that a large product reaches."""
    a, b = torch.rand(2, GEMM, GEMM)
    out = torch.empty(GEMM, GEMM)
    torch.mm(a, b, out=out)
    taken = [clocked(lambda: torch.mm(a, b, out=out)) for _ in range(repeats)]
    return 2 * GEMM**3 / median([cpu for cpu, _ in taken]), 2 * GEMM**3 / median([wall for _, wall in taken])


def clocked(step: Callable[[], Any]) -> tuple[float, float]:
    """CPU seconds of all threads, and wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    step()
    return time.process_time() - cpu, time.perf_counter() - wall


def median(values: list[float]) -> float:
    ranked = sorted(values)
    middle = len(ranked) // 2
    return ranked[middle] if len(ranked) % 2 else (ranked[middle - 1] + ranked[middle]) / 2


# counting ------------------------------------------------------------------------------------------------------------


def counted(call: Call, x: Tensor) -> tuple[Tensor, dict[str, int]]:
    """call(x), and its FLOPs by operator: products and convolutions, a multiplication with its addition as two.

    PyTorch's counter does not know the fused attention of the CPU, so its two products are added here: without them
    the transformers would seem slower than they are.
    """
    fused = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}
    with FlopCounterMode(display=False, custom_mapping=fused) as counter:
        out = call(x)
    return out, {str(op).removeprefix("aten."): n for op, n in counter.get_flop_counts().get("Global", {}).items()}


def attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """q (B, h, M, D), k (B, h, N, D), v (B, h, N, E): 2 M N (D + E) for every head."""
    return 2 * prod(q[:3]) * k[2] * (q[3] + v[3])


def resident(field: str) -> int:
    """VmRSS (now) or VmHWM (greatest so far) of this process, bytes. ru_maxrss would keep the parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])


def profiled(call: Call, x: Tensor) -> dict[str, Any]:
    """Share of the time, and FLOP per second of CPU time, by kind of operation.

    The profiler sees wall time: on a busy machine its shares still hold, so they divide the CPU time.
    """
    with torch.inference_mode():
        _, flops = counted(call, x)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as run:
            call(x)
        seconds = median([clocked(lambda: call(x))[0] for _ in range(3)])
    taken: dict[str, float] = defaultdict(float)
    work: dict[str, float] = defaultdict(float)
    for event in run.key_averages():
        taken[kind(event.key)] += event.self_cpu_time_total
    for operator, n in flops.items():
        work[kind(operator)] += n
    total = sum(taken.values())
    return {
        "gemm": gemm()[0],
        "kinds": {name: {"share": t / total, "speed": work[name] * total / (t * seconds)} for name, t in taken.items()},
    }


def kind(operator: str) -> str:
    """The entry of KINDS that an operator's name belongs to."""
    name = operator.removeprefix("aten::")
    for group, words in KINDS.items():
        if any(name == word or (len(word) > 3 and word in name) for word in words):
            return group
    return "elementwise and the rest"


def main() -> None:
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(found: dict[str, Any]) -> None:
        channel.write(json.dumps(found) + "\n")
        channel.flush()

    serve(json.loads(sys.argv[1]), answer)


if __name__ == "__main__":
    main()
