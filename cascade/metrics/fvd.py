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

    tr (A B)^(1/2) is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2) (Dowson & Landau 1982), which is
    symmetric, unlike A B.
    """
    a, b = a.double(), b.double()
    root = _root(_covariance(a))
    inner = torch.linalg.eigvalsh(root @ _covariance(b) @ root).clamp(min=0).sqrt().sum()
    apart = (a.mean(0) - b.mean(0)).square().sum()
    return max(0.0, float(apart + _covariance(a).trace() + _covariance(b).trace() - 2 * inner))


def _covariance(x: Tensor) -> Tensor:
    centred = x - x.mean(0)
    return centred.T @ centred / (len(x) - 1)


def _root(covariance: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root


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
