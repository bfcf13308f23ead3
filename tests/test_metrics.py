from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cascade import checkpoint
from cascade.data.shapes import ShapesConfig, sample
from cascade.errors import InputError
from cascade.metrics import completion, consistency, drift, features, fid, fidelity, fvd, known, motion, seam
from cascade.noise import generator
from cascade.video import Shape, resize, spread


def normal(shape: torch.Size | tuple[int, ...], key: str) -> Tensor:
    return torch.randn(shape, generator=generator("test", key))


def films(count: int, purpose: str, shape: Shape = features.INPUT, fps: float = 4.0) -> Tensor:
    world = ShapesConfig(two=0.0, split="all")
    return torch.stack([sample(world, shape, fps, "test", purpose, i)[0] for i in range(count)])


def dot(x: float, y: float, size: int = 32, radius: float = 4) -> Tensor:
    """A white disc on black, (3, H, W), its centre in sides."""
    grid = torch.arange(size) + 0.5
    inside = (grid[None] - x * size) ** 2 + (grid[:, None] - y * size) ** 2 < radius**2
    return (inside.float() * 2 - 1).expand(3, -1, -1)


def path(*places: tuple[float, float], size: int = 32) -> Tensor:
    return torch.stack([dot(x, y, size, size / 8) for x, y in places], 1)[None]


def nothing_known(frames: Tensor) -> Tensor:
    return torch.zeros(len(frames), frames.shape[2], dtype=torch.bool)


# fidelity


def test_psnr_of_an_offset_is_its_closed_form() -> None:
    truth = normal((3, 3, 4, 16, 16), "psnr").clamp(-1, 1)
    offset = torch.tensor([0.02, 0.1, 0.0]).view(-1, 1, 1, 1, 1)
    found = fidelity.psnr(truth + offset, truth).tolist()
    assert found == pytest.approx([40.0, 20 * math.log10(20), fidelity.CEILING], abs=1e-3)


def test_pooled_psnr_is_that_of_all_clips_as_one() -> None:
    from torchmetrics.functional.image import peak_signal_noise_ratio

    truth = films(5, "pooled")
    frames = truth + torch.linspace(0.01, 0.5, 5).view(-1, 1, 1, 1, 1) * normal(truth.shape, "pooled")
    expected = float(peak_signal_noise_ratio(frames, truth, data_range=2.0))
    assert fidelity.pooled(fidelity.psnr(frames, truth)) == pytest.approx(expected, abs=1e-3)


def test_a_clip_that_rests_does_not_rule_the_total() -> None:
    values = {"psnr": torch.tensor([40.0, 40.0]), "psnr_repetition": torch.tensor([100.0, 30.0]), "ssim": torch.ones(2)}
    total = fidelity.total(values)
    assert total["psnr"] == pytest.approx(40) and total["psnr_repetition"] == pytest.approx(33.01, abs=0.01)
    assert total["gain_repetition"] == pytest.approx(6.99, abs=0.01) and total["nearer_than_repetition"] == 0.5


def test_ssim_is_one_for_equal_clips_and_falls_with_noise() -> None:
    truth = films(1, "ssim").repeat(3, 1, 1, 1, 1)
    noisy = truth + torch.tensor([0.0, 0.1, 0.5]).view(-1, 1, 1, 1, 1) * normal(truth.shape, "ssim")
    one, high, low = fidelity.ssim(noisy, truth)
    assert one == pytest.approx(1, abs=1e-5) and 1 > high > low > -1


def test_ssim_of_plain_pictures_is_the_papers_of_pixels_from_0_on() -> None:
    """Wang et al. 2004, eq. 13, with L = 1: without deviations only the means are left."""
    black, gray = torch.full((1, 3, 2, 16, 16), -1.0), torch.zeros(1, 3, 2, 16, 16)
    c = 0.01**2
    for truth, x in ((black, 0.0), (gray, 0.5)):
        y = x + 0.02
        expected = (2 * x * y + c) / (x * x + y * y + c)
        assert float(fidelity.ssim(truth + 0.04, truth)) == pytest.approx(expected, abs=1e-4)
    assert "[0, 1]" in fidelity.about()["ssim"]


def test_only_the_frames_that_were_not_given_are_judged() -> None:
    truth = films(2, "given")
    low, rate = truth[:, :, ::2], 2
    given = torch.arange(8) % rate == 0
    broken = torch.where(given.view(1, 1, -1, 1, 1), -truth, truth)
    got = fidelity.judge(broken, truth, low, given.expand(2, -1), rate)
    assert (got["psnr"] == fidelity.CEILING).all()
    none = fidelity.judge(truth, truth, low, torch.ones(2, 8, dtype=torch.bool), rate)
    assert all(value.isnan().all() for value in none.values())


