"""Laws of adversarial tuning: each loss moves its own network, the gradient is that of the whole run, cut == uncut."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cascade import checkpoint, distill
from cascade.adversarial import Contest, Critic, new_critic, reading
from cascade.cond import Cond
from cascade.config import parse
from cascade.diffusion import Diffusion, Prediction
from cascade.distill import DistillConfig, contest
from cascade.errors import ConfigError
from cascade.noise import Key, generator
from cascade.sampler import Sampler, Threshold
from cascade.settings import StageConfig, TrainConfig
from cascade.stage import Batch, Stage
from cascade.unet_config import LevelSpec, UNetConfig
from cascade.video import Shape
from stages import base
from tests.test_distill import CAPTIONS, WIDTH, Cut, Cutting, Dots, Linear, encode, request, small_stage
from tests.test_distill import save_weights as save

SHAPE = Shape(frames=2, height=8, width=8)


def config(w_range: list[float] | None = None, **changes: Any) -> StageConfig:
    fields: dict[str, Any] = {
        "diffusion": Diffusion(prediction=Prediction.V),
        "net": UNetConfig(levels=[LevelSpec(channels=8)], embedding=16, text=WIDTH),
        "sampler": Sampler(steps=3, guidance=0.0 if w_range is None else w_range[1], threshold=Threshold.NONE),
        "w_range": w_range,
        **changes,
    }
    return base.Config(name="base", kind="base", shape=SHAPE, fps=4, **fields)


def examples(batch: int, dtype: torch.dtype = torch.float32) -> Batch:
    drawn = [Dots().sample(SHAPE, 4, "adversarial", i) for i in range(batch)]
    x, text = torch.stack([clip for clip, _ in drawn]).to(dtype), encode([caption for _, caption in drawn])
    eps = torch.randn(x.shape, generator=generator("eps"), dtype=dtype)
    zero, u = torch.zeros(batch, dtype=dtype), (torch.arange(batch, dtype=dtype) + 0.5) / batch
    cond = Cond(torch.zeros_like(x), zero.view(-1, 1, 1, 1, 1).expand(-1, 1, 2, 1, 1), zero, zero + 4, text)
    return Batch(x, eps, u, u, cond)


def rivals(net: nn.Module | None = None, w_range: list[float] | None = None, share: float = 0.5) -> Contest:
    cfg = config(w_range)
    return Contest(Stage(cfg, base, net or Linear()), new_critic(cfg, training()), share, 1.0)  # type: ignore[arg-type]


def training(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 4, "batch": 8, "lr": 1e-3, "ema": 0.9, "checkpoint_every": 2, **changes})


def gradients(net: nn.Module) -> list[Tensor]:
    return [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in net.parameters()]


# the losses ----------------------------------------------------------------------------------------------------------


def test_each_loss_moves_its_own_network_alone() -> None:
    """The critic's gradient is that of telling real clips and captions from fixed ones; the student's does not change
    with what the critic is taught."""
    both, batch = rivals(), examples(8)
    both(batch).mean().backward()
    found = gradients(both.critic)
    students = gradients(both.student)
    assert any(bool(g.any()) for g in students)

    both.zero_grad()
    words, part = batch.cond.text.pooled(), batch[:4]
    made = both.made(part).detach()
    real, _ = both.critic(batch.x, batch.cond.concat, words)
    fake, _ = both.critic(made, part.cond.concat, words)
    binary = nn.functional.binary_cross_entropy_with_logits
    loss = binary(real, torch.ones(8)) + binary(fake, torch.zeros(4)) + reading(batch, both.critic).mean()
    loss.backward()
    for a, b in zip(found, gradients(both.critic), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert not any(bool(g.any()) for g in gradients(both.student))


def test_the_students_loss_falls_where_the_critic_is_right_about_it() -> None:
    """One step against the gradient of a fixed critic: more real to it, nearer to its caption."""
    both, batch = rivals(share=1.0), examples(6)
    words = batch.cond.text.pooled()

    def judged() -> Tensor:
        real, match = both.critic(both.made(batch), batch.cond.concat, words)
        return nn.functional.softplus(-real).mean() + nn.functional.cross_entropy(match, torch.arange(6))

    before = judged().item()
    both(batch).mean().backward()
    with torch.no_grad():
        for parameter in both.student.parameters():
            assert parameter.grad is not None
            parameter -= 1e-3 * parameter.grad / parameter.grad.norm().clamp(min=1e-9)
    assert judged().item() < before


def test_what_is_judged_is_what_sampling_makes() -> None:
    net = Linear()
    with torch.no_grad():
        net.z[1], net.bias[1] = 0.05, 0.1  # hears w
    both = rivals(net, w_range=[0.0, 2.0])
    batch = examples(3)
    batch.u = torch.zeros(3)  # the sampler's own weight
    stage = Stage(both.cfg, base, net)  # type: ignore[arg-type]
    video = stage.sample(None, batch.cond.text, None, lambda shape, step, purpose: batch.eps)
    assert torch.equal(both.made(batch).detach().clamp(-1, 1), video.frames)


class Curved(nn.Module):
    """Linear in nothing, so that no step's gradient is that of another."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.bias = (nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (0.8, 0.1))

    def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        return torch.tanh(self.z * z + self.bias * (1 - t.to(z)).view(-1, 1, 1, 1, 1))


