"""Fréchet video distance (Unterthiner et al. 2018) in the features of a network that knows the procedural world.

It is not the FVD of the papers, whose features are I3D's. Its bias grows with the square of the number of dimensions
over the number of clips: only numbers of equal n compare, and every one is to be read against the floor, the distance
between two sets of real clips.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cascade.metrics import features


def frechet(a: Tensor, b: Tensor) -> float:
    """|mean a - mean b|^2 + tr(A + B - 2 (A B)^(1/2)) of samples a, b (n, d) with covariances A, B, in float64.

    With A = X^T X and B = Y^T Y, tr (A B)^(1/2) (Dowson & Landau 1982) is the sum of the singular values of X Y^T:
    nothing is squared, and with fewer samples than dimensions nothing is as large as a covariance.
    """
    a, b = a.double(), b.double()
    x, y = _spread(a), _spread(b)
    inner = torch.linalg.svdvals(x @ y.T).sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(apart + x.square().sum() + y.square().sum() - 2 * inner))


def _spread(samples: Tensor) -> Tensor:
    """X of at most d rows with X^T X the unbiased covariance of (n, d)."""
    x: Tensor = (samples - samples.mean(0)) / (len(samples) - 1) ** 0.5
    if len(x) > x.shape[1]:
        x = torch.linalg.qr(x, mode="r").R
    return x


def kernel(a: Tensor, b: Tensor) -> float:
    """Squared maximum mean discrepancy under the kernel (x y / d + 1)^3 of samples (n, d), or (n, k, d) of n clips.

    Unbiased (Binkowski et al. 2018, "Demystifying MMD GANs"; Gretton et al. 2012, eq. 4): of equal distributions it is
    0 on average for any n, and so may come out negative. Pairs from one clip, or from a clip and its own truth, are
    not independent and do not count.
    """
    clip = torch.arange(len(a)).repeat_interleave(a[0].numel() // a.shape[-1])
    a, b = a.double().reshape(len(clip), -1), b.double().reshape(len(clip), -1)
    aa, bb, ab = ((x @ y.T / x.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    return float((aa + bb - ab - ab.T)[clip[:, None] != clip].mean())


def judge(frames: Tensor, truth: Tensor) -> dict[str, Tensor]:
    """Features (B, d) of the clips and of as many real ones; they need not be paired."""
    return {"made": features.extract(frames), "real": features.extract(truth)}


def total(values: dict[str, Tensor]) -> dict[str, float]:
    """The distance between all clips and all real ones, (n, d) each. Without two clips of each there is none."""
    if len(values["made"]) < 2:
        return {}
    return {"fvd": frechet(values["made"], values["real"])}


def about() -> dict[str, Any]:
    """What the number depends on beside the clips."""
    return {
        "features": f"{features.WEIGHTS}, sha256 of its manifest {features.shipped()[1]}",
        "dimensions": features.DIMENSIONS,
        "input": f"{features.INPUT} (frames x height x width)",
        "filter": features.FILTER,
        "covariance": "unbiased, float64",
    }
