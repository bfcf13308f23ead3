"""What the parts of gpu_kernels.py share: where results go, how time is taken, when it is up, what counts as right."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import torch
from torch import Tensor

from cascade.errors import CascadeError

Check = TypeVar("Check", bound=Callable[..., None])

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# Of a way to launch or of a peer: a result, not an end. The last are what packages that do not fit together raise.
REFUSALS = (RuntimeError, ValueError, ImportError, OSError, CascadeError, AttributeError, TypeError, LookupError)
REFUSALS += (AssertionError,)
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
        self._flush: Tensor | None = None  # larger than the caches

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
        """Median milliseconds that the device needs, caches cold: it is kept busy until all is launched."""
        if self.dry:
            return self._host(function)
        function()
        torch.cuda.synchronize()
        host = min(self._host(function) for _ in range(3))  # ms to launch it
        torch.cuda.synchronize()
        if self._flush is None:
            self._flush = torch.empty(2**28, dtype=torch.int8, device=self.device)
        taken: list[float] = []
        began = time.perf_counter()
        while len(taken) < 5 or (1e3 * (time.perf_counter() - began) < 2 * rep and len(taken) < 50):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            self._flush.zero_()
            torch.cuda._sleep(int(2e6 * min(3.0, host + 0.1)))  # cycles, of which a ms has 2e6 at most
            start.record()
            function()
            end.record()
            end.synchronize()
            taken.append(float(start.elapsed_time(end)))
        return median(taken)

    def called(self, function: Callable[[], Any]) -> float:
        """Milliseconds a call in a row of calls from Python, caches warm: launching it may take longer than it."""
        if self.dry:
            return self._host(function)
        torch.cuda.synchronize()
        before = time.perf_counter()
        for _ in range(20):
            function()
        torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - before) / 20

    @staticmethod
    def _host(function: Callable[[], Any]) -> float:
        before = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - before)

    def timed(self, part: str, least: float, function: Callable[[], Any], **row: Any) -> list[float] | str:
        """[ms on the device, part of the copy's bandwidth if it moved `least` bytes, ms from Python], or why not."""
        try:
            ms, called = self.time(function), self.called(function)
        except REFUSALS as refusal:
            self.say(part, show=False, refused=why(refusal), **row)
            return why(refusal)
        found = [ms, 1e3 * least / ms / self.copy, called]
        self.say(part, show=False, ms=ms, fraction=found[1], called=called, **row)
        return found


def guarded(part: str) -> Callable[[Check], Check]:
    """For a function that checks one case of `part`, given the run first: what it raises is one failed check."""

    def around(check: Check) -> Check:
        @wraps(check)
        def attempt(run: Run, *args: Any, **rest: Any) -> None:
            try:
                check(run, *args, **rest)
            except Exception as failure:  # the other checks go on
                run.failed += 1
                run.say(part, ok=False, raised=why(failure), case=[str(x) for x in args])

        return attempt  # type: ignore[return-value]

    return around


def _short(x: Any) -> Any:
    if isinstance(x, float):
        return float(f"{x:.4g}")
    if isinstance(x, dict):
        return {key: _short(value) for key, value in x.items()}
    return [_short(y) for y in x] if isinstance(x, list | tuple) else x


def why(refusal: BaseException) -> str:
    """Its first line, or its kind if it says nothing."""
    return (str(refusal).strip().partition("\n")[0] or type(refusal).__name__)[:200]


def error(got: Tensor, want: Tensor) -> float:
    """Relative, in float64."""
    return float((got.double() - want).norm() / want.norm().clamp_min(1e-3))


def poison(run: Run, elements: int) -> None:
    """What the next outputs are allocated from is full of NaN."""
    held = [torch.full((elements,), math.nan, device=run.device) for _ in range(6)]
    del held
