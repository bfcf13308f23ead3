"""Laws of training: examples depend on their number alone, resuming is exact, sharing changes nothing."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import deep_net, encode_text
from torch import Tensor, nn

from cascade import checkpoint, cli, loading, store, tasks
from cascade.ask import request
from cascade.compose import compose
from cascade.config import package_root, parse, plugin
from cascade.data.clips import Clips, Item
from cascade.data.shapes import ShapesConfig
from cascade.data.source import World
from cascade.diffusion import Diffusion, Prediction
from cascade.diffusion import Path as WayPath
from cascade.errors import ConfigError, InputError, LockedError, NumericError
from cascade.noise import generator
from cascade.settings import Before, Gap, StageConfig, TrainConfig
from cascade.stage import Batch, Stage
from cascade.tasks import new_stage
from cascade.text import T5Text, Text, TextConfig
from cascade.training.examples import Examples, Pooled, batches, crop, pool_of, pooled
from cascade.training.imitation import gap_makers, imitation, makers
from cascade.training.state import Signals, State
from cascade.training.train import fit, learning_rate, settings
from cascade.video import Fill, Shape, Video

TESTS = Path(__file__).resolve().parent
Make = Callable[..., Any]


@dataclass
class Trap:
    """A source that does something else when it makes training example `at`."""

    clips: Any
    at: int
    then: Callable[[], Any]

    def sample(self, shape: Shape, fps: float, *key: int | str) -> tuple[Tensor, str]:
        clip, caption = self.clips.sample(shape, fps, *key)
        if key[1:] == ("train", self.at):
            changed = self.then()
            clip = clip if changed is None else changed(clip)
        return clip, caption


@pytest.fixture
def train(make_stage: Make, encode: Make, clips: Any, tmp_path: Path, one_thread: None) -> Make:
    """`train(name, stage=..., source=..., **settings)`: trains a new stage into the directory `name`."""

    def run(name: str, stage: Stage | None = None, source: Any = None, **changes: Any) -> Stage:
        made = stage or make_stage("tsr", net=deep_net())
        own = {key: changes.pop(key) for key in ("preview", "inputs", "loss", "progress", "pool") if key in changes}
        cfg = TrainConfig(**({"steps": 6, "batch": 2, "lr": 1e-3, "ema": 0.9, "checkpoint_every": 3} | changes))
        fit(made, source or clips, encode, cfg, tmp_path / name, **({"progress": False} | own))
        return made

    return run


def saved(folder: Path, step: int = 6) -> dict[str, bytes]:
    """Weights, average and moments after `step`."""
    return store.read(folder / f"step-{step:07d}", "training").files


def tensors(folder: Path, step: int = 6, part: str = "model") -> dict[str, Tensor]:
    return store.bytes_to_tensors(saved(folder, step)[f"{part}.safetensors"])


def gap(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name].float() - b[name].float()).abs().max()) for name in a)


# examples ------------------------------------------------------------------------------------------------------------


def examples(make_stage: Make, encode: Make, clips: Any, kind: str = "tsr", **changes: Any) -> Examples:
    cfg = TrainConfig(**({"steps": 5, "batch": 4, "lr": 1e-3} | changes))
    return Examples(make_stage(kind, augment_max=0.5), clips, encode, cfg)


def test_an_example_depends_on_the_seed_and_its_number_alone(make_stage: Make, encode: Make, clips: Any) -> None:
    one, other = examples(make_stage, encode, clips), examples(make_stage, encode, clips)
    assert len(one) == 20
    wanted = [one[i] for i in range(6)]
    torch.rand(7)
    for i in (5, 2, 0, 2):
        again = other[i]
        for name in ("x", "eps", "t"):
            assert torch.equal(getattr(again, name), getattr(wanted[i], name))
        assert torch.equal(again.cond.concat, wanted[i].cond.concat) and torch.equal(
            again.cond.level, wanted[i].cond.level
        )
    seeded = examples(make_stage, encode, clips, seed=1)
    assert not torch.equal(seeded[0].eps, wanted[0].eps) and not torch.equal(wanted[0].eps, wanted[1].eps)


def test_the_noise_of_an_example_is_noise_whatever_the_path(make_stage: Make, encode: Make, clips: Any) -> None:
    plain = examples(make_stage, encode, clips, "ssr")
    cfg = replace(plain.stage.cfg, diffusion=Diffusion(prediction=Prediction.X, path=WayPath.STRAIGHT))
    straight = Examples(Stage(cfg, plain.stage.rule, torch.nn.Identity()), clips, encode, plain.cfg)
    assert torch.equal(straight[0].eps, plain[0].eps)


def test_drawing_examples_leaves_the_global_generator_alone(make_stage: Make, encode: Make, clips: Any) -> None:
    state = torch.get_rng_state()
    made = examples(make_stage, encode, clips, "base", images=0.5, drop_text=0.5)
    loader = batches(made, made.cfg, 0, SimpleNamespace(num_processes=1, process_index=0))  # type: ignore[arg-type]
    next(loader)
    assert torch.equal(torch.get_rng_state(), state)


def test_the_times_of_a_step_are_spread_evenly(make_stage: Make, encode: Make, clips: Any) -> None:
    made = examples(make_stage, encode, clips)
    for step in range(2):
        times = torch.cat([made[4 * step + i].t for i in range(4)]).sort().values
        assert 0 <= times[0] < 0.25 and torch.allclose(times.diff(), torch.full((3,), 0.25))


def test_times_keep_to_the_range_that_is_trained(make_stage: Make, encode: Make, clips: Any) -> None:
    made = examples(make_stage, encode, clips, times=[0.25, 0.75])
    times = torch.cat([made[i].t for i in range(20)])
    assert 0.25 <= times.min() < 0.4 and 0.6 < times.max() <= 0.75


def test_text_is_dropped_as_often_as_asked(make_stage: Make, encode: Make, clips: Any) -> None:
    kept = {}
    for share in (0.0, 0.4, 1.0):
        made = examples(make_stage, encode, clips, steps=50, drop_text=share)
        kept[share] = sum(bool(made[i].cond.text.mask.any()) for i in range(200)) / 200
    assert kept[0.0] == 1 and kept[1.0] == 0 and 0.5 < kept[0.4] < 0.7


def test_a_step_of_images_shows_as_many_frames_each_of_a_clip_of_its_own(
    make_stage: Make, encode: Make, clips: Any
) -> None:
    made = examples(make_stage, encode, clips, "base", images=1.0)
    step = [made[i] for i in range(4)]
    assert all(part.x.shape[:3] == (4, 3, 1) and part.cond.segments is None for part in step)
    frames = torch.cat([part.x for part in step]).flatten(1)
    assert len(frames.unique(dim=0)) > 4, "one clip of 4 frames could not show so many"
    times = torch.cat([part.t for part in step]).sort().values
    assert torch.allclose(times.diff(), torch.full((15,), 1 / 16), atol=1e-6)


def test_so_many_steps_are_of_images_as_asked(make_stage: Make, encode: Make, clips: Any) -> None:
    made = examples(make_stage, encode, clips, "base", images=0.3, steps=100)
    frames = [[made[4 * step + i].x.shape[2] for i in (0, 3)] for step in range(100)]
    assert all(first == last for first, last in frames) and 20 < sum(first == 1 for first, _ in frames) < 40


def test_images_of_crops_are_crops(make_stage: Make, encode: Make, clips: Any) -> None:
    made = examples(make_stage, encode, clips, "ssr", images=1.0, crop=Shape(frames=2, height=4, width=6))
    assert made[0].x.shape == (2, 3, 1, 4, 6)


@pytest.mark.parametrize(("kind", "frames"), [("tsr", 2), ("interp", 3)])
def test_known_frames_of_a_crop_are_known(kind: str, frames: int, make_stage: Make, encode: Make, clips: Any) -> None:
    made = examples(make_stage, encode, clips, kind, crop=Shape(frames=frames, height=4, width=6))
    for i in range(6):
        example = made[i]
        assert example.x.shape == (1, 3, frames, 4, 6) == example.cond.concat.shape
        known = example.cond.mask[0, 0, :, 0, 0] > 0
        assert known.tolist() == [f % 2 == 0 for f in range(frames)]


def test_crops_are_everywhere_and_begin_at_multiples_of_the_rate() -> None:
    place = torch.arange(9 * 6 * 5.0).view(1, 1, 9, 6, 5)
    starts = set()
    for i in range(200):
        part = crop(Video(place, 8.0), Shape(frames=3, height=4, width=5), 2, generator("crop", i))
        assert part.fps == 8.0 and part.shape == Shape(frames=3, height=4, width=5)
        first = int(part.frames[0, 0, 0, 0, 0])
        starts.add((first // 30, first % 30 // 5, first % 5))
    assert starts == {(f, y, 0) for f in (0, 2, 4, 6) for y in range(3)}
    with pytest.raises(ConfigError, match=r"train\.crop is 10x4x5, larger than the clip \(9x6x5\)"):
        crop(Video(place, 8.0), Shape(frames=10, height=4, width=5), 2, generator())


def test_of_several_crops_the_one_with_most_contrast_is_taken(make_stage: Make, encode: Make, clips: Any) -> None:
    size = Shape(frames=2, height=4, width=2)
    mean = {}
    for tries in (1, 4):
        made = examples(make_stage, encode, clips, steps=10, crop=size, crop_tries=tries)
        mean[tries] = sum(float(made[i].x.std()) for i in range(40)) / 40
    assert mean[4] > 1.5 * mean[1] > 0


def test_processes_share_every_micro_batch(make_stage: Make, encode: Make, clips: Any) -> None:
    made = examples(make_stage, encode, clips, steps=3, micro_batch=2)

    def loader(world: int, rank: int) -> list[Batch]:
        return list(batches(made, made.cfg, 1, SimpleNamespace(num_processes=world, process_index=rank)))  # type: ignore[arg-type]

    alone, shares = loader(1, 0), [loader(2, rank) for rank in range(2)]
    assert [len(batch) for batch in alone] == [2] * 4
    for batch, *parts in zip(alone, *shares, strict=True):
        assert torch.equal(batch.eps, torch.cat([part.eps for part in parts]))
    assert torch.equal(alone[0].eps, torch.cat([made[4].eps, made[5].eps]))
    with pytest.raises(ConfigError, match="2 clips at once cannot be shared by 3 processes"):
        loader(3, 0)


# the loop ------------------------------------------------------------------------------------------------------------


def test_a_long_training_of_large_batches_begins_at_once(make_stage: Make, encode: Make, clips: Any) -> None:
    cfg = TrainConfig(steps=2 * 10**6, batch=2, lr=0)
    tracemalloc.start()
    loader = batches(Examples(make_stage("base"), clips, encode, cfg), cfg, 0, one_process())
    assert len(next(loader)) == 2 and tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_no_more_captions_are_kept_than_there_is_room_for(
    make_stage: Make, encode: Make, clips: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = [f"circle {i % 7}" for i in range(50)]
    size = encode(said[:1]).tokens.nbytes
    monkeypatch.setattr("cascade.training.examples.REMEMBERED", 3 * size)
    examples = Examples(make_stage("base"), clips, encode, TrainConfig(steps=1, batch=1, lr=0))
    for caption in said:
        assert torch.equal(examples.text(caption).tokens, encode([caption]).tokens)
        assert len(examples.kept) <= 3 and examples.room == (3 - len(examples.kept)) * size
    monkeypatch.setattr("cascade.training.examples.REMEMBERED", 0)
    examples = Examples(make_stage("base"), clips, encode, TrainConfig(steps=1, batch=1, lr=0))
    assert len(examples.text("a")) == len(examples.text("b")) == len(examples.kept) == 1


def test_the_learning_rate_warms_up_and_decays_to_nothing() -> None:
    cfg = TrainConfig(steps=10, batch=1, lr=0.5, warmup=4)
    assert [learning_rate(cfg, step) for step in (0, 1, 3, 4)] == [0.125, 0.25, 0.5, 0.5]
    assert learning_rate(cfg, 7) == 0.25 and learning_rate(cfg, 10) == 0
    assert learning_rate(replace(cfg, warmup=0), 0) == 0.5
    assert [learning_rate(replace(cfg, warmup=20), step) for step in (0, 9)] == [0.025, 0.25]


def test_a_part_may_learn_faster(make_stage: Make) -> None:
    """Its weights come after the rest, in the order in which a checkpoint names them."""

    class Fast(nn.Linear):
        pace = 3.0

    slow, fast = make_stage("tsr", net=deep_net()).net, Fast(2, 2)
    net = nn.ModuleList([slow, fast])
    cfg = TrainConfig(steps=2, batch=1, lr=0.1)
    both = State.new(net, cfg, None).optimizer.param_groups
    assert [(group["pace"], len(group["params"])) for group in both] == [(1.0, len(list(slow.parameters()))), (3.0, 2)]
    assert all(a is b for a, b in zip((p for g in both for p in g["params"]), net.parameters(), strict=True))
    (alone,) = State.new(slow, cfg, None).optimizer.param_groups
    assert alone["pace"] == 1.0


def test_a_small_problem_is_learned(train: Make, make_stage: Make, encode: Make, clips: Any) -> None:
    stage = make_stage("tsr", net=deep_net())
    made = Examples(stage, clips, encode, TrainConfig(steps=1, batch=8, lr=1e-3))
    batch = Batch.cat([made[i] for i in range(8)])
    before = float(stage.loss(batch).mean().detach())
    trained = train("out", stage, steps=40, batch=4, lr=1e-2)
    assert trained is stage and float(stage.loss(batch).mean().detach()) < 0.6 * before


def test_the_average_follows_its_formula(train: Make, make_stage: Make, tmp_path: Path) -> None:
    average = {name: value.detach().clone() for name, value in make_stage("tsr", net=deep_net()).net.named_parameters()}
    train("out", steps=4, checkpoint_every=1, keep=9, ema=0.3)
    for step in range(1, 5):
        decay = min(0.3, (1 + step) / (10 + step))
        model = tensors(tmp_path / "out", step)
        average = {name: decay * value + (1 - decay) * model[name] for name, value in average.items()}
        assert gap(average, tensors(tmp_path / "out", step, "ema")) <= 1e-6


def test_old_checkpoints_go_and_sheets_and_logs_come(train: Make, tmp_path: Path) -> None:
    sheets: list[tuple[int, dict[str, Tensor]]] = []

    def preview(average: dict[str, Tensor], step: int) -> bytes:
        sheets.append((step, {name: value.clone() for name, value in average.items()}))
        return f"sheet {step}".encode()

    train("out", preview=preview, checkpoint_every=1, keep=2, sample_every=4)
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == [
        "samples-0000004.png", "samples-0000006.png", "step-0000005", "step-0000006", "tensorboard",
    ]  # fmt: skip
    assert (out / "samples-0000004.png").read_bytes() == b"sheet 4"
    assert gap(sheets[-1][1], tensors(out, 6, "ema")) == 0 and list((out / "tensorboard").iterdir())


def test_cut_while_a_sheet_is_made_and_run_again_has_it(train: Make, tmp_path: Path) -> None:
    def cut(average: dict[str, Tensor], step: int) -> bytes:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train("out", preview=cut, checkpoint_every=4, sample_every=4)
    train("out", preview=lambda average, step: b"sheet", checkpoint_every=4, sample_every=4)
    assert (tmp_path / "out/samples-0000004.png").is_file()


def test_the_bar_shows_the_stage_and_its_loss(train: Make, capsys: pytest.CaptureFixture[str]) -> None:
    train("out", steps=2, progress=True)
    shown = capsys.readouterr().err
    assert "tsr" in shown and "loss=" in shown and "lr=" in shown and "2/2" in shown


@pytest.mark.parametrize("kind", ["base", "ssr"])
def test_images_train(kind: str, train: Make, make_stage: Make, tmp_path: Path) -> None:
    train("out", make_stage(kind, net=deep_net()), images=1.0, steps=3)
    assert all(value.isfinite().all() for value in tensors(tmp_path / "out", 3).values())


# resuming ------------------------------------------------------------------------------------------------------------


class Broken(Exception):
    pass


def fail() -> None:
    raise Broken


@pytest.mark.parametrize("at", [5, 9])
def test_resuming_is_never_having_stopped(at: int, train: Make, clips: Any, tmp_path: Path) -> None:
    train("straight")
    with pytest.raises(Broken):  # in step 3 or 5, counted from 1: before and after the checkpoint of step 3
        train("broken", source=Trap(clips, at, fail))
    assert (tmp_path / "broken/step-0000003").exists() == (at == 9)
    resumed = train("broken")
    assert saved(tmp_path / "broken") == saved(tmp_path / "straight")
    assert gap(dict(resumed.net.state_dict()), tensors(tmp_path / "straight")) == 0


def test_moments_come_back_in_the_memory_order_of_their_weights(train: Make, make_stage: Make, tmp_path: Path) -> None:
    """The fused AdamW walks through memory: in another order it would mix the moments of different weights."""
    train("out")
    state = State.new(make_stage("tsr", net=deep_net()).net, TrainConfig(steps=6, batch=2, lr=1e-3), None)
    state.restore(store.read(tmp_path / "out/step-0000006"))
    assert state.step == 6 and state.files() == saved(tmp_path / "out")
    moments = [(p, value["exp_avg"]) for p, value in state.optimizer.state.items() if value]
    assert any(not p.is_contiguous() for p, _ in moments) and all(p.stride() == m.stride() for p, m in moments)


def test_a_finished_training_is_not_trained_again(train: Make, clips: Any, tmp_path: Path) -> None:
    train("out")
    before, clips.calls = saved(tmp_path / "out"), 0
    again = train("out")
    assert clips.calls == 0 and saved(tmp_path / "out") == before
    assert gap(dict(again.net.state_dict()), tensors(tmp_path / "out")) == 0


def test_other_settings_are_refused_and_how_it_runs_is_not_a_setting(
    train: Make, make_stage: Make, clips: Any, tmp_path: Path
) -> None:
    with pytest.raises(Broken):
        train("out", source=Trap(clips, 9, fail))
    other = make_stage("tsr", net=replace(deep_net(), head=8))
    for changes in ({"lr": 2e-3}, {"seed": 1}, {"inputs": "other data"}, {"stage": other}):
        with pytest.raises(ConfigError, match="holds a training with other settings"):
            train("out", **changes)
    stage = make_stage("tsr", net=deep_net(), weights="elsewhere", augment=0.1, train=None)
    train("out", stage, keep=5, checkpoint_every=2, checkpointing=True)
    train("straight")
    assert saved(tmp_path / "out") == saved(tmp_path / "straight")


def test_a_loss_of_ones_own_may_see_the_sampler(make_stage: Make) -> None:
    stage, cfg = make_stage("tsr"), TrainConfig(steps=1, batch=1, lr=1e-3)
    assert (
        "sampler" in settings(stage, cfg, own=False)["stage"]
        and "sampler" not in settings(stage, cfg, own=True)["stage"]
    )


def test_two_trainings_never_share_a_directory(train: Make, tmp_path: Path) -> None:
    with store.lock(tmp_path / "out"), pytest.raises(LockedError, match="out is in use"):
        train("out")
    assert not (tmp_path / "out").exists()


def test_the_remains_of_a_dead_run_are_swept(train: Make, tmp_path: Path) -> None:
    dead = tmp_path / "out" / f".tmp-step-0000003-{2**22 + 1}-0123abcd"
    dead.mkdir(parents=True)
    train("out")
    assert not dead.exists()


def test_a_damaged_checkpoint_is_passed_over(train: Make, clips: Any, tmp_path: Path) -> None:
    train("straight")
    with pytest.raises(Broken):
        train("out", source=Trap(clips, 11, fail), checkpoint_every=1, keep=9)
    file = tmp_path / "out/step-0000005/model.safetensors"
    os.truncate(file, file.stat().st_size - 1)
    train("out", checkpoint_every=1, keep=9)
    assert saved(tmp_path / "out") == saved(tmp_path / "straight")


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    """SIGINT as a terminal sends it: where a shell started the tests in the background, it is ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_a_signal_waits_for_the_step_and_is_saved(train: Make, clips: Any, tmp_path: Path, ctrl_c: None) -> None:
    train("straight")
    with pytest.raises(KeyboardInterrupt):
        train("out", source=Trap(clips, 6, lambda: signal.raise_signal(signal.SIGINT)), checkpoint_every=6)
    assert [path.name for path in (tmp_path / "out").glob("step-*")] == ["step-0000004"]
    train("out", checkpoint_every=6)
    assert saved(tmp_path / "out") == saved(tmp_path / "straight")