@pytest.mark.parametrize(("frames", "rate", "size"), [(8, 2, 32), (7, 2, 32), (10, 3, 32), (4, 1, 64)])
def test_a_stage_that_is_a_baseline_gains_nothing(frames: int, rate: int, size: int) -> None:
    truth = films(1, "baseline", Shape(frames=frames, height=size, width=size), 8.0)
    low = resize(truth[:, :, ::rate], 32, 32)
    rivals = fidelity.baselines(low, rate, truth)
    assert set(rivals) == ({"bicubic"} if rate == 1 else {"repetition", "blending"})
    marks = (torch.arange(frames) % rate == 0)[None] if rate > 1 else nothing_known(truth)
    for name, rival in rivals.items():
        assert rival.shape == truth.shape
        got = fidelity.total(fidelity.judge(rival, truth, low, marks, rate))
        assert got[f"gain_{name}"] == 0 == got[f"nearer_than_{name}"] and got[f"psnr_{name}"] == got["psnr"]


def test_blending_is_exact_on_a_linear_ramp_and_repetition_holds() -> None:
    ramp = torch.linspace(-1, 1, 9).view(1, 1, -1, 1, 1).expand(1, 3, -1, 16, 16)
    rivals = fidelity.baselines(ramp[:, :, ::2], 2, ramp)
    torch.testing.assert_close(rivals["blending"], ramp)
    assert torch.equal(rivals["repetition"][:, :, 1::2], ramp[:, :, 0:-1:2])


# consistency, known


@pytest.mark.parametrize(("frames", "rate"), [(4, 1), (8, 2), (7, 2)])
def test_a_clip_is_consistent_with_its_own_small_version(frames: int, rate: int) -> None:
    high = films(2, "consistency", Shape(frames=frames, height=32, width=32), 8.0)
    low = resize(high[:, :, ::rate], 16, 16)
    assert (consistency.judge(high, low, rate)["psnr"] == fidelity.CEILING).all()
    other = consistency.judge(high.flip(0), low, rate)["psnr"]
    assert (other < 40).all()


def test_known_error_is_the_largest_difference_on_known_frames_alone() -> None:
    low = films(2, "known")[:, :, ::2]
    given, mask = spread(low, 2, 8)
    marks = mask > 0
    frames = given + ~marks * 0.5
    assert known.judge(frames, given, marks)["error"].tolist() == [0, 0]
    frames[1, 2, 4, 7, 3] += 0.25
    assert known.judge(frames, given, marks)["error"].tolist() == [0, 0.25]
    pixels = marks.repeat(1, 1, 1, *frames.shape[3:])
    pixels[1, :, 4, 7, 3] = False
    assert known.judge(frames, given, pixels)["error"].tolist() == [0, 0]
    assert known.judge(frames, given, marks & False)["error"].isnan().all()


# completion


def test_fills_are_what_is_given_their_blend_and_the_usual_colour() -> None:
    truth = torch.linspace(-1, 1, 9).view(1, 1, -1, 1, 1).expand(1, 3, -1, 4, 4)
    mask = torch.zeros(1, 1, 9, 1, 1, dtype=torch.bool)
    mask[:, :, [2, 6]] = True
    full = mask.expand(-1, -1, -1, 4, 4).clone()
    full[..., 0, 0] = False
    rivals = completion.fills(truth * mask, full)
    inner = (..., slice(2, 7), slice(1, 4), slice(None))
    torch.testing.assert_close(rivals["blending"][inner], truth[inner])
    assert torch.equal(rivals["repetition"][..., :6, 1, 1], truth[..., 2:3, 1, 1].expand(1, 3, 6))
    assert torch.equal(rivals["blending"][..., 7:, 1, 1], truth[..., 6:7, 1, 1].expand(1, 3, 2))
    assert torch.equal(rivals["blending"][..., 0, 0], truth[..., 2, 0, 0][..., None].expand(1, 3, 9))


def test_completion_judges_only_what_was_not_given() -> None:
    truth = films(2, "completion")
    mask = torch.zeros(2, 1, 8, 32, 32, dtype=torch.bool)
    mask[0, :, :, :16] = True
    mask[1] = True
    got = completion.judge(truth - 0.1 * ~mask - 0.7 * mask, truth, truth * mask, mask)
    assert float(got["psnr"][0]) == pytest.approx(20 * math.log10(20), abs=1e-3)
    assert got["psnr"][1].isnan()
    exact = completion.fills(truth * mask, mask)["blending"]
    assert torch.equal(got["psnr_blending"][:1], completion.judge(exact, truth, truth * mask, mask)["psnr"][:1])


