"""What several tests say alike."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cascade.chain import Chain, chain_settings
from cascade.noise import generator
from cascade.planning.plan import Plan, plan


def near(got: Tensor, expected: Tensor, atol: float = 1e-6) -> None:
    """Not torch.testing, whose first comparison imports torch.distributed for seconds."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert (got - expected).abs().max() <= atol


def draw(name: str, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator(name))


def changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of `settings` with other values at dotted paths ("/" for ".")."""
    tree = copy.deepcopy(dict(settings))
    for path, value in changes.items():
        *folders, key = path.split("/")
        part = tree
        for folder in folders:
            part = part[folder]
        part[key] = value
    return tree


@cache
def composed(name: str) -> dict[str, Any]:
    return chain_settings(name)


def chain(name: str = "tiny", **changes: Any) -> Chain:
    """The chain of conf/chain with changed settings."""
    return Chain.read(changed(composed(name), changes))


@cache
def planned(name: str) -> Plan:
    """The plan of a chain as it is: that of a large one takes half a minute."""
    return plan(chain(name))