def test_sigterm_is_handed_on_and_a_second_signal_is_obeyed_at_once() -> None:
    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        with pytest.raises(SystemExit, match="143"), Signals() as signals:
            signal.raise_signal(signal.SIGTERM)
            assert signals.seen == signal.SIGTERM
        with pytest.raises(SystemExit), Signals() as signals:
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("the second signal was ignored")
        signal.signal(signal.SIGTERM, lambda number, frame: None)
        with pytest.raises(KeyboardInterrupt), Signals():
            signal.raise_signal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        with Signals() as signals:
            signal.raise_signal(signal.SIGTERM)
        assert not signals.seen
        signal.signal(signal.SIGTERM, leave)
        with pytest.raises(Broken), Signals():  # an error says more than the signal
            signal.raise_signal(signal.SIGTERM)
            fail()
        assert signal.getsignal(signal.SIGTERM) is leave
    finally:
        signal.signal(signal.SIGTERM, before)


def test_training_outside_the_main_thread_leaves_signals_alone(train: Make, tmp_path: Path) -> None:
    thread = threading.Thread(target=train, args=("out",), kwargs={"steps": 1})
    thread.start()
    thread.join()
    assert saved(tmp_path / "out", 1)


# faults --------------------------------------------------------------------------------------------------------------


def test_nan_never_reaches_the_weights(train: Make, make_stage: Make, clips: Any, tmp_path: Path) -> None:
    train("straight")
    broken, source = make_stage("tsr", net=deep_net()), Trap(clips, 9, lambda: lambda clip: clip * math.nan)
    with pytest.raises(NumericError, match=r"training step 5: loss nan.*examples 8 to 9.*last checkpoint is whole"):
        train("out", broken, source)
    assert all(value.isfinite().all() for value in broken.net.state_dict().values())
    assert [path.name for path in (tmp_path / "out").glob("step-*")] == ["step-0000003"]
    train("out")
    assert saved(tmp_path / "out") == saved(tmp_path / "straight")


