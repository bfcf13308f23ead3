"""Weights that stay in host memory and visit the device part by part, each while it works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

__all__ = ["offload"]


def offload(net: nn.Module, device: Callable[[], torch.device]) -> None:
    """From now on each part of `net` copies its weights to `device()` before its forward pass, and drops them after it.

    A part is a child of the network or a member of a list of children (a block, a convolution): nothing is computed by
    a smaller one alone. Results are equal bit for bit; no gradient may pass, it would find them on the host.
    """
    for part in _parts(net):
        parameters = list(part.parameters())
        host = [parameter.data for parameter in parameters]

        def come(*_: Any, parameters: list[nn.Parameter] = parameters, host: list[torch.Tensor] = host) -> None:
            for parameter, data in zip(parameters, host, strict=True):
                parameter.data = data.to(device(), copy=True)

        def go(*_: Any, parameters: list[nn.Parameter] = parameters, host: list[torch.Tensor] = host) -> None:
            for parameter, data in zip(parameters, host, strict=True):
                parameter.data = data

        part.register_forward_pre_hook(come)
        part.register_forward_hook(go)


def _parts(net: nn.Module) -> Iterator[nn.Module]:
    for child in net.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _parts(child)
        else:
            yield child
