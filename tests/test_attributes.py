from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from cascade.data.captions import Spec, parse
from cascade.data.scenes import Body, Scene, draw_scene, draw_spec, numpy_generator
from cascade.data.shapes import render
from cascade.metrics.attributes import KEYS, accuracy, judge, measure

OPPOSITE = {
    "moves left": "moves right",
    "moves up": "moves down",
    "grows": "shrinks",
    "circles clockwise": "circles counterclockwise",
}
OPPOSITE |= {b: a for a, b in OPPOSITE.items()}


def clips(count: int, two: float = 0.0, size: int = 32) -> tuple[Tensor, list[Spec]]:
    out, specs = [], []
    for i in range(count):
        rng = numpy_generator("metric", i)
        specs.append(draw_spec(rng, two, "all"))
        out.append(film(draw_scene(specs[-1], rng), size))
    return torch.stack(out), specs


def film(scene: Scene, size: int = 32, frames: int = 8, fps: float = 4) -> Tensor:
    return torch.from_numpy(render(scene, frames, size, size, fps)).permute(3, 0, 1, 2)


def test_rendered_truth_is_read_right() -> None:
    right = accuracy(*clips(200))
    assert all(right[key] >= 0.99 for key in KEYS), right


@pytest.mark.parametrize(("size", "frames", "fps"), [(64, 16, 8), (128, 31, 16)])
def test_rendered_truth_is_read_right_at_the_sizes_of_the_chain(size: int, frames: int, fps: float) -> None:
    for i in range(6):
        rng = numpy_generator("large", i)
        spec = draw_spec(rng, 0.0, "all")
        assert judge(film(draw_scene(spec, rng), size, frames, fps)[None], [spec])["all"].item()


def test_two_things_are_told_apart() -> None:
    right = accuracy(*clips(30, two=1.0))
    assert all(right[key] >= 0.95 for key in KEYS), right


def test_blur_and_noise_are_forgiven() -> None:
    frames, specs = clips(20, size=48)
    soft = torch.nn.functional.avg_pool3d(frames, (1, 3, 3), 1, (0, 1, 1), count_include_pad=False)
    noisy = soft + 0.1 * torch.randn(soft.shape, generator=torch.Generator().manual_seed(0))
    right = accuracy(noisy, specs)
    assert all(right[key] >= 0.9 for key in KEYS), right


def test_a_reversed_clip_moves_the_other_way() -> None:
    frames, specs = clips(40)
    for seen, spec in zip(measure(frames.flip(2)), specs, strict=True):
        motion = spec.things[0].motion
        assert seen.things[0].motion == OPPOSITE.get(motion, motion)


def test_a_frozen_clip_stands_still() -> None:
    frames, specs = clips(30)
    frozen = frames[:, :, :1].expand_as(frames)
    assert all(seen.things[0].motion == "stands still" for seen in measure(frozen))
    right = judge(frozen, specs)["motion"]
    assert right.tolist() == [spec.things[0].motion == "stands still" for spec in specs]


def test_another_hue_is_another_colour() -> None:
    frames, specs = clips(40)
    coloured = [i for i, spec in enumerate(specs) if spec.things[0].colour != "white"]
    turned = frames[coloured].roll(1, dims=1)
    assert not judge(turned, [specs[i] for i in coloured])["colour"].any()


def test_a_blank_clip_shows_nothing_but_its_background() -> None:
    blank = torch.full((1, 3, 8, 32, 32), -1.0)
    assert measure(blank)[0].things == () and measure(blank)[0].background == "black"
    right = judge(blank, [parse("a large red circle moves left on a black background")])
    assert [key for key in KEYS if right[key].item()] == ["background"]


def test_noise_shows_nothing() -> None:
    frames = torch.rand(3, 3, 8, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    specs = [parse("a large red circle moves left on a black background")] * 3
    right = judge(frames, specs)
    assert not right["shape"].any() and not right["motion"].any() and not right["all"].any()


def test_jumps_and_absences_are_no_motion() -> None:
    spec = parse("a large red circle moves left on a black background")
    still = Scene(spec, (Body((1, 0, 0), 0.4, 0.4, (0.7, 0.5)),), (0, 0, 0))
    there = film(replace(still, bodies=(replace(still.bodies[0], centre=(0.3, 0.5)),)))
    jump = torch.cat([film(still)[:, :4], there[:, 4:]], dim=1)
    moves = film(replace(still, bodies=(replace(still.bodies[0], centre=(0.5, 0.5), travel=(-0.45, 0)),)))
    gone = moves.clone()
    gone[:, 3:6] = -1
    right = judge(torch.stack([moves, jump, gone, moves.transpose(2, 3)]), [spec] * 4)
    assert right["motion"].tolist() == [True, False, False, False]
    assert right["shape"].all()


def test_a_second_thing_is_counted() -> None:
    two = parse("a small blue square moves up and a large white ring stands still on a gray background")
    one = Spec(two.things[1:], two.background)
    scene = draw_scene(two, numpy_generator("count"))
    right = judge(torch.stack([film(scene)] * 2), [two, one])
    assert right["count"].tolist() == right["all"].tolist() == [True, False]
    alone = judge(film(replace(scene, spec=one, bodies=scene.bodies[1:]))[None], [two])
    assert not any(alone[key].item() for key in ("colour", "shape", "motion", "count", "all"))