def test_the_gradient_runs_through_all_steps() -> None:
    both = rivals(Curved())
    batch = examples(2, torch.float64)
    towards = torch.randn(batch.x.shape, generator=generator("towards"), dtype=torch.float64)
    student = both.student

    def value() -> Tensor:
        return (both.made(batch) * towards).sum()

    value().backward()
    for parameter in student.parameters():
        assert parameter.grad is not None
        flat, step = parameter.data.view(-1), 1e-6
        with torch.no_grad():
            flat[0] += step
            above = value()
            flat[0] -= 2 * step
            below = value()
            flat[0] += step
        assert float(parameter.grad.view(-1)[0]) == pytest.approx(float(above - below) / (2 * step), rel=1e-6)


def test_known_frames_are_judged_as_they_are() -> None:
    both, batch = rivals(), examples(2)
    mask = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1, 1).expand(2, -1, -1, -1, -1)
    batch.cond.mask = mask
    made = both.made(batch)
    assert torch.equal(made[:, :, 0], batch.x[:, :, 0]) and not torch.equal(made[:, :, 1], batch.x[:, :, 1])


def test_half_of_the_clips_are_made_at_the_samplers_own_weight() -> None:
    both, batch = rivals(w_range=[1.0, 3.0]), examples(4)
    batch.u = torch.tensor([0.0, 0.49, 0.5, 0.75])
    w = both.weight(batch)
    assert w is not None and w.tolist() == [3.0, 3.0, 1.0, 2.0]
    assert rivals().weight(batch) is None


def test_the_critic_sees_what_the_stage_was_given_and_a_stage_without_text_has_no_captions() -> None:
    critic, batch = Critic(SHAPE, 3, WIDTH), examples(2)
    words = batch.cond.text.pooled()
    real, match = critic(batch.x, batch.cond.concat, words)
    assert real.shape == (2,) and match.shape == (2, 2)
    assert not torch.equal(critic(batch.x, torch.ones_like(batch.x), words)[0], real)
    silent = Critic(SHAPE, 3, 0)
    assert silent(batch.x, batch.cond.concat, words)[1] is None
    assert torch.equal(reading(batch, silent), nn.functional.softplus(-silent(batch.x, batch.cond.concat, words)[0]))


# the round -----------------------------------------------------------------------------------------------------------

PLAN = DistillConfig(
    steps=[3], round_steps=4, method=distill.Method.ADVERSARIAL, critic_steps=3, share=0.5, lr=1e-3, warmup=1, ema=0.9
)


def student() -> Stage:
    net = small_stage().net
    return Stage(config([0.0, 2.0]), base, net)  # type: ignore[arg-type]


def meet(out: Path, source: Dots | None = None, cfg: DistillConfig = PLAN, key: str = "student") -> Path:
    return contest(student(), key, source or Dots(), encode, cfg, training(), out, progress=False)