def test_what_a_device_or_network_cannot_do_is_refused(train: Make, make_stage: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"train\.precision is fp16, which needs a GPU.* Fix: train\.precision=bf16"):
        train("out", precision="fp16")
    stage = make_stage("tsr")
    plain_net = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="Linear cannot recompute its activations"):
        train("out", Stage(stage.cfg, stage.rule, plain_net), checkpointing=True)
    assert not (tmp_path / "out").exists()


# one result, however it is made --------------------------------------------------------------------------------------


def test_recomputing_activations_changes_nothing(train: Make, tmp_path: Path) -> None:
    train("plain", steps=3)
    stage = train("again", steps=3, checkpointing=True)
    assert saved(tmp_path / "again", 3) == saved(tmp_path / "plain", 3)
    assert stage.net.checkpointing


def test_accumulated_gradients_are_the_whole_batchs(train: Make, tmp_path: Path) -> None:
    train("whole", steps=3, batch=4)
    train("parts", steps=3, batch=4, micro_batch=2)
    for part in ("model", "ema", "optimizer"):
        assert gap(*(tensors(tmp_path / name, 3, part) for name in ("whole", "parts"))) <= 1e-5


def test_workers_change_nothing(train: Make, tmp_path: Path) -> None:
    train("alone", steps=3)
    train("workers", steps=3, workers=2)
    assert saved(tmp_path / "workers", 3) == saved(tmp_path / "alone", 3)