# motion


def test_the_centroid_of_a_disc_is_its_centre() -> None:
    places = [(0.3, 0.5), (0.5, 0.25), (0.7, 0.75)]
    found, seen = motion.centroids(path(*places))
    torch.testing.assert_close(found[0], torch.tensor(places), atol=0.01, rtol=0)
    assert seen.all()


def test_path_error_is_the_distance_in_sides_at_any_size_and_aspect() -> None:
    truth = path((0.3, 0.5), (0.5, 0.5), (0.7, 0.5), size=64)
    late = path((0.3, 0.4), (0.5, 0.4), (0.7, 0.4), size=64)
    marks = nothing_known(truth)
    assert motion.judge(late, truth, marks)["path"].item() == pytest.approx(0.1, abs=0.01)
    wide = [torch.nn.functional.pad(clip, (16, 16), value=-1) for clip in (late, truth)]
    assert motion.judge(*wide, marks)["path"].item() == pytest.approx(0.1, abs=0.01)
    assert motion.judge(truth, truth, marks)["path"].item() == 0


def test_path_error_of_given_frames_a_lost_thing_and_an_empty_truth() -> None:
    truth, blank = path((0.3, 0.5), (0.5, 0.5)), torch.full((1, 3, 2, 32, 32), -1.0)
    first = torch.tensor([[True, False]])
    assert motion.judge(blank, truth, first)["path"].item() == motion.LOST
    assert motion.judge(truth, blank, nothing_known(truth))["path"].isnan().all()
    wrong = truth.clone()
    wrong[:, :, 0] = blank[:, :, 0]
    assert motion.judge(wrong, truth, first)["path"].item() == 0


def test_flicker_is_seen_where_the_truth_rests_and_nowhere_else() -> None:
    truth = path((0.3, 0.5), (0.5, 0.5), (0.7, 0.5), (0.7, 0.3))
    marks = nothing_known(truth)
    assert motion.judge(truth, truth, marks)["flicker"].item() == 0
    flash = torch.tensor([0, 0.2, 0, 0.2]).view(1, 1, -1, 1, 1)
    assert motion.judge(truth + flash, truth, marks)["flicker"].item() == pytest.approx(0.2, abs=1e-4)
    moving = truth.diff(dim=2, prepend=truth[:, :, :1]).abs() > 0
    assert motion.judge(truth - moving * 0.1, truth, marks)["flicker"].item() < 0.05


# seam, drift


