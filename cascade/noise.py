"""Randomness keyed by what it is for, never by the order of calls.

Noise depends on (seed, stage, sample, frame, step, purpose) alone, so batch size, prompt order, windows, offload and
resuming cannot change it. It is always drawn on the CPU and then moved, so it is equal on every device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import torch
from torch import Tensor

Key = int | str

MANY = 1 << 20  # numbers from which on threads are worth their start


def generator(*key: Key, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator seeded by the first 63 bits of the SHA-256 of `key`, whose texts have no "|".

    The CPU's generator takes 32 bits of them: of 100,000 keys one pair is expected to share its numbers. Videos are
    made with CPU generators alone; on a GPU the same key draws other numbers.
    """
    assert not any("|" in part for part in key if isinstance(part, str)), f"{key}: a | would join two parts of a key"
    digest = hashlib.sha256("|".join(f"{type(part).__name__}:{part}" for part in key).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)


def sample_id(prompt: str, copy: int = 0) -> str:
    """Identity of a sample: the `copy`-th video of `prompt`, wherever it stands in a list of prompts."""
    return f"{hashlib.sha256(prompt.encode()).hexdigest()[:16]}-{copy}"


class Draw(Protocol):
    """The noise of a video, all of it or a window."""

    def __call__(self, shape: Sequence[int], step: int, purpose: str) -> Tensor:
        """N(0, 1) of `shape` (B, C, F, H, W) for a step and what it is for."""
        ...

    def window(self, start: int) -> Draw:
        """The same noise seen from frame `start` on."""
        ...


@dataclass(frozen=True)
class Shared:
    """The noise of a video's first frame, for all frames."""

    noise: Draw

    def __call__(self, shape: Sequence[int], step: int, purpose: str) -> Tensor:
        return self.noise((*shape[:2], 1, *shape[3:]), step, purpose).expand(*shape)

    def window(self, start: int) -> Shared:
        return self


@dataclass(frozen=True)
class Stream:
    """Noise in the order in which it is asked for, on the generator's device; as training draws it."""

    rng: torch.Generator

    def __call__(self, shape: Sequence[int], step: int, purpose: str) -> Tensor:
        return torch.randn(tuple(shape), generator=self.rng, device=self.rng.device)

    def window(self, start: int) -> Stream:
        return self


@dataclass(frozen=True)
class Noise:
    """Standard normal noise for one stage: call it with a shape, the step and what the noise is for.

    `samples` names the batch entries (see `sample_id`), `seed` is that of all, or one for each; `start` is the index of
    the first frame within the whole video, so that overlapping windows see the same noise.
    """

    seed: int | tuple[int, ...]
    stage: str
    samples: tuple[str, ...]
    start: int = 0

    def __call__(self, shape: Sequence[int], step: int, purpose: str) -> Tensor:
        """N(0, 1) of `shape` (B, C, F, H, W), B = len(samples)."""
        batch, channels, frames, height, width = shape
        assert batch == len(self.samples), f"{batch} samples, {len(self.samples)} names"
        seeds = self.seed if isinstance(self.seed, tuple) else (self.seed,) * batch
        out = torch.empty(batch, frames, channels, height, width)

        def draw(place: tuple[int, int]) -> None:
            b, f = place
            rng = generator(seeds[b], self.stage, self.samples[b], self.start + f, step, purpose)
            torch.randn((channels, height, width), generator=rng, out=out[b, f])

        places = list(product(range(batch), range(frames)))
        if out.numel() < MANY:
            for place in places:
                draw(place)
        else:  # one generator is one thread, but each frame has its own
            with ThreadPoolExecutor(torch.get_num_threads()) as pool:
                list(pool.map(draw, places))
        return out.transpose(1, 2)

    def window(self, start: int) -> Noise:
        """The same noise seen from frame `start` of the whole video."""
        return Noise(self.seed, self.stage, self.samples, self.start + start)
