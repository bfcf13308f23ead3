"""Our Triton kernels on a GPU: right against float64, and fast against PyTorch's own. One JSON line a result.

    python benchmarks/gpu_kernels.py [--budget 75] [--log FILE] [--parts check,temporal,norm,unet,peers,launches,large]
    python benchmarks/gpu_kernels.py --dry        # in miniature on the CPU; with TRITON_INTERPRET=1 through Triton

Needs torch, triton, numpy, safetensors and this tree, nothing else. Times are [milliseconds, fraction, milliseconds
from Python]. The first are the device's, which is kept busy until all is launched. The fraction is the least traffic
the work needs (each input read once, each output written once) over them, relative to a large copy on the same card.
The last are those of a call in a row of calls, which for small work is what launching it takes. The checks run in
processes of their own, at once, which also fills Triton's cache of compiled kernels for what is timed after them; they
print what fails and a summary, the log holds them all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gpu_norm
import gpu_temporal
import gpu_unet
import torch
from measure import INTERPRETED, Run

PARTS = ("check", "temporal", "norm", "unet", "peers", "launches", "large")
PROCESSES = 12


def check(run: Run) -> None:
    """This process' share of the checks."""
    torch.set_num_threads(1)
    gpu_temporal.check(run)
    gpu_norm.check(run)
    gpu_unet.check(run)
    run.say("checked", show=False, process=run.share, failed=run.failed, cases=run.passed)


def check_at_once(run: Run, arguments: list[str]) -> list[tuple[int, ...]]:
    """The checks, each process a share; a process that dies or takes half of all time is a failed check.

    Beside them FlexAttention is compiled: the shapes for which that is done.
    """
    count = 1 if run.dry else PROCESSES
    command = [sys.executable, __file__, *arguments, "--began", str(run.began)]
    shapes = [] if run.dry else gpu_temporal.TIMED[:3]
    asked = [["--share", f"{i}/{count}"] for i in range(count)] + [["--flex", str(i)] for i in range(len(shapes))]
    started = [subprocess.Popen([*command, *words]) for words in asked]
    codes = []
    for words, process in zip(asked, started, strict=True):
        try:
            codes.append(process.wait(max(1.0, run.budget / 2 - run.now)))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(-1)
        if codes[-1]:
            run.say("check", process=" ".join(words), code=codes[-1])
    run.say("check", processes=count, with_failures=sum(code != 0 for code in codes[:count]))
    return [shape for shape, code in zip(shapes, codes[count:], strict=True) if code == 0]


def ceilings(run: Run) -> None:
    """The bandwidth of a large copy, which all fractions are relative to."""
    x = torch.randn(2**16 if run.dry else 2**30, device=run.device, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    run.copy = 2e3 * x.numel() * x.element_size() / run.time(lambda: y.copy_(x), rep=50)
    name = "CPU" if run.dry else torch.cuda.get_device_name()
    run.say("ceilings", device=name, torch=torch.__version__, copy_GBs=run.copy / 1e9)


def measure(run: Run, parts: list[str], flexed: list[tuple[int, ...]]) -> None:
    """What matters most first; peers that might take the device down with them last."""
    clips, images = (gpu_temporal.DRY, gpu_norm.DRY) if run.dry else (gpu_temporal.TIMED, gpu_norm.TIMED)
    ceilings(run)
    for shape in clips if "temporal" in parts else ():
        if not run.late("temporal", 30):
            gpu_temporal.time_ours(run, shape)
    for shape in images if "norm" in parts else ():
        for name in ("bf16", "fp32"):
            gpu_norm.timings(run, shape, name)
    if "unet" in parts and not INTERPRETED:
        gpu_unet.steps(run)
    if not run.dry:
        torch.cuda.empty_cache()
    compiled = not run.dry or INTERPRETED
    for shape in clips[:4] if "peers" in parts and not run.dry else ():
        gpu_temporal.time_peers(run, shape, 3)
    for shape in (gpu_norm.DRY if run.dry else gpu_norm.TUNED) if "launches" in parts and compiled else ():
        gpu_norm.tiles(run, shape)
    for shape in clips[:3] if "launches" in parts and compiled else ():
        gpu_temporal.time_launches(run, shape)
    for shape in flexed if "peers" in parts else ():
        gpu_temporal.time_peers(run, shape, 15, [gpu_temporal.FLEX])
    if "large" in parts and not run.late("large", 3):
        gpu_temporal.large(run)
    for shape in clips[4:] if "peers" in parts and not run.dry else ():
        gpu_temporal.time_peers(run, shape, 2)


def main() -> int:
    ask = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ask.add_argument("--dry", action="store_true", help="in miniature on the CPU")
    ask.add_argument("--budget", type=float, default=75.0, help="seconds in all")
    ask.add_argument("--parts", default=",".join(PARTS))
    ask.add_argument("--log", type=Path, help="a file for every line, also those not shown")
    ask.add_argument("--share", help=argparse.SUPPRESS)
    ask.add_argument("--flex", type=int, help=argparse.SUPPRESS)
    ask.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    given = ask.parse_args()
    share = None
    if given.share:
        i, n = given.share.split("/")
        share = int(i), int(n)
    run = Run(given.dry, given.budget, given.began, share, given.log)
    if share is not None:
        check(run)
        return int(run.failed > 0)
    if given.flex is not None:
        return int(not gpu_temporal.warm(run, gpu_temporal.TIMED[given.flex]))
    parts = given.parts.split(",")
    flexed = check_at_once(run, sys.argv[1:]) if "check" in parts else []
    measure(run, parts, flexed)
    run.say("end")
    return 0


if __name__ == "__main__":
    sys.exit(main())