def test_bfloat16_trains_on_the_cpu_and_leaves_the_network_as_it_was(
    train: Make, make_stage: Make, tmp_path: Path
) -> None:
    stage = train("half", steps=3, precision="bf16")
    train("full", steps=3)
    half, full = tensors(tmp_path / "half", 3), tensors(tmp_path / "full", 3)
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in half.values())
    assert 0 < gap(half, full) < 0.02
    fresh = make_stage("tsr", net=deep_net())
    fresh.net.load_state_dict(stage.net.state_dict())
    made = Examples(stage, SimpleNamespace(sample=fixed), encode_text, TrainConfig(steps=1, batch=1, lr=0.0))
    assert torch.equal(stage.loss(made[0]), fresh.loss(made[0]))


def fixed(shape: Shape, fps: float, *key: int | str) -> tuple[Tensor, str]:
    return torch.rand(3, shape.frames, shape.height, shape.width, generator=generator(*key)), "a red circle"


def test_a_loss_of_ones_own_trains(train: Make) -> None:
    """The network learns to say one, whatever it sees."""
    values: list[float] = []

    def ones(batch: Batch, net: Callable[..., Tensor]) -> Tensor:
        error = (net(batch.x, batch.t, batch.cond) - 1).square().mean((1, 2, 3, 4))
        values.append(error.mean().item())
        return error

    train("out", loss=ones, steps=30, lr=3e-2)
    assert len(values) == 30 and values[0] == 1 and values[-1] < 0.3


