"""Laws of the codec: pixels pass untouched; latents are diffusers', strictly loaded; known frames stay exact."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cascade import store
from cascade.codec import Autoencoder, Codec, Kind, Pixels
from cascade.config import parse, plain
from cascade.errors import ConfigError, InputError, NumericError
from cascade.foreign import CONFIG, WEIGHTS
from cascade.noise import Noise, generator, sample_id
from cascade.sampling.guidance import keep_known
from cascade.sampling.sampler import Sampler, Threshold, sample
from cascade.stage import Batch, Stage
from cascade.video import Shape, Video

KINDS = ("base", "tsr", "ssr", "interp")
PROMPTS = ("a red circle", "a blue square")
NOISE = Noise(3, "stage", tuple(sample_id(prompt) for prompt in PROMPTS))
Make = Callable[..., Any]


@pytest.fixture(scope="session")
def folder(autoencoder: Path) -> Path:
    return autoencoder


@pytest.fixture
def latent(folder: Path) -> Callable[..., Codec]:
    def make(**changes: Any) -> Codec:
        settings: dict[str, Any] = {"kind": Kind.LATENT, "weights": str(folder), "channels": 4, "stride": 2}
        return Codec(**(settings | changes))

    return make


@pytest.fixture
def latent_stage(make_stage: Make, net_config: Make, latent: Callable[..., Codec]) -> Make:
    def make(kind: str, **changes: Any) -> Stage:
        stage: Stage = make_stage(kind, std=0.1, codec=latent(), net=net_config(channels=4), **changes)
        return stage

    return make


def clip(name: str, *shape: int) -> Tensor:
    return torch.rand(shape, generator=generator("clip", name)) * 2 - 1


def given(stage: Stage, batch: int = 2) -> Video:
    """What the stage before makes; base: a clip whose first frame is known."""
    size = stage.rule.takes(stage.cfg)
    known = None
    if stage.cfg.kind == "base":
        known = torch.zeros(batch, size.frames, dtype=torch.bool)
        known[:, 0] = True
    return Video(clip(stage.cfg.kind, batch, 3, size.frames, size.height, size.width), 4.0, known)


# pixels


def test_pixels_are_the_very_tensors_given() -> None:
    x, mask, codec = clip("x", 2, 3, 4, 8, 8), torch.ones(2, 1, 4, 8, 8), Codec()
    coder = codec.open()
    assert isinstance(coder, Pixels) and coder.hash == "" and coder.to(torch.device("cpu")) is coder
    assert coder.encode(x) is x and coder.decode(x) is x and codec.mask(mask) is mask and codec.folder() is None
    assert codec.inside(Shape(frames=4, height=6, width=8)) == (4, 6, 8)


@pytest.mark.parametrize("kind", KINDS)
def test_in_pixels_a_stage_is_what_it_is_without_a_codec(kind: str, make_stage: Make, encode: Make) -> None:
    """The sampling of a stage written out for pixels alone; equal bit for bit."""
    stage = make_stage(kind, std=0.1, sampler=Sampler(steps=2, threshold=Threshold.STATIC), augment=0.3)
    low, text = given(stage), encode(list(PROMPTS))
    shape = stage.cfg.shape
    full = (2, 3, shape.frames, shape.height, shape.width)
    known, mask = stage.rule.condition(low, stage.cfg, shape)
    level = torch.full((2,), 0.3)
    cond = stage.condition(low, shape, text, stage.cfg.fps, level, NOISE(full, 0, "augment"))
    hooks = [keep_known(known, mask)] if stage.rule.KEEPS_KNOWN else []
    x = sample(
        stage.cfg.diffusion, lambda z, t, step: stage.denoise(z, t, cond), stage.cfg.sampler, NOISE, full, hooks=hooks
    ).clamp(-1, 1)
    with torch.no_grad():
        assert torch.equal(stage.sample(low, text, None, NOISE).frames, torch.where(mask > 0, known, x) if hooks else x)
    plainly = stage.condition(low, shape, text, stage.cfg.fps, torch.zeros(2), torch.zeros(full))
    assert torch.equal(plainly.concat, known) and torch.equal(plainly.mask, mask)
    video = Video(clip("video", 1, *full[1:]), 4.0)
    assert stage.example(video, text[:1], generator())[0] is video.frames


# latents


def test_latents_are_those_of_diffusers(folder: Path, latent: Callable[..., Codec]) -> None:
    from diffusers import AutoencoderKL

    model, coder, x = AutoencoderKL.from_pretrained(folder), latent().open(), clip("x", 2, 3, 3, 8, 12)
    z = coder.encode(x)
    assert z.shape == (2, 4, 3, 4, 6)
    with torch.no_grad():
        one = model.encode(x[1, :, 2][None]).latent_dist.mode()
        back = model.decode(one).sample.clamp(-1, 1)
    torch.testing.assert_close(z[1:, :, 2], one * model.config.scaling_factor)
    decoded = coder.decode(z)
    torch.testing.assert_close(decoded[1:, :, 2], back)
    assert decoded.shape == x.shape and decoded.abs().max() <= 1


def test_neither_chunks_nor_the_scale_change_what_is_decoded(latent: Callable[..., Codec]) -> None:
    x = clip("x", 1, 3, 5, 8, 8)
    coder, other = latent().open(), latent(chunk=2, scale=3.0).open()
    torch.testing.assert_close(other.encode(x) / 3.0, coder.encode(x) / 0.18215)
    torch.testing.assert_close(other.decode(other.encode(x)), coder.decode(coder.encode(x)), atol=1e-5, rtol=1e-5)


def test_a_shift_is_undone(folder: Path, latent: Callable[..., Codec], tmp_path: Path) -> None:
    moved = changed(folder, tmp_path, shift_factor=0.5)
    x, plainly, shifted = clip("x", 1, 3, 2, 8, 8), latent().open(), latent(weights=str(moved)).open()
    torch.testing.assert_close(shifted.encode(x), plainly.encode(x) - 0.5 * 0.18215)
    torch.testing.assert_close(shifted.decode(shifted.encode(x)), plainly.decode(plainly.encode(x)))


def test_a_position_is_known_where_all_of_its_pixels_are(latent: Callable[..., Codec]) -> None:
    mask = torch.ones(1, 1, 2, 4, 4)
    mask[0, 0, 1, 0, 1] = 0
    small = latent().mask(mask)
    assert small.shape == (1, 1, 2, 2, 2) and small[0, 0, 0].min() == 1
    assert small[0, 0, 1].tolist() == [[0, 1], [1, 1]]
    frames = mask[:, :, :, :1, :1]
    assert latent().mask(frames) is frames


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_of_latents_samples_and_keeps_known_frames(kind: str, latent_stage: Make, encode: Make) -> None:
    stage = latent_stage(kind)
    low, text, shape = given(stage), encode(list(PROMPTS)), stage.cfg.shape
    assert "coder" not in vars(stage), "loaded when it is first needed"
    seen: list[Any] = []
    stage.net.register_forward_hook(lambda module, args, out: seen.append((args[0].shape, args[2], out.shape)))
    made = stage.sample(low, text, None, NOISE)
    inside = (2, 4, shape.frames, shape.height // 2, shape.width // 2)
    assert made.shape == shape and made.frames.abs().max() <= 1
    assert all(size == out == inside and cond.concat.shape == inside for size, cond, out in seen)
    known, mask = stage.rule.condition(low, stage.cfg, shape)
    torch.testing.assert_close(seen[0][1].concat, stage.coder.encode(known))
    if stage.rule.KEEPS_KNOWN:
        frames = mask[0, 0, :, 0, 0] > 0
        assert frames.any() and not frames.all()
        assert torch.equal(made.frames[:, :, frames], known[:, :, frames])
    assert torch.equal(stage.sample(low, text, None, NOISE).frames, made.frames)


def test_a_base_of_latents_needs_no_input(latent_stage: Make, encode: Make) -> None:
    stage = latent_stage("base")
    assert stage.sample(None, encode(list(PROMPTS)), None, NOISE).shape == stage.cfg.shape


@pytest.mark.parametrize("kind", KINDS)
def test_a_stage_of_latents_trains(kind: str, latent_stage: Make, encode: Make) -> None:
    stage = latent_stage(kind, augment_max=0.5)
    shape = stage.cfg.shape
    video = Video(clip("video", 1, 3, shape.frames, shape.height, shape.width), stage.cfg.fps)
    feeder = Stage(stage.cfg, stage.rule, nn.Identity())  # what makes training examples has no network
    x, cond = feeder.example(video, encode(["a"]), generator("example", 1))
    assert x.shape == cond.concat.shape == (1, 4, shape.frames, shape.height // 2, shape.width // 2)
    torch.testing.assert_close(x, feeder.coder.encode(video.frames))
    eps = torch.randn(x.shape, generator=generator())
    stage.loss(Batch(x, eps, torch.tensor([0.5]), torch.zeros(1), cond)).sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in stage.net.parameters())


def test_the_hash_names_the_weights(folder: Path, latent: Callable[..., Codec], tmp_path: Path) -> None:
    other = changed(folder, tmp_path, scaling_factor=0.2)
    assert latent().open().hash == latent(chunk=3).open().hash != latent(weights=str(other)).open().hash


# settings


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"weights": "x"}, "weights is x, but kind is pixel"),
        ({"channels": 4}, "channels is 4, but kind is pixel"),
        ({"stride": 8}, "stride is 8, but kind is pixel"),
        ({"scale": 1.0}, "scale is 1.0, but kind is pixel"),
        ({"kind": "latent", "channels": 4, "stride": 8}, "weights is None"),
        ({"kind": "latent", "weights": "x", "stride": 8}, "channels is 0"),
        ({"kind": "latent", "weights": "x", "channels": 4}, "stride is 1"),
        ({"kind": "latent", "weights": "x", "channels": 4, "stride": 8, "scale": -1}, "scale is -1"),
        ({"chunk": 0}, "chunk is 0"),
        ({"kind": "wavelet"}, "'wavelet' is not one of pixel, latent"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        parse(settings, Codec, "base.codec")


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"codec": {"kind": "latent", "weights": "x", "channels": 8, "stride": 2}}, "net.channels is 4.*channels, 8"),
        ({"codec": {"kind": "latent", "weights": "x", "channels": 4, "stride": 3}}, "multiple of 3.*codec stride 3"),
        ({"sampler": {"steps": 2, "threshold": "static"}}, "threshold is static, expected none"),
    ],
)
def test_a_stage_that_does_not_fit_its_codec_is_refused(
    changes: dict[str, Any], expected: str, stage_config: Make, net_config: Make, latent: Callable[..., Codec]
) -> None:
    cfg = stage_config("base", net=net_config(channels=4), codec=latent())
    with pytest.raises(ConfigError, match=expected):
        parse({**plain(cfg), **changes}, type(cfg), "base")


# weights


def changed(folder: Path, tmp_path: Path, **settings: Any) -> Path:
    """A copy of the autoencoder with other settings in its config.json."""
    copy = tmp_path / "changed"
    shutil.copytree(folder, copy)
    tree = json.loads((copy / CONFIG).read_text())
    (copy / CONFIG).write_text(json.dumps(tree | settings))
    return copy


def edited(folder: Path, tmp_path: Path, edit: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    from safetensors.torch import load_file, save_file

    copy = tmp_path / "edited"
    shutil.copytree(folder, copy)
    save_file(edit(load_file(copy / WEIGHTS)), copy / WEIGHTS, metadata={"format": "pt"})
    return copy


FIRST = "encoder.conv_in.bias"


@pytest.mark.parametrize(
    "edit, kind, expected",
    [
        (lambda state: {k: v for k, v in state.items() if k != FIRST}, InputError, f"{FIRST} missing"),
        (lambda state: {**state, "extra": torch.zeros(1)}, InputError, "extra unknown"),
        (lambda state: {**state, FIRST: torch.zeros(3)}, InputError, FIRST),
        (lambda state: {**state, FIRST: torch.full((8,), torch.nan)}, NumericError, f"{FIRST} is not finite"),
    ],
    ids=["missing", "unknown", "shape", "nan"],
)
def test_weights_that_do_not_fit_are_refused(
    edit: Any, kind: type[Exception], expected: str, folder: Path, latent: Callable[..., Codec], tmp_path: Path
) -> None:
    with pytest.raises(kind, match=expected) as caught:
        latent(weights=str(edited(folder, tmp_path, edit))).open()
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_or_holds_a_pickle_is_refused(
    folder: Path, latent: Callable[..., Codec], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        latent(weights=str(tmp_path / "none")).folder()
    shutil.copy(folder / CONFIG, tmp_path)
    (tmp_path / "diffusion_pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(InputError, match=f"{WEIGHTS} missing.*save_pretrained"):
        latent(weights=str(tmp_path)).open()


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda data: b"<html>" * 9], ids=["cut", "other"])
def test_damaged_weights_are_refused(
    damage: Callable[[bytes], bytes], folder: Path, latent: Callable[..., Codec], tmp_path: Path
) -> None:
    copy = changed(folder, tmp_path)
    (copy / WEIGHTS).write_bytes(damage((copy / WEIGHTS).read_bytes()))
    with pytest.raises(InputError, match="autoencoder"):
        latent(weights=str(copy)).open()


def test_a_manifest_is_held_to(folder: Path, latent: Callable[..., Codec], tmp_path: Path) -> None:
    files = {name: (folder / name).read_bytes() for name in (CONFIG, WEIGHTS)}
    path = store.commit(tmp_path / "vae", files, kind="weights")
    assert isinstance(latent(weights=str(path)).open(), Autoencoder)
    (path / CONFIG).write_bytes(files[CONFIG] + b" ")
    with pytest.raises(InputError, match="autoencoder"):
        latent(weights=str(path)).folder()


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"_class_name": "VQModel"}, "is of VQModel, not AutoencoderKL"),
        ({"norm_num_groups": 5}, "must be divisible"),
    ],
)
def test_another_model_is_refused(
    settings: dict[str, Any], expected: str, folder: Path, latent: Callable[..., Codec], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=expected):
        latent(weights=str(changed(folder, tmp_path, **settings))).open()


@pytest.mark.parametrize("wrong, fix", [({"channels": 8}, "codec.channels=4"), ({"stride": 4}, "codec.stride=2")])
def test_settings_are_held_against_the_weights(wrong: dict[str, Any], fix: str, latent: Callable[..., Codec]) -> None:
    with pytest.raises(InputError, match=fix):
        latent(**wrong).open()


def test_what_is_decoded_must_be_finite(latent: Callable[..., Codec]) -> None:
    with pytest.raises(NumericError, match="not finite"):
        latent().open().decode(torch.full((1, 4, 1, 4, 4), torch.inf))


def test_the_codec_is_part_of_the_settings(latent: Callable[..., Codec]) -> None:
    assert parse(plain(latent(scale=2.0)), Codec) == latent(scale=2.0) != replace(latent(), chunk=2)
