"""Kernels of our own in Triton, each behind a `torch.library` operator that plain torch answers on the CPU.

An operator (`temporal`, `norm`) and its Triton code (`temporal_triton`, `norm_triton`) are apart: Triton's language is
written at the top of a module, so the second kind imports Triton as it loads, and only a launch loads it.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

__all__ = ["DTYPES", "EPS", "known", "multiprocessors", "once", "say_once", "unfit"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6  # of the root mean square of q and k

P = ParamSpec("P")
R = TypeVar("R")


def known(function: Callable[P, R]) -> Callable[P, R]:
    """`function`, called as code is compiled and then a constant of it: `torch.compile` does not look inside.

    As `torch.compiler.assume_constant_result`, which would import the compiler, a second of every start.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def once(function: Callable[P, R]) -> Callable[P, R]:
    """`function` for arguments that can be hashed, called once for each: `functools.cache`, and `known`."""
    remembered = functools.cache(function)

    @functools.wraps(function)
    def answer(*args: P.args, **kwargs: P.kwargs) -> R:
        return remembered(*args, **kwargs)  # type: ignore[arg-type]

    answer.cache_clear = remembered.cache_clear  # type: ignore[attr-defined]
    return known(answer)


def unfit(x: Tensor) -> str | None:
    """Why Triton's kernels cannot take this CUDA tensor, None if they can."""
    if x.device.type != "cuda":
        return f"Triton has kernels for cuda, not for {x.device.type}"
    if x.dtype not in DTYPES:
        return f"the Triton kernels take float32, bfloat16 and float16, not {x.dtype}"
    return _missing() or _old(x.device)


@once
def multiprocessors(device: torch.device) -> int:
    """How many programs run side by side at least; a few where there is no GPU (Triton's interpreter)."""
    if device.type != "cuda":
        return 2
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@once
def say_once(message: str) -> None:
    """A warning in the log, the first time."""
    logging.getLogger("cascade").warning(message)


@once
def _missing() -> str | None:
    try:
        importlib.import_module("triton")
    except (ImportError, OSError, RuntimeError) as error:  # a wheel made for another torch or libc
        first = str(error).partition("\n")[0]
        return f"Triton does not import ({first}); repair: install the CUDA build of torch, which brings its Triton"
    return None


@once
def _old(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= (8, 0):
        return None
    return "the Triton kernels need compute capability 8.0, this GPU has {}.{}".format(*capability)