def test_weights_in_training_stay_where_it_works(make_stage: Make) -> None:
    cfg = replace(make_stage("base").cfg, offload=True)
    stage, _ = new_stage(cfg, plugin("base"), TrainConfig(steps=1, batch=1, lr=0))
    stage.to(torch.device("cpu"))
    assert not any(module._forward_pre_hooks for module in stage.net.modules())


def test_a_training_is_named_by_the_clips_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would go on, or be over, after files or captions had changed under the same path."""
    words = ["stage=tiny/base", "task=train", f"data.clips.path={tmp_path}", f"out={tmp_path / 'out'}", "device=cpu"]
    _, ask = tasks.asked("base", cli.settings("stage", words)[0])
    inputs: list[str] = []
    monkeypatch.setattr(tasks, "fit", lambda *_, **own: inputs.append(repr(own["inputs"])))
    monkeypatch.setattr(tasks, "save_stage", lambda *_: None)
    for captions, hashed in ((("a",), "1"), (("a",), "1"), (("a", "b"), "1"), (("a",), "2")):
        item = Item("a.mp4", captions, tmp_path / hashed, 8)
        found = Clips(ask.data.clips, ask.cfg.shape, 4.0, [item], [])  # type: ignore[arg-type]
        monkeypatch.setattr(tasks, "open_source", lambda *_, found=found: found)
        tasks.train(ask)
    assert inputs[0] == inputs[1] and len(set(inputs)) == 3


def test_training_starts_from_given_weights_strictly(make_stage: Make, tmp_path: Path) -> None:
    stage = make_stage("tsr", 0.3, net=deep_net())
    loading.save_stage(tmp_path / "weights", stage.cfg, stage.net.state_dict(), "")
    cfg = TrainConfig(steps=1, batch=1, lr=1e-3, init=str(tmp_path / "weights"))
    started, key = new_stage(stage.cfg, stage.rule, cfg)
    assert key == checkpoint.load(tmp_path / "weights").hash
    assert gap(dict(started.net.state_dict()), dict(stage.net.state_dict())) == 0
    other = replace(stage.cfg, net=replace(deep_net(), embedding=10))
    with pytest.raises(InputError, match="embedding is 8 in the weights, 10 in the configuration"):
        new_stage(other, stage.rule, cfg)
    other = replace(stage.cfg, diffusion=replace(stage.cfg.diffusion, prediction=Prediction.EPS))
    with pytest.raises(InputError, match="prediction is 'v' in the weights, 'eps' in the configuration"):
        new_stage(other, stage.rule, cfg)
    state = torch.get_rng_state()
    fresh, again = (new_stage(stage.cfg, stage.rule, replace(cfg, init=None, seed=5))[0] for _ in range(2))
    assert gap(dict(fresh.net.state_dict()), dict(again.net.state_dict())) == 0
    assert torch.equal(torch.get_rng_state(), state)


# processes -----------------------------------------------------------------------------------------------------------

SCRIPT = """
import os, random, signal, sys, time
import torch
torch.set_num_threads(1)
import accelerate, torch._dynamo
from torch.utils.tensorboard import SummaryWriter
from pathlib import Path
from conftest import Clips, deep_net, encode_text, tiny_stage
from cascade.settings import TrainConfig
from cascade.training.train import fit

