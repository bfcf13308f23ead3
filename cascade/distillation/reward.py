"""A student that is judged by what it makes: tuned on a differentiable reward, through all of its steps.

A student of halving or consistency learns its teacher's answers, and so its teacher's faults. Here it makes whole clips
in its own few steps, and a network that knows what clips show says whether they show what real clips of the same
captions do; the gradient runs back through every step (Clark et al. 2024, DRaFT; for few-step video Li et al. 2024,
T2V-Turbo). A judge can be pleased by what nobody sees. So the student is held to what it made of the same noise before,
the judge sees what it makes through a little noise, and what it is blind to is compared without it: the patches of all
clips, and whatever a discriminator that learns beside the student tells them from real ones by. Numbers in the judge's
own features prove nothing afterwards.

A stage that is given a video needs no judge: what comes in says nearly all that is to be seen, so the real clip itself
is what the student should make (`truth`, as in SinSR, Wang et al. 2024). So it is for the last steps of a stage that
starts from text, if they begin with that clip and so much noise as is left by then (`last`): outlines are theirs, while
what a clip shows is decided before, by steps that are to answer as they did (`first`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cascade.distillation import patches
from cascade.distillation.discriminator import Discriminator, own_loss, student_loss
from cascade.distillation.lesson import predict
from cascade.distillation.rounds import DistillConfig
from cascade.judge import Judge, Whole
from cascade.metrics.features import prepare
from cascade.sampling.guidance import keep_known
from cascade.sampling.sampler import Sampler, StepDenoise, sample
from cascade.stage import Batch, Stage

OWN = 0.5  # share of clips made at the sampler's own weight w; the others' are drawn from the student's range


class Rewarded(nn.Module):
    """A student in training; `forward` is its loss, so that several processes share one call.

    `before`, the student as it was, and `judge` are fixed and no part of what is saved.
    """

    def __init__(self, stage: Stage, before: nn.Module, judge: Judge | Whole | None, cfg: DistillConfig) -> None:
        super().__init__()
        self.cfg, self.keeps, self.reward = stage.cfg, stage.keeps, cfg
        self.student = stage.net
        self.fixed = (before, judge)  # a tuple: no submodules
        net = stage.cfg.net
        self.discriminator = Discriminator(net.channels, net.text) if cfg.adversarial else None

    def forward(self, batch: Batch) -> Tensor:
        """How far the judge's answers for every thing are from those for the real clip of the same caption, `stay`
        times the change, `truth` times the difference from the real clip, `last` times `finish`, `first` times
        `change`, `patches` times the distance of all clips' patches and `adversarial` times what a discriminator says,
        (B,).

        Changes and differences are mean absolute ones: better much in few pixels than grain in all. What the
        discriminator itself has to learn stands in the same sum; neither side has a gradient for the other.
        """
        before, judge = self.fixed
        cfg = self.reward
        loss = batch.x.new_zeros(len(batch.x))
        if cfg.last:
            loss = loss + cfg.last * self.finish(batch)
        if cfg.first:
            loss = loss + cfg.first * self.change(batch)
        if judge is None and not (cfg.stay or cfg.truth or cfg.patches or cfg.adversarial):
            return loss  # nobody asks what it makes of noise
        made = self.made(batch, self.student)
        loss = loss + self.apart(batch, made)
        if cfg.stay:
            with torch.no_grad():
                held = self.made(batch, before)
            loss = loss + cfg.stay * (made - held).abs().mean((1, 2, 3, 4))
        if cfg.truth:
            loss = loss + cfg.truth * (made - batch.x).abs().mean((1, 2, 3, 4))
        if cfg.patches:
            loss = loss + cfg.patches * patches.distance(batch.x, made, batch.eps)
        if self.discriminator is not None:
            text = batch.cond.text
            loss = loss + cfg.adversarial * student_loss(self.discriminator, made, text)
            loss = loss + own_loss(self.discriminator, batch.x, made, text, batch.eps)
        return loss

    def apart(self, batch: Batch, made: Tensor) -> Tensor:
        """How far the judge's answers for all things of a clip are from those for the real one, (B,)."""
        _, judge = self.fixed
        none = made.new_zeros(len(made))
        if judge is None:
            return none
        real, shown, clip = judge.things(prepare(batch.x), prepare(made + self.reward.blur * batch.eps.roll(1, 0)))
        if not len(clip):  # no thing is found in any of the real clips
            return none
        with torch.no_grad():
            truth = judge.classify(judge(real))
        seen = judge.classify(judge(shown))
        parts = torch.stack([softly(seen[name], truth[name], self.reward.temperature) for name in truth])
        return none.index_add(0, clip, parts.sum(0).to(made.dtype))

    def finish(self, batch: Batch) -> Tensor:
        """The mean absolute error of the last steps on real clips noised to where these begin, (B,).

        What a judge overlooks these steps still see; of several, the later mend what the earlier made. As
        pretraining's loss beside a reward (Ouyang et al. 2022).
        """
        steps = self.reward.last_steps
        sampler = replace(self.cfg.sampler, steps=steps, strength=steps / self.cfg.sampler.steps)
        return (self.sampled(batch, self.student, sampler, start=batch.x) - batch.x).abs().mean((1, 2, 3, 4))

    def change(self, batch: Batch) -> Tensor:
        """The mean absolute change of x_hat in all but the last steps, on the way of the student as it was, (B,)."""
        before, _ = self.fixed
        count = self.cfg.sampler.steps - self.reward.last_steps
        x, changes = batch.x, []

        def held(z: Tensor, t: Tensor, step: int) -> Tensor:
            nonlocal x
            if step < count:
                with torch.no_grad():
                    x = self.x_hat(batch, before, z, t)
                changes.append((self.x_hat(batch, self.student, z, t) - x).abs().mean((1, 2, 3, 4)))
            return x

        self.run(batch, held, self.cfg.sampler)
        return torch.stack(changes).mean(0)

    def made(self, batch: Batch, net: Callable[..., Any]) -> Tensor:
        """What `net` makes of the examples' far ends (B, C, F, H, W), with a gradient through its last steps."""
        steps = self.cfg.sampler.steps
        return self.sampled(batch, net, self.cfg.sampler, since=steps - (self.reward.through or steps))

    def sampled(
        self, batch: Batch, net: Callable[..., Any], sampler: Sampler, start: Tensor | None = None, since: int = 0
    ) -> Tensor:
        """What `net` makes of the examples' far ends or of `start` (B, C, F, H, W); a gradient from step `since` on."""

        def denoise(z: Tensor, t: Tensor, step: int) -> Tensor:
            with nullcontext() if step >= since else torch.no_grad():
                return self.x_hat(batch, net, z, t)

        return self.run(batch, denoise, sampler, start)

    def x_hat(self, batch: Batch, net: Callable[..., Any], z: Tensor, t: Tensor) -> Tensor:
        return predict(self.cfg.diffusion, net, z, t, batch.cond, self.weight(batch))

    def run(self, batch: Batch, denoise: StepDenoise, sampler: Sampler, start: Tensor | None = None) -> Tensor:
        """A sampling run (B, C, F, H, W) whose noise is that of the examples."""
        diffusion, shape, device = self.cfg.diffusion, batch.x.shape, batch.x.device

        def noise(shape: Sequence[int], step: int, purpose: str) -> Tensor:
            return diffusion.far(batch.eps, batch.cond.concat)

        hooks = [keep_known(batch.x, batch.cond.mask)] if self.keeps else []
        return sample(diffusion, denoise, sampler, noise, shape, start=start, hooks=hooks, device=device)

    def weight(self, batch: Batch) -> Tensor | None:
        """w (B,) by batch.u: the sampler's own for a share OWN of the clips, else any that the student knows."""
        if self.cfg.w_range is None:
            return None
        low, high = self.cfg.w_range
        other = low + (high - low) * (batch.u - OWN) / (1 - OWN)
        return torch.where(batch.u < OWN, self.cfg.sampler.guidance, other)


def softly(seen: Tensor, truth: Tensor, temperature: float) -> Tensor:
    """T KL(softmax(truth / T) || softmax(seen / T)) of logits (things, classes), (things,) (Hinton et al. 2015).

    At T = 1 sure answers are never sure enough, and a student goes on exaggerating what it shows; the higher T, the
    more the logits themselves are to be those of real clips.
    """
    log_p, log_q = ((logits / temperature).log_softmax(1) for logits in (truth, seen))
    return temperature * F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)
