"""LaVie's interpolation: like its base, but with the incoming frames on the channels and without positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cascade.importers import Layout
from cascade.importers.lavie import LICENCE, averaged, inflated
from cascade.nets.unet3d_config import UNet3DConfig


def network(tree: Mapping[str, Any]) -> UNet3DConfig:
    return inflated(tree, concat=True, sparse=True, temporal_last=True)


LAYOUT = Layout(LICENCE, ("UNet2DConditionModel", "UNet3DConditionModel"), network, tensors=averaged)
