"""Laws of distillation: algebra of the target, closed forms for linear denoisers, a ladder that survives being cut."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cascade import checkpoint
from cascade.ask import Request
from cascade.chain import Device
from cascade.cond import Cond
from cascade.config import parse
from cascade.data.source import DataConfig
from cascade.diffusion import Diffusion, Prediction
from cascade.distillation import distill
from cascade.distillation.distill import Course, ladder
from cascade.distillation.lesson import Lesson, halved, predict
from cascade.distillation.rounds import DistillConfig, Method, check_sampler, rounds, told
from cascade.errors import ConfigError, NumericError
from cascade.loading import load_stage
from cascade.loading import save_stage as save_weights
from cascade.nets.unet_config import LevelSpec, Mixer, UNetConfig
from cascade.noise import Key, Noise, generator
from cascade.request import Given
from cascade.sampling.sampler import Rule, Sampler, Threshold, sample
from cascade.sampling.solvers import ddim
from cascade.settings import StageConfig, TrainConfig
from cascade.stage import Batch, Stage
from cascade.text import Text, TextConfig
from cascade.training.train import fit
from cascade.video import Shape
from stages import base

WIDTH = 4  # of the toy text
CAPTIONS = ("red", "green", "blue")
STD = 0.5  # of the Gaussian data
SMALL = Shape(frames=2, height=4, width=4)


def draw(name: str, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator(name), dtype=dtype)


def near(got: Tensor, expected: Tensor, atol: float = 1e-12) -> None:
    """Not torch.testing, whose first comparison imports torch.distributed for seconds."""
    assert got.shape == expected.shape and got.dtype == expected.dtype
    assert (got - expected).abs().max() <= atol


def encode(captions: list[str]) -> Text:
    """One token each: a unit vector."""
    tokens = torch.zeros(len(captions), 1, WIDTH)
    for row, caption in enumerate(captions):
        tokens[row, 0, CAPTIONS.index(caption)] = 1
    return Text(tokens, torch.ones(len(captions), 1, dtype=torch.bool))


class Dots:
    """A square of the caption's colour in one of eight places, on black, that moves to the right."""

    def sample(self, shape: Shape, fps: float, *key: Key) -> tuple[Tensor, str]:
        rng = generator("dots", *key)
        colour, column, row = (int(torch.randint(room, (), generator=rng)) for room in (3, 4, 2))
        side = shape.height // 2
        clip = torch.full((3, shape.frames, shape.height, shape.width), -1.0)
        for frame in range(shape.frames):
            for x in range(side):
                at = (column * shape.width // 4 + frame + x) % shape.width
                clip[colour, frame, row * side : (row + 1) * side, at] = 1
        return clip, CAPTIONS[colour]


class Cut(Exception):
    """Stands for a kill."""


class Cutting(Dots):
    """Fails when it is asked for the `at`-th time."""

    def __init__(self, at: int) -> None:
        self.left = at

    def sample(self, shape: Shape, fps: float, *key: Key) -> tuple[Tensor, str]:
        if self.left == 0:
            raise Cut
        self.left -= 1
        return super().sample(shape, fps, *key)


def config(
    shape: Shape = SMALL, guidance: float = 0.0, prediction: Prediction = Prediction.V, channels: int = 3, **extra: Any
) -> base.Config:
    fields: dict[str, Any] = {
        "diffusion": Diffusion(prediction=prediction),
        "net": UNetConfig(levels=[LevelSpec(channels=8)], embedding=16, text=WIDTH, channels=channels),
        "sampler": Sampler(steps=8, guidance=guidance),
        **extra,
    }
    return base.Config(name="base", kind="base", shape=shape, fps=4, **fields)


def blank(batch: int, shape: Sequence[int], text: Text | None = None, dtype: torch.dtype = torch.float64) -> Cond:
    c, f, h, w = shape
    return Cond(
        torch.zeros(batch, c, f, h, w, dtype=dtype),
        torch.zeros(batch, 1, f, 1, 1, dtype=dtype),
        torch.zeros(batch, dtype=dtype),
        torch.full((batch,), 4.0, dtype=dtype),
        Text.empty(batch, 1, WIDTH) if text is None else text,
    )


def examples(batch: int, shape: Sequence[int] = (3, 2, 4, 4), text: Text | None = None) -> Batch:
    t = (torch.arange(batch, dtype=torch.float64) + 0.5) / batch
    return Batch(draw("x", batch, *shape), draw("eps", batch, *shape), t, t.flip(0), blank(batch, shape, text))


class Wavy(nn.Module):
    """A denoiser that is linear in nothing, hears its text and treats every element alone."""

    def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        told_w = torch.zeros_like(t) if w is None else w
        shift = cond.text.pooled().sum(1).to(z.dtype) + 0.1 * told_w - 0.4 * t.to(z.dtype)
        return torch.tanh(1.3 * z + shift.view(-1, 1, 1, 1, 1))


class Truth(nn.Module):
    """Says x."""

    def __init__(self, x: Tensor) -> None:
        super().__init__()
        self.x = x

    def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        return self.x


def lesson(cfg: StageConfig, steps: int, teacher: nn.Module | None = None, branches: bool = False) -> Lesson:
    net = Wavy() if teacher is None else teacher
    return Lesson(Stage(cfg, base, net), net, branches, steps)  # type: ignore[arg-type]


def plainly(cfg: base.Config, **changes: Any) -> base.Config:
    """Without a threshold, as the closed forms are."""
    return replace(cfg, sampler=replace(cfg.sampler, threshold=Threshold.NONE), **changes)


# The target of halving


@pytest.mark.parametrize("shift", [0.25, 1.0, 2.0])
@pytest.mark.parametrize("steps", [1, 2, 8, 64, 512])
def test_halved_target_is_the_papers_and_one_step_lands_where_two_do(shift: float, steps: int) -> None:
    diffusion = Diffusion(shift=shift)
    i = torch.arange(1, steps + 1, dtype=torch.float64)
    t, middle, s = i / steps, (i - 0.5) / steps, (i - 1) / steps
    z = draw("z", steps, 1, 1, 2, 2)

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(1.3 * z + 0.2 - 0.4 * t.view(-1, 1, 1, 1, 1))

    got = halved(diffusion, denoise, z, t, middle, s)
    first = denoise(z, t)
    z_middle = ddim(diffusion, z, first, t, middle)
    last = denoise(z_middle, middle)
    z_s = ddim(diffusion, z_middle, last, middle, s)
    near(ddim(diffusion, z, got, t, s), z_s, atol=1e-12)
    (alpha, sigma), (alpha_s, sigma_s) = diffusion.alpha_sigma(t, z.dtype), diffusion.alpha_sigma(s, z.dtype)
    divisor = alpha_s - sigma_s / sigma * alpha
    literal = (z_s - sigma_s / sigma * z) / divisor
    near(got * divisor, literal * divisor, atol=1e-12)
    near(got, literal, atol=1e-12 * max(1, steps / 8))  # the paper's own quotient loses digits in short steps
    assert torch.equal(got[0], last[0])  # s = 0


def test_a_teacher_that_always_says_the_same_is_its_own_student() -> None:
    x = draw("x", 4, 3, 2, 2, 2)
    t = torch.tensor([1.0, 0.75, 0.5, 0.25], dtype=torch.float64)
    near(halved(Diffusion(), lambda z, t: x, draw("z", 4, 3, 2, 2, 2), t, t - 0.125, t - 0.25), x)


def test_short_steps_lose_nothing_in_single_precision() -> None:
    steps = 512
    i = torch.arange(1, steps + 1, dtype=torch.float64)
    z = draw("z", steps, 1, 1, 2, 2)

    def target(dtype: torch.dtype) -> Tensor:
        t, middle, s = ((a / steps).to(dtype) for a in (i, i - 0.5, i - 1))
        return halved(Diffusion(), lambda z, t: torch.tanh(1.3 * z), z.to(dtype), t, middle, s).double()

    near(target(torch.float32), target(torch.float64), atol=1e-6)


def test_times_are_the_samplers_own_grid_and_equally_frequent() -> None:
    task = lesson(config(), 4)
    batch = examples(4)
    batch.t = torch.tensor([0.0, 0.3, 0.5, 0.9999999], dtype=torch.float64)
    t, middle, s = task.times(batch)
    assert t.tolist() == [0.25, 0.5, 0.75, 1.0]
    assert middle.tolist() == [0.125, 0.375, 0.625, 0.875]
    assert s.tolist() == [0.0, 0.25, 0.5, 0.75]
    batch.t = (torch.arange(4000) + 0.5) / 4000
    assert task.times(batch)[0].unique(return_counts=True)[1].tolist() == [1000] * 4


# The oracle: data N(0, STD^2)


class Table(nn.Module):
    """x_hat = k(t) z: the exact denoiser of Gaussian data, or a student of it whose k is solved for each time."""

    def __init__(self, times: int) -> None:
        super().__init__()
        alpha, sigma = Diffusion().alpha_sigma(torch.arange(times + 1) / times, torch.float64)
        self.k = nn.Parameter((alpha * STD**2 / ((alpha * STD) ** 2 + sigma**2)).flatten())

    def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        return self.k[(t * (len(self.k) - 1)).round().long()].view(-1, 1, 1, 1, 1) * z


def std(net: nn.Module, steps: int) -> float:
    """Of what DDIM makes of N(0, 1) with a net that is linear in z."""

    def one(shape: Sequence[int], step: int, purpose: str) -> Tensor:
        return torch.ones(tuple(shape), dtype=torch.float64)

    cond = blank(1, (1, 1, 1, 1))
    with torch.no_grad():
        return sample(
            Diffusion(prediction=Prediction.X), lambda z, t, step: net(z, t, cond), Sampler(steps=steps), one,
            (1, 1, 1, 1, 1),
        ).item()  # fmt: skip


def test_halving_a_linear_gaussian_teacher_from_256_to_8_steps_loses_nothing() -> None:
    cfg = plainly(config(Shape(frames=1, height=1, width=1), prediction=Prediction.X, channels=1))
    teacher = Table(256)
    steps = 256
    while steps > 8:
        steps //= 2
        task = lesson(cfg, steps, teacher)
        batch = examples(steps, (1, 1, 1, 1))
        z = Diffusion().noised(batch.x, batch.eps, task.times(batch)[0])
        student = Table(256)
        with torch.no_grad():
            student.k.fill_(math.nan)
            student.k[(task.times(batch)[0] * 256).long()] = (task.target(batch) / z).flatten()
            assert task(batch, student).max() < 1e-20 < task(batch, teacher).max()  # the loss has its zero there
        teacher = student
    assert round(std(Table(256), 256), 5) == 0.49700
    assert std(teacher, 8) == pytest.approx(std(Table(256), 256), abs=1e-12)
    assert round(std(Table(256), 8), 5) == 0.41138


# The loss


def test_weights_are_truncated_snr_which_for_v_is_the_larger_square() -> None:
    batch = examples(8, text=encode(["red"] * 8))
    task = lesson(plainly(config()), 4)
    net = Wavy()
    net_out: list[Tensor] = []

    def student(z: Tensor, t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        net_out.append(torch.sin(net(z, t, cond)))
        return net_out[-1]

    got = task(batch, student)
    t = task.times(batch)[0]
    diffusion = task.student.cfg.diffusion
    z, target = diffusion.noised(batch.x, batch.eps, t), task.target(batch)
    alpha, sigma = diffusion.alpha_sigma(t, torch.float64)
    v = diffusion.velocity(target, diffusion.noise_in(z, target, t), t)
    square = torch.maximum(alpha**2, sigma**2).flatten() * (net_out[0] - v).square().mean((1, 2, 3, 4))
    near(got, square, atol=1e-9)
    assert (t == 1).any() and bool((got > 0).all())


def test_the_guidance_target_is_the_formula_and_the_student_alone_is_told_w() -> None:
    batch = examples(6, text=encode(["red", "green"] * 3))
    cfg = plainly(config(guidance=2.0), w_range=[1.0, 5.0])
    task = lesson(cfg, 0, branches=True)
    w = task.weight(batch)
    assert w is not None and bool(((w >= 1) & (w <= 5)).all()) and len(w.unique()) == 6
    z = cfg.diffusion.noised(batch.x, batch.eps, batch.t)

    def x_hat(cond: Cond) -> Tensor:
        return cfg.diffusion.split(z, Wavy()(z, cfg.diffusion.level(batch.t), cond), batch.t)[0]

    a = w.view(-1, 1, 1, 1, 1)
    near(task.target(batch), (1 + a) * x_hat(batch.cond) - a * x_hat(batch.cond.without_text()), atol=1e-12)
    seen: list[Tensor | None] = []

    def student(z: Tensor, t: Tensor, cond: Cond, w: Tensor | None) -> Tensor:
        seen.append(w)
        return Wavy()(z, t, cond, w)

    task(batch, student)
    assert len(seen) == 1 and seen[0] is not None and torch.equal(seen[0], w)


def test_the_branch_without_text_is_the_one_that_sampling_moves_away_from() -> None:
    text, silence = encode(["red"] * 4), encode(["green"])
    cfg = plainly(config(guidance=2.0), w_range=[2.0, 2.0])
    got = lesson(cfg, 0, branches=True).target(examples(4, text=replace(text, nothing=silence)))
    batch = examples(4, text=text)
    z = cfg.diffusion.noised(batch.x, batch.eps, batch.t)
    said, unsaid = (
        cfg.diffusion.split(z, Wavy()(z, cfg.diffusion.level(batch.t), cond), batch.t)[0]
        for cond in (batch.cond, batch.cond.with_text(Text.cat([silence] * 4)))
    )
    near(got, 3 * said - 2 * unsaid, atol=1e-12)


def test_a_stage_without_guidance_is_told_none() -> None:
    batch = examples(4)
    assert lesson(config(), 4).weight(batch) is None
    assert told(config(), DistillConfig(steps=[4], round_steps=1)) == (None, False)


def test_a_lesson_does_not_depend_on_the_batch_an_example_stands_in() -> None:
    batch = examples(8, text=encode(["red"] * 8))
    task = lesson(config(guidance=1.0, w_range=[0.0, 4.0]), 4)
    whole = task(batch, Wavy())
    parts = torch.cat([task(batch[i : i + 2], Wavy()) for i in range(0, 8, 2)])
    near(whole, parts, atol=0)


def test_w_runs_over_the_whole_range_as_u_does() -> None:
    batch = examples(3, (1, 1, 2, 2))
    batch.u = torch.tensor([0.0, 0.25, 1.0])
    weights = lesson(config(guidance=1.0, w_range=[2.0, 4.0]), 4).weight(batch)
    assert weights is not None and weights.tolist() == [2.0, 2.5, 4.0]


# consistency ---------------------------------------------------------------------------------------------------------


def consistent(cfg: StageConfig, steps: int, grid: int, net: nn.Module) -> Lesson:
    return replace(lesson(cfg, steps), grid=grid, teacher=net)


def test_a_consistency_step_stays_within_its_span_and_on_the_grid() -> None:
    batch = examples(64)
    batch.t = torch.arange(64) / 64
    t, middle, s = consistent(config(), 4, 16, Wavy()).times(batch)
    assert bool((s <= middle).all() and (middle < t).all() and (t - s <= 0.25).all())
    assert torch.equal(t * 16, (t * 16).round()) and torch.equal(s * 4, (s * 4).round())
    near(t - middle, torch.full_like(t, 1 / 16))


@pytest.mark.parametrize(("steps", "grid"), [(12, 60), (5, 35), (7, 49), (4, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_consistency_step_is_empty_where_rounding_is_in_the_way(steps: int, grid: int, dtype: torch.dtype) -> None:
    edges = torch.arange(grid + 1, dtype=dtype) / grid
    one, zero = torch.ones((), dtype=dtype), torch.zeros((), dtype=dtype)
    batch = examples(1)
    batch.t = torch.cat([edges, edges.nextafter(one), edges.nextafter(zero), torch.tensor([0.9166666269], dtype=dtype)])
    t, middle, s = consistent(config(), steps, grid, Wavy()).times(batch)
    assert t.dtype == dtype and bool((s <= middle).all() and (middle < t).all() and t.max() == 1)
    assert torch.equal((t * grid).round() - 1, (middle * grid).round())
    assert torch.equal(middle == s, (middle * grid).round() % (grid // steps) == 0)


def test_the_last_step_of_a_span_is_the_teachers_own() -> None:
    batch = examples(4)
    batch.t = torch.tensor([0.0, 0.26, 0.5, 0.76])  # first grid point after the end of each of four spans
    task = consistent(plainly(config()), 4, 16, Wavy())
    t, _, _ = task.times(batch)
    z = task.student.cfg.diffusion.noised(batch.x, batch.eps, t)
    own = predict(task.student.cfg.diffusion, Wavy(), z, t, batch.cond, None)
    near(task.target(batch, Truth(torch.full_like(batch.x, 1e3))), own, atol=1e-12)


def test_a_student_that_agrees_with_a_straight_teacher_has_nothing_to_learn() -> None:
    """Where every x_hat along the way is the same, every consistency target is it: the loss is 0."""
    batch = examples(8)
    cfg = plainly(config(prediction=Prediction.X))
    task = consistent(cfg, 2, 16, Truth(batch.x))
    assert float(task(batch, Truth(batch.x)).max()) < 1e-20


def test_the_teacher_steps_as_its_sampler_does() -> None:
    """Threshold and known frames are part of its steps; guidance distillation leaves both to the sampler."""
    batch = examples(4, text=encode(["red"] * 4))
    batch.cond.mask = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1, 1).expand(4, 1, 2, 1, 1)
    cfg = config(guidance=1.0, w_range=[6.0, 6.0])
    clipped = replace(cfg, sampler=replace(cfg.sampler, threshold=Threshold.STATIC))
    target = lesson(clipped, 4, branches=True).target(batch)
    assert torch.equal(target[:, :, 0], batch.x[:, :, 0])
    assert target[:, :, 1].abs().max() <= 1
    free = lesson(clipped, 0, branches=True).target(batch)
    assert free[:, :, 1].abs().max() > 1 and not torch.equal(free[:, :, 0], batch.x[:, :, 0])


class Listening(nn.Module):
    """Notes the times and weights that it is told, by t."""

    def __init__(self) -> None:
        super().__init__()
        self.heard: set[tuple[float, float]] = set()

    def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        assert w is not None
        self.heard |= {(round(a, 6), round(b, 6)) for a, b in zip(t.tolist(), w.tolist(), strict=True)}
        return torch.zeros_like(z)


def test_a_lesson_asks_the_network_what_sampling_asks_it() -> None:
    cfg = config(
        diffusion=Diffusion(shift=0.5), w_range=[2.0, 2.0], sampler=Sampler(steps=4, guidance=2.0, rule=Rule.DDIM)
    )
    sampled, taught, teacher = Listening(), Listening(), Listening()
    Stage(cfg, base, sampled).sample(None, encode(["red"]), None, Noise(0, "base", ("a",)))  # type: ignore[arg-type]
    lesson(cfg, 4, teacher)(examples(8, text=encode(["red"] * 8)), taught)
    assert len(taught.heard) == 4 and taught.heard == sampled.heard
    finer = replace(cfg, sampler=replace(cfg.sampler, steps=8))
    Stage(finer, base, sampled).sample(None, encode(["red"]), None, Noise(0, "base", ("a",)))  # type: ignore[arg-type]
    assert len(teacher.heard) == 8 and teacher.heard == sampled.heard


class Linear(nn.Module):
    """v linear in z and the text; after guidance distillation in w times both as well."""

    def __init__(self) -> None:
        super().__init__()
        self.z = nn.Parameter(torch.tensor([0.8, 0.0]))  # of z, of w z
        self.text = nn.Linear(WIDTH, 2, bias=False)  # of the text, of w times the text
        self.bias = nn.Parameter(torch.zeros(2))
        with torch.no_grad():
            self.text.weight.copy_(torch.tensor([[0.5, -0.7, 0.3, 0.0], [0.0] * 4]))

    def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        one = torch.stack([torch.ones_like(t), torch.zeros_like(t) if w is None else w], 1)  # (B, 2)
        shift = (self.text(cond.text.pooled()) * one).sum(1) + one @ self.bias
        return (one @ self.z).view(-1, 1, 1, 1, 1) * z + shift.view(-1, 1, 1, 1, 1)


def training(steps: int = 300, **changes: Any) -> TrainConfig:
    return TrainConfig(**{"steps": steps, "batch": 4, "lr": 1e-2, "ema": 0.9, **changes})


def test_guidance_distillation_of_a_linear_teacher_is_its_guidance(tmp_path: Path) -> None:
    cfg = config(guidance=2.0)
    teacher = Linear()
    plan = DistillConfig(steps=[8], round_steps=1, guidance_steps=120, guidance=[0.0, 4.0], lr=0.1, warmup=0, ema=0.9)
    course = Course(Dots(), encode, plan, training(), tmp_path, progress=False)
    ladder(Stage(cfg, base, teacher), "teacher", course)  # type: ignore[arg-type]
    student = Linear()
    checkpoint.apply(student, checkpoint.load(tmp_path / "guidance/weights").state, "test")
    text = encode([CAPTIONS[i % 3] for i in range(32)])
    cond = blank(32, (3, 2, 4, 4), text, torch.float32)
    z = draw("held out", 32, 3, 2, 4, 4, dtype=torch.float32)
    t = torch.rand(32, generator=generator("held out t"))
    w = torch.rand(32, generator=generator("held out w")) * 4
    with torch.no_grad():
        c, u, got = (
            cfg.diffusion.split(z, out, t)[0]
            for out in (teacher(z, t, cond), teacher(z, t, cond.without_text()), student(z, t, cond, w))
        )
    a = w.view(-1, 1, 1, 1, 1)
    expected = (1 + a) * c - a * u
    assert (got - expected).square().mean() <= 0.02 * (expected - c).square().mean() <= 0.02 * expected.square().mean()


# The ladder


def small_stage(guidance: float = 1.0) -> Stage:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        stage = Stage(config(guidance=guidance), base)  # type: ignore[arg-type]
    with torch.no_grad():  # a fresh network's answer is 0
        for name, value in stage.net.named_parameters():
            value.add_(0.05 * torch.randn(value.shape, generator=generator(name)))
    return stage


LADDER = DistillConfig(steps=[4, 2], round_steps=4, guidance_steps=4, guidance=[0.0, 3.0], lr=1e-3, warmup=1)
ROUNDS = ("guidance", "04", "02")


def climb(out: Path, source: Dots | None = None, cfg: DistillConfig = LADDER, key: str = "teacher") -> Path:
    train = training(batch=2, checkpoint_every=2)
    return ladder(small_stage(), key, Course(source or Dots(), encode, cfg, train, out, progress=False))


def hashes(out: Path) -> dict[str, str]:
    """Of every round's weights directory, file by file."""
    files = [path for name in ROUNDS for path in sorted((out / name / "weights").glob("*"))]
    return {str(path.relative_to(out)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted ladder."""
    out = tmp_path_factory.mktemp("ladder")
    assert climb(out) == out / "02/weights"
    return out


def test_the_ladder_leaves_a_student_for_each_round_that_says_what_it_is(whole: Path) -> None:
    configs = [checkpoint.load(whole / name / "weights") for name in ROUNDS]
    assert [weights.config.get("steps") for weights in configs] == [None, 4, 2]
    assert all(weights.config["w_range"] == [0.0, 3.0] for weights in configs)
    assert [weights.config["sampler"]["steps"] for weights in configs] == [8, 4, 2]
    assert [parse(weights.config["sampler"], Sampler).rule for weights in configs] == [Rule.DDIM] * 3
    chain = ["teacher", *(weights.hash for weights in configs)]
    assert [weights.config["teacher"] for weights in configs] == chain[:-1]
    states = [weights.state["conv_out.weight"] for weights in configs]
    assert not torch.equal(states[0], states[1]) and not torch.equal(states[1], states[2])


@pytest.mark.parametrize("at", [2, 8, 13, 23])
def test_cut_at_any_time_and_run_again_gives_the_same_bytes(whole: Path, tmp_path: Path, at: int) -> None:
    with pytest.raises(Cut):
        climb(tmp_path, Cutting(at))
    climb(tmp_path)
    assert hashes(tmp_path) == hashes(whole)


@pytest.mark.parametrize("after", [False, True])
def test_cut_between_a_rounds_training_and_its_weights(
    whole: Path, tmp_path: Path, after: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    written = distill.save

    def cutting(directory: Path, *rest: Any) -> None:
        if after:
            written(directory, *rest)
        if "04" in directory.parts:
            raise Cut
        if not after:
            written(directory, *rest)

    with monkeypatch.context() as patch, pytest.raises(Cut):
        patch.setattr(distill, "save", cutting)
        climb(tmp_path)
    climb(tmp_path)
    assert hashes(tmp_path) == hashes(whole)


def test_a_loss_that_is_no_number_names_the_rate_of_the_distillation(tmp_path: Path) -> None:
    nothing = SimpleNamespace(sample=lambda shape, *_: (Dots().sample(shape, 4, 0)[0] * math.nan, CAPTIONS[0]))
    with pytest.raises(NumericError, match=r"loss nan.*Fix: distill\.lr=\.\.\. smaller, or train\.clip"):
        climb(tmp_path, source=nothing)  # type: ignore[arg-type]


def test_whole_rounds_are_not_done_again_and_damaged_ones_are(whole: Path, tmp_path: Path) -> None:
    climb(tmp_path)
    climb(tmp_path, Cutting(0))
    model = tmp_path / "04/weights/model.safetensors"
    data = bytearray(model.read_bytes())
    data[-1] ^= 1
    model.write_bytes(data)
    climb(tmp_path, Cutting(0))  # from the round's last checkpoint
    assert hashes(tmp_path) == hashes(whole)


def test_other_settings_or_another_teacher_do_not_continue_a_ladder(whole: Path, tmp_path: Path) -> None:
    for changed in (replace(LADDER, guidance=[0.0, 2.0]), replace(LADDER, lr=2e-3)):
        with pytest.raises(ConfigError, match="other settings"):
            climb(whole, cfg=changed)
    with pytest.raises(ConfigError, match="other settings"):
        climb(whole, key="another")
    with pytest.raises(ConfigError, match="other settings"):
        climb(whole, cfg=replace(LADDER, method=Method.CONSISTENCY))
    with pytest.raises(Cut):
        climb(tmp_path, Cutting(5))
    with pytest.raises(ConfigError, match="other settings"):  # in the middle of a round, too
        climb(tmp_path, cfg=replace(LADDER, guidance=[0.0, 2.0]))


def test_a_student_takes_half_the_evaluations_a_step(whole: Path) -> None:
    def evaluations(stage: Stage) -> int:
        count = 0

        def counted(*_: Any) -> None:
            nonlocal count
            count += 1

        handle = stage.net.register_forward_hook(counted)
        stage.sample(None, encode(["red"]), None, Noise(0, "base", ("a",)))
        handle.remove()
        return count

    teacher = small_stage()
    cfg = replace(teacher.cfg, weights=str(whole / "guidance/weights"))
    assert evaluations(teacher) == 2 * teacher.cfg.sampler.steps
    assert evaluations(load_stage(cfg, base, torch.device("cpu"))[0]) == cfg.sampler.steps  # type: ignore[arg-type]


def test_without_guidance_steps_the_first_halving_folds_the_guidance_in(tmp_path: Path) -> None:
    last = climb(tmp_path, cfg=replace(LADDER, guidance_steps=0, steps=[4]))
    assert last == tmp_path / "04/weights" and not (tmp_path / "guidance").exists()
    assert checkpoint.load(last).config["w_range"] == [0.0, 3.0]


def test_rounds_have_seeds_of_their_own_and_make_whole_clips_with_their_captions_at_all_times() -> None:
    train = training(drop_text=0.3, seed=5, crop=SMALL, times=[0.5, 1.0], images=0.2)
    ladder = rounds(replace(LADDER, batch=6), train, guided=True)
    assert [step.name for step in ladder] == list(ROUNDS)
    assert [step.name for step in rounds(LADDER, train, guided=False)] == ["04", "02"]
    assert len({step.train.seed for step in ladder} | {train.seed}) == 4
    assert all(step.train.times == [0, 1] and step.train.images == 0 for step in ladder)
    assert all(step.train.drop_text == 0 and step.train.batch == 6 and step.train.crop == SMALL for step in ladder)


# Settings


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({"steps": [], "round_steps": 1}, "steps is"),
        ({"steps": [8, 3], "round_steps": 1}, "half of the one before"),
        ({"steps": [0], "round_steps": 1}, "steps is"),
        ({"steps": [8], "round_steps": 0}, "round_steps"),
        ({"steps": [8], "round_steps": 2 * 10**9}, "round_steps"),
        ({"steps": [8], "round_steps": 1, "guidance_steps": -1}, "guidance_steps"),
        ({"steps": [8], "round_steps": 1, "guidance": [3, 1]}, "guidance"),
        ({"steps": [8], "round_steps": 1, "guidance": [1]}, "guidance"),
        ({"steps": [8], "round_steps": 1, "method": "magic"}, "progressive"),
        ({"steps": [6, 3], "round_steps": 1, "method": "consistency"}, "grid is 64, expected a multiple"),
        ({"steps": [8]}, "round_steps"),
    ],
)
def test_impossible_settings_are_refused(tree: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse(tree, DistillConfig, "distill")


@pytest.mark.parametrize(
    ("sampler", "name"),
    [
        ({"strength": 0.5}, "strength"),
        ({"guidance": 2.0, "guidance_low": 1.0}, "guidance_low"),
        ({"shared_noise": True}, "shared_noise"),
    ],
)
def test_a_sampler_whose_times_or_noise_a_student_never_sees_is_refused(sampler: dict[str, Any], name: str) -> None:
    check_sampler(config())
    with pytest.raises(ConfigError, match=f"no student is made for this sampler.{name}"):
        check_sampler(replace(config(), sampler=Sampler(steps=4, **sampler)))


def test_settings_that_do_not_fit_the_training_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"micro_batch.*Fix: set train\.micro_batch to a divisor of batch \(3\)"):
        rounds(replace(LADDER, batch=3), training(micro_batch=2), guided=True)
    with pytest.raises(ConfigError, match=r"lr is.*Fix: set distill\.lr to 0 to 1"):
        rounds(replace(LADDER, lr=7), training(), guided=True)


def test_the_range_of_w_holds_the_samplers_and_lies_in_the_teachers() -> None:
    cfg = config(guidance=2.0)
    assert told(cfg, LADDER) == ([0.0, 3.0], True)
    assert told(replace(cfg, w_range=[0.0, 4.0]), LADDER) == ([0.0, 3.0], False)
    with pytest.raises(ConfigError, match="the teacher knows w from 1 to 4"):
        told(replace(cfg, w_range=[1.0, 4.0]), LADDER)
    with pytest.raises(ConfigError, match="sampler's guidance is 5"):
        told(config(guidance=5.0), LADDER)
    oscillating = config(sampler=Sampler(steps=8, guidance=2.0, guidance_low=0.5))
    with pytest.raises(ConfigError, match=r"sampler's guidance is 0\.5"):
        told(oscillating, replace(LADDER, guidance=[1.0, 3.0]))


def request(tmp_path: Path, own: dict[str, Any], **changes: Any) -> Request:
    cfg = config(guidance=1.0, train=training(batch=2), weights=str(tmp_path / "teacher"), **changes)
    return Request(
        cfg, base, Given(out=tmp_path / "out"), Device(device="cpu"), TextConfig(), DataConfig(),  # type: ignore[arg-type]
        {"distill": own},
    )  # fmt: skip


OWN = {"steps": [2, 1], "round_steps": 2, "guidance_steps": 2}


def test_the_task_distils_the_stages_own_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distill, "text_source", lambda cfg: SimpleNamespace(encode=encode, fingerprint="toy"))
    monkeypatch.setattr(distill, "open_source", lambda *_: Dots())
    teacher = small_stage()
    save_weights(tmp_path / "teacher", teacher.cfg, teacher.net.state_dict(), "A test.")
    ask = request(tmp_path, OWN)
    distill.stage_task(ask)
    assert capsys.readouterr().out.split() == [str(tmp_path / "out/01/weights")]
    student = replace(
        ask.cfg, weights=str(tmp_path / "out/01/weights"), sampler=replace(ask.cfg.sampler, steps=1, guidance=1.5)
    )
    stage, _ = load_stage(student, base, torch.device("cpu"))  # type: ignore[arg-type]
    assert stage.cfg.w_range == [0.0, 4.0]
    video = stage.sample(None, encode(["red"]), None, Noise(0, "base", ("a",)))
    assert video.shape == SMALL
    # A student of 2 steps is a teacher for 1, not for 4.
    again = replace(ask, own={"distill": {**OWN, "teacher": str(tmp_path / "out/02/weights"), "steps": [4]}})
    with pytest.raises(ConfigError, match="made for 2"):
        distill.stage_task(again)


def test_the_task_refuses_what_cannot_be_distilled(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"distill\.steps"):
        distill.stage_task(request(tmp_path, {}))
    with pytest.raises(ConfigError, match="no weights to learn from"):
        ask = request(tmp_path, OWN)
        distill.stage_task(replace(ask, cfg=replace(ask.cfg, weights=None)))
    with pytest.raises(ConfigError, match="eps"):
        distill.stage_task(request(tmp_path, OWN, prediction=Prediction.EPS))
    assert not (tmp_path / "out").exists()


# What it is for


def samples(cfg: StageConfig, net: nn.Module, steps: int, w: float, w_range: list[float] | None) -> Tensor:
    """32 clips by `steps` steps of DDIM from the same noise."""
    sampler = replace(cfg.sampler, steps=steps, guidance=w)
    stage = Stage(replace(cfg, sampler=sampler, w_range=w_range), base, net.eval())  # type: ignore[arg-type]
    names = tuple(f"clip {i}" for i in range(32))
    with torch.no_grad():
        return stage.sample(None, encode([CAPTIONS[i % 3] for i in range(32)]), None, Noise(0, "base", names)).frames


@pytest.mark.slow
def test_a_student_beats_the_undistilled_sampler_at_equal_steps(tmp_path: Path) -> None:
    """Distance to what the guided teacher makes of the same noise in 32 steps, for the fewest steps and any w."""
    net = UNetConfig(levels=[LevelSpec(channels=24, mixer=Mixer.CONV)], embedding=32, text=WIDTH, frame_position=True)
    cfg = config(
        Shape(frames=4, height=8, width=8), net=net, sampler=Sampler(steps=16, guidance=1.0, threshold=Threshold.STATIC)
    )
    train = TrainConfig(steps=300, batch=8, lr=3e-3, warmup=20, ema=0.98, drop_text=0.1)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        teacher = Stage(cfg, base)  # type: ignore[arg-type]
    state = fit(teacher, Dots(), encode, train, tmp_path / "teacher", progress=False)
    checkpoint.apply(teacher.net, state, "the average")
    plan = DistillConfig(steps=[8, 4, 2], round_steps=250, guidance_steps=250, guidance=[0.0, 3.0], lr=1e-3, warmup=10)
    ladder(teacher, "teacher", Course(Dots(), encode, plan, train, tmp_path / "ladder", progress=False))
    report = []
    for w in (0.5, 2.0):
        truth = samples(cfg, teacher.net, 32, w, None)
        for steps in (4, 2):
            student = Stage(cfg, base)  # type: ignore[arg-type]
            checkpoint.apply(student.net, checkpoint.load(tmp_path / f"ladder/{steps:02d}/weights").state, "test")
            near_truth = (samples(cfg, student.net, steps, w, plan.guidance) - truth).square().mean().item()
            undistilled = (samples(cfg, teacher.net, steps, w, None) - truth).square().mean().item()
            report.append((w, steps, round(near_truth, 4), round(undistilled, 4)))
    print(report)
    pairs = [(student, undistilled) for _, steps, student, undistilled in report if steps == 2]
    assert all(student < undistilled for student, undistilled in pairs), report
    assert sum(student for student, _ in pairs) < 0.9 * sum(undistilled for _, undistilled in pairs), report
