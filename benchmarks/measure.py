"""What the parts of gpu_kernels.py share: where results go, how time is taken, when it is up, what counts as right."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TOLERANCE = {"fp32": 1e-5, "tf32": 3e-3, "bf16": 1e-2, "fp16": 2e-3}  # relative, in the norm over a tensor


class Run:
    """One run of the script, or (`share` = (i, n)) the process with one of n parts of its checks."""

    def __init__(self, dry: bool, budget: float, began: float, share: tuple[int, int] | None, log: Path | None) -> None:
        self.dry, self.budget, self.began, self.share, self.log = dry, budget, began, share, log
        self.device = torch.device("cpu" if dry else "cuda")
        self.copy = math.nan  # bytes per second of a large copy
        self.failed = 0
        self.passed: dict[str, list[float]] = {}
        self._count = 0

    @property
    def now(self) -> float:
        """Seconds since the script began."""
        return time.time() - self.began

    def say(self, part: str, show: bool = True, **row: Any) -> None:
        """A line of JSON into the log and, if it is to be seen, on stdout."""
        line = json.dumps({"part": part, "at": round(self.now, 1), **_short(row)})
        if show:
            print(line, flush=True)
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as file:  # one write a line: processes append side by side
                file.write(line + "\n")

    def mine(self) -> bool:
        """Whether the next check is this process' part of them."""
        self._count += 1
        return self.share is None or self._count % self.share[1] == self.share[0]

    def late(self, part: str, reserve: float = 0.0) -> bool:
        """Whether fewer than `reserve` seconds are left; says so."""
        if self.now < self.budget - reserve:
            return False
        self.say(part, skipped="out of time")
        return True

    def check(self, part: str, dtype: str, errors: list[float], **row: Any) -> None:
        """A NaN never passes."""
        ok = all(e < TOLERANCE[dtype] for e in errors)
        self.failed += not ok
        self.passed.setdefault(f"{part} {dtype}", []).append(max(errors))
        self.say(part, show=not ok, dtype=dtype, errors=errors, ok=ok, **row)

    def time(self, function: Callable[[], Any], rep: int = 25) -> float:
        """Median milliseconds, caches cold."""
        if self.dry:
            before = time.perf_counter()
            function()
            return 1e3 * (time.perf_counter() - before)
        from triton.testing import do_bench

        return float(do_bench(function, warmup=5, rep=rep, return_mode="median"))

    def timed(self, part: str, least: float, function: Callable[[], Any], **row: Any) -> list[float] | str:
        """[milliseconds, fraction of the copy's bandwidth if it moved `least` bytes], or why it could not."""
        try:
            ms = self.time(function)
        except (RuntimeError, ValueError, ImportError) as refusal:  # of a peer: that is a result
            why = str(refusal).strip().partition("\n")[0][:70]
            self.say(part, show=False, refused=why, **row)
            return why
        found = [ms, 1e3 * least / ms / self.copy]
        self.say(part, show=False, ms=ms, fraction=found[1], **row)
        return found


def _short(x: Any) -> Any:
    if isinstance(x, float):
        return float(f"{x:.4g}")
    if isinstance(x, dict):
        return {key: _short(value) for key, value in x.items()}
    return [_short(y) for y in x] if isinstance(x, list | tuple) else x


def error(got: Tensor, want: Tensor) -> float:
    """Relative, in float64."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-3))


def poison(run: Run, elements: int) -> None:
    """What the next outputs are allocated from is full of NaN."""
    held = [torch.full((elements,), math.nan, device=run.device) for _ in range(6)]
    del held
