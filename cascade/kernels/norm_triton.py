"""Launches the Triton code of the group norm, which loads with this: only `cascade.kernels.norm` imports it.

What fits into registers (`norm_plan`) is one launch, and what does not is two: the sums of all images, then their
application. Applications go backwards, so that what was read last is found in the L2 cache. A program's sums are put
together with those of its image's other programs by whichever of them ends last, in a fixed order, so that equal inputs
give equal bits. No program waits for another.
"""

from __future__ import annotations

from math import prod

import torch
from torch import Tensor

from cascade.kernels import norm_plan
from cascade.kernels.norm_backward_triton import backward_apply, backward_sums, backward_whole, parameter_gradients
from cascade.kernels.norm_forward_triton import forward_apply, forward_sums, forward_whole
from cascade.kernels.norm_plan import ceil, planned, power


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    groups: int,
    eps: float,
    silu: bool,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `cascade.kernels.norm.group_norm`, and the mean and 1 / deviation of every group, (N, G) float32."""
    images, positions = len(x), prod(x.shape[2:])
    how = planned(x, groups, norm_plan.FORWARD)
    y = torch.empty_like(x, dtype=dtype, memory_format=torch.channels_last)
    # two tensors and no views of one: what an operator answers may share no memory
    mean, rstd = (x.new_empty((images, groups), dtype=torch.float32) for _ in range(2))
    told = x if film is None else film
    flags = {"FILMED": film is not None, "SILU": silu, "FAST": x.is_cuda}
    grid = (how.programs,)
    if how.whole:
        forward_whole[grid](
            x, weight, bias, told, y, mean, rstd, positions, eps, **how.constants, **flags, **how.options
        )
        return y, mean, rstd
    size = (positions, how.chunk, how.parts)
    sums = x.new_empty((images, how.parts, 2, groups), dtype=torch.float32)
    forward_sums[grid](x, mean, rstd, sums, _done(x), *size, eps, **how.constants, **how.options)
    forward_apply[grid](x, weight, bias, told, y, mean, rstd, *size, **how.constants, **flags, **how.options)
    return y, mean, rstd


def backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    film: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, the gradients of weight and bias (2, C) in float32, dfilm (empty without film)."""
    images, channels, positions = len(x), x.shape[1], prod(x.shape[2:])
    how = planned(x, groups, norm_plan.BACKWARD)
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    daffine = x.new_empty((images, 2, channels), dtype=torch.float32)
    dfilm = x.new_empty(0) if film is None else torch.empty_like(film)
    given = (grad, x, weight, bias, x if film is None else film, mean, rstd)
    flags = {"FILMED": film is not None, "SILU": silu, "FAST": x.is_cuda}
    grid = (how.programs,)
    if how.whole:
        backward_whole[grid](*given, dx, daffine, dfilm, positions, **how.constants, **flags, **how.options)
        return dx, daffine.sum(0), dfilm
    size, fold = (positions, how.chunk, how.parts), how.constants["FOLD"]
    sums = x.new_empty((images, how.parts, 2, groups), dtype=torch.float32)
    lanewise = x.new_empty((images, how.parts, 2, fold, channels), dtype=torch.float32)
    moments = x.new_empty((images, 2, groups), dtype=torch.float32)
    backward_sums[grid](*given, sums, lanewise, moments, _done(x), *size, **how.constants, **flags, **how.options)
    backward_apply[grid](*given, dx, moments, *size, **how.constants, **flags, **how.options)
    lanes = min(64, power(channels))
    parameter_gradients[(images, ceil(channels, lanes))](
        weight, bias, given[4], lanewise, daffine, dfilm, how.parts,
        C=channels, FOLD=fold, LANES=lanes, ROWS=32, FILMED=film is not None,
    )  # fmt: skip
    return dx, daffine.sum(0), dfilm


def _done(x: Tensor) -> Tensor:
    """How many programs of each image have their sums."""
    return x.new_zeros(len(x), dtype=torch.int32)
