"""The networks of the papers' measures: against formulas always, against their sources where they have been fetched.

The numbers of the sources were computed on `film` by their own code: I3D and LPIPS in Flax, Inception in TorchScript.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cascade import assets
from cascade.data.shapes import ShapesConfig, sample
from cascade.evaluation.exam import measures
from cascade.metrics import i3d, inception, lpips
from cascade.noise import generator
from cascade.video import Shape


def film(frames: int, size: int) -> Tensor:
    """Waves of another direction in each colour, (1, 3, F, S, S): the same picture at every size."""
    f, y, x, c = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (frames, size, size, 3)), indexing="ij")
    x, y = x * 64 / size, y * 64 / size
    wave = torch.sin(0.5 * f + 0.13 * (c + 1) * x + 0.21 * y * (1 - 0.3 * c))
    return wave.permute(3, 0, 1, 2)[None].float()


def films(count: int, purpose: str, shape: Shape) -> Tensor:
    world = ShapesConfig(two=0.0, split="all")
    return torch.stack([sample(world, shape, 8.0, "test", purpose, i)[0] for i in range(count)])


def random_state(module: torch.nn.Module) -> dict[str, Tensor]:
    """Weights that keep the size of what goes through, keyed by their names."""
    state = {}
    for name, tensor in module.state_dict().items():
        fan = math.prod(tensor.shape[1:]) if tensor.ndim > 1 else 100
        state[name] = torch.randn(tensor.shape, generator=generator("weights", name)) * (2 / fan) ** 0.5
    return state


def real(module: Any, name: str) -> Any:
    if module.absent():
        pytest.skip(module.absent())
    return module.fetched(assets.folder())[0]


def test_the_measures_are_found() -> None:
    assert {"i3d", "inception", "lpips", "fid", "seam", "drift"} <= set(measures())


# I3D


def test_same_padding_is_tensorflows() -> None:
    x = torch.arange(1.0, 7).view(1, 1, 1, 1, 6)
    assert i3d.same(x, (1, 1, 3), (1, 1, 2)).flatten().tolist() == [1, 2, 3, 4, 5, 6, 0]  # the odd zero at the end
    assert i3d.same(x, (1, 1, 7), (1, 1, 2)).flatten().tolist() == [0, 0, 1, 2, 3, 4, 5, 6, 0, 0, 0]
    assert i3d.same(x[..., :5], (1, 1, 3), (1, 1, 2)).flatten().tolist() == [0, 1, 2, 3, 4, 5, 0]
    assert i3d.same(x, (1, 1, 1), (1, 1, 2)).flatten().tolist() == [1, 2, 3, 4, 5, 6]
    for size in range(8, 20):
        for kernel, stride in ((7, 2), (3, 2), (3, 1), (2, 2)):
            padded = i3d.same(torch.zeros(1, 1, size, 1, 1), (kernel, 1, 1), (stride, 1, 1)).shape[2]
            assert (padded - kernel) // stride + 1 == -(-size // stride)


def functional_i3d(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """The network written out as TensorFlow's SAME rule has it, branch by branch."""

    def padded(x: Tensor, k: tuple[int, ...], s: tuple[int, ...], value: float) -> Tensor:
        pads = [max((math.ceil(n / s[i]) - 1) * s[i] + k[i] - n, 0) for i, n in enumerate(x.shape[2:])]
        return F.pad(x, [side for total in reversed(pads) for side in (total // 2, total - total // 2)], value=value)

    def unit(x: Tensor, name: str, step: int = 1) -> Tensor:
        w = p[f"{name}.weight"]
        x = padded(x, tuple(w.shape[2:]), (step,) * 3, 0.0)
        return F.conv3d(x, w, p[f"{name}.bias"], stride=step).clamp(min=0)

    def pool(x: Tensor, k: tuple[int, int, int], s: tuple[int, int, int]) -> Tensor:
        return F.max_pool3d(padded(x, k, s, -math.inf), k, s)

    def mixed(x: Tensor, name: str) -> Tensor:
        first = unit(x, f"{name}.0.0")
        second = unit(unit(x, f"{name}.1.0"), f"{name}.1.1")
        third = unit(unit(x, f"{name}.2.0"), f"{name}.2.1")
        return torch.cat([first, second, third, unit(pool(x, (3, 3, 3), (1, 1, 1)), f"{name}.3.1")], 1)

    x = pool(unit(x, "conv3d_1a_7x7", 2), (1, 3, 3), (1, 2, 2))
    x = pool(unit(unit(x, "conv3d_2b_1x1"), "conv3d_2c_3x3"), (1, 3, 3), (1, 2, 2))
    x = pool(mixed(mixed(x, "mixed_3b"), "mixed_3c"), (3, 3, 3), (2, 2, 2))
    for name in "bcdef":
        x = mixed(x, f"mixed_4{name}")
    x = pool(x, (2, 2, 2), (2, 2, 2))
    x = F.avg_pool3d(mixed(mixed(x, "mixed_5b"), "mixed_5c"), (2, 7, 7), 1)
    return F.conv3d(x, p["logits.weight"], p["logits.bias"]).mean((2, 3, 4))


@torch.no_grad()
def test_i3d_is_its_formula() -> None:
    net = i3d.I3D()
    state = random_state(net)
    net.load_state_dict(state)
    assert sum(p.numel() for p in net.parameters()) == 12_689_984  # the published 12.7 M less its normalisations' means
    clip = film(9, 224)  # the fewest frames
    found = net(clip)
    assert found.shape == (1, 400) and found.std() > 0.01
    torch.testing.assert_close(found, functional_i3d(clip, state), atol=1e-4, rtol=1e-4)


def test_i3d_gets_sixteen_frames_of_its_size() -> None:
    for frames, wanted in ((16, range(16)), (31, range(0, 31, 2)), (8, [f // 2 for f in range(16)])):
        ramp = torch.linspace(-1, 1, frames).view(1, 1, -1, 1, 1).expand(2, 3, -1, 20, 30)
        got = i3d.prepare(ramp)
        assert got.shape == (2, 3, 16, 224, 224)
        torch.testing.assert_close(got[0, 0, :, 100, 100], ramp[0, 0, list(wanted), 0, 0])
    large = film(16, 448)
    assert i3d.prepare(large).abs().max() <= 1


def test_i3d_equals_its_source() -> None:
    found = i3d.extract(film(16, 224), real(i3d, "i3d"))[0]
    source = [3.8220438, 9.0959635, 7.0618649, 6.4917522, -1.4837328, 7.4258971, 0.2489446, -6.2338524]
    torch.testing.assert_close(found[:8], torch.tensor(source), atol=1e-3, rtol=0)
    assert found.std(correction=0).item() == pytest.approx(5.29657506942749, abs=1e-3)


@pytest.mark.slow
def test_frozen_clips_are_farther_in_i3d_than_the_clips_and_noise_farther_still() -> None:
    """From the very clips: between two real sets so small FVD is bias and nothing else."""
    net = real(i3d, "i3d")
    clips = films(6, "real", Shape(frames=16, height=32, width=32))
    noise = torch.randn(clips.shape, generator=generator("noise"))
    sets = {"frozen": clips[:, :, :1].expand_as(clips), "noise": (clips + 0.3 * noise).clamp(-1, 1)}
    at = i3d.extract(clips, net)
    far = {name: i3d.total({"made": i3d.extract(made, net), "real": at})["fvd"] for name, made in sets.items()}
    assert i3d.total({"made": at, "real": at})["fvd"] < 1 < 50 < far["frozen"] < far["noise"], far
    assert i3d.total({"made": at[:1], "real": at[:1]}) == {}
    about = i3d.about()
    assert "sha256" in about["features"] and "16x224x224" in about["input"]


# Inception


@torch.no_grad()
def test_inception_has_the_shape_of_fids() -> None:
    with torch.device("meta"):
        net = inception.Inception()
    sizes = []
    h = torch.empty(1, 3, 299, 299, device="meta")
    for layer in net:
        h = layer(h)
        sizes.append(tuple(h.shape[1:]))
    for wanted in ((64, 73, 73), (192, 35, 35), (288, 35, 35), (768, 17, 17), (1280, 8, 8), (2048, 8, 8), (2048,)):
        assert wanted in sizes
    assert sum(p.numel() for p in net.parameters()) == 21_768_352


def test_inceptions_means_leave_the_padding_out() -> None:
    pools = {name: part for name, part in inception.Inception().named_modules() if name.endswith("pool")}
    ones = torch.ones(1, 1, 4, 4)
    means = [pool for pool in pools.values() if isinstance(pool, torch.nn.AvgPool2d)]
    assert len(means) == 8 and all(torch.equal(pool(ones), ones) for pool in means)
    assert isinstance(pools["mixed_10.tower_2.pool"], torch.nn.MaxPool2d)  # FID's network alone has a maximum there


@torch.no_grad()
def test_inception_equals_its_source() -> None:
    found = real(inception, "inception")(film(2, 299)[0].transpose(0, 1))
    source = [[0.1540632, 0.7104515, 0.0, 0.0388274, 0.0476118, 0.8997733],
              [0.1650754, 0.6441578, 0.0017687, 0.0289344, 0.1004921, 0.6804641]]  # fmt: skip
    torch.testing.assert_close(found[:, :6], torch.tensor(source), atol=1e-4, rtol=0)
    assert found.mean().item() == pytest.approx(0.3202317953, abs=1e-5)


def test_inception_judges_frames_of_clips() -> None:
    net = real(inception, "inception")
    clips = films(2, "real", Shape(frames=5, height=32, width=32))
    features = inception.extract(clips, net)
    assert features.shape == (2, 4, 2048)
    total = inception.total({"made": features, "real": features})
    assert total["fid"] == pytest.approx(0, abs=1e-3) and set(total) == {"fid", "kid"}
    assert inception.total({"made": features[:1], "real": features[:1]}) == {}


# LPIPS


def random_lpips() -> lpips.Lpips:
    net = lpips.Lpips().requires_grad_(False)
    net.load_state_dict({name: t.abs() if "heads" in name else t for name, t in random_state(net).items()})
    return net


def test_lpips_is_nothing_for_equal_frames_and_grows_with_what_is_changed() -> None:
    net, truth = random_lpips(), films(2, "lpips", Shape(frames=3, height=32, width=48))
    assert lpips.distance(truth, truth, net).tolist() == [[0, 0, 0], [0, 0, 0]]
    changed = truth.clone()
    changed[1, :, 2] += 0.3
    apart = lpips.distance(changed, truth, net)
    assert (apart > 0).tolist() == [[False] * 3, [False, False, True]]
    more = truth + 0.6 * (changed - truth)
    assert 0 < lpips.distance(more, truth, net)[1, 2] < apart[1, 2]
    torch.testing.assert_close(lpips.distance(truth, changed, net), apart)


def test_lpips_leaves_out_frames_that_were_given(monkeypatch: pytest.MonkeyPatch) -> None:
    apart = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    monkeypatch.setattr(lpips, "distance", lambda frames, truth: apart)
    known = torch.tensor([[True, False, False], [True, True, True]])
    clip = torch.zeros(2, 3, 3, 8, 8)
    first, second = lpips.judge(clip, clip, known)["lpips"].tolist()
    assert first == 2.5 and math.isnan(second)


def test_lpips_equals_its_source() -> None:
    found = lpips.distance(film(4, 64), film(5, 64)[:, :, 1:] * 0.8, real(lpips, "lpips"))[0]
    source = [0.0201678, 0.0202875, 0.0192698, 0.0213839]
    torch.testing.assert_close(found, torch.tensor(source), atol=1e-5, rtol=1e-3)


# absent


@pytest.mark.parametrize("module", [i3d, inception, lpips])
def test_what_is_missing_is_said(module: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    monkeypatch.setenv(assets.VARIABLE, str(tmp_path))
    assert "cascade assets" in module.absent()
