"""A student that is judged by what it makes: adversarial training after distillation.

A student of halving or consistency learns its teacher's answers, and so its teacher's faults. Here it makes whole clips
in its own few steps, and learns through all of them from a critic that sees real clips too (Lin et al. 2025, Diffusion
Adversarial Post-Training; for images Sauer et al. 2023, Adversarial Diffusion Distillation). Their critics are networks
as large as the student, begun from its teacher; this one is small, begins from nothing, and first learns alone which
caption belongs to which clip (Radford et al. 2021, CLIP), so that from its first word on it knows what was asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.errors import ConfigError
from cascade.lesson import predict
from cascade.sampler import keep_known, sample
from cascade.settings import StageConfig, TrainConfig
from cascade.stage import Batch, Stage
from cascade.video import Shape

WIDTHS = (48, 96, 128)  # channels at 1/2, 1/4 and 1/8 of the height and width
FEATURES = 128
BETAS = (0.5, 0.99)  # of Adam: the gradient of a moving opponent is stale sooner than that of a fixed loss
OWN = 0.5  # share of clips made at the sampler's own weight w; the others' are drawn from the student's range
SLOPE = 0.2  # of the leaky rectifiers


class Critic(nn.Module):
    """What a clip says: whether it is real, and which of some captions is its own.

    A (2+1)D convolutional network (Tran et al. 2018) of clips (B, C, F, H, W) of one size, beside what the stage was
    given of them. Every place and frame counts by itself, for motion is a path, and the strongest answers of all of
    them, for a shape is one wherever it is.
    """

    def __init__(self, shape: Shape, channels: int, text: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(8 * channels, WIDTHS[0], 3, padding=1)
        self.scales = nn.ModuleList(Scale(a, b) for a, b in pairwise(WIDTHS))
        self.narrow = nn.Conv2d(WIDTHS[-1], 16, 1)
        places = shape.frames * (shape.height // 8) * (shape.width // 8)
        self.path = nn.Linear(16 * places, FEATURES)
        self.look = nn.Linear(2 * sum(WIDTHS[1:]), FEATURES)
        self.mix = nn.Sequential(nn.LeakyReLU(SLOPE), perceptron(2 * FEATURES))
        self.real = nn.Linear(FEATURES, 1)
        self.words = perceptron(text) if text else None
        self.sharpness = nn.Parameter(torch.tensor(2.3))  # log of CLIP's inverse temperature
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, concat: Tensor, words: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Logits of being real (B,) and of each of N captions, whose pooled embeddings are `words` (N, D): (B, N)."""
        batch, frames = x.shape[0], x.shape[2]
        seen = torch.cat([x, concat], 1).transpose(1, 2).flatten(0, 1)
        h = self.stem(F.pixel_unshuffle(seen, 2).contiguous(memory_format=torch.channels_last))
        pooled = []
        for scale in self.scales:
            h = scale(h, frames)
            top = h.amax((2, 3)).view(batch, frames, -1)
            pooled += [top.mean(1), top.amax(1)]
        path = self.path(F.leaky_relu(self.narrow(h), SLOPE).reshape(batch, -1))
        features = self.mix(torch.cat([path, self.look(torch.cat(pooled, 1))], 1))
        real: Tensor = self.real(features)[:, 0]
        if words is None or self.words is None:
            return real, None
        return real, self.sharpness.exp() * F.normalize(features, dim=1) @ F.normalize(self.words(words), dim=1).T


class Scale(nn.Module):
    """Half the height and width: a residual block on every frame, then one across frames."""

    def __init__(self, cin: int, cout: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, cin), nn.Conv2d(cin, cin, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, cin), nn.Conv2d(cin, cout, 3, stride=2, padding=1)
        self.skip = nn.Conv2d(cin, cout, 1)
        self.norm3, self.time = nn.GroupNorm(8, cout), nn.Conv2d(cout, cout, (3, 1), padding=(1, 0))

    def forward(self, h: Tensor, frames: int) -> Tensor:
        """(B*F, C, H, W) -> (B*F, C', H/2, W/2)."""
        out = self.conv1(F.leaky_relu(self.norm1(h), SLOPE))
        out = self.conv2(F.leaky_relu(self.norm2(out), SLOPE))
        h = self.skip(F.avg_pool2d(h, 2)) + out
        (total, c, height, width), batch = h.shape, h.shape[0] // frames
        line = F.leaky_relu(self.norm3(h), SLOPE).permute(0, 2, 3, 1)  # seen as (B, C, F, H*W), without a copy
        line = self.time(line.reshape(batch, frames, height * width, c).permute(0, 3, 1, 2))
        line = line.permute(0, 2, 3, 1).reshape(total, height, width, c).permute(0, 3, 1, 2)
        whole: Tensor = h + line
        return whole


