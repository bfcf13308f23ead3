"""Laws of a student that is judged: what is judged is what it samples, through all of its steps; cut == uncut."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cascade import checkpoint, judge
from cascade.codec import Codec, Kind
from cascade.cond import Cond
from cascade.config import package_root, parse
from cascade.diffusion import Diffusion, Prediction
from cascade.diffusion import Path as WayPath
from cascade.distillation import distill, patches
from cascade.distillation.distill import Course, rewarded
from cascade.distillation.reward import Rewarded, softly
from cascade.distillation.rounds import DistillConfig, Method, check_reward
from cascade.errors import ConfigError, InputError
from cascade.metrics import features
from cascade.nets.unet_config import LevelSpec, UNetConfig
from cascade.noise import Key, generator
from cascade.sampling.sampler import Sampler, Threshold
from cascade.sampling.solvers import ddim
from cascade.settings import StageConfig, TrainConfig
from cascade.stage import Batch, Stage
from cascade.video import Shape
from stages import base, ssr
from tests.test_distill import CAPTIONS, WIDTH, Cut, Cutting, Dots, Linear, encode, request, small_stage
from tests.test_distill import save_weights as save

SHAPE = Shape(frames=2, height=8, width=8)
JUDGE = str(package_root() / "checkpoints/tiny/judge")


PLAN = DistillConfig(
    steps=[3], round_steps=4, method=Method.REWARD, judge=JUDGE, lr=1e-3, warmup=1, ema=0.9
)  # fmt: skip


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
    drawn = [Dots().sample(SHAPE, 4, "reward", i) for i in range(batch)]
    x, text = torch.stack([clip for clip, _ in drawn]).to(dtype), encode([caption for _, caption in drawn])
    eps = torch.randn(x.shape, generator=generator("eps"), dtype=dtype)
    zero, u = torch.zeros(batch, dtype=dtype), (torch.arange(batch, dtype=dtype) + 0.5) / batch
    cond = Cond(torch.zeros_like(x), zero.view(-1, 1, 1, 1, 1).expand(-1, 1, 2, 1, 1), zero, zero + 4, text)
    return Batch(x, eps, u, u, cond)


@pytest.fixture(scope="module")
def shipped() -> judge.Judge:
    return judge.load(Path(JUDGE))[0]


class Brightness(nn.Module):
    """A judge that knows two classes, and sees in a clip which of two channels is brighter."""

    def forward(self, clips: Tensor) -> Tensor:
        return 4 * clips.mean((2, 3, 4))[:, :2]

    def classify(self, features: Tensor) -> dict[str, Tensor]:
        return {"channel": features}

    def things(self, real: Tensor, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One a clip: all of it."""
        return real, made, torch.arange(len(real))


def task_stage(student: nn.Module, **changes: Any) -> Stage:
    return Stage(config(**changes), base, student)  # type: ignore[arg-type]


def taught(
    student: nn.Module,
    before: nn.Module | None = None,
    judge: Any = None,
    stay: float = 0.0,
    last: float = 0.0,
    drawn: float = 0.0,
    truth: float = 0.0,
    **changes: Any,
) -> Rewarded:
    stage = task_stage(student, **changes)
    plan = replace(PLAN, stay=stay, last=last, patches=drawn, truth=truth)
    return Rewarded(stage, before or Linear(), judge or Brightness(), plan)


def training(**changes: Any) -> TrainConfig:
    return TrainConfig(**{"steps": 4, "batch": 4, "lr": 1e-3, "ema": 0.9, "checkpoint_every": 2, **changes})


# the loss ------------------------------------------------------------------------------------------------------------


def test_what_is_judged_is_what_sampling_makes() -> None:
    net = Linear()
    with torch.no_grad():
        net.z[1], net.bias[1] = 0.05, 0.1  # hears w
    task = taught(net, w_range=[0.0, 2.0])
    batch = examples(3)
    batch.u = torch.zeros(3)  # the sampler's own weight
    stage = Stage(task.cfg, base, net)  # type: ignore[arg-type]
    video = stage.sample(None, batch.cond.text, None, lambda shape, step, purpose: batch.eps)
    assert torch.equal(task.made(batch, net).detach().clamp(-1, 1), video.frames)