def digest(weights: Path) -> str:
    return hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted contest."""
    return meet(tmp_path_factory.mktemp("contest"))


def test_a_contest_leaves_a_student_of_the_same_steps_and_weights(whole: Path) -> None:
    weights = checkpoint.load(whole)
    assert whole.parts[-2:] == ("03", "weights")
    assert weights.config["steps"] == 3 and weights.config["w_range"] == [0.0, 2.0]
    assert weights.config["method"] == "adversarial" and weights.config["teacher"] == "student"
    before = student().net.state_dict()
    assert weights.state.keys() == before.keys()
    assert not torch.equal(weights.state["conv_out.weight"].float(), before["conv_out.weight"])


@pytest.mark.parametrize("at", [7, 25, 33, 49])
def test_cut_at_any_time_and_run_again_gives_the_same_bytes(whole: Path, tmp_path: Path, at: int) -> None:
    with pytest.raises(Cut):
        meet(tmp_path, Cutting(at))
    assert digest(meet(tmp_path)) == digest(whole)


def test_a_finished_contest_is_not_held_again_nor_continued_with_other_settings(whole: Path, tmp_path: Path) -> None:
    out = whole.parent.parent
    assert meet(out, Cutting(0)) == whole
    for changed in (replace(PLAN, share=0.25), replace(PLAN, critic_steps=2), replace(PLAN, lr=2e-3)):
        with pytest.raises(ConfigError, match="other settings"):
            meet(out, cfg=changed)
    with pytest.raises(ConfigError, match="other settings"):
        meet(out, key="another")


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({"steps": [4, 2]}, "keeps its steps"),
        ({"steps": [4], "share": 0}, "share is 0"),
        ({"steps": [4], "critic_steps": 0}, "critic_steps"),
    ],
)
def test_impossible_settings_are_refused(tree: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse({"round_steps": 1, "method": "adversarial", **tree}, DistillConfig, "distill")


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="8 divides"):
        new_critic(config(), training(crop=Shape(frames=2, height=4, width=8)))
    stage = small_stage()  # guided by two evaluations
    save(tmp_path / "teacher", stage.cfg, stage.net.state_dict(), "A test.")
    ask = request(tmp_path, {"steps": [8], "round_steps": 2, "method": "adversarial"}, shape=SHAPE)
    with pytest.raises(ConfigError, match="two evaluations"):
        distill.stage_task(ask)
    assert not (tmp_path / "out").exists()


def test_the_task_betters_a_student_of_as_many_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distill, "text_source", lambda cfg: SimpleNamespace(encode=encode, fingerprint="toy"))
    monkeypatch.setattr(distill, "open_source", lambda *_: Dots())
    before = student()
    save(tmp_path / "teacher", before.cfg, before.net.state_dict(), "A test.", steps=3, w_range=[0.0, 2.0])
    own = {"steps": [3], "round_steps": 1, "critic_steps": 1, "method": "adversarial"}
    ask = request(tmp_path, own, shape=SHAPE)
    with pytest.raises(ConfigError, match=r"made for 3.*steps=\[3\]"):
        distill.stage_task(replace(ask, own={"distill": {**own, "steps": [4]}}))
    distill.stage_task(ask)
    assert capsys.readouterr().out.split() == [str(tmp_path / "out/03/weights")]


class Plain:
    """Nothing but the caption's colour."""

    def sample(self, shape: Shape, fps: float, *key: Key) -> tuple[Tensor, str]:
        colour = int(torch.randint(3, (), generator=generator("plain", *key)))
        clip = torch.full((3, shape.frames, shape.height, shape.width), -0.8)
        clip[colour] = 0.8
        return clip, CAPTIONS[colour]


class Paint(nn.Module):
    """Says one colour for each caption, whatever comes in: gray at first."""

    def __init__(self) -> None:
        super().__init__()
        self.colour = nn.Linear(WIDTH, 3)
        nn.init.zeros_(self.colour.weight)
        nn.init.zeros_(self.colour.bias)

    def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        return self.colour(cond.text.pooled()).tanh().view(-1, 3, 1, 1, 1).expand_as(z)  # type: ignore[no-any-return]


def test_a_student_learns_from_the_critic_alone_what_a_caption_looks_like(tmp_path: Path) -> None:
    """No loss compares what it makes with a clip, and no teacher tells it."""
    cfg = config(diffusion=Diffusion(prediction=Prediction.X))
    stage = Stage(cfg, base, Paint())  # type: ignore[arg-type]
    plan = replace(PLAN, critic_steps=40, round_steps=120, critic_lr=2e-3, lr=3e-2, ema=0.8)
    weights = contest(stage, "gray", Plain(), encode, plan, training(batch=16), tmp_path, progress=False)
    checkpoint.apply(stage.net, checkpoint.load(weights).state, "test")
    noise = torch.zeros(3, 3, 2, 8, 8)
    colours = stage.sample(None, encode(list(CAPTIONS)), None, lambda *_: noise).frames.mean((2, 3, 4))
    assert (colours - (1.6 * torch.eye(3) - 0.8)).abs().max() < 0.4, colours
