"""What a denoiser is told beside z_t and t, whatever the stage and the network."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from cascade.text import Text


@dataclass
class Cond:
    """Everything a denoiser is told beside z_t and t: the ports of the design, shared by all stages.

    `concat` (B, C, F, H, W) holds known or low-resolution video and `mask` (B, 1, F, H, W) is 1 where it says
    something; `level` (B,) is the noise added to it (conditioning augmentation, Ho et al. 2021); `fps` (B,);
    `segments` (B, F) numbers independent clips within an entry (None: one).
    """

    concat: Tensor
    mask: Tensor
    level: Tensor
    fps: Tensor
    text: Text
    segments: Tensor | None = None

    def without_text(self) -> Cond:
        """The unconditional branch of classifier-free guidance: the text is dropped, the video stays."""
        return self.with_text(self.text.without().to(self.concat.device))

    def with_text(self, text: Text) -> Cond:
        return replace(self, text=text)

    def remembering(self) -> Cond:
        """The same, for one sampling run: see `Text.remembering`."""
        return self.with_text(self.text.remembering())

    def to(self, device: torch.device | str) -> Cond:
        return Cond(
            self.concat.to(device),
            self.mask.to(device),
            self.level.to(device),
            self.fps.to(device),
            self.text.to(device),
            None if self.segments is None else self.segments.to(device),
        )

    def frames(self, start: int, stop: int) -> Cond:
        """The part of a longer video that a window sees."""
        segments = None if self.segments is None else self.segments[:, start:stop]
        concat, mask = self.concat[:, :, start:stop], self.mask[:, :, start:stop]
        return replace(self, concat=concat, mask=mask, segments=segments)

    def __getitem__(self, index: slice) -> Cond:
        segments = None if self.segments is None else self.segments[index]
        return Cond(
            self.concat[index], self.mask[index], self.level[index], self.fps[index], self.text[index], segments
        )

    @staticmethod
    def cat(parts: list[Cond]) -> Cond:
        """Joins batches; entries without segments are one clip each, masks of frames become masks of pixels where one
        of them is."""
        segments = None
        if any(part.segments is not None for part in parts):
            frames = parts[0].concat.shape[2]
            segments = torch.cat(
                [
                    part.segments
                    if part.segments is not None
                    else torch.zeros(len(part.level), frames, dtype=torch.long, device=part.level.device)
                    for part in parts
                ]
            )
        places = [max(sizes) for sizes in zip(*(part.mask.shape[1:] for part in parts), strict=True)]
        return Cond(
            torch.cat([part.concat for part in parts]),
            torch.cat([part.mask.expand(-1, *places) for part in parts]),
            torch.cat([part.level for part in parts]),
            torch.cat([part.fps for part in parts]),
            Text.cat([part.text for part in parts]),
            segments,
        )