class Curved(nn.Module):
    """Linear in nothing, so that no step's gradient is that of another."""

    def __init__(self) -> None:
        super().__init__()
        self.z, self.bias = (nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (0.8, 0.1))

    def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        return torch.tanh(self.z * z + self.bias * (1 - t.to(z)).view(-1, 1, 1, 1, 1))


def shifted() -> Curved:
    net = Curved()
    with torch.no_grad():
        net.bias += 0.3
    return net


def test_the_gradient_is_that_of_the_whole_run() -> None:
    student = Curved()
    task, batch = taught(student, shifted(), stay=0.7), examples(2, torch.float64)
    task(batch).sum().backward()
    for parameter in student.parameters():
        assert parameter.grad is not None
        flat, step = parameter.data.view(-1), 1e-6
        with torch.no_grad():
            flat[0] += step
            above = task(batch).sum()
            flat[0] -= 2 * step
            below = task(batch).sum()
            flat[0] += step
        assert float(parameter.grad.view(-1)[0]) == pytest.approx(float(above - below) / (2 * step), rel=1e-5)
    assert all(parameter.grad is None for parameter in task.fixed[0].parameters())


def divergence(real: Tensor, seen: Tensor) -> Tensor:
    """T KL of the answers at the temperature T."""
    p, q = ((logits / PLAN.temperature).softmax(1) for logits in (real, seen))
    return PLAN.temperature * (p * (p / q).log()).sum(1)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_nothing_is_learned_from_answers_that_are_those_of_real_clips(temperature: float) -> None:
    truth = 5 * torch.randn(4, 6, generator=generator("truth"), dtype=torch.float64)
    seen = (truth + 2).requires_grad_()  # the same answers
    found = softly(seen, truth, temperature)
    found.sum().backward()
    assert seen.grad is not None
    assert found.abs().max() < 1e-12 and seen.grad.abs().max() < 1e-12


def test_sure_answers_may_be_too_sure() -> None:
    """At T = 1 hardly: p is 1 either way."""
    truth = torch.tensor([[6.0, 0, 0]])
    hardly, clearly = (float(softly(2 * truth, truth, temperature)) for temperature in (1.0, 3.0))
    assert 0 < 20 * hardly < clearly


def test_the_loss_is_how_far_answers_are_apart_and_the_mean_change() -> None:
    student, before, brightness = Curved(), shifted(), Brightness()
    batch = examples(3, torch.float64)
    made, held = (taught(net).made(batch, net) for net in (student, before))
    real, seen = (
        brightness(features.prepare(batch.x)),
        brightness(features.prepare(made + PLAN.blur * batch.eps[[2, 0, 1]])),
    )
    got = taught(student, before, stay=0.7)(batch)
    assert torch.allclose(got, divergence(real, seen) + 0.7 * (made - held).abs().mean((1, 2, 3, 4)), atol=1e-12)


def test_a_student_that_did_not_change_pays_for_what_it_shows_alone() -> None:
    student = Curved()
    batch = examples(3, torch.float64)
    assert torch.equal(taught(student, student, stay=5.0)(batch), taught(student, student)(batch))


def test_the_last_step_answers_for_real_clips() -> None:
    """Of noised real clips at the time at which it begins, told what sampling tells it."""
    net, batch = Curved(), examples(3, torch.float64)
    t = torch.full((3,), 1 / 3, dtype=torch.float64)
    diffusion = config().diffusion
    z = diffusion.noised(batch.x, batch.eps, t)
    error = diffusion.split(z, net(z, t, batch.cond), t)[0] - batch.x
    got = taught(net, net, last=2.0)(batch) - taught(net, net)(batch)
    assert torch.allclose(got, 2 * error.abs().mean((1, 2, 3, 4)), atol=1e-12)


def test_of_several_last_steps_the_later_go_on_from_what_the_earlier_made() -> None:
    """The real clip is noised to where the first of them begins; nothing else need be made for it."""
    net, batch = Curved(), examples(3, torch.float64)
    diffusion = config().diffusion
    t, s = (torch.full((3,), part / 3, dtype=torch.float64) for part in (2, 1))
    z = diffusion.noised(batch.x, batch.eps, t)
    z = ddim(diffusion, z, diffusion.split(z, net(z, t, batch.cond), t)[0], t, s)
    error = diffusion.split(z, net(z, s, batch.cond), s)[0] - batch.x
    task = Rewarded(task_stage(net), net, None, replace(PLAN, judge=None, stay=0.0, last=2.0, last_steps=2))
    torch.testing.assert_close(task(batch), 2 * error.abs().mean((1, 2, 3, 4)))
    beside = taught(net, net)
    both = Rewarded(task_stage(net), net, Brightness(), replace(beside.reward, last=2.0, last_steps=2))
    torch.testing.assert_close(both(batch), task(batch) + beside(batch))