def perceptron(width: int) -> nn.Sequential:
    """Two layers, from `width` to FEATURES."""
    return nn.Sequential(nn.Linear(width, FEATURES), nn.LeakyReLU(SLOPE), nn.Linear(FEATURES, FEATURES))


def judged(cfg: StageConfig, train: TrainConfig) -> Shape:
    """The size of what a critic sees of the clips that the stage trains on; ConfigError where it cannot be halved."""
    shape = train.crop or cfg.shape
    frames, height, width = cfg.codec.inside(shape)
    if height % 8 or width % 8:
        raise ConfigError(
            f"{cfg.name}: clips of {shape} cannot be judged, expected a height and width that 8 divides",
            fix="train.crop of such a size",
        )
    return Shape(frames=frames, height=height, width=width)


def new_critic(cfg: StageConfig, train: TrainConfig) -> Critic:
    """A critic of the clips that the stage trains on, its weights drawn from `train.seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(train.seed)
        return Critic(judged(cfg, train), cfg.net.channels, cfg.net.text)


def reading(batch: Batch, critic: Callable[..., Any]) -> Tensor:
    """The loss of the critic alone: of a step's captions the one that belongs to each real clip, (B,)."""
    real, match = critic(batch.x, batch.cond.concat, batch.cond.text.pooled())
    if match is None:
        return F.softplus(-real)
    loss: Tensor = F.cross_entropy(match, own(match), reduction="none")
    return loss


def own(match: Tensor) -> Tensor:
    """The number of each clip's own caption: the first B of the N captions are the B clips'."""
    return torch.arange(len(match), device=match.device)


class Contest(nn.Module):
    """Student and critic; `forward` is the sum of both losses, each of which moves its own network alone.

    Of a step's clips the first `share` is made anew by the student, for the same captions and from the batch's noise.
    The critic's learning rate is `rate` times the student's.
    The critic's loss is the non-saturating one of Goodfellow et al. (2014) and that of `reading`; the student's is the
    same of what it made, with the other captions of the step as what it should not show.
    """

    def __init__(self, stage: Stage, critic: Critic, share: float, rate: float) -> None:
        super().__init__()
        self.cfg, self.rule, self.share, self.rate = stage.cfg, stage.rule, share, rate
        self.student, self.critic = stage.net, critic

    def optimizer(self, cfg: TrainConfig) -> torch.optim.Optimizer:
        """Adam for both; `share` of a group is what the learning rate of a step is multiplied by."""
        groups = [
            {"params": list(self.student.parameters()), "share": 1.0},
            {"params": list(self.critic.parameters()), "share": self.rate},
        ]
        return torch.optim.AdamW(groups, lr=cfg.lr, betas=BETAS, weight_decay=cfg.weight_decay, fused=True)

    def weight(self, batch: Batch) -> Tensor | None:
        """w (B,) by batch.u: the sampler's own for a share OWN of the clips, else any that the student knows."""
        if self.cfg.w_range is None:
            return None
        low, high = self.cfg.w_range
        other = low + (high - low) * (batch.u - OWN) / (1 - OWN)
        return torch.where(batch.u < OWN, self.cfg.sampler.guidance, other)

    def made(self, batch: Batch) -> Tensor:
        """What the student makes (B, C, F, H, W), with a gradient through all of its steps."""
        diffusion, w = self.cfg.diffusion, self.weight(batch)

        def denoise(z: Tensor, t: Tensor, step: int) -> Tensor:
            return predict(diffusion, self.student, z, t, batch.cond, w)

        def noise(shape: Sequence[int], step: int, purpose: str) -> Tensor:
            return batch.eps

        hooks = [keep_known(batch.x, batch.cond.mask)] if self.rule.KEEPS_KNOWN else []
        return sample(
            diffusion, denoise, self.cfg.sampler, noise, batch.x.shape, hooks=hooks, device=batch.x.device
        )  # fmt: skip

    def forward(self, batch: Batch) -> Tensor:
        """The loss, the same for every example, (B,)."""
        part = batch[: max(1, round(self.share * len(batch)))]
        words = batch.cond.text.pooled()
        made = self.made(part)
        fixed = {name: value.detach() for name, value in self.critic.named_parameters()}
        real, match = torch.func.functional_call(self.critic, fixed, (made, part.cond.concat, words))
        loss = F.softplus(-real).mean() + (0 if match is None else F.cross_entropy(match, own(match)))
        real, match = self.critic(batch.x, batch.cond.concat, words)
        fake, _ = self.critic(made.detach(), part.cond.concat, words)
        loss = loss + F.softplus(-real).mean() + F.softplus(fake).mean()
        if match is not None:
            loss = loss + F.cross_entropy(match, own(match))
        return loss.expand(len(batch))
