"""Laws of the pool: the same world as one scene at a time, whatever part, batch or number of processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time

import pytest
import torch

from cascade.data.captions import say
from cascade.data.pool import Part, Pool
from cascade.data.scenes import draw_scene, draw_spec, numpy_generator
from cascade.data.shapes import ShapesConfig, render
from cascade.noise import generator
from cascade.video import Shape

WORLD = ShapesConfig(two=0.5, split="train")
WHOLE = Shape(frames=8, height=24, width=40)


@pytest.fixture(scope="module")
def pool() -> Pool:
    return Pool.draw(WORLD, 60, "pool", 3)


def film(number: int, shape: Shape, fps: float) -> tuple[torch.Tensor, str]:
    rng = numpy_generator("pool", 3, number)
    spec = draw_spec(rng, WORLD.two, WORLD.split)
    caption = say(spec, rng)
    frames = render(draw_scene(spec, rng, WORLD.seconds), shape.frames, shape.height, shape.width, fps)
    return torch.from_numpy(frames).permute(3, 0, 1, 2), caption


def test_a_batch_shows_what_one_scene_at_a_time_shows(pool: Pool) -> None:
    index = torch.arange(60)
    made = pool.render(index, Part(WHOLE, WHOLE, torch.zeros(60, 3)), 4)
    for i in range(60):
        frames, caption = film(i, WHOLE, 4)
        assert pool.captions[i] == caption
        assert (made[i] - frames).abs().max() < 1e-3  # float32 positions here, float64 there


def test_a_part_is_a_part_of_the_whole(pool: Pool) -> None:
    index = torch.tensor([7, 7, 30])
    whole = pool.render(index, Part(WHOLE, WHOLE, torch.zeros(3, 3)), 4)
    size, start = Shape(frames=3, height=9, width=11), torch.tensor([[2, 4, 20], [0, 0, 0], [5, 15, 29]])
    parts = pool.render(index, Part(WHOLE, size, start), 4)
    for clip, part, (f, y, x) in zip(whole, parts, start.tolist(), strict=True):
        assert torch.allclose(clip[:, f : f + 3, y : y + 9, x : x + 11], part, atol=1e-4)


def test_processes_change_nothing_and_do_not_hear_ctrl_c(pool: Pool, capfd: pytest.CaptureFixture[str]) -> None:
    def interrupt() -> None:
        while not (workers := multiprocessing.active_children()):
            time.sleep(0.01)
        for delay in (0.2, 0.6):  # while they start, and later
            time.sleep(delay)
            for worker in workers:
                os.kill(worker.pid or 0, signal.SIGINT)

    ctrl_c = threading.Thread(target=interrupt, daemon=True)
    ctrl_c.start()
    many = Pool.draw(WORLD, 1001, "pool", 3, workers=2)
    ctrl_c.join()
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
    assert "KeyboardInterrupt" not in capfd.readouterr().err
    assert many.captions[:60] == pool.captions and torch.equal(many.bodies[:60], pool.bodies)
    assert torch.equal(many.shapes[:60], pool.shapes) and len(many) == 1001


def test_the_part_with_most_contrast_is_taken(pool: Pool) -> None:
    index, size = torch.arange(40), Shape(frames=4, height=8, width=8)
    one = pool.clips(index, WHOLE, 4, generator("crops"), size, 1, 1).frames
    best = pool.clips(index, WHOLE, 4, generator("crops"), size, 6, 1).frames
    assert one.shape == best.shape == (40, 3, 4, 8, 8)
    contrast = [clips.flatten(1).std(1) for clips in (one, best)]
    assert (contrast[1] >= contrast[0]).all() and contrast[1].mean() > 1.5 * contrast[0].mean()


def test_single_frames_are_of_all_times(pool: Pool) -> None:
    still = Shape(frames=1, height=24, width=24)
    moving = [i for i, caption in enumerate(pool.captions) if "moves" in caption][:1] * 40
    frames = pool.clips(torch.tensor(moving), still, 4, generator("times"), None, 1, 1).frames
    assert frames.flatten(1).unique(dim=0).shape[0] == 40