def train(out, **changes):
    cfg = TrainConfig(**({"steps": 8, "batch": 4, "lr": 1e-3, "ema": 0.9, "checkpoint_every": 1} | changes))
    fit(tiny_stage("tsr", net=deep_net()), Clips(), encode_text, cfg, Path(out), progress=False)
"""

KILLED = """
def child(out, seconds):
    started, pid = time.monotonic(), os.fork()
    if pid == 0:
        train(out)
        os._exit(0)
    while time.monotonic() < started + seconds:
        if os.waitpid(pid, os.WNOHANG)[0]:
            return time.monotonic() - started, 0
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return seconds, 1

whole, _ = child(sys.argv[1], 1e9)
draw, kills = random.Random(0), 0
for _ in range(4):
    kills += child(sys.argv[2], whole * draw.uniform(0.15, 0.5))[1]
child(sys.argv[2], 1e9)
print("kills", kills)
"""


def script(tmp_path: Path, body: str) -> tuple[Path, dict[str, str]]:
    file = tmp_path / "script.py"
    file.write_text(SCRIPT + body)
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent)])
    return file, os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


@pytest.mark.slow
def test_killed_at_any_moment_and_run_again_it_is_the_same(tmp_path: Path) -> None:
    file, environment = script(tmp_path, KILLED)
    command = [sys.executable, str(file), str(tmp_path / "straight"), str(tmp_path / "killed")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 1
    assert saved(tmp_path / "killed", 8) == saved(tmp_path / "straight", 8)
    assert not [path for path in (tmp_path / "killed").iterdir() if path.name.startswith(".")]


@pytest.mark.slow
def test_two_processes_train_the_same_weights_as_one(train: Make, tmp_path: Path) -> None:
    """Not `--cpu`: accelerate 1.15 would start one process then, whatever --num_processes says."""
    body = "for _ in range(2):\n    train(sys.argv[1], steps=3)\nassert accelerate.PartialState().num_processes == 2\n"
    file, environment = script(tmp_path, body)
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command = [sys.executable, *launch, str(file), str(tmp_path / "two")]
    environment.pop("ACCELERATE_USE_CPU", None)
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    train("one", steps=3, batch=4)
    for part in ("model", "ema", "optimizer"):
        assert gap(*(tensors(tmp_path / name, 3, part) for name in ("one", "two"))) <= 1e-5


# pool ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reader() -> T5Text:
    return T5Text(TextConfig(encoder="tiny/text", max_tokens=48))


def drawn(make_stage: Make, reader: T5Text, kind: str = "base", **changes: Any) -> Pooled:
    cfg = TrainConfig(**({"steps": 4, "batch": 4, "lr": 1e-3, "pool": 30, "drop_text": 0.5} | changes))
    stage = make_stage(kind, augment_max=0.5)
    stage.cfg.fps, stage.cfg.train = 4.0, cfg
    return pooled(stage, World(ShapesConfig(two=0.5)), reader, cfg)


@pytest.mark.parametrize("pad", [False, True])
@pytest.mark.parametrize("mask", [False, True])
def test_a_pool_is_told_the_text_that_sampling_is_told(make_stage: Make, pad: bool, mask: bool) -> None:
    reader = T5Text(TextConfig(encoder="tiny/text", max_tokens=48, pad=pad, mask=mask))
    captions = ("a red circle", "a small blue square moves up and a large white ring stands still")
    got, wanted = reader.embed(*reader.pieces(captions)), reader.encode(captions)
    assert torch.equal(got.pad(48).mask, wanted.mask)
    assert (got.pad(48).tokens - wanted.tokens).abs().max() < 1e-5
    assert drawn(make_stage, reader, drop_text=0.0).step(0).cond.text.mask.all() == pad


def one_process(rank: int = 0, world: int = 1) -> Any:
    return SimpleNamespace(num_processes=world, process_index=rank)


def test_a_pooled_step_follows_from_the_seed_and_its_number_alone(make_stage: Make, reader: T5Text) -> None:
    one, other = drawn(make_stage, reader), drawn(make_stage, reader)
    wanted = [one.step(i) for i in range(3)]
    for i in (2, 0):
        again = other.step(i)
        for name in ("x", "eps", "t", "u"):
            assert torch.equal(getattr(again, name), getattr(wanted[i], name))
    assert not torch.equal(wanted[0].x, wanted[1].x)
    assert torch.allclose(wanted[0].t.sort().values.diff(), torch.full((3,), 0.25))


def test_processes_and_micro_batches_share_a_pooled_step(make_stage: Make, reader: T5Text) -> None:
    for images in (0.0, 1.0):
        pool = drawn(make_stage, reader, images=images, micro_batch=2, steps=1)
        whole = pool.step(0)
        parts = [list(pool.batches(0, one_process(rank, 2))) for rank in range(2)]
        assert [len(part) for part in parts] == [2, 2]
        joined = Batch.cat([parts[rank][i] for i in range(2) for rank in range(2)])
        assert torch.equal(joined.x, whole.x) and torch.equal(joined.eps, whole.eps)
        assert len(whole) == (4 if images == 0 else 4 * pool.stage.cfg.shape.frames)


def test_a_pool_is_for_the_procedural_world_read_by_t5(make_stage: Make, encode: Make, clips: Any) -> None:
    with pytest.raises(ConfigError, match="pool is for the procedural world"):
        pool_of(make_stage("base"), clips, SimpleNamespace(), TrainConfig(steps=1, batch=1, lr=0, pool=5))  # type: ignore[arg-type]


def test_the_gap_brings_what_the_stage_before_makes(make_stage: Make, reader: T5Text) -> None:
    """All or some of the clips come in as the stage before makes them; the truth stays the truth."""
    plain_pool = drawn(make_stage, reader, "ssr", drop_text=0.0)
    truth = plain_pool.step(0)
    for share in (0.5, 1.0):
        gap = Gap(stage="tiny/tsr", share=share)
        pool = replace(drawn(make_stage, reader, "ssr", drop_text=0.0, gap=gap), before=Gray())
        batch = pool.step(0)
        gray = (batch.cond.concat[batch.cond.level == 0].flatten(1).abs().amax(1) == 0).float()
        assert torch.equal(batch.x, truth.x)
        assert bool((gray == 1).all()) == (share == 1)


def test_the_gap_makes_the_clips_that_it_uses_alone(make_stage: Make, reader: T5Text) -> None:
    made: list[int] = []

    def before(low: Video, text: Text, rng: torch.Generator) -> Video:
        assert len(low.frames) == len(text)
        made.append(len(text))
        return Video(text.tokens.sum((1, 2)).sin().view(-1, 1, 1, 1, 1).expand_as(low.frames), low.fps)

    settings = {"batch": 16, "drop_text": 0.0, "gap": Gap(stage="tiny/tsr", share=0.3)}
    pool = replace(drawn(make_stage, reader, "ssr", **settings), before=before)
    for step in range(4):
        batch = pool.step(step)
        told = batch.cond.text.tokens.sum((1, 2)).sin().view(-1, 1, 1, 1, 1)
        own = (batch.cond.concat - told).flatten(1).abs().amax(1) < 1e-3
        assert torch.equal(own, batch.cond.concat.flatten(1).std(1) < 1e-4) and int(own.sum()) <= made[step]
        assert made[step] < 16
    assert 0 < sum(made) < 0.6 * 64


def shipped(name: str, **changes: Any) -> tuple[StageConfig, Any]:
    tree, rule = compose("stage", [f"stage={name}"]), plugin(compose("stage", [f"stage={name}"])["kind"])
    known = {f.name for f in fields(rule.Config)}
    return replace(parse({key: tree[key] for key in tree if key in known}, rule.Config), **changes), rule


@pytest.mark.parametrize(
    ("name", "changes", "before", "why"),
    [
        ("tiny/base", {}, {"stage": "tiny/tsr"}, r"train\.gap is set, but base starts from text.*Fix: train\.gap=null"),
        ("tiny/ssr1", {}, {"stage": "tiny/base"}, r"gap\.stage is tiny/base: ssr1: fps is 8, but 1 x base's 4"),
        ("tiny/ssr1", {}, {"stage": "tiny/tsrr"}, r"train\.gap: .*tiny/tsrr\.yaml.* Fix: train\.gap\.stage=tiny/tsr$"),
        ("tiny/tsr", {"fill": Fill.BLANK, "known": 0.3}, {"stage": "tiny/base"}, r"tsr\.known is 0\.3: no stage"),
        ("tiny/ssr1", {"fps": 6.0}, {"stage": "tiny/tsr"}, r"fps is 6, but 1 x tsr's 8 is 8.*Fix: train\.gap\.stage="),
        (
            "tiny/ssr1", {"shape": Shape(frames=7, height=64, width=64), "train": None}, {"stage": "tiny/tsr"},
            "tsr, which cannot: .*frames",
        ),
        (
            "tiny/ssr1", {}, {"stage": "tiny/tsr", "before": {"stage": "tiny/tsr"}},
            r"train\.gap\.before\.stage is tiny/tsr: tsr: fps is 8, but 2 x tsr's 8 is 16",
        ),
        (
            "tiny/tsr", {}, {"stage": "tiny/base", "before": {"stage": "tiny/base"}},
            r"train\.gap\.before is set, but base starts from text",
        ),
    ],
)  # fmt: skip
def test_what_does_not_come_before_is_refused_and_nothing_loads(name: str, changes: Any, before: Any, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        makers(parse(before, Before), *shipped(name, **changes), "train.gap", TextConfig())


CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "before", "why"),
    [
        (
            "lavie/vsr",
            {"stage": "lavie/interp"},
            r"gap\.stage is lavie/interp, which reads other text: its encoder is 'Co",
        ),
        ("lavie/interp", {"stage": "lavie/base"}, r"its negative is '', .* given 'None'\. Fix: train\.gap=null, or"),
        ("show1/interp", {"stage": "show1/base"}, None),
    ],
)
def test_a_stage_before_that_reads_other_text_is_refused_and_nothing_loads(
    name: str, before: Any, why: str | None
) -> None:
    after, rule = shipped(name)
    assert after.reads is not None
    if why is None:
        assert len(makers(parse(before, Before), after, rule, "train.gap", after.reads)) == 1
        return
    with pytest.raises(ConfigError, match=why):
        makers(parse(before, Before), after, rule, "train.gap", after.reads)


def test_a_stage_before_with_an_encoder_of_its_own_is_refused(tmp_path: Path) -> None:
    (tmp_path / "stage/mine").mkdir(parents=True)
    tsr = (package_root() / "conf/stage/tiny/tsr.yaml").read_text()
    (tmp_path / "stage/mine/tsr.yaml").write_text(tsr + "\nreads: {encoder: tiny/text, max_tokens: 32}\n")
    before = parse({"stage": "mine/tsr"}, Before)
    for tokens, refused in ((32, False), (48, True)):
        text = TextConfig(max_tokens=tokens, store="elsewhere")
        with pytest.raises(ConfigError, match="max_tokens is 32") if refused else nullcontext():
            makers(before, *shipped("tiny/ssr1"), "train.gap", text, tmp_path)
    own = shipped("tiny/ssr1", reads=TextConfig(max_tokens=32))
    with pytest.raises(ConfigError, match="max_tokens is 48, that of the text it would be given 32"):
        makers(parse({"stage": "tiny/tsr"}, Before), *own, "train.gap", TextConfig(max_tokens=32))


def test_a_stage_before_may_be_of_the_users_own_folder(tmp_path: Path) -> None:
    (tmp_path / "stage/mine").mkdir(parents=True)
    shutil.copy(package_root() / "conf/stage/tiny/tsr.yaml", tmp_path / "stage/mine/enlarger.yaml")
    words = ["stage=tiny/ssr1", "train.gap.stage=mine/enlarger", "train.gap.share=1", "train.pool=5"]
    words += ["data.shapes.two=0", "--config-dir", str(tmp_path)]
    (tree,) = cli.settings("stage", words)
    ask = request("ssr", {key: value for key, value in tree.items() if key != "task"})
    assert ask.config_dir == tmp_path and ask.training.gap is not None
    made, keys = imitation(gap_makers(ask.training, ask.cfg, ask.rule, ask.text, ask.config_dir), CPU)
    assert made is not None and made.stage.cfg.name == "tsr" and len(keys) == 1


def test_a_gap_says_what_share_and_needs_a_pool() -> None:
    for gap, pool, why in (
        ({"stage": "tiny/tsr"}, 5, r"gap\.share: is missing"),
        ({"stage": "tiny/tsr", "share": 0}, 5, "share is 0.0, expected more than 0"),
        ({"stage": "tiny/tsr", "share": 0.5}, 0, r"pool is 0.*Fix: set train\.pool to scenes such as 20000"),
    ):
        with pytest.raises(ConfigError, match=why):
            parse({"steps": 1, "batch": 1, "lr": 0.1, "pool": pool, "gap": gap}, TrainConfig, "train")


def test_a_pool_is_drawn_once_nothing_else_is_refused(train: Make, make_stage: Make, reader: T5Text) -> None:
    drawings: list[Pooled] = []

    def draw() -> Pooled:
        made = drawn(make_stage, reader, "tsr", steps=2, batch=2)
        drawings.append(replace(made, text=lambda index: encode_text([made.pool.captions[i] for i in index])))
        return drawings[-1]

    with pytest.raises(ConfigError, match="fp16"):
        train("out", pool=draw, precision="fp16")
    train("out", pool=draw, steps=2)
    assert len(drawings) == 1
    train("out", pool=draw, steps=2)  # it is over
    with pytest.raises(ConfigError, match="other settings"):
        train("out", pool=draw, steps=2, lr=2e-3)
    assert len(drawings) == 1
    made, _ = pool_of(make_stage("tsr"), World(ShapesConfig()), reader, drawings[0].cfg)
    assert made is not None and made() is made()


def test_no_single_frame_comes_in_as_the_stage_before_makes_clips(make_stage: Make, reader: T5Text) -> None:
    gap = Gap(stage="tiny/tsr", share=1.0)
    pool = replace(drawn(make_stage, reader, "ssr", images=1.0, gap=gap), before=Gray())
    assert bool(pool.step(0).cond.concat.any())


class Gray:
    """A stage before that makes gray clips."""

    def __call__(self, video: Video, text: Text, rng: torch.Generator) -> Video:
        return Video(torch.zeros_like(video.frames), video.fps)
