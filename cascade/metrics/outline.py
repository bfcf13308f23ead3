"""How well the outlines of things in the procedural world are drawn, whatever the prompt says.

The soft mask of each thing (cascade/metrics/attributes.py) is compared with every shape of the world, drawn with the
same area at the same place, sharp or blurred: a dented circle is still a circle, but no template covers it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cascade.data.captions import Spec
from cascade.metrics.attributes import measure


def judge(frames: Tensor, specs: Sequence[Spec]) -> dict[str, Tensor]:
    """`iou` (B,) of clips `frames` (B, 3, F, H, W) in [-1, 1]: intersection over union with the best template.

    The mean over the largest things of a clip, as many as its caption names; NaN where none is seen. Real clips give
    about 0.99.
    """
    found = [
        [thing.match for thing in seen.things[: len(spec.things)]]
        for seen, spec in zip(measure(frames), specs, strict=True)
    ]
    return {"iou": torch.tensor([sum(row) / len(row) if row else torch.nan for row in found])}