def test_a_seam_is_the_change_at_borders_over_that_of_steps_of_the_same_phase() -> None:
    ramp = torch.linspace(-0.5, 0.5, 16).view(1, 1, -1, 1, 1).expand(2, 3, -1, 4, 4)
    borders = [6, 10]
    assert seam.total(seam.judge(ramp, ramp, borders, 1)) == pytest.approx({"seam": 1, "truth": 1})
    jump = ramp.clone()
    jump[:, :, 6:10] += 2 / 15  # two steps of the ramp: up before frame 6, down before frame 10
    assert seam.total(seam.judge(jump, ramp, borders, 1)) == pytest.approx({"seam": 2, "truth": 1})  # (3 + 1) / 2
    pairs = ramp[:, :, torch.arange(16) // 2 * 2]  # as repetition: every other step is none
    assert seam.total(seam.judge(pairs, ramp, borders, 2))["seam"] == pytest.approx(1)
    assert seam.total(seam.judge(pairs, ramp, borders, 1))["seam"] > 2


def test_still_clips_and_borders_alone_have_no_seam() -> None:
    still = films(1, "seam")[:, :, :1].expand(-1, -1, 8, -1, -1)
    assert seam.total(seam.judge(still, still, [4], 1)) == {}
    moving = torch.linspace(-1, 1, 3).view(1, 1, -1, 1, 1).expand(1, 3, -1, 4, 4)
    assert seam.judge(moving, moving, [1, 2], 1)["interior"].isnan().all()


def test_drift_is_of_colour_and_contrast_and_not_of_motion() -> None:
    walk = path(*[(0.3 + 0.05 * i, 0.5) for i in range(8)])
    assert drift.drift(walk).item() < 0.005
    fade = torch.linspace(0, 1, 8).view(1, 1, -1, 1, 1)
    brighter, flatter = walk + 0.2 * fade, walk * (1 - 0.5 * fade)
    assert drift.drift(brighter).item() == pytest.approx(0.2 * 13 / 14 / 2, abs=0.005)  # means move, deviations stay
    assert drift.drift(flatter).item() > 0.05
    both = drift.judge(torch.cat([brighter, walk]), torch.cat([walk, walk]))
    assert both["drift"][0] > 10 * both["truth"][0] and both["drift"][1] == both["truth"][1]
    assert drift.drift(walk[:, :, :1]).item() == 0


# the Fréchet distance


def test_frechet_distance_of_normal_samples_has_its_closed_form() -> None:
    d, n = 8, 200_000
    a = torch.randn(n, d, generator=generator("a"), dtype=torch.float64)
    b = torch.randn(n, d, generator=generator("b"), dtype=torch.float64)
    shift = torch.linspace(0, 2, d, dtype=torch.float64)
    assert fvd.frechet(a, b + shift) == pytest.approx(float(shift.square().sum()), rel=0.01)
    scale = torch.linspace(0.5, 2, d, dtype=torch.float64)
    assert fvd.frechet(a, b * scale) == pytest.approx(float((scale - 1).square().sum()), rel=0.01)


def test_frechet_distance_is_exact_where_covariances_are_known() -> None:
    # The rows +-e_i sqrt(11 / 2) have mean 0 and covariance 1 exactly, so nothing is left to chance.
    eye = torch.eye(6, dtype=torch.float64)
    unit = torch.cat([eye, -eye]) * math.sqrt(11 / 2)
    scale, shift = torch.arange(1, 7, dtype=torch.float64), torch.full((6,), 3.0, dtype=torch.float64)
    expected = 54 + float((scale - 1).square().sum())
    assert fvd.frechet(unit, unit * scale + shift) == pytest.approx(expected, rel=1e-12)
    turn = torch.linalg.qr(torch.randn(6, 6, generator=generator("turn"), dtype=torch.float64)).Q
    assert fvd.frechet(unit @ turn, (unit * scale + shift) @ turn) == pytest.approx(expected, rel=1e-12)
    assert fvd.frechet(unit * scale, unit) == pytest.approx(fvd.frechet(unit, unit * scale), rel=1e-12)
    assert fvd.frechet(unit, unit) == pytest.approx(0, abs=1e-9)


def test_frechet_distance_survives_fewer_clips_than_dimensions() -> None:
    few = torch.randn(5, 32, generator=generator("few"))
    assert fvd.frechet(few, few) == pytest.approx(0, abs=1e-4)
    assert fvd.frechet(few, few + 1) == pytest.approx(32, rel=1e-5)


def test_kernel_distance_is_unbiased_and_sees_a_shift() -> None:
    rows = [torch.randn(400, 16, generator=generator("kernel", i)) for i in range(20)]
    null = torch.tensor([fvd.kernel(a[:12], b[:12]) for a, b in zip(rows[::2], rows[1::2], strict=True)])
    assert abs(null.mean()) < 3 * null.std() / 10**0.5 and (null < 0).any()
    assert fvd.kernel(rows[0], rows[1] + 1) > 20 * abs(fvd.kernel(rows[0], rows[1]))
    assert fvd.kernel(torch.ones(2, 3), torch.zeros(2, 3)) == pytest.approx(8 + 1 - 2)  # (1 + 1)^3, 1 within; 1 across


def test_kernel_distance_of_pairs_and_of_several_frames_of_a_clip_is_unbiased() -> None:
    rows = torch.randn(50, 12, 8, generator=generator("pairs"))
    paired = torch.tensor([fvd.kernel(row, row + 1e-3) for row in rows])
    assert paired.abs().max() < 0.05
    clips = 2 * torch.randn(200, 2, 6, 1, 8, generator=generator("clips"))
    alike = clips + 0.1 * torch.randn(200, 2, 6, 3, 8, generator=generator("frames"))
    null = torch.tensor([fvd.kernel(a, b) for a, b in alike])
    assert abs(null.mean()) < 3 * null.std() / 200**0.5
    apart = torch.tensor([fvd.kernel(a.flatten(0, 1), b.flatten(0, 1)) for a, b in alike])
    assert apart.mean() > 3 * apart.std() / 200**0.5  # frames taken for clips


# the feature network


@pytest.mark.parametrize(
    ("frames", "wanted"),
    [
        (8, range(8)),
        (16, range(0, 16, 2)),
        (31, range(0, 29, 4)),
        (9, range(8)),
        (3, [0, 0, 0, 1, 1, 1, 2, 2]),
        (1, [0] * 8),
    ],
)
def test_eight_frames_evenly_spaced(frames: int, wanted: range | list[int]) -> None:
    clip = torch.linspace(-1, 1, frames).view(1, 1, -1, 1, 1).expand(1, 3, -1, 32, 32)
    assert torch.equal(features.prepare(clip), clip[:, :, list(wanted)])


def test_the_same_film_has_the_same_features_at_every_size_of_the_chain() -> None:
    small = films(16, "sizes")
    one = features.extract(small)
    large = features.extract(films(16, "sizes", Shape(frames=31, height=64, width=64), 16.0))
    assert (one - large).square().mean() < 0.1 * (one - one.roll(1, 0)).square().mean()


def test_a_clip_has_its_features_whatever_stands_beside_it(one_thread: None) -> None:
    clips = films(6, "beside")
    torch.testing.assert_close(features.extract(clips, batch=6), features.extract(clips, batch=1), atol=1e-4, rtol=0)


def test_the_network_knows_the_world_and_its_features_are_normalised() -> None:
    net, _ = features.shipped()
    right = features.accuracy(net, seed=1, count=300)
    assert all(share >= 0.98 for share in right.values()), right
    found = features.extract(films(300, "normalised"))
    assert found.mean(0).abs().max() < 0.3 and (found.std(0) - 1).abs().max() < 0.3


def test_what_is_wrong_with_clips_raises_their_distance() -> None:
    """The order of systems.md's testbed: a measure that does not see these is no measure."""
    n = 256
    real, other = films(n, "real"), films(n, "other")
    truth = features.extract(real)
    floor = fvd.frechet(features.extract(other), truth)
    shuffle = torch.stack([torch.randperm(8, generator=generator("shuffle", i)) for i in range(n)])
    wrong = {
        "shuffled": torch.stack([clip[:, order] for clip, order in zip(other, shuffle, strict=True)]),
        "frozen": other[:, :, :1].expand_as(other),
        "colour": other.roll(1, dims=1),
        "noise": normal(other.shape, "noise").clamp(-1, 1),
    }
    distance = {name: fvd.frechet(features.extract(clips), truth) for name, clips in wrong.items()}
    # Rolled channels are mostly colours of the world again, only in other shares.
    least = {"shuffled": 5, "frozen": 5, "colour": 2, "noise": 5}
    assert all(distance[name] > times * floor for name, times in least.items()), (floor, distance)
    slight = other + 0.05 * normal(other.shape, "slight")
    assert fvd.frechet(features.extract(slight), truth) < min(distance.values())


def test_the_totals_state_what_they_depend_on() -> None:
    clips = films(4, "total")
    values = fvd.judge(clips, clips)
    assert fvd.total(values)["fvd"] == pytest.approx(0, abs=1e-6)
    assert fvd.total({name: part[:1] for name, part in values.items()}) == {}
    assert set(fvd.about()) >= {"features", "dimensions", "input", "filter"}


def test_a_frame_has_its_features_wherever_it_stands_and_wrong_pictures_are_seen() -> None:
    clips, other = films(64, "real"), films(64, "other")
    found = fid.extract(clips)
    assert found.shape == (64, fid.FRAMES, features.DIMENSIONS)
    torch.testing.assert_close(found.flip(1), fid.extract(clips[:, :, [6, 4, 2, 0]]), atol=1e-3, rtol=1e-3)
    frozen = other[:, :, [0]].expand_as(other)
    floor, still, colour = (
        fid.total(fid.judge(made, clips))["fid"] for made in (other, frozen, (other * 0.3).roll(1, dims=1))
    )
    assert still < 1.5 * floor and colour > 2 * floor  # what a frame shows alone
    assert fid.total({name: part[:1] for name, part in fid.judge(clips[:2], clips[:2]).items()}) == {}
    assert "still clip" in fid.about()["input"]


def test_training_is_repeatable_and_its_weights_are_checked(tmp_path: Path, one_thread: None) -> None:
    features.fit(tmp_path / "a", steps=2, size=4, validate=8)
    features.fit(tmp_path / "b", steps=2, size=4, validate=8)
    first, second = (features.load(tmp_path / name) for name in ("a", "b"))
    assert first[1] == second[1]
    state = checkpoint.load(tmp_path / "a").state
    checkpoint.save(tmp_path / "c", state, {"kind": "base"})
    with pytest.raises(InputError, match="not those of this feature network"):
        features.load(tmp_path / "c")
