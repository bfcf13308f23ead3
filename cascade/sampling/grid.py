"""The times at which a sampler calls the network."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cascade.diffusion import Diffusion


class Spacing(Enum):
    """How steps lie on the way from noise to video; but for the first, over a table's timesteps 0 ... N - 1.

    Names of Lin et al. 2023, table 2.
    """

    UNIFORM = "uniform"  # in t, from t = 1 exactly
    LINSPACE = "linspace"  # both ends of the table
    LEADING = "leading"  # whole multiples, from timestep 0 up
    TRAILING = "trailing"  # from timestep N - 1 down


class End(Enum):
    """Where the last step lands."""

    CLEAN = "clean"
    FIRST = "first"  # the noise of timestep 0 stays in (set_alpha_to_one: false, final_sigmas_type: sigma_min)


@dataclass(kw_only=True)
class Grid:
    """How a sampler's steps are spaced; all but `uniform` is for networks trained on a table of timesteps.

    `offset` moves a leading grid up (steps_offset). Timesteps with log(alpha / sigma) below `lambda_min` are not used
    (lambda_min_clipped): under a cosine table they hold next to no signal, and noise prediction divides by it.
    """

    spacing: Spacing = Spacing.UNIFORM
    offset: int = 0
    lambda_min: float | None = None
    end: End = End.CLEAN

    def __post_init__(self) -> None:
        if self.offset < 0 or (self.offset and self.spacing is not Spacing.LEADING):
            raise ValueError(f"offset is {self.offset}, expected 0, or more where spacing is leading")
        if self.spacing is Spacing.UNIFORM and (self.lambda_min is not None or self.end is not End.CLEAN):
            raise ValueError(
                f"lambda_min and end are {self.lambda_min} and {self.end.value}, expected null and clean where spacing "
                "is uniform"
            )
        if self.spacing is Spacing.TRAILING and self.lambda_min is not None:
            raise ValueError(f"lambda_min is {self.lambda_min}, expected null where spacing is trailing")

    def times(self, diffusion: Diffusion, steps: int, start: float = 1.0, closed: bool = False) -> Tensor:
        """The times t at which `steps` steps begin, and where the last one lands: (steps + 1,) float64, falling.

        With `start` below 1 they are the last steps of a grid of steps / start. A `closed` grid has one more point, at
        its end, that is no call of the network (DPM-Solver's). Raises ValueError for more steps than timesteps.
        """
        if self.spacing is Spacing.UNIFORM:
            return times(steps, start)
        whole = self.whole(steps, start)
        if whole + closed > diffusion.timesteps:
            raise ValueError(f"{whole} steps, expected at most the {diffusion.timesteps - closed} of the table")
        called = self._timesteps(diffusion, whole, closed)[-steps:]
        last = diffusion.timestep(torch.zeros(1)) if self.end is End.FIRST else torch.zeros(1, dtype=torch.float64)
        return torch.cat([diffusion.timestep(torch.from_numpy(called)), last])

    def whole(self, steps: int, start: float) -> int:
        """Steps of the grid whose last `steps` begin at `start`."""
        return round(steps / start)

    def _timesteps(self, diffusion: Diffusion, steps: int, closed: bool) -> NDArray[np.int64]:
        """Timesteps, falling. Halves round to even, as where these grids come from."""
        used, points = self._used(diffusion), steps + closed
        grid: NDArray[np.floating]
        if self.spacing is Spacing.LINSPACE:
            grid = np.linspace(0, used - 1, points).round()[::-1]
        elif self.spacing is Spacing.LEADING:
            grid = np.arange(points - 1.0, -1, -1) * (used // points) + self.offset
        else:
            grid = (used - np.arange(steps) * (used / steps)).round() - 1
        return grid[:steps].astype(np.int64)

    def _used(self, diffusion: Diffusion) -> int:
        """How many of the table's timesteps have enough signal."""
        if self.lambda_min is None:
            return diffusion.timesteps
        t = diffusion.timestep(torch.arange(diffusion.timesteps))
        return int((0.5 * diffusion.log_snr(t) >= self.lambda_min).sum())


def times(steps: int, start: float = 1.0) -> Tensor:
    """start, ..., 0: steps + 1 float64 points uniform in t.

    The first call of the network is at `start` itself and the last step lands on 0 ("trailing" in Lin et al. 2023,
    sec. 3.3). A "leading" grid would begin below t = 1, where the network expects a trace of the video that pure noise
    does not hold: its mean brightness then comes out wrong, the more the fewer the steps.
    """
    return torch.linspace(start, 0, steps + 1, dtype=torch.float64)