def test_the_first_steps_are_to_answer_as_before_on_the_way_that_was() -> None:
    """Each of them, where the student as it was would be; nothing is lost while it is as it was."""
    net, before, batch = Curved(), shifted(), examples(3, torch.float64)
    plan = replace(PLAN, judge=None, stay=0.0, first=2.0)
    assert not Rewarded(task_stage(net), net, None, plan)(batch).any()
    diffusion = config().diffusion
    t, s = (torch.full((3,), time, dtype=torch.float64) for time in (1, 2 / 3))
    z, changes = batch.eps, []
    for time, later in ((t, s), (s, None)):
        x, own = (diffusion.split(z, one(z, time, batch.cond), time)[0] for one in (before, net))
        changes.append((own - x).abs().mean((1, 2, 3, 4)))
        z = z if later is None else ddim(diffusion, z, x, time, later)
    torch.testing.assert_close(Rewarded(task_stage(net), before, None, plan)(batch), changes[0] + changes[1])


def test_patches_of_all_clips_are_drawn_to_real_ones() -> None:
    net, batch = Curved(), examples(3, torch.float64)
    task = taught(net, net, drawn=2.0)
    far = patches.distance(batch.x, task.made(batch, net), batch.eps)
    assert far > 0
    torch.testing.assert_close(task(batch) - taught(net, net)(batch), 2 * far.expand(3), rtol=0, atol=1e-12)


def test_on_the_straight_path_a_student_begins_with_what_comes_in_and_noise_is_noise() -> None:
    net, batch = Curved(), examples(3, torch.float64)
    straight = Diffusion(prediction=Prediction.X, path=WayPath.STRAIGHT)
    batch.cond.concat = batch.x.roll(1, 0)
    task, far = taught(net, net, drawn=2.0, diffusion=straight), replace(batch, eps=batch.cond.concat)
    made = task.made(batch, net)
    assert torch.equal(made, task.made(far, net)) and torch.equal(task.finish(batch), task.finish(far))
    patched = 2 * patches.distance(batch.x, made, batch.eps)
    seen = Brightness()(features.prepare(made + PLAN.blur * batch.eps[[2, 0, 1]]))
    expected = divergence(Brightness()(features.prepare(batch.x)), seen) + patched
    torch.testing.assert_close(task(batch), expected, rtol=0, atol=1e-12)


def test_without_a_judge_the_real_clip_is_what_a_student_should_make() -> None:
    net, batch = Curved(), examples(3, torch.float64)
    task = taught(net, net, truth=2.0)
    off = (task.made(batch, net) - batch.x).abs().mean((1, 2, 3, 4))
    torch.testing.assert_close(task(batch) - taught(net, net)(batch), 2 * off, rtol=0, atol=1e-12)
    alone = Rewarded(task_stage(net), net, None, replace(PLAN, stay=0.0, truth=2.0, blur=9.0))
    assert torch.equal(alone(batch), 2 * off)


def test_the_gradient_may_be_that_of_the_last_steps_alone() -> None:
    """All of them: the whole. One: as if what it begins with were given."""
    net, batch = Curved(), examples(2, torch.float64)
    plans = {k: replace(PLAN, judge=None, stay=0.0, truth=1.0, through=k) for k in (None, 3, 2, 1)}
    found = {}
    for k, plan in plans.items():
        net.zero_grad()
        made = Rewarded(task_stage(net), net, None, plan).made(batch, net)
        made.square().sum().backward()
        assert net.z.grad is not None
        found[k] = (made.detach(), net.z.grad.clone())
    assert all(torch.equal(made, found[None][0]) for made, _ in found.values())
    assert torch.equal(found[3][1], found[None][1])
    assert len({float(grad) for _, grad in found.values()}) == 3
    seen: list[Tensor] = []

    class Watched(Curved):
        def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
            seen.append(z)
            return super().forward(z, t, cond, w)

    watched = Watched()
    made = Rewarded(task_stage(watched), watched, None, plans[1]).made(batch, watched)
    made.square().sum().backward()
    t = torch.full((2,), 1 / 3, dtype=torch.float64)
    given, net.z.grad = seen[-1].detach(), None
    config().diffusion.split(given, net(given, t, batch.cond), t)[0].square().sum().backward()
    assert net.z.grad is not None and watched.z.grad is not None
    torch.testing.assert_close(watched.z.grad, net.z.grad)


def test_known_frames_stay() -> None:
    net, batch = Linear(), examples(2)
    batch.cond.mask = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1, 1).expand(2, -1, -1, -1, -1)
    made = taught(net).made(batch, net)
    assert torch.equal(made[:, :, 0], batch.x[:, :, 0]) and not torch.equal(made[:, :, 1], batch.x[:, :, 1])


def test_half_of_the_clips_are_made_at_the_samplers_own_weight() -> None:
    batch = examples(4)
    batch.u = torch.tensor([0.0, 0.49, 0.5, 0.75])
    w = taught(Linear(), w_range=[1.0, 3.0]).weight(batch)
    assert w is not None and w.tolist() == [3.0, 3.0, 1.0, 2.0]
    assert taught(Linear()).weight(batch) is None


class Halves(Brightness):
    """A judge that answers two questions, and finds in all clips but the first two things, one in each half."""

    def classify(self, features: Tensor) -> dict[str, Tensor]:
        return {"channel": features, "other": features.flip(1) / 2}

    def things(self, real: Tensor, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        first, later = ([clips[:, :, i : i + 4] for i in (0, 4)] for clips in (real, made))
        clip = torch.arange(len(real))
        return torch.cat([first[0], first[1][1:]]), torch.cat([later[0], later[1][1:]]), torch.cat([clip, clip[1:]])


def test_every_answer_about_every_thing_counts() -> None:
    student, batch, asked = Curved(), examples(3, torch.float64), Halves()
    task = taught(student, student, asked)
    seen = features.prepare(task.made(batch, student) + PLAN.blur * batch.eps[[2, 0, 1]])
    expected = torch.zeros(3, dtype=torch.float64)
    for real, made, clip in zip(*asked.things(features.prepare(batch.x), seen), strict=True):
        p, q = (asked.classify(asked(clips[None])) for clips in (real, made))
        expected[clip] += sum(float(divergence(p[name], q[name]).detach()) for name in p)
    assert torch.allclose(task(batch), expected, atol=1e-12)


def test_the_judge_has_a_gradient_everywhere(shipped: judge.Judge) -> None:
    """A flat clip too."""
    for clips in (torch.zeros(2, 3, 8, 32, 32), torch.randn(2, 3, 8, 32, 32, generator=generator("clips"))):
        clips.requires_grad_()
        sum(logits.sum() for logits in shipped.classify(shipped(clips)).values()).backward()  # type: ignore[union-attr]
        assert clips.grad is not None and bool(clips.grad.isfinite().all())


# the round -----------------------------------------------------------------------------------------------------------


def student() -> Stage:
    return Stage(config([0.0, 2.0]), base, small_stage().net)  # type: ignore[arg-type]


def better(out: Path, source: Dots | None = None, cfg: DistillConfig = PLAN, key: str = "student") -> Path:
    return rewarded(student(), key, Course(source or Dots(), encode, cfg, training(), out, progress=False))


def digest(weights: Path) -> str:
    return hashlib.sha256((weights / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted round."""
    return better(tmp_path_factory.mktemp("reward"))


def test_a_round_leaves_a_student_of_the_same_steps_and_weights(whole: Path) -> None:
    weights = checkpoint.load(whole)
    assert whole.parts[-2:] == ("03", "weights")
    assert weights.config["steps"] == 3 and weights.config["w_range"] == [0.0, 2.0]
    assert weights.config["method"] == "reward" and weights.config["teacher"] == "student"
    before = student().net.state_dict()
    assert weights.state.keys() == before.keys()
    assert not torch.equal(weights.state["conv_out.weight"].float(), before["conv_out.weight"])


def test_what_is_saved_is_all_of_the_student_and_nothing_else(tmp_path: Path) -> None:
    """Constants of its network too, but no discriminator: so it can be loaded."""
    stage = student()
    stage.net.register_buffer("constant", torch.full((1,), 0.5))
    plan = replace(PLAN, judge=None, stay=0.0, adversarial=1.0)
    out = rewarded(stage, "student", Course(Dots(), encode, plan, training(), tmp_path, progress=False))
    saved = checkpoint.load(out).state
    checkpoint.apply(stage.net, saved, str(out))
    assert saved["constant"].item() == 0.5


def test_half_of_what_was_learned_is_the_mean(whole: Path, tmp_path: Path) -> None:
    half, after = checkpoint.load(better(tmp_path, cfg=replace(PLAN, kept=0.5))), checkpoint.load(whole)
    for name, value in student().net.state_dict().items():
        assert torch.allclose(half.state[name], (value + after.state[name]) / 2, atol=1e-7)


@pytest.mark.parametrize("at", [3, 9, 13])
def test_cut_at_any_time_and_run_again_gives_the_same_bytes(whole: Path, tmp_path: Path, at: int) -> None:
    with pytest.raises(Cut):
        better(tmp_path, Cutting(at))
    assert digest(better(tmp_path)) == digest(whole)


def test_a_finished_round_is_not_run_again_nor_continued_with_other_settings(whole: Path, tmp_path: Path) -> None:
    out = whole.parent.parent
    assert better(out, Cutting(0)) == whole
    state = {name: value + 1 for name, value in checkpoint.load(Path(JUDGE)).state.items()}
    checkpoint.save(tmp_path / "other", state, judge.CONFIG)
    for changed in (
        {"stay": 0.5},
        {"kept": 0.5},
        {"adversarial": 1.0},
        {"through": 1},
        {"last_steps": 2},
        {"first": 1.0},
        {"judge": str(tmp_path / "other")},
        {"lr": 2e-3},
    ):
        with pytest.raises(ConfigError, match="other settings"):
            better(out, cfg=replace(PLAN, **changed))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="other settings"):
        better(out, key="another")


def test_how_many_clips_are_compared_is_a_setting_and_one_is_refused(whole: Path) -> None:
    course = Course(Dots(), encode, PLAN, training(micro_batch=2), whole.parent.parent, progress=False)
    with pytest.raises(ConfigError, match="other settings"):
        rewarded(student(), "student", course)
    with pytest.raises(ConfigError, match="compare the clips of a batch, of which one is seen"):
        rewarded(student(), "student", replace(course, train=training(micro_batch=1)))


class Blind(Brightness):
    """Finds nothing."""

    def things(self, real: Tensor, made: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return real[:0], made[:0], torch.arange(0)


def test_clips_in_which_nothing_is_found_cost_nothing() -> None:
    student, batch = Curved(), examples(2, torch.float64)
    assert torch.equal(taught(student, student, Blind())(batch), torch.zeros(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("tree", "why"),
    [
        ({"steps": [4, 2]}, "keeps its steps"),
        ({"steps": [4], "stay": -1}, "stay is -1"),
        ({"steps": [4], "blur": -1}, "blur"),
        ({"steps": [4], "patches": -1}, "patches is -1"),
        ({"steps": [4], "truth": -1}, "truth is -1"),
        ({"steps": [4], "adversarial": -1}, "adversarial is -1"),
        ({"steps": [4], "last_steps": 5}, "last_steps is 5, expected 1 to the number of steps, 4"),
        ({"steps": [4], "last_steps": 4, "first": 1}, "first is 1.0, expected 0: no step comes before the last 4"),
        ({"steps": [4], "through": 0}, "through is 0"),
        ({"steps": [4], "through": 5}, "through is 5, expected 1 to the number of steps, 4"),
        ({"steps": [4], "temperature": 0}, "temperature is 0"),
        ({"steps": [4], "kept": 0}, "kept is 0"),
        ({"steps": [4], "kept": 1.5}, "kept is 1.5"),
    ],
)
def test_impossible_settings_are_refused(tree: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        parse({"steps": [4], "round_steps": 1, "method": "reward", **tree}, DistillConfig, "distill")


OWN: dict[str, Any] = {"steps": [3], "round_steps": 1, "method": "reward", "judge": JUDGE}


def test_what_cannot_be_judged_is_refused(tmp_path: Path) -> None:
    guided = small_stage()  # by two evaluations
    save(tmp_path / "teacher", guided.cfg, guided.net.state_dict(), "A test.")
    with pytest.raises(ConfigError, match="two evaluations"):
        distill.stage_task(request(tmp_path, OWN))
    with pytest.raises(ConfigError, match=r"distill\.judge is missing"):
        distill.stage_task(request(tmp_path, {**OWN, "judge": None}))
    latent = config(codec=Codec(kind=Kind.LATENT, weights="vae", channels=3, stride=8, scale=1.0))
    with pytest.raises(ConfigError, match="not latents"):
        check_reward(latent, base, PLAN)  # type: ignore[arg-type]
    check_reward(latent, base, replace(PLAN, judge=None))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="leaves open what is to be seen"):
        check_reward(config(), base, replace(PLAN, truth=1.0))  # type: ignore[arg-type]
    check_reward(enlarging(), ssr, replace(PLAN, judge=None, truth=1.0))  # type: ignore[arg-type]
    for other, why in (
        (tmp_path / "teacher", "are no judge"),
        (package_root() / features.WEIGHTS, "measure, and must"),
    ):
        with pytest.raises(InputError, match=why):
            better(tmp_path / "other", cfg=replace(PLAN, judge=str(other)))
    assert not (tmp_path / "out").exists()


def test_the_task_betters_a_student_of_as_many_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(distill, "text_source", lambda cfg: SimpleNamespace(encode=encode, fingerprint="toy"))
    monkeypatch.setattr(distill, "open_source", lambda *_: Dots())
    before = student()
    save(tmp_path / "teacher", before.cfg, before.net.state_dict(), "A test.", steps=3, w_range=[0.0, 2.0])
    ask = request(tmp_path, OWN, shape=SHAPE)
    with pytest.raises(ConfigError, match=r"made for 3.*steps=\[3\]"):
        distill.stage_task(replace(ask, own={"distill": {**OWN, "steps": [4]}}))
    distill.stage_task(ask)
    assert capsys.readouterr().out.split() == [str(tmp_path / "out/03/weights")]


# what it is for ------------------------------------------------------------------------------------------------------


def enlarging() -> StageConfig:
    fields = {name: value for name, value in vars(config()).items() if name in ("net", "sampler")}
    return ssr.Config(
        name="ssr", kind="ssr", scale=2, shape=SHAPE, fps=4, diffusion=Diffusion(prediction=Prediction.X), **fields
    )


class Gain(nn.Module):
    """What comes in, many times fainter at first."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.3))

    def forward(self, z: Tensor, t: Tensor, cond: Cond, w: Tensor | None = None) -> Tensor:
        return self.gain * cond.concat


def test_a_student_that_is_given_a_video_learns_from_the_truth_alone(tmp_path: Path) -> None:
    """Flat clips: enlarged they are as they were, so that a gain of 1 makes no error."""
    stage = Stage(enlarging(), ssr, Gain())  # type: ignore[arg-type]
    plan = replace(PLAN, judge=None, truth=1.0, stay=0.0, round_steps=60, lr=5e-2, ema=0.8)
    rewarded(stage, "faint", Course(Plain(), encode, plan, training(batch=4, micro_batch=1), tmp_path, progress=False))
    assert stage.net.gain.item() == pytest.approx(1, abs=0.02)  # type: ignore[operator, union-attr]


class Plain:
    """Nothing but the caption's colour."""

    def sample(self, shape: Shape, fps: float, *key: Key) -> tuple[Tensor, str]:
        colour = int(torch.randint(2, (), generator=generator("plain", *key)))
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


def test_a_student_learns_from_the_judge_alone_what_a_caption_asks_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No loss compares pixels: the one channel that the judge has no class for stays gray, the others part."""
    monkeypatch.setattr(judge, "load", lambda path: (Brightness(), "brightness"))
    cfg = config(diffusion=Diffusion(prediction=Prediction.X))
    stage = Stage(cfg, base, Paint())  # type: ignore[arg-type]
    plan = replace(PLAN, round_steps=60, lr=5e-2, ema=0.8, stay=0.0)
    weights = rewarded(stage, "gray", Course(Plain(), encode, plan, training(batch=8), tmp_path, progress=False))
    checkpoint.apply(stage.net, checkpoint.load(weights).state, "test")
    made = stage.sample(None, encode(list(CAPTIONS[:2])), None, lambda *_: torch.zeros(2, 3, 2, 8, 8))
    colours = made.frames.mean((2, 3, 4))
    assert bool((colours[:, 2].abs() < 1e-6).all())
    assert min(colours[0, 0] - colours[0, 1], colours[1, 1] - colours[1, 0]) > 1.2, colours
